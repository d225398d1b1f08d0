"""Cancelling a task at each of its steps in turn, to see whether it leaves anything behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from trio.abc import Instrument
from trio.testing import MockClock, wait_all_tasks_blocked

Scene = tuple[Callable[[], Awaitable[None]], Sequence[Callable[[], Awaitable[None]]], Callable[[], bool]]
"""The victim; who is about beside it; and whether all is well when everybody has gone."""


class At(Instrument):
    """Cancels a scope when a task is about to take its step number `step`."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if not self.left:
                self.scope.cancel(reason="a step of the test")


def cancelled_at_every_step(make: Callable[[], Scene]) -> int:
    """Play the scene again and again, the victim cancelled at its first step, its second, ... until it gets through.

    The others, who are there before it, always must, and what the scene asks for must hold. Gives how many steps it has.
    """
    step = 1
    while _cancelled_at(step, make):
        step += 1
    return step - 1


def _cancelled_at(step: int, make: Callable[[], Scene]) -> bool:
    victim, others, all_well = make()
    at = At(step)

    async def cancelled() -> None:
        with at.scope:
            at.task = trio.lowlevel.current_task()
            await victim()

    async def main() -> None:
        with trio.fail_after(10_000):
            async with trio.open_nursery() as nursery:
                for other in others:
                    nursery.start_soon(other)
                    await wait_all_tasks_blocked()
                nursery.start_soon(cancelled)
        assert all_well(), f"after a cancel at step {step}"

    trio.run(main, clock=MockClock(autojump_threshold=0), instruments=[at])
    return at.scope.cancel_called
