"""Where each key of a TOML text stands.

`tomllib` gives values without places. This reads a text that `tomllib` has accepted once more, only for its keys, and only
when there is a fault to report. A path is the tuple of keys and array indices that leads to a value.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Generator, Iterator

Path = tuple[str | int, ...]

_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]++|#[^\n]*+)*+")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\"]|"{1,2}(?!"))*+"""(?:"{0,2})'
    r"|'''(?:[^']|'{1,2}(?!'))*+'''(?:'{0,2})"
    r'|"(?:\\.|[^\\"\n])*+"'
    r"|'[^'\n]*+'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


class _Lost(Exception):
    """The text is no TOML from here on."""


class _Scanner:
    """One walk over a text; yields every key as (path, offset, whether it is the last part of a header or key)."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lengths: dict[Path, int] = {}

    def walk(self) -> Iterator[tuple[Path, int, bool]]:
        table: Path = ()
        while self._blank():
            if self._text.startswith("[", self._at):
                double = self._text.startswith("[[", self._at)
                self._at += 2 if double else 1
                parts = self._key()
                self._expect("]]" if double else "]")
                table = yield from self._header(parts, double)
            else:
                yield from self._pair(table)

    def _header(self, parts: list[tuple[str, int]], double: bool) -> Generator[tuple[Path, int, bool], None, Path]:
        path: Path = ()
        for number, (part, offset) in enumerate(parts):
            path = (*path, part)
            last = number == len(parts) - 1
            if last and double:
                index = self._lengths[path] = self._lengths.get(path, -1) + 1
                yield path, offset, False
                path = (*path, index)
            elif path in self._lengths and not last:
                path = (*path, self._lengths[path])
            yield path, offset, last
        return path

    def _pair(self, table: Path) -> Iterator[tuple[Path, int, bool]]:
        parts = self._key()
        self._expect("=")
        path = table
        for number, (part, offset) in enumerate(parts):
            path = (*path, part)
            yield path, offset, number == len(parts) - 1
        yield from self._value(path)

    def _value(self, path: Path) -> Iterator[tuple[Path, int, bool]]:
        self._spaces()
        opening = self._text[self._at : self._at + 1]
        if opening == "[":
            yield from self._array(path)
        elif opening == "{":
            yield from self._inline(path)
        elif opening in ('"', "'"):
            self._take(_STRING)
        else:
            self._take(_SCALAR)

    def _array(self, path: Path) -> Iterator[tuple[Path, int, bool]]:
        self._at += 1
        index = 0
        while self._more("]"):
            yield (*path, index), self._at, True
            yield from self._value((*path, index))
            index += 1

    def _inline(self, path: Path) -> Iterator[tuple[Path, int, bool]]:
        self._at += 1
        while self._more("}"):
            yield from self._pair(path)

    def _more(self, closing: str) -> bool:
        """Whether another element follows; steps over the comma or the closing bracket."""
        self._blank()
        if self._text.startswith(",", self._at):
            self._at += 1
            self._blank()
        if self._text.startswith(closing, self._at):
            self._at += 1
            return False
        return True

    def _key(self) -> list[tuple[str, int]]:
        parts = []
        while True:
            self._spaces()
            offset = self._at
            if self._text[offset : offset + 1] in ('"', "'"):
                parts.append((tomllib.loads(f"k = {self._take(_STRING)}")["k"], offset))
            else:
                parts.append((self._take(_BARE), offset))
            self._spaces()
            if not self._text.startswith(".", self._at):
                return parts
            self._at += 1

    def _blank(self) -> bool:
        """Step over blank and comment lines; whether any text is left."""
        found = _BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at < len(self._text)

    def _spaces(self) -> None:
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise _Lost
        self._at = found.end()
        return found[0]

    def _expect(self, token: str) -> None:
        self._spaces()
        if not self._text.startswith(token, self._at):
            raise _Lost
        self._at += len(token)


def _keys(text: str) -> Iterator[tuple[Path, int, bool]]:
    try:
        yield from _Scanner(text).walk()
    except (_Lost, RecursionError, tomllib.TOMLDecodeError):
        return


class Places:
    """Line and column (both from 1) of every key of a text; the text is read at the first question."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._offsets: dict[Path, int] | None = None
        self._lines: list[int] = []

    @property
    def offsets(self) -> dict[Path, int]:
        """Path -> offset in the text. A table's own header wins over headers that only pass through it."""
        if self._offsets is None:
            self._offsets = {}
            named = set()
            for path, offset, last in _keys(self._text):
                if last and path not in named:
                    named.add(path)
                    self._offsets[path] = offset
                else:
                    self._offsets.setdefault(path, offset)
        return self._offsets

    def find(self, path: Path) -> tuple[int, int]:
        """The place of `path`, or of the nearest table above it that the text names; (1, 1) where nothing does."""
        for length in range(len(path), 0, -1):
            if (offset := self.offsets.get(path[:length])) is not None:
                return self._place(offset)
        return 1, 1

    def twice(self) -> tuple[Path, tuple[int, int], tuple[int, int]] | None:
        """The first key or table that is defined a second time: its path, the second place and the first."""
        first: dict[Path, int] = {}
        for path, offset, last in _keys(self._text):
            if last and first.setdefault(path, offset) != offset:
                return path, self._place(offset), self._place(first[path])
        return None

    def end(self) -> tuple[int, int]:
        """The place after the last character."""
        return self._place(len(self._text))

    def _place(self, offset: int) -> tuple[int, int]:
        if not self._lines:
            self._lines = [0, *(found.end() for found in re.finditer("\n", self._text))]
        line = bisect.bisect_right(self._lines, offset)
        return line, offset - self._lines[line - 1] + 1
