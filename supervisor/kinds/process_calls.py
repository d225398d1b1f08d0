"""The worker of a queue job of kind `process`: one process, kept for all its calls.

It makes them one after another, and has the next ones there before it needs them, as long as they are short: a queue of small
items is not to wait for a round trip after each. What it was given and has not begun is taken back as soon as a call turns out
to be a long one, so that another worker has it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import trio

from supervisor.errors import NotBegun, RunFailed, SpawnFailed, WorkerLost
from supervisor.kinds.context import Attempt, Resources, Run, Work, alone
from supervisor.kinds.job import JobSpec
from supervisor.kinds.process_channel import (
    Channel,
    Failed,
    Message,
    Nonsense,
    Progress,
    Returned,
    Started,
    Withdrawn,
    arguments,
    checked,
    named,
)
from supervisor.kinds.process_check import Checker
from supervisor.spec import split_name
from supervisor.state import Phase

if TYPE_CHECKING:
    from supervisor.kinds.chain import Chain

AHEAD = 0.004
"""Seconds of work that a process is given at once."""

MOST = 32
"""Calls that a process is given at once, however short they are."""

LONG = 0.05
"""Seconds that a call may take until those behind it are taken back."""

SHORT = 1e-5
"""Seconds that a call takes at least, whatever it takes."""

LEARNING = 0.1
"""The weight of the last call in what is expected of the next."""


@asynccontextmanager
async def handling(spec: JobSpec, run: Run, resources: Resources) -> AsyncIterator[Calls]:
    """A process that has loaded the code. Where it dies without a call in hand, the body is cancelled, and WorkerLost raised.

    Raises SpawnFailed if there was no process, and RunFailed where the function is not to be had. At the end the process ends
    by itself, and is waited for; cancelled, it is killed.
    """
    with Calls(spec, run, resources) as calls:
        with alone():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(calls.keep, nursery.cancel_scope)
                await calls.wait_started()
                calls.checker = Checker(spec, run, resources, nursery)
                yield calls
                calls.checker.end()
                calls.close()
        if calls.failure is not None:
            raise calls.failure


class Call:
    """A call that the process was given, and has not answered."""

    __slots__ = ("caller", "gone", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.caller: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        """Who waits for what it returns."""
        self.gone: trio.Event | None = None
        """Set, where somebody waits for that, when it has ended or will never begin, or turns out to have begun."""


class Calls(Channel):
    """Our side of the process. The calls in `_line` are answered in that order: the first has begun."""

    serves = True
    hears = True
    """A function that takes no Context is interrupted."""

    def __init__(self, spec: JobSpec, run: Run, resources: Resources) -> None:
        super().__init__(spec, run, resources)
        self.failure: RunFailed | None = None
        """Why the process is not there any more, though nobody has asked it to end."""
        self.checker: Checker
        self._typed = True
        self._line: dict[int, Call] = {}
        self._last = 0
        self._began = 0.0
        self._expected = AHEAD
        """Seconds that a call takes, by those before it, as the process has measured them: how busy we are is not in it."""
        self._patience = trio.CancelScope()
        self._taking_back = False
        """Whether those behind the first were asked for already."""
        self._closed = False
        self._started, self._over = trio.Event(), trio.Event()

    @property
    def room(self) -> int:
        """More than one as long as calls are short; while a long one is under way, nothing is to wait behind it."""
        return 1 if self._taking_back else max(1, min(MOST, int(AHEAD / self._expected)))

    # ---- its process ----

    async def keep(self, body: trio.CancelScope) -> None:
        """Have the process, from start to end."""
        self.tell(self._order(), arguments(self._spec))
        process = Attempt(self._run, None, followed=False)  # it does not end when its worker is asked to
        self._run.on_stopping(lambda: None if self._started.is_set() else process.advance(Phase.STOPPING))
        refused: RunFailed | None = None
        try:
            await self.live(process)
        except SpawnFailed as error:
            refused = error
        finally:
            self._run.outcome = process.outcome
            self._ended(refused, body)

    def _order(self) -> dict[str, Any]:
        """The order to load the function."""
        run, spec = self._run, self._spec
        facts = {"job": split_name(run.job)[0], "worker": run.worker, "run": run.id}
        asked = {"batch": spec.batch is not None, "into": run.chain is not None}
        return {"is": "serve", "call": named(spec.call), "facts": facts, **asked}

    def _ended(self, refused: RunFailed | None, body: trio.CancelScope) -> None:
        """Nothing of the process is alive."""
        how = self._run.outcome.reason if self._run.outcome is not None else "killed"
        lost = self.failure or refused or WorkerLost(self.nonsense or f"its process has ended: {how}")
        if not self._closed and not (self._run.stopping and not self._started.is_set()):
            self.failure = lost
        was_idle = not self._line
        for number in tuple(self._line):
            self._answer(number, outcome.Error(WorkerLost(str(lost))))
        self._closed = True
        self._over.set()
        if self._started.is_set() and was_idle:
            body.cancel(reason=str(lost))
        self._started.set()

    async def wait_started(self) -> None:
        """Wait until it has loaded the code. Raises RunFailed where it cannot; a worker that is to end need not have one."""
        await self._started.wait()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Have the process end. It has no call in hand."""
        self._closed = True
        self.tell({"is": "end"})

    async def check(self, items: Sequence[bytes]) -> None:
        """See `Checker.check`."""
        if self._typed:
            await self.checker.check(items)

    # ---- calls ----

    async def handle(self, work: Work, payload: bytes) -> bytes | None:
        """One call, in its turn. Cancelled before that, it is taken back; later, the process is killed with it."""
        if self._closed:
            raise WorkerLost(str(self.failure or "its process has ended"))
        await trio.lowlevel.checkpoint_if_cancelled()
        self._last = number = self._last + 1
        call = self._line[number] = Call(work)
        self.tell(_head(number, work), payload)
        work.follow(partial(self._tell_phase, number, work))
        self._begin_first()
        if len(self._line) == 2:
            self._patience.deadline = self._began + LONG
        try:
            returned: bytes | None = await trio.lowlevel.wait_task_rescheduled(partial(_leave, call))
        except trio.Cancelled:
            await self._end_by_force(number, call)
            raise
        return returned

    def _begin_first(self) -> None:
        """The first call in the line is the one that the process makes next, or makes already."""
        first = next(iter(self._line.values()), None)
        if first is not None and not first.work.begun:
            first.work.begin()
            self._began = trio.current_time()
            self._taking_back = False

    def _answer(self, number: int, what: outcome.Outcome[bytes | None]) -> None:
        call = self._line.pop(number)
        if call.gone is not None:
            call.gone.set()
        if call.caller is not None:
            trio.lowlevel.reschedule(call.caller, what)

    def _tell_phase(self, number: int, work: Work, phase: Phase) -> None:
        if number in self._line:
            self.tell({"is": "phase", "call": number, **_told(work)})

    async def _end_by_force(self, number: int, call: Call) -> None:
        """End a call that nobody waits for any more: take it back, or kill what makes it."""
        with trio.CancelScope(shield=True):
            if not call.work.begun:
                call.gone = trio.Event()
                self.tell({"is": "withdraw", "calls": [number]})
                with trio.move_on_after(LONG * 10):  # where native code holds the interpreter, nobody answers
                    await call.gone.wait()
            if number in self._line:
                self.kill(f"{call.work.item} was cancelled")
                await self._over.wait()

    # ---- what it says ----

    async def _wait_readable(self) -> None:
        """Wait for more from the process; while calls wait behind one, only for as long as that may take."""
        waits = len(self._line) > 1 and not self._taking_back
        with trio.CancelScope(deadline=self._began + LONG if waits else math.inf) as self._patience:
            await super()._wait_readable()
        if self._patience.cancelled_caught:
            self._taking_back = True
            self.tell({"is": "withdraw", "calls": [*self._line][1:]})

    def _chain(self, call: int) -> Chain | None:
        return self._line[call].work.chain if call in self._line else None

    def _take(self, message: Message, body: bytes) -> None:
        match message:
            case Returned(number, took):
                self._take_answer(number, took, outcome.Value(checked(body) if body else None))
            case Failed(call=0):
                self.failure = message.error
            case Failed():
                self._take_answer(message.call, message.took, outcome.Error(message.error))
            case Progress(done, total, number):
                if number in self._line:  # else a thread of a call that has returned says it
                    self._line[number].work.progress(done, total)
            case Withdrawn(numbers):
                self._take_back(numbers)
            case Started(typed):
                self._typed = typed
                self._started.set()
            case _:
                super()._take(message, body)

    def _take_answer(self, number: int, took: float, what: outcome.Outcome[bytes | None]) -> None:
        if number != next(iter(self._line), None):
            raise Nonsense(f"an answer to call {number}, which has not begun")
        self._expected += LEARNING * (max(took, SHORT) - self._expected)
        self._answer(number, what)
        self._begin_first()

    def _take_back(self, numbers: tuple[int, ...]) -> None:
        """Give back what the process has not begun, whatever it looked like from here, and now never will."""
        for number in numbers:
            if number in self._line:
                self._line[number].work.begun = False
                self._answer(number, outcome.Error(NotBegun("the call before it takes long")))
        self._begin_first()
        for call in self._line.values():
            if call.gone is not None:
                call.gone.set()


def _head(number: int, work: Work) -> dict[str, Any]:
    """The order to make a call. There are many of these: what is usual goes without saying."""
    head = {"is": "item", "call": number, "item": work.item, "attempt": work.attempt, "left": work.left}
    return head if work.current_phase is Phase.RUNNING else head | _told(work)


def _told(work: Work) -> dict[str, Any]:
    """What the process is to know of its stop."""
    return {"phase": work.current_phase.value, "stopping": work.stopping, "overdue": work.overdue}


def _leave(call: Call, _: object) -> trio.lowlevel.Abort:
    call.caller = None
    return trio.lowlevel.Abort.SUCCEEDED
