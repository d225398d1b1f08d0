"""`supervisor submit`: items out of words, files and pipes, sent in as many requests as they need.

A line that is no item is told by its number. The lines of a file are all looked at before the first is sent; of a pipe, which
may have no end, what has come is sent at once.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from contextlib import contextmanager

from supervisor.cli import render
from supervisor.cli.act import INTERRUPTED, REFUSED, USAGE, Out, complain, exit_code
from supervisor.control.wire import Connection, Unreachable, find_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from supervisor.control.verbs import Verb

CHUNK = 1 << 18
"""Bytes of items that one request carries, unless one item alone has more."""

LARGEST = (1 << 26) - (1 << 12)
"""Bytes of an item that the daemon takes, with what is said of it besides."""

MOST = 2000
"""Items that one request carries."""

_GRACE = 5.0
_TOGETHER = 500
_BAR = 24


class Unfit(Exception):
    """What was to be put is no item, or cannot be read; the message says where."""


class Line:
    """One item, and where it stands."""

    __slots__ = ("place", "text")

    def __init__(self, text: bytes, place: str) -> None:
        self.text = text
        self.place = place


def submit(out: Out, verb: Verb, values: dict[str, Any], socket: str | None, as_json: bool) -> int:
    """Put what the words say, and give the exit code."""
    words = values["items"] or ("-",)
    if not values["items"] and sys.stdin.isatty():
        complain('submit: what? expected JSON, @FILE with a JSON value in each line, or "-" for standard input')
        return USAGE
    from supervisor.cli.wakeup import woken_by_signals

    try:
        counts = [_checked(word) for word in words]
        total = 0 if None in counts else sum(count for count in counts if count)
        if total and 1 < len(values["id"]) != total:
            raise Unfit(f"expected as many ids as items ({total}), or one that theirs begin with; got {len(values['id'])}")
        sender = Sender(Connection(find_socket(socket)), out, values, total, as_json)
    except Unfit as problem:
        complain(f"{problem}; nothing is stored")
        return REFUSED
    with woken_by_signals() as sender.connection.wakeup:
        return sender.run(line for word in words for line in _lines(word))


# ---- what is to be put ----


def _checked(word: str) -> int | None:
    """Look at all that a word stands for, if that has an end: how many items it is, else None. Raises Unfit."""
    if word == "-":
        return None
    if word.startswith("@"):
        with _of_file(word[1:]):
            if not stat.S_ISREG(os.stat(word[1:]).st_mode):  # noqa: PTH116 - importing pathlib would take longer than asking
                return None
    return sum(line is not None for line in _lines(word))


@contextmanager
def _of_file(path: str) -> Iterator[None]:
    """What is wrong with a file is said with its name."""
    if not path:
        raise Unfit("expected the name of a file after the @")
    try:
        yield
    except OSError as problem:
        raise Unfit(f"{path}: {(problem.strerror or str(problem)).lower()}") from None


def _lines(word: str) -> Iterator[Line | None]:
    """The items that a word stands for; None where more may be long in coming. Raises Unfit."""
    if word == "-":
        yield from _numbered(sys.stdin.fileno(), "standard input")
    elif word.startswith("@"):
        with _of_file(word[1:]), open(word[1:], "rb", buffering=0) as file:  # noqa: PTH123
            yield from _numbered(file.fileno(), word[1:])
    else:
        yield Line(_check_word(word), "")


def _numbered(descriptor: int, name: str) -> Iterator[Line | None]:
    number, rest = 0, [b""]
    while chunk := os.read(descriptor, CHUNK):
        chunk = chunk if number or len(rest) > 1 else chunk.removeprefix(b"\xef\xbb\xbf")  # some editors begin a file so
        first, *more = chunk.split(b"\n")
        rest.append(first)
        for text in more:
            number += 1
            if (whole := b"".join(rest)).strip():
                yield Line(_check(whole, f"{name}:{number}: "), f"{name}:{number}: ")
            rest = [text]
        yield None
    if (whole := b"".join(rest)).strip():
        yield Line(_check(whole, f"{name}:{number + 1}: "), f"{name}:{number + 1}: ")


def _check_word(word: str) -> bytes:
    """The same of a word of the command line; of one that looks like something else, what to do."""
    try:
        return _check(word.encode("utf-8", "surrogateescape"), "")
    except Unfit as problem:
        hint = ""
        if os.path.isfile(word):  # noqa: PTH113
            hint = f"; the lines of that file are @{word}"
        elif word.isprintable() and word[:1] not in '"[{' and len(word) < 64:
            hint = f"; a text needs its quotes: '\"{word}\"'" if word.strip() else ""
        raise Unfit(f"{problem}{hint}") from None


def _check(text: bytes, place: str) -> bytes:
    """An item as it goes over the socket: on one line. Raises Unfit."""
    if len(text) > LARGEST:
        raise Unfit(f"{place}{_mb(len(text))} MB: an item may have {_mb(LARGEST)}; put the name of a file in its place")
    try:
        value = json.loads(text.decode(), parse_constant=_no_number)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Unfit(f"{place}nested too deeply") from None
    except UnicodeDecodeError as problem:
        raise Unfit(f"{place}not UTF-8 (byte {problem.start + 1})") from None
    except UnicodeEncodeError:
        raise Unfit(f"{place}not JSON: half of a pair of \\u escapes") from None
    except json.JSONDecodeError as problem:
        ends = "; the item ends there" if problem.pos >= len(problem.doc.rstrip()) else ""
        what = problem.msg.removesuffix(" at").removesuffix(" starting")
        raise Unfit(f"{place}not JSON: {_lower(what)} at character {problem.pos + 1}{ends}") from None
    except ValueError as problem:
        raise Unfit(f"{place}not JSON: {problem}") from None
    return text.strip().replace(b"\n", b" ").replace(b"\r", b" ")  # in JSON, only between its parts


def _mb(size: int) -> int:
    return round(size / (1 << 20))


def _no_number(word: str) -> float:
    raise ValueError(f"it has no number {word}")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


# ---- how it is put ----


class Sender:
    """One submission under way."""

    def __init__(self, connection: Connection, out: Out, values: dict[str, Any], total: int, as_json: bool) -> None:
        self.connection = connection
        self._out = out
        self._values = values
        self._total = total
        self._as_json = as_json
        self._options = {
            name: values[name] for name in ("queue", "priority", "delay", "at", "expire") if values[name] not in (None, "")
        }
        if values["keep"] or values["result"]:
            self._options["keep"] = True
        self._until = None if values["timeout"] is None else time.monotonic() + values["timeout"]
        self._became: dict[str, int] = {}
        self._ids: list[str] = []
        self._count = 0
        self._sent = 0
        """Items of the request under way."""
        self._shown = False

    def run(self, lines: Iterable[Line | None]) -> int:
        """Put all of them; then wait for their ends, if that was asked for."""
        try:
            for chunk in _chunks(lines):
                if error := self._put(chunk):
                    return error
            self._clear()
            return self._wait() if self._values["result"] else self._say()
        except Unfit as problem:
            return self._stopped(str(problem), REFUSED)
        except Unreachable as problem:
            self._stopped(f"{problem}; whether more is, is not known", REFUSED)
            raise
        except KeyboardInterrupt:
            return self._stopped("interrupted", INTERRUPTED, self._sent)

    def _put(self, chunk: list[Line]) -> int:
        options = self._options | self._left() | self._named(len(chunk))
        params = json.dumps(options, ensure_ascii=False).encode("utf-8", "surrogateescape")
        params = b'%b,"items":[%b]}' % (params[:-1], b",".join([line.text for line in chunk]))
        self._sent = len(chunk)
        reply = self._ask("submit", params)
        self._sent = 0
        if error := reply.get("error"):
            return self._refused(error, chunk)
        for row in reply["result"]:
            self._became[row["what"]] = self._became.get(row["what"], 0) + 1
            if self._values["result"] and row["what"] != "rejected":
                self._ids.append(row["id"])
            if self._as_json and not self._values["result"]:
                self._out.json({"id": row["id"], "what": row["what"]})
        self._last = reply["result"][-1]
        self._count += len(chunk)
        self._progress("stored")
        return 0

    def _named(self, count: int) -> dict[str, Any]:
        """The ids of the next so many items; one id for many is what theirs begin with."""
        ids = self._values["id"]
        if not ids:
            return {}
        if len(ids) == 1 and (self._total != 1 or count != 1):
            return {"id": [f"{ids[0]}-{self._count + at + 1}" for at in range(count)]}
        return {"id": list(ids[self._count : self._count + count])}

    def _left(self) -> dict[str, float]:
        return {} if self._until is None else {"timeout": max(0.0, self._until - time.monotonic())}

    def _ask(self, method: str, params: bytes) -> Any:
        self.connection.send_encoded(method, params)
        left = self._left()
        try:
            line = self.connection.read_line(left["timeout"] + _GRACE if left else None)
        except TimeoutError:
            return {"error": {"code": 75, "message": f"{method}: the daemon does not answer"}}
        if not line:
            raise Unreachable(f"the daemon at {self.connection.path} has hung up: it has ended, or is ending")
        return json.loads(line)

    def _refused(self, error: dict[str, Any], chunk: list[Line]) -> int:
        data = error.get("data")
        data = data if isinstance(data, dict) else {}
        self._count += data.get("stored", 0)
        message, place = error["message"], ""
        if (bad := data.get("bad")) is not None and bad < len(chunk):
            message, place = message.removeprefix(f"item {bad + 1} of {len(chunk)}: "), chunk[bad].place
        message = message.removesuffix(f"; {data.get('stored')} of {len(chunk)} are stored")  # we count those before them, too
        return self._stopped(place + message, exit_code(error))

    def _stopped(self, why: str, code: int, open: int = 0) -> int:
        """Say why it ends early, and how many are stored; of those that are `open`, nobody knows."""
        self._clear()
        stored = f"{self._count} {'item is' if self._count == 1 else 'items are'} stored" if self._count else ""
        if open:
            some = f"some of the {'next' if stored else 'first'} {open}" if open > 1 else "the next" if stored else "the item"
            stored = f"{stored}, and perhaps {some}" if stored else f"perhaps {some} {'are' if open > 1 else 'is'} stored"
        complain(f"{render.clean(why)}; {stored or 'nothing is stored'}")
        return code

    def _say(self) -> int:
        rejected = self._became.get("rejected", 0)
        if not self._as_json:
            if self._count == 1:
                self._out.line(f"{self._last['id']}: {_SAYS[self._last['what']]}")
            else:
                counts = [f"{self._became[what]} {what}" for what in _SAYS if what in self._became]
                self._out.line(f"{self._values['queue']}: {', '.join(counts) or 'nothing to put'}")
        return REFUSED if rejected else 0

    def _wait(self) -> int:
        """Show what came of each, in the order in which they were put."""
        code = 0
        for at in range(0, len(self._ids), _TOGETHER):
            ids = list(dict.fromkeys(self._ids[at : at + _TOGETHER]))
            params = {"ids": ids, "queue": self._values["queue"], **self._left()}
            reply = self._ask("queue.wait", json.dumps(params).encode())
            if error := reply.get("error"):
                complain(error["message"])
                return exit_code(error)
            code = max(code, *(self._show(item) for item in reply["result"]))
        if rejected := self._became.get("rejected"):
            one = f"{self._last['id']}: {_SAYS['rejected']}"
            complain(one if self._count == 1 else f"{self._values['queue']}: {rejected} rejected")
            return REFUSED
        return code

    def _show(self, item: dict[str, Any]) -> int:
        done = item["state"] == "done"
        if self._as_json:
            self._out.json(item)
        elif self._count > 1:
            self._out.line(render.ended(item, self._out.colour))
        elif not done:
            complain(f"{item['id']}: {item['state']}" + (f": {render.clean(item['error'])}" if item["error"] else ""))
        elif item["result"] is not None:
            self._out.json(item["result"])
        self._out.flush()
        return 0 if done else REFUSED

    # ---- the bar ----

    def _progress(self, what: str) -> None:
        """How far it is, on a terminal, where it takes more than one request."""
        if not sys.stderr.isatty() or (self._total <= self._count and not self._shown and self._total):
            return
        self._shown = True
        if self._total:
            done = min(1.0, self._count / self._total)
            bar = "█" * int(_BAR * done)
            text = f"{bar:░<{_BAR}} {self._count} of {self._total} {what}"
        else:
            text = f"{self._count} {what}"
        print(f"\r\x1b[K{self._values['queue']}: {text}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


_SAYS = {
    "stored": "stored",
    "replaced": "stored, in the place of one that waited",
    "known": "known already: not stored again",
    "merged": "one with this, which waits or runs: not stored again",
    "rejected": "not stored: this one has its key",
}


def _chunks(lines: Iterable[Line | None]) -> Iterator[list[Line]]:
    """As many as one request carries; None in between sends what there is."""
    chunk: list[Line] = []
    size = 0
    for line in lines:
        if line is None or len(chunk) == MOST or (chunk and size + len(line.text) > CHUNK):
            if chunk:
                yield chunk
            chunk, size = [], 0
        if line is not None:
            chunk.append(line)
            size += len(line.text)
    if chunk:
        yield chunk
