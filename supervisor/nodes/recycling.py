"""A fresh run for one that has become old or fat: `recycle = { age, memory }`.

The supervisor's timers do the waiting: a job that asks for it costs an entry among them, and no task.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from supervisor.config.shapes import duration
from supervisor.spec import Recycle

LOOK_EVERY = 5.0
"""Seconds between two looks at the memory of a run."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Freshness:
    """How long one run stays fresh. `spread(low, high)` parts the runs of a crowd. Times are on Trio's clock."""

    __slots__ = ("_memory", "_old", "_old_at", "_spread", "look_at")

    def __init__(self, recycle: Recycle, began: float, now: float, spread: Callable[[float, float], float]) -> None:
        self._old = recycle.age
        self._old_at = None if recycle.age is None else began + recycle.age * spread(0.9, 1.1)
        self._memory = recycle.memory
        self._spread = spread
        self.look_at = 0.0
        """When to ask next."""
        self._wait(now)

    def lost(self, now: float, pid: int | None) -> str | None:
        """Why the run, whose main process is `pid`, is to be replaced; None where it is fresh until `look_at`."""
        if self._old_at is not None and self._old_at <= now:
            return f"recycled: it ran for {duration(self._old or 0)}"
        if self._memory is not None and pid is not None and (held := memory_of(pid)) > self._memory:
            return f"recycled: it holds {held / 2**20:.1f} MB, more than {self._memory / 2**20:g} MB"
        self._wait(now)
        return None

    def _wait(self, now: float) -> None:
        looks = [] if self._memory is None else [now + LOOK_EVERY * self._spread(0.9, 1.1)]
        self.look_at = min(looks + ([] if self._old_at is None else [self._old_at]))


def memory_of(pid: int) -> int:
    """The resident bytes of a process and its descendants; what they share is counted for each."""
    return _resident(pid) + sum(map(memory_of, _children(pid)))


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return found
