"""What engines that speak SQL have in common: a row of their table, as people see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from supervisor.queues.protocol import Record, State

WORKER_LOST = "its daemon died, or was out of reach, while it ran"
"""The error of an item that was claimed and never ended."""

NO_ATTEMPT_LEFT = "no attempt is left"

COLUMNS = (
    "id", "queue", "state", "payload", "priority", "attempts", "put_at", "ready_at", "expires_at", "started_at", "ended_at",
    "lease_until", "owner", "key", "in_group", "result", "error", "traceback", "done", "total", "cancelling",
)  # fmt: skip
"""What `record` takes, in this order."""


def record(row: Sequence[Any]) -> Record:
    """A row of `COLUMNS`."""
    found = dict(zip(COLUMNS, row, strict=True))
    done, total = found.pop("done"), found.pop("total")
    found |= {
        "state": State(found["state"]),
        "group": found.pop("in_group"),
        "payload": _as_bytes(found["payload"]),
        "result": None if found["result"] is None else _as_bytes(found["result"]),
        "progress": None if done is None else (done, total),
        "cancelling": bool(found["cancelling"]),
    }
    return Record(**found)


def _as_bytes(text: str | bytes) -> bytes:
    """JSON, as a database gives it."""
    return text.encode() if isinstance(text, str) else bytes(text)
