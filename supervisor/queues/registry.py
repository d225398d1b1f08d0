"""All queues of a tree, by name: each with its engine, a desk for the workers, and a producer. Opened before the jobs, and
closed after them.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from msgspec.structs import replace

from supervisor import events
from supervisor.errors import QueueError
from supervisor.queues import Place, scheme_of
from supervisor.state import QueueTally

if TYPE_CHECKING:
    from supervisor.queues.desk import Desk
    from supervisor.queues.producer import Producer
    from supervisor.queues.protocol import Engine, Notice, Settings

FLUSH = 5.0
"""Seconds at the end in which what is known of items is stored, where nobody says otherwise."""


class OpenQueue:
    """One queue that is open, or about to be."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.engine: Engine
        self.desk: Desk
        self.producer: Producer | None = None
        """Made when it is first asked for."""
        self.there = trio.Event()
        """Set when it is open, or cannot be."""
        self.fault = ""
        """Why it cannot be opened."""
        self.changed = trio.Event()
        """Set when its settings are to be declared."""
        self.dropped = trio.Event()
        """Set when no configuration names it any more."""
        self.closed = trio.Event()

    def change(self, settings: Settings) -> None:
        """Have these settings; what keeps it stays what it was opened with."""
        spec = replace(settings.spec, backend=self.settings.spec.backend)
        settings = replace(settings, spec=spec)
        if settings != self.settings:
            self.settings = settings
            self.changed.set()

    def heard(self, notice: Notice) -> None:
        """The engine has something to say."""
        if self.there.is_set() and not self.fault:
            self.desk.heard(notice)
            if self.producer is not None:
                self.producer.heard(notice)


class Queues:
    """All queues of a tree. LookupError for a name that there is not."""

    def __init__(
        self,
        nursery: trio.Nursery,
        directory: Path,
        owner: str,
        journal: events.Journal,
        now: Callable[[], float],
        spread: Callable[[float, float], float],
    ) -> None:
        self._nursery = nursery
        self._directory = directory
        self._owner = owner
        self._journal = journal
        self._now = now
        self._spread = spread
        self._queues: dict[str, OpenQueue] = {}
        self._dropped: dict[str, OpenQueue] = {}
        """Those that may still be open: one of the same name has to wait for that."""
        self._until: float | None = None
        self.check: Callable[[str, Sequence[bytes]], Awaitable[None]] | None = None
        """Asks those who handle a queue whether they take items: see `Producer`. None where nobody does."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are, in the order of the file."""
        return tuple(self._queues)

    def engine(self, name: str) -> Engine:
        """The engine of a queue."""
        return self._open(name).engine

    def desk(self, name: str) -> Desk:
        """Where the workers of a queue get their items."""
        return self._open(name).desk

    def producer(self, name: str) -> Producer:
        """Where items are put."""
        queue = self._open(name)
        if queue.producer is None:
            from supervisor.queues.producer import Producer  # loaded only where somebody puts something

            queue.producer = Producer(queue.engine, partial(self._check, name))
        return queue.producer

    async def _check(self, queue: str, items: Sequence[bytes]) -> None:
        if self.check is not None:
            await self.check(queue, items)

    def tallies(self) -> list[QueueTally]:
        """What became of items here, in numbers."""
        opened = [queue.desk for queue in self._queues.values() if queue.there.is_set() and not queue.fault]
        return [
            QueueTally(
                queue=desk.name,
                degraded=bool(desk.trouble),
                jobs={job: tally.as_dict() for job, tally in desk.tallies.items()},
            )
            for desk in opened
        ]

    def _open(self, name: str) -> OpenQueue:
        if name not in self._queues:
            raise LookupError(f"no queue {name!r}", self.names)
        queue = self._queues[name]
        if queue.fault or not queue.there.is_set():
            raise QueueError(queue.fault or f"queue {name} is not open yet")
        return queue

    async def wait_for(self, name: str) -> Desk:
        """The desk of a queue, once it is open. Raises QueueError where it cannot be: an engine that is not installed."""
        if name in self._queues:
            await self._queues[name].there.wait()
        return self.desk(name)

    def apply(self, queues: Mapping[str, Settings]) -> None:
        """Have these, with these settings: at once, and what it sets going goes on by itself."""
        for name, queue in list(self._queues.items()):
            if name not in queues:
                self._dropped[name] = self._queues.pop(name)
                queue.dropped.set()
        for name, settings in queues.items():
            if name not in self._queues:
                queue = self._queues[name] = OpenQueue(name, settings)
                self._nursery.start_soon(self._keep, queue, self._dropped.get(name), name=f"queue {name}")
            else:
                self._queues[name].change(settings)

    def forget(self, job: str) -> None:
        """A job, or a worker of one, is no more: one of that name may come again, and is not paused then."""
        for queue in self._queues.values():
            if queue.there.is_set() and not queue.fault:
                queue.desk.resume(job)

    def end_by(self, until: float) -> None:
        """Take no longer than until this moment, of Trio's clock, for what is still to be stored at the end."""
        self._until = until

    def _patience(self) -> float:
        return trio.current_time() + FLUSH if self._until is None else max(self._until, trio.current_time() + 0.1)

    async def opened(self) -> None:
        """Wait until all that are named are open."""
        for queue in list(self._queues.values()):
            await queue.there.wait()

    async def _keep(self, queue: OpenQueue, before: OpenQueue | None) -> None:
        """Have a queue open until it is dropped, and what was taken from it has ended."""
        if before is not None:
            await before.closed.wait()
        try:
            await self._keep_open(queue)
        finally:
            queue.closed.set()

    async def _keep_open(self, queue: OpenQueue) -> None:
        from supervisor.queues.desk import open_desk  # loaded only where there are queues

        backend = queue.settings.spec.backend
        try:
            engine = scheme_of(backend).open
        except ImportError as error:
            self._cannot(queue, f"its engine, {backend.partition(':')[0]}, cannot be loaded: {error}")
            return
        place = Place(directory=self._directory, now=self._now, listen=queue.heard, warn=self._warn)
        async with AsyncExitStack() as opened:
            try:
                queue.engine = await opened.enter_async_context(engine(queue.name, queue.settings, place))
            except QueueError as error:  # what no waiting mends: an address that is none
                self._cannot(queue, str(error))
                return
            desk = open_desk(queue.engine, self._owner, self._journal, self._now, self._spread, self._patience)
            queue.desk = await opened.enter_async_context(desk)
            queue.there.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._declare, queue)
                await queue.dropped.wait()
                nursery.cancel_scope.cancel(reason="the queue is closed")

    def _cannot(self, queue: OpenQueue, why: str) -> None:
        """It cannot be opened, and who wants something of it hears why."""
        queue.fault = f"queue {queue.name}: {why}"
        self._warn(queue.fault)
        queue.there.set()

    async def _declare(self, queue: OpenQueue) -> None:
        """Tell others who share the queue what is true of it, now and whenever it changes."""
        while True:
            queue.changed = trio.Event()
            await queue.desk.declare(queue.settings)
            await queue.changed.wait()

    def _warn(self, text: str) -> None:
        self._journal.emit(events.Warned, text=text)

    def close(self) -> None:
        """Have all of them close, once they have nothing to do any more."""
        self.apply({})


@asynccontextmanager
async def open_queues(
    queues: Mapping[str, Settings],
    *,
    directory: Path,
    owner: str,
    journal: events.Journal,
    now: Callable[[], float],
    spread: Callable[[float, float], float] = random.uniform,
) -> AsyncIterator[Queues]:
    """Open all of these, for as long as the block lasts. A server that is away is no error: it is waited for.

    `owner` is what others see of this daemon beside the items that it has; `now` is the wall clock.
    """
    async with trio.open_nursery() as nursery:
        registry = Queues(nursery, directory, owner, journal, now, spread)
        registry.apply(queues)
        await registry.opened()
        yield registry
        registry.close()


__all__ = ["OpenQueue", "Queues", "open_queues"]
