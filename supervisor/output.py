"""Captured output of child processes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from supervisor.spec import Bytes, Spec


class Rotate(Spec, frozen=True, kw_only=True):
    """`rotate = { … }`: when a log file is full, and how many old ones stay."""

    size: Annotated[Bytes, Meta(description="a file that would grow beyond this is put aside as NAME.log.1")] = Bytes(10 << 20)
    keep: Annotated[int, Meta(ge=0, description="how many files put aside are kept")] = 5
