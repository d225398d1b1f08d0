"""The rate limiter: a token bucket against a model, in virtual time, and what becomes of those who wait."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked
from unsettled import cancelled_at_every_step

from supervisor import RateLimited, RateLimiter
from supervisor.policies.rate import Bucket
from supervisor.policies.spec import RateSpec
from supervisor.spec import Rate, Seconds

CLOSE = 1e-6
"""Seconds that adding floats may come to."""

# Against a model


@dataclass(frozen=True)
class Plan:
    """When a caller comes, how long it may wait, and when it is cancelled if it still waits."""

    comes: float
    may_wait: float | None
    patience: float


@st.composite
def crowds(draw: st.DrawFn) -> list[Plan]:
    """Callers, each at a time of its own."""
    now, crowd = 0.0, []
    for _ in range(draw(st.integers(1, 25))):
        now += draw(st.sampled_from([0.0137, 0.0137, 0.11, 0.53, 3.7]))
        may_wait = draw(st.sampled_from([None, None, 0.0, 0.317, 2.91]))
        patience = draw(st.sampled_from([1000.0, 1000.0, 0.4231, 1.7713]))
        crowd.append(Plan(now, may_wait, patience))
    return crowd


def expected(crowd: list[Plan], rate: float, burst: int) -> list[object]:
    """For each caller when it got its token, or what became of it: "rejected", "cancelled".

    The tokens are counted in full: so many in the bucket at such a time.
    """
    found: list[object] = []
    tokens, at, last = float(burst), 0.0, 0.0
    for number, plan in enumerate(crowd):
        due = max(plan.comes, last, at + (1 - tokens) / rate)
        ahead = sum(_waits(found[other], crowd[other], plan.comes) for other in range(number))
        told = max(0.0, _due_at(crowd, found, rate, burst, plan.comes) + ahead / rate - plan.comes)
        if plan.may_wait is not None and told > plan.may_wait + CLOSE:
            found.append("rejected")
        elif due > plan.comes + plan.patience:
            found.append("cancelled")
        else:
            tokens, at, last = min(burst, tokens + (due - at) * rate) - 1, due, due
            found.append(due)
    return found


def _waits(end: object, plan: Plan, now: float) -> bool:
    """Whether a caller who came before is waiting at this moment."""
    return (isinstance(end, float) and end > now) or (end == "cancelled" and plan.comes + plan.patience > now)


def _due_at(crowd: list[Plan], found: list[object], rate: float, burst: int, now: float) -> float:
    """When the next token is there, by the tokens that were taken until now."""
    tokens, at = float(burst), 0.0
    for taken in (end for end in found if isinstance(end, float) and end <= now):
        tokens, at = min(burst, tokens + (taken - at) * rate) - 1, taken
    return at + (1 - tokens) / rate


async def happened(crowd: list[Plan], limiter: RateLimiter) -> list[object]:
    found: list[object] = ["nothing"] * len(crowd)

    async def caller(at: int) -> None:
        plan = crowd[at]
        found[at] = "cancelled"
        with trio.move_on_after(plan.patience):
            try:
                await limiter.acquire(timeout=plan.may_wait)
            except RateLimited:
                found[at] = "rejected"
            else:
                found[at] = trio.current_time()

    async with trio.open_nursery() as nursery:
        for at, plan in enumerate(crowd):
            await trio.sleep_until(plan.comes)
            nursery.start_soon(caller, at)
    assert limiter.waiting == ()
    return found


@given(crowd=crowds(), rate=st.sampled_from([0.3, 1.0, 3.3, 50.0]), burst=st.integers(1, 4))
def test_it_is_a_bucket_of_tokens_with_a_queue_in_front(crowd, rate, burst):
    found = trio.run(happened, crowd, RateLimiter(rate, burst=burst), clock=MockClock(autojump_threshold=0))
    for real, model in zip(found, expected(crowd, rate, burst), strict=True):
        assert real == (pytest.approx(model, abs=CLOSE) if isinstance(model, float) else model), (found, crowd)
    times = [each for each in found if isinstance(each, float)]
    assert times == sorted(times), "first come, first served"
    for first in range(len(times)):
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + rate * (times[last] - times[first]) + CLOSE


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60), st.integers(1, 5))
def test_the_one_number_is_a_bucket_of_tokens(steps, burst):
    bucket, tokens, now = Bucket(4.0, burst), float(burst), 1000.0
    for sixteenths, takes in steps:
        now += sixteenths / 16
        tokens = min(burst, tokens + sixteenths / 16 * 4)
        assert bucket.tokens(now) == tokens and bucket.has_one(now) is (tokens >= 1)
        if takes and tokens >= 1:
            bucket.take(now)
            tokens -= 1
            assert bucket.tokens(now) == tokens


# The rate


async def test_a_burst_at_once_and_the_others_at_the_rate(autojump_clock):
    limiter = RateLimiter(4, burst=3)
    times = []

    async def one() -> None:
        await limiter.call(trio.lowlevel.checkpoint)
        times.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(7):
            nursery.start_soon(one)
    assert times == [0, 0, 0, 0.25, 0.5, 0.75, 1.0]
    await trio.sleep(100)
    assert limiter.tokens == 3


def test_a_late_turn_does_not_delay_those_after_it_but_a_stall_is_not_made_up_for():
    clock = MockClock()
    limiter = RateLimiter(1)
    times = []

    async def caller() -> None:
        await limiter.acquire()
        times.append(trio.current_time())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(caller)
            for jump in (0, 1.25, 0.75, 1.5, 0.5, 30, 1):
                await wait_all_tasks_blocked()
                clock.jump(jump)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel(reason="the test has seen enough")

    trio.run(main, clock=clock)
    assert times == [0, 1.25, 2, 3.5, 4, 34, 34, 35]


# Waiting


async def test_who_would_wait_for_too_long_is_rejected_at_once_with_the_time_to_come_back(autojump_clock):
    limiter = RateLimiter("30/m", within=3, name="api")
    await limiter.acquire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limiter.acquire)
        await wait_all_tasks_blocked()
        assert limiter.delay == 4
        message = "^rate limit api of 30/m: its turn is in 4 s, and it may wait 3 s$"
        with pytest.raises(RateLimited, match=message) as caught:
            await limiter.call(trio.sleep, 1)
        assert (trio.current_time(), caught.value.retry_after) == (0, 1)
        await trio.sleep(caught.value.retry_after)
        await limiter.acquire()
        assert trio.current_time() == 4


async def test_the_wait_of_one_call_can_be_bounded(autojump_clock):
    limiter = RateLimiter(1, within=1)
    await limiter.acquire(timeout=0)
    with pytest.raises(RateLimited):
        await limiter.acquire(timeout=0)
    with pytest.raises(RateLimited):
        await limiter.acquire(timeout=0.5)
    await limiter.acquire(timeout=1)
    assert trio.current_time() == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limiter.acquire)
        await wait_all_tasks_blocked()
        with pytest.raises(RateLimited):
            await limiter.acquire()
        await limiter.acquire(timeout=float("inf"))
    assert trio.current_time() == 3


@pytest.mark.parametrize("rate", [0.9, 3, 7, 10])
async def test_a_wait_that_fits_exactly_fits_however_floats_are_rounded(autojump_clock, rate):
    limiter = RateLimiter(rate, within=3 / rate)

    async def crowd(count: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(limiter.acquire)

    for at in range(50):
        await trio.sleep(3 + at / 7)
        await crowd(4)  # one at once, and three who wait
    for at in range(50):
        await trio.sleep(3 + at / 7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crowd, 4)
            await wait_all_tasks_blocked()
            with pytest.raises(RateLimited) as caught:
                await limiter.acquire()
            await trio.sleep(caught.value.retry_after)
            await limiter.acquire()


def test_nobody_overtakes_the_first_one_whose_token_has_just_come():
    clock, limiter = MockClock(), RateLimiter(1)

    async def main() -> None:
        await limiter.acquire()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(limiter.acquire)
            await wait_all_tasks_blocked()
            clock.jump(1)
            with pytest.raises(RateLimited):
                await limiter.acquire(timeout=0)

    trio.run(main, clock=clock)


async def test_who_waits_is_seen_in_order(autojump_clock):
    limiter = RateLimiter(1)
    await limiter.acquire()
    async with trio.open_nursery() as nursery:
        for name in ("one", "two", None):
            nursery.start_soon(lambda name=name: limiter.acquire(who=name), name="the task")
            await wait_all_tasks_blocked()
        assert limiter.waiting == ("one", "two", "the task")
        await trio.sleep(1.5)
        assert limiter.waiting == ("two", "the task")


async def test_new_numbers_keep_the_tokens_and_those_who_wait(autojump_clock):
    limiter = RateLimiter(1, burst=10)
    for _ in range(8):
        await limiter.acquire()
    limiter.configure(RateSpec(rate=Rate(2), burst=5))
    assert limiter.tokens == 2
    limiter.configure(RateSpec(rate=Rate(0.01)))
    assert limiter.tokens == 1
    await limiter.acquire()
    times = []

    async def one() -> None:
        await limiter.acquire()
        times.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
        await trio.sleep(50)
        limiter.configure(RateSpec(rate=Rate(0.5)))
    assert times == pytest.approx([51, 53, 55])


# Cancellation


@pytest.mark.parametrize("way", ["layer", "block"])
def test_cancelled_at_any_step_it_takes_nobodys_turn(way):
    times: list[float] = []

    def scene():
        limiter = RateLimiter(1)
        times.clear()

        async def begins() -> None:
            times.append(trio.current_time())

        async def once() -> None:
            if way == "layer":
                await limiter.call(begins)
            else:
                async with limiter:
                    await begins()

        async def victim() -> None:
            await once()
            await once()

        async def later() -> None:
            await trio.sleep(0.5)
            await once()

        def all_well() -> bool:
            # with the victim's turns or without them: one a second, none left out
            return limiter.waiting == () and len(times) >= 3 and times == [float(at) for at in range(len(times))]

        return victim, [once, once, later], all_well

    assert cancelled_at_every_step(scene) >= 2


@pytest.mark.parametrize("time", range(20))
def test_a_token_that_is_given_in_the_moment_of_a_cancel_goes_to_the_next(time):
    """After a stall the first one has tokens for two: whether it gives one to the second before that one leaves is chance."""
    clock, limiter, got = MockClock(), RateLimiter(1), {}
    scopes = {name: trio.CancelScope() for name in "abc"}

    async def waiter(name: str) -> None:
        with scopes[name]:
            await limiter.acquire()
            got[name] = trio.current_time()

    async def main() -> None:
        await limiter.acquire()
        async with trio.open_nursery() as nursery:
            for name in scopes:
                nursery.start_soon(waiter, name)
                await wait_all_tasks_blocked()
            clock.jump(2.5)
            scopes["b"].cancel(reason="test")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel(reason="whoever waits still has lost a turn")

    trio.run(main, clock=clock)
    assert (got, limiter.waiting) == ({"a": 2.5, "c": 2.5}, ())


async def test_who_is_cancelled_already_takes_no_token(autojump_clock):
    limiter = RateLimiter(1)
    with trio.CancelScope() as scope:
        scope.cancel(reason="test")
        await limiter.acquire()
    assert scope.cancelled_caught and limiter.tokens == 1


async def test_a_failure_of_the_function_is_its_own(autojump_clock):
    limiter = RateLimiter(1, within=0)

    @limiter
    async def fails() -> None:
        raise OSError

    with pytest.raises(OSError):
        await fails()
    with pytest.raises(RateLimited):
        await fails()


def test_a_spec_says_the_same():
    spec = RateSpec(rate=Rate(2), burst=3, within=Seconds(4))
    assert RateLimiter.from_spec(spec).spec == spec


@pytest.mark.parametrize("text", ["1/s", "100/s", "30/m", "1/m", "7/m", "10/h", "1/h", "1/d", "0.5/d", "59/m", "23/d"])
def test_a_rate_is_told_as_a_file_says_it(text):
    assert str(Rate.parse(text)) == text


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"rate": "often"}, {"burst": 0}, {"within": -1}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"RateLimiter: |expected a rate"):
        RateLimiter(**{"rate": 1, **wrong})
