"""What a desk claims ahead: when, how much, and that it goes back. In virtual time."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import trio
from msgspec import structs

from supervisor.queues.protocol import Ending, Settings
from supervisor.queues.seat import Seat
from supervisor.queues.stock import HELD
from supervisor.spec import Rate
from tests.forest import settle
from tests.test_desk import Bench, bench, ended

MANY = 500
USUAL = 200
"""Calls after which it is known how long they take."""


async def short_calls(seat: Seat, count: int, seconds: float = 0.001) -> None:
    for _ in range(count):
        call = await seat.take()
        assert call is not None
        await trio.sleep(seconds)
        seat.end(call, ended(call))


async def with_stock(b: Bench, seat: Seat) -> None:
    """Have made so many short calls that there is a stock."""
    await b.engine.put_all(*[b"1"] * MANY)
    await short_calls(seat, USUAL)
    await settle()
    assert 20 < len(b.desk.stock.items) <= 50 * len(b.desk.seats)


async def untouched(b: Bench) -> int:
    """How many wait, as if never claimed."""
    await settle()
    records = [await b.engine.show(f"i{number}") for number in range(1, MANY + 1)]
    return sum(record is not None and record.state.value == "waiting" and record.attempts == 0 for record in records)


async def test_after_short_calls_the_next_are_there(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            before = b.engine.times("claim")
            await short_calls(seat, 100)
            assert len(b.engine.times("claim")) - len(before) <= 6  # for half of 50 ms at a time


async def test_more_is_claimed_while_there_is_still_some(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            b.engine.stuck["claim"] = gate = trio.Event()
            await short_calls(seat, len(b.desk.stock.items) - 3)
            assert len(b.desk.stock.items) == 3
            gate.set()
            await settle()
            assert len(b.desk.stock.items) > 10


async def test_nothing_is_claimed_ahead_of_long_calls(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await b.engine.put_all(*[b"1"] * MANY)
            await short_calls(seat, 100, seconds=0.06)
            assert [of[0] for _, what, of in b.engine.asked if what == "claim"] == [1] * 100


async def test_no_more_is_claimed_ahead_than_is_handled_in_a_moment(autojump_clock, tmp_path):
    """Calls that keep the processor: each is short, and no two are made at once, however many workers there are."""

    async def work(seat: Seat) -> None:
        while (call := await seat.take()) is not None:
            autojump_clock.jump(0.002)
            seat.end(call, ended(call))

    async with bench(tmp_path) as b:
        await b.engine.put_all(*[b"1"] * 2000)
        with ExitStack() as sitting:
            async with trio.open_nursery() as nursery:  # within: who has just been given something ends it before its seat does
                for _ in range(5):
                    nursery.start_soon(work, sitting.enter_context(b.seat()))
                most = 0
                while trio.current_time() < 2:
                    await trio.sleep(0.01)
                    most = max(most, len(b.desk.stock.items))
                nursery.cancel_scope.cancel()
        back = [ending for _, what, of in b.engine.asked if what == "finish" for ending in of if ending.how == "back"]
        assert 10 < most <= 30  # 500 a second
        assert len(back) < 100


async def test_what_nobody_takes_in_time_goes_back(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            await seat.take()
            await trio.sleep(2 * HELD)
            assert not b.desk.stock.items
            assert await untouched(b) == MANY - USUAL - 1


async def test_what_is_taken_slowly_is_not_held_for_long(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            held = {item.id for item in b.desk.stock.items}
            await short_calls(seat, 5, seconds=0.1)
            assert await untouched(b) >= MANY - USUAL - 5 - 3  # as many as were taken in HELD are kept at most
            assert not held.intersection(item.id for item in list(b.desk.stock.items)[3:])


async def test_it_goes_back_with_the_last_who_leaves(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as other:
            with b.seat() as seat:
                await with_stock(b, seat)
            assert b.desk.stock.items
            other.leave()
            assert not b.desk.stock.items
        assert await untouched(b) == MANY - USUAL


async def test_a_claim_that_answers_when_all_have_left_is_given_back(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            b.engine.stuck["claim"] = gate = trio.Event()
            await short_calls(seat, more := len(b.desk.stock.items) - 3)
            await settle()
        gate.set()
        assert await untouched(b) == MANY - USUAL - more


@pytest.mark.parametrize("how", ["job", "queue"])
async def test_it_goes_back_at_a_pause(autojump_clock, tmp_path, how):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            if how == "job":
                b.desk.pause("a")
            else:
                await b.engine.pause(True)
            assert not b.desk.stock.items
            assert await untouched(b) == MANY - USUAL


async def test_one_that_is_cancelled_is_never_begun(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            id = next(iter(b.desk.stock.items)).id
            assert await b.engine.cancel(id) == "running"
            await settle()
            assert await b.states(id) == "cancelled"
            call = await seat.take()
            assert call is not None
            assert call.items[0].id != id


@pytest.mark.parametrize("queue", [{"concurrency": 5}, {"rate": True}, {"fair": True}, {"group_by": "g"}])
async def test_none_where_it_would_be_felt(autojump_clock, tmp_path, queue):
    async with bench(tmp_path, **{name: value for name, value in queue.items() if name not in ("rate", "group_by")}) as b:
        settings = b.engine.settings
        if "group_by" in queue:
            b.engine.use(Settings(spec=settings.spec, group_by="g"))
        if "rate" in queue:
            b.engine.use(Settings(spec=structs.replace(settings.spec, rate=Rate(100_000))))
        with b.seat() as seat:
            await b.engine.put_all(*[b"1"] * MANY)
            await short_calls(seat, USUAL)
            assert not b.desk.stock.items


async def test_none_for_batches(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await b.engine.put_all(*[b"1"] * MANY)
            for _ in range(USUAL):
                call = await seat.take_batch(2, 0)
                assert call is not None
                seat.end(call, ended(call))
            assert not b.desk.stock.items


async def test_nothing_is_held_on_its_last_attempt(autojump_clock, tmp_path):
    """A daemon that is killed may bring an item nearer to death that nobody has begun with, but not kill it."""
    async with bench(tmp_path) as b:
        last = await b.engine.put_all(*[b"1"] * 40, delay=0.5)
        for _ in range(2):  # twice a daemon has claimed them, and was killed
            await trio.sleep(1)
            lost = await b.engine._queue.claim(40, owner="other", attempts=3)
            await b.engine._queue.finish([Ending(id=item.id, token=item.token, how="retry", delay=0.7) for item in lost.items])
        with b.seat(attempts=3) as seat:
            await b.engine.put_all(*[b"1"] * MANY)
            begun, held = set(), False
            for _ in range(MANY + 40):
                call = await seat.take()
                assert call is not None
                begun.update(item.id for item in call.items if item.attempt == 3)
                assert all(item.attempt < 3 for item in b.desk.stock.items)
                held |= bool(b.desk.stock.items)
                await trio.sleep(0.001)
                seat.end(call, ended(call))
        assert held
        assert begun == set(last)


async def test_none_where_there_is_one_attempt(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat(attempts=1) as seat:
            await b.engine.put_all(*[b"1"] * MANY)
            await short_calls(seat, USUAL)
            assert not b.desk.stock.items


async def test_it_is_for_those_who_try_as_often(autojump_clock, tmp_path):
    async with bench(tmp_path) as b:
        with b.seat() as seat:
            await with_stock(b, seat)
            with b.seat(attempts=7) as other:
                call = await other.take()
                assert call is not None
                asked = [of for _, what, of in b.engine.asked if what == "claim"]
                assert asked[-1][0] == 1
                other.end(call, ended(call))
                await settle()
                assert not b.desk.stock.items
