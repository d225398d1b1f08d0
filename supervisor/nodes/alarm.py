"""The tree's one alarm on the wall clock: it rings for each job with `cron` whose next tick has come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from supervisor.wall import Wall

if TYPE_CHECKING:
    from supervisor.nodes.schedule import Schedule

STEP = 1.0
"""Seconds by which the wall clock and Trio's must part at once to be a step: less is a clock that is kept right."""


class Alarm:
    """Calls `ring(schedule)` at the moment that was set for it; for all of them when the clock was set or the machine slept.

    Each ring is once: who wants another sets it. Costs nothing while there is nothing set.
    """

    def __init__(self, wall: Wall, ring: Callable[[Schedule], None]) -> None:
        self._wall = wall
        self._ring = ring
        self._moments: dict[Schedule, float] = {}
        self._set = trio.Event()
        self._apart = 0.0
        self._waiting = trio.CancelScope()

    def set(self, schedule: Schedule, moment: float) -> None:
        """Ring for it at `moment`, and at none that was set before."""
        self._moments[schedule] = moment
        self._set.set()
        self._waiting.cancel(reason="another moment")

    def clear(self, schedule: Schedule) -> None:
        """Ring no more for it."""
        self._moments.pop(schedule, None)
        if not self._moments:
            self._waiting.cancel(reason="nobody waits for it")

    async def run(self) -> None:
        """Ring until cancelled."""
        while True:
            await self._set.wait()
            self._apart = self._wall.now() - trio.current_time()
            try:
                while self._moments:
                    with trio.CancelScope() as self._waiting:
                        await self._wall.wait_until(min(self._moments.values()))
                    self._look()
            finally:
                self._wall.close()
            self._set = trio.Event()

    def _look(self) -> None:
        now, before = self._wall.now(), self._apart
        self._apart = now - trio.current_time()
        stepped = abs(self._apart - before) > STEP
        for schedule in [each for each, moment in self._moments.items() if stepped or moment <= now]:
            if self._moments.pop(schedule, None) is not None:  # a ring before it may have cleared it
                self._ring(schedule)
