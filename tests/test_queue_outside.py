"""`open_queue`: producers in programs that are no daemon, on real servers."""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor import BadItem, BlockingProducer, Producer, QueueError, QueueFull, QueueUnavailable, open_queue
from supervisor.queues import QUEUES, Place, outside
from supervisor.queues.protocol import Ending, Settings, State, new_id
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.wall import WallClock


@pytest.fixture(params=["postgresql", "redis"])
def url(request) -> str:
    return request.getfixturevalue({"postgresql": "postgres"}.get(request.param, request.param)).url


@pytest.fixture
def name() -> str:
    return f"outside-{new_id()}"


@asynccontextmanager
async def daemon(url: str, name: str, group_by: str | None = None, **spec: Any):
    """A daemon's side of the queue: it declares what is true of it."""
    settings = Settings(spec=QueueSpec(backend=url, **spec), group_by=group_by)
    place = Place(directory=Path(), now=WallClock().now, listen=lambda notice: None, warn=lambda text: None)
    async with QUEUES[url.partition(":")[0]].open(name, settings, place) as engine:
        await engine.declare(settings)
        yield engine


async def handle_one(engine: Any, result: bytes | None = None) -> bytes:
    while not (claimed := await engine.claim(1, owner="tests", attempts=5)).items:
        await engine.wait_for_work()
    (item,) = claimed.items
    await engine.finish([Ending(id=item.id, token=item.token, how="done", result=result)])
    return item.payload


async def test_a_trio_program_puts_and_waits(url, name):
    async with daemon(url, name, priorities=("urgent", "rest"), size=3) as engine, open_queue(url, name) as queue:
        assert type(queue).__mro__[1] is Producer
        receipt = await queue.put({"path": "cat.png"}, priority="urgent", keep=True)
        records = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_into, records, queue, receipt.id)
            assert await handle_one(engine, b'"done"') == b'{"path":"cat.png"}'
        assert (records[0].state, records[0].result) == (State.DONE, b'"done"')
        with pytest.raises(BadItem, match=r"there are urgent, rest"):
            await queue.put(1, priority="high")
        with pytest.raises(QueueFull):  # the size is the daemons', too
            await queue.put_many(range(5), timeout=0)


async def wait_into(records: list, queue: Producer, id: str) -> None:
    records.append(await queue.wait(id))


async def test_a_queue_that_nobody_has_declared_is_as_its_defaults_say(url, name):
    async with open_queue(url, name) as queue:
        receipt = await queue.put({"n": 1}, priority="low", keep=True)
        async with daemon(url, name, group_by="n") as engine:
            assert (await engine.show(receipt.id)).priority == 2
            assert await handle_one(engine) == b'{"n":1}'
        assert (await queue.wait(receipt.id)).state is State.DONE


async def test_settings_that_are_declared_later_are_read_at_a_put(url, name, monkeypatch):
    monkeypatch.setattr(outside, "REFRESH", 0.0)
    async with open_queue(url, name) as queue, daemon(url, name, unique=UniqueSpec(by=("a",)), group_by="g") as engine:
        receipt = await queue.put({"a": 1, "g": "x"})
        assert (await engine.show(receipt.id)).group == "x"
        assert (await queue.put({"a": 1, "g": "y"})).what == "rejected"
        assert (await engine.declared()).group_by == "g"


async def test_what_the_block_raises_comes_out_as_it_is(url, name):
    with pytest.raises(ZeroDivisionError):
        async with open_queue(url, name):
            raise ZeroDivisionError
    with pytest.raises(QueueError, match="knows no item nothing"):
        async with open_queue(url, name) as queue:
            await queue.wait("nothing")


def test_a_blocking_program_puts_and_waits(url, name):
    with open_queue(url, name) as queue:
        assert isinstance(queue, BlockingProducer)
        told: list[int] = []
        receipts = queue.put_many(range(3), keep=True, on_stored=told.append)
        assert told == [3]
        assert [each.what for each in receipts] == ["stored"] * 3
        assert queue.put(0, id=receipts[0].id).what == "known"
        with pytest.raises(TimeoutError):
            queue.wait(receipts[0].id, timeout=0.05)
        with pytest.raises(BadItem, match="no priority 'hgih'"):
            queue.put(1, priority="hgih")

        async def handle() -> None:
            async with daemon(url, name) as engine:
                await handle_one(engine, b"7")

        with ThreadPoolExecutor(1) as pool:
            handled = pool.submit(trio.run, handle)
            assert queue.wait(receipts[0].id, timeout=60).result == b"7"
            handled.result()
    assert not any(thread.name == f"queue {name}" for thread in threading.enumerate())
    with pytest.raises(QueueError, match="is closed"):
        queue.put(1)
    queue.close()  # once more does no harm


def test_many_threads_may_use_one_queue(url, name):
    with open_queue(url, name) as queue, ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(queue.put, range(40)))
    assert len({receipt.id for receipt in receipts}) == 40


def test_an_asyncio_program_calls_it_from_threads(url, name):
    async def program() -> int:
        with open_queue(url, name) as queue:
            receipts = await asyncio.gather(*(asyncio.to_thread(queue.put, n) for n in range(5)))
            return len({receipt.id for receipt in receipts})

    # in a thread: pytest's own has a policy about loops
    assert ThreadPoolExecutor(1).submit(contextvars.Context().run, asyncio.run, program()).result() == 5


def test_who_waits_is_not_in_the_way_of_the_end(url, name):
    with ThreadPoolExecutor(1) as pool:
        with open_queue(url, name) as queue:
            receipt = queue.put(1, keep=True)
            waiting = pool.submit(queue.wait, receipt.id)
            queue.put(2)  # by now or later it waits: either is told
        with pytest.raises(QueueError, match="closed"):
            waiting.result(60)


def test_what_was_opened_before_a_fork_says_so(url, name):
    with open_queue(url, name) as queue:
        read, write = os.pipe()
        with warnings.catch_warnings(action="ignore"):  # newer Pythons warn of threads
            pid = os.fork()
        if not pid:
            try:
                queue.put(1)
            except QueueError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert b"before this process was forked" in os.read(read, 1000)
        os.close(read)
        os.close(write)
        assert queue.put(1).what == "stored"


@pytest.mark.parametrize("scheme", ["postgresql", "redis"])
async def test_a_server_that_is_not_there_is_said_at_once(scheme):
    opening = f"{scheme}://127.0.0.1:1/0", "images"
    with pytest.raises(QueueUnavailable):
        async with open_queue(*opening):
            pass
    with pytest.raises(QueueUnavailable):
        await trio.to_thread.run_sync(open_queue(*opening).__enter__)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite", "a queue in sqlite belongs to its daemon alone: put items with `supervisor submit images`"),
        ("memory", "belongs to its daemon alone"),
        ("redsi://localhost", r"expected the URL of an engine .*, got 'redsi://localhost'"),
        ("redis", r"expected the URL of an engine"),
        ("mysql://user:secret@host/", r"got 'mysql://user:\*\*\*@host/'"),
    ],
)
def test_what_is_no_shared_queue_is_refused(url, words):
    with pytest.raises(ValueError, match=words):
        open_queue(url, "images")


def test_an_extra_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trio-supervisor\[redis\]'"):
        open_queue("redis://localhost", "images")
