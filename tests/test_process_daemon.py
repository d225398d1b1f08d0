"""A daemon whose jobs use the process keys: what it says of what is wrong, and what commands and reloads do."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from running import MODULE, ROOT, command, running, well

from supervisor.state import State

LISTENER = """
import os, signal, socket
listener = socket.socket(fileno=3)
print("up", os.environ["LISTEN_FDNAMES"], os.environ.get("WORD"), os.getpid(), flush=True)
while True:
    listener.accept()[0].sendall(os.environ["LISTEN_FDNAMES"].encode())
"""


def write(directory: Path, text: str) -> None:
    (directory / "supervisor.toml").write_text(text)


@pytest.fixture
def taken():
    """A port that somebody else listens at."""
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        yield theirs


async def test_every_fault_of_the_machine_is_told_by_check_and_fails_its_job_alone_at_the_start(tmp_path, taken):
    port = taken.getsockname()[1]
    (tmp_path / "text").write_text("")
    (tmp_path / "bad.env").write_text("A=1\nhunter2\n")
    jobs = {
        "absent": 'command = "no-such-thing"',
        "text": 'command = "./text"',
        "directory": 'command = "./"',
        "user": 'command = "true"\nuser = "nobdy"',
        "cwd": 'command = "true"\ncwd = "nowhere"',
        "env": 'command = "true"\nenv_file = "no.env"',
        "bad": 'command = "true"\nenv_file = "bad.env"',
        "port": f'command = "true"\nsockets = ["web"]\n[sockets.web]\nlisten = "127.0.0.1:{port}"',
    }
    keys = 'restart = "temporary"\n'
    text = "".join(f"[jobs.{name}]\n{keys}{what}\n" for name, what in jobs.items())
    write(tmp_path, text + '[jobs.well]\ncommand = "sleep 100"\n')
    checked = await command(MODULE, "check", directory=tmp_path)
    assert checked.returncode == 78
    told = [line.partition(": ")[2] for line in (checked.stdout + checked.stderr).decode().splitlines()]
    assert told == [
        'jobs.absent.command: no program "no-such-thing" in the job\'s PATH',
        'jobs.text.command: not executable: "./text"; chmod +x makes it so',
        'jobs.directory.command: a directory, expected a program: "./"',
        'jobs.user.user: no user "nobdy"; did you mean "nobody"?',
        f'jobs.cwd.cwd: no such directory: "{tmp_path}/nowhere"',
        f'jobs.env.env_file: "{tmp_path}/no.env": no such file or directory',
        f'jobs.bad.env_file: "{tmp_path}/bad.env", line 2: expected NAME=value',
    ]
    me = Path("/proc/self/comm").read_text().strip()
    async with running(tmp_path) as daemon:
        rows = await daemon.until(lambda table: all(row.exit for row in table.values() if row.name in jobs))
        assert rows["well"].state is State.RUNNING
        assert {name: rows[name].exit.reason for name in jobs} == {
            "absent": "no program 'no-such-thing' in the job's PATH: install it, or give its full path",
            "text": f"cannot start '{tmp_path}/text': it is not executable: chmod +x",
            "directory": f"cannot start '{tmp_path}': it is a directory",
            "user": 'no user "nobdy"; did you mean "nobody"?',
            "cwd": f"cannot start 'true': no such directory: '{tmp_path}/nowhere' (cwd)",
            "env": f'env_file "{tmp_path}/no.env": no such file or directory',
            "bad": f'env_file "{tmp_path}/bad.env", line 2: expected NAME=value',
            "port": f"socket web: 127.0.0.1:{port} is taken by pid {os.getpid()} ({me}): "
            "free it, or let the socket listen elsewhere",
        }
        assert all(rows[name].word == "failed" for name in jobs)
        taken.close()  # and now it can be had
        assert (await daemon("start", "port")).startswith(("port: running", "port: exited with code 0"))


async def test_reload_of_a_name_signals_where_the_job_says_how(tmp_path):
    write(
        tmp_path,
        """
[jobs.web]
command = ["sh", "-c", "trap 'echo again' HUP; echo up; while :; do sleep 0.01; done"]
ready = { log = "up" }
reload_signal = "HUP"
[jobs.plain]
command = "sleep 100"
[jobs.early]
command = "sleep 100"
ready = { log = "never" }
reload_signal = "HUP"
""",
    )
    async with running(tmp_path) as daemon:
        before = await daemon.until(lambda table: table["web"].ready and table["plain"].ready and table["early"].pid)
        assert "early: early is starting: a HUP may come too early" in await daemon("reload", "early", code=1)
        assert await daemon("reload", "web") == f"web: signalled HUP, pid {before['web'].pid}\n"
        async with daemon.client().logs("web", follow=True, lines=10) as lines:
            while (await anext(lines)).line != "again":
                pass
        assert (await daemon.rows())["web"]["pid"] == before["web"].pid
        await daemon("reload", "plain")
        assert (await daemon.rows())["plain"]["pid"] != before["plain"].pid
        await daemon("stop", "web")
        assert await daemon("reload", "web", code=1) == "web: web is stopped: it reads its configuration when it starts\n"


async def test_a_reload_of_the_file_and_a_restart_take_up_what_has_changed(tmp_path):
    text = """
[daemon]
env = {{ WORD = "{word}" }}
[sockets.{name}]
listen = "./{name}.sock"
[jobs.web]
command = ["{python}", "listener.py"]
env_file = "-own.env"
sockets = ["{name}"]
ready = {{ log = "up" }}
[jobs.other]
command = "sleep 100"
env = {{ X = "1" }}
"""
    (tmp_path / "listener.py").write_text(LISTENER)
    write(tmp_path, text.format(word="one", name="a", python=sys.executable))
    async with running(tmp_path) as daemon:
        await daemon.until(well)
        assert "up a one" in await daemon("logs", "web", "-n", "1")
        assert await _answer(tmp_path / "a.sock") == b"a"

        (tmp_path / "own.env").write_text("WORD=own\n")
        await daemon("restart", "web")
        assert "up a own" in await daemon("logs", "web", "-n", "1")
        other = (await daemon.rows())["other"]["pid"]

        write(tmp_path, text.format(word="one", name="b", python=sys.executable))
        await daemon("reload")
        assert "up b own" in await daemon("logs", "web", "-n", "1")
        assert await _answer(tmp_path / "b.sock") == b"b" and not (tmp_path / "a.sock").exists()
        assert (await daemon.rows())["other"]["pid"] == other

        (tmp_path / "own.env").unlink()
        write(tmp_path, text.format(word="two", name="b", python=sys.executable))
        await daemon("reload")
        assert "up b two" in await daemon("logs", "web", "-n", "1")
        assert (await daemon.rows())["other"]["pid"] != other
        await daemon("shutdown")
        assert await daemon.ended() == 0
    assert not (tmp_path / "b.sock").exists()


async def _answer(path: Path) -> bytes:
    async with await trio.open_unix_socket(str(path)) as stream:
        return await stream.receive_some()


ACTIVATE = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
other = socket.create_server(("127.0.0.1", 0))
for number, each in ((10, listener), (11, other)):
    os.dup2(each.fileno(), number)
for number in (3, 4):
    os.dup2(number + 7, number)
print(listener.getsockname()[1], flush=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:strange"}
os.execv(sys.executable, [sys.executable, "-P", "-m", "supervisor", "run"])
"""


async def test_sockets_of_a_service_manager_are_taken_over(tmp_path):
    (tmp_path / "listener.py").write_text(LISTENER)
    write(
        tmp_path,
        f"""
[sockets.web]
listen = "127.0.0.1:1"
[jobs.web]
command = ["{sys.executable}", "listener.py"]
sockets = ["web"]
[jobs.other]
command = ["sh", "-c", "env; ls /proc/self/fd; echo over; sleep 100"]
ready = {{ log = "over" }}
""",
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", ACTIVATE], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with process.stdout, process.stderr:
        try:
            with trio.fail_after(60):
                port = int(await process.stdout.receive_some())
                said = b""
                while b'"web"' not in said or b"ready" not in said:
                    said += await process.stderr.receive_some()
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    assert await stream.receive_some() == b"web"
                while b"no [sockets] table names" not in said:
                    said += await process.stderr.receive_some()
                flags = re.search(r"flags:\s+(\d+)", Path(f"/proc/{process.pid}/fdinfo/3").read_text())
                assert int(flags[1], 8) & os.O_CLOEXEC
                process.terminate()
                assert await process.wait() == 0
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    printed = (tmp_path / ".supervisor/logs/other.log").read_text()
    assert "LISTEN_" not in printed and printed.split()[-5:] == ["0", "1", "2", "3", "over"]
