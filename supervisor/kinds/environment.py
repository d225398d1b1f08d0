"""The environment of a child: what it inherits, files of NAME=value lines, and which of them wins.

Everything here may block, on a file or on the user database.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from supervisor.accounts import user_of
from supervisor.errors import SpawnFailed
from supervisor.kinds.job import JobSpec
from supervisor.spec import shown

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The PATH of a child that inherits none."""

TERM = "xterm"
"""The kind of terminal that a child with `tty` is told of, where nothing else is said."""

_ENTRY = re.compile(
    r"""[ \t]*(?:export[ \t]+)?
        (?P<name>[A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*
        (?:'(?P<literal>[^']*)' | "(?P<quoted>(?:\\.|[^"\\])*)" | (?P<plain>(?!['"])[^\n]*?))
        [ \t]*(?:(?<=[ \t])\#[^\n]*)?(?:\n|\Z)""",
    re.VERBOSE | re.DOTALL,
)
_NOTHING = re.compile(r"[ \t]*(?:[#;][^\n]*)?(?:\n|\Z)")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\n": "", '"': '"', "\\": "\\", "$": "$", "`": "`"}


def environment(spec: JobSpec, inherited: Mapping[str, str], env: Mapping[str, str], env_file: Iterable[str]) -> dict[str, str]:
    """The environment of a job's child, without the marks. `env` and `env_file` are those of `[daemon]`.

    Raises SpawnFailed for a file that cannot be read, or a user that is not there.
    """
    found = {"PATH": PATH} if spec.clear_env else dict(inherited)
    if spec.clear_env or spec.user is not None:
        found |= user_of(spec.user).environment
    for path in env_file:
        found |= read(path)
    found |= env
    for path in spec.env_file:
        found |= read(path)
    found |= spec.env
    if spec.tty:
        found.setdefault("TERM", TERM)
    return found


def read(path: str) -> dict[str, str]:
    """The entries of an environment file; none where it is missing and the path begins with "-".

    Raises SpawnFailed, which names the file and the line, never a value.
    """
    optional, file = path.startswith("-"), path.removeprefix("-")
    try:
        text = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    except OSError as error:
        if optional and isinstance(error, FileNotFoundError):
            return {}
        raise SpawnFailed(f'env_file "{_shown(path)}": {(error.strerror or str(error)).lower()}') from None
    return _parsed(text.replace("\r\n", "\n"), path)


def _parsed(text: str, path: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    at = 0
    while at < len(text):
        if found := _NOTHING.match(text, at):
            pass
        elif found := _ENTRY.match(text, at):
            entries[found["name"]] = _value(found)
        if found is None or "\0" in found[0]:
            line = text.count("\n", 0, at) + 1
            raise SpawnFailed(f'env_file "{_shown(path)}", line {line}: {_why(text[at:].partition(chr(10))[0])}')
        at = found.end()
    return entries


def _value(found: re.Match[str]) -> str:
    if found["quoted"] is not None:
        return _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[0]), found["quoted"])
    return found["literal"] if found["literal"] is not None else found["plain"]


def _why(line: str) -> str:
    """What is wrong with a line, without quoting it: it may hold a secret."""
    if "\0" in line:
        return "a NUL character"
    _, equals, value = line.partition("=")
    if not equals:
        return "expected NAME=value"
    if value.strip()[:1] in ("'", '"'):
        return "quotes that are not closed, or something after them"
    return "expected NAME=value, and a name of letters, digits and _"


def _shown(path: str) -> str:
    return os.fspath(shown(path)).removeprefix("-")
