"""Producers: Python values become items, and are put where there is room for them."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, TypedDict, TypeVar

import msgspec
import trio

from supervisor.errors import BadItem, QueueError, QueueFull, QueueUnavailable, did_you_mean
from supervisor.queues.protocol import Draft, Engine, Notice, Receipt, Record, Settings, State, new_id

T = TypeVar("T")

DEPTH = 256
"""Levels of nesting that an item may have: whoever reads it has a stack, too."""

CHUNK = 500
"""Items that are put at once, at most, and bytes of them."""
CHUNK_BYTES = 4 << 20

LARGE = 1 << 18
"""Bytes of JSON, of one item or of many, that are looked through before everybody else has a turn; a larger item is looked
through in a thread."""

LONGEST_KEY = 128
"""Characters of a key or a group; a longer one is known by its hash."""

LOOK_AGAIN = 30.0
"""Seconds after which one who waits for an end looks by itself: an engine that was away meanwhile may not have told it."""

TRY_AGAIN = 1.0
"""Seconds between looks while the engine is away."""


Check = Callable[[Sequence[bytes]], Awaitable[None]]
"""Asks whether who handles the queue takes these items, which are JSON. Raises BadItem for the first that is not taken; its
`position` says which."""


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

    An item is any value that is JSON: also a dataclass, a `msgspec.Struct`, a datetime; `msgspec.Raw` is JSON already, and
    where that is large it is not decoded at all. Belongs to the Trio thread.
    """

    def __init__(self, engine: Engine, check: Check | None = None) -> None:
        """`check` is called with all items before the first is put."""
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
        queue's `keep_results`. Raises QueueError for one that is not known, and TimeoutError where it has not ended in so many
        seconds. An engine that is away is waited for.
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
        drafts = await self._drafted(payloads, ids, said)
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

    async def _drafted(self, payloads: Sequence[Any], ids: Sequence[str] | None, said: Mapping[str, Any]) -> list[Draft]:
        """Values as what an engine takes. Raises BadItem, which names the item where there are several."""
        if ids is not None and len(ids) != len(payloads):
            raise BadItem(f"expected as many ids as items ({len(payloads)}), got {len(ids)}")
        settings, options = self._engine.settings, _options(self._engine.settings, **said)
        drafts: list[Draft] = []
        looked = 0
        try:
            for payload in payloads:
                value, text = await _aside(_size(payload), encoded, payload)
                id = None if ids is None else ids[len(drafts)]
                drafts.append(await _aside(len(text), _draft, settings, id, value, text, options))
                looked += len(text)
                if looked > LARGE:
                    looked = 0
                    await trio.lowlevel.checkpoint()
            if self._check is not None:
                await self._check([draft.payload for draft in drafts])
        except BadItem as bad:
            bad.position = len(drafts) if bad.position is None else bad.position
            if len(payloads) > 1:
                bad.args = (f"item {bad.position + 1} of {len(payloads)}: {bad}",)
            raise
        return drafts

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


class _Options(NamedTuple):
    """What was said of items, as drafts have it."""

    priority: int
    delay: float
    at: float | None
    expire: float | None
    keep: bool


def _options(
    settings: Settings,
    *,
    priority: str | None,
    delay: float,
    at: float | datetime.datetime | None,
    expire: float | None,
    keep: bool,
) -> _Options:
    return _Options(
        priority=_priority(settings, priority),
        delay=_seconds("delay", delay, least=0.0),
        at=None if at is None else _moment(at),
        expire=settings.spec.expire if expire is None else _seconds("expire", expire, least=1e-3),
        keep=keep,
    )


def _size(payload: Any) -> int:
    """How much JSON it is, where that is known."""
    return memoryview(payload).nbytes if isinstance(payload, msgspec.Raw) else 0


async def _aside(size: int, function: Callable[..., T], *args: Any) -> T:
    """Call it; in a thread where there is much to look at. That holds up others for no longer than its longest step takes."""
    if size <= LARGE:
        return function(*args)
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def encoded(payload: Any) -> tuple[Any, bytes]:
    """A value, and that as JSON; where it is large and JSON already, there is no other value of it.

    Raises BadItem for what is no JSON, as far as that is seen without looking into it.
    """
    try:
        if isinstance(payload, msgspec.Raw):
            if _size(payload) > LARGE:
                return msgspec.json.decode(payload, type=msgspec.Raw), bytes(payload)
            payload = msgspec.json.decode(payload)
        return payload, msgspec.json.encode(payload)
    except RecursionError:
        raise BadItem(_TOO_DEEP) from None
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise BadItem(f"no JSON: {_lower(str(error))}") from None


def _lower(text: str) -> str:
    """What an exception says, as the middle of a sentence."""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


_TOO_DEEP = f"nested too deeply: an item may have {DEPTH} levels"


def _draft(settings: Settings, id: str | None, value: Any, text: bytes, options: _Options) -> Draft:
    """Raises BadItem for what is no JSON, what is nested too deeply, and what has not the fields that it needs."""
    if b"null" in text and not isinstance(value, msgspec.Raw):
        _look_for_numbers(value)
    if text.count(b"[") + text.count(b"{") > DEPTH and _depth(text) > DEPTH:
        raise BadItem(_TOO_DEEP)
    key, group = _marks(settings, value, text)
    priority, delay, at, expire, keep = options
    return Draft(
        id=new_id() if id is None else _id(id),
        payload=text,
        priority=priority,
        delay=delay,
        at=at,
        expire=expire,
        key=key,
        group=group,
        keep=keep,
    )


def _look_for_numbers(value: Any) -> None:
    """JSON has no NaN and no infinity, and they are not refused when it is written: they become null."""
    level = [value]
    while level:
        inner: list[Any] = []
        for each in level:
            if isinstance(each, float):
                if not math.isfinite(each):
                    raise BadItem(f"no JSON: there is no {each} in it")
            elif isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, (list, tuple, set, frozenset)):
                inner += each
            elif not isinstance(each, _SIMPLE) and isinstance(plain := msgspec.to_builtins(each), (dict, list, float)):
                inner.append(plain)
        level = inner


_SIMPLE = (str, int, bytes, bytearray, type(None), datetime.date, datetime.time, datetime.timedelta, msgspec.Raw)
"""What has nothing in it."""

_PIECE = 1 << 16
"""Bytes that are looked at in one step."""


def _depth(text: bytes) -> int:
    """Levels of nesting in JSON, which is not decoded for that."""
    deepest = depth = end = 0
    inside = False
    while end < len(text):
        begin, end = end, min(end + _PIECE, len(text))
        while text[end - 1 : end] == b"\\" and end < len(text):  # what is escaped is not to begin the next piece
            end += 1
        piece = text[begin:end]
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.translate(None, _OTHERS).split(b'"')
        brackets = b"".join(parts[inside::2])
        inside = inside if len(parts) % 2 else not inside
        if brackets:
            levels = [*accumulate(memoryview(brackets.translate(_STEPS)).cast("b"), initial=depth)]
            deepest, depth = max(deepest, max(levels)), levels[-1]
    return deepest


_OTHERS = bytes(each for each in range(256) if each not in b'[]{}"')
_STEPS = bytes({**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", 255)}.get(each, 0) for each in range(256))
"""Opening brackets are one level more, closing ones one (as a byte with a sign) less."""


def _marks(settings: Settings, value: Any, text: bytes) -> tuple[str | None, str | None]:
    """What `unique` and `serialize_by` go by."""
    unique, group_by = settings.spec.unique, settings.group_by
    if unique is None and group_by is None:
        return None, None
    names = unique.by if unique is not None else ()
    if unique is not None and not names:
        value = msgspec.json.decode(text)
    elif type(value) is not dict:
        value = _some_of(text, {*names, *([group_by] if group_by is not None else [])})
    key = None
    if unique is not None:
        key = _word([_field(value, name, "unique") for name in names] if names else value)
    group = None if group_by is None else _field(value, group_by, "serialize_by")
    if group is not None:
        group = _shortened(group) if isinstance(group, str) else _word(group)
    return key, group


def _some_of(text: bytes, names: Iterable[str]) -> Any:
    """An object with these fields at least, as far as it has them; of what is no object, the value, or how it begins."""
    if len(text) <= LARGE:
        return msgspec.json.decode(text)
    if text.lstrip()[:1] != b"{":
        return text[:LONGEST_KEY].decode(errors="replace")
    fields = {f"field{number}": name for number, name in enumerate(names)}
    raw = msgspec.Raw | msgspec.UnsetType
    some = msgspec.defstruct("Some", [(field, raw, msgspec.UNSET) for field in fields], rename=fields)
    found = msgspec.structs.asdict(msgspec.json.decode(text, type=some))
    return {fields[field]: msgspec.json.decode(each) for field, each in found.items() if each is not msgspec.UNSET}


def _field(value: Any, name: str, wanted_by: str) -> Any:
    if not isinstance(value, dict):
        raise BadItem(f"expected an object with a field {name!r} (`{wanted_by}` of the queue), got {repr(value)[:LONGEST_KEY]}")
    if name not in value:
        raise BadItem(
            f"there is no field {name!r}, which `{wanted_by}` of the queue names{did_you_mean(name, map(str, value))}"
        )
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
        raise BadItem(f"no priority {name!r}; there are {', '.join(names)}{did_you_mean(str(name), names)}")
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
