"""A daemon's life. What serves others is entered earlier and left later:

signals                     outermost: never deaf, not at the start and not at the end
  lock                      one daemon for a state directory
    log                     written to the very end
      history               hears of the last end
        control socket      answers until the tree is gone
          tree              the jobs
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import is_not
from pathlib import Path

import structlog
import trio

from supervisor import __version__, systemd
from supervisor import config as configuration
from supervisor.config import Config, Plan, preflight
from supervisor.control.server import serve_control
from supervisor.daemon import SIGNALS, hold_signals, release_signals
from supervisor.daemon.claim import NotToBeHad, Places, claimed, have_standard_streams
from supervisor.daemon.selection import select
from supervisor.errors import ControlError, EssentialEnded, RestartIntensityExceeded, SpecError
from supervisor.events import Journal, ReloadRefused
from supervisor.history import History, keep_history
from supervisor.log import Log, open_log
from supervisor.nodes import Order
from supervisor.spec import split_name
from supervisor.stalls import watching_for_stalls
from supervisor.state import Phase
from supervisor.systemd import Notifier
from supervisor.tree import Supervisor, open_supervisor
from supervisor.unix import SocketTaken

DONE, FAILED, USAGE, FAULT_OF_OURS, NO_PLACE, WRONG_FILE = 0, 1, 2, 70, 73, 78
"""Exit codes, as sysexits.h has them where it has them."""

HISTORY = "history.db"
"""In the state directory: what became of every run."""

INSTANCE = "instance"
"""In the state directory: what a daemon notes of itself for the one after it."""

AGAIN = 0.2
"""Seconds after the first signal to stop before another one counts as impatience, and not as its echo."""

TURN = 0.001
"""Seconds that a thread may keep the interpreter from others that want it; left alone, Python gives it 5 ms. So long the loop
waits each time it wakes while a thread of a job computes, and the thread of a queue while the loop has much to do."""

_log = structlog.get_logger("supervisor")


def run(path: str, only: Sequence[str] = ()) -> int:
    """Run a daemon in the foreground until it is told to stop, or gives up. Returns the exit code.

    Call `hold_signals` before, as early as possible. They stay blocked afterwards: one that arrives at the very end has
    nothing left to end. Where it fails it ends the process, whatever threads are left.
    """
    have_standard_streams()
    sys.setswitchinterval(TURN)
    code = trio.run(serve, path, only)
    if code == FAILED:  # perhaps for a thread that does not end; Python would wait for those of executors, and for others
        atexit._run_exitfuncs()
        os._exit(code)
    return code


async def serve(path: str, only: Sequence[str] = (), environ: MutableMapping[str, str] = os.environ) -> int:
    """A daemon's whole life; main thread only. What in `environ` systemd meant for us is taken out of it."""
    with trio.open_signal_receiver(*SIGNALS) as signals:
        release_signals()
        try:
            async with trio.open_nursery() as nursery:
                daemon = Daemon(Path(path), only, environ)
                nursery.start_soon(daemon.obey, signals)
                code = await daemon.live()
                nursery.cancel_scope.cancel(reason="the daemon has ended")
            return code
        finally:
            hold_signals()


class Daemon:
    """What one daemon knows of itself. `live` is its life; `obey` and `reload` steer it from beside."""

    def __init__(self, path: Path, only: Sequence[str], environ: MutableMapping[str, str]) -> None:
        self._path = path.absolute()
        self._only = only
        self._environ = environ
        self._notifier = Notifier.from_environment(environ)
        self._listening = systemd.listening(environ)
        self._places = Places(environ)
        self._loading = trio.CancelScope()
        self._stop_asked: tuple[float, str] | None = None
        self._hup, self._hups = trio.open_memory_channel[str](1)
        self._reload_lock = trio.Lock()
        self._reloaded = trio.Event()
        self._log: Log
        self._history: History
        self._tree: Supervisor | None = None

    # -- life -----------------------------------------------------------------------------------------------------------

    async def live(self) -> int:
        """Load, start, run, stop. Returns the exit code: every way to end that we know of has one."""
        try:
            with self._loading:
                config = await self._load()
            if self._loading.cancelled_caught:
                return DONE
            os.chdir(config.base)
            with claimed(config, self._places), open_log(config.log, config.base) as self._log:
                return await self._live(config)
        except SpecError as error:
            return _complain(str(error), WRONG_FILE)
        except NotToBeHad as error:
            return _complain(f"supervisor: {error}", NO_PLACE)
        except ControlError as error:
            return _complain(f"supervisor: {error}", USAGE)
        finally:
            self._notifier.close()

    async def _live(self, config: Config) -> int:
        """With lock and log. Whatever comes out of the tree is said in the log, and becomes the exit code."""
        journal = Journal()
        self._log.attach(journal)
        try:
            async with trio.open_nursery() as servers:
                keep = partial(keep_history, journal, config.state_dir / HISTORY, ends=partial(self._ends, config))
                self._history = await servers.start(keep)
                async with open_supervisor(
                    config,
                    echo=self._log.echo,
                    environ=self._environ,
                    journal=journal,
                    last_resort=self._end_at_once,
                    listening=self._listening,
                    record=config.state_dir / INSTANCE,
                ) as self._tree:
                    await self._serve(servers, self._tree)
                    await self._tree.wait_stopped()
                servers.cancel_scope.cancel(reason="the tree has ended")
        except Exception as error:
            return self._judge(error)
        return self._bid_farewell(self._tree)

    def _ends(self, at_first: Config, name: str) -> bool:
        """Whether a run of this name comes to an end by itself; one that no configuration knows is executed once."""
        config = at_first if self._tree is None else self._tree.config
        base, worker = split_name(name)
        if (job := config.jobs.get(base)) is None:
            return name not in config.supervisors
        return not job.service and (worker is not None or not job.grouped)  # a group of workers only holds those that do

    async def _serve(self, servers: trio.Nursery, tree: Supervisor) -> None:
        """Start what others need of a running tree; returns when they may rely on it."""
        path = Path(tree.config.daemon.socket or "")
        await self._start_control(servers, tree, path)
        servers.start_soon(self._reload_when_asked, tree)
        servers.start_soon(self._tell_the_manager, tree)
        servers.start_soon(self._watch_for_stalls, tree)
        if self._notifier.watchdog_interval is not None:
            servers.start_soon(self._feed_the_watchdog, self._notifier.watchdog_interval)
        self._announce(tree.config)
        _log.info(tree.resources.children.guarantee)
        self._notifier.ready(self._status(tree))
        if self._stop_asked is not None:
            tree.shutdown(self._stop_asked[1])

    async def _start_control(self, servers: trio.Nursery, tree: Supervisor, path: Path) -> None:
        """Serve the control socket. Raises NotToBeHad where the path is taken or cannot be bound."""
        try:
            await servers.start(partial(serve_control, tree, path, reload=self.reload, history=self._history))
        except Exception as error:
            causes = list(_leaves(error))
            if all(isinstance(cause, (SocketTaken, OSError)) for cause in causes):
                raise NotToBeHad(f"no control socket: {causes[0]}") from error
            raise

    def _announce(self, config: Config) -> None:
        for warning in config.warnings:
            _log.warning(str(warning))
        for name in self._listening.keys() - config.sockets.keys():
            _log.warning("the service manager passed a socket that no [sockets] table names", socket=name)
        _log.info(
            "running",
            version=__version__,
            pid=os.getpid(),
            file=str(config.file),
            jobs=len(config.jobs),
            supervisors=len(config.supervisors),
            socket=config.daemon.socket,
        )
        if self._log.echo is not None:
            _log.info("look with `supervisor status` in another terminal; Ctrl-C stops everything, in order")

    def _status(self, tree: Supervisor) -> str:
        count = len(tree.config.jobs)
        return f"{count} {'job' if count == 1 else 'jobs'} from {self._path}"

    async def _tell_the_manager(self, tree: Supervisor) -> None:
        phase = Phase.RUNNING
        while phase is not Phase.KILLING:
            phase = await tree.phase.wait_value(partial(is_not, phase))
            self._notifier.stopping(phase.value, tree.config.daemon.grace)

    async def _watch_for_stalls(self, tree: Supervisor) -> None:
        while True:
            with watching_for_stalls(tree.config.daemon.stall_after, tree.journal):
                await self._reloaded.wait()
            self._reloaded = trio.Event()

    async def _feed_the_watchdog(self, interval: float) -> None:
        while True:
            self._notifier.watchdog()
            await trio.sleep(interval / 2)

    # -- end ------------------------------------------------------------------------------------------------------------

    def _judge(self, error: Exception) -> int:
        """The exit code for what came out of the tree, said to whoever must act."""
        causes = list(_leaves(error))
        if all(isinstance(cause, (RestartIntensityExceeded, EssentialEnded)) for cause in causes):
            assert self._tree is not None
            _log.error("gave up", cause=str(causes[0]))
            return self._bid_farewell(self._tree) or FAILED
        if isinstance(causes[0], NotToBeHad):
            raise causes[0]
        _log.critical("a fault of ours: please report it", exc_info=error)
        return FAULT_OF_OURS

    def _bid_farewell(self, tree: Supervisor) -> int:
        if tree.late:
            _log.warning("did not stop in time and were killed", jobs=list(tree.late))
        if tree.survivors:
            _log.error("still alive", jobs=list(tree.survivors))
        _log.info("the daemon has ended", cause=tree.ending)
        return FAILED if tree.survivors else DONE

    def _end_at_once(self) -> None:
        """The tree cannot end: a task ignores its cancellation. What is said must be said now."""
        _log.critical("a task ignores its cancellation: ending without it")
        self._log.close()
        os._exit(FAILED)

    # -- steering -------------------------------------------------------------------------------------------------------

    async def obey(self, signals: AsyncIterator[int]) -> None:
        """Do what signals ask for, as long as we live. They coalesce, so they are never counted."""
        async for number in signals:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                with suppress(trio.WouldBlock):  # one is waiting already, and will read what is there then
                    self._hup.send_nowait(name)
            else:
                self._stop(name)

    def _stop(self, name: str) -> None:
        now = trio.current_time()
        if self._stop_asked is None:
            self._stop_asked = now, name
            self._loading.cancel(reason=name)
            if self._tree is not None:
                self._tree.shutdown(name)
        elif now - self._stop_asked[0] >= AGAIN and self._tree is not None:
            self._tree.shutdown(f"{name} again", kill=True)

    async def _reload_when_asked(self, tree: Supervisor) -> None:
        async for by in self._hups:
            if tree.phase.value is Phase.RUNNING:
                with suppress(SpecError):  # the event has said it
                    await self.reload(plan=False, by=by)

    async def reload(self, *, plan: bool, by: str) -> tuple[Plan, Sequence[Order]]:
        """Read the file again and bring the tree to it; with `plan`, only say what that would change.

        One at a time. Raises SpecError where the file has faults; then, and when cancelled before the file is read, nothing
        has changed.
        """
        assert self._tree is not None
        async with self._reload_lock:
            if self._tree.phase.value is not Phase.RUNNING:
                raise ControlError("the daemon is ending: nothing is reloaded")
            if plan:
                return self._tree.plan(await self._load_whole()), ()
            self._notifier.reloading()
            try:
                return await self._reload(self._tree, by)
            except SpecError as error:
                self._tree.journal.emit(ReloadRefused, by=by, problems=tuple(str(problem) for problem in error.problems))
                raise
            finally:
                if self._tree.phase.value is Phase.RUNNING:
                    self._notifier.ready(self._status(self._tree))

    async def _reload(self, tree: Supervisor, by: str) -> tuple[Plan, Sequence[Order]]:
        config = await self._load_whole()
        self._log.apply(config.log)
        applied = tree.apply(config, by=by)
        self._reloaded.set()
        return applied

    async def _load_whole(self) -> Config:
        """The file, and what it needs of the machine: for a running daemon both must be in order. Raises SpecError."""
        config = await self._load()
        found = await trio.to_thread.run_sync(
            partial(preflight.check, config, environ=self._environ), abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )
        if found.all_problems:
            raise SpecError(found.all_problems)
        return replace(config, warnings=(*config.warnings, *found.warnings))

    async def _load(self) -> Config:
        """The file as it is now, read beside the loop. Raises SpecError."""
        config = await trio.to_thread.run_sync(
            configuration.load, self._path, self._environ, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )
        return self._places.settle(select(config, self._only))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, however deep; the exception itself where it is no group."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _complain(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code
