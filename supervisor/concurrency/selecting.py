"""Take from whichever of several sources has something, and lose nothing that another one had.

A Trio channel cannot be watched, only received from, and of two receives that race both may win. So a receive that was begun
is never thrown away: it stays with its branch, and what it brings comes next. It is begun only when no branch has anything at
once, and at most one is under way on each branch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar, cast, overload

import trio
from outcome import Error, Value

from supervisor.concurrency.crew import Arrivals, Function, Outcome, captured, failures, open_crew

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")

Values: TypeAlias = trio.abc.ReceiveChannel[T] | Function[T]
Source: TypeAlias = Values[T] | trio.Event
"""A receive channel; an event, which is ready once, with None; or an async function that is called for each value, and raises
`trio.EndOfChannel` or StopAsyncIteration when there will be no more. Cancelled, the function must not have taken anything."""

_NOTHING: Final = object()


class _Branch(Generic[T]):
    """A source, and at most one value that was received and not selected yet."""

    __slots__ = ("again", "at_once", "closed", "on", "once", "outcome", "receive", "receiving", "scope", "source")

    def __init__(self, source: Source[T]) -> None:
        self.source = source
        self.receive, self.at_once = _ways(source)
        self.once = isinstance(source, trio.Event)
        self.on = True
        self.closed = False
        self.outcome: Outcome[T] | None = None
        self.receiving = False  # then a value that comes belongs to the receive under way: to take another would overtake it
        self.scope: trio.CancelScope | None = None  # of the task that receives, while there is one
        self.again = trio.lowlevel.ParkingLot()

    def take(self) -> Outcome[T] | None:
        """What it has now."""
        if (outcome := self.outcome) is not None:
            self.outcome = None
            return outcome
        if self.receiving or self.at_once is None:
            return None
        try:
            return Value(self.at_once())
        except trio.WouldBlock:
            return None
        except Exception as error:
            return Error(error)

    def arm(self, nursery: trio.Nursery, arrivals: Arrivals) -> None:
        """Begin to receive."""
        self.receiving = True
        if self.scope is None:
            self.scope = trio.CancelScope()
            nursery.start_soon(self._attend, self.scope, arrivals, name=f"select: {self.source!r}")
        else:
            self.again.unpark()

    async def _attend(self, scope: trio.CancelScope, arrivals: Arrivals) -> None:
        try:
            with scope:
                while True:
                    self.outcome = await captured(self.receive)
                    self.receiving = False
                    arrivals.announce()
                    await self.again.park()
        finally:
            self.receiving, self.scope = False, None
            arrivals.announce()

    def withdraw(self) -> None:
        """Leave to others what is not received yet. At once: Trio takes a receiver that is cancelled out of its channel."""
        if self.scope is not None:
            self.scope.cancel(reason="the branch was switched off")


def _ways(source: Source[T]) -> tuple[Function[T], Callable[[], T] | None]:
    """How to wait for its next value, and how to take one without waiting, if that can be done."""
    if isinstance(source, trio.abc.ReceiveChannel):
        return source.receive, getattr(source, "receive_nowait", None)
    if isinstance(source, trio.Event):
        return cast("Function[T]", source.wait), cast("Callable[[], T]", lambda: _happened(source))
    if callable(source):
        return source, None
    raise TypeError(f"select expected receive channels, events and async functions, got {source!r}")


def _happened(event: trio.Event) -> None:
    if not event.is_set():
        raise trio.WouldBlock


class Select(Generic[T]):
    """What `select` opens: `next()`, or iterate; `guard` switches branches off and on.

    `left`, when the block is over, holds what was received and not selected: pairs as `next` gives them.
    """

    def __init__(self, nursery: trio.Nursery, sources: Sequence[Source[T]], biased: bool) -> None:
        self.left: list[tuple[Source[T], T]] = []
        self._nursery = nursery
        self._branches = [_Branch(source) for source in sources]
        self._biased = biased
        self._turn = 0  # the branch to be asked first
        self._arrivals = Arrivals()

    def guard(self, source: Source[T], condition: bool) -> None:
        """Switch the branch of `source` on or off, from now on. Nothing is taken from a source that is off.

        What had been received of it already is kept until it is on again.
        """
        branch = self._branch(source)
        branch.on = condition
        if not condition:
            branch.withdraw()
        self._arrivals.announce()

    def _branch(self, source: Source[T]) -> _Branch[T]:
        for branch in self._branches:
            if branch.source is source or branch.source == source:
                return branch
        raise ValueError(f"{source!r} is no source of this select")

    @overload
    async def next(self) -> tuple[Source[T], T]: ...
    @overload
    async def next(self, *, default: D) -> tuple[Source[T], T] | D: ...

    async def next(self, *, default: Any = _NOTHING) -> Any:
        """The next value, with the source it comes from. A checkpoint; who is cancelled in it has taken nothing.

        With `default` it does not wait: that is the answer when no source is ready. A function is started by the first call,
        and ready when it has returned. What a source raises is raised here, and the source asked again by the next call.
        `trio.EndOfChannel`: all sources are closed. RuntimeError: those that are not are all switched off.
        """
        found = None
        if default is not _NOTHING or self._biased:
            await self._catch_up()
            found = self._poll()
        if found is None and default is not _NOTHING:
            self._start_functions()
            return default
        if found is None:
            found = await self._arrivals.take(self._taken)
        branch, outcome = found
        return branch.source, outcome.unwrap()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Source[T], T]:
        try:
            return await self.next()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def _catch_up(self) -> None:
        """See what was sent before this call: a task that receives has been woken by it then, but maybe not run.

        A task that can run does so in the next turn of Trio's loop, in no certain order; after two turns it has.
        """
        await trio.lowlevel.checkpoint()
        if any(branch.receiving for branch in self._branches):
            await trio.lowlevel.checkpoint()

    def _start_functions(self) -> None:
        for branch in self._branches:
            if branch.at_once is None:
                self._arm(branch)

    def _taken(self) -> tuple[_Branch[T], Outcome[T]] | None:
        if (found := self._poll()) is None:
            for branch in self._branches:
                self._arm(branch)
        return found

    def _arm(self, branch: _Branch[T]) -> None:
        if branch.on and not branch.closed and not branch.receiving:
            branch.arm(self._nursery, self._arrivals)

    def _poll(self) -> tuple[_Branch[T], Outcome[T]] | None:
        """Take from the first branch that has something: in the order of the sources, or round from the last one taken from."""
        branches, count = self._branches, len(self._branches)
        start = 0 if self._biased else self._turn
        for step in range(count):
            place = (start + step) % count
            branch = branches[place]
            if branch.on and not branch.closed and (outcome := branch.take()) is not None:
                if _ends(outcome):
                    branch.closed = True
                    continue
                branch.closed = branch.once
                self._turn = place + 1
                return branch, outcome
        self._demand_an_open_branch()
        return None

    def _demand_an_open_branch(self) -> None:
        opened = [branch for branch in self._branches if not branch.closed]
        if not opened:
            raise trio.EndOfChannel
        if not any(branch.on for branch in opened):
            raise RuntimeError("every source of this select that is not closed is switched off: nothing can ever come")

    def give_back(self) -> list[Exception]:
        """At the end of the block: put what is held into `left`; what failed unseen is the answer."""
        held = [(branch.source, branch.outcome) for branch in self._branches if branch.outcome is not None]
        self.left += [(source, outcome.value) for source, outcome in held if isinstance(outcome, Value)]
        return failures(outcome for _, outcome in held if not _ends(outcome))


def _ends(outcome: Outcome[Any]) -> bool:
    return isinstance(outcome, Error) and isinstance(outcome.error, trio.EndOfChannel | StopAsyncIteration)


@overload
def select(a: Values[A], b: Values[B], /, *, biased: bool = False) -> AbstractAsyncContextManager[Select[A | B]]: ...
@overload
def select(
    a: Values[A], b: Values[B], c: Values[C], /, *, biased: bool = False
) -> AbstractAsyncContextManager[Select[A | B | C]]: ...
@overload
def select(*sources: Values[T], biased: bool = False) -> AbstractAsyncContextManager[Select[T]]: ...
@overload
def select(*sources: Source[T], biased: bool = False) -> AbstractAsyncContextManager[Select[T | None]]: ...


@asynccontextmanager
async def select(*sources: Source[Any], biased: bool = False) -> AsyncIterator[Select[Any]]:
    """Take from whichever source is ready, until all are closed.

        async with select(numbers, letters) as ready:
            async for source, value in ready:
                if source is numbers:
                    ...

    Fair: of sources that are always ready each has its turn. `biased`: what was sent on an earlier one before `next` was
    called comes first. Each source's own order is kept. While `next` waits, and until a source has brought something, up to
    one value of each is taken off it ahead; what is not selected when the block is left is in `left`. The sources stay open.
    """
    if not sources:
        raise ValueError("select needs at least one source: of none, nothing can come")
    if any(source in sources[:place] for place, source in enumerate(sources)):
        raise ValueError("select was given one source twice")
    chooser: Select[Any] | None = None
    async with open_crew(lambda: chooser.give_back() if chooser else ()) as nursery:
        chooser = Select(nursery, sources, biased)
        yield chooser
        nursery.cancel_scope.cancel(reason="the block of select was left")
