"""Log files: rotation by age, compression, crashes in the middle of it, and everything that can happen to a name."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from test_output import run, until, write

from supervisor.output import LogFile, Rotate, archive, files, open_outputs
from supervisor.output.kept import TAIL
from supervisor.spec import Bytes, Seconds


@pytest.fixture
async def outputs(tmp_path):
    with trio.fail_after(60):
        async with open_outputs(tmp_path / "logs") as outputs:
            yield outputs


def number(path: Path) -> int:
    return int(path.name.removesuffix(".gz").rpartition(".")[2])


def aside(log: Path) -> list[Path]:
    """The files put aside, oldest first."""
    return sorted((each for each in log.parent.glob(log.name + ".*") if each.suffix != ".part"), key=number, reverse=True)


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def stored(log: Path) -> bytes:
    return b"".join(content(each) for each in [*aside(log), log] if each.exists())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def aging(path: Path, clock: Clock, age: float = 60, size: int = 0, keep: int = 9) -> LogFile:
    return LogFile(path, Rotate(size=Bytes(size), age=Seconds(age), keep=keep), make_directory=True, clock=clock)


# -- age ----------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_too_old_is_put_aside_before_the_next_line(tmp_path):
    log, clock = tmp_path / "job.log", Clock()
    file = aging(log, clock)
    file.write(b"first\n")
    clock.now += 59.9
    file.write(b"second\n")
    assert aside(log) == []
    clock.now += 0.1
    assert file.write(b"third\nfourth\n") == (13, 0)
    assert [content(each) for each in aside(log)] == [b"first\nsecond\n"]
    clock.now += 59
    file.write(b"fifth\n")
    assert log.read_bytes() == b"third\nfourth\nfifth\n"
    file.close()


def test_a_line_at_hand_is_finished_in_the_old_file(tmp_path):
    log, clock = tmp_path / "job.log", Clock()
    file = aging(log, clock)
    file.write(b"begun, ")
    clock.now += 100
    file.write(b"going on, ")
    file.write(b"ended\nthe next\n")
    assert stored(log) == b"begun, going on, ended\nthe next\n"
    assert log.read_bytes() == b"the next\n"
    file.close()


def test_an_empty_file_does_not_grow_old(tmp_path):
    log, clock = tmp_path / "job.log", Clock()
    log.touch()
    file = aging(log, clock)
    file.write(b"")
    clock.now += 1000
    file.write(b"first\n")
    assert aside(log) == []
    file.close()


def test_the_age_counts_on_from_run_to_run(tmp_path):
    log, clock = tmp_path / "job.log", Clock()
    file = aging(log, clock)
    for _ in range(3):
        file.write(b"line\n")
        file.close()
        clock.now += 20
    file.write(b"after a minute\n")
    file.close()
    assert [content(each) for each in aside(log)] == [b"line\n" * 3]


@pytest.mark.parametrize("birth", [True, False])
def test_the_age_over_a_restart_of_the_daemon_comes_from_the_file(tmp_path, monkeypatch, birth):
    log = tmp_path / "job.log"
    log.write_bytes(b"of an earlier life\n")
    if birth:
        monkeypatch.setattr(files, "_birth", lambda fd: log.stat().st_mtime - 100)
    else:
        monkeypatch.setattr(files, "_birth", lambda fd: 0.0)
    for age, wanted in ((1000, 0), (60, 1)):
        if not birth:
            os.utime(log, (log.stat().st_atime, log.stat().st_mtime - 100))
        file = aging(log, Clock(), age=age)
        file.write(b"of this\n")
        file.close()
        assert len(aside(log)) == wanted
    assert stored(log) == b"of an earlier life\nof this\nof this\n"


def test_the_birth_of_a_file_is_known_or_said_not_to_be(tmp_path):
    log = tmp_path / "job.log"
    log.touch()
    with log.open("rb") as file:
        born = files._birth(file.fileno())
        assert born == 0.0 or abs(born - log.stat().st_mtime) < 5
    known = subprocess.run(["stat", "-c", "%W", str(log)], capture_output=True, text=True, check=True).stdout.strip()
    assert int(born) == (0 if known in ("-", "0") else int(known))


def test_a_clock_that_was_set_back_makes_no_file_old(tmp_path):
    log = tmp_path / "job.log"
    log.write_bytes(b"x\n")
    later = log.stat().st_mtime + 1e6
    os.utime(log, (later, later))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_birth", lambda fd: later)
        file = aging(log, Clock(), age=1)
        file.write(b"y\n")
        file.close()
    assert aside(log) == []


async def test_age_costs_no_wake_up(tmp_path, autojump_clock):
    async with open_outputs(tmp_path / "logs") as outputs:
        capture = outputs.open("job", rotate=Rotate(age=Seconds(10)))
        write(capture, b"one\n")
        capture.drain()
        await trio.sleep(1000)
        write(capture, b"two\n")
        capture.finish()
        assert [content(each) for each in aside(tmp_path / "logs/job.log")] == [b"one\n"]
        assert len(outputs.nursery.child_tasks) <= 2  # the pump, and the one that waits for the end of this pipe


pieces = st.sampled_from([b"\n", b"a", b"bb\n", b"\r\n", b"\0", b"\xff" * 7, "é".encode()[:1], "é".encode()[1:]])
steps = st.lists(st.tuples(st.lists(pieces, max_size=6).map(b"".join), st.sampled_from([0, 1, 5])), max_size=8)


@settings(deadline=None)
@given(steps, st.sampled_from([0, 5, 20]), st.integers(2, 8))
def test_bytes_on_disk_are_bytes_written_whatever_the_chunks_and_the_clock(steps, size, age):
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "job.log")
        file = aging(log, clock, age=age, size=size, keep=1000)
        for chunk, passed in steps:
            clock.now += passed
            assert file.write(chunk) == (len(chunk), 0)
        file.close()
        assert stored(log) == b"".join(chunk for chunk, _ in steps)
        for each in aside(log):
            data = each.read_bytes()
            assert data.endswith(b"\n") or (size and len(data) - data.rfind(b"\n") - 1 >= size)


# -- compression --------------------------------------------------------------------------------------------------------


def packed(size: int = 20_000, keep: int = 100) -> Rotate:
    return Rotate(size=Bytes(size), keep=keep, compress=True)


def all_packed(log: Path) -> bool:
    return all(each.suffix == ".gz" for each in log.parent.glob(log.name + ".*"))


async def test_files_put_aside_are_compressed_and_the_tail_reads_on_into_them(outputs, tmp_path):
    log = tmp_path / "logs/job.log"
    await run(outputs.open("job", rotate=packed()), "seq", "40000")
    everything = b"".join(b"%d\n" % each for each in range(1, 40_001))
    for lines in (39_999, 5_000):
        assert await outputs.tail("job", lines) == b"".join(everything.splitlines(keepends=True)[-lines:])
    await until(lambda: all_packed(log))
    assert len(aside(log)) == len(everything) // 20_000
    assert stored(log) == everything
    assert all(each.stat().st_mode & 0o777 == 0o600 for each in aside(log))
    for lines in (1, 9_000, 20_000, 39_999, 40_000, 50_000):
        assert await outputs.tail("job", lines) == b"".join(everything.splitlines(keepends=True)[-lines:])


async def test_numbers_stay_right_when_some_are_compressed(outputs, tmp_path):
    log = tmp_path / "logs/job.log"
    for rotate in (packed(50, 6), Rotate(size=Bytes(50), keep=6), packed(50, 6)):
        for each in range(12):
            await run(outputs.open("job", rotate=rotate), "echo", f"line {each}: {'x' * 30}")
        await trio.testing.wait_all_tasks_blocked()
    await until(lambda: all_packed(log))
    assert [number(each) for each in aside(log)] == [6, 5, 4, 3, 2, 1]
    kept = [content(each).split(b":")[0] for each in [*aside(log), log]]
    assert kept == [b"line %d" % each for each in range(5, 12)]


async def test_a_daemon_that_died_while_it_compressed_has_lost_nothing(outputs, tmp_path):
    """Half a file, or the whole one with the plain one still there: what a SIGKILL at any moment leaves."""
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "job.log").write_bytes(b"4\n")
    (logs / "job.log.1").write_bytes(b"3\n")
    (logs / "job.log.gz.part").write_bytes(gzip.compress(b"3\n")[:-5])
    (logs / "job.log.2").write_bytes(b"2\n")
    (logs / "job.log.2.gz").write_bytes(gzip.compress(b"2\n"))
    (logs / "job.log.3.gz").write_bytes(gzip.compress(b"1\n"))
    capture = outputs.open("job", rotate=packed(2, 9))
    assert await outputs.tail("job", 9) == b"1\n2\n3\n4\n"
    write(capture, b"5\n")
    capture.finish()
    await until(lambda: all_packed(logs / "job.log"))
    assert sorted(each.name for each in logs.iterdir()) == ["job.log", *(f"job.log.{each}.gz" for each in (1, 2, 3, 4))]
    assert stored(logs / "job.log") == b"1\n2\n3\n4\n5\n"
    assert await outputs.tail("job", 9) == b"1\n2\n3\n4\n5\n"


KILLED = """
import os, sys, trio
from pathlib import Path
from supervisor.output import Rotate, open_outputs
from supervisor.spec import Bytes
async def main():
    async with open_outputs(Path(sys.argv[1])) as outputs:
        capture = outputs.open("job", rotate=Rotate(size=Bytes(10_000), keep=1000, compress=True))
        for number in range(int(sys.argv[2]), 10**9):
            os.write(capture.fd, b"%d %s\\n" % (number, b"x" * 90))
            capture.drain()
            os.write(1, b"%d\\n" % number)
            if number % 500 == 0:
                await trio.lowlevel.checkpoint()
trio.run(main)
"""


def test_kill_9_at_any_moment_of_rotating_and_compressing_leaves_every_line_once(tmp_path):
    log, next_number = tmp_path / "job.log", 0
    for round_ in range(5):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(next_number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as child:
            assert child.stdout is not None
            for _ in range(1200 + 271 * round_):
                last = child.stdout.readline()
            child.kill()
            rest = child.stdout.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        next_number = int(rest or last) + 1
        lines = [int(line.split()[0]) for line in _without_doubles(log).splitlines()]
        assert lines[:next_number] == list(range(next_number))
        next_number = len(lines)


def _without_doubles(log: Path) -> bytes:
    """A file that is there plain and compressed counts once."""
    names = {number(each): each for each in sorted(aside(log), key=lambda each: each.suffix == ".gz")}
    return b"".join(content(names[each]) for each in sorted(names, reverse=True)) + (log.read_bytes() if log.exists() else b"")


async def test_a_disk_that_has_no_room_for_compressing_keeps_the_plain_file_and_is_told(outputs, tmp_path, monkeypatch):
    reports = []
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/job.log.gz.part").mkdir()
    capture = outputs.open("job", rotate=packed(10), on_lost=lambda count, cause: reports.append((count, cause)))
    write(capture, b"line one\nline two\n")
    capture.finish()
    await until(lambda: reports)
    assert reports[0][0] == 0 and "cannot compress" in reports[0][1] and "job.log" in reports[0][1]
    assert stored(tmp_path / "logs/job.log") == b"line one\nline two\n"


async def test_leaving_does_not_wait_for_a_large_file_to_be_compressed(tmp_path):
    with trio.fail_after(60):
        async with open_outputs(tmp_path) as outputs:
            capture = outputs.open("job", rotate=packed(10))
            with (tmp_path / "job.log").open("wb") as file:
                file.truncate(20 << 30)  # sparse: minutes of compressing
            write(capture, b"line\n")
            capture.finish()
            await until((tmp_path / "job.log.gz.part").exists)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["job.log", "job.log.1"]


async def test_a_file_that_is_dropped_while_it_is_compressed_is_given_up(outputs, tmp_path):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs/job.log"
    with log.open("wb") as file:
        file.truncate(20 << 30)
    capture = outputs.open("job", rotate=packed(25, 2))
    write(capture, b"line\n")
    capture.drain()
    await until((tmp_path / "logs/job.log.gz.part").exists)
    for each in range(4):
        write(capture, b"line %d: more than ten\n" % each)
        capture.drain()
    capture.finish()
    await until(lambda: len(aside(log)) == 2 and all_packed(log))
    assert [content(each)[:7] for each in [*aside(log), log]] == [b"line 1:", b"line 2:", b"line 3:"]


def test_a_compressed_file_is_read_from_its_end_and_a_damaged_one_as_far_as_it_goes(tmp_path):
    data = os.urandom(3 << 20) + bytes(3 << 20)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(data, 1))
    with path.open("rb") as file:
        length, end = archive.unpacked(file.fileno(), TAIL)
    assert length == len(data) and data.endswith(end) and TAIL <= len(end) < TAIL + (2 << 20)
    path.write_bytes(path.read_bytes()[: 1 << 20])
    with path.open("rb") as file:
        length, end = archive.unpacked(file.fileno(), TAIL)
    assert data.startswith(end) and length == len(end) > 1 << 19
    path.write_bytes(b"no gzip at all")
    with path.open("rb") as file:
        assert archive.unpacked(file.fileno(), TAIL) == (0, b"")


# -- what can happen to a name (F29) ------------------------------------------------------------------------------------


def to_nothing(log: Path) -> None:
    log.unlink()


def to_no_directory(log: Path) -> None:
    shutil.rmtree(log.parent)


def moved_away(log: Path) -> None:
    log.rename(log.with_name("moved"))


def moved_away_and_made_anew(log: Path) -> None:
    log.rename(log.with_name("moved"))
    log.touch()


def truncated(log: Path) -> None:
    os.truncate(log, 0)


@pytest.mark.parametrize("what", [to_nothing, to_no_directory, moved_away, moved_away_and_made_anew, truncated])
async def test_what_others_do_to_the_file_loses_nothing_that_comes_after(outputs, tmp_path, what):
    lost = []
    log = tmp_path / "logs/job.log"
    capture = outputs.open("job", on_lost=lambda *loss: lost.append(loss))
    write(capture, b"before\n")
    capture.drain()
    what(log)
    write(capture, b"after\n")
    capture.finish()
    assert log.read_bytes() == b"after\n"
    assert lost == []
    if (moved := tmp_path / "logs/moved").exists():
        assert moved.read_bytes() == b"before\n"


def a_directory(log: Path) -> None:
    log.mkdir()


def a_symlink(log: Path) -> None:
    (log.parent / "secret").write_bytes(b"secret\n")
    log.symlink_to(log.parent / "secret")


def a_fifo(log: Path) -> None:
    os.mkfifo(log)


def a_socket(log: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(log))


def a_full_device(log: Path) -> None:
    os.mknod(log, 0o20666, os.makedev(1, 7))


def a_file_for_a_directory(log: Path) -> None:
    shutil.rmtree(log.parent)
    log.parent.write_bytes(b"in the way")


@pytest.mark.parametrize("what", [a_directory, a_symlink, a_fifo, a_socket, a_full_device, a_file_for_a_directory])
async def test_what_is_put_in_the_place_of_the_file_costs_only_what_comes_meanwhile(outputs, tmp_path, what):
    if what is a_full_device and os.geteuid() != 0:
        pytest.skip("making a device takes root")
    reports = []
    log = tmp_path / "logs/job.log"
    capture = outputs.open("job", on_lost=lambda count, cause: reports.append((count, cause)))
    write(capture, b"before\n")
    capture.drain()
    log.unlink()
    what(log)
    for _ in range(3):
        write(capture, b"lost\n")
        capture.drain()
    assert [count for count, _ in reports] == [5] and str(log) in reports[0][1]
    if what is a_symlink:
        assert (log.parent / "secret").read_bytes() == b"secret\n"
    if log.parent.is_dir():
        log.rmdir() if log.is_dir() else log.unlink()
    else:
        log.parent.unlink()
    write(capture, b"after\n")
    capture.finish()
    assert log.read_bytes() == b"after\n"
    assert [count for count, _ in reports] == [5, 10]
    assert await outputs.tail("job", 3) == b"lost\nlost\nafter\n"


async def test_a_directory_that_may_not_be_entered_any_more_does_not_matter_to_an_open_file(outputs, tmp_path, monkeypatch):
    """Permission lost: root is never refused, so the refusal is the system call's, injected."""
    lost = []
    capture = outputs.open("job", on_lost=lambda *loss: lost.append(loss))
    write(capture, b"before\n")
    capture.drain()

    def refuse(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", refuse)
    write(capture, b"after\n")
    capture.finish()
    monkeypatch.undo()
    assert (tmp_path / "logs/job.log").read_bytes() == b"before\nafter\n" and lost == []


@pytest.mark.parametrize("error", [5, 28, 122, 30, 13])
async def test_each_error_of_a_write_is_counted_told_once_and_over_when_it_is_over(outputs, tmp_path, monkeypatch, error):
    """EIO, ENOSPC, EDQUOT, EROFS, EACCES: those that need hardware or a quota are injected at the system call."""
    reports = []
    capture = outputs.open("job", on_lost=lambda count, cause: reports.append((count, cause)))
    real, failing = os.write, [False]

    def failing_write(fd: int, data: bytes) -> int:
        if failing[0] and fd != capture.fd:
            raise OSError(error, os.strerror(error))
        return real(fd, data)

    monkeypatch.setattr(os, "write", failing_write)
    for failing[0] in (False, True, True, True, False):
        write(capture, b"12345\n")
        capture.drain()
    monkeypatch.undo()
    capture.finish()
    assert [count for count, _ in reports] == [6, 12]
    assert os.strerror(error) in reports[0][1] and "can be written again" in reports[1][1]
    assert (tmp_path / "logs/job.log").read_bytes() == b"12345\n" * 2
