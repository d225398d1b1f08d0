"""Job functions for the tests of the control socket."""

import trio

from supervisor import Context


async def idle(ctx: Context) -> None:
    """A service that ends when it is asked to."""
    await ctx.wait_stopping()


async def stubborn(ctx: Context) -> None:
    """A service that does not end when it is asked to; only a cancel ends it."""
    await trio.sleep_forever()


async def brief() -> None:
    """A run that is over at once."""


async def endless() -> None:
    """A run that is never over by itself."""
    await trio.sleep_forever()


async def broken() -> None:
    """A run that fails."""
    raise ValueError("no such luck")
