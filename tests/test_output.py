"""Captured output: real pipes and files; rotation, ring and lines under arbitrary chunking."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.events import Lagged
from supervisor.output import LINE, Follower, Lines, LogFile, Rotate, open_outputs, pump
from supervisor.output.kept import FOLLOW, RING, Ring, last_lines
from supervisor.spec import Bytes


@pytest.fixture
async def outputs(tmp_path):
    with trio.fail_after(30):
        async with open_outputs(tmp_path / "logs") as outputs:
            yield outputs


def rotate(size: int, keep: int = 1000) -> Rotate:
    return Rotate(size=Bytes(size), keep=keep)


def stored(path: Path) -> bytes:
    """The files of a log, oldest first, as one."""
    aside = sorted(path.parent.glob(path.name + ".*"), key=lambda each: -int(each.suffix[1:]))
    return b"".join(each.read_bytes() for each in [*aside, path] if each.exists())


def start(capture, *argv: str) -> subprocess.Popen:
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=capture.fd, stderr=capture.fd)
    capture.release()
    return child


async def ended(child: subprocess.Popen) -> None:
    fd = os.pidfd_open(child.pid)
    await trio.lowlevel.wait_readable(fd)
    os.close(fd)
    child.wait()


async def run(capture, *argv: str) -> None:
    await ended(start(capture, *argv))
    capture.finish()


async def closed(capture) -> None:
    while not capture.closed:
        await trio.sleep(0.005)


def write(capture, data: bytes) -> None:
    """Play the child."""
    assert os.write(capture.fd, data) == len(data)


async def until(condition) -> None:
    while not condition():
        await trio.sleep(0.001)


async def test_stdout_and_stderr_are_stored_in_the_order_they_were_written(outputs, tmp_path):
    await run(outputs.open("job"), "sh", "-c", "for i in 1 2 3; do echo out $i; echo err $i >&2; done")
    assert (tmp_path / "logs/job.log").read_bytes() == b"out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n"


async def test_the_file_is_made_with_the_first_byte_and_for_its_owner_only(outputs, tmp_path):
    capture = outputs.open("job")
    assert not (tmp_path / "logs").exists()
    await run(capture, "echo", "hello")
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "logs/job.log").stat().st_mode & 0o777 == 0o600


async def test_what_a_child_prints_before_it_exits_at_once_is_there_before_its_end(outputs, tmp_path):
    for number in range(20):
        capture = outputs.open(f"job{number}")
        await run(capture, "sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x; echo; exit 0")
        assert (tmp_path / f"logs/job{number}.log").read_bytes() == b"x" * 100_000 + b"\n"
        assert capture.closed


async def test_binary_output_without_a_line_end_is_stored_byte_for_byte(outputs, tmp_path):
    data = bytes(range(256)) * 700 + b"\xff\xfe no end"
    (tmp_path / "data").write_bytes(data)
    await run(outputs.open("job"), "cat", str(tmp_path / "data"))
    assert (tmp_path / "logs/job.log").read_bytes() == data


async def test_a_child_that_fills_its_pipe_goes_on(outputs, tmp_path):
    await run(outputs.open("job"), "head", "-c", "20000000", "/dev/zero")
    assert stored(tmp_path / "logs/job.log") == bytes(20_000_000)


async def test_a_child_that_closes_its_output_early_lives_on(outputs):
    capture = outputs.open("job")
    child = start(capture, "sh", "-c", "echo bye; exec >&- 2>&-; exec sleep 100")
    await closed(capture)
    assert child.poll() is None
    assert await outputs.tail("job", 10) == b"bye\n"
    child.kill()
    await ended(child)
    capture.finish()


async def test_a_grandchild_that_holds_the_pipe_delays_nothing_and_is_read_until_it_is_silent(outputs):
    capture = outputs.open("job")
    child = start(capture, "sh", "-c", "(echo first; sleep 0.05; echo second; exec sleep 100) & echo $!")
    await ended(child)
    started = trio.current_time()
    capture.finish()
    assert trio.current_time() - started < 0.05
    await closed(capture)
    lines = (await outputs.tail("job", 10)).split()
    assert {b"first", b"second"} <= set(lines)
    os.kill(*(int(line) for line in lines if line.isdigit()), 9)


async def test_a_grandchild_that_never_stops_printing_is_cut_off(outputs, monkeypatch):
    monkeypatch.setattr(pump, "HARD_LIMIT", 0.3)
    capture = outputs.open("job")
    child = start(capture, "sh", "-c", "(while sleep 0.01; do echo more || exit; done) & exit 3")
    await ended(child)
    capture.finish()
    await closed(capture)  # and the grandchild dies of SIGPIPE


async def test_the_ring_survives_a_restart_and_stays_small(outputs):
    await run(outputs.open("job"), "sh", "-c", "echo one")
    await run(outputs.open("job"), "sh", "-c", "echo two; head -c 200000 /dev/zero; echo; echo three")
    assert len(outputs._logs["job"].ring.content()) == RING
    assert sum(map(len, outputs._logs["job"].ring._chunks)) < 2 * RING
    assert await outputs.tail("job", 1) == b"three\n"
    assert await outputs.tail("job", 0) == b""


async def test_the_tail_goes_on_into_the_files_and_those_put_aside(outputs, tmp_path):
    await run(outputs.open("job", rotate=rotate(50_000)), "seq", "40000")
    everything = b"".join(b"%d\n" % number for number in range(1, 40_001))
    assert stored(tmp_path / "logs/job.log") == everything
    for lines in (1, 100, 9_000, 20_000, 39_999, 40_000, 50_000):
        assert await outputs.tail("job", lines) == b"".join(everything.splitlines(keepends=True)[-lines:])


async def test_the_tail_finds_what_an_earlier_daemon_stored(tmp_path):
    for number in (1, 2):
        async with open_outputs(tmp_path / "logs") as outputs:
            await run(outputs.open("job"), "echo", str(number))
            assert await outputs.tail("job", 5) == b"".join(b"%d\n" % each for each in range(1, number + 1))
    async with open_outputs(tmp_path / "logs") as outputs:
        assert await outputs.tail("job", 5) == b"1\n2\n"
        assert await outputs.tail("unheard-of", 5) == b""


async def test_a_follower_begins_where_the_tail_ends_and_follows_through_rotations_and_restarts(outputs):
    await run(outputs.open("job"), "echo", "before")
    with outputs.follow("job") as follower:
        assert await outputs.tail("job", 5) == b"before\n"
        for _ in range(2):
            await run(outputs.open("job", rotate=rotate(100)), "seq", "100")
        wanted = b"".join(b"%d\n" % number for number in range(1, 101)) * 2
        got = b""
        while len(got) < len(wanted):
            got += await anext(follower)
    assert got == wanted


async def test_a_slow_follower_is_told_how_much_it_missed_and_gets_the_rest(outputs):
    with outputs.follow("job") as follower:
        await run(outputs.open("job"), "head", "-c", str(3 * FOLLOW), "/dev/zero")
        got = lost = 0
        while got + lost < 3 * FOLLOW:
            match await anext(follower):
                case Lagged(count=count):
                    lost += count
                case chunk:
                    got += len(chunk)
        assert got + lost == 3 * FOLLOW
        assert 0 < got <= FOLLOW
        await run(outputs.open("job"), "echo", "again")
        assert await anext(follower) == b"again\n"


async def test_a_job_waits_for_a_follower_that_must_lose_nothing(outputs):
    script = "import os\nfor at in range(128): os.write(1, bytes([at]) * 65536)"
    with outputs.follow("job", lossless=True) as follower:
        capture = outputs.open("job")
        child = start(capture, sys.executable, "-c", script)
        while not capture.paused:  # nothing tells when a child stands still
            await trio.sleep(0.005)
        assert child.poll() is None and FOLLOW < capture.received < FOLLOW + 4 * 65536
        got = b""
        while len(got) < 128 * 65536:
            got += await anext(follower)
        assert got == b"".join(bytes([at]) * 65536 for at in range(128))
        await ended(child)
        capture.finish()


async def test_a_job_does_not_wait_for_a_follower_that_has_gone(outputs):
    capture = outputs.open("job")
    with outputs.follow("job", lossless=True):
        child = start(capture, sys.executable, "-c", "import os\nfor at in range(128): os.write(1, bytes(65536))")
        while not capture.paused:
            await trio.sleep(0.005)
    await ended(child)
    capture.finish()
    assert capture.received == 128 * 65536


async def test_a_follower_of_a_job_that_is_forgotten_reads_to_the_end(outputs):
    with outputs.follow("job") as follower:
        await run(outputs.open("job"), "echo", "last")
        outputs.discard("job")
        assert [chunk async for chunk in follower] == [b"last\n"]


async def test_a_follower_hears_of_its_loss_where_it_happened():
    follower = Follower()
    follower.put(b"first")
    follower.put(bytes(FOLLOW))
    assert await anext(follower) == b"first"
    follower.put(b"there is room again")
    assert await anext(follower) == Lagged(FOLLOW + len(b"there is room again"))
    follower.put(b"last")
    assert await anext(follower) == b"last"


async def test_slow_lines_are_gathered(outputs):
    capture = outputs.open("job")
    with outputs.follow("job") as follower:
        for _ in range(100):
            write(capture, b"line\n")
            await trio.sleep(0.001)
        capture.finish()
        chunks = [await anext(follower)]
        while sum(map(len, chunks)) < 500:
            chunks.append(await anext(follower))
    assert len(chunks) < 50


async def test_lines_are_echoed_with_the_name_of_their_job(tmp_path):
    echoed = []
    async with open_outputs(tmp_path, echo=lambda name, line: echoed.append((name, line))) as outputs:
        await run(outputs.open("a"), "printf", "one\\ntwo\\r\\nlast")
    assert echoed == [("a", b"one"), ("a", b"two"), ("a", b"last")]


async def test_a_watcher_sees_lines_across_chunks_until_it_is_content(outputs):
    seen = []

    def watch(line: bytes) -> bool:
        seen.append(line)
        return line == b"ready to go"

    capture = outputs.open("job", watchers=[watch])
    for piece in (b"sta", b"rting\nready ", b"to go\nmore\n"):
        write(capture, piece)
        capture.drain()
    assert seen == [b"starting", b"ready to go"] or seen == [b"starting", b"ready to go", b"more"]
    write(capture, b"and more\n")
    capture.finish()
    assert b"and more" not in seen


async def test_a_line_without_end_is_watched_in_pieces_and_takes_no_memory(outputs):
    seen = []
    capture = outputs.open("job", watchers=[lambda line: bool(seen.append(len(line)))])
    await run(capture, "head", "-c", "1000000", "/dev/zero")
    assert sum(seen) == 1_000_000
    assert max(seen) == LINE


async def test_a_removed_log_directory_costs_nothing(outputs, tmp_path):
    lost = []
    capture = outputs.open("job", on_lost=lambda count, cause: lost.append(count))
    write(capture, b"before\n")
    capture.drain()
    shutil.rmtree(tmp_path / "logs")
    write(capture, b"after\n")
    capture.finish()
    assert (tmp_path / "logs/job.log").read_bytes() == b"after\n"
    assert not lost


async def test_what_a_broken_file_cannot_take_is_counted_reported_once_and_again_when_it_is_over(outputs, tmp_path):
    reports = []
    capture = outputs.open("job", on_lost=lambda count, cause: reports.append((count, cause)))
    (tmp_path / "logs").write_text("in the way")
    for _ in range(3):
        write(capture, b"12345\n")
        capture.drain()
    assert [count for count, _ in reports] == [6]
    assert "Not a directory" in reports[0][1]
    (tmp_path / "logs").unlink()
    write(capture, b"stored\n")
    capture.finish()
    assert [count for count, _ in reports] == [6, 12]
    assert "can be written again" in reports[1][1]
    assert (tmp_path / "logs/job.log").read_bytes() == b"stored\n"
    assert await outputs.tail("job", 9) == b"12345\n12345\n12345\nstored\n"


async def test_the_tail_joins_ring_and_files_also_after_a_loss(outputs, tmp_path):
    capture = outputs.open("job")
    lines = [b"%06d" % number + b"x" * 93 + b"\n" for number in range(1200)]
    for at, line in enumerate(lines):
        if at == 900:
            os.rename(tmp_path / "logs", tmp_path / "away")
            (tmp_path / "logs").write_text("in the way")
        if at == 1000:
            (tmp_path / "logs").unlink()
            os.rename(tmp_path / "away", tmp_path / "logs")
        write(capture, line)
        capture.drain()
    capture.finish()
    assert stored(tmp_path / "logs/job.log") == b"".join(lines[:900] + lines[1000:])
    assert await outputs.tail("job", 1100) == b"".join(lines[100:])


@pytest.mark.parametrize("path", ["/dev/full", "a symbolic link", "a directory", "a FIFO that nobody reads"])
async def test_a_file_that_takes_nothing_does_not_stop_the_job(outputs, tmp_path, path):
    lost = []
    target = tmp_path / "target"
    match path:
        case "/dev/full":
            target = Path(path)
        case "a symbolic link":
            (tmp_path / "elsewhere").touch()
            target.symlink_to(tmp_path / "elsewhere")
        case "a directory":
            target.mkdir()
        case _:
            os.mkfifo(target)
    capture = outputs.open("job", to=target, on_lost=lambda count, cause: lost.append(count))
    await run(capture, "head", "-c", "300000", "/dev/zero")
    assert sum(lost) == 300_000
    assert not (tmp_path / "elsewhere").exists() or (tmp_path / "elsewhere").read_bytes() == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_loses_what_it_cannot_hold_and_no_more():
    """In a mount namespace of its own: a tmpfs of 64 KB, filled, emptied, filled again."""
    script = Path(__file__).with_name("full_disk.py")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(script.parent.parent)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.stdout.split() == ["lost:", "yes", "accounted:", "yes", "recovered:", "yes"], done.stderr


async def test_a_rotation_that_fails_lets_the_file_grow_and_says_so(outputs, tmp_path):
    reports = []
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/job.log.1").mkdir()
    (tmp_path / "logs/job.log.1/in the way").touch()
    capture = outputs.open("job", rotate=rotate(10, keep=1), on_lost=lambda count, cause: reports.append((count, cause)))
    for number in range(5):
        write(capture, b"line %d\n" % number)
        capture.drain()
    capture.finish()
    assert (tmp_path / "logs/job.log").read_bytes() == b"line 0\nline 1\nline 2\nline 3\nline 4\n"
    assert reports[0][0] == 0
    assert "job.log" in reports[0][1]


async def test_only_so_many_files_are_kept(outputs, tmp_path):
    await run(outputs.open("job", rotate=rotate(1000, keep=3)), "seq", "3000")
    assert sorted(each.name for each in (tmp_path / "logs").iterdir()) == ["job.log", "job.log.1", "job.log.2", "job.log.3"]
    await run(outputs.open("job", rotate=rotate(1000, keep=0)), "seq", "3000")
    assert (tmp_path / "logs/job.log").stat().st_size <= 1000


async def test_no_descriptor_is_left_when_a_run_is_over(outputs):
    await run(outputs.open("job"), "echo", "warm")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await run(outputs.open("job"), "echo", "hello")
    assert set(os.listdir("/proc/self/fd")) == before


async def test_what_the_pipes_hold_is_stored_on_leaving(tmp_path):
    async with open_outputs(tmp_path) as outputs:
        capture = outputs.open("job")
        write(capture, b"last words")
    assert (tmp_path / "job.log").read_bytes() == b"last words"


pieces = st.sampled_from([b"\n", b"a", b"bb\n", b"\r\n", b"\0", b"\xff" * 7])
chunks = st.lists(st.lists(pieces, max_size=6).map(b"".join), max_size=6)


@settings(deadline=None)
@given(chunks, st.integers(1, 20))
def test_rotation_keeps_every_byte_and_tears_no_line_that_fits(chunks, size):
    data = b"".join(chunks)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "job.log")
        file = LogFile(path, rotate(size), make_directory=True)
        assert [file.write(chunk) for chunk in chunks] == [(len(chunk), 0) for chunk in chunks]
        file.close()
        assert stored(path) == data
        aside = sorted(path.parent.glob("job.log.*"), key=lambda each: -int(each.suffix[1:]))
        for each in aside:
            content = each.read_bytes()
            assert len(content) < 2 * size
            assert content.endswith(b"\n") or len(content) - content.rfind(b"\n") - 1 >= size
        if aside and path.exists():
            assert path.read_bytes()


@given(st.lists(st.integers(0, 3 * RING // 2), max_size=30))
def test_the_ring_holds_the_end_and_hardly_more(sizes):
    ring, data = Ring(), b""
    for at, size in enumerate(sizes):
        chunk = bytes([at]) * size
        ring.append(chunk)
        data += chunk
        assert ring.content() == data[-RING:]
        assert sum(map(len, ring._chunks)) < RING + max(sizes, default=0) + 1


@given(chunks)
def test_lines_are_the_same_however_they_are_cut(chunks):
    lines = Lines()
    got = [line for chunk in chunks for line in lines.feed(chunk)] + list(lines.flush())
    data = b"".join(chunks)
    wanted = [line.removesuffix(b"\r") for line in data.split(b"\n")[:-1]]
    rest = data.split(b"\n")[-1]
    assert got == wanted + ([rest.removesuffix(b"\r")] if rest else [])


@given(chunks, st.integers(0, 30))
def test_the_last_lines_are_the_last_lines(chunks, count):
    data = b"".join(chunks)
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    wanted = [line for line in lines if line][-count:] if count else []
    assert last_lines(data, count) == b"".join(wanted)
