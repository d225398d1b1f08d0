"""What this process must be like while it has children, and what it was before."""

from __future__ import annotations

import ctypes
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37


@contextmanager
def subreaper() -> Iterator[None]:
    """Orphans below us become our children."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


@contextmanager
def nothing_ignored() -> Iterator[None]:
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
            hand_back(number, signal.SIG_IGN)


@contextmanager
def noticed(number: signal.Signals, notice: Callable[[], None], settle: Callable[[], None]) -> Iterator[None]:
    """Have `notice` called in the loop when the signal arrives. `settle` returns once other threads have left its handler."""
    token = trio.lowlevel.current_trio_token()
    before = signal.signal(number, lambda number, frame: token.run_sync_soon(notice, idempotent=True))
    try:
        yield
    finally:
        hand_back(number, before, settle)


def hand_back(number: signal.Signals, handler: Any, settle: Callable[[], None] = lambda: None) -> None:
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
def file_limit_raised() -> Iterator[None]:
    """We may open as many files as we are allowed at all: a thousand children need a few thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
