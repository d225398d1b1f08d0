"""The desk: one daemon's claims on one queue. Its workers come here for items, and bring what became of them.

    Desk      claims for all free workers at once, stores endings in bulk, keeps leases, hears notices
    Seat      a worker's place at the desk
    Call      the items of one call, from when they are handed out until it is said what became of them
    Tally     what became of the items of one job, in numbers

A claim is made for as many hands as are free, and for no more: nothing is held here that nobody works on. What comes in while
one bulk is stored goes into the next. An engine that is away ends nobody: it is tried again and again, and said so; what is
known by then of items is kept, and stored when it is back. Who has too much unsaved takes nothing new.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import outcome
import trio

from supervisor import events
from supervisor.queues.protocol import Claimed, Ending, Engine, Item, Notice, QueueError, Record, Settings
from supervisor.restart import Delays
from supervisor.spec import Backoff, Seconds, split_name
from supervisor.state import Why
from supervisor.wall import written

T = TypeVar("T")
Fate = Literal["cancelled", "lost"]

AWAY = Backoff(initial=Seconds(0.2), factor=2, max=Seconds(5), jitter=0.2)
"""How an engine that does not answer is tried again."""

MOST_UNSAVED = 5000
"""So many endings may wait to be stored; with more than that nothing new is taken."""

BULK = 1000
"""Endings that are stored, and items that are claimed, in one go at most: the first of them waits for the last."""

TELL_EVERY = 1.0
"""Seconds between two reports of how many items were handled."""

NOTHING = Claimed()


Cut = Callable[["Call", str], None]
"""Has a call end, for this reason; at once, or as soon as it has heard it."""


class Whose(Protocol):
    """Who sits at a desk."""

    job: str
    """The name of its row."""


class Call:
    """The items of one call in the hands of a worker."""

    __slots__ = ("fates", "items", "work")

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.work: Any = None
        """What the worker makes of it; the worker's own."""
        self.fates: dict[str, Fate] | None = None
        """Items that are no more to be worked on, by their ids: the call is to end."""


class Tally:
    """What became of the items that the workers of one job had, in numbers since the daemon started."""

    __slots__ = ("back", "cancelled", "dead", "done", "lost", "retry")

    def __init__(self) -> None:
        self.done = self.retry = self.dead = self.cancelled = self.back = self.lost = 0

    def as_dict(self) -> dict[str, int]:
        """By the words of `Ending.how`, and *lost*: leases that ran out, or were taken away."""
        return {name: getattr(self, name) for name in self.__slots__}


class Seat:
    """A worker's place at a desk, for as long as it lives: a context manager. What it still has at the end is given back."""

    __slots__ = ("_cut", "_desk", "_task", "attempts", "calls", "left", "note", "shown", "tally", "wants", "who")

    def __init__(self, desk: Desk, who: Whose, attempts: int, cut: Cut) -> None:
        self._desk = desk
        self._cut = cut
        self._task: trio.lowlevel.Task
        self.who = who
        self.attempts = attempts
        self.calls: dict[Call, None] = {}
        """What is in its hands."""
        self.left = False
        self.wants = 0
        """How many items it waits for."""
        self.note = ""
        """What it does, where it neither handles anything nor waits for items."""
        self.shown = ""
        """What people have been told that it does."""
        self.tally = desk.tally(split_name(who.job)[0])

    def __enter__(self) -> Seat:
        self._desk.sit_down(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        for call in list(self.calls):
            self.end(call, [back(item) for item in call.items])
        del self._desk.seats[self]
        self._desk.look_whether_idle()

    async def take(self, most: int = 1) -> Call | None:
        """Wait for items, up to so many; None once it is to take no more. Cancelled: it has none."""
        if self.left:
            await trio.lowlevel.checkpoint()
            return None
        self.wants = most
        self._task = trio.lowlevel.current_task()
        self._desk.wait(self)
        taken: Call | None = await trio.lowlevel.wait_task_rescheduled(self._give_up)
        return taken

    async def take_batch(self, size: int, within: float) -> Call | None:
        """Wait for `size` items, or for those that come within so many seconds of the first."""
        call = await self.take(size)
        if call is None or not within:
            return call
        with trio.move_on_after(within):
            while len(call.items) < size and call.fates is None:
                more = await self.take(size - len(call.items))
                if more is None:
                    break
                call.items = [*call.items, *more.items]
                call.fates = more.fates or call.fates
                del self.calls[more]
        return call

    def leave(self) -> None:
        """Take nothing more: who waits for items is told that there are none."""
        self.left = True
        if self.wants:
            self._wake(None)

    def give(self, items: Sequence[Item]) -> Call:
        """Hand it what it waits for."""
        call = Call(items)
        self.calls[call] = None
        self._wake(call)
        return call

    def cut(self, call: Call, id: str, fate: Fate, why: str) -> None:
        """Have a call end, for the sake of one of its items."""
        first = call.fates is None
        call.fates = {id: fate} if call.fates is None else {id: fate, **call.fates}
        if first:
            self._cut(call, why)

    def split(self, call: Call) -> list[Call]:
        """Make a call of each of its items."""
        if len(call.items) == 1:
            return [call]
        del self.calls[call]
        calls = [Call([item]) for item in call.items]
        for each in calls:
            each.fates = call.fates
        self.calls.update(dict.fromkeys(calls))
        return calls

    def end(self, call: Call, endings: Iterable[Ending]) -> None:
        """Say what became of the items of a call: each has one ending, but for those that were lost."""
        del self.calls[call]
        self._desk.store(endings)

    def _wake(self, call: Call | None) -> None:
        self.wants = 0
        self._desk.waits_no_more(self)
        trio.lowlevel.reschedule(self._task, outcome.Value(call))

    def _give_up(self, _: object) -> trio.lowlevel.Abort:
        self.wants = 0
        self._desk.waits_no_more(self)
        return trio.lowlevel.Abort.SUCCEEDED


class Desk:
    """One daemon's claims on one queue. Belongs to the Trio thread. See `open_desk`."""

    def __init__(
        self,
        engine: Engine,
        owner: str,
        journal: events.Journal,
        now: Callable[[], float],
        spread: Callable[[float, float], float],
    ) -> None:
        self.engine = engine
        self.name = engine.name
        self.seats: dict[Seat, None] = {}
        self.trouble: dict[str, str] = {}
        """What the engine does not do at the moment, and why; empty while all is well."""
        self.tallies: dict[str, Tally] = {}
        """By job."""
        self._owner = owner
        self._journal = journal
        self._now = now
        self._spread = spread
        self._waiting: dict[Seat, None] = {}
        self._paused: set[str] = set()
        self._called = trio.Event()
        """Whether there may be something to claim for."""
        self._claiming = False
        self._cancelled_early: set[str] = set()
        """Items that were cancelled while a claim was under way that may bring them."""
        self._endings: list[Ending] = []
        self._storing = 0
        self._ended = trio.Event()
        """Whether there is something to store."""
        self._idle = trio.Event()
        self._leases: dict[str, Lease] = {}
        """What is to be renewed: by id, everything that is claimed and not stored; where leases run out at all."""
        self._leased = trio.Event()
        self._credit: list[int] = []
        self._news = trio.Event()
        """Whether anything has changed since people were last told."""
        self._told: dict[str, dict[str, int]] = {}

    # ---- what a worker sees ----

    def seat(self, who: Whose, attempts: int, cut: Cut) -> Seat:
        """A place for a worker. An item is dead after so many attempts; `cut` is called when a call is to end early."""
        return Seat(self, who, attempts, cut)

    def tally(self, job: str) -> Tally:
        """The numbers of a job."""
        return self.tallies.setdefault(job, Tally())

    def sit_down(self, seat: Seat) -> None:
        """A worker is there."""
        self.seats[seat] = None
        self._news.set()

    def wait(self, seat: Seat) -> None:
        """A worker waits for items."""
        self._waiting[seat] = None
        self._called.set()

    def waits_no_more(self, seat: Seat) -> None:
        """It has got some, or does not want any."""
        self._waiting.pop(seat, None)

    def store(self, endings: Iterable[Ending]) -> None:
        """Have these stored, with whatever else is to be."""
        self._endings.extend(endings)
        self._ended.set()
        self._news.set()

    async def declare(self, settings: Settings) -> None:
        """Store what is true of the queue, as soon as the engine lets it be stored."""
        await self._patiently("store its settings", partial(self.engine.declare, settings))

    # ---- what an operator sees ----

    def pause(self, name: str) -> None:
        """Claim nothing for this job, or this worker, until `resume`."""
        self._paused.add(name)
        self._news.set()

    def resume(self, name: str) -> None:
        """Claim for it again."""
        self._paused.discard(name)
        self._called.set()
        self._news.set()

    def paused(self, seat: Seat) -> bool:
        """Whether nothing is claimed for a worker."""
        return bool(self._paused) and not self._paused.isdisjoint((seat.who.job, split_name(seat.who.job)[0]))

    @property
    def unsaved(self) -> int:
        """How many items have ended of which nothing is stored yet."""
        return len(self._endings) + self._storing

    def heard(self, notice: Notice) -> None:
        """The engine has something to say."""
        if notice.what == "cancel":
            self._cancel(notice.id)
        elif notice.what == "lost" and (item := self._item(notice.id)) is not None:
            self._lose(item, "its lease was lost")

    # ---- claiming ----

    async def claim_for_all(self) -> None:
        """Claim for whoever is free, for ever."""
        while True:
            seats = await self._free()
            limit, attempts = min(sum(seat.wants for seat in seats), BULK), seats[0].attempts
            claimed = await self._patiently("claim", partial(self._claim, limit, attempts), self._is_wanted) or NOTHING
            for record in claimed.dead:
                self._bury(record)
            if claimed.expired:
                self._journal.emit(events.ItemsExpired, queue=self.name, count=claimed.expired)
            if claimed.items:
                self._hand_out(claimed.items, attempts)
            elif not claimed.dead:
                await self._patiently("claim", self.engine.wait_for_work, self._is_wanted)

    async def _free(self) -> list[Seat]:
        """Wait for workers that are free, and give those that one claim can be made for."""
        while True:
            free = [seat for seat in self._waiting if not self.paused(seat)] if self._paused else list(self._waiting)
            if free and self.unsaved < MOST_UNSAVED:
                attempts = free[0].attempts
                return [seat for seat in free if seat.attempts == attempts]
            self.look_whether_idle()
            self._called = trio.Event()
            await self._called.wait()

    def _is_wanted(self) -> bool:
        """Whether it is worth asking the engine again."""
        return bool(self._waiting)

    async def _claim(self, limit: int, attempts: int) -> Claimed:
        self._claiming = True
        try:
            return await self.engine.claim(limit, owner=self._owner, attempts=attempts, order=self._order())
        finally:
            self._claiming = False

    def _order(self) -> Sequence[int]:
        """Whose turn it is, where the priorities are fair: each comes first twice as often as the next (a smooth weighted
        round robin)."""
        spec = self.engine.settings.spec
        if not spec.fair:
            return ()
        weights = [2**at for at in reversed(range(len(spec.priorities)))]
        if len(self._credit) != len(weights):
            self._credit = [0] * len(weights)
        self._credit = [credit + weight for credit, weight in zip(self._credit, weights, strict=True)]
        order = sorted(range(len(weights)), key=lambda at: -self._credit[at])
        self._credit[order[0]] -= sum(weights)
        return order

    def _hand_out(self, items: Sequence[Item], attempts: int) -> None:
        """Give what was claimed to those who still wait for it; what nobody wants any more goes back."""
        if self.engine.shared:
            self._lease(items)
        at = 0
        for seat in list(self._waiting):
            if at == len(items):
                break
            if seat.attempts == attempts and not self.paused(seat):
                call = seat.give(items[at : at + seat.wants])
                at += len(call.items)
                if self._cancelled_early:
                    for item in call.items:
                        if item.id in self._cancelled_early:
                            seat.cut(call, item.id, "cancelled", "the item was cancelled")
        self._cancelled_early.clear()
        if at < len(items):
            self.store([back(item) for item in items[at:]])
        self._news.set()

    def _bury(self, record: Record) -> None:
        """An item has used up its attempts without anybody hearing of its end."""
        reason = record.error or "its worker died each time"
        cause = f"item {record.id} is dead: claimed {record.attempts} times, and never came to an end: {reason}"
        self._journal.emit(
            events.ItemDead, queue=self.name, item=record.id, attempt=record.attempts, reason=reason, cause=cause
        )

    # ---- storing what became of items ----

    async def store_endings(self) -> None:
        """Store what comes in, in bulk, for ever."""
        while True:
            while not self._endings:
                self._ended = trio.Event()
                self.look_whether_idle()
                await self._ended.wait()
            bulk, self._endings = self._endings[:BULK], self._endings[BULK:]
            self._storing = len(bulk)
            await self._store(bulk)
            self._storing = 0
            if self._waiting:
                self._called.set()

    async def _store(self, bulk: list[Ending]) -> None:
        tries = 0

        async def finish() -> list[bool]:
            nonlocal tries
            tries += 1
            return await self.engine.finish(bulk)

        stored = await self._patiently("store what became of items", finish) or []
        for ending, ok in zip(bulk, stored, strict=True):
            if not ok and tries == 1:  # later it may be that it was stored, and only the answer was lost
                self._tell_lost(ending.id, "what became of it came too late: somebody else has it")
        if self._leases:
            for ending in bulk:
                lease = self._leases.get(ending.id)
                if lease is not None and lease.item.token == ending.token:
                    del self._leases[ending.id]

    async def settle(self, until: float) -> None:
        """Wait until nothing is claimed, or waits to be stored, any more; at most until that moment."""
        with trio.move_on_at(until):
            while not self._settled:
                self._idle = trio.Event()
                await self._idle.wait()
            return
        if self.unsaved:
            text = f"queue {self.name}: what became of {self.unsaved} items could not be stored: they will be handled again"
            self._journal.emit(events.Warned, text=text)

    @property
    def _settled(self) -> bool:
        return not self.seats and not self._claiming and not self.unsaved

    def look_whether_idle(self) -> None:
        """Tell who waits for it that there is nothing to do, if so."""
        if self._settled:
            self._idle.set()

    # ---- leases ----

    def _lease(self, items: Sequence[Item]) -> None:
        until = trio.current_time() + self.engine.settings.spec.lease
        for item in items:
            self._leases[item.id] = Lease(item, until)
        self._leased.set()

    async def keep_leases(self) -> None:
        """Renew what is held, each third of a lease, for ever."""
        while True:
            while not self._leases:
                self._leased = trio.Event()
                await self._leased.wait()
            await trio.sleep(self.engine.settings.spec.lease / 3)
            await self._renew_all()

    async def _renew_all(self) -> None:
        """Renew all; what cannot be renewed before it runs out is lost."""
        left = {lease.item.id: lease for lease in self._leases.values()}
        delays = Delays(self._spread)
        while left:
            bulk, trouble = [lease.item for lease in left.values()], ""
            until = trio.current_time() + self.engine.settings.spec.lease
            with trio.move_on_at(min(lease.until for lease in left.values())):
                try:
                    renewed = await self.engine.renew(bulk)
                except QueueError as error:
                    self._away("renew leases", error, wait := delays.after_failure(AWAY, 0))
                    trouble = str(error)
                    await trio.sleep(wait)
                else:
                    self._is_well("renew leases")
                    self._take_renewed(bulk, renewed, until)
                    return
            self._expire(left, trouble)
        self._is_well("renew leases")  # nothing is left that would have to be

    def _take_renewed(self, items: Sequence[Item], renewed: Sequence[bool], until: float) -> None:
        for item, ok in zip(items, renewed, strict=True):
            lease = self._leases.get(item.id)
            if lease is None or lease.item is not item:
                continue  # it has ended meanwhile
            if ok:
                lease.until = until
            else:
                self._lose(item, "its lease was lost: somebody else has it")

    def _expire(self, left: dict[str, Lease], trouble: str) -> None:
        """Give up what has run out, and forget what has ended."""
        now = trio.current_time()
        for id, lease in list(left.items()):
            if self._leases.get(id) is not lease:
                del left[id]
            elif lease.until <= now:
                del left[id]
                self._lose(lease.item, f"its lease ran out, and could not be renewed: {trouble or 'no answer'}")

    def _lose(self, item: Item, why: str) -> None:
        """Somebody else may have this item by now: stop the call, and do not say what becomes of it."""
        lease = self._leases.get(item.id)
        if lease is not None and lease.item.token == item.token:
            del self._leases[item.id]
        for seat, call in self._calls(item.id):
            if any(each is item for each in call.items):
                seat.tally.lost += 1
                seat.cut(call, item.id, "lost", why)
                self._tell_lost(item.id, why)
                return

    def _tell_lost(self, id: str, why: str) -> None:
        self._journal.emit(events.ItemLost, queue=self.name, item=id, cause=f"item {id}: {why}")

    # ---- what is in hand ----

    def _calls(self, id: str) -> Iterator[tuple[Seat, Call]]:
        """The calls that have an item of this id, and whose they are. (Two, where it was lost and claimed again.)"""
        for seat in self.seats:
            for call in seat.calls:
                if any(item.id == id for item in call.items):
                    yield seat, call

    def _item(self, id: str) -> Item | None:
        """The item of this id that was claimed last."""
        items = [item for _, call in self._calls(id) for item in call.items if item.id == id]
        return max(items, key=lambda item: item.token, default=None)

    def _cancel(self, id: str) -> None:
        found = False
        for seat, call in list(self._calls(id)):
            seat.cut(call, id, "cancelled", "the item was cancelled")
            found = True
        if not found and self._claiming:
            self._cancelled_early.add(id)

    # ---- an engine that is away ----

    async def _patiently(
        self, what: str, operation: Callable[[], Awaitable[T]], wanted: Callable[[], bool] = lambda: True
    ) -> T | None:
        """Do it as soon as the engine lets it be done; give up, with None, where it is wanted no more."""
        delays: Delays | None = None
        while delays is None or wanted():
            try:
                result = await operation()
            except QueueError as error:
                delays = delays or Delays(self._spread)
                wait = delays.after_failure(AWAY, 0)
                self._away(what, error, wait)
                await trio.sleep(wait)
            else:
                if self.trouble:
                    self._is_well(what)
                return result
        return None

    def _away(self, what: str, error: QueueError, wait: float) -> None:
        begins = not self.trouble
        self.trouble[what] = str(error)
        next_at = written(self._now() + wait)
        cause = f"queue {self.name}: cannot {what}: {error}"
        if begins:
            self._journal.emit(events.QueueDegraded, queue=self.name, cause=cause, next_at=next_at)
        self._show_all(cause, next_at)

    def _is_well(self, what: str) -> None:
        if self.trouble.pop(what, None) is not None and not self.trouble:
            self._journal.emit(events.QueueRecovered, queue=self.name, cause=f"queue {self.name} answers again")
            self._show_all("", None)

    # ---- what people are told ----

    def _show_all(self, trouble: str, next_at: str | None) -> None:
        """Have every worker, and every group of them, say what is the matter."""
        names = dict.fromkeys(split_name(seat.who.job)[0] for seat in self.seats)
        for seat in self.seats:
            names.pop(seat.who.job, None)
            self._show(seat, trouble or self._doing(seat), next_at)
        for name in names:
            self._say(name, trouble or "its queue answers again", Why.DEGRADED if trouble else Why.PLAIN, next_at)

    def _doing(self, seat: Seat) -> str:
        """What a worker does."""
        item = next((call.items[0].id for call in seat.calls), None)
        if item is not None:
            return f"handles {item}"
        return seat.note or ("paused" if self.paused(seat) else "idle")

    def _show(self, seat: Seat, text: str, next_at: str | None = None) -> None:
        if seat.shown == text and next_at is None:
            return
        seat.shown = text
        why = Why.DEGRADED if self.trouble else Why.PAUSED if self.paused(seat) and not seat.calls else Why.PLAIN
        self._say(seat.who.job, text, why, next_at)

    def _say(self, name: str, cause: str, why: Why, next_at: str | None) -> None:
        if name in self._journal.table:
            self._journal.emit(events.Working, name=name, cause=cause, why=why, next_at=next_at)

    async def tell(self) -> None:
        """Tell people, once a second while it changes, what the workers do and what has become of items, for ever."""
        before: dict[Seat, str] = {}
        while True:
            await self._news.wait()
            self._news = trio.Event()
            await trio.sleep(TELL_EVERY)
            self.tell_counts()
            doing = {seat: self._doing(seat) for seat in self.seats}
            for seat, text in doing.items() if not self.trouble else ():
                if text != seat.shown:
                    if before.get(seat) == text or not seat.calls:
                        self._show(seat, text)
                    else:
                        self._news.set()  # it has just begun: most are over before anybody could read of them
            before = doing

    def tell_counts(self) -> None:
        """Tell how many items were handled, where that is news."""
        for job, tally in self.tallies.items():
            counts = tally.as_dict()
            if counts != self._told.get(job, {}) and any(counts.values()):
                self._told[job] = counts
                if job in self._journal.table:
                    self._journal.emit(events.ItemsHandled, name=job, queue=self.name, **counts)


class Lease:
    """A claim on a shared engine: until when it is certainly ours, on Trio's clock."""

    __slots__ = ("item", "until")

    def __init__(self, item: Item, until: float) -> None:
        self.item = item
        self.until = until


def back(item: Item) -> Ending:
    """The ending of an item that nobody has begun with."""
    return Ending(id=item.id, token=item.token, how="back")


@asynccontextmanager
async def open_desk(
    engine: Engine,
    owner: str,
    journal: events.Journal,
    now: Callable[[], float],
    spread: Callable[[float, float], float],
    patience: Callable[[], float] = lambda: math.inf,
) -> AsyncIterator[Desk]:
    """A desk for as long as the block lasts. `owner` is this daemon's name for others; `now` the wall clock.

    At the end it waits until its workers are gone and everything is stored, at most until the moment (of Trio's clock) that
    `patience` gives.
    """
    desk = Desk(engine, owner, journal, now, spread)
    async with trio.open_nursery() as nursery:
        for task in (desk.claim_for_all, desk.store_endings, desk.tell, *([desk.keep_leases] if engine.shared else ())):
            nursery.start_soon(task, name=f"queue {engine.name}: {task.__name__}")
        yield desk
        await desk.settle(patience())
        desk.tell_counts()
        nursery.cancel_scope.cancel(reason="the desk is closed")
