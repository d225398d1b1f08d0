"""The rows of a queue in SQLite, in one transaction: what all operations on them share.

Rows           asks and changes them; `sqlite_put`, `sqlite_claim`, `sqlite_finish` and `sqlite_people` are the operations
as_json, given    many rows go in as one text, and are there as a table
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from supervisor.queues.protocol import Record, Settings, State
from supervisor.queues.sql import COLUMNS, NO_ATTEMPT_LEFT, record

if TYPE_CHECKING:
    from sqlite3 import Connection, Cursor

R = TypeVar("R")

SOME = 1000
"""Rows that are looked at, or removed, in one go: those behind them wait."""

LARGE = 16 << 10
"""Bytes from which on a payload has a row of its own, since SQLite writes a row anew whenever something of it changes."""

DIGITS = 5
"""Of a moment, behind the point: SQLite writes 15 digits of a number into JSON."""


def given(columns: str) -> str:
    """The rows in `:rows`, a JSON array of arrays, with these columns."""
    picked = ", ".join(f"json_extract(value, '$[{at}]') AS {name}" for at, name in enumerate(columns.split()))
    return f"(SELECT {picked} FROM json_each(:rows))"


AMONG = "(SELECT value FROM json_each(:rows))"
WAITING = "queue = :queue AND state = 'waiting'"
RUNNING = "queue = :queue AND state = 'running'"
PAYLOAD = "CAST(coalesce(payload, (SELECT payload FROM large WHERE large.seq = items.seq)) AS TEXT)"
KNOWN = "(forget_at IS NULL OR forget_at > :now)"
RECORD = ", ".join(COLUMNS).replace("lease_until", "NULL").replace("payload", PAYLOAD)

_HEAD = """
    SELECT coalesce(max(waiting), 0), coalesce(max(paused), 0), coalesce(max(full_at), 0.0) FROM queues WHERE queue = :queue
"""
"""A row in any case."""

_LEVELS = f"""
    WITH RECURSIVE levels (priority) AS (
        SELECT min(priority) FROM items WHERE {WAITING}
        UNION ALL
        SELECT (SELECT min(items.priority) FROM items WHERE {WAITING} AND items.priority > levels.priority)
        FROM levels WHERE levels.priority IS NOT NULL
    )
    SELECT priority, (SELECT min(ready_at) FROM items WHERE {WAITING} AND items.priority = levels.priority), (
        SELECT min(ready_at) FROM items WHERE {WAITING} AND items.priority = levels.priority AND items.ready_at > :now
    ) FROM levels WHERE priority IS NOT NULL
"""
"""The priorities that wait, when the first of each is ready, or was, and when the first that is not ready yet will be."""

_FORGET = """
    DELETE FROM items WHERE seq IN (SELECT seq FROM items WHERE queue = :queue AND forget_at <= :now LIMIT :limit)
"""

_TAKE_KEYS = f"""
    INSERT OR {{}} INTO keys
    SELECT queue, key, id, :until FROM items WHERE queue = :queue AND id IN {AMONG} AND key IS NOT NULL
"""

_FREE_KEYS = f"""
    DELETE FROM keys WHERE queue = :queue AND until IS NULL AND (key, id) IN (
        SELECT key, id FROM items WHERE seq IN {AMONG} AND key IS NOT NULL
    )
"""


class Rows:
    """A queue's rows in one transaction, at the moment `now`. What an operation did is undone if it raises.

    A statement is one step wherever there may be many rows: for each step SQLite lets go of the interpreter, and a busy loop
    keeps it for milliseconds. So rows go in and come out as one JSON text.
    """

    def __init__(self, db: Connection, queue: str, settings: Settings, now: float) -> None:
        self._db = db
        self.queue = queue
        self.spec = settings.spec
        self.settings = settings
        self.now = now

    def do(self, statement: str, **parameters: object) -> int:
        """Execute it; gives how many rows it changed."""
        return self.execute(statement, parameters).rowcount

    def execute(self, statement: str, parameters: Mapping[str, object]) -> Cursor:
        return self._db.execute(statement, {"queue": self.queue, "now": self.now, **parameters})

    def find(self, row: type[R], statement: str, **parameters: object) -> list[R]:
        """All rows that it finds, in one step."""
        names = ", ".join(f"c{number}" for number, _ in enumerate(_fields(row)))
        packing = f"WITH found ({names}) AS ({statement}) SELECT json_group_array(json_array({names})) FROM found"
        (text,) = self.execute(packing, parameters).fetchone()
        found: list[R] = msgspec.json.decode(text, type=list[row])  # type: ignore[valid-type]
        return found

    def records(self, statement: str, **parameters: object) -> list[Record]:
        return [record(row) for row in self.execute(statement, parameters)]

    def set(self, column: str, value: object) -> None:
        """What is true of the queue."""
        self.do(
            f"INSERT INTO queues (queue, {column}) VALUES (:queue, :value)"
            f" ON CONFLICT (queue) DO UPDATE SET {column} = excluded.{column}",
            value=value,
        )

    def more_wait(self, count: int) -> None:
        """So many more items wait than before."""
        if count:
            self.do(
                "INSERT INTO queues (queue, waiting) VALUES (:queue, :count)"
                " ON CONFLICT (queue) DO UPDATE SET waiting = waiting + :count",
                count=count,
            )

    def keep(self, ids: Iterable[str]) -> None:
        """Somebody waits for the end of these."""
        self.do(f"UPDATE items SET keep = 1 WHERE queue = :queue AND id IN {AMONG} AND NOT keep", rows=as_json(ids))

    @property
    def forget_at(self) -> float:
        """Until when what ends now is known."""
        return self.now + self.spec.keep_results

    def head(self) -> Head:
        return Head(*self.execute(_HEAD, {}).fetchone())

    def levels(self) -> list[tuple[int, float, float | None]]:
        return self.execute(_LEVELS, {}).fetchall()

    def running(self) -> int:
        """How many run."""
        (count,) = self.execute(f"SELECT count(*) FROM items WHERE {RUNNING}", {}).fetchone()
        return int(count)

    def remove(self, ids: Collection[str]) -> None:
        if ids:
            self.do(f"DELETE FROM items WHERE queue = :queue AND id IN {AMONG}", rows=as_json(ids))

    def drop(self, seqs: Iterable[int]) -> None:
        self.do(f"DELETE FROM items WHERE seq IN {AMONG}", rows=as_json(seqs))

    def forget(self) -> None:
        """What is not known any more goes, a bit at a time."""
        self.do(_FORGET, limit=SOME)

    def end(self, seqs: Sequence[int], state: State) -> None:
        """What waits ends. Those that are dead are known until they are purged."""
        if not seqs:
            return
        self.free_keys(seqs)
        self.do(
            "UPDATE items SET state = :state, ended_at = :now, forget_at = :forget_at, cancelling = 0,"
            f" error = coalesce(error, :error) WHERE seq IN {AMONG}",
            rows=as_json(seqs), state=state.value, forget_at=None if state is State.DEAD else self.forget_at,
            error=NO_ATTEMPT_LEFT if state is State.DEAD else None,
        )  # fmt: skip

    def wait_again(self, seqs: Sequence[int]) -> None:
        """These have been made to wait again."""
        if seqs and self.spec.unique is not None:
            found = self.find(Id, f"SELECT id FROM items WHERE seq IN {AMONG}", rows=as_json(seqs))
            self.take_keys_again(each.id for each in found)
        self.more_wait(len(seqs))

    def take_keys(self, ids: Iterable[str]) -> None:
        """Items that are new have their keys, which are free."""
        if self.spec.unique is not None:
            lifetime = self.spec.unique.lifetime
            until = None if isinstance(lifetime, str) else self.now + lifetime
            self.do(_TAKE_KEYS.format("REPLACE"), rows=as_json(ids), until=until)

    def take_keys_again(self, ids: Iterable[str]) -> None:
        """Items that wait again have their keys again, where nobody else has taken them."""
        if self.spec.unique is not None and isinstance(self.spec.unique.lifetime, str):
            self.do(_TAKE_KEYS.format("IGNORE"), rows=as_json(ids), until=None)

    def free_keys(self, seqs: Sequence[int], *, claimed: bool = False) -> None:
        """These have ended, or are `claimed`."""
        unique = self.spec.unique
        if unique is not None and seqs and (not claimed or unique.lifetime == "queued"):
            self.do(_FREE_KEYS, rows=as_json(seqs))


class Id(NamedTuple):
    """The id of an item."""

    id: str


class Head(NamedTuple):
    """What is true of a queue, besides its items."""

    waiting: int
    paused: int
    full_at: float


class Some(NamedTuple):
    """An item of which nothing else matters. `keep`: somebody waits for its end."""

    seq: int
    id: str
    keep: int


def _fields(row: type) -> tuple[str, ...]:
    """The names of a NamedTuple's fields."""
    found: tuple[str, ...] = row._fields  # type: ignore[attr-defined]
    return found


def as_json(values: Iterable[object]) -> str:
    """What is given to a statement as `:rows`."""
    return msgspec.json.encode(list(values)).decode()
