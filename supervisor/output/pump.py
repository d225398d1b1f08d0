"""One pump for the pipes of all runs: who is read when, and where it goes."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import termios
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal

import trio

from supervisor.output import archive
from supervisor.output.files import LogFile, Rotate
from supervisor.output.journal import Journal
from supervisor.output.kept import Follower, Log
from supervisor.output.lines import LINE, Lines
from supervisor.output.outlet import OnLost, Outlet, Overload

CHUNK = 64 << 10
"""The most that is read from one pipe in one turn: what a pipe holds."""

LOOKED_AT = 8 << 10
"""The same where somebody looks at each line: that takes a hundred times as long."""

PIPES_A_PASS = 32
"""The most pipes that are read before everything else has a turn: a chunk of each, a few milliseconds in all."""

CHUNKS_A_PASS = 4
"""A pipe that is alone may have so many chunks read; it costs no other a turn."""

GATHER = 0.01
"""The longest that lines are let gather in the pipes, in seconds: one wake-up for many of them."""

GATHERED = 16 << 10
"""So much may gather in a pipe; a quarter of what it holds, so that nobody who writes has to wait."""

TICK = 0.001
"""Trio sleeps no shorter."""

IDLE_GRACE = 0.1
"""Seconds without a byte after which the pipe of a run that has ended is closed, though somebody still holds it."""

HARD_LIMIT = 2.0
"""Seconds after which it is closed in any case."""

LAST_WORDS, LAST_LINES, LAST_WIDTH = 2048, 5, 200
"""What is told of the output of a run that failed: of so many bytes, so many lines, so many characters of each."""

OnLine = Callable[[bytes], bool]
Echo = Callable[[str, bytes], None]


class Capture:
    """The pipe of one run. Give `fd` to the child as stdout and stderr, then `release`; `finish` when the run is over.

    With `tty` it is a terminal instead: `fd` is the child's end, and `duplicate` gives another descriptor of ours.
    """

    __slots__ = (
        "_chunk",
        "_lines",
        "_outputs",
        "_read",
        "_tty",
        "_watchers",
        "fd",
        "log",
        "name",
        "outlet",
        "paused",
        "received",
    )

    def __init__(
        self, outputs: Outputs, name: str, log: Log, outlet: Outlet, watchers: Sequence[OnLine], max_line: int, tty: bool
    ) -> None:
        self._read, self.fd = os.openpty() if tty else os.pipe2(os.O_CLOEXEC)
        self._tty = tty
        os.set_blocking(self._read, False)
        self._outputs = outputs
        self._watchers = list(watchers)
        self._lines = Lines(max_line) if watchers or outputs.echo else None
        self._chunk = LOOKED_AT if watchers or isinstance(outlet.sink, Journal) else CHUNK
        self.name = name
        self.log = log
        self.outlet = outlet
        self.paused = False
        """Whether nothing is read: the outlet is blocked, or a reader is behind who must lose nothing."""
        self.received = 0
        outlet.pipes.add(self)

    @property
    def closed(self) -> bool:
        """Whether the end of the output has been seen or decided."""
        return self._read < 0

    def fileno(self) -> int:
        """The reading end."""
        return self._read

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

    def last_words(self) -> tuple[str, ...]:
        """The last lines of this run, for people: few, short, and without what would move a terminal's cursor."""
        self.drain()
        text = self.log.ring.last(min(self.received, LAST_WORDS)).decode(errors="replace")
        lines = [line.rstrip()[:LAST_WIDTH] for line in text.splitlines() if line.strip()]
        return tuple("".join(char if char.isprintable() else "�" for char in line) for line in lines[-LAST_LINES:])

    def finish(self) -> None:
        """Drain, then close. Whoever still holds the pipe is read in the background for a moment, and delays nothing."""
        self.release()
        self.drain()
        if not self.closed and self.read() is None:
            self._outputs.linger(self)

    def read(self) -> int | None:
        """Read a chunk and store it. Returns its length (0: that was the end), None if nothing is there."""
        try:
            data = os.read(self._read, self._chunk)
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
        self.log.take(data, self.outlet.take(data))
        if self.outlet.full:
            self._outputs.wait_for(self.outlet)
        if self.log.awaited:
            self._outputs.settle((self,))
        if self._lines is not None:
            self._show(self._lines.feed(data))
        return len(data)

    def read_on(self, chunks: int) -> int:
        """Read at most so many chunks, unless it is paused. Returns how many bytes."""
        before = self.received
        for _ in range(chunks):
            if self.paused or not self.read():
                break
        return self.received - before

    def close(self) -> None:
        """The output is over."""
        if self.closed:
            return
        self.release()
        self._outputs.forget(self)
        os.close(self._read)
        self._read = -1
        if self._lines is not None:
            self._show(self._lines.flush())
        self.outlet.finish()
        self._outputs.leave(self.outlet, self)

    def _show(self, lines: Iterator[bytes]) -> None:
        echo = self._outputs.echo
        for line in lines:
            if echo is not None:
                echo(self.name, line)
            if self._watchers:
                self._watchers = [watch for watch in self._watchers if not watch(line)]
        if echo is None and not self._watchers:
            self._lines, self._chunk = None, CHUNK


class Outputs:
    """The captured output of all jobs. Open it with `open_outputs`."""

    nursery: trio.Nursery

    def __init__(self, directory: Path, echo: Echo | None) -> None:
        self.echo = echo
        self._directory = directory
        self._logs: dict[str, Log] = {}
        self._files: dict[str, Outlet] = {}
        self._asked: dict[str, tuple[Path | None, Rotate]] = {}
        """What each of these was made for: comparing that is cheaper than making a path for every run."""
        self._captures: dict[int, Capture] = {}
        self._waiting: dict[int, Outlet] = {}
        self._epoll = select.epoll()
        self._compressing: set[LogFile] = set()
        self._one_compression = trio.Lock()

    def open(
        self,
        name: str,
        *,
        run: str = "",
        to: Path | Literal["journal"] | None = None,
        rotate: Rotate | None = None,
        max_line: int = LINE,
        on_overload: Overload = "block",
        watchers: Sequence[OnLine] = (),
        on_lost: OnLost | None = None,
        tty: bool = False,
    ) -> Capture:
        """A pipe (or a terminal) for one run of the job `name`, captured to a file (NAME.log in the log directory unless `to`
        says otherwise) or to the journal.

        Each of `watchers` gets each line until it returns True. `on_lost` gets (bytes, reason) when something cannot be
        stored, and again when it can. None of them may block or raise. Raises OSError when no descriptor is left, or there is
        no journal.
        """
        log = self._logs.setdefault(name, Log())
        if to == "journal":
            outlet = Outlet(Journal(name, run, max_line), on_overload, on_lost or _ignore)
            log.files = None
        else:
            outlet = self._file_outlet(name, to, rotate or Rotate(), on_overload)
            outlet.on_lost = on_lost or _ignore
        capture = Capture(self, name, log, outlet, watchers, max_line, tty)
        self._captures[capture.fileno()] = capture
        self._epoll.register(capture, select.EPOLLIN)  # cannot fail for a pipe that was just made
        self.settle((capture,))
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
        with log.follow(partial(self._caught_up, log) if lossless else None) as follower:
            yield follower

    def _caught_up(self, log: Log) -> None:
        self.settle([capture for capture in self._captures.values() if capture.log is log])

    def rename(self, old: str, new: str) -> None:
        """A job goes on under another name, and so does what is kept of its output. The next run's file has the new name."""
        if (outlet := self._files.pop(old, None)) is not None:
            self._files[new] = outlet
        if (log := self._logs.pop(old, None)) is not None:
            self._logs[new] = log
            for capture in self._captures.values():
                if capture.log is log:
                    capture.name = new

    def discard(self, name: str) -> None:
        """Forget a job that has ended: what was captured of it stays in its file, and whoever follows it is at its end."""
        self._files.pop(name, None)
        self._asked.pop(name, None)
        if (log := self._logs.pop(name, None)) is not None:
            log.end()

    def linger(self, capture: Capture) -> None:
        """Read on in the background until the pipe has been silent for `IDLE_GRACE`, at most for `HARD_LIMIT`."""
        self.nursery.start_soon(self._linger, capture)

    def forget(self, capture: Capture) -> None:
        """This pipe is about to be closed."""
        del self._captures[capture.fileno()]
        if not capture.paused:
            self._epoll.unregister(capture)

    def leave(self, outlet: Outlet, capture: Capture) -> None:
        """This pipe does not lead there any more. The last one out closes the file, when all that waits is written."""
        outlet.pipes.discard(capture)
        if outlet.full:
            self.wait_for(outlet)
        elif not outlet.pipes:
            outlet.close()

    def wait_for(self, outlet: Outlet) -> None:
        """Flush this outlet when its sink has room again; until then, its pipes are not read if it is blocked."""
        fd = outlet.sink.fileno()
        if self._waiting.get(fd) is not outlet:
            self._waiting[fd] = outlet
            self._epoll.register(fd, select.EPOLLOUT)
        if outlet.blocked:
            self.settle(outlet.pipes)

    def _flush(self, fd: int, outlet: Outlet) -> None:
        del self._waiting[fd]  # first: where the sink fails, the number may soon be somebody else's
        self._epoll.unregister(fd)
        outlet.flush()
        if outlet.full:
            self.wait_for(outlet)
            return
        self.settle(outlet.pipes)
        if not outlet.pipes:
            outlet.close()

    def settle(self, captures: Iterable[Capture]) -> None:
        """Read these pipes, or do not. One that is not read is not watched: its end would wake us over and over."""
        for capture in captures:
            paused = capture.outlet.blocked or capture.log.awaited
            if capture.paused != paused and not capture.closed:
                capture.paused = paused
                if paused:
                    self._epoll.unregister(capture)
                else:
                    self._epoll.register(capture, select.EPOLLIN)

    async def _linger(self, capture: Capture) -> None:
        with trio.move_on_after(HARD_LIMIT):
            seen = -1
            while seen != capture.received and not capture.closed:
                seen = capture.received
                await trio.sleep(IDLE_GRACE)
        capture.drain()
        capture.close()

    async def pump(self) -> None:
        """Empty the pipes, for ever: a chunk of each in turn, then everybody else's turn."""
        last, pause = trio.current_time(), GATHER
        while True:
            ready = self._epoll.poll(0, PIPES_A_PASS)
            if not ready:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                continue
            chunks = max(1, CHUNKS_A_PASS // len(ready))
            most = max(self._serve(fd, chunks) for fd, _ in ready)
            passed, last = trio.current_time() - last, trio.current_time()
            pause = _time_to_gather(pause, most, passed)
            if pause >= TICK and len(ready) < PIPES_A_PASS:
                await trio.sleep(pause)
            else:
                await trio.lowlevel.checkpoint()

    def _serve(self, fd: int, chunks: int) -> int:
        """What is ready is a pipe to read, or a sink that has room again. Says how many bytes were moved."""
        if (capture := self._captures.get(fd)) is not None:
            return capture.read_on(chunks)
        if (outlet := self._waiting.get(fd)) is not None:
            self._flush(fd, outlet)
            return CHUNK
        return 0  # closed meanwhile

    def close(self) -> None:
        """Store what is there, and close all pipes and files."""
        for capture in list(self._captures.values()):
            capture.drain()
            capture.close()
        for outlet in {*self._waiting.values(), *self._files.values()}:
            outlet.close()
        for log in self._logs.values():
            log.end()
        self._epoll.close()

    def _log(self, name: str) -> Log:
        """The job's log, made when it is first asked for: an earlier daemon may have left files."""
        log = self._logs.get(name)
        if log is None:
            log = self._logs[name] = Log()
            log.files = LogFile(self._directory / f"{name}.log", Rotate(), make_directory=True)
        return log

    def _file_outlet(self, name: str, path: Path | None, rotate: Rotate, overload: Overload) -> Outlet:
        """The job's outlet to its file, the same from run to run, until `path` or `rotate` say otherwise."""
        outlet = self._files.get(name)
        if outlet is None or self._asked[name] != (path, rotate):
            if outlet is not None and not outlet.pipes and not outlet.full:
                outlet.close()
            self._asked[name] = path, rotate
            outlet = self._files[name] = self._new_file_outlet(name, path, rotate, overload)
        outlet.overload = overload
        self._logs[name].files = outlet.sink if isinstance(outlet.sink, LogFile) else None
        return outlet

    def _new_file_outlet(self, name: str, path: Path | None, rotate: Rotate, overload: Overload) -> Outlet:
        files = LogFile(path or self._directory / f"{name}.log", rotate, make_directory=path is None)
        outlet = Outlet(files, overload, _ignore)
        if rotate.compress:
            files.rotated = partial(self._compress_soon, outlet, files)
        return outlet

    def _compress_soon(self, outlet: Outlet, files: LogFile) -> None:
        if files not in self._compressing:
            self._compressing.add(files)
            self.nursery.start_soon(self._compress, outlet, files)

    async def _compress(self, outlet: Outlet, files: LogFile) -> None:
        """Compress what was put aside and is not yet, one file at a time in the whole daemon."""
        try:
            async with self._one_compression:
                while (plain := files.uncompressed()) is not None:
                    with suppress(FileNotFoundError):  # it has another name now
                        await self._compress_one(plain, files)
        except OSError as error:
            outlet.on_lost(0, f"cannot compress {files}.*: {error.strerror or error}")
        finally:
            self._compressing.discard(files)

    async def _compress_one(self, plain: Path, files: LogFile) -> None:
        limiter = trio.CapacityLimiter(1)
        made_of = await trio.to_thread.run_sync(archive.compress, plain, files.draft, limiter=limiter)
        if made_of is not None:
            files.replace(made_of)


def _time_to_gather(pause: float, most: int, passed: float) -> float:
    """How long to leave the pipes alone, after `pause` the last time, when the fullest of them held `most` bytes.

    It shrinks fast where somebody may have had to wait for us, and grows slowly: one who writes all the time is then
    kept waiting for a small part of it only.
    """
    if most > 2 * GATHERED:
        return pause / 4
    return pause if most > GATHERED else min(GATHER, pause + passed / 30)


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
