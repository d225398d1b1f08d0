"""A queue as rows of a table: what the engines that speak SQL have in common.

    Dialect       how a database says the few things that they say differently
    Statements    the table and what is done to it, in the words of one of them
    plan_put, choose, plan_finish      what is to be done, decided from what was found: pure
    record        a row as people see it

An operation is one transaction: a statement that looks (and locks), a plan, a few statements that do it, each for all items
at once: the rows go in as one JSON array of arrays, `:rows`. Moments are Unix time; `now` is the parameter `:now` or the
server's clock.

What is not plain from an item's `state`:

    taken         the key, while no other item may have it; `taken_until`: for so long whatever becomes of the item
    forget_at     when an item that has ended is not kept any longer; null: until it is purged
    cancelling    it runs, and is to be cancelled
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from supervisor.queues.protocol import Draft, Ending, Receipt, Record, Settings, State
from supervisor.spec import Rate

WORKER_LOST = "its daemon died, or was out of reach, while it ran"
"""The error of an item that was claimed and never ended."""

NO_ATTEMPT_LEFT = "no attempt is left"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a database says what they do not all say alike."""

    items: str
    """The table of the items; its indexes are named after it."""
    serial: str
    """The type of a column that counts up by itself."""
    now: str
    """This moment, Unix time with fractions."""
    lock: str = ""
    """What follows a SELECT of rows that are changed next, so that nobody else changes them; waits for who does already."""
    skip: str = ""
    """The same; passes over the rows that somebody else has locked."""
    array: str
    """A FROM item that gives each array in `:rows` as `value`."""
    cell: str
    """The cell {at} of `value` as {type}."""
    named: str = r":\1"
    """A parameter, as the replacement of a regular expression."""

    def rows(self, columns: str) -> str:
        """A FROM item: the rows in `:rows`, with these columns, `"id text, seq bigint"`."""
        cells = (each.split() for each in columns.split(","))
        picked = (f"{self.cell.format(at=at, type=type)} AS {name}" for at, (name, type) in enumerate(cells))
        return f"(SELECT {', '.join(picked)} FROM {self.array})"

    def say(self, statement: str) -> str:
        """A statement with the names and parameters as this database has them."""
        words = {"items": self.items, "serial": self.serial, "now": self.now, "lock": self.lock, "skip": self.skip}
        return re.sub(r":(\w+)", self.named, statement.format(**words))


def packed(rows: Iterable[Sequence[object]]) -> str:
    """Rows as the parameter `:rows`."""
    return msgspec.json.encode(list(rows)).decode()


COLUMNS = (
    "id", "queue", "state", "payload", "priority", "attempts", "put_at", "ready_at", "expires_at", "started_at", "ended_at",
    "lease_until", "owner", "key", "in_group", "result", "error", "traceback", "done", "total", "cancelling",
)  # fmt: skip
"""What `record` takes, in this order."""

SCHEMA = (
    """CREATE TABLE {items} (
        seq {serial},
        queue TEXT NOT NULL,
        id TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'waiting',
        payload TEXT NOT NULL,
        priority INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        token BIGINT NOT NULL DEFAULT 0,
        put_at DOUBLE PRECISION NOT NULL,
        ready_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION,
        started_at DOUBLE PRECISION,
        ended_at DOUBLE PRECISION,
        forget_at DOUBLE PRECISION,
        lease_until DOUBLE PRECISION,
        owner TEXT,
        key TEXT,
        taken TEXT,
        taken_until DOUBLE PRECISION,
        in_group TEXT,
        keep INTEGER NOT NULL DEFAULT 0,
        cancelling INTEGER NOT NULL DEFAULT 0,
        result TEXT,
        error TEXT,
        traceback TEXT,
        done DOUBLE PRECISION,
        total DOUBLE PRECISION
    )""",
    "CREATE UNIQUE INDEX {items}_id ON {items} (queue, id)",
    "CREATE UNIQUE INDEX {items}_taken ON {items} (queue, taken) WHERE taken IS NOT NULL",
    "CREATE INDEX {items}_waiting ON {items} (queue, priority, ready_at, seq, in_group) WHERE state = 'waiting'",
    "CREATE INDEX {items}_expiring ON {items} (queue, expires_at) WHERE state = 'waiting' AND expires_at IS NOT NULL",
    "CREATE INDEX {items}_running ON {items} (queue, in_group) WHERE state = 'running'",
    "CREATE INDEX {items}_ended ON {items} (queue, state, ended_at, forget_at) WHERE ended_at IS NOT NULL",
    "CREATE INDEX {items}_over ON {items} (queue, forget_at) WHERE forget_at IS NOT NULL",
)
"""The table and its indexes."""

_RELEASED = "taken = CASE WHEN taken_until IS NULL THEN NULL ELSE taken END"
"""The item has ended, or a worker has it: another may have its key, unless that was promised for a time."""

_ENDED = f"ended_at = {{now}}, forget_at = {{now}} + :keep, {_RELEASED}"

_AGAIN = "state = 'waiting', expires_at = {now} + (expires_at - ready_at), ready_at = {now}, lease_until = NULL"
"""It waits anew: its time to expire begins anew too."""


class Statements:
    """What is done to the table. Parameters: `:queue` in each, `:now` where the dialect has it, and those that are named."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        say, rows = dialect.say, dialect.rows
        columns = ", ".join(COLUMNS)

        # put
        self.known = say(f"SELECT id FROM {{items}} WHERE queue = :queue AND id IN (SELECT n FROM {rows('n text')} AS new)")
        """Of the ids in `:rows`, those that there are: id."""
        among = f"queue = :queue AND taken IN (SELECT n FROM {rows('n text')} AS keys)"
        self.release = say(f"UPDATE {{items}} SET taken = NULL WHERE {among} AND taken_until <= {{now}}")
        """Of the keys in `:rows`, those whose time is over are free."""
        self.holders = say(f"SELECT taken, id, state FROM {{items}} WHERE {among}")
        """Of the keys in `:rows`, those that are taken: key, id, state."""
        self.remove = say(f"DELETE FROM {{items}} WHERE queue = :queue AND id IN (SELECT n FROM {rows('n text')} AS gone)")
        """The ids in `:rows` are no more."""
        self.insert = say(
            "INSERT INTO {items} (queue, id, payload, priority, put_at, ready_at, expires_at, key, taken, taken_until,"
            " in_group, keep) SELECT :queue, id, payload, priority, {now}, ready_at, ready_at + expire, key, key,"
            " {now} + lifetime, in_group, keep"
            " FROM (SELECT *, CASE WHEN at > {now} + delay THEN at ELSE {now} + delay END AS ready_at"
            f" FROM {rows(Plan.COLUMNS)} AS draft) AS new ORDER BY n"
        )
        """The rows of a `Plan`. A key that is taken is an error of the database."""

        # claim
        chosen = f"seq IN (SELECT n FROM {rows('n bigint')} AS chosen)"
        self.expiring = say(
            "SELECT seq, id FROM {items} WHERE queue = :queue AND state = 'waiting' AND expires_at <= {now} LIMIT :limit {skip}"
        )
        """Up to `:limit` that have waited for too long: seq, id."""
        self.expire = say(f"UPDATE {{items}} SET state = 'expired', {_ENDED} WHERE {chosen}")
        """The seqs in `:rows` have; for `:keep` seconds they can be looked at."""
        waiting = "FROM {items} AS items WHERE queue = :queue AND state = 'waiting'"
        of_level = f"(SELECT min(items.ready_at) {waiting} AND items.priority = levels.priority"
        self.levels = say(
            "WITH RECURSIVE levels (priority) AS ("
            f" SELECT min(priority) {waiting} UNION ALL SELECT (SELECT min(items.priority) {waiting}"
            " AND items.priority > levels.priority) FROM levels WHERE levels.priority IS NOT NULL)"
            f" SELECT priority, {of_level}), {of_level} AND items.ready_at > {{now}}) FROM levels WHERE priority IS NOT NULL"
        )
        """The priorities that wait, most urgent first: priority, ready_at of its first, and of the first yet to come."""
        self.full = say(
            "SELECT in_group FROM {items} WHERE queue = :queue AND state = 'running' AND in_group IS NOT NULL"
            " GROUP BY in_group HAVING count(*) >= :per_key"
        )
        """The groups of which no more may run: in_group."""
        self.candidates = say(
            "SELECT seq, attempts, in_group, id FROM {items} WHERE queue = :queue AND state = 'waiting'"
            " AND priority = :priority AND ready_at <= {now} AND (in_group IS NULL OR in_group NOT IN"
            f" (SELECT n FROM {rows('n text')} AS kept_out)) ORDER BY ready_at, seq LIMIT :limit {{skip}}"
        )
        """Of one priority, the first that may be claimed, but for the groups in `:rows`: seq, attempts, in_group, id."""
        self.claim = say(
            "UPDATE {items} SET state = 'running', attempts = attempts + 1, token = token + 1, started_at = {now},"
            " owner = :owner, lease_until = {now} + :lease, done = NULL, total = NULL,"
            " taken = CASE WHEN :queued = 1 AND taken_until IS NULL THEN NULL ELSE taken END"
            f" WHERE {chosen}"
        )
        """The seqs in `:rows` run. `:queued`: 1 where a key is taken only until then. `:lease`: null where there is none."""
        self.claimed = say(
            f"SELECT id, token, payload, attempts, priority, in_group, put_at, ready_at FROM {{items}} WHERE {chosen}"
        )
        """The fields of an `Item`, in its order, for the seqs in `:rows`."""
        self.bury = say(
            f"UPDATE {{items}} SET state = 'dead', ended_at = {{now}}, error = coalesce(error, '{NO_ATTEMPT_LEFT}'),"
            f" {_RELEASED} WHERE {chosen}"
        )
        """The seqs in `:rows` are dead."""
        self.buried = say(f"SELECT {columns} FROM {{items}} WHERE {chosen}")
        """A `record` for each of the seqs in `:rows`."""
        self.interrupt = say(
            f"UPDATE {{items}} SET {_AGAIN}, error = '{WORKER_LOST}', traceback = NULL"
            " WHERE queue = :queue AND state = 'running' AND cancelling = 0 AND (lease_until IS NULL OR lease_until <= {now})"
        )
        """What is claimed by nobody any more waits again, its attempt counted."""
        self.interrupt_cancelled = say(
            f"UPDATE {{items}} SET state = 'cancelled', lease_until = NULL, cancelling = 0, {_ENDED}"
            " WHERE queue = :queue AND state = 'running' AND cancelling = 1 AND (lease_until IS NULL OR lease_until <= {now})"
        )
        """The same of what was to be cancelled: that is its end."""

        # finish
        self.held = say(
            "SELECT items.id, items.token, seq, cancelling, keep, taken_until, in_group, {now}"
            f" FROM {rows('id text, token bigint')} AS ending CROSS JOIN {{items}} AS items"
            " WHERE queue = :queue AND items.id = ending.id AND items.token = ending.token AND state = 'running' {lock}"
        )
        """The fields of a `Held`, for the ids and tokens in `:rows` that are still claimed so."""
        self.drop = say(f"DELETE FROM {{items}} WHERE {chosen}")
        """The seqs in `:rows` are no more."""
        self.end = say(
            "UPDATE {items} SET state = ending.state, ended_at = {now}, forget_at = ending.forget_at, lease_until = NULL,"
            f" cancelling = 0, result = ending.result, error = ending.error, traceback = ending.traceback, {_RELEASED}"
            f" FROM {rows(Finish.ENDED)} AS ending WHERE {{items}}.seq = ending.seq"
        )
        """The rows of `Finish.ended`."""
        self.retry = say(
            "UPDATE {items} SET state = 'waiting', ready_at = {now} + ending.wait,"
            " expires_at = {now} + ending.wait + (expires_at - ready_at),"
            " lease_until = NULL, error = ending.error, traceback = ending.traceback"
            f" FROM {rows(Finish.RETRIED)} AS ending WHERE {{items}}.seq = ending.seq"
        )
        """The rows of `Finish.retried`."""
        self.back = say(f"UPDATE {{items}} SET state = 'waiting', attempts = attempts - 1, lease_until = NULL WHERE {chosen}")
        """The seqs in `:rows` are as if they had not been claimed."""
        self.progress = say(
            "UPDATE {items} SET done = :done, total = :total WHERE queue = :queue AND id = :id AND token = :token"
            " AND state = 'running'"
        )

        # people
        one = "queue = :queue AND id = :id"
        self.cancel_waiting = say(f"UPDATE {{items}} SET state = 'cancelled', {_ENDED} WHERE {one} AND state = 'waiting'")
        self.cancel_running = say(f"UPDATE {{items}} SET cancelling = 1 WHERE {one} AND state = 'running'")
        self.requeue = say(
            f"UPDATE {{items}} SET {_AGAIN}, attempts = 0, ended_at = NULL WHERE queue = :queue AND state = 'dead'"
            f" AND id IN (SELECT n FROM {rows('n text')} AS wanted)"
        )
        """Of the ids in `:rows`, the dead ones wait again."""
        self.some = {
            state: say(f"SELECT seq, id FROM {{items}} WHERE {_where(state)} LIMIT :limit {{skip}}") for state in State
        }
        """Up to `:limit` of a state: seq, id."""
        self.forget = say(
            "DELETE FROM {items} WHERE seq IN (SELECT seq FROM {items} WHERE queue = :queue AND forget_at <= {now}"
            " LIMIT :limit {skip})"
        )
        """Up to `:limit` of those that are not kept any longer are no more."""
        kept = "(forget_at IS NULL OR forget_at > {now})"
        self.counts = say(
            f"SELECT 'waiting', count(*) FROM {{items}} WHERE {_where(State.WAITING)}"
            f" UNION ALL SELECT 'running', count(*) FROM {{items}} WHERE {_where(State.RUNNING)}"
            f" UNION ALL SELECT state, count(*) FROM {{items}} WHERE queue = :queue AND ended_at IS NOT NULL AND {kept}"
            " GROUP BY state"
        )
        """state, count."""
        self.delayed = say(f"SELECT count(*) FROM {{items}} WHERE {_where(State.WAITING)} AND ready_at > {{now}}")
        self.show = say(f"SELECT {columns} FROM {{items}} WHERE {one} AND {kept}")
        self.peek = {
            state: say(
                f"SELECT {columns} FROM {{items}} WHERE seq IN (SELECT seq FROM {{items}} WHERE {_where(state)} AND {kept}"
                f" ORDER BY {_order(state)} LIMIT :limit) ORDER BY {_order(state)}"
            )
            for state in State
        }
        """Up to `:limit` of a state, as people want them sorted: a `record` for each."""


def _where(state: State) -> str:
    """The items of a state: by an index."""
    ended = "" if state in (State.WAITING, State.RUNNING) else " AND ended_at IS NOT NULL"
    return f"queue = :queue AND state = '{state.value}'{ended}"


def _order(state: State) -> str:
    """Of those that wait, the order of claims; of others, the latest first."""
    if state is State.WAITING:
        return "ready_at > {now}, priority, ready_at, seq"
    return f"{'started_at' if state is State.RUNNING else 'ended_at'} DESC, seq DESC"


# ---- put ----


@dataclass(kw_only=True)
class Plan:
    """What a put does: a receipt for each draft, the ids that make room, the rows that come."""

    COLUMNS = (
        "n bigint, id text, payload text, priority bigint, delay float, at float, expire float, key text, lifetime float,"
        " in_group text, keep bigint"
    )
    receipts: list[Receipt] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    """Of those that were stored before."""
    drafts: dict[str, Draft] = field(default_factory=dict)
    """Those that are to be stored, in their order."""

    @property
    def grows(self) -> int:
        """By how many items more wait afterwards."""
        return len(self.drafts) - len(self.gone)

    def rows(self, settings: Settings) -> list[Sequence[object]]:
        """As `insert` takes them."""
        unique = settings.spec.unique
        lifetime = float(unique.lifetime) if unique is not None and not isinstance(unique.lifetime, str) else None
        return [
            (
                n, draft.id, draft.payload.decode(), draft.priority, draft.delay, draft.at, draft.expire,
                draft.key, None if draft.key is None else lifetime, draft.group, int(draft.keep),
            )
            for n, draft in enumerate(self.drafts.values())
        ]  # fmt: skip


def plan_put(
    drafts: Sequence[Draft], known: Collection[str], holders: Mapping[str, tuple[str, str]], settings: Settings
) -> Plan:
    """What becomes of `drafts`, one after another. `known`: ids that there are; `holders`: by key, the id and state of who has
    it."""
    plan, holders = Plan(), dict(holders)
    on_conflict = settings.spec.unique.on_conflict if settings.spec.unique is not None else "reject"
    for draft in drafts:
        holder, state = holders.get(draft.key, ("", "")) if draft.key is not None else ("", "")
        what: Literal["stored", "known", "merged", "replaced", "rejected"] = "stored"
        if draft.id in known or draft.id in plan.drafts:
            what = "known"
        elif holder and on_conflict == "replace" and state == State.WAITING.value:
            what = "replaced"
            if plan.drafts.pop(holder, None) is None:
                plan.gone.add(holder)
        elif holder:
            what = "merged" if on_conflict == "merge" else "rejected"
        if what in ("stored", "replaced"):
            plan.drafts[draft.id] = draft
            if draft.key is not None:
                holders[draft.key] = (draft.id, State.WAITING.value)
        plan.receipts.append(Receipt(id=holder if what in ("merged", "rejected") else draft.id, what=what))
    return plan


# ---- claim ----


@dataclass(kw_only=True)
class Choice:
    """Candidates, sorted: what is to run, and what is dead."""

    run: list[int] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    full: set[str] = field(default_factory=set)
    """The groups of which no more may run."""
    begun: Counter[str] = field(default_factory=Counter)
    """How many of each group run by this choice."""


def choose(
    candidates: Iterable[tuple[int, int, str | None, str]], choice: Choice, running: Mapping[str, int], *, limit: int,
    attempts: int, per_key: int
) -> bool:  # fmt: skip
    """Add to `choice` what of `candidates` (seq, attempts, in_group, id) fits: up to `limit` in all. `running`: how many of a
    group run before this. False: some did not fit, since their group is full now: there may be others behind them."""
    fitted = True
    for seq, claims, group, _ in candidates:
        if claims >= attempts:
            choice.dead.append(seq)
        elif len(choice.run) == limit:
            break
        elif group is None:
            choice.run.append(seq)
        elif group in choice.full:
            fitted = False
        else:
            choice.run.append(seq)
            choice.begun[group] += 1
            if choice.begun[group] + running.get(group, 0) >= per_key:
                choice.full.add(group)
    return fitted


def burst(rate: Rate) -> int:
    """How many tokens of a `rate` may be saved up: a twentieth of a second's, one at least."""
    return max(1, int(rate / 20))


# ---- finish ----


class Held(msgspec.Struct, frozen=True, array_like=True):
    """An item that is claimed, as `held` finds it."""

    id: str
    token: int
    seq: int
    cancelling: int
    keep: int
    taken_until: float | None
    group: str | None
    now: float


@dataclass(kw_only=True)
class Finish:
    """What a finish does: an answer for each ending, and what becomes of the rows."""

    ENDED = "seq bigint, state text, forget_at float, result text, error text, traceback text"
    RETRIED = "seq bigint, wait float, error text, traceback text"
    answers: list[bool] = field(default_factory=list)
    dropped: list[tuple[int]] = field(default_factory=list)
    ended: list[tuple[int, str, float | None, str | None, str | None, str | None]] = field(default_factory=list)
    retried: list[tuple[int, float, str | None, str | None]] = field(default_factory=list)
    back: list[tuple[int]] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    """The ids of those that have ended."""


def plan_finish(endings: Sequence[Ending], found: Iterable[Held], settings: Settings) -> Finish:
    """What becomes of items that were `found` claimed. Whoever comes first has ended it; others are told that they lost it."""
    held, finish = {(each.id, each.token): each for each in found}, Finish()
    for ending in endings:
        item = held.pop((ending.id, ending.token), None)
        finish.answers.append(item is not None)
        if item is None:
            continue
        how = "cancelled" if item.cancelling and ending.how in ("retry", "back") else ending.how
        if how == "retry":
            finish.retried.append((item.seq, ending.delay, ending.error, ending.traceback))
        elif how == "back":
            finish.back.append((item.seq,))
        else:
            finish.over.append(item.id)
            _end(finish, item, how, ending, settings)
    return finish


def _end(finish: Finish, item: Held, how: str, ending: Ending, settings: Settings) -> None:
    key_holds = (item.taken_until or 0.0) > item.now
    if how == "done" and ending.result is None and not item.keep and not key_holds:
        finish.dropped.append((item.seq,))
        return
    forget_at = None if how == "dead" else max(item.now + settings.spec.keep_results, item.taken_until or 0.0)
    result = None if ending.result is None else ending.result.decode()
    finish.ended.append((item.seq, how, forget_at, result, ending.error, ending.traceback))


# ---- people ----


def record(row: Sequence[Any]) -> Record:
    """A row of `COLUMNS`."""
    found = dict(zip(COLUMNS, row, strict=True))
    done, total = found.pop("done"), found.pop("total")
    found |= {
        "state": State(found["state"]),
        "group": found.pop("in_group"),
        "payload": as_bytes(found["payload"]),
        "result": None if found["result"] is None else as_bytes(found["result"]),
        "progress": None if done is None else (done, total),
        "cancelling": bool(found["cancelling"]),
    }
    return Record(**found)


def as_bytes(text: str | bytes) -> bytes:
    """JSON, as a database gives it."""
    return text.encode() if isinstance(text, str) else bytes(text)
