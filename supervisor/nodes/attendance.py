"""What looks after a run from beside it: who waits for it to get ready, and whatever else its job asks for.

An attendant is an async function that lives while the run does, and reports to the supervisor's inbox. A job that asks for
none has none: no task, no memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import trio

from supervisor.errors import RunFailed
from supervisor.nodes.job import JobNode
from supervisor.nodes.node import Life
from supervisor.probes import FreshFile

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode

Attendant = Callable[[], Awaitable[None]]


def begin(supervisor: SupervisorNode, nursery: trio.Nursery, child: JobNode, life: Life) -> None:
    """Start the attendants of a run that is about to start. `life.attended` ends them."""
    attendants = list(_attendants(supervisor, child, life))
    if attendants:
        life.attended = trio.CancelScope()
        nursery.start_soon(_attend, life.attended, attendants, name=f"attendants of {life.run.id}")


async def _attend(scope: trio.CancelScope, attendants: list[Attendant]) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            for attendant in attendants:
                nursery.start_soon(attendant)


def _attendants(supervisor: SupervisorNode, child: JobNode, life: Life) -> Iterator[Attendant]:
    """What the job asks for. What must be seen before the run starts is seen here."""
    if (ready := child.spec.ready) is not None:
        yield partial(_await_ready, supervisor, child, life, FreshFile(ready.file) if ready.file else None)


async def _await_ready(supervisor: SupervisorNode, child: JobNode, life: Life, fresh: FreshFile | None) -> None:
    """Wait for a run to get ready, at most `start_timeout`. What is no file, the run itself reports."""
    if life.ready_at is not None:
        return
    reason = f"not ready within {child.spec.start_timeout:g} s (start_timeout)"
    with trio.move_on_after(child.spec.start_timeout) as life.starting:
        try:
            if fresh is None:
                await trio.sleep_forever()
            else:
                await fresh.wait()
                life.run.ready("its file is there")
                return
        except RunFailed as error:
            reason = str(error)
    if life.ready_at is None:
        supervisor.post(supervisor.on_not_ready, child, life, reason)
