"""What people are told of single items: of each that fails, while they are few; of a flood the first ones, and how many more.

Nothing is lost by that: each item has its error and its traceback in its queue, and the numbers of a job are told in any case.
"""

from __future__ import annotations

from typing import Any

from supervisor import events
from supervisor.spec import split_name

AT_ONCE = 10
"""So many items of a job that fail in the same way are told of by themselves, from one `tell_rest` to the next."""

TOGETHER: dict[type[events.ItemEvent], tuple[type[events.ItemsEvent], str]] = {
    events.ItemRetrying: (events.ItemsRetrying, "failed like this"),
    events.ItemDead: (events.ItemsDead, "are dead"),
    events.ItemLost: (events.ItemsLost, "were lost"),
}
"""What is told in numbers where there are many. Each of the others (an item was cancelled) is told: somebody waits for it."""


class _Flood:
    """The items of one job that fail in one way."""

    __slots__ = ("last", "more", "told")

    def __init__(self) -> None:
        self.told = self.more = 0
        self.last = ""


class Reports:
    """Tells of the items of one queue. Its owner calls `tell_rest` once a second, as long as there is something to tell."""

    def __init__(self, queue: str, journal: events.Journal) -> None:
        self._queue = queue
        self._journal = journal
        self._floods: dict[tuple[type[events.ItemEvent], str | None], _Flood] = {}
        """By what happens, and to which job."""
        self._expired: int | None = None
        """Those that are still to be told; None while nothing was told of any."""

    def tell(self, kind: type[events.ItemEvent], item: str, cause: str, job: str | None = None, **fields: Any) -> bool:
        """Tell that something happened to an item; whether it is told by itself. `job`: the worker that had it."""
        if kind in TOGETHER and not self._is_one_of_few(kind, job, cause):
            return False
        self._journal.emit(kind, queue=self._queue, item=item, job=job, cause=cause, **fields)
        return True

    def _is_one_of_few(self, kind: type[events.ItemEvent], job: str | None, cause: str) -> bool:
        flood = self._floods.setdefault((kind, job and split_name(job)[0]), _Flood())
        if flood.told < AT_ONCE:
            flood.told += 1
            return True
        flood.more += 1
        flood.last = cause
        return False

    def expired(self, count: int) -> None:
        """So many items have expired."""
        if self._expired is None:
            self._expired = 0
            self._journal.emit(events.ItemsExpired, queue=self._queue, count=count)
        else:
            self._expired += count

    def tell_rest(self) -> None:
        """Tell how many there were besides those that were told of."""
        floods, self._floods = self._floods, {}
        for (kind, job), flood in floods.items():
            if flood.more:
                together, words = TOGETHER[kind]
                cause = f"and {flood.more} more {words}; the last: {flood.last}"
                self._journal.emit(together, queue=self._queue, job=job, count=flood.more, cause=cause)
        expired, self._expired = self._expired, None
        if expired:
            self._journal.emit(events.ItemsExpired, queue=self._queue, count=expired)
