"""The desk by itself: claims, endings, leases and notices, over an engine that fails on command. In virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import hypothesis.strategies as some
import pytest
import trio
from hypothesis import given, settings
from trio.testing import MockClock

from supervisor.events import Event, ItemDead, ItemLost, Journal, QueueDegraded, QueueRecovered, Warned
from supervisor.queues import Place, desk, memory
from supervisor.queues.desk import Desk, open_desk
from supervisor.queues.protocol import Ending, Notice, Settings, State
from supervisor.queues.seat import Call, Seat
from supervisor.queues.spec import QueueSpec
from supervisor.spec import Seconds
from tests.forest import settle
from tests.moody import Moody


class Me:
    """Somebody who sits at a desk, and remembers which of its calls were to end, and why."""

    def __init__(self, job: str = "a") -> None:
        self.job = job
        self.cut: list[tuple[float, str, str]] = []

    def hears(self, call: Call, why: str) -> None:
        self.cut.append((trio.current_time(), call.items[0].id, why))


class Bench:
    """A desk at a queue of its own, and what has happened."""

    def __init__(self, engine: Moody, opened: Desk, events: list[tuple[float, Event]]) -> None:
        self.engine = engine
        self.desk = opened
        self.events = events

    def seat(self, me: Me | None = None, attempts: int = 3) -> Seat:
        me = me or Me()
        return self.desk.seat(me, attempts, me.hears)

    def said(self, kind: Any) -> list[tuple[float, str]]:
        return [(at, getattr(event, "cause", "")) for at, event in self.events if isinstance(event, kind)]

    async def states(self, *ids: str) -> str:
        records = [await self.engine.show(id) for id in ids]
        return " ".join("gone" if record is None else record.state.value for record in records)


@asynccontextmanager
async def bench(tmp_path: Any, patience: float = 10, shared: bool = False, **queue: Any) -> AsyncIterator[Bench]:
    events: list[tuple[float, Event]] = []
    journal = Journal()
    journal.add_sink(lambda event: events.append((trio.current_time(), event)))
    opened: list[Desk] = []

    def heard(notice: Notice) -> None:
        for each in opened:
            each.heard(notice)

    place = Place(directory=tmp_path, now=trio.current_time, listen=heard, warn=lambda text: None)
    spec = QueueSpec(backend="memory", **queue)
    async with memory.open("q", Settings(spec=spec), place) as queue_:
        engine = Moody(queue_)
        engine.shared = shared
        async with open_desk(
            engine,  # type: ignore[arg-type]
            "me@here",
            journal,
            trio.current_time,
            lambda low, high: 1.0,
            lambda: trio.current_time() + patience,
        ) as one:
            opened.append(one)
            yield Bench(engine, one, events)


def ended(call: Call, how: Any = "done") -> list[Ending]:
    return [Ending(id=item.id, token=item.token, how=how) for item in call.items]


def ids(call: Call | None) -> list[str]:
    assert call is not None
    return [item.id for item in call.items]


# ---- claiming ----


async def test_one_claim_is_made_for_all_that_are_free(autojump_clock, tmp_path):
    async with bench(tmp_path) as b, trio.open_nursery() as nursery:

        async def work() -> None:
            with b.seat() as seat:
                taken.extend(ids(await seat.take()))

        taken: list[str] = []
        for _ in range(5):
            nursery.start_soon(work)
        await settle()
        await b.engine.put_all(*[b"1"] * 5)
        await settle()
        assert sorted(taken) == ["i1", "i2", "i3", "i4", "i5"]
        limits = [of[0] for _, what, of in b.engine.asked if what == "claim"]
        assert max(limits) == 5
        assert len(limits) == 2  # before there was anything, and after


async def test_nobody_free_nothing_claimed(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1")
        await trio.sleep(10)
        assert not b.engine.times("claim")


async def test_who_is_gone_when_the_claim_answers_holds_nothing(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1")
        b.engine.stuck["claim"] = gate = trio.Event()
        with b.seat() as seat, trio.move_on_after(1):
            await seat.take()
        gate.set()
        await settle()
        record = await b.engine.show("i1")
        assert record is not None
        assert (record.state, record.attempts) == (State.WAITING, 0)


async def test_who_leaves_while_it_waits_gets_none(autojump_clock, tmp_path):
    async with bench(tmp_path) as b, trio.open_nursery() as nursery:
        with b.seat() as seat:

            async def leave() -> None:
                await trio.sleep(1)
                seat.leave()

            nursery.start_soon(leave)
            assert await seat.take() is None
            assert await seat.take() is None
            assert trio.current_time() == 1.0


async def test_jobs_with_other_limits_of_attempts_get_claims_of_their_own(autojump_clock, tmp_path):
    async with bench(tmp_path) as b, trio.open_nursery() as nursery:

        async def work(attempts: int) -> None:
            with b.seat(Me(f"a{attempts}"), attempts) as seat:
                for _ in range(2):
                    call = await seat.take()
                    assert call is not None
                    seat.end(call, ended(call, "retry"))
                    taken[attempts] += 1

        taken: Counter[int] = Counter()
        nursery.start_soon(work, 9)
        nursery.start_soon(work, 5)
        await settle()
        await b.engine.put_all(b"1", b"2")
        await settle()
        assert taken == {9: 2, 5: 2}
        claims = [(of[0], of[2]) for _, what, of in b.engine.asked if what == "claim"]
        assert {limit for limit, _ in claims} == {1}
        assert {attempts for _, attempts in claims} == {5, 9}


async def test_fair_queues_let_each_priority_come_first_twice_as_often_as_the_next(autojump_clock, tmp_path):
    async with bench(tmp_path, fair=True) as b:
        for priority in range(3):
            await b.engine.put_all(*[b"%d" % priority] * 70, priority=priority)
        seen: Counter[bytes] = Counter()
        with b.seat() as seat:
            for _ in range(70):
                call = await seat.take()
                assert call is not None
                seen[call.items[0].payload] += 1
                seat.end(call, ended(call))
        assert seen == {b"0": 40, b"1": 20, b"2": 10}


async def test_fair_queues_share_out_among_many_that_are_free_too(autojump_clock, tmp_path):
    seen: Counter[bytes] = Counter()
    async with bench(tmp_path, fair=True) as b, trio.open_nursery() as nursery:

        async def work() -> None:
            with b.seat() as seat:
                call = await seat.take()
                assert call is not None
                seen[call.items[0].payload] += 1
                seat.end(call, ended(call))

        for priority in range(3):
            await b.engine.put_all(*[b"%d" % priority] * 70, priority=priority)
        for _ in range(70):
            nursery.start_soon(work)
    assert seen == {b"0": 40, b"1": 20, b"2": 10}


async def test_an_item_that_comes_dead_from_the_claim_is_said_to_be(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1")
        for _ in range(3):
            (item,) = (await b.engine._queue.claim(1, owner="other", attempts=3)).items
            await b.engine._queue.finish([Ending(id=item.id, token=item.token, how="retry")])
        with b.seat(attempts=3) as seat, trio.move_on_after(1):
            await seat.take()
        assert len(b.said(ItemDead)) == 1
        assert await b.states("i1") == "dead"


# ---- endings ----


async def test_what_ends_while_a_bulk_is_stored_goes_into_the_next(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(*[b"1"] * 4)
        b.engine.stuck["finish"] = gate = trio.Event()
        with b.seat() as seat:
            for _ in range(4):
                call = await seat.take()
                assert call is not None
                seat.end(call, ended(call))
                await settle()
            del b.engine.stuck["finish"]
            gate.set()
            await settle()
        bulks = [[ending.id for ending in of] for _, what, of in b.engine.asked if what == "finish"]
        assert bulks == [["i1"], ["i2", "i3", "i4"]]


async def test_endings_are_stored_when_the_engine_is_back(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1")
        b.engine.broken["finish"] = "disk full"
        with b.seat() as seat:
            call = await seat.take()
            assert call is not None
            seat.end(call, ended(call))
            await trio.sleep(30)
            assert b.engine.times("finish")[:5] == pytest.approx([0, 0.2, 0.6, 1.4, 3.0])
            assert (
                max(later - at for at, later in zip(b.engine.times("finish"), b.engine.times("finish")[1:], strict=False)) == 5
            )
            assert b.said(QueueDegraded) == [(0.0, "queue q: cannot store what became of items: disk full")]
            b.engine.broken.clear()
            await trio.sleep(5)
            assert len(b.said(QueueRecovered)) == 1
            assert await b.states("i1") == "gone"
            assert not b.said(ItemLost)


async def test_who_has_too_much_unsaved_takes_nothing_new(autojump_clock, tmp_path, monkeypatch):
    monkeypatch.setattr(desk, "MOST_UNSAVED", 3)
    async with bench(tmp_path) as b, trio.open_nursery() as nursery:
        await b.engine.put_all(*[b"1"] * 10)
        b.engine.broken["finish"] = "disk full"
        taken: list[str] = []

        async def work() -> None:
            with b.seat() as seat:
                while (call := await seat.take()) is not None and len(taken) < 9:
                    taken.extend(ids(call))
                    seat.end(call, ended(call))

        nursery.start_soon(work)
        await trio.sleep(60)
        assert len(taken) == 3
        b.engine.broken.clear()
        await trio.sleep(60)
        assert len(taken) == 9


async def test_at_the_end_what_is_known_is_stored_and_what_cannot_be_is_said(autojump_clock, tmp_path):
    async with bench(tmp_path, patience=7) as b:
        await b.engine.put_all(b"1", b"2")
        b.engine.broken["finish"] = "away"
        with b.seat() as seat:
            for _ in range(2):
                call = await seat.take()
                assert call is not None
                seat.end(call, ended(call))
    assert trio.current_time() == 7.0
    assert [event.text for _, event in b.events if isinstance(event, Warned)] == [
        "queue q: what became of 2 items could not be stored: they will be handled again"
    ]


async def test_the_end_waits_for_no_engine_where_there_is_nothing_to_store(autojump_clock, tmp_path):
    async with bench(tmp_path, patience=1000) as b:
        b.engine.broken = {"claim": "away", "wait_for_work": "away"}
        with b.seat() as seat, trio.move_on_after(2):
            await seat.take()
    assert trio.current_time() == 2.0


async def test_the_end_waits_for_a_claim_that_nobody_wants_any_more_and_no_longer(autojump_clock, tmp_path):
    gate = trio.Event()

    async def answer() -> None:
        await trio.sleep(3)
        gate.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        async with bench(tmp_path, patience=1000) as b:
            b.engine.stuck["claim"] = gate
            with b.seat() as seat, trio.move_on_after(1):
                await seat.take()
        assert trio.current_time() == 3.0


# ---- leases ----


async def test_leases_are_renewed_at_a_third_for_all_that_is_held(autojump_clock, tmp_path):
    async with bench(tmp_path, shared=True, lease=Seconds(30)) as b:
        await b.engine.put_all(b"1", b"2")
        with b.seat() as one, b.seat() as two:
            first, second = await one.take(), await two.take()
            assert first is not None
            assert second is not None
            await trio.sleep(15)
            one.end(first, ended(first))
            await trio.sleep(10)
            two.end(second, ended(second))
            await trio.sleep(100)
        renewed = [(at, sorted(of)) for at, what, of in b.engine.asked if what == "renew"]
        assert renewed == [(10.0, ["i1", "i2"]), (20.0, ["i2"])]


async def test_an_engine_that_nobody_shares_is_never_asked_for_leases(autojump_clock, tmp_path):
    async with bench(tmp_path, lease=Seconds(30)) as b:
        await b.engine.put_all(b"1")
        with b.seat() as seat:
            await seat.take()
            await trio.sleep(100)
        assert not b.engine.times("renew")


async def test_a_lease_that_was_lost_ends_the_call_and_its_ending_is_dropped(autojump_clock, tmp_path):
    me = Me()
    async with bench(tmp_path, shared=True, lease=Seconds(30)) as b:
        await b.engine.put_all(b"1")
        with b.seat(me) as seat:
            call = await seat.take()
            assert call is not None
            b.engine.taken.add("i1")
            await trio.sleep(15)
            assert me.cut == [(10.0, "i1", "its lease was lost: somebody else has it")]
            assert call.fates == {"i1": "lost"}
            assert b.said(ItemLost) == [(10.0, "item i1: its lease was lost: somebody else has it")]
            assert seat.tally.lost == 1
            seat.end(call, [])
            await trio.sleep(100)
        assert b.engine.times("renew") == [10.0]
        assert not b.engine.times("finish")


async def test_an_engine_that_says_that_a_lease_was_lost_is_heard_at_once(autojump_clock, tmp_path):
    me = Me()
    async with bench(tmp_path, shared=True, lease=Seconds(30)) as b:
        await b.engine.put_all(b"1")
        with b.seat(me) as seat:
            await seat.take()
            b.desk.heard(Notice(what="lost", id="i1"))
            assert me.cut == [(0.0, "i1", "its lease was lost")]


@pytest.mark.parametrize("how", ["broken", "stuck"])
async def test_a_lease_that_cannot_be_renewed_for_all_its_length_is_lost(autojump_clock, tmp_path, how):
    me = Me()
    async with bench(tmp_path, shared=True, lease=Seconds(30)) as b:
        await b.engine.put_all(b"1")
        with b.seat(me) as seat:
            call = await seat.take()
            assert call is not None
            getattr(b.engine, how)["renew"] = "connection refused" if how == "broken" else trio.Event()
            await trio.sleep(100)
            ((at, _, why),) = me.cut
            assert at == 30.0
            assert why.startswith("its lease ran out, and could not be renewed: ")
            seat.end(call, [])


async def test_a_lease_that_is_renewed_in_time_is_kept_over_an_outage(autojump_clock, tmp_path):
    me = Me()
    async with bench(tmp_path, shared=True, lease=Seconds(30)) as b:
        await b.engine.put_all(b"1")
        with b.seat(me) as seat:
            call = await seat.take()
            assert call is not None
            await trio.sleep(5)
            b.engine.broken["renew"] = "connection refused"
            await trio.sleep(20)
            b.engine.broken.clear()
            await trio.sleep(100)
            assert not me.cut
            seat.end(call, ended(call))


async def test_an_ending_that_comes_too_late_is_dropped_and_said(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1")
        with b.seat() as seat:
            call = await seat.take()
            assert call is not None
            b.engine.taken.add("i1")
            seat.end(call, ended(call))
            await settle()
        assert b.said(ItemLost) == [(0.0, "item i1: what became of it came too late: somebody else has it")]


async def test_an_ending_whose_answer_was_lost_is_no_lost_lease(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1")
        b.engine.deaf = True
        with b.seat() as seat:
            call = await seat.take()
            assert call is not None
            seat.end(call, ended(call))
            await trio.sleep(5)
        assert len(b.engine.times("finish")) == 2
        assert not b.said(ItemLost)


# ---- cancels ----


async def test_a_cancel_ends_the_call_that_has_the_item(autojump_clock, tmp_path):
    me, other = Me(), Me()
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1", b"2")
        with b.seat(me) as seat, b.seat(other) as another:
            call, _ = await seat.take(), await another.take()
            assert await b.engine.cancel("i1") == "running"
            assert me.cut == [(0.0, "i1", "the item was cancelled")]
            assert not other.cut
            assert call is not None
            assert call.fates == {"i1": "cancelled"}


async def test_a_cancel_that_overtakes_the_answer_to_the_claim_is_not_forgotten(autojump_clock, tmp_path):
    class Slow(Moody):
        async def claim(self, limit: int, **keys: Any) -> Any:
            claimed = await super().claim(limit, **keys)
            await trio.sleep(1)  # the answer is on its way
            return claimed

    me = Me()
    async with bench(tmp_path) as b, trio.open_nursery() as nursery:
        b.desk.engine = Slow(b.engine._queue)  # type: ignore[assignment]

        async def cancel() -> None:
            await trio.sleep(0.5)
            await b.engine.cancel("i1")

        await b.engine.put_all(b"1", b"2")
        with b.seat(me) as seat:
            nursery.start_soon(cancel)
            call = await seat.take(2)
            assert call is not None
            assert call.fates == {"i1": "cancelled"}
            assert me.cut == [(1.0, "i1", "the item was cancelled")]


async def test_a_cancel_that_was_missed_while_the_engine_was_away_is_found_when_it_is_back(autojump_clock, tmp_path):
    me = Me()
    async with bench(tmp_path, shared=True) as b:
        await b.engine.put_all(b"1")
        with b.seat(me) as seat:
            call = await seat.take()
            assert call is not None
            b.desk.heard, heard = lambda notice: None, b.desk.heard  # type: ignore[method-assign]
            b.engine.broken["renew"] = "connection refused"
            await trio.sleep(21)
            await b.engine.cancel("i1")
            b.desk.heard = heard  # type: ignore[method-assign]
            b.engine.broken.clear()
            await trio.sleep(10)
            assert call.fates == {"i1": "cancelled"}
            seat.end(call, ended(call, "cancelled"))


async def test_a_queue_that_was_paused_before_or_while_the_engine_was_away_is_known_to_be(autojump_clock, tmp_path):
    async with bench(tmp_path, shared=True) as b:
        b.desk.heard, heard = lambda notice: None, b.desk.heard  # type: ignore[method-assign]
        await b.engine.pause(True)
        with b.seat() as seat:
            await trio.sleep(2)
            assert seat.shown == "the queue is paused"
            b.engine.broken = {"claim": "connection refused", "wait_for_work": "connection refused"}
            await b.engine.pause(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(seat.take)
                await trio.sleep(10)
                assert "connection refused" in seat.shown
                b.engine.broken = {}
                await trio.sleep(10)
                assert (seat.shown, b.desk.held) == ("idle", False)
                heard(Notice(what="paused"))
                assert seat.shown == "the queue is paused"
                nursery.cancel_scope.cancel()


async def test_a_pause_that_overtakes_the_answer_to_the_look_for_one_is_what_holds(autojump_clock, tmp_path):
    class Slow(Moody):
        async def counts(self) -> Any:
            counts = await self._queue.counts()
            await trio.sleep(1)  # the answer is on its way
            return counts

    async with bench(tmp_path) as b:
        b.desk.engine = Slow(b.engine._queue)  # type: ignore[assignment]
        with b.seat():
            await trio.sleep(1.5)
            await b.engine.pause(True)
            await trio.sleep(5)
            assert b.desk.held


async def test_progress_is_stored_once_a_second(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        await b.engine.put_all(b"1")
        with b.seat() as seat:
            call = await seat.take()
            assert call is not None
            for done in range(50):
                seat.progress(call, done, 50)
                await trio.sleep(0.1)
            record = await b.engine.show("i1")
            assert record is not None
            assert record.progress is not None
            assert record.progress[0] >= 30
            assert len(b.engine.times("progress")) <= 6
            seat.end(call, ended(call))


# ---- what holds, whatever happens ----


class Player(Me):
    """A worker that does what it is told: takes items, and ends them in one way or another. Notes what must not be."""

    def __init__(self, b: Bench, job: str, over: Counter[str]) -> None:
        super().__init__(job)
        self._bench = b
        self._over = over
        self._told = trio.Event()
        self._how = "done"
        self._seat: Seat | None = None

    def hears(self, call: Call, why: str) -> None:
        super().hears(call, why)
        self.tell("back")

    def tell(self, how: str) -> None:
        """What it has in hand is to end like that; or it is to leave, and end well what it has in hand."""
        if how == "leave" and self._seat is not None:
            self._seat.leave()
        self._how = "done" if how == "leave" else how
        self._told.set()

    async def live(self) -> None:
        with self._bench.seat(self) as self._seat:
            while (call := await self._seat.take(2)) is not None:
                for item in call.items:
                    assert not self._over[item.id], "a run began after its end"
                self._told = trio.Event()
                if call.fates is None:
                    await self._told.wait()
                self._seat.end(call, list(self._endings(call)))

    def _endings(self, call: Call) -> Iterator[Ending]:
        for item in call.items:
            fate = (call.fates or {}).get(item.id)
            how: Any = fate or (self._how if call.fates is None else "back")
            self._over[item.id] += how in ("done", "cancelled")
            yield Ending(id=item.id, token=item.token, how=how)


ENDINGS = ("done", "retry", "back", "leave")
STEPS = some.tuples(
    some.sampled_from(["put", "sit", "away", "there", "cancel", "pause", "resume", *ENDINGS]), some.integers(0, 5)
)


@given(steps=some.lists(some.tuples(STEPS, some.integers(0, 5)), max_size=40))
@settings(max_examples=60)
def test_every_item_ends_once_and_none_is_held_by_nobody(steps, tmp_path_factory):
    trio.run(play, tmp_path_factory.mktemp("desk"), steps, clock=MockClock(autojump_threshold=0))


async def play(base: Any, steps: Iterable[tuple[str, int]]) -> None:
    async with bench(base) as b, trio.open_nursery() as nursery:
        over: Counter[str] = Counter()
        players: list[Player] = []
        put: list[str] = []
        for step, number in steps:
            if step == "put":
                put += await b.engine.put_all(*[b"1"] * number, keep=True)
            elif step == "sit":
                players.append(Player(b, f"a:{number}", over))
                nursery.start_soon(players[-1].live)
            elif step in ENDINGS and players:
                players[number % len(players)].tell(step)
            elif step == "away":
                b.engine.broken = dict.fromkeys(("claim", "finish", "wait_for_work")[number % 3 :], "away")
            elif step == "there":
                b.engine.broken = {}
            elif step == "cancel" and put:
                await b.engine.cancel(put[number % len(put)])
            elif step in ("pause", "resume"):
                getattr(b.desk, step)(f"a:{number}")
            await settle_or_wait()
            held = sum(len(call.items) for seat in b.desk.seats for call in seat.calls)
            assert held + b.desk.unsaved == (await b.engine.counts()).running
        b.engine.broken = {}
        for player in players:
            player.tell("leave")
        await trio.sleep(10)
        assert not b.desk.seats
        assert (await b.engine.counts()).running == 0
        records = {id: await b.engine.show(id) for id in put}
        done = {id for id, record in records.items() if record is not None and record.state is State.DONE}
        assert done == {id for id in put if over[id]} - {
            id for id, record in records.items() if record is not None and record.state is State.CANCELLED
        }
        assert max(over.values(), default=0) <= 1


async def settle_or_wait() -> None:
    """Let everything happen that can; a moment passes where an engine that is away is tried again."""
    await trio.sleep(0.01)
    await trio.testing.wait_all_tasks_blocked()
