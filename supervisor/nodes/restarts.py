"""How a supervisor answers the failures of its children: one by one, by a group operation, or not any more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from supervisor import events, restart
from supervisor.nodes.node import Node
from supervisor.spec import Strategy

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode


class Group:
    """A group operation: these children are stopped in reverse order, then, after a wait, started again in order."""

    def __init__(self, cause: str, affected: Iterable[str], wait: float) -> None:
        self.cause = cause
        self.affected = set(affected)
        self.wait = wait
        self.until: float | None = None
        self.let_down: set[str] = set()
        """The temporary ones that it stops: they do not start again with it."""

    @property
    def stopping(self) -> bool:
        """Whether it still waits for the affected to be gone."""
        return self.until is None


class Restarts:
    """The strategy of a supervisor at work: the failures that count, and the group operation under way."""

    def __init__(self, supervisor: SupervisorNode) -> None:
        self.group: Group | None = None
        self.window: restart.Window | None = None
        """Where restarts are counted, if they are limited."""
        self._supervisor = supervisor
        self._ready_time = restart.ReadyTime()
        self._delays = restart.Delays(supervisor.tree.spread)

    def begin(self) -> None:
        """A run of the supervisor begins: what failed before counts for nothing, but for how long the next wait is."""
        self.group = None
        self._ready_time = restart.ReadyTime()
        self.forget()

    def forget(self) -> None:
        """Count anew from now on."""
        self.window = None
        self.resize()

    def resize(self) -> None:
        """Go on counting under the limits in force."""
        limit, period = self._supervisor.regime.limit, self._supervisor.regime.period
        if limit is None:
            self.window = None
        elif self.window is None:
            self.window = restart.Window(limit, period)
        else:
            self.window = self.window.resized(limit, period)

    def note(self, ready: bool, now: float) -> None:
        """Keep how long the supervisor has been ready as a whole, of which the next wait of a group depends."""
        self._ready_time.note(ready and self.group is None, now)

    def group_of(self, child: Node) -> Group | None:
        """The group operation that this child is part of."""
        return self.group if self.group is not None and child.name in self.group.affected else None

    def hasten(self, child: Node) -> None:
        """An operator wants this child up: the group that it is part of waits no longer, and starts it too."""
        if (group := self.group_of(child)) is not None:
            group.wait = 0.0
            group.let_down.discard(child.name)
            if group.until is not None:
                group.until = trio.current_time()

    def restart(self, child: Node, reason: str, ready_for: float, now: float) -> None:
        """A child has failed and is to run again: alone, or with others; or it was one failure too many."""
        child.restarting = reason
        if self.window is not None and self.window.add(now):
            self._supervisor.give_up(child, reason)
        elif self._supervisor.regime.strategy is Strategy.ONE_FOR_ONE:
            wait = child.delays.after_failure(child.spec.backoff, ready_for)
            child.due_at = None if child.hastened else now + wait
        else:
            self._restart_group(child, reason, now)

    def _restart_group(self, failed: Node, reason: str, now: float) -> None:
        supervisor = self._supervisor
        names = restart.affected(supervisor.regime.strategy, list(supervisor.children), failed.name)
        wait = self._delays.after_failure(supervisor.spec.backoff, self._ready_time.take(now))
        cause = f"{failed.name} failed: {reason}"
        supervisor.emit_own(events.GroupRestarting, cause, affected=names, wait=wait)
        group = Group(cause, names, wait)
        if self.group is not None:
            group.affected |= self.group.affected
            group.let_down |= self.group.let_down
        self.group = group
        for child in map(supervisor.children.__getitem__, names):
            if child.life is not None and child.temporary:
                group.let_down.add(child.name)
            elif child.life is not None:
                child.restarting = cause
            supervisor.touch(child)

    def settle(self, now: float) -> None:
        """Move the group operation on: all gone -> wait -> those whose goal is up may start."""
        supervisor, group = self._supervisor, self.group
        if group is None:
            return
        if group.stopping and not supervisor.alive & group.affected:
            group.until = now + group.wait
            supervisor.remind(None, group.until)
            for child in self._members(group):
                supervisor.touch(child)
        if group.until is not None and group.until <= now:
            self.group = None
            for child in self._members(group):
                if child.name in group.let_down:
                    child.finished = True
                elif not child.temporary:
                    child.revive()
                supervisor.touch(child)

    def _members(self, group: Group) -> list[Node]:
        """Those of the affected who are here still."""
        return [child for name, child in self._supervisor.children.items() if name in group.affected]
