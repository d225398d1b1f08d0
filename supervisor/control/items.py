"""Requests about queues and the items in them: `submit`, `queue ...`, and `cancel` of an item.

The id of an item says nothing of its queue, and who asks need not know it: all queues are looked through at the same time.
"""

# ruff: noqa: ASYNC109  (handlers take what the table of verbs names, `timeout` too)

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio

from supervisor.concurrency import race
from supervisor.control.messages import INVALID_PARAMS, ItemStatus, QueueStatus, Submitted
from supervisor.errors import BadItem, ControlError, QueueError, QueueFull, did_you_mean
from supervisor.events import ItemCancelled
from supervisor.queues import shown_backend
from supervisor.queues.protocol import Counts, Record, State
from supervisor.state import Answer
from supervisor.wall import written

if TYPE_CHECKING:
    from supervisor.control.call import Call
    from supervisor.events import Subscription
    from supervisor.queues.protocol import Engine
    from supervisor.tree import Supervisor

SHOWN = 4096
"""Bytes of a payload that a list of items shows; what is longer is left out there."""

MOST_SHOWN = 10_000
"""Items of one list, at most."""


# ---------------------------------------------------------------- putting


async def submit(
    call: Call,
    queue: str,
    items: list[msgspec.Raw],
    id: list[str],
    priority: str,
    delay: float | None,
    at: str,
    expire: float | None,
    keep: bool,
    result: bool,
    timeout: float | None,
) -> list[Submitted]:
    """Put items; all of them are looked at before the first is stored. An error's `data` says how many are `stored`."""
    _engine(call.tree, queue)
    if id and len(id) != len(items):
        raise ControlError(f"submit: expected as many ids as items ({len(items)}), got {len(id)}", INVALID_PARAMS)
    until = math.inf if timeout is None else trio.current_time() + timeout
    progress = [0]
    with _told(progress):
        receipts = await call.tree.queues.producer(queue).put_many(
            items,
            ids=id or None,
            priority=priority or None,
            delay=delay or 0.0,
            at=_moment(at),
            expire=expire,
            keep=keep or result,
            timeout=timeout,
            on_stored=progress.append,
        )
    done = [Submitted(id=receipt.id, what=receipt.what) for receipt in receipts]
    if not result:
        return done
    there = [each for each in done if each.what != "rejected"]
    ended = iter(await _ended(call, [(queue, each.id) for each in there], until))
    return [each if each.what == "rejected" else msgspec.structs.replace(each, ended=next(ended)) for each in done]


@contextmanager
def _told(progress: Sequence[int]) -> Iterator[None]:
    """What keeps items from being put, as an error for who asked. The last of `progress` is how many are stored."""
    try:
        yield
    except QueueError as problem:
        code = ControlError.TIMED_OUT if isinstance(problem, QueueFull) else ControlError.REFUSED
        bad = {"bad": problem.position} if isinstance(problem, BadItem) and problem.position is not None else {}
        raise ControlError(str(problem), code, {"stored": progress[-1], **bad}) from None


def _moment(text: str) -> float | None:
    """A moment in Unix time."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ControlError(
            f'at: expected a moment such as "2026-12-24T18:00:00+01:00", got {text[:64]!r}', INVALID_PARAMS
        ) from None


# ---------------------------------------------------------------- queues


async def queues(call: Call, names: list[str]) -> list[QueueStatus]:
    """How queues stand. One whose engine is away keeps nobody from hearing of the others."""
    chosen = _chosen(call.tree, names)
    rows: dict[str, QueueStatus] = {}

    async def look(name: str) -> None:
        try:
            rows[name] = _row(call.tree, name, await call.tree.queues.engine(name).counts(), None)
        except QueueError as problem:
            rows[name] = _row(call.tree, name, None, str(problem))

    async with trio.open_nursery() as nursery:
        for name in chosen:
            nursery.start_soon(look, name)
    return [rows[name] for name in chosen]


def _row(tree: Supervisor, name: str, counts: Counts | None, trouble: str | None) -> QueueStatus:
    spec = tree.config.queues[name]
    return QueueStatus(
        name=name,
        backend=shown_backend(spec.backend),
        jobs=tuple(job for job, each in tree.config.jobs.items() if each.queue == name),
        size=spec.size,
        trouble=trouble,
        **({} if counts is None else msgspec.structs.asdict(counts)),
    )


def _chosen(tree: Supervisor, patterns: Sequence[str]) -> list[str]:
    """The queues that these names and globs mean, in the order of the file; all without any."""
    known = tree.queues.names
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            _engine(tree, pattern)
    return [name for name in known if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _engine(tree: Supervisor, name: str) -> Engine:
    """The engine of a queue. Raises ControlError for a name that there is not, and for a queue that cannot be opened."""
    try:
        return tree.queues.engine(name)
    except LookupError:
        hint = did_you_mean(name, tree.queues.names, "'") if tree.queues.names else ": the file has no [queues]"
        raise ControlError(f"no queue {name[:64]!r}{hint}", ControlError.NO_SUCH_NAME) from None
    except QueueError as problem:
        raise ControlError(str(problem)) from None


async def pause(call: Call, queue: str) -> list[Answer]:
    """Have nobody take items from a queue."""
    engine = _engine(call.tree, queue)
    call.record([queue])
    with _told([0]):
        await engine.pause(True)
    return [Answer(name=queue, ok=True, text="paused: nobody takes items from it until it is resumed")]


async def resume(call: Call, queue: str) -> list[Answer]:
    """End that."""
    engine = _engine(call.tree, queue)
    call.record([queue])
    with _told([0]):
        await engine.pause(False)
    return [Answer(name=queue, ok=True, text="resumed")]


async def requeue(call: Call, queue: str, ids: list[str], all: bool) -> list[Answer]:
    """Give dead items their attempts anew."""
    engine = _engine(call.tree, queue)
    if bool(ids) is all:
        raise ControlError("queue requeue: which? expected the ids of items, or --all", INVALID_PARAMS)
    call.record([queue])
    with _told([0]):
        count = await engine.requeue(ids or None)
    others = "" if all or count == len(ids) else f"; {len(ids) - count} of those named are not dead, or not known"
    return [Answer(name=queue, ok=not others, text=f"{_items(count)} requeued{others}")]


async def purge(call: Call, queue: str, state: str) -> list[Answer]:
    """Remove all items of a state."""
    engine, which = _engine(call.tree, queue), _state(state)
    if which is State.RUNNING:
        raise ControlError("queue purge: what runs is not removed: cancel it")
    call.record([queue])
    with _told([0]):
        count = await engine.purge(which)
    return [Answer(name=queue, ok=True, text=f"{_items(count)} removed")]


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _state(text: str) -> State:
    try:
        return State(text)
    except ValueError:
        known = [state.value for state in State]
        hint = did_you_mean(text, known, "'") or f"; expected {', '.join(known[:-1])} or {known[-1]}"
        raise ControlError(f"no state {text[:16]!r}{hint}", INVALID_PARAMS) from None


# ---------------------------------------------------------------- items


async def peek(call: Call, queue: str, lines: int, state: str = State.DEAD.value) -> list[ItemStatus]:
    """The next items of a queue, or the last ones of another state; `queue.dead` is the same of the dead ones."""
    engine = _engine(call.tree, queue)
    with _told([0]):
        records = await engine.peek(_state(state), min(lines, MOST_SHOWN))
    return [_status(engine, record, SHOWN) for record in records]


async def show(call: Call, id: str, queue: str) -> ItemStatus:
    """All that is known of an item."""
    found = await _find(call.tree, id, queue)
    return _status(_engine(call.tree, found.queue), found)


async def wait(call: Call, ids: list[str], queue: str, timeout: float | None) -> list[ItemStatus]:
    """Wait until items have ended."""
    until = math.inf if timeout is None else trio.current_time() + timeout
    return await _ended(call, [((await _find(call.tree, each, queue)).queue, each) for each in ids], until)


async def _ended(call: Call, items: Sequence[tuple[str, str]], until: float) -> list[ItemStatus]:
    """What came of these (queue and id), in their order. Raises ControlError where the time is up before."""
    ended: dict[str, ItemStatus] = {}

    async def see(queue: str, id: str) -> None:
        with _told([0]):
            record = await call.tree.queues.producer(queue).wait(id)
        ended[id] = _status(_engine(call.tree, queue), record)

    with trio.move_on_at(until):
        async with trio.open_nursery() as nursery:
            for queue, id in dict.fromkeys(items):
                nursery.start_soon(see, queue, id)
    done = [ended[id] for _, id in items if id in ended]
    if late := [id for _, id in items if id not in ended]:
        text = late[0] if len(late) == 1 else f"{len(late)} of {_items(len(items))}"
        raise ControlError(f"not ended yet: {text}", ControlError.TIMED_OUT, done)
    return done


async def _find(tree: Supervisor, id: str, queue: str = "") -> Record:
    """The item of this id, in that queue or in whatever there is."""
    found, silent = await _look(tree, id, [_engine(tree, queue).name] if queue else tree.queues.names)
    if len(found) > 1:
        names = ", ".join(record.queue for record in found)
        raise ControlError(f"several queues have an item {id!r}: {names}; say which with --queue")
    if found:
        return found[0]
    if silent:
        raise ControlError(f"no item {id!r} in the queues that answer; {'; '.join(silent)}")
    forgotten = "what has ended and left nothing to keep is forgotten"
    raise ControlError(f"no item {id!r}{f' in {queue}' if queue else ''}: {forgotten}", ControlError.NO_SUCH_NAME)


async def _look(tree: Supervisor, id: str, names: Iterable[str]) -> tuple[list[Record], list[str]]:
    """What these queues know of an id, and what those said that do not answer."""
    found: list[Record] = []
    silent: list[str] = []

    async def look(name: str) -> None:
        try:
            if (record := await tree.queues.engine(name).show(id)) is not None:
                found.append(record)
        except QueueError as problem:
            silent.append(str(problem))

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(look, name)
    return found, silent


async def cancel(call: Call, records: Sequence[Record], wait: bool, until: float) -> list[Answer]:
    """Cancel items, wherever they are; with `wait`, those that run are waited for until that moment."""
    answers: dict[str, Answer] = {}

    async def one(record: Record) -> None:
        answers[record.id] = await _cancel(call, record, wait)

    with trio.move_on_at(until):
        async with trio.open_nursery() as nursery:
            for record in records:
                nursery.start_soon(one, record)
    if late := [record.id for record in records if record.id not in answers]:
        done = list(answers.values())
        raise ControlError(f"cancel: not done in time: {', '.join(late)}; it goes on", ControlError.TIMED_OUT, done)
    return [answers[record.id] for record in records]


async def _cancel(call: Call, record: Record, wait: bool) -> Answer:
    with call.tree.journal.subscribe() as feed:
        with _told([0]):
            what: str = await _engine(call.tree, record.queue).cancel(record.id)
        waited = what == "cancelled"
        if what == "running" and wait:
            what = await race(partial(_heard, feed, record), partial(_outcome, call, record))
    if what == "running":
        return Answer(name=record.id, ok=True, text=f"it runs ({record.owner}): its worker is told to end it")
    if what == "cancelled":
        return Answer(name=record.id, ok=True, text="cancelled: it waited" if waited else "cancelled: it ran")
    return Answer(name=record.id, ok=False, text="it has ended already")


async def _heard(feed: Subscription, record: Record) -> str:
    """Wait until a worker of this daemon has said that the item is cancelled."""
    async for event in feed:
        if isinstance(event, ItemCancelled) and (event.queue, event.item) == (record.queue, record.id):
            return "cancelled"
    return "ended"


async def _outcome(call: Call, record: Record) -> str:
    """Wait until the item has ended, on whatever host; how, or that it is forgotten already."""
    try:
        ended = await call.tree.queues.producer(record.queue).wait(record.id)
    except QueueError:
        return "ended"
    return ended.state.value


async def find(tree: Supervisor, id: str) -> Record | None:
    """The item that this word means; None where no queue knows of it. Raises ControlError where that cannot be said."""
    try:
        return await _find(tree, id)
    except ControlError as problem:
        if problem.code != ControlError.NO_SUCH_NAME:
            raise
        return None


def _status(engine: Engine, record: Record, longest: float = math.inf) -> ItemStatus:
    """An item for people; a payload longer than that is left out."""
    priorities = engine.settings.spec.priorities
    known = record.priority < len(priorities)
    return ItemStatus(
        id=record.id,
        queue=record.queue,
        state=record.state.value,
        attempts=record.attempts,
        priority=priorities[record.priority] if known else str(record.priority),
        put_at=written(record.put_at),
        ready_at=written(record.ready_at),
        expires_at=_when(record.expires_at),
        started_at=_when(record.started_at),
        ended_at=_when(record.ended_at),
        lease_until=_when(record.lease_until),
        owner=record.owner,
        key=record.key,
        group=record.group,
        cancelling=record.cancelling,
        progress=record.progress,
        error=record.error,
        traceback=record.traceback,
        bytes=len(record.payload),
        payload=msgspec.Raw(record.payload) if len(record.payload) <= longest else None,
        result=None if record.result is None or len(record.result) > longest else msgspec.Raw(record.result),
    )


def _when(moment: float | None) -> str | None:
    return None if moment is None else written(moment)
