"""A file is written whole or not at all: whatever fails, whoever is killed, whenever it is cancelled."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor import write_atomic
from supervisor.atomic import LOOK, PIECE, _replace, write_atomic_sync

ROOT = Path(__file__).parent.parent
OLD = b"the old content"
NEW = b"the new content, which is longer"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing owners and mounting take root")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    return path


def others(file: Path) -> list[str]:
    """What else is there."""
    return sorted(each.name for each in file.parent.iterdir() if each != file)


async def test_it_is_written(file):
    await write_atomic(file, NEW)
    assert file.read_bytes() == NEW
    await write_atomic(str(file), "grün")
    assert file.read_bytes() == "grün".encode()
    assert others(file) == []


@given(st.binary(max_size=200), st.integers(1, 7))
def test_every_content_arrives_in_pieces_of_every_size(tmp_path_factory, content, piece):
    file = tmp_path_factory.mktemp("pieces") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("supervisor.atomic.PIECE", piece)
        write_atomic_sync(file, content, durable=False)
    assert file.read_bytes() == content


def test_a_new_file_has_the_mode_that_was_asked_for_and_an_old_one_keeps_its_own(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomic_sync(tmp_path / "new", NEW, mode=0o644)
        write_atomic_sync(tmp_path / "private", NEW)
        (tmp_path / "new").chmod(0o604)
        write_atomic_sync(tmp_path / "new", OLD, mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


@as_root
def test_a_file_keeps_its_owner_and_the_bits_that_a_change_of_owner_takes_away(file):
    os.chown(file, 12345, 54321)
    file.chmod(0o4750)
    write_atomic_sync(file, NEW)
    found = file.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 54321, 0o4750)


def test_a_link_is_followed_and_stays_a_link(file):
    link, dangling = file.with_name("link"), file.with_name("dangling")
    link.symlink_to("file")
    dangling.symlink_to("made")
    write_atomic_sync(link, NEW)
    write_atomic_sync(dangling, OLD)
    assert link.is_symlink() and file.read_bytes() == NEW
    assert dangling.is_symlink() and file.with_name("made").read_bytes() == OLD


@pytest.mark.parametrize("what", ["a directory", "a pipe", "a link to itself"])
def test_what_is_no_file_is_not_replaced(tmp_path, what):
    target = tmp_path / "target"
    {"a directory": target.mkdir, "a pipe": lambda: os.mkfifo(target), "a link to itself": lambda: target.symlink_to(target)}[
        what
    ]()
    before = target.lstat()
    with pytest.raises(OSError, match=f"not replaced.*{target}"):
        write_atomic_sync(target, NEW)
    assert os.path.samestat(before, target.lstat())
    assert others(target) == []


def test_a_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "missing")):
        write_atomic_sync(tmp_path / "missing" / "file", NEW)


# -- cancellation -------------------------------------------------------------------------------------------------------


def test_wherever_it_looks_whether_it_was_cancelled_nothing_has_happened_yet(file):
    content = b"x" * (3 * PIECE + 1)
    looks = 0

    def count():
        nonlocal looks
        looks += 1

    _replace(file.with_name("count"), content, 0o600, False, count)
    file.with_name("count").unlink()
    assert looks == 5  # before each piece, and before the name is taken
    for last in range(1, looks + 1):
        left = iter(range(last - 1))
        with pytest.raises(StopIteration):
            _replace(file, content, 0o600, False, lambda left=left: next(left))
        assert file.read_bytes() == OLD
        assert others(file) == []


async def test_cancelled_before_it_begins_it_does_nothing(file):
    with trio.CancelScope() as scope:
        scope.cancel(reason="the test says so")
        await write_atomic(file, NEW)
    assert scope.cancelled_caught
    assert file.read_bytes() == OLD
    assert others(file) == []


@pytest.mark.parametrize("last", range(1, 5))
async def test_cancelled_in_the_middle_it_says_truly_that_it_was_not_written(file, monkeypatch, last):
    """The writing thread waits where it looks for the `last` time, until it has been cancelled."""
    real, looks = trio.from_thread.check_cancelled, iter(range(1, 5))
    entered, go_on = threading.Event(), threading.Event()

    def look():
        if next(looks) == last:
            entered.set()
            assert go_on.wait(50)
        real()

    monkeypatch.setattr("trio.from_thread.check_cancelled", look)
    written = False
    async with trio.open_nursery() as nursery:

        async def write():
            nonlocal written
            await write_atomic(file, b"x" * (2 * PIECE + 1))
            written = True

        nursery.start_soon(write)
        await trio.to_thread.run_sync(entered.wait, 50)
        assert others(file) == [".file.0.draft"]
        nursery.cancel_scope.cancel(reason="the test says so")
        go_on.set()
    assert not written
    assert file.read_bytes() == OLD
    assert others(file) == []


# -- several writers, and killed ones -----------------------------------------------------------------------------------


def test_writers_of_the_same_file_at_the_same_time_each_write_it_whole(file):
    versions = [bytes([number]) * 300_000 for number in range(20)]
    threads = [threading.Thread(target=write_atomic_sync, args=(file, version)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_bytes() in versions
    assert others(file) == []


def test_a_draft_is_left_alone_while_its_writer_lives_and_removed_when_it_is_dead(file):
    drafts = [file.with_name(f".file.{number}.draft") for number in range(LOOK)]
    for draft in drafts:
        draft.write_bytes(b"half")
    with drafts[2].open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write_atomic_sync(file, NEW)
        assert others(file) == [".file.2.draft"]
    write_atomic_sync(file, NEW)
    assert others(file) == []


def test_the_longest_name_has_a_draft(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        write_atomic_sync(tmp_path / name, NEW)
        assert (tmp_path / name).read_bytes() == NEW


WRITER = """
import itertools, sys
from supervisor.atomic import write_atomic_sync
for number in itertools.count(int(sys.argv[2])):
    write_atomic_sync(sys.argv[1], f"{number}\\n" * 40_000)
    print(number, flush=True)
"""


@pytest.mark.parametrize("rounds", [8, pytest.param(300, marks=[pytest.mark.long, pytest.mark.limit(900)])])
async def test_killed_at_any_moment_it_leaves_the_old_version_or_the_new(tmp_path, rounds):
    file, done, chance = tmp_path / "file", 0, random.Random(rounds)
    for _ in range(rounds):
        program = [sys.executable, "-c", WRITER, str(file), str(done + 1)]
        writer = await trio.lowlevel.open_process(program, cwd=ROOT, stdout=subprocess.PIPE)
        said = b""
        while said.count(b"\n") < 3:
            said += await writer.stdout.receive_some()
        await trio.sleep(chance.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        await writer.wait()
        async for chunk in writer.stdout:
            said += chunk
        done = int(said.split()[-1])
        lines = file.read_text().splitlines()
        assert len(lines) == 40_000 and set(lines) in ({str(done)}, {str(done + 1)})
        assert len(others(file)) <= 1
    write_atomic_sync(file, NEW)
    assert others(file) == []


# -- faults of the disk -------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_become_so_large_is_an_error_that_names_it_and_leaves_the_old(file):
    code = f"""
import resource
from supervisor.atomic import write_atomic_sync
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomic_sync({str(file)!r}, b"x" * 200_000)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "File too large" in done.stdout and str(file) in done.stdout, done.stderr
    assert file.read_bytes() == OLD
    assert others(file) == []


@as_root
def test_on_a_full_disk_and_on_one_that_is_read_only_the_old_content_stays():
    script = Path(__file__).with_name("small_disk.py")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(script), "atomic"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = json.loads(done.stdout or done.stderr)
    assert "No space left" in said["full"] and "file" in said["full"]
    assert "Read-only" in said["read only"]
    assert said["content"] == ["old", "old"]
    assert said["names"] == ["file"]
