"""The wait for a file that a run makes."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import trio

from supervisor.errors import RunFailed


class FreshFile:
    """`{ file = path }`: waits for a file that this run made. Make it before the run starts: what is there then is stale.

    A stale file counts once it is written, touched or replaced. Waiting is by inotify; the directory need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).absolute()
        self._stale = self._look()

    async def wait(self) -> None:
        """Wait until the file is there and fresh. Raises RunFailed where it cannot be watched."""
        with _Inotify() as inotify:
            while True:
                inotify.watch(self._nearest())
                if self._fresh():
                    return
                await inotify.wait()

    def _nearest(self) -> Path:
        """The directory in which something must happen next: the file's, or the nearest that exists above it."""
        return next((parent for parent in self._path.parents if parent.is_dir()), Path("/"))

    def _look(self) -> tuple[int, int, int, int] | None:
        try:
            there = self._path.stat()
        except OSError:
            return None
        return there.st_dev, there.st_ino, there.st_mtime_ns, there.st_ctime_ns

    def _fresh(self) -> bool:
        now = self._look()
        return now is not None and now != self._stale


class _Inotify:
    """One inotify descriptor that looks at one directory at a time, and tells only that something happened there."""

    _CHANGE = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x400 | 0x800  # modify, attrib, close, moves, create, self gone or moved

    def __enter__(self) -> _Inotify:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watched: tuple[Path, int] | None = None
        if self._fd < 0:
            self._fail("inotify")
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def watch(self, directory: Path) -> None:
        """Look at `directory` from now on, and at no other."""
        watch = self._libc.inotify_add_watch(self._fd, os.fsencode(directory), self._CHANGE)
        if watch < 0 and ctypes.get_errno() not in (errno.ENOENT, errno.ENOTDIR):
            self._fail(str(directory))
        if self._watched is not None and self._watched[1] != watch:
            self._libc.inotify_rm_watch(self._fd, self._watched[1])
        self._watched = (directory, watch)

    async def wait(self) -> None:
        """Wait until something has happened, and forget what."""
        await trio.lowlevel.wait_readable(self._fd)
        os.read(self._fd, 1 << 16)

    def _fail(self, what: str) -> None:
        reason = os.strerror(ctypes.get_errno())
        raise RunFailed(f"cannot watch {what} for `ready`: {reason}: see fs.inotify.max_user_instances and max_user_watches")
