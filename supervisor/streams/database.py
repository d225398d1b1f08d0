"""Rows of a database as a source."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import trio

from supervisor.streams.beside import unwrapped
from supervisor.streams.stream import Stream

T = TypeVar("T")

AGAIN = 0.05
"""Seconds after which a query that is still there is interrupted again."""


class Connection(Protocol):
    """What is needed of a DB-API connection: cursors with `execute`, `fetchmany` and `close`.

    Where it has `interrupt()` too, a query can be cancelled.
    """

    def cursor(self) -> Any: ...


def rows(
    connection: Connection,
    query: str,
    parameters: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    batch: int = 1000,
) -> Stream[Any]:
    """The rows of a query, fetched `batch` at a time in a thread, so that a result of any size needs the memory of one batch.

    Between batches nobody uses the connection, and the block may. It must be usable in several threads, one after another
    (`sqlite3.connect(path, check_same_thread=False)`), and its driver must not fetch everything by itself (psycopg: give a
    connection whose cursors are on the server). It stays open; the cursor is closed at the end. Cancelled, the query is
    interrupted where the connection has `interrupt()`; the thread is waited for in any case.
    """
    if batch < 1:
        raise ValueError(f"rows: expected a batch of at least 1, got {batch!r}")
    return Stream.opened_by(partial(_selected, connection, query, () if parameters is None else (parameters,), batch))


@asynccontextmanager
async def _selected(
    connection: Connection, query: str, parameters: tuple[Any, ...], batch: int
) -> AsyncGenerator[AsyncIterator[Any]]:
    thread = _Thread(getattr(connection, "interrupt", None))
    with trio.CancelScope(shield=True):
        cursor = await thread.run(connection.cursor)
    try:
        await thread.run(partial(cursor.execute, query, *parameters))
        async with aclosing(_fetched(thread, partial(cursor.fetchmany, batch))) as found:
            yield found
    finally:
        with trio.CancelScope(shield=True):
            await thread.run(cursor.close)


async def _fetched(thread: _Thread, fetch: Callable[[], Sequence[Any]]) -> AsyncGenerator[Any]:
    while found := await thread.run(fetch):
        for row in found:
            yield row


class _Thread:
    """Runs one call after another in threads, outside of the number that others may use."""

    def __init__(self, interrupt: Callable[[], object] | None) -> None:
        self._interrupt = interrupt
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, call: Callable[[], T]) -> T:
        """What it returns. Cancelled, it is interrupted; this returns when it has ended, not before."""
        await trio.lowlevel.checkpoint_if_cancelled()
        ended, interrupted = trio.Event(), trio.Event()
        with unwrapped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_after, ended, interrupted)
                try:
                    with trio.CancelScope(shield=True):
                        result = await trio.to_thread.run_sync(call, limiter=self._limiter)
                except Exception:
                    if not interrupted.is_set():
                        raise  # else it is the cancellation that comes out, of the task beside this
                finally:
                    ended.set()
        return result

    async def _look_after(self, ended: trio.Event, interrupted: trio.Event) -> None:
        try:
            await ended.wait()
        finally:
            with trio.CancelScope(shield=True):
                while self._interrupt and not ended.is_set():
                    interrupted.set()
                    self._interrupt()
                    with trio.move_on_after(AGAIN):  # a query that was just about to begin has not felt it
                        await ended.wait()
