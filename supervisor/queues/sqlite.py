"""The default engine: queues in one SQLite file, `queues.db` in the state directory. What was put outlives a power cut.

    open           a queue in the file, which all sqlite queues of a daemon share
    SqliteQueue    the engine: asks the store's thread, and wakes those who wait; `sqlite_rows.py` and its like are asked

One process has the file, and nobody else may open it: so a claim needs no lease. What a daemon that died had claimed waits
again when the next one opens the queue.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import trio

from supervisor.queues import Place, sqlite_claim, sqlite_finish, sqlite_people, sqlite_put
from supervisor.queues.protocol import (
    BadItem,
    Claimed,
    Counts,
    Demand,
    Draft,
    Ending,
    Engine,
    Item,
    Notice,
    QueueUnavailable,
    Receipt,
    Record,
    Settings,
    State,
)
from supervisor.queues.sqlite_claim import Taken
from supervisor.queues.sqlite_put import Plan
from supervisor.queues.sqlite_rows import DIGITS, Rows
from supervisor.queues.sqlite_schema import SCHEMA
from supervisor.store import Store, StoreError, open_store

if TYPE_CHECKING:
    from sqlite3 import Connection

T = TypeVar("T")

FILE = "queues.db"

LARGEST = 256 << 20
"""Bytes of a payload, or of a result. SQLite takes up to 1 GB, and then nothing else would be done for a while."""

PAUSE = 1.0
"""Seconds until those who wait look again after the file could not be used."""


@asynccontextmanager
async def open(name: str, settings: Settings, place: Place) -> AsyncIterator[Engine]:
    """A queue in the file of `place`; nothing is opened before it is used."""
    async with _shared(place) as store:
        yield SqliteQueue(name, settings, place, store)


@dataclass
class _File:
    store: Store
    closing: AsyncExitStack
    users: int = 0


_FILES = trio.lowlevel.RunVar[dict[Path, _File]]("files of queues")
"""By path: a process may open a file once, since closing it again would drop the locks of the first."""


@asynccontextmanager
async def _shared(place: Place) -> AsyncIterator[Store]:
    """The store of the queues in a directory; the last who leaves closes it."""
    try:
        files = _FILES.get()
    except LookupError:
        _FILES.set(files := {})
    path = place.directory.absolute() / FILE
    if path not in files:
        closing = AsyncExitStack()
        store = open_store(path, SCHEMA, exclusive=True, on_failure=lambda error: place.warn(str(error)))
        files[path] = _File(await closing.enter_async_context(store), closing)
    file = files[path]
    file.users += 1
    try:
        yield file.store
    finally:
        file.users -= 1
        if not file.users:
            del files[path]
            await file.closing.aclose()


class SqliteQueue:
    """A queue in a file. See `Engine`."""

    durable = True
    shared = False

    def __init__(self, name: str, settings: Settings, place: Place, store: Store) -> None:
        self.name = name
        self.settings = settings
        self._place = place
        self._store = store
        self._begun = False
        self._beginning = trio.Lock()
        self._waiting: dict[_Hand, None] = {}
        self._news = 0
        """Raised whenever a claim may bring more than it would have before."""
        self._outlook: tuple[int, float | None] | None = None
        """When another claim may bring something by itself, as the last one told: true as long as there are no more news."""
        self._expired = 0
        """How many have made room for others, since the last claim."""
        self._room = trio.Event()
        self._away_until = -1.0

    def use(self, settings: Settings) -> None:
        if self._begun and settings.spec.per_key != self.settings.spec.per_key:
            self._store.post(self._in_thread(Rows.unpark_all))
        self.settings = settings
        self._wake(work=True, room=True)

    async def declare(self, settings: Settings) -> None:
        self.use(settings)
        await self._write(sqlite_people.declare)

    async def declared(self) -> Settings | None:
        return await self._read(sqlite_people.declared)

    # -- producers

    async def put(self, drafts: Sequence[Draft]) -> list[Receipt]:
        for draft in drafts:
            if fault := _fault(draft.payload) or _fault_of_words(draft):
                raise BadItem(f"queue {self.name}: item {draft.id!r} {fault}")
        with self._next_hand() as hand:
            news = self._news
            plan, taken = await self._write(lambda rows: _put_and_claim(rows, drafts, hand.demand))
            self._wake(work=bool(plan.drafts))
            self._expired += len(plan.expired)
            if taken is not None:
                hand.claimed = self._claimed(taken, news + bool(plan.drafts))
        self._tell_ended(plan.told)
        return plan.receipts

    async def wait_for_room(self) -> None:
        room = self._room
        due = await self._read_when_there(sqlite_put.room_at)
        with trio.move_on_after(self._until(due)):
            await room.wait()

    # -- workers

    async def claim(self, limit: int, *, owner: str, attempts: int, order: Sequence[int] = ()) -> Claimed:
        demand, news = Demand(limit=limit, owner=owner, attempts=attempts, order=order), self._news
        taken = await self._write(lambda rows: sqlite_claim.claim(rows, demand))
        return self._claimed(taken, news)

    def _claimed(self, taken: Taken, news: int) -> Claimed:
        """What was taken; so much was known when it was asked for."""
        self._outlook = (news, taken.due) if taken.drained else None
        claimed = Claimed(items=taken.items, dead=taken.dead, expired=taken.expired + self._expired)
        self._expired = 0
        self._wake(room=bool(claimed.items or claimed.dead or claimed.expired))
        self._tell_ended(taken.told)
        return claimed

    async def wait_for_work(self, demand: Callable[[], Demand | None] | None = None) -> Claimed | None:
        news, due = self._outlook or (-1, None)
        if news != self._news:
            news, due = self._news, await self._read_when_there(sqlite_claim.due)
        hand = _Hand(demand)
        if news == self._news:
            self._waiting[hand] = None
            try:
                with trio.move_on_after(self._until(due)):
                    await hand.wait()
            finally:
                self._waiting.pop(hand, None)
        return hand.claimed

    @contextmanager
    def _next_hand(self) -> Iterator[_Hand]:
        """Somebody who waits and would claim something now; who it is, is told how that went."""
        hand = next((hand for hand in self._waiting if hand.is_free()), None) or _Hand(None)
        self._waiting.pop(hand, None)
        try:
            yield hand
        finally:
            hand.wake()

    async def renew(self, items: Sequence[Item]) -> list[bool]:
        held = {(each.id, each.token) for each in await self._read(lambda rows: sqlite_finish.held(rows, items))}
        return [(item.id, item.token) in held for item in items]

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        storable = [_storable(ending) for ending in endings]
        done = await self._write(lambda rows: sqlite_finish.finish(rows, storable))
        limited = self.settings.spec.concurrency is not None or self.settings.group_by is not None
        self._wake(work=bool(done.retried or done.back or (limited and any(done.answers))))
        self._tell_ended(done.told)
        return done.answers

    async def progress(self, item: Item, done: float, total: float | None) -> None:
        await self._write(lambda rows: sqlite_finish.progress(rows, item, done, total))

    # -- people

    async def cancel(self, id: str) -> Literal["cancelled", "running", "ended", "unknown"]:
        found, told = await self._write(lambda rows: sqlite_people.cancel(rows, id))
        self._wake(room=found == "cancelled")
        self._tell_ended([id] if told else [])
        if found == "running":
            self._place.listen(Notice(what="cancel", id=id))
        return found

    async def requeue(self, ids: Sequence[str] | None = None) -> int:
        again = 0
        if ids is not None:
            again = await self._write(lambda rows: sqlite_people.requeue(rows, ids))
        else:
            before = self._now()
            while some := await self._write(lambda rows: sqlite_people.requeue_some(rows, before)):
                again += some
        self._wake(work=again > 0)
        return again

    async def purge(self, state: State) -> int:
        if state is State.RUNNING:
            raise ValueError("what runs cannot be purged: cancel it")
        purged, before = 0, self._now()
        while some := await self._write(lambda rows: sqlite_people.purge_some(rows, state, before)):
            purged += len(some)
            self._wake(room=state is State.WAITING)
            self._tell_ended(each.id for each in some if each.keep and state is State.WAITING)
        return purged

    async def pause(self, paused: bool) -> None:
        await self._write(lambda rows: sqlite_people.pause(rows, paused))
        self._wake(work=not paused)
        self._place.listen(Notice(what="paused" if paused else "resumed"))

    async def counts(self) -> Counts:
        return await self._read(sqlite_people.counts)

    async def peek(self, state: State, limit: int) -> list[Record]:
        return await self._read(lambda rows: sqlite_people.peek(rows, state, limit))

    async def show(self, id: str, *, keep: bool = False) -> Record | None:
        ask = self._write if keep else self._read
        return await ask(lambda rows: sqlite_people.show(rows, id, keep=keep))

    # -- asking the store

    async def _write(self, operation: Callable[[Rows], T]) -> T:
        return await self._ask(self._store.write, operation)

    async def _read(self, operation: Callable[[Rows], T]) -> T:
        return await self._ask(self._store.read, operation)

    async def _ask(self, ask: Callable[[Callable[[Connection], T]], Awaitable[T]], operation: Callable[[Rows], T]) -> T:
        try:
            if not self._begun:
                await self._begin()
            return await ask(self._in_thread(operation))
        except StoreError as error:
            self._away_until = trio.current_time() + PAUSE
            self._outlook = None
            raise QueueUnavailable(f"queue {self.name}: {error}") from error

    async def _begin(self) -> None:
        """What the daemon before this one had claimed is given back, before anything else is done."""
        async with self._beginning:
            if not self._begun:
                await self._store.write(self._in_thread(sqlite_people.begin))
                self._begun = True

    def _in_thread(self, operation: Callable[[Rows], T]) -> Callable[[Connection], T]:
        settings, now = self.settings, self._now()

        def do(db: Connection) -> T:
            rows = Rows(db, self.name, settings, now)
            result = operation(rows)
            rows.close()
            return result

        return do

    def _now(self) -> float:
        return round(self._place.now(), DIGITS)

    async def _read_when_there(self, operation: Callable[[Rows], T]) -> T:
        """Read, when the file is likely to be of use: a disk that is full, or gone, tells nobody when it is not any more."""
        while True:
            if trio.current_time() < self._away_until:
                await trio.sleep_until(self._away_until)
            try:
                return await self._read(operation)
            except QueueUnavailable:
                pass

    def _until(self, due: float | None) -> float:
        """Seconds until this moment of the wall clock; None: never."""
        return math.inf if due is None else max(due - self._place.now(), 0.0)

    def _wake(self, *, work: bool = False, room: bool = False) -> None:
        """Those who wait for it look again."""
        if work:
            self._news += 1
            for hand in list(self._waiting):
                hand.wake()
            self._waiting.clear()
        if room:
            self._room.set()
            self._room = trio.Event()

    def _tell_ended(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._place.listen(Notice(what="ended", id=id))


class _Hand:
    """Somebody who waits for work. A put may claim for it what it brings."""

    def __init__(self, ask: Callable[[], Demand | None] | None) -> None:
        self._ask = ask
        self._task: trio.lowlevel.Task | None = None
        self.demand: Demand | None = None
        """What is being claimed for it."""
        self.claimed: Claimed | None = None

    def is_free(self) -> bool:
        """Whether it would claim something; then that is to be done, and it is woken."""
        if self._ask is not None and self._task is not None:
            self.demand = self._ask()
        return self.demand is not None

    async def wait(self) -> None:
        """Wait until it is woken. Where something is claimed for it, a cancellation comes too late."""

        def give_up(_: object) -> trio.lowlevel.Abort:
            if self.demand is not None:
                return trio.lowlevel.Abort.FAILED
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(give_up)

    def wake(self) -> None:
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None


def _put_and_claim(rows: Rows, drafts: Sequence[Draft], demand: Demand | None) -> tuple[Plan, Taken | None]:
    plan = sqlite_put.put(rows, drafts)
    return plan, None if demand is None else sqlite_claim.claim(rows, demand)


def _storable(ending: Ending) -> Ending:
    """A result that cannot be stored is a failure: tried again and again, it would keep all others from being stored."""
    if ending.result is None or not (fault := _fault(ending.result)):
        return ending
    return Ending(id=ending.id, token=ending.token, how="dead", error=f"its result {fault}")


def _fault(json: bytes) -> str:
    """What is wrong with it, for SQLite; empty where nothing is."""
    if len(json) > LARGEST:
        return f"has {len(json)} bytes, and {LARGEST} is the most"
    return "" if json.isascii() and b"\0" not in json else _fault_of_text(json)


def _fault_of_words(draft: Draft) -> str:
    if draft.id.isalnum() and draft.key is None and draft.group is None:
        return ""
    return _fault_of_text(f"{draft.id}{draft.key}{draft.group}".encode(errors="surrogatepass"))


def _fault_of_text(text: bytes) -> str:
    try:
        return "has a NUL character" if "\0" in text.decode() else ""
    except UnicodeDecodeError:
        return "is not UTF-8"
