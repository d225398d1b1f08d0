"""Kinds: what a run is. A kind is one async function; to add one, write it in a file of its own and list it in `KINDS`.

What is named here is imported when it is first asked for: a worker process needs some of this package, and no Trio.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from supervisor.kinds.context import Attempt, Context, Handler, Outcome, Reporter, Resources, Run, Work, inherited
    from supervisor.kinds.job import JobSpec

    Runner = Callable[[JobSpec, Run, Resources], Awaitable[Outcome]]
    Handling = Callable[[JobSpec, Run, Resources], AbstractAsyncContextManager[Handler]]


@dataclass(frozen=True)
class Kind:
    """A kind of job, loaded when it is first used.

    Its `run(spec, run, resources)` lives as long as the job does: it ends politely when `run` is stopping, at once when it
    is cancelled, and leaves nothing behind. `killable` is False where cancellation cannot end it (a thread). `takes` is what
    each of its runs needs one of, where `[daemon]` may limit how many of them there are.
    """

    name: str
    module: str
    killable: bool = True
    takes: Literal["thread", "process"] | None = None
    handler: str | None = None
    """The module with its `handling`, where that is another one."""

    @property
    def run(self) -> Runner:
        """The function that is one run."""
        return cast("Runner", importlib.import_module(self.module).run)

    @property
    def handling(self) -> Handling:
        """What a worker of a queue job holds for as long as it lives (`run` is the worker's): see `Handler`."""
        return cast("Handling", importlib.import_module(self.handler or self.module).handling)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("task", "supervisor.kinds.task"),
        Kind("thread", "supervisor.kinds.thread", killable=False, takes="thread"),
        Kind("asyncio", "supervisor.kinds.asyncio_loop", takes="thread"),
        Kind("process", "supervisor.kinds.process", takes="process", handler="supervisor.kinds.process_calls"),
        Kind("command", "supervisor.kinds.command", handler="supervisor.kinds.command_items"),
    )
}

_HOME = {
    "Attempt": "context",
    "Context": "context",
    "Handler": "context",
    "JobSpec": "job",
    "Outcome": "context",
    "Reporter": "context",
    "Resources": "context",
    "Run": "context",
    "Work": "context",
    "inherited": "context",
}

__all__ = [
    "KINDS",
    "Attempt",
    "Context",
    "Handler",
    "JobSpec",
    "Kind",
    "Outcome",
    "Reporter",
    "Resources",
    "Run",
    "Work",
    "inherited",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
