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
                room.leave_line(child)
        if mine is None or mine.has_room_for(child):
            return other
        return Hold(_WAITS[child.takes or ""].format(mine.limit))

    def enter(self, child: Node) -> None:
        """A run of this child begins."""
        if (room := self._rooms.get(child.takes or "")) is not None:
            room.enter(child)

    def leave(self, child: Node) -> None:
        """Its run is over, or it has no use for any: whoever is next has a look."""
        for room in self._rooms.values():
            room.leave(child)


class _Room:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._inside: set[Node] = set()
        self._line: dict[Node, None] = {}

    def has_room_for(self, child: Node) -> bool:
        """Whether it is its turn. It stands in line from now on."""
        self._line[child] = None
        return len(self._line) <= self._free or child in self._next()

    @property
    def _free(self) -> int:
        return self.limit - len(self._inside)

    def _next(self) -> list[Node]:
        """Those for whom there is room, first come, first served."""
        return list(islice(self._line, self._free))

    def enter(self, child: Node) -> None:
        self._line.pop(child, None)
        self._inside.add(child)

    def leave(self, child: Node) -> None:
        if child in self._inside:
            self._inside.discard(child)
            self._call()
        self.leave_line(child)

    def leave_line(self, child: Node) -> None:
        if child in self._line:
            del self._line[child]
            self._call()

    def _call(self) -> None:
        for node in self._next():
            if node.parent is not None:
                node.parent.post(node.parent.touch, node)
