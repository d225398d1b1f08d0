"""The limits of a tree: those that jobs share by name, and those that a job has to itself. They outlive its runs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from supervisor import events
from supervisor.config import Config
from supervisor.config.shapes import duration
from supervisor.kinds import JobSpec
from supervisor.nodes.supervisor import SupervisorNode
from supervisor.policies import BreakerSpec, BulkheadSpec, LimitSpec, RateSpec
from supervisor.spec import Spec, split_name
from supervisor.state import BreakerStatus, BulkheadStatus, LimitStatus, RateStatus

if TYPE_CHECKING:
    from supervisor.policies.breaker import BreakerState, CircuitBreaker
    from supervisor.policies.bulkhead import Bulkhead
    from supervisor.policies.rate import RateLimiter
    from supervisor.tree import Supervisor

LIMITING = ("breaker", "rate", "bulkhead")
"""The keys of a job that name a limit, or are one."""


class Layers(NamedTuple):
    """What limits the attempts of a run; None where nothing does."""

    breaker: CircuitBreaker | None = None
    rate: RateLimiter | None = None
    bulkhead: Bulkhead | None = None


NOTHING = Layers()


class Limits:
    """All of them. What one of them knows (failures, tokens, who is in) it knows of all runs that share it."""

    def __init__(self, tree: Supervisor) -> None:
        self._tree = tree
        self._shared: dict[str, Layers] = {}
        self._own: dict[str, Layers] = {}
        self._users: dict[str, list[str]] = {}
        """By the name of a shared one: the jobs that name it."""

    def apply(self, config: Config) -> None:
        """Have what the configuration says: new numbers at once, without forgetting anything.

        A shared one that is gone from it is kept for the runs that began with it.
        """
        for name, spec in config.limits.items():
            self._shared[name] = self._made(name, "", self._shared.get(name, NOTHING), *_parts(spec))
        self._own = {name: self._made_own(name, spec) for name, spec in config.jobs.items() if _has_own(spec)}
        self._users = {name: [job for job, spec in config.jobs.items() if name in _named(spec)] for name in config.limits}

    def of(self, name: str, spec: JobSpec) -> Layers:
        """What limits a run of this job, or of this worker of it."""
        job, _ = split_name(name)
        own = self._own.get(job, NOTHING)
        if own is NOTHING and _has_own(spec):  # no configuration names the job
            own = self._own[job] = self._made_own(job, spec)
        return Layers(
            breaker=self._shared[spec.breaker].breaker if isinstance(spec.breaker, str) else own.breaker,
            rate=self._shared[spec.rate].rate if isinstance(spec.rate, str) else own.rate,
            bulkhead=self._shared[spec.bulkhead].bulkhead if isinstance(spec.bulkhead, str) else own.bulkhead,
        )

    def lacking(self, spec: JobSpec) -> list[str]:
        """What a job names and is not there."""
        return [name for name in sorted(_named(spec)) if name not in self._users]

    def forget(self, job: str) -> None:
        """A job that no configuration names has left."""
        self._own.pop(job, None)

    # ---- what is seen of them ----

    def caution(self, name: str, spec: JobSpec) -> str:
        """What there is to say of the next run of a job because of its breaker; empty where that is closed."""
        breaker = None if spec.breaker is None else self.of(name, spec).breaker
        if breaker is None or breaker.trial_at is None:
            return ""
        if breaker.state.value == "half-open":
            return f"breaker half-open: {breaker.successes} of {breaker.spec.successes} trials have succeeded"
        left = math.ceil(breaker.trial_at - trio.current_time())
        return f"breaker open: {breaker.cause}; trial {f'in {duration(left)}' if left > 0 else 'at the next attempt'}"

    def status(self, *patterns: str) -> list[LimitStatus]:
        """How they stand, of these names and globs (a limit's, or a job's), or all. LookupError for what matches nothing."""
        rows = [self._row(name, True, layers) for name, layers in self._shared.items() if name in self._users]
        rows += [self._row(job, False, layers) for job, layers in self._own.items()]
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
                raise LookupError(pattern, [row.name for row in rows])
        return [row for row in rows if not patterns or any(fnmatch.fnmatchcase(row.name, each) for each in patterns)]

    def _row(self, name: str, shared: bool, layers: Layers) -> LimitStatus:
        breaker, rate, bulkhead = layers
        return LimitStatus(
            name=name,
            shared=shared,
            jobs=tuple(self._users[name]) if shared else (name,),
            breaker=None if breaker is None else self._breaker_row(breaker),
            rate=None if rate is None else _rate_row(rate),
            bulkhead=None if bulkhead is None else _bulkhead_row(bulkhead),
        )

    def _breaker_row(self, breaker: CircuitBreaker) -> BreakerStatus:
        spec = breaker.spec
        return BreakerStatus(
            state=breaker.state.value,
            cause=breaker.cause,
            failures=breaker.failures,
            opens_at=spec.failures,
            within=float(spec.within),
            successes=breaker.successes,
            closes_at=spec.successes,
            trial_at=self._tree.wall_time(breaker.trial_at),
        )

    def _tell(self, name: str, job: str, was: BreakerState, now: BreakerState, cause: str) -> None:
        """A breaker has changed its mind: tell everybody, and have the jobs that it keeps from running say so."""
        breaker = (self._own.get(job, NOTHING) if job else self._shared[name]).breaker
        if breaker is None:  # a reload has taken it away from a run that began with it
            return
        trial_at = breaker.trial_at if now.value == "open" else None
        self._tree.journal.emit(
            events.BreakerChanged,
            limit=f"jobs.{job}" if job else f"limits.{name}",
            was=was.value, now=now.value, cause=cause, next_at=self._tree.wall_time(trial_at),
        )  # fmt: skip
        for user in [job] if job else self._users.get(name, ()):
            node = self._tree.nodes.get(user)
            if isinstance(node, SupervisorNode):
                node.post(node.touch_all)
            elif node is not None and node.parent is not None:
                node.parent.post(node.parent.touch, node)

    # ---- making ----

    def _made_own(self, job: str, spec: JobSpec) -> Layers:
        breaker, rate, bulkhead = (None if isinstance(each := getattr(spec, key), str) else each for key in LIMITING)
        return self._made("", job, self._own.get(job, NOTHING), breaker, rate, bulkhead)

    def _made(
        self,
        name: str,
        job: str,
        old: Layers,
        breaker: BreakerSpec | None,
        rate: RateSpec | None,
        bulkhead: BulkheadSpec | None,
    ) -> Layers:
        """What a limit, by its name, or a job has: what there was before with new numbers, or new ones."""
        if breaker is None and rate is None and bulkhead is None:
            return NOTHING
        from supervisor.policies.breaker import CircuitBreaker  # loaded only where there are limits
        from supervisor.policies.bulkhead import Bulkhead
        from supervisor.policies.rate import RateLimiter

        make_breaker = partial(CircuitBreaker.from_spec, on_change=partial(self._tell, name, job))
        return Layers(
            breaker=_made_as(breaker, old.breaker, make_breaker, name),
            rate=_made_as(rate, old.rate, RateLimiter.from_spec, name),
            bulkhead=_made_as(bulkhead, old.bulkhead, Bulkhead.from_spec, name),
        )


def _made_as(spec: Any, old: Any, make: Callable[..., Any], name: str) -> Any:
    if spec is None:
        return None
    if old is None:
        return make(spec, name=name)
    if old.spec != spec:
        old.configure(spec)
    return old


def _has_own(spec: JobSpec) -> bool:
    """Whether a job has a limit to itself."""
    return any(isinstance(getattr(spec, key), Spec) for key in LIMITING)


def _named(spec: JobSpec) -> set[str]:
    """The limits that a job names."""
    return {each for key in LIMITING if isinstance(each := getattr(spec, key), str)}


def _parts(spec: LimitSpec) -> tuple[BreakerSpec | None, RateSpec | None, BulkheadSpec | None]:
    """A `[limits.NAME]` table as what a job would say inline."""
    rate = None if spec.rate is None else RateSpec(rate=spec.rate, burst=spec.burst, within=spec.within)
    if spec.concurrency is None:
        return spec.breaker, rate, None
    return spec.breaker, rate, BulkheadSpec(concurrency=spec.concurrency, waiting=spec.waiting, within=spec.within)


def _rate_row(rate: RateLimiter) -> RateStatus:
    spec = rate.spec
    return RateStatus(
        rate=float(spec.rate), burst=spec.burst, tokens=round(rate.tokens, 3), wait=round(rate.delay, 3), waiting=rate.waiting
    )


def _bulkhead_row(bulkhead: Bulkhead) -> BulkheadStatus:
    return BulkheadStatus(
        concurrency=bulkhead.spec.concurrency, in_use=bulkhead.in_use, may_wait=bulkhead.spec.waiting, waiting=bulkhead.waiting
    )
