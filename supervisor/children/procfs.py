"""Processes as the kernel lists them."""

from __future__ import annotations

import os
import resource
import select
import signal
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress

from supervisor.children import guardian


def open_children_list() -> int:
    """The kernel's list of our children; -1 where it keeps none to read (no CONFIG_PROC_CHILDREN)."""
    try:
        return os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def listed(fd: int) -> set[int]:
    """Orphans, and what other code spawned in the main thread. Exact, since only this process takes entries off the list."""
    if fd < 0:
        return children_of(os.getpid())
    parts, at = [], 0
    while part := os.pread(fd, 1 << 16, at):
        parts.append(part)
        at += len(part)
    return set(map(int, b"".join(parts).split()))


def children_of(pid: int) -> set[int]:
    """The children of all its threads, the dead ones included."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return set()
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return {each for each in guardian.pids() if (guardian.stat_of(each) or (0,))[0] == pid}
    return {int(child) for task in tasks for child in guardian.read(f"/proc/{pid}/task/{task}/children").split()}


def descendants(pid: int) -> set[int]:
    """Everything below it, without itself."""
    found: set[int] = set()
    level = children_of(pid)
    while level:
        found |= level
        level = {child for each in level for child in children_of(each)} - found
    return found


def session_of(pid: int) -> int:
    """Its session; -1 where it is gone or not ours to ask."""
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def reap(pid: int) -> tuple[int, int, resource.struct_rusage | None]:
    """`wait4` by name, without waiting. pid 0: not dead; -1: not ours, or somebody else took its status."""
    try:
        return os.wait4(pid, os.WNOHANG)
    except ChildProcessError:
        return -1, 0, None


def spawned_by_thread() -> set[int]:
    """The children that this very thread has spawned; none where the kernel keeps no list of them."""
    return set(map(int, guardian.read(f"/proc/self/task/{threading.get_native_id()}/children").split()))


def kill_all(children: Iterable[int]) -> None:
    """Kill these children of the calling thread and everything below them; blocks until they are dead.

    Whoever has started a child waits for it; what was below them comes to us as orphans, and is reaped here.
    """
    children = set(children)
    below = {each for child in children for each in descendants(child)} - children
    with ExitStack() as opened:
        dying = select.poll()
        count = 0
        for pid in children | below:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                opened.callback(os.close, pidfd)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                dying.register(pidfd, select.POLLIN)
                count += 1
        while count:
            for pidfd, _ in dying.poll():
                dying.unregister(pidfd)
                count -= 1
    for pid in below:
        with suppress(ChildProcessError):  # it went to another subreaper
            os.waitpid(pid, os.WNOHANG)
