"""inotify: the kernel says what happens in directories, so that nobody has to look again and again."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import trio

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF = (
    0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800,
)  # fmt: skip
"""What can be asked for."""

OVERFLOW, IGNORED, IS_DIRECTORY = 0x4000, 0x8000, 0x4000_0000
"""What is told unasked: something was lost, a watch is over, it is about a directory."""

ONLY_DIRECTORY, ADD = 0x100_0000, 0x2000_0000
"""How to ask: not for a file, and in addition to what was asked for before."""

_HEAD = struct.Struct("iIII")


class Happening(NamedTuple):
    """Something that happened to `name` in the directory of `watch`; without a name, to the directory itself."""

    watch: int
    mask: int
    name: str


class Inotify:
    """One inotify descriptor. Making it raises OSError where the system has none, or no more. Use it as a context."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._libc, "inotify_init1"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def __enter__(self) -> Inotify:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hear of nothing any more."""
        os.close(self._fd)

    def watch(self, path: Path | str, mask: int) -> int:
        """Hear of this from now on; the number of the watch. What is watched already keeps its number. Raises OSError."""
        return self._checked(self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask))

    def unwatch(self, watch: int) -> None:
        """Hear of it no more."""
        self._libc.inotify_rm_watch(self._fd, watch)

    async def wait(self) -> list[Happening]:
        """Wait until something has happened; all that has been told so far. Cancelled: nothing is lost."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                return list(_happenings(os.read(self._fd, 1 << 16)))
            except BlockingIOError:
                pass  # somebody else has read it

    def _checked(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


def _happenings(told: bytes) -> Iterator[Happening]:
    at = 0
    while at < len(told):
        watch, mask, _, length = _HEAD.unpack_from(told, at)
        at += _HEAD.size + length
        yield Happening(watch, mask, os.fsdecode(told[at - length : at].rstrip(b"\0")))
