"""A worker's place at the desk of a queue, and the calls that it has in hand.

Seat      where a worker waits for items, and says what became of them
Call      the items of one call, from when they are handed out until it is said what became of them
Tally     what became of the items of one job, in numbers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import outcome
import trio

from supervisor.queues.protocol import Ending, Item
from supervisor.spec import split_name

if TYPE_CHECKING:
    from supervisor.queues.desk import Desk

Fate = Literal["cancelled", "lost"]

Cut = Callable[["Call", str], None]
"""Has a call end, for this reason; at once, or as soon as it has heard it."""


class Whose(Protocol):
    """Who sits at a desk."""

    job: str
    """The name of its row."""


class Crew(Protocol):
    """Who wants to know whether the workers of one job have their hands full. What is called must not block or raise."""

    def look(self) -> None:
        """Items were handed out, to whomever, or the job was resumed."""

    def freed(self) -> None:
        """A worker of the job waits for items."""


class Call:
    """The items of one call in the hands of a worker."""

    __slots__ = ("fates", "items", "progress", "work")

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.work: Any = None
        """What the worker makes of it; the worker's own."""
        self.progress: tuple[float, float | None] | None = None
        """How far it is, where that is still to be stored."""
        self.fates: dict[str, Fate] | None = None
        """Items that are no more to be worked on, by their ids: the call is to end."""


class Tally:
    """What became of the items that the workers of one job had, in numbers since the daemon started."""

    __slots__ = ("back", "cancelled", "dead", "done", "lost", "retry")

    def __init__(self) -> None:
        self.done = self.retry = self.dead = self.cancelled = self.back = self.lost = 0

    def as_dict(self) -> dict[str, int]:
        """By the words of `Ending.how`, and *lost*: leases that ran out, or were taken away."""
        return {name: getattr(self, name) for name in self.__slots__}


class Seat:
    """A worker's place at a desk, for as long as it lives: a context manager. What it still has at the end is given back."""

    __slots__ = (
        "_cut", "_desk", "_gathers", "_task", "attempts", "batches", "calls", "job", "left", "note", "reports", "shown",
        "tally", "wants", "who",
    )  # fmt: skip

    def __init__(self, desk: Desk, who: Whose, attempts: int, cut: Cut) -> None:
        self._desk = desk
        self._cut = cut
        self._task: trio.lowlevel.Task
        self._gathers: Call | None = None
        """The batch that waits for more."""
        self.who = who
        self.job = split_name(who.job)[0]
        """The job whose worker it is."""
        self.attempts = attempts
        self.calls: dict[Call, None] = {}
        """What is in its hands."""
        self.batches = False
        """Whether it takes as many at once as it can get: then there is nothing to be had by claiming ahead."""
        self.left = False
        self.wants = 0
        """How many items it waits for."""
        self.note = ""
        """What it does, where it neither handles anything nor waits for items."""
        self.shown = ""
        """What people have been told that it does."""
        self.tally = desk.tally(self.job)
        self.reports = desk.reports

    def __enter__(self) -> Seat:
        self._desk.sit_down(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        for call in list(self.calls):
            self.give_back(call)
        del self._desk.seats[self]
        self._desk.look_whether_idle()

    async def take(self, most: int = 1) -> Call | None:
        """Wait for items, up to so many; None once it is to take no more. Cancelled: it has none."""
        if self.left or self._desk.stock.items:
            await trio.lowlevel.checkpoint()
            if self.left:
                return None
            if items := self._desk.at_hand(self, most):
                return self._call(items)
        self.wants = most
        self._task = trio.lowlevel.current_task()
        self._desk.wait(self)
        taken: Call | None = await trio.lowlevel.wait_task_rescheduled(self._give_up)
        return taken

    async def take_batch(self, size: int, within: float) -> Call | None:
        """Wait for `size` items, or for those that come within so many seconds of the first, and before it is to leave."""
        self.batches = True
        call = await self.take(size)
        if call is None or not within:
            return call
        self._gathers = call
        with trio.move_on_after(within):
            while len(call.items) < size and call.fates is None:
                more = await self.take(size - len(call.items))
                if more is None:
                    break
                call.items = [*call.items, *more.items]
                call.fates = {**(more.fates or {}), **(call.fates or {})} or None
                del self.calls[more]
        self._gathers = None
        return call

    def leave(self) -> None:
        """Take nothing more: who waits for items is told that there are none."""
        self.left = True
        if self.wants:
            self._wake(None)
        self._desk.leaves()

    def give(self, items: Sequence[Item]) -> Call:
        """Hand it what it waits for."""
        call = self._call(items)
        self._wake(call)
        return call

    def _call(self, items: Sequence[Item]) -> Call:
        call = Call(items)
        self.calls[call] = None
        return call

    def cut(self, call: Call, id: str, fate: Fate, why: str) -> None:
        """Have a call end, for the sake of one of its items."""
        first = call.fates is None
        call.fates = {id: fate} if call.fates is None else {id: fate, **call.fates}
        if first:
            self._cut(call, why)
        if call is self._gathers and self.wants:
            self._wake(None)  # nobody waits for more

    def progress(self, call: Call, done: float, total: float | None) -> None:
        """Note how far a call is; stored within a second or so."""
        call.progress = (done, total)
        self._desk.look_again()

    def split(self, call: Call) -> list[Call]:
        """Make a call of each of its items."""
        if len(call.items) == 1:
            return [call]
        del self.calls[call]
        calls = [Call([item]) for item in call.items]
        for each in calls:
            each.fates = call.fates
        self.calls.update(dict.fromkeys(calls))
        return calls

    def keep_only(self, call: Call, items: Sequence[Item]) -> None:
        """Go on with these items of a call: of the others it is said that they were not begun."""
        kept = {item.id for item in items}
        others = [item for item in call.items if item.id not in kept]
        call.items = items
        self.tally.back += len(others)
        self._desk.store([back(item) for item in others])

    def end(self, call: Call, endings: Sequence[Ending]) -> None:
        """Say what became of the items of a call: each has one ending, but for those that were lost."""
        del self.calls[call]
        self._desk.store(endings)

    def give_back(self, call: Call) -> None:
        """Say of a call that it was not begun."""
        kept = [item for item in call.items if (call.fates or {}).get(item.id) != "lost"]
        self.tally.back += len(kept)
        self.end(call, [back(item) for item in kept])

    def _wake(self, call: Call | None) -> None:
        self.wants = 0
        self._desk.waits_no_more(self)
        trio.lowlevel.reschedule(self._task, outcome.Value(call))

    def _give_up(self, _: object) -> trio.lowlevel.Abort:
        self.wants = 0
        self._desk.waits_no_more(self)
        return trio.lowlevel.Abort.SUCCEEDED


def back(item: Item) -> Ending:
    """The ending of an item that nobody has begun with."""
    return Ending(id=item.id, token=item.token, how="back")
