"""The life of a child: it enters the tree, waits, runs, ends, leaves; and what a supervisor decides for several."""

from __future__ import annotations

from msgspec.structs import replace

from supervisor.events.event import ChildEvent, at_work, moved
from supervisor.state import Exit, Goal, JobStatus, Spent, State, Why


class Added(ChildEvent, frozen=True, kw_only=True):
    """A child entered the tree, stopped."""

    level = "debug"

    kind: str
    supervisor: str | None
    goal: Goal
    cause: str
    description: str = ""

    def first(self) -> JobStatus:
        """The row that this event begins."""
        return JobStatus(
            name=self.name,
            kind=self.kind,
            supervisor=self.supervisor,
            state=State.STOPPED,
            word=State.STOPPED.value,
            goal=self.goal,
            cause=self.cause,
            ready=False,
            healthy=None,
            pid=None,
            restarts=0,
            since=self.at,
            next_at=None,
            exit=None,
            description=self.description,
        )


class Removed(ChildEvent, frozen=True, kw_only=True):
    """A child left the tree: its row is gone."""

    cause: str


class Changed(ChildEvent, frozen=True, kw_only=True):
    """A reload changed what a child is; its run goes on unless a stop says otherwise."""

    kind: str
    supervisor: str | None
    description: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, kind=self.kind, supervisor=self.supervisor, description=self.description)


class Renamed(ChildEvent, frozen=True, kw_only=True):
    """A job goes on under another name: it has become the first of several workers."""

    to: str
    supervisor: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, name=self.to, supervisor=self.supervisor)


class GoalSet(ChildEvent, frozen=True, kw_only=True):
    """Somebody wants the child up or down from now on."""

    level = "debug"

    goal: Goal
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, goal=self.goal)


class Waiting(ChildEvent, frozen=True, kw_only=True):
    """The child is to run, but not yet: for a backoff, a schedule, a group operation, or for `after`."""

    cause: str
    why: Why = Why.PLAIN
    next_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, State.WAITING, self, self.cause, self.why, next_at=self.next_at)


class Starting(ChildEvent, frozen=True, kw_only=True):
    """A run begins. `restart` is true where it follows a failure: only that counts in `restarts`.

    `for_at` is the tick of a schedule that the run is made for, which may be earlier than its start.
    """

    level = "debug"

    run: str
    cause: str
    restart: bool = False
    for_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(
            row, State.STARTING, self, self.cause, Why.PLAIN, run=self.run, restarts=row.restarts + self.restart, next_at=None
        )


class Spawned(ChildEvent, frozen=True, kw_only=True):
    """A run has got its main process."""

    run: str
    pid: int

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, pid=self.pid)


class Ready(ChildEvent, frozen=True, kw_only=True):
    """The run is ready: what comes `after` it may start."""

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, State.RUNNING, self, self.cause, Why.PLAIN, ready=True, next_at=None)


class Scheduled(ChildEvent, frozen=True, kw_only=True):
    """A job whose runs may overlap has another number of them in hand, or another next one."""

    level = "debug"

    cause: str
    why: Why = Why.PLAIN
    next_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        return at_work(row, self.cause, self.why, self.next_at)


class Unready(ChildEvent, frozen=True, kw_only=True):
    """A running supervisor has a child that is not ready any more."""

    level = "debug"

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, ready=False, cause=self.cause)


class Progress(ChildEvent, frozen=True, kw_only=True):
    """How far a run says it is."""

    level = "debug"

    run: str
    done: float
    total: float | None = None


class Stopping(ChildEvent, frozen=True, kw_only=True):
    """The run has been asked to end and has its grace to do so."""

    run: str
    cause: str
    why: Why = Why.PLAIN

    def apply(self, row: JobStatus) -> JobStatus:
        healthy = False if row.healthy is False else None  # it is not asked any more
        return moved(row, State.STOPPING, self, self.cause, self.why, ready=False, healthy=healthy, next_at=None)


class Draining(ChildEvent, frozen=True, kw_only=True):
    """The daemon takes no new work; this run is allowed to finish what it has in hand."""

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, row.state, self, self.cause, Why.DRAINING, since=row.since)


class Killing(ChildEvent, frozen=True, kw_only=True):
    """The grace is over: what is left of the run is killed (a task: cancelled)."""

    level = "warning"

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, State.STOPPING, self, self.cause, Why.PLAIN, ready=False)


class Stuck(ChildEvent, frozen=True, kw_only=True):
    """Something of the run cannot be ended: the pids or the thread are in the cause.

    `followed`: it is of an attempt, and when it has ended at last, another may begin.
    """

    level = "error"

    run: str
    cause: str
    pids: tuple[int, ...] = ()
    followed: bool = False

    def apply(self, row: JobStatus) -> JobStatus:
        if self.followed:
            return moved(row, row.state, self, self.cause, Why.STUCK)
        return moved(row, State.STOPPING, self, self.cause, Why.STUCK, ready=False)


class Ended(ChildEvent, frozen=True, kw_only=True):
    """A run is over and nothing of it is alive. `failed` is the judgement by the job's restart type, `duration` in seconds.

    Of a child process there is what it has `spent`, and, where it failed by itself, the last lines of its `output`.
    """

    run: str
    exit: Exit
    failed: bool
    cause: str
    why: Why = Why.PLAIN
    duration: float = 0.0
    spent: Spent | None = None
    output: tuple[str, ...] = ()
    attempts: int = 1

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(
            row, State.STOPPED, self, self.cause, self.why, exit=self.exit, pid=None, ready=False, healthy=None, next_at=None
        )


class Stopped(ChildEvent, frozen=True, kw_only=True):
    """A child that has no run comes to rest: a wait is over without a start, or it gave up."""

    cause: str
    why: Why = Why.PLAIN

    def apply(self, row: JobStatus) -> JobStatus:
        return moved(row, State.STOPPED, self, self.cause, self.why, next_at=None)


class Skipped(ChildEvent, frozen=True, kw_only=True):
    """So many ticks of a schedule that made no run, and why."""

    cause: str
    ticks: int = 1


class GroupRestarting(ChildEvent, frozen=True, kw_only=True):
    """A strategy answers a failure: these children are stopped in reverse order and started again after the wait."""

    level = "warning"

    cause: str
    affected: tuple[str, ...]
    wait: float


class IntensityExceeded(ChildEvent, frozen=True, kw_only=True):
    """Too many restarts: the supervisor stops its children and fails."""

    level = "error"

    cause: str
    intensity: int
    period: float


class OutputLost(ChildEvent, frozen=True, kw_only=True):
    """Captured output that could not be kept: how much, and why."""

    level = "warning"

    cause: str
    bytes: int


LifecycleEvent = (
    Added | Removed | Changed | Renamed | GoalSet | Waiting | Starting | Spawned | Ready | Scheduled | Unready | Progress
    | Stopping | Draining | Killing | Stuck | Ended | Stopped | Skipped | GroupRestarting | IntensityExceeded | OutputLost
)  # fmt: skip
