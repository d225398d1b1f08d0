"""Everything that happens is one typed event; status is a fold of them.

`Journal.emit` is the only writer: it numbers the event, folds it into the table, and hands it to sinks (synchronous, must
not block), to the ring (for `events --since`) and to bounded subscribers. An event's struct is the place where its name,
its fields and what it does to a row stand together: add one here and `fold`, the wire and the documentation know it.
"""

from __future__ import annotations

import datetime
import functools
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import msgspec
import trio
from msgspec.structs import replace

from supervisor.errors import InternalError
from supervisor.state import Exit, Goal, JobStatus, Phase, Spent, State, Why, move, word


def wall_now() -> str:
    """The wall clock for people: RFC 3339, UTC, milliseconds. Never used for a duration."""
    second, fraction = divmod(time.time_ns(), 1_000_000_000)
    return f"{_second(second)}.{fraction // 1_000_000:03d}Z"


@functools.lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))  # events come in crowds: formatted once for all of them


def rfc3339(moment: datetime.datetime) -> str:
    """`moment` (aware) as RFC 3339 text in UTC with milliseconds."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


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
        return _moved(row, State.WAITING, self, self.cause, self.why, next_at=self.next_at)


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
        return _moved(
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
        return _moved(row, State.RUNNING, self, self.cause, Why.PLAIN, ready=True, next_at=None)


class Scheduled(ChildEvent, frozen=True, kw_only=True):
    """A job whose runs may overlap has another number of them in hand, or another next one."""

    level = "debug"

    cause: str
    why: Why = Why.PLAIN
    next_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        if row.state is not State.RUNNING:
            return row
        return replace(row, word=word(row.state, self.why), cause=self.cause, next_at=self.next_at)


class Unready(ChildEvent, frozen=True, kw_only=True):
    """A running supervisor has a child that is not ready any more."""

    level = "debug"

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, ready=False, cause=self.cause)


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
        return replace(row, cause=self.cause) if row.state in (State.STARTING, State.RUNNING) else row


class NotifyRefused(ChildEvent, frozen=True, kw_only=True):
    """Something that came over a child's NOTIFY_SOCKET and is not heeded, and why."""

    level = "warning"

    run: str
    cause: str


class Stopping(ChildEvent, frozen=True, kw_only=True):
    """The run has been asked to end and has its grace to do so."""

    run: str
    cause: str
    why: Why = Why.PLAIN

    def apply(self, row: JobStatus) -> JobStatus:
        healthy = False if row.healthy is False else None  # it is not asked any more
        return _moved(row, State.STOPPING, self, self.cause, self.why, ready=False, healthy=healthy, next_at=None)


class Draining(ChildEvent, frozen=True, kw_only=True):
    """The daemon takes no new work; this run is allowed to finish what it has in hand."""

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return _moved(row, row.state, self, self.cause, Why.DRAINING, since=row.since)


class Killing(ChildEvent, frozen=True, kw_only=True):
    """The grace is over: what is left of the run is killed (a task: cancelled)."""

    level = "warning"

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return _moved(row, State.STOPPING, self, self.cause, Why.PLAIN, ready=False)


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
            return _moved(row, row.state, self, self.cause, Why.STUCK)
        return _moved(row, State.STOPPING, self, self.cause, Why.STUCK, ready=False)


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
        return _moved(row, row.state, self, self.cause, Why.PLAIN, pid=None, next_at=self.next_at)


class AttemptStarting(ChildEvent, frozen=True, kw_only=True):
    """An attempt of a run begins after a wait."""

    level = "debug"

    run: str
    cause: str
    attempt: int

    def apply(self, row: JobStatus) -> JobStatus:
        return _moved(row, row.state, self, self.cause, Why.PLAIN, next_at=None)


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
            return _moved(row, row.state, self, self.cause, Why.PLAIN)
        return _moved(row, State.STOPPING, self, self.cause, Why.PLAIN, ready=False)


class WaitingForLimit(ChildEvent, frozen=True, kw_only=True):
    """An attempt waits for its turn (`rate`) or for a place (`bulkhead`) of `limit`: `jobs.NAME` or `limits.NAME`."""

    level = "debug"

    run: str
    cause: str
    limit: str
    next_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        return _moved(row, row.state, self, self.cause, Why.PLAIN, next_at=self.next_at)


class WaitingForRoom(ChildEvent, frozen=True, kw_only=True):
    """A run gives something to a queue that is full, or does not answer: it waits until that takes it."""

    level = "warning"

    run: str
    cause: str
    queue: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, cause=self.cause) if row.state in (State.STARTING, State.RUNNING) else row


class RoomFound(ChildEvent, frozen=True, kw_only=True):
    """The queue has taken what a run gave, or nobody waits for that any more: the run goes on."""

    run: str
    cause: str
    queue: str

    def apply(self, row: JobStatus) -> JobStatus:
        return replace(row, cause=self.cause) if row.state in (State.STARTING, State.RUNNING) else row


class FallingBack(ChildEvent, frozen=True, kw_only=True):
    """A run has failed for good, and its fallback is called."""

    level = "warning"

    run: str
    cause: str

    def apply(self, row: JobStatus) -> JobStatus:
        return _moved(row, row.state, self, self.cause, Why.PLAIN, pid=None, next_at=None)


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
        return _moved(
            row, State.STOPPED, self, self.cause, self.why, exit=self.exit, pid=None, ready=False, healthy=None, next_at=None
        )


class Stopped(ChildEvent, frozen=True, kw_only=True):
    """A child that has no run comes to rest: a wait is over without a start, or it gave up."""

    cause: str
    why: Why = Why.PLAIN

    def apply(self, row: JobStatus) -> JobStatus:
        return _moved(row, State.STOPPED, self, self.cause, self.why, next_at=None)


class Skipped(ChildEvent, frozen=True, kw_only=True):
    """So many ticks of a schedule that made no run, and why."""

    cause: str
    ticks: int = 1


class Progress(ChildEvent, frozen=True, kw_only=True):
    """How far a run says it is."""

    level = "debug"

    run: str
    done: float
    total: float | None = None


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


class Working(ChildEvent, frozen=True, kw_only=True):
    """What the worker of a queue job does, or what keeps it from it: told when it has lasted, and not for each item."""

    level = "debug"

    cause: str
    why: Why = Why.PLAIN
    next_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        if row.state is not State.RUNNING:
            return row
        return replace(row, word=word(row.state, self.why), cause=self.cause, next_at=self.next_at)


class ItemsHandled(ChildEvent, frozen=True, kw_only=True):
    """What became of the items of a queue in the hands of a job, in numbers since the daemon started; once a second while
    they change. `retry` and `dead`: they failed; `back`: they were given back, not begun or cut short; `lost`: their leases."""

    level = "debug"

    queue: str
    done: int
    retry: int
    dead: int
    cancelled: int
    back: int
    lost: int


class Scaled(ChildEvent, frozen=True, kw_only=True):
    """A queue job has more or fewer workers from now on, because of the work that there is: so many items `waiting`, the first
    for `oldest` seconds."""

    cause: str
    was: int
    workers: int
    waiting: int
    oldest: float


class ItemEvent(Event, frozen=True, kw_only=True):
    """Something that happened to an item of a queue; `job`: the worker that had it, where there was one."""

    queue: str
    item: str
    cause: str
    job: str | None = None
    attempt: int | None = None


class ItemRetrying(ItemEvent, frozen=True, kw_only=True):
    """An attempt has failed, for `reason`; after `wait` seconds there may be another, of `attempts` in all."""

    level = "warning"

    reason: str
    wait: float
    attempts: int


class ItemDead(ItemEvent, frozen=True, kw_only=True):
    """An item has failed for good, for `reason`: it is among the dead of its queue until somebody requeues or purges it."""

    level = "error"

    reason: str


class ItemCancelled(ItemEvent, frozen=True, kw_only=True):
    """An item that a worker had has been cancelled: it is neither tried again nor dead."""


class ItemLost(ItemEvent, frozen=True, kw_only=True):
    """The lease of an item was lost: somebody else may have it. What becomes of it here is not heeded."""

    level = "warning"


class ItemsEvent(Event, frozen=True, kw_only=True):
    """So many more items of a queue, in the hands of `job`, had the same happen to them: too many to tell of each. What is
    known of each is in the queue."""

    queue: str
    count: int
    cause: str
    job: str | None = None


class ItemsRetrying(ItemsEvent, frozen=True, kw_only=True):
    """So many more items failed, and may be tried again (`ItemRetrying`)."""

    level = "warning"


class ItemsDead(ItemsEvent, frozen=True, kw_only=True):
    """So many more items failed for good (`ItemDead`)."""

    level = "error"


class ItemsLost(ItemsEvent, frozen=True, kw_only=True):
    """So many more leases were lost (`ItemLost`)."""

    level = "warning"


class ItemsExpired(Event, frozen=True, kw_only=True):
    """So many items of a queue were not worth doing any more when their turn came."""

    queue: str
    count: int


class QueueDegraded(Event, frozen=True, kw_only=True):
    """The engine of a queue does not do what is asked of it; it is asked again and again, first at `next_at`."""

    level = "warning"

    queue: str
    cause: str
    next_at: str | None = None


class QueueRecovered(Event, frozen=True, kw_only=True):
    """The engine of a queue does again what is asked of it."""

    queue: str
    cause: str


class BreakerChanged(Event, frozen=True, kw_only=True):
    """A circuit breaker, `jobs.NAME` or `limits.NAME`, went from one state to another: closed, open, half-open."""

    level = "warning"

    limit: str
    was: str
    now: str
    cause: str
    next_at: str | None = None


class Commanded(Event, frozen=True, kw_only=True):
    """An operator asked for a change."""

    verb: str
    names: tuple[str, ...] = ()


class PhaseChanged(Event, frozen=True, kw_only=True):
    """The shutdown broadcast moved on."""

    phase: Phase
    cause: str


class Reloaded(Event, frozen=True, kw_only=True):
    """A new configuration is in force: what it touched."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ReloadRefused(Event, frozen=True, kw_only=True):
    """A new configuration has faults; the old one goes on."""

    level = "error"

    problems: tuple[str, ...]


class Warned(Event, frozen=True, kw_only=True):
    """Something an operator should know that belongs to no job."""

    level = "warning"

    text: str


class Stalled(Event, frozen=True, kw_only=True):
    """The loop was stuck for `seconds`. `name` and `run`: whose code it was in, None where no job's; `line`: where in it."""

    level = "warning"

    name: str | None
    run: str | None
    cause: str
    seconds: float
    line: str


AnyEvent = (
    Added | Removed | Changed | Renamed | GoalSet | Waiting | Starting | Spawned | Ready | Scheduled | Unready | Healthy
    | HealthCheckFailed | Unhealthy | HealthUnknown | Said | NotifyRefused | Stopping | Draining | Killing | Stuck
    | Retrying | AttemptStarting | AttemptOverdue | WaitingForLimit | WaitingForRoom | RoomFound | FallingBack
    | Ended | Stopped | Skipped | Progress | GroupRestarting | IntensityExceeded | OutputLost
    | Working | ItemsHandled | Scaled | ItemRetrying | ItemDead | ItemCancelled | ItemLost
    | ItemsRetrying | ItemsDead | ItemsLost | ItemsExpired | QueueDegraded | QueueRecovered
    | BreakerChanged | Commanded | PhaseChanged | Reloaded | ReloadRefused | Stalled | Warned
)  # fmt: skip
"""What an `events` stream can carry: the type to decode it with."""


def _moved(row: JobStatus, state: State, event: Event, cause: str, why: Why, **changes: Any) -> JobStatus:
    """`row` in `state` for `cause`. `since` is when it came into the state, so staying in it keeps the time."""
    since = row.since if state is row.state else event.at
    changes.setdefault("since", since)
    return replace(row, state=move(row, state), word=word(state, why), cause=cause, **changes)


def fold(events: Iterable[Event]) -> dict[str, JobStatus]:
    """The table that these events, from the first one on, amount to."""
    table: dict[str, JobStatus] = {}
    for event in events:
        apply(table, event)
    return table


def apply(table: dict[str, JobStatus], event: Event) -> None:
    """One step of the fold, in place."""
    if isinstance(event, Added):
        table[event.name] = event.first()
    elif isinstance(event, Removed):
        del table[event.name]
    elif isinstance(event, Renamed):
        table[event.to] = event.apply(table.pop(event.name))
    elif isinstance(event, ChildEvent):
        table[event.name] = event.apply(table[event.name])


class Lagged(msgspec.Struct, frozen=True, tag_field="event", tag="lagged"):
    """A subscriber was too slow: this many events were not delivered. Take a snapshot and go on."""

    count: int


E = TypeVar("E", bound=Event)
Sink = Callable[[Event], None]


class Journal:
    """The one stream of events, and the table it folds into.

    `now` gives the wall time for the `at` of events. `ring` is how many past events `since` can reach back to.
    """

    def __init__(self, now: Callable[[], str] = wall_now, ring: int = 4096) -> None:
        self.table: dict[str, JobStatus] = {}
        self.seq = 0
        self._now = now
        self._ring: deque[Event] = deque(maxlen=ring)
        self._sinks: list[Sink] = []
        self._subscriptions: set[Subscription] = set()
        self._ended = False

    def emit(self, kind: type[E], /, **fields: Any) -> E:
        """Record that something happened, and tell everyone. Synchronous; never blocks.

        A sink that raises is our own fault, not the job's: it comes out as an InternalError, and ends us loudly.
        """
        event = kind(seq=self.seq + 1, at=self._now(), **fields)
        apply(self.table, event)
        self.seq = event.seq
        self._ring.append(event)
        for sink in self._sinks:
            _feed(sink, event)
        for subscription in self._subscriptions:
            subscription.put(event)
        return event

    def add_sink(self, sink: Sink) -> None:
        """Call `sink` with every event from now on. It must not block and must not raise."""
        self._sinks.append(sink)

    def end(self) -> None:
        """There will be no more events: each subscription ends after those it still has."""
        self._ended = True
        for subscription in self._subscriptions:
            subscription.end()

    def arrange(self, names: Iterable[str]) -> None:
        """Have the rows of the table in this order, from now on."""
        for name in names:
            self.table[name] = self.table.pop(name)

    def past(self, since: int) -> tuple[int, list[Event]]:
        """The events after `since` that the ring still holds, and how many older ones it has lost."""
        kept = [event for event in self._ring if event.seq > since]
        first = kept[0].seq if kept else self.seq + 1
        return max(0, first - since - 1), kept

    @contextmanager
    def subscribe(self, size: int = 1024) -> Iterator[Subscription]:
        """Events from here on, at most `size` of them waiting. Read `table` first: no event falls between."""
        subscription = Subscription(size)
        self._subscriptions.add(subscription)
        if self._ended:
            subscription.end()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)


def _feed(sink: Sink, event: Event) -> None:
    try:
        sink(event)
    except Exception as error:
        raise InternalError(f"a sink raised on event {event.seq}") from error


class Subscription:
    """An async iterator over events that never makes the journal wait: a reader that lags is told by how much."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: deque[Event] = deque()
        self._lost = 0
        self._ended = False
        self._kick = trio.Event()

    def end(self) -> None:
        """There is nothing more to come."""
        self._ended = True
        self._kick.set()

    def put(self, event: Event) -> None:
        """Queue one event; count it as lost while the reader has a loss to hear of, so that the order stays true."""
        if self._lost or len(self._waiting) >= self._size:
            self._lost += 1
        else:
            self._waiting.append(event)
        self._kick.set()

    def __aiter__(self) -> AsyncIterator[Event | Lagged]:
        return self

    async def __anext__(self) -> Event | Lagged:
        """The next event, or `Lagged`; the end comes with the tree's. Cancelled while waiting: nothing is lost."""
        await trio.lowlevel.checkpoint()
        while not self._waiting and not self._lost:
            if self._ended:
                raise StopAsyncIteration
            self._kick = trio.Event()
            await self._kick.wait()
        return self.take()

    def take(self) -> Event | Lagged:
        """The next one without waiting; only call it when there is one."""
        if self._waiting:
            return self._waiting.popleft()
        count, self._lost = self._lost, 0
        return Lagged(count)
