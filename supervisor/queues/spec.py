"""What a `[queues.NAME]` table can say, and what a job says of the queue it handles."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from supervisor.spec import Rate, Seconds, Spec


class UniqueSpec(Spec, frozen=True, kw_only=True):
    """Which items are the same, for how long, and what becomes of the second."""

    by: Annotated[
        tuple[str, ...],
        Meta(description="the fields of an item that make its key; all of it unless you say"),
    ] = ()
    lifetime: Annotated[
        Literal["queued", "running"] | Seconds,
        Meta(
            description="how long the key is taken: queued, until a worker has the item; running, until the item has ended; or "
            "a time since it was put"
        ),
    ] = field(name="for", default="running")
    on_conflict: Annotated[
        Literal["reject", "replace", "merge"],
        Meta(
            description="what becomes of an item whose key is taken: reject, the producer is told; replace, it takes the place "
            "of the one that waits (one that runs is not replaced: the producer is told); merge, it is one with the first, and "
            "the producer gets the id of that"
        ),
    ] = "reject"


class QueueSpec(Spec, frozen=True, kw_only=True):
    """A queue: where it is kept, how much it holds, and in what order it gives."""

    backend: Annotated[
        str,
        Meta(
            description='"sqlite": durable, in the state directory; "memory": gone with the daemon; or the URL of an engine '
            "that many hosts share: postgresql://user@host/database, redis://host:port/0",
            extra={"reload": "daemon"},
        ),
    ] = "sqlite"
    size: Annotated[int, Meta(ge=1, description="how many items may wait; when it is full, producers wait, or are told so")] = (
        10_000
    )
    lease: Annotated[
        Seconds,
        Meta(
            ge=1,
            description="on a shared engine: how long a daemon that has died, or cannot be reached, keeps an item; it is "
            "renewed while the handler lives",
        ),
    ] = Seconds(60)
    priorities: Annotated[
        tuple[str, ...],
        Meta(description="the names of its priorities, the most urgent first; an item that says none has the middle one"),
    ] = ("high", "normal", "low")
    fair: Annotated[
        bool,
        Meta(
            description="the less urgent get their share: each priority gets twice as much as the next; without it, "
            "nothing is taken while something more urgent waits"
        ),
    ] = False
    unique: Annotated[UniqueSpec | None, Meta(description="which items are the same, and what becomes of the second")] = None
    expire: Annotated[
        Seconds | None, Meta(gt=0, description="an item that has waited for this long is not worth doing any more")
    ] = None
    keep_results: Annotated[
        Seconds, Meta(description="how long what a handler returned can be asked for; nothing returned is not kept")
    ] = Seconds(3600)
    concurrency: Annotated[
        int | None, Meta(ge=1, description="so many of its items run at once at most, over all daemons that share it")
    ] = None
    per_key: Annotated[
        int, Meta(ge=1, description="so many run at once for each value of the job's `serialize_by`, over all daemons")
    ] = 1
    rate: Annotated[
        Rate | None, Meta(description='so many are begun in a time at most, over all daemons that share it: "100/s"')
    ] = None


class BatchSpec(Spec, frozen=True, kw_only=True):
    """Several items for one call: when there are `size` of them, or the first has waited for `within`."""

    SHORT: ClassVar[str] = "size"
    """What a bare value in place of the table stands for."""

    size: Annotated[int, Meta(ge=1, le=10_000, description="how many items at most")]
    within: Annotated[Seconds, Meta(description="how long the first of them waits for more")] = Seconds(0)


class AutoscaleSpec(Spec, frozen=True, kw_only=True):
    """As many workers as there is work for."""

    min: Annotated[int, Meta(ge=0, description="so many at least")] = 1
    max: Annotated[int, Meta(ge=1, description="so many at most")]
