"""What runs in a worker process: calls come over the channel, are made one after another, and are answered over it.

The process is started for one run of a job and ends with it: after one call, or after all those of the worker of a queue. An
answer is sent before the next call begins, so that whoever finds the process dead knows which call that was. The main thread
makes the calls; another one listens, so that a function hears of a stop whatever it is doing. The process imports no Trio and
nothing of the tree: `supervisor.Context` is here the class below, so that a module which imports it by that name starts as
fast as one that does not.

The channel is a stream socket. Either side sends frames: the lengths of a head and of a body, and those. Heads from the daemon
are marshalled, and bodies pickled: TOML has dates and times, which JSON has not, and the daemon is whom the worker trusts.
What the worker sends may be forged, for it may run as another user; so that is JSON, a head that says what it is and, of any
size, a body that the daemon need not read.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import itertools
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
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

import supervisor
from supervisor import errors
from supervisor.errors import RunFailed, UnfitItem
from supervisor.kinds.function import context_parameter, emptied, load

if TYPE_CHECKING:
    import datetime

    from supervisor.kinds.payload import ItemFunction
    from supervisor.queues.protocol import Receipt
    from supervisor.state import Phase

HEADER = struct.Struct("<IQ")
"""The lengths of head and body."""

LONGEST_HEAD = 1 << 20
LONGEST_BODY = 1 << 32
"""More is no frame of ours."""

PIECE = 64 << 10
"""So much is read at once."""

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
        self._got = bytearray()
        self._taken = 0

    def send(self, head: bytes, body: bytes = b"") -> None:
        """Send one frame; blocks for as long as the daemon does not read. Raises OSError where the channel is closed.

        A signal handler that interrupts this may call it too: its frame is sent after the one in hand.
        """
        with self._turn:
            in_hand = bool(self._unsent)
            lengths = HEADER.pack(len(head), len(body))
            self._unsent += (lengths + head + body,) if len(body) < PIECE else (lengths + head, body)
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

    def receive(self) -> tuple[dict[str, Any], bytes] | None:
        """The next frame; None when the daemon is gone. For one thread."""
        if not (header := self._read(HEADER.size)):
            return None
        head, body = map(self._read, HEADER.unpack(header))
        return marshal.loads(head), body

    def _read(self, size: int) -> bytes:
        """So many bytes, or none if the other end is closed. Reads as much as there is: frames come in crowds."""
        if len(self._got) < self._taken + size:
            del self._got[: self._taken]
            self._taken = 0
        while len(self._got) < self._taken + size:
            if not (data := os.read(self._own(), PIECE)):
                return b""
            self._got += data
        start, self._taken = self._taken, self._taken + size
        with memoryview(self._got) as got:
            return bytes(got[start : self._taken])

    def _own(self) -> int:
        """The descriptor, unless somebody has closed it: its number may be that of a file by now."""
        try:
            if os.fstat(self._descriptor).st_ino == self._file:
                return self._descriptor
        except OSError:
            pass
        raise OSError(errno.EBADF, "the channel to the supervisor was closed: close no descriptors that are not your own")


class Worker:
    """The process: what it is told, and what it says. It makes one call."""

    def __init__(self, channel: Channel, stop_signal: int) -> None:
        self.phase = "running"
        self._channel = channel
        self._orders: SimpleQueue[tuple[dict[str, Any], bytes] | None] = SimpleQueue()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # may be set by a signal handler, and wakes up everybody
        self._stop_signal = stop_signal
        self._interruptible = True
        self._interrupted = 0
        self._deaf = False
        """Whether a function runs that takes no Context."""
        self._asked: dict[int, SimpleQueue[dict[str, Any]]] = {}
        """Who waits for an answer of the daemon."""
        self._numbers = itertools.count(1)

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

    def _take(self, head: dict[str, Any], body: bytes) -> None:
        match head["is"]:
            case "phase":
                self._enter(head)
            case "answer":
                self._asked.pop(head["number"]).put(head)
            case "end":
                self._orders.put(None)
            case _:
                self._orders.put((head, body))

    def _enter(self, head: dict[str, Any]) -> None:
        """Hear of a phase."""
        self.phase = head["phase"]
        if head["stopping"]:
            self.ask()
        if head["overdue"] and self._deaf:
            self._interruptible = True
            signal.raise_signal(self._stop_signal)

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

    def put(self, queue: str, item: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Have the daemon put an item, and wait for its answer."""
        from supervisor.kinds import payload

        number, answered = next(self._numbers), SimpleQueue[dict[str, Any]]()
        self._asked[number] = answered
        self._channel.send(
            encoded({"is": "put", "number": number, "queue": queue, "options": options}), payload.result(item) or b"null"
        )
        return answered.get()

    def give(self, item: Any, call: int = 0) -> None:
        """Have the daemon put what a call has yielded, and wait until it is stored. Raises RunFailed where it is no item."""
        from supervisor.kinds import payload

        number, answered = next(self._numbers), SimpleQueue[dict[str, Any]]()
        self._asked[number] = answered
        self._channel.send(encoded({"is": "give", "number": number, "call": call}), payload.result(item) or b"null")
        if "error" in (answer := answered.get()):
            raise RunFailed(answer["text"])

    # ---- calls ----

    def work(self) -> int:
        """Do what is ordered, until there is no more or it fails; the exit code."""
        while (order := self._orders.get()) is not None:
            try:
                self._do(*order)
            except SystemExit:
                raise  # it ends the process as it would any other
            except BaseException as error:
                self._deaf = self._interruptible = False
                self.say("failed", **told(error))
                return 1
        return 0

    def _do(self, head: dict[str, Any], body: bytes) -> None:
        function, args = load(head["call"], "process", into=head["into"]), unpickled(body)
        if parameter := context_parameter(function):
            args[parameter] = Context(self, head["facts"])
        self._deaf, self._interruptible = not parameter, head["service"] and not parameter
        self.say("started")
        value = emptied(function(**args), self.give)
        self._deaf = self._interruptible = False
        self._channel.send(encoded({"is": "returned"}), returned(value) if head["wanted"] else b"")

    def end(self) -> None:
        """The end of the process, after all else: where a signal interrupted it, it dies of that, as others do."""
        if self._interrupted:
            sys.stdout.flush()
            signal.signal(self._interrupted, signal.SIG_DFL)
            os.kill(os.getpid(), self._interrupted)


class Server(Worker):
    """The process of the worker of a queue job: it makes many calls, and is kept.

    Only one call is interrupted, not the process, and that only where it takes too long.
    """

    def __init__(self, channel: Channel, stop_signal: int) -> None:
        super().__init__(channel, stop_signal)
        self._main = threading.get_ident()
        self._turn = threading.Lock()
        """Held to begin a call, and to tell one something: it is to be heard by no other."""
        self._call = 0
        """The number of the call that is being made; 0 between two."""
        self._last = 0
        """That of the last one that has begun."""
        self._told = False
        """Whether it was told to end: the next is not to hear of that."""
        self._early: dict[int, dict[str, Any]] = {}
        """What those were told that have not begun."""
        self._overdue = 0
        """The number of a call that is to be interrupted."""
        self._forked = False
        os.register_at_fork(after_in_child=self._note_fork)

    def _note_fork(self) -> None:
        self._forked = True

    def _take(self, head: dict[str, Any], body: bytes) -> None:
        if head["is"] == "withdraw":
            self._withdraw(set(head["calls"]))
        else:
            super()._take(head, body)

    def _enter(self, head: dict[str, Any]) -> None:
        with self._turn:
            if head["call"] == self._call:
                self._hear(head)
            elif head["call"] > self._last:
                self._early[head["call"]] = head

    def _hear(self, head: dict[str, Any]) -> None:
        self.phase = head["phase"]
        if head["stopping"]:
            self._told = True
            self.ask()
        if head["overdue"] and self._deaf:
            self._overdue = self._call
            signal.pthread_kill(self._main, self._stop_signal)

    def _withdraw(self, calls: set[int] | None) -> None:
        """Give back what has not begun of these, or (None) of all."""
        kept, given = [], []
        with suppress(Empty):
            while True:
                order = self._orders.get_nowait()
                if order is not None and (calls is None or order[0]["call"] in calls):
                    given.append(order[0]["call"])
                    self._early.pop(order[0]["call"], None)
                else:
                    kept.append(order)
        for order in kept:
            self._orders.put(order)
        self.say("withdrawn", calls=given)

    def on_signal(self, number: int, frame: object) -> None:
        """The stop signal: of its own, for the call that takes too long, or from elsewhere: then this call is the last."""
        if self._overdue:
            if self._overdue == self._call and self._deaf:
                self._overdue = 0
                raise SystemExit
            self._overdue = 0
        elif self._interruptible:
            raise SystemExit
        else:
            self._interrupted = number
            self.ask()
            self._orders.put(None)

    def work(self) -> int:
        """Load the function and make its calls, until there are no more; the exit code."""
        order = self._orders.get()
        if order is None:
            return 0
        try:
            function = self._load(*order)
        except SystemExit:
            raise
        except BaseException as error:
            self.say("failed", **told(error))
            return 1
        self._interruptible = False
        self.say("started", typed=function.typed)
        while not self._interrupted and (call := self._orders.get()) is not None:
            if call[0]["is"] == "check":
                self._check(function, *call)
            else:
                self._make(function, order[0]["facts"], *call)
        self._withdraw(None)
        return 0

    def _load(self, head: dict[str, Any], body: bytes) -> ItemFunction:
        from supervisor.kinds.payload import ItemFunction, result

        self._json = result
        return ItemFunction(load(head["call"], "process", into=head["into"]), unpickled(body), head["batch"])

    def _check(self, function: ItemFunction, head: dict[str, Any], body: bytes) -> None:
        """Say which of these items is the first that the function does not take, and why."""
        bad: dict[str, Any] = {}
        end = 0
        for at, size in enumerate(head["sizes"]):
            begin, end = end, end + size
            try:
                function.read(body[begin:end])
            except UnfitItem as error:
                bad = {"bad": at, "text": str(error)}
                break
            except Exception:
                continue  # code of theirs has failed: who handles the item will say more
        self.say("checked", number=head["number"], **bad)

    def _make(self, function: ItemFunction, facts: dict[str, Any], head: dict[str, Any], payload: bytes) -> None:
        """Make one call, and say what became of it."""
        number, began = head["call"], time.perf_counter()
        try:
            try:
                self._begin(head, deaf=not function.hears)
                context = Context(self, {**facts, **head}) if function.hears else None
                made = function(function.read(payload), context)
                body = self._json(emptied(made, partial(self.give, call=number))) or b""
            finally:
                self._call = 0
            said = b'{"is":"returned","call":%d,"took":%f}' % (number, time.perf_counter() - began)
        except BaseException as error:  # the call boundary: what ends this call does not end the process
            said = encoded({"is": "failed", "call": number, "took": time.perf_counter() - began, **told(error)})
            body = b""
        if self._forked:
            os._exit(0)  # a fork that has come back out of the call: the process that it was made of answers
        self._channel.send(said, body)

    def _begin(self, head: dict[str, Any], *, deaf: bool) -> None:
        head["until"] = None if head["left"] is None else time.monotonic() + head["left"]
        with self._turn:
            self._deaf = deaf
            if self._told:
                self._told = False
                os.eventfd_read(self._stop)
            self._call = self._last = head["call"]
            self.phase = "running"
            if "phase" in (told := self._early.pop(self._call, head)):
                self._hear(told)

    def end(self) -> None:
        """It ends well, whatever has asked it to."""


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
        """Which attempt of this run, or of its item, it is, counted from 1 (`retry`)."""
        self.item: str | None = facts.get("item")
        """The id of the item that is handled (of a batch the first): the same at each attempt. None where there is no queue."""
        self.log = Log(worker) if self.item is None else Log(worker, item=self.item)
        self._call: int = facts.get("call", 0)
        self._until: float | None = facts["until"]
        self._scheduled_at: float | None = facts.get("scheduled_at")

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
        """Say how far the run, or its item, is."""
        self._worker.say("progress", done=float(done), total=None if total is None else float(total), call=self._call)

    def put(self, queue: str, item: Any, **options: Any) -> Receipt:
        """Put an item into a queue of the file, as `Context.put` of other kinds; blocks for so long."""
        if hasattr(at := options.get("at", 0), "timestamp"):
            options["at"] = at.timestamp()
        answer = self._worker.put(queue, item, options)
        if "error" in answer:
            kind = getattr(errors, answer["error"], getattr(builtins, answer["error"], errors.QueueError))
            raise kind(answer["text"])
        from supervisor.queues.protocol import Receipt

        return Receipt(**answer["receipt"])


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


def returned(value: Any) -> bytes:
    """What a function returned, as JSON; nothing for None. Raises TypeError for what is none."""
    from supervisor.kinds import payload

    return payload.result(value) or b""


def unpickled(args: bytes) -> dict[str, Any]:
    """The arguments of the job."""
    if not args:
        return {}
    import pickle

    found: dict[str, Any] = pickle.loads(args)
    return found


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
        "positions": getattr(error, "positions", ()) if isinstance(error, UnfitItem) else (),
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
    worker = (Server if order["serves"] else Worker)(channel, order["stop_signal"])
    sys.path[:] = [*order["path"], *(own for own in sys.path if own not in order["path"])]
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    vars(supervisor).update(Context=Context, ThreadContext=Context)
    if (number := order["stop_signal"]) != signal.SIGKILL:
        signal.signal(number, worker.on_signal)
        _default_in_forks(number)
    atexit.register(worker.end)
    threading.Thread(target=worker.listen, name="supervisor", daemon=True).start()
    sys.exit(worker.work())
