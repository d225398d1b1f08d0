"""What one reading of a configuration collects: its faults and warnings, each with the path of its key.

Here too: the expansion of `${NAME}`, and how a value of the file is quoted without giving away a secret.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from supervisor.config.toml_places import Path
from supervisor.spec import Expanded, shown

BAD: Final = object()
"""Read in place of a value that has a fault, which is already noted."""

EXPANSION = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-[^}]*)?\})?", re.ASCII)
ONE_EXPANSION = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*(?::-[^}]*)?\}", re.ASCII)
_BARE = re.compile(r"[A-Za-z0-9_-]+")


class Finding(NamedTuple):
    """A fault or a warning, before it has a place."""

    path: Path
    message: str
    warning: bool = False


class Reading:
    """Collects findings. Whoever finds a fault notes it and goes on, so that all of them are told at once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.findings: list[Finding] = []
        self._broken: set[Path] = set()
        self._expanded: set[Path] = set()

    def fault(self, path: Path, message: str) -> Any:
        """Note a fault; returns BAD, to be handed on in place of the value. Inside an expansion, also keys are not told."""
        path = next((path[:length] for length in range(len(path)) if path[:length] in self._expanded), path)
        self.findings.append(Finding(path, message))
        self._broken.update(path[:length] for length in range(1, len(path) + 1))
        return BAD

    def unexpected(self, path: Path, expected: str, value: Any) -> Any:
        """Note that `value` is not what was expected, quoting it unless it may be secret."""
        secret = "env" in path or any(path[:length] in self._expanded for length in range(len(path)))
        return self.fault(path, f"{expected}, got {quoted(value, secret=secret)}")

    def warn(self, path: Path, message: str) -> None:
        """Note something that can be run, but hardly is what was meant."""
        self.findings.append(Finding(path, message, warning=True))

    def broken(self, path: Path) -> bool:
        """Whether a fault was noted at `path` or below it: what else could be said of it would only be a consequence."""
        return path in self._broken

    def expand(self, text: str, path: Path) -> Any:
        """`text` with every `${NAME}` replaced, as `Expanded`; the same object where there is none."""
        if "${" not in text or isinstance(text, Expanded):
            return text
        noted = len(self.findings)
        value = EXPANSION.sub(lambda found: self._expansion(found, path), text)
        return Expanded(value, text) if len(self.findings) == noted else BAD

    def unwrap(self, value: Any, path: Path) -> Any:
        """A value of a key that is no string: `"${NAME}"` is read as TOML, or taken as it is where it is no TOML."""
        if not isinstance(value, str) or isinstance(value, Expanded) or "${" not in value:
            return value
        expanded = self.expand(value, path)
        if expanded is BAD or "\n" in expanded or not ONE_EXPANSION.fullmatch(value):
            return expanded
        try:
            read = tomllib.loads(f"value = {expanded}")["value"]
        except (ValueError, RecursionError):
            return expanded
        self._expanded.add(path)
        return _marked(read, value)

    def _expansion(self, found: re.Match[str], path: Path) -> str:
        if found[0] == "$${":
            return "${"
        name, default = found["name"], found["default"]
        if name is None:
            self.fault(path, 'expected "${NAME}" or "${NAME:-default}" after "${"; a literal one is written "$${"')
            return ""
        value = self.environ.get(name)
        if default is not None:
            return value or default[2:]
        if value is None:
            self.fault(path, f"${{{name}}} is not set in the environment; a default is written ${{{name}:-default}}")
        return value or ""


def _marked(value: Any, text: str) -> Any:
    """A value that came out of `text`: no string in it is shown as anything else."""
    if isinstance(value, str):
        return Expanded(value, text)
    if isinstance(value, list):
        return [_marked(item, text) for item in value]
    if isinstance(value, dict):
        return {key: _marked(item, text) for key, item in value.items()}
    return value


def quoted(value: Any, *, secret: bool = False) -> str:
    """`value` as it stands in the file, shortened; a secret one only by its type."""
    if isinstance(value, bool):
        return "a boolean" if secret else str(value).lower()
    if isinstance(value, str):
        return "a string" if secret else _in_quotes(shown(value))
    if isinstance(value, int):
        return "an integer" if secret else str(value) if abs(value) < 10**20 else "a huge integer"
    if isinstance(value, float):
        return "a number" if secret else str(value)
    if isinstance(value, (list, tuple)):
        return "an array"
    if isinstance(value, Mapping):
        return "a table"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _in_quotes(text: str) -> str:
    short = text if len(text) <= 60 else text[:57] + "..."
    escaped = short.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in escaped) + '"'


def dotted(path: Path) -> str:
    """A path as TOML writes it: `jobs.api.after[1]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _BARE.fullmatch(part) else _in_quotes(part))
    return text


def either(words: Iterable[str]) -> str:
    """`"a", "b" or "c"`."""
    *most, last = (f'"{word}"' for word in words)
    return f"{', '.join(most)} or {last}" if most else last
