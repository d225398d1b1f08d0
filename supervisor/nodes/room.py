"""How many jobs may run in threads, or in processes of their own, at the same time: `[daemon] threads` and `processes`.

Who finds no room waits in line: first come, first served. Nobody asks again and again: who leaves has the next looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from supervisor.nodes.node import Hold, Node

_WAITS = {"thread": "waits for a thread: {0} of {0} in use ([daemon] threads)"}
_WAITS["process"] = "waits for a process: {0} of {0} in use ([daemon] processes)"


class Rooms:
    """Room for runs of each sort, by what a kind `takes`. Sorts without a limit are not in it, and cost nothing."""

    def __init__(self, limits: Mapping[str, int | None]) -> None:
        self._rooms = {takes: _Room(limit) for takes, limit in limits.items() if limit is not None}

    def __bool__(self) -> bool:
        return bool(self._rooms)

    def hold(self, child: Node, other: Hold | None) -> Hold | None:
        """Why a child does not start now: the `other` reason, for which it leaves the line; that there is no room; or None."""
        mine = self._rooms.get(child.takes or "") if other is None else None
        for room in self._rooms.values():
            if room is not mine:
                room.leave(child)
        if mine is None or mine.has_room_for(child):
            return other
        return Hold(_WAITS[child.takes or ""].format(mine.limit))

    def leave(self, child: Node) -> None:
        """Its run is over, or it is no child any more: whoever is next has a look."""
        for room in self._rooms.values():
            room.leave(child)


class _Room:
    """The line: those at its head, as many as there is room for, run or are about to; the others wait."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._line: dict[Node, None] = {}

    def has_room_for(self, child: Node) -> bool:
        """Whether it is at the head. It stands in line from now on."""
        self._line[child] = None
        return len(self._line) <= self.limit or child in islice(self._line, self.limit)

    def leave(self, child: Node) -> None:
        """Leave the line, wherever in it; who comes to the head by that is called."""
        if child not in self._line:
            return
        waiting = next(islice(self._line, self.limit, None), None)
        ahead = child in islice(self._line, self.limit)
        del self._line[child]
        if ahead and waiting is not None and waiting.parent is not None:
            waiting.parent.post(waiting.parent.touch, waiting)
