"""Bad input and faults: what a daemon, its processes and its disk can meet with, and that nobody else suffers from it.

Each is tried with a real daemon and real processes, through the `supervisor` command. What another file tries already is not
tried again, but stands in the list.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from running import MODULE, Running, command, running, well

from supervisor.state import State

COVERED = {
    "command not found, not executable, a directory; wrong user; cwd missing; env_file missing or malformed": (
        "test_process_daemon.py::test_every_fault_of_the_machine_is_told_by_check_and_fails_its_job_alone_at_the_start",
        "test_children.py::test_a_failed_spawn_says_what_to_do_and_leaves_nothing",
    ),
    "a port already taken for a socket": (
        "test_process_daemon.py::test_every_fault_of_the_machine_is_told_by_check_and_fails_its_job_alone_at_the_start",
        "test_sockets.py::test_a_port_that_is_taken_fails_who_needs_it_and_is_tried_again",
    ),
    "a probe target that hangs": (
        "test_probing.py::test_a_server_that_listens_and_never_answers_is_not_ready_and_has_given_no_answer",
        "test_questions.py::test_a_tcp_target_that_never_answers_is_no_answer",
        "test_questions.py::test_a_command_that_takes_too_long_is_killed_with_all_its_tree",
        "test_questions.py::test_a_thread_that_hangs_gives_no_answer_and_gets_no_second_beside_it",
    ),
    "child exits before ready": ("test_faults.py::test_a_child_that_ends_before_it_is_ready_is_told_to_who_waits",),
    "child that forks 10 000 times while being killed": (
        "test_faults.py::test_a_child_that_goes_on_forking_while_it_is_killed_leaves_nothing",
        "test_children.py::test_a_child_that_forks_while_it_is_killed_does_not_get_away",
    ),
    "ignores SIGTERM": (
        "test_end_to_end.py::test_a_shutdown_says_who_had_to_be_killed",
        "test_kind_command.py::test_when_grace_is_over_everything_is_killed",
    ),
    "stops itself (SIGSTOP)": (
        "test_faults.py::test_a_child_that_stops_itself_is_seen_as_not_ready_and_can_be_stopped",
        "test_kind_command.py::test_a_stopped_process_is_stopped_all_the_same",
    ),
    "EMFILE in the daemon": (
        "test_faults.py::test_without_descriptors_new_runs_fail_in_words_and_all_else_goes_on",
        "test_control.py::test_the_operator_is_answered_when_the_process_has_no_descriptors_left",
    ),
    "full disk": (
        "test_faults.py::test_on_a_full_disk_the_job_goes_on_its_loss_is_told_and_ends",
        "test_output.py::test_a_full_disk_loses_what_it_cannot_hold_and_no_more",
        "test_log.py::test_a_full_disk_loses_lines_and_nothing_else_and_writing_resumes_by_itself",
    ),
    "log directory removed while running": (
        "test_faults.py::test_a_log_directory_that_is_removed_comes_back",
        "test_output.py::test_a_removed_log_directory_costs_nothing",
    ),
    "clock set back": ("test_faults.py::test_a_wall_clock_that_is_set_back_moves_nothing",),
    "200 jobs crashing at once in a loop": (
        "test_faults.py::test_a_storm_of_crashes_leaves_control_answering_and_memory_flat",
    ),
}
"""Where each line of the list is tried."""


@pytest.mark.parametrize("line", COVERED)
def test_every_line_of_the_list_is_tried(line):
    for place in COVERED[line]:
        file, _, name = place.partition("::")
        tree = ast.parse(Path(__file__).with_name(file).read_text())
        assert any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name for node in tree.body), place


def write(directory: Path, text: str) -> None:
    (directory / "supervisor.toml").write_text(text)


BYSTANDER = '[jobs.bystander]\ncommand = ["sleep", "100000"]\n'


def unharmed(rows: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> bool:
    """Whether the bystander has noticed nothing."""
    return rows["bystander"]["pid"] == before["bystander"]["pid"] and rows["bystander"]["state"] == "running"


# -- starting


async def test_a_child_that_ends_before_it_is_ready_is_told_to_who_waits(tmp_path):
    keys = 'start = "manual"\nready = { log = "ready" }\nbackoff = { initial = "1h", max = "1h" }'
    write(tmp_path, f'[jobs.hasty]\ncommand = ["sh", "-c", "echo not yet; exit 3"]\n{keys}\n{BYSTANDER}')
    async with running(tmp_path) as daemon:
        before = await daemon.rows()
        said = await daemon("start", "hasty", code=1)
        assert "exited with code 3; it never became ready" in said
        assert "backing off" in await daemon("status", "hasty", code=5)
        assert "not yet" in await daemon("logs", "hasty")
        assert unharmed(await daemon.rows(), before)


# -- stopping

FORKS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
for number in range(10_000):
    try:
        if os.fork() == 0:
            if number % 3 == 0:
                os.setsid()
            time.sleep(1000)
    except OSError:
        time.sleep(0.01)
time.sleep(1000)
"""


async def test_a_child_that_goes_on_forking_while_it_is_killed_leaves_nothing(tmp_path):
    """Ten thousand forks, or as many as it gets done: it hears no SIGTERM, and every third child leaves its session."""
    (tmp_path / "forks.py").write_text(FORKS)
    keys = 'start = "manual"\nready = { log = "ready" }\ngrace = "200ms"'
    write(tmp_path, f'[jobs.forks]\ncommand = ["{sys.executable}", "forks.py"]\n{keys}\n{BYSTANDER}')
    async with running(tmp_path) as daemon:
        await daemon.until(lambda table: table["bystander"].ready)
        before = await daemon.rows()
        await daemon("start", "forks")
        while len(daemon.family()) < 100:
            await trio.sleep(0.01)
        assert "stopped (killed after" in await daemon("stop", "forks")
        left = daemon.family() - {daemon.process.pid, before["bystander"]["pid"]}
        assert len(left) == 1  # the guardian
        assert unharmed(await daemon.rows(), before)


async def test_a_child_that_stops_itself_is_seen_as_not_ready_and_can_be_stopped(tmp_path):
    script = '["sh", "-c", "kill -STOP $$; echo ready; sleep 1000"]'
    early = 'start_timeout = "300ms"\nready = { log = "ready" }\nbackoff = { initial = "1h", max = "1h" }'
    late = 'ready = { log = "up" }'
    write(
        tmp_path,
        f"[jobs.early]\ncommand = {script}\n{early}\n"
        f'[jobs.late]\ncommand = ["sh", "-c", "echo up; kill -STOP $$; sleep 1000"]\n{late}\n{BYSTANDER}',
    )
    async with running(tmp_path) as daemon:
        await daemon.until(lambda table: table["early"].word == "backing off" and table["late"].ready)
        rows = await daemon.rows()
        assert rows["early"]["cause"] == "not ready within 0.3 s (start_timeout)"
        assert await daemon("stop", "late") == "late: stopped\n"  # SIGCONT comes with the signal
        assert unharmed(await daemon.rows(), rows)


# -- what runs out


async def test_without_descriptors_new_runs_fail_in_words_and_all_else_goes_on(tmp_path):
    """Each captured child costs the daemon descriptors; it is given 64, and 60 jobs."""
    keys = 'backoff = { initial = "1h", max = "1h" }'
    many = "".join(f'[jobs.c{number:02}]\ncommand = ["sleep", "100000"]\nstart = "manual"\n{keys}\n' for number in range(60))
    write(tmp_path, BYSTANDER + many)
    few = ("sh", "-c", 'ulimit -n 64; exec "$0" "$@"')
    async with running(tmp_path, program=(*few, *MODULE)) as daemon:
        await daemon.until(lambda table: table["bystander"].ready)
        before = await daemon.rows()
        await begin(daemon, "c*")

        def scarce(table: Any) -> bool:
            running_ = sum(row.ready for row in table.values())
            return running_ + sum("raise the limit of open files" in row.cause for row in table.values()) == len(table)

        table = await daemon.until(scarce)
        up = [name for name, row in table.items() if row.ready and name != "bystander"]
        assert 0 < len(up) < 60
        assert unharmed(await daemon.rows(), before)
        await daemon("stop", *up)
        others = [name for name in table if name not in (*up, "bystander")]
        await begin(daemon, *others)  # and now there are some for them
        await daemon.until(lambda table: any(table[name].ready for name in others))
        assert unharmed(await daemon.rows(), before)
        assert "Traceback" not in repr(daemon.log)


async def begin(daemon: Running, *names: str) -> None:
    """Have them start, whatever becomes of it."""
    await command(daemon.program, "start", "--no-wait", *names, directory=daemon.directory)


SMALL = """mount -t tmpfs -o size=256k none "$0" && exec "$@" """


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
async def test_on_a_full_disk_the_job_goes_on_its_loss_is_told_and_ends(tmp_path):
    (tmp_path / "small").mkdir()
    script = r"while :; do echo $(date +%s) $(head -c 3000 /dev/zero | tr '\\0' x); done"
    keys = 'output = "small/out.log"\nrotate = { size = 0 }'
    write(tmp_path, f'[jobs.chatty]\ncommand = ["sh", "-c", "{script}"]\n{keys}\n{BYSTANDER}')
    program = ("unshare", "-m", "sh", "-c", SMALL, str(tmp_path / "small"), *MODULE)
    async with running(tmp_path, program=program) as daemon:
        daemon.program = MODULE
        await daemon.said("output_lost", job="chatty")
        before = await daemon.rows()
        assert before["chatty"]["state"] == "running" and before["chatty"]["restarts"] == 0
        inside = Path(f"/proc/{daemon.process.pid}/root{tmp_path}/small/out.log")
        assert inside.stat().st_size > 100_000
        inside.unlink()  # somebody makes room
        with trio.fail_after(60):
            while not inside.exists() or inside.stat().st_size == 0:
                await trio.sleep(0.05)
        assert unharmed(await daemon.rows(), before)
        assert (await daemon.rows())["chatty"]["pid"] == before["chatty"]["pid"]
        assert "Traceback" not in repr(daemon.log)


async def test_a_log_directory_that_is_removed_comes_back(tmp_path):
    write(tmp_path, f'[jobs.words]\ncommand = ["sh", "-c", "echo said by $$; exec sleep 1000"]\n{BYSTANDER}')
    async with running(tmp_path) as daemon:
        await daemon.until(well)
        before = await daemon.rows()
        logs = tmp_path / ".supervisor" / "logs"
        with trio.fail_after(30):
            while not (logs / "words.log").exists():
                await trio.sleep(0.01)
        shutil.rmtree(logs)
        await daemon("restart", "words")
        pid = (await daemon.rows())["words"]["pid"]
        with trio.fail_after(30):
            while f"said by {pid}" not in await daemon("logs", "words"):
                await trio.sleep(0.05)
        assert (logs / "words.log").read_text() == f"said by {pid}\n"
        assert unharmed(await daemon.rows(), before)


# -- time

SHIFTED = """
import datetime, os, sys, time

def shift():
    with open(os.environ["SHIFT"]) as file:
        return int(file.read())

real = {name: getattr(time, name) for name in ("time", "time_ns", "clock_gettime", "clock_gettime_ns")}
time.time = lambda: real["time"]() + shift()
time.time_ns = lambda: real["time_ns"]() + shift() * 10**9
time.clock_gettime = lambda which: real["clock_gettime"](which) + (which == time.CLOCK_REALTIME) * shift()
time.clock_gettime_ns = lambda which: real["clock_gettime_ns"](which) + (which == time.CLOCK_REALTIME) * shift() * 10**9

class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

datetime.datetime = Shifted
from supervisor.__main__ import main
sys.argv[0] = "supervisor"
main()
"""
"""The program, with a wall clock that a file can move. (The kernel's own is the whole machine's, also in a namespace.)"""


async def test_a_wall_clock_that_is_set_back_moves_nothing(tmp_path):
    """By a day: what waits goes on waiting for as long as it should, and what is shown is no nonsense."""
    (tmp_path / "shift").write_text("0")
    (tmp_path / "shifted.py").write_text(SHIFTED)
    write(
        tmp_path,
        '[jobs.tick]\ncommand = ["true"]\nevery = "200ms"\n'
        '[jobs.crash]\ncommand = ["false"]\nbackoff = { initial = "200ms", max = "200ms" }\n'
        '[jobs.late]\ncommand = ["sleep", "1000"]\nready = { file = "never" }\nstart_timeout = "2s"\n' + BYSTANDER,
    )
    program = (sys.executable, "-P", str(tmp_path / "shifted.py"))
    async with running(tmp_path, program=program, SHIFT=str(tmp_path / "shift")) as daemon:
        table = await daemon.until(lambda table: table["crash"].restarts > 1 and table["bystander"].ready)
        before = await daemon.rows()
        seq = (await daemon("events", "--json")).count("\n")
        (tmp_path / "shift").write_text(str(-86400))
        runs = table["crash"].restarts
        await daemon.until(lambda table: table["crash"].restarts > runs + 2)
        rows = await daemon.until(lambda table: table["late"].word == "backing off" or table["late"].restarts > 0)
        assert rows["crash"].since < before["crash"]["since"]  # the clock was set back indeed
        ticks = [line for line in (await daemon("events", "--json", "--since", str(seq))).splitlines() if '"tick#' in line]
        assert len(ticks) > 6
        assert not re.search(r"-\d", await daemon("status", code=5))  # no time is negative
        assert unharmed(await daemon.rows(), before)
        assert await daemon("restart", "bystander") != ""
        assert "Traceback" not in repr(daemon.log)


# -- many


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.limit(300)
async def test_a_storm_of_crashes_leaves_control_answering_and_memory_flat(tmp_path, seconds):
    keys = 'command = ["false"]\noutput = "null"\nbackoff = { initial = "200ms", factor = 1, jitter = 0 }'
    write(tmp_path, "".join(f"[jobs.c{number:03}]\n{keys}\n" for number in range(200)) + BYSTANDER)
    async with running(tmp_path) as daemon:
        with trio.fail_after(60):
            while min(row["restarts"] for name, row in (await daemon.rows()).items() if name != "bystander") < 3:
                await trio.sleep(0.1)  # its events are too many to follow
        before, memory = await daemon.rows(), resident(daemon)
        waits = await asked(daemon, seconds)
        rows, grown = await daemon.rows(), resident(daemon) - memory
        crashes = sum(rows[name]["restarts"] - before[name]["restarts"] for name in rows)
        mean, worst = statistics.median(waits) * 1000, max(waits) * 1000
        print(
            f"{crashes} restarts in {seconds} s; version asked {len(waits)} times: median {mean:.1f} ms, worst {worst:.1f} ms; "
            f"the daemon grew by {grown / 2**20:.1f} MB"
        )
        assert crashes > 0 and len(waits) > 1
        assert unharmed(rows, before)
        assert grown < 32 << 20
        assert await daemon("stop", "c*") != ""
        assert {row["state"] for name, row in (await daemon.rows()).items() if name != "bystander"} == {State.STOPPED.value}


async def asked(daemon: Running, seconds: float) -> list[float]:
    """How long each answer to `version` took, asked ten times a second, each time on a connection of its own."""
    waits: list[float] = []
    client, end = daemon.client(), trio.current_time() + seconds
    while (began := trio.current_time()) < end:
        await client.version()
        waits.append(trio.current_time() - began)
        await trio.sleep(0.1)
    return waits


def resident(daemon: Running) -> int:
    return int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
