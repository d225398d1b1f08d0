"""What a run answers when it is asked how it is, and what it says of itself."""

from __future__ import annotations

from msgspec.structs import replace

from supervisor.events.event import ChildEvent, noted
from supervisor.state import JobStatus


class Healthy(ChildEvent, frozen=True, kw_only=True):
    """A run has answered well, for the first time or again."""

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, healthy=True, cause=row.cause if row.healthy is None else self.cause)


class HealthCheckFailed(ChildEvent, frozen=True, kw_only=True):
    """A bad answer, or (`answered` false) none. It is one of `failures` in a row; `limit` of them make it unhealthy."""

    level = "warning"

    run: str
    cause: str
    answered: bool
    failures: int
    limit: int

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, cause=self.cause)


class Unhealthy(ChildEvent, frozen=True, kw_only=True):
    """So many bad answers in a row, or none, that the run has failed."""

    level = "error"

    run: str
    cause: str
    answered: bool
    failures: int

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, healthy=False, cause=self.cause)


class HealthUnknown(ChildEvent, frozen=True, kw_only=True):
    """A reload asks differently, or no more: what was known counts for nothing."""

    level = "debug"

    run: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, healthy=None)


class Said(ChildEvent, frozen=True, kw_only=True):
    """What a child says of itself: STATUS=, RELOADING=1, STOPPING=1."""

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return noted(row, self.cause)


class NotifyRefused(ChildEvent, frozen=True, kw_only=True):
    """Something that came over a child's NOTIFY_SOCKET and is not heeded, and why."""

    level = "warning"

    run: str
    cause: str


HealthEvent = Healthy | HealthCheckFailed | Unhealthy | HealthUnknown | Said | NotifyRefused
