"""Queues under fire: real daemons as users have them, on real engines, that are killed, cut off, frozen and poisoned.

What an engine alone bears is tested beside it; here it is the whole of it: engine, desk, worker, command line.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hosts import Host, Log, alive, all_end, file, patiently, put, quiet
from interleaving import CancelAtStep
from running import MODULE, command, running
from servers import PATIENCE, Proxy, RedisServer, Server, missing, open_proxy

from supervisor import QueueError, QueueUnavailable, open_queue
from supervisor.queues import Place, scheme_of
from supervisor.queues.protocol import Draft, Ending, Engine, Settings, State
from supervisor.queues.spec import QueueSpec
from supervisor.spec import Seconds
from supervisor.wall import WallClock

WORKERS = 4
wall_now = WallClock().now


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(tmp_path / "log")


BOTH = ["postgres_alone", "redis_alone"]
REDIS = [pytest.param("postgres_alone", marks=pytest.mark.long), "redis_alone"]
"""Redis usually, and PostgreSQL too where there is time."""


@pytest.fixture(params=BOTH)
def server(request) -> Server:
    """Each of the shared engines, for one test alone."""
    return request.getfixturevalue(request.param)


# ---- kills ----


@pytest.mark.parametrize(
    ("count", "kills"), [(100, 2), pytest.param(5000, 60, marks=[pytest.mark.long, pytest.mark.limit(900)])]
)
async def test_two_daemons_drain_a_queue_while_each_is_killed_in_turn(server, log, count, kills):
    """Each item ends. One that began twice was in the hands of a daemon that was killed, or that has said that it lost it."""
    text = file(
        server.url, f'call = "items:work"\nworkers = {WORKERS}\nretry = {{ attempts = 1000 }}', 'lease = "1s"\nsize = 20000'
    )
    hosts, chance = [Host(log, name, text) for name in "ab"], random.Random(1)
    async with alive(*hosts):
        async with open_queue(server.url, "q") as queue:
            put = await queue.put_many(range(count), keep=True)
        for number in range(kills):
            begun = len(log.lines("begin"))
            await log.until(lambda begun=begun: len(log.lines("begin")) >= min(begun + count // (kills + 2), count))
            await trio.sleep(chance.uniform(0, 0.1))  # at any moment of an item, not only when it begins
            await hosts[number % 2].kill()
        records = await all_end(server.url, [receipt.id for receipt in put])
        lost = {line["item"] for host in hosts for line in host.said("item_lost")}
    assert {record.state for record in records} == {State.DONE}
    assert log.items("begin") == log.items("end") == set(map(str, range(count)))
    assert log.attempts_are_counted
    begun = defaultdict(list)
    for _, item, pid, _ in log.lines("begin"):
        begun[item].append(int(pid))
    killed = [pid for host in hosts for pid in host.killed]
    numbers = {record.payload.decode(): record.id for record in records}
    again = Counter(pid for item, pids in begun.items() if numbers[item] not in lost for pid in pids[:-1])
    assert set(again) <= set(killed)
    assert all(times <= 2 * WORKERS for times in again.values())  # in hand, and just ended


@pytest.mark.parametrize(
    ("count", "kills"), [(2000, 1), pytest.param(100_000, 50, marks=[pytest.mark.long, pytest.mark.limit(1800)])]
)
async def test_many_items_on_disk_outlive_kills_of_the_daemon_and_of_its_worker_processes(log, count, kills):
    chance = random.Random(1)
    job = 'kind = "process"\ncall = "items:compute"\nworkers = 2\nretry = { attempts = 1000 }'
    host = Host(log, "a", file("sqlite", f'{job}\nbackoff = {{ initial = "10ms", max = "50ms" }}', f"size = {count}"))
    dead = set[int]()
    async with alive(host), trio.open_nursery() as nursery:
        nursery.start_soon(submit_all, host, count)
        for _ in range(kills):
            for killing in (None, None, host.kill):
                begun = len(log.lines("begin"))
                more = begun + chance.randint(1, count // (4 * kills))
                await log.until(lambda more=more: len(log.lines("begin")) >= min(more, count))
                if killing is not None:
                    dead |= host.daemon.family()
                    await killing()
                elif (pid := int(log.lines("begin")[-1][2])) in host.daemon.family():
                    dead.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        await log.until(lambda: len(log.items("end")) == count, 10 * PATIENCE)
        await quiet(host.daemon)
        assert not host.said("item_dead")
    assert log.attempts_are_counted
    begun = defaultdict(list)
    for _, item, pid, _ in log.lines("begin"):
        begun[item].append(int(pid))
    assert {pid for pids in begun.values() for pid in pids[:-1]} <= dead  # whose hands they were in
    assert len(log.lines("begin")) - count <= kills * 100  # few at a time


async def submit_all(host: Host, count: int, some: int = 2000) -> None:
    """Put the numbers, some at a time, each until it is told that they are stored: the daemon may die meanwhile."""
    for first in range(0, count, some):
        (host.directory / "items.jsonl").write_text("".join(f"{number}\n" for number in range(count)[first : first + some]))
        words = ("submit", "q", "@items.jsonl", "--id", f"n{first}", "--keep")  # what is kept is not stored a second time
        while (await command(MODULE, *words, directory=host.directory)).returncode:
            await host.is_up()


# ---- servers that are away ----

AWAY = [pytest.param(0, marks=pytest.mark.long), 2, pytest.param(30, marks=[pytest.mark.long, pytest.mark.limit(180)])]


@pytest.mark.parametrize("server", REDIS, indirect=True)
@pytest.mark.parametrize("seconds", AWAY)
async def test_a_server_is_killed_under_a_daemon_and_what_ended_meanwhile_is_stored_later(server, log, seconds):
    host = Host(log, "a", file(server.url, 'call = "items:hold"\nworkers = 2'))
    async with alive(host):
        (item,) = await put(server.url, "one")
        await log.says("begin")
        server.kill()
        await end_while_away(host, log, seconds)
        server.start()
        await goes_on(host, log, server.url, item)


@pytest.mark.long
async def test_a_server_that_is_frozen_under_a_daemon_is_as_one_that_is_away(server, log):
    host = Host(log, "a", file(server.url, 'call = "items:hold"\nworkers = 2'))
    async with alive(host):
        (item,) = await put(server.url, "one")
        await log.says("begin")
        server.stop()
        await end_while_away(host, log, 1)
        server.cont()
        await goes_on(host, log, server.url, item)


async def end_while_away(host: Host, log: Log, seconds: float) -> None:
    """What is in hand ends while nobody can be told, and the daemon says what is the matter; it stays so for a while."""
    (host.directory / "go").touch()
    await log.says("end")
    if seconds:
        table = await host.daemon.until(lambda rows: rows["work"].word == "degraded")
        assert table["work"].ready, "a worker whose engine is away is no failure"
        assert "queue q: cannot" in await host.daemon("status")
        (row,) = json.loads(await host.daemon("queue", "ls", "--json", code=1))
        assert host_of(row["backend"]) in row["trouble"]
        await trio.sleep(seconds)


def host_of(url: str) -> str:
    """The address in a URL, without what goes before and after."""
    return url.partition("://")[2].rpartition("@")[2].partition(":")[0]


async def goes_on(host: Host, log: Log, url: str, item: str) -> None:
    """Its end is stored, once and for all, and new items are handled."""
    (record,) = await all_end(url, [item])
    assert (record.state, record.attempts) == (State.DONE, 1)
    (later,) = await all_end(url, await put(url, "two"))
    assert later.state is State.DONE
    await host.daemon.until(lambda rows: rows["work"].word == "running")
    assert [line[1] for line in log.lines("begin")] == ["one", "two"]
    assert not host.said("item_lost")


async def test_a_flush_under_a_daemon_loses_what_was_there_and_says_so(redis_alone, log):
    host = Host(log, "a", file(redis_alone.url, 'call = "items:hold"\ngrace = "100ms"', 'lease = "1s"'))
    async with alive(host):
        (item,) = await put(redis_alone.url, "one")
        await log.says("begin")
        redis_cli(redis_alone, "FLUSHALL")
        await host.daemon.said("item_lost", item=item)
        await log.says("stopped")
        (host.directory / "go").touch()
        (record,) = await all_end(redis_alone.url, await put(redis_alone.url, "two"))
        assert record.state is State.DONE
        assert log.items("end") == {"two"}
        async with open_queue(redis_alone.url, "q") as queue:
            assert queue._engine.settings.spec.lease == 1  # what is true of the queue is there again


async def test_a_replica_that_may_only_be_read_degrades_a_daemon_until_it_is_the_first(redis_alone, log, tmp_path):
    replica = RedisServer(tmp_path)
    replica.start()
    try:
        ids = await put(redis_alone.url, 1, 2, 3)
        redis_cli(replica, "REPLICAOF", "127.0.0.1", str(redis_alone.port))
        while "link_status:up" not in (said := redis_cli(replica, "INFO", "replication")):
            assert "role:slave" in said
            await trio.sleep(0.05)
        host = Host(log, "a", file(replica.url, 'call = "items:work"\nworkers = 2'))
        async with alive(host):
            table = await host.daemon.until(lambda rows: rows["work"].word == "degraded")
            assert "read only" in table["work"].cause.replace("-", " ").lower()
            assert not log.lines("begin")
            redis_cli(replica, "REPLICAOF", "NO", "ONE")
            records = await all_end(replica.url, ids)
            assert {record.state for record in records} == {State.DONE}
            await host.daemon.until(lambda rows: rows["work"].word == "running")
    finally:
        replica.kill()


def redis_cli(server: RedisServer, *words: str) -> str:
    return subprocess.run(
        ["redis-cli", "-p", str(server.port), *words], check=True, capture_output=True, text=True, timeout=PATIENCE
    ).stdout


# ---- a bad way to the server ----


@pytest.fixture(params=["postgres", "redis"])
def common(request) -> Server:
    """Each of the shared engines, which other tests use, too."""
    return request.getfixturevalue(request.param)


names = itertools.count()


@asynccontextmanager
async def by_a_bad_way(server: Server, count: int) -> AsyncIterator[tuple[Engine, Proxy, list[Draft]]]:
    """A queue with so many items, each with an id and a payload of its own, by a proxy."""
    known = [Draft(id=f"item-{number}", payload=b'"payload %d"' % number) for number in range(count)]
    async with open_proxy(server.port) as proxy, skewed(server.url_at(proxy.port), name=f"bad{next(names)}") as queue:
        await queue.put(known)
        yield queue, proxy, known


async def is_right(queue: Engine, draft: Draft) -> None:
    """The queue answers, and what it says belongs to the question."""
    with trio.fail_after(PATIENCE):
        record = await patiently(partial(queue.show, draft.id))
    assert (record.id, record.payload) == (draft.id, draft.payload)


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.limit(600)])])
async def test_whoever_is_cancelled_at_whatever_moment_no_other_gets_his_answer(common, times):
    """Many ask at once, and each answer takes its time."""
    chance = random.Random(times)
    async with by_a_bad_way(common, 10) as (queue, proxy, known):
        proxy.delay = 0.002
        for _ in range(times):
            scope = trio.CancelScope()
            cancelling = CancelAtStep(scope, chance.randrange(1, 40))
            async with trio.open_nursery() as nursery:
                for draft in known[1:]:
                    nursery.start_soon(is_right, queue, draft)
                trio.lowlevel.add_instrument(cancelling)
                with scope:
                    await is_right(queue, known[0])
                trio.lowlevel.remove_instrument(cancelling)


@pytest.mark.parametrize("bytes", [range(5, 200, 20), pytest.param(range(400), marks=pytest.mark.long)], ids=["some", "all"])
async def test_an_answer_of_which_a_byte_is_flipped_ends_nothing(common, bytes, monkeypatch):
    """What is told may be wrong then, where nothing checks it. What is told next is right."""
    async with by_a_bad_way(common, 1) as (queue, proxy, (draft,)):
        be_impatient(monkeypatch)
        for byte in bytes:
            proxy.garbles = byte
            with suppress(QueueError):
                await queue.show(draft.id)
            proxy.garbles = None
            await is_right(queue, draft)


async def test_an_answer_that_is_lost_on_a_connection_that_stays_is_not_waited_for_for_ever(common, monkeypatch):
    async with by_a_bad_way(common, 1) as (queue, proxy, (draft,)):
        be_impatient(monkeypatch)
        proxy.swallows = True
        with pytest.raises(QueueUnavailable):
            await queue.show(draft.id)
        proxy.swallows = False
        await is_right(queue, draft)


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no answer for long, and connect again soon."""
    monkeypatch.setattr("supervisor.queues.redis_link.ANSWER", 0.5)
    monkeypatch.setattr("supervisor.queues.redis_link.BACKOFF", (0.01, 0.02))
    monkeypatch.setattr("supervisor.queues.postgres_session.PATIENCE", 0.5)
    monkeypatch.setattr("supervisor.queues.postgres_session.AGAIN", (0.01, 0.02))


# ---- hosts that are cut off ----


class Network:
    """Hosts with a network of their own each, and a switch between them, which is in the network of the server (10.77.0.1).

    They have no names, and are gone with the processes that hold them.
    """

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self.switch = self.host()

    def host(self) -> list[str]:
        """A new network; the words that run a program in it."""
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._holders.append(holder)
        if not holder.stdout.readline():
            missing("no network namespaces are to be had here")
        return ["nsenter", "--target", str(holder.pid), "--net"]

    def make_switch(self) -> None:
        ip(self.switch, "link add name switch0 type bridge")
        ip(self.switch, "address add 10.77.0.1/24 dev switch0")
        ip(self.switch, "link set dev switch0 up")

    def plug_in(self, number: int) -> list[str]:
        """A host with the address 10.77.0.`number`."""
        host = self.host()
        ip(self.switch, f"link add name port{number} type veth peer name eth0 netns {self._holders[-1].pid}")
        ip(self.switch, f"link set dev port{number} master switch0 up")
        ip(host, f"address add 10.77.0.{number}/24 dev eth0")
        ip(host, "link set dev eth0 up")
        return host

    def cut(self, number: int) -> None:
        """Nothing passes any more, either way, and nobody is told."""
        ip(self.switch, f"link set dev port{number} down")

    def mend(self, number: int) -> None:
        ip(self.switch, f"link set dev port{number} up")

    def close(self) -> None:
        for holder in self._holders:
            holder.stdin.close()
            holder.wait()
            holder.stdout.close()


def ip(host: list[str], words: str) -> None:
    done = subprocess.run([*host, "ip", *words.split()], capture_output=True, text=True)
    if done.returncode:
        missing(f"no network to be made here: ip {words}: {done.stderr.strip()}")


@contextmanager
def network() -> Iterator[Network]:
    made = Network()
    try:
        made.make_switch()
        yield made
    finally:
        made.close()


@pytest.mark.limit(120)
@pytest.mark.parametrize("server", REDIS, indirect=True)
async def test_what_a_host_has_that_is_cut_off_is_taken_over_and_it_learns_that_it_has_lost_it(server, log):
    """Both hosts run all the time. The cut is as that of a cable: no reset, no answer."""
    with network() as net:
        server.move(net.switch, "10.77.0.1")
        text = file(server.url, 'call = "items:hold"\ngrace = "100ms"', 'lease = "2s"')
        one, other = (Host(log, name, text, (*net.plug_in(number), *MODULE)) for number, name in ((2, "a"), (3, "b")))
        async with alive(one):
            (item,) = await put(server.near, "one")
            await log.says("begin")
            async with alive(other):
                net.cut(2)
                await log.says("begin", 2)  # the other has it
                await one.daemon.said("queue_degraded")
                await one.daemon.said("item_lost", item=item)
                await log.says("stopped")
                (other.directory / "go").touch()
                (record,) = await all_end(server.near, [item])
                assert (record.state, record.attempts) == (State.DONE, 2)
                net.mend(2)
                await one.daemon.said("queue_recovered")
                (one.directory / "go").touch()
                await other.daemon("stop", "work")
                (later,) = await all_end(server.near, await put(server.near, "two"))  # it is one of them again
                assert later.state is State.DONE
        a, b = str(one.daemon.process.pid), str(other.daemon.process.pid)
        assert log.lines("begin") == [["begin", "one", a, "1"], ["begin", "one", b, "2"], ["begin", "two", a, "1"]]
        assert log.lines("stopped") == [["stopped", "one", a, "1"]]


# ---- clocks ----


@asynccontextmanager
async def skewed(url: str, hours: float = 0, name: str = "skewed", **spec: Any) -> AsyncIterator[Engine]:
    """The queue, as one has it whose clock is so many hours ahead."""
    place = Place(directory=Path(), now=lambda: wall_now() + 3600 * hours, listen=lambda notice: None, warn=print)
    settings = Settings(spec=QueueSpec(backend=url, **spec))
    async with scheme_of(url).open(name, settings, place) as engine:
        yield engine


async def claim_one(queue: Engine) -> Any:
    while not (items := (await queue.claim(1, owner="tests", attempts=100)).items):
        await queue.wait_for_work()
    return items[0]


@pytest.mark.parametrize("engine", ["postgres", "redis"])
async def test_the_clocks_of_the_hosts_do_not_matter(request, engine):
    """One is an hour ahead, the other an hour behind: moments, leases, rates and ages are those of the server."""
    url = request.getfixturevalue(engine).url
    spec = {"lease": Seconds(1), "keep_results": Seconds(600)}
    async with skewed(url, +1, **spec) as ahead, skewed(url, -1, **spec) as behind:
        for producer, worker in ((ahead, behind), (behind, ahead)):
            begun = wall_now()
            usual = {"payload": b"1", "expire": 600.0, "keep": True}
            await producer.put([Draft(id="at", at=begun + 0.6, **usual), Draft(id="later", delay=0.3, **usual)])
            await producer.put([Draft(id="now", **usual)])
            claimed = {}
            for _ in range(3):
                item = await claim_one(worker)
                assert begun - 0.1 < item.put_at <= item.ready_at < wall_now() + 0.1  # the server's, and it was waited for
                assert await worker.finish([Ending(id=item.id, token=item.token, how="done")]) == [True]
                claimed[item.id] = item.ready_at - item.put_at if item.id != "at" else item.ready_at - begun
            assert claimed == {"now": pytest.approx(0, abs=0.01), "later": pytest.approx(0.3), "at": pytest.approx(0.6)}
            assert (await producer.counts()).done == 3  # kept, whoever's clock says that this is over
            assert await worker.purge(State.DONE) == 3
        await behind.put([Draft(id="held", payload=b"1")])
        for first, second in ((ahead, behind), (behind, ahead)):
            mine = await claim_one(first)
            assert not (await second.claim(1, owner="other", attempts=100)).items
            assert await first.renew([mine]) == [True]
            theirs = await claim_one(second)  # its lease is over
            assert theirs.attempt == mine.attempt + 1
            assert await first.renew([mine]) == [False]
            assert await second.finish([Ending(id="held", token=theirs.token, how="retry")]) == [True]


SKEWED = """
import runpy, time

real = time.clock_gettime
time.clock_gettime = lambda clock: real(clock) + ({ahead} if clock == time.CLOCK_REALTIME else 0)
time.time = lambda: time.clock_gettime(time.CLOCK_REALTIME)
time.time_ns = lambda: int(time.time() * 1e9)
runpy.run_module("supervisor", run_name="__main__", alter_sys=True)
"""
"""A daemon, or a command, whose wall clock is so many seconds ahead."""


@pytest.mark.parametrize("server", REDIS, indirect=True)
async def test_daemons_whose_clocks_differ_by_hours_share_a_queue(server, log):
    """What is put comes after its delay and not before; what is held stays held; what a dead one had is taken over."""
    text = file(server.url, 'call = "items:hold"', 'lease = "1s"\nkeep_results = "10m"')
    ahead, behind = (
        Host(log, name, text, (sys.executable, "-P", "-c", SKEWED.format(ahead=ahead)))
        for name, ahead in (("ahead", 3600), ("behind", -3600))
    )
    async with alive(ahead, behind):
        put = trio.current_time()
        for host in (ahead, behind):
            await host.daemon(
                "submit", "q", f'"from-{host.directory.name}"', "--id", host.directory.name, "--keep", "--delay", "1s"
            )
        await log.says("begin", 2)
        assert trio.current_time() - put > 1
        await trio.sleep(2.5)  # more than two leases, with both alive
        assert len(log.lines("begin")) == 2 and not ahead.said("item_lost") and not behind.said("item_lost")
        await ahead.kill()
        (behind.directory / "go").touch()
        (ahead.directory / "go").touch()
        records = await all_end(server.url, ["ahead", "behind"])
        assert {record.state for record in records} == {State.DONE}
        for record in records:
            assert abs(record.started_at - wall_now()) < 2 * PATIENCE  # the server's time
        for host in (ahead, behind):  # each knows the end of what the other has put
            for id in ("ahead", "behind"):
                assert '"done"' in await host.daemon("queue", "show", id, "--json")
    times = Counter(item for _, item, *_ in log.lines("begin"))
    (killed,) = (line[1] for line in log.lines("begin") if int(line[2]) in ahead.killed)
    assert times[killed] == 2 and times.total() == 3


# ---- poison ----


@pytest.mark.parametrize("engine", ["sqlite", *(pytest.param(name, marks=pytest.mark.long) for name in BOTH)])
async def test_an_item_that_kills_its_daemon_each_time_is_dead_in_the_end_and_said_to_be(request, engine, log):
    """Nobody lives to say that it failed: its attempts were counted when it was claimed."""
    url, lease = ("sqlite", "") if engine == "sqlite" else (request.getfixturevalue(engine).url, 'lease = "1s"')
    host = Host(log, "a", file(url, 'call = "items:poison"\nretry = { attempts = 2 }', lease))
    async with running(host.directory) as daemon, trio.open_nursery() as nursery:
        words = ("submit", "q", '"poison"', "--id", "bad")
        nursery.start_soon(partial(command, MODULE, *words, directory=host.directory))  # it may hear of it or not
        assert await daemon.ended() == -signal.SIGKILL
    again = await command(MODULE, "run", directory=host.directory)
    assert again.returncode == -signal.SIGKILL
    async with running(host.directory) as daemon:
        dead = await daemon.said("item_dead")
        assert (dead["item"], dead["attempt"]) == ("bad", 2) and "its daemon died" in dead["reason"]
        (row,) = json.loads(await daemon("queue", "dead", "q", "--json"))
        assert row["id"] == "bad"
        await daemon("submit", "q", '"good"', "--keep", "--result")


LENGTH = "def length(item):\n    return len(item)\n"


@pytest.mark.long
async def test_fifty_megabytes_go_through_submit_and_come_to_the_function(log):
    host = Host(log, "a", file("sqlite", 'call = "large:length"'))
    (host.directory / "large.py").write_text(LENGTH)
    (host.directory / "large.json").write_text(json.dumps("x" * (50 << 20)))
    async with alive(host):
        await host.daemon("submit", "q", "@large.json", "--id", "large")
        assert "52428800" in await host.daemon("queue", "wait", "large")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_fifty_megabytes_go_through_a_server_and_come_to_the_function(server, log, kind):
    host = Host(log, "a", file(server.url, f'call = "large:length"\nkind = "{kind}"'))
    (host.directory / "large.py").write_text(LENGTH)
    async with alive(host):
        (record,) = await all_end(server.url, await put(server.url, "x" * (50 << 20)))
    assert (record.result, record.attempts) == (b"52428800", 1)


@pytest.mark.parametrize("server", REDIS, indirect=True)
@pytest.mark.parametrize("job", ['call = "items:work"', 'call = "items:compute"\nkind = "process"'], ids=["async", "process"])
async def test_what_somebody_else_has_put_that_is_no_json_is_dead_and_kills_nobody(server, log, job):
    """Not each program that puts is one of ours."""
    bad = {"deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "cut": b'{"a":', "empty": b"", "infinite": b"1e999"}
    host = Host(log, "a", file(server.url, job))
    async with alive(host):
        async with skewed(server.url, name="q") as queue:
            await queue.put([Draft(id=id, payload=payload) for id, payload in bad.items()])
            await queue.put([Draft(id="good", payload=b"1", keep=True)])
        for id in bad:
            assert (await host.daemon.said("item_dead", item=id))["attempt"] == 1
        (record,) = await all_end(server.url, ["good"])
        assert record.state is State.DONE
        assert host.daemon.process.returncode is None
    assert log.items("end") == {"1"}


async def test_what_is_no_json_is_refused_by_submit_and_kills_nobody(log):
    host = Host(log, "a", file("sqlite", 'call = "items:work"'))
    async with alive(host):
        for item in ('{"a":' * 10_000 + "1" + "}" * 10_000, "{", "1e999", "nothing"):
            said = await host.daemon("submit", "q", item, code=1)
            assert said.endswith("; nothing is stored\n") and said.count("\n") == 1 and len(said) < 200
        await host.daemon("submit", "q", "1", "--id", "one", "--keep", "--result")
    assert log.items("end") == {"1"}


# ---- daemons that are not alike ----


@pytest.mark.parametrize("server", REDIS, indirect=True)
async def test_a_daemon_without_the_handler_leaves_the_items_to_the_others(server, log):
    """One has no job for the queue, one has a module that is not there: neither burns an attempt of any item."""
    lease = 'lease = "60s"'
    good = Host(log, "good", file(server.url, 'call = "items:work"', lease))
    without = Host(log, "without", f'[queues.q]\nbackend = "{server.url}"\n{lease}\n[jobs.idle]\ncommand = ["sleep", "1000"]\n')
    process = '\n[jobs.more]\ncall = "nowhere:work"\nkind = "process"\nqueue = "q"\n'
    broken = Host(log, "broken", file(server.url, 'call = "nowhere:work"', lease) + process)
    async with alive(without, broken):
        ids = await put(server.url, *range(20))
        for name in ("work", "more"):
            await broken.daemon.until(lambda rows, name=name: rows[name].word in ("backoff", "failed"))
        async with alive(good):
            records = await all_end(server.url, ids)
    assert {(record.state, record.attempts) for record in records} == {(State.DONE, 1)}


async def test_what_a_stop_cuts_short_is_given_back_at_once_and_another_begins_with_it(server, log):
    """Long before its lease is over, and no attempt is counted."""
    text = file(server.url, 'call = "items:hold"\ngrace = "100ms"', 'lease = "1h"')
    hosts = [Host(log, name, text) for name in "ab"]
    async with alive(*hosts):
        (item,) = await put(server.url, "ever")
        await log.says("begin")
        one, other = sorted(hosts, key=lambda host: str(host.daemon.process.pid) != log.lines("begin")[0][2])
        await one.daemon("stop", "work")
        await log.says("begin", 2)
        pids = [line[2:] for line in log.lines("begin")]
        assert pids == [[str(one.daemon.process.pid), "1"], [str(other.daemon.process.pid), "1"]]
        between = log.moments("begin")[1] - log.moments("stopped")[0]
        print(f"{1000 * between:.0f} ms from its end here to its beginning there")
        assert between < 15  # a second is what is promised, of a machine that does nothing else
        await other.daemon("cancel", item)
