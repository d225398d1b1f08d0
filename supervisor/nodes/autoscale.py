"""How many workers a queue job has whose `workers` says `{ min, max }`: as many as there is work for.

More, quickly: work waits and no worker is free. Then there are twice as many a second later, and so on, until nothing waits
for long. Fewer, slowly: in a whole minute there was always one free. Then one that is idle leaves.

Nothing is looked at while a worker is free. What waits is counted when the desk has handed out items and no hand was left, and
the engine says that there is more; then once in `UP_EVERY` while that stays so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from supervisor import events
from supervisor.config.shapes import duration
from supervisor.errors import QueueError
from supervisor.nodes.job import JobNode
from supervisor.queues.spec import AutoscaleSpec

if TYPE_CHECKING:
    from supervisor.nodes.workers import WorkersNode
    from supervisor.queues.desk import Desk
    from supervisor.queues.protocol import Counts

UP_EVERY = 1.0
"""Seconds between two looks at what waits, and so between two steps up at least."""

QUIET = 60.0
"""Seconds in which a worker was always free, before one leaves: for each that leaves."""

DEPTH = 10
"""Items that may wait for each worker, for a moment: what is done in no time needs no more of them."""

PATIENCE = 1.0
"""Seconds that an item may wait."""


def grown(workers: int, most: int, waiting: int, oldest: float) -> int:
    """How many workers there are to be, where none of them is free, so many items wait, and the first has for `oldest` seconds.

    Never fewer than there are. At most twice as many, and at most one more for each that waits; the first at once.
    """
    if workers == 0:
        return min(1, most)
    if waiting <= DEPTH * workers and oldest < PATIENCE:
        return workers
    return max(workers, min(2 * workers, workers + waiting, most))


class Autoscale:
    """Keeps the number of a group's workers, while the group runs and nobody else decides. Ends by `stop`."""

    def __init__(self, group: WorkersNode, spec: AutoscaleSpec, queue: str) -> None:
        self._group = group
        self._spec = spec
        self._queue = queue
        self._scope = trio.CancelScope()
        self._changed = trio.lowlevel.ParkingLot()
        self._full = False
        """Whether no worker was free when last items were handed out."""
        self._full_at = -math.inf
        """When that was last so."""
        self._desk: Desk

    async def run(self) -> None:
        """Keep it until stopped."""
        tree = self._group.tree
        with self._scope:
            try:
                self._desk = await tree.queues.wait_for(self._queue)
            except (QueueError, LookupError):  # which its workers say
                return
            self._full_at = trio.current_time()
            with self._desk.watched(self._group.name, self):
                self.look()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._grow, name=f"{self._group.name}: more workers")
                    nursery.start_soon(self._shrink, name=f"{self._group.name}: fewer workers")

    def stop(self) -> None:
        """Leave the number as it is."""
        self._scope.cancel(reason="the number of workers is kept no more")

    # ---- what the desk tells ----

    def look(self) -> None:
        """Items were handed out, or may be from now on."""
        self._full = not self._desk.has_free(self._group.name)
        if self._full:
            self._full_at = trio.current_time()
            self._changed.unpark_all()

    def freed(self) -> None:
        """A worker is free again."""
        if self._full:
            self._full = False
            self._full_at = trio.current_time()

    # ---- more ----

    async def _grow(self) -> None:
        while True:
            await self._until(self._pressed)
            counts = await self._desk.work_waits()
            if self._pressed():
                self._follow(counts)
                await trio.sleep(UP_EVERY)

    def _pressed(self) -> bool:
        """Whether more workers could help: all that there are have come, and have something in hand."""
        group = self._group
        if group.paused or group.closing is not None or group.tree.ending or group.wanted >= self._spec.max:
            return False
        here = sum(worker.active for worker in group.workers)
        return self._desk.seated(group.name) >= here and not self._desk.has_free(group.name)

    def _follow(self, counts: Counts) -> None:
        group, oldest = self._group, counts.oldest or 0.0
        wanted = grown(group.wanted, self._spec.max, counts.waiting, oldest)
        if wanted > group.wanted:
            self._tell(wanted, f"{counts.waiting} wait, the oldest for {duration(round(oldest))}", counts.waiting, oldest)
            group.grow(wanted)
            self._changed.unpark_all()

    # ---- fewer ----

    async def _shrink(self) -> None:
        while True:
            await self._until(self._has_spare)
            await trio.sleep_until(self._full_at + QUIET)
            if self._full:
                self._full_at = trio.current_time()
            elif self._has_spare() and trio.current_time() >= self._full_at + QUIET:
                self._full_at = trio.current_time()
                self._let_one_go()

    def _has_spare(self) -> bool:
        return self._group.wanted > self._spec.min and self._group.closing is None

    def _let_one_go(self) -> None:
        """Have the last of those that are idle leave. It takes nothing any more from this moment on."""
        group = self._group
        idle = [worker for worker in group.workers if isinstance(worker, JobNode) and worker.pool and worker.pool.idle]
        if idle:
            assert idle[-1].pool is not None
            self._tell(group.wanted - 1, f"a worker was free for {duration(QUIET)}", 0, 0.0)
            idle[-1].pool.leave()
            group.part_with(idle[-1])
            self.look()

    # ---- both ----

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.park()

    def _tell(self, wanted: int, why: str, waiting: int, oldest: float) -> None:
        was = self._group.wanted
        cause = f"scaled {was} -> {wanted}: {why}"
        self._group.emit(events.Scaled, was=was, workers=wanted, waiting=waiting, oldest=round(oldest, 3), cause=cause)
