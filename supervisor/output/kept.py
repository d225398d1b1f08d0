"""What is kept of a job's output beside its file: a ring for `logs`, and the followers of `logs -f`."""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import trio

from supervisor.events import Lagged
from supervisor.output import archive
from supervisor.output.files import LogFile

RING = 64 << 10
"""How much of a job's output is kept in memory."""

SMALL = 4 << 10
"""Chunks that are together no longer than this are kept as one."""

FOLLOW = 1 << 20
"""Bytes that wait for a follower before it lags."""

TAIL = 4 << 20
"""The most bytes that `tail` gives."""

CHUNK = 64 << 10


class Ring:
    """The last `RING` bytes. Holds on to the chunks as they came, so a large one costs no copy and an idle job nothing."""

    __slots__ = ("_chunks", "_size")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def append(self, data: bytes) -> None:
        """Add a chunk, and drop what it pushes out."""
        chunks = self._chunks
        if chunks and len(chunks[-1]) + len(data) <= SMALL:
            chunks[-1] += data
        else:
            chunks.append(data)
        self._size += len(data)
        while self._size - len(chunks[0]) >= RING:
            self._size -= len(chunks.pop(0))

    def last(self, size: int) -> bytes:
        """The last `size` bytes, or what there is of them."""
        parts: list[bytes] = []
        for chunk in reversed(self._chunks):
            parts.append(chunk[-size:] if size else b"")
            size -= len(parts[-1])
        return b"".join(reversed(parts))

    def content(self) -> bytes:
        """What is there, as one."""
        return b"".join(self._chunks)[-RING:]


class Log:
    """A job's output as it is looked at: the ring, the followers, and on into the files. Survives the job's restarts."""

    __slots__ = ("_followers", "_lost", "_received", "files", "ring")

    def __init__(self) -> None:
        self.files: LogFile | None = None
        """Where older output stands, if it goes to files."""
        self.ring = Ring()
        self._followers: set[Follower] = set()
        self._received = 0
        self._lost: list[tuple[int, int]] = []  # (received until then, bytes of it that no file has)

    def take(self, data: bytes, lost: int) -> None:
        """Keep one chunk and pass it on; `lost` bytes of it, or of what came before, are in no file."""
        self._received += len(data)
        self.ring.append(data)
        for follower in self._followers:
            follower.put(data)
        if lost:
            self._lost.append((self._received, lost))
            while self._lost[0][0] <= self._received - RING:
                del self._lost[0]

    async def tail(self, lines: int) -> bytes:
        """The last `lines` lines: from the ring, taken before anything is awaited, and on into the files."""
        ring = self.ring.content()
        if ring.count(b"\n") > lines:
            return last_lines(ring, lines)
        start = self._received - len(ring)
        stored = len(ring) - sum(min(lost, at - start) for at, lost in self._lost if at > start)
        with ExitStack() as opened:
            files = [file for path in self._paths() if (file := _open_to_read(path, opened)) is not None]
            older = partial(_read_back, files, stored, lines + 1 - ring.count(b"\n"))
            return last_lines(await trio.to_thread.run_sync(older, limiter=trio.CapacityLimiter(1)) + ring, lines)

    def _paths(self) -> Iterator[Path]:
        return iter(()) if self.files is None else self.files.all()

    @property
    def awaited(self) -> bool:
        """Whether somebody who must lose nothing is behind: the job is to wait for that reader."""
        return any(follower.behind for follower in self._followers)

    @contextmanager
    def follow(self, on_room: Callable[[], None] | None = None) -> Iterator[Follower]:
        """What comes from here on. With `on_room`, nothing of it is lost: that is called when the reader has caught up."""
        follower = Follower(on_room)
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)
            if on_room is not None:
                on_room()

    def end(self) -> None:
        """There is no more to come: whoever follows reads to the end of what there is."""
        for follower in self._followers:
            follower.end()


def _open_to_read(path: Path, opened: ExitStack) -> tuple[int, bool] | None:
    """A regular file's descriptor, and whether it is compressed. A FIFO is not even opened: its writer would see a reader."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    opened.callback(os.close, fd)
    return fd, path.suffix == ".gz"


def _read_back(files: list[tuple[int, bool]], skip: int, newlines: int) -> bytes:
    """The end of the files (newest first) without its last `skip` bytes: back to so many line ends, at most `TAIL` bytes."""
    parts: list[bytes] = []
    found = read = 0
    for fd, compressed in files:
        if found >= newlines or read >= TAIL:
            break
        length, file = _readable(fd, compressed, TAIL + skip)
        end = max(0, file.seek(0, os.SEEK_END) - skip)
        skip = max(0, skip - length)
        while end and found < newlines and read < TAIL:
            begin = max(0, end - CHUNK)
            file.seek(begin)
            parts.append(file.read(end - begin))
            found += parts[-1].count(b"\n")
            read += end - begin
            end = begin
    return b"".join(reversed(parts))


def _readable(fd: int, compressed: bool, most: int) -> tuple[int, io.BufferedIOBase | io.RawIOBase]:
    """How long the content of a file is, and the content, or at least its last `most` bytes."""
    if not compressed:
        return os.fstat(fd).st_size, io.FileIO(fd, closefd=False)
    length, content = archive.unpacked(fd, most)
    return length, io.BytesIO(content)


def last_lines(data: bytes, lines: int) -> bytes:
    """The last `lines` lines of `data`."""
    end = len(data) - data.endswith(b"\n")
    for _ in range(lines):
        end = data.rfind(b"\n", 0, end)
        if end < 0:
            return data
    return data[end + 1 :] if lines else b""


class Follower:
    """An async iterator over a job's output as it comes: chunks of bytes, or `Lagged` with the bytes that were skipped.

    With `on_room` none are skipped: the job waits while its reader is `behind`.
    """

    def __init__(self, on_room: Callable[[], None] | None = None) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._ended = False
        self._on_room = on_room
        self._kick = trio.Event()

    @property
    def behind(self) -> bool:
        """Whether the job should wait for this reader."""
        return self._on_room is not None and self._size > FOLLOW

    def end(self) -> None:
        """There is no more to come: the iteration ends after what there is."""
        self._ended = True
        self._kick.set()

    def put(self, data: bytes) -> None:
        """Queue a chunk; a reader that is too far behind loses it, and is told so at that place."""
        if self._on_room is None and (self._lost or self._size + len(data) > FOLLOW):
            self._lost += len(data)
        else:
            self._chunks.append(data)
            self._size += len(data)
        self._kick.set()

    def __aiter__(self) -> AsyncIterator[bytes | Lagged]:
        return self

    async def __anext__(self) -> bytes | Lagged:
        """The next chunk. Cancelled while waiting: nothing is lost."""
        await trio.lowlevel.checkpoint()
        while not self._chunks and not self._lost:
            if self._ended:
                raise StopAsyncIteration
            self._kick = trio.Event()
            await self._kick.wait()
        if self._chunks:
            was_behind = self.behind
            chunk = self._chunks.popleft()
            self._size -= len(chunk)
            if was_behind and not self.behind and self._on_room is not None:
                self._on_room()
            return chunk
        lost, self._lost = self._lost, 0
        return Lagged(lost)
