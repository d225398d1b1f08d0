"""The default engine: queues in one SQLite file, `queues.db` in the state directory. What was put outlives a power cut.

    open           a queue in the file, which all sqlite queues of a daemon share
    SqliteQueue    the engine: asks the store's thread, and wakes those who wait
    _Rows          a queue's rows within one transaction, in that thread

One process has the file, and nobody else may open it: so a claim needs no lease. What a daemon that died had claimed waits
again when the next one opens the queue.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec
import trio

from supervisor.policies.rate import ROUNDING
from supervisor.queues import Place
from supervisor.queues.protocol import (
    BadItem,
    Claimed,
    Counts,
    Draft,
    Ending,
    Item,
    Notice,
    QueueFull,
    QueueUnavailable,
    Receipt,
    Record,
    Settings,
    State,
)
from supervisor.queues.sql import (
    SCHEMA,
    Candidate,
    Choice,
    Dialect,
    Finish,
    Held,
    Plan,
    Statements,
    Taken,
    bucket,
    packed,
    plan_finish,
    plan_put,
    record,
)
from supervisor.store import Store, StoreError, open_store

if TYPE_CHECKING:
    from sqlite3 import Connection, Cursor

T = TypeVar("T")
R = TypeVar("R")

FILE = "queues.db"

LARGEST = 256 << 20
"""Bytes of payloads in one put, or of one result: SQLite takes no statement above 1 GB, and quoted they grow."""

SOME = 1000
"""Rows that are removed, or changed for an operator, in one go: those behind them wait."""

PAUSE = 1.0
"""Seconds until those who wait look again after the file could not be used."""

DIGITS = 5
"""Of a moment, behind the point: SQLite writes 15 digits of a number into JSON."""

_DIALECT = Dialect(
    items="items",
    serial="INTEGER PRIMARY KEY",
    now=":now",
    array="json_each(:rows)",
    cell=lambda at, type: f"CAST(json_extract(value, '$[{at}]') AS {'BLOB' if type == 'json' else type})",
    size="length(payload)",
)
_SQL = Statements(_DIALECT)

_INSERT_PLAIN = (
    "INSERT INTO items (queue, id, payload, priority, put_at, ready_at)"
    f" SELECT :queue, id, payload, priority, :now, :now FROM {_DIALECT.rows(Plan.PLAIN)}"
)
"""Most drafts ask for nothing special: that is half the work."""

_QUEUES = """
    CREATE TABLE queues (
        queue TEXT PRIMARY KEY,
        waiting INTEGER NOT NULL DEFAULT 0,
        paused INTEGER NOT NULL DEFAULT 0,
        full_at DOUBLE PRECISION NOT NULL DEFAULT 0
    ) WITHOUT ROWID
"""
"""What is true of a queue: how many items wait, so that nobody counts them; when its `rate` has all its tokens."""

VERSIONS = (";".join((*map(_DIALECT.say, SCHEMA), _QUEUES)),)
"""The versions of the file."""


@asynccontextmanager
async def open(name: str, settings: Settings, place: Place) -> AsyncIterator[SqliteQueue]:
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
        store = open_store(path, VERSIONS, exclusive=True, on_failure=lambda error: place.warn(str(error)))
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
        self._declared: Settings | None = None
        self._begun = False
        self._beginning = trio.Lock()
        self._work = trio.Event()
        self._room = trio.Event()
        self._away_until = -1.0

    async def declare(self, settings: Settings) -> None:
        await trio.lowlevel.checkpoint()
        self.settings = self._declared = settings
        self._wake(work=True, room=True)

    async def declared(self) -> Settings | None:
        await trio.lowlevel.checkpoint()
        return self._declared

    # -- producers

    async def put(self, drafts: Sequence[Draft]) -> list[Receipt]:
        size = sum(len(draft.payload) for draft in drafts)
        if size > LARGEST:
            raise BadItem(f"queue {self.name}: {size} bytes at once, and {LARGEST} is the most: put them one by one")
        plan = await self._write(lambda rows: rows.put(drafts))
        self._wake(work=bool(plan.drafts))
        self._tell_ended(plan.gone)
        return plan.receipts

    async def wait_for_room(self) -> None:
        room = self._room
        await self._wait_while_away()
        if await self._read(_Rows.is_full):
            await room.wait()

    # -- workers

    async def claim(self, limit: int, *, owner: str, attempts: int, order: Sequence[int] = ()) -> Claimed:
        claim = await self._write(lambda rows: rows.claim(limit, owner, attempts, order))
        self._wake(room=bool(claim.taken or claim.dead or claim.expired))
        self._tell_ended(claim.expired)
        self._tell_ended(dead.id for dead in claim.dead)
        return Claimed(items=claim.taken, dead=claim.dead, expired=len(claim.expired))

    async def wait_for_work(self) -> None:
        work = self._work
        await self._wait_while_away()
        due = await self._read(_Rows.due)
        with trio.move_on_after(math.inf if due is None else max(due - self._place.now(), 0.0)):
            await work.wait()

    async def renew(self, items: Sequence[Item]) -> list[bool]:
        held = {(each.id, each.token) for each in await self._read(lambda rows: rows.held(items))}
        return [(item.id, item.token) in held for item in items]

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        fitting = [_fitting(ending) for ending in endings]
        done = await self._write(lambda rows: rows.finish(fitting))
        limited = self.settings.spec.concurrency is not None or self.settings.group_by is not None
        self._wake(work=bool(done.retried or done.back or (limited and done.over)))
        self._tell_ended(done.over)
        return done.answers

    async def progress(self, item: Item, done: float, total: float | None) -> None:
        await self._write(lambda rows: rows.do(_SQL.progress, id=item.id, token=item.token, done=done, total=total))

    # -- people

    async def cancel(self, id: str) -> Literal["cancelled", "running", "ended", "unknown"]:
        found = await self._write(lambda rows: rows.cancel(id))
        self._wake(room=found == "cancelled")
        if found == "running":
            self._place.listen(Notice(what="cancel", id=id))
        elif found == "cancelled":
            self._tell_ended([id])
        return found

    async def requeue(self, ids: Sequence[str] | None = None) -> int:
        if ids is not None:
            again = await self._write(lambda rows: rows.requeue(ids))
        else:
            again = 0
            while some := await self._write(_Rows.requeue_some):
                again += some
        self._wake(work=again > 0)
        return again

    async def purge(self, state: State) -> int:
        if state is State.RUNNING:
            raise ValueError("what runs cannot be purged")
        purged = 0
        while some := await self._write(lambda rows: rows.purge(state)):
            purged += len(some)
            self._wake(room=state is State.WAITING)
            self._tell_ended(some if state is State.WAITING else ())
        return purged

    async def pause(self, paused: bool) -> None:
        await self._write(lambda rows: rows.pause(paused))
        self._wake(work=not paused)
        self._place.listen(Notice(what="paused" if paused else "resumed"))

    async def counts(self) -> Counts:
        return await self._read(_Rows.counts)

    async def peek(self, state: State, limit: int) -> list[Record]:
        return await self._read(lambda rows: rows.records(_SQL.peek[state], limit=limit))

    async def show(self, id: str) -> Record | None:
        found = await self._read(lambda rows: rows.records(_SQL.show, id=id))
        return found[0] if found else None

    # -- asking the store

    async def _write(self, operation: Callable[[_Rows], T]) -> T:
        return await self._ask(self._store.write, operation)

    async def _read(self, operation: Callable[[_Rows], T]) -> T:
        return await self._ask(self._store.read, operation)

    async def _ask(self, ask: Callable[[Callable[[Connection], T]], Awaitable[T]], operation: Callable[[_Rows], T]) -> T:
        try:
            if not self._begun:
                await self._begin()
            return await ask(self._in_thread(operation))
        except StoreError as error:
            self._away_until = trio.current_time() + PAUSE
            raise QueueUnavailable(f"queue {self.name}: {error}") from error

    async def _begin(self) -> None:
        """What the daemon before this one had claimed is given back, before anything else is done."""
        async with self._beginning:
            if not self._begun:
                await self._store.write(self._in_thread(_Rows.begin))
                self._begun = True

    def _in_thread(self, operation: Callable[[_Rows], T]) -> Callable[[Connection], T]:
        settings, now = self.settings, round(self._place.now(), DIGITS)
        return lambda db: operation(_Rows(db, self.name, settings, now))

    async def _wait_while_away(self) -> None:
        """A disk that is full, or gone, tells nobody when it is not any more."""
        if trio.current_time() < self._away_until:
            await trio.sleep_until(self._away_until)

    def _wake(self, *, work: bool = False, room: bool = False) -> None:
        """Those who wait for it look again."""
        if work:
            self._work.set()
            self._work = trio.Event()
        if room:
            self._room.set()
            self._room = trio.Event()

    def _tell_ended(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._place.listen(Notice(what="ended", id=id))


def _fitting(ending: Ending) -> Ending:
    """What cannot be stored has failed."""
    if len(ending.result or b"") <= LARGEST:
        return ending
    error = f"its result has {len(ending.result or b'')} bytes, and {LARGEST} is the most"
    return Ending(id=ending.id, token=ending.token, how="dead", error=error)


# -- in the store's thread ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Claim:
    taken: list[Item] = field(default_factory=list)
    dead: list[Record] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)

    @property
    def over(self) -> int:
        """By how many fewer wait."""
        return len(self.taken) + len(self.dead) + len(self.expired)


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """What a claim must know of the queue first."""

    paused: int
    full_at: float
    running: int


_HEAD = (
    "SELECT coalesce((SELECT paused FROM queues WHERE queue = :queue), 0),"
    f" coalesce((SELECT full_at FROM queues WHERE queue = :queue), 0.0), ({_SQL.running})"
)


class _Rows:
    """A queue's rows within one transaction. Everything is as it was if an operation raises.

    A statement is one step wherever there may be many rows: for each step SQLite lets go of the interpreter, and a busy loop
    keeps it for milliseconds. So rows go in and come out as one JSON text.
    """

    def __init__(self, db: Connection, queue: str, settings: Settings, now: float) -> None:
        self._db = db
        self._queue = queue
        self._settings = settings
        self._now = now

    def do(self, statement: str, **parameters: object) -> int:
        """Execute it; gives how many rows it changed."""
        return self._execute(statement, parameters).rowcount

    def _execute(self, statement: str, parameters: dict[str, object]) -> Cursor:
        return self._db.execute(statement, {"queue": self._queue, "now": self._now} | parameters)

    def _find(self, statement: str, row: type[R], columns: int, **parameters: object) -> list[R]:
        """All rows that it finds, in one step."""
        names = ", ".join(f"c{number}" for number in range(columns))
        packing = f"WITH found ({names}) AS ({statement}) SELECT json_group_array(json_array({names})) FROM found"
        (text,) = self._execute(packing, parameters).fetchone()
        return msgspec.json.decode(text, type=list[row])  # type: ignore[valid-type]

    def records(self, statement: str, **parameters: object) -> list[Record]:
        return [record(row) for row in self._execute(statement, parameters)]

    def _waiting(self, more: int) -> None:
        """So many more wait than before."""
        if more:
            self.do(
                "INSERT INTO queues (queue, waiting) VALUES (:queue, :more)"
                " ON CONFLICT (queue) DO UPDATE SET waiting = waiting + :more",
                more=more,
            )

    def begin(self) -> None:
        """What is claimed was claimed by a daemon that is no more."""
        self.do(_SQL.interrupt_cancelled, keep=self._keep)
        self.do(_SQL.interrupt)
        self.do(
            "INSERT INTO queues (queue, waiting)"
            " SELECT :queue, count(*) FROM items WHERE queue = :queue AND state = 'waiting'"
            " ON CONFLICT (queue) DO UPDATE SET waiting = excluded.waiting"
        )

    @property
    def _keep(self) -> float:
        return self._settings.spec.keep_results

    # -- put

    def put(self, drafts: Sequence[Draft]) -> Plan:
        plan = plan_put(drafts, self._known(drafts), self._holders(drafts), self._settings)
        if plan.grows > 0:
            self._make_sure_of_room(plan.grows)
        if plan.gone:
            self.do(_SQL.remove, rows=packed((id,) for id in plan.gone))
        if plan.is_plain:
            self.do(_INSERT_PLAIN, rows=packed(plan.plain_rows()))
        else:
            self.do(_SQL.insert, rows=packed(plan.rows(self._settings)))
        self._waiting(plan.grows)
        self._forget()
        return plan

    def _known(self, drafts: Sequence[Draft]) -> set[str]:
        found = self._find(_SQL.known, tuple[str], 1, rows=packed((draft.id,) for draft in drafts))
        return {id for (id,) in found}

    def _holders(self, drafts: Sequence[Draft]) -> dict[str, tuple[str, str]]:
        keys = {draft.key for draft in drafts if draft.key is not None}
        if not keys:
            return {}
        rows = packed((key,) for key in keys)
        self.do(_SQL.release, rows=rows)
        return {key: (id, state) for key, id, state in self._find(_SQL.holders, tuple[str, str, str], 3, rows=rows)}

    def _make_sure_of_room(self, more: int) -> None:
        size, waiting = self._settings.spec.size, self._count()
        if more > size:
            raise QueueFull(f"queue {self._queue} takes {size} items in all, and these are {more}: put fewer at once")
        if waiting + more > size:
            raise QueueFull(f"queue {self._queue} is full: {waiting} of {size} items wait, and there is no room for {more}")

    def _count(self) -> int:
        """How many items wait."""
        found = self._execute("SELECT waiting FROM queues WHERE queue = :queue", {}).fetchone()
        return found[0] if found else 0

    def is_full(self) -> bool:
        return self._count() >= self._settings.spec.size

    def _forget(self) -> None:
        self.do(_SQL.forget, limit=SOME)

    # -- claim

    def claim(self, limit: int, owner: str, attempts: int, order: Sequence[int]) -> _Claim:
        claim = _Claim(expired=self._expire())
        head = self._head()
        choice = Choice(
            limit=min(limit, self._allowed(head)), attempts=attempts, per_key=self._settings.spec.per_key,
            groups=self._groups(),
        )  # fmt: skip
        if choice.limit > 0:
            waiting = [priority for priority, _, _ in self._levels()]
            for priority in sorted(waiting, key=partial(_place_in, order)):
                self._claim_from(priority, choice, claim, owner)
        self._spend(head, len(claim.taken))
        self._waiting(-claim.over)
        return claim

    def _expire(self) -> list[str]:
        found = self._find(_SQL.expiring, tuple[int, str], 2, limit=SOME)
        if found:
            self.do(_SQL.expire, rows=packed((seq,) for seq, _ in found), keep=self._keep)
        return [id for _, id in found]

    def _head(self) -> _Head:
        return _Head(*self._execute(_HEAD, {}).fetchone())

    def _allowed(self, head: _Head) -> int:
        """How many may be claimed, whatever waits."""
        spec, allowed = self._settings.spec, 0 if head.paused else sys.maxsize
        if spec.concurrency is not None:
            allowed = min(allowed, spec.concurrency - head.running)
        if spec.rate is not None:
            allowed = min(allowed, int(bucket(spec.rate, head.full_at, self._now).tokens(self._now) + ROUNDING))
        return max(allowed, 0)

    def _spend(self, head: _Head, count: int) -> None:
        """Take tokens of the `rate`, which are there."""
        if self._settings.spec.rate is not None and count:
            tokens = bucket(self._settings.spec.rate, head.full_at, self._now)
            for _ in range(count):
                tokens.take(self._now)
            self.do(
                "INSERT INTO queues (queue, full_at) VALUES (:queue, :full_at)"
                " ON CONFLICT (queue) DO UPDATE SET full_at = :full_at",
                full_at=tokens.full_at,
            )

    def _groups(self) -> Counter[str]:
        return Counter(dict(self._find(_SQL.groups, tuple[str, int], 2)))

    def _levels(self) -> list[tuple[int, float, float | None]]:
        return self._execute(_SQL.levels, {}).fetchall()

    def _claim_from(self, priority: int, choice: Choice, claim: _Claim, owner: str) -> None:
        """Claim of one priority: page by page, since of each some may be dead, or of a group that is full."""
        while page := min(choice.limit, SOME):
            found = self._candidates(priority, choice.full, page)
            run, dead = choice.choose(found)
            claim.taken += self._run(run, owner)
            claim.dead += self._bury(dead)
            if len(found) < page:
                break

    def _candidates(self, priority: int, full: list[str], limit: int) -> list[Candidate]:
        rows = packed((group,) for group in full)
        return self._find(_SQL.candidates, Candidate, 4, priority=priority, rows=rows, limit=limit)

    def _run(self, seqs: list[int], owner: str) -> list[Item]:
        if not seqs:
            return []
        unique = self._settings.spec.unique
        queued = int(unique is not None and unique.lifetime == "queued")
        rows = packed((seq,) for seq in seqs)
        self.do(_SQL.claim, rows=rows, owner=owner, queued=queued, lease=None)
        found = {each.seq: each.item() for each in self._find(_SQL.claimed, Taken, 9, rows=rows)}
        return [found[seq] for seq in seqs]

    def _bury(self, seqs: list[int]) -> list[Record]:
        if not seqs:
            return []
        rows = packed((seq,) for seq in seqs)
        self.do(_SQL.bury, rows=rows)
        return self.records(_SQL.buried, rows=rows)

    def due(self) -> float | None:
        """When a claim may bring something, if nothing else happens."""
        (expiring,) = self._execute(_EXPIRING, {}).fetchone()
        ready = self._ready()
        moments = [moment for moment in (expiring, ready) if moment is not None]
        return min(moments, default=None)

    def _ready(self) -> float | None:
        """When the next item may be claimed. One whose group is full waits for an end, not for a moment."""
        head, spec = self._head(), self._settings.spec
        if head.paused or (spec.concurrency is not None and head.running >= spec.concurrency):
            return None
        full = [group for group, running in self._groups().items() if running >= spec.per_key]
        moments = []
        for priority, first, next_one in self._levels():
            if first <= self._now and self._candidates(priority, full, 1):
                moments.append(first)
            elif (later := first if first > self._now else next_one) is not None:
                moments.append(later)
        if not moments:
            return None
        token = bucket(spec.rate, head.full_at, self._now).due if spec.rate is not None else 0.0
        return max(min(moments), token)

    # -- finish

    def held(self, items: Sequence[Item | Ending]) -> list[Held]:
        return self._find(_SQL.held, Held, 8, rows=packed((item.id, item.token) for item in items))

    def finish(self, endings: Sequence[Ending]) -> Finish:
        done = plan_finish(endings, self.held(endings), self._settings)
        changes = (_SQL.drop, done.dropped), (_SQL.end, done.ended), (_SQL.retry, done.retried), (_SQL.back, done.back)
        for statement, rows in changes:
            if rows:
                self.do(statement, rows=packed(rows))
        self._waiting(len(done.retried) + len(done.back))
        self._forget()
        return done

    # -- people

    def cancel(self, id: str) -> Literal["cancelled", "running", "ended", "unknown"]:
        if self.do(_SQL.cancel_waiting, id=id, keep=self._keep):
            self._waiting(-1)
            return "cancelled"
        if self.do(_SQL.cancel_running, id=id):
            return "running"
        return "ended" if self.records(_SQL.show, id=id) else "unknown"

    def requeue(self, ids: Sequence[str]) -> int:
        again = self.do(_SQL.requeue, rows=packed((id,) for id in ids))
        self._waiting(again)
        return again

    def requeue_some(self) -> int:
        return self.requeue([id for _, id in self._some(State.DEAD)])

    def purge(self, state: State) -> list[str]:
        found = self._some(state)
        self.do(_SQL.drop, rows=packed((seq,) for seq, _ in found))
        self._waiting(-len(found) if state is State.WAITING else 0)
        return [id for _, id in found]

    def _some(self, state: State) -> list[tuple[int, str]]:
        return self._find(_SQL.some[state], tuple[int, str], 2, limit=SOME)

    def pause(self, paused: bool) -> None:
        self.do(
            "INSERT INTO queues (queue, paused) VALUES (:queue, :paused) ON CONFLICT (queue) DO UPDATE SET paused = :paused",
            paused=int(paused),
        )

    def counts(self) -> Counts:
        found = dict(self._execute(_SQL.counts, {}).fetchall())
        (delayed,) = self._execute(_SQL.delayed, {}).fetchone()
        first = min((first for _, first, _ in self._levels()), default=math.inf)
        found["waiting"] -= delayed
        return Counts(
            **found, delayed=delayed, oldest=self._now - first if first <= self._now else None, paused=bool(self._head().paused)
        )


_EXPIRING = "SELECT min(expires_at) FROM items WHERE queue = :queue AND state = 'waiting' AND expires_at IS NOT NULL"


def _place_in(order: Sequence[int], priority: int) -> tuple[int, int]:
    """Where a priority comes: those in `order` as they stand there, then the others."""
    return (order.index(priority) if priority in order else len(order), priority)
