"""A kind whose handlers die on command, and have as many calls at once as they are told: what pools are tested with.

An item is what is to become of it: a number of seconds that it takes, "die", or "fail".
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from supervisor.errors import WorkerLost
from supervisor.kinds import JobSpec, Kind, Resources, Run, Work

KIND = Kind("fragile", "tests.fragile")


class Handler:
    """Makes one call after another, however many it is given: those that wait have not begun."""

    hears = False
    room = 1

    def __init__(self) -> None:
        self._turn = trio.Lock()
        self._dead = False

    async def handle(self, work: Work, payload: bytes) -> bytes | None:
        most["under way"] += 1
        most["seen"] = max(most["seen"], most["under way"])
        try:
            return await self._handle(work, msgspec.json.decode(payload))
        finally:
            most["under way"] -= 1

    async def _handle(self, work: Work, item: object) -> bytes | None:
        async with self._turn:
            if self._dead:
                raise WorkerLost("its process is gone")
            work.begun = True
            if item == "die":
                self._dead = True
                raise WorkerLost("its process is gone")
            if item == "fail":
                raise OSError("no net")
            assert isinstance(item, (int, float))
            await trio.sleep(item)
            return msgspec.json.encode(item)


most = {"under way": 0, "seen": 0}
"""How many calls there are at the moment, and were at once."""


@asynccontextmanager
async def handling(spec: JobSpec, run: Run, resources: Resources) -> AsyncIterator[Handler]:
    handler = Handler()
    handler.room = (spec.args or {}).get("room", 1)
    yield handler
