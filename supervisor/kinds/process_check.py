"""Whether the function of a process job takes an item, asked before that is put. The daemon has not loaded its code.

Who answers is a process like that of a worker, beside it: the same program and code, directory, environment, user and limits.
A worker's own has no time: it may be in a long call, or in native code that lets nothing else of the process run. So there is
one more for a job whose function says what it takes, while items are put; it ends when none was for a minute, and with its
worker.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import outcome
import structlog
import trio

from supervisor.errors import RunFailed, UnfitItem, WorkerLost
from supervisor.kinds.command import spawn_beside
from supervisor.kinds.context import Resources, Run
from supervisor.kinds.job import JobSpec
from supervisor.kinds.process_channel import Channel, Checked, Failed, Message, Nonsense, Started, arguments, named

log = structlog.get_logger("supervisor")

IDLE = 60.0
"""Seconds for which the process is kept when it has nothing to do."""

PATIENCE = 5.0
"""Seconds that the process may take to load the code, and for each answer: nobody waits longer to have an item stored."""

PACE = 4 << 20
"""Bytes of items for which it may take one second more."""

REST = 60.0
"""Seconds in which nobody is asked after there was no answer."""


LONGEST_TEXT = 500
"""Characters of what is said of an item."""


class Checker:
    """Belongs to a worker. What cannot be asked is not refused: who handles the item will say what is wrong with it."""

    def __init__(self, spec: JobSpec, run: Run, resources: Resources, nursery: trio.Nursery) -> None:
        """Its process lives in the `nursery`, until that is cancelled or it is to `end`."""
        self._spec = spec
        self._run = run
        self._resources = resources
        self._nursery = nursery
        self._process: _Process | None = None
        self._rests_until = -math.inf

    @property
    def awake(self) -> bool:
        """Whether there is a process to ask."""
        return self._process is not None and not self._process.ending

    async def check(self, items: Sequence[bytes]) -> None:
        """Look at items, which are JSON. Raises UnfitItem for the first that the function does not take; `position` says which.

        Takes no longer than some seconds.
        """
        if trio.current_time() < self._rests_until:
            return
        process = self._process if self._process is not None and self.awake else self._start()
        bad = None
        limit = PATIENCE + sum(map(len, items)) / PACE
        with trio.move_on_after(limit) as patience:
            try:
                bad = await process.look_at(items)
            except RunFailed as error:
                self._rest(str(error))
        if patience.cancelled_caught and not process.loading:
            process.kill("it does not answer")
            self._rest(f"no answer within {limit:.0f} s")
        if bad is not None:
            raise bad

    def end(self) -> None:
        """Have the process end, and start none any more."""
        self._rests_until = math.inf
        if self._process is not None:
            self._process.kill("its worker ends")

    def _start(self) -> _Process:
        process = self._process = _Process(self._spec, self._run, self._resources)
        self._nursery.start_soon(process.run, name=f"{self._run.id}: checker")
        return process

    def _rest(self, why: str) -> None:
        """Say it once, and leave it alone for a while: a code that does not load here will not do so a second later."""
        if trio.current_time() >= self._rests_until and not self._run.stopping:
            self._rests_until = trio.current_time() + REST
            log.warning(f"items are put unchecked for {REST:g} s", job=self._run.job, run=self._run.id, reason=why)


class _Process(Channel):
    """One process, from its start to its end."""

    serves = True

    def __init__(self, spec: JobSpec, run: Run, resources: Resources) -> None:
        super().__init__(spec, run, resources)
        self.lost: RunFailed | None = None
        """Why it is not there any more."""
        self._loaded = trio.Event()
        self._patience = trio.current_time() + PATIENCE
        """Until when the code is waited for."""
        self._how = "killed"
        self._asked: dict[int, trio.lowlevel.Task] = {}
        self._numbers = itertools.count(1)

    @property
    def ending(self) -> bool:
        """Whether it is no use to ask it any more."""
        return self.lost is not None or self._killed.cancel_called

    @property
    def loading(self) -> bool:
        """Whether it is not ready to be asked yet."""
        return not self._loaded.is_set()

    async def run(self) -> None:
        """Have the process, until it has nothing to do, is killed, or ends by itself."""
        try:
            with self:
                await self._live()
        except RunFailed as error:
            self.lost = self.lost or error
        finally:
            self.lost = self.lost or WorkerLost(self.nonsense or f"its process has ended: {self._how}")
            self._loaded.set()
            for number in tuple(self._asked):
                self._answer(number, outcome.Error(self.lost))

    async def _live(self) -> None:
        spec, run = self._spec, self._run
        facts = {"job": run.job, "worker": run.worker, "run": run.id}
        asked = {"batch": spec.batch is not None, "into": run.chain is not None}
        self.tell({"is": "serve", "call": named(spec.call), "facts": facts, **asked}, arguments(spec))
        await self.live(run)

    async def _have_process(self, program: JobSpec, run: Run) -> None:
        null = self._resources.children.null
        child = await spawn_beside(program.command, program, run, self._resources, null, self._theirs.fileno())
        self._theirs.close()
        try:
            await child.wait()
        finally:
            report = await child.destroy(stuck=self._stuck, abandoned=run.abandoned)
            self._how = f"killed by {report.signal}" if report.signal else f"exited with code {report.code}"

    def _stuck(self, pids: tuple[int, ...]) -> None:
        self._run.stuck(f"what checks its items cannot be killed: pid {', '.join(map(str, pids))}", pids)

    async def look_at(self, items: Sequence[bytes]) -> UnfitItem | None:
        """What is wrong with the first of these that the function does not take. Raises RunFailed where there is no answer.

        While the code takes long to load, nothing is known to be wrong.
        """
        self._stay()
        with trio.move_on_at(self._patience):
            await self._loaded.wait()
        if self.lost is not None:
            raise self.lost
        if self.loading:
            return None
        number = next(self._numbers)
        pieces = [b"[%b]" % item for item in items] if self._spec.batch is not None else items
        self.tell({"is": "check", "number": number, "sizes": [*map(len, pieces)]}, b"".join(pieces))
        self._asked[number] = trio.lowlevel.current_task()

        def leave(_: object) -> trio.lowlevel.Abort:
            del self._asked[number]
            return trio.lowlevel.Abort.SUCCEEDED

        bad: UnfitItem | None = await trio.lowlevel.wait_task_rescheduled(leave)
        return bad

    def _stay(self) -> None:
        """Be there for a while, from now on."""
        if not self.loading:
            self._killed.deadline = trio.current_time() + IDLE

    def _take(self, message: Message, body: bytes) -> None:
        match message:
            case Started():
                self._loaded.set()
                self._stay()
            case Checked(number, position, text):
                self._answer(number, outcome.Value(None if position is None else _unfit(position, text)))
            case Failed():
                self.lost = message.error
            case _:
                raise Nonsense(f"{type(message).__name__.lower()}, which nobody waits for")

    def _answer(self, number: int, what: outcome.Outcome[UnfitItem | None]) -> None:
        if (asked := self._asked.pop(number, None)) is not None:
            trio.lowlevel.reschedule(asked, what)


def _unfit(position: int, text: str) -> UnfitItem:
    unfit = UnfitItem(text[:LONGEST_TEXT])
    unfit.position = position
    return unfit
