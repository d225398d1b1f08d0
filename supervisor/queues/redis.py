"""A queue in a Redis or Valkey (6.2 or newer) that many daemons on many hosts share.

Everything that is done to it is one script (`redis.lua`), and so one atomic step, by the server's clock. It knows a queue by
these keys, all with the same hash tag: a queue is on one node of a cluster.

    {supervisor:NAME}:items       hash   by id: where the item is in its life, as MessagePack
                     :payloads :results :errors   hashes   by id: what may be large
                     :ready:N     zset   what may be claimed, one line for each priority, by when it could be first
                     :delayed :running :expiring   zsets   by when: it may be claimed, its lease is over, it expires
                     :parked :parked:N:GROUP       zsets   what waits for others of its group, in all and in each line
                     :done :dead :cancelled :expired   zsets   what has ended, by when
                     :unique :until :groups         who has a key, how long for; how many of a group run
                     :gone:0 :gone:1                sets    ids that were here a moment ago: to put them again is nothing new
                     :control                       hash    numbers, the pause, the settings
                     :news                          the channel on which all hear what happens

Why no streams: a stream gives what was put first, and that is all it can. Here an item comes first for being urgent, or once
its time has come, or because the one before it of the same group is done; one that was given back goes to the front, one that
is cancelled leaves the middle, and a late worker is told by its token that it is late: a consumer group knows none of that.

Nobody asks again and again. A claim that leaves nothing which may run leaves a mark, and whoever brings something then tells
all; what the clock alone will bring, the claim has told. Where this process itself puts and waits for work, one call does both.
A daemon that was away asks at once for what it has missed: which of its items are lost, or to be cancelled; those of which it
never heard, since the answer to its claim was lost, wait again.

How safe an item is depends on the server: by default Redis writes its data down now and then. `appendonly yes` is what one
wants; what is missing is said once.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import trio
from msgspec import Raw
from msgspec.msgpack import Decoder

from supervisor.concurrency.crew import open_crew
from supervisor.queues import Place
from supervisor.queues.lookout import Lookout
from supervisor.queues.protocol import (
    Claimed,
    Counts,
    Demand,
    Draft,
    Ending,
    Item,
    Notice,
    QueueError,
    QueueFull,
    QueueUnavailable,
    Receipt,
    Record,
    Settings,
    State,
    new_id,
    packed,
    unpacked,
)
from supervisor.queues.redis_link import COMMANDS, FAREWELL, Address, Link, Operation, Reply, ResponseError
from supervisor.queues.sql import NO_ATTEMPT_LEFT, WORKER_LOST

if TYPE_CHECKING:
    from coredis.connection import BaseConnection

BULK = 1000
"""So many are requeued or purged in one step: the server serves nobody else meanwhile."""

DOUBTFUL = 10_000
"""So many drafts are remembered of which nobody knows whether they are stored."""


@asynccontextmanager
async def open(name: str, settings: Settings, place: Place) -> AsyncIterator[RedisQueue]:
    """The queue `name` in the server that `backend` says. Raises QueueError where that is no URL of a Redis."""
    try:
        address = Address.parse(settings.spec.backend)
    except ValueError as error:
        raise QueueError(f"queue {name}: {error}") from None
    queue = RedisQueue(name, settings, address, place)
    async with open_crew() as crew:
        crew.start_soon(queue._serve, name=f"queue {name}: {address}")
        try:
            yield queue
        finally:
            await queue._close()


def refusal(backend: str) -> str:
    """Why this URL is of no use; empty where it is."""
    try:
        Address.parse(backend)
    except ValueError as error:
        return str(error)
    return ""


# ---- what goes over the wire; `redis.lua` has the same names ----


class _Limits(msgspec.Struct, omit_defaults=True):
    """What of the settings the script goes by."""

    size: int
    lease: float
    keep: float
    per_key: int
    on_conflict: str | None
    """None: keys mean nothing."""
    worker_lost: Raw
    no_attempt: Raw
    unique_queued: bool = False
    unique_for: float | None = None
    concurrency: int | None = None
    rate: float | None = None
    burst: int = 0


class _Draft(msgspec.Struct, omit_defaults=True):
    id: str
    payload: Raw
    priority: int
    delay: float
    at: float | None = None
    expire: float | None = None
    key: str | None = None
    group: str | None = None
    keep: bool = False
    again: bool = False
    """It was put before, and may be over by now."""


class _Full(msgspec.Struct):
    """There was no room. Of a shape of its own: what a bad network makes of receipts must not look like it."""

    full: float
    """In how many seconds the clock may make some; negative: never."""


class _Ending(msgspec.Struct, omit_defaults=True):
    id: str
    token: int
    how: str
    delay: float
    result: Raw | None = None
    error: Raw | None = None


class _Taken(msgspec.Struct, array_like=True):
    """An item as a claim brings it, but for its payload."""

    id: str
    token: int
    attempt: int
    priority: int
    put_at: float
    ready_at: float
    group: str | None = None


class _Row(msgspec.Struct):
    """An item as people see it, but for what may be large."""

    id: str
    state: State
    prio: int
    seq: int
    tries: int
    put: float
    ready: float
    late: bool = False
    """It waits for its time."""
    expires: float | None = None
    began: float | None = None
    ended: float | None = None
    lease: float | None = None
    owner: str | None = None
    key: str | None = None
    group: str | None = None
    done: float | None = None
    total: float | None = None
    cancelling: bool = False


class _News(msgspec.Struct, array_like=True):
    """What all are told."""

    what: Literal["work", "room", "paused", "resumed", "ended", "cancel", "lost", "new"]
    about: float | str | list[str] = ""
    """Of work: in how many seconds. Else ids."""
    token: int = 0


_any = Decoder().decode
_flag = Decoder(bool).decode
_flags = Decoder(list[bool]).decode
_names = Decoder(list[str]).decode
_number = Decoder(int).decode
_numbers = Decoder(list[int]).decode
_receipts = Decoder(list[tuple[str, Literal["stored", "known", "merged", "replaced", "rejected"]]] | _Full).decode
_claim = Decoder(tuple[list[_Taken], list[_Row], int, float]).decode
_cancelled = Decoder(Literal["cancelled", "running", "ended", "unknown"]).decode
_counts = Decoder(Counts).decode
_rows = Decoder(list[_Row]).decode
_state = Decoder(tuple[bool, bool]).decode
_rejoined = Decoder(tuple[bool, bool, list[int]]).decode
_news = Decoder(_News).decode
_error = Decoder(tuple[str | None, str | None]).decode


def _text(data: bytes) -> Raw:
    """Bytes as a string of MessagePack: the script has no other, and does not mind what is in it."""
    return Raw(b"\xdb" + len(data).to_bytes(4, "big") + data)


def _told(error: str | None, traceback: str | None) -> Raw:
    """What is kept of a failure, and given out, as one; text that is no Unicode is made so."""
    texts = [each and each.encode(errors="backslashreplace").decode() for each in (error, traceback)]
    return _text(msgspec.msgpack.encode(texts))


class RedisQueue:
    """The engine: see the module and the protocol."""

    durable = True
    shared = True

    def __init__(self, name: str, settings: Settings, address: Address, place: Place) -> None:
        self.name = name
        self._place = place
        self._client = new_id()
        """What the items are marked with that this process has claimed."""
        self._held: dict[str, int] = {}
        """Their tokens, by id."""
        self._claiming = 0
        self._early = set[str]()
        """Ids of which there was news before the claim had brought them."""
        self._doubtful: dict[str, None] = {}
        """Ids of drafts that were put without an answer, the latest last."""
        self._work = Lookout[Operation](Operation.abandon)
        self._room = trio.Event()
        self._no_room = self._room
        self._room_by_itself = math.inf
        """When something expires that takes up room, on Trio's clock."""
        self._paused = False
        self._looked_at_durability = False
        self._declared: Raw | None = None
        self._serving = trio.CancelScope(shield=True)  # it is needed until the end
        self._link = Link(address, f"{{supervisor:{name}}}", self._join, _news, self._hear)
        self.use(settings)

    @property
    def settings(self) -> Settings:
        """What is true of the queue."""
        return self._settings

    def use(self, settings: Settings) -> None:
        self._settings = settings
        spec, unique = settings.spec, settings.spec.unique
        limits = _Limits(
            size=spec.size,
            lease=spec.lease,
            keep=spec.keep_results,
            per_key=spec.per_key,
            on_conflict=unique.on_conflict if unique else None,
            unique_queued=unique is not None and unique.lifetime == "queued",
            unique_for=unique.lifetime if unique and not isinstance(unique.lifetime, str) else None,
            concurrency=spec.concurrency,
            rate=spec.rate,
            burst=max(1, int(spec.rate)) if spec.rate else 0,
            worker_lost=_told(WORKER_LOST, None),
            no_attempt=_told(NO_ATTEMPT_LEFT, None),
        )
        self._link.limits = msgspec.msgpack.encode(limits, enc_hook=float)

    async def declare(self, settings: Settings) -> None:
        self.use(settings)
        self._declared = _text(packed(settings).encode())
        await self._link.ask(_flag, "declare", self._declared)

    async def declared(self) -> Settings | None:
        _, (stored,) = await self._link.ask(_flag, "declared")
        try:
            return unpacked(stored, self._settings.spec.backend) if stored else None
        except (ValueError, LookupError, TypeError) as error:
            raise QueueError(f"queue {self.name}: the settings that are stored with it make no sense: {error}") from None

    # ---- producers ----

    async def put(self, drafts: Sequence[Draft]) -> list[Receipt]:
        room = self._room
        rows = [
            _Draft(
                id=draft.id,
                payload=_text(draft.payload),
                priority=draft.priority,
                delay=draft.delay,
                at=draft.at,
                expire=draft.expire,
                key=draft.key,
                group=draft.group,
                keep=draft.keep,
                again=draft.id in self._doubtful,
            )
            for draft in drafts
        ]
        await trio.lowlevel.checkpoint_if_cancelled()
        operation, along = Operation(_receipts, ("put", rows)), self._work.claim_along(self._operation)
        self._link.queue(operation, *([along] if along else ()))
        try:
            receipts, _ = await self._link.answer(operation)
        except (QueueUnavailable, trio.Cancelled):
            self._doubt(drafts)
            raise
        for draft in drafts:
            self._doubtful.pop(draft.id, None)
        if isinstance(receipts, _Full):
            self._no_room = room
            self._room_by_itself = trio.current_time() + (receipts.full if receipts.full >= 0 else math.inf)
            raise QueueFull(f"queue {self.name} is full: {self._settings.spec.size} items may wait")
        return [Receipt(id=id, what=what) for id, what in receipts]

    def _doubt(self, drafts: Sequence[Draft]) -> None:
        """These may be stored: whoever puts them again must not have them done twice."""
        self._doubtful.update(dict.fromkeys(draft.id for draft in drafts))
        for id in list(self._doubtful)[: max(len(self._doubtful) - DOUBTFUL, 0)]:
            del self._doubtful[id]

    async def wait_for_room(self) -> None:
        self._link.wake()
        with trio.move_on_at(self._room_by_itself):
            await self._no_room.wait()

    # ---- workers ----

    async def claim(self, limit: int, *, owner: str, attempts: int, order: Sequence[int] = ()) -> Claimed:
        self._work.clear()
        operation = self._operation(Demand(limit=limit, owner=owner, attempts=attempts, order=order))
        await trio.lowlevel.checkpoint_if_cancelled()
        self._link.queue(operation)
        return await self._brought_by(operation)

    def _operation(self, demand: Demand) -> Operation:
        """A claim that is still to be made."""
        asked = ("claim", demand.limit, demand.owner, demand.attempts, list(demand.order), self._client)
        return Operation(_claim, asked, found=self._give_back)

    async def _brought_by(self, operation: Operation) -> Claimed:
        """What a claim brings."""
        self._claiming += 1
        try:
            reply = await self._link.answer(operation)
        except (trio.Cancelled, QueueUnavailable):
            self._work.set()
            raise
        finally:
            self._claiming -= 1
        return self._claimed(reply)

    def _claimed(self, reply: Reply) -> Claimed:
        (taken, dead, expired, due), blobs = reply
        if due >= 0:
            self._work.set(due)
        items = [_item(each, payload) for each, payload in zip(taken, blobs, strict=False)]
        for item in items:
            if item.id in self._held:
                self._place.listen(Notice(what="lost", id=item.id))
            self._held[item.id] = item.token
        if early := [(item.id, item.token) for item in items if item.id in self._early]:
            self._look_at(early)
        if not self._claiming:
            self._early.clear()
        return Claimed(items=items, dead=[*self._records(dead, blobs[len(taken) :])], expired=expired)

    def _give_back(self, reply: Reply) -> None:
        """Whoever claimed these was cancelled."""
        if taken := reply[0][0]:
            self._link.post(_any, "finish", [_Ending(id=each.id, token=each.token, how="back", delay=0.0) for each in taken])

    async def wait_for_work(self, demand: Callable[[], Demand | None] | None = None) -> Claimed | None:
        self._link.wake()
        claim = await self._work.wait(demand)
        return None if claim is None else await self._brought_by(claim)

    async def renew(self, items: Sequence[Item]) -> list[bool]:
        claims = [(item.id, item.token) for item in items]
        found, _ = await self._link.ask(_numbers, "renew", claims)
        self._check(claims, found, lost=False)
        return [each > 0 for each in found]

    def _look_at(self, claims: Sequence[tuple[str, int]]) -> None:
        """Ask what became of these claims, and tell."""
        self._link.post(_numbers, "renew", claims, found=lambda reply: self._check(claims, reply[0]))

    def _check(self, claims: Iterable[tuple[str, int]], found: Iterable[int], lost: bool = True) -> None:
        """Tell what became of claims: 0: it is lost, 2: it is to be cancelled."""
        for (id, token), what in zip(claims, found, strict=True):
            if self._held.get(id) == token and what != 1:
                self._tell_of(id, "cancel" if what else "lost", told=lost or bool(what))

    def _tell_of(self, id: str, what: Literal["cancel", "lost"], told: bool = True) -> None:
        if what == "lost":
            del self._held[id]
        if told:
            self._place.listen(Notice(what=what, id=id))

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        rows = [
            _Ending(
                id=ending.id,
                token=ending.token,
                how=ending.how,
                delay=ending.delay,
                result=None if ending.result is None else _text(ending.result),
                error=None if ending.error is None and ending.traceback is None else _told(ending.error, ending.traceback),
            )
            for ending in endings
        ]
        stored, _ = await self._link.ask(_flags, "finish", rows)
        for ending in endings:
            if self._held.get(ending.id) == ending.token:
                del self._held[ending.id]
        return list(stored)

    async def progress(self, item: Item, done: float, total: float | None) -> None:
        await self._link.ask(_flag, "progress", item.id, item.token, done, total)

    # ---- people ----

    async def cancel(self, id: str) -> Literal["cancelled", "running", "ended", "unknown"]:
        what: Literal["cancelled", "running", "ended", "unknown"]
        what, _ = await self._link.ask(_cancelled, "cancel", id)
        return what

    async def requeue(self, ids: Sequence[str] | None = None) -> int:
        if ids is None:
            return await self._all("requeue", False)
        return sum([await self._number("requeue", ids[at : at + BULK]) for at in range(0, len(ids), BULK)])

    async def purge(self, state: State) -> int:
        return await self._all("purge", state.value)

    async def _all(self, *asked: object) -> int:
        """Do it until it finds little left."""
        total = number = await self._number(*asked)
        while number >= BULK:
            number = await self._number(*asked)
            total += number
        return total

    async def _number(self, *asked: object) -> int:
        number: int
        number, _ = await self._link.ask(_number, *asked)
        return number

    async def pause(self, paused: bool) -> None:
        await self._link.ask(_flag, "pause", paused)

    async def counts(self) -> Counts:
        counts: Counts
        counts, _ = await self._link.ask(_counts, "counts")
        return counts

    async def peek(self, state: State, limit: int) -> list[Record]:
        rows, blobs = await self._link.ask(_rows, "peek", state.value, limit)
        found = list(zip(rows, self._records(rows, blobs), strict=True))
        if state is State.WAITING:
            found.sort(key=lambda each: (each[0].late, each[0].prio, each[0].ready, each[0].seq))
        elif state is State.RUNNING:
            found.sort(key=lambda each: (each[0].began, each[0].seq), reverse=True)
        return [record for _, record in found][:limit]

    async def show(self, id: str, *, keep: bool = False) -> Record | None:
        return next(self._records(*await self._link.ask(_rows, "show", id, keep)), None)

    def _records(self, rows: Sequence[_Row], blobs: Sequence[bytes]) -> Iterator[Record]:
        """Each with its three blobs: payload, result, error."""
        for at, row in enumerate(rows):
            payload, result, failure = blobs[3 * at : 3 * at + 3]
            error, traceback = _failure(failure)
            yield Record(
                id=row.id,
                queue=self.name,
                state=row.state,
                payload=payload,
                priority=row.prio,
                attempts=row.tries,
                put_at=row.put,
                ready_at=row.ready,
                expires_at=row.expires,
                started_at=row.began,
                ended_at=row.ended,
                lease_until=row.lease,
                owner=row.owner,
                key=row.key,
                group=row.group,
                result=result or None,
                error=error,
                traceback=traceback,
                progress=None if row.done is None else (row.done, row.total),
                cancelling=row.cancelling,
            )

    # ---- the link ----

    async def _serve(self) -> None:
        with self._serving:
            await self._link.run()

    async def _close(self) -> None:
        with trio.move_on_after(FAREWELL, shield=True):
            await self._link.settle()
        self._serving.cancel(reason="the queue is closed")

    async def _join(self, mouth: BaseConnection) -> None:
        """A new connection: look what was missed, and have everybody look for work and room."""
        await self._look_at_rights(mouth)
        if not self._looked_at_durability:
            self._looked_at_durability = True
            await self._look_at_durability(mouth)
        claims = [*self._held.items()]
        (((*state, found), _),) = await self._link.call(mouth, [(_rejoined, "rejoin", self._client, claims)])
        self._check(claims, found)
        self._adopt(*state)

    def _adopt(self, paused: bool, declared: bool) -> None:
        """The queue is there, again or anew: it may be paused, and have nothing that we brought."""
        self._tell_paused(paused)
        if not declared and self._declared is not None:
            self._link.post(_flag, "declare", self._declared)
        self._work.set()
        self._make_room()

    def _hear(self, news: _News) -> None:
        match news:
            case _News(what="work", about=float(seconds)):
                self._work.set(seconds)
            case _News(what="room"):
                self._make_room()
            case _News(what="paused" | "resumed" as what):
                self._tell_paused(what == "paused")
                self._work.set()
            case _News(what="ended", about=list(ids)):
                for id in ids:
                    self._place.listen(Notice(what="ended", id=id))
            case _News(what="new"):
                self._look_at([*self._held.items()])
                self._link.post(_state, "look", found=lambda reply: self._adopt(*reply[0]))
            case _News(what="cancel" | "lost" as what, about=str(id), token=token):
                if self._held.get(id) == token:
                    self._tell_of(id, what)
                elif self._claiming:
                    self._early.add(id)

    def _make_room(self) -> None:
        self._room.set()
        self._room = trio.Event()

    def _tell_paused(self, paused: bool) -> None:
        if paused is not self._paused:
            self._paused = paused
            self._place.listen(Notice(what="paused" if paused else "resumed"))

    async def _look_at_rights(self, mouth: BaseConnection) -> None:
        """Raises ResponseError where the user may not do all that the script does: it would do some of it, and stop."""
        ((refused, _),) = await self._link.call(mouth, [(_names, "refused", COMMANDS)])
        if refused:
            words = " ".join(f"+{each.lower()}" for each in refused)
            raise ResponseError(f"this user may not run {', '.join(refused)}, which queues need: ACL SETUSER ... {words}")

    async def _look_at_durability(self, mouth: BaseConnection) -> None:
        """Say what of the server's settings loses items."""
        asked = ("appendonly", "save", "maxmemory", "maxmemory-policy")
        found: dict[str, Any] = {name: await self._link.setting(mouth, name) for name in asked}
        where = f"queue {self.name} in {self._link.address}"
        if (found["appendonly"], found["save"]) == ("no", ""):
            self._place.warn(f"{where}: what waits there is lost when the server ends: set `appendonly yes` in redis.conf")
        if found["maxmemory"] not in (None, "0") and (found["maxmemory-policy"] or "").startswith("allkeys"):
            told = "the server may throw items away when its memory is full: set `maxmemory-policy noeviction` in redis.conf"
            self._place.warn(f"{where}: {told}")


def _failure(blob: bytes) -> tuple[str | None, str | None]:
    """What `_told` made: error and traceback."""
    try:
        error, traceback = _error(blob) if blob else (None, None)
    except ValueError as error:
        return f"what is stored of it makes no sense: {error}", None
    return error, traceback


def _item(taken: _Taken, payload: bytes) -> Item:
    return Item(
        id=taken.id,
        token=taken.token,
        payload=payload,
        attempt=taken.attempt,
        priority=taken.priority,
        group=taken.group,
        put_at=taken.put_at,
        ready_at=taken.ready_at,
    )
