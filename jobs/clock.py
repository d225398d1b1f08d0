"""Code that only knows asyncio: a server that tells the time, in an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

from supervisor import AsyncioContext


async def serve(ctx: AsyncioContext, path: str) -> None:
    """Tell everybody who connects to the socket at `path` what time it is, until the job is asked to stop."""
    with _fresh(Path(path)):
        async with await asyncio.start_unix_server(_tell, path):
            await ctx.wait_stopping()


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[None]:
    """No socket of an earlier run is in the way, and none of ours is left."""
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


async def _tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"{datetime.datetime.now(datetime.UTC):%H:%M:%S} UTC\n".encode())
    await writer.drain()
    writer.close()
