"""The daemon's own log: events, jobs' `ctx.log`, structlog, stdlib logging and warnings, all as the same lines.

Nothing here blocks or raises into the loop or into a job: a line is rendered where it is made and put into a bounded queue,
and one thread writes. What cannot be written is dropped, counted, and reported when writing works again. Tracebacks carry
no local variables, and the values of `env` never come near a line.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import select
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import structlog

from supervisor.config import LogSpec
from supervisor.errors import Problem, SpecError
from supervisor.events import Added, Changed, ChildEvent, Ended, Event, Journal, Removed, Renamed, Spawned, Stalled, wall_now

Fields = MutableMapping[str, Any]

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
QUEUE = 1 << 20
"""Bytes that may wait for a slow reader; a quarter of them for the output of jobs on the terminal."""
LONGEST = 1 << 16
"""Characters of one text in a line (a traceback of nested groups can be endless)."""

# -- rendering: one line from its fields --------------------------------------------------------------------------------


def safe_repr(value: object) -> str:
    """`repr`, or a placeholder where an object's own `__repr__` fails."""
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


_encode = msgspec.json.Encoder(enc_hook=safe_repr).encode


def render_json(fields: Fields) -> bytes:
    """One JSON object on a line of its own. Falls back step by step for what JSON cannot say: never raises."""
    try:
        return _encode(fields) + b"\n"
    except Exception:  # a lone surrogate, a key that is not a string, a recursion: somebody's value, never worth a crash
        plain = {str(key): value if isinstance(value, (str, int)) else safe_repr(value) for key, value in fields.items()}
        return json.dumps(plain).encode() + b"\n"


class Console:
    """Lines for people: time, level, who, what, and the rest as key=value. `colours` is for terminals only."""

    _LEVEL: ClassVar = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
    _SAID = frozenset({"timestamp", "level", "event", "cause", "job", "worker", "supervisor", "logger", "exception", "stack"})
    _HIDDEN = _SAID | {"seq", "because", "failed", "why"}
    _CONTROL: ClassVar = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
    _CONTROL_IN_BLOCK: ClassVar = {code: text for code, text in _CONTROL.items() if code not in (9, 10)}

    def __init__(self, colours: bool) -> None:
        self._colours = colours
        self._levels = {level: self._paint(f"{level:<8}", self._LEVEL[level]) for level in LEVELS}

    def __call__(self, fields: Fields) -> bytes:
        """The line; a traceback, or a stack, follows it as a block."""
        now = datetime.datetime.now()  # the reader's own time: a person looks at it now
        text = fields.get("event", "")
        if cause := fields.get("cause"):
            text = f"{text}: {cause}"
        words = [
            self._paint(now.isoformat(timespec="milliseconds")[11:], "2"),
            self._levels.get(fields.get("level", ""), ""),
            self._paint(f"{self._who(fields):<12}", "1"),
            self._text(text),
        ]
        words += [self._pair(key, value) for key, value in fields.items() if key not in self._HIDDEN]
        line = " ".join(words)
        if block := fields.get("exception") or fields.get("stack"):
            line = f"{line}\n{str(block).translate(self._CONTROL_IN_BLOCK)}"
        return line.encode(errors="backslashreplace") + b"\n"

    def _who(self, fields: Fields) -> str:
        who = fields.get("job") or fields.get("supervisor") or fields.get("logger") or "supervisor"
        return f"{who}:{fields['worker']}" if "worker" in fields else str(who)

    def _pair(self, key: str, value: object) -> str:
        text = value if isinstance(value, str) else safe_repr(value)
        if not text or " " in text:
            text = f'"{text}"'
        return self._paint(f"{key}=", "36") + self._text(text)

    def _text(self, value: object) -> str:
        """One line of text that cannot steer the terminal."""
        text = value if isinstance(value, str) else safe_repr(value)
        return text if text.isprintable() else text.translate(self._CONTROL)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text


def render_console(console: Console) -> Callable[[Fields], bytes]:
    """`console`, falling back to JSON where a value cannot be shown: never raises."""

    def render(fields: Fields) -> bytes:
        try:
            return console(fields)
        except Exception:
            return render_json(fields)

    return render


# -- writing: a bounded queue and one thread ----------------------------------------------------------------------------


class Target:
    """Where lines go: descriptor 2, or a file that is opened for appending and opened anew after an error."""

    def __init__(self, path: Path | None = None, fd: int = 2) -> None:
        self.path = path
        self._fd = fd if path is None else self._open(path)

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o640)

    def write(self, data: memoryview) -> int:
        """Write some of `data`, waiting as long as it takes. Raises OSError."""
        if self._fd < 0 and self.path is not None:
            self._fd = self._open(self.path)
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # somebody made the description non-blocking: it is shared with other processes
                writable = select.poll()
                writable.register(self._fd, select.POLLOUT)
                writable.poll()

    def close(self) -> None:
        """Give a file back; the next write opens it again."""
        if self.path is not None and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Loss:
    """Lines that were not written: of the log, and of jobs' output on the terminal."""

    lines: int = 0
    echoed: int = 0
    cause: str = ""

    @property
    def count(self) -> int:
        """All of them."""
        return self.lines + self.echoed

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.lines + other.lines, self.echoed + other.echoed, other.cause or self.cause)

    def __str__(self) -> str:
        counts = [f"{self.lines} log lines"] * (self.lines > 0) + [f"{self.echoed} lines of output"] * (self.echoed > 0)
        return f"{' and '.join(counts)} lost here: {self.cause}"


class Writer:
    """One thread that writes lines to a target. `put` never blocks and never raises, from any thread.

    `report` renders what the reader is told when lines were lost.
    """

    def __init__(self, target: Target, report: Callable[[Loss], bytes]) -> None:
        self.lost = 0
        """Lines that were not written, since the beginning."""
        self._target = self._next = target
        self._report = report
        # Condition's own lock is re-entrant: a finalizer that logs may run in the middle of `put`.
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._size = 0
        self._overflow = [0, 0]
        self._closed = False
        self._untold = Loss()
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._thread.start()

    def put(self, line: bytes, echoed: bool = False) -> None:
        """Queue one line, or count it as lost where the queue is full."""
        with self._changed:
            if self._closed or self._size + len(line) > (QUEUE // 4 if echoed else QUEUE):
                self._overflow[echoed] += 1
                self.lost += 1
                return
            self._waiting.append(line)
            self._size += len(line)
            if len(self._waiting) == 1:
                self._changed.notify()

    def redirect(self, target: Target) -> None:
        """Write to `target` from the next line on."""
        with self._changed:
            self._next = target

    def close(self, timeout: float = 2.0) -> None:
        """Write what waits, within `timeout` seconds: a reader that does not read cannot hold up the end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            lines, (lost, echoed) = batch
            self._tell()
            self._deliver(lines)
            if lost or echoed:
                self._untold += Loss(lost, echoed, "the reader was too slow")
                self._tell()
        self._target.close()

    def _take(self) -> tuple[list[bytes], list[int]] | None:
        """Wait for lines, or for losses to tell; None at the end."""
        with self._changed:
            while not self._waiting and not any(self._overflow) and not self._closed:
                self._changed.wait()
            if not self._waiting and not any(self._overflow):
                return None
            if self._next is not self._target:
                self._target.close()
                self._target = self._next
            batch = self._waiting, self._overflow
            self._waiting, self._size, self._overflow = [], 0, [0, 0]
            return batch

    def _tell(self) -> None:
        """Tell the reader what was lost, if it can hear it now."""
        if self._untold.count:
            report = self._report(self._untold)
            if self._push(report)[0] == len(report):
                self._untold = Loss()

    def _deliver(self, lines: list[bytes]) -> None:
        """Write `lines`; those that cannot be written are lost, and counted."""
        done, cause = self._push(b"".join(lines))
        lost = sum(end > done for end in accumulate(map(len, lines)))
        self._untold += Loss(lost, 0, cause)
        self.lost += lost

    def _push(self, data: bytes) -> tuple[int, str]:
        """Write `data`: how much of it was written, and why not all. A line that was cut in two gets an end first."""
        rest = memoryview(b"\n" + data if self._torn else data)
        length, cause = len(data), ""
        try:
            while rest:
                rest = rest[self._target.write(rest[:65536]) :]
        except OSError as error:
            self._target.close()
            cause = error.strerror or str(error)
        done = max(0, length - len(rest))
        if done:
            self._torn = not data.endswith(b"\n", 0, done)
        return done, cause


# -- the log ------------------------------------------------------------------------------------------------------------


class Log:
    """The one place where lines are made. Get one from `open_log`."""

    def __init__(self, spec: LogSpec, base: Path) -> None:
        self._base = base
        self._terminal = os.isatty(2)
        self._stderr = Writer(Target(), self._lost)
        self._file: Writer | None = None
        self.echo: Echo | None = Echo(self._stderr) if self._terminal else None
        """Shows one line of a job's output on the terminal, where there is one."""
        self.apply(spec)

    def apply(self, spec: LogSpec) -> None:
        """Change level, format and file while running; a file is opened anew, as log rotation wants. Raises SpecError."""
        self._writer = self._stderr if spec.file is None else self._to_file(self._base / spec.file)
        self._threshold = LEVELS[spec.level]
        terminal = self._terminal and spec.file is None
        if spec.format == "console" or (spec.format == "auto" and terminal):
            self._render = render_console(Console(terminal and colours_wanted()))
        else:
            self._render = render_json

    def _to_file(self, path: Path) -> Writer:
        try:
            target = Target(path)
        except OSError as error:
            raise SpecError([Problem("", 0, 0, "log.file", f"cannot write to {path}: {error.strerror}")]) from error
        if self._file is None:
            self._file = Writer(target, self._lost)
        else:
            self._file.redirect(target)
        return self._file

    def put(self, line: bytes) -> None:
        """Write a line that is already rendered. Never blocks, never raises; from any thread."""
        self._writer.put(line)

    def attach(self, journal: Journal) -> None:
        """Log every event of `journal`, also those that came before."""
        events = Events(self.enabled, self._emit)
        for event in journal.past(0)[1]:
            events(event)
        journal.add_sink(events)

    def enabled(self, level: str) -> bool:
        """Whether a line of this level is written."""
        return LEVELS.get(level, 20) >= self._threshold

    def close(self) -> None:
        """Write what waits, for two seconds at most."""
        for writer in (self._file, self._stderr):
            if writer is not None:
                writer.close()

    def _emit(self, fields: Fields) -> None:
        self.put(self._render(fields))

    def _lost(self, loss: Loss) -> bytes:
        return self.rendered("warning", str(loss), {"lost": loss.count})

    def rendered(self, level: str, event: object, fields: Mapping[str, Any], exception: BaseException | None = None) -> bytes:
        """The line for something that is no event of the tree."""
        head = {"timestamp": wall_now(), "level": level, "event": event}
        whole: dict[str, Any] = {**head, **fields, **head}  # the order of the head, and nobody's field in its place
        if exception is not None:
            whole["exception"] = "".join(traceback.format_exception(exception)).rstrip()[:LONGEST]
        return self._render(whole)

    def line(self, level: str, event: object, fields: Mapping[str, Any], exception: BaseException | None = None) -> None:
        """Write one line that is no event of the tree."""
        if self.enabled(level):
            self.put(self.rendered(level, event, fields, exception))


def colours_wanted() -> bool:
    """Whether a terminal is to be painted: NO_COLOR and TERM=dumb say no."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Echo:
    """Lines of jobs on the terminal: `NAME | line`, each name in a colour of its own."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._colours = cycle((36, 33, 32, 35, 34, 31)) if colours_wanted() else None
        self._prefixes: dict[str, bytes] = {}
        self._width = 12

    def __call__(self, name: str, line: bytes) -> None:
        """Show one line (without its end); dropped and counted where the terminal is too slow."""
        prefix = self._prefixes.get(name) or self._prefix(name)
        end = b"\x1b[0m\n" if b"\x1b" in line else b"\n"
        self._writer.put(prefix + line.rstrip(b"\r\n") + end, echoed=True)

    def _prefix(self, name: str) -> bytes:
        text = f"{name:<{self._width}} |"
        painted = f"\x1b[{next(self._colours)}m{text}\x1b[0m " if self._colours else f"{text} "
        self._prefixes[name] = painted.encode()
        return self._prefixes[name]


class Events:
    """A sink for a journal: each event becomes one line, which carries job, run, worker and pid where there are any."""

    def __init__(self, enabled: Callable[[str], bool], emit: Callable[[Fields], None]) -> None:
        self._enabled = enabled
        self._emit = emit
        self._pids: dict[str, int] = {}
        self._supervisors: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Log `event`."""
        self._remember(event)
        level = "warning" if isinstance(event, Ended) and event.failed else event.level
        if self._enabled(level):  # asked first: the line costs more than everything else about an event
            self._emit(self._line(level, event))
        if isinstance(event, (Ended, Removed)):
            self._pids.pop(event.name, None)

    def _line(self, level: str, event: Event) -> Fields:
        fields = msgspec.to_builtins(event)
        tag, at = fields.pop("event"), fields.pop("at")
        line: Fields = {"timestamp": at, "level": level, "event": tag}
        if isinstance(event, (ChildEvent, Stalled)) and (name := fields.pop("name")) is not None:
            self._name(line, name)
        if isinstance(event, Ended):
            done = fields.pop("exit")
            fields = (fields.pop("spent") or {}) | fields | {"code": done["code"], "signal": done["signal"]}
            if fields["attempts"] == 1:
                del fields["attempts"]
            del fields["output"]  # what a child prints is no line of ours, unless its job asks for that
        line.update((key, value) for key, value in fields.items() if value is not None and value != [])
        return line

    def _remember(self, event: Event) -> None:
        if isinstance(event, Spawned):
            self._pids[event.name] = event.pid
        elif isinstance(event, Renamed) and event.name in self._pids:
            self._pids[event.to] = self._pids.pop(event.name)
        elif isinstance(event, (Added, Changed)):
            (self._supervisors.add if event.kind == "supervisor" else self._supervisors.discard)(event.name)

    def _name(self, line: Fields, name: str) -> None:
        job, _, worker = name.partition(":")
        line["supervisor" if name in self._supervisors else "job"] = job
        if worker:
            line["worker"] = int(worker)
        if name in self._pids:
            line["pid"] = self._pids[name]


# -- everything else that logs, led in here -----------------------------------------------------------------------------


@contextmanager
def open_log(spec: LogSpec, base: Path) -> Iterator[Log]:
    """The log, with structlog, stdlib logging, warnings and unraisable exceptions led into it; flushed at the end.

    `base` is the directory that a relative `file` belongs to. Raises SpecError where the file cannot be opened.
    """
    log = Log(spec, base)
    with ExitStack() as stack:
        stack.callback(log.close)
        stack.enter_context(_structlog(log))
        stack.enter_context(_stdlib(log))
        stack.enter_context(_last_resorts(log))
        yield log


class _Lines:
    """What structlog calls a wrapped logger: it has a name, and takes rendered lines."""

    def __init__(self, put: Callable[[bytes], None], *names: str) -> None:
        self.name = names[0] if names else None
        self.debug = self.info = self.warning = self.error = self.critical = put


@contextmanager
def _structlog(log: Log) -> Iterator[None]:
    before = structlog.get_config()

    class Logger(structlog.make_filtering_bound_logger(logging.NOTSET)):  # type: ignore[misc]
        """A bound logger that asks for the level at each call: loggers outlive a change of it."""

        def _proxy_to_logger(self, method_name: str, event: str | None = None, **fields: Any) -> None:
            if log.enabled(method_name):
                super()._proxy_to_logger(method_name, event, **fields)

    def render(logger: _Lines, level: str, fields: Fields) -> bytes:
        if logger.name:
            fields.setdefault("logger", logger.name)
        return log.rendered(level, fields.pop("event", None), fields, _exception(fields.pop("exc_info", None)))

    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, render],
        wrapper_class=Logger,
        logger_factory=partial(_Lines, log.put),
        context_class=dict,
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def _exception(exc_info: Any) -> BaseException | None:
    """The exception that `exc_info=` means: an exception, a triple, or anything true for the current one."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return exc_info[1] if len(exc_info) > 1 and isinstance(exc_info[1], BaseException) else None
    return sys.exception() if exc_info else None


class _Handler(logging.Handler):
    """Leads the records of stdlib logging in."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower() if record.levelname.lower() in LEVELS else _nearest(record.levelno)
        if not self._log.enabled(level):
            return
        try:
            text = record.getMessage()
        except Exception:  # arguments that do not fit the format: the author's mistake, shown as it stands
            text = f"{record.msg} {safe_repr(record.args)}"
        fields = {**structlog.contextvars.get_contextvars(), "logger": record.name}
        self._log.line(level, text, fields, _exception(record.exc_info))


def _nearest(levelno: int) -> str:
    return max((name for name in LEVELS if LEVELS[name] <= max(levelno, 10)), key=LEVELS.__getitem__)


@contextmanager
def _stdlib(log: Log) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, show = root.handlers[:], root.level, warnings.showwarning
    root.handlers[:] = [_Handler(log)]
    root.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = show
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _last_resorts(log: Log) -> Iterator[None]:
    """Exceptions that Python can only print: in a finalizer, or at the end of a thread."""

    def unraisable(args: Any) -> None:
        log.line("error", "exception ignored", {"where": safe_repr(args.object)}, args.exc_value)

    def thread(args: threading.ExceptHookArgs) -> None:
        log.line("error", "thread failed", {"thread": args.thread.name if args.thread else ""}, args.exc_value)

    before = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = unraisable, thread
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = before
