"""Fresh runs for old or fat ones: age in virtual time, memory with real processes."""

from __future__ import annotations

import sys

import trio

from supervisor.children.usage import Usage
from supervisor.config import Config
from supervisor.events import Ended, Journal, Killing, Starting, Stopping
from supervisor.kinds import JobSpec
from supervisor.nodes.recycling import Scales
from supervisor.spec import Backoff, Bytes, Recycle, Seconds, Strategy
from supervisor.tree import open_supervisor
from tests.forest import crashing_at, forest, group, job, lasting, serve, slow

HOURLY = Recycle(age=Seconds(3600))


async def test_a_run_of_that_age_is_replaced_at_once_and_that_is_no_failure(autojump_clock, tmp_path):
    async with forest(tmp_path, {"x": job(serve, recycle=HOURLY)}) as f:
        await trio.sleep(2.5 * 3600)
        assert f.times(Starting, "x") == [0, 3600, 7200]
        assert {event.cause for event in f.events(Stopping)} == {"recycled: it ran for 1h"}
        assert [event.cause for event in f.events(Starting)] == ["starts with its supervisor", *["recycled: it ran for 1h"] * 2]
        assert not any(event.failed for event in f.events(Ended))
        assert f.tree.journal.table["x"].restarts == 0


async def test_it_is_asked_has_its_grace_and_is_killed_then(autojump_clock, tmp_path):
    jobs = {"x": job(slow(5), recycle=HOURLY), "y": job(slow(50), recycle=HOURLY, grace=10)}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(2 * 3600)
        assert f.times(Starting, "x") == [0, 3605]
        assert f.times(Starting, "y") == [0, 3610]
        assert f.happened(Killing) == [(3610, "y")]


async def test_strategies_and_limits_do_not_see_it(autojump_clock, tmp_path):
    jobs = {"x": job(serve, recycle=HOURLY), "y": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("x", "y", strategy=Strategy.ONE_FOR_ALL, intensity=0)}) as f:
        await trio.sleep(1.5 * 3600)
        assert f.times(Starting, "x") == [0, 3600]
        assert f.times(Starting, "y") == [0]


async def test_age_counts_anew_after_every_start(autojump_clock, tmp_path):
    jobs = {"x": job(crashing_at(1000), recycle=HOURLY, backoff=Backoff(initial=Seconds(30)))}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(2 * 3600)
        assert f.times(Starting, "x") == [0, 1030, 4630]


async def test_a_stop_under_way_is_not_overtaken(autojump_clock, tmp_path):
    async with forest(tmp_path, {"x": job(slow(50), recycle=HOURLY, grace=100)}) as f:
        await trio.sleep(3590)
        (order,) = f.tree.order("stop", ["x"])
        assert (await order.wait()).ok
        await trio.sleep(2 * 3600)
        assert f.times(Starting, "x") == [0]


async def test_a_restart_under_way_is_left_to_go_on(autojump_clock, tmp_path):
    async with forest(tmp_path, {"x": job(slow(50), recycle=HOURLY, grace=100)}) as f:
        await trio.sleep(3590)
        f.tree.order("restart", ["x"])
        await trio.sleep(100)
        assert f.times(Starting, "x") == [0, 3640]
        assert f.events(Starting)[-1].cause == "started"


async def test_it_changes_live_at_a_reload_and_counts_from_the_start_of_the_run(autojump_clock, tmp_path):
    def x(age: float | None) -> dict[str, JobSpec]:
        return {"x": job(serve, recycle=age and Recycle(age=Seconds(age)))}

    async with forest(tmp_path, x(None)) as f:
        await trio.sleep(1000)
        f.tree.apply(f.config(x(3600)))
        await trio.sleep(1000)
        f.tree.apply(f.config(x(2500)))
        await trio.sleep(1000)
        f.tree.apply(f.config(x(None)))
        await trio.sleep(20_000)
        assert f.times(Starting, "x") == [0, 2500]
        f.tree.apply(f.config(x(60)))  # older than that already
        await trio.sleep(30)
        assert f.times(Starting, "x") == [0, 2500, 23_000]


async def test_a_crowd_does_not_go_at_once(autojump_clock, tmp_path):
    jobs = {f"x{number}": job(serve, recycle=HOURLY) for number in range(50)}
    times: list[float] = []
    journal = Journal()
    journal.add_sink(lambda event: times.append(trio.current_time()) if isinstance(event, Stopping) else None)
    async with open_supervisor(Config(file=None, base=tmp_path, jobs=jobs), journal=journal):
        await trio.sleep(1.2 * 3600)
        assert len(times) == len(set(times)) == 50
        assert min(times) >= 0.9 * 3600 and max(times) <= 1.1 * 3600


async def test_looks_leave_no_timers_behind(autojump_clock, tmp_path):
    jobs = {"x": job(serve, recycle=Recycle(age=Seconds(10))), "y": job(lasting(1), every=1000)}
    async with forest(tmp_path, jobs) as f:
        for _ in range(200):
            await f.tree.restart("x")
        assert len(f.tree.root._timers) < 100
        for _ in range(200):
            await f.tree.pause("y")
            await f.tree.resume("y")
        before = len(f.times(Starting, "x"))
        await trio.sleep(15)
        assert len(f.times(Starting, "x")) == before + 1


GROWING = """
import os, sys, time
if os.fork() == 0:
    held = b"x" * int(sys.argv[1])
    while True: time.sleep(1000)
print("up", flush=True)
time.sleep(1000)
"""


async def test_a_tree_of_processes_that_holds_too_much_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.nodes.recycling.LOOK_EVERY", 0.1)
    limit = Recycle(memory=Bytes(80 << 20))
    jobs = {
        "fat": JobSpec(command=(sys.executable, "-c", GROWING, str(100 << 20)), recycle=limit, output="null"),
        "lean": JobSpec(command=(sys.executable, "-c", GROWING, "0"), recycle=limit, output="null"),
    }
    journal, twice = Journal(), trio.Event()
    causes: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, Stopping):
            causes.append(event.cause)
        elif isinstance(event, Starting) and event.run == "fat#3":
            twice.set()

    journal.add_sink(note)
    async with open_supervisor(Config(file=None, base=tmp_path, jobs=jobs), journal=journal) as tree:
        with trio.fail_after(30):
            await twice.wait()
        assert tree.journal.table["lean"].run == "lean#1"
        assert tree.journal.table["fat"].restarts == 0
    assert causes[0].startswith("recycled: it holds ") and causes[0].endswith(" MB, more than 80 MB")


async def test_of_workers_that_hold_too_much_one_is_replaced_in_one_look(tmp_path):
    """The heaviest first; the others are looked at again the next time."""
    usage = {"api:0": Usage(memory=90 << 20), "api:1": Usage(memory=95 << 20), "other": Usage(memory=81 << 20)}
    told: list[str] = []

    class Family:
        async def usage(self, *children: str) -> dict[str, Usage]:
            return {child: usage[child] for child in children}

    scales = Scales(Family(), lambda name: name, lambda name, cause: told.append(name))
    scales.weigh(dict.fromkeys(usage, 80 << 20))
    await scales._look()
    assert told == ["api:1", "other"]
    usage["api:1"] = Usage(memory=1)
    await scales._look()
    assert told == ["api:1", "other", "api:0", "other"]


async def test_memory_is_looked_at_as_the_file_says_now(tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.nodes.recycling.LOOK_EVERY", 0.1)

    def x(limit: int | None) -> Config:
        recycle = None if limit is None else Recycle(memory=Bytes(limit))
        jobs = {"x": JobSpec(command=("sleep", "1000"), recycle=recycle, output="null")}
        return Config(file=None, base=tmp_path, jobs=jobs)

    journal, started = Journal(), trio.Event()
    journal.add_sink(lambda event: started.set() if isinstance(event, Starting) and event.run == "x#2" else None)
    async with open_supervisor(x(1 << 30), journal=journal) as tree:
        await tree.wait_running()
        await trio.sleep(0.3)
        assert not started.is_set()
        tree.apply(x(4096))
        with trio.fail_after(30):
            await started.wait()
        tree.apply(x(None))
        await tree.restart("x")
        run = tree.journal.table["x"].run
        await trio.sleep(0.3)
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline > 1  # nobody looks any more
        assert tree.journal.table["x"].run == run
