"""The store: many operations in one commit, nobody told before it, nothing half done; real SQLite, real kills."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.last_runs import SCHEMA as LAST_RUNS
from supervisor.last_runs import LastRuns
from supervisor.store import POSTED, StoreError, open_store

ROOT = Path(__file__).parent.parent
SCHEMA = ("CREATE TABLE things (name TEXT PRIMARY KEY, value INTEGER)",)


@pytest.fixture
def told() -> list[StoreError]:
    return []


@pytest.fixture
def opened(tmp_path, told):
    return partial(open_store, tmp_path / "things.db", SCHEMA, on_failure=told.append)


def put(name, value=0):
    def fn(db):
        db.execute("INSERT INTO things VALUES (?, ?)", (name, value))
        return value

    return fn


def names(db):
    return {name for (name,) in db.execute("SELECT name FROM things")}


class Gate:
    """An operation in which the writer waits, so that a test can say what has come by the time that it goes on."""

    def __init__(self):
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, db):
        self.entered.set()
        assert self.go_on.wait(30)

    async def is_entered(self):
        await trio.to_thread.run_sync(self.entered.wait, 30)


async def test_what_is_written_is_there_for_the_next_who_opens_it(opened):
    async with opened() as store:
        assert await store.write(put("a", 7)) == 7
    async with opened() as store:
        assert await store.read(names) == {"a"}


async def test_nothing_happens_before_the_first_operation(opened, tmp_path):
    async with opened():
        await wait_all_tasks_blocked()
    assert list(tmp_path.iterdir()) == []
    code = "import supervisor.store, supervisor.tree, sys; assert 'sqlite3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def commits(path: Path) -> int:
    """Transactions in the write-ahead log: the last frame of each says how large the file is after it."""
    log = Path(f"{path}-wal").read_bytes()
    page = int.from_bytes(log[8:12], "big")
    return sum(any(log[at + 4 : at + 8]) for at in range(32, len(log), 24 + page))


async def test_what_comes_during_a_commit_is_committed_together(opened):
    gate = Gate()
    async with opened() as store:
        await store.write(put("first"))
        before = commits(store.path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, gate)
            await gate.is_entered()
            for number in range(500):
                nursery.start_soon(store.write, put(f"n{number}"))
            await wait_all_tasks_blocked()
            gate.go_on.set()
        assert len(await store.read(names)) == 501
        assert commits(store.path) == before + 1


async def test_a_failing_operation_undoes_itself_and_no_other(opened):
    gate, outcomes = Gate(), {}

    def half(db):
        put("half")(db)
        raise ValueError("no more")

    async def ask(store, name, fn):
        try:
            outcomes[name] = await store.write(fn)
        except (ValueError, sqlite3.IntegrityError) as error:
            outcomes[name] = type(error)

    async with opened() as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, gate)
            await gate.is_entered()
            for name, fn in (("a", put("a", 1)), ("half", half), ("again", put("a")), ("b", put("b", 2))):
                nursery.start_soon(ask, store, name, fn)
                await wait_all_tasks_blocked()
            gate.go_on.set()
        assert outcomes == {"a": 1, "half": ValueError, "again": sqlite3.IntegrityError, "b": 2}
        assert await store.read(names) == {"a", "b"}


async def test_what_is_cancelled_before_it_began_is_never_done(opened):
    gate = Gate()
    async with opened() as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, gate)
            await gate.is_entered()
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_blocked, scope)
                await store.write(put("never"))
            assert scope.cancelled_caught
            gate.go_on.set()
        assert await store.read(names) == set()


async def cancel_when_blocked(scope):
    await wait_all_tasks_blocked()
    scope.cancel(reason="the test says so")


async def test_what_has_begun_is_finished_and_its_result_is_not_lost(opened):
    gate = Gate()

    def slow(db):
        gate(db)
        return put("done", 3)(db)

    async with opened() as store:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def interfere():
                    await gate.is_entered()
                    scope.cancel(reason="the test says so")
                    gate.go_on.set()

                nursery.start_soon(interfere)
                result = await store.write(slow)
        assert result == 3
        assert await store.read(names) == {"done"}


async def test_a_reader_finds_only_what_is_committed_and_may_not_write(opened):
    async with opened() as store:
        await store.write(put("a"))
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await store.read(put("b"))
        assert await store.write(put("c", 4)) == 4
        assert await store.read(names) == {"a", "c"}


async def test_what_is_posted_is_stored_and_its_failure_told(opened, told):
    async with opened() as store:
        assert store.post(put("a"))
        assert store.post(put("a"))
        assert await store.read(names) == {"a"}
    assert [type(error.__cause__) for error in told] == [sqlite3.IntegrityError]


async def test_posts_are_bounded_and_what_waits_at_the_end_is_stored(opened, told):
    gate = Gate()
    async with opened() as store, trio.open_nursery() as nursery:
        nursery.start_soon(store.read, gate)
        await gate.is_entered()
        assert [store.post(put(f"n{number}")) for number in range(POSTED + 1)] == [True] * POSTED + [False]
        gate.go_on.set()
    assert told == []
    assert len(names(sqlite3.connect(store.path))) == POSTED
    with pytest.raises(trio.ClosedResourceError):
        store.post(put("late"))
    with pytest.raises(trio.ClosedResourceError):
        await store.write(put("late"))


async def test_the_schema_goes_from_version_to_version_and_never_back(opened, tmp_path, told):
    async with opened() as store:
        await store.write(put("old", 1))
    newer = (*SCHEMA, "ALTER TABLE things ADD COLUMN colour TEXT DEFAULT 'red'")
    async with open_store(store.path, newer, on_failure=told.append) as store:
        assert await store.read(lambda db: db.execute("SELECT * FROM things").fetchall()) == [("old", 1, "red")]
    async with opened() as store:
        with pytest.raises(StoreError, match="newer version"):
            await store.read(names)
    assert told == []


async def test_a_damaged_file_is_put_aside_told_and_begun_anew(opened, tmp_path, told):
    (tmp_path / "things.db").write_bytes(b"this is no database" * 1000)
    async with opened() as store:
        await store.write(put("a"))
    aside = [path for path in tmp_path.iterdir() if ".damaged-" in path.name]
    assert [path.read_bytes()[:7] for path in aside] == [b"this is"]
    assert len(told) == 1 and aside[0].name in str(told[0])


async def test_damage_that_shows_itself_later_is_put_aside_by_the_next_operation(opened, tmp_path, told):
    async with opened() as store:
        await store.write(lambda db: [put(f"{'x' * 500}{number}")(db) for number in range(500)] and None)
    path = tmp_path / "things.db"
    async with opened() as store:
        assert await store.read(lambda db: db.execute("SELECT 1").fetchone()) == (1,)
        scribble = f"file = open({str(path)!r}, 'r+b'); file.seek(8192); file.write(b'?' * 200000)"
        subprocess.run([sys.executable, "-c", scribble], check=True)  # a process of its own: here it would drop our locks
        with pytest.raises(StoreError, match="damaged"):
            await store.read(names)
        assert await store.write(put("new", 5)) == 5
    assert len(told) == 1
    assert any(path.name.endswith("Z") and path.stat().st_size > 200000 for path in tmp_path.glob("*.damaged-*"))


async def test_a_file_that_another_process_keeps_locked_is_an_error_that_says_so(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.store.BUSY", 0.1)
    async with opened() as store:
        await store.write(put("a"))
        other = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process keeps it locked"):
            await store.write(put("b"))
        assert await store.read(names) == {"a"}
        other.execute("ROLLBACK")
        other.close()
        assert await store.write(put("c", 6)) == 6


async def test_a_place_where_no_file_can_be_is_an_error_until_there_can(tmp_path, told):
    (tmp_path / "state").write_text("in the way")
    async with open_store(tmp_path / "state" / "things.db", SCHEMA, on_failure=told.append) as store:
        with pytest.raises(StoreError, match="cannot use"):
            await store.write(put("a"))
        (tmp_path / "state").unlink()
        assert await store.write(put("a", 1)) == 1
        assert os.stat(store.path).st_mode & 0o777 == 0o600


async def test_a_disk_that_does_not_answer_does_not_hold_up_the_end(opened, told, monkeypatch):
    monkeypatch.setattr("supervisor.store.CLOSING", 0.05)
    gate = Gate()
    async with opened() as store:
        store.post(gate)
        await gate.is_entered()
    assert "has not answered" in str(told[0])
    gate.go_on.set()


async def test_who_posts_is_told_when_it_is_on_the_disk_and_when_it_failed(opened, told):
    outcomes = []
    async with opened() as store:
        store.post(put("a"), outcomes.append)
        store.post(put("a"), outcomes.append)
        assert outcomes == []
        await store.read(names)
    assert outcomes[0] is None and isinstance(outcomes[1], StoreError)
    assert told == []


async def test_last_runs_are_remembered(tmp_path, told):
    for at in (1.5, 2.5):
        async with open_store(tmp_path / "state.db", LAST_RUNS, on_failure=told.append) as store:
            last = LastRuns(store)
            await last.load(dict.fromkeys(("nightly", "changed", "forgotten"), "runs daily"), at - 1)
            before = [last.take(job, "runs daily") for job in ("nightly", "nightly", "changed", "forgotten", "dropped")]
            last.remember("nightly", "runs daily", at)
            last.remember("changed", "runs every 5s", at)
            last.remember("dropped", "runs daily", at)
            last.remember("forgotten", "runs daily", at)
            last.forget("forgotten")
    assert before == [1.5, None, None, None, None]
    async with open_store(tmp_path / "state.db", LAST_RUNS, on_failure=told.append) as store:
        last = LastRuns(store)
        await last.load({"nightly": "runs daily"}, 5.0)
        await last.load({"nightly": "runs daily", "dropped": "runs daily"}, 6.0)
        assert (last.take("nightly", "runs daily"), last.take("dropped", "runs daily")) == (2.5, None)
    async with open_store(tmp_path / "state.db", LAST_RUNS, on_failure=told.append) as store:
        last = LastRuns(store)
        await last.load({"nightly": "runs hourly", "dropped": "runs daily"}, 7.0)
        assert (last.take("nightly", "runs hourly"), last.take("dropped", "runs daily")) == (None, 6.0)
    assert not told


# -- faults of the machine ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_loses_nothing_that_was_told_done_and_is_got_over():
    script = Path(__file__).with_name("small_disk.py")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(script), "store"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = json.loads(done.stdout or done.stderr)
    assert "the disk is full: free some space" in said["full"] and "the disk is full" in said["again"]
    assert said["kept"] and said["more"]
    assert "cannot use" in said["read only"]
    assert said["told"] == 0


WRITER = """
import sys, trio
from functools import partial
from pathlib import Path
from supervisor.store import open_store

async def write(store, first):
    number = first
    while True:
        await store.write(lambda db: db.execute("INSERT INTO things VALUES (?, 0)", (number,)) and None)
        print(number, flush=True)
        number += 20

async def main(path, first):
    schema = ["CREATE TABLE things (name TEXT PRIMARY KEY, value INTEGER)"]
    async with open_store(Path(path), schema, on_failure=print) as store:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(write, store, first + number)

trio.run(main, sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=[pytest.mark.long, pytest.mark.limit(900)])])
async def test_killed_at_any_moment_the_writer_has_stored_all_that_it_was_told(opened, tmp_path, told, rounds):
    path, acknowledged, chance = tmp_path / "things.db", set(), random.Random(rounds)
    for round in range(rounds):
        program = [sys.executable, "-c", WRITER, str(path), str(round * 1_000_000)]
        writer = await trio.lowlevel.open_process(program, cwd=ROOT, stdout=subprocess.PIPE)
        said = b""
        while said.count(b"\n") < 50:
            said += await writer.stdout.receive_some()
        await trio.sleep(chance.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        await writer.wait()
        async for chunk in writer.stdout:
            said += chunk
        acknowledged |= set(said.decode().rpartition("\n")[0].split())
        async with opened() as store:
            assert acknowledged <= await store.read(names)
    assert told == []
