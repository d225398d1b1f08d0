"""A job in the tree: its schedule, and the fence round its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from msgspec import structs

from supervisor import events, restart
from supervisor.errors import RunFailed
from supervisor.kinds import KINDS, JobSpec, Outcome, Run
from supervisor.kinds.function import kind_of, load
from supervisor.kinds.job import for_worker
from supervisor.nodes.fence import stopped_at_fence
from supervisor.nodes.node import Hold, Node
from supervisor.nodes.schedule import Due, Schedule, same_times
from supervisor.spec import ChildSpec, GiveUp, RestartType, split_name
from supervisor.state import Goal, State

if TYPE_CHECKING:
    from supervisor.nodes.pool import Worker
    from supervisor.nodes.workers import WorkersNode
    from supervisor.tree import Supervisor


class JobNode(Node):
    """A job."""

    __slots__ = ("_failures", "_kind", "_probe_thread", "due", "pool")

    spec: JobSpec

    def __init__(self, tree: Supervisor, name: str, spec: JobSpec, goal: Goal) -> None:
        super().__init__(tree, name, spec, goal)
        self.spec = self.adapted(spec)
        self.due: Due | None = None
        """The tick that the run is for that was asked for."""
        self.pool: Worker | None = None
        """What handles the items of a queue, while it does."""
        self.schedule = Schedule(self) if self.spec.scheduled else None
        self._failures: restart.Window | None = None
        self._kind: str | None = None
        self._probe_thread: trio.CapacityLimiter | None = None

    @property
    def kind(self) -> str:
        return self._kind or self.spec.kind or ("command" if self.spec.command is not None else self.infer_kind())

    def infer_kind(self) -> str:
        """Look at the function. One that does not import is called a task; its run will say what is wrong."""
        try:
            self._kind = kind_of(load(self.spec.call or "", into=True))
        except RunFailed:
            return "task"
        return self._kind

    @property
    def probe_thread(self) -> trio.CapacityLimiter:
        """Room for the one thread in which its probes may block. The job's: a thread that hangs outlives its run."""
        if self._probe_thread is None:
            self._probe_thread = trio.CapacityLimiter(1)
        return self._probe_thread

    @property
    def killable(self) -> bool:  # type: ignore[override]
        now = self.life.run.kind if self.life is not None else None
        return KINDS[now or self.kind].killable

    @property
    def takes(self) -> str | None:  # type: ignore[override]
        return KINDS[self.kind].takes

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
        if self.schedule is not None:
            return self.schedule.armed and not self.paused
        if self.spec.once:
            return self.succeeded
        return self.life is not None and self.life.ready_at is not None and self.life.asked is None

    @property
    def counts(self) -> bool:
        return self.goal is Goal.UP and self.spec.start == "auto"

    @property
    def busy(self) -> str:
        """Why another run cannot begin now; empty where it can."""
        return f"{self.life.run.id} is still running" if self.life is not None else ""

    @property
    def in_hand(self) -> bool:
        """Whether it has a run that is to come to an end by itself."""
        return self.life is not None and not self.spec.service

    async def body(self, run: Run) -> Outcome:
        """One run, fenced: whatever foreign code raises becomes an outcome."""
        try:
            if self.spec.into is not None:
                return await self._handed_on(self.spec.into, run)
            return await self._run(run)
        except BaseException as error:
            return stopped_at_fence(run, error)

    async def _run(self, run: Run) -> Outcome:
        if self.spec.pooled:
            from supervisor.nodes.pool import Worker  # loaded only where there are queues

            return await Worker(self, run).run()
        if self.spec.policies:
            from supervisor.nodes.attempts import Attempts  # loaded only where a job has some

            return await Attempts(self, run).run()
        return await KINDS[self.kind].run(self.spec, run, self.tree.resources)

    async def _handed_on(self, into: str, run: Run) -> Outcome:
        """A run that has a queue for what it gives. What it returned is there before it has ended."""
        from supervisor.kinds.chain import Chain  # loaded only where a job has one

        await self.tree.queues.wait_for(into)
        run.chain = Chain(into, self.tree.queues.producer(into), run, self.tree.spread)
        outcome = await self._run(run)
        if outcome.returned is not None:
            run.outcome = structs.replace(outcome, failed=True, reason=f"killed before queue {into} had taken what it returned")
            await run.chain.put_result(outcome.returned)
        return outcome

    def waits_for_room(self, run: Run, queue: str, cause: str | None) -> None:
        """See `Reporter`."""
        super().waits_for_room(run, queue, cause)
        if self.pool is not None:
            self.pool.seat.note = self.pool.seat.shown = cause or ""

    def progress(self, run: Run, done: float, total: float | None) -> None:
        super().progress(run, done, total)
        if self.pool is not None:
            self.pool.progress(run, done, total)

    def recycle(self, cause: str) -> None:
        """Have a fresh run take the place of this one; of a queue's worker, when what it has in hand is over."""
        if self.pool is not None:
            self.pool.recycle(cause)
        else:
            self.tree.order("restart", [self.name], cause=cause)

    def adapted(self, spec: ChildSpec) -> JobSpec:
        """The job as this worker runs it. What concerns the group of workers is the group's."""
        assert isinstance(spec, JobSpec)
        if spec.ticks:
            spec = structs.replace(spec, args=None)
        _, number = split_name(self.name)
        spec = for_worker(spec, number or 0)
        if number is None:
            return spec
        spec = structs.replace(spec, after=(), give_up=None, essential=False, significant=False, start="auto")
        return spec.one_run() if spec.scheduled else spec

    def become_worker(self, group: WorkersNode) -> None:
        """Go on, under the name of a worker, as a child of the group that has taken its place."""
        self.parent = group
        self.spec = self.adapted(group.spec)
        self.due_at = self.hold = self.noted = None
        self.set_goal(Goal.UP, "starts with its supervisor", None)
        if self.life is not None:
            self.life.run.job = self.name
        elif self.row.state is State.WAITING:
            self.emit(events.Stopped, cause=group.goal_cause)

    def gives_up(self, now: float, reason: str) -> str | None:
        limit = self.spec.give_up
        if limit is None:
            return None
        if self._failures is None or (self._failures.limit, self._failures.period) != (limit.failures - 1, limit.within):
            self._failures = restart.Window(limit.failures - 1, limit.within)
        return gave_up(limit, reason) if self._failures.add(now) else None

    def respecified(self, old: ChildSpec) -> None:
        assert isinstance(old, JobSpec)
        self._kind = None
        if self.pool is not None:
            self.pool.respecified()
        if not same_times(old, self.spec):
            self.disarm()
            self.schedule = (self.schedule or Schedule(self)) if self.spec.scheduled else None
        elif self.schedule is not None:
            self.schedule.respecified()
        if old.start != self.spec.start:
            self.set_goal(Goal.UP if self.spec.start == "auto" else Goal.DOWN, "its `start` was changed", None)

    def forget_failures(self) -> None:
        super().forget_failures()
        self._failures = None

    # schedule

    def wake_at(self, moment: float) -> None:
        """Have its schedule looked at then."""
        if self.parent is not None:
            self.parent.remind(self, moment)

    def take_due(self) -> Due | None:
        """The tick that the run is for that begins now; None where it is for none."""
        due, self.due = self.due, None
        return due if self.schedule is None else self.schedule.begin()

    def hold_of_its_own(self, now: float) -> Hold | None:
        return None if self.requested or self.schedule is None else self.schedule.hold()


def gave_up(limit: GiveUp, reason: str) -> str:
    """What there is to say when a failure was one too many."""
    return f"{limit.failures} failures within {limit.within:g} s, the last: {reason}"
