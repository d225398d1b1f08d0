"""In-process tasks: spawn and finish of N tasks with one checkpoint each, supervised by us and in bare nurseries.

    python -m benchmarks.tasks {trio,asyncio,ours} N      prints the seconds as JSON

Each measurement is a process of its own, so that none inherits another's heap.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable

import trio

from benchmarks.alone import alone

ROUNDS = 5
MANY = 10_000
"""From here on a measurement is one round, and made in the first sweep only."""


async def work() -> None:
    """What a supervised task does: one checkpoint."""
    await trio.lowlevel.checkpoint()


def in_trio(count: int) -> float:
    """A bare Trio nursery."""

    async def main() -> float:
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(trio.lowlevel.checkpoint)
        return time.perf_counter() - began

    return trio.run(main)


def in_asyncio(count: int) -> float:
    """A bare asyncio TaskGroup."""

    async def checkpoint() -> None:
        await asyncio.sleep(0)

    async def main() -> float:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(checkpoint())
        return time.perf_counter() - began

    return asyncio.run(main())


def in_ours(count: int) -> float:
    """Jobs of our tree, `once` and started by one command: from the command until the last has completed."""
    from supervisor import open_supervisor
    from supervisor.events import Ended, Event

    job = {"call": "benchmarks.tasks:work", "once": True, "start": "manual", "restart": "temporary"}
    names = [f"t{index}" for index in range(count)]

    async def main() -> float:
        left, done = count, trio.Event()

        def count_down(event: Event) -> None:
            nonlocal left
            if isinstance(event, Ended):
                left -= 1
                if not left:
                    done.set()

        async with open_supervisor({"jobs": dict.fromkeys(names, job)}) as tree:
            tree.journal.add_sink(count_down)
            began = time.perf_counter()
            tree.order("start", names)
            await done.wait()
            return time.perf_counter() - began

    return trio.run(main)


WAYS: dict[str, Callable[[int], float]] = {"trio": in_trio, "asyncio": in_asyncio, "ours": in_ours}


def measure_tasks(way: str, count: int) -> dict[str, list[float]]:
    """Seconds a task, of a fresh process."""
    return {"task": [alone("benchmarks.tasks", way, str(count)) / count]}


def main(way: str, count: int) -> None:
    """Few tasks are measured several times, and the median counts; many, once."""
    rounds = ROUNDS if count < MANY else 1
    print(json.dumps(sorted(WAYS[way](count) for _ in range(rounds))[rounds // 2]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
