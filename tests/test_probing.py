"""Probes of real children under a real tree: servers, commands, sockets; what they leave behind, and what `status` says."""

from __future__ import annotations

import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import trio
from running import running

from supervisor.events import Ended, HealthCheckFailed, Healthy, Ready, Starting, Unhealthy
from tests.real_tree import tree

SERVER = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if os.path.exists("sick") else 200)
        self.end_headers()
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
if len(sys.argv) > 2: signal.pause()
server.serve_forever()
"""


def serving(port: int, *more: str) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), *more]


@contextmanager
def port_of_ones_own():
    """A port that nobody else is given."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


async def test_a_web_server_is_ready_and_well_and_is_restarted_when_it_is_sick(tmp_path):
    with port_of_ones_own() as port:
        spec = {
            "command": serving(port),
            "cwd": str(tmp_path),
            "ready": {"http": f"http://127.0.0.1:{port}/"},
            "health": {"http": f"http://127.0.0.1:{port}/", "every": "100ms", "failures": 2},
            "backoff": {"initial": "50ms"},
        }
        async with tree(tmp_path, a=spec) as f:
            assert (await f.until(Ready)).cause == f"http://127.0.0.1:{port}/ answers"
            await f.until(Healthy)
            (tmp_path / "sick").touch()
            unhealthy = await f.until(Unhealthy)
            assert unhealthy.cause == f"unhealthy: http://127.0.0.1:{port}/: HTTP 503, expected 200, 2 times in a row"
            await f.until(Ended)
            (tmp_path / "sick").unlink()
            await f.until(Healthy, 2)


async def test_a_server_that_listens_and_never_answers_is_not_ready_and_has_given_no_answer(tmp_path):
    with port_of_ones_own() as port:
        spec = {"command": serving(port, "hang"), "ready": {"tcp": f"127.0.0.1:{port}"}, "backoff": {"initial": "60s"}}
        health = {"http": f"http://127.0.0.1:{port}/", "every": "100ms", "timeout": "200ms", "failures": 2}
        async with tree(tmp_path, a={**spec, "health": health}) as f:
            await f.until(Ready)  # the kernel has accepted
            failed = await f.until(HealthCheckFailed)
            assert failed.answered is False and failed.cause.endswith("no answer within 0.2 s")
            await f.until(Unhealthy)


async def test_a_port_where_nobody_listens_is_the_reason_of_a_failed_start(tmp_path):
    with port_of_ones_own() as port:
        spec = {
            "command": ["sleep", "1000"],
            "ready": {"tcp": f"127.0.0.1:{port}"},
            "start_timeout": "300ms",
            "backoff": {"initial": "60s"},
        }
        async with tree(tmp_path, a=spec) as f:
            reason = f"not ready within 0.3 s (start_timeout): 127.0.0.1:{port}: connection refused"
            assert (await f.until(Ended)).exit.reason == reason


async def test_a_command_asks_in_the_directory_and_the_environment_of_its_job(tmp_path):
    script = 'echo "$SUPERVISOR_JOB $SUPERVISOR_RUN $GREETING $PWD"; exit 1'
    spec = {
        "command": ["sleep", "1000"],
        "cwd": str(tmp_path),
        "env": {"GREETING": "hello"},
        "health": {"exec": ["sh", "-c", script], "every": "50ms", "failures": 1},
        "backoff": {"initial": "60s"},
    }
    async with tree(tmp_path, a=spec) as f:
        assert (await f.until(Unhealthy)).cause.endswith(f": a a#1 hello {tmp_path}")


async def test_a_command_that_asks_is_gone_when_its_job_is(tmp_path):
    """With everything that came of it, although it hangs, has left its session and is asked in this moment."""
    script = "setsid sleep 1000 & echo $! > child; echo $$ > probe; trap '' TERM; sleep 1000"
    spec = {
        "command": ["sleep", "1000"],
        "cwd": str(tmp_path),
        "health": {"exec": ["sh", "-c", script], "every": "10ms", "timeout": "50s"},
    }
    async with tree(tmp_path, a=spec) as f:
        pids = await numbers(tmp_path / "child", tmp_path / "probe")
        answer = await f.tree.order("stop", ["a"])[0].wait()
        assert answer.text == "stopped"
        assert not any(alive(pid) for pid in pids)


async def test_what_asks_is_gone_before_a_run_that_crashed_is_started_again(tmp_path):
    script = "echo $$ > probe; exec sleep 1000"
    spec = {
        "command": ["sh", "-c", "until [ -s probe ]; do sleep 0.01; done; exit 1"],
        "cwd": str(tmp_path),
        "ready": {"exec": ["sh", "-c", script]},
        "backoff": {"initial": "0s"},
    }
    async with tree(tmp_path, a=spec) as f:
        await f.until(Ended)
        [pid] = await numbers(tmp_path / "probe")
        await f.until(Starting, 2)
        assert not alive(pid)


async def numbers(*files: Path) -> list[int]:
    with trio.fail_after(50):
        while not all(file.exists() and file.read_text().endswith("\n") for file in files):
            await trio.sleep(0.01)
    return [int(file.read_text()) for file in files]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def test_status_says_so_and_exits_with_5(tmp_path):
    (tmp_path / "supervisor.toml").write_text("""
[jobs.sick]
command = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
health = { file = "well", every = "100ms", failures = 1 }
grace = "60s"
[jobs.well]
command = ["sleep", "1000"]
health = { exec = ["true"], every = "100ms" }
[jobs.silent]
command = ["sleep", "1000"]
""")
    async with running(tmp_path) as daemon:
        await daemon.until(lambda table: table["sick"].healthy is False and table["well"].healthy is True)
        text = await daemon("status", code=5)
        assert "stopping, unhealthy" in text and f"unhealthy: {tmp_path}/well: no such file or directory" in text
        await daemon("status", "well", "silent")
        await daemon("status", "sick", code=5)
        rows = await daemon.rows()
        assert {name: row["healthy"] for name, row in rows.items()} == {"sick": False, "well": True, "silent": None}
        said = await daemon.said("unhealthy", job="sick")
        assert said["level"] == "error" and said["answered"] is True
        await daemon("shutdown", "--now")
