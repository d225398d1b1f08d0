"""Other task queues, each as its documentation has it used: many jobs put in its best way, one process of workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

AT_ONCE = 50
"""Jobs that are put at once, where they can be."""

Note = Callable[[], None]


class Peer(Protocol):
    """A queue of somebody else: its `note` is called by each job."""

    def __init__(self, url: str, note: Note, workers: int) -> None: ...

    async def open(self) -> None:
        """Connect; make what there must be on the server."""

    async def put(self, items: Sequence[int]) -> None:
        """Put a job for each."""

    def working(self) -> AbstractAsyncContextManager[None]:
        """Have workers in this process, until the block ends."""


def lots(items: Sequence[int]) -> Iterator[Sequence[int]]:
    """Some at a time."""
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]


@asynccontextmanager
async def running(work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """Have it run until the block ends."""
    task = asyncio.create_task(work)
    yield
    task.cancel()


def asynchronous(note: Note) -> Callable[..., Awaitable[None]]:
    """What the async ones call."""

    async def nothing(*_: Any, **__: Any) -> None:
        note()

    nothing.__qualname__ = nothing.__name__
    return nothing


class Arq:
    """arq."""

    def __init__(self, url: str, note: Note, workers: int) -> None:
        self._url, self._function, self._workers = url, asynchronous(note), workers

    async def open(self) -> None:
        arq = import_module("arq")
        self._settings = import_module("arq.connections").RedisSettings.from_dsn(self._url)
        self._pool = await arq.create_pool(self._settings)

    async def put(self, items: Sequence[int]) -> None:
        for lot in lots(items):
            await asyncio.gather(*(self._pool.enqueue_job("nothing", item) for item in lot))

    def working(self) -> AbstractAsyncContextManager[None]:
        worker = import_module("arq.worker").Worker(
            [self._function], redis_settings=self._settings, max_jobs=self._workers, handle_signals=False
        )
        return running(worker.async_run())


class Saq:
    """SAQ."""

    def __init__(self, url: str, note: Note, workers: int) -> None:
        self._url, self._function, self._workers = url, asynchronous(note), workers

    async def open(self) -> None:
        self._queue = import_module("saq").Queue.from_url(self._url)

    async def put(self, items: Sequence[int]) -> None:
        for lot in lots(items):
            await asyncio.gather(*(self._queue.enqueue("nothing", item=item) for item in lot))

    def working(self) -> AbstractAsyncContextManager[None]:
        worker = import_module("saq").Worker(self._queue, functions=[("nothing", self._function)], concurrency=self._workers)
        return running(worker.start())


class Streaq:
    """streaQ."""

    def __init__(self, url: str, note: Note, workers: int) -> None:
        self._url, self._note, self._workers = url, note, workers
        self._worker, self._task = self._made()

    def _made(self) -> tuple[Any, Any]:
        """A worker and its task. One that is used to put cannot be run."""
        worker = import_module("streaq").Worker(redis_url=self._url, concurrency=self._workers, handle_signals=False)

        async def nothing(item: int) -> None:
            self._note()

        return worker, worker.task(name="nothing")(nothing)

    async def open(self) -> None:
        await self._worker.__aenter__()

    async def put(self, items: Sequence[int]) -> None:
        if len(items) == 1:
            await self._task.enqueue(items[0])
            return
        for lot in lots(items):
            await self._worker.enqueue_many([self._task.enqueue(item) for item in lot])

    def working(self) -> AbstractAsyncContextManager[None]:
        return running(self._made()[0].run_async())


class Taskiq:
    """taskiq, on Redis streams."""

    def __init__(self, url: str, note: Note, workers: int) -> None:
        self._workers = workers
        self._broker = import_module("taskiq_redis").RedisStreamBroker(url)
        self._task = self._broker.task(task_name="nothing")(asynchronous(note))

    async def open(self) -> None:
        await self._broker.startup()

    async def put(self, items: Sequence[int]) -> None:
        for lot in lots(items):
            await asyncio.gather(*(self._task.kiq(item) for item in lot))

    def working(self) -> AbstractAsyncContextManager[None]:
        receiver = import_module("taskiq.receiver").Receiver(self._broker, max_async_tasks=self._workers, run_startup=False)
        return running(receiver.listen(asyncio.Event()))


class Procrastinate:
    """procrastinate."""

    def __init__(self, url: str, note: Note, workers: int) -> None:
        procrastinate = import_module("procrastinate")
        self._workers = workers
        self._app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))

        async def nothing(item: int) -> None:
            note()

        self._task = self._app.task(name="nothing")(nothing)

    async def open(self) -> None:
        await self._app.open_async()
        await self._app.schema_manager.apply_schema_async()

    async def put(self, items: Sequence[int]) -> None:
        for lot in lots(items):
            await self._task.batch_defer_async(*({"item": item} for item in lot))

    def working(self) -> AbstractAsyncContextManager[None]:
        return running(self._app.run_worker_async(concurrency=self._workers, install_signal_handlers=False))


class Dramatiq:
    """dramatiq. It has threads."""

    def __init__(self, url: str, note: Note, workers: int) -> None:
        self._workers = workers
        self._broker = import_module("dramatiq.brokers.redis").RedisBroker(url=url)
        self._actor = import_module("dramatiq").actor(lambda item: note(), actor_name="nothing", broker=self._broker)

    async def open(self) -> None:
        self._broker.client.ping()

    async def put(self, items: Sequence[int]) -> None:
        await asyncio.to_thread(lambda: [self._actor.send(item) for item in items])

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        worker = import_module("dramatiq").Worker(self._broker, worker_threads=self._workers)
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)


class Huey:
    """huey. It has threads."""

    def __init__(self, url: str, note: Note, workers: int) -> None:
        huey = import_module("huey")
        self._workers = workers
        on_redis = urlsplit(url).scheme == "redis"
        self._huey = (
            huey.RedisHuey("q", url=url) if on_redis else huey.SqliteHuey("q", filename=str(Path.cwd() / "q.db"), fsync=True)
        )
        self._task = self._huey.task(name="nothing")(lambda item: note())

    async def open(self) -> None:
        logging.getLogger("huey").setLevel(logging.ERROR)

    async def put(self, items: Sequence[int]) -> None:
        await asyncio.to_thread(lambda: [self._task(item) for item in items])

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        consumer = self._huey.create_consumer(workers=self._workers, worker_type="thread", periodic=False)
        consumer.start()
        yield
        await asyncio.to_thread(consumer.stop, graceful=True)


PEERS: dict[str, type[Peer]] = {
    "arq, redis": Arq,
    "dramatiq, redis": Dramatiq,
    "huey, redis": Huey,
    "huey, sqlite": Huey,
    "procrastinate, postgresql": Procrastinate,
    "saq, redis": Saq,
    "streaq, redis": Streaq,
    "taskiq, redis": Taskiq,
}
