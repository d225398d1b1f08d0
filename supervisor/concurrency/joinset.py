"""A set of tasks that grows while it runs, and is joined as they finish."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Generic, Self, TypeVar, TypeVarTuple

import trio
from outcome import Value

from supervisor.concurrency.crew import Arrivals, Function, Outcome, captured, failures, open_crew, refuse_coroutines

T = TypeVar("T")
Args = TypeVarTuple("Args")


class JoinHandle(Generic[T]):
    """One task of a `JoinSet`. `outcome` is None while it runs, and stays so if it was aborted."""

    __slots__ = ("_scope", "outcome")

    def __init__(self, scope: trio.CancelScope | None) -> None:
        self.outcome: Outcome[T] | None = None
        self._scope = scope

    def abort(self, *, reason: str) -> None:
        """Cancel this task alone. It is then not handed out, unless it has finished all the same.

        Only for a task that was spawned with `abortable=True`: the scope that this takes costs as much as the task itself.
        """
        if self._scope is None:
            raise RuntimeError("this task cannot be aborted by itself: spawn it with abortable=True")
        self._scope.cancel(reason=reason)


class JoinSet(Generic[T]):
    """Tasks that cannot outlive their block; `spawn` them at any time, and join each as it finishes.

        async with JoinSet[bytes]() as tasks:
            for url in urls:
                tasks.spawn(fetch, url)
            async for task in tasks:
                print(task.outcome)

    Leaving the block waits for the tasks that are left (`abort_all` first, if that is not wanted); leaving it by an exception
    cancels them. Failures are data, and disturb no other task; those that nobody joined come out of the block. Values that
    nobody joined can still be joined when the block is left.

    `len()` counts the tasks that were not joined yet, running or finished.
    """

    def __init__(self) -> None:
        self._running = 0
        self._finished: deque[JoinHandle[T]] = deque()
        self._arrivals = Arrivals(in_a_row=16)
        self._leaving = trio.Event()
        self._outer: trio.Nursery | None = None
        self._nursery: trio.Nursery | None = None
        self._aborted = False
        self._block: AbstractAsyncContextManager[None] | None = None

    def __len__(self) -> int:
        return self._running + len(self._finished)

    async def __aenter__(self) -> Self:
        if self._block is not None:
            raise RuntimeError("a JoinSet is entered once: make another")
        self._block = self._opened()
        await self._block.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._block is not None
        return await self._block.__aexit__(kind, error, traceback)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        async with open_crew(self._unseen) as nursery:
            self._outer, self._nursery = nursery, await nursery.start(self._host)
            yield
            self._leaving.set()

    async def _host(self, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """Have the tasks in a nursery of their own: the block can cancel them, and go on."""
        async with open_crew() as nursery:
            task_status.started(nursery)
            await self._leaving.wait()

    def _unseen(self) -> list[Exception]:
        errors = failures(handle.outcome for handle in self._finished)
        self._finished = deque(handle for handle in self._finished if isinstance(handle.outcome, Value))
        return errors

    def spawn(
        self, function: Callable[[*Args], Awaitable[T]], *args: *Args, name: object = None, abortable: bool = False
    ) -> JoinHandle[T]:
        """Start `function(*args)` as a task of this set. `abortable`: its handle's `abort` works."""
        refuse_coroutines("spawn", [function])
        if self._outer is None or self._nursery is None:
            raise RuntimeError("a JoinSet spawns inside its block: async with JoinSet() as tasks")
        if self._aborted:
            raise RuntimeError("this JoinSet was aborted: make another")
        # A nursery that is cancelled from outside may be gone before the block is, which may still spawn: to be cancelled too.
        nursery = self._outer if self._nursery.cancel_scope.cancel_called else self._nursery
        handle: JoinHandle[T] = JoinHandle(trio.CancelScope() if abortable else None)
        nursery.start_soon(self._run, handle, function, args, name=name or function)
        self._running += 1
        return handle

    async def _run(self, handle: JoinHandle[T], function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> None:
        try:
            if handle._scope is None:
                handle.outcome = await captured(function, *args)
            else:
                with handle._scope:
                    handle.outcome = await captured(function, *args)
        finally:
            self._running -= 1
            if handle.outcome is not None:
                self._finished.append(handle)
            self._arrivals.announce()

    def abort_all(self, *, reason: str) -> None:
        """Cancel every task that still runs. What has finished can still be joined; nothing can be spawned any more."""
        if self._nursery is not None:
            self._aborted = True
            self._nursery.cancel_scope.cancel(reason=reason)

    async def join_next(self) -> JoinHandle[T] | None:
        """The next task that has finished, each once, in the order in which they did; None if none is left."""
        try:
            return await self._arrivals.take(self._first)
        except trio.EndOfChannel:
            return None

    async def join_all(self) -> list[JoinHandle[T]]:
        """Wait until none runs: all that were not joined yet. Who is cancelled in it has joined none."""
        return await self._arrivals.take(self._all)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JoinHandle[T]:
        try:
            return await self._arrivals.take(self._first)
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def _first(self) -> JoinHandle[T] | None:
        if self._finished:
            return self._finished.popleft()
        if not self._running:
            raise trio.EndOfChannel
        return None

    def _all(self) -> list[JoinHandle[T]] | None:
        if self._running:
            return None
        finished, self._finished = list(self._finished), deque()
        return finished


class Completed(Generic[T]):
    """The async iterator of `as_completed`."""

    def __init__(self, tasks: JoinSet[T], places: dict[JoinHandle[T], int]) -> None:
        self._tasks = tasks
        self._places = places

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Outcome[T]]:
        handle = await self._tasks.__anext__()
        assert handle.outcome is not None
        return self._places.pop(handle), handle.outcome


@asynccontextmanager
async def as_completed(functions: Iterable[Function[T]]) -> AsyncIterator[Completed[T]]:
    """Run all at once, and iterate over what becomes of them, as they finish: pairs of place (from 0) and outcome.

        async with as_completed(partial(fetch, url) for url in urls) as completed:
            async for place, outcome in completed:
                ...

    Leaving the block cancels those that still run. Failures that were not handed out by then come out of it.
    """
    functions = list(functions)
    refuse_coroutines("as_completed", functions)
    async with JoinSet[T]() as tasks:
        yield Completed(tasks, {tasks.spawn(function): place for place, function in enumerate(functions)})
        tasks.abort_all(reason="the block of as_completed was left")
