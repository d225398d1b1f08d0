"""The wall clock and its alarm, with the kernel's own timer; the machine's clock is never set."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor import open_supervisor
from supervisor.events import Ended, Starting
from supervisor.wall import LOOK_AGAIN, WallClock, written
from tests.real_tree import tree
from tests.running import running

PATIENCE = 60.0


def timers() -> int:
    """The timerfds of this process."""
    return sum(os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[timerfd]" for fd in os.listdir("/proc/self/fd") if there(fd))


def there(fd: str) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


async def test_a_wait_ends_at_its_moment_and_not_before():
    wall = WallClock()
    moment = wall.now() + 0.3
    with trio.fail_after(PATIENCE):
        while wall.now() < moment:
            await wall.wait_until(moment)
            told = wall.now()
        assert moment <= told
        await wall.wait_until(moment - 1000)  # long past
    wall.close()


async def test_the_first_wait_ends_at_once_so_that_no_step_before_it_goes_unnoticed():
    wall = WallClock()
    with trio.fail_after(PATIENCE):
        await wall.wait_until(wall.now() + 1e6)
    wall.close()


async def test_a_wait_can_be_cancelled_and_the_next_is_none_the_worse():
    wall = WallClock()
    await wall.wait_until(0)
    with trio.move_on_after(0.05) as scope:
        await wall.wait_until(wall.now() + 1e6)
    assert scope.cancelled_caught
    assert timers() == 1
    moment = wall.now() + 0.05
    with trio.fail_after(PATIENCE):
        await wall.wait_until(moment)
    assert wall.now() >= moment
    wall.close()
    wall.close()
    assert timers() == 0


class Setting:
    """libc, on a machine whose clock is set before the timer is."""

    def __init__(self, libc: ctypes.CDLL) -> None:
        self._libc = libc

    def __getattr__(self, name: str) -> Any:
        return getattr(self._libc, name)

    def timerfd_settime(self, *args: Any) -> int:
        assert self._libc.timerfd_settime(*args) == 0
        ctypes.set_errno(errno.ECANCELED)
        return -1


async def test_a_clock_that_was_set_between_two_waits_ends_the_second_at_once():
    wall = WallClock()
    await wall.wait_until(0)
    wall._libc = Setting(wall._libc)  # type: ignore[assignment, arg-type]
    with trio.fail_after(PATIENCE):
        await wall.wait_until(wall.now() + 1e6)
    wall.close()


class OutOfDescriptors:
    """libc, in a process that may open no more."""

    def timerfd_create(self, *args: Any) -> int:
        ctypes.set_errno(errno.EMFILE)
        return -1


async def test_without_a_descriptor_for_the_timer_the_moment_is_not_missed(autojump_clock):
    wall = WallClock()
    wall._libc = OutOfDescriptors()  # type: ignore[assignment]
    await wall.wait_until(wall.now() - 5)
    assert trio.current_time() == 0
    await wall.wait_until(wall.now() + 1e6)
    assert trio.current_time() == LOOK_AGAIN
    assert timers() == 0


async def test_other_errors_of_the_timer_are_not_taken_for_that():
    wall = WallClock()
    await wall.wait_until(0)
    os.close(wall._fd)
    wall._fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        await wall.wait_until(wall.now() + 1)
    wall.close()


async def test_there_is_a_timer_only_while_a_job_has_cron_and_never_more_than_one(tmp_path):
    always, never = {"call": "time:gmtime", "cron": "@yearly"}, {"call": "time:gmtime", "every": "1h"}
    async with open_supervisor({"jobs": {"a": never}, "daemon": {"state_dir": str(tmp_path)}}) as opened:
        await opened.wait_running()
        assert timers() == 0
        for jobs, expected in (({"a": always, "b": always}, 1), ({"a": never, "b": always}, 1), ({"a": never}, 0)):
            opened.apply(configured(tmp_path, jobs))
            with trio.fail_after(PATIENCE):
                while timers() != expected:
                    await trio.testing.wait_all_tasks_blocked()
        opened.apply(configured(tmp_path, {"a": always}))
    assert timers() == 0


def configured(tmp_path: Path, jobs: dict[str, Any]) -> Any:
    from supervisor import config

    return config.from_mapping({"jobs": jobs, "daemon": {"state_dir": str(tmp_path)}}, tmp_path, {})


async def test_a_command_runs_at_real_times_and_is_told_which(tmp_path):
    script = 'echo "$SUPERVISOR_SCHEDULED_AT" >> told'
    jobs = {"a": {"command": ["sh", "-c", script], "cron": "* * * * * *", "cwd": str(tmp_path)}}
    async with tree(tmp_path / "state", **jobs) as f:
        await f.until(Ended, 3)
        assert all(event.for_at <= event.at for event in f.events(Starting))
        await f.tree.stop("a")
    told = (tmp_path / "told").read_text().split()
    assert len(told) >= 3 and told == [event.for_at for event in f.events(Starting)][: len(told)]  # the stop may cut the last
    assert len(set(told)) == len(told) and all(moment.endswith(".000Z") for moment in told)


async def test_a_run_that_nobody_scheduled_is_told_of_no_moment(tmp_path):
    jobs = {"a": {"command": ["sh", "-c", "env > told"], "every": "1h", "cwd": str(tmp_path)}}
    async with tree(tmp_path / "state", **jobs) as f:
        await f.tree.run_now("a")
    assert "SUPERVISOR_SCHEDULED_AT" not in (tmp_path / "told").read_text()


# ---- a daemon that is killed ----


async def test_what_a_killed_daemon_had_in_hand_is_made_again_by_the_next(tmp_path):
    script = "echo $SUPERVISOR_SCHEDULED_AT >> begun; [ -e hold ] && sleep 1000; echo $SUPERVISOR_SCHEDULED_AT >> done"
    (tmp_path / "supervisor.toml").write_text(
        f'[jobs.nightly]\ncommand = ["sh", "-c", {json.dumps(script)}]\ncron = "* * * * * *"\ncatch_up = "all"\n'
    )
    (tmp_path / "hold").touch()
    async with running(tmp_path) as daemon:
        await daemon.until(lambda table: table["nightly"].word == "running" and (tmp_path / "begun").exists())
        (cut_short,) = (tmp_path / "begun").read_text().split()
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.ended()
    (tmp_path / "hold").unlink()
    async with running(tmp_path) as daemon:
        again = await first_start(daemon, "nightly")
        assert (again["for_at"], again["cause"]) == (
            cut_short,
            "catches up a run that was missed, or cut short, with the daemon",
        )
        await daemon("shutdown")
        await daemon.ended()
    begun, ended = lines(tmp_path / "begun"), lines(tmp_path / "done")
    assert begun[:2] == [cut_short, cut_short]
    assert ended[0] == cut_short
    assert ended == sorted(set(ended))  # each once, in order
    with closing(sqlite3.connect(tmp_path / ".supervisor" / "state.db")) as db:
        (settled,) = db.execute("SELECT at FROM last_runs").fetchone()
    assert written(math.floor(settled)) >= ended[-1]


async def first_start(daemon: Any, job: str) -> dict[str, Any]:
    """The first run of a job that has ended, as the daemon's events tell it."""
    await daemon.until(lambda table: table[job].exit is not None)
    told = [json.loads(line) for line in (await daemon("events", "--since", "0", "--json")).splitlines()]
    return next(event for event in told if event["event"] == "starting" and event["name"] == job)


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


async def test_a_daemon_catches_nothing_up_where_nobody_asks_for_it_and_keeps_nothing(tmp_path):
    (tmp_path / "supervisor.toml").write_text('[jobs.a]\ncommand = "true"\ncron = "* * * * * *"\n')
    for _ in range(2):
        async with running(tmp_path) as daemon:
            assert (await first_start(daemon, "a"))["cause"] == "runs at * * * * * * (UTC)"
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.ended()
    assert not (tmp_path / ".supervisor" / "state.db").exists()
