"""A Trio task in the daemon's own loop."""

from __future__ import annotations

import trio
from structlog.contextvars import bound_contextvars

from supervisor.kinds.context import Context, Outcome, Resources, Run
from supervisor.kinds.function import context_parameter, load
from supervisor.kinds.job import JobSpec

COMPLETED = Outcome(reason="completed", failed=False)


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Await the function.

    Where it takes no `Context` it cannot hear a stop: a service is then cancelled as soon as it is asked, and so is whatever
    has taken too long.
    """
    function = load(spec.call or "", "task")
    args = dict(spec.args or {})
    hears = context_parameter(function)
    if hears:
        args[hears] = Context(run)
    if spec.ready is None:
        run.ready("started")
    with trio.CancelScope() as deaf:
        if not hears:
            run.on_stopping(lambda: _cancel(deaf, run) if spec.service or run.overdue else None)
        with bound_contextvars(job=run.job, run=run.id):
            await function(**args)
    return COMPLETED


def _cancel(scope: trio.CancelScope, run: Run) -> None:
    scope.cancel(reason=f"{run.id} was asked to stop and takes no Context")
