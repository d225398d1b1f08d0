"""The way to a Redis server: two connections that come back by themselves, and one flight of operations at a time.

    Address    where the server is, as a URL says it; never shows the password
    Link       `ask`: operations that come while a flight is under way go together with the next, in one call of the script

What is asked goes over one connection, news come in over another: on a connection that is subscribed the server allows answers
of 32 MB at most, and a payload may be larger. They live and die together: one that is broken says enough of the other.

There is no pool: a pool of this library loses a place with each connection that breaks while it is lent, and with each attempt
that is cancelled. A connection that is not answered for a while is given up, since what it would say later belongs to nobody.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec
import trio

from supervisor.queues import unknown_parameter
from supervisor.queues.protocol import QueueUnavailable

try:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from coredis.connection import BaseConnection, TCPConnection, TCPLocation
    from coredis.connection import UnixDomainSocketConnection as UnixConnection
    from coredis.connection import UnixDomainSocketLocation as UnixLocation
    from coredis.exceptions import ConnectionError as ConnectionLost
    from coredis.exceptions import MovedError, NoScriptError, RedisError
    from coredis.exceptions import ResponseError as ResponseError
except ModuleNotFoundError as error:
    hint = "a queue in Redis needs the library coredis: pip install 'trio-supervisor[redis]'"
    raise ModuleNotFoundError(hint, name=error.name) from error

T = TypeVar("T")

ANSWER = 5.0
"""Seconds without a byte from the server after which it does not answer."""

SLOWEST = 1e6
"""Bytes a second that go to the server at least."""

BACKOFF = (0.05, 1.0)
"""Seconds between two attempts to connect: at first, and in the end."""

STEADY = 1.0
"""Seconds that a connection has to hold before the first of these counts again."""

FAREWELL = 2.0
"""Seconds at the end in which what was asked may still be done."""

OPERATIONS = 256
"""So many in one call at most: the server serves nobody else meanwhile."""

Reply = tuple[Any, list[bytes]]
"""What the script answered, and the payloads that belong to it."""

Decode = Callable[[bytes], Any]
"""Raises ValueError for what it does not know."""

_SCRIPT = Path(__file__).with_name("redis.lua").read_bytes()
COMMANDS = sorted({found.decode() for found in re.findall(rb"(?:call|many)\('([A-Z]+)'", _SCRIPT)})
"""What the script runs."""

_SHA = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()
_KEEPALIVE: dict[int, int | bytes] = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 20_000,
}
_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
"""What can be said of TLS: files."""

_NOWHERE = logging.NullHandler()
"""The library logs what it raises as well: on stderr, where nobody has said otherwise."""

_TROUBLE = (RedisError, OSError)
"""What a server that is away, or not well, brings with it."""

_ORDER: dict[object, int] = {"finish": 0, "renew": 0, "progress": 0, "claim": 2}
"""What makes room, or is late already, goes first; a claim finds all that the others bring."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is: `redis://user:password@host:port/db`, `rediss://…` (TLS), `redis+unix:///path?db=0`."""

    host: str = ""
    port: int = 6379
    path: str = ""
    """Of its Unix socket; then there is no host."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a URL. Raises ValueError with a sentence for the operator, without the password.

        `rediss` checks the server's certificate and name; `?ssl_ca_certs=FILE` names who else may have signed it, and
        `ssl_certfile` and `ssl_keyfile` have our own.
        """
        try:
            parts = urlsplit(url)
            query = {name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
            unknown = unknown_parameter(url, ("db", *(_TLS if parts.scheme == "rediss" else ())))
            db, tls = cls._db(parts, query), cls._tls(query) if parts.scheme == "rediss" else None
            port = parts.port or 6379
        except (ValueError, OSError) as error:
            raise ValueError(f"expected the URL of a Redis such as redis://host:6379/0: {error}") from None
        if unknown:
            raise ValueError(f"{parts.scheme}://: {unknown}{_only_tls(query, parts.scheme)}")
        unix = parts.scheme == "redis+unix"
        if not (parts.path if unix else parts.hostname):
            raise ValueError(f"{parts.scheme}://: names no {'path' if unix else 'host'}")
        place = {"path": unquote(parts.path)} if unix else {"host": parts.hostname or ""}
        username, password = (unquote(each) if each else None for each in (parts.username, parts.password))
        return cls(**place, port=port, db=db, username=username, password=password, tls=tls)

    @staticmethod
    def _db(parts: SplitResult, query: dict[str, str]) -> int:
        text = query.pop("db", "") or ("" if parts.scheme == "redis+unix" else parts.path.strip("/"))
        if text and not text.isdecimal():
            raise ValueError(f"{text!r} is no number of a database")
        return int(text or 0)

    @staticmethod
    def _tls(query: dict[str, str]) -> ssl.SSLContext:
        for word in _TLS:
            if word in query and not Path(query[word]).is_file():
                raise ValueError(f"{word}: there is no file {query[word]}")
        context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
        if certificate := query.get("ssl_certfile"):
            context.load_cert_chain(certificate, query.get("ssl_keyfile"))
        return context

    def __str__(self) -> str:
        """As people see it."""
        if self.path:
            return f"redis+unix://{self.path}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{host}:{self.port}/{self.db}"

    def moved(self, host: str, port: int) -> Address:
        """The same on another node of a cluster."""
        return replace(self, host=host or self.host, port=port)

    def connection(self) -> BaseConnection:
        """A connection that is still to be opened."""
        if self.path:
            return UnixConnection(
                UnixLocation(self.path), connect_timeout=ANSWER, stream_timeout=ANSWER, db=self.db,
                username=self.username, password=self.password, client_name="trio-supervisor",
            )  # fmt: skip
        return TCPConnection(
            TCPLocation(self.host, self.port), connect_timeout=ANSWER, stream_timeout=ANSWER, db=self.db,
            username=self.username, password=self.password, client_name="trio-supervisor", ssl_context=self.tls,
            socket_keepalive=True, socket_keepalive_options=_KEEPALIVE,
        )  # fmt: skip


class Operation:
    """Something asked for, and what came of it."""

    __slots__ = ("alone", "asked", "decode", "error", "found", "over", "reply")

    def __init__(
        self, decode: Decode, asked: Sequence[object], found: Callable[[Reply], object] | None = None, alone: bool = False
    ) -> None:
        self.decode = decode
        self.asked = asked
        self.found = found
        """Gets the reply where nobody waits for it."""
        self.alone = alone
        """Whether that is so."""
        self.over = trio.Event()
        self.reply: Reply
        self.error: str | None = None

    def done(self, reply: Reply) -> None:
        """This is the answer."""
        self.reply = reply
        self.over.set()
        if self.alone and self.found is not None:
            self.found(reply)

    def failed(self, error: str) -> None:
        """There is none."""
        self.error = error
        self.over.set()

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        if not self.alone:
            self.alone = True
            if self.over.is_set() and self.error is None and self.found is not None:
                self.found(self.reply)


class Link:
    """See the module. `run` it in a task of its own; nothing happens before something is asked.

    `limits`: what each call of the script is told of the queue. `join` is called on each new connection before anybody else may
    ask: what it raises makes that a failed attempt. `hear` gets the news, as `news` reads them.
    """

    def __init__(
        self,
        address: Address,
        prefix: str,
        join: Callable[[BaseConnection], Awaitable[None]],
        news: Decode,
        hear: Callable[[Any], object],
    ) -> None:
        self.address = address
        self.prefix = prefix
        self.limits = b""
        self._join = join
        self._news = news
        self._hear = hear
        self._line = deque[Operation]()
        self._flying: list[Operation] = []
        self._called = trio.Event()
        self._idle = trio.Event()
        self._up_since = math.nan
        """Trio's time; NaN while there is no connection."""
        self._away: str | None = None
        """Why there is none, when the last attempt has failed."""

    # ---- asking ----

    async def ask(self, decode: Decode, *asked: object) -> Reply:
        """The script's answer to a verb and its arguments. Raises QueueUnavailable, also where it is none that `decode` knows.
        Cancelled: it may be done all the same."""
        await trio.lowlevel.checkpoint_if_cancelled()
        operation = Operation(decode, asked)
        self.queue(operation)
        return await self.answer(operation)

    async def answer(self, operation: Operation) -> Reply:
        """The answer to what is under way. Cancelled: it may be done all the same, and then its `found` gets the answer."""
        try:
            await operation.over.wait()
        except trio.Cancelled:
            operation.abandon()
            if operation in self._line:
                self._line.remove(operation)
            raise
        if operation.error is not None:
            raise QueueUnavailable(operation.error)
        return operation.reply

    def post(self, decode: Decode, *asked: object, found: Callable[[Reply], object] | None = None) -> None:
        """Ask without waiting. Nobody hears of a failure."""
        self.queue(Operation(decode, asked, found, alone=True))

    def queue(self, *operations: Operation) -> None:
        """Have these done."""
        if self._away is not None:
            self._fail(operations, self._away)
        else:
            self._line.extend(operations)
            self._called.set()

    def wake(self) -> None:
        """Connect, if that has not begun yet."""
        self._called.set()

    async def settle(self) -> None:
        """Wait until all that was asked is done, or the server is away."""
        while not math.isnan(self._up_since) and (self._line or self._flying):
            self._idle = trio.Event()
            await self._idle.wait()

    # ---- connections ----

    async def run(self) -> None:
        """Be connected, for ever."""
        logging.getLogger("coredis").addHandler(_NOWHERE)
        await self._called.wait()
        first, longest = BACKOFF
        delay = first
        while True:
            trouble, lived = await self._live()
            if moved := [error for error in trouble if isinstance(error, MovedError)]:
                self.address = self.address.moved(*moved[0].node_addr)
            elif lived is None:
                self._give_up(self.reason(trouble[0]))
            elif lived > STEADY:
                delay = first
            await trio.sleep(random.uniform(delay / 2, delay))
            delay = min(2 * delay, longest)

    def _give_up(self, why: str) -> None:
        """The server is away: say so to all who wait, and to all who come."""
        self._away = why
        self._fail([*self._line], why)
        self._line.clear()

    async def _live(self) -> tuple[list[BaseException], float | None]:
        """Connect, and serve while that holds. Why it is over, and how many seconds it was good, if ever."""
        trouble: list[BaseException] = []
        opening = trio.CancelScope(deadline=trio.current_time() + ANSWER)
        try:
            async with trio.open_nursery() as nursery:
                with opening:
                    mouth, ears = [await self._connected(nursery) for _ in range(2)]
                    await self._subscribe(ears)
                    await self._join(mouth)
                if opening.cancelled_caught:
                    raise TimeoutError
                self._up_since, self._away = trio.current_time(), None
                nursery.start_soon(self._listen, ears)
                await self._serve(mouth)
        except* _TROUBLE as group:
            trouble += leaves(group)
        finally:
            since, self._up_since = self._up_since, math.nan
            self._idle.set()
        if opening.cancel_called:  # whatever the library made of that
            trouble = [TimeoutError()]
        return trouble, None if math.isnan(since) else trio.current_time() - since

    async def _connected(self, nursery: trio.Nursery) -> BaseConnection:
        connection = self.address.connection()

        async def hold(task_status: trio.TaskStatus[None]) -> None:
            try:
                await connection.run(task_status=task_status)
            finally:
                _close_streams(connection)
            raise ConnectionLost("the connection was lost")

        await nursery.start(hold)
        return connection

    async def _subscribe(self, ears: BaseConnection) -> None:
        ears.send_command(b"SUBSCRIBE", self.prefix + ":news")
        await self.request(ears, b"PING")  # a refusal comes as the answer to this: there is no other

    async def _listen(self, ears: BaseConnection) -> None:
        async with aclosing(ears.push_messages) as messages:
            async for message in messages:
                if message[0] == b"message":
                    self._hear(_understood(self._news, message[2]))

    # ---- flights ----

    async def _serve(self, mouth: BaseConnection) -> None:
        while True:
            if not self._line:
                self._idle.set()
                self._called = trio.Event()
                await self._called.wait()
            self._flying = [self._line.popleft() for _ in range(min(len(self._line), OPERATIONS))]
            self._flying.sort(key=lambda operation: _ORDER.get(operation.asked[0], 1))
            try:
                await self._fly(mouth)
            except BaseException as error:
                self._fail(self._flying, self.reason(error))
                raise
            finally:
                self._flying = []

    async def _fly(self, mouth: BaseConnection) -> None:
        if self._flying:
            replies = await self.call(mouth, [(operation.decode, *operation.asked) for operation in self._flying])
            for operation, reply in zip(self._flying, replies, strict=True):
                operation.done(reply)

    async def call(self, mouth: BaseConnection, asked: Sequence[tuple[Decode, *tuple[object, ...]]]) -> list[Reply]:
        """The script's answers to these verbs with their arguments, at once."""
        replies = await self._run_script(mouth, [words for _, *words in asked])

        def read(replies: list[list[bytes]]) -> list[Reply]:
            return [(decode(packed), payloads) for (decode, *_), (packed, *payloads) in zip(asked, replies, strict=True)]

        return _understood(read, replies)

    async def _run_script(self, mouth: BaseConnection, asked: object) -> Any:
        arguments = (1, self.prefix, self.limits, msgspec.msgpack.encode(asked))
        try:
            return await self.request(mouth, b"EVALSHA", _SHA, *arguments)
        except NoScriptError:  # a new server, or somebody has flushed the scripts
            return await self.request(mouth, b"EVAL", _SCRIPT, *arguments)

    async def request(self, connection: BaseConnection, command: bytes, *arguments: Any) -> Any:
        """The server's answer to a command. Raises TimeoutError where nothing comes for a while: large ones take their time."""
        patience = ANSWER + sum(len(each) for each in arguments if isinstance(each, bytes)) / SLOWEST
        try:
            request = connection.create_request(command, *arguments, decode=False, timeout=math.inf)
            while True:
                seen = connection.statistics.bytes_read
                with trio.move_on_after(patience):
                    return await request
                if connection.statistics.bytes_read == seen:
                    raise TimeoutError
        except (RedisError, OSError):
            raise
        except Exception as error:  # of the library's parser, which takes the connection for good
            raise ConnectionLost(f"what it says makes no sense: {error}") from error

    async def setting(self, mouth: BaseConnection, name: str) -> str | None:
        """What the server's configuration says; None where we may not know."""
        try:
            found = await self.request(mouth, b"CONFIG GET", name.encode())
        except ResponseError:
            return None
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        return next((value.decode() for key, value in pairs if key.decode() == name), None)

    def _fail(self, operations: Sequence[Operation], why: str) -> None:
        for operation in operations:
            operation.failed(why)

    def reason(self, error: BaseException) -> str:
        """Why something is not to be had, in one line."""
        cause = _cause(error)
        if isinstance(cause, TimeoutError) and not cause.strerror:
            text = f"has not answered for {ANSWER:g} s"
        elif isinstance(error, trio.Cancelled):
            text = "the connection was lost"
        else:
            text = _first_line(cause)
        return f"{self.address}: {text}"


def _only_tls(query: Collection[str], scheme: str) -> str:
    return "; TLS is rediss://" if scheme == "redis" and not set(_TLS).isdisjoint(query) else ""


def _close_streams(connection: BaseConnection) -> None:
    """The library leaves them open where no connection comes about."""
    for each in vars(connection).values():
        if isinstance(each, (MemoryObjectSendStream, MemoryObjectReceiveStream)):
            each.close()


def _understood(read: Callable[[Any], T], said: object) -> T:
    try:
        return read(said)
    except (ValueError, TypeError) as error:  # msgspec's are ValueErrors
        raise ConnectionLost(f"what it says makes no sense: {error}") from None


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group, or the one that is none."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [error]


def _cause(error: BaseException) -> BaseException:
    """What the operating system said, where it is at the bottom of this; else the error itself."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError):
            error = below
        below = leaves(below)[0] if isinstance(below, BaseExceptionGroup) else below.__cause__
    return error


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
