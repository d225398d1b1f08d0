"""The TOML files of one configuration, merged, and the place of every key in them."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.config import toml_places
from supervisor.config.reading import BAD, Finding, Reading, dotted
from supervisor.config.toml_places import Places
from supervisor.errors import Problem
from supervisor.spec import shown

_SYNTAX_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


@dataclass(eq=False, repr=False)
class Source:
    """One file: its name as people see it, the directory its relative paths start from, and where its keys stand."""

    shown: str
    base: Path
    places: Places | None = None

    def problem(self, path: toml_places.Path, message: str, *, warning: bool = False) -> Problem:
        """A problem of the key at `path` in this file."""
        line, column = self.places.find(path) if self.places else (0, 0)
        return Problem(self.shown, line, column, dotted(path), message, warning)


class Document:
    """The tables of all files together. Every key of a top-level table knows the file it came from."""

    def __init__(self, main: Source) -> None:
        self.main = main
        self.sources = [main]
        self.tables: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.complete = True
        """False when a file could not be read: names may be missing that are only missing here."""
        self._origins: dict[tuple[str, Any], Source] = {}

    def add(self, source: Source, tables: Mapping[str, Any]) -> None:
        """Merge a file. What is defined already stays, and is a problem."""
        for name, content in tables.items():
            if isinstance(content, Mapping) and isinstance(merged := self.tables.setdefault(name, {}), dict):
                for key, value in content.items():
                    if self._new(source, name, key):
                        merged[key] = value
            elif self._new(source, name, None):
                self.tables.setdefault(name, content)

    def _new(self, source: Source, table: str, key: Any) -> bool:
        first = self._origins.setdefault((table, key), source)
        if first is source:
            return True
        path = (table,) if key is None else (table, key)
        self.problems.append(source.problem(path, f"defined twice; first at {_at(first.problem(path, ''))}"))
        return False

    def origin(self, table: str, key: str) -> Source:
        """The file that a key of a top-level table came from."""
        return self._origins.get((table, key), self.main)

    def problem(self, finding: Finding) -> Problem:
        """A finding with its place. What a job has from `[defaults]` is shown there."""
        path = finding.path
        if path[0] == "jobs" and len(path) > 2 and self._inherited(path):
            path, message = ("defaults", *path[2:]), f"{finding.message} (jobs.{path[1]})"
            return self.origin("defaults", str(path[1])).problem(path, message, warning=finding.warning)
        source = self.origin(str(path[0]), str(path[1])) if len(path) > 1 else self.main
        return source.problem(path, finding.message, warning=finding.warning)

    def _inherited(self, path: toml_places.Path) -> bool:
        own, defaults = self.tables["jobs"].get(path[1]), self.tables.get("defaults")
        return isinstance(own, Mapping) and path[2] not in own and isinstance(defaults, Mapping) and path[2] in defaults

    def where(self, *path: str) -> str:
        """The place of a key, for a message: ` (supervisor.toml:3:7)`, or nothing where there is none."""
        problem = self.problem(Finding(path, ""))
        return f" ({_at(problem)})" if problem.line else ""

    def in_order(self, problems: Iterable[Problem]) -> list[Problem]:
        """`problems` in the order of the files, each once."""
        files = {source.shown: number for number, source in reversed(list(enumerate(self.sources)))}
        return sorted(dict.fromkeys(problems), key=lambda problem: (files.get(problem.file, 0), problem.line, problem.column))


def _at(problem: Problem) -> str:
    return f"{problem.file}:{problem.line}:{problem.column}"


def open_document(path: Path, reading: Reading) -> Document:
    """Read the main file and those it includes. Problems of files are in the document's `problems`."""
    document = Document(Source(os.fspath(path), path.absolute().parent))
    tables = _read_into(document, path)
    if tables is None:
        return document
    for pattern in _patterns(tables, reading):
        _include(document, pattern, path)
    return document


def _read_into(document: Document, path: Path) -> dict[str, Any] | None:
    name, base = os.fspath(path), path.absolute().parent
    text = _text(path, name, document.problems)
    tables = None if text is None else _parsed(text, name, document.problems)
    source = Source(name, base, None if text is None else Places(text))
    if name == document.main.shown:
        document.main = document.sources[0] = source
    else:
        document.sources.append(source)
        if tables and "include" in (tables.get("daemon") or ()):
            document.problems.append(source.problem(("daemon", "include"), "an included file cannot include others"))
            del tables["daemon"]["include"]
    if tables is None:
        document.complete = False
    else:
        document.add(source, tables)
    return tables


def _patterns(tables: dict[str, Any], reading: Reading) -> Iterable[str]:
    """The globs of `[daemon] include`; a fault in them is found again, and told, when `[daemon]` is read."""
    daemon = tables.get("daemon")
    listed = daemon.get("include") if isinstance(daemon, dict) else None
    quiet = Reading(reading.environ)
    globs = quiet.unwrap(listed, ("daemon", "include"))
    if not isinstance(globs, list):
        return ()
    expanded = (quiet.expand(glob, ("daemon", "include")) for glob in globs if isinstance(glob, str))
    return [glob for glob in expanded if glob is not BAD and "\0" not in glob]


def _include(document: Document, pattern: str, main: Path) -> None:
    import glob

    root = "" if main.parent == Path() else glob.escape(f"{main.parent}/")
    wanted = pattern if pattern.startswith("/") else root + pattern
    matches = sorted(glob.glob(wanted, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not matches and not glob.has_magic(pattern):
        document.problems.append(document.main.problem(("daemon", "include"), f'no such file: "{shown(pattern)}"'))
        document.complete = False
    for match in matches:
        if os.path.realpath(match) not in {os.path.realpath(source.shown) for source in document.sources}:
            _read_into(document, Path(match))


def _text(path: Path, name: str, problems: list[Problem]) -> str | None:
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.append(Problem(name, 0, 0, "", _unreadable(error)))
        return None
    except ValueError:
        problems.append(Problem(name, 0, 0, "", "not the name of a file"))
        return None
    if raw.startswith(b"\xef\xbb\xbf"):
        problems.append(Problem(name, 1, 1, "", "a byte order mark: save the file as UTF-8 without one"))
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        problems.append(Problem(name, line, column, "", f"not UTF-8: byte 0x{raw[error.start]:02x}"))
        return None


def _unreadable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return 'no such file; "supervisor init" writes one to start with'
    if isinstance(error, IsADirectoryError):
        return "a directory: expected a TOML file"
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied"
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def _parsed(text: str, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problems.append(_syntax_problem(str(error), Places(text), name))
    except RecursionError:
        problems.append(Problem(name, 0, 0, "", "nested too deeply"))
    except ValueError:
        problems.append(Problem(name, 0, 0, "", "a number with too many digits"))
    return None


def _syntax_problem(message: str, places: Places, name: str) -> Problem:
    found = _SYNTAX_PLACE.search(message)
    line, column = (int(found[1]), int(found[2])) if found and found[1] else places.end()
    message = message[: found.start()] if found else message
    if message.startswith(("Cannot", "Duplicate")) and (twice := places.twice()):
        path, (line, column), (first_line, first_column) = twice
        return Problem(name, line, column, dotted(path), f"defined twice; first at {name}:{first_line}:{first_column}")
    return Problem(name, line, column, "", f"not TOML: {message[:1].lower()}{message[1:]}")
