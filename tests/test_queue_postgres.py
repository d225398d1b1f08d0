"""The engine in a PostgreSQL: what only it can do, and what a server and the way to it can do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import trio
from hypothesis import strategies as st
from servers import PostgresServer, open_proxy

from supervisor.queues import Place
from supervisor.queues.producer import _marks, encoded
from supervisor.queues.protocol import (
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
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.spec import Seconds

psycopg = pytest.importorskip("psycopg")

ROOT = Path(__file__).parent.parent
names = count(1)


def queue_at(
    url: str,
    name: str = "",
    *,
    listen: Callable[[Notice], None] = lambda notice: None,
    group_by: str | None = None,
    **spec: Any,
) -> AbstractAsyncContextManager[Engine]:
    from supervisor.queues import postgres

    settings = Settings(spec=QueueSpec(**{"backend": url, "lease": Seconds(60), **spec}), group_by=group_by)
    place = Place(directory=Path("/"), now=lambda: 0.0, listen=listen, warn=print)
    return postgres.open(name or f"postgres{next(names)}", settings, place)


def draft(number: int = 0, **said: Any) -> Draft:
    return Draft(**{"id": new_id(), "payload": b'{"number":%d}' % number, **said})


def done(items: Sequence[Item]) -> list[Ending]:
    return [Ending(id=item.id, token=item.token, how="done") for item in items]


async def claim(queue: Engine, limit: int = 100) -> list[Item]:
    return list((await queue.claim(limit, owner="tests", attempts=1000)).items)


async def claim_some(queue: Engine, limit: int = 100) -> list[Item]:
    while not (items := await claim(queue, limit)):
        await queue.wait_for_work()
    return items


async def again(call: Callable[[], Any]) -> Any:
    """What a call gives, when the engine is there again."""
    while True:
        try:
            return await call()
        except QueueUnavailable:
            await trio.sleep(0.05)


def sql(url: str, *statements: str) -> list[Any]:
    """By a connection of an application's own; gives the rows of the last."""
    with psycopg.connect(url, autocommit=True) as db:
        for statement in statements:
            cursor = db.execute(statement)
        return cursor.fetchall() if cursor.description else []


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not true():
            await trio.sleep(0.01)


@asynccontextmanager
async def waiting(queue: Engine) -> AsyncIterator[None]:
    """Somebody waits for work; he is woken in the block."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(queue.wait_for_work)
            await trio.sleep(0.05)
            yield


@pytest.fixture
def database(postgres) -> str:
    """The URL of a database of this test's own, empty."""
    name = f"d{next(names)}"
    sql(postgres.url, f"CREATE DATABASE {name}")
    return f"{postgres.url.removesuffix('/postgres')}/{name}"


# ---- the tables ----


async def test_many_who_come_at_once_make_the_tables_once(database):
    async def come() -> None:
        async with queue_at(database, "q") as queue:
            await queue.put([draft()])

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(come)
    async with queue_at(database, "q") as queue:
        assert len(await claim(queue)) == 8


async def test_who_may_not_make_the_tables_is_told_what_an_administrator_does(database):
    from supervisor.queues.postgres import schema

    sql(database, "DROP USER IF EXISTS clerk", "CREATE USER clerk")
    url = database.replace("postgres@", "clerk@")
    async with queue_at(url) as queue:
        with pytest.raises(QueueUnavailable, match=r"no tables for queues.*let an administrator run .*schema\(\)"):
            await queue.counts()
        with psycopg.connect(database, autocommit=True) as db:
            db.execute(schema())
            db.execute("GRANT USAGE ON SCHEMA supervisor TO clerk")
        with pytest.raises(QueueUnavailable, match="permission denied"):
            await queue.counts()
        sql(
            database,
            "GRANT ALL ON ALL TABLES IN SCHEMA supervisor TO clerk",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA supervisor TO clerk",
        )
        assert (await again(queue.counts)).waiting == 0
    sql(database, "DROP OWNED BY clerk", "DROP USER clerk")


async def test_tables_of_a_newer_version_are_left_alone(database):
    async with queue_at(database) as queue:
        await queue.counts()
    sql(database, "UPDATE supervisor.version SET number = 99")
    async with queue_at(database) as queue:
        with pytest.raises(QueueUnavailable, match="newer version"):
            await queue.put([draft()])


async def test_tables_that_somebody_has_dropped_are_made_again(database):
    async with queue_at(database) as queue:
        await queue.put([draft()])
        sql(database, "DROP SCHEMA supervisor CASCADE")
        await again(lambda: queue.put([draft()]))
        assert len(await claim(queue)) == 1


# ---- what an application puts ----


@contextmanager
def application(server: PostgresServer) -> Any:
    with psycopg.connect(server.url) as db:
        yield db


async def test_what_an_application_puts_is_there_when_it_commits(postgres):
    async with queue_at(postgres.url, "orders") as queue:
        await queue.declare(queue.settings)
        with application(postgres) as db:
            db.execute("CREATE TABLE IF NOT EXISTS bought (thing text)")
            db.execute("INSERT INTO bought VALUES ('tea')")
            ((id,),) = db.execute("SELECT supervisor.put('orders', '{\"thing\": \"tea\"}')").fetchall()
            assert await claim(queue) == []
            db.rollback()
            assert await claim(queue) == []
            assert await queue.show(id) is None
            async with waiting(queue):
                ((id,),) = db.execute("SELECT supervisor.put('orders', '{\"thing\": \"milk\"}')").fetchall()
                db.commit()
            (item,) = await claim(queue)
        assert (item.id, json.loads(item.payload), item.priority) == (id, {"thing": "milk"}, 1)
        assert len(id) == 26
        assert new_id()[:7] >= id[:7] >= "01m"  # as the others are: in the order of time


async def test_an_application_that_does_not_end_its_transaction_keeps_nobody(postgres):
    async with queue_at(postgres.url, "busy", size=5) as queue:
        await queue.declare(queue.settings)
        with application(postgres) as db:
            db.execute("SELECT supervisor.put('busy', '1')")
            for _ in range(70):  # more than are summed up
                await queue.put([draft(), draft()])
                await queue.finish(done(await claim(queue)))
            db.commit()
        assert len(await claim(queue)) == 1


async def test_an_application_can_say_all_that_a_producer_can(postgres):
    unique = UniqueSpec(by=("a",), on_conflict="merge")
    async with queue_at(postgres.url, "all", unique=unique, size=3, expire=Seconds(100), group_by="g") as queue:
        await queue.declare(queue.settings)
        put = """SELECT supervisor.put('all', '{"a": 1, "g": "x"}', id => 'first', priority => 'low', delay => '1 hour',
            expire => '1 minute', keep => true)"""
        assert sql(postgres.url, put) == [("first",)]
        found = await queue.show("first")
        assert (found.priority, found.group, found.key) == (2, "x", "[1]")
        assert round(found.ready_at - found.put_at) == 3600
        assert round(found.expires_at - found.ready_at) == 60
        assert sql(postgres.url, """SELECT supervisor.put('all', '{"g": null, "a": 1}')""") == [("first",)]  # merged
        at = "SELECT supervisor.put('all', '{\"a\": 2, \"g\": 3}', at => '2100-01-01 00:00+00', id => 'later')"
        sql(postgres.url, at)
        found = await queue.show("later")
        assert (found.ready_at, found.group, found.priority) == (4102444800.0, "3", 1)
        assert round(found.expires_at - found.ready_at) == 100
        refused = {
            "SELECT supervisor.put('all', '{\"a\": 1}')": 'field "g"',
            "SELECT supervisor.put('all', '7')": 'field "a"',
            "SELECT supervisor.put('all', '{\"a\": 3, \"g\": 1}', priority => 'lowest')": "there are high, normal, low",
            "SELECT supervisor.put('none', '1')": 'no daemon has handled a queue "none"',
            "SELECT supervisor.put('all', jsonb_build_object('a', n, 'g', n)) FROM generate_series(10, 12) AS n": "is full: 3",
        }
        for statement, why in refused.items():
            with pytest.raises(psycopg.Error, match=why):
                sql(postgres.url, statement)
        await queue.declare(Settings(spec=QueueSpec(backend=postgres.url, unique=UniqueSpec(by=("a",))), group_by="g"))
        assert sql(postgres.url, """SELECT supervisor.put('all', '{"a": 1, "g": 1}')""") == [(None,)]


async def test_an_application_needs_no_rights_on_the_tables(postgres):
    async with queue_at(postgres.url, "rights") as queue:
        await queue.declare(queue.settings)
        sql(postgres.url, "DROP USER IF EXISTS shop", "CREATE USER shop", "GRANT USAGE ON SCHEMA supervisor TO shop")
        shop = postgres.url.replace("postgres@", "shop@")
        sql(shop, "SELECT supervisor.put('rights', '1')")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            sql(shop, "SELECT * FROM supervisor.items")
        assert len(await claim(queue)) == 1
        sql(postgres.url, "DROP OWNED BY shop", "DROP USER shop")


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@hypothesis.given(value=values)
@hypothesis.settings(max_examples=40)
def test_the_key_of_an_item_is_the_same_for_an_application(postgres, value):
    key_is_the_same(postgres, value)


@pytest.mark.long
@hypothesis.given(value=values)
@hypothesis.settings(max_examples=2000)
def test_the_key_of_many_items_is_the_same_for_an_application(postgres, value):
    key_is_the_same(postgres, value)


def key_is_the_same(postgres: PostgresServer, value: Any) -> None:
    settings = Settings(spec=QueueSpec(unique=UniqueSpec(by=("a",))), group_by="a")
    our_key, our_group = _marks(settings, *encoded({"a": value}))
    with _keep_open(postgres) as db:
        select = """SELECT supervisor.shortened(supervisor.canonical(jsonb_build_array(v))), supervisor.shortened(
            CASE WHEN jsonb_typeof(v) = 'string' THEN v #>> '{}' ELSE supervisor.canonical(v) END)
            FROM (SELECT %(v)s::jsonb) AS v (v)"""
        key, group = db.execute(select, {"v": json.dumps(value)}).fetchone()
    assert (key, group if value is not None else None) == (our_key, our_group)


_open: dict[str, Any] = {}


@contextmanager
def _keep_open(server: PostgresServer) -> Any:
    if server.url not in _open:
        trio.run(_make_tables, server.url)
        _open[server.url] = psycopg.connect(server.url, autocommit=True)
    yield _open[server.url]


async def _make_tables(url: str) -> None:
    async with queue_at(url) as queue:
        await queue.counts()


# ---- the server, and the way to it ----


class Ear:
    """Hears notices."""

    def __init__(self) -> None:
        self.heard: list[Notice] = []

    def __call__(self, notice: Notice) -> None:
        self.heard.append(notice)


async def drain(queue: Engine, handled: Counter[str], total: int) -> None:
    """A worker that gives up on nothing: claims, renews, finishes, and tries again what the engine does not do."""
    while len(handled) < total:
        items = await again(lambda: claim(queue, 7))
        if not items:
            with trio.move_on_after(1):
                await queue.wait_for_work()
            continue
        held = await again(lambda: queue.renew(items))  # noqa: B023
        mine = [item for item, still in zip(items, held, strict=True) if still]
        handled.update(item.id for item in mine)
        await again(lambda: queue.finish(done(mine)))  # noqa: B023


async def drained_while(url: str, trouble: Callable[[], Any], total: int = 200) -> Counter[str]:
    """How often each of so many items ran, with two at work, one who puts, and this trouble."""
    handled: Counter[str] = Counter()
    name = f"drained{next(names)}"
    those = [draft(number, keep=False) for number in range(total)]
    async with queue_at(url, name, lease=Seconds(1)) as one, queue_at(url, name, lease=Seconds(1)) as two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, one, handled, total)
            nursery.start_soon(drain, two, handled, total)
            nursery.start_soon(trouble)
            for start in range(0, total, 10):
                await again(lambda: one.put(those[start : start + 10]))  # noqa: B023
                await trio.sleep(0.01)
        left = await again(one.counts)
        while left.running or left.waiting:  # what was claimed by somebody whose answer was lost
            await again(lambda: claim_some(two))
            await again(lambda: one.finish(done([])))
            left = await again(one.counts)
    assert set(handled) >= {each.id for each in those}
    return handled


@pytest.mark.parametrize("seconds", [0, 2, pytest.param(30, marks=[pytest.mark.long, pytest.mark.limit(300)])])
async def test_the_server_is_killed_and_comes_again(postgres_alone, seconds):
    async def kill() -> None:
        for _ in range(2 if not seconds else 1):
            await trio.sleep(0.15)
            postgres_alone.kill()
            await trio.sleep(seconds)
            postgres_alone.start()

    await drained_while(postgres_alone.url, kill)


async def test_connections_are_ended_by_the_server(postgres_alone):
    async def end() -> None:
        for _ in range(10):
            await trio.sleep(0.05)
            sql(
                postgres_alone.url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'supervisor'",
            )

    await drained_while(postgres_alone.url, end)


async def test_a_server_that_hangs_hangs_nobody(postgres_alone, monkeypatch):
    monkeypatch.setattr("supervisor.queues.postgres_session.PATIENCE", 1.0)
    async with queue_at(postgres_alone.url) as queue:
        await queue.put([draft()])
        woken = trio.Event()

        async def wait() -> None:
            await claim_some(queue)
            await again(lambda: claim_some(queue))
            woken.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await until(lambda: queue._held)  # type: ignore[attr-defined]
            postgres_alone.stop()
            with trio.fail_after(30):
                with pytest.raises(QueueUnavailable, match="does not answer"):
                    await queue.put([draft()])
                with pytest.raises(QueueUnavailable):
                    await queue.counts()
            postgres_alone.cont()
            with trio.fail_after(60):
                await again(lambda: queue.put([draft()]))
                await woken.wait()


async def test_a_server_that_may_only_be_read(postgres_alone):
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'supervisor'"
    async with queue_at(postgres_alone.url) as queue:
        await queue.put([draft()])
        sql(postgres_alone.url, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()", end)
        words = ""
        while "it may only be read" not in words:  # before that: the connection is ended
            try:
                await queue.put([draft()])
            except QueueUnavailable as error:
                words = str(error)
        sql(
            postgres_alone.url,
            "SET default_transaction_read_only = off",
            "ALTER SYSTEM RESET ALL",
            "SELECT pg_reload_conf()",
            end,
        )
        await again(lambda: queue.put([draft()]))


async def test_what_was_not_heard_is_looked_for(postgres):
    ear = Ear()
    async with open_proxy(postgres.port) as proxy:
        async with (
            queue_at(postgres.url_at(proxy.port), "heard", listen=ear, lease=Seconds(1)) as here,
            queue_at(postgres.url, "heard", lease=Seconds(1)) as there,
        ):
            await here.put([draft(), draft()])
            cancelled, lost = await claim(here)
            proxy.refuses = True
            await proxy.cut()
            assert await there.cancel(cancelled.id) == "running"
            while not await claim(there):  # the lease is over
                await there.wait_for_work()
            async with waiting(here):
                await there.put([draft()])
                assert ear.heard == []
                proxy.refuses = False
            await until(lambda: len(ear.heard) == 2)
            assert {(each.id, each.what) for each in ear.heard} <= {
                (cancelled.id, "lost"), (lost.id, "lost"), (cancelled.id, "cancel"),
            }  # fmt: skip


@pytest.mark.parametrize("what", ["cut", "garbled", "swallowed", "silent"])
async def test_a_bad_way_to_the_server(postgres, what, monkeypatch):
    monkeypatch.setattr("supervisor.queues.postgres_session.PATIENCE", 1.0)
    async with open_proxy(postgres.port) as proxy:

        async def trouble() -> None:
            for number in range(3):
                await trio.sleep(0.1)
                if what == "garbled":
                    proxy.garbles = 3 + 7 * number
                elif what == "cut":
                    await proxy.cut()
                else:
                    proxy.swallows, proxy.silent = what == "swallowed", what == "silent"
                    await trio.sleep(0.3)
                    proxy.swallows = proxy.silent = False
                    await proxy.cut()

        await drained_while(postgres.url_at(proxy.port), trouble, total=100)


@pytest.mark.parametrize("closed", [False, True])
async def test_a_cancelled_claim_that_was_begun_is_given_back(postgres, closed):
    name = f"cancelled{next(names)}"
    async with queue_at(postgres.url, name) as other:
        async with queue_at(postgres.url, name) as queue:
            await queue.put([draft()])
            with application(postgres) as db:
                db.execute("LOCK TABLE supervisor.items IN EXCLUSIVE MODE")
                with trio.move_on_after(0.2) as scope:
                    await claim(queue)
                assert scope.cancelled_caught
            if not closed:
                assert (await claim_some(queue))[0].attempt == 1
        if closed:
            assert (await claim(other))[0].attempt == 1


async def test_what_others_notify_is_no_harm(postgres):
    ear = Ear()
    async with queue_at(postgres.url, "noise", listen=ear) as queue:
        await queue.put([draft()])
        (item,) = await claim(queue)
        for noise in ("", "ended", "ended [1]", "lost {", 'lost ["x"]', f'cancel ["{item.id}:0"]', 'ended ["over"]'):
            sql(postgres.url, f"SELECT supervisor.tell('noise', '{noise}')")
        await until(lambda: ear.heard != [])
        assert ear.heard == [Notice(what="ended", id="over")]


async def test_a_bad_operation_does_not_spoil_the_others(postgres):
    async with queue_at(postgres.url) as queue:
        refused: list[QueueError] = []

        async def put(payload: bytes) -> None:
            try:
                await queue.put([draft(), Draft(id=new_id(), payload=payload)])
            except QueueError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(put, b'"\0"' if number % 4 == 3 else b"1")
        assert len(refused) == 5
        assert not any(isinstance(each, QueueUnavailable) for each in refused)
        assert (await queue.counts()).waiting == 30


async def test_a_lock_of_an_application_is_not_waited_for_long(postgres):
    async with queue_at(postgres.url, "locked", unique=UniqueSpec()) as queue:
        await queue.declare(queue.settings)
        with application(postgres) as db:
            db.execute("SELECT supervisor.put('locked', '1')")
            with pytest.raises(QueueUnavailable, match="another transaction"):
                await queue.put([Draft(id=new_id(), payload=b"1", key="1")])
            await queue.put([Draft(id=new_id(), payload=b"2", key="2")])
        assert [receipt.what for receipt in await queue.put([Draft(id=new_id(), payload=b"1", key="1")])] == ["rejected"]


async def test_a_claim_that_the_server_forgot_in_a_crash_was_none(postgres_alone):
    """It was not waited for until it was on the disk. Whoever had it has lost the item to the next one."""
    sql(postgres_alone.url, "ALTER SYSTEM SET wal_writer_delay = '10s'", "SELECT pg_reload_conf()")
    async with queue_at(postgres_alone.url, lease=Seconds(1)) as queue:
        await queue.put([draft(keep=True)])
        (item,) = await claim(queue)
        postgres_alone.restart()
        (again,) = await again_some(queue)
        assert again.id == item.id and again.token > item.token
        assert again.attempt in (1, 2)  # 2: it was on the disk all the same
        assert await queue.finish(done([item])) == [False]
        assert await queue.finish(done([again])) == [True]


async def again_some(queue: Engine) -> list[Item]:
    with trio.fail_after(60):
        return await again(lambda: claim_some(queue))


async def test_a_line_of_one_group_does_not_slow_down_the_others(postgres):
    """What may not run is looked at once, and then set aside."""
    async with queue_at(postgres.url, "groups", group_by="customer") as queue:
        await queue.declare(queue.settings)
        await queue.put([draft(number, group="a") for number in range(3000)])
        (first,) = await claim(queue, 1)
        await queue.put([other := draft(group="b")])
        assert [item.id for item in await claim(queue)] == [other.id]
        with psycopg.connect(postgres.url) as db:
            db.execute("SET enable_seqscan = off")
            db.execute("SELECT * FROM supervisor.claim('groups', 10, 'tests', 5, '{}', '', '')")
            read = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'items'"
            ((rows,),) = db.execute(read).fetchall()
            assert rows < 100
            db.rollback()
        assert await queue.finish(done([first])) == [True]
        (second,) = await claim_some(queue)
        assert json.loads(second.payload) == {"number": 1}
        assert await queue.cancel(second.id) == "running" and await queue.finish(done([second])) == [True]
        waits = (await queue.peek(State.WAITING, 3))[0]
        assert await queue.cancel(waits.id) == "cancelled"
        assert json.loads((await claim_some(queue))[0].payload) == {"number": 3}
        assert await queue.purge(State.WAITING) == 2996


async def test_large_items_are_claimed_few_at_a_time(postgres):
    async with queue_at(postgres.url) as queue:
        payload = b'"%s"' % (b"x" * 3_000_000)
        await queue.put([Draft(id=new_id(), payload=payload) for _ in range(3)])
        items = await claim(queue)
        assert [len(item.payload) for item in items] == [len(payload)] * 2
        assert len(await claim(queue)) == 1


# ---- where it is ----


async def test_a_password_is_never_shown(postgres, caplog):
    secret = "hush%2Fhush"
    url = postgres.url.replace("postgres@", f"nobody:{secret}@")
    async with queue_at(url) as queue:
        with pytest.raises(QueueUnavailable, match="nobody") as caught:
            await queue.counts()
        assert "hush" not in f"{caught.value} {caught.value!r} {caught.value.__cause__!r} {queue!r}"
    with pytest.raises(QueueError, match="no URL of a PostgreSQL") as caught:
        async with queue_at("postgresql://me:hu%sh@host/db"):
            pass
    assert "hu%sh" not in f"{caught.value!r} {caught.value.__cause__!r}"
    async with queue_at(f"{postgres.url}?application_name=hush", "secret") as queue:
        await queue.declare(queue.settings)
        ((settings,),) = sql(postgres.url, "SELECT settings::text FROM supervisor.queues WHERE name = 'secret'")
        assert "hush" not in settings


async def test_where_a_server_is_may_be_said_in_many_ways(postgres, monkeypatch):
    monkeypatch.setenv("PGUSER", "postgres")
    monkeypatch.setenv("PGPORT", str(postgres.port))
    monkeypatch.setenv("PGDATABASE", "postgres")
    for url in (
        f"postgresql:///?host={postgres.directory}",
        "postgres://127.0.0.1",
        f"postgresql://127.0.0.1:{postgres.port}/",
    ):
        async with queue_at(url) as queue:
            await queue.put([draft()])


# ---- daemons that are killed ----

WORKER = """
import sys, trio
from pathlib import Path
from supervisor.queues import Place, postgres
from supervisor.queues.protocol import Ending, Settings
from supervisor.queues.spec import QueueSpec
from supervisor.spec import Seconds

async def main():
    settings = Settings(spec=QueueSpec(backend=sys.argv[1], lease=Seconds(1)))
    place = Place(directory=Path("/"), now=lambda: 0.0, listen=print, warn=print)
    async with postgres.open("killed", settings, place) as queue:
        while True:
            items = (await queue.claim(5, owner=sys.argv[2], attempts=1000)).items
            for item in items:
                sys.stdout.write(f"{item.id} {item.attempt}\\n")
                sys.stdout.flush()
                await queue.finish([Ending(id=item.id, token=item.token, how="done")])
            if not items:
                await queue.wait_for_work()

trio.run(main)
"""


@pytest.mark.parametrize(
    ("total", "kills"), [(100, 3), pytest.param(5000, 100, marks=[pytest.mark.long, pytest.mark.limit(600)])]
)
async def test_two_who_drain_a_queue_are_killed_in_turn(postgres, tmp_path, total, kills):
    """Each item ends. One that ran twice was in the hands of somebody who was killed."""
    log = tmp_path / "log"

    def start(number: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", WORKER.replace("\\\\", "\\"), postgres.url, f"worker {number}"]
        with log.open("ab") as output:
            return subprocess.Popen(words, stdout=output, env={**os.environ, "PYTHONPATH": str(ROOT)})

    async with queue_at(postgres.url, "killed", size=total, lease=Seconds(1)) as queue:
        those = [draft(number) for number in range(total)]
        for start_at in range(0, total, 500):
            await queue.put(those[start_at : start_at + 500])
        workers = [start(0), start(1)]
        try:
            for number in range(kills):
                begun = log.read_bytes().count(b"\n")
                await until(lambda: log.read_bytes().count(b"\n") > begun)  # noqa: B023
                workers[number % 2].send_signal(signal.SIGKILL)
                workers[number % 2].wait()
                workers[number % 2] = start(number + 2)
            while (counts := await queue.counts()).waiting + counts.running:
                await trio.sleep(0.1)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    lines = log.read_bytes().split(b"\n")
    runs = Counter(line.split()[0].decode() for line in lines if len(line.split()) == 2)
    assert set(runs) == {each.id for each in those}
    assert sum(runs.values()) - total <= kills  # one at a time is in hand
    assert (counts.dead, counts.done) == (0, 0)
