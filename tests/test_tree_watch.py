"""A changed file restarts its job: real files, real processes, the rules of the tree."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from running import MODULE, command, running

from supervisor import config as configuration
from supervisor.events import Event, Starting, Stopping
from supervisor.kinds import JobSpec
from supervisor.spec import Backoff, GiveUp, Seconds
from supervisor.tree import Supervisor, open_supervisor
from tests.forest import crash

SLEEP = ("sleep", "1000")
FAIL = ("false",)
AN_HOUR = Backoff(initial=Seconds(3600), max=Seconds(3600))


class House:
    """A tree whose jobs watch `*.py` beside them."""

    def __init__(self, tree: Supervisor, base: Path) -> None:
        self.tree = tree
        self.base = base
        self.told: list[Any] = []
        self._happened = trio.Event()
        tree.journal.add_sink(self._note)

    def _note(self, event: Event) -> None:
        self.told.append(event)
        self._happened.set()
        self._happened = trio.Event()

    def row(self, name: str = "x") -> Any:
        return self.tree.journal.table[name]

    async def until(self, true: Callable[[], bool]) -> None:
        with trio.fail_after(30):
            while not true():
                await self._happened.wait()

    def change(self, name: str = "a.py") -> None:
        (self.base / name).write_text("new")

    async def nothing(self) -> None:
        """A change that is none for `x`: wait until it has been told to `other`, which is there for that."""
        runs = self.row("other").run
        self.change("other.txt")
        await self.until(lambda: self.row("other").run != runs and self.row("other").ready)


@asynccontextmanager
async def house(base: Path, **jobs: JobSpec) -> AsyncIterator[House]:
    jobs["other"] = JobSpec(command=SLEEP, watch=(f"{base}/*.py", f"{base}/*.txt"), output="null")
    async with open_supervisor(configuration.Config(file=None, base=base, jobs=jobs)) as tree:
        yield House(tree, base)


def job(base: Path, command: tuple[str, ...] = SLEEP, **keys: Any) -> JobSpec:
    return JobSpec(command=command, watch=(f"{base}/*.py",), output="null", **keys)


async def test_a_changed_file_restarts_its_job_and_that_is_no_failure(tmp_path):
    async with house(tmp_path, x=job(tmp_path, backoff=AN_HOUR)) as h:
        await h.tree.wait_running()
        before = h.row().pid
        h.change()
        await h.until(lambda: h.row().ready and h.row().pid != before)
        assert (h.row().restarts, h.row().run) == (0, "x#2")
        causes = [event.cause for event in h.told if isinstance(event, (Stopping, Starting)) and event.name == "x"]
        assert causes == ["changed: a.py", "changed: a.py"]


async def test_it_ends_a_backoff_and_brings_back_what_gave_up_or_completed(tmp_path):
    jobs = {
        "x": job(tmp_path, FAIL, backoff=AN_HOUR),
        "y": job(tmp_path, FAIL, give_up=GiveUp(failures=1, within=Seconds(60))),
        "z": job(tmp_path, ("true",), once=True),
    }
    async with house(tmp_path, **jobs) as h:
        await h.until(lambda: [h.row(name).word for name in jobs] == ["backing off", "gave up", "completed"])
        h.change()
        await h.until(lambda: [h.row(name).run for name in jobs] == ["x#2", "y#2", "z#2"])
        assert [h.row(name).restarts for name in jobs] == [0, 0, 0]


async def test_a_job_that_is_down_stays_down_whoever_wanted_it(tmp_path):
    async with house(tmp_path, x=job(tmp_path), y=job(tmp_path, start="manual")) as h:
        await h.tree.wait_running()
        await h.tree.stop("x")
        h.change()
        await h.nothing()
        assert [h.row(name).state.value for name in ("x", "y")] == ["stopped", "stopped"]


async def test_a_stop_under_way_is_not_overtaken_nor_one_that_waits_told_that_it_was(tmp_path):
    stubborn = ("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    async with house(tmp_path, x=job(tmp_path, stubborn, grace=Seconds(3))) as h:
        await h.tree.wait_running()
        (order,) = h.tree.order("stop", ["x"])
        await h.until(lambda: h.row().state.value == "stopping")
        h.change()
        await h.nothing()
        answer = await order.wait()
        assert answer.ok
        assert (h.row().state.value, h.row().run) == ("stopped", "x#1")


async def test_who_waits_for_a_start_is_answered_when_the_newer_run_is_ready(tmp_path):
    script = "echo up >&2; [ -e slow ] && exec sleep 1000; touch slow; sleep 1000"
    ready = configuration.from_mapping(
        {"jobs": {"x": {"command": ["sh", "-c", script], "start": "manual", "watch": ["*.py"], "ready": {"file": "is-ready"}}}},
        tmp_path, {},
    ).jobs["x"]  # fmt: skip
    async with house(tmp_path, x=ready) as h:
        (order,) = h.tree.order("start", ["x"])
        await h.until(lambda: h.row().pid is not None)
        h.change()
        await h.until(lambda: h.row().run == "x#2" and h.row().pid is not None)
        (tmp_path / "is-ready").touch()
        answer = await order.wait()
        assert answer.ok and answer.text.startswith("running, pid ")


async def test_a_crash_while_a_restart_is_due_is_no_failure_either(tmp_path):
    async with house(tmp_path, x=job(tmp_path, ("sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"))) as h:
        await h.tree.wait_running()
        h.change()
        await h.until(lambda: h.row().run == "x#2" and h.row().ready)
        assert h.row().restarts == 0


async def test_a_job_without_globs_is_left_alone_by_all_changes(tmp_path):
    async with house(tmp_path, x=JobSpec(command=SLEEP, output="null"), y=JobSpec(call=crash, start="manual")) as h:
        await h.tree.wait_running()
        h.change()
        await h.until(lambda: h.row("other").run == "other#2")
        assert h.row().run == "x#1"


FILE = """
[jobs.x]
command = ["sleep", "1000"]
watch = {globs}

[jobs.other]
command = ["sleep", "1000"]
watch = ["*"]
"""


async def test_globs_change_live_at_a_reload_and_the_log_of_a_job_restarts_nobody(tmp_path):
    file = tmp_path / "supervisor.toml"
    file.write_text(FILE.format(globs='["src/**/*.py"]'))
    (tmp_path / "src").mkdir()
    async with running(tmp_path) as daemon:
        await daemon.until(lambda table: all(row.ready for row in table.values()))
        before = (await daemon.rows())["x"]
        file.write_text(FILE.format(globs='["lib/**"]').replace('"*"', '"*.txt"'))
        assert "change live: x, other" in await daemon("reload")
        (tmp_path / "src" / "a.py").touch()
        (tmp_path / "told.txt").touch()
        await daemon.until(lambda table: table["other"].run not in (None, "other#1"))
        assert (await daemon.rows())["x"]["run"] == before["run"]
        (tmp_path / "lib" / "deep").mkdir(parents=True)
        (tmp_path / "lib" / "deep" / "a").touch()
        table = await daemon.until(lambda table: table["x"].run != before["run"] and table["x"].ready)
        assert table["x"].restarts == 0
        line = await daemon.said("stopping", job="x")
        assert line["cause"] == "changed: lib/deep/a"


async def test_check_says_where_nothing_is_there_to_watch(tmp_path):
    (tmp_path / "supervisor.toml").write_text(FILE.format(globs='["scr/**/*.py"]'))
    done = await command(MODULE, "check", directory=tmp_path)
    assert done.returncode == 0
    said = "4:10: warning: jobs.x.watch[0]: begins in a directory that is not there; nothing is watched until it is"
    assert said in done.stderr.decode()
