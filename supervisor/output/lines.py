"""Output as text: lines out of chunks, and what a line says that is JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

LINE = 64 << 10
"""A line is looked at in pieces no longer than this, unless the job says otherwise."""


class Lines:
    """Chunks in, lines out, without their line end; a line longer than `limit` comes in pieces."""

    __slots__ = ("_limit", "_part")

    def __init__(self, limit: int = LINE) -> None:
        self._limit = limit
        self._part = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that `data` completes."""
        *whole, rest = data.split(b"\n")
        for line in whole:
            yield from self._pieces(line)
            yield self._take()
        yield from self._pieces(rest)

    def flush(self) -> Iterator[bytes]:
        """What is left, if anything: the output is over."""
        if self._part:
            yield self._take()

    def _pieces(self, line: bytes) -> Iterator[bytes]:
        self._part += line
        while len(self._part) > self._limit:
            piece = bytes(self._part[: self._limit])
            del self._part[: self._limit]
            yield piece

    def _take(self) -> bytes:
        line = bytes(self._part).removesuffix(b"\r")
        self._part.clear()
        return line


class Record(NamedTuple):
    """What a line of JSON says, as the daemon's log puts it."""

    level: str
    event: str
    fields: dict[str, Any]


_LEVELS = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "notice": "info",
    "warn": "warning",
    "warning": "warning",
    "err": "error",
    "error": "error",
    "critical": "critical",
    "crit": "critical",
    "alert": "critical",
    "emerg": "critical",
    "emergency": "critical",
    "fatal": "critical",
    "panic": "critical",
}


def record(line: bytes) -> Record | None:
    """What a line says that is a JSON object; None for any other. Never raises, whatever the bytes.

    The level is its `level` or `severity`, by name (info unless it is a known one); the text its `event`, `message` or
    `msg`, where that is a string. Those two are taken out; all else stays.
    """
    if line.lstrip()[:1] != b"{":
        return None
    fields = _decoded(line)
    if not isinstance(fields, dict):
        return None
    level = _level(fields)
    return Record(level, _text(fields), fields)


def _decoded(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except Exception:  # too deep, a number too large, a lone surrogate: some of it another decoder can read
        try:
            return json.loads(line)
        except Exception:
            return None


def _level(fields: dict[str, Any]) -> str:
    for key in ("level", "severity"):
        if isinstance(fields.get(key), str) and (level := _LEVELS.get(fields[key].lower())):
            del fields[key]
            return level
    return "info"


def _text(fields: dict[str, Any]) -> str:
    for key in ("event", "message", "msg"):
        if isinstance(fields.get(key), str):
            return str(fields.pop(key))
    return ""
