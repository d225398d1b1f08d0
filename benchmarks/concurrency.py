"""Tasks and channels: ours beside a bare nursery and a bare channel, asyncio's TaskGroup, and anyio.

    python -m benchmarks.concurrency                the tables, and JSON in benchmarks/results/

A task is one checkpoint. A channel is read to its end while producers send; a single channel has as many producers as the
select has channels. Each measurement is a process of its own, so that none inherits another's heap; the sweeps are
interleaved, and a ratio is the median of those within a sweep.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

import click
import trio

from benchmarks import beside
from benchmarks.beside import Layout, Result
from benchmarks.report import shown
from supervisor.concurrency import JoinSet, as_completed, map_concurrent, select, try_join

SHORT = 20_000
"""Measurements of fewer tasks than this are repeated until as many have run, and the median counts."""

IN_FLIGHT = 100
BUFFER = 100

checkpoint = trio.lowlevel.checkpoint


# -- tasks ------------------------------------------------------------------------------------------------------------------


async def nursery(count: int) -> None:
    async with trio.open_nursery() as tasks:
        for _ in range(count):
            tasks.start_soon(checkpoint)


async def joinset(count: int) -> None:
    async with JoinSet[None]() as tasks:
        for _ in range(count):
            tasks.spawn(checkpoint)
        async for _ in tasks:
            pass


async def joined_at_once(count: int) -> None:
    async with JoinSet[None]() as tasks:
        for _ in range(count):
            tasks.spawn(checkpoint)
        await tasks.join_all()


async def try_joined(count: int) -> None:
    await try_join(*[checkpoint] * count)


async def completed(count: int) -> None:
    async with as_completed([checkpoint] * count) as outcomes:
        async for _ in outcomes:
            pass


async def one_item(_: int) -> None:
    await checkpoint()


async def mapped(count: int) -> None:
    async with map_concurrent(one_item, range(count), limit=IN_FLIGHT) as results:
        async for _ in results:
            pass


async def asyncio_group(count: int) -> None:
    async def yielding() -> None:
        await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(yielding())


async def anyio_group(count: int) -> None:
    anyio = import_module("anyio")
    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(anyio.lowlevel.checkpoint)


# -- channels ---------------------------------------------------------------------------------------------------------------


async def produce(channel: trio.MemorySendChannel[int], count: int) -> None:
    with channel:
        for number in range(count):
            await channel.send(number)


async def one_channel(count: int, producers: int, buffer: int) -> None:
    send, receive = trio.open_memory_channel[int](buffer)
    async with trio.open_nursery() as tasks:
        with send:
            for _ in range(producers):
                tasks.start_soon(produce, send.clone(), count // producers)
        async for _ in receive:
            pass


async def selected(count: int, channels: int, buffer: int, biased: bool = False) -> None:
    async with trio.open_nursery() as tasks:
        sources = []
        for _ in range(channels):
            send, receive = trio.open_memory_channel[int](buffer)
            tasks.start_soon(produce, send, count // channels)
            sources.append(receive)
        async with select(*sources, biased=biased) as ready:
            async for _ in ready:
                pass


# -- measuring --------------------------------------------------------------------------------------------------------------

Work = Callable[[int], Awaitable[None]]
FLOOR = "the floor"


@dataclass(frozen=True)
class Way:
    """One who does it: how, and what must be installed."""

    work: Work
    asyncio: bool = False
    library: str = ""


SPAWNING = {
    FLOOR: Way(nursery),
    "JoinSet, one by one": Way(joinset),
    "JoinSet.join_all": Way(joined_at_once),
    "try_join": Way(try_joined),
    "as_completed": Way(completed),
    f"map_concurrent, {IN_FLIGHT} at a time": Way(mapped),
    "asyncio.TaskGroup": Way(asyncio_group, asyncio=True),
    "anyio task group on trio": Way(anyio_group, library="anyio"),
}


def _selecting(channels: int, buffer: int) -> dict[str, Way]:
    ways = {FLOOR: partial(one_channel, producers=channels, buffer=buffer)}
    ways["select"] = partial(selected, channels=channels, buffer=buffer)
    ways["select, biased"] = partial(selected, channels=channels, buffer=buffer, biased=True)
    return {name: Way(work) for name, work in ways.items()}


TABLES: dict[str, dict[str, Way]] = {
    "spawn and finish a task": SPAWNING,
    **{
        f"take a message, {channels} channels of {buffer}": _selecting(channels, buffer)
        for channels in (2, 16)
        for buffer in (0, BUFFER)
    },
}
"""By what is done: who does it. The floor is a bare nursery, or a single channel."""


def run_one(what: str, name: str, count: int) -> float:
    """Seconds a task or message, in this process."""
    way = TABLES[what][name]

    async def main() -> float:
        took = []
        for _ in range(max(1, SHORT // count)):
            began = time.perf_counter()
            await way.work(count)
            took.append((time.perf_counter() - began) / count)
        return median(took)

    return asyncio.run(main()) if way.asyncio else trio.run(main)


def cases(tasks: tuple[int, ...], messages: int) -> list[Result]:
    """All that can be measured here."""
    return [
        Result(what, name, count)
        for what, ways in TABLES.items()
        for name, way in ways.items()
        if beside.is_there(name, way.library)
        for count in (tasks if ways is SPAWNING else (messages,))
    ]


def report(results: list[Result], layout: Layout) -> str:
    """For people."""
    rows = [
        [each.what, each.way, f"{each.count}", shown(each.typical, 1e6), shown(1 / each.typical, 1), _to_floor(each, results)]
        for each in results
        if each.seconds
    ]
    return layout(["what", "by", "N", "us each", "1/s", "it / floor"], rows)


def _to_floor(result: Result, results: list[Result]) -> str:
    return beside.figure(beside.ratio(result, FLOOR, results))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("-t", "--tasks", type=click.IntRange(1), multiple=True, default=(1_000, 100_000), help="How many tasks.")
@click.option("-n", "--messages", type=click.IntRange(16), default=100_000, help="How many messages.")
@click.option("-r", "--runs", type=click.IntRange(1), default=5, help="How many interleaved sweeps.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the JSON.")
@click.option("--one", nargs=3, type=(str, str, int), metavar="WHAT WAY COUNT", hidden=True)
def main(
    tasks: tuple[int, ...], messages: int, runs: int, markdown: bool, file: Path | None, one: tuple[str, str, int] | None
) -> None:
    """Measure what the constructs of supervisor.concurrency cost."""
    if one:
        click.echo(json.dumps(run_one(*one)))
        return
    results = beside.sweep("benchmarks.concurrency", cases(tasks, messages), runs)
    beside.tell("concurrency", results, report, markdown, file)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.concurrency")
