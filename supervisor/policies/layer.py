"""What all policies are: a layer round an async function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Layer(ABC):
    """A policy: `await layer.call(function, 1, key=2)` calls the function under it, and `@layer` makes that a function.

    One layer may be round many functions and many calls at once. It belongs to the Trio thread, and works on Trio's clock.
    """

    @abstractmethod
    async def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `function(*args, **kwargs)` under this policy. `Cancelled` passes through and counts as nothing."""

    def __call__(self, function: Callable[P, Awaitable[T]], /) -> Callable[P, Coroutine[Any, Any, T]]:
        """The function under this policy: a decorator of async functions, or of whatever gives something to await."""

        @wraps(function)
        async def layered(*args: P.args, **kwargs: P.kwargs) -> T:
            return await self.call(function, *args, **kwargs)

        return layered
