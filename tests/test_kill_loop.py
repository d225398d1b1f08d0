"""A real daemon, killed with SIGKILL at random moments of its life, over and over: nothing of it survives, ever."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import uuid
from pathlib import Path

import msgspec
import pytest
import trio
from running import MODULE, clean_environ
from test_sweep import READ_ONLY, WITHOUT_CGROUP, have_cgroup

from supervisor.children import guardian, record

PATIENCE = 60.0
ROUNDS = [pytest.param(5, id="5 rounds"), pytest.param(100, id="100 rounds", marks=[pytest.mark.long, pytest.mark.limit(900)])]
SHAPES = {
    "plain": "exec sleep {token}",
    "forks": "sleep {token} & sleep {token}; true",
    "session": "setsid sleep {token} & sleep {token}; true",
    "twice": "(setsid sh -c 'sleep {token}; true' &) ; sleep {token}; true",
    "bare": "(env -i setsid sleep {token} &) ; sleep {token}; true",
    "deaf": "trap '' TERM; while :; do sleep {token}; done",
    "busy": "while :; do setsid sh -c ': {token}' & sleep 0.01; done",
    "quits": "(setsid sleep {token} &) ; sleep 0.05; : {token}",
}

LASTING = SHAPES.keys() - {"quits", "plain"}
"""Those whose main process is there all the time, as the shell that it began as."""


@pytest.fixture(params=["cgroup", "no cgroup"])
def program(request) -> list[str]:
    """`supervisor`, where it can have a cgroup and where it cannot."""
    if request.param == "cgroup" and not have_cgroup():
        pytest.skip("no cgroup to be had here")
    if request.param == "cgroup" or not have_cgroup():
        return [*MODULE]
    return [*WITHOUT_CGROUP, READ_ONLY, "sh", *MODULE]


def write(directory: Path, token: str) -> None:
    """One job of each shape; what they start is known by its arguments."""
    lines = ["[defaults]", 'backoff = { initial = "20ms", max = "20ms" }', 'grace = "300ms"', ""]
    for name, script in SHAPES.items():
        command = ["sh", "-c", script.format(token=token), f"{token}-{name}"]
        lines += [f"[jobs.{name}]", f"command = {json.dumps(command)}", ""]
    (directory / "supervisor.toml").write_text("\n".join(lines))


def bearing(token: str) -> set[int]:
    """Who has the token among its arguments, and is not dead."""
    found = {pid for pid in guardian.pids() if token.encode() in guardian.read(f"/proc/{pid}/cmdline")}
    return {pid for pid in found if not guardian.zombie(pid)}


def mains(token: str, name: str) -> int:
    """How many main processes this job has: leaders of a session whose last argument is the job's."""
    ending = f"\0{token}-{name}\0".encode()
    return sum(
        guardian.read(f"/proc/{pid}/cmdline").endswith(ending) and (guardian.stat_of(pid) or (0, 0, 0))[2] == pid
        for pid in bearing(token)
    )


def cgroup_of(directory: Path) -> set[Path]:
    """The group that the last daemon there has noted, if it had one."""
    path = directory / ".supervisor" / "instance"
    note = msgspec.json.decode(path.read_bytes(), type=record.Record) if path.exists() else None
    return {Path(note.cgroup)} if note and note.cgroup else set()


async def all_dead(token: str) -> None:
    """Wait until nobody bears the token any more. Whoever survives lets this run into its limit."""
    with trio.fail_after(PATIENCE):
        while found := bearing(token):
            for pid in found:
                try:
                    fd = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
                try:
                    await trio.lowlevel.wait_readable(fd)
                finally:
                    os.close(fd)


async def until_said(process: trio.Process, event: str, *ready: str) -> list[bytes]:
    """Read its log up to this event, and until these jobs are ready: the daemon may run before all of them do."""
    wanted = [f'"event":"{event}"', *(f'"event":"ready","job":"{name}"' for name in ready)]
    said = b""
    async for part in process.stderr:
        said += part
        if all(each.encode() in said for each in wanted):
            return said.splitlines()
    raise AssertionError(f"it ended without {event!r}:\n{said.decode()}")


async def a_life(program: list[str], directory: Path, chance: random.Random) -> str:
    """Start a daemon and kill it: while it starts, after a while, while it reloads, or while it stops."""
    process = await trio.lowlevel.open_process(
        [*program, "run"], cwd=directory, env=clean_environ(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    moment = chance.choice(["start", "run", "reload", "stop"])
    try:
        if moment == "start":
            await trio.sleep(chance.uniform(0, 0.8))
        else:
            await until_said(process, "running")
            await trio.sleep(chance.uniform(0, 0.2))
            if moment != "run":
                process.send_signal(signal.SIGHUP if moment == "reload" else signal.SIGTERM)
                await trio.sleep(chance.uniform(0, 0.4))
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stderr.aclose()
    return moment


@pytest.mark.parametrize("rounds", ROUNDS)
async def test_whenever_a_daemon_is_killed_nothing_of_it_survives_and_the_next_one_starts_clean(program, tmp_path, rounds):
    token, chance, used = f"100{uuid.uuid4().int % 10**9}", random.Random(rounds), set()
    write(tmp_path, token)
    try:
        for _ in range(rounds):
            await a_life(program, tmp_path, chance)
            await all_dead(token)
            used |= cgroup_of(tmp_path)
        process = await trio.lowlevel.open_process(
            [*program, "run"], cwd=tmp_path, env=clean_environ(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        with trio.fail_after(PATIENCE):
            await until_said(process, "running", *LASTING)
            assert {name: mains(token, name) for name in LASTING} == dict.fromkeys(LASTING, 1)
            used |= cgroup_of(tmp_path)
            process.terminate()
            await until_said(process, "the daemon has ended")
            assert await process.wait() == 0
        await process.stderr.aclose()
        assert not bearing(token)
        assert not (tmp_path / ".supervisor" / "instance").exists()
        assert ("unshare" in program or not have_cgroup()) == (not used)
        assert not [path for path in used if path.exists()]
    finally:
        for pid in bearing(token):
            os.kill(pid, signal.SIGKILL)
