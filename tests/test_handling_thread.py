"""What the worker of a queue job of kind `thread` does with an item. Real threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio
from house import open_house, open_worker

from supervisor.errors import UnfitItem, WorkerLost
from supervisor.kinds import Context
from supervisor.state import Phase


@pytest.fixture
async def house(tmp_path):
    async with open_house(tmp_path / "logs") as house:
        yield house


@pytest.fixture
def go():
    """Lets threads go, however the test ends."""
    event = threading.Event()
    yield event
    event.set()


async def test_all_calls_are_made_in_one_thread_that_ends_with_the_worker(house):
    mine = threading.local()
    threads = []

    def handle(item: int) -> int:
        threads.append(threading.current_thread())
        mine.calls = getattr(mine, "calls", 0) + 1
        return mine.calls * item

    async with open_worker(house, kind="thread", call=handle) as worker:
        assert [await worker(10) for _ in range(3)] == [10, 20, 30]
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()


async def test_the_context_blocks_there_and_knows_the_item(house):
    def handle(item: int, ctx: Context) -> Any:
        ctx.progress(item, 2)
        ctx.wait_stopping()
        return [ctx.item, ctx.attempt, ctx.stopping]

    async with open_worker(house, kind="thread", call=handle) as worker:
        work = worker.work(attempt=2)

        worker.notes.on_progress = lambda: work.advance(Phase.STOPPING)
        assert await worker.handler.handle(work, b"1") == b'["item1",2,true]'
        assert worker.notes.far == [(1, 2)]


async def test_what_it_raises_and_what_does_not_fit(house):
    def bad(item: int) -> Any:
        raise SystemExit(3) if item else KeyError(item)

    async with open_worker(house, kind="thread", call=bad) as worker:
        with pytest.raises(KeyError):
            await worker(0)
        with pytest.raises(SystemExit):
            await worker(1)
        with pytest.raises(UnfitItem):
            await worker("a")


async def test_what_is_no_json_is_a_failure(house):
    async with open_worker(house, kind="thread", call=lambda item: object()) as worker:
        with pytest.raises(TypeError, match="the function returned what is no JSON"):
            await worker(0)


async def test_it_may_speak_to_trio_from_there(house):
    def ask(item: float) -> float:
        return trio.from_thread.run_sync(lambda: item)

    async with open_worker(house, kind="thread", call=ask) as worker:
        assert await worker(2.5) == 2.5


async def test_a_call_that_is_abandoned_is_the_last_of_its_worker(house, go):
    def stuck(item: Any) -> None:
        go.wait()

    async with open_worker(house, kind="thread", call=stuck) as worker:
        with trio.move_on_after(0.01) as abandoned:
            await worker(1)
        assert abandoned.cancelled_caught
        with pytest.raises(WorkerLost, match="thread job#1 does not end, and a thread cannot be killed"):
            await worker(2)
    assert not go.is_set()  # and nobody has waited for it


async def test_the_end_of_the_worker_waits_for_its_thread(house):
    alive = []

    def note(item: Any) -> None:
        alive.append(threading.current_thread().name)

    async with open_worker(house, kind="thread", call=note) as worker:
        await worker(1)
        named = [thread.name for thread in threading.enumerate()]
        assert alive == ["job#1"] and "job#1" in named
    assert "job#1" not in [thread.name for thread in threading.enumerate()]  # Trio keeps it, under another name
