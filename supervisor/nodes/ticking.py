"""Schedules of queue jobs: each tick of a `cron` is one item, put by the daemon, and handled like any other.

All daemons that share a queue have the same ticks, and an item of a tick has the same id wherever it is put: it is stored once,
and kept when it has ended, so that a daemon which comes late with it stores nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import trio

from supervisor import events
from supervisor.errors import QueueError
from supervisor.kinds import JobSpec
from supervisor.nodes.schedule import Due, Schedule, same_times
from supervisor.state import Goal, JobStatus
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
                ticker.schedule.disarm()
                ticker.schedule.forget()
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
        self._put_all()

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
            self._put_all()

    def _put_all(self) -> None:
        while (due := self.schedule.begin()) is not None:
            self._nursery.start_soon(self._put, due, name=f"{self.name} at {written(due.at)}")

    async def _put(self, due: Due) -> None:
        """Put the item of one tick, however long that takes; only then is it settled."""
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
        self.schedule.ended(due, cut_short=False)

    def _tell(self, queue: str, cause: str | None) -> None:
        if cause is not None:
            self.tree.journal.emit(events.Warned, text=f"{self.name}: the item of a tick of its schedule {cause}")


def item_id(job: str, tick: float) -> str:
    """The id of the item of a tick."""
    return f"{job}@{written(tick)}"
