"""What the worker of a queue job of kind `asyncio` does with an item. A real loop in a real thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import trio
from house import open_house, open_worker

from supervisor.errors import RunFailed, UnfitItem
from supervisor.kinds import Context
from supervisor.state import Phase


@pytest.fixture
async def house(tmp_path):
    async with open_house(tmp_path / "logs") as house:
        yield house


class Tell:
    """Tells Trio's thread, from that of the loop."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.event = trio.Event()

    def __call__(self) -> None:
        self._token.run_sync_soon(self.event.set)


async def test_all_calls_are_made_in_one_loop_that_ends_with_the_worker(house):
    loops, left = [], []

    async def background() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            left.append("cancelled")

    async def handle(item: int, word: str) -> Any:
        loops.append(asyncio.get_running_loop())
        left.append(asyncio.create_task(background()))
        await asyncio.sleep(0)
        return [item, word]

    async with open_worker(house, kind="asyncio", call=handle, args={"word": "w"}) as worker:
        assert [await worker(n) for n in range(2)] == [[0, "w"], [1, "w"]]
        assert len(set(loops)) == 1 and not loops[0].is_closed()
    assert loops[0].is_closed() and left[2:] == ["cancelled", "cancelled"]


async def test_the_context_is_awaited_there_and_knows_the_item(house):
    async def handle(item: int, ctx: Context) -> Any:
        ctx.progress(item, 2)
        await ctx.wait_stopping()
        return [ctx.item, ctx.attempt, ctx.stopping]

    async with open_worker(house, kind="asyncio", call=handle) as worker:
        work = worker.work(attempt=2)
        worker.notes.on_progress = lambda: work.advance(Phase.STOPPING)
        assert await worker.handler.handle(work, b"1") == b'["item1",2,true]'
        assert worker.notes.far == [(1, 2)]


async def test_nothing_that_it_raises_ends_the_loop(house):
    raised = [KeyError(0), SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()]

    async def bad(item: int) -> Any:
        if item == 5:
            return object()
        raise raised[item]

    async with open_worker(house, kind="asyncio", call=bad) as worker:
        for item, error in enumerate((KeyError, SystemExit, RunFailed, RunFailed, GeneratorExit, TypeError)):
            with pytest.raises(error):
                await worker(item)
        with pytest.raises(UnfitItem):
            await worker("a")


async def test_cancelled_it_is_cancelled_and_waited_for(house):
    tell, ended = Tell(), []

    async def handle(item: Any) -> None:
        tell()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            ended.append(threading.current_thread().name)

    async with open_worker(house, kind="asyncio", call=handle) as worker:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker)
            await tell.event.wait()
            nursery.cancel_scope.cancel(reason="test")
        assert ended == ["job#1"]


async def test_one_that_hears_nothing_is_cancelled_when_it_is_overdue(house):
    tell = Tell()

    async def handle(item: Any) -> None:
        tell()
        await asyncio.sleep(3600)

    async with open_worker(house, kind="asyncio", call=handle) as worker, trio.open_nursery() as nursery:
        work, failed = worker.work(), []

        async def call() -> None:
            with pytest.raises(RunFailed) as caught:
                await worker.handler.handle(work, b"1")
            failed.append(str(caught.value))

        nursery.start_soon(call)
        await tell.event.wait()
        work.overdue = True
        work.advance(Phase.STOPPING)
        await trio.testing.wait_all_tasks_blocked()
    assert failed == ["CancelledError"]


async def test_the_worker_cancelled_leaves_nothing(house):
    tell, ended = Tell(), []

    async def handle(item: Any) -> None:
        tell()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(asyncio.get_running_loop())

    with trio.CancelScope() as scope:
        async with open_worker(house, kind="asyncio", call=handle) as worker, trio.open_nursery() as nursery:
            nursery.start_soon(worker)
            await tell.event.wait()
            scope.cancel(reason="test")
            await trio.sleep_forever()
    assert ended[0].is_closed()


async def test_what_does_not_end_is_given_up_when_the_tree_says_so(house):
    tell, go = Tell(), threading.Event()

    async def handle(item: Any) -> None:
        tell()
        go.wait()

    with trio.CancelScope() as scope:
        async with open_worker(house, kind="asyncio", call=handle) as worker, trio.open_nursery() as nursery:
            nursery.start_soon(worker)
            await tell.event.wait()
            scope.cancel(reason="test")
            worker.run.abandoned.set()
            await trio.sleep_forever()
    go.set()
