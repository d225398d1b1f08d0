"""SQLite for what must outlive the daemon: one file, one thread that writes, many operations in one commit.

    Store         asks the thread and waits: `write`, `read`, `post`
    _Operation    one thing asked for, and what came of it
    _Writer       the thread: takes whatever has come while the last commit ran, and does it as one transaction

A commit waits for the disk, and costs about the same for one operation as for a thousand. So nobody commits alone: each
operation has a savepoint of its own in the transaction of all, and is told when that is on the disk.

Nothing happens before the first operation: no thread, no file, no SQLite. Only the library ever opens the file: if this
process opened and closed it by itself, it would drop the locks that the library holds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal, TypeVar, cast

import trio

from supervisor.errors import SupervisorError
from supervisor.events import wall_now

if TYPE_CHECKING:
    from sqlite3 import Connection

T = TypeVar("T")
Failed = Callable[["StoreError"], object]

BATCH = 4096
"""Operations in one transaction at most: the first of them waits for the last."""

POSTED = 10_000
"""Operations that may wait without anybody waiting for them."""

BUSY = 5.0
"""Seconds that another process may hold a lock on the file: somebody looks into it, or makes a copy."""

LOG = 64 << 20
"""Bytes that the log keeps on the disk after something large was written to it."""

CLOSING = 10.0
"""Seconds that the end waits for a disk that does not answer."""

_ASIDE = ("", "-wal", "-shm")


class StoreError(SupervisorError):
    """The file cannot be used: a full disk, no permission, damage. What was asked for is not stored."""


@asynccontextmanager
async def open_store(
    path: Path,
    schema: Sequence[str],
    *,
    synchronous: Literal["FULL", "NORMAL"] = "FULL",
    exclusive: bool = False,
    on_failure: Failed,
) -> AsyncIterator[Store]:
    """A store in the file `path`, opened by its first operation; at the end of the block what is waiting is done first.

    `schema` has the statements that lead from one version of the file to the next, in order, never changed once released
    (a file knows its version). `synchronous`: with FULL what is told done outlives a power cut, with NORMAL a kill of the
    process, and no commit waits for the disk. `exclusive`: no other process can even read it while it is open (no memory is
    shared, and a commit takes no locks), and it must be on a disk of this machine. A damaged file is put aside as
    `PATH.damaged-TIME` and begun anew.

    `on_failure` hears in the Trio thread of what nobody waits for: damage, posted operations that failed, a disk that does
    not answer at the end.
    """
    store = Store(path, schema, synchronous, exclusive, on_failure)
    try:
        yield store
    finally:
        await store._close()


class Store:
    """See `open_store`. Belongs to the Trio thread; the functions that it is given run in the writer's.

    They get the connection, do one thing with it, quickly, leave transactions alone, and return plain values, no cursors.
    """

    def __init__(self, path: Path, schema: Sequence[str], synchronous: str, exclusive: bool, on_failure: Failed) -> None:
        self.path = path
        self._writer = _Writer(path, schema, synchronous, exclusive, on_failure)
        self._posted = 0
        self._closed = False

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Do `fn`, whole or not at all; returns when that is on the disk.

        What `fn` raises undoes what it did, and nothing else, and is raised here. Raises StoreError where the file cannot
        be used. Cancelled: it has not begun and never will; once it has begun, the wait goes on to its end.
        """
        return await self._ask(fn, writes=True)

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """What `fn` finds: all that was committed before, and nothing that is not. It may not write. Otherwise as `write`."""
        return await self._ask(fn, writes=False)

    def post(self, fn: Callable[[Connection], object], then: Callable[[StoreError | None], object] | None = None) -> bool:
        """Do `fn` as `write` does, with nobody waiting. False: too many wait already, it is dropped.

        `then` is called in the Trio thread when that is on the disk, or with the error; without it, an error goes to
        `on_failure`.
        """
        if self._posted >= POSTED:
            return False

        def over(operation: _Operation) -> None:
            self._posted -= 1
            error = None if operation.error is None else _as_store_error(self.path, operation.error)
            if then is not None:
                then(error)
            elif error is not None:
                self._writer.on_failure(error)

        self._put(_Operation(fn, True, over))
        self._posted += 1
        return True

    @trio.lowlevel.enable_ki_protection
    async def _ask(self, fn: Callable[[Connection], T], *, writes: bool) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        operation = _Operation(fn, writes, lambda _: trio.lowlevel.reschedule(task))
        self._put(operation)

        def withdraw(_: object) -> trio.lowlevel.Abort:
            begun = operation.take() is None
            return trio.lowlevel.Abort.FAILED if begun else trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(withdraw)
        if operation.error is not None:
            raise operation.error
        return cast(T, operation.value)

    def _put(self, operation: _Operation) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"the store {self.path} is closed")
        self._writer.put(operation)

    async def _close(self) -> None:
        self._closed = True
        if not await self._writer.close():
            self._writer.on_failure(StoreError(f"{self.path}: the disk has not answered for {CLOSING:g} s; not all is stored"))


class _Operation:
    """One function to be done. Whoever takes it first, the writer or a cancellation, has it."""

    __slots__ = ("_fn", "error", "over", "value", "writes")

    def __init__(self, fn: Callable[[Connection], object], writes: bool, over: Callable[[_Operation], None]) -> None:
        self.writes = writes
        self.over = over
        """Called in the Trio thread when it is done, or has failed."""
        self.value: object = None
        self.error: BaseException | None = None
        self._fn = [fn]

    def take(self) -> Callable[[Connection], object] | None:
        """The function, once."""
        try:
            return self._fn.pop()
        except IndexError:
            return None


class _Writer:
    """The thread, and the file that only it touches."""

    def __init__(self, path: Path, schema: Sequence[str], synchronous: str, exclusive: bool, on_failure: Failed) -> None:
        self.on_failure = on_failure
        self._path = path
        self._schema = schema
        self._synchronous = synchronous
        self._exclusive = exclusive
        self._queue = SimpleQueue[_Operation | None]()
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken
        self._db: Connection | None = None
        self._suspect = False

    def put(self, operation: _Operation) -> None:
        """Hand it over; the first one starts the thread."""
        if self._thread is None:
            self._token = trio.lowlevel.current_trio_token()
            self._thread = threading.Thread(target=self._run, name=f"store {self._path.name}", daemon=True)
            self._thread.start()
        self._queue.put(operation)

    async def close(self) -> bool:
        """Wait, even when cancelled, until all that was handed over is done and the file closed; False: it takes too long."""
        if self._thread is None:
            return True
        self._queue.put(None)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join, CLOSING, limiter=trio.CapacityLimiter(1))
        return not self._thread.is_alive()

    # -- in the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = False
        while not last:
            operations, last = self._gather()
            self._perform([(operation, fn) for operation in operations if (fn := operation.take()) is not None])
        self._drop()

    def _gather(self) -> tuple[list[_Operation], bool]:
        """Whatever has come by now, waiting for the first; and whether the end is among it."""
        operations: list[_Operation] = []
        got = self._queue.get()
        while got is not None:
            operations.append(got)
            if len(operations) == BATCH:
                return operations, False
            try:
                got = self._queue.get_nowait()
            except Empty:
                return operations, False
        return operations, True

    def _perform(self, batch: _Batch) -> None:
        """Do the writes as one transaction, then the reads; then everybody is told."""
        for writes, do in ((True, self._write), (False, self._read)):
            part = [each for each in batch if each[0].writes is writes]
            try:
                if part:
                    do(self._open(), part)
            except BaseException as error:
                self._fail(part, error)
        if batch:
            self._tell(lambda: [operation.over(operation) for operation, _ in batch])

    def _write(self, db: Connection, batch: _Batch) -> None:
        db.execute("BEGIN IMMEDIATE")
        if len(batch) == 1:  # which needs no savepoint: each statement is a hand-over of the interpreter
            db.execute("COMMIT" if _is_done(*batch[0], db) else "ROLLBACK")
            return
        for each in batch:
            db.execute("SAVEPOINT operation")
            if not _is_done(*each, db):
                db.execute("ROLLBACK TO operation")
            db.execute("RELEASE operation")
        db.execute("COMMIT")

    def _read(self, db: Connection, batch: _Batch) -> None:
        db.execute("PRAGMA query_only = ON")
        for operation, fn in batch:
            _do(operation, fn, db)
            if operation.error is not None and _is_serious(operation.error):
                raise operation.error
        db.execute("PRAGMA query_only = OFF")

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        """Nothing of the batch is stored, and what is undone stays so. After worse the file is opened anew, and looked at."""
        if self._db is not None and (_is_serious(error) or not _undone(self._db)):
            self._suspect = True
            self._drop()
        for operation, _ in batch:
            if operation.error is None or operation.error is error:
                operation.error = _as_store_error(self._path, error)

    def _drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(Exception):  # what is not committed is undone
                db.close()

    def _tell(self, what: Callable[[], object]) -> None:
        with suppress(trio.RunFinishedError):  # nobody is left to be told
            self._token.run_sync_soon(what)

    # -- the file -------------------------------------------------------------------------------------------------------

    def _open(self) -> Connection:
        """The connection; made when there is none. A damaged file is put aside, and a new one begun."""
        if self._db is None:
            try:
                self._db = self._connect()
            except Exception as error:
                if not _is_damage(error):
                    raise
                self._put_aside(error)
                self._db = self._connect()
            self._suspect = False
        return self._db

    def _connect(self) -> Connection:
        import sqlite3  # here, so that a daemon that stores nothing does without

        ended_well = not (self._suspect or Path(f"{self._path}-wal").exists())
        if self._exclusive and (kind := network_file_system(self._path.parent)):
            raise StoreError(f"{self._path} would be on {kind}, where its locks and writes are not safe: {_ELSEWHERE}")
        _make_private(self._path)
        db = sqlite3.connect(self._path, timeout=BUSY, isolation_level=None)
        try:
            if self._exclusive:
                db.execute("PRAGMA locking_mode = EXCLUSIVE")
                db.execute(f"PRAGMA journal_size_limit = {LOG}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {self._synchronous}")
            if not ended_well and (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise _Damaged(found)
            self._migrate(db)
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self, db: Connection) -> None:
        """Bring the file to our version."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(self._schema):
            raise StoreError(
                f"{self._path} was written by a newer version of this program: run that, or move the file out of the way"
            )
        for number, statements in enumerate(self._schema[version:], version + 1):
            db.executescript(f"BEGIN IMMEDIATE; {statements}; PRAGMA user_version = {number}; COMMIT")

    def _put_aside(self, error: Exception) -> None:
        """Rename the file and what belongs to it: nothing is ever deleted."""
        suffix = f".damaged-{wall_now().replace(':', '')}"
        for part in _ASIDE:
            with suppress(FileNotFoundError):
                Path(f"{self._path}{part}").rename(f"{self._path}{suffix}{part}")
        told = StoreError(f"{self._path} is damaged ({error}): it is now {self._path.name}{suffix}, and a new one is begun")
        self._tell(lambda: self.on_failure(told))


_Batch = list[tuple[_Operation, Callable[["Connection"], object]]]


def _do(operation: _Operation, fn: Callable[[Connection], object], db: Connection) -> None:
    """What comes of it, an exception too: whoever waits raises it."""
    try:
        operation.value = fn(db)
    except BaseException as error:
        operation.error = error


def _is_done(operation: _Operation, fn: Callable[[Connection], object], db: Connection) -> bool:
    """Do it; False: it has failed, and what it did is to be undone."""
    _do(operation, fn, db)
    if operation.error is not None and (not db.in_transaction or _code(operation.error) in _ADVICE):
        raise operation.error  # no fault of the function: a full disk, say, which has undone everything
    return operation.error is None


class _Damaged(Exception):
    """What the check of the file has found."""


def _make_private(path: Path) -> None:
    """Make the file, for its owner alone, where there is none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


_NETWORK = frozenset({"9p", "afs", "ceph", "cifs", "fuse.sshfs", "nfs", "nfs4", "smb3"})
_ELSEWHERE = "name a `state_dir` on a disk of this machine"


def network_file_system(directory: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The type of the file system that a directory (or what is there of its path) is on, if that is another machine's."""
    while not directory.exists():
        directory = directory.parent
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(FileNotFoundError):
        for line in mounts.read_text().splitlines():
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == number and source.split()[0] in _NETWORK:
                return source.split()[0]
    return None


def _undone(db: Connection) -> bool:
    """Undo what is not committed; False where that cannot be."""
    try:
        if db.in_transaction:
            db.execute("ROLLBACK")
    except Exception:
        return False
    return True


def _code(error: BaseException) -> str:
    """The word that SQLite has for an error: FULL for SQLITE_FULL, IOERR for SQLITE_IOERR_FSYNC; empty for others."""
    return getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").partition("_")[0]


def _is_damage(error: BaseException) -> bool:
    return isinstance(error, _Damaged) or _code(error) in ("CORRUPT", "NOTADB")


def _is_serious(error: BaseException) -> bool:
    return _is_damage(error) or _code(error) == "IOERR"


_ADVICE = {
    "BUSY": "another process keeps it locked: close what looks into it",
    "CANTOPEN": "it cannot be opened: look at the rights of its directory",
    "CORRUPT": "it is damaged, and will be put aside",
    "FULL": "the disk is full: free some space",
    "IOERR": "the disk does not do what it is told: see the system's log",
    "NOTADB": "it is damaged, and will be put aside",
    "READONLY": "it cannot be written: look at its rights, and how its file system is mounted",
}


def _as_store_error(path: Path, error: BaseException) -> StoreError:
    """An error of its own for each who waits."""
    if isinstance(error, StoreError):
        return StoreError(str(error))
    told = StoreError(f"cannot use {path}: {_ADVICE.get(_code(error)) or f'{type(error).__name__}: {error}'}")
    told.__cause__ = error
    return told
