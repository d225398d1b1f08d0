"""A coroutine function that only asyncio can run, in an event loop of its own, in a thread of its own.

The loop is made by hand and is nobody else's: the process's event loop policy and the main thread are left alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import trio
from structlog.contextvars import bound_contextvars

from supervisor.children import kill_all, spawned_by_thread
from supervisor.errors import RunFailed
from supervisor.kinds.context import Outcome, Resources, Run, RunFacts, does_not_end
from supervisor.kinds.function import context_parameter, load
from supervisor.kinds.job import JobSpec
from supervisor.kinds.task import COMPLETED
from supervisor.state import Phase

LEFT_BEHIND = 5.0
"""Seconds after the end of the function at which what it has left, and does not end, is called stuck."""


class AsyncioContext(RunFacts):
    """`Context` for a function that asyncio runs: the same names, to be awaited there. Belongs to the thread of its loop.

    A parameter annotated `Context` gets one too; this name is for those whose type checker should know.
    """

    def __init__(self, run: Run, resources: Resources, stopping: asyncio.Event, token: trio.lowlevel.TrioToken) -> None:
        super().__init__(run, resources)
        self._stopping = stopping
        self._token = token
        self._ahead = trio.current_time() - time.monotonic()

    @property
    def phase(self) -> Phase:
        """The phase this run is in, at this moment."""
        return self._run.current_phase

    @property
    def stopping(self) -> bool:
        """True once this run has been asked to end."""
        return self._run.stopping

    async def wait_stopping(self) -> None:
        """Wait until this run is asked to end."""
        await self._stopping.wait()

    async def sleep(self, seconds: float) -> bool:
        """Sleep, but not past a stop: False when it ended early because the run was asked to end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return not self.stopping

    @property
    def deadline(self) -> float | None:
        """Seconds left before it is asked to end because it takes too long (`timeout`, `deadline`); None: no such limit."""
        until = self._run.until
        return None if until is None else max(0.0, until - self._ahead - time.monotonic())

    def ready(self) -> None:
        """Say that the job is ready (`ready = { notify = true }`). Never blocks, as the next two."""
        self._tell(self._run.ready, "it said so")

    def heartbeat(self) -> None:
        """Say that the job is well (`health = { notify = true }`): silence for longer than `every` is a bad sign."""
        self._tell(self._run.heartbeat)

    def progress(self, done: float, total: float | None = None) -> None:
        """Say how far the run is; shown by `events`."""
        self._tell(self._run.progress, done, total)

    def _tell(self, what: Callable[..., None], *args: Any) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(what, *args)


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Run the function to its end, and then what it has left in its loop: tasks are cancelled, threads are waited for.

    Asked to end, it hears that from its Context; where it takes none, a service or what takes too long is cancelled. Cancelled,
    it is cancelled, once.
    Returns only when its thread has ended: what ignores that is stuck, until it ends or is `abandoned`.
    """
    hosted = _Hosted(spec, run, resources)
    if spec.ready is None:
        run.ready("started")
    with bound_contextvars(job=run.job, run=run.id):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hosted.live)
            try:
                await hosted.wait()
            except trio.Cancelled:
                hosted.cancel()
                await hosted.wait_or_abandon()
                raise
    return COMPLETED


class _Hosted:
    """One run in its loop. `_host` and what it calls belong to the thread of the loop, everything else to Trio's."""

    def __init__(self, spec: JobSpec, run: Run, resources: Resources) -> None:
        self._run = run
        self._function = load(spec.call or "", "asyncio")
        self._args = dict(spec.args or {})
        self._token = trio.lowlevel.current_trio_token()
        self._stopping = asyncio.Event()
        self._returned, self._over = trio.Event(), trio.Event()
        self._waiting = trio.CancelScope(shield=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        hears = context_parameter(self._function)
        if hears:
            self._args[hears] = AsyncioContext(run, resources, self._stopping, self._token)
            run.on_stopping(lambda: self._call_soon(self._stopping.set))
        else:
            run.on_stopping(lambda: self.cancel() if spec.service or run.overdue else None)

    async def live(self) -> None:
        """The thread, from start to end. A limiter of its own, as that of a thread job."""
        try:
            with self._waiting:
                await trio.to_thread.run_sync(
                    self._host, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1), thread_name=self._run.id
                )
        finally:
            self._over.set()

    async def wait(self) -> None:
        """Wait for the end of the thread; say so where it is late, though the function has ended by itself."""
        await self._returned.wait()
        with trio.move_on_after(LEFT_BEHIND):
            await self._over.wait()
            return
        self._run.stuck(f"its function has ended, but {does_not_end(self._run)}")
        await self._over.wait()

    async def wait_or_abandon(self) -> None:
        """Wait for the end of the thread, also when cancelled, unless the tree gives it up."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._abandon)
                await self._over.wait()
                nursery.cancel_scope.cancel(reason="it has ended")

    async def _abandon(self) -> None:
        await self._run.abandoned.wait()
        self._waiting.cancel(reason="given up")

    def cancel(self) -> None:
        """Cancel the function, as asyncio does it. What comes in its last moments finds nothing to cancel any more."""
        self._cancelled = True
        self._call_soon(self._cancel)

    def _call_soon(self, function: Callable[[], object]) -> None:
        """Have it called in the loop; where that is not there yet, it will look by itself; where no more, for nobody."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function)

    # in the thread of the loop

    def _host(self) -> None:
        with (
            _no_children_left(),
            ThreadPoolExecutor(thread_name_prefix=self._run.id) as executor,
            asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner,
        ):
            self._loop = runner.get_loop()
            self._loop.set_default_executor(executor)
            try:
                runner.run(self._main())
            except asyncio.CancelledError:
                if not self._cancelled:
                    raise
            except KeyboardInterrupt as error:  # the job's own: the real one only ever comes to the main thread
                raise RunFailed("KeyboardInterrupt") from error
            finally:
                with suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._returned.set)

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        if self._run.stopping:
            self._stopping.set()
        if self._cancelled:
            raise asyncio.CancelledError
        await self._function(**self._args)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel(f"{self._run.id} was asked to stop")


@contextmanager
def _no_children_left() -> Iterator[None]:
    """What the loop has started, and its job has left behind, is killed: a cancelled wait for a process ends only the wait."""
    before = spawned_by_thread()
    try:
        yield
    finally:
        kill_all(spawned_by_thread() - before)
