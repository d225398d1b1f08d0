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
from supervisor.state import State, Why
from supervisor.triggers import CORRECTION, MOST, Cron, Every, Rhythm, Timetable, between, heeded
from supervisor.wall import written

if TYPE_CHECKING:
    from supervisor.nodes.job import JobNode
    from supervisor.nodes.ticking import Ticker
    from supervisor.nodes.workers import WorkersNode


class Due(NamedTuple):
    """A tick that a run is made for: its moment on the wall clock, and why there is a run, in one sentence."""

    at: float
    cause: str


class Schedule:
    """The schedule of one job. It is armed while the job is to run by it, and costs nothing else."""

    __slots__ = ("_begun", "_seen", "_settled", "_timetable", "_waiting", "failure", "node")

    def __init__(self, node: JobNode | WorkersNode | Ticker) -> None:
        self.node = node
        self._timetable: Timetable | None = None
        self._waiting: deque[Due] = deque()
        self.failure: str | None = None
        """Why the last run failed that came to an end of its own, if it did."""
        self._begun: list[float] = []
        """The ticks whose runs are in hand."""
        self._seen = 0.0
        """The last tick that has come, or when it was armed, on the wall clock."""
        self._settled: float | None = None
        """What is remembered."""

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
        return rhythm(self._spec)

    @property
    def summary(self) -> str:
        """When it runs, and what to expect of it: what its breaker says, else what became of the last run if it failed."""
        trouble = self.node.tree.limits.caution(self.node.name, self._spec)
        if not trouble and self.failure is not None:
            trouble = f"the last run failed: {self.failure}"
        return f"{self.rhythm}; {trouble}" if trouble else self.rhythm

    def arm(self) -> None:
        """Begin here: ticks come from now on, after those that were missed, and the first one now with `run_on_start`."""
        spec, tree, now = self._spec, self.node.tree, self._now()
        self._seen = tree.wall.now()
        before = self._before()
        if before is not None:
            self._catch_up(before)
        if spec.run_on_start and not self._waiting:
            self._waiting.append(Due(self._seen, self.rhythm))
        since = now if spec.cron is None or before is None else max(now, before)
        self._timetable = Timetable(self._rhythm(now), since, spec.jitter, tree.spread)
        self._set_alarm()
        self._settle()

    def _rhythm(self, anchor: float) -> Rhythm:
        spec = self._spec
        return Every(spec.every or 0, anchor) if spec.cron is None else Cron(spec.cron, spec.timezone)

    def _before(self) -> float | None:
        """How far the daemon before this one had got. A future in which nobody has been is none."""
        if self._spec.catch_up == "none":
            return None
        before = self.node.tree.last_runs.take(self.node.name, self.rhythm)
        return before if before is not None and before <= self._seen + CORRECTION else None

    def _catch_up(self, before: float) -> None:
        """Have runs wait for the ticks that came while there was no daemon, or whose runs were cut short with it."""
        came = between(self._rhythm(before), before, self._seen)
        chosen = heeded(came, self._spec.catch_up, math.inf) if came else []
        if missed := len(came) - len(chosen):
            self._skip(f"missed {_counted(missed)} while the daemon was down", missed)
        self._waiting.extend(Due(tick, "catches up a run that was missed, or cut short, with the daemon") for tick in chosen)

    def forget(self) -> None:
        """What is missed from now on until it is armed again, or resumed, is not caught up."""
        if self._settled is not None:
            self._settled = None
            self.node.tree.last_runs.forget(self.node.name)

    def disarm(self) -> None:
        """No more ticks, and none that waits."""
        self._timetable = None
        self._waiting.clear()
        self.node.tree.alarm.clear(self)

    def respecified(self) -> None:
        """Go on by a new spec whose ticks are the same."""
        if self.armed:
            self._settle()

    def pause(self) -> None:
        """Let ticks go by until `resume`, also those that wait."""
        self._waiting.clear()
        self.forget()

    def resume(self) -> None:
        """Go on with the next tick, in step."""
        if self._timetable is not None:
            self._timetable.skip(self._now())
            self._set_alarm()
            self._seen = self.node.tree.wall.now()
            self._settle()

    def hold(self) -> Hold | None:
        """What keeps the job from running; None where a tick has come. Arms it."""
        if self._timetable is None:
            self.arm()
        if self._waiting:
            return None
        return Hold(self.summary, Why.SCHEDULED, self.wakes_at, next_at=None if self._spec.cron is None else self.next_at)

    def begin(self) -> Due | None:
        """Take the tick that the run is for that begins now; None where it is for none."""
        if not self._waiting:
            return None
        due = self._waiting.popleft()
        self._begun.append(due.at)
        return due

    def ended(self, due: Due | None, cut_short: bool) -> None:
        """Hear that a run is over. One that the daemon's end has cut short is not settled."""
        if due is not None and due.at in self._begun and not cut_short:
            self._begun.remove(due.at)
            self._settle()

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
            self._seen = self._on_the_wall(came[-1])
            self._heed(came, now)
            self._settle()

    def _heed(self, came: list[float], now: float) -> None:
        catch_up = "last" if self._spec.cron is None else self._spec.catch_up
        chosen = heeded(came, catch_up, now - came[-1] - self._spec.jitter)
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
            held = self.node.row.cause if self.node.row.state is State.WAITING else "it is about to begin"
            self._skip(f"a run waits already: {busy or held}")
        else:
            self._waiting.append(due)

    def replace(self, cause: str) -> None:
        """Have the run in hand end, which is no failure, to make room for the next."""
        node, life = self.node, self.node.life
        if life is not None and node.parent is not None:
            node.answer(("run-now",), False, f"{life.run.id} was replaced: {cause}", run=life.number)
            node.parent.ask(node, life, Ask(cause, Outcome(reason="replaced", failed=False)))

    def _skip(self, cause: str, ticks: int = 1) -> None:
        self.node.emit(events.Skipped, cause=cause, ticks=ticks)

    def _settle(self) -> None:
        """Remember how far it has got: up to before the first tick whose run is not over. So a run that is cut short, by
        whatever, is made again: at least once, where somebody wants to catch up at all."""
        if self._spec.catch_up == "none":
            self.forget()
        elif self.armed and not self.node.paused:
            first = min([*self._begun, *(due.at for due in self._waiting)], default=None)
            settled = self._seen if first is None else first - (self._spec.every or _JUST_BEFORE)
            if settled != self._settled:
                self._settled = settled
                self.node.tree.last_runs.remember(self.node.name, self.rhythm, settled)

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


_JUST_BEFORE = 0.001
"""Seconds: there is no tick of a cron job between this and the next."""

TIMES = ("every", "cron", "timezone", "jitter")
"""The keys that say when ticks come."""


def rhythm(spec: JobSpec) -> str:
    """When a job runs, in words."""
    if spec.cron is not None:
        return f"runs at {shown(spec.cron)} ({shown(spec.timezone)})"
    return f"runs every {duration(spec.every or 0)}"


def same_times(old: JobSpec, new: JobSpec) -> bool:
    """Whether ticks come as before: a schedule that is armed goes on."""
    return all(getattr(old, key) == getattr(new, key) for key in TIMES)


def _counted(ticks: int) -> str:
    """So many runs, in words."""
    return f"more than {MOST} runs" if ticks >= MOST else "a run" if ticks == 1 else f"{ticks} runs"
