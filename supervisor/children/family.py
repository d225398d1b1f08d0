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

import errno
import itertools
import math
import os
import resource
import select
import signal
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from supervisor.children import guardian
from supervisor.children.cgroup import Cgroup, guarantee
from supervisor.children.guard import Guard
from supervisor.children.launch import CHANNEL, NOT_PERMITTED, Launch, Launcher, why
from supervisor.children.process import file_limit_raised, nothing_ignored, noticed, subreaper
from supervisor.children.procfs import descendants, listed, open_children_list, reap, session_of
from supervisor.children.record import sweep
from supervisor.children.residence import Residence
from supervisor.children.spawner import Spawner
from supervisor.children.usage import Usage, measure
from supervisor.errors import SpawnFailed

SPAWNS_A_PASS = 3
"""So many spawns may go ahead between two turns of everybody else: a millisecond's worth, or ten where all processors are
busy. An answer of the control socket takes several turns."""

LOOKS = 4
"""So many times the list of orphans is looked at without a turn for everybody else."""

STRANGERS = 200
"""So many orphans that we have not seen before are attributed in one look: a few milliseconds' worth."""

WATCHED = 100
"""So many dying orphans are watched each by itself; of more, so many stand for all."""

PURGE_AFTER = 0.3
"""Seconds of killing after which who still gets new descendants is taken for a fork bomb."""

KILL_LIMIT = 5.0
"""Seconds after SIGKILL from which on a process counts as stuck."""

REAP_PAUSE = 0.1
"""Orphans that died are reaped after so many seconds: deaths come in crowds, and one look serves all of them."""

_STOP_SIGNALS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})


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
        return roots | {pid for root in roots for pid in descendants(root)}

    async def usage(self) -> Usage:
        """What it and all that came of it use at this moment."""
        return (await self._children.usage(self))[self]

    async def end_rest(self, number: int) -> None:
        """Once the main process is dead: signal what it left behind, and what that leaves, until nothing is left.

        Who forks faster than it can be killed one by one is killed as a whole, where there is a cgroup.
        """
        told: set[int] = set()
        since = trio.current_time()
        while (left := self._children.adopted().get(self._serial, set())) or not self._children.settled:
            for pid in left - told:
                self._children.signal_adopted(pid, number)
            if number == signal.SIGKILL and not left <= told and trio.current_time() > since + PURGE_AFTER:
                await self._children.purge(self)
                since = trio.current_time()
            told = left
            if self._children.settled:
                await _any_gone(left)
            else:
                await trio.lowlevel.checkpoint()
        self._alone = True

    async def destroy(self, *, stuck: Callable[[tuple[int, ...]], None], abandoned: trio.Event) -> ExitReport:
        """Kill everything of it and return when nothing of it is alive. Runs to its end also when cancelled.

        What is still alive after `KILL_LIMIT` is told to `stuck`, once, and waited for until `abandoned` is set.
        """
        if self._alone or (self.dead and not self._children.adopted().get(self._serial) and self._children.settled):
            return self._children._bury(self, survivors=set())  # the usual end: it left nothing behind
        with trio.CancelScope(shield=True):
            if not self.dead:
                self._descendants |= descendants(self.pid)
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

    def __init__(self, instance: str, warn: Callable[[str], None], record: Path | None) -> None:
        self.instance = instance
        self.survived = False
        """Whether something could not be killed at the end."""
        self._tag = zlib.crc32(instance.encode()) >> 1
        self._spawner = Spawner()
        self._residence = Residence(record, instance, self._tag, warn) if record else None
        self._guardian = Guard(instance, self._tag, self._spawner, self._residence, warn)
        self._guarded = False
        self._gate = trio.Semaphore(SPAWNS_A_PASS)
        self._walker = trio.CapacityLimiter(1)
        self._serials = itertools.count(1)
        self._spawned: dict[int, Child] = {}
        self._adopted: dict[int, int] = {}
        self.settled = True
        """Whether the last answer of `adopted` was complete."""
        self._purging = trio.Lock()
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._list = open_children_list()
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._reserve = os.dup(self.null)

    @property
    def guarantee(self) -> str:
        """What becomes of the children if this process is killed, in one sentence."""
        return self._residence.guarantee if self._residence else guarantee(None, "only a daemon has one")

    @property
    def cgroup(self) -> Cgroup | None:
        """The group in which all of them are, from the first one on, where there is one."""
        return self._residence.cgroup if self._residence else None

    def get(self, pid: int) -> Child | None:
        """The child with this main process, until its end has been reported."""
        return self._spawned.get(pid)

    def comes_from(self, pid: int, run: str) -> bool:
        """Whether the process `pid` is of this run: spawned for it, or come from what was. False if it is gone."""
        if (leader := self._spawned.get(session_of(pid))) is not None:
            return leader.run == run
        serial = self._with_reserve(self._owner, pid)
        return any(child._serial == serial and child.run == run for child in self._spawned.values())

    async def spawn(self, launch: Launch) -> Child:
        """Start a program in a session of its own.

        The child inherits exactly 0, 1, 2, its sockets and its channel, default signal dispositions and an empty
        mask; its environment is that of `launch` and the marks of `instance` and `run`. In a crowd, spawns take turns with
        everything else, in order of arrival. Cancelled: there is no child. Raises SpawnFailed, whose text says what to do.
        """
        if not self._guarded:
            self._guarded = True
            if self._residence is not None:
                self._residence.take_up()
            self._guardian.ensure()
            self.nursery.start_soon(self._guardian.keep, name="guardian of the children")
        marks = {"SUPERVISOR_INSTANCE": self.instance, **({"SUPERVISOR_RUN": launch.run} if launch.run else {})}
        if launch.needs_launcher:
            return await self._spawn_by_launcher(launch, marks)
        if launch.channel is not None:
            marks[CHANNEL] = str(launch.channel)
        passed = [] if launch.channel is None else [launch.channel]
        async with self._gate:
            return self._spawn(launch, launch.argv, env={**launch.env, **marks}, cwd=launch.cwd, pass_fds=passed)

    async def _spawn_by_launcher(self, launch: Launch, marks: dict[str, str]) -> Child:
        async with self._gate:
            with ExitStack() as opened, _told(launch):
                launcher = opened.enter_context(Launcher(launch, {**launch.env, **marks}, self._files))
                child = self._spawn(launch, launcher.argv, env=marks, cwd=None, pass_fds=launcher.descriptors)
                opened = opened.pop_all()
        with opened:
            try:
                await launcher.wait()
            except BaseException:
                await child.destroy(stuck=lambda pids: None, abandoned=trio.Event())
                raise
        return child

    def _spawn(self, launch: Launch, argv: Sequence[str], **options: Any) -> Child:
        serial = next(self._serials) & 0xFFFFFFFF
        mark = self._tag << 32 | serial
        options["stdin"] = self.null if launch.stdin is None else launch.stdin
        options["umask"] = -1 if launch.umask is None else launch.umask
        with _told(launch):
            pid = self._spawner.popen(argv, mark, stdout=launch.stdout, stderr=launch.stderr, **options)
            pidfd = -1
            try:
                pidfd = os.pidfd_open(pid)
                if launch.nice is not None:
                    _renice(pid, launch)
            except (OSError, SpawnFailed):
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                if pidfd >= 0:
                    os.close(pidfd)
                raise
        if not launch.needs_launcher:
            self._give_back_file_limit(pid)
        child = self._spawned[pid] = Child(self, pid, pidfd, serial, launch.run)
        return child

    def _give_back_file_limit(self, pid: int) -> None:
        """Ours is raised for the sake of many children; theirs is what the daemon was started with."""
        try:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, self._files)
        except (ProcessLookupError, PermissionError):
            pass  # dead already, or a set-uid program

    def adopted(self) -> dict[int, set[int]]:
        """The orphans that are ours now and alive, by the serial of the child they came from. Reaps the dead ones.

        `settled` tells whether these are all. In a crowd they may not be: then look again when others have had their turn.
        """
        for _ in range(LOOKS):
            left, self.settled = self._look()
            if self.settled:
                break
        return left

    def _look(self) -> tuple[dict[int, set[int]], bool]:
        """One look at the list; not settled if somebody was reaped, who may have handed over children just before."""
        left: dict[int, set[int]] = {}
        settled, strangers = True, 0
        for pid in listed(self._list) | self._adopted.keys():
            if pid in self._spawned or pid == self._guardian.pid:
                continue
            if (serial := self._adopted.get(pid)) is None:
                strangers += 1
                if strangers > STRANGERS:
                    return left, False
                serial = self._with_reserve(self._owner, pid)
            if serial is None:
                continue  # a child of other code in this process: its exit status is not ours to take
            if reap(pid)[0] == 0:
                self._adopted[pid] = serial
                left.setdefault(serial, set()).add(pid)
            else:
                self._adopted.pop(pid, None)
                settled = False
        return left, settled

    async def usage(self, *children: Child) -> dict[Child, Usage]:
        """What each of these, or of all, uses at this moment: one walk of /proc beside the loop, whatever their number."""
        adopted = self.adopted()
        asked = {child._serial: child for child in children or self._spawned.values()}
        roots = {serial: {child.pid, *adopted.get(serial, ())} for serial, child in asked.items()}
        measured = await trio.to_thread.run_sync(measure, roots, limiter=self._walker, abandon_on_cancel=True)
        return {asked[serial]: usage for serial, usage in measured.items()}

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

    async def purge(self, child: Child) -> None:
        """Kill everything of `child` at once, where there is a cgroup: nothing can be forked meanwhile.

        Where that fails (no descriptor is left, say) it is only not done: what is killed one by one is killed all the same.
        """
        if (cgroup := self.cgroup) is not None:
            spare = partial(self._spared, child._serial)
            async with self._purging:
                with suppress(OSError):
                    try:
                        await trio.to_thread.run_sync(cgroup.purge, spare, limiter=self._walker)
                    except RuntimeError:  # no thread to be had: it has taken them all
                        cgroup.purge(spare)

    def _spared(self, serial: int, pid: int) -> bool:
        return self._with_reserve(self._owner, pid) != serial

    def _owner(self, pid: int) -> int | None:
        """The serial of the child that `pid` came from: by its session, its marks, or because we saw it below that child."""
        session = session_of(pid)
        if session == os.getsid(0):
            return None  # all of ours have left our session
        if child := self._spawned.get(session):
            return child._serial
        tag, serial = guardian.limit_mark(pid) or (0, 0)
        if tag == self._tag:
            return serial
        run = self._run_mark(pid)
        known = list(self._spawned.values())  # at one stroke: we may not be in the loop's thread
        return next((child._serial for child in known if pid in child._descendants or child.run == run), None)

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

        with noticed(signal.SIGCHLD, notice, self._spawner.settle):
            while True:
                await died.wait()
                await trio.sleep(REAP_PAUSE)
                died = trio.Event()
                self.adopted()

    def _bury(self, child: Child, survivors: set[int]) -> ExitReport:
        """Reap the main process and forget the child. What would not die is reaped when it does."""
        pid, status, usage = reap(child.pid)
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
            with trio.move_on_after(KILL_LIMIT) as limit:
                for child in list(self._spawned.values()):
                    await child.wait()
                while (left := set().union(*self.adopted().values())) or not self.settled:
                    for pid in left:
                        self.signal_adopted(pid, signal.SIGKILL)
                    if self.settled:
                        await _any_gone(left)
                    else:
                        await trio.lowlevel.checkpoint()
            self.survived = limit.cancelled_caught
            for child in list(self._spawned.values()):
                self._bury(child, set())

    async def close(self) -> None:
        """End the guardian: there is nothing left to guard."""
        with trio.CancelScope(shield=True):
            await self._guardian.close()
        if self._residence is not None:
            self._residence.give_up(self.survived)
        self._spawner.close()
        for fd in (self._list, self.null, self._reserve):
            if fd >= 0:
                os.close(fd)


@contextmanager
def _told(launch: Launch) -> Iterator[None]:
    """What fails in the block is told in words that help."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SpawnFailed(why(error, launch)) from error


def _renice(pid: int, launch: Launch) -> None:
    """Set its niceness, which only some may lower."""
    assert launch.nice is not None
    try:
        os.setpriority(os.PRIO_PROCESS, pid, launch.nice)
    except PermissionError:
        raise SpawnFailed(f"cannot start {launch.argv[0]!r}: nice {launch.nice}: {NOT_PERMITTED.format(os.getuid())}") from None
    except ProcessLookupError:
        pass


@asynccontextmanager
async def open_children(
    instance: str, *, warn: Callable[[str], None] = lambda text: None, record: Path | None = None
) -> AsyncIterator[Children]:
    """Child processes under the mark `instance`, which no other supervisor of this machine uses.

    With `record`, a file that is ours alone, this process is a daemon. What an earlier one that had the same file left is
    ended first. Where a cgroup can be had, this process moves into one of its own before its first child, until it leaves; so
    its death, however it comes, is that of all its children. `guarantee` of what is yielded says whether it is so.

    While it is open, this process adopts orphans below it, has its soft limit of open files raised to the hard one (children
    get the original), and no signal ignored but SIGPIPE and SIGXFSZ. `warn` hears of what the operator should know. On
    leaving, every child is killed. Exceptions of the body arrive in a group, as from any nursery.
    """
    async with AsyncExitStack() as process:
        process.enter_context(subreaper())
        process.enter_context(nothing_ignored())
        if record is not None and os.access(record, os.F_OK) and (found := await _swept(record)):
            warn(found)
        children = Children(instance, warn, record)
        process.push_async_callback(children.close)
        process.enter_context(file_limit_raised())
        async with trio.open_nursery() as nursery:
            children.nursery = nursery
            nursery.start_soon(children.reap_adopted, name="reaper of adopted orphans")
            try:
                yield children
            finally:
                nursery.cancel_scope.cancel(reason="the children are closed")
                await children.end()


async def _swept(record: Path) -> str | None:
    return await trio.to_thread.run_sync(sweep, record, limiter=trio.CapacityLimiter(1))


async def _any_gone(pids: set[int]) -> None:
    """Wait until one of these children of ours is dead; at most a moment where they are too many to watch them all."""
    patience = math.inf if len(pids) <= WATCHED else REAP_PAUSE
    with ExitStack() as opened:
        try:
            watch = select.epoll()
            opened.callback(watch.close)
            for pid in itertools.islice(pids, WATCHED):
                fd = os.pidfd_open(pid)
                opened.callback(os.close, fd)
                watch.register(fd, select.EPOLLIN)
        except ProcessLookupError:
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            patience = REAP_PAUSE
        with trio.move_on_after(patience):
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
