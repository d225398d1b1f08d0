"""`child.c` for a machine without a C compiler; the same argument, `SLOT:MODE:FD:PATH`."""

import os
import signal
import struct
import sys
import time


def main(argument: str) -> None:
    slot, mode, ready, path = argument.split(":", 3)
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(log, struct.pack("=qii", time.monotonic_ns(), os.getpid(), int(slot)))
    os.close(log)
    if ready.isdigit():
        os.write(int(ready), b"\n")
        os.close(int(ready))
    while mode == "l":
        signal.pause()
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main(sys.argv[1])
