"""A plain function in a thread of its own."""

from __future__ import annotations

import threading
from contextlib import suppress

import trio
from structlog.contextvars import bound_contextvars

from supervisor.kinds.context import Outcome, Resources, Run, RunFacts
from supervisor.kinds.function import context_parameter, load
from supervisor.kinds.job import JobSpec
from supervisor.kinds.task import COMPLETED
from supervisor.state import Phase


class ThreadContext(RunFacts):
    """`Context` for a function that runs in a thread: the same names, but they block instead of being awaited.

    A parameter annotated `Context` gets one too; this name is for those whose type checker should know.
    """

    def __init__(self, run: Run, stopping: threading.Event) -> None:
        super().__init__(run)
        self._stopping = stopping
        self._token = trio.lowlevel.current_trio_token()  # so that threads which the function starts may speak up too

    @property
    def phase(self) -> Phase:
        """The phase this run is in, at this moment."""
        return self._run.current_phase

    @property
    def stopping(self) -> bool:
        """True once this run has been asked to end."""
        return self._stopping.is_set()

    def wait_stopping(self) -> None:
        """Block until this run is asked to end."""
        self._stopping.wait()

    def sleep(self, seconds: float) -> bool:
        """Sleep, but not past a stop: False when it ended early because the run was asked to end."""
        return not self._stopping.wait(seconds)

    @property
    def deadline(self) -> float | None:
        """Seconds left before it is asked to end because it takes too long (`timeout`, `deadline`); None: no such limit."""
        if self._run.until is None:
            return None
        return trio.from_thread.run_sync(lambda: self._run.left, trio_token=self._token)

    def ready(self) -> None:
        """Say that the job is ready (`ready = { notify = true }`)."""
        trio.from_thread.run_sync(self._run.ready, "it said so", trio_token=self._token)

    def heartbeat(self) -> None:
        """Say that the job is well (`health = { notify = true }`): silence for longer than `every` is a bad sign."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._run.heartbeat, idempotent=True)

    def progress(self, done: float, total: float | None = None) -> None:
        """Say how far the run is."""
        trio.from_thread.run_sync(self._run.progress, done, total, trio_token=self._token)


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Call the function in a thread of its own.

    A limiter of its own, so that blocked jobs never use up the threads that others need. A thread cannot be killed: the
    tree cancels this only to abandon it, when the daemon ends.
    """
    function = load(spec.call or "", "thread")
    args = dict(spec.args or {})
    stopping = threading.Event()
    hears = context_parameter(function)
    if hears:
        args[hears] = ThreadContext(run, stopping)
    run.on_stopping(stopping.set)
    if spec.ready is None:
        run.ready("started")
    with bound_contextvars(job=run.job, run=run.id):
        await trio.to_thread.run_sync(
            lambda: function(**args), abandon_on_cancel=True, limiter=trio.CapacityLimiter(1), thread_name=run.id
        )
    return COMPLETED
