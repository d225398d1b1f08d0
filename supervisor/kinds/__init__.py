"""Kinds: what a run is. A kind is one async function; to add one, write it in a file of its own and list it in `KINDS`."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, cast

from supervisor.kinds.context import Attempt, Context, Outcome, Reporter, Resources, Run, inherited
from supervisor.kinds.job import JobSpec

Runner = Callable[[JobSpec, Run, Resources], Awaitable[Outcome]]


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

    @property
    def run(self) -> Runner:
        """The function that is one run."""
        return cast(Runner, importlib.import_module(self.module).run)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("task", "supervisor.kinds.task"),
        Kind("thread", "supervisor.kinds.thread", killable=False, takes="thread"),
        Kind("asyncio", "supervisor.kinds.asyncio_loop", takes="thread"),
        Kind("command", "supervisor.kinds.command"),
    )
}

__all__ = ["KINDS", "Attempt", "Context", "JobSpec", "Kind", "Outcome", "Reporter", "Resources", "Run", "Runner", "inherited"]
