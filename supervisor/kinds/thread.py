"""A plain function in a thread of its own."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import outcome
import trio
from structlog.contextvars import bound_contextvars

from supervisor.errors import QueueFull, WorkerLost
from supervisor.kinds.context import Outcome, Resources, Run, RunFacts, Work, alone, does_not_end, put
from supervisor.kinds.function import context_parameter, emptied, load
from supervisor.kinds.job import JobSpec
from supervisor.kinds.payload import ItemFunction, result
from supervisor.kinds.task import completed
from supervisor.state import Phase

if TYPE_CHECKING:
    from supervisor.queues.producer import PutOptions
    from supervisor.queues.protocol import Receipt

T = TypeVar("T")


class ThreadContext(RunFacts):
    """`Context` for a function that runs in a thread: the same names, but they block instead of being awaited.

    A parameter annotated `Context` gets one too; this name is for those whose type checker should know.
    """

    def __init__(self, run: Run, resources: Resources, stopping: threading.Event) -> None:
        super().__init__(run, resources)
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
        """Say how far the run, or its item, is."""
        trio.from_thread.run_sync(self._run.progress, done, total, trio_token=self._token)

    def put(self, queue: str, item: Any, **options: Unpack[PutOptions]) -> Receipt:
        """Put an item into a queue of the file, as `Context.put`; blocks for so long, but not when the run is to be killed."""
        return trio.from_thread.run(self._put_or_be_killed, queue, item, options, trio_token=self._token)

    async def _put_or_be_killed(self, queue: str, item: Any, options: PutOptions) -> Receipt:
        return await _until_killed(self._run, partial(put, self._resources, queue, item, options))


async def _until_killed(run: Run, put: Callable[[], Awaitable[T]]) -> T:
    """Wait for a put. Raises QueueFull where the run is killed before, and its thread must not wait any longer."""
    receipt: list[T] = []
    with alone():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_killed, run, nursery.cancel_scope)
            receipt.append(await put())
            nursery.cancel_scope.cancel(reason="it is put")
    if not receipt:
        raise QueueFull("not put: the run is to end")
    return receipt[0]


async def _cancel_when_killed(run: Run, scope: trio.CancelScope) -> None:
    await run.phase.wait_value(lambda phase: not phase < Phase.KILLING)
    scope.cancel(reason=f"{run.id} is to end")


def giving(run: Run) -> Callable[[Any], Any]:
    """`emptied`, to be called in the thread of a run with what its function has returned."""
    if (chain := run.chain) is None:
        return lambda made: made
    token = trio.lowlevel.current_trio_token()

    def give(value: Any) -> None:
        trio.from_thread.run(_until_killed, run, partial(chain.put, value), trio_token=token)

    return lambda made: emptied(made, give)


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Call the function in a thread of its own.

    A limiter of its own, so that blocked jobs never use up the threads that others need. A thread cannot be killed: the
    tree cancels this only to abandon it, when the daemon ends.
    """
    function = load(spec.call or "", "thread", into=spec.into is not None)
    args = dict(spec.args or {})
    stopping = threading.Event()
    hears = context_parameter(function)
    if hears:
        args[hears] = ThreadContext(run, resources, stopping)
    run.on_stopping(stopping.set)
    if spec.ready is None:
        run.ready("started")
    given = giving(run)
    with bound_contextvars(job=run.job, run=run.id):
        return await trio.to_thread.run_sync(
            lambda: completed(spec, given(function(**args))),
            abandon_on_cancel=True,
            limiter=trio.CapacityLimiter(1),
            thread_name=run.id,
        )


@asynccontextmanager
async def handling(spec: JobSpec, run: Run, resources: Resources) -> AsyncIterator[Handler]:
    """A thread for all calls of the worker: what the function keeps for its thread, it has at the next call too.

    A thread that is still in a call at the end was abandoned with it.
    """
    handler = Handler(spec, run, resources)
    with bound_contextvars(job=run.job, run=run.id):
        with alone():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(handler.live)
                try:
                    yield handler
                finally:
                    handler.close()
                    if handler.busy:
                        nursery.cancel_scope.cancel(reason=does_not_end(run))


class Handler:
    """Has the function called by its thread. `_serve` belongs to that, everything else to Trio's."""

    room = 1
    hears = True  # nothing else can end it

    def __init__(self, spec: JobSpec, run: Run, resources: Resources) -> None:
        function = load(spec.call or "", "thread", into=spec.into is not None)
        self._function = ItemFunction(function, spec.args, spec.batch is not None)
        self._run = run
        self._resources = resources
        self._token = trio.lowlevel.current_trio_token()
        self._calls: SimpleQueue[Callable[[], bytes | None] | None] = SimpleQueue()
        self._caller: trio.lowlevel.Task | None = None
        self.busy = False
        """Whether its thread is in a call, be it one that nobody waits for any more."""

    async def live(self) -> None:
        """The thread, from start to end. A limiter of its own, as that of `run`."""
        await trio.to_thread.run_sync(
            self._serve, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1), thread_name=self._run.id
        )

    def close(self) -> None:
        """Have the thread end after the call that it is in."""
        self._calls.put(None)

    async def handle(self, work: Work, payload: bytes) -> bytes | None:
        """One call. Cancelled, it is abandoned, and with it the thread: there can be no further one."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.busy:
            raise WorkerLost(does_not_end(self._run))
        work.begin()
        call = partial(self._function, self._function.read(payload))
        if self._function.hears:
            stopping = threading.Event()
            work.on_stopping(stopping.set)
            call = partial(call, ThreadContext(work, self._resources, stopping))
        self._caller, self.busy = trio.lowlevel.current_task(), True
        self._calls.put(partial(contextvars.copy_context().run, _called, call, giving(work)))
        returned: bytes | None = await trio.lowlevel.wait_task_rescheduled(self._abandon)
        return returned

    def _abandon(self, _: object) -> trio.lowlevel.Abort:
        self._caller = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            answer = outcome.capture(call)
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._answered, answer)

    def _answered(self, answer: outcome.Outcome[bytes | None]) -> None:
        caller, self._caller, self.busy = self._caller, None, False
        if caller is not None:
            trio.lowlevel.reschedule(caller, answer)


def _called(call: Callable[[], Any], given: Callable[[Any], Any]) -> bytes | None:
    return result(given(call()))
