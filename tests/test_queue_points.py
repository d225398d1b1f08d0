"""Killed at system calls: the daemon, a worker, the server, each killed by the kernel at one call after another of a put, a
claim and an end. What was said to be stored is not lost; what runs twice was in the hands of who died.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from hosts import Host, Log, alive, all_end, file, patiently, quiet
from running import Running, Said, clean_environ
from servers import PATIENCE, PostgresServer, RedisServer, Server

from supervisor import open_queue
from supervisor.queues.protocol import State

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
WORKER = Path(__file__).with_name("queue_worker.py")


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log")


def some(*few: tuple[str, int]) -> list[object]:
    """A few points usually, and all of them in the long run. A point: the how-manieth call of a name."""
    return [pytest.param(few, id="some"), pytest.param((), id="all", marks=[pytest.mark.long, pytest.mark.limit(900)])]


# ---- on the disk ----


def test_what_is_said_to_be_stored_has_been_written_and_synced(tmp_path):
    """A kill does not show it, only a power cut would: so the calls themselves are looked at, in their order."""
    trace = tmp_path / "trace"
    words = ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-o", str(trace), "-e", "trace=pwrite64,fdatasync,fsync,write"]
    subprocess.run(
        [*words, sys.executable, str(WORKER), str(tmp_path)],
        check=True,
        env=clean_environ(),
        stdout=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
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
async def killed_at(pid: int, call: str, point: int, *paths: Path) -> AsyncIterator[trio.Event]:
    """Have a process killed when it makes this call (on one of these files) for the `point`th time from now on.

    Gives what is set when that has happened.
    """
    words = ["strace", "-f", "-s", "0", "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={point}"]
    words += [word for path in paths for word in ("-P", str(path))]
    tracer = await trio.lowlevel.open_process([*words, "-p", str(pid)], stderr=subprocess.PIPE)
    dead, handle = trio.Event(), os.pidfd_open(pid)

    async def watch() -> None:
        await heard(tracer.stderr, b"+++ killed by SIGKILL")
        tracer.kill()  # or it may keep the dead, where a thread began at that moment
        await trio.lowlevel.wait_readable(handle)
        dead.set()

    try:
        await heard(tracer.stderr, b" attached")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            yield dead
            nursery.cancel_scope.cancel(reason="it is looked at no longer")
    finally:
        os.close(handle)
        with trio.CancelScope(shield=True):
            tracer.terminate()  # who is traced goes on
            await tracer.wait()
            await tracer.stderr.aclose()


async def has_died(dead: trio.Event) -> bool:
    """Whether it was killed: what it does when all items have ended may come a little later."""
    with trio.move_on_after(0.5):
        await dead.wait()
    return dead.is_set()


async def heard(stream: trio.abc.ReceiveStream, words: bytes) -> None:
    """Wait until these words come."""
    said = b""
    while words not in said:
        more = await stream.receive_some()
        assert more, said
        said = said[-100:] + more


async def handled(url: str, ids: list[str]) -> bool:
    """Put these, which are their own ids, until it is said that they are stored, once; whether they end well."""

    async def put() -> None:
        async with open_queue(url, "q") as queue:
            await queue.put_many(ids, ids=ids, keep=True)

    await patiently(put)
    return {record.state for record in await patiently(partial(all_end, url, ids))} == {State.DONE}


async def at_each(points: Sequence[tuple[str, int]], calls: str, shoot: Callable[[str, int], Awaitable[bool]]) -> None:
    """Shoot at these points; without any, at each of these calls, up to the first that nobody comes to."""
    for call, point in points:
        assert await shoot(call, point), f"nobody comes to the {point}th {call} any more: shoot earlier"
    if not points:
        reached = {call: await last_reached(call, shoot) for call in calls.split(",")}
        assert sum(reached.values()) > 8, f"this is hardly all that a put, a claim and an end take: {reached}"


async def last_reached(call: str, shoot: Callable[[str, int], Awaitable[bool]]) -> int:
    for point in range(1, 100):
        if not await shoot(call, point):
            return point - 1
    raise AssertionError(f"there are more {call} than that")


@pytest.fixture(params=["postgres_alone", "redis_alone"])
def server(request) -> Server:
    return request.getfixturevalue(request.param)


NAMES = {
    RedisServer: {"ask": "read", "answer": "write"},  # also what it stores; what syncs that is another thread, now and then
    PostgresServer: {"ask": "recvfrom", "answer": "sendto", "store": "pwrite64", "sync": "fdatasync"},
}
"""The calls that a server makes for a daemon."""

LEASE = 'lease = "1s"'
JOB = 'call = "items:work"\nworkers = 2\nretry = { attempts = 1000 }'


def of(call: str, point: int) -> list[str]:
    """The items of a point."""
    return [f"{call}-{point}-{letter}" for letter in "abc"]


@pytest.mark.parametrize("points", some(("sendto", 5), ("recvfrom", 5)))
async def test_a_daemon_that_is_killed_at_a_system_call_to_the_server_loses_nothing(server, log, points):
    host = Host(log, "a", file(server.url, JOB, LEASE))

    async def shoot(call: str, point: int) -> bool:
        async with killed_at(host.daemon.process.pid, call, point) as dead:
            assert await handled(server.url, of(call, point))
            died = await has_died(dead)
        if died:
            await host.is_up()
        return died

    async with alive(host):
        await at_each(points, "sendto,recvfrom", shoot)
    assert log.attempts_are_counted
    assert max(begun(log).values()) <= 2


@pytest.mark.parametrize("points", some(("ask", 2), ("answer", 3)))
async def test_a_server_that_is_killed_at_a_system_call_for_a_daemon_loses_nothing(server, log, points):
    """Of Redis, all there is; of PostgreSQL, the process that serves the daemon, whereupon it ends them all and recovers."""
    host = Host(log, "a", file(server.url, JOB, LEASE))
    names = NAMES[type(server)]

    async def revive(dead: trio.Event) -> None:
        await dead.wait()
        if isinstance(server, RedisServer):
            server.restart()

    async def shoot(call: str, point: int) -> bool:
        async with killed_at(await serving(server), call, point) as dead:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(revive, dead)
                assert await handled(server.url, of(call, point))
                died = await has_died(dead)
                nursery.cancel_scope.cancel(reason="all have ended")
        await host.daemon.until(lambda rows: rows["work"].word == "running")
        if not server.pids():  # it was killed when all had ended
            server.restart()
        return died

    async with alive(host):
        await at_each([(names[name], point) for name, point in points], ",".join(names.values()), shoot)
    assert log.attempts_are_counted


async def serving(server: Server) -> int:
    """The process of a server that a daemon is connected to."""
    if not isinstance(server, PostgresServer):
        return server.pids()[0]
    import psycopg

    while True:
        with psycopg.connect(server.url) as db:
            found = db.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'supervisor'").fetchall()
        if len(found) == 1:
            return int(found[0][0])
        await trio.sleep(0.02)  # the one of our own, that put, is about to end; or the daemon has none yet


@pytest.mark.parametrize("points", some(("pwrite64", 4), ("fdatasync", 2), ("fdatasync", 3)))
async def test_a_daemon_that_is_killed_at_a_system_call_on_its_file_loses_nothing(log, points):
    host = Host(log, "a", file("sqlite", 'call = "items:work"\nretry = { attempts = 1000 }'))
    files = [host.directory / ".supervisor" / name for name in ("queues.db", "queues.db-wal")]

    async def shoot(call: str, point: int) -> bool:
        await host.is_up()
        async with killed_at(host.daemon.process.pid, call, point, *files) as dead:
            await submitted(host, of(call, point))
            return await has_died(dead)

    async with alive(host):
        await at_each(points, "pwrite64,fdatasync,pread64", shoot)
    assert log.attempts_are_counted
    assert max(begun(log).values()) <= 2
    ends = Counter(line[1][:-2] for line in log.lines("end"))
    assert max(ends.values()) <= 4  # of three items at each point, one whose end was not stored yet


@pytest.mark.parametrize("points", some(("read", 1), ("write", 2)))
async def test_a_worker_that_is_killed_at_a_system_call_of_an_item_loses_nothing(log, points):
    host = Host(log, "a", file("sqlite", 'call = "items:compute"\nkind = "process"\nretry = { attempts = 1000 }'))
    kills = itertools.count()

    async def shoot(call: str, point: int) -> bool:
        table = await host.daemon.until(lambda rows: rows["work"].ready and rows["work"].pid is not None)
        async with killed_at(table["work"].pid, call, point) as dead:
            await submitted(host, of(call, point))
            died = await has_died(dead)
        next(kills)
        return died

    async with alive(host):
        await at_each(points, "read,write", shoot)
    assert log.attempts_are_counted
    assert sum(begun(log).values()) - len(begun(log)) <= next(kills)  # the one in its hands


async def submitted(host: Host, ids: list[str]) -> None:
    """Submit these until it is said that they are stored, and wait until they have ended, and that is stored."""
    (host.directory / "items.jsonl").write_text("\n".join(f'"{id}"' for id in ids))
    await surely(host, lambda daemon: daemon("submit", "q", "@items.jsonl", "--id", ids[0], "--keep"))
    await host.log.until(lambda: host.log.items("end") >= set(ids))
    await surely(host, quiet)


async def surely(host: Host, ask: Callable[[Running], Awaitable[object]]) -> None:
    """Ask a daemon that may be killed meanwhile: again, when it is there again."""
    while True:
        await host.is_up()
        try:
            await ask(host.daemon)
        except Said:
            continue
        return


def begun(log: Log) -> Counter[str]:
    """How often each item was begun."""
    return Counter(line[1] for line in log.lines("begin"))
