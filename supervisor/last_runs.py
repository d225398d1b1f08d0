"""When each scheduled job ran last: what a daemon must know of the one before it, to see what was missed meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from supervisor.store import Store

if TYPE_CHECKING:
    from sqlite3 import Connection

SCHEMA = ("CREATE TABLE last_runs (job TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",)
"""The versions of the file that it stands in, `state.db` in the state directory."""


class LastRuns:
    """The last moment of each job's schedule that was run for, in seconds of the wall clock. Raises StoreError as the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> dict[str, float]:
        """Of every job that is remembered."""
        return await self._store.read(lambda db: dict(db.execute("SELECT job, at FROM last_runs")))

    async def remember(self, job: str, at: float) -> None:
        """Note it; returns when it is on the disk."""

        def note(db: Connection) -> None:
            db.execute("INSERT OR REPLACE INTO last_runs VALUES (?, ?)", (job, at))

        await self._store.write(note)

    async def forget(self, job: str) -> None:
        """Know nothing of it any more."""

        def forget(db: Connection) -> None:
            db.execute("DELETE FROM last_runs WHERE job = ?", (job,))

        await self._store.write(forget)
