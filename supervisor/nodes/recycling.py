"""`recycle = { memory }`: a fresh run for one that has become fat. (For one that is old, its supervisor has a timer.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from supervisor.children import Child, Children
from supervisor.spec import split_name

LOOK_EVERY = 5.0
"""Seconds between two looks at what the runs hold."""


class Scales:
    """Weighs the runs of those jobs that ask for it, all in one look, and calls `too_much(job, cause)`.

    `child_of` gives the process of a job's run, if it has one now. Of several workers only the heaviest is told of in one
    look: they are not all replaced at once. Belongs to the Trio thread.
    """

    def __init__(
        self, children: Children, child_of: Callable[[str], Child | None], too_much: Callable[[str, str], None]
    ) -> None:
        self._children = children
        self._child_of = child_of
        self._too_much = too_much
        self._limits: Mapping[str, int] = {}
        self._wanted = trio.Event()

    def weigh(self, limits: Mapping[str, int]) -> None:
        """From now on, look whether these jobs hold more than so many bytes."""
        self._limits = limits
        if limits:
            self._wanted.set()

    async def run(self) -> None:
        """Look until cancelled. Costs nothing while no job asks for it."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while self._limits:
                await trio.sleep(LOOK_EVERY)
                await self._look()

    async def _look(self) -> None:
        weighed = {job: child for job in self._limits if (child := self._child_of(job)) is not None}
        if not weighed:
            return
        usage = await self._children.usage(*weighed.values())
        told = set()
        for name, child in sorted(weighed.items(), key=lambda item: -usage[item[1]].memory):
            job, limit, held = split_name(name)[0], self._limits.get(name), usage[child].memory
            if limit is not None and held > limit and self._child_of(name) is child and job not in told:
                told.add(job)
                self._too_much(name, f"recycled: it holds {held / 2**20:.1f} MB, more than {limit / 2**20:g} MB")
