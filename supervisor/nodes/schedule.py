"""The schedule of a job in the tree: which of its ticks have come and wait for a run, and what `overlap` makes of the others.

`supervisor/triggers.py` knows when ticks come. Here they meet what the job is doing: a run in hand, a pause, an end.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import trio

from supervisor import events
from supervisor.config.shapes import duration
from supervisor.kinds import JobSpec, Outcome
from supervisor.nodes.node import Ask, Hold
from supervisor.spec import shown
from supervisor.state import Why
from supervisor.triggers import MOST, Cron, Every, Timetable, heeded
from supervisor.wall import written

if TYPE_CHECKING:
    from supervisor.nodes.job import JobNode
    from supervisor.nodes.workers import WorkersNode


class Due(NamedTuple):
    """A tick that a run is made for: its moment on the wall clock, and why there is a run, in one sentence."""

    at: float
    cause: str


class Schedule:
    """The schedule of one job. It is armed while the job is to run by it, and costs nothing else."""

    __slots__ = ("_failure", "_timetable", "_waiting", "node")

    def __init__(self, node: JobNode | WorkersNode) -> None:
        self.node = node
        self._timetable: Timetable | None = None
        self._waiting: deque[Due] = deque()
        self._failure: str | None = None

    @property
    def _spec(self) -> JobSpec:
        return self.node.spec

    @property
    def armed(self) -> bool:
        """Whether ticks come."""
        return self._timetable is not None

    @property
    def waiting(self) -> bool:
        """Whether a tick has come that waits for its run."""
        return bool(self._waiting)

    @property
    def wakes_at(self) -> float | None:
        """When to `look` again, on Trio's clock; None where the alarm on the wall clock rings, or nothing is to come."""
        return self._timetable.next_at if self._timetable is not None and self._spec.cron is None else None

    @property
    def tick(self) -> float | None:
        """The next tick, on its own clock."""
        return None if self._timetable is None else self._timetable.tick

    @property
    def next_at(self) -> str | None:
        """When the next run is due, for people."""
        if self._timetable is None or self.node.paused or self._timetable.next_at == math.inf:
            return None
        return written(self._on_the_wall(self._timetable.next_at))

    @property
    def rhythm(self) -> str:
        """When it runs, in words."""
        spec = self._spec
        if spec.cron is not None:
            return f"runs at {shown(spec.cron)} ({shown(spec.timezone)})"
        return f"runs every {duration(spec.every or 0)}"

    @property
    def summary(self) -> str:
        """When it runs, and what became of the last run where that went wrong."""
        return f"{self.rhythm}; the last run failed: {self._failure}" if self._failure is not None else self.rhythm

    def arm(self) -> None:
        """Begin here: ticks come from now on, the first one now with `run_on_start`."""
        spec, tree, now = self._spec, self.node.tree, self._now()
        rhythm = Every(spec.every or 0, now) if spec.cron is None else Cron(spec.cron, spec.timezone)
        self._timetable = Timetable(rhythm, now, spec.jitter, tree.spread)
        if spec.run_on_start:
            self._waiting.append(Due(tree.wall.now(), self.rhythm))
        self._set_alarm()

    def disarm(self) -> None:
        """No more ticks, and none that waits."""
        self._timetable = None
        self._waiting.clear()
        if self._spec.cron is not None:
            self.node.tree.alarm.clear(self)

    def pause(self) -> None:
        """Let ticks go by until `resume`, also those that wait."""
        self._waiting.clear()

    def resume(self) -> None:
        """Go on with the next tick, in step."""
        if self._timetable is not None:
            self._timetable.skip(self._now())
            self._set_alarm()

    def hold(self) -> Hold | None:
        """What keeps the job from running; None where a tick has come. Arms it."""
        if self._timetable is None:
            self.arm()
        if self._waiting:
            return None
        return Hold(self.summary, Why.SCHEDULED, self.wakes_at, next_at=None if self._spec.cron is None else self.next_at)

    def begin(self) -> Due | None:
        """Take the tick that the run is for that begins now; None where it is for none."""
        return self._waiting.popleft() if self._waiting else None

    def ended(self, failure: str | None) -> None:
        """Hear that a run is over, and why it failed, if it did."""
        self._failure = failure

    def look(self) -> None:
        """Take the ticks that have come since the last look: some wait for a run from now on, others make none and say so."""
        node, timetable = self.node, self._timetable
        if timetable is None or node.paused or node.tree.ending or node.removing:
            return
        now = self._now()
        if self._spec.cron is not None:
            timetable.clock_was_set(now)
        came = timetable.take(now)
        self._set_alarm()
        if came:
            self._heed(came, now)

    def _heed(self, came: list[float], now: float) -> None:
        chosen = heeded(came, "last" if self._spec.cron is None else self._spec.catch_up, now)
        if (missed := len(came) - len(chosen)) and self._spec.cron is not None:
            self._skip(f"missed {_counted(missed)}: the clock was set, or the machine slept", missed)
        for tick in chosen:
            self._admit(Due(self._on_the_wall(tick), self.rhythm), len(chosen) > 1)

    def _admit(self, due: Due, one_of_many: bool) -> None:
        """Have a tick wait for its run, if `overlap` lets it."""
        busy, overlap = self.node.busy, self._spec.overlap
        if one_of_many or not (busy or self._waiting):
            self._waiting.append(due)
        elif busy and overlap == "replace":
            self._waiting.clear()
            self._waiting.append(due)
            self.replace('its next run is due, and overlap is "replace"')
        elif busy and overlap in ("skip", "parallel"):
            self._skip(busy)
        elif self._waiting:
            self._skip(f"a run waits already: {busy or self.node.row.cause}")
        else:
            self._waiting.append(due)

    def replace(self, cause: str) -> None:
        """Have the run in hand end, which is no failure, to make room for the next."""
        if self.node.life is not None and self.node.parent is not None:
            self.node.parent.ask(self.node, self.node.life, Ask(cause, Outcome(reason="replaced", failed=False)))

    def _skip(self, cause: str, ticks: int = 1) -> None:
        self.node.emit(events.Skipped, cause=cause, ticks=ticks)

    def _now(self) -> float:
        return trio.current_time() if self._spec.cron is None else self.node.tree.wall.now()

    def _on_the_wall(self, tick: float) -> float:
        if self._spec.cron is not None:
            return tick
        return self.node.tree.wall.now() + tick - trio.current_time()

    def _set_alarm(self) -> None:
        """Be there at the next tick."""
        assert self._timetable is not None
        moment = self._timetable.next_at
        if moment == math.inf:
            return
        if self._spec.cron is None:
            self.node.wake_at(moment)
        else:
            self.node.tree.alarm.set(self, moment)


TIMES = ("every", "cron", "timezone", "jitter")
"""The keys that say when ticks come."""


def same_times(old: JobSpec, new: JobSpec) -> bool:
    """Whether ticks come as before: a schedule that is armed goes on."""
    return all(getattr(old, key) == getattr(new, key) for key in TIMES)


def _counted(ticks: int) -> str:
    """So many runs, in words."""
    return f"more than {MOST} runs" if ticks >= MOST else "a run" if ticks == 1 else f"{ticks} runs"
