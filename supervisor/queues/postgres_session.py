"""One connection to a PostgreSQL, in a thread of its own: what is asked meanwhile goes into the next transaction together.

    Session       asks the thread and waits: `ask`, `post`; hears what the server tells
    Statement     SQL and its parameters
    Operation     statements that are done together, and what came of them
    _Connection   the thread, and the connection that only it touches

A thread, since psycopg has no interface for Trio: driving its generators would rest on its private parts, and names would be
looked up in the loop. Here everything is public, and a thread that hangs (in a name server, say) hangs nobody: who asks has a
time limit, after which the connection is cut off under the thread.

One transaction for all that has come is one round trip and one wait for the server's disk. If it fails, each operation is done
again by itself: a bad one does not spoil the others. Nothing is open between two round trips, so a frozen client locks nobody.
"""

from __future__ import annotations

import os
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import psycopg
import trio

from supervisor.queues import shown_backend, unknown_parameter
from supervisor.queues.protocol import QueueError, QueueUnavailable

PATIENCE = 5.0
"""Seconds that an operation may take."""

PACE = 1_000_000
"""Bytes a second that a connection carries at least: large operations may take longer."""

STATEMENT = 4.0
"""Seconds that the server gives a statement: less than we do, so that nobody is locked out who waits for what we gave up."""

LARGE = 1_000_000
"""Bytes above which these limits are as much longer as that takes."""

TOGETHER = 64
"""Operations in one transaction at most."""

AGAIN = (0.1, 5.0)
"""Seconds until a connection that was lost is tried again by itself: the first wait, doubled up to the second."""

NONSENSE = (ValueError, TypeError, LookupError)
"""What reading an answer raises that was garbled on the way, and was still an answer."""

CLOSING = 5.0
"""Seconds that the end waits for what was asked before."""

_DEFAULTS = {
    "application_name": "supervisor",
    "client_encoding": "utf8",
    "connect_timeout": 4,
    "keepalives_idle": 10,  # a peer that is gone without a word is noticed in half a minute also when nothing is asked
    "keepalives_interval": 5,
    "keepalives_count": 4,
}

_SETTINGS = f"""
    SET default_transaction_isolation = 'read committed';  -- each statement of a function sees what others have done
    SET statement_timeout = '{STATEMENT}s';
    SET lock_timeout = '1s';  -- an application that keeps a unique key in an open transaction
    SET idle_in_transaction_session_timeout = '5s';
    SET plan_cache_mode = force_generic_plan;  -- or they are made anew at each call, for the sake of how long an array is
    SET enable_seqscan = off;  -- plans are made while the tables are still empty, and kept
    SET enable_bitmapscan = off;
    SET jit = off;
"""

Rows = list[tuple[Any, ...]]
Hook = Callable[[], object]


class Statement(NamedTuple):
    """SQL with `%s` for each parameter."""

    sql: str
    values: Sequence[object] = ()


class Session:
    """A connection that is made when it is first needed, and then kept: made anew, by itself, when it is lost.

    Belongs to the Trio thread. `prepare` is called in the other thread with each new connection, `heard` in the Trio thread
    with what is notified, `connected` after each new connection: what was notified before that is lost.
    """

    def __init__(
        self, url: str, *, prepare: Callable[[psycopg.Connection], object], heard: Callable[[str], object], connected: Hook
    ) -> None:
        self.where = shown_backend(url)
        self._connection = _Connection(self.where, parameters(url), prepare, heard, connected, self._finish)
        self._open: set[Operation] = set()
        self._quiet = trio.Event()
        self._closing = False

    async def ask(self, *statements: Statement, size: int = 0) -> list[Rows]:
        """Do these as one; gives what each found, once that is stored. `size`: about how many bytes are sent.

        Raises QueueUnavailable where the server does not, within a few seconds, and QueueError for what it refuses.
        Cancelled, or too late: it may happen all the same.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        operation = Operation(statements, size=size)
        self.send(operation)
        return await self.result(operation)

    def send(self, *operations: Operation) -> None:
        """Have these done, in one transaction if nothing goes wrong. Raises ClosedResourceError at the end."""
        if self._closing:
            raise trio.ClosedResourceError(f"the queue in {self.where} is closed")
        self._put(*operations)

    async def result(self, operation: Operation) -> list[Rows]:
        """What came of an operation that was sent: see `ask`."""
        with trio.move_on_after(PATIENCE + operation.size / PACE):
            return await operation.wait()
        self._connection.cut()
        raise QueueUnavailable(f"{self.where} does not answer")

    def post(self, *statements: Statement, then: Callable[[list[Rows]], object] | None = None) -> None:
        """Do these, with nobody waiting; it does not matter much if they fail. `then` gets what they found."""
        self._put(Operation(statements, late=then, awaited=False))

    async def close(self) -> None:
        """Do what was asked before, and what `late` makes of it, for a few seconds at most; disconnect. Also when cancelled."""
        self._closing = True
        with trio.CancelScope(shield=True):
            with trio.move_on_after(CLOSING) as patience:
                while self._open:
                    self._quiet = trio.Event()
                    await self._quiet.wait()
            if patience.cancelled_caught:
                self._connection.cut()
            await self._connection.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What the server has said is read in here. Where it makes no sense, the way to it is bad: see `ask`."""
        try:
            yield
        except NONSENSE as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> QueueUnavailable:
        self._connection.cut()
        return QueueUnavailable(f"cannot use {self.where}: what it says makes no sense ({error})")

    def _put(self, *operations: Operation) -> None:
        self._open.update(operations)
        self._connection.put(*operations)

    def _finish(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            try:
                operation.finish()
            except NONSENSE as error:
                operation.fail(self._lost(error))
        self._open.difference_update(operations)
        self._quiet.set()


class Operation:
    """What is asked for. The thread reads `statements`, `sees` and `wanted`, and sets `found` or `error`.

    `heed` gets what was found as soon as it is known here, before anything that the server tells after it; `late` instead where
    nobody waits for it, or no more.
    """

    __slots__ = ("_awaited", "_carries", "_heed", "_late", "_over", "error", "found", "sees", "size", "statements", "wanted")

    def __init__(
        self,
        statements: Sequence[Statement],
        *,
        size: int = 0,
        heed: Callable[[list[Rows]], object] | None = None,
        late: Callable[[list[Rows]], object] | None = None,
        sees: str = "",
        carries: tuple[Operation, Callable[[Rows], tuple[Rows, Rows]]] | None = None,
        awaited: bool = True,
    ) -> None:
        self.statements = statements
        self.size = size
        """About how many bytes go over the line: large ones may take their time."""
        self.sees = sees
        """It is done after what comes with it, and what this connection itself has notified until then is not handed on, where
        it is this: it has seen what that tells of."""
        self._carries = carries
        """Another one that is done by the same statement, and how to tell what each of them finds."""
        self.wanted = True
        """False: whoever asked has gone away. If it has not begun, it never will."""
        self.found: list[Rows] = []
        self.error: QueueError | None = None
        self._awaited = awaited
        self._heed = heed
        self._late = late
        self._over = trio.Event()

    async def wait(self) -> list[Rows]:
        """What was found, when it is."""
        try:
            await self._over.wait()
        except trio.Cancelled:
            self.abandon()
            raise
        if self.error is not None:
            raise self.error
        return self.found

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.wanted, self._awaited = self._carries is not None, False
        self._tell_late()

    def finish(self) -> None:
        """It is over."""
        if self._carries is not None:
            self._hand_over(*self._carries)
        self._over.set()
        if self._heed is not None and self._awaited and self.found:
            self._heed(self.found)
        self._tell_late()

    def fail(self, error: QueueError) -> None:
        """It is over, and nobody understands what was found."""
        self.found, self.error = [], error
        if self._carries is not None:
            self._carries[0].fail(_of_its_own(error))
        self._over.set()

    def _hand_over(self, other: Operation, divide: Callable[[Rows], tuple[Rows, Rows]]) -> None:
        if self.found:
            mine, its = divide(self.found[0])
            self.found, other.found = [mine], [its]
        other.error = self.error and _of_its_own(self.error)
        other.finish()

    def _tell_late(self) -> None:
        if self._late is not None and not self._awaited and self.found:
            self._late(self.found)


class _Told(NamedTuple):
    """A notification, and whether this connection has made it itself."""

    said: str
    own: bool


class _Connection:
    """The thread, and what only it touches."""

    def __init__(
        self,
        where: str,
        parameters: dict[str, Any],
        prepare: Callable[[psycopg.Connection], object],
        heard: Callable[[str], object],
        connected: Hook,
        finish: Callable[[Sequence[Operation]], object],
    ) -> None:
        self.where = where
        self._parameters = parameters
        self._prepare = prepare
        self._heard = heard
        self._connected = connected
        self._finish = finish
        self._asked: deque[Operation | None] = deque()
        self._awake, self._waker = socket.socketpair()
        self._awake.setblocking(False)
        self._woken = False
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken
        self._db: psycopg.Connection | None = None
        self._pid = 0
        """The number of the connection, by which the server tells who has notified."""
        self._line: socket.socket | None = None
        self._line_lock = threading.Lock()
        self._told: list[_Told] = []
        self._failures = 0
        self._again_at = float("inf")

    # -- in the Trio thread ---------------------------------------------------------------------------------------------

    def put(self, *operations: Operation | None) -> None:
        """Hand them over; the first one starts the thread."""
        if self._thread is None:
            self._token = trio.lowlevel.current_trio_token()
            self._thread = threading.Thread(target=self._run, name=f"queue in {self.where}", daemon=True)
            self._thread.start()
        self._asked.extend(operations)
        if not self._woken:
            self._woken = True
            self._waker.send(b"!")

    def cut(self) -> None:
        """Have the connection end, whatever the thread does with it."""
        with self._line_lock, suppress(OSError):
            if self._line is not None:
                self._line.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """End the thread, and give up on it when it takes too long."""
        if self._thread is not None:
            self.put(None)
            await trio.to_thread.run_sync(self._thread.join, CLOSING, limiter=trio.CapacityLimiter(1))
            self.cut()
            await trio.to_thread.run_sync(self._thread.join, 1.0, limiter=trio.CapacityLimiter(1))
        if self._thread is None or not self._thread.is_alive():
            self._awake.close()
            self._waker.close()

    # -- in the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        going_on = True
        while going_on:
            self._wait()
            operations = self._gather()
            going_on = None not in operations
            self._perform([operation for operation in operations if operation is not None])
            self._listen()
        self._drop()

    def _wait(self) -> None:
        """Until something is asked, or told, or a connection that was lost is to be tried again."""
        if self._asked:
            return
        poll = select.poll()
        poll.register(self._awake, select.POLLIN)
        if self._db is not None:
            poll.register(self._db.fileno(), select.POLLIN)
        left = self._again_at - time.monotonic()
        poll.poll(None if left == float("inf") else max(0.0, left * 1000))

    def _gather(self) -> list[Operation | None]:
        """What has been asked by now."""
        with suppress(BlockingIOError):
            self._awake.recv(64)
        self._woken = False
        gathered: list[Operation | None] = []
        while self._asked and len(gathered) < TOGETHER:
            gathered.append(self._asked.popleft())
            if gathered[-1] is None:
                break
        return gathered

    def _perform(self, operations: list[Operation]) -> None:
        wanted = [operation for operation in operations if operation.wanted]
        wanted.sort(key=lambda operation: operation.sees)
        try:
            if wanted:
                self._do(self._connect(), wanted)
        except Exception as error:
            self._fail(wanted, error)
        self._tell(lambda: self._finish(operations))

    def _do(self, db: psycopg.Connection, operations: Sequence[Operation]) -> None:
        """All in one transaction, in one round trip."""
        size = sum(operation.size for operation in operations)
        if len(operations) == 1 and len(operations[0].statements) == 1 and size <= LARGE:
            sql, values = operations[0].statements[0]
            operations[0].found = [_rows(db.execute(sql, values, binary=True))]
        else:
            with db.pipeline():
                if size > LARGE:
                    limit = round(1000 * (STATEMENT + size / PACE))
                    db.execute("SELECT set_config('statement_timeout', %s, true)", [str(limit)])
                cursors = [[db.execute(each.sql, each.values, binary=True) for each in it.statements] for it in operations]
            for operation, found in zip(operations, cursors, strict=True):
                operation.found = [_rows(cursor) for cursor in found]
        if (seen := operations[-1].sees) and self._told:
            self._told = [each for each in self._told if each != (seen, True)]

    def _fail(self, operations: list[Operation], error: Exception) -> None:
        """Nothing of it is stored. If the connection is good, it is the fault of one of them: each by itself."""
        if self._db is None or _is_lost(self._db, error) or len(operations) == 1:
            if self._db is not None and _is_lost(self._db, error):
                self._drop()
                self._plan_again()
            for operation in operations:
                operation.error = _as_queue_error(self.where, error)
            return
        for operation in operations:
            try:
                self._do(self._connect(), [operation])
            except Exception as own:
                self._fail([operation], own)

    def _listen(self) -> None:
        """Hand on what the server has told. A connection that was lost is made anew when it is time."""
        try:
            if self._db is None:
                if time.monotonic() >= self._again_at:
                    self._connect()
            else:
                self._db.pgconn.consume_input()
                while (notification := self._db.pgconn.notifies()) is not None:
                    self._told.append(_Told(notification.extra.decode(), own=notification.be_pid == self._pid))
        except Exception:
            self._drop()
            self._plan_again()
        if self._told:
            told, self._told = self._told, []
            self._tell(lambda: [self._heard(each.said) for each in told])

    def _connect(self) -> psycopg.Connection:
        """The connection; made when there is none."""
        if self._db is not None:
            return self._db
        self._plan_again()  # should it fail
        db = psycopg.connect(**self._parameters, autocommit=True)
        try:
            with self._line_lock:
                self._line = socket.socket(fileno=os.dup(db.fileno()))
            self._pid = db.info.backend_pid
            db.add_notify_handler(lambda told: self._told.append(_Told(told.payload, own=told.pid == self._pid)))
            self._prepare(db)
            db.execute(_SETTINGS)
        except BaseException:
            self._hang_up(db)
            raise
        self._db, self._failures, self._again_at = db, 0, float("inf")
        self._tell(self._connected)
        return db

    def _plan_again(self) -> None:
        first, longest = AGAIN
        delay = min(longest, first * 2 ** min(self._failures, 30)) * random.uniform(0.8, 1.2)
        self._failures += 1
        self._again_at = time.monotonic() + delay

    def _drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            self._hang_up(db)

    def _hang_up(self, db: psycopg.Connection) -> None:
        with self._line_lock:
            line, self._line = self._line, None
        if line is not None:
            line.close()
        with suppress(Exception):
            db.close()

    def _tell(self, what: Hook) -> None:
        with suppress(trio.RunFinishedError):  # nobody is left to be told
            self._token.run_sync_soon(what)


def _rows(cursor: psycopg.Cursor) -> Rows:
    return cursor.fetchall() if cursor.description is not None else []


def parameters(url: str) -> dict[str, Any]:
    """What a URL says, for libpq; what it does not say is libpq's business: PG* variables, files for passwords."""
    try:
        return _DEFAULTS | psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        if unknown := unknown_parameter(url, [each.keyword.decode() for each in psycopg.pq.Conninfo.get_defaults()]):
            raise QueueError(f'{unknown} (libpq has a list of them: "parameter key words")') from None
        raise QueueError(
            "this is no URL of a PostgreSQL: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with %XX for each"
            " character of the password that is no letter or digit"
        ) from None  # the reason would show the password


_OURS = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.NoDataFound,
)
"""Somebody has dropped the tables, or it is a standby now: a new connection sees to that."""

_REFUSED = (psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError, psycopg.errors.ProgramLimitExceeded)


def _is_lost(db: psycopg.Connection, error: Exception) -> bool:
    """Whether the connection is of no use any more: it is closed, or says what makes no sense."""
    if db.closed or db.pgconn.status != psycopg.pq.ConnStatus.OK or isinstance(error, _OURS):
        return True
    return not isinstance(error, psycopg.Error) or (error.sqlstate is None and not isinstance(error, _REFUSED))


def _of_its_own(error: QueueError) -> QueueError:
    """The same error, for somebody else to raise."""
    return type(error)(*error.args)


def _as_queue_error(where: str, error: Exception) -> QueueError:
    """An error of its own for each who waits."""
    if isinstance(error, QueueError):
        return _of_its_own(error)
    words = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        words = "it may only be read: a standby, or default_transaction_read_only is set"
    elif isinstance(error, psycopg.errors.LockNotAvailable):
        words = "another transaction has been keeping what is needed for a second"
    refused = isinstance(error, _REFUSED) and not isinstance(error, (*_OURS, psycopg.errors.InsufficientPrivilege))
    told = (QueueError if refused else QueueUnavailable)(f"cannot use {where}: {words}")
    told.__cause__ = error
    return told
