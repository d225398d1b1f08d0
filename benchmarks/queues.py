"""What an item of a queue costs: ours on each of its engines, beside other task queues on the same server.

    python -m benchmarks.queues                     thousand items a second, ratios, and JSON in benchmarks/results/
    python -m benchmarks.queues --quick             fewer items, one sweep

The function does nothing. *put*: items are put in the best way in which each puts many. *handle*: one process with 32 workers
has handled all that is in the queue, its start included. *start*: from a put into an idle queue until the function begins, the
median of some hundred. *small*, *50 ms*: two worker processes, kept for all their calls, make calls that do nothing, and calls
that take a processor for 50 ms, beside two processes that do that alone.

Each measurement is a process of its own, and has a server of its own, or a file, in a private directory; the sweeps are
interleaved. Peers are in a virtual environment of their own: `python -m venv benchmarks/.queue-peers`, and there `pip install
arq dramatiq[redis] huey procrastinate saq[redis] streaq taskiq-redis`. What is not installed is left out, with a word.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NoReturn

import click
import trio

from benchmarks import beside
from benchmarks.beside import Layout, Result
from benchmarks.children import HERE, Failed
from benchmarks.queue_calls import ARRIVALS, burn_often
from benchmarks.queue_peers import PEERS, Peer
from benchmarks.queue_servers import missing, serving
from supervisor import open_supervisor
from supervisor.daemon.service import TURN
from supervisor.tree import Supervisor

WORKERS = 32
PEERS_AT = HERE / ".queue-peers" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

if PEERS_AT.is_dir() and str(PEERS_AT) not in sys.path:
    sys.path.append(str(PEERS_AT))  # after what is ours: both have trio


# -- ours -------------------------------------------------------------------------------------------------------------------


async def _ours(what: str, count: int, url: str) -> float:
    sys.setswitchinterval(TURN)  # as a daemon has it
    job = {"call": "benchmarks.queue_calls:nothing", "queue": "q", "workers": WORKERS, "start": "manual"}
    config = {"daemon": {"state_dir": str(Path.cwd())}, "queues": {"q": {"backend": url, "size": count + 1000}}}
    async with open_supervisor({**config, "jobs": {"work": job}}) as tree:
        if what == "start":
            tree.order("start", ["work"])
            return await _our_starts(tree, count)
        began = time.perf_counter()
        await tree.queues.producer("q").put_many(range(count))
        if what == "handle":
            began, done = time.perf_counter(), trio.Event()
            ARRIVALS.expect(count, done.set)
            tree.order("start", ["work"])
            await done.wait()
        return (time.perf_counter() - began) / count


async def _our_starts(tree: Supervisor, count: int) -> float:
    took = []
    for number in range(count):
        await trio.sleep(0.005)
        arrived = trio.Event()
        ARRIVALS.expect(1, arrived.set)
        began = time.perf_counter()
        await tree.queues.producer("q").put(number)
        await arrived.wait()
        took.append(time.perf_counter() - began)
    return median(took)


async def _our_processes(function: str, count: int) -> float:
    job = {"call": f"benchmarks.queue_calls:{function}", "kind": "process", "queue": "q", "workers": 2}
    config = {"queues": {"q": {"backend": "memory", "size": count + 100}}, "jobs": {"work": job}}
    async with open_supervisor(config) as tree:
        await _all_done(tree, 100 if function == "small" else 4)  # until then they start
        began = time.perf_counter()
        await _all_done(tree, count)
        return (time.perf_counter() - began) / count


async def _all_done(tree: Supervisor, count: int) -> None:
    tally = tree.queues.desk("q").tally("work")
    target = tally.done + count
    await tree.queues.producer("q").put_many(range(count))
    while tally.done < target:  # noqa: ASYNC110 (a counter tells nobody)
        await trio.sleep(0.001)


# -- measuring --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One who does it, with what behind it."""

    server: str
    library: str = ""
    share: float = 1.0
    """Of the items: those that are slow have fewer."""


WAYS = {
    "ours, memory": Way("memory"),
    "ours, sqlite": Way("sqlite"),
    "ours, redis": Way("redis", "coredis"),
    "ours, postgresql": Way("postgresql", "psycopg"),
    "huey, sqlite": Way("sqlite", "huey", 0.1),
    "huey, redis": Way("redis", "huey", 0.25),
    "taskiq, redis": Way("redis", "taskiq_redis", 0.25),
    "saq, redis": Way("redis", "saq", 0.25),
    "arq, redis": Way("redis", "arq", 0.25),
    "streaq, redis": Way("redis", "streaq", 0.25),
    "dramatiq, redis": Way("redis", "dramatiq", 0.25),
    "procrastinate, postgresql": Way("postgresql", "procrastinate", 0.1),
}


def run_one(what: str, way: str, count: int) -> float:
    """Seconds an item, in this process."""
    if what in ("small", "50 ms"):
        return _processes(what, way, count)
    with serving(WAYS[way].server, Path.cwd()) as url:
        if way.startswith("ours"):
            return trio.run(_ours, what, count, url)
        asyncio.run(_peer(PEERS[way](url, ARRIVALS.note, WORKERS), what, count))
        raise Failed(f"{way} has ended")


def _processes(what: str, way: str, count: int) -> float:
    if way == "ours":
        return trio.run(_our_processes, "small" if what == "small" else "burn", count)
    began = time.perf_counter()
    processes = [multiprocessing.Process(target=burn_often, args=(count // 2,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return (time.perf_counter() - began) / count


async def _peer(peer: Peer, what: str, count: int) -> None:
    """Tell what was measured, and be gone: how a peer ends is not asked, and some do not when they are told to."""
    await peer.open()
    began = time.perf_counter()
    if what != "start":
        await peer.put(range(count))
    seconds = (time.perf_counter() - began) / count
    if what != "put":
        done = _expect(count)
        began = time.perf_counter()
        async with peer.working():
            if what == "start":
                seconds = await _starts(peer, count)
            else:
                await done
                seconds = (time.perf_counter() - began) / count
            _leave(seconds)
    _leave(seconds)


def _leave(seconds: float) -> NoReturn:
    click.echo(json.dumps(seconds))
    sys.stdout.flush()
    os._exit(0)  # the server dies with us


def _expect(count: int) -> Awaitable[None]:
    """What is done when the function was called so often."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    ARRIVALS.expect(count, lambda: loop.call_soon_threadsafe(done.set_result, None))
    return done


async def _starts(peer: Peer, count: int) -> float:
    took = []
    for number in range(count):
        await asyncio.sleep(0.005)
        arrived = _expect(1)
        began = time.perf_counter()
        await peer.put([number])
        await arrived
        took.append(time.perf_counter() - began)
    return median(took)


def cases(items: int, starts: int) -> list[Result]:
    """All that can be measured here."""
    results = []
    for way, of in WAYS.items():
        if lack := missing(of.server):
            click.echo(f"{way} is left out: {lack}", err=True)
        elif beside.is_there(way, of.library):
            results += [Result(what, way, int(items * of.share)) for what in ("put", "handle")]
            results.append(Result("start", way, starts))
    results.append(Result("small", "ours", items))
    return results + [Result("50 ms", way, 40) for way in ("ours", "two processes")]


def report(results: list[Result], layout: Layout) -> str:
    """For people: items a second, and each to ours on the same server."""
    rows = []
    for each in (each for each in results if each.seconds):
        figure = f"{each.typical * 1000:.2f} ms" if each.what == "start" else f"{1 / each.typical:,.0f} /s"
        rows.append([each.what, each.way, str(each.count), figure, beside.figure(_to_ours(each, results))])
    return layout(["what", "by", "items", "", "time / ours"], rows)


def _to_ours(result: Result, results: Iterable[Result]) -> float | None:
    """The median of the ratios within a sweep; the numbers of items may differ: both are for one."""
    ours = f"ours, {WAYS[result.way].server}" if result.way in WAYS else "ours"
    unit = next((each for each in results if each.what == result.what and each.way == ours), None)
    if unit is None or unit is result or not unit.seconds:
        return None
    return median(mine / its for mine, its in zip(result.seconds, unit.seconds, strict=False))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("-n", "--items", type=click.IntRange(100), default=20_000, help="How many items; slow peers have fewer.")
@click.option("-r", "--runs", type=click.IntRange(1), default=3, help="How many interleaved sweeps.")
@click.option("-w", "--way", "ways", multiple=True, help="Measure only those whose name has this in it.  [default: all]")
@click.option("--quick", is_flag=True, help="2000 items, one sweep.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the JSON.")
@click.option("--one", nargs=3, type=(str, str, int), metavar="WHAT WAY COUNT", hidden=True)
def main(
    items: int,
    runs: int,
    ways: tuple[str, ...],
    quick: bool,
    markdown: bool,
    file: Path | None,
    one: tuple[str, str, int] | None,
) -> None:
    """Measure what an item of a queue costs."""
    if one:
        click.echo(json.dumps(run_one(*one)))
        return
    found = cases(2000 if quick else items, 50 if quick else 300)
    chosen = [each for each in found if not ways or any(way in each.way for way in ways)]
    if not chosen:
        raise click.ClickException(f"none of these can be measured here: {', '.join(ways)}")
    results = beside.sweep("benchmarks.queues", chosen, 1 if quick else runs)
    beside.tell("queues", results, report, markdown, file)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.queues")
