"""Stopping: one ladder for every kind of run. Ask, wait for the grace, kill; then say what cannot be killed.

A rung is climbed in the supervisor's loop when its time comes, which is a timer, so nobody waits on a ladder.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from supervisor import events
from supervisor.kinds.context import does_not_end
from supervisor.nodes.node import Ask, Life, Node
from supervisor.state import Phase, Why

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode

STUCK_AFTER = 5.0
"""Seconds after a kill at which what is still there is called stuck."""


def begin(supervisor: SupervisorNode, child: Node, life: Life, ask: Ask, grace: float) -> None:
    """The first rung: ask a run to end. It hears it at once, and has so many seconds."""
    life.asked = ask
    life.asked_at = trio.current_time()
    if life.probed is not None:
        life.probed.cancel("asked to stop")
    child.emit(events.Stopping, run=life.run.id, cause=ask.cause, why=ask.why)
    life.run.advance(Phase.STOPPING)
    _await_rung(supervisor, child, life, life.asked_at + grace)


def _await_rung(supervisor: SupervisorNode, child: Node, life: Life, when: float) -> None:
    """Have the next rung climbed at `when`."""
    life.rung_due = when
    if when <= trio.current_time():
        supervisor.touch(child)
    elif when < math.inf:
        supervisor.remind(child, when)


def climb(supervisor: SupervisorNode, child: Node, life: Life, now: float) -> None:
    """Climb the next rung, if its time has come."""
    if now < life.rung_due or life.over:
        return
    life.rung_due = math.inf
    if life.killed_after is None:
        _kill(supervisor, child, life, now)
    elif child.row.word != Why.STUCK.value:
        life.run.stuck(
            does_not_end(life.run) if child.takes == "thread" else f"still there {STUCK_AFTER:g} s after it was killed"
        )


def _kill(supervisor: SupervisorNode, child: Node, life: Life, now: float) -> None:
    assert life.asked is not None
    life.run.advance(Phase.KILLING)
    life.killed_after = now - life.asked_at
    supervisor.tree.was_late(child.name)
    if not child.killable:
        life.run.stuck(does_not_end(life.run))
        return
    child.emit(events.Killing, run=life.run.id, cause=f"did not end in its grace: {life.asked.cause}")
    life.scope.cancel(reason=life.asked.cause)
    _await_rung(supervisor, child, life, now + STUCK_AFTER)


def extend(supervisor: SupervisorNode, child: Node, life: Life, seconds: float) -> None:
    """Give a run at least so many seconds from now for what it has in hand: its start, or its end. A kill stays one."""
    now = trio.current_time()
    if life.asked is None:
        if life.starting is not None:
            life.starting.deadline = max(life.starting.deadline, now + seconds)
    elif life.killed_after is None and now < life.rung_due < now + seconds:
        _await_rung(supervisor, child, life, now + seconds)
