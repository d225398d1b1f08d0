"""A stream of lines, in batches: what the heartbeats of the last minutes come to."""

from __future__ import annotations

import json
from typing import Any

from supervisor import write_atomic
from supervisor.streams import lines


async def digest(source: str, path: str) -> None:
    """Read the records in `source` in chunks of ten, in constant memory, and write a line for each chunk into `path`."""
    chunks = lines(source).map(json.loads).filter(_is_a_beat).chunks(10)
    summary = await chunks.map(_summed_up).collect()
    await write_atomic(path, "".join(f"{line}\n" for line in summary))


def _is_a_beat(record: dict[str, Any]) -> bool:
    return "beat" in record


def _summed_up(beats: list[dict[str, Any]]) -> str:
    return f"{len(beats)} beats from {beats[0]['at']} to {beats[-1]['at']}"
