"""Watched files: what a glob means, when changes are told, and real changes of real files."""

from __future__ import annotations

import glob
import itertools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from running import ROOT
from trio.testing import wait_all_tasks_blocked

from supervisor.watching import LONGEST, SILENCE, Burst, Glob, Watching

# -- what a glob means


@pytest.mark.parametrize(
    ("pattern", "path", "means"),
    [
        ("/a/b.py", "/a/b.py", True),
        ("/a/b.py", "/a/c.py", False),
        ("/a/./x/../b.py", "/a/b.py", True),
        ("/a/*.py", "/a/b.py", True),
        ("/a/*.py", "/a/x/b.py", False),
        ("/a/?[0-9].py", "/a/b7.py", True),
        ("/a/**/*.py", "/a/b.py", True),
        ("/a/**/*.py", "/a/x/y/b.py", True),
        ("/a/**/*.py", "/a/x/y/b.toml", False),
        ("/a/**", "/a/x/b", True),
        ("/a/**/x/**/c", "/a/x/c", True),
        ("/a/**/x/**/c", "/a/1/x/2/3/c", True),
        ("/a/**/x/**/c", "/a/1/2/3/c", False),
        ("/a/src", "/a/src/x/y.py", True),
        ("/a/src", "/a/src2/y.py", False),
        ("/a/*/src", "/a/1/src/y.py", True),
        ("/a/**", "/a/.env", True),
        ("/a/**", "/a/.git/index", False),
        ("/a/**", "/a/x/__pycache__/b.cpython-311.pyc", False),
        ("/a/**", "/a/.b.py.swp", False),
        ("/a/**", "/a/b.py~", False),
        ("/a/**", "/a/.#b.py", False),
        ("/a/**", "/a/4913", False),
        ("/a/.git/HEAD", "/a/.git/HEAD", True),
        ("/a/.git/refs/**", "/a/.git/refs/heads/main", True),
        ("/a/**/*.pyc", "/a/x/b.pyc", True),
        ("/a/**/*.pyc", "/a/__pycache__/b.pyc", False),
        ("/a/[[]x]/*", "/a/[x]/b", True),
        ("/a/[[]x]/*", "/a/x/b", False),
    ],
)
def test_what_a_pattern_means(pattern, path, means):
    assert Glob(pattern).matches(path) is means


@pytest.mark.parametrize(
    ("pattern", "root"),
    [("/a/b.py", "/a"), ("/a/*.py", "/a"), ("/a/**/b", "/a"), ("/a/[[]x]/b*/c", "/a/[x]"), ("/*", "/"), ("/a/src", "/a")],
)
def test_where_the_search_begins(pattern, root):
    assert Glob(pattern).root == root


def test_a_pattern_means_what_the_shell_finds_and_leads_to_it_and_no_further(tmp_path):
    names = ("a", "b", "ab")
    for parts in itertools.product(names, repeat=2):
        (tmp_path / Path(*parts)).mkdir(parents=True)
    places = [Path(*parts) for depth in range(3) for parts in itertools.product(names, repeat=depth)]
    files = [place / f"{name}.f" for place in places for name in names]
    for file in files:
        (tmp_path / file).touch()
    for size in (1, 2, 3):
        for parts in itertools.product(("a", "b", "*", "a*", "?", "**"), repeat=size):
            pattern = f"{glob.escape(str(tmp_path))}/{'/'.join(parts)}/*.f"
            each = Glob(pattern)
            found = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
            assert {str(tmp_path / file) for file in files if each.matches(str(tmp_path / file))} == found
            assert all(each.leads(str(above)) for path in found for above in Path(path).parents)
            assert not each.leads(str(tmp_path.parent / "elsewhere"))


# -- when it is told


def test_a_burst_is_told_after_half_a_second_of_silence_and_after_five_at_the_latest():
    burst = Burst(10.0)
    burst.add("a", 10.0)
    assert burst.due == 10.0 + SILENCE
    burst.add("b", 10.3)
    burst.add("a", 10.4)
    assert burst.due == 10.4 + SILENCE
    burst.add("a", 14.9)
    assert burst.due == 10.0 + LONGEST
    assert str(burst) == "changed: a and 1 more"


# -- real files


class Told:
    """What a Watching has told so far."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.watching = Watching(self._changed, self.warnings.append)
        self._more = trio.Event()

    def _changed(self, job: str, burst: Burst) -> None:
        self.changes.append((job, str(burst)))
        self._more.set()
        self._more = trio.Event()

    async def next(self) -> str:
        """The cause of the next change, which must be of the job `x`, and which is then forgotten."""
        with trio.fail_after(30):
            while not self.changes:
                await self._more.wait()
        job, cause = self.changes.pop(0)
        assert job == "x"
        return cause.removeprefix("changed: ")

    async def silent(self) -> bool:
        """Whether what has happened so far is no change: what can be told of it is told within the silence."""
        await wait_all_tasks_blocked(0.02)
        return not self.changes and not self.watching._bursts

    async def settled(self) -> None:
        """Until everything that has happened was looked at."""
        await wait_all_tasks_blocked(0.02)


@asynccontextmanager
async def watching(base: Path, *patterns: str, apart: tuple[Path, ...] = ()) -> AsyncIterator[Told]:
    told = Told()
    told.watching.watch(globs(base, *patterns), base, map(str, apart))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told.watching.run)
        await told.settled()
        yield told
        assert told.warnings == []
        nursery.cancel_scope.cancel(reason="the test is over")


def globs(base: Path, *patterns: str) -> dict[str, tuple[str, ...]]:
    return {"x": tuple(str(Path(glob.escape(str(base))) / pattern) for pattern in patterns)}


def write(path: Path) -> None:
    path.write_text("new")


def replace(path: Path) -> None:
    """As editors do."""
    path.with_suffix(".new").write_text("new")
    path.with_suffix(".new").rename(path)


def move_aside(path: Path) -> None:
    path.rename(path.with_suffix(".old"))


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("b.txt")


@pytest.mark.parametrize("change", [write, replace, move_aside, link, Path.unlink])
async def test_a_change_of_a_file_is_told_and_one_of_its_neighbour_is_not(tmp_path, change):
    write(tmp_path / "a.py")
    write(tmp_path / "b.txt")
    async with watching(tmp_path, "*.py") as told:
        (tmp_path / "a.py").read_text()
        change(tmp_path / "b.txt") if change is not link else None
        assert await told.silent()
        change(tmp_path / "a.py")
        assert await told.next() == "a.py"


async def test_a_new_file_is_told_when_it_is_written_and_not_before(tmp_path):
    async with watching(tmp_path, "*.py") as told:
        with open(tmp_path / "a.py", "w") as file:
            file.write("half")
            file.flush()
            assert await told.silent()
        assert await told.next() == "a.py"


async def test_directories_that_come_later_are_watched_with_what_is_in_them(tmp_path):
    async with watching(tmp_path, "src/**/*.py") as told:
        (tmp_path / "src").mkdir()
        assert await told.silent()
        (tmp_path / "src" / "a" / "b").mkdir(parents=True)
        write(tmp_path / "src" / "a" / "b" / "c.py")  # most likely before it is watched
        assert await told.next() == "src/a/b/c.py"
        write(tmp_path / "src" / "a" / "b" / "d.py")
        assert await told.next() == "src/a/b/d.py"
        (tmp_path / "elsewhere").mkdir()
        write(tmp_path / "elsewhere" / "c.py")
        shutil.move(tmp_path / "elsewhere", tmp_path / "src" / "moved")
        assert await told.next() == "src/moved/c.py"


async def test_a_directory_that_is_renamed_is_still_watched_by_its_new_name(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(tmp_path / "a" / "b" / "c.py")
    async with watching(tmp_path, "**/*.py") as told:
        (tmp_path / "a").rename(tmp_path / "z")
        assert await told.next() == "a and 1 more"
        await told.settled()
        write(tmp_path / "z" / "b" / "c.py")
        assert await told.next() == "z/b/c.py"


async def test_a_storm_of_changes_is_one_change(tmp_path):
    """As after a checkout of another branch."""
    (tmp_path / "src").mkdir()
    for number in range(300):
        write(tmp_path / "src" / f"{number}.py")
    async with watching(tmp_path, "src") as told:
        for number in range(0, 300, 2):
            (tmp_path / "src" / f"{number}.py").unlink()
        for number in range(1, 300, 2):
            replace(tmp_path / "src" / f"{number}.py")
        cause = await told.next()
        assert cause.startswith("src/0.py and ")
        assert await told.silent()


async def test_changes_that_never_end_are_told_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.watching.LONGEST", 1.0)
    async with watching(tmp_path, "*.py") as told:
        async with trio.open_nursery() as nursery:

            async def go_on() -> None:
                while True:
                    write(tmp_path / "a.py")
                    await trio.sleep(0.1)

            nursery.start_soon(go_on)
            assert await told.next() == "a.py"
            nursery.cancel_scope.cancel(reason="seen")


async def test_a_watched_directory_may_be_removed_and_made_again(tmp_path):
    source = tmp_path / "deep" / "src"
    source.mkdir(parents=True)
    write(source / "a.py")
    async with watching(tmp_path, "deep/src/*.py") as told:
        shutil.rmtree(tmp_path / "deep")
        assert await told.next() == "deep/src/a.py"
        source.mkdir(parents=True)
        assert await told.silent()
        write(source / "b.py")
        assert await told.next() == "deep/src/b.py"


@pytest.mark.parametrize("level", ["src", "app"])
async def test_another_directory_in_the_place_of_one_on_the_way_is_a_change_and_is_watched(tmp_path, level):
    """As a deployment that moves the new version to where the old one was."""
    for version in ("app", "new"):
        (tmp_path / version / "src").mkdir(parents=True)
    async with watching(tmp_path, "app/src/*.py") as told:
        old, new = (tmp_path / version / ("src" if level == "src" else "") for version in ("app", "new"))
        old.rename(tmp_path / "old")
        new.rename(old)
        assert await told.next() == "app/src"
        await told.settled()
        write(tmp_path / "app" / "src" / "a.py")
        assert await told.next() == "app/src/a.py"


async def test_a_link_on_the_way_that_is_switched_is_a_change(tmp_path):
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
    (tmp_path / "current").symlink_to("1")
    async with watching(tmp_path, "current/**") as told:
        (tmp_path / "next").symlink_to("2")
        assert await told.silent()
        (tmp_path / "next").rename(tmp_path / "current")
        assert await told.next() == "current"
        await told.settled()
        write(tmp_path / "2" / "a")
        assert await told.next() == "current/a"


async def test_links_below_are_not_followed_so_that_a_circle_is_no_trap(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a" / "round").symlink_to("..")
    (tmp_path / "a" / "out").symlink_to("../elsewhere")
    async with watching(tmp_path, "a/**") as told:
        write(tmp_path / "elsewhere" / "b")
        assert await told.silent()
        write(tmp_path / "a" / "b")
        assert await told.next() == "a/b"


async def test_what_is_written_beside_the_files_that_matter_is_passed_over(tmp_path):
    (tmp_path / ".git").mkdir()
    async with watching(tmp_path, "**", apart=(tmp_path / ".supervisor", tmp_path / "daemon.log")) as told:
        (tmp_path / "__pycache__").mkdir()
        (tmp_path / ".supervisor" / "logs").mkdir(parents=True)
        for name in (
            ".git/index", "__pycache__/a.pyc", ".a.py.swp", "a.py~", ".#a.py", "4913",
            "daemon.log", "daemon.log.1", ".supervisor/lock",
        ):  # fmt: skip
            write(tmp_path / name) if name != ".#a.py" else (tmp_path / name).symlink_to("me@here")
        assert await told.silent()
        looked_at = set().union(*told.watching._directories.values())
        assert looked_at == {str(tmp_path)}  # what happens elsewhere wakes nobody
        write(tmp_path / ".env")
        assert await told.next() == ".env"


async def test_what_is_named_exactly_is_not_passed_over(tmp_path):
    (tmp_path / ".git").mkdir()
    async with watching(tmp_path, ".git/HEAD") as told:
        write(tmp_path / ".git" / "index")
        assert await told.silent()
        write(tmp_path / ".git" / "HEAD")
        assert await told.next() == ".git/HEAD"


async def test_where_more_happens_than_can_be_told_that_is_a_change_and_the_watch_goes_on(tmp_path):
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip("this machine keeps more events than a test should make")
    async with watching(tmp_path, "**/*.py") as told:
        for _ in range(most // 3 + 100):
            write(tmp_path / "a.tmp")
            (tmp_path / "a.tmp").unlink()
        (tmp_path / "new").mkdir()  # this is not told any more
        assert await told.next() == "more than could be told"
        await told.settled()
        write(tmp_path / "new" / "a.py")
        assert await told.next() == "new/a.py"


async def test_others_have_their_turn_while_many_directories_are_looked_at(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}").mkdir()
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += len(told.watching._directories) in range(1, 201)

    told = Told()
    told.watching.watch(globs(tmp_path, "**"), tmp_path, ())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        nursery.start_soon(told.watching.run)
        with trio.fail_after(30):
            while len(told.watching._directories) < 201:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel(reason="seen")
    assert turns > 100


async def test_what_is_watched_can_be_changed_at_any_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    async with watching(tmp_path, "a/*") as told:
        told.watching.watch(globs(tmp_path, "b/*"), tmp_path, ())
        await told.settled()
        write(tmp_path / "a" / "x")
        assert await told.silent()
        write(tmp_path / "b" / "x")
        told.watching.watch({}, tmp_path, ())
        await told.settled()
        assert inotifies() == 0
        assert await told.silent()
        told.watching.watch(globs(tmp_path, "a/*"), tmp_path, ())
        await told.settled()
        write(tmp_path / "a" / "x")
        assert await told.next() == "a/x"


async def test_a_change_during_a_reload_is_not_lost(tmp_path):
    (tmp_path / "a").mkdir()
    async with watching(tmp_path, "a/*") as told:
        write(tmp_path / "a" / "x")
        told.watching.watch(globs(tmp_path, "a/*"), tmp_path, ())
        write(tmp_path / "a" / "y")
        assert await told.next() == "a/x and 1 more"


def inotifies() -> int:
    return sum(os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:inotify" for fd in os.listdir("/proc/self/fd") if _open(fd))


def _open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


async def test_nothing_to_watch_costs_nothing_and_many_jobs_cost_one_descriptor(tmp_path):
    async with watching(tmp_path) as told:
        told.watching.watch({}, tmp_path, ())
        await told.settled()
        assert inotifies() == 0
        told.watching.watch({str(number): globs(tmp_path, f"{number % 3}/*")["x"] for number in range(100)}, tmp_path, ())
        await told.settled()
        assert inotifies() == 1


async def test_without_a_descriptor_one_warning_says_what_to_do_and_a_reload_tries_again(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = Told()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told.watching.run)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            told.watching.watch(globs(tmp_path, "*"), tmp_path, ())
            await told.settled()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        (warning,) = told.warnings
        assert "Too many open files: see fs.inotify.max_user_instances" in warning
        told.watching.watch(globs(tmp_path, "*"), tmp_path, ())
        await told.settled()
        write(tmp_path / "a")
        assert await told.next() == "a"
        nursery.cancel_scope.cancel(reason="seen")


FEW = """
import sys, trio
from pathlib import Path
from supervisor.watching import Watching

async def main(base):
    changed = trio.Event()
    watching = Watching(lambda job, cause: (print(job, cause), changed.set()), lambda text: print("warning:", text))
    watching.watch({"x": (f"{base}/*/*",)}, base, ())
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watching.run)
            await trio.testing.wait_all_tasks_blocked(0.05)
            for each in sorted(base.iterdir()):
                (each / "file").touch()
            await changed.wait()
            watching.watch({"x": (f"{base}/*/*",)}, base, ())
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()

import trio.testing
trio.run(main, Path(sys.argv[1]))
"""


def test_too_many_watches_are_one_warning_for_each_reload_and_the_rest_is_watched(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}").mkdir()
    few = len(tmp_path.parts) + 5
    limited = f'echo {few} > /proc/sys/user/max_inotify_watches && exec "$0" -c \'{FEW}\' "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", limited, sys.executable, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if "unshare" in done.stderr or "max_inotify_watches" in done.stderr:
        pytest.skip(f"no user namespace to be had: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    warnings = [line for line in lines if line.startswith("warning:")]
    assert len(warnings) == 2 and "too many watches: raise fs.inotify.max_user_watches" in warnings[0]
    assert lines[1].startswith("x changed: ")
