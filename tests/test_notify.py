"""NOTIFY_SOCKET: real children that say of themselves how they are, and strangers who try to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor import config
from supervisor.events import Ended, HealthCheckFailed, Healthy, NotifyRefused, Ready, Said, Starting, Unhealthy
from supervisor.nodes import hearing
from supervisor.probes.notify import LONGEST, NotifySocket, parse
from tests.real_tree import tree

SENDER = """
import array, os, signal, socket, sys, time
address = os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1)
def say(text, *fds):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sender.sendmsg([text.encode() if isinstance(text, str) else text], rights)
"""
NOTIFY = {"notify": True}


def python(script: str) -> list[str]:
    return [sys.executable, "-c", SENDER + script]


def job(command: list[str], **keys: Any) -> dict[str, Any]:
    return {"command": command, "ready": NOTIFY, "backoff": {"initial": "100ms"}, **keys}


# ---- ready ----


@pytest.mark.skipif(shutil.which("systemd-notify") is None, reason="systemd-notify is not installed")
async def test_systemd_notify_itself(tmp_path):
    """It is gone, as likely as not, when its message is read; and its BARRIER=1 is answered, or it would wait for ever."""
    script = "systemd-notify --ready --status='serving on 80' && systemd-notify --status=passed && exec sleep 1000"
    async with tree(tmp_path, a=job(["sh", "-c", script])) as f:
        assert (await f.until(Ready)).cause == "it said so"
        assert (await f.until(Said)).cause == "serving on 80"
        assert (f.row().word, f.row().cause) == ("running", "serving on 80")
        await f.until(Said, cause="passed")
    assert f.events(NotifyRefused) == []


async def test_ready_comes_from_the_main_process_or_from_what_came_of_it(tmp_path):
    child = "import subprocess; subprocess.run([sys.executable, '-c', open(sys.argv[1]).read()], start_new_session=True)"
    (tmp_path / "child.py").write_text(SENDER + "say('READY=1'); time.sleep(1000)")
    async with tree(
        tmp_path, a=job(python("say('READY=1'); time.sleep(1000)")), b=job([*python(child), str(tmp_path / "child.py")])
    ) as f:
        await f.until(Ready, name="a")
        await f.until(Ready, name="b")
    assert f.events(NotifyRefused) == []


async def test_a_child_that_ends_before_it_is_ready_is_a_failed_start_at_once(tmp_path):
    async with tree(tmp_path, a=job(["sh", "-c", "exit 3"], start_timeout="50s")) as f:
        end = await f.until(Ended)
        assert (end.exit.reason, end.failed) == ("exited with code 3", True)
        await f.until(Starting, 2)
    assert f.events(Ready) == []


async def test_a_child_that_says_nothing_is_not_ready_in_time(tmp_path):
    async with tree(tmp_path, a=job(["sleep", "1000"], start_timeout="200ms")) as f:
        assert (await f.until(Ended)).exit.reason == "not ready within 0.2 s (start_timeout)"


async def test_extend_timeout_gives_a_start_more_time(tmp_path):
    script = "say('EXTEND_TIMEOUT_USEC=900000000\\nSTATUS=slow'); time.sleep(1000)"
    async with tree(tmp_path, a=job(python(script), start_timeout="50s")) as f:
        await f.until(Said)
        assert f.tree.nodes["a"].life.starting.deadline > trio.current_time() + 500


async def test_extend_timeout_gives_a_stop_more_time(tmp_path):
    script = """
def stop(*_):
    say('STOPPING=1\\nEXTEND_TIMEOUT_USEC=900000000\\nSTATUS=flushing')
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    print('flushed', flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
say('READY=1')
time.sleep(1000)
"""
    async with tree(tmp_path, a=job([*python(script), str(tmp_path / "go")], grace="50s")) as f:
        await f.until(Ready)
        order = f.tree.order("stop", ["a"])[0]
        await f.until(Said, cause="it says that it is stopping: flushing")
        assert f.tree.nodes["a"].life.rung_due > trio.current_time() + 500
        assert f.row().cause == "stopped"  # why it stops says more
        (tmp_path / "go").touch()
        assert (await order.wait()).text == "stopped"
    assert (tmp_path / "logs/a.log").read_text() == "flushed\n"


async def test_a_job_that_does_not_ask_for_it_gets_no_socket(tmp_path):
    async with tree(tmp_path, a={"command": ["sh", "-c", "env; sleep 1000"], "ready": {"log": "SUPERVISOR_RUN"}}) as f:
        await f.until(Ready)
    assert "NOTIFY_SOCKET" not in (tmp_path / "logs/a.log").read_text()


# ---- what it says ----


async def test_reloading_and_status_are_shown_and_the_last_of_a_flood_is_too(tmp_path):
    script = """
say('READY=1')
for number in range(500):
    say(f'STATUS=step {number}')
sys.stdin.close()
say('RELOADING=1\\nMONOTONIC_USEC=1')
time.sleep(1.3)
say('READY=1')
time.sleep(1000)
"""
    async with tree(tmp_path, a=job(python(script))) as f:
        await f.until(Said, cause="reloading")
        await f.until(Said, cause="reloaded")
        assert f.row().cause == "reloaded" and f.row().ready
    assert len(f.events(Said)) < 10
    assert len(f.events(Ready)) == 1


async def test_what_it_says_is_one_printable_line_and_not_endless(tmp_path):
    script = "say(b'READY=1\\nSTATUS=a\\x1b[2J\\xff' + 3000 * b'b'); time.sleep(1000)"
    async with tree(tmp_path, a=job(python(script))) as f:
        said = (await f.until(Said)).cause
        assert said.startswith("a\\x1b[2J\ufffdbbb") and said.endswith("b…") and len(said) == 200


async def test_errno_is_told_in_words(tmp_path):
    async with tree(tmp_path, a=job(python("say('STATUS=no luck\\nERRNO=2'); time.sleep(1000)"))) as f:
        assert (await f.until(Said)).cause == "no luck: errno 2, no such file or directory"


async def test_mainpid_and_fdstore_are_refused_once_with_a_reason(tmp_path):
    script = """
for _ in range(3):
    say('MAINPID=1\\nFDSTORE=1\\nFDNAME=x', 0, 1)
say(f'MAINPID={os.getpid()}')
say('READY=1')
time.sleep(1000)
"""
    before = set(os.listdir("/proc/self/fd"))
    async with tree(tmp_path, a=job(python(script))) as f:
        await f.until(Ready)
        assert [event.cause for event in f.events(NotifyRefused)] == [
            "refused MAINPID: the main process stays the one that was started, so that nothing of it can get away",
            "refused FDSTORE: descriptors are not kept here",
        ]
    assert set(os.listdir("/proc/self/fd")) == before


async def test_a_barrier_is_answered_in_order(tmp_path):
    script = """
read, write = os.pipe()
say('READY=1')
say('BARRIER=1', write)
os.close(write)
assert os.read(read, 1) == b''
say('STATUS=passed')
time.sleep(1000)
"""
    async with tree(tmp_path, a=job(python(script))) as f:
        await f.until(Said, cause="passed")
        assert f.events(Ready)


async def test_rubbish_harms_nobody(tmp_path):
    script = f"""
say(b'')
say(b'\\0' * 100)
say(os.urandom(1000))
say('=\\n==\\nREADY\\nWATCHDOG=maybe\\nERRNO=99999999999\\nEXTEND_TIMEOUT_USEC=' + '9' * 400)
say('READY=1\\n' + 'x' * {LONGEST})
say('STATUS=' + 'y' * {LONGEST - 7})
for _ in range(2000):
    say('READY=0')
say('READY=1')
time.sleep(1000)
"""
    async with tree(tmp_path, a=job(python(script))) as f:
        await f.until(Ready)
        assert [event.cause for event in f.events(NotifyRefused)] == [f"refused a message longer than {LONGEST} bytes"]
        assert len(f.events(Said)) == 1


@given(st.binary(max_size=300) | st.text("=\n\0aREADY1", max_size=60).map(str.encode))
def test_any_bytes_can_be_parsed(data):
    for name, value in parse(data).items():
        assert "\n" not in name + value and "=" not in name


# ---- who says it ----


async def test_a_stranger_is_refused_and_told_once(tmp_path):
    """This process: of the right user, alive, and no child of the run. And a sibling's child."""
    async with tree(tmp_path, a=job(["sleep", "1000"])) as f:
        address = f.tree.nodes["a"].life.run.environ["NOTIFY_SOCKET"]
        meddle = SENDER.replace('os.environ["NOTIFY_SOCKET"]', repr(address)) + "say('READY=1'); time.sleep(1000)"
        async with another_process(meddle):
            refused = await f.until(NotifyRefused)
            for _ in range(3):
                send(address, b"READY=1")
            await f.until(NotifyRefused, 2)
        assert refused.cause.endswith("which is not of this run")
        assert (
            f.events(NotifyRefused)[1].cause
            == f"refused a message of pid {os.getpid()} (uid {os.getuid()}), which is not of this run"
        )
        assert f.row().word == "starting"
    assert len(f.events(NotifyRefused)) == 2


@asynccontextmanager
async def another_process(script: str) -> AsyncIterator[None]:
    process = await trio.lowlevel.open_process([sys.executable, "-c", script])
    try:
        yield
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def send(address: str, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(data, address.replace("@", "\0", 1))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be another user")
async def test_a_sender_that_is_gone_counts_by_its_user(tmp_path):
    """A process of another user that is dead and reaped when its message is read; then one of root."""
    async with tree(tmp_path, a=job(["sleep", "1000"])) as f:
        address = f.tree.nodes["a"].life.run.environ["NOTIFY_SOCKET"].replace("@", "\0", 1)
        say_and_die(address, 65534)
        assert (await f.until(NotifyRefused)).cause.endswith("(uid 65534), which is not of this run")
        assert f.row().word == "starting"
        say_and_die(address, 0)
        await f.until(Ready)


def say_and_die(address: str, uid: int) -> None:
    """Blocks, so that the message is read only when its sender is gone."""
    script = (
        f"import os, socket; os.setuid({uid}); socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', {address!r})"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-S", "-c", script]) == 0


# ---- the watchdog ----

BEATING = """
every = int(os.environ['WATCHDOG_USEC']) / 1e6
say('READY=1')
while True:
    say('WATCHDOG=1')
    time.sleep(every / 4)
"""


async def test_the_watchdog_fires_when_the_child_is_stopped(tmp_path):
    spec = job(python(BEATING), health={"notify": True, "every": "1s", "failures": 2})
    async with tree(tmp_path, a=spec) as f:
        await f.until(Healthy)
        assert f.row().healthy is True
        os.kill(f.row().pid, signal.SIGSTOP)
        unhealthy = await f.until(Unhealthy)
        assert not unhealthy.answered and "no heartbeat for" in unhealthy.cause
        assert f.events(HealthCheckFailed)[-1].cause.startswith("health check failed, 1 of 2: no heartbeat for ")
        assert (await f.until(Ended)).exit.reason == unhealthy.cause
        await f.until(Healthy, 2)  # the next run
        assert f.row().restarts == 1


async def test_the_watchdog_can_be_triggered(tmp_path):
    script = "say('READY=1'); say('WATCHDOG=trigger'); time.sleep(1000)"
    async with tree(tmp_path, a=job(python(script), health={"notify": True, "every": "50s"})) as f:
        assert (await f.until(Unhealthy)).cause == "unhealthy: it says so (WATCHDOG=trigger)"
        assert (await f.until(Ended)).failed


async def test_nobody_triggers_a_watchdog_that_there_is_not(tmp_path):
    script = "say('READY=1\\nWATCHDOG=trigger\\nWATCHDOG=1'); say('STATUS=on'); time.sleep(1000)"
    async with tree(tmp_path, a=job(python(script))) as f:
        await f.until(Said, cause="on")
        assert f.row().healthy is None and not f.events(Unhealthy)


async def test_a_watchdog_that_comes_with_a_reload_waits_for_the_next_run(tmp_path):
    async with tree(tmp_path, a={"command": ["sleep", "1000"]}) as f:
        await f.until(Ready)
        asked = {"jobs": {"a": {"command": ["sleep", "1000"], "health": {"notify": True, "every": "50ms", "failures": 1}}}}
        f.tree.apply(config.from_mapping({**asked, "daemon": {"state_dir": str(tmp_path)}}, Path.cwd(), os.environ))
        await trio.sleep(0.3)
        assert f.events(Unhealthy) == []
        f.tree.order("restart", ["a"])
        await f.until(Unhealthy)


# ---- the socket itself ----


async def test_where_no_socket_is_to_be_had_the_start_fails_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hearing, "NotifySocket", lambda name: NotifySocket("x" * 200))
    async with tree(tmp_path, a=job(["sleep", "1000"])) as f:
        assert "no NOTIFY_SOCKET to be had" in (await f.until(Ended)).exit.reason


async def test_no_descriptor_outlives_the_run(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    async with tree(tmp_path, a=job(["sh", "-c", "exit 1"], backoff={"initial": "10ms"})) as f:
        await f.until(Ended, 5)
    assert set(os.listdir("/proc/self/fd")) == before
