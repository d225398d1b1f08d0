"""Captured output of child processes: one pump for all pipes, a file with rotation, a ring, and whoever listens.

Each run has one pipe for stdout and stderr, so that their order is kept. One task empties all of them, a chunk a turn, and
never stops: what a file will not take is counted and dropped, and writing resumes when it can. Bytes are stored as they
came. A job's `Log` (file, ring, followers) outlives its runs; a `Capture` is the pipe of one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import termios
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import trio
from msgspec import Meta

from supervisor.events import Lagged
from supervisor.spec import Bytes, Spec

RING = 64 << 10
"""How much of a job's output is kept in memory."""

LINE = 64 << 10
"""A line is looked at in pieces no longer than this."""

CHUNK = 64 << 10
"""The most that is read from one pipe in one turn: what a pipe holds."""

PIPES_A_PASS = 32
"""The most pipes that are read before everything else has a turn: a chunk of each, a few milliseconds in all."""

CHUNKS_A_PASS = 4
"""A pipe that is alone may have so many chunks read; it costs no other a turn."""

GATHER = 0.01
"""Seconds to let the lines of slow writers gather, while all that comes is small (a pipe holds thousands of them)."""

SMALL = 4 << 10
"""A read below this is small: its pipe is far from full."""

IDLE_GRACE = 0.1
"""Seconds without a byte after which the pipe of a run that has ended is closed, though somebody still holds it."""

HARD_LIMIT = 2.0
"""Seconds after which it is closed in any case."""

FOLLOW = 1 << 20
"""Bytes that wait for a follower before it lags."""

TAIL = 4 << 20
"""The most bytes that `tail` gives."""


class Rotate(Spec, frozen=True, kw_only=True):
    """`rotate = { … }`: when a log file is full, and how many old ones stay."""

    size: Annotated[
        Bytes,
        Meta(description="a file that has grown to this is put aside as NAME.log.1, at the end of a line; 0: never"),
    ] = Bytes(10 << 20)
    keep: Annotated[int, Meta(ge=0, description="how many files put aside are kept")] = 5


OnLine = Callable[[bytes], bool]
OnLost = Callable[[int, str], None]
Echo = Callable[[str, bytes], None]


class LogFile:
    """One file with rotation. `write` stores what it can and never raises: it says how much is lost, and `error` why.

    Opened at the first byte, mode 0600, never through a symbolic link. A file that somebody removes is made anew, and its
    directory too where `make_directory` says so. What is no regular file (a FIFO, a device) is not rotated.
    """

    __slots__ = ("_fd", "_line", "_make_directory", "_regular", "_size", "error", "path", "rotate")

    def __init__(self, path: Path, rotate: Rotate, *, make_directory: bool) -> None:
        self.path = path
        self.rotate = rotate
        self.error: OSError | None = None
        self._make_directory = make_directory
        self._fd = -1
        self._regular = True
        self._size = 0
        self._line = 0  # how much of an unfinished line stands at the end of the file

    def write(self, data: bytes) -> int:
        """Append `data`; returns how many bytes of it could not be stored."""
        self.error = None
        at = lost = 0
        while at < len(data):
            room = self._room(data, at)
            if room == 0:
                self._put_aside()
                continue
            lost += room - self._append(memoryview(data)[at : at + room])
            newline = data.rfind(b"\n", at, at + room)
            self._line = at + room - newline - 1 if newline >= 0 else self._line + room
            at += room
        return lost

    def close(self) -> None:
        """Let go of the file; the next write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _room(self, data: bytes, at: int) -> int:
        """How many bytes from `at` on go into the present file; 0: put it aside first.

        A line is kept whole, and so may take the file beyond its size, unless the line alone is larger than that.
        """
        limit, rest = self.rotate.size, len(data) - at
        if not limit or not self._regular or self._size + rest <= limit:
            return rest
        fitting = data.rfind(b"\n", at, at + max(0, limit - self._size)) + 1
        if fitting:
            return fitting - at
        if self._size and not self._line:
            return 0
        end = data.find(b"\n", at) + 1 or len(data)
        return max(0, min(end - at, limit - self._line))

    def _append(self, part: memoryview) -> int:
        """Write `part`, opening the file if need be; returns how much of it was written."""
        written = 0
        try:
            if self._fd >= 0 and self._regular and not os.fstat(self._fd).st_nlink:
                self.close()
            if self._fd < 0:
                self._open()
            while written < len(part):
                written += os.write(self._fd, part[written:])
        except OSError as error:
            self.error = error
        self._size += written
        return written

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            if not self._make_directory:
                raise
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self.path, flags, 0o600)
        there = os.fstat(self._fd)
        self._regular = stat.S_ISREG(there.st_mode)
        self._size = there.st_size
        self._line = 0

    def _put_aside(self) -> None:
        """NAME becomes NAME.1, NAME.1 becomes NAME.2, and so on; the oldest goes. Where that fails, the file grows on."""
        self.close()
        try:
            if not self.rotate.keep:
                self.path.unlink(missing_ok=True)
            else:
                free = 1
                while free < self.rotate.keep and self.aside(free).exists():
                    free += 1
                for number in range(free, 1, -1):
                    self.aside(number - 1).rename(self.aside(number))
                self.path.rename(self.aside(1))
            self.aside(self.rotate.keep + 1).unlink(missing_ok=True)  # `keep` may have become less
        except FileNotFoundError:
            pass  # somebody else was quicker
        except OSError as error:
            self.error = error
        self._size = self._line = 0

    def aside(self, number: int) -> Path:
        """Where the file stands that was put aside `number` rotations ago."""
        return self.path.with_name(f"{self.path.name}.{number}")


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

    def content(self) -> bytes:
        """What is there, as one."""
        return b"".join(self._chunks)[-RING:]


class Log:
    """What is kept of a job's output: the file, the ring and the followers. Survives the job's restarts."""

    __slots__ = ("_followers", "_lost", "_received", "_unreported", "file", "open_captures", "ring")

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self.ring = Ring()
        self.open_captures = 0
        self._followers: set[Follower] = set()
        self._received = 0
        self._lost: list[tuple[int, int]] = []  # (received until then, bytes lost just before)
        self._unreported = -1  # lost since the last report; -1: all is well

    def take(self, data: bytes, on_lost: OnLost) -> None:
        """Store one chunk and pass it on."""
        lost = self.file.write(data)
        self._received += len(data)
        self.ring.append(data)
        for follower in self._followers:
            follower.put(data)
        if self.file.error is not None or self._unreported >= 0:
            self._account(lost, on_lost)

    def _account(self, lost: int, on_lost: OnLost) -> None:
        """Report the first loss, and the rest when it is over: the counts add up to all that was lost."""
        if self.file.error is None:
            on_lost(self._unreported, f"{self.file.path} can be written again")
            self._unreported = -1
            return
        self._lost.append((self._received, lost))
        while self._lost[0][0] <= self._received - RING:
            del self._lost[0]
        if self._unreported < 0:
            on_lost(lost, f"cannot write {self.file.path}: {self._reason()}")
            self._unreported = 0
        else:
            self._unreported += lost

    def report(self, on_lost: OnLost) -> None:
        """Report what was lost since the last report: the run is over."""
        if self._unreported > 0:
            on_lost(self._unreported, f"cannot write {self.file.path}: {self._reason()}")
            self._unreported = 0

    def _reason(self) -> str:
        error = self.file.error
        return (error.strerror or str(error)) if error else "unknown"

    async def tail(self, lines: int) -> bytes:
        """The last `lines` lines: from the ring, taken before anything is awaited, and on into the files."""
        ring = self.ring.content()
        if ring.count(b"\n") > lines:
            return _last_lines(ring, lines)
        start = self._received - len(ring)
        stored = len(ring) - sum(min(lost, at - start) for at, lost in self._lost if at > start)
        with ExitStack() as opened:
            files = [file for path in self._paths() if (file := _open_to_read(path, opened)) is not None]
            older = partial(_read_back, files, stored, lines + 1 - ring.count(b"\n"))
            return _last_lines(await trio.to_thread.run_sync(older, limiter=trio.CapacityLimiter(1)) + ring, lines)

    def _paths(self) -> Iterator[Path]:
        yield self.file.path
        for number in range(1, self.file.rotate.keep + 1):
            yield self.file.aside(number)

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


def _open_to_read(path: Path, opened: ExitStack) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    opened.callback(os.close, fd)
    return fd if stat.S_ISREG(os.fstat(fd).st_mode) else None


def _read_back(files: list[int], skip: int, newlines: int) -> bytes:
    """The end of the files (newest first) without its last `skip` bytes: back to so many line ends, at most `TAIL` bytes."""
    parts: list[bytes] = []
    found = read = 0
    for fd in files:
        end = os.fstat(fd).st_size
        skip, end = max(0, skip - end), max(0, end - skip)
        while end and found < newlines and read < TAIL:
            begin = max(0, end - CHUNK)
            parts.append(os.pread(fd, end - begin, begin))
            found += parts[-1].count(b"\n")
            read += end - begin
            end = begin
    return b"".join(reversed(parts))


def _last_lines(data: bytes, lines: int) -> bytes:
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


class Lines:
    """Chunks in, lines out, without their line end; a line longer than `LINE` comes in pieces."""

    __slots__ = ("_part",)

    def __init__(self) -> None:
        self._part = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that `data` completes."""
        *whole, rest = data.split(b"\n")
        for line in whole:
            yield from self._pieces(line)
            yield self._take()
        yield from self._pieces(rest)

    def flush(self) -> Iterator[bytes]:
        """What is left, if anything: the output is over."""
        if self._part:
            yield self._take()

    def _pieces(self, line: bytes) -> Iterator[bytes]:
        self._part += line
        while len(self._part) > LINE:
            piece = bytes(self._part[:LINE])
            del self._part[:LINE]
            yield piece

    def _take(self) -> bytes:
        line = bytes(self._part).removesuffix(b"\r")
        self._part.clear()
        return line


class Capture:
    """The pipe of one run. Give `fd` to the child as stdout and stderr, then `release`; `finish` when the run is over.

    With `tty` it is a terminal instead: `fd` is the child's end, and `duplicate` gives another descriptor of ours.
    """

    __slots__ = ("_lines", "_on_line", "_on_lost", "_outputs", "_read", "_tty", "fd", "log", "name", "received")

    def __init__(self, outputs: Outputs, name: str, log: Log, on_line: OnLine | None, on_lost: OnLost, tty: bool) -> None:
        self._read, self.fd = os.openpty() if tty else os.pipe2(os.O_CLOEXEC)
        self._tty = tty
        os.set_blocking(self._read, False)
        self._outputs = outputs
        self._on_line = on_line
        self._on_lost = on_lost
        self._lines = Lines() if on_line or outputs.echo else None
        self.name = name
        self.log = log
        self.received = 0
        log.open_captures += 1

    @property
    def closed(self) -> bool:
        """Whether the end of the output has been seen or decided."""
        return self._read < 0

    def duplicate(self) -> int:
        """Another descriptor of the end that is read here; whoever asked closes it."""
        return os.dup(self._read)

    def release(self) -> None:
        """Close our copy of the writing end, so that the end of the output can be seen. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def drain(self) -> None:
        """Store everything that has been written until now. Bounded by what a pipe holds."""
        if self.closed:
            return
        waiting = int.from_bytes(fcntl.ioctl(self._read, termios.FIONREAD, bytes(4)), "little")
        until = self.received + (CHUNK if self._tty else waiting)  # a terminal does not know what is still on its way
        while self.received < until and self.read():
            pass

    def finish(self) -> None:
        """Drain, then close. Whoever still holds the pipe is read in the background for a moment, and delays nothing."""
        self.release()
        self.drain()
        if not self.closed and self.read() is None:
            self._outputs.linger(self)

    def read(self) -> int | None:
        """Read a chunk and store it. Returns its length (0: that was the end), None if nothing is there."""
        try:
            data = os.read(self._read, CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""  # the end of a terminal: nobody holds it any more
        if not data:
            self.close()
            return 0
        self.received += len(data)
        self.log.take(data, self._on_lost)
        if self._lines is not None:
            self._show(self._lines.feed(data))
        return len(data)

    def read_on(self, chunks: int) -> int:
        """Read at most so many chunks. Returns the length of the longest."""
        most = 0
        for _ in range(chunks):
            if not (size := self.read()):
                break
            most = max(most, size)
            if self.log.awaited:
                self._outputs.hold(self)
                break
        return most

    def close(self) -> None:
        """The output is over."""
        if self.closed:
            return
        self.release()
        self._outputs.forget(self._read)
        os.close(self._read)
        self._read = -1
        if self._lines is not None:
            self._show(self._lines.flush())
        self.log.report(self._on_lost)
        self.log.open_captures -= 1
        if not self.log.open_captures:
            self.log.file.close()

    def _show(self, lines: Iterator[bytes]) -> None:
        echo = self._outputs.echo
        for line in lines:
            if echo is not None:
                echo(self.name, line)
            if self._on_line is not None and self._on_line(line):
                self._on_line = None
        if echo is None and self._on_line is None:
            self._lines = None


class Outputs:
    """The captured output of all jobs. Open it with `open_outputs`."""

    nursery: trio.Nursery

    def __init__(self, directory: Path, echo: Echo | None) -> None:
        self.echo = echo
        self._directory = directory
        self._logs: dict[str, Log] = {}
        self._captures: dict[int, Capture] = {}
        self._held: set[int] = set()
        """Pipes that are not emptied now: somebody who must lose nothing is behind."""
        self._epoll = select.epoll()

    def open(
        self,
        name: str,
        *,
        path: Path | None = None,
        rotate: Rotate | None = None,
        on_line: OnLine | None = None,
        on_lost: OnLost | None = None,
        tty: bool = False,
    ) -> Capture:
        """A pipe (or a terminal) for one run of the job `name`, captured to `path`, or to NAME.log in the log directory.

        `on_line` gets each line until it returns True. `on_lost` gets (bytes, reason) when the file cannot be written, and
        again when it can. Neither may block or raise. Raises OSError when no descriptor is left.
        """
        log = self._log(name, path, rotate or Rotate())
        capture = Capture(self, name, log, on_line, on_lost or _ignore, tty)
        self._captures[capture._read] = capture
        self._epoll.register(capture._read, select.EPOLLIN)  # cannot fail for a pipe that was just made
        return capture

    async def tail(self, name: str, lines: int) -> bytes:
        """The last `lines` lines of a job's output, at most `TAIL` bytes; b"" if there is none.

        What a `follow` entered just before yields begins exactly where this ends.
        """
        return await self._log(name).tail(lines)

    @contextmanager
    def follow(self, name: str, *, lossless: bool = False) -> Iterator[Follower]:
        """A job's output from here on, through rotations and restarts. `lossless`: the job waits for a slow reader."""
        log = self._log(name)
        with log.follow(partial(self._read_on, log) if lossless else None) as follower:
            yield follower

    def rename(self, old: str, new: str) -> None:
        """A job goes on under another name, and so does what is kept of its output. The next run's file has the new name."""
        log = self._logs.pop(old, None)
        if log is not None:
            self._logs[new] = log
            for capture in self._captures.values():
                if capture.log is log:
                    capture.name = new

    def discard(self, name: str) -> None:
        """Forget a job that has ended: what was captured of it stays in its file, and whoever follows it is at its end."""
        if (log := self._logs.pop(name, None)) is not None:
            log.end()

    def hold(self, capture: Capture) -> None:
        """Empty this pipe no more until its readers have caught up: the job waits when it is full."""
        self._epoll.unregister(capture._read)
        self._held.add(capture._read)

    def _read_on(self, log: Log) -> None:
        if self._held and not log.awaited:
            for fd in [fd for fd in self._held if self._captures[fd].log is log]:
                self._held.discard(fd)
                self._epoll.register(fd, select.EPOLLIN)

    def linger(self, capture: Capture) -> None:
        """Read on in the background until the pipe has been silent for `IDLE_GRACE`, at most for `HARD_LIMIT`."""
        self.nursery.start_soon(self._linger, capture)

    def forget(self, fd: int) -> None:
        """This pipe is about to be closed."""
        del self._captures[fd]
        if fd in self._held:
            self._held.discard(fd)
        else:
            self._epoll.unregister(fd)

    async def _linger(self, capture: Capture) -> None:
        with trio.move_on_after(HARD_LIMIT):
            seen = -1
            while seen != capture.received and not capture.closed:
                seen = capture.received
                await trio.sleep(IDLE_GRACE)
        capture.close()

    async def pump(self) -> None:
        """Empty the pipes, for ever: a chunk of each in turn, then everybody else's turn."""
        last = -GATHER
        while True:
            ready = self._epoll.poll(0, PIPES_A_PASS)
            if not ready:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                continue
            chunks = max(1, CHUNKS_A_PASS // len(ready))
            most = max(capture.read_on(chunks) for fd, _ in ready if (capture := self._captures.get(fd)))
            passed, last = trio.current_time() - last, trio.current_time()
            if most < SMALL and most * GATHER < SMALL * passed:  # at this pace, it stays small
                await trio.sleep(GATHER)
            else:
                await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Store what is there, and close all pipes and files."""
        for capture in list(self._captures.values()):
            capture.drain()
            capture.close()
        for log in self._logs.values():
            log.file.close()
            log.end()
        self._epoll.close()

    def _log(self, name: str, path: Path | None = None, rotate: Rotate | None = None) -> Log:
        """The job's log, made when it is first asked for; `path` and `rotate` as the run that opens it says."""
        where = path or self._directory / f"{name}.log"
        log = self._logs.get(name)
        if log is None:
            log = self._logs[name] = Log(LogFile(where, rotate or Rotate(), make_directory=path is None))
        elif rotate is not None and (log.file.path, log.file.rotate) != (where, rotate):
            log.file.close()
            log.file = LogFile(where, rotate, make_directory=path is None)
        return log


def _ignore(count: int, cause: str) -> None:
    pass


@asynccontextmanager
async def open_outputs(directory: Path, *, echo: Echo | None = None) -> AsyncIterator[Outputs]:
    """Captured output under `directory`, which is made (0700) when the first byte comes.

    `echo` gets (job, line) of everything as it comes, and may neither block nor raise. On leaving, what the pipes still hold
    is stored. Exceptions of the body arrive in a group, as from any nursery.
    """
    outputs = Outputs(directory, echo)
    try:
        async with trio.open_nursery() as nursery:
            outputs.nursery = nursery
            nursery.start_soon(outputs.pump, name="pump of captured output")
            try:
                yield outputs
            finally:
                nursery.cancel_scope.cancel(reason="the outputs are closed")
    finally:
        outputs.close()
