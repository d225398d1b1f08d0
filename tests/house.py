"""Runs of child processes by themselves: what they live in, with a reporter that notes what it is told."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from supervisor.children import Children, guardian, open_children
from supervisor.errors import RunFailed
from supervisor.kinds import KINDS, Handler, JobSpec, Outcome, Resources, Run, Work, inherited
from supervisor.output import Outputs, open_outputs
from supervisor.queues.spec import BatchSpec
from supervisor.sockets import Sockets, SocketSpec, open_sockets
from supervisor.state import Phase
from supervisor.store import Store, open_store


class Notes:
    """The reporter's side of a run."""

    def __init__(self) -> None:
        self.pid = None
        self.cause = None
        self.lost = []
        self.far = []
        self.on_progress = lambda: None
        self.is_ready = trio.Event()

    def ready(self, run, cause):
        self.cause = cause
        self.is_ready.set()

    def spawned(self, run, pid):
        self.pid = pid

    def stuck(self, run, cause, pids):
        raise AssertionError(cause)

    def progress(self, run, done, total):
        self.far.append((done, total))
        self.on_progress()

    def output_lost(self, run, count, cause):
        self.lost.append((count, cause))


class House:
    """What a run lives in, and the runs that a test makes."""

    def __init__(
        self, children: Children, outputs: Outputs, sockets: Sockets, store: Store, logs: Path, nursery: trio.Nursery
    ) -> None:
        self.resources = Resources(
            children=children,
            outputs=outputs,
            sockets=sockets,
            store=store,
            environ=inherited({**os.environ, "NOTIFY_SOCKET": "/not/yours"}),
            base=logs.parent,
        )
        self.outputs = outputs
        self.logs = logs
        self.nursery = nursery
        self.runs = 0
        self.on_worker = lambda run: None

    def start(self, **spec) -> Life:
        self.runs += 1
        return Life(self, JobSpec(**spec), self.runs)

    async def finish(self, **spec) -> Outcome:
        return await self.start(**spec).end()

    def log(self) -> bytes:
        return (self.logs / "job.log").read_bytes()


class Life:
    """One run, started; its outcome or its exception when it is over."""

    def __init__(self, house: House, spec: JobSpec, number: int) -> None:
        self.notes = Notes()
        self.run = Run("job", number, self.notes, trio.Event())
        self.scope = trio.CancelScope()
        self.outcome = None
        self.error = None
        self.over = trio.Event()
        house.nursery.start_soon(self._live, house, spec)

    async def _live(self, house: House, spec: JobSpec) -> None:
        with self.scope:
            try:
                self.outcome = await KINDS[spec.kind or "command"].run(spec, self.run, house.resources)
            except RunFailed as error:
                self.error = error
        self.over.set()

    async def end(self) -> Outcome:
        await self.over.wait()
        if self.error is not None:
            raise self.error
        return self.outcome

    async def ready(self) -> int:
        await self.notes.is_ready.wait()
        return self.notes.pid

    async def stop(self) -> Outcome:
        self.run.advance(Phase.STOPPING)
        return await self.end()

    async def kill(self) -> None:
        self.scope.cancel(reason="grace is over")
        await self.over.wait()


class Worker:
    """A worker of a queue job, with its handler: items are put into its hands."""

    def __init__(self, run: Run, handler: Handler) -> None:
        self.run = run
        self.handler = handler
        self.notes: Notes = run._reporter
        self.items = 0

    def work(self, attempt: int = 1, until: float | None = None, items: int = 1) -> Work:
        self.items += 1
        return Work(self.run, until, f"item{self.items}", attempt, trio.CancelScope(), items)

    async def json(self, payload: str, **keys) -> str | None:
        """What the function returns for an item, both as JSON."""
        result = await self.handler.handle(self.work(**keys), payload.encode())
        return None if result is None else result.decode()

    async def __call__(self, value: object = None, **keys) -> object:
        """The same in Python's values."""
        result = await self.json(json.dumps(value), **keys)
        return None if result is None else json.loads(result)


@asynccontextmanager
async def open_worker(house: House, **spec):
    """A worker of a queue job of this kind."""
    house.runs += 1
    run = Run("job", house.runs, Notes(), trio.Event())
    house.on_worker(run)
    if "batch" in spec:
        spec["batch"] = BatchSpec(**spec["batch"])
    made = JobSpec(**{"queue": "q", **spec})
    async with KINDS[made.kind or "command"].handling(made, run, house.resources) as handler:
        yield Worker(run, handler)


@asynccontextmanager
async def open_house(logs: Path, sockets: Mapping[str, SocketSpec] | None = None):
    with trio.fail_after(60):
        async with (
            open_children(f"test-{os.getpid()}") as children,
            open_outputs(logs) as outputs,
            open_sockets(sockets or {}) as opened,
            open_store(logs.parent / "state.db", (), on_failure=print) as store,
            trio.open_nursery() as nursery,
        ):
            yield House(children, outputs, opened, store, logs, nursery)
            nursery.cancel_scope.cancel(reason="the test is over")


def sh(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def logged_pid(house: House) -> int:
    return int(house.log().split()[0])


def alive(pid: int) -> bool:
    return bool(guardian.read(f"/proc/{pid}/stat")) and not guardian.zombie(pid)
