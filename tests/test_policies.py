"""What the policies have in common, the smaller ones, and all of them round one function."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock
from unsettled import cancelled_at_every_step

import supervisor
from benchmarks.policies import POLICIES, run_one
from supervisor import (
    BreakerOpen,
    Bulkhead,
    BulkheadFull,
    CircuitBreaker,
    DeadlineExceeded,
    RateLimiter,
    Retry,
    TimedOut,
    deadline,
    fallback,
    retry,
    timeout,
)
from supervisor.errors import ExitStatus
from supervisor.policies import ORDER
from supervisor.policies.failures import in_one_line, leaves, matcher
from supervisor.policies.layer import Layer
from supervisor.policies.pipeline import compose


async def fails(error: Exception) -> None:
    raise error


# Time


@pytest.mark.parametrize(("layer", "kind"), [(timeout, TimedOut), (deadline, DeadlineExceeded)])
async def test_what_takes_too_long_is_cancelled_and_says_so(autojump_clock, layer, kind):
    left = []

    async def slow() -> None:
        try:
            await trio.sleep(10)
        finally:
            left.append(trio.current_time())

    with pytest.raises(kind) as caught:
        await layer(3).call(slow)
    assert (caught.value.seconds, left, trio.current_time()) == (3, [3], 3)
    assert await layer(11).call(slow) is None


async def test_the_bodys_own_too_slow_error_is_its_own(autojump_clock):
    async def impatient() -> None:
        with trio.fail_after(1):
            await trio.sleep(10)

    with pytest.raises(trio.TooSlowError):
        await timeout(5).call(impatient)
    with pytest.raises(TimedOut):
        await timeout(1).call(trio.sleep, 5)


async def test_a_result_that_is_there_all_the_same_is_not_thrown_away(autojump_clock):
    async def stubborn() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(10)
        return "written"

    assert await timeout(1).call(stubborn) == "written"


async def test_an_error_on_the_way_out_comes_out(autojump_clock):
    async def untidy() -> None:
        try:
            await trio.sleep(10)
        finally:
            raise OSError("cannot close")

    with pytest.raises(OSError):
        await timeout(1).call(untidy)


async def test_a_cancel_from_outside_is_no_timeout(autojump_clock):
    with trio.move_on_after(1) as scope:
        await timeout(3).call(trio.sleep, 10)
    assert scope.cancelled_caught


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_no_time_at_all_is_refused(seconds):
    with pytest.raises(ValueError, match="deadline: seconds"):
        deadline(seconds)


# Fallback


@pytest.mark.parametrize("instead", [7, lambda error: len(str(error))])
async def test_a_value_or_a_function_in_place_of_a_failure(instead):
    assert await fallback(instead).call(fails, OSError("seven 7")) == 7


async def test_an_async_function_in_place_of_a_failure(autojump_clock):
    async def cached(error: Exception) -> str:
        await trio.sleep(2)
        return f"cached, since {error}"

    @fallback(cached)
    async def fresh(works: bool) -> str:
        if works:
            return "fresh"
        raise OSError("it is down")

    assert await fresh(True) == "fresh" and trio.current_time() == 0
    assert await fresh(False) == "cached, since it is down" and trio.current_time() == 2


async def test_where_the_fallback_fails_too_both_are_seen():
    first, second = OSError("first"), ValueError("second")

    async def worse(error: Exception) -> None:
        raise second

    for instead in (worse, lambda error: (_ for _ in ()).throw(second)):
        with pytest.raises(ValueError) as caught:
            await fallback(instead).call(fails, first)
        assert caught.value is second and second.__context__ is first


@pytest.mark.parametrize(
    ("failure", "given"),
    [
        (ConnectionError(), True),
        (ValueError(), False),
        (ExceptionGroup("", [ConnectionError(), ConnectionError()]), True),
        (ExceptionGroup("", [ConnectionError(), ValueError()]), False),
    ],
)
async def test_only_after_the_failures_that_are_meant(failure, given):
    if given:
        assert await fallback(0, on=OSError).call(fails, failure) == 0
    else:
        with pytest.raises(type(failure)):
            await fallback(0, on=OSError).call(fails, failure)


async def test_nothing_is_given_in_place_of_a_cancellation(autojump_clock):
    with trio.move_on_after(1) as scope:
        assert await fallback(0, on=BaseException).call(trio.sleep_forever)
    assert scope.cancelled_caught


# Which failures are meant


class Deep(Exception):
    class Nested(Exception):
        pass


@pytest.mark.parametrize(
    ("name", "error", "meant"),
    [
        ("ConnectionError", ConnectionResetError(), True),
        ("OSError", ConnectionResetError(), True),
        ("IOError", ConnectionResetError(), True),
        ("Exception", ConnectionResetError(), True),
        ("ConnectionResetError", ConnectionError(), False),
        ("builtins:OSError", ConnectionResetError(), True),
        (f"{__name__}:Deep", Deep(), True),
        (f"{__name__}:Deep.Nested", Deep.Nested(), True),
        (f"{__name__}:Deep", Deep.Nested(), False),
        ("TimedOut", TimedOut(1), True),
        ("Rejected", BreakerOpen("open"), True),
        ("supervisor.errors:Rejected", BreakerOpen("open"), True),
        ("supervisor:Rejected", BreakerOpen("open"), True),
        ("TimedOut", TimeoutError(), False),
        ("nowhere:Error", OSError(), False),
        ("nowhere.at.all:Error", OSError(), False),
        ("NoSuchThing", OSError(), False),
        ("len", OSError(), False),
        ("supervisor.errors:annotations", OSError(), False),
        ("75", ExitStatus("exited with code 75", code=75), True),
        ("7", ExitStatus("exited with code 75", code=75), False),
        ("SIGKILL", ExitStatus("killed by SIGKILL", signal="SIGKILL"), True),
        ("SIGTERM", ExitStatus("killed by SIGKILL", signal="SIGKILL"), False),
        ("None", ExitStatus("killed by SIGKILL", signal="SIGKILL"), False),
        ("ExitStatus", ExitStatus("killed by SIGKILL", signal="SIGKILL"), True),
        ("75", OSError(75), False),
    ],
)
def test_what_a_name_in_a_file_means(name, error, meant):
    assert matcher(name)(error) is meant


def test_a_name_means_a_class_also_where_a_package_has_it_from_elsewhere(monkeypatch):
    kind = type("TransportError", (Exception,), {"__module__": "client._exceptions"})
    assert not matcher("client:TransportError")(kind())
    package = types.ModuleType("client")
    package.TransportError = kind
    monkeypatch.setitem(sys.modules, "client", package)
    assert matcher("client:TransportError")(kind())
    assert matcher("client._exceptions:TransportError")(type("Reset", (kind,), {})())


def test_no_module_is_imported_to_see_what_a_name_means():
    assert "poplib" not in sys.modules
    assert not matcher("poplib:error_proto")(OSError())
    assert "poplib" not in sys.modules


def test_the_leaves_of_groups_in_groups():
    one, two, three = OSError(), ValueError(), KeyboardInterrupt()
    assert list(leaves(BaseExceptionGroup("", [one, BaseExceptionGroup("", [two, three])]))) == [one, two, three]


@pytest.mark.parametrize(
    ("error", "brief"),
    [
        (OSError(), "OSError"),
        (ValueError("\none\ntwo"), "ValueError: one"),
        (ExceptionGroup("", [ExceptionGroup("", [ValueError("one")])]), "ValueError: one"),
        (ValueError("\udc80"), r"ValueError: \udc80"),
        (TimedOut(2), "timed out after 2 s"),
    ],
)
def test_an_exception_in_one_line(error, brief):
    assert in_one_line(error) == brief


# All of them


class Told(Layer):
    """A layer that says when it is entered."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told

    async def call(self, function, /, *args, **kwargs):
        self.told.append(self.name)
        return await function(*args, **kwargs)


@given(st.permutations(ORDER), st.integers(0, len(ORDER)))
def test_they_nest_in_the_one_order_in_whatever_order_they_are_given(names, count):
    told: list[str] = []

    async def body(one: int, *, two: int) -> tuple[int, int]:
        return one, two

    given_ = dict.fromkeys(ORDER) | {name: Told(name, told) for name in names[:count]}
    composed = compose(body, **{name: given_[name] for name in names})
    assert trio.run(lambda: composed(1, two=2)) == (1, 2)
    assert told == [name for name in ORDER if name in names[:count]]


async def test_without_any_it_is_the_function_itself():
    assert compose(fails) is fails
    assert compose(fails, retry=None) is fails


def test_an_unknown_policy_is_named():
    with pytest.raises(TypeError, match="no policy 'retries'"):
        compose(fails, retries=retry())


def test_what_a_layer_makes_is_an_async_function_like_any_other():
    assert inspect.iscoroutinefunction(retry()(fails)) and inspect.iscoroutinefunction(compose(fails, timeout=timeout(1)))


async def test_all_of_them_round_one_function(autojump_clock):
    """Each where ORDER has it: what each attempt does to the breaker, the tokens, the places and the deadline."""
    breaker = CircuitBreaker(failures=3, within=100, open_for=20, successes=1)
    limiter, bulkhead = RateLimiter(1, burst=1), Bulkhead(1, waiting=0)
    began: list[float] = []

    async def body() -> str:
        began.append(trio.current_time())
        assert bulkhead.in_use == 1
        await trio.sleep(60)
        return "done"

    call = compose(
        body,
        timeout=timeout(2), bulkhead=bulkhead, rate=limiter, breaker=breaker, deadline=deadline(33),
        retry=retry(attempts=9, initial=0.25, factor=1, jitter=0), fallback=fallback(lambda error: type(error)),
    )  # fmt: skip
    assert await call() is DeadlineExceeded
    # 2 s each and 0.25 s between; the third opens the breaker at 6.5, which is come back to at 26.5; then again
    assert began == [0, 2.25, 4.5, 26.5]
    assert trio.current_time() == 33 and bulkhead.in_use == 0 and breaker.state.value == "open"


async def test_no_place_is_held_between_attempts(autojump_clock):
    bulkhead = Bulkhead(1, waiting=0)
    call = compose(fails, bulkhead=bulkhead, retry=retry(attempts=2, initial=10, jitter=0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(compose(call, fallback=fallback(None)), OSError())
        await trio.sleep(5)
        assert await bulkhead.call(trio.sleep, 1) is None


async def test_a_full_bulkhead_is_tried_again_and_does_not_open_the_breaker(autojump_clock):
    bulkhead, breaker = Bulkhead(1, waiting=0), CircuitBreaker(failures=1)
    call = compose(trio.sleep, bulkhead=bulkhead, breaker=breaker, retry=retry(attempts=4, initial=4, jitter=0, on=Retry))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bulkhead.call, trio.sleep, 5)
        await trio.testing.wait_all_tasks_blocked()
        await call(1)
    assert trio.current_time() == 13, "tried at 0 and 4, let in at 12"
    with pytest.raises(BulkheadFull):
        async with bulkhead:
            await call(1)
    assert breaker.state.value == "closed"


def test_cancelled_at_any_step_of_all_of_them_nothing_is_held():
    def scene():
        bulkhead, limiter = Bulkhead(1), RateLimiter(1, burst=2)
        breaker = CircuitBreaker(failures=3, open_for=4, successes=1)

        async def body(fails: list[Exception]) -> None:
            await trio.sleep(1)
            if fails:
                raise fails.pop()

        call = compose(
            body, bulkhead=bulkhead, rate=limiter, breaker=breaker, timeout=timeout(9),
            retry=retry(attempts=50, initial=1, factor=1, jitter=0), deadline=deadline(500),
        )  # fmt: skip

        async def victim() -> None:
            await call([OSError(), OSError(), OSError(), OSError()])

        async def other() -> None:
            await call([OSError()])

        async def last() -> None:
            await trio.sleep(200)
            await call([])  # finds its way, and closes the breaker if the others have left it open

        def all_well() -> bool:
            return (bulkhead.in_use, bulkhead.waiting, limiter.waiting) == (0, (), ()) and breaker.state.value == "closed"

        return victim, [other, other, last], all_well

    assert cancelled_at_every_step(scene) >= 8


def test_the_threads_that_a_program_has_use_them_from_there():
    """As docs/policies.md says: by trio.from_thread, since a layer belongs to the Trio thread."""
    limiter = RateLimiter(2)
    times = []

    def in_a_thread() -> None:
        for _ in range(3):
            trio.from_thread.run(limiter.acquire)
            times.append(trio.from_thread.run_sync(trio.current_time))

    async def main() -> None:
        await trio.to_thread.run_sync(in_a_thread)

    trio.run(main, clock=MockClock(rate=20))
    assert len(times) == 3 and times[2] >= 1 - 1e-6


@pytest.mark.parametrize("name", ["retry", "timeout", "deadline", "fallback", "CircuitBreaker", "Bulkhead", "RateLimiter"])
def test_the_public_names_are_the_layers(name):
    assert issubclass(getattr(supervisor, name), Layer) and name in supervisor.__all__


@pytest.mark.parametrize("policy", POLICIES)
def test_the_benchmark_measures_what_every_policy_costs(policy):
    assert isinstance(run_one(policy, "ours", 10), float)
