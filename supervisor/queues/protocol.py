"""What a queue is, whatever keeps it: the words that all engines share, and the one protocol that each fulfils.

    Draft       an item as a producer hands it in          Receipt   what became of it
    Item        an item as a worker has it                 Ending    what became of that
    Record      an item as people see it                   Counts    all of them in numbers
    Notice      what a daemon that has items is told       Engine    the protocol

An item waits, runs and ends: *done*, *dead* (no attempt is left, or none is worth it), *cancelled* or *expired*. Its attempts
are counted when it is claimed and stored before its handler begins, so that an item which kills its worker each time is dead
in the end. A claim has a `token` that no earlier claim of the item had: who comes with an old one has lost the item.

How long an item is known when it has ended: a dead one until somebody requeues or purges it (in memory only the last 10 000
are kept). A cancelled or expired one for `keep_results`, and a done one too if it has a result or was put with `keep`; else it
is gone at once.

Everything is at least once: see `docs/queues.md` for exactly what that means.
"""

from __future__ import annotations

import enum
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol

import msgspec

from supervisor.errors import BadItem as BadItem
from supervisor.errors import QueueError as QueueError
from supervisor.errors import QueueFull as QueueFull
from supervisor.errors import QueueUnavailable as QueueUnavailable
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.spec import Rate, Seconds

# ---- an item, in its life ----


class State(enum.Enum):
    """Where an item is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


def new_id() -> str:
    """An id for an item: 26 letters and digits, later ones sort after earlier ones (to the millisecond), 80 bits of chance."""
    return _moment(time.time_ns() // 1_000_000) + os.urandom(16).translate(_ANY_DIGIT).decode()


def derived_id(parent: str, *parts: str | bytes) -> str:
    """The id of an item that came of another: the same for the same parts, and for no others."""
    digest = hashlib.blake2b(digest_size=26)
    for part in (parent, *parts):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest().translate(_ANY_DIGIT).decode()


_DIGITS = b"0123456789abcdefghjkmnpqrstvwxyz"
_ANY_DIGIT = _DIGITS * 8
"""The digit for each byte."""


@lru_cache(1)
def _moment(milliseconds: int) -> str:
    """Ten digits, the same for all ids of a millisecond."""
    return bytes(_DIGITS[milliseconds >> 5 * place & 31] for place in range(9, -1, -1)).decode()


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """An item as it is put. The id is the producer's: putting it again while it is known stores nothing new."""

    id: str
    payload: bytes
    """JSON."""
    priority: int = 0
    """Its place in the queue's `priorities`."""
    delay: float = 0.0
    """Seconds from when it is stored until it may be claimed, by the engine's clock."""
    at: float | None = None
    """Not before this moment of the wall clock (Unix time); with a `delay`, the later of both."""
    expire: float | None = None
    """Seconds from when it may be claimed after which it is *expired* instead; None: never. A Producer says the queue's own."""
    key: str | None = None
    """What `unique` compares; None: it is like no other."""
    group: str | None = None
    """What `serialize_by` found in it: at most `per_key` of one group run at once, in the order they were put."""
    keep: bool = False
    """Whether its end is kept for `keep_results` even if there is no result: somebody will ask. Of an item that is known, or
    merged with this one, so is the end."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a draft.

    stored: as its id says. known: an item of this id was there already. merged, rejected: `id` is the item whose key it has.
    replaced: it is stored in the place of an item that waited, which is gone. It stands in line where that stood, unless it
    is of another priority or for a later time: so what is replaced again and again comes to its turn all the same. Drafts of
    one call come one after another: the second of a key meets the first.
    """

    id: str
    what: Literal["stored", "known", "merged", "replaced", "rejected"]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """An item that is claimed: whoever has it runs it."""

    id: str
    token: int
    """Raised by each claim of the item: the fencing token."""
    payload: bytes
    attempt: int
    """Counted from 1; what was given back (`back`) does not count."""
    priority: int
    group: str | None
    put_at: float
    """When it was stored, and since when it could be claimed: Unix time, by the engine's clock."""
    ready_at: float


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody would claim: see `Engine.claim`."""

    limit: int
    owner: str
    attempts: int
    order: Sequence[int] = ()


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """What a claim brought: items to run, and those that turned out to be `dead` (their attempts are used up) or `expired`."""

    items: Sequence[Item] = ()
    dead: Sequence[Record] = ()
    expired: int = 0


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a claimed item.

    done: with its `result`. retry: it failed, and may be claimed again after `delay` seconds. dead: it failed for good.
    cancelled: somebody wanted that. back: it was not begun, or was cut short by us: claimable at once, as if never claimed.
    An item that somebody has cancelled while it ran is cancelled instead of claimable: by retry, by back, by a lost lease.
    """

    id: str
    token: int
    how: Literal["done", "retry", "dead", "cancelled", "back"]
    result: bytes | None = None
    """JSON; None: nothing was returned."""
    error: str | None = None
    """Why it failed, in one line; kept with the item also when it is tried again."""
    traceback: str | None = None
    delay: float = 0.0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An item as people see it. Moments are Unix time by the engine's clock."""

    id: str
    queue: str
    state: State
    payload: bytes
    priority: int
    attempts: int
    put_at: float
    ready_at: float
    """Since when, or from when on, it may be claimed."""
    expires_at: float | None = None
    started_at: float | None = None
    """The last claim."""
    ended_at: float | None = None
    lease_until: float | None = None
    owner: str | None = None
    """The daemon, and the worker where that is known, that has it, or had it last."""
    key: str | None = None
    group: str | None = None
    result: bytes | None = None
    error: str | None = None
    traceback: str | None = None
    progress: tuple[float, float | None] | None = None
    cancelling: bool = False
    """It runs, and somebody has asked to cancel it."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """A queue in numbers. `waiting` may be claimed now, `delayed` later; `oldest`: seconds that the first has waited."""

    waiting: int = 0
    delayed: int = 0
    running: int = 0
    done: int = 0
    dead: int = 0
    cancelled: int = 0
    expired: int = 0
    oldest: float | None = None
    paused: bool = False


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon is told without asking: that an item it has is to be cancelled, or that it has lost it; that an item has
    ended, or was replaced (one with `keep`, told to all who have the queue: somebody waits for it); that the queue was paused
    or resumed (told to all). Told once the engine has stored it. What happens while the engine is away may go untold: look,
    when it is back."""

    what: Literal["cancel", "lost", "ended", "paused", "resumed"]
    id: str = ""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of a queue for all who use it. The daemons that handle it store it beside the items (`declare`), so that
    a producer that has read no file puts items as they want them."""

    spec: QueueSpec
    group_by: str | None = None
    """The field of an item that is its group: the `serialize_by` of the jobs that handle it."""


def packed(settings: Settings) -> str:
    """Settings as JSON, to be stored for others; without the `backend`, which each knows by a way of its own: it may have a
    password."""
    spec = msgspec.structs.replace(settings.spec, backend="")
    return msgspec.json.encode(msgspec.structs.replace(settings, spec=spec), enc_hook=float).decode()


def unpacked(text: str | bytes, backend: str) -> Settings:
    """What `packed` made, in this version or another; `backend`: ours."""
    said = msgspec.json.decode(text)
    spec = _known(QueueSpec, said["spec"])
    if (unique := _known(UniqueSpec, spec.pop("unique", None) or {})) and (lifetime := unique.get("lifetime")) is not None:
        unique["lifetime"] = lifetime if isinstance(lifetime, str) else Seconds(lifetime)
    spec |= {name: Seconds(spec[name]) for name in ("lease", "expire", "keep_results") if spec.get(name) is not None}
    spec |= {"rate": Rate(spec["rate"])} if spec.get("rate") is not None else {}
    spec |= {"backend": backend, "unique": UniqueSpec(**unique) if unique else None}
    return Settings(spec=QueueSpec(**spec), group_by=said.get("group_by"))


def _known(struct: type[msgspec.Struct], said: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, by the names of the fields that there are."""
    fields = msgspec.structs.fields(struct)
    found = {each.name: said[each.encode_name] for each in fields if each.encode_name in said}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


Listener = Callable[[Notice], None]
"""Called in the Trio thread; must not block or raise."""


class Engine(Protocol):
    """One queue in one engine, for one process. All methods belong to the Trio thread, and may be called at the same time.

    Raises QueueUnavailable where the engine does not answer, within a few seconds. It connects when it is first used, and by
    itself again: a server that is away at the start is no error. Cancelling a call leaves everything usable; whether what it
    asked for has happened is open.
    """

    name: str
    durable: bool
    """Whether what was put outlives this process."""
    shared: bool
    """Whether other processes may have the same queue: then claims are leases."""

    @property
    def settings(self) -> Settings:
        """What is true of the queue."""

    def use(self, settings: Settings) -> None:
        """Have these settings from now on. A server may go by what was declared all the same: that is true for all."""

    async def declare(self, settings: Settings) -> None:
        """`use` these settings, and store them for others (where it is shared)."""

    async def declared(self) -> Settings | None:
        """The settings that were stored last; None where nobody has."""

    # producers

    async def put(self, drafts: Sequence[Draft]) -> list[Receipt]:
        """Store all of them, or none; returns when they are as safe as the engine keeps things, in the order of `drafts`.

        `size` items may wait, the delayed ones among them, but not those that have waited for too long. Raises QueueFull where
        they do not all fit, not counting those that are not stored or replace another: `wait_for_room`, then try again. More
        than `size` at once never fit. What comes back (retry, back, requeue) always fits.
        """

    async def wait_for_room(self) -> None:
        """Wait until there may be room (also: until the engine is there again)."""

    # workers

    async def claim(self, limit: int, *, owner: str, attempts: int, order: Sequence[int] = ()) -> Claimed:
        """Take up to `limit` items that may run now: from the priorities in `order` (all others after them, most urgent
        first), in each those first that could be claimed first; of the same moment, those put first. Items with `attempts`
        claims behind them are dead instead.

        Respects pauses, `concurrency`, `per_key` and `rate`, over all who share the queue. A rate lets through at once what
        comes in a second, or one, where that is less; more than that does not gather. Each item's attempt is stored when this
        returns. Items whose lease has run out are among those that may run. Less than `limit`, or nothing: `wait_for_work`.
        """

    async def wait_for_work(self, demand: Callable[[], Demand | None] | None = None) -> Claimed | None:
        """Wait until a claim may bring something, or more than the last one: one was put, given back or resumed, its time
        has come, a lease ran out, a limit lets more through, the engine is there again. May return for nothing, but not
        again and again.

        `demand` says what the caller would claim at this moment; None: nothing. An engine that can claim together with the
        very put that brings the work, sooner than a claim after it, asks for that, and gives what it has claimed, be it
        nothing; else None.
        """

    async def renew(self, items: Sequence[Item]) -> list[bool]:
        """Prolong the leases of these by `lease` from now; False: it was lost."""

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        """Store what became of these, each by itself; False: it was lost, or has ended already, and nothing is stored."""

    async def progress(self, item: Item, done: float, total: float | None) -> None:
        """Note how far it is."""

    # people

    async def cancel(self, id: str) -> Literal["cancelled", "running", "ended", "unknown"]:
        """Cancel an item. One that waits is cancelled at once; whoever has it running is told by a Notice."""

    async def requeue(self, ids: Sequence[str] | None = None) -> int:
        """Give dead items (None: all) their attempts anew; gives how many. They keep their ids."""

    async def purge(self, state: State) -> int:
        """Remove all items of a state (not RUNNING); gives how many."""

    async def pause(self, paused: bool) -> None:
        """Have nobody claim anything, or go on; stays so over restarts where the queue is durable."""

    async def counts(self) -> Counts:
        """The queue in numbers, as it is at this moment: what has waited for too long is expired, whoever claims or not."""

    async def peek(self, state: State, limit: int) -> list[Record]:
        """The next items of a state: of those that wait, in the order of claims; of others, the latest first."""

    async def show(self, id: str, *, keep: bool = False) -> Record | None:
        """An item, whatever its state; None where it is not known (any more). With `keep`, somebody waits for its end, as if
        it had been put with that: in the same step, so that none is told of its end before and forgotten."""
