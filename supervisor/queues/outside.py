"""Queues for programs that are no daemon: a web application that puts items, a script that waits for their results."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar, Unpack

import trio
from trio_util import AsyncValue

from supervisor.concurrency import race
from supervisor.concurrency.crew import raise_together
from supervisor.errors import QueueError
from supervisor.queues import QUEUES, Place, scheme_of, shown_backend
from supervisor.queues.producer import ManyOptions, Producer, PutOptions
from supervisor.queues.protocol import Engine, Notice, Receipt, Record, Settings
from supervisor.queues.spec import QueueSpec
from supervisor.wall import WallClock

T = TypeVar("T")

REFRESH = 30.0
"""Seconds for which settings that were read hold: what daemons have declared since is known after them, at the next put."""


def open_queue(url: str, name: str) -> Opening:
    """A queue that many hosts share, for a program that is no daemon: to put items and to wait for what becomes of them.

        async with open_queue("redis://localhost:6379/0", "images") as queue:     # Trio: a Producer
            await queue.put({"path": "cat.png"}, priority="high")

        with open_queue("postgresql://user@host/database", "images") as queue:    # anywhere else: a BlockingProducer
            queue.put({"path": "cat.png"}, priority="high")

    What the queue is like (`priorities`, `unique`, `size`, ...) it reads from what the daemons that handle it have declared;
    for one that no daemon has had yet it is as if its table were empty. Entering raises QueueUnavailable where the server does
    not answer. Raises ValueError for a queue that belongs to one daemon (memory, sqlite), and for a URL that is none of an
    engine; ImportError where the extra is not installed.
    """
    scheme = url.partition(":")[0]
    if scheme not in QUEUES or (QUEUES[scheme].shared and "://" not in url):
        raise ValueError(f"open_queue: expected the URL of an engine (postgresql://…, redis://…), got {shown_backend(url)!r}")
    if not QUEUES[scheme].shared:
        raise ValueError(
            f"open_queue: a queue in {scheme} belongs to its daemon alone: put items with `supervisor submit {name}`, or with "
            "supervisor.Client"
        )
    if missing := QUEUES[scheme].missing:
        raise ImportError(f"open_queue: {scheme} needs an extra: pip install '{missing}'")
    return Opening(url, name)


class Opening:
    """What `open_queue` gives: enter it with `async with` under Trio, and with `with` anywhere else. Once."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._opened = _open(url, name)
        self._blocking: BlockingProducer | None = None

    async def __aenter__(self) -> Producer:
        return await self._opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._opened.__aexit__(kind, error, trace)

    def __enter__(self) -> BlockingProducer:
        self._blocking = BlockingProducer(self._url, self._name)
        return self._blocking

    def __exit__(self, *_: object) -> None:
        if self._blocking is not None:
            self._blocking.close()


class _OutsideProducer(Producer):
    """A producer that goes by what daemons declare."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._fresh_until = -math.inf

    async def read_settings(self) -> None:
        """Have the settings that were declared last."""
        settings = await self._engine.declared()
        self._fresh_until = trio.current_time() + REFRESH
        if settings is not None and settings != self._engine.settings:
            self._engine.use(settings)

    async def _prepare(self) -> None:
        if trio.current_time() >= self._fresh_until:
            await self.read_settings()


@asynccontextmanager
async def _open(url: str, name: str) -> AsyncIterator[Producer]:
    """An exception of the block comes out by itself, whatever nurseries the engine has."""
    producer: _OutsideProducer | None = None

    def listen(notice: Notice) -> None:
        if producer is not None:
            producer.heard(notice)

    place = Place(directory=Path(), now=WallClock().now, listen=listen, warn=logging.getLogger("supervisor.queues").warning)
    errors: list[BaseException] = []
    try:
        async with scheme_of(url).open(name, Settings(spec=QueueSpec(backend=url)), place) as engine:
            producer = _OutsideProducer(engine)
            await producer.read_settings()
            yield producer
    except BaseExceptionGroup as group:
        errors += group.exceptions
    if errors:
        raise_together(errors)


class BlockingProducer:
    """A `Producer` that blocks, for programs without Trio: thread-safe, and one for the whole process is enough.

    The connection lives in a thread of its own. In a program with an event loop, call it from a thread
    (`asyncio.to_thread`). It does not survive a fork: open it in the process that uses it.
    """

    def __init__(self, url: str, name: str) -> None:
        self._name = name
        self._process = os.getpid()
        self._opened: Future[tuple[Producer, trio.lowlevel.TrioToken]] = Future()
        self._closing = trio.Event()
        self._under_way = AsyncValue(0)
        self._thread = threading.Thread(target=self._run, args=(url,), name=f"queue {name}", daemon=True)
        self._thread.start()
        self._producer, self._token = self._opened.result()

    def put(self, payload: Any, **options: Unpack[PutOptions]) -> Receipt:
        """See `Producer.put`."""
        return self._call(partial(self._producer.put, payload, **options))

    def put_many(
        self,
        payloads: Iterable[Any],
        *,
        ids: Sequence[str] | None = None,
        on_stored: Callable[[int], object] | None = None,
        **options: Unpack[ManyOptions],
    ) -> list[Receipt]:
        """See `Producer.put_many`. `on_stored` is called in the connection's thread, and must not block."""
        return self._call(partial(self._producer.put_many, list(payloads), ids=ids, on_stored=on_stored, **options))

    def wait(self, id: str, timeout: float | None = None) -> Record:
        """See `Producer.wait`."""
        return self._call(partial(self._producer.wait, id, timeout))

    def close(self) -> None:
        """Let go of the connection. Calls that are under way in other threads raise QueueError."""
        if self._process == os.getpid():
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._closing.set)
            self._thread.join()

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        if self._process != os.getpid():
            raise QueueError(f"queue {self._name} was opened before this process was forked: open it here")
        try:
            return trio.from_thread.run(self._until_closed, function, trio_token=self._token)
        except trio.RunFinishedError:
            raise QueueError(f"queue {self._name} is closed") from None

    async def _until_closed(self, function: Callable[[], Awaitable[T]]) -> T:
        self._under_way.value += 1
        try:
            return await race(function, self._closed)
        finally:
            self._under_way.value -= 1

    async def _closed(self) -> NoReturn:
        await self._closing.wait()
        raise QueueError(f"queue {self._name} was closed meanwhile")

    def _run(self, url: str) -> None:
        try:
            trio.run(self._serve, url)
        except Exception as error:
            if not self._opened.done():
                self._opened.set_exception(error)

    async def _serve(self, url: str) -> None:
        async with _open(url, self._name) as producer:
            self._opened.set_result((producer, trio.lowlevel.current_trio_token()))
            await self._closing.wait()
            await self._under_way.wait_value(0)
