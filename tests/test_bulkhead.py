"""The bulkhead: never more than its places, first come first served, and nothing is lost when a caller is cancelled."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked
from unsettled import cancelled_at_every_step

from supervisor import Bulkhead, BulkheadFull
from supervisor.policies.spec import BulkheadSpec
from supervisor.spec import Seconds

# Against a model


@dataclass(frozen=True)
class Plan:
    """When a caller comes, how long it stays inside, and when it is cancelled, wherever it is then."""

    comes: float
    stays: float
    patience: float


@st.composite
def crowds(draw: st.DrawFn) -> list[Plan]:
    """Callers; no two things of one crowd happen in the same moment, where their order would be chance."""
    now, crowd = 0.0, []
    for at in range(draw(st.integers(1, 12))):
        now += draw(st.integers(0, 3))
        stays, patience = draw(st.integers(1, 6)), draw(st.integers(1, 20))
        crowd.append(Plan(now + at * 1e-2, stays + at * 1e-4, patience + at * 1e-6))
    return crowd


def expected(crowd: list[Plan], concurrency: int, waiting: int | None) -> list[list[object]]:
    """What a queue in front of so many places comes to: for each caller, when it went in and out, or that it was not let in."""
    found: list[list[object]] = [[] for _ in crowd]
    queue: list[int] = []
    inside: set[int] = set()
    events = [(plan.comes, "comes", at) for at, plan in enumerate(crowd)]
    heapq.heapify(events)

    def goes_in(at: int, now: float) -> None:
        inside.add(at)
        found[at].append(now)
        heapq.heappush(events, (now + crowd[at].stays, "ends", at))

    def goes_out(at: int, now: float) -> None:
        inside.remove(at)
        found[at].append(now)
        if queue:
            goes_in(queue.pop(0), now)

    while events:
        now, what, at = heapq.heappop(events)
        if what == "comes" and len(inside) < concurrency:
            goes_in(at, now)
            heapq.heappush(events, (now + crowd[at].patience, "cancelled", at))
        elif what == "comes" and waiting is not None and len(queue) >= waiting:
            found[at].append("full")
        elif what == "comes":
            queue.append(at)
            heapq.heappush(events, (now + crowd[at].patience, "cancelled", at))
        elif at in inside and what in ("ends", "cancelled"):
            goes_out(at, now)
        elif at in queue and what == "cancelled":
            queue.remove(at)
    return found


async def happened(crowd: list[Plan], bulkhead: Bulkhead) -> list[list[object]]:
    found: list[list[object]] = [[] for _ in crowd]

    async def inside(at: int) -> None:
        found[at].append(trio.current_time())
        assert bulkhead.in_use <= bulkhead.spec.concurrency
        try:
            await trio.sleep(crowd[at].stays)
        finally:
            found[at].append(trio.current_time())

    async def caller(at: int) -> None:
        with trio.move_on_after(crowd[at].patience):
            try:
                await bulkhead.call(inside, at)
            except BulkheadFull:
                found[at].append("full")

    async with trio.open_nursery() as nursery:
        for at, plan in enumerate(crowd):
            await trio.sleep_until(plan.comes)
            nursery.start_soon(caller, at)
    assert (bulkhead.in_use, bulkhead.waiting) == (0, ())
    return found


@given(crowd=crowds(), concurrency=st.integers(1, 3), waiting=st.none() | st.integers(0, 3))
def test_it_is_a_queue_in_front_of_so_many_places(crowd, concurrency, waiting):
    bulkhead = Bulkhead(concurrency, waiting=waiting)
    found = trio.run(happened, crowd, bulkhead, clock=MockClock(autojump_threshold=0))
    for real, model in zip(found, expected(crowd, concurrency, waiting), strict=True):
        assert real == pytest.approx(model) if "full" not in model else real == model


# Cancellation


@pytest.mark.parametrize("steps_first", [True, False])
async def test_a_waiter_that_is_cancelled_in_the_moment_in_which_a_place_gets_free_loses_none(autojump_clock, steps_first):
    bulkhead = Bulkhead(1)
    await bulkhead.acquire()
    inside = []

    async def waiter(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with bulkhead:
                inside.append(name)

    first, second = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter, "first", first)
        await wait_all_tasks_blocked()
        nursery.start_soon(waiter, "second", second)
        await wait_all_tasks_blocked()
        if steps_first:
            first.cancel(reason="test")
            bulkhead.release()
        else:
            bulkhead.release()
            first.cancel(reason="test")
    assert inside == (["second"] if steps_first else ["first", "second"])
    assert (bulkhead.in_use, bulkhead.waiting) == (0, ())


@pytest.mark.parametrize("way", ["layer", "block"])
def test_cancelled_at_any_step_it_holds_nothing(way):
    def scene():
        bulkhead = Bulkhead(1, within=50)

        async def once() -> None:
            if way == "layer":
                await bulkhead.call(trio.sleep, 1)
            else:
                async with bulkhead:
                    await trio.sleep(1)

        async def victim() -> None:
            await once()
            await once()

        return victim, [once, once], lambda: (bulkhead.in_use, bulkhead.waiting) == (0, ())

    assert cancelled_at_every_step(scene) >= 3


async def test_who_is_cancelled_already_takes_no_place():
    bulkhead = Bulkhead(1)
    with trio.CancelScope() as scope:
        scope.cancel(reason="test")
        await bulkhead.acquire()
    assert scope.cancelled_caught and bulkhead.in_use == 0


# One by one


async def test_it_fails_fast_where_nobody_may_wait(autojump_clock):
    bulkhead = Bulkhead(2, waiting=0, name="db")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bulkhead.call, trio.sleep, 5)
        nursery.start_soon(bulkhead.call, trio.sleep, 5)
        await wait_all_tasks_blocked()
        with pytest.raises(BulkheadFull, match=r"^all 2 places of bulkhead db are taken, and nobody may wait$") as caught:
            await bulkhead.call(trio.sleep, 5)
        assert trio.current_time() == 0 and caught.value.retry_after is None
    assert await bulkhead.call(trio.sleep, 5) is None


async def test_so_many_may_wait_and_who_they_are_is_seen(autojump_clock):
    bulkhead = Bulkhead(1, waiting=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bulkhead.call, trio.sleep, 5)
        await wait_all_tasks_blocked()
        nursery.start_soon(bulkhead.acquire, "one")
        await wait_all_tasks_blocked()
        nursery.start_soon(bulkhead.call, trio.sleep, 5, name="other")
        await wait_all_tasks_blocked()
        with pytest.raises(BulkheadFull, match="2 wait already"):
            await bulkhead.acquire()
        assert bulkhead.in_use == 1 and bulkhead.waiting[0] == "one" and len(bulkhead.waiting) == 2
        await trio.sleep(5.5)
        assert bulkhead.in_use == 1 and len(bulkhead.waiting) == 1
        bulkhead.release()
    assert (bulkhead.in_use, bulkhead.waiting, trio.current_time()) == (0, (), 10.5)


@pytest.mark.parametrize("within", [0, 3])
async def test_nobody_waits_for_longer_than_within(autojump_clock, within):
    bulkhead = Bulkhead(1, within=within)
    async with bulkhead:
        with pytest.raises(BulkheadFull, match=f"none got free within {within} s"):
            await bulkhead.call(trio.sleep, 1)
        assert trio.current_time() == within and bulkhead.waiting == ()


async def test_the_place_is_free_again_after_a_failure(autojump_clock):
    bulkhead = Bulkhead(1, waiting=0)

    @bulkhead
    async def fails() -> None:
        raise OSError

    for _ in range(3):
        with pytest.raises(OSError):
            await fails()
    assert bulkhead.in_use == 0


async def test_a_place_that_nobody_has_cannot_be_given_back():
    bulkhead = Bulkhead(1)
    with pytest.raises(RuntimeError):
        bulkhead.release()
    assert bulkhead.in_use == 0


async def test_new_numbers_let_in_those_who_wait_or_leave_those_inside_to_come_out(autojump_clock):
    bulkhead = Bulkhead(1)
    ends = []

    async def one() -> None:
        await bulkhead.call(trio.sleep, 10)
        ends.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
        await trio.sleep(1)
        bulkhead.configure(BulkheadSpec(concurrency=3))
        assert (bulkhead.in_use, len(bulkhead.waiting)) == (3, 2)
        bulkhead.configure(BulkheadSpec(concurrency=1))
        assert (bulkhead.in_use, len(bulkhead.waiting)) == (3, 2)
    assert ends == [10, 11, 11, 21, 31]


def test_a_spec_says_the_same():
    spec = BulkheadSpec(concurrency=2, waiting=3, within=Seconds(4))
    assert Bulkhead.from_spec(spec).spec == spec


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"waiting": -1}, {"within": -1}, {"within": float("nan")}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="Bulkhead: "):
        Bulkhead(**{"concurrency": 1, **wrong})
