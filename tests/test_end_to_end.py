"""From the outside: the installed `supervisor` script, real files, real children, real signals."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import tarfile
import tomllib
import urllib.request
from datetime import datetime
from pathlib import Path

import pytest
import trio
from running import ROOT, SCRIPT, clone, command, running, well

from supervisor import events

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="not installed here: pip install --no-deps --no-build-isolation -e . (see the README)"
)
PROGRAM = (str(SCRIPT),)
FACTS = {"name", "kind", "state", "goal", "cause", "pid", "restarts", "since"}


def write(directory: Path, text: str) -> Path:
    file = directory / "supervisor.toml"
    file.write_text(text)
    return file


def seconds(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


# -- the shipped file ---------------------------------------------------------------------------------------------------


async def test_the_shipped_file_does_visible_work_survives_a_kill_and_leaves_nothing(tmp_path):
    clone(tmp_path)
    var = tmp_path / "var"
    async with running(tmp_path, program=PROGRAM, PORT=str(_free_port())) as daemon:
        await daemon.said("ready", job="heartbeat")
        await daemon.said("ready", job="web")
        await daemon.said("indexed", job="index")
        async with daemon.watching() as watch:  # until a letter has gone its way through both jobs, and is reported
            while "letters filed: 0" in (report := _text(var / "report.txt")) or not report:
                while not (isinstance(event := await watch.next(), events.Ended) and event.name == "report"):
                    pass

        beats = [json.loads(line) for line in (var / "heartbeat.jsonl").read_text().splitlines()]
        assert beats[0]["beat"] == 1 and beats[0]["run"] == "heartbeat#1"
        assert dict(json.loads((var / "words.json").read_text())["words"])["self"] > 100
        port = re.search(r"port (\d+)", await daemon("logs", "web"))
        assert port is not None
        report = await trio.to_thread.run_sync(_fetch, f"http://127.0.0.1:{port[1]}/report.txt")
        assert re.match(r"heartbeats: [1-9]\d*\nletters waiting: \d+\nletters filed: [1-9]\d*\n", report)
        assert gzip.decompress(next((var / "archive").glob("*.gz")).read_bytes()).startswith(b"letter ")
        assert await daemon("run-now", "backup") == "backup: exited with code 0\n"
        with tarfile.open(var / "backup.tar.gz") as backup:
            assert set(backup.getnames()) == {"report.txt", "words.json"}

        await _every_pattern_has_left_something(daemon, var)
        rows = await daemon.rows()
        assert rows.keys() == {
            *("prepare", "heartbeat", "index", "web", "report", "flaky", "backup", "letters", "writer", "filer"),
            *("desk", "pages", "digest", "euro", "franc", "primes", "clock"),
            *("orders", "painter", "painter:0", "painter:1"),
        }
        assert all(row.keys() >= FACTS for row in rows.values())
        assert rows["prepare"]["word"] == "completed" and rows["report"]["word"] == "scheduled"
        assert rows["writer"]["supervisor"] == "letters" and rows["letters"]["kind"] == "supervisor"
        assert (rows["primes"]["kind"], rows["clock"]["kind"]) == ("process", "asyncio")
        assert rows["digest"]["next_at"].endswith(":00.000Z")
        assert {name for name, row in rows.items() if row["pid"]} == {"web", "primes", "painter:0", "painter:1"}

        await _a_killed_child_is_back_within_the_second(daemon, "web")

        # the daemon, its guardian, the web server, the processes of primes and painter, and what checks the painter's items
        assert len(daemon.family()) == 7
        daemon.process.send_signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert daemon.family() == set()
        assert "goodbye" in (var / "heartbeat.jsonl").read_text().splitlines()[-1]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


async def _every_pattern_has_left_something(daemon, var):
    """What the jobs that show the patterns write; `franc` may have to wait for its partner, `euro` falls back."""
    async with daemon.watching() as watch:
        files = [var / name for name in ("letters.txt", "pages.json", "digest.txt", "euro.json", "primes.txt")]
        while not all(map(_text, files)):
            await watch.next()
    assert re.match(r"\d+ letters since", _text(var / "letters.txt"))
    assert json.loads(_text(var / "pages.json")).keys() == {"report.txt", "words.json", "heartbeat.jsonl"}
    assert re.match(r"\d+ beats from .* to ", _text(var / "digest.txt"))
    assert json.loads(_text(var / "euro.json"))["currency"] == "EUR"
    assert re.match(r"\d+ primes below \d+", _text(var / "primes.txt"))
    async with await trio.open_unix_socket(str(var / "clock.sock")) as clock:
        assert re.fullmatch(rb"\d\d:\d\d:\d\d UTC\n", await clock.receive_some())
    order = json.dumps({"name": "mine", "x": -0.16, "y": 1.04, "width": 0.03})
    assert await daemon("submit", "pictures", order, "--result") == '"var/pictures/mine.pgm"\n'
    assert (var / "pictures" / "mine.pgm").read_bytes().startswith(b"P5 96 96 255\n")
    (queue,) = json.loads(await daemon("queue", "ls", "--json"))
    assert (queue["name"], queue["backend"], queue["jobs"], queue["dead"]) == ("pictures", "sqlite", ["painter"], 0)
    (limit,) = json.loads(await daemon("limits", "--json"))
    assert (limit["name"], set(limit["jobs"])) == ("partner", {"euro", "franc"})
    runs = json.loads(await daemon("history", "euro", "--json"))
    assert {run["outcome"] for run in runs} <= {"completed", "failed"}


async def _a_killed_child_is_back_within_the_second(daemon, name):
    async with daemon.watching() as watch:
        row = watch.table[name]
        os.kill(row.pid, signal.SIGKILL)
        killed = trio.current_time()
        while not isinstance(event := await watch.next(), events.Ended) or event.name != name:
            pass
        assert event.exit.signal == "SIGKILL"
        table = await watch.until(lambda table: table[name].pid not in (None, row.pid))
        assert trio.current_time() - killed < 10  # the machine may be busy; what was decided is exact:
        assert table[name].restarts == row.restarts + 1
        await watch.until(lambda table: table[name].ready)  # `python3` may be a script that starts more than one process
    said = [json.loads(line) for line in (await daemon("events", "--json")).splitlines()]
    (wait,) = [each for each in said if each["event"] == "waiting" and each["name"] == name and each["seq"] > event.seq]
    assert 0.4 <= seconds(event.at, wait["next_at"]) < 0.7
    assert (await daemon.rows())[name]["pid"] == table[name].pid


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())


# -- a command never waits for somebody else's --------------------------------------------------------------------------

SLOW = """
[jobs.slow]             # takes as long to stop as the test likes: until somebody opens its gate
command = ["sh", "-c", "trap 'read x < gate; exit 0' TERM; echo up; while :; do sleep 0.05; done"]
ready = { log = "up" }
grace = "50s"
[jobs.other]
command = ["sleep", "1000"]
[jobs.third]
command = ["sleep", "1000"]
backoff = { initial = "10ms" }
"""


async def test_a_slow_stop_delays_neither_a_restart_nor_the_return_of_what_crashes_meanwhile(tmp_path):
    write(tmp_path, SLOW)
    os.mkfifo(tmp_path / "gate")
    async with running(tmp_path, program=PROGRAM) as daemon:
        before = await daemon.until(well)
        async with trio.open_nursery() as nursery:
            answers: list[str] = []

            async def stop() -> None:
                answers.append(await daemon("stop", "slow"))

            nursery.start_soon(stop)
            await daemon.until(lambda table: table["slow"].word == "stopping")
            assert re.fullmatch(r"other: running, pid \d+\n", await daemon("restart", "other"))
            os.kill(before["third"].pid, signal.SIGKILL)
            after = await daemon.until(lambda table: table["third"].restarts == 1 and table["third"].ready)
            assert after["slow"].word == "stopping" and answers == []
            assert after["third"].pid != before["third"].pid and after["other"].pid != before["other"].pid
            assert after["other"].restarts == 0
            with trio.fail_after(30):
                await trio.to_thread.run_sync((tmp_path / "gate").write_text, "go\n", abandon_on_cancel=True)
        assert answers == ["slow: stopped\n"]
        await daemon("shutdown")
        assert await daemon.ended() == 0 and daemon.family() == set()


# -- a file with faults -------------------------------------------------------------------------------------------------

FAULTY = """
[jobs.api]
command = ["sleep", "1000"]
restrat = "permanent"
grace = "10 parsecs"
after = ["databse"]
[jobs.database]
command = ["sleep", "1000"]
once = 1
[supervisors.web]
strategy = "one_for_al"
"""


async def test_five_faults_are_five_lines_with_places_and_78_and_change_nothing(tmp_path):
    good = write(tmp_path, SLOW.replace("slow", "api"))
    text = good.read_text()
    (tmp_path / "faulty.toml").write_text(FAULTY)
    checked = await command(PROGRAM, "check", "-c", "faulty.toml", directory=tmp_path)
    assert checked.returncode == 78
    lines = checked.stdout.decode().splitlines()
    places = [re.match(r"faulty\.toml:(\d+):\d+: ([\w.\[\]]+): ", line) for line in lines]
    assert [(int(place[1]), place[2]) for place in places if place] == [
        (4, "jobs.api.restrat"),
        (5, "jobs.api.grace"),
        (6, "jobs.api.after[0]"),
        (9, "jobs.database.once"),
        (11, "supervisors.web.strategy"),
    ]
    os.mkfifo(tmp_path / "gate")
    async with running(tmp_path, program=PROGRAM) as daemon:
        await daemon.until(well)
        before = await daemon.rows()
        write(tmp_path, FAULTY)
        refused = await daemon("reload", code=78)
        assert [line.partition("supervisor.toml")[2] for line in refused.splitlines()] == [
            line.partition("faulty.toml")[2] for line in lines
        ]
        daemon.process.send_signal(signal.SIGHUP)
        await daemon.said("reload_refused", by="SIGHUP")
        assert await daemon.rows() == before
        write(tmp_path, text)
        assert await daemon("reload", "--plan") == "nothing has changed\n"
        await daemon("stop", "api", "--now")
        await daemon("shutdown")
        assert await daemon.ended() == 0


async def test_a_second_daemon_is_refused_with_73_and_told_by_whom(tmp_path):
    write(tmp_path, '[jobs.only]\ncommand = ["sleep", "1000"]')
    async with running(tmp_path, program=PROGRAM) as daemon:
        before = (await daemon.until(well))["only"]
        refused = await daemon("run", code=73)
        assert f"another daemon (pid {daemon.process.pid}) runs with {tmp_path}" in refused
        assert "supervisor shutdown" in refused and len(refused.splitlines()) == 1
        assert (await daemon.rows())["only"]["pid"] == before.pid
        daemon.process.send_signal(signal.SIGTERM)
        assert await daemon.ended() == 0 and daemon.family() == set()


async def test_a_shutdown_says_who_had_to_be_killed(tmp_path):
    bad = """command = ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"]\nready = { log = "up" }\n"""
    write(tmp_path, f'[jobs.bad]\n{bad}grace = "100ms"\n[jobs.good]\ncommand = ["sleep", "1000"]')
    async with running(tmp_path, program=PROGRAM) as daemon:
        await daemon.until(lambda table: table["bad"].ready)
        assert await daemon("shutdown") == "did not stop in time and were killed: bad\nthe daemon has stopped\n"
        assert await daemon.ended() == 0 and daemon.family() == set()


async def test_without_a_daemon_a_command_says_where_it_looked_and_ends_with_3(tmp_path):
    asked = await command(PROGRAM, "status", directory=tmp_path)
    assert asked.returncode == 3
    assert str(tmp_path) in asked.stderr.decode() and "supervisor run" in asked.stderr.decode()


async def test_the_starter_file_runs_as_it_is_written(tmp_path):
    written = await command(PROGRAM, "init", directory=tmp_path)
    assert written.returncode == 0
    async with running(tmp_path, program=PROGRAM) as daemon:
        table = await daemon.until(well)
        assert {name for name, row in table.items() if row.word == "running"} == {"clock", "workers", "left"}
        assert await daemon("start", "right") != ""
        assert await daemon("shutdown") == "the daemon has stopped\n"
        assert await daemon.ended() == 0 and daemon.family() == set()


async def test_a_program_that_is_not_there_fails_that_job_alone_with_one_line_of_log_and_no_traceback(tmp_path):
    write(tmp_path, '[jobs.lost]\ncommand = ["no-such-program"]\n[jobs.found]\ncommand = ["sleep", "1000"]')
    async with running(tmp_path, program=PROGRAM) as daemon:
        ended = await daemon.said("ended", job="lost")
        assert ended["cause"] == "no program 'no-such-program' in the job's PATH: install it, or give its full path"
        await daemon.until(lambda table: table["found"].ready)
        assert "backing off" in await daemon("status", "lost", code=5)
        assert [line["event"] for line in daemon.log if line["level"] in ("error", "critical")] == []
        assert "Traceback" not in repr(daemon.log)
        await daemon("shutdown")
        assert await daemon.ended() == 0


# -- many ---------------------------------------------------------------------------------------------------------------


def many(first: int, last: int) -> str:
    return "".join(f'[jobs.c{number:04}]\ncommand = ["sleep", "100000"]\n' for number in range(first, last))


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.limit(300)
async def test_a_full_life_with_many_children(tmp_path, count):
    tenth = count // 10
    write(tmp_path, many(0, count))
    async with running(tmp_path, program=PROGRAM) as daemon:
        table = await daemon.until(well)
        rows = await daemon.rows()
        assert len(rows) == count and all(row.keys() >= FACTS and row["state"] == "running" for row in rows.values())
        pids = {name: row["pid"] for name, row in rows.items()}
        assert len(set(pids.values())) == count and set(pids.values()) <= daemon.family()

        unlucky = [f"c{number:04}" for number in range(0, count, 10)]
        for name in unlucky:
            os.kill(pids[name], signal.SIGKILL)
        table = await daemon.until(lambda table: well(table) and all(table[name].restarts == 1 for name in unlucky))
        changed = {name for name, row in table.items() if row.pid != pids[name]}
        assert changed == set(unlucky)

        answers = await daemon("restart", "c00*")
        assert len(answers.splitlines()) == 100 and all(": running, pid " in line for line in answers.splitlines())

        write(tmp_path, many(tenth, count + tenth))  # a tenth is gone, a tenth is new
        before = await daemon.rows()
        plan = (await daemon("reload")).splitlines()
        assert len(plan[0].removeprefix("add: ").split(", ")) == len(plan[1].removeprefix("remove: ").split(", ")) == tenth
        table = await daemon.until(well)
        assert list(table) == [f"c{number:04}" for number in range(tenth, count + tenth)]
        stayed = [f"c{number:04}" for number in range(tenth, count)]
        assert {name: table[name].pid for name in stayed} == {name: before[name]["pid"] for name in stayed}
        assert len(daemon.family()) == count + 2  # the daemon and its guardian

        assert await daemon("shutdown") == "the daemon has stopped\n"
        assert await daemon.ended() == 0
        assert daemon.family() == set()


# -- from a fresh clone -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.limit(900)
async def test_the_readmes_command_runs_the_shipped_file_from_a_fresh_clone(tmp_path):
    found = re.search(r"<!-- command: run -->\n```sh\n(.+)\n```", (ROOT / "README.md").read_text())
    assert found is not None
    clone(tmp_path)
    process = await trio.lowlevel.open_process(
        ["bash", "-c", found[1].replace("&& .venv/bin/supervisor", "&& exec .venv/bin/supervisor")],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PORT": "0"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        said = b""
        with trio.fail_after(600):
            while b'"event":"running"' not in said:
                chunk = await process.stderr.receive_some()
                assert chunk, said.decode()
                said += chunk
        status = await command((str(tmp_path / ".venv/bin/supervisor"),), "status", "--json", directory=tmp_path)
        shipped = tomllib.loads((ROOT / "supervisor.toml").read_text())
        assert {row["name"] for row in json.loads(status.stdout)} == {*shipped["jobs"], *shipped["supervisors"]}
        process.send_signal(signal.SIGTERM)
        with trio.fail_after(30):
            assert await process.wait() == 0
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stderr.aclose()
