"""Runs under policies, by chance: whatever jobs do and operators ask for, nothing is held, and no attempt is one too many."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from supervisor.events import Ended, FallingBack, Starting, fold
from supervisor.kinds import Context, JobSpec
from supervisor.policies import BreakerSpec, LimitSpec, RetrySpec
from supervisor.spec import Rate, RestartType, Seconds
from tests.forest import forest, job

GRACE = 2.0
NAMES = ("a", "b", "c")

seconds = st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.0])
deeds = st.tuples(st.sampled_from(["ends", "fails", "goes on"]), seconds)
"""What an attempt does, and when. What goes on does not hear that it is asked to end."""

policies = st.fixed_dictionaries(
    {},
    optional={
        "timeout": st.sampled_from([1, 2, 5]),
        "deadline": st.sampled_from([1, 4, 9]),
        "retry": st.builds(
            RetrySpec,
            attempts=st.integers(1, 4),
            initial=st.sampled_from([Seconds(0), Seconds(1), Seconds(4)]),
            jitter=st.just(0.0),
        ),
        "breaker": st.just("db"),
        "rate": st.just("db"),
        "bulkhead": st.just("db"),
        "fallback": st.sampled_from(["ends", "fails"]),
    },
)
limits = st.builds(
    LimitSpec,
    concurrency=st.integers(1, 2),
    waiting=st.none() | st.integers(0, 1),
    rate=st.sampled_from([Rate(0.3), Rate(2)]),
    burst=st.integers(1, 2),
    within=st.none() | st.just(Seconds(2)),
    breaker=st.builds(BreakerSpec, failures=st.integers(1, 3), open_for=st.just(Seconds(4)), successes=st.integers(1, 2)),
)
commands = st.tuples(
    st.floats(0, 30, allow_nan=False),
    st.sampled_from(["start", "stop", "restart", "run-now", "cancel", "pause"]),
    st.sampled_from(NAMES),
)


class Watch:
    """Who is at work, by what the functions themselves say."""

    def __init__(self) -> None:
        self.alive: dict[str, int] = {}
        self.begun: dict[str, list[int]] = {}
        self.limited = 0
        self.most = 0

    def function(self, plan: list[tuple[str, float]], limited: bool) -> Callable[[Context], Awaitable[None]]:
        left = list(plan)

        async def work(ctx: Context) -> None:
            assert not self.alive.get(ctx.job), f"two attempts of {ctx.run} at the same time"
            self.alive[ctx.job] = 1
            self.begun.setdefault(ctx.run, []).append(ctx.attempt)
            self.limited += limited
            self.most = max(self.most, self.limited)
            try:
                await self._do(*(left.pop(0) if left else ("ends", 0.0)), ctx)
            finally:
                self.alive[ctx.job] = 0
                self.limited -= limited

        return work

    async def _do(self, what: str, how_long: float, ctx: Context) -> None:
        if what == "goes on":
            await trio.sleep(10 * how_long)
        elif await ctx.sleep(how_long) and what == "fails":
            raise RuntimeError("boom")


async def ends() -> None:
    await trio.sleep(1)


async def fails(failure: Exception) -> None:
    raise ValueError("no answer")


def made(watch: Watch, keys: dict[str, Any], plan: list[tuple[str, float]], every: bool) -> JobSpec:
    when = {"every": 4} if every else {"once": True, "restart": RestartType.TEMPORARY}
    if "fallback" in keys:
        keys = keys | {"fallback": {"ends": ends, "fails": fails}[keys["fallback"]]}
    return job(watch.function(plan, "bulkhead" in keys), grace=GRACE, **when, **keys)


by_chance = given(
    jobs=st.lists(st.tuples(policies, st.lists(deeds, max_size=8), st.booleans()), min_size=3, max_size=3),
    limit=limits,
    asked=st.lists(commands, max_size=8),
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@by_chance
def test_nothing_is_held_and_no_attempt_is_one_too_many(jobs, limit, asked):
    live(jobs, limit, asked)


@pytest.mark.long
@settings(max_examples=1000, derandomize=False, suppress_health_check=list(HealthCheck))
@by_chance
def test_nothing_is_held_and_no_attempt_is_one_too_many_for_long(jobs, limit, asked):
    live(jobs, limit, asked)


def live(jobs: Any, limit: LimitSpec, asked: list[tuple[float, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        trio.run(_live, jobs, limit, sorted(asked), Path(base), clock=MockClock(autojump_threshold=0))


async def _live(jobs: Any, limit: LimitSpec, asked: list[tuple[float, str, str]], base: Path) -> None:
    watch = Watch()
    specs = {name: made(watch, *each) for name, each in zip(NAMES, jobs, strict=True)}
    async with forest(base, specs, limits={"db": limit}) as f:
        orders = []
        for at, verb, name in asked:
            await trio.sleep_until(at)
            orders += f.tree.order(verb, [name])
        await trio.sleep_until(40)
        with trio.fail_after(GRACE + 0.001):  # whatever they are at
            await f.tree.stop("*")
        assert not any(watch.alive.values())
        (row,) = f.tree.limit_status("db")
        assert (row.bulkhead.in_use, row.bulkhead.waiting, row.rate.waiting) == (0, (), ())
        assert fold(event for _, event in f.history) == f.tree.journal.table
        with trio.fail_after(0.001):
            for order in orders:
                await order.wait()
    assert watch.most <= limit.concurrency
    assert len(f.events(Starting)) == len(f.events(Ended))
    _judge_attempts(watch, specs, f.events(Ended), f.events(FallingBack))


def _judge_attempts(watch: Watch, specs: dict[str, JobSpec], ended: list[Ended], fell_back: list[FallingBack]) -> None:
    for run, attempts in watch.begun.items():
        retry = specs[run.partition("#")[0]].retry
        assert attempts == sorted(set(attempts)) and attempts[-1] <= (retry.attempts if retry else 1)
    for event in ended:
        assert event.attempts <= (retry.attempts if (retry := specs[event.name].retry) else 1)
    assert len({event.run for event in fell_back}) == len(fell_back)
