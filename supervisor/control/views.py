"""Requests that only look: what the tree, its limits and its history are at this moment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from supervisor.control import items, messages
from supervisor.control.messages import Branch, Version
from supervisor.errors import ControlError, did_you_mean
from supervisor.state import JobStatus, LimitStatus, PastRun
from supervisor.store import StoreError

if TYPE_CHECKING:
    from supervisor.children import Usage
    from supervisor.control.call import Call
    from supervisor.events import Journal


class Table:
    """The answer to `status` of all, encoded once for as long as nothing happens."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._seq = -1
        self._encoded = msgspec.Raw()

    def encoded(self) -> msgspec.Raw:
        """All rows, as a JSON array."""
        if self._seq != self._journal.seq:
            self._encoded = msgspec.Raw(messages.encode(list(self._journal.table.values())))
            self._seq = self._journal.seq
        return self._encoded


async def status(call: Call, names: list[str], usage: bool) -> msgspec.Raw | list[JobStatus]:
    """The rows of these jobs and supervisors, or of all; with `usage` also what their processes use."""
    if not names and not usage:
        return call.server.table.encoded()
    table = call.tree.journal.table
    rows = call.tree.status(*names)
    if not usage:
        return rows
    used = await call.tree.usage()
    return [_with_usage(table[row.name], used.get(row.name)) for row in rows if row.name in table]


def _with_usage(row: JobStatus, usage: Usage | None) -> JobStatus:
    if usage is None:
        return msgspec.structs.replace(row, memory=None, cpu=None)
    return msgspec.structs.replace(row, memory=usage.memory, cpu=round(usage.cpu, 3))


async def tree(call: Call) -> list[Branch]:
    """All rows, each below its supervisor."""
    below: dict[str | None, list[JobStatus]] = {}
    for row in call.tree.journal.table.values():
        below.setdefault(row.supervisor, []).append(row)

    def branch(row: JobStatus) -> Branch:
        return Branch(status=row, children=tuple(map(branch, below.get(row.name, ()))))

    return [branch(row) for row in below.get(None, ())]


async def limits(call: Call, names: list[str]) -> list[LimitStatus]:
    """How limits stand, and who waits at them."""
    return call.tree.limit_status(*names)


async def metrics(call: Call) -> str:
    """What Prometheus reads; made beside the loop."""
    try:
        from supervisor.metrics import exposition
    except ImportError as error:
        raise ControlError(f"metrics need the extra `metrics`: pip install 'trio-supervisor[metrics]' ({error})") from None
    stand = await items.queues(call, [])
    rows = call.tree.status(), call.tree.limit_status(), call.tree.queues.tallies(), stand
    return await trio.to_thread.run_sync(exposition, *rows, limiter=trio.CapacityLimiter(1))


async def history(call: Call, name: str, lines: int) -> list[PastRun]:
    """The last runs of a job, also those under earlier daemons."""
    kept = call.server.history
    if kept is None:
        raise ControlError("this supervisor keeps no history: the program it runs in has not started any")
    try:
        found = await kept.runs(name, lines)
        if not found and name not in call.tree.nodes and name not in (known := await kept.names()):
            near = did_you_mean(name, {*known, *call.tree.nodes}, "'")
            raise ControlError(f"no job or supervisor is or was called {name!r}{near}", ControlError.NO_SUCH_NAME)
    except StoreError as problem:
        raise ControlError(str(problem)) from None
    return found


async def version(call: Call) -> Version:
    """Who answers."""
    config = call.tree.config
    return Version(
        name=config.daemon.name,
        version=call.server.version,
        protocol=messages.PROTOCOL,
        pid=os.getpid(),
        phase=call.tree.phase.value,
        file=str(config.file) if config.file else None,
    )


async def discover(call: Call) -> dict[str, Any]:
    """The description of all verbs, as OpenRPC."""
    return messages.describe(call.server.version)
