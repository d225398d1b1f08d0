"""Several policies round one function, in the one order that makes sense."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, overload

from supervisor.policies import ORDER
from supervisor.policies.fallback import F, fallback
from supervisor.policies.layer import Layer, P, T


@overload
def compose(
    body: Callable[P, Awaitable[T]],
    *,
    deadline: Layer | None = None,
    retry: Layer | None = None,
    breaker: Layer | None = None,
    rate: Layer | None = None,
    bulkhead: Layer | None = None,
    timeout: Layer | None = None,
) -> Callable[P, Awaitable[T]]: ...
@overload
def compose(
    body: Callable[P, Awaitable[T]],
    *,
    fallback: fallback[F],
    deadline: Layer | None = None,
    retry: Layer | None = None,
    breaker: Layer | None = None,
    rate: Layer | None = None,
    bulkhead: Layer | None = None,
    timeout: Layer | None = None,
) -> Callable[P, Awaitable[T | F]]: ...
def compose(body: Callable[P, Awaitable[Any]], **layers: Layer | None) -> Callable[P, Awaitable[Any]]:
    """`body` under these policies, nested as `ORDER` has them, whatever order they are given in. Without any, `body` itself."""
    if unknown := layers.keys() - set(ORDER):
        raise TypeError(f"compose: no policy {sorted(unknown)[0]!r}: expected {', '.join(ORDER)}")
    for name in reversed(ORDER):
        if (layer := layers.get(name)) is not None:
            body = partial(layer.call, body)
    return body
