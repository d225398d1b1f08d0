"""Clients of a running daemon: `Client` blocks, `AsyncClient` is for Trio (and imported when it is first asked for)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from supervisor.control.client import Client, Refusal
from supervisor.control.wire import Unreachable
from supervisor.errors import ControlError

if TYPE_CHECKING:
    from supervisor.control.aclient import AsyncClient

__all__ = ["AsyncClient", "Client", "ControlError", "Refusal", "Unreachable"]


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":
        from supervisor.control.aclient import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
