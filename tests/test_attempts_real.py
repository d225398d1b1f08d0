"""Policies round real commands: exit codes, signals, whole trees of processes, and what the command line shows of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import trio

from supervisor.errors import ControlError
from supervisor.events import AttemptOverdue, Ended, Ready, Retrying, Spawned
from tests.real_tree import tree
from tests.running import running

ONCE = {"once": True, "restart": "temporary"}
AT_ONCE = {"initial": "10ms", "jitter": 0.0}

STUBBORN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, signal.SIG_IGN)
left = subprocess.Popen(["sleep", "1000"], start_new_session=True)
seen = Path("attempts").read_text().splitlines() if Path("attempts").exists() else []
before = [pid for line in seen for pid in json.loads(line)["pids"]]
alive = [pid for pid in before if Path(f"/proc/{pid}").exists()]
with open("attempts", "a") as file:
    file.write(json.dumps({"pids": [os.getpid(), left.pid], "alive": alive}) + "\\n")
time.sleep(1000)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_the_whole_tree_of_an_attempt_is_gone_before_the_next_begins(tmp_path):
    # the time is generous: an attempt must have come as far as to note its pids, on however slow a machine
    keys = {"timeout": "3s", "grace": "100ms", "retry": {"attempts": 2, **AT_ONCE}, "cwd": str(tmp_path)}
    async with tree(tmp_path, a={"command": python(STUBBORN), **ONCE, **keys}) as f:
        ended = await f.until(Ended)
    attempts = [json.loads(line) for line in (tmp_path / "attempts").read_text().splitlines()]
    assert [attempt["alive"] for attempt in attempts] == [[], []]
    assert not [pid for attempt in attempts for pid in attempt["pids"] if Path(f"/proc/{pid}").exists()]
    assert (ended.exit.reason, ended.failed, ended.attempts) == ("timed out after 3 s", True, 2)
    assert [event.killed for event in f.events(AttemptOverdue)] == [False, True] * 2
    assert ended.spent.duration >= 6.0  # of both


async def test_an_attempt_that_hears_the_stop_signal_ends_by_it(tmp_path):
    keys = {"timeout": "200ms", "grace": "60s"}
    async with tree(tmp_path, a={"command": ["sleep", "1000"], **ONCE, **keys}) as f:
        ended = await f.until(Ended)
        assert ended.exit.reason == "timed out after 0.2 s"
        assert [event.killed for event in f.events(AttemptOverdue)] == [False]


COUNTING = """
import os, signal, sys
from pathlib import Path

count = Path("count")
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
print("attempt", number, flush=True)
code = sys.argv[number] if number < len(sys.argv) else "0"
if code.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, code))
sys.exit(int(code))
"""


@pytest.mark.parametrize(
    ("codes", "retry", "reason", "attempts"),
    [
        (["75", "75"], {}, "exited with code 0", 3),
        (["75", "75"], {"attempts": 2}, "exited with code 75", 2),
        (["75", "1"], {"on": ["75"]}, "exited with code 1", 2),
        (["75", "64"], {"give_up_on": ["64"]}, "exited with code 64", 2),
        (["SIGKILL", "SIGSEGV"], {"on": ["SIGKILL"]}, "killed by SIGSEGV", 2),
    ],
)
async def test_exit_codes_and_signals_are_failures_by_name(tmp_path, codes, retry, reason, attempts):
    spec = {"command": [*python(COUNTING), *codes], "cwd": str(tmp_path), **ONCE, "retry": {**AT_ONCE, **retry}}
    async with tree(tmp_path, a=spec) as f:
        ended = await f.until(Ended)
        assert (ended.exit.reason.partition(", core")[0], ended.attempts) == (reason, attempts)
        assert len(f.events(Ready)) == 1 and len(f.events(Spawned)) == attempts
        assert len({event.pid for event in f.events(Spawned)}) == attempts
        assert {event.run for event in f.events(Spawned)} == {"a#1"}
        if ended.failed:
            assert ended.output == (f"attempt {attempts}",)  # the last words are those of the last attempt
    assert (tmp_path / "logs" / "a.log").read_text().splitlines() == [f"attempt {n + 1}" for n in range(attempts)]


async def test_between_attempts_there_is_no_process(tmp_path):
    spec = {"command": ["false"], **ONCE, "retry": {"initial": "1h", "max": "1h", "jitter": 0.0}}
    async with tree(tmp_path, a=spec) as f:
        retrying = await f.until(Retrying)
        assert retrying.cause == "attempt 2 of 5 in 1h: exited with code 1"
        assert (f.row().pid, f.row().word) == (None, "running")
        with pytest.raises(ControlError, match="a has no process to signal"):
            await f.tree._obeyed("signal", ["a"], signal=1, group=False)
        f.tree.shutdown("a test")
        await f.tree.wait_stopped()
        ended = await f.until(Ended)
        assert (ended.exit.reason, ended.failed) == ("exited with code 1; not tried again: a test", True)
        assert ended.attempts == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"retry": AT_ONCE}, "exited with code 3; not tried again: a test"),
        ({"fallback": "builtins:print"}, "exited with code 3"),
    ],
)
async def test_a_draining_daemon_lets_the_attempt_in_hand_finish_and_nothing_follows(tmp_path, more, reason):
    os.mkfifo(gate := tmp_path / "gate")
    spec = {"command": ["sh", "-c", f"read line < {gate}; exit 3"], **ONCE, "grace": "60s", **more}
    async with tree(tmp_path, a=spec) as f:
        await f.until(Spawned)
        f.tree.shutdown("a test")
        while f.row().word != "draining":
            await trio.lowlevel.checkpoint()
        await trio.to_thread.run_sync(gate.write_text, "go\n")
        ended = await f.until(Ended)
        assert ended.exit.reason == reason


async def test_a_fallback_answers_for_a_command_too(tmp_path, monkeypatch):
    (tmp_path / "answers.py").write_text(
        "from pathlib import Path\n"
        "def keep(failure):\n"
        f"    Path({str(tmp_path)!r}, 'answer').write_text(f'{{failure}}, {{failure.code}}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    async with tree(tmp_path, a={"command": ["sh", "-c", "exit 7"], **ONCE, "fallback": "answers:keep"}) as f:
        ended = await f.until(Ended)
        assert (ended.exit.reason, ended.failed) == ("completed by its fallback after: exited with code 7", False)
    assert (tmp_path / "answer").read_text() == "exited with code 7, 7"


LOOPS = """
import asyncio
from pathlib import Path
from supervisor import Context

async def deaf():
    await asyncio.sleep(1000)

async def hears(ctx: Context, path: str):
    Path(path).write_text(f"{ctx.attempt} {0 < ctx.deadline <= 500}")
    if ctx.attempt == 1:
        raise ConnectionError("no net")
"""


async def test_attempts_of_asyncio_code(tmp_path, monkeypatch):
    (tmp_path / "loops.py").write_text(LOOPS)
    monkeypatch.syspath_prepend(tmp_path)
    deaf = {"call": "loops:deaf", "timeout": "200ms", "grace": "1h"}
    hears = {"call": "loops:hears", "args": {"path": str(tmp_path / "seen")}, "timeout": "500s"}
    keys = {"kind": "asyncio", **ONCE, "retry": {"attempts": 2, **AT_ONCE}}
    async with tree(tmp_path, deaf=deaf | keys, hears=hears | keys) as f:
        ended = await f.until(Ended, name="deaf")
        assert (ended.exit.reason, ended.attempts) == ("timed out after 0.2 s", 2)
        ended = await f.until(Ended, name="hears")
        assert (ended.exit.reason, ended.attempts) == ("completed", 2)
    assert (tmp_path / "seen").read_text() == "2 True"


CRUNCHES = """
import time
from pathlib import Path
from supervisor import Context, Retry

class Odd(LookupError):
    pass

def often(ctx: Context, path: str):
    assert 0 < ctx.deadline <= 500
    Path(path).write_text(str(ctx.attempt))
    raise Odd("not there")

def later():
    raise Retry("busy", after=0.01)

def slow():
    time.sleep(1000)
"""


async def test_attempts_of_functions_in_processes(tmp_path, monkeypatch):
    (tmp_path / "crunches.py").write_text(CRUNCHES)
    monkeypatch.syspath_prepend(tmp_path)
    keys = {"kind": "process", **ONCE, "timeout": "500s"}
    often = {"call": "crunches:often", "args": {"path": str(tmp_path / "seen")}}
    hour = {"initial": "1h", "max": "1h"}
    jobs = {
        "on": often | keys | {"retry": {"attempts": 3, **AT_ONCE, "on": ["LookupError"]}},
        "not_on": {"call": "crunches:often", "args": {"path": str(tmp_path / "other")}}
        | keys
        | {"retry": {**hour, "on": ["OSError"]}},
        "given_up": {"call": "crunches:often", "args": {"path": str(tmp_path / "third")}}
        | keys
        | {"retry": {**hour, "give_up_on": ["crunches:Odd"]}},
        "later": {"call": "crunches:later"} | keys | {"retry": {"attempts": 2, **hour, "on": ["OSError"]}},
        "slow": {"call": "crunches:slow"} | keys | {"timeout": "3s", "grace": "10ms", "retry": {"attempts": 2, **AT_ONCE}},
    }
    async with tree(tmp_path, **jobs) as f:
        ends = {name: await f.until(Ended, name=name) for name in jobs}
    assert {name: (end.exit.reason, end.attempts) for name, end in ends.items()} == {
        "on": ("Odd: not there", 3),
        "not_on": ("Odd: not there", 1),
        "given_up": ("Odd: not there", 1),
        "later": ("busy", 2),
        "slow": ("timed out after 3 s", 2),
    }
    assert (tmp_path / "seen").read_text() == "3"


FILE = """
[limits.db]
concurrency = 1
rate = "1000/s"
burst = 5
breaker = { failures = 1, open_for = "1h" }

[jobs.first]
command = ["sleep", "1000"]
once = true
bulkhead = "db"

[jobs.second]
command = ["sleep", "1000"]
once = true
bulkhead = "db"
rate = "db"

[jobs.third]
command = ["false"]
every = "1h"
run_on_start = true
breaker = "db"
retry = { attempts = 2, initial = "1h", max = "1h" }
"""


async def test_the_command_line_shows_limits_and_cancels_what_waits(tmp_path):
    (tmp_path / "supervisor.toml").write_text(FILE)
    async with running(tmp_path) as daemon:
        table = await daemon.until(lambda table: sorted((table["first"].word, table["second"].word)) == ["running", "starting"])
        waits, holds = ("second", "first") if table["first"].word == "running" else ("first", "second")
        await daemon.until(
            lambda table: "circuit breaker db is open" in table["third"].cause or table["third"].next_at is not None
        )
        lines = (await daemon("limits")).splitlines()
        assert lines[0].split() == ["NAME", "JOBS", "BREAKER", "RATE", "PLACES", "WAITING"]
        assert lines[1].startswith("db    first, second, third  open, trial in ") and lines[1].endswith(
            f"1000/s, 5 of 5 left  1 of 1 taken  {waits}#1"
        )
        (row,) = json.loads(await daemon("limits", "--json", "db"))
        assert row["bulkhead"] == {"concurrency": 1, "in_use": 1, "may_wait": None, "waiting": [f"{waits}#1"]}
        assert [limit.name for limit in await daemon.client().limits()] == ["db"]
        await daemon("limits", "bd", code=4)
        assert await daemon("cancel", f"{waits}#1") == f"{waits}: {waits}#1: cancelled\n"
        rows = await daemon.rows()
        assert (rows[waits]["word"], rows[holds]["word"]) == ("stopped", "running")
        assert "trial in" in rows["third"]["cause"] or "attempt 2 of 2" in rows["third"]["cause"]
        assert await daemon("cancel", "third") == "third: third#1: cancelled\n"
        assert (await daemon.rows())["third"]["cause"].startswith("runs every 1h; breaker open: 1 failures within 60 s")
