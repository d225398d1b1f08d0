"""The one stream of events: who writes it, who reads it, and the table that it folds into."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import trio

from supervisor.errors import InternalError
from supervisor.events.event import ChildEvent, Event
from supervisor.events.lifecycle import Added, Removed, Renamed
from supervisor.events.timestamps import wall_now
from supervisor.state import JobStatus


def fold(events: Iterable[Event]) -> dict[str, JobStatus]:
    """The table that these events, from the first one on, amount to."""
    table: dict[str, JobStatus] = {}
    for event in events:
        apply(table, event)
    return table


def apply(table: dict[str, JobStatus], event: Event) -> None:
    """One step of the fold, in place."""
    if isinstance(event, Added):
        table[event.name] = event.first()
    elif isinstance(event, Removed):
        del table[event.name]
    elif isinstance(event, Renamed):
        table[event.to] = event.apply(table.pop(event.name))
    elif isinstance(event, ChildEvent):
        table[event.name] = event.apply(table[event.name])


class Lagged(msgspec.Struct, frozen=True, tag_field="event", tag="lagged"):
    """A subscriber was too slow: this many events were not delivered. Take a snapshot and go on."""

    count: int


E = TypeVar("E", bound=Event)
Sink = Callable[[Event], None]


class Journal:
    """The one stream of events, and the table it folds into.

    `now` gives the wall time for the `at` of events. `ring` is how many past events `since` can reach back to.
    """

    def __init__(self, now: Callable[[], str] = wall_now, ring: int = 4096) -> None:
        self.table: dict[str, JobStatus] = {}
        self.seq = 0
        self._now = now
        self._ring: deque[Event] = deque(maxlen=ring)
        self._sinks: list[Sink] = []
        self._subscriptions: set[Subscription] = set()
        self._ended = False

    def emit(self, kind: type[E], /, **fields: Any) -> E:
        """Record that something happened, and tell everyone. Synchronous; never blocks.

        A sink that raises is our own fault, not the job's: it comes out as an InternalError, and ends us loudly.
        """
        event = kind(seq=self.seq + 1, at=self._now(), **fields)
        apply(self.table, event)
        self.seq = event.seq
        self._ring.append(event)
        for sink in self._sinks:
            _feed(sink, event)
        for subscription in self._subscriptions:
            subscription.put(event)
        return event

    def add_sink(self, sink: Sink) -> None:
        """Call `sink` with every event from now on. It must not block and must not raise."""
        self._sinks.append(sink)

    def end(self) -> None:
        """There will be no more events: each subscription ends after those it still has."""
        self._ended = True
        for subscription in self._subscriptions:
            subscription.end()

    def arrange(self, names: Iterable[str]) -> None:
        """Have the rows of the table in this order, from now on."""
        for name in names:
            self.table[name] = self.table.pop(name)

    def past(self, since: int) -> tuple[int, list[Event]]:
        """The events after `since` that the ring still holds, and how many older ones it has lost."""
        kept = [event for event in self._ring if event.seq > since]
        first = kept[0].seq if kept else self.seq + 1
        return max(0, first - since - 1), kept

    @contextmanager
    def subscribe(self, size: int = 1024) -> Iterator[Subscription]:
        """Events from here on, at most `size` of them waiting. Read `table` first: no event falls between."""
        subscription = Subscription(size)
        self._subscriptions.add(subscription)
        if self._ended:
            subscription.end()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)


def _feed(sink: Sink, event: Event) -> None:
    try:
        sink(event)
    except Exception as error:
        raise InternalError(f"a sink raised on event {event.seq}") from error


class Subscription:
    """An async iterator over events that never makes the journal wait: a reader that lags is told by how much."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: deque[Event] = deque()
        self._lost = 0
        self._ended = False
        self._kick = trio.Event()

    def end(self) -> None:
        """There is nothing more to come."""
        self._ended = True
        self._kick.set()

    def put(self, event: Event) -> None:
        """Queue one event; count it as lost while the reader has a loss to hear of, so that the order stays true."""
        if self._lost or len(self._waiting) >= self._size:
            self._lost += 1
        else:
            self._waiting.append(event)
        self._kick.set()

    def __aiter__(self) -> AsyncIterator[Event | Lagged]:
        return self

    async def __anext__(self) -> Event | Lagged:
        """The next event, or `Lagged`; the end comes with the tree's. Cancelled while waiting: nothing is lost."""
        await trio.lowlevel.checkpoint()
        while not self._waiting and not self._lost:
            if self._ended:
                raise StopAsyncIteration
            self._kick = trio.Event()
            await self._kick.wait()
        return self.take()

    def take(self) -> Event | Lagged:
        """The next one without waiting; only call it when there is one."""
        if self._waiting:
            return self._waiting.popleft()
        count, self._lost = self._lost, 0
        return Lagged(count)
