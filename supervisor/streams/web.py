"""WebSockets as sources."""

from __future__ import annotations

import types
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import trio

from supervisor.streams.beside import unwrapped
from supervisor.streams.stream import Stream

CONNECTING = 60.0
"""Seconds that each of the two steps to a connection may take: TCP and TLS, and the handshake of the WebSocket."""

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
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"expected the address of a WebSocket such as wss://example.org/feed, got {_shown(parts)!r}")
    return Stream.opened_by(partial(_connected, _library(), parts, dict(headers or {})))


def _library() -> types.ModuleType:
    try:
        import trio_websocket
    except ModuleNotFoundError as error:
        hint = "supervisor.streams.websocket needs the library trio-websocket: pip install 'trio-supervisor[websocket]'"
        raise ModuleNotFoundError(hint, name=error.name) from error
    return trio_websocket


@asynccontextmanager
async def _connected(
    library: types.ModuleType, url: SplitResult, headers: dict[str, str]
) -> AsyncGenerator[AsyncIterator[str | bytes]]:
    """One connection. The library closes its socket only where it is the first to leave: here it is ours."""
    try:
        with trio.fail_after(CONNECTING):
            stream = await _dial(url)
    except (OSError, trio.TooSlowError) as error:
        raise _no_connection(url, error) from error
    try:
        async with _shaken_hands(library, stream, url, headers) as connection:
            async with aclosing(_messages(library, url, connection)) as messages:
                try:
                    yield messages
                finally:
                    with trio.move_on_after(CLOSING):
                        await connection.aclose()
    finally:
        await trio.aclose_forcefully(stream)


async def _dial(url: SplitResult) -> trio.abc.Stream:
    host = url.hostname or ""
    if url.scheme == "wss":
        return await trio.open_ssl_over_tcp_stream(host, url.port or 443, https_compatible=True)
    return await trio.open_tcp_stream(host, url.port or 80)


@asynccontextmanager
async def _shaken_hands(
    library: types.ModuleType, stream: trio.abc.Stream, url: SplitResult, headers: dict[str, str]
) -> AsyncGenerator[Any]:
    """The library's connection, and its task."""
    connection, place = None, url.netloc.rpartition("@")[2]
    resource = (url.path or "/") + (f"?{url.query}" if url.query else "")
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    try:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                with trio.fail_after(CONNECTING):
                    connection = await library.wrap_client_stream(nursery, stream, place, resource, extra_headers=pairs)
                try:
                    yield connection
                finally:
                    nursery.cancel_scope.cancel(reason="the stream is left")
    except (library.HandshakeError, trio.TooSlowError) as error:
        if connection is not None:
            raise  # it is the block's
        raise _no_connection(url, error) from error


async def _messages(library: types.ModuleType, url: SplitResult, connection: Any) -> AsyncGenerator[str | bytes]:
    while True:
        try:
            message = await connection.get_message()
        except library.ConnectionClosed as error:
            if error.reason is not None and error.reason.code in _ORDERLY:
                return
            raise ConnectionError(f"the connection to {_shown(url)} broke: {error.reason}") from error
        yield message


def _no_connection(url: SplitResult, error: Exception) -> ConnectionError:
    status = getattr(error, "status_code", None)
    why = f"the server answered with status {status}" if status else str(error) or f"no answer within {CONNECTING:g} s"
    return ConnectionError(f"no connection to {_shown(url)}: {why}")


def _shown(url: SplitResult) -> str:
    """Without what may be secret."""
    return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
