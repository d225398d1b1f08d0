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
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from supervisor.policies.rate import ROUNDING, Bucket
from supervisor.queues.protocol import Demand, Item, Record, State
from supervisor.queues.sqlite_rows import AMONG, RECORD, RUNNING, SOME, WAITING, Level, Rows, Some, as_json, levels

AT_ONCE = 64 << 20
"""Bytes of payloads in one claim; one item is always taken, however large."""

LOOKED_AT = 10_000
"""Items that one claim looks at: where most are of groups that are full, it goes on with the next one."""

_EXPIRING = f"SELECT coalesce(min(expires_at), 9e999) FROM items WHERE {WAITING} AND expires_at IS NOT NULL"

_LOOK = f"""
    SELECT coalesce(max(paused), 0), coalesce(max(full_at), 0.0),
        ({_EXPIRING}),
        (SELECT json_group_array(json_array(priority, first, later)) FROM ({levels(parked=0)})),
        EXISTS (SELECT 1 FROM items WHERE queue = :queue AND forget_at <= :now)
    FROM queues WHERE queue = :queue
"""
"""A row in any case."""

_CANDIDATES = f"""
    SELECT seq, id, token, CAST(payload AS TEXT),
        coalesce(length(payload), (SELECT length(payload) FROM large WHERE large.seq = items.seq)),
        attempts, in_group, put_at, ready_at, expires_at, keep
    FROM items
    WHERE {WAITING} AND parked = 0 AND priority = :priority AND ready_at <= :now
        AND (expires_at IS NULL OR expires_at > :now)
    ORDER BY ready_at, seq LIMIT :limit
"""

_CLAIM = f"""
    UPDATE items SET
        state = 'running', attempts = attempts + 1, token = token + 1, started_at = :now, owner = :owner,
        done = NULL, total = NULL
    WHERE seq IN {AMONG}
"""

_GROUPS = f"""
    SELECT in_group, count(*) FROM items WHERE {RUNNING} AND in_group IN {AMONG} GROUP BY in_group
"""


@dataclass(kw_only=True)
class Taken:
    """What a claim has come to."""

    items: list[Item] = field(default_factory=list)
    dead: list[Record] = field(default_factory=list)
    expired: int = 0
    told: list[str] = field(default_factory=list)
    """The ids of those that have ended, and that somebody waits for."""
    due: float | None = None
    """When another claim may bring something, if nothing else happens."""

    def add_expired(self, those: Sequence[Some]) -> None:
        """These have expired."""
        self.expired += len(those)
        self.told += [each.id for each in those if each.keep]


def claim(rows: Rows, demand: Demand) -> Taken:
    """Take items that may run."""
    look, taken = _look(rows), Taken()
    if look.expiring <= rows.now:
        taken.add_expired(rows.expire())
        look = _look(rows)
    limits = _Limits(rows, look)
    choice = Choice(limit=min(demand.limit, limits.free), attempts=demand.attempts, per_key=rows.spec.per_key)
    for level in sorted(look.levels, key=_Order(demand.order).place):
        _claim_from(rows, level.priority, choice, demand.owner, taken)
    limits.spend(len(taken.items))
    if look.expiring in choice.expiring:
        look = look._replace(expiring=_expiring(rows))
    taken.due = rows.now if choice.freed else _due(look, limits, rows.now, drained=choice.goes_on)
    if look.over:
        rows.forget()
    return taken


def due(rows: Rows) -> float | None:
    """When a claim may bring something, if nothing else happens; too early where it will only meet full groups."""
    look = _look(rows)
    return _due(look, _Limits(rows, look), rows.now, drained=False)


def _due(look: _Look, limits: _Limits, now: float, *, drained: bool) -> float | None:
    """`drained`: whether all that was ready is claimed, or parked."""
    moments = [level.later if drained and level.first <= now else level.first for level in look.levels]
    ready = min((moment for moment in moments if moment is not None), default=math.inf)
    moment = min(look.expiring, max(ready, limits.due))
    return None if moment == math.inf else moment


# ---- what there is ----


class _Look(NamedTuple):
    """A queue before a claim. `expiring`: when the first item expires; `over`: whether something is to be forgotten."""

    paused: int
    full_at: float
    expiring: float
    levels: Sequence[Level]
    over: int


def _look(rows: Rows) -> _Look:
    paused, full_at, expiring, found, over = rows.execute(_LOOK, {}).fetchone()
    there = msgspec.json.decode(found, type=list[Level])
    return _Look(paused, full_at, expiring, there, over)


def _expiring(rows: Rows) -> float:
    """When the first item expires."""
    return float(rows.execute(_EXPIRING, {}).fetchone()[0])


class _Limits:
    """How many may begin, whatever waits."""

    def __init__(self, rows: Rows, look: _Look) -> None:
        self._rows = rows
        self._bucket = _bucket(rows, look)
        self._places = 0 if look.paused else sys.maxsize
        if rows.spec.concurrency is not None:
            self._places = min(self._places, rows.spec.concurrency - rows.running())

    @property
    def free(self) -> int:
        """How many may begin now."""
        tokens = sys.maxsize if self._bucket is None else int(self._bucket.tokens(self._rows.now) + ROUNDING)
        return min(self._places, tokens)

    @property
    def due(self) -> float:
        """When one may begin, if nothing else happens."""
        if self._places <= 0:
            return math.inf
        return -math.inf if self._bucket is None else self._bucket.due

    def spend(self, count: int) -> None:
        """So many have begun."""
        self._places -= count
        if count and self._bucket is not None:
            for _ in range(count):
                self._bucket.take(self._rows.now)
            self._rows.set("full_at", self._bucket.full_at)


def _bucket(rows: Rows, look: _Look) -> Bucket | None:
    if rows.spec.rate is None:
        return None
    bucket = Bucket(rows.spec.rate, max(int(rows.spec.rate), 1))
    if look.full_at <= rows.now + bucket.burst * bucket.interval:  # else the clock was set back: begin anew
        bucket.full_at = look.full_at
    return bucket


# ---- what is taken ----


class _Order:
    """The order of priorities: those that are named first, as they are named, then the others."""

    def __init__(self, named: Sequence[int]) -> None:
        self._places = {priority: place for place, priority in enumerate(named)}

    def place(self, level: Level) -> tuple[float, int]:
        return self._places.get(level.priority, math.inf), level.priority


@dataclass(kw_only=True)
class Choice:
    """What may be claimed. `limit`: so many more; `groups`: how many of each run, those that are chosen included."""

    limit: int
    attempts: int
    per_key: int
    groups: Counter[str] = field(default_factory=Counter)
    size: int = 0
    looked_at: int = 0
    expiring: set[float | None] = field(default_factory=set)
    """When those that are chosen would have expired."""
    freed: bool = False
    """Whether others may run since those that are chosen are dead."""

    @property
    def goes_on(self) -> bool:
        """Whether it may take more."""
        return self.limit > 0 and self.looked_at < LOOKED_AT

    def choose(self, candidates: Iterable[Candidate]) -> Chosen:
        """What becomes of candidates, in their order; of the first, in any case, something does."""
        chosen = Chosen([], [], [])
        for each in candidates:
            self.looked_at += 1
            if each.attempts >= self.attempts:
                chosen.dead.append(each)
                self.freed = self.freed or each.group is not None
            elif not self.limit:
                break
            elif each.group is None or self.groups[each.group] < self.per_key:
                self._take(each)
                chosen.run.append(each)
            else:
                chosen.parked.append(each)
        return chosen

    def _take(self, one: Candidate) -> None:
        if one.group is not None:
            self.groups[one.group] += 1
        self.expiring.add(one.expires_at)
        self.size += one.size
        self.limit = self.limit - 1 if self.size < AT_ONCE else 0


class Chosen(NamedTuple):
    """What runs, what has no attempt left, and what waits for another of its group to end."""

    run: list[Candidate]
    dead: list[Candidate]
    parked: list[Candidate]


class Candidate(NamedTuple):
    """An item that may be claimed."""

    seq: int
    id: str
    token: int
    payload: str | None
    """None: it is a large one."""
    size: int
    attempts: int
    group: str | None
    put_at: float
    ready_at: float
    expires_at: float | None
    keep: int


def _claim_from(rows: Rows, priority: int, choice: Choice, owner: str, taken: Taken) -> None:
    """Claim of one priority: page by page, since of each some may be dead, or of a group that is full."""
    page = min(choice.limit, SOME)
    while choice.goes_on:
        found = rows.find(Candidate, _CANDIDATES, priority=priority, limit=page)
        _count_groups(rows, choice, found)
        chosen = choice.choose(found)
        taken.items += _run(rows, chosen.run, priority, owner)
        taken.dead += _bury(rows, chosen.dead)
        taken.told += [each.id for each in chosen.dead if each.keep]
        rows.park([each.seq for each in chosen.parked])
        if len(found) < page:
            break
        page = min(4 * page, SOME)


def _count_groups(rows: Rows, choice: Choice, found: Iterable[Candidate]) -> None:
    """Let it know how many run of the groups of these."""
    new = {each.group for each in found if each.group is not None} - choice.groups.keys()
    if new:
        running = {each.name: each.running for each in rows.find(_Group, _GROUPS, rows=as_json(new))}
        choice.groups.update(dict.fromkeys(new, 0) | running)


class _Group(NamedTuple):
    name: str
    running: int


def _run(rows: Rows, those: Sequence[Candidate], priority: int, owner: str) -> list[Item]:
    if not those:
        return []
    seqs = [each.seq for each in those]
    rows.do(_CLAIM, rows=as_json(seqs), owner=owner)
    rows.free_keys(seqs, claimed=True)
    rows.more_wait(-len(seqs))
    return [
        Item(
            id=each.id, token=each.token + 1, payload=_payload(rows, each), attempt=each.attempts + 1, priority=priority,
            group=each.group, put_at=each.put_at, ready_at=each.ready_at,
        )
        for each in those
    ]  # fmt: skip


def _payload(rows: Rows, one: Candidate) -> bytes:
    if one.payload is not None:
        return one.payload.encode()
    (payload,) = rows.execute("SELECT payload FROM large WHERE seq = :seq", {"seq": one.seq}).fetchone()
    return bytes(payload)


def _bury(rows: Rows, those: Sequence[Candidate]) -> list[Record]:
    if not those:
        return []
    rows.end(those, State.DEAD)
    rows.more_wait(-len(those))
    return rows.records(f"SELECT {RECORD} FROM items WHERE seq IN {AMONG}", rows=as_json(each.seq for each in those))
