"""Waits that may be long, and that no signal gets lost in. Apart, because `supervisor status` never needs it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def woken_by_signals() -> Iterator[int]:
    """A descriptor that every signal makes readable, for a wait that may be long.

    Python notes a signal, and acts on it between two steps of the program. One that comes after the last step and before
    the system call that then blocks is acted on when that call ends: where nothing else happens, never.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
