"""How a tree ends, and what comes out of `open_supervisor`: phases, graces, survivors, errors. In virtual time."""

from __future__ import annotations

import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.config import Config
from supervisor.errors import EssentialEnded, InternalError, RestartIntensityExceeded
from supervisor.events import Draining, Ended, Event, Killing, PhaseChanged, Starting, Stopping, Stuck
from supervisor.kinds import Context
from supervisor.spec import AutoShutdown, RestartType, Strategy
from supervisor.state import Phase, State
from supervisor.tree import open_supervisor
from tests.forest import SIXTY, Forest, crash, crashing_at, forest, group, job, lasting, serve, settle, slow

# ---- what comes out of the block ----


async def test_an_exception_of_the_block_comes_out_as_it_is_after_the_stop(autojump_clock, tmp_path):
    failure = ValueError("mine")
    with pytest.raises(ValueError) as caught:
        async with forest(tmp_path, {"a": job(slow(3))}) as f:
            await settle()
            raise failure
    assert caught.value is failure
    assert caught.value.__context__ is None
    assert trio.current_time() == 3.0
    assert f.happened(Ended) == [(3.0, "a")]


async def test_a_group_that_the_block_raises_keeps_its_shape(autojump_clock, tmp_path):
    with pytest.raises(ExceptionGroup) as caught:
        async with forest(tmp_path, {}):
            raise ExceptionGroup("mine", [ValueError("only one")])
    assert caught.value.message == "mine"


async def test_ctrl_c_in_the_block_stops_in_order_and_comes_out(autojump_clock, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        async with forest(tmp_path, {"a": job(slow(3))}) as f:
            await settle()
            raise KeyboardInterrupt
    assert f.happened(Ended) == [(3.0, "a")]


async def test_a_root_that_gives_up_raises_restart_intensity_exceeded_itself(autojump_clock, tmp_path):
    with pytest.raises(RestartIntensityExceeded) as caught:
        async with forest(tmp_path, {"a": job(crash), "b": job(slow(2))}, intensity=1) as f:
            await trio.sleep_forever()
    assert (caught.value.supervisor, caught.value.intensity) == ("", 1)
    assert caught.value.__suppress_context__
    assert f.tree.failure is caught.value
    # The first failure is answered after 0.5 s; the second one is too many, and the end waits for b.
    assert f.happened(Ended) == [(0.0, "a"), (0.5, "a"), (2.5, "b")]
    assert f.tree.ending == "more than 1 restarts within 60 s; a: RuntimeError: boom"


async def test_an_essential_job_that_fails_for_good_raises_essential_ended_itself(autojump_clock, tmp_path):
    spec = job(crash, once=True, essential=True, restart=RestartType.TEMPORARY)
    with pytest.raises(EssentialEnded, match=r"^essential a failed: RuntimeError: boom$"):
        async with forest(tmp_path, {"a": spec, "b": job(serve)}):
            await trio.sleep_forever()


async def test_an_essential_job_that_completes_just_ends_the_block(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(7), once=True, essential=True), "b": job(slow(1))}) as f:
        await trio.sleep_forever()
    assert trio.current_time() == 8.0
    assert f.tree.failure is None
    assert f.tree.ending == "essential a completed"


async def test_what_fails_in_the_tree_and_in_the_block_comes_out_in_one_group(autojump_clock, tmp_path):
    with pytest.raises(ExceptionGroup) as caught:
        async with forest(tmp_path, {"a": job(crash)}, intensity=0):
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while leaving")
    assert [type(error) for error in caught.value.exceptions] == [ValueError, RestartIntensityExceeded]


async def test_a_fault_of_ours_comes_out_bare_and_ends_everything_at_once(autojump_clock, tmp_path):
    def sink(event):
        if isinstance(event, Starting) and event.run == "bad#2":
            raise ValueError("a sink")

    with pytest.raises(InternalError, match=r"^a sink raised on event"):
        async with forest(tmp_path, {"bad": job(crashing_at(1)), "a": job(slow(5))}, {"g": group("bad")}) as f:
            f.tree.journal.add_sink(sink)
            await trio.sleep_forever()
    assert trio.current_time() == 1.5


async def test_cancelling_the_block_from_outside_stops_in_order(autojump_clock, tmp_path):
    with trio.move_on_after(2) as scope:
        async with forest(tmp_path, {"db": job(slow(3)), "api": job(slow(4), after=("db",))}) as f:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == 9.0
    assert f.happened(Ended) == [(6.0, "api"), (9.0, "db")]
    assert f.tree.survivors == f.tree.late == ()


async def test_an_error_on_the_way_out_of_a_cancelled_block_is_not_wrapped(autojump_clock, tmp_path):
    with trio.CancelScope() as scope, pytest.raises(ValueError):
        async with forest(tmp_path, {"a": job(slow(3))}):
            await settle()
            scope.cancel(reason="a test")
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while leaving")
    assert trio.current_time() == 3.0


async def test_output_is_taken_in_to_the_last_byte_when_the_block_is_cancelled(tmp_path):
    out = tmp_path / "out"
    shell = "trap 'head -c 300000 /dev/zero; exit' TERM; echo here; while :; do sleep 0.05; done"
    command = {"command": ["sh", "-c", shell], "output": str(out), "ready": {"log": "here"}, "grace": "30s"}
    with trio.fail_after(30), trio.CancelScope() as scope:
        async with open_supervisor({"jobs": {"a": command}}) as tree:
            await tree.wait_running()
            scope.cancel(reason="a test")
            await trio.sleep_forever()
    assert out.read_bytes() == b"here\n" + bytes(300000)


# ---- the phases ----


async def end(f: Forest, **how: Any) -> None:
    """Begin the end and see it through."""
    f.tree.shutdown("a test", **how)
    await f.tree.wait_stopped()


def phases(f: Forest) -> list[tuple[float, str]]:
    return f.happened(PhaseChanged)


async def test_services_stop_in_reverse_order_and_independent_ones_at_the_same_time(autojump_clock, tmp_path):
    jobs = {
        "db": job(slow(1)),
        "api": job(slow(2), after=("db",)),
        "web": job(slow(3), after=("api",)),
        "mail": job(slow(4)),
    }
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(10)
        await end(f)
    assert sorted(f.happened(Stopping)) == [(10.0, "mail"), (10.0, "web"), (13.0, "api"), (15.0, "db")]
    assert f.happened(Ended) == [(13.0, "web"), (14.0, "mail"), (15.0, "api"), (16.0, "db")]
    assert phases(f) == [(10.0, "draining"), (10.0, "stopping")]
    assert f.tree.late == f.tree.survivors == ()


async def test_the_order_of_the_end_holds_across_supervisors(autojump_clock, tmp_path):
    jobs = {"db": job(slow(1)), "cache": job(slow(7)), "api": job(slow(2), after=("db",)), "web": job(slow(3))}
    tree = {"store": group("db", "cache"), "front": group("api", "web")}
    async with forest(tmp_path, jobs, tree) as f:
        await trio.sleep(10)
        await end(f)
    # The edge is one between the supervisors: all of front is gone before anything of store is asked.
    assert f.happened(Ended) == [(12.0, "api"), (13.0, "web"), (13.0, "front"), (14.0, "db"), (20.0, "cache"), (20.0, "store")]


async def test_under_rest_for_one_the_list_is_the_order_of_the_end(autojump_clock, tmp_path):
    jobs = {"a": job(slow(1)), "b": job(slow(2)), "c": job(slow(3))}
    async with forest(tmp_path, jobs, {"g": group("a", "b", "c", strategy=Strategy.REST_FOR_ONE)}) as f:
        await trio.sleep(10)
        await end(f)
    assert f.happened(Ended) == [(13.0, "c"), (15.0, "b"), (16.0, "a"), (16.0, "g")]


async def test_the_broadcast_is_seen_by_all_and_by_a_late_reader_too(autojump_clock, tmp_path):
    seen: list[tuple[float, str, str]] = []

    def watching(name: str, reads_at: float = 0.0) -> Any:
        async def watch(ctx: Context) -> None:
            await trio.sleep(reads_at)
            async with aclosing(ctx.phase.eventual_values()) as values:
                async for phase in values:
                    seen.append((trio.current_time(), name, phase.value))
                    if phase is Phase.STOPPING:
                        break

        return watch

    jobs = {
        "early": job(watching("early")),
        "late": job(watching("late", reads_at=11), after=("early",)),
        "work": job(lasting(12.0), once=True, grace=5),
    }
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(10)
        await end(f)
    assert seen == [
        (0.0, "early", "running"),
        (10.0, "early", "draining"),
        (11.0, "late", "draining"),  # what it sees first is what is so now
        (12.0, "late", "stopping"),
        (12.0, "early", "stopping"),
    ]
    assert phases(f) == [(10.0, "draining"), (12.0, "stopping")]


async def test_draining_lets_the_runs_in_hand_finish(autojump_clock, tmp_path):
    jobs = {
        "once": job(lasting(13), once=True),
        "tick": job(lasting(6), every=9),
        "api": job(serve),
    }
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(10)
        f.tree.shutdown("a test")
        await settle()
        assert f.words() == "once:draining tick:draining api:running"
        await f.tree.wait_stopped()
    assert f.happened(Ended) == [(13.0, "once"), (15.0, "tick"), (15.0, "api")]
    assert phases(f) == [(10.0, "draining"), (15.0, "stopping")]
    assert f.times(Starting, "tick") == [9.0]  # no tick at 18: schedules have stopped
    assert f.tree.late == ()


async def test_draining_asks_the_runs_in_hand_that_can_hear(autojump_clock, tmp_path):
    async def in_steps(ctx: Context) -> None:
        while await ctx.sleep(100):
            pass
        await trio.sleep(2)

    async with forest(tmp_path, {"once": job(in_steps, once=True)}) as f:
        await trio.sleep(10)
        await end(f)
    assert f.happened(Ended) == [(12.0, "once")]


async def test_a_run_in_hand_has_its_grace_and_no_more(autojump_clock, tmp_path):
    jobs = {"once": job(lasting(1000), once=True, grace=4), "api": job(slow(2))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(10)
        await end(f)
    assert f.happened(Killing) == [(14.0, "once")]
    assert f.happened(Ended) == [(14.0, "once"), (16.0, "api")]
    assert phases(f) == [(10.0, "draining"), (14.0, "stopping")]
    assert f.tree.late == ("once",)
    assert f.tree.survivors == ()


async def test_nothing_starts_while_draining(autojump_clock, tmp_path):
    jobs = {
        "work": job(lasting(13), once=True),
        "next": job(serve, after=("work",)),
        "fails": job(crashing_at(9.8)),
        "tick": job(lasting(1), every=11),
        "dies": job(crashing_at(11)),
    }
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(10)
        await end(f)
    assert f.happened(Starting) == [(0.0, "work"), (0.0, "fails"), (0.0, "dies")]
    assert f.words() == "work:stopped next:stopped fails:stopped tick:stopped dies:failed"


async def test_a_service_that_takes_no_context_ends_at_once(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1000))}) as f:
        await trio.sleep(10)
        await end(f)
    assert trio.current_time() == 10.0
    assert f.happened(Killing) == []


async def test_when_the_grace_of_the_daemon_is_over_all_are_killed_and_named(autojump_clock, tmp_path):
    jobs = {"db": job(slow(6), grace=30), "api": job(slow(50), grace=60, after=("db",)), "quick": job(serve)}
    async with forest(tmp_path, jobs, grace=20) as f:
        await trio.sleep(10)
        await end(f)
    assert phases(f) == [(10.0, "draining"), (10.0, "stopping"), (30.0, "killing")]
    assert sorted(f.happened(Ended)) == [(10.0, "quick"), (30.0, "api"), (30.0, "db")]
    assert set(f.tree.late) == {"db", "api"}
    assert f.tree.survivors == ()


async def test_the_grace_of_the_daemon_holds_for_draining_too(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(1000), once=True, grace=50), "b": job(slow(1))}, grace=20) as f:
        await trio.sleep(10)
        await end(f)
    assert phases(f) == [(10.0, "draining"), (30.0, "killing")]
    assert set(f.tree.late) == {"a", "b"}
    assert trio.current_time() == 30.0


async def test_a_second_wish_to_stop_hurries(autojump_clock, tmp_path):
    jobs = {"db": job(slow(6)), "api": job(slow(8), after=("db",))}
    async with forest(tmp_path, jobs, {"g": group("api")}) as f:
        await trio.sleep(10)
        f.tree.shutdown("a test")
        await trio.sleep(1)
        await end(f, kill=True)
    assert phases(f) == [(10.0, "draining"), (10.0, "stopping"), (11.0, "killing")]
    assert trio.current_time() == 11.0
    assert set(f.tree.late) == {"db", "api"}
    assert f.tree.survivors == ()


async def test_a_first_wish_may_be_to_kill(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(slow(6)), "b": job(lasting(100), once=True)}) as f:
        await trio.sleep(10)
        await end(f, kill=True)
    assert trio.current_time() == 10.0
    assert set(f.tree.late) == {"a", "b"}


async def test_the_end_overtakes_a_group_operation_and_a_backoff(autojump_clock, tmp_path):
    jobs = {"a": job(crashing_at(9)), "b": job(slow(5)), "c": job(crashing_at(9))}
    tree = {"g": group("a", "b", strategy=Strategy.ONE_FOR_ALL), "h": group("c", intensity=0, backoff=SIXTY)}
    async with forest(tmp_path, jobs, tree) as f:
        await trio.sleep(10)
        assert f.words() == "g:running a:backing off b:stopping h:backing off c:failed"
        await end(f)
    assert trio.current_time() == 14.0
    assert f.words() == "g:stopped a:stopped b:stopped h:stopped c:failed"


async def test_the_words_say_who_was_asked_by_whom(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve)}) as f:
        await settle()
        await end(f, by="ann")
    assert f.tree.ending == "a test (ann)"
    assert f.tree.status("a")[0].cause == "a test (ann)"


async def test_leaving_the_block_is_an_orderly_stop_too(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(slow(3)), "b": job(lasting(2), once=True)}) as f:
        await settle()
    assert f.tree.ending == "the block that opened it has ended"
    assert phases(f) == [(0.0, "draining"), (2.0, "stopping")]
    assert f.happened(Ended) == [(2.0, "b"), (5.0, "a")]


# ---- the end of its own accord ----


async def test_when_all_significant_children_of_the_root_have_ended_so_does_the_tree(autojump_clock, tmp_path):
    jobs = {
        "a": job(lasting(3), once=True, significant=True),
        "b": job(lasting(5), once=True, significant=True),
        "c": job(slow(1)),
    }
    async with forest(tmp_path, jobs, auto_shutdown=AutoShutdown.ALL_SIGNIFICANT) as f:
        await trio.sleep_forever()
    assert trio.current_time() == 6.0
    assert f.tree.failure is None
    assert f.tree.ending == "all of its significant children ended"


async def test_an_essential_supervisor_that_gives_up_ends_the_tree(autojump_clock, tmp_path):
    jobs = {"a": job(crashing_at(5)), "b": job(slow(2)), "c": job(slow(3))}
    with pytest.raises(EssentialEnded, match=r"^essential g failed: more than 0 restarts within 60 s; a: RuntimeError: boom$"):
        async with forest(tmp_path, jobs, {"g": group("a", "b", intensity=0, essential=True)}) as f:
            await trio.sleep_forever()
    assert f.happened(Ended) == [(5.0, "a"), (7.0, "b"), (7.0, "g"), (10.0, "c")]


async def test_a_command_never_ends_the_tree_though_the_job_is_essential(autojump_clock, tmp_path):
    jobs = {"a": job(serve, essential=True), "b": job(lasting(50), once=True, essential=True)}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        await f.tree.stop("a")
        await f.tree.restart("b")
        await f.tree.cancel("b")
        f.tree.apply(f.config({}))
        await trio.sleep(5)
        assert f.tree.ending == ""


# ---- what will not end ----


async def test_a_thread_that_will_not_end_is_named_and_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.tree.phases.KILL_LIMIT", 0.1)
    go = threading.Event()
    try:
        with trio.fail_after(30):
            async with forest(tmp_path, {"deaf": job(go.wait, grace=0.05), "a": job(serve)}) as f:
                await f.tree.wait_running()
    finally:
        go.set()
    assert f.tree.survivors == ("deaf (thread deaf#1 does not end, and a thread cannot be killed)",)
    assert f.tree.late == ("deaf",)
    assert [event.cause for event in f.events(Stuck)] == ["thread deaf#1 does not end, and a thread cannot be killed"]
    assert [name for _, name in f.happened(Ended)] == ["a", "deaf"]


async def test_a_task_that_ignores_its_cancellation_calls_for_the_last_resort(autojump_clock, tmp_path):
    released = trio.Event()

    async def stubborn() -> None:
        with trio.CancelScope(shield=True):
            await released.wait()

    config = Config(file=None, base=tmp_path, jobs={"a": job(stubborn, grace=1)})
    async with open_supervisor(config, last_resort=released.set) as tree:
        await trio.sleep(10)
    assert tree.survivors == ("a (still there 5 s after it was killed)",)
    assert trio.current_time() == 23.0


# ---- commands in hand ----


def shell(script: str, **keys: Any) -> dict[str, Any]:
    return {"command": ["sh", "-c", script], "once": True, "ready": {"log": "here"}, **keys}


async def drained(tmp_path: Path, spec: dict[str, Any]) -> tuple[str, list[tuple[float, Event]]]:
    """End the tree while this command is in hand: what it wrote, and what has happened since."""
    history: list[tuple[float, Event]] = []
    with trio.fail_after(30):
        async with open_supervisor({"jobs": {"a": {**spec, "output": str(tmp_path / "out")}}}) as tree:
            with tree.journal.subscribe() as events:
                while tree.status("a")[0].state is not State.RUNNING:
                    await anext(events)
            tree.journal.add_sink(lambda event: history.append((trio.current_time(), event)))
    return (tmp_path / "out").read_text(), history


async def test_draining_leaves_a_command_in_hand_alone(tmp_path):
    said, history = await drained(tmp_path, shell("trap 'echo asked' TERM; echo here; sleep 0.2; echo done"))
    assert said == "here\ndone\n"
    kinds = [type(event) for _, event in history]
    assert kinds == [PhaseChanged, Draining, Ended, PhaseChanged]
    assert [event.failed for _, event in history if isinstance(event, Ended)] == [False]


async def test_a_command_in_hand_gets_the_ladder_when_its_grace_for_draining_is_over(tmp_path):
    script = "trap 'echo asked; exit 3' TERM; echo here; while :; do sleep 0.05; done"
    said, history = await drained(tmp_path, shell(script, grace=0.5))
    assert said == "here\nasked\n"
    assert [type(event) for _, event in history] == [PhaseChanged, Draining, PhaseChanged, Stopping, Ended]
    assert history[3][0] - history[0][0] >= 0.5
