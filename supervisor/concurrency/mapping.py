"""A function over many items, so many at a time."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Generic, Self, TypeVar

import trio
from outcome import Error

from supervisor.concurrency.crew import Arrivals, Outcome, captured, failures, open_crew

T = TypeVar("T")
R = TypeVar("R")


class _Place(Generic[R]):
    """Where the outcome of one item will be."""

    __slots__ = ("outcome",)

    def __init__(self) -> None:
        self.outcome: Outcome[R] | None = None


class Mapped(Generic[T, R]):
    """The async iterator of `map_concurrent`.

    Ordered, a place stands in `_places` from the start of its item, else from its end; the first one is next.
    """

    def __init__(
        self, nursery: trio.Nursery, function: Callable[[T], Awaitable[R]], items: Iterable[T], limit: float, ordered: bool
    ) -> None:
        self._nursery = nursery
        self._function = function
        self._items = iter(items)
        self._limit = limit
        self._ordered = ordered
        self._places: deque[_Place[R]] = deque()
        self._in_hand = 0  # pulled, and not handed over yet
        self._pulling = True
        self._arrivals = Arrivals(in_a_row=16)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        try:
            outcome = await self._arrivals.take(self._next)
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        try:
            return outcome.unwrap()
        except StopAsyncIteration as error:  # a failure like any other, and no end
            raise RuntimeError("what map_concurrent calls raised StopAsyncIteration") from error

    def _next(self) -> Outcome[R] | None:
        self._pull()
        if self._places and (outcome := self._places[0].outcome) is not None:
            self._places.popleft()
            self._in_hand -= 1
            self._pull()
            return outcome
        if not self._in_hand and not self._pulling:
            raise trio.EndOfChannel
        return None

    def _pull(self) -> None:
        """Start as many items as may be in hand."""
        while self._pulling and self._in_hand < self._limit:
            try:
                item = next(self._items)
            except StopIteration:
                self._pulling = False
            except Exception as error:
                self._fail(error)
            else:
                self._start(item)

    def _start(self, item: T) -> None:
        place: _Place[R] = _Place()
        self._in_hand += 1
        if self._ordered:
            self._places.append(place)
        self._nursery.start_soon(self._run, place, item, name=self._function)

    async def _run(self, place: _Place[R], item: T) -> None:
        place.outcome = await captured(self._function, item)
        if isinstance(place.outcome, Error):
            self._pulling = False
        if not self._ordered:
            self._places.append(place)
        self._announce()

    def _fail(self, error: Exception) -> None:
        """The source itself failed: that is what comes after the items it gave."""
        place: _Place[R] = _Place()
        place.outcome = Error(error)
        self._places.append(place)
        self._in_hand += 1
        self._pulling = False
        self._announce()

    def _announce(self) -> None:
        if self._places[0].outcome is not None:
            self._arrivals.announce()

    def unseen(self) -> list[Exception]:
        """Failures that were not handed over."""
        return failures(place.outcome for place in self._places)


class MappedAsync(Mapped[T, R]):
    """The same over an async source: a task of its own pulls, so that what is done need not wait for what is to come."""

    def __init__(
        self, nursery: trio.Nursery, function: Callable[[T], Awaitable[R]], items: AsyncIterable[T], limit: float, ordered: bool
    ) -> None:
        super().__init__(nursery, function, (), limit, ordered)
        self._room = trio.lowlevel.ParkingLot()
        nursery.start_soon(self._feed, items, name="what pulls the items of map_concurrent")

    def _pull(self) -> None:
        if self._room and self._in_hand < self._limit:
            self._room.unpark_all()

    async def _feed(self, items: AsyncIterable[T]) -> None:
        try:
            await self._start_all(aiter(items))
        except Exception as error:
            self._fail(error)
        self._pulling = False
        self._arrivals.announce()

    async def _start_all(self, items: AsyncIterator[T]) -> None:
        """Room first, then the item: what was pulled is started at once."""
        while self._pulling:
            if self._in_hand >= self._limit:
                await self._room.park()
                continue
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
            self._start(item)


@asynccontextmanager
async def map_concurrent(
    function: Callable[[T], Awaitable[R]], items: Iterable[T] | AsyncIterable[T], *, limit: float, ordered: bool = True
) -> AsyncIterator[Mapped[T, R]]:
    """Call `function` with each item, `limit` at a time (`math.inf`: all), and iterate over what they return.

        async with map_concurrent(fetch, urls, limit=10) as pages:
            async for page in pages:
                ...

    The order is that of the items, or, not `ordered`, that in which they are done. An item is pulled only when there is room,
    and what is done but was not taken yet fills its room: a slow reader slows the source.

    The first failure ends the pulling, and is raised where its value would have come, after those that stand before it.
    Leaving the block cancels what still runs; failures that nobody was handed come out of it. A generator that was given as
    `items` is closed with the block; whatever else (a channel) is left open, with the items that were not pulled in it.
    """
    if not limit >= 1:
        raise ValueError(f"limit is at least 1, or math.inf, not {limit!r}")
    mapped: Mapped[T, R] | None = None
    try:
        async with open_crew(lambda: mapped.unseen() if mapped else ()) as nursery:
            if isinstance(items, AsyncIterable):
                mapped = MappedAsync(nursery, function, items, limit, ordered)
            else:
                mapped = Mapped(nursery, function, items, limit, ordered)
            yield mapped
            nursery.cancel_scope.cancel(reason="the block of map_concurrent was left")
    finally:
        if inspect.isasyncgen(items):
            await items.aclose()
        elif inspect.isgenerator(items):
            items.close()
