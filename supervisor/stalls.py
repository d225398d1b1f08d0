"""A job that blocks the loop is named, with its stack, while it does.

Two hooks note when the loop begins to work and when it waits again. A thread looks, while the loop works, whether it still
works at what it worked at one limit ago; where the loop waits, the thread does too, for as long. So nothing wakes an idle
daemon, and a turn of the loop costs two calls.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import NamedTuple

import structlog
import trio
from structlog.contextvars import get_contextvars

from supervisor.events import Journal, Stalled

_log = structlog.get_logger("supervisor")

_OURS = str(Path(__file__).parent)
_TRIO = str(Path(trio.__file__).parent)
_LATE, _SOON = 0.05, 0.001
"""Seconds by which the thread may be late without that meaning anything; and after which it looks again at the earliest."""


@contextmanager
def watching_for_stalls(limit: float, journal: Journal) -> Iterator[None]:
    """Watch the loop of this thread while the block lasts. A `limit` of 0: not at all.

    When one turn of the loop has taken `limit` seconds, a warning with the job, its line and the stack goes to the log, at
    once: the loop may hang for ever. The same again after twice, four times, eight times as long. When it is over, `journal`
    gets one event. Times in which this process did not run (it was stopped, or had no processor) do not count.
    """
    if not limit:
        yield
        return
    watch = _Watch(limit, journal)
    thread = threading.Thread(target=watch.run, name="stall watchdog", daemon=True)
    trio.lowlevel.add_instrument(watch)
    thread.start()
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(watch)
        watch.close()
        thread.join(timeout=1.0)


class Culprit(NamedTuple):
    """What the loop is stuck in: the job and run where it is a job's code, the line, and the stack from there on."""

    job: str | None
    run: str | None
    line: str
    stack: str


class _Watch(trio.abc.Instrument):
    """The hooks belong to the loop's thread, `run` and what it calls to the watchdog's. Each writes what only it writes."""

    def __init__(self, limit: float, journal: Journal) -> None:
        self._limit = limit
        self._journal = journal
        self._loop = _Thread()
        root = trio.lowlevel.current_root_task()
        assert root is not None
        self._root = root
        self._token = trio.lowlevel.current_trio_token()
        self._turn = time.monotonic()
        """When the loop began to work; 0 while it waits."""
        self._parked = False
        self._closed = False
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._seen = 0.0
        self._since = 0.0
        self._lost = 0.0
        self._next = limit

    # in the loop

    def after_io_wait(self, timeout: float) -> None:
        self._turn = time.monotonic()
        if self._parked:
            self._parked = False
            self._bell.put(None)

    def before_io_wait(self, timeout: float) -> None:
        if timeout:  # else it only asks, and goes on
            self._turn = 0.0

    # in the thread

    def run(self) -> None:
        """Look once a limit while the loop works, and as soon as a turn has become too old; while it waits, wait for it."""
        wait, before = self._limit, self._loop.clocks()
        while not self._closed:
            with suppress(Empty):
                self._bell.get(timeout=wait)
            turn, sight = self._glance()
            now = self._loop.clocks()
            if turn:
                wait = self._judge(turn, sight, now.time, now.lost(before, wait))
                before = now
            else:
                self._park()
                wait, before = self._limit, self._loop.clocks()
                self._since = before.time

    def close(self) -> None:
        """Have the thread end."""
        self._closed = True
        self._bell.put(None)

    def _park(self) -> None:
        """Wait until the loop works again: what it did before, and for how long, is of no interest then."""
        self._parked = True
        if not self._turn and not self._closed:
            self._bell.get()
        self._parked = False

    def _glance(self) -> tuple[float, Sight | None]:
        """The turn that goes on, and what it is at, if it is old enough to be a stall.

        This comes first, and lets nobody else run meanwhile: who has held the GIL all the time has it back in a moment.
        """
        turn = self._turn
        old = turn and time.monotonic() - turn >= (self._next if turn == self._seen else self._limit)
        sight = look(self._loop.ident, self._root) if old else None
        return turn, sight if turn == self._turn else None

    def _judge(self, turn: float, sight: Sight | None, now: float, lost: float) -> float:
        """Tell a stall; how long to wait before the next look. `lost` did not count, of the time since the last look."""
        if turn != self._seen:
            self._seen, self._lost, self._next = turn, 0.0, self._limit
        so_far = now - max(turn, self._since)
        self._lost = min(self._lost + lost, so_far)  # not what was lost before the turn began
        age = so_far - self._lost
        if sight is not None and age >= self._next:
            self._tell(turn, age, sight.culprit)
            self._next *= 2
        return max(self._next - age, _SOON)

    def _tell(self, turn: float, seconds: float, culprit: Culprit) -> None:
        """Say it now, and have the loop say it as soon as it can."""
        who = {"job": culprit.job, "run": culprit.run} if culprit.job else {}
        _log.warning("the loop is stuck", **who, seconds=round(seconds, 3), line=culprit.line, stack=culprit.stack)
        if self._next == self._limit:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._over, turn, culprit)

    def _over(self, turn: float, found: Culprit) -> None:
        seconds = time.monotonic() - turn
        who = "" if found.job else ", in no job"
        cause = f"the loop was stuck for {seconds:.3g} s at {found.line}{who}"
        self._journal.emit(Stalled, name=found.job, run=found.run, cause=cause, seconds=seconds, line=found.line)


# -- whether it ran at all ----------------------------------------------------------------------------------------------


class _Clocks(NamedTuple):
    """At one moment: the time, how long the loop's thread has run, and how long it was ready to run and did not."""

    time: float
    cpu: float
    queued: float

    def lost(self, before: _Clocks, wait: float) -> float:
        """Seconds since `before`, when we went to wait for so long, in which the loop could not run, whatever it wanted.

        It was in the queue for a processor. Or we came late, although nobody is asked for that, while it did not run either:
        then the whole process was stopped. (Where it did run all the time, it held the GIL, and that is why we were late.)
        """
        elapsed, queued = self.time - before.time, self.queued - before.queued
        idle = elapsed - queued - (self.cpu - before.cpu)
        return queued + (max(idle, 0.0) if elapsed > wait + _LATE else 0.0)


class _Thread:
    """The thread that makes this, as others see it."""

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self._cpu = time.pthread_getcpuclockid(self.ident)
        self._schedule = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")

    def clocks(self) -> _Clocks:
        queued = 0.0
        with suppress(OSError):  # a kernel that does not keep it
            queued = int(self._schedule.read_text().split()[1]) / 1e9
        return _Clocks(time.monotonic(), time.clock_gettime(self._cpu), queued)


# -- who it is ----------------------------------------------------------------------------------------------------------


class Sight(NamedTuple):
    """What a thread was doing at one moment: its frames with their lines, the outermost first, and Trio's task there."""

    frames: list[tuple[FrameType, int]]
    task: trio.lowlevel.Task | None

    @property
    def culprit(self) -> Culprit:
        """Who that is."""
        bound = {} if self.task is None else self.task.context.copy().run(get_contextvars)
        return Culprit(bound.get("job"), bound.get("run"), _line(self.frames), _stack(self.frames, self.task))


def look(thread: int, root: trio.lowlevel.Task) -> Sight | None:
    """What that thread is doing now; None where it is gone. Callable from any thread."""
    innermost = sys._current_frames().get(thread)
    if innermost is None:
        return None
    frames = list(traceback.walk_stack(innermost))[::-1]
    return Sight(frames, _task_on(frames, root))


def _task_on(frames: list[tuple[FrameType, int]], root: trio.lowlevel.Task) -> trio.lowlevel.Task | None:
    """The task whose outermost function is on the stack: the one that runs."""
    waiting, on_stack = [root], {id(frame) for frame, _ in frames}
    while waiting:
        task = waiting.pop()
        if id(getattr(task.coro, "cr_frame", None)) in on_stack:
            return task
        waiting += (child for nursery in task.child_nurseries for child in nursery.child_tasks)
    return None


def _line(frames: list[tuple[FrameType, int]]) -> str:
    """The innermost line of somebody's own code, where there is any: not of a library, not of ours."""
    foreign = (_OURS, *_libraries(), "<frozen")
    own = (each for each in reversed(frames) if not each[0].f_code.co_filename.startswith(foreign))
    frame, line = next(own, frames[-1])
    return f"{frame.f_code.co_filename}:{line} ({frame.f_code.co_name})"


@functools.cache
def _libraries() -> set[str]:
    """Where Python's library and installed packages are; asked for when it is needed, since asking costs milliseconds."""
    return {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def _stack(frames: list[tuple[FrameType, int]], task: trio.lowlevel.Task | None) -> str:
    """The stack without what is round the task, and round the job in it: Trio's, and ours."""
    start = next((at for at, (frame, _) in enumerate(frames) if task is not None and frame is task.coro.cr_frame), 0)
    inner = frames[start:]
    while inner and inner[0][0].f_code.co_filename.startswith((_OURS, _TRIO)):
        inner = inner[1:]
    return "".join(traceback.StackSummary.extract(iter(inner or frames[start:])).format()).rstrip()
