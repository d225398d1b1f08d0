"""Real processes: spawned, waited for, signalled, and ended with everything that came of them."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from supervisor.children import Children, ExitReport, Launch, guardian, open_children
from supervisor.children.process import noticed
from supervisor.children.procfs import children_of, descendants
from supervisor.children.spawner import Spawner, limit_mark
from supervisor.errors import SpawnFailed

ENV = {"PATH": os.environ["PATH"]}
ROOT = Path(__file__).parent.parent


def fail_if_stuck(pids):
    raise AssertionError(f"stuck: {pids}")


async def end(child) -> ExitReport:
    return await child.destroy(stuck=fail_if_stuck, abandoned=trio.Event())


async def run_to_end(children: Children, *argv: str, **options) -> ExitReport:
    child = await children.spawn(Launch(argv, env=ENV, **options))
    await child.wait()
    return await end(child)


@pytest.fixture
async def children():
    with trio.fail_after(30):
        async with open_children(f"test-{os.getpid()}") as children:
            yield children


@contextmanager
def pipe():
    """A pipe as (read end, write end) whose write end is closed by the test."""
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read, False)
    try:
        yield read, write
    finally:
        os.close(read)


async def read_line(fd: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        await trio.lowlevel.wait_readable(fd)
        if not (data := os.read(fd, 1)):
            raise AssertionError(f"the output ended after {line!r}")
        line += data
    return line


async def read_all(fd: int) -> bytes:
    parts = []
    while True:
        await trio.lowlevel.wait_readable(fd)
        if not (part := os.read(fd, 1 << 16)):
            return b"".join(parts)
        parts.append(part)


async def start_saying(children: Children, script: str, lines: int, **options):
    """Spawn a shell script and read what it says first: by then it has done what it does before that."""
    with pipe() as (read, write):
        child = await children.spawn(Launch(["sh", "-c", script], env=ENV, stdout=write, **options))
        os.close(write)
        return child, [int(await read_line(read)) for _ in range(lines)]


def alive(pid: int) -> bool:
    return bool(guardian.read(f"/proc/{pid}/stat")) and not guardian.zombie(pid)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def zombies() -> set[int]:
    return {pid for pid in children_of(os.getpid()) if guardian.zombie(pid)}


async def test_the_exit_code_is_reported(children):
    report = await run_to_end(children, "sh", "-c", "exit 7")
    assert (report.code, report.signal, report.core, report.survivors) == (7, None, False, ())


async def test_the_signal_is_reported(children):
    report = await run_to_end(children, "sh", "-c", "kill -USR1 $$")
    assert (report.code, report.signal) == (None, "SIGUSR1")


async def test_cpu_time_memory_and_duration_are_reported(children):
    report = await run_to_end(children, sys.executable, "-c", "x = sum(range(3_000_000))")
    assert report.user + report.system > 0
    assert 0 < report.duration < 30
    assert report.max_rss > 1 << 20


async def test_a_thousand_children_that_exit_at_once_leave_nothing_and_keep_their_codes(children):
    await run_to_end(children, "true")
    fds, tasks = open_fds(), trio.lowlevel.current_statistics().tasks_living
    codes = []

    async def one(code: int) -> None:
        codes.append((code, (await run_to_end(children, "sh", "-c", f"exit {code}")).code))

    for _ in range(5):
        async with trio.open_nursery() as nursery:
            for code in range(200):
                nursery.start_soon(one, code)
    assert len(codes) == 1000
    assert all(expected == code for expected, code in codes)
    assert open_fds() == fds
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert not zombies()


async def test_other_tasks_have_their_turn_during_a_storm_of_spawns(children):
    turns = 0
    done = trio.Event()

    async def other() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        async with trio.open_nursery() as spawns:
            for _ in range(160):
                spawns.start_soon(run_to_end, children, "true")
        done.set()
    assert turns >= 10


async def test_a_child_is_the_leader_of_its_own_session_and_group(children):
    child = await children.spawn(Launch(["sleep", "100"], env=ENV))
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
    assert children.get(child.pid) is child
    await end(child)
    assert children.get(child.pid) is None


async def test_a_child_inherits_only_the_descriptors_0_1_and_2(children):
    leak, other = os.pipe()
    os.set_inheritable(leak, True)
    with pipe() as (read, write):
        child = await children.spawn(Launch(["ls", "/proc/self/fd"], env=ENV, stdout=write, stderr=write))
        os.close(write)
        output = await read_all(read)
        await end(child)
    os.close(leak)
    os.close(other)
    assert output.split() == [b"0", b"1", b"2", b"3"]  # 3 is how ls reads the directory


async def test_a_child_starts_with_default_dispositions_and_an_empty_mask():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        with trio.fail_after(30):
            async with open_children("dispositions") as children:
                with pipe() as (read, write):
                    child = await children.spawn(
                        Launch(["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"], env=ENV, stdout=write)
                    )
                    os.close(write)
                    output = await read_all(read)
                    await end(child)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR2, before[1])
    assert output.split() == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]


async def test_a_child_gets_the_limit_of_open_files_that_we_were_started_with():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (900, before[1]))
    try:
        with trio.fail_after(30):
            async with open_children("files") as children:
                assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
                child = await children.spawn(Launch(["sleep", "100"], env=ENV))
                assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (900, before[1])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 900
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_the_marks_are_there_and_leave_no_trace_on_ourselves(children):
    child, _ = await start_saying(children, "echo $$; sleep 100", 1, run="api#3")
    assert guardian.environ_mark(child.pid, f"SUPERVISOR_INSTANCE={children.instance}".encode(), b"SUPERVISOR_RUN=api#3")
    tag, _ = guardian.limit_mark(child.pid)
    assert tag == children._tag
    assert guardian.limit_mark(os.getpid()) is None
    await end(child)


def no_such_program(tmp_path):
    return ["no-such-program"], None, "no program 'no-such-program' in the job's PATH"


def no_such_path(tmp_path):
    return ["./no-such"], str(tmp_path), f"no such program: '{tmp_path}/no-such'"


def not_executable(tmp_path):
    (tmp_path / "script").write_text("#!/bin/sh\n")
    return [str(tmp_path / "script")], None, "it is not executable: chmod +x"


def a_directory(tmp_path):
    return [str(tmp_path)], None, "it is a directory"


def no_directory_to_work_in(tmp_path):
    return ["true"], str(tmp_path / "gone"), f"no such directory: '{tmp_path}/gone' (cwd)"


def no_interpreter(tmp_path):
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    return [str(tmp_path / "script")], None, "the interpreter in its first line (#!) does not exist"


def not_a_program(tmp_path):
    (tmp_path / "script").write_text("echo no first line\n")
    (tmp_path / "script").chmod(0o755)
    return [str(tmp_path / "script")], None, "needs a first line such as #!/bin/sh"


def a_nul_byte(tmp_path):
    return ["echo", "a\0b"], None, "cannot contain NUL"


def too_long(tmp_path):
    return ["echo", "x" * (1 << 20)], None, "are too long"


def empty(tmp_path):
    return [""], None, "the command is empty"


@pytest.mark.parametrize(
    "case",
    [
        no_such_program, no_such_path, not_executable, a_directory, no_directory_to_work_in, no_interpreter, not_a_program,
        a_nul_byte, too_long, empty,
    ],
    ids=lambda case: case.__name__,
)  # fmt: skip
async def test_a_failed_spawn_says_what_to_do_and_leaves_nothing(children, tmp_path, case):
    argv, cwd, message = case(tmp_path)
    await run_to_end(children, "true")
    fds = open_fds()
    with pytest.raises(SpawnFailed) as failed:
        await children.spawn(Launch(argv, env=ENV, cwd=cwd))
    assert message in str(failed.value)
    assert open_fds() == fds
    assert not zombies()


async def test_a_failed_spawn_gives_no_value_of_the_environment_away(children):
    with pytest.raises(SpawnFailed) as failed:
        await children.spawn(Launch(["no-such-program"], env={"PATH": "/s3cr3t"}))
    assert "s3cr3t" not in str(failed.value)


async def test_the_program_is_looked_up_in_the_path_of_the_job(children, tmp_path):
    (tmp_path / "greet").write_text("#!/bin/sh\nexit 5\n")
    (tmp_path / "greet").chmod(0o755)
    child = await children.spawn(Launch(["greet"], env={"PATH": f"/nowhere:{tmp_path}"}))
    await child.wait()
    assert (await end(child)).code == 5


async def test_without_a_free_descriptor_a_spawn_fails_and_nothing_leaks(children):
    await run_to_end(children, "true")
    await trio.testing.wait_all_tasks_blocked()
    fds, limits = open_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, fds - {str(max(map(int, fds)))}))
    outcomes = []
    for spare in range(8):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, limits[1]))
        try:
            report = await run_to_end(children, "true")
        except SpawnFailed as error:
            outcomes.append(str(error))
        else:
            outcomes.append(report.code)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(open_fds()) == len(fds)
        assert not zombies()
    assert outcomes[-1] == 0
    assert "no file descriptor left" in outcomes[0]


async def test_a_child_that_cannot_be_watched_is_not_left_alone(children, monkeypatch):
    await run_to_end(children, "true")
    spawned = []

    def no_descriptor(pid, flags=0):
        spawned.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_descriptor)
    with pytest.raises(SpawnFailed, match="no file descriptor left"):
        await children.spawn(Launch(["sleep", "100"], env=ENV))
    monkeypatch.undo()
    assert not guardian.read(f"/proc/{spawned[-1]}/stat")


ESCAPES = {
    "forks": "sleep 100 & echo $!",
    "new session": "setsid sh -c 'echo $$; exec sleep 100' &",
    "double fork": "(sleep 100 & echo $!) &",
    "double fork into a new session": "(setsid sh -c 'echo $$; exec sleep 100' &)",
    "cleared environment": "env -i sleep 100 & echo $!",
    "cleared environment, double fork, new session": "(env -i setsid sh -c 'echo $$; exec sleep 100' &)",
    "ignores SIGTERM": "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 100; done' &",
    "stopped": "sleep 100 & kill -STOP $!; echo $!",
    "a chain of sessions": "setsid sh -c 'setsid sh -c \"echo \\$\\$; sleep 100; true\"; true' &",
}


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("main_lives", [True, False])
async def test_nothing_survives_the_end_of_a_child(children, escape, main_lives):
    bystander = await children.spawn(Launch(["sleep", "100"], env=ENV, run="other#1"))
    child, (pid,) = await start_saying(children, ESCAPES[escape] + ("\nsleep 100; true" if main_lives else ""), 1, run="a#1")
    if not main_lives:
        await child.wait()
    assert alive(pid)
    assert pid in child.remaining()
    await end(child)
    assert not alive(pid)
    assert alive(bystander.pid)
    assert bystander.remaining() == {bystander.pid}
    assert not zombies()
    await end(bystander)


@pytest.mark.parametrize(
    "escape",
    [
        *(ESCAPES[name] for name in ("forks", "double fork", "cleared environment", "ignores SIGTERM", "stopped")),
        "(setsid sh -c 'echo $$; kill -STOP $$' &)",
    ],
)
async def test_where_limits_may_not_be_set_the_environment_and_the_session_tell_who_is_whose(children, escape, monkeypatch):
    real = resource.setrlimit

    def forbidden(which, limits):
        if which == guardian.RLIMIT_LOCKS:
            raise PermissionError
        real(which, limits)

    monkeypatch.setattr(resource, "setrlimit", forbidden)
    other = await children.spawn(Launch(["sleep", "100"], env=ENV, run="other#1"))
    child, (pid,) = await start_saying(children, escape, 1, run="a#1")
    assert guardian.limit_mark(other.pid) is None
    await child.wait()
    await end(child)
    assert not alive(pid)
    assert other.remaining() == {other.pid}
    await end(other)


async def test_a_child_that_forks_while_it_is_killed_does_not_get_away(children):
    bomb = "(while :; do setsid sleep 100 & done) & (while :; do sleep 100 & done) & echo $$; sleep 100"
    child, _ = await start_saying(children, bomb, 1, run="bomb#1")
    while len(child.remaining()) < 60:
        await trio.lowlevel.checkpoint()
    await end(child)
    assert not child.remaining()
    assert not [pid for pid in guardian.pids() if (guardian.limit_mark(pid) or (0,))[0] == children._tag]


BOMBS = {
    "one that stays": """
        if os.fork() == 0:
            os.setsid()
            for _ in range(10_000):
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(100)
    """,
    "chains that are elsewhere each time": """
        for _ in range(4):
            if os.fork() == 0:
                for _ in range(10_000):
                    if os.fork():
                        os._exit(0)
                    os.setsid()
                time.sleep(100)
    """,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("daemon", [False, True], ids=["", "in a cgroup where it can be"])
async def test_what_forks_ten_thousand_times_while_it_is_killed_is_ended(tmp_path, bomb, daemon):
    script = "import os, time\n" + textwrap.dedent(bomb) + "\ntime.sleep(100)"
    with trio.fail_after(50):
        async with open_children(f"bomb-{os.getpid()}", record=tmp_path / "instance" if daemon else None) as children:
            bystander = await children.spawn(Launch(["sleep", "100"], ENV))
            child = await children.spawn(Launch([sys.executable, "-I", "-S", "-c", script], ENV))
            seen = set()
            while len(seen) < 50:
                seen |= child.remaining()
                await trio.lowlevel.checkpoint()
            await end(child)
            left = {pid for pid in guardian.pids() if (guardian.limit_mark(pid) or (0,))[0] == children._tag}
            assert left == {bystander.pid}


async def test_a_purge_takes_everything_of_one_child_and_nothing_of_another(tmp_path):
    async with open_children(f"purge-{os.getpid()}", record=tmp_path / "instance") as children:
        if "all of them" not in children.guarantee:
            pytest.skip(children.guarantee)
        other, escaped = await start_saying(
            children, "setsid sleep 100 & echo $!; (setsid sh -c 'echo $$; sleep 100' &); wait", 2
        )
        doomed, pids = await start_saying(
            children, "setsid sleep 100 & echo $!; (setsid sh -c 'echo $$; sleep 100' &); wait", 2
        )
        foreign = subprocess.Popen(["sleep", "100"])
        for _ in range(2):  # the second from where the first has moved us
            await children.purge(doomed)
        assert not [pid for pid in (doomed.pid, *pids) if alive(pid)]
        assert all(map(alive, (other.pid, *escaped, foreign.pid)))
        assert len(await children.usage()) == 2
        await end(doomed)
        later = await children.spawn(Launch(["sleep", "100"], ENV))
        assert later.pid in guardian.members(str(children.cgroup.path))
        foreign.kill()
        foreign.wait()
    assert not children.cgroup.path.exists()


async def test_a_purge_that_fails_half_way_leaves_nobody_frozen_and_the_child_can_still_be_ended(tmp_path, monkeypatch):
    async with open_children(f"purge-{os.getpid()}", record=tmp_path / "instance") as children:
        if "all of them" not in children.guarantee:
            pytest.skip(children.guarantee)
        other = await children.spawn(Launch(["sleep", "100"], ENV))
        doomed, pids = await start_saying(children, "setsid sleep 100 & echo $!; wait", 1)

        def exhausted(serial: int, pid: int) -> bool:
            raise OSError(errno.EMFILE, "too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(children, "_spared", exhausted)
            await children.purge(doomed)
        assert all(map(alive, (other.pid, doomed.pid, *pids)))
        for group in children.cgroup.path.iterdir():
            if group.is_dir():
                assert (group / "cgroup.freeze").read_text() == "0\n"
        await end(doomed)
        assert not any(map(alive, (doomed.pid, *pids))) and alive(other.pid)
    assert not children.cgroup.path.exists()


async def test_who_is_handed_over_by_a_dying_orphan_is_not_missed(children):
    """A family of three generations, killed while it is being handed over: at any moment somebody may just have died."""
    for _ in range(150):
        child = await children.spawn(Launch(["sh", "-c", "((sleep 100 &) &) &"], env=ENV, run="a#1"))
        await child.wait()
        await end(child)
        assert not [pid for pid in children_of(os.getpid()) if guardian.stat_of(pid)[2] == child.pid]


async def test_what_is_left_gets_its_signal_and_time_to_end(children, tmp_path):
    kept = "setsid sh -c 'trap \"touch said; exit\" TERM; echo $$; while :; do sleep 0.01; done' &"
    child, (pid,) = await start_saying(children, kept, 1, cwd=str(tmp_path))
    await child.wait()
    await child.end_rest(signal.SIGTERM)
    assert (tmp_path / "said").exists()
    assert not alive(pid)
    await end(child)


async def test_a_stopped_child_hears_its_stop_signal(children):
    child, _ = await start_saying(children, "trap 'exit 5' TERM; echo 1; kill -STOP $$; sleep 100", 1)
    while b"T" not in guardian.read(f"/proc/{child.pid}/stat").split():
        await trio.sleep(0.001)
    child.send_signal(signal.SIGTERM)
    await child.wait()
    assert (await end(child)).code == 5


async def test_a_signal_to_the_group_reaches_all_of_it(children):
    child, (pid,) = await start_saying(children, "sleep 100 & echo $!; wait; sleep 100", 1)
    child.send_signal(signal.SIGTERM, group=True)
    await child.wait()
    assert (await end(child)).signal == "SIGTERM"
    assert not alive(pid)


async def test_a_signal_after_the_end_goes_nowhere(children):
    child = await children.spawn(Launch(["true"], env=ENV))
    await child.wait()
    await end(child)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGTERM, group=True)


async def test_a_cancelled_destroy_still_leaves_nothing(children):
    child, (pid,) = await start_saying(children, ESCAPES["new session"] + "\nsleep 100", 1)
    with trio.CancelScope() as scope:
        scope.cancel(reason="test")
        await end(child)
    assert not alive(pid)
    assert not alive(child.pid)


async def test_what_cannot_be_killed_is_named_and_the_wait_for_it_can_be_abandoned(children, monkeypatch):
    monkeypatch.setattr("supervisor.children.family.KILL_LIMIT", 0.1)
    child = await children.spawn(Launch(["sleep", "100"], env=ENV))
    holder = await children.spawn(Launch(["sleep", "100"], env=ENV))
    told, abandoned = [], trio.Event()

    def stuck(pids):
        told.append(pids)
        abandoned.set()

    # as if SIGKILL did nothing: it goes to another, and this one stays
    child._pidfd, holder._pidfd = holder._pidfd, child._pidfd
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    report = await child.destroy(stuck=stuck, abandoned=abandoned)
    monkeypatch.undo()
    assert told == [(child.pid,)]
    assert report.survivors == (child.pid,)
    assert (report.code, report.signal) == (None, None)
    os.kill(child.pid, signal.SIGKILL)
    while guardian.read(f"/proc/{child.pid}/stat"):
        await trio.sleep(0.001)  # reaped when it dies at last
    holder._pidfd = os.pidfd_open(holder.pid)
    await end(holder)


async def test_orphans_are_reaped_as_they_die_and_no_exit_code_is_lost(children):
    child, (ours,) = await start_saying(
        children, "echo $$; for i in $(seq 300); do (true &) ; (setsid true &) ; done; sleep 100", 1
    )
    foreign = subprocess.Popen(["sh", "-c", "exit 7"], start_new_session=True)
    sevens = [(await run_to_end(children, "sh", "-c", "exit 7")).code for _ in range(10)]
    while (left := zombies() - {foreign.pid}) or len(child.remaining()) > 2:
        await trio.sleep(0.001)
    assert not left
    assert sevens == [7] * 10
    assert foreign.wait() == 7
    assert ours in child.remaining()
    await end(child)


async def test_a_signal_that_comes_while_its_handler_is_handed_back_is_no_fault(monkeypatch):
    """CPython complains (as "unraisable") of a signal that was caught, but has no handler any more when its turn comes."""
    complaints, rounds = [], 0
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    spawner = Spawner()
    # not denser: a handler that is interrupted by its own signal each time runs in itself, deeper and deeper
    storm = "import os, sys\nwhile True:\n for each in sys.argv[1:]: os.kill(int(each), 17); sum(range(3000))"
    threads = os.getpid(), spawner._thread.native_id
    with subprocess.Popen([sys.executable, "-c", storm, *map(str, threads)]) as sender:
        try:
            for rounds in range(1, 3001):  # noqa: B007
                with noticed(signal.SIGCHLD, lambda: None, spawner.settle):
                    await trio.lowlevel.checkpoint()
                assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        finally:
            sender.kill()
            spawner.close()
    assert (rounds, complaints) == (3000, [])


async def test_a_status_that_other_code_took_is_not_mistaken_for_success(children):
    child = await children.spawn(Launch(["sh", "-c", "exit 0"], env=ENV))
    await child.wait()
    os.waitpid(child.pid, 0)
    report = await end(child)
    assert (report.code, report.signal) == (None, None)


async def test_a_child_of_other_code_that_happens_to_bear_our_mark_keeps_its_exit_code(children):
    await run_to_end(children, "true")
    with limit_mark(children._tag << 32 | 1):
        foreign = subprocess.Popen(["sh", "-c", "exit 7"])
    while not guardian.zombie(foreign.pid):
        await trio.sleep(0.001)
    await run_to_end(children, "true")
    assert foreign.wait() == 7


async def test_leaving_ends_whatever_is_left():
    with trio.fail_after(30):
        async with open_children("left") as children:
            child, (pid,) = await start_saying(children, ESCAPES["double fork into a new session"] + "\nsleep 100", 1)
    assert not alive(child.pid)
    assert not alive(pid)
    assert not zombies()
    assert not [each for each in children_of(os.getpid()) if b"guardian.py" in guardian.read(f"/proc/{each}/cmdline")]


async def test_a_guardian_that_dies_is_replaced():
    warnings = []
    with trio.fail_after(30):
        async with open_children("replaced", warn=warnings.append) as children:
            await run_to_end(children, "true")
            while not (first := children._guardian.pid):
                await trio.sleep(0.001)
            os.kill(first, signal.SIGKILL)
            while (second := children._guardian.pid) in (0, first):
                await trio.sleep(0.001)
            assert alive(second)
    assert warnings == ["the guardian of the children has died; starting another"]
    assert not alive(second)


DAEMON = """
    import os, sys, trio
    from supervisor.children import Launch, open_children

    async def main():
        async with open_children("doomed-" + sys.argv[1]) as children:
            for number, script in enumerate(sys.argv[2:]):
                await children.spawn(Launch(["sh", "-c", script], env={"PATH": os.environ["PATH"]}, run=f"job#{number}"))
            while not children._guardian.pid:
                await trio.sleep(0.001)
            print("ready", flush=True)
            await trio.sleep_forever()

    trio.run(main)
"""


async def gone(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    await trio.lowlevel.wait_readable(fd)
    os.close(fd)


@pytest.mark.parametrize("sent_first", [(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)], ids=["", "guardian told to end"])
async def test_when_the_daemon_is_killed_its_guardian_leaves_nothing_alive(sent_first):
    scripts = [escape.replace("echo", "echo >&2") + "\nsleep 100; true" for escape in ESCAPES.values()]
    argv = [sys.executable, "-c", textwrap.dedent(DAEMON), str(os.getpid()), *scripts]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with pipe() as (said, say), pipe() as (told, tell):
        daemon = subprocess.Popen(argv, env=env, stdout=say, stderr=tell)
        os.close(say)
        os.close(tell)
        try:
            with trio.fail_after(30):
                assert await read_line(said) == b"ready\n"
                escaped = {int(await read_line(told)) for _ in scripts}
                everyone = {pid for pid in descendants(daemon.pid) | escaped if alive(pid)}  # a shell between may be gone
                guards = {pid for pid in everyone if b"guardian.py" in guardian.read(f"/proc/{pid}/cmdline")}
                assert len(guards) == 1 and escaped <= everyone
                for number in sent_first:
                    os.kill(*guards, number)
                daemon.kill()
                daemon.wait()
                for pid in everyone:
                    await gone(pid)
        finally:
            daemon.kill()
            daemon.wait()
    assert not [pid for pid in everyone if alive(pid)]


async def test_the_kernels_list_and_the_walk_agree_on_who_is_below(children, monkeypatch):
    child, pids = await start_saying(children, "sleep 100 & echo $!; sleep 100 & echo $!; sleep 100", 2)
    listed = children_of(child.pid)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert set(pids) <= listed == children_of(child.pid)
    monkeypatch.undo()
    await end(child)


def test_children_work_outside_the_main_thread():
    reports = []

    async def main() -> None:
        with trio.fail_after(30):
            async with open_children("thread") as children:
                child, (pid,) = await start_saying(children, ESCAPES["double fork"], 1)
                await child.wait()
                reports.append(await end(child))
                assert not alive(pid)

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    thread.join(60)
    assert [report.code for report in reports] == [0]


HOLDS = "x = bytearray(64 << 20); print(__import__('os').getpid(), flush=True); __import__('time').sleep(100)"
BURNS = "n = 0\nwhile __import__('time').process_time() < 0.3: n += 1\nprint(1, flush=True); __import__('time').sleep(100)"


async def test_usage_is_that_of_the_whole_tree_with_adopted_orphans(children):
    """64 MiB in a grandchild, as much in an orphan with a session of its own, and CPU burnt by a third."""
    idle, _ = await start_saying(children, "echo 1; exec sleep 100", 1)
    script = (
        f"""{sys.executable} -c "{HOLDS}" & (setsid {sys.executable} -c "{HOLDS}" &) ; {sys.executable} -c "$BURNS" & wait"""
    )
    with pipe() as (read, write):
        child = await children.spawn(Launch(["sh", "-c", script], {**ENV, "BURNS": BURNS}, stdout=write))
        os.close(write)
        for _ in range(3):
            await read_line(read)
    usage = await children.usage()
    assert usage.keys() == {idle, child}
    assert usage[child].processes == 4
    assert usage[child].memory > 128 << 20
    assert usage[child].cpu >= 0.25
    assert usage[idle].processes == 1
    assert usage[idle].memory < 32 << 20
    assert usage[idle].cpu < 0.1
    assert (await child.usage()).processes == 4
    await end(child)
    assert (await children.usage()).keys() == {idle}
    await end(idle)


async def test_what_a_process_has_reaped_counts_as_its_own(children):
    with pipe() as (read, write):
        script = f"""{sys.executable} -c "$BURNS" & read _ < /dev/null; wait $!; echo 2; exec sleep 100"""
        burns = BURNS.replace("sleep(100)", "sleep(0)")
        child = await children.spawn(Launch(["sh", "-c", script], {**ENV, "BURNS": burns}, stdout=write))
        os.close(write)
        for _ in range(2):
            await read_line(read)
    usage = await child.usage()
    assert (usage.processes, usage.cpu >= 0.25) == (1, True)
    await end(child)
