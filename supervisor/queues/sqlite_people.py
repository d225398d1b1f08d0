"""What is done to a queue in SQLite as a whole, and what people ask of it: settings, counts, cancel, requeue, purge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from supervisor.queues.protocol import Counts, Record, Settings, State, packed, unpacked
from supervisor.queues.sql import WORKER_LOST
from supervisor.queues.sqlite_rows import AMONG, KNOWN, RECORD, RUNNING, SOME, WAITING, Rows, Some, as_json

_WAIT_AGAIN = "state = 'waiting', expires_at = :now + (expires_at - ready_at), ready_at = :now"

_COUNTS = f"""
    SELECT 'waiting', count(*) FROM items WHERE {WAITING}
    UNION ALL SELECT state, count(*) FROM items
    WHERE queue = :queue AND ended_at IS NOT NULL AND {KNOWN} GROUP BY state
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
        SELECT {RECORD} FROM items WHERE seq IN (
            SELECT seq FROM items WHERE {_of(state)} AND {KNOWN} ORDER BY {order} LIMIT :limit
        ) ORDER BY {order}
    """


_PEEK = {state: _peek(state) for state in State}
_SOME = {
    state: f"SELECT seq, id, keep FROM items WHERE {_of(state)} AND coalesce(ended_at, put_at) <= :before LIMIT :limit"
    for state in State
}


def begin(rows: Rows) -> None:
    """What is claimed was claimed by a daemon that is no more: it waits again, its attempt counted."""
    left = rows.execute(f"SELECT seq, id, cancelling FROM items WHERE {RUNNING}", {}).fetchall()
    rows.end([seq for seq, _, cancelling in left if cancelling], State.CANCELLED)
    interrupted = as_json([seq for seq, _, cancelling in left if not cancelling])
    rows.do(
        f"UPDATE items SET {_WAIT_AGAIN}, error = :error, traceback = NULL WHERE seq IN {AMONG}",
        rows=interrupted, error=WORKER_LOST,
    )  # fmt: skip
    rows.take_keys_again([id for _, id, cancelling in left if not cancelling])
    (waiting,) = rows.execute(f"SELECT count(*) FROM items WHERE {WAITING}", {}).fetchone()
    rows.set("waiting", waiting)


def declare(rows: Rows) -> None:
    """Store the settings."""
    rows.set("settings", packed(rows.settings))


def declared(rows: Rows) -> Settings | None:
    """The settings that were stored last."""
    found = rows.execute("SELECT settings FROM queues WHERE queue = :queue AND settings IS NOT NULL", {}).fetchone()
    return None if found is None else unpacked(found[0], rows.spec.backend)


def cancel(rows: Rows, id: str) -> tuple[Literal["cancelled", "running", "ended", "unknown"], bool]:
    """What became of it, and whether somebody waits for its end."""
    found = rows.execute(
        f"SELECT seq, state, keep FROM items WHERE queue = :queue AND id = :id AND {KNOWN}", {"id": id}
    ).fetchone()  # fmt: skip
    if found is None:
        return "unknown", False
    seq, state, keep = found
    if state == State.WAITING.value:
        rows.end([seq], State.CANCELLED)
        rows.more_wait(-1)
        return "cancelled", bool(keep)
    if state == State.RUNNING.value:
        rows.do("UPDATE items SET cancelling = 1 WHERE seq = :seq", seq=seq)
        return "running", False
    return "ended", False


def requeue(rows: Rows, ids: Sequence[str]) -> int:
    """Those of these that are dead wait again; gives how many."""
    found = rows.find(
        Some, f"SELECT seq, id, keep FROM items WHERE {_of(State.DEAD)} AND id IN {AMONG}", rows=as_json(ids)
    )  # fmt: skip
    seqs = [each.seq for each in found]
    rows.do(f"UPDATE items SET {_WAIT_AGAIN}, attempts = 0, ended_at = NULL WHERE seq IN {AMONG}", rows=as_json(seqs))
    rows.wait_again(seqs)
    return len(found)


def requeue_some(rows: Rows, before: float) -> int:
    """Some of all that were dead at a moment."""
    return requeue(rows, [each.id for each in _some(rows, State.DEAD, before)])


def purge_some(rows: Rows, state: State, before: float) -> list[Some]:
    """Remove some of those that were there at a moment."""
    found = _some(rows, state, before)
    seqs = [each.seq for each in found]
    rows.free_keys(seqs)
    rows.drop(seqs)
    rows.more_wait(-len(found) if state is State.WAITING else 0)
    return found


def _some(rows: Rows, state: State, before: float) -> list[Some]:
    return rows.find(Some, _SOME[state], before=before, limit=SOME)


def pause(rows: Rows, paused: bool) -> None:
    """Have nobody claim anything, or go on."""
    rows.set("paused", int(paused))


def counts(rows: Rows) -> Counts:
    """The queue in numbers."""
    found = dict(rows.execute(_COUNTS, {}).fetchall())
    (delayed,) = rows.execute(f"SELECT count(*) FROM items WHERE {WAITING} AND ready_at > :now", {}).fetchone()
    first = min((first for _, first, _ in rows.levels()), default=math.inf)
    return Counts(
        **found | {"waiting": found["waiting"] - delayed}, delayed=delayed, running=rows.running(),
        oldest=rows.now - first if first <= rows.now else None, paused=bool(rows.head().paused),
    )  # fmt: skip


def peek(rows: Rows, state: State, limit: int) -> list[Record]:
    """The next items of a state."""
    return rows.records(_PEEK[state], limit=limit)


def show(rows: Rows, id: str, *, keep: bool) -> Record | None:
    """An item, where it is known; with `keep`, its end is kept for who asks."""
    if keep:
        rows.keep([id])
    found = rows.records(f"SELECT {RECORD} FROM items WHERE queue = :queue AND id = :id AND {KNOWN}", id=id)
    return found[0] if found else None
