"""The bulkhead: so many at the same time, so that one crowd cannot sink the ship."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from types import TracebackType

import trio

from supervisor.errors import BulkheadFull
from supervisor.policies.layer import Layer, P, T
from supervisor.policies.spec import BulkheadSpec
from supervisor.spec import Seconds


class Bulkhead(Layer):
    """At most `concurrency` at the same time, of all that share it.

    Others wait, first come, first served: at most `waiting` of them (0: nobody), each at most `within` seconds; who may not
    wait, or has waited for so long, is rejected with `BulkheadFull`. As a layer, or `async with bulkhead:`. A cancelled
    waiter has taken nothing.
    """

    def __init__(self, concurrency: int, *, waiting: int | None = None, within: float | None = None, name: str = "") -> None:
        if concurrency < 1 or (waiting or 0) < 0 or not (within or 0) >= 0:
            raise ValueError("Bulkhead: concurrency is 1 or more, waiting and within are 0 or more")
        self.name = name
        self.in_use = 0
        """How many places are taken."""
        self._queue: OrderedDict[trio.lowlevel.Task, str] = OrderedDict()
        self.spec = BulkheadSpec(concurrency=concurrency, waiting=waiting, within=None if within is None else Seconds(within))
        """Its numbers."""

    @classmethod
    def from_spec(cls, spec: BulkheadSpec, *, name: str = "") -> Bulkhead:
        """As a file says it."""
        return cls(spec.concurrency, waiting=spec.waiting, within=spec.within, name=name)

    def configure(self, spec: BulkheadSpec) -> None:
        """New numbers from now on. Who waits goes on waiting; with fewer places, those in use are left to be given back."""
        self.spec = spec
        self._hand_on()

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who waits for a place, in order."""
        return tuple(self._queue.values())

    async def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.in_use < self.spec.concurrency:  # then nobody waits
            self.in_use += 1
        else:
            await self._wait(None)
        try:
            return await function(*args, **kwargs)
        finally:
            self.release()

    async def acquire(self, who: str | None = None) -> None:
        """Take a place, to be given back by `release`. `who` is shown in `waiting`, by default the task's name."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.in_use < self.spec.concurrency:  # then nobody waits
            self.in_use += 1
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._wait(who)

    def release(self) -> None:
        """Give a place back: to the one who has waited longest."""
        if not self.in_use:
            raise RuntimeError("Bulkhead.release: no place is taken")
        self.in_use -= 1
        self._hand_on()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _hand_on(self) -> None:
        while self._queue and self.in_use < self.spec.concurrency:
            task, _ = self._queue.popitem(last=False)
            self.in_use += 1
            trio.lowlevel.reschedule(task)

    async def _wait(self, who: str | None) -> None:
        spec = self.spec
        if spec.waiting is not None and len(self._queue) >= spec.waiting:
            raise self._full(f"{len(self._queue)} wait already" if spec.waiting else "nobody may wait")
        with trio.move_on_after(math.inf if spec.within is None else spec.within):
            await self._park(who)
            return
        raise self._full(f"none got free within {spec.within:g} s")

    async def _park(self, who: str | None) -> None:
        """Wait to be handed a place. Where this is cancelled, that is so at once: no place comes to who has left."""
        task = trio.lowlevel.current_task()

        def leave(_: object) -> trio.lowlevel.Abort:
            del self._queue[task]
            return trio.lowlevel.Abort.SUCCEEDED

        self._queue[task] = task.name if who is None else who
        await trio.lowlevel.wait_task_rescheduled(leave)

    def _full(self, why: str) -> BulkheadFull:
        places = f"all {self.spec.concurrency} places of bulkhead{self.name and ' '}{self.name} are taken"
        return BulkheadFull(f"{places}, and {why}")
