"""A daemon as a user has it: a process of its own, steered by the `supervisor` command, watched through its events."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import trio

from supervisor.control.aclient import AsyncClient, Stream
from supervisor.control.messages import Snapshot
from supervisor.events import AnyEvent, Event, apply
from supervisor.state import JobStatus

ROOT = Path(__file__).parent.parent
MODULE = (sys.executable, "-P", "-m", "supervisor")
SCRIPT = Path(sys.executable).parent / "supervisor"
PATIENCE = 60.0
"""Seconds that anything real may take, so that a hang fails."""

Table = Mapping[str, JobStatus]


class Said(Exception):
    """A command did not end as expected."""


class TooSlow(Exception):
    """The daemon went ahead of this reader: events are missing."""


class Watch:
    """The table of a daemon, kept as its events say."""

    def __init__(self, table: dict[str, JobStatus], items: Stream) -> None:
        self.table = table
        self._items = items

    async def next(self) -> Event:
        """The next event; the table is then what it made of it."""
        item = await anext(self._items)
        if item["event"] == "lagged":
            raise TooSlow
        event: Event = msgspec.convert(item, AnyEvent)
        apply(self.table, event)
        return event

    async def until(self, true: Callable[[Table], bool]) -> Table:
        """The table as soon as it is as wanted."""
        while not true(self.table):
            await self.next()
        return self.table


class Running:
    """A daemon and its directory. Call it with the words of a command; `until` waits for what its events lead to."""

    def __init__(self, program: tuple[str, ...], directory: Path, mark: str, environ: Mapping[str, str]) -> None:
        self.program = program
        self.directory = directory
        self.environ = environ
        self.process: trio.Process
        self.log: list[dict[str, Any]] = []
        self._mark = f"RUNNING_UNDER_TEST={mark}"
        self._more = trio.Event()
        self._seen: set[int] = set()

    async def __call__(self, *words: str, code: int = 0) -> str:
        """Run `supervisor WORDS`, which must end with `code`; gives what it printed, stdout first."""
        result = await command(self.program, *words, directory=self.directory, environ=self.environ)
        text = result.stdout.decode() + result.stderr.decode()
        if result.returncode != code:
            raise Said(f"{' '.join(words)} ended with {result.returncode}, not {code}:\n{text}")
        return text

    async def rows(self) -> dict[str, dict[str, Any]]:
        """What `supervisor status --json` says, by name."""
        result = await command(self.program, "status", "--json", directory=self.directory, environ=self.environ)
        return {row["name"]: row for row in json.loads(result.stdout)}

    async def until(self, true: Callable[[Table], bool]) -> Table:
        """The table as soon as it is as wanted."""
        with trio.fail_after(PATIENCE):
            while True:
                with suppress(TooSlow):  # then: a new snapshot
                    async with self.watching() as watch:
                        return await watch.until(true)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Watch]:
        """Its status from here on, event by event."""
        with trio.fail_after(PATIENCE):
            async with self.client().events(follow=True, snapshot=True) as items:
                first = msgspec.convert(await anext(items), Snapshot)
                yield Watch({row.name: row for row in first.snapshot}, items)

    def client(self) -> AsyncClient:
        """A client of its socket."""
        return AsyncClient(str(self.directory / ".supervisor" / "control.sock"))

    async def said(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first line of its log, past or to come, with this event and these fields."""
        seen = 0
        with trio.fail_after(PATIENCE):
            while True:
                for line in self.log[seen:]:
                    if line.get("event") == event and fields.items() <= line.items():
                        return line
                seen = len(self.log)
                await self._more.wait()

    def family(self) -> set[int]:
        """The daemon and every living process of its own: by a mark in the environment, as its child, or seen before."""
        everyone = set(map(int, filter(str.isdigit, os.listdir("/proc"))))
        found = {pid for pid in everyone if self._mark in _environ(pid) or _parent(pid) == self.process.pid}
        self._seen = found | self._seen & everyone
        return self._seen

    async def ended(self, patience: float = PATIENCE) -> int:
        """The exit code of the daemon."""
        with trio.fail_after(patience):
            return await self.process.wait()

    async def read(self) -> None:
        """Keep what it says on stderr."""
        assert self.process.stderr is not None
        rest = b""
        async for chunk in self.process.stderr:
            *lines, rest = (rest + chunk).split(b"\n")
            self.log += [json.loads(line) if line.startswith(b"{") else {"event": line.decode()} for line in lines]
            self._more.set()
            self._more = trio.Event()


@asynccontextmanager
async def running(directory: Path, *options: str, program: tuple[str, ...] = MODULE, **environ: str) -> AsyncIterator[Running]:
    """`supervisor run` in `directory`, answering; killed at the end if it is still there."""
    mark = uuid.uuid4().hex
    daemon = Running(program, directory, mark, environ)
    daemon.process = await trio.lowlevel.open_process(
        [*program, "run", *options],
        cwd=directory,
        env=clean_environ() | environ | {"RUNNING_UNDER_TEST": mark},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon.read)
        try:
            await daemon.said("running")
            yield daemon
        finally:
            nursery.cancel_scope.cancel(reason="the test is over")
            daemon.process.kill()
            with trio.CancelScope(shield=True):
                await daemon.process.wait()


async def command(
    program: tuple[str, ...], *words: str, directory: Path, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run one command to its end."""
    with trio.fail_after(PATIENCE):
        return await trio.run_process(
            [*program, *words],
            cwd=directory,
            env=clean_environ() | dict(environ or {}),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


def clean_environ() -> dict[str, str]:
    """Ours, without what would lead a command elsewhere; and this tree to import, whether it is installed or not."""
    kept = {name: value for name, value in os.environ.items() if name not in ("SUPERVISOR_SOCKET", "STATE_DIRECTORY", "PORT")}
    return kept | {"PYTHONPATH": str(ROOT)}


def well(table: Table) -> bool:
    """Whether everything that is to run does, and what has a schedule waits for it."""
    return all(row.ready or row.goal.value == "down" or row.word in ("completed", "scheduled") for row in table.values())


def clone(directory: Path) -> Path:
    """A copy of what the repository ships, as a newcomer has it."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "var")
    for name in ("supervisor", "jobs"):
        shutil.copytree(ROOT / name, directory / name, ignore=ignore)
    for name in ("supervisor.toml", "pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, directory / name)
    return directory


def _environ(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
