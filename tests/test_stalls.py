"""A job that blocks the loop is named while it does. In real time: what blocks is real."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
from running import ROOT, clean_environ, running, well

from supervisor.events import Journal, Stalled
from supervisor.kinds import Context
from supervisor.stalls import _Clocks, _Watch, watching_for_stalls
from tests.forest import Forest, forest, job, serve

LIMIT = 0.1


def block(seconds: float) -> None:
    """Block the thread, as a library does: in Python's own code, which is not the job's."""
    threading.Event().wait(seconds)


@contextmanager
def watched(f: Forest, limit: float = LIMIT):
    """Watch the loop; then start what the test is about."""
    with watching_for_stalls(limit, f.tree.journal):
        f.tree.order("start", ["a"])
        yield


def lines(f: Forest) -> list[Any]:
    return [line for line in f.logs if line["event"] == "the loop is stuck"]


async def stalls(f: Forest, count: int = 1) -> list[Any]:
    """The events, once there are so many."""
    with f.tree.journal.subscribe() as events:
        while len(f.events(Stalled)) < count:
            await anext(events)
    return f.events(Stalled)


async def blocking(ctx: Context, seconds: float = 3 * LIMIT) -> None:
    inner(seconds)  # the line that is told
    await ctx.wait_stopping()


def inner(seconds: float) -> None:
    block(seconds)


async def test_a_job_that_blocks_the_loop_is_named_with_its_line_and_its_stack(tmp_path):
    async with forest(tmp_path, {"a": job(blocking, start="manual"), "b": job(serve)}) as f:
        with watched(f):
            (event,) = await stalls(f)
    first = lines(f)[0]
    assert (first["job"], first["run"], first["log_level"]) == ("a", "a#1", "warning")
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+ \(block\)", first["line"])
    functions = re.findall(r'File "([^"]+)", line \d+, in (\w+)', first["stack"])
    assert functions[:3] == [(__file__, "blocking"), (__file__, "inner"), (__file__, "block")]  # nothing of ours, or Trio's
    assert functions[-1] == (threading.__file__, "wait")
    assert (event.name, event.run, event.line) == ("a", "a#1", first["line"])
    assert event.seconds >= 3 * LIMIT
    assert event.cause.startswith("the loop was stuck for ") and event.cause.endswith(f"at {event.line}")


async def test_it_is_told_at_once_from_beside_and_again_after_twice_as_long(tmp_path):
    """The loop may hang for ever: nothing of it is needed to say so."""
    told: list[Any] = []
    patience = trio.current_time() + 20

    def note(logger: Any, level: str, fields: Any) -> Any:
        told.append(fields)
        raise structlog.DropEvent

    async def hang(ctx: Context) -> None:
        while len(told) < 3 and trio.current_time() < patience:  # it has been told three times while it hangs
            block(0.01)
        await ctx.wait_stopping()

    async with forest(tmp_path, {"a": job(hang, start="manual")}) as f:
        structlog.configure(processors=[note])
        with watched(f):
            await stalls(f)
    seconds = [line["seconds"] for line in told[:3]]
    assert all(after >= at for after, at in zip(seconds, (LIMIT, 2 * LIMIT, 4 * LIMIT), strict=True))
    assert len(f.events(Stalled)) == 1


async def test_a_task_that_a_job_has_started_is_the_jobs(tmp_path):
    async def parent(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(blocking, ctx))

    async with forest(tmp_path, {"a": job(parent, workers=2, start="manual"), "b": job(serve)}) as f:
        with watched(f):
            (event,) = await stalls(f)  # both in one turn of the loop
    assert event.run in ("a:0#1", "a:1#1")
    assert event.name == event.run.partition("#")[0]


async def test_what_no_job_does_is_told_too(tmp_path):
    async with forest(tmp_path, {"a": job(serve)}) as f:
        with watched(f):
            block(3 * LIMIT)
            (event,) = await stalls(f)
    assert (event.name, event.run) == (None, None)
    assert event.cause.endswith(", in no job")
    assert "job" not in lines(f)[0]
    assert "test_what_no_job_does_is_told_too" in lines(f)[0]["stack"]


async def test_threads_and_waits_stall_nothing(tmp_path):
    async def wait(ctx: Context) -> None:
        await trio.sleep(3 * LIMIT)
        await trio.to_thread.run_sync(block, 3 * LIMIT)

    def thread() -> None:
        block(3 * LIMIT)

    async def busy() -> None:
        with trio.move_on_after(3 * LIMIT):
            while True:
                await trio.lowlevel.checkpoint()

    jobs = {"a": job(wait, once=True), "b": job(thread, once=True), "c": job(busy, once=True)}
    async with forest(tmp_path, jobs) as f:
        with watched(f, limit=10 * LIMIT):
            await f.tree.wait_running()
    assert lines(f) == f.events(Stalled) == []


async def test_zero_is_off(tmp_path):
    async with forest(tmp_path, {"a": job(serve)}) as f:
        with watched(f, limit=0):
            assert watchdog() is None
            block(2 * LIMIT)
            await trio.sleep(0)
    assert lines(f) == f.events(Stalled) == []


async def test_nothing_is_left_of_it(tmp_path):
    async with forest(tmp_path, {"a": job(serve)}) as f:
        with watched(f):
            thread = watchdog()
        assert thread is not None and not thread.is_alive()
        block(2 * LIMIT)
        await trio.sleep(0)
    assert f.events(Stalled) == []


def watchdog() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "stall watchdog"), None)


def wakeups(thread: threading.Thread) -> int:
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)[0])


async def test_an_idle_loop_has_no_wake_ups(tmp_path):
    async with forest(tmp_path, {"a": job(serve)}) as f:
        with watched(f, limit=0.02):
            thread = watchdog()
            assert thread is not None
            await trio.sleep(0.1)
            before = wakeups(thread)
            await trio.sleep(1)
            assert wakeups(thread) - before <= 5  # one that asks every 0.02 s has fifty


# -- when the process itself did not run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "elapsed", "cpu", "queued", "lost"),
    [
        ("it slept, and blocked", 1.0, 0.0, 0.0, 0.0),
        ("it was a little late, as one is", 1.04, 0.0, 0.0, 0.0),
        ("the process was stopped for nine seconds", 10.0, 1.0, 0.0, 9.0),
        ("the loop held the GIL for nine seconds, busy", 10.0, 10.0, 0.0, 0.0),
        ("the same, half of the time in the queue for a processor", 10.0, 5.0, 5.0, 5.0),
        ("it waited for a processor", 1.0, 0.1, 0.9, 0.9),
        ("so did we", 3.0, 0.2, 2.8, 2.8),
    ],
)
def test_time_in_which_the_process_did_not_run_is_no_stall(told, elapsed, cpu, queued, lost):
    assert math.isclose(_Clocks(100 + elapsed, 5 + cpu, 7 + queued).lost(_Clocks(100, 5, 7), 1.0), lost)


async def test_what_was_lost_before_a_turn_began_does_not_put_off_the_look_at_it():
    watch = _Watch(0.5, Journal())
    assert watch._judge(turn=100.0, sight=None, now=100.1, lost=60.0) <= 0.5


PROGRAM = """
import sys, time, trio, structlog
from supervisor.events import Journal
from supervisor.stalls import watching_for_stalls

structlog.configure(processors=[lambda logger, level, fields: fields["event"]])

began = time.monotonic()
sum(range(10**7))
two_seconds = int(2 * 10**7 / (time.monotonic() - began))

async def main():
    journal = Journal()
    journal.add_sink(lambda event: print(event.event if hasattr(event, "event") else type(event).__name__, flush=True))
    with watching_for_stalls(0.5, journal):
        print("spins", flush=True)
        async with trio.open_nursery() as nursery:
            async def spin():
                while True:
                    await trio.lowlevel.checkpoint()
            nursery.start_soon(spin)
            await trio.to_thread.run_sync(sys.stdin.readline)
            print("blocks", flush=True)
            sum(range(two_seconds))  # holds the GIL all the while
            print("over", flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            nursery.cancel_scope.cancel()

trio.run(main)
"""


async def test_a_stopped_process_says_nothing_and_one_that_holds_the_gil_does():
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=clean_environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    said = b""

    async def until(word: bytes) -> None:
        nonlocal said
        while word not in said:
            chunk = await process.stdout.receive_some()
            assert chunk, said
            said += chunk

    try:
        await until(b"spins")
        for _ in range(2):
            process.send_signal(signal.SIGSTOP)
            await trio.sleep(1.5)
            process.send_signal(signal.SIGCONT)
            await trio.sleep(0.3)
        await process.stdin.send_all(b"\n")
        await until(b"blocks")
        assert b"stuck" not in said and b"Stalled" not in said
        await until(b"Stalled")
        assert b"the loop is stuck" in said
        await process.stdin.send_all(b"\n")
        assert await process.wait() == 0
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        await process.stdin.aclose()
        await process.stdout.aclose()


# -- the daemon ---------------------------------------------------------------------------------------------------------


async def test_the_daemon_says_it_and_a_reload_changes_the_limit(tmp_path):
    (tmp_path / "work.py").write_text(
        "import threading\n\nasync def block():\n    threading.Event().wait(0.5)\n\nasync def wait():\n    pass\n"
    )
    text = '[daemon]\nstall_after = "{0}"\n[jobs.a]\ncall = "work:block"\nonce = true\nstart = "manual"\n'
    file = tmp_path / "supervisor.toml"
    file.write_text(text.format("100ms"))
    async with running(tmp_path) as daemon:
        await daemon("run-now", "a")
        line = await daemon.said("the loop is stuck", job="a", run="a#1")
        assert "work.py" in line["stack"] and line["line"].endswith("work.py:4 (block)")
        await daemon.said("stalled", job="a", run="a#1")
        file.write_text(text.format("1h"))
        assert "daemon.stall_after: changed live" in await daemon("reload")
        count = len([line for line in daemon.log if line["event"] in ("the loop is stuck", "stalled")])
        await daemon("run-now", "a")
        await daemon.until(well)
        assert count == len([line for line in daemon.log if line["event"] in ("the loop is stuck", "stalled")])
        assert re.search(r"a +stalled +the loop was stuck for ", await daemon("events"))
