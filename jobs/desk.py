"""Streams and select: a desk that hears of each letter that is filed, and sums up now and then."""

from __future__ import annotations

from typing import TypeVar

import trio

from supervisor import Context, write_atomic
from supervisor.concurrency import select
from supervisor.streams import Stream, watch_files

T = TypeVar("T")


async def keep(ctx: Context, archive: str, path: str, every: float = 5.0) -> None:
    """Count the letters that come into `archive`, and write the count into `path` every so many seconds, until a stop."""
    count = 0
    async with trio.open_nursery() as nursery:
        letters = _flow(nursery, watch_files(f"{archive}/*.gz"))
        ticks = _flow(nursery, Stream.interval(every))
        async with select(letters, ticks, ctx.wait_stopping) as ready:
            async for source, _ in ready:
                if source is letters:
                    count += 1
                elif source is ticks:
                    await write_atomic(path, f"{count} letters since this run began\n")
                else:
                    break
        nursery.cancel_scope.cancel(reason="asked to stop")


def _flow(nursery: trio.Nursery, stream: Stream[T]) -> trio.MemoryReceiveChannel[T]:
    """A channel through which the items of a stream come: nothing is read ahead of whoever takes them."""
    send, receive = trio.open_memory_channel[T](0)

    async def pour() -> None:
        async with send, stream.open() as items:
            async for item in items:
                await send.send(item)

    nursery.start_soon(pour)
    return receive
