"""Queues: where work waits for workers. `protocol.py` says what a queue is, and each engine is a file of its own.

What is named here is imported when it is first asked for: `QUEUES` knows the engines without loading one.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import parse_qsl, urlsplit

from supervisor.errors import did_you_mean
from supervisor.spec import shown

if TYPE_CHECKING:
    from supervisor.queues.protocol import Engine, Listener, Settings

    Opener = Callable[[str, Settings, "Place"], AbstractAsyncContextManager[Engine]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an engine is opened: what it needs to know besides the queue."""

    directory: Path
    """For files: the state directory."""
    now: Callable[[], float]
    """The wall clock, Unix time, for engines without a server; `supervisor.wall`'s in a daemon."""
    listen: Listener
    warn: Callable[[str], None]
    """Told, in the Trio thread, in one line of what an operator must know: a damaged file that was put aside."""


class Scheme(NamedTuple):
    """An engine: its module, with `open(name, settings, place)`, and the extra that it needs, with the library in that."""

    module: str
    extra: str | None = None
    library: str = ""

    @property
    def durable(self) -> bool:
        """Whether what is in it outlives the daemon."""
        return self.module != "supervisor.queues.memory"

    @property
    def shared(self) -> bool:
        """Whether other processes may have the same queue."""
        return self.extra is not None

    @property
    def missing(self) -> str:
        """What must be installed before it can be used, as pip knows it; empty where nothing is missing."""
        lacks = self.extra is not None and importlib.util.find_spec(self.library) is None
        return f"trio-supervisor[{self.extra}]" if lacks else ""

    @property
    def open(self) -> Opener:
        """The function that opens a queue. Raises ImportError where the extra is not installed."""
        return cast("Opener", importlib.import_module(self.module).open)

    def refusal(self, backend: str) -> str:
        """Why a server cannot be looked for where this URL says; empty where it can. Raises ImportError as `open` does."""
        return cast(str, importlib.import_module(self.module).refusal(backend)) if self.shared else ""


QUEUES = {
    "memory": Scheme("supervisor.queues.memory"),
    "sqlite": Scheme("supervisor.queues.sqlite"),
    "postgresql": Scheme("supervisor.queues.postgres", "postgresql", "psycopg"),
    "postgres": Scheme("supervisor.queues.postgres", "postgresql", "psycopg"),
    "redis": Scheme("supervisor.queues.redis", "redis", "coredis"),
    "rediss": Scheme("supervisor.queues.redis", "redis", "coredis"),
    "redis+unix": Scheme("supervisor.queues.redis", "redis", "coredis"),
}
"""By the word, or the scheme of the URL, that `backend` says."""


def scheme_of(backend: str) -> Scheme:
    """The engine that a `backend` names. Raises LookupError for one that there is not."""
    return QUEUES[backend.partition(":")[0]]


def unknown_parameter(url: str, known: Collection[str]) -> str:
    """The first word after the "?" of a URL that is none of these, and which was meant; empty where all are known."""
    for word, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True):
        if word not in known:
            return f'there is no parameter "{word}"{did_you_mean(word, known)}'
    return ""


_PASSWORDS = re.compile(r"(?<=://)([^:/?#]*):.*@|([?&](?:[a-z]*password|passwd|passphrase)=)[^&#]*", re.IGNORECASE | re.DOTALL)


def shown_backend(backend: str) -> str:
    """A `backend` as people may see it: the text of the file, a password that stands in that hidden."""
    return _PASSWORDS.sub(lambda found: f"{found[2]}***" if found[2] else f"{found[1]}:***@", shown(backend))
