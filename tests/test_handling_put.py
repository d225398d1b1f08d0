"""`ctx.put`: items that a job's function puts, wherever that runs."""

from __future__ import annotations

import asyncio
import datetime
import itertools
from dataclasses import replace
from textwrap import dedent
from typing import Any

import pytest
import trio
from house import open_house, open_worker

from supervisor.errors import BadItem, QueueFull
from supervisor.events import Journal
from supervisor.kinds import Context
from supervisor.queues.protocol import Receipt, Settings, State
from supervisor.queues.registry import open_queues
from supervisor.queues.spec import QueueSpec
from supervisor.state import Phase

numbers = itertools.count()


@pytest.fixture
async def house(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    queues = {"out": Settings(spec=QueueSpec(backend="memory")), "small": Settings(spec=QueueSpec(backend="memory", size=1))}
    journal = Journal()
    async with (
        open_house(tmp_path / "logs") as house,
        open_queues(
            queues,
            directory=tmp_path,
            owner="test",
            journal=journal,
            now=lambda: datetime.datetime.now(datetime.UTC).timestamp(),
        ) as opened,
    ):
        house.resources = replace(house.resources, queues=opened)
        yield house


async def waiting(house, queue: str = "out") -> list[Any]:
    """What is in a queue: payload, priority and id."""
    records = await house.resources.queues.engine(queue).peek(State.WAITING, 100)
    return [(record.payload.decode(), record.priority, record.id) for record in records]


CODE = """
import dataclasses, datetime
from supervisor import BadItem, QueueError, QueueFull

@dataclasses.dataclass
class Image:
    path: str

def f(item, ctx: 'Context'):
    at = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    receipt = ctx.put('out', Image(item), priority='high', id='my-own', at=at)
    assert type(receipt).__name__ == 'Receipt'
    again = ctx.put('out', None, id='my-own')
    said = []
    for queue, item, options in (
        ('nothing', 1, {}),
        ('out', 1, {'priority': 'hihg'}),
        ('out', object(), {}),
        ('small', 1, {'timeout': 0}),
    ):
        try:
            ctx.put(queue, item, **options)
        except (LookupError, BadItem, QueueFull, TypeError) as error:
            said.append(type(error).__name__)
    return [receipt.id, receipt.what, again.what, said]
"""


def defined(house, code: str) -> str:
    name = f"putting_{next(numbers)}"
    (house.logs.parent / f"{name}.py").write_text(dedent(code))
    return name


async def fill(house) -> None:
    await house.resources.queues.producer("small").put(0)


async def test_a_task_awaits_it(house):
    async def handle(item: str, ctx: Context) -> Any:
        receipt = await ctx.put("out", {"path": item}, priority="high", id="my-own")
        with pytest.raises(LookupError, match='no queue "nothing" in \\[queues\\], which has: out, small'):
            await ctx.put("nothing", 1)
        with pytest.raises(BadItem, match="hihg"):
            await ctx.put("out", 1, priority="hihg")
        return receipt.what

    async with open_worker(house, kind="task", call=handle) as worker:
        assert await worker("a") == "stored"
    assert await waiting(house) == [('{"path":"a"}', 0, "my-own")]


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_it_blocks_in_threads_and_processes(house, kind):
    await fill(house)
    call = f"{defined(house, CODE)}:f"
    async with open_worker(house, kind=kind, call=call) as worker:
        id, what, again, said = await worker("a")
    assert (id, what, again) == ("my-own", "stored", "known")
    assert said[:2] == ["LookupError", "BadItem"] and said[2] in ("BadItem", "TypeError") and said[3] == "QueueFull"
    assert await waiting(house) == [('{"path":"a"}', 0, "my-own")]


async def test_it_is_awaited_in_asyncio_and_can_be_cancelled_there(house):
    await fill(house)

    async def handle(item: str, ctx: Context) -> Any:
        receipt = await ctx.put("out", item, at=datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))
        assert isinstance(receipt, Receipt)
        said = []
        for put in (ctx.put("nothing", 1), ctx.put("small", 1, timeout=0), asyncio.wait_for(ctx.put("small", 1), 0.01)):
            try:
                await put
            except (LookupError, QueueFull, TimeoutError) as error:
                said.append(type(error).__name__)
        return [receipt.what, *said]

    async with open_worker(house, kind="asyncio", call=handle) as worker:
        assert await worker("a") == ["stored", "LookupError", "QueueFull", "TimeoutError"]
    engine = house.resources.queues.engine("small")
    (item,) = (await engine.claim(1, owner="test", attempts=5)).items
    await trio.testing.wait_all_tasks_blocked()
    assert item.payload == b"0" and await waiting(house, "small") == []


async def test_a_service_of_any_kind_may_put(house):
    code = """
    def f(ctx: 'Context'):
        for number in range(100):
            ctx.put('out', number)
    """
    call = f"{defined(house, code)}:f"
    for kind in ("thread", "process"):
        outcome = await house.finish(kind=kind, call=call, once=True)
        assert outcome.reason == "completed", outcome
    assert [int(payload) for payload, *_ in await waiting(house)] == list(range(100))
    assert (await house.resources.queues.engine("out").counts()).waiting == 200


async def test_threads_of_a_process_may_put_at_the_same_time(house):
    code = """
    from concurrent.futures import ThreadPoolExecutor
    def f(item, ctx: 'Context'):
        with ThreadPoolExecutor(8) as pool:
            receipts = list(pool.map(lambda n: ctx.put('out', n, id=f'i{n}'), range(200)))
        return [receipt.id for receipt in receipts]
    """
    async with open_worker(house, kind="process", call=f"{defined(house, code)}:f") as worker:
        assert await worker(0) == [f"i{n}" for n in range(200)]


async def test_a_thread_that_waits_for_room_waits_no_more_when_it_is_to_be_killed(house):
    await fill(house)
    code = """
    from supervisor import QueueFull
    def f(ctx: 'Context'):
        ctx.progress(1)
        try:
            ctx.put('small', 1)
        except QueueFull as error:
            assert str(error) == 'not put: the run is to end'
    """
    life = house.start(kind="thread", call=f"{defined(house, code)}:f", once=True)
    life.notes.on_progress = lambda: life.run.advance(Phase.KILLING)
    assert (await life.end()).reason == "completed"
    assert [payload for payload, *_ in await waiting(house, "small")] == ["0"]
