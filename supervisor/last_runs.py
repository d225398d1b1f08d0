"""How far each job's schedule has got: what a daemon must know of the one before it, to see which runs were missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from supervisor.store import Store

if TYPE_CHECKING:
    from sqlite3 import Connection

SCHEMA = ("CREATE TABLE last_runs (job TEXT PRIMARY KEY, schedule TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID",)
"""The versions of the file that it stands in, `state.db` in the state directory."""


class LastRuns:
    """Up to which moment of the wall clock the runs of a schedule are over; `schedule` says in words which schedule it was.

    Written without waiting, in order; what cannot be written goes to `on_failure` of the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._before: dict[str, tuple[str, float]] = {}

    async def load(self, schedules: Mapping[str, str], now: float) -> None:
        """Read what the daemon before this one has left, by job and schedule; the others begin now, and strangers are dropped.

        Returns when that is on the disk: whatever happens from here on, no run is lost. Raises StoreError.
        """

        def begin(db: Connection) -> dict[str, tuple[str, float]]:
            found = {job: (schedule, at) for job, schedule, at in db.execute("SELECT job, schedule, at FROM last_runs")}
            known = {job: found[job] for job, schedule in schedules.items() if found.get(job, ("",))[0] == schedule}
            db.execute("DELETE FROM last_runs")
            rows = [(job, *known.get(job, (schedule, now))) for job, schedule in schedules.items()]
            db.executemany("INSERT INTO last_runs VALUES (?, ?, ?)", rows)
            return known

        self._before = await self._store.write(begin)

    def take(self, job: str, schedule: str) -> float | None:
        """Up to where the daemon before this one had got; told once, and not of another schedule."""
        was, at = self._before.pop(job, ("", 0.0))
        return at if was == schedule else None

    def remember(self, job: str, schedule: str, at: float) -> None:
        """Nothing up to this moment is to be caught up any more."""

        def note(db: Connection) -> None:
            db.execute("INSERT OR REPLACE INTO last_runs VALUES (?, ?, ?)", (job, schedule, at))

        self._store.post(note)

    def forget(self, job: str) -> None:
        """Nothing is to be caught up, until it is remembered again."""

        def forget(db: Connection) -> None:
            db.execute("DELETE FROM last_runs WHERE job = ?", (job,))

        self._before.pop(job, None)
        self._store.post(forget)
