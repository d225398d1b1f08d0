"""What the policies round a run do: the next attempt, a turn at a limit, a fallback, a breaker that opens or closes."""

from __future__ import annotations

from supervisor.events.event import ChildEvent, Event, moved
from supervisor.state import JobStatus, State, Why


class Retrying(ChildEvent, frozen=True, kw_only=True):
    """An attempt has failed, for `reason`; in `wait` seconds, at `next_at`, comes number `attempt` of `attempts`."""

    level = "warning"

    run: str
    cause: str
    reason: str
    attempt: int
    attempts: int
    wait: float
    next_at: str | None

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, row.state, self, self.cause, Why.PLAIN, pid=None, next_at=self.next_at)


class AttemptStarting(ChildEvent, frozen=True, kw_only=True):
    """An attempt of a run begins after a wait."""

    level = "debug"

    run: str
    cause: str
    attempt: int

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, row.state, self, self.cause, Why.PLAIN, next_at=None)


class AttemptOverdue(ChildEvent, frozen=True, kw_only=True):
    """An attempt takes too long: it has been asked to end, or (`killed`) is killed because its grace is over.

    `followed`: another attempt, or a fallback, may come after it; else the run ends with it.
    """

    level = "warning"

    run: str
    cause: str
    killed: bool = False
    followed: bool = False

    def apply(self, row: JobStatus) -> JobStatus:
        if self.followed:
            return moved(row, row.state, self, self.cause, Why.PLAIN)
        return moved(row, State.STOPPING, self, self.cause, Why.PLAIN, ready=False)


class WaitingForLimit(ChildEvent, frozen=True, kw_only=True):
    """An attempt waits for its turn (`rate`) or for a place (`bulkhead`) of `limit`: `jobs.NAME` or `limits.NAME`."""

    level = "debug"

    run: str
    cause: str
    limit: str
    next_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, row.state, self, self.cause, Why.PLAIN, next_at=self.next_at)


class FallingBack(ChildEvent, frozen=True, kw_only=True):
    """A run has failed for good, and its fallback is called."""

    level = "warning"

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, row.state, self, self.cause, Why.PLAIN, pid=None, next_at=None)


class BreakerChanged(Event, frozen=True, kw_only=True):
    """A circuit breaker, `jobs.NAME` or `limits.NAME`, went from one state to another: closed, open, half-open."""

    level = "warning"

    limit: str
    was: str
    now: str
    cause: str
    next_at: str | None = None


AttemptEvent = Retrying | AttemptStarting | AttemptOverdue | WaitingForLimit | FallingBack | BreakerChanged
