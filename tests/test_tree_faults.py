"""Faults: those of a job end that run and nothing else; one of ours ends everything, and leaves nothing running."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
from bench import Bench, Part, exact, settle

from supervisor.config import Config
from supervisor.errors import InternalError, SupervisorError
from supervisor.events import Event, Journal
from supervisor.kinds import Context, JobSpec
from supervisor.spec import Backoff, RestartType, Seconds, Strategy, SupervisorSpec
from supervisor.tree import open_supervisor

AT_ONCE = Backoff(initial=Seconds(0))


def config(base: Path, jobs: dict[str, JobSpec], groups: dict[str, SupervisorSpec] | None = None) -> Config:
    return Config(file=None, base=base, jobs=jobs, supervisors=groups or {})


# An exception of a job ends that run and nothing else


class Unsayable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Odd(BaseException):
    pass


def stray() -> trio.Cancelled:
    """A Cancelled that somebody has kept, and that belongs to nothing any more."""
    kept: list[trio.Cancelled] = []

    async def keep() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as cancelled:
                kept.append(cancelled)

    trio.run(keep)
    return kept[0]


EXCEPTIONS = {
    "Exception": (lambda: ValueError("no"), "ValueError: no"),
    "without words": (lambda: ValueError(), "ValueError"),
    "of many lines": (lambda: ValueError("first\nsecond"), "ValueError: first"),
    "that cannot be said": (Unsayable, "Unsayable: its text cannot be had: ValueError"),
    "no UTF-8": (lambda: ValueError("\udcff"), "ValueError: \\udcff"),
    "SystemExit": (lambda: SystemExit(3), "SystemExit: 3"),
    "GeneratorExit": (GeneratorExit, "GeneratorExit"),
    "BaseException": (lambda: Odd("odd"), "Odd: odd"),
    "StopIteration": (lambda: StopAsyncIteration("end"), "StopAsyncIteration: end"),
    "a group of one": (lambda: ExceptionGroup("one", [ExceptionGroup("two", [KeyError("k")])]), "KeyError: 'k'"),
    "a group": (lambda: BaseExceptionGroup("g", [ValueError("a"), SystemExit(1)]), "BaseExceptionGroup: g (2 sub-exceptions)"),
    "a stray Cancelled": (stray, "Cancelled: "),
    "a group with a stray Cancelled": (
        lambda: BaseExceptionGroup("g", [BaseExceptionGroup("h", [stray()]), ValueError("a")]),
        "BaseExceptionGroup: g (2 sub-exceptions)",
    ),
}


@pytest.mark.parametrize("kind", EXCEPTIONS)
async def test_whatever_a_job_raises_ends_only_its_run(kind, autojump_clock, tmp_path):
    error, reason = EXCEPTIONS[kind]
    raised = await trio.to_thread.run_sync(error) if "Cancelled" in kind else error()
    bench, go = Bench(), trio.Event()

    async def bad() -> None:
        await go.wait()
        raise raised

    jobs = {"bad": JobSpec(call=bad, restart=RestartType.TEMPORARY), "good": bench.job("good")}  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as logs:
        async with open_supervisor(config(tmp_path, jobs), spread=exact) as tree:
            await settle()
            go.set()
            await settle()
            table = tree.journal.table
            assert (table["bad"].word, table["good"].word) == ("failed", "running")
            assert table["bad"].exit is not None
            assert table["bad"].exit.reason.startswith(reason)
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["job raised"]
    assert bench.runs == {"good": 1}


async def test_an_error_that_comes_with_the_cancellation_of_a_kill_ends_only_the_run(autojump_clock, tmp_path):
    bench = Bench()

    async def bad(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("on the way out")

    jobs = {"bad": JobSpec(call=bad, grace=Seconds(1)), "good": bench.job("good")}  # type: ignore[arg-type]
    with structlog.testing.capture_logs():
        async with open_supervisor(config(tmp_path, jobs), spread=exact) as tree:
            await settle()
            await tree.stop("bad")
            table = tree.journal.table
            assert (table["bad"].word, table["good"].word) == ("stopped", "running")
            assert table["bad"].exit is not None
            assert table["bad"].exit.reason == "ValueError: on the way out"


# A fault of ours ends everything


async def scenario(base: Path, bench: Bench, journal: Journal) -> None:
    """A life in which most things happen: nesting, order, a group restart, an escalation, commands, a kill, the end."""
    jobs = {
        "a": bench.job("a", Part(says_ready=True, ready_in=0.25), backoff=AT_ONCE),
        "b": bench.job("b", after=("a",), grace=1),
        "c": bench.job("c", Part(lag=9, stubborn=1), grace=1),
        "d": bench.job("d", Part(hears=False), once=True, grace=1),
        "e": bench.job("e", backoff=Backoff(initial=Seconds(1))),
    }
    groups = {
        "all": SupervisorSpec(strategy=Strategy.ONE_FOR_ALL, children=("a", "b", "c"), backoff=AT_ONCE),
        "top": SupervisorSpec(children=("all", "low"), intensity=2),
        "low": SupervisorSpec(children=("e",), intensity=0, backoff=AT_ONCE),
    }
    async with open_supervisor(config(base, jobs, groups), journal=journal, spread=exact) as tree:
        await trio.sleep(1)
        for name in ("b", "e"):
            bench.fail(name)
            await trio.sleep(3)
        tree.order("restart", ["top"])
        await trio.sleep(5)
        tree.order("stop", ["a"])
        tree.order("restart", ["b"])
        tree.order("start", ["d"])
        await trio.sleep(1)
    assert not bench.alive


async def test_the_scenario_of_the_faults_is_as_rich_as_it_says(autojump_clock, tmp_path):
    told: list[str] = []
    journal = Journal()
    journal.add_sink(lambda event: told.append(type(event).__name__))
    with structlog.testing.capture_logs():
        await scenario(tmp_path, Bench(), journal)
    assert set(told) == {
        "Added", "Waiting", "Starting", "Ready", "Unready", "Stopping", "Killing", "Ended", "Stopped", "GoalSet",
        "GroupRestarting", "IntensityExceeded", "PhaseChanged",
    }  # fmt: skip
    assert 80 < len(told) < 200


@pytest.mark.parametrize(("error", "step"), [(ValueError("no room"), 1), (InternalError("ours"), 9), (MemoryError(), 9)])
async def test_a_sink_that_raises_at_any_event_ends_everything_and_nothing_hangs(error, step, autojump_clock, tmp_path):
    """Once, at the n-th event, for every n."""
    at = 1
    while await life_with_a_fault(tmp_path, at, error):
        at += step
    assert at > 80


async def life_with_a_fault(base: Path, at: int, error: Exception, *, ever_after: bool = False) -> bool:
    """Whether there was such an event. Everything must have ended, and the fault must come out."""
    bench, journal, raised = Bench(), Journal(), False

    def sink(event: Event) -> None:
        nonlocal raised
        if event.seq == at or (ever_after and event.seq > at):
            raised = True
            raise error

    journal.add_sink(sink)
    came_out: BaseException | None = None
    with structlog.testing.capture_logs(), trio.move_on_after(1000) as limit:
        try:
            await scenario(base, bench, journal)
        except BaseException as caught:
            came_out = caught
            if limit.cancel_called:
                raise
    assert not limit.cancelled_caught, f"event {at}: a hang"
    assert not bench.alive, f"event {at}: a job was left running"
    assert raised == (came_out is not None), f"event {at}: {came_out!r}"
    if came_out is not None:
        assert InternalError in kinds_in(came_out), f"event {at}: {came_out!r}"
    return raised


async def test_a_sink_that_goes_on_raising_ends_everything_all_the_same(autojump_clock, tmp_path):
    for at in range(1, 120, 7):
        await life_with_a_fault(tmp_path, at, ValueError("no room"), ever_after=True)


def kinds_in(error: BaseException) -> set[type[BaseException]]:
    if isinstance(error, BaseExceptionGroup):
        return set().union(*map(kinds_in, error.exceptions))
    return {type(error)}


# Nothing grows


async def grown(base: Path, count: int, **keys: Any) -> dict[str, int]:
    """How much more there is of everything after so many restarts."""

    async def crash() -> None:
        await trio.lowlevel.checkpoint()
        raise SupervisorError("again")

    jobs = {"crash": JobSpec(call=crash, **keys), "idle": Bench().job("idle")}  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as logs:
        async with open_supervisor(config(base, jobs), journal=Journal(ring=16), spread=exact) as tree:

            async def measured(restarts: int) -> dict[str, int]:
                while tree.journal.table["crash"].restarts < restarts:
                    await trio.sleep(1)
                    logs.clear()
                await settle()
                gc.collect()
                return {
                    "tasks": trio.lowlevel.current_statistics().tasks_living,
                    "timers": len(tree.root._timers),
                    "deadlines": trio.lowlevel.current_statistics().seconds_to_next_deadline < 10,
                    "objects": len(gc.get_objects()),
                }

            before = await measured(count // 10)
            after = await measured(count)
    return {what: after[what] - before[what] for what in before}


EVERY_TENTH = Backoff(initial=Seconds(0.1), factor=1, max=Seconds(0.1))


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
async def test_restarts_leave_nothing_behind(count, autojump_clock, tmp_path):
    growth = await grown(tmp_path, count, backoff=EVERY_TENTH)
    assert abs(growth.pop("objects")) < 100
    assert growth == {"tasks": 0, "timers": 0, "deadlines": 0}


async def test_commands_leave_no_timers_behind(autojump_clock, tmp_path):
    bench = Bench()
    jobs = {"daily": bench.job("daily", every=Seconds(86400)), "a": bench.job("a", backoff=Backoff(initial=Seconds(30)))}
    with structlog.testing.capture_logs():
        async with open_supervisor(config(tmp_path, jobs), spread=exact) as tree:
            for _ in range(200):
                await tree.pause("daily")
                await tree.resume("daily")
                await tree.restart("daily")
                bench.fail("a")
                await settle()
                await tree.start("a")
            assert len(tree.root._timers) < 100
