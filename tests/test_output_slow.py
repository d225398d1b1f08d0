"""Slow sinks: a FIFO whose reader takes its time. Real pipes throughout."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from test_output import ended, rotate, run, start, until, write

from supervisor import config
from supervisor.events import Warned
from supervisor.output import LogFile, open_outputs, outlet
from supervisor.output.outlet import Outlet
from supervisor.tree import open_supervisor

LINES = b"".join(b"%06d" % number + b"x" * 93 + b"\n" for number in range(20_000))  # 2 MB


@pytest.fixture
async def outputs(tmp_path):
    with trio.fail_after(60):
        async with open_outputs(tmp_path / "logs") as outputs:
            yield outputs


class Reader:
    """The other end of a FIFO, which reads when it is told to."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            os.mkfifo(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.got = b""

    def read(self, size: int = 1 << 20) -> int:
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return 0
        self.got += data
        return len(data)

    async def read_until(self, condition) -> None:
        while self.read() or not condition():
            await trio.sleep(0.001)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def reader(tmp_path):
    reader = Reader(tmp_path / "fifo")
    yield reader
    reader.close()


def printing(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "lines").write_bytes(LINES)
    return ("cat", str(tmp_path / "lines"))


async def test_block_makes_the_child_wait_and_nobody_else_and_loses_nothing(outputs, tmp_path, reader):
    lost = []
    capture = outputs.open("slow", to=tmp_path / "fifo", on_lost=lambda *loss: lost.append(loss))
    child = start(capture, *printing(tmp_path))
    await until(lambda: capture.paused)
    for number in range(20):  # the loop turns, and others are read
        await run(outputs.open("other"), "echo", str(number))
    assert capture.paused and child.poll() is None
    assert capture.received < 200_000  # what the FIFO took, and a chunk that waits
    await reader.read_until(lambda: capture.closed)
    await reader.read_until(lambda: not capture.outlet.full)
    await ended(child)
    capture.finish()
    assert reader.got == LINES
    assert lost == []
    assert (tmp_path / "logs/other.log").read_bytes().split() == [b"%d" % number for number in range(20)]


async def test_drop_lets_the_child_go_on_and_drops_whole_lines_that_are_counted(outputs, tmp_path, reader):
    lost = []
    capture = outputs.open(
        "slow", to=tmp_path / "fifo", on_overload="drop", on_lost=lambda count, cause: lost.append((count, cause))
    )
    await run(capture, *printing(tmp_path))
    assert not capture.paused
    await reader.read_until(lambda: not capture.outlet.full)
    assert sum(count for count, _ in lost) + len(reader.got) == len(LINES)
    assert len(lost) == 2 and all("too slow" in cause for _, cause in lost)  # at once, and at the end of the run
    assert set(reader.got.splitlines(keepends=True)) <= set(LINES.splitlines(keepends=True))
    assert reader.got.splitlines() == sorted(reader.got.splitlines())


async def test_the_end_of_an_overload_is_told_when_it_has_been_calm_for_a_while(outputs, tmp_path, reader, monkeypatch):
    lost = []
    capture = outputs.open(
        "slow", to=tmp_path / "fifo", on_overload="drop", on_lost=lambda count, cause: lost.append((count, cause))
    )
    for _ in range(10):
        write(capture, LINES[:60_000])
        capture.drain()
    await reader.read_until(lambda: not capture.outlet.full)
    write(capture, b"soon after\n")
    capture.drain()
    assert len(lost) == 1
    monkeypatch.setattr(capture.outlet, "_calm_at", trio.current_time())
    write(capture, b"after a while\n")
    capture.finish()
    assert [cause.partition(" ")[2] for _, cause in lost] == ["is too slow", "can be written again"]
    await reader.read_until(lambda: not capture.outlet.full)
    assert sum(count for count, _ in lost) + len(reader.got) == 600_000 + len(b"soon after\nafter a while\n")


async def test_a_stop_never_waits_for_a_slow_sink_and_what_was_printed_still_arrives(outputs, tmp_path, reader):
    script = (
        "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(0))\nwhile True: os.write(1, b'y' * 99 + b'\\n')"
    )
    capture = outputs.open("slow", to=tmp_path / "fifo")
    child = start(capture, sys.executable, "-c", script)
    await until(lambda: capture.paused)
    child.send_signal(signal.SIGTERM)
    await ended(child)
    started = trio.current_time()
    capture.finish()
    assert capture.closed and trio.current_time() - started < 1
    again = outputs.open("slow", to=tmp_path / "fifo")
    assert again.paused  # the rest of the first run comes before anything of the second
    write(again, b"second run\n")
    again.release()
    await reader.read_until(lambda: again.closed and not again.outlet.full)
    first, _, second = reader.got.partition(b"second run")
    assert second == b"\n" and len(first) == capture.received
    assert set(first.splitlines()[:-1]) == {b"y" * 99}


async def test_a_reader_that_goes_away_costs_what_waited_and_a_new_one_gets_what_comes(outputs, tmp_path):
    lost = []
    reader = Reader(tmp_path / "fifo")
    capture = outputs.open("slow", to=tmp_path / "fifo", on_lost=lambda count, cause: lost.append((count, cause)))
    write(capture, LINES[:60_000])
    capture.drain()
    write(capture, LINES[60_000:120_000])
    await until(lambda: capture.paused)
    reader.close()
    await until(lambda: not capture.outlet.full)
    assert not capture.paused and lost and "Broken pipe" in lost[0][1]
    write(capture, b"to nobody\n")
    capture.drain()
    reader = Reader(tmp_path / "fifo")
    write(capture, b"to the next\n")
    capture.finish()
    await reader.read_until(lambda: not capture.outlet.full)
    assert reader.got.endswith(b"to the next\n")  # after what the FIFO itself still held
    assert sum(count for count, _ in lost) + len(reader.got) == capture.received
    assert "can be written again" in lost[-1][1]
    reader.close()


async def test_a_blocked_pipe_whose_writers_are_gone_does_not_wake_the_loop(outputs, tmp_path, reader):
    capture = outputs.open("slow", to=tmp_path / "fifo")
    child = start(capture, "head", "-c", "90000", "/dev/zero")  # FIFO and pipe hold it
    await until(lambda: capture.paused)
    await ended(child)  # its pipe is at its end now, with the rest in it
    turns = 0

    class Count(trio.abc.Instrument):
        def after_io_wait(self, timeout):
            nonlocal turns
            turns += 1

    trio.lowlevel.add_instrument(Count())
    await trio.sleep(0.2)
    assert turns < 20
    await reader.read_until(lambda: capture.closed and not capture.outlet.full)
    assert reader.got == bytes(90_000)
    capture.finish()


async def test_what_still_waits_when_the_daemon_ends_is_counted(tmp_path, reader):
    lost = []
    async with open_outputs(tmp_path / "logs") as outputs:
        capture = outputs.open("slow", to=tmp_path / "fifo", on_lost=lambda count, cause: lost.append(count))
        for _ in range(3):
            write(capture, LINES[:50_000])
            capture.drain()
        taken = capture.received
    while reader.read():
        pass
    assert sum(lost) + len(reader.got) == taken == 150_000


async def test_no_descriptor_is_left_by_a_slow_sink(outputs, tmp_path, reader):
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        capture = outputs.open("slow", to=tmp_path / "fifo")
        write(capture, LINES[:60_000])
        capture.drain()
        write(capture, LINES[:60_000])
        capture.finish()
        await reader.read_until(lambda capture=capture: not capture.outlet.full)
    assert set(os.listdir("/proc/self/fd")) == before


async def test_yes_beside_fifty_slow_printers_costs_them_no_turns(outputs):
    """A line that is there when a turn of the pump begins is read in the next few turns, however chatty others are."""
    yes = [start(outputs.open(f"yes{number}", to=Path("/dev/null")), "yes") for number in range(3)]
    captures = [outputs.open(f"slow{number}") for number in range(50)]
    turns = 0
    poll = outputs._epoll.poll

    class Counting:
        def __getattr__(self, name):
            return getattr(real, name)

        def poll(self, *arguments):
            nonlocal turns
            turns += 1
            return poll(*arguments)

    real, outputs._epoll = outputs._epoll, Counting()
    await trio.sleep(0.05)
    worst = 0
    for _ in range(5):
        for capture in captures:
            write(capture, b"line\n")
        before = turns
        wanted = [capture.received + 5 for capture in captures]
        await until(lambda wanted=wanted: [capture.received for capture in captures] == wanted)
        worst = max(worst, turns - before)
    for child in yes:
        child.kill()
        await ended(child)
    for capture in captures:
        capture.finish()
    assert worst < 40, worst


# -- the account, for every course of events ----------------------------------------------------------------------------

events = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.lists(st.sampled_from([b"\n", b"abc", b"d" * 700, b"e" * 300 + b"\n"]), max_size=8)),
        st.tuples(st.just("read"), st.integers(1, 3000)),
        st.tuples(st.just("flush"), st.none()),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=200)
@given(events)
def test_every_byte_is_stored_waits_or_is_counted_and_lines_stay_whole(events):
    trio.run(account, events)


async def account(events) -> None:
    lost: list[int] = []
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(outlet, "BACKLOG", 2000)
        path = Path(directory, "fifo")
        reader = Reader(path)
        fcntl.fcntl(reader.fd, fcntl.F_SETPIPE_SZ, 4096)
        way = Outlet(LogFile(path, rotate(100), make_directory=False), "drop", lambda count, cause: lost.append(count))
        taken = counted = 0
        for kind, what in events:
            if kind == "take":
                data = b"".join(what)
                taken += len(data)
                counted += way.take(data)
            elif kind == "read":
                reader.read(what)
            elif way.full:
                way.flush()
            assert len(way._backlog) <= 2000
        way.finish()
        while way.full:
            reader.read()
            way.flush()
        while reader.read():
            pass
        way.close()
        reader.close()
    data = b"".join(b"".join(what) for kind, what in events if kind == "take")
    added = len(reader.got) - (taken - counted)  # the line ends that are put in where a line alone fills the backlog
    assert sum(lost) == counted
    assert added >= 0
    if max(map(len, data.split(b"\n"))) < 1000:
        assert added == 0
        assert set(reader.got.split(b"\n")[:-1]) <= set(data.split(b"\n"))


async def test_what_is_lost_of_a_job_that_is_no_more_is_a_warning(tmp_path):
    def jobs(**jobs):
        return config.from_mapping({"daemon": {"state_dir": str(tmp_path / "state")}, "jobs": jobs}, tmp_path, {})

    reader = Reader(tmp_path / "fifo")
    chatty = {"command": ["yes"], "output": str(tmp_path / "fifo")}
    other = {"command": ["sleep", "1000"]}
    with trio.fail_after(60):
        async with open_supervisor(jobs(chatty=chatty, other=other)) as tree:
            await tree.wait_running()
            way = tree.outputs._files["chatty"]
            await until(lambda: way.full)
            tree.apply(jobs(other=other))
            await until(lambda: "chatty" not in tree.journal.table)
            reader.close()
            await until(lambda: not way.full)
            warned = [event.text for event in tree.journal.past(0)[1] if isinstance(event, Warned)]
    assert any("output of chatty, which is no more" in text for text in warned)
