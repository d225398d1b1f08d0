"""The policies round a run: attempts, their time, what is between them and after them. In virtual time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from supervisor.errors import Retry
from supervisor.events import (
    AttemptOverdue,
    AttemptStarting,
    BreakerChanged,
    Ended,
    FallingBack,
    Retrying,
    Starting,
    Stuck,
    fold,
)
from supervisor.kinds import Attempt, Context, Run
from supervisor.kinds.thread import ThreadContext
from supervisor.policies import BreakerSpec, RetrySpec
from supervisor.spec import RestartType, Seconds
from supervisor.state import State
from tests.forest import Forest, crash, forest, job, lasting, serve, settle, slow

ONCE = {"once": True, "restart": RestartType.TEMPORARY}


def retrying(attempts: int = 3, initial: float = 1, **keys: Any) -> RetrySpec:
    return RetrySpec(attempts=attempts, initial=Seconds(initial), jitter=0.0, **keys)


def failing(*errors: Exception | None, takes: float = 0.0) -> Callable[[Context], Any]:
    """Work whose attempts fail with these, one after another; None is success, and so is what comes after them."""
    left = list(errors)

    async def work(ctx: Context) -> None:
        await trio.sleep(takes)
        if left and (error := left.pop(0)) is not None:
            raise error

    return work


def end_of(f: Forest, name: str = "a") -> tuple[float, str]:
    """When its last run ended, and what it came to."""
    at, event = [(at, event) for at, event in f.history if isinstance(event, Ended) and event.name == name][-1]
    return at, event.exit.reason


def causes(f: Forest, kind: Any) -> list[tuple[float, str]]:
    return [(at, event.cause) for at, event in f.history if isinstance(event, kind)]


async def run_of(tmp_path: Any, call: Callable[..., Any], **keys: Any) -> Forest:
    """One run of a job to its end."""
    async with forest(tmp_path, {"a": job(call, **ONCE, **keys)}) as f:
        with trio.fail_after(1000):
            while f.word("a") not in ("completed", "failed"):
                await trio.sleep(1)
        assert fold(event for _, event in f.history) == f.tree.journal.table
    return f


# ---- retry ----


async def test_a_failed_attempt_is_followed_by_another_after_a_longer_wait_each_time(autojump_clock, tmp_path):
    f = await run_of(tmp_path, failing(OSError("no net"), OSError("no net"), OSError("no net")), retry=retrying(4))
    assert causes(f, Retrying) == [
        (0.0, "attempt 2 of 4 in 1s: OSError: no net"),
        (1.0, "attempt 3 of 4 in 2s: OSError: no net"),
        (3.0, "attempt 4 of 4 in 4s: OSError: no net"),
    ]
    assert f.times(AttemptStarting, "a") == [1.0, 3.0, 7.0]
    assert end_of(f) == (7.0, "completed")
    assert [event.attempts for event in f.events(Ended)] == [4]
    assert f.times(Starting, "a") == [0.0]
    assert [log["event"] for log in f.logs] == ["attempt raised"] * 3  # at debug: what was expected is no error


async def test_when_no_attempt_is_left_the_last_failure_is_the_run_s(autojump_clock, tmp_path):
    f = await run_of(tmp_path, failing(OSError("first"), ValueError("second"), KeyError("third")), retry=retrying(2))
    assert end_of(f) == (1.0, "ValueError: second")
    assert f.word("a") == "failed"
    assert [(log["event"], log["log_level"]) for log in f.logs] == [("attempt raised", "debug"), ("job raised", "error")]


async def test_between_attempts_the_row_says_what_comes_when_and_why(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(failing(OSError("no net")), **ONCE, retry=retrying(initial=40))}) as f:
        await trio.sleep(4)
        row = f.tree.status("a")[0]
        assert (row.state, row.word) == (State.RUNNING, "running")
        assert row.cause == "attempt 2 of 3 in 40s: OSError: no net"
        assert row.next_at == f.events(Retrying)[0].next_at
        await trio.sleep(38)
        row = f.tree.status("a")[0]
        assert (row.word, row.next_at) == ("completed", None)


async def test_a_run_knows_which_attempt_it_is(autojump_clock, tmp_path):
    seen = []

    async def work(ctx: Context) -> None:
        seen.append((ctx.run, ctx.attempt))
        if ctx.attempt < 3:
            raise RuntimeError("boom")

    await run_of(tmp_path, work, retry=retrying())
    assert seen == [("a#1", 1), ("a#1", 2), ("a#1", 3)]


async def test_only_failures_that_are_meant_are_worth_another_attempt(autojump_clock, tmp_path):
    work = failing(ConnectionResetError("reset"), ValueError("odd"))
    f = await run_of(tmp_path, work, retry=retrying(5, on=("ConnectionError",)))
    assert end_of(f) == (1.0, "ValueError: odd")
    f = await run_of(tmp_path, failing(ValueError("odd")), retry=retrying(5, give_up_on=("ValueError",)))
    assert f.times(Retrying, "a") == []


async def test_a_function_says_when_it_wants_to_be_tried_again(autojump_clock, tmp_path):
    f = await run_of(tmp_path, failing(Retry(after=17), Retry("busy")), retry=retrying())
    assert causes(f, Retrying) == [
        (0.0, "attempt 2 of 3 in 17s: asks for another attempt"),
        (17.0, "attempt 3 of 3 in 2s: busy"),
    ]


async def test_an_exit_that_python_code_asks_for_is_a_failure_like_any_other(autojump_clock, tmp_path):
    async def leave() -> None:
        raise SystemExit(3)

    f = await run_of(tmp_path, leave, retry=retrying(2))
    assert causes(f, Retrying) == [(0.0, "attempt 2 of 2 in 1s: SystemExit: 3")]
    assert end_of(f) == (1.0, "SystemExit: 3")


async def test_a_run_that_failed_with_its_attempts_is_restarted_like_any_other(autojump_clock, tmp_path):
    spec = job(failing(*[OSError("x")] * 3), once=True, retry=retrying(2))
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep(30)
        assert f.times(Starting, "a") == [0.0, 1.5]  # one restart, after both attempts of the first run
        assert f.tree.status("a")[0].restarts == 1
        assert f.word("a") == "completed"


async def test_the_jitter_is_the_tree_s(autojump_clock, tmp_path):
    spec = job(crash, **ONCE, start="manual", retry=RetrySpec(attempts=2, initial=Seconds(8), jitter=0.5))
    async with forest(tmp_path, {"a": spec}) as f:
        asked = []
        f.tree.spread = lambda low, high: asked.append((low, high)) or 0.75
        await f.tree.start("a")
        await trio.sleep(20)
    assert asked == [(0.5, 1.0)]
    assert causes(f, Retrying) == [(0.0, "attempt 2 of 2 in 6s: RuntimeError: boom")]


# ---- the time of an attempt, and of all of them ----


async def ignoring(ctx: Context) -> None:
    await trio.sleep_forever()


async def deaf() -> None:
    await trio.sleep_forever()


async def test_an_attempt_that_takes_too_long_is_asked_and_has_its_grace(autojump_clock, tmp_path):
    f = await run_of(tmp_path, slow(3), timeout=10, grace=5)
    assert causes(f, AttemptOverdue) == [(10.0, "timed out after 10 s")]
    assert end_of(f) == (13.0, "timed out after 10 s")  # though it returned
    assert f.word("a") == "failed"


async def test_what_does_not_end_in_its_grace_is_cancelled(autojump_clock, tmp_path):
    f = await run_of(tmp_path, ignoring, timeout=10, grace=5)
    assert [(at, event.cause, event.killed) for at, event in f.history if isinstance(event, AttemptOverdue)] == [
        (10.0, "timed out after 10 s", False),
        (15.0, "did not end in its grace: timed out after 10 s", True),
    ]
    assert end_of(f) == (15.0, "timed out after 10 s")


async def test_what_cannot_hear_is_cancelled_at_once(autojump_clock, tmp_path):
    f = await run_of(tmp_path, deaf, timeout=10, grace=5)
    assert end_of(f) == (10.0, "timed out after 10 s")


async def test_what_ends_in_time_is_left_alone(autojump_clock, tmp_path):
    f = await run_of(tmp_path, lasting(9), timeout=10, deadline=20)
    assert end_of(f) == (9.0, "completed")
    assert f.times(AttemptOverdue, "a") == []


async def test_each_attempt_has_a_time_of_its_own(autojump_clock, tmp_path):
    f = await run_of(tmp_path, deaf, timeout=10, retry=retrying(3))
    assert causes(f, Retrying) == [
        (10.0, "attempt 2 of 3 in 1s: timed out after 10 s"),
        (21.0, "attempt 3 of 3 in 2s: timed out after 10 s"),
    ]
    assert end_of(f) == (33.0, "timed out after 10 s")


async def test_a_deadline_is_for_all_attempts_together(autojump_clock, tmp_path):
    f = await run_of(tmp_path, deaf, timeout=10, deadline=25, retry=retrying(5))
    assert f.times(AttemptOverdue, "a") == [10.0, 21.0, 25.0]
    assert end_of(f) == (25.0, "exceeded its deadline of 25 s")


async def test_a_deadline_cuts_off_a_wait_and_the_last_failure_is_not_forgotten(autojump_clock, tmp_path):
    f = await run_of(tmp_path, crash, deadline=25, retry=retrying(initial=40))
    assert end_of(f) == (25.0, "exceeded its deadline of 25 s; the last failure: RuntimeError: boom")
    assert [event.attempts for event in f.events(Ended)] == [1]
    assert [log["event"] for log in f.logs] == ["attempt raised", "job raised"]


async def test_a_deadline_comes_in_the_middle_of_an_attempt_as_a_timeout_does(autojump_clock, tmp_path):
    f = await run_of(tmp_path, slow(3), timeout=10, deadline=18, retry=retrying(5))
    # asked at 10, ended at 13, again at 14; asked at 18, ended at 21
    assert causes(f, AttemptOverdue) == [(10.0, "timed out after 10 s"), (18.0, "exceeded its deadline of 18 s")]
    assert end_of(f) == (21.0, "exceeded its deadline of 18 s")


async def test_what_is_left_of_the_time_is_visible(autojump_clock, tmp_path):
    seen = []

    async def work(ctx: Context) -> None:
        seen.append(ctx.deadline)
        await ctx.sleep(4)
        seen.append(ctx.deadline)
        raise RuntimeError("boom")

    await run_of(tmp_path, work, timeout=10, deadline=13, retry=retrying(2))
    assert seen == [10.0, 6.0, 8.0, 4.0]  # the second attempt, from 5 on, has until 13
    seen.clear()
    await run_of(tmp_path, work, retry=retrying(1))
    assert seen == [None, None]


async def test_a_run_that_is_to_end_with_its_attempt_is_stopping_and_another_is_not(autojump_clock, tmp_path):
    jobs = {"last": job(slow(3), **ONCE, timeout=10), "first": job(slow(3), **ONCE, timeout=10, retry=retrying(2))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(11)
        assert f.words() == "last:stopping first:running"
        assert [row.cause for row in f.tree.status()] == ["timed out after 10 s"] * 2


# ---- what ends it before its time ----


async def test_a_stop_between_attempts_ends_the_run_and_no_attempt_follows(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(crash, **ONCE, retry=retrying(initial=40))}) as f:
        await trio.sleep(5)
        await f.tree.stop("a")
        assert end_of(f) == (5.0, "RuntimeError: boom; not tried again: it was asked to end")
        assert [event.attempts for event in f.events(Ended)] == [1]
        await trio.sleep(100)
    assert f.times(Starting, "a") == [0.0] and f.times(AttemptStarting, "a") == []


async def test_a_stopped_attempt_that_ends_well_has_completed(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(slow(3), **ONCE, retry=retrying(), fallback=lasting(1))}) as f:
        await trio.sleep(5)
        await f.tree.stop("a")
        assert end_of(f) == (8.0, "completed")


async def test_a_cancel_in_the_middle_of_an_attempt_is_no_failure_and_not_tried_again(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(slow(3), **ONCE, retry=retrying(), breaker=BreakerSpec(failures=1))}) as f:
        await trio.sleep(5)
        await f.tree.cancel("a#1")
        assert end_of(f) == (8.0, "cancelled")
        assert f.times(Retrying, "a") == [] and f.events(BreakerChanged) == []
        assert f.tree.limit_status("a")[0].breaker.failures == 0


async def test_what_a_stopped_attempt_came_to_says_nothing_to_the_breaker(autojump_clock, tmp_path):
    async def sulking(ctx: Context) -> None:
        await ctx.wait_stopping()
        raise RuntimeError("I was not done")

    async with forest(tmp_path, {"a": job(sulking, **ONCE, retry=retrying(), breaker=BreakerSpec(failures=1))}) as f:
        await trio.sleep(5)
        await f.tree.stop("a")
        assert end_of(f) == (5.0, "RuntimeError: I was not done; not tried again: it was asked to end")
        assert f.tree.limit_status("a")[0].breaker.state == "closed"


async def test_a_draining_daemon_makes_no_further_attempt(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(crash, **ONCE, retry=retrying(initial=40)), "b": job(slow(20))}) as f:
        await trio.sleep(5)
        f.tree.shutdown("a test")
        await f.tree.wait_stopped()
    assert end_of(f) == (5.0, "RuntimeError: boom; not tried again: a test")


async def test_a_stop_of_an_attempt_that_is_past_its_time_does_not_wait_for_it_longer(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(ignoring, **ONCE, timeout=10, grace=5, retry=retrying())}) as f:
        await trio.sleep(12)
        await f.tree.stop("a")
        assert end_of(f) == (15.0, "timed out after 10 s; not tried again: it was asked to end")


# ---- what cannot be killed ----


class Blocking:
    """A function that blocks its thread until it is let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate = threading.Event()

    def __call__(self) -> None:
        self.calls += 1
        assert self.gate.wait(60)


async def test_a_thread_that_does_not_end_is_stuck_and_no_attempt_follows_before_it_is_gone(autojump_clock, tmp_path):
    blocking = Blocking()
    try:
        async with forest(tmp_path, {"a": job(blocking, **ONCE, timeout=10, grace=5, retry=retrying(2))}) as f:
            await trio.sleep(100)
            while not blocking.calls:
                await trio.sleep(1)
            assert causes(f, Stuck) == [(15.0, "thread a#1 does not end, and a thread cannot be killed")]
            assert (f.word("a"), blocking.calls) == ("stuck", 1)
            autojump_clock.autojump_threshold = math.inf  # from here on threads work, in a time of their own
            blocking.gate.set()
            await seen(lambda: causes(f, Retrying))
            autojump_clock.jump(1)
            await seen(lambda: f.word("a") == "completed")
            assert blocking.calls == 2
            assert causes(f, Retrying)[0][1] == "attempt 2 of 2 in 1s: timed out after 10 s"
            autojump_clock.autojump_threshold = 0
    finally:
        blocking.gate.set()


async def seen(condition: Callable[[], object]) -> None:
    """Wait, in real time, until it is so."""
    while not condition():
        await trio.to_thread.run_sync(threading.Event().wait, 0.001)


async def test_a_thread_that_does_not_end_with_its_last_attempt_keeps_the_job_stopping(autojump_clock, tmp_path):
    blocking = Blocking()
    try:
        async with forest(tmp_path, {"a": job(blocking, **ONCE, timeout=10, grace=5)}) as f:
            await trio.sleep(100)
            row = f.tree.status("a")[0]
            assert (row.state, row.word) == (State.STOPPING, "stuck")
            blocking.gate.set()
    finally:
        blocking.gate.set()


async def test_a_daemon_that_ends_gives_up_a_thread_that_does_not(autojump_clock, tmp_path):
    blocking = Blocking()
    try:
        async with forest(tmp_path, {"a": job(blocking, **ONCE, timeout=10, grace=5, retry=retrying(2))}) as f:
            await trio.sleep(20)
            f.tree.shutdown("a test")
            await f.tree.wait_stopped()
            assert f.tree.survivors == ("a (thread a#1 does not end, and a thread cannot be killed)",)
    finally:
        blocking.gate.set()


async def test_a_thread_knows_what_is_left_of_its_time(tmp_path):
    seen = []

    def work(ctx: ThreadContext) -> None:
        seen.append((ctx.attempt, ctx.deadline))

    jobs = {
        "a": job(work, **ONCE, start="manual", timeout=1000),
        "b": job(work, **ONCE, start="manual", retry=retrying()),
    }
    async with forest(tmp_path, jobs) as f:
        await f.tree.run_now("a")
        await f.tree.run_now("b")
    (attempt, left), other = seen
    assert (attempt, other) == (1, (1, None)) and 900 < left <= 1000  # no virtual time: a thread takes its own


# ---- fallback ----


async def test_a_fallback_completes_a_run_that_has_failed_for_good(autojump_clock, tmp_path):
    seen = []

    async def answer(failure: Exception) -> None:
        seen.append(failure)
        await trio.sleep(2)

    f = await run_of(tmp_path, crash, retry=retrying(2), fallback=answer)
    assert causes(f, FallingBack) == [(1.0, "fallback after: RuntimeError: boom")]
    assert end_of(f) == (3.0, "completed by its fallback after: RuntimeError: boom")
    assert f.word("a") == "completed"
    assert [str(failure) for failure in seen] == ["boom"]


async def test_a_fallback_that_fails_itself_hides_nothing(autojump_clock, tmp_path):
    async def answer() -> None:
        raise ValueError("nothing in the cache")

    f = await run_of(tmp_path, crash, fallback=answer)
    assert end_of(f) == (0.0, "RuntimeError: boom; its fallback failed: ValueError: nothing in the cache")
    assert f.word("a") == "failed"
    assert [log["event"] for log in f.logs] == ["job raised"] * 2


async def test_a_fallback_gets_the_arguments_it_has_parameters_for(autojump_clock, tmp_path):
    seen = []

    async def work(x: int, y: int) -> None:
        raise RuntimeError("boom")

    async def answer(y: int, ctx: Context) -> None:  # no thread: the clock would jump on while it is on its way
        seen.append((y, ctx.run))

    await run_of(tmp_path, work, args={"x": 1, "y": 2}, fallback=answer)
    assert seen == [(2, "a#1")]


async def test_a_fallback_answers_a_deadline_too(autojump_clock, tmp_path):
    f = await run_of(tmp_path, deaf, deadline=10, retry=retrying(), fallback=lasting(1))
    assert end_of(f) == (11.0, "completed by its fallback after: exceeded its deadline of 10 s")


async def test_who_is_told_to_end_does_not_fall_back(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(crash, **ONCE, retry=retrying(initial=40), fallback=lasting(1))}) as f:
        await trio.sleep(5)
        await f.tree.stop("a")
        assert f.times(FallingBack, "a") == []


async def test_a_fallback_in_a_thread_cannot_be_killed_and_a_stop_says_so(autojump_clock, tmp_path):
    blocking = Blocking()
    try:
        async with forest(tmp_path, {"a": job(crash, **ONCE, fallback=blocking, grace=5)}) as f:
            await trio.sleep(1)
            (order,) = f.tree.order("stop", ["a"])
            await trio.sleep(20)
            assert f.word("a") == "stuck"
            blocking.gate.set()
            assert (await order.wait()).ok
    finally:
        blocking.gate.set()


# ---- what it costs ----


async def test_a_job_without_policies_has_nothing_of_it(autojump_clock, tmp_path):
    runs: dict[str, Run] = {}

    async def work(ctx: Context) -> None:
        runs[ctx.job] = ctx._run
        await ctx.wait_stopping()

    async with forest(tmp_path, {"plain": job(work, once=True), "with": job(work, once=True, timeout=10)}) as f:
        await settle()
        assert (type(runs["plain"]), type(runs["with"])) == (Run, Attempt)
        assert runs["plain"] is f.tree.nodes["plain"].life.run


async def test_the_service_of_a_name_that_had_policies_is_plain(autojump_clock, tmp_path):
    """A reload that makes a service of a job leaves nothing of its policies."""
    async with forest(tmp_path, {"a": job(lasting(1), **ONCE, timeout=10)}) as f:
        await trio.sleep(2)
        f.tree.apply(f.config({"a": job(serve)}))
        await trio.sleep(100)
        assert f.word("a") == "running"


@pytest.mark.parametrize("policies", [{"timeout": 1000}, {"retry": retrying()}, {"deadline": 1000}])
async def test_readiness_and_progress_are_the_run_s(autojump_clock, tmp_path, policies):
    from supervisor.events import Progress, Ready
    from supervisor.probes import Ready as ReadySpec

    async def work(ctx: Context) -> None:
        await trio.sleep(3)
        ctx.ready()
        ctx.progress(1, 2)
        ctx.heartbeat()
        await trio.sleep(3)

    async with forest(tmp_path, {"a": job(work, **ONCE, ready=ReadySpec(notify=True), **policies)}) as f:
        await trio.sleep(10)
    assert f.times(Ready, "a") == [3.0]
    assert [(event.run, event.done) for event in f.events(Progress)] == [("a#1", 1)]
