"""`output = "journal"`: the native protocol against a socket of the test's, and a real journal under a real systemd."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import trio
from test_kind_command import open_house
from test_output import rotate, run, until, write
from test_systemd import ROOT, in_rig, rig  # noqa: F401 - a fixture

from supervisor import config
from supervisor.config import preflight
from supervisor.errors import SpawnFailed
from supervisor.output import journal, open_outputs


class Manager:
    """The journal's end of the socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open()

    def open(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.setblocking(False)

    def close(self) -> None:
        self.socket.close()
        self.path.unlink()

    def entry(self) -> dict[str, bytes]:
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        if ancillary:
            fd = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
            data = os.pread(fd, os.fstat(fd).st_size, 0)
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)  # sealed, else the journal would refuse it
            os.close(fd)
        return fields(data)

    def entries(self) -> list[dict[str, bytes]]:
        found = []
        while True:
            try:
                found.append(self.entry())
            except BlockingIOError:
                return found


def fields(data: bytes) -> dict[str, bytes]:
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        key, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[9 + length :]
        found[key.decode()] = value
    return found


@pytest.fixture
def manager(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "socket"))
    manager = Manager(tmp_path / "socket")
    yield manager
    manager.close()


@pytest.fixture
async def outputs(tmp_path):
    with trio.fail_after(60):
        async with open_outputs(tmp_path / "logs") as outputs:
            yield outputs


async def test_each_line_is_an_entry_that_names_job_and_run(outputs, manager, tmp_path):
    await run(
        outputs.open("job", run="job#1", to="journal"),
        "sh",
        "-c",
        "echo out; echo '<3>err' >&2; printf 'a\\0b\\377\\r\\nno end'",
    )
    head = {"SYSLOG_IDENTIFIER": b"job", "SUPERVISOR_JOB": b"job", "SUPERVISOR_RUN": b"job#1"}
    assert manager.entries() == [
        {**head, "PRIORITY": b"6", "MESSAGE": b"out"},
        {**head, "PRIORITY": b"3", "MESSAGE": b"err"},
        {**head, "PRIORITY": b"6", "MESSAGE": b"a\0b\xff"},
        {**head, "PRIORITY": b"6", "MESSAGE": b"no end"},
    ]
    assert await outputs.tail("job", 9) == b"out\n<3>err\na\0b\xff\r\nno end"
    assert not (tmp_path / "logs").exists()


async def test_long_lines_are_cut_and_say_so_and_large_entries_go_by_file(outputs, manager):
    capture = outputs.open("job", to="journal", max_line=10)
    write(capture, b"0123456789\n0123456789abc\n")
    capture.finish()
    assert [(entry["MESSAGE"], "LINE_BREAK" in entry) for entry in manager.entries()] == [
        (b"0123456789", False), (b"0123456789", True), (b"abc", True),
    ]  # fmt: skip
    capture = outputs.open("job", to="journal", max_line=1 << 20)
    await run(capture, "sh", "-c", "head -c 500000 /dev/zero | tr '\\0' x; echo; echo after")
    assert [entry["MESSAGE"] for entry in manager.entries()] == [b"x" * 500_000, b"after"]


async def test_a_line_that_comes_in_pieces_is_one_entry(outputs, manager):
    capture = outputs.open("job", to="journal")
    for byte in "héllo\n".encode():
        write(capture, bytes([byte]))
        capture.drain()
    assert [entry["MESSAGE"].decode() for entry in manager.entries()] == ["héllo"]
    capture.finish()


@pytest.mark.parametrize("policy", ["block", "drop"])
async def test_a_journal_that_does_not_read_holds_up_its_own_jobs_at_most(outputs, manager, policy):
    lost = []
    capture = outputs.open("job", to="journal", on_overload=policy, on_lost=lambda count, cause: lost.append((count, cause)))
    child = trio.Event()

    async def live() -> None:
        await run(capture, "seq", "60000")
        child.set()

    outputs.nursery.start_soon(live)
    await until(lambda: capture.paused if policy == "block" else lost)
    await run(outputs.open("other"), "echo", "hello")
    assert await outputs.tail("other", 1) == b"hello\n"
    got: list[bytes] = []
    while not (child.is_set() and capture.closed and not capture.outlet.full):
        got += [entry["MESSAGE"] for entry in manager.entries()]
        await trio.lowlevel.checkpoint()
    got += [entry["MESSAGE"] for entry in manager.entries()]
    wanted = [b"%d" % number for number in range(1, 60_001)]
    if policy == "block":
        assert got == wanted and not lost
    else:
        assert sum(count for count, _ in lost) == sum(map(len, wanted)) - sum(map(len, got)) + len(wanted) - len(got)
        assert set(got) <= set(wanted) and "the journal is too slow" in lost[0][1]


async def test_a_journal_that_is_restarted_is_found_again(outputs, manager):
    lost = []
    capture = outputs.open("job", to="journal", on_lost=lambda count, cause: lost.append((count, cause)))
    write(capture, b"before\n")
    capture.drain()
    manager.close()
    manager.open()
    write(capture, b"after\n")
    capture.drain()
    assert [entry["MESSAGE"] for entry in manager.entries()] == [b"after"] and not lost
    manager.close()
    write(capture, b"to nobody\n")
    capture.drain()
    manager.open()
    write(capture, b"again\n")
    capture.finish()
    assert [entry["MESSAGE"] for entry in manager.entries()] == [b"again"]
    assert [count for count, _ in lost] == [10, 0]
    assert "cannot write the journal" in lost[0][1] and "can be written again" in lost[1][1]


async def test_a_journal_that_dies_while_it_is_waited_for(outputs, manager):
    lost = []
    capture = outputs.open("job", to="journal", on_lost=lambda count, cause: lost.append(count))
    while not capture.paused:
        write(capture, b"line\n")
        capture.drain()
    manager.close()
    await until(lambda: not capture.outlet.full)
    assert not capture.paused and lost
    manager.open()
    write(capture, b"again\n")
    capture.finish()
    assert manager.entries()[-1]["MESSAGE"] == b"again"


async def test_a_job_that_changes_from_file_to_journal_and_back(outputs, manager, tmp_path):
    await run(outputs.open("job", rotate=rotate(1000)), "echo", "to the file")
    await run(outputs.open("job", to="journal"), "echo", "to the journal")
    await run(outputs.open("job", rotate=rotate(1000)), "echo", "to the file again")
    assert (tmp_path / "logs/job.log").read_bytes() == b"to the file\nto the file again\n"
    assert [entry["MESSAGE"] for entry in manager.entries()] == [b"to the journal"]
    assert await outputs.tail("job", 2) == b"to the journal\nto the file again\n"


async def test_no_journal_is_a_fault_at_check_and_a_failure_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "none"))
    file = tmp_path / "supervisor.toml"
    file.write_text('[jobs.a]\ncommand = ["sleep", "1"]\noutput = "journal"\n')
    (problem,) = preflight.check(config.load(file, {})).all_problems
    where = f"jobs.a.output: no journal here: {tmp_path}/none: no such file or directory"
    assert str(problem).endswith(f'supervisor.toml:3:1: {where}; "capture" keeps the output in a file')
    async with open_house(tmp_path / "logs") as house:
        with pytest.raises(SpawnFailed, match=r"no journal for the output: .*/none: No such file or directory"):
            await house.finish(command=("echo", "x"), output="journal")


async def test_no_descriptor_is_left(outputs, manager):
    await run(outputs.open("job", to="journal"), "echo", "warm")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await run(outputs.open("job", to="journal"), "echo", "hello")
    assert set(os.listdir("/proc/self/fd")) == before


JOBS = """
[daemon]
state_dir = "state"
[jobs.talker]
output = "journal"
max_line = "1MB"
command = ["sh", "talker.sh"]
ready = { log = "^up" }
"""

TALKER = r"""
echo out
echo '<3>err' >&2
head -c 500000 /dev/zero | tr '\0' x
echo
echo up
while sleep 0.1; do echo tick; done
"""

SESSION = r"""
entries() { journalctl --sync; journalctl -o cat --no-pager "$@"; }
more() { [ "$(entries -t talker | wc -l)" -gt "$before" ]; }
eventually() { for _ in $(seq 300); do if "$@"; then return; fi; sleep 0.1; done; echo "never: $*"; return 1; }
supervisor() { "$PYTHON" -P -m supervisor "$@"; }

supervisor check
supervisor run > daemon.log 2>&1 &
daemon=$!
eventually supervisor start talker
[ "$(entries SUPERVISOR_JOB=talker SUPERVISOR_RUN='talker#1' PRIORITY=3)" = err ]
[ "$(entries -t talker PRIORITY=6 | head -1)" = out ]
[ "$(entries -t talker | grep -c 'xxxx')" = 1 ] && [ "$(entries -t talker | grep xxxx | tr -d '\n' | wc -c)" = 500000 ]
supervisor logs -n 1000 talker | grep -q '^up$'

echo == the journal is restarted
systemctl restart systemd-journald
before=$(entries -t talker | wc -l)
eventually more

supervisor shutdown
wait $daemon
echo == done
"""


def test_a_real_journal_gets_the_lines_and_may_be_restarted(rig, tmp_path):  # noqa: F811
    (tmp_path / "supervisor.toml").write_text(JOBS)
    (tmp_path / "talker.sh").write_text(TALKER)
    done = in_rig(
        "--bind", str(tmp_path), "--bind-ro", str(ROOT), "--env", f"PYTHON={sys.executable}", "--env", f"PYTHONPATH={ROOT}",
        "--cwd", str(tmp_path), "--timeout", "100", "--", "bash", "-euxo", "pipefail", "-c", SESSION,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("== done\n"), f"{done.stdout}\n{done.stderr[-6000:]}"
