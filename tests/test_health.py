"""Whether a run is ready, and then whether it is well: probes under the tree's rules, in virtual time."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import trio

from supervisor.events import Ended, HealthCheckFailed, HealthUnknown, Healthy, Killing, Ready, Starting, Stopping, Unhealthy
from supervisor.kinds import Context
from supervisor.kinds.thread import ThreadContext
from supervisor.nodes import ladder
from supervisor.nodes.attendance import ONE_TRY
from supervisor.probes import Health
from supervisor.probes import Ready as ReadySpec
from supervisor.spec import Backoff, RestartType, Seconds, Strategy
from tests.forest import SIXTY, forest, group, job, serve, settle, slow

MINUTE = Backoff(initial=Seconds(60), factor=1, max=Seconds(60))


class Answers:
    """A health function whose answers are given one after another; the last one goes on."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.asked: list[float] = []
        self.__name__ = "answers"

    async def __call__(self) -> Any:
        self.asked.append(trio.current_time())
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            await trio.sleep(answer)
            return True
        return answer

    def __str__(self) -> str:
        return "m:f"


def health(call: Any, **keys: Any) -> Health:
    for name in ("every", "timeout", "start_period"):
        if name in keys:
            keys[name] = Seconds(keys[name])
    return Health(call=call, **keys)


def heartbeat(**keys: Any) -> Health:
    return Health(notify=True, **{name: Seconds(value) if name == "every" else value for name, value in keys.items()})


async def test_three_bad_answers_in_a_row_end_the_run_and_it_is_restarted_by_its_rules(autojump_clock, tmp_path):
    answers = Answers(True, False, False, True, False, "no disk", False, True)
    async with forest(tmp_path, {"a": job(serve, health=health(answers), backoff=SIXTY)}) as f:
        await trio.sleep_until(75)
        assert f.times(Unhealthy, "a") == [70.0]
        assert f.times(Starting, "a") == [0.0]
        assert f.word("a") == "backing off"
        await trio.sleep_until(145)
        assert f.times(Starting, "a") == [0.0, 130.0]
        assert f.tree.status("a")[0].healthy is True
    assert answers.asked == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 140.0]
    assert f.times(Healthy, "a") == [10.0, 40.0, 140.0]
    assert [(e.cause, e.failures, e.answered) for e in f.events(HealthCheckFailed)] == [
        ("health check failed, 1 of 3: m:f: it returned False", 1, True),
        ("health check failed, 2 of 3: m:f: it returned False", 2, True),
        ("health check failed, 1 of 3: m:f: it returned False", 1, True),
        ("health check failed, 2 of 3: m:f: no disk", 2, True),
    ]
    [end] = [event for event in f.events(Ended) if event.failed]
    assert end.exit.reason == "unhealthy: m:f: it returned False, 3 times in a row"


async def test_a_target_that_hangs_is_cut_at_its_timeout_and_is_no_answer(autojump_clock, tmp_path):
    answers = Answers(1e9)
    async with forest(tmp_path, {"a": job(serve, health=health(answers, timeout=4, failures=2), backoff=SIXTY)}) as f:
        await trio.sleep_until(30)
        assert answers.asked == [10.0, 20.0]
        assert f.times(HealthCheckFailed, "a") == [14.0]
        assert f.times(Unhealthy, "a") == [24.0]
        assert [event.answered for event in f.events(HealthCheckFailed, Unhealthy)] == [False, False]
        assert f.tree.status("a")[0].exit.reason == "unhealthy: m:f: no answer within 4 s, 2 times in a row"


async def test_questions_do_not_overlap_where_an_answer_takes_longer_than_every(autojump_clock, tmp_path):
    answers = Answers(7)
    async with forest(tmp_path, {"a": job(serve, health=health(answers, every=5, timeout=9))}) as f:
        await trio.sleep_until(30)
        assert f.word("a") == "running"
    assert answers.asked == [5.0, 12.0, 19.0, 26.0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (False, "it returned False"),
        ("the cache is cold\nreally", "the cache is cold really"),
        (RuntimeError("boom"), "RuntimeError: boom"),
        (SystemExit(3), "SystemExit: 3"),
        (ExceptionGroup("all", [ValueError("one")]), "ValueError: one"),
        ([], "it returned list, expected True, False, None or a reason"),
        (trio.Cancelled._create(source="unknown"), "Cancelled: cancelled"),
    ],
)
async def test_what_a_function_can_answer_besides_yes(answer, reason, autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve, health=health(Answers(answer), failures=1), backoff=SIXTY)}) as f:
        await trio.sleep_until(15)
        assert f.tree.status("a")[0].exit.reason.startswith(f"unhealthy: m:f: {reason}")


@pytest.mark.parametrize("answer", [True, None])
async def test_true_and_none_are_yes(answer, autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve, health=health(Answers(answer)))}) as f:
        assert f.tree.status("a")[0].healthy is None
        await trio.sleep_until(10)
        await settle()
        assert f.tree.status("a")[0].healthy is True


async def test_nobody_asks_where_nothing_is_to_be_asked(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve)}) as f:
        await trio.sleep(100)
        assert f.tree.status("a")[0].healthy is None
        node = f.tree.nodes["a"]
        assert (node.life.attended, node.life.probed, node.life.starting) == (None, None, None)


async def test_the_start_period_counts_from_ready(autojump_clock, tmp_path):
    async def late(ctx: Context) -> None:
        await ctx.sleep(7)
        ctx.ready()
        await ctx.wait_stopping()

    spec = job(late, ready=ReadySpec(notify=True), health=health(Answers(False), start_period=25), backoff=SIXTY)
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep_until(70)
    assert f.times(HealthCheckFailed, "a") == [37.0, 47.0]
    assert f.times(Unhealthy, "a") == [57.0]


async def test_a_run_that_is_asked_to_stop_is_asked_nothing_more(autojump_clock, tmp_path):
    answers = Answers(True, True, False)
    async with forest(tmp_path, {"a": job(slow(8), health=health(answers, every=5, failures=1), grace=20)}) as f:
        await trio.sleep_until(12)
        assert f.tree.status("a")[0].healthy is True
        order = f.tree.order("stop", ["a"])[0]
        await settle()
        assert (f.word("a"), f.tree.status("a")[0].healthy) == ("stopping", None)
        await order.wait()
        assert trio.current_time() == 20
    assert answers.asked == [5.0, 10.0]
    assert f.events(Unhealthy) == []


async def test_a_question_under_way_does_not_outlive_its_run(autojump_clock, tmp_path):
    asking: list[str] = []

    async def hang() -> None:
        asking.append("asks")
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2)  # nothing of the run is alive when it counts as stopped
            asking.append("gone")

    async with forest(tmp_path, {"a": job(serve, health=health(hang, timeout=90))}) as f:
        await trio.sleep_until(11)
        await f.tree.stop("a")
        assert asking == ["asks", "gone"] and trio.current_time() == 13


async def test_nor_does_one_that_a_reload_has_put_an_end_to(autojump_clock, tmp_path):
    gone: list[float] = []

    async def hang() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
            gone.append(trio.current_time())

    async with forest(tmp_path, {"a": job(serve, health=health(hang, timeout=90))}) as f:
        await trio.sleep_until(11)
        await reload(f, a=job(serve, health=health(Answers(True))))
        await trio.sleep_until(12)
        await f.tree.stop("a")
        assert gone == [16.0] and trio.current_time() == 16


async def test_the_unhealthy_run_has_its_grace_and_says_so(autojump_clock, tmp_path):
    spec = job(slow(8), health=health(Answers(False), every=5, failures=1), grace=20, backoff=SIXTY)
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep_until(6)
        row = f.tree.status("a")[0]
        assert (row.word, row.healthy, row.cause) == ("stopping", False, "unhealthy: m:f: it returned False")
        await trio.sleep_until(14)
        row = f.tree.status("a")[0]
        assert (row.word, row.healthy) == ("backing off", None)


@pytest.mark.parametrize(
    ("keys", "word"),
    [({"restart": RestartType.TEMPORARY}, "failed"), ({"once": True}, "backing off"), ({"every": 100}, "scheduled")],
)
async def test_what_follows_is_the_restart_types_business(keys, word, autojump_clock, tmp_path):
    keys = {"run_on_start": True, **keys} if "every" in keys else keys
    async with forest(tmp_path, {"a": job(serve, health=health(Answers(False), failures=1), backoff=SIXTY, **keys)}) as f:
        await trio.sleep_until(15)
        assert f.word("a") == word
        assert [event.failed for event in f.events(Ended)] == [True]


async def test_an_unhealthy_child_is_a_failure_for_its_supervisors_strategy(autojump_clock, tmp_path):
    jobs = {"a": job(serve, health=health(Answers(False), failures=1)), "b": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("a", "b", strategy=Strategy.ONE_FOR_ALL, backoff=SIXTY)}) as f:
        await trio.sleep_until(75)
        assert f.times(Starting, "b") == [0.0, 70.0]


async def test_restarts_that_never_get_ready_wait_longer_and_longer(autojump_clock, tmp_path):
    """The backoff goes on growing over runs that start, answer no, and are ended."""
    backoff = Backoff(initial=Seconds(1), factor=2, max=Seconds(60), reset_after=Seconds(5))
    spec = job(serve, ready=ReadySpec(call=Answers(False)), start_timeout=Seconds(10), backoff=backoff)
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep_until(75)
    assert f.times(Starting, "a") == [0.0, 11.0, 23.0, 37.0, 55.0]
    assert f.events(Ready) == []


async def test_a_run_that_was_ready_for_long_before_it_was_unhealthy_starts_the_backoff_anew(autojump_clock, tmp_path):
    backoff = Backoff(initial=Seconds(1), factor=10, max=Seconds(600), reset_after=Seconds(25))
    spec = job(serve, health=health(Answers(False)), backoff=backoff)
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep_until(100)
    assert f.times(Starting, "a") == [0.0, 31.0, 62.0, 93.0]


# ---- ready ----


async def test_ready_is_asked_again_and_again_ever_more_slowly(autojump_clock, tmp_path):
    answers = Answers(*[False] * 9, True)
    async with forest(tmp_path, {"a": job(serve, ready=ReadySpec(call=answers))}) as f:
        await trio.sleep_until(30)
        assert f.tree.status("a")[0].cause == "m:f says so"
    gaps = [round(later - earlier, 4) for earlier, later in zip(answers.asked, answers.asked[1:], strict=False)]
    assert gaps == [0.1, 0.15, 0.225, 0.3375, 0.5063, 0.7594, 1.0, 1.0, 1.0]
    assert f.times(Ready, "a") == answers.asked[-1:]


async def test_a_try_that_hangs_is_given_up_and_made_again(autojump_clock, tmp_path):
    answers = Answers(1e9, True)
    async with forest(tmp_path, {"a": job(serve, ready=ReadySpec(call=answers))}):
        await trio.sleep_until(30)
    assert answers.asked == [0.0, ONE_TRY + 0.1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("the cache is cold", "the cache is cold"), (1e9, "no answer")],
)
async def test_the_failure_says_what_the_last_no_was(answer, reason, autojump_clock, tmp_path):
    spec = job(serve, ready=ReadySpec(call=Answers(answer)), start_timeout=Seconds(4), backoff=SIXTY)
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep_until(5)
        assert f.tree.status("a")[0].exit.reason == f"not ready within 4 s (start_timeout): m:f: {reason}"


async def test_the_end_of_the_run_ends_the_wait_for_it_at_once(autojump_clock, tmp_path):
    async def short(ctx: Context) -> None:
        await trio.sleep(2.5)

    answers = Answers(False)
    async with forest(tmp_path, {"a": job(short, ready=ReadySpec(call=answers), backoff=SIXTY)}) as f:
        await trio.sleep_until(30)
        assert f.times(Ended, "a") == [2.5] and max(answers.asked) < 2.5
        assert f.word("a") == "backing off"


async def test_health_begins_when_ready(autojump_clock, tmp_path):
    asked = Answers(True)
    spec = job(serve, ready=ReadySpec(call=Answers(4, True)), health=health(asked))
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep_until(30)
        assert f.times(Ready, "a") == [4.0]
    assert asked.asked == [14.0, 24.0]


async def test_more_time_can_be_given_to_a_start_and_a_stop(autojump_clock, tmp_path):
    """What EXTEND_TIMEOUT_USEC asks for. A shorter time takes nothing away."""

    async def late(ctx: Context) -> None:
        await trio.sleep(12)
        ctx.ready()
        await ctx.wait_stopping()
        await trio.sleep(20)

    async with forest(tmp_path, {"a": job(late, ready=ReadySpec(notify=True), start_timeout=Seconds(4), grace=5)}) as f:
        node = f.tree.nodes["a"]
        extend = partial(ladder.extend, f.tree.root, node, node.life)
        await trio.sleep_until(3)
        extend(10)
        extend(1)
        await trio.sleep_until(15)
        assert f.times(Ready, "a") == [12.0]
        order = f.tree.order("stop", ["a"])[0]
        await trio.sleep_until(18)
        extend(30)
        extend(1)
        await order.wait()
        assert trio.current_time() == 35 and f.events(Killing) == []


# ---- heartbeats ----


def beating(*moments: float):
    async def live(ctx: Context) -> None:
        for moment in moments:
            await ctx.sleep(moment - trio.current_time())
            ctx.heartbeat()
        await ctx.wait_stopping()

    return live


async def test_silence_is_measured_from_the_last_heartbeat(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(beating(3, 9, 18), health=heartbeat(every=10, failures=2), backoff=SIXTY)}) as f:
        await trio.sleep_until(50)
    assert f.times(Healthy, "a") == [10.0]
    assert f.times(HealthCheckFailed, "a") == [28.0]
    assert f.times(Unhealthy, "a") == [38.0]
    assert f.events(Unhealthy)[0].cause == "unhealthy: no heartbeat for 20 s, 2 times in a row"
    assert f.events(Unhealthy)[0].answered is False


async def test_one_heartbeat_makes_good_for_a_silence(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(beating(25), health=heartbeat(every=10), backoff=SIXTY)}) as f:
        await trio.sleep_until(66)
    assert f.times(HealthCheckFailed, "a") == [10.0, 20.0, 35.0, 45.0]
    assert f.times(Healthy, "a") == [30.0]
    assert f.times(Unhealthy, "a") == [55.0]


# ---- reload ----


async def reload(f: Any, **jobs: Any) -> None:
    f.tree.apply(f.config(jobs))
    await settle()


async def test_a_reload_asks_by_the_new_spec_at_once_and_the_run_goes_on(autojump_clock, tmp_path):
    first, second = Answers(True), Answers(True)
    async with forest(tmp_path, {"a": job(serve, health=health(first))}) as f:
        await trio.sleep_until(15)
        await reload(f, a=job(serve, health=health(second, every=4)))
        assert f.tree.status("a")[0].healthy is None
        await trio.sleep_until(25)
        await reload(f, a=job(serve))
        assert f.tree.status("a")[0].healthy is None
        await trio.sleep_until(90)
        await reload(f, a=job(serve, health=health(first)))
        await trio.sleep_until(105)
        assert f.tree.status("a")[0].healthy is True
        assert f.times(Starting, "a") == [0.0] and f.events(Stopping) == []
    assert first.asked == [10.0, 100.0]
    assert second.asked == [19.0, 23.0]
    assert f.times(HealthUnknown, "a") == [15.0, 25.0]


async def test_a_reload_without_a_change_of_the_probes_leaves_the_count_alone(autojump_clock, tmp_path):
    asked = health(Answers(False))
    async with forest(tmp_path, {"a": job(serve, health=asked, backoff=SIXTY)}) as f:
        await trio.sleep_until(25)
        await reload(f, a=job(serve, health=asked, backoff=MINUTE, description="new"))
        await trio.sleep_until(35)
    assert f.times(Unhealthy, "a") == [30.0]


async def test_a_reload_can_mend_the_question_whether_a_run_is_ready(autojump_clock, tmp_path):
    asked = Answers(True)
    async with forest(tmp_path, {"a": job(serve, ready=ReadySpec(call=Answers(False)))}) as f:
        await trio.sleep_until(15)
        assert f.word("a") == "starting"
        await reload(f, a=job(serve, ready=ReadySpec(call=asked)))
        assert f.times(Ready, "a") == [15.0]
    async with forest(tmp_path, {"a": job(serve, ready=ReadySpec(call=Answers(False)))}) as f:
        begin = trio.current_time()
        await trio.sleep(15)
        await reload(f, a=job(serve))
        assert f.times(Ready, "a") == [begin + 15]


# ---- threads ----


async def test_a_function_in_a_thread_that_hangs_is_never_asked_twice_at_a_time(tmp_path):
    release, calls = threading.Event(), []

    def hang() -> bool:
        calls.append(threading.current_thread())
        release.wait(60)
        return True

    spec = job(serve, health=health(hang, every=0.02, timeout=0.05, failures=4), backoff=Backoff(initial=Seconds(0)))
    try:
        async with forest(tmp_path, {"a": spec}) as f:
            with trio.fail_after(60):
                while len(f.events(Unhealthy)) < 2:  # also the next run does not start a second thread
                    await trio.sleep(0.01)
            assert len(calls) == 1
            assert "the last question has not come back yet" in f.events(Unhealthy)[1].cause
            assert not any(event.answered for event in f.events(Unhealthy))
            release.set()
            with trio.fail_after(60):
                while f.tree.status("a")[0].healthy is not True:
                    await trio.sleep(0.01)
    finally:
        release.set()


async def test_a_function_in_a_thread_may_have_the_context_of_the_run(tmp_path):
    seen = []

    def look(ctx: Context) -> bool:
        seen.append((ctx.run, ctx.stopping))
        return True

    async with forest(tmp_path, {"a": job(serve, ready=ReadySpec(call=look))}) as f:
        with trio.fail_after(60):
            await f.tree.wait_running()
    assert seen == [("a#1", False)]


async def test_a_thread_says_by_itself_that_it_is_well(tmp_path):
    def live(ctx: ThreadContext) -> None:
        while ctx.sleep(0.01):
            ctx.heartbeat()

    async with forest(tmp_path, {"a": job(live, health=heartbeat(every=0.5))}) as f:
        with trio.fail_after(60):
            while f.tree.status("a")[0].healthy is not True:
                await trio.sleep(0.01)
