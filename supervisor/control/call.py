"""One request, as its handler sees it, and the refusal that a handler answers with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from supervisor.control import messages
from supervisor.control.messages import Fault
from supervisor.events import Commanded

if TYPE_CHECKING:
    from supervisor.control.connection import Connection


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        self.fault = Fault(code, message, data)
        super().__init__(message)


class Call:
    """One request, as its handler sees it."""

    def __init__(self, connection: Connection, verb: str, identity: bytes) -> None:
        self.verb = verb
        self.by = str(connection.peer)
        self.server = connection.server
        self.tree = connection.server.tree
        self.connection = connection
        self.identity = identity
        self._head = b'{"jsonrpc":"2.0","method":%b,"params":{"id":%b,"item":' % (messages.encode(verb), identity)

    def record(self, names: Sequence[str] = ()) -> None:
        """Record that this peer asks for a change."""
        self.tree.journal.emit(Commanded, by=self.by, verb=self.verb, names=tuple(names))

    async def notify(self, items: Iterable[object]) -> None:
        """Send items of a stream; returns when the client's system has taken them."""
        if data := b"".join([self._head + messages.encode(item) + b"}}\n" for item in items]):
            await self.connection.send(data)
