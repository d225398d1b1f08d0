"""The circuit breaker: its decisions against a model that keeps everything, and the breaker round real calls."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from supervisor import BreakerOpen, BulkheadFull, CircuitBreaker, Rejected, Retry
from supervisor.policies.breaker import BreakerState, Circuit
from supervisor.policies.spec import BreakerSpec
from supervisor.spec import Seconds

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN

# The decisions


@dataclass
class Call:
    """A call of the model: in which life of the breaker it began; a life lasts from one change of state to the next."""

    life: int
    ticket: int
    trial: bool


class Model(RuleBasedStateMachine):
    """What the words say, without any economy: every failure is remembered, every call is listed."""

    @initialize(
        failures=st.integers(1, 4), within=st.integers(1, 8), open_for=st.integers(1, 8), successes=st.integers(1, 3)
    )  # fmt: skip
    def begin(self, failures: int, within: int, open_for: int, successes: int) -> None:
        self.spec = BreakerSpec(
            failures=failures, within=Seconds(within), open_for=Seconds(open_for), successes=successes
        )  # fmt: skip
        self.heard: list[tuple[BreakerState, BreakerState]] = []
        self.circuit = Circuit(self.spec, "", lambda before, after, cause: self.heard.append((before, after)))
        self.now = 1000.0
        self.state, self.life, self.opened_at, self.in_a_row = CLOSED, 0, 0.0, 0
        self.failed_at: list[float] = []
        self.calls: list[Call] = []
        self.changes: list[tuple[BreakerState, BreakerState]] = []

    def become(self, state: BreakerState) -> None:
        self.changes.append((self.state, state))
        self.state, self.life, self.in_a_row, self.failed_at = state, self.life + 1, 0, []
        if state is OPEN:
            self.opened_at = self.now

    @rule(seconds=st.integers(0, 40).map(lambda quarters: quarters / 4))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def one_begins(self) -> None:
        trial_at = self.opened_at + self.spec.open_for
        if self.state is OPEN and self.now >= trial_at:
            self.become(HALF_OPEN)
        on_trial = any(call.trial and call.life == self.life for call in self.calls)
        if self.state is OPEN or (self.state is HALF_OPEN and on_trial):
            with pytest.raises(BreakerOpen) as caught:
                self.circuit.admit(self.now)
            assert caught.value.retry_after == (trial_at - self.now if self.state is OPEN else self.spec.open_for)
        else:
            self.calls.append(Call(self.life, self.circuit.admit(self.now), self.state is HALF_OPEN))

    @rule(data=st.data(), end=st.sampled_from(["well", "badly", "badly", "neither"]))
    def one_ends(self, data: st.DataObject, end: str) -> None:
        if not self.calls:
            return
        call = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        heard = call.life == self.life
        if end == "well":
            self.circuit.succeeded(call.ticket)
            if heard and self.state is HALF_OPEN:
                self.in_a_row += 1
                if self.in_a_row == self.spec.successes:
                    self.become(CLOSED)
        elif end == "badly":
            self.circuit.failed(call.ticket, self.now, "bad")
            if heard and self.state is HALF_OPEN:
                self.become(OPEN)
            elif heard:
                self.failed_at.append(self.now)
                if self.counted() >= self.spec.failures:
                    self.become(OPEN)
        self.circuit.freed(call.ticket)

    def counted(self) -> int:
        return sum(self.now - at <= self.spec.within for at in self.failed_at)

    @invariant()
    def it_agrees(self) -> None:
        if not hasattr(self, "spec"):
            return
        assert (self.circuit.state, self.heard) == (self.state, self.changes)
        assert self.circuit.counted(self.now) == self.counted()
        assert self.circuit.passed == self.in_a_row
        assert self.circuit.opened_at == (None if self.state is CLOSED else self.opened_at)


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
test_the_decisions_are_those_of_the_model = Model.TestCase


# Round calls


class Remote:
    """What is called: it gives "done", or fails with `failure`."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        return "done"


async def fails(breaker: CircuitBreaker, failure: BaseException) -> None:
    remote = Remote()
    remote.failure = failure
    try:
        await breaker.call(remote)
    except BaseException as error:
        assert error is failure
    else:
        raise AssertionError("it did not fail")


async def opened(**options) -> CircuitBreaker:
    breaker = CircuitBreaker(failures=1, **options)
    await fails(breaker, OSError("gone"))
    assert breaker.state is OPEN
    return breaker


async def test_from_closed_to_open_to_half_open_and_closed_again(autojump_clock):
    heard = []
    breaker = CircuitBreaker(
        failures=3, within=60, open_for=30, successes=2, name="db", on_change=lambda *change: heard.append(change)
    )  # fmt: skip
    remote = Remote()
    assert await breaker.call(remote) == "done"
    for _ in range(3):
        assert (breaker.state, breaker.opened_at, breaker.trial_at) == (CLOSED, None, None)
        await fails(breaker, OSError("gone"))
    assert (breaker.state, breaker.opened_at, breaker.trial_at) == (OPEN, 0, 30)
    await trio.sleep(10)
    with pytest.raises(
        BreakerOpen, match=r"^circuit breaker db is open: 3 failures within 60 s, the last: OSError: gone$"
    ) as caught:
        await breaker.call(remote)
    assert caught.value.retry_after == 20 and remote.calls == 1
    await trio.sleep(20)
    await breaker.call(remote)
    assert (breaker.state, breaker.successes) == (HALF_OPEN, 1)
    await breaker.call(remote)
    assert (breaker.state, breaker.failures, breaker.opened_at) == (CLOSED, 0, None)
    assert heard == [
        (CLOSED, OPEN, "3 failures within 60 s, the last: OSError: gone"),
        (OPEN, HALF_OPEN, "it was open for 30 s"),
        (HALF_OPEN, CLOSED, "2 successes in a row"),
    ]


@pytest.mark.parametrize("open_for", [0.1, 0.7, 3.3])
async def test_the_hint_leads_to_a_trial_however_floats_are_rounded(autojump_clock, open_for):
    breaker = CircuitBreaker(failures=1, open_for=open_for, successes=1)
    for at in range(200):
        await trio.sleep(at / 999)
        await fails(breaker, OSError())
        await trio.sleep(open_for / 7)
        with pytest.raises(BreakerOpen) as caught:
            await breaker.call(Remote())
        await trio.sleep(caught.value.retry_after)
        assert await breaker.call(Remote()) == "done"


async def test_a_trial_that_fails_opens_it_anew(autojump_clock):
    breaker = await opened(open_for=30)
    await trio.sleep(40)
    await fails(breaker, ValueError("still"))
    assert (breaker.state, breaker.opened_at, breaker.cause) == (OPEN, 40, "its trial failed: ValueError: still")


async def test_failures_count_together_only_within_the_window(autojump_clock):
    breaker = CircuitBreaker(failures=3, within=10)
    for _ in range(5):
        await fails(breaker, OSError())
        await fails(breaker, OSError())
        assert breaker.failures == 2
        await trio.sleep(10.5)
    assert (breaker.state, breaker.failures) == (CLOSED, 0)


async def test_one_trial_at_a_time_and_all_others_are_rejected_with_a_hint(autojump_clock):
    breaker = await opened(open_for=30, successes=2)
    await trio.sleep(30)
    ends = []

    async def one() -> None:
        try:
            ends.append(await breaker.call(Remote()))
        except BreakerOpen as error:
            ends.append(error.retry_after)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert sorted(ends, key=str) == [30, 30, 30, 30, "done"]
    assert (breaker.state, breaker.successes) == (HALF_OPEN, 1)


@pytest.mark.parametrize(
    "failure", [Rejected("full"), BulkheadFull("full"), ExceptionGroup("", [Rejected("full")]), SystemExit()]
)
async def test_what_says_nothing_of_the_remote_neither_counts_nor_blocks(autojump_clock, failure):
    breaker = CircuitBreaker(failures=1, open_for=30)
    await fails(breaker, failure)
    assert (breaker.state, breaker.failures) == (CLOSED, 0)
    await fails(breaker, OSError())
    await trio.sleep(30)
    await fails(breaker, failure)
    assert (breaker.state, breaker.successes) == (HALF_OPEN, 0)
    assert await breaker.call(Remote()) == "done", "the place of the trial is free"


async def test_cancelled_calls_count_as_nothing_and_a_cancelled_trial_makes_room(autojump_clock):
    breaker = CircuitBreaker(failures=1, open_for=30, successes=1)
    for _ in range(3):
        with trio.move_on_after(1):
            await breaker.call(trio.sleep_forever)
    assert breaker.state is CLOSED
    await fails(breaker, OSError())
    await trio.sleep(30)
    with trio.move_on_after(1):
        await breaker.call(trio.sleep_forever)
    assert breaker.state is HALF_OPEN
    assert await breaker.call(Remote()) == "done"
    assert breaker.state is CLOSED


async def test_what_began_before_it_opened_says_nothing_when_it_ends(autojump_clock):
    breaker = CircuitBreaker(failures=1, open_for=5, successes=1)

    async def late(failure: Exception | None) -> None:
        await trio.sleep(20)
        if failure is not None:
            raise failure

    async def late_failure() -> None:
        with pytest.raises(OSError):
            await breaker.call(late, OSError())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(late_failure)
        nursery.start_soon(breaker.call, late, None)
        await trio.testing.wait_all_tasks_blocked()
        await fails(breaker, ValueError())
        await trio.sleep(19)
        with breaker.attempt():
            await trio.sleep(2)  # the late ones end while the trial is under way
            assert breaker.state is HALF_OPEN
            with pytest.raises(BreakerOpen):
                await breaker.call(Remote())
    assert breaker.state is CLOSED


@pytest.mark.parametrize(
    ("counts", "failure", "state"),
    [
        (OSError, ConnectionError(), OPEN),
        (OSError, ValueError(), CLOSED),
        ("OSError", ConnectionError(), OPEN),
        (lambda error: "5" in str(error), ValueError("503"), OPEN),
        (lambda error: "5" in str(error), ValueError("404"), CLOSED),
        (OSError, ExceptionGroup("", [ValueError(), OSError()]), OPEN),
        (OSError, ExceptionGroup("", [Rejected(""), OSError()]), OPEN),
        (OSError, ExceptionGroup("", [ValueError(), Rejected("")]), CLOSED),
        (Exception, Retry(), OPEN),
    ],
)
async def test_what_counts_as_a_failure(autojump_clock, counts, failure, state):
    breaker = CircuitBreaker(failures=1, counts=counts)
    await fails(breaker, failure)
    assert breaker.state is state


async def test_an_exception_that_does_not_count_is_an_answer(autojump_clock):
    breaker = await opened(open_for=1, successes=1, counts=OSError)
    await trio.sleep(1)
    await fails(breaker, ValueError("no such page"))
    assert breaker.state is CLOSED


async def test_a_judge_that_fails_itself_does_not_keep_the_place_of_the_trial(autojump_clock):
    def counts(error: BaseException) -> bool:
        if isinstance(error, ValueError):
            raise KeyError
        return True

    breaker = await opened(open_for=1, successes=1, counts=counts)
    await trio.sleep(1)
    remote = Remote()
    remote.failure = ValueError()
    with pytest.raises(KeyError):
        await breaker.call(remote)
    assert breaker.state is HALF_OPEN
    assert await breaker.call(Remote()) == "done"


async def test_whoever_holds_it_shares_it(autojump_clock):
    breaker = CircuitBreaker(failures=2)

    @breaker
    async def one() -> None:
        raise OSError("one")

    @breaker
    async def other() -> None:
        raise OSError("other")

    for call in (one, other):
        with pytest.raises(OSError):
            await call()
    for call in (one, other):
        with pytest.raises(BreakerOpen):
            await call()


async def test_new_numbers_keep_what_it_knows(autojump_clock):
    breaker = CircuitBreaker(failures=5, within=60, open_for=30)
    for _ in range(3):
        await fails(breaker, OSError())
    breaker.configure(BreakerSpec(failures=4, within=Seconds(60), open_for=Seconds(10)))
    assert (breaker.state, breaker.failures) == (CLOSED, 3)
    await fails(breaker, OSError())
    assert (breaker.state, breaker.trial_at) == (OPEN, 10)
    breaker.configure(BreakerSpec(open_for=Seconds(50)))
    assert breaker.trial_at == 50


async def test_a_spec_says_the_same(autojump_clock):
    spec = BreakerSpec(failures=2, within=Seconds(3), open_for=Seconds(4), successes=5)
    assert CircuitBreaker.from_spec(spec).spec == spec


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"successes": 0}, {"within": 0}, {"open_for": float("nan")}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="CircuitBreaker: "):
        CircuitBreaker(**wrong)
