"""The state machine of a child, and the row that people see of it. Pure: no clock, no loop, no I/O.

    stopped  -> starting, waiting
    waiting  -> starting, stopped           waiting: for a backoff, a schedule, a supervisor's group, or for `after`
    starting -> running, stopping, stopped  starting: spawned but not ready
    running  -> stopping, stopped           running: ready
    stopping -> stopped                     stopping: asked to end, and not yet gone

Five states, a goal and a cause. What people read (*backing off*, *completed*, *stuck*, …) is derived from them in `word`,
which is the only place. A job, a worker and a supervisor use the same machine.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import UNSET, UnsetType

from supervisor.errors import InternalError


class State(enum.StrEnum):
    """Where a child is."""

    STOPPED = "stopped"
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class Goal(enum.StrEnum):
    """Where its operator wants it."""

    UP = "up"
    DOWN = "down"


class Phase(enum.Enum):
    """The shutdown broadcast: one value for the whole daemon, which only ever moves down this list."""

    RUNNING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"
    KILLING = "killing"

    def __lt__(self, other: Phase) -> bool:
        return _PHASES.index(self) < _PHASES.index(other)


_PHASES = (Phase.RUNNING, Phase.DRAINING, Phase.STOPPING, Phase.KILLING)

LEGAL: dict[State, frozenset[State]] = {
    State.STOPPED: frozenset({State.STOPPED, State.STARTING, State.WAITING}),
    State.WAITING: frozenset({State.WAITING, State.STARTING, State.STOPPED}),
    State.STARTING: frozenset({State.STARTING, State.RUNNING, State.STOPPING, State.STOPPED}),
    State.RUNNING: frozenset({State.RUNNING, State.STOPPING, State.STOPPED}),
    State.STOPPING: frozenset({State.STOPPING, State.STOPPED}),
}
"""The steps that may be taken. Staying is always allowed: the cause may change."""


class Why(enum.StrEnum):
    """The kind of a cause, as far as it changes the word that people read."""

    PLAIN = "plain"
    COMPLETED = "completed"
    FAILED = "failed"
    EXITED = "exited"
    GAVE_UP = "gave up"
    BACKOFF = "backing off"
    SCHEDULED = "scheduled"
    PAUSED = "paused"
    DRAINING = "draining"
    STUCK = "stuck"
    CANCELLED = "cancelled"
    DEGRADED = "degraded"


_WORDS: dict[State, frozenset[Why]] = {
    State.STOPPED: frozenset({Why.COMPLETED, Why.FAILED, Why.EXITED, Why.GAVE_UP}),
    State.WAITING: frozenset({Why.BACKOFF, Why.SCHEDULED, Why.PAUSED}),
    State.STARTING: frozenset({Why.DRAINING}),
    # stuck: before another attempt
    State.RUNNING: frozenset({Why.DRAINING, Why.SCHEDULED, Why.PAUSED, Why.STUCK, Why.DEGRADED}),
    State.STOPPING: frozenset({Why.DRAINING, Why.STUCK}),
}


def word(state: State, why: Why) -> str:
    """What people read: the kind of the cause where it says more than the state does, else the state."""
    return why.value if why in _WORDS[state] else state.value


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """The last outcome of a run. `code` and `signal` are a child process's; `at` is RFC 3339, UTC."""

    reason: str
    at: str
    code: int | None = None
    signal: str | None = None


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of a child process has cost: seconds from start to end, and of processor time; `max_rss` is in bytes.

    The last two are of the main process and of those of its children that it has waited for.
    """

    duration: float
    cpu: float
    max_rss: int


class PastRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run that is over, as `history` tells of it. On the wire exactly as it stands here.

    `outcome` is the word for it: completed, failed, exited, cancelled; stopped, where it was asked to end; lost, where the
    daemon died before it. `ended` and `duration` (in seconds) are null where nobody has seen the end; `cpu` (in seconds) and
    `max_rss` (in bytes) where it was no child process.
    """

    name: str
    run: str
    started: str
    ended: str | None
    outcome: str
    reason: str
    cause: str
    failed: bool = False
    code: int | None = None
    signal: str | None = None
    attempts: int = 1
    duration: float | None = None
    cpu: float | None = None
    max_rss: int | None = None


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `status`: the fold of a child's events. On the wire exactly as it stands here.

    `memory` and `cpu` are of the child's processes and all that came of them, and only there where they were asked for.
    """

    name: str
    kind: str
    supervisor: str | None
    state: State
    word: str
    goal: Goal
    cause: str
    ready: bool
    healthy: bool | None
    pid: int | None
    restarts: int
    since: str
    next_at: str | None
    exit: Exit | None
    run: str | None = None
    description: str = ""
    memory: int | UnsetType | None = UNSET
    cpu: float | UnsetType | None = UNSET


class BreakerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A circuit breaker: `failures` of `opens_at` within `within` seconds; half-open, `successes` of `closes_at` trials."""

    state: str
    cause: str
    failures: int
    opens_at: int
    within: float
    successes: int
    closes_at: int
    trial_at: str | None


class RateStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A rate limit: `rate` a second. Whoever comes now waits for `wait` seconds. `waiting` are runs, in order."""

    rate: float
    burst: int
    tokens: float
    wait: float
    waiting: tuple[str, ...]


class BulkheadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A bulkhead: how many of its places are taken, and which runs wait for one, in order."""

    concurrency: int
    in_use: int
    may_wait: int | None
    waiting: tuple[str, ...]


class LimitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a limit stands: one of `[limits]`, which `jobs` share, or (`shared` false) what a job has to itself."""

    name: str
    shared: bool
    jobs: tuple[str, ...]
    breaker: BreakerStatus | None = None
    rate: RateStatus | None = None
    bulkhead: BulkheadStatus | None = None


class QueueTally(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the items of a queue in the hands of this daemon's workers since it started: by job, by outcome."""

    queue: str
    degraded: bool
    jobs: dict[str, dict[str, int]]


def ancestry(table: Mapping[str, JobStatus], row: JobStatus) -> Iterator[str]:
    """A name, its supervisor's, and so on up."""
    yield row.name
    while row.supervisor is not None:
        row = table[row.supervisor]
        yield row.name


def move(status: JobStatus, state: State) -> State:
    """The state to go to, or InternalError for a step that is not in `LEGAL`."""
    if state not in LEGAL[status.state]:
        raise InternalError(f"illegal step of {status.name!r}: {status.state.value} -> {state.value}")
    return state


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a command came to for one name. `text` is one sentence; where `ok` is false it says why and what to do."""

    name: str
    ok: bool
    text: str
