"""Captured output: how fast it is taken from the writers, at what cost, and whether every byte of it arrives.

The writers number their lines. When they are done, and the daemon has been stopped in order, the files that it left are read
from the first to the last, and compared with what was written.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.children import Child, Failed, Mode, compiled, pause
from benchmarks.drivers import Driver, Rotation, Setup
from benchmarks.life import LONG, Life, Pace, Samples, living
from benchmarks.processes import clocks_of, spent_between

LINE = 100
"""Bytes of a line; `writer.c` says what stands in it."""

LINES = 1000
"""Lines in a block."""

FILLER = b"x" * (LINE - 17)
"""What follows the slot and the number in each line."""

STILL_SECONDS = 1.0
"""Output that has not grown for so long will not grow any more."""


@dataclass(frozen=True)
class Shape:
    """A way to write: so many children, each in this mode."""

    key: str
    title: str
    children: int
    mode: Mode


SHAPES = (
    Shape("blocks", "one child, large blocks", 1, "blocks"),
    Shape("lines", "one child, a write per line", 1, "lines"),
    Shape("crowd", "50 children, large blocks", 50, "blocks"),
    Shape("paced", "50 children, 1000 lines/s each", 50, "paced"),
)


@dataclass(frozen=True)
class Writer(Child):
    """The child that writes, each until one of its limits is reached."""

    lines: int = 0
    milliseconds: int = 0

    @classmethod
    def compile(cls, where: Path) -> Writer | None:
        """Compile it into a folder of its own in `where`, with what it needs there; None where it cannot be."""
        where = where / "w"
        where.mkdir()
        if not (program := compiled("writer.c", where, "-static")):
            return None
        os.mkfifo(where / "gate")
        (where / "done").touch()
        (where / "starts").touch()
        return cls((str(program),), True, where / "starts")

    @property
    def folder(self) -> Path:
        """Where the gate is, and where the writers note that they are done."""
        return self.log.parent

    def argument(self, slot: int, mode: Mode, ready_fd: int | None) -> str:
        """It says nothing on `ready_fd`: nobody restarts a writer."""
        return f"{slot}:{mode[0]}:{self.lines}:{self.milliseconds}:{self.folder}"


class Written(NamedTuple):
    """What a writer says of itself: how many lines, and from when to when (nanoseconds, monotonic)."""

    slot: int
    lines: int
    began: int
    ended: int


def measure_capture(driver: Driver, writer: Writer, shape: Shape, pace: Pace) -> Samples:
    """Let the writers of this shape write, and account for every byte."""
    lines, milliseconds = pace.capture_bytes // LINE // shape.children, round(pace.capture_seconds * 1000)
    rotation = Rotation(pace.rotate_at, pace.capture_bytes // pace.rotate_at + 2)  # nothing is removed
    writer = replace(writer, lines=lines, milliseconds=milliseconds)
    with living(driver, writer, shape.children, shape.mode, rotation=rotation) as life:
        life.boot()
        pause(pace.settle_seconds)
        helpers = life.helpers()
        before = clocks_of(helpers)
        with _opened(writer.folder / "gate", life):
            written = _wait_until_written(writer, life)
        _wait_until_stored(driver, life.setup, sum(one.lines for one in written) * LINE)
        cpu = spent_between(before, clocks_of(helpers))
        life.daemon.stop(driver.stop_signal, timeout=LONG)
        return _accounts(driver, life.setup, written, cpu)


@contextmanager
def _opened(gate: Path, life: Life) -> Iterator[None]:
    """Let all writers begin at once. It stays open meanwhile, for one that comes late to it."""
    end = time.monotonic() + LONG
    while True:
        try:
            fd = os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:  # nobody waits there yet
            if time.monotonic() > end or not life.daemon.alive:
                raise Failed(f"no writer came to the gate: {error}") from error
        pause(0.005)
    try:
        yield
    finally:
        os.close(fd)


def _wait_until_written(writer: Writer, life: Life) -> list[Written]:
    done, end = writer.folder / "done", time.monotonic() + LONG
    try:
        while len(lines := done.read_bytes().splitlines()) < life.setup.count:
            if time.monotonic() > end or not life.daemon.alive:
                raise Failed(f"{life.setup.count - len(lines)} of {life.setup.count} writers did not come to their end")
            pause(0.005)
        return sorted(Written(*map(int, line.split())) for line in lines)
    finally:
        done.write_bytes(b"")


def _wait_until_stored(driver: Driver, setup: Setup, size: int) -> None:
    """Wait until `size` bytes are in the files, or until they do not grow any more."""
    stored, since = -1, time.monotonic()
    while time.monotonic() - since < STILL_SECONDS:
        now = sum(path.stat().st_size for slot in setup.slots for path in driver.captured(setup, slot) if path.exists())
        if now >= size:
            return
        if now != stored:
            stored, since = now, time.monotonic()
        pause(0.02)


def _accounts(driver: Driver, setup: Setup, written: Sequence[Written], cpu: float) -> Samples:
    size = sum(one.lines for one in written) * LINE
    if not size:
        raise Failed("the writers wrote nothing")
    seconds = (max(one.ended for one in written) - min(one.began for one in written)) / 1e9
    losses = [audit(driver.captured(setup, one.slot), one.slot, one.lines) for one in written]
    return {
        "rate": [size / seconds],
        "cost": [cpu / size],
        "core": [cpu / seconds],
        "lost": [sum(loss.lost for loss in losses)],
        "torn": [sum(loss.torn for loss in losses)],
    }


class Audit(NamedTuple):
    """How many bytes are not there, and how many lines were cut in two by a rotation."""

    lost: int
    torn: int


def audit(files: Sequence[Path], slot: int, lines: int) -> Audit:
    """Compare `files`, oldest first, with the `lines` lines that the writer of `slot` wrote."""
    present = [path for path in files if path.exists() and path.stat().st_size]
    if sum(path.stat().st_size for path in present) > lines * LINE:
        raise Failed(f"there is more in the files of slot {slot} than was written")
    torn = sum(not _ends_a_line(path) for path in present[:-1])
    blocks = _blocks(slot, lines)
    whole = all(found == next(blocks, b"") for found in _read(present))
    if whole and next(blocks, None) is None:
        return Audit(0, torn)
    return Audit(LINE * (lines - _intact(present, slot, lines)), torn)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _blocks(slot: int, lines: int) -> Iterator[bytes]:
    """What the writer wrote, a thousand lines at a time."""
    pattern = b"".join(b"%04d #######%03d %b\n" % (slot, number, FILLER) for number in range(LINES))
    for first in range(0, lines, LINES):
        yield pattern.replace(b"#######", b"%07d" % (first // LINES))[: (lines - first) * LINE]


def _read(files: Sequence[Path]) -> Iterator[bytes]:
    """The files as one, in pieces of a block."""
    piece = b""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while more := file.read(LINE * LINES - len(piece)):
                piece += more
                if len(piece) == LINE * LINES:
                    yield piece
                    piece = b""
    if piece:
        yield piece


def _intact(files: Sequence[Path], slot: int, lines: int) -> int:
    """How many of the lines are there, whole and true, wherever they stand."""
    line, seen, rest = re.compile(b"%04d ([0-9]{10}) %b" % (slot, FILLER)), bytearray(lines), b""
    for piece in _read(files):
        *found, rest = (rest + piece).split(b"\n")
        for true in filter(None, map(line.fullmatch, found)):
            if int(true[1]) < lines:
                seen[int(true[1])] = 1
    return sum(seen)
