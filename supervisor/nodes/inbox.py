"""What the loop of a supervisor waits for: messages, and timers, which are the clock's."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import trio

from supervisor.nodes.node import Node

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode

AT_ONCE = 25
"""Messages that are handled one after another before other tasks get their turn."""


class Inbox:
    """Calls that are to be made in the loop of one supervisor, in the order in which they were posted."""

    def __init__(self, owner: SupervisorNode) -> None:
        self._owner = owner
        self._send, self._receive = trio.open_memory_channel[tuple[Callable[..., None], tuple[Any, ...]]](math.inf)

    def put(self, method: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Leave a call for the next turn. Never waits."""
        self._send.send_nowait((method, args))

    async def handle(self, until: float) -> None:
        """Wait for a call, at most until then; make it, and what else there is. Cancelled while it waits: nothing is lost."""
        with trio.move_on_at(until):
            self.make(*await self._receive.receive())
        self._make_waiting()

    def empty(self) -> None:
        """Make the calls that are left, and those that they post."""
        while self._receive.statistics().current_buffer_used:
            self._make_waiting()

    def _make_waiting(self) -> None:
        for _ in range(AT_ONCE):
            try:
                posted = self._receive.receive_nowait()
            except trio.WouldBlock:
                return
            self.make(*posted)

    def make(self, method: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Make a call. One about a child that has another supervisor by now is that one's affair."""
        own = getattr(method, "__self__", None) is self._owner  # else a function, which gets the supervisor first
        child = next(iter(args if own else args[1:]), None)
        if not isinstance(child, Node) or child.parent is self._owner or child.parent is None:
            method(*args)
        elif own:
            child.parent.post(getattr(child.parent, method.__name__), *args)
        else:
            child.parent.post(method, child.parent, *args[1:])


class Timers:
    """Moments at which the loop is to look at a child, or (None) at all of them."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Node | None]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next(self) -> float:
        """The first of them; infinite where there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def at(self, when: float, child: Node | None) -> None:
        """Add a moment."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, child))

    def due(self, now: float) -> Iterator[Node | None]:
        """Take out those whose moment has come."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]

    def drop_idle(self) -> None:
        """Keep one timer of each moment that is still waited for; commands have overtaken the others."""
        waited: dict[tuple[float, str], tuple[float, int, Node | None]] = {}
        for when, count, child in self._heap:
            if child is None or when in moments(child):
                waited[when, child.name if child is not None else ""] = (when, count, child)
        self._heap = list(waited.values())
        heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget them all."""
        self._heap.clear()


def moments(child: Node) -> Iterator[float | None]:
    """What moments of time a child waits for."""
    yield child.hold and child.hold.until
    yield None if child.life is None else child.life.rung_due
    yield None if child.life is None else child.life.old_at
    if child.schedule is not None:
        yield child.schedule.wakes_at
