"""Run by test_output in a mount namespace: output to a file system of 64 KB that is filled, emptied and filled again."""

import os
import subprocess
import tempfile
from pathlib import Path

import trio

from supervisor.output import open_outputs


async def main(directory: Path) -> None:
    lost = []
    async with open_outputs(directory / "logs") as outputs:
        capture = outputs.open("job", on_lost=lambda count, cause: lost.append(count))
        for _ in range(40):
            os.write(capture.fd, b"x" * 4095 + b"\n")
            capture.drain()
        capture.finish()
        log = directory / "logs" / "job.log"
        print("lost:", "yes" if lost else "no")
        print("accounted:", "yes" if log.stat().st_size + sum(lost) == 40 * 4096 else "no")
        log.unlink()
        capture = outputs.open("job")
        os.write(capture.fd, b"again\n")
        capture.finish()
        print("recovered:", "yes" if log.read_bytes() == b"again\n" else "no")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mounted], check=True)
        try:
            trio.run(main, Path(mounted))
        finally:
            subprocess.run(["umount", mounted], check=True)
