"""Stages whose source runs beside the consumer, in tasks that live as long as the stream is open.

A task must not outlive the block that waits for it, and an async generator must not yield inside a nursery. So a stage here is
a context: the nursery is round the consumer's block, a *pump* in it sends items through a channel, and what the consumer
iterates is the other end of that. An error of the pump does not cancel the consumer in the middle of an item; it comes, like
any error of a stream, in the place of the next.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeVar

import trio

T = TypeVar("T")

Opener = Callable[[], AbstractAsyncContextManager[AsyncIterator[T]]]
"""Opens a stream for as long as the context lasts, and gives its items."""

Pump = Callable[[trio.MemorySendChannel[T]], Awaitable[None]]


class Feed(AsyncIterator[T]):
    """The consumer's end: what the pump has sent, then its error. A cancelled wait for an item loses none."""

    def __init__(self, receive: trio.MemoryReceiveChannel[T]) -> None:
        self._receive = receive
        self.error: Exception | None = None
        """Why the pump has ended, until somebody is told."""

    async def __anext__(self) -> T:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            pass
        error, self.error = self.error, None
        raise error or StopAsyncIteration


@asynccontextmanager
async def beside(pump: Pump[T], room: int) -> AsyncGenerator[Feed[T]]:
    """What `pump(send)` sends, until it returns; `room` items of it may wait for the consumer. The end cancels it.

    What fails comes out as it is; several failures, of the block and of the pump, in a group.
    """
    send, receive = trio.open_memory_channel[T](room)
    feed = Feed(receive)
    with unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run, pump, send, feed)
            try:
                yield feed
            finally:
                nursery.cancel_scope.cancel(reason="the stream is left")


async def _run(pump: Pump[T], send: trio.MemorySendChannel[T], feed: Feed[T]) -> None:
    try:
        with send:
            await pump(send)
        return
    except Exception as error:
        feed.error = error
    try:
        await trio.sleep_forever()
    finally:  # the stream is left, and nobody was told
        if feed.error is not None:
            raise feed.error


@contextmanager
def unwrapped() -> Generator[None]:
    """Take the only error out of the group in which a nursery puts it."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [error for error in group.exceptions if not isinstance(error, trio.Cancelled)] or group.exceptions[:1]
        if len(errors) > 1:
            raise
        context = errors[0].__context__
        try:
            raise errors[0]
        finally:
            errors[0].__context__ = context
            del errors, context, group  # no cycles through this frame


# ---- buffered ----


@asynccontextmanager
async def buffered(items: AsyncIterator[Awaitable[T]], limit: int, ordered: bool) -> AsyncGenerator[AsyncIterator[T]]:
    """Results of up to `limit` awaitables at a time, in their order or as they come."""
    slots = trio.Semaphore(limit)

    async def pump(send: trio.MemorySendChannel[T]) -> None:
        turn = trio.Event()
        turn.set()
        with unwrapped():
            async with trio.open_nursery() as nursery:
                await slots.acquire()
                try:
                    async for each in items:
                        following = trio.Event()
                        nursery.start_soon(_work, each, send, turn, following)
                        turn = following if ordered else turn
                        await slots.acquire()
                except Exception as error:
                    await _fail(error, turn)

    async with beside(pump, limit) as feed, aclosing(_released(feed, slots)) as results:
        yield results


async def _work(awaitable: Awaitable[T], send: trio.MemorySendChannel[T], turn: trio.Event, following: trio.Event) -> None:
    try:
        result = await awaitable
    except Exception as error:
        await _fail(error, turn)
    await turn.wait()
    send.send_nowait(result)  # there is room: it has a slot
    following.set()


async def _fail(error: Exception, turn: trio.Event) -> NoReturn:
    """Raise it when it is its turn, or when others make an end before."""
    try:
        await turn.wait()
    finally:
        raise error


async def _released(results: AsyncIterator[T], slots: trio.Semaphore) -> AsyncGenerator[T]:
    async for result in results:
        slots.release()
        yield result


# ---- chunks ----


@asynccontextmanager
async def chunked(items: AsyncIterator[T], size: int, within: float) -> AsyncGenerator[AsyncIterator[list[T]]]:
    """Chunks that are not waited for longer than `within`.

    An async generator that is cancelled is over, so the source cannot be asked under a deadline: the pump asks it, once for
    each item that was asked for here.
    """
    asked = trio.Semaphore(0, max_value=1)

    async def pump(send: trio.MemorySendChannel[T]) -> None:
        await asked.acquire()
        async for item in items:
            send.send_nowait(item)
            await asked.acquire()

    async with beside(pump, 1) as feed, aclosing(chunks(_Taker(feed, asked), size, within)) as found:
        yield found


class _Taker:
    """Asks for an item and waits for it; a wait that is cancelled is gone on with by the next."""

    def __init__(self, feed: Feed[Any], asked: trio.Semaphore) -> None:
        self._feed = feed
        self._asked = asked
        self._waiting = False

    async def __call__(self) -> Any:
        if not self._waiting:
            self._waiting = True
            self._asked.release()
        item = await anext(self._feed)
        self._waiting = False
        return item


async def chunks(take: Callable[[], Awaitable[T]], size: int, within: float) -> AsyncGenerator[list[T]]:
    """Lists of `size` items, or fewer where the time is over or the source; its error comes after what came before it."""
    end: Exception | None = None
    while end is None:
        chunk: list[T] = []
        try:
            chunk.append(await take())
            with trio.move_on_after(within):
                while len(chunk) < size:
                    chunk.append(await take())
        except Exception as error:
            end = error
        if chunk:
            yield chunk
    if not isinstance(end, StopAsyncIteration):
        raise end


# ---- merge ----


@asynccontextmanager
async def merged(openers: Sequence[Opener[T]]) -> AsyncGenerator[AsyncIterator[T]]:
    """The items of several streams as they come. Each is opened, and closed at its end, in a task of its own."""

    async def pump(send: trio.MemorySendChannel[T]) -> None:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                for opener in openers:
                    nursery.start_soon(_pour, opener, send)

    async with beside(pump, 0) as feed:
        yield feed


async def _pour(opener: Opener[T], send: trio.MemorySendChannel[T]) -> None:
    async with opener() as items:
        async for item in items:
            await send.send(item)
