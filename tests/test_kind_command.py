"""The kind `command`: real children under the tree's rules."""

import os
import signal
import sys

import pytest
import trio
from house import alive, logged_pid, open_house, sh

from supervisor.errors import SpawnFailed
from supervisor.probes import Ready
from supervisor.state import Phase


@pytest.fixture
async def house(tmp_path):
    async with open_house(tmp_path / "logs") as house:
        yield house


async def test_a_command_that_ends_reports_its_code_and_all_its_output(house):
    life = house.start(command=sh("echo out; echo err >&2; exit 3"))
    outcome = await life.end()
    assert (outcome.failed, outcome.code, outcome.signal, outcome.reason) == (True, 3, None, "exited with code 3")
    assert house.log() == b"out\nerr\n"
    assert life.notes.pid == life.run.pid
    assert life.notes.cause == "started"


async def test_success_is_what_the_job_says_it_is(house):
    assert not (await house.finish(command=("true",))).failed
    assert not (await house.finish(command=sh("exit 3"), success_exit_codes=(0, 3))).failed
    assert (await house.finish(command=("true",), success_exit_codes=(3,))).failed


async def test_a_death_by_a_strange_signal_is_a_failure(house):
    outcome = await house.finish(command=sh("kill -9 $$"))
    assert (outcome.failed, outcome.code, outcome.signal) == (True, None, "SIGKILL")
    assert outcome.reason == "killed by SIGKILL"


async def test_the_report_of_an_end_says_what_it_cost(house):
    hungry = "b = bytearray(64 << 20)\nfor _ in range(3000000): pass"
    outcome = await house.finish(command=(sys.executable, "-c", hungry))
    assert outcome.spent.cpu > 0.01 and outcome.spent.max_rss > 64 << 20
    assert 0 < outcome.spent.duration < 30


async def test_a_failure_comes_with_the_last_lines_of_this_run(house):
    await house.finish(command=sh("echo of another run; exit 1"))
    outcome = await house.finish(command=sh(r"seq 10; echo; printf 'no more \033[31mpaper\377'; exit 1"))
    assert outcome.output == ("7", "8", "9", "10", "no more �[31mpaper�")
    assert (await house.finish(command=sh("exit 1"))).output == ()
    assert (await house.finish(command=sh("echo all is well"))).output == ()
    long = await house.finish(command=sh("head -c 100000 /dev/zero | tr '\\0' x; exit 1"))
    assert long.output == ("x" * 200,)


async def test_a_command_that_cannot_be_started_says_why(house):
    await house.finish(command=("true",))
    await trio.testing.wait_all_tasks_blocked()
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(SpawnFailed, match="no program 'no-such-thing' in the job's PATH"):
        await house.finish(command=("no-such-thing",))
    with pytest.raises(SpawnFailed, match="cannot split the command"):
        await house.finish(command="echo 'unfinished")
    assert set(os.listdir("/proc/self/fd")) == fds


async def test_a_string_is_split_as_a_shell_would_but_sees_no_shell(house):
    await house.finish(command="echo 'two words' $HOME | cat")
    assert house.log() == b"two words $HOME | cat\n"


async def test_the_environment_is_the_daemons_and_the_jobs_and_the_marks(house):
    await house.finish(command=("env",), env={"COLOUR": "blue"})
    env = dict(line.split("=", 1) for line in house.log().decode().splitlines())
    assert env["COLOUR"] == "blue"
    assert env["PATH"] == os.environ["PATH"]
    assert (env["SUPERVISOR_JOB"], env["SUPERVISOR_RUN"], env["SUPERVISOR_WORKER"]) == ("job", "job#1", "0")
    assert env["SUPERVISOR_INSTANCE"] == house.resources.children.instance
    assert "NOTIFY_SOCKET" not in env


async def test_the_working_directory_is_the_jobs_or_that_of_the_file(house, tmp_path):
    (tmp_path / "own").mkdir()
    await house.finish(command=("pwd",), cwd=str(tmp_path / "own"))
    await house.finish(command=("pwd",))
    assert house.log().decode().split() == [str(tmp_path / "own"), str(tmp_path)]


async def test_output_can_go_to_a_file_or_nowhere(house, tmp_path):
    await house.finish(command=("echo", "hello"), output=str(tmp_path / "own.log"))
    await house.finish(command=("echo", "hello"), output="null")
    assert (tmp_path / "own.log").read_bytes() == b"hello\n"
    assert not house.logs.exists()


async def test_output_can_be_inherited(tmp_path, capfd):
    async with open_house(tmp_path) as house:
        await house.finish(command=("echo", "to the daemon's own"), output="inherit")
    assert capfd.readouterr().out == "to the daemon's own\n"


async def test_lost_output_is_reported_to_the_run(house):
    life = house.start(command=("head", "-c", "100000", "/dev/zero"), output="/dev/full")
    assert not (await life.end()).failed
    assert sum(count for count, _ in life.notes.lost) == 100_000


async def test_a_polite_stop_sends_the_stop_signal_and_keeps_the_last_words(house):
    life = house.start(command=sh("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"), ready=Ready(log="up"))
    await life.ready()
    outcome = await life.stop()
    assert (outcome.failed, outcome.code) == (False, 0)
    assert house.log() == b"up\nbye\n"


async def test_the_stop_signal_is_the_jobs_own_and_a_death_by_it_is_no_failure(house):
    life = house.start(command=("sleep", "100"), stop_signal="USR1")
    await life.ready()
    outcome = await life.stop()
    assert (outcome.failed, outcome.signal) == (False, "SIGUSR1")


async def test_a_stop_that_was_asked_before_the_start_is_heard(house):
    life = house.start(command=("sleep", "100"))
    assert (await life.stop()).signal == "SIGTERM"


@pytest.mark.parametrize(("stop_to", "heard"), [("main", b"TERM"), ("group", b"USR2")])
async def test_the_stop_signal_goes_to_the_main_process_or_to_its_group(house, stop_to, heard):
    loop = "while :; do sleep 0.01; done"
    child = f'trap "echo TERM; exit" TERM; trap "echo USR2; exit" USR2; echo up; {loop}'
    life = house.start(
        command=sh(f"trap 'exit 0' USR2; sh -c '{child}' & {loop}"), stop_signal="USR2", stop_to=stop_to, ready=Ready(log="up")
    )
    await life.ready()
    assert (await life.stop()).code == 0
    # the rest of the job gets TERM afterwards, and the shell has words of its own for the death of its sleep
    assert [line for line in house.log().split() if line in (b"TERM", b"USR2")] == [heard]


async def test_a_stopped_process_is_stopped_all_the_same(house):
    life = house.start(command=("sleep", "100"))
    os.kill(await life.ready(), signal.SIGSTOP)
    assert (await life.stop()).signal == "SIGTERM"


async def test_what_outlives_the_main_process_of_a_stop_is_asked_too(house):
    left = "setsid sh -c 'trap \"echo left; exit\" TERM; echo $$; while :; do sleep 0.01; done' & exec sleep 100"
    life = house.start(command=sh(left), ready=Ready(log=r"^\d+$"))
    await life.ready()
    pid = logged_pid(house)
    assert not (await life.stop()).failed
    assert house.log().split()[1:] == [b"left"]
    assert not alive(pid)


async def test_when_grace_is_over_everything_is_killed(house):
    script = "trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' & while :; do sleep 1; done"
    life = house.start(command=sh(script), ready=Ready(log=r"^\d+$"))
    pid = await life.ready()
    life.run.advance(Phase.STOPPING)
    await life.kill()
    assert life.scope.cancelled_caught
    assert life.run.outcome.signal == "SIGKILL"
    assert not alive(pid)
    assert not alive(logged_pid(house))


async def test_what_a_crash_leaves_behind_is_killed_at_once(house):
    script = "(setsid sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' &); sleep 0.2; exit 9"
    outcome = await house.finish(command=sh(script))
    assert (outcome.failed, outcome.code) == (True, 9)
    assert not alive(logged_pid(house))


async def test_output_of_a_grandchild_that_holds_the_pipe_does_not_delay_the_end(house):
    started = trio.current_time()
    outcome = await house.finish(command=sh("echo hi; sleep 50 & exit 3"))
    assert outcome.code == 3
    assert house.log() == b"hi\n"
    assert trio.current_time() - started < 10


async def test_a_run_can_be_sent_a_signal_from_outside(house):
    life = house.start(command=sh("trap 'echo usr1' USR1; echo up; while :; do sleep 0.01; done"), ready=Ready(log="up"))
    await life.ready()
    with house.outputs.follow("job") as follower:
        life.run.send_signal(signal.SIGUSR1, False)
        assert await anext(follower) == b"usr1\n"
    await life.stop()


async def test_many_runs_leave_no_descriptor_task_or_zombie(house):
    await house.finish(command=("echo", "warm"))
    fds, tasks = len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living
    for _ in range(50):
        await house.finish(command=("echo", "hello"))
    assert len(os.listdir("/proc/self/fd")) == fds
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert house.log() == b"warm\n" + b"hello\n" * 50


async def test_ready_by_a_line_of_output(house):
    life = house.start(
        command=sh("printf 'not yet\\nlist'; sleep 0.05; echo ening on 80; sleep 100"), ready=Ready(log=r"listening on \d+")
    )
    await life.ready()
    assert life.notes.cause == "its output said so"
    await life.stop()


async def test_readiness_comes_after_the_pid_however_soon_it_is_said(house):
    """With a launcher the child runs, and prints, before we know that it has been started."""
    for _ in range(20):
        life = house.start(command=sh("echo up; exec sleep 100"), no_new_privileges=True, ready=Ready(log="up"))
        assert await life.ready() is not None
        await life.stop()


async def test_a_python_child_that_prints_and_exits_at_once_loses_nothing(house):
    await house.finish(command=(sys.executable, "-c", "print('x' * 100_000)"))
    assert house.log() == b"x" * 100_000 + b"\n"
