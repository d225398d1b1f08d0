"""`fallback`: what to give in place of a failure."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar, overload

from supervisor.policies.failures import Failures, leaves, matcher
from supervisor.policies.layer import Layer, P, T

F = TypeVar("F")


class fallback(Layer, Generic[F]):
    """Where the function fails, give `instead`: a value, or what a function of the exception gives (sync, or async).

    `on` says after which failures: types, names as in a file, functions that are asked; a group counts if each exception in it
    does. Where the function in its place fails, its exception comes out, with the first as its `__context__`.
    """

    @overload
    def __init__(self, instead: Callable[[Exception], Awaitable[F]], *, on: Failures = ...) -> None: ...
    @overload
    def __init__(self, instead: Callable[[Exception], F], *, on: Failures = ...) -> None: ...
    @overload
    def __init__(self, instead: F, *, on: Failures = ...) -> None: ...
    def __init__(self, instead: Any, *, on: Failures = Exception) -> None:
        self._instead = instead
        self._on = matcher(on)

    def __call__(  # type: ignore[override]  # what it gives has a type of its own
        self, function: Callable[P, Awaitable[T]], /
    ) -> Callable[P, Coroutine[Any, Any, T | F]]:
        return super().__call__(function)

    async def call(  # type: ignore[override]
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T | F:
        try:
            return await function(*args, **kwargs)
        except Exception as error:
            if not all(map(self._on, leaves(error))):
                raise
            given: F = await self._given(error)
            return given

    async def _given(self, error: Exception) -> Any:
        if not callable(self._instead):
            return self._instead
        given = self._instead(error)
        return await given if inspect.isawaitable(given) else given
