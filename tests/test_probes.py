"""The probe that waits for a file: real files, real inotify."""

import os
import resource
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.errors import RunFailed
from supervisor.probes import FreshFile


class Waiting:
    """A wait for a file that is under way."""

    def __init__(self) -> None:
        self.over = trio.Event()

    async def settles(self) -> bool:
        """Whether it is over when everything that happened has been looked at."""
        await wait_all_tasks_blocked(0.02)
        return self.over.is_set()


@asynccontextmanager
async def waiting_for(path: Path):
    waiting = Waiting()

    async def wait() -> None:
        await fresh.wait()
        waiting.over.set()

    fresh = FreshFile(path)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            yield waiting
            await waiting.over.wait()


def watches() -> int:
    """How many directories this process watches."""
    found = 0
    for fd in os.listdir("/proc/self/fdinfo"):
        with suppress(FileNotFoundError):
            found += Path("/proc/self/fdinfo", fd).read_text().count("inotify wd:")
    return found


async def test_a_file_is_found_when_it_appears(tmp_path):
    async with waiting_for(tmp_path / "ready") as waiting:
        (tmp_path / "another").touch()
        assert not await waiting.settles()
        (tmp_path / "ready").touch()


async def test_a_file_that_is_made_before_the_wait_begins_is_found(tmp_path):
    fresh = FreshFile(tmp_path / "ready")
    (tmp_path / "ready").touch()
    with trio.fail_after(30):
        await fresh.wait()


async def test_its_directory_need_not_exist_yet(tmp_path):
    async with waiting_for(tmp_path / "a" / "b" / "ready") as waiting:
        (tmp_path / "a").mkdir()
        assert not await waiting.settles()
        (tmp_path / "a" / "b").mkdir()
        assert not await waiting.settles()
        assert watches() == 1  # what happens further up wakes nobody any more
        (tmp_path / "a" / "b" / "ready").touch()


async def test_its_directory_may_be_moved_away_and_come_back(tmp_path):
    (tmp_path / "run").mkdir()
    async with waiting_for(tmp_path / "run" / "ready") as waiting:
        (tmp_path / "run").rename(tmp_path / "away")
        assert not await waiting.settles()
        (tmp_path / "away" / "ready").touch()
        assert not await waiting.settles()
        (tmp_path / "away").rename(tmp_path / "run")


def touch(path: Path) -> None:
    os.utime(path)


def rewrite(path: Path) -> None:
    path.write_text("new")


def make_anew(path: Path) -> None:
    path.unlink()
    path.touch()


def replace(path: Path) -> None:
    path.with_name("new").touch()
    path.with_name("new").rename(path)


@pytest.mark.parametrize("renew", [touch, rewrite, make_anew, replace])
async def test_a_file_of_an_earlier_run_does_not_count_until_it_is_renewed(tmp_path, renew):
    path = tmp_path / "ready"
    path.write_text("old")
    async with waiting_for(path) as waiting:
        (tmp_path / "another").touch()
        assert not await waiting.settles()
        path.read_text()
        assert not await waiting.settles()
        renew(path)


async def test_no_descriptor_is_left_when_the_wait_is_cancelled(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    with trio.move_on_after(0.01):
        await FreshFile(tmp_path / "never").wait()
    assert set(os.listdir("/proc/self/fd")) == before


async def test_where_no_watch_is_to_be_had_the_error_names_the_limits(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fresh = FreshFile(tmp_path / "ready")
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(RunFailed, match=r"Too many open files: see fs\.inotify\.max_user_instances"):
            await fresh.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
