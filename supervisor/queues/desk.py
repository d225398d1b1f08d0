"""The desk: one daemon's claims on one queue. Its workers come here for items, and bring what became of them.

A claim is made for as many hands as are free. While calls are short, it brings what these do next as well (`stock.py`): else
nothing is held here that nobody works on. What comes in while one bulk is stored goes into the next.

An engine that is away ends nobody: it is tried again and again, and said so; what is known by then of items is kept, and
stored when it is back. Who has too much unsaved takes nothing new.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TypeVar

import trio

from supervisor import events
from supervisor.queues.leases import AWAY, Leases
from supervisor.queues.protocol import Claimed, Counts, Demand, Ending, Engine, Item, Notice, QueueError, Record, Settings
from supervisor.queues.reports import Reports
from supervisor.queues.seat import Call, Crew, Cut, Seat, Tally, Whose, back
from supervisor.queues.stock import Stock
from supervisor.restart import Delays
from supervisor.spec import split_name
from supervisor.state import Why
from supervisor.wall import written

T = TypeVar("T")

MOST_UNSAVED = 5000
"""So many endings may wait to be stored; with more than that nothing new is taken."""

BULK = 1000
"""Endings that are stored, and items that are claimed, in one go at most: the first of them waits for the last."""

TELL_EVERY = 1.0
"""Seconds between two reports of how many items were handled."""


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
        self.reports = Reports(engine.name, journal)
        self._owner = owner
        self._journal = journal
        self._now = now
        self._spread = spread
        self._waiting: dict[Seat, None] = {}
        self._crews: dict[str, Crew] = {}
        """By job: those who are told when its workers take items, and wait for them."""
        self._paused: set[str] = set()
        self.held: bool | None = None
        """Whether somebody has paused the queue, for all who share it; None: not known, or not known any more."""
        self._called = trio.Event()
        """Whether there may be something to claim for."""
        self._ahead_for = 0
        """Items that are claimed ahead are dead after so many attempts."""
        self._asked: Demand
        """What was claimed last, or is being claimed."""
        self._claiming = False
        self._cancelled_early: set[str] = set()
        """Items that were cancelled while a claim was under way that may bring them."""
        self._endings: list[Ending] = []
        self._storing = 0
        self._ended = trio.Event()
        """Whether there is something to store."""
        self._idle = trio.Event()
        self.stock = Stock(lambda items: self.store([back(item) for item in items]))
        """What is claimed and nobody has yet."""
        self.leases = Leases(
            engine, spread, partial(self._away, "renew leases"), partial(self._is_well, "renew leases"), self._lose
        )
        """Of everything that is claimed and not stored, where leases run out at all."""
        self._asked_at = 0.0
        self._credit: list[int] = []
        self._news = trio.Event()
        """Whether anything has changed since people were last told."""
        self._told: dict[str, dict[str, int]] = {}
        self._missed = False
        """Whether an item in hand may have been cancelled while the engine was away."""

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

    def look_again(self) -> None:
        """There is something to tell."""
        self._news.set()

    def wait(self, seat: Seat) -> None:
        """A worker waits for items."""
        self._waiting[seat] = None
        self._called.set()
        if self._crews and (crew := self._crews.get(seat.job)) is not None:
            crew.freed()

    def waits_no_more(self, seat: Seat) -> None:
        """It has got some, or does not want any."""
        self._waiting.pop(seat, None)

    def at_hand(self, seat: Seat, most: int) -> list[Item]:
        """What is there for a worker that was claimed ahead."""
        if not self.stock.items or not self._may_have(seat, self._ahead_for) or self.unsaved >= MOST_UNSAVED:
            return []
        items = self.stock.take(most)
        if self.stock.low:
            self._called.set()
        return items

    def leaves(self) -> None:
        """A worker takes nothing more. What was claimed ahead goes back with the last of them."""
        if self.stock.items and all(seat.left for seat in self.seats):
            self.stock.shrink()

    def store(self, endings: Iterable[Ending]) -> None:
        """Have these stored, with whatever else is to be."""
        self._endings.extend(endings)
        self._ended.set()
        self._news.set()

    async def declare(self, settings: Settings) -> None:
        """Store what is true of the queue, as soon as the engine lets it be stored."""
        await self._patiently("store its settings", partial(self.engine.declare, settings))

    # ---- what those see who decide how many workers there are ----

    @contextmanager
    def watched(self, job: str, crew: Crew) -> Iterator[None]:
        """Tell somebody when the workers of a job take items, and wait for them."""
        self._crews[job] = crew
        try:
            yield
        finally:
            if self._crews.get(job) is crew:
                del self._crews[job]

    def has_free(self, job: str) -> bool:
        """Whether a worker of this job waits for items, and would get some."""
        return any(seat.job == job and not self.paused(seat) for seat in self._waiting)

    def seated(self, job: str) -> int:
        """How many workers of this job are there, and stay."""
        return sum(seat.job == job and not seat.left for seat in self.seats)

    async def work_waits(self) -> Counts:
        """Wait until a claim may bring something, and give the queue in numbers; however long the engine is away."""
        await self._patiently("look for work", self.engine.wait_for_work)
        return await self._patiently("count what waits", self.engine.counts) or Counts()

    def _have_crews_look(self) -> None:
        for crew in self._crews.values():
            crew.look()

    # ---- what an operator sees ----

    def pause(self, name: str) -> None:
        """Claim nothing for this job, or this worker, until `resume`."""
        self._paused.add(name)
        self.stock.shrink()
        self._show_those_of(name)

    def resume(self, name: str) -> None:
        """Claim for it again."""
        self._paused.discard(name)
        self._called.set()
        self._show_those_of(name)
        self._have_crews_look()

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
            self.leases.drop(item.id, item.token)
            self._lose(item, "its lease was lost")
        elif notice.what in ("paused", "resumed"):
            self._hold(notice.what == "paused")

    def _hold(self, held: bool) -> None:
        """The queue is paused, or is not."""
        self.held = held
        if held:
            self.stock.shrink()
        for seat in self.seats:
            self._show(seat)

    # ---- claiming ----

    async def claim_for_all(self) -> None:
        """Claim for whoever is free, for ever."""
        while True:
            demand = await self._wanted()
            claimed = await self._patiently("claim", partial(self._claim, demand), self._is_wanted)
            while claimed is not None:
                self._take(claimed)
                more = claimed.dead or len(claimed.items) >= self._asked.limit
                claimed = None if more else await self._patiently("claim", self._wait_for_work, self._is_wanted)

    def _take(self, claimed: Claimed) -> None:
        for record in claimed.dead:
            self._bury(record)
        if claimed.expired:
            self.reports.expired(claimed.expired)
            self._news.set()
        if claimed.items:
            self._hand_out(claimed.items, self._asked.attempts)

    async def _wanted(self) -> Demand:
        """Wait until a claim is to be made, and say which."""
        while (demand := self._demand()) is None:
            self.look_whether_idle()
            self._called = trio.Event()
            await self._called.wait()
        return demand

    def _demand(self) -> Demand | None:
        """The claim that is to be made now, for those who are free, and for what is to be had ahead."""
        free = [seat for seat in self._waiting if not self.paused(seat)] if self._paused else list(self._waiting)
        if not (free or self.stock.low) or self.unsaved >= MOST_UNSAVED:
            return None
        attempts = free[0].attempts if free else self._ahead_for
        wants = sum(seat.wants for seat in free if seat.attempts == attempts)
        limit = wants + max(self._ahead(attempts) - len(self.stock.items), 0)
        if limit <= 0:
            return None
        return Demand(limit=self._one_turn(min(limit, BULK)), owner=self._owner, attempts=attempts, order=self._order())

    def _ahead(self, attempts: int) -> int:
        """How many items are to be claimed ahead. None where that would be felt: what is held here counts as running, and
        where the priorities are fair, each claim has one that comes first."""
        if not self.stock.worth(1):
            return 0  # nothing much happens: that is not worth a look at all the seats
        settings, seats = self.engine.settings, [seat for seat in self.seats if not seat.left]
        spec = settings.spec
        limits = (spec.concurrency, spec.rate, settings.group_by)
        if self._paused or spec.fair or any(limit is not None for limit in limits):
            return 0
        if attempts == 1 or any(seat.attempts != attempts or seat.batches for seat in seats):
            return 0
        return min(self.stock.worth(sum(max(1, seat.wants + len(seat.calls)) for seat in seats)), BULK)

    def _is_wanted(self) -> bool:
        """Whether it is worth asking the engine again."""
        return bool(self._waiting)

    async def _claim(self, demand: Demand) -> Claimed:
        with self._may_bring_items():
            self._asks(demand)
            return await self.engine.claim(demand.limit, owner=demand.owner, attempts=demand.attempts, order=demand.order)

    async def _wait_for_work(self) -> Claimed | None:
        """Wait until another claim may bring something; what it has brought, where the engine has made it itself."""
        with self._may_bring_items():
            return await self.engine.wait_for_work(lambda: self._asks(self._demand()))

    def _asks(self, demand: Demand | None) -> Demand | None:
        """Note what is being claimed from now on."""
        if demand is not None:
            self._asked, self._claiming, self._asked_at = demand, True, trio.current_time()
            self._cancelled_early.clear()
        return demand

    @contextmanager
    def _may_bring_items(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._claiming = False
            self.look_whether_idle()  # who waits looks again when what was claimed is handed out, or given back

    def _weights(self) -> list[int]:
        """How often each priority comes first, where they are fair; none where they are strict."""
        spec = self.engine.settings.spec
        return [2**at for at in reversed(range(len(spec.priorities)))] if spec.fair else []

    def _one_turn(self, limit: int) -> int:
        """How much of so many one claim takes: all, or, where priorities take turns, so little that each has its own."""
        return -(-limit // sum(self._weights() or [1]))

    def _order(self) -> Sequence[int]:
        """Whose turn it is, where the priorities are fair: each comes first twice as often as the next (a smooth weighted
        round robin)."""
        if not (weights := self._weights()):
            return ()
        if len(self._credit) != len(weights):
            self._credit = [0] * len(weights)
        self._credit = [credit + weight for credit, weight in zip(self._credit, weights, strict=True)]
        order = sorted(range(len(weights)), key=lambda at: -self._credit[at])
        self._credit[order[0]] -= sum(weights)
        return order

    def _hand_out(self, items: Sequence[Item], attempts: int) -> None:
        """Give what was claimed to those who wait for it; what is too much for them and the stock goes back."""
        if self.engine.shared:
            self.leases.keep(items, self._asked_at)
        if attempts != self._ahead_for:
            self.stock.shrink()
            self._ahead_for = attempts
        ahead = self._ahead(attempts)
        self.stock.add(items)
        for seat in list(self._waiting):
            if not self.stock.items:
                break
            if self._may_have(seat, attempts):
                self._cut_early(seat, seat.give(self.stock.take(seat.wants)))
        if any(item.attempt >= attempts for item in self.stock.items):
            self.stock.distrust()  # the last attempt of an item is for a worker to begin with, not to be lost in here
        else:
            self.stock.shrink(2 * ahead)  # what was worth it a moment ago is not given back for a trifle
        for id in self._cancelled_early if self.stock.items else ():
            self._cancel_ahead(id)
        self._news.set()
        self._have_crews_look()

    def _may_have(self, seat: Seat, attempts: int) -> bool:
        """Whether what was claimed to be tried so often is for a worker."""
        return seat.attempts == attempts and not self.paused(seat)

    def _cut_early(self, seat: Seat, call: Call) -> None:
        """It has hardly been handed out, and some of it is cancelled."""
        for item in call.items if self._cancelled_early else ():
            if item.id in self._cancelled_early:
                seat.cut(call, item.id, "cancelled", "the item was cancelled")

    def _bury(self, record: Record) -> None:
        """An item has used up its attempts without anybody hearing of its end."""
        reason = record.error or "its worker died each time"
        cause = f"item {record.id} is dead: it has been claimed {record.attempts} times, the last one: {reason}"
        self.reports.tell(events.ItemDead, record.id, cause, attempt=record.attempts, reason=reason)
        self._news.set()

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
            self.stock.learn(sum(ending.how != "back" for ending in bulk))
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
        if self.engine.shared:
            for ending in bulk:
                self.leases.drop(ending.id, ending.token)

    async def settle(self, patience: Callable[[], float]) -> None:
        """Wait until its workers are gone, however long they have; then until nothing waits to be stored any more, at most
        until the moment that `patience` gives then."""
        await self._wait_until(lambda: not self.seats)
        with trio.move_on_at(patience()):
            await self._wait_until(lambda: self._settled)
            return
        if self.unsaved:
            text = f"queue {self.name}: what became of {self.unsaved} items could not be stored: they will be handled again"
            self._journal.emit(events.Warned, text=text)

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._idle = trio.Event()
            await self._idle.wait()

    @property
    def _settled(self) -> bool:
        return not self._claiming and not self.unsaved

    def look_whether_idle(self) -> None:
        """Tell who waits for it that there is less to do."""
        self._idle.set()

    # ---- what is lost ----

    def _lose(self, item: Item, why: str) -> None:
        """Somebody else may have this item by now: stop the call, and do not say what becomes of it."""
        for seat, call in self._calls(item.id):
            if any(each is item for each in call.items):
                seat.tally.lost += 1
                seat.cut(call, item.id, "lost", why)
                self._tell_lost(item.id, why)
                return
        self.stock.remove(item.id)

    def _tell_lost(self, id: str, why: str) -> None:
        self.reports.tell(events.ItemLost, id, f"item {id}: {why}")
        self._news.set()

    # ---- what is in hand ----

    def _calls(self, id: str) -> Iterator[tuple[Seat, Call]]:
        """The calls that have an item of this id, and whose they are. (Two, where it was lost and claimed again.)"""
        for seat in self.seats:
            for call in seat.calls:
                if any(item.id == id for item in call.items):
                    yield seat, call

    def _item(self, id: str) -> Item | None:
        """The item of this id that was claimed last."""
        held = [*self.stock.items, *(item for _, call in self._calls(id) for item in call.items)]
        items = [item for item in held if item.id == id]
        return max(items, key=lambda item: item.token, default=None)

    def _cancel(self, id: str) -> None:
        found = False
        for seat, call in list(self._calls(id)):
            seat.cut(call, id, "cancelled", "the item was cancelled")
            found = True
        if not found and not self._cancel_ahead(id) and self._claiming:
            self._cancelled_early.add(id)

    def _cancel_ahead(self, id: str) -> bool:
        """Give back an item that nobody has begun with, if it is here: who has it cancelled wants no more."""
        item = self.stock.remove(id)
        if item is not None:
            self.store([back(item)])
        return item is not None

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
        if begins:
            self._journal.emit(events.QueueDegraded, queue=self.name, cause=self._trouble, next_at=next_at)
        self._show_all(next_at)

    def _is_well(self, what: str) -> None:
        if self.trouble.pop(what, None) is not None and not self.trouble:
            self._journal.emit(events.QueueRecovered, queue=self.name, cause=f"queue {self.name} answers again")
            if self.engine.shared:
                self._missed, self.held = True, None
            self._news.set()
            self._show_all(None)

    @property
    def _trouble(self) -> str:
        """What the engine does not do, in one sentence; empty while all is well."""
        what = next(iter(self.trouble), None)
        return "" if what is None else f"queue {self.name}: cannot {what}: {self.trouble[what]}"

    # ---- what people are told ----

    def _show_all(self, next_at: str | None) -> None:
        """Have every worker say what is the matter, and every job when the engine is asked again."""
        jobs = dict.fromkeys(split_name(seat.who.job)[0] for seat in self.seats)
        for seat in self.seats:
            if seat.who.job not in jobs:
                self._show(seat)
            else:
                seat.shown = self._trouble
        for job in jobs:
            why = Why.DEGRADED if self.trouble else Why.PLAIN
            self._say(job, self._trouble or "its queue answers again", why, next_at)

    def _show_those_of(self, name: str) -> None:
        """Have the workers of a job, or the one of this name, say what they do now."""
        for seat in self.seats:
            if name in (seat.who.job, split_name(seat.who.job)[0]):
                self._show(seat)

    def _doing(self, seat: Seat) -> tuple[str, Why]:
        """What a worker does, or what keeps it from it."""
        if self.trouble:
            return self._trouble, Why.DEGRADED
        if not seat.calls and (self.held or self.paused(seat)):
            return "paused" if self.paused(seat) else "the queue is paused", Why.PAUSED
        if seat.note:
            return seat.note, Why.PLAIN
        item = next((call.items[0].id for call in seat.calls), None)
        return "idle" if item is None else f"handles {item}", Why.PLAIN

    def _show(self, seat: Seat) -> None:
        text, why = self._doing(seat)
        if seat.shown != text:
            seat.shown = text
            self._say(seat.who.job, text, why, None)

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
            self.reports.tell_rest()
            with suppress(QueueError):  # which is said elsewhere
                await self._store_progress()
                await self._catch_up()
            doing = {seat: self._doing(seat)[0] for seat in self.seats}
            for seat, text in doing.items():
                if text != seat.shown:
                    if before.get(seat) == text or not seat.calls or self.trouble:
                        self._show(seat)
                    else:
                        self._news.set()  # it has just begun: most are over before anybody could read of them
            before = doing

    async def _store_progress(self) -> None:
        for call in [call for seat in self.seats for call in seat.calls if call.progress is not None]:
            (done, total), call.progress = call.progress or (0, None), None
            await self.engine.progress(call.items[0], done, total)

    async def _catch_up(self) -> None:
        """Look what has happened while nobody could tell us: whether the queue was paused, and items were cancelled."""
        if self.held is None:
            paused = (await self.engine.counts()).paused
            if self.held is None:  # else we have been told meanwhile, and that is newer
                self._hold(paused)
        if not self._missed:
            return
        for item in [*self.stock.items, *(item for seat in self.seats for call in seat.calls for item in call.items)]:
            record = await self.engine.show(item.id)
            if record is not None and record.cancelling:
                self._cancel(item.id)
        self._missed = False

    def tell_counts(self) -> None:
        """Tell how many items were handled, where that is news."""
        for job, tally in self.tallies.items():
            counts = tally.as_dict()
            if counts != self._told.get(job, {}) and any(counts.values()):
                self._told[job] = counts
                if job in self._journal.table:
                    self._journal.emit(events.ItemsHandled, name=job, queue=self.name, **counts)


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

    At the end it waits until its workers are gone, and then until everything is stored, at most until the moment (of Trio's
    clock) that `patience` gives.
    """
    desk = Desk(engine, owner, journal, now, spread)
    async with trio.open_nursery() as nursery:
        tasks = (desk.claim_for_all, desk.store_endings, desk.tell, desk.stock.give_back_unused)
        for task in (*tasks, *([desk.leases.renew] if engine.shared else ())):
            nursery.start_soon(task, name=f"queue {engine.name}: {task.__name__}")
        yield desk
        await desk.settle(patience)
        desk.tell_counts()
        desk.reports.tell_rest()
        nursery.cancel_scope.cancel(reason="the desk is closed")
