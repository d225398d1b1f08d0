"""Every moment at which a task can be cancelled, and every order in which tasks can run."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from itertools import count

import pytest
import trio

SCHEDULER = "trio._core._run"


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope right before the n-th step that any task makes."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.scope = scope
        self.left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if not self.left:
            self.scope.cancel(reason="the harness cancels at every step")


async def cancelled_at_every_step(scenario: Callable[[trio.CancelScope], Awaitable[None]]) -> int:
    """Run `scenario` again and again, its scope cancelled one step later each time, until it ends before; how often.

    Each time no task is left. The scenario looks after the rest.
    """
    for step in count(1):
        before = trio.lowlevel.current_statistics().tasks_living
        scope = trio.CancelScope()
        instrument = CancelAtStep(scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await scenario(scope)
        finally:
            trio.lowlevel.remove_instrument(instrument)
        assert trio.lowlevel.current_statistics().tasks_living == before, step
        if instrument.left > 0:
            return step
    raise AssertionError


def shuffle_tasks(monkeypatch: pytest.MonkeyPatch, seed: int) -> random.Random:
    """Have Trio run the tasks that can run in an order that depends on `seed` alone; the source of chance is the answer."""
    chance = random.Random(seed)
    monkeypatch.setattr(f"{SCHEDULER}._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(f"{SCHEDULER}._r", chance)
    return chance
