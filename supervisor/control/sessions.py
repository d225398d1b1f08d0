"""Requests in which both sides talk: `exec` and `attach`, and the `input` for them.

What a job prints goes to the client as items; what the client has to say comes as further requests of the same connection,
each answered when it is written. So a job that does not read keeps its writer waiting, and nobody else.
"""

# ruff: noqa: ASYNC109  (handlers take what the table of verbs names, `timeout` too)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from supervisor import config as configuration
from supervisor.control.messages import Attached, Finished, Output
from supervisor.errors import ControlError, SpecError
from supervisor.events import Lagged
from supervisor.kinds import JobSpec, Outcome
from supervisor.nodes import WorkersNode

if TYPE_CHECKING:
    from supervisor.control.call import Call
    from supervisor.kinds.attachment import Attachment
    from supervisor.nodes import JobNode, OneOff
    from supervisor.nodes.node import Life
    from supervisor.output import Follower
    from supervisor.tree import Supervisor


class WayIn:
    """Where the input of one request goes, as the other requests of its connection find it."""

    def __init__(self) -> None:
        self.busy = False
        """Whether a piece of input is being written."""
        self._attachment: Attachment | None = None
        self._known = trio.Event()

    def lead_to(self, attachment: Attachment | None) -> None:
        """From now on it leads there; None: nowhere, the run is over. The first call decides until then."""
        self._attachment = attachment
        self._known.set()

    async def attachment(self) -> Attachment:
        """The input of the job, as soon as it is there. Raises ControlError where there is none any more."""
        await self._known.wait()
        if self._attachment is None:
            raise ControlError("it takes no more input")
        return self._attachment


@contextmanager
def _way_in(call: Call) -> Iterator[WayIn]:
    """The way in of this request, found by its id for as long as the block lasts."""
    ways, key = call.connection.ways_in, msgspec.json.decode(call.identity)
    if key in ways:
        raise ControlError(f"id {key!r} is in use by another {call.verb} of this connection")
    ways[key] = way = WayIn()
    try:
        yield way
    finally:
        del ways[key]
        way.lead_to(None)


async def pass_on(call: Call, to: int | str, data: bytes, eof: bool, rows: int, columns: int) -> None:
    """`input`: write to what the request `to` is about, and set the size of its terminal."""
    way = call.connection.ways_in.get(to)
    if way is None:
        raise ControlError(f"no exec or attach with the id {to!r} on this connection")
    try:
        if rows and columns:
            (await way.attachment()).resize(rows, columns)
        if data or eof:
            await _write(way, data, eof)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise ControlError("it takes no more input") from error


async def _write(way: WayIn, data: bytes, eof: bool) -> None:
    """One piece at a time: who sends the next too early would have no say in the order, and fill our memory."""
    if way.busy:
        raise ControlError("one input at a time: wait for the answer to the last one")
    way.busy = True
    try:
        attachment = await way.attachment()
        if data:
            await attachment.write(data)
        if eof:
            await attachment.close()
    finally:
        way.busy = False


# ---------------------------------------------------------------- exec


async def execute(
    call: Call,
    command: list[str],
    name: str,
    cwd: str,
    user: str,
    env: list[str],
    interactive: bool,
    tty: bool,
    timeout: float | None,
    detach: bool,
) -> Finished | None:
    """`exec`: run a job that no configuration names. It is stopped when the client hangs up, unless it is to run on."""
    if detach and (interactive or tty or timeout is not None):
        raise ControlError("exec: what runs on by itself has nobody to type, and nobody to wait: leave out the other options")
    tree = call.tree
    name = name or tree.free_name()
    keys: dict[str, Any] = {"tty": True} if tty else {"stdin": "pipe"} if interactive else {}
    keys |= {key: _literal(value) for key, value in {"cwd": cwd, "user": user}.items() if value}
    spec = _spec(tree, name, command, env, keys)
    call.record([name])
    if detach:
        tree.begin(spec, name=name, by=call.by)
        await call.notify([Attached(name=name, tty=False)])
        return None
    async with tree.executing(spec, name=name, by=call.by) as job:
        return await _serve(call, job, interactive or tty, tty, timeout)


async def _serve(call: Call, job: OneOff, takes_input: bool, tty: bool, timeout: float | None) -> Finished:
    """Show all that it prints, let the client type to it, and end it in time."""
    late = False

    async def limit() -> None:
        nonlocal late
        await trio.sleep(float("inf") if timeout is None else timeout)
        late = True
        call.tree.order("stop", [job.name], by=f"its timeout of {timeout:g} s")

    with call.tree.outputs.follow(job.name, lossless=True) as follower, _way_in(call) as way:
        await call.notify([Attached(name=job.name, tty=tty)])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(limit)
            if takes_input:
                nursery.start_soon(_open_way, call.tree, job, way)
            else:
                way.lead_to(None)
            await _show(call, follower)
            outcome = await job.wait()
            nursery.cancel_scope.cancel(reason="it has ended")
    if late:
        raise ControlError(f"{job.name}: ended after {timeout:g} s (--timeout): {outcome.reason}", ControlError.TIMED_OUT)
    return _finished(job.name, outcome)


async def _open_way(tree: Supervisor, job: OneOff, way: WayIn) -> None:
    """Let the input in as soon as there is somebody to read it."""
    with tree.journal.subscribe() as events:
        while job.life is None or job.life.run.attach is None:
            await anext(events)
        way.lead_to(job.life.run.attach)


def _spec(tree: Supervisor, name: str, command: list[str], env: list[str], keys: dict[str, Any]) -> JobSpec:
    """The job, held to the rules of a file. Raises ControlError with every fault."""
    table: dict[str, Any] = {"command": [_literal(word) for word in command], "once": True, "env": {}, **keys}
    for setting in env:
        variable, equals, value = setting.partition("=")
        if not equals:
            raise ControlError(f"exec: env: expected NAME=VALUE, got {variable!r}")
        table["env"][variable] = _literal(value)
    try:
        return configuration.from_mapping({"jobs": {name: table}}, tree.config.base, {}).jobs[name]
    except SpecError as error:
        faults = (f"{fault.path.removeprefix(f'jobs.{name}.')}: {fault.message}" for fault in error.problems)
        raise ControlError(f"exec: {'; '.join(faults)}") from None


def _literal(text: str) -> str:
    """`text` as a file would have to write it so that nothing in it is expanded."""
    return text.replace("${", "$${")


# ---------------------------------------------------------------- attach


async def attach(call: Call, name: str, lines: int) -> Finished:
    """`attach`: show what a job prints from now on, and let the client type to it, until its run ends."""
    names = call.tree.resolve([name])
    if len(names) > 1:
        raise ControlError(f"attach: {name!r} matches {', '.join(names)}: choose one")
    (name,) = names
    life, attachment = _attachable(call.tree, name)
    call.record([name])
    outputs = call.tree.outputs
    with outputs.follow(name) as follower, _way_in(call) as way:
        tail = await outputs.tail(name, lines)
        way.lead_to(attachment)
        await call.notify([Attached(name=name, tty=attachment.tty), *([Output(data=tail)] if tail else [])])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_show, call, follower)
            await life.gone.wait()
            follower.end()
    return _finished(name, life.run.outcome or Outcome(reason="ended", failed=False))


def _attachable(tree: Supervisor, name: str) -> tuple[Life, Attachment]:
    """The run of a job, and its input. Raises ControlError where there is none, with what to do."""
    node = tree.nodes[name]
    if node.kind == "supervisor":
        raise ControlError(f"{name} is a supervisor: attach to one of its jobs")
    if isinstance(node, WorkersNode):
        raise ControlError(f"{name} has several workers: attach to one of them, such as {name}:0")
    job: JobNode = node  # type: ignore[assignment]
    if job.life is not None and job.life.run.attach is not None:
        return job.life, job.life.run.attach
    if job.spec.stdin == "pipe" or job.spec.tty:
        raise ControlError(f"{name} is {job.row.word}: {job.row.cause}; attach needs a job that runs")
    if job.one_off:
        raise ControlError(f"{name} was executed without an input; to only watch: supervisor logs -f {name}")
    raise ControlError(
        f'{name}: attach needs stdin = "pipe" or tty = true in [jobs.{name}]; to only watch: supervisor logs -f {name}'
    )


async def _show(call: Call, follower: Follower) -> None:
    """Send what a job prints until it has ended."""
    async for chunk in follower:
        await call.notify([Output(lagged=chunk.count) if isinstance(chunk, Lagged) else Output(data=chunk)])


def _finished(name: str, outcome: Outcome) -> Finished:
    return Finished(name=name, reason=outcome.reason, failed=outcome.failed, code=outcome.code, signal=outcome.signal)
