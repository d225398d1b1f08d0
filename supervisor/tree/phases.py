"""How a tree ends: draining, stopping, killing, one phase after another, and in a hurry if it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from supervisor import events
from supervisor.kinds import Run
from supervisor.nodes import JobNode
from supervisor.state import Phase, Why

if TYPE_CHECKING:
    from supervisor.tree.supervisor import Supervisor

KILL_LIMIT = 5.0
"""Seconds that killing may take in an orderly stop; what is still there then is named and left behind."""

LAST_RESORT = 2.0
"""Seconds after which the tree is taken to be unable to end at all: a task that ignores its cancellation."""


class Phases:
    """The end of one tree: prepared for from its beginning on, begun once."""

    def __init__(self, tree: Supervisor, root_run: Run) -> None:
        self.stuck = False
        """Whether anything has ever been stuck: most stops need not look."""
        self._tree = tree
        self._root_run = root_run
        self._begun = trio.Event()
        self._hurry = trio.CancelScope()
        self._only_stuck = trio.Event()

    def begin(self) -> None:
        """Have the first phase begin."""
        self._begun.set()

    def hurry(self, reason: str) -> None:
        """Go straight to the last one."""
        self._hurry.cancel(reason=reason)

    async def run(self, last_resort: Callable[[], None] | None) -> None:
        """Wait for the beginning, then go through them. `last_resort` is called where the tree does not end even so."""
        await self._begun.wait()
        queues, grace = self._tree.queues, self._tree.config.daemon.grace
        queues.end_by(trio.current_time() + grace)
        with self._hurry:
            with trio.move_on_after(grace):
                self._enter(Phase.DRAINING)
                await self._drain()
                self._enter(Phase.STOPPING)
                self._root_run.advance(Phase.STOPPING)
                self.look_whether_only_stuck()
                await self._only_stuck.wait()
        queues.end_by(trio.current_time() + KILL_LIMIT)
        await self._kill()
        await trio.sleep(LAST_RESORT)
        if last_resort is not None:
            last_resort()

    def _enter(self, phase: Phase) -> None:
        self._tree.phase.value = phase
        self._tree.journal.emit(events.PhaseChanged, phase=phase, cause=self._tree.ending)

    async def _drain(self) -> None:
        """Let the runs in hand end, each within its grace."""
        for supervisor in self._tree.supervisors():
            if supervisor.running:
                supervisor.post(supervisor.drain)
        async with trio.open_nursery() as nursery:
            for node in self._living():
                if node.in_hand and node.life is not None:
                    nursery.start_soon(_wait_at_most, node.grace, node.life.gone)

    def look_whether_only_stuck(self) -> None:
        """Cut the wait short once nothing is left that could still end: a stop does not wait for what will not come."""
        if not self.stuck or self._tree.phase.value is not Phase.STOPPING:
            return
        if all(node.row.word == Why.STUCK.value for node in self._living()):
            self._only_stuck.set()

    async def _kill(self) -> None:
        """No more grace for anybody; name who needed it, and at last who survived even that."""
        for node in self._living():
            self._tree.was_late(node.name)
        self._enter(Phase.KILLING)
        self._root_run.advance(Phase.KILLING)
        for supervisor in self._tree.supervisors():
            supervisor.hurry()
        for node in self._living():
            if node.parent is not None:
                node.parent.post(node.parent.kill, node, self._tree.ending)
        await trio.sleep(KILL_LIMIT)
        self._tree.survivors = tuple(f"{node.name} ({node.row.cause})" for node in self._living())
        self._tree.abandoned.set()
        for node in self._living():
            if node.life is not None:
                node.life.scope.cancel(reason="given up")

    def _living(self) -> list[JobNode]:
        return [node for node in self._tree.nodes.values() if isinstance(node, JobNode) and node.life is not None]


async def _wait_at_most(seconds: float, event: trio.Event) -> None:
    with trio.move_on_after(seconds):
        await event.wait()
