"""What became of every run, kept in SQLite, so that it outlives the daemon: what `supervisor history` tells.

A reader of the events like any other. It notes the ends of runs in memory; about once a second what has come is stored in
one transaction, by a thread of its own: a crash loop costs a job nothing, and neither does a disk that is slow, full or gone.
Of a run that ends by itself (a schedule's, a `once` job's) the start is stored as well: where the daemon dies before the end,
the next one says that it is lost.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from supervisor.events import Ended, Event, Journal, PhaseChanged, Starting, Warned, rfc3339, wall_now
from supervisor.spec import split_name
from supervisor.state import PastRun, Why
from supervisor.store import Store, StoreError, open_store

if TYPE_CHECKING:
    from sqlite3 import Connection

KEPT = 100
"""Runs of a job that are kept: as many that failed, and as many that did not, of all its workers together."""

KEPT_IN_ALL = 50_000
"""Runs that are kept, jobs that are no more included: some 10 MB."""

WINDOW = 1.0
"""Seconds in which ends are gathered: what a kill of the daemon may take away."""

PAUSE = 30.0
"""Seconds until the next try where storing has failed."""

WAITING = 10_000
"""Ends that may wait to be stored; more are counted, and the count is stored."""

_FIELDS = PastRun.__struct_fields__

SCHEMA = (
    """
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY,
        job TEXT NOT NULL,
        name TEXT NOT NULL, run TEXT NOT NULL, started TEXT NOT NULL, ended TEXT,
        outcome TEXT NOT NULL, reason TEXT NOT NULL, cause TEXT NOT NULL, failed INTEGER NOT NULL,
        code INTEGER, signal TEXT, attempts INTEGER NOT NULL, duration REAL, cpu REAL, max_rss INTEGER
    );
    CREATE INDEX runs_of_jobs ON runs (job, failed, id);
    CREATE TABLE in_hand (run TEXT PRIMARY KEY, name TEXT NOT NULL, started TEXT NOT NULL) WITHOUT ROWID
    """,
)

LOST = "the daemon died while it ran"


async def keep_history(
    journal: Journal,
    path: Path,
    *,
    ends: Callable[[str], bool] = lambda name: False,
    task_status: trio.TaskStatus[History] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep the history of what `journal` tells in the file `path`, until cancelled; then store what is left.

    `await nursery.start(keep_history, journal, path)` gives the `History` to ask. Begin before the tree and cancel after it,
    and no end is missed. `ends(name)` says whether a run of that name comes to an end by itself. Nothing is opened before
    there is something to store. Where the file cannot be used the journal says so once, and everything else goes on.
    """
    history = History(journal, ends)
    async with open_store(path, SCHEMA, on_failure=lambda error: history.warn(str(error))) as history.store:
        journal.add_sink(history.note)
        task_status.started(history)
        try:
            await history.keep()
        finally:
            history.flush(last=True)


class Gathering:
    """What has come and is not stored yet: runs that ended, runs that began, and by name how many there was no room for."""

    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self.begun: dict[str, Starting] = {}
        self.dropped: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self.ended or self.begun or self.dropped)

    def end(self, event: Ended) -> None:
        """A run is over."""
        self.begun.pop(event.run, None)
        if len(self.ended) < WAITING:
            self.ended.append(event)
        else:
            self.dropped[event.name] += 1


class History:
    """The runs that have ended. Belongs to the Trio thread; `keep_history` makes it."""

    store: Store

    def __init__(self, journal: Journal, ends: Callable[[str], bool]) -> None:
        self._journal = journal
        self._ends = ends
        self._gathered = Gathering()
        self._under_way: Gathering | None = None
        """What the store's thread is about to store."""
        self._settled = False
        """Whether what an earlier daemon left has been looked at."""
        self._failing = False
        self._something = trio.Event()
        self._hurry = trio.Event()
        self._notes: dict[type[Event], Callable[[Any], None]] = {
            Ended: self._note_end, Starting: self._note_start, PhaseChanged: self._note_phase
        }  # fmt: skip

    def note(self, event: Event) -> None:
        """The sink: take note of an event."""
        if (note := self._notes.get(type(event))) is not None:
            note(event)

    def _note_end(self, event: Ended) -> None:
        self._gathered.end(event)
        self._something.set()

    def _note_start(self, event: Starting) -> None:
        if self._ends(event.name):
            self._gathered.begun[event.run] = event
            self._something.set()

    def _note_phase(self, event: PhaseChanged) -> None:
        self._hurry.set()  # the file is opened while the last jobs end, not after them
        self._something.set()

    async def runs(self, name: str, count: int) -> list[PastRun]:
        """The last `count` runs of a job or supervisor (of all workers of a job, or of one), oldest first.

        Raises StoreError where the file cannot be read.
        """
        if not self._settled:
            self.flush(settle=True)
        own = "name" if ":" in name else "job"
        unstored = [_past(event) for event in self._unstored() if name in (event.name, split_name(event.name)[0])]
        found = await self.store.read(partial(_find, own, name, count))
        known = {(run.run, run.ended) for run in found}
        return [*found, *(run for run in unstored if (run.run, run.ended) not in known)][-count:]

    async def names(self) -> set[str]:
        """All jobs and supervisors of which there is something to tell. Raises StoreError."""
        unstored = {split_name(event.name)[0] for event in self._unstored()}
        return unstored | await self.store.read(_names)

    def _unstored(self) -> list[Ended]:
        return [*(self._under_way.ended if self._under_way else ()), *self._gathered.ended]

    async def keep(self) -> None:
        """Store what comes, gathered, until cancelled."""
        while True:
            await self._something.wait()
            if self._failing:
                await trio.sleep(PAUSE)
            else:
                with trio.move_on_after(WINDOW):
                    await self._hurry.wait()
            self._something = trio.Event()
            self.flush(settle=self._hurry.is_set())

    def flush(self, *, settle: bool = False, last: bool = False) -> None:
        """Have what has come by now stored, unless that is under way: then the rest waits, but not the `last` time.

        `settle`: open the file in any case.
        """
        nothing = not self._gathered and (self._settled or not settle)
        if nothing or (self._under_way is not None and not last):
            return
        gathered, self._gathered = self._gathered, Gathering()
        if self.store.post(partial(_store, not self._settled, gathered), partial(self._stored, gathered)):
            self._under_way = gathered

    def _stored(self, gathered: Gathering, error: StoreError | None) -> None:
        """The thread has done it, or could not: then the ends wait for the next time."""
        self._under_way = None
        if error is None:
            self._settled = True
            if self._failing:
                self.warn("is stored again")
        else:
            self._put_back(gathered)
            if not self._failing:
                self.warn(f"{error}; until then it is kept in memory")
        self._failing = error is not None
        if self._gathered:
            self._something.set()

    def _put_back(self, gathered: Gathering) -> None:
        since, self._gathered = self._gathered, gathered
        gathered.begun = since.begun  # an older start may be that of a run which is over
        gathered.dropped += since.dropped
        for event in since.ended:
            gathered.end(event)

    def warn(self, text: str) -> None:
        """Say in the journal what is wrong with the history."""
        self._journal.emit(Warned, text=f"history: {text}")


# -- in the store's thread ----------------------------------------------------------------------------------------------


# Each statement takes all its rows at once, as JSON. Row by row, SQLite would let go of the interpreter and want it back for
# every one of a thousand, and the loop, which has a thousand jobs to restart at that moment, would hand it over each time.


def _store(first: bool, gathered: Gathering, db: Connection) -> None:
    """Everything of one gathering."""
    if first:
        _settle(db)
    over, dropped = [event.run for event in gathered.ended], [*gathered.dropped]
    db.execute("DELETE FROM in_hand WHERE run IN (SELECT value FROM json_each(?))", (_json(over),))
    db.execute("DELETE FROM in_hand WHERE name IN (SELECT value FROM json_each(?))", (_json(dropped),))
    begun = [(event.run, event.name, event.at) for event in gathered.begun.values()]
    db.execute(f"INSERT OR REPLACE INTO in_hand {_selected(3)}", (_json(begun),))
    _add(db, [*map(_past, gathered.ended), *(_gap(name, count) for name, count in gathered.dropped.items())])


def _settle(db: Connection) -> None:
    """What an earlier daemon had in hand and saw no end of is lost."""
    left = db.execute("SELECT name, run, started FROM in_hand ORDER BY started").fetchall()
    _add(db, [_lost(*row) for row in left])
    db.execute("DELETE FROM in_hand")


def _add(db: Connection, runs: list[PastRun]) -> None:
    """Add runs, and let go of the oldest where there are too many."""
    rows = [(split_name(run.name)[0], *(getattr(run, field) for field in _FIELDS)) for run in runs]
    db.execute(f"INSERT INTO runs (job, {', '.join(_FIELDS)}) {_selected(len(_FIELDS) + 1)}", (_json(rows),))
    sorts = {(split_name(run.name)[0], run.failed) for run in runs}
    db.execute(_LET_GO, (_json([*sorts]), KEPT))
    db.execute("DELETE FROM runs WHERE id <= (SELECT id FROM runs ORDER BY id DESC LIMIT 1 OFFSET ?)", (KEPT_IN_ALL,))


_LET_GO = """
    WITH sorts AS (SELECT json_extract(value, '$[0]') AS job, json_extract(value, '$[1]') AS failed FROM json_each(?1)),
    last AS (
        SELECT job, failed, (
            SELECT id FROM runs WHERE runs.job = sorts.job AND runs.failed = sorts.failed ORDER BY id DESC LIMIT 1 OFFSET ?2
        ) AS id FROM sorts
    )
    DELETE FROM runs WHERE id IN (
        SELECT runs.id FROM last JOIN runs ON runs.job = last.job AND runs.failed = last.failed AND runs.id <= last.id
    )
"""
"""Of each job the failed runs, and the others, that are older than the newest so many."""


def _json(values: list[Any]) -> str:
    return msgspec.json.encode(values).decode()


def _selected(columns: int) -> str:
    """The rows of a JSON array of arrays, in its order."""
    picked = ", ".join(f"json_extract(value, '$[{column}]')" for column in range(columns))
    return f"SELECT {picked} FROM json_each(?) ORDER BY key"


def _past(event: Ended) -> PastRun:
    ended = datetime.datetime.fromisoformat(event.at)
    spent = event.spent
    return PastRun(
        name=event.name,
        run=event.run,
        started=rfc3339(ended - datetime.timedelta(seconds=event.duration)),
        ended=event.at,
        outcome="stopped" if event.why is Why.PLAIN else event.why.value,
        reason=event.exit.reason,
        cause=event.cause,
        failed=event.failed,
        code=event.exit.code,
        signal=event.exit.signal,
        attempts=event.attempts,
        duration=event.duration,
        cpu=round(spent.cpu, 6) if spent else None,
        max_rss=spent.max_rss if spent else None,
    )


def _lost(name: str, run: str, started: str) -> PastRun:
    return PastRun(name=name, run=run, started=started, ended=None, outcome="lost", reason=LOST, cause=LOST, failed=True)


def _gap(name: str, count: int) -> PastRun:
    now, text = wall_now(), f"{count} more ended faster than they could be stored"
    return PastRun(name=name, run=f"{name}#", started=now, ended=now, outcome="not stored", reason=text, cause=text)


def _find(column: str, name: str, count: int, db: Connection) -> list[PastRun]:
    query = f"SELECT {', '.join(_FIELDS)} FROM runs WHERE {column} = ? ORDER BY id DESC LIMIT ?"
    found = [dict(zip(_FIELDS, row, strict=True)) for row in db.execute(query, (name, count))]
    return [PastRun(**row | {"failed": bool(row["failed"])}) for row in reversed(found)]


def _names(db: Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT DISTINCT job FROM runs")}
