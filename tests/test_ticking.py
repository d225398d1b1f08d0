"""Schedules of queue jobs: an item for each tick, one for all daemons. In virtual time, but for the real engines."""

from __future__ import annotations

import datetime
import secrets
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from supervisor.config import Config, DaemonSpec
from supervisor.events import Skipped, Warned
from supervisor.kinds import Context, JobSpec
from supervisor.nodes.ticking import item_id
from supervisor.queues import QUEUES
from supervisor.queues.protocol import State
from supervisor.queues.spec import QueueSpec
from supervisor.tree import open_supervisor
from supervisor.triggers import MOST
from tests.forest import Forest, forest, job, moment

MEMORY = QueueSpec(backend="memory")


def planted(base: Path, spec: JobSpec, queue: QueueSpec = MEMORY, **keys: Any) -> Any:
    return forest(base, {"a": spec}, queues={"q": queue}, **keys)


def noting(seen: list[Any]) -> Any:
    async def note(item: Any) -> None:
        seen.append((round(trio.current_time(), 3), item))

    return note


async def waiting(f: Forest) -> list[tuple[str, Any]]:
    records = await f.tree.queues.engine("q").peek(State.WAITING, 100)
    return [(record.id, msgspec.json.decode(record.payload)) for record in records]


async def test_each_tick_is_an_item_with_the_args_of_the_job(autojump_clock, tmp_path):
    seen: list[Any] = []
    async with planted(
        tmp_path, job(noting(seen), queue="q", cron="* * * * *", args={"b": 1}), since="2026-01-01 00:00:30"
    ) as f:
        await trio.sleep(160)
        assert seen == [(30.0, {"b": 1}), (90.0, {"b": 1}), (150.0, {"b": 1})]
        record = await f.tree.queues.engine("q").show("a@2026-01-01T00:01:00.000Z")
        assert record.state is State.DONE


async def test_without_args_it_is_an_empty_object(autojump_clock, tmp_path):
    seen: list[Any] = []
    async with planted(tmp_path, job(noting(seen), queue="q", cron="* * * * *")):
        await trio.sleep(70)
    assert seen == [(60.0, {})]


async def test_it_goes_by_its_time_zone(autojump_clock, tmp_path):
    seen: list[Any] = []
    spec = job(noting(seen), queue="q", cron="0 8 * * *", timezone="Europe/Berlin")
    async with planted(tmp_path, spec, since="2026-01-01 06:59") as f:
        await trio.sleep(70)
        assert await f.tree.queues.engine("q").show("a@2026-01-01T07:00:00.000Z") is not None


async def test_ticks_go_by_while_the_job_is_stopped_or_paused(autojump_clock, tmp_path):
    seen: list[Any] = []
    async with planted(tmp_path, job(noting(seen), queue="q", cron="* * * * *", start="manual")) as f:
        await trio.sleep(70)
        await f.tree.start("a")
        await trio.sleep(60)
        await f.tree.pause("a")
        await trio.sleep(60)
        await f.tree.resume("a")
        await trio.sleep(60)
        await f.tree.stop("a")
        await trio.sleep(60)
        assert await waiting(f) == []
    assert [at for at, _ in seen] == [120.0, 240.0]


async def test_an_item_of_a_tick_that_is_known_is_not_put_again(autojump_clock, tmp_path):
    """Another daemon, whose clock is ahead, was there before: its item has ended."""
    seen: list[Any] = []
    async with planted(tmp_path, job(noting(seen), queue="q", cron="* * * * *")) as f:
        tick = moment("2026-01-01 00:01")
        await f.tree.queues.producer("q").put("theirs", id=item_id("a", tick), keep=True)
        await trio.sleep(100)
    assert [item for _, item in seen] == ["theirs"]


@pytest.mark.parametrize(("catch_up", "left"), [("none", 1), ("last", 1), ("all", MOST)])
async def test_of_ticks_whose_items_wait_for_room_the_newest_are_put(autojump_clock, tmp_path, catch_up, left):
    full = QueueSpec(backend="memory", size=1)
    ids: list[str] = []

    async def note(item: Any, ctx: Context) -> None:
        ids.append(ctx.item or "")

    async with planted(tmp_path, job(note, queue="q", cron="* * * * *", catch_up=catch_up), full) as f:
        await f.tree.queues.engine("q").pause(True)
        await trio.sleep(60 * 150 + 30)
        assert [id for id, _ in await waiting(f)] == ["a@2026-01-01T00:01:00.000Z"]
        assert f.events(Warned)[0].text == "a: the item of a tick of its schedule waits for room in queue q"
        skipped = f.events(Skipped)
        assert sum(event.ticks for event in skipped) == 149 - left
        assert skipped[0].cause == "the item of an earlier one waits for room in queue q"
        await f.tree.queues.engine("q").pause(False)
        await trio.sleep(20)
        assert len(ids) == 1 + left
        assert ids[1:] == [item_id("a", moment("2026-01-01 00:00") + 60 * minute) for minute in range(151 - left, 151)]
        await trio.sleep(20)
        assert len(ids) == 2 + left  # and so it goes on


async def test_where_the_job_is_gone_no_item_of_it_waits_any_more(autojump_clock, tmp_path):
    seen: list[Any] = []
    spec = job(noting(seen), queue="q", cron="* * * * *", catch_up="all")
    async with planted(tmp_path, spec, QueueSpec(backend="memory", size=1)) as f:
        await f.tree.queues.engine("q").pause(True)
        await trio.sleep(200)
        f.tree.apply(f.config({"a": job(noting(seen), queue="q")}))
        await f.tree.queues.engine("q").pause(False)
        await trio.sleep(300)
    assert len(seen) == 1


async def test_a_tick_is_missed_in_a_sleep_of_the_machine_and_that_is_said(autojump_clock, tmp_path):
    seen: list[Any] = []
    async with planted(tmp_path, job(noting(seen), queue="q", cron="* * * * *")) as f:
        await trio.sleep(30)
        f.wall.step(600)
        await trio.sleep(60)
        assert [event.ticks for event in f.events(Skipped)] == [9]  # the last is not late yet
    assert len(seen) == 2


async def test_what_was_missed_while_the_daemon_was_down_is_caught_up_where_it_is_wanted(autojump_clock, tmp_path):
    seen: list[Any] = []
    spec = job(noting(seen), queue="q", cron="* * * * *", catch_up="all")
    async with planted(tmp_path, spec):
        await trio.sleep(70)
    async with planted(tmp_path, spec, since="2026-01-01 00:04:30"):
        await trio.sleep(1)
    assert len(seen) == 4  # of minute 1; then of 2, 3 and 4


async def test_a_reload_goes_on_with_the_same_times_or_begins_with_others(autojump_clock, tmp_path):
    seen: list[Any] = []
    call = noting(seen)

    def spec(cron: str, **args: Any) -> JobSpec:
        return job(call, queue="q", cron=cron, args=args)

    async with planted(tmp_path, spec("* * * * *", v=1)) as f:
        await trio.sleep(30)
        f.tree.apply(f.config({"a": spec("* * * * *", v=2)}))
        await trio.sleep(60)
        f.tree.apply(f.config({"a": spec("*/2 * * * *", v=3)}))
        await trio.sleep(60)
        f.tree.apply(f.config({}))
        await trio.sleep(300)
    assert seen == [(60.0, {"v": 2}), (120.0, {"v": 3})]


# ---- many daemons ----


@pytest.fixture(params=["redis", "postgresql"])
def url(request):
    """The URL of an engine that daemons share, on a real server."""
    try:
        QUEUES[request.param].open  # noqa: B018 (whether there is one)
    except ImportError:
        pytest.skip(f"{request.param} is not built yet")
    return request.getfixturevalue("redis" if request.param == "redis" else "postgres").url


async def test_among_many_daemons_each_tick_is_one_item_handled_once(tmp_path, url):
    handled: list[tuple[str, str]] = []
    more = trio.Event()

    def handling(daemon: str) -> Any:
        async def handle(item: Any, ctx: Context) -> None:
            assert ctx.item is not None
            handled.append((ctx.item, daemon))
            more.set()

        return handle

    async def until(count: int) -> None:
        nonlocal more
        while len(handled) < count:
            more = trio.Event()
            await more.wait()

    queue = QueueSpec(backend=url)
    name = f"ticking-{secrets.token_hex(4)}"

    def daemon(which: str) -> Any:
        spec = job(handling(which), queue=name, cron="* * * * * *")
        return open_supervisor(
            Config(file=None, base=tmp_path / which, daemon=DaemonSpec(), jobs={"a": spec}, queues={name: queue})
        )

    with trio.fail_after(50):
        async with daemon("one") as one:
            async with daemon("two"):
                await until(4)
            seen = len(handled)
            await until(seen + 2)
            assert {which for _, which in handled[-1:]} == {"one"}
            await one.stop("a")
    ids = [id for id, _ in handled]
    assert len(ids) == len(set(ids))
    moments = sorted(datetime.datetime.fromisoformat(id.partition("@")[2]) for id in ids)
    assert {(later - before).total_seconds() for before, later in pairwise(moments)} == {1.0}
