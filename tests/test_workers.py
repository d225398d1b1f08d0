"""The workers of a job: how many, one after another, and never two of one number. In virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from supervisor.errors import ControlError, EssentialEnded
from supervisor.events import Added, Ended, GroupRestarting, Killing, Removed, Renamed, Starting, Stopping, Warned, fold
from supervisor.kinds import Context
from supervisor.probes import Health, Ready
from supervisor.spec import GiveUp, RestartType, Seconds, Strategy
from tests.forest import SIXTY, Forest, at_once, forest, group, job, said, serve, settle

NOTIFY = Ready(notify=True)


class Crew:
    """Workers that a test makes ready, fails and watches, by their numbers. Each run takes `ready_in` to get ready."""

    def __init__(self, ready_in: float = 0.0, stops_in: float = 0.0) -> None:
        self.ready_in = ready_in
        self.stops_in = stops_in
        self.alive: list[int] = []
        self.doubles: list[int] = []
        """Numbers that were started while they were alive."""
        self._doors: dict[int, trio.Event] = {}
        self._failing: dict[int, bool] = {}
        self.broken = False
        """Whether runs from now on fail before they get ready."""

    async def __call__(self, ctx: Context) -> None:
        number = ctx.worker
        self.doubles += [number] * (number in self.alive)
        self.alive.append(number)
        try:
            await self._live(ctx, number)
        finally:
            self.alive.remove(number)

    async def _live(self, ctx: Context, number: int) -> None:
        door = self._doors[number] = trio.Event()
        broken = self.broken
        if not await ctx.sleep(self.ready_in):
            await trio.sleep(self.stops_in)
            return
        if broken:
            raise RuntimeError("the new version is broken")
        ctx.ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._open_when_asked, ctx, door)
            await door.wait()
            nursery.cancel_scope.cancel(reason="over")
        if self._failing.pop(number, False):
            raise RuntimeError("boom")

    async def _open_when_asked(self, ctx: Context, door: trio.Event) -> None:
        await ctx.wait_stopping()
        await trio.sleep(self.stops_in)
        door.set()

    def fail(self, number: int) -> None:
        if number in self.alive:
            self._failing[number] = True
            self._doors[number].set()

    def succeed(self, number: int) -> None:
        self._doors[number].set()


def service(live: Callable[..., Any], workers: int = 1, **keys: Any) -> Any:
    return job(live, workers=workers, ready=NOTIFY if isinstance(live, Crew) else None, **keys)


async def order(f: Forest, verb: str, name: str, **options: Any) -> str:
    (given,) = f.tree.order(verb, [name], **options)
    return said(await given.wait())


def causes(f: Forest) -> str:
    return f.tree.journal.table["api"].cause


# ---- a group in the place of a job ----


async def test_a_job_with_several_workers_has_a_row_and_one_for_each(autojump_clock, tmp_path):
    live = Crew(ready_in=2)
    async with forest(tmp_path, {"api": service(live, 3), "web": job(serve, after=("api",))}, {"g": group("web", "api")}) as f:
        await settle()
        assert f.words() == "g:starting web:waiting api:starting api:0:starting api:1:starting api:2:starting"
        rows = {row.name: row for row in f.tree.status()}
        assert [rows[name].supervisor for name in ("api", "api:0", "api:2")] == ["g", "api", "api"]
        assert {rows[name].kind for name in ("api", "api:0", "api:2")} == {"task"}
        assert causes(f) == "0 of 3 workers are ready"
        await trio.sleep(2)
        await settle()
        assert f.words("api", "api:1", "web") == "api:running api:1:running web:running"
        assert causes(f) == "all 3 workers are ready"
        assert sorted(live.alive) == [0, 1, 2]


async def test_names_and_globs_mean_a_job_before_its_workers(autojump_clock, tmp_path):
    async with forest(tmp_path, {"api": service(serve, 2), "b": job(serve)}) as f:
        assert f.tree.resolve(["api*"]) == ["api"]
        assert f.tree.resolve(["*"]) == ["api", "b"]
        assert f.tree.resolve(["api:?"]) == ["api:0", "api:1"]
        assert f.tree.resolve(["api:1", "b"]) == ["api:1", "b"]
        assert [row.name for row in f.tree.status("api*")] == ["api", "api:0", "api:1"]
        assert [row.name for row in f.tree.status("api:1")] == ["api:1"]
        with pytest.raises(ControlError, match="no job or supervisor matches 'api:2'"):
            f.tree.resolve(["api:2"])


async def test_the_failure_of_a_worker_concerns_it_alone(autojump_clock, tmp_path):
    live = Crew()
    jobs = {"api": service(live, 3, backoff=SIXTY), "b": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("api", "b", strategy=Strategy.ONE_FOR_ALL, intensity=0)}) as f:
        await settle()
        live.fail(1)
        await settle()
        assert f.words() == "g:running api:running api:0:running api:1:backing off api:2:running b:running"
        assert causes(f) == "2 of 3 workers are ready"
        assert not f.tree.journal.table["api"].ready
        assert not f.events(GroupRestarting)
        await trio.sleep(60)
        await settle()
        assert causes(f) == "all 3 workers are ready"
        assert f.tree.journal.table["api:1"].restarts == 1


async def test_stop_and_start_of_the_job_are_those_of_all_its_workers_at_the_same_time(autojump_clock, tmp_path):
    live = Crew(stops_in=3)
    async with forest(tmp_path, {"api": service(live, 3)}) as f:
        await settle()
        assert await order(f, "stop", "api") == "yes, stopped"
        assert trio.current_time() == 3
        assert live.alive == []
        assert f.words() == "api:stopped api:0:stopped api:1:stopped api:2:stopped"
        assert await at_once(f, "start", "api:1") == "no, its job api is stopped; start that first: supervisor start api"
        assert await at_once(f, "start", "api") == "yes, running"
        assert sorted(live.alive) == [0, 1, 2]


async def test_a_worker_can_be_stopped_alone_and_a_start_of_the_job_brings_it_back(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live, 3)}) as f:
        await settle()
        assert await at_once(f, "stop", "api:1") == "yes, stopped"
        assert sorted(live.alive) == [0, 2]
        assert causes(f) == "2 of 3 workers are ready"
        assert f.tree.journal.table["api"].ready  # it is as it is meant to be
        live.ready_in = 4
        (start,) = f.tree.order("start", ["api"])
        await settle()
        assert start._answer is None
        assert said(await start.wait()) == "yes, running"
        assert trio.current_time() == 4
        assert sorted(live.alive) == [0, 1, 2]
        assert await at_once(f, "start", "api") == "yes, already running"


async def test_give_up_counts_the_failures_of_all_workers_and_ends_the_job(autojump_clock, tmp_path):
    live = Crew()
    jobs = {"api": service(live, 3, give_up=GiveUp(failures=3, within=Seconds(60)), backoff=SIXTY), "b": job(serve)}
    async with forest(tmp_path, jobs, {"g": group("api", "b", intensity=0)}) as f:
        await settle()
        live.fail(0)
        live.fail(1)
        await settle()
        assert f.word("api") == "running"
        live.fail(2)
        await settle()
        assert f.word("api") == "gave up"
        assert causes(f) == "3 failures within 60 s, the last: api:2: RuntimeError: boom"
        assert f.words("g", "b") == "g:running b:running"
        assert live.alive == []
        assert await at_once(f, "start", "api") == "yes, running"
        live.fail(0)
        await settle()
        live.fail(1)
        await settle()
        assert f.word("api") == "running"  # what failed before that start counts for nothing
        assert await at_once(f, "restart", "api") == "yes, running, 3 workers"
        live.fail(0)
        live.fail(1)
        await settle()
        assert f.word("api") == "running"  # and nor does what failed before the restart
        live.fail(2)
        await settle()
        assert f.word("api") == "gave up"


async def test_a_job_is_essential_as_a_whole(autojump_clock, tmp_path):
    live = Crew()
    with pytest.raises(EssentialEnded):
        async with forest(tmp_path, {"api": service(live, 2, essential=True, restart=RestartType.TEMPORARY)}) as f:
            await settle()
            live.fail(0)
            await settle()
            assert f.words() == "api:running api:0:failed api:1:running"
            live.succeed(1)
            await trio.sleep_forever()


async def test_a_transient_job_is_completed_when_all_its_workers_are(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live, 2, restart=RestartType.TRANSIENT)}) as f:
        await settle()
        live.succeed(0)
        await settle()
        assert f.words() == "api:running api:0:completed api:1:running"
        live.succeed(1)
        await settle()
        assert f.words() == "api:completed api:0:completed api:1:completed"
        assert await at_once(f, "start", "api") == "yes, running"
        assert sorted(live.alive) == [0, 1]


# ---- scale ----


async def test_scale_touches_only_the_difference_and_waits_for_it(autojump_clock, tmp_path):
    live = Crew(ready_in=2, stops_in=3)
    async with forest(tmp_path, {"api": service(live, 2), "b": job(serve)}) as f:
        await trio.sleep(10)
        seen = len(f.history)
        assert await order(f, "scale", "api", workers=4) == "yes, 4 workers"
        assert trio.current_time() == 12
        assert sorted(live.alive) == [0, 1, 2, 3]
        assert list(f.tree.nodes) == ["api", "api:0", "api:1", "api:2", "api:3", "b"]
        assert await order(f, "scale", "api", workers=1) == "yes, 1 worker"
        assert trio.current_time() == 15
        assert live.alive == [0]
        assert list(f.tree.journal.table) == ["api", "api:0", "b"]
        touched = {event.name for _, event in f.history[seen:] if isinstance(event, (Starting, Ended, Stopping, Killing))}
        assert touched == {"api:1", "api:2", "api:3"}
        assert causes(f) == "its one worker is ready"


async def test_a_plain_job_becomes_the_first_of_its_workers_and_goes_on(autojump_clock, tmp_path):
    live = Crew(stops_in=1)
    async with forest(tmp_path, {"api": service(live), "b": job(serve, after=("api",))}) as f:
        await trio.sleep(5)
        seen = len(f.history)
        assert await at_once(f, "scale", "api", workers=1) == "yes, 1 worker"
        assert len(f.history) == seen
        assert await at_once(f, "scale", "api", workers=3) == "yes, 3 workers"
        await settle()
        assert f.words() == "api:running api:0:running api:1:running api:2:running b:running"
        assert f.happened(Renamed) == [(5.0, "api")]
        assert [event.run for event in f.events(Starting)] == ["api#1", "b#1", "api#2", "api:1#1", "api:2#1"]
        assert fold(event for _, event in f.history) == f.tree.journal.table
        live.fail(0)
        await trio.sleep(1)
        assert f.tree.journal.table["api:0"].run == "api:0#2"
        assert await order(f, "scale", "api", workers=1) == "yes, 1 worker"
        assert f.words() == "api:running api:0:running b:running"
        assert await order(f, "stop", "api") == "yes, stopped"
        assert live.alive == []


async def test_what_is_under_way_when_a_plain_job_is_split_goes_on_in_the_group(autojump_clock, tmp_path):
    live = Crew(ready_in=4, stops_in=3)
    async with forest(tmp_path, {"api": service(live, grace=2)}) as f:
        start, scale = f.tree.order("start", ["api"])[0], f.tree.order("scale", ["api"], workers=2)[0]
        await settle()
        assert causes(f) == "0 of 2 workers are ready"
        assert said(await start.wait()) == "yes, running"
        assert said(await scale.wait()) == "yes, 2 workers"
        assert trio.current_time() == 4


async def test_a_plain_job_can_be_split_while_it_stops(autojump_clock, tmp_path):
    live = Crew(stops_in=3)
    async with forest(tmp_path, {"api": service(live, grace=2)}) as f:
        await trio.sleep(5)
        began = trio.current_time()
        stop = f.tree.order("stop", ["api"])[0]
        scale = f.tree.order("scale", ["api"], workers=2)[0]
        restart = f.tree.order("restart", ["api"])[0]
        await settle()
        assert said(await stop.wait()) == "no, overtaken by restart"
        assert said(await scale.wait()) == "yes, 2 workers from its next start on"
        assert said(await restart.wait()) == "yes, running, 2 workers"
        assert f.times(Killing, "api:0") == [trio.current_time()] == [began + 2.0]
        assert sorted(live.alive) == [0, 1]


async def test_what_looks_after_a_run_goes_on_when_its_job_is_split(autojump_clock, tmp_path):
    async def mute(ctx: Context) -> None:
        if ctx.worker:
            while await ctx.sleep(1):
                ctx.heartbeat()
        await trio.sleep_forever()  # hears nothing: it is killed after its grace

    jobs = {
        "api": job(mute, grace=2, backoff=SIXTY, health=Health(notify=True, timeout=Seconds(5), failures=1)),
        "b": job(serve),
    }
    async with forest(tmp_path, jobs, {"g": group("api", "b", strategy=Strategy.ONE_FOR_ALL, intensity=0)}) as f:
        await trio.sleep(1)
        assert await at_once(f, "scale", "api", workers=2) == "yes, 2 workers"
        await trio.sleep(50)
        assert f.words() == "g:running api:running api:0:backing off api:1:running b:running"
        (asked,) = f.times(Stopping, "api:0")
        assert f.times(Killing, "api:0") == [asked + 2]
        assert not f.events(GroupRestarting)


async def test_a_job_that_does_not_run_is_scaled_for_its_next_start(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live, start="manual"), "b": job(serve, start="manual")}, {}) as f:
        assert await at_once(f, "scale", "api", workers=3) == "yes, 3 workers from its next start on"
        assert f.words("api", "api:0", "api:2") == "api:stopped api:0:stopped api:2:stopped"
        assert await at_once(f, "start", "api") == "yes, running"
        assert sorted(live.alive) == [0, 1, 2]


async def test_a_job_that_backs_off_starts_at_once_with_its_new_workers(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live, backoff=SIXTY)}) as f:
        await settle()
        live.fail(0)
        await settle()
        assert await at_once(f, "scale", "api", workers=2) == "yes, 2 workers"
        assert fold(event for _, event in f.history) == f.tree.journal.table


async def test_workers_on_their_way_out_are_called_back(autojump_clock, tmp_path):
    live = Crew(stops_in=3)
    async with forest(tmp_path, {"api": service(live, 4)}) as f:
        await settle()
        down = f.tree.order("scale", ["api"], workers=1)[0]
        await trio.sleep(1)
        assert f.words("api:1", "api:3") == "api:1:stopping api:3:stopping"
        up = f.tree.order("scale", ["api"], workers=3)[0]
        await settle()
        assert said(await down.wait()) == "no, overtaken by scale"
        assert said(await up.wait()) == "yes, 3 workers"
        assert trio.current_time() == 3
        assert sorted(live.alive) == [0, 1, 2]
        assert [name for _, name in f.happened(Removed)] == ["api:3"]


async def test_a_new_worker_that_never_gets_ready_is_told(autojump_clock, tmp_path):
    live = Crew(ready_in=1)
    async with forest(tmp_path, {"api": service(live, 2, backoff=SIXTY)}) as f:
        await trio.sleep(5)
        live.broken = True
        answer = await order(f, "scale", "api", workers=3)
        assert answer == "no, api:2: RuntimeError: the new version is broken; it never became ready"
        assert f.words() == "api:running api:0:running api:1:running api:2:backing off"


@pytest.mark.parametrize(
    ("name", "workers", "answer"),
    [
        ("api", 0, "no, from 1 to 1000 workers; for none, use stop"),
        ("api", 1001, "no, from 1 to 1000 workers; for none, use stop"),
        ("api:1", 3, "no, api:1 is a worker: scale api"),
        ("nightly", 3, "no, nightly is no service: it makes one run at a time"),
        ("g", 3, "no, g is a supervisor"),
        ("sole", 2, "no, output: its workers would all write to this file: put {worker} into its name"),
    ],
)
async def test_what_cannot_be_scaled_says_why(autojump_clock, tmp_path, name, workers, answer):
    jobs = {"api": service(serve, 2), "nightly": job(serve, every=60), "sole": job(serve, output="/tmp/sole.log")}
    async with forest(tmp_path, jobs, {"g": group("nightly")}) as f:
        await settle()
        assert await at_once(f, "scale", name, workers=workers) == answer


# ---- rolling restart ----


async def test_a_restart_renews_one_worker_at_a_time(autojump_clock, tmp_path):
    live = Crew(ready_in=2, stops_in=1)
    async with forest(tmp_path, {"api": service(live, 3)}) as f:
        await trio.sleep(10)
        assert await order(f, "restart", "api") == "yes, running, 3 workers"
        assert trio.current_time() == 10 + 3 * 3
        assert f.times(Stopping, "api:0") == [10.0]
        assert f.times(Stopping, "api:1") == [13.0]
        assert f.times(Stopping, "api:2") == [16.0]
        assert f.tree.journal.table["api"].run == "api#1"


async def test_a_restart_at_once_renews_all_together(autojump_clock, tmp_path):
    live = Crew(ready_in=2, stops_in=1)
    async with forest(tmp_path, {"api": service(live, 3)}) as f:
        await trio.sleep(10)
        assert await order(f, "restart", "api", at_once=True) == "yes, running"
        assert trio.current_time() == 13


async def test_a_roll_stops_where_the_new_version_does_not_get_ready(autojump_clock, tmp_path):
    live = Crew(ready_in=2, stops_in=1)
    async with forest(tmp_path, {"api": service(live, 4, backoff=SIXTY)}) as f:
        await trio.sleep(10)
        restart = f.tree.order("restart", ["api"])[0]
        await trio.sleep(4)  # the first has been renewed, the second is on its way down
        live.broken = True
        answer = said(await restart.wait())
        assert answer == (
            "no, stopped at api:1, which never became ready: RuntimeError: the new version is broken; api:2, api:3 as before"
        )
        assert f.words() == "api:running api:0:running api:1:backing off api:2:running api:3:running"
        assert [event.text for event in f.events(Warned)] == [f"rolling restart of api {answer[4:]}"]
        live.broken = False
        await trio.sleep(60)
        assert causes(f) == "3 of 4 workers are ready"
        await trio.sleep(2)
        await settle()
        assert causes(f) == "all 4 workers are ready"
        assert f.tree.journal.table["api:2"].run == "api:2#1"


async def test_a_roll_stops_where_the_new_version_is_not_ready_in_time(autojump_clock, tmp_path):
    live = Crew(ready_in=2)
    async with forest(tmp_path, {"api": service(live, 2, backoff=SIXTY, start_timeout=Seconds(5))}) as f:
        await trio.sleep(10)
        live.ready_in = 100
        assert await order(f, "restart", "api") == (
            "no, stopped at api:0, which never became ready: not ready within 5 s (start_timeout); api:1 as before"
        )
        assert f.tree.journal.table["api:1"].run == "api:1#1"


async def test_a_restart_brings_up_who_is_down_or_waits(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live, 3, backoff=SIXTY)}) as f:
        await settle()
        await order(f, "stop", "api:0")
        live.fail(2)
        await settle()
        assert await at_once(f, "restart", "api") == "yes, running, 3 workers"
        assert {f.tree.journal.table[f"api:{at}"].run for at in range(3)} == {"api:0#2", "api:1#2", "api:2#2"}
        await order(f, "stop", "api")
        assert await at_once(f, "restart", "api") == "yes, running"


@pytest.mark.parametrize("verb", ["stop", "start", "restart"])
async def test_a_command_ends_a_roll_at_once(autojump_clock, tmp_path, verb):
    live = Crew(ready_in=2, stops_in=1)
    async with forest(tmp_path, {"api": service(live, 3)}) as f:
        await trio.sleep(10)
        restart = f.tree.order("restart", ["api"])[0]
        await trio.sleep(1.5)  # api:0 is on its way up
        other = f.tree.order(verb, ["api"], by="ann")[0]
        assert said(await restart.wait()) == f"no, overtaken by {verb} (ann)"
        assert (
            said(await other.wait())
            == {"stop": "yes, stopped", "start": "yes, running", "restart": "yes, running, 3 workers"}[verb]
        )
        await trio.sleep(30)
        runs = [f.tree.journal.table[f"api:{at}"].run for at in range(3)]
        assert (
            runs
            == {
                "stop": ["api:0#2", "api:1#1", "api:2#1"],
                "start": ["api:0#2", "api:1#1", "api:2#1"],
                "restart": ["api:0#3", "api:1#2", "api:2#2"],
            }[verb]
        )
        assert sorted(live.alive) == ([] if verb == "stop" else [0, 1, 2])


async def test_a_roll_goes_on_past_workers_that_others_have_taken_in_hand(autojump_clock, tmp_path):
    live = Crew(ready_in=2, stops_in=1)
    async with forest(tmp_path, {"api": service(live, 5)}) as f:
        await trio.sleep(10)
        restart = f.tree.order("restart", ["api"])[0]
        await settle()
        by_hand = f.tree.order("restart", ["api:2"])[0]  # renewed by its operator: not once more
        gone = f.tree.order("stop", ["api:1"])[0]
        f.tree.order("scale", ["api"], workers=4)
        await trio.sleep(0.5)
        again = f.tree.order("restart", ["api:0"])[0]  # the very one that the roll waits for
        await settle()
        assert said(await by_hand.wait()) == "yes, running"
        assert said(await gone.wait()) == "yes, stopped"
        assert said(await again.wait()) == "yes, running"
        assert said(await restart.wait()) == "yes, running, 4 workers"
        assert [f.tree.journal.table[f"api:{at}"].run for at in range(4)] == ["api:0#2", "api:1#1", "api:2#2", "api:3#2"]


async def test_a_worker_that_crashes_during_a_roll_counts_as_renewed_once_it_is_ready(autojump_clock, tmp_path):
    live = Crew(ready_in=2)
    async with forest(tmp_path, {"api": service(live, 3)}) as f:
        await trio.sleep(10)
        restart = f.tree.order("restart", ["api"])[0]
        await trio.sleep(0.5)
        live.fail(2)
        assert said(await restart.wait()) == "yes, running, 3 workers"
        assert [f.tree.journal.table[f"api:{at}"].run for at in range(3)] == ["api:0#2", "api:1#2", "api:2#2"]


async def test_a_worker_that_backs_off_when_its_turn_comes_waits_no_longer(autojump_clock, tmp_path):
    live = Crew(ready_in=2)
    async with forest(tmp_path, {"api": service(live, 2, backoff=SIXTY)}) as f:
        await trio.sleep(10)
        restart = f.tree.order("restart", ["api"])[0]
        await trio.sleep(0.5)
        live.fail(1)
        assert said(await restart.wait()) == "yes, running, 2 workers"
        assert trio.current_time() == 14


async def test_the_end_of_the_daemon_ends_a_roll(autojump_clock, tmp_path):
    live = Crew(ready_in=2, stops_in=1)
    async with forest(tmp_path, {"api": service(live, 3)}) as f:
        await trio.sleep(10)
        restart, scale = f.tree.order("restart", ["api"])[0], f.tree.order("scale", ["api"], workers=5)[0]
        await settle()
        f.tree.shutdown("enough")
        await f.tree.wait_stopped()
        assert said(await restart.wait()) == "no, overtaken: enough"
        assert said(await scale.wait()) == "no, overtaken: enough"
        assert live.alive == []


# ---- reload ----


async def test_a_reload_scales_where_the_file_has_changed_and_else_leaves_what_the_operator_said(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live, 2)}) as f:
        await settle()
        await order(f, "scale", "api", workers=4)
        f.tree.apply(f.config({"api": service(live, 2, grace=3)}))
        await settle()
        assert sorted(live.alive) == [0, 1, 2, 3]
        f.tree.apply(f.config({"api": service(live, 3, grace=3)}))
        await settle()
        assert sorted(live.alive) == [0, 1, 2]
        assert not f.events(Ended)[1:]  # only api:3
        f.tree.apply(f.config({}))
        await settle()
        assert live.alive == []
        assert f.tree.journal.table == {}
        assert f.tree.nodes == {}


async def test_a_reload_splits_a_plain_job(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live)}) as f:
        await settle()
        assert f.tree.plan(f.config({"api": service(live, 3)})).changed == ("api",)
        f.tree.apply(f.config({"api": service(live, 3)}))
        await settle()
        assert sorted(live.alive) == [0, 1, 2]
        assert not f.events(Ended)
        assert [event.name for event in f.events(Added)] == ["api", "api", "api:1", "api:2"]


async def test_a_reload_of_what_it_runs_rolls_and_keeps_the_old_ones_if_the_new_do_not_get_ready(autojump_clock, tmp_path):
    old, new, bad = Crew(ready_in=2), Crew(ready_in=2), Crew(ready_in=2)
    bad.broken = True
    async with forest(tmp_path, {"api": service(old, 3, backoff=SIXTY)}) as f:
        await trio.sleep(10)
        plan, orders = f.tree.apply(f.config({"api": service(new, 3, backoff=SIXTY)}))
        assert plan.restarted == ("api",)
        await trio.sleep(1)
        assert sorted(old.alive) == [1, 2]
        assert said(await orders[0].wait()) == "yes, running, 3 workers"
        assert trio.current_time() == 16
        assert sorted(new.alive) == [0, 1, 2]
        _, orders = f.tree.apply(f.config({"api": service(bad, 3, backoff=SIXTY)}))
        assert said(await orders[0].wait()).startswith("no, stopped at api:0, which never became ready: RuntimeError")
        assert sorted(new.alive) == [1, 2]


async def test_commands_that_arrive_with_a_scale_find_the_whole_job(autojump_clock, tmp_path):
    live = Crew()
    async with forest(tmp_path, {"api": service(live)}) as f:
        await settle()
        f.tree.order("scale", ["api"], workers=3)
        f.tree.apply(f.config({"api": service(live, grace=7)}))
        stop = f.tree.order("stop", ["api"])[0]
        live.fail(0)
        assert said(await stop.wait()) == "yes, stopped"
        assert live.alive == []
        await settle()
        assert f.words() == "api:stopped api:0:exited api:1:stopped api:2:stopped" or f.word("api:0") in ("failed", "stopped")
        assert {f.tree.nodes[name].spec.grace for name in f.tree.nodes} == {7}


# ---- whatever happens ----


@dataclass
class Wanted:
    """Which workers there should be, by the contract: what was said, and nothing of what happened."""

    file: int
    count: int
    split: bool = False
    """Whether it is no plain job any more: only then has a worker a name."""
    up: bool = True
    stopped: set[int] = field(default_factory=set)

    def take(self, verb: str, number: int) -> None:
        """What a step changes of what is wanted."""
        match verb:
            case "scale":
                self.scale(number)
            case "reload" if number != self.file:
                self.file = number
                self.scale(number)
            case "start" | "restart" | "restart at once":
                self.up = True
                self.stopped.clear()
            case "stop":
                self.up = False
            case "start one" | "restart one" if self.up:
                self.stopped.discard(number)
            case "stop one" if self.split and number < self.count:
                self.stopped.add(number)

    def scale(self, count: int) -> None:
        self.stopped = {number for number in self.stopped if number < count}
        self.count = count
        self.split = self.split or count > 1

    @property
    def alive(self) -> list[int]:
        return [number for number in range(self.count) if number not in self.stopped] if self.up else []


VERBS = (
    "scale", "scale", "reload", "change", "start", "stop", "restart", "restart at once", "start one", "stop one", "restart one",
    "fail", "fail", "break", "mend",
)  # fmt: skip

STEPS = st.tuples(
    st.sampled_from(VERBS),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0, 5.0, 90.0]),
)


def take(f: Forest, live: Crew, verb: str, number: int, wanted: Wanted, made: dict[str, Any]) -> list[Any]:
    """One step of those that `Wanted` knows, or one that changes nothing of what is wanted."""
    word, _, how = verb.partition(" ")
    named = f"api:{number - 1}"
    wanted.take(verb, number if verb in ("scale", "reload") else number - 1)
    match word:
        case "scale":
            return f.tree.order("scale", ["api"], workers=number)
        case "reload" | "change":
            made["grace"] = made["grace"] + 1
            made["workers"] = number if word == "reload" else wanted.file
            made["description"] = made["description"] + "!"
            made["args"] = {} if word == "change" and made["args"] is None else None if word == "change" else made["args"]
            return f.tree.apply(f.config({"api": service(live, **made)}))[1]
        case "fail":
            live.fail(number - 1)
        case "break" | "mend":
            live.broken = word == "break"
        case _ if how == "one":
            return f.tree.order(word, [named]) if named in f.tree.nodes else []
        case _:
            return f.tree.order(word, ["api"], **({"at_once": bool(how)} if word == "restart" else {}))
    return []


async def live_through(base: Path, first: int, steps: list[tuple[str, int, float]]) -> None:
    live = Crew(ready_in=1, stops_in=1)
    made: dict[str, Any] = {"workers": first, "grace": 3, "description": "", "args": None}
    wanted, orders = Wanted(first, first, split=first > 1), []
    async with forest(base, {"api": service(live, **made)}) as f:
        for verb, number, wait in steps:
            orders += take(f, live, verb, number, wanted, made)
            await trio.sleep(wait)
            await settle()
            assert len(live.alive) <= 4
        live.broken = False
        await trio.sleep(1000)
        await settle()
        assert sorted(live.alive) == wanted.alive
        assert not live.doubles
        assert all(order._answer for order in orders), "a command without an answer"
        assert list(f.tree.nodes) == list(f.tree.journal.table)
        assert fold(event for _, event in f.history) == f.tree.journal.table
        assert f.tree.journal.table["api"].ready is wanted.up
    assert not live.alive


whatever = given(first=st.integers(1, 3), steps=st.lists(STEPS, min_size=1, max_size=15))


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@whatever
def test_whatever_happens_the_workers_are_those_that_are_wanted(first, steps, tmp_path_factory):
    check_workers(first, steps, tmp_path_factory)


@pytest.mark.long
@settings(max_examples=1000, derandomize=False, suppress_health_check=list(HealthCheck))
@whatever
def test_whatever_happens_the_workers_are_those_that_are_wanted_for_long(first, steps, tmp_path_factory):
    check_workers(first, steps, tmp_path_factory)


def check_workers(first, steps, tmp_path_factory):
    trio.run(live_through, tmp_path_factory.getbasetemp(), first, steps, clock=MockClock(autojump_threshold=0))
