"""The daemon end to end: a real process, real signals, real children."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

ROOT = Path(__file__).parent.parent
SUPERVISOR = [sys.executable, "-P", "-m", "supervisor"]
SLEEPER = '["sleep", "1000"]'
STUBBORN = """["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"]"""


class Daemon:
    """A daemon under test: what it says on stderr as JSON lines, and its process."""

    def __init__(self, process: trio.Process, mark: str) -> None:
        self.process = process
        self.lines: list[dict] = []
        self.noise: list[str] = []
        self.mark = mark
        self._more = trio.Event()

    async def read(self) -> None:
        rest = b""
        async for chunk in self.process.stderr:
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                try:
                    self.lines.append(json.loads(line))
                except ValueError:
                    self.noise.append(line.decode())
            self._more.set()
            self._more = trio.Event()

    async def said(self, event: str, **fields) -> dict:
        """The first line, past or to come, with this event and these fields."""
        seen = 0
        with trio.fail_after(30):
            while True:
                for line in self.lines[seen:]:
                    if line["event"] == event and all(line.get(key) == value for key, value in fields.items()):
                        return line
                seen = len(self.lines)
                await self._more.wait()

    def events(self, event: str) -> list[dict]:
        return [line for line in self.lines if line["event"] == event]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        with trio.fail_after(30):
            return await self.process.wait()

    def family(self) -> list[int]:
        """Every living process that descends from this test's daemon, by a mark in its environment."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self.mark in _environ(pid)]


def _environ(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def write(directory: Path, text: str, name: str = "supervisor.toml") -> Path:
    (directory / name).write_text(text)
    return directory / name


def environment(mark: str, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DAEMON_UNDER_TEST": mark, **more}


@asynccontextmanager
async def daemon(directory: Path, *arguments: str, read: bool = True, wrap: tuple[str, ...] = (), **environ: str):
    """A daemon in `directory`, killed at the end if it is still there. Its stderr is read, unless `read` is False."""
    mark = uuid.uuid4().hex
    process = await trio.lowlevel.open_process(
        [*wrap, *SUPERVISOR, "run", *arguments],
        cwd=directory,
        env=environment(mark, **environ),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    async with trio.open_nursery() as nursery:
        under_test = Daemon(process, mark)
        if read:
            nursery.start_soon(under_test.read)
        try:
            yield under_test
        finally:
            nursery.cancel_scope.cancel()
            process.kill()
            with trio.CancelScope(shield=True):  # a checkpoint that is cancelled here would hide how the body failed
                await process.wait()
                await process.stderr.aclose()


async def supervisor(directory: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    with trio.fail_after(30):
        return await trio.run_process(
            [*SUPERVISOR, *arguments],
            cwd=directory,
            env=environment("client", **environ),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


async def gone(pid: int) -> None:
    """Wait until `pid`, which is not our child, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


TWO = f"""
[jobs.a]
command = {SLEEPER}
[jobs.b]
command = ["sh", "-c", '''sleep 1000 & setsid sh -c "sh -c \\"echo up; sleep 1000; :\\" & wait" & wait''']
ready = {{ log = "up" }}
"""

# -- the end ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_daemon_in_order_with_0_and_leaves_no_process(tmp_path, number):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        await under_test.said("ready", job="a")
        await under_test.said("ready", job="b")
        assert len(under_test.family()) >= 5  # the daemon, a, b, and the two below b that are what they are since "up"
        under_test.signal(number)
        assert await under_test.ended() == 0
        assert under_test.family() == []
        phases = [line["phase"] for line in under_test.events("phase_changed")]
        assert phases == ["draining", "stopping"]


async def test_a_second_signal_goes_straight_to_killing_and_names_who_was_killed(tmp_path):
    write(tmp_path, f'[jobs.slow]\ncommand = {STUBBORN}\ngrace = "50s"\n[jobs.quick]\ncommand = {SLEEPER}')
    async with daemon(tmp_path) as under_test:
        await under_test.said("ready", job="slow")
        await trio.sleep(0.2)  # lets the shell set its trap; without it the test is only easier
        under_test.signal(signal.SIGTERM)
        await under_test.said("ended", job="quick")
        await trio.sleep(0.25)  # the rule is about real time
        under_test.signal(signal.SIGINT)
        assert await under_test.ended() == 0
        late = await under_test.said("did not stop in time and were killed")
        assert late["jobs"] == ["slow"] and under_test.family() == []


async def test_an_echo_of_the_signal_is_not_taken_for_impatience(tmp_path):
    write(
        tmp_path,
        """[jobs.slow]\ncommand = ["sh", "-c", "trap 'sleep 0.3; exit 0' TERM; echo up; while :; do sleep 0.01; done"]
    ready = { log = "up" }""",
    )
    async with daemon(tmp_path) as under_test:
        await under_test.said("ready", job="slow")
        for _ in range(5):
            under_test.signal(signal.SIGTERM)
            under_test.signal(signal.SIGINT)
        assert await under_test.ended() == 0
        assert (await under_test.said("ended", job="slow"))["code"] == 0
        assert "killing" not in [line["phase"] for line in under_test.events("phase_changed")]


async def test_kill_9_of_the_daemon_leaves_no_child(tmp_path):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        await under_test.said("ready", job="a")
        await under_test.said("ready", job="b")
        family = [pid for pid in under_test.family() if pid != under_test.process.pid]
        under_test.signal(signal.SIGKILL)
        for pid in family:
            await gone(pid)
        assert under_test.family() == []


async def test_an_essential_job_that_fails_ends_the_daemon_with_1(tmp_path):
    write(tmp_path, '[jobs.migrate]\ncommand = ["false"]\nonce = true\nrestart = "temporary"\nessential = true\n' + TWO)
    async with daemon(tmp_path) as under_test:
        assert await under_test.ended() == 1
        assert under_test.family() == []


async def test_a_root_that_gives_up_ends_the_daemon_with_1(tmp_path):
    write(tmp_path, '[daemon]\nintensity = 0\n[jobs.bad]\ncommand = ["false"]\n' + TWO)
    async with daemon(tmp_path) as under_test:
        assert await under_test.ended() == 1
        assert "more than 0 restarts" in (await under_test.said("gave up"))["cause"]
        assert under_test.family() == []


async def test_threads_that_compute_leave_the_loop_its_turn(tmp_path):
    """Python lets a thread compute for 5 ms while others wait; a daemon has it stop sooner."""
    (tmp_path / "turns.py").write_text(
        "import sys\n\n\ndef turn(ctx: 'Context'):\n    ctx.log.info('a turn', of=sys.getswitchinterval())\n"
    )
    write(tmp_path, '[jobs.turn]\ncall = "turns:turn"\nonce = true\n' + TWO)
    async with daemon(tmp_path) as under_test:
        assert (await under_test.said("a turn"))["of"] == pytest.approx(0.001)


SABOTAGE = """
import supervisor.events.journal

async def job():
    def apply(table, event):
        raise RuntimeError("a fault of ours")
    supervisor.events.journal.apply = apply
"""


async def test_a_fault_of_ours_ends_the_daemon_with_70_and_a_traceback_and_no_child_is_left(tmp_path):
    write(tmp_path, SABOTAGE, "sabotage.py")
    write(tmp_path, TWO + '[jobs.c]\ncall = "sabotage:job"\nafter = ["a", "b"]')
    async with daemon(tmp_path) as under_test:
        assert await under_test.ended() == 70
        fault = await under_test.said("a fault of ours: please report it")
        assert fault["level"] == "critical" and "RuntimeError: a fault of ours" in fault["exception"]
        for pid in under_test.family():
            await gone(pid)


# -- the start ----------------------------------------------------------------------------------------------------------


async def test_a_second_daemon_is_refused_with_73_and_told_who_is_there(tmp_path):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        await under_test.said("running")
        second = await supervisor(tmp_path, "run")
        assert second.returncode == 73
        assert f"another daemon (pid {under_test.process.pid}) runs with {tmp_path}" in second.stderr.decode()
        under_test.signal(signal.SIGTERM)
        assert await under_test.ended() == 0
    async with daemon(tmp_path) as again:  # the lock file is still there, and nobody's
        await again.said("running")


async def test_a_file_with_faults_is_refused_with_78_before_anything_is_made(tmp_path):
    write(tmp_path, "[jobs.a]\ncommand = 5\nrestrat = 1\n[jobs.b]\nafter = ['c']\ncommand = 'true'")
    refused = await supervisor(tmp_path, "run")
    lines = refused.stderr.decode().splitlines()
    assert refused.returncode == 78 and len(lines) == 3
    assert any(line.startswith(f"{'supervisor.toml'}:3:1: jobs.a.restrat") or ":3:1: jobs.a.restrat" in line for line in lines)
    assert os.listdir(tmp_path) == ["supervisor.toml"]


async def test_a_file_that_is_not_there_is_refused_with_78(tmp_path):
    refused = await supervisor(tmp_path, "run", "-c", "nowhere.toml")
    assert refused.returncode == 78 and "nowhere.toml" in refused.stderr.decode()


async def test_a_log_file_that_cannot_be_written_is_refused_with_78(tmp_path):
    write(tmp_path, TWO + '[log]\nfile = "nowhere/log"')
    refused = await supervisor(tmp_path, "run")
    assert refused.returncode == 78 and "log.file: cannot write to" in refused.stderr.decode()


async def test_state_is_private_and_ignored_by_git(tmp_path):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        await under_test.said("running")
        state = tmp_path / ".supervisor"
        assert state.stat().st_mode & 0o777 == 0o700 and (state / ".gitignore").read_text() == "*\n"
        assert (state / "lock").read_text() == f"{under_test.process.pid}\n"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a directory away")
async def test_somebody_elses_state_directory_is_refused(tmp_path):
    write(tmp_path, TWO)
    (tmp_path / ".supervisor").mkdir()
    os.chown(tmp_path / ".supervisor", 12345, 12345)
    refused = await supervisor(tmp_path, "run")
    assert refused.returncode == 73 and "belongs to uid 12345" in refused.stderr.decode()


async def test_a_socket_elsewhere_is_found_from_here(tmp_path):
    (tmp_path / "app").mkdir()
    write(tmp_path / "app", TWO + '[daemon]\nsocket = "../run/s.sock"')
    async with daemon(tmp_path / "app") as under_test:
        await under_test.said("running")
        link = tmp_path / "app/.supervisor/control.sock"
        assert link.is_symlink() and link.resolve() == tmp_path / "run/s.sock"
        status = await supervisor(tmp_path / "app", "status", "--json")
        assert {row["name"] for row in json.loads(status.stdout)} == {"a", "b"}
        under_test.signal(signal.SIGTERM)
        assert await under_test.ended() == 0
        assert not link.is_symlink()


async def test_only_starts_what_was_asked_for_and_does_not_wait_for_the_rest(tmp_path):
    write(tmp_path, TWO + f'[jobs.c]\ncommand = {SLEEPER}\nafter = ["a"]\n[supervisors.g]\nchildren = ["b"]')
    async with daemon(tmp_path, "--only", "c") as under_test:
        await under_test.said("ready", job="c")
        status = await supervisor(tmp_path, "status", "--json")
        states = {row["name"]: row["state"] for row in json.loads(status.stdout)}
        assert (states["a"], states["b"], states["c"]) == ("stopped", "stopped", "running")
    misspelt = await supervisor(tmp_path, "run", "--only", "cc")
    assert misspelt.returncode == 2 and "did you mean 'c'?" in misspelt.stderr.decode()


async def fed(fifo: Path, text: str) -> None:
    """Hand `text` to whoever opens `fifo` for reading; returns when it has been opened and written."""

    def feed() -> None:
        with open(fifo, "w") as file:
            file.write(text)

    with trio.fail_after(30):
        await trio.to_thread.run_sync(feed, abandon_on_cancel=True)


async def test_a_signal_while_the_file_is_still_being_read_is_neither_lost_nor_deadly(tmp_path):
    os.mkfifo(tmp_path / "f.toml")
    async with daemon(tmp_path, "-c", "f.toml") as under_test:
        with trio.fail_after(30):  # open succeeds when the daemon reads; as long as it is open, the daemon waits
            held = await trio.to_thread.run_sync(partial(open, tmp_path / "f.toml", "w"), abandon_on_cancel=True)
        under_test.signal(signal.SIGTERM)
        assert await under_test.ended() == 0
        held.close()
        assert under_test.noise == [] and under_test.lines == []


async def test_a_reload_asked_for_during_the_start_is_made_after_it(tmp_path):
    os.mkfifo(tmp_path / "f.toml")
    async with daemon(tmp_path, "-c", "f.toml") as under_test:
        with trio.fail_after(30):
            first = await trio.to_thread.run_sync(partial(open, tmp_path / "f.toml", "w"), abandon_on_cancel=True)
        for _ in range(3):
            under_test.signal(signal.SIGHUP)
        first.write(TWO)
        first.close()
        await under_test.said("running")
        await fed(tmp_path / "f.toml", TWO + f"[jobs.c]\ncommand = {SLEEPER}")
        assert (await under_test.said("reloaded"))["added"] == ["c"]


# -- reload -------------------------------------------------------------------------------------------------------------


async def test_sighup_with_a_good_file_touches_only_what_changed(tmp_path):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        first = await under_test.said("ready", job="a")
        await under_test.said("ready", job="b")
        write(tmp_path, f'[log]\nlevel = "debug"\n[jobs.a]\ncommand = {SLEEPER}\n[jobs.c]\ncommand = {SLEEPER}')
        under_test.signal(signal.SIGHUP)
        reloaded = await under_test.said("reloaded")
        assert (reloaded["added"], reloaded["removed"], reloaded["by"]) == (["c"], ["b"], "SIGHUP")
        await under_test.said("ready", job="c")
        await under_test.said("removed", job="b")
        assert (await under_test.said("added", job="c"))["level"] == "debug"  # the new level holds
        os.kill(first["pid"], 0)
        assert len(under_test.events("ready")) == 3


async def test_sighup_with_a_broken_file_reports_the_faults_and_changes_nothing(tmp_path):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        jobs = {(await under_test.said("ready", job=name))["pid"] for name in ("a", "b")}
        write(tmp_path, TWO + "[jobs.c]\ncommand = 5\nrestrat = 1")
        under_test.signal(signal.SIGHUP)
        refused = await under_test.said("reload_refused")
        assert refused["level"] == "error" and len(refused["problems"]) == 2 and "jobs.c.restrat" in refused["problems"][1]

        write(tmp_path, TWO + '[jobs.c]\ncommand = ["no-such-program-here"]')  # a fault of the environment counts, too
        under_test.signal(signal.SIGHUP)
        missing = await under_test.said("reload_refused", seq=refused["seq"] + 1)
        assert len(missing["problems"]) == 1 and "no-such-program-here" in missing["problems"][0]
        assert jobs < set(under_test.family()) and not [line for line in under_test.lines if line.get("job") == "c"]
        write(tmp_path, TWO + f"[jobs.c]\ncommand = {SLEEPER}")
        under_test.signal(signal.SIGHUP)
        assert (await under_test.said("reloaded"))["added"] == ["c"]


async def test_the_reload_command_reports_the_faults_to_its_caller(tmp_path):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        await under_test.said("running")
        write(tmp_path, TWO + "[jobs.c]\nrestrat = 1\ncommand = 'true'")
        refused = await supervisor(tmp_path, "reload")
        assert refused.returncode == 78 and ":8:1: jobs.c.restrat" in refused.stderr.decode()
        write(tmp_path, TWO + f"[jobs.c]\ncommand = {SLEEPER}")
        plan = await supervisor(tmp_path, "reload", "--plan")
        assert plan.returncode == 0 and b"c" in plan.stdout and not under_test.events("reloaded")
        assert (await supervisor(tmp_path, "reload")).returncode == 0
        await under_test.said("ready", job="c")


# -- who looks on -------------------------------------------------------------------------------------------------------

FLOOD = """
async def flood(ctx: "Context"):
    for number in range(30_000):
        ctx.log.info("x" * 100, number=number)
    open("flooded", "w").close()
    await ctx.wait_stopping()

from supervisor.kinds import Context
"""


async def test_a_reader_of_stderr_that_does_not_read_stalls_nothing(tmp_path):
    os.mkfifo(tmp_path / "flooded")
    write(tmp_path, FLOOD, "flood.py")
    write(tmp_path, TWO + '[jobs.flood]\ncall = "flood:flood"')
    async with daemon(tmp_path, read=False) as under_test:
        with trio.fail_after(30):
            await trio.to_thread.run_sync((tmp_path / "flooded").read_bytes, abandon_on_cancel=True)
        with trio.fail_after(60):
            while (status := await supervisor(tmp_path, "status", "--json")).returncode == 3:
                pass  # the job has begun before the socket was there
        assert {row["state"] for row in json.loads(status.stdout)} == {"running"}
        under_test.signal(signal.SIGTERM)
        assert await under_test.ended() == 0
        assert under_test.family() == []


TALKERS = """
import logging
import structlog

async def task():
    structlog.get_logger().info("by structlog")

def thread():
    logging.getLogger("library").warning("by logging")

async def fail():
    secret = "s3cr3" + "t"
    raise ValueError("it is out of order")
"""


async def test_what_jobs_log_by_any_logger_carries_their_name_and_run(tmp_path):
    write(tmp_path, TALKERS, "talkers.py")
    write(tmp_path, "".join(f'[jobs.{name}]\ncall = "talkers:{name}"\nonce = true\n' for name in ("task", "thread", "fail")))
    async with daemon(tmp_path) as under_test:
        assert (await under_test.said("by structlog", job="task", run="task#1"))["level"] == "info"
        assert (await under_test.said("by logging", job="thread", run="thread#1"))["logger"] == "library"
        await under_test.said("ended", job="fail")
        (shown,) = [
            line for line in under_test.lines if "exception" in line and line["job"] == "fail" and line["run"] == "fail#1"
        ]
        assert "ValueError: it is out of order" in shown["exception"] and "s3cr3t" not in repr(under_test.lines)


async def test_values_of_the_environment_are_never_in_the_log(tmp_path):
    write(
        tmp_path,
        '[log]\nlevel = "debug"\n[jobs.a]\ncommand = ["sh", "-c", "exit 3"]\nenv = { TOKEN = "s3cr3t", U = "${HIDDEN}" }',
    )
    async with daemon(tmp_path, HIDDEN="h1dden") as under_test:
        await under_test.said("ended", job="a")
        under_test.signal(signal.SIGHUP)
        await under_test.said("reloaded")
        assert "s3cr3t" not in repr(under_test.lines) and "h1dden" not in repr(under_test.lines)


async def test_on_a_terminal_lines_of_jobs_carry_their_name_and_a_person_is_told_what_to_do(tmp_path):
    write(tmp_path, '[jobs.hello]\ncommand = ["sh", "-c", "echo good morning; sleep 1000"]')
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*SUPERVISOR, "run"], cwd=tmp_path, env=environment("pty", NO_COLOR="1"), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    text = b""
    with trio.fail_after(30):
        while b"hello        | good morning" not in text or b"supervisor status" not in text:
            await trio.lowlevel.wait_readable(ours)
            text += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert await trio.to_thread.run_sync(process.wait) == 0
    os.close(ours)
    assert b"1 job" in text or b"jobs=1" in text


async def test_shutdown_is_answered_before_the_daemon_ends(tmp_path):
    write(tmp_path, TWO)
    async with daemon(tmp_path) as under_test:
        await under_test.said("running")
        answered = await supervisor(tmp_path, "shutdown")
        assert answered.returncode == 0, answered.stderr
        assert await under_test.ended() == 0


# -- surroundings -------------------------------------------------------------------------------------------------------


async def test_the_service_manager_hears_of_every_step_and_of_the_end_of_every_reload(tmp_path):
    write(tmp_path, TWO + '[jobs.env]\ncommand = ["sh", "-c", "env > env.txt; exec sleep 1000"]')
    manager = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    await manager.bind(str(tmp_path / "notify"))
    with manager:

        async def heard(*starts: str) -> None:
            """The next messages, watchdog aside, begin so."""
            for start in starts:
                with trio.fail_after(30):
                    while (message := (await manager.recv(4096)).decode()) == "WATCHDOG=1":
                        pass
                assert message.startswith(start), message

        async with daemon(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000") as under_test:
            await heard("READY=1\nSTATUS=3 jobs from ")
            assert (await supervisor(tmp_path, "status")).returncode == 0
            await under_test.said("ready", job="env")
            with trio.fail_after(30):
                while (await manager.recv(4096)) != b"WATCHDOG=1":
                    pass
            write(tmp_path, "broken = ")
            under_test.signal(signal.SIGHUP)
            await heard("RELOADING=1\nMONOTONIC_USEC=", "READY=1\nSTATUS=3 jobs")
            write(tmp_path, TWO)
            under_test.signal(signal.SIGHUP)
            await heard("RELOADING=1", "READY=1\nSTATUS=2 jobs")
            under_test.signal(signal.SIGTERM)
            await heard("STOPPING=1\nEXTEND_TIMEOUT_USEC=90000000\nSTATUS=")
            assert await under_test.ended() == 0
    assert "NOTIFY_SOCKET" not in (tmp_path / "env.txt").read_text()


async def test_directories_of_systemd_are_used(tmp_path):
    write(tmp_path, TWO)
    state, runtime = tmp_path / "state", tmp_path / "runtime"
    runtime.mkdir()
    async with daemon(tmp_path, STATE_DIRECTORY=str(state), RUNTIME_DIRECTORY=f"{runtime}:/other") as under_test:
        running = await under_test.said("running")
        assert running["socket"] == str(runtime / "control.sock") and (runtime / "control.sock").is_socket()
        await under_test.said("ready", job="b")
        under_test.signal(signal.SIGTERM)
        assert await under_test.ended() == 0
        assert (state / "lock").exists() and (state / "logs" / "b.log").read_text() == "up\n"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
async def test_as_the_first_process_of_a_container_it_works_and_leaves_no_zombie(tmp_path):
    write(tmp_path, '[jobs.a]\ncommand = ["sh", "-c", "(setsid sh -c \'sleep 0.1\' &) ; echo up; exec sleep 1000"]')
    wrap = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
    async with daemon(tmp_path, wrap=wrap) as under_test:
        assert (await under_test.said("running"))["pid"] == 1
        await under_test.said("ready", job="a")
        (first,) = [
            pid for pid in under_test.family() if pid != under_test.process.pid and _parent(pid) == under_test.process.pid
        ]
        os.kill(first, signal.SIGTERM)
        assert await under_test.ended() == 0


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended meanwhile
        return 0
