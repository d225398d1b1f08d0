"""The worker of a queue job that is a command: a child for each item, which reads it as JSON, and prints what comes of it.

Its standard input is the item, and a file: it may read it as often as it likes, or not at all. Its standard output is the
result and not logged; what it has to say it says on stderr. Its exit code says whether it has failed.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import MappingProxyType

import msgspec
import trio

from supervisor.errors import ExitStatus, RunFailed, SpawnFailed, WorkerLost
from supervisor.kinds import command
from supervisor.kinds.context import Attempt, Outcome, Resources, Run, Work, alone
from supervisor.kinds.job import JobSpec
from supervisor.state import Phase

LONGEST_RESULT = 64 << 20
"""Bytes that a command may print for an item."""

PIECE = 64 << 10
"""So much is read before everybody else has a turn."""


@asynccontextmanager
async def handling(spec: JobSpec, run: Run, resources: Resources) -> AsyncIterator[Handler]:
    """Nothing is held between two items."""
    yield Handler(spec, resources)


class Handler:
    """Runs the command for each item."""

    room = 1
    hears = True
    """It gets the stop signal where it takes too long, or nobody wants it any more. A worker that is to end lets it finish."""

    def __init__(self, spec: JobSpec, resources: Resources) -> None:
        self._spec = spec
        self._resources = resources

    async def handle(self, work: Work, payload: bytes) -> bytes | None:
        """One child. Raises ExitStatus where it failed, and WorkerLost where none could be started."""
        process = _Process(work)
        work.on_stopping(lambda: process.advance(Phase.STOPPING) if work.overdue else None)
        try:
            with alone(), ExitStack() as opened:
                return await self._run(work, process, payload, opened)
        except SpawnFailed as error:
            work.begun = False
            raise WorkerLost(str(error)) from None
        finally:
            work.outcome = process.outcome
            work.pid = work.send_signal = None

    async def _run(self, work: Work, process: Attempt, payload: bytes, opened: ExitStack) -> bytes | None:
        given = opened.enter_context(_given(payload))
        printed, printing = os.pipe2(os.O_CLOEXEC)
        opened.callback(os.close, printed)
        os.set_blocking(printed, False)
        output = Output(printed)
        work.begin()
        async with trio.open_nursery() as nursery:
            with ExitStack() as theirs:
                theirs.callback(os.close, printing)
                nursery.start_soon(output.read)
                outcome = await command.run(self._spec, process, self._resources, ends=(given, printing))
            nursery.cancel_scope.cancel(reason="nothing of it is alive")
        output.take_rest()
        _judge(outcome)
        return output.result


class _Process(Attempt):
    """The run of a command for one item. People are not told of each."""

    def __init__(self, work: Work) -> None:
        super().__init__(work, work.until, followed=True)
        told = {"SUPERVISOR_ITEM": work.item, "SUPERVISOR_ATTEMPT": str(work.attempt)}
        self.environ = MappingProxyType({**work.environ, **told})

    def expect_process(self) -> None:
        pass

    def spawned(self, pid: int) -> None:
        self.pid = pid


class Output:
    """What a command prints, as it comes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data = bytearray()

    async def read(self) -> None:
        """Take what comes. Raises RunFailed when it is too much."""
        while self._take() != b"":
            await trio.lowlevel.wait_readable(self._descriptor)

    def take_rest(self) -> None:
        """Take what there is, when no more will come."""
        while self._take():
            pass

    def _take(self) -> bytes | None:
        """A piece of what there is: None, nothing now; empty, nothing any more."""
        try:
            data = os.read(self._descriptor, PIECE)
        except BlockingIOError:
            return None
        self._data += data
        if len(self._data) > LONGEST_RESULT:
            raise RunFailed(f"it has printed more than {LONGEST_RESULT >> 20} MB, which no result of a command may be")
        return data

    @property
    def result(self) -> bytes | None:
        """As JSON: what it says where that is JSON, else a string; None for nothing."""
        said = bytes(self._data).strip()
        if not said:
            return None
        try:
            msgspec.json.decode(said)
        except (msgspec.MsgspecError, RecursionError):
            return msgspec.json.encode(self._data.decode(errors="replace").removesuffix("\n"))
        return said


def _judge(outcome: Outcome) -> None:
    """Raise how it failed. A signal ends no item well, whoever has sent it."""
    if outcome.failed or outcome.signal is not None:
        error = ExitStatus(outcome.reason, code=outcome.code, signal=outcome.signal)
        error.traceback = "\n".join(outcome.output)
        raise error


@contextmanager
def _given(payload: bytes) -> Iterator[int]:
    """A file in memory with the item, to be read from its beginning."""
    descriptor = os.memfd_create("item", os.MFD_CLOEXEC)
    try:
        left = memoryview(payload)
        while left:
            left = left[os.write(descriptor, left) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
