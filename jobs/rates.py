"""Calls to a partner that is not always there: what retry, breaker, rate and fallback of `supervisor.toml` are for."""

from __future__ import annotations

import json
import random

import trio

from supervisor import Context, write_atomic

OUTAGE = 20
"""Of each minute the partner is down for so many seconds: long enough for the breaker to open."""


async def fetch(ctx: Context, currency: str, path: str) -> None:
    """Ask the partner for a rate, and write it down: whole or not at all. Some calls fail, and now and then all do."""
    await trio.sleep(random.uniform(0.05, 0.3))
    if trio.current_time() % 60 < OUTAGE:
        raise ConnectionError("the partner is down (this job fails on purpose)")
    if random.random() < 0.2:
        raise TimeoutError("the partner did not answer (this job fails on purpose)")
    await _write(path, currency, round(random.uniform(1.05, 1.15), 4), attempt=ctx.attempt)


async def last_known(failure: Exception, currency: str, path: str) -> None:
    """The fallback: keep what there is, and say that it is old."""
    file = trio.Path(path)
    known = json.loads(await file.read_text()) if await file.exists() else {}
    await _write(path, currency, known.get("rate"), stale=str(failure))


async def _write(path: str, currency: str, rate: float | None, **more: object) -> None:
    await write_atomic(path, json.dumps({"currency": currency, "rate": rate, **more}) + "\n")
