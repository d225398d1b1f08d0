"""The queue in memory, in virtual time: what the contract leaves to each engine, and moments to the second."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import strategies as st

from supervisor.queues import QUEUES, Place, memory
from supervisor.queues.protocol import Draft, Ending, Engine, Item, Settings, State, new_id
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.spec import Rate, Seconds

EPOCH = 1_000_000.0


@asynccontextmanager
async def opened(tmp_path, group_by: str | None = None, warn: Callable[[str], None] = lambda text: None, **spec: Any):
    """A queue whose wall clock goes as Trio's does."""
    start = trio.current_time()
    place = Place(directory=tmp_path, now=lambda: EPOCH + trio.current_time() - start, listen=lambda notice: None, warn=warn)
    settings = Settings(spec=QueueSpec(backend="memory", **spec), group_by=group_by)
    async with QUEUES["memory"].open("q", settings, place) as engine:
        yield engine


def draft(**said: Any) -> Draft:
    return Draft(**{"id": new_id(), "payload": b"1", **said})


async def claim(queue: Engine, limit: int = 100) -> list[Item]:
    return list((await queue.claim(limit, owner="tests", attempts=100)).items)


async def finish(queue: Engine, item: Item, how: str = "done", **said: Any) -> None:
    assert await queue.finish([Ending(id=item.id, token=item.token, how=how, **said)]) == [True]


async def moments(queue: Engine, count: int) -> list[float]:
    """When so many items could be claimed, from now."""
    start, found = trio.current_time(), []
    while len(found) < count:
        found += [trio.current_time() - start] * len(await claim(queue))
        if len(found) < count:
            await queue.wait_for_work()
    return found


async def test_work_comes_at_its_moment(tmp_path, autojump_clock):
    async with opened(tmp_path) as queue:
        await queue.put([draft(delay=30), draft(), draft(at=EPOCH + 10), draft(at=EPOCH + 5, delay=20), draft(at=EPOCH - 9)])
        assert await moments(queue, 5) == [0, 0, 10, 20, 30]


async def test_who_waits_for_later_is_woken_for_what_is_sooner(tmp_path, autojump_clock):
    async with opened(tmp_path) as queue:
        await queue.put([draft(delay=1000)])
        found = []

        async def wait() -> None:
            found.extend(await moments(queue, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(10)
            await queue.put([draft(delay=5)])
        assert found == [15]


async def test_a_rate_is_kept_to_the_moment(tmp_path, autojump_clock):
    async with opened(tmp_path, rate=Rate.parse("30/m")) as queue:
        await queue.put([draft() for _ in range(5)])
        assert await moments(queue, 5) == [0, 2, 4, 6, 8]
        await trio.sleep(100)
        await queue.put([draft() for _ in range(3)])
        assert await moments(queue, 3) == [0, 2, 4]  # a quiet time saves up nothing
        await queue.declare(Settings(spec=QueueSpec(rate=Rate(3))))
        await queue.put([draft() for _ in range(4)])
        assert await moments(queue, 4) == [0, 0, 0, pytest.approx(1 / 3)]


async def test_a_retry_comes_after_its_delay_and_what_is_given_back_at_once(tmp_path, autojump_clock):
    async with opened(tmp_path) as queue:
        await queue.put([draft(), draft()])
        first, second = await claim(queue)
        await finish(queue, first, "retry", delay=7)
        await finish(queue, second, "back")
        assert await moments(queue, 2) == [0, 7]


async def test_expiry_counts_from_when_it_could_be_claimed(tmp_path, autojump_clock):
    async with opened(tmp_path) as queue:
        await queue.put([draft(expire=10, id="at once"), draft(expire=10, delay=50, id="later"), draft(expire=100, id="taken")])
        (taken,) = [item for item in await claim(queue) if item.id == "taken" or await finish(queue, item, "back")]
        await trio.sleep(9.5)
        assert (await queue.counts()).waiting == 1
        await trio.sleep(0.5)
        assert (await queue.counts()).expired == 1
        await trio.sleep(45)  # 55: "later" waits since 50
        assert (await queue.show("later")).state is State.WAITING
        await finish(queue, taken, "retry", delay=60)  # and counts anew: until 215
        await trio.sleep(5)
        assert (await queue.show("later")).state is State.EXPIRED
        await trio.sleep(154)
        assert (await queue.show("taken")).state is State.WAITING
        await trio.sleep(1)
        assert (await queue.show("taken")).state is State.EXPIRED


async def test_what_expires_makes_room(tmp_path, autojump_clock):
    async with opened(tmp_path, size=1) as queue:
        await queue.put([draft(expire=10)])
        start = trio.current_time()
        with pytest.raises(Exception, match="full"):
            await queue.put([draft()])
        await queue.wait_for_room()
        assert trio.current_time() == start + 10
        await queue.put([draft()])


async def test_ends_are_kept_for_so_long(tmp_path, autojump_clock):
    async with opened(tmp_path, keep_results=Seconds(60)) as queue:
        await queue.put([draft(id="result"), draft(id="dead"), draft(id="cancelled")])
        result, dead, _ = await claim(queue, 2) + [None]
        await finish(queue, result, result=b"1")
        await finish(queue, dead, "dead")
        await queue.cancel("cancelled")
        await trio.sleep(59)
        assert [(await queue.show(id)).state.value for id in ("result", "cancelled", "dead")] == ["done", "cancelled", "dead"]
        await trio.sleep(1)
        assert [await queue.show(id) for id in ("result", "cancelled")] == [None, None]
        counts = await queue.counts()
        assert (counts.done, counts.cancelled, counts.dead) == (0, 0, 1)


async def test_a_key_for_a_time_is_free_at_its_moment(tmp_path, autojump_clock):
    async with opened(tmp_path, unique=UniqueSpec(lifetime=Seconds(60), on_conflict="merge")) as queue:
        await queue.put([draft(key="k", id="first")])
        await trio.sleep(59)
        assert (await queue.put([draft(key="k")]))[0].id == "first"
        await trio.sleep(1)
        assert (await queue.put([draft(key="k", id="second")]))[0].what == "stored"


async def test_a_key_for_a_time_belongs_to_the_one_that_replaced(tmp_path, autojump_clock):
    async with opened(tmp_path, unique=UniqueSpec(lifetime=Seconds(60), on_conflict="replace")) as queue:
        await queue.put([draft(key="k")])
        await trio.sleep(30)
        assert (await queue.put([draft(key="k")]))[0].what == "replaced"
        await trio.sleep(40)
        assert (await queue.put([draft(key="k")]))[0].what == "replaced"  # the second's time is not over
        await trio.sleep(60)
        assert (await queue.put([draft(key="k")]))[0].what == "stored"


async def test_what_waits_again_has_come_nowhere_yet(tmp_path):
    async with opened(tmp_path) as queue:
        await queue.put([draft(id="mine")])
        for how in ("retry", "back", "dead"):
            (item,) = await claim(queue)
            await queue.progress(item, 1, 2)
            await finish(queue, item, how)
            await queue.requeue()
            record = await queue.show("mine")
            assert (record.state, record.progress, record.ended_at) == (State.WAITING, None, None)


async def test_unique_may_be_declared_while_there_are_items(tmp_path, autojump_clock):
    async with opened(tmp_path) as queue:
        await queue.put([draft(key="old", id="old")])
        await trio.sleep(30)
        await queue.put([draft(key="waits"), draft(key="runs", id="runs", priority=-1)])
        await claim(queue, 1)
        for lifetime, taken in (("queued", "old waits"), ("running", "old waits runs"), (Seconds(60), "old waits runs")):
            await queue.declare(Settings(spec=QueueSpec(unique=UniqueSpec(lifetime=lifetime))))
            receipts = {key: (await queue.put([draft(key=key)]))[0] for key in ("old", "waits", "runs")}
            assert {key for key, receipt in receipts.items() if receipt.what == "rejected"} == set(taken.split())
            if "runs" not in taken:
                await queue.cancel(receipts["runs"].id)
        await trio.sleep(30)  # "old" was put 60 s ago
        assert (await queue.put([draft(key="old")]))[0].what == "stored"
        assert (await queue.put([draft(key="waits")]))[0].what == "rejected"


async def test_the_oldest_is_known_whatever_it_waits_for(tmp_path, autojump_clock):
    async with opened(tmp_path, group_by="g") as queue:
        await queue.put([draft(group="a"), draft(group="a")])
        await claim(queue)
        await trio.sleep(5)
        await queue.put([draft(delay=2), draft()])
        assert (await queue.counts()).oldest == 5  # it waits for the other of its group


async def test_nothing_is_left_of_what_is_gone(tmp_path):
    """Hundreds of items that are replaced, cancelled, purged, finished: what is kept does not grow."""
    async with opened(tmp_path, unique=UniqueSpec(on_conflict="replace"), group_by="g", keep_results=Seconds(0)) as queue:
        for number in range(400):
            await queue.put([draft(key="k", expire=100, delay=number % 2), draft(group=f"g{number}", expire=100, id="mine")])
            await queue.cancel("mine")
            await queue.put([draft(id="run", group="g"), draft(id="behind", group="g")])
            for item in await claim(queue):
                await finish(queue, item)
            await queue.purge(State.WAITING)
        for _ in range(500):
            await queue.put([draft(key="same", delay=100)])
        kept = {name: len(value) for name, value in vars(queue).items() if isinstance(value, dict)}
        assert max(kept.values()) <= 4, kept
        lines = [queue._delayed, queue._expiring, queue._kept, queue._timed_keys, *queue._ready.values()]
        assert max(len(line._regular) + len(line._early) for line in lines) < 200


steps = st.lists(
    st.tuples(st.sampled_from(["put", "put", "claim", "retry", "back", "done", "sleep"]), st.integers(0, 20)), max_size=60
)


@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(steps=steps)
async def test_every_item_is_claimed_when_it_is_due_and_in_order(tmp_path, autojump_clock, steps):
    """Against a plain list: who is due, first the most urgent, then who has been due the longest."""
    async with opened(tmp_path) as queue:
        due: dict[str, tuple[float, float, int]] = {}
        held: list[tuple[Item, tuple[float, float, int]]] = []
        for number, (step, size) in enumerate(steps):
            if step == "put":
                mine = draft(priority=size % 2, delay=float(size // 2 % 4))
                await queue.put([mine])
                due[mine.id] = (mine.priority, trio.current_time() + mine.delay, number)
            elif step == "sleep":
                await trio.sleep(size / 4)
            elif step == "claim":
                now = trio.current_time()
                expected = sorted((each for each in due.items() if each[1][1] <= now), key=lambda each: each[1])[: size % 4]
                items = await claim(queue, size % 4)
                assert [item.id for item in items] == [id for id, _ in expected]
                held += [(item, due.pop(item.id)) for item in items]
            elif held:
                item, (priority, since, order) = held.pop(size % len(held))
                await finish(queue, item, step, delay=float(size % 3))
                if step != "done":
                    due[item.id] = (priority, since if step == "back" else trio.current_time() + size % 3, order)
        counts = await queue.counts()
        assert counts.waiting + counts.delayed == len(due)
        assert counts.running == len(held)


ENDS = ("retry", "back", "done")


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    per_key=st.integers(1, 2),
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "put", "claim", *ENDS, "cancel", "sleep"]), st.integers(0, 11)),
        min_size=20,
        max_size=60,
    ),
)
async def test_groups_run_in_their_order_as_many_as_may(tmp_path, autojump_clock, per_key, steps):
    """Against a plain list that is gone through from its beginning at each claim."""
    async with opened(tmp_path, group_by="g", per_key=per_key) as queue:
        due: dict[str, tuple[tuple[float, float, int], str | None]] = {}
        held: list[tuple[Item, tuple[float, float, int]]] = []
        for number, (step, size) in enumerate(steps):
            if step == "put":
                mine = draft(priority=size % 2, group=["a", "b", None][size // 2 % 3], delay=float(size // 6))
                await queue.put([mine])
                due[mine.id] = ((mine.priority, trio.current_time() + mine.delay, number), mine.group)
            elif step == "sleep":
                await trio.sleep(size / 8)
            elif step == "cancel" and due:
                id = [*due][size % len(due)]
                assert await queue.cancel(id) == "cancelled"
                del due[id]
            elif step == "claim":
                busy, expected = Counter(item.group for item, _ in held), []
                for id, ((_, since, _), group) in sorted(due.items(), key=lambda each: each[1][0]):
                    if len(expected) <= size % 3 and since <= trio.current_time() and (group is None or busy[group] < per_key):
                        expected.append(id)
                        busy[group] += 1
                items = await claim(queue, size % 3 + 1)
                assert [item.id for item in items] == expected
                held += [(item, due.pop(item.id)[0]) for item in items]
            elif step in ENDS and held:
                item, (priority, since, order) = held.pop(size % len(held))
                await finish(queue, item, step, delay=float(size % 3))
                if step != "done":
                    since = since if step == "back" else trio.current_time() + size % 3
                    due[item.id] = ((priority, since, order), item.group)
        counts = await queue.counts()
        assert (counts.waiting + counts.delayed, counts.running) == (len(due), len(held))


@contextmanager
def steps_counted() -> Iterator[Counter[str]]:
    """How many functions of the queue were called."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == memory.__file__:
            calls[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


async def test_what_waits_for_others_of_its_group_is_not_gone_through(tmp_path, autojump_clock):
    """However many these are: at a claim, when one of them has ended, when all expire."""
    took: dict[int, Counter[str]] = {}
    for many in (100, 3000):
        async with opened(tmp_path, group_by="g", size=5000) as queue:
            await queue.put([draft(group="a", expire=10, id=f"i{at}") for at in range(many)])
            await queue.put([draft(id="free")])
            with steps_counted() as took[many]:
                assert [item.id for item in await claim(queue)] == ["i0", "free"]
                assert not await claim(queue)
                await queue.cancel(f"i{many // 2}")
                await queue.finish([Ending(id="i0", token=1, how="done")])
                assert [item.id for item in await claim(queue)] == ["i1"]
            with steps_counted() as expiring:
                await trio.sleep(10)
                assert (await queue.counts()).expired == many - 3
            assert sum(expiring.values()) < 40 * many
    assert took[100] == took[3000]


async def test_a_cancelled_item_is_never_claimed_however_many_have_left_before_it(tmp_path):
    for many in range(60, 70):
        async with opened(tmp_path) as queue:
            await queue.put([draft(id=f"i{at}") for at in range(100)])
            for at in range(many):
                await queue.cancel(f"i{at}")
            assert [item.id for item in await claim(queue)] == [f"i{at}" for at in range(many, 100)]
            assert (await queue.counts()).waiting == 0


async def test_dead_items_are_bounded_the_oldest_are_forgotten_and_that_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MOST_DEAD", 3)
    said: list[str] = []
    async with opened(tmp_path, warn=said.append) as queue:
        for number in range(6):
            await queue.put([draft(id=f"i{number}")])
            (item,) = await claim(queue)
            await finish(queue, item, "dead", error="no net")
            assert len(said) == (number >= 3)
        assert said == ["queue q: more than 3 items are dead: those that died first are forgotten, as it is kept in memory"]
        assert [record.id for record in await queue.peek(State.DEAD, 10)] == ["i5", "i4", "i3"]
        assert (await queue.counts()).dead == 3
        assert await queue.show("i0") is None
        assert await queue.requeue(["i0", "i4"]) == 1
        assert await queue.purge(State.DEAD) == 2
        (item,) = await claim(queue)
        assert (item.id, item.attempt) == ("i4", 1)
        await finish(queue, item, "dead")
        assert (await queue.counts()).dead == 1


async def test_what_replaces_another_counts_its_expiry_from_its_own_time(tmp_path, autojump_clock):
    async with opened(tmp_path, unique=UniqueSpec(on_conflict="replace")) as queue:
        await queue.put([draft(key="k", expire=10)])
        await trio.sleep(9)
        await queue.put([draft(key="k", id="new", expire=10)])
        record = await queue.show("new")
        assert record.expires_at - EPOCH == pytest.approx(19)
        await trio.sleep(9.5)
        assert (await queue.counts()).waiting == 1
        await trio.sleep(0.5)
        assert (await queue.counts()).expired == 1
