"""The kind `thread`: a plain function beside the loop, in a thread of its own. In real time."""

from __future__ import annotations

import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trio

from supervisor.events import Ended, Progress, Ready
from supervisor.kinds import Context, JobSpec
from supervisor.probes import Ready as ReadySpec
from supervisor.state import Phase
from tests.forest import SIXTY, Forest, forest, job


@pytest.fixture
def go():
    """Lets threads go, however the test ends."""
    event = threading.Event()
    yield event
    event.set()


class Spy:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def plain(self, **args: Any) -> None:
        self.calls.append(args)

    def __call__(self, ctx: Context, word: str = "none") -> None:
        self.calls.append({"job": ctx.job, "word": word})


async def once(tmp_path: Any, call: Any, **keys: Any) -> tuple[Any, Forest]:
    """Run it to its end; its row then."""
    with trio.fail_after(30):
        async with forest(tmp_path, {"a": job(call, start="manual", once=True, backoff=SIXTY, **keys)}) as f:
            await f.tree.order("run-now", ["a"])[0].wait()
            return f.tree.status("a")[0], f


async def test_args_are_its_keyword_arguments(tmp_path):
    spy = Spy()
    row, _ = await once(tmp_path, spy.plain, args={"a": 1, "b": [2]})
    assert (row.kind, row.word, spy.calls) == ("thread", "completed", [{"a": 1, "b": [2]}])


async def test_callable_objects_and_partials_are_functions_too(tmp_path):
    spy = Spy()
    for call in (
        spy,
        functools.partial(spy, word="w"),
        functools.partial(spy.plain, a=1),
        functools.partial(spy.calls.append, "built in"),
        functools.partial(getattr, spy, "calls"),  # a builtin without a signature
    ):
        row, _ = await once(tmp_path, call)
        assert (row.kind, row.word) == ("thread", "completed"), row.exit
    assert spy.calls == [{"job": "a", "word": "none"}, {"job": "a", "word": "w"}, {"a": 1}, "built in"]


async def test_it_runs_beside_the_loop_in_a_thread_named_after_the_run(tmp_path):
    names: list[Any] = []
    await once(tmp_path, lambda: names.append((threading.current_thread().name, threading.get_ident())))
    assert names[0][0] == "a#1"
    assert names[0][1] != threading.get_ident()


async def test_whatever_it_raises_is_its_own_failure(tmp_path):
    def bad() -> None:
        sys.exit(3)

    row, f = await once(tmp_path, bad)
    assert row.exit.reason == "SystemExit: 3"
    assert [line["event"] for line in f.logs] == ["job raised"]


async def test_the_names_of_its_context_block(tmp_path):
    seen: list[Any] = []
    asleep = threading.Event()

    def live(ctx: Context) -> None:
        seen.append((ctx.job, ctx.run, ctx.stopping, ctx.phase))
        seen.append(ctx.sleep(0))  # type: ignore[arg-type]
        asleep.set()
        seen.append(ctx.sleep(1000))
        seen.append((ctx.stopping, ctx.phase))
        ctx.wait_stopping()
        seen.append("end")

    with trio.fail_after(30):
        async with forest(tmp_path, {"a": job(live)}) as f:
            await trio.to_thread.run_sync(asleep.wait)
            await f.tree.stop("a")
    assert seen == [("a", "a#1", False, Phase.RUNNING), True, False, (True, Phase.STOPPING), "end"]


async def test_wait_stopping_blocks_until_it_is_asked(tmp_path):
    def live(ctx: Context) -> None:
        ctx.wait_stopping()

    with trio.fail_after(30):
        async with forest(tmp_path, {"a": job(live)}) as f:
            await f.tree.wait_running()
            await f.tree.restart("a")
            assert f.tree.status("a")[0].run == "a#2"


async def test_progress_and_ready_are_events_also_from_its_helpers(tmp_path):
    def live(ctx: Context) -> None:
        ctx.progress(1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ctx.progress, 2, 3).result()
            pool.submit(ctx.ready).result()
        ctx.wait_stopping()

    with trio.fail_after(30):
        async with forest(tmp_path, {"a": job(live, ready=ReadySpec(notify=True))}) as f:
            await f.tree.wait_running()
            assert [(event.run, event.done, event.total) for event in f.events(Progress)] == [("a#1", 1, None), ("a#1", 2, 3)]
            assert len(f.happened(Ready)) == 1


async def test_its_log_names_job_and_run(tmp_path):
    def talk(ctx: Context) -> None:
        ctx.log.info("hello", word=1)

    _, f = await once(tmp_path, talk)
    assert f.logs == [{"event": "hello", "word": 1, "job": "a", "run": "a#1", "log_level": "info"}]


async def test_what_cannot_hear_has_its_grace_and_ends_by_itself(tmp_path, go):
    with trio.fail_after(30):
        async with forest(tmp_path, {"a": job(go.wait, grace=20)}) as f:
            await f.tree.wait_running()
            (order,) = f.tree.order("stop", ["a"])
            await trio.testing.wait_all_tasks_blocked()
            assert f.word("a") == "stopping"
            go.set()
            assert (await order.wait()).text == "stopped"
            assert len(f.happened(Ended)) == 1


async def test_sixty_blocked_threads_stop_neither_the_next_one_nor_a_child(tmp_path, go):
    jobs = {f"blocked-{number}": job(go.wait) for number in range(60)}
    jobs["next"] = job(lambda: None, once=True)
    jobs["child"] = JobSpec(command=("true",), once=True, output="null")
    jobs["mine"] = job(functools.partial(trio.to_thread.run_sync, lambda: None), once=True, kind="task")
    with trio.fail_after(30):
        async with forest(tmp_path, jobs) as f:
            await f.tree.wait_running()
            assert f.words("next", "child") == "next:completed child:completed"
            go.set()


async def test_what_does_not_import_fails_that_job_alone(tmp_path):
    row, _ = await once(tmp_path, "no_such_module:f", kind="thread")
    assert row.exit.reason == "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"
