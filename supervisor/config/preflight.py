"""What a configuration needs of the machine: programs, directories, and modules that import.

Blocking: call it in a thread from Trio. Nothing of a user's code is imported here, but in a short-lived child process.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from supervisor.accounts import gid_of, identity_of, user_of
from supervisor.config.reading import quoted
from supervisor.config.tables import Config
from supervisor.errors import Problem, SpawnFailed
from supervisor.kinds import KINDS, inspection
from supervisor.kinds.environment import environment, read
from supervisor.kinds.job import JobSpec, for_worker
from supervisor.output import journal
from supervisor.probes import Probe
from supervisor.queues import scheme_of
from supervisor.spec import UNLIMITED, shown
from supervisor.watching import Glob

IMPORT_LIMIT = 10.0
"""Seconds that one module may take to import."""


@dataclass(frozen=True)
class Call:
    """What the inspection learned of a job's function: its kind (`task` or `thread`), and who gets the Context."""

    kind: str
    context: str | None


@dataclass(frozen=True)
class Findings:
    """Faults of the environment by job (only jobs that have some), and what was learned of the functions."""

    problems: dict[str, list[Problem]] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    warnings: list[Problem] = field(default_factory=list)
    shared: list[Problem] = field(default_factory=list)
    """Faults of what several jobs use: the environment files of `[daemon]`, the owners of sockets, the engines of queues."""

    @property
    def all_problems(self) -> list[Problem]:
        """The faults that are shared, and those of all jobs, in the order of the file."""
        return [*self.shared, *(problem for problems in self.problems.values() for problem in problems)]


def check(
    config: Config, *, imports: bool = True, environ: Mapping[str, str] | None = None, limit: float = IMPORT_LIMIT
) -> Findings:
    """Look for everything the jobs need. `imports=False` leaves Python code alone.

    Blocks: for as long as the modules take to import, and `limit` seconds for each that hangs.
    """
    environ = os.environ if environ is None else environ
    findings = Findings(shared=[*_shared_faults(config)], warnings=[*_daemon_warnings(config)])
    program_fault = functools.cache(_program_fault)
    jobs = {name: for_worker(spec, 0) for name, spec in config.jobs.items()}
    faults = {name: [*_process_faults(spec, config, environ, program_fault)] for name, spec in jobs.items()}
    calls = {key: function for name, spec in jobs.items() for key, function in _functions(name, spec)}
    if imports and calls:
        for key, found in _inspect(config, calls, environ, limit).items():
            name, _, other = key.partition(".")
            faults[name] += [(_place(other, keys), message) for keys, message in found["faults"]]
            if "kind" in found and not other:
                findings.calls[name] = Call(found["kind"], found["context"])
    findings.warnings.extend(_watch_warnings(config))
    findings.warnings.extend(_room_warnings(config, findings.calls))
    for name in config.jobs:
        if faults.get(name):
            problems = [config.problem(("jobs", name, *keys), message) for keys, message in faults[name]]
            findings.problems[name] = sorted(problems, key=lambda problem: (problem.line, problem.column))
    return findings


def _place(other: str, keys: Sequence[str | int]) -> tuple[str | int, ...]:
    """The key of a fault of a job's function, or of another that the job names: a probe's, its fallback."""
    return tuple(keys) if not other else (other,) if other == "fallback" else (other, "call")


def _daemon_warnings(config: Config) -> Iterator[Problem]:
    for index, directory in enumerate(config.daemon.path):
        if not Path(directory).is_dir():
            yield config.problem(("daemon", "path", index), f"no such directory: {_named(directory)}", warning=True)
    if (Path(__file__).parents[1] / "supervisorctl.py").exists():
        message = (
            "the package `supervisor` of another project is installed over this one: remove one, or use another environment"
        )
        yield Problem("", 0, 0, "", message, warning=True)


def _watch_warnings(config: Config) -> Iterator[Problem]:
    for name, spec in config.jobs.items():
        for index, pattern in enumerate(spec.watch):
            if not Path(Glob(pattern).root).is_dir():
                message = "begins in a directory that is not there; nothing is watched until it is"
                yield config.problem(("jobs", name, "watch", index), message, warning=True)


def _room_warnings(config: Config, calls: Mapping[str, Call]) -> Iterator[Problem]:
    """Services that hold all the room there is, so that somebody waits for ever."""
    for key, takes, limit in (("threads", "thread", config.daemon.threads), ("processes", "process", config.daemon.processes)):
        services = {
            name: spec.first_workers
            for name, spec in config.jobs.items()
            if (spec.service or spec.pooled) and spec.start == "auto" and _takes(spec, calls.get(name)) == takes
        }
        if limit is not None and (needed := sum(services.values())) > limit:
            each = " + ".join(f"{name} ({workers})" if workers > 1 else name for name, workers in services.items())
            message = f"{each} need {needed} for as long as they run, this allows {limit}: {needed - limit} will wait"
            yield config.problem(("daemon", key), message, warning=True)


def _takes(spec: JobSpec, call: Call | None) -> str | None:
    kind = spec.kind or (call.kind if call is not None else None)
    return KINDS[kind].takes if kind is not None else None


def _shared_faults(config: Config) -> Iterator[Problem]:
    for fault in filter(None, (_file_refusal(path) for path in config.daemon.env_file)):
        yield config.problem(("daemon", "env_file"), fault)
    for name, spec in config.sockets.items():
        for keys, fault in _account_faults(spec.user, spec.group):
            yield config.problem(("sockets", name, *keys), fault)
    for name, queue in config.queues.items():
        scheme = scheme_of(queue.backend)
        if lacks := scheme.missing:
            message = f"its client is not installed: pip install '{lacks}'"
            yield config.problem(("queues", name, "backend"), message)
        elif refusal := scheme.refusal(queue.backend):
            yield config.problem(("queues", name, "backend"), refusal)


def _refusal(act: Callable[..., object], *args: Any) -> str:
    """What `act` says would keep a run from being started; empty where nothing does."""
    try:
        act(*args)
    except SpawnFailed as error:
        return str(error)
    return ""


def _file_refusal(path: str) -> str:
    return _refusal(read, path).removeprefix("env_file ")


def _process_faults(
    spec: JobSpec, config: Config, environ: Mapping[str, str], program_fault: Callable[[str, str, str], str]
) -> Iterator[inspection.Fault]:
    programs = [*_programs(spec)]
    if not programs and not spec.spawns:
        return
    cwd = spec.cwd or str(config.base)
    if no_cwd := _directory_fault(cwd):
        yield ("cwd",), f"{no_cwd}: {_named(cwd)}"
    unknown = [*_account_faults(spec.user, spec.group, spec.groups)]
    unknown += [(("env_file",), fault) for path in spec.env_file if (fault := _file_refusal(path))]
    yield from unknown
    if not unknown:
        search = _environment(spec, config, environ).get("PATH") or os.defpath
        for keys, program in programs:
            if program and (not no_cwd or program.startswith("/")) and (fault := program_fault(program, cwd, search)):
                yield keys, fault
        yield from _privilege_faults(spec)
    if spec.output.startswith("/") and _there(Path(spec.output)) and Path(spec.output).is_dir():
        yield ("output",), f"a directory, expected a file: {_named(spec.output)}"
    if spec.output == "journal" and (no_journal := journal.missing()):
        yield ("output",), f'{no_journal}; "capture" keeps the output in a file'
    if spec.stdin.startswith("/") and (fault := _input_fault(Path(spec.stdin))):
        yield ("stdin",), f"{fault}: {_named(spec.stdin)}"


def _programs(spec: JobSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """The programs that a job runs, each with its key."""
    commands: dict[tuple[str, ...], str | tuple[str, ...] | None]
    commands = {("command",): spec.command, ("stop_command",): spec.stop_command}
    commands |= {(key, "exec"): probe.exec for key, probe in _probes(spec)}
    for keys, command in commands.items():
        if command is not None:
            yield keys, command[0] if isinstance(command, tuple) else command.partition(" ")[0]


def _probes(spec: JobSpec) -> Iterator[tuple[str, Probe]]:
    for key, probe in (("ready", spec.ready), ("health", spec.health)):
        if probe is not None:
            yield key, probe


def _environment(spec: JobSpec, config: Config, environ: Mapping[str, str]) -> Mapping[str, str]:
    """The child's; without the files of `[daemon]` that have faults of their own."""
    return environment(spec, environ, config.daemon.env, [path for path in config.daemon.env_file if not _refusal(read, path)])


def _account_faults(user: str | None, group: str | None, groups: tuple[str, ...] = ()) -> Iterator[inspection.Fault]:
    """Users and groups that are not there."""
    if user is not None and (fault := _refusal(user_of, user)):
        yield ("user",), fault
    if group is not None and (fault := _refusal(gid_of, group)):
        yield ("group",), fault
    for index, each in enumerate(groups):
        if fault := _refusal(gid_of, each):
            yield ("groups", index), fault


def _input_fault(path: Path) -> str:
    if not _there(path):
        return "no such file"
    if path.is_dir():
        return "a directory, expected a file"
    return "" if os.access(path, os.R_OK) else "cannot be read"


def _privilege_faults(spec: JobSpec) -> Iterator[inspection.Fault]:
    """What only root may do, where we are not."""
    if fault := _refusal(identity_of, spec.user, spec.group, spec.groups):
        yield next((key,) for key in ("user", "group", "groups") if getattr(spec, key)), fault
    if os.geteuid() == 0:
        return
    if spec.nice is not None and spec.nice < min(os.nice(0), 20 - resource.getrlimit(resource.RLIMIT_NICE)[0]):
        yield ("nice",), f"only root may put a job before others, got {spec.nice}"
    for name, (_, hard) in spec.rlimits.items():
        ours = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        if ours != UNLIMITED and (hard > ours or hard == UNLIMITED):
            yield ("rlimits", name), f"only root may raise the hard limit above {ours}"


def _there(path: Path) -> bool:
    """Whether it is there, as far as we may look."""
    return os.access(path, os.F_OK)


def _named(path: str) -> str:
    """A path in a message: whole, and as the file writes it."""
    return f'"{shown(path)}"'


def _directory_fault(name: str) -> str:
    path = Path(name)
    if not _there(path):
        return "no such directory"
    if not path.is_dir():
        return "not a directory"
    return "" if os.access(path, os.X_OK) else "a directory that cannot be entered"


def _program_fault(program: str, cwd: str, search: str) -> str:
    """Why a program cannot be run, or nothing. Looked up as exec will: with a slash from `cwd`, else in `search`."""
    if "/" in program:
        return _file_fault(Path(cwd, program), program) or ""
    faults = [_file_fault(Path(cwd, directory, program), program) for directory in search.split(os.pathsep)]
    if "" in faults:
        return ""
    return next((fault for fault in faults if fault), f"no program {_named(program)} in the job's PATH")


def _file_fault(path: Path, program: str) -> str | None:
    """Why a file cannot be run: nothing when it can, None when it is not there."""
    if not _there(path):
        return f"no such program: {_named(program)}" if "/" in program else None
    if path.is_dir():
        return f"a directory, expected a program: {_named(program)}"
    if not os.access(path, os.X_OK):
        return f"not executable: {_named(program)}; chmod +x makes it so"
    interpreter = _interpreter(path)
    if interpreter and not _there(Path(interpreter)):
        return f"{_named(program)} wants an interpreter that is not there: {_named(interpreter)}"
    return ""


def _interpreter(path: Path) -> str:
    """What a script names after `#!`."""
    try:
        with path.open("rb") as file:
            line = file.readline(256)
    except OSError:
        return ""
    words = line[2:].split(maxsplit=1)
    return os.fsdecode(words[0]) if line.startswith(b"#!") and words else ""


class _Function(NamedTuple):
    """A function to be inspected, and how it is to be called."""

    call: str
    kind: str | None = None
    args: Mapping[str, Any] = MappingProxyType({})
    offered: bool = False
    into: bool = False
    gets: Literal["", "item", "batch"] = ""

    @property
    def module(self) -> str:
        return self.call.partition(":")[0]


def _functions(name: str, spec: JobSpec) -> Iterator[tuple[str, _Function]]:
    """The functions that a job names, its own under the job's name, others under `name.ready` and so on."""
    if spec.call is not None:
        gets: Literal["", "item", "batch"] = "" if not spec.pooled else "item" if spec.batch is None else "batch"
        yield name, _Function(spec.call, spec.kind, (not spec.ticks and spec.args) or {}, gets=gets, into=spec.into is not None)
    for key, probe in _probes(spec):
        if probe.call is not None:
            yield f"{name}.{key}", _Function(probe.call)
    if spec.fallback is not None:
        known = {"failure": Exception(), "item": None} if spec.pooled else {"failure": Exception()}
        yield f"{name}.fallback", _Function(spec.fallback, args={**(spec.args or {}), **known}, offered=True)


def _inspect(config: Config, functions: Mapping[str, _Function], environ: Mapping[str, str], limit: float) -> dict[str, Any]:
    """What inspection.py says of each. A module that hangs or ends its process costs only the jobs that name it."""
    found: dict[str, Any] = {}
    while pending := {name: function for name, function in functions.items() if name not in found}:
        some, unfinished, how = _one_process(config, pending, environ, limit)
        found |= some
        lost = functions[unfinished].module if unfinished else None
        for name, function in pending.items():
            if name not in found and (lost is None or function.module == lost):
                found[name] = {"faults": [(("call",), f"{quoted(function.module)} {how}")]}
    return found


def _one_process(
    config: Config, functions: Mapping[str, _Function], environ: Mapping[str, str], limit: float
) -> tuple[dict[str, Any], str, str]:
    """The answers of one process; the function it did not come to an end with, if any, and what became of the process."""
    found: dict[str, Any] = {}
    unfinished, how = "", "could not be looked at"
    try:
        with _inspector(config, functions, environ) as (process, results):
            for message in _messages(results, limit):
                unfinished = message.get("begin", "")
                if "end" in message:
                    found[message["end"]] = message
            how = f"ended the process that imported it ({_ended(process.wait(limit))})"
    except (TimeoutError, subprocess.TimeoutExpired):
        how = f"did not import within {limit:g} s"
    except OSError as error:
        how = f"could not be looked at: {(error.strerror or str(error)).lower()}"
    return found, unfinished, how


@contextmanager
def _inspector(
    config: Config, functions: Mapping[str, _Function], environ: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that runs inspection.py on these, and the descriptor to read its results from. Nothing of it is left."""
    asked = [
        {
            "name": name,
            "call": function.call,
            "kind": function.kind,
            "args": {key: _type_name(value) for key, value in function.args.items()},
            "offered": function.offered,
            "into": function.into,
            "gets": function.gets,
        }
        for name, function in functions.items()
    ]
    results, results_of_child = os.pipe()
    with os.fdopen(results, "rb", buffering=0), tempfile.TemporaryFile("w+") as request:
        json.dump({"path": [str(config.base), *config.daemon.path, *sys.path], "jobs": asked}, request)
        request.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", inspection.__file__, str(results_of_child)],
                stdin=request,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(results_of_child,),
                cwd=config.base,
                env=environ,
                start_new_session=True,
            )
        finally:
            os.close(results_of_child)
        try:
            yield process, results
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _type_name(value: Any) -> str:
    return "str" if isinstance(value, str) else type(value).__name__


def _messages(results: int, limit: float) -> Iterator[dict[str, Any]]:
    """The JSON lines of a pipe, to its end. TimeoutError when the next one takes longer than `limit`."""
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(results, selectors.EVENT_READ)
        deadline = time.monotonic() + limit
        while selector.select(max(0.0, deadline - time.monotonic())):
            if not (chunk := os.read(results, 1 << 16)):
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)
                deadline = time.monotonic() + limit
    raise TimeoutError


def _ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
