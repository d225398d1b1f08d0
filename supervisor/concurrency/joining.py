"""A known number of functions at once: wait for all, for all unless one fails, or for the first."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import trio

from supervisor.concurrency.crew import Function, Outcome, captured, failures, open_crew, raise_together, refuse_coroutines

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


@overload
async def join(a: Function[A], /) -> tuple[Outcome[A]]: ...
@overload
async def join(a: Function[A], b: Function[B], /) -> tuple[Outcome[A], Outcome[B]]: ...
@overload
async def join(a: Function[A], b: Function[B], c: Function[C], /) -> tuple[Outcome[A], Outcome[B], Outcome[C]]: ...
@overload
async def join(
    a: Function[A], b: Function[B], c: Function[C], d: Function[D], /
) -> tuple[Outcome[A], Outcome[B], Outcome[C], Outcome[D]]: ...
@overload
async def join(*functions: Function[T]) -> tuple[Outcome[T], ...]: ...


async def join(*functions: Function[Any]) -> tuple[Outcome[Any], ...]:
    """Run all at once, wait for all, and tell what became of each, in the order of the arguments.

    A failure is data, and disturbs no other. Cancellation (and KeyboardInterrupt, and whatever else is no `Exception`) is
    not: it ends all, and comes out together with the failures that there were by then.
    """
    refuse_coroutines("join", functions)
    outcomes: list[Outcome[Any] | None] = [None] * len(functions)

    async def run(place: int, function: Function[Any]) -> None:
        outcomes[place] = await captured(function)

    errors: list[BaseException] = []
    try:
        async with trio.open_nursery() as nursery:
            for place, function in enumerate(functions):
                nursery.start_soon(run, place, function, name=function)
    except BaseExceptionGroup as group:
        errors += [*group.exceptions, *failures(outcomes)]
    if errors:
        raise_together(errors)
    return tuple(found for found in outcomes if found is not None)


@overload
async def try_join(a: Function[A], /) -> tuple[A]: ...
@overload
async def try_join(a: Function[A], b: Function[B], /) -> tuple[A, B]: ...
@overload
async def try_join(a: Function[A], b: Function[B], c: Function[C], /) -> tuple[A, B, C]: ...
@overload
async def try_join(a: Function[A], b: Function[B], c: Function[C], d: Function[D], /) -> tuple[A, B, C, D]: ...
@overload
async def try_join(*functions: Function[T]) -> tuple[T, ...]: ...


async def try_join(*functions: Function[Any]) -> tuple[Any, ...]:
    """Run all at once; the values, in the order of the arguments, or the first failure, which cancels the others.

    The failure comes out as it was raised; where others fail too before they are gone, all of them in an exception group.
    """
    refuse_coroutines("try_join", functions)
    values: list[Any] = [None] * len(functions)

    async def run(place: int, function: Function[Any]) -> None:
        values[place] = await function()

    async with open_crew() as nursery:
        for place, function in enumerate(functions):
            nursery.start_soon(run, place, function, name=function)
    return tuple(values)


@overload
async def race(a: Function[A], /) -> A: ...
@overload
async def race(a: Function[A], b: Function[B], /) -> A | B: ...
@overload
async def race(a: Function[A], b: Function[B], c: Function[C], /) -> A | B | C: ...
@overload
async def race(a: Function[A], b: Function[B], c: Function[C], d: Function[D], /) -> A | B | C | D: ...
@overload
async def race(*functions: Function[T]) -> T: ...


async def race(*functions: Function[Any]) -> Any:
    """Run all at once; the first to finish wins, whether it returns or raises, and the others are cancelled.

    Returns when all are gone. A loser's value is dropped: to take from channels use `select`, which keeps it. A loser's failure
    is not: it is raised in place of the winner's value, or in a group with the winner's failure.
    """
    if not functions:
        raise ValueError("race needs at least one function: of none, none can win")
    refuse_coroutines("race", functions)
    won: list[Any] = []

    async def run(function: Function[Any]) -> None:
        won.append(await function())
        nursery.cancel_scope.cancel(reason="another one has won the race")

    async with open_crew() as nursery:
        for function in functions:
            nursery.start_soon(run, function, name=function)
    return won[0]
