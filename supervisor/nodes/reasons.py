"""What a child should be doing, and why: the decisions that settling carries out. They look, and change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from supervisor.nodes.job import JobNode
from supervisor.nodes.node import Ask, Hold, Node
from supervisor.state import Goal, Why

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode


def to_stop(supervisor: SupervisorNode, child: Node) -> Ask | None:
    """Why its run should end now; None while it may go on, or while others must be gone before it."""
    if child.removing and _may_leave(supervisor, child):
        return Ask(child.removing)
    if child.moving_to:
        return Ask(f"moves to {child.moving_to.name or 'the root'}")
    if child.again is not None:
        return Ask(child.again)
    if child.goal is Goal.DOWN and not (child.life is not None and child.life.requested):
        return Ask(child.goal_cause)
    precedence, alive = supervisor.precedence, supervisor.alive
    if supervisor.closing is not None and precedence.may_stop(child.name, alive):
        return Ask(supervisor.closing.cause)
    group = supervisor.restarts.group_of(child)
    if group is None or not group.stopping:
        return None
    return Ask(group.cause) if precedence.may_stop(child.name, alive & group.affected) else None


def _may_leave(supervisor: SupervisorNode, child: Node) -> bool:
    """Whether none of those who are removed with it, and come after it, is alive."""
    if not supervisor.precedence.orders:
        return True
    leaving = {name for name in supervisor.alive if supervisor.children[name].removing}
    return supervisor.precedence.may_stop(child.name, leaving)


def to_hold(supervisor: SupervisorNode, child: Node, now: float) -> Hold | None:
    """Why it should not start now; None when it should."""
    hold = _held(supervisor, child, now)
    rooms = supervisor.tree.rooms
    return rooms.hold(child, hold) if rooms else hold


def _held(supervisor: SupervisorNode, child: Node, now: float) -> Hold | None:
    if supervisor.closing is not None:
        return Hold(supervisor.closing.cause, rest=True)
    if supervisor.tree.ending:
        return Hold(supervisor.tree.ending, rest=True)
    if (child.goal is Goal.DOWN or child.finished) and not child.requested:
        return Hold(child.goal_cause, rest=True)
    if child.paused and not child.requested and isinstance(child, JobNode) and not child.spec.pooled:
        return Hold("paused", Why.PAUSED)
    if (group := supervisor.restarts.group_of(child)) is not None:
        return Hold(group.cause, Why.BACKOFF, group.until)
    if child.due_at is not None and now < child.due_at:
        return Hold(child.row.exit.reason if child.row.exit else "", Why.BACKOFF, child.due_at)
    return _unmet(supervisor, child) or child.hold_of_its_own(now)


def _unmet(supervisor: SupervisorNode, child: Node) -> Hold | None:
    """What must be ready first and is not."""
    for name in child.spec.after:
        target = supervisor.tree.nodes.get(name)
        if target is not None and not target.satisfied:
            return Hold(f"waits for {name}{target.trouble}")
    for name in supervisor.precedence.earlier(child.name):
        sibling = supervisor.children.get(name)
        if sibling is not None and sibling.goal is Goal.UP and not sibling.finished and not sibling.satisfied:
            return Hold(f"waits for {name}, listed before it{sibling.trouble}")
    return None
