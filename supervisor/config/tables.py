"""What a whole file says: the tables that are not jobs or supervisors, and the `Config` that holds everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from supervisor.config import toml_places
from supervisor.config.document import Document
from supervisor.config.reading import Finding, dotted
from supervisor.errors import Problem
from supervisor.kinds.job import JobSpec
from supervisor.policies import LimitSpec
from supervisor.queues.spec import QueueSpec
from supervisor.sockets import SocketSpec
from supervisor.spec import AutoShutdown, Paths, Seconds, Spec, SupervisorSpec

TABLES = ("daemon", "defaults", "log", "sockets", "limits", "queues", "supervisors", "jobs")
"""The tables a file can have."""

NAMED = ("sockets", "limits", "queues", "supervisors", "jobs")
"""Those that hold a table for each name."""

_DAEMON = {"reload": "daemon"}  # a change needs a restart of the daemon


class DaemonSpec(Spec, frozen=True, kw_only=True):
    """The `[daemon]` table."""

    name: Annotated[str, Meta(description="what the daemon calls itself in its log and to systemd", extra=_DAEMON)] = (
        "supervisor"
    )
    state_dir: Annotated[
        str | None,
        Meta(
            description="where it keeps its socket, lock and logs; $STATE_DIRECTORY under systemd, else .supervisor/ "
            "beside the file",
            extra=_DAEMON,
        ),
    ] = None
    socket: Annotated[
        str | None,
        Meta(description="path of the control socket; control.sock in the state directory unless given", extra=_DAEMON),
    ] = None
    grace: Annotated[Seconds, Meta(description="how long an orderly stop may take in all; then everything is killed")] = (
        Seconds(80)
    )
    include: Annotated[tuple[str, ...], Meta(description="globs of more TOML files to merge, relative to this one")] = ()
    env: Annotated[
        dict[str, str],
        Meta(description="environment for every child. Values are never shown anywhere", extra={"reload": "children"}),
    ] = {}
    env_file: Annotated[
        Paths,
        Meta(
            description="files of NAME=value lines for the environment of every child, below `env`; as that of a job",
            extra={"reload": "children"},
        ),
    ] = Paths()
    intensity: Annotated[
        int | None,
        Meta(
            ge=0,
            description="more than this many restarts at the root within `period` end the daemon with 1; never unless set",
        ),
    ] = None
    period: Annotated[Seconds, Meta(gt=0, description="the sliding window for `intensity`")] = Seconds(60)
    auto_shutdown: Annotated[
        AutoShutdown, Meta(description="end, with success, when any or all significant jobs at the root have ended")
    ] = AutoShutdown.NEVER
    path: Annotated[
        tuple[str, ...],
        Meta(description="more directories to import job modules from; the file's own comes first", extra=_DAEMON),
    ] = ()
    threads: Annotated[
        int | None,
        Meta(
            ge=1,
            description="how many jobs may run in threads at the same time (kinds thread and asyncio); who finds none free "
            "waits for one. No limit unless set",
            extra=_DAEMON,
        ),
    ] = None
    processes: Annotated[
        int | None,
        Meta(
            ge=1,
            description="how many jobs of the kind process may run at the same time; who finds none free waits for one. No "
            "limit unless set",
            extra=_DAEMON,
        ),
    ] = None
    stall_after: Annotated[
        Seconds,
        Meta(description="when a job blocks the daemon's loop for this long, the log names it and shows where it is; 0: never"),
    ] = Seconds(1)


class LogSpec(Spec, frozen=True, kw_only=True):
    """The `[log]` table: the daemon's own log."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="the least important line that is written")
    ] = "info"
    format: Annotated[
        Literal["auto", "console", "json"],
        Meta(description="console for people, json for machines; auto: console on a terminal", extra=_DAEMON),
    ] = "auto"
    file: Annotated[str | None, Meta(description="write to this file instead of stderr", extra=_DAEMON)] = None


@dataclass(frozen=True)
class Config:
    """A whole configuration, checked. `jobs`, `supervisors`, `sockets`, `limits` and `queues` are in the order of the file.

    `parents` names the supervisor of each job and supervisor; those under the implicit root are not in it.
    """

    file: Path | None
    base: Path
    daemon: DaemonSpec = DaemonSpec()
    log: LogSpec = LogSpec()
    jobs: Mapping[str, JobSpec] = field(default_factory=dict)
    supervisors: Mapping[str, SupervisorSpec] = field(default_factory=dict)
    sockets: Mapping[str, SocketSpec] = field(default_factory=dict)
    limits: Mapping[str, LimitSpec] = field(default_factory=dict)
    queues: Mapping[str, QueueSpec] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()
    document: Document | None = field(default=None, repr=False, compare=False)
    """The files it was read from; None for a configuration that was built in Python."""

    def problem(self, path: toml_places.Path, message: str, *, warning: bool = False) -> Problem:
        """A problem of the key at `path`, with its place in the files."""
        if self.document is None:
            return Problem("", 0, 0, dotted(path), message, warning)
        return self.document.problem(Finding(path, message, warning))

    @cached_property
    def parents(self) -> dict[str, str]:
        """Child -> the supervisor that lists it."""
        return {child: name for name, spec in self.supervisors.items() for child in spec.children}

    @property
    def state_dir(self) -> Path:
        """The state directory of `[daemon]`, resolved."""
        return Path(self.daemon.state_dir) if self.daemon.state_dir else self.base / ".supervisor"
