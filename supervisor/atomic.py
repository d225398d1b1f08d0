"""Files that are written whole or not at all.

The content goes into a draft beside the file, `.NAME.0.draft`, is forced to the disk and takes the file's name: whoever
reads finds the old content or the new. A draft is locked while its writer lives, so that the next writer knows what a
killed one has left, and removes it; writers of the same file at the same moment take the next number.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

PIECE = 1 << 20
"""Bytes that are written between two looks whether the writer has been cancelled."""

LOOK = 4
"""Drafts that are looked at in any case: as many writers of one file, all killed in the same moment, leave nothing for long."""

_LONGEST = 200
"""Bytes of a file's name that its draft bears: a name may have 255."""

FilePath = str | os.PathLike[str]


async def write_atomic(path: FilePath, data: bytes | str, *, mode: int = 0o600) -> None:
    """Write a file whole or not at all: after any error, kill or power cut it has its old content or the new one.

    `mode` is for a file that is new; one that is there keeps its mode and owner (but no other attributes, and no hard
    links). A symbolic link is followed. Text is written as UTF-8. Runs in a thread; a return means that the content is
    on the disk, `Cancelled` that the old one is still there. Raises OSError: with the old content in place, unless only the
    last step failed, which forces the new name to the disk.
    """
    await trio.to_thread.run_sync(partial(_replace, path, data, mode, True, trio.from_thread.check_cancelled))


def write_atomic_sync(path: FilePath, data: bytes | str, *, mode: int = 0o600, durable: bool = True) -> None:
    """The same for code that may block. Without `durable` nothing waits for the disk: only a power cut may undo it."""
    _replace(path, data, mode, durable, _go_on)


def _go_on() -> None:
    """Nobody can cancel."""


def _replace(path: FilePath, data: bytes | str, mode: int, durable: bool, look: Callable[[], object]) -> None:
    target = os.path.realpath(path)
    there = _there(target)
    directory = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd, draft = _open_draft(target)
        try:
            _fill(fd, data.encode() if isinstance(data, str) else data, look)
            _dress(fd, there, mode)
            if durable:
                os.fsync(fd)
            look()
            os.rename(draft, target)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(draft)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = target  # a full disk says of itself only that it is full
            raise
        finally:
            os.close(fd)
        if durable:
            os.fsync(directory)
    finally:
        os.close(directory)


def _there(target: str) -> os.stat_result | None:
    """The file that is to be replaced; None where there is none. Raises OSError for what is no file and must stay."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "a directory is not replaced by a file", target)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "what is no regular file is not replaced", target)
    return found


def _fill(fd: int, data: bytes, look: Callable[[], object]) -> None:
    rest = memoryview(data)
    while rest:
        look()
        rest = rest[os.write(fd, rest[:PIECE]) :]


def _dress(fd: int, there: os.stat_result | None, mode: int) -> None:
    """Give the draft the owner and mode that the file is to have: a change of owner takes bits of the mode away."""
    if there is not None:
        mine = os.fstat(fd)
        if (mine.st_uid, mine.st_gid) != (there.st_uid, there.st_gid):
            os.fchown(fd, there.st_uid, there.st_gid)
        mode = stat.S_IMODE(there.st_mode)
    os.fchmod(fd, mode)


# -- drafts -------------------------------------------------------------------------------------------------------------


def _open_draft(target: str) -> tuple[int, str]:
    """A new draft, ours as long as its descriptor is open. What killed writers left is removed on the way."""
    for number in range(LOOK):
        _remove_abandoned(_draft(target, number))
    for number in itertools.count():
        draft = _draft(target, number)
        if number >= LOOK:
            _remove_abandoned(draft)
        with suppress(FileExistsError):  # another writer is at work there
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            if _locked(fd):
                return fd, draft
            os.close(fd)  # in the moment before the lock, somebody has taken it for abandoned
    raise AssertionError("there is always a next number")


def _draft(target: str, number: int) -> str:
    directory, name = os.path.split(target)
    return os.path.join(directory, f".{os.fsdecode(os.fsencode(name)[:_LONGEST])}.{number}.draft")


def _locked(fd: int) -> bool:
    """Lock a draft that is ours. Where the file system knows no locks, none is ever taken for abandoned."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(fd).st_nlink > 0


def _remove_abandoned(draft: str) -> None:
    """Remove a draft whose lock nobody holds. What cannot be looked at is left alone."""
    with suppress(OSError):
        fd = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(draft)):
                os.unlink(draft)
        finally:
            os.close(fd)
