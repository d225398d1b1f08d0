"""The guardian: when the daemon dies without ending its children, this ends them. And the marks by which it knows them.

It is a process of its own, started as a file: `python -I -S guardian.py DAEMON INSTANCE TAG CGROUP OUTSIDE`, standard input
being the table of process groups that the daemon keeps (four bytes a group, zero where a place is free). It sleeps on the
daemon's pidfd, in a session of its own and deaf to the terminal's signals; an orderly daemon kills it as its last act.

Where the daemon has a CGROUP of its own, all that is in it is killed, and it is removed; the guardian, born in it like
everybody, has moved OUTSIDE as its first act. Everywhere, with one or without:

A process is the instance's if it is in a group or session of the table, bears the mark, or descends from one that is. The
mark is double. The environment is the mark that people can read; a program may clear it. The other is the soft limit of
RLIMIT_LOCKS, which Linux has not enforced since 2.4 and hands down over fork, exec, `setsid` and `env -i`; anyone may read
it, even of a zombie. Its upper half is the instance's tag, its lower half the serial number of the child. Where a filter of
system calls forbids to set limits, only the environment tells, and only of the living.

Imports next to nothing, so as to weigh little.
"""

from __future__ import annotations

import os
import select
import sys
import time

RLIMIT_LOCKS = 10
PAUSE_MS = 1000
SIGKILL = 9


def read(path: str) -> bytes:
    """A file of procfs; empty where the process is gone or not ours to look at."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    except (ProcessLookupError, PermissionError):
        return b""
    finally:
        os.close(fd)


def pids() -> list[int]:
    """Every process there is."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def stat_of(pid: int) -> tuple[int, int, int] | None:
    """Parent, process group and session of `pid`; None if it is gone."""
    fields = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return (int(fields[1]), int(fields[2]), int(fields[3])) if fields else None


def zombie(pid: int) -> bool:
    """Whether `pid` is dead and only waits to be reaped."""
    return read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[:1] in ([b"Z"], [b"X"])


def start_time(pid: int) -> int:
    """When `pid` was started, in ticks since the boot; -1 if it is gone."""
    fields = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[19]) if fields else -1


def limit_mark(pid: int) -> tuple[int, int] | None:
    """(tag, serial) from the limit of `pid`; None where it bears none."""
    limits = read(f"/proc/{pid}/limits")
    at = limits.find(b"Max file locks")
    soft = limits[at:].split(None, 4)[3] if at >= 0 else b""
    return divmod(int(soft), 1 << 32) if soft.isdigit() else None


def environ_mark(pid: int, *wanted: bytes) -> bool:
    """Whether the environment of `pid` has all of these `NAME=value` entries."""
    entries = read(f"/proc/{pid}/environ").split(b"\0")
    return all(entry in entries for entry in wanted)


def ours(instance: str, tag: int, groups: set[int]) -> set[int]:
    """Every living process of the instance, found in one walk of /proc."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    mark = b"SUPERVISOR_INSTANCE=" + os.fsencode(instance)
    for pid in pids():
        if pid == os.getpid() or (stat := stat_of(pid)) is None:
            continue
        parents[pid] = stat[0]
        if groups & {stat[1], stat[2]} or (limit_mark(pid) or (0,))[0] == tag or environ_mark(pid, mark):
            found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return {pid for pid in found if not zombie(pid)}


def members(cgroup: str) -> set[int]:
    """Every living process in this group and those below it; none where there is no such group, or it has no name."""
    found: set[int] = set()
    for path in _groups_below(cgroup):
        found |= {int(pid) for pid in read(f"{path}/cgroup.procs").split()}
    return found


def remove_cgroup(cgroup: str, patience: float = 1.0) -> bool:
    """Remove this group and those below it. False: something has lived in it for so many seconds.

    A process that has died may still count for a moment, though nobody sees it any more.
    """
    limit = time.monotonic() + patience
    while not _removed(cgroup):
        if time.monotonic() > limit:
            return False
        await_event(cgroup, b"populated 0")
    return True


def _removed(cgroup: str) -> bool:
    for path in _groups_below(cgroup):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError:
            return False
    return True


def _groups_below(cgroup: str) -> list[str]:
    """The deepest first."""
    return [path for path, _, _ in os.walk(cgroup, topdown=False)] if cgroup else []


def end(instance: str, tag: int, groups: set[int], cgroup: str, patience: float = 1e9) -> set[int]:
    """Kill until nothing is left that may be killed, and remove the cgroup. Returns who is left after `patience` seconds."""
    limit = time.monotonic() + patience
    _kill_cgroup(cgroup)
    for group in groups:
        _kill(-group)
    while found := {pid for pid in ours(instance, tag, groups) | members(cgroup) if _kill(pid)}:
        if time.monotonic() > limit:
            return {pid for pid in found if start_time(pid) >= 0 and not zombie(pid)}
        _await_one(found)
    remove_cgroup(cgroup, max(1.0, limit - time.monotonic()))
    return set()


def _kill_cgroup(cgroup: str) -> None:
    """All at once, whatever they fork meanwhile. (A frozen one too.)"""
    if cgroup:
        _write(f"{cgroup}/cgroup.kill", b"1")


def _write(path: str, data: bytes) -> None:
    """Write to a file of the kernel's; what it refuses will show."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, data)
    except OSError:
        pass
    finally:
        os.close(fd)


def await_event(cgroup: str, wanted: bytes) -> None:
    """Wait until `cgroup.events` says so, such as `populated 0`, at most a moment."""
    try:
        fd = os.open(f"{cgroup}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    poll = select.poll()
    poll.register(fd, select.POLLPRI)
    if wanted not in os.read(fd, 1 << 10):
        poll.poll(PAUSE_MS)
    os.close(fd)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return True


def _await_one(found: set[int]) -> None:
    """Wait until one of them is gone, at most a moment: another may have forked meanwhile."""
    poll = select.poll()
    fds: list[int] = []
    try:
        for pid in found:
            fds.append(os.pidfd_open(pid))
            poll.register(fds[-1], select.POLLIN)
        poll.poll(PAUSE_MS)
    except ProcessLookupError:
        pass
    except OSError:
        poll.poll(PAUSE_MS)  # more of them than descriptors
    finally:
        for fd in fds:
            os.close(fd)


def _await_death(daemon: int) -> None:
    """Return when the daemon is no more, also if it died before we could look."""
    try:
        fd = os.pidfd_open(daemon)
    except ProcessLookupError:
        return
    if os.getppid() == daemon:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
    os.close(fd)


def _groups() -> set[int]:
    table = os.pread(0, os.fstat(0).st_size, 0)
    return {int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table), 4)} - {0}


def main(daemon: int, instance: str, tag: int, cgroup: str, outside: str) -> None:
    """Sleep until the daemon is dead, then end what it left."""
    if cgroup:
        _write(f"{outside}/cgroup.procs", b"0")
    _await_death(daemon)
    end(instance, tag, _groups(), cgroup)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:6])
