"""The boundary round foreign code: what it raises becomes an outcome, and what must pass, passes."""

from __future__ import annotations

import math

import structlog
import trio
from msgspec import structs

from supervisor.errors import InternalError, RunFailed, SpawnFailed
from supervisor.kinds import Outcome, Run
from supervisor.policies.failures import in_one_line, unwrapped

log = structlog.get_logger("supervisor")

PASSING = (trio.Cancelled, KeyboardInterrupt, InternalError)
"""What no boundary round foreign code may stop."""


def stopped_at_fence(run: Run, error: BaseException) -> Outcome:
    """The run boundary: an exception of foreign code becomes an outcome. Cancellation and Ctrl-C are raised again."""
    passing, own = split_foreign(error)
    if own is None:
        raise error
    known, failure = run.outcome, failure_of(run, own)
    run.outcome = failure if known is None else structs.replace(known, reason=failure.reason, failed=True)
    if passing is not None:
        raise passing from None
    return run.outcome


def split_foreign(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """What must pass through a boundary round foreign code, and what stops at it.

    A Cancelled passes where the run is being cancelled. Elsewhere it was kept from another time: an error like any other.
    """
    cancelled = trio.current_effective_deadline() == -math.inf
    passing = PASSING if cancelled else tuple(kind for kind in PASSING if kind is not trio.Cancelled)
    if isinstance(error, BaseExceptionGroup):
        return error.split(passing)
    return (error, None) if isinstance(error, passing) else (None, error)


def failure_of(run: Run, error: BaseException) -> Outcome:
    """The outcome of a run that raised. Its traceback goes to the log, once; expected failures have none to show."""
    if (raised := foreign(error)) is not None:
        log.error("job raised", job=run.job, run=run.id, exc_info=raised)
    return Outcome(reason=in_one_line(error), failed=True)


def foreign(error: BaseException) -> BaseException | None:
    """The exception of foreign code in a failure, whose traceback somebody may want to see; None where it is ours alone."""
    error = unwrapped(error)
    if not isinstance(error, RunFailed):
        return error
    return foreign(error.__cause__) if error.__cause__ is not None and not isinstance(error, SpawnFailed) else None


__all__ = ["PASSING", "failure_of", "foreign", "in_one_line", "split_foreign", "stopped_at_fence"]
