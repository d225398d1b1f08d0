"""The control socket's place in the file system: taken atomically, watched, taken back when stolen, given up when left."""

from __future__ import annotations

import socket
import stat
from contextlib import suppress
from pathlib import Path

import trio

from supervisor import unix
from supervisor.inotify import DELETE, DELETE_SELF, MOVE_SELF, MOVED_FROM, MOVED_TO, ONLY_DIRECTORY, Inotify
from supervisor.unix import SocketTaken

BACKLOG = 512

_GONE = MOVED_FROM | MOVED_TO | DELETE | DELETE_SELF | MOVE_SELF


class Place:
    """The path of a listening Unix socket, mode 0600, in a directory that is made 0700 where it is missing.

    Use it as a context: on leaving, the path is unlinked if it is still ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.watched = False
        """Whether the system tells us when the path is stolen."""
        self._identity: tuple[int, int] | None = None
        self._inotify: Inotify | None = None

    def __enter__(self) -> Place:
        self._inotify = _inotify()
        return self

    def __exit__(self, *_: object) -> None:
        if self._inotify is not None:
            self._inotify.close()
        if self.is_ours():
            self.path.unlink(missing_ok=True)

    def take(self) -> socket.socket:
        """Listen at the path: bound under another name and renamed, so that it appears complete, replacing a stale one.

        Raises SocketTaken where another process answers or the path is no socket, OSError where the system refuses.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_directory(self.path.parent)
        self._watch()
        try:
            listener, self._identity = unix.listen(self.path, backlog=BACKLOG, mode=0o600)
        except SocketTaken as error:
            raise SocketTaken(f"{error}; move it away, or choose another [daemon] socket") from None
        listener.setblocking(False)
        return listener

    def _watch(self) -> None:
        """Hear of what disappears from the directory; one that is watched already is not watched twice."""
        if self._inotify is not None:
            with suppress(OSError):
                self._inotify.watch(self.path.parent, _GONE | ONLY_DIRECTORY)
                self.watched = True

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
            await self._inotify.wait()


def _check_directory(directory: Path) -> None:
    """Refuse a directory in which somebody else could put another socket in the place of ours."""
    found = directory.stat()
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise SocketTaken(f"{directory}: others may write to the directory of the control socket; chmod go-w it")


def _inotify() -> Inotify | None:
    """Something to watch directories with; None where the system has none or has no more."""
    try:
        return Inotify()
    except OSError:
        return None
