"""A job that no configuration names: it is run once, for whoever asked, and forgotten at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from msgspec.structs import replace

from supervisor.errors import ControlError
from supervisor.kinds import JobSpec, Outcome
from supervisor.nodes.job import JobNode
from supervisor.spec import RestartType
from supervisor.state import Goal

if TYPE_CHECKING:
    from supervisor.tree import Supervisor

_SENSELESS = ("after", "every", "cron", "essential", "significant", "give_up", "watch", "recycle", "workers", "queue")


class OneOff(JobNode):
    """A job that is run once, whatever becomes of the configuration meanwhile, and leaves the tree at its end."""

    __slots__ = ("_outcome", "_over")

    one_off = True

    def __init__(self, tree: Supervisor, name: str, spec: JobSpec, cause: str) -> None:
        super().__init__(tree, name, _once(name, spec), Goal.UP)
        self.goal_cause = cause
        self._over = trio.Event()
        self._outcome: Outcome

    @property
    def counts(self) -> bool:
        return False  # the tree is as ready as it was

    async def wait(self) -> Outcome:
        """Wait until nothing of it is alive; how it ended. Cancelling the wait ends nothing."""
        await self._over.wait()
        return self._outcome

    def over(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._over.set()
        self.removing = f"ran once: {outcome.reason}"

    def turn_down(self, text: str) -> None:
        super().turn_down(text)
        if not self._over.is_set() and self.life is None:
            self.over(Outcome(reason=text, failed=True))
            if self.parent is not None:
                self.parent.post(self.parent.reconsider, self)


def _once(name: str, spec: JobSpec) -> JobSpec:
    """The spec of a job that is run once. Raises ControlError for what makes no sense there."""
    default = JobSpec()
    for key in _SENSELESS:
        if getattr(spec, key) != getattr(default, key):
            raise ControlError(f"{name}: `{key}` makes no sense for a job that is run once and forgotten")
    return replace(spec, once=True, restart=RestartType.TEMPORARY, start="auto")
