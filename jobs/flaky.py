"""A job that crashes now and then, to show what backoff looks like in `supervisor status`."""

from __future__ import annotations

import random

from supervisor import Context


async def stumble(ctx: Context, within: float = 20.0) -> None:
    """Work for a while, then fail. How long is left to chance."""
    if await ctx.sleep(random.uniform(1, within)):
        raise ConnectionError("the partner hung up (this job fails on purpose)")
