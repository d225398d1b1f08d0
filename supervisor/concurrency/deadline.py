"""A moment by which several steps together must be done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from supervisor.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """What several steps share: each takes of what the ones before it left.

        deadline = Deadline.after(5)
        with deadline.scope():
            page = await fetch(url)
        with deadline.scope():
            await store(page, timeout=deadline.remaining)

    `moment` is on Trio's clock; `seconds` is how long it was when it was made.
    """

    moment: float
    seconds: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline so many seconds from now; of `math.inf` there is none."""
        if not seconds >= 0:
            raise ValueError(f"a deadline is not before now: {seconds!r} seconds")
        return cls(trio.current_time() + seconds, seconds)

    @property
    def remaining(self) -> float:
        """Seconds that are left; 0 when it is over."""
        return max(0.0, self.moment - trio.current_time())

    @property
    def expired(self) -> bool:
        """Whether it is over."""
        return trio.current_time() >= self.moment

    @contextmanager
    def scope(self) -> Iterator[trio.CancelScope]:
        """Cancel the block at the deadline and raise `DeadlineExceeded` from it. Any number of them, in any tasks.

        When it is over already, the block is cancelled at its first checkpoint: a step that does not wait is done even then.
        """
        with trio.CancelScope(deadline=self.moment) as scope:
            yield scope
        if scope.cancelled_caught and self.expired:
            raise DeadlineExceeded(self.seconds)
