"""The rows of a queue in SQLite, in one transaction: what all operations on them share.

Rows           asks and changes them; `sqlite_put`, `sqlite_claim`, `sqlite_finish` and `sqlite_people` are the operations
as_json, given    many rows go in as one text, and are there as a table
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

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
OVERDUE = f"{WAITING} AND expires_at IS NOT NULL AND expires_at <= :now"
"""What has expired, though nobody has noted it yet."""
STATE = f"CASE WHEN {OVERDUE} THEN 'expired' ELSE state END"
KNOWN = "(forget_at IS NULL OR forget_at > :now)"
_PAYLOAD = "CAST(coalesce(payload, (SELECT payload FROM large WHERE large.seq = items.seq)) AS TEXT)"
_COMPUTED = {"state": STATE, "lease_until": "NULL", "payload": _PAYLOAD}
RECORD = ", ".join(_COMPUTED.get(name, name) for name in COLUMNS)


def levels(parked: int) -> str:
    """The priorities of what waits and is `parked` or not, when the first of each is ready, or was, and when the first that is
    not ready yet will be."""
    those = f"{WAITING} AND parked = {parked}"
    return f"""
        WITH RECURSIVE levels (priority) AS (
            SELECT min(priority) FROM items WHERE {those}
            UNION ALL
            SELECT (SELECT min(items.priority) FROM items WHERE {those} AND items.priority > levels.priority)
            FROM levels WHERE levels.priority IS NOT NULL
        )
        SELECT priority, (SELECT min(ready_at) FROM items WHERE {those} AND items.priority = levels.priority) AS first, (
            SELECT min(ready_at) FROM items WHERE {those} AND items.priority = levels.priority AND items.ready_at > :now
        ) AS later FROM levels WHERE priority IS NOT NULL
    """


_EXPIRED = f"SELECT seq, id, keep, in_group FROM items WHERE {OVERDUE} LIMIT {SOME}"

_UNPARK = """
    UPDATE items SET parked = 0 WHERE seq IN (
        SELECT first.seq FROM json_each(:rows) AS each JOIN items AS first ON first.seq IN (
            SELECT seq FROM items WHERE queue = :queue AND in_group = each.value AND parked = 1
            ORDER BY priority, ready_at, seq LIMIT :limit
        )
    )
"""

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
        self._more = 0

    def close(self) -> None:
        """The operation is over: what it has gathered is written."""
        if self._more:
            self.do(
                "INSERT INTO queues (queue, waiting) VALUES (:queue, :count)"
                " ON CONFLICT (queue) DO UPDATE SET waiting = waiting + :count",
                count=self._more,
            )
            self._more = 0

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
        self._more += count

    def keep(self, ids: Iterable[str]) -> None:
        """Somebody waits for the end of these."""
        self.do(f"UPDATE items SET keep = 1 WHERE queue = :queue AND id IN {AMONG} AND NOT keep", rows=as_json(ids))

    @property
    def forget_at(self) -> float:
        """Until when what ends now is known."""
        return self.now + self.spec.keep_results

    def running(self) -> int:
        """How many run."""
        (count,) = self.execute(f"SELECT count(*) FROM items WHERE {RUNNING}", {}).fetchone()
        return int(count)

    def drop(self, seqs: Sequence[int]) -> None:
        """Remove these."""
        if seqs:
            self.do(f"DELETE FROM items WHERE seq IN {AMONG}", rows=as_json(seqs))

    def forget(self, seqs: Sequence[int] = ()) -> None:
        """These, and what else is not known any more, go, a bit at a time."""
        self.drop(seqs)
        self.do(_FORGET, limit=SOME)

    def expire(self) -> list[Some]:
        """End what has waited for too long, a bit of it at a time."""
        found = self.find(Some, _EXPIRED)
        self.end(found, State.EXPIRED)
        self.more_wait(-len(found))
        return found

    def end(self, those: Sequence[Row], state: State) -> None:
        """These end, and did not run. Those that are dead are known until they are purged."""
        if not those:
            return
        seqs = [each.seq for each in those]
        self.free_keys(seqs)
        self.do(
            "UPDATE items SET state = :state, ended_at = :now, forget_at = :forget_at, cancelling = 0, parked = 0,"
            f" error = coalesce(error, :error) WHERE seq IN {AMONG}",
            rows=as_json(seqs), state=state.value, forget_at=None if state is State.DEAD else self.forget_at,
            error=NO_ATTEMPT_LEFT if state is State.DEAD else None,
        )  # fmt: skip
        self.unpark(each.group for each in those)

    def park(self, seqs: Sequence[int]) -> None:
        """Enough of the groups of these run: no claim meets them until one of those ends."""
        if seqs:
            self.do(f"UPDATE items SET parked = 1 WHERE seq IN {AMONG}", rows=as_json(seqs))

    def unpark(self, groups: Iterable[str | None]) -> None:
        """Something of these groups has ended: as many of each as may run at once are met by claims again."""
        names = {group for group in groups if group is not None}
        if names:
            self.do(_UNPARK, rows=as_json(names), limit=self.spec.per_key)

    def unpark_all(self) -> None:
        """Nobody knows which groups are full."""
        self.do(f"UPDATE items SET parked = 0 WHERE {WAITING} AND parked = 1")

    def wait_again(self, seqs: Sequence[int]) -> None:
        """These have been made to wait again."""
        if seqs and self.spec.unique is not None:
            found = self.find(Id, f"SELECT id FROM items WHERE seq IN {AMONG}", rows=as_json(seqs))
            self.take_keys_again(each.id for each in found)
        self.more_wait(len(seqs))

    def take_keys(self, ids: Sequence[str]) -> None:
        """Items that are new have their keys, which are free."""
        if self.spec.unique is not None and ids:
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


class Level(NamedTuple):
    """Those of one priority that wait; see `levels`."""

    priority: int
    first: float
    later: float | None


class Row(Protocol):
    """An item."""

    @property
    def seq(self) -> int:
        """Its row."""

    @property
    def group(self) -> str | None:
        """What `serialize_by` found in it."""


class Some(NamedTuple):
    """An item of which nothing else matters. `keep`: somebody waits for its end."""

    seq: int
    id: str
    keep: int
    group: str | None


def _fields(row: type) -> tuple[str, ...]:
    """The names of a NamedTuple's fields."""
    found: tuple[str, ...] = row._fields  # type: ignore[attr-defined]
    return found


def as_json(values: Iterable[object]) -> str:
    """What is given to a statement as `:rows`."""
    return msgspec.json.encode(list(values)).decode()
