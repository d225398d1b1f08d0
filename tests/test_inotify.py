"""What the kernel says of real directories."""

import os
import resource

import pytest
import trio

from supervisor.inotify import CREATE, DELETE, DELETE_SELF, IS_DIRECTORY, ONLY_DIRECTORY, Inotify


async def test_what_happens_is_told_with_its_watch_and_name(tmp_path):
    (tmp_path / "a").mkdir()
    with trio.fail_after(30), Inotify() as inotify:
        here, below = inotify.watch(tmp_path, CREATE), inotify.watch(tmp_path / "a", CREATE | DELETE)
        (tmp_path / "ünï").touch()
        (tmp_path / "a" / "b").mkdir()
        (tmp_path / "a" / "b").rmdir()
        told = await inotify.wait()
    assert told == [
        (here, CREATE, "ünï"),
        (below, CREATE | IS_DIRECTORY, "b"),
        (below, DELETE | IS_DIRECTORY, "b"),
    ]


async def test_of_itself_a_directory_has_no_name(tmp_path):
    (tmp_path / "a").mkdir()
    with trio.fail_after(30), Inotify() as inotify:
        watch = inotify.watch(tmp_path / "a", DELETE_SELF)
        (tmp_path / "a").rmdir()
        assert (watch, DELETE_SELF, "") in await inotify.wait()


async def test_what_is_unwatched_is_silent_and_the_wait_can_be_cancelled(tmp_path):
    with Inotify() as inotify:
        inotify.unwatch(inotify.watch(tmp_path, CREATE))
        (tmp_path / "a").touch()
        with trio.move_on_after(0.05):
            assert [each for each in await inotify.wait() if each.name] == []
            await inotify.wait()


def test_what_cannot_be_watched_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    with Inotify() as inotify:
        with pytest.raises(FileNotFoundError):
            inotify.watch(tmp_path / "nowhere", CREATE)
        with pytest.raises(NotADirectoryError):
            inotify.watch(tmp_path / "file", CREATE | ONLY_DIRECTORY)


def test_without_a_descriptor_there_is_none_and_none_is_left_behind():
    before = set(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Inotify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with Inotify():
        pass
    assert set(os.listdir("/proc/self/fd")) == before
