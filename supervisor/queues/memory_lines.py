"""The items of a queue in memory, and the lines in which they stand.

Entry    an item, whatever its state
Line     entries by a moment
Group    the entries of one value of `serialize_by`: only those that may begin are in line
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import deque
from collections.abc import Callable

import msgspec

from supervisor.queues.protocol import Draft, Record, State


class Entry(msgspec.Struct, eq=False):
    """An item, whatever its state."""

    draft: Draft
    number: int
    """In the order in which they were put."""
    put: float
    due: float
    """When it was put, and when it may be claimed, by Trio's clock."""
    expires: float
    put_at: float
    ready_at: float
    """The same for people."""
    state: State = State.WAITING
    delayed: bool = False
    parked: bool = False
    """Whether it waits for another of its group to end."""
    token: int = 0
    attempts: int = 0
    owner: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    ending: int = 0
    """In the order in which they ended."""
    result: bytes | None = None
    error: str | None = None
    traceback: str | None = None
    progress: tuple[float, float | None] | None = None
    cancelling: bool = False

    def __lt__(self, other: Entry) -> bool:
        return self.number < other.number

    @property
    def place(self) -> tuple[int, float, int]:
        """Where it stands in line."""
        return self.draft.priority, self.due, self.number

    def record(self, queue: str) -> Record:
        """As people see it."""
        draft = self.draft
        return Record(
            id=draft.id,
            queue=queue,
            state=self.state,
            payload=draft.payload,
            priority=draft.priority,
            attempts=self.attempts,
            put_at=self.put_at,
            ready_at=self.ready_at,
            expires_at=None if draft.expire is None else self.ready_at + (self.expires - self.due),
            started_at=self.started_at,
            ended_at=self.ended_at,
            owner=self.owner,
            key=draft.key,
            group=draft.group,
            result=self.result,
            error=self.error,
            traceback=self.traceback,
            progress=self.progress,
            cancelling=self.cancelling,
        )


Spot = tuple[float, Entry]


class Line:
    """Entries by a moment. Those that come in order, as nearly all do, cost next to nothing; the others O(log n).

    Whoever leaves early is left lying, no longer `there`, and swept out when half of the line is such.
    """

    __slots__ = ("_early", "_left", "_regular", "_there")

    def __init__(self, there: Callable[[Entry], bool]) -> None:
        self._there = there
        self._regular: deque[Spot] = deque()
        self._early: list[Spot] = []
        self._left = 0

    def add(self, moment: float, entry: Entry) -> None:
        spot = (moment, entry)
        if not self._regular or self._regular[-1] < spot:
            self._regular.append(spot)
        else:
            heapq.heappush(self._early, spot)

    def take(self, until: float = math.inf) -> Entry | None:
        """Remove and give the first one whose moment has come."""
        if until == math.inf and not self._early:
            return self._take_regular()
        spot = self.first()
        if spot is None or spot[0] > until:
            return None
        if self._early and spot is self._early[0]:
            heapq.heappop(self._early)
        else:
            self._regular.popleft()
        return spot[1]

    def _take_regular(self) -> Entry | None:
        """The usual case, without looking first."""
        regular, there = self._regular, self._there
        while regular:
            if there(entry := regular.popleft()[1]):
                return entry
            self._left -= 1
        return None

    def next(self) -> float:
        """The moment of the first one; infinity where there is none."""
        spot = self.first()
        return math.inf if spot is None else spot[0]

    def first(self) -> Spot | None:
        """The first one that is there, and its moment."""
        regular, early, there = self._regular, self._early, self._there
        while regular and not there(regular[0][1]):
            regular.popleft()
            self._left -= 1
        while early and not there(early[0][1]):
            heapq.heappop(early)
            self._left -= 1
        if not early:
            return regular[0] if regular else None
        return regular[0] if regular and regular[0] < early[0] else early[0]

    def left(self) -> None:
        """Somebody has left it early, or is about to."""
        self._left += 1
        if self._left > 64 and self._left * 2 > len(self._regular) + len(self._early):
            self._regular = deque(spot for spot in self._regular if self._there(spot[1]))
            self._early = [spot for spot in self._early if self._there(spot[1])]
            heapq.heapify(self._early)
            self._left = 0


class Group:
    """The items of one value of `serialize_by`. In line are only as many of those that are due as may begin: a claim has none
    to pass over, however many wait behind them."""

    __slots__ = ("_parked", "lined", "running")

    def __init__(self) -> None:
        self.running = 0
        self.lined: list[tuple[int, float, int]] = []
        """Their places, in order. One too many is there where a more urgent one came later."""
        self._parked: dict[int, Line] = {}
        """Those behind them, by priority."""

    def park(self, entry: Entry) -> None:
        """It waits until it comes into line."""
        entry.parked = True
        if (line := self._parked.get(entry.draft.priority)) is None:
            line = self._parked[entry.draft.priority] = Line(_is_parked)
            self._parked = dict(sorted(self._parked.items()))
        line.add(entry.due, entry)

    def left(self, entry: Entry) -> None:
        """It waits no longer, before it was its turn."""
        if entry.parked:
            entry.parked = False
            self._parked[entry.draft.priority].left()
        else:
            self.lined.remove(entry.place)

    def next(self, per_key: int) -> Entry | None:
        """The next one that comes into line, which it does; None where as many are there as may begin."""
        free = per_key - self.running
        for line in self._parked.values() if free > 0 else ():
            if (spot := line.first()) is not None:
                return self._line_up(line, spot[1]) if self._is_due(spot[1], free) else None
        return None

    def _is_due(self, entry: Entry, free: int) -> bool:
        return len(self.lined) < free or entry.place < self.lined[free - 1]

    def _line_up(self, line: Line, entry: Entry) -> Entry:
        line.take()
        entry.parked = False
        bisect.insort(self.lined, entry.place)
        return entry

    @property
    def oldest(self) -> float:
        """Since when the first of those waits that are not in line."""
        return min((line.next() for line in self._parked.values()), default=math.inf)

    @property
    def empty(self) -> bool:
        """Whether nothing is known of it."""
        return not self.running and not self.lined and self.oldest == math.inf


def _is_parked(entry: Entry) -> bool:
    return entry.parked
