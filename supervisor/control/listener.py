"""The control socket's place in the file system: taken atomically, watched, taken back when stolen, given up when left."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from supervisor.control.wire import short_address
from supervisor.errors import SupervisorError
from supervisor.inotify import DELETE, DELETE_SELF, MOVE_SELF, MOVED_FROM, MOVED_TO, ONLY_DIRECTORY, Inotify

BACKLOG = 512

_GONE = MOVED_FROM | MOVED_TO | DELETE | DELETE_SELF | MOVE_SELF


class SocketTaken(SupervisorError):
    """The socket's path is not to be had: another daemon answers there, or something else lies there."""


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
        _check_free(self.path)
        self._watch()
        temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        temporary.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with _address(temporary) as address:
                listener.bind(address)
            temporary.chmod(0o600)
            listener.listen(BACKLOG)
            self._identity = _identity(temporary)
            temporary.rename(self.path)
        except BaseException:
            listener.close()
            temporary.unlink(missing_ok=True)
            raise
        return listener

    def _watch(self) -> None:
        """Hear of what disappears from the directory; one that is watched already is not watched twice."""
        if self._inotify is not None:
            with suppress(OSError):
                self._inotify.watch(self.path.parent, _GONE | ONLY_DIRECTORY)
                self.watched = True

    def is_ours(self) -> bool:
        """Whether the path still leads to what `take` put there."""
        return self._identity is not None and _identity(self.path) == self._identity

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


@contextmanager
def _address(path: Path) -> Iterator[str]:
    address, directory = short_address(str(path))
    try:
        yield address
    finally:
        if directory is not None:
            os.close(directory)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _check_directory(directory: Path) -> None:
    """Refuse a directory in which somebody else could put another socket in the place of ours."""
    found = directory.stat()
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise SocketTaken(f"{directory}: others may write to the directory of the control socket; chmod go-w it")


def _check_free(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        return  # a link to where a socket was before; the rename puts ours in its place
    if not stat.S_ISSOCK(mode):
        raise SocketTaken(f"{path}: there is something that is not a socket; move it away, or choose another [daemon] socket")
    if _answers(path):
        raise SocketTaken(f"{path}: another daemon answers there; stop it first, or choose another [daemon] socket")


def _answers(path: Path) -> bool:
    """Whether somebody listens there. Never blocks: a full backlog is somebody, too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe, _address(path) as address:
        problem = probe.connect_ex(address)
    if problem in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    if problem in (0, errno.EAGAIN, errno.EINPROGRESS):
        return True
    raise OSError(problem, os.strerror(problem), str(path))


def _inotify() -> Inotify | None:
    """Something to watch directories with; None where the system has none or has no more."""
    try:
        return Inotify()
    except OSError:
        return None
