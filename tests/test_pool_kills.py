"""A real daemon with a queue on disk, killed with SIGKILL in the midst of its work: nothing that was put is lost.

What a kill may repeat is what was in hand at that moment, and what had just ended: no more than two items for each worker.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from running import PATIENCE, running

from supervisor.inotify import MODIFY, Inotify

ROUNDS = [
    pytest.param(60, 2, id="few"),
    pytest.param(150, 60, id="many", marks=[pytest.mark.long, pytest.mark.limit(900)]),
]
WORKERS = 4

FILE = f"""
[queues.q]

[jobs.put]
call = "items:put"
once = true

[jobs.work]
call = "items:work"
queue = "q"
workers = {WORKERS}
retry = {{ attempts = 1000 }}
"""
"""One that is in hand at five kills would be dead, rightly."""

MODULE = """
import os, trio

done = os.open("done.txt", os.O_CREAT | os.O_APPEND | os.O_RDWR)


async def put(ctx: "Context"):
    put = os.open("put.txt", os.O_CREAT | os.O_APPEND | os.O_RDWR)
    first = os.read(put, 1 << 20).count(b"\\n")
    for number in range(first, int(os.environ["ITEMS"])):
        await ctx.put("q", number, id=f"n{number}", keep=True)
        os.write(put, b"%d\\n" % number)


async def work(item):
    os.write(done, b"begin %d\\n" % item)
    await trio.sleep(0.002)
    os.write(done, b"end %d\\n" % item)
"""


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


async def seen(path: Path, enough: Callable[[list[str]], bool]) -> None:
    """Wait until the lines of a file are enough."""
    with trio.fail_after(PATIENCE), Inotify() as inotify:
        inotify.watch(path, MODIFY)
        while not enough(lines(path)):
            await inotify.wait()


@pytest.mark.parametrize(("items", "kills"), ROUNDS)
async def test_what_was_in_hand_when_the_daemon_was_killed_runs_again_and_nothing_is_lost(tmp_path, items, kills):
    (tmp_path / "supervisor.toml").write_text(FILE)
    (tmp_path / "items.py").write_text(MODULE)
    done, chance = tmp_path / "done.txt", random.Random(1)
    done.touch()
    for _ in range(kills):
        async with running(tmp_path, ITEMS=str(items)) as daemon:
            more = len(lines(done)) + chance.randint(5, 2 * items // kills)
            await seen(done, lambda now, more=more: len(now) >= min(more, 2 * items))
            daemon.process.kill()
            await daemon.ended()
    every = {f"end {number}" for number in range(items)}
    async with running(tmp_path, ITEMS=str(items)) as daemon:
        await seen(done, lambda now: set(now) >= every)
        await daemon("shutdown")
    begun = Counter(line.removeprefix("begin ") for line in lines(done) if line.startswith("begin "))
    twice = sum(times - 1 for times in begun.values())
    assert sorted(map(int, begun)) == list(range(items))
    assert twice <= kills * 2 * WORKERS
