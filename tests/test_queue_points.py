"""Killed at system calls: the daemon, a worker, the server, each killed by the kernel at one call after another of a put, a
claim and an end. What was said to be stored is not lost; what runs twice was in the hands of who died.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hosts import Host, Log, alive, all_end, file, quiet
from running import MODULE, clean_environ, running
from servers import PATIENCE, PostgresServer, RedisServer, Server

from supervisor import QueueUnavailable, open_queue
from supervisor.queues.protocol import State

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
WORKER = Path(__file__).with_name("queue_worker.py")


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log")


def some(*few: int, at_most: int) -> list[object]:
    """A few points usually, and all of them, up to the last that there is, in the long run."""
    return [
        pytest.param(few, id="some"),
        pytest.param(range(1, at_most), id="all", marks=[pytest.mark.long, pytest.mark.limit(900)]),
    ]


# ---- the file of a daemon ----

STRACE = ["strace", "-f", "--seccomp-bpf", "-qq"]
CALLS = "pwrite64,fdatasync,ftruncate,fcntl,pread64"


@pytest.mark.parametrize(
    "points",
    [[97, 173], pytest.param(range(1, 400, 3), marks=[pytest.mark.long, pytest.mark.limit(1800)])],
    ids=["some", "many"],
)
async def test_a_daemon_that_is_killed_at_a_system_call_of_put_claim_or_ack_loses_nothing(log, points):
    """The daemon as a whole, killed by the kernel in the writer of its queue; the next one goes on with what it finds."""
    items = 30
    putting = '\n[jobs.put]\ncall = "items:put"\nonce = true\n'
    host = Host(log, "a", file("sqlite", 'call = "items:work"\nretry = { attempts = 1000 }') + putting, items=items)
    paths = [str(host.directory / ".supervisor" / name) for name in ("queues.db", "queues.db-wal")]
    traced = [word for path in paths for word in ("-P", path)]
    for point in points:
        log.clear()
        for path in [*paths, paths[0] + "-shm"]:
            Path(path).unlink(missing_ok=True)
        words = [*STRACE, "-o", "/dev/null", *traced, "-e", f"inject={CALLS}:signal=KILL:when={point}", *MODULE, "run"]
        killed = await trio.run_process(
            words, cwd=host.directory, env=clean_environ(), stdin=subprocess.DEVNULL, capture_stderr=True, check=False
        )
        assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr.decode()
        async with running(host.directory) as daemon:
            await log.until(lambda: log.items("end") == set(map(str, range(items))))
            await quiet(daemon)
            await daemon("shutdown")
        assert log.attempts_are_counted
        ends = Counter(item for _, item, *_ in log.lines("end"))
        assert ends.total() - items <= 1  # the one whose end was not stored yet


def test_what_is_said_to_be_stored_has_been_written_and_synced(tmp_path):
    """A kill does not show it, only a power cut would: so the calls themselves are looked at, in their order."""
    trace = tmp_path / "trace"
    words = [*STRACE, "-y", "-o", str(trace), "-e", "trace=pwrite64,fdatasync,fsync,write", sys.executable, str(WORKER)]
    subprocess.run([*words, str(tmp_path)], check=True, env=clean_environ(), stdout=subprocess.DEVNULL, timeout=PATIENCE)
    unsynced, said = set[str](), Counter[str]()
    for line in trace.read_text().splitlines():
        call = re.search(r'(\w+)\(\d+<([^>]*)>(?:, "(\w+))?', line)
        match call and call.groups():
            case ("pwrite64", path, _) if path.endswith((".db", ".db-wal")):
                unsynced.add(path)
            case ("fdatasync" | "fsync", path, _):
                unsynced.discard(path)
            case ("write", _, "put" | "claimed" | "done" as word):
                said[word] += 1
                assert not unsynced
    assert said == {"put": 3, "claimed": 9, "done": 6}


# ---- who has to do with an item ----


@asynccontextmanager
async def killed_at(pid: int, calls: str, point: int) -> AsyncIterator[trio.Event]:
    """Have a process killed at its `point`th such call from now on; gives what is set when that has happened."""
    words = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={calls}:signal=KILL:when={point}", "-p", str(pid)]
    tracer = await trio.lowlevel.open_process(words, stderr=subprocess.PIPE)
    dead, handle = trio.Event(), os.pidfd_open(pid)

    async def watch() -> None:
        await trio.lowlevel.wait_readable(handle)
        dead.set()

    try:
        while b"attached" not in await tracer.stderr.receive_some():
            pass
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            yield dead
            nursery.cancel_scope.cancel(reason="it is looked at no longer")
    finally:
        os.close(handle)
        tracer.terminate()  # who is traced goes on
        with trio.CancelScope(shield=True):
            await tracer.wait()


async def put_surely(url: str, ids: list[str]) -> None:
    """Put these, which are their own ids, until it is said that they are stored."""
    while True:
        try:
            async with open_queue(url, "q") as queue:
                await queue.put_many(ids, ids=ids, keep=True)
                return
        except QueueUnavailable:
            await trio.sleep(0.05)


async def handled(url: str, ids: list[str]) -> bool:
    """Put these, and wait until they have ended."""
    await put_surely(url, ids)
    records = await all_end(url, ids)
    return {record.state for record in records} == {State.DONE}


async def at_each(points: Iterable[int], shoot: Callable[[int], object]) -> None:
    """Shoot at each of these points; of all, up to the first that nobody comes to."""
    for point in points:
        if not await shoot(point):
            assert point > 8, "this is hardly all that a put, a claim and an end take"
            return
    assert isinstance(points, tuple), "there are more points than that"


@pytest.fixture(params=["postgres_alone", "redis_alone"])
def server(request) -> Server:
    return request.getfixturevalue(request.param)


LEASE = 'lease = "1s"'
JOB = 'call = "items:work"\nworkers = 2\nretry = { attempts = 1000 }'


def of(point: int) -> list[str]:
    return [f"{point}-{letter}" for letter in "abc"]


@pytest.mark.parametrize("points", some(3, at_most=100))
async def test_a_daemon_that_is_killed_at_a_system_call_to_the_server_loses_nothing(server, log, points):
    host = Host(log, "a", file(server.url, JOB, LEASE))

    async def shoot(point: int) -> bool:
        async with killed_at(host.daemon.process.pid, "sendto,recvfrom", point) as dead:
            assert await handled(server.url, of(point))
            died = dead.is_set()
        if died:
            host.killed.append(host.daemon.process.pid)
            await host.up.wait()
        return died

    async with alive(host):
        await at_each(points, shoot)
    twice = Counter(line[1] for line in log.lines("begin"))
    assert log.attempts_are_counted
    assert all(times <= 2 for times in twice.values())


@pytest.mark.parametrize("points", some(5, at_most=100))
async def test_a_server_that_is_killed_at_a_system_call_for_a_daemon_loses_nothing(server, log, points):
    """Of Redis, all there is; of PostgreSQL, the process that serves the daemon, whereupon it ends them all and recovers."""
    host = Host(log, "a", file(server.url, JOB, LEASE))

    async def revive(dead: trio.Event) -> None:
        await dead.wait()
        if isinstance(server, RedisServer):
            server.restart()

    async def shoot(point: int) -> bool:
        async with killed_at(serving(server), "read,write,writev,sendto,recvfrom,pwrite64,fdatasync", point) as dead:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(revive, dead)
                assert await handled(server.url, of(point))
                died = dead.is_set()
                nursery.cancel_scope.cancel(reason="all have ended")
        await host.daemon.until(lambda rows: rows["work"].word == "running")
        return died

    async with alive(host):
        await at_each(points, shoot)
    assert log.attempts_are_counted


def serving(server: Server) -> int:
    """The process of a server that a daemon is connected to."""
    if isinstance(server, PostgresServer):
        import psycopg

        with psycopg.connect(server.url) as db:
            ((pid,),) = db.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'supervisor'").fetchall()
            return int(pid)
    return server.pids()[0]


@pytest.mark.parametrize("points", some(2, 4, at_most=100))
async def test_a_worker_that_is_killed_at_a_system_call_of_an_item_loses_nothing(log, points):
    host = Host(log, "a", file("sqlite", 'call = "items:compute"\nkind = "process"\nretry = { attempts = 1000 }'))
    kills = itertools.count()

    async def shoot(point: int) -> bool:
        table = await host.daemon.until(lambda rows: rows["work"].ready and rows["work"].pid is not None)
        async with killed_at(table["work"].pid, "read,write", point) as dead:
            (host.directory / "items.jsonl").write_text("\n".join(f'"{id}"' for id in of(point)))
            await host.daemon("submit", "q", "@items.jsonl")
            await log.until(lambda: log.items("end") >= set(of(point)))
            await quiet(host.daemon)
            died = dead.is_set()
        next(kills)
        return died

    async with alive(host):
        await at_each(points, shoot)
    assert log.attempts_are_counted
    begun = Counter(line[1] for line in log.lines("begin"))
    assert begun.total() - len(begun) <= next(kills)  # the one in its hands
