"""An async job: it lives in the daemon's own loop and appends one line a second to a file."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from supervisor import Context


async def beat(ctx: Context, path: str, every: float = 1.0) -> None:
    """Append a heartbeat to `path` until the job is asked to stop; then say goodbye in the same file."""
    count = 0
    while True:
        count += 1
        ctx.heartbeat()
        _append(Path(path), {"beat": count, "run": ctx.run, "at": _now()})
        if not await ctx.sleep(every):
            break
    _append(Path(path), {"goodbye": count, "run": ctx.run, "at": _now()})


def _append(path: Path, record: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
