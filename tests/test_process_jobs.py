"""Jobs with kind = "process" in a running tree: what they share with commands, and what only they have."""

from __future__ import annotations

import marshal
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import trio
from house import alive

from supervisor.events import Ended, HealthCheckFailed, Progress, Ready, Starting, Unhealthy
from supervisor.kinds.process_channel import PROGRAM
from supervisor.kinds.process_worker import HEADER
from tests.real_tree import Tree, tree

NOTIFY = {"notify": True}


def job(code: str, base: Path, module: str, **keys: Any) -> dict[str, Any]:
    """A job whose function is the `f` of this code, in a module of that name."""
    write(base, module, code)
    return {"kind": "process", "call": f"{module}:f", "backoff": {"initial": "50ms"}, "env": {"PYTHONPATH": str(base)}, **keys}


def write(base: Path, module: str, code: str) -> None:
    (base / f"{module}.py").write_text("import os, signal, sys, time\n" + dedent(code))


def pids(f: Tree, job: str) -> dict[str, int]:
    return {name: row.pid for name, row in f.tree.journal.table.items() if name.startswith(f"{job}:")}


async def test_a_restart_loads_the_code_anew_and_says_nothing_of_the_old(tmp_path, monkeypatch):
    """Also where a thread of the daemon runs the same function, which it has loaded once for all."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "def f(ctx: 'Context'):\n    if os.getpid() != %d: print('%s')\n    ctx.wait_stopping()"
    old = job(code % (os.getpid(), "old"), tmp_path, "fresh_code")
    async with tree(tmp_path, a=old, b={"call": "fresh_code:f"}) as f:
        await f.tree.wait_running()
        write(tmp_path, "fresh_code", code % (os.getpid(), "newer"))
        a, b = [await order.wait() for order in f.tree.order("restart", ["a", "b"])]
        assert a.ok and "changed" not in a.text
        assert b.ok and 'restart the daemon, or give it kind = "process"' in b.text
    assert (tmp_path / "logs/a.log").read_text() == "old\nnewer\n"


async def test_a_change_of_its_file_restarts_it(tmp_path):
    code = "def f(ctx: 'Context'): ctx.wait_stopping()"
    (source := tmp_path / "source").mkdir()
    async with tree(tmp_path / "state", a=job(code, source, "watched_code", watch=[str(source / "*.py")])) as f:
        await f.until(Ready)
        write(source, "watched_code", code + "  # changed")
        assert not (await f.until(Ended)).failed
        await f.until(Ready, 2)


async def test_workers_are_processes_of_their_own_each_with_its_number(tmp_path):
    code = """
    def f(ctx: 'Context'):
        print(ctx.job, ctx.worker, os.environ['SUPERVISOR_WORKER'])
        ctx.wait_stopping()
    """
    async with tree(tmp_path, a=job(code, tmp_path, "many_of_it", workers=2)) as f:
        await f.tree.wait_running()
        found = pids(f, "a")
        assert len({*found.values()}) == 2 and all(map(alive, found.values()))
        await f.tree.scale("a", 3)
        assert {**pids(f, "a"), **found} == pids(f, "a")
    for number in range(3):
        assert (tmp_path / f"logs/a:{number}.log").read_text() == f"a {number} {number}\n"


async def test_computing_and_waiting_go_on_side_by_side(tmp_path):
    """Two functions that compute, beside a task of the daemon's own that goes on having its turns."""
    code = """
    def f(ctx: 'Context'):
        print(os.getpid(), flush=True)
        total = sum(range(3_000_000))
        ctx.progress(total)
    """
    jobs = {name: job(code, tmp_path, "computing", once=True) for name in ("a", "b")}
    turns = 0
    async with tree(tmp_path, **jobs) as f, trio.open_nursery() as nursery:

        async def io() -> None:
            nonlocal turns
            while True:
                await trio.sleep(0)
                turns += 1

        nursery.start_soon(io)
        await f.tree.wait_running()
        nursery.cancel_scope.cancel(reason="both have finished")
        assert [f.row(name).word for name in "ab"] == ["completed", "completed"]
        assert [event.done for event in f.events(Progress)] == [sum(range(3_000_000))] * 2
    assert turns > 0
    assert len({(tmp_path / f"logs/{name}.log").read_text() for name in "ab"} | {f"{os.getpid()}\n"}) == 3


async def test_a_schedule_makes_a_process_for_each_run(tmp_path):
    code = "def f(ctx: 'Context'): print(ctx.run, os.getpid(), ctx.scheduled_at is not None)"
    async with tree(tmp_path, a=job(code, tmp_path, "each_run", every="300ms")) as f:
        first, second = await f.until(Ended), await f.until(Ended, 2)
        assert not first.failed and not second.failed
    lines = [line.split() for line in (tmp_path / "logs/a.log").read_text().splitlines()]
    assert [(run, scheduled) for run, _, scheduled in lines[:2]] == [("a#1", "True"), ("a#2", "True")]
    assert lines[0][1] != lines[1][1]


async def test_policies_round_a_process_know_what_it_raised_and_its_context_the_attempt(tmp_path):
    code = """
    class Lost(ConnectionError): pass
    def f(ctx: 'Context'):
        print(ctx.attempt, 0 < ctx.deadline <= 100)
        if ctx.attempt < 3:
            raise Lost(f'attempt {ctx.attempt}')
        raise ValueError('given up')
    """
    retry = {"attempts": 5, "initial": "10ms", "on": ["ConnectionError", "retried:Lost"]}
    async with tree(tmp_path, a=job(code, tmp_path, "retried", once=True, restart="temporary", timeout=100, retry=retry)) as f:
        end = await f.until(Ended)
        assert (end.failed, end.exit.reason, end.exit.code) == (True, "ValueError: given up", 1)
    assert (tmp_path / "logs/a.log").read_text() == "1 True\n2 True\n3 True\n"


async def test_what_takes_too_long_is_interrupted_and_killed_where_that_is_in_vain(tmp_path):
    code = """
    def f(stubborn):
        try:
            time.sleep(1000)
        finally:
            print('cleaned up', flush=True)
            if stubborn:
                sum(range(10**12))
    """
    keys = {"once": True, "restart": "temporary", "timeout": "500ms", "grace": "200ms"}
    jobs = {name: job(code, tmp_path, "too_long", args={"stubborn": name == "b"}, **keys) for name in "ab"}
    async with tree(tmp_path, **jobs) as f:
        await f.until(Ended, 2)
        assert [f.row(name).exit.reason for name in "ab"] == ["timed out after 0.5 s"] * 2


async def test_a_service_whose_function_returns_has_exited_and_is_restarted(tmp_path):
    async with tree(tmp_path, a=job("def f(): pass", tmp_path, "returns")) as f:
        end = await f.until(Ended)
        assert (end.failed, end.exit.reason, end.exit.code) == (True, "completed", 0)
        await f.until(Starting, 2)


async def test_heartbeats_keep_it_alive_and_silence_is_a_failure(tmp_path):
    code = """
    def f(ctx: 'Context'):
        ctx.ready()
        for _ in range(20):
            ctx.heartbeat()
            time.sleep(0.05)
        signal.pause()
    """
    health = {"notify": True, "every": "500ms", "failures": 1}
    async with tree(tmp_path, a=job(code, tmp_path, "beating", ready=NOTIFY, health=health, grace="50ms")) as f:
        ready, silent = await f.until(Ready), await f.until(Unhealthy)
        assert ready.cause == "it said so" and silent.cause.startswith("unhealthy: no heartbeat for ")
        assert f.events(HealthCheckFailed) == []
        await f.until(Starting, 2)


async def test_it_is_signalled_weighed_and_asked_as_a_command_is(tmp_path):
    code = """
    def f(ctx: 'Context'):
        signal.signal(signal.SIGUSR1, lambda *_: ctx.progress(1))
        block = bytearray(64 << 20)
        ctx.ready()
        ctx.wait_stopping()
    """
    async with tree(tmp_path, a=job(code, tmp_path, "like_a_command", ready=NOTIFY)) as f:
        await f.tree.wait_running()
        assert (await f.tree.usage())["a"].memory > 64 << 20
        assert (await f.tree.order("signal", ["a"], signal=signal.SIGUSR1)[0].wait()).ok
        await f.until(Progress)


async def test_a_run_in_hand_is_let_finish_when_the_daemon_ends(tmp_path):
    os.mkfifo(tmp_path / "gate")
    code = f"""
    def f():
        print('begun', flush=True)
        print(open({str(tmp_path / "gate")!r}).readline())
    """
    with open(os.open(tmp_path / "gate", os.O_RDWR), "w", buffering=1) as gate:
        async with tree(tmp_path, a=job(code, tmp_path, "in_hand", once=True, ready={"log": "begun"})) as f:
            await f.until(Ready)
            f.tree.shutdown("a test ends it")
            gate.write("finished\n")
        assert f.events(Ended)[0].exit.reason == "completed"
    assert "finished" in (tmp_path / "logs/a.log").read_text()


async def test_a_stuck_function_is_killed_when_its_grace_is_over(tmp_path):
    code = """
    def f(ctx: 'Context'):
        ctx.ready()
        sum(range(10**12))
    """
    async with tree(tmp_path, a=job(code, tmp_path, "stuck_in_c", ready=NOTIFY, grace="100ms")) as f:
        await f.tree.wait_running()
        pid = f.row().pid
        answer = await f.tree.order("stop", ["a"])[0].wait()
        assert answer.ok and "killed" in answer.text
        assert not alive(pid)


def frame(head: dict[str, Any]) -> bytes:
    packed = marshal.dumps(head)
    return HEADER.pack(len(packed), 0) + packed


def test_the_death_of_the_daemon_ends_a_worker_by_itself(tmp_path):
    """A second line behind the guardian: what the worker started in its group goes with it."""
    write(
        tmp_path,
        "lonely",
        "import subprocess\ndef f():\n    print(subprocess.Popen(['sleep', '1000']).pid)\n    signal.pause()",
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [*PROGRAM, "lonely:f"],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "SUPERVISOR_CHANNEL": str(theirs.fileno())},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        ours.sendall(frame({"serves": False, "path": [str(tmp_path), *sys.path], "stop_signal": 15}))
        facts = {"job": "a", "worker": 0, "run": "a#1", "attempt": 1, "until": None, "scheduled_at": None}
        asked = {"service": True, "wanted": False, "into": False}
        ours.sendall(frame({"is": "call", "call": "lonely:f", "facts": facts, **asked}))
        head, body = HEADER.unpack(ours.recv(HEADER.size, socket.MSG_WAITALL))
        assert (ours.recv(head, socket.MSG_WAITALL), body) == (b'{"is": "started"}', 0)
        assert alive(int(process.stdout.readline()))
        ours.close()
        assert process.wait(60) == -signal.SIGKILL
    assert process.stdout.read() == b""  # whoever could still write is dead
    process.stdout.close()
