"""Listening sockets that the daemon holds for its children: opened once, kept over their restarts, shared by who names them.

A socket that cannot be had fails those who need it, alone, and is tried again when they start the next time.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import trio
from msgspec import Meta

from supervisor import unix
from supervisor.accounts import gid_of, user_of
from supervisor.children import guardian
from supervisor.errors import SpawnFailed
from supervisor.spec import Account, FileMode, Spec, shown

_TCP = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^:\[\]/]*)):(?P<port>[0-9]{1,5})", re.ASCII)


class SocketSpec(Spec, frozen=True, kw_only=True):
    """A `[sockets.NAME]` table: a listening socket that outlives the jobs that use it."""

    listen: Annotated[
        str,
        Meta(
            description='where: "127.0.0.1:8000", "[::1]:8000", "*:8000" for every address, IPv6 too, or the path of a Unix '
            "socket, with a slash in it",
            extra={"reload": "sockets"},
        ),
    ]
    backlog: Annotated[int, Meta(ge=0, le=65535, description="how many connections may wait to be accepted")] = 4096
    mode: Annotated[FileMode, Meta(description="who may connect to a Unix socket: its file mode, in octal")] = FileMode(0o666)
    user: Annotated[Account | None, Meta(description="who owns the file of a Unix socket; the daemon unless you say")] = None
    group: Annotated[Account | None, Meta(description="the group of the file; the daemon's unless you say")] = None

    @property
    def path(self) -> Path | None:
        """The path of a Unix socket; None for any other."""
        return Path(self.listen) if "/" in self.listen else None

    def owner(self) -> tuple[int, int]:
        """Uid and gid of the file, -1 where nothing is said. May block. Raises SpawnFailed for a stranger."""
        uid = -1 if self.user is None else user_of(self.user).uid
        return uid, -1 if self.group is None else gid_of(self.group)


class Address(NamedTuple):
    """A host and a port, as they are written; the host is "" for every address."""

    host: str
    port: int


def address(listen: str) -> Address | None:
    """What `listen` says, unless it is a path. Raises ValueError with a sentence for the operator."""
    if "/" in listen:
        return None
    found = _TCP.fullmatch(listen)
    if found is None or int(found["port"]) > 65535:
        raise ValueError('expected "host:port", "[::1]:port", "*:port", or a path with a slash in it')
    host = found["v6"] or found["host"]
    return Address("" if host == "*" else host, int(found["port"]))


class _Listener:
    """An open socket, and what lies at its path if it is ours to remove."""

    def __init__(self, spec: SocketSpec, listening: socket.socket, identity: unix.Identity | None = None) -> None:
        self.spec = spec
        self.socket = listening
        self.borrowers = 0
        self._identity = identity

    def tune(self, spec: SocketSpec, owner: tuple[int, int]) -> None:
        """Take on all of a new spec but where it listens."""
        self.spec = spec
        self.socket.listen(spec.backlog)
        if spec.path is not None and self._is_ours():
            spec.path.chmod(spec.mode)
            os.chown(spec.path, *owner)

    def give_back(self) -> None:
        """A run that used it is over."""
        self.borrowers -= 1

    def close(self) -> None:
        """Stop listening here; who was handed the socket may go on. The file goes if it is still ours."""
        self.socket.close()
        if self.spec.path is not None and self._is_ours():
            self.spec.path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        return self._identity is not None and self.spec.path is not None and unix.identity(self.spec.path) == self._identity


class Sockets:
    """The sockets of `[sockets]`. Open it with `open_sockets`."""

    nursery: trio.Nursery

    def __init__(self, specs: Mapping[str, SocketSpec], given: Mapping[str, socket.socket]) -> None:
        self._specs = dict(specs)
        self._open = {name: _Listener(specs[name], each) for name, each in given.items() if name in specs}

    async def descriptor(self, name: str) -> int:
        """The listening descriptor, which stays ours; opened if it is not yet. Raises SpawnFailed, whose text says why not."""
        while (listener := self._open.get(name)) is None:
            if name not in self._specs:
                raise SpawnFailed(f"socket {name}: not in the file any more")
            await self._settle(name)
        return listener.socket.fileno()

    async def borrow(self, name: str, until: ExitStack) -> int:
        """The listening descriptor for one run, which is over when `until` is left. Raises SpawnFailed.

        It is blocking, whatever earlier runs have made of it. A run that shares it may have made it otherwise, and relies on
        that: then it stays so.
        """
        descriptor = await self.descriptor(name)
        listener = self._open[name]
        if not listener.borrowers:
            os.set_blocking(descriptor, True)
        listener.borrowers += 1
        until.callback(listener.give_back)
        return descriptor

    def apply(self, specs: Mapping[str, SocketSpec]) -> None:
        """Bring the sockets to a new configuration: one that shall listen elsewhere is opened anew, one that is gone closed."""
        for name, listener in list(self._open.items()):
            if name not in specs or specs[name].listen != listener.spec.listen:
                self._open.pop(name).close()
        self._specs = dict(specs)
        self.nursery.start_soon(self.settle, name="opener of sockets")

    async def settle(self) -> None:
        """Open what is not open, and tune what is. What cannot be had is told to those who need it, when they start."""
        for name in list(self._specs):
            with suppress(SpawnFailed):
                await self._settle(name)

    async def _settle(self, name: str) -> None:
        """Bring one socket to its spec, unless that changes meanwhile."""
        spec = self._specs.get(name)
        listener = self._open.get(name)
        if spec is None or (listener is not None and listener.spec == spec):
            return
        try:
            owner = await _owner(spec)
            open_it = await _opener(spec, owner)
            listener = self._open.get(name)
            if self._specs.get(name) is not spec:
                return
            if listener is None:
                self._open[name] = open_it()
            elif listener.spec != spec:
                listener.tune(spec, owner)
        except (OSError, unix.SocketTaken, SpawnFailed) as error:
            raise SpawnFailed(f"socket {name}: {await _why(error, spec)}") from error

    def close(self) -> None:
        """Close all of them."""
        for listener in self._open.values():
            listener.close()
        self._open.clear()


@asynccontextmanager
async def open_sockets(
    specs: Mapping[str, SocketSpec], given: Mapping[str, socket.socket] | None = None
) -> AsyncIterator[Sockets]:
    """Listen as `specs` say, as far as it can be had. What is in `given` listens already, and becomes ours.

    Nobody waits here for a name server: who needs a socket does (`descriptor`), and opens it.
    On leaving, all are closed. Exceptions of the body arrive in a group, as from any nursery.
    """
    sockets = Sockets(specs, given or {})
    try:
        async with trio.open_nursery() as nursery:
            sockets.nursery = nursery
            nursery.start_soon(sockets.settle, name="opener of sockets")
            try:
                yield sockets
            finally:
                nursery.cancel_scope.cancel(reason="the sockets are closed")
    finally:
        sockets.close()


async def _owner(spec: SocketSpec) -> tuple[int, int]:
    if spec.path is None or (spec.user is None and spec.group is None):
        return -1, -1
    return await trio.to_thread.run_sync(spec.owner, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))


async def _opener(spec: SocketSpec, owner: tuple[int, int]) -> Callable[[], _Listener]:
    """What opens it, without waiting for anybody: who has to be asked has been."""
    if spec.path is not None:
        return partial(_listen_at_path, spec, spec.path, owner)
    where = address(spec.listen)
    assert where is not None
    if not where.host:
        return partial(_listen_everywhere, spec, where.port)
    found = await trio.socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, *_, sockaddr = min(found, key=lambda each: each[0] is not socket.AF_INET)  # of a name, IPv4 before IPv6
    return partial(_listen_at, spec, family, sockaddr)


def _listen_at_path(spec: SocketSpec, path: Path, owner: tuple[int, int]) -> _Listener:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    return _Listener(spec, *unix.listen(path, backlog=spec.backlog, mode=spec.mode, owner=owner))


def _listen_everywhere(spec: SocketSpec, port: int) -> _Listener:
    try:
        return _listen_at(spec, socket.AF_INET6, ("::", port), dual=True)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
    return _listen_at(spec, socket.AF_INET, ("0.0.0.0", port))  # a machine without IPv6


def _listen_at(spec: SocketSpec, family: int, sockaddr: Any, *, dual: bool = False) -> _Listener:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(sockaddr)
        listening.listen(spec.backlog)
    except BaseException:
        listening.close()
        raise
    return _Listener(spec, listening)


async def _why(error: Exception, spec: SocketSpec) -> str:
    """Why it cannot be had, for the operator: who has it, where that can be known."""
    where = shown(spec.listen)
    if isinstance(error, unix.SocketTaken) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
        holder = await trio.to_thread.run_sync(_holder, spec, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        taken = f"{where} is taken{holder}" if isinstance(error, OSError) or holder else str(error)
        return f"{taken}: free it, or let the socket listen elsewhere"
    if isinstance(error, socket.gaierror):
        return f"no address for {where}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        return f"{where}: this machine has no such address"
    if isinstance(error, PermissionError) and spec.path is None:
        return f"{where}: permission denied: ports below 1024 are for root, or need CAP_NET_BIND_SERVICE"
    return f"{where}: {(error.strerror or str(error)).lower()}" if isinstance(error, OSError) else str(error)


def _holder(spec: SocketSpec) -> str:
    """` by pid 12 (nginx)`: who listens there; empty where that is hidden from us."""
    wanted = {f"socket:[{inode}]" for inode in _listening(spec)}
    for pid in guardian.pids():
        with suppress(OSError):
            if any(os.fspath(fd.readlink()) in wanted for fd in Path(f"/proc/{pid}/fd").iterdir()):
                return f" by pid {pid} ({guardian.read(f'/proc/{pid}/comm').decode(errors='replace').strip()})"
    return ""


def _listening(spec: SocketSpec) -> Iterator[str]:
    """The inodes of the sockets that listen at this port or path."""
    where = address(spec.listen)
    for name in ("unix",) if where is None else ("tcp", "tcp6"):
        for line in guardian.read(f"/proc/net/{name}").decode(errors="replace").splitlines()[1:]:
            fields = line.split(maxsplit=7 if where is None else -1)
            if where is None and len(fields) == 8 and fields[7] == spec.listen:
                yield fields[6]
            elif where is not None and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == where.port:
                yield fields[9]
