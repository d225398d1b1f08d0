"""Sources and stages that keep time, all on Trio's clock."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

import trio

T = TypeVar("T")

LATE = ("skip", "burst", "delay")
"""What can become of the ticks after a late one."""


async def interval(period: float, late: str) -> AsyncGenerator[int]:
    """Numbers, each in its time. Late is what was asked for late: a timer that is woken late makes nothing late."""
    start, number = trio.current_time(), 0
    while True:
        due, asked = start + number * period, trio.current_time()
        await trio.sleep_until(due)
        yield number
        if asked > due and late == "skip":
            number = max(number, math.floor((asked - start) / period))
        elif asked > due and late == "delay":
            start += asked - due
        number += 1


async def throttled(items: AsyncIterator[T], gap: float) -> AsyncGenerator[T]:
    """Each item `gap` seconds after the one before it, or later. How late a timer was woken is made up for by the next."""
    due, slept_over = -math.inf, 0.0
    async for item in items:
        due = max(due, trio.current_time() - slept_over)
        await trio.sleep_until(due)
        slept_over = trio.current_time() - due
        due += gap
        yield item


async def timed(items: AsyncIterator[T], seconds: float) -> AsyncGenerator[T]:
    """Items, as long as none is waited for longer than so many seconds."""
    while True:
        with trio.move_on_after(seconds) as waiting:
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
        if waiting.cancelled_caught:
            raise trio.TooSlowError(f"no item came within {seconds:g} s")
        yield item
