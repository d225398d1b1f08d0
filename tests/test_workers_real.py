"""Workers as a user has them: real processes, steered by the command."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import trio

from tests.running import Running, Table, running, well

WORKER = """
import os, signal, sys, time
from pathlib import Path

me, version = os.environ["SUPERVISOR_WORKER"], Path("version").read_text()
print("worker", me, sys.argv[1], os.environ["PORT"], os.environ["SUPERVISOR_JOB"], version, flush=True)
if version == "bad":
    sys.exit(3)
signal.signal(signal.SIGHUP, lambda number, frame: print("hup", me, flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""

FILE = """
[jobs.api]
command = ["{python}", "worker.py", "number {{worker}} of {{job}}"]
env = {{ PORT = "80{{worker}}" }}
ready = {{ log = "^ready" }}
backoff = {{ initial = "1h" }}
{more}
"""


def lay_out(directory: Path, more: str) -> None:
    (directory / "worker.py").write_text(WORKER)
    (directory / "version").write_text("good")
    (directory / "supervisor.toml").write_text(FILE.format(python=sys.executable, more=more))


def pids(table: Table | dict[str, Any]) -> dict[str, int]:
    rows = {name: row if isinstance(row, dict) else {"pid": row.pid} for name, row in table.items()}
    return {name: row["pid"] for name, row in rows.items() if row["pid"]}


def alive(daemon: Running) -> int:
    """How many worker processes there are, by what the kernel says."""
    lines = [Path(f"/proc/{pid}/cmdline") for pid in daemon.family() if Path(f"/proc/{pid}").exists()]
    return sum(b"worker.py" in line.read_bytes() for line in lines if line.exists())


async def test_workers_know_their_numbers_and_write_into_logs_of_their_own(tmp_path):
    lay_out(tmp_path, "workers = 3")
    async with running(tmp_path) as daemon:
        table = await daemon.until(well)
        assert {name: row.state for name, row in table.items()} == dict.fromkeys(("api", "api:0", "api:1", "api:2"), "running")
        assert len(set(pids(table).values())) == 3 == alive(daemon)
        assert await daemon("logs", "api:1") == "worker 1 number 1 of {job} 801 api good\nready\n"
        assert sorted((await daemon("logs", "api*", "-n", "1")).splitlines()) == [f"api:{at} | ready" for at in range(3)]
        assert (tmp_path / ".supervisor/logs/api:2.log").read_text() == "worker 2 number 2 of {job} 802 api good\nready\n"
        assert await daemon("signal", "api", "HUP") == "api: signalled api:0, api:1, api:2\n"
        async with daemon.client().logs("api", follow=True) as lines:
            seen = set()
            while len(seen) < 3:
                line = await anext(lines)
                seen |= {line.line} if line.line.startswith("hup") else set()
        assert seen == {"hup 0", "hup 1", "hup 2"}
        assert "\n".join((await daemon("tree")).splitlines()).startswith("└─ api")


async def test_scale_keeps_the_processes_that_stay(tmp_path):
    lay_out(tmp_path, "")
    async with running(tmp_path) as daemon:
        sole = pids(await daemon.until(well))["api"]
        async with daemon.client().logs("api", follow=True, lines=0) as lines:
            assert await daemon("scale", "api", "3") == "api: 3 workers\n"
            came = [await anext(lines) for _ in range(4)]
            assert {line.name for line in came} == {"api:1", "api:2"}
        now = pids(await daemon.rows())
        assert now["api:0"] == sole
        assert len(set(now.values())) == 3 == alive(daemon)
        assert (await daemon("logs", "api:0")).startswith("worker 0 number 0 of {job} 800 api good\n")
        assert await daemon("scale", "api", "1") == "api: 1 worker\n"
        assert pids(await daemon.rows()) == {"api:0": sole}
        assert alive(daemon) == 1
        assert "from 1 to 1000 workers; for none, use stop" in await daemon("scale", "api", "0", code=1)
        assert "not a whole number" in await daemon("scale", "api", "many", code=2)
        await daemon("stop", "api")
        assert alive(daemon) == 0


async def test_a_roll_survives_the_death_of_workers_and_a_bad_version_keeps_the_old_ones(tmp_path):
    lay_out(tmp_path, "workers = 3")
    async with running(tmp_path) as daemon:
        old = pids(await daemon.until(well))
        assert await daemon("restart", "api") == "api: running, 3 workers\n"
        new = pids(await daemon.rows())
        assert new.keys() == old.keys()
        assert not set(new.values()) & set(old.values())
        (tmp_path / "version").write_text("bad")
        said = await daemon("restart", "api", code=1)
        assert said == "api: stopped at api:0, which never became ready: exited with code 3; api:1, api:2 as before\n"
        left = pids(await daemon.rows())
        assert left == {name: new[name] for name in ("api:1", "api:2")}
        os.kill(left["api:2"], signal.SIGKILL)
        await daemon.until(lambda table: table["api:2"].word == "backing off")
        assert alive(daemon) == 1
        (tmp_path / "version").write_text("good")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon, "restart", "api")
            await daemon.until(lambda table: table["api:0"].pid is not None)
            os.kill(left["api:1"], signal.SIGKILL)  # whatever the roll is at
        rows = await daemon.rows()
        assert rows["api:0"]["state"] == rows["api:2"]["state"] == "running"
        assert await daemon("restart", "--at-once", "api") == "api: running\n"
        assert alive(daemon) == 3


async def test_a_reload_scales_and_rolls(tmp_path):
    lay_out(tmp_path, "workers = 2")
    async with running(tmp_path) as daemon:
        old = pids(await daemon.until(well))
        lay_out(tmp_path, "workers = 3")
        assert await daemon("reload", "--plan") == "would change live: api\n"
        assert await daemon("reload") == "change live: api\n"
        now = pids(await daemon.until(lambda table: "api:2" in table and well(table)))
        assert old.items() <= now.items()
        lay_out(tmp_path, "workers = 3\ncwd = '.'\ndescription = 'x'\n")
        text = (tmp_path / "supervisor.toml").read_text().replace('PORT = "80', 'PORT = "90')
        (tmp_path / "supervisor.toml").write_text(text)
        assert await daemon("reload") == "restart: api\napi: running, 3 workers\n"
        assert not set(pids(await daemon.rows()).values()) & set(now.values())
        assert (await daemon("logs", "api:2", "-n", "2")).startswith("worker 2 number 2 of {job} 902 api good\n")
