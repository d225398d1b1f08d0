"""The daemon's end of the channel to a worker process, and that process as a command; `process_worker.py` has the other end."""

from __future__ import annotations

import marshal
import os.path
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import structlog
import trio
from msgspec import MsgspecError, Raw, Struct, json, structs
from msgspec.json import Decoder

from supervisor.errors import QueueError, RaisedElsewhere, Retry, RunFailed, SpawnFailed, UnfitItem
from supervisor.kinds import command
from supervisor.kinds.context import Resources, Run, alone, put
from supervisor.kinds.job import JobSpec
from supervisor.kinds.process_worker import HEADER, LONGEST_BODY, LONGEST_HEAD

if TYPE_CHECKING:
    from supervisor.kinds.chain import Chain
    from supervisor.queues.producer import PutOptions

PROGRAM = (sys.executable, "-P", "-X", "faulthandler", str(PurePath(__file__).with_name("process_main.py")))
"""What a worker is started as. Of a crash in native code, the job's output gets the Python stack."""

PIECE = 64 << 10
"""So much is read before everybody else has a turn."""

LONGEST_REASON = 500


class Channel:
    """Our end. A context manager: it holds the channel. What is said on it is for `_take`.

    The process may belong to another user: its word is not to be relied on.
    """

    serves = False
    """Whether the process is to make many calls."""

    def __init__(self, spec: JobSpec, run: Run, resources: Resources) -> None:
        self.nonsense = ""
        """What was wrong with what it has sent."""
        self._spec = spec
        self._run = run
        self._resources = resources
        self._frames = Frames(LONGEST_BODY)
        self._outbox: list[bytes] = []
        self._more = trio.Event()
        self._killed = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._log = structlog.get_logger("job").bind(job=run.job, run=run.id)

    def __enter__(self) -> Self:
        try:
            self._ours, self._theirs = socket.socketpair()
        except OSError as error:
            raise SpawnFailed(f"no channel to be had: {(error.strerror or str(error)).lower()}") from None
        self._ours.setblocking(False)
        self.tell({"serves": self.serves, "path": _path(), "stop_signal": int(signal.Signals[f"SIG{self._spec.stop_signal}"])})
        return self

    def __exit__(self, *error: object) -> None:
        self._ours.close()
        self._theirs.close()

    async def live(self, run: Run) -> None:
        """Have a process at the other end, until nothing of it is alive: `run.outcome` says how it ended.

        Cancelled, or after `kill`: it is killed. Raises SpawnFailed where there was none.
        """
        program = structs.replace(self._spec, command=(*PROGRAM, str(self._spec.call)))
        with alone():
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._listen)
                self._nursery.start_soon(self._speak)
                with self._killed:
                    await self._have_process(program, run)
                self._nursery.cancel_scope.cancel(reason="the worker has ended")
        self._nursery = None
        while data := self._receive():
            self._heed(data)

    async def _have_process(self, program: JobSpec, run: Run) -> None:
        await command.run(program, run, self._resources, self._theirs)

    def kill(self, reason: str) -> None:
        """Kill the process, and all that came of it."""
        self._killed.cancel(reason=reason)

    # ---- what it is told ----

    def tell(self, head: dict[str, Any], body: bytes = b"") -> None:
        """Send a frame, in its turn. What is told in one go is sent in one."""
        packed = marshal.dumps(head)
        self._outbox.append(HEADER.pack(len(packed), len(body)) + packed)
        if body:
            self._outbox.append(body)
        self._more.set()

    async def _speak(self) -> None:
        while True:
            await self._more.wait()
            self._more = trio.Event()
            data, self._outbox = b"".join(self._outbox), []
            await self._send(data)

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
            await self._wait_readable()

    async def _wait_readable(self) -> None:
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
        if self.nonsense:
            return
        try:
            for head, body in self._frames.feed(data):
                self._take(MESSAGES.decode(head), body)
        except (MsgspecError, Nonsense) as error:
            self.nonsense = f"it sent what is no message of a worker: {error}"
            self.kill(self.nonsense)

    def _take(self, message: Message, body: bytes) -> None:
        """Heed one message. Raises Nonsense for one that has no place here."""
        match message:
            case Ready():
                self._run.ready("it said so")
            case Heartbeat():
                self._run.heartbeat()
            case Log(level, event, fields, exception):
                told = {"exception": exception} if exception else {}
                getattr(self._log, level)(event, **told, **command.untaken(fields))
            case Put():
                if self._nursery is not None:  # else nobody waits for the answer any more
                    self._nursery.start_soon(self._put, message, body)
            case Give():
                if (chain := self._chain(message.call)) is None:
                    raise Nonsense("what it gives, which nobody waits for")
                if self._nursery is not None:
                    self._nursery.start_soon(self._give, message, chain, body)
            case _:
                raise Nonsense(f"{type(message).__name__.lower()}, which nobody waits for")

    async def _put(self, message: Put, body: bytes) -> None:
        """Put an item for the function, and tell it what became of that."""
        answer: dict[str, Any]
        try:
            receipt = await put(self._resources, message.queue, Raw(body), cast("PutOptions", message.options))
            answer = {"receipt": structs.asdict(receipt)}
        except (QueueError, LookupError, TypeError, MsgspecError, RecursionError) as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        self.tell({"is": "answer", "number": message.number, **answer})

    def _chain(self, call: int) -> Chain | None:
        """Where what a call yields goes."""
        return self._run.chain

    async def _give(self, message: Give, chain: Chain, body: bytes) -> None:
        """Put what the function has yielded, and tell it when that is stored."""
        answer = {}
        try:
            await chain.put(json.decode(body))
        except (QueueError, RunFailed, MsgspecError, RecursionError) as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        self.tell({"is": "answer", "number": message.number, **answer})


def named(call: str | Callable[..., Any] | None) -> str:
    """The name by which a process finds a function. Raises RunFailed for a function that has none."""
    if isinstance(call, str) or call is None:
        return str(call)
    module, name = getattr(call, "__module__", "__main__"), getattr(call, "__qualname__", repr(call))
    if module == "__main__" or "<" in name:
        raise RunFailed(
            f"{module}:{name} cannot be called in a process, which finds functions by name: define it with `def` at the top of "
            "a module"
        )
    return f"{module}:{name}"


def arguments(spec: JobSpec) -> bytes:
    """The arguments of the job, for the process. Raises RunFailed where they cannot be sent."""
    try:
        return pickle.dumps(spec.args) if spec.args else b""
    except Exception as error:  # what a program has put there that uses us as a library
        raise RunFailed(f"its arguments cannot be sent to a process: {type(error).__name__}: {error}") from None


def _path() -> list[str]:
    """Code is imported there from where we would import it, whatever its working directory."""
    return [os.path.abspath(each) for each in sys.path]  # noqa: PTH100 (resolves no link)


# ---- frames and messages ----


class Nonsense(Exception):
    """Bytes that are no frame."""


class Frames:
    """Chunks in, frames out."""

    def __init__(self, longest_body: int) -> None:
        self._longest_body = longest_body
        self._part = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The frames that `data` completes, head and body. Raises Nonsense, after which there is no use in more."""
        self._part += data
        frames, at = [], 0
        with memoryview(self._part) as whole:
            while len(whole) >= at + HEADER.size:
                head, body = HEADER.unpack_from(whole, at)
                if not 0 < head <= LONGEST_HEAD or body > self._longest_body:
                    raise Nonsense(f"a frame that would be {head} and {body} bytes long")
                start = at + HEADER.size
                end = start + head + body
                if len(whole) < end:
                    break
                frames.append((bytes(whole[start : start + head]), bytes(whole[start + head : end])))
                at = end
        del self._part[:at]
        return frames


class Started(Struct, tag="started", tag_field="is"):
    """The code has been loaded, and the function is being called. `typed`: there are items that it does not take."""

    typed: bool = True


class Ready(Struct, tag="ready", tag_field="is"):
    """`ctx.ready()`."""


class Heartbeat(Struct, tag="heartbeat", tag_field="is"):
    """`ctx.heartbeat()`."""


class Progress(Struct, tag="progress", tag_field="is"):
    """`ctx.progress()`."""

    done: float
    total: float | None
    call: int = 0


class Log(Struct, tag="log", tag_field="is"):
    """A line of `ctx.log`."""

    level: Literal["debug", "info", "warning", "error", "critical"]
    event: str
    fields: dict[str, Any]
    exception: str = ""


class Put(Struct, tag="put", tag_field="is"):
    """`ctx.put()`; the body is the item. `number` is the answer's too."""

    number: int
    queue: str
    options: dict[str, Any]


class Give(Struct, tag="give", tag_field="is"):
    """The function, or one of its calls, has yielded something: the body. `number` is the answer's too."""

    number: int
    call: int = 0


class Withdrawn(Struct, tag="withdrawn", tag_field="is"):
    """These calls were not begun, and will not be."""

    calls: tuple[int, ...]


class Checked(Struct, tag="checked", tag_field="is"):
    """Items were looked at. The first of them that the function does not take is `bad`, and `text` says why."""

    number: int
    bad: int | None = None
    text: str = ""


class Returned(Struct, tag="returned", tag_field="is"):
    """The function has returned. `call` says from which of its calls, where it makes many, and `took` how many seconds it took.

    The body is what it returned.
    """

    call: int = 0
    took: float = 0.0


class Failed(Struct, tag="failed", tag_field="is"):
    """The function has raised, or was not to be had."""

    reason: str
    traceback: str
    names: tuple[str, ...] = ()
    retry_after: float | None = None
    positions: tuple[int, ...] = ()
    call: int = 0
    took: float = 0.0

    @property
    def error(self) -> RunFailed:
        """The failure, as the tree takes it."""
        reason = self.reason.partition("\n")[0][:LONGEST_REASON] or "it failed"
        if _name_of(UnfitItem) in self.names:
            return UnfitItem(reason, self.positions)
        if _name_of(Retry) in self.names:
            return Retry(reason, after=self.retry_after)
        return RaisedElsewhere(reason, self.names, self.retry_after, self.traceback)


Message = Started | Ready | Heartbeat | Progress | Log | Put | Give | Withdrawn | Checked | Returned | Failed
MESSAGES = Decoder(Message)


def checked(result: bytes) -> bytes:
    """A result that is JSON. Raises MsgspecError for one that is not, which only a process that meddles sends."""
    json.decode(result, type=Raw)
    return result


def _name_of(error: type[Exception]) -> str:
    return f"{error.__module__}:{error.__qualname__}"
