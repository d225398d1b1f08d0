"""What became of every run: told truly, kept across daemons, bounded, and never in the way of a job."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

import pytest
import trio
from control_serving import serving
from hypothesis import given
from hypothesis import strategies as st
from running import running, well
from test_store import commits

from supervisor import ControlError, Goal, history, open_supervisor
from supervisor.client import AsyncClient
from supervisor.events import Added, Ended, Journal, PhaseChanged, Starting, Warned
from supervisor.history import LOST, SCHEMA, _add, keep_history
from supervisor.state import Exit, PastRun, Phase, Spent, Why
from supervisor.store import StoreError


@asynccontextmanager
async def keeping(path: Path, journal: Journal | None = None, **options):
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(keep_history, journal or Journal(), path, **options))
        nursery.cancel_scope.cancel(reason="the test is over")


class Jobs:
    """Jobs without a tree: what happens to them is emitted."""

    def __init__(self) -> None:
        self.journal = Journal(now=lambda: "2026-11-27T02:30:10.500Z")
        self.numbers: dict[str, int] = {}
        self.warnings: list[str] = []
        self.warned = trio.Event()
        self.journal.add_sink(self._hear)

    def _hear(self, event) -> None:
        if isinstance(event, Warned):
            self.warnings.append(event.text)
            self.warned.set()
            self.warned = trio.Event()

    def start(self, name: str) -> str:
        if name not in self.journal.table:
            self.journal.emit(Added, name=name, kind="command", supervisor=None, goal=Goal.UP, cause="a test")
        self.numbers[name] = self.numbers.get(name, 0) + 1
        run = f"{name}#{self.numbers[name]}"
        self.journal.emit(Starting, name=name, run=run, cause="a test")
        return run

    def end(self, name: str, run: str | None = None, **facts) -> str:
        run = run or self.start(name)
        exit_ = Exit(reason=facts.pop("reason", "exited with code 0"), at="2026-11-27T02:30:10.500Z", code=0)
        facts = {"failed": False, "cause": exit_.reason, "why": Why.COMPLETED, "duration": 2.5} | facts
        self.journal.emit(Ended, name=name, run=run, exit=exit_, **facts)
        return run


def ids(runs: list[PastRun]) -> list[str]:
    return [run.run for run in runs]


async def test_a_run_is_told_with_all_that_is_known_of_it(tmp_path):
    jobs = Jobs()
    spent = Spent(duration=2.4, cpu=0.25, max_rss=1 << 20)
    async with keeping(tmp_path / "history.db", jobs.journal) as kept:
        jobs.end("a", spent=spent)
        expected = PastRun(
            name="a", run="a#1", started="2026-11-27T02:30:08.000Z", ended="2026-11-27T02:30:10.500Z", outcome="completed",
            reason="exited with code 0", cause="exited with code 0", code=0, duration=2.5, cpu=0.25, max_rss=1 << 20,
        )  # fmt: skip
        assert await kept.runs("a", 10) == [expected]
    async with keeping(tmp_path / "history.db") as kept:
        assert await kept.runs("a", 10) == [expected]
        assert await kept.names() == {"a"}


async def test_what_is_not_stored_yet_is_told_once_and_in_order(tmp_path):
    jobs = Jobs()
    async with keeping(tmp_path / "history.db", jobs.journal) as kept:
        jobs.end("a")
        kept.flush()
        jobs.end("a")
        jobs.end("b")
        assert ids(await kept.runs("a", 10)) == ["a#1", "a#2"]
        assert ids(await kept.runs("a", 1)) == ["a#2"]
        assert await kept.names() == {"a", "b"}


async def test_a_job_has_the_runs_of_all_its_workers_and_a_worker_its_own(tmp_path):
    jobs = Jobs()
    async with keeping(tmp_path / "history.db", jobs.journal) as kept:
        for name in ("a:0", "a:1", "ab", "a:0"):
            jobs.end(name)
        for _ in ("in memory", "stored"):
            assert ids(await kept.runs("a", 10)) == ["a:0#1", "a:1#1", "a:0#2"]
            assert ids(await kept.runs("a:0", 10)) == ["a:0#1", "a:0#2"]
            kept.flush()


async def test_what_ends_within_the_window_is_stored_in_one_transaction(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "WINDOW", 3600)
    jobs, path = Jobs(), tmp_path / "history.db"
    async with keeping(path, jobs.journal) as kept:
        await kept.runs("a", 1)
        before = commits(path)
        for number in range(5000):
            jobs.end(f"job{number % 200}")
            if number % 500 == 0:
                await trio.testing.wait_all_tasks_blocked()
        jobs.journal.emit(PhaseChanged, phase=Phase.DRAINING, cause="a test")
        await trio.testing.wait_all_tasks_blocked()
        assert len(await kept.runs("job7", 1000)) == 25
        assert kept._unstored() == []
        assert commits(path) == before + 1


async def test_nothing_is_opened_before_there_is_something_to_store(tmp_path):
    jobs = Jobs()
    async with keeping(tmp_path / "history.db", jobs.journal):
        jobs.start("service")
        await trio.testing.wait_all_tasks_blocked()
    assert list(tmp_path.iterdir()) == []


async def test_the_file_is_opened_while_the_last_jobs_end(tmp_path):
    jobs = Jobs()
    async with keeping(tmp_path / "history.db", jobs.journal) as kept:
        jobs.journal.emit(PhaseChanged, phase=Phase.DRAINING, cause="a test")
        while not kept._settled:
            await trio.sleep(0.01)
        assert (tmp_path / "history.db").exists()


runs = st.lists(st.tuples(st.sampled_from(["a", "a:1", "b", "c"]), st.booleans()), max_size=60)


@given(st.lists(runs, max_size=5))
def test_of_each_job_the_last_good_and_the_last_bad_runs_are_kept_and_no_more(gatherings):
    kept: list[tuple[str, bool]] = []
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "KEPT", 4)
        patch.setattr(history, "KEPT_IN_ALL", 17)
        db.executescript(SCHEMA[0])
        for gathering in gatherings:
            _add(db, [past(name, failed) for name, failed in gathering])
            kept = pruned(kept + gathering)
            found = [(name, bool(failed)) for name, failed in db.execute("SELECT name, failed FROM runs ORDER BY id")]
            assert found == kept


def past(name: str, failed: bool) -> PastRun:
    return PastRun(name=name, run=f"{name}#1", started="", ended="", outcome="", reason="", cause="", failed=failed)


def pruned(rows: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The model: the last 4 of each sort of each job, then the last 17."""
    left: list[tuple[str, bool]] = []
    for name, failed in reversed(rows):
        sort = (name.partition(":")[0], failed)
        if sum((other.partition(":")[0], bad) == sort for other, bad in left) < 4:
            left.insert(0, (name, failed))
    return left[-17:]


async def test_more_ends_than_there_is_room_for_are_counted_and_the_count_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "WAITING", 3)
    jobs = Jobs()
    async with keeping(tmp_path / "history.db", jobs.journal):
        for _ in range(3):
            jobs.end("a")
        for name in ("b", "a", "b", "b:1"):
            jobs.end(name)
    async with keeping(tmp_path / "history.db") as kept:
        assert ids(await kept.runs("a", 10)) == ["a#1", "a#2", "a#3", "a#"]
        told = [(run.outcome, run.reason) for run in await kept.runs("b", 10)]
        assert told[0] == ("not stored", "2 more ended faster than they could be stored")
        assert len(told) == 2


async def test_while_nothing_can_be_stored_it_is_said_once_and_kept_and_stored_later(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "WINDOW", 0.01)
    monkeypatch.setattr(history, "PAUSE", 0.05)
    (tmp_path / "state").write_text("in the way")
    jobs = Jobs()
    async with keeping(tmp_path / "state" / "history.db", jobs.journal) as kept:
        jobs.end("a")
        await jobs.warned.wait()
        jobs.end("a")
        with pytest.raises(StoreError, match="cannot use"):
            await kept.runs("a", 10)
        (tmp_path / "state").unlink()
        await jobs.warned.wait()
    assert [("cannot use" in text, "stored again" in text) for text in jobs.warnings] == [(True, False), (False, True)]
    async with keeping(tmp_path / "state" / "history.db") as kept:
        assert ids(await kept.runs("a", 10)) == ["a#1", "a#2"]


async def test_a_file_that_another_process_has_locked_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.store.BUSY", 0.1)
    jobs, path = Jobs(), tmp_path / "history.db"
    async with keeping(path, jobs.journal) as kept:
        await kept.runs("a", 1)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            jobs.end("a")
            kept.flush()
            await jobs.warned.wait()
    assert "another process keeps it locked" in jobs.warnings[0]


async def test_a_run_that_the_daemon_did_not_see_the_end_of_is_lost(tmp_path):
    path, jobs = tmp_path / "history.db", Jobs()
    async with keeping(path, jobs.journal, ends=lambda name: name != "service") as kept:
        seen = jobs.start("seen")
        for name in ("lost", "service"):
            jobs.start(name)
        kept.flush()
        await kept.names()
        jobs.end("seen", seen)
        jobs.end("brief")
    again = Jobs()
    async with keeping(path, again.journal, ends=lambda name: True) as kept:
        again.end("lost")
        assert [(run.run, run.outcome, run.reason) for run in await kept.runs("lost", 10)] == [
            ("lost#1", "lost", LOST),
            ("lost#1", "completed", "exited with code 0"),
        ]
        assert ids(await kept.runs("seen", 10)) == ["seen#1"]
        assert await kept.runs("service", 10) == []
    async with keeping(path) as kept:
        assert len(await kept.runs("lost", 10)) == 2


async def test_the_words_for_how_a_run_ended(tmp_path):
    async def fail():
        raise ValueError("no")

    journal, config = Journal(), {
        "daemon": {"state_dir": str(tmp_path)},
        "defaults": {"backoff": {"initial": "1h"}},
        "jobs": {
            "completed": {"command": ["true"], "once": True},
            "failed": {"command": ["sh", "-c", "exit 3"]},
            "exited": {"command": ["true"]},
            "stopped": {"command": ["sleep", "1000"]},
            "cancelled": {"command": ["sleep", "1000"], "once": True, "restart": "temporary"},
        },
    }  # fmt: skip
    async with keeping(tmp_path / "history.db", journal) as kept:
        async with open_supervisor(config, journal=journal) as tree:
            with journal.subscribe() as feed:
                while any(tree.journal.table[name].exit is None for name in ("completed", "failed", "exited")):
                    await anext(feed)
            await tree.stop("stopped")
            await tree.cancel("cancelled")
            for name in config["jobs"]:
                (run,) = await kept.runs(name, 10)
                assert run.outcome == name
                assert run.failed is (name in ("failed", "exited"))
                assert run.max_rss > 0 and 0 <= run.duration < 60


# -- the daemon ---------------------------------------------------------------------------------------------------------

JOBS = """
[jobs.api]
command = ["sleep", "1000"]

[jobs.batch]
command = ["sh", "-c", "exit 3"]
once = true
start = "manual"
restart = "temporary"

[jobs.long]
command = ["sleep", "1000"]
once = true
"""


async def test_it_outlives_the_daemon_and_the_job(tmp_path):
    (tmp_path / "supervisor.toml").write_text(JOBS)
    async with running(tmp_path) as daemon:
        await daemon.until(well)
        await daemon("run-now", "batch", code=1)
        assert "batch#1" in await daemon("history", "batch")
        await daemon("stop", "api")
        await daemon("shutdown", "--now")
        assert await daemon.ended() == 0
    (tmp_path / "supervisor.toml").write_text('[jobs.other]\ncommand = ["sleep", "1000"]\n')
    async with running(tmp_path) as daemon:
        (batch,) = json.loads(await daemon("history", "--json", "batch"))
        assert (batch["outcome"], batch["code"], batch["failed"]) == ("failed", 3, True)
        (api,) = json.loads(await daemon("history", "--json", "api"))
        assert api["outcome"] == "stopped" and api["cause"].startswith("stopped by uid")
        assert (await daemon("history", "other")) == "no run of it has ended yet\n"
        assert "did you mean 'batch'?" in await daemon("history", "bath", code=4)
        assert [run.run for run in await daemon.client().history("long")] == ["long#1"]


async def test_a_killed_daemon_is_told_of_by_the_next(tmp_path):
    (tmp_path / "supervisor.toml").write_text(JOBS)
    async with running(tmp_path) as daemon:
        await daemon.until(well)
        await stored(tmp_path / ".supervisor" / "history.db", "SELECT run FROM in_hand", ["long#1"])
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.ended()
    async with running(tmp_path) as daemon:
        (lost,) = await daemon.client().history("long")
        assert (lost.outcome, lost.reason, lost.ended) == ("lost", LOST, None)
        assert await daemon.client().history("api") == []
        assert "lost" in await daemon("history", "long")


async def stored(path: Path, query: str, expected: list[str]) -> None:
    with trio.fail_after(30):
        while True:
            if path.exists():
                with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                    try:
                        if [value for (value,) in db.execute(query)] == expected:
                            return
                    except sqlite3.OperationalError:  # not complete yet
                        pass
            await trio.sleep(0.05)


async def test_without_a_history_the_verb_says_so(tmp_path):
    async with serving(tmp_path) as (_, path):
        with pytest.raises(ControlError, match="keeps no history"):
            await AsyncClient(path).history("idle")
