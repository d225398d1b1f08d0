"""The wall clock: what it shows, and a wait that ends at once when somebody sets it or the machine wakes up.

Trio's clock only ever goes on, at an even pace, and stands still while the machine sleeps: right for durations, and no use
for moments of the calendar.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import os
import time
from typing import Protocol

import trio

from supervisor.events import rfc3339

LOOK_AGAIN = 1.0
"""Seconds after which the clock is looked at again where no timer is to be had."""

_ABSTIME, _CANCEL_ON_SET = 1, 2
_NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Wall(Protocol):
    """A wall clock. Moments are seconds since 1970."""

    def now(self) -> float:
        """What it shows."""

    async def wait_until(self, moment: float) -> None:
        """Wait until it shows `moment`, at most: earlier where it was set since the last wait, or is set now."""

    def close(self) -> None:
        """Let go of what waiting has needed, until the next wait."""


class WallClock:
    """The system's clock, CLOCK_REALTIME. The wait is a timerfd, made at the first; without one, many short waits."""

    def __init__(self) -> None:
        self._fd = -1
        self._libc: ctypes.CDLL | None = None

    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_REALTIME)

    async def wait_until(self, moment: float) -> None:
        await trio.lowlevel.checkpoint()
        try:
            undisturbed = self._set(moment)
        except OSError as error:
            if error.errno not in _NONE_LEFT:
                raise
            await trio.sleep(min(max(moment - self.now(), 0.0), LOOK_AGAIN))
        else:
            if undisturbed:
                await trio.lowlevel.wait_readable(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set(self, moment: float) -> bool:
        """Set the timer, which begins anew whatever it was; False where the clock was set since the last time."""
        libc = self._libc = self._libc or ctypes.CDLL(None, use_errno=True)
        if first := self._fd < 0:
            self._fd = _checked(libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC))
        whole = max(int(moment), 0)
        expiry = (ctypes.c_long * 4)(0, 0, whole, max(int((moment - whole) * 1e9), 1))  # no interval; nothing at all is "off"
        try:
            _checked(libc.timerfd_settime(self._fd, _ABSTIME | _CANCEL_ON_SET, ctypes.byref(expiry), None))
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
            return False  # it is armed all the same
        return not first  # what was set before there was a timer has gone unnoticed: look again


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def written(moment: float) -> str:
    """A moment of the wall clock as people and programs read it: RFC 3339, UTC."""
    return rfc3339(datetime.datetime.fromtimestamp(moment, datetime.UTC))
