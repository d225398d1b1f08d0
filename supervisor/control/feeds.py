"""Requests that are answered with a stream: events, and what jobs print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from supervisor.control.messages import End, LogLine, Snapshot
from supervisor.events import Added, Lagged, Renamed
from supervisor.output import Lines
from supervisor.state import JobStatus, ancestry

if TYPE_CHECKING:
    from supervisor.control.call import Call

SUPERVISOR = "supervisor"


async def events(call: Call, follow: bool, since: int | None, snapshot: bool) -> End:
    """What has happened, and with `follow` what happens from now on. Nothing falls between the two."""
    journal = call.tree.journal
    with journal.subscribe() as subscription:
        first = [Snapshot(seq=journal.seq, snapshot=tuple(journal.table.values()))] if snapshot else []
        lost, past = journal.past(since or 0) if since is not None or not (follow or snapshot) else (0, [])
        await call.notify([*first, *([Lagged(lost)] if lost and since is not None else []), *past])
        if follow:
            async for event in subscription:
                await call.notify([event])
        return End(seq=journal.seq)


async def logs(call: Call, names: list[str], follow: bool, lines: int) -> End:
    """What jobs have printed, and with `follow` what they print from now on."""
    wanted = call.tree.resolve(names) if names else None
    if not follow:
        for name in _jobs_of(call.tree.journal.table, wanted):
            splitter = Lines()
            tail = list(splitter.feed(await call.tree.outputs.tail(name, lines)))
            await _say(call, name, [*tail, *splitter.flush()])
        return End(seq=call.tree.journal.seq)
    await _follow_all(call, wanted, lines)
    return End(seq=call.tree.journal.seq)


async def _follow_all(call: Call, wanted: Sequence[str] | None, lines: int) -> None:
    """Follow these names, and what is added to them while we do: the next workers of a job, the next jobs of all."""
    journal = call.tree.journal
    with journal.subscribe() as changes:
        async with trio.open_nursery() as nursery:
            followed = _jobs_of(journal.table, wanted)
            for name in followed:
                nursery.start_soon(_follow, call, name, lines)
            async for event in changes:
                if isinstance(event, Renamed):
                    followed.append(event.to)  # the output goes on where it was
                elif isinstance(event, (Added, Lagged)):
                    new = [name for name in _jobs_of(journal.table, wanted) if name not in followed]
                    followed += new
                    for name in new:
                        nursery.start_soon(_follow, call, name, 0)


async def _follow(call: Call, name: str, lines: int) -> None:
    """What a job has printed, and what it prints from now on: the tail is taken before anything can come between."""
    splitter = Lines()
    with call.tree.outputs.follow(name) as follower:
        await _say(call, name, splitter.feed(await call.tree.outputs.tail(name, lines)))
        async for chunk in follower:
            if isinstance(chunk, Lagged):
                await _say(call, name, splitter.flush())
                await call.notify([LogLine(name=name, lagged=chunk.count)])
            else:
                await _say(call, name, splitter.feed(chunk))


async def _say(call: Call, name: str, lines: Iterable[bytes]) -> None:
    await call.notify([LogLine(name=name, line=line.decode("utf-8", "backslashreplace")) for line in lines])


def _jobs_of(table: Mapping[str, JobStatus], names: Sequence[str] | None) -> list[str]:
    """Who has an output among these names and below those of them that are groups; all without names."""
    groups = {row.supervisor for row in table.values()}
    jobs = [row for row in table.values() if row.kind != SUPERVISOR and row.name not in groups]
    if names is None:
        return [row.name for row in jobs]
    wanted = set(names)
    return [row.name for row in jobs if not wanted.isdisjoint(ancestry(table, row))]
