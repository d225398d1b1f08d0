"""What runs in a worker process: calls come over the channel, are made one after another, and are answered over it.

The process is started for one job and ends with it. Its main thread makes the calls; another one listens, so that a function
hears of a stop whatever it is doing. It imports no Trio and nothing of the tree: `supervisor.Context` is here the class below,
so that a module which imports it by that name starts as fast as one that does not.

The channel is a stream socket. Either side sends frames: the lengths of a head and of a body, and those. Heads from the daemon
are marshalled, and bodies pickled: TOML has dates and times, which JSON has not, and the daemon is whom the worker trusts.
What the worker sends may be forged, for it may run as another user; so that is JSON, a head that says what it is and, of any
size, a body that the daemon need not read.
"""

from __future__ import annotations

import atexit
import errno
import json
import marshal
import os
import select
import signal
import struct
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

import supervisor
from supervisor.errors import RunFailed
from supervisor.kinds.function import context_parameter, load

if TYPE_CHECKING:
    import datetime

    from supervisor.state import Phase

HEADER = struct.Struct("<IQ")
"""The lengths of head and body."""

LONGEST_HEAD = 1 << 20
LONGEST_BODY = 1 << 32
"""More is no frame of ours."""

LONGEST_TEXT = 64 << 10
"""Characters of a message or a traceback that are told."""


class Channel:
    """The worker's end. Threads may speak up at the same time: frames are whole."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._file = os.fstat(descriptor).st_ino
        self._turn = threading.RLock()
        self._unsent: deque[bytes] = deque()

    def send(self, head: bytes, body: bytes = b"") -> None:
        """Send one frame; blocks for as long as the daemon does not read. Raises OSError where the channel is closed.

        A signal handler that interrupts this may call it too: its frame is sent after the one in hand.
        """
        with self._turn:
            in_hand = bool(self._unsent)
            self._unsent += (HEADER.pack(len(head), len(body)) + head, body)
            while self._unsent and not in_hand:
                self._write(self._unsent[0])
                self._unsent.popleft()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._own(), left) :]
        except OSError:
            self._unsent.clear()
            raise

    def receive(self) -> tuple[dict[str, Any], bytearray] | None:
        """The next frame; None when the daemon is gone. For one thread."""
        if not (header := self._read(HEADER.size)):
            return None
        head, body = map(self._read, HEADER.unpack(header))
        return marshal.loads(head), body

    def _read(self, size: int) -> bytearray:
        """So many bytes, or none if the other end is closed."""
        data = bytearray(size)
        left = memoryview(data)
        while left:
            if not (count := os.readv(self._own(), [left])):
                return bytearray()
            left = left[count:]
        return data

    def _own(self) -> int:
        """The descriptor, unless somebody has closed it: its number may be that of a file by now."""
        try:
            if os.fstat(self._descriptor).st_ino == self._file:
                return self._descriptor
        except OSError:
            pass
        raise OSError(errno.EBADF, "the channel to the supervisor was closed: close no descriptors that are not your own")


class Worker:
    """The process: what it is told, and what it says."""

    def __init__(self, channel: Channel, stop_signal: int) -> None:
        self.phase = "running"
        self._channel = channel
        self._calls: SimpleQueue[tuple[dict[str, Any], bytearray] | None] = SimpleQueue()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # may be set by a signal handler, and wakes up everybody
        self._stop_signal = stop_signal
        self._interruptible = True
        self._interrupted = 0
        self._deaf = False
        """Whether a function runs that takes no Context."""

    # ---- being told ----

    def listen(self) -> None:
        """Take what the daemon sends, until it is gone: then nothing of this worker stays."""
        try:
            while (frame := self._channel.receive()) is not None:
                self._take(*frame)
        except OSError as error:
            if error.errno == errno.EBADF:
                return  # the function has closed it: it goes on, and hears no more than signals
        os.killpg(0, signal.SIGKILL)

    def _take(self, head: dict[str, Any], body: bytearray) -> None:
        match head["is"]:
            case "phase":
                self.phase = head["phase"]
                if head["stopping"]:
                    self.ask()
                if head["overdue"] and self._deaf:
                    self._interruptible = True
                    signal.raise_signal(self._stop_signal)
            case "call":
                self._calls.put((head, body))
            case "end":
                self._calls.put(None)

    def on_signal(self, number: int, frame: object) -> None:
        """The stop signal: whoever takes a Context hears it; other services are interrupted where they stand, once.

        So is what takes too long.
        """
        self.ask()
        if self._interruptible:
            self._interruptible = False
            self._interrupted = number
            raise SystemExit

    def ask(self) -> None:
        """Have it known that the run is to end."""
        os.eventfd_write(self._stop, 1)

    def await_stop(self, seconds: float) -> bool:
        """Whether it is known, waiting for it for so long at most."""
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        until = time.monotonic() + seconds
        while not (heard := poll.poll(min(max(0.0, until - time.monotonic()), 86400.0) * 1000)):
            if time.monotonic() >= until:
                return False
        if heard[0][1] & select.POLLNVAL:
            raise OSError(errno.EBADF, "the way to hear of a stop was closed: close no descriptors that are not your own")
        return True

    # ---- speaking up ----

    def say(self, what: str, **fields: Any) -> None:
        """Tell the daemon. Raises OSError where the channel is closed, ValueError for a field that is no JSON."""
        self._channel.send(encoded({"is": what, **fields}))

    # ---- calls ----

    def work(self) -> int:
        """Make the calls, until there are no more or one of them fails; the exit code."""
        while (call := self._calls.get()) is not None:
            try:
                self._call(*call)
            except SystemExit:
                raise  # it ends the process as it would any other
            except BaseException as error:
                self._deaf = self._interruptible = False
                self.say("failed", **told(error))
                return 1
        return 0

    def _call(self, head: dict[str, Any], body: bytearray) -> None:
        function, args = load(head["call"], "process"), {}
        if body:
            import pickle

            args = pickle.loads(body)
        if parameter := context_parameter(function):
            args[parameter] = Context(self, head["facts"])
        self._deaf, self._interruptible = not parameter, head["service"] and not parameter
        self.say("started")
        value = function(**args)
        self._deaf = self._interruptible = False
        self._channel.send(encoded({"is": "returned"}), result(value) if head["wanted"] else b"")

    def end(self) -> None:
        """The end of the process, after all else: where a signal interrupted it, it dies of that, as others do."""
        if self._interrupted:
            sys.stdout.flush()
            signal.signal(self._interrupted, signal.SIG_DFL)
            os.kill(os.getpid(), self._interrupted)


class Context:
    """`Context` for a function that runs in a process of its own: the names of `ThreadContext`. Any thread may use it."""

    def __init__(self, worker: Worker, facts: dict[str, Any]) -> None:
        self._worker = worker
        self.job: str = facts["job"]
        """The job's name."""
        self.worker: int = facts["worker"]
        """Which of the job's workers this is, counted from 0."""
        self.run: str = facts["run"]
        """The id of this run, such as `api#3`."""
        self.attempt: int = facts["attempt"]
        """Which attempt of this run it is, counted from 1 (`retry`)."""
        self.log = Log(worker)
        self._until: float | None = facts["until"]
        self._scheduled_at: float | None = facts["scheduled_at"]

    @property
    def scheduled_at(self) -> datetime.datetime | None:
        """The moment of its schedule that this run is made for, in UTC, however late it began; None where it is for none."""
        import datetime

        at = self._scheduled_at
        return None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)

    @property
    def deadline(self) -> float | None:
        """Seconds left before it is asked to end because it takes too long (`timeout`, `deadline`); None: no such limit."""
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    @property
    def phase(self) -> Phase:
        """The phase this run is in, at this moment."""
        from supervisor.state import Phase

        return Phase(self._worker.phase)

    @property
    def stopping(self) -> bool:
        """True once this run has been asked to end."""
        return self._worker.await_stop(0)

    def wait_stopping(self) -> None:
        """Block until this run is asked to end."""
        self._worker.await_stop(float("inf"))

    def sleep(self, seconds: float) -> bool:
        """Sleep, but not past a stop: False when it ended early because the run was asked to end."""
        return not self._worker.await_stop(seconds)

    def ready(self) -> None:
        """Say that the job is ready (`ready = { notify = true }`)."""
        self._worker.say("ready")

    def heartbeat(self) -> None:
        """Say that the job is well (`health = { notify = true }`): silence for longer than `every` is a bad sign."""
        self._worker.say("heartbeat")

    def progress(self, done: float, total: float | None = None) -> None:
        """Say how far the run is."""
        self._worker.say("progress", done=float(done), total=None if total is None else float(total))


class Log:
    """A logger as structlog's: its lines are lines of the daemon's log, with the job and the run."""

    def __init__(self, worker: Worker, **bound: Any) -> None:
        self._worker = worker
        self._bound = bound

    def bind(self, **fields: Any) -> Log:
        """A logger with these fields on every line."""
        return Log(self._worker, **{**self._bound, **fields})

    def debug(self, event: str, *args: Any, **fields: Any) -> None:
        """A line of this level; `args` go into `event` as with %."""
        self._line("debug", event, args, fields)

    def info(self, event: str, *args: Any, **fields: Any) -> None:
        """A line of this level."""
        self._line("info", event, args, fields)

    def warning(self, event: str, *args: Any, **fields: Any) -> None:
        """A line of this level."""
        self._line("warning", event, args, fields)

    def error(self, event: str, *args: Any, **fields: Any) -> None:
        """A line of this level."""
        self._line("error", event, args, fields)

    def critical(self, event: str, *args: Any, **fields: Any) -> None:
        """A line of this level."""
        self._line("critical", event, args, fields)

    def exception(self, event: str, *args: Any, **fields: Any) -> None:
        """An error, with the traceback of the exception at hand."""
        self._line("error", event, args, {"exc_info": True, **fields})

    def _line(self, level: str, event: str, args: tuple[Any, ...], fields: dict[str, Any]) -> None:
        fields = {**self._bound, **fields}
        raised = fields.pop("exc_info", None)
        error = raised if isinstance(raised, BaseException) else sys.exception() if raised else None
        line: dict[str, Any] = {"level": level, "event": str(event % args if args else event)[:LONGEST_TEXT], "fields": fields}
        if error is not None:
            line["exception"] = traced(error)
        try:
            self._worker.say("log", **line)
        except ValueError:  # no JSON, too deep, or too much of it
            self._worker.say("log", **{**line, "fields": {str(name): shown(value) for name, value in fields.items()}})


# ---- what is sent ----


def encoded(value: Any) -> bytes:
    """A head. Raises ValueError for what is no JSON or too long; what only JSON does not know is told by its `repr`."""
    try:
        head = json.dumps(value, allow_nan=False, ensure_ascii=False, default=shown).encode(errors="replace")
    except (TypeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if len(head) > LONGEST_HEAD:
        raise ValueError(f"longer than {LONGEST_HEAD} bytes")
    return head


def shown(value: Any) -> str:
    """The `repr` of a value, which is foreign code."""
    try:
        return repr(value)[:LONGEST_TEXT]
    except Exception as worse:
        return f"<{type(value).__name__}; its repr cannot be had: {type(worse).__name__}>"


def result(value: Any) -> bytes:
    """What a function returned, as JSON. Raises TypeError for what is none."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"the function returned what is no JSON: {error}") from None


def told(error: BaseException) -> dict[str, Any]:
    """What is told of a call that failed: why, what it goes by, and the traceback where there is one to show."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    kind, said = type(error).__name__, text(error).strip().partition("\n")[0]
    reason = said if isinstance(error, RunFailed) else f"{kind}: {said[:200]}" if said else kind
    shown = error.__cause__ if isinstance(error, RunFailed) else error
    after = getattr(error, "retry_after", None)
    return {
        "reason": reason,
        "names": sorted(names(error)),
        "retry_after": after if isinstance(after, (int, float)) and 0 <= after < float("inf") else None,
        "traceback": traced(shown) if shown is not None else "",
    }


def names(error: BaseException) -> set[str]:
    """What an exception goes by: each of its classes, by where it is defined and by where a package above has it.

    Of a group, what all in it go by.
    """
    if isinstance(error, BaseExceptionGroup):
        return set.intersection(*map(names, error.exceptions))
    found = set()
    for kind in type(error).__mro__:
        if kind.__module__ in ("builtins", "supervisor.errors"):
            found.add(kind.__qualname__)
        parts = kind.__module__.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if end == len(parts) or getattr(sys.modules.get(module), kind.__qualname__, None) is kind:
                found.add(f"{module}:{kind.__qualname__}")
    return found


def text(error: BaseException) -> str:
    """What an exception says; its `__str__` is foreign code too."""
    try:
        return str(error)[:LONGEST_TEXT]
    except Exception as worse:
        return f"its text cannot be had: {type(worse).__name__}"


def traced(error: BaseException) -> str:
    """The traceback of an exception, without what is ours in it; of a long one the end."""
    import traceback

    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    try:
        lines = traceback.format_exception(type(error), error, frames)
    except Exception as worse:
        return f"{type(error).__name__}; its traceback cannot be had: {type(worse).__name__}"
    return "".join(lines).rstrip()[-LONGEST_TEXT:]


def _default_in_forks(number: int) -> None:
    """Have forks (multiprocessing makes some) die of the stop signal: it is not they that are asked. None is lost meanwhile."""

    def begin() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def go_on() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})

    def become_another() -> None:
        signal.signal(number, signal.SIG_DFL)
        go_on()

    os.register_at_fork(before=begin, after_in_parent=go_on, after_in_child=become_another)


def main() -> NoReturn:
    """Be a worker, from the first order to the end of the process."""
    channel = Channel(int(os.environ.pop("SUPERVISOR_CHANNEL")))
    order, _ = channel.receive() or sys.exit("there is no supervisor at the other end of the channel")
    worker = Worker(channel, order["stop_signal"])
    sys.path[:] = [*order["path"], *(own for own in sys.path if own not in order["path"])]
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    vars(supervisor).update(Context=Context, ThreadContext=Context)
    if (number := order["stop_signal"]) != signal.SIGKILL:
        signal.signal(number, worker.on_signal)
        _default_in_forks(number)
    atexit.register(worker.end)
    threading.Thread(target=worker.listen, name="supervisor", daemon=True).start()
    sys.exit(worker.work())
