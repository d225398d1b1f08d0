"""Queues: their items, the workers that handle them, and the engines that keep them."""

from __future__ import annotations

from supervisor.events.event import ChildEvent, Event, at_work, noted
from supervisor.state import JobStatus, Why


class Working(ChildEvent, frozen=True, kw_only=True):
    """What the worker of a queue job does, or what keeps it from it: told when it has lasted, and not for each item."""

    level = "debug"

    cause: str
    why: Why = Why.PLAIN
    next_at: str | None = None

    def apply(self, row: JobStatus) -> JobStatus:
        return at_work(row, self.cause, self.why, self.next_at)


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


class WaitingForRoom(ChildEvent, frozen=True, kw_only=True):
    """A run gives something to a queue that is full, or does not answer: it waits until that takes it."""

    level = "warning"

    run: str
    cause: str
    queue: str

    def apply(self, row: JobStatus) -> JobStatus:
        return noted(row, self.cause)


class RoomFound(ChildEvent, frozen=True, kw_only=True):
    """The queue has taken what a run gave, or nobody waits for that any more: the run goes on."""

    run: str
    cause: str
    queue: str

    def apply(self, row: JobStatus) -> JobStatus:
        return noted(row, self.cause)


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


QueueEvent = (
    Working | ItemsHandled | Scaled | WaitingForRoom | RoomFound
    | ItemRetrying | ItemDead | ItemCancelled | ItemLost
    | ItemsRetrying | ItemsDead | ItemsLost | ItemsExpired | QueueDegraded | QueueRecovered
)  # fmt: skip
