"""`recycle = { memory }`: a fresh run for one that has become fat. (For one that is old, its supervisor has a timer.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter

import trio

from supervisor.children import Child, Children

LOOK_EVERY = 5.0
"""Seconds between two looks at what the runs hold."""


class Scales:
    """Weighs the runs of those jobs that ask for it, all in one look, and calls `too_much(name, cause)`.

    `processes_of` gives the processes of a job by name: its own, or one for each of its workers. Of a job with several, only
    the heaviest is told of in one look, so that they are not all replaced at once. Belongs to the Trio thread.
    """

    def __init__(
        self,
        children: Children,
        processes_of: Callable[[str], Mapping[str, Child]],
        too_much: Callable[[str, str], None],
    ) -> None:
        self._children = children
        self._processes_of = processes_of
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
        weighed = {job: processes for job in self._limits if (processes := self._processes_of(job))}
        if not weighed:
            return
        usage = await self._children.usage(*(child for processes in weighed.values() for child in processes.values()))
        for job, processes in weighed.items():
            name, held = max(((name, usage[child].memory) for name, child in processes.items()), key=itemgetter(1))
            limit = self._limits.get(job)
            if limit is not None and held > limit and self._processes_of(job).get(name) is processes[name]:
                self._too_much(name, f"recycled: it holds {held / 2**20:.1f} MB, more than {limit / 2**20:g} MB")
