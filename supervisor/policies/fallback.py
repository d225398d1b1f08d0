"""`fallback`: what to give in place of a failure."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from supervisor.policies.failures import Failures, leaves, matcher
from supervisor.policies.layer import Layer, P, T

F = TypeVar("F")


class fallback(Layer, Generic[F]):
    """Where the function fails, give `instead`: a value, or what a function of the exception gives (sync, or async).

    `on` says after which failures: types, names as in a file, functions that are asked; a group counts if each exception in it
    does. Where the function in its place fails, its exception comes out, with the first as its `__context__`.
    """

    def __init__(
        self, instead: F | Callable[[Exception], Awaitable[F]] | Callable[[Exception], F], *, on: Failures = Exception
    ) -> None:
        self._instead: Any = instead
        self._on = matcher(on)

    async def call(  # type: ignore[override]  # its own type of result, too
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T | F:
        try:
            return await function(*args, **kwargs)
        except Exception as error:
            if not all(map(self._on, leaves(error))):
                raise
            return await self._given(error)

    async def _given(self, error: Exception) -> F:
        found: Any = self._instead(error) if callable(self._instead) else self._instead
        if callable(self._instead) and inspect.isawaitable(found):
            found = await found
        result: F = found
        return result
