"""The rows of a queue in SQLite, and what each operation does with them, in one transaction.

    SCHEMA       the tables
    Rows         the operations: they look, decide, and do it for all items at once
    Plan, Choice, Finish    what a put, a claim and a finish have decided

An item is a row while it is known. A key that `unique` protects is a row of its own, for as long as it is taken, which may be
longer than its item is known. How many items wait is kept beside them, so that nobody counts them at each put.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import msgspec

from supervisor.policies.rate import ROUNDING, Bucket
from supervisor.queues.protocol import (
    Claimed,
    Counts,
    Draft,
    Ending,
    Item,
    QueueFull,
    Receipt,
    Record,
    Settings,
    State,
    packed,
    unpacked,
)
from supervisor.queues.sql import COLUMNS, NO_ATTEMPT_LEFT, WORKER_LOST, record

if TYPE_CHECKING:
    from sqlite3 import Connection, Cursor

R = TypeVar("R")

SOME = 1000
"""Rows that are looked at, or removed, in one go: those behind them wait."""

WHOLE = 1 << 20
"""Bytes of payloads that come out in one text."""

AT_ONCE = 64 << 20
"""Bytes of payloads in one claim; one item is always taken, however large."""

LARGE = 16 << 10
"""Bytes from which on a payload has a row of its own, since SQLite writes a row anew whenever something of it changes."""

DIGITS = 5
"""Of a moment, behind the point: SQLite writes 15 digits of a number into JSON."""

SCHEMA = (
    """
    CREATE TABLE items (
        seq INTEGER PRIMARY KEY,
        queue TEXT NOT NULL,
        id TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'waiting',
        priority INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        token INTEGER NOT NULL DEFAULT 0,
        put_at REAL NOT NULL,
        ready_at REAL NOT NULL,
        expires_at REAL,
        started_at REAL,
        ended_at REAL,
        forget_at REAL,
        owner TEXT,
        key TEXT,
        in_group TEXT,
        keep INTEGER NOT NULL DEFAULT 0,
        cancelling INTEGER NOT NULL DEFAULT 0,
        done REAL,
        total REAL,
        error TEXT,
        traceback TEXT,
        result TEXT,
        payload BLOB
    );
    CREATE UNIQUE INDEX items_id ON items (queue, id);
    CREATE INDEX items_waiting ON items (queue, priority, ready_at, seq, in_group) WHERE state = 'waiting';
    CREATE INDEX items_expiring ON items (queue, expires_at) WHERE state = 'waiting' AND expires_at IS NOT NULL;
    CREATE INDEX items_running ON items (queue, in_group) WHERE state = 'running';
    CREATE INDEX items_ended ON items (queue, state, ended_at, seq, forget_at) WHERE ended_at IS NOT NULL;
    CREATE INDEX items_over ON items (queue, forget_at) WHERE forget_at IS NOT NULL;

    CREATE TABLE large (seq INTEGER PRIMARY KEY, payload BLOB NOT NULL);
    CREATE TRIGGER large_gone AFTER DELETE ON items WHEN old.payload IS NULL BEGIN
        DELETE FROM large WHERE seq = old.seq;
    END;

    CREATE TABLE keys (
        queue TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL, until REAL, PRIMARY KEY (queue, key)
    ) WITHOUT ROWID;
    CREATE INDEX keys_until ON keys (queue, until) WHERE until IS NOT NULL;

    CREATE TABLE queues (
        queue TEXT PRIMARY KEY,
        waiting INTEGER NOT NULL DEFAULT 0,
        paused INTEGER NOT NULL DEFAULT 0,
        full_at REAL NOT NULL DEFAULT 0,
        settings TEXT
    ) WITHOUT ROWID
    """,
)
"""The versions of the file. `forget_at`: until when an item that has ended is known; null: until somebody purges it.
`keys.until`: null: until the item is claimed, or has ended. `full_at`: when the bucket of the `rate` is full again."""


# ---- what is decided ----


@dataclass(kw_only=True)
class Plan:
    """What a put does."""

    receipts: list[Receipt] = field(default_factory=list)
    drafts: dict[str, Draft] = field(default_factory=dict)
    """Those that are to be stored, in their order."""
    gone: set[str] = field(default_factory=set)
    """The ids of those that were there, and make room."""
    kept: set[str] = field(default_factory=set)
    """The ids of those whose end somebody else waits for, too."""

    @property
    def grows(self) -> int:
        """By how many more items wait afterwards."""
        return len(self.drafts) - len(self.gone)


def plan_put(drafts: Iterable[Draft], known: Collection[str], holders: Mapping[str, Holder], settings: Settings) -> Plan:
    """What becomes of `drafts`, one after another. `known`: the ids that there are; `holders`: by key, who has it."""
    plan, holders, unique = Plan(), dict(holders), settings.spec.unique
    for draft in drafts:
        holder = holders.get(draft.key) if unique is not None and draft.key is not None else None
        if draft.id in known or draft.id in plan.drafts:
            plan.receipts.append(Receipt(id=draft.id, what="known"))
        elif unique is None or holder is None:
            _store(plan, draft, holders, "stored")
        elif unique.on_conflict == "replace" and holder.state == State.WAITING.value:
            if plan.drafts.pop(holder.id, None) is None:
                plan.gone.add(holder.id)
            _store(plan, draft, holders, "replaced")
        else:
            plan.receipts.append(Receipt(id=holder.id, what="merged" if unique.on_conflict == "merge" else "rejected"))
        if draft.keep and plan.receipts[-1].what in ("known", "merged"):
            plan.kept.add(plan.receipts[-1].id)
    return plan


def _store(plan: Plan, draft: Draft, holders: dict[str, Holder], what: Literal["stored", "replaced"]) -> None:
    plan.drafts[draft.id] = draft
    plan.receipts.append(Receipt(id=draft.id, what=what))
    if draft.key is not None:
        holders[draft.key] = Holder(draft.key, draft.id, State.WAITING.value)


class Holder(NamedTuple):
    """Who has a key."""

    key: str
    id: str
    state: str | None


@dataclass(kw_only=True)
class Choice:
    """What may be claimed. `limit`: so many more; `groups`: how many of each run, those that are chosen included."""

    limit: int
    attempts: int
    per_key: int
    groups: Counter[str]
    size: int = 0

    @property
    def full(self) -> list[str]:
        """The groups of which no more may run."""
        return [group for group, running in self.groups.items() if running >= self.per_key]

    def choose(self, candidates: Iterable[Candidate]) -> tuple[list[int], list[int]]:
        """Of candidates, in their order, the seqs that run and those that are dead; the first is always among them."""
        run: list[int] = []
        dead: list[int] = []
        for seq, attempts, group, size in candidates:
            if attempts >= self.attempts:
                dead.append(seq)
            elif not self.limit:
                break
            elif group is None or self.groups[group] < self.per_key:
                self._take(group, size)
                run.append(seq)
        return run, dead

    def _take(self, group: str | None, size: int) -> None:
        if group is not None:
            self.groups[group] += 1
        self.size += size
        self.limit = self.limit - 1 if self.size < AT_ONCE else 0


class Candidate(NamedTuple):
    """An item that may be claimed."""

    seq: int
    attempts: int
    group: str | None
    size: int


@dataclass(kw_only=True)
class Finish:
    """What a finish does: an answer for each ending, and the rows of each statement."""

    answers: list[bool] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    ended: list[tuple[int, str, float | None, str | None, str | None, str | None]] = field(default_factory=list)
    retried: list[tuple[int, float, str | None, str | None]] = field(default_factory=list)
    large: list[tuple[int, bytes]] = field(default_factory=list)
    """Results that are too large for that."""
    back: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    """The ids of those that have ended, and that somebody waits for."""


def plan_finish(endings: Sequence[Ending], found: Iterable[Held], forget_at: float) -> Finish:
    """What becomes of items that were `found` claimed; who ends one that was not, or a second time, has lost it."""
    held, finish = {(each.id, each.token): each for each in found}, Finish()
    for ending in endings:
        item = held.pop((ending.id, ending.token), None)
        finish.answers.append(item is not None)
        if item is None:
            continue
        if ending.how == "retry" and not item.cancelling:
            finish.retried.append((item.seq, ending.delay, _clean(ending.error), _clean(ending.traceback)))
        elif ending.how == "back" and not item.cancelling:
            finish.back.append(item.seq)
        else:
            _end(finish, item, ending, forget_at)
    return finish


def _end(finish: Finish, item: Held, ending: Ending, forget_at: float) -> None:
    if item.keep:
        finish.told.append(item.id)
    if ending.how == "done" and ending.result is None and not item.keep:
        finish.dropped.append(item.seq)
        return
    how = "cancelled" if ending.how in ("retry", "back") else ending.how
    if (result := ending.result) is not None and len(result) > LARGE:
        finish.large.append((item.seq, result))
        result = None
    error, traceback = _clean(ending.error), _clean(ending.traceback)
    finish.ended.append(
        (item.seq, how, None if how == "dead" else forget_at, None if result is None else result.decode(), error, traceback)
    )


def _clean(text: str | None) -> str | None:
    """What somebody else wrote may have anything in it: the names of files, bytes that are no text."""
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


class Held(NamedTuple):
    """An item that is claimed."""

    id: str
    token: int
    seq: int
    cancelling: int
    keep: int


class _Taken(NamedTuple):
    """An item that has just been claimed."""

    seq: int
    id: str
    token: int
    payload: str
    attempt: int
    priority: int
    group: str | None
    put_at: float
    ready_at: float

    def item(self) -> Item:
        return Item(
            id=self.id, token=self.token, payload=self.payload.encode(), attempt=self.attempt, priority=self.priority,
            group=self.group, put_at=self.put_at, ready_at=self.ready_at,
        )  # fmt: skip


class Some(NamedTuple):
    """An item of which nothing else matters. `keep`: somebody waits for its end."""

    seq: int
    id: str
    keep: int


class Head(NamedTuple):
    """What is true of a queue, besides its items."""

    waiting: int
    paused: int
    full_at: float


# ---- what is done ----


def _given(columns: str) -> str:
    """The rows in `:rows`, a JSON array of arrays, with these columns."""
    picked = ", ".join(f"json_extract(value, '$[{at}]') AS {name}" for at, name in enumerate(columns.split()))
    return f"(SELECT {picked} FROM json_each(:rows))"


_AMONG = "(SELECT value FROM json_each(:rows))"
_WAITING = "queue = :queue AND state = 'waiting'"
_RUNNING = "queue = :queue AND state = 'running'"
_PAYLOAD = "CAST(coalesce(payload, (SELECT payload FROM large WHERE large.seq = items.seq)) AS TEXT)"
_KNOWN = "(forget_at IS NULL OR forget_at > :now)"
_RECORD = ", ".join(COLUMNS).replace("lease_until", "NULL").replace("payload", _PAYLOAD)

_INSERT_PLAIN = f"""
    INSERT INTO items (queue, id, payload, priority, put_at, ready_at)
    SELECT :queue, id, CAST(payload AS BLOB), priority, :now, :now FROM {_given("id payload priority")}
"""
"""Most drafts ask for nothing special: that is half the work."""

_INSERT = f"""
    INSERT INTO items (queue, id, payload, priority, put_at, ready_at, expires_at, key, in_group, keep)
    SELECT :queue, id, CAST(payload AS BLOB), priority, :now, ready_at, ready_at + expire, key, in_group, keep FROM (
        SELECT *, max(:now + delay, coalesce(at, 0)) AS ready_at
        FROM {_given("id payload priority delay at expire key in_group keep")}
    )
"""

_INSERT_LARGE = "INSERT INTO large SELECT seq, CAST(:payload AS BLOB) FROM items WHERE queue = :queue AND id = :id"

_HEAD = """
    SELECT coalesce(max(waiting), 0), coalesce(max(paused), 0), coalesce(max(full_at), 0.0) FROM queues WHERE queue = :queue
"""
"""A row in any case."""

_LEVELS = f"""
    WITH RECURSIVE levels (priority) AS (
        SELECT min(priority) FROM items WHERE {_WAITING}
        UNION ALL
        SELECT (SELECT min(items.priority) FROM items WHERE {_WAITING} AND items.priority > levels.priority)
        FROM levels WHERE levels.priority IS NOT NULL
    )
    SELECT priority, (SELECT min(ready_at) FROM items WHERE {_WAITING} AND items.priority = levels.priority), (
        SELECT min(ready_at) FROM items WHERE {_WAITING} AND items.priority = levels.priority AND items.ready_at > :now
    ) FROM levels WHERE priority IS NOT NULL
"""
"""The priorities that wait, when the first of each is ready, or was, and when the first that is not ready yet will be."""

_CANDIDATES = f"""
    SELECT seq, attempts, in_group, coalesce(length(payload), (SELECT length(payload) FROM large WHERE large.seq = items.seq))
    FROM items
    WHERE {_WAITING} AND priority = :priority AND ready_at <= :now AND (in_group IS NULL OR in_group NOT IN {_AMONG})
    ORDER BY ready_at, seq LIMIT :limit
"""

_CLAIM = f"""
    UPDATE items SET
        state = 'running', attempts = attempts + 1, token = token + 1, started_at = :now, owner = :owner,
        done = NULL, total = NULL
    WHERE seq IN {_AMONG}
"""

_TAKEN = f"""
    SELECT seq, id, token, {_PAYLOAD}, attempts, priority, in_group, put_at, ready_at FROM items
    WHERE seq IN {_AMONG}
"""

_HELD = f"SELECT id, token, seq, cancelling, keep FROM items WHERE {_RUNNING} AND id IN {_AMONG}"

_END = f"""
    UPDATE items SET
        state = ending.state, ended_at = :now, forget_at = ending.forget_at, cancelling = 0, result = ending.result,
        error = ending.error, traceback = ending.traceback
    FROM {_given("seq state forget_at result error traceback")} AS ending WHERE items.seq = ending.seq
"""

_RETRY = f"""
    UPDATE items SET
        state = 'waiting', ready_at = :now + ending.delay, expires_at = :now + ending.delay + (expires_at - ready_at),
        error = ending.error, traceback = ending.traceback
    FROM {_given("seq delay error traceback")} AS ending WHERE items.seq = ending.seq
"""
"""Its time to expire begins anew, too."""

_WAIT_AGAIN = "state = 'waiting', expires_at = :now + (expires_at - ready_at), ready_at = :now"

_FORGET = """
    DELETE FROM items WHERE seq IN (SELECT seq FROM items WHERE queue = :queue AND forget_at <= :now LIMIT :limit)
"""

_TAKE_KEYS = f"""
    INSERT OR {{}} INTO keys
    SELECT queue, key, id, :until FROM items WHERE queue = :queue AND id IN {_AMONG} AND key IS NOT NULL
"""

_FREE_KEYS = f"""
    DELETE FROM keys WHERE queue = :queue AND until IS NULL AND (key, id) IN (
        SELECT key, id FROM items WHERE seq IN {_AMONG} AND key IS NOT NULL
    )
"""

_HOLDERS = f"""
    SELECT keys.key, keys.id, state FROM keys LEFT JOIN items ON items.queue = keys.queue AND items.id = keys.id
    WHERE keys.queue = :queue AND keys.key IN {_AMONG} AND (until > :now OR (until IS NULL AND state IN ('waiting', 'running')))
"""

_COUNTS = f"""
    SELECT 'waiting', count(*) FROM items WHERE {_WAITING}
    UNION ALL SELECT state, count(*) FROM items
    WHERE queue = :queue AND ended_at IS NOT NULL AND {_KNOWN} GROUP BY state
"""


def _of(state: State) -> str:
    """The condition for the items of a state, as an index has it."""
    ended = "" if state in (State.WAITING, State.RUNNING) else " AND ended_at IS NOT NULL"
    return f"queue = :queue AND state = '{state.value}'{ended}"


def _peek(state: State) -> str:
    """Of those that wait, the order of claims; of others, the latest first."""
    order = "max(ready_at, :now), priority, ready_at, seq"
    if state is not State.WAITING:
        order = f"{'started_at' if state is State.RUNNING else 'ended_at'} DESC, seq DESC"
    return f"""
        SELECT {_RECORD} FROM items WHERE seq IN (
            SELECT seq FROM items WHERE {_of(state)} AND {_KNOWN} ORDER BY {order} LIMIT :limit
        ) ORDER BY {order}
    """


_PEEK = {state: _peek(state) for state in State}
_SOME = {
    state: f"SELECT seq, id, keep FROM items WHERE {_of(state)} AND coalesce(ended_at, put_at) <= :before LIMIT :limit"
    for state in State
}


class Rows:
    """A queue's rows in one transaction, at the moment `now`. What an operation did is undone if it raises.

    A statement is one step wherever there may be many rows: for each step SQLite lets go of the interpreter, and a busy loop
    keeps it for milliseconds. So rows go in and come out as one JSON text.
    """

    def __init__(self, db: Connection, queue: str, settings: Settings, now: float) -> None:
        self._db = db
        self._queue = queue
        self._spec = settings.spec
        self._settings = settings
        self._now = now

    def _do(self, statement: str, **parameters: object) -> int:
        """Execute it; gives how many rows it changed."""
        return self._execute(statement, parameters).rowcount

    def _execute(self, statement: str, parameters: Mapping[str, object]) -> Cursor:
        return self._db.execute(statement, {"queue": self._queue, "now": self._now, **parameters})

    def _find(self, row: type[R], statement: str, **parameters: object) -> list[R]:
        """All rows that it finds, in one step."""
        names = ", ".join(f"c{number}" for number, _ in enumerate(_fields(row)))
        packing = f"WITH found ({names}) AS ({statement}) SELECT json_group_array(json_array({names})) FROM found"
        (text,) = self._execute(packing, parameters).fetchone()
        found: list[R] = msgspec.json.decode(text, type=list[row])  # type: ignore[valid-type]
        return found

    def _set(self, column: str, value: object) -> None:
        """What is true of the queue."""
        self._do(
            f"INSERT INTO queues (queue, {column}) VALUES (:queue, :value)"
            f" ON CONFLICT (queue) DO UPDATE SET {column} = excluded.{column}",
            value=value,
        )

    def _more_wait(self, count: int) -> None:
        """So many more items wait than before."""
        if count:
            self._do(
                "INSERT INTO queues (queue, waiting) VALUES (:queue, :count)"
                " ON CONFLICT (queue) DO UPDATE SET waiting = waiting + :count",
                count=count,
            )

    @property
    def _forget_at(self) -> float:
        """Until when what ends now is known."""
        return self._now + self._spec.keep_results

    def begin(self) -> None:
        """What is claimed was claimed by a daemon that is no more: it waits again, its attempt counted."""
        left = self._execute(f"SELECT seq, id, cancelling FROM items WHERE {_RUNNING}", {}).fetchall()
        self._end([seq for seq, _, cancelling in left if cancelling], State.CANCELLED)
        interrupted = _json([seq for seq, _, cancelling in left if not cancelling])
        self._do(
            f"UPDATE items SET {_WAIT_AGAIN}, error = :error, traceback = NULL WHERE seq IN {_AMONG}",
            rows=interrupted, error=WORKER_LOST,
        )  # fmt: skip
        self._take_keys_again([id for _, id, cancelling in left if not cancelling])
        (waiting,) = self._execute(f"SELECT count(*) FROM items WHERE {_WAITING}", {}).fetchone()
        self._set("waiting", waiting)

    def declare(self) -> None:
        self._set("settings", packed(self._settings))

    def declared(self) -> Settings | None:
        found = self._execute("SELECT settings FROM queues WHERE queue = :queue AND settings IS NOT NULL", {}).fetchone()
        return None if found is None else unpacked(found[0], self._spec.backend)

    # -- keys

    def _holders(self, drafts: Sequence[Draft]) -> dict[str, Holder]:
        """Who has the keys of these."""
        keys = [draft.key for draft in drafts if draft.key is not None]
        if self._spec.unique is None or not keys:
            return {}
        self._do("DELETE FROM keys WHERE queue = :queue AND until <= :now")
        return {holder.key: holder for holder in self._find(Holder, _HOLDERS, rows=_json(keys))}

    def _take_keys(self, ids: Iterable[str]) -> None:
        """Items that are new have their keys, which are free."""
        if self._spec.unique is not None:
            lifetime = self._spec.unique.lifetime
            until = None if isinstance(lifetime, str) else self._now + lifetime
            self._do(_TAKE_KEYS.format("REPLACE"), rows=_json(ids), until=until)

    def _take_keys_again(self, ids: Iterable[str]) -> None:
        """Items that wait again have their keys again, where nobody else has taken them."""
        if self._spec.unique is not None and isinstance(self._spec.unique.lifetime, str):
            self._do(_TAKE_KEYS.format("IGNORE"), rows=_json(ids), until=None)

    def _free_keys(self, seqs: Sequence[int], *, claimed: bool = False) -> None:
        """These have ended, or are `claimed`."""
        unique = self._spec.unique
        if unique is not None and seqs and (not claimed or unique.lifetime == "queued"):
            self._do(_FREE_KEYS, rows=_json(seqs))

    # -- put

    def put(self, drafts: Sequence[Draft]) -> Plan:
        plan = plan_put(drafts, self._known(drafts), self._holders(drafts), self._settings)
        if plan.grows > 0:
            self._make_sure_of_room(plan.grows)
        self._remove(plan.gone)
        self._insert(plan.drafts.values())
        if plan.kept:
            self.keep(plan.kept)
        self._take_keys(plan.drafts)
        self._more_wait(plan.grows)
        self._forget()
        return plan

    def keep(self, ids: Iterable[str]) -> None:
        """Somebody waits for the end of these."""
        self._do(f"UPDATE items SET keep = 1 WHERE queue = :queue AND id IN {_AMONG} AND NOT keep", rows=_json(ids))

    def _known(self, drafts: Sequence[Draft]) -> set[str]:
        """The ids of these that there are. Those that should be forgotten by now are."""
        ids = _json(draft.id for draft in drafts)
        found = self._find(_Known, f"SELECT id, forget_at FROM items WHERE queue = :queue AND id IN {_AMONG}", rows=ids)
        over = [each.id for each in found if each.forget_at is not None and each.forget_at <= self._now]
        self._remove(over)
        return {each.id for each in found}.difference(over)

    def _remove(self, ids: Collection[str]) -> None:
        if ids:
            self._do(f"DELETE FROM items WHERE queue = :queue AND id IN {_AMONG}", rows=_json(ids))

    def _make_sure_of_room(self, more: int) -> None:
        size, waiting = self._spec.size, self.head().waiting
        if more > size:
            raise QueueFull(f"queue {self._queue} takes {size} items in all, and these are {more}: put fewer at once")
        if waiting + more > size:
            raise QueueFull(f"queue {self._queue} is full: {waiting} of {size} items wait, and there is no room for {more}")

    def _insert(self, drafts: Collection[Draft]) -> None:
        if any(map(_is_special, drafts)):
            self._do(_INSERT, rows=_json(map(_special, drafts)))
        else:
            self._do(_INSERT_PLAIN, rows=_json(map(_plain, drafts)))
        for draft in drafts:
            if len(draft.payload) > LARGE:
                self._do(_INSERT_LARGE, id=draft.id, payload=draft.payload)

    def is_full(self) -> bool:
        return self.head().waiting >= self._spec.size

    def _forget(self) -> None:
        """What is not known any more goes, a bit at a time."""
        self._do(_FORGET, limit=SOME)

    # -- claim

    def head(self) -> Head:
        return Head(*self._execute(_HEAD, {}).fetchone())

    def claim(self, limit: int, owner: str, attempts: int, order: Sequence[int]) -> tuple[Claimed, list[str]]:
        """What is claimed, and the ids of those that have ended and that somebody waits for."""
        expired = self._find(Some, f"SELECT seq, id, keep FROM items WHERE {_WAITING} AND expires_at <= :now LIMIT {SOME}")
        self._end([each.seq for each in expired], State.EXPIRED)
        head, groups = self.head(), self._groups()
        choice = Choice(
            limit=min(limit, self._allowed(head)), attempts=attempts, per_key=self._spec.per_key, groups=groups
        )  # fmt: skip
        items: list[Item] = []
        dead: list[Record] = []
        told = [each.id for each in expired if each.keep]
        if choice.limit > 0:
            for priority in sorted((priority for priority, _, _ in self._levels()), key=_Order(order).place):
                self._claim_from(priority, choice, owner, items, dead, told)
        self._spend(head, len(items))
        self._more_wait(-len(items) - len(dead) - len(expired))
        return Claimed(items=items, dead=dead, expired=len(expired)), told

    def _end(self, seqs: Sequence[int], state: State) -> None:
        """What waits ends. Those that are dead are known until they are purged."""
        if not seqs:
            return
        self._free_keys(seqs)
        self._do(
            "UPDATE items SET state = :state, ended_at = :now, forget_at = :forget_at, cancelling = 0,"
            f" error = coalesce(error, :error) WHERE seq IN {_AMONG}",
            rows=_json(seqs), state=state.value, forget_at=None if state is State.DEAD else self._forget_at,
            error=NO_ATTEMPT_LEFT if state is State.DEAD else None,
        )  # fmt: skip

    def _allowed(self, head: Head) -> int:
        """How many may be claimed, whatever waits."""
        allowed = 0 if head.paused else sys.maxsize
        if self._spec.concurrency is not None:
            allowed = min(allowed, self._spec.concurrency - self._running())
        if (bucket := self._bucket(head)) is not None:
            allowed = min(allowed, int(bucket.tokens(self._now) + ROUNDING))
        return allowed

    def _running(self) -> int:
        """How many run."""
        (count,) = self._execute(f"SELECT count(*) FROM items WHERE {_RUNNING}", {}).fetchone()
        return int(count)

    def _bucket(self, head: Head) -> Bucket | None:
        if self._spec.rate is None:
            return None
        bucket = Bucket(self._spec.rate, max(int(self._spec.rate), 1))
        if head.full_at <= self._now + bucket.burst * bucket.interval:  # else the clock was set back: begin anew
            bucket.full_at = head.full_at
        return bucket

    def _spend(self, head: Head, count: int) -> None:
        """Take tokens of the rate, which are there."""
        if count and (bucket := self._bucket(head)) is not None:
            for _ in range(count):
                bucket.take(self._now)
            self._set("full_at", bucket.full_at)

    def _groups(self) -> Counter[str]:
        """How many run of each group."""
        statement = f"SELECT in_group, count(*) FROM items WHERE {_RUNNING} AND in_group IS NOT NULL GROUP BY in_group"
        return Counter({each.name: each.running for each in self._find(_Group, statement)})

    def _levels(self) -> list[tuple[int, float, float | None]]:
        return self._execute(_LEVELS, {}).fetchall()

    def _claim_from(
        self, priority: int, choice: Choice, owner: str, items: list[Item], dead: list[Record], told: list[str]
    ) -> None:
        """Claim of one priority: page by page, since of each some may be dead, or of a group that is full."""
        while page := min(choice.limit, SOME):
            found = self._candidates(priority, choice.full, page)
            run, over = choice.choose(found)
            items += self._run(run, owner, large=choice.size > WHOLE)
            dead += self._bury(over, told)
            if len(found) < page:
                break

    def _candidates(self, priority: int, full: Iterable[str], limit: int) -> list[Candidate]:
        return self._find(Candidate, _CANDIDATES, priority=priority, rows=_json(full), limit=limit)

    def _run(self, seqs: list[int], owner: str, *, large: bool) -> list[Item]:
        if not seqs:
            return []
        rows = _json(seqs)
        self._do(_CLAIM, rows=rows, owner=owner)
        self._free_keys(seqs, claimed=True)
        one_by_one = large and [_Taken(*row) for row in self._execute(_TAKEN, {"rows": rows})]
        found = {each.seq: each.item() for each in one_by_one or self._find(_Taken, _TAKEN, rows=rows)}
        return [found[seq] for seq in seqs]

    def _bury(self, seqs: list[int], told: list[str]) -> list[Record]:
        if not seqs:
            return []
        rows = _json(seqs)
        self._end(seqs, State.DEAD)
        told += [each.id for each in self._find(_Id, f"SELECT id FROM items WHERE seq IN {_AMONG} AND keep", rows=rows)]
        return self._records(f"SELECT {_RECORD} FROM items WHERE seq IN {_AMONG}", rows=rows)

    def _records(self, statement: str, **parameters: object) -> list[Record]:
        return [record(row) for row in self._execute(statement, parameters)]

    def due(self) -> float | None:
        """When a claim may bring something, if nothing else happens."""
        (expiring,) = self._execute(
            f"SELECT min(expires_at) FROM items WHERE {_WAITING} AND expires_at IS NOT NULL", {}
        ).fetchone()  # fmt: skip
        moments = [moment for moment in (expiring, self._ready()) if moment is not None]
        return min(moments, default=None)

    def _ready(self) -> float | None:
        """When the next item may be claimed. One whose group is full waits for an end, not for a moment."""
        head = self.head()
        if head.paused or (self._spec.concurrency is not None and self._running() >= self._spec.concurrency):
            return None
        full = [group for group, running in self._groups().items() if running >= self._spec.per_key]
        moments: list[float] = []
        for priority, first, later in self._levels():
            if first <= self._now and self._candidates(priority, full, 1):
                moments.append(first)
            elif (moment := first if first > self._now else later) is not None:
                moments.append(moment)
        bucket = self._bucket(head)
        return max(min(moments), -math.inf if bucket is None else bucket.due) if moments else None

    # -- finish

    def held(self, items: Sequence[Item | Ending]) -> list[Held]:
        """Those of these that run; each has the token of its last claim."""
        return self._find(Held, _HELD, rows=_json(item.id for item in items))

    def finish(self, endings: Sequence[Ending]) -> Finish:
        finish = plan_finish(endings, self.held(endings), self._forget_at)
        self._free_keys([*finish.dropped, *(row[0] for row in finish.ended)])
        if finish.dropped:
            self._drop(finish.dropped)
        if finish.ended:
            self._do(_END, rows=_json(finish.ended))
        for seq, result in finish.large:
            self._do("UPDATE items SET result = CAST(:result AS TEXT) WHERE seq = :seq", seq=seq, result=result)
        if finish.retried:
            self._do(_RETRY, rows=_json(finish.retried))
        if finish.back:
            back = f"UPDATE items SET state = 'waiting', attempts = attempts - 1 WHERE seq IN {_AMONG}"
            self._do(back, rows=_json(finish.back))
        self._wait_again([*finish.back, *(row[0] for row in finish.retried)])
        self._forget()
        return finish

    def _wait_again(self, seqs: Sequence[int]) -> None:
        """These have been made to wait again."""
        if seqs and self._spec.unique is not None:
            found = self._find(_Id, f"SELECT id FROM items WHERE seq IN {_AMONG}", rows=_json(seqs))
            self._take_keys_again(each.id for each in found)
        self._more_wait(len(seqs))

    def _drop(self, seqs: Iterable[int]) -> None:
        self._do(f"DELETE FROM items WHERE seq IN {_AMONG}", rows=_json(seqs))

    def progress(self, item: Item, done: float, total: float | None) -> None:
        self._do(
            f"UPDATE items SET done = :done, total = :total WHERE {_RUNNING} AND id = :id AND token = :token",
            id=item.id, token=item.token, done=done, total=total,
        )  # fmt: skip

    # -- people

    def cancel(self, id: str) -> tuple[Literal["cancelled", "running", "ended", "unknown"], bool]:
        """What became of it, and whether somebody waits for its end."""
        found = self._execute(
            f"SELECT seq, state, keep FROM items WHERE queue = :queue AND id = :id AND {_KNOWN}", {"id": id}
        ).fetchone()  # fmt: skip
        if found is None:
            return "unknown", False
        seq, state, keep = found
        if state == State.WAITING.value:
            self._end([seq], State.CANCELLED)
            self._more_wait(-1)
            return "cancelled", bool(keep)
        if state == State.RUNNING.value:
            self._do("UPDATE items SET cancelling = 1 WHERE seq = :seq", seq=seq)
            return "running", False
        return "ended", False

    def requeue(self, ids: Sequence[str]) -> int:
        found = self._find(
            Some, f"SELECT seq, id, keep FROM items WHERE {_of(State.DEAD)} AND id IN {_AMONG}", rows=_json(ids)
        )  # fmt: skip
        seqs = [each.seq for each in found]
        self._do(f"UPDATE items SET {_WAIT_AGAIN}, attempts = 0, ended_at = NULL WHERE seq IN {_AMONG}", rows=_json(seqs))
        self._wait_again(seqs)
        return len(found)

    def requeue_some(self, before: float) -> int:
        """Some of all that were dead at a moment."""
        return self.requeue([each.id for each in self._some(State.DEAD, before)])

    def purge_some(self, state: State, before: float) -> list[Some]:
        """Remove some of those that were there at a moment."""
        found = self._some(state, before)
        seqs = [each.seq for each in found]
        self._free_keys(seqs)
        self._drop(seqs)
        self._more_wait(-len(found) if state is State.WAITING else 0)
        return found

    def _some(self, state: State, before: float) -> list[Some]:
        return self._find(Some, _SOME[state], before=before, limit=SOME)

    def pause(self, paused: bool) -> None:
        self._set("paused", int(paused))

    def counts(self) -> Counts:
        found = dict(self._execute(_COUNTS, {}).fetchall())
        (delayed,) = self._execute(f"SELECT count(*) FROM items WHERE {_WAITING} AND ready_at > :now", {}).fetchone()
        first = min((first for _, first, _ in self._levels()), default=math.inf)
        return Counts(
            **found | {"waiting": found["waiting"] - delayed}, delayed=delayed, running=self._running(),
            oldest=self._now - first if first <= self._now else None, paused=bool(self.head().paused),
        )  # fmt: skip

    def peek(self, state: State, limit: int) -> list[Record]:
        return self._records(_PEEK[state], limit=limit)

    def show(self, id: str, *, keep: bool = False) -> Record | None:
        if keep:
            self.keep([id])
        found = self._records(f"SELECT {_RECORD} FROM items WHERE queue = :queue AND id = :id AND {_KNOWN}", id=id)
        return found[0] if found else None


class _Id(NamedTuple):
    id: str


class _Known(NamedTuple):
    id: str
    forget_at: float | None


class _Group(NamedTuple):
    name: str
    running: int


class _Order:
    """The order of priorities: those that are named first, as they are named, then the others."""

    def __init__(self, named: Sequence[int]) -> None:
        self._places = {priority: place for place, priority in enumerate(named)}

    def place(self, priority: int) -> tuple[float, int]:
        return self._places.get(priority, math.inf), priority


def _fields(row: type) -> tuple[str, ...]:
    """The names of a NamedTuple's fields."""
    found: tuple[str, ...] = row._fields  # type: ignore[attr-defined]
    return found


def _is_special(draft: Draft) -> bool:
    """Whether a draft says more than its payload and priority."""
    return bool(
        draft.delay or draft.at is not None or draft.expire is not None or draft.key is not None or draft.group is not None
        or draft.keep
    )  # fmt: skip


def _plain(draft: Draft) -> tuple[object, ...]:
    return draft.id, draft.payload.decode() if len(draft.payload) <= LARGE else None, draft.priority


def _special(draft: Draft) -> tuple[object, ...]:
    said = draft.delay, draft.at, draft.expire, draft.key, draft.group, int(draft.keep)
    return *_plain(draft), *said


def _json(values: Iterable[object]) -> str:
    """What is given to a statement as `:rows`."""
    return msgspec.json.encode(list(values)).decode()
