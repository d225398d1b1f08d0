"""A supervisor in the tree: the books of its children, and the loop that keeps them as they should be."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import trio
from msgspec.structs import replace

from supervisor import events, restart
from supervisor.config.shapes import duration
from supervisor.errors import EssentialEnded, RestartIntensityExceeded, SupervisorError
from supervisor.kinds import JobSpec, Outcome, Run
from supervisor.kinds.context import does_not_end
from supervisor.nodes import attendance
from supervisor.nodes.job import JobNode
from supervisor.nodes.node import STARTS, STUCK_AFTER, Ask, Hold, Life, Node
from supervisor.spec import AutoShutdown, ChildSpec, Strategy, SupervisorSpec
from supervisor.state import Exit, Goal, Phase, State, Why
from supervisor.wall import written

if TYPE_CHECKING:
    from supervisor.nodes.schedule import Schedule
    from supervisor.tree import Supervisor


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
        self.group: Group | None = None
        self._hurrying = False
        self._pending: set[str] = set()
        self._places: dict[str, int] = {}
        self._ready_since: float | None = None
        self._ready_time = restart.ReadyTime()
        self._window: restart.Window | None = None
        self._group_delays = restart.Delays(tree.spread)
        self._dirty: dict[str, Node] = {}
        self._timers: list[tuple[float, int, Node | None]] = []
        self._timer_count = 0
        self._nursery: trio.Nursery | None = None
        self._send, self._receive = trio.open_memory_channel[tuple[Callable[..., None], tuple[Any, ...]]](math.inf)

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
        self.group = self.closing = None
        self._hurrying = False
        self._timers.clear()
        self._window = None
        self._resize_window()
        self._ready_time = restart.ReadyTime()
        self._pending = {name for name, child in self.children.items() if child.counts}
        for child in self.children.values():
            child.revive()
            child.due_at = child.restarting = None
        self.touch_all()
        run.on_stopping(lambda: self.post(self._asked_to_close))

    def _end(self) -> None:
        """What was posted after the last turn is handled all the same; then who was to leave, leaves."""
        self._ready_since = None
        while self._receive.statistics().current_buffer_used:
            self._take_waiting(25)
        self._nursery = self.closing = None
        self._dirty.clear()
        for child in list(self.children.values()):
            self.reconsider(child)

    async def _loop(self) -> Outcome:
        self._settle()
        while self.closing is None or self.alive:
            with trio.move_on_at(self._timers[0][0] if self._timers else math.inf):
                self._handle(*await self._receive.receive())
            self._take_waiting(25)
            self._fire_timers()
            self._settle()
        return self.closing.outcome

    def _take_waiting(self, most: int) -> None:
        """Handle what else has been posted, but give others their turn after so many."""
        for _ in range(most):
            try:
                posted = self._receive.receive_nowait()
            except trio.WouldBlock:
                return
            self._handle(*posted)

    def _handle(self, method: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Do what was posted. A child that has another supervisor by now is that one's affair."""
        own = getattr(method, "__self__", None) is self  # else a function, which gets the supervisor first
        child = next(iter(args if own else args[1:]), None)
        if not isinstance(child, Node) or child.parent is self or child.parent is None:
            method(*args)
        elif own:
            child.parent.post(getattr(child.parent, method.__name__), *args)
        else:
            child.parent.post(method, child.parent, *args[1:])

    def post(self, method: Callable[..., None], *args: Any) -> None:
        """Have `method(*args)` called in the loop; at once where no loop is running."""
        if self.running:
            self._send.send_nowait((method, args))
        else:
            self._handle(method, args)

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
            self.group = None
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

    # ---- timers: one heap, read by the loop ----

    def _at(self, when: float, child: Node | None) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, child))
        if len(self._timers) > 4 * len(self.children) + 64:
            self._drop_idle_timers()

    def _drop_idle_timers(self) -> None:
        """Keep one timer of each moment that is still waited for; commands have overtaken the others."""
        waited: dict[tuple[float, str], tuple[float, int, Node | None]] = {}
        for when, count, child in self._timers:
            if child is None or when in moments(child):
                waited[when, child.name if child is not None else ""] = (when, count, child)
        self._timers = list(waited.values())
        heapq.heapify(self._timers)

    def _fire_timers(self) -> None:
        now = trio.current_time()
        while self._timers and self._timers[0][0] <= now:
            _, _, child = heapq.heappop(self._timers)
            if child is None:
                self.touch_all()
            elif child.parent is self:
                if child.schedule is not None:
                    child.schedule.look()
                self._replace_old(child, now)
                self.touch(child)

    def remind(self, child: Node, when: float) -> None:
        """Have the schedule of a child looked at then."""
        self._at(when, child)

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
            self._at(life.old_at, child)

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
            if self.group is not None:
                self._settle_group(self.group, now)
        self._announce()

    def _settle_child(self, child: Node, now: float) -> None:
        if child.life is not None:
            if child.life.asked is not None:
                self._climb(child, child.life, now)
            elif (ask := self._reason_to_stop(child)) is not None:
                self.ask(child, child.life, ask)
        elif child.removing or child.moving_to:
            self._depart(child)
            return
        else:
            hold = self._reason_to_hold(child, now)
            if hold is None:
                self._start(child, now)
            else:
                self._keep(child, hold)
        self._note(child)

    def _reason_to_stop(self, child: Node) -> Ask | None:
        """Why its run should end now; None while it may go on, or while others must be gone before it."""
        if child.removing and self._may_leave(child):
            return Ask(child.removing)
        if child.moving_to:
            return Ask(f"moves to {child.moving_to.name or 'the root'}")
        if child.again is not None:
            return Ask(child.again)
        if child.goal is Goal.DOWN and not (child.life is not None and child.life.requested):
            return Ask(child.goal_cause)
        if self.closing is not None and self.precedence.may_stop(child.name, self.alive):
            return Ask(self.closing.cause)
        group = self.group
        if group is None or not group.stopping or child.name not in group.affected:
            return None
        return Ask(group.cause) if self.precedence.may_stop(child.name, self.alive & group.affected) else None

    def _may_leave(self, child: Node) -> bool:
        """Whether none of those who are removed with it, and come after it, is alive."""
        if not self.precedence.orders:
            return True
        return self.precedence.may_stop(child.name, {name for name in self.alive if self.children[name].removing})

    def _reason_to_hold(self, child: Node, now: float) -> Hold | None:
        """Why it should not start now; None when it should."""
        hold = self._reason_of_its_own(child, now)
        return self.tree.rooms.hold(child, hold) if self.tree.rooms else hold

    def _reason_of_its_own(self, child: Node, now: float) -> Hold | None:
        if self.closing is not None:
            return Hold(self.closing.cause, rest=True)
        if self.tree.ending:
            return Hold(self.tree.ending, rest=True)
        if (child.goal is Goal.DOWN or child.finished) and not child.requested:
            return Hold(child.goal_cause, rest=True)
        if child.paused and not child.requested and isinstance(child, JobNode) and not child.spec.pooled:
            return Hold("paused", Why.PAUSED)
        if self.group is not None and child.name in self.group.affected:
            return Hold(self.group.cause, Why.BACKOFF, self.group.until)
        if child.due_at is not None and now < child.due_at:
            return Hold(child.row.exit.reason if child.row.exit else "", Why.BACKOFF, child.due_at)
        return self._unmet(child) or child.hold_of_its_own(now)

    def _unmet(self, child: Node) -> Hold | None:
        """What must be ready first and is not."""
        for name in child.spec.after:
            target = self.tree.nodes.get(name)
            if target is not None and not target.satisfied:
                return Hold(f"waits for {name}{target.trouble}")
        for name in self.precedence.earlier(child.name):
            sibling = self.children.get(name)
            if sibling is not None and sibling.goal is Goal.UP and not sibling.finished and not sibling.satisfied:
                return Hold(f"waits for {name}, listed before it{sibling.trouble}")
        return None

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
                self._at(hold.until, child)
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
        self.tree.look_whether_only_stuck()
        self.touch(child)
        if self.precedence.orders and (self.closing is not None or self.group is not None or child.removing):
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
            self._restart(child, outcome.reason, ready_for, now)

    def _has_other_plans(self, child: Node) -> bool:
        """Whether a failure changes nothing: it is to go down anyway, or its group is on its way down already."""
        if self.closing is not None or self.tree.ending:
            return True
        if child.goal is Goal.DOWN or child.removing or child.moving_to:
            return True
        return self.group is not None and child.name in self.group.affected

    def _restart(self, child: Node, reason: str, ready_for: float, now: float) -> None:
        child.restarting = reason
        if self._window is not None and self._window.add(now):
            self._give_up(child, reason)
        elif self.regime.strategy is Strategy.ONE_FOR_ONE:
            wait = child.delays.after_failure(child.spec.backoff, ready_for)
            child.due_at = None if child.hastened else now + wait
        else:
            self._restart_group(child, reason, now)

    def _give_up(self, child: Node, reason: str) -> None:
        """Too many restarts: end, and fail."""
        assert self._window is not None
        limit, period = self._window.limit, self._window.period
        cause = f"more than {limit} restarts within {period:g} s; {child.name}: {reason}"
        self._emit_own(events.IntensityExceeded, cause, intensity=limit, period=period)
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

    def _restart_group(self, failed: Node, reason: str, now: float) -> None:
        names = restart.affected(self.regime.strategy, list(self.children), failed.name)
        wait = self._group_delays.after_failure(self.spec.backoff, self._ready_time.take(now))
        cause = f"{failed.name} failed: {reason}"
        self._emit_own(events.GroupRestarting, cause, affected=names, wait=wait)
        group = Group(cause, names, wait)
        if self.group is not None:
            group.affected |= self.group.affected
            group.let_down |= self.group.let_down
        self.group = group
        for child in map(self.children.__getitem__, names):
            if child.life is not None and child.temporary:
                group.let_down.add(child.name)
            elif child.life is not None:
                child.restarting = cause
            self.touch(child)

    def _settle_group(self, group: Group, now: float) -> None:
        """Move the group operation on: all gone -> wait -> those whose goal is up may start."""
        if group.stopping and not self.alive & group.affected:
            group.until = now + group.wait
            self._at(group.until, None)
            self._dirty.update({name: self.children[name] for name in group.affected & self.children.keys()})
        if group.until is not None and group.until <= now:
            self.group = None
            for name in group.affected & self.children.keys():
                child = self.children[name]
                if name in group.let_down:
                    child.finished = True
                elif not child.temporary:
                    child.revive()
                self.touch(child)

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

    def _emit_own(self, kind: type[events.ChildEvent], cause: str, **fields: Any) -> None:
        """Record that something happened to this supervisor. The root has no row; it says it in words."""
        if self.parent is None:
            self.tree.journal.emit(events.Warned, text=cause)
        else:
            self.emit(kind, cause=cause, **fields)

    # ---- stopping: one ladder for every kind ----

    def ask(self, child: Node, life: Life, ask: Ask) -> None:
        """Ask a run to end. It hears it at once; the rest of the ladder is climbed when its time comes, or when hurried."""
        if child.parent is not self and child.parent is not None:  # a plain job that has become a worker
            child.parent.post(child.parent.ask, child, life, ask)
            return
        if child.life is not life or life.asked is not None:
            return
        life.asked = ask
        life.asked_at = trio.current_time()
        if life.probed is not None:
            life.probed.cancel("asked to stop")
        child.emit(events.Stopping, run=life.run.id, cause=ask.cause, why=ask.why)
        life.run.advance(Phase.STOPPING)
        grace = 0.0 if self._hurrying and isinstance(child, JobNode) else child.grace
        self._await_rung(child, life, life.asked_at + grace)
        self._note(child)

    def _await_rung(self, child: Node, life: Life, when: float) -> None:
        """Have the next rung of the ladder climbed at `when`."""
        life.rung_due = when
        if when <= trio.current_time():
            self.touch(child)
        elif when < math.inf:
            self._at(when, child)

    def _climb(self, child: Node, life: Life, now: float) -> None:
        """The ladder: ask (done), wait for the grace, kill; then say what cannot be killed."""
        if now < life.rung_due or life.over:
            return
        life.rung_due = math.inf
        if life.killed_after is None:
            self._kill_run(child, life, now)
        elif child.row.word != Why.STUCK.value:
            life.run.stuck(
                does_not_end(life.run) if child.takes == "thread" else f"still there {STUCK_AFTER:g} s after it was killed"
            )

    def _kill_run(self, child: Node, life: Life, now: float) -> None:
        assert life.asked is not None
        life.run.advance(Phase.KILLING)
        life.killed_after = now - life.asked_at
        self.tree.was_late(child.name)
        if not child.killable:
            life.run.stuck(does_not_end(life.run))
            return
        child.emit(events.Killing, run=life.run.id, cause=f"did not end in its grace: {life.asked.cause}")
        life.scope.cancel(reason=life.asked.cause)
        self._await_rung(child, life, now + STUCK_AFTER)

    def extend(self, child: Node, life: Life, seconds: float) -> None:
        """Give a run at least so many seconds from now for what it has in hand: its start, or its end. A kill stays one."""
        now = trio.current_time()
        if life.asked is None:
            if life.starting is not None:
                life.starting.deadline = max(life.starting.deadline, now + seconds)
        elif life.killed_after is None and now < life.rung_due < now + seconds:
            self._await_rung(child, life, now + seconds)

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
        self._ready_time.note(ready and self.group is None, trio.current_time())
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
        self._resize_window()
        self.touch_all()

    def _resize_window(self) -> None:
        limit, period = self.regime.limit, self.regime.period
        if limit is None:
            self._window = None
        elif self._window is None:
            self._window = restart.Window(limit, period)
        else:
            self._window = self._window.resized(limit, period)

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


def moments(child: Node) -> Iterator[float | None]:
    """What moments of time a child waits for."""
    yield child.hold and child.hold.until
    yield None if child.life is None else child.life.rung_due
    yield None if child.life is None else child.life.old_at
    if child.schedule is not None:
        yield child.schedule.wakes_at


def _killed(after: float | None) -> str:
    """What there is to say of a kill after so many seconds."""
    if after is None:
        return ""
    return f" (killed after {after:.3g} s)" if after >= 0.05 else " (killed at once)"
