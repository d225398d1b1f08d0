"""Streams: ours beside the plain loops that do the same, and beside two libraries.

    python -m benchmarks.streaming                  a table of ratios, and JSON in benchmarks/results/

Each measurement is a process of its own, so that none inherits another's heap; the sweeps are interleaved, and a ratio is the
median of those within a sweep.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import trio

from benchmarks.children import HERE, Failed
from benchmarks.drivers.driver import clean_environment
from benchmarks.drivers.ours import REPOSITORY
from benchmarks.report import machine, markdown_table, shown, table

LONG = 300.0
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


async def asyncstdlib_steps(count: int) -> int:
    import asyncstdlib

    call: Any = double
    doubled: AsyncIterator[int] = asyncstdlib.map(call, numbers(count))
    return await asyncstdlib.reduce(add, asyncstdlib.filter(odd_third, doubled), initial=0)


async def aiostream_steps(count: int) -> int:
    from aiostream import pipe, stream

    call: Any = double
    return await (stream.iterate(numbers(count)) | pipe.map(call) | pipe.filter(odd_third) | pipe.reduce(add, 0))


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
    from aiostream import pipe, stream

    call: Any = step_aside_in_asyncio
    return await (stream.iterate(numbers(count)) | pipe.map(call, ordered=True, task_limit=LIMIT) | pipe.reduce(add, 0))


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
    from aiostream import pipe, stream

    return await (stream.merge(*(numbers(count // SOURCES) for _ in range(SOURCES))) | pipe.reduce(add, 0))


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


@dataclass
class Result:
    """Seconds an item, one for each sweep; or why there are none."""

    scene: str
    way: str
    items: int
    seconds: list[float] = field(default_factory=list)
    error: str = ""


def measure(scene: str, way: str, items: int) -> float:
    """Seconds an item, of a fresh process."""
    environment = clean_environment() | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "benchmarks.streaming", "--one", scene, way, "--items", str(items)]
    try:
        with tempfile.TemporaryDirectory(prefix="bench-streaming-") as folder:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=LONG, text=True)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{items} items were not through after {LONG:g} s") from error
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])
    return float(json.loads(done.stdout)) / items


def run_one(scene: str, way: str, items: int) -> float:
    """Seconds for all, in this process."""

    async def main() -> float:
        began = time.perf_counter()
        await SCENES[scene].ways[way](items)
        return time.perf_counter() - began

    return asyncio.run(main()) if way == "aiostream" else trio.run(main)


def sweep(items: int, runs: int) -> list[Result]:
    """All ways of all scenes, one after another, `runs` times."""
    results = []
    for scene, each in SCENES.items():
        for way in each.ways:
            if way in ("aiostream", "asyncstdlib") and importlib.util.find_spec(way) is None:
                click.echo(f"{way} is left out: it is not installed", err=True)
            else:
                results.append(Result(scene, way, max(items // each.share, SOURCES)))
    for run in range(runs):
        for result in results:
            click.echo(f"sweep {run + 1}: {result.scene}, {result.way}", err=True)
            try:
                result.seconds.append(measure(result.scene, result.way, result.items))
            except Failed as error:
                result.error = str(error)
    return results


def report(results: list[Result], layout: Callable[[list[str], list[list[str]]], str]) -> str:
    """For people: a table a scene, and whether the target was reached."""
    parts = [machine()]
    for scene, each in SCENES.items():
        found = [result for result in results if result.scene == scene and result.seconds]
        rows = [[result.way, shown(median(result.seconds), 1e6), figure(result, results)] for result in found]
        parts.append(layout([f"{each.title}, {found[0].items} items" if found else each.title, "us an item", "/ plain"], rows))
        for result in found:
            if each.limit and result.way.startswith("ours"):
                reached = "reached" if (ratio_of(result, results) or 0) <= each.limit else "MISSED"
                parts.append(f"{reached}: {result.way} {figure(result, results)} x plain (at most {each.limit:g})")
    parts += [f"FAILED: {result.scene}, {result.way}: {result.error}" for result in results if result.error]
    return "\n\n".join(parts)


def ratio_of(result: Result, results: list[Result]) -> float | None:
    """To the plain loop: the median of the ratios within a sweep."""
    (unit,) = (each for each in results if each.scene == result.scene and each.way == "plain")
    pairs = list(zip(result.seconds, unit.seconds, strict=False))
    return median(ours / plain for ours, plain in pairs) if pairs else None


def figure(result: Result, results: list[Result]) -> str:
    """The ratio, for people."""
    found = ratio_of(result, results)
    return "-" if found is None else f"{found:.2f}"


def data(results: list[Result]) -> dict[str, Any]:
    """For machines."""
    return {
        "machine": machine(),
        "results": [{**asdict(result), "ratio": ratio_of(result, results)} for result in results],
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "-n", "--items", type=click.IntRange(1), default=1_000_000, help="How many items; slow scenes get a part of them."
)
@click.option("-r", "--runs", type=click.IntRange(1), default=5, help="How many interleaved sweeps.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the JSON.")
@click.option("--one", nargs=2, metavar="SCENE WAY", hidden=True)
def main(items: int, runs: int, markdown: bool, file: Path | None, one: tuple[str, str] | None) -> None:
    """Measure streams beside plain loops and two libraries."""
    if one:
        click.echo(json.dumps(run_one(*one, items)))
        return
    results = sweep(items, runs)
    click.echo(report(results, markdown_table if markdown else table))
    file = file or HERE / "results" / time.strftime("streaming-%Y%m%dT%H%M%S.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data(results), indent=1) + "\n")
    click.echo(f"\nall samples: {file}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.streaming")
