"""`[daemon] threads` and `processes`: how many runs may be in threads at the same time, and who waits for one."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from supervisor import config
from supervisor.config import preflight
from supervisor.errors import SpecError
from supervisor.events import Starting, Waiting
from supervisor.kinds import Context, JobSpec
from supervisor.nodes.node import Hold
from supervisor.nodes.room import Rooms
from supervisor.spec import Strategy
from tests.forest import Forest, forest, group, job, serve

FULL = "waits for a thread: {0} of {0} in use ([daemon] threads)"


class Doors:
    """Functions that stay in their thread until the test lets them go, by name."""

    def __init__(self) -> None:
        self._doors: dict[str, threading.Event] = {}
        self.inside = self.most = 0
        self._lock = threading.Lock()

    def function(self, name: str) -> Any:
        self._doors[name] = threading.Event()

        def stay(ctx: Context) -> None:
            with self._lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            while not self._doors[name].wait(0.005) and not ctx.stopping:
                pass
            with self._lock:
                self.inside -= 1

        return stay

    def open(self, name: str) -> None:
        self._doors[name].set()


@pytest.fixture
def doors():
    doors = Doors()
    yield doors
    for door in doors._doors.values():
        door.set()


def waiting(f: Forest) -> list[str]:
    return [name for name, row in f.tree.journal.table.items() if row.word == "waiting"]


async def until(f: Forest, words: str, *names: str) -> None:
    """Wait until they are as said."""
    with f.tree.journal.subscribe() as events:
        while f.words(*names) != words:
            await anext(events)


async def test_who_finds_no_thread_waits_and_says_so_and_starts_as_soon_as_one_is_free(tmp_path, doors):
    jobs = {name: job(doors.function(name), once=True) for name in "abcde"}
    async with forest(tmp_path, jobs, threads=2) as f:
        await until(f, "a:running b:running c:waiting d:waiting e:waiting")
        assert {f.tree.status(name)[0].cause for name in "cde"} == {FULL.format(2)}
        doors.open("b")
        await until(f, "a:running b:completed c:running d:waiting e:waiting")
        for name in "acde":
            doors.open(name)
        await f.tree.wait_running()
        assert [event.name for event in f.events(Starting)] == ["a", "b", "c", "d", "e"]  # first come, first served
        assert [event.name for event in f.events(Waiting)] == ["c", "d", "e"]  # said once
        assert doors.most <= 2


async def test_only_threads_are_counted(tmp_path, doors):
    jobs = {name: job(doors.function(name)) for name in "ab"}
    jobs |= {"task": job(serve), "command": JobSpec(command=("sleep", "1000"), output="null")}
    jobs["hosted"] = job(partial(serve), kind="asyncio")
    async with forest(tmp_path, jobs, threads=1, processes=1) as f:
        await until(f, "a:running b:waiting task:running command:running hosted:waiting")


async def test_processes_are_counted_by_themselves(tmp_path, doors):
    (tmp_path / "napping.py").write_text("def nap(ctx: 'Context'):\n    ctx.wait_stopping()\n")
    spec = JobSpec(call="napping:nap", kind="process", output="null")
    async with forest(tmp_path, {"a": spec, "b": spec, "t": job(doors.function("t"))}, processes=1) as f:
        await until(f, "a:running b:waiting t:running")
        assert f.tree.status("b")[0].cause == "waits for a process: 1 of 1 in use ([daemon] processes)"
        await f.tree.stop("a")
        await until(f, "a:stopped b:running t:running")


async def test_without_a_limit_nobody_waits(tmp_path, doors):
    jobs = {f"job-{at}": job(doors.function(f"job-{at}")) for at in range(50)}
    async with forest(tmp_path, jobs) as f:
        await f.tree.wait_running()
        assert f.events(Waiting) == []


async def test_a_command_wins_at_once_while_it_waits_and_the_next_moves_up(tmp_path, doors):
    jobs = {name: job(doors.function(name)) for name in "abc"}
    async with forest(tmp_path, jobs, threads=1) as f:
        await until(f, "a:running b:waiting c:waiting")
        (order,) = f.tree.order("stop", ["b"])
        assert (await order.wait()).text == "stopped"
        await f.tree.stop("a")
        await until(f, "a:stopped b:stopped c:running")
        f.tree.order("start", ["a"])
        f.tree.order("start", ["b"])
        await f.tree.stop("c")
        await until(f, "a:running b:waiting c:stopped")


async def test_a_restart_goes_to_the_end_of_the_line(tmp_path, doors):
    jobs = {name: job(doors.function(name)) for name in "ab"}
    async with forest(tmp_path, jobs, threads=1) as f:
        await until(f, "a:running b:waiting")
        f.tree.order("restart", ["a"])
        await until(f, "a:waiting b:running")


async def test_workers_each_need_one(tmp_path, doors):
    async with forest(tmp_path, {"a": job(doors.function("a"), workers=3)}, threads=2) as f:
        await until(f, "a:starting a:0:running a:1:running a:2:waiting")
        await f.tree.scale("a", 2)
        await until(f, "a:running a:0:running a:1:running")


async def test_who_is_removed_or_moves_or_changes_its_kind_leaves_the_line(tmp_path, doors):
    jobs = {name: job(doors.function(name)) for name in "abcde"}
    async with forest(tmp_path, jobs, threads=1) as f:
        await until(f, "a:running b:waiting c:waiting d:waiting e:waiting")
        jobs = {**jobs, "c": job(serve)}
        del jobs["b"]
        f.tree.apply(f.config(jobs, {"g": group("d")}))
        await wait_all_tasks_blocked(0.01)
        assert f.words("a", "c", "d", "e") == "a:running c:running d:waiting e:waiting"
        await f.tree.stop("a")
        await until(f, "a:stopped d:waiting e:running", "a", "d", "e")  # d has come anew


async def test_a_group_that_shares_one_thread_restarts(tmp_path, doors):
    jobs = {"a": job(doors.function("a")), "b": job(doors.function("b"))}
    async with forest(tmp_path, jobs, {"g": group("a", "b", strategy=Strategy.ONE_FOR_ALL)}, threads=2) as f:
        await f.tree.wait_running()
        await f.tree.restart("g")
        assert f.words() == "g:running a:running b:running"


async def test_the_tree_ends_although_somebody_waits(tmp_path, doors):
    jobs = {name: job(doors.function(name)) for name in "abc"}
    async with forest(tmp_path, jobs, threads=1) as f:
        await until(f, "a:running b:waiting c:waiting")
    assert f.words() == "a:stopped b:stopped c:stopped"


async def test_two_hundred_runs_through_three_threads(tmp_path, doors):
    jobs = {f"job-{at}": job(doors.function(f"job-{at}"), once=True) for at in range(200)}
    for name in jobs:
        doors.open(name)
    async with forest(tmp_path, jobs, threads=3) as f:
        await f.tree.wait_running()
    assert doors.most <= 3


# -- the line, by itself ------------------------------------------------------------------------------------------------


class Standing:
    """Who stands in line: what a room knows of a child."""

    def __init__(self, parent: Any) -> None:
        self.takes = "thread"
        self.parent = parent


class Called:
    """Notes who is called: the supervisor's side."""

    def __init__(self) -> None:
        self.touched: set[Any] = set()

    def post(self, method: Any, child: Any) -> None:
        self.touched.add(child)

    touch = None


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(["come", "stay away", "end", "be called"]), st.integers(0, 5)), max_size=60),
)
def test_the_limit_holds_and_whoever_may_go_is_called(limit, steps):
    """Children come, give up and end in any order, and heed a call late. Never too many; nobody is forgotten, or passed."""
    rooms, called = Rooms({"thread": limit, "process": None}), Called()
    children: list[Any] = [Standing(called) for _ in range(6)]
    inside: set[Any] = set()
    line: list[Any] = []

    def look(child: Any, other: Hold | None = None) -> None:
        called.touched.discard(child)
        if child in inside:
            return
        held = rooms.hold(child, other)
        if other is not None:
            assert held is other
            line[:] = [each for each in line if each is not child]
            return
        line[:] = line if child in line else [*line, child]
        assert (held is None) is (line.index(child) < limit - len(inside))
        if held is None:
            line.remove(child)
            inside.add(child)

    for step, at in steps:
        child = children[at]
        if step == "come":
            look(child)
        elif step == "stay away":
            look(child, Hold("stopped", rest=True))
        elif step == "be called" and child in called.touched:
            look(child)
        elif step == "end" and child in inside:
            inside.discard(child)
            rooms.leave(child)
        assert len(inside) <= limit
    while called.touched:
        look(next(iter(called.touched)))
    assert not line or len(inside) == limit


# -- the file -----------------------------------------------------------------------------------------------------------


def load(tmp_path: Any, daemon: str, jobs: str = "") -> Any:
    (tmp_path / "work.py").write_text("def plain(): ...\nasync def coroutine(): ...\n")
    (tmp_path / "supervisor.toml").write_text(f"[daemon]\n{daemon}\n{jobs}")
    return config.load(tmp_path / "supervisor.toml", {})


def test_services_that_need_more_threads_than_there_are_get_a_warning_with_the_sum(tmp_path):
    jobs = '[jobs.a]\ncall = "work:plain"\n[jobs.b]\ncall = "work:coroutine"\nkind = "asyncio"\nworkers = 3\n'
    jobs += '[jobs.task]\ncall = "work:coroutine"\n[jobs.once]\ncall = "work:plain"\nonce = true\n'
    jobs += '[jobs.manual]\ncall = "work:plain"\nstart = "manual"\n'
    found = preflight.check(load(tmp_path, "threads = 2", jobs))
    assert [str(each) for each in found.warnings] == [
        f"{tmp_path}/supervisor.toml:2:1: warning: daemon.threads: a + b (3) need 4 for as long as they run, this allows 2: "
        "2 will wait"
    ]
    assert preflight.check(load(tmp_path, "threads = 4", jobs)).warnings == []


def test_a_reload_says_that_it_needs_a_restart_of_the_daemon(tmp_path):
    plan = config.diff(load(tmp_path, "threads = 2"), load(tmp_path, "threads = 3\nprocesses = 1"))
    assert plan.notes == (
        "daemon.threads: needs a restart of the daemon; the rest is applied",
        "daemon.processes: needs a restart of the daemon; the rest is applied",
    )


def test_none_at_all_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"daemon\.threads: expected at least 1, got 0"):
        load(tmp_path, "threads = 0")
