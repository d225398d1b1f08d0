"""Daemons as users have them: each in a directory of its own, with a queue job whose functions say what they do."""

from __future__ import annotations

import json
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
from running import MODULE, Running, running
from servers import PATIENCE

from supervisor import QueueUnavailable, open_queue
from supervisor.inotify import MODIFY, Inotify
from supervisor.queues.protocol import Record

T = TypeVar("T")

CODE = """
import os, signal, time
import trio

log = os.open({log!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)


def say(*words):
    os.write(log, (" ".join(map(str, (*words, time.monotonic()))) + "\\n").encode())


async def work(ctx: "Context", item):
    say("begin", item, os.getpid(), ctx.attempt)
    await trio.sleep(0.02)
    say("end", item, os.getpid(), ctx.attempt)


async def slow(ctx: "Context", item):
    say("begin", item, os.getpid(), ctx.attempt)
    await trio.sleep(0.1)
    say("end", item, os.getpid(), ctx.attempt)


def compute(ctx: "Context", item):
    say("begin", item, os.getpid(), ctx.attempt)
    time.sleep(0.0005)
    say("end", item, os.getpid(), ctx.attempt)


async def hold(ctx: "Context", item):
    say("begin", item, os.getpid(), ctx.attempt)
    try:
        while item == "ever" or not os.path.exists("go"):
            await trio.sleep(0.02)
    except trio.Cancelled:
        say("stopped", item, os.getpid(), ctx.attempt)
        raise
    say("end", item, os.getpid(), ctx.attempt)


async def poison(item):
    if item == "poison":
        os.kill(os.getpid(), signal.SIGKILL)


async def put(ctx: "Context"):
    with open({log!r}) as lines:
        stored = {{line.split()[1] for line in lines if line.startswith("stored ")}}
    for number in range({items}):
        if str(number) not in stored:  # what was told to be stored is not put again: it is there, or lost
            await ctx.put("q", number, id=f"n{{number}}", keep=True)
            say("stored", number)
"""


class Log:
    """What the functions of all daemons of a test say: one line for each beginning and end. Each line is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.path.write_bytes(b"")
        self._seen = 0
        self._lines = defaultdict[str, list[list[str]]](list)
        self._items = defaultdict[str, set[str]](set)
        self._moments = defaultdict[str, list[float]](list)

    def lines(self, word: str) -> list[list[str]]:
        """The lines that begin with this word: the word, the item, and who has it."""
        self._look()
        return self._lines[word]

    def items(self, word: str) -> set[str]:
        """The items of these lines."""
        self._look()
        return self._items[word]

    def moments(self, word: str) -> list[float]:
        """When each of these lines was said, by the clock of the machine that nobody sets."""
        self._look()
        return self._moments[word]

    @property
    def attempts_are_counted(self) -> bool:
        """Whether each beginning of an item knew of those before it: a claim is stored before the function runs."""
        begun = defaultdict[str, list[int]](list)
        for _, item, _, attempt in self.lines("begin"):
            begun[item].append(int(attempt))
        return all(attempts == sorted(set(attempts)) for attempts in begun.values())

    def _look(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._seen)
            whole = file.read().rpartition(b"\n")[0]
        if whole:
            self._seen += len(whole) + 1
            for line in whole.decode().splitlines():
                *said, moment = line.split()
                self._lines[said[0]].append(said)
                self._items[said[0]].add(said[1])
                self._moments[said[0]].append(float(moment))

    async def until(self, enough: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait until what is said is enough."""
        with trio.fail_after(patience), Inotify() as inotify:
            inotify.watch(self.path, MODIFY)
            while not enough():
                await inotify.wait()

    async def says(self, word: str, count: int = 1) -> None:
        await self.until(lambda: len(self.lines(word)) >= count)


class Host:
    """A daemon in a directory of its own, which comes up again whenever it is killed."""

    def __init__(self, log: Log, name: str, file: str, program: tuple[str, ...] = MODULE, items: int = 0) -> None:
        self.directory = log.path.parent / name
        self.directory.mkdir()
        (self.directory / "supervisor.toml").write_text(file)
        (self.directory / "items.py").write_text(CODE.format(log=str(log.path), items=items))
        self.log = log
        self.program = program
        self.daemon: Running
        self.up = trio.Event()
        self.killed: list[int] = []
        self.past: list[dict[str, Any]] = []
        """What those that were killed have said."""

    async def live(self) -> None:
        """Run it, for ever."""
        while True:
            async with running(self.directory, program=self.program) as self.daemon:
                self.up.set()
                code = await self.daemon.process.wait()
                assert code == -signal.SIGKILL, f"nobody has killed it, and it has ended with {code}"
                self._is_down()
                self.past += self.daemon.log

    def _is_down(self) -> None:
        if self.up.is_set():
            self.up = trio.Event()

    async def is_up(self) -> None:
        """Wait until it runs, whoever may have killed it."""
        if self.daemon.process.returncode is not None:
            self._is_down()
        await self.up.wait()

    async def kill(self) -> None:
        """`kill -9`; returns when the next one runs."""
        self._is_down()
        self.killed.append(self.daemon.process.pid)
        self.daemon.process.kill()
        await self.up.wait()

    def said(self, event: str) -> list[dict[str, Any]]:
        """All lines of this event that it has said so far."""
        return [line for line in [*self.past, *self.daemon.log] if line["event"] == event]


@asynccontextmanager
async def alive(*hosts: Host) -> AsyncIterator[None]:
    """All of these up, as long as the block lasts."""
    async with trio.open_nursery() as nursery:
        for host in hosts:
            nursery.start_soon(host.live)
        for host in hosts:
            await host.up.wait()
        yield
        nursery.cancel_scope.cancel(reason="the test is over")


def file(url: str, job: str, queue: str = "") -> str:
    """A queue `q` and a job on it."""
    return f'[queues.q]\nbackend = "{url}"\n{queue}\n\n[jobs.work]\nqueue = "q"\n{job}\n'


async def all_end(url: str, ids: list[str]) -> list[Record]:
    """These items, which were put to be kept, when they have ended."""
    async with open_queue(url, "q") as queue:
        return [await queue.wait(id, PATIENCE) for id in ids]


async def put(url: str, *values: object) -> list[str]:
    """Put these, to be kept; their ids."""
    async with open_queue(url, "q") as queue:
        return [receipt.id for receipt in await queue.put_many(values, keep=True)]


async def quiet(daemon: Running) -> None:
    """Wait until nothing waits or runs in its queue any more, and nothing has died."""
    while True:
        (row,) = json.loads(await daemon("queue", "ls", "--json"))
        if not row["waiting"] and not row["running"] and not row["delayed"]:
            assert row["dead"] == 0
            return


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What comes of it, when the server is there."""
    while True:
        try:
            return await ask()
        except QueueUnavailable:
            await trio.sleep(0.05)
