"""The workers of a job: a group of its own in the place of one child, that adds, removes and renews them.

A job that runs once is a plain `JobNode`, and pays for none of this. One with several `workers` is a group that has the
job's name, goal and row; its children `NAME:0`, `NAME:1` and so on are plain jobs again. To those above, the group is the
job: what `give_up`, `essential` and `significant` say is said of it, and the failures of its workers stay in it.

Where `workers` is a table, `autoscale.py` says how many there are; then numbers below the highest may be missing.

With `overlap = "parallel"` the workers of a schedule are down until they are given a tick: each makes one run of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

import trio

from supervisor import events
from supervisor.errors import RestartIntensityExceeded
from supervisor.kinds import JobSpec, Outcome, Run
from supervisor.nodes.inbox import moments
from supervisor.nodes.job import JobNode, gave_up
from supervisor.nodes.node import Ask, Life, Node, Order
from supervisor.nodes.schedule import Due, Schedule, same_times
from supervisor.nodes.supervisor import SupervisorNode
from supervisor.queues.spec import AutoscaleSpec
from supervisor.spec import ChildSpec, RestartType, SupervisorSpec, split_name
from supervisor.state import Goal, Why

if TYPE_CHECKING:
    from supervisor.nodes.autoscale import Autoscale
    from supervisor.tree import Supervisor


class Renewal(NamedTuple):
    """A worker that a roll is still to renew, and the number of its last run that does not count as new."""

    worker: Node
    old: int


class Roll:
    """A rolling restart: the workers that are still to be renewed, one at a time."""

    def __init__(self, cause: str, left: list[Renewal]) -> None:
        self.cause = cause
        self.left = left


class WorkersNode(SupervisorNode):
    """The workers of one job."""

    spec: JobSpec  # type: ignore[assignment]

    def __init__(self, tree: Supervisor, name: str, spec: JobSpec, goal: Goal) -> None:
        super().__init__(tree, name, spec, goal)  # type: ignore[arg-type]
        self.wanted = 0
        self._template = JobNode(tree, f"{name}:0", spec, Goal.UP)
        self._gave_up: str | None = None
        self._roll: Roll | None = None
        self._awaited: set[str] = set()
        """Workers that a `scale` has added and that are not ready yet."""
        self._told = ""
        self._fixed = False
        """Whether an operator has said how many there are, and not the work that there is."""
        self._autoscale: Autoscale | None = None
        self.schedule = Schedule(self) if spec.scheduled else None
        self._shown: tuple[object, ...] = ()
        self._cancelled: list[Life] = []

    # what a job is to its supervisor

    @property
    def kind(self) -> str:
        return self._template.kind

    @property
    def regime(self) -> SupervisorSpec:
        """One for one; `give_up` is what ends it."""
        limit = self.spec.give_up
        return SupervisorSpec() if limit is None else SupervisorSpec(intensity=limit.failures - 1, period=limit.within)

    @property
    def restart_type(self) -> RestartType:
        return self.spec.restart_type

    @property
    def description(self) -> str:
        return self.spec.description

    @property
    def counts(self) -> bool:
        return self.goal is Goal.UP and self.spec.start == "auto"

    @property
    def whole(self) -> bool:
        return super().whole and not self._pending

    @property
    def workers(self) -> list[Node]:
        """Those that are to stay, by their numbers."""
        return sorted((each for each in self.children.values() if not each.removing), key=number)

    def gives_up(self, now: float, reason: str) -> str | None:
        return self._gave_up

    def respecified(self, old: ChildSpec) -> None:
        assert isinstance(old, JobSpec)
        if self.schedule is not None and same_times(old, self.spec):
            self.schedule.respecified()
        elif self.schedule is not None:
            self.schedule.disarm()
        self._template = JobNode(self.tree, f"{self.name}:0", self.spec, Goal.UP)
        if old.start != self.spec.start:
            self.set_goal(Goal.UP if self.spec.start == "auto" else Goal.DOWN, "its `start` was changed", None)
        for worker in self.workers:
            super().update(worker, self.spec, None)
        if old.workers != self.spec.workers:
            self._fixed = False
            self._fit()
        if (old.workers, old.queue) != (self.spec.workers, self.spec.queue):
            self._follow_work()

    def update(self, child: Node, spec: ChildSpec, again: str | None) -> None:
        """What was to change a plain job, which has become the first worker meanwhile, changes the whole."""
        if self.parent is not None:
            self.parent.post(self.parent.update, self, spec, again)

    # how many

    def scale(self, wanted: int) -> set[str]:
        """Have so many workers from now on, touching only the difference. Gives the names of those that it adds."""
        return self._have(range(wanted))

    def _have(self, numbers: Collection[int]) -> set[str]:
        """Have the workers of these numbers."""
        added = set()
        self.wanted = wanted = len(numbers)
        for at in numbers:
            child = self.children.get(f"{self.name}:{at}")
            if child is None:
                child = self._add(at)
            elif child.removing:  # on its way out: it is called back
                child.removing = None
                child.set_goal(self._goal, f"scaled to {wanted}", None)
            else:
                continue
            added.add(child.name)
        for child in list(self.children.values()):
            if number(child) not in numbers and not child.removing:
                child.removing = f"scaled to {wanted}"
                self.post(self.reconsider, child)
        self._awaited = self._awaited & {child.name for child in self.workers} | added
        self.post(self.touch_all)
        return added

    # how many, where that goes by the work that there is

    @property
    def bounds(self) -> AutoscaleSpec | None:
        """The least and the most workers that there may be; None where it is not the work that decides."""
        return self.spec.workers if isinstance(self.spec.workers, AutoscaleSpec) and not self._fixed else None

    def fix(self) -> None:
        """An operator says how many there are, until `workers` changes."""
        self._fixed = True
        self._follow_work()

    def _follow_work(self) -> None:
        """Have somebody keep the number, or nobody, as is said now."""
        if self._autoscale is not None:
            self._autoscale.stop()
            self._autoscale = None
        if (bounds := self.bounds) is not None and self._nursery is not None and self.closing is None:
            from supervisor.nodes.autoscale import Autoscale  # loaded only where it is asked for

            assert self.spec.queue is not None
            self._autoscale = Autoscale(self, bounds, self.spec.queue)
            self._nursery.start_soon(self._autoscale.run, name=f"{self.name}: autoscale")

    def _fit(self) -> None:
        """Have as many as the new `workers` says."""
        bounds = self.bounds
        wanted = self.spec.first_workers if bounds is None else max(bounds.min, min(self.wanted, bounds.max))
        if bounds is None or wanted != self.wanted:
            scale(self, wanted)

    def grow(self, wanted: int) -> None:
        """Have so many, with the lowest numbers that are free for the new ones."""
        numbers = [number(worker) for worker in self.workers]
        free = (at for at in count() if at not in numbers)
        self._have([*numbers, *islice(free, wanted - len(numbers))])
        self.rearrange()

    def part_with(self, worker: Node) -> None:
        """Have one fewer: this one leaves."""
        self._have([number(each) for each in self.workers if each is not worker])
        self.rearrange()

    def rearrange(self) -> None:
        """Have the tree know who there is, and in which order."""
        self.tree.arrange()
        self.tree.look_after_jobs()

    @property
    def size(self) -> str:
        """How many there are, in words, and what that means for the work's own say."""
        return plural(self.wanted) + (", whatever there is to do, until `workers` changes in the file" if self._fixed else "")

    @property
    def _goal(self) -> Goal:
        """What is wanted of a worker: by a schedule, that it waits for a run."""
        return Goal.UP if self.schedule is None else Goal.DOWN

    def _add(self, at: int) -> Node:
        worker = JobNode(self.tree, f"{self.name}:{at}", self.spec, self._goal)
        self.tree.add(worker, self.name)
        self.adopt(worker)
        return worker

    def take_over(self, job: JobNode) -> None:
        """Take the place of a plain job, and have it as the first worker. Its run goes on, and what is waited for is waited for
        here."""
        assert job.parent is not None
        above = job.parent
        self.goal_cause, self.finished, self.succeeded = job.goal_cause, job.finished, job.succeeded
        self.orders, job.orders = job.orders, []
        self.moving_to, job.moving_to = job.moving_to, None
        self.runs = job.runs
        self.tree.rename(job, f"{self.name}:0", self.name)
        self.tree.add(self, above.name or None)
        above.supplant(job, self)
        job.become_worker(self)
        self.children[job.name] = job
        self.wanted = 1
        if job.life is not None:
            self.alive.add(job.name)
        self.tree.link()

    def _begin(self, run: Run, nursery: trio.Nursery) -> None:
        super()._begin(run, nursery)
        self._gave_up = None
        self._told = ""
        self._follow_work()
        for child in self.children.values():
            if child.life is not None:  # it was a plain job: its timers were another's
                for when in moments(child):
                    self.remind(child, math.inf if when is None else when)

    def let_go(self) -> None:
        for child in self.children.values():
            child.removing = child.removing or self.removing
        super().let_go()

    # the job as a whole

    def want_all_up(self, cause: str, by: str | None) -> None:
        """An operator wants all of them up, also those that were stopped alone."""
        if self.schedule is not None:
            return
        for worker in self.workers:
            worker.want_up(cause, by)
            self._note(worker)
        self.post(self.touch_all)

    def forget_failures(self) -> None:
        super().forget_failures()
        self.restarts.forget()

    def overtake(self, order: Order) -> None:
        super().overtake(order)
        self._roll = None

    def close(self, cause: str, outcome: Outcome) -> None:
        self._roll = None
        super().close(cause, outcome)
        self._follow_work()

    def give_up(self, child: Node, reason: str) -> None:
        assert self.spec.give_up is not None
        self._gave_up = gave_up(self.spec.give_up, f"{child.name}: {reason}")
        self._end_by_itself(self._gave_up, RestartIntensityExceeded(self.name, 0, 0))

    # renewal, one after another

    def renew(self, cause: str) -> None:
        """Renew the workers one at a time, the next when the last is ready. Those that are down come up at once."""
        if self.stopping or self.closing is not None or self.schedule is not None:
            super().renew(cause)
            return
        for worker in self.workers:
            if worker.life is None:
                worker.forget_failures()
                worker.revive()
        self._roll = Roll(cause, [Renewal(worker, worker.runs) for worker in self.workers])
        self.post(self.touch_all)

    def _settle(self) -> None:
        super()._settle()
        while self._go_on():
            super()._settle()

    def _go_on(self) -> bool:
        """Take the next step of what goes on over time; whether there is something to settle."""
        if self.closing is None:
            self._roll_on()
            self._look_whether_scaled()
            if self.schedule is None:
                self._look_whether_completed()
            else:
                self._follow(self.schedule)
        return bool(self._dirty)

    def _roll_on(self) -> None:
        while self._roll is not None and self._roll.left:
            worker, old = self._roll.left[0]
            stays = worker.parent is self and not worker.removing and worker.active
            if stays and not (worker.runs > old and worker.satisfied):
                self._take_its_turn(worker, old, self._roll.cause)
                return
            del self._roll.left[0]
        if self._roll is not None:
            self._roll = None
            self.answer(("restart", "reload"), True, f"running, {plural(self.wanted)}")

    def _take_its_turn(self, worker: Node, old: int, cause: str) -> None:
        """Have a worker renewed, if it is not on its way already. One that has crashed meanwhile does not wait any longer."""
        if worker.life is None and worker.due_at is not None:
            worker.forget_failures()
            self.touch(worker)
        elif worker.life is not None and worker.life.asked is None and worker.runs <= old and worker.again is None:
            worker.renew(cause)
            self.touch(worker)

    def on_ended(self, child: Node, life: Life, outcome: Outcome) -> None:
        super().on_ended(child, life, outcome)
        failed = child.restarting is not None or (child.finished and not child.succeeded)
        if life.ready_at is not None and life.asked is None:
            self._awaited.discard(child.name)
        elif failed and child.name in self._awaited:
            self._awaited.clear()
            self.answer(("scale",), False, f"{child.name}: {_reason(child)}; it never became ready")
        renewal = self._roll.left[0] if self._roll is not None and self._roll.left else None
        if self._roll is not None and renewal is not None and renewal.worker is child and life.number > renewal.old:
            if life.ready_at is not None:
                del self._roll.left[0]
            elif failed and not child.removing:
                self._stop_rolling(child)

    def _stop_rolling(self, child: Node) -> None:
        """The new version does not get ready: leave alone those that still run the old one."""
        assert self._roll is not None
        left = [renewal.worker.name for renewal in self._roll.left[1:] if renewal.worker.runs <= renewal.old]
        self._roll = None
        kept = f"; {', '.join(left)} as before" if left else ""
        text = f"stopped at {child.name}, which never became ready: {_reason(child)}{kept}"
        self.tree.journal.emit(events.Warned, text=f"rolling restart of {self.name} {text}")
        self.answer(("restart", "reload"), False, text)

    # what becomes of the whole

    def _look_whether_scaled(self) -> None:
        if any(order.verb == "scale" for order in self.orders):
            self._awaited = {child.name for child in self.workers if child.name in self._awaited and _awaited(child)}
            if not self._awaited and not any(child.removing for child in self.children.values()):
                self.answer(("scale",), True, self.size)

    def _look_whether_completed(self) -> None:
        """The job ends when none of its workers is to run again, and not all were stopped by hand."""
        ended = [worker for worker in self.workers if worker.finished]
        if ended and not any(child.active for child in self.children.values()):
            failed = [worker for worker in ended if not worker.succeeded]
            reason = f"{failed[0].name}: {_reason(failed[0])}" if failed else "completed"
            self._close_by_itself(Outcome(reason=reason, failed=bool(failed)))

    @property
    def summary(self) -> str:
        if self.schedule is not None:
            return self.schedule.rhythm
        ready = sum(worker.satisfied for worker in self.workers)
        if (bounds := self.bounds) is not None:
            all_ready = f"{plural(self.wanted)} of {bounds.min} to {bounds.max}"
            return all_ready if ready == self.wanted else f"{ready} ready of {all_ready}"
        if self.wanted == 1:
            return "its one worker is ready" if ready else "its one worker is not ready"
        if ready == self.wanted:
            return f"{'both' if ready == 2 else f'all {ready}'} workers are ready"
        return f"{ready} of {self.wanted} workers are ready"

    def _announce(self) -> None:
        if self.schedule is not None:
            super()._announce()
            return
        since, told = self._ready_since, self._told
        self._told = self.summary
        super()._announce()
        if self._ready_since is since and self._told != told and self.closing is None:
            self._tell()

    # the runs of a schedule that may overlap

    @property
    def in_hand(self) -> list[Node]:
        """The workers that have a run."""
        return [worker for worker in self.workers if worker.life is not None]

    @property
    def free(self) -> JobNode | None:
        """A worker that can be given a run; None where all are busy."""
        given = (worker for worker in self.workers if isinstance(worker, JobNode))
        return next((worker for worker in given if worker.life is None and not worker.requested), None)

    @property
    def busy(self) -> str:
        """Why another run cannot begin now; empty where it can."""
        return "" if self.free is not None else f"all of {plural(self.wanted)} have a run in hand"

    def wake_at(self, moment: float) -> None:
        """Have the schedule looked at then."""
        self.remind(None, moment)

    def look_at_clock(self) -> None:
        """A tick may have come."""
        if self.schedule is not None:
            self.schedule.look()

    def _fire_timers(self) -> None:
        super()._fire_timers()
        self.look_at_clock()

    def _end(self) -> None:
        self.disarm()
        super()._end()

    def _schedule_of(self, child: Node) -> Schedule | None:
        return self.schedule

    def _follow(self, schedule: Schedule) -> None:
        """Give the ticks that wait to workers that are free."""
        if self.goal is Goal.UP and not schedule.armed:
            schedule.arm()
        while schedule.waiting and (worker := self.free) is not None:
            self.give_run(worker, schedule.begin())
        self._look_whether_cancelled()
        if self.goal is Goal.UP:
            self._show(schedule)
        elif not any(worker.requested or worker.life is not None for worker in self.workers):
            self._close_by_itself(Outcome(reason="completed", failed=False))  # what was asked for has run

    def give_run(self, worker: JobNode, due: Due | None = None) -> None:
        """Have a worker make one run, for a tick or because somebody asked for it."""
        worker.revive()
        worker.due, worker.requested = due, True
        self.post(self.touch, worker)

    def cancel_runs(self, order: Order, ask: Ask) -> None:
        """End all runs in hand. Others than those the order does not wait for."""
        self._cancelled = [worker.life for worker in self.in_hand if worker.life is not None]
        for worker in self.in_hand:
            self.post(self.ask, worker, worker.life, ask)
        self.orders.append(order)

    def _look_whether_cancelled(self) -> None:
        if self._cancelled and all(life.gone.is_set() for life in self._cancelled):
            self.answer(("cancel",), True, f"{', '.join(life.run.id for life in self._cancelled)}: cancelled")
            self._cancelled = []

    def _show(self, schedule: Schedule) -> None:
        """Say how many runs are in hand, and when the next is due, where that is news."""
        runs = len(self.in_hand)
        why = Why.PAUSED if self.paused else Why.PLAIN if runs else Why.SCHEDULED
        cause = "paused" if self.paused else schedule.summary
        shown = (why, f"{cause}; {runs} of {self.wanted} runs in hand", schedule.tick, self._ready_since)
        if shown != self._shown and self.parent is not None and self.life is not None:
            self._shown = shown
            self.parent.post(self.parent.on_scheduled, self, self.life, shown[1], why, schedule.next_at)


def scale(child: Node, wanted: int) -> WorkersNode:
    """Have so many workers of a job from now on. A plain job becomes the first of them, and goes on running."""
    group = child
    if not isinstance(group, WorkersNode):
        assert isinstance(child, JobNode)
        group = WorkersNode(child.tree, child.name, child.tree.config.jobs[child.name], child.goal)
        group.take_over(child)
    group.scale(wanted)
    group.rearrange()
    return group


def number(worker: Node) -> int:
    """The number of a worker."""
    return split_name(worker.name)[1] or 0


def plural(workers: int) -> str:
    """So many workers, in words."""
    return f"{workers} worker{'s' if workers != 1 else ''}"


def _awaited(worker: Node) -> bool:
    return worker.goal is Goal.UP and not worker.finished and not worker.satisfied


def _reason(worker: Node) -> str:
    return worker.row.exit.reason if worker.row.exit else worker.row.cause
