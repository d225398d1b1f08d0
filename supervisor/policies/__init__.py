"""Policies: the layers round a piece of work. *Retry is for work, restart is for workers.*

`ORDER` is how they nest, outermost first, in a file as in a program.
"""

from __future__ import annotations

from supervisor.policies.spec import BreakerSpec, BulkheadSpec, LimitSpec, RateSpec, RetrySpec

ORDER = ("fallback", "deadline", "retry", "breaker", "rate", "bulkhead", "timeout")
"""The fixed order. Retry outside the breaker: each attempt is judged. Rate and bulkhead inside retry: a place is not held
while backing off."""

__all__ = ["ORDER", "BreakerSpec", "BulkheadSpec", "LimitSpec", "RateSpec", "RetrySpec"]
