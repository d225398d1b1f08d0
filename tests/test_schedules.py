"""Schedules in a tree: `cron`, `overlap`, `jitter`, what was missed. In virtual time, by a wall clock of ours."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio

from supervisor.errors import SpecError
from supervisor.events import Ended, Skipped, Starting, Waiting
from supervisor.kinds import Context
from supervisor.policies import RetrySpec
from supervisor.spec import Seconds
from supervisor.state import Goal
from tests.forest import Forest, at_once, crash, forest, job, lasting, moment, said, serve, settle

HOUR, DAY = 3600, 86400


def skipped(f: Forest, name: str = "a") -> list[tuple[float, str, int]]:
    return [(at, event.cause, event.ticks) for at, event in f.history if isinstance(event, Skipped) and event.name == name]


def run_for(f: Forest, name: str = "a") -> list[str | None]:
    """The ticks that its runs were made for."""
    return [event.for_at for event in f.events(Starting) if event.name == name]


def row(f: Forest, name: str = "a") -> Any:
    return f.tree.journal.table[name]


# ---- cron ----


async def test_cron_runs_at_times_of_the_calendar_whatever_the_loop_does(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(4), cron="*/10 * * * *")}, since="2026-01-01 00:05") as f:
        await trio.sleep(1600)
    assert f.times(Starting, "a") == [300.0, 900.0, 1500.0]
    assert run_for(f) == ["2026-01-01T00:10:00.000Z", "2026-01-01T00:20:00.000Z", "2026-01-01T00:30:00.000Z"]


async def test_the_row_of_a_cron_job_says_when_in_its_zone_and_when_next(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(4), cron="30 2 * * *", timezone="Europe/Berlin")}
    async with forest(tmp_path, jobs, since="2026-03-28 12:00") as f:
        await settle()
        assert (f.word("a"), row(f).cause) == ("scheduled", "runs at 30 2 * * * (Europe/Berlin)")
        assert row(f).next_at == "2026-03-29T01:00:00.000Z"  # at the end of the gap
        await trio.sleep(DAY)
        assert row(f).next_at == "2026-03-30T00:30:00.000Z"
        assert f.times(Starting, "a") == [13.0 * HOUR]


async def test_a_schedule_whose_last_run_failed_says_so_until_one_does_not(autojump_clock, tmp_path):
    left = [1, 2]

    async def third_time_lucky() -> None:
        if left:
            left.pop()
            raise RuntimeError("boom")

    jobs = {"a": job(third_time_lucky, cron="* * * * *"), "b": job(crash, every=60)}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep_until(61)
        assert row(f).cause == "runs at * * * * * (UTC); the last run failed: RuntimeError: boom"
        assert row(f, "b").cause == "runs every 1m; the last run failed: RuntimeError: boom"
        await trio.sleep_until(181)
        assert row(f).cause == "runs at * * * * * (UTC)"


async def test_cron_with_run_on_start_runs_at_once_and_then_at_its_times(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(4), cron="@hourly", run_on_start=True)}, since="2026-01-01 00:10") as f:
        await trio.sleep(HOUR)
    assert f.times(Starting, "a") == [0.0, 50.0 * 60]


async def test_stop_restart_pause_and_resume_of_a_cron_job(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(4), cron="* * * * *")}) as f:
        await trio.sleep_until(70)
        assert await at_once(f, "stop", "a") == "yes, stopped"
        await trio.sleep_until(190)
        assert await at_once(f, "start", "a") == "yes, its schedule runs"
        await trio.sleep_until(250)
        assert await at_once(f, "pause", "a") == "yes, paused"
        assert (f.word("a"), row(f).next_at) == ("paused", None)
        await trio.sleep_until(430)
        assert await at_once(f, "resume", "a") == "yes, resumed"
        await trio.sleep_until(490)
        assert await at_once(f, "restart", "a") == "yes, its schedule begins anew"
        await trio.sleep_until(550)
    assert f.times(Starting, "a") == [60.0, 240.0, 480.0, 540.0]
    assert skipped(f) == []


async def test_a_job_is_told_which_tick_it_runs_for(autojump_clock, tmp_path):
    told = []

    async def note(ctx: Context) -> None:
        told.append(ctx.scheduled_at)

    jobs = {"a": job(note, cron="*/2 * * * *", jitter=30), "b": job(note, once=True)}
    async with forest(tmp_path, jobs, spread=lambda low, high: high) as f:
        await trio.sleep(200)
        await f.tree.run_now("a")
    assert [None if at is None else at.isoformat() for at in told] == [None, "2026-01-01T00:02:00+00:00", None]


async def test_a_cron_job_waits_for_what_it_comes_after_and_then_runs_for_the_tick_that_came(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1), cron="* * * * *", after=("b",)), "b": job(serve)}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep_until(50)
        await f.tree.stop("b")
        await trio.sleep_until(190)
        assert row(f).cause == "waits for b, which is stopped"
        await f.tree.start("b")
        await trio.sleep_until(245)
    assert f.times(Starting, "a") == [190.0, 240.0]
    assert run_for(f)[0] == "2026-01-01T00:01:00.000Z"
    assert skipped(f) == [(at, "a run waits already: waits for b, which is stopped", 1) for at in (120.0, 180.0)]


async def test_what_has_no_cron_never_waits_on_the_wall_clock(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), every=10)}) as f:
        f.wall.wait_until = None  # type: ignore[method-assign, assignment]
        await trio.sleep(25)
    assert f.times(Starting, "a") == [10.0, 20.0]


# ---- the clock is set, the machine sleeps ----


@pytest.mark.parametrize(
    ("catch_up", "runs", "missed"),
    [
        ("none", [], (5000.0, "missed 5 runs: the clock was set, or the machine slept", 5)),
        ("last", ["06"], (5000.0, "missed 4 runs: the clock was set, or the machine slept", 4)),
        ("all", ["02", "03", "04", "05", "06"], None),
    ],
)
async def test_ticks_that_a_clock_has_jumped_over_are_missed(autojump_clock, tmp_path, catch_up, runs, missed):
    async with forest(tmp_path, {"a": job(lasting(10), cron="@hourly", catch_up=catch_up)}) as f:
        await trio.sleep(5000)
        f.wall.step(5 * HOUR)
        await trio.sleep(HOUR)
    assert run_for(f) == [f"2026-01-01T{hour}:00:00.000Z" for hour in ("01", *runs, "07")]
    assert skipped(f) == ([missed] if missed else [])
    at = f.times(Starting, "a")[1:-1]
    assert at == [5000.0 + 10 * number for number in range(len(runs))]  # one after another


async def test_a_tick_that_is_a_moment_late_runs_all_the_same(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(10), cron="@hourly")}) as f:
        await trio.sleep(HOUR - 5)
        f.wall.step(30)
        await trio.sleep(100)
    assert f.times(Starting, "a") == [HOUR - 5.0]


async def test_a_clock_that_is_set_back_makes_no_run_twice(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(10), cron="@hourly")}) as f:
        await trio.sleep(HOUR + 100)
        f.wall.step(-1000.0)
        await trio.sleep(HOUR)
        assert row(f).next_at == "2026-01-01T02:00:00.000Z"
        await trio.sleep(HOUR)
    assert run_for(f) == ["2026-01-01T01:00:00.000Z", "2026-01-01T02:00:00.000Z"]


async def test_a_clock_that_was_wrong_by_years_is_believed_when_it_is_put_right(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(10), cron="@hourly")}, since="2038-01-01 00:30") as f:
        await trio.sleep(HOUR)
        f.wall.step(moment("2026-01-01 00:00") - moment("2038-01-01 00:00"))
        await trio.sleep(HOUR)
    assert run_for(f) == ["2038-01-01T01:00:00.000Z", "2026-01-01T02:00:00.000Z"]


async def test_every_does_not_care_for_the_wall_clock(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), every=100), "b": job(lasting(1), cron="@daily")}) as f:
        await trio.sleep(150)
        f.wall.step(50 * DAY)
        await trio.sleep(100)
    assert f.times(Starting, "a") == [100.0, 200.0]


# ---- jitter ----


async def test_jitter_delays_each_run_and_the_rhythm_stays(autojump_clock, tmp_path):
    chance = itertools.cycle([0.5, 0.0, 1.0])
    jobs = {"a": job(lasting(1), every=10, jitter=4)}
    async with forest(tmp_path, jobs, spread=lambda low, high: low + next(chance) * (high - low)) as f:
        await settle()
        assert row(f).next_at == "2026-01-01T00:00:12.000Z"
        await trio.sleep(45)
    assert f.times(Starting, "a") == [12.0, 20.0, 34.0, 42.0]
    assert run_for(f) == [f"2026-01-01T00:00:{second}.000Z" for second in (10, 20, 30, 40)]


async def test_jitter_of_a_cron_job(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1), cron="@hourly", jitter=600)}
    async with forest(tmp_path, jobs, spread=lambda low, high: high) as f:
        await settle()
        assert row(f).next_at == "2026-01-01T01:10:00.000Z"
        await trio.sleep(2 * HOUR + 700)
    assert f.times(Starting, "a") == [HOUR + 600.0, 2 * HOUR + 600.0]
    assert skipped(f) == []


# ---- overlap ----


async def test_overlap_queue_has_one_run_wait_and_counts_what_merges_with_it(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(33), every=10, overlap="queue")}) as f:
        await trio.sleep_until(99)
    assert f.times(Starting, "a") == [10.0, 43.0, 76.0]
    assert run_for(f) == [f"2026-01-01T00:00:{second}.000Z" for second in (10, 20, 50)]
    assert skipped(f) == [
        (30.0, "a run waits already: a#1 is still running", 1),
        (40.0, "a run waits already: a#1 is still running", 1),
        (60.0, "a run waits already: a#2 is still running", 1),
        (70.0, "a run waits already: a#2 is still running", 1),
        (90.0, "a run waits already: a#3 is still running", 1),
    ]


async def test_overlap_replace_stops_the_run_in_hand_first(autojump_clock, tmp_path):
    async with forest(
        tmp_path, {"a": job(serve, every=10, overlap="replace"), "b": job(lasting(25), every=20, overlap="replace", grace=3)}
    ) as f:
        await trio.sleep_until(45)
    assert f.times(Starting, "a") == [10.0, 20.0, 30.0, 40.0]
    assert f.times(Ended, "a")[:3] == [20.0, 30.0, 40.0]
    assert f.times(Starting, "b") == [20.0, 43.0]  # the ladder: its grace, then it is cancelled
    ends = [event for event in f.events(Ended) if event.name == "a"][:3]
    assert {(event.exit.reason, event.failed, event.cause) for event in ends} == {
        ("replaced", False, 'its next run is due, and overlap is "replace"')
    }
    assert skipped(f) == skipped(f, "b") == []


async def test_of_the_ticks_that_come_while_a_run_is_being_replaced_the_last_counts(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1000), every=10, overlap="replace", grace=25)}) as f:
        await trio.sleep_until(50)
    assert f.times(Starting, "a") == [10.0, 45.0]
    assert run_for(f)[1] == "2026-01-01T00:00:40.000Z"


@pytest.mark.parametrize("start", ["auto", "manual"])
async def test_run_now_waits_its_turn_with_overlap_queue(autojump_clock, tmp_path, start):
    async with forest(tmp_path, {"a": job(lasting(20), every=1000, overlap="queue", start=start)}) as f:
        first, second, third = (f.tree.order("run-now", ["a"])[0] for _ in range(3))
        await settle()
        (fourth,) = f.tree.order("run-now", ["a"])
        assert said(await first.wait()) == said(await second.wait()) == said(await third.wait()) == "yes, completed"
        assert trio.current_time() == 20.0
        assert said(await fourth.wait()) == "yes, completed"
        assert trio.current_time() == 40.0
        assert f.times(Starting, "a") == [0.0, 20.0]
        await trio.sleep(1)
        assert f.word("a") == ("scheduled" if start == "auto" else "completed")


@pytest.mark.parametrize("start", ["auto", "manual"])
async def test_run_now_replaces_with_overlap_replace(autojump_clock, tmp_path, start):
    async with forest(tmp_path, {"a": job(serve, every=1000, overlap="replace", start=start)}) as f:
        (first,) = f.tree.order("run-now", ["a"])
        await trio.sleep_until(5)
        (second,) = f.tree.order("run-now", ["a"])
        assert said(await first.wait()) == "no, a#1 was replaced: another run was asked for"
        await settle()
        assert f.times(Starting, "a") == [0.0, 5.0]
        (stop,) = f.tree.order("stop", ["a"])
        assert said(await stop.wait()) == "yes, stopped"
        assert not (await second.wait()).ok


async def test_a_stop_takes_the_run_that_waits_with_it(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(25), every=10, overlap="queue", grace=100)}) as f:
        await trio.sleep_until(22)
        await f.tree.stop("a")
        assert trio.current_time() == 35.0
        await trio.sleep_until(80)
        assert f.times(Starting, "a") == [10.0]
        assert f.word("a") == "stopped"


async def test_a_pause_drops_the_run_that_waits(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(25), every=10, overlap="queue")}) as f:
        await trio.sleep_until(22)
        await f.tree.pause("a")
        await trio.sleep_until(53)
        await f.tree.resume("a")
        await trio.sleep_until(65)
    assert f.times(Starting, "a") == [10.0, 60.0]


async def test_cancel_ends_the_run_in_hand_and_the_one_that_waits_begins(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(25), every=10, overlap="queue", grace=0)}) as f:
        await trio.sleep_until(22)
        await f.tree.cancel("a#1")
        await trio.sleep_until(30)
    assert f.times(Starting, "a") == [10.0, 22.0]


async def test_nothing_that_waits_begins_while_the_daemon_ends(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(15), every=10, overlap="queue", grace=50)}) as f:
        await trio.sleep_until(22)
        f.tree.shutdown("a test")
        await f.tree.wait_stopped()
        assert trio.current_time() == 25.0
    assert f.times(Starting, "a") == [10.0]


# ---- overlap = "parallel" ----


def parallel(call: Any, **keys: Any) -> Any:
    return job(call, **{"overlap": "parallel", "workers": 3, **keys})


async def test_overlap_parallel_runs_side_by_side_up_to_workers_and_says_what_it_skips(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(35), every=10)}) as f:
        await trio.sleep_until(68)
    assert [(at, name) for at, name in f.happened(Starting) if name != "a"] == [
        (10.0, "a:0"), (20.0, "a:1"), (30.0, "a:2"), (50.0, "a:0"), (60.0, "a:1"),
    ]  # fmt: skip
    assert skipped(f) == [(40.0, "all of 3 workers have a run in hand", 1)]
    assert run_for(f, "a:0") == ["2026-01-01T00:00:10.000Z", "2026-01-01T00:00:50.000Z"]


async def test_the_row_of_the_whole_says_what_its_runs_are_at(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(15), every=10), "b": job(serve, after=("a",))}) as f:
        await f.tree.wait_running()
        await settle()
        assert (f.word("a"), row(f).cause) == ("scheduled", "runs every 10s; 0 of 3 runs in hand")
        assert row(f).next_at == "2026-01-01T00:00:10.000Z"
        await trio.sleep_until(22)
        assert (f.word("a"), row(f).cause) == ("running", "runs every 10s; 2 of 3 runs in hand")
        assert row(f).next_at == "2026-01-01T00:00:30.000Z"
        await f.tree.pause("a")
        await trio.sleep_until(48)
        assert (f.word("a"), row(f).cause, row(f).next_at) == ("paused", "paused; 0 of 3 runs in hand", None)
        await f.tree.resume("a")
        await settle()
        assert row(f).next_at == "2026-01-01T00:00:50.000Z"
        assert f.words("a", "a:0", "a:1", "a:2") == "a:scheduled a:0:completed a:1:completed a:2:stopped"
        await f.tree.stop("a")
        assert (f.word("a"), row(f).next_at) == ("stopped", None)
        await trio.sleep_until(100)
        assert len(f.happened(Starting, name="a:0")) == 1


async def test_a_failed_run_of_several_is_told_by_the_whole_and_not_tried_again(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(crash, every=10)}) as f:
        await trio.sleep_until(15)
        assert row(f).cause == "runs every 10s; the last run failed: RuntimeError: boom; 0 of 3 runs in hand"
        assert f.word("a:0") == "failed"
        await trio.sleep_until(19)
        assert f.times(Starting, "a:0") == [10.0]


async def test_cancel_of_one_run_and_of_all(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(100), every=10, grace=2)}) as f:
        await trio.sleep_until(35)
        await f.tree.cancel("a:1#1")
        assert trio.current_time() == 37.0
        assert f.words("a:0", "a:1", "a:2") == "a:0:running a:1:stopped a:2:running"
        (order,) = f.tree.order("cancel", ["a"])
        assert said(await order.wait()) == "yes, a:0#1, a:2#1: cancelled"
        assert trio.current_time() == 39.0
        await settle()
        assert row(f).cause == "runs every 10s; 0 of 3 runs in hand"
        assert await at_once(f, "cancel", "a") == "no, no run in hand"
        assert (await at_once(f, "cancel", "a#1")).startswith("no, a#1 is not in hand")
        await trio.sleep_until(41)
        assert f.times(Starting, "a:0") == [10.0, 40.0]


@pytest.mark.parametrize("start", ["auto", "manual"])
async def test_run_now_takes_a_free_worker_also_of_a_schedule_that_is_down(autojump_clock, tmp_path, start):
    async with forest(tmp_path, {"a": parallel(lasting(20), every=1000, start=start, workers=2)}) as f:
        await settle()
        first, second, third = (f.tree.order("run-now", ["a"])[0] for _ in range(3))
        assert said(await third.wait()) == 'no, all of 2 workers have a run in hand, and overlap is "parallel"'
        await trio.sleep_until(10)
        assert f.words("a:0", "a:1") == "a:0:running a:1:running"
        assert said(await first.wait()) == said(await second.wait()) == "yes, completed"
        assert trio.current_time() == 20.0
        await settle()
        assert f.word("a") == ("scheduled" if start == "auto" else "completed")
        assert row(f).goal is (Goal.UP if start == "auto" else Goal.DOWN)
        await f.tree.start("a")
        await trio.sleep_until(1050)
        assert f.word("a") == "scheduled"
        assert len(f.happened(Starting, name="a:0")) == 2


async def test_a_run_of_a_schedule_that_is_down_arms_nothing(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(35), every=10, start="manual")}) as f:
        await f.tree.run_now("a")
        await settle()
        assert f.words() == "a:completed a:0:completed a:1:stopped a:2:stopped"
        assert [name for _, name in f.happened(Starting)] == ["a", "a:0"]


async def test_the_attempts_of_a_run_are_made_for_the_same_moment(autojump_clock, tmp_path):
    told = []

    async def fail_at_first(ctx: Context) -> None:
        told.append(str(ctx.scheduled_at))
        if len(told) < 2:
            raise RuntimeError("boom")

    jobs = {"a": job(fail_at_first, cron="@hourly", retry=RetrySpec(attempts=3, initial=Seconds(900)))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(1.5 * HOUR)
        assert told == ["2026-01-01 01:00:00+00:00"] * 2
        assert row(f).cause == "runs at @hourly (UTC)"


async def test_a_stop_gives_all_runs_their_grace_and_a_restart_makes_none(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(25), every=10, grace=100)}) as f:
        await trio.sleep_until(32)
        await f.tree.restart("a")
        assert trio.current_time() == 55.0
        await trio.sleep_until(64)
        assert len([1 for _, name in f.happened(Starting) if name.startswith("a:")]) == 3
        await trio.sleep_until(66)
        assert f.times(Starting, "a:0") == [10.0, 65.0]


async def test_workers_are_not_commanded_one_by_one(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(5), every=10)}) as f:
        await settle()
        for verb in ("start", "restart"):
            assert await at_once(f, verb, "a:1") == "no, a:1 runs when a gives it a run: use run-now a"
        await f.tree.run_now("a:1")
        assert f.times(Starting, "a:1") == [0.0]


async def test_scale_changes_how_many_run_side_by_side(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(100), every=10)}) as f:
        await settle()
        await f.tree.scale("a", 1)
        await trio.sleep_until(25)
        assert f.words() == "a:running a:0:running"
        await f.tree.scale("a", 2)
        await trio.sleep_until(35)
        assert f.words() == "a:running a:0:running a:1:running"


async def test_runs_in_hand_drain_and_no_tick_is_taken_meanwhile(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(25), every=10, grace=50)}) as f:
        await trio.sleep_until(22)
        f.tree.shutdown("a test")
        await f.tree.wait_stopped()
        assert trio.current_time() == 45.0
    assert [name for _, name in f.happened(Starting)] == ["a", "a:0", "a:1"]


async def test_cron_may_overlap_too(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": parallel(lasting(150), cron="* * * * *")}) as f:
        await trio.sleep_until(250)
    assert [(at, name) for at, name in f.happened(Starting) if name != "a"] == [
        (60.0, "a:0"), (120.0, "a:1"), (180.0, "a:2"), (240.0, "a:0"),
    ]  # fmt: skip


# ---- reload ----


def changed(f: Forest, **jobs: Any) -> None:
    f.tree.apply(f.config(jobs))


async def test_a_reload_changes_times_live_and_leaves_the_run_in_hand_alone(autojump_clock, tmp_path):
    keys = {"cron": "0 12 * * *", "run_on_start": True}
    work = lasting(50)
    async with forest(tmp_path, {"a": job(work, **keys)}) as f:
        await trio.sleep_until(10)
        changed(f, a=job(work, timezone="America/New_York", **{**keys, "run_on_start": False}))
        await trio.sleep_until(60)
        assert (row(f).run, row(f).exit.reason) == ("a#1", "completed")
        assert (row(f).cause, row(f).next_at) == ("runs at 0 12 * * * (America/New_York)", "2026-01-01T17:00:00.000Z")


async def test_a_pause_survives_a_reload(autojump_clock, tmp_path):
    work = lasting(1)
    async with forest(tmp_path, {"a": job(work, cron="* * * * *")}) as f:
        await f.tree.pause("a")
        changed(f, a=job(work, cron="*/2 * * * *", jitter=5))
        await trio.sleep_until(500)
        assert f.word("a") == "paused" and f.times(Starting, "a") == []
        await f.tree.resume("a")
        await trio.sleep_until(610)
        assert f.times(Starting, "a") == [601.0]


async def test_from_every_to_cron_and_back(autojump_clock, tmp_path):
    work = lasting(1)
    async with forest(tmp_path, {"a": job(work, every=10)}) as f:
        await trio.sleep_until(15)
        changed(f, a=job(work, cron="* * * * *"))
        await trio.sleep_until(65)
        changed(f, a=job(work, every=100))
        await trio.sleep_until(170)
        changed(f, a=job(work))  # a service
        await settle()
        assert f.word("a") == "running"
    assert f.times(Starting, "a") == [10.0, 60.0, 165.0, 170.0]


async def test_overlap_can_be_changed_while_a_run_is_in_hand(autojump_clock, tmp_path):
    work = lasting(25)
    async with forest(tmp_path, {"a": job(work, every=10)}) as f:
        await trio.sleep_until(15)
        changed(f, a=job(work, every=10, overlap="queue"))
        await trio.sleep_until(40)
        assert f.times(Starting, "a") == [10.0, 35.0]


@pytest.mark.parametrize("before", [{"every": 10}, {}, {"workers": 2}])
async def test_a_job_becomes_one_whose_runs_overlap_and_is_none_again(autojump_clock, tmp_path, before):
    work = lasting(25)
    async with forest(tmp_path, {"a": job(work, grace=3, **before)}) as f:
        await trio.sleep_until(15)
        changed(f, a=parallel(work, every=10, workers=2))
        await trio.sleep_until(45)
        assert f.words() == "a:running a:0:running a:1:running"
        changed(f, a=job(work, grace=3, **before))
        await trio.sleep_until(60)
        expected = {"every": "a:scheduled", "workers": "a:running a:0:running a:1:running"}
        assert f.words() == expected.get(next(iter(before), ""), "a:running")


async def test_a_bad_time_of_a_config_in_python_is_refused(tmp_path):
    with pytest.raises(SpecError) as refused:
        async with forest(tmp_path, {"a": job(serve, cron="61 * * * *"), "b": job(serve, cron="@daily", timezone="Mars")}):
            pass
    assert [problem.path for problem in refused.value.problems] == ["jobs.a.cron", "jobs.b.timezone"]


# ---- the daemon was down ----


async def lived(tmp_path: Any, since: str, seconds: float, **jobs: Any) -> Forest:
    """A tree that lives so long from then on, and stops in order."""
    async with forest(tmp_path, jobs, since=since) as f:
        await trio.sleep(seconds)
        f.tree.shutdown("a test")
        await f.tree.wait_stopped()
    return f


@pytest.mark.parametrize(
    ("catch_up", "runs", "missed"),
    [
        ("none", [], []),
        ("last", ["04T00"], [(0.0, "missed 2 runs while the daemon was down", 2)]),
        ("all", ["02T00", "03T00", "04T00"], []),
    ],
)
async def test_what_was_missed_while_the_daemon_was_down(autojump_clock, tmp_path, catch_up, runs, missed):
    jobs = {"a": job(lasting(10), cron="@daily", catch_up=catch_up)}
    await lived(tmp_path, "2026-01-01 12:00", 5, **jobs)  # it never ran: that it was there counts
    f = await lived(tmp_path, "2026-01-04 12:00", DAY, **jobs)
    assert run_for(f) == [f"2026-01-{day}:00:00.000Z" for day in (*runs, "05T00")]
    assert skipped(f) == [(at + f.history[0][0], cause, ticks) for at, cause, ticks in missed]
    f = await lived(tmp_path, "2026-01-05 12:30", DAY, **jobs)
    assert run_for(f) == ["2026-01-06T00:00:00.000Z"]


async def test_a_hundred_runs_are_caught_up_at_most(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(0.01), cron="* * * * *", catch_up="all")}
    await lived(tmp_path, "2026-01-01 12:00:30", 5, **jobs)
    f = await lived(tmp_path, "2026-01-02 12:00:30", 20, **jobs)
    assert len(run_for(f)) == 100
    assert (run_for(f)[0], run_for(f)[-1]) == ("2026-01-02T10:21:00.000Z", "2026-01-02T12:00:00.000Z")


async def test_every_is_caught_up_by_whole_intervals_since_the_last(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1), every=HOUR, catch_up="all")}
    await lived(tmp_path, "2026-01-01 00:00", 1.5 * HOUR, **jobs)
    f = await lived(tmp_path, "2026-01-01 03:30", HOUR + 10, **jobs)
    assert run_for(f) == [f"2026-01-01T{time}:00.000Z" for time in ("02:00", "03:00", "04:30")]


async def test_a_run_that_the_end_of_the_daemon_cut_short_is_made_again(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1000), cron="@hourly", catch_up="last", grace=1)}
    f = await lived(tmp_path, "2026-01-01 00:59:00", 65, **jobs)
    assert run_for(f) == ["2026-01-01T01:00:00.000Z"]
    f = await lived(tmp_path, "2026-01-01 01:10:00", 2000, **jobs)
    assert run_for(f) == ["2026-01-01T01:00:00.000Z"]
    assert [event.cause for event in f.events(Starting)] == ["catches up a run that was missed, or cut short, with the daemon"]
    assert run_for(await lived(tmp_path, "2026-01-01 01:50:00", 5, **jobs)) == []


async def test_a_run_that_an_operator_ended_is_over(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1000), cron="@hourly", catch_up="last", grace=1)}
    async with forest(tmp_path, jobs, since="2026-01-01 00:59:00") as f:
        await trio.sleep(65)
        await f.tree.cancel("a")
    assert run_for(await lived(tmp_path, "2026-01-01 01:10:00", 5, **jobs)) == []


async def test_what_passed_in_a_pause_or_while_it_was_stopped_is_not_caught_up(autojump_clock, tmp_path):
    jobs = {name: job(lasting(1), cron="@hourly", catch_up="all") for name in ("paused", "stopped", "up")}
    async with forest(tmp_path, jobs, since="2026-01-01 00:30") as f:
        await f.tree.pause("paused")
        await f.tree.stop("stopped")
        await trio.sleep(5)
    f = await lived(tmp_path, "2026-01-01 01:30", 5, **jobs)
    assert [name for _, name in f.happened(Starting)] == ["up"]


async def test_what_is_missed_after_a_pause_is_caught_up_again(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1), cron="@hourly", catch_up="all")}
    async with forest(tmp_path, jobs, since="2026-01-01 00:30") as f:
        await f.tree.pause("a")
        await trio.sleep(HOUR)
        await f.tree.resume("a")
    f = await lived(tmp_path, "2026-01-01 03:10", 5, **jobs)
    assert run_for(f) == ["2026-01-01T02:00:00.000Z", "2026-01-01T03:00:00.000Z"]


async def test_who_wants_to_catch_up_from_a_reload_on_can(autojump_clock, tmp_path):
    work = lasting(1)
    jobs = {"a": job(work, cron="@hourly", catch_up="all")}
    async with forest(tmp_path, {"a": job(work, cron="@hourly")}, since="2026-01-01 00:30") as f:
        await settle()
        f.tree.apply(f.config(jobs))
        await settle()
    f = await lived(tmp_path, "2026-01-01 01:10", 5, **jobs)
    assert run_for(f) == ["2026-01-01T01:00:00.000Z"]
    async with forest(tmp_path, jobs, since="2026-01-01 01:30") as f:
        await settle()
        f.tree.apply(f.config({"a": job(work, cron="@hourly")}))
        await settle()
    assert run_for(await lived(tmp_path, "2026-01-01 02:10", 5, **jobs)) == []


async def test_a_run_that_was_cancelled_says_nothing_of_how_they_end(autojump_clock, tmp_path):
    left = [1]

    async def fail_at_first() -> None:
        if left:
            left.pop()
            raise RuntimeError("boom")
        await trio.sleep(50)

    async with forest(tmp_path, {"a": job(fail_at_first, every=100, grace=0)}) as f:
        await trio.sleep(210)
        await f.tree.cancel("a")
        await settle()
        assert row(f).cause == "runs every 100s; the last run failed: RuntimeError: boom"


async def test_another_schedule_has_missed_nothing(autojump_clock, tmp_path):
    await lived(tmp_path, "2026-01-01 00:30", 5, a=job(serve, cron="@daily", catch_up="all"))
    f = await lived(tmp_path, "2026-01-02 00:30", 5, a=job(serve, cron="@hourly", catch_up="all"))
    assert run_for(f) == []


async def test_a_clock_that_was_set_back_meanwhile_makes_no_run_twice(autojump_clock, tmp_path):
    jobs = {"a": job(lasting(1), cron="@hourly", catch_up="all")}
    f = await lived(tmp_path, "2026-01-01 00:59:00", 100, **jobs)
    assert run_for(f) == ["2026-01-01T01:00:00.000Z"]
    f = await lived(tmp_path, "2026-01-01 00:50:00", 3 * HOUR, **jobs)
    assert run_for(f) == ["2026-01-01T02:00:00.000Z", "2026-01-01T03:00:00.000Z"]


async def test_nothing_is_stored_where_nobody_wants_to_catch_up(autojump_clock, tmp_path):
    f = await lived(tmp_path, "2026-01-01 00:59", 100, a=job(lasting(1), cron="@hourly"), b=job(lasting(1), every=10))
    assert run_for(f) != []
    assert not list(tmp_path.rglob("state.db*"))


async def test_a_state_directory_that_cannot_be_used_is_told_and_the_schedule_goes_on(autojump_clock, tmp_path):
    (tmp_path / ".supervisor").mkdir()
    (tmp_path / ".supervisor" / "state.db").mkdir()
    f = await lived(tmp_path, "2026-01-01 00:59", 100, a=job(lasting(1), cron="@hourly", catch_up="all"))
    assert run_for(f) == ["2026-01-01T01:00:00.000Z"]


async def test_a_tree_that_is_cancelled_while_the_last_runs_are_read_ends_at_once(tmp_path):
    with trio.CancelScope() as scope:
        scope.cancel(reason="a test")
        async with forest(tmp_path, {"a": job(serve, cron="@hourly", catch_up="all", run_on_start=True)}) as f:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert f.tree.has_ended and f.happened(Starting) == []


async def test_waiting_is_told_once_for_each_tick(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), cron="* * * * *"), "b": job(lasting(1), every=60)}) as f:
        await trio.sleep(130)
    assert f.times(Waiting, "a") == f.times(Waiting, "b") == [0.0, 61.0, 121.0]
