"""What every engine must do: each sentence of `queues/protocol.py`, over all engines, with real servers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
import trio
import trio.testing
from hypothesis import strategies as st
from interleaving import CancelAtStep

from supervisor.queues import QUEUES, Place
from supervisor.queues.protocol import (
    Claimed,
    Counts,
    Demand,
    Draft,
    Ending,
    Engine,
    Item,
    Notice,
    QueueFull,
    Settings,
    State,
    new_id,
)
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.spec import Rate, Seconds
from supervisor.wall import WallClock

LONG = 3600.0
SOON = 0.2
LATE = 0.05
MANY = 1000  # attempts: more than any test needs
names = itertools.count(1)
now = WallClock().now


@dataclass
class Backend:
    """An engine, and where its queues are."""

    scheme: str
    url: str
    directory: Path
    name: str = ""
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = f"q{next(names)}"

    def open(
        self, *, listen: Callable[[Notice], None] = lambda notice: None, group_by: str | None = None, **spec: Any
    ) -> AbstractAsyncContextManager[Engine]:
        """A handle on the one queue of this test, with these settings."""
        settings = Settings(spec=QueueSpec(backend=self.url, **spec), group_by=group_by)
        place = Place(directory=self.directory, now=now, listen=listen, warn=self.warnings.append)
        return QUEUES[self.scheme].open(self.name, settings, place)


ENGINES = ("memory", "sqlite", "postgresql", "redis")
SHARED = ("postgresql", "redis")


@pytest.fixture(params=ENGINES)
def backend(request, tmp_path) -> Backend:
    return made(request, tmp_path)


@pytest.fixture(params=SHARED)
def shared(request, tmp_path) -> Backend:
    return made(request, tmp_path)


@pytest.fixture(params=[name for name in ENGINES if name != "memory"])
def durable(request, tmp_path) -> Backend:
    return made(request, tmp_path)


def made(request, directory: Path) -> Backend:
    scheme = request.param
    server = {"postgresql": "postgres", "redis": "redis"}.get(scheme)
    return Backend(scheme, request.getfixturevalue(server).url if server else scheme, directory)


# ---- the words of the tests ----


def draft(number: int = 0, **said: Any) -> Draft:
    return Draft(**{"id": new_id(), "payload": b'{"number":%d}' % number, **said})


def drafts(count: int, **said: Any) -> list[Draft]:
    return [draft(number, **said) for number in range(count)]


async def put(queue: Engine, *those: Draft) -> list[str]:
    """What became of each."""
    return [receipt.what for receipt in await queue.put(those)]


async def claim(queue: Engine, limit: int = 100, *, attempts: int = MANY, **said: Any) -> list[Item]:
    """Those that may run now."""
    return list((await queue.claim(limit, owner="tests", attempts=attempts, **said)).items)


async def claim_some(queue: Engine, limit: int = 100, **said: Any) -> list[Item]:
    """Those that may run, as soon as there is one."""
    while not (items := await claim(queue, limit, **said)):
        await queue.wait_for_work()
    return items


async def finish(queue: Engine, item: Item, how: str, **said: Any) -> bool:
    (stored,) = await queue.finish([Ending(id=item.id, token=item.token, how=how, **said)])
    return stored


def ids(those: Sequence[Any]) -> list[str]:
    return [each.id for each in those]


async def state_of(queue: Engine, id: str) -> State | None:
    record = await queue.show(id)
    return record and record.state


async def until(look: Callable[[], Awaitable[bool]]) -> None:
    """Where an engine promises that something is so in a while, and nobody is told when."""
    while not await look():
        await trio.sleep(0.02)


class Ear:
    """Notices, as they are heard."""

    def __init__(self) -> None:
        self.heard: list[Notice] = []
        self.some = trio.Event()

    def __call__(self, notice: Notice) -> None:
        self.heard.append(notice)
        self.some.set()
        self.some = trio.Event()

    async def wait_for(self, what: str, id: str = "") -> None:
        while Notice(what=what, id=id) not in self.heard:
            await self.some.wait()


@asynccontextmanager
async def waiting_for_work(queue: Engine) -> AsyncIterator[None]:
    """Somebody waits for work; what the block does must wake them."""
    woken = trio.Event()

    async def wait() -> None:
        await queue.wait_for_work()
        woken.set()

    with trio.move_on_after(LATE):  # what is told late, of what happened before
        await queue.wait_for_work()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        yield
        await woken.wait()


async def is_quiet(queue: Engine) -> bool:
    """Whether somebody who waits for work is left in peace: woken now and then, but not again and again."""
    woken = 0
    with trio.move_on_after(6 * LATE):
        while True:
            assert await claim(queue) == []
            await queue.wait_for_work()
            woken += 1
    return woken <= 3


# ---- put ----


async def test_what_is_put_is_there_as_it_was_put(backend):
    before = now()
    async with backend.open() as queue:
        assert queue.name == backend.name
        assert queue.shared is (backend.scheme in SHARED)
        assert queue.durable is (backend.scheme != "memory")
        payload = '{"Größe":1e400,"nul":"\\u0000","many":"%s"}' % ("x" * 100_000)
        mine = Draft(id=new_id(), payload=payload.encode(), priority=2, key="k", group="g", expire=LONG, keep=True)
        (receipt,) = await queue.put([mine])
        assert (receipt.id, receipt.what) == (mine.id, "stored")
        record = await queue.show(mine.id)
        assert (record.id, record.queue, record.state, record.attempts) == (mine.id, backend.name, State.WAITING, 0)
        assert (record.payload, record.priority, record.key, record.group) == (mine.payload, 2, "k", "g")
        assert record.expires_at == pytest.approx(record.ready_at + LONG, abs=0.01)
        assert before - 5 < record.put_at <= record.ready_at < now() + 5
        (item,) = await claim(queue)
        assert (item.id, item.payload, item.attempt, item.priority, item.group) == (mine.id, mine.payload, 1, 2, "g")
        assert (item.put_at, item.ready_at) == pytest.approx((record.put_at, record.ready_at), abs=0.01)
        taken = await queue.show(mine.id)
        assert (taken.state, taken.attempts) == (State.RUNNING, 1)
        assert "tests" in taken.owner
        assert record.put_at <= taken.started_at + 0.01
        assert (taken.lease_until is not None) is queue.shared
        assert await queue.show("0" * 26) is None


async def test_nothing_is_put_twice(backend):
    async with backend.open() as queue:
        first, second = drafts(2)
        assert await put(queue, first) == ["stored"]
        assert await put(queue, first, second, second) == ["known", "stored", "known"]
        (item, *_) = await claim(queue)
        assert await put(queue, first) == ["known"]  # it runs
        await finish(queue, item, "dead")
        assert await put(queue, first) == ["known"]  # and it is dead
        assert (await queue.counts()).waiting == 0
        assert await queue.put([]) == []


async def test_all_or_none(backend):
    async with backend.open(size=5) as queue:
        with pytest.raises(QueueFull):
            await queue.put(drafts(6))
        assert (await queue.counts()).waiting == 0
        there = drafts(4, delay=LONG)
        await queue.put(there)  # they wait, too
        with pytest.raises(QueueFull):
            await queue.put(drafts(2))
        assert await claim(queue) == []
        assert await put(queue, draft()) == ["stored"]
        assert await put(queue, *there) == ["known"] * 4  # needs no room: the answer to a put may have been lost


async def test_who_comes_back_always_fits(backend):
    async with backend.open(size=2) as queue:
        await queue.put(drafts(2))
        one, other = await claim(queue)
        await queue.put(drafts(2))
        assert await finish(queue, one, "retry")
        assert await finish(queue, other, "back")
        assert len(await claim(queue)) == 4


async def test_room_is_waited_for(backend):
    async with backend.open(size=2) as queue:
        await queue.put(drafts(2))
        stored = trio.Event()

        async def put_when_there_is_room() -> None:
            while True:
                try:
                    await queue.put(drafts(1))
                except QueueFull:
                    await queue.wait_for_room()
                else:
                    stored.set()
                    return

        for make_room in (lambda: claim(queue, 1), lambda: queue.purge(State.WAITING), cancel_first(queue)):
            stored = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(put_when_there_is_room)
                with trio.move_on_after(SOON):
                    await stored.wait()
                assert not stored.is_set()
                await make_room()
                await stored.wait()
            with pytest.raises(QueueFull):
                await queue.put(drafts(2))
            await queue.purge(State.WAITING)
            await queue.put(drafts(2))


def cancel_first(queue: Engine) -> Callable[[], Awaitable[object]]:
    async def cancel() -> None:
        (record,) = await queue.peek(State.WAITING, 1)
        assert await queue.cancel(record.id) == "cancelled"

    return cancel


# ---- order ----


async def test_first_come_first_served_the_most_urgent_before(backend):
    async with backend.open() as queue:
        those = [draft(number, priority=2 - number % 3) for number in range(12)]
        await queue.put(those[:6])
        for each in those[6:]:
            await queue.put([each])
        expected = [each.id for priority in range(3) for each in those if each.priority == priority]
        assert ids(await queue.peek(State.WAITING, 100)) == expected
        assert ids(await queue.peek(State.WAITING, 3)) == expected[:3]
        assert ids(await claim(queue, 5)) == expected[:5]
        assert ids(await claim(queue)) == expected[5:]


async def test_a_claim_may_prefer_another_order(backend):
    async with backend.open() as queue:
        those = [draft(priority=priority) for priority in range(3)]
        await queue.put(those)
        assert ids(await claim(queue, 2, order=[2])) == [those[2].id, those[0].id]
        assert ids(await claim(queue, 2, order=[2, 1, 0])) == [those[1].id]


async def test_what_is_given_back_comes_before_later_ones(backend):
    async with backend.open() as queue:
        those = drafts(3)
        await queue.put(those)
        first, _ = await claim(queue, 2)
        assert await finish(queue, first, "back")
        assert ids(await claim(queue)) == [those[0].id, those[2].id]


# ---- time ----


async def test_what_has_a_time_waits_for_it(backend):
    async with backend.open() as queue:
        moment = now()
        late, soon = draft(delay=LONG), draft(delay=SOON)
        at_late, at_soon = draft(at=moment + LONG), draft(at=moment + SOON)
        both_late, both_soon = draft(at=moment + LONG, delay=SOON), draft(at=moment - LONG, delay=SOON)
        past = draft(at=moment - LONG)
        await queue.put([late, soon, at_late, at_soon, both_late, both_soon, past])
        came = set(ids(await claim(queue)))
        assert past.id in came
        while len(came) < 4:
            came |= set(ids(await claim_some(queue)))
        assert came == {past.id, soon.id, at_soon.id, both_soon.id}
        counts = await queue.counts()
        assert (counts.waiting, counts.delayed, counts.running) == (0, 3, 4)
        assert ids(await queue.peek(State.WAITING, 10))[0] in {late.id, at_late.id, both_late.id}
        record = await queue.show(late.id)
        assert record.ready_at == pytest.approx(record.put_at + LONG, abs=0.01)


async def test_what_has_waited_too_long_expires(backend):
    async with backend.open() as queue:
        short, delayed, lasting = draft(expire=SOON, key="k"), draft(expire=SOON, delay=LONG), draft(expire=LONG)
        await queue.put([short, delayed, lasting])
        expires_at = (await queue.show(short.id)).expires_at
        await until(lambda: past(expires_at + 0.1))
        claimed = await queue.claim(10, owner="tests", attempts=MANY)
        assert (ids(claimed.items), claimed.expired) == ([lasting.id], 1)
        assert await state_of(queue, delayed.id) is State.WAITING
        assert await state_of(queue, short.id) is State.EXPIRED
        counts = await queue.counts()
        assert (counts.waiting, counts.delayed, counts.expired) == (0, 1, 1)
        assert ids(await queue.peek(State.EXPIRED, 10)) == [short.id]
        assert await queue.cancel(short.id) == "ended"
        assert await queue.purge(State.EXPIRED) == 1
        assert await queue.show(short.id) is None


async def test_what_has_expired_takes_up_no_room_and_is_counted_so_though_nobody_claims(backend):
    async with backend.open(size=3) as queue:
        short = drafts(2, expire=SOON)
        await queue.put([*short, draft(delay=LONG)])
        with pytest.raises(QueueFull):
            await queue.put(drafts(1))
        expires_at = (await queue.show(short[1].id)).expires_at
        await until(lambda: past(expires_at + 0.1))
        counts = await queue.counts()
        assert (counts.waiting, counts.delayed, counts.expired, counts.oldest) == (0, 1, 2, None)
        assert await put(queue, *drafts(2)) == ["stored"] * 2
        with pytest.raises(QueueFull):
            await queue.put(drafts(1))
        assert (await queue.claim(10, owner="tests", attempts=MANY)).expired == 2


async def test_the_clock_makes_room(backend):
    async with backend.open(size=1) as queue:
        await queue.put(drafts(1, expire=SOON))
        with pytest.raises(QueueFull):
            await queue.put(drafts(1))
        with trio.fail_after(60):
            while True:
                await queue.wait_for_room()
                with suppress(QueueFull):
                    assert await put(queue, draft()) == ["stored"]
                    break


async def past(moment: float) -> bool:
    return now() > moment


async def test_a_retry_is_claimable_after_its_delay(backend):
    async with backend.open() as queue:
        await queue.put(drafts(2))
        soon, late = await claim(queue)
        assert await finish(queue, soon, "retry", delay=SOON, error="no luck", traceback="Traceback")
        assert await finish(queue, late, "retry", delay=LONG)
        (again,) = await claim_some(queue)
        assert (again.id, again.attempt, again.payload) == (soon.id, 2, soon.payload)
        assert again.token > soon.token
        assert again.ready_at > soon.ready_at
        record = await queue.show(soon.id)
        assert (record.error, record.traceback, record.attempts) == ("no luck", "Traceback", 2)


# ---- attempts, endings, fencing ----


async def test_an_attempt_is_counted_by_the_claim(backend):
    async with backend.open() as queue:
        await queue.put([draft()])
        for attempt in (1, 2):
            (item,) = await claim(queue, attempts=2)
            assert item.attempt == attempt
            await finish(queue, item, "retry", error="no luck")
        claimed = await queue.claim(1, owner="tests", attempts=2)
        assert list(claimed.items) == []
        (dead,) = claimed.dead
        assert (dead.id, dead.state, dead.attempts, dead.error) == (item.id, State.DEAD, 2, "no luck")
        assert await state_of(queue, item.id) is State.DEAD
        assert not await finish(queue, item, "done")


async def test_what_is_given_back_has_its_attempt_again(backend):
    async with backend.open() as queue:
        await queue.put([draft()])
        tokens = []
        for _ in range(3):
            (item,) = await claim(queue, attempts=1)
            assert item.attempt == 1
            tokens.append(item.token)
            assert await finish(queue, item, "back")
            assert (await queue.show(item.id)).attempts == 0
        assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("how", ["done", "dead", "cancelled"])
async def test_an_end_is_final(backend, how):
    async with backend.open() as queue:
        await queue.put([draft(keep=True)])
        (item,) = await claim(queue)
        outcomes = {"done": {"result": b'{"size":[1,2]}'}, "dead": {"error": "broken", "traceback": "Traceback"}}
        said = outcomes.get(how, {})
        assert await finish(queue, item, how, **said)
        record = await queue.show(item.id)
        assert record.state is State(how)
        assert (record.result, record.error, record.traceback) == (said.get("result"), said.get("error"), said.get("traceback"))
        assert record.ended_at >= record.started_at - 0.01
        assert not await finish(queue, item, "done")
        assert await queue.renew([item]) == [False]
        assert await queue.cancel(item.id) == "ended"
        assert ids(await queue.peek(State(how), 10)) == [item.id]
        assert await claim(queue) == []
        counts = await queue.counts()
        assert (counts.waiting, counts.running, getattr(counts, how)) == (0, 0, 1)


async def test_who_has_an_old_token_has_lost_the_item(backend):
    async with backend.open() as queue:
        await queue.put([draft()])
        (old,) = await claim(queue)
        assert await queue.renew([old]) == [True]
        await finish(queue, old, "back")
        for stage in ("waiting", "running"):
            if stage == "running":
                (new,) = await claim(queue)
            for how in ("done", "retry", "dead", "cancelled", "back"):
                assert not await finish(queue, old, how, result=b"1")
            assert await queue.renew([old]) == [False]
            await queue.progress(old, 1, 2)
            record = await queue.show(old.id)
            assert (record.state, record.progress, record.result) == (State(stage), None, None)
        assert await queue.renew([old, new]) == [False, True]
        stored = await queue.finish([Ending(id=each.id, token=each.token, how="done") for each in (old, new)])
        assert stored == [False, True]


async def test_each_ending_is_stored_by_itself(backend):
    async with backend.open() as queue:
        await queue.put(drafts(5, keep=True))
        items = await claim(queue)
        stranger = Ending(id=new_id(), token=1, how="done")
        hows = ("done", "retry", "dead", "cancelled", "back")
        endings = [Ending(id=item.id, token=item.token, how=how) for item, how in zip(items, hows, strict=True)]
        assert await queue.finish([endings[0], stranger, *endings[1:]]) == [True, False, True, True, True, True]
        states = [await state_of(queue, item.id) for item in items]
        assert states == [State.DONE, State.WAITING, State.DEAD, State.CANCELLED, State.WAITING]
        assert await queue.finish([]) == [] and await queue.renew([]) == []


async def test_progress_is_noted(backend):
    async with backend.open() as queue:
        await queue.put([draft()])
        (item,) = await claim(queue)
        await queue.progress(item, 3, 10)
        assert (await queue.show(item.id)).progress == (3, 10)
        await queue.progress(item, 4.5, None)
        assert (await queue.show(item.id)).progress == (4.5, None)


async def test_what_returned_nothing_is_not_kept_unless_asked_for(backend):
    async with backend.open() as queue:
        plain, keep, result = draft(), draft(keep=True), draft()
        await queue.put([plain, keep, result])
        first, second, third = await claim(queue)
        for item, said in ((first, None), (second, None), (third, b"null")):
            assert await finish(queue, item, "done", result=said)
        assert await queue.show(plain.id) is None
        assert await queue.cancel(plain.id) == "unknown"
        assert (await state_of(queue, keep.id), await state_of(queue, result.id)) == (State.DONE, State.DONE)
        assert (await queue.show(result.id)).result == b"null"
        assert ids(await queue.peek(State.DONE, 1)) == [result.id]  # the latest first
        assert (await queue.counts()).done == 2
        assert await put(queue, plain) == ["stored"]  # it is not known any more


async def test_results_are_kept_for_so_long(backend):
    async with backend.open(keep_results=Seconds(0.5)) as queue:
        ended, dead = draft(keep=True), draft()
        await queue.put([ended, dead])
        first, second = await claim(queue)
        await finish(queue, first, "done", result=b"1")
        await finish(queue, second, "dead")

        async def gone() -> bool:
            return await queue.show(ended.id) is None

        await until(gone)
        assert (await queue.counts()).done == 0
        assert await queue.peek(State.DONE, 10) == []
        assert await state_of(queue, dead.id) is State.DEAD


# ---- unique ----


def unique(lifetime: Any, on_conflict: str) -> UniqueSpec:
    return UniqueSpec(lifetime=lifetime if isinstance(lifetime, str) else Seconds(lifetime), on_conflict=on_conflict)


ANSWER = {"reject": "rejected", "merge": "merged", "replace": "replaced"}


@pytest.mark.parametrize("on_conflict", ANSWER)
@pytest.mark.parametrize("lifetime", ["queued", "running", LONG])
async def test_a_key_is_taken_for_its_lifetime(backend, lifetime, on_conflict):
    async with backend.open(unique=unique(lifetime, on_conflict)) as queue:
        first, second, third, other, free = *drafts(3, key="k"), draft(key="other"), draft()
        assert await put(queue, first, other, free, draft()) == ["stored"] * 4
        (receipt,) = await queue.put([second])
        assert receipt.what == ANSWER[on_conflict]
        holder = second if on_conflict == "replace" else first
        assert receipt.id == holder.id
        assert await state_of(queue, holder.id) is State.WAITING
        assert await queue.show((first if holder is second else second).id) is None
        assert await put(queue, holder) == ["known"]
        by_id = {item.id: item for item in await claim(queue)}
        assert set(by_id) == {holder.id, other.id, *by_id}
        assert len(by_id) == 4
        (receipt,) = await queue.put([third])  # while it runs
        if lifetime == "queued":
            assert (receipt.what, receipt.id) == ("stored", third.id)
            return
        told = "merged" if on_conflict == "merge" else "rejected"
        assert (receipt.what, receipt.id) == (told, holder.id)
        await finish(queue, by_id[holder.id], "done")
        (receipt,) = await queue.put([third])  # when it has ended
        assert receipt.what == ("stored" if lifetime == "running" else told)
        assert receipt.id == (third.id if lifetime == "running" else holder.id)


@pytest.mark.parametrize("how", ["dead", "cancelled"])
async def test_a_key_is_free_when_its_item_has_ended_somehow(backend, how):
    async with backend.open(unique=unique("running", "reject")) as queue:
        await queue.put([draft(key="k")])
        (item,) = await claim(queue)
        await finish(queue, item, "retry")
        assert await put(queue, draft(key="k")) == ["rejected"]
        (item,) = await claim(queue)
        await finish(queue, item, how)
        waits = draft(key="k")
        assert await put(queue, waits) == ["stored"]
        await queue.cancel(waits.id)
        assert await put(queue, draft(key="k")) == ["stored"]
        await queue.purge(State.WAITING)
        assert await put(queue, draft(key="k")) == ["stored"]


async def test_a_key_may_be_taken_for_a_time(backend):
    async with backend.open(unique=unique(0.5, "reject")) as queue:
        assert await put(queue, first := draft(key="k")) == ["stored"]
        (item,) = await claim(queue)
        await finish(queue, item, "done")

        async def free() -> bool:
            (receipt,) = await queue.put([draft(key="k")])
            assert receipt.what == "stored" or (receipt.what, receipt.id) == ("rejected", first.id)
            return receipt.what == "stored"

        await until(free)


async def test_keys_within_one_put(backend):
    async with backend.open(unique=unique("running", "replace"), size=2) as queue:
        first, second, third = drafts(3, key="k")
        assert await put(queue, first, second) == ["stored", "replaced"]
        assert await put(queue, draft()) == ["stored"]
        assert await put(queue, third) == ["replaced"]  # it needs no more room
        assert set(ids(await queue.peek(State.WAITING, 10))) >= {third.id}
        assert (await queue.counts()).waiting == 2


async def test_what_replaces_another_stands_where_that_stood(backend):
    async with backend.open(unique=unique("running", "replace"), group_by="g") as queue:
        first, second, third, last = *drafts(3, key="k", group="a"), draft(key="k", group="a")
        other, slow = draft(group="a"), draft(priority=2)
        assert await put(queue, first, other, second) == ["stored", "stored", "replaced"]
        assert await put(queue, slow, third) == ["stored", "replaced"]
        assert ids(await queue.peek(State.WAITING, 10)) == ids([third, other, slow])
        assert ids(await claim(queue, 1)) == [third.id]
        assert await put(queue, last) == ["rejected"]


async def test_what_replaces_another_has_its_own_priority_and_time(backend):
    async with backend.open(unique=unique("queued", "replace")) as queue:
        often, late, other = draft(key="often"), draft(key="late"), draft()
        assert await put(queue, often, late, other) == ["stored"] * 3
        urgent, later = draft(key="often", priority=2), draft(key="late", delay=LONG)
        assert await put(queue, urgent, later) == ["replaced"] * 2
        assert ids(await queue.peek(State.WAITING, 10)) == ids([other, urgent, later])
        now_again = draft(key="late")  # which waited for its time until now
        assert await put(queue, now_again) == ["replaced"]
        assert ids(await claim(queue)) == ids([other, now_again, urgent])


async def test_who_is_one_with_another_may_wait_for_its_end_too(backend):
    async with backend.open(unique=unique("running", "merge")) as queue:
        known, merged, first = draft(), draft(key="k"), draft(key="new")
        await queue.put([known, merged])
        again = msgspec.structs.replace(known, keep=True)
        assert await put(queue, again, draft(key="k", keep=True)) == ["known", "merged"]
        assert await put(queue, first, draft(key="new", keep=True)) == ["stored", "merged"]
        for item in await claim(queue):
            await finish(queue, item, "done")
        for each in (known, merged, first):
            assert await state_of(queue, each.id) is State.DONE
    async with backend.open() as queue:
        known = draft()
        await queue.put([known])
        assert await put(queue, msgspec.structs.replace(known, keep=True)) == ["known"]
        (item,) = await claim(queue)
        await finish(queue, item, "done")
        assert await state_of(queue, known.id) is State.DONE


async def test_keys_mean_nothing_where_nothing_is_unique(backend):
    async with backend.open() as queue:
        assert await put(queue, *drafts(2, key="k")) == ["stored", "stored"]


# ---- limits ----


async def test_a_group_runs_one_at_a_time_in_its_order(backend):
    async with backend.open(group_by="customer") as queue:
        a, b, free = drafts(3, group="a"), drafts(2, group="b"), drafts(2)
        await queue.put([*a, *b, *free])
        items = await claim(queue)
        assert set(ids(items)) == {a[0].id, b[0].id, *ids(free)}
        assert await claim(queue) == []
        first = next(item for item in items if item.id == a[0].id)
        async with waiting_for_work(queue):
            await finish(queue, first, "done")
        (second,) = await claim_some(queue)
        assert second.id == a[1].id
        await finish(queue, second, "back")
        assert ids(await claim_some(queue)) == [a[1].id]
        assert await is_quiet(queue)


async def test_a_group_goes_on_though_the_next_one_is_cancelled(backend):
    async with backend.open(group_by="customer") as queue:
        those = drafts(3, group="a")
        await queue.put(those)
        (item,) = await claim(queue)
        await finish(queue, item, "done")
        await queue.cancel(those[1].id)  # it was its turn
        assert ids(await claim_some(queue)) == [those[2].id]


async def test_a_group_goes_on_though_those_before_are_dead(backend):
    async with backend.open(group_by="customer") as queue:
        first, second, third = drafts(3, group="a")
        await queue.put([first, second])
        (item,) = await claim(queue)
        await finish(queue, item, "retry")
        (item,) = await claim_some(queue)
        assert item.id == second.id
        await queue.put([third])
        assert await claim(queue) == []
        await finish(queue, item, "retry")
        assert ids(await claim_some(queue, attempts=1)) == [third.id]  # the others have used up their attempts


async def test_a_group_may_run_so_many_at_a_time(backend):
    async with backend.open(per_key=2, group_by="customer") as queue:
        those = drafts(4, group="a")
        await queue.put(those)
        items = await claim(queue)
        assert ids(items) == ids(those[:2])
        await finish(queue, items[1], "dead")
        assert ids(await claim_some(queue)) == [those[2].id]


async def test_a_queue_may_run_so_many_at_a_time(backend):
    async with backend.open(concurrency=2) as queue:
        those = drafts(4)
        await queue.put(those)
        items = await claim(queue)
        assert ids(items) == ids(those[:2])
        assert await claim(queue) == []
        assert await is_quiet(queue)
        async with waiting_for_work(queue):
            await finish(queue, items[1], "retry", delay=LONG)
        assert ids(await claim_some(queue)) == [those[2].id]
        assert await claim(queue) == []


async def test_a_queue_may_begin_so_many_in_a_time(backend):
    async with backend.open(rate=Rate(1 / LONG)) as queue:
        await queue.put(drafts(3))
        (item,) = await claim(queue)
        assert await claim(queue) == []
        assert await is_quiet(queue)
        await finish(queue, item, "done")
        assert await claim(queue) == []


async def test_what_a_rate_lets_through_comes_by_itself(backend):
    async with backend.open(rate=Rate(5)) as queue:
        await queue.put(drafts(7))
        came = await claim(queue)
        assert len(came) == 5  # what comes in a second is there at first
        while len(came) < 7:
            came += await claim_some(queue)


# ---- waiting for work ----


async def test_waiting_ends_for_each_reason(backend):
    async with backend.open() as queue:
        async with waiting_for_work(queue):
            await queue.put([draft()])
        (item,) = await claim_some(queue)
        async with waiting_for_work(queue):
            await finish(queue, item, "back")
        (item,) = await claim_some(queue)
        async with waiting_for_work(queue):
            await finish(queue, item, "retry")
        (item,) = await claim_some(queue)
        async with waiting_for_work(queue):
            await finish(queue, item, "retry", delay=SOON)
        (item,) = await claim_some(queue)
        await finish(queue, item, "dead")
        async with waiting_for_work(queue):
            assert await queue.requeue([item.id]) == 1
        assert len(await claim_some(queue)) == 1
        async with waiting_for_work(queue):
            await queue.put([draft(delay=SOON)])
        assert len(await claim_some(queue)) == 1
        await queue.pause(True)
        await queue.put([draft()])
        async with waiting_for_work(queue):
            await queue.pause(False)
        assert len(await claim_some(queue)) == 1


async def test_all_who_wait_for_work_are_woken(backend):
    async with backend.open() as queue:
        got: list[Item] = []

        async def worker() -> None:
            got.extend(await claim_some(queue, 1))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(worker)
            await queue.put(drafts(5))
        assert len(set(ids(got))) == 5


async def test_who_has_got_all_there_was_waits_for_more(backend):
    async with backend.open() as queue:
        await queue.put([draft(), draft(delay=LONG)])
        assert len(await claim(queue, 5)) == 1
        async with waiting_for_work(queue):
            await queue.put([more := draft()])
        assert ids(await claim(queue, 5)) == [more.id]
        assert await is_quiet(queue)


async def test_nobody_is_woken_without_a_reason(backend):
    async with backend.open() as queue:
        assert await is_quiet(queue)
        await queue.put([draft(delay=LONG)])
        assert await is_quiet(queue)
        await queue.pause(True)
        await queue.put([draft()])
        assert await is_quiet(queue)


async def test_who_waits_after_a_claim_that_was_filled_is_woken_by_what_is_left_and_by_what_comes(backend):
    async with backend.open() as queue:
        await queue.put(drafts(4))
        assert len(await claim(queue, 2)) == 2
        await queue.wait_for_work()  # there are two more
        assert len(await claim(queue, 2)) == 2  # which was all
        woken = 0
        with trio.move_on_after(6 * LATE):
            while woken <= 3:
                await queue.wait_for_work()
                woken += 1
        assert woken <= 3
        async with waiting_for_work(queue):
            await queue.put([draft()])


async def test_no_item_is_claimed_twice(backend):
    async with backend.open() as queue:
        those = drafts(300)
        got: list[str] = []

        async def worker() -> None:
            while items := await claim(queue, 7):
                got.extend(ids(items))
                await queue.finish([Ending(id=each.id, token=each.token, how="done") for each in items])

        async with trio.open_nursery() as nursery:
            for start in range(0, 300, 50):
                nursery.start_soon(queue.put, those[start : start + 50])
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(worker)
        assert sorted(got) == sorted(ids(those))
        counts = await queue.counts()
        assert (counts.waiting, counts.running) == (0, 0)


# ---- people ----


async def test_what_waits_is_cancelled_at_once(backend):
    ear = Ear()
    async with backend.open(listen=ear) as queue:
        waits, delayed = draft(keep=True), draft(delay=LONG)
        await queue.put([waits, delayed])
        assert await queue.cancel(waits.id) == "cancelled"
        await ear.wait_for("ended", waits.id)
        assert await queue.cancel(delayed.id) == "cancelled"
        assert await queue.cancel(waits.id) == "ended"
        assert await queue.cancel(new_id()) == "unknown"
        assert await claim(queue) == []
        counts = await queue.counts()
        assert (counts.waiting, counts.delayed, counts.cancelled) == (0, 0, 2)


@pytest.mark.parametrize("how", ["cancelled", "done", "retry", "back"])
async def test_who_has_what_is_cancelled_is_told(backend, how):
    ear = Ear()
    async with backend.open(listen=ear) as queue:
        await queue.put([draft()])
        (item,) = await claim(queue)
        assert await queue.cancel(item.id) == "running"
        await ear.wait_for("cancel", item.id)
        record = await queue.show(item.id)
        assert (record.state, record.cancelling) == (State.RUNNING, True)
        assert await finish(queue, item, how, result=b"1" if how == "done" else None)
        assert await state_of(queue, item.id) is (State.DONE if how == "done" else State.CANCELLED)
        assert await claim(queue) == []


async def test_the_dead_are_given_their_attempts_anew(backend):
    async with backend.open() as queue:
        those = drafts(4)
        await queue.put(those)
        for item in await claim(queue, 3):
            await finish(queue, item, "dead", error="broken")
        assert set(ids(await queue.peek(State.DEAD, 10))) == set(ids(those[:3]))
        assert len(await queue.peek(State.DEAD, 2)) == 2
        assert await queue.requeue([those[0].id, those[3].id, new_id()]) == 1
        assert (await queue.show(those[0].id)).attempts == 0
        assert {item.id: item.attempt for item in await claim(queue, attempts=1)} == {those[0].id: 1, those[3].id: 1}
        assert await queue.requeue() == 2
        assert await queue.requeue() == 0
        assert set(ids(await claim(queue))) == set(ids(those[1:3]))


async def test_a_state_is_purged(backend):
    async with backend.open() as queue:
        await queue.put([*drafts(3), *drafts(2, delay=LONG), *drafts(5, keep=True)])
        items = await claim(queue, 6)
        for item, how in zip(items[3:], ("done", "dead", "cancelled"), strict=True):
            await finish(queue, item, how)
        for state in (State.DONE, State.DEAD, State.CANCELLED):
            assert await queue.purge(state) == 1
            assert await queue.purge(state) == 0
        assert await queue.purge(State.WAITING) == 4
        counts = await queue.counts()
        assert (counts.waiting, counts.delayed, counts.running) == (0, 0, 3)
        assert (counts.done, counts.dead, counts.cancelled) == (0, 0, 0)
        assert await finish(queue, items[0], "done")
        assert await put(queue, draft()) == ["stored"]


async def test_a_paused_queue_gives_nothing(backend):
    ear = Ear()
    async with backend.open(listen=ear) as queue:
        await queue.put(drafts(2))
        (item,) = await claim(queue, 1)
        await queue.pause(True)
        await ear.wait_for("paused")
        assert (await queue.counts()).paused is True
        assert await claim(queue) == []
        assert await put(queue, draft()) == ["stored"]  # it takes
        assert await finish(queue, item, "back")  # and takes back
        assert await claim(queue) == []
        await queue.pause(False)
        await ear.wait_for("resumed")
        assert (await queue.counts()).paused is False
        assert len(await claim(queue)) == 3


async def test_the_counts_tell_how_long_the_first_has_waited(backend):
    async with backend.open() as queue:
        assert (await queue.counts()).oldest is None
        await queue.put(drafts(3, delay=LONG))
        assert (await queue.counts()).oldest is None
        await queue.put([draft()])
        assert 0 <= (await queue.counts()).oldest < LONG


async def test_who_waits_for_an_end_is_told(backend):
    ear = Ear()
    async with backend.open(listen=ear) as queue:
        those = drafts(3, keep=True)
        await queue.put(those)
        for item, how in zip(await claim(queue), ("done", "dead", "cancelled"), strict=True):
            await finish(queue, item, how)
            await ear.wait_for("ended", item.id)


async def test_who_comes_later_to_wait_for_an_end_is_told_too(backend):
    ear = Ear()
    async with backend.open(listen=ear) as queue:
        waits, runs, unknown = drafts(3)
        await queue.put([runs])
        (item,) = await claim(queue)
        await queue.put([waits])
        assert await queue.show(unknown.id, keep=True) is None
        for each, state in ((waits, State.WAITING), (runs, State.RUNNING)):
            for _ in range(2):
                assert (await queue.show(each.id, keep=True)).state is state
        assert (await queue.counts()).waiting == 1
        for each in (item, *await claim(queue)):
            assert await finish(queue, each, "done")
            await ear.wait_for("ended", each.id)
            assert (await queue.show(each.id, keep=True)).state is State.DONE


async def test_who_waits_for_the_end_of_what_is_replaced_is_told(backend):
    ear = Ear()
    async with backend.open(listen=ear, unique=unique("running", "replace")) as queue:
        first, second = draft(key="k", keep=True), draft(key="k")
        await queue.put([first])
        assert await put(queue, second) == ["replaced"]
        with trio.fail_after(20):
            await ear.wait_for("ended", first.id)


# ---- settings, and what outlives a handle ----


async def test_settings_are_declared(backend):
    async with backend.open(size=7, group_by="customer") as queue:
        assert (queue.settings.spec.size, queue.settings.group_by) == (7, "customer")
        assert await queue.declared() is None
        new = Settings(spec=QueueSpec(backend=backend.url, size=3, unique=unique(5.0, "merge"), rate=Rate(5)), group_by="shop")
        await queue.declare(new)
        assert queue.settings == new
        assert await queue.declared() == new
        with pytest.raises(QueueFull):
            await queue.put(drafts(4))
        assert await put(queue, *drafts(2, key="k")) == ["stored", "merged"]
        queue.use(Settings(spec=QueueSpec(backend=backend.url, size=9)))
        assert queue.settings.spec.size == 9
        assert await queue.declared() == new


async def test_what_was_put_outlives_the_handle(durable):
    those = drafts(3)
    async with durable.open() as queue:
        await queue.declare(queue.settings)
        await queue.put([those[0], draft(id=those[1].id, delay=LONG), draft(id=those[2].id, keep=True, priority=2)])
        await queue.pause(True)
    async with durable.open() as queue:
        assert await queue.declared() is not None
        assert (await queue.counts()).paused
        assert await claim(queue) == []
        await queue.pause(False)
        items = await claim(queue)
        assert ids(items) == [those[0].id, those[2].id]
        await finish(queue, items[0], "dead", error="broken")
        await finish(queue, items[1], "done", result=b"1")
    async with durable.open() as queue:
        counts = await queue.counts()
        assert (counts.waiting, counts.delayed, counts.running, counts.dead, counts.done) == (0, 1, 0, 1, 1)
        assert (await queue.show(those[0].id)).error == "broken"
        assert (await queue.show(those[2].id)).result == b"1"


async def test_what_was_claimed_and_never_finished_comes_again(durable):
    async with durable.open(lease=Seconds(0.3), per_key=1, concurrency=1) as queue:
        await queue.put([draft(group="a")])
        (lost,) = await claim(queue)
    async with durable.open(lease=Seconds(2), per_key=1, concurrency=1) as queue:
        (again,) = await claim_some(queue)
        assert (again.id, again.attempt) == (lost.id, 2)
        assert again.token > lost.token
        assert not await finish(queue, lost, "done")
        assert await finish(queue, again, "done")


async def test_a_memory_queue_says_what_it_drops(tmp_path):
    memory = Backend("memory", "memory", tmp_path)
    async with memory.open() as queue:
        await queue.put(drafts(3))
        await claim(queue, 1)
    (said,) = memory.warnings
    assert memory.name in said and "3" in said
    async with memory.open() as queue:
        assert (await queue.counts()).waiting == 0
    assert len(memory.warnings) == 1  # an empty one says nothing


# ---- several who share a queue ----


async def test_what_one_puts_another_has(shared):
    async with shared.open() as here, shared.open() as there:
        async with waiting_for_work(there):
            (mine,) = await here.put([draft()])
        (item,) = await claim_some(there)
        assert item.id == mine.id
        assert await claim(here) == []
        assert await state_of(here, item.id) is State.RUNNING
        async with waiting_for_work(here):
            await finish(there, item, "back")
        assert ids(await claim_some(here)) == [item.id]


async def test_what_one_cancels_another_is_told(shared):
    here_ear, there_ear = Ear(), Ear()
    async with shared.open(listen=here_ear) as here, shared.open(listen=there_ear) as there:
        await here.counts()  # each has connected
        await there.counts()
        await here.put([draft(keep=True)])
        (item,) = await claim_some(there)
        assert await here.cancel(item.id) == "running"
        await there_ear.wait_for("cancel", item.id)
        await finish(there, item, "cancelled")
        await here_ear.wait_for("ended", item.id)
        await here.pause(True)
        await there_ear.wait_for("paused")
        assert await claim(there) == []
        await there.put([draft()])
        async with waiting_for_work(there):
            await here.pause(False)
        await there_ear.wait_for("resumed")


async def test_limits_hold_for_all_who_share_it(shared):
    limits = {"concurrency": 3, "group_by": "customer"}
    async with shared.open(**limits) as here, shared.open(**limits) as there:
        a, b = drafts(3, group="a"), drafts(3)
        await here.put([*a, *b])
        (first, *_) = items = await claim(here, 2)
        assert first.id == a[0].id
        (third,) = await claim(there)
        assert third.group is None
        async with waiting_for_work(there):
            await finish(here, first, "done")
        assert len(await claim_some(there)) == 1
        assert await claim(here) == []
        assert len(items) == 2


async def test_a_rate_holds_for_all_who_share_it(shared):
    async with shared.open(rate=Rate(2 / LONG)) as here, shared.open(rate=Rate(2 / LONG)) as there:
        await here.put(drafts(3))
        assert len(await claim(here)) == 1
        assert await claim(there) == []


@dataclass
class Wanting:
    """Somebody who waits for work, and would claim so much."""

    queue: Engine
    limit: int = 10
    asked: int = 0
    claimed: Claimed | None = None
    """What the engine claimed by itself."""
    items: list[Item] = field(default_factory=list)
    """What was claimed after the wait."""
    waiting: trio.Event = field(default_factory=trio.Event)

    def demand(self) -> Demand:
        self.asked += 1
        return Demand(limit=self.limit, owner="tests", attempts=MANY)

    async def wait(self) -> None:
        """Until there is something."""
        while self.claimed is None and not self.items:
            self.items = await claim(self.queue, self.limit)
            if not self.items:
                self.waiting.set()
                self.claimed = await self.queue.wait_for_work(self.demand)
        self.waiting.set()  # nobody need wait for that any more

    async def waits(self) -> None:
        """Until it waits, and nothing is told any more of what happened before."""
        await self.waiting.wait()
        await trio.sleep(LATE)
        await trio.testing.wait_all_tasks_blocked()


async def brought(queue: Engine, limit: int, *those: Draft) -> list[Item]:
    """Put these while somebody waits for work; what the engine claimed together with the put. (Again, where what was told late
    has woken them before.)"""
    for _ in range(100):
        wanting = Wanting(queue, limit)
        with trio.move_on_after(5):  # others may have been sooner
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wanting.wait)
                await wanting.waits()
                assert await put(queue, *those) == ["stored"] * len(those)
        if wanting.claimed is not None:
            assert wanting.asked == 1
            return list(wanting.claimed.items)
        for item in [*wanting.items, *await claim(queue)]:
            await finish(queue, item, "cancelled")
        await queue.purge(State.CANCELLED)
    raise AssertionError("it never claims together with a put")


async def test_a_put_brings_what_its_own_process_waits_for(shared):
    async with shared.open() as queue, shared.open() as other:
        mine = drafts(3, keep=True)
        items = await brought(queue, 2, *mine)
        assert ids(items) == ids(mine[:2]) and [item.attempt for item in items] == [1, 1]
        assert ids(await claim(other)) == [mine[2].id]
        assert await finish(queue, items[0], "done")


async def test_who_waits_is_told_that_a_put_of_its_own_process_brings_nothing(shared):
    """Else nobody would know that its claim is over."""
    async with shared.open() as queue, shared.open() as other:
        await queue.put([known := draft(keep=True)])
        (item,) = await claim(queue)
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon((wanting := Wanting(queue)).wait)
                await wanting.waits()
                assert await put(queue, known) == ["known"]
            assert wanting.claimed is not None and not wanting.claimed.items
        async with trio.open_nursery() as nursery:
            nursery.start_soon((wanting := Wanting(queue)).wait)
            await wanting.waits()
            await other.put(drafts(1))
        assert wanting.claimed is None and len(wanting.items) == 1  # another's is told, and claimed then
        assert await finish(queue, item, "done")


async def test_what_a_put_brought_to_one_who_has_gone_away_is_given_back(shared):
    async with shared.open() as queue, shared.open() as other:

        async def nothing_runs() -> bool:
            return (await other.counts()).running == 0

        for _ in range(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon((wanting := Wanting(queue)).wait)
                await wanting.waits()

                async def bring() -> None:
                    await queue.put(drafts(1))

                nursery.start_soon(bring)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel(reason="nobody waits any more")
            for item in wanting.claimed.items if wanting.claimed else wanting.items:
                await finish(queue, item, "done")
            with trio.fail_after(60):
                await until(nothing_runs)
            for item in await claim(other):
                assert item.attempt == 1
                await finish(other, item, "done")


async def test_what_a_put_brought_to_one_who_dies_is_not_forgotten_by_the_others(shared):
    """They were not woken by the put, since nothing was left: but they know when its lease is over."""
    async with shared.open(lease=Seconds(1)) as other, trio.open_nursery() as nursery:
        waiting = trio.Event()

        @nursery.start_soon
        async def _() -> None:
            while not (items := await claim(other, 1)) or items[0].attempt == 1:
                for item in items:
                    await finish(other, item, "cancelled")
                waiting.set()
                await other.wait_for_work()

        async with shared.open(lease=Seconds(1)) as queue:
            await claim(queue)
            await waiting.wait()
            await brought(queue, 1, draft(keep=True))


async def test_settings_and_room_are_shared(shared):
    async with shared.open(size=2) as here, shared.open(size=2) as there:
        await here.declare(here.settings)
        assert await there.declared() == here.settings
        await here.put(drafts(2))
        with pytest.raises(QueueFull):
            await there.put([draft()])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.wait_for_room)
            await trio.testing.wait_all_tasks_blocked(SOON)
            await claim(here, 1)
        assert await put(there, draft()) == ["stored"]


async def test_a_lease_runs_out_and_another_takes_over(shared):
    lease = {"lease": Seconds(2), "concurrency": 2, "group_by": "customer"}
    async with shared.open(**lease) as here, shared.open(**lease) as there:
        await here.put([draft(group="a"), draft(group="b")])
        lost, kept = await claim(here)
        taken: list[Item] = []
        with trio.CancelScope() as renewing:

            async def renew() -> None:
                while True:
                    assert await here.renew([kept]) == [True]
                    await trio.sleep(0.1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(renew)
                taken += await claim_some(there)  # it is woken when the lease is over
                renewing.cancel(reason="another has taken over")
        assert [(each.id, each.attempt) for each in taken] == [(lost.id, 2)]
        assert await here.renew([lost]) == [False]
        assert not await finish(here, lost, "done")
        assert await finish(there, taken[0], "done")
        assert await finish(here, kept, "done")


async def test_who_was_cancelled_and_lost_is_not_given_to_another(shared):
    async with shared.open(lease=Seconds(2)) as here, shared.open(lease=Seconds(2)) as there:
        await here.put([mine := draft()])
        assert ids(await claim(here)) == [mine.id]
        assert await there.cancel(mine.id) == "running"

        async def over() -> bool:
            assert await claim(there) == []
            return await state_of(there, mine.id) is State.CANCELLED

        await until(over)


# ---- cancellation ----


async def test_cancelled_at_any_moment_the_queue_goes_on(backend):
    """Each call is cancelled before its first step, its second, and so on, until it ends before."""
    async with backend.open() as queue:
        for prepare, call in CALLS:
            step = 0
            while True:
                step += 1
                prepared = await prepare(queue)
                scope = trio.CancelScope()
                cancelling = CancelAtStep(scope, step)
                trio.lowlevel.add_instrument(cancelling)
                try:
                    with scope:
                        await call(queue, prepared)
                finally:
                    trio.lowlevel.remove_instrument(cancelling)
                await is_whole(queue, prepared if isinstance(prepared, Item) else None)
                if not scope.cancelled_caught:
                    break
                assert step < 1000


async def is_whole(queue: Engine, claimed: Item | None) -> None:
    """It gives out what it has, takes more, and the answers belong to the questions."""
    mine = draft()
    (receipt,) = await queue.put([mine])
    assert receipt.id == mine.id
    assert (await queue.show(mine.id)).id == mine.id
    assert await queue.cancel(mine.id) == "cancelled"
    await queue.pause(False)
    if claimed is not None:
        await finish(queue, claimed, "dead")
    for state in State:
        if state is not State.RUNNING:
            await queue.purge(state)
    assert await queue.counts() == Counts()


async def _one(queue: Engine) -> list[Draft]:
    await queue.put(those := [draft(keep=True)])
    return those


async def _running(queue: Engine) -> Item:
    await _one(queue)
    (item,) = await claim_some(queue, 1)
    return item


CALLS: list[tuple[Callable[[Engine], Awaitable[Any]], Callable[[Engine, Any], Awaitable[Any]]]] = [
    (_one, lambda queue, _: queue.put(drafts(3))),
    (_running, lambda queue, item: queue.renew([item])),
    (_running, lambda queue, item: finish(queue, item, "retry")),
    (_running, lambda queue, item: queue.progress(item, 1, 2)),
    (_running, lambda queue, item: queue.cancel(item.id)),
    (_one, lambda queue, _: queue.requeue()),
    (_one, lambda queue, _: queue.pause(True)),
    (_one, lambda queue, _: queue.counts()),
    (_one, lambda queue, those: queue.show(those[0].id)),
    (_one, lambda queue, _: queue.peek(State.WAITING, 3)),
    (_one, lambda queue, _: queue.purge(State.WAITING)),
]


async def test_a_claim_that_is_cancelled_loses_nothing_for_good(backend):
    """Whoever is cancelled in it has claimed nothing, or something whose lease runs out, or a restart brings back."""
    async with backend.open(lease=Seconds(1)) as queue:
        step = 0
        ended = False
        while not ended:
            step += 1
            await queue.put([draft()])
            scope = trio.CancelScope()
            cancelling = CancelAtStep(scope, step)
            trio.lowlevel.add_instrument(cancelling)
            got: list[Item] = []
            try:
                with scope:
                    got += await claim(queue)
            finally:
                trio.lowlevel.remove_instrument(cancelling)
            ended = not scope.cancelled_caught
            if queue.shared:
                got += [] if got else await claim_some(queue)
            elif not got:
                assert (await queue.counts()).running == 0  # a queue of our own would keep it for ever
                got += await claim(queue)
            assert len(got) == 1
            assert await finish(queue, got[0], "done")


# ---- a model ----


@dataclass
class Kept:
    """What the model knows of an item."""

    id: str
    priority: int
    group: str | None
    state: State = State.WAITING
    attempts: int = 0
    order: tuple[int, int] = (0, 0)
    item: Item | None = None
    cancelling: bool = False


class Model:
    """A queue as a plain list, and beside it the engine: both are told the same, and asked whether they agree."""

    ATTEMPTS, SIZE, CONCURRENCY = 2, 6, 4

    def __init__(self, queue: Engine) -> None:
        self.queue = queue
        self.kept: dict[str, Kept] = {}
        self.old: list[Item] = []
        self.paused = False
        self.clock = itertools.count(1)

    def those(self, state: State) -> list[Kept]:
        return sorted((each for each in self.kept.values() if each.state is state), key=lambda each: each.order)

    def chosen(self, number: int, *states: State) -> Kept | None:
        found = [each for each in self.kept.values() if each.state in states]
        return found[number % len(found)] if found else None

    async def do(self, step: tuple[str, int, int]) -> None:
        name, one, two = step
        await getattr(self, name)(one, two)
        await self.agree()

    async def agree(self) -> None:
        counts = await self.queue.counts()
        states = Counter(each.state for each in self.kept.values())
        told = {state: getattr(counts, state.value) for state in State if state is not State.WAITING}
        assert told == {state: states[state] for state in told}
        assert counts.waiting + counts.delayed == states[State.WAITING]
        assert counts.paused is self.paused
        assert ids(await self.queue.peek(State.WAITING, 100)) == ids(self.those(State.WAITING))

    async def put(self, one: int, two: int) -> None:
        those = [draft(n, priority=two % 3, group=[None, "a", "b"][n % 3], keep=True) for n in range(one % 3 + 1)]
        fits = len(self.those(State.WAITING)) + len(those) <= self.SIZE
        try:
            receipts = await self.queue.put(those)
        except QueueFull:
            assert not fits
            return
        assert fits and [each.what for each in receipts] == ["stored"] * len(those)
        for each in those:
            self.kept[each.id] = Kept(each.id, each.priority, each.group, order=(each.priority, next(self.clock)))

    async def put_again(self, one: int, two: int) -> None:
        if found := self.chosen(one, *State):
            (receipt,) = await self.queue.put([draft(id=found.id)])
            assert (receipt.id, receipt.what) == (found.id, "known")

    async def claim(self, one: int, two: int) -> None:
        limit = one % 4 + 1
        expected: list[str] = []
        running = len(self.those(State.RUNNING))
        busy = Counter(each.group for each in self.those(State.RUNNING) if each.group)
        for each in self.those(State.WAITING) if not self.paused else []:
            if each.attempts < self.ATTEMPTS and not busy[each.group]:
                expected.append(each.id)
                busy[each.group] += each.group is not None
        expected = expected[: min(limit, self.CONCURRENCY - running)]
        claimed = await self.queue.claim(limit, owner="tests", attempts=self.ATTEMPTS)
        told = ids(claimed.items)
        assert told == expected[: len(told)]
        assert len(told) == len(expected) or len(told) + len(claimed.dead) >= limit  # those that are dead may be in the limit
        for record in claimed.dead:
            assert self.kept[record.id].state is State.WAITING and self.kept[record.id].attempts >= self.ATTEMPTS
            self.kept[record.id].state = State.DEAD
        for item in claimed.items:
            kept = self.kept[item.id]
            kept.attempts += 1
            assert item.attempt == kept.attempts
            assert kept.item is None or item.token > kept.item.token
            kept.state, kept.item = State.RUNNING, item

    async def finish(self, one: int, two: int) -> None:
        if not (found := self.chosen(one, State.RUNNING)):
            return
        how = ("done", "retry", "dead", "cancelled", "back")[two % 5]
        assert await finish(self.queue, found.item, how, error="error")
        self.old.append(found.item)
        if how in ("retry", "back"):
            found.state = State.CANCELLED if found.cancelling else State.WAITING
            found.attempts -= how == "back"
            if how == "retry":  # it is claimable since now; what was given back, since when it was
                found.order = (found.priority, next(self.clock))
        else:
            found.state = State(how)

    async def finish_again(self, one: int, two: int) -> None:
        if self.old:
            old = self.old[one % len(self.old)]
            assert not await finish(self.queue, old, ("done", "retry", "dead", "cancelled", "back")[two % 5])
            assert await self.queue.renew([old]) == [False]

    async def renew(self, one: int, two: int) -> None:
        if found := self.chosen(one, State.RUNNING):
            assert await self.queue.renew([found.item]) == [True]

    async def cancel(self, one: int, two: int) -> None:
        if found := self.chosen(one, *State):
            told = await self.queue.cancel(found.id)
            assert told == {State.WAITING: "cancelled", State.RUNNING: "running"}.get(found.state, "ended")
            if found.state is State.WAITING:
                found.state = State.CANCELLED
            elif found.state is State.RUNNING:
                found.cancelling = True

    async def requeue(self, one: int, two: int) -> None:
        dead = sorted(self.those(State.DEAD), key=lambda each: each.id)[: 1 if two % 2 else None]
        for each in dead:  # one by one: together, their order is open
            assert await self.queue.requeue([each.id]) == 1
            each.state, each.attempts, each.order = State.WAITING, 0, (each.priority, next(self.clock))
            each.cancelling = False

    async def purge(self, one: int, two: int) -> None:
        state = [state for state in State if state is not State.RUNNING][one % 5]
        gone = [each.id for each in self.those(state)]
        assert await self.queue.purge(state) == len(gone)
        for id in gone:
            del self.kept[id]

    async def pause(self, one: int, two: int) -> None:
        self.paused = bool(one % 2)
        await self.queue.pause(self.paused)


STEPS = (
    "put",
    "put",
    "claim",
    "claim",
    "finish",
    "finish",
    "put_again",
    "finish_again",
    "renew",
    "cancel",
    "requeue",
    "purge",
    "pause",
)
numbers = st.integers(0, 11)
histories = st.lists(st.tuples(st.sampled_from(STEPS), numbers, numbers), max_size=40)


async def follow(backend: Backend, history: list[tuple[str, int, int]]) -> None:
    backend.name = f"q{next(names)}"
    async with backend.open(size=Model.SIZE, concurrency=Model.CONCURRENCY, group_by="customer") as queue:
        model = Model(queue)
        for step in history:
            await model.do(step)


a_few = hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck), deadline=None)


@a_few
@hypothesis.given(history=histories)
async def test_it_behaves_as_a_plain_list(backend, history):
    await follow(backend, history)


@pytest.mark.long
@pytest.mark.limit(1800)
@hypothesis.settings(a_few, max_examples=300)
@hypothesis.given(history=histories)
async def test_it_behaves_as_a_plain_list_for_long(backend, history):
    await follow(backend, history)
