"""A queue in the memory of the daemon: fast, bounded, and gone with it.

`size` bounds what waits, `keep_results` what has ended; of the dead, which nobody else would ever forget, there are MOST_DEAD.
Durations are measured by Trio's clock; the moments that people see are the wall clock's. Nothing here waits but those who say
so, and each operation is done in one go: whoever is cancelled has done nothing.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import msgspec
import trio

from supervisor.policies.rate import ROUNDING, Bucket
from supervisor.queues import Place
from supervisor.queues.memory_lines import Entry, Group, Line
from supervisor.queues.protocol import (
    Claimed,
    Counts,
    Draft,
    Ending,
    Engine,
    Item,
    Notice,
    QueueFull,
    Receipt,
    Record,
    Settings,
    State,
)

MOST_DEAD = 10_000
"""Dead items that are kept: with more of them, those that have been dead for longest are forgotten."""


@asynccontextmanager
async def open(name: str, settings: Settings, place: Place) -> AsyncIterator[Engine]:
    """A queue of this name, empty. When the block ends, what is in it is dropped, and `place.warn` is told how much."""
    queue = MemoryQueue(name, settings, place)
    try:
        yield queue
    finally:
        if dropped := queue.unfinished:
            place.warn(f"queue {name}: {dropped} {'item is' if dropped == 1 else 'items are'} dropped: it is kept in memory")


class MemoryQueue:
    """See `Engine`."""

    durable = False
    shared = False

    def __init__(self, name: str, settings: Settings, place: Place) -> None:
        self.name = name
        self._settings = settings
        self._declared: Settings | None = None
        self._place = place
        self._count = itertools.count()
        self._entries: dict[str, Entry] = {}
        self._waiting = self._delayed_ones = self._running = 0
        self._expired = 0
        """Since the last claim."""
        self._ended = dict.fromkeys((State.DONE, State.DEAD, State.CANCELLED, State.EXPIRED), 0)
        self._dead: dict[str, Entry] = {}
        """Those that died first come first."""
        self._forgets_dead = False
        """Whether that was said."""
        self._ready: dict[int, Line] = {}
        """Who may be claimed, by priority, the most urgent first."""
        self._delayed = Line(lambda entry: entry.delayed)
        self._expiring = Line(lambda entry: entry.state is State.WAITING)
        self._kept = Line(lambda entry: self._entries.get(entry.draft.id) is entry)
        """Those that have ended and are known for a while."""
        self._groups: dict[str, Group] = {}
        self._keys: dict[str, Entry] = {}
        """Who has each key, for as long as `unique` says."""
        self._timed_keys = Line(self._has_key)
        self._paused = False
        self._bucket = _bucket_of(settings)
        self._throttled = False
        """Whether it was the rate that kept the last claim from more."""
        self._news = True
        """Whether a claim may bring something that the last one did not."""
        self._full = False
        """Whether somebody found no room, and there has been none since."""
        self._for_work = trio.lowlevel.ParkingLot()
        self._for_room = trio.lowlevel.ParkingLot()

    @property
    def settings(self) -> Settings:
        return self._settings

    @property
    def unfinished(self) -> int:
        """How many items have not ended."""
        return self._waiting + self._running

    def use(self, settings: Settings) -> None:
        old, self._settings = self._settings.spec, settings
        if old.unique != settings.spec.unique:
            self._take_keys_anew()
        if old.rate != settings.spec.rate:
            self._bucket, self._throttled = _bucket_of(settings), False
        for name in list(self._groups):
            self._refill(name)
        self._have_news()
        self._have_room()

    async def declare(self, settings: Settings) -> None:
        await trio.lowlevel.checkpoint()
        self._declared = settings
        self.use(settings)

    async def declared(self) -> Settings | None:
        await trio.lowlevel.checkpoint()
        return self._declared

    # ---- producers ----

    async def put(self, drafts: Sequence[Draft]) -> list[Receipt]:
        await trio.lowlevel.checkpoint()
        now, moment = self._tick(), self._place.now()
        size = self._settings.spec.size
        room = size - self._waiting
        if len(drafts) > room and (wanted := self._places_for(drafts)) > room:
            self._full = True
            needed = "1 is" if wanted == 1 else f"{wanted} are"
            raise QueueFull(f"queue {self.name} is full: it has {max(room, 0)} of {size} places free, and {needed} needed")
        return [self._put(draft, now, moment) for draft in drafts]

    async def wait_for_room(self) -> None:
        await trio.lowlevel.checkpoint()
        self._tick()
        while self._full:
            with trio.move_on_at(self._expiring.next()):
                await self._for_room.park()
            self._tick()

    def _places_for(self, drafts: Sequence[Draft]) -> int:
        """How many places these need: none is needed by what is known, or has a key that is taken."""
        fresh = {draft.id: draft for draft in reversed(drafts) if draft.id not in self._entries}.values()
        if self._settings.spec.unique is None:
            return len(fresh)
        keys = {draft.key for draft in fresh if draft.key is not None}
        return sum(draft.key is None for draft in fresh) + len(keys - self._keys.keys())

    def _put(self, draft: Draft, now: float, moment: float) -> Receipt:
        if draft.id in self._entries:
            self._keep_as(draft, self._entries[draft.id])
            return Receipt(id=draft.id, what="known")
        unique = self._settings.spec.unique
        holder = None if unique is None or draft.key is None else self._keys.get(draft.key)
        if unique is not None and holder is not None:
            if unique.on_conflict != "replace" or holder.state is not State.WAITING:
                if unique.on_conflict != "merge":
                    return Receipt(id=holder.draft.id, what="rejected")
                self._keep_as(draft, holder)
                return Receipt(id=holder.draft.id, what="merged")
            self._replace(holder)
        wait = draft.delay if draft.at is None else max(draft.delay, draft.at - moment)
        expires = math.inf if draft.expire is None else now + wait + draft.expire
        entry = Entry(draft, next(self._count), now, now + wait, expires, moment, moment + wait)
        if holder is not None and wait <= 0 and holder.due <= now and holder.draft.priority == draft.priority:
            entry.number, entry.due, entry.ready_at = holder.number, holder.due, holder.ready_at
        self._entries[draft.id] = entry
        self._wait(entry, now)
        return Receipt(id=draft.id, what="stored" if holder is None else "replaced")

    def _keep_as(self, draft: Draft, entry: Entry) -> None:
        """Whoever put this waits for the end of that."""
        if draft.keep:
            self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        if not entry.draft.keep:
            entry.draft = msgspec.structs.replace(entry.draft, keep=True)

    def _replace(self, holder: Entry) -> None:
        self._withdraw(holder)
        holder.state = State.CANCELLED
        del self._entries[holder.draft.id], self._keys[holder.draft.key or ""]
        if holder.draft.keep:
            self._place.listen(Notice(what="ended", id=holder.draft.id))
        self._timed_keys.left()

    # ---- keys ----

    def _take_key(self, entry: Entry, now: float) -> None:
        """Have it hold its key, where that is free and its lifetime says so."""
        unique, key = self._settings.spec.unique, entry.draft.key
        if unique is None or key is None or key in self._keys:
            return
        if not isinstance(unique.lifetime, str):
            if (free := entry.put + unique.lifetime) > now:
                self._keys[key] = entry
                self._timed_keys.add(free, entry)
        elif entry.state is State.WAITING or (entry.state is State.RUNNING and unique.lifetime == "running"):
            self._keys[key] = entry

    def _has_key(self, entry: Entry) -> bool:
        return self._keys.get(entry.draft.key or "") is entry

    def _free_key(self, entry: Entry, lifetime: Literal["queued", "running"]) -> None:
        """It is queued no longer; or it runs no longer, either."""
        unique, key = self._settings.spec.unique, entry.draft.key
        if unique is not None and key is not None and unique.lifetime in ("queued", lifetime) and self._has_key(entry):
            del self._keys[key]

    def _take_keys_anew(self) -> None:
        self._keys.clear()
        self._timed_keys = Line(self._has_key)
        for entry in self._entries.values():
            self._take_key(entry, trio.current_time())

    # ---- waiting ----

    def _wait(self, entry: Entry, now: float) -> None:
        """It waits from now on, and may be claimed when it is due."""
        entry.state = State.WAITING
        self._waiting += 1
        self._take_key(entry, now)
        if entry.draft.expire is not None:
            self._expiring.add(entry.expires, entry)
        if entry.due <= now:
            self._line_up(entry)
            return
        entry.delayed = True
        self._delayed_ones += 1
        if entry.due < self._delayed.next():
            self._for_work.unpark_all()  # who waits must look anew how long
        self._delayed.add(entry.due, entry)

    def _line_up(self, entry: Entry) -> None:
        """It may be claimed, or comes into line when it is its turn in its group."""
        if (name := entry.draft.group) is not None:
            self._groups.setdefault(name, Group()).park(entry)
            self._refill(name)
        else:
            self._make_ready(entry)

    def _refill(self, name: str) -> None:
        """Have as many of a group in line as may begin."""
        group = self._groups[name]
        while (entry := group.next(self._settings.spec.per_key)) is not None:
            self._make_ready(entry)
        if group.empty:
            del self._groups[name]

    def _make_ready(self, entry: Entry) -> None:
        """It may be claimed."""
        if (line := self._ready.get(entry.draft.priority)) is None:
            line = self._ready[entry.draft.priority] = Line(_is_ready)
            self._ready = dict(sorted(self._ready.items()))
        line.add(entry.due, entry)
        if not self._news:
            self._have_news()

    def _stop_waiting(self, entry: Entry) -> None:
        """It has left its line."""
        self._waiting -= 1
        if entry.draft.expire is not None:
            self._expiring.left()

    def _withdraw(self, entry: Entry) -> None:
        """It waits no longer, before it was its turn."""
        group = entry.draft.group
        if entry.delayed:
            entry.delayed = False
            self._delayed_ones -= 1
            self._delayed.left()
        else:
            if not entry.parked:
                self._ready[entry.draft.priority].left()
            if group is not None:
                self._groups[group].left(entry)
                self._refill(group)  # it may have been the one whose turn it was
        self._stop_waiting(entry)
        self._have_room()

    def _have_news(self) -> None:
        self._news = True
        self._for_work.unpark_all()

    def _have_room(self) -> None:
        if self._full and self._waiting < self._settings.spec.size:
            self._full = False
            self._for_room.unpark_all()

    def _tick(self) -> float:
        """Do what is due; gives the time."""
        now = trio.current_time()
        while (entry := self._delayed.take(now)) is not None:
            entry.delayed = False
            self._delayed_ones -= 1
            self._line_up(entry)
        while (entry := self._expiring.take(now)) is not None:
            if entry.expires <= now:  # else it was tried again since
                self._withdraw(entry)
                self._end(entry, State.EXPIRED)
                self._expired += 1
        while (entry := self._kept.take(now)) is not None:
            self._forget(entry)
        while (entry := self._timed_keys.take(now)) is not None:
            del self._keys[entry.draft.key or ""]
        return now

    # ---- workers ----

    async def claim(self, limit: int, *, owner: str, attempts: int, order: Sequence[int] = ()) -> Claimed:
        await trio.lowlevel.checkpoint()
        now = self._tick()
        items: list[Item] = []
        dead: list[Record] = []
        room = min(limit, self._may_begin(now))
        begin = functools.partial(self._begin, owner=owner, now=now, moment=self._place.now())
        for priority in dict.fromkeys((*order, *self._ready)):
            line = self._ready.get(priority)
            while line is not None and len(items) < room and (entry := line.take()) is not None:
                if entry.attempts >= attempts:
                    dead.append(self._die(entry))
                elif entry.draft.group is None or self._is_its_turn(entry, self._groups[entry.draft.group]):
                    items.append(begin(entry))
        self._throttled = self._bucket is not None and not self._bucket.has_one(now)
        self._news = self._paused or (len(items) >= limit and not self._throttled and self._waiting > self._delayed_ones)
        self._have_room()
        expired, self._expired = self._expired, 0
        return Claimed(items=items, dead=dead, expired=expired)

    async def wait_for_work(self, demand: object = None) -> None:
        await trio.lowlevel.checkpoint()
        while not self._look_for_work():
            with trio.move_on_at(self._next_work()):
                await self._for_work.park()

    def _look_for_work(self) -> bool:
        now = self._tick()
        if self._throttled and self._bucket is not None and self._bucket.has_one(now):
            self._throttled = False
            self._have_news()
        return self._news and not self._paused

    def _next_work(self) -> float:
        """When there is some although nothing happens."""
        if self._paused:
            return math.inf
        return min(self._delayed.next(), self._bucket.due if self._throttled and self._bucket is not None else math.inf)

    def _may_begin(self, now: float) -> int:
        """How many items may begin now, as far as it does not depend on which."""
        if self._paused:
            return 0
        concurrency = self._settings.spec.concurrency
        free = sys.maxsize if concurrency is None else max(concurrency - self._running, 0)
        return free if self._bucket is None else min(free, int(self._bucket.tokens(now) + ROUNDING))

    def _begin(self, entry: Entry, owner: str, now: float, moment: float) -> Item:
        self._stop_waiting(entry)
        self._running += 1
        entry.state, entry.owner, entry.started_at = State.RUNNING, owner, moment
        entry.attempts += 1
        entry.token += 1
        draft = entry.draft
        if draft.key is not None:
            self._free_key(entry, "queued")
        if self._bucket is not None:
            self._bucket.take(now)
        return Item(
            id=draft.id,
            token=entry.token,
            payload=draft.payload,
            attempt=entry.attempts,
            priority=draft.priority,
            group=draft.group,
            put_at=entry.put_at,
            ready_at=entry.ready_at,
        )

    def _die(self, entry: Entry) -> Record:
        """Its attempts are used up."""
        self._stop_waiting(entry)
        self._end(entry, State.DEAD)
        if (name := entry.draft.group) is not None:
            self._groups[name].left(entry)
            self._refill(name)
        return entry.record(self.name)

    def _is_its_turn(self, entry: Entry, group: Group) -> bool:
        """Whether it begins, being first in line; where a more urgent one of its group has overtaken it, it waits again."""
        group.left(entry)
        if group.running >= self._settings.spec.per_key:
            group.park(entry)
            return False
        group.running += 1
        return True

    async def renew(self, items: Sequence[Item]) -> list[bool]:
        await trio.lowlevel.checkpoint()
        return [self._held(item.id, item.token) is not None for item in items]

    def _held(self, id: str, token: int) -> Entry | None:
        """The item that is claimed with this token."""
        entry = self._entries.get(id)
        return entry if entry is not None and entry.token == token and entry.state is State.RUNNING else None

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        await trio.lowlevel.checkpoint()
        now = self._tick()
        stored = [self._finish(ending, now) for ending in endings]
        if self._settings.spec.concurrency is not None:
            self._have_news()
        return stored

    def _finish(self, ending: Ending, now: float) -> bool:
        if (entry := self._held(ending.id, ending.token)) is None:
            return False
        self._running -= 1
        if ending.how == "back":
            entry.attempts -= 1
        else:
            entry.result, entry.error, entry.traceback = ending.result, ending.error, ending.traceback
        if ending.how not in ("retry", "back"):
            self._end(entry, _ENDS[ending.how])
        elif entry.cancelling:
            self._end(entry, State.CANCELLED)
        else:
            self._wait_again(entry, now, ending.delay if ending.how == "retry" else None)
        if entry.draft.group is not None:
            self._groups[entry.draft.group].running -= 1
            self._refill(entry.draft.group)
        return True

    def _wait_again(self, entry: Entry, now: float, delay: float | None) -> None:
        """It was claimed, or dead. `delay`: from now on; None: it is due since it was."""
        entry.progress = entry.ended_at = None
        if delay is not None:
            entry.due, entry.ready_at = now + delay, self._place.now() + delay
            entry.expires = math.inf if entry.draft.expire is None else entry.due + entry.draft.expire
        self._wait(entry, now)

    def _end(self, entry: Entry, state: State) -> None:
        entry.state = state
        if entry.draft.key is not None:
            self._free_key(entry, "running")
        if state is State.DONE and entry.result is None and not entry.draft.keep:
            del self._entries[entry.draft.id]
            return
        entry.cancelling, entry.ended_at, entry.ending = False, self._place.now(), next(self._count)
        self._ended[state] += 1
        if state is State.DEAD:
            self._bury(entry)
        else:
            self._kept.add(trio.current_time() + self._settings.spec.keep_results, entry)
        if entry.draft.keep:
            self._place.listen(Notice(what="ended", id=entry.draft.id))

    def _bury(self, entry: Entry) -> None:
        self._dead[entry.draft.id] = entry
        if len(self._dead) > MOST_DEAD:
            self._forget(next(iter(self._dead.values())))
            if not self._forgets_dead:
                self._forgets_dead = True
                text = f"queue {self.name}: more than {MOST_DEAD} items are dead: those that died first are forgotten"
                self._place.warn(f"{text}, as it is kept in memory")

    def _forget(self, entry: Entry) -> None:
        """It has ended, and is not known any more."""
        del self._entries[entry.draft.id]
        self._dead.pop(entry.draft.id, None)
        self._ended[entry.state] -= 1

    async def progress(self, item: Item, done: float, total: float | None) -> None:
        await trio.lowlevel.checkpoint()
        if (entry := self._held(item.id, item.token)) is not None:
            entry.progress = (done, total)

    # ---- people ----

    async def cancel(self, id: str) -> Literal["cancelled", "running", "ended", "unknown"]:
        await trio.lowlevel.checkpoint()
        self._tick()
        if (entry := self._entries.get(id)) is None:
            return "unknown"
        if entry.state is State.WAITING:
            self._withdraw(entry)
            self._end(entry, State.CANCELLED)
            return "cancelled"
        if entry.state is not State.RUNNING:
            return "ended"
        entry.cancelling = True
        self._place.listen(Notice(what="cancel", id=id))
        return "running"

    async def requeue(self, ids: Sequence[str] | None = None) -> int:
        await trio.lowlevel.checkpoint()
        now = self._tick()
        dead = [self._dead.pop(id) for id in (list(self._dead) if ids is None else dict.fromkeys(ids)) if id in self._dead]
        self._ended[State.DEAD] -= len(dead)
        for entry in dead:
            entry.attempts = 0
            self._wait_again(entry, now, 0.0)
        return len(dead)

    async def purge(self, state: State) -> int:
        await trio.lowlevel.checkpoint()
        self._tick()
        if state is State.RUNNING:
            raise ValueError("items that run are not purged: cancel them")
        gone = [entry for entry in self._entries.values() if entry.state is state]
        for entry in gone:
            if state is State.WAITING:
                self._withdraw(entry)
                self._end(entry, State.CANCELLED)
            self._forget(entry)
            if state is not State.DEAD:
                self._kept.left()
        return len(gone)

    async def pause(self, paused: bool) -> None:
        await trio.lowlevel.checkpoint()
        self._paused = paused
        self._have_news()
        self._place.listen(Notice(what="paused" if paused else "resumed"))

    async def counts(self) -> Counts:
        await trio.lowlevel.checkpoint()
        now = self._tick()
        heads = [line.next() for line in self._ready.values()]
        heads += [group.oldest for group in self._groups.values()]
        return Counts(
            waiting=self._waiting - self._delayed_ones,
            delayed=self._delayed_ones,
            running=self._running,
            oldest=None if self._waiting == self._delayed_ones else now - min(heads),
            paused=self._paused,
            **{state.value: count for state, count in self._ended.items()},
        )

    async def peek(self, state: State, limit: int) -> list[Record]:
        await trio.lowlevel.checkpoint()
        self._tick()
        those = [entry for entry in self._entries.values() if entry.state is state]
        if state is State.WAITING:
            first = heapq.nsmallest(limit, those, key=_turn)
        else:
            first = heapq.nlargest(limit, those, key=lambda entry: (entry.ended_at or entry.started_at or 0.0, entry.ending))
        return [entry.record(self.name) for entry in first]

    async def show(self, id: str, *, keep: bool = False) -> Record | None:
        await trio.lowlevel.checkpoint()
        self._tick()
        if (entry := self._entries.get(id)) is None:
            return None
        if keep:
            self._keep(entry)
        return entry.record(self.name)


_ENDS = {"done": State.DONE, "dead": State.DEAD, "cancelled": State.CANCELLED}


def _is_ready(entry: Entry) -> bool:
    return entry.state is State.WAITING


def _turn(entry: Entry) -> tuple[float, int, float, int]:
    """The order of claims."""
    return (entry.due if entry.delayed else 0.0), entry.draft.priority, entry.due, entry.number


def _bucket_of(settings: Settings) -> Bucket | None:
    rate = settings.spec.rate
    return None if rate is None else Bucket(rate, max(int(rate), 1))
