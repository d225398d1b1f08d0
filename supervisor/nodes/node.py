"""What a job and a supervisor have in common as the child of a supervisor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from supervisor import events, restart
from supervisor.kinds import Outcome, Run
from supervisor.spec import ChildSpec, RestartType
from supervisor.state import Answer, Goal, JobStatus, State, Why

if TYPE_CHECKING:
    from supervisor.nodes.attendance import Attendance
    from supervisor.nodes.schedule import Due, Schedule
    from supervisor.nodes.supervisor import SupervisorNode
    from supervisor.tree import Supervisor

STARTS = ("start", "restart", "reload", "run-now", "scale")
"""What asks for a new run, or for a run to be there."""


class Order:
    """One command on one name. `wait` gives what it came to; the command itself has already been obeyed."""

    def __init__(self, name: str, verb: str, by: str | None, after_run: int = 0) -> None:
        self.name = name
        self.verb = verb
        self.by = by
        self.after_run = after_run
        self.note = ""
        """What is to be known besides, whatever it comes to."""
        self._answer: Answer | None = None
        self._done = trio.Event()

    def resolve(self, ok: bool, text: str) -> Order:
        """Settle it; only the first time counts."""
        if self._answer is None:
            self._answer = Answer(name=self.name, ok=ok, text=f"{text}; {self.note}" if self.note else text)
            self._done.set()
        return self

    async def wait(self) -> Answer:
        """Wait until the command has had its effect, was refused, or was overtaken. Cancelling the wait undoes nothing."""
        await self._done.wait()
        assert self._answer is not None
        return self._answer


class Ask(NamedTuple):
    """Why a run is asked to end. `verdict` overrides its own outcome: it failed (a timeout), or was cancelled."""

    cause: str
    verdict: Outcome | None = None
    why: Why = Why.PLAIN


class Hold(NamedTuple):
    """Why a child does not run although nothing of it is alive; `until` is on Trio's clock. `rest`: nor will it by itself.

    `next_at` is for people, where it is a moment of the wall clock.
    """

    cause: str
    why: Why = Why.PLAIN
    until: float | None = None
    rest: bool = False
    next_at: str | None = None


class Life:
    """One run of a child, from start to gone."""

    __slots__ = (
        "asked", "asked_at", "attended", "began", "due", "gone", "killed_after", "number", "old_at", "over", "probed",
        "ready_at", "requested", "run", "rung_due", "scope", "starting",
    )  # fmt: skip

    def __init__(self, run: Run, number: int) -> None:
        self.run = run
        self.number = number
        self.asked: Ask | None = None
        self.requested = False
        """Whether an operator asked for this one run: it does not end because its job is down."""
        self.due: Due | None = None
        """The tick of a schedule that it is made for."""
        self.ready_at: float | None = None
        self.gone = trio.Event()
        self.began = trio.current_time()
        self.old_at = math.inf
        """When it is to be replaced by a fresh one, where its job has `recycle = { age }`."""
        self.killed_after: float | None = None
        """Seconds from being asked to being killed."""
        self.scope = trio.CancelScope(shield=True)
        """Only the ladder cancels it: a tree that is cancelled from outside still drains."""
        self.asked_at = -math.inf
        self.rung_due = math.inf
        """When the next rung of the stop ladder is to be climbed."""
        self.over = False
        """Whether the run has ended, though its end may not have been judged yet."""
        self.starting: trio.CancelScope | None = None
        """The wait for readiness."""
        self.attended: Attendance | None = None
        """Who looks after the run from beside."""
        self.probed: Attendance | None = None
        """Who asks whether it is ready, and then whether it is well."""


class Node:
    """The child of a supervisor: what a job and a supervisor have in common."""

    # A thousand children are common: slots halve what a node weighs.
    __slots__ = (
        "again", "delays", "due_at", "finished", "goal", "goal_cause", "hastened", "hold", "life", "moving_to", "name", "noted",
        "orders", "parent", "paused", "removing", "requested", "restarting", "runs", "schedule", "spec", "succeeded", "tree",
    )  # fmt: skip

    killable = True
    takes: str | None = None
    """What each of its runs needs one of: a thread, a process. None where that is never limited."""
    one_off = False
    """Whether no configuration names it: it leaves at its end."""

    def __init__(self, tree: Supervisor, name: str, spec: ChildSpec, goal: Goal) -> None:
        self.tree = tree
        self.name = name
        self.spec = spec
        self.parent: SupervisorNode | None = None
        self.goal = goal
        self.schedule: Schedule | None = None
        self.paused = False
        self.requested = False
        """Whether an operator asked for a run that has not begun yet."""
        self.goal_cause = "starts with its supervisor" if goal is Goal.UP else "starts when told to"
        self.life: Life | None = None
        self.runs = 0
        self.finished = False
        self.succeeded = False
        self.restarting: str | None = None
        """The failure that its next start answers, in one sentence; None where it is no restart."""
        self.again: str | None = None
        """Why it starts anew once its run is gone, whatever that ended as: an operator said so, or a reload."""
        self.due_at: float | None = None
        self.hastened = False
        """Whether its next backoff is to be left out."""
        self.delays = restart.Delays(tree.spread)
        self.orders: list[Order] = []
        self.hold: Hold | None = None
        self.removing: str | None = None
        self.moving_to: SupervisorNode | None = None
        self.noted: tuple[bool, str] | None = None

    # what differs between a job and a supervisor

    @property
    def kind(self) -> str:
        """The word for it in `status`."""
        raise NotImplementedError

    @property
    def restart_type(self) -> RestartType:
        """The restart type in force."""
        return self.spec.restart or RestartType.PERMANENT

    @property
    def temporary(self) -> bool:
        """Whether an end of its run is its end. A schedule goes on, although each of its runs is temporary."""
        return self.restart_type is RestartType.TEMPORARY

    @property
    def grace(self) -> float:
        """Seconds from being asked to being killed."""
        raise NotImplementedError

    @property
    def satisfied(self) -> bool:
        """Whether what comes `after` it may start."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """One line for people."""
        return ""

    async def body(self, run: Run) -> Outcome:
        """One run."""
        raise NotImplementedError

    def hold_of_its_own(self, now: float) -> Hold | None:
        """What else keeps it from starting: a schedule."""
        return None

    def adapted(self, spec: ChildSpec) -> ChildSpec:
        """What this node makes of the spec that the configuration gives it."""
        return spec

    def gives_up(self, now: float, reason: str) -> str | None:
        """Count a failure; where `give_up` says that it was the last, the sentence that says so."""
        return None

    @property
    def whole(self) -> bool:
        """Whether nothing of what it is to be is still to come."""
        return self.life is not None and self.life.ready_at is not None

    def renew(self, cause: str) -> None:
        """Have its run replaced by a new one."""
        self.again = cause

    def hurry(self) -> None:
        """End the grace of a stop under way."""
        life = self.life
        if life is not None and life.asked is not None and life.killed_after is None and self.parent is not None:
            life.rung_due = -math.inf
            self.parent.post(self.parent.touch, self)

    @property
    def active(self) -> bool:
        """Whether it runs, or is to run as soon as nothing keeps it."""
        return self.life is not None or (self.goal is Goal.UP and not self.finished)

    @property
    def stopping(self) -> bool:
        """Whether its run is on its way to the end."""
        return self.life is not None and self.row.state is State.STOPPING

    @property
    def counts(self) -> bool:
        """Whether its supervisor is ready only when it is."""
        return self.goal is Goal.UP

    # what is the same

    @property
    def trouble(self) -> str:
        """What may keep it from getting ready, to append to a sentence; empty where it is simply on its way."""
        hopeless = self.goal is Goal.DOWN or self.finished or self.row.word == Why.BACKOFF.value
        return f", which is {self.row.word}" if hopeless else ""

    @property
    def row(self) -> JobStatus:
        """Its status."""
        return self.tree.journal.table[self.name]

    def emit(self, kind: type[events.ChildEvent], /, **fields: Any) -> None:
        """Record that something happened to it."""
        self.tree.journal.emit(kind, name=self.name, **fields)

    def disarm(self) -> None:
        """No more ticks of its schedule."""
        if self.schedule is not None:
            self.schedule.disarm()

    def set_goal(self, goal: Goal, cause: str, by: str | None) -> None:
        """Want it up or down from now on."""
        self.goal_cause = cause
        if goal is not self.goal:
            self.goal = goal
            self.emit(events.GoalSet, goal=goal, cause=cause, by=by)

    def want_up(self, cause: str, by: str | None) -> None:
        """An operator wants it up: nothing of ours is in the way any more, neither a wait nor an end."""
        self.set_goal(Goal.UP, cause, by)
        self.forget_failures()
        if self.life is None:
            self.revive()

    def respecified(self, old: ChildSpec) -> None:
        """Take in what a new spec changes beyond the run itself."""

    def over(self, outcome: Outcome) -> None:
        """Hear that its run is over, and how it ended."""

    def forget_failures(self) -> None:
        """An operator has taken over: what failed before counts for nothing."""
        self.due_at = self.restarting = None
        self.delays.reset()

    def revive(self) -> None:
        """Forget how it ended: it may run again."""
        self.finished = self.succeeded = False

    def overtake(self, order: Order) -> None:
        """Let `order` take over from what others have asked for. The same wish joins theirs instead."""
        joins = order.verb in ("start", "stop", "run-now")
        for other in self.orders:
            if not (joins and other.verb == order.verb):
                other.resolve(False, f"overtaken by {order.verb}" + (f" ({order.by})" if order.by else ""))
        self.orders = [other for other in self.orders if joins and other.verb == order.verb] + [order]

    def answer(self, verbs: Iterable[str], ok: bool, text: str, run: float = math.inf) -> None:
        """Settle the orders of these verbs that a run numbered `run` can settle."""
        for order in [order for order in self.orders if order.verb in verbs and order.after_run < run]:
            order.resolve(ok, text)
            self.orders.remove(order)

    def turn_down(self, text: str) -> None:
        """Tell those who wait for a run that there will be none."""
        self.answer(STARTS, False, text)

    def dismiss(self, text: str) -> None:
        """Tell all who still wait for something that it will not come."""
        self.answer({order.verb for order in self.orders}, False, text)

    # Reporter: a run's facts

    def ready(self, run: Run, cause: str) -> None:
        """See `Reporter`."""
        if self.life is not None and self.life.run is run and self.parent is not None:
            self.parent.post(self.parent.on_ready, self, self.life, cause)

    def spawned(self, run: Run, pid: int) -> None:
        """See `Reporter`."""
        self.emit(events.Spawned, run=run.id, pid=pid)

    def stuck(self, run: Run, cause: str, pids: tuple[int, ...]) -> None:
        """See `Reporter`."""
        self.emit(events.Stuck, run=run.id, cause=cause, pids=pids, followed=run.followed)
        self.tree.phases.stuck = True
        self.tree.phases.look_whether_only_stuck()

    def progress(self, run: Run, done: float, total: float | None) -> None:
        """See `Reporter`."""
        self.emit(events.Progress, run=run.id, done=done, total=total)

    def output_lost(self, run: Run, count: int, cause: str) -> None:
        """See `Reporter`. What a run left behind may be lost later than the job is."""
        if self.name in self.tree.journal.table:
            self.emit(events.OutputLost, cause=cause, bytes=count)
        else:
            self.tree.journal.emit(events.Warned, text=f"output of {self.name}, which is no more: {cause}: {count} bytes")

    def waits_for_room(self, run: Run, queue: str, cause: str | None) -> None:
        """See `Reporter`."""
        if cause is None:
            self.emit(events.RoomFound, run=run.id, queue=queue, cause=f"queue {queue} has taken what it gave")
        else:
            self.emit(events.WaitingForRoom, run=run.id, queue=queue, cause=cause)
