"""Items of process jobs are checked before they are put, beside a worker, whoever puts them."""

from __future__ import annotations

import itertools
import json
import os
import signal
from textwrap import dedent
from typing import Any

import pytest
import structlog.testing
import trio
from control_serving import peer
from house import House, alive, open_house, open_worker
from test_items import queueing

from supervisor.errors import UnfitItem, WorkerLost
from supervisor.kinds import process_channel, process_check

numbers = itertools.count()

IMAGE = """
import msgspec, os, time
class Image(msgspec.Struct):
    path: str
"""


@pytest.fixture
async def house(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    async with open_house(tmp_path / "logs") as house:
        yield house


def code_of(directory: Any, code: str) -> str:
    name = f"checked_{next(numbers)}"
    (directory / f"{name}.py").write_text(dedent(IMAGE) + dedent(code))
    return f"{name}:f"


def process(house: House, code: str, **spec: Any) -> Any:
    """A worker whose function is the `f` of this code."""
    return open_worker(house, **{"kind": "process", "call": code_of(house.logs.parent, code), **spec})


def items(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def checkers(house: House, worker: Any) -> list[int]:
    """The processes beside that of the worker."""
    return [pid for pid in house.resources.children._spawned if pid != worker.notes.pid]


async def gone(pid: int) -> None:
    while alive(pid):
        await trio.sleep(0.01)


async def test_it_says_what_the_worker_would_say(house):
    async with process(house, "def f(image: Image): return image.path") as worker:
        check = worker.handler.check
        await check(items({"path": "a"}))
        for position, bad in ((0, {"path": 1}), (2, "x")):
            given = [{"path": "a"}] * 4
            given[position] = bad
            with pytest.raises(UnfitItem) as caught:
                await check(items(*given))
            assert caught.value.position == position
            with pytest.raises(UnfitItem) as said:
                await worker(bad)
            assert str(caught.value) == str(said.value)
        assert await worker({"path": "a"}) == "a"


async def test_there_is_one_process_for_all_checks_and_it_ends_with_the_worker(house):
    async with process(house, "def f(image: Image): pass") as worker:
        assert checkers(house, worker) == []
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(worker.handler.check, items({"path": "a"}))
        (pid,) = checkers(house, worker)
        await worker.handler.check(items({"path": "a" * 1_000_000}, {"path": "b"}))
        assert checkers(house, worker) == [pid]
        assert alive(pid)
    assert not alive(pid)


async def test_it_answers_while_the_worker_lets_nothing_else_run(house):
    code = """
    import ctypes
    def f(image: Image):
        ctypes.PyDLL(None).sleep(1000)  # holds the lock of the interpreter
    """
    with pytest.raises(WorkerLost):
        async with process(house, code) as worker, trio.open_nursery() as nursery:
            nursery.start_soon(worker, {"path": "a"})
            with pytest.raises(UnfitItem):
                await worker.handler.check(items(1))
            nursery.cancel_scope.cancel(reason="seen")


async def test_each_item_of_a_batch_is_checked_by_itself(house):
    async with process(house, "def f(images: list[Image]): pass", batch={"size": 3}) as worker:
        await worker.handler.check(items({"path": "a"}))
        with pytest.raises(UnfitItem, match="expected `object`, got `int`"):
            await worker.handler.check(items({"path": "a"}, 1))


@pytest.mark.parametrize("parameter", ["item", "item: object"])
async def test_a_function_that_takes_anything_costs_no_process(house, parameter):
    async with process(house, f"def f({parameter}): return item") as worker:
        await worker.handler.check(items(1, "x", None))
        assert checkers(house, worker) == []


async def test_it_runs_as_the_worker_does(house, tmp_path):
    code = """
    class Mine(msgspec.Struct):
        def __post_init__(self):
            raise ValueError(f"{os.getcwd()} {os.environ['WORD']} {os.nice(0)} {os.environ['SUPERVISOR_JOB']}")
    def f(item: Mine): pass
    """
    (tmp_path / "here").mkdir()
    keys = {"cwd": str(tmp_path / "here"), "env": {"WORD": "w"}, "nice": 3}
    async with process(house, code, **keys) as worker:
        with pytest.raises(UnfitItem, match=f"{tmp_path}/here w 3 job"):
            await worker.handler.check(items({}))


async def test_without_checks_it_ends_and_the_next_one_starts_it_again(house, monkeypatch):
    monkeypatch.setattr(process_check, "IDLE", 1.0)
    async with process(house, "def f(image: Image): pass") as worker:
        await worker.handler.check(items({"path": "a"}))
        (pid,) = checkers(house, worker)
        await gone(pid)
        with pytest.raises(UnfitItem), structlog.testing.capture_logs() as logs:
            await worker.handler.check(items(1))
        assert checkers(house, worker) != [pid]
        assert logs == []


# ---- what cannot be asked is taken ----


async def unchecked(worker: Any, why: str) -> None:
    """Nothing is refused, and nobody waits, until it is tried again."""
    with structlog.testing.capture_logs() as logs:
        await worker.handler.check(items(1))
        start = trio.current_time()
        for _ in range(100):
            await worker.handler.check(items(1))
        assert trio.current_time() < start + process_check.PATIENCE
    (log,) = [each for each in logs if "unchecked" in each["event"]]
    assert why in log["reason"] and log["job"] == "job"


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ("raise ValueError('not twice')", "ValueError: not twice"),
        ("os._exit(3)", "its process has ended: exited with code 3"),
        ("os.kill(os.getpid(), 11)", "its process has ended: killed by SIGSEGV"),
    ],
)
async def test_where_its_code_does_not_load_a_second_time(house, tmp_path, second, why):
    code = f"""
    if os.path.exists("{tmp_path}/once"): {second}
    open("{tmp_path}/once", "w").close()
    def f(image: Image): return image.path
    """
    async with process(house, code) as worker:
        await unchecked(worker, why)
        assert await worker({"path": "a"}) == "a"


async def test_where_there_is_no_process_to_be_had(house, monkeypatch):
    async with process(house, "def f(image: Image): pass") as worker:
        monkeypatch.setattr(process_channel, "PROGRAM", ("/no/such/python", *process_channel.PROGRAM[1:]))
        await unchecked(worker, "/no/such/python")


async def test_where_it_is_killed(house):
    code = """
    class Mine(msgspec.Struct):
        def __post_init__(self): os.kill(os.getpid(), 9)
    def f(item: Mine | None): return item
    """
    async with process(house, code) as worker:
        with structlog.testing.capture_logs() as logs:
            await worker.handler.check(items(None, {}))
        assert [log["reason"] for log in logs] == ["its process has ended: killed by SIGKILL"]
        assert await worker(None) is None


async def test_where_it_does_not_answer(house, monkeypatch):
    monkeypatch.setattr(process_check, "PATIENCE", 1.0)
    code = """
    class Mine(msgspec.Struct):
        def __post_init__(self): time.sleep(1000)
    def f(item: Mine | None): return item
    """
    async with process(house, code) as worker:
        while True:  # on a machine where an interpreter takes its time to start
            await worker.handler.check(items(None))
            if worker.handler.checker._process._loaded.is_set():
                break
        (pid,) = checkers(house, worker)
        with structlog.testing.capture_logs() as logs:
            await worker.handler.check(items({}))
        assert [log["reason"] for log in logs] == ["no answer within 1 s"]
        await gone(pid)


async def test_who_comes_while_its_code_takes_long_to_load_is_not_kept_waiting(house, monkeypatch, tmp_path):
    monkeypatch.setattr(process_check, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "gate")
    code = f"""
    if os.path.exists("{tmp_path}/once"): open("{tmp_path}/gate").read()
    open("{tmp_path}/once", "w").close()
    def f(image: Image): pass
    """
    async with process(house, code) as worker:
        await worker.handler.check(items(1))
        (pid,) = checkers(house, worker)
        await worker.handler.check(items(1))
        await trio.to_thread.run_sync((tmp_path / "gate").write_text, "")
        await worker.handler.checker._process._loaded.wait()
        monkeypatch.setattr(process_check, "PATIENCE", 60)
        with pytest.raises(UnfitItem):
            await worker.handler.check(items(1))
        assert checkers(house, worker) == [pid]


async def test_a_check_that_is_cancelled_leaves_it_well(house):
    async with process(house, "def f(image: Image): pass") as worker:
        await worker.handler.check(items({"path": "a"}))
        for _ in range(50):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(worker.handler.check, items({"path": "a"}))
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel(reason="no more wanted")
        with pytest.raises(UnfitItem):
            await worker.handler.check(items(1))


async def test_it_ends_when_the_process_of_its_worker_dies(house):
    with pytest.raises(WorkerLost, match="its process has ended"):
        async with process(house, "def f(image: Image): pass") as worker:
            await worker.handler.check(items({"path": "a"}))
            (pid,) = checkers(house, worker)
            os.kill(worker.notes.pid, signal.SIGKILL)
            await trio.sleep_forever()
    assert not alive(pid)


# ---- in a tree ----


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A queue whose job runs in processes, and others that put into it."""
    monkeypatch.syspath_prepend(tmp_path)
    call = code_of(tmp_path, "def f(image: Image, ctx: 'Context'): return image.path")
    puts = code_of(tmp_path, "def f(queue: str, ctx: 'Context'): ctx.put(queue, {'path': 1})")
    gives = code_of(tmp_path, "def f(item): return {'path': item}")
    return {
        "resize": {"call": call, "kind": "process", "queue": "images", "retry": {"attempts": 1}},
        "puts": {"call": puts, "once": True, "start": "manual", "args": {"queue": "images"}},
        "gives": {"call": gives, "queue": "other", "into": "images", "retry": {"attempts": 1}},
    }


async def test_submit_is_refused_before_anything_is_stored(tmp_path, jobs):
    async with queueing(tmp_path, jobs=jobs) as (_, path), peer(path) as client:
        error = (await client.ask("submit", {"queue": "images", "items": [{"path": "a"}, {"path": 7}]}))["error"]
        assert error["data"] == {"stored": 0, "bad": 1}
        assert error["message"].startswith("item 2 of 2: the item is not what `image` of f takes: expected `str`, got `int`")
        assert error["message"].endswith("(job resize)")
        answer = await client.ask("submit", {"queue": "images", "items": [{"path": "a"}], "result": True})
        assert answer["result"][0]["ended"]["result"] == "a"


async def test_with_several_workers_one_is_asked_and_another_when_that_is_gone(tmp_path, jobs):
    jobs["resize"]["workers"] = 3
    async with queueing(tmp_path, jobs=jobs) as (tree, path), peer(path) as client:

        async def asked() -> str:
            assert "error" in await client.ask("submit", {"queue": "images", "items": [1]})
            workers = [each for each in tree.nodes["resize"].children.values() if each.pool is not None]
            (node,) = [each for each in workers if each.pool.handler.checker.awake]
            return node.name

        first = await asked()
        assert await asked() == first
        await client.ask("stop", {"names": [first]})
        assert await asked() != first
        await client.ask("restart", {"names": ["resize"]})
        await asked()


async def test_what_is_put_while_there_is_no_worker_is_taken(tmp_path, jobs):
    async with queueing(tmp_path, jobs=jobs) as (_, path), peer(path) as client:
        await client.ask("stop", {"names": ["resize"]})
        (done,) = (await client.ask("submit", {"queue": "images", "items": [1]}))["result"]
        await client.ask("start", {"names": ["resize"]})
        (ended,) = (await client.ask("queue.wait", {"ids": [done["id"]]}))["result"]
        assert ended["state"] == "dead" and "expected `object`, got `int`" in ended["error"]


async def test_what_a_job_puts_is_checked_too(tmp_path, jobs):
    async with queueing(tmp_path, jobs=jobs) as (_, path), peer(path) as client:
        (answer,) = (await client.ask("run-now", {"names": ["puts"]}))["result"]
        assert not answer["ok"] and "BadItem: the item is not what `image` of f takes" in answer["text"]


async def test_what_a_job_gives_to_the_next_is_checked_too(tmp_path, jobs):
    async with queueing(tmp_path, jobs=jobs) as (_, path), peer(path) as client:
        answer = await client.ask("submit", {"queue": "other", "items": ["a", 1], "result": True})
        good, bad = [each["ended"] for each in answer["result"]]
        assert (good["state"], bad["state"]) == ("done", "dead")
        assert bad["error"].startswith("queue images does not take what it gives: the item is not what `image` of f takes")
