"""A coroutine function that only asyncio can run, in an event loop of its own, in a thread of its own.

The loop is made by hand and is nobody else's: the process's event loop policy and the main thread are left alone.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import outcome
import trio
from structlog.contextvars import bound_contextvars

from supervisor.children import kill_all, spawned_by_thread
from supervisor.errors import RunFailed
from supervisor.kinds.context import Outcome, Resources, Run, RunFacts, Work, alone, does_not_end, put
from supervisor.kinds.function import context_parameter, load
from supervisor.kinds.job import JobSpec
from supervisor.kinds.payload import ItemFunction, result
from supervisor.kinds.task import COMPLETED, completed
from supervisor.state import Phase

if TYPE_CHECKING:
    from supervisor.queues.producer import PutOptions
    from supervisor.queues.protocol import Receipt

T = TypeVar("T")

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

    async def put(self, queue: str, item: Any, **options: Unpack[PutOptions]) -> Receipt:
        """Put an item into a queue of the file, as `Context.put`."""
        return await _in_trio(self._token, partial(put, self._resources, queue, item, options))

    def _tell(self, what: Callable[..., None], *args: Any) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(what, *args)


async def _in_trio(token: trio.lowlevel.TrioToken, wanted: Callable[[], Awaitable[T]]) -> T:
    """What comes of `await wanted()` in Trio's thread, awaited in the loop. Cancelled here, it is cancelled there."""
    loop, scope = asyncio.get_running_loop(), trio.CancelScope()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(came: outcome.Outcome[T]) -> None:
        if not answer.done():
            match came:
                case outcome.Value(value):
                    answer.set_result(value)
                case outcome.Error(error):
                    answer.set_exception(error)

    async def do() -> None:
        with scope, suppress(RuntimeError):  # the loop may be closed by then
            try:
                came: outcome.Outcome[T] = outcome.Value(await wanted())
            except Exception as error:
                came = outcome.Error(error)
            loop.call_soon_threadsafe(settle, came)

    token.run_sync_soon(trio.lowlevel.spawn_system_task, do)
    try:
        return await answer
    except asyncio.CancelledError:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(lambda: scope.cancel(reason="nobody waits for it any more"))
        raise


async def _given(made: Any, run: Run, token: trio.lowlevel.TrioToken) -> Any:
    """What the function returns. Where what it gives is wanted, each item of an async generator is put as it comes."""
    if run.chain is None or not inspect.isasyncgen(made):
        return await made
    from supervisor.kinds.chain import emptied

    chain = run.chain
    return await emptied(made, lambda item: _in_trio(token, partial(chain.put, item)))


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Run the function to its end, and then what it has left in its loop: tasks are cancelled, threads are waited for.

    Asked to end, it hears that from its Context; where it takes none, a service or what takes too long is cancelled. Cancelled,
    it is cancelled, once.
    Returns only when its thread has ended: what ignores that is stuck, until it ends or is `abandoned`.
    """
    hosted = _Once(spec, run, resources)
    if spec.ready is None:
        run.ready("started")
    with bound_contextvars(job=run.job, run=run.id):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hosted.live)
            try:
                await hosted.wait()
            except trio.Cancelled:
                hosted.cancel()
                await hosted.wait_or_abandon(hosted.over)
                raise
    return hosted.outcome


@asynccontextmanager
async def handling(spec: JobSpec, run: Run, resources: Resources) -> AsyncIterator[Handler]:
    """A loop in a thread, for all calls of the worker. What they leave in it goes on until the worker ends, as `run` says."""
    handler = Handler(spec, run, resources)
    with bound_contextvars(job=run.job, run=run.id), alone():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler.live)
            try:
                await handler.wait_started()
                yield handler
                handler.close()
                await handler.wait()
            except BaseException:
                handler.close()
                await handler.wait_or_abandon(handler.over)
                raise


class _Hosted:
    """A loop in its thread. `_host` and what it calls belong to that, everything else to Trio's."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._token = trio.lowlevel.current_trio_token()
        self._returned = trio.Event()
        self.over = trio.Event()
        """The end of the thread."""
        self._waiting = trio.CancelScope(shield=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cancelled = False

    async def live(self) -> None:
        """The thread, from start to end. A limiter of its own, as that of a thread job."""
        try:
            with self._waiting:
                await trio.to_thread.run_sync(
                    self._host, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1), thread_name=self._run.id
                )
        finally:
            self.over.set()

    async def wait(self) -> None:
        """Wait for the end of the thread; say so where it is late, though its work has ended."""
        await self._returned.wait()
        with trio.move_on_after(LEFT_BEHIND):
            await self.over.wait()
            return
        self._run.stuck(f"its function has ended, but {does_not_end(self._run)}")
        await self.over.wait()

    async def wait_or_abandon(self, ended: trio.Event) -> None:
        """Wait for this, also when cancelled, unless the tree gives the thread up."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._abandon, nursery.cancel_scope)
                await ended.wait()
                nursery.cancel_scope.cancel(reason="it has ended")

    async def _abandon(self, waiting: trio.CancelScope) -> None:
        await self._run.abandoned.wait()
        self._waiting.cancel(reason="given up")
        await self.over.wait()
        waiting.cancel(reason="given up")

    def _call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Have it called in the loop; where that is not there yet, it will look by itself; where no more, for nobody."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *args)

    def _tell(self, function: Callable[..., object], *args: Any) -> None:
        """Have it called in Trio's thread."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

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
                self._tell(self._returned.set)

    async def _main(self) -> None:
        raise NotImplementedError


class _Once(_Hosted):
    """One run of a function."""

    def __init__(self, spec: JobSpec, run: Run, resources: Resources) -> None:
        super().__init__(run)
        self.outcome = COMPLETED
        self._spec = spec
        self._function = load(spec.call or "", "asyncio", into=spec.into is not None)
        self._args = dict(spec.args or {})
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        hears = context_parameter(self._function)
        if hears:
            self._args[hears] = AsyncioContext(run, resources, self._stopping, self._token)
            run.on_stopping(lambda: self._call_soon(self._stopping.set))
        else:
            run.on_stopping(lambda: self.cancel() if spec.service or run.overdue else None)

    def cancel(self) -> None:
        """Cancel the function, as asyncio does it. What comes in its last moments finds nothing to cancel any more."""
        self._cancelled = True
        self._call_soon(self._cancel)

    # in the thread of the loop

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        if self._run.stopping:
            self._stopping.set()
        if self._cancelled:
            raise asyncio.CancelledError
        self.outcome = completed(self._spec, await _given(self._function(**self._args), self._run, self._token))

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel(f"{self._run.id} was asked to stop")


class Handler(_Hosted):
    """Calls in the loop, one after another."""

    room = 1
    hears = True
    """A function that takes no Context is cancelled."""

    def __init__(self, spec: JobSpec, run: Run, resources: Resources) -> None:
        super().__init__(run)
        function = load(spec.call or "", "asyncio", into=spec.into is not None)
        self._function = ItemFunction(function, spec.args, spec.batch is not None)
        self._resources = resources
        self._closing = asyncio.Event()
        self._started = trio.Event()

    async def wait_started(self) -> None:
        """Wait until the loop runs."""
        await self._started.wait()

    def close(self) -> None:
        """Have the loop end."""
        self._call_soon(self._closing.set)

    async def handle(self, work: Work, payload: bytes) -> bytes | None:
        """One call, in a task of the loop. Cancelled, it is cancelled, and waited for."""
        await trio.lowlevel.checkpoint_if_cancelled()
        work.begin()
        call = _Call(work, self._function.read(payload))
        if self._function.hears:
            stopping = asyncio.Event()
            call.context = AsyncioContext(work, self._resources, stopping, self._token)
            work.on_stopping(lambda: self._call_soon(stopping.set))
        else:
            work.on_stopping(lambda: self._call_soon(call.cancel) if work.overdue else None)
        self._call_soon(self._begin, call)
        try:
            await call.over.wait()
        except trio.Cancelled:
            self._call_soon(call.cancel)
            await self.wait_or_abandon(call.over)
            raise
        returned: bytes | None = call.outcome.unwrap()
        return returned

    # in the thread of the loop

    async def _main(self) -> None:
        self._tell(self._started.set)
        await self._closing.wait()

    def _begin(self, call: _Call) -> None:
        call.task = asyncio.get_running_loop().create_task(self._make(call), name=self._run.id)
        call.task.add_done_callback(lambda task: self._tell(call.over.set))

    async def _make(self, call: _Call) -> None:
        """The call, fenced: nothing that it raises ends the loop."""
        try:
            made = self._function(call.item, call.context)
            call.outcome = outcome.Value(result(await _given(made, call.work, self._token)))
        except BaseException as error:
            own = isinstance(error, (asyncio.CancelledError, KeyboardInterrupt))
            call.outcome = outcome.Error(RunFailed(type(error).__name__) if own else error)


class _Call:
    """One call. `over` belongs to Trio's thread, `task` to that of the loop."""

    def __init__(self, work: Work, item: Any) -> None:
        self.work = work
        self.item = item
        self.context: AsyncioContext | None = None
        self.task: asyncio.Task[None] | None = None
        self.outcome: outcome.Outcome[bytes | None] = outcome.Error(RunFailed("cancelled before it began"))
        self.over = trio.Event()

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel("it was asked to end")


@contextmanager
def _no_children_left() -> Iterator[None]:
    """What the loop has started, and its job has left behind, is killed: a cancelled wait for a process ends only the wait."""
    before = spawned_by_thread()
    try:
        yield
    finally:
        kill_all(spawned_by_thread() - before)
