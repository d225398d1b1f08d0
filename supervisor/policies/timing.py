"""`timeout` round one attempt, `deadline` round the whole: two words and two errors for the same scope."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

import trio

from supervisor.errors import DeadlineExceeded, TimedOut
from supervisor.policies.layer import Layer, P, T


class timeout(Layer):
    """The function has so many seconds; then it is cancelled, and `TimedOut` is raised.

    A result that is there all the same is not thrown away; errors that come up while it is cancelled come out in place of
    `TimedOut`; a `TooSlowError` of its own is its own. For a block of code: `trio.fail_after`.
    """

    ERROR: ClassVar[type[TimedOut | DeadlineExceeded]] = TimedOut

    def __init__(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError(f"{type(self).__name__}: seconds are 0 or more, got {seconds!r}")
        self.seconds = seconds

    async def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        with trio.move_on_after(self.seconds):
            return await function(*args, **kwargs)
        raise self.ERROR(self.seconds)


class deadline(timeout):
    """The same for the whole of it, retries and waits included: then `DeadlineExceeded` is raised."""

    ERROR = DeadlineExceeded
