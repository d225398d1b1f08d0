"""What the tree is doing, as Prometheus reads it. Needs the extra `metrics` (prometheus-client)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from supervisor.state import Goal, JobStatus, LimitStatus, QueueTally, State

if TYPE_CHECKING:
    from supervisor.control.messages import QueueStatus

BREAKER_STATES = ("closed", "open", "half-open")
ITEM_STATES = ("waiting", "delayed", "running", "done", "dead", "cancelled", "expired")


def exposition(
    jobs: Sequence[JobStatus],
    limits: Sequence[LimitStatus],
    tallies: Sequence[QueueTally] = (),
    queues: Sequence[QueueStatus] = (),
) -> str:
    """The text format, version 0.0.4, of these rows: of a thousand jobs some 10 ms of work, so call it beside the loop."""
    registry = CollectorRegistry()
    registry.register(_Families([*_of_jobs(jobs), *_of_limits(limits), *_of_tallies(tallies), *_of_queues(queues)]))
    return generate_latest(registry).decode()


class _Families(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _of_jobs(jobs: Sequence[JobStatus]) -> Iterator[Metric]:
    info = GaugeMetricFamily("supervisor_job_info", "1; what a job or supervisor is", labels=["job", "kind", "supervisor"])
    word = GaugeMetricFamily("supervisor_job_state", "1; what `status` calls it", labels=["job", "state"])
    restarts = CounterMetricFamily("supervisor_job_restarts", "restarts after failures, of this daemon", labels=["job"])
    for row in jobs:
        info.add_metric([row.name, row.kind, row.supervisor or ""], 1)
        word.add_metric([row.name, row.word], 1)
        restarts.add_metric([row.name], row.restarts)
    yield from (info, word, restarts)
    yield _gauge("supervisor_job_up", "1 where it runs", jobs, lambda row: row.state in (State.STARTING, State.RUNNING))
    yield _gauge("supervisor_job_wanted", "1 where its goal is up", jobs, lambda row: row.goal is Goal.UP)
    yield _gauge("supervisor_job_ready", "1 where it is ready", jobs, lambda row: row.ready)
    asked = [row for row in jobs if row.healthy is not None]
    yield _gauge("supervisor_job_healthy", "1 where its last answers were good", asked, lambda row: bool(row.healthy))


def _gauge(name: str, text: str, jobs: Iterable[JobStatus], value: Callable[[JobStatus], float]) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=["job"])
    for row in jobs:
        metric.add_metric([row.name], float(value(row)))
    return metric


def _of_limits(limits: Sequence[LimitStatus]) -> Iterator[Metric]:
    state = GaugeMetricFamily("supervisor_breaker_state", "1 for the state that it is in", labels=["limit", "state"])
    failures = GaugeMetricFamily("supervisor_breaker_failures", "failures that count at this moment", labels=["limit"])
    tokens = GaugeMetricFamily("supervisor_rate_tokens", "how many could begin now", labels=["limit"])
    used = GaugeMetricFamily("supervisor_bulkhead_in_use", "places that are taken", labels=["limit"])
    places = GaugeMetricFamily("supervisor_bulkhead_places", "places that there are", labels=["limit"])
    waiting = GaugeMetricFamily("supervisor_limit_waiting", "runs that wait for it", labels=["limit", "for"])
    for limit in limits:
        if (breaker := limit.breaker) is not None:
            for each in BREAKER_STATES:
                state.add_metric([limit.name, each], float(breaker.state == each))
            failures.add_metric([limit.name], breaker.failures)
        if (rate := limit.rate) is not None:
            tokens.add_metric([limit.name], rate.tokens)
            waiting.add_metric([limit.name, "rate"], len(rate.waiting))
        if (bulkhead := limit.bulkhead) is not None:
            used.add_metric([limit.name], bulkhead.in_use)
            places.add_metric([limit.name], bulkhead.concurrency)
            waiting.add_metric([limit.name, "bulkhead"], len(bulkhead.waiting))
    yield from (metric for metric in (state, failures, tokens, used, places, waiting) if metric.samples)


def _of_tallies(queues: Sequence[QueueTally]) -> Iterator[Metric]:
    items = CounterMetricFamily(
        "supervisor_queue_items", "what became of items in the hands of a job's workers", labels=["queue", "job", "outcome"]
    )
    degraded = GaugeMetricFamily("supervisor_queue_degraded", "1 where the engine does not answer", labels=["queue"])
    for queue in queues:
        degraded.add_metric([queue.queue], float(queue.degraded))
        for job, counts in queue.jobs.items():
            for outcome, count in counts.items():
                items.add_metric([queue.queue, job, outcome], count)
    yield from (metric for metric in (items, degraded) if metric.samples)


def _of_queues(queues: Sequence[QueueStatus]) -> Iterator[Metric]:
    """Queues as they stand, for all daemons that share them; nothing of those whose engine does not answer."""
    depth = GaugeMetricFamily(
        "supervisor_queue_depth",
        "items in this state; ended ones as long as they are kept",
        labels=["queue", "state"],
    )
    oldest = GaugeMetricFamily("supervisor_queue_oldest_seconds", "how long the first has waited", labels=["queue"])
    paused = GaugeMetricFamily("supervisor_queue_paused", "1 where nothing is handed out", labels=["queue"])
    for queue in queues:
        if queue.waiting is not None:
            for state in ITEM_STATES:
                depth.add_metric([queue.name, state], getattr(queue, state))
            oldest.add_metric([queue.name], queue.oldest or 0.0)
            paused.add_metric([queue.name], float(bool(queue.paused)))
    yield from (metric for metric in (depth, oldest, paused) if metric.samples)
