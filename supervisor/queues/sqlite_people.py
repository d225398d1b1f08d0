"""What is done to a queue in SQLite as a whole, and what people ask of it: settings, counts, cancel, requeue, purge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from supervisor.queues.protocol import Counts, Record, Settings, State, packed, unpacked
from supervisor.queues.sql import WORKER_LOST
from supervisor.queues.sqlite_rows import (
    AMONG,
    KNOWN,
    OVERDUE,
    RECORD,
    RUNNING,
    SOME,
    STATE,
    WAITING,
    Rows,
    Some,
    as_json,
    levels,
)

_WAIT_AGAIN = "state = 'waiting', expires_at = :now + (expires_at - max(ready_at, put_at)), ready_at = :now"

_COUNTS = f"""
    SELECT state, count(*) FROM items WHERE queue = :queue AND ended_at IS NOT NULL AND {KNOWN} GROUP BY state
"""

_WAIT = f"""
    SELECT
        coalesce(max(waiting), 0), coalesce(max(paused), 0), (SELECT count(*) FROM items WHERE {OVERDUE}),
        (SELECT count(*) FROM items WHERE {WAITING} AND ready_at > :now),
        (SELECT min(first) FROM (SELECT first FROM ({levels(parked=0)}) UNION ALL SELECT first FROM ({levels(parked=1)})))
    FROM queues WHERE queue = :queue
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
            SELECT seq FROM items WHERE {_of(state)} AND {KNOWN} AND {STATE} = '{state.value}' ORDER BY {order} LIMIT :limit
        ) ORDER BY {order}
    """


_PEEK = {state: _peek(state) for state in State}
_SOME = {
    state: f"""
        SELECT seq, id, keep, in_group FROM items WHERE {_of(state)} AND coalesce(ended_at, put_at) <= :before LIMIT :limit
    """
    for state in State
}


def begin(rows: Rows) -> None:
    """What is claimed was claimed by a daemon that is no more: it waits again, its attempt counted."""
    left = rows.find(_Left, f"SELECT seq, id, in_group, cancelling FROM items WHERE {RUNNING}")
    rows.end([each for each in left if each.cancelling], State.CANCELLED)
    interrupted = [each for each in left if not each.cancelling]
    rows.do(
        f"UPDATE items SET {_WAIT_AGAIN}, error = :error, traceback = NULL WHERE seq IN {AMONG}",
        rows=as_json(each.seq for each in interrupted), error=WORKER_LOST,
    )  # fmt: skip
    rows.take_keys_again(each.id for each in interrupted)
    rows.unpark_all()
    (waiting,) = rows.execute(f"SELECT count(*) FROM items WHERE {WAITING}", {}).fetchone()
    rows.set("waiting", waiting)


class _Left(NamedTuple):
    """An item that ran."""

    seq: int
    id: str
    group: str | None
    cancelling: int


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
        f"SELECT {STATE}, seq, id, keep, in_group FROM items WHERE queue = :queue AND id = :id AND {KNOWN}", {"id": id}
    ).fetchone()  # fmt: skip
    if found is None:
        return "unknown", False
    state, item = State(found[0]), Some(*found[1:])
    if state is State.WAITING:
        rows.end([item], State.CANCELLED)
        rows.more_wait(-1)
        return "cancelled", bool(item.keep)
    if state is State.RUNNING:
        rows.do("UPDATE items SET cancelling = 1 WHERE seq = :seq", seq=item.seq)
        return "running", False
    return "ended", False


def requeue(rows: Rows, ids: Sequence[str]) -> int:
    """Those of these that are dead wait again; gives how many."""
    found = rows.find(
        Some, f"SELECT seq, id, keep, in_group FROM items WHERE {_of(State.DEAD)} AND id IN {AMONG}", rows=as_json(ids)
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
    if state is State.WAITING:
        rows.more_wait(-len(found))
        rows.unpark(each.group for each in found)
    return found


def _some(rows: Rows, state: State, before: float) -> list[Some]:
    return rows.find(Some, _SOME[state], before=before, limit=SOME)


def pause(rows: Rows, paused: bool) -> None:
    """Have nobody claim anything, or go on."""
    rows.set("paused", int(paused))


def counts(rows: Rows) -> Counts:
    """The queue in numbers."""
    ended = Counter(dict(rows.execute(_COUNTS, {}).fetchall()))
    wait, paused, overdue, delayed, first = rows.execute(_WAIT, {}).fetchone()
    ended[State.EXPIRED.value] += overdue
    waiting = wait - overdue - delayed
    return Counts(
        **ended, waiting=waiting, delayed=delayed, running=rows.running(), paused=bool(paused),
        oldest=rows.now - first if waiting else None,
    )  # fmt: skip


def peek(rows: Rows, state: State, limit: int) -> list[Record]:
    """The next items of a state."""
    return rows.records(_PEEK[state], limit=limit)


def show(rows: Rows, id: str, *, keep: bool = False) -> Record | None:
    """An item, where it is known; with `keep`, its end is kept for who asks."""
    if keep:
        rows.keep([id])
    found = rows.records(f"SELECT {RECORD} FROM items WHERE queue = :queue AND id = :id AND {KNOWN}", id=id)
    return found[0] if found else None
