"""A stream: where items come from, what is done to each on its way, and who takes them.

A `Stream` only says what is to be done; nothing happens before it is opened. Opening enters, from the source on, a context for
each stage; leaving closes them in the reverse order, at once. That is why items are iterated in a block: an async generator
that is left by `break` alone stays open until somebody collects the garbage.

Stages that need no task are async generators. `map` and `filter` do not even get one each: neighbours are one function.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, Literal, NoReturn, TypeGuard, TypeVar

import trio

from supervisor.spec import Rate
from supervisor.streams.beside import Opener, buffered, chunked, chunks, merged
from supervisor.streams.pace import LATE, interval, throttled, timed

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")

Source = Iterable[T] | AsyncIterable[T] | AbstractAsyncContextManager[AsyncIterable[T]]
"""What a stream can be made of. A context, such as a call of a `trio.as_safe_channel` function, is entered and left."""

Stage = Callable[[AsyncIterator[Any]], AbstractAsyncContextManager[AsyncIterator[Any]]]
Step = Callable[[Any], Any]
"""What neighbouring calls of `map` and `filter` do to an item; `_DROPPED` where it goes no further."""

TURN = 256
"""So many values that nobody had to wait for are given before other tasks have their turn."""

_DROPPED: Any = object()


class Stream(Generic[T_co]):
    """Items of `source`, lazily, one at a time: each is asked for when the one before it has been dealt with.

    Every method but the last four gives a new stream. `fold`, `collect` and `for_each` open it, take all items and close it;
    `open` gives the items to a block of your own. However that ends, by the last item, `break`, an exception or cancellation,
    the source is closed then. Of values a stream can be opened again and again; of an iterator, once.
    """

    __slots__ = ("_opener", "_stages", "_step")

    def __init__(self, source: Source[T_co]) -> None:
        if not any(hasattr(source, way) for way in ("__iter__", "__aiter__", "__aenter__")):
            raise TypeError(f"a stream is made of an iterable, an async iterable or a context of one, not of {source!r}")
        self._opener: Opener[Any] = _Values(source) if _is_plain(source) else partial(_of_source, source)
        self._stages: tuple[Stage, ...] = ()
        self._step: Step | None = None

    @classmethod
    def opened_by(cls, opener: Opener[T_co]) -> Stream[T_co]:
        """A stream whose source is what `opener()` gives when it is entered, anew at each opening."""
        return cls._made(opener, (), None)

    @classmethod
    def from_channel(cls, channel: trio.abc.ReceiveChannel[T_co]) -> Stream[T_co]:
        """What comes through a channel, until the senders have closed it. The end of the stream closes this end of it."""
        return cls(channel)

    @staticmethod
    def interval(period: float, *, late: Literal["skip", "burst", "delay"] = "skip") -> Stream[int]:
        """Number 0 at once, then number n `n * period` seconds after it: the error of one tick does not add to the next.

        A tick that the consumer was too busy for comes as soon as it is asked for. `late` is what becomes of the others that
        were due meanwhile: "skip", they are left out (a gap in the numbers), and the next comes in step; "burst", they follow
        at once; "delay", the next comes a whole period after the late one, and those behind it as much later.
        """
        if not period > 0:
            raise ValueError(f"the period of an interval is a number of seconds above 0, not {period!r}")
        if late not in LATE:
            raise ValueError(f"late ticks can be {', '.join(map(repr, LATE))}, not {late!r}")
        return Stream.opened_by(lambda: aclosing(interval(period, late)))

    # ---- item by item ----

    def map(self, fn: Callable[[T_co], U]) -> Stream[U]:
        """`fn(item)` for each item. Where `fn` is async: `then`, or `map` and `buffered`."""
        return self._made(self._opener, self._stages, _mapped(self._step, fn))

    def filter(self, keep: Callable[[T_co], object]) -> Stream[T_co]:
        """Only the items of which `keep(item)` is true."""
        return self._made(self._opener, self._stages, _filtered(self._step, keep))

    def then(self, fn: Callable[[T_co], Awaitable[U]]) -> Stream[U]:
        """`await fn(item)` for each item, one after another."""
        return self.through(_awaited, fn)

    def take(self, count: int) -> Stream[T_co]:
        """The first `count` items. No further one is asked for."""
        return self.through(_taken, _counted(count, "take", least=0))

    def skip(self, count: int) -> Stream[T_co]:
        """Without the first `count` items."""
        return self.through(_skipped, _counted(count, "skip", least=0))

    def through(self, fn: Callable[..., AsyncGenerator[U]], *args: object) -> Stream[U]:
        """A stage of your own: what the async generator `fn(items, *args)` yields. It is closed at the end of the stream."""
        return self._staged(lambda items: aclosing(fn(items, *args)))

    # ---- several at a time ----

    def chunks(self, size: int, within: float = math.inf) -> Stream[list[T_co]]:
        """Lists of `size` items; the last has what is left, also where it is left by an error, which comes after it.

        A chunk comes with fewer `within` seconds after its first item, or after it was asked for where that was later. An
        item that comes just then is the next chunk's first. Nothing is asked of the source while no chunk is.
        """
        size = _counted(size, "chunks")
        if within == math.inf:
            return self._staged(lambda items: aclosing(chunks(items.__anext__, size, within)))
        return self._staged(partial(chunked, size=size, within=_positive(within, "chunks within")))

    def buffered(self: Stream[Awaitable[U]], limit: int) -> Stream[U]:
        """The results of awaitables, up to `limit` of which run at a time, in the order of the stream.

        `.map(fetch).buffered(8)` runs eight calls of `async def fetch` ahead of the consumer. A result nobody has taken yet
        counts as one that runs. An error comes in its place, after the results before it; then the others are cancelled.
        """
        return self._staged(partial(buffered, limit=_counted(limit, "buffered"), ordered=True))

    def buffer_unordered(self: Stream[Awaitable[U]], limit: int) -> Stream[U]:
        """The same, but each result as soon as it is there; an error too."""
        return self._staged(partial(buffered, limit=_counted(limit, "buffer_unordered"), ordered=False))

    def merge(self, *others: Stream[U]) -> Stream[T_co | U]:
        """The items of this stream and of others as they come, until all have ended; the error of one ends all.

        None is preferred. Of each stream one item can be waiting for the consumer.
        """
        openers: list[Opener[T_co | U]] = [self.open, *(stream.open for stream in others)]
        return Stream.opened_by(partial(merged, openers))

    # ---- in time ----

    def throttle(self, rate: str | float) -> Stream[T_co]:
        """At most so many items a second, evenly: of `"100/s"` (`"30/m"`, or a number a second) one every 10 ms."""
        return self.through(throttled, 1 / Rate.parse(rate))

    def timeout(self, seconds: float) -> Stream[T_co]:
        """`trio.TooSlowError` when an item does not come within so many seconds after it was asked for."""
        return self.through(timed, _positive(seconds, "timeout"))

    # ---- to the end ----

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[T_co]]:
        """The items, to be iterated in this block by one task: `async with stream.open() as items: async for item in items`.

        Leaving the block closes the source and waits until all tasks of the stream have ended. What a stage had asked for
        ahead is dropped; an error that had come there, and was not asked for yet, is raised.
        """
        async with AsyncExitStack() as stack:
            opener, stages = self._settled()
            items = await stack.enter_async_context(opener())
            for stage in stages:
                items = await stack.enter_async_context(stage(items))
            yield items

    async def fold(self, initial: U, fn: Callable[[U, T_co], U]) -> U:
        """All items in one value: `fn(value, item)` for each, where the first value is `initial`."""
        value = initial
        async with self.open() as items:
            async for item in items:
                value = fn(value, item)
        return value

    async def collect(self) -> list[T_co]:
        """All items, in a list."""
        async with self.open() as items:
            return [item async for item in items]

    async def for_each(self, fn: Callable[[T_co], Awaitable[object]]) -> None:
        """`await fn(item)` for each item, one after another."""
        async with self.open() as items:
            async for item in items:
                await fn(item)

    def __aiter__(self) -> NoReturn:
        raise TypeError("a stream is iterated in a block: async with stream.open() as items: async for item in items")

    # ---- how it is made ----

    @classmethod
    def _made(cls, opener: Opener[Any], stages: tuple[Stage, ...], step: Step | None) -> Stream[Any]:
        stream = cls.__new__(cls)
        stream._opener, stream._stages, stream._step = opener, stages, step
        return stream

    def _staged(self, stage: Stage) -> Stream[Any]:
        opener, stages = self._settled()
        return self._made(opener, (*stages, stage), None)

    def _settled(self) -> tuple[Opener[Any], tuple[Stage, ...]]:
        """The source and the stages, with what `map` and `filter` do among them."""
        step = self._step
        if step is None:
            return self._opener, self._stages
        if isinstance(self._opener, _Values) and not self._stages:
            return _Values(self._opener.source, step), ()
        return self._opener, (*self._stages, lambda items: aclosing(_stepped(items, step)))


# ---- the source ----


@asynccontextmanager
async def _of_source(source: Any) -> AsyncGenerator[AsyncIterator[Any]]:
    """The items of what is asynchronous, closed at the end where that can be closed."""
    if hasattr(source, "__enter__") and hasattr(source, "__aiter__"):  # a channel: its `close()` never waits
        with source:
            yield aiter(source)
    elif hasattr(source, "__aenter__"):
        async with source as items:
            yield aiter(items)
    else:
        async with AsyncExitStack() as stack:
            items = aiter(source)
            if hasattr(items, "aclose"):
                stack.push_async_callback(items.aclose)
            yield items


def _is_plain(source: object) -> TypeGuard[Iterable[Any]]:
    return not hasattr(source, "__aiter__") and not hasattr(source, "__aenter__")


class _Values:
    """Opens values that are there: what is done to each is done where it is taken, which saves a generator."""

    def __init__(self, source: Iterable[Any], step: Step | None = None) -> None:
        self.source = source
        self._step = step

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[AsyncIterator[Any]]:
        with _closed(iter(self.source)) as values:
            async with aclosing(_given(values, self._step)) as items:
                yield items


@contextmanager
def _closed(values: Iterator[T]) -> Generator[Iterator[T]]:
    try:
        yield values
    finally:
        if hasattr(values, "close"):
            values.close()


async def _given(values: Iterator[Any], step: Step | None) -> AsyncGenerator[Any]:
    await trio.lowlevel.checkpoint()
    for first in values:
        for value in chain((first,), islice(values, TURN - 1)):
            item = value if step is None else step(value)
            if item is not _DROPPED:
                yield item
        await trio.lowlevel.checkpoint()


# ---- stages ----


def _mapped(step: Step | None, fn: Step) -> Step:
    if step is None:
        return fn

    def mapped(item: Any) -> Any:
        item = step(item)
        return item if item is _DROPPED else fn(item)

    return mapped


def _filtered(step: Step | None, keep: Step) -> Step:
    if step is None:
        return lambda item: item if keep(item) else _DROPPED

    def filtered(item: Any) -> Any:
        item = step(item)
        return item if item is not _DROPPED and keep(item) else _DROPPED

    return filtered


async def _stepped(items: AsyncIterator[Any], step: Step) -> AsyncGenerator[Any]:
    async for item in items:
        item = step(item)
        if item is not _DROPPED:
            yield item


async def _awaited(items: AsyncIterator[Any], fn: Callable[[Any], Awaitable[Any]]) -> AsyncGenerator[Any]:
    async for item in items:
        yield await fn(item)


async def _taken(items: AsyncIterator[Any], count: int) -> AsyncGenerator[Any]:
    for _ in range(count):
        try:
            item = await anext(items)
        except StopAsyncIteration:
            return
        yield item


async def _skipped(items: AsyncIterator[Any], count: int) -> AsyncGenerator[Any]:
    async for item in items:
        if count:
            count -= 1
        else:
            yield item


def _counted(count: int, what: str, least: int = 1) -> int:
    if not isinstance(count, int) or count < least:
        raise ValueError(f"{what}: expected a whole number of at least {least}, got {count!r}")
    return count


def _positive(seconds: float, what: str) -> float:
    if not seconds > 0:
        raise ValueError(f"{what}: expected a number of seconds above 0, got {seconds!r}")
    return seconds
