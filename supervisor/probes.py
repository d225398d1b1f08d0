"""Probes: one question to a run, answered yes or why not."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from supervisor.spec import Spec


class Ready(Spec, frozen=True, kw_only=True):
    """`ready = { … }`: how a job says that it is ready. Exactly one key; without `ready`, started is ready."""

    log: Annotated[
        str | None, Meta(description="a regular expression: ready when a line of the job's output matches it anywhere")
    ] = None
    file: Annotated[str | None, Meta(description="a path: ready when it exists, and was not there from an earlier run")] = None
    notify: Annotated[bool | None, Meta(description="true: ready when the function calls `ctx.ready()`")] = None
