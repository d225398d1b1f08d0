"""What every construct here stands on: a nursery that drops nothing, and a wait that takes nothing in vain."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeAlias, TypeVar, TypeVarTuple

import trio
from outcome import Error, Value

T = TypeVar("T")
Args = TypeVarTuple("Args")

Function: TypeAlias = Callable[[], Awaitable[T]]
"""An async function that wants no argument; `functools.partial` makes one of any other."""

Outcome: TypeAlias = Value[T] | Error
"""What became of a function: `Value(value)` or `Error(error)`. `unwrap()`, once, returns the one or raises the other."""


@asynccontextmanager
async def open_crew(unseen: Callable[[], Iterable[Exception]] = tuple) -> AsyncIterator[trio.Nursery]:
    """A nursery out of which one exception comes by itself, and several come as a group.

    `unseen` is asked at the end for failures that were kept as data and handed to nobody: they come out with the others.
    """
    errors: list[BaseException] = []
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        errors += group.exceptions
    errors += unseen()
    if errors:
        raise_together(errors)


def raise_together(errors: list[BaseException]) -> NoReturn:
    """Raise the only one as it is, or all as a group; of nothing but cancellations, one. The list is emptied."""
    try:
        if len(errors) == 1 or all(isinstance(error, trio.Cancelled) for error in errors):
            raise errors[0]
        raise BaseExceptionGroup("several failed", errors)
    finally:
        errors.clear()  # it would be a cycle: error, traceback, frame, list, error


async def captured(function: Callable[[*Args], Awaitable[T]], *args: *Args) -> Outcome[T]:
    """Call it, and tell what became of it. What is no `Exception` passes: it is not about the function, as a cancellation."""
    try:
        return Value(await function(*args))
    except Exception as error:
        return Error(error)


def failures(outcomes: Iterable[Outcome[Any] | None]) -> list[Exception]:
    """The errors among them."""
    return [found.error for found in outcomes if isinstance(found, Error) and isinstance(found.error, Exception)]


class Arrivals:
    """Where those wait who take what others bring.

    What is there already is taken without waiting; after every `in_a_row` of that, other tasks have a turn. A turn of the loop
    may cost more than what was taken.
    """

    __slots__ = ("_at_once", "_in_a_row", "_waiting")

    def __init__(self, in_a_row: int = 1) -> None:
        self._waiting = trio.lowlevel.ParkingLot()
        self._in_a_row = in_a_row
        self._at_once = 0

    def announce(self) -> None:
        """There may be something to take."""
        if self._waiting:
            self._waiting.unpark_all()

    @trio.lowlevel.enable_ki_protection
    async def take(self, poll: Callable[[], T | None]) -> T:
        """What `poll` takes, as soon as it is not None; it is asked again after each `announce`.

        It can be cancelled each time, but not after `poll` has taken something: who is cancelled has taken nothing.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if (found := poll()) is not None:
            self._at_once = (self._at_once + 1) % self._in_a_row
            if not self._at_once:
                await trio.lowlevel.cancel_shielded_checkpoint()
            return found
        while True:
            await self._waiting.park()
            if (found := poll()) is not None:
                return found


def refuse_coroutines(caller: str, functions: Iterable[object]) -> None:
    """Raise TypeError where somebody wrote `join(fetch(url))`, before anything is started."""
    wrong = [function for function in functions if not callable(function)]
    for each in wrong:
        if inspect.iscoroutine(each):
            each.close()  # or Python would complain that nobody awaited it
    if wrong:
        told = "pass the function itself, with functools.partial for its arguments"
        raise TypeError(f"{caller} expected async functions, got {wrong[0]!r}: {told}")
