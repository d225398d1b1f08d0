"""Every command in every state: it is obeyed at once, and what it came to is right. In virtual time."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.errors import ControlError
from supervisor.events import Ended, Ready, Starting
from supervisor.kinds import Context, JobSpec
from supervisor.policies import LimitSpec, RateSpec, RetrySpec
from supervisor.probes import Ready as ReadySpec
from supervisor.spec import GiveUp, Rate, RestartType, Seconds, Strategy, SupervisorSpec
from tests.forest import SIXTY, Forest, at_once, crash, crashing_at, forest, group, job, lasting, said, serve, settle, slow

VERBS = ("start", "stop", "stop now", "restart", "reload", "run-now", "pause", "resume", "cancel", "signal")

NOTIFY = ReadySpec(notify=True)


def steady(until_ready: float, stops_in: float) -> Callable[[Context], Any]:
    """A service that takes its time to get ready, and to end."""

    async def live(ctx: Context) -> None:
        if await ctx.sleep(until_ready):
            ctx.ready()
            await ctx.wait_stopping()
        await trio.sleep(stops_in)

    return live


def failing_at_first(moment: float) -> Callable[[], Any]:
    """Work whose first run fails at `moment`; the others take 5 s."""
    left = [moment]

    async def work() -> None:
        if left:
            await trio.sleep_until(left.pop())
            raise RuntimeError("boom")
        await trio.sleep(5)

    return work


# The states: what there is, and how to get there by second 100. The job in question is x.

Scene = tuple[dict[str, JobSpec], dict[str, SupervisorSpec], Callable[[Forest], Any]]
SCENES: dict[str, Callable[[], Scene]] = {}


def scene(function: Callable[[], Scene]) -> Callable[[], Scene]:
    SCENES[function.__name__.replace("_", " ")] = function
    return function


async def nothing(f: Forest) -> None:
    pass


def told(*orders: str) -> Callable[[Forest], Any]:
    """Orders as "50 stop x": when, what, whom."""

    async def tell(f: Forest) -> None:
        for order in orders:
            at, verb, name = order.split()
            await trio.sleep_until(float(at))
            f.tree.order(verb, [name])

    return tell


@scene
def service_stopped() -> Scene:
    return {"x": job(slow(5))}, {}, told("1 stop x")


@scene
def service_manual() -> Scene:
    return {"x": job(slow(5), start="manual")}, {}, nothing


@scene
def service_starting() -> Scene:
    return {"x": job(steady(103, 5), ready=NOTIFY, start_timeout=200)}, {}, nothing


@scene
def service_running() -> Scene:
    return {"x": job(slow(5))}, {}, nothing


@scene
def service_stopping() -> Scene:
    return {"x": job(slow(5))}, {}, told("98 stop x")


@scene
def service_restarting() -> Scene:
    return {"x": job(slow(5))}, {}, told("98 restart x")


@scene
def service_out_of_start_timeout() -> Scene:
    return {"x": job(steady(5000, 5), ready=NOTIFY, start_timeout=98, backoff=SIXTY)}, {}, nothing


@scene
def service_backing_off() -> Scene:
    return {"x": job(crashing_at(98), backoff=SIXTY)}, {}, nothing


@scene
def service_waiting_for_after() -> Scene:
    return {"x": job(slow(5), after=("y",)), "y": job(steady(104, 0), ready=NOTIFY, start_timeout=200)}, {}, nothing


@scene
def service_gave_up() -> Scene:
    return {"x": job(crashing_at(98), give_up=GiveUp(failures=1, within=Seconds(10)))}, {}, nothing


@scene
def service_failed_for_good() -> Scene:
    return {"x": job(crashing_at(98), restart=RestartType.TEMPORARY)}, {}, nothing


@scene
def service_in_a_group_that_is_stopping() -> Scene:
    jobs = {"y": job(crashing_at(98)), "x": job(slow(5))}
    return jobs, {"g": group("y", "x", strategy=Strategy.ONE_FOR_ALL, backoff=SIXTY)}, nothing


@scene
def service_in_a_group_before_its_turn_to_stop() -> Scene:
    jobs = {"y": job(crashing_at(98)), "x": job(slow(5)), "z": job(slow(6))}
    return jobs, {"g": group("y", "x", "z", strategy=Strategy.REST_FOR_ONE, backoff=SIXTY)}, nothing


@scene
def service_in_a_group_that_is_backing_off() -> Scene:
    jobs = {"y": job(crashing_at(98)), "x": job(slow(1))}
    return jobs, {"g": group("y", "x", strategy=Strategy.ONE_FOR_ALL, backoff=SIXTY)}, nothing


@scene
def service_under_a_stopped_supervisor() -> Scene:
    return {"x": job(slow(1))}, {"g": group("x")}, told("1 stop g")


@scene
def service_under_a_supervisor_that_is_backing_off() -> Scene:
    jobs = {"x": job(slow(1)), "y": job(crashing_at(97))}
    return jobs, {"g": group("x", "y", intensity=0, backoff=SIXTY)}, nothing


@scene
def service_under_a_supervisor_that_is_being_stopped() -> Scene:
    return {"x": job(slow(5))}, {"g": group("x")}, told("98 stop g")


@scene
def service_under_a_supervisor_that_is_being_restarted() -> Scene:
    return {"x": job(slow(5))}, {"g": group("x")}, told("98 restart g")


@scene
def service_under_a_supervisor_that_gives_up() -> Scene:
    jobs = {"y": job(crashing_at(98)), "x": job(slow(5))}
    return jobs, {"g": group("y", "x", intensity=0, backoff=SIXTY)}, nothing


@scene
def service_under_a_supervisor_that_gives_up_for_good() -> Scene:
    jobs = {"y": job(crashing_at(98)), "x": job(slow(5))}
    return jobs, {"g": group("y", "x", intensity=0, restart=RestartType.TEMPORARY)}, nothing


@scene
def service_two_levels_below_a_supervisor_that_waits() -> Scene:
    jobs = {"x": job(slow(5)), "y": job(steady(104, 0), ready=NOTIFY, start_timeout=200)}
    return jobs, {"p": group("g", after=("y",)), "g": group("x")}, nothing


@scene
def service_while_draining() -> Scene:
    async def end(f: Forest) -> None:
        await trio.sleep_until(98)
        f.tree.shutdown("a test")

    return {"x": job(slow(5)), "y": job(lasting(120), once=True, grace=30)}, {}, end


@scene
def once_stopped_before_its_run() -> Scene:
    return {"x": job(lasting(5), once=True, after=("y",)), "y": job(serve, start="manual")}, {}, told("1 stop x", "2 start y")


@scene
def once_manual() -> Scene:
    return {"x": job(lasting(5), once=True, start="manual")}, {}, nothing


@scene
def once_paused() -> Scene:
    return {"x": job(lasting(5), once=True, start="manual")}, {}, told("1 pause x", "2 start x")


@scene
def once_waiting_for_after() -> Scene:
    return {"x": job(lasting(5), once=True, after=("y",)), "y": job(lasting(104), once=True)}, {}, nothing


@scene
def once_running() -> Scene:
    return {"x": job(lasting(104), once=True)}, {}, nothing


@scene
def once_running_paused() -> Scene:
    return {"x": job(lasting(104), once=True)}, {}, told("1 pause x")


@scene
def once_stopping() -> Scene:
    return {"x": job(lasting(1000), once=True)}, {}, told("95 stop x")


@scene
def once_being_cancelled() -> Scene:
    return {"x": job(lasting(1000), once=True)}, {}, told("95 cancel x")


@scene
def once_completed() -> Scene:
    return {"x": job(lasting(5), once=True)}, {}, nothing


@scene
def once_cancelled() -> Scene:
    return {"x": job(lasting(60), once=True)}, {}, told("50 cancel x")


@scene
def once_failed_for_good() -> Scene:
    return {"x": job(failing_at_first(98), once=True, restart=RestartType.TEMPORARY)}, {}, nothing


@scene
def once_backing_off() -> Scene:
    return {"x": job(failing_at_first(98), once=True, backoff=SIXTY)}, {}, nothing


@scene
def once_while_draining() -> Scene:
    async def end(f: Forest) -> None:
        await trio.sleep_until(98)
        f.tree.shutdown("a test")

    return {"x": job(lasting(105), once=True), "y": job(lasting(120), once=True, grace=30)}, {}, end


@scene
def every_scheduled() -> Scene:
    return {"x": job(lasting(5), every=30)}, {}, nothing


@scene
def every_stopped() -> Scene:
    return {"x": job(lasting(5), every=30)}, {}, told("1 stop x")


@scene
def every_manual() -> Scene:
    return {"x": job(lasting(5), every=30, start="manual")}, {}, nothing


@scene
def every_paused() -> Scene:
    return {"x": job(lasting(5), every=30)}, {}, told("1 pause x")


@scene
def every_running() -> Scene:
    return {"x": job(lasting(15), every=30)}, {}, nothing


@scene
def every_running_as_asked_though_stopped() -> Scene:
    return {"x": job(lasting(15), every=30, start="manual")}, {}, told("90 run-now x")


@scene
def every_stopping() -> Scene:
    return {"x": job(lasting(15), every=30)}, {}, told("98 stop x")


@scene
def every_being_cancelled() -> Scene:
    return {"x": job(lasting(15), every=30)}, {}, told("98 cancel x")


@scene
def every_while_draining() -> Scene:
    async def end(f: Forest) -> None:
        await trio.sleep_until(98)
        f.tree.shutdown("a test")

    return {"x": job(lasting(20), every=30), "y": job(lasting(120), once=True, grace=30)}, {}, end


# Policies: x is a run that is between its attempts, or waits for one, or is past them.

ONE_AT_A_TIME = {"one": LimitSpec(concurrency=1)}
ONCE_MORE = RetrySpec(attempts=2, initial=Seconds(60), jitter=0.0)


@scene
def once_between_attempts() -> Scene:
    return {"x": job(failing_at_first(98), once=True, retry=ONCE_MORE)}, {}, nothing


@scene
def once_waiting_for_its_turn() -> Scene:
    rate = RateSpec(rate=Rate(1 / 104))
    return {"x": job(lasting(5), once=True, rate=rate)}, {}, told("50 run-now x")


@scene
def once_waiting_for_a_place() -> Scene:
    jobs = {"y": job(lasting(104), once=True, bulkhead="one"), "x": job(lasting(5), once=True, bulkhead="one", after=("z",))}
    return jobs | {"z": job(lasting(1), once=True)}, {}, nothing


@scene
def once_in_its_fallback() -> Scene:
    return {"x": job(failing_at_first(98), once=True, fallback=lasting(6))}, {}, nothing


@scene
def once_taking_too_long() -> Scene:
    """Its first attempt has been asked to end at 98, and does so at 103; then it waits for the next."""
    return {"x": job(slow(5), once=True, timeout=98, retry=ONCE_MORE)}, {}, nothing


@scene
def once_taking_too_long_at_last() -> Scene:
    return {"x": job(slow(5), once=True, timeout=98, backoff=SIXTY)}, {}, nothing


@scene
def every_between_attempts() -> Scene:
    return {"x": job(failing_at_first(98), every=90, retry=ONCE_MORE)}, {}, nothing


@scene
def once_between_attempts_while_draining() -> Scene:
    async def end(f: Forest) -> None:
        await trio.sleep_until(99)
        f.tree.shutdown("a test")

    jobs = {"x": job(failing_at_first(98), once=True, retry=ONCE_MORE), "y": job(lasting(120), once=True, grace=30)}
    return jobs, {}, end


# What becomes of x: its word at once; the answer; and where the answer comes later, after how long, and the word then.
# `reload x` is `restart x`. What a service refuses, and `signal`, which needs a process, are the same in every state.

TABLE = """
service stopped
    start     running: yes, running
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   running: yes, running
service manual
    start     running: yes, running
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   running: yes, running
service starting
    start     starting ... 3 s, running: yes, running
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 108 s, running: yes, running
service running
    start     running: yes, already running
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 5 s, running: yes, running
service stopping
    start     stopping ... 3 s, running: yes, running
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 3 s, running: yes, running
service restarting
    start     stopping ... 3 s, running: yes, running
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 3 s, running: yes, running
service out of start timeout
    start     stopping ... 106 s, backing off: no, not ready within 98 s (start_timeout); it never became ready
    stop      stopping ... 3 s, failed: yes, stopped
    stop now  failed: yes, stopped (killed after 2 s)
    restart   stopping ... 106 s, backing off: no, not ready within 98 s (start_timeout); it never became ready
service backing off
    start     running: yes, running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   running: yes, running
service waiting for after
    start     waiting ... 4 s, running: yes, running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   waiting ... 4 s, running: yes, running
service gave up
    start     running: yes, running
    stop      gave up: yes, already stopped
    stop now  gave up: yes, already stopped
    restart   running: yes, running
service failed for good
    start     running: yes, running
    stop      failed: yes, already stopped
    stop now  failed: yes, already stopped
    restart   running: yes, running
service in a group that is stopping
    start     stopping ... 3 s, running: yes, running
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 3 s, running: yes, running
service in a group before its turn to stop
    start     running ... 9 s, running: yes, running
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 5 s, running: yes, running
service in a group that is backing off
    start     running: yes, running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   running: yes, running
service under a stopped supervisor
    start     stopped: no, its supervisor g is stopped; start that first: supervisor start g
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   stopped: no, its supervisor g is stopped; start that first: supervisor start g
service under a supervisor that is backing off
    start     running: yes, running
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   running: yes, running
service under a supervisor that is being stopped
    start     stopping: no, its supervisor g is stopping; start that first: supervisor start g
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping: no, its supervisor g is stopping; start that first: supervisor start g
service under a supervisor that is being restarted
    start     stopping ... 3 s, running: yes, running
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 3 s, running: yes, running
service under a supervisor that gives up
    start     stopping ... 3 s, running: yes, running
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 3 s, running: yes, running
service under a supervisor that gives up for good
    start     stopping ... 3 s, stopped: no, g is failed: more than 0 restarts within 60 s; y: RuntimeError: boom
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 3 s, stopped: no, g is failed: more than 0 restarts within 60 s; y: RuntimeError: boom
service two levels below a supervisor that waits
    start     stopped ... 4 s, running: yes, running
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   stopped ... 4 s, running: yes, running
service while draining
    start     running: no, the daemon is stopping: a test
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   running: no, the daemon is stopping: a test
once stopped before its run
    start     running: yes, running
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   running: yes, running
    run-now   running ... 5 s, completed: yes, completed
    pause     stopped: yes, paused
    resume    stopped: yes, resumed
    cancel    stopped: no, no run in hand
once manual
    start     running: yes, running
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   running: yes, running
    run-now   running ... 5 s, completed: yes, completed
    pause     stopped: yes, paused
    resume    stopped: yes, resumed
    cancel    stopped: no, no run in hand
once paused
    start     paused: no, paused: use resume
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   paused: no, paused: use resume
    run-now   running ... 5 s, completed: yes, completed
    pause     paused: yes, paused
    resume    running: yes, resumed
    cancel    paused: no, no run in hand
once waiting for after
    start     waiting ... 4 s, running: yes, running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   waiting ... 4 s, running: yes, running
    run-now   waiting ... 9 s, completed: yes, completed
    pause     paused: yes, paused
    resume    waiting: yes, resumed
    cancel    waiting: no, no run in hand
once running
    start     running: yes, already running
    stop      stopping ... 4 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 4 s, running: yes, running
    run-now   running: no, x#1 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#1 goes on
    resume    running: yes, resumed
    cancel    stopping ... 4 s, stopped: yes, x#1: cancelled
once running paused
    start     running: yes, already running
    stop      stopping ... 4 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 4 s, paused: no, paused: use resume
    run-now   running: no, x#1 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#1 goes on
    resume    running: yes, resumed
    cancel    stopping ... 4 s, stopped: yes, x#1: cancelled
once stopping
    start     stopping ... 5 s, running: yes, running
    stop      stopping ... 5 s, stopped: yes, stopped (killed after 10 s)
    stop now  stopped: yes, stopped (killed after 5 s)
    restart   stopping ... 5 s, running: yes, running
    run-now   stopping: no, x#1 is in hand, and overlap is "skip"
    pause     stopping: yes, paused
    resume    stopping: yes, resumed
    cancel    stopping ... 5 s, stopped: yes, x#1: cancelled (killed after 10 s)
once being cancelled
    start     stopping ... 5 s, running: yes, running
    stop      stopping ... 5 s, stopped: yes, stopped (killed after 10 s)
    stop now  stopped: yes, stopped (killed after 5 s)
    restart   stopping ... 5 s, running: yes, running
    run-now   stopping: no, x#1 is in hand, and overlap is "skip"
    pause     stopping: yes, paused
    resume    stopping: yes, resumed
    cancel    stopping ... 5 s, stopped: yes, x#1: cancelled (killed after 10 s)
once completed
    start     running: yes, running
    stop      completed: yes, already stopped
    stop now  completed: yes, already stopped
    restart   running: yes, running
    run-now   running ... 5 s, completed: yes, completed
    pause     completed: yes, paused
    resume    completed: yes, resumed
    cancel    completed: no, no run in hand
once cancelled
    start     running: yes, running
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   running: yes, running
    run-now   running ... 60 s, completed: yes, completed
    pause     stopped: yes, paused
    resume    stopped: yes, resumed
    cancel    stopped: no, no run in hand
once failed for good
    start     running: yes, running
    stop      failed: yes, already stopped
    stop now  failed: yes, already stopped
    restart   running: yes, running
    run-now   running ... 5 s, completed: yes, completed
    pause     failed: yes, paused
    resume    failed: yes, resumed
    cancel    failed: no, no run in hand
once backing off
    start     running: yes, running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   running: yes, running
    run-now   running ... 5 s, completed: yes, completed
    pause     paused: yes, paused
    resume    backing off: yes, resumed
    cancel    backing off: no, no run in hand
once while draining
    start     draining: no, the daemon is stopping: a test
    stop      draining ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   draining: no, the daemon is stopping: a test
    run-now   draining: no, the daemon is stopping: a test
    pause     draining: yes, paused
    resume    draining: yes, resumed
    cancel    draining ... 5 s, stopped: yes, x#1: completed
every scheduled
    start     scheduled: yes, its schedule runs
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   scheduled: yes, its schedule begins anew
    run-now   running ... 5 s, scheduled: yes, completed
    pause     paused: yes, paused
    resume    scheduled: yes, resumed
    cancel    scheduled: no, no run in hand
every stopped
    start     scheduled: yes, its schedule runs
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   scheduled: yes, its schedule begins anew
    run-now   running ... 5 s, completed: yes, completed
    pause     stopped: yes, paused
    resume    stopped: yes, resumed
    cancel    stopped: no, no run in hand
every manual
    start     scheduled: yes, its schedule runs
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   scheduled: yes, its schedule begins anew
    run-now   running ... 5 s, completed: yes, completed
    pause     stopped: yes, paused
    resume    stopped: yes, resumed
    cancel    stopped: no, no run in hand
every paused
    start     paused: yes, its schedule is paused: use resume
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped
    restart   paused: yes, its schedule is paused: use resume
    run-now   running ... 5 s, paused: yes, completed
    pause     paused: yes, paused
    resume    scheduled: yes, resumed
    cancel    paused: no, no run in hand
every running
    start     running: yes, its schedule runs
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 5 s, scheduled: yes, its schedule begins anew
    run-now   running: no, x#3 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#3 goes on
    resume    running: yes, resumed
    cancel    stopping ... 5 s, scheduled: yes, x#3: cancelled
every running as asked though stopped
    start     running: yes, its schedule runs
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 5 s, scheduled: yes, its schedule begins anew
    run-now   running: no, x#1 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#1 goes on
    resume    running: yes, resumed
    cancel    stopping ... 5 s, stopped: yes, x#1: cancelled
every stopping
    start     stopping: yes, its schedule runs
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 5 s, scheduled: yes, its schedule begins anew
    run-now   stopping: no, x#3 is in hand, and overlap is "skip"
    pause     stopping: yes, paused
    resume    stopping: yes, resumed
    cancel    stopping ... 5 s, stopped: yes, x#3: completed
every being cancelled
    start     stopping: yes, its schedule runs
    stop      stopping ... 5 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   stopping ... 5 s, scheduled: yes, its schedule begins anew
    run-now   stopping: no, x#3 is in hand, and overlap is "skip"
    pause     stopping: yes, paused
    resume    stopping: yes, resumed
    cancel    stopping ... 5 s, scheduled: yes, x#3: cancelled
every while draining
    start     draining: no, the daemon is stopping: a test
    stop      draining ... 8 s, stopped: yes, stopped (killed after 10 s)
    stop now  stopped: yes, stopped (killed after 2 s)
    restart   draining: no, the daemon is stopping: a test
    run-now   draining: no, the daemon is stopping: a test
    pause     draining: yes, paused
    resume    draining: yes, resumed
    cancel    draining ... 8 s, stopped: yes, x#3: cancelled (killed after 10 s)
once between attempts
    start     running: yes, already running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   running: yes, running
    run-now   running: no, x#1 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#1 goes on
    resume    running: yes, resumed
    cancel    stopped: yes, x#1: cancelled
once waiting for its turn
    start     starting ... 4 s, running: yes, running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   starting ... 4 s, running: yes, running
    run-now   starting: no, x#2 is in hand, and overlap is "skip"
    pause     starting: yes, paused; x#2 goes on
    resume    starting: yes, resumed
    cancel    stopped: yes, x#2: cancelled
once waiting for a place
    start     starting ... 4 s, running: yes, running
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   starting ... 4 s, running: yes, running
    run-now   starting: no, x#1 is in hand, and overlap is "skip"
    pause     starting: yes, paused; x#1 goes on
    resume    starting: yes, resumed
    cancel    stopped: yes, x#1: cancelled
once in its fallback
    start     running: yes, already running
    stop      stopping ... 4 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 4 s, running: yes, running
    run-now   running: no, x#1 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#1 goes on
    resume    running: yes, resumed
    cancel    stopping ... 4 s, stopped: yes, x#1: cancelled
once taking too long
    start     running: yes, already running
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 3 s, running: yes, running
    run-now   running: no, x#1 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#1 goes on
    resume    running: yes, resumed
    cancel    stopping ... 3 s, stopped: yes, x#1: cancelled
once taking too long at last
    start     stopping ... 3 s, running: yes, running
    stop      stopping ... 3 s, stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   stopping ... 3 s, running: yes, running
    run-now   stopping: no, x#1 is in hand, and overlap is "skip"
    pause     stopping: yes, paused; x#1 goes on
    resume    stopping: yes, resumed
    cancel    stopping ... 3 s, stopped: yes, x#1: cancelled
every between attempts
    start     running: yes, its schedule runs
    stop      stopped: yes, stopped
    stop now  stopped: yes, stopped (killed at once)
    restart   scheduled: yes, its schedule begins anew
    run-now   running: no, x#1 is in hand, and overlap is "skip"
    pause     running: yes, paused; x#1 goes on
    resume    running: yes, resumed
    cancel    scheduled: yes, x#1: cancelled
once between attempts while draining
    start     stopped: no, the daemon is stopping: a test
    stop      stopped: yes, already stopped
    stop now  stopped: yes, already stopped
    restart   stopped: no, the daemon is stopping: a test
    run-now   stopped: no, the daemon is stopping: a test
    pause     stopped: yes, paused
    resume    stopped: yes, resumed
    cancel    stopped: no, no run in hand
"""

REFUSED_BY_SERVICES = {"run-now": "start", "pause": "stop", "resume": "start", "cancel": "stop or restart"}


def cells() -> Iterator[tuple[str, str, str]]:
    for line in TABLE.strip().splitlines():
        if not line.startswith(" "):
            state = line
            continue
        verb, expected = line[4:13].strip(), line[14:]
        yield state, verb, expected
        if verb == "restart":
            yield state, "reload", expected


CELLS = list(cells())


@pytest.mark.parametrize(("state", "verb", "expected"), CELLS)
async def test_every_command_in_every_state(autojump_clock, tmp_path, state, verb, expected):
    assert await outcome(verb, state, tmp_path) == expected


def test_the_table_knows_every_state_and_every_command():
    assert {state for state, _, _ in CELLS} == set(SCENES)
    for state in SCENES:
        verbs = {verb for where, verb, _ in CELLS if where == state}
        assert verbs == set(VERBS) - {"signal"} - (set(REFUSED_BY_SERVICES) if state.startswith("service") else set())


@pytest.mark.parametrize("state", [state for state in SCENES if state.startswith("service")])
async def test_a_service_refuses_what_makes_no_sense_for_it_in_every_state(autojump_clock, tmp_path, state):
    async with forest_in(state, tmp_path) as f:
        before = f.word("x")
        for verb, instead in REFUSED_BY_SERVICES.items():
            assert await at_once(f, verb, "x") == f"no, x is a service: use {instead}"
        assert f.word("x") == before


@pytest.mark.parametrize("state", SCENES)
async def test_what_has_no_process_cannot_be_signalled_in_any_state(autojump_clock, tmp_path, state):
    async with forest_in(state, tmp_path) as f:
        before = f.word("x")
        assert await at_once(f, "signal", "x", signal=1) == "no, x has no process to signal"
        assert f.word("x") == before


@asynccontextmanager
async def forest_in(state: str, base: Path) -> AsyncIterator[Forest]:
    """A tree whose x is in this state at second 100. Whatever is asked for in the block, its end is not waited for."""
    jobs, supervisors, reach = SCENES[state]()
    async with forest(base, jobs, supervisors, ONE_AT_A_TIME) as f:
        await reach(f)
        await trio.sleep_until(100)
        await settle()
        yield f


async def outcome(verb: str, state: str, base: Path) -> str:
    """What a command at second 100 comes to, as in the table."""
    async with forest_in(state, base) as f:
        (order,) = f.tree.order(verb.removesuffix(" now"), ["x"], by="ann", **({"now": True} if verb == "stop now" else {}))
        await settle()
        word = f.word("x")
        with trio.fail_after(1000):
            answer = await order.wait()
        later = trio.current_time() - 100
        await settle()
        then = f" ... {later:g} s, {f.word('x')}" if later else ""
        return f"{word}{then}: {said(answer)}"


# ---- nobody waits for another ----


async def test_a_slow_stop_delays_neither_a_restart_nor_the_restart_of_what_crashes_meanwhile(autojump_clock, tmp_path):
    jobs = {"slow": job(slow(10), grace=30), "other": job(serve), "third": job(crashing_at(7))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        (stop,) = f.tree.order("stop", ["slow"])
        await settle()
        await f.tree.restart("other")
        assert trio.current_time() == 5.0
        assert f.times(Ready, "other") == [0.0, 5.0]
        await stop.wait()
        assert trio.current_time() == 15.0
        assert f.times(Starting, "third") == [0.0, 7.5]


async def test_a_slow_start_delays_nobody(autojump_clock, tmp_path):
    jobs = {"slow": job(steady(50, 0), ready=NOTIFY), "other": job(serve), "third": job(crashing_at(7))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(5)
        await f.tree.restart("other")
        assert trio.current_time() == 5.0
        await trio.sleep(10)
        assert f.words() == "slow:starting other:running third:running"
        assert f.times(Starting, "third") == [0.0, 7.5]


async def test_one_order_for_many_acts_on_all_at_once(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(slow(3)), "b": job(slow(4)), "c": job(slow(5))}) as f:
        await trio.sleep(5)
        await f.tree.stop("*")
        assert f.happened(Ended) == [(8.0, "a"), (9.0, "b"), (10.0, "c")]


async def test_a_group_waits_for_its_slowest_and_the_rest_of_the_tree_does_not(autojump_clock, tmp_path):
    jobs = {"a": job(slow(8)), "b": job(crashing_at(5)), "c": job(crashing_at(6)), "d": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("a", "b", strategy=Strategy.ONE_FOR_ALL)}) as f:
        await trio.sleep_until(7)
        await f.tree.restart("d")
        assert trio.current_time() == 7.0
        await trio.sleep(10)
        assert f.times(Starting, "c") == [0.0, 6.5]
        assert f.times(Starting, "a") == f.times(Starting, "b") == [0.0, 13.5]


# ---- who is told what ----


async def answers(f: Forest, *commands: tuple[str, str], by: str = "ann") -> list[str]:
    """Give these commands one after another without time passing, and hear what each comes to."""
    orders = []
    for verb, name in commands:
        orders += f.tree.order(verb, [name], by=f"{by}/{len(orders) + 1}")
        await settle()
    return [said(await order.wait()) for order in orders]


OVERTAKEN = [
    (["stop", "start"], ["no, overtaken by start (ann/2)", "yes, running"]),
    (["stop", "restart"], ["no, overtaken by restart (ann/2)", "yes, running"]),
    (["restart", "stop"], ["no, overtaken by stop (ann/2)", "yes, stopped"]),
    (["restart", "start"], ["no, overtaken by start (ann/2)", "yes, running"]),
    (["restart", "restart"], ["no, overtaken by restart (ann/2)", "yes, running"]),
    (["stop", "start", "stop"], ["no, overtaken by start (ann/2)", "no, overtaken by stop (ann/3)", "yes, stopped"]),
    (["stop", "stop"], ["yes, stopped", "yes, stopped"]),
    (["stop", "start", "start"], ["no, overtaken by start (ann/2)", "yes, running", "yes, running"]),
]


@pytest.mark.parametrize(("verbs", "expected"), OVERTAKEN, ids=[" ".join(verbs) for verbs, _ in OVERTAKEN])
async def test_whose_command_is_overtaken_is_told_by_whom(autojump_clock, tmp_path, verbs, expected):
    async with forest(tmp_path, {"a": job(slow(3))}) as f:
        await trio.sleep(5)
        assert await answers(f, *((verb, "a") for verb in verbs)) == expected
        assert f.happened(Ended) == [(8.0, "a")]  # one stop, however often it was asked for


async def test_a_stop_of_the_whole_daemon_overtakes_a_start(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(serve, after=("b",)), "b": job(serve, start="manual")}, {"g": group("a")}) as f:
        (order,) = f.tree.order("start", ["a"])
        await settle()
        f.tree.shutdown("a test", by="ann")
        assert said(await order.wait()) == "no, overtaken: a test (ann)"


async def test_a_stop_of_a_supervisor_answers_who_waits_for_its_children(autojump_clock, tmp_path):
    jobs = {"a": job(serve, after=("b",)), "b": job(serve, start="manual")}
    async with forest(tmp_path, jobs, {"g": group("a")}) as f:
        assert await answers(f, ("start", "a"), ("stop", "g")) == ["no, overtaken: stopped by ann/2", "yes, stopped"]


async def test_a_stop_of_a_supervisor_that_waits_answers_who_waits_below_it(autojump_clock, tmp_path):
    jobs = {"a": job(serve), "b": job(serve, start="manual")}
    async with forest(tmp_path, jobs, {"p": group("g", after=("b",)), "g": group("a")}) as f:
        assert await answers(f, ("start", "a"), ("stop", "p")) == ["no, p is stopped: stopped by ann/2", "yes, stopped"]


async def test_the_end_answers_who_waits_below_a_supervisor_that_waits(autojump_clock, tmp_path):
    jobs = {"a": job(serve), "b": job(serve, start="manual"), "c": job(lasting(9), once=True)}
    async with forest(tmp_path, jobs, {"p": group("g", after=("b",)), "g": group("a")}) as f:
        (order,) = f.tree.order("start", ["a"])
        await settle()
        f.tree.shutdown("a test")
        assert said(await order.wait()) == "no, overtaken: a test"
        assert trio.current_time() == 0.0  # not only when the runs in hand have ended


async def test_a_start_that_fails_before_it_is_ready_says_so(autojump_clock, tmp_path):
    dies = job(failing_at_first(3), ready=NOTIFY, start="manual")
    late = job(steady(50, 2), ready=NOTIFY, start_timeout=Seconds(4), start="manual")
    async with forest(tmp_path, {"dies": dies, "late": late}) as f:
        with pytest.raises(ControlError, match=r"^dies: RuntimeError: boom; it never became ready$"):
            await f.tree.start("dies")
        assert trio.current_time() == 3.0
        with pytest.raises(ControlError, match=r"^late: not ready within 4 s \(start_timeout\); it never became ready$"):
            await f.tree.start("late")
        assert trio.current_time() == 9.0
        assert f.word("late") == "backing off"


async def test_a_run_that_was_ready_and_then_fails_did_start(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(crash, start="manual", backoff=SIXTY)}) as f:
        await f.tree.start("a")
        await settle()
        assert f.word("a") == "backing off"


async def test_a_start_of_several_names_each_that_did_not_get_ready(autojump_clock, tmp_path):
    jobs = {name: job(failing_at_first(at), ready=NOTIFY, start="manual") for name, at in (("a", 1), ("b", 2))}
    async with forest(tmp_path, jobs | {"c": job(serve, start="manual")}) as f:
        with pytest.raises(ControlError) as caught:
            await f.tree.start("*")
        assert str(caught.value).splitlines() == [
            "a: RuntimeError: boom; it never became ready; b: RuntimeError: boom; it never became ready"
        ]


async def test_a_wait_that_is_cancelled_undoes_nothing(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(slow(5))}) as f:
        await trio.sleep(1)
        with trio.move_on_after(2):
            await f.tree.restart("a")
        assert f.word("a") == "stopping"
        await trio.sleep(10)
        assert f.times(Starting, "a") == [0.0, 6.0]


async def test_an_unknown_name_is_refused_before_anything_is_done(autojump_clock, tmp_path):
    async with forest(tmp_path, {"api": job(serve), "db": job(serve)}) as f:
        await settle()
        with pytest.raises(ControlError, match=r"did you mean 'api'\?") as caught:
            f.tree.order("stop", ["db", "apy"])
        assert caught.value.code == ControlError.NO_SUCH_NAME
        await settle()
        assert f.words() == "api:running db:running"


async def test_a_run_is_cancelled_by_its_id_and_no_other(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(5), every=10, grace=1)}) as f:
        await trio.sleep(22)
        assert await at_once(f, "cancel", "a#1") == "no, a#1 is not in hand"
        (order,) = f.tree.order("cancel", ["a#2"])
        assert said(await order.wait()) == "yes, a#2: cancelled (killed after 1 s)"
        assert trio.current_time() == 23.0
        await trio.sleep(20)
        assert f.times(Starting, "a") == [10.0, 20.0, 30.0, 40.0]


# ---- supervisors are commanded like jobs ----


async def test_a_supervisor_stops_in_reverse_order_and_starts_in_order(autojump_clock, tmp_path):
    jobs = {"db": job(slow(2)), "api": job(slow(3), after=("db",))}
    async with forest(tmp_path, jobs, {"g": group("db", "api")}) as f:
        await trio.sleep(5)
        await f.tree.restart("g")
        assert f.happened(Ended) == [(8.0, "api"), (10.0, "db"), (10.0, "g")]
        assert [name for at, name in f.happened(Starting) if at == 10.0] == ["g", "db", "api"]
        assert await at_once(f, "run-now", "g") == "no, g is a supervisor"


async def test_children_stopped_by_their_operator_stay_down_when_their_supervisor_restarts(autojump_clock, tmp_path):
    jobs = {"a": job(serve), "b": job(serve), "m": job(serve, start="manual")}
    async with forest(tmp_path, jobs, {"g": group("a", "b", "m")}) as f:
        await f.tree.stop("b")
        await f.tree.restart("g")
        assert f.words() == "g:running a:running b:stopped m:stopped"
        await f.tree.stop("g")
        assert await at_once(f, "stop", "a") == "yes, already stopped"
        await f.tree.start("g")
        assert f.words() == "g:running a:stopped b:stopped m:stopped"


async def test_stop_now_of_a_supervisor_leaves_nobody_a_grace(autojump_clock, tmp_path):
    jobs = {"a": job(slow(5)), "b": job(slow(6), after=("a",))}
    async with forest(tmp_path, jobs, {"p": group("g"), "g": group("a", "b")}) as f:
        await trio.sleep(5)
        (order,) = f.tree.order("stop", ["p"])
        await trio.sleep(1)
        await f.tree.stop("p", now=True)
        assert trio.current_time() == 6.0
        assert said(await order.wait()) == "yes, stopped"
        await f.tree.start("p")  # and the next stop is a calm one again
        await f.tree.stop("p")
        assert trio.current_time() == 17.0


async def test_start_or_restart_of_a_member_ends_the_backoff_of_its_group(autojump_clock, tmp_path):
    jobs = {"a": job(crashing_at(5)), "b": job(slow(1)), "c": job(slow(1))}
    async with forest(tmp_path, jobs, {"g": group("a", "b", "c", strategy=Strategy.ONE_FOR_ALL, backoff=SIXTY)}) as f:
        await f.tree.stop("c")
        await trio.sleep_until(10)
        await f.tree.restart("b")
        assert trio.current_time() == 10.0
        assert f.words() == "g:running a:running b:running c:stopped"
        assert f.times(Starting, "a") == [0.0, 10.0]


async def test_restart_of_a_member_does_not_restart_its_group(autojump_clock, tmp_path):
    jobs = {"a": job(slow(1)), "b": job(slow(1))}
    async with forest(tmp_path, jobs, {"g": group("a", "b", strategy=Strategy.ONE_FOR_ALL)}) as f:
        await settle()
        await f.tree.restart("a")
        assert f.happened(Ended) == [(1.0, "a")]


# ---- a thread cannot be killed ----


class Deaf:
    """A function for a thread that goes on until it is let go."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.go = threading.Event()

    def __call__(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.go.wait()
        self.running -= 1

    def let_go(self) -> None:
        self.go.set()


@pytest.fixture
def deaf():
    """However a test ends, its thread does too."""
    deaf = Deaf()
    yield deaf
    deaf.let_go()


async def until(f: Forest, name: str, word: str) -> None:
    with trio.fail_after(30), f.tree.journal.subscribe() as events:
        if f.word(name) != word:
            async for _ in events:
                if f.word(name) == word:
                    return


async def test_a_thread_that_does_not_end_is_stuck_and_has_no_second_instance(tmp_path, deaf):
    async with forest(tmp_path, {"a": job(deaf, grace=0.05), "b": job(serve)}) as f:
        await until(f, "a", "running")
        (stop,) = f.tree.order("stop", ["a"])
        await until(f, "a", "stuck")
        assert f.tree.status("a")[0].cause == "thread a#1 does not end, and a thread cannot be killed"
        (start,) = f.tree.order("start", ["a"], by="ann")
        assert said(await stop.wait()) == "no, overtaken by start (ann)"
        (restart,) = f.tree.order("restart", ["a"])
        await f.tree.restart("b")
        assert f.word("a") == "stuck"
        assert (await at_once_really(f, "stop", "b")) == "yes, stopped"
        deaf.let_go()
        with trio.fail_after(30):
            assert said(await start.wait()) == "no, overtaken by restart"
            assert said(await restart.wait()) == "yes, running"
        assert f.tree.status("a")[0].run == "a#2"
        assert deaf.most == 1


@pytest.mark.parametrize("verb", ["stop", "stop now"])
async def test_a_stop_of_what_is_stuck_is_answered_when_it_is_gone(tmp_path, deaf, verb):
    async with forest(tmp_path, {"a": job(deaf, grace=0.05)}) as f:
        await until(f, "a", "running")
        f.tree.order("stop", ["a"])
        await until(f, "a", "stuck")
        (order,) = f.tree.order("stop", ["a"], now=verb == "stop now")
        assert f.word("a") == "stuck"
        deaf.let_go()
        with trio.fail_after(30):
            assert (await order.wait()).ok
        assert f.word("a") == "stopped"


async def at_once_really(f: Forest, verb: str, name: str, **options: Any) -> str:
    (order,) = f.tree.order(verb, [name], **options)
    with trio.fail_after(30):
        return said(await order.wait())


# ---- a signal needs a process ----


async def test_a_signal_goes_to_the_process_and_says_to_which(tmp_path):
    shell = "trap 'echo got it; exit 7' USR1; echo here; while :; do sleep 0.05; done"
    spec = JobSpec(command=("sh", "-c", shell), output=str(tmp_path / "out"), ready=ReadySpec(log="here"), backoff=SIXTY)
    async with forest(tmp_path, {"a": spec}) as f:
        with trio.fail_after(30):
            await f.tree.wait_running()
            pid = f.tree.status("a")[0].pid
            assert await at_once_really(f, "signal", "a", signal=0) == f"yes, signalled, pid {pid}"
            assert await at_once_really(f, "signal", "a", signal=signal.SIGUSR1) == f"yes, signalled, pid {pid}"
            await until(f, "a", "backing off")
        assert f.tree.status("a")[0].exit.code == 7  # an operator's signal is not a stop: the end counts
        assert (tmp_path / "out").read_text() == "here\ngot it\n"
        assert await at_once_really(f, "signal", "a", signal=signal.SIGUSR1) == "no, a has no process to signal"
