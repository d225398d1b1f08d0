"""A memory queue that fails on command, and that others seem to share: what desks and pools are tested with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from supervisor.queues import Place, Scheme, memory
from supervisor.queues.protocol import Claimed, Draft, Ending, Item, QueueUnavailable, Settings

SCHEME = Scheme("tests.moody")


class Moody:
    """A memory queue. What is in `broken` fails, and what is in `stuck` waits; everything asked of it is in `asked`."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.shared = False
        self.broken: dict[str, str] = {}
        """By the operation, what there is to say."""
        self.stuck: dict[str, trio.Event] = {}
        """By the operation, until when it does not answer."""
        self.asked: list[tuple[float, str, Any]] = []
        self.taken: set[str] = set()
        """Items whose leases others have."""
        self.deaf = False
        """Whether the answer to the next `finish` is lost, though it is done."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def _asked(self, what: str, of: Any) -> None:
        self.asked.append((trio.current_time(), what, of))
        await trio.lowlevel.checkpoint()
        if what in self.stuck:
            await self.stuck[what].wait()
        if what in self.broken:
            raise QueueUnavailable(self.broken[what])

    def times(self, what: str) -> list[float]:
        """When this was asked of it."""
        return [at for at, each, _ in self.asked if each == what]

    async def claim(self, limit: int, *, owner: str, attempts: int, order: Sequence[int] = ()) -> Claimed:
        await self._asked("claim", (limit, tuple(order), attempts))
        return await self._queue.claim(limit, owner=owner, attempts=attempts, order=order)

    async def wait_for_work(self, demand: object = None) -> None:
        await self._asked("wait_for_work", None)
        await self._queue.wait_for_work()

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        await self._asked("finish", list(endings))
        deaf, self.deaf = self.deaf, False
        known = [ending for ending in endings if ending.id not in self.taken]
        stored = dict(zip([ending.id for ending in known], await self._queue.finish(known), strict=True))
        if deaf:
            raise QueueUnavailable("the answer was lost")
        return [stored.get(ending.id, False) for ending in endings]

    async def renew(self, items: Sequence[Item]) -> list[bool]:
        await self._asked("renew", [item.id for item in items])
        return [item.id not in self.taken for item in items]

    async def progress(self, item: Item, done: float, total: float | None) -> None:
        await self._asked("progress", (item.id, done, total))
        await self._queue.progress(item, done, total)

    async def declare(self, settings: Settings) -> None:
        await self._asked("declare", settings)
        await self._queue.declare(settings)

    async def put_all(self, *payloads: bytes, **keys: Any) -> list[str]:
        """Put these; their ids are counted."""
        first = self.put_so_far
        drafts = [Draft(id=f"i{first + at}", payload=payload, **keys) for at, payload in enumerate(payloads)]
        self.put_so_far += len(drafts)
        await self._queue.put(drafts)
        return [draft.id for draft in drafts]

    put_so_far = 1


@asynccontextmanager
async def open(name: str, settings: Settings, place: Place) -> AsyncIterator[Moody]:
    async with memory.open(name, settings, place) as queue:
        yield Moody(queue)
