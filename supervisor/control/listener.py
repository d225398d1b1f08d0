"""The control socket's place in the file system: taken atomically, watched, taken back when stolen, given up when left."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from pathlib import Path

import trio

from supervisor import unix
from supervisor.unix import SocketTaken

BACKLOG = 512

_IN_NONBLOCK, _IN_CLOEXEC, _IN_ONLYDIR = os.O_NONBLOCK, os.O_CLOEXEC, 0x0100_0000
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x40, 0x80, 0x200, 0x400, 0x800
_GONE = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF


class Place:
    """The path of a listening Unix socket, mode 0600, in a directory that is made 0700 where it is missing.

    Use it as a context: on leaving, the path is unlinked if it is still ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.watched = False
        """Whether the system tells us when the path is stolen."""
        self._identity: tuple[int, int] | None = None
        self._inotify: int | None = None

    def __enter__(self) -> Place:
        self._inotify = _inotify_open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._inotify is not None:
            os.close(self._inotify)
        if self.is_ours():
            self.path.unlink(missing_ok=True)

    def take(self) -> socket.socket:
        """Listen at the path: bound under another name and renamed, so that it appears complete, replacing a stale one.

        Raises SocketTaken where another process answers or the path is no socket, OSError where the system refuses.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_directory(self.path.parent)
        self.watched = self._inotify is not None and _inotify_watch(self._inotify, self.path.parent)
        try:
            listener, self._identity = unix.listen(self.path, backlog=BACKLOG, mode=0o600)
        except SocketTaken as error:
            raise SocketTaken(f"{error}; move it away, or choose another [daemon] socket") from None
        listener.setblocking(False)
        return listener

    def is_ours(self) -> bool:
        """Whether the path still leads to what `take` put there."""
        return self._identity is not None and unix.identity(self.path) == self._identity

    async def wait_lost(self) -> None:
        """Wait until the path does not lead to our socket any more. For ever where the system has no inotify."""
        while self.is_ours():
            await self.wait_changed()

    async def wait_changed(self) -> None:
        """Wait until something in the directory was removed or replaced. For ever where the system has no inotify."""
        if self._inotify is None:
            await trio.sleep_forever()
        else:
            await trio.lowlevel.wait_readable(self._inotify)
            _inotify_drain(self._inotify)


def _check_directory(directory: Path) -> None:
    """Refuse a directory in which somebody else could put another socket in the place of ours."""
    found = directory.stat()
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise SocketTaken(f"{directory}: others may write to the directory of the control socket; chmod go-w it")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _inotify_open() -> int | None:
    """A descriptor for watching directories; None where the system has none or has no more."""
    try:
        descriptor = int(_libc().inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC))
    except AttributeError:
        return None
    return descriptor if descriptor >= 0 else None


def _inotify_watch(inotify: int, directory: Path) -> bool:
    """Hear of what disappears from `directory`; one that is watched already is not watched twice. False where it cannot be."""
    return int(_libc().inotify_add_watch(inotify, os.fsencode(directory), _GONE | _IN_ONLYDIR)) >= 0


def _inotify_drain(inotify: int) -> None:
    try:
        while os.read(inotify, 1 << 16):
            pass
    except BlockingIOError:
        pass
