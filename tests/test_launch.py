"""What a child is started with: each option as the program itself sees it, and each that fails in words that help."""

import grp
import os
import pty
import pwd
import resource
import signal
import socket
import sys

import pytest
import trio
from test_children import ENV, ROOT, alive, children, end, open_fds, pipe, read_all, zombies

from supervisor.children import Children, Launch, guardian
from supervisor.errors import SpawnFailed

__all__ = ["children"]

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
NOBODY = pwd.getpwnam("nobody")


async def said(children: Children, script: str, *, argv=None, **options) -> list[str]:
    """The words that a shell script says under these options."""
    with pipe() as (read, write):
        child = await children.spawn(Launch(argv or ["sh", "-c", script], ENV, stdout=write, **options))
        os.close(write)
        output = await read_all(read)
        await child.wait()
        await end(child)
    return output.decode().split()


async def guarded(children: Children) -> None:
    """Return when there is a guardian, so that its descriptors are counted before and after."""
    while not children._guardian.pid:
        await end(await children.spawn(Launch(["true"], ENV)))


async def refused(children: Children, *argv: str, **options) -> str:
    """Why it was not started; and nothing is left of it."""
    await guarded(children)
    fds = open_fds()
    with pytest.raises(SpawnFailed) as failed:
        await children.spawn(Launch(argv or ["true"], ENV, **options))
    assert not children._spawned
    assert open_fds() == fds
    assert not zombies()
    return str(failed.value)


async def test_umask_and_nice_cost_no_launcher(children):
    assert not Launch(["true"], ENV, umask=0o27, nice=5).needs_launcher
    assert await said(children, "umask", umask=0o27) == ["0027"]
    child = await children.spawn(Launch(["sleep", "100"], ENV, nice=7))
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == 7
    await end(child)


async def test_a_limit_holds_for_the_program(children):
    assert await said(children, "ulimit -Sn; ulimit -Hn; ulimit -c", rlimits={"nofile": (100, 200), "core": (0, 0)}) == [
        "100", "200", "0",
    ]  # fmt: skip


async def test_limits_that_are_not_named_are_those_we_were_started_with(children):
    soft, hard = children._files
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    assert await said(children, "ulimit -Sn", rlimits={"core": (0, 0)}) == [str(soft)]


async def test_a_program_that_may_not_gain_privileges_knows_it(children):
    assert await said(children, "grep NoNewPrivs /proc/self/status", no_new_privileges=True) == ["NoNewPrivs:", "1"]


@root_only
@pytest.mark.parametrize("user", ["nobody", NOBODY.pw_uid])
async def test_a_user_brings_its_own_groups(children, user):
    assert await said(children, "id -u; id -g; id -G", user=user) == [
        str(NOBODY.pw_uid), str(NOBODY.pw_gid), *map(str, os.getgrouplist("nobody", NOBODY.pw_gid)),
    ]  # fmt: skip


@root_only
async def test_group_and_groups_are_what_is_said(children):
    daemon = grp.getgrnam("daemon").gr_gid
    options = {"user": "nobody", "group": "daemon", "groups": ["daemon", 12345]}
    assert await said(children, "id -u; id -g; id -G", **options) == [str(NOBODY.pw_uid), str(daemon), str(daemon), "12345"]
    assert await said(children, "id -u; id -g; id -G", group=12345) == ["0", "12345", "12345"]


@root_only
async def test_nothing_of_root_is_left_in_a_child_of_another_user(children):
    words = await said(children, "grep -E '^(Uid|Gid|CapEff|CapPrm|SigBlk|SigIgn)' /proc/self/status", user="nobody")
    assert words == [
        "Uid:", *[str(NOBODY.pw_uid)] * 4, "Gid:", *[str(NOBODY.pw_gid)] * 4,
        "SigBlk:", "0" * 16, "SigIgn:", "0" * 16, "CapPrm:", "0" * 16, "CapEff:", "0" * 16,
    ]  # fmt: skip


@root_only
async def test_no_privileges_are_to_be_gained_by_another_user_who_may_not_even_read_our_python(children):
    words = await said(children, "id -u; grep NoNewPrivs /proc/self/status", user="nobody", no_new_privileges=True)
    assert words == [str(NOBODY.pw_uid), "NoNewPrivs:", "1"]


async def test_sockets_come_as_systemd_hands_them_and_nothing_else_does(children):
    with socket.socket() as web, socket.socket() as admin:
        for each in (web, admin):
            each.bind(("127.0.0.1", 0))
            each.listen()
        script = """
import os, socket
names = os.environ["LISTEN_FDNAMES"].split(":")
print(os.environ["LISTEN_PID"] == str(os.getpid()), os.environ["LISTEN_FDS"])
sockets = [socket.socket(fileno=number) for number in range(3, 3 + len(names))]
for name, each in zip(names, sockets):
    print(name, each.getsockname()[1])
print(*sorted(os.listdir("/proc/self/fd")))  # the last is how it is read
"""
        words = await said(
            children, "", argv=[sys.executable, "-c", script], sockets=[("web", web.fileno()), ("admin", admin.fileno())]
        )
        ports = [str(each.getsockname()[1]) for each in (web, admin)]
    assert words == ["True", "2", "web", ports[0], "admin", ports[1], *"012345"]


async def test_sockets_lie_in_their_order_wherever_ours_lie(children):
    """Descriptors 3 and 4 of ours, exchanged: each lies where the other has to go."""
    script = "readlink /proc/self/fd/3; readlink /proc/self/fd/4; ls /proc/self/fd"
    read, write = os.pipe()
    other = os.open("/dev/zero", os.O_RDONLY)
    low = [os.dup(3), os.dup(4)]
    try:
        os.dup2(other, 3)
        os.dup2(read, 4)
        words = await said(children, script, sockets=[("pipe", 4), ("zero", 3)])
    finally:
        os.dup2(low[0], 3)
        os.dup2(low[1], 4)
        for fd in (read, write, other, *low):
            os.close(fd)
    assert words[0].startswith("pipe:") and words[1] == "/dev/zero"
    assert words[2:] == ["0", "1", "2", "3", "4", "5"]  # 5 is how ls reads the directory


async def test_a_terminal_is_the_controlling_one(children):
    master, slave = pty.openpty()
    try:
        launch = Launch(
            ["sh", "-c", "tty; ps -o tpgid= -p $$; echo $$; read x < /dev/tty"], ENV, slave, slave, slave, tty=slave
        )
        launch = Launch(launch.argv, ENV, stdin=slave, stdout=slave, stderr=slave, tty=slave)
        child = await children.spawn(launch)
        name = os.ttyname(slave)
        os.set_blocking(master, False)
        output = b""
        while output.count(b"\n") < 3:
            await trio.lowlevel.wait_readable(master)
            output += os.read(master, 4096)
        assert output.decode().split() == [name, str(child.pid), str(child.pid)]
        os.write(master, b"\x03")  # Ctrl-C
        await child.wait()
        assert (await end(child)).signal == "SIGINT"
    finally:
        os.close(master)
        os.close(slave)


async def test_the_marks_survive_the_launcher_and_the_rest_is_as_without_it(children):
    child = await children.spawn(Launch(["sleep", "100"], ENV, rlimits={"core": (0, 0)}, run="api#3"))
    entries = set(guardian.read(f"/proc/{child.pid}/environ").split(b"\0")) - {b""}
    assert entries == {
        f"PATH={ENV['PATH']}".encode(), f"SUPERVISOR_INSTANCE={children.instance}".encode(), b"SUPERVISOR_RUN=api#3",
    }  # fmt: skip
    assert guardian.limit_mark(child.pid)[0] == children._tag
    assert guardian.read(f"/proc/{child.pid}/comm") == b"sleep\n"
    assert os.getsid(child.pid) == child.pid
    await end(child)


@pytest.mark.parametrize("launcher", [False, True])
async def test_what_is_wrong_with_the_program_is_said_in_the_same_words_by_a_launcher(children, tmp_path, launcher):
    more = {"rlimits": {"core": (0, 0)}} if launcher else {}
    (tmp_path / "script").write_text("#!/bin/sh\n")
    (tmp_path / "odd").write_text("#!/no/such/interpreter\n")
    (tmp_path / "odd").chmod(0o755)
    script, odd = str(tmp_path / "script"), str(tmp_path / "odd")
    assert await refused(children, "no-such-program", **more) == (
        "no program 'no-such-program' in the job's PATH: install it, or give its full path"
    )
    assert await refused(children, "/no/such", **more) == "no such program: '/no/such'"
    assert await refused(children, script, **more) == f"cannot start {script!r}: it is not executable: chmod +x"
    assert await refused(children, str(tmp_path), **more) == f"cannot start {str(tmp_path)!r}: it is a directory"
    assert await refused(children, odd, **more) == (
        f"cannot start {odd!r}: the interpreter in its first line (#!) does not exist"
    )
    assert await refused(children, "true", cwd="/no/such", **more) == "cannot start 'true': no such directory: '/no/such' (cwd)"
    assert await refused(children, "", **more) == "cannot start: the command is empty"
    assert "cannot contain NUL" in await refused(children, "a\0b", **more)
    assert "are too long" in await refused(children, "echo", "x" * (1 << 20), **more)


@root_only
async def test_what_is_wrong_with_the_identity_is_said(children, tmp_path):
    assert await refused(children, user="no-such") == "cannot start 'true': user: there is no user 'no-such'"
    assert await refused(children, group="no-such") == "cannot start 'true': group: there is no group 'no-such'"
    assert await refused(children, groups=["no-such"]) == "cannot start 'true': groups: there is no group 'no-such'"
    assert await refused(children, user=4242) == (
        "cannot start 'true': user: uid 4242 has no entry, and so no group: say which (group)"
    )
    private = tmp_path / "private"
    private.mkdir(0o700)
    (private / "tool").write_text("#!/bin/sh\n")
    (private / "tool").chmod(0o755)
    assert await refused(children, str(private / "tool"), user="nobody") == (
        f"cannot start '{private}/tool': permission denied to user 'nobody'"
    )
    assert "permission denied to user 'nobody'" in await refused(children, cwd=str(private), user="nobody")


async def test_a_limit_that_is_refused_is_named(children):
    assert "rlimits.core: current limit exceeds maximum limit" in await refused(children, rlimits={"core": (5, 4)})
    assert await refused(children, rlimits={"corn": (5, 4)}) == "no limit is called 'corn' (rlimits)"


WITHOUT_RIGHTS = """
import os, sys, trio
from supervisor.children import Launch, open_children
from supervisor.errors import SpawnFailed

async def main():
    async with open_children("without rights") as children:
        for more in ({"user": "nobody"}, {"group": "daemon"}, {"groups": ["daemon"]}, {"nice": -5},
                     {"rlimits": {"nofile": (1 << 21, 1 << 21)}}, {"user": os.getuid()}, {"no_new_privileges": True}):
            try:
                child = await children.spawn(Launch(["sh", "-c", "exit 3"], {"PATH": os.environ["PATH"]}, **more))
            except SpawnFailed as error:
                print(error)
            else:
                await child.wait()
                print((await child.destroy(stuck=print, abandoned=trio.Event())).code)

trio.run(main)
"""


@root_only
async def test_who_may_not_is_told_so():
    """A root without the rights that make one: as in a container, or under a unit that bounds its capabilities."""
    bounded = ["setpriv", "--bounding-set", "-setuid,-setgid,-sys_nice,-sys_resource"]
    argv = [*bounded, sys.executable, "-c", WITHOUT_RIGHTS]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = await trio.run_process(argv, env=env, capture_stdout=True, capture_stderr=True, check=False)
    not_permitted = "not permitted to the user that the daemon runs as (uid 0)"
    assert done.stdout.decode().splitlines() == [
        f"cannot start 'sh': groups: {not_permitted}",
        f"cannot start 'sh': groups: {not_permitted}",
        f"cannot start 'sh': groups: {not_permitted}",
        f"cannot start 'sh': nice -5: {not_permitted}",
        "cannot start 'sh': rlimits.nofile: not allowed to raise maximum limit",
        "3",
        "3",
    ], done.stderr.decode()


async def test_cancelled_while_the_launcher_works_there_is_no_child(children):
    """It is held up at some moment of its work: here, by being stopped."""
    await guarded(children)
    seen = []
    real = children._spawner.popen

    def stopped(*args, **options):
        pid = real(*args, **options)
        os.kill(pid, signal.SIGSTOP)
        seen.append(pid)
        return pid

    children._spawner.popen = stopped
    fds = open_fds()
    with trio.move_on_after(0.2) as scope:
        await children.spawn(Launch(["sleep", "100"], ENV, no_new_privileges=True))
    assert scope.cancelled_caught
    assert not alive(seen[-1])
    assert open_fds() == fds
    assert not children._spawned


async def test_a_launcher_that_is_killed_is_no_success(children):
    await guarded(children)
    real = children._spawner.popen

    def killed(*args, **options):
        pid = real(*args, **options)
        os.kill(pid, signal.SIGKILL)
        return pid

    children._spawner.popen = killed
    with pytest.raises(SpawnFailed, match="it ended before it was started"):
        await children.spawn(Launch(["sleep", "100"], ENV, no_new_privileges=True))


async def test_without_a_free_descriptor_a_launch_fails_and_nothing_leaks(children):
    await guarded(children)
    fds, limits = open_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, fds - {str(max(map(int, fds)))}))
    outcomes = []
    for spare in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, limits[1]))
        try:
            child = await children.spawn(Launch(["true"], ENV, no_new_privileges=True))
            await child.wait()
            outcomes.append((await end(child)).code)
        except SpawnFailed as error:
            outcomes.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(open_fds()) == len(fds)
        assert not children._spawned
        assert not zombies()
    assert outcomes[-1] == 0
    assert "no file descriptor left" in outcomes[0]


async def test_the_loop_turns_while_a_launcher_works(children):
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        child = await children.spawn(Launch(["sleep", "100"], ENV, no_new_privileges=True))
        nursery.cancel_scope.cancel(reason="it has been seen")
    assert turns > 10
    await end(child)
