"""What the end of claims does to the rows of a queue in SQLite.

finish    stores what became of items
Finish    what that is
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from supervisor.queues.protocol import Ending, Item
from supervisor.queues.sqlite_rows import AMONG, LARGE, RUNNING, Rows, as_json, given

_HELD = f"SELECT id, token, seq, cancelling, keep, in_group FROM items WHERE {RUNNING} AND id IN {AMONG}"

_END = f"""
    UPDATE items SET
        state = ending.state, ended_at = :now, forget_at = ending.forget_at, cancelling = 0, result = ending.result,
        error = ending.error, traceback = ending.traceback
    FROM {given("seq state forget_at result error traceback")} AS ending WHERE items.seq = ending.seq
"""

_RETRY = f"""
    UPDATE items SET
        state = 'waiting', ready_at = :now + ending.delay,
        expires_at = :now + ending.delay + (expires_at - max(ready_at, put_at)),
        error = ending.error, traceback = ending.traceback
    FROM {given("seq delay error traceback")} AS ending WHERE items.seq = ending.seq
"""
"""Its time to expire begins anew, too."""


def finish(rows: Rows, endings: Sequence[Ending]) -> Finish:
    """Store what became of items that run."""
    plan = plan_finish(endings, held(rows, endings), rows.forget_at)
    rows.free_keys([*plan.dropped, *(row[0] for row in plan.ended)])
    rows.drop(plan.dropped)
    if plan.ended:
        rows.do(_END, rows=as_json(plan.ended))
    for seq, result in plan.large:
        rows.do("UPDATE items SET result = CAST(:result AS TEXT) WHERE seq = :seq", seq=seq, result=result)
    if plan.retried:
        rows.do(_RETRY, rows=as_json(plan.retried))
    if plan.back:
        back = f"UPDATE items SET state = 'waiting', attempts = attempts - 1 WHERE seq IN {AMONG}"
        rows.do(back, rows=as_json(plan.back))
    rows.wait_again([*plan.back, *(row[0] for row in plan.retried)])
    rows.unpark(plan.groups)
    return plan


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
    groups: list[str | None] = field(default_factory=list)
    """Of which one less runs."""
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
        finish.groups.append(item.group)
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


def held(rows: Rows, items: Sequence[Item | Ending]) -> list[Held]:
    """Those of these that run; each has the token of its last claim."""
    return rows.find(Held, _HELD, rows=as_json(item.id for item in items))


class Held(NamedTuple):
    """An item that is claimed."""

    id: str
    token: int
    seq: int
    cancelling: int
    keep: int
    group: str | None


def progress(rows: Rows, item: Item, done: float, total: float | None) -> None:
    """Note how far an item is."""
    rows.do(
        f"UPDATE items SET done = :done, total = :total WHERE {RUNNING} AND id = :id AND token = :token",
        id=item.id, token=item.token, done=done, total=total,
    )  # fmt: skip
