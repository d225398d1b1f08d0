"""Queue jobs in the tree: what workers do with items, under which policies, and how they end. In virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from supervisor import queues as engines
from supervisor.errors import QueueError, Rejected, Retry
from supervisor.events import (
    Ended,
    FallingBack,
    ItemCancelled,
    ItemDead,
    ItemRetrying,
    ItemsDead,
    ItemsHandled,
    ItemsRetrying,
    QueueDegraded,
    QueueRecovered,
    Starting,
    Working,
    fold,
)
from supervisor.kinds import KINDS, Context
from supervisor.policies import BreakerSpec, BulkheadSpec, RateSpec, RetrySpec
from supervisor.queues.protocol import Ending, Notice, Record, Settings, State
from supervisor.queues.spec import BatchSpec, QueueSpec
from supervisor.spec import Rate, Recycle, Seconds
from tests import fragile, moody
from tests.forest import Forest, at_once, forest, job, settle
from tests.moody import Moody


@pytest.fixture(autouse=True)
def moody_engines(monkeypatch):
    monkeypatch.setitem(engines.QUEUES, "moody", moody.SCHEME)
    monkeypatch.setitem(KINDS, "fragile", fragile.KIND)
    fragile.most.update({"under way": 0, "seen": 0})


class Pool(Forest):
    """A running tree with queue q, and what has happened in it so far."""

    @property
    def engine(self) -> Moody:
        return self.tree.queues.engine("q")  # type: ignore[return-value]

    async def put(self, *payloads: str, **keys: Any) -> list[str]:
        return await self.engine.put_all(*(text.encode() for text in payloads), **keys)

    async def show(self, id: str) -> Record:
        record = await self.engine.show(id)
        assert record is not None
        return record

    async def states(self, *ids: str) -> str:
        """The states of these items; one that is done and has no result is gone."""
        records = [await self.engine.show(id) for id in ids]
        return " ".join("gone" if record is None else record.state.value for record in records)

    def said(self, *kinds: Any) -> list[tuple[float, str]]:
        return [(at, event.cause) for at, event in self.history if isinstance(event, kinds)]


@asynccontextmanager
async def pool(base: Any, jobs: Mapping[str, Any], queue: QueueSpec | None = None, **options: Any) -> AsyncIterator[Pool]:
    spec = queue or QueueSpec(backend="moody")
    async with forest(base, jobs, queues={"q": spec}, **options) as f:
        f.__class__ = Pool
        yield f  # type: ignore[misc]
    assert fold(event for _, event in f.history) == f.tree.journal.table


def handling(call: Callable[..., Any], **keys: Any) -> Any:
    return job(call, queue="q", **keys)


def plain(attempts: int = 3, initial: float = 1, **keys: Any) -> RetrySpec:
    return RetrySpec(attempts=attempts, initial=Seconds(initial), jitter=0.0, **keys)


def taking(seconds: float) -> Callable[[Any], Any]:
    """A function that takes so long for each item, hears nothing, and notes when each began and ended."""

    async def work(item: Any) -> Any:
        work.began.append((trio.current_time(), item))  # type: ignore[attr-defined]
        await trio.sleep(seconds)
        work.ended.append((trio.current_time(), item))  # type: ignore[attr-defined]
        return item

    work.began, work.ended = [], []  # type: ignore[attr-defined]
    return work


async def fail(item: Any) -> None:
    raise OSError("no net")


def fail_in_thread(item: Any) -> None:
    raise OSError("no net")


async def idle(ctx: Context) -> None:
    await ctx.wait_stopping()


# ---- from put to done ----


async def test_items_are_handled_by_the_workers_and_what_they_return_is_their_result(autojump_clock, tmp_path):
    async def double(item: int) -> int | None:
        return 2 * item or None

    async with pool(tmp_path, {"a": handling(double, workers=2)}) as f:
        await f.tree.wait_running()
        ids = await f.put("1", "2", "0")
        await settle()
        assert [(await f.show(id)).result for id in ids[:2]] == [b"2", b"4"]
        assert await f.states(*ids) == "done done gone"


async def test_a_worker_is_running_and_says_what_it_does_when_that_has_lasted(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(5))}) as f:
        await f.tree.wait_running()
        await trio.sleep(1.5)
        row = f.tree.journal.table["a"]
        assert (row.word, row.ready, row.cause) == ("running", True, "idle")
        await f.put("1")
        await trio.sleep(3)
        assert f.tree.journal.table["a"].cause == "handles i1"
        await trio.sleep(4)
        assert f.tree.journal.table["a"].cause == "idle"


async def test_items_that_succeed_are_one_event_a_second(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(0.3))}) as f:
        await f.tree.wait_running()
        await f.put(*["1"] * 7)
        await trio.sleep(10)
        assert [event.done for event in f.events(ItemsHandled)] == [3, 6, 7]
        assert not f.events(ItemRetrying, ItemDead)


async def test_a_thousand_items_need_no_task_of_their_own(autojump_clock, tmp_path):
    tasks = set()

    async def note(item: Any) -> None:
        tasks.add(trio.lowlevel.current_task())
        await trio.lowlevel.checkpoint()

    async with pool(tmp_path, {"a": handling(note, workers=4)}) as f:
        await f.tree.wait_running()
        await f.put(*["1"] * 1000)
        await settle()
        assert f.tree.queues.desk("q").tally("a").done == 1000
    assert len(tasks) == 4


async def test_an_item_can_say_how_far_it_is(autojump_clock, tmp_path):
    async def work(item: Any, ctx: Context) -> None:
        for done in range(10):
            ctx.progress(done, 10)
            await trio.sleep(1)

    async with pool(tmp_path, {"a": handling(work), "b": handling(work, timeout=60)}) as f:
        ids = await f.put("1", "2")
        await trio.sleep(5.5)
        told = {(await f.show(id)).progress for id in ids}
        assert told <= {(4, 10), (5, 10)}  # what was said at 5.0, in the moment in which what is new is stored
        assert len(f.engine.times("progress")) <= 12


# ---- failures ----


async def test_what_fails_is_tried_again_after_a_longer_wait_each_time_and_dead_in_the_end(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(fail)}) as f:  # the job says nothing: 5 attempts from 1 s on
        (id,) = await f.put("1")
        await trio.sleep(60)
        assert f.said(ItemRetrying) == [
            (at, f"item i1: attempt {n} of 5 failed: OSError: no net") for n, at in enumerate((0, 1, 3, 7), 1)
        ]
        assert f.said(ItemDead) == [(15.0, "item i1 is dead after 5 attempts: OSError: no net")]
        record = await f.show(id)
        assert (record.state, record.attempts, record.error) == (State.DEAD, 5, "OSError: no net")
        assert "no net" in (record.traceback or "")
        assert f.word("a") == "running"
        assert f.events(ItemsHandled)[-1].retry == 4
        assert f.events(ItemsHandled)[-1].dead == 1


async def test_a_flood_of_failures_is_told_by_its_first_ones_and_then_in_numbers_once_a_second(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(fail, retry=plain(attempts=2, initial=60))}) as f:
        await f.tree.wait_running()
        await trio.sleep(10)
        ids = await f.put(*["1"] * 100)
        await trio.sleep(30)
        assert [at for at, _ in f.said(ItemRetrying)] == [10.0] * 10  # the first are told at once
        rest = "and 90 more failed like this; the last: item i100: attempt 1 of 2 failed: OSError: no net"
        assert f.said(ItemsRetrying) == [(11.0, rest)]
        assert (f.events(ItemsRetrying)[0].count, f.events(ItemsRetrying)[0].job) == (90, "a")
        await trio.sleep(60)
        assert [at for at, _ in f.said(ItemDead)] == [70.0] * 10
        rest = "and 90 more are dead; the last: item i100 is dead after 2 attempts: OSError: no net"
        assert f.said(ItemsDead) == [(71.0, rest)]
        assert len([line for line in f.logs if line["event"] == "job raised"]) == 10
        dead = await f.engine.peek(State.DEAD, 1000)
        assert {record.id for record in dead} == set(ids)
        assert all("no net" in (record.traceback or "") for record in dead)
        await f.engine.requeue(ids[:1])
        await trio.sleep(10)
        assert f.said(ItemRetrying)[-1][0] == 100.0  # after calm: at once


async def test_a_flood_that_lasts_is_told_in_numbers_each_second_and_at_the_end(autojump_clock, tmp_path):
    async def work(item: Any) -> None:
        await trio.sleep(0.02)
        raise OSError("no net")

    async with pool(tmp_path, {"a": handling(work, retry=plain(attempts=1))}) as f:
        await f.tree.wait_running()
        await trio.sleep(10.01)
        await f.put(*["1"] * 1000)
        await trio.sleep(3.2)
    at = [when for when, _ in f.said(ItemDead)]
    assert [sum(second <= when < second + 1 for when in at) for second in (10.01, 11.01, 12.01)] == [10, 10, 10]
    counts = [(round(when, 2), event.count) for when, event in f.history if isinstance(event, ItemsDead)]
    assert [when for when, _ in counts][:3] == [11.01, 12.01, 13.01]
    assert sum(count for _, count in counts) + len(at) == f.events(ItemsHandled)[-1].dead


async def test_a_waiting_retry_holds_no_worker(autojump_clock, tmp_path):
    async def work(item: int) -> None:
        if item == 0:
            raise OSError
        seen.append(trio.current_time())

    seen: list[float] = []
    async with pool(tmp_path, {"a": handling(work, retry=plain(2, 60))}) as f:
        await f.put("0", "1")
        await settle()
        assert seen == [0.0]


async def test_an_item_can_say_when_it_is_to_be_tried_again(autojump_clock, tmp_path):
    async def work(item: Any) -> None:
        seen.append(trio.current_time())
        if len(seen) < 3:
            raise Retry(after=30)

    seen: list[float] = []
    async with pool(tmp_path, {"a": handling(work)}) as f:
        await f.put("1")
        await trio.sleep(100)
        assert seen == [0.0, 30.0, 60.0]


@pytest.mark.parametrize("keys", [{"give_up_on": ("OSError",)}, {"on": ("ValueError",)}, {"attempts": 1}])
async def test_what_is_not_worth_another_attempt_is_dead_at_once(autojump_clock, tmp_path, keys):
    async with pool(tmp_path, {"a": handling(fail, retry=RetrySpec(**keys))}) as f:
        (id,) = await f.put("1")
        await settle()
        assert (await f.show(id)).state is State.DEAD


async def test_what_the_function_does_not_take_is_dead_at_once(autojump_clock, tmp_path):
    async def work(item: int) -> None:
        raise AssertionError

    async with pool(tmp_path, {"a": handling(work)}) as f:
        (id,) = await f.put('"one"')
        await settle()
        assert (await f.show(id)).state is State.DEAD


async def test_an_item_that_kills_its_worker_each_time_is_dead_and_said_to_be(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(1), start="manual")}) as f:
        (id,) = await f.put("1")
        for _ in range(5):  # a daemon that claims it, and dies
            (item,) = (await f.engine._queue.claim(1, owner="other", attempts=5)).items
            await f.engine._queue.finish([Ending(id=item.id, token=item.token, how="retry")])
        await f.tree.start("a")
        await settle()
        assert f.said(ItemDead) == [
            (0.0, "item i1 is dead: it has been claimed 5 times, the last one: its worker died each time")
        ]
        assert (await f.show(id)).state is State.DEAD


# ---- stopping ----


async def test_an_idle_worker_ends_at_once(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(1))}) as f:
        await f.tree.wait_running()
        assert await at_once(f, "stop", "a") == "yes, stopped"


async def test_a_stop_lets_what_is_in_hand_end_and_claims_nothing_more(autojump_clock, tmp_path):
    work = taking(5)
    async with pool(tmp_path, {"a": handling(work)}) as f:
        await f.tree.wait_running()
        ids = await f.put("1", "2")
        await trio.sleep(1)
        await f.tree.stop("a")
        assert trio.current_time() == 5.0
        assert work.ended == [(5.0, 1)]
        await settle()
        assert await f.states(*ids) == "done waiting"


async def test_what_does_not_end_in_its_grace_is_given_back_at_once_without_an_attempt(autojump_clock, tmp_path):
    first, second = taking(100), taking(1)
    async with pool(tmp_path, {"a": handling(first, grace=3), "b": handling(second, start="manual")}) as f:
        await f.tree.wait_running()
        (id,) = await f.put("7")
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(f.tree.stop, "a")
            nursery.start_soon(f.tree.start, "b")
        await settle()
        assert second.began == [(4.0, 7)]  # the grace was over at 4
        assert (await f.show(id)).attempts == 1
        await trio.sleep(2)
        assert await f.states(id) == "done"


async def test_a_function_with_a_context_hears_of_the_stop(autojump_clock, tmp_path):
    async def work(item: Any, ctx: Context) -> str:
        await ctx.wait_stopping()
        return "heard"

    async with pool(tmp_path, {"a": handling(work)}) as f:
        await f.tree.wait_running()
        (id,) = await f.put("1")
        await settle()
        assert await at_once(f, "stop", "a") == "yes, stopped"
        await settle()
        assert (await f.show(id)).result == b'"heard"'


async def test_the_end_of_the_tree_stores_what_it_knows(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(5), grace=10)}) as f:
        await f.tree.wait_running()
        await f.put("1", "2")
        await settle()
        engine = f.engine
    assert trio.current_time() == 5.0
    how = [ending.how for _, what, endings in engine.asked if what == "finish" for ending in endings]
    assert how == ["done"]


async def test_a_restart_renews_one_worker_after_another_and_loses_nothing(autojump_clock, tmp_path):
    work = taking(1)
    async with pool(tmp_path, {"a": handling(work, workers=3)}) as f:
        await f.tree.wait_running()
        await f.put(*map(str, range(12)))
        await trio.sleep(0.5)
        await f.tree.restart("a")
        await trio.sleep(20)
        assert sorted(item for _, item in work.ended) == list(range(12))
        assert len(f.events(Starting)) == 1 + 3 + 3


async def test_more_workers_and_fewer(autojump_clock, tmp_path):
    work = taking(1)
    async with pool(tmp_path, {"a": handling(work)}) as f:
        await f.tree.wait_running()
        await f.put(*map(str, range(10)))
        await f.tree.scale("a", 5)
        await trio.sleep(1.5)
        assert len(work.began) >= 6
        await f.tree.scale("a", 2)
        await trio.sleep(10)
        assert sorted(item for _, item in work.ended) == list(range(10))


@pytest.mark.parametrize("function", ["fail", "fail_in_thread"])
async def test_a_traceback_begins_where_the_function_does(autojump_clock, tmp_path, function):
    async with pool(tmp_path, {"a": handling(f"{__name__}:{function}", retry=plain(1))}) as f:
        with f.tree.journal.subscribe() as feed:
            (id,) = await f.put("1")
            async for event in feed:
                if isinstance(event, ItemDead):
                    break
        await settle()
        lines = ((await f.show(id)).traceback or "").splitlines()
        assert lines[0] == "Traceback (most recent call last):" and lines[1].endswith(f"in {function}")
        assert lines[-1] == "OSError: no net"


# ---- pause ----


async def test_a_paused_job_claims_nothing_until_it_is_resumed(autojump_clock, tmp_path):
    work = taking(1)
    async with pool(tmp_path, {"a": handling(work, workers=2)}) as f:
        await f.tree.wait_running()
        await f.put("0")
        await settle()
        await f.tree.pause("a")
        await f.put("1", "2")
        await trio.sleep(10)
        assert work.ended == [(1.0, 0)]
        assert f.words("a:0", "a:1") == "a:0:paused a:1:paused"
        await f.tree.resume("a")
        await trio.sleep(5)
        assert sorted(work.began[1:]) == [(10.0, 1), (10.0, 2)]
        assert f.words("a:0", "a:1") == "a:0:running a:1:running"


async def test_the_workers_of_a_queue_that_is_paused_say_so_and_what_is_in_hand_goes_on(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(5)), "b": handling(taking(5), start="manual")}) as f:
        await f.put("1")
        await trio.sleep(3)
        await f.engine.pause(True)
        await trio.sleep(1)
        assert (f.word("a"), f.tree.journal.table["a"].cause) == ("running", "handles i1")
        await trio.sleep(4)
        assert (f.word("a"), f.tree.journal.table["a"].cause) == ("paused", "the queue is paused")
        await f.tree.start("b")
        await trio.sleep(2)
        assert f.words("a", "b") == "a:paused b:paused"
        await f.tree.pause("a")
        assert f.tree.journal.table["a"].cause == "paused"
        await f.tree.resume("a")
        assert f.tree.journal.table["a"].cause == "the queue is paused"
        await f.engine.pause(False)
        assert f.words("a", "b") == "a:running b:running"  # at once
        assert f.tree.journal.table["a"].cause == "idle"


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_paused_job_stays_paused_at_another_queue(autojump_clock, tmp_path, workers):
    work = taking(1)
    async with pool(tmp_path, {"a": handling(work, workers=workers)}) as f:
        await f.tree.wait_running()
        await f.tree.pause("a")
        spec = QueueSpec(backend="moody")
        f.tree.apply(replace(f.config({"a": job(work, queue="r", workers=workers)}), queues={"q": spec, "r": spec}))
        await trio.sleep(1)
        await f.tree.queues.engine("r").put_all(b"1")  # type: ignore[attr-defined]
        await trio.sleep(3)
        assert not work.began
        await f.tree.resume("a")
        await trio.sleep(3)
        assert len(work.ended) == 1


async def test_a_worker_stays_paused_over_its_restart(autojump_clock, tmp_path):
    work = taking(1)
    async with pool(tmp_path, {"a": handling(work)}) as f:
        await f.tree.wait_running()
        await f.tree.pause("a")
        await f.tree.restart("a")
        await f.put("1")
        await trio.sleep(3)
        assert not work.began


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_job_that_is_removed_while_it_is_paused_is_not_paused_when_it_comes_again(autojump_clock, tmp_path, workers):
    work = taking(1)
    async with pool(tmp_path, {"a": handling(work, workers=workers), "b": job(idle)}) as f:
        await f.tree.wait_running()
        await f.tree.pause("a")
        f.tree.apply(f.config({"b": f.tree.config.jobs["b"]}))
        await trio.sleep(20)
        f.tree.apply(f.config({"a": handling(work, workers=workers), "b": f.tree.config.jobs["b"]}))
        await f.put("1")
        await trio.sleep(5)
        assert work.ended


async def test_a_job_is_paused_whose_queue_is_not_open(autojump_clock, tmp_path, monkeypatch):
    monkeypatch.setitem(engines.QUEUES, "moody", engines.Scheme("no_such_module"))
    async with pool(tmp_path, {"a": handling(taking(1))}) as f:
        await trio.sleep(1)
        assert await at_once(f, "pause", "a") == "yes, paused: nothing is claimed; what is in hand goes on"
        assert await at_once(f, "resume", "a") == "yes, resumed"


async def test_a_worker_says_at_once_that_it_is_paused(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(1), workers=2)}) as f:
        await f.tree.wait_running()
        await trio.sleep(5)
        await f.tree.pause("a")
        assert f.words("a:0", "a:1") == "a:0:paused a:1:paused"
        await f.tree.resume("a")
        assert f.words("a:0", "a:1") == "a:0:running a:1:running"


async def test_what_ends_after_its_queue_was_removed_is_stored(autojump_clock, tmp_path):
    async def work(item: Any, ctx: Context) -> None:
        await trio.sleep(20)

    async with pool(tmp_path, {"a": handling(work, grace=Seconds(60))}) as f:
        await f.tree.wait_running()
        await f.put("1")
        await trio.sleep(1)
        engine = f.engine
        f.tree.apply(replace(f.config({"b": job(idle)}), queues={}))
        await trio.sleep(40)
        assert [ending.how for _, what, of in engine.asked if what == "finish" for ending in of] == ["done"]


async def test_the_engine_of_a_queue_is_what_it_was_opened_with(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(1))}) as f:
        await f.tree.wait_running()
        f.tree.apply(replace(f.config(f.tree.config.jobs), queues={"q": QueueSpec(backend="memory", size=7)}))
        await trio.sleep(1)
        assert (f.engine.settings.spec.backend, f.engine.settings.spec.size) == ("moody", 7)


@pytest.mark.parametrize(("verb", "instead"), [("run-now", "submit"), ("cancel", "cancel with the id of an item")])
async def test_what_makes_no_sense_for_a_queue_job_is_refused(autojump_clock, tmp_path, verb, instead):
    async with pool(tmp_path, {"a": handling(taking(1))}) as f:
        await f.tree.wait_running()
        assert f"handles the items of queue q: use {instead}" in await at_once(f, verb, "a")


# ---- cancel ----


async def test_a_cancelled_item_is_neither_tried_again_nor_dead(autojump_clock, tmp_path):
    work = taking(100)
    async with pool(tmp_path, {"a": handling(work)}) as f:
        ids = await f.put("1", "2")
        await trio.sleep(1)
        assert await f.engine.cancel(ids[0]) == "running"
        await settle()
        assert f.said(ItemCancelled) == [(1.0, "item i1 was cancelled")]
        assert await f.states(*ids) == "cancelled running"
        assert work.began == [(0.0, 1), (1.0, 2)]
        assert not f.events(ItemRetrying, ItemDead, Ended)


async def test_a_function_with_a_context_has_its_grace_when_its_item_is_cancelled(autojump_clock, tmp_path):
    async def work(item: Any, ctx: Context) -> None:
        await ctx.wait_stopping()
        heard.append(trio.current_time())
        await trio.sleep(100)

    heard: list[float] = []
    async with pool(tmp_path, {"a": handling(work, grace=3)}) as f:
        (id,) = await f.put("1")
        await trio.sleep(1)
        await f.engine.cancel(id)
        await trio.sleep(5)
        assert heard == [1.0]
        assert f.said(ItemCancelled) == [(4.0, "item i1 was cancelled")]


async def test_what_ends_well_after_it_was_cancelled_is_cancelled_all_the_same(autojump_clock, tmp_path):
    async def work(item: Any, ctx: Context) -> str:
        await ctx.wait_stopping()
        return "half of it"

    async with pool(tmp_path, {"a": handling(work)}) as f:
        (id,) = await f.put("1")
        await settle()
        await f.engine.cancel(id)
        await settle()
        assert await f.states(id) == "cancelled"


async def test_of_an_item_that_somebody_else_has_by_now_nothing_is_said(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(100))}) as f:
        (id,) = await f.put("1")
        await trio.sleep(1)
        f.tree.queues.desk("q").heard(Notice(what="lost", id=id))
        await trio.sleep(5)
        assert not f.engine.times("finish")
        assert f.events(ItemsHandled)[-1].lost == 1
        assert f.tree.journal.table["a"].cause == "idle"


# ---- policies ----


async def test_a_call_that_takes_too_long_has_failed_and_is_tried_again(autojump_clock, tmp_path):
    work = taking(100)
    async with pool(tmp_path, {"a": handling(work, timeout=2, retry=plain(2, 1))}) as f:
        await f.put("1")
        await trio.sleep(30)
        assert [at for at, _ in work.began] == [0.0, 3.0]
        assert f.said(ItemDead) == [(5.0, "item i1 is dead after 2 attempts: timed out after 2 s")]
        assert f.word("a") == "running"


async def test_a_deadline_holds_for_one_claim_with_its_waits(autojump_clock, tmp_path):
    work = taking(4)
    one = BulkheadSpec(concurrency=1)
    async with pool(tmp_path, {"a": handling(work, workers=2, deadline=5, bulkhead=one, retry=plain(2, 1))}) as f:
        await f.put("1", "2")
        await trio.sleep(6)
        ((at, cause),) = f.said(ItemRetrying)  # of one of the two
        assert (at, cause[7:]) == (5.0, ": attempt 1 of 2 failed: exceeded its deadline of 5 s")


async def test_an_open_breaker_gives_items_back_and_takes_none_until_its_trial(autojump_clock, tmp_path):
    async def work(item: Any) -> None:
        seen.append(trio.current_time())
        if len(seen) < 3:
            raise OSError

    seen: list[float] = []
    breaker = BreakerSpec(failures=2, within=Seconds(100), open_for=Seconds(30), successes=1)
    async with pool(tmp_path, {"a": handling(work, breaker=breaker, retry=plain(9, 0))}) as f:
        await f.put("1")
        await trio.sleep(100)
        assert seen == [0.0, 0.0, 30.0]
        assert f.events(ItemsHandled)[-1].back == 1
        assert f.events(ItemsHandled)[-1].retry == 2


async def test_a_rate_lets_so_many_begin_in_a_time(autojump_clock, tmp_path):
    work = taking(0)
    rate = RateSpec(rate=Rate(2.0))
    async with pool(tmp_path, {"a": handling(work, workers=3, rate=rate)}) as f:
        await f.put(*"1234")
        await trio.sleep(10)
        assert [at for at, _ in work.began] == [0.0, 0.5, 1.0, 1.5]


async def test_a_full_bulkhead_gives_items_back(autojump_clock, tmp_path):
    work = taking(5)
    one = BulkheadSpec(concurrency=1, waiting=0)
    async with pool(tmp_path, {"a": handling(work, workers=2, bulkhead=one)}) as f:
        ids = await f.put("1", "2")
        await trio.sleep(20)
        assert sorted(item for _, item in work.ended) == [1, 2]
        assert await f.states(*ids) == "done done"
        assert not f.events(ItemRetrying)


async def test_a_fallback_answers_an_item_that_has_failed_for_good(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(fail, retry=plain(2, 1), fallback=f"{__name__}:instead")}) as f:
        ids = await f.put("7", keep=True)
        await trio.sleep(5)
        assert answered == [(7, "no net")]
        assert await f.states(*ids) == "done"
        assert [at for at, _ in f.said(FallingBack)] == [1.0]
    answered.clear()


answered: list[tuple[Any, str]] = []


async def instead(item: Any, failure: Exception) -> None:
    answered.append((item, str(failure)))


async def test_of_a_batch_only_what_does_not_fit_is_answered_by_the_fallback(autojump_clock, tmp_path):
    async def work(items: list[int]) -> None:
        seen.append(items)

    seen: list[list[int]] = []
    batch = BatchSpec(size=3)
    async with pool(tmp_path, {"a": handling(work, batch=batch, fallback=f"{__name__}:instead", args={})}) as f:
        ids = await f.put("1", '"two"', "3", keep=True)
        await trio.sleep(5)
        assert await f.states(*ids) == "done done done"
        assert [item for item, _ in answered] == [["two"]]
        assert seen == [[1, 3]]
    answered.clear()


async def test_an_item_that_was_cancelled_is_not_answered_by_the_fallback(autojump_clock, tmp_path):
    async def work(item: Any, ctx: Context) -> None:
        await ctx.wait_stopping()
        raise ValueError("interrupted")

    async with pool(tmp_path, {"a": handling(work, retry=plain(1), fallback=f"{__name__}:instead")}) as f:
        ids = await f.put("1")
        await trio.sleep(1)
        await f.engine.cancel(ids[0])
        await trio.sleep(5)
        assert await f.states(*ids) == "cancelled"
        assert not answered


async def test_a_function_that_raises_what_limits_raise_has_failed(autojump_clock, tmp_path):
    async def work(item: Any) -> None:
        raise Rejected("somebody else's limit", retry_after=1)

    async with pool(tmp_path, {"a": handling(work, timeout=Seconds(60), retry=plain(3))}) as f:
        ids = await f.put("1")
        await trio.sleep(10)
        assert await f.states(*ids) == "dead"
        assert (await f.show(ids[0])).attempts == 3


# ---- batches ----


async def test_a_batch_goes_when_it_is_full_or_when_the_first_has_waited(autojump_clock, tmp_path):
    async def work(items: list[int]) -> None:
        seen.append((trio.current_time(), items))

    seen: list[tuple[float, list[int]]] = []
    async with pool(tmp_path, {"a": handling(work, batch=BatchSpec(size=3, within=Seconds(2)))}) as f:
        await f.put(*"12345")
        await trio.sleep(1)
        assert seen == [(0.0, [1, 2, 3])]
        await f.put("6")
        await trio.sleep(5)
        assert seen[1:] == [(1.0, [4, 5, 6])]
        await f.put("7")
        await trio.sleep(5)
        assert seen[2:] == [(8.0, [7])]


async def test_a_batch_that_is_not_full_goes_back_at_once_when_its_worker_is_stopped(autojump_clock, tmp_path):
    async def work(items: list[int]) -> None:
        raise AssertionError

    async with pool(tmp_path, {"a": handling(work, batch=BatchSpec(size=3, within=Seconds(60)))}) as f:
        await f.tree.wait_running()
        ids = await f.put("1", "2")
        await trio.sleep(1)
        assert await at_once(f, "stop", "a") == "yes, stopped"
        await settle()
        assert [(await f.show(id)).attempts for id in ids] == [0, 0]


async def test_each_item_of_a_batch_has_its_own_result_and_its_own_attempts(autojump_clock, tmp_path):
    async def work(items: list[int]) -> list[int]:
        if 3 in items and len(items) > 1:
            raise OSError
        return [2 * item for item in items]

    async with pool(tmp_path, {"a": handling(work, batch=BatchSpec(size=2), retry=plain(2, 1))}) as f:
        ids = await f.put(*"1234")
        await trio.sleep(10)
        assert [(await f.show(id)).result for id in ids[:2]] == [b"2", b"4"]
        assert await f.states(*ids[2:]) == "dead dead"


async def test_an_item_that_does_not_fit_is_dead_and_the_others_of_its_batch_are_handled(autojump_clock, tmp_path):
    async def work(items: list[int]) -> list[int]:
        return items

    async with pool(tmp_path, {"a": handling(work, batch=BatchSpec(size=3))}) as f:
        ids = await f.put("1", '"two"', "3")
        await trio.sleep(1)
        assert await f.states(*ids) == "done dead done"


async def test_a_batch_of_which_one_item_is_cancelled_goes_back(autojump_clock, tmp_path):
    async def work(items: list[int]) -> None:
        seen.append(items)
        await trio.sleep(5)

    seen: list[list[int]] = []
    async with pool(tmp_path, {"a": handling(work, batch=BatchSpec(size=3))}) as f:
        ids = await f.put("1", "2", "3")
        await trio.sleep(1)
        await f.engine.cancel(ids[1])
        await trio.sleep(10)
        assert seen == [[1, 2, 3], [1, 3]]
        assert await f.states(*ids) == "gone cancelled gone"


async def test_an_item_is_cancelled_at_once_that_waits_for_others_of_its_batch(autojump_clock, tmp_path):
    async def work(items: list[int]) -> None:
        seen.append((trio.current_time(), items))

    seen: list[tuple[float, list[int]]] = []
    async with pool(tmp_path, {"a": handling(work, batch=BatchSpec(size=3, within=Seconds(60)))}) as f:
        ids = await f.put("1", "2")
        await trio.sleep(1)
        await f.engine.cancel(ids[1])
        await trio.sleep(1)
        assert await f.states(*ids) == "running cancelled"
        await trio.sleep(100)
        assert seen == [(61.0, [1])]


# ---- fresh workers ----


async def test_a_worker_is_renewed_after_so_many_items_and_between_them(autojump_clock, tmp_path):
    work = taking(20)
    async with pool(tmp_path, {"a": handling(work, recycle=Recycle(runs=2), grace=1)}) as f:
        await f.put(*"12345")
        await trio.sleep(200)
        assert [item for _, item in work.ended] == [1, 2, 3, 4, 5]
        assert [event.cause for event in f.events(Starting)][1:] == ["recycled: it has handled 2 items"] * 2
        assert not any(event.failed for event in f.events(Ended))


async def test_what_was_turned_away_makes_no_worker_old(autojump_clock, tmp_path):
    work, one = taking(5), BulkheadSpec(concurrency=1, waiting=0)
    async with pool(tmp_path, {"a": handling(work, workers=2, bulkhead=one, recycle=Recycle(runs=2), grace=1)}) as f:
        await f.put("1", "2")
        await trio.sleep(20)
        assert len(work.ended) == 2
        assert len(f.events(Starting)) <= 2 + 2  # two workers and their group; at most one has handled both


async def test_a_worker_that_is_too_old_is_renewed_when_its_item_is_over(autojump_clock, tmp_path):
    work = taking(20)
    async with pool(tmp_path, {"a": handling(work, recycle=Recycle(age=Seconds(10)), grace=1)}) as f:
        await f.put("1", "2")
        await trio.sleep(100)
        assert work.ended == [(20.0, 1), (40.0, 2)]
        assert [event.cause for event in f.events(Starting)][1] == "recycled: it ran for 10s"


# ---- workers that are lost, and that have room ----


def fragile_job(room: int = 1, **keys: Any) -> Any:
    return job(fail, queue="q", kind="fragile", args={"room": room}, **keys)


async def test_the_item_of_a_lost_worker_is_tried_again_at_once_by_another(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": fragile_job(workers=2, retry=plain(3, 60))}) as f:
        await f.tree.wait_running()
        (id,) = await f.put('"die"')
        await trio.sleep(30)
        reason = "its process is gone"
        assert f.said(ItemRetrying)[0] == (0.0, f"item i1: attempt 1 of 3 failed: {reason}")
        assert f.said(ItemRetrying)[1] == (0.0, f"item i1: attempt 2 of 3 failed: {reason}")
        assert (await f.show(id)).attempts == 3
        assert [cause for _, cause in f.said(ItemDead)] == [f"item i1 is dead after 3 attempts: {reason}"]
        assert sorted((event.name, event.failed) for event in f.events(Ended)[:2]) == [("a:0", True), ("a:1", True)]
        assert f.words("a:0", "a:1") == "a:0:running a:1:running"  # after a backoff


async def test_what_a_lost_worker_had_not_begun_goes_back_without_an_attempt(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": fragile_job(room=4, retry=plain(3, 60))}) as f:
        await f.tree.wait_running()
        ids = await f.put(*['"die"'] * 4)
        await trio.sleep(0.4)  # less than the backoff of the worker
        assert sorted([(await f.show(id)).attempts for id in ids]) == [0, 0, 0, 1]
        assert f.tree.queues.desk("q").tally("a").back == 3


async def test_a_handler_is_given_as_much_as_it_has_room_for_and_no_more(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": fragile_job(room=3)}) as f:
        await f.tree.wait_running()
        ids = await f.put(*["1"] * 7)
        await trio.sleep(20)
        assert await f.states(*ids) == " ".join(["done"] * 7)
        assert fragile.most == {"under way": 0, "seen": 3}
        assert next(of[0] for _, what, of in f.engine.asked if what == "claim") == 3


async def test_several_in_hand_end_within_the_grace_or_go_back(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": fragile_job(room=3, grace=5)}) as f:
        await f.tree.wait_running()
        ids = await f.put("4", "4", "4")
        await trio.sleep(1)
        await f.tree.stop("a")
        await settle()
        assert trio.current_time() == 6.0
        assert sorted((await f.states(*ids)).split()) == ["done", "waiting", "waiting"]
        assert sorted([(await f.show(id)).attempts for id in ids]) == [0, 0, 1]


# ---- reload ----


async def test_a_reload_brings_queues_and_takes_them_away_with_their_jobs(autojump_clock, tmp_path):
    one, two = taking(1), taking(3)
    async with pool(tmp_path, {"a": handling(one)}) as f:
        await f.tree.wait_running()
        spec = QueueSpec(backend="moody")
        both = replace(f.config({"a": handling(one), "b": job(two, queue="r")}), queues={"q": spec, "r": spec})
        f.tree.apply(both)
        await settle()
        await f.tree.queues.engine("r").put_all(b"1")  # type: ignore[attr-defined]
        await settle()
        f.tree.apply(replace(f.config({"a": handling(one)}), queues={"q": spec}))
        with pytest.raises(LookupError, match="no queue 'r'"):
            f.tree.queues.engine("r")
        await trio.sleep(10)
        assert two.ended == [(3.0, 1)]  # it was in hand
        assert f.tree.queues.names == ("q",)


async def test_a_queue_that_comes_back_waits_until_it_has_gone(autojump_clock, tmp_path):
    work = taking(10)
    spec = QueueSpec(backend="moody")
    async with pool(tmp_path, {"a": handling(taking(1))}) as f:
        without = replace(f.config({"a": handling(taking(1))}), queues={"q": spec})
        both = replace(f.config({"a": handling(taking(1)), "b": job(work, queue="r")}), queues={"q": spec, "r": spec})
        f.tree.apply(both)
        await settle()
        first = f.tree.queues.engine("r")
        await first.put_all(b"1")  # type: ignore[attr-defined]
        await trio.sleep(1)
        f.tree.apply(without)
        await trio.sleep(1)
        f.tree.apply(both)
        await settle()
        with pytest.raises(QueueError, match="queue r is not open yet"):
            f.tree.queues.engine("r")
        await trio.sleep(20)
        assert work.ended == [(10.0, 1)]
        assert f.tree.queues.engine("r") is not first
        assert f.word("b") == "running"


async def test_new_policies_hold_from_the_next_item_on_without_a_restart(autojump_clock, tmp_path):
    work = taking(10)
    async with pool(tmp_path, {"a": handling(work)}) as f:
        await f.tree.wait_running()
        queues = {"q": QueueSpec(backend="moody")}
        f.tree.apply(replace(f.config({"a": handling(work, timeout=2, retry=plain(1))}), queues=queues))
        await f.put("1")
        await trio.sleep(5)
        assert f.said(ItemDead) == [(2.0, "item i1 is dead after 1 attempt: timed out after 2 s")]
        f.tree.apply(replace(f.config({"a": handling(work)}), queues=queues))
        await f.put("2")
        await trio.sleep(30)
        assert work.ended == [(15.0, 2)]
        assert len(f.events(Starting)) == 1


async def test_new_settings_of_a_queue_are_declared(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(1))}) as f:
        await f.tree.wait_running()
        spec = QueueSpec(backend="moody", size=5)
        f.tree.apply(replace(f.config({"a": handling(taking(1), serialize_by="key")}), queues={"q": spec}))
        await settle()
        assert f.engine.settings == Settings(spec=spec, group_by="key")


# ---- an engine that is away ----


async def test_an_engine_that_is_away_degrades_its_workers_and_ends_none(autojump_clock, tmp_path):
    work = taking(1)
    async with pool(tmp_path, {"a": handling(work, workers=2)}) as f:
        await f.tree.wait_running()
        await f.put("1")
        await settle()
        f.engine.broken = dict.fromkeys(("claim", "finish", "wait_for_work"), "no answer from redis://x: connection refused")
        await trio.sleep(20)
        assert f.words("a", "a:0", "a:1") == "a:degraded a:0:degraded a:1:degraded"
        ((at, cause),) = f.said(QueueDegraded)
        assert (at, cause) == (1.0, "queue q: cannot store what became of items: no answer from redis://x: connection refused")
        assert not f.events(Ended)
        f.engine.broken = {}
        await trio.sleep(10)
        assert f.words("a", "a:0", "a:1") == "a:running a:0:running a:1:running"
        assert len(f.said(QueueRecovered)) == 1
        assert await f.states("i1") == "done"
        assert work.began == [(0.0, 1)]


async def test_the_first_and_the_last_worker_say_so_too(autojump_clock, tmp_path):
    async with pool(tmp_path, {"a": handling(taking(1))}) as f:
        f.engine.broken = {"claim": "away"}
        await trio.sleep(3)
        assert f.word("a") == "degraded"
        assert await at_once(f, "stop", "a") == "yes, stopped"
        assert [event.name for event in f.events(Working)]
