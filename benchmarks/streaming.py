"""Streams: ours beside the plain loops that do the same, and beside two libraries.

    python -m benchmarks.streaming                  a table of ratios, and JSON in benchmarks/results/

Each measurement is a process of its own, so that none inherits another's heap; the sweeps are interleaved, and a ratio is the
median of those within a sweep.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import trio

from benchmarks import beside
from benchmarks.beside import Layout, Result
from benchmarks.report import shown

LIBRARIES = ("aiostream", "asyncstdlib")
LIMIT = 10
"""How many calls run at a time in `buffered`."""

SOURCES = 4
"""How many streams are merged."""


# -- what is done ---------------------------------------------------------------------------------------------------------


def double(number: int) -> int:
    return number * 2


def odd_third(number: int) -> bool:
    return number % 3 != 0


def add(total: int, number: int) -> int:
    return total + number


async def numbers(count: int) -> AsyncIterator[int]:
    """What every way takes its items from, unless it has a source of its own for values."""
    for number in range(count):
        yield number


# -- map and filter -------------------------------------------------------------------------------------------------------


async def plain_steps(count: int) -> int:
    """The loop that somebody would write, with the same functions."""
    total = 0
    async for number in numbers(count):
        number = double(number)
        if odd_third(number):
            total = add(total, number)
    return total


async def our_steps(count: int) -> int:
    from supervisor.streams import Stream

    return await Stream(numbers(count)).map(double).filter(odd_third).fold(0, add)


async def our_values(count: int) -> int:
    """The same from plain values, where ours lets other tasks have their turn."""
    from supervisor.streams import Stream

    return await Stream(range(count)).map(double).filter(odd_third).fold(0, add)


def aiostream() -> tuple[Any, Any]:
    """Its two modules; looked for when it is used, since it need not be there."""
    return import_module("aiostream.stream"), import_module("aiostream.pipe")


async def asyncstdlib_steps(count: int) -> int:
    library = import_module("asyncstdlib")
    doubled = library.map(double, numbers(count))
    total: int = await library.reduce(add, library.filter(odd_third, doubled), initial=0)
    return total


async def aiostream_steps(count: int) -> int:
    stream, pipe = aiostream()
    total: int = await (stream.iterate(numbers(count)) | pipe.map(double) | pipe.filter(odd_third) | pipe.reduce(add, 0))
    return total


# -- several calls at a time ----------------------------------------------------------------------------------------------


async def step_aside(number: int) -> int:
    await trio.lowlevel.checkpoint()
    return number


async def step_aside_in_asyncio(number: int) -> int:
    await asyncio.sleep(0)
    return number


async def plain_calls(count: int) -> int:
    """A nursery and a semaphore; results as they come."""
    total, slots = 0, trio.Semaphore(LIMIT)

    async def call(number: int) -> None:
        nonlocal total
        number = await step_aside(number)
        total = add(total, number)
        slots.release()

    async with trio.open_nursery() as nursery:
        async for number in numbers(count):
            await slots.acquire()
            nursery.start_soon(call, number)
    return total


async def our_calls(count: int) -> int:
    from supervisor.streams import Stream

    return await Stream(numbers(count)).map(step_aside).buffered(LIMIT).fold(0, add)


async def our_unordered_calls(count: int) -> int:
    from supervisor.streams import Stream

    return await Stream(numbers(count)).map(step_aside).buffer_unordered(LIMIT).fold(0, add)


async def aiostream_calls(count: int) -> int:
    stream, pipe = aiostream()
    calls = pipe.map(step_aside_in_asyncio, ordered=True, task_limit=LIMIT)
    total: int = await (stream.iterate(numbers(count)) | calls | pipe.reduce(add, 0))
    return total


# -- several sources ------------------------------------------------------------------------------------------------------


async def plain_merge(count: int) -> int:
    """As many tasks that send into one channel."""
    total = 0
    send, receive = trio.open_memory_channel[int](0)

    async def pour(end: trio.MemorySendChannel[int]) -> None:
        with end:
            async for number in numbers(count // SOURCES):
                await end.send(number)

    async with trio.open_nursery() as nursery:
        with send:
            for _ in range(SOURCES):
                nursery.start_soon(pour, send.clone())
        async for number in receive:
            total = add(total, number)
    return total


async def our_merge(count: int) -> int:
    from supervisor.streams import Stream

    first, *others = (Stream(numbers(count // SOURCES)) for _ in range(SOURCES))
    return await first.merge(*others).fold(0, add)


async def aiostream_merge(count: int) -> int:
    stream, pipe = aiostream()
    total: int = await (stream.merge(*(numbers(count // SOURCES) for _ in range(SOURCES))) | pipe.reduce(add, 0))
    return total


Way = Callable[[int], Awaitable[int]]


@dataclass(frozen=True)
class Scene:
    """One thing that is done, by several ways; the first is the unit."""

    title: str
    share: int
    """It gets one in so many items."""
    ways: dict[str, Way]
    limit: float | None = None
    """What `ours` may cost, in units."""


SCENES = {
    "steps": Scene(
        "map, filter, fold",
        1,
        {
            "plain": plain_steps,
            "ours": our_steps,
            "ours, values": our_values,
            "asyncstdlib": asyncstdlib_steps,
            "aiostream": aiostream_steps,
        },
        2.0,
    ),
    "calls": Scene(
        f"calls with a checkpoint, {LIMIT} at a time",
        20,
        {"plain": plain_calls, "ours": our_calls, "ours, unordered": our_unordered_calls, "aiostream": aiostream_calls},
    ),
    "merge": Scene(f"merge of {SOURCES}", 10, {"plain": plain_merge, "ours": our_merge, "aiostream": aiostream_merge}),
}


def run_one(scene: str, way: str, items: int) -> float:
    """Seconds an item, in this process."""

    async def main() -> float:
        began = time.perf_counter()
        await SCENES[scene].ways[way](items)
        return (time.perf_counter() - began) / items

    return asyncio.run(main()) if way == "aiostream" else trio.run(main)


def cases(items: int) -> list[Result]:
    """All that can be measured here."""
    return [
        Result(name, way, max(items // scene.share, SOURCES))
        for name, scene in SCENES.items()
        for way in scene.ways
        if beside.is_there(way, way if way in LIBRARIES else "")
    ]


def report(results: list[Result], layout: Layout) -> str:
    """For people: a table a scene, and whether the target was reached."""
    parts = []
    for name, scene in SCENES.items():
        found = [result for result in results if result.what == name and result.seconds]
        rows = [[each.way, shown(each.typical, 1e6), beside.figure(to_plain(each, results))] for each in found]
        title = f"{scene.title}, {found[0].count} items" if found else scene.title
        parts.append(layout([title, "us an item", "/ plain"], rows))
        for each in found:
            if scene.limit and each.way.startswith("ours"):
                cost = to_plain(each, results)
                reached = "reached" if (cost or 0) <= scene.limit else "MISSED"
                parts.append(f"{reached}: {each.way} {beside.figure(cost)} x plain (at most {scene.limit:g})")
    return "\n\n".join(parts)


def to_plain(result: Result, results: list[Result]) -> float | None:
    """It to the plain loop."""
    return beside.ratio(result, "plain", results)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "-n", "--items", type=click.IntRange(1), default=1_000_000, help="How many items; slow scenes get a part of them."
)
@click.option("-r", "--runs", type=click.IntRange(1), default=5, help="How many interleaved sweeps.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the JSON.")
@click.option("--one", nargs=3, type=(str, str, int), metavar="SCENE WAY ITEMS", hidden=True)
def main(items: int, runs: int, markdown: bool, file: Path | None, one: tuple[str, str, int] | None) -> None:
    """Measure streams beside plain loops and two libraries."""
    if one:
        click.echo(json.dumps(run_one(*one)))
        return
    results = beside.sweep("benchmarks.streaming", cases(items), runs)
    beside.tell("streaming", results, report, markdown, file)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.streaming")
