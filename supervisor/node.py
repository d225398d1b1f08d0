"""The nodes of the tree: a supervisor, and the children it keeps. Only `tree.py` knows them.

A supervisor is one task with one inbox. What happens to its children (a run is ready, a run is over, a timer is due, an
operator asks) is posted there; the loop updates its books, *touches* the children concerned and *settles* each of them: it
compares what the child should be doing with what it does, and starts or asks it to stop. Settling is level-triggered, so a
command is nothing but a changed goal, and every command is answered in every state. Nothing is awaited in the loop: runs,
stop ladders and readiness waits are tasks of their own that report back through the inbox.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
import trio

from supervisor import events, restart
from supervisor.errors import EssentialEnded, InternalError, RestartIntensityExceeded, RunFailed, SpawnFailed, SupervisorError
from supervisor.kinds import KINDS, JobSpec, Outcome, Run
from supervisor.kinds.function import kind_of, load
from supervisor.probes import FreshFile
from supervisor.shapes import duration
from supervisor.spec import AutoShutdown, ChildSpec, RestartType, Strategy, SupervisorSpec
from supervisor.state import Answer, Exit, Goal, JobStatus, Phase, State, Why

if TYPE_CHECKING:
    from supervisor.tree import Supervisor

log = structlog.get_logger("supervisor")

STUCK_AFTER = 5.0
"""Seconds after a kill at which what is still there is called stuck."""

NEVER_READY = -1.0

PASSING = (trio.Cancelled, KeyboardInterrupt, InternalError)
"""What no boundary round foreign code may stop."""


class Order:
    """One command on one name. `wait` gives what it came to; the command itself has already been obeyed."""

    def __init__(self, name: str, verb: str, by: str | None, after_run: int = 0) -> None:
        self.name = name
        self.verb = verb
        self.by = by
        self.after_run = after_run
        self._answer: Answer | None = None
        self._done = trio.Event()

    def resolve(self, ok: bool, text: str) -> Order:
        """Settle it; only the first time counts."""
        if self._answer is None:
            self._answer = Answer(name=self.name, ok=ok, text=text)
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
    """Why a child does not run although nothing of it is alive; `until` is on Trio's clock. `rest`: nor will it by itself."""

    cause: str
    why: Why = Why.PLAIN
    until: float | None = None
    rest: bool = False


class Life:
    """One run of a child, from start to gone."""

    __slots__ = ("asked", "gone", "killed_after", "number", "patience", "ready_at", "run", "scope", "starting")

    def __init__(self, run: Run, number: int) -> None:
        self.run = run
        self.number = number
        self.asked: Ask | None = None
        self.ready_at: float | None = None
        self.gone = trio.Event()
        self.killed_after: float | None = None
        """Seconds from being asked to being killed."""
        self.scope = trio.CancelScope(shield=True)
        """Only the ladder cancels it: a tree that is cancelled from outside still drains."""
        self.patience: trio.CancelScope | None = None
        self.starting: trio.CancelScope | None = None

    def hurry(self) -> None:
        """End the grace now."""
        if self.patience is not None:
            self.patience.cancel(reason="told to hurry")


class Node:
    """The child of a supervisor: what a job and a supervisor have in common."""

    # A thousand children are common: slots halve what a node weighs.
    __slots__ = (
        "again", "delays", "due_at", "finished", "goal", "goal_cause", "hastened", "hold", "life", "moving_to", "name", "noted",
        "orders", "parent", "removing", "restarting", "runs", "spec", "succeeded", "tree",
    )  # fmt: skip

    killable = True

    def __init__(self, tree: Supervisor, name: str, spec: ChildSpec, goal: Goal) -> None:
        self.tree = tree
        self.name = name
        self.spec = spec
        self.parent: SupervisorNode | None = None
        self.goal = goal
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

    def hurry(self) -> None:
        """End the grace of a stop under way."""
        if self.life is not None:
            self.life.hurry()

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

    def set_goal(self, goal: Goal, cause: str, by: str | None) -> None:
        """Want it up or down from now on."""
        self.goal_cause = cause
        if goal is not self.goal:
            self.goal = goal
            self.emit(events.GoalSet, goal=goal, cause=cause, by=by)

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
        self.emit(events.Stuck, run=run.id, cause=cause, pids=pids)
        self.tree.look_whether_only_stuck()

    def progress(self, run: Run, done: float, total: float | None) -> None:
        """See `Reporter`."""
        self.emit(events.Progress, run=run.id, done=done, total=total)

    def output_lost(self, run: Run, count: int, cause: str) -> None:
        """See `Reporter`."""
        self.emit(events.OutputLost, cause=cause, bytes=count)


class JobNode(Node):
    """A job."""

    __slots__ = ("_failures", "_kind", "anchor", "next_tick", "paused", "requested")

    spec: JobSpec

    def __init__(self, tree: Supervisor, name: str, spec: JobSpec, goal: Goal) -> None:
        super().__init__(tree, name, spec, goal)
        self.paused = False
        self.requested = False
        self.anchor: float | None = None
        self.next_tick: float | None = None
        self._failures: restart.Window | None = None
        self._kind: str | None = None

    @property
    def kind(self) -> str:
        return self._kind or self.spec.kind or ("command" if self.spec.command is not None else self.infer_kind())

    def infer_kind(self) -> str:
        """Look at the function. One that does not import is called a task; its run will say what is wrong."""
        try:
            self._kind = kind_of(load(self.spec.call or ""))
        except RunFailed:
            return "task"
        return self._kind

    @property
    def killable(self) -> bool:  # type: ignore[override]
        return KINDS[self.kind].killable

    @property
    def restart_type(self) -> RestartType:
        return self.spec.restart_type

    @property
    def temporary(self) -> bool:
        return self.restart_type is RestartType.TEMPORARY and not self.spec.scheduled

    @property
    def grace(self) -> float:
        return self.spec.grace

    @property
    def description(self) -> str:
        return self.spec.description

    @property
    def satisfied(self) -> bool:
        if self.spec.scheduled:
            return self.next_tick is not None and not self.paused
        if self.spec.once:
            return self.succeeded
        return self.life is not None and self.life.ready_at is not None and self.life.asked is None

    @property
    def counts(self) -> bool:
        return self.goal is Goal.UP and self.spec.start == "auto"

    @property
    def in_hand(self) -> bool:
        """Whether it has a run that is to come to an end by itself."""
        return self.life is not None and not self.spec.service

    async def body(self, run: Run) -> Outcome:
        """One run, fenced: whatever foreign code raises becomes an outcome."""
        try:
            return await KINDS[self.kind].run(self.spec, run, self.tree.resources)
        except BaseException as error:
            return stopped_at_fence(run, error)

    def gives_up(self, now: float) -> bool:
        """Count a failure; True when `give_up` says that it was the last."""
        limit = self.spec.give_up
        if limit is None:
            return False
        if self._failures is None or (self._failures.limit, self._failures.period) != (limit.failures - 1, limit.within):
            self._failures = restart.Window(limit.failures - 1, limit.within)
        return self._failures.add(now)

    def respecified(self, old: JobSpec) -> None:
        """Take in what a new spec changes beyond the run itself."""
        self._kind = None
        if old.every != self.spec.every:
            self.disarm()
        if old.start != self.spec.start:
            self.set_goal(Goal.UP if self.spec.start == "auto" else Goal.DOWN, "its `start` was changed", None)

    def forget_failures(self) -> None:
        super().forget_failures()
        self._failures = None

    # schedule

    def arm(self, now: float) -> None:
        """Begin the schedule here: the ticks are whole intervals from now, the first one now with `run_on_start`."""
        assert self.spec.every is not None
        self.anchor = now
        self.next_tick = now if self.spec.run_on_start else now + self.spec.every

    @property
    def rhythm(self) -> str:
        """The schedule in words."""
        return f"runs every {duration(self.spec.every or 0)}"

    def disarm(self) -> None:
        """No more ticks."""
        self.anchor = self.next_tick = None

    def advance(self, now: float) -> None:
        """Go on to the first tick after now, in step with the anchor."""
        assert self.anchor is not None and self.spec.every is not None
        passed = math.floor((now - self.anchor) / self.spec.every)
        self.next_tick = self.anchor + (passed + 1) * self.spec.every
        if self.next_tick <= now:  # the division was rounded down
            self.next_tick = self.anchor + (passed + 2) * self.spec.every

    def hold_of_its_own(self, now: float) -> Hold | None:
        if self.requested or not self.spec.scheduled:
            return None
        if self.next_tick is None:
            self.arm(now)
        assert self.next_tick is not None
        if now < self.next_tick:
            return Hold(self.rhythm, Why.SCHEDULED, self.next_tick)
        return None


def stopped_at_fence(run: Run, error: BaseException) -> Outcome:
    """The run boundary: an exception of foreign code becomes an outcome. Cancellation and Ctrl-C are raised again."""
    passing, own = _split(error)
    if own is None:
        raise error
    run.outcome = _failure(run, own)
    if passing is not None:
        raise passing from None
    return run.outcome


def _split(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """What must pass through a boundary, and what stops at it.

    A Cancelled passes where the run is being cancelled. Elsewhere it was kept from another time: an error like any other.
    """
    cancelled = trio.current_effective_deadline() == -math.inf
    passing = PASSING if cancelled else tuple(kind for kind in PASSING if kind is not trio.Cancelled)
    if isinstance(error, BaseExceptionGroup):
        return error.split(passing)
    return (error, None) if isinstance(error, passing) else (None, error)


def _failure(run: Run, error: BaseException) -> Outcome:
    """The outcome of a run that raised. Its traceback goes to the log, once; expected failures have none to show."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    raised = error.__cause__ if isinstance(error, RunFailed) else error
    if raised is not None and not isinstance(error, SpawnFailed):
        log.error("job raised", job=run.job, run=run.id, exc_info=raised)
    if isinstance(error, RunFailed):
        return Outcome(reason=str(error), failed=True)
    first_line = _text(error).partition("\n")[0][:200]
    return Outcome(reason=f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__, failed=True)


def _text(error: BaseException) -> str:
    """What an exception of foreign code says; its `__str__` is foreign code too, and may give what is no UTF-8."""
    try:
        return str(error).encode("utf-8", "backslashreplace").decode()
    except Exception as worse:
        return f"its text cannot be had: {type(worse).__name__}"


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
        self._group: Group | None = None
        self._hurrying = False
        self._pending: set[str] = set()
        self._places: dict[str, int] = {}
        self._ready_since: float | None = None
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
        self._group = self.closing = None
        self._hurrying = False
        self._timers.clear()
        self._window = None if self.spec.limit is None else restart.Window(self.spec.limit, self.spec.period)
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
            self._take_waiting(100)
        self._nursery = self.closing = None
        self._dirty.clear()
        for child in list(self.children.values()):
            self.reconsider(child)

    async def _loop(self) -> Outcome:
        self._settle()
        while self.closing is None or self.alive:
            with trio.move_on_at(self._timers[0][0] if self._timers else math.inf):
                method, args = await self._receive.receive()
                method(*args)
                self._take_waiting(100)
            self._fire_timers()
            self._settle()
        return self.closing.outcome

    def _take_waiting(self, most: int) -> None:
        """Handle what else has been posted, but give others their turn after so many."""
        for _ in range(most):
            try:
                method, args = self._receive.receive_nowait()
            except trio.WouldBlock:
                return
            method(*args)

    def post(self, method: Callable[..., None], *args: Any) -> None:
        """Have `method(*args)` called in the loop; at once where no loop is running."""
        if self.running:
            self._send.send_nowait((method, args))
        else:
            method(*args)

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
            self._group = None
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
                if child.kind == "command":
                    child.emit(events.Draining, run=life.run.id, cause=self.tree.ending)
                else:
                    self._ask(child, life, Ask(self.tree.ending, why=Why.DRAINING))
        self.touch_all()

    def kill(self, child: Node, cause: str) -> None:
        """Go to the end of the ladder with one child, whatever it is doing."""
        if child.life is not None:
            if child.life.asked is None:
                self._ask(child, child.life, Ask(cause))
            child.life.hurry()

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
            if child is None or when in (child.hold and child.hold.until, isinstance(child, JobNode) and child.next_tick):
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
                self._skip_tick(child, now)
                self.touch(child)

    def _skip_tick(self, child: Node, now: float) -> None:
        """A tick while a run is in hand makes no run (`overlap = "skip"`), and says so."""
        if not isinstance(child, JobNode) or child.life is None or child.paused:
            return
        if child.next_tick is not None and child.next_tick <= now:
            child.emit(events.Skipped, cause=f"{child.life.run.id} is still running")
            self._advance(child, now)

    def _advance(self, child: JobNode, now: float) -> None:
        child.advance(now)
        if child.next_tick is not None:
            self._at(child.next_tick, child)

    # ---- settling: what should this child be doing? ----

    def _settle(self) -> None:
        while self._dirty:
            dirty, self._dirty = self._dirty, {}
            now = trio.current_time()
            for child in dirty.values():
                if child.parent is self:
                    self._settle_child(child, now)
            if self._group is not None:
                self._settle_group(self._group, now)
        self._announce()

    def _settle_child(self, child: Node, now: float) -> None:
        if child.life is not None:
            ask = self._reason_to_stop(child)
            if ask is not None and child.life.asked is None:
                self._ask(child, child.life, ask)
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
        if child.goal is Goal.DOWN and not (isinstance(child, JobNode) and child.requested):
            return Ask(child.goal_cause)
        if self.closing is not None and self.precedence.may_stop(child.name, self.alive):
            return Ask(self.closing.cause)
        group = self._group
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
        if self.closing is not None:
            return Hold(self.closing.cause, rest=True)
        if self.tree.ending:
            return Hold(self.tree.ending, rest=True)
        if (child.goal is Goal.DOWN or child.finished) and not (isinstance(child, JobNode) and child.requested):
            return Hold(child.goal_cause, rest=True)
        if isinstance(child, JobNode) and child.paused and not child.requested:
            return Hold("paused", Why.PAUSED)
        if self._group is not None and child.name in self._group.affected:
            return Hold(self._group.cause, Why.BACKOFF, self._group.until)
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
            if isinstance(child, JobNode):
                child.disarm()
            if child.row.state is State.WAITING:
                child.emit(events.Stopped, cause=hold.cause)
            if self.closing is None or self.tree.ending or self.down() is not None:
                child.turn_down(f"{child.name} is {child.row.word}: {child.row.cause}")
        elif hold != child.hold or child.row.state is State.STOPPED:
            child.hold = hold
            if hold.until is not None:
                self._at(hold.until, child)
            child.emit(events.Waiting, cause=hold.cause, why=hold.why, next_at=self.tree.wall_time(hold.until))
        if child.orders and hold.why in (Why.PAUSED, Why.SCHEDULED):
            if isinstance(child, JobNode) and child.spec.scheduled:
                paused = "its schedule is paused: use resume" if child.paused else ""
                child.answer(("start",), True, paused or "its schedule runs")
                child.answer(("restart", "reload"), True, paused or "its schedule begins anew")
            else:
                child.answer(STARTS, False, "paused: use resume")

    # ---- starting ----

    def _start(self, child: Node, now: float) -> None:
        assert self._nursery is not None
        cause = self._start_cause(child)
        if isinstance(child, JobNode):
            child.requested = child.requested and child.goal is Goal.DOWN
            if child.next_tick is not None and child.next_tick <= now:
                self._advance(child, now)
        child.runs += 1
        life = child.life = Life(Run(child.name, child.runs, child, self.tree.abandoned), child.runs)
        if isinstance(child, JobNode) and child.spec.ready is not None:
            life.starting = trio.CancelScope()
            fresh = FreshFile(child.spec.ready.file) if child.spec.ready.file else None
            self._nursery.start_soon(self._await_ready, child, life, fresh)
        child.emit(events.Starting, run=life.run.id, cause=cause, restart=child.restarting is not None)
        child.due_at = child.hold = None
        child.hastened = False
        child.restarting = None
        child.succeeded = False
        self.alive.add(child.name)
        self._nursery.start_soon(self._live, child, life, name=life.run.id)

    def _start_cause(self, child: Node) -> str:
        if isinstance(child, JobNode) and child.requested:
            return "a run was asked for"
        if child.restarting:
            return f"restart: {child.restarting}"
        return child.rhythm if isinstance(child, JobNode) and child.spec.scheduled else child.goal_cause

    async def _live(self, child: Node, life: Life) -> None:
        """One run of a child, from start to gone."""
        outcome = None
        with life.scope:
            outcome = await child.body(life.run)
        self.post(self._on_ended, child, life, outcome or life.run.outcome or Outcome(reason="cancelled", failed=False))

    async def _await_ready(self, child: JobNode, life: Life, fresh: FreshFile | None) -> None:
        """Wait for a run to get ready, at most `start_timeout`. What is no file, the run itself reports."""
        assert life.starting is not None
        with life.starting:
            reason = f"not ready within {child.spec.start_timeout:g} s (start_timeout)"
            with trio.move_on_after(child.spec.start_timeout):
                try:
                    if fresh is None:
                        await trio.sleep_forever()
                    else:
                        await fresh.wait()
                        life.run.ready("its file is there")
                        return
                except RunFailed as error:
                    reason = str(error)
            self.post(self._on_not_ready, child, life, reason)

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
        text = f"running, pid {child.row.pid}" if child.row.pid else "running"
        child.answer(("start", "restart", "reload"), True, text, run=life.number)
        self._note(child)

    def on_unready(self, child: Node, life: Life, cause: str) -> None:
        """A supervisor below has a child that is not ready any more."""
        if child.life is life and not child.stopping:
            child.emit(events.Unready, run=life.run.id, cause=cause)
            self._note(child)

    def _on_not_ready(self, child: JobNode, life: Life, reason: str) -> None:
        if child.life is life and life.asked is None and life.ready_at is None:
            self._ask(child, life, Ask(reason, Outcome(reason=reason, failed=True)))

    def _on_ended(self, child: Node, life: Life, outcome: Outcome) -> None:
        """A run is over and nothing of it is alive: judge it, and decide what follows."""
        life.gone.set()
        if life.starting is not None:
            life.starting.cancel(reason="gone")
        child.life = None
        self.alive.discard(child.name)
        verdict = life.asked.verdict if life.asked else None
        outcome = verdict or outcome
        judged = life.asked is None or (verdict is not None and verdict.failed)
        failure, why = restart.judge(child.restart_type, outcome.failed) if judged else (False, Why.PLAIN)
        self._record_end(child, life, outcome, failure, why)
        again, child.again = child.again, None
        if isinstance(child, JobNode):
            child.requested = False
        if again is not None:
            pass  # whatever it ended as: an operator has decided already
        elif judged:
            now = trio.current_time()
            self._decide(child, outcome, failure, NEVER_READY if life.ready_at is None else now - life.ready_at, now)
        elif verdict is not None and not (isinstance(child, JobNode) and child.spec.scheduled):
            child.finished = True  # cancelled: no failure, and not tried again
        self.tree.look_whether_only_stuck()
        self.touch(child)
        if self.precedence.orders and (self.closing is not None or self._group is not None or child.removing):
            self.touch_all()

    def _record_end(self, child: Node, life: Life, outcome: Outcome, failure: bool, why: Why) -> None:
        at = self.tree.wall_time(trio.current_time()) or ""
        exit_ = Exit(reason=outcome.reason, at=at, code=outcome.code, signal=outcome.signal)
        cause = life.asked.cause if life.asked else outcome.reason
        child.emit(events.Ended, run=life.run.id, exit=exit_, failed=failure, cause=cause, why=why)
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
        if isinstance(child, JobNode) and child.spec.scheduled:
            return
        if not restart.restarts(child.restart_type, failure):
            child.finished = True
            child.succeeded = not failure
            self._ended_for_good(child, outcome.reason, failure)
        elif self._has_other_plans(child):
            child.restarting = outcome.reason if child.goal is Goal.UP else None
        elif isinstance(child, JobNode) and child.spec.give_up is not None and child.gives_up(now):
            limit = child.spec.give_up
            child.finished = True
            cause = f"{limit.failures} failures within {limit.within:g} s, the last: {outcome.reason}"
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
        return self._group is not None and child.name in self._group.affected

    def _restart(self, child: Node, reason: str, ready_for: float, now: float) -> None:
        child.restarting = reason
        if self._window is not None and self._window.add(now):
            self._give_up(f"more than {self._window.limit} restarts within {self._window.period:g} s; {child.name}: {reason}")
        elif self.spec.strategy is Strategy.ONE_FOR_ONE:
            wait = child.delays.after_failure(child.spec.backoff, ready_for)
            child.due_at = None if child.hastened else now + wait
        else:
            self._restart_group(child, reason, now)

    def _give_up(self, cause: str) -> None:
        assert self._window is not None
        limit, period = self._window.limit, self._window.period
        self._emit_own(events.IntensityExceeded, cause, intensity=limit, period=period)
        self._end_by_itself(cause, RestartIntensityExceeded(self.name, limit, period))

    def _end_by_itself(self, cause: str, failure: SupervisorError | None = None) -> None:
        """End for a reason of its own; the root takes the whole daemon with it, in its phases."""
        if self.parent is None:
            self.tree.end(cause, failure)
        else:
            if self.closing is None and self.life is not None:
                self.emit(events.Stopping, run=self.life.run.id, cause=cause)
                self.parent.post(self.parent.touch, self)
            self.close(cause, Outcome(reason=cause, failed=failure is not None))

    def _restart_group(self, failed: Node, reason: str, now: float) -> None:
        names = restart.affected(self.spec.strategy, list(self.children), failed.name)
        ready_for = NEVER_READY if self._ready_since is None else now - self._ready_since
        wait = self._group_delays.after_failure(self.spec.backoff, ready_for)
        cause = f"{failed.name} failed: {reason}"
        self._emit_own(events.GroupRestarting, cause, affected=names, wait=wait)
        group = Group(cause, names, wait)
        if self._group is not None:
            group.affected |= self._group.affected
            group.let_down |= self._group.let_down
        self._group = group
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
            self._group = None
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
            if restart.shuts_down(self.spec.auto_shutdown, others_active):
                which = "all" if self.spec.auto_shutdown is AutoShutdown.ALL_SIGNIFICANT else "one"
                self._end_by_itself(f"{which} of its significant children ended")

    def _emit_own(self, kind: type[events.ChildEvent], cause: str, **fields: Any) -> None:
        """Record that something happened to this supervisor. The root has no row; it says it in words."""
        if self.parent is None:
            self.tree.journal.emit(events.Warned, text=cause)
        else:
            self.emit(kind, cause=cause, **fields)

    # ---- stopping: one ladder for every kind ----

    def _ask(self, child: Node, life: Life, ask: Ask) -> None:
        """Ask a run to end. It hears it at once; the rest of the ladder is a task of its own."""
        assert self._nursery is not None
        life.asked = ask
        grace = 0.0 if self._hurrying and isinstance(child, JobNode) else child.grace
        life.patience = trio.CancelScope(deadline=trio.current_time() + grace)
        child.emit(events.Stopping, run=life.run.id, cause=ask.cause, why=ask.why)
        life.run.advance(Phase.STOPPING)
        self._nursery.start_soon(self._ladder, child, life, ask)
        self._note(child)

    async def _ladder(self, child: Node, life: Life, ask: Ask) -> None:
        """Ask (done), wait for the grace, kill; and say what cannot be killed."""
        assert life.patience is not None
        asked_at = trio.current_time()
        with life.patience:
            await life.gone.wait()
        if life.gone.is_set():  # also where the grace ended in the same moment
            return
        life.run.advance(Phase.KILLING)
        life.killed_after = trio.current_time() - asked_at
        self.tree.was_late(child.name)
        if not child.killable:
            life.run.stuck(f"thread {life.run.id} does not end, and a thread cannot be killed")
            return
        child.emit(events.Killing, run=life.run.id, cause=f"did not end in its grace: {ask.cause}")
        life.scope.cancel(reason=ask.cause)
        with trio.move_on_after(STUCK_AFTER):
            await life.gone.wait()
        if not life.gone.is_set() and child.row.word != Why.STUCK.value:
            life.run.stuck(f"still there {STUCK_AFTER:g} s after it was killed")

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
        if ready is (self._ready_since is not None):
            return
        self._ready_since = trio.current_time() if ready else None
        if self.parent is None:
            self.tree.root_ready.value = ready
        elif self.life is not None:
            if ready:
                self.parent.post(self.parent.on_ready, self, self.life, "all its children are ready")
            elif self.closing is None:
                waiting = sorted(self._pending)
                self.parent.post(self.parent.on_unready, self, self.life, f"not ready: {', '.join(waiting[:5])}")

    # ---- commands: each changes what is wanted, and lets settling do the rest ----

    def command(self, child: Node, order: Order, options: dict[str, Any]) -> None:
        """Obey one order about one child, at once."""
        if child.parent is not self:  # it has left since this was posted
            if child.parent is None:
                order.resolve(False, f"{child.name} is gone: {child.removing}")
            else:
                child.parent.post(child.parent.command, child, order, options)
            return
        refusal = self._refusal(child, order.verb)
        if refusal is not None:
            order.resolve(False, refusal)
            return
        COMMANDS[order.verb](self, child, order, **options)
        self.touch(child)

    def _refusal(self, child: Node, verb: str) -> str | None:
        """Why this verb makes no sense for this child; None where it does."""
        if isinstance(child, SupervisorNode):
            if verb not in ("start", "stop", "restart", "reload"):
                return f"{child.name} is a supervisor"
        elif isinstance(child, JobNode) and child.spec.service and verb in SERVICE_REFUSES:
            return f"{child.name} is a service: use {SERVICE_REFUSES[verb]}"
        if verb in STARTS:
            if self.tree.ending:
                return f"the daemon is stopping: {self.tree.ending}"
            if (down := (child.moving_to or self).down()) is not None:
                return f"its supervisor {down.name} is {down.row.word}; start that first: supervisor start {down.name}"
            if child.removing:
                return f"{child.name} is leaving: {child.removing}"
        return None

    def down(self) -> SupervisorNode | None:
        """The supervisor, this one or one above it, without which nothing starts here: it is down, or will be, and stays so."""
        if self.parent is None:
            return None
        if self.goal is Goal.DOWN or self.removing or (self.finished and self.life is None):
            return self
        return self.parent.down()

    def _want_up(self, child: Node, order: Order) -> None:
        """Goal up, and no wait of ours in the way: an operator's start is not a restart after a failure."""
        child.overtake(order)
        child.set_goal(Goal.UP, _said("started", order), order.by)
        child.forget_failures()
        if child.life is None:
            child.revive()
        if self._group is not None and child.name in self._group.affected:
            self._group.wait = 0.0
            self._group.let_down.discard(child.name)
            if self._group.until is not None:
                self._group.until = trio.current_time()
        self._hasten_self()

    def _hasten_self(self) -> None:
        if (not self.running or self.closing is not None) and self.parent is not None:
            self.parent.post(self.parent.hasten, self)

    def hasten(self, child: Node) -> None:
        """End the backoff of a supervisor that somebody has a use for now: the one it is in, or the one it will be in."""
        child.due_at = None
        child.hastened = child.life is not None
        self.touch(child)
        self._hasten_self()

    def _start_command(self, child: Node, order: Order, with_after: bool = False) -> None:
        self._want_up(child, order)
        life = child.life
        order.after_run = child.runs if life is None or self._ending(child, life) else child.runs - 1
        if child.stopping:
            child.again = child.again or child.goal_cause
        if life is not None and isinstance(child, JobNode) and child.spec.scheduled:
            child.answer(("start",), True, "its schedule runs")
        elif life is not None and not self._ending(child, life) and life.ready_at is not None:
            child.answer(("start",), True, "already running" + (f", pid {child.row.pid}" if child.row.pid else ""))

    def _ending(self, child: Node, life: Life) -> bool:
        """Whether its run is on its way out, or will be when it is its turn in the group."""
        return child.stopping or (self._group is not None and self._group.stopping and child.name in self._group.affected)

    def _stop_command(self, child: Node, order: Order, now: bool = False) -> None:
        child.overtake(order)
        child.set_goal(Goal.DOWN, _said("stopped", order), order.by)
        child.again = None
        child.restarting = None
        if isinstance(child, JobNode):
            child.requested = False
        if child.life is None:
            child.turn_down(f"{child.name} is stopped: {child.goal_cause}")
            child.answer(("stop",), True, "stopped" if child.row.state is State.WAITING else "already stopped")
        elif now:
            if child.life.asked is None:
                self._ask(child, child.life, Ask(child.goal_cause))
            child.hurry()

    def _restart_command(self, child: Node, order: Order) -> None:
        self._want_up(child, order)
        order.after_run = child.runs
        if child.life is not None:
            child.again = _said("restarted", order)
        if isinstance(child, JobNode) and child.spec.scheduled:
            child.disarm()

    def _run_now_command(self, child: Node, order: Order) -> None:
        assert isinstance(child, JobNode)
        if child.life is not None:
            order.resolve(False, f'{child.life.run.id} is in hand, and overlap is "skip"')
            return
        child.overtake(order)
        order.after_run = child.runs
        child.revive()
        child.due_at = None
        child.restarting = None
        child.requested = True
        self._hasten_self()

    def _pause_command(self, child: Node, order: Order) -> None:
        assert isinstance(child, JobNode)
        child.paused = True
        goes_on = child.life is not None and child.life.asked is None
        order.resolve(True, "paused" + (f"; {child.row.run} goes on" if goes_on else ""))

    def _resume_command(self, child: Node, order: Order) -> None:
        assert isinstance(child, JobNode)
        if child.paused and child.anchor is not None:
            self._advance(child, trio.current_time())
        child.paused = False
        order.resolve(True, "resumed")

    def _cancel_command(self, child: Node, order: Order, run: str | None = None) -> None:
        life = child.life
        if life is None or run not in (None, life.run.id):
            order.resolve(False, "no run in hand" if run is None else f"{run} is not in hand")
            return
        if life.asked is not None:
            child.orders.append(order)  # it ends already; what was asked for before holds
            return
        child.overtake(order)
        self._ask(child, life, Ask(_said("cancelled", order), Outcome(reason="cancelled", failed=False)))

    def _signal_command(self, child: Node, order: Order, signal: int = 0, group: bool = False) -> None:
        if child.life is None or child.life.run.send_signal is None:
            order.resolve(False, f"{child.name} has no process to signal")
            return
        try:
            child.life.run.send_signal(signal, group)
        except ProcessLookupError:
            order.resolve(False, f"the process of {child.name} has just ended")
        else:
            order.resolve(True, "signalled" + (" (the whole group)" if group else f", pid {child.row.pid}"))

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
            if child.parent is not None:
                child.parent.post(child.parent.update, child, spec, again)
            return
        old, child.spec = child.spec, spec
        if isinstance(child, JobNode) and isinstance(old, JobSpec):
            child.respecified(old)
        if again is not None and child.life is not None:
            child.again = again
        elif again is not None and not (child.succeeded and isinstance(spec, JobSpec) and spec.once):
            child.forget_failures()  # they were those of another job
            child.revive()
        if isinstance(child, SupervisorNode):
            child.post(child.respec)
        child.emit(events.Changed, kind=child.kind, supervisor=self.name or None, description=child.description)
        self.touch(child)

    def respec(self) -> None:
        """Go on under the new spec of one's own."""
        if self.spec.limit is None:
            self._window = None
        elif self._window is None:
            self._window = restart.Window(self.spec.limit, self.spec.period)
        else:
            self._window = self._window.resized(self.spec.limit, self.spec.period)
        self.touch_all()

    def reconsider(self, child: Node) -> None:
        """Look again at a child that may have to leave."""
        if self.running:
            self.touch(child)
        elif child.life is None and (child.removing or child.moving_to):
            self._depart(child)

    def _depart(self, child: Node) -> None:
        """Let go of a child that is removed, or that moves to another supervisor, now that nothing of it is alive."""
        if isinstance(child, SupervisorNode):
            for grandchild in list(child.children.values()):
                child.reconsider(grandchild)
        del self.children[child.name]
        child.parent = None
        child.due_at = child.restarting = child.hold = None
        self._pending.discard(child.name)
        self._dirty.pop(child.name, None)
        target, child.moving_to = child.moving_to, None
        if target is not None and child.removing is None:
            child.emit(events.Changed, kind=child.kind, supervisor=target.name or None, description=child.description)
            target.adopt(child)
            target._sort()
            return
        child.emit(events.Removed, cause=child.removing or "removed")
        child.answer(("stop",), True, "stopped and removed")
        child.answer(COMMANDS, False, f"overtaken: {child.removing}")
        self.tree.forget(child)


def _killed(after: float | None) -> str:
    """What there is to say of a kill after so many seconds."""
    if after is None:
        return ""
    return f" (killed after {after:.3g} s)" if after >= 0.05 else " (killed at once)"


def _said(done: str, order: Order) -> str:
    return f"{done} by {order.by}" if order.by else done


SERVICE_REFUSES = {"run-now": "start", "pause": "stop", "resume": "start", "cancel": "stop or restart"}
"""What a service refuses, and the word to use instead."""

STARTS = ("start", "restart", "reload", "run-now")
"""What asks for a new run, or for a run to be there."""

COMMANDS: dict[str, Callable[..., None]] = {
    "start": SupervisorNode._start_command,
    "stop": SupervisorNode._stop_command,
    "restart": SupervisorNode._restart_command,
    "reload": SupervisorNode._restart_command,
    "run-now": SupervisorNode._run_now_command,
    "pause": SupervisorNode._pause_command,
    "resume": SupervisorNode._resume_command,
    "cancel": SupervisorNode._cancel_command,
    "signal": SupervisorNode._signal_command,
}
"""The verbs that change a child."""
