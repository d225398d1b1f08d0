"""The thread that spawns, and what a process is born with."""

from __future__ import annotations

import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import Any

import trio

from supervisor.children import guardian


class Spawner:
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
    with limit_mark(mark), _signals_blocked(mask) if mask else nullcontext():
        process = subprocess.Popen(argv, start_new_session=True, **options)
    process.returncode = 0  # else Popen's own clean-up would reap the child behind our back
    return process.pid


@contextmanager
def limit_mark(mark: int | None) -> Iterator[None]:
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
