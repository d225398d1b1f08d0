"""Listening at the path of a Unix socket: one that appears complete, replaces only what nobody serves, and is known again."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from supervisor.control.wire import short_address  # a leaf: it imports nothing of ours
from supervisor.errors import SupervisorError

Identity = tuple[int, int]
"""Device and inode of what lies at a path."""


class SocketTaken(SupervisorError):
    """A socket's path is not to be had: somebody answers there, or something else lies there."""


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """An address for `path` that fits, while the block lasts."""
    address, directory = short_address(str(path))
    try:
        yield address
    finally:
        if directory is not None:
            os.close(directory)


def listen(path: Path, *, backlog: int, mode: int, owner: tuple[int, int] = (-1, -1)) -> tuple[socket.socket, Identity]:
    """Listen at `path`, blocking: bound under another name and renamed, so that it appears complete, replacing a stale one.

    `owner` is uid and gid (-1: ours). Raises SocketTaken where another process answers or the path is no socket, OSError
    where the system refuses.
    """
    _check_free(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with address_of(temporary) as address:
            listener.bind(address)
        temporary.chmod(mode)
        if owner != (-1, -1):
            os.chown(temporary, *owner)
        listener.listen(backlog)
        found = temporary.lstat()
        temporary.rename(path)
    except BaseException:
        listener.close()
        temporary.unlink(missing_ok=True)
        raise
    return listener, (found.st_dev, found.st_ino)


def identity(path: Path) -> Identity | None:
    """What lies at `path`; None where nothing does."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _check_free(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        return  # a link to where a socket was before; the rename puts ours in its place
    if not stat.S_ISSOCK(mode):
        raise SocketTaken(f"{path}: there is something that is not a socket")
    if _answers(path):
        raise SocketTaken(f"{path}: another process answers there")


def _answers(path: Path) -> bool:
    """Whether somebody listens there. Never blocks: a full backlog is somebody, too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe, address_of(path) as address:
        problem = probe.connect_ex(address)
    if problem in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    if problem in (0, errno.EAGAIN, errno.EINPROGRESS):
        return True
    raise OSError(problem, os.strerror(problem), str(path))
