"""WebSockets as sources."""

from __future__ import annotations

import types
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import trio

from supervisor.streams.stream import Stream

CLOSING = 1.0
"""Seconds that the other side gets to answer when we leave."""

_ORDERLY = (1000, 1001, 1005)
"""The codes of a server that is done, that goes away, or that does not say why it closes."""


def websocket(url: str, *, headers: Mapping[str, str] | None = None) -> Stream[str | bytes]:
    """The messages of one connection to `ws://…` or `wss://…`, until the server closes it.

    While the consumer is busy, a message or two and 4 KB are taken off the connection; then the server has to wait.
    ConnectionError where no connection comes about (within 60 s) or it breaks. It does not connect again: that is for a retry
    round it, which knows what was missed. Leaving tells the server, and waits a second at most for its answer.

    Needs the extra `websocket`.
    """
    return Stream.opened_by(partial(_connected, _library(), url, dict(headers or {})))


def _library() -> types.ModuleType:
    try:
        import trio_websocket
    except ModuleNotFoundError as error:
        hint = "supervisor.streams.websocket needs the library trio-websocket: pip install 'trio-supervisor[websocket]'"
        raise ModuleNotFoundError(hint, name=error.name) from error
    return trio_websocket


@asynccontextmanager
async def _connected(
    library: types.ModuleType, url: str, headers: dict[str, str]
) -> AsyncGenerator[AsyncIterator[str | bytes]]:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    async with AsyncExitStack() as stack:
        try:
            connection = await stack.enter_async_context(library.open_websocket_url(url, extra_headers=pairs))
        except library.HandshakeError as error:
            raise ConnectionError(f"no connection to {_shown(url)}: {error.__cause__ or repr(error)}") from error
        async with aclosing(_messages(library, url, connection)) as messages:
            try:
                yield messages
            finally:
                with trio.move_on_after(CLOSING):
                    await connection.aclose()


async def _messages(library: types.ModuleType, url: str, connection: Any) -> AsyncGenerator[str | bytes]:
    while True:
        try:
            message = await connection.get_message()
        except library.ConnectionClosed as error:
            if error.reason is not None and error.reason.code in _ORDERLY:
                return
            raise ConnectionError(f"the connection to {_shown(url)} broke: {error.reason}") from error
        yield message


def _shown(url: str) -> str:
    """Without what may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
