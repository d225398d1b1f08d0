"""The queue in Redis, where it may fail: a real server that is killed, frozen, emptied, full, and a network that is bad."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from interleaving import CancelAtStep
from servers import PATIENCE, Proxy, RedisServer, open_proxy

from supervisor.queues import Place
from supervisor.queues import redis as engine
from supervisor.queues import redis_link as link
from supervisor.queues.protocol import (
    Claimed,
    Draft,
    Ending,
    Engine,
    Item,
    Notice,
    QueueError,
    QueueUnavailable,
    Settings,
    State,
    new_id,
)
from supervisor.queues.spec import QueueSpec
from supervisor.spec import Seconds
from supervisor.wall import WallClock

ROOT = Path(__file__).parent.parent


def opened(
    url: str,
    *,
    name: str = "q",
    listen: Callable[[Notice], None] = lambda notice: None,
    warn: Callable[[str], None] = lambda text: None,
    **spec: Any,
) -> AbstractAsyncContextManager[Engine]:
    settings = Settings(spec=QueueSpec(backend=url, **spec))
    return engine.open(name, settings, Place(directory=Path("/"), now=WallClock().now, listen=listen, warn=warn))


def draft(**said: Any) -> Draft:
    return Draft(**{"id": new_id(), "payload": b"{}", **said})


async def claim(queue: Engine, limit: int = 100) -> Claimed:
    return await queue.claim(limit, owner="tests", attempts=1000)


async def claim_some(queue: Engine, limit: int = 100) -> list[Item]:
    """As soon as there is something."""
    with trio.fail_after(PATIENCE):
        while not (items := list((await patiently(lambda: claim(queue, limit))).items)):
            await queue.wait_for_work()
    return items


async def done(queue: Engine, items: list[Item]) -> list[bool]:
    return await queue.finish([Ending(id=item.id, token=item.token, how="done") for item in items])


async def patiently(operation: Callable[[], Awaitable[Any]]) -> Any:
    """As a desk or a producer does it: again, until the engine is there."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                return await operation()
            except QueueUnavailable:
                await trio.sleep(0.01)


def cli(server: RedisServer, *words: str) -> str:
    done = subprocess.run(["redis-cli", "-s", str(server.path), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def connections(server: RedisServer) -> int:
    return cli(server, "CLIENT", "LIST").count("name=trio-supervisor")


class Traffic:
    """A producer and a worker that know what was acknowledged, and how often each item was begun."""

    def __init__(self, queue: Engine, count: int) -> None:
        self.queue = queue
        self.count = count
        self.stored: list[str] = []
        self.begun = Counter[str]()
        self.ended: set[str] = set()

    async def produce(self) -> None:
        for _ in range(self.count):
            mine = draft()
            await patiently(lambda mine=mine: self.queue.put([mine]))
            self.stored.append(mine.id)

    async def work(self) -> None:
        while len(self.ended) < self.count:
            items = await claim_some(self.queue, 10)
            self.begun.update(item.id for item in items)
            for item, ok in zip(items, await patiently(lambda items=items: done(self.queue, items)), strict=True):
                if ok or await patiently(lambda item=item: self.queue.show(item.id)) is None:
                    self.ended.add(item.id)  # it may be that it was stored, and only the answer was lost

    async def run(self, trouble: Callable[[], Awaitable[object]]) -> None:
        """Both of them, while `trouble` happens."""
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.produce)
                nursery.start_soon(self.work)
                await trouble()
        assert self.ended == set(self.stored) == set(self.begun)


# ---- a server that goes away ----


async def outage(server: RedisServer, seconds: float, times: int, url: str = "") -> None:
    async with opened(url or server.url, lease=Seconds(1)) as queue:
        traffic = Traffic(queue, 200)

        async def kills() -> None:
            for number in range(1, times + 1):
                while len(traffic.ended) < number * 150 // times:
                    await trio.sleep(0.01)
                server.kill()
                await trio.sleep(seconds)
                server.start()

        await traffic.run(kills)
        assert (await queue.counts()).waiting == 0
    assert connections(server) == 0


@pytest.mark.parametrize("seconds", [0, 2])
async def test_the_server_is_killed_and_comes_back(redis_alone, seconds):
    await outage(redis_alone, seconds, times=2 if not seconds else 1)


@pytest.mark.long
async def test_the_server_is_killed_and_comes_back_many_times(redis_alone):
    await outage(redis_alone, 0, times=20)
    await outage(redis_alone, 30, times=1)


async def test_who_waits_for_work_gets_it_after_a_restart(redis_alone):
    async with opened(redis_alone.url) as queue, opened(redis_alone.url) as other:
        assert (await claim(queue)).items == []
        redis_alone.restart()
        mine = draft()
        await patiently(lambda: other.put([mine]))
        assert [item.id for item in await claim_some(queue)] == [mine.id]


async def test_a_server_that_is_not_there_is_said_at_once_and_waited_for(redis_alone):
    redis_alone.kill()
    async with opened(redis_alone.url) as queue:
        with pytest.raises(QueueUnavailable, match=rf"redis://127.0.0.1:{redis_alone.port}/0: .*Connection refused"):
            await queue.put([draft()])
        redis_alone.start()
        with trio.fail_after(PATIENCE):
            await queue.wait_for_work()
        assert len(await queue.put([draft()])) == 1


async def test_a_server_that_hangs_is_unavailable_and_goes_on(redis_alone, monkeypatch):
    monkeypatch.setattr(link, "ANSWER", 0.5)
    async with opened(redis_alone.url) as queue:
        await queue.put([mine := draft()])
        (item,) = await claim_some(queue)
        redis_alone.stop()
        try:
            with trio.fail_after(PATIENCE):
                for _ in range(3):
                    with pytest.raises(QueueUnavailable, match="not answered"):
                        await queue.renew([item])
        finally:
            redis_alone.cont()
        assert await patiently(lambda: queue.renew([item])) == [True]
        assert item.id == mine.id and await done(queue, [item]) == [True]


async def test_connections_are_killed_and_scripts_flushed(redis_alone):
    async with opened(redis_alone.url, lease=Seconds(1)) as queue:
        traffic = Traffic(queue, 120)

        async def trouble() -> None:
            for number in range(1, 5):
                while len(traffic.ended) < number * 25:
                    await trio.sleep(0.005)
                cli(redis_alone, "SCRIPT", "FLUSH")
                cli(redis_alone, "CLIENT", "KILL", "TYPE", random.choice(["normal", "pubsub"]))

        await traffic.run(trouble)
        await queue.counts()
        assert connections(redis_alone) == 2


async def test_what_a_flush_removes_is_lost_and_the_queue_goes_on(redis_alone):
    heard: list[Notice] = []
    async with opened(redis_alone.url, listen=heard.append) as queue, opened(redis_alone.url) as other:
        await queue.declare(queue.settings)
        await queue.put([draft(), draft(priority=1)])
        (mine,) = (await claim(queue, 1)).items
        assert len((await claim(other)).items) == 1
        cli(redis_alone, "FLUSHALL")
        (receipt,) = await other.put([draft()])
        assert [item.id for item in await claim_some(queue)] == [receipt.id]  # it hears of it, though its mark was removed
        with trio.fail_after(PATIENCE):
            while Notice(what="lost", id=mine.id) not in heard or await other.declared() is None:
                await trio.sleep(0.01)
        assert await done(queue, [mine]) == [False]


async def test_a_claim_whose_answer_was_lost_comes_back(redis_alone):
    """Nobody but the server knows of it: when we are connected again, it waits again, long before its lease is over."""
    async with (
        opened(redis_alone.url) as other,
        open_proxy(redis_alone.port) as proxy,
        opened(f"redis://127.0.0.1:{proxy.port}") as queue,
    ):
        await other.put([mine := draft()])
        await queue.counts()
        proxy.swallows = True
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(QueueUnavailable):
                    await claim(queue)

            with trio.fail_after(PATIENCE):
                while (await other.counts()).running == 0:
                    await trio.sleep(0.01)
            proxy.swallows = False
            await proxy.cut()
        (item,) = await claim_some(queue)
        assert (item.id, item.attempt) == (mine.id, 1)


async def test_a_put_whose_answer_was_lost_is_not_done_twice(redis_alone):
    """It is stored, handled and gone before it is put again."""
    async with (
        open_proxy(redis_alone.port) as proxy,
        opened(f"redis://127.0.0.1:{proxy.port}") as queue,
        opened(redis_alone.url) as other,
    ):
        await other.put([draft()])
        assert len(await done(other, await claim_some(other))) == 1
        await queue.counts()
        proxy.swallows = True
        mine = draft()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(QueueUnavailable):
                    await queue.put([mine])

            items = await claim_some(other)
            assert await done(other, items) == [True]
            proxy.swallows = False
            await proxy.cut()
        assert [receipt.what for receipt in await patiently(lambda: queue.put([mine]))] == ["known"]
        assert (await claim(other)).items == []


async def test_a_cancelled_claim_gives_back_what_it_brings(redis_alone):
    async with open_proxy(redis_alone.port) as proxy, opened(f"redis://127.0.0.1:{proxy.port}") as queue:
        await queue.put([draft()])
        proxy.delay = 0.1
        async with trio.open_nursery() as nursery, opened(redis_alone.url) as other:
            nursery.start_soon(claim, queue)
            while (await other.counts()).running == 0:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel(reason="nobody wants it any more")
            with trio.CancelScope(shield=True), trio.fail_after(PATIENCE):
                while (await other.counts()).waiting == 0:
                    await trio.sleep(0.01)


# ---- a server that does not want ----


async def test_no_memory_is_unavailable_and_nothing_is_done_by_half(redis_alone):
    async with opened(redis_alone.url) as queue:
        await queue.put([mine := draft()])
        cli(redis_alone, "CONFIG", "SET", "maxmemory", "1")
        for operation in (lambda: queue.put([draft()]), lambda: claim(queue)):
            with pytest.raises(QueueUnavailable, match="OOM"):
                await operation()
        cli(redis_alone, "CONFIG", "SET", "maxmemory", "0")
        with trio.fail_after(PATIENCE):
            await queue.wait_for_work()
        assert [item.id for item in await claim_some(queue)] == [mine.id]


async def test_a_replica_is_unavailable(redis_alone):
    async with opened(redis_alone.url) as queue:
        await queue.put([mine := draft()])
        cli(redis_alone, "REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(QueueUnavailable, match=r"(?i)read.?only"):
            await claim(queue)
        cli(redis_alone, "REPLICAOF", "NO", "ONE")
        assert [item.id for item in await claim_some(queue)] == [mine.id]


async def test_a_server_that_still_loads_is_unavailable(redis_alone):
    async with opened(redis_alone.url) as queue:
        await queue.put([mine := draft()])
        for number in range(8):
            cli(redis_alone, "DEBUG", "POPULATE", "1", f"heavy{number}", "3000000")
        for setting in (("appendonly", "no"), ("rdbcompression", "no")):
            cli(redis_alone, "CONFIG", "SET", *setting)
        cli(redis_alone, "SAVE")
        slowly = {"--appendonly": "no", "--key-load-delay": "200000", "--loading-process-events-interval-bytes": "1024"}
        redis_alone.kill()
        redis_alone.command = lambda: [*RedisServer.command(redis_alone), *(each for pair in slowly.items() for each in pair)]
        redis_alone.READY = "Server initialized"
        redis_alone.start()
        with pytest.raises(QueueUnavailable, match=r"(?i)loading"):
            while True:
                with suppress_refused():
                    await queue.counts()
        cli(redis_alone, "CONFIG", "SET", "key-load-delay", "0")  # now it may be quick
        assert [item.id for item in await claim_some(queue)] == [mine.id]


class suppress_refused:
    """What is said while its socket is not there yet."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        return isinstance(error, QueueUnavailable) and "oading" not in str(error)


# ---- a network that is bad ----


async def test_a_slow_way_to_the_server_mixes_up_nothing(redis_alone):
    await cancelled_often(redis_alone, 60)


@pytest.mark.long
async def test_a_slow_way_to_the_server_mixes_up_nothing_a_thousand_times(redis_alone):
    await cancelled_often(redis_alone, 1000)


async def cancelled_often(server: RedisServer, times: int) -> None:
    """Calls are cancelled in every moment; each answer belongs to its question, and no connection is lost or gained."""
    async with open_proxy(server.port) as proxy, opened(f"redis://127.0.0.1:{proxy.port}") as queue:
        known = [draft(payload=b"%d" % number) for number in range(10)]
        await queue.put(known)
        proxy.delay = 0.002
        chance = random.Random(times)
        for _ in range(times):
            scope = trio.CancelScope()
            instrument = CancelAtStep(scope, chance.randrange(1, 40))
            trio.lowlevel.add_instrument(instrument)
            try:
                with scope:
                    for each in known:
                        assert (await queue.show(each.id)).payload == each.payload
            finally:
                trio.lowlevel.remove_instrument(instrument)
        for each in known:
            assert (await queue.show(each.id)).payload == each.payload
        assert connections(server) == 2


@pytest.mark.parametrize("seed", range(2))
async def test_a_way_that_cuts_garbles_and_goes_silent(redis_alone, monkeypatch, seed):
    monkeypatch.setattr(link, "ANSWER", 0.5)
    monkeypatch.setattr(link, "BACKOFF", (0.01, 0.02))
    chance = random.Random(seed)

    async with open_proxy(redis_alone.port) as proxy, opened(f"redis://127.0.0.1:{proxy.port}") as queue:
        traffic = Traffic(queue, 50)
        async with trio.open_nursery() as nursery:
            # what is garbled may be an id: so who counts is somebody else, with a good way
            async with opened(redis_alone.url) as other:
                nursery.start_soon(produce, queue, traffic)
                nursery.start_soon(spoil, proxy, chance)
                with trio.fail_after(PATIENCE):
                    while len(traffic.ended) < traffic.count:
                        items = await claim_some(other, 10)
                        assert all(await done(other, items))
                        traffic.begun.update(item.id for item in items)
                        traffic.ended.update(item.id for item in items)
                nursery.cancel_scope.cancel(reason="all have ended")
        assert set(traffic.stored) <= traffic.ended
        assert traffic.begun.total() == traffic.count


async def produce(queue: Engine, traffic: Traffic) -> None:
    """Ids that the server knows are what was put; that the answer may be garbled does not matter."""
    for _ in range(traffic.count):
        mine = draft()
        await patiently(lambda mine=mine: queue.put([mine]))
        traffic.stored.append(mine.id)


async def spoil(proxy: Proxy, chance: random.Random) -> None:
    while True:
        await trio.sleep(chance.uniform(0.05, 0.3))
        match chance.randrange(3):
            case 0:
                await proxy.cut()
            case 1:
                proxy.garbles = chance.randrange(200)
            case 2:
                proxy.silent = True
                await trio.sleep(0.05)
                proxy.silent = False
                await proxy.cut()


# ---- many ----


async def test_what_comes_at_once_goes_together(redis_alone):
    async with opened(redis_alone.url) as queue:
        await queue.counts()
        cli(redis_alone, "CONFIG", "RESETSTAT")
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(queue.put, [draft()])
        assert (await queue.counts()).waiting == 100
        calls = [line for line in cli(redis_alone, "INFO", "commandstats").splitlines() if "evalsha" in line]
        assert len(calls) == 1 and int(calls[0].partition("calls=")[2].partition(",")[0]) <= 4


WORKER = """
import sys, time, trio
from pathlib import Path
from supervisor.queues import Place, redis
from supervisor.queues.protocol import Ending, Settings
from supervisor.queues.spec import QueueSpec

async def main(url, log):
    place = Place(directory=Path("/"), now=time.time, listen=lambda notice: None, warn=print)
    async with redis.open("q", Settings(spec=QueueSpec(backend=url, lease=1.0)), place) as queue:
        print("ready", flush=True)
        while True:
            for item in (await queue.claim(5, owner="worker", attempts=1000)).items:
                log.write(item.id + "\\n")
                await queue.finish([Ending(id=item.id, token=item.token, how="done")])
            await queue.wait_for_work()

trio.run(main, sys.argv[1], open(sys.argv[2], "a", buffering=1))
"""


async def drained_while_workers_die(server: RedisServer, directory: Path, count: int, kills: int) -> None:
    log = directory / "begun"
    log.touch()

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, server.url, str(log)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    workers = [start(), start()]
    try:
        async with opened(server.url, lease=Seconds(1), size=count) as queue:
            ids = [receipt.id for receipt in await queue.put([draft() for _ in range(count)])]
            for number in range(kills):
                worker = workers[number % 2]
                await trio.to_thread.run_sync(worker.stdout.readline)
                before = log.stat().st_size
                while log.stat().st_size < before + 200 and (await queue.counts()).waiting:
                    await trio.sleep(0.01)
                worker.kill()
                worker.wait()
                worker.stdout.close()
                workers[number % 2] = start()
            with trio.fail_after(PATIENCE):
                while (counts := await queue.counts()).waiting or counts.running:
                    await trio.sleep(0.05)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
            worker.stdout.close()
    begun = Counter(log.read_text().split())
    assert set(begun) == set(ids)
    assert begun.total() - count <= 5 * kills  # what was in hand when its worker died, and nothing else


async def test_two_processes_drain_a_queue_while_each_is_killed_in_turn(redis_alone, tmp_path):
    await drained_while_workers_die(redis_alone, tmp_path, 100, 2)


@pytest.mark.long
async def test_two_processes_drain_a_queue_while_each_is_killed_many_times(redis_alone, tmp_path):
    await drained_while_workers_die(redis_alone, tmp_path, 30_000, 40)


async def test_a_line_of_one_group_does_not_slow_down_the_others(redis):
    """What may not run is looked at once, and then set aside."""
    async with opened(redis.url, name="groups") as queue:
        await queue.put([draft(group="a", payload=b"%d" % number) for number in range(3000)])
        (first,) = (await claim(queue, 1)).items
        await queue.put([other := draft(group="b")])
        assert [item.id for item in await claim_some(queue)] == [other.id]
        assert cli(redis, "ZCARD", "{supervisor:groups}:ready:0") == "0"
        assert (await queue.counts()).waiting == 2999
        assert await done(queue, [first]) == [True]
        assert cli(redis, "ZCARD", "{supervisor:groups}:ready:0") == "1"
        (second,) = await claim_some(queue)
        assert (first.payload, second.payload) == (b"0", b"1")


# ---- where it is, and how safe ----


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host", "redis://host:6379/0"),
        ("redis://user:s3cret@host:1234/7", "redis://host:1234/7"),
        ("rediss://:s3cret@host", "rediss://host:6379/0"),
        ("redis+unix:///run/redis.sock?db=3", "redis+unix:///run/redis.sock?db=3"),
        ("redis://user:s3c%40ret@[::1]:1/2", "redis://[::1]:1/2"),
    ],
)
def test_a_url_says_where_it_is_and_the_password_is_not_shown(url, shown):
    address = link.Address.parse(url)
    assert str(address) == shown
    assert "s3c" not in f"{address} {address!r}"
    assert (address.password or "").startswith("s3c") is ("s3c" in url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://u:s3cret@host/x", "'x' is no number"),
        ("redis://u:s3cret@host:port/0", "[Pp]ort"),
        ("redis://u:s3cret@host/0?colour=red", "there is no parameter .colour"),
        ("redis:///0", "names no host"),
        ("redis+unix://?db=1", "names no path"),
        ("rediss://u:s3cret@host?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs: there is no file /nowhere/ca.pem"),
    ],
)
async def test_a_url_that_is_none_is_refused_without_the_password(url, why):
    with pytest.raises(QueueError, match=why) as refused:
        async with opened(url):
            pass
    assert "s3cret" not in str(refused.value)


async def test_a_unix_socket_and_a_password(redis_alone):
    cli(redis_alone, "CONFIG", "SET", "requirepass", "s3cret")
    async with opened(f"redis+unix://:s3cret@{redis_alone.path}?db=2") as queue:
        assert len(await queue.put([draft()])) == 1
    for url in (f"redis://:wr0ng@127.0.0.1:{redis_alone.port}", redis_alone.url):
        async with opened(url) as queue:
            with pytest.raises(QueueUnavailable, match=r"WRONGPASS|password|authenticat") as refused:
                await queue.counts()
            assert "wr0ng" not in str(refused.value)


async def test_a_server_that_stores_nothing_is_warned_of(redis_alone):
    warnings: list[str] = []
    async with opened(redis_alone.url, warn=warnings.append) as queue:
        await queue.counts()
    assert warnings == []
    for setting in (("appendonly", "no"), ("maxmemory", "100mb"), ("maxmemory-policy", "allkeys-lru")):
        cli(redis_alone, "CONFIG", "SET", *setting)
    async with opened(redis_alone.url, warn=warnings.append) as queue:
        await queue.counts()
        redis_alone.restart()
        await patiently(queue.counts)
    assert [("appendonly yes" in text, "noeviction" in text) for text in warnings] == [(True, False), (False, True)]


async def test_who_may_not_ask_for_the_settings_is_told_nothing(redis_alone):
    cli(redis_alone, "CONFIG", "SET", "appendonly", "no")
    cli(redis_alone, "ACL", "SETUSER", "jobs", "on", ">s3cret", "~{supervisor:q}*", "&{supervisor:q}*", "+@all", "-@admin")
    warnings: list[str] = []
    async with opened(f"redis://jobs:s3cret@127.0.0.1:{redis_alone.port}", warn=warnings.append) as queue:
        assert len(await queue.put([draft()])) == 1
        assert len((await claim(queue)).items) == 1
    assert warnings == []


def test_without_the_library_the_error_names_the_extra():
    source = "import sys; sys.modules['coredis'] = None; from supervisor.queues import QUEUES; QUEUES['redis'].open"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "a queue in Redis needs the library coredis: pip install 'trio-supervisor[redis]'" in done.stderr


async def test_items_are_peeked_at_in_the_order_of_claims(redis):
    async with opened(redis.url, name="peeked") as queue:
        await queue.put(
            [
                draft(priority=2),
                draft(priority=1, group="g"),
                draft(priority=1, group="g"),
                draft(priority=1),
                draft(delay=LONG),
            ]
        )
        first = (await claim(queue, 1)).items[0]
        assert (await claim(queue, 1)).items[0].group is None  # the other one of the group is set aside meanwhile
        seen = await queue.peek(State.WAITING, 10)
        assert [(each.priority, each.group) for each in seen] == [(1, "g"), (2, None), (0, None)]
        assert first.group == "g"


LONG = 3600.0
