"""Several requests at once: a fan-out over the files that `web` serves, at most four of them in flight."""

from __future__ import annotations

import json
import urllib.request

import trio

from supervisor import Context, write_atomic
from supervisor.concurrency import map_concurrent


async def sizes(ctx: Context, server: str, pages: list[str], path: str) -> None:
    """Fetch all `pages`, and write down how large they are. The `deadline` of the job is one budget for all of them."""

    async def size(page: str) -> int:
        return len(await trio.to_thread.run_sync(_get, server + page, abandon_on_cancel=True))

    async with map_concurrent(size, pages, limit=4) as found:
        by_page = {page: await anext(found) for page in pages}
    await write_atomic(path, json.dumps(by_page, indent=2) + "\n")
    ctx.log.info("fetched", pages=len(by_page), left=ctx.deadline)


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:
        body: bytes = response.read()
    return body
