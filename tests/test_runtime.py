"""What may run where: jobs written on anyio, values that may not cross threads, and the kinds side by side."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio

from supervisor.events import Ended, Killing
from supervisor.kinds import Context, JobSpec
from supervisor.state import Phase
from tests.forest import SIXTY, Forest, forest, job, serve

# -- anyio: a job that is written on it runs unchanged, as a task and in asyncio -------------------------------------------


async def numbers(send: Any) -> None:
    async with send:
        for number in range(5):
            await send.send(number)


def squared(number: int) -> tuple[int, str]:
    """Work that blocks, off the loop."""
    return number * number, threading.current_thread().name


async def pipeline(results: list[Any]) -> None:
    """A task group, a memory stream, a timeout and a thread, all of anyio's."""
    send, receive = anyio.create_memory_object_stream[int](1)
    async with anyio.create_task_group() as tasks, receive:
        tasks.start_soon(numbers, send)
        async for number in receive:
            value, thread = await anyio.to_thread.run_sync(squared, number)
            assert thread != threading.current_thread().name
            results.append(value)
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep_forever()
        results.append(scope.cancelled_caught)


async def group_that_fails() -> None:
    async def fail() -> None:
        raise ValueError("boom")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        tasks.start_soon(anyio.sleep_forever)


async def serving(up: threading.Event, log: list[str]) -> None:
    """A service that hears nothing: it is cancelled, and cleans up in anyio's way."""

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            log.append("child cancelled")
            raise

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            up.set()
            await anyio.to_thread.run_sync(lambda: None)
            await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)
            log.append("cleaned up")


KINDS = pytest.mark.parametrize("kind", ["task", "asyncio"])


@KINDS
async def test_a_job_on_anyio_runs_unchanged(tmp_path, kind):
    results: list[Any] = []
    async with forest(tmp_path, {"a": job(pipeline, kind=kind, once=True, args={"results": results})}) as f:
        await f.tree.wait_running()
        assert results == [0, 1, 4, 9, 16, True]
        assert f.words() == "a:completed"


@KINDS
async def test_its_failure_is_the_jobs(tmp_path, kind):
    async with forest(tmp_path, {"a": job(group_that_fails, kind=kind, once=True, start="manual", backoff=SIXTY)}) as f:
        await f.tree.order("run-now", ["a"])[0].wait()
        assert f.tree.status("a")[0].exit.reason == "ValueError: boom"


@KINDS
async def test_it_is_cancelled_when_it_is_stopped_and_cleans_up(tmp_path, kind):
    up, log = threading.Event(), list[str]()
    async with forest(tmp_path, {"a": job(serving, kind=kind, args={"up": up, "log": log}, grace=1000)}) as f:
        await trio.to_thread.run_sync(up.wait)
        await f.tree.stop("a")
        assert log == ["child cancelled", "cleaned up"]
        assert f.happened(Killing) == []


@KINDS
async def test_the_ladder_cancels_it_after_its_grace(tmp_path, kind):
    up, log = threading.Event(), list[str]()
    async with forest(tmp_path, {"a": job(serving, kind=kind, args={"up": up, "log": log}, once=True, grace=0.01)}) as f:
        await trio.to_thread.run_sync(up.wait)
        await f.tree.stop("a")
        assert log == ["child cancelled", "cleaned up"]
        assert len(f.happened(Killing)) == len(f.happened(Ended)) == 1


# -- values that may not cross threads -------------------------------------------------------------------------------------


async def once(tmp_path: Any, call: Any, **keys: Any) -> tuple[Any, Forest]:
    async with forest(tmp_path, {"a": job(call, start="manual", once=True, backoff=SIXTY, **keys)}) as f:
        await f.tree.order("run-now", ["a"])[0].wait()
        return f.tree.status("a")[0], f


async def test_trio_called_from_a_thread_says_what_is_wrong(tmp_path):
    """Trio's objects belong to its thread, and where they need the loop they say so."""
    send, _ = trio.open_memory_channel[int](1)

    def careless() -> None:
        with trio.fail_after(1):
            send.send_nowait(1)

    row, _ = await once(tmp_path, careless)
    assert row.exit.reason == "RuntimeError: must be called from async context"


async def test_trio_called_from_asyncio_says_what_is_wrong(tmp_path):
    async def careless() -> None:
        await trio.sleep(1)

    row, _ = await once(tmp_path, careless, kind="asyncio")
    assert row.exit.reason == "RuntimeError: must be called from async context"


async def test_asyncio_called_from_a_task_says_what_is_wrong(tmp_path):
    async def careless() -> None:
        await asyncio.sleep(1)

    row, _ = await once(tmp_path, careless)
    assert row.exit.reason == "RuntimeError: no running event loop"


async def test_the_way_across_is_from_thread_and_the_context(tmp_path):
    """What a thread has done is seen by the loop only by way of these; both run in the loop's own thread."""
    loop = threading.get_ident()
    seen: list[Any] = []

    def careful(ctx: Context) -> None:
        seen.append(trio.from_thread.run_sync(threading.get_ident) == loop)
        seen.append(trio.from_thread.run(trio.sleep, 0))
        seen.append((ctx.stopping, ctx.phase))

    row, _ = await once(tmp_path, careful)
    assert (row.word, seen) == ("completed", [True, None, (False, Phase.RUNNING)])


# -- side by side ----------------------------------------------------------------------------------------------------------


async def test_blocking_code_in_a_thread_does_not_hold_up_a_task(tmp_path):
    """The thread ends only when the task, beside it in the loop, has got on."""
    steps: list[int] = []
    enough = threading.Event()

    async def io() -> None:
        for step in range(100):
            await trio.sleep(0)
            steps.append(step)
        enough.set()

    def blocking() -> None:
        assert enough.wait(30)

    async def hosted() -> None:
        await asyncio.to_thread(enough.wait, 30)

    jobs = {
        "blocking": job(blocking, once=True),
        "hosted": job(hosted, once=True, kind="asyncio"),
        "io": job(io, once=True),
        "command": JobSpec(command=("true",), once=True, output="null"),
        "service": job(serve),
    }
    async with forest(tmp_path, jobs) as f:
        await f.tree.wait_running()
        assert [row.kind for row in f.tree.status()] == ["thread", "asyncio", "task", "command", "task"]
        assert f.words() == "blocking:completed hosted:completed io:completed command:completed service:running"


async def test_threads_have_the_names_of_their_runs(tmp_path):
    names: list[str] = []
    up = threading.Barrier(4)

    def note(ctx: Context) -> None:
        names.append(threading.current_thread().name)
        up.wait(30)

    async def note_in_asyncio() -> None:
        names.append(threading.current_thread().name)
        await asyncio.to_thread(up.wait, 30)

    jobs = {"a": job(note, once=True), "b": job(note_in_asyncio, once=True, kind="asyncio")}
    async with forest(tmp_path, {**jobs, "c": job(note, workers=2)}) as f:
        await f.tree.wait_running()
        assert {"a#1", "b#1", "c:0#1", "c:1#1"} <= {*names}
        up.abort()  # who is in its second life by now waits for nobody
