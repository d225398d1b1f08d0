"""Child processes and nothing else: spawn, wait, signal, and leave nothing behind.

A child gets a session of its own and is watched through its pidfd. It stays a zombie until `destroy` has ended everything
else of it: until then its pid, which is also the number of its group and session, cannot become somebody else's.

We are a *subreaper*: when a process below us dies, its children become ours. So once a child is dead, what is left of it,
double-forked or not, is in the kernel's list of our own children. There is such a list for each thread, and orphans come to
the main thread's; so we spawn in another thread, and the list to look at is nearly always empty. Who is in it is attributed
by session or mark (`guardian.py` explains the marks). Killing those hands us their children in turn, until none is left. No
walk of /proc, nothing periodic, and every signal goes to a process that only we can reap.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import trio

from supervisor import guardian
from supervisor.errors import SpawnFailed

SPAWNS_A_PASS = 8
"""So many spawns may go ahead between two turns of everybody else: a few milliseconds' worth."""

KILL_LIMIT = 5.0
"""Seconds after SIGKILL from which on a process counts as stuck."""

REAP_PAUSE = 0.1
"""Orphans that died are reaped after so many seconds: deaths come in crowds, and one look serves all of them."""

GUARDIAN_PAUSE = 1.0
"""A guardian is started at most once in so many seconds."""

_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37
_STOP_SIGNALS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_GUARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How a main process ended: `code` or `signal` ("SIGKILL"); both None if somebody else reaped it, or it never ended.

    `user` and `system` are CPU seconds and `max_rss` bytes, its reaped children included; `duration` seconds from the spawn.
    `survivors` is empty unless the wait for its end was abandoned.
    """

    code: int | None
    signal: str | None
    core: bool
    user: float
    system: float
    max_rss: int
    duration: float
    survivors: tuple[int, ...] = ()


def signal_name(number: int) -> str:
    """`9` -> `"SIGKILL"`; a real-time signal by its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Child:
    """A child process that was spawned here, and everything that came of it."""

    __slots__ = (
        "_alone",
        "_children",
        "_descendants",
        "_ended",
        "_pidfd",
        "_place",
        "_serial",
        "_started",
        "pid",
        "run",
        "sent",
    )

    def __init__(self, children: Children, pid: int, pidfd: int, serial: int, run: str) -> None:
        self.pid = pid
        self.run = run
        self.sent: set[int] = set()
        """The signals that its main process was sent through here."""
        self._children = children
        self._pidfd = pidfd
        self._serial = serial
        self._place = children._guardian.add(pid)
        self._descendants: set[int] = set()
        self._started = trio.current_time()
        self._ended: float | None = None
        self._alone = False

    @property
    def dead(self) -> bool:
        """Whether the main process has been seen dead. What it left behind may live."""
        return self._ended is not None

    async def wait(self) -> None:
        """Wait until the main process is dead. For one task at a time."""
        if self._ended is None:
            await trio.lowlevel.wait_readable(self._pidfd)
            self._ended = trio.current_time()

    def send_signal(self, number: int, *, group: bool = False) -> None:
        """Signal the main process, or its whole group. Does nothing to the dead.

        SIGCONT follows, so that a stopped process hears it, unless the signal is one that stops.
        """
        if self._pidfd < 0:
            return  # reaped: its number may be somebody else's
        if not self.dead:
            self.sent.add(number)
        signals = (number,) if number in _STOP_SIGNALS or number == signal.SIGCONT else (number, signal.SIGCONT)
        for each in signals:
            try:
                if group:
                    os.killpg(self.pid, each)  # safe: the unreaped main process holds the number
                else:
                    signal.pidfd_send_signal(self._pidfd, each)
            except ProcessLookupError:
                return

    def remaining(self) -> set[int]:
        """The pids of everything of it that is alive: it, its adopted orphans, and their descendants."""
        roots = self._children.adopted().get(self._serial, set()) | ({self.pid} if self._alive() else set())
        return roots | {pid for root in roots for pid in _descendants(root)}

    async def end_rest(self, number: int) -> None:
        """Once the main process is dead: signal what it left behind, and what that leaves, until nothing is left."""
        told: set[int] = set()
        while left := self._children.adopted().get(self._serial):
            for pid in left - told:
                self._children.signal_adopted(pid, number)
            told = left
            await _any_gone(left)
        self._alone = True

    async def destroy(self, *, stuck: Callable[[tuple[int, ...]], None], abandoned: trio.Event) -> ExitReport:
        """Kill everything of it and return when nothing of it is alive. Runs to its end also when cancelled.

        What is still alive after `KILL_LIMIT` is told to `stuck`, once, and waited for until `abandoned` is set.
        """
        if self._alone or (self.dead and not self._children.adopted().get(self._serial)):
            return self._children._bury(self, survivors=set())  # the usual end: it left nothing behind
        with trio.CancelScope(shield=True):
            if not self.dead:
                self._descendants |= _descendants(self.pid)
            self.send_signal(signal.SIGKILL, group=True)
            with trio.move_on_after(KILL_LIMIT) as limit:
                await self._end()
            if limit.cancelled_caught:
                stuck(tuple(sorted(self.remaining())))
                await _unless(abandoned, self._end)
        return self._children._bury(self, survivors=self.remaining() if limit.cancelled_caught else set())

    async def _end(self) -> None:
        await self.wait()
        await self.end_rest(signal.SIGKILL)

    def _alive(self) -> bool:
        try:
            return self._pidfd >= 0 and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False


class Children:
    """All child processes of this instance. Open it with `open_children`."""

    nursery: trio.Nursery

    def __init__(self, instance: str, warn: Callable[[str], None]) -> None:
        self.instance = instance
        self._tag = zlib.crc32(instance.encode()) >> 1
        self._spawner = _Spawner()
        self._guardian = _Guardian(instance, self._tag, self._spawner, warn)
        self._guarded = False
        self._gate = trio.Semaphore(SPAWNS_A_PASS)
        self._serials = itertools.count(1)
        self._spawned: dict[int, Child] = {}
        self._adopted: dict[int, int] = {}
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._list = _open_children_list()
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._reserve = os.dup(self.null)

    def get(self, pid: int) -> Child | None:
        """The child with this main process, until its end has been reported."""
        return self._spawned.get(pid)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        run: str = "",
    ) -> Child:
        """Start `argv` in a session of its own; standard input is empty, `stdout` and `stderr` None mean ours.

        The child inherits exactly the descriptors 0, 1 and 2, default signal dispositions and an empty mask; its environment
        is `env` and the marks of `instance` and `run`. In a crowd, spawns take turns with everything else, in order of
        arrival. Cancelled: there is no child. Raises SpawnFailed, whose text says what to do.
        """
        if not self._guarded:
            self._guarded = True
            self.nursery.start_soon(self._guardian.keep, name="guardian of the children")
        async with self._gate:
            marked = {**env, "SUPERVISOR_INSTANCE": self.instance, **({"SUPERVISOR_RUN": run} if run else {})}
            try:
                return self._spawn(argv, marked, cwd, stdout, stderr, run)
            except (OSError, ValueError) as error:
                raise SpawnFailed(_why(error, argv, env, cwd)) from error

    def _spawn(
        self, argv: Sequence[str], env: dict[str, str], cwd: str | None, stdout: int | None, stderr: int | None, run: str
    ) -> Child:
        serial = next(self._serials) & 0xFFFFFFFF
        mark = self._tag << 32 | serial
        pid = self._spawner.popen(argv, mark, stdin=self.null, stdout=stdout, stderr=stderr, env=env, cwd=cwd)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._give_back_file_limit(pid)
        child = self._spawned[pid] = Child(self, pid, pidfd, serial, run)
        return child

    def _give_back_file_limit(self, pid: int) -> None:
        """Ours is raised for the sake of many children; theirs is what the daemon was started with."""
        try:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, self._files)
        except (ProcessLookupError, PermissionError):
            pass  # dead already, or a set-uid program

    def adopted(self) -> dict[int, set[int]]:
        """The orphans that are ours now and alive, by the serial of the child they came from. Reaps the dead ones."""
        while (left := self._look()) is None:
            pass
        return left

    def _look(self) -> dict[int, set[int]] | None:
        """One look at the list; None if somebody was reaped, who may have handed over children just before."""
        left: dict[int, set[int]] = {}
        reaped = False
        for pid in _listed(self._list) | self._adopted.keys():
            if pid in self._spawned or pid == self._guardian.pid:
                continue
            serial = self._adopted.get(pid) or self._with_reserve(self._owner, pid)
            if serial is None:
                continue  # a child of other code in this process: its exit status is not ours to take
            if _reap(pid)[0] == 0:
                self._adopted[pid] = serial
                left.setdefault(serial, set()).add(pid)
            else:
                self._adopted.pop(pid, None)
                reaped = True
        return None if reaped else left

    def signal_adopted(self, pid: int, number: int) -> None:
        """Signal an orphan of ours, which nobody else can reap. SIGKILL takes its whole group along, faster than it forks."""
        if pid not in self._adopted:
            return
        try:
            if number == signal.SIGKILL and (group := os.getpgid(pid)) != os.getpgrp():
                os.killpg(group, number)
            else:
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
        except (ProcessLookupError, PermissionError):
            pass

    def _owner(self, pid: int) -> int | None:
        """The serial of the child that `pid` came from: by its session, its marks, or because we saw it below that child."""
        session = _session(pid)
        if session == os.getsid(0):
            return None  # all of ours have left our session
        if child := self._spawned.get(session):
            return child._serial
        tag, serial = guardian.limit_mark(pid) or (0, 0)
        if tag == self._tag:
            return serial
        run = self._run_mark(pid)
        return next((child._serial for child in self._spawned.values() if pid in child._descendants or child.run == run), None)

    def _run_mark(self, pid: int) -> str | None:
        """The run that the environment of `pid` names, if it is one of ours."""
        environ = dict(entry.partition(b"=")[::2] for entry in guardian.read(f"/proc/{pid}/environ").split(b"\0"))
        if environ.get(b"SUPERVISOR_INSTANCE") != os.fsencode(self.instance):
            return None
        return os.fsdecode(environ.get(b"SUPERVISOR_RUN", b"")) or None

    def _with_reserve(self, look: Callable[[int], int | None], pid: int) -> int | None:
        """`look(pid)`, also when there is no descriptor left but the one kept for this."""
        try:
            return look(pid)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        os.close(self._reserve)
        try:
            return look(pid)
        finally:
            self._reserve = os.dup(self.null)

    async def reap_adopted(self) -> None:
        """Reap orphans as they die, by pid. Needs SIGCHLD, so the main thread; elsewhere they stay until the next look."""
        if threading.current_thread() is not threading.main_thread():
            return
        died = trio.Event()

        def notice() -> None:
            died.set()

        with _noticed(signal.SIGCHLD, notice, self._spawner.settle):
            while True:
                await died.wait()
                await trio.sleep(REAP_PAUSE)
                died = trio.Event()
                self.adopted()

    def _bury(self, child: Child, survivors: set[int]) -> ExitReport:
        """Reap the main process and forget the child. What would not die is reaped when it does."""
        pid, status, usage = _reap(child.pid)
        os.close(child._pidfd)
        child._pidfd = -1
        del self._spawned[child.pid]
        if pid == 0:
            self._adopted[child.pid] = child._serial
        if not survivors:
            self._guardian.remove(child._place)
        exited, killed = pid > 0 and os.WIFEXITED(status), pid > 0 and os.WIFSIGNALED(status)
        return ExitReport(
            code=os.WEXITSTATUS(status) if exited else None,
            signal=signal_name(os.WTERMSIG(status)) if killed else None,
            core=killed and os.WCOREDUMP(status),
            user=usage.ru_utime if usage else 0.0,
            system=usage.ru_stime if usage else 0.0,
            max_rss=usage.ru_maxrss * 1024 if usage else 0,
            duration=(child._ended if child._ended is not None else trio.current_time()) - child._started,
            survivors=tuple(sorted(survivors)),
        )

    async def end(self) -> None:
        """Kill what is left, as far as it can be killed. Runs to its end also when cancelled."""
        with trio.CancelScope(shield=True):
            for child in self._spawned.values():
                child.send_signal(signal.SIGKILL, group=True)
            with trio.move_on_after(KILL_LIMIT):
                for child in list(self._spawned.values()):
                    await child.wait()
                while left := set().union(*self.adopted().values()):
                    for pid in left:
                        self.signal_adopted(pid, signal.SIGKILL)
                    await _any_gone(left)
            for child in list(self._spawned.values()):
                self._bury(child, set())

    async def close(self) -> None:
        """End the guardian: there is nothing left to guard."""
        with trio.CancelScope(shield=True):
            await self._guardian.close()
        self._spawner.close()
        for fd in (self._list, self.null, self._reserve):
            if fd >= 0:
                os.close(fd)


class _Spawner:
    """The thread that spawns. It lives as long as the children are open.

    Its signal mask is empty, as that of a child shall be: to change it for each spawn and back would cost as much as the
    spawn. (A signal that is delivered here is handled all the same: Python's handlers run in the main thread.)
    """

    def __init__(self) -> None:
        self._orders = SimpleQueue[Callable[[], int] | None]()
        self._results = SimpleQueue[int | BaseException]()
        self._thread = threading.Thread(target=self._run, name="spawner", daemon=True)
        self._thread.start()

    @trio.lowlevel.enable_ki_protection
    def popen(self, argv: Sequence[str], mark: int | None, *, mask: Collection[signal.Signals] = (), **options: Any) -> int:
        """Spawn with this limit mark and signal mask, and return the pid. Blocks for as long as that takes, as Popen does."""
        self._orders.put(lambda: _popen(argv, mark, mask, options))
        if isinstance(result := self._results.get(), BaseException):
            raise result
        return result

    @trio.lowlevel.enable_ki_protection
    def settle(self) -> None:
        """Return when the thread has handled whatever signal it had been given before."""
        self._orders.put(lambda: 0)
        self._results.get()

    def close(self) -> None:
        """End the thread."""
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        while (order := self._orders.get()) is not None:
            try:
                self._results.put(order())
            except BaseException as error:
                self._results.put(error)


def _popen(argv: Sequence[str], mark: int | None, mask: Collection[signal.Signals], options: Mapping[str, Any]) -> int:
    with _limit_mark(mark), _signals_blocked(mask) if mask else nullcontext():
        process = subprocess.Popen(argv, start_new_session=True, **options)
    process.returncode = 0  # else Popen's own clean-up would reap the child behind our back
    return process.pid


class _Guardian:
    """Our side of the guardian: the table of groups that it reads after our death, and its process."""

    def __init__(self, instance: str, tag: int, spawner: _Spawner, warn: Callable[[str], None]) -> None:
        self.pid = 0
        self._spawner = spawner
        self._instance = instance
        self._tag = tag
        self._warn = warn
        self._pidfd = -1
        self._table = os.memfd_create("supervisor-groups", os.MFD_CLOEXEC)
        self._free: list[int] = []
        self._size = 0

    def add(self, group: int) -> int:
        """Have `group` killed if we die. Returns its place, for `remove`."""
        place = self._free.pop() if self._free else self._size
        self._size = max(self._size, place + 1)
        os.pwrite(self._table, group.to_bytes(4, "little"), 4 * place)
        return place

    def remove(self, place: int) -> None:
        """The group that has this place is gone."""
        os.pwrite(self._table, bytes(4), 4 * place)
        self._free.append(place)

    async def keep(self) -> None:
        """Have a guardian at all times: one that dies is replaced."""
        while True:
            started = trio.current_time()
            try:
                self._start()
            except OSError as error:
                self._warn(f"no guardian: children would outlive a kill of the daemon: {error}")
            else:
                await trio.lowlevel.wait_readable(self._pidfd)
                self._bury()
                self._warn("the guardian of the children has died; starting another")
            await trio.sleep_until(started + GUARDIAN_PAUSE)

    def _start(self) -> None:
        command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), self._instance, str(self._tag)]
        null = subprocess.DEVNULL
        # deaf to the terminal, and without a mark: an outer supervisor shall not take it for a leftover of ours
        pid = self._spawner.popen(command, None, mask=_GUARDED, stdin=self._table, stdout=null, stderr=null, env={}, cwd="/")
        self._pidfd = os.pidfd_open(pid)
        self.pid = pid

    def _bury(self) -> None:
        _reap(self.pid)
        os.close(self._pidfd)
        self.pid, self._pidfd = 0, -1

    async def close(self) -> None:
        """Nothing is left to guard: end it and reap it."""
        if self.pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(self._pidfd)
            self._bury()
        os.close(self._table)


@asynccontextmanager
async def open_children(instance: str, *, warn: Callable[[str], None] = lambda text: None) -> AsyncIterator[Children]:
    """Child processes under the mark `instance`, which no other supervisor of this machine uses.

    While it is open, this process adopts orphans below it, has its soft limit of open files raised to the hard one (children
    get the original), and no signal ignored but SIGPIPE and SIGXFSZ. `warn` hears of what the operator should know. On
    leaving, every child is killed. Exceptions of the body arrive in a group, as from any nursery.
    """
    async with AsyncExitStack() as process:
        process.enter_context(_subreaper())
        process.enter_context(_nothing_ignored())
        children = Children(instance, warn)
        process.push_async_callback(children.close)
        process.enter_context(_file_limit_raised())
        async with trio.open_nursery() as nursery:
            children.nursery = nursery
            nursery.start_soon(children.reap_adopted, name="reaper of adopted orphans")
            try:
                yield children
            finally:
                nursery.cancel_scope.cancel(reason="the children are closed")
                await children.end()


@contextmanager
def _subreaper() -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


@contextmanager
def _nothing_ignored() -> Iterator[None]:
    """Children inherit what we ignore (`nohup` leaves SIGHUP so); a handler they do not. Popen sees to SIGPIPE and SIGXFSZ."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    ignored = [number for number in ignored if number not in (signal.SIGPIPE, signal.SIGXFSZ)]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else lambda number, frame: None)
    try:
        yield
    finally:
        for number in ignored:
            _hand_back(number, signal.SIG_IGN)


@contextmanager
def _noticed(number: signal.Signals, notice: Callable[[], None], settle: Callable[[], None]) -> Iterator[None]:
    """Have `notice` called in the loop when the signal arrives. `settle` returns once other threads have left its handler."""
    token = trio.lowlevel.current_trio_token()
    before = signal.signal(number, lambda number, frame: token.run_sync_soon(notice, idempotent=True))
    try:
        yield
    finally:
        _hand_back(number, before, settle)


def _hand_back(number: signal.Signals, handler: Any, settle: Callable[[], None] = lambda: None) -> None:
    """Restore what was there before us.

    To a signal caught while it still had a handler, Python objects loudly if it has none any more when its turn comes. So
    the kernel is told first: from then on none is caught; what had been is handled; then Python may forget its handler.
    """
    if handler in (signal.SIG_DFL, signal.SIG_IGN):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(number, int(handler))
        settle()
    signal.signal(number, handler)


@contextmanager
def _file_limit_raised() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def _limit_mark(mark: int | None) -> Iterator[None]:
    """What is spawned inside bears this mark (None: none, whatever we bear ourselves). Where limits may not be set, none."""
    soft, hard = resource.getrlimit(guardian.RLIMIT_LOCKS)
    try:
        resource.setrlimit(guardian.RLIMIT_LOCKS, (hard if mark is None else mark, hard))
    except (ValueError, OSError):  # a lower hard limit, or a filter of system calls: the environment alone must do
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(guardian.RLIMIT_LOCKS, (soft, hard))


@contextmanager
def _signals_blocked(mask: Collection[signal.Signals]) -> Iterator[None]:
    """What is spawned inside starts with exactly this signal mask."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _open_children_list() -> int:
    """The kernel's list of our children; -1 where it keeps none to read (no CONFIG_PROC_CHILDREN)."""
    try:
        return os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def _listed(fd: int) -> set[int]:
    """Orphans, and what other code spawned in the main thread. Exact, since only this process takes entries off the list."""
    if fd < 0:
        return _children_of(os.getpid())
    parts, at = [], 0
    while part := os.pread(fd, 1 << 16, at):
        parts.append(part)
        at += len(part)
    return set(map(int, b"".join(parts).split()))


def _children_of(pid: int) -> set[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return set()
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return {each for each in guardian.pids() if (guardian.stat_of(each) or (0,))[0] == pid}
    return {int(child) for task in tasks for child in guardian.read(f"/proc/{pid}/task/{task}/children").split()}


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    level = _children_of(pid)
    while level:
        found |= level
        level = {child for each in level for child in _children_of(each)} - found
    return found


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _reap(pid: int) -> tuple[int, int, resource.struct_rusage | None]:
    """`wait4` by name, without waiting. pid 0: not dead; -1: not ours, or somebody else took its status."""
    try:
        return os.wait4(pid, os.WNOHANG)
    except ChildProcessError:
        return -1, 0, None


async def _any_gone(pids: set[int]) -> None:
    """Wait until one of these children of ours is dead."""
    with ExitStack() as opened:
        watch = select.epoll()
        opened.callback(watch.close)
        try:
            for pid in pids:
                fd = os.pidfd_open(pid)
                opened.callback(os.close, fd)
                watch.register(fd, select.EPOLLIN)
        except ProcessLookupError:
            return
        await trio.lowlevel.wait_readable(watch.fileno())


async def _unless(event: trio.Event, work: Callable[[], Awaitable[None]]) -> None:
    """Do `work`, but no longer than until `event`."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await event.wait()
            nursery.cancel_scope.cancel(reason="abandoned")

        nursery.start_soon(watch)
        await work()
        nursery.cancel_scope.cancel(reason="done")


def _why(error: Exception, argv: Sequence[str], env: Mapping[str, str], cwd: str | None) -> str:
    """Why a spawn failed, for the operator."""
    program = argv[0] if argv else ""
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
    return _why_not_this(program, env, cwd, number) or f"cannot start {program!r}: {error}"


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
