"""Opening a tree: the configuration is checked, what the tree stands on is opened, and what fails comes out as it is."""

from __future__ import annotations

import math
import os
import random
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from supervisor import config as configuration
from supervisor import events, last_runs
from supervisor.children import open_children
from supervisor.config import Config
from supervisor.events import Journal
from supervisor.kinds import Resources, inherited
from supervisor.output import Echo, open_outputs
from supervisor.queues.registry import open_queues
from supervisor.sockets import open_sockets
from supervisor.store import open_store
from supervisor.tree.outline import queue_settings
from supervisor.tree.supervisor import Supervisor
from supervisor.wall import Wall, WallClock

STATE = "state.db"
"""In the state directory: what one daemon remembers for the next."""


@asynccontextmanager
async def open_supervisor(
    config: Config | str | os.PathLike[str] | Mapping[str, Any],
    *,
    echo: Echo | None = None,
    instance: str | None = None,
    environ: Mapping[str, str] | None = None,
    journal: Journal | None = None,
    spread: Callable[[float, float], float] = random.uniform,
    last_resort: Callable[[], None] | None = None,
    listening: Mapping[str, socket.socket] | None = None,
    record: Path | None = None,
    wall: Wall | None = None,
) -> AsyncIterator[Supervisor]:
    """Run a tree for as long as the block lasts; leaving it, or being cancelled in it, is an orderly stop.

    `config` is the path of a TOML file, a mapping of the same shape, or a checked `Config`. The block is cancelled when the
    tree ends by itself; then RestartIntensityExceeded or EssentialEnded is raised if it ended because something failed.
    What the block raises comes out as it is, after the stop; only where more than one thing failed is it a group.

    `echo(name, line)` gets each line of captured output. `environ` is what `${NAME}` and children see (default: the
    process's). `spread(low, high)` is the source of chance for jitter. `last_resort` is called if a task ignores its
    cancellation, so that the tree can never end. `listening` has sockets that listen already, by their name in `[sockets]`:
    they are used, and closed, instead of ones of our own. `record` is for a daemon: `open_children` tells what it is. `wall`
    is the clock that `cron` goes by (default: the system's).
    """
    environ = dict(os.environ if environ is None else environ)
    checked = _checked(config, environ)
    journal = journal or Journal()
    house = partial(
        _house,
        checked,
        environ,
        echo,
        instance or secrets.token_hex(8),
        journal,
        spread,
        last_resort,
        listening,
        record,
        wall or WallClock(),
    )
    errors: list[BaseException] = []
    try:
        async with trio.open_nursery() as nursery:
            block = trio.CancelScope()
            tree: Supervisor = await nursery.start(house, block)
            try:
                with _kept_apart(errors), block:
                    yield tree
            finally:
                tree.shutdown("the block that opened it has ended")
    except BaseException as error:
        own = _without_cancelled(error)
        if own is None and not errors:
            raise
        errors += [] if own is None else [_bare(own)]
    else:
        if tree.failure is not None and not errors:
            raise tree.failure from None  # not from the cancellation of the block
        errors += [] if tree.failure is None else [tree.failure]
    if len(errors) > 1:
        raise BaseExceptionGroup("a tree and the block that opened it failed", errors)
    if errors:
        raise errors[0]


async def _house(
    config: Config,
    environ: Mapping[str, str],
    echo: Echo | None,
    instance: str,
    journal: Journal,
    spread: Callable[[float, float], float],
    last_resort: Callable[[], None] | None,
    listening: Mapping[str, socket.socket] | None,
    record: Path | None,
    wall: Wall,
    block: trio.CancelScope,
    task_status: trio.TaskStatus[Supervisor],
) -> None:
    """A tree and what it stands on, from the first to the last; then `block` is cancelled.

    Shielded: whoever cancels the block from outside gets an orderly stop, with output kept and orphans reaped to its end.
    """

    def warn(text: str) -> None:
        journal.emit(events.Warned, text=text)

    with trio.CancelScope(shield=True) as shield, _importable([str(config.base), *config.daemon.path]):
        async with (
            open_children(instance, warn=warn, record=record) as children,
            open_outputs(config.state_dir / "logs", echo=echo) as outputs,
            open_sockets(config.sockets, listening) as sockets,
            open_store(config.state_dir / STATE, last_runs.SCHEMA, on_failure=lambda error: warn(str(error))) as store,
            open_queues(
                queue_settings(config),
                directory=config.state_dir,
                owner=f"{config.daemon.name}@{socket.gethostname()}/{os.getpid()}",
                journal=journal,
                now=wall.now,
                spread=spread,
            ) as queues,
        ):
            resources = Resources(
                children=children,
                outputs=outputs,
                sockets=sockets,
                store=store,
                queues=queues,
                environ=inherited(environ),
                env=config.daemon.env,
                env_file=config.daemon.env_file,
                base=config.base,
            )
            tree = Supervisor(config, resources, journal, spread, wall)
            await tree.load_last_runs()
            if _cancelled_outside(shield):
                tree.shutdown("cancelled while it was opened")  # nobody is left to say so
            task_status.started(tree)
            await tree.live(last_resort)
    journal.end()
    block.cancel(reason="the tree has ended")


def _cancelled_outside(shield: trio.CancelScope) -> bool:
    """Whether what is outside of a shield, in which we are, has been cancelled."""
    shield.shield = False
    try:
        return trio.current_effective_deadline() == -math.inf
    finally:
        shield.shield = True


@contextmanager
def _kept_apart(errors: list[BaseException]) -> Iterator[None]:
    """Keep what the block raises from the nursery round it, which would wrap it; cancellation passes."""
    try:
        yield
    except BaseException as error:
        own = _without_cancelled(error)
        if own is None:
            raise
        errors.append(own)


def _without_cancelled(error: BaseException) -> BaseException | None:
    """What there is besides cancellation; the error itself where there is none in it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1]
    return None if isinstance(error, trio.Cancelled) else error


def _bare(error: BaseException) -> BaseException:
    """An error out of the nurseries that wrapped it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _checked(config: Config | str | os.PathLike[str] | Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    if isinstance(config, Config):
        configuration.check(config)
        return config
    if isinstance(config, Mapping):
        return configuration.from_mapping(config, Path.cwd(), environ)
    return configuration.load(Path(config), environ)


@contextmanager
def _importable(directories: Sequence[str]) -> Iterator[None]:
    """Job modules are imported from these directories while the tree is open."""
    added = [directory for directory in directories if directory not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for directory in added:
            if directory in sys.path:
                sys.path.remove(directory)
