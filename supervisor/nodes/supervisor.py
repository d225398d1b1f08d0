"""A supervisor in the tree: the books of its children, and the loop that keeps them as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import trio
from msgspec.structs import replace

from supervisor import events, restart
from supervisor.config.shapes import duration
from supervisor.errors import EssentialEnded, RestartIntensityExceeded, SupervisorError
from supervisor.kinds import JobSpec, Outcome, Run
from supervisor.nodes import attendance, ladder, reasons
from supervisor.nodes.inbox import Inbox, Timers
from supervisor.nodes.job import JobNode
from supervisor.nodes.node import STARTS, Ask, Hold, Life, Node
from supervisor.nodes.restarts import Restarts
from supervisor.spec import AutoShutdown, ChildSpec, Strategy, SupervisorSpec
from supervisor.state import Exit, Goal, Phase, State, Why
from supervisor.wall import written

if TYPE_CHECKING:
    from supervisor.nodes.schedule import Schedule
    from supervisor.tree import Supervisor


class Closing(NamedTuple):
    """Why a supervisor is ending, and what its end will be."""

    cause: str
    outcome: Outcome


class SupervisorNode(Node):
    """A supervisor: the books of its children, and the loop that keeps them as they should be."""

    spec: SupervisorSpec

    def __init__(self, tree: Supervisor, name: str, spec: SupervisorSpec, goal: Goal) -> None:
        super().__init__(tree, name, spec, goal)
        self.children: dict[str, Node] = {}
        self.precedence = restart.Precedence(Strategy.ONE_FOR_ONE, (), {})
        self.closing: Closing | None = None
        self.alive: set[str] = set()
        self.restarts = Restarts(self)
        self._hurrying = False
        self._pending: set[str] = set()
        self._places: dict[str, int] = {}
        self._ready_since: float | None = None
        self._dirty: dict[str, Node] = {}
        self._timers = Timers()
        self._nursery: trio.Nursery | None = None
        self._inbox = Inbox(self)

    @property
    def kind(self) -> str:
        return "supervisor"

    @property
    def grace(self) -> float:
        return math.inf  # its children have graces of their own

    @property
    def regime(self) -> SupervisorSpec:
        """The strategy and the limits in force."""
        return self.spec

    @property
    def running(self) -> bool:
        """Whether its loop is there to read the inbox."""
        return self._nursery is not None

    @property
    def satisfied(self) -> bool:
        return self.row.ready

    def turn_down(self, text: str, own: bool = True) -> None:
        if own:
            super().turn_down(text)
        for child in self.children.values():
            if child.moving_to is None:
                child.turn_down(text)

    def hurry(self) -> None:
        self._hurrying = True
        for child in self.children.values():
            child.hurry()

    # ---- the loop ----

    async def body(self, run: Run) -> Outcome:
        """Keep the children until asked to stop, or until too many of them fail. Ends with none of them alive."""
        try:
            async with trio.open_nursery() as nursery:
                self._begin(run, nursery)
                try:
                    outcome = await self._loop()
                except BaseException:
                    # A fault of ours (a supervisor is never cancelled by others): leave no child behind a shield.
                    self.kill_all("the supervisor's own loop failed")
                    raise
        finally:
            self._end()
        return outcome

    def _begin(self, run: Run, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.closing = None
        self._hurrying = False
        self._timers.clear()
        self.restarts.begin()
        self._pending = {name for name, child in self.children.items() if child.counts}
        for child in self.children.values():
            child.revive()
            child.due_at = child.restarting = None
        self.touch_all()
        run.on_stopping(lambda: self.post(self._asked_to_close))

    def _end(self) -> None:
        """What was posted after the last turn is handled all the same; then who was to leave, leaves."""
        self._ready_since = None
        self._inbox.empty()
        self._nursery = self.closing = None
        self._dirty.clear()
        for child in list(self.children.values()):
            self.reconsider(child)

    async def _loop(self) -> Outcome:
        self._settle()
        while self.closing is None or self.alive:
            await self._inbox.handle(until=self._timers.next)
            self._fire_timers()
            self._settle()
        return self.closing.outcome

    def post(self, method: Callable[..., None], *args: Any) -> None:
        """Have `method(*args)` called in the loop; at once where no loop is running."""
        if self.running:
            self._inbox.put(method, args)
        else:
            self._inbox.make(method, args)

    def touch(self, child: Node) -> None:
        """Settle `child` before the loop waits again."""
        self._dirty[child.name] = child

    def touch_all(self) -> None:
        """Settle every child."""
        self._dirty.update(self.children)

    # ---- the end of all: closing, killing, draining ----

    def _asked_to_close(self) -> None:
        cause = self.life.asked.cause if self.life is not None and self.life.asked else self.tree.ending
        self.close(cause, Outcome(reason="stopped", failed=False))

    def close(self, cause: str, outcome: Outcome) -> None:
        """Stop every child in reverse order, then end with `outcome`. The first call decides."""
        if self.closing is None:
            self.closing = Closing(cause, outcome)
            self.restarts.group = None
            self.turn_down(f"overtaken: {cause}", own=False)
            self.touch_all()

    def kill_all(self, reason: str) -> None:
        """Cancel every run below, at once and without a grace: for a fault of ours only."""
        self.tree.abandoned.set()
        for child in self.children.values():
            if isinstance(child, SupervisorNode):
                child.kill_all(reason)
            if child.life is not None:
                child.life.scope.cancel(reason=reason)

    def drain(self) -> None:
        """Take no new work: schedules stop, runs in hand are let finish; those that can hear it are told."""
        for child in self.children.values():
            life = child.life
            if life is None or life.asked is not None or isinstance(child, SupervisorNode):
                continue
            life.run.advance(Phase.DRAINING)
            if isinstance(child, JobNode) and child.in_hand:
                if child.kind == "command" and not child.spec.pooled:
                    child.emit(events.Draining, run=life.run.id, cause=self.tree.ending)
                else:
                    self.ask(child, life, Ask(self.tree.ending, why=Why.DRAINING))
        self.touch_all()

    def kill(self, child: Node, cause: str) -> None:
        """Go to the end of the ladder with one child, whatever it is doing."""
        if child.life is not None:
            if child.life.asked is None:
                self.ask(child, child.life, Ask(cause))
            child.hurry()

    # ---- timers ----

    def remind(self, child: Node | None, when: float) -> None:
        """Look at a child then, and at its schedule; None: at all of them."""
        self._timers.at(when, child)
        if len(self._timers) > 4 * len(self.children) + 64:
            self._timers.drop_idle()

    def _fire_timers(self) -> None:
        now = trio.current_time()
        for child in self._timers.due(now):
            if child is None:
                self.touch_all()
            elif child.parent is self:
                if child.schedule is not None:
                    child.schedule.look()
                self._replace_old(child, now)
                self.touch(child)

    def look(self, child: Node) -> None:
        """A tick of a child's schedule may have come."""
        if child.schedule is not None:
            child.schedule.look()
            self.touch(child)

    def _set_age(self, child: JobNode, life: Life) -> None:
        """Say when a run is to be replaced, and be there. Those that began together do not go together."""
        recycle = child.spec.recycle
        age = math.inf if recycle is None or recycle.age is None else recycle.age * self.tree.spread(0.9, 1.1)
        life.old_at = life.began + age
        if recycle is not None and recycle.age is not None:
            self.remind(child, life.old_at)

    def _replace_old(self, child: Node, now: float) -> None:
        """Have a run that is too old replaced, as if by a command that gives way to all others."""
        if child.life is not None and child.life.old_at <= now:
            assert isinstance(child, JobNode) and child.spec.recycle is not None
            child.recycle(f"recycled: it ran for {duration(child.spec.recycle.age or 0)}")

    # ---- settling: what should this child be doing? ----

    def _settle(self) -> None:
        while self._dirty:
            dirty, self._dirty = self._dirty, {}
            now = trio.current_time()
            for child in dirty.values():
                if child.parent is self:
                    self._settle_child(child, now)
            self.restarts.settle(now)
        self._announce()

    def _settle_child(self, child: Node, now: float) -> None:
        if child.life is not None:
            if child.life.asked is not None:
                ladder.climb(self, child, child.life, now)
            elif (ask := reasons.to_stop(self, child)) is not None:
                self.ask(child, child.life, ask)
        elif child.removing or child.moving_to:
            self._depart(child)
            return
        else:
            hold = reasons.to_hold(self, child, now)
            if hold is None:
                self._start(child, now)
            else:
                self._keep(child, hold)
        self._note(child)

    def _keep(self, child: Node, hold: Hold) -> None:
        """Leave it where it is, and say why where that is news. Who waits for a start that does not come is told."""
        if hold.rest:
            child.hold = None
            child.disarm()
            if child.row.state is State.WAITING:
                child.emit(events.Stopped, cause=hold.cause)
            if self.closing is None or self.tree.ending or self.down() is not None:
                ending = f"overtaken: {self.tree.ending}" if self.tree.ending else ""
                child.turn_down(ending or f"{child.name} is {child.row.word}: {child.row.cause}")
        elif hold != child.hold or child.row.state is State.STOPPED:
            child.hold = hold
            if hold.until is not None:
                self.remind(child, hold.until)
            child.emit(events.Waiting, cause=hold.cause, why=hold.why, next_at=hold.next_at or self.tree.wall_time(hold.until))
        if child.orders and hold.why in (Why.PAUSED, Why.SCHEDULED):
            if child.schedule is not None:
                paused = "its schedule is paused: use resume" if child.paused else ""
                child.answer(("start",), True, paused or "its schedule runs")
                child.answer(("restart", "reload"), True, paused or "its schedule begins anew")
            else:
                child.answer(STARTS, False, "paused: use resume")

    # ---- starting ----

    def _start(self, child: Node, now: float) -> None:
        assert self._nursery is not None
        child.runs += 1
        life = child.life = Life(Run(child.name, child.runs, child, self.tree.abandoned), child.runs)
        life.requested, child.requested = child.requested, False
        if isinstance(child, JobNode):
            life.due = child.take_due()
            life.run.scheduled_at = None if life.due is None else life.due.at
            attendance.begin(self, self._nursery, child, life)
            self._set_age(child, life)
        for_at = None if life.due is None else written(life.due.at)
        cause = self._start_cause(child, life)
        child.emit(events.Starting, run=life.run.id, cause=cause, restart=child.restarting is not None, for_at=for_at)
        child.due_at = child.hold = None
        child.hastened = False
        child.restarting = None
        child.succeeded = False
        self.alive.add(child.name)
        self._nursery.start_soon(self._live, child, life, name=life.run.id)

    def _start_cause(self, child: Node, life: Life) -> str:
        if life.due is not None:
            return life.due.cause
        if life.requested:
            return "a run was asked for"
        return f"restart: {child.restarting}" if child.restarting else child.goal_cause

    async def _live(self, child: Node, life: Life) -> None:
        """One run of a child, from start to gone."""
        outcome = None
        with life.scope:
            outcome = await child.body(life.run)
        life.over = True
        await attendance.end(life)
        self.post(self.on_ended, child, life, outcome or life.run.outcome or Outcome(reason="cancelled", failed=False))

    # ---- what happens to a child ----

    def on_ready(self, child: Node, life: Life, cause: str) -> None:
        """A run says that it is ready."""
        if child.life is not life or child.stopping:
            return
        if life.ready_at is None:
            life.ready_at = trio.current_time()
        if life.starting is not None:
            life.starting.cancel(reason="ready")
        child.emit(events.Ready, run=life.run.id, cause=cause)
        if child.whole:
            text = f"running, pid {child.row.pid}" if child.row.pid else "running"
            child.answer(("start", "restart", "reload"), True, text, run=life.number)
        self._note(child)

    def on_unready(self, child: Node, life: Life, cause: str) -> None:
        """A supervisor below has a child that is not ready any more."""
        if child.life is life and not child.stopping:
            child.emit(events.Unready, run=life.run.id, cause=cause)
            self._note(child)

    def on_scheduled(self, child: Node, life: Life, cause: str, why: Why, next_at: str | None) -> None:
        """A job whose runs may overlap has one more or less in hand, or another next one."""
        if child.life is life and not child.stopping:
            child.emit(events.Scheduled, cause=cause, why=why, next_at=next_at)

    def on_not_ready(self, child: JobNode, life: Life, reason: str) -> None:
        """A run has not become ready in time, or never will."""
        if child.life is life and life.asked is None and life.ready_at is None:
            self.ask(child, life, Ask(reason, Outcome(reason=reason, failed=True)))

    def on_ended(self, child: Node, life: Life, outcome: Outcome) -> None:
        """A run is over and nothing of it is alive: judge it, and decide what follows."""
        life.gone.set()
        child.life = None
        self.alive.discard(child.name)
        self.tree.rooms.leave(child)
        verdict = life.asked.verdict if life.asked else None
        outcome = outcome if verdict is None else replace(verdict, spent=outcome.spent, output=outcome.output)
        judged = life.asked is None or (verdict is not None and verdict.failed)
        no_failure = (False, Why.PLAIN if verdict is None else Why.CANCELLED)
        failure, why = restart.judge(child.restart_type, outcome.failed) if judged else no_failure
        self._record_end(child, life, outcome, failure, why)
        child.over(outcome)
        again, child.again = child.again, None
        if (schedule := self._schedule_of(child)) is not None:
            asked = life.asked is not None and life.asked.why is not Why.DRAINING
            cut_short = bool(self.tree.ending) and (asked or life.killed_after is not None)
            schedule.ended(life.due, cut_short)
            if judged:
                schedule.failure = outcome.reason if failure else None
        if again is not None:
            pass  # whatever it ended as: an operator has decided already
        elif judged:
            now = trio.current_time()
            self._decide(child, outcome, failure, restart.NEVER_READY if life.ready_at is None else now - life.ready_at, now)
        elif verdict is not None and child.schedule is None:
            child.finished = True  # cancelled: no failure, and not tried again
        self.tree.phases.look_whether_only_stuck()
        self.touch(child)
        if self.precedence.orders and (self.closing is not None or self.restarts.group is not None or child.removing):
            self.touch_all()

    def _schedule_of(self, child: Node) -> Schedule | None:
        """The schedule that the runs of a child are made for."""
        return child.schedule

    def _record_end(self, child: Node, life: Life, outcome: Outcome, failure: bool, why: Why) -> None:
        exit_ = Exit(reason=outcome.reason, at=events.wall_now(), code=outcome.code, signal=outcome.signal)
        cause = life.asked.cause if life.asked else outcome.reason
        child.emit(
            events.Ended, run=life.run.id, exit=exit_, failed=failure, cause=cause, why=why,
            duration=round(trio.current_time() - life.began, 6), attempts=life.run.attempt,
            spent=outcome.spent, output=outcome.output,
        )  # fmt: skip
        killed = _killed(life.killed_after)
        child.answer(("stop",), True, f"stopped{killed}")
        child.answer(("run-now",), not outcome.failed, outcome.reason, run=life.number)
        child.answer(("cancel",), True, f"{life.run.id}: {outcome.reason}{killed}")
        if life.asked is None or life.asked.verdict is not None:
            never = "; it never became ready" if failure and life.ready_at is None else ""
            child.answer(("start", "restart", "reload"), not failure, outcome.reason + never, run=life.number)

    # ---- decisions ----

    def _decide(self, child: Node, outcome: Outcome, failure: bool, ready_for: float, now: float) -> None:
        """What follows from an end that nobody asked for."""
        if child.schedule is not None:
            return
        if not restart.restarts(child.restart_type, failure):
            child.finished = True
            child.succeeded = not failure
            self._ended_for_good(child, outcome.reason, failure)
        elif self._has_other_plans(child):
            child.restarting = outcome.reason if child.goal is Goal.UP else None
        elif (cause := child.gives_up(now, outcome.reason)) is not None:
            child.finished = True
            child.emit(events.Stopped, cause=cause, why=Why.GAVE_UP)
            self._ended_for_good(child, cause, failure=True)
        elif isinstance(child, SupervisorNode) and child.spec.essential and outcome.failed:
            self._essential_ended(child.name, outcome.reason, failure=True)
        else:
            self.restarts.restart(child, outcome.reason, ready_for, now)

    def _has_other_plans(self, child: Node) -> bool:
        """Whether a failure changes nothing: it is to go down anyway, or its group is on its way down already."""
        if self.closing is not None or self.tree.ending:
            return True
        if child.goal is Goal.DOWN or child.removing or child.moving_to:
            return True
        return self.restarts.group_of(child) is not None

    def give_up(self, child: Node, reason: str) -> None:
        """Too many restarts, of which this is the last: end, and fail."""
        window = self.restarts.window
        assert window is not None
        limit, period = window.limit, window.period
        cause = f"more than {limit} restarts within {period:g} s; {child.name}: {reason}"
        self.emit_own(events.IntensityExceeded, cause, intensity=limit, period=period)
        self._end_by_itself(cause, RestartIntensityExceeded(self.name, limit, period))

    def _end_by_itself(self, cause: str, failure: SupervisorError | None = None) -> None:
        """End for a reason of its own; the root takes the whole daemon with it, in its phases."""
        if self.parent is None:
            self.tree.end(cause, failure)
        else:
            self._close_by_itself(Outcome(reason=cause, failed=failure is not None))

    def _close_by_itself(self, outcome: Outcome) -> None:
        if self.closing is None and self.life is not None and self.parent is not None:
            self.emit(events.Stopping, run=self.life.run.id, cause=outcome.reason)
            self.parent.post(self.parent.touch, self)
        self.close(outcome.reason, outcome)

    def _essential_ended(self, name: str, reason: str, failure: bool) -> None:
        error = EssentialEnded(name, reason) if failure else None
        self.tree.end(str(error) if error else f"essential {name} completed", error)

    def _ended_for_good(self, child: Node, reason: str, failure: bool) -> None:
        if child.spec.essential:
            self._essential_ended(child.name, reason, failure)
        if child.spec.significant and restart.significant_end(child.restart_type, failure):
            others_active = any(other.spec.significant and other.active for other in self.children.values())
            if restart.shuts_down(self.regime.auto_shutdown, others_active):
                which = "all" if self.regime.auto_shutdown is AutoShutdown.ALL_SIGNIFICANT else "one"
                self._end_by_itself(f"{which} of its significant children ended")

    def emit_own(self, kind: type[events.ChildEvent], cause: str, **fields: Any) -> None:
        """Record that something happened to this supervisor. The root has no row; it says it in words."""
        if self.parent is None:
            self.tree.journal.emit(events.Warned, text=cause)
        else:
            self.emit(kind, cause=cause, **fields)

    # ---- stopping ----

    def ask(self, child: Node, life: Life, ask: Ask) -> None:
        """Ask a run to end. It hears it at once; the rest of the ladder is climbed when its time comes, or when hurried."""
        if child.parent is not self and child.parent is not None:  # a plain job that has become a worker
            child.parent.post(child.parent.ask, child, life, ask)
            return
        if child.life is not life or life.asked is not None:
            return
        ladder.begin(self, child, life, ask, 0.0 if self._hurrying and isinstance(child, JobNode) else child.grace)
        self._note(child)

    # ---- readiness of the whole ----

    def _note(self, child: Node) -> None:
        """Keep the set of children that the whole still waits for, and tell those who wait for this one."""
        pending = child.counts and not child.satisfied and not child.succeeded
        (self._pending.add if pending else self._pending.discard)(child.name)
        noted = (child.satisfied, child.row.word)
        if noted != child.noted:
            child.noted = noted
            self.tree.tell_dependants(child.name)
            if self.precedence.chained:
                self._dirty.update({name: other for name, other in self.children.items() if other.life is None})

    def _announce(self) -> None:
        """Tell above when this supervisor becomes, or ceases to be, ready as a whole."""
        ready = not self._pending and self.closing is None
        self.restarts.note(ready, trio.current_time())
        if ready is (self._ready_since is not None):
            return
        self._ready_since = trio.current_time() if ready else None
        if self.parent is None:
            self.tree.root_ready.value = ready
        else:
            self._tell()

    def _tell(self) -> None:
        if self.parent is None or self.life is None:
            return
        if self._ready_since is not None:
            self.parent.post(self.parent.on_ready, self, self.life, self.summary)
        elif self.closing is None:
            self.parent.post(self.parent.on_unready, self, self.life, self.summary)

    @property
    def summary(self) -> str:
        """How far its children are, in one sentence."""
        return f"not ready: {', '.join(sorted(self._pending)[:5])}" if self._pending else "all its children are ready"

    # ---- what commands need ----

    def down(self) -> SupervisorNode | None:
        """The supervisor, this one or one above it, without which nothing starts here: it is down, or will be, and stays so."""
        if self.parent is None:
            return None
        if self.goal is Goal.DOWN or self.removing or (self.finished and self.life is None):
            return self
        return self.parent.down()

    def hasten_self(self) -> None:
        if (not self.running or self.closing is not None) and self.parent is not None:
            self.parent.post(self.parent.hasten, self)

    def hasten(self, child: Node) -> None:
        """End the backoff of a supervisor that somebody has a use for now: the one it is in, or the one it will be in."""
        child.due_at = None
        child.hastened = child.life is not None
        self.touch(child)
        self.hasten_self()

    # ---- reload: children come, change and go ----

    def adopt(self, child: Node) -> None:
        """Take a new child in; it starts as soon as the loop looks at it."""
        child.parent = self
        self.children[child.name] = child
        self.post(self.touch, child)
        if (down := self.down()) is not None:
            child.turn_down(f"its supervisor {down.name} is {down.row.word}")

    def arrange(self, precedence: restart.Precedence, names: Iterable[str]) -> None:
        """Put the children in this order; names that are not here yet keep their places."""
        self.precedence = precedence
        self._places = {name: at for at, name in enumerate(names)}
        self._sort()

    def _sort(self) -> None:
        last = len(self._places)
        self.children = dict(sorted(self.children.items(), key=lambda item: self._places.get(item[0], last)))

    def update(self, child: Node, spec: ChildSpec, again: str | None) -> None:
        """Give a child its new spec; with a cause in `again`, stop its run and start anew."""
        if child.parent is not self:  # it has left since this was posted
            return
        old, child.spec = child.spec, child.adapted(spec)
        child.respecified(old)
        if isinstance(child, JobNode) and isinstance(old, JobSpec) and child.life is not None:
            self._look_after_anew(child, child.life, old, again)
        if again is not None and child.life is not None:
            child.renew(again)
        elif again is not None and not (child.succeeded and isinstance(spec, JobSpec) and spec.once):
            child.forget_failures()  # they were those of another job
            child.revive()
        if isinstance(child, SupervisorNode):
            child.post(child.respec)
        child.emit(events.Changed, kind=child.kind, supervisor=self.name or None, description=child.description)
        self.touch(child)

    def _look_after_anew(self, child: JobNode, life: Life, old: JobSpec, again: str | None) -> None:
        """Have its run asked, and replaced, as its new spec says; not asked where it is about to end for that spec."""
        if again is None:
            nursery = self._nursery if self.parent is None or self.running else self.parent._nursery  # it was split just now
            assert nursery is not None
            attendance.renew(self, nursery, child, life, old)
        if old.recycle != child.spec.recycle:
            self._set_age(child, life)

    def respec(self) -> None:
        """Go on under the new spec of one's own."""
        self.restarts.resize()
        self.touch_all()

    def reconsider(self, child: Node) -> None:
        """Look again at a child that may have to leave."""
        if self.running:
            self.touch(child)
        elif child.life is None and (child.removing or child.moving_to):
            self._depart(child)

    def let_go(self) -> None:
        """It leaves the tree itself: those of its children that are to leave, leave first."""
        for child in list(self.children.values()):
            self.reconsider(child)

    def supplant(self, old: Node, new: Node) -> None:
        """Put another child in the place of one, under the same name. If the old one runs, so does the new one from now on."""
        old.parent, new.parent = None, self
        self.children[old.name] = new
        self._dirty.pop(old.name, None)
        if old.life is not None:
            self._start(new, trio.current_time())
        self.touch(new)

    def _depart(self, child: Node) -> None:
        """Let go of a child that is removed, or that moves to another supervisor, now that nothing of it is alive."""
        if isinstance(child, SupervisorNode):
            child.let_go()
        del self.children[child.name]
        child.parent = None
        child.due_at = child.restarting = child.hold = None
        self._pending.discard(child.name)
        self._dirty.pop(child.name, None)
        self.tree.rooms.leave(child)
        target, child.moving_to = child.moving_to, None
        if target is not None and child.removing is None:
            child.emit(events.Changed, kind=child.kind, supervisor=target.name or None, description=child.description)
            target.adopt(child)
            target._sort()
            return
        child.emit(events.Removed, cause=child.removing or "removed")
        child.answer(("stop",), True, "stopped and removed")
        child.dismiss(f"overtaken: {child.removing}")
        self.tree.forget(child)


def _killed(after: float | None) -> str:
    """What there is to say of a kill after so many seconds."""
    if after is None:
        return ""
    return f" (killed after {after:.3g} s)" if after >= 0.05 else " (killed at once)"
