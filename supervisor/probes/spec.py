"""What `ready` and `health` can say in the file."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta

from supervisor.spec import Seconds, Spec


class Probe(Spec, frozen=True, kw_only=True):
    """One question: exactly one key of it, and `status` beside `http`."""

    http: Annotated[
        str | None, Meta(description="a URL, http or https: yes when a GET is answered with `status`. Follows no redirects")
    ] = None
    status: Annotated[
        int | None, Meta(ge=200, le=599, description="the HTTP status that `http` expects; 200 unless you say otherwise")
    ] = None
    tcp: Annotated[str | None, Meta(description='"host:port": yes when it accepts a connection')] = None
    unix: Annotated[str | None, Meta(description="the path of a Unix stream socket: yes when it accepts a connection")] = None
    exec: Annotated[
        str | tuple[str, ...] | None,
        Meta(
            description="a command, run like the job's own: yes when it exits with code 0, else the first line it printed "
            "is the reason. Everything of it is killed when its time is over"
        ),
    ] = None
    file: Annotated[str | None, Meta(description="a path: yes when it is there; for `ready`: made or touched by this run")] = (
        None
    )
    call: Annotated[
        str | None,
        Meta(
            description='"module:function" in the daemon: yes when it returns True or None; False, an exception, or a text, '
            "which is the reason, is a no. `def` runs in a thread, and never twice at a time"
        ),
    ] = None
    notify: Annotated[
        bool | None,
        Meta(
            description="true: it says so itself. A command sends READY=1 and WATCHDOG=1 to its NOTIFY_SOCKET, "
            "a function calls `ctx.ready()` and `ctx.heartbeat()`"
        ),
    ] = None


class Ready(Probe, frozen=True, kw_only=True):
    """`ready = { … }`: how a job says that it is ready. Without `ready`, started is ready."""

    log: Annotated[
        str | None, Meta(description="a regular expression: yes when a line of the job's output matches it anywhere")
    ] = None


class Health(Probe, frozen=True, kw_only=True):
    """`health = { … }`: a question that is asked again and again from when the job is ready."""

    every: Annotated[
        Seconds,
        Meta(
            gt=0, description="from one question to the next; with `notify`, the longest silence. The first is asked then too"
        ),
    ] = Seconds(10)
    timeout: Annotated[Seconds, Meta(gt=0, description="a question that takes longer has got no answer")] = Seconds(3)
    failures: Annotated[
        int, Meta(ge=1, description="so many bad answers in a row, or none, and the job is unhealthy: a failure of its run")
    ] = 3
    successes: Annotated[int, Meta(ge=1, description="so many good answers in a row and it is healthy")] = 1
    start_period: Annotated[Seconds, Meta(description="for so long after it became ready, bad answers do not count")] = Seconds(
        0
    )


PROBES = tuple(name for name in Ready.__struct_fields__ if name != "status")
"""The keys that are questions."""


def split_address(address: str) -> tuple[str, int]:
    """`host:port`, with the brackets of an IPv6 host taken off. Raises ValueError for anything else."""
    parts = urlsplit(f"//{address}")
    if not parts.hostname or not parts.port or parts.netloc != address or "@" in address:
        raise ValueError(address)
    return parts.hostname, parts.port
