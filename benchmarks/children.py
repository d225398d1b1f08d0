"""The child that every supervisor keeps, and the log in which it notes its starts.

With a C compiler it is `child.c`: 9 kB, static, no libc, so that what is measured is the supervisor and not the child's own
start. Without one it is a Python script, which makes all supervisors look alike; the report says which it was.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
RECORD = struct.Struct("=qii")

Mode = Literal["live", "crash", "blocks", "lines", "paced"]
"""What a child does; the last three are those of a writer."""


class Failed(Exception):
    """A measurement that could not be made, with the reason as one sentence."""


def pause(seconds: float) -> None:
    """Let the machine go on for a moment. There is no event loop here, and what is measured is never the pause."""
    time.sleep(seconds)  # noqa: TID251


def compiler() -> str | None:
    """The C compiler, or None."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compiled(source: str, where: Path, *flags: str) -> Path | None:
    """`source` of this folder as a program in `where`; None without a compiler, or on a machine the source does not know."""
    program = where / Path(source).stem
    if not (cc := compiler()):
        return None
    done = subprocess.run([cc, "-O2", *flags, str(HERE / source), "-o", str(program)], capture_output=True)
    return program if done.returncode == 0 else None


@dataclass(frozen=True)
class Child:
    """How to start the child of a slot, as words or as a run script."""

    program: tuple[str, ...]
    native: bool
    log: Path

    @classmethod
    def build(cls, where: Path) -> Child:
        """Compile the child into `where`, which also gets the log of its starts."""
        flags = ("-static", "-nostdlib", "-fno-builtin", "-fno-stack-protector", "-fno-asynchronous-unwind-tables")
        program = compiled("child.c", where, *flags)
        log = where / "starts"
        log.touch()
        if program:
            return cls((str(program),), True, log)
        return cls((sys.executable, "-I", "-S", str(HERE / "child.py")), False, log)

    def command(self, slot: int, mode: Mode = "live", *, ready_fd: int | None = None) -> list[str]:
        """The words that start it. `ready_fd` is a descriptor on which it says that it is ready."""
        return [*self.program, self.argument(slot, mode, ready_fd)]

    def argument(self, slot: int, mode: Mode, ready_fd: int | None) -> str:
        """What it is to do, as one word."""
        return f"{slot}:{mode[0]}:{'-' if ready_fd is None else ready_fd}:{self.log}"

    def script(self, slot: int, mode: Mode = "live", *, ready_fd: int | None = None) -> str:
        """The same as an executable file, for supervisors that want a `run` script; no shell stands between if it can be."""
        words = self.command(slot, mode, ready_fd=ready_fd)
        return f"#!{' '.join(words)}\n" if self.native else f"#!/bin/sh\nexec {' '.join(words)}\n"


@dataclass
class Starts:
    """What the children have noted: for each slot the pid and the start (nanoseconds, monotonic) of its newest life."""

    log: Path
    slots: int
    pid: list[int] = field(init=False)
    at: list[int] = field(init=False)
    lives: list[int] = field(init=False)
    total: int = 0
    started: int = 0

    def __post_init__(self) -> None:
        self.pid, self.at, self.lives = ([0] * self.slots for _ in range(3))
        self.log.write_bytes(b"")
        self._file = os.open(self.log, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the log."""
        os.close(self._file)

    def read(self) -> None:
        """Take in what was noted since the last time."""
        while len(data := os.pread(self._file, RECORD.size << 16, self.total * RECORD.size)) >= RECORD.size:
            for at, pid, slot in RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]):
                self.started += not self.lives[slot]
                self.pid[slot], self.at[slot] = pid, at
                self.lives[slot] += 1
                self.total += 1

    def wait(self, done: Callable[[], bool], what: str, *, timeout: float, every: float = 0.002) -> None:
        """Read until `done()`. The moment it notices is not the measurement: the children's own notes are."""
        end = time.monotonic() + timeout
        while True:
            self.read()
            if done():
                return
            if time.monotonic() > end:
                raise Failed(f"{what} did not happen within {timeout:g} s")
            pause(every)
