"""Where what a job gives goes: each value that its function returns or yields is one item of the queue that `into` names."""

from __future__ import annotations

import inspect
import math
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio

from supervisor.errors import BadItem, QueueFull, QueueUnavailable, RunFailed
from supervisor.output.lines import Lines
from supervisor.queues.protocol import derived_id, new_id
from supervisor.restart import NEVER_READY, Delays
from supervisor.spec import Backoff, Seconds
from supervisor.streams.stream import Stream

if TYPE_CHECKING:
    from supervisor.kinds.context import Run
    from supervisor.queues.producer import Producer
    from supervisor.queues.protocol import Receipt

UNSAID = 1.0
"""Seconds of a wait for room that nobody needs to be told of."""

CHUNK = 64 << 10

LONGEST_LINE = 64 << 20
"""Bytes of a line of output that is one item."""

AWAY = Backoff(initial=Seconds(0.2), factor=2, max=Seconds(5), jitter=0.2)
"""How an engine that does not answer is tried again."""


class Chain:
    """The way of one run, or of one call with an item, into a queue. Belongs to the Trio thread.

    What is put stays put, whatever becomes of the run. Of an item that is handled again, a value that comes at the same place
    and is the same has the same id: it is stored once. A queue that is full, or does not answer, makes the run wait, for as
    long as it takes, and that is said; only a cancellation ends it.
    """

    def __init__(
        self,
        queue: str,
        producer: Producer,
        run: Run,
        spread: Callable[[float, float], float] = random.uniform,
        parent: str | None = None,
    ) -> None:
        self._queue = queue
        self._producer = producer
        self._run = run
        self._spread = spread
        self._parent = parent
        self._given = 0
        self._log = structlog.get_logger("job").bind(job=run.job, run=run.id)

    def of(self, call: Run, item: str) -> Chain:
        """The way of a call with that item."""
        return Chain(self._queue, self._producer, call, self._spread, item)

    async def given(self, made: Any) -> Any:
        """What an `async def` returns. Of an async generator, or of a `Stream`, each item is put as it comes."""
        if inspect.isawaitable(made):
            made = await made
        if isinstance(made, Stream):
            async with made.open() as items:
                async for item in items:
                    await self.put(item)
            return None
        if inspect.isasyncgen(made):
            return await emptied(made, self.put)
        return made

    async def put(self, value: Any) -> None:
        """Put one item; of None, nothing. Returns when it is stored. Raises RunFailed for what is none."""
        if value is not None:
            self._given += 1
            await self._put([value], [self._id(str(self._given), value)])

    async def put_result(self, result: bytes) -> None:
        """Put what a function returned, as JSON."""
        value = msgspec.json.decode(result)
        await self._put([value], [self._id("returned", value)])

    async def put_lines(self, pipe: int) -> None:
        """Put each line that comes through a pipe, until nobody has its other end any more; then close it.

        A line of JSON is that value, any other a string, and an empty one nothing. Raises RunFailed for one that is too long.
        """
        lines, left = Lines(LONGEST_LINE), list[Any]()
        try:
            os.set_blocking(pipe, False)
            while True:
                await trio.lowlevel.wait_readable(pipe)
                data = os.read(pipe, CHUNK)
                for line in lines.feed(data) if data else lines.flush():
                    if (value := _value(line)) is not None:
                        left.append(value)
                if left:
                    await self._put(left, [new_id() for _ in left])
                if not data:
                    return
        except trio.Cancelled:
            if lost := len(left) + len(list(lines.flush())):
                self._log.warning("killed before all that it printed was put", queue=self._queue, lines=lost)
            raise
        finally:
            os.close(pipe)

    def _id(self, place: str, value: Any) -> str:
        return new_id() if self._parent is None else derived_id(self._parent, place, _encoded(value))

    async def _put(self, values: list[Any], ids: list[str]) -> None:
        try:
            receipts = await put_patiently(self._producer, self._queue, values, ids, self._run.waits_for_room, self._spread)
        except BadItem as error:
            raise RunFailed(f"queue {self._queue} does not take what it gives: {error}") from None
        for receipt in receipts:
            if receipt.what == "rejected":
                self._log.info("not put: its key is taken", queue=self._queue, by=receipt.id)


async def put_patiently(
    producer: Producer,
    queue: str,
    values: list[Any],
    ids: list[str],
    tell: Callable[[str, str | None], object],
    spread: Callable[[float, float], float],
    **options: Any,
) -> list[Receipt]:
    """Put items, however long that takes, and give the receipts of those put last. What is stored is taken out of the lists.

    `tell(queue, why)` hears what it waits for, and None when it goes on. Raises BadItem, with nothing stored.
    """
    delays, told = Delays(spread), ""
    while True:
        stored = 0

        def count(number: int) -> None:
            nonlocal stored
            stored = number

        try:
            patience = math.inf if told else UNSAID
            receipts = await producer.put_many(values, ids=ids, on_stored=count, timeout=patience, **options)
        except (QueueFull, QueueUnavailable) as error:
            why = f"waits for room in queue {queue}" if isinstance(error, QueueFull) else f"waits for queue {queue}: {error}"
            if why != told:
                tell(queue, told := why)
            if isinstance(error, QueueUnavailable):
                await trio.sleep(delays.after_failure(AWAY, NEVER_READY))
        else:
            if told:
                tell(queue, None)
            return receipts
        finally:
            del values[:stored], ids[:stored]


async def emptied(items: Any, put: Callable[[Any], Awaitable[object]]) -> None:
    """Have each item of an async generator put, as it comes. It is closed at the end, whatever that is."""
    async with aclosing(items):
        async for item in items:
            await put(item)


def _value(line: bytes) -> Any:
    """What a line of output says."""
    if len(line) >= LONGEST_LINE:
        raise RunFailed(f"a line of its output is longer than {LONGEST_LINE >> 20} MB")
    try:
        return msgspec.json.decode(line) if line.strip() else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return line.decode(errors="replace")


def _encoded(value: Any) -> bytes:
    """What tells a value from others; what is no JSON, the producer will refuse."""
    try:
        return msgspec.json.encode(value, order="deterministic")
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return b""
