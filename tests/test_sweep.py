"""Cgroup, record and sweep: what becomes of the children of a daemon that was killed, by real ones."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
import trio
from test_children import ENV, ESCAPES, ROOT, alive, end, read_line, run_to_end, start_saying

from supervisor.children import Launch, guardian, open_children, record
from supervisor.children.cgroup import expected, outside

DAEMON = """
    import os, sys, trio
    from pathlib import Path
    from supervisor.children import Launch, open_children

    async def main():
        async with open_children(sys.argv[1], record=Path(sys.argv[2]), warn=lambda text: print(text, flush=True)) as children:
            for number, script in enumerate(sys.argv[3:]):
                await children.spawn(Launch(["sh", "-c", script], {"PATH": os.environ["PATH"]}, run=f"job#{number}"))
            print("ready", children._guardian.pid, children.guarantee, flush=True)
            await trio.sleep_forever()

    trio.run(main)
"""
WITHOUT_CGROUP = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
READ_ONLY = 'grep " cgroup2 " /proc/mounts | while read _ at _; do mount -o remount,bind,ro "$at"; done; exec "$@"'


def have_cgroup() -> bool:
    return expected().startswith("children end with the daemon: all of them")


def groups() -> set[str]:
    """The groups that there are of instances named by this test run."""
    return {path.name for path in outside().glob(f"supervisor-*-{os.getpid()}*")} if have_cgroup() else set()


@pytest.fixture(params=["cgroup", "no cgroup"])
def prefix(request) -> list[str]:
    """A command line that runs a daemon with, or without, a cgroup of its own."""
    if request.param == "cgroup":
        if not have_cgroup():
            pytest.skip(expected())
        return []
    if not have_cgroup():
        return []
    if os.getuid() != 0:
        pytest.skip("only root can mount it read-only")
    return [*WITHOUT_CGROUP, READ_ONLY, "sh"]


NUMBERS = itertools.count()


class Doomed:
    """A daemon with these children, told to be killed."""

    def __init__(self, prefix: list[str], path: Path, *scripts: str) -> None:
        self.instance = f"doomed-{os.getpid()}-{next(NUMBERS)}"
        argv = [*prefix, sys.executable, "-c", textwrap.dedent(DAEMON), self.instance, str(path), *scripts]
        self.said, say = os.pipe2(os.O_CLOEXEC)
        self.told, tell = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.said, False)
        os.set_blocking(self.told, False)
        self.process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=say, stderr=tell)
        os.close(say)
        os.close(tell)
        self.guardian = 0
        self.guarantee = ""

    async def ready(self, count: int) -> list[int]:
        """The pids of those that got away, as they have said them; by then all is as it shall be."""
        words = (await read_line(self.said)).decode().split(maxsplit=2)
        assert words[0] == "ready"
        self.guardian, self.guarantee = int(words[1]), words[2]
        return [int(await read_line(self.told)) for _ in range(count)]

    def kill(self, *more: int) -> None:
        """Kill it, and these before it."""
        for pid in more:
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        os.close(self.said)
        os.close(self.told)


@pytest.fixture
def doom():
    """Makes daemons, and kills what a failing test has not."""
    made = []

    def make(*args) -> Doomed:
        made.append(Doomed(*args))
        return made[-1]

    yield make
    for each in made:
        if each.process.poll() is None:
            each.kill()


async def died(pid: int) -> None:
    """Wait for the end of what is nobody's child of ours."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    await trio.lowlevel.wait_readable(fd)
    os.close(fd)


SCRIPTS = [escape.replace("echo", "echo >&2") + "\nsleep 100; true" for escape in ESCAPES.values()]


async def test_the_guardian_of_a_killed_daemon_leaves_nothing_and_the_next_one_says_so(doom, prefix, tmp_path):
    doomed = doom(prefix, tmp_path / "instance", *SCRIPTS)
    escaped = await doomed.ready(len(SCRIPTS))
    assert ("all of them (cgroup " in doomed.guarantee) == (not prefix)
    assert all(map(alive, escaped))
    doomed.kill()
    warnings = []
    async with open_children(f"next-{os.getpid()}", record=tmp_path / "instance", warn=warnings.append) as children:
        assert not [pid for pid in escaped if alive(pid)]
        assert not alive(doomed.guardian)  # the sweep has waited for it
        assert groups() <= {f"supervisor-{children.instance}"}
    assert warnings[0].startswith("the daemon before this one did not end in order")
    assert len(warnings) == 1
    assert not (tmp_path / "instance").exists()
    assert groups() == set()


async def test_when_the_guardian_was_killed_as_well_the_next_daemon_ends_what_is_left_and_names_it(doom, prefix, tmp_path):
    doomed = doom(prefix, tmp_path / "instance", *SCRIPTS)
    escaped = await doomed.ready(len(SCRIPTS))
    doomed.kill(doomed.guardian)
    assert all(map(alive, escaped))
    warnings = []
    async with open_children(f"next-{os.getpid()}", record=tmp_path / "instance", warn=warnings.append):
        assert not [pid for pid in escaped if alive(pid)]
    (text,) = warnings
    assert text.startswith("the daemon before this one did not end in order; what it left has been killed: ")
    assert all(f" {pid} (s" in text for pid in escaped)
    assert groups() == set()


async def test_a_bystander_is_left_alone(doom, tmp_path):
    """Another daemon, another record, the same machine."""
    other = doom([], tmp_path / "other", "echo $$ >&2; sleep 100")
    (pid,) = await other.ready(1)
    doomed = doom([], tmp_path / "instance", "echo $$ >&2; sleep 100")
    await doomed.ready(1)
    doomed.kill(doomed.guardian)
    async with open_children("next", record=tmp_path / "instance"):
        assert alive(pid)
    other.kill()
    await died(pid)


async def test_what_an_orderly_daemon_notes_and_takes_back(tmp_path):
    path, home = tmp_path / "instance", Path("/proc/self/cgroup").read_text()
    async with open_children(f"orderly-{os.getpid()}", record=path) as children:
        await run_to_end(children, "true")
        note = msgspec.json.decode(path.read_bytes(), type=record.Record)
        assert (note.instance, note.tag, note.boot) == (children.instance, children._tag, record.boot_id())
        assert note.guardian == (children._guardian.pid, guardian.start_time(children._guardian.pid))
        if have_cgroup():
            assert children.guarantee == f"children end with the daemon: all of them (cgroup {note.cgroup})"
            child = await children.spawn(Launch(["sleep", "100"], ENV))
            assert {os.getpid(), child.pid} <= guardian.members(note.cgroup)
            while children._guardian.pid in guardian.members(note.cgroup):
                await trio.sleep(0.001)  # it moves out by itself
            await end(child)
    assert not path.exists()
    assert Path("/proc/self/cgroup").read_text() == home
    assert groups() == set()


async def test_who_has_no_child_leaves_no_trace_however_it_ends(tmp_path):
    home = Path("/proc/self/cgroup").read_text()
    async with open_children(f"childless-{os.getpid()}", record=tmp_path / "instance") as children:
        assert children.guarantee == expected()
        assert not (tmp_path / "instance").exists()
        assert Path("/proc/self/cgroup").read_text() == home
        assert groups() == set()


async def test_a_note_of_another_boot_is_history(tmp_path):
    child = subprocess.Popen(["sleep", "100"], env={**ENV, "SUPERVISOR_INSTANCE": "old"})
    path, warnings = tmp_path / "instance", []
    record.write(path, record.Record(instance="old", tag=1, boot="another", guardian=(child.pid, 1)))
    async with open_children("new", record=path, warn=warnings.append):
        assert child.poll() is None
    child.kill()
    child.wait()
    assert warnings == []


async def test_a_guardian_whose_number_is_somebody_elses_by_now_is_not_waited_for(tmp_path):
    path, warnings = tmp_path / "instance", []
    record.write(path, record.Record(instance="old", tag=1, boot=record.boot_id(), guardian=(os.getpid(), 1)))
    with trio.fail_after(record.GUARDIAN_LIMIT / 2):
        async with open_children("new", record=path, warn=warnings.append):
            pass
    assert warnings == ["the daemon before this one did not end in order; nothing of it was left"]


async def test_a_note_that_cannot_be_read_is_said_and_replaced(tmp_path):
    path, warnings = tmp_path / "instance", []
    path.write_text("{")
    async with open_children("new", record=path, warn=warnings.append) as children:
        await run_to_end(children, "true")
        assert msgspec.json.decode(path.read_bytes(), type=record.Record).instance == "new"
    assert len(warnings) == 1 and warnings[0].startswith(f"cannot read {path}, so cannot look for what an earlier daemon")


FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.fixture
def frozen():
    """Freeze processes so that not even SIGKILL ends them (version 1 of the freezer does that); thawed at the end."""
    group = FREEZER / f"supervisor-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer of version 1: {error}")

    def freeze(*pids: int) -> None:
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")

    freeze.thaw = lambda: (group / "freezer.state").write_text("THAWED")
    yield freeze
    freeze.thaw()
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            os.sched_yield()


async def test_what_an_earlier_daemon_left_and_cannot_be_killed_is_named_and_not_waited_for_for_ever(
    doom, prefix, tmp_path, frozen, monkeypatch
):
    monkeypatch.setattr(record, "KILL_LIMIT", 0.1)
    doomed = doom(prefix, tmp_path / "instance", "echo $$ >&2; exec sleep 100")
    (pid,) = await doomed.ready(1)
    frozen(pid)
    doomed.kill(doomed.guardian)
    warnings = []
    async with open_children("next", record=tmp_path / "instance", warn=warnings.append):
        assert alive(pid)
    assert warnings == [f"the daemon before this one did not end in order; cannot be killed: {pid} (sleep)"]
    frozen.thaw()
    await died(pid)
    if not prefix and have_cgroup():
        assert guardian.remove_cgroup(str(outside() / f"supervisor-{doomed.instance}"))


async def test_a_frozen_child_is_stuck_and_named_until_it_thaws(tmp_path, frozen, monkeypatch):
    monkeypatch.setattr("supervisor.children.family.KILL_LIMIT", 0.1)
    async with open_children(f"frozen-{os.getpid()}") as children:
        child, (pid,) = await start_saying(children, "sleep 100 & echo $!; wait", 1)
        frozen(child.pid, pid)
        told = []

        def stuck(pids):
            told.append(pids)
            frozen.thaw()

        report = await child.destroy(stuck=stuck, abandoned=trio.Event())
        assert told == [tuple(sorted((child.pid, pid)))]
        assert report.signal == "SIGKILL"
        assert not alive(pid)


async def test_who_cannot_be_killed_at_the_end_keeps_the_note_for_the_next_daemon(tmp_path, frozen, monkeypatch):
    monkeypatch.setattr("supervisor.children.family.KILL_LIMIT", 0.1)
    path, instance = tmp_path / "instance", f"kept-{os.getpid()}"
    async with open_children(instance, record=path) as children:
        child = await children.spawn(Launch(["sleep", "100"], ENV))
        frozen(child.pid)
    assert path.exists()
    frozen.thaw()
    os.waitpid(child.pid, 0)
    async with open_children("next", record=path):
        assert groups() == set()
