"""The body of a worker of a queue job: take an item, hand it to the handler under the job's policies, say what became of it.

    Worker     one worker, from its start to its end
    ItemCall   one call under policies: fallback ▸ deadline ▸ breaker ▸ rate ▸ bulkhead ▸ timeout ▸ the handler

`retry` is not among the layers: an item that fails goes back to its queue, to be claimed again after a while, by whoever is
free then. A job that names none of them has none: no task for an item, no scope, one checkpoint.

At least once: what becomes of an item is said to the desk in the moment in which it is known, whatever else happens then.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import outcome
import structlog
import trio

import supervisor
from supervisor import events
from supervisor.errors import DeadlineExceeded, NotBegun, QueueError, Rejected, RunFailed, UnfitItem, WorkerLost
from supervisor.kinds import KINDS, Handler, Outcome, Run, Work
from supervisor.kinds.context import does_not_end
from supervisor.nodes.attempts import Guard, as_failure, jitter
from supervisor.nodes.fence import foreign, in_one_line, split_foreign
from supervisor.policies import RetrySpec
from supervisor.policies.retrying import retry
from supervisor.queues.protocol import Ending, Item
from supervisor.queues.seat import Call, Seat, back
from supervisor.state import Phase

if TYPE_CHECKING:
    from supervisor.kinds import Attempt
    from supervisor.nodes.job import JobNode
    from supervisor.queues.desk import Desk

log = structlog.get_logger("supervisor")

GUARDS = ("fallback", "deadline", "breaker", "rate", "bulkhead", "timeout")
"""The policies that are layers round a call."""

USUAL = RetrySpec()
"""How often an item is tried whose job does not say."""

REJECTED_FOR = 1.0
"""Seconds that a worker takes nothing after a limit turned it away without saying when to come back."""

LONGEST_TRACEBACK = 10_000
"""Characters of a traceback that are kept with an item: the last of them."""


class Returned(NamedTuple):
    """What a call came to that ended well."""

    result: bytes | None


class Worker:
    """One worker of a queue job. Belongs to the task of its run."""

    def __init__(self, node: JobNode, run: Run) -> None:
        self.node = node
        self.run_ = run
        self._batched = node.spec.batch is not None
        self._take_in_spec()
        self._handled = 0
        self._leaving = trio.Event()
        self._recycled = ""
        """Why another worker is to take its place."""
        self._lost: WorkerLost | None = None
        """Why the handler can take no further call."""
        self._rejected = 0.0
        """Until when nothing is taken, on Trio's clock, because a limit turns items away."""
        self._under_way = 0
        self._one_is_over = trio.Event()
        self._ladders: dict[Call, trio.CancelScope] = {}
        """The calls that are asked to end before their time."""
        self.seat: Seat
        self.handler: Handler
        self._nursery: trio.Nursery

    async def run(self) -> Outcome:
        """Handle items until the run is to end. Raises WorkerLost where the handler is gone before."""
        resources, desk = self.node.tree.resources, await self._desk()
        async with KINDS[self.node.kind].handling(self._spec, self.run_, resources) as self.handler:
            with desk.seat(self.run_, self._retry.attempts, self._cut) as self.seat:
                self.node.pool = self
                try:
                    async with trio.open_nursery() as self._nursery:
                        self.run_.follow(self._hear)
                        self.run_.on_stopping(self.leave)
                        self.run_.ready("idle")
                        await self._work()
                        self._nursery.cancel_scope.cancel(reason="nothing is in hand")
                finally:
                    self.node.pool = None
        if self._lost is not None:
            raise self._lost
        if self._recycled and not self.run_.stopping:
            self.node.tree.order("restart", [self.node.name], cause=self._recycled)
            await self.run_.wait_stopping()
        return Outcome(reason="stopped", failed=False)

    async def _desk(self) -> Desk:
        assert self._spec.queue is not None
        try:
            desk = await self.node.tree.queues.wait_for(self._spec.queue)
        except QueueError as error:
            raise RunFailed(str(error)) from None
        for node in (self.node, self.node.parent):
            if node is not None and node.paused:
                desk.pause(node.name)
        return desk

    def _take_in_spec(self) -> None:
        self._spec = spec = self.node.spec
        self._guarded = any(getattr(spec, name) is not None for name in GUARDS)
        self._retry = retry.from_spec(spec.retry or USUAL, spread=jitter(self.node.tree.spread))
        self._runs = spec.recycle.runs if spec.recycle is not None else None

    def respecified(self) -> None:
        """Go on under the new spec of the job, from the next item on."""
        self._take_in_spec()
        self.seat.attempts = self._retry.attempts

    async def _work(self) -> None:
        """Handle items until it is to leave, and what is in hand is over."""
        while not self.seat.left:
            await (self._one_after_another() if self._is_straight() else self._side_by_side())

    def _is_straight(self) -> bool:
        """Whether items can go the straight way: there is nothing round a call, and there is one call at a time."""
        return not self._guarded and not self._batched and self.handler.room == 1

    # ---- when it is to end ----

    @property
    def idle(self) -> bool:
        """Whether it waits for items, and has none."""
        return self.seat.wants > 0 and not self.seat.calls

    def leave(self) -> None:
        """Take nothing new. What is in hand goes on."""
        self._leaving.set()
        self.seat.leave()

    def recycle(self, cause: str) -> None:
        """Take nothing new, and have a fresh worker in its place when what is in hand is over, however long that takes."""
        if not self._leaving.is_set():
            self._recycled = cause
            self.leave()

    def progress(self, work: Run, done: float, total: float | None) -> None:
        """A call says how far it is: it is kept with its item, of a batch with the first."""
        for call in self.seat.calls:
            if work in (call.work, getattr(call.work, "work", None)):
                self.seat.progress(call, done, total)

    def _hear(self, phase: Phase) -> None:
        """Those calls that can hear it are told."""
        for call in list(self.seat.calls):
            if isinstance(call.work, ItemCall):
                call.work.hear(phase)
            elif call.work is not None:
                call.work.advance(phase)

    def _cut(self, call: Call, why: str) -> None:
        """A call is to end before its time: asked, where it can hear, and killed after its grace."""
        work = call.work
        attempt, kill = (work.in_hand, work.kill) if isinstance(work, ItemCall) else (work, work and work.kill)
        if attempt is not None:
            self._nursery.start_soon(self._end_early, call, attempt, kill, why)
        elif kill is not None:  # it waits for a limit
            kill.cancel(reason=why)

    async def _end_early(self, call: Call, attempt: Attempt, kill: trio.CancelScope, why: str) -> None:
        """The ladder of a call: ask, wait for the grace, kill; or say what cannot be killed."""
        if call not in self.seat.calls:
            return
        with trio.CancelScope() as ladder:
            self._ladders[call] = ladder
            if self.handler.hears:
                attempt.overdue = True
                attempt.advance(Phase.STOPPING)
                await trio.sleep(self._spec.grace)
                attempt.advance(Phase.KILLING)
            if self.node.killable:
                kill.cancel(reason=why)
            else:
                attempt.stuck(does_not_end(attempt))
                self.seat.shown = ""

    # ---- taking ----

    async def _one_after_another(self) -> None:
        """The straight way. One scope for many calls."""
        seat = self.seat
        while not seat.left:
            with trio.CancelScope() as kill:
                while (call := await seat.take()) is not None:
                    await (self._call_guarded(call, kill) if self._guarded else self._call(call, kill))
                    if call.fates is not None:
                        break  # the scope is used up
                    if self._guarded or self.handler.room > 1:
                        return

    async def _side_by_side(self) -> None:
        """Under policies, in batches, or several at once: as many as the handler has room for."""
        async with trio.open_nursery() as calls:
            while not self.seat.left and not self._is_straight():
                while self._under_way >= self.handler.room:
                    self._one_is_over = trio.Event()
                    await self._one_is_over.wait()
                await self._wait_for_limits()
                for call in await self._take(self.handler.room - self._under_way):
                    self._under_way += 1
                    if self.handler.room == 1:
                        await self._call_apart(call)
                    else:
                        calls.start_soon(self._call_apart, call, name=f"{self.run_.id}: {call.items[0].id}")

    async def _take(self, most: int) -> Sequence[Call]:
        batch = self._spec.batch
        if batch is not None:
            call = await self.seat.take_batch(batch.size, batch.within)
            return () if call is None else [call]
        call = await self.seat.take(most)
        return () if call is None else self.seat.split(call)

    async def _wait_for_limits(self) -> None:
        """Take nothing while a limit turns everything away."""
        if self._rejected > trio.current_time():
            with trio.move_on_at(self._rejected):
                await self._leaving.wait()
            self.seat.note = ""

    # ---- one call ----

    async def _call_apart(self, call: Call) -> None:
        """A call with a scope of its own."""
        try:
            with trio.CancelScope() as kill:
                if self._guarded:
                    await self._call_guarded(call, kill)
                else:
                    await self._call(call, kill)
        finally:
            self._under_way -= 1
            self._one_is_over.set()

    async def _call(self, call: Call, kill: trio.CancelScope) -> None:
        """The call itself."""
        item = call.items[0]
        call.work = work = Work(self.run_, None, item.id, item.attempt, kill, len(call.items))
        if call.fates is not None or self.seat.left:  # before it was begun with
            self._end(call, back)
            return
        try:
            result = await self.handler.handle(work, self.payload(call.items))
        except BaseException as raised:
            failure = self._fenced(call, raised)
            self._set_apart(call, failure)
            self._failed(call, work, failure)
        else:
            if self.run_.chain is not None:
                await self._done(call, result)
            else:
                self._ended_well(call, result)  # most go this way, and spare a coroutine

    async def _call_guarded(self, call: Call, kill: trio.CancelScope) -> None:
        """The call under the job's policies."""
        call.work = guard = ItemCall(self, call, kill)
        if call.fates is not None or self.seat.left:
            self._end(call, back)
            return
        try:
            result = await guard.run()
        except Exception as failure:
            if isinstance(failure, Rejected) and guard.work is None:  # else the function has met a limit of its own
                self._turned_away(call, failure)
                return
            failure = self._fenced(call, failure)
            self._set_apart(call, failure)
            if not await self._fell_back(guard, call, failure):
                self._failed(call, guard.work, failure)
        except BaseException as raised:
            self._failed(call, guard.work, self._fenced(call, raised))
        else:
            await self._done(call, result)

    def payload(self, items: Sequence[Item]) -> bytes:
        """What a call gets: the item, or a list of them where the job takes batches."""
        return b"[%s]" % b",".join([item.payload for item in items]) if self._batched else items[0].payload

    def _fenced(self, call: Call, raised: BaseException) -> Exception:
        """The boundary round foreign code: its own failure. What must pass is raised again, and the items go back."""
        passing, own = split_foreign(raised)
        if passing is None and own is not None:
            return as_failure(own)
        self._end(call, back)
        raise passing if passing is not None else raised

    def _set_apart(self, call: Call, failure: Exception) -> None:
        """Of a batch in which some items do not fit, only those have failed: the others go back."""
        if isinstance(failure, UnfitItem) and call.fates is None:
            unfit = [call.items[at] for at in failure.positions if at < len(call.items)]
            if unfit:
                self.seat.keep_only(call, unfit)

    # ---- what became of it ----

    async def _done(self, call: Call, result: bytes | None) -> None:
        """It ended well. What it returned is in the next queue, if there is one, before anybody is told of the end."""
        items = call.items
        if self.run_.chain is not None and result is not None and len(call.fates or ()) < len(items):
            try:
                await self.run_.chain.of(self.run_, items[0].id).put_result(result)
            except BaseException as raised:
                self._failed(call, None, self._fenced(call, raised))
                return
        self._ended_well(call, result)

    def _ended_well(self, call: Call, result: bytes | None) -> None:
        """Say so of each of its items. What it returned is in the next queue, where there is one."""
        items = call.items
        if call.fates is None and not self._batched:
            self.seat.tally.done += 1
            self._over(call, [Ending(id=items[0].id, token=items[0].token, how="done", result=result)])
            return
        results = each_result(items, result)
        self._end(call, lambda item: Ending(id=item.id, token=item.token, how="done", result=results[item.id]))

    def _failed(self, call: Call, work: Work | None, failure: Exception) -> None:
        """It failed: each item by itself has another attempt, or is dead."""
        if isinstance(failure, WorkerLost):
            self._lost = failure
            self.leave()
        if isinstance(failure, NotBegun) or (isinstance(failure, WorkerLost) and (work is None or not work.begun)):
            self._end(call, back)
            return
        self._end(call, lambda item: self._failure(item, failure))

    def _failure(self, item: Item, failure: Exception) -> Ending:
        wait, reason, shown = self._wait(item, failure), in_one_line(failure), _shown(failure)
        if wait is None:
            told = self._tell(
                events.ItemDead, item, f"item {item.id} is dead after {_attempts(item.attempt)}: {reason}", reason=reason
            )
            if told and shown:
                log.error("job raised", job=self.run_.job, run=self.run_.id, item=item.id, exception=shown)
            return Ending(id=item.id, token=item.token, how="dead", error=reason, traceback=shown)
        attempts = self._retry.attempts
        told = self._tell(
            events.ItemRetrying, item, f"item {item.id}: attempt {item.attempt} of {attempts} failed: {reason}",
            reason=reason, wait=round(wait, 3), attempts=attempts,
        )  # fmt: skip
        if told and shown:
            log.debug("attempt raised", job=self.run_.job, run=self.run_.id, item=item.id, exception=shown)
        return Ending(id=item.id, token=item.token, how="retry", error=reason, traceback=shown, delay=wait)

    def _wait(self, item: Item, failure: Exception) -> float | None:
        """Seconds until the next attempt; None if there is to be none."""
        if isinstance(failure, UnfitItem):
            return None
        wait = self._retry.wait_after(item.attempt, failure)
        return 0.0 if wait is not None and isinstance(failure, WorkerLost) else wait

    def _turned_away(self, call: Call, rejected: Rejected) -> None:
        """A limit did not let it begin: it goes back, for others, and this worker comes again when there is hope."""
        wait = REJECTED_FOR if rejected.retry_after is None else rejected.retry_after
        self._rejected = trio.current_time() + wait
        self.seat.note = f"waits: {rejected}"
        self._end(call, back)

    async def _fell_back(self, guard: ItemCall, call: Call, failure: Exception) -> bool:
        """Where it has failed for good, answer it by the fallback, if there is one; whether that ended well."""
        final = self._spec.fallback is not None and not isinstance(failure, (NotBegun, WorkerLost))
        if (
            not final
            or call.fates is not None
            or self.run_.stopping
            or any(self._wait(item, failure) is not None for item in call.items)
        ):
            return False
        assert self._spec.fallback is not None
        item = msgspec.json.decode(self.payload(call.items))
        answer = await guard.answer(self._spec.fallback, failure, item)
        if isinstance(answer, Outcome):
            await self._done(call, answer.returned)
            return True
        failure.add_note(f"its fallback failed: {in_one_line(answer)}")
        return False

    def _end(self, call: Call, ending: Callable[[Item], Ending]) -> None:
        """Say what became of each item, where nobody has decided that before: a cancel, a lost lease."""
        fates, endings, tally = call.fates or {}, [], self.seat.tally
        for item in call.items:
            fate = fates.get(item.id)
            if fate == "lost":
                continue
            if fate == "cancelled":
                self._tell(events.ItemCancelled, item, f"item {item.id} was cancelled")
                each = Ending(id=item.id, token=item.token, how="cancelled")
            elif fates:
                each = back(item)  # it was in one batch with those
            else:
                each = ending(item)
            setattr(tally, each.how, getattr(tally, each.how) + 1)
            endings.append(each)
        self._over(call, endings)

    def _over(self, call: Call, endings: Sequence[Ending]) -> None:
        self.seat.end(call, endings)
        if call.fates is not None and (ladder := self._ladders.pop(call, None)) is not None:
            ladder.cancel(reason="the call has ended")
        if self._runs is not None:
            self._handled += sum(each.how != "back" for each in endings)
            if self._handled >= self._runs:
                self.recycle(f"recycled: it has handled {self._handled} items")

    def _tell(self, kind: type[events.ItemEvent], item: Item, cause: str, **fields: Any) -> bool:
        return self.seat.reports.tell(kind, item.id, cause, job=self.run_.job, attempt=item.attempt, **fields)


class ItemCall(Guard[Returned]):
    """One call under the job's policies."""

    def __init__(self, worker: Worker, call: Call, kill: trio.CancelScope) -> None:
        super().__init__(worker.node, worker.run_)
        self._worker = worker
        self._call = call
        self.kill = kill
        """What ends it by force, whatever it waits for."""
        self.work: Work | None = None
        """The call of the handler; None before it."""

    @property
    def in_hand(self) -> Attempt | None:
        """What runs now: the call, or the fallback."""
        return self._in_hand

    async def run(self) -> bytes | None:
        """Make the call: what it returned. Raises what it failed with, and NotBegun where it is not to begin any more."""
        with self._cut:
            return (await self._limited()).result
        if isinstance(self._last, Exception):
            raise self._last
        if self._last is not None:
            return self._last.result
        if self._run.current_phase is not Phase.RUNNING:
            raise NotBegun("the worker is to end")
        assert self._spec.deadline is not None
        raise DeadlineExceeded(self._spec.deadline)

    async def answer(self, call: str, failure: Exception, item: Any) -> Outcome | Exception:
        """What the fallback comes to."""
        self._tell(events.FallingBack, run=self._run.id, cause=f"fallback after: {in_one_line(failure)}")
        return await self.fall_back(call, failure, item=item)

    def _tell(self, kind: type[events.ChildEvent], **fields: Any) -> None:
        self._worker.seat.shown = ""  # the row says something else for now
        super()._tell(kind, **fields)

    def _made(self, until: float | None) -> Work:
        items = self._call.items
        self.work = Work(self._run, until, items[0].id, items[0].attempt, self.kill, len(items))
        return self.work

    async def _body(self, attempt: Attempt) -> Returned:
        assert isinstance(attempt, Work)
        return Returned(await self._worker.handler.handle(attempt, self._worker.payload(self._call.items)))

    @property
    def _grace(self) -> float:
        return self._spec.grace if self._worker.handler.hears else 0.0


def each_result(items: Sequence[Item], result: bytes | None) -> dict[str, bytes | None]:
    """What of the result of a batch is whose: a list of as many is one for each; anything else is that of all."""
    if result is not None and result.startswith(b"["):
        each = msgspec.json.decode(result, type=list[msgspec.Raw])
        if len(each) == len(items):
            return {item.id: bytes(one) for item, one in zip(items, each, strict=True)}
    return dict.fromkeys((item.id for item in items), result)


def _shown(failure: Exception) -> str | None:
    """What there is to see of a failure besides its reason."""
    if isinstance(failure, RunFailed) and failure.traceback:
        return failure.traceback[-LONGEST_TRACEBACK:]
    raised = foreign(failure)
    if raised is None:
        return None
    frames = raised.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_NOT_THEIRS):
        frames = frames.tb_next
    lines = traceback.format_exception(type(raised), raised, frames or raised.__traceback__)
    return "".join(lines)[-LONGEST_TRACEBACK:]


_NOT_THEIRS = tuple(f"{Path(module.__file__ or '').parent}{os.sep}" for module in (supervisor, trio, outcome))
"""The code that calls theirs: nobody looks for a mistake there, and to show it takes long."""


def _attempts(count: int) -> str:
    return "1 attempt" if count == 1 else f"{count} attempts"
