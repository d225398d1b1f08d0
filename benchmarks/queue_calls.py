"""What the queues that are measured call. A module of its own: the one that is run as a program is there twice."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

BURN = 0.05
"""Seconds of a processor that a long call takes."""


class Arrivals:
    """Counts calls, in whatever thread they are."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._target = 0
        self._reached: Callable[[], object] = int

    def expect(self, count: int, reached: Callable[[], object]) -> None:
        """Call `reached` at the last of so many from now on."""
        self._numbers, self._target, self._reached = itertools.count(1), count, reached

    def note(self) -> None:
        """The function was called."""
        if next(self._numbers) == self._target:
            self._reached()


ARRIVALS = Arrivals()


async def nothing(item: int) -> None:
    """What a task of ours does."""
    ARRIVALS.note()


def small(item: int) -> None:
    """What a process of ours does."""


def burn(item: int) -> None:
    """Take a processor for a while."""
    until = time.process_time() + BURN
    while time.process_time() < until:
        pass


def burn_often(count: int) -> None:
    """What takes as long in a process without a queue."""
    for item in range(count):
        burn(item)
