"""The control socket's server: takes the socket, accepts, takes it back when stolen, and holds what its connections share.

    connection    one client: lines in, answers out
    rpc           what a line asks for; the fence round its handler
    handlers      a handler for each verb, out of `views`, `orders`, `feeds`, `sessions` and `items`
    call          a request as its handler sees it

A connection is fenced: one that fails takes nobody else down.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from supervisor import __version__
from supervisor.control import messages, rpc
from supervisor.control.connection import Connection, Peer
from supervisor.control.listener import Place
from supervisor.control.messages import Fault
from supervisor.control.views import Table
from supervisor.events import Warned
from supervisor.unix import SocketTaken

if TYPE_CHECKING:
    from supervisor.config import Plan
    from supervisor.history import History
    from supervisor.tree import Order, Supervisor

MAX_CLIENTS = 1024

FAREWELL = 1.0
"""Seconds that the connections of a tree that has ended have left, to be told of the end and to read what is on its way."""

_SPARE = 3
_log = structlog.get_logger("control")


class Reloader(Protocol):
    """Reads the configuration file again and, without `plan`, applies it. Raises SpecError where the file has faults."""

    async def __call__(self, *, plan: bool, by: str) -> tuple[Plan, Sequence[Order]]:
        """What changes, and the orders that change it."""


async def serve_control(
    tree: Supervisor,
    path: Path,
    *,
    reload: Reloader | None = None,
    history: History | None = None,
    task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control socket of `tree` at `path` until cancelled; then unlink it if it is still ours.

    `task_status.started(path)` is called when it can be connected to. Only the holder of the daemon's lock may call this: a
    stale socket is replaced. Raises SocketTaken where another process answers at `path`, OSError where it cannot be bound.
    """
    with Place(path) as place:
        server = Server(tree, place, reload, history)
        await server.serve(task_status)


class Server:
    """The socket and what its connections share."""

    def __init__(self, tree: Supervisor, place: Place, reload: Reloader | None, history: History | None) -> None:
        self.tree = tree
        self.reload = reload
        self.history = history
        self.table = Table(tree.journal)
        self.version = __version__
        self._place = place
        self._allowed: dict[int, str] = {}
        self._clients = 0
        self._spare = Spare(_SPARE)
        self.closing = trio.Event()
        self.reading: set[trio.CancelScope] = set()
        """Round each connection that waits for its next request."""

    async def serve(self, task_status: trio.TaskStatus[Path]) -> None:
        """Accept until cancelled; where that is because the tree has ended, its connections are told so."""
        self._allowed = await trio.to_thread.run_sync(_names_of, {os.getuid(), 0})
        with self._spare:
            async with trio.open_nursery() as nursery:
                connections = await nursery.start(self._keep_connections)
                try:
                    await self._accept_all(connections, task_status)
                finally:
                    self.closing.set()

    async def _accept_all(self, connections: trio.Nursery, task_status: trio.TaskStatus[Path]) -> None:
        listener = self._place.take()
        if not self._place.watched:
            self._warn("cannot be watched here: nobody will notice if its file is removed")
        task_status.started(self._place.path)
        while True:
            await self._accept_until_lost(listener, connections)
            listener = await self._take_back()

    async def _keep_connections(self, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """The nursery of the connections. They outlive the end of the tree by so much that they can hear of it."""
        with trio.CancelScope(shield=True) as scope:
            async with trio.open_nursery() as connections:
                task_status.started(connections)
                await self.closing.wait()
                scope.deadline = trio.current_time() + (FAREWELL if self.tree.has_ended else 0.0)
                for reading in self.reading:
                    reading.cancel(reason="the daemon has ended: no more requests are taken")

    async def _accept_until_lost(self, listener: socket.socket, connections: trio.Nursery) -> None:
        with trio.socket.from_stdlib_socket(listener) as accepting:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept, accepting, connections)
                await self._place.wait_lost()
                nursery.cancel_scope.cancel(reason="the socket's file was removed or replaced")

    async def _take_back(self) -> socket.socket:
        """Listen at the path again. What stands in the way is waited for, not fought: it may be a daemon, too."""
        while True:
            try:
                listener = self._place.take()
            except (OSError, SocketTaken) as problem:
                self._warn(f"was removed or replaced, and cannot be bound again: {problem}")
                await self._place.wait_changed()
            else:
                self._warn("was removed or replaced, and has been bound again")
                return listener

    def _warn(self, what: str) -> None:
        self.tree.journal.emit(Warned, text=f"control socket {self._place.path}: {what}")

    async def _accept(self, listener: trio.socket.SocketType, connections: trio.Nursery) -> None:
        exhausted = False
        while True:
            try:
                client, _ = await listener.accept()
            except OSError as problem:
                if problem.errno in _GONE_AGAIN:
                    continue
                if problem.errno not in _EXHAUSTED:
                    raise
                if self._spare.release():
                    continue
                if not exhausted:
                    self._warn(f"cannot accept: {problem.strerror}")
                exhausted = True
                await trio.sleep(0.1)  # nothing tells when others give descriptors back; the caller waits in the backlog
            else:
                exhausted = False
                connections.start_soon(self._serve_client, client)

    async def _serve_client(self, client: trio.socket.SocketType) -> None:
        """The fence round a connection."""
        self._clients += 1
        try:
            async with trio.SocketStream(client) as stream:
                connection = Connection(self, stream, self._peer(client))
                if refusal := self._refusal(connection.peer):
                    await connection.send(rpc.failure(b"null", refusal))
                else:
                    await connection.serve()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # hung up
        except* Exception as problems:
            _log.error("a control connection failed", exc_info=problems)
        finally:
            self._clients -= 1
            self._spare.refill()

    def _refusal(self, peer: Peer) -> Fault | None:
        if peer.uid not in self._allowed:
            return Fault(messages.NOT_ALLOWED, "not allowed: ask as the user that the daemon runs as, or as root")
        if self._clients > MAX_CLIENTS:
            return Fault(messages.TOO_MANY, f"too many connections ({MAX_CLIENTS}); close one and come again")
        return None

    def _peer(self, client: trio.socket.SocketType) -> Peer:
        if not hasattr(socket, "SO_PEERCRED"):
            return Peer(0, os.getuid(), self._allowed[os.getuid()])  # the file's mode has decided
        pid, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return Peer(pid, uid, self._allowed.get(uid, ""))


_GONE_AGAIN = (errno.ECONNABORTED, errno.EINTR, errno.EPERM)


_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Spare:
    """Descriptors held back, so that the operator can still be answered when the process has no more."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: list[int] = []

    def __enter__(self) -> Spare:
        self.refill()
        return self

    def __exit__(self, *_: object) -> None:
        while self.release():
            pass

    def release(self) -> bool:
        """Give one up; False where there is none left."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True

    def refill(self) -> None:
        """Hold back as many as there should be, or as there are."""
        with contextlib.suppress(OSError):
            while len(self._held) < self._count:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def _names_of(uids: set[int]) -> dict[int, str]:
    """The names of users; a look-up may ask the network, so it is done once, off the loop."""
    names = {}
    for uid in uids:
        try:
            names[uid] = pwd.getpwuid(uid).pw_name
        except KeyError:
            names[uid] = ""
    return names
