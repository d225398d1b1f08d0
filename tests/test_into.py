"""`into`: what a job returns, yields or prints is put into a queue. In virtual time, on queues in memory."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.events import Ended, RoomFound, WaitingForRoom
from supervisor.kinds import Context, JobSpec, chain
from supervisor.policies import RetrySpec
from supervisor.queues.protocol import Draft, State, new_id
from supervisor.queues.spec import BatchSpec, QueueSpec
from supervisor.spec import RestartType, Seconds
from supervisor.streams import Stream
from tests.forest import Forest, forest, job, settle

TEMPORARY = RestartType.TEMPORARY
MEMORY = {"q": QueueSpec(backend="memory"), "from": QueueSpec(backend="memory")}


def planted(base: Path, jobs: dict[str, JobSpec], queues: dict[str, QueueSpec] | None = None, **keys: Any) -> Any:
    """A forest with queues."""
    return forest(base, jobs, queues=MEMORY if queues is None else queues, **keys)


async def waiting(f: Forest, queue: str = "q") -> list[Any]:
    """What waits in a queue, in its order."""
    return [msgspec.json.decode(record.payload) for record in await f.tree.queues.engine(queue).peek(State.WAITING, 1000)]


async def taken(f: Forest, queue: str = "q") -> Any:
    """The first of a queue, taken out of it."""
    claimed = await f.tree.queues.engine(queue).claim(1, owner="test", attempts=5)
    await wait_all_tasks_blocked()
    return msgspec.json.decode(claimed.items[0].payload)


def giving(value: Any) -> Callable[[], Any]:
    async def give() -> Any:
        return value

    return give


# ---- what becomes an item ----


@pytest.mark.parametrize(
    ("value", "items"), [(None, []), (1, [1]), ("a", ["a"]), ([1, 2], [[1, 2]]), ([], [[]]), ({"a": None}, [{"a": None}])]
)
async def test_a_return_value_is_one_item_a_list_too_and_none_is_none(autojump_clock, tmp_path, value, items):
    async with planted(tmp_path, {"a": job(giving(value), once=True, into="q")}) as f:
        await f.tree.wait_running()
        assert await waiting(f) == items


async def test_each_yield_is_put_at_once(autojump_clock, tmp_path):
    async def count() -> AsyncIterator[int]:
        for number in (1, 2, 3):
            yield number
            await trio.sleep(10)

    async with planted(tmp_path, {"a": job(count, once=True, into="q")}) as f:
        await settle()
        assert await waiting(f) == [1]
        await trio.sleep(15)
        assert await waiting(f) == [1, 2]
        await f.tree.wait_running()
        assert await waiting(f) == [1, 2, 3]


async def test_none_among_what_is_yielded_is_nothing(autojump_clock, tmp_path):
    async def some() -> AsyncIterator[int | None]:
        yield 1
        yield None
        yield 2

    async with planted(tmp_path, {"a": job(some, once=True, into="q")}) as f:
        await f.tree.wait_running()
        assert await waiting(f) == [1, 2]


async def test_a_plain_generator_yields_from_its_thread_and_what_it_returns_comes_last(tmp_path):
    def count(upto: int) -> Iterator[int]:
        yield from range(upto)
        return "the end"

    async with planted(tmp_path, {"a": job(count, args={"upto": 3}, once=True, into="q")}) as f:
        with trio.fail_after(60):
            await f.tree.wait_running()
        assert f.tree.status("a")[0].kind == "thread"
        assert await waiting(f) == [0, 1, 2, "the end"]


async def test_what_a_plain_function_returns_is_put(tmp_path):
    async with planted(tmp_path, {"a": job(lambda: {"b": 1}, once=True, into="q")}) as f:
        with trio.fail_after(60):
            await f.tree.wait_running()
        assert await waiting(f) == [{"b": 1}]


async def test_a_stream_is_opened_where_the_function_is_annotated_to_return_one(autojump_clock, tmp_path):
    def squares(upto: int) -> Stream[int]:
        return Stream(range(upto)).map(lambda number: number * number)

    async def later(upto: int) -> Stream[int]:
        await trio.sleep(1)
        return squares(upto)

    jobs = {"a": job(squares, args={"upto": 3}, once=True, into="q"), "b": job(later, args={"upto": 2}, once=True, into="from")}
    async with planted(tmp_path, jobs) as f:
        await f.tree.wait_running()
        assert f.tree.status("a")[0].kind == "task"
        assert (await waiting(f), await waiting(f, "from")) == ([0, 1, 4], [0, 1])


async def test_a_schedule_puts_what_each_run_returns(autojump_clock, tmp_path):
    async with planted(tmp_path, {"a": job(giving("tick"), every=10, into="q")}) as f:
        await trio.sleep(35)
        assert await waiting(f) == ["tick"] * 3


async def test_a_service_puts_what_it_yields_and_what_it_returns_is_its_end(autojump_clock, tmp_path):
    async def feed(ctx: Context) -> AsyncIterator[int]:
        number = 0
        while await ctx.sleep(10):
            yield (number := number + 1)

    async with planted(tmp_path, {"a": job(feed, into="q"), "b": job(giving("end"), into="from", restart=TEMPORARY)}) as f:
        await trio.sleep(35)
        assert f.word("a") == "running"
        await f.tree.stop("a")
        assert (await waiting(f), await waiting(f, "from")) == ([1, 2, 3], [])


async def test_a_generator_that_hears_nothing_is_ended_and_cleans_up(autojump_clock, tmp_path):
    closed = []

    async def feed() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await trio.sleep(10)
        finally:
            closed.append(trio.current_time())

    async with planted(tmp_path, {"a": job(feed, into="q")}) as f:
        await trio.sleep(5)
        at = trio.current_time()
        await f.tree.stop("a")
        assert (closed, await waiting(f)) == ([at], [1])


# ---- what does not ----


async def test_only_what_the_successful_attempt_returns_is_put_and_what_was_yielded_before_stays(autojump_clock, tmp_path):
    attempts = []

    async def unlucky() -> AsyncIterator[str]:
        attempts.append(1)
        yield f"of attempt {len(attempts)}"
        if len(attempts) < 3:
            raise RuntimeError("boom")

    async def late() -> str:
        attempts.append(1)
        if len(attempts) < 6:
            raise RuntimeError("boom")
        return "at last"

    retry = RetrySpec(attempts=3, initial=Seconds(1))
    async with planted(tmp_path, {"a": job(unlucky, once=True, into="q", retry=retry)}) as f:
        await f.tree.wait_running()
        assert await waiting(f) == ["of attempt 1", "of attempt 2", "of attempt 3"]
    async with planted(tmp_path, {"a": job(late, once=True, into="q", retry=retry)}) as f:
        await f.tree.wait_running()
        assert await waiting(f) == ["at last"]


async def test_what_its_fallback_returns_is_what_the_run_returned(autojump_clock, tmp_path):
    async def bad() -> str:
        raise RuntimeError("boom")

    async with planted(tmp_path, {"a": job(bad, once=True, into="q", fallback=giving("plan b"))}) as f:
        await f.tree.wait_running()
        assert await waiting(f) == ["plan b"]


async def test_what_is_no_json_fails_the_run_and_says_so(autojump_clock, tmp_path):
    async def stranger() -> AsyncIterator[object]:
        yield object()

    jobs = {"a": job(giving(object()), once=True, into="q"), "b": job(stranger, once=True, into="q")}
    jobs = {name: msgspec.structs.replace(spec, restart=TEMPORARY) for name, spec in jobs.items()}
    async with planted(tmp_path, jobs) as f:
        await trio.sleep(1)
        assert (f.word("a"), f.word("b")) == ("failed", "failed")
        assert "the function returned what is no JSON" in f.tree.status("a")[0].exit.reason
        assert f.tree.status("b")[0].exit.reason.startswith("queue q does not take what it gives: ")


async def test_a_generator_without_into_is_refused(autojump_clock, tmp_path):
    async def lost() -> AsyncIterator[int]:
        yield 1

    async with planted(tmp_path, {"a": job(lost, once=True, restart=TEMPORARY)}) as f:
        await trio.sleep(1)
        assert f.tree.status("a")[0].exit.reason.endswith(
            "lost: what it yields would go nowhere: name the queue that gets it in `into`"
        )


# ---- a queue that is full ----


async def test_a_full_queue_makes_it_wait_and_that_is_seen(autojump_clock, tmp_path):
    async def count(ctx: Context) -> AsyncIterator[int]:
        for number in range(4):
            yield number
        await ctx.wait_stopping()

    async with planted(tmp_path, {"a": job(count, into="q")}, {"q": QueueSpec(backend="memory", size=2)}) as f:
        await trio.sleep(5)
        assert f.tree.status("a")[0].cause == "waits for room in queue q"
        assert [await taken(f) for _ in range(4)] == [0, 1, 2, 3]
        assert [(at, event.queue) for at, event in f.history if isinstance(event, WaitingForRoom)] == [(1.0, "q")]
        assert len(f.events(RoomFound)) == 1
        assert f.tree.status("a")[0].cause == "queue q has taken what it gave"


async def test_a_short_wait_for_room_is_not_told(autojump_clock, tmp_path):
    async def count() -> AsyncIterator[int]:
        yield 1
        yield 2

    async with planted(tmp_path, {"a": job(count, once=True, into="q")}, {"q": QueueSpec(backend="memory", size=1)}) as f:
        await trio.sleep(0.5)
        await taken(f)
        await f.tree.wait_running()
        assert f.events(WaitingForRoom) == []


async def test_a_run_is_over_only_when_what_it_returned_is_put(autojump_clock, tmp_path):
    jobs = {"a": job(giving(1), once=True, into="q"), "b": job(giving(2), once=True, into="q", after=("a",))}
    async with planted(tmp_path, jobs, {"q": QueueSpec(backend="memory", size=1)}) as f:
        await trio.sleep(100)
        assert f.words("a", "b") == "a:completed b:running"
        await taken(f)
        await f.tree.wait_running()
        assert f.words("a", "b") == "a:completed b:completed"


async def test_one_that_is_killed_while_its_result_waits_has_not_succeeded(autojump_clock, tmp_path):
    jobs = {"a": job(giving(1), once=True, into="q"), "b": job(giving(2), once=True, into="q", after=("a",), grace=5)}
    async with planted(tmp_path, jobs, {"q": QueueSpec(backend="memory", size=1)}) as f:
        await trio.sleep(100)
        await f.tree.stop("b")
        assert await waiting(f) == [1]
    [event] = [event for event in f.events(Ended) if event.name == "b"]
    assert (event.exit.reason, event.failed) == ("killed before queue q had taken what it returned", False)


async def test_a_thread_that_waits_for_room_ends_when_it_is_killed(tmp_path):
    def count() -> Iterator[int]:
        yield from range(3)

    async with planted(tmp_path, {"a": job(count, into="q", grace=0.1)}, {"q": QueueSpec(backend="memory", size=1)}) as f:
        waits = trio.Event()
        f.tree.journal.add_sink(lambda event: waits.set() if isinstance(event, WaitingForRoom) else None)
        with trio.fail_after(60):
            await waits.wait()
            await f.tree.stop("a")
        assert f.word("a") == "stopped"


async def test_while_the_daemon_ends_a_run_still_hands_on_and_the_next_daemon_finds_it(tmp_path):
    async def last(ctx: Context) -> AsyncIterator[str]:
        yield "first"
        await ctx.wait_stopping()
        yield "last"

    async def returned(ctx: Context) -> str:
        await ctx.wait_stopping()
        return "returned"

    durable = {"q": QueueSpec(backend="sqlite")}
    jobs = {"a": job(last, once=True, into="q"), "b": job(returned, once=True, into="q")}
    with trio.fail_after(60):
        async with planted(tmp_path, jobs, durable) as f:
            while await waiting(f) != ["first"]:
                await f.tree.queues.engine("q").wait_for_work()
        async with planted(tmp_path, {}, durable) as f:
            assert sorted(await waiting(f)) == ["first", "last", "returned"]


# ---- commands: each line is an item ----


def command(*words: str, **keys: Any) -> JobSpec:
    return JobSpec(command=words, into="q", **keys)


async def test_each_line_of_a_command_is_an_item_of_json_that_value_else_a_string(tmp_path):
    lines = '{"a": [1, null]}', "plain", "", " 12 ", "null", "NaN", '"text"', "last, without an end"
    (tmp_path / "lines").write_text("\n".join(lines))
    async with planted(tmp_path, {"a": command("sh", "-c", "cat lines; echo >&2 aside", once=True)}) as f:
        with trio.fail_after(60):
            await f.tree.wait_running()
        assert await waiting(f) == [{"a": [1, None]}, "plain", 12, "NaN", "text", "last, without an end"]
        assert await f.tree.outputs.tail("a", 10) == b"aside\n"


async def test_lines_are_put_as_they_come_and_stay_whatever_becomes_of_the_command(tmp_path):
    script = "echo 1; read go < fifo; echo 2; exit 3"
    os.mkfifo(tmp_path / "fifo")
    spec = command("sh", "-c", script, once=True, restart=TEMPORARY, cwd=str(tmp_path))
    async with planted(tmp_path, {"a": spec}) as f:
        engine = f.tree.queues.engine("q")
        with trio.fail_after(60):
            while not await waiting(f):
                await engine.wait_for_work()
            assert (await waiting(f), f.word("a")) == ([1], "running")
            await trio.to_thread.run_sync((tmp_path / "fifo").write_text, "go\n")
            await ended(f, "a")
        assert (await waiting(f), f.tree.status("a")[0].exit.reason) == ([1, 2], "exited with code 3")


async def test_a_command_waits_while_the_queue_is_full_and_all_it_has_printed_is_put_before_it_has_ended(tmp_path):
    spec = command("seq", "5", once=True)
    async with planted(tmp_path, {"a": spec}, {"q": QueueSpec(backend="memory", size=2)}) as f:
        waits = trio.Event()
        f.tree.journal.add_sink(lambda event: waits.set() if isinstance(event, WaitingForRoom) else None)
        with trio.fail_after(60):
            await waits.wait()
            assert f.word("a") == "running"
            assert [await taken(f) for _ in range(3)] == [1, 2, 3]
            await f.tree.wait_running()
        assert await waiting(f) == [4, 5]


async def test_a_line_of_any_length_is_one_item_up_to_a_limit_and_a_longer_one_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "LONGEST_LINE", 1 << 20)
    long = "import sys; print('a' * int(sys.argv[1]))"
    specs = {
        "a": command(sys.executable, "-c", long, "1000000", once=True),
        "b": command(sys.executable, "-c", long, "2000000", once=True, restart=TEMPORARY),
    }
    async with planted(tmp_path, specs) as f:
        with trio.fail_after(60):
            await ended(f, "b")
            await ended(f, "a")
        assert await waiting(f) == ["a" * 1_000_000]
        assert f.tree.status("b")[0].exit.reason == "a line of its output is longer than 1 MB"


async def test_a_command_that_is_killed_leaves_what_it_had_printed_unput_and_that_is_said(tmp_path):
    spec = command("sh", "-c", "trap '' TERM; seq 9; sleep 1000 & wait; wait", grace=0.1)
    async with planted(tmp_path, {"a": spec}, {"q": QueueSpec(backend="memory", size=2)}) as f:
        waits = trio.Event()
        f.tree.journal.add_sink(lambda event: waits.set() if isinstance(event, WaitingForRoom) else None)
        with trio.fail_after(60):
            await waits.wait()
            await f.tree.stop("a")
        assert await waiting(f) == [1, 2]
        [line] = [line for line in f.logs if line["event"] == "killed before all that it printed was put"]
        assert (line["queue"], line["lines"]) == ("q", 7)


async def test_a_program_that_is_not_there_fails_as_ever(tmp_path):
    async with planted(tmp_path, {"a": command("/not/there", once=True, restart=TEMPORARY)}) as f:
        with trio.fail_after(60):
            await ended(f, "a")
        assert "/not/there" in f.tree.status("a")[0].exit.reason
        assert not [line for line in f.logs if "was put" in line["event"]]


# ---- asyncio ----


async def test_what_asyncio_returns_and_yields_is_put(tmp_path):
    async def count(upto: int) -> AsyncIterator[int]:
        for number in range(upto):
            await asyncio.sleep(0)
            yield number

    async def one() -> str:
        await asyncio.sleep(0)
        return "one"

    async def split(item: str) -> AsyncIterator[str]:
        for word in item.split():
            await asyncio.sleep(0)
            yield word

    jobs = {
        "a": job(count, args={"upto": 2}, once=True, into="q", kind="asyncio"),
        "b": job(one, once=True, into="q", kind="asyncio", after=("a",)),
        "c": job(split, queue="from", into="q", kind="asyncio", after=("b",)),
    }
    async with planted(tmp_path, jobs) as f:
        [id] = await fed(f, "c d")
        await until_state(f, id, State.DONE)
        assert await waiting(f) == [0, 1, "one", "c", "d"]


async def test_asyncio_that_waits_for_room_is_cancelled_like_any_other(tmp_path):
    closed = []

    async def feed() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(1)

    async with planted(tmp_path, {"a": job(feed, into="q", kind="asyncio")}, {"q": QueueSpec(backend="memory", size=2)}) as f:
        waits = trio.Event()
        f.tree.journal.add_sink(lambda event: waits.set() if isinstance(event, WaitingForRoom) else None)
        with trio.fail_after(60):
            await waits.wait()
            await f.tree.stop("a")
        assert (f.word("a"), await waiting(f), closed) == ("stopped", [1, 1], [1])


# ---- functions in processes of their own ----

MODULE = """
import os, time
import dataclasses

@dataclasses.dataclass
class Pair:
    a: int
    b: int

def pair():
    return Pair(1, 2)

def count(upto):
    for number in range(upto):
        yield number
    return "the end"

def stranger():
    yield object()

def feed():
    while True:
        yield os.getpid()
        time.sleep(1000)

def split(item):
    yield from item.split()
    return len(item)
"""


@pytest.fixture
def module(tmp_path):
    """The name of a module with functions; a process imports it from beside the file."""
    name = f"into_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def process(call: str, **keys: Any) -> JobSpec:
    return job(call, kind="process", into="q", **keys)  # type: ignore[arg-type]


async def test_what_a_process_returns_and_yields_is_put(tmp_path, module):
    jobs = {
        "a": process(f"{module}:pair", once=True),
        "b": process(f"{module}:count", args={"upto": 2}, once=True, after=("a",)),
        "c": process(f"{module}:stranger", once=True, restart=TEMPORARY),
    }
    async with planted(tmp_path, jobs) as f:
        with trio.fail_after(60):
            await ended(f, "b")
            await ended(f, "c")
        assert await waiting(f) == [{"a": 1, "b": 2}, 0, 1, "the end"]
        assert f.word("b") == "completed"
        assert "the function returned what is no JSON" in f.tree.status("c")[0].exit.reason


async def test_a_process_that_waits_for_room_is_a_service_like_any_other(tmp_path, module):
    async with planted(tmp_path, {"a": process(f"{module}:feed")}, {"q": QueueSpec(backend="memory", size=1)}) as f:
        await f.tree.queues.producer("q").put("first")
        waits = trio.Event()
        f.tree.journal.add_sink(lambda event: waits.set() if isinstance(event, WaitingForRoom) else None)
        with trio.fail_after(60):
            await waits.wait()
            pid = f.tree.status("a")[0].pid
            assert await taken(f) == "first"
            while not await waiting(f):
                await f.tree.queues.engine("q").wait_for_work()
            assert await waiting(f) == [pid]
            await f.tree.stop("a")
        assert f.word("a") == "stopped"


async def test_a_process_hands_on_what_it_makes_of_items(tmp_path, module):
    async with planted(tmp_path, {"a": process(f"{module}:split", queue="from")}) as f:
        ids = await fed(f, "a b", "c")
        for id in ids:
            await until_state(f, id, State.DONE)
        assert await waiting(f) == ["a", "b", 3, "c", 1]


# ---- from queue to queue ----


async def fed(f: Forest, *items: Any, queue: str = "from", ids: tuple[str, ...] = ()) -> list[str]:
    """Items for a job, and their ids."""
    drafts = [
        Draft(id=ids[at] if ids else new_id(), payload=msgspec.json.encode(item), keep=True) for at, item in enumerate(items)
    ]
    await f.tree.queues.engine(queue).put(drafts)
    return [draft.id for draft in drafts]


async def test_the_result_of_an_item_is_an_item_of_the_next_queue(autojump_clock, tmp_path):
    async def double(item: int) -> int | None:
        return item * 2 if item else None

    async with planted(tmp_path, {"a": job(double, queue="from", into="q")}) as f:
        ids = await fed(f, 1, 0, 3)
        await trio.sleep(1)
        assert await waiting(f) == [2, 6]
        states = [(await f.tree.queues.engine("from").show(id)).state for id in ids]
        assert states == [State.DONE] * 3


async def test_each_yield_of_a_handler_is_an_item_and_a_retry_that_yields_the_same_puts_it_once(autojump_clock, tmp_path):
    attempts = []

    async def split(item: str) -> AsyncIterator[Any]:
        attempts.append(1)
        for word in item.split():
            yield word
        yield len(attempts)
        if len(attempts) < 3:
            raise RuntimeError("boom")

    retry = RetrySpec(attempts=3, initial=Seconds(1))
    async with planted(tmp_path, {"a": job(split, queue="from", into="q", retry=retry)}) as f:
        await fed(f, "b b c")
        await trio.sleep(60)
        assert await waiting(f) == ["b", "b", "c", 1, 2, 3]


async def test_a_plain_generator_handles_items_in_its_thread(tmp_path):
    def split(item: str) -> Iterator[str]:
        yield from item.split()

    async with planted(tmp_path, {"a": job(split, queue="from", into="q")}) as f:
        [id] = await fed(f, "b c")
        await until_state(f, id, State.DONE)
        assert await waiting(f) == ["b", "c"]


async def test_an_item_is_done_only_when_its_result_is_put_and_once_where_it_was_put_before(autojump_clock, tmp_path):
    """As after a crash between the put and the ack: the handler runs again, and nothing is put twice."""
    queues = {"from": QueueSpec(backend="memory"), "q": QueueSpec(backend="memory", size=1)}
    runs = []

    async def double(item: int) -> int:
        runs.append(item)
        return item * 2

    async with planted(tmp_path, {"a": job(double, queue="from", into="q")}, queues) as f:
        one, two = await fed(f, 1, 2)
        await trio.sleep(10)
        engine = f.tree.queues.engine("from")
        assert [(await engine.show(id)).state for id in (one, two)] == [State.DONE, State.RUNNING]
        assert f.tree.status("a")[0].cause == "waits for room in queue q"
        await f.tree.stop("a")
        assert ((await engine.show(two)).state, (await engine.show(two)).attempts) == (State.WAITING, 0)
        assert await waiting(f) == [2]
        assert await taken(f) == 2
        await f.tree.start("a")
        await trio.sleep(10)
        assert ((await engine.show(two)).state, await waiting(f), runs) == (State.DONE, [4], [1, 2, 2])


async def test_one_that_is_handled_twice_is_put_once(autojump_clock, tmp_path):
    async with planted(tmp_path, {"a": job(lambda_of(len), queue="from", into="q")}) as f:
        for _ in range(2):  # the same item comes again, as if its end had not been stored
            await fed(f, "abc", ids=("one",))
            await trio.sleep(1)
            await f.tree.queues.engine("from").purge(State.DONE)
        assert await waiting(f) == [3]


async def test_a_batch_that_returns_a_list_gives_one_item(autojump_clock, tmp_path):
    async def lengths(items: list[str]) -> list[int]:
        return [len(item) for item in items]

    spec = job(lengths, queue="from", into="q", batch=BatchSpec(size=3, within=Seconds(1)))
    async with planted(tmp_path, {"a": spec}) as f:
        await fed(f, "a", "bb", "ccc")
        await trio.sleep(5)
        assert await waiting(f) == [[1, 2, 3]]


async def test_a_result_that_the_next_queue_does_not_take_is_the_items_failure(autojump_clock, tmp_path):
    async def odd(item: int) -> AsyncIterator[object]:
        yield object()

    async with planted(tmp_path, {"a": job(odd, queue="from", into="q", retry=RetrySpec(attempts=1))}) as f:
        [id] = await fed(f, 1)
        await trio.sleep(5)
        record = await f.tree.queues.engine("from").show(id)
        assert record.state is State.DEAD
        assert record.error.startswith("queue q does not take what it gives: ")


async def test_what_is_handed_on_runs_down_a_line_of_jobs(autojump_clock, tmp_path):
    done = []

    async def first(item: int) -> int:
        return item + 1

    async def second(item: int) -> None:
        done.append(item)

    jobs = {"a": job(first, queue="from", into="q"), "b": job(second, queue="q", workers=3)}
    async with planted(tmp_path, jobs) as f:
        await fed(f, *range(100))
        await trio.sleep(5)
        assert sorted(done) == list(range(1, 101))


async def ended(f: Forest, name: str) -> None:
    """Wait until a run of it has ended."""
    over = trio.Event()
    f.tree.journal.add_sink(lambda event: over.set() if isinstance(event, Ended) and event.name == name else None)
    if not [event for event in f.events(Ended) if event.name == name]:
        await over.wait()


async def until_state(f: Forest, id: str, state: State) -> None:
    """Wait until an item of the first queue has come to this."""
    with trio.fail_after(60):
        while (await f.tree.queues.engine("from").show(id)).state is not state:
            await trio.sleep(0.01)


def lambda_of(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def call(item: str) -> Any:
        return function(item)

    return call
