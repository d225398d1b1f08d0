"""What a child is started with, what it reads, and how a stop command asks it to end: real processes say what they are."""

import grp
import os
import pwd
import resource
import tty
from contextlib import suppress

import pytest
import structlog.testing
import trio
from house import House, alive, open_house, sh

from supervisor.errors import SpawnFailed
from supervisor.output import Follower
from supervisor.probes import Ready
from supervisor.spec import Limit, Paths
from supervisor.state import Phase

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
async def house(tmp_path):
    async with open_house(tmp_path / "logs") as house:
        yield house


async def said(house: House, script: str, **spec) -> list[str]:
    """The lines that a script prints."""
    outcome = await house.finish(command=sh(script), **spec)
    assert not outcome.failed, (outcome.reason, house.log())
    return house.log().decode().splitlines()


async def refused(house: House, **spec) -> str:
    with pytest.raises(SpawnFailed) as caught:
        await house.finish(**{"command": ("true",), **spec})
    return str(caught.value)


async def until(follower: Follower, text: bytes) -> bytes:
    """What comes, until `text` has come."""
    seen = b""
    while text not in seen:
        seen += await anext(follower)
    return seen


# ---- whom it runs as


@AS_ROOT
async def test_a_user_has_its_own_groups_and_environment(house):
    script = 'id -u; id -g; id -G; echo "$HOME $USER $LOGNAME $SHELL"'
    uid, gid, groups, env = await said(house, script, user="nobody", cwd="/")
    assert (uid, gid) == (str(NOBODY.pw_uid), str(NOBODY.pw_gid))
    assert set(map(int, groups.split())) == set(os.getgrouplist("nobody", NOBODY.pw_gid))
    assert env == f"{NOBODY.pw_dir} nobody nobody {NOBODY.pw_shell}"


@AS_ROOT
async def test_group_and_more_groups(house):
    terminals = grp.getgrnam("tty").gr_gid
    assert await said(house, "id -u; id -g; id -G", user=str(NOBODY.pw_uid), group="tty", groups=("7",), cwd="/") == [
        str(NOBODY.pw_uid), str(terminals), " ".join(map(str, dict.fromkeys((*os.getgrouplist("nobody", terminals), 7)))),
    ]  # fmt: skip


@AS_ROOT
async def test_what_it_cannot_become_is_said(house):
    assert await refused(house, user="nobdy") == 'no user "nobdy"; did you mean "nobody"?'
    assert await refused(house, group="nogrup") == 'no group "nogrup"; did you mean "nogroup"?'
    assert await refused(house, user="54321") == "nothing is known of the user 54321, so its group must be given: group"


async def test_the_small_attributes(house):
    script = "umask; nice; ulimit -n; ulimit -Hn; ulimit -c; grep NoNewPrivs /proc/self/status"
    own = os.nice(0)
    limits = {"nofile": Limit((50, 60)), "core": Limit((0, 0))}
    assert await said(house, script, umask=0o027, nice=own + 3, rlimits=limits, no_new_privileges=True) == [
        "0027", str(own + 3), "50", "60", "0", "NoNewPrivs:\t1",
    ]  # fmt: skip


async def test_who_asks_for_nothing_gets_what_the_daemon_was_started_with(house):
    mask = os.umask(0o022)
    os.umask(mask)
    soft, hard = house.resources.children._files
    found = await said(house, "umask; nice; ulimit -n; ulimit -Hn; grep NoNewPrivs /proc/self/status")
    assert found[:2] == [f"{mask:04o}", str(os.nice(0))]
    assert found[2:4] == ["unlimited" if each == resource.RLIM_INFINITY else str(each) for each in (soft, hard)]


async def test_exactly_the_descriptors_that_are_meant(house):
    """Whatever it is started with: 0, 1 and 2 (and that of the listing)."""
    script = "ls /proc/self/fd"
    for spec in ({}, {"stdin": "pipe"}, {"stdin": "/dev/zero"}, {"rlimits": {"core": Limit((0, 0))}}, {"tty": True}):
        await house.finish(command=sh(script), **spec)
        assert house.log().split()[-4:] == [b"0", b"1", b"2", b"3"], spec
        assert len(house.log().split()) % 4 == 0, spec


# ---- its environment


async def test_a_file_is_read_at_each_start(house, tmp_path):
    file = tmp_path / "env"
    for value in ("one", "two"):
        file.write_text(f"WORD={value}\nexport OTHER='x y'\n")
        assert (await said(house, 'echo "$WORD $OTHER"', env_file=Paths((str(file),))))[-1] == f"{value} x y"


async def test_a_file_that_cannot_be_read_keeps_it_from_starting(house, tmp_path):
    (tmp_path / "bad").write_text("A=1\nhunter2")
    assert await refused(house, env_file=Paths(("/no/env",))) == 'env_file "/no/env": no such file or directory'
    assert (
        await refused(house, env_file=Paths((f"{tmp_path}/bad",))) == f'env_file "{tmp_path}/bad", line 2: expected NAME=value'
    )
    assert not (await house.finish(command=("true",), env_file=Paths(("-/no/env",)))).failed


async def test_a_clear_environment(house):
    names = {line.partition("=")[0] for line in await said(house, "exec /usr/bin/env", clear_env=True, env={"MINE": "1"})}
    marks = {"SUPERVISOR_INSTANCE", "SUPERVISOR_JOB", "SUPERVISOR_RUN", "SUPERVISOR_WORKER"}
    assert names - {"PWD", "_", "SHLVL"} == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "MINE"} | marks


async def test_a_command_that_is_no_program_or_has_no_directory(house, tmp_path):
    (tmp_path / "text").write_text("")
    where = str(tmp_path)
    assert await refused(house, command=("no-such-thing",)) == (
        "no program 'no-such-thing' in the job's PATH: install it, or give its full path"
    )
    for limits in ({}, {"core": Limit((0, 0))}):  # with a launcher the words are the same
        assert await refused(house, command=("./text",), rlimits=limits) == (
            f"cannot start '{where}/text': it is not executable: chmod +x"
        )
        assert await refused(house, command=(where,), rlimits=limits) == f"cannot start '{where}': it is a directory"
        assert (
            await refused(house, cwd="/no/such", rlimits=limits) == "cannot start 'true': no such directory: '/no/such' (cwd)"
        )


# ---- what it reads


async def test_nothing_to_read_unless_it_is_asked_for(house):
    assert await said(house, "wc -c") == ["0"]


async def test_a_file_to_read(house, tmp_path):
    (tmp_path / "in").write_text("hello\n")
    assert await said(house, "cat", stdin=f"{tmp_path}/in") == ["hello"]
    assert await refused(house, stdin="/no/such") == 'stdin "/no/such": no such file or directory'


async def test_a_fifo_waits_for_writers_and_has_no_end(house, tmp_path):
    os.mkfifo(tmp_path / "in")
    with house.outputs.follow("job") as follower:
        life = house.start(command=("cat",), stdin=f"{tmp_path}/in")
        await life.ready()
        for word in ("one", "two"):
            with open(os.open(tmp_path / "in", os.O_WRONLY | os.O_NONBLOCK), "w") as writer:
                writer.write(word)
            await until(follower, word.encode())
    assert (await life.stop()).signal == "SIGTERM"


async def test_a_pipe_is_written_to_through_the_run_and_ended(house):
    life = house.start(command=("cat",), stdin="pipe")
    await life.ready()
    assert life.run.attach is not None and not life.run.attach.tty
    await life.run.attach.write(b"one\n")
    await life.run.attach.write(b"x" * 300_000)
    await life.run.attach.close()
    assert (await life.end()).code == 0
    assert house.log() == b"one\n" + b"x" * 300_000
    assert life.run.attach is None


async def test_a_run_without_a_way_in_says_so(house):
    life = house.start(command=("sleep", "100"))
    await life.ready()
    assert life.run.attach is None
    await life.stop()


async def test_the_end_of_the_child_breaks_the_pipe(house):
    life = house.start(command=sh("exec 0<&-; echo up; sleep 100"), stdin="pipe", ready=Ready(log="up"))
    await life.ready()
    with pytest.raises(trio.BrokenResourceError):
        await life.run.attach.write(b"hello")
    await life.stop()


async def test_no_descriptor_is_left_of_pipes_and_terminals(house):
    await house.finish(command=("true",), stdin="pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        await house.finish(command=("true",), stdin="pipe")
        await house.finish(command=("echo", "x"), tty=True)
        await refused(house, command=("no-such-thing",), stdin="pipe")
        await refused(house, command=("no-such-thing",), tty=True)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- its terminal


async def test_a_terminal_is_its_input_its_output_and_its_controlling_terminal(house):
    script = "test -t 0 && test -t 1 && test -t 2 && echo all; stty size; ps -o tty= -p $$ > /dev/tty; tty; echo $TERM"
    found = await said(house, script, tty=True, env={"TERM": "dumb"})
    assert found[:2] == ["all", "24 80"]
    assert found[2] == found[3].removeprefix("/dev/")
    assert found[4] == "dumb"


async def test_all_that_was_printed_on_it_is_captured(house):
    outcome = await house.finish(command=sh("stty -onlcr; seq 100000; printf end"), tty=True)
    assert outcome.code == 0
    assert house.log() == b"".join(b"%d\n" % number for number in range(1, 100_001)) + b"end"


async def test_what_is_still_on_its_way_at_the_end_is_captured_before_the_run_is_over(house):
    """More than a terminal says that it holds, and nobody has had a turn to read it."""
    capture = house.outputs.open("job", tty=True)
    tty.setraw(capture.fd)
    os.set_blocking(capture.fd, False)
    written = 0
    with suppress(BlockingIOError):
        while True:
            written += os.write(capture.fd, b"x" * 1000)
    capture.finish()
    assert capture.closed and len(house.log()) == written


async def test_it_is_typed_at_resized_and_interrupted(house):
    script = "trap 'stty size' WINCH; trap 'echo interrupted; exit 3' INT; echo up; while read word; do echo \"<$word>\"; done"
    with house.outputs.follow("job") as follower:
        life = house.start(command=("bash", "-c", script), tty=True, ready=Ready(log="up"))
        await life.ready()
        await life.run.attach.write(b"hello\n")
        await until(follower, b"<hello>\r\n")
        life.run.attach.resize(50, 132)
        await life.run.attach.write(b"more\n")
        await until(follower, b"<more>\r\n")
        await life.run.attach.write(b"\x03")
        assert (await life.end()).code == 3
    assert b"50 132" in house.log() and house.log().endswith(b"interrupted\r\n")


async def test_the_end_of_its_input(house):
    life = house.start(command=sh("cat; echo over"), tty=True)
    await life.ready()
    await life.run.attach.close()
    assert (await life.end()).code == 0
    assert house.log().endswith(b"over\r\n")


async def test_a_child_that_lets_go_of_it_goes_on(house):
    life = house.start(command=sh("echo up; exec >&- 2>&- 0<&-; sleep 100"), tty=True, ready=Ready(log="up"))
    pid = await life.ready()
    os.kill(pid, 0)
    outcome = await life.stop()
    assert outcome.signal == "SIGTERM"  # and not SIGHUP


@AS_ROOT
async def test_it_belongs_to_the_user(house):
    assert (await said(house, 'stat -c %U "$(tty)"; echo x > "$(tty)"', tty=True, user="nobody", cwd="/"))[0] == "nobody"


# ---- the stop command

LOOP = "while :; do sleep 0.01; done"


async def test_a_stop_command_asks_instead_of_the_signal(house):
    script = f"trap 'echo bye; exit 0' USR1; trap 'echo wrong' TERM; echo up; {LOOP}"
    asking = 'echo "asking $SUPERVISOR_JOB $MINE"; kill -USR1 $SUPERVISOR_MAINPID'
    life = house.start(command=sh(script), stop_command=sh(asking), env={"MINE": "1"}, ready=Ready(log="up"))
    await life.ready()
    outcome = await life.stop()
    assert (outcome.failed, outcome.code) == (False, 0)
    assert set(house.log().splitlines()) == {b"up", b"asking job 1", b"bye"}


async def test_a_death_by_the_signal_of_a_stop_command_is_no_failure(house):
    life = house.start(command=("sleep", "100"), stop_command=sh("kill -INT $SUPERVISOR_MAINPID"))
    await life.ready()
    outcome = await life.stop()
    assert (outcome.failed, outcome.signal) == (False, "SIGINT")


async def test_it_may_finish_after_the_main_process_is_gone(house):
    life = house.start(command=("sleep", "100"), stop_command=sh("kill $SUPERVISOR_MAINPID; sleep 0.2; echo finished"))
    await life.ready()
    await life.stop()
    assert house.log() == b"finished\n"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (sh("echo no >&2; exit 3"), "exited with code 3"),
        (("no-such-thing",), "no program 'no-such-thing' in the job's PATH: install it, or give its full path"),
    ],
)
async def test_one_that_fails_is_said_at_once_and_leaves_the_rest_to_the_grace(house, command, reason):
    life = house.start(command=("sleep", "100"), stop_command=command)
    pid = await life.ready()
    with structlog.testing.capture_logs() as logs:
        life.run.advance(Phase.STOPPING)
        while not logs:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert alive(pid)
        await life.kill()
    assert logs == [
        {"event": "stop_command failed", "log_level": "warning", "job": "job", "run": "job#1", "reason": reason}
    ]  # fmt: skip
    assert not alive(pid)


async def test_one_that_hangs_is_killed_with_the_job_and_what_it_started(house):
    hanging = "setsid sh -c 'trap \"\" TERM; echo $$; sleep 100' & echo $$; sleep 100"
    life = house.start(command=("sleep", "100"), stop_command=sh(hanging))
    pid = await life.ready()
    with house.outputs.follow("job") as follower:
        life.run.advance(Phase.STOPPING)
        seen = b""
        while len(seen.split()) < 2:
            seen += await anext(follower)
    pids = [pid, *map(int, seen.split())]
    assert all(map(alive, pids))
    await life.kill()
    assert not any(map(alive, pids))


async def test_a_job_that_ends_by_itself_needs_no_stop_command(house):
    outcome = await house.finish(command=sh("exit 3"), stop_command=sh("echo asked"))
    assert (outcome.failed, outcome.code) == (True, 3)
    assert not house.logs.exists()


async def test_a_strange_signal_is_a_failure_with_a_stop_command_too(house):
    assert (await house.finish(command=sh("kill -9 $$"), stop_command=("true",))).failed


@AS_ROOT
async def test_it_runs_as_the_job_does(house):
    asking = sh("id -un; pwd; umask; kill $SUPERVISOR_MAINPID")
    life = house.start(command=("sleep", "100"), stop_command=asking, user="nobody", cwd="/usr", umask=0o077)
    await life.ready()
    await life.stop()
    assert house.log().split() == [b"nobody", b"/usr", b"0077"]


async def test_with_a_terminal_its_output_is_captured_beside(house):
    life = house.start(command=sh("echo up; sleep 100"), tty=True, stop_command=sh("echo asked; kill $SUPERVISOR_MAINPID"))
    await life.ready()
    await life.stop()
    assert b"asked\n" in house.log()
