"""A new configuration in a running tree: only what differs is touched, and nothing runs twice. In virtual time."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from supervisor.config import Plan
from supervisor.events import Added, Changed, Ended, Event, GoalSet, Ready, Removed, Starting, Stopping
from supervisor.spec import RestartType, Strategy
from supervisor.state import Goal
from tests.forest import SIXTY, Forest, Gates, at_once, crash, crashing_at, forest, group, job, lasting, serve, settle, slow


async def other(ctx: Any = None) -> None:
    await trio.sleep_forever()


async def apply(f: Forest, jobs: dict[str, Any], supervisors: dict[str, Any] | None = None) -> Plan:
    """Put it in force; what it sets going without time passing is done on return."""
    config = f.config(jobs, supervisors)
    announced = f.tree.plan(config)
    plan, _ = f.tree.apply(config)
    assert plan == announced
    assert f.tree.config is config
    await settle()
    return plan


def supervisors_of(f: Forest) -> dict[str, str | None]:
    return {row.name: row.supervisor for row in f.tree.status()}


# ---- what comes, goes and stays ----


async def test_an_added_job_starts_and_nobody_else_notices(autojump_clock, tmp_path):
    old = {"a": job(serve)}
    async with forest(tmp_path, old) as f:
        await trio.sleep(5)
        seen = len(f.history)
        plan = await apply(f, {**old, "b": job(serve)})
        assert plan == Plan(added=("b",))
        assert f.words() == "a:running b:running"
        assert {getattr(event, "name", "b") for _, event in f.history[seen:]} == {"b"}
        assert f.times(Ready, "b") == [5.0]


async def test_a_removed_job_gets_its_grace_and_then_its_row_is_gone(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve), "b": job(slow(4))}) as f:
        await trio.sleep(5)
        plan, orders = f.tree.apply(f.config({"a": f.tree.config.jobs["a"]}))
        assert plan == Plan(removed=("b",))
        assert [(order.name, order.verb) for order in orders] == [("b", "stop")]
        await settle()
        assert f.words() == "a:running b:stopping"
        assert (await orders[0].wait()).text == "stopped"
        assert trio.current_time() == 9.0
        await settle()
        assert f.words() == "a:running"
        assert f.times(Removed, "b") == [9.0]
        assert f.tree.resolve(["*"]) == ["a"]


async def test_a_removed_job_that_does_not_run_is_gone_at_once(autojump_clock, tmp_path):
    async with forest(
        tmp_path, {"a": job(serve), "b": job(serve, start="manual"), "c": job(crashing_at(4), backoff=SIXTY)}
    ) as f:
        await trio.sleep(5)
        await apply(f, {"a": f.tree.config.jobs["a"]})
        assert f.words() == "a:running"
        await trio.sleep(100)
        assert len(f.times(Starting, "c")) == 1


async def test_untouched_jobs_keep_run_counters_goals_and_pauses(autojump_clock, tmp_path):
    old = {"a": job(crashing_at(1)), "b": job(serve), "c": job(lasting(1), every=10), "m": job(serve, start="manual")}
    async with forest(tmp_path, old) as f:
        await trio.sleep(5)
        await f.tree.stop("b")
        await f.tree.pause("c")
        await f.tree.start("m")
        before = {row.name: row for row in f.tree.status()}
        assert await apply(f, {**old, "new": job(serve)}) == Plan(added=("new",))
        await trio.sleep(50)
        assert {row.name: row for row in f.tree.status() if row.name != "new"} == before
        assert before["a"].restarts == 1
        assert f.words("b", "c", "m") == "b:stopped c:paused m:running"
        assert await apply(f, old) == Plan(removed=("new",))
        assert {row.name: row for row in f.tree.status()} == before


async def test_a_file_that_says_the_same_changes_nothing(autojump_clock, tmp_path):
    old = {"a": job(serve), "b": job(crashing_at(4), backoff=SIXTY)}
    async with forest(tmp_path, old, {"g": group("a")}) as f:
        await trio.sleep(5)
        seen = f.tree.journal.seq
        assert await apply(f, dict(old), {"g": group("a")}) == Plan()
        assert f.tree.journal.seq == seen + 1  # that there was a reload


async def test_what_changes_live_is_in_force_without_a_restart(autojump_clock, tmp_path):
    service, wait = crashing_at(7), SIXTY
    async with forest(tmp_path, {"a": job(service), "b": job(slow(4), description="old")}) as f:
        await trio.sleep(5)
        plan = await apply(
            f, {"a": job(service, backoff=wait), "b": job(f.tree.config.jobs["b"].call, grace=2, description="new")}
        )
        assert plan == Plan(changed=("a", "b"))
        assert f.tree.status("b")[0].description == "new"
        await trio.sleep(100)
        assert f.times(Starting, "a") == [0.0, 67.0]
        (order,) = f.tree.order("stop", ["b"])
        assert (await order.wait()).text == "stopped (killed after 2 s)"


async def test_a_changed_what_restarts_that_job_alone(autojump_clock, tmp_path):
    old = {"a": job(slow(3)), "b": job(serve), "c": job(serve)}
    tree = {"g": group("a", "b", "c", strategy=Strategy.ONE_FOR_ALL)}
    async with forest(tmp_path, old, tree) as f:
        await trio.sleep(5)
        config = f.config({**old, "b": job(serve, args={})}, tree)
        plan, orders = f.tree.apply(config, by="ann")
        assert plan == Plan(restarted=("b",))
        assert [(order.name, (await order.wait()).text) for order in orders] == [("b", "running")]
        assert (f.times(Starting, "a"), f.times(Starting, "b"), f.times(Starting, "c")) == ([0.0], [0.0, 5.0], [0.0])
        assert f.tree.status("b")[0].restarts == 0


@pytest.mark.parametrize("state", ["stopped", "manual", "completed"])
async def test_a_changed_what_starts_nothing_that_is_down(autojump_clock, tmp_path, state):
    keys: dict[str, Any] = {"manual": {"start": "manual"}, "completed": {"once": True}}.get(state, {})
    call = lasting(1) if state == "completed" else serve
    async with forest(tmp_path, {"a": job(call, **keys)}) as f:
        await trio.sleep(5)
        if state == "stopped":
            await f.tree.stop("a")
        runs = f.times(Starting, "a")
        plan, orders = f.tree.apply(f.config({"a": job(call, args={}, **keys)}))
        assert (plan, orders) == (Plan(restarted=("a",)), [])
        await trio.sleep(100)
        assert f.times(Starting, "a") == runs


async def test_a_changed_what_is_tried_at_once_where_the_old_one_was_failing(autojump_clock, tmp_path):
    old = {"a": job(crash, backoff=SIXTY), "b": job(crash, restart=RestartType.TEMPORARY)}
    async with forest(tmp_path, old) as f:
        await trio.sleep(5)
        assert f.words() == "a:backing off b:failed"
        await apply(f, {"a": job(serve, backoff=SIXTY), "b": job(serve, restart=RestartType.TEMPORARY)})
        assert f.words() == "a:running b:running"
        assert f.tree.status("a")[0].restarts == 0


async def test_a_changed_what_of_a_job_on_its_way_down_waits_for_nobody(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(slow(4))}) as f:
        await trio.sleep(5)
        f.tree.order("stop", ["a"])
        await settle()
        _, orders = f.tree.apply(f.config({"a": job(slow(1))}))
        answer = await orders[0].wait()
        assert (answer.ok, answer.text) == (False, "a is stopped: stopped")
        assert trio.current_time() == 9.0


async def test_a_changed_start_sets_the_goal(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve), "b": job(serve, start="manual")}) as f:
        await trio.sleep(5)
        await apply(f, {"a": job(serve, start="manual"), "b": job(serve)})
        assert f.words() == "a:stopped b:running"
        assert [(event.name, event.goal, event.cause) for event in f.events(GoalSet)] == [
            ("a", Goal.DOWN, "its `start` was changed"),
            ("b", Goal.UP, "its `start` was changed"),
        ]


async def test_a_changed_interval_begins_a_new_schedule(autojump_clock, tmp_path):
    work = lasting(1)
    async with forest(tmp_path, {"a": job(work, every=10)}) as f:
        await trio.sleep(25)
        assert await apply(f, {"a": job(work, every=7)}) == Plan(restarted=("a",))
        await trio.sleep(20)
        assert f.times(Starting, "a") == [10.0, 20.0, 32.0, 39.0]


async def test_a_changed_interval_during_a_run_is_answered_when_the_new_schedule_begins(autojump_clock, tmp_path):
    work = lasting(6)
    async with forest(tmp_path, {"a": job(work, every=10)}) as f:
        await trio.sleep(12)
        _, orders = f.tree.apply(f.config({"a": job(work, every=7)}))
        assert (await orders[0].wait()).text == "its schedule begins anew"
        assert trio.current_time() == 16.0
        await trio.sleep(10)
        assert f.times(Starting, "a") == [10.0, 23.0]


async def test_a_schedule_becomes_a_service_and_a_service_a_run(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1), every=10), "b": job(serve), "c": job(lasting(1), once=True)}) as f:
        await trio.sleep(15)
        await apply(f, {"a": job(serve), "b": job(lasting(1), once=True), "c": job(serve)})
        await trio.sleep(30)
        assert f.words() == "a:running b:completed c:running"


async def test_a_new_after_holds_from_then_on(autojump_clock, tmp_path):
    a, b = job(serve), job(serve)
    async with forest(tmp_path, {"a": a, "b": b, "c": job(serve, start="manual")}) as f:
        await trio.sleep(5)
        await apply(f, {"a": a, "b": job(serve, after=("c",)), "c": job(serve, start="manual")})
        assert f.word("b") == "running"
        (order,) = f.tree.order("restart", ["b"])
        await settle()
        assert f.word("b") == "waiting"
        await f.tree.start("c")
        assert (await order.wait()).ok
    # and so does the order of the stop
    assert [name for _, name in f.happened(Stopping)][-3:] in (["a", "b", "c"], ["b", "a", "c"])
    assert f.happened(Ended)[-1][1] == "c"


async def test_a_new_order_of_a_group_holds_from_then_on(autojump_clock, tmp_path):
    gates = Gates()
    jobs = {name: job(gates.service(name)) for name in "abc"}
    async with forest(tmp_path, jobs, {"g": group("a", "b", "c", strategy=Strategy.REST_FOR_ONE, backoff=SIXTY)}) as f:
        await trio.sleep(5)
        new = {"g": group("c", "a", "b", strategy=Strategy.REST_FOR_ONE, backoff=SIXTY)}
        assert await apply(f, jobs, new) == Plan(changed=("g",))
        gates.fail("a")
        await settle()
        assert f.words("a", "b", "c") == "a:backing off b:backing off c:running"
        assert [row.name for row in f.tree.status()] == ["g", "c", "a", "b"]


async def test_a_new_strategy_holds_from_then_on(autojump_clock, tmp_path):
    gates = Gates()
    jobs = {name: job(gates.service(name, stops_in=1)) for name in "abc"}
    async with forest(tmp_path, jobs, {"g": group("a", "b", "c")}) as f:
        await trio.sleep(5)
        await apply(f, jobs, {"g": group("a", "b", "c", strategy=Strategy.REST_FOR_ONE, backoff=SIXTY)})
        gates.fail("a")
        await trio.sleep(10)
        assert f.happened(Ended) == [(5.0, "a"), (6.0, "c"), (7.0, "b")]


async def test_a_new_intensity_counts_what_has_been(autojump_clock, tmp_path):
    service = crashing_at(1, 2, 12)
    async with forest(tmp_path, {"a": job(service)}, {"g": group("a", intensity=9, backoff=SIXTY)}) as f:
        await trio.sleep(10)
        await apply(f, {"a": f.tree.config.jobs["a"]}, {"g": group("a", intensity=2, backoff=SIXTY)})
        await trio.sleep(5)
        assert f.words() == "g:backing off a:failed"


# ---- moving ----


async def test_a_moved_job_is_stopped_under_the_old_and_started_under_the_new_supervisor(autojump_clock, tmp_path):
    jobs = {"a": job(slow(3)), "b": job(serve), "c": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("a", "b"), "h": group("c")}) as f:
        await trio.sleep(5)
        plan, orders = f.tree.apply(f.config(jobs, {"g": group("b"), "h": group("c", "a")}))
        assert plan == Plan(moved=("a",), changed=("g", "h"))
        assert [(await order.wait()).text for order in orders] == ["running"]
        assert f.times(Starting, "a") == [0.0, 8.0]
        assert (f.times(Ended, "b"), f.times(Ended, "c"), f.times(Removed, "a")) == ([], [], [])
        assert supervisors_of(f) == {"g": None, "b": "g", "h": None, "c": "h", "a": "h"}
        await f.tree.stop("h")
        assert f.words() == "g:running b:running h:stopped c:stopped a:stopped"


async def test_a_move_out_of_a_supervisor_that_is_removed(autojump_clock, tmp_path):
    jobs = {"a": job(slow(3)), "b": job(slow(4)), "m": job(serve, start="manual")}
    async with forest(tmp_path, jobs, {"g": group("a", "b", "m")}) as f:
        await trio.sleep(5)
        plan = await apply(f, {"a": jobs["a"], "m": jobs["m"]})
        assert plan == Plan(removed=("g", "b"), moved=("a", "m"))
        assert f.words() == "a:stopping m:stopped g:stopping b:stopping"  # those who leave come last
        await f.tree.start("m")  # it has arrived already
        await trio.sleep(10)
        assert f.words() == "a:running m:running"
        assert f.times(Starting, "a") == [0.0, 8.0]
        assert (f.times(Removed, "b"), f.times(Removed, "g")) == ([9.0], [9.0])


async def test_a_restart_of_a_job_that_is_on_the_move_is_obeyed_where_it_goes(autojump_clock, tmp_path):
    jobs = {"a": job(slow(3))}
    async with forest(tmp_path, jobs, {"g": group("a")}) as f:
        await trio.sleep(5)
        await apply(f, jobs)
        await f.tree.restart("a")
        assert trio.current_time() == 8.0
        assert supervisors_of(f) == {"a": None}


async def test_a_move_to_a_supervisor_that_is_new(autojump_clock, tmp_path):
    jobs = {"a": job(slow(3)), "b": job(serve, start="manual")}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        plan = await apply(f, jobs, {"g": group("h"), "h": group("a", "b")})
        assert plan == Plan(added=("g", "h"), moved=("a", "b"))
        await trio.sleep(5)
        assert supervisors_of(f) == {"g": None, "h": "g", "a": "h", "b": "h"}
        assert f.words() == "g:running h:running a:running b:stopped"
        assert f.times(Starting, "a") == [0.0, 8.0]


async def test_a_move_to_a_supervisor_that_is_stopped_waits_for_it(autojump_clock, tmp_path):
    jobs = {"a": job(slow(3)), "b": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("b")}) as f:
        await trio.sleep(5)
        await f.tree.stop("g")
        _, (order,) = f.tree.apply(f.config(jobs, {"g": group("b", "a")}))
        assert (await order.wait()).text == "its supervisor g is stopped"
        await f.tree.start("g")
        assert f.word("a") == "running"


async def test_a_moved_job_has_its_place_in_the_new_order(autojump_clock, tmp_path):
    gates = Gates()
    jobs = {name: job(gates.service(name, stops_in=1)) for name in "abc"}
    async with forest(tmp_path, jobs, {"g": group("a", "c", strategy=Strategy.REST_FOR_ONE, backoff=SIXTY)}) as f:
        await trio.sleep(5)
        await apply(f, jobs, {"g": group("a", "b", "c", strategy=Strategy.REST_FOR_ONE, backoff=SIXTY)})
        await trio.sleep(5)
        gates.fail("b")
        await settle()
        assert f.words("a", "b", "c") == "a:running b:backing off c:stopping"


async def test_a_supervisor_moves_with_its_children(autojump_clock, tmp_path):
    jobs = {"a": job(slow(3)), "b": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("a"), "h": group("b")}) as f:
        await trio.sleep(5)
        assert await apply(f, jobs, {"g": group("a"), "h": group("b", "g")}) == Plan(moved=("g",), changed=("h",))
        await trio.sleep(10)
        assert supervisors_of(f) == {"h": None, "b": "h", "g": "h", "a": "g"}
        assert f.times(Starting, "a") == [0.0, 8.0]
        assert f.word("h") == "running"


async def test_a_move_there_and_back_while_the_run_still_ends(autojump_clock, tmp_path):
    jobs = {"a": job(slow(3)), "b": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("a"), "h": group("b")}) as f:
        await trio.sleep(5)
        await apply(f, jobs, {"g": group(), "h": group("b", "a")})
        await apply(f, jobs, {"g": group("a"), "h": group("b")})
        await trio.sleep(5)
        assert f.times(Starting, "a") == [0.0, 8.0]
        assert supervisors_of(f)["a"] == "g"


# ---- leaving and coming back ----


async def test_a_removed_supervisor_takes_its_children_along_in_reverse_order(autojump_clock, tmp_path):
    jobs = {"db": job(slow(2)), "api": job(slow(3), after=("db",)), "x": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("db", "api")}) as f:
        await trio.sleep(5)
        assert await apply(f, {"x": jobs["x"]}) == Plan(removed=("g", "db", "api"))
        await trio.sleep(10)
        assert f.happened(Removed) == [(8.0, "api"), (10.0, "db"), (10.0, "g")]
        assert f.words() == "x:running"


async def test_jobs_removed_together_leave_in_reverse_order(autojump_clock, tmp_path):
    jobs = {"db": job(slow(2)), "api": job(slow(3), after=("db",)), "x": job(serve)}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        await apply(f, {"x": jobs["x"]})
        await trio.sleep(10)
        assert f.happened(Removed) == [(8.0, "api"), (10.0, "db")]


async def test_who_stays_does_not_keep_what_it_needed_from_leaving(autojump_clock, tmp_path):
    jobs = {"db": job(slow(2)), "api": job(slow(3), after=("db",))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        await apply(f, {"api": job(jobs["api"].call)})
        await trio.sleep(10)
        assert f.happened(Removed) == [(7.0, "db")]


async def test_what_has_left_is_not_disturbed_by_what_it_waited_for(autojump_clock, tmp_path):
    jobs = {"db": job(serve), "api": job(slow(3), after=("db",))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        await apply(f, {"db": jobs["db"]})
        await trio.sleep(5)
        await f.tree.restart("db")
        assert f.words() == "db:running"


async def test_a_job_that_comes_back_while_it_still_stops_is_begun_anew_when_it_is_gone(autojump_clock, tmp_path):
    jobs = {"a": job(crashing_at(1)), "b": job(slow(4))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        assert await apply(f, {"a": jobs["a"]}) == Plan(removed=("b",))
        await trio.sleep(1)
        assert await apply(f, jobs) == Plan(added=("b",))
        assert f.words() == "a:running b:stopping"
        assert await at_once(f, "start", "b") == "no, b is leaving: removed from the configuration"
        await trio.sleep(10)
        assert f.happened(Removed, Added, Starting, name="b")[1:] == [(0.0, "b"), (9.0, "b"), (9.0, "b"), (9.0, "b")]
        assert f.words() == "a:running b:running"


async def test_a_job_that_comes_back_somewhere_else_while_it_still_stops(autojump_clock, tmp_path):
    jobs = {"a": job(serve), "b": job(slow(4))}
    async with forest(tmp_path, jobs, {"g": group("a")}) as f:
        await trio.sleep(5)
        await apply(f, {"a": jobs["a"]}, {"g": group("a")})
        await apply(f, jobs, {"g": group("a", "b")})
        await trio.sleep(10)
        assert supervisors_of(f) == {"g": None, "a": "g", "b": "g"}
        assert f.times(Starting, "b") == [0.0, 9.0]


async def test_a_supervisor_comes_back_with_its_children_while_they_still_stop(autojump_clock, tmp_path):
    jobs = {"a": job(slow(2)), "b": job(slow(4)), "c": job(serve)}
    tree = {"g": group("a", "b", "c")}
    async with forest(tmp_path, jobs, tree) as f:
        await trio.sleep(5)
        await apply(f, {"c": jobs["c"]})  # c stays, at the root
        assert f.words("c") == "c:running"
        assert await apply(f, jobs, tree) == Plan(added=("g", "a", "b"), moved=("c",))
        await trio.sleep(10)
        assert supervisors_of(f) == {"g": None, "a": "g", "b": "g", "c": "g"}
        assert f.words() == "g:running a:running b:running c:running"
        assert (f.times(Starting, "a"), f.times(Starting, "b")) == ([0.0, 9.0], [0.0, 9.0])


async def test_a_change_of_what_has_not_come_back_yet(autojump_clock, tmp_path):
    jobs = {"a": job(slow(4))}
    async with forest(tmp_path, jobs, {"g": group("a")}) as f:
        await trio.sleep(5)
        await apply(f, {})
        await apply(f, jobs, {"g": group("a")})
        assert await apply(f, {"a": job(slow(1))}, {"g": group("a")}) == Plan(restarted=("a",))
        await trio.sleep(10)
        assert await apply(f, {}, {"g": group()}) == Plan(removed=("a",), changed=("g",))
        await trio.sleep(10)
        assert f.times(Ended, "a") == [9.0, 16.0]  # the second run took 1 s to stop: it was the new one
        assert f.words() == "g:running"


async def test_it_comes_and_goes_faster_than_it_stops(autojump_clock, tmp_path):
    jobs = {"a": job(slow(4))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        for _ in range(3):
            assert await apply(f, {}) == Plan(removed=("a",))
            assert await apply(f, jobs) == Plan(added=("a",))
        assert await apply(f, {}) == Plan(removed=("a",))
        await trio.sleep(10)
        assert f.words() == ""
        assert f.times(Starting, "a") == [0.0]


async def test_a_job_becomes_a_supervisor_of_the_same_name(autojump_clock, tmp_path):
    async with forest(tmp_path, {"g": job(slow(4)), "a": job(slow(1))}) as f:
        await trio.sleep(5)
        assert await apply(f, {"a": f.tree.config.jobs["a"]}, {"g": group("a")}) == Plan(
            added=("g",), removed=("g",), moved=("a",)
        )
        await trio.sleep(10)
        assert supervisors_of(f) == {"g": None, "a": "g"}
        assert f.words() == "g:running a:running"
        assert f.times(Starting, "a") == [0.0, 9.0]


async def test_a_removal_answers_who_waited_for_a_start(autojump_clock, tmp_path):
    jobs = {"a": job(serve, after=("b",)), "b": job(serve, start="manual")}
    async with forest(tmp_path, jobs) as f:
        (order,) = f.tree.order("start", ["a"])
        await settle()
        await apply(f, {"b": jobs["b"]})
        answer = await order.wait()
        assert (answer.ok, answer.text) == (False, "overtaken: removed from the configuration")


async def test_a_command_posted_in_the_moment_of_a_move_reaches_the_job(autojump_clock, tmp_path):
    jobs = {"a": job(serve, start="manual")}
    async with forest(tmp_path, jobs, {"g": group("a")}) as f:
        await trio.sleep(5)
        f.tree.apply(f.config(jobs))
        (order,) = f.tree.order("start", ["a"])
        assert (await order.wait()).ok
        await settle()
        assert supervisors_of(f) == {"a": None}


async def test_a_command_posted_in_the_moment_of_a_removal_is_answered(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve, start="manual")}) as f:
        await trio.sleep(5)
        f.tree.apply(f.config({}))
        (order,) = f.tree.order("start", ["a"])
        assert (await order.wait()).text == "a is leaving: removed from the configuration"


# ---- what is said is what is done ----


async def test_the_plan_is_what_happens(autojump_clock, tmp_path):
    names = ("stays", "leaves", "moves", "moves down", "restarts", "changes", "restarts later")
    jobs = {name.replace(" ", "-"): job(slow(1)) for name in names}
    old = {"g": group("stays", "moves", "moves-down"), "gone": group("leaves")}
    async with forest(tmp_path, jobs, old) as f:
        await trio.sleep(5)
        await f.tree.stop("moves-down", "restarts-later")
        seen = len(f.history)
        new = {name: spec for name, spec in jobs.items() if name != "leaves"} | {"comes": job(serve)}
        new["restarts"] = job(slow(2))
        new["restarts-later"] = job(slow(2))
        new["changes"] = job(jobs["changes"].call, grace=3)
        plan = await apply(f, new, {"g": group("stays"), "h": group("moves", "moves-down")})
        await trio.sleep(20)
        assert plan == Plan(
            added=("h", "comes"),
            removed=("gone", "leaves"),
            moved=("moves", "moves-down"),
            restarted=("restarts", "restarts-later"),
            changed=("g", "changes"),
        )
        del f.history[:seen]

        def named(*kinds: type[Event]) -> set[str]:
            return {name for _, name in f.happened(*kinds)}

        assert named(Added) == set(plan.added)
        assert named(Removed) == set(plan.removed)
        assert named(Changed) == {*plan.moved, *plan.restarted, *plan.changed}
        assert named(Ended) & named(Starting) == {"moves", "restarts"}  # the others were down, and are
        assert named(Ended, Starting) == {*plan.added, *plan.removed, "moves", "restarts"}
        assert f.tree.plan(f.tree.config) == Plan()
