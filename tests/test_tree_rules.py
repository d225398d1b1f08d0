"""The tree's rules, one sentence at a time: what the model-based test found, and what its jobs cannot do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
from bench import Bench, Part, exact, settle

from supervisor import events
from supervisor.config import Config, DaemonSpec
from supervisor.errors import EssentialEnded
from supervisor.kinds import JobSpec
from supervisor.spec import AutoShutdown, Backoff, GiveUp, RestartType, Seconds, Strategy, SupervisorSpec
from supervisor.state import Phase
from supervisor.tree import Supervisor, open_supervisor

AT_ONCE = Backoff(initial=Seconds(0))
MINUTE = Backoff(initial=Seconds(60), factor=1, max=Seconds(60))


@asynccontextmanager
async def running(
    base: Path, jobs: Mapping[str, JobSpec], groups: Mapping[str, SupervisorSpec] | None = None, **daemon: Any
) -> AsyncIterator[Supervisor]:
    """A tree of these jobs that has come to rest."""
    config = Config(file=None, base=base, daemon=DaemonSpec(**daemon), jobs=jobs, supervisors=groups or {})
    with structlog.testing.capture_logs():
        async with open_supervisor(config, spread=exact) as tree:
            await settle()
            yield tree


def words(tree: Supervisor) -> str:
    return " ".join(f"{name}:{row.word}" for name, row in tree.journal.table.items())


# Automatic shutdown


async def test_a_significant_child_that_runs_again_is_waited_for_again(autojump_clock, tmp_path):
    bench = Bench()
    keys = {"restart": RestartType.TRANSIENT, "significant": True}
    jobs = {name: bench.job(name, **keys) for name in ("a", "b")}
    group = SupervisorSpec(children=("a", "b"), auto_shutdown=AutoShutdown.ALL_SIGNIFICANT, restart=RestartType.TRANSIENT)
    async with running(tmp_path, jobs, {"g": group}) as tree:
        bench.succeed("a")
        await settle()
        await tree.start("a")
        bench.succeed("b")
        await settle()
        assert words(tree) == "g:running a:running b:completed"
        bench.succeed("a")
        await settle()
        assert words(tree) == "g:completed a:completed b:completed"


async def test_a_significant_child_that_an_operator_stopped_is_not_waited_for(autojump_clock, tmp_path):
    bench = Bench()
    keys = {"restart": RestartType.TRANSIENT, "significant": True}
    jobs = {name: bench.job(name, **keys) for name in ("a", "b")}
    group = SupervisorSpec(children=("a", "b"), auto_shutdown=AutoShutdown.ALL_SIGNIFICANT, restart=RestartType.TRANSIENT)
    async with running(tmp_path, jobs, {"g": group}) as tree:
        await tree.stop("a")
        bench.succeed("b")
        await settle()
        assert words(tree) == "g:completed a:stopped b:completed"


# Commands


async def test_a_start_below_a_stopped_supervisor_is_refused_at_any_depth(autojump_clock, tmp_path):
    bench = Bench()
    groups = {"g": SupervisorSpec(children=("h",)), "h": SupervisorSpec(children=("a",))}
    async with running(tmp_path, {"a": bench.job("a")}, groups) as tree:
        await tree.stop("g")
        for verb in ("start", "restart"):
            [order] = tree.order(verb, ["a"])
            answer = await order.wait()
            assert (answer.ok, answer.text) == (False, "its supervisor g is stopped; start that first: supervisor start g")


async def test_a_start_below_a_supervisor_that_stops_is_refused_at_any_depth(autojump_clock, tmp_path):
    bench = Bench()
    groups = {"g": SupervisorSpec(children=("h", "b")), "h": SupervisorSpec(children=("a",))}
    jobs = {"a": bench.job("a"), "b": bench.job("b", Part(lag=3), after=("h",))}
    async with running(tmp_path, jobs, groups) as tree:
        tree.order("stop", ["g"])
        await settle()
        assert words(tree) == "g:stopping h:running a:running b:stopping"
        [order] = tree.order("restart", ["a"])
        assert (await order.wait()).text == "its supervisor g is stopping; start that first: supervisor start g"


async def test_who_waits_for_a_start_is_told_when_its_waiting_supervisor_is_stopped(autojump_clock, tmp_path):
    bench = Bench()
    groups = {"g": SupervisorSpec(children=("h",), after=("b",)), "h": SupervisorSpec(children=("a",))}
    async with running(tmp_path, {"a": bench.job("a"), "b": bench.job("b", start="manual")}, groups) as tree:
        [waiting] = tree.order("start", ["a"])
        await settle()
        assert words(tree) == "g:waiting h:stopped a:stopped b:stopped"
        await tree.stop("g")
        with trio.fail_after(1):
            answer = await waiting.wait()
        assert (answer.ok, answer.text) == (False, "g is stopped: stopped")


async def test_who_waits_for_a_start_is_told_when_a_supervisor_on_the_way_is_stopped_that_could_not_run_yet(
    autojump_clock, tmp_path
):
    bench = Bench()
    groups = {"g": SupervisorSpec(children=("h",), after=("b",)), "h": SupervisorSpec(children=("a",))}
    async with running(tmp_path, {"a": bench.job("a"), "b": bench.job("b", start="manual")}, groups) as tree:
        [waiting] = tree.order("start", ["a"])
        await tree.stop("h")
        with trio.fail_after(1):
            answer = await waiting.wait()
        assert (answer.ok, answer.text) == (False, "h is stopped: stopped")


async def test_who_waits_for_a_start_is_told_when_the_end_begins(autojump_clock, tmp_path):
    bench = Bench()
    manual = {"a": bench.job("a", after=("b",), start="manual"), "b": bench.job("b", start="manual")}
    jobs = {**manual, "c": bench.job("c", Part(lag=3), once=True)}
    async with running(tmp_path, jobs) as tree:
        [waiting] = tree.order("start", ["a"])
        await settle()
        tree.shutdown("enough")
        with trio.fail_after(1):
            answer = await waiting.wait()
        assert (answer.ok, answer.text) == (False, "overtaken: enough")


async def test_a_restart_of_what_ends_by_itself_in_the_same_moment_is_one_restart(autojump_clock, tmp_path):
    bench = Bench()
    async with running(tmp_path, {"a": bench.job("a", backoff=MINUTE)}) as tree:
        bench.fail("a")
        await tree.restart("a")
        await settle()
        assert [note.what for note in bench.notes if note.what != "asked"] == ["start", "end", "start"]
        assert (words(tree), tree.journal.table["a"].restarts) == ("a:running", 0)


async def test_a_start_wins_over_the_cancel_that_is_still_under_way(autojump_clock, tmp_path):
    bench = Bench()
    async with running(tmp_path, {"a": bench.job("a", Part(lag=3), once=True)}) as tree:
        cancelled, started = tree.order("cancel", ["a"]) + tree.order("start", ["a"])
        with trio.fail_after(4):
            assert not (await cancelled.wait()).ok
            assert (await started.wait()).ok
        assert bench.runs["a"] == 2


async def test_a_start_wins_over_the_backoff_of_a_start_that_timed_out(autojump_clock, tmp_path):
    bench = Bench()
    never = Part(says_ready=True, ready_in=None, lag=3)
    async with running(tmp_path, {"a": bench.job("a", never, start_timeout=Seconds(1), backoff=MINUTE)}) as tree:
        await trio.sleep(2)
        bench.parts["a"].ready_in = 0
        with trio.fail_after(3):
            await tree.start("a")
        assert tree.journal.table["a"].restarts == 0


# Strategies


def all_or_none(*children: str, **keys: Any) -> SupervisorSpec:
    return SupervisorSpec(strategy=Strategy.ONE_FOR_ALL, children=children, **keys)


async def test_a_temporary_child_that_its_group_has_stopped_starts_when_told_to(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"a": bench.job("a"), "t": bench.job("t", restart=RestartType.TEMPORARY)}
    async with running(tmp_path, jobs, {"g": all_or_none("a", "t", backoff=MINUTE)}) as tree:
        bench.fail("a")
        await settle()
        with trio.fail_after(1):
            await tree.start("t")
        await settle()
        assert words(tree) == "g:running a:running t:running"


async def test_a_temporary_child_stays_down_when_its_group_has_stopped_it_or_it_had_ended(autojump_clock, tmp_path):
    bench = Bench()
    temporary = {"restart": RestartType.TEMPORARY}
    jobs = {"a": bench.job("a", backoff=AT_ONCE), "t": bench.job("t", **temporary), "u": bench.job("u", **temporary)}
    async with running(tmp_path, jobs, {"g": all_or_none("a", "t", "u", backoff=AT_ONCE)}) as tree:
        bench.succeed("u")
        await settle()
        bench.fail("a")
        await settle()
        assert words(tree) == "g:running a:running t:stopped u:completed"


async def test_a_temporary_child_that_has_not_run_since_its_supervisor_began_is_not_put_down_by_a_group(
    autojump_clock, tmp_path
):
    bench = Bench()
    jobs = {"a": bench.job("a"), "b": bench.job("b"), "t": bench.job("t", restart=RestartType.TEMPORARY, after=("b",))}
    async with running(tmp_path, jobs, {"g": all_or_none("a", "t", backoff=AT_ONCE)}) as tree:
        await tree.stop("b")
        tree.order("restart", ["g"])
        await settle()
        bench.fail("a")
        await settle()
        assert words(tree) == "g:starting a:running t:waiting b:stopped"
        await tree.start("b")
        await settle()
        assert words(tree) == "g:running a:running t:running b:running"


# Escalation


async def test_a_supervisor_that_gives_up_is_stopping_and_not_ready_until_its_children_are_gone(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"a": bench.job("a"), "b": bench.job("b", Part(lag=3)), "c": bench.job("c", after=("g",), start="manual")}
    async with running(tmp_path, jobs, {"g": SupervisorSpec(children=("a", "b"), intensity=0, backoff=MINUTE)}) as tree:
        bench.fail("a")
        await settle()
        row = tree.journal.table["g"]
        assert (row.state.value, row.ready, row.cause) == ("stopping", False, "more than 0 restarts within 60 s; a: Boom: a")
        assert not tree.root_ready.value
        tree.order("start", ["c"])
        await trio.sleep(3)
        await settle()
        assert words(tree) == "g:backing off a:failed b:stopped c:waiting"


async def test_a_start_of_a_supervisor_that_gives_up_starts_it_again_at_once(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"a": bench.job("a"), "b": bench.job("b", Part(lag=3))}
    async with running(tmp_path, jobs, {"g": SupervisorSpec(children=("a", "b"), intensity=0, backoff=MINUTE)}) as tree:
        bench.fail("a")
        await settle()
        with trio.fail_after(4):
            await tree.start("g")
        assert words(tree) == "g:running a:running b:running"
        assert tree.journal.table["g"].restarts == 0


async def test_a_child_that_starts_with_its_supervisor_is_no_restart_of_its_own(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"a": bench.job("a"), "b": bench.job("b")}
    async with running(tmp_path, jobs, {"g": SupervisorSpec(children=("a", "b"), intensity=0, backoff=AT_ONCE)}) as tree:
        bench.fail("a")
        await settle()
        assert {name: (row.restarts, row.word) for name, row in tree.journal.table.items()} == {
            "g": (1, "running"), "a": (0, "running"), "b": (0, "running"),
        }  # fmt: skip


# The end


async def test_a_supervisor_is_not_killed_above_a_child_that_does_not_end_and_the_child_is_named(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"a": bench.job("a", Part(lag=9, stubborn=6)), "b": bench.job("b", Part(lag=3), after=("g",))}
    async with running(tmp_path, jobs, {"g": SupervisorSpec(children=("a",))}) as tree:
        killed = []
        tree.journal.add_sink(lambda event: killed.append(event.name) if isinstance(event, events.Killing) else None)
        tree.shutdown("enough", kill=True)
        await tree.wait_stopped()
    assert sorted(killed) == ["a", "b"]
    assert [name.partition(" ")[0] for name in tree.survivors] == ["a"]


async def test_an_essential_permanent_supervisor_that_shuts_down_by_itself_is_started_again(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"a": bench.job("a", restart=RestartType.TEMPORARY, significant=True)}
    group = SupervisorSpec(children=("a",), auto_shutdown=AutoShutdown.ANY_SIGNIFICANT, essential=True, backoff=AT_ONCE)
    async with running(tmp_path, jobs, {"g": group}) as tree:
        bench.succeed("a")
        await settle()
        assert words(tree) == "g:running a:running"
        assert not tree.ending


async def test_an_essential_supervisor_that_gives_up_restarts_nothing_on_the_way_to_the_end(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"a": bench.job("a"), "b": bench.job("b"), "c": bench.job("c", Part(lag=3), once=True)}
    groups = {"h": all_or_none("g", "b"), "g": SupervisorSpec(children=("a",), intensity=0, essential=True)}
    with pytest.raises(EssentialEnded, match="essential g failed: more than 0 restarts"):
        async with running(tmp_path, jobs, groups) as tree:
            bench.fail("a")
            await settle()
            assert words(tree) == "h:running g:failed a:failed b:running c:draining"
            await tree.wait_stopped()


async def test_a_job_that_gave_up_and_is_started_has_all_its_failures_again(autojump_clock, tmp_path):
    bench = Bench()
    twice = GiveUp(failures=2, within=Seconds(60))
    async with running(tmp_path, {"a": bench.job("a", give_up=twice, backoff=AT_ONCE)}) as tree:
        for word in ("running", "gave up"):
            bench.fail("a")
            await settle()
            assert words(tree) == f"a:{word}"
        await tree.start("a")
        bench.fail("a")
        await settle()
        assert words(tree) == "a:running"


async def test_the_end_does_not_wait_for_what_has_been_stuck_since_before_it_began(autojump_clock, tmp_path):
    bench = Bench()
    async with running(tmp_path, {"a": bench.job("a", Part(lag=1000, stubborn=100))}) as tree:
        tree.order("stop", ["a"], now=True)
        await trio.sleep(10)
        assert words(tree) == "a:stuck"
        tree.shutdown("enough")
        await settle()
        assert tree.phase.value is Phase.KILLING
