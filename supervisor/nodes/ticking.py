"""Schedules of queue jobs: each tick of a `cron` is one item, put by the daemon, and handled like any other.

All daemons that share a queue have the same ticks, and an item of a tick has the same id wherever it is put: it is stored once,
and kept when it has ended, so that a daemon which comes late with it stores nothing more.

While a queue does not take them, ticks wait, by the schedule's rule for those that were missed: the newest of them, or with
`catch_up = "all"` the newest hundred.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import trio

from supervisor import events
from supervisor.errors import QueueError
from supervisor.kinds import JobSpec
from supervisor.nodes.schedule import Due, Schedule, same_times
from supervisor.state import Goal, JobStatus
from supervisor.triggers import MOST
from supervisor.wall import written

if TYPE_CHECKING:
    from supervisor.nodes.node import Life
    from supervisor.tree import Supervisor


class Ticking:
    """The tickers of a tree: one for each queue job with a schedule."""

    def __init__(self, tree: Supervisor) -> None:
        self._tree = tree
        self._tickers: dict[str, Ticker] = {}
        self._nursery: trio.Nursery | None = None

    def begin(self, nursery: trio.Nursery) -> None:
        """Tick from now on, for as long as the nursery is open."""
        self._nursery = nursery
        for ticker in self._tickers.values():
            ticker.begin(nursery)

    def apply(self, jobs: Mapping[str, JobSpec]) -> None:
        """Tick as these jobs say. Times that are not changed go on as they were."""
        for name, ticker in list(self._tickers.items()):
            if name not in jobs or not same_times(ticker.spec, jobs[name]):
                ticker.end()
                del self._tickers[name]
        for name, spec in jobs.items():
            if not spec.ticks:
                continue
            if name in self._tickers:
                self._tickers[name].respecify(spec)
                continue
            self._tickers[name] = Ticker(self._tree, name, spec)
            if self._nursery is not None:
                self._tickers[name].begin(self._nursery)


class Ticker:
    """Puts an item of each tick of a job's schedule, which takes it for the node whose runs these are.

    While the job is stopped or paused here, ticks go by.
    """

    busy = ""
    life: Life | None = None
    parent = None
    removing: str | None = None

    def __init__(self, tree: Supervisor, name: str, spec: JobSpec) -> None:
        self.tree = tree
        self.name = name
        self.spec = spec
        self.schedule = Schedule(self)
        self._nursery: trio.Nursery
        self._left: deque[Due] = deque()
        """The ticks whose items are still to be put, but the one in hand."""
        self._in_hand: trio.CancelScope | None = None
        """Round the put of one."""
        self._held = ""
        """Why that is not done yet, where the queue does not take it."""

    @property
    def paused(self) -> bool:
        """Whether ticks go by."""
        node = self.tree.nodes.get(self.name)
        return node is None or node.goal is Goal.DOWN or node.paused

    @property
    def row(self) -> JobStatus:
        """The job's."""
        return self.tree.journal.table[self.name]

    def emit(self, kind: type[events.ChildEvent], /, **fields: Any) -> None:
        """Record that something happened to the job's schedule."""
        self.tree.journal.emit(kind, name=self.name, **fields)

    def wake_at(self, moment: float) -> None:
        """Its ticks are the wall clock's, whose alarm rings for them."""

    def begin(self, nursery: trio.Nursery) -> None:
        """Tick from now on."""
        self._nursery = nursery
        self.schedule.arm()
        self._take()

    def end(self) -> None:
        """No more ticks. What waits is not put any more."""
        self.schedule.disarm()
        self.schedule.forget()
        self._left.clear()
        if self._held and self._in_hand is not None:
            self._in_hand.cancel(reason="the job has no such schedule any more")

    def respecify(self, spec: JobSpec) -> None:
        """Go on by a spec whose times are the same."""
        self.spec = spec
        self.schedule.respecified()

    def look(self) -> None:
        """A tick may have come."""
        if self.paused:
            self.schedule.resume()
        else:
            self.schedule.look()
            self._take()

    def _take(self) -> None:
        """Have items put for the ticks that have come."""
        while (due := self.schedule.begin()) is not None:
            self._left.append(due)
        self._leave_out()
        if self._left and self._in_hand is None:
            self._in_hand = trio.CancelScope()
            self._nursery.start_soon(self._put_all, name=f"{self.name}: ticks")

    def _leave_out(self) -> None:
        """Let go of the oldest, where more wait than may. The one in hand is among them if the queue does not take it."""
        most = MOST if self.spec.catch_up == "all" else 1
        if (surplus := len(self._left) + bool(self._held) - most) <= 0:
            return
        self.emit(events.Skipped, cause=f"the item of an earlier one {self._held or 'is not stored yet'}", ticks=surplus)
        if self._held and self._in_hand is not None:
            surplus -= 1
            self._held = ""
            self._in_hand.cancel(reason="there are newer ticks")
        for _ in range(surplus):
            self.schedule.ended(self._left.popleft(), cut_short=False)

    async def _put_all(self) -> None:
        """Put the items of ticks, one after another; each is settled only then, or when it is let go of."""
        while self._left:
            due = self._left.popleft()
            with trio.CancelScope() as self._in_hand:
                await self._put(due)
            self._held = ""
            self.schedule.ended(due, cut_short=False)
        self._in_hand = None

    async def _put(self, due: Due) -> None:
        """Put the item of one tick, however long that takes."""
        from supervisor.kinds.chain import put_patiently  # loaded only where there are queues

        queue = self.spec.queue
        assert queue is not None
        try:
            await self.tree.queues.wait_for(queue)
            producer = self.tree.queues.producer(queue)
            items, ids = [self.spec.args or {}], [item_id(self.name, due.at)]
            await put_patiently(producer, queue, items, ids, self._tell, self.tree.spread, keep=True)
        except (QueueError, LookupError) as error:
            self.tree.journal.emit(events.Warned, text=f"{self.name}: no item for {written(due.at)}: {error}")

    def _tell(self, queue: str, cause: str | None) -> None:
        self._held = cause or ""
        if cause is not None:
            self.tree.journal.emit(events.Warned, text=f"{self.name}: the item of a tick of its schedule {cause}")


def item_id(job: str, tick: float) -> str:
    """The id of the item of a tick."""
    return f"{job}@{written(tick)}"
