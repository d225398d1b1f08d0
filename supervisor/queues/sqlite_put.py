"""What a put does to the rows of a queue in SQLite.

put     stores drafts, whole or not at all
Plan    what becomes of them
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from supervisor.queues.protocol import Draft, QueueFull, Receipt, Settings, State
from supervisor.queues.sqlite_rows import AMONG, LARGE, OVERDUE, WAITING, Rows, Some, as_json, given

What = Literal["stored", "known", "merged", "replaced", "rejected"]

_LOOK = f"""
    SELECT coalesce(max(waiting), 0),
        (SELECT json_group_array(json_array(seq, id, forget_at)) FROM items WHERE queue = :queue AND id IN {AMONG}),
        EXISTS (SELECT 1 FROM items WHERE queue = :queue AND forget_at <= :now)
    FROM queues WHERE queue = :queue
"""
"""A row in any case."""

_INSERT_PLAIN = f"""
    INSERT INTO items (queue, id, payload, priority, put_at, ready_at)
    SELECT :queue, id, CAST(payload AS BLOB), priority, :now, :now FROM {given("id payload priority")}
"""
"""Most drafts ask for nothing special: that is half the work."""

_INSERT = f"""
    INSERT INTO items (queue, id, payload, priority, put_at, ready_at, expires_at, key, in_group, keep, seq)
    SELECT
        :queue, id, CAST(payload AS BLOB), priority, :now, coalesce(since, due), due + expire, key, in_group, keep, place
    FROM (
        SELECT *, max(:now + delay, coalesce(at, 0)) AS due
        FROM {given("id payload priority delay at expire key in_group keep since place")}
    )
"""
"""`since`, `place`: where what is replaced stood, since when it could be claimed."""

_INSERT_LARGE = "INSERT INTO large SELECT seq, CAST(:payload AS BLOB) FROM items WHERE queue = :queue AND id = :id"

_HOLDERS = f"""
    SELECT keys.key, keys.id, state, coalesce(seq, 0), coalesce(keep, 0), in_group, priority, coalesce(ready_at, 0.0)
    FROM keys LEFT JOIN items ON items.queue = keys.queue AND items.id = keys.id
    WHERE keys.queue = :queue AND keys.key IN {AMONG} AND (until > :now OR (until IS NULL AND state IN ('waiting', 'running')))
"""

_ROOM = f"""
    SELECT coalesce(max(waiting), 0), (SELECT count(*) FROM items WHERE {OVERDUE}),
        (SELECT min(expires_at) FROM items WHERE {WAITING} AND expires_at > :now)
    FROM queues WHERE queue = :queue
"""


def put(rows: Rows, drafts: Sequence[Draft]) -> Plan:
    """Store all of these, or none."""
    waiting, known = _look(rows, drafts)
    plan = plan_put(drafts, known, _holders(rows, drafts), rows.settings, rows.now)
    if plan.grows > 0:
        plan.expired = _make_room(rows, waiting, plan.grows)
    rows.drop([holder.seq for holder in plan.gone])
    _insert(rows, plan)
    if plan.kept:
        rows.keep(plan.kept)
    rows.take_keys([draft.id for draft in plan.drafts if draft.key is not None])
    rows.more_wait(plan.grows)
    rows.unpark(holder.group for holder in plan.gone)
    return plan


@dataclass(kw_only=True)
class Plan:
    """What a put does."""

    receipts: list[Receipt] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    """Those that are to be stored, in their order."""
    places: dict[str, int] = field(default_factory=dict)
    """Where among those they are, by their ids."""
    instead: dict[str, Holder] = field(default_factory=dict)
    """By the id of a draft, whose place in line it has."""
    gone: list[Holder] = field(default_factory=list)
    """Those that were there, and make room."""
    kept: set[str] = field(default_factory=set)
    """The ids of those whose end somebody else waits for, too."""
    expired: list[Some] = field(default_factory=list)
    """What had waited for too long, and has made room."""

    @property
    def grows(self) -> int:
        """By how many more items wait afterwards."""
        return len(self.drafts) - len(self.gone)

    @property
    def told(self) -> list[str]:
        """The ids of those that have ended, and that somebody waits for."""
        return [each.id for each in self.gone if each.keep] + [each.id for each in self.expired if each.keep]

    def answer(self, draft: Draft, id: str, what: What) -> None:
        """That became of a draft; `id`: which item stands for it."""
        self.receipts.append(Receipt(id=id, what=what))
        if draft.keep and what in ("known", "merged"):
            self.kept.add(id)

    def store(self, draft: Draft) -> None:
        """It is new."""
        self.places[draft.id] = len(self.drafts)
        self.drafts.append(draft)

    def replace(self, holder: Holder, draft: Draft, now: float) -> None:
        """It comes in the place of an item that waits, or of a draft before it."""
        at = self.places.pop(holder.id, None)
        instead: Holder | None = holder
        if at is None:
            self.gone.append(holder)
            self.store(draft)
        else:
            self.places[draft.id], self.drafts[at] = at, draft
            instead = self.instead.pop(holder.id, None)
        if instead is not None and instead.is_stood_in_for_by(draft, now):
            self.instead[draft.id] = instead


def plan_put(
    drafts: Iterable[Draft], known: Collection[str], holders: Mapping[str, Holder], settings: Settings, now: float
) -> Plan:
    """What becomes of `drafts`, one after another. `known`: the ids that there are; `holders`: by key, who has it."""
    plan, holders, unique = Plan(), dict(holders), settings.spec.unique
    for draft in drafts:
        holder = None if unique is None or draft.key is None else holders.get(draft.key)
        if draft.id in known or draft.id in plan.places:
            plan.answer(draft, draft.id, "known")
        elif unique is None or holder is None:
            plan.store(draft)
            plan.answer(draft, draft.id, "stored")
        elif unique.on_conflict == "replace" and holder.state == State.WAITING.value:
            plan.replace(holder, draft, now)
            plan.answer(draft, draft.id, "replaced")
        else:
            plan.answer(draft, holder.id, "merged" if unique.on_conflict == "merge" else "rejected")
        if draft.key is not None and draft.id in plan.places:
            holders[draft.key] = Holder(draft.key, draft.id, State.WAITING.value)
    return plan


class Holder(NamedTuple):
    """Who has a key: an item, which may be gone, or a draft."""

    key: str
    id: str
    state: str | None
    seq: int = 0
    keep: int = 0
    group: str | None = None
    priority: int | None = None
    ready_at: float = 0.0

    def is_stood_in_for_by(self, draft: Draft, now: float) -> bool:
        """Whether a draft stands where this item stood in line."""
        is_due = not draft.delay and (draft.at is None or draft.at <= now)
        return is_due and self.ready_at <= now and draft.priority == self.priority


def _look(rows: Rows, drafts: Sequence[Draft]) -> tuple[int, set[str]]:
    """How many wait, and the ids of these that there are. Those that should be forgotten by now are."""
    ids = as_json(draft.id for draft in drafts)
    waiting, found, over = rows.execute(_LOOK, {"rows": ids}).fetchone()
    known = msgspec.json.decode(found, type=list[_Known])
    if over:
        rows.forget([each.seq for each in known if each.is_over(rows.now)])
    return waiting, {each.id for each in known if not each.is_over(rows.now)}


class _Known(NamedTuple):
    seq: int
    id: str
    forget_at: float | None

    def is_over(self, now: float) -> bool:
        return self.forget_at is not None and self.forget_at <= now


def _holders(rows: Rows, drafts: Sequence[Draft]) -> dict[str, Holder]:
    """Who has the keys of these."""
    keys = [draft.key for draft in drafts if draft.key is not None]
    if rows.spec.unique is None or not keys:
        return {}
    rows.do("DELETE FROM keys WHERE queue = :queue AND until <= :now")
    return {holder.key: holder for holder in rows.find(Holder, _HOLDERS, rows=as_json(keys))}


def _make_room(rows: Rows, waiting: int, more: int) -> list[Some]:
    """Make sure that there is room; what has expired to make it."""
    size, expired = rows.spec.size, list[Some]()
    if more > size:
        raise QueueFull(f"queue {rows.queue} takes {size} items in all, and these are {more}: put fewer at once")
    while (free := size - waiting + len(expired)) < more:
        some = rows.expire()
        if not some:
            raise QueueFull(f"queue {rows.queue} is full: {size - free} of {size} items wait, and there is no room for {more}")
        expired += some
    return expired


def _insert(rows: Rows, plan: Plan) -> None:
    if any(map(_is_special, plan.drafts)):
        ordered = sorted(plan.drafts, key=lambda draft: draft.id not in plan.instead)  # else others may be given their places
        rows.do(_INSERT, rows=as_json(_special(draft, plan.instead.get(draft.id)) for draft in ordered))
    elif plan.drafts:
        rows.do(_INSERT_PLAIN, rows=as_json(map(_plain, plan.drafts)))
    for draft in plan.drafts:
        if len(draft.payload) > LARGE:
            rows.do(_INSERT_LARGE, id=draft.id, payload=draft.payload)


def _is_special(draft: Draft) -> bool:
    """Whether a draft says more than its payload and priority."""
    return bool(
        draft.delay or draft.at is not None or draft.expire is not None or draft.key is not None or draft.group is not None
        or draft.keep
    )  # fmt: skip


def _plain(draft: Draft) -> tuple[object, ...]:
    return draft.id, draft.payload.decode() if len(draft.payload) <= LARGE else None, draft.priority


def _special(draft: Draft, instead: Holder | None) -> tuple[object, ...]:
    said = draft.delay, draft.at, draft.expire, draft.key, draft.group, int(draft.keep)
    place = (None, None) if instead is None else (instead.ready_at, instead.seq)
    return *_plain(draft), *said, *place


def room_at(rows: Rows) -> float | None:
    """When there will be room, if nothing else happens: now, or when the next one expires."""
    waiting, overdue, expiring = rows.execute(_ROOM, {}).fetchone()
    return rows.now if waiting - overdue < rows.spec.size else expiring
