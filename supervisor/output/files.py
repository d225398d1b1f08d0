"""A file that captured output goes to, with rotation by size and age."""

from __future__ import annotations

import ctypes
import functools
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import trio
from msgspec import Meta

from supervisor.spec import Bytes, Seconds, Spec

_SUFFIXES = ("", ".gz")
_AT_EMPTY_PATH, _STATX_BTIME = 0x1000, 0x800
_STATX = struct.Struct("=I76xqI")  # stx_mask, then stx_btime at 80


class Rotate(Spec, frozen=True, kw_only=True):
    """`rotate = { … }`: when a log file is put aside, and what becomes of it."""

    size: Annotated[
        Bytes,
        Meta(description="a file that has grown to this is put aside as NAME.log.1, at the end of a line; 0: never"),
    ] = Bytes(10 << 20)
    age: Annotated[
        Seconds | None,
        Meta(gt=0, description="a file that was begun so long ago is put aside before the next line is written to it"),
    ] = None
    keep: Annotated[int, Meta(ge=0, description="how many files put aside are kept")] = 5
    compress: Annotated[bool, Meta(description="files put aside are compressed with gzip, as NAME.log.1.gz")] = False


class LogFile:
    """One file with rotation. `write` stores what it can and never raises; `error` says why it could not.

    Opened at the first byte, mode 0600, never through a symbolic link. Bytes go to the file that has the name: one that
    somebody removes or puts another in place of is opened anew, and its directory made where `make_directory` says so.
    What is no regular file (a FIFO, a device) is not rotated, and never waited for: what it has no room for is left over.
    """

    __slots__ = (
        "_begun",
        "_clock",
        "_fd",
        "_identity",
        "_line",
        "_make_directory",
        "_regular",
        "_size",
        "error",
        "path",
        "rotate",
        "rotated",
    )

    unfinished: Final = False  # bytes are stored as they come, in whatever pieces

    def __init__(
        self, path: Path, rotate: Rotate, *, make_directory: bool, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self.path = path
        self.rotate = rotate
        self.rotated: Callable[[], None] | None = None
        """Called when a file has been put aside."""
        self.error: OSError | None = None
        self._make_directory = make_directory
        self._clock = clock
        self._fd = -1
        self._identity = (0, 0)
        self._regular = True
        self._size = 0
        self._begun = 0.0
        self._line = 0  # how much of an unfinished line stands at the end of the file

    def write(self, data: bytes) -> tuple[int, int]:
        """Append `data`: how many bytes are stored, and how many are lost. What is left has no room now: `fileno` will tell."""
        self.error = None
        at = 0
        try:
            while at < len(data):
                self._open()
                room = self._room(data, at)
                if room == 0 and self._put_aside():
                    continue
                room = room or len(data) - at
                written = os.write(self._fd, memoryview(data)[at : at + room])
                self._wrote(data, at, written)
                at += written
        except OSError as error:
            if isinstance(error, BlockingIOError) and self._fd >= 0:
                return at, 0
            self.error = error
            return at, len(data) - at
        return at, 0

    def fileno(self) -> int:
        """What becomes writable when there is room again."""
        return self._fd

    def close(self) -> None:
        """Let go of the file; the next write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __str__(self) -> str:
        return str(self.path)

    def _room(self, data: bytes, at: int) -> int:
        """How many bytes from `at` on go into the present file; 0: put it aside first.

        A line is kept whole, and so may take the file beyond its size or age, unless the line alone is larger than that.
        """
        end = len(data)
        if not self._regular:
            return end - at
        if self._size and self._too_old():
            if not self._line:
                return 0
            end = data.find(b"\n", at) + 1 or end
        limit = self.rotate.size
        if not limit or self._size + end - at <= limit:
            return end - at
        fitting = data.rfind(b"\n", at, min(end, at + max(0, limit - self._size))) + 1
        if fitting:
            return fitting - at
        if self._size and not self._line:
            return 0
        end = data.find(b"\n", at) + 1 or end
        return max(0, min(end - at, limit - self._line))

    def _too_old(self) -> bool:
        age = self.rotate.age
        return age is not None and self._clock() - self._begun >= age

    def _wrote(self, data: bytes, at: int, count: int) -> None:
        self._size += count
        newline = data.rfind(b"\n", at, at + count)
        self._line = at + count - newline - 1 if newline >= 0 else self._line + count

    def _open(self) -> None:
        """See to it that the file which is open is the one that has the name."""
        if self._fd >= 0 and not self._moved():
            return
        self.close()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            if not self._make_directory:
                raise
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self.path, flags, 0o600)
        self._look_at(os.fstat(self._fd))

    def _moved(self) -> bool:
        try:
            there = self.path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # it cannot be seen any more, but still be written to
        if self._regular:
            self._size = there.st_size  # somebody may have truncated it
        return (there.st_dev, there.st_ino) != self._identity

    def _look_at(self, there: os.stat_result) -> None:
        same = self._identity == (there.st_dev, there.st_ino)
        self._identity = (there.st_dev, there.st_ino)
        self._regular = stat.S_ISREG(there.st_mode)
        self._size = there.st_size
        self._line = 0
        if self.rotate.age is not None and not (same and self._size):
            self._begun = self._clock() - (_age(self._fd, there) if self._size else 0)

    def _put_aside(self) -> bool:
        """NAME becomes NAME.1, NAME.1 becomes NAME.2, and so on; the oldest goes. Where that fails, the file grows on."""
        try:
            self._shift()
        except FileNotFoundError:
            pass  # somebody else was quicker
        except OSError as error:
            self.error = error
            return False
        self.close()
        if self.rotated is not None:
            self.rotated()
        return True

    def _shift(self) -> None:
        keep = self.rotate.keep
        free = next((number for number in range(1, keep) if not self._standing(number)), max(keep, 1))
        self._drop_from(keep + 1)  # `keep` may have become less
        if free >= keep:
            self._drop(free)
        for number in range(free - 1, 0, -1):
            for suffix in self._standing(number):
                self._aside(number, suffix).rename(self._aside(number + 1, suffix))
        if keep:
            self.path.rename(self._aside(1))
        else:
            self.path.unlink()

    def _drop_from(self, number: int) -> None:
        while self._drop(number):
            number += 1

    def _drop(self, number: int) -> bool:
        standing = self._standing(number)
        for suffix in standing:
            self._aside(number, suffix).unlink()
        return bool(standing)

    def _standing(self, number: int) -> list[str]:
        """What there is of the file put aside `number` rotations ago: plain, compressed, or (after a crash) both."""
        return [suffix for suffix in _SUFFIXES if os.path.lexists(self._aside(number, suffix))]

    def _aside(self, number: int, suffix: str = "") -> Path:
        return self.path.with_name(f"{self.path.name}.{number}{suffix}")

    def all(self) -> Iterator[Path]:
        """The file and those put aside, from the newest on."""
        yield self.path
        for number in range(1, self.rotate.keep + 1):
            for suffix in self._standing(number)[:1]:  # both say the same
                yield self._aside(number, suffix)

    # Compression is done elsewhere, and agreed here, since the numbers change meanwhile.

    def uncompressed(self) -> Path | None:
        """The newest file put aside that is not compressed."""
        numbers = range(1, self.rotate.keep + 1)
        return next((path for number in numbers if (path := self._aside(number)).is_file()), None)

    @property
    def draft(self) -> Path:
        """Where a compressed file is made. It has a name of its own, so half a file is never taken for a whole one."""
        return self.path.with_name(f"{self.path.name}.gz.part")

    def replace(self, plain: os.stat_result) -> None:
        """Put the draft in the place of the file that it was made of, wherever that stands now. Raises OSError."""
        for number in range(1, self.rotate.keep + 1):
            path = self._aside(number)
            if path.is_file() and os.path.samestat(plain, path.stat()):
                self.draft.rename(self._aside(number, ".gz"))
                path.unlink()
                return
        self.draft.unlink(missing_ok=True)  # it was dropped meanwhile


def _age(fd: int, there: os.stat_result) -> float:
    """How old a file is, by the wall clock: the only one that outlives a daemon."""
    return max(0.0, time.clock_gettime(time.CLOCK_REALTIME) - (_birth(fd) or there.st_mtime))


def _birth(fd: int) -> float:
    """When a file was made; 0 where the file system does not say."""
    statx = _statx()
    known = ctypes.create_string_buffer(256)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, known):
        return 0.0
    mask, seconds, nanoseconds = _STATX.unpack_from(known)
    return seconds + nanoseconds / 1e9 if mask & _STATX_BTIME else 0.0


@functools.cache
def _statx() -> Any:
    """The system call that `os.stat` does not have yet; None where the C library does not have it either."""
    return getattr(ctypes.CDLL(None), "statx", None)
