"""Items that a daemon has claimed before a worker asks for them, so that nobody waits for the engine after each short call.

What is here is kept from others. So it is no more than what all workers together have lately handled in some hundredths of a
second, and it goes back as soon as it turns out that nobody takes it.

And it has had an attempt: where the daemon is killed, that is counted. So nothing is here on its last attempt (the desk sees to
that): else an item could be dead that nobody has ever begun with, for what others beside it have done.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable

import trio

from supervisor.queues.protocol import Item

AHEAD = 0.05
"""Seconds of work that are claimed ahead. Nothing is, where a call takes longer than that."""

HELD = 0.25
"""Seconds after which what was not taken in them goes back."""

LEARNING = 0.25
"""Seconds after which what was handled counts for little (1/e of it) in what is expected. AHEAD of these are claimed ahead."""


class Stock:
    """What is claimed ahead. `give_back` is called with items that nobody has taken."""

    def __init__(self, give_back: Callable[[Iterable[Item]], None]) -> None:
        self._give_back = give_back
        self.items: deque[Item] = deque()
        """Those that were claimed first come first."""
        self._full = 0
        self._rate = 0.0
        """Items a second that were handled, as known at `_learned_at`."""
        self._learned_at = -math.inf
        self._taken = 0
        self._filled = trio.Event()

    @property
    def low(self) -> bool:
        """Whether half of it is gone, and it is time to claim more."""
        return 0 < len(self.items) <= self._full // 2

    def learn(self, items: int) -> None:
        """So many items were handled."""
        now = trio.current_time()
        self._rate = self._rate * math.exp((self._learned_at - now) / LEARNING) + items / LEARNING
        self._learned_at = now

    def worth(self, calls: int) -> int:
        """How many items it is worth to have here, where so many calls are under way at once."""
        self.learn(0)
        handled = self._rate * AHEAD
        return int(handled) if handled > calls > 0 else 0  # else a call takes longer than AHEAD

    def add(self, items: Iterable[Item]) -> None:
        """These were claimed."""
        self.items.extend(items)

    def take(self, most: int) -> list[Item]:
        """Those that were claimed first, so many at most."""
        left = self.items
        items = [left.popleft()] if most == 1 and left else [left.popleft() for _ in range(min(most, len(left)))]
        self._taken += len(items)
        return items

    def remove(self, id: str) -> Item | None:
        """Take this one out, if it is here."""
        item = next((item for item in self.items if item.id == id), None)
        if item is not None:
            self.items.remove(item)
        return item

    def shrink(self, most: int = 0) -> None:
        """Keep so many, and give back those after them."""
        if len(self.items) > most:
            kept = list(self.items)
            self.items = deque(kept[:most])
            self._give_back(kept[most:])
        self._full = len(self.items)
        if self.items:
            self._filled.set()

    def distrust(self, most: int = 0) -> None:
        """Keep so many, and claim nothing ahead until it was seen anew how many are handled."""
        self._rate = 0.0
        self.shrink(most)

    async def give_back_unused(self) -> None:
        """Give back what is not taken in time, for ever."""
        while True:
            await self._filled.wait()
            self._filled = trio.Event()
            while self.items:
                before = self._taken
                await trio.sleep(HELD)
                if len(self.items) > self._taken - before:
                    self.distrust(self._taken - before)
