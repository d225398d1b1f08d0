"""The control socket's server: JSON-RPC 2.0 over a Unix socket, and a handler for every verb.

    Server        takes the socket, accepts, takes it back when stolen
    Connection    one client: lines in, requests side by side, answers out
    Call          one request, as its handler sees it; `sessions` has those in which both sides talk
    HANDLERS      verb -> handler; nothing else can be called

Two boundaries are fenced: a handler, whose exception becomes error -32603, and a connection. Neither takes anybody else down.
"""

# ruff: noqa: ASYNC109  (handlers take what the table of verbs names, `timeout` too)

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import os
import pwd
import re
import select
import signal as signals
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
import structlog
import trio

from supervisor import __version__
from supervisor.control import items, messages, sessions
from supervisor.control.listener import Place
from supervisor.control.messages import Branch, End, Envelope, Fault, LogLine, Reload, Shutdown, Snapshot, Version
from supervisor.control.verbs import LATER, VERBS, Verb
from supervisor.errors import ControlError, SpecError
from supervisor.events import Added, Commanded, Journal, Lagged, Renamed, Warned
from supervisor.output import Lines
from supervisor.state import Answer, JobStatus, LimitStatus, PastRun, ancestry
from supervisor.store import StoreError
from supervisor.unix import SocketTaken

if TYPE_CHECKING:
    from supervisor.children import Usage
    from supervisor.config import Plan
    from supervisor.history import History
    from supervisor.tree import Order, Supervisor

T = TypeVar("T")
Json = TypeVar("Json", bytes, msgspec.Raw, msgspec.Raw | msgspec.UnsetType)

SUPERVISOR = "supervisor"
MAX_REQUEST = 1 << 20
MAX_SUBMIT = 1 << 26
"""Bytes of a `submit`: what it carries is not ours to judge."""

LARGE = 1 << 18
"""Bytes of a request from which on it is read beside the loop."""

MAX_CLIENTS = 1024
MAX_UNDER_WAY = 1024
"""Requests of one connection that may be under way; the next one is read when one of them is done."""

FAREWELL = 1.0
"""Seconds that the connections of a tree that has ended have left, to be told of the end and to read what is on its way."""

_SPARE = 3
_CHUNK = 1 << 16
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


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, by the kernel's word."""

    pid: int
    uid: int
    name: str

    def __str__(self) -> str:
        return f"uid {self.uid} ({self.name})" if self.name else f"uid {self.uid}"


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
                    await connection.send(_failure(b"null", refusal))
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


class Table:
    """The answer to `status` of all, encoded once for as long as nothing happens."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._seq = -1
        self._encoded = msgspec.Raw()

    def encoded(self) -> msgspec.Raw:
        """All rows, as a JSON array."""
        if self._seq != self._journal.seq:
            self._encoded = msgspec.Raw(messages.encode(list(self._journal.table.values())))
            self._seq = self._journal.seq
        return self._encoded


class Connection:
    """One client. Requests are served side by side; their answers carry the ids, in any order.

    Nothing queues here: an answer waits its turn in its own task, and a stream leaves in the journal what the client does
    not read. So memory is bounded by what may be under way, and a client that does not read only keeps itself waiting.
    """

    def __init__(self, server: Server, stream: trio.SocketStream, peer: Peer) -> None:
        self.server = server
        self.peer = peer
        self.ways_in: dict[int | str, sessions.WayIn] = {}
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
            if reply := await self._reply(line):
                await self.send(reply)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel(reason="the client hung up")
        finally:
            self._slots.release()

    async def _reply(self, line: bytes | None) -> bytes:
        """What to send for one line; None is a line that was too long to keep."""
        if line is None:
            limits = f"{MAX_REQUEST} bytes ({MAX_SUBMIT} for a submit that names its method before its params)"
            return _failure(b"null", Fault(messages.INVALID_REQUEST, f"request is over {limits}"))
        try:
            batch = await _aside(line, _batch)
        except (ValueError, RecursionError) as problem:
            return _failure(b"null", Fault(messages.PARSE_ERROR, _sentence(problem)))
        if batch is None:
            return await self._reply_one(msgspec.Raw(line))
        if not batch:
            return _failure(b"null", Fault(messages.INVALID_REQUEST, "an empty batch asks for nothing"))
        return await self._reply_all(batch)

    async def _reply_all(self, batch: list[msgspec.Raw]) -> bytes:
        replies = [b""] * len(batch)

        async def reply(index: int, request: msgspec.Raw) -> None:
            replies[index] = await self._reply_one(request, in_batch=True)

        async with trio.open_nursery() as nursery:
            for index, request in enumerate(batch):
                nursery.start_soon(reply, index, request)
        answered = [reply.rstrip(b"\n") for reply in replies if reply]
        return b"[" + b",".join(answered) + b"]\n" if answered else b""

    async def _reply_one(self, raw: msgspec.Raw, in_batch: bool = False) -> bytes:
        try:
            request = await _aside(raw, _envelope)
            identity = _identity(request)
            if request.jsonrpc != "2.0":
                raise msgspec.ValidationError('`jsonrpc` must be "2.0"')
        except msgspec.ValidationError as problem:
            return _failure(_any_id(raw), Fault(messages.INVALID_REQUEST, _sentence(problem)))
        except (ValueError, RecursionError) as problem:
            return _failure(b"null", Fault(messages.PARSE_ERROR, _sentence(problem)))
        try:
            result = await self._perform(request, identity, in_batch)
        except Refused as refused:
            return _failure(identity, refused.fault) if identity else b""
        return b"".join((b'{"jsonrpc":"2.0","id":', identity, b',"result":', result, b"}\n")) if identity else b""

    async def _perform(self, request: Envelope, identity: bytes, in_batch: bool) -> bytes:
        """Call the verb's handler: the fence round it. Raises Refused, and nothing else."""
        verb = _find_verb(request.method)
        if verb.streams and (in_batch or not identity):
            raise Refused(messages.INVALID_REQUEST, f"{verb.name} answers with a stream: ask for it alone, with an id")
        try:
            params = await _aside(request.params, partial(messages.read_params, verb))
        except (ValueError, RecursionError) as problem:
            raise Refused(messages.INVALID_PARAMS, f"{verb.name}: {_sentence(problem)}") from None
        try:
            return messages.encode(await HANDLERS[verb.name](Call(self, verb.name, identity), **params))
        except (Refused, trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except ControlError as problem:
            raise Refused(problem.code, str(problem), msgspec.to_builtins(problem.data)) from None
        except SpecError as problem:
            places = [messages.Place(**asdict(fault)) for fault in problem.problems]
            raise Refused(messages.FILE_IS_WRONG, str(problem), msgspec.to_builtins(places)) from None
        except Exception as problem:
            _log.error("a control request failed", verb=verb.name, by=str(self.peer), exc_info=problem)
            raise Refused(messages.INTERNAL_ERROR, f"{verb.name}: a fault of the daemon, see its log: {problem!r}") from None


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        self.fault = Fault(code, message, data)
        super().__init__(message)


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


async def _aside(given: Json, read: Callable[[Json], T]) -> T:
    """Read JSON; in a thread where there is much of it, so that everybody else has a turn between one step and the next."""
    if isinstance(given, msgspec.UnsetType) or memoryview(given).nbytes <= LARGE:
        return read(given)
    return await trio.to_thread.run_sync(read, given)


def _batch(line: bytes) -> list[msgspec.Raw] | None:
    """The requests of a batch; None where it is no batch."""
    line.decode()  # msgspec does not look into what it hands on raw
    return msgspec.json.decode(line, type=list[msgspec.Raw]) if line[:1] == b"[" else None


def _envelope(raw: msgspec.Raw) -> Envelope:
    return msgspec.json.decode(raw, type=Envelope)


_SUBMIT = re.compile(rb'\s*\{[^{}\[\]]*"method"\s*:\s*"submit"')


def _most(line: bytes | bytearray) -> int:
    """How long a request may be that begins like this."""
    return MAX_SUBMIT if _SUBMIT.match(line, 0, 1024) else MAX_REQUEST


async def _cancel_on_hangup(descriptor: int, scope: trio.CancelScope) -> None:
    """Cancel when the client is gone altogether; one that only has no more to ask still waits for its answers."""
    if not hasattr(select, "epoll"):
        scope.cancel(reason="the client hung up")
        return
    with select.epoll() as hangups:
        hangups.register(descriptor, 0)  # no event but a hang-up, which is always reported
        await trio.lowlevel.wait_readable(hangups.fileno())
    scope.cancel(reason="the client hung up")


def _identity(request: Envelope) -> bytes:
    """The request's id as JSON, empty for a notification. Raises ValidationError for what cannot be an id."""
    if isinstance(request.id, msgspec.UnsetType):
        return b""
    identity = bytes(request.id)
    if identity[:1] in b"{[tf":
        raise msgspec.ValidationError("`id` must be a string, a number or null")
    return identity


class _WithId(msgspec.Struct):
    id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _any_id(raw: msgspec.Raw) -> bytes:
    """The id of a request that is no valid request, as far as it has one."""
    try:
        identity = bytes(msgspec.json.decode(raw, type=_WithId).id or b"null")
    except (ValueError, RecursionError, TypeError):
        return b"null"
    return identity if identity[:1] not in b"{[tf" else b"null"


def _failure(identity: bytes, fault: Fault) -> bytes:
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}\n' % (identity, messages.encode(fault))


def _sentence(problem: Exception) -> str:
    """An exception of the decoder in our manner."""
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    if isinstance(problem, UnicodeDecodeError):
        return f"not UTF-8 (byte {problem.start})"
    text = str(problem)
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _find_verb(method: str) -> Verb:
    if verb := VERBS.get(method):
        return verb
    if method in LATER:
        raise Refused(ControlError.REFUSED, f"{method}: not supported yet")
    near = difflib.get_close_matches(method[:64], VERBS, 1)
    hint = f"; did you mean {near[0]!r}" if near else ""
    raise Refused(messages.METHOD_NOT_FOUND, f"no method {method[:64]!r}{hint}")


def _names_of(uids: set[int]) -> dict[int, str]:
    """The names of users; a look-up may ask the network, so it is done once, off the loop."""
    names = {}
    for uid in uids:
        try:
            names[uid] = pwd.getpwuid(uid).pw_name
        except KeyError:
            names[uid] = ""
    return names


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


# ---------------------------------------------------------------- handlers


async def _status(call: Call, names: list[str], usage: bool) -> msgspec.Raw | list[JobStatus]:
    if not names and not usage:
        return call.server.table.encoded()
    table = call.tree.journal.table
    rows = call.tree.status(*names)
    if not usage:
        return rows
    used = await call.tree.usage()
    return [_with_usage(table[row.name], used.get(row.name)) for row in rows if row.name in table]


def _with_usage(row: JobStatus, usage: Usage | None) -> JobStatus:
    if usage is None:
        return msgspec.structs.replace(row, memory=None, cpu=None)
    return msgspec.structs.replace(row, memory=usage.memory, cpu=round(usage.cpu, 3))


async def _tree(call: Call) -> list[Branch]:
    below: dict[str | None, list[JobStatus]] = {}
    for row in call.tree.journal.table.values():
        below.setdefault(row.supervisor, []).append(row)

    def branch(row: JobStatus) -> Branch:
        return Branch(status=row, children=tuple(map(branch, below.get(row.name, ()))))

    return [branch(row) for row in below.get(None, ())]


async def _order(call: Call, names: list[str], wait: bool = True, timeout: float | None = None, **options: Any) -> list[Answer]:
    """The verbs that change jobs: record who asked, give the orders at once, then wait for what comes of each."""
    call.tree.resolve([name.partition("#")[0] for name in names])
    call.record(names)
    return await _answers(call.verb, call.tree.order(call.verb, names, by=call.by, **options), wait, timeout)


async def _cancel(call: Call, names: list[str], wait: bool, timeout: float | None) -> list[Answer]:
    """Runs, and items: a word that names neither job nor run may be the id of an item."""
    others = [name for name in names if not _names_a_job(call.tree, name)] if call.tree.queues.names else []
    found = {name: await items.find(call.tree, name) for name in others}
    if unknown := [name for name, record in found.items() if record is None]:
        raise ControlError(f"no job, run or item {unknown[0]!r}", ControlError.NO_SUCH_NAME)
    runs = [name for name in names if name not in found]
    call.tree.resolve([name.partition("#")[0] for name in runs])
    call.record(names)
    until = math.inf if timeout is None else trio.current_time() + timeout
    orders = call.tree.order(call.verb, runs, by=call.by)
    cancelled = await items.cancel(call, [record for record in found.values() if record is not None], wait, until)
    left = None if timeout is None else max(0.0, until - trio.current_time())
    return cancelled + await _answers(call.verb, orders, wait, left)


def _names_a_job(tree: Supervisor, name: str) -> bool:
    return name.partition("#")[0] in tree.nodes or not set("*?").isdisjoint(name)


async def _limits(call: Call, names: list[str]) -> list[LimitStatus]:
    return call.tree.limit_status(*names)


async def _metrics(call: Call) -> str:
    try:
        from supervisor.metrics import exposition
    except ImportError as error:
        raise ControlError(f"metrics need the extra `metrics`: pip install 'trio-supervisor[metrics]' ({error})") from None
    stand = await items.queues(call, [])
    rows = call.tree.status(), call.tree.limit_status(), call.tree.queues.tallies(), stand
    return await trio.to_thread.run_sync(exposition, *rows, limiter=trio.CapacityLimiter(1))


async def _signal(call: Call, name: str, signal: str, group: bool) -> list[Answer]:
    return await _order(call, [name], signal=_signal_number(signal), group=group)


async def _scale(call: Call, name: str, workers: int, wait: bool, timeout: float | None) -> list[Answer]:
    return await _order(call, [name], wait, timeout, workers=workers)


async def _reload(call: Call, names: list[str], plan: bool, wait: bool, timeout: float | None) -> Reload | list[Answer]:
    if names:
        if plan:
            raise Refused(messages.INVALID_PARAMS, "reload: a plan is of the whole file; leave the names out")
        return await _order(call, names, wait, timeout)
    if call.server.reload is None:
        raise ControlError(
            "this supervisor was not started from a file; give it its new configuration in the program it runs in"
        )
    if not plan:
        call.record()
    changes, orders = await call.server.reload(plan=plan, by=call.by)
    answers = await _answers(call.verb, orders, wait, timeout)
    return Reload(**asdict(changes), answers=tuple(answers))


async def _answers(verb: str, orders: Sequence[Order], wait: bool, timeout: float | None) -> list[Answer]:
    """What came of the orders. To stop waiting, by timeout or because the client hung up, undoes none of them."""
    answers: dict[str, Answer] = {}

    async def collect(order: Order) -> None:
        answers[order.name] = await order.wait()

    with trio.move_on_after(float("inf") if timeout is None else timeout) as waiting:
        async with trio.open_nursery() as nursery:
            for order in orders:
                nursery.start_soon(collect, order)
            if not wait:
                await _let_orders_arrive()
                nursery.cancel_scope.cancel(reason="the client does not wait")
    missing = [order.name for order in orders if order.name not in answers]
    if missing and waiting.cancelled_caught:
        done = [answers[order.name] for order in orders if order.name in answers]
        late = f"{verb}: not done after {timeout:g} s: {', '.join(missing)}; it goes on"
        raise Refused(ControlError.TIMED_OUT, late, msgspec.to_builtins(done))
    return [answers.get(order.name) or Answer(name=order.name, ok=True, text=f"{verb} accepted") for order in orders]


async def _let_orders_arrive() -> None:
    """A supervisor's loop takes an order up on its next turn; what it refuses at once is known after that."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()


def _signal_number(text: str) -> int:
    """The number of `HUP`, `SIGHUP`, `hup` or `1`."""
    try:
        return signals.Signals(int(text)) if text.isdecimal() else signals.Signals["SIG" + text.upper().removeprefix("SIG")]
    except (KeyError, ValueError):
        known = [signal.name.removeprefix("SIG") for signal in signals.Signals]
        near = difflib.get_close_matches(text.upper().removeprefix("SIG")[:16], known, 1)
        raise ControlError(f"no signal {text[:16]!r}" + (f"; did you mean {near[0]}" if near else "")) from None


async def _events(call: Call, follow: bool, since: int | None, snapshot: bool) -> End:
    journal = call.tree.journal
    with journal.subscribe() as subscription:
        first = [Snapshot(seq=journal.seq, snapshot=tuple(journal.table.values()))] if snapshot else []
        lost, past = journal.past(since or 0) if since is not None or not (follow or snapshot) else (0, [])
        await call.notify([*first, *([Lagged(lost)] if lost and since is not None else []), *past])
        if follow:
            async for event in subscription:
                await call.notify([event])
        return End(seq=journal.seq)


async def _logs(call: Call, names: list[str], follow: bool, lines: int) -> End:
    wanted = call.tree.resolve(names) if names else None
    if not follow:
        for name in _jobs_of(call.tree.journal.table, wanted):
            splitter = Lines()
            tail = list(splitter.feed(await call.tree.outputs.tail(name, lines)))
            await _say(call, name, [*tail, *splitter.flush()])
        return End(seq=call.tree.journal.seq)
    await _follow_all(call, wanted, lines)
    return End(seq=call.tree.journal.seq)


async def _follow_all(call: Call, wanted: Sequence[str] | None, lines: int) -> None:
    """Follow these names, and what is added to them while we do: the next workers of a job, the next jobs of all."""
    journal = call.tree.journal
    with journal.subscribe() as changes:
        async with trio.open_nursery() as nursery:
            followed = _jobs_of(journal.table, wanted)
            for name in followed:
                nursery.start_soon(_follow, call, name, lines)
            async for event in changes:
                if isinstance(event, Renamed):
                    followed.append(event.to)  # the output goes on where it was
                elif isinstance(event, (Added, Lagged)):
                    new = [name for name in _jobs_of(journal.table, wanted) if name not in followed]
                    followed += new
                    for name in new:
                        nursery.start_soon(_follow, call, name, 0)


async def _follow(call: Call, name: str, lines: int) -> None:
    """What a job has printed, and what it prints from now on: the tail is taken before anything can come between."""
    splitter = Lines()
    with call.tree.outputs.follow(name) as follower:
        await _say(call, name, splitter.feed(await call.tree.outputs.tail(name, lines)))
        async for chunk in follower:
            if isinstance(chunk, Lagged):
                await _say(call, name, splitter.flush())
                await call.notify([LogLine(name=name, lagged=chunk.count)])
            else:
                await _say(call, name, splitter.feed(chunk))


async def _say(call: Call, name: str, lines: Iterable[bytes]) -> None:
    await call.notify([LogLine(name=name, line=line.decode("utf-8", "backslashreplace")) for line in lines])


def _jobs_of(table: Mapping[str, JobStatus], names: Sequence[str] | None) -> list[str]:
    """Who has an output among these names and below those of them that are groups; all without names."""
    groups = {row.supervisor for row in table.values()}
    jobs = [row for row in table.values() if row.kind != SUPERVISOR and row.name not in groups]
    if names is None:
        return [row.name for row in jobs]
    wanted = set(names)
    return [row.name for row in jobs if not wanted.isdisjoint(ancestry(table, row))]


async def _history(call: Call, name: str, lines: int) -> list[PastRun]:
    history = call.server.history
    if history is None:
        raise ControlError("this supervisor keeps no history: the program it runs in has not started any")
    try:
        found = await history.runs(name, lines)
        if not found and name not in call.tree.nodes and name not in (known := await history.names()):
            raise ControlError(_never_heard_of(name, {*known, *call.tree.nodes}), ControlError.NO_SUCH_NAME)
    except StoreError as problem:
        raise ControlError(str(problem)) from None
    return found


def _never_heard_of(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"no job or supervisor is or was called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


async def _shutdown(call: Call, now: bool, wait: bool, timeout: float | None) -> Shutdown:
    call.record()
    call.tree.shutdown("told to shut down", by=call.by, kill=now)
    if not wait:
        return Shutdown()
    with trio.move_on_after(float("inf") if timeout is None else timeout) as waiting:
        await call.tree.wait_stopped()
    if waiting.cancelled_caught:
        raise Refused(ControlError.TIMED_OUT, f"shutdown: not done after {timeout:g} s; it goes on")
    return Shutdown(late=call.tree.late, survivors=call.tree.survivors)


async def _who(call: Call) -> Version:
    config = call.tree.config
    return Version(
        name=config.daemon.name,
        version=call.server.version,
        protocol=messages.PROTOCOL,
        pid=os.getpid(),
        phase=call.tree.phase.value,
        file=str(config.file) if config.file else None,
    )


async def _discover(call: Call) -> dict[str, Any]:
    return messages.describe(call.server.version)


HANDLERS: dict[str, Callable[..., Awaitable[object]]] = {
    "status": _status,
    "tree": _tree,
    "start": _order,
    "stop": _order,
    "restart": _order,
    "reload": _reload,
    "signal": _signal,
    "scale": _scale,
    "run-now": _order,
    "pause": _order,
    "resume": _order,
    "cancel": _cancel,
    "submit": items.submit,
    "queue.ls": items.queues,
    "queue.peek": items.peek,
    "queue.dead": items.peek,
    "queue.show": items.show,
    "queue.wait": items.wait,
    "queue.requeue": items.requeue,
    "queue.purge": items.purge,
    "queue.pause": items.pause,
    "queue.resume": items.resume,
    "limits": _limits,
    "metrics": _metrics,
    "logs": _logs,
    "events": _events,
    "history": _history,
    "exec": sessions.execute,
    "attach": sessions.attach,
    "input": sessions.pass_on,
    "shutdown": _shutdown,
    "version": _who,
    "rpc.discover": _discover,
}
"""The only things that can be called from outside, by the name of the verb."""
