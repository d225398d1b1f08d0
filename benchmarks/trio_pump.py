"""The Trio floor with its children's output captured: the least a log pump on Trio can be. A yardstick, not a product.

    python -m benchmarks.trio_pump SOCKET LIST FOLDER {copy,splice}

As `trio_floor.py`, and appends what the command of line N writes to FOLDER/jN.log: a pipe and a task per child, no rotation.
`copy` reads and writes; `splice` lets the kernel move the bytes, and so never sees them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import trio

from benchmarks.trio_floor import Floor, Job, main

CHUNK = 1 << 16
"""What a pipe holds."""


class CapturedJob(Job):
    """One command, kept running, and its pipe."""

    def __init__(self, folder: str, way: str, name: str, argv: list[str]) -> None:
        super().__init__(name, argv)
        # Not O_APPEND, which splice refuses.
        self.file = os.open(f"{folder}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.move = {"copy": self.copy, "splice": self.splice}[way]

    def start(self, floor: Floor, output: int) -> subprocess.Popen[bytes]:
        """Start it with a pipe in place of `output`."""
        pipe, output = os.pipe2(os.O_CLOEXEC)
        process = super().start(floor, output)
        os.close(output)
        floor.children.start_soon(self.pump, pipe)
        return process

    async def pump(self, pipe: int) -> None:
        """Empty the pipe until its end."""
        moved = 1
        while moved:
            await trio.lowlevel.wait_readable(pipe)
            moved = self.move(pipe)
        os.close(pipe)

    def copy(self, pipe: int) -> int:
        """Through this process."""
        return os.write(self.file, os.read(pipe, CHUNK))

    def splice(self, pipe: int) -> int:
        """Past it."""
        return os.splice(pipe, self.file, CHUNK)


if __name__ == "__main__":
    path, listing, folder, way = sys.argv[1:]
    main(path, listing, partial(CapturedJob, folder, way))
