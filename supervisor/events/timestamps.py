"""The wall clock as events show it. Nobody measures a duration with it."""

from __future__ import annotations

import datetime
import functools
import time


def wall_now() -> str:
    """The wall clock for people: RFC 3339, UTC, milliseconds. Never used for a duration."""
    second, fraction = divmod(time.time_ns(), 1_000_000_000)
    return f"{_second(second)}.{fraction // 1_000_000:03d}Z"


@functools.lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))  # events come in crowds: formatted once for all of them


def rfc3339(moment: datetime.datetime) -> str:
    """`moment` (aware) as RFC 3339 text in UTC with milliseconds."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
