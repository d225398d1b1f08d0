"""What a put does to the rows of a queue in SQLite.

put     stores drafts, whole or not at all
Plan    what becomes of them
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from supervisor.queues.protocol import Draft, QueueFull, Receipt, Settings, State
from supervisor.queues.sqlite_rows import AMONG, LARGE, Rows, as_json, given

_INSERT_PLAIN = f"""
    INSERT INTO items (queue, id, payload, priority, put_at, ready_at)
    SELECT :queue, id, CAST(payload AS BLOB), priority, :now, :now FROM {given("id payload priority")}
"""
"""Most drafts ask for nothing special: that is half the work."""

_INSERT = f"""
    INSERT INTO items (queue, id, payload, priority, put_at, ready_at, expires_at, key, in_group, keep)
    SELECT :queue, id, CAST(payload AS BLOB), priority, :now, ready_at, ready_at + expire, key, in_group, keep FROM (
        SELECT *, max(:now + delay, coalesce(at, 0)) AS ready_at
        FROM {given("id payload priority delay at expire key in_group keep")}
    )
"""

_INSERT_LARGE = "INSERT INTO large SELECT seq, CAST(:payload AS BLOB) FROM items WHERE queue = :queue AND id = :id"

_HOLDERS = f"""
    SELECT keys.key, keys.id, state FROM keys LEFT JOIN items ON items.queue = keys.queue AND items.id = keys.id
    WHERE keys.queue = :queue AND keys.key IN {AMONG} AND (until > :now OR (until IS NULL AND state IN ('waiting', 'running')))
"""


def put(rows: Rows, drafts: Sequence[Draft]) -> Plan:
    """Store all of these, or none."""
    plan = plan_put(drafts, _known(rows, drafts), _holders(rows, drafts), rows.settings)
    if plan.grows > 0:
        _make_sure_of_room(rows, plan.grows)
    rows.remove(plan.gone)
    _insert(rows, plan.drafts.values())
    if plan.kept:
        rows.keep(plan.kept)
    rows.take_keys(plan.drafts)
    rows.more_wait(plan.grows)
    rows.forget()
    return plan


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


def _known(rows: Rows, drafts: Sequence[Draft]) -> set[str]:
    """The ids of these that there are. Those that should be forgotten by now are."""
    ids = as_json(draft.id for draft in drafts)
    found = rows.find(_Known, f"SELECT id, forget_at FROM items WHERE queue = :queue AND id IN {AMONG}", rows=ids)
    over = [each.id for each in found if each.forget_at is not None and each.forget_at <= rows.now]
    rows.remove(over)
    return {each.id for each in found}.difference(over)


class _Known(NamedTuple):
    id: str
    forget_at: float | None


def _holders(rows: Rows, drafts: Sequence[Draft]) -> dict[str, Holder]:
    """Who has the keys of these."""
    keys = [draft.key for draft in drafts if draft.key is not None]
    if rows.spec.unique is None or not keys:
        return {}
    rows.do("DELETE FROM keys WHERE queue = :queue AND until <= :now")
    return {holder.key: holder for holder in rows.find(Holder, _HOLDERS, rows=as_json(keys))}


def _make_sure_of_room(rows: Rows, more: int) -> None:
    size, waiting = rows.spec.size, rows.head().waiting
    if more > size:
        raise QueueFull(f"queue {rows.queue} takes {size} items in all, and these are {more}: put fewer at once")
    if waiting + more > size:
        raise QueueFull(f"queue {rows.queue} is full: {waiting} of {size} items wait, and there is no room for {more}")


def _insert(rows: Rows, drafts: Collection[Draft]) -> None:
    if any(map(_is_special, drafts)):
        rows.do(_INSERT, rows=as_json(map(_special, drafts)))
    else:
        rows.do(_INSERT_PLAIN, rows=as_json(map(_plain, drafts)))
    for draft in drafts:
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


def _special(draft: Draft) -> tuple[object, ...]:
    said = draft.delay, draft.at, draft.expire, draft.key, draft.group, int(draft.keep)
    return *_plain(draft), *said


def is_full(rows: Rows) -> bool:
    """Whether no more items may wait."""
    return rows.head().waiting >= rows.spec.size
