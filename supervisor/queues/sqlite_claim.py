"""What a claim does to the rows of a queue in SQLite.

claim     takes items that may run
due       when there will be some, if nothing else happens
Choice    what may be taken
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from supervisor.policies.rate import ROUNDING, Bucket
from supervisor.queues.protocol import Claimed, Demand, Item, Record, State
from supervisor.queues.sqlite_rows import AMONG, PAYLOAD, RECORD, RUNNING, SOME, WAITING, Head, Id, Rows, Some, as_json

WHOLE = 1 << 20
"""Bytes of payloads that come out in one text."""

AT_ONCE = 64 << 20
"""Bytes of payloads in one claim; one item is always taken, however large."""

_CANDIDATES = f"""
    SELECT seq, attempts, in_group, coalesce(length(payload), (SELECT length(payload) FROM large WHERE large.seq = items.seq))
    FROM items
    WHERE {WAITING} AND priority = :priority AND ready_at <= :now AND (in_group IS NULL OR in_group NOT IN {AMONG})
    ORDER BY ready_at, seq LIMIT :limit
"""

_CLAIM = f"""
    UPDATE items SET
        state = 'running', attempts = attempts + 1, token = token + 1, started_at = :now, owner = :owner,
        done = NULL, total = NULL
    WHERE seq IN {AMONG}
"""

_TAKEN = f"""
    SELECT seq, id, token, {PAYLOAD}, attempts, priority, in_group, put_at, ready_at FROM items
    WHERE seq IN {AMONG}
"""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a claim has come to."""

    claimed: Claimed
    told: list[str]
    """The ids of those that have ended, and that somebody waits for."""
    due: float | None
    """When another claim may bring something, if nothing else happens."""


def claim(rows: Rows, demand: Demand) -> Taken:
    """Take items that may run."""
    expired = rows.find(Some, f"SELECT seq, id, keep FROM items WHERE {WAITING} AND expires_at <= :now LIMIT {SOME}")
    rows.end([each.seq for each in expired], State.EXPIRED)
    head, groups = rows.head(), _groups(rows)
    choice = Choice(
        limit=min(demand.limit, _allowed(rows, head)), attempts=demand.attempts, per_key=rows.spec.per_key, groups=groups
    )  # fmt: skip
    items: list[Item] = []
    dead: list[Record] = []
    told = [each.id for each in expired if each.keep]
    if choice.limit > 0:
        for priority in sorted((priority for priority, _, _ in rows.levels()), key=_Order(demand.order).place):
            _claim_from(rows, priority, choice, demand.owner, items, dead, told)
    _spend(rows, head, len(items))
    rows.more_wait(-len(items) - len(dead) - len(expired))
    return Taken(
        claimed=Claimed(items=items, dead=dead, expired=len(expired)), told=told,
        due=rows.now if len(items) >= demand.limit else due(rows),
    )  # fmt: skip


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


def _allowed(rows: Rows, head: Head) -> int:
    """How many may be claimed, whatever waits."""
    allowed = 0 if head.paused else sys.maxsize
    if rows.spec.concurrency is not None:
        allowed = min(allowed, rows.spec.concurrency - rows.running())
    if (bucket := _bucket(rows, head)) is not None:
        allowed = min(allowed, int(bucket.tokens(rows.now) + ROUNDING))
    return allowed


def _bucket(rows: Rows, head: Head) -> Bucket | None:
    if rows.spec.rate is None:
        return None
    bucket = Bucket(rows.spec.rate, max(int(rows.spec.rate), 1))
    if head.full_at <= rows.now + bucket.burst * bucket.interval:  # else the clock was set back: begin anew
        bucket.full_at = head.full_at
    return bucket


def _spend(rows: Rows, head: Head, count: int) -> None:
    """Take tokens of the rate, which are there."""
    if count and (bucket := _bucket(rows, head)) is not None:
        for _ in range(count):
            bucket.take(rows.now)
        rows.set("full_at", bucket.full_at)


def _groups(rows: Rows) -> Counter[str]:
    """How many run of each group."""
    statement = f"SELECT in_group, count(*) FROM items WHERE {RUNNING} AND in_group IS NOT NULL GROUP BY in_group"
    return Counter({each.name: each.running for each in rows.find(_Group, statement)})


class _Group(NamedTuple):
    name: str
    running: int


class _Order:
    """The order of priorities: those that are named first, as they are named, then the others."""

    def __init__(self, named: Sequence[int]) -> None:
        self._places = {priority: place for place, priority in enumerate(named)}

    def place(self, priority: int) -> tuple[float, int]:
        return self._places.get(priority, math.inf), priority


def _claim_from(
    rows: Rows, priority: int, choice: Choice, owner: str, items: list[Item], dead: list[Record], told: list[str]
) -> None:
    """Claim of one priority: page by page, since of each some may be dead, or of a group that is full."""
    while page := min(choice.limit, SOME):
        found = _candidates(rows, priority, choice.full, page)
        run, over = choice.choose(found)
        items += _run(rows, run, owner, large=choice.size > WHOLE)
        dead += _bury(rows, over, told)
        if len(found) < page:
            break


def _candidates(rows: Rows, priority: int, full: Iterable[str], limit: int) -> list[Candidate]:
    return rows.find(Candidate, _CANDIDATES, priority=priority, rows=as_json(full), limit=limit)


def _run(rows: Rows, seqs: list[int], owner: str, *, large: bool) -> list[Item]:
    if not seqs:
        return []
    those = as_json(seqs)
    rows.do(_CLAIM, rows=those, owner=owner)
    rows.free_keys(seqs, claimed=True)
    one_by_one = large and [_Taken(*row) for row in rows.execute(_TAKEN, {"rows": those})]
    found = {each.seq: each.item() for each in one_by_one or rows.find(_Taken, _TAKEN, rows=those)}
    return [found[seq] for seq in seqs]


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


def _bury(rows: Rows, seqs: list[int], told: list[str]) -> list[Record]:
    if not seqs:
        return []
    those = as_json(seqs)
    rows.end(seqs, State.DEAD)
    told += [each.id for each in rows.find(Id, f"SELECT id FROM items WHERE seq IN {AMONG} AND keep", rows=those)]
    return rows.records(f"SELECT {RECORD} FROM items WHERE seq IN {AMONG}", rows=those)


def due(rows: Rows) -> float | None:
    """When a claim may bring something, if nothing else happens."""
    (expiring,) = rows.execute(
        f"SELECT min(expires_at) FROM items WHERE {WAITING} AND expires_at IS NOT NULL", {}
    ).fetchone()  # fmt: skip
    moments = [moment for moment in (expiring, _ready(rows)) if moment is not None]
    return min(moments, default=None)


def _ready(rows: Rows) -> float | None:
    """When the next item may be claimed. One whose group is full waits for an end, not for a moment."""
    head = rows.head()
    if head.paused or (rows.spec.concurrency is not None and rows.running() >= rows.spec.concurrency):
        return None
    full = [group for group, running in _groups(rows).items() if running >= rows.spec.per_key]
    moments: list[float] = []
    for priority, first, later in rows.levels():
        if first <= rows.now and _candidates(rows, priority, full, 1):
            moments.append(first)
        elif (moment := first if first > rows.now else later) is not None:
            moments.append(moment)
    bucket = _bucket(rows, head)
    return max(min(moments), -math.inf if bucket is None else bucket.due) if moments else None
