"""Constructs of structured concurrency that Trio leaves to libraries. A library by itself: it knows nothing of jobs.

    join try_join race              a known number of functions at once
    JoinSet as_completed            a number that grows; outcomes as they come
    map_concurrent                  a function over many items, so many at a time
    select                          whichever source is ready
    CancelToken Deadline            one cancellation, one budget of time, for many

They all keep what Trio promises: no task outlives the block or call that started it, cancellation passes through, and no
exception is dropped; beyond it, one exception comes out by itself rather than in a group. A value is lost only where a
docstring says so. `Value` and `Error` are the two outcomes, of the library `outcome` on which Trio itself stands.
"""

from __future__ import annotations

from outcome import Error, Value

from supervisor.concurrency.cancellation import CancelToken
from supervisor.concurrency.crew import Function, Outcome
from supervisor.concurrency.deadline import Deadline
from supervisor.concurrency.joining import join, race, try_join
from supervisor.concurrency.joinset import Completed, JoinHandle, JoinSet, as_completed
from supervisor.concurrency.mapping import Mapped, map_concurrent
from supervisor.concurrency.selecting import Select, Source, select

__all__ = [
    "CancelToken",
    "Completed",
    "Deadline",
    "Error",
    "Function",
    "JoinHandle",
    "JoinSet",
    "Mapped",
    "Outcome",
    "Select",
    "Source",
    "Value",
    "as_completed",
    "join",
    "map_concurrent",
    "race",
    "select",
    "try_join",
]
