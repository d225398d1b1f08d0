"""Producers: Python values become items, and are put where there is room for them."""

from __future__ import annotations

import datetime
import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import msgspec
import trio

from supervisor.errors import BadItem, QueueError, QueueFull, QueueUnavailable
from supervisor.queues.protocol import Draft, Engine, Notice, Receipt, Record, Settings, State, new_id

DEPTH = 256
"""Levels of nesting that an item may have: whoever reads it has a stack, too."""

CHUNK = 500
"""Items that are put at once, at most, and bytes of them."""
CHUNK_BYTES = 4 << 20

LONGEST_KEY = 128
"""Characters of a key or a group; a longer one is known by its hash."""

LOOK_AGAIN = 30.0
"""Seconds after which one who waits for an end looks by itself: an engine that was away meanwhile may not have told it."""

TRY_AGAIN = 1.0
"""Seconds between looks while the engine is away."""


class ManyOptions(TypedDict, total=False):
    """What can be said of items when they are put: see `Producer.put`."""

    priority: str | None
    delay: float
    at: float | datetime.datetime | None
    expire: float | None
    keep: bool
    timeout: float | None


class PutOptions(ManyOptions, total=False):
    """The same of one item."""

    id: str | None


class Producer:
    """Puts items into one queue, and waits for what becomes of them.

    An item is any value that is JSON: also a dataclass, a `msgspec.Struct`, a datetime. Belongs to the Trio thread.
    """

    def __init__(self, engine: Engine, check: Callable[[Any], object] | None = None) -> None:
        """`check` is called with each value before it is put, and raises BadItem where the handler does not take it."""
        self._engine = engine
        self._check = check
        self._awaited: dict[str, set[trio.Event]] = {}

    async def put(
        self,
        payload: Any,
        *,
        id: str | None = None,
        priority: str | None = None,
        delay: float = 0.0,
        at: float | datetime.datetime | None = None,
        expire: float | None = None,
        keep: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 (it limits the wait for room, not the put)
    ) -> Receipt:
        """Put one item; returns when it is as safe as the queue keeps things.

        `id`: putting the same again, while it is known, stores nothing new: with an id of your own, a put that raised or was
        cancelled can be repeated without harm. `priority`: one of the queue's; the middle one unless you say. `delay`: not
        before so many seconds from now. `at`: not before this moment (Unix time, or a datetime with a time zone). `expire`:
        when it has waited for so many seconds since then, it is done no more; unless you say, what the queue says. `keep`: its
        end is kept even if there is no result, for `wait`. `timeout`: how many seconds a full queue is waited for; None: as
        long as it takes.

        Raises BadItem for what is no item, QueueFull where there was no room in time, and QueueUnavailable where the engine
        does not answer: then it may have been stored, or not.
        """
        ids = None if id is None else [id]
        said = {"priority": priority, "delay": delay, "at": at, "expire": expire, "keep": keep}
        (receipt,) = await self._put([payload], ids, said, None, timeout)
        return receipt

    async def put_many(
        self,
        payloads: Iterable[Any],
        *,
        ids: Sequence[str] | None = None,
        priority: str | None = None,
        delay: float = 0.0,
        at: float | datetime.datetime | None = None,
        expire: float | None = None,
        keep: bool = False,
        on_stored: Callable[[int], object] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (it limits the wait for room, not the put)
    ) -> list[Receipt]:
        """Put many, in their order, with the same options; see `put`. `ids`: one for each.

        All of them are looked at before the first is put: BadItem means that nothing is stored. They are put some hundred at a
        time: after each time, `on_stored` is called with how many are stored by now. Where it ends early (QueueFull,
        QueueUnavailable, cancellation), those are stored.
        """
        said = {"priority": priority, "delay": delay, "at": at, "expire": expire, "keep": keep}
        return await self._put(list(payloads), ids, said, on_stored, timeout)

    async def wait(self, id: str, timeout: float | None = None) -> Record:  # noqa: ASYNC109 (TimeoutError says it better)
        """Wait until an item has ended; gives it, with its state, result or error.

        An item is known when it has ended if it has a result, was put with `keep`, or somebody waited for it, and then for the
        queue's `keep_results`. Raises QueueError for one that is not known, and TimeoutError where it has not ended in so many seconds. An engine that
        is away is waited for.
        """
        with trio.move_on_after(math.inf if timeout is None else timeout):
            while True:
                with self._listening(id) as ended:
                    patience = LOOK_AGAIN
                    try:
                        record = await self._engine.show(id, keep=True)
                    except QueueUnavailable:
                        patience = TRY_AGAIN
                    else:
                        if record is None:
                            raise QueueError(
                                f"queue {self._engine.name} knows no item {id}, or not any more: one that is put with `keep` "
                                "is known when it has ended"
                            )
                        if record.state not in (State.WAITING, State.RUNNING):
                            return record
                    with trio.move_on_after(patience):
                        await ended.wait()
        raise TimeoutError(f"item {id} has not ended within {timeout:g} s")

    def heard(self, notice: Notice) -> None:
        """The engine says this: what its `listen` is to hand on."""
        if notice.what == "ended":
            for event in self._awaited.get(notice.id, ()):
                event.set()

    @contextmanager
    def _listening(self, id: str) -> Iterator[trio.Event]:
        """An event that is set when the item ends from now on."""
        event = trio.Event()
        listening = self._awaited.setdefault(id, set())
        listening.add(event)
        try:
            yield event
        finally:
            listening.discard(event)
            if not listening and self._awaited.get(id) is listening:
                del self._awaited[id]

    async def _prepare(self) -> None:
        """Called before each put: the settings are to be those in force."""

    async def _put(
        self,
        payloads: Sequence[Any],
        ids: Sequence[str] | None,
        said: Mapping[str, Any],
        on_stored: Callable[[int], object] | None,
        timeout: float | None,  # noqa: ASYNC109
    ) -> list[Receipt]:
        await self._prepare()
        drafts = drafted(self._engine.settings, payloads, ids, check=self._check, **said)
        until = math.inf if timeout is None else trio.current_time() + timeout
        receipts: list[Receipt] = []
        most = CHUNK
        while len(receipts) < len(drafts):
            chunk = _chunk(drafts, len(receipts), most)
            try:
                receipts += await self._engine.put(chunk)
            except QueueFull as full:
                if len(chunk) > 1:  # there may be room for some of them
                    most = len(chunk) // 2
                    continue
                await self._wait_for_room(until, full, len(receipts), len(drafts))
                continue
            most = min(2 * most, CHUNK)
            if on_stored is not None:
                on_stored(len(receipts))
        return receipts

    async def _wait_for_room(self, until: float, full: QueueFull, stored: int, of: int) -> None:
        if trio.current_time() < until:
            with trio.move_on_at(until):
                await self._engine.wait_for_room()
                return
        raise QueueFull(f"{full}; {stored} of {of} are stored" if of > 1 else str(full)) from None


def _chunk(drafts: Sequence[Draft], start: int, most: int) -> Sequence[Draft]:
    """Those that are put next: so many at most, and no more bytes than are put at once, but one at least."""
    size = 0
    for end in range(start, min(start + most, len(drafts))):
        size += len(drafts[end].payload)
        if size > CHUNK_BYTES and end > start:
            return drafts[start:end]
    return drafts[start : start + most]


# ---- from values to drafts ----


def drafted(
    settings: Settings,
    payloads: Sequence[Any],
    ids: Sequence[str] | None,
    *,
    check: Callable[[Any], object] | None,
    priority: str | None,
    delay: float,
    at: float | datetime.datetime | None,
    expire: float | None,
    keep: bool,
) -> list[Draft]:
    """Values as what an engine takes. Raises BadItem, which names the item where there are several."""
    if ids is not None and len(ids) != len(payloads):
        raise BadItem(f"expected as many ids as items ({len(payloads)}), got {len(ids)}")
    said = {
        "priority": _priority(settings, priority),
        "delay": _seconds("delay", delay, least=0.0),
        "at": None if at is None else _moment(at),
        "expire": settings.spec.expire if expire is None else _seconds("expire", expire, least=1e-3),
        "keep": keep,
    }
    drafts: list[Draft] = []
    for number, payload in enumerate(payloads):
        try:
            text = encoded(payload)
            if check is not None:
                check(payload)
            id = new_id() if ids is None else _id(ids[number])
            drafts.append(_draft(settings, id, payload, text, said))
        except BadItem as bad:
            bad.position = number
            if len(payloads) > 1:
                bad.args = (f"item {number + 1} of {len(payloads)}: {bad}",)
            raise
    return drafts


def _draft(settings: Settings, id: str, payload: Any, text: bytes, said: Mapping[str, Any]) -> Draft:
    unique, group_by = settings.spec.unique, settings.group_by
    if unique is None and group_by is None:
        return Draft(id=id, payload=text, **said)
    value = payload if type(payload) is dict else msgspec.json.decode(text)
    key = None
    if unique is not None:
        key = _word([_field(value, name, "unique") for name in unique.by] if unique.by else value)
    group = None if group_by is None else _field(value, group_by, "serialize_by")
    if group is not None:
        group = _shortened(group) if isinstance(group, str) else _word(group)
    return Draft(id=id, payload=text, key=key, group=group, **said)


def encoded(payload: Any) -> bytes:
    """A value as JSON. Raises BadItem for what is none."""
    try:
        text = msgspec.json.encode(payload)
        if b"null" in text or text.count(b"[") + text.count(b"{") > DEPTH:
            _look_through(payload)
    except RecursionError:
        raise BadItem(_TOO_DEEP) from None
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise BadItem(f"no JSON: {str(error)[:1].lower()}{str(error)[1:]}") from None
    return text


_TOO_DEEP = f"nested too deeply: an item may have {DEPTH} levels"


def _look_through(payload: Any) -> None:
    """What JSON cannot say, and is not refused when it is written: NaN, infinity (they become null), and any depth."""
    level = [msgspec.to_builtins(payload)]
    for _ in range(DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise BadItem(f"no JSON: there is no {value} in it")
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, (list, tuple, set, frozenset)):
                inner += value
        if not inner:
            return
        level = inner
    raise BadItem(_TOO_DEEP)


def _field(value: Any, name: str, wanted_by: str) -> Any:
    if not isinstance(value, dict):
        raise BadItem(f"expected an object with a field {name!r} (`{wanted_by}` of the queue), got {_shortened(repr(value))}")
    if name not in value:
        raise BadItem(f"there is no field {name!r}, which `{wanted_by}` of the queue names{_meant(name, value)}")
    return value[name]


def _word(value: Any) -> str:
    """The same text for the same value, whatever the order of its keys."""
    return _shortened(msgspec.json.encode(value, order="sorted").decode())


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_KEY else hashlib.sha256(text.encode()).hexdigest()


def _priority(settings: Settings, name: str | None) -> int:
    names = settings.spec.priorities
    if name is None:
        return len(names) // 2
    if name not in names:
        raise BadItem(f"no priority {name!r}; there are {', '.join(names)}{_meant(str(name), names)}")
    return names.index(name)


def _seconds(what: str, seconds: float, *, least: float) -> float:
    if not isinstance(seconds, (int, float)) or not least <= seconds < math.inf:
        raise BadItem(f"{what}: expected seconds{', 0 or more' if not least else ', more than 0'}, got {seconds!r}")
    return float(seconds)


def _moment(at: float | datetime.datetime) -> float:
    if isinstance(at, datetime.datetime):
        if at.tzinfo is None:
            raise BadItem(f"at: {at.isoformat()} has no time zone: which moment it is depends on where it is read")
        return at.timestamp()
    if not isinstance(at, (int, float)) or not math.isfinite(at):
        raise BadItem(f"at: expected Unix time or a datetime with a time zone, got {at!r}")
    return float(at)


def _id(id: str) -> str:
    if not isinstance(id, str) or not 0 < len(id) <= LONGEST_KEY or not id.isprintable() or " " in id:
        raise BadItem(f"id: expected 1 to {LONGEST_KEY} printable characters without spaces, got {id!r}")
    return id


def _meant(word: str, known: Iterable[Any]) -> str:
    near = difflib.get_close_matches(word, [str(each) for each in known], n=1)
    return f'; did you mean "{near[0]}"?' if near else ""
