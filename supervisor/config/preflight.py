"""What a configuration needs of the machine: programs, directories, and modules that import.

Blocking: call it in a thread from Trio. Nothing of a user's code is imported here, but in a short-lived child process.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.config.reading import quoted
from supervisor.config.tables import Config
from supervisor.errors import Problem
from supervisor.kinds import inspection
from supervisor.kinds.job import JobSpec, for_worker
from supervisor.spec import shown

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

    @property
    def all_problems(self) -> list[Problem]:
        """The faults of all jobs, in the order of the file."""
        return [problem for problems in self.problems.values() for problem in problems]


def check(
    config: Config, *, imports: bool = True, environ: Mapping[str, str] | None = None, limit: float = IMPORT_LIMIT
) -> Findings:
    """Look for everything the jobs need. `imports=False` leaves Python code alone.

    Blocks: for as long as the modules take to import, and `limit` seconds for each that hangs.
    """
    environ = os.environ if environ is None else environ
    findings = Findings(warnings=[*_daemon_warnings(config)])
    program_fault = functools.cache(_program_fault)
    faults = {
        name: [*_process_faults(for_worker(spec, 0), config.base, environ, program_fault)]
        for name, spec in config.jobs.items()
        if spec.command is not None
    }
    calls = {name: spec for name, spec in config.jobs.items() if spec.call is not None}
    if imports and calls:
        for name, found in _inspect(config, calls, environ, limit).items():
            faults[name] = [(tuple(keys), message) for keys, message in found["faults"]]
            if "kind" in found:
                findings.calls[name] = Call(found["kind"], found["context"])
    for name in config.jobs:
        if faults.get(name):
            problems = [config.problem(("jobs", name, *keys), message) for keys, message in faults[name]]
            findings.problems[name] = sorted(problems, key=lambda problem: (problem.line, problem.column))
    return findings


def _daemon_warnings(config: Config) -> Iterator[Problem]:
    for index, directory in enumerate(config.daemon.path):
        if not Path(directory).is_dir():
            yield config.problem(("daemon", "path", index), f"no such directory: {_named(directory)}", warning=True)
    if (Path(__file__).parents[1] / "supervisorctl.py").exists():
        message = (
            "the package `supervisor` of another project is installed over this one: remove one, or use another environment"
        )
        yield Problem("", 0, 0, "", message, warning=True)


def _process_faults(
    spec: JobSpec, base: Path, environ: Mapping[str, str], program_fault: Callable[[str, str, str], str]
) -> Iterator[inspection.Fault]:
    cwd = spec.cwd or str(base)
    if no_cwd := _directory_fault(cwd):
        yield ("cwd",), f"{no_cwd}: {_named(cwd)}"
    program = spec.command[0] if isinstance(spec.command, tuple) else (spec.command or "").partition(" ")[0]
    if not no_cwd or program.startswith("/"):
        search = spec.env.get("PATH") or environ.get("PATH") or os.defpath
        if fault := program_fault(program, cwd, search):
            yield ("command",), fault
    if spec.output.startswith("/") and Path(spec.output).is_dir():
        yield ("output",), f"a directory, expected a file: {_named(spec.output)}"


def _named(path: str) -> str:
    """A path in a message: whole, and as the file writes it."""
    return f'"{shown(path)}"'


def _directory_fault(name: str) -> str:
    path = Path(name)
    if not path.is_dir():
        return "not a directory" if path.exists() else "no such directory"
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
    if not path.exists():
        return f"no such program: {_named(program)}" if "/" in program else None
    if path.is_dir():
        return f"a directory, expected a program: {_named(program)}"
    if not os.access(path, os.X_OK):
        return f"not executable: {_named(program)}; chmod +x makes it so"
    interpreter = _interpreter(path)
    if interpreter and not Path(interpreter).exists():
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


def _inspect(config: Config, jobs: Mapping[str, JobSpec], environ: Mapping[str, str], limit: float) -> dict[str, Any]:
    """What inspection.py says of each job. A module that hangs or ends its process costs only the jobs that name it."""
    found: dict[str, Any] = {}
    while pending := {name: spec for name, spec in jobs.items() if name not in found}:
        some, unfinished, how = _one_process(config, pending, environ, limit)
        found |= some
        lost = _module(jobs[unfinished]) if unfinished else None
        for name, spec in pending.items():
            if name not in found and (lost is None or _module(spec) == lost):
                found[name] = {"faults": [(("call",), f"{quoted(_module(spec))} {how}")]}
    return found


def _module(spec: JobSpec) -> str:
    return (spec.call or "").partition(":")[0]


def _one_process(
    config: Config, jobs: Mapping[str, JobSpec], environ: Mapping[str, str], limit: float
) -> tuple[dict[str, Any], str, str]:
    """The answers of one process; the job it did not come to an end with, if any, and what became of the process."""
    found: dict[str, Any] = {}
    unfinished, how = "", "could not be looked at"
    try:
        with _inspector(config, jobs, environ) as (process, results):
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
    config: Config, jobs: Mapping[str, JobSpec], environ: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that runs inspection.py on `jobs`, and the descriptor to read its results from. Nothing of it is left."""
    asked = [
        {
            "name": name,
            "call": spec.call,
            "kind": spec.kind,
            "args": {key: _type_name(value) for key, value in (spec.args or {}).items()},
        }
        for name, spec in jobs.items()
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
