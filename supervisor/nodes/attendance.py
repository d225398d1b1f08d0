"""What looks after a run from beside it: who waits for it to get ready, and whatever else its job asks for.

An attendant is an async function that lives while the run does, and reports to the supervisor's inbox. A job that asks for
none has none: no task, no memory.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from supervisor import events
from supervisor.errors import RunFailed
from supervisor.kinds import JobSpec
from supervisor.nodes import health
from supervisor.nodes.asking import asked
from supervisor.nodes.hearing import Hearing
from supervisor.nodes.job import JobNode
from supervisor.nodes.node import Life
from supervisor.probes import FreshFile
from supervisor.probes.judgement import Verdict
from supervisor.probes.questions import put

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode

Attendant = Callable[[], Awaitable[None]]

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
"""Seconds between two questions whether a run is ready: each pause is half as long again as the last."""

ONE_TRY = 5.0
"""Seconds after which such a question is given up, and asked again."""


class Attendance:
    """Attendants at work."""

    __slots__ = ("_over", "_scope")

    def __init__(self, nursery: trio.Nursery, name: str, attendants: Sequence[Attendant]) -> None:
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        nursery.start_soon(self._run, attendants, name=name)

    async def _run(self, attendants: Sequence[Attendant]) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for attendant in attendants:
                        nursery.start_soon(attendant)
        finally:
            self._over.set()

    def cancel(self, reason: str) -> None:
        """Have them leave."""
        self._scope.cancel(reason=reason)

    async def end(self) -> None:
        """Have them leave, and wait until they and all that they started are gone."""
        self.cancel("the run is over")
        await self._over.wait()


def begin(supervisor: SupervisorNode, nursery: trio.Nursery, child: JobNode, life: Life) -> None:
    """Start the attendants of a run that is about to start. `end` ends them."""
    attendants = list(_attendants(supervisor, child, life))
    if attendants:
        life.attended = Attendance(nursery, f"attendants of {life.run.id}", attendants)
    if (ready := child.spec.ready) is not None or child.spec.health is not None:
        _probe(supervisor, nursery, child, life, FreshFile(ready.file) if ready is not None and ready.file else None)


async def end(life: Life) -> None:
    """Nothing of a run is alive when this returns: nor what looked after it."""
    for attendance in (life.probed, life.attended):
        if attendance is not None:
            await attendance.end()


def renew(supervisor: SupervisorNode, nursery: trio.Nursery, child: JobNode, life: Life, old: JobSpec) -> None:
    """Ask a run by its new spec from now on. What a child was told of its NOTIFY_SOCKET when it started stays as it was."""
    spec, ready = child.spec, life.ready_at is not None
    if life.asked is not None or (old.health == spec.health if ready else old.ready == spec.ready and life.probed is not None):
        return
    if child.row.healthy is not None:
        child.emit(events.HealthUnknown, run=life.run.id)
    if not ready and old.ready is not None and spec.ready is None:
        life.run.ready("started")
    _probe(supervisor, nursery, child, life, None)


def _probe(supervisor: SupervisorNode, nursery: trio.Nursery, child: JobNode, life: Life, fresh: FreshFile | None) -> None:
    """Have the run asked whether it is ready, if it is not yet, and then whether it is well. Takes over from who did so."""
    before, patience = life.probed, math.inf if child.spec.ready is None else child.spec.start_timeout
    if before is not None:
        before.cancel("its probes were changed")
    life.starting = trio.CancelScope(deadline=trio.current_time() + patience)
    if life.ready_at is not None:
        life.starting.cancel(reason="ready")
    asking = partial(_ask, supervisor, child, life, fresh, before)
    life.probed = Attendance(nursery, f"probes of {life.run.id}", [asking])


async def _ask(
    supervisor: SupervisorNode, child: JobNode, life: Life, fresh: FreshFile | None, before: Attendance | None
) -> None:
    if before is not None:
        with trio.CancelScope(shield=True):  # whoever waits for the end of these waits for those too
            await before.end()
    failure = await _await_ready(supervisor, child, life, fresh)
    if not life.run.is_ready:
        supervisor.post(supervisor.on_not_ready, child, life, failure)
    elif (spec := child.spec.health) is not None and _can_hear(child, life):
        await health.watch(supervisor, child, life, spec)


def _can_hear(child: JobNode, life: Life) -> bool:
    """Whether there is anything to ask: not where a child that has no socket is to send heartbeats, since a reload."""
    notify = child.spec.health is not None and child.spec.health.notify
    return not notify or child.spec.command is None or "WATCHDOG_USEC" in life.run.environ


async def _await_ready(supervisor: SupervisorNode, child: JobNode, life: Life, fresh: FreshFile | None) -> str:
    """Wait until the supervisor has heard that the run is ready, at most `start_timeout`; gives what is wrong if not.

    Who is asked is asked here; otherwise the run speaks up itself.
    """
    assert life.starting is not None
    spec, doubt = child.spec, ""
    with life.starting:
        if fresh is not None:
            try:
                await fresh.wait()
            except RunFailed as error:
                return str(error)
            life.run.ready("its file is there")
        elif spec.ready is not None and (asking := asked(spec.ready, child, life.run, supervisor.tree.resources)):
            doubt, pause = f": {asking.target}: no answer", FIRST_PAUSE
            while (answer := await put(asking.target, asking.question, ONE_TRY)).verdict is not Verdict.HEALTHY:
                doubt = f": {answer.reason}"
                await trio.sleep(pause)
                pause = min(1.5 * pause, LONGEST_PAUSE)
            life.run.ready(f"{asking.target} {asking.yes}")
        await trio.sleep_forever()
    return f"not ready within {spec.start_timeout:g} s (start_timeout){doubt}"


def _attendants(supervisor: SupervisorNode, child: JobNode, life: Life) -> Iterator[Attendant]:
    """What the job asks for. What must be seen before the run starts is seen here."""
    spec = child.spec
    if spec.command is not None and any(probe is not None and probe.notify for probe in (spec.ready, spec.health)):
        try:
            hearing = Hearing(supervisor, child, life)
        except OSError as error:
            reason = f"no NOTIFY_SOCKET to be had: {error.strerror}"
            supervisor.post(supervisor.on_not_ready, child, life, reason)
        else:
            life.run.environ = hearing.environ
            yield hearing.listen
