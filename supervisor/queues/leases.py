"""The leases that a daemon has on the items of a queue that others share: renewed while they are held, and given up in time.

Until when a lease is certainly ours is known by Trio's clock, counted from before the engine was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from supervisor.queues.protocol import Engine, Item, QueueError
from supervisor.restart import Delays
from supervisor.spec import Backoff, Seconds

AWAY = Backoff(initial=Seconds(0.2), factor=2, max=Seconds(5), jitter=0.2)
"""How an engine that does not answer is tried again."""


class Lease:
    """A claim on a shared engine: until when it is certainly ours, on Trio's clock."""

    __slots__ = ("item", "until")

    def __init__(self, item: Item, until: float) -> None:
        self.item = item
        self.until = until


class Leases:
    """All leases of one queue. `away` and `well` hear how the engine does, `lost` of each item that is ours no more."""

    def __init__(
        self,
        engine: Engine,
        spread: Callable[[float, float], float],
        away: Callable[[QueueError, float], None],
        well: Callable[[], None],
        lost: Callable[[Item, str], None],
    ) -> None:
        self._engine = engine
        self._spread = spread
        self._away = away
        self._well = well
        self._lost = lost
        self._held: dict[str, Lease] = {}
        """By the id of the item."""
        self._some = trio.Event()

    def keep(self, items: Sequence[Item], asked_at: float) -> None:
        """These were claimed, by an engine that was asked for them at this moment: renew them until they are dropped."""
        until = asked_at + self._engine.settings.spec.lease
        self._held.update({item.id: Lease(item, until) for item in items})
        self._some.set()

    def drop(self, id: str, token: int) -> None:
        """This claim is over."""
        lease = self._held.get(id)
        if lease is not None and lease.item.token == token:
            del self._held[id]

    async def renew(self) -> None:
        """Renew what is held, each third of a lease, for ever."""
        while True:
            while not self._held:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(self._engine.settings.spec.lease / 3)
            await self._renew_all()

    async def _renew_all(self) -> None:
        """Renew all; what cannot be renewed before it runs out is lost."""
        left, delays = list(self._held.values()), Delays(self._spread)
        while left:
            trouble, until = "no answer", trio.current_time() + self._engine.settings.spec.lease
            with trio.move_on_at(min(lease.until for lease in left)):
                try:
                    renewed = await self._engine.renew([lease.item for lease in left])
                except QueueError as error:
                    trouble, wait = str(error), delays.after_failure(AWAY, 0)
                    self._away(error, wait)
                    await trio.sleep(wait)
                else:
                    self._take(left, renewed, until)
                    break
            left = self._expire(left, trouble)
        self._well()  # also where nothing is left that would have to be renewed

    def _take(self, leases: Sequence[Lease], renewed: Sequence[bool], until: float) -> None:
        for lease, ok in zip(leases, renewed, strict=True):
            if self._is_held(lease):
                lease.until = until
                if not ok:
                    self._lose(lease, "its lease was lost: somebody else has it")

    def _expire(self, leases: Sequence[Lease], trouble: str) -> list[Lease]:
        """Give up what has run out; what is still to be renewed."""
        now = trio.current_time()
        for lease in leases:
            if lease.until <= now and self._is_held(lease):
                self._lose(lease, f"its lease ran out, and could not be renewed: {trouble}")
        return [lease for lease in leases if self._is_held(lease)]

    def _is_held(self, lease: Lease) -> bool:
        return self._held.get(lease.item.id) is lease

    def _lose(self, lease: Lease, why: str) -> None:
        del self._held[lease.item.id]
        self._lost(lease.item, why)
