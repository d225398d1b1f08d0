"""Plain command lines, read straight from the table of verbs.

Click takes longer to import than everything else that `supervisor status` does. So what is certainly well formed is read
here, and anything else (help, a mistake, completion, an unusual spelling) is left to click, which is built from the same
table. A test compares the two.
"""

from __future__ import annotations

import os

from supervisor.control.verbs import QUEUE, VERBS, Param, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """`5`, `0.5`, `250ms`, `10s`, `1h30m` as seconds. Raises ValueError."""
    try:
        total = float(text)
    except ValueError:
        total = _sum_of_parts(text)
    if not 0 <= total < float("inf"):
        raise ValueError(text)
    return total


def _sum_of_parts(text: str) -> float:
    total, number, unit = 0.0, "", ""
    for char in text + "0":
        if unit and not char.isalpha():
            if unit not in _UNITS:
                raise ValueError(text)
            total, number, unit = total + float(number) * _UNITS[unit], "", ""
        if char.isalpha():
            unit += char
        else:
            number += char
    if number != "0" or not text:
        raise ValueError(text)
    return total


def whole(text: str) -> int:
    """A number of things. Raises ValueError."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(text)
    return int(text)


def reader(param: Param) -> Any:
    """How the text of an option's value is read."""
    return str if param.type is str else whole if param.type in (int, int | None) else seconds


def file_to_run(argv: list[str]) -> str | None:
    """The file of a plain `run`, `run -c FILE` or `run --config FILE`; None for anything else."""
    match argv:
        case ["run"]:
            from supervisor.daemon import DEFAULT_FILE

            return DEFAULT_FILE
        case ["run", "-c" | "--config", file] if not file.startswith("-"):
            return file
        case _:
            return None


def parse(argv: list[str]) -> tuple[Verb, dict[str, Any], str | None, bool] | None:
    """The verb, its values, `--socket` and `--json`; None where click is needed."""
    if "_SUPERVISOR_COMPLETE" in os.environ:
        return None
    words = list(argv)
    socket = None
    while words and words[0] == "--socket" and len(words) > 1:
        socket, words = words[1], words[2:]
    if words[:1] == ["queue"] and len(words) > 1:
        words[:2] = [QUEUE + words[1]]
    elif words and words[0].startswith(QUEUE):
        return None
    if not words or words[0] not in VERBS:
        return None
    verb = VERBS[words[0]]
    if not verb.command or any(param.rest for param in verb.params):
        return None
    found = _read(words[1:], _options(verb))
    if found is None:
        return None
    values, rest = found
    socket, as_json = values.pop("socket", socket), values.pop("json", False)
    placed = _place(rest, [param for param in verb.params if param.positional])
    if placed is None:
        return None
    return verb, {param.name: param.default for param in verb.params} | values | placed, socket, as_json


def _options(verb: Verb) -> dict[str, tuple[str, Any]]:
    """Spelling -> the value's name, and what it is or how it is read."""
    options: dict[str, tuple[str, Any]] = {"--socket": ("socket", str), "--json": ("json", True)}
    for param in verb.params:
        if param.positional or param.many:
            continue
        options[param.option] = (param.name, True if param.flag else reader(param))
        if param.short:
            options[param.short] = options[param.option]
        if param.flag and param.default is True:
            options["--no-" + param.option[2:]] = (param.name, False)
    return options


def _read(words: list[str], options: dict[str, tuple[str, Any]]) -> tuple[dict[str, Any], list[str]] | None:
    values: dict[str, Any] = {}
    rest = []
    words.reverse()
    while words:
        word = words.pop()
        if not word.startswith("-"):
            rest.append(word)
            continue
        if word not in options:
            return None
        name, read = options[word]
        if isinstance(read, bool):
            values[name] = read
            continue
        try:
            values[name] = read(words.pop())
        except (IndexError, ValueError):
            return None
    return values, rest


def _place(rest: list[str], params: list[Param]) -> dict[str, Any] | None:
    """The positional values by name, None where they do not fit."""
    placed: dict[str, Any] = {}
    for param in params:
        if param.many:
            placed[param.name], rest = tuple(rest), []
        elif rest:
            try:
                placed[param.name], rest = reader(param)(rest[0]), rest[1:]
            except ValueError:
                return None
        if param.required and placed.get(param.name) in (None, "", ()):
            return None
    return None if rest else placed
