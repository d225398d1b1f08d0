"""Cancellation that is handed round: who holds a token can cancel all work under it, wherever its tasks live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import trio


class CancelToken:
    """Cancels scopes in any number of tasks, and its children; a child cancels only itself.

        token = CancelToken()
        with token.scope():
            await fetch(url)  # somebody else calls token.cancel(reason="the user went away")

    Nothing has to be closed: a child that nobody holds any more, and no scope uses, is forgotten. It belongs to one Trio run;
    from another thread use `trio.from_thread.run_sync(token.cancel, …)`.
    """

    __slots__ = ("__weakref__", "_children", "_event", "_parent", "_reason", "_scopes")

    def __init__(self) -> None:
        self._parent: CancelToken | None = None  # held, so that a grandparent reaches a grandchild
        self._children: WeakSet[CancelToken] = WeakSet()
        self._scopes: dict[trio.CancelScope, None] = {}
        self._event = trio.Event()
        self._reason: str | None = None

    def __repr__(self) -> str:
        return f"<CancelToken {'live' if self._reason is None else f'cancelled: {self._reason}'}>"

    @property
    def cancelled(self) -> bool:
        """Whether it, or one above it, was cancelled."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why it was cancelled; None while it is not."""
        return self._reason

    def child(self) -> CancelToken:
        """A token that goes with this one, and can go before it. One of a cancelled token is cancelled."""
        child = CancelToken()
        child._parent = self
        self._children.add(child)
        if self._reason is not None:
            child.cancel(self._reason)
        return child

    def cancel(self, reason: str) -> None:
        """Cancel everything under this token. The first reason stands; a second call does nothing."""
        going = [self]
        while going:
            token = going.pop()
            if token._reason is None:
                token._reason = reason
                token._event.set()
                for scope in token._scopes:
                    scope.cancel(reason=reason)
                going += token._children

    async def wait(self) -> None:
        """Wait until it is cancelled. A checkpoint."""
        await self._event.wait()

    @contextmanager
    def scope(self) -> Iterator[trio.CancelScope]:
        """A cancel scope that goes with this token; of a cancelled token it is cancelled at its first checkpoint.

        As with `trio.move_on_after`, the block is left and the program goes on after it; ask `cancelled` or the scope's
        `cancelled_caught`. Any number at a time, in any tasks.
        """
        with trio.CancelScope() as scope:
            if self._reason is not None:
                scope.cancel(reason=self._reason)
            self._scopes[scope] = None
            try:
                yield scope
            finally:
                del self._scopes[scope]
