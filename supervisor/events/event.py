"""What every event has, and what an event may do to the row of a child."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import msgspec
from msgspec.structs import replace

from supervisor.state import JobStatus, State, Why, move, word


def _tag(class_name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", class_name).lower()


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=_tag):
    """Base: `seq` counts from 1 without gaps; `by` names the operator, `because` the seq of the event that led here."""

    level: ClassVar[str] = "info"

    seq: int
    at: str
    by: str | None = None
    because: int | None = None


class ChildEvent(Event, frozen=True, kw_only=True):
    """Something that happened to one job or supervisor. `apply` gives the row after it."""

    name: str

    def apply(self, row: JobStatus) -> JobStatus:
        """The row after this event; the same object where nothing in it changes."""
        return row


def moved(row: JobStatus, state: State, event: Event, cause: str, why: Why, **changes: Any) -> JobStatus:
    """`row` in `state` for `cause`. `since` is when it came into the state, so staying in it keeps the time."""
    since = row.since if state is row.state else event.at
    changes.setdefault("since", since)
    return replace(row, state=move(row, state), word=word(state, why), cause=cause, **changes)


def noted(row: JobStatus, cause: str) -> JobStatus:
    """`row` for `cause`, where a run of it starts or runs; a run that is ending has its cause already."""
    return replace(row, cause=cause) if row.state in (State.STARTING, State.RUNNING) else row


def at_work(row: JobStatus, cause: str, why: Why, next_at: str | None) -> JobStatus:
    """`row` with another word for what it does while it runs."""
    if row.state is not State.RUNNING:
        return row
    return replace(row, word=word(row.state, why), cause=cause, next_at=next_at)
