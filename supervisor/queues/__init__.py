"""Queues: where work waits for workers. `protocol.py` says what a queue is, and each engine is a file of its own.

What is named here is imported when it is first asked for: `QUEUES` knows the engines without loading one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from supervisor.queues.protocol import Engine, Listener, Settings

    Opener = Callable[[str, Settings, "Place"], AbstractAsyncContextManager[Engine]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an engine is opened: what it needs to know besides the queue."""

    directory: Path
    """For files: the state directory."""
    now: Callable[[], float]
    """The wall clock, Unix time, for engines without a server; `supervisor.wall`'s in a daemon."""
    listen: Listener
    warn: Callable[[str], None]
    """Told, in the Trio thread, in one line of what an operator must know: a damaged file that was put aside."""


class Scheme(NamedTuple):
    """An engine: its module, with `open(name, settings, place)`, and the extra that it needs."""

    module: str
    extra: str | None = None

    @property
    def open(self) -> Opener:
        """The function that opens a queue. Raises ImportError where the extra is not installed."""
        return cast("Opener", importlib.import_module(self.module).open)


QUEUES = {
    "memory": Scheme("supervisor.queues.memory"),
    "sqlite": Scheme("supervisor.queues.sqlite"),
    "postgresql": Scheme("supervisor.queues.postgres", "postgresql"),
    "postgres": Scheme("supervisor.queues.postgres", "postgresql"),
    "redis": Scheme("supervisor.queues.redis", "redis"),
    "rediss": Scheme("supervisor.queues.redis", "redis"),
    "redis+unix": Scheme("supervisor.queues.redis", "redis"),
}
"""By the word, or the scheme of the URL, that `backend` says."""


def scheme_of(backend: str) -> Scheme:
    """The engine that a `backend` names. Raises LookupError for one that there is not."""
    return QUEUES[backend.partition(":")[0]]
