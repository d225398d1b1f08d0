"""The kind `process`: a plain function in a Python process of its own.

The process is a command like any other, with its output, limits, user and stop ladder (`command.py`). Its program is
`process_main.py`, and a channel tells it what to call, and us what becomes of it; `process_worker.py` has the frames. It
loads the code anew each time it starts.
"""

from __future__ import annotations

import marshal
import os.path
import pickle
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Literal, Self

import structlog
import trio
from msgspec import MsgspecError, Struct, structs
from msgspec.json import Decoder

from supervisor.errors import RaisedElsewhere, Retry, RunFailed, SpawnFailed
from supervisor.kinds import command
from supervisor.kinds.context import Outcome, Resources, Run
from supervisor.kinds.job import JobSpec
from supervisor.kinds.process_worker import HEADER, LONGEST_BODY, LONGEST_HEAD
from supervisor.spec import split_name
from supervisor.state import Phase

log = structlog.get_logger("supervisor")

PROGRAM = (sys.executable, "-P", "-X", "faulthandler", str(PurePath(__file__).with_name("process_main.py")))
"""What a worker is started as. Of a crash in native code, the job's output gets the Python stack."""

PIECE = 32 << 10
"""So much is read before everybody else has a turn."""

LONGEST_REASON = 500


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Call the function in a process of its own. What it returns stays there: nobody asks for it.

    Asked to end: a function that takes a `Context` hears it; where it takes none, a service or what takes too long is
    interrupted by SystemExit. Cancelled: the process and all that came of it are killed. Raises SpawnFailed if there was no
    process, and RunFailed for arguments that cannot be sent to one, or where the function raised.
    """
    with Worker(run) as worker:
        return await worker.serve(spec, resources)


class Worker:
    """Our side of a worker process, for one run. A context manager: it holds the channel."""

    def __init__(self, run: Run, *, wanted: bool = False) -> None:
        """`wanted`: what the function returns is sent back, and is `result` then."""
        self.result: bytes | None = None
        """What the function returned, as JSON. The process may belong to another user: its word is not to be relied on."""
        self._run = run
        self._wanted = wanted
        self._frames = Frames(LONGEST_BODY if wanted else 0)
        self._log = structlog.get_logger("job").bind(job=run.job, run=run.id)
        self._says_started = False
        self._returned = False
        self._failure = ""
        self._raised: RunFailed | None = None
        self._nonsense = trio.CancelScope()

    def __enter__(self) -> Self:
        try:
            self._ours, self._theirs = socket.socketpair()
        except OSError as error:
            raise SpawnFailed(f"no channel to be had: {(error.strerror or str(error)).lower()}") from None
        self._ours.setblocking(False)
        return self

    def __exit__(self, *error: object) -> None:
        self._ours.close()
        self._theirs.close()

    async def serve(self, spec: JobSpec, resources: Resources) -> Outcome:
        """Have the job's function called in a process, and wait until nothing of it is alive."""
        self._says_started = spec.ready is None
        orders = [self._begin(spec), self._call(spec), frame({"is": "end"})]
        program = structs.replace(spec, command=(*PROGRAM, str(spec.call)))
        refused: SpawnFailed | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._speak, orders)
            try:
                with self._nonsense:
                    await command.run(program, self._run, resources, self._theirs)
            except SpawnFailed as error:
                refused = error
            nursery.cancel_scope.cancel(reason="the worker has ended")
        if refused is not None:
            raise refused
        while data := self._receive():
            self._heed(data)
        outcome = self._run.outcome = self._judged(self._run.outcome or Outcome(reason="killed", failed=True))
        if self._raised is not None:
            raise self._raised
        return outcome

    # ---- what it is told ----

    def _begin(self, spec: JobSpec) -> bytes:
        """What it must know first. Code is imported from where we would import it, whatever its working directory."""
        path = [os.path.abspath(each) for each in sys.path]  # noqa: PTH100 (resolves no link)
        return frame({"path": path, "stop_signal": int(signal.Signals[f"SIG{spec.stop_signal}"])})

    def _call(self, spec: JobSpec) -> bytes:
        """The order to call the function for this run."""
        run = self._run
        facts = {"job": split_name(run.job)[0], "worker": run.worker, "run": run.id, "attempt": run.attempt}
        facts["scheduled_at"] = run.scheduled_at
        facts["until"] = None if run.left is None else time.monotonic() + run.left  # all processes have this clock
        order = {"is": "call", "call": str(spec.call), "service": spec.service, "wanted": self._wanted, "facts": facts}
        try:
            return frame(order, pickle.dumps(spec.args) if spec.args else b"")
        except Exception as error:  # what a program has put there that uses us as a library
            raise RunFailed(f"its arguments cannot be sent to a process: {type(error).__name__}: {error}") from None

    async def _speak(self, orders: list[bytes]) -> None:
        """Give the orders, and then tell the phases."""
        for order in orders:
            await self._send(order)
        async for phase in self._run.phase.eventual_values(lambda phase: phase is not Phase.RUNNING):
            stopping = not phase < Phase.STOPPING
            await self._send(frame({"is": "phase", "phase": phase.value, "stopping": stopping, "overdue": self._run.overdue}))

    async def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._ours.send(left) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._ours)
            except OSError:  # nobody is there: the end of the process tells the rest
                return

    # ---- what it says ----

    async def _listen(self) -> None:
        while (data := self._receive()) != b"":
            if data:
                self._heed(data)
            await trio.lowlevel.wait_readable(self._ours)

    def _receive(self) -> bytes | None:
        """What there is to read: None, nothing now; empty, nothing any more."""
        try:
            return self._ours.recv(PIECE)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _heed(self, data: bytes) -> None:
        if self._nonsense.cancel_called:
            return
        try:
            for head, body in self._frames.feed(data):
                self._take(MESSAGES.decode(head), body)
        except (MsgspecError, Nonsense) as error:
            self._failure = f"it sent what is no message of a worker: {error}"
            self._nonsense.cancel(reason=self._failure)

    def _take(self, message: Message, body: bytes) -> None:
        match message:
            case Started():
                if self._says_started:
                    self._run.ready("started")
            case Ready():
                self._run.ready("it said so")
            case Heartbeat():
                self._run.heartbeat()
            case Progress(done, total):
                self._run.progress(done, total)
            case Log(level, event, fields, exception):
                told = {"exception": exception} if exception else {}
                getattr(self._log, level)(event, **told, **command.untaken(fields))
            case Returned():
                self._returned, self.result = True, body if self._wanted else None
            case Failed():
                self._fail(message)

    def _fail(self, message: Failed) -> None:
        """The function has raised, or was not to be had. Its traceback goes to the log once, as those of other kinds do."""
        self._failure = message.reason.partition("\n")[0][:LONGEST_REASON] or "it failed"
        self._raised = RaisedElsewhere(self._failure, message.names, message.retry_after)
        if f"{Retry.__module__}:{Retry.__qualname__}" in message.names:
            self._raised = Retry(self._failure, after=message.retry_after)
        if message.traceback:
            tell, what = (log.debug, "attempt raised") if self._run.followed else (log.error, "job raised")
            tell(what, job=self._run.job, run=self._run.id, exception=message.traceback)

    def _judged(self, outcome: Outcome) -> Outcome:
        """How the run ended, as the process and its last word say together."""
        if self._failure:
            return structs.replace(outcome, reason=self._failure, failed=True)
        if self._returned and not outcome.failed:  # perhaps of our own signal, on its way out
            return structs.replace(outcome, reason="completed")
        return outcome


# ---- frames and messages ----


def frame(head: dict[str, Any], body: bytes = b"") -> bytes:
    """A frame for a worker."""
    packed = marshal.dumps(head)
    return HEADER.pack(len(packed), len(body)) + packed + body


class Nonsense(Exception):
    """Bytes that are no frame."""


class Frames:
    """Chunks in, frames out."""

    def __init__(self, longest_body: int) -> None:
        self._longest_body = longest_body
        self._part = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The frames that `data` completes, head and body. Raises Nonsense, after which there is no use in more."""
        self._part += data
        while len(self._part) >= HEADER.size:
            head, body = HEADER.unpack_from(self._part)
            if not 0 < head <= LONGEST_HEAD or body > self._longest_body:
                raise Nonsense(f"a frame that would be {head} and {body} bytes long")
            start, end = HEADER.size + head, HEADER.size + head + body
            if len(self._part) < end:
                return
            with memoryview(self._part) as whole:
                taken = bytes(whole[HEADER.size : start]), bytes(whole[start:end])
            del self._part[:end]
            yield taken


class Started(Struct, tag="started", tag_field="is"):
    """The code has been loaded, and the function is being called."""


class Ready(Struct, tag="ready", tag_field="is"):
    """`ctx.ready()`."""


class Heartbeat(Struct, tag="heartbeat", tag_field="is"):
    """`ctx.heartbeat()`."""


class Progress(Struct, tag="progress", tag_field="is"):
    """`ctx.progress()`."""

    done: float
    total: float | None


class Log(Struct, tag="log", tag_field="is"):
    """A line of `ctx.log`."""

    level: Literal["debug", "info", "warning", "error", "critical"]
    event: str
    fields: dict[str, Any]
    exception: str = ""


class Returned(Struct, tag="returned", tag_field="is"):
    """The function has returned."""


class Failed(Struct, tag="failed", tag_field="is"):
    """The function has raised, or was not to be had."""

    reason: str
    traceback: str
    names: tuple[str, ...] = ()
    retry_after: float | None = None


Message = Started | Ready | Heartbeat | Progress | Log | Returned | Failed
MESSAGES = Decoder(Message)
