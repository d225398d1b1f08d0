"""What a file can say of the policies round a run: retry, breaker, rate, bulkhead, and the limits that jobs share by name."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from supervisor.spec import Rate, Seconds, Spec


class RetrySpec(Spec, frozen=True, kw_only=True):
    """Another attempt after a failed one: after `initial * factor ** n` seconds, at most `max`, each cut by `jitter`.

    A failure that says when to come back (`retry_after`) is answered then. It is the usual truncated exponential backoff;
    full and equal jitter are those of "Exponential Backoff And Jitter" in the AWS Architecture Blog.
    """

    attempts: Annotated[int, Meta(ge=1, description="how many attempts in all, the first one included")] = 5
    initial: Annotated[Seconds, Meta(description="wait before the second attempt")] = Seconds(1)
    factor: Annotated[float, Meta(ge=1, description="what each further wait is multiplied by")] = 2.0
    max: Annotated[Seconds, Meta(description="the longest wait")] = Seconds(60)
    jitter: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="1: each wait is anything from none to all of it (full jitter); 0.5: from half to all of it (equal "
            "jitter); 0: exactly it",
        ),
    ] = 1.0
    on: Annotated[
        tuple[str, ...],
        Meta(
            description='only these failures are worth another attempt: exceptions by name ("ConnectionError", '
            '"httpx:TransportError"), and for commands exit codes ("75") and signals ("SIGKILL"); all unless you say'
        ),
    ] = ()
    give_up_on: Annotated[
        tuple[str, ...], Meta(description="these failures are final: named as in `on`, which they win over")
    ] = ()


class BreakerSpec(Spec, frozen=True, kw_only=True):
    """A circuit breaker: after so many failures nothing is tried for a while, then one attempt at a time."""

    failures: Annotated[int, Meta(ge=1, description="so many failures open it")] = 5
    within: Annotated[Seconds, Meta(gt=0, description="the time in which they are counted")] = Seconds(60)
    open_for: Annotated[
        Seconds, Meta(gt=0, description="how long it stays open; then trials are let through, one at a time")
    ] = Seconds(30)
    successes: Annotated[int, Meta(ge=1, description="so many trials must succeed in a row to close it")] = 2


class RateSpec(Spec, frozen=True, kw_only=True):
    """A token bucket: it fills at `rate`, holds `burst`, and each attempt takes one token or waits for one."""

    SHORT: ClassVar[str] = "rate"
    """What a bare value in place of the table stands for."""

    rate: Annotated[Rate, Meta(description="how many may begin in a time")]
    burst: Annotated[int, Meta(ge=1, description="how many may begin at once after a quiet time")] = 1
    within: Annotated[
        Seconds | None, Meta(description="how long one may wait for its turn; as long as it takes unless you say")
    ] = None


class BulkheadSpec(Spec, frozen=True, kw_only=True):
    """Bounded concurrency: so many at the same time; others wait, or are turned away."""

    SHORT: ClassVar[str] = "concurrency"
    """What a bare value in place of the table stands for."""

    concurrency: Annotated[int, Meta(ge=1, description="how many at the same time")]
    waiting: Annotated[int | None, Meta(ge=0, description="how many may wait for a place; 0 turns away at once")] = None
    within: Annotated[
        Seconds | None, Meta(description="how long one may wait for a place; as long as it takes unless you say")
    ] = None


class LimitSpec(Spec, frozen=True, kw_only=True):
    """A `[limits.NAME]` table: what jobs share that name it in `breaker`, `rate` or `bulkhead`."""

    concurrency: Annotated[
        int | None, Meta(ge=1, description="for `bulkhead`: how many at the same time, of all the jobs that name it")
    ] = None
    waiting: Annotated[int | None, Meta(ge=0, description="how many may wait for a place; 0 turns away at once")] = None
    rate: Annotated[Rate | None, Meta(description="for `rate`: how many may begin in a time, of all the jobs that name it")] = (
        None
    )
    burst: Annotated[int, Meta(ge=1, description="how many may begin at once after a quiet time")] = 1
    within: Annotated[
        Seconds | None, Meta(description="how long one may wait for a place or its turn; as long as it takes unless you say")
    ] = None
    breaker: Annotated[
        BreakerSpec | None, Meta(description="for `breaker`: the failures of all the jobs that name it count together")
    ] = None
