"""Queues in a SQLite file: real files, real kills at every system call, disks that fail. What all engines must do is tested by
test_queue_contract.py."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import trio
from hypothesis import strategies as st

from supervisor import store
from supervisor.queues import Place, sqlite_claim, sqlite_finish, sqlite_people, sqlite_put
from supervisor.queues.protocol import (
    BadItem,
    Claimed,
    Demand,
    Draft,
    Ending,
    Engine,
    QueueFull,
    QueueUnavailable,
    Settings,
    State,
    new_id,
)
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.queues.sql import WORKER_LOST
from supervisor.queues.sqlite import open as open_queue
from supervisor.queues.sqlite_rows import Rows
from supervisor.queues.sqlite_schema import SCHEMA
from supervisor.spec import Rate, Seconds
from supervisor.store import network_file_system
from supervisor.wall import WallClock

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("queue_worker.py")
now = WallClock().now
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path, warned):
    """Open a queue in the test's directory."""

    @asynccontextmanager
    async def opened(name: str = "q", *, now=now, group_by: str | None = None, **spec: Any) -> AsyncIterator[Engine]:
        place = Place(directory=tmp_path, now=now, listen=lambda notice: None, warn=warned.append)
        async with open_queue(name, Settings(spec=QueueSpec(**spec), group_by=group_by), place) as queue:
            yield queue

    return opened


def drafts(count: int, **said: Any) -> list[Draft]:
    return [Draft(**{"id": new_id(), "payload": b"{}"} | said) for _ in range(count)]


async def claim(queue: Engine, limit: int = 100, attempts: int = 100):
    return (await queue.claim(limit, owner="tests", attempts=attempts)).items


async def end(queue: Engine, items, how: str = "done", **said: Any) -> list[bool]:
    return await queue.finish([Ending(id=item.id, token=item.token, how=how, **said) for item in items])


def look(path: Path, query: str) -> list[tuple]:
    """What is in a file that nobody has open."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


# ---- the file ----


async def test_the_queues_of_a_directory_share_a_file_that_its_owner_alone_can_read(opened, tmp_path):
    async with opened("one") as one:
        async with opened("two", size=2) as two:
            await one.put(first := drafts(3))
            await two.put(second := drafts(2))
            assert {item.id for item in await claim(two)} == {draft.id for draft in second}
        assert {item.id for item in await claim(one)} == {draft.id for draft in first}
        assert os.stat(tmp_path / "queues.db").st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["queues.db"]
    assert look(tmp_path / "queues.db", "SELECT queue, state, count(*) FROM items GROUP BY 1, 2") == [
        ("one", "running", 3), ("two", "running", 2)
    ]  # fmt: skip


async def test_nothing_is_opened_before_it_is_used(opened, tmp_path):
    async with opened():
        await trio.testing.wait_all_tasks_blocked()
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_another_process_has_is_an_error_that_says_so(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.store.BUSY", 0.1)
    monkeypatch.setattr("supervisor.queues.sqlite.PAUSE", 0.1)
    program = "import sys; from queue_worker import *; sys.argv = ['', sys.argv[1]]; trio.run(main, Path(sys.argv[1]))"
    hold = f"import queue_worker as worker; worker.say = lambda *words: (print(*words, flush=True), input()); {program}"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], env=ENVIRONMENT, cwd=WORKER.parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with other:
        assert await trio.to_thread.run_sync(other.stdout.readline) == "put 0-a 0-b\n"
        async with opened() as queue:
            with pytest.raises(QueueUnavailable, match="another process keeps it locked"):
                await queue.put(drafts(1))
            with trio.move_on_after(0.5):
                await queue.wait_for_room()
                raise AssertionError("there is none")
            other.kill()
            await trio.to_thread.run_sync(other.wait)
            await queue.wait_for_room()  # until the file can be had
            assert [receipt.what for receipt in await queue.put(drafts(1))] == ["stored"]
            assert (await queue.counts()).waiting == 3


async def test_a_damaged_file_is_put_aside_and_said(opened, tmp_path, warned):
    (tmp_path / "queues.db").write_bytes(b"this is no database" * 1000)
    async with opened() as queue:
        await queue.put(drafts(1))
        assert len(await claim(queue)) == 1
    (aside,) = tmp_path.glob("queues.db.damaged-*")
    assert aside.read_bytes().startswith(b"this is no database")
    assert len(warned) == 1 and aside.name in warned[0]


@pytest.mark.parametrize("chance", range(3))
async def test_bytes_that_change_while_it_is_open_cost_no_more_than_the_file(opened, tmp_path, warned, chance):
    """Whatever is scribbled where: each operation works or says why not, and in the end there is a queue that works."""
    place = random.Random(chance)
    async with opened(size=100_000) as queue:
        await queue.put(drafts(5_000, payload=b'"%s"' % (b"x" * 300)))
        assert len(await claim(queue, 10)) == 10
    size = (tmp_path / "queues.db").stat().st_size
    scribble = "; ".join(f"file.seek({place.randrange(size)}); file.write({place.randbytes(3000)!r})" for _ in range(20))
    async with opened(size=100_000) as queue:
        assert (await queue.counts()).waiting == 5_000
        program = f"file = open({str(tmp_path / 'queues.db')!r}, 'r+b'); {scribble}; file.close()"
        subprocess.run([sys.executable, "-"], input=program.encode(), check=True)  # here it would drop our locks
        for _ in range(20):
            try:
                items = await claim(queue, 1000)
                await end(queue, items)
                await queue.put(drafts(10))
            except QueueUnavailable as error:
                assert "damaged" in str(error)
    async with opened() as queue:
        await queue.put(mine := drafts(1))
        assert (await queue.show(mine[0].id)).state is State.WAITING
    assert look(tmp_path / "queues.db", "PRAGMA integrity_check") == [("ok",)]
    assert len(warned) == len({*tmp_path.glob("*.damaged-*Z")})


def test_a_file_system_of_another_machine_is_recognized(tmp_path):
    device = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1 - nfs4 host:/export rw\n"
    mounts.write_text("22 1 0:999 / /proc rw - proc proc rw\n" + line)
    assert network_file_system(tmp_path / "not" / "there" / "yet", mounts) == "nfs4"
    mounts.write_text(line.replace("nfs4", "ext4"))
    assert network_file_system(tmp_path, mounts) is None
    assert network_file_system(tmp_path, tmp_path / "none") is None
    assert network_file_system(tmp_path) is None


async def test_a_queue_on_a_network_file_system_is_refused(opened, monkeypatch, tmp_path):
    monkeypatch.setattr("supervisor.store.network_file_system", lambda directory: "nfs4")
    async with opened() as queue:
        with pytest.raises(
            QueueUnavailable, match=r"queues\.db would be on nfs4.*name a `state_dir` on a disk of this machine"
        ):
            await queue.put(drafts(1))
    assert list(tmp_path.iterdir()) == []


# ---- what a crash leaves ----


async def test_an_item_that_kills_its_daemon_each_time_is_dead_in_the_end(opened):
    async with opened() as queue:
        await queue.put(poison := drafts(1))
    for attempt in (1, 2):
        async with opened() as queue:
            (item,) = await claim(queue, attempts=2)
            assert item.attempt == attempt
    async with opened() as queue:
        claimed = await queue.claim(1, owner="tests", attempts=2)
        assert [(dead.id, dead.attempts, dead.error) for dead in claimed.dead] == [(poison[0].id, 2, WORKER_LOST)]
        assert await queue.requeue() == 1
        assert [item.attempt for item in await claim(queue, attempts=2)] == [1]


async def test_what_was_to_be_cancelled_when_its_daemon_died_is_cancelled(opened):
    async with opened(unique=UniqueSpec()) as queue:
        await queue.put(drafts(1, key="k", keep=True))
        (item,) = await claim(queue)
        assert await queue.cancel(item.id) == "running"
    async with opened(unique=UniqueSpec()) as queue:
        assert await claim(queue) == []
        record = await queue.show(item.id)
        assert (record.state, record.cancelling) == (State.CANCELLED, False)
        assert [receipt.what for receipt in await queue.put(drafts(1, key="k"))] == ["stored"]


async def test_what_a_crash_interrupted_has_its_key_and_its_time_to_expire_again(opened):
    moment = 1000.0
    async with opened(unique=UniqueSpec(lifetime="queued"), now=lambda: moment) as queue:
        await queue.put(drafts(1, key="k", expire=10.0))
        assert len(await claim(queue)) == 1
        moment = 1100.0
    async with opened(unique=UniqueSpec(lifetime="queued"), now=lambda: moment) as queue:
        assert [receipt.what for receipt in await queue.put(drafts(1, key="k"))] == ["rejected"]
        moment = 1109.0
        assert [item.attempt for item in await claim(queue)] == [2]


# ---- what a put claims ----


def demand(limit: int, order: Sequence[int] = (), attempts: int = 5) -> Demand:
    return Demand(limit=limit, owner="tests", attempts=attempts, order=order)


async def test_who_waits_is_brought_what_is_put_in_one_commit(opened, monkeypatch):
    async with opened() as queue:
        assert await claim(queue) == []
        commits = count_transactions(monkeypatch)
        brought: list[Claimed | None] = []
        asked: list[str] = []

        async def wait(name: str, wants: Demand | None) -> None:
            def ask() -> Demand | None:
                asked.append(name)
                return wants

            brought.append(await queue.wait_for_work(ask))

        async with trio.open_nursery() as nursery:
            for name, wants in (("none", None), ("two", demand(2)), ("late", demand(2))):
                nursery.start_soon(wait, name, wants)
                await trio.testing.wait_all_tasks_blocked()
            await queue.put(those := drafts(3))
        assert asked == ["none", "two"]
        (claimed,) = [each for each in brought if each is not None]
        assert [item.id for item in claimed.items] == [draft.id for draft in those[:2]]
        assert len(brought) == 3 and commits == [1]
        assert (await queue.counts()).running == 2


def count_transactions(monkeypatch) -> list[int]:
    """How many operations there are in each from now on."""
    counted: list[int] = []
    write = store._Writer._write

    def counting(writer, db, batch) -> None:
        counted.append(len(batch))
        write(writer, db, batch)

    monkeypatch.setattr(store._Writer, "_write", counting)
    return counted


@pytest.mark.parametrize("moments", range(5))
async def test_who_gives_up_waiting_has_what_a_put_is_claiming_for_it(opened, moments):
    async with opened() as queue:
        assert await claim(queue) == []
        scope, brought = trio.CancelScope(), []

        async def wait() -> None:
            with scope:
                brought.append(await queue.wait_for_work(lambda: demand(5)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(queue.put, drafts(1))
            for _ in range(moments):
                await trio.lowlevel.checkpoint()
            scope.cancel()
        items = [item for claimed in brought if claimed for item in claimed.items]
        counts = await queue.counts()
        assert (counts.running, counts.waiting) == (len(items), 1 - len(items))
        assert items or moments < 2  # by then the put is under way


async def test_who_waits_is_woken_when_the_put_that_would_claim_for_it_fails(opened):
    async with opened(size=1) as queue:
        assert await claim(queue) == []
        brought: list[Claimed | None] = []

        async def wait() -> None:
            brought.append(await queue.wait_for_work(lambda: demand(5)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(QueueFull):
                await queue.put(drafts(2))
        assert brought == [None]


# ---- large things ----


async def test_fifty_megabytes_go_in_and_out(opened, tmp_path):
    large = b'"%s"' % (b'\\"\xc3\xa4' * (50 << 18))
    assert len(large) > 50 << 20
    result = large[: 1 + (4 << 20)]
    async with opened() as queue:
        await queue.put([Draft(id="large", payload=large, keep=True)])
        (item,) = await claim(queue)
        assert item.payload == large
        assert await end(queue, [item], result=result) == [True]
        record = await queue.show("large")
        assert (record.payload, record.result) == (large, result)
        assert await queue.purge(State.DONE) == 1
    assert look(tmp_path / "queues.db", "SELECT count(*) FROM large") == [(0,)]


async def test_a_claim_takes_no_more_than_memory_can_hold(opened, monkeypatch):
    monkeypatch.setattr(sqlite_claim, "AT_ONCE", 1000)
    async with opened() as queue:
        await queue.put([*drafts(3, payload=b'"%s"' % (b"x" * 398)), *drafts(1, payload=b'"%s"' % (b"x" * 5000)), *drafts(1)])
        assert [len(await claim(queue)) for _ in range(4)] == [3, 1, 1, 0]


async def test_what_cannot_be_stored_is_refused_or_failed_and_harms_no_other(opened, monkeypatch):
    monkeypatch.setattr("supervisor.queues.sqlite.LARGEST", 10)
    async with opened() as queue:
        with pytest.raises(BadItem, match="has 12 bytes, and 10 is the most"):
            await queue.put([*drafts(1), *drafts(1, payload=b'"0123456789"')])
        with pytest.raises(BadItem, match="not UTF-8"):
            await queue.put([*drafts(1), *drafts(1, payload=b'"\xff"')])
        with pytest.raises(BadItem, match="not UTF-8"):
            await queue.put(drafts(1, group="\ud800"))
        for said in ({"payload": b'"\0"'}, {"key": "a\0b"}, {"id": "\0"}):
            with pytest.raises(BadItem, match="has a NUL character"):
                await queue.put(drafts(1, **said))
        assert (await queue.counts()).waiting == 0
        await queue.put(drafts(4))
        many, odd, name, fine = await claim(queue)
        strange = Ending(id=name.id, token=name.token, how="dead", error="no file \udcff", traceback="\0\ud800 ä")
        hows = [(many, b'"0123456789"'), (odd, b'"\xff"'), (fine, b'"ok"')]
        endings = [Ending(id=item.id, token=item.token, how="done", result=result) for item, result in hows]
        assert await queue.finish([*endings, strange]) == [True] * 4
        found = [await queue.show(item.id) for item in (many, odd, name, fine)]
        assert [record.state for record in found] == [State.DEAD, State.DEAD, State.DEAD, State.DONE]
        assert [record.error for record in found] == [
            "its result has 12 bytes, and 10 is the most", "its result is not UTF-8", "no file \\udcff", None
        ]  # fmt: skip
        assert found[2].traceback == "\\0\\ud800 ä"


# ---- time ----


async def test_each_moment_comes_when_it_is_due_and_not_before(opened, autojump_clock):
    def now() -> float:
        return 1_800_000_000.0 + trio.current_time()

    async def wake() -> float:
        await queue.wait_for_work()
        return trio.current_time()

    async with opened(now=now, rate=Rate(0.5), keep_results=Seconds(100)) as queue:
        await queue.put([*drafts(1, delay=3.0), *drafts(1, delay=6.5, priority=2), *drafts(1, delay=1.0, expire=1.5)])
        assert await claim(queue) == [] and await wake() == 1.0
        assert len(await claim(queue)) == 1 and await wake() == 3.0  # and there is one token each two seconds
        (item,) = await claim(queue)
        assert await end(queue, [item], "retry", delay=1.0) == [True]
        assert await wake() == 5.0 and len(await claim(queue)) == 1
        await queue.pause(True)
        await queue.put(drafts(1, delay=2.0, expire=1.5))
        assert await wake() == 8.5  # it expires although nothing can be claimed
        assert (await queue.claim(1, owner="tests", attempts=1)).expired == 1
        assert await queue.show(item.id) is not None


async def test_what_is_not_known_any_more_leaves_the_file_when_the_queue_is_used(opened, tmp_path):
    moment = 1000.0
    async with opened(keep_results=Seconds(10), now=lambda: moment) as queue:
        await queue.put(those := drafts(3, keep=True))
        await end(queue, await claim(queue))
        moment = 1010.5
        assert (await queue.counts()).done == 0 and await queue.show(those[0].id) is None
        assert [receipt.what for receipt in await queue.put(those[:1])] == ["stored"]
    assert look(tmp_path / "queues.db", "SELECT id, state FROM items") == [(those[0].id, "waiting")]


async def test_a_clock_that_is_set_back_does_not_hold_up_a_rate(opened):
    moment = 1000.0
    async with opened(rate=Rate(0.5), now=lambda: moment) as queue:
        await queue.put(drafts(3))
        moment = 5000.0
        assert len(await claim(queue)) == 1
        moment = 1000.0
        assert len(await claim(queue)) == 1
        moment = 1001.9
        assert len(await claim(queue)) == 0
        moment = 1002.0
        assert len(await claim(queue)) == 1


# ---- much of it ----


class Told(sqlite3.Connection):
    """A connection that keeps what it was asked."""

    statements: set[str]

    def execute(self, statement, *parameters):
        self.statements.add(statement)
        return super().execute(statement, *parameters)


def filled(path: Path, rows: int) -> Told:
    """A file with so many items of each state, of three priorities, some of groups."""
    db = sqlite3.connect(path, isolation_level=None, factory=Told)
    db.statements = set()
    db.executescript(";".join(SCHEMA))
    db.executescript(f"""
        BEGIN;
        WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {rows})
        INSERT INTO items
            (queue, id, payload, state, priority, put_at, ready_at, expires_at, ended_at, forget_at, in_group, key)
        SELECT 'q', state || n, '{{}}', state, n % 3, n, n, iif(n % 100, NULL, 1e9), iif(state = 'waiting', NULL, n),
            iif(state IN ('waiting', 'dead'), NULL, 1e9), iif(n % 10, NULL, 'g' || n % 1000), iif(n % 7, NULL, state || n)
        FROM n, (SELECT column1 AS state FROM (VALUES ('waiting'), ('done'), ('dead'), ('cancelled')));
        COMMIT;
    """)
    return db


FOR_PEOPLE = ("count(*)", "max(ready_at, :now)", "ORDER BY started_at")
"""What may go through all that wait, or run, in an index: counts, and a look at them, sorted."""

STEPS_OF_PLANS = re.compile(
    r"SEARCH items USING (INTEGER PRIMARY KEY|(COVERING )?INDEX items_(id \(queue=\? AND id=\?\)|waiting|running|expiring"
    r"|parked \(queue=\? AND in_group=\?|(ended|over) \(queue=\? AND ))|SEARCH (large|keys|queues) USING"
    r"|SCAN (json_each|each|levels|found|ending|CONSTANT)|SEARCH first USING INTEGER PRIMARY KEY"
    r"|SETUP|RECURSIVE STEP|CO-ROUTINE|((CORRELATED )?(SCALAR|LIST) SUBQUERY)|MATERIALIZE"
)
"""What a plan may consist of: nothing goes through all items, or sorts them."""


def use_all(rows: Rows) -> None:
    """Each operation there is."""
    sqlite_people.begin(rows)
    sqlite_people.declare(rows)
    sqlite_people.declared(rows)
    sqlite_put.put(rows, [*drafts(2), *drafts(2, key="k", group="g", delay=1.0, expire=5.0, keep=True)])
    claimed = sqlite_claim.claim(rows, demand(30, [2]))
    sqlite_claim.claim(rows, demand(1, attempts=0))
    sqlite_claim.due(rows)
    sqlite_put.room_at(rows)
    sqlite_finish.progress(rows, claimed.items[0], 1, 2)
    hows = ("done", "retry", "dead", "back")
    sqlite_finish.finish(
        rows, [Ending(id=item.id, token=item.token, how=hows[n % 4]) for n, item in enumerate(claimed.items[:20])]
    )
    sqlite_people.cancel(rows, claimed.items[21].id)
    sqlite_people.cancel(rows, "waiting30000")
    sqlite_people.counts(rows)
    sqlite_people.show(rows, "dead5")
    sqlite_people.requeue(rows, ["dead5"])
    sqlite_people.requeue_some(rows, 1e9)
    sqlite_people.pause(rows, False)
    for state in State:
        sqlite_people.peek(rows, state, 10)
    for state in (State.DEAD, State.WAITING, State.DONE):
        sqlite_people.purge_some(rows, state, 1e9)


def test_no_statement_goes_through_all_items(tmp_path):
    with closing(filled(tmp_path / "queues.db", 100)) as db:
        spec = QueueSpec(size=10**9, rate=Rate(1000), concurrency=1000, unique=UniqueSpec(lifetime="queued"))
        use_all(Rows(db, "q", Settings(spec=spec), 1e6))
        statements, plans = sorted(db.statements), {}
        for statement in statements:
            named = dict.fromkeys(re.findall(r":(\w+)", statement))
            plans[statement] = [plan for *_, plan in db.execute(f"EXPLAIN QUERY PLAN {statement}", named)]
    assert len(statements) > 30
    slow = {
        statement: step
        for statement, plan in plans.items()
        for step in plan
        if not (STEPS_OF_PLANS.match(step) or any(word in statement for word in FOR_PEOPLE))
        if statement not in sqlite_people._PEEK.values() or step != "USE TEMP B-TREE FOR ORDER BY" or plan.count(step) > 1
    }
    assert slow == {}


@pytest.mark.parametrize("per_key", [1, 2])
def test_claims_do_not_go_past_what_waits_for_its_group(tmp_path, per_key):
    few, many = (steps_of_claims(tmp_path / f"{count}.db", count, per_key) for count in (20, 20_000))
    assert all(after < 2 * before + 500 for before, after in zip(few, many, strict=True)), (few, many)


def steps_of_claims(path: Path, waiting: int, per_key: int) -> list[int]:
    """The steps of operations on a queue where so many items wait for another of their group, before others."""
    with closing(filled(path, 1)) as db:
        rows = Rows(db, "other", Settings(spec=QueueSpec(size=10**9, per_key=per_key), group_by="g"), 1e6)

        def groups(limit: int) -> list[str | None]:
            return [item.group for item in sqlite_claim.claim(rows, demand(limit)).items]

        sqlite_put.put(rows, [*drafts(waiting, group="a"), *drafts(10), *drafts(1, group="b")])
        items = sqlite_claim.claim(rows, demand(per_key)).items
        assert [item.group for item in items] == ["a"] * per_key
        ending = Ending(id=items[0].id, token=1, how="done")
        met = 0
        while not groups(1):  # the first ones meet them, so many at a time
            assert sqlite_claim.due(rows) is not None
            met += 1
        assert met == waiting * 2 // 25_000
        return [
            count_steps(db, lambda: groups(1) == [None]),
            count_steps(db, lambda: sqlite_finish.finish(rows, [ending]).answers == [True]),
            count_steps(db, lambda: groups(1) == ["a"]),
            count_steps(db, lambda: groups(20) == [None] * 8 + ["b"]),
            count_steps(db, lambda: sqlite_claim.due(rows) is None),
        ]


def count_steps(db: sqlite3.Connection, operation: Callable[[], bool]) -> int:
    """How many steps SQLite takes for what is true."""
    steps = itertools.count(1)
    db.set_progress_handler(lambda: next(steps) and 0, 1)
    assert operation()
    db.set_progress_handler(None, 1)
    return next(steps)


async def test_more_of_a_group_may_run_once_the_settings_say_so(opened):
    async with opened(group_by="g", per_key=1) as queue:
        await queue.put(drafts(3, group="a"))
        assert len(await claim(queue)) == 1
        assert await claim(queue) == []
        queue.use(Settings(spec=QueueSpec(per_key=2), group_by="g"))
        assert len(await claim(queue)) == 1


@pytest.mark.long
@pytest.mark.limit(600)
def test_a_million_of_each_state_make_nothing_slow(tmp_path):
    with closing(filled(tmp_path / "queues.db", 1_000_000)) as db:
        rows = Rows(db, "q", Settings(spec=QueueSpec(size=10**9)), 2e6)
        took: Counter[str] = Counter()

        def timed(name: str, operation, *arguments) -> Any:
            began = time.thread_time()
            result = operation(*arguments)
            took[name] = time.thread_time() - began
            return result

        timed("put", sqlite_put.put, rows, drafts(250))
        claimed = timed("claim", sqlite_claim.claim, rows, demand(250))
        timed(
            "finish", sqlite_finish.finish, rows, [Ending(id=item.id, token=item.token, how="done") for item in claimed.items]
        )
        timed("due", sqlite_claim.due, rows)
        timed("show", sqlite_people.show, rows, "dead5")
        timed("purge", sqlite_people.purge_some, rows, State.DEAD, 1e9)
        timed("peek dead", sqlite_people.peek, rows, State.DEAD, 100)
        timed("counts", sqlite_people.counts, rows)
        timed("peek", sqlite_people.peek, rows, State.WAITING, 100)
    print(dict(took))
    assert all(seconds < 0.1 for name, seconds in took.items() if name not in ("counts", "peek"))
    assert took["counts"] < 5 and took["peek"] < 5


numbers = st.integers(0, 7)
STEPS = ("put", "claim", "finish", "put", "claim", "finish", "cancel", "requeue", "purge", "reopen")


@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(history=st.lists(st.tuples(st.sampled_from(STEPS), numbers), min_size=10, max_size=40))
async def test_the_count_that_is_kept_is_how_many_wait(opened, tmp_path, history):
    """And each key that is taken belongs to an item that is there."""
    (tmp_path / "queues.db").unlink(missing_ok=True)
    items: list[Any] = []
    unique = UniqueSpec(lifetime="queued", on_conflict="replace")
    for part in parts(history):
        async with opened(size=10, unique=unique, group_by="g") as queue:
            for step, number in part:
                items = await take(queue, step, number, items)
    if not (tmp_path / "queues.db").exists():
        return
    kept = look(tmp_path / "queues.db", "SELECT waiting FROM queues") or [(0,)]
    assert kept == look(tmp_path / "queues.db", "SELECT count(*) FROM items WHERE state = 'waiting'")
    taken = look(tmp_path / "queues.db", "SELECT id FROM keys")
    assert set(taken) <= set(look(tmp_path / "queues.db", "SELECT id FROM items WHERE state = 'waiting'"))


def parts(history: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """What is done between one opening and the next."""
    found: list[list[tuple[str, int]]] = [[]]
    for step in history:
        if step[0] == "reopen":
            found.append([])
        else:
            found[-1].append(step)
    return found


async def take(queue: Engine, step: str, number: int, items: list[Any]) -> list[Any]:
    """One step; gives what is claimed after it."""
    if step == "put":
        try:
            await queue.put(
                [Draft(id=new_id(), payload=b"1", key=f"k{n % 3}" if n % 2 else None, group="a") for n in range(number)]
            )
        except QueueFull:
            pass
    elif step == "claim":
        return [*items, *await claim(queue, number, attempts=2)]
    elif step == "finish" and items:
        how = ("done", "retry", "back", "dead")[number % 4]
        await end(queue, items[:1], how)
        return items[1:]
    elif step == "cancel":
        for record in await queue.peek(State.WAITING, 1):
            await queue.cancel(record.id)
    elif step == "requeue":
        await queue.requeue()
    elif step == "purge":
        await queue.purge((State.WAITING, State.DEAD)[number % 2])
    return items


# ---- faults of the machine ----


CALLS = "pwrite64,fdatasync,fsync,ftruncate,unlink,openat,fcntl,pread64,close"


def work(directory: Path, *inject: str) -> tuple[int, list[list[str]]]:
    """Run the worker, with a fault at one of the system calls on its files; what it said."""
    directory.mkdir(exist_ok=True)
    files = [argument for name in ("queues.db", "queues.db-wal") for argument in ("-P", str(directory / name))]
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", *files, *inject] if inject else []
    done = subprocess.run(
        [*strace, sys.executable, str(WORKER), str(directory)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=60
    )  # fmt: skip
    return done.returncode, [line.split() for line in done.stdout.splitlines()]


async def holds_what_was_said(opened, path: Path, said: list[list[str]]) -> None:
    """All that was acknowledged is so: what was put is there once or done, what is done is final, attempts are counted."""
    put = {id for what, *ids in said if what == "put" for id in ids}
    done = {ids[0] for what, *ids in said if what == "done"}
    claims = Counter(ids[0] for what, *ids in said if what == "claimed")
    finished = {ids[0] for what, *ids in said if what == "claimed"} - done
    """What may have been finished without that being heard."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    async with opened() as queue:
        counts = await queue.counts()
        assert (counts.running, counts.dead, counts.done) == (0, 0, 0)
        records = {record.id: record for record in await queue.peek(State.WAITING, 100)}
        assert len(records) == counts.waiting
        assert not done & records.keys()
        assert put - records.keys() - finished <= done
        assert all(record.attempts >= claims[id] for id, record in records.items())
        for number in {id[0] for id in records} - {id[0] for id in put}:
            assert {f"{number}-a", f"{number}-b"} <= records.keys()  # a put of which nothing was said is whole, or is not
        while items := await claim(queue):
            await end(queue, items)
        assert (await queue.counts()).waiting == 0


def points(total: int, few: int) -> list[int]:
    """Some of so many points, or all."""
    return sorted(random.Random(total).sample(range(1, total), few))


A_FEW = pytest.param(4, id="a few")
ALL = pytest.param(None, id="all", marks=[pytest.mark.long, pytest.mark.limit(3600)])


@needs_strace
@pytest.mark.parametrize("count", [A_FEW, ALL])
async def test_killed_at_any_system_call_it_has_stored_all_that_it_said(opened, tmp_path, warned, count):
    for point in points(120, count) if count else range(1, 1000):
        code, said = await trio.to_thread.run_sync(work, tmp_path, "-e", f"inject={CALLS}:signal=KILL:when={point}")
        if (tmp_path / "queues.db").exists():
            await holds_what_was_said(opened, tmp_path / "queues.db", said)
            (tmp_path / "queues.db").unlink()
        if code == 0:
            assert count is None and said[-1] == ["end"] and point > 120
            break
        assert code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert warned == []


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("count", [pytest.param(2, id="a few"), ALL])
async def test_a_disk_that_fails_once_is_said_and_got_over(opened, tmp_path, warned, count, error):
    """Whatever is said done is done, and the worker, which tries again, gets to its end."""
    unheard = 0
    for point in points(150, count) if count else range(1, 1000):
        inject = f"inject=pwrite64,fdatasync,ftruncate:error={error}:when={point}"
        code, said = await trio.to_thread.run_sync(work, tmp_path, "-e", inject)
        assert code == 0 and said[-1] == ["end"], said
        assert {id for what, *ids in said if what == "done" for id in ids} == {
            f"{n}-{letter}" for n in range(3) for letter in "ab"
        }
        await holds_what_was_said(opened, tmp_path / "queues.db", said)
        (tmp_path / "queues.db").unlink()
        unheard = 0 if any(what == "refused" for what, *_ in said) else unheard + 1
        if count is None and unheard > 20:  # the last calls are those of closing it, of which nobody is told
            assert point > 150
            break
    assert warned == []


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("count", [pytest.param(1, id="a few"), ALL])
async def test_a_disk_that_fails_from_some_moment_on_has_what_was_said_before(opened, tmp_path, warned, count, error):
    for point in points(150, count) if count else range(1, 1000):
        inject = f"inject=pwrite64,fdatasync,ftruncate:error={error}:when={point}+"
        code, said = await trio.to_thread.run_sync(work, tmp_path, "-e", inject)
        assert code == 0
        await holds_what_was_said(opened, tmp_path / "queues.db", said)
        for path in tmp_path.iterdir():
            path.unlink()
        if said[-1] == ["end"]:
            assert count is None
            break
        assert said[-1][0] == "refused"
    assert warned == []


@as_root
def test_a_full_disk_is_said_and_got_over():
    script = Path(__file__).with_name("small_disk.py")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(script), "queue"], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    said = json.loads(done.stdout or done.stderr)
    assert "the disk is full: free some space" in said["full"]
    assert said["there"] == said["stored"] > 0
    assert said["drained"] == said["stored"] + said["more"] and said["more"] > 0
    assert said["warned"] == []
