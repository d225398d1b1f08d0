"""Functions that handle items, for the tests of the verbs about queues."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TypedDict

import trio

from supervisor import Context
from supervisor.errors import QueueError


class Image(TypedDict):
    """What `resize` takes."""

    path: str


async def resize(image: Image) -> str:
    """Something that comes to a result."""
    return f"{image['path']} resized"


async def hold(item: object) -> None:
    """Something that never ends by itself."""
    await trio.sleep_forever()


async def fail(item: object) -> None:
    """Something that goes wrong."""
    raise ValueError(f"no such luck with {item}")


async def forget(item: object) -> None:
    """Something that returns nothing."""


async def add(numbers: list[int]) -> int:
    """Something that takes several at once."""
    return sum(numbers)


async def cling(item: object, ctx: Context) -> None:
    """Something that is asked to end, and does not."""
    await trio.sleep_forever()


@asynccontextmanager
async def open(name, settings, place):  # the engine of a queue
    """Something that cannot be opened."""
    raise QueueError("no address of a server")
    yield
