"""Who is restarted, when, and who gives up: the pure decisions, against references that are plain lists."""

import math
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.restart import (
    NEVER_READY,
    Delays,
    Precedence,
    ReadyTime,
    Window,
    affected,
    judge,
    restarts,
    shuts_down,
    significant_end,
)
from supervisor.spec import AutoShutdown, Backoff, RestartType, Seconds, Strategy
from supervisor.state import Why

# Intensity

eighths = st.integers(0, 64).map(lambda eighth: eighth / 8)
"""Times and periods that floats hold exactly, so that an edge is an edge."""


@given(limit=st.integers(0, 5), period=eighths, steps=st.lists(eighths, max_size=60))
def test_intensity_is_exact_at_the_edges_of_its_window(limit, period, steps):
    window, times, now = Window(limit, period), [], 100.0
    for step in steps:
        now += step
        times.append(now)
        assert window.add(now) == (len([time for time in times if time >= now - period]) > limit)


@pytest.mark.parametrize("limit", range(6))
def test_as_many_restarts_as_the_limit_are_allowed_and_one_more_is_not(limit):
    window = Window(limit, 10)
    assert [window.add(50.0) for _ in range(limit + 1)] == [False] * limit + [True]


@pytest.mark.parametrize(("age", "counts"), [(9.875, True), (10.0, True), (10.125, False)])
def test_a_restart_exactly_as_old_as_the_period_still_counts(age, counts):
    window = Window(1, 10)
    window.add(0.0)
    assert window.add(age) is counts


def test_a_window_on_a_clock_that_stands_still_never_forgets():
    window = Window(3, 10)
    assert [window.add(7.0) for _ in range(100)] == [False] * 3 + [True] * 97


def test_a_window_remembers_no_more_than_it_needs():
    window = Window(5, 1.0)
    sizes = set()
    for at in range(100_000):
        window.add(at / 1000)
        sizes.add(len(window._times))
    assert max(sizes) == 6


@given(
    old=st.integers(0, 5), new=st.integers(0, 5), period=eighths,
    before=st.lists(eighths, max_size=20), after=st.lists(eighths, max_size=20),
)  # fmt: skip
def test_a_window_with_new_bounds_goes_on_from_what_it_remembers(old, new, period, before, after):
    window, times, now = Window(old, 4.0), [], 100.0
    for step in before:
        now += step
        times.append(now)
        window.add(now)
    window, times = window.resized(new, period), times[-(old + 1) :]
    for step in after:
        now += step
        times.append(now)
        assert window.add(now) == (len([time for time in times if time >= now - period]) > new)


# Backoff

backoffs = st.builds(
    lambda initial, factor, longest, jitter: Backoff(
        initial=Seconds(initial), factor=factor, max=Seconds(longest), jitter=jitter
    ),
    st.floats(0, 100),
    st.floats(1, 10),
    st.floats(0, 1000),
    st.floats(0, 1),
)


def exact(low: float, high: float) -> float:
    return 1.0


def waits(spec: Backoff, count: int) -> list[float]:
    delays = Delays(exact)
    return [delays.after_failure(spec, ready_for=-1.0) for _ in range(count)]


def test_waits_begin_at_initial_and_grow_by_factor_up_to_max():
    spec = Backoff(initial=Seconds(0.5), factor=2.0, max=Seconds(3))
    assert waits(spec, 5) == [0.5, 1.0, 2.0, 3, 3]


@given(backoffs)
def test_waits_never_shrink_and_never_pass_max(spec):
    series = waits(spec, 30)
    assert series[0] == min(spec.initial, spec.max)
    assert all(earlier <= later for earlier, later in pairwise(series))
    assert series[-1] <= spec.max


@given(backoffs, st.floats(0, 1), st.integers(1, 12))
def test_jitter_stays_within_its_bounds_and_does_not_add_up(spec, chance, count):
    asked = []

    def spread(low: float, high: float) -> float:
        asked.append((low, high))
        return low + chance * (high - low)

    delays = Delays(spread)
    for plain in waits(spec, count):
        wait = delays.after_failure(spec, ready_for=-1.0)
        assert plain * (1 - spec.jitter) - 1e-9 <= wait <= min(plain * (1 + spec.jitter) + 1e-9, spec.max)
    assert set(asked) == {(1 - spec.jitter, 1 + spec.jitter)}


@pytest.mark.parametrize(("ready_for", "wait"), [(59.0, 2.0), (60.0, 0.5), (61.0, 0.5), (-1.0, 2.0)])
def test_waits_start_again_after_long_enough_ready(ready_for, wait):
    spec, delays = Backoff(initial=Seconds(0.5), reset_after=Seconds(60)), Delays(exact)
    delays.after_failure(spec, -1.0)
    delays.after_failure(spec, -1.0)
    assert delays.after_failure(spec, ready_for) == wait


def test_what_never_got_ready_does_not_start_again_even_when_any_time_is_enough():
    spec, delays = Backoff(initial=Seconds(1), reset_after=Seconds(0)), Delays(exact)
    assert [delays.after_failure(spec, ready_for) for ready_for in (-1.0, -1.0, 0.0, -1.0)] == [1.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize("unready_is_heard", ["before the failure", "after it"])
def test_how_long_a_group_was_ready_does_not_depend_on_what_is_heard_first(unready_is_heard):
    time = ReadyTime()
    time.note(True, 10.0)
    if unready_is_heard == "before the failure":
        time.note(False, 15.0)
    taken = time.take(15.0)
    time.note(False, 15.0)
    assert (taken, time.take(16.0)) == (5.0, NEVER_READY)


def test_of_several_spells_of_readiness_the_last_counts():
    time = ReadyTime()
    for ready, now in [(True, 0.0), (False, 100.0), (True, 101.0), (False, 103.0), (False, 110.0)]:
        time.note(ready, now)
    assert time.take(111.0) == 2.0


def test_an_operator_starts_the_waits_again():
    spec, delays = Backoff(initial=Seconds(1)), Delays(exact)
    assert [delays.after_failure(spec, -1.0) for _ in range(3)] == [1.0, 2.0, 4.0]
    delays.reset()
    assert delays.after_failure(spec, -1.0) == 1.0


def test_no_wait_stays_no_wait():
    assert waits(Backoff(initial=Seconds(0)), 100) == [0.0] * 100


@pytest.mark.parametrize("factor", [1.0, 2.0, 1e300, sys.float_info.max, math.inf])
@pytest.mark.parametrize("initial", [0.0, 5e-324, 1.0])
def test_no_count_of_failures_overflows(factor, initial):
    spec, delays = Backoff(initial=Seconds(initial), factor=factor, max=Seconds(30)), Delays(exact)
    for _ in range(5000):
        wait = delays.after_failure(spec, -1.0)
        assert 0 <= wait <= 30


# Ends


@pytest.mark.parametrize(
    ("restart", "failed", "expected"),
    [
        (RestartType.PERMANENT, True, (True, Why.FAILED)),
        (RestartType.PERMANENT, False, (True, Why.EXITED)),
        (RestartType.TRANSIENT, True, (True, Why.FAILED)),
        (RestartType.TRANSIENT, False, (False, Why.COMPLETED)),
        (RestartType.TEMPORARY, True, (True, Why.FAILED)),
        (RestartType.TEMPORARY, False, (False, Why.COMPLETED)),
    ],
)
def test_an_end_is_judged_by_the_restart_type(restart, failed, expected):
    assert judge(restart, failed) == expected


@pytest.mark.parametrize("failed", [True, False])
@pytest.mark.parametrize("restart", RestartType)
def test_permanent_always_transient_after_a_failure_temporary_never(restart, failed):
    failure, _ = judge(restart, failed)
    expected = {RestartType.PERMANENT: True, RestartType.TRANSIENT: failed, RestartType.TEMPORARY: False}
    assert restarts(restart, failure) is expected[restart]


def test_a_significant_end_is_any_of_a_temporary_and_a_good_one_of_a_transient():
    counting = {(restart, failure) for restart in RestartType for failure in (True, False) if significant_end(restart, failure)}
    assert counting == {(RestartType.TEMPORARY, True), (RestartType.TEMPORARY, False), (RestartType.TRANSIENT, False)}


@pytest.mark.parametrize(
    ("auto", "others_active", "ends"),
    [
        (AutoShutdown.NEVER, False, False),
        (AutoShutdown.NEVER, True, False),
        (AutoShutdown.ANY_SIGNIFICANT, False, True),
        (AutoShutdown.ANY_SIGNIFICANT, True, True),
        (AutoShutdown.ALL_SIGNIFICANT, False, True),
        (AutoShutdown.ALL_SIGNIFICANT, True, False),
    ],
)
def test_a_supervisor_ends_with_any_or_with_the_last_of_its_significant_children(auto, others_active, ends):
    assert shuts_down(auto, others_active) is ends


# Strategies


@given(st.lists(st.text("abc", min_size=1), unique=True, min_size=1), st.data())
def test_a_strategy_affects_the_child_all_of_them_or_the_rest(children, data):
    failed = data.draw(st.sampled_from(children))
    at = children.index(failed)
    assert affected(Strategy.ONE_FOR_ONE, children, failed) == (failed,)
    assert affected(Strategy.ONE_FOR_ALL, children, failed) == tuple(children)
    assert affected(Strategy.REST_FOR_ONE, children, failed) == tuple(children[at:])


# Order


@st.composite
def orders(draw):
    """Children, who must come before whom (no cycle), and a strategy."""
    names = [f"c{at}" for at in range(draw(st.integers(1, 8)))]
    before = {name: draw(st.sets(st.sampled_from(names[:at]), max_size=3)) if at else set() for at, name in enumerate(names)}
    return draw(st.sampled_from(Strategy)), names, before


def ahead(strategy: Strategy, names: list[str], before: dict[str, set[str]]) -> dict[str, set[str]]:
    """Everybody who comes before each, directly or through others."""
    closure: dict[str, set[str]] = {}
    for at, name in enumerate(names):
        direct = before[name] | (set(names[:at]) if strategy is Strategy.REST_FOR_ONE else set())
        closure[name] = direct.union(*(closure[other] for other in direct))
    return closure


@settings(max_examples=50)
@given(orders(), st.data())
def test_only_what_nobody_alive_comes_after_may_stop(order, data):
    strategy, names, before = order
    precedence = Precedence(strategy, names, before)
    alive = data.draw(st.sets(st.sampled_from(names)))
    for name in names:
        later = {other for other in alive if name in ahead(*order)[other]}
        assert precedence.may_stop(name, alive) == (not later)


@settings(max_examples=50)
@given(orders(), st.randoms(use_true_random=False))
def test_everybody_stops_and_in_the_reverse_of_the_order(order, random):
    strategy, names, before = order
    precedence = Precedence(strategy, names, before)
    alive, gone = set(names), []
    while alive:
        free = sorted(name for name in alive if precedence.may_stop(name, alive))
        assert free, "a deadlock"
        gone.append(random.choice(free))
        alive.remove(gone[-1])
    for name in names:
        assert all(gone.index(name) < gone.index(earlier) for earlier in ahead(*order)[name])


@settings(max_examples=50)
@given(orders(), st.randoms(use_true_random=False))
def test_everybody_can_start_when_what_comes_before_is_ready(order, random):
    strategy, names, before = order
    precedence = Precedence(strategy, names, before)
    ready: list[str] = []
    while len(ready) < len(names):
        free = [
            name
            for name in names
            if name not in ready and before[name] <= set(ready) and set(precedence.earlier(name)) <= set(ready)
        ]
        assert free, "a deadlock"
        ready.append(random.choice(free))
    if strategy is Strategy.REST_FOR_ONE:
        assert ready == names


@settings(max_examples=50)
@given(orders())
def test_an_order_says_whether_it_is_one(order):
    strategy, names, before = order
    precedence = Precedence(strategy, names, before)
    assert precedence.chained == (strategy is Strategy.REST_FOR_ONE)
    assert precedence.orders == (precedence.chained or any(before.values()))


def test_a_name_that_has_left_the_list_is_in_nobodys_way():
    precedence = Precedence(Strategy.REST_FOR_ONE, ["a", "b"], {})
    assert precedence.earlier("gone") == ()
    assert precedence.may_stop("a", {"a", "gone"})
