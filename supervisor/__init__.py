"""A supervisor: jobs kept running in a restart tree, on Trio.

    from supervisor import open_supervisor, Context

    async with open_supervisor("supervisor.toml") as tree:
        await tree.wait_running()
        await tree.restart("api")

The public names; each is imported when it is first asked for, so that a control command loads neither Trio nor the tree.

    errors spec state events        the plain base: what can go wrong, what a file can say, what is, what happens
    restart                         who is restarted, when, or who gives up
    atomic store last_runs          files that are written whole; SQLite for what must outlive the daemon
    concurrency                     what Trio leaves to libraries: join, race, JoinSet, map_concurrent, select, CancelToken
    policies                        the layers round a piece of work: retry, timeout, breaker, limits
    children output probes kinds    what a run is
    config tree                     the file, and the tree that runs it
    control client cli              the socket, and who speaks to it
    log systemd history daemon      the process round it
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from supervisor.atomic import write_atomic
    from supervisor.concurrency import (
        CancelToken,
        Deadline,
        JoinSet,
        as_completed,
        join,
        map_concurrent,
        race,
        select,
        try_join,
    )
    from supervisor.config import Config
    from supervisor.control.aclient import AsyncClient
    from supervisor.control.client import Client
    from supervisor.control.wire import Unreachable
    from supervisor.errors import (
        BadItem,
        BreakerOpen,
        BulkheadFull,
        ControlError,
        DeadlineExceeded,
        QueueError,
        QueueFull,
        QueueUnavailable,
        RateLimited,
        Rejected,
        RestartIntensityExceeded,
        Retry,
        SpecError,
        SupervisorError,
        TimedOut,
    )
    from supervisor.kinds.asyncio_loop import AsyncioContext
    from supervisor.kinds.context import Context
    from supervisor.kinds.job import JobSpec
    from supervisor.kinds.thread import ThreadContext
    from supervisor.policies.breaker import CircuitBreaker
    from supervisor.policies.bulkhead import Bulkhead
    from supervisor.policies.fallback import fallback
    from supervisor.policies.pipeline import compose
    from supervisor.policies.rate import RateLimiter
    from supervisor.policies.retrying import retry
    from supervisor.policies.timing import deadline, timeout
    from supervisor.queues.outside import BlockingProducer, open_queue
    from supervisor.queues.producer import Producer
    from supervisor.queues.protocol import Receipt, Record
    from supervisor.spec import SupervisorSpec
    from supervisor.state import Answer, Goal, JobStatus, Phase, State
    from supervisor.tree import Supervisor, open_supervisor

_HOME = {
    "Answer": "state",
    "AsyncClient": "control.aclient",
    "AsyncioContext": "kinds.asyncio_loop",
    "BadItem": "errors",
    "BlockingProducer": "queues.outside",
    "BreakerOpen": "errors",
    "Bulkhead": "policies.bulkhead",
    "BulkheadFull": "errors",
    "CancelToken": "concurrency",
    "CircuitBreaker": "policies.breaker",
    "Client": "control.client",
    "Config": "config",
    "Context": "kinds.context",
    "ControlError": "errors",
    "Deadline": "concurrency",
    "DeadlineExceeded": "errors",
    "Goal": "state",
    "JobSpec": "kinds.job",
    "JobStatus": "state",
    "JoinSet": "concurrency",
    "Phase": "state",
    "Producer": "queues.producer",
    "QueueError": "errors",
    "QueueFull": "errors",
    "QueueUnavailable": "errors",
    "RateLimited": "errors",
    "RateLimiter": "policies.rate",
    "Receipt": "queues.protocol",
    "Record": "queues.protocol",
    "Rejected": "errors",
    "RestartIntensityExceeded": "errors",
    "Retry": "errors",
    "SpecError": "errors",
    "State": "state",
    "Supervisor": "tree",
    "SupervisorError": "errors",
    "SupervisorSpec": "spec",
    "ThreadContext": "kinds.thread",
    "TimedOut": "errors",
    "Unreachable": "control.wire",
    "as_completed": "concurrency",
    "compose": "policies.pipeline",
    "deadline": "policies.timing",
    "fallback": "policies.fallback",
    "join": "concurrency",
    "map_concurrent": "concurrency",
    "open_queue": "queues.outside",
    "open_supervisor": "tree",
    "race": "concurrency",
    "retry": "policies.retrying",
    "select": "concurrency",
    "timeout": "policies.timing",
    "try_join": "concurrency",
    "write_atomic": "atomic",
}

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncioContext",
    "BadItem",
    "BlockingProducer",
    "BreakerOpen",
    "Bulkhead",
    "BulkheadFull",
    "CancelToken",
    "CircuitBreaker",
    "Client",
    "Config",
    "Context",
    "ControlError",
    "Deadline",
    "DeadlineExceeded",
    "Goal",
    "JobSpec",
    "JobStatus",
    "JoinSet",
    "Phase",
    "Producer",
    "QueueError",
    "QueueFull",
    "QueueUnavailable",
    "RateLimited",
    "RateLimiter",
    "Receipt",
    "Record",
    "Rejected",
    "RestartIntensityExceeded",
    "Retry",
    "SpecError",
    "State",
    "Supervisor",
    "SupervisorError",
    "SupervisorSpec",
    "ThreadContext",
    "TimedOut",
    "Unreachable",
    "as_completed",
    "compose",
    "deadline",
    "fallback",
    "join",
    "map_concurrent",
    "open_queue",
    "open_supervisor",
    "race",
    "retry",
    "select",
    "timeout",
    "try_join",
    "write_atomic",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
