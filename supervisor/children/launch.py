"""What a child is started with, how it is handed to the launcher where one is needed, and why a start failed."""

from __future__ import annotations

import errno
import marshal
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import trio

from supervisor.children import launcher
from supervisor.errors import SpawnFailed

NOT_PERMITTED = "not permitted to the user that the daemon runs as (uid {})"

CHANNEL = "SUPERVISOR_CHANNEL"
"""Where a program that is given a channel finds its number."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A program and everything that its process shall be.

    `stdin` None is empty, `stdout` and `stderr` None are ours. `nice` is absolute. `user`, `group` and `groups` are names or
    numbers; with a user its own groups are the default. `rlimits` maps names such as "nofile" to (soft, hard), -1 being no
    limit. `sockets` are pairs (name, descriptor), which the program gets as LISTEN_FDS. `tty` is the slave of a pseudo
    terminal that becomes the controlling terminal; whoever wants it as standard input too says so. What stands between `nice`
    and `channel` is done by a launcher inside the child, which costs an interpreter's start: some ten milliseconds, paid by
    nobody else. `channel` is one more descriptor for the program, which finds its number in $SUPERVISOR_CHANNEL.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(repr=False)
    cwd: str | None = None
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    umask: int | None = None
    nice: int | None = None
    user: str | int | None = None
    group: str | int | None = None
    groups: Sequence[str | int] = ()
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    no_new_privileges: bool = False
    sockets: Sequence[tuple[str, int]] = ()
    tty: int | None = None
    channel: int | None = None
    run: str = ""

    @property
    def needs_launcher(self) -> bool:
        """Whether something is asked for that only the child itself can do."""
        identity = self.user is not None or self.group is not None or bool(self.groups)
        return identity or bool(self.rlimits or self.sockets) or self.no_new_privileges or self.tty is not None

    @property
    def handed(self) -> list[int]:
        """The descriptors that the launcher lays out for the program, from 3 on."""
        return [fd for _, fd in self.sockets] + ([] if self.channel is None else [self.channel])


class Launcher:
    """Our side of a launcher: the order for it, and the pipe on which it says what it could not do. A context manager."""

    def __init__(self, launch: Launch, env: Mapping[str, str], files: tuple[int, int]) -> None:
        """`env` is the program's environment, `files` its limit of open files unless the launch says otherwise."""
        self._launch = launch
        limits = {"nofile": files, **launch.rlimits}
        self._order: dict[str, Any] = {
            "argv": [os.fsencode(word) for word in launch.argv],
            "paths": [os.fsencode(path) for path in _paths(launch)],
            "env": {os.fsencode(name): os.fsencode(value) for name, value in {**env, **_told(launch)}.items()},
            "cwd": os.fsencode(launch.cwd or str(Path.cwd())),
            "user": launch.user,
            "group": launch.group,
            "groups": list(launch.groups),
            "rlimits": [(name, _limit_number(name), *limits[name]) for name in limits],
            "no_new_privileges": launch.no_new_privileges,
            "handed": launch.handed,
            "listening": bool(launch.sockets),
            "tty": launch.tty,
        }
        words = [*self._order["argv"], self._order["cwd"], *self._order["env"], *self._order["env"].values()]
        if any(b"\0" in word for word in words):
            raise ValueError("embedded null byte")

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._status, self._report = os.pipe2(os.O_CLOEXEC)
            opened.callback(os.close, self._status)
            self._ours = opened.enter_context(ExitStack())
            self._ours.callback(os.close, self._report)
            memory = os.memfd_create("supervisor-launch", os.MFD_CLOEXEC)
            self._ours.callback(os.close, memory)
            handed = self._launch.handed + ([] if self._launch.tty is None else [self._launch.tty])
            self.descriptors = sorted({memory, self._report, *handed})
            _write(memory, marshal.dumps({**self._order, "passed": self.descriptors}))
            os.set_blocking(self._status, False)
            self.argv = [sys.executable, "-I", "-S", launcher.__file__, str(memory), str(self._report)]
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    async def wait(self) -> None:
        """Wait, once it is started, until it has become the program. Raises SpawnFailed if it could not."""
        self._ours.close()
        said = b""
        while True:
            await trio.lowlevel.wait_readable(self._status)
            if not (part := os.read(self._status, 1 << 12)):
                break
            said += part
        if said == b"+":
            return
        what, number, text = marshal.loads(said.removeprefix(b"+")) if said else ("exec", 0, "it ended before it was started")
        raise SpawnFailed(_why_refused(what, number, text, self._launch))


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _paths(launch: Launch) -> list[str]:
    """Where the program may be; a relative one is meant from the child's working directory."""
    program = launch.argv[0] if launch.argv else ""
    if not program:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return [program] if "/" in program else [os.path.join(each, program) for each in os.get_exec_path(dict(launch.env))]


def _told(launch: Launch) -> dict[str, str]:
    """What the program is told of the descriptors that are laid out for it."""
    count = len(launch.sockets)
    told = {"LISTEN_FDS": str(count), "LISTEN_FDNAMES": ":".join(name for name, _ in launch.sockets)} if count else {}
    return told if launch.channel is None else {**told, CHANNEL: str(3 + count)}


def _limit_number(name: str) -> int:
    number = getattr(resource, f"RLIMIT_{name.upper()}", None)
    if not isinstance(number, int):
        raise SpawnFailed(f"no limit is called {name!r} (rlimits)")
    return number


def _why_refused(what: str, number: int, text: str, launch: Launch) -> str:
    """Why the launcher did not get to the program, or not further."""
    program = launch.argv[0]
    reason = text or os.strerror(number).lower()
    if what in ("exec", "cwd") and number:
        return why(OSError(number, reason), launch)
    if number == errno.EPERM:
        reason = NOT_PERMITTED.format(os.getuid())
    return f"cannot start {program!r}: {what}: {reason}"


def why(error: Exception, launch: Launch) -> str:
    """Why a spawn failed, for the operator."""
    program, env, cwd = launch.argv[0] if launch.argv else "", launch.env, launch.cwd
    if isinstance(error, ValueError):
        return f"cannot start {program!r}: {error}: a command, an environment and a cwd cannot contain NUL"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return f"cannot start {program!r}: no file descriptor left: raise the limit of open files (LimitNOFILE=, ulimit -n)"
    if number in (errno.EAGAIN, errno.ENOMEM):
        return f"cannot start {program!r}: {os.strerror(number)}: too many processes (TasksMax=, ulimit -u) or no memory"
    if number == errno.E2BIG:
        return f"cannot start {program!r}: the command and its environment are too long"
    if cwd is not None and not os.path.isdir(cwd):
        return f"cannot start {program!r}: no such directory: {cwd!r} (cwd)"
    if cwd is not None and not os.access(cwd, os.X_OK):
        return f"cannot start {program!r}: may not enter {cwd!r} (cwd)"
    if reason := _why_not_this(program, env, cwd, number):
        return reason
    whose = f" to user {launch.user!r}" if launch.user is not None and number == errno.EACCES else ""
    return f"cannot start {program!r}: {os.strerror(number).lower() if number else error}{whose}"


def _why_not_this(program: str, env: Mapping[str, str], cwd: str | None, number: int | None) -> str | None:
    """What is wrong with the program itself."""
    if not program:
        return "cannot start: the command is empty"
    if "/" not in program:
        searched = [Path(cwd or "", entry, program) for entry in os.get_exec_path(dict(env))]
        path = next((each for each in searched if each.exists()), None)
        if path is None:
            return f"no program {program!r} in the job's PATH: install it, or give its full path"
    else:
        path = Path(cwd or "", program)
    if not path.exists():
        return f"no such program: {str(path)!r}"
    if path.is_dir():
        return f"cannot start {str(path)!r}: it is a directory"
    if not os.access(path, os.X_OK):
        return f"cannot start {str(path)!r}: it is not executable: chmod +x"
    if number == errno.ENOEXEC:
        return f"cannot start {str(path)!r}: not a program of this machine; a script needs a first line such as #!/bin/sh"
    if number == errno.ENOENT:
        return f"cannot start {str(path)!r}: the interpreter in its first line (#!) does not exist"
    return None
