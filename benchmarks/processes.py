"""A daemon under measurement: its process tree, its memory and processor time, and its end with all that is left.

This process makes itself a subreaper, so that every orphan of the daemon becomes a child of ours: nothing that a supervisor
leaves behind can hide, an orderly stop is over exactly when we have no child left, and Ctrl-C leaves no process either.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import Failed

PR_SET_CHILD_SUBREAPER = 36
CPUCLOCK_SCHED = 2
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def workplace() -> Iterator[None]:
    """Adopt every orphan, allow as many descriptors as the machine does, and leave no process behind, whatever happens."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for ending in ENDINGS:
        signal.signal(ending, _interrupt)
    try:
        yield
    finally:
        end_everything()


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def children_of() -> dict[int, list[int]]:
    """Parent -> children, for all processes there are."""
    tree: dict[int, list[int]] = defaultdict(list)
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The command name is in parentheses and may hold any byte; the parent is the second field after it.
            tree[int(stat[stat.rindex(b")") :].split(None, 3)[2])].append(int(entry.name))
    return tree


def descendants() -> list[int]:
    """Every process below this one, parents first."""
    tree, found = children_of(), [os.getpid()]
    for pid in found:
        found += tree.get(pid, ())
    return found[1:]


def end_everything() -> int:
    """Kill all below this process, parents first so that nobody restarts anybody, and reap it. How many there were."""
    killed: set[int] = set()
    # Held back, not ignored: a Ctrl-C must neither leave half of them nor be lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        while below := descendants():
            for pid in below:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed.add(pid)
            _reap_the_dead()
        return len(killed)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reap_the_dead() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


@dataclass(frozen=True)
class Use:
    """Processor time (nanoseconds) and voluntary waits of one thread since it began."""

    cpu: int
    waits: int


Uses = Mapping[tuple[int, int], Use]


def use_of(pids: Sequence[int]) -> Uses:
    """What every thread of `pids` has used, by pid and thread."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                cpu = int((task / "schedstat").read_text().split()[0])
                status = (task / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that has just ended
            waits = int(status.split("voluntary_ctxt_switches:", 1)[1].split(None, 1)[0])
            found[pid, int(task.name)] = Use(cpu, waits)
    return found


def used_between(before: Uses, after: Uses) -> Use:
    """The difference. A thread that has ended took its numbers with it: it woke up once, at least, to do so."""
    ended = len(before.keys() - after.keys())
    nothing = Use(0, 0)
    cpu = sum(use.cpu - before.get(thread, nothing).cpu for thread, use in after.items())
    return Use(cpu, ended + sum(use.waits - before.get(thread, nothing).waits for thread, use in after.items()))


def clocks_of(pids: Sequence[int]) -> Mapping[int, int]:
    """The processor time (nanoseconds) of each whole process, its ended threads included."""
    found = {}
    for pid in pids:
        try:
            found[pid] = time.clock_gettime_ns(~pid << 3 | CPUCLOCK_SCHED)  # as clock_getcpuclockid(3) makes it
        except OSError:
            continue  # gone
    return found


def spent_between(before: Mapping[int, int], after: Mapping[int, int]) -> float:
    """Processor seconds of those that were there all the time: no child that came or went."""
    return sum(after[pid] - before[pid] for pid in before.keys() & after.keys()) / 1e9


def rss_of(pid: int) -> int:
    """Resident set size in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def pss_of(pids: Sequence[int]) -> int:
    """Proportional set size in bytes: what `pids` hold, shared pages divided among those who share them."""
    total = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += int(rollup.split("\nPss:", 1)[1].split(None, 1)[0]) * 1024
    return total


class Daemon:
    """A supervisor that we started, in a session of its own."""

    def __init__(self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.spawned_at = time.monotonic_ns()
            self._process = subprocess.Popen(
                argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended. Reaps it if it has."""
        return self._process.poll() is None

    def helpers(self, children: Sequence[int]) -> list[int]:
        """The supervisor's own processes: all below us except the `children` that it keeps."""
        kept = set(children)
        return [pid for pid in descendants() if pid not in kept]

    def stop(self, signal_number: int, *, timeout: float) -> float:
        """Send the signal; the seconds until it and everything below it were gone."""
        began = time.monotonic()
        self._process.send_signal(signal_number)
        _wait_for(self._process.pid, began + timeout)
        self._process.wait()
        while True:
            try:
                pid, _status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return time.monotonic() - began
            if pid == 0:
                for orphan in children_of()[os.getpid()]:
                    _wait_for(orphan, began + timeout)

    def complaint(self) -> str:
        """The last lines it wrote, for the message of a failure."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "it wrote nothing"

    def end(self) -> int:
        """Kill it and everything below. How many processes there were."""
        killed = end_everything()
        if self._process.returncode is None:
            self._process.returncode = -signal.SIGKILL  # reaped above, behind Popen's back
        return killed


def _wait_for(pid: int, deadline: float) -> None:
    """Wait, without reaping, until our child `pid` is dead."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            left = len(descendants())
            raise Failed(f"the stop was not over in time: {left} processes were left")
    finally:
        os.close(pidfd)
