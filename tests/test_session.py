"""Conversations with jobs: `exec`, `attach` and `input`, over the socket, from the clients, and at a real terminal."""

import base64
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from control_serving import peer, request, serving, until
from running import running
from test_cli import ENVIRON, SUPERVISOR

from supervisor.client import AsyncClient, Client, ControlError, Refusal
from supervisor.events import Commanded
from supervisor.output.kept import FOLLOW
from supervisor.state import Goal

JOBS = {
    "cat": {"command": ["sh", "-c", "echo up; exec cat"], "stdin": "pipe", "ready": {"log": "up"}},
    "screen": {
        "command": [
            "sh",
            "-c",
            "trap 'echo size $(stty size)' WINCH; stty -echo; echo up; while :; do read line && echo got $line; done",
        ],
        "tty": True,
        "ready": {"log": "up"},
        "grace": "100ms",
    },
    "mute": {"command": ["sleep", "1000"]},
    "idle": {"command": ["sleep", "1000"], "stdin": "pipe", "start": "manual"},
}
FLOOD = "import os\nwhile True: os.write(1, bytes(65536))"


@asynccontextmanager
async def jobs(directory, **more):
    async with serving(directory, JOBS | more, {"group": {"children": ["cat", "screen"]}}) as (tree, path):
        await tree.wait_running()
        yield tree, path


async def command(path, *words, code=0, stdin=b"", **environ):
    """Run `supervisor WORDS` with pipes for a terminal; gives what it printed."""
    env = ENVIRON | {"SUPERVISOR_SOCKET": path} | environ
    result = await trio.run_process(
        [*SUPERVISOR, *words], stdin=stdin, capture_stdout=True, capture_stderr=True, check=False, env=env
    )
    assert result.returncode == code, (words, result)
    return result.stdout, result.stderr.decode()


# ---------------------------------------------------------------- exec, from a command line


async def test_exec_shows_what_comes_takes_what_is_piped_and_ends_with_the_exit_code(tmp_path):
    async with jobs(tmp_path) as (tree, path):
        assert await command(path, "exec", "--", "sh", "-c", "echo out; echo err >&2; exit 3", code=3) == (b"out\nerr\n", "")
        blob = bytes(range(256)) * 1000
        assert await command(path, "exec", "cat", stdin=blob) == (blob, "")
        _, err = await command(path, "exec", "sh", "-c", "kill -9 $$", code=128 + 9)
        assert "killed by SIGKILL" in err
        _, err = await command(path, "exec", "no-such-program", code=1)
        assert "no-such-program" in err
        assert all(not name.startswith("exec") for name in tree.nodes)
        asked = [event for event in tree.journal.past(0)[1] if isinstance(event, Commanded)]
        assert [(event.verb, event.names) for event in asked] == [("exec", ("exec-1",))] * 4 and asked[0].by


async def test_exec_takes_a_name_a_directory_and_variables_and_expands_nothing(tmp_path):
    async with jobs(tmp_path) as (_, path):
        script = "pwd; echo $A/$B/$SUPERVISOR_JOB/$1"
        out, _ = await command(
            path, "exec", "--name", "mine", "--cwd", "/", "-e", "A=1", "-e", "B=${HOME}", "sh", "-c", script, "-", "${X}"
        )
        assert out.decode().splitlines() == ["/", "1/${HOME}/mine/${X}"]
        for words, text in {
            ("--name", "cat", "true"): "'cat' is the name of another",
            ("--name", "a b", "true"): "a name has only",
            ("-e", "A", "true"): "NAME=VALUE",
            ("--user", "no-such-user", "true"): "no-such-user",
            ("--detach", "--timeout", "5s", "true"): "nobody to wait",
        }.items():
            _, err = await command(path, "exec", *words, code=1)
            assert text in err
        await command(path, "exec", code=2)
    await command(path, "exec", "true", code=3)


async def test_exec_that_takes_too_long_is_stopped_and_its_last_words_are_shown(tmp_path):
    async with jobs(tmp_path) as (tree, path):
        script = "trap 'echo last words; exit 0' TERM; while :; do sleep 0.02; done"
        out, err = await command(path, "exec", "--timeout", "300ms", "sh", "-c", script, code=75)
        assert out == b"last words\n" and "--timeout" in err and "exec-1" not in tree.nodes


async def test_exec_that_is_detached_runs_on(tmp_path):
    async with jobs(tmp_path) as (tree, path):
        out, _ = await command(path, "exec", "--detach", "sleep", "1000")
        assert out == b"exec-1\n"
        await until(tree, lambda table: table["exec-1"].pid is not None)
        assert tree.journal.table["exec-1"].kind == "command"
        await command(path, "stop", "exec-1")
        assert "exec-1" not in tree.nodes


@asynccontextmanager
async def started(path, *words, **streams):
    """A `supervisor WORDS` that is killed at the end if it still runs."""
    process = await trio.lowlevel.open_process([*SUPERVISOR, *words], env=ENVIRON | {"SUPERVISOR_SOCKET": path}, **streams)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                await stream.aclose()


async def test_ctrl_c_asks_the_command_to_end_and_the_second_kills_it(tmp_path):
    deaf = "trap '' TERM; echo up; while :; do sleep 0.02; done"
    async with jobs(tmp_path) as (tree, path):
        words = ("exec", "sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.02; done")
        async with started(path, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert await process.stdout.receive_some() == b"up\n"
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 9
        async with started(path, "exec", "sh", "-c", deaf, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert await process.stdout.receive_some() == b"up\n"
            process.send_signal(signal.SIGINT)
            await until(tree, lambda table: table["exec-1"].goal is Goal.DOWN)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_whose_caller_is_gone_is_stopped(tmp_path, number):
    async with jobs(tmp_path) as (tree, path):
        async with started(path, "exec", "sleep", "1000", stdin=subprocess.DEVNULL) as process:
            await until(tree, lambda table: "exec-1" in table and table["exec-1"].pid is not None)
            process.send_signal(number)
            await until(tree, lambda table: "exec-1" not in table)
            assert await process.wait() == (128 + number if number == signal.SIGTERM else -number)


async def test_exec_in_a_pipe_whose_reader_has_had_enough_is_stopped(tmp_path):
    async with jobs(tmp_path) as (tree, path):
        line = f"{' '.join(SUPERVISOR)} exec yes | head -n 2"
        result = await trio.run_process(
            ["sh", "-c", line], capture_stdout=True, stdin=b"", env=ENVIRON | {"SUPERVISOR_SOCKET": path}
        )
        assert result.stdout == b"y\ny\n"
        await until(tree, lambda table: "exec-1" not in table)


async def test_a_command_waits_for_a_caller_that_does_not_read_and_nothing_is_lost(tmp_path):
    async with jobs(tmp_path) as (tree, path):
        total = FOLLOW * 8
        script = f"import os\nfor at in range({total >> 16}): os.write(1, bytes([at % 256]) * 65536)\n"
        async with started(
            path, "exec", sys.executable, "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            await until(tree, lambda table: "exec-1" in table and table["exec-1"].pid is not None)
            log = tree.outputs._logs["exec-1"]
            while not log.awaited:  # nothing tells when a child stands still
                await trio.sleep(0.01)
            held = log._received
            assert FOLLOW < held < total
            assert (await AsyncClient(path).status("mute"))[0].ready  # and nobody else does
            seen = b""
            async for chunk in process.stdout:
                seen += chunk
            assert await process.wait() == 0
        assert seen == b"".join(bytes([at % 256]) * 65536 for at in range(total >> 16))


async def test_an_exec_under_way_is_answered_by_a_daemon_that_stops(tmp_path):
    script = "trap 'exit 6' TERM; echo up; while :; do sleep 0.02; done"
    async with jobs(tmp_path) as (tree, path):
        words = ("exec", "sh", "-c", script)
        async with started(path, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert await process.stdout.receive_some() == b"up\n"
            tree.shutdown("the test", kill=True)
            assert await process.wait() in (6, 128 + 9)  # whichever was quicker: the trap, or the kill


# ---------------------------------------------------------------- the protocol


def data(text):
    return base64.b64encode(text).decode()


async def test_input_goes_to_the_request_it_names_and_is_answered_when_written(tmp_path):
    async with jobs(tmp_path) as (_, path), peer(path) as client:
        await client.send(request("attach", {"name": "cat", "lines": 1}, "a"))
        assert (await client.read())["params"] == {"id": "a", "item": {"name": "cat", "tty": False}}
        assert (await client.read())["params"]["item"] == {"data": data(b"up\n")}
        await client.send(request("input", {"to": "a", "data": data(b"hello\n")}, 2))
        replies = [await client.read(), await client.read()]
        assert {"jsonrpc": "2.0", "id": 2, "result": None} in replies
        assert {"id": "a", "item": {"data": data(b"hello\n")}} in [reply.get("params") for reply in replies]
        assert "no exec or attach" in (await client.ask("input", {"to": 7}, 3))["error"]["message"]
        assert "base64" in (await client.ask("input", {"to": "a", "data": "?"}, 3))["error"]["message"]
        assert "in use" in (await client.ask("attach", {"name": "cat"}, "a"))["error"]["message"]


async def test_a_job_that_does_not_read_keeps_its_writer_waiting_and_nobody_else(tmp_path):
    async with jobs(tmp_path) as (tree, path), peer(path) as client, peer(path) as other:
        await tree.start("idle")
        await client.ask("attach", {"name": "idle", "lines": 0}, 1)
        await client.send(request("input", {"to": 1, "data": data(bytes(600_000))}, 2))
        assert (await client.ask("version", id=3))["id"] == 3
        assert "one input at a time" in (await client.ask("input", {"to": 1, "eof": True}, 4))["error"]["message"]
        assert (await other.ask("status", {"names": ["idle"]}))["result"][0]["ready"]
        await other.ask("stop", {"names": ["idle"]})
        replies = {reply["id"]: reply for reply in [await client.read(), await client.read()]}
        assert "no more input" in replies[2]["error"]["message"] and replies[1]["result"]["name"] == "idle"


async def test_what_cannot_be_attached_to_is_refused_with_what_to_do(tmp_path):
    async with jobs(tmp_path) as (_, path), peer(path) as client:
        for name, code, text in [
            ("mute", 1, 'stdin = "pipe" or tty = true in [jobs.mute]; to only watch: supervisor logs -f mute'),
            ("idle", 1, "idle is stopped"),
            ("group", 1, "is a supervisor"),
            ("*", 1, "choose one"),
            ("cot", 4, "did you mean 'cat'"),
        ]:
            error = (await client.ask("attach", {"name": name}))["error"]
            assert error["code"] == code and text in error["message"]


async def test_a_reader_at_an_attach_that_is_too_slow_is_told_and_the_job_never_waits(tmp_path):
    flood = {"command": [sys.executable, "-c", FLOOD], "stdin": "pipe", "start": "manual", "rotate": {"size": 1000, "keep": 0}}
    async with jobs(tmp_path, flood=flood) as (tree, path), peer(path) as client:
        await tree.start("flood")
        await client.ask("attach", {"name": "flood", "lines": 0})
        log = tree.outputs._logs["flood"]
        until_then = log._received + FOLLOW * 8
        while log._received < until_then:  # nothing tells how much a child has printed
            await trio.sleep(0.01)
        await tree.stop("flood")
        items = []
        while "result" not in (reply := await client.read()):
            items.append(reply["params"]["item"])
        assert sum(item.get("lagged", 0) for item in items) > FOLLOW


# ---------------------------------------------------------------- the clients


async def test_the_blocking_client_talks_to_jobs(tmp_path):
    def use(path):
        with Client(path) as client:
            talk = client.exec(["sh", "-c", "cat; echo $A; exit 3"], env={"A": "1"}, interactive=True)
            talk.write(b"x" * 100_000)
            talk.end_input()
            assert b"".join(piece.data for piece in talk) == b"x" * 100_000 + b"1\n"
            assert (talk.finished.code, talk.finished.name, talk.name) == (3, "exec-1", "exec-1")
            with pytest.raises(Refusal, match="nobody to type"):
                client.exec(["true"], detach=True, tty=True)
            with pytest.raises(ControlError) as late:
                list(client.exec(["sleep", "1000"], timeout=0.1))
            assert late.value.code == 75
            detached = client.exec(["sleep", "1000"], detach=True)
            assert list(detached) == [] and detached.finished is None
            assert client.stop(detached.name)[0].ok
        with Client(path) as client:
            talk = client.attach("cat", lines=0)
            talk.write(b"hello\n")
            assert next(talk).data == b"hello\n"

    async with jobs(tmp_path) as (_, path):
        await trio.to_thread.run_sync(use, path)


async def test_the_async_client_writes_and_reads_side_by_side(tmp_path):
    async with jobs(tmp_path) as (tree, path):
        client, blob = AsyncClient(path), os.urandom(3 << 20)

        async def write(talk):
            await talk.write(blob)
            await talk.end_input()

        async with client.exec(["cat"], interactive=True) as talk, trio.open_nursery() as nursery:
            nursery.start_soon(write, talk)
            assert b"".join([piece.data async for piece in talk]) == blob
        assert talk.finished.code == 0
        async with client.exec(["sleep", "1000"]) as talk:
            await until(tree, lambda table: table["exec-1"].pid is not None)
        await until(tree, lambda table: "exec-1" not in table)
        async with client.attach("screen", lines=0) as talk:
            await talk.resize(33, 99)
            assert b"size 33 99" in (await anext(talk)).data
            await talk.write(b"word\n")
            assert b"got word" in (await anext(talk)).data


async def test_status_tells_memory_and_cpu_of_all_that_came_of_a_job_when_asked(tmp_path):
    burn = "x = bytearray(30 << 20)\nfor at in range(3_000_000): pass\nprint('up', flush=True)\nwhile True: input()"
    family = {"command": ["sh", "-c", f'{sys.executable} -c "{burn}"; true'], "ready": {"log": "up"}, "stdin": "pipe"}
    async with serving(tmp_path, {"family": family, "down": JOBS["idle"]}, {"all": {"children": ["family"]}}) as (tree, path):
        await tree.wait_running()
        client = AsyncClient(path)
        rows = {row.name: row for row in await client.status(usage=True)}
        assert rows["family"].memory > 30 << 20 and rows["family"].cpu > 0.01
        assert (rows["all"].memory, rows["all"].cpu) == (rows["family"].memory, rows["family"].cpu)
        assert rows["down"].memory is None and rows["down"].cpu is None
        assert [row.name for row in await client.status("fam*", usage=True)] == ["family"]
        assert all(row.memory is msgspec.UNSET for row in await client.status())
        out, _ = await command(path, "status", "--usage", "family")
        head, line = out.decode().splitlines()
        assert "MEMORY" in head and "MB" in line
        out, _ = await command(path, "status", "--json")
        assert "memory" not in json.loads(out)[0]


# ---------------------------------------------------------------- at a terminal


class Screen:
    """A terminal with a `supervisor` command in its foreground."""

    def __init__(self, process, leader):
        self.process = process
        self.leader = leader
        self.seen = b""

    async def shows(self, text):
        """Wait until it shows this, after all that was waited for before."""
        while text not in self.seen:
            await trio.lowlevel.wait_readable(self.leader)
            self.seen += os.read(self.leader, 1 << 16)
        self.seen = self.seen.partition(text)[2]

    def type(self, keys):
        os.write(self.leader, keys)

    def resize(self, rows, columns):
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def mode(self):
        return termios.tcgetattr(self.leader)


@asynccontextmanager
async def terminal(path, *words):
    leader, follower = os.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    take = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    take |= {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    try:
        before = termios.tcgetattr(leader)
        async with started(path, *words, **take) as process:
            screen = Screen(process, leader)
            screen.before = before
            yield screen
    finally:
        os.close(follower)
        os.close(leader)


@pytest.mark.parametrize("keys", [b"\x1d", b"\x10\x11"])
async def test_attach_to_a_terminal_job_types_resizes_and_leaves_it_running(tmp_path, keys):
    async with jobs(tmp_path) as (tree, path), terminal(path, "attach", "screen") as screen:
        await screen.shows(b"attached to screen; Ctrl-] or Ctrl-P Ctrl-Q leaves it")
        await screen.shows(b"up\r\n")
        await screen.shows(b"size 30 90\r\n")
        assert screen.mode != screen.before
        screen.type(b"hello\r")
        await screen.shows(b"got hello\r\n")
        screen.resize(40, 120)
        await screen.shows(b"size 40 120\r\n")
        screen.type(keys)
        await screen.shows(b"detached from screen")
        assert await screen.process.wait() == 0
        assert screen.mode == screen.before
        assert tree.journal.table["screen"].ready and tree.journal.table["screen"].restarts == 0


@pytest.mark.parametrize("keys", [b"\x1d", b"\x10\x11", b"\x03"])
async def test_attach_to_a_job_that_reads_a_pipe_sends_lines_and_leaves_it_running(tmp_path, keys):
    async with jobs(tmp_path) as (tree, path), terminal(path, "attach", "cat") as screen:
        await screen.shows(b"attached to cat;")
        await screen.shows(b"up\r\n")
        screen.type(b"heloo\x7f\x7flo\n")  # a line can be edited before it is sent
        await screen.shows(b"\nhello\r\n")
        screen.type(keys)
        await screen.shows(b"detached from cat")
        assert await screen.process.wait() == 0
        assert screen.mode == screen.before
        assert tree.journal.table["cat"].ready


async def test_ctrl_d_ends_the_input_of_the_job_and_the_attach_ends_with_the_run(tmp_path):
    async with jobs(tmp_path) as (_, path), terminal(path, "attach", "cat") as screen:
        await screen.shows(b"up\r\n")
        screen.type(b"\x04")
        await screen.shows(b"cat: exited with code 0")
        assert await screen.process.wait() == 0
        assert screen.mode == screen.before


async def test_several_may_be_attached_and_all_see_the_same(tmp_path):
    async with (
        jobs(tmp_path) as (_, path),
        terminal(path, "attach", "screen") as one,
        terminal(path, "attach", "screen") as two,
    ):
        for screen in (one, two):
            await screen.shows(b"size 30 90\r\n")
        two.type(b"from two\r")
        await one.shows(b"got from two\r\n")
        await two.shows(b"got from two\r\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
async def test_a_signal_restores_the_terminal(tmp_path, number):
    async with jobs(tmp_path) as (_, path), terminal(path, "attach", "screen") as screen:
        await screen.shows(b"size 30 90\r\n")
        assert screen.mode != screen.before
        screen.process.send_signal(number)
        assert await screen.process.wait() == (0 if number == signal.SIGINT else 128 + number)
        assert screen.mode == screen.before


async def test_the_death_of_the_daemon_restores_the_terminal(tmp_path):
    (tmp_path / "supervisor.toml").write_text(
        '[jobs.screen]\ncommand = ["sh", "-c", "echo up; exec cat"]\ntty = true\nready = { log = "up" }\n'
    )
    async with running(tmp_path) as daemon:
        path = str(tmp_path / ".supervisor" / "control.sock")
        await daemon.until(lambda table: table["screen"].ready)
        async with terminal(path, "attach", "screen") as screen:
            await screen.shows(b"up\r\n")
            assert screen.mode != screen.before
            daemon.process.kill()
            await screen.shows(b"has hung up")
            assert await screen.process.wait() == 3
            assert screen.mode == screen.before


async def test_lines_that_are_piped_to_an_attach_arrive_and_it_leaves(tmp_path):
    async with jobs(tmp_path) as (tree, path):
        with tree.outputs.follow("cat") as follower:
            await command(path, "attach", "cat", stdin=b"from a pipe\n")
            assert await anext(follower) == b"from a pipe\n"
        assert tree.journal.table["cat"].ready


async def test_exec_at_a_terminal_reads_it_only_when_told_to(tmp_path):
    async with jobs(tmp_path) as (_, path):
        async with terminal(path, "exec", "cat") as screen:
            assert await screen.process.wait() == 0
        async with terminal(path, "exec", "-i", "cat") as screen:
            screen.type(b"hello\n")
            await screen.shows(b"hello\r\nhello\r\n")
            screen.type(b"\x04")
            assert await screen.process.wait() == 0
        async with terminal(path, "exec", "-t", "sh", "-c", "stty size; read line; echo $line; exit 4") as screen:
            await screen.shows(b"30 90\r\n")
            assert screen.mode != screen.before
            screen.type(b"word\r")
            await screen.shows(b"word\r\n")
            assert await screen.process.wait() == 4
            assert screen.mode == screen.before


async def test_a_one_off_at_a_terminal_that_hears_nothing_is_stopped_with_the_key_that_leaves(tmp_path):
    async with jobs(tmp_path) as (tree, path), terminal(path, "exec", "-t", "sh", "-c", "echo up; sleep 1000") as screen:
        await screen.shows(b"up\r\n")
        screen.type(b"\x1d")
        assert await screen.process.wait() in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
        assert "exec-1" not in tree.nodes


async def test_exec_and_attach_give_json_lines_when_asked(tmp_path):
    async with jobs(tmp_path) as (_, path):
        out, _ = await command(path, "exec", "--json", "echo", "hi")
        first, piece, last = map(json.loads, out.splitlines())
        assert (first, piece) == ({"name": "exec-1", "tty": False}, {"data": data(b"hi\n")}) and last["code"] == 0
