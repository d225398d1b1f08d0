"""One client: lines in, requests side by side, answers out, until it hangs up.

The lines are read here, and no longer than they may be; what one of them means is `rpc`'s.
"""

from __future__ import annotations

import contextlib
import re
import select
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from supervisor.control import messages, rpc
from supervisor.control.messages import Fault

if TYPE_CHECKING:
    from supervisor.control.server import Server
    from supervisor.control.sessions import WayIn

MAX_REQUEST = 1 << 20
MAX_SUBMIT = 1 << 26
"""Bytes of a `submit`: what it carries is not ours to judge."""

MAX_UNDER_WAY = 1024
"""Requests of one connection that may be under way; the next one is read when one of them is done."""

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, by the kernel's word."""

    pid: int
    uid: int
    name: str

    def __str__(self) -> str:
        return f"uid {self.uid} ({self.name})" if self.name else f"uid {self.uid}"


class Connection:
    """One client. Requests are served side by side; their answers carry the ids, in any order.

    Nothing queues here: an answer waits its turn in its own task, and a stream leaves in the journal what the client does
    not read. So memory is bounded by what may be under way, and a client that does not read only keeps itself waiting.
    """

    def __init__(self, server: Server, stream: trio.SocketStream, peer: Peer) -> None:
        self.server = server
        self.peer = peer
        self.ways_in: dict[int | str, WayIn] = {}
        """By the id of the request: where what the client has to say meanwhile goes."""
        self._stream = stream
        self._sending = trio.Lock()
        self._slots = trio.Semaphore(MAX_UNDER_WAY)

    async def serve(self) -> None:
        """Answer until the client has hung up, or has no more to ask and has got its answers."""
        lines = Requests(self._stream)
        async with trio.open_nursery() as connection:
            async with trio.open_nursery() as requests:
                with self._listening():
                    while (line := await lines.read()) != b"":
                        await self._slots.acquire()
                        requests.start_soon(self._answer, line, connection.cancel_scope)
                connection.start_soon(_cancel_on_hangup, self._stream.socket.fileno(), connection.cancel_scope)
            connection.cancel_scope.cancel(reason="everything is answered")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Where requests are read: the server ends that when there is nothing left to ask."""
        with trio.CancelScope() as scope:
            self.server.reading.add(scope)
            if self.server.closing.is_set():
                scope.cancel(reason="the daemon has ended")
            try:
                yield
            finally:
                self.server.reading.discard(scope)

    async def send(self, data: bytes) -> None:
        """Send whole lines, in between those of others."""
        async with self._sending:
            await self._stream.send_all(data)

    async def _answer(self, line: bytes | None, scope: trio.CancelScope) -> None:
        try:
            if reply := _TOO_LONG if line is None else await rpc.reply(self, line):
                await self.send(reply)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel(reason="the client hung up")
        finally:
            self._slots.release()


async def _cancel_on_hangup(descriptor: int, scope: trio.CancelScope) -> None:
    """Cancel when the client is gone altogether; one that only has no more to ask still waits for its answers."""
    if not hasattr(select, "epoll"):
        scope.cancel(reason="the client hung up")
        return
    with select.epoll() as hangups:
        hangups.register(descriptor, 0)  # no event but a hang-up, which is always reported
        await trio.lowlevel.wait_readable(hangups.fileno())
    scope.cancel(reason="the client hung up")


class Requests:
    """The lines of a stream, each in memory only up to `MAX_REQUEST`, or `MAX_SUBMIT`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._searched = 0
        self._ended = False

    async def read(self) -> bytes | None:
        """The next line that is not blank; None for one that was too long; empty at the end."""
        while True:
            line = await self._line()
            if line is None or line.strip() or (self._ended and not self._buffer):
                return line and line.strip()

    async def _line(self) -> bytes | None:
        too_long = False
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            if len(self._buffer) > MAX_REQUEST and len(self._buffer) > _most(self._buffer):
                too_long = True
                self._buffer.clear()
            self._searched = len(self._buffer)
            chunk = b"" if self._ended else await self._receive()
            if not chunk:
                self._ended = True
                end = len(self._buffer)
                break
            self._buffer += chunk
        with memoryview(self._buffer) as received:
            line = bytes(received[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return None if too_long or (len(line) > MAX_REQUEST and len(line) > _most(line)) else line

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_CHUNK))
        except trio.BrokenResourceError:
            return b""


_LIMITS = f"{MAX_REQUEST} bytes ({MAX_SUBMIT} for a submit that names its method before its params)"
_TOO_LONG = rpc.failure(b"null", Fault(messages.INVALID_REQUEST, f"request is over {_LIMITS}"))
_SUBMIT = re.compile(rb'\s*\{[^{}\[\]]*"method"\s*:\s*"submit"')


def _most(line: bytes | bytearray) -> int:
    """How long a request may be that begins like this."""
    return MAX_SUBMIT if _SUBMIT.match(line, 0, 1024) else MAX_REQUEST
