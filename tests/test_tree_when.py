"""When jobs run: schedules, runs to completion, readiness, and what comes after what. In virtual time."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from supervisor.events import Ended, Ready, Skipped, Starting, Waiting
from supervisor.kinds import Context
from supervisor.probes import Ready as ReadySpec
from supervisor.spec import Backoff, GiveUp, RestartType, Seconds, Strategy
from supervisor.state import Goal
from tests.forest import SIXTY, crash, crashing_at, forest, group, job, lasting, said, serve, settle, slow

NOTIFY = ReadySpec(notify=True)


# ---- every ----


async def test_every_is_start_to_start_and_does_not_drift(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(4), every=10)}) as f:
        await trio.sleep(45)
    assert f.times(Starting, "a") == [10.0, 20.0, 30.0, 40.0]


async def test_every_with_run_on_start_runs_at_once_and_then_in_step(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(4), every=10, run_on_start=True)}) as f:
        await trio.sleep(25)
    assert f.times(Starting, "a") == [0.0, 10.0, 20.0]


async def test_ticks_during_a_run_are_skipped_and_said(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(25), every=10)}) as f:
        await trio.sleep(65)
    assert f.times(Starting, "a") == [10.0, 40.0]
    assert [(at, event.cause) for at, event in f.history if isinstance(event, Skipped)] == [
        (20.0, "a#1 is still running"),
        (30.0, "a#1 is still running"),
        (50.0, "a#2 is still running"),
        (60.0, "a#2 is still running"),
    ]


async def test_a_run_of_a_schedule_and_the_wait_for_it_say_so(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), every=5400)}) as f:
        await trio.sleep(6000)
        assert {event.cause for event in f.events(Starting, Waiting) if event.name == "a"} == {"runs every 90m"}


async def test_a_failed_run_waits_for_the_next_tick(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(crash, every=10)}, intensity=0) as f:
        await trio.sleep(35)
        assert f.times(Starting, "a") == [10.0, 20.0, 30.0]
        assert f.word("a") == "scheduled"
        row = f.tree.status("a")[0]
        assert (row.restarts, row.exit.reason) == (0, "RuntimeError: boom")


async def test_pause_and_resume_keep_the_step(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), every=10)}) as f:
        await trio.sleep_until(15)
        await f.tree.pause("a")
        await trio.sleep_until(37)
        await f.tree.resume("a")
        await trio.sleep_until(55)
    assert f.times(Starting, "a") == [10.0, 40.0, 50.0]
    assert f.times(Skipped, "a") == []


async def test_a_pause_during_a_run_lets_it_go_on_and_blames_it_for_nothing(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(15), every=10)}) as f:
        await trio.sleep_until(12)
        await f.tree.pause("a")
        await trio.sleep_until(22)
        await f.tree.resume("a")
        await trio.sleep_until(42)
    assert f.times(Starting, "a") == [10.0, 30.0]
    assert f.times(Ended, "a")[0] == 25.0
    assert f.times(Skipped, "a") == [40.0]


async def test_a_resume_of_what_is_not_paused_takes_no_tick_away(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1), every=10, after=("b",)), "b": job(serve)}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep_until(5)
        await f.tree.stop("b")
        await trio.sleep_until(12)
        await f.tree.resume("a")
        await trio.sleep_until(15)
        await f.tree.start("b")
        await trio.sleep_until(25)
    assert f.times(Starting, "a") == [15.0, 20.0]


async def test_run_now_makes_one_run_beside_the_schedule(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(2), every=10)}) as f:
        await trio.sleep_until(13)
        await f.tree.run_now("a")
        assert trio.current_time() == 15.0
        await trio.sleep_until(25)
    assert f.times(Starting, "a") == [10.0, 13.0, 20.0]


async def test_a_run_that_was_asked_for_skips_a_tick_like_any_other(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(5), every=10)}) as f:
        await trio.sleep_until(8)
        await f.tree.run_now("a")
        await trio.sleep_until(25)
    assert f.times(Starting, "a") == [8.0, 20.0]
    assert f.times(Skipped, "a") == [10.0]


@pytest.mark.parametrize("state", ["manual", "stopped", "paused"])
async def test_run_now_makes_one_run_of_what_is_down_and_leaves_it_down(autojump_clock, tmp_path, state):
    async with forest(tmp_path, {"a": job(lasting(2), every=10, start="manual" if state == "manual" else "auto")}) as f:
        if state == "stopped":
            await f.tree.stop("a")
        if state == "paused":
            await f.tree.pause("a")
        await trio.sleep_until(5)
        await f.tree.run_now("a")
        await trio.sleep_until(50)
        assert f.times(Starting, "a") == [5.0]
        assert f.word("a") == ("paused" if state == "paused" else "completed")
        assert f.tree.status("a")[0].goal is (Goal.UP if state == "paused" else Goal.DOWN)


async def test_two_who_ask_for_a_run_that_waits_share_it(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(2), every=100, after=("b",)), "b": job(serve, start="manual")}
    async with forest(tmp_path, jobs) as f:
        orders = f.tree.order("run-now", ["a"]) + f.tree.order("run-now", ["a"])
        await trio.sleep_until(5)
        await f.tree.start("b")
        assert [said(await order.wait()) for order in orders] == ["yes, completed", "yes, completed"]
        assert f.times(Starting, "a") == [5.0]


async def test_restart_begins_the_schedule_anew_without_a_run(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), every=10)}) as f:
        await trio.sleep_until(14)
        await f.tree.restart("a")
        await trio.sleep_until(40)
    assert f.times(Starting, "a") == [10.0, 24.0, 34.0]


async def test_stop_disarms_and_start_arms(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), every=10)}) as f:
        await trio.sleep_until(14)
        await f.tree.stop("a")
        await trio.sleep_until(27)
        await f.tree.start("a")
        await f.tree.start("a")  # it is armed: nothing changes
        await trio.sleep_until(50)
    assert f.times(Starting, "a") == [10.0, 37.0, 47.0]


async def test_a_schedule_starts_with_what_it_waits_for(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1), every=10, after=("b",)), "b": job(serve, start="manual")}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep_until(7)
        await f.tree.start("b")
        await trio.sleep_until(30)
    assert f.times(Starting, "a") == [17.0, 27.0]


async def test_a_schedule_goes_down_with_its_group_and_keeps_its_step(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(5), every=10), "b": job(crashing_at(12))}
    async with forest(tmp_path, jobs, {"g": group("a", "b", strategy=Strategy.ONE_FOR_ALL)}) as f:
        await trio.sleep_until(38)
        assert f.word("a") == "scheduled"
    assert f.times(Ended, "a")[0] == 15.0  # it was asked, cannot hear, and had its grace
    assert f.times(Starting, "b") == [0.0, 15.5]
    assert f.times(Starting, "a") == [10.0, 20.0, 30.0]  # in step: a crash of others does not put its ticks off


# ---- once ----


async def test_once_runs_to_completion_and_stays_so(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(5), once=True)}) as f:
        await trio.sleep(100)
        assert f.word("a") == "completed"
        assert f.times(Starting, "a") == [0.0]
        assert f.tree.status("a")[0].exit.reason == "completed"


@pytest.mark.parametrize("verb", ["start", "restart", "run-now"])
async def test_once_runs_again_when_told(autojump_clock, tmp_path, verb):
    async with forest(tmp_path, {"a": job(lasting(5), once=True)}) as f:
        await trio.sleep_until(10)
        (order,) = f.tree.order(verb, ["a"])
        assert said(await order.wait()) == ("yes, completed" if verb == "run-now" else "yes, running")
        await trio.sleep_until(30)
        assert f.word("a") == "completed"
        assert f.times(Starting, "a") == [0.0, 10.0]
        assert f.tree.status("a")[0].restarts == 0


async def test_once_runs_again_with_its_group(autojump_clock, tmp_path):
    jobs = {"migrate": job(lasting(2), once=True), "api": job(crashing_at(10), after=("migrate",))}
    async with forest(tmp_path, jobs, {"g": group("migrate", "api", strategy=Strategy.ONE_FOR_ALL)}) as f:
        await trio.sleep_until(30)
        assert f.times(Starting, "migrate") == [0.0, 10.5]
        assert f.times(Starting, "api") == [2.0, 12.5]


async def test_once_that_fails_is_tried_again_with_backoff_until_it_succeeds(autojump_clock, tmp_path):
    left = [1, 2, 3]

    async def third_time_lucky() -> None:
        await trio.sleep(1)
        if left.pop() > 1:
            raise RuntimeError("boom")

    async with forest(tmp_path, {"a": job(third_time_lucky, once=True), "b": job(serve, after=("a",))}) as f:
        await f.tree.wait_running()
        assert f.times(Starting, "a") == [0.0, 1.5, 3.5]
        assert f.times(Starting, "b") == [4.5]
        assert f.tree.status("a")[0].restarts == 2


async def test_a_temporary_run_that_fails_stays_failed_and_what_waits_for_it_waits(autojump_clock, tmp_path):
    jobs = {"a": job(crash, once=True, restart=RestartType.TEMPORARY), "b": job(serve, after=("a",))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(100)
        assert f.words() == "a:failed b:waiting"
        assert f.tree.status("b")[0].cause == "waits for a, which is failed"
        assert f.times(Starting, "a") == [0.0]


# ---- ready ----


def getting_ready(seconds: float) -> Any:
    async def live(ctx: Context) -> None:
        if await ctx.sleep(seconds):
            ctx.ready()
            ctx.ready()  # only the first time counts
            await ctx.wait_stopping()

    return live


async def test_started_is_ready_where_nothing_is_said(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve)}) as f:
        await f.tree.wait_running()
        assert f.times(Ready, "a") == [0.0]


async def test_notify_is_ready_when_the_function_says_so(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(getting_ready(7), ready=NOTIFY)}) as f:
        await trio.sleep(5)
        assert f.word("a") == "starting"
        await f.tree.wait_running()
        assert trio.current_time() == 7.0
        assert f.times(Ready, "a") == [7.0]
        assert f.tree.status("a")[0].cause == "it said so"


async def test_a_file_is_ready_when_this_run_has_made_it(autojump_clock, tmp_path):
    path = tmp_path / "not" / "yet" / "there"

    async def live(ctx: Context) -> None:
        if await ctx.sleep(3):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("here")
            await ctx.wait_stopping()

    async with forest(tmp_path, {"a": job(live, ready=ReadySpec(file=str(path)))}) as f:
        await f.tree.wait_running()
        assert f.times(Ready, "a") == [3.0]
        await f.tree.restart("a")  # what is there from the last run does not count
        assert f.times(Ready, "a") == [3.0, 6.0]


async def test_what_does_not_get_ready_in_time_has_failed(autojump_clock, tmp_path):
    spec = job(getting_ready(50), ready=NOTIFY, start_timeout=Seconds(4))
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep(12)
        assert f.times(Starting, "a") == [0.0, 4.5, 9.5]
        assert [event.exit.reason for event in f.events(Ended)] == ["not ready within 4 s (start_timeout)"] * 2
        assert all(event.failed for event in f.events(Ended))


async def test_start_timeout_gives_the_run_its_grace(autojump_clock, tmp_path):
    async def slowly(ctx: Context) -> None:
        await ctx.wait_stopping()
        await trio.sleep(3)

    async with forest(tmp_path, {"a": job(slowly, ready=NOTIFY, start_timeout=Seconds(4))}) as f:
        await trio.sleep(5)
        assert f.word("a") == "stopping"
        await trio.sleep(10)
        assert f.times(Starting, "a") == [0.0, 7.5]


async def test_backoff_starts_over_after_enough_time_ready(autojump_clock, tmp_path):
    backoff = Backoff(initial=Seconds(1), factor=2, max=Seconds(30), reset_after=Seconds(10))
    async with forest(tmp_path, {"a": job(crashing_at(1, 3, 20), backoff=backoff)}) as f:
        await trio.sleep(50)
        # fails at 1 (waits 1), at 3 after 1 s ready (waits 2), at 20 after 15 s ready (waits 1 again)
        assert f.times(Starting, "a") == [0.0, 2.0, 5.0, 21.0]


async def test_a_group_that_was_ready_long_enough_starts_its_waits_over_though_what_fails_took_time_to_end(
    autojump_clock, tmp_path
):
    backoff = Backoff(initial=Seconds(1), factor=2, max=Seconds(30), reset_after=Seconds(10))
    jobs = {"a": job(crashing_at(1, 7, 40, 46)), "b": job(slow(3)), "c": job(serve)}
    inner = group("a", "b", intensity=0)
    outer = group("inner", "c", strategy=Strategy.ONE_FOR_ALL, backoff=backoff, intensity=9)
    async with forest(tmp_path, jobs, {"inner": inner, "outer": outer}) as f:
        await trio.sleep(60)
        # a fails at 1, inner ends at 4 (waits 1); at 7 after 2 s ready, to 10 (2); at 40 after 28 s (1 again), to 43; at 46 (2)
        assert f.times(Starting, "inner") == [0.0, 5.0, 12.0, 44.0, 51.0]


async def test_giving_up_is_for_good_and_counts_for_nobody(autojump_clock, tmp_path):
    spec = job(crash, give_up=GiveUp(failures=3, within=Seconds(10)))
    async with forest(tmp_path, {"a": spec}, {"g": group("a", intensity=2)}) as f:
        await trio.sleep(100)
        assert f.word("a") == "gave up"
        assert f.times(Ended, "g") == []
        assert f.times(Starting, "a") == [0.0, 0.5, 1.5]
        assert f.tree.status("a")[0].cause == "3 failures within 10 s, the last: RuntimeError: boom"


# ---- after ----


async def test_after_waits_for_ready_and_says_for_what(autojump_clock, tmp_path):
    jobs = {"db": job(getting_ready(5), ready=NOTIFY), "api": job(serve, after=("db",))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(1)
        assert f.tree.status("api")[0].cause == "waits for db"
        await f.tree.wait_running()
        assert f.times(Starting, "api") == [5.0]


async def test_after_holds_across_supervisors_and_for_supervisors(autojump_clock, tmp_path):
    jobs = {
        "db": job(getting_ready(5), ready=NOTIFY),
        "cache": job(getting_ready(7), ready=NOTIFY),
        "lazy": job(serve, start="manual"),
        "api": job(serve, after=("db",)),
        "web": job(serve, after=("store",)),
    }
    tree = {"store": group("inner", "cache", "lazy"), "inner": group("db"), "front": group("api", "web")}
    async with forest(tmp_path, jobs, tree) as f:
        await f.tree.wait_running()
        assert f.times(Starting, "api") == [5.0]
        assert f.times(Starting, "web") == [7.0]
        assert f.times(Ready, "inner") == [5.0]
        assert f.times(Ready, "store") == [7.0]


async def test_what_is_down_or_failing_is_waited_for_with_that_cause(autojump_clock, tmp_path):
    jobs = {
        "m": job(serve, start="manual"),
        "f": job(crash, once=True, backoff=SIXTY),
        "a": job(serve, after=("m",)),
        "b": job(serve, after=("f",)),
    }
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(1)
        assert f.tree.status("a")[0].cause == "waits for m, which is stopped"
        assert f.tree.status("b")[0].cause == "waits for f, which is backing off"
        await f.tree.start("m")
        await settle()
        assert f.word("a") == "running"


async def test_when_the_target_fails_later_the_dependent_goes_on(autojump_clock, tmp_path):
    jobs = {"db": job(crashing_at(5), backoff=SIXTY), "api": job(crashing_at(8), after=("db",))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(7)
        assert f.words() == "db:backing off api:running"
        await trio.sleep(5)
        # its own failure is another matter: it starts again only when db is there
        assert f.words() == "db:backing off api:waiting"
        await trio.sleep(60)
        assert f.times(Starting, "api") == [0.0, 65.0]


async def test_stopping_the_target_stops_no_dependent(autojump_clock, tmp_path):
    async with forest(tmp_path, {"db": job(serve), "api": job(serve, after=("db",))}) as f:
        await f.tree.wait_running()
        await f.tree.stop("db")
        assert f.words() == "db:stopped api:running"


async def test_start_with_after_starts_what_is_needed_and_no_more(autojump_clock, tmp_path):
    jobs = {
        "disk": job(lasting(2), once=True, start="manual"),
        "db": job(getting_ready(3), ready=NOTIFY, start="manual", after=("disk",)),
        "done": job(lasting(1), once=True),
        "api": job(serve, start="manual", after=("db", "done")),
        "other": job(serve, start="manual"),
    }
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(10)
        await f.tree.start("api", with_after=True)
        assert f.times(Starting, "disk") == [10.0]
        assert f.times(Starting, "db") == [12.0]
        assert f.times(Starting, "api") == [15.0]
        assert f.times(Starting, "done") == [0.0]
        assert f.word("other") == "stopped"


async def test_start_without_it_waits_for_what_is_down(autojump_clock, tmp_path):
    jobs = {"db": job(serve, start="manual"), "api": job(serve, start="manual", after=("db",))}
    async with forest(tmp_path, jobs) as f:
        (order,) = f.tree.order("start", ["api"])
        await trio.sleep(10)
        assert f.words() == "db:stopped api:waiting"
        await f.tree.start("db")
        assert said(await order.wait()) == "yes, running"


async def test_children_without_after_start_at_the_same_time(autojump_clock, tmp_path):
    jobs = {name: job(getting_ready(5), ready=NOTIFY) for name in "abc"}
    async with forest(tmp_path, jobs, {"g": group(*"abc")}) as f:
        await f.tree.wait_running()
        assert [f.times(Starting, name) for name in "abc"] == [[0.0]] * 3


async def test_under_rest_for_one_list_order_is_an_order(autojump_clock, tmp_path):
    jobs = {name: job(getting_ready(5), ready=NOTIFY) for name in "abc"}
    async with forest(tmp_path, jobs, {"g": group(*"abc", strategy=Strategy.REST_FOR_ONE)}) as f:
        await f.tree.wait_running()
        assert [f.times(Starting, name) for name in "abc"] == [[0.0], [5.0], [10.0]]


# ---- the whole ----


async def test_wait_running_waits_for_all_that_start_by_themselves(autojump_clock, tmp_path):
    jobs = {
        "a": job(getting_ready(5), ready=NOTIFY),
        "once": job(lasting(8), once=True),
        "tick": job(lasting(1), every=100),
        "m": job(serve, start="manual"),
        "helper": job(lasting(2), restart=RestartType.TRANSIENT),
    }
    async with forest(tmp_path, jobs, {"g": group("a", "helper")}) as f:
        await f.tree.wait_running()
        assert trio.current_time() == 8.0
        assert f.words() == "g:running a:running helper:completed once:completed tick:scheduled m:stopped"


async def test_a_supervisor_is_ready_again_when_its_last_child_is(autojump_clock, tmp_path):
    jobs = {"a": job(crashing_at(5), backoff=SIXTY), "b": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("a", "b")}) as f:
        await trio.sleep(10)
        row = f.tree.status("g")[0]
        assert (row.word, row.ready, row.cause) == ("running", False, "not ready: a")
        await trio.sleep(60)
        assert f.tree.status("g")[0].ready
