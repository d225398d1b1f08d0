"""How many workers a queue job has, where that goes by the work: the decision, and what comes of it in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from supervisor import queues as engines
from supervisor.events import Ended, Removed, Scaled
from supervisor.nodes import autoscale
from supervisor.nodes.autoscale import DEPTH, PATIENCE, QUIET, grown
from supervisor.queues.spec import AutoscaleSpec
from tests import moody
from tests.forest import at_once, settle
from tests.real_tree import tree
from tests.test_pool import Pool, handling, pool, taking


@pytest.fixture(autouse=True)
def moody_engine(monkeypatch):
    monkeypatch.setitem(engines.QUEUES, "moody", moody.SCHEME)


COUNTS = st.integers(0, 2000)


@given(workers=COUNTS, most=st.integers(1, 1000), waiting=COUNTS, oldest=st.floats(0, 1e6))
def test_there_are_never_fewer_nor_more_than_double_nor_than_there_is_work_for(workers, most, waiting, oldest):
    wanted = grown(workers, most, waiting, oldest)
    assert wanted >= workers
    assert wanted <= max(workers, most)
    assert wanted <= max(1, 2 * workers)
    assert workers == 0 or wanted <= workers + waiting


@given(workers=st.integers(1, 1000), most=st.integers(1, 1000), waiting=COUNTS)
def test_what_has_waited_too_long_brings_more_workers_as_long_as_there_may_be_more(workers, most, waiting):
    assert (grown(workers, most, waiting, PATIENCE) > workers) == (waiting > 0 and workers < most)


@given(workers=st.integers(1, 100), more=COUNTS, oldest=st.floats(0, 1e6))
def test_more_work_or_more_waiting_never_means_fewer_workers(workers, more, oldest):
    assert grown(workers, 1000, more + 1, oldest) >= grown(workers, 1000, more, oldest)
    assert grown(workers, 1000, more, oldest + 1) >= grown(workers, 1000, more, oldest)


def test_a_few_items_may_wait_for_a_moment_and_many_may_not():
    assert grown(2, 8, 2 * DEPTH, 0.0) == 2
    assert grown(2, 8, 2 * DEPTH + 1, 0.0) == 4
    assert grown(0, 8, 0, 0.0) == 1  # the engine said that there is something


def scaled(f: Pool) -> list[tuple[float, int, int]]:
    return [(at, event.was, event.workers) for at, event in f.history if isinstance(event, Scaled)]


def between(least: int, most: int, seconds: float = 10, **keys: Any) -> Any:
    return handling(taking(seconds), workers=AutoscaleSpec(min=least, max=most), **keys)


async def test_many_items_double_the_workers_each_second_and_a_free_worker_leaves_each_minute(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": between(1, 8)}) as f:
        await settle()
        start = trio.current_time()
        await f.put(*["1"] * 80)
        await trio.sleep(5)
        assert scaled(f) == [(start, 1, 2), (start + 1, 2, 4), (start + 2, 4, 8)]
        assert f.events(Scaled)[-1].cause == "scaled 4 -> 8: 76 wait, the oldest for 2s"
        assert f.tree.journal.table["a"].cause == "8 workers of 1 to 8"
        await trio.sleep(1000)
        ends = [at - start for at, was, wanted in scaled(f) if wanted < was]
        # the last hands are full until 102 s; from then on one worker leaves each minute
        free = min(ends) - QUIET
        assert 90 < free <= 112
        assert ends == [free + QUIET * step for step in range(1, 8)]
        assert f.tree.journal.table["a"].cause == "1 worker of 1 to 8"
        assert [name for name in f.tree.journal.table if name.startswith("a:")] == ["a:0"]
        assert (await f.engine.counts()).waiting == 0


async def test_one_item_that_waits_for_too_long_brings_one_worker(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": between(1, 8, seconds=100)}) as f:
        await settle()
        await f.put("1")
        await trio.sleep(7)
        assert scaled(f) == []
        start = trio.current_time()
        await f.put("2")
        await trio.sleep(5)
        assert scaled(f) == [(start + PATIENCE, 1, 2)]


async def test_nothing_is_counted_while_nothing_waits(autojump_clock, tmp_path, monkeypatch):
    async with pool(tmp_path, {"a": between(1, 8, seconds=1000), "b": between(1, 8)}) as f:
        await trio.sleep(5)  # by now it is known that the queue is not paused
        asked: list[float] = []
        counts = f.engine.counts

        async def counted() -> Any:
            asked.append(trio.current_time())
            return await counts()

        monkeypatch.setattr(f.engine, "counts", counted)
        await f.put("1", "2")
        await trio.sleep(900)
        assert asked == []


async def test_from_none_the_first_item_starts_one_and_it_leaves_when_it_was_idle_for_a_minute(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": between(0, 4, seconds=5)}) as f:
        await trio.sleep(QUIET + 1)
        assert [(was, wanted) for _, was, wanted in scaled(f)] == [(1, 0)]
        row = f.tree.journal.table["a"]
        assert (row.word, row.ready, row.cause) == ("running", True, "0 workers of 0 to 4")
        await trio.sleep(1000)
        start = trio.current_time()
        (item,) = await f.put("1")
        await trio.sleep(5.5)
        assert await f.states(item) != "waiting"
        assert scaled(f)[1:] == [(start, 0, 1)]
        await trio.sleep(QUIET)
        assert scaled(f)[2:] == [(start + 5 + QUIET, 1, 0)]


async def test_who_is_busy_stays_and_the_idle_one_leaves_whatever_its_number(autojump_clock, tmp_path):
    async def work(item: int) -> None:
        await trio.sleep(item)

    job = handling(work, workers=AutoscaleSpec(min=1, max=3))
    async with pool(tmp_path, {"a": job}) as f:
        await settle()
        await f.put("10", "10", "500")
        await trio.sleep(4)
        assert [wanted for _, _, wanted in scaled(f)] == [2, 3]
        await trio.sleep(200)
        assert [name for name in f.tree.journal.table if name.startswith("a:")] == ["a:2"]
        assert f.tree.journal.table["a"].cause == "1 worker of 1 to 3"
        await f.put("100")
        await trio.sleep(3)
        assert [name for name in f.tree.journal.table if name.startswith("a:")] == ["a:0", "a:2"]


async def test_an_operators_scale_stays_until_workers_changes(autojump_clock, tmp_path):
    job = between(1, 8)
    async with pool(tmp_path, {"a": job}) as f:
        await settle()
        answer = await at_once(f, "scale", "a", workers=3)
        assert answer == "yes, 3 workers, whatever there is to do, until `workers` changes in the file"
        await f.put(*["1"] * 100)
        await trio.sleep(60)
        assert scaled(f) == [] and f.tree.journal.table["a"].cause == "all 3 workers are ready"
        f.tree.apply(f.config({"a": replace(job, workers=AutoscaleSpec(min=1, max=7))}))
        await trio.sleep(2.5)
        assert [wanted for _, _, wanted in scaled(f)] == [6, 7]


async def test_a_reload_goes_from_a_number_to_a_table_and_back_and_leaves_workers_alone(autojump_clock, tmp_path):
    job = between(1, 8)
    async with pool(tmp_path, {"a": replace(job, workers=3)}) as f:
        await f.put(*["1"] * 100)
        await settle()
        f.tree.apply(f.config({"a": job}))
        await settle()
        assert f.events(Scaled)[0].was == 3
        f.tree.apply(f.config({"a": replace(job, workers=2)}))
        await trio.sleep(100)
        assert f.tree.journal.table["a"].cause == "both workers are ready" and len(scaled(f)) == 1
        f.tree.apply(f.config({"a": replace(job, workers=1)}))
        f.tree.apply(f.config({"a": replace(job, workers=AutoscaleSpec(min=4, max=4))}))
        await settle()
        assert f.tree.journal.table["a"].cause == "4 workers of 4 to 4"


async def test_a_plain_job_becomes_one_that_is_scaled(autojump_clock, tmp_path):
    job = between(1, 4)
    async with pool(tmp_path, {"a": replace(job, workers=1)}) as f:
        await f.put(*["1"] * 100)
        await settle()
        f.tree.apply(f.config({"a": job}))
        await trio.sleep(3)
        assert [wanted for _, _, wanted in scaled(f)] == [2, 4]


@pytest.mark.parametrize("quiet", ["stopped", "paused", "queue paused"])
async def test_what_takes_nothing_grows_not_and_goes_on_when_it_may(autojump_clock, tmp_path, quiet):
    async with pool(tmp_path, {"a": between(1, 4)}) as f:
        await settle()
        if quiet == "queue paused":
            await f.engine.pause(True)
        elif quiet == "paused":
            await f.put("1")
            await trio.sleep(1)
            await f.tree.pause("a")
        else:
            await f.tree.stop("a")
        await f.put(*["1"] * 100)
        await trio.sleep(20)
        assert scaled(f) == []
        if quiet == "queue paused":
            await f.engine.pause(False)
        else:
            await (f.tree.resume("a") if quiet == "paused" else f.tree.start("a"))
        await trio.sleep(3)
        assert [wanted for _, _, wanted in scaled(f)] == [2, 4]


async def test_the_engine_may_be_away_meanwhile(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": between(1, 4)}) as f:
        await settle()
        f.engine.broken["wait_for_work"] = "no answer"
        await f.put(*["1"] * 100)
        await trio.sleep(2)
        assert scaled(f) == []
        f.engine.broken.clear()
        await trio.sleep(60)
        assert [wanted for _, _, wanted in scaled(f)] == [2, 4]


CODE = """
import asyncio, time, trio
def plain(item):
    time.sleep(0.05)
async def of_trio(item):
    await trio.sleep(0.05)
async def of_asyncio(item):
    await asyncio.sleep(0.05)
"""
CALLS = {"process": "plain", "thread": "plain", "task": "of_trio", "asyncio": "of_asyncio", "command": None}


@pytest.mark.parametrize("kind", CALLS)
async def test_every_kind_grows_to_its_most_for_slow_items_and_shrinks_to_its_least(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(autoscale, "UP_EVERY", 0.05)
    monkeypatch.setattr(autoscale, "QUIET", 0.3)
    monkeypatch.syspath_prepend(tmp_path)
    module = f"slow_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(CODE)
    call = CALLS[kind]
    what = {"command": ["sleep", "0.05"]} if call is None else {"call": f"{module}:{call}", "kind": kind}
    async with tree(tmp_path, queues={"q": {}}, a={**what, "queue": "q", "workers": {"min": 1, "max": 4}}) as f:
        await f.tree.queues.producer("q").put_many(range(60))
        await f.until(Scaled, was=2, workers=4)
        last = await f.until(Scaled, was=2, workers=1)
        assert "free for" in last.cause
        await f.until(Removed, times=3)
        counts = await f.tree.queues.engine("q").counts()
        assert (counts.waiting, counts.running, counts.dead) == (0, 0, 0)
        assert f.tree.queues.desk("q").tallies["a"].done == 60
        assert not any(event.failed for event in f.events(Ended))
