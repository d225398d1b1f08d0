"""Queues in a PostgreSQL, which many daemons on many hosts share, and applications put into within their own transactions.

    open              a queue; the tables are made by whoever comes first
    schema            what makes the tables, for an administrator
    PostgresQueue     the Engine: each operation is the call of a function in the database

What is done is in `postgres.sql`, as functions of the database: an operation is one round trip, its locks end with it, and what
an application puts by SQL (`supervisor.put`) obeys the same rules. So its statements are not SQLite's, whose database is in
the process; rows for people are shared (`sql.py`). The connection is `postgres_session.py`'s.

Leases and all moments go by the server's clock. What others do is heard by LISTEN; what may have been missed while there was no
connection is looked at when there is one again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import psycopg
import trio

from supervisor.queues import Place
from supervisor.queues.lookout import Lookout
from supervisor.queues.postgres_session import LARGE, Operation, Rows, Session, Statement, parameters
from supervisor.queues.protocol import (
    Claimed,
    Counts,
    Demand,
    Draft,
    Ending,
    Engine,
    Item,
    Notice,
    QueueError,
    QueueFull,
    QueueUnavailable,
    Receipt,
    Record,
    Settings,
    State,
    packed,
    unpacked,
)
from supervisor.queues.sql import COLUMNS, NO_ATTEMPT_LEFT, WORKER_LOST, record

VERSION = 1

MANY = 1000
"""Items that a command for people changes in one transaction."""

_MIGRATION = 0x73757065727669  # a number of our own among the advisory locks of the database


@asynccontextmanager
async def open(name: str, settings: Settings, place: Place) -> AsyncIterator[Engine]:
    """A queue of this name in the database whose URL `settings` has as `backend`. Nothing is connected yet."""
    queue = PostgresQueue(name, settings, place.listen)
    try:
        yield queue
    finally:
        await queue.close()


def refusal(backend: str) -> str:
    """Why this URL is of no use; empty where it is."""
    try:
        parameters(backend)
    except QueueError as error:
        return str(error)
    return ""


def schema() -> str:
    """The SQL that makes what queues need in a database, where the users of daemons may not: for an administrator."""
    return Path(__file__).with_name("postgres.sql").read_text()


class PostgresQueue:
    """A queue in a PostgreSQL. See `Engine` for what its methods promise."""

    durable = True
    shared = True

    def __init__(self, name: str, settings: Settings, listen: Callable[[Notice], None]) -> None:
        self.name = name
        self._settings = settings
        self._listen = listen
        self._session = Session(settings.spec.backend, prepare=self._prepare, heard=self._heard, connected=self._look_again)
        self._held: dict[str, int] = {}
        """The token of each item that was claimed here and is not known to be over."""
        self._work = Lookout[Operation](Operation.abandon)
        self._looked = False
        """Whether it is known when a claim may bring something: since the last claim, nobody was woken yet."""
        self._room = trio.Event()
        self._refused = 1
        """How many drafts did not fit last time."""

    @property
    def settings(self) -> Settings:
        return self._settings

    async def close(self) -> None:
        """Disconnect, after what was asked for is done."""
        await self._session.close()

    def use(self, settings: Settings) -> None:
        self._settings = settings

    async def declare(self, settings: Settings) -> None:
        self.use(settings)
        await self._do("declare(%s, %s, true)", packed(settings))

    async def declared(self) -> Settings | None:
        found = await self._ask("SELECT settings::text FROM supervisor.queues WHERE name = %s AND declared")
        with self._session.reading():
            return unpacked(found[0][0], self._settings.spec.backend) if found else None

    # ---- producers ----

    async def put(self, drafts: Sequence[Draft]) -> list[Receipt]:
        if not drafts:
            await trio.lowlevel.checkpoint()
            return []
        rows = [
            (d.id, d.payload.decode(), d.priority, d.delay, d.at, d.expire, d.key, d.group, d.keep) for d in drafts
        ]  # fmt: skip
        await trio.lowlevel.checkpoint_if_cancelled()
        values = (self.name, *map(list, zip(*rows, strict=True)))
        along = self._work.claim_along(self._operation) if self._unlimited else None
        size = sum(len(draft.payload) for draft in drafts)
        put = Operation([Statement(_PUT, values)], size=size) if along is None else self._together(values, size, along)
        self._session.send(put)
        (found,) = await self._session.result(put)
        with self._session.reading():
            if found[0][0] == "full":
                self._refused = len(drafts)
                raise QueueFull(f"queue {self.name} is full")
            return [Receipt(what=what, id=id) for what, id in found]

    async def wait_for_room(self) -> None:
        needed = self._refused
        while True:
            self._room = room = self._room if not self._room.is_set() else trio.Event()
            longest: float | None = _AGAIN
            with suppress(QueueUnavailable):
                longest = await self._do("want_room(%s, %s)", needed)
            if longest == 0:
                return
            with trio.move_on_after(math.inf if longest is None else longest):
                await room.wait()

    # ---- workers ----

    async def claim(self, limit: int, *, owner: str, attempts: int, order: Sequence[int] = ()) -> Claimed:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._work.clear()
        claim = self._operation(Demand(limit=limit, owner=owner, attempts=attempts, order=order))
        self._session.send(claim)
        return await self._brought_by(claim)

    def _operation(self, demand: Demand) -> Operation:
        """A claim that is still to be made."""
        self._looked = True
        values = (
            self.name, demand.limit, demand.owner, demand.attempts, list(demand.order), WORKER_LOST, NO_ATTEMPT_LEFT,
        )  # fmt: skip
        return Operation(
            [Statement(f"SELECT {_BROUGHT} FROM {_CLAIM}", values)], heed=self._hold, late=self._give_back, sees="work"
        )

    async def _brought_by(self, claim: Operation) -> Claimed:
        """What a claim brings."""
        try:
            found = await self._session.result(claim)
            with self._session.reading():
                ((*rows, last),) = found
                expired, due = last[-2:]
                dead = [record([row[_DEAD][column] for column in COLUMNS]) for row in rows if row[_DEAD] is not None]
                items = _items(rows)
                large = {row[0]: row[_SIZE] for row in rows if row[_SIZE] is not None}
                if due is not None:
                    self._work.set(due)
        except (trio.Cancelled, QueueError):
            self._work.set()
            raise
        if large:
            items = await self._filled(items, large)
        return Claimed(items=items, dead=dead, expired=expired)

    async def _filled(self, items: Sequence[Item], large: Mapping[str, int]) -> list[Item]:
        """With the payloads of those that are so large: it takes its time, in which nobody is locked out."""
        filled = []
        try:
            for item in items:
                if item.id in large:
                    found = await self._ask(_PAYLOAD, item.id, item.token, size=large[item.id])
                    with self._session.reading():
                        ((payload,),) = found or [(b"null",)]
                    item = msgspec.structs.replace(item, payload=payload)
                filled.append(item)
        except (trio.Cancelled, QueueError):
            self._give_all_back(items)
            raise
        return filled

    def _together(self, values: Sequence[object], size: int, claim: Operation) -> Operation:
        """A put with a claim of what it brings: in one statement, which is much sooner done than two."""
        ((_, more),) = claim.statements
        claim.size = size
        return Operation([Statement(_PUT_AND_CLAIM, (*values, *more))], size=size, sees=claim.sees, carries=(claim, _apart))

    @property
    def _unlimited(self) -> bool:
        """Whether claims wait for no other claim: else a put would, too."""
        spec = self._settings.spec
        return spec.concurrency is None and spec.rate is None and self._settings.group_by is None

    def _hold(self, found: Sequence[Rows]) -> None:
        """These are ours from now on."""
        self._held.update((row[0], row[1]) for row in found[0] if _runs(row))

    def _give_back(self, found: Sequence[Rows]) -> None:
        """Nobody waits for these any more: others may have them."""
        if items := _items(found[0]):
            self._give_all_back(items)

    def _give_all_back(self, items: Sequence[Item]) -> None:
        self._forget((item.id, item.token) for item in items)
        endings = [Ending(id=item.id, token=item.token, how="back") for item in items]
        self._session.post(Statement(_FINISH, (self.name, *_columns(endings))))

    async def wait_for_work(self, demand: Callable[[], Demand | None] | None = None) -> Claimed | None:
        if not self._looked:
            await self._look()
        if (claim := await self._work.wait(demand)) is not None:
            return await self._brought_by(claim)
        self._looked = False
        return None

    async def _look(self) -> None:
        """Find out when a claim may bring something."""
        self._looked = True
        self._work.clear()
        due: float | None = _AGAIN
        try:
            with suppress(QueueUnavailable):
                due = await self._do("due(%s)")
        finally:
            if due is not None:
                self._work.set(due)

    async def renew(self, items: Sequence[Item]) -> list[bool]:
        ids, tokens = [item.id for item in items], [item.token for item in items]
        found = await self._do("renew(%s, %s::text[], %s::bigint[])", ids, tokens)
        with self._session.reading():
            held = _each(len(items), found)
        self._forget((item.id, item.token) for item, still in zip(items, held, strict=True) if not still)
        return held

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        size = sum(len(ending.result or b"") for ending in endings)
        found = await self._ask(_FINISH, *_columns(endings), size=size)
        with self._session.reading():
            stored = _each(len(endings), found[0][0])
        self._forget((ending.id, ending.token) for ending in endings)
        return stored

    async def progress(self, item: Item, done: float, total: float | None) -> None:
        await self._session.ask(Statement(_PROGRESS, (done, total, self.name, item.id, item.token)))

    # ---- people ----

    async def cancel(self, id: str) -> Literal["cancelled", "running", "ended", "unknown"]:
        return cast(Literal["cancelled", "running", "ended", "unknown"], await self._do("cancel(%s, %s)", id))

    async def requeue(self, ids: Sequence[str] | None = None) -> int:
        wanted = None if ids is None else list(ids)
        return await self._repeat("requeue(%s, %s::text[], %s)", wanted)

    async def purge(self, state: State) -> int:
        return await self._repeat("purge(%s, %s, %s)", state.value)

    async def pause(self, paused: bool) -> None:
        await self._do("pause(%s, %s)", paused)

    async def counts(self) -> Counts:
        found = await self._ask(_COUNTS)
        with self._session.reading():
            numbers: dict[str, Any] = {state: number for state, number, *_ in found if state is not None}
            _, _, delayed, oldest, paused = found[0]
            numbers["waiting"] = numbers.get("waiting", 0) - delayed
            return Counts(**numbers, delayed=delayed, oldest=oldest, paused=paused)

    async def peek(self, state: State, limit: int) -> list[Record]:
        order = _ORDER.get(state, "ended_at DESC, seq DESC")
        ended = "" if state in _ORDER else "AND ended_at IS NOT NULL"
        select = f"{_RECORDS} AND state = %s {ended} ORDER BY {order} LIMIT %s"
        found = await self._ask(select, state.value, limit)
        with self._session.reading():
            return [record(row) for row in found]

    async def show(self, id: str, *, keep: bool = False) -> Record | None:
        marked = [Statement("SELECT supervisor.keep(%s, %s)", (self.name, [id]))] if keep else []
        *_, found = await self._session.ask(*marked, Statement(f"{_RECORDS} AND id = %s", (self.name, id)))
        with self._session.reading():
            return record(found[0]) if found else None

    # ---- the connection ----

    async def _ask(self, sql: str, *values: object, size: int = 0) -> Rows:
        """One statement, whose first parameter is the name of the queue."""
        (rows,) = await self._session.ask(Statement(sql, (self.name, *values)), size=size)
        return rows

    async def _do(self, call: str, *values: object) -> Any:
        """Call a function, whose first parameter is the name of the queue."""
        found = await self._ask(f"SELECT supervisor.{call}", *values)
        with self._session.reading():
            return found[0][0]

    async def _repeat(self, call: str, *values: object) -> int:
        """Call a function that does a part, until nothing is left to do."""
        total = 0
        while part := await self._do(call, *values, MANY):
            total += part
        return total

    def _prepare(self, db: psycopg.Connection) -> None:
        """In the session's thread: what a new connection needs."""
        _migrate(db)
        db.execute(f"LISTEN supervisor_{hashlib.md5(self.name.encode(), usedforsecurity=False).hexdigest()}")
        db.execute("SELECT supervisor.declare(%s, %s, false)", (self.name, packed(self._settings)))

    def _look_again(self) -> None:
        """There is a connection: what was notified before that is lost, so look."""
        self._work.set()
        self._room.set()
        if self._held:
            held = Statement(_HELD, (list(self._held), list(self._held.values()), self.name))
            self._session.post(held, then=self._found_held)

    def _found_held(self, found: Sequence[Rows]) -> None:
        for id, token, cancelling in found[0]:
            if self._held.get(id) == token:
                self._tell_of("lost" if cancelling is None else "cancel", id, token)

    def _heard(self, said: str) -> None:
        """A notification."""
        what, _, of = said.partition(" ")
        if what == "work":
            self._work.set()
        elif what == "room":
            self._room.set()
        elif what in ("paused", "resumed"):
            self._listen(Notice(what=cast(Literal["paused", "resumed"], what)))
        elif what == "ended":
            for id in _some(of):
                self._listen(Notice(what="ended", id=id))
        elif what in ("cancel", "lost"):
            for id, _, token in (each.rpartition(":") for each in _some(of)):
                if str(self._held.get(id)) == token:
                    self._tell_of(cast(Literal["cancel", "lost"], what), id, int(token))

    def _tell_of(self, what: Literal["cancel", "lost"], id: str, token: int) -> None:
        if what == "lost":
            self._forget([(id, token)])
        self._listen(Notice(what=what, id=id))

    def _forget(self, over: Iterable[tuple[str, int]]) -> None:
        for id, token in over:
            if self._held.get(id) == token:
                del self._held[id]


def _some(said: str) -> list[str]:
    """The strings in a notification; none where somebody else has made it."""
    try:
        return msgspec.json.decode(said, type=list[str])
    except msgspec.DecodeError:
        return []


def _migrate(db: psycopg.Connection) -> None:
    """Bring the tables to our version; whoever comes first makes them, and others wait for that."""
    if _version(db) == VERSION:
        return
    db.execute("SELECT pg_advisory_lock(%s)", (_MIGRATION,))  # before the transaction: only then it sees what others made
    with db.transaction():
        found = _version(db)
        if found > VERSION:
            raise QueueUnavailable("its tables were made by a newer version of this program: run that")
        if found == 0:
            _make(db)
    db.execute("SELECT pg_advisory_unlock(%s)", (_MIGRATION,))


def _make(db: psycopg.Connection) -> None:
    try:
        db.execute(cast(Any, schema()))
    except psycopg.errors.InsufficientPrivilege as error:
        raise QueueUnavailable(
            f"it has no tables for queues, and this user may not make them ({error.diag.message_primary}): let an"
            " administrator run what supervisor.queues.postgres.schema() gives"
        ) from error


def _version(db: psycopg.Connection) -> int:
    """0: there are no tables yet."""
    if db.execute("SELECT to_regclass('supervisor.version')").fetchone() == (None,):
        return 0
    return int((db.execute("SELECT number FROM supervisor.version").fetchone() or (0,))[0])


_AGAIN = 5.0
"""Seconds until what could not be asked is asked again, if nothing is heard before."""

_OFFER = (
    "supervisor.offer(%s, %s::text[], %s::text[], %s::int[], %s::float8[], %s::float8[], %s::float8[], %s::text[], %s::text[],"
    " %s::boolean[])"
)
_PUT = f"SELECT * FROM {_OFFER}"
_BROUGHT = (
    f"id, token, CASE WHEN octet_length(payload) <= {LARGE} THEN convert_to(payload, 'utf8') ELSE '' END, attempts, priority,"
    f" in_group, put_at, ready_at, dead, CASE WHEN octet_length(payload) > {LARGE} THEN octet_length(payload) END, expired, due"
)
_PAYLOAD = "SELECT convert_to(payload, 'utf8') FROM supervisor.items WHERE queue = %s AND id = %s AND token = %s"
_CLAIM = "supervisor.claim(%s, %s, %s, %s, %s::int[], %s, %s)"
_NOTHING = (
    "NULL::text, NULL::bigint, NULL::bytea, NULL::int, NULL::int, NULL::text, NULL::float8, NULL::float8, NULL::json,"
    " NULL::int, NULL::bigint, NULL::float8"
)
"""In place of what a claim brought."""

_PUT_AND_CLAIM = f"SELECT what, who, {_NOTHING} FROM {_OFFER} UNION ALL SELECT NULL, NULL, {_BROUGHT} FROM {_CLAIM}"

_ITEM = ("id", "token", "payload", "attempt", "priority", "group", "put_at", "ready_at")
"""What the fields of an item are called, in this order."""

_DEAD = len(_ITEM)
"""The column of a claim's answer that has an item which is dead, and none of one that runs."""

_SIZE = _DEAD + 1
"""The one that has the size of a payload that is too large to come along."""

_FINISH = "SELECT supervisor.finish(%s, %s::text[], %s::bigint[], %s::text[], %s::text[], %s::text[], %s::text[], %s::float8[])"
_PROGRESS = (
    "UPDATE supervisor.items SET done = %s, total = %s WHERE queue = %s AND id = %s AND token = %s AND state = 'running'"
)
_RECORDS = (
    f"SELECT {', '.join(COLUMNS)} FROM supervisor.items"
    " WHERE queue = %s AND (forget_at IS NULL OR forget_at > supervisor.now())"
)
_HELD = """
    SELECT held.id, held.token, i.cancelling
    FROM unnest(%s::text[], %s::bigint[]) AS held (id, token)
    LEFT JOIN supervisor.items AS i ON i.queue = %s AND i.id = held.id AND i.token = held.token AND i.state = 'running'
    WHERE i.cancelling IS NOT false
"""
"""Of what we have, what is to be cancelled (true), and what we have lost (null)."""


_ORDER = {
    State.WAITING: "ready_at > supervisor.now(), priority, ready_at, seq",
    State.RUNNING: "started_at DESC, seq DESC",
}
_COUNTS = """
    SELECT
      by_state.state, by_state.number,
      (SELECT count(*) FROM supervisor.items WHERE queue = q.name AND state = 'waiting' AND ready_at > supervisor.now()),
      supervisor.now() - (SELECT min(ready_at) FROM supervisor.items
        WHERE queue = q.name AND state = 'waiting' AND ready_at <= supervisor.now()
          AND (expires_at IS NULL OR expires_at > supervisor.now())),
      q.paused
    FROM supervisor.queues AS q LEFT JOIN LATERAL (
      SELECT CASE WHEN state = 'waiting' AND expires_at <= supervisor.now() THEN 'expired' ELSE state END AS state,
        count(*) AS number
      FROM supervisor.items WHERE queue = q.name AND (forget_at IS NULL OR forget_at > supervisor.now()) GROUP BY 1
    ) AS by_state ON true
    WHERE q.name = %s
"""


def _apart(rows: Rows) -> tuple[Rows, Rows]:
    """The rows of `_PUT_AND_CLAIM`, each kind by itself."""
    return [row[:2] for row in rows if row[0] is not None], [row[2:] for row in rows if row[0] is None]


def _items(rows: Rows) -> list[Item]:
    """Those that run, of the rows of a claim; the last row is none."""
    return [Item(**dict(zip(_ITEM, row, strict=False))) for row in rows if _runs(row)]


def _runs(row: Sequence[Any]) -> bool:
    return row[_DEAD] is None and row[0] is not None


def _each(count: int, found: Iterable[int]) -> list[bool]:
    """Of so many, which were found; they are counted from 1."""
    there = set(found)
    return [number in there for number in range(1, count + 1)]


def _columns(endings: Sequence[Ending]) -> list[list[object]]:
    rows = [
        (e.id, e.token, e.how, None if e.result is None else e.result.decode(), e.error, e.traceback, e.delay)
        for e in endings
    ]  # fmt: skip
    return [list(column) for column in zip(*rows, strict=True)] or [[]] * 7
