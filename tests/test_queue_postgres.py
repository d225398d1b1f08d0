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
from supervisor.queues.producer import drafted
from supervisor.queues.protocol import (
    Draft,
    Ending,
    Engine,
    Item,
    Notice,
    QueueError,
    QueueFull,
    QueueUnavailable,
    Settings,
    State,
    new_id,
)
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.spec import Rate, Seconds

psycopg = pytest.importorskip("psycopg")

ROOT = Path(__file__).parent.parent
names = count(1)


def queue_at(
    url: str, name: str = "", *, listen: Callable[[Notice], None] = lambda notice: None, group_by: str | None = None, **spec: Any
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


# ---- the tables ----


async def test_many_who_come_at_once_make_the_tables_once(postgres_alone):
    async def come() -> None:
        async with queue_at(postgres_alone.url, "q") as queue:
            await queue.put([draft()])

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(come)
    async with queue_at(postgres_alone.url, "q") as queue:
        assert len(await claim(queue)) == 8


async def test_who_may_not_make_the_tables_is_told_what_an_administrator_does(postgres_alone):
    from supervisor.queues.postgres import schema

    sql(postgres_alone.url, "CREATE USER clerk")
    url = postgres_alone.url.replace("postgres@", "clerk@")
    async with queue_at(url) as queue:
        with pytest.raises(QueueUnavailable, match=r"no tables for queues.*let an administrator run .*schema\(\)"):
            await queue.counts()
        with psycopg.connect(postgres_alone.url, autocommit=True) as db:
            db.execute(schema())
            db.execute("GRANT USAGE ON SCHEMA supervisor TO clerk")
        with pytest.raises(QueueUnavailable, match="permission denied"):
            await queue.counts()
        sql(
            postgres_alone.url,
            "GRANT ALL ON ALL TABLES IN SCHEMA supervisor TO clerk",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA supervisor TO clerk",
        )
        assert (await again(queue.counts)).waiting == 0


async def test_tables_of_a_newer_version_are_left_alone(postgres_alone):
    async with queue_at(postgres_alone.url) as queue:
        await queue.counts()
    sql(postgres_alone.url, "UPDATE supervisor.version SET number = 99")
    async with queue_at(postgres_alone.url) as queue:
        with pytest.raises(QueueUnavailable, match="newer version"):
            await queue.put([draft()])


async def test_tables_that_somebody_has_dropped_are_made_again(postgres_alone):
    async with queue_at(postgres_alone.url) as queue:
        await queue.put([draft()])
        sql(postgres_alone.url, "DROP SCHEMA supervisor CASCADE")
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
@hypothesis.settings(max_examples=150)
def test_the_key_of_an_item_is_the_same_for_an_application(postgres, value):
    settings = Settings(spec=QueueSpec(unique=UniqueSpec(by=("a",))), group_by="a")
    said = {"priority": None, "delay": 0.0, "at": None, "expire": None, "keep": False}
    (ours,) = drafted(settings, [{"a": value}], None, check=None, **said)
    with _keep_open(postgres) as db:
        select = """SELECT supervisor.shortened(supervisor.canonical(jsonb_build_array(%(v)s::jsonb))), supervisor.shortened(
            CASE WHEN jsonb_typeof(%(v)s::jsonb) = 'string' THEN %(v)s::jsonb #>> '{}' ELSE supervisor.canonical(%(v)s::jsonb) END)"""
        key, group = db.execute(select, {"v": json.dumps(value)}).fetchone()
    assert (key, group if value is not None else None) == (ours.key, ours.group)


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
