"""Where one process waits for the work of one queue that is in a server, and claims it together with the put that brings it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from supervisor.queues.protocol import Demand

T = TypeVar("T")


class Lookout(Generic[T]):
    """A moment on Trio's clock at which a claim may bring something, that can be moved; and whoever waits for it.

    T is a claim that is under way. `abandon` is called with one that was made for somebody who has gone away meanwhile.
    """

    def __init__(self, abandon: Callable[[T], object]) -> None:
        self._abandon = abandon
        self._at = math.inf
        self._moved = trio.Event()
        self._patient: _Patient[T] | None = None

    def clear(self) -> None:
        """A claim begins: nothing is known of what comes after it."""
        self._at = math.inf

    def set(self, after: float = 0.0) -> None:
        """A claim may bring something in so many seconds, or sooner."""
        at = trio.current_time() + after
        if at < self._at:
            self._at = at
            self._move()

    def _move(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    async def wait(self, demand: Callable[[], Demand | None] | None) -> T | None:
        """Until a claim may bring something: None; or until one is under way, of what `demand` said."""
        patient = _Patient[T](demand)
        self._patient = patient if demand is not None else self._patient
        try:
            if self._at <= trio.current_time():
                await trio.lowlevel.checkpoint()
            while patient.claim is None and self._at > trio.current_time():
                with trio.move_on_at(self._at):
                    await self._moved.wait()
        except trio.Cancelled:
            if patient.claim is not None:
                self._abandon(patient.claim)
            raise
        finally:
            if self._patient is patient:
                self._patient = None
        return patient.claim

    def claim_along(self, begin: Callable[[Demand], T]) -> T | None:
        """A put begins: have whoever waits claim together with it. `begin` makes the claim."""
        patient = self._patient
        if patient is None or patient.demand is None or (demand := patient.demand()) is None:
            return None
        self._patient = None
        self.clear()
        patient.claim = begin(demand)
        self._move()
        return patient.claim


class _Patient(Generic[T]):
    """Somebody who waits."""

    def __init__(self, demand: Callable[[], Demand | None] | None) -> None:
        self.demand = demand
        self.claim: T | None = None
