"""Queue jobs whose workers are processes: workers that are killed, and what becomes of their items. Real trees in real time."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from textwrap import dedent

import pytest
import trio

from supervisor.config import Config, DaemonSpec
from supervisor.events import ItemDead, Journal
from supervisor.kinds import JobSpec
from supervisor.policies import RetrySpec
from supervisor.queues.protocol import Record, State
from supervisor.queues.spec import QueueSpec
from supervisor.spec import Backoff, Seconds
from supervisor.tree import open_supervisor

SOON = Backoff(initial=Seconds(0.01), max=Seconds(0.05))

CODE = """
import os, signal, time
def note(item):
    with open(__file__ + '.notes', 'a') as notes:
        notes.write(f'{item}\\n')
    time.sleep(0.0005)
    return item
def poison(item):
    if item == 'poison':
        os.kill(os.getpid(), signal.SIGSEGV)
    return item
def stuck(item):
    if item == 'stuck':
        sum(range(10**12))
    return item
"""


@pytest.fixture
async def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"module_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(dedent(CODE))
    return name


def config(base, call: str, **keys) -> Config:
    job = JobSpec(kind="process", call=call, queue="q", workers=2, backoff=SOON, **keys)
    daemon = DaemonSpec(state_dir=str(base / "state"))
    queues = {"q": QueueSpec(backend="memory")}
    return Config(file=None, base=base, daemon=daemon, jobs={"j": job}, supervisors={}, limits={}, queues=queues)


async def ended(tree, ids) -> list[Record]:
    """These items, all of which were put to be kept, when they have ended."""
    return [await tree.queues.producer("q").wait(id, 60) for id in ids]


async def states_of(tree, items, receipts) -> dict[str, State]:
    """What became of each item."""
    records = await ended(tree, [receipt.id for receipt in receipts])
    return {item: record.state for item, record in zip(items, records, strict=True)}


@pytest.mark.parametrize(
    ("count", "kills"), [(600, 5), pytest.param(20_000, 200, marks=pytest.mark.long)], ids=["a few", "many"]
)
async def test_workers_that_are_killed_lose_nothing(tmp_path, module, count, kills):
    """Each item ends; those that were not begun with are not counted as tried."""
    chance = random.Random(1)
    async with open_supervisor(config(tmp_path, f"{module}:note", retry=RetrySpec(attempts=1000))) as tree:
        producer = tree.queues.producer("q")
        receipts = await producer.put_many(range(count), keep=True)

        async def kill() -> None:
            for _ in range(kills):
                while not (pids := [row.pid for row in tree.status("j") if row.pid is not None and row.ready]):
                    await trio.sleep(0.001)
                with suppress(ProcessLookupError):  # it is dead already, and nobody has heard of it yet
                    os.kill(chance.choice(pids), signal.SIGKILL)
                await trio.sleep(chance.random() / 10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            records = await ended(tree, [receipt.id for receipt in receipts])
            nursery.cancel_scope.cancel(reason="all have ended")
        assert {record.state for record in records} == {State.DONE}
        assert sum(record.attempts for record in records) - count <= kills
        noted = (tmp_path / f"{module}.py.notes").read_text().split()
        assert set(map(int, noted)) == set(range(count))
        assert len(noted) - count <= kills  # what was done twice was in the hands of one that was killed


async def test_an_item_that_kills_its_worker_each_time_is_dead_and_holds_up_no_other(tmp_path, module):
    dead = []
    journal = Journal()
    journal.add_sink(lambda event: dead.append(event) if isinstance(event, ItemDead) else None)
    poisoned = config(tmp_path, f"{module}:poison", retry=RetrySpec(attempts=3))
    async with open_supervisor(poisoned, journal=journal) as tree:
        items = ["a", "poison", *"bcdefgh"]
        receipts = await tree.queues.producer("q").put_many(items, keep=True)
        states = await states_of(tree, items, receipts)
        assert {item for item, state in states.items() if state is not State.DONE} == {"poison"}
        record = await tree.queues.engine("q").show(receipts[1].id)
        assert record.state is State.DEAD and record.attempts == 3
        assert record.error.startswith("its process has ended: killed by SIGSEGV")
    assert [event.item for event in dead] == [receipts[1].id]


async def test_a_stuck_native_call_is_killed_after_its_timeout(tmp_path, module):
    limits = {"timeout": Seconds(0.3), "grace": Seconds(0.1), "retry": RetrySpec(attempts=1)}
    async with open_supervisor(config(tmp_path, f"{module}:stuck", **limits)) as tree:
        items = ["a", "stuck", *"bcdefgh"]
        receipts = await tree.queues.producer("q").put_many(items, keep=True)
        states = await states_of(tree, items, receipts)
        assert {item for item, state in states.items() if state is not State.DONE} == {"stuck"}
        assert (await tree.queues.engine("q").show(receipts[1].id)).error == "timed out after 0.3 s"
