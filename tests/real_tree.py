"""Trees of real children, and what has happened in them: what their tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from supervisor import open_supervisor
from supervisor.events import Event, Journal


class Tree:
    """A running tree, and what has happened in it."""

    def __init__(self, tree: Any, history: list[Event]) -> None:
        self.tree = tree
        self.history = history
        self.more = trio.Event()

    def events(self, *kinds: type[Event]) -> list[Any]:
        return [event for event in self.history if isinstance(event, kinds)]

    async def until(self, kind: type[Event], times: int = 1, **fields: Any) -> Any:
        """The event of this kind, with these fields, that makes it so many."""
        with trio.fail_after(50):
            while True:
                found = [
                    each for each in self.events(kind) if all(getattr(each, name) == value for name, value in fields.items())
                ]
                if len(found) >= times:
                    return found[times - 1]
                await self.more.wait()

    def row(self, name: str = "a") -> Any:
        return self.tree.journal.table[name]


@asynccontextmanager
async def tree(
    base: Path, *, queues: Mapping[str, dict[str, Any]] | None = None, **jobs: dict[str, Any]
) -> AsyncIterator[Tree]:
    history: list[Event] = []
    journal = Journal()
    config = {"jobs": jobs, "queues": queues or {}, "daemon": {"state_dir": str(base)}}
    async with open_supervisor(config, journal=journal) as opened:
        f = Tree(opened, history)

        def note(event: Event) -> None:
            history.append(event)
            f.more.set()
            f.more = trio.Event()

        for event in journal.past(0)[1]:
            note(event)
        journal.add_sink(note)
        yield f
