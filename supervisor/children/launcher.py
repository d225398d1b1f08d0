"""The launcher: runs in the child, does what only the child itself can do, and becomes the program.

Started as a file: `python -I -S launcher.py ORDER STATUS`, two descriptors. ORDER is a memfd with a marshalled dict
(`launch.py` writes it), STATUS the write end of a close-on-exec pipe. One byte on it says that nothing but the exec is left;
what follows, or stands there instead, is a failure: a marshalled (what, errno, text). Only EOF after that byte is success.

Imports as little as it can: the interpreter's start is what a launcher costs.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import sys
from typing import Any

_NO_NEW_PRIVS = 38


class Refused(Exception):
    """What was refused: `what` of the order, an errno (0: none), and a text where the errno does not tell."""

    def __init__(self, what: str, number: int, text: str = "") -> None:
        super().__init__(what, number, text)


class Step:
    """Turns an OSError, ValueError or OverflowError of its block into `Refused`."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        """Nothing to do before."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise Refused(self._what, error.errno or 0, "" if error.errno else str(error))
        if isinstance(error, (ValueError, OverflowError)):
            raise Refused(self._what, 0, str(error))


def main(order_fd: int, status: int) -> None:
    """Do as ordered, and become the program; return only where that failed, once it has been reported."""
    order = marshal.loads(os.pread(order_fd, os.fstat(order_fd).st_size, 0))
    status = fcntl.fcntl(status, fcntl.F_DUPFD_CLOEXEC, 3 + len(order["handed"]))
    try:
        identity = _identity(order)
        _take_terminal(order["tty"])
        _place(order["handed"], order["passed"])
        _limit(order["rlimits"])
        prctl = _prctl() if order["no_new_privileges"] else None  # while its file can be read for certain
        _become(*identity)
        with Step("cwd"):
            os.chdir(order["cwd"])
        if prctl is not None:
            _renounce(prctl)
        _default_signals()
        if order["listening"]:
            order["env"][b"LISTEN_PID"] = b"%d" % os.getpid()
        os.write(status, b"+")
        _exec(order)
    except Refused as refused:
        os.write(status, marshal.dumps(refused.args))


def _identity(order: dict[str, Any]) -> tuple[int | None, int | None, list[int] | None]:
    """User, group and supplementary groups as numbers; None: as they are. Needs files, so it comes before any limit."""
    user, group, groups = order["user"], order["group"], order["groups"]
    if user is None and group is None and not groups:
        return None, None, None
    import grp
    import pwd

    entry = None
    if user is not None:
        with Step("user"):
            try:
                entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
            except KeyError:
                if not isinstance(user, int):
                    raise Refused("user", 0, f"there is no user {user!r}") from None
                if group is None:
                    raise Refused("user", 0, f"uid {user} has no entry, and so no group: say which (group)") from None
    uid = None if user is None else entry.pw_uid if entry else user
    gid = _gid(grp, group, "group") if group is not None else entry.pw_gid if entry else None
    if (uid, gid) == (os.getuid(), os.getgid()) and not groups:
        return None, None, None  # so already: it needs no right to become so
    if groups:
        others = [_gid(grp, each, "groups") for each in groups]
    else:
        others = os.getgrouplist(entry.pw_name, gid) if entry and gid is not None else [gid] if gid is not None else []
    return uid, gid, others


def _gid(grp: Any, group: str | int, what: str) -> int:
    if isinstance(group, int):
        return group
    try:
        return int(grp.getgrnam(group).gr_gid)
    except KeyError:
        raise Refused(what, 0, f"there is no group {group!r}") from None


def _take_terminal(tty: int | None) -> None:
    """We lead a session that has none yet."""
    if tty is not None:
        import termios

        with Step("tty"):
            fcntl.ioctl(tty, termios.TIOCSCTTY, 0)


def _place(handed: list[int], passed: list[int]) -> None:
    """What is handed over to 3, 4, ...; nothing else stays open over the exec. Any may lie where another has to go."""
    with Step("sockets"):
        first = 3 + len(handed)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first) for fd in handed]
        for fd in passed:
            if fd > 2:
                os.close(fd)
        for number, fd in enumerate(high, 3):
            os.dup2(fd, number)


def _limit(limits: list[tuple[str, int, int, int]]) -> None:
    import resource

    for name, number, soft, hard in limits:
        with Step(f"rlimits.{name}"):
            resource.setrlimit(number, (soft, hard))


def _become(uid: int | None, gid: int | None, groups: list[int] | None) -> None:
    """Leave nothing of the former identity."""
    with Step("groups"):
        if groups is not None:
            os.setgroups(groups)
    with Step("group"):
        if gid is not None:
            os.setresgid(gid, gid, gid)
    with Step("user"):
        if uid is not None:
            os.setresuid(uid, uid, uid)


def _prctl() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True).prctl


def _renounce(prctl: Any) -> None:
    """No program run from here on gains rights by its set-uid bit or its file's capabilities."""
    import ctypes

    with Step("no_new_privileges"):
        if prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


def _default_signals() -> None:
    """Python ignores two, and would hand that down."""
    import _signal  # type: ignore[import-not-found]  # without the enums of `signal`

    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def _exec(order: dict[str, Any]) -> None:
    """Try the places where the program may be, in their order, as a shell would; the first other error than absence counts."""
    with Step("exec"):
        failure: OSError | None = None
        for path in order["paths"]:
            try:
                os.execve(path, order["argv"], order["env"])
            except (FileNotFoundError, NotADirectoryError) as error:
                failure = failure or error
            except OSError as error:
                failure = error
        raise failure or FileNotFoundError(2, "no PATH")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
