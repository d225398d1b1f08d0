"""The kind `asyncio`: a coroutine function in an event loop of its own, in a thread of its own. In real time."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import structlog
import trio
from house import alive
from running import running, well
from trio.testing import wait_all_tasks_blocked

from supervisor.children.procfs import children_of
from supervisor.errors import SpecError
from supervisor.events import Ended, Killing, Progress, Ready, Stuck
from supervisor.kinds import Context, JobSpec, asyncio_loop
from supervisor.nodes import ladder
from supervisor.probes import Health
from supervisor.probes import Ready as ReadySpec
from supervisor.state import Phase
from supervisor.tree import open_supervisor
from tests.forest import SIXTY, Forest, forest, job


@pytest.fixture
def go():
    """Lets threads go, however the test ends."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def said():
    """What a job of the test says, across threads."""
    return Said()


@pytest.fixture
def reaped():
    """The processes of a job leave orphans, which come to us. Our reaper leaves alone what it did not start; here we know."""
    before = set(children_of(os.getpid()))  # servers of other tests, say
    yield
    for pid in set(children_of(os.getpid())) - before:
        with suppress(ChildProcessError):  # a thread of asyncio was faster
            os.waitpid(pid, 0)


class Said:
    """Words that a job says in its thread, and the test waits for."""

    def __init__(self) -> None:
        self.words: list[Any] = []
        self._more = threading.Condition()

    def __call__(self, word: Any) -> None:
        with self._more:
            self.words.append(word)
            self._more.notify_all()

    async def wait(self, count: int = 1) -> Any:
        """The word of this number, counted from 1."""

        def block() -> None:
            with self._more:
                assert self._more.wait_for(lambda: len(self.words) >= count, 30)

        await trio.to_thread.run_sync(block, limiter=trio.CapacityLimiter(1))
        return self.words[count - 1]


def hosted(call: Any, **keys: Any) -> JobSpec:
    return job(call, kind="asyncio", **keys)


async def once(tmp_path: Any, call: Any, **keys: Any) -> tuple[Any, Forest]:
    """Run it to its end; its row then."""
    async with forest(tmp_path, {"a": hosted(call, start="manual", once=True, backoff=SIXTY, **keys)}) as f:
        await f.tree.order("run-now", ["a"])[0].wait()
        return f.tree.status("a")[0], f


# -- its loop -----------------------------------------------------------------------------------------------------------


async def test_it_runs_in_a_loop_and_a_thread_of_its_own_named_after_the_run(tmp_path, said):
    policy = asyncio.get_event_loop_policy()

    async def look(word: str) -> None:
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        worker = await loop.run_in_executor(None, lambda: threading.current_thread().name)
        said((word, threading.current_thread().name, threading.get_ident(), worker))

    row, _ = await once(tmp_path, look, args={"word": "hello"})
    assert (row.kind, row.word) == ("asyncio", "completed")
    ((word, name, ident, worker),) = said.words
    assert (word, name, worker) == ("hello", "a#1", "a#1_0")
    assert ident != threading.get_ident()
    assert asyncio.get_event_loop_policy() is policy
    assert trio.current_time() > 0  # this thread is Trio's, as it was


async def test_two_of_them_have_nothing_in_common(tmp_path, said):
    async def meet(ctx: Context) -> None:
        said((asyncio.get_running_loop(), threading.get_ident(), len(asyncio.all_tasks())))
        await ctx.wait_stopping()

    async with forest(tmp_path, {"a": hosted(meet, workers=2)}):
        await said.wait(2)
    (loop, ident, tasks), (other_loop, other_ident, other_tasks) = said.words
    assert loop is not other_loop
    assert ident != other_ident
    assert tasks == other_tasks == 1


async def test_a_library_that_only_knows_asyncio_works(tmp_path, said):
    async def serve(ctx: Context) -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()

        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            said(server.sockets[0].getsockname()[1])
            await ctx.wait_stopping()

    async with forest(tmp_path, {"a": hosted(serve)}) as f:
        stream = await trio.open_tcp_stream("127.0.0.1", await said.wait())
        async with stream:
            await stream.send_all(b"hello\n")
            assert await stream.receive_some() == b"hello\n"
        await f.tree.stop("a")
        assert f.tree.status("a")[0].exit.reason == "completed"


async def test_its_log_and_its_context_variables_name_job_and_run(tmp_path, said):
    async def talk(ctx: Context) -> None:
        ctx.log.info("hello", word=1)
        bound = structlog.contextvars.get_contextvars()
        said((ctx.job, ctx.worker, ctx.run, bound, await asyncio.create_task(_bound())))

    async def _bound() -> Any:
        return structlog.contextvars.get_contextvars()

    _, f = await once(tmp_path, talk)
    names = {"job": "a", "run": "a#1"}
    assert said.words == [("a", 0, "a#1", names, names)]
    assert f.logs == [{"event": "hello", "word": 1, "log_level": "info", **names}]


async def test_variables_that_the_job_sets_are_its_own(tmp_path):
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")

    async def paint() -> None:
        colour.set("red")

    await once(tmp_path, paint)
    assert colour.get() == "none"


# -- how it ends --------------------------------------------------------------------------------------------------------


async def cancelled_by_itself() -> None:
    raise asyncio.CancelledError


async def interrupted() -> None:
    raise KeyboardInterrupt


async def exits_in_a_task() -> None:
    await asyncio.gather(exits())


async def exits() -> None:
    sys.exit(3)


async def group() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fails())


async def fails() -> None:
    raise ValueError("first\nsecond")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (fails, "ValueError: first"),
        (group, "ValueError: first"),
        (exits, "SystemExit: 3"),
        (exits_in_a_task, "SystemExit: 3"),
        (cancelled_by_itself, "CancelledError"),
        (interrupted, "KeyboardInterrupt"),
    ],
)
async def test_whatever_it_raises_is_its_own_failure(tmp_path, call, reason):
    row, f = await once(tmp_path, call)
    assert (row.word, row.exit.reason) == ("failed", reason)
    assert [(line["event"], line["job"], line["run"]) for line in f.logs] == [("job raised", "a", "a#1")]


async def test_what_it_leaves_in_its_loop_is_cancelled_and_awaited(tmp_path, said):
    async def stay() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0)
            said("task cancelled")

    async def count() -> Any:
        try:
            for number in range(1000):
                yield number
        finally:
            said("generator closed")

    def late() -> None:
        threading.Event().wait(0.05)
        said("thread ended")

    async def leave() -> None:
        asyncio.get_running_loop().run_in_executor(None, late)
        left.append(asyncio.create_task(stay()))
        left.append(count())
        await anext(left[-1])

    left: list[Any] = []
    row, _ = await once(tmp_path, leave)
    assert row.word == "completed"
    assert sorted(said.words) == ["generator closed", "task cancelled", "thread ended"]


async def test_what_stays_after_its_end_is_named_and_waited_for(tmp_path, go, said, monkeypatch):
    monkeypatch.setattr(asyncio_loop, "LEFT_BEHIND", 0.01)

    async def leave() -> None:
        asyncio.get_running_loop().run_in_executor(None, go.wait)

    async with forest(tmp_path, {"a": hosted(leave, once=True)}) as f:
        with f.tree.journal.subscribe() as events:
            async for event in events:
                if isinstance(event, Stuck):
                    break
        assert f.word("a") == "stuck"
        assert event.cause == "its function has ended, but thread a#1 does not end, and a thread cannot be killed"
        go.set()
        await f.tree.wait_running()
        assert f.word("a") == "completed"


# -- how it is stopped --------------------------------------------------------------------------------------------------


async def test_the_names_of_its_context_are_awaited(tmp_path, said):
    async def live(ctx: Any) -> None:
        said((ctx.stopping, ctx.phase, await ctx.sleep(0)))
        said(await ctx.sleep(1000))
        said((ctx.stopping, ctx.phase, await ctx.sleep(1000)))
        await ctx.wait_stopping()

    live.__annotations__["ctx"] = Context
    async with forest(tmp_path, {"a": hosted(live)}) as f:
        assert await said.wait() == (False, Phase.RUNNING, True)
        await f.tree.stop("a")
        assert said.words[1:] == [False, (True, Phase.STOPPING, False)]
        assert f.happened(Killing) == []
        assert f.tree.status("a")[0].exit.reason == "completed"


async def test_progress_ready_and_heartbeats_are_heard(tmp_path, said):
    async def live(ctx: Context) -> None:
        ctx.progress(1)
        ctx.progress(2, 3)
        ctx.ready()
        ctx.heartbeat()
        await ctx.wait_stopping()

    spec = hosted(live, ready=ReadySpec(notify=True), health=Health(notify=True))
    async with forest(tmp_path, {"a": spec}) as f:
        await f.tree.wait_running()
        assert [(event.run, event.done, event.total) for event in f.events(Progress)] == [("a#1", 1, None), ("a#1", 2, 3)]
        assert len(f.happened(Ready)) == 1


async def test_a_service_that_takes_no_context_is_cancelled_at_once(tmp_path, said):
    async def deaf() -> None:
        said("up")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)  # it has its grace to clean up
            said("cleaned up")

    async with forest(tmp_path, {"a": hosted(deaf, grace=1000)}) as f:
        await said.wait()
        (order,) = f.tree.order("stop", ["a"])
        assert (await order.wait()).text == "stopped"
        assert said.words == ["up", "cleaned up"]
        assert f.happened(Killing) == []


@pytest.mark.parametrize("hears", [True, False])
async def test_what_goes_on_is_cancelled_after_its_grace(tmp_path, said, hears):
    async def deaf(ctx: Context | None = None) -> None:
        said("up")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            said("cancelled")
            raise

    async def blind() -> None:
        await deaf()

    async with forest(tmp_path, {"a": hosted(deaf if hears else blind, once=True, grace=0.01)}) as f:
        await said.wait()
        (order,) = f.tree.order("stop", ["a"])
        assert (await order.wait()).text.startswith("stopped (killed")
        assert said.words == ["up", "cancelled"]
        assert len(f.happened(Killing)) == len(f.happened(Ended)) == 1


async def test_an_exception_while_it_is_cancelled_is_its_outcome(tmp_path, said):
    async def bad() -> None:
        said("up")
        try:
            await asyncio.sleep(1000)
        finally:
            raise ValueError("while cleaning up")

    async with forest(tmp_path, {"a": hosted(bad, once=True, grace=0)}) as f:
        await said.wait()
        await f.tree.stop("a")
        assert (f.word("a"), f.tree.status("a")[0].exit.reason) == ("stopped", "ValueError: while cleaning up")


async def swallowing(said: Said, go: threading.Event) -> None:
    while not go.is_set():
        with suppress(asyncio.CancelledError):
            said("on and on")
            await asyncio.sleep(0.05 if len(said.words) > 1 else 1000)


async def blocking(said: Said, go: threading.Event) -> None:
    said("blocks")
    go.wait()


@pytest.mark.parametrize("function", [swallowing, blocking])
async def test_what_cannot_be_cancelled_is_stuck_as_a_thread_and_no_other_starts(tmp_path, go, said, monkeypatch, function):
    monkeypatch.setattr(ladder, "STUCK_AFTER", 0.05)
    async with forest(tmp_path, {"a": hosted(partial(function, said, go), grace=0)}) as f:
        await said.wait()
        (order,) = f.tree.order("restart", ["a"])
        with f.tree.journal.subscribe() as events:
            async for event in events:
                if isinstance(event, Stuck):
                    break
        assert f.tree.status("a")[0].cause == "thread a#1 does not end, and a thread cannot be killed"
        assert (f.word("a"), f.tree.status("a")[0].run) == ("stuck", "a#1")
        go.set()
        assert (await order.wait()).ok
        assert f.tree.status("a")[0].run == "a#2"


async def test_the_end_of_the_tree_does_not_wait_for_what_cannot_be_cancelled(tmp_path, go, said, monkeypatch):
    monkeypatch.setattr(ladder, "STUCK_AFTER", 0.05)
    monkeypatch.setattr("supervisor.tree.phases.KILL_LIMIT", 0.2)
    async with forest(tmp_path, {"a": hosted(partial(blocking, said, go), grace=0)}) as f:
        await said.wait()
    assert f.tree.survivors == ("a (thread a#1 does not end, and a thread cannot be killed)",)
    go.set()


async def test_the_daemon_ends_although_a_thread_of_an_executor_does_not(tmp_path):
    (tmp_path / "work.py").write_text(
        "import asyncio, threading\n\n"
        "async def leave(ctx: 'Context'):\n"
        "    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)\n"
        "    ctx.ready()\n    await ctx.wait_stopping()\n"
    )
    text = '[daemon]\ngrace = 0\n[jobs.a]\ncall = "work:leave"\nkind = "asyncio"\nready = { notify = true }\n'
    (tmp_path / "supervisor.toml").write_text(text)
    async with running(tmp_path) as daemon:
        await daemon.until(well)
        daemon.process.terminate()
        assert await daemon.ended() == 1
        (told,) = (await daemon.said("still alive"))["jobs"]
        assert told.startswith("a (")


async def test_a_stop_that_comes_before_its_loop_is_there_is_heard(tmp_path):
    async def live(ctx: Context) -> None:
        await ctx.wait_stopping()

    async def deaf() -> None:
        await asyncio.Event().wait()

    async with forest(tmp_path, {"a": hosted(live, grace=1000), "b": hosted(deaf, grace=1000)}) as f:
        for _ in range(20):
            f.tree.order("start", ["*"])
            await trio.lowlevel.checkpoint()
            await f.tree.stop("*")
        assert f.happened(Killing) == []


# -- its processes ------------------------------------------------------------------------------------------------------


async def test_a_process_of_its_own_ends_with_its_own_exit_code_beside_ours(tmp_path, said, reaped):
    """Our reaper waits for named pids only: it never takes the exit status of somebody else's child."""

    async def spawn(ctx: Context) -> None:
        for code in range(1, 11):
            process = await asyncio.create_subprocess_exec(
                "sh", "-c", f"(sleep 0.01 &); exit {code}", start_new_session=code > 5
            )
            said(await process.wait())
        result = await asyncio.create_subprocess_exec("echo", "hello", stdout=asyncio.subprocess.PIPE)
        said((await result.communicate())[0])

    jobs = {f"child-{at}": JobSpec(command=("sh", "-c", "(sleep 0.01 &); exit 7"), output="null") for at in range(3)}
    async with forest(tmp_path, {"a": hosted(spawn, once=True), **jobs}) as f:
        await said.wait(11)
        assert said.words == [*range(1, 11), b"hello\n"]
        assert {event.exit.code for event in f.events(Ended) if event.name != "a"} <= {7, None}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_process_that_it_leaves_behind_is_killed_with_what_came_of_it(tmp_path, said, reaped):
    async def spawn() -> None:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", "trap '' TERM; sleep 1000 & echo $!; wait", stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        said((process.pid, int(await process.stdout.readline())))
        await process.wait()

    async with forest(tmp_path, {"a": hosted(spawn, grace=1000)}) as f:
        pids = await said.wait()
        assert all(map(alive, pids))
        await f.tree.stop("a")
        assert not any(map(alive, pids))
    gc.collect()  # asyncio complains here of what the job has left open


# -- what is refused ----------------------------------------------------------------------------------------------------


def plain() -> None:
    raise AssertionError("must not be called")


async def test_a_plain_function_is_refused(tmp_path):
    row, _ = await once(tmp_path, plain)
    assert row.exit.reason == 'plain: kind "asyncio" runs an `async def`, this is a plain function: use kind = "thread"'


async def test_it_must_be_said_and_needs_a_call(tmp_path):
    async def infer() -> None:
        pass

    async with forest(tmp_path, {"a": job(infer, once=True)}) as f:
        await f.tree.wait_running()
        assert f.tree.status("a")[0].kind == "task"
    with pytest.raises(SpecError, match='kind "asyncio" needs `call`, this job has `command`'):
        async with open_supervisor({"jobs": {"a": {"command": ["true"], "kind": "asyncio"}}}):
            pass


async def test_it_fails_as_a_task_would_where_it_is_not_said(tmp_path):
    async def sleeps() -> None:
        await asyncio.sleep(1)

    async with forest(tmp_path, {"a": job(sleeps, once=True, backoff=SIXTY)}) as f:
        await wait_all_tasks_blocked()
        assert f.tree.status("a")[0].exit.reason == "RuntimeError: no running event loop"
