"""The policies round a run: its attempts, and what is between them. `ORDER` in `supervisor.policies` says how they nest.

A job that names no policy has none of this. Time is kept with a ladder, not an axe: an attempt that takes too long is asked to
end as by a stop, has the job's grace, and is killed then; what cannot be killed is waited for.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import structlog
import trio
from msgspec.structs import replace

from supervisor import events
from supervisor.config.shapes import duration
from supervisor.errors import DeadlineExceeded, ExitStatus, RaisedElsewhere, RunFailed, TimedOut
from supervisor.kinds import KINDS, Attempt, JobSpec, Kind, Outcome, Run
from supervisor.kinds.function import kind_of, load, taken
from supervisor.nodes.fence import failure_of, foreign, in_one_line, split_foreign
from supervisor.nodes.ladder import STUCK_AFTER
from supervisor.policies import RetrySpec
from supervisor.policies.bulkhead import Bulkhead
from supervisor.policies.rate import RateLimiter
from supervisor.policies.retrying import retry
from supervisor.spec import split_name
from supervisor.state import Phase, Spent

if TYPE_CHECKING:
    from supervisor.nodes.job import JobNode

log = structlog.get_logger("supervisor")

T = TypeVar("T")
R = TypeVar("R")

SHORT = 0.001
"""Seconds of a wait that nobody needs to be told of."""


class Guard(Generic[T]):
    """The policies round one piece of work, but for `retry`: deadline ▸ breaker ▸ rate ▸ bulkhead ▸ timeout, and its fallback.

    What is worked on, a subclass says: `_made` makes an attempt at it, and `_body` is that. Belongs to the task of the work.
    """

    def __init__(self, node: JobNode, run: Run) -> None:
        self._node = node
        self._run = run
        self._spec = node.spec
        self._deadline = math.inf if node.spec.deadline is None else trio.current_time() + node.spec.deadline
        self._cut = trio.CancelScope(deadline=self._deadline)
        """Round everything but the attempts themselves: what waits is cut off, what runs is asked to end."""
        self._in_hand: Attempt | None = None
        self._late: RunFailed | None = None
        """What is to be said of the attempt in hand, where it takes too long."""
        self._last: T | Exception | None = None
        """What came of the last attempt; None before there was one."""
        self._has_waited = False
        """Whether people were told that the attempt waits for a limit."""
        self._limits = node.tree.limits.of(node.name, node.spec)

    # ---- what a subclass says ----

    def _made(self, until: float | None) -> Attempt:
        """An attempt that has this long."""
        raise NotImplementedError

    async def _body(self, attempt: Attempt) -> T:
        """What is done in an attempt, by foreign code. Raises what it raises."""
        raise NotImplementedError

    def _over(self, attempt: Attempt, result: object) -> None:
        """Something that lived as an attempt is over; what it gave, its failure, or None where it was cut short."""

    def _cut_short(self, own: BaseException) -> None:
        """Foreign code has failed while it was cancelled."""

    def _is_last(self, attempt: Attempt) -> None:
        """An attempt has met the deadline: there will be no other."""

    @property
    def _grace(self) -> float:
        """Seconds that an attempt has to end in, when it was asked to."""
        return self._spec.grace

    # ---- what happens to it ----

    def hear(self, phase: Phase) -> None:
        """The run is to end, or at least to take up nothing new."""
        if self._in_hand is not None:
            self._in_hand.advance(phase)
        else:
            self._cut.cancel(reason="the run is to end")

    def _tell(self, kind: type[events.ChildEvent], **fields: Any) -> None:
        """Record what happens, after what the run has reported before."""

        def record() -> None:
            if self._node.life is not None and self._node.life.run is self._run:
                self._node.emit(kind, **fields)

        assert self._node.parent is not None
        self._node.parent.post(record)

    def _tell_start(self, cause: str) -> None:
        self._tell(events.AttemptStarting, run=self._run.id, cause=cause, attempt=self._run.attempt)

    async def _limited(self) -> T:
        """fallback ▸ deadline ▸ retry ▸ **breaker ▸ rate ▸ bulkhead** ▸ timeout."""
        breaker, rate, bulkhead = self._limits
        with nullcontext() if breaker is None else breaker.attempt():
            if rate is not None:
                await self._take_turn(rate)
            if bulkhead is None:
                return await self._attempt()
            await self._take_place(bulkhead)
            try:
                return await self._attempt()
            finally:
                bulkhead.release()

    async def _take_turn(self, rate: RateLimiter) -> None:
        wait, longest = rate.delay, rate.spec.within
        if wait > SHORT and (longest is None or wait <= longest):
            whose = f"rate {rate.name}" if rate.name else "its rate"
            cause = f"waits for {whose}: {len(rate.waiting)} before it, about {_about(wait)}"
            self._tell_wait(rate.name, cause, trio.current_time() + wait)
        await rate.acquire(who=self._run.id)

    async def _take_place(self, bulkhead: Bulkhead) -> None:
        spec, before = bulkhead.spec, len(bulkhead.waiting)
        if bulkhead.in_use >= spec.concurrency and (spec.waiting is None or before < spec.waiting):
            where = f"in bulkhead {bulkhead.name}" if bulkhead.name else "in its bulkhead"
            self._tell_wait(bulkhead.name, f"waits for a place {where}: {bulkhead.in_use} in use, {before} before it", None)
        await bulkhead.acquire(who=self._run.id)

    def _tell_wait(self, name: str, cause: str, until: float | None) -> None:
        self._has_waited = True
        limit = f"limits.{name}" if name else f"jobs.{split_name(self._node.name)[0]}"
        next_at = self._node.tree.wall_time(until)
        self._tell(events.WaitingForLimit, run=self._run.id, cause=cause, limit=limit, next_at=next_at)

    # ---- one attempt ----

    async def _attempt(self) -> T:
        """One attempt. A failure is raised, whatever kind it is of; so is being cut off, once it has ended."""
        run = self._run
        if self._has_waited:
            self._has_waited = False
            self._tell_start("its turn has come")
        attempt = self._in_hand = self._made(self._until())
        self._cut.deadline, self._late = math.inf, None
        try:
            self._last = await self._lived(KINDS[self._node.kind], attempt, self._body)
        finally:
            self._in_hand = None
            self._cut.deadline = self._deadline
        if run.current_phase is not Phase.RUNNING:
            self._cut.cancel(reason="the run is to end")
        if run.stopping:
            await trio.lowlevel.checkpoint_if_cancelled()  # it was told to end: that says nothing of its health
        if isinstance(self._last, Exception):
            raise self._last
        return self._last

    def _until(self) -> float | None:
        """When an attempt that begins now will have taken too long."""
        timeout = math.inf if self._spec.timeout is None else trio.current_time() + self._spec.timeout
        until = min(timeout, self._deadline)
        return None if until == math.inf else until

    async def _lived(self, kind: Kind, attempt: Attempt, body: Callable[[Attempt], Awaitable[R]]) -> R | Exception:
        """Run something as an attempt, fenced, for as long as it lives: what it gives, or its failure."""
        result: R | Exception | None = None
        async with self._kept_in_time(kind, attempt) as kill:
            with kill:
                try:
                    result = await body(attempt)
                except BaseException as raised:
                    result = self._stopped(raised)
                finally:
                    self._over(attempt, result)
        if self._late is not None:
            return self._late
        assert result is not None  # nobody kills what is in time
        if isinstance(result, Outcome) and result.failed:
            return ExitStatus(result.reason, code=result.code, signal=result.signal)
        return result

    def _stopped(self, raised: BaseException) -> Exception:
        """The run boundary: what is foreign code's own is its failure, what must pass is raised again."""
        passing, own = split_foreign(raised)
        if own is None:
            raise raised
        if passing is not None:
            self._cut_short(own)
            raise passing from None
        return as_failure(own)

    # ---- its time ----

    @asynccontextmanager
    async def _kept_in_time(self, kind: Kind, attempt: Attempt) -> AsyncIterator[trio.CancelScope]:
        """A scope that is cancelled when the attempt is to be killed. One without a limit costs no task."""
        kill = trio.CancelScope()
        if attempt.until is None:
            yield kill
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_in_time, kind, attempt, kill)
            yield kill
            nursery.cancel_scope.cancel(reason="the attempt has ended")

    async def _end_in_time(self, kind: Kind, attempt: Attempt, kill: trio.CancelScope) -> None:
        """The ladder of an attempt: wait for its time, ask, wait for the grace, kill; then say what cannot be killed."""
        limit = attempt.until
        assert limit is not None
        while (until := attempt.until or limit) > trio.current_time():  # noqa: ASYNC110 (it moves while a call waits)
            await trio.sleep_until(until)
        self._late = late = self._too_late(limit)
        if isinstance(late, DeadlineExceeded):
            self._is_last(attempt)
        attempt.overdue = True
        self._tell_overdue(attempt, str(late))
        attempt.advance(Phase.STOPPING)
        await trio.sleep(self._grace)
        attempt.advance(Phase.KILLING)
        if not kind.killable:
            attempt.stuck(f"thread {attempt.id} does not end, and a thread cannot be killed")
            return
        self._tell_overdue(attempt, f"did not end in its grace: {late}", killed=True)
        kill.cancel(reason=str(late))
        await trio.sleep(STUCK_AFTER)
        attempt.stuck(f"still there {STUCK_AFTER:g} s after it was killed")

    def _too_late(self, until: float) -> RunFailed:
        """What to say of an attempt whose time ends at that moment."""
        if until == self._deadline and self._spec.deadline is not None:
            return DeadlineExceeded(self._spec.deadline)
        assert self._spec.timeout is not None
        return TimedOut(self._spec.timeout)

    def _tell_overdue(self, attempt: Attempt, cause: str, killed: bool = False) -> None:
        if not self._run.stopping:  # else it is on another ladder already
            self._tell(events.AttemptOverdue, run=attempt.id, cause=cause, killed=killed, followed=attempt.followed)

    # ---- when it has failed for good ----

    async def fall_back(self, call: str, failure: Exception, **known: Any) -> Outcome | Exception:
        """Call the fallback with what it has parameters for: `failure`, what is `known` besides, the job's `args`."""
        try:
            function = load(call)
        except RunFailed as error:
            return error
        args = taken(function, {**(self._spec.args or {}), **known, "failure": failure})
        spec = JobSpec(call=call, args=args, once=True, grace=self._spec.grace, into=self._spec.into)
        kind = KINDS[kind_of(function)]
        self._run.kind = kind.name
        self._late = None
        self._in_hand = Attempt(self._run, None, followed=False)
        try:
            return await self._lived(kind, self._in_hand, lambda attempt: kind.run(spec, attempt, self._node.tree.resources))
        finally:
            self._run.kind = self._in_hand = None


class Attempts(Guard[Outcome]):
    """One run of a job with policies, from its first attempt to its outcome. Belongs to the task of the run."""

    def __init__(self, node: JobNode, run: Run) -> None:
        super().__init__(node, run)
        self._spent: Spent | None = None
        self._next = 1
        """Which attempt the wait under way is for."""
        self._retry = None if node.spec.retry is None else self._retrying(node.spec.retry)

    def _retrying(self, spec: RetrySpec) -> retry:
        return retry.from_spec(spec, on_retry=self._tell_retry, sleep=self._wait, spread=jitter(self._node.tree.spread))

    async def run(self) -> Outcome:
        """Make the attempts, and give what came of them. Foreign code raises nothing here but what a boundary lets pass."""
        self._run.follow(self.hear)
        try:
            outcome = await self._within_deadline()
        except Exception as failure:
            outcome = await self._failed(failure)
        return replace(outcome, spent=self._spent)

    async def _within_deadline(self) -> Outcome:
        """fallback ▸ **deadline ▸ retry** ▸ breaker ▸ rate ▸ bulkhead ▸ timeout."""
        with self._cut:
            return await (self._limited() if self._retry is None else self._retry.call(self._limited))
        if isinstance(self._last, Outcome):
            return self._last
        if self._run.current_phase is not Phase.RUNNING:
            return self._not_again(self._last)
        if isinstance(self._last, DeadlineExceeded):
            raise self._last
        assert self._spec.deadline is not None
        raise DeadlineExceeded(self._spec.deadline) from self._last

    def _not_again(self, last: Exception | None) -> Outcome:
        """The outcome of a run that was to end between two attempts, or before the first."""
        why = self._node.tree.ending or "it was asked to end"
        if last is None:
            return Outcome(reason=f"not begun: {why}", failed=True)
        outcome = self._outcome_of(last)
        return outcome if self._retry is None else replace(outcome, reason=f"{outcome.reason}; not tried again: {why}")

    # ---- between attempts ----

    def _tell_retry(self, attempt: int, attempts: int, wait: float, error: Exception) -> None:
        """An attempt has failed, and there is to be another."""
        self._next, self._last = attempt, error
        now = trio.current_time()
        if self._cut.cancel_called or self._deadline <= now:
            return
        reason = in_one_line(error)
        self._tell(
            events.Retrying, run=self._run.id, attempt=attempt, attempts=attempts, wait=wait, reason=reason,
            cause=f"attempt {attempt} of {attempts} in {_about(wait)}: {reason}", next_at=self._node.tree.wall_time(now + wait),
        )  # fmt: skip
        if (raised := foreign(error)) is not None:
            log.debug("attempt raised", job=self._run.job, run=self._run.id, exc_info=raised)

    async def _wait(self, seconds: float) -> None:
        """The wait before another attempt."""
        await trio.sleep(seconds)
        self._run.attempt = self._next
        assert self._retry is not None
        self._tell_start(f"attempt {self._next} of {self._retry.attempts}")

    # ---- one attempt ----

    def _made(self, until: float | None) -> Attempt:
        return Attempt(self._run, until, self._followed())

    def _followed(self) -> bool:
        """Whether something may follow the attempt that begins, if it fails."""
        return self._spec.fallback is not None or (self._retry is not None and self._run.attempt < self._retry.attempts)

    def _is_last(self, attempt: Attempt) -> None:
        attempt.followed = self._spec.fallback is not None

    async def _body(self, attempt: Attempt) -> Outcome:
        return await KINDS[self._node.kind].run(self._spec, attempt, self._node.tree.resources)

    def _over(self, attempt: Attempt, result: object) -> None:
        """Keep what an attempt has cost, and what is known of its end where it was cut short."""
        outcome = result if isinstance(result, Outcome) else attempt.outcome
        if outcome is not None and outcome.spent is not None:
            self._spent = outcome.spent if self._spent is None else _sum(self._spent, outcome.spent)
        self._run.outcome = outcome and replace(outcome, spent=self._spent)
        attempt.pid = attempt.send_signal = None  # the run may go on without a process

    def _cut_short(self, own: BaseException) -> None:
        self._run.outcome = failure_of(self._run, own)

    # ---- the end ----

    async def _failed(self, failure: Exception) -> Outcome:
        """The run has failed for good: it is answered by the fallback, if there is one and nobody has told the run to end."""
        outcome = self._outcome_of(failure)
        if self._spec.fallback is None or self._run.current_phase is not Phase.RUNNING:
            return outcome
        reason = outcome.reason
        self._tell(events.FallingBack, run=self._run.id, cause=f"fallback after: {reason}")
        answer = await self.fall_back(self._spec.fallback, failure)
        if isinstance(answer, Outcome):
            return Outcome(reason=f"completed by its fallback after: {reason}", failed=False, returned=answer.returned)
        return replace(outcome, reason=f"{reason}; its fallback failed: {self._outcome_of(answer).reason}")

    def _outcome_of(self, failure: Exception) -> Outcome:
        """The outcome of a run whose last failure this is."""
        known = self._run.outcome
        if isinstance(failure, (ExitStatus, RaisedElsewhere)) and failure is self._last and known is not None:
            return known
        outcome = failure_of(self._run, failure)
        if isinstance(failure, DeadlineExceeded) and isinstance(failure.__cause__, Exception):
            return replace(outcome, reason=f"{outcome.reason}; the last failure: {in_one_line(failure.__cause__)}")
        return outcome


def jitter(spread: Callable[[float, float], float]) -> Callable[[float, float], float]:
    """The chance of `retry` from that of the tree, which gives factors."""
    return lambda low, high: high * spread(low / high, 1.0) if high else 0.0


def as_failure(own: BaseException) -> Exception:
    """What foreign code raised, as the failure of an attempt."""
    if isinstance(own, Exception):
        return own
    failure = RunFailed(in_one_line(own))
    failure.__cause__ = own
    return failure


def _about(seconds: float) -> str:
    """A wait, as exactly as people care for it."""
    return duration(float(f"{seconds:.3g}"))


def _sum(one: Spent, other: Spent) -> Spent:
    return Spent(duration=one.duration + other.duration, cpu=one.cpu + other.cpu, max_rss=max(one.max_rss, other.max_rss))
