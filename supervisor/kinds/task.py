"""A Trio task in the daemon's own loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, cast

import trio
from msgspec import structs
from structlog.contextvars import bound_contextvars

from supervisor.kinds.context import Context, Outcome, Resources, Run, Work
from supervisor.kinds.function import context_parameter, load
from supervisor.kinds.job import JobSpec
from supervisor.kinds.payload import ItemFunction, result

COMPLETED = Outcome(reason="completed", failed=False)


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Await the function.

    Where it takes no `Context` it cannot hear a stop: a service is then cancelled as soon as it is asked, and so is whatever
    has taken too long.
    """
    function = load(spec.call or "", "task", into=spec.into is not None)
    args = dict(spec.args or {})
    hears = context_parameter(function)
    if hears:
        args[hears] = Context(run, resources)
    if spec.ready is None:
        run.ready("started")
    with trio.CancelScope() as deaf:
        if not hears:
            run.on_stopping(lambda: _cancel(deaf, run) if spec.service or run.overdue else None)
        with bound_contextvars(job=run.job, run=run.id):
            return completed(spec, await _given(run, function(**args)))
    return COMPLETED


def _given(run: Run, made: Any) -> Awaitable[Any]:
    """What is to be awaited of what the function gave when it was called."""
    return cast("Awaitable[Any]", made) if run.chain is None else run.chain.given(made)


def completed(spec: JobSpec, value: Any) -> Outcome:
    """The end of a run whose function has returned `value`. Raises TypeError for what is to go into a queue, and is no JSON."""
    if spec.into is None or spec.service or value is None:
        return COMPLETED
    return structs.replace(COMPLETED, returned=result(value))


@asynccontextmanager
async def handling(spec: JobSpec, run: Run, resources: Resources) -> AsyncIterator[Handler]:
    """Calls in the tasks that ask for them."""
    handler = Handler(spec, resources)
    with bound_contextvars(job=run.job, run=run.id):
        yield handler


class Handler:
    """Awaits the function with each item. Most calls are soon over: what is done for each is little."""

    room = 1

    def __init__(self, spec: JobSpec, resources: Resources) -> None:
        function = load(spec.call or "", "task", into=spec.into is not None)
        self._function = ItemFunction(function, spec.args, spec.batch is not None)
        self.hears = self._function.hears
        self._resources = resources

    async def handle(self, work: Work, payload: bytes) -> bytes | None:
        """One call, in the caller's task."""
        work.begin()
        item = self._function.read(payload)
        made = self._function(item, Context(work, self._resources) if self.hears else None)
        return result(await _given(work, made))


def _cancel(scope: trio.CancelScope, run: Run) -> None:
    scope.cancel(reason=f"{run.id} was asked to stop and takes no Context")
