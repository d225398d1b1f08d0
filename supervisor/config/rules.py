"""What is refused of one job or supervisor by itself, beyond the shapes of its keys."""

from __future__ import annotations

import re
import resource
import warnings
from collections.abc import Callable

from supervisor.config.reading import Reading, did_you_mean, quoted
from supervisor.config.shapes import table_of
from supervisor.config.toml_places import Path
from supervisor.kinds.job import JobSpec, clashes
from supervisor.probes import Ready
from supervisor.sockets import address
from supervisor.spec import NAME, Backoff, ChildSpec, Expanded, RestartType, shown

_CALLABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
RLIMITS = frozenset(name[7:].lower() for name in dir(resource) if name.startswith("RLIMIT_")) - {"ofile"}
"""The names of the limits of resources, as `ulimit` and systemd know them."""

_ENVIRONMENT_NAME = re.compile(r"[^=\0]+")


def check_name(path: Path, reading: Reading) -> None:
    """The name of a job or supervisor."""
    if not NAME.fullmatch(str(path[-1])):
        reading.fault(path, 'a name has only letters, digits, "-" and "_", and at most 64 of them')


def check_job(name: str, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    """A job; `given` are the keys that its file gives it, by itself or by `[defaults]`."""
    for rule in _JOB_RULES:
        rule(("jobs", name), spec, given, reading)


def check_child(path: Path, spec: ChildSpec, reading: Reading) -> None:
    """What jobs and supervisors have in common."""
    check_backoff((*path, "backoff"), spec.backoff, reading)


def check_backoff(path: Path, backoff: Backoff, reading: Reading) -> None:
    """Waits that shrink."""
    if backoff.max < backoff.initial and not reading.broken(path):
        reading.warn(path, f"max ({backoff.max:g} s) is shorter than initial ({backoff.initial:g} s): every wait is max")


def check_environment(path: Path, env: dict[str, str], reading: Reading) -> None:
    """Names that an environment cannot have."""
    for key in env:
        if not _ENVIRONMENT_NAME.fullmatch(key):
            reading.fault((*path, key), 'the name of an environment variable is not empty and has no "="')


def check_listen(path: Path, listen: str, reading: Reading) -> bool:
    """Whether a socket can listen there, by the look of it."""
    try:
        address(listen)
    except ValueError as error:
        reading.unexpected(path, str(error), listen)
        return False
    return True


def _what(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if {"command", "call"} <= given:
        reading.fault((*path, "call"), "exactly one of `command` and `call`, not both")
    elif not given & {"command", "call"} and not reading.broken(path):
        reading.fault(path, "what should it run? expected `command` or `call`")


def _kind(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.kind == "command" and "call" in given:
        reading.fault((*path, "kind"), 'kind "command" needs `command`, this job has `call`')
    if spec.kind in ("task", "thread") and "command" in given:
        reading.fault((*path, "kind"), f'kind "{spec.kind}" needs `call`, this job has `command`')


def _callable(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.call is None or _CALLABLE.fullmatch(spec.call):
        return
    module, dot, function = shown(spec.call).rpartition(".")
    hint = f'; did you mean "{module}:{function}"?' if dot and ":" not in spec.call else ""
    reading.fault((*path, "call"), f'expected "module:function", got {quoted(spec.call)}{hint}')


def _fitting(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    """Keys that do nothing for this job."""
    if not given & {"command", "call"}:
        return
    for name, field in table_of(JobSpec).fields.items():
        if name in given and (needed := field.extra.get("for")) and needed not in given:
            has = f", this job has `{spec.where}`" if needed != "every" else ""
            reading.fault((*path, name), f"only for a job with `{needed}`{has}")


def _trigger(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.once and spec.every is not None:
        reading.fault((*path, "every"), "either `once` or `every`, not both")


def _workers(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.workers == 1:
        return
    if not spec.service:
        key = "once" if spec.once else "every"
        reading.fault((*path, "workers"), f"only for a service: a job with `{key}` makes one run at a time")
    for keys, message in clashes(spec):
        reading.fault((*path, *keys), message)


def _restart(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.restart is None:
        return
    if spec.scheduled:
        reading.fault((*path, "restart"), "not on a job with `every`: the next run comes from the schedule: use retry")
    elif spec.once and spec.restart is RestartType.PERMANENT:
        reading.fault((*path, "restart"), 'a `once` job has an end: expected "transient" or "temporary", got "permanent"')


def _ready(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if (ready := spec.ready) is None:
        return
    path = (*path, "ready")
    probes = [probe for probe in Ready.__struct_fields__ if getattr(ready, probe) is not None]
    if len(probes) != 1:
        reading.fault(path, f"expected exactly one probe, got {' and '.join(probes) or 'none'}")
    if ready.log is not None and "call" in given:
        reading.fault((*path, "log"), "only for a job with `command`: a function says `ctx.ready()`, with { notify = true }")
    if ready.notify is not None and "command" in given:
        reading.fault((*path, "notify"), "not supported yet for a command")
    elif ready.notify is False:
        reading.unexpected((*path, "notify"), "expected true", ready.notify)
    if ready.log is not None:
        _regular_expression((*path, "log"), ready.log, reading)


def _regular_expression(path: Path, pattern: str, reading: Reading) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        why = "" if isinstance(pattern, Expanded) else f" ({error})"
        reading.unexpected(path, f"expected a regular expression{why}", pattern)


def _exit_codes(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    for index, code in enumerate(spec.success_exit_codes):
        if not 0 <= code <= 255:
            reading.unexpected((*path, "success_exit_codes", index), "expected an exit code from 0 to 255", code)


def _rlimits(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    for name in spec.rlimits:
        if name == "locks":
            reading.fault((*path, "rlimits", name), "Linux does not enforce it, and the supervisor marks its children with it")
        elif name not in RLIMITS:
            hint = did_you_mean(name, RLIMITS) or f": expected one of {', '.join(sorted(RLIMITS))}"
            reading.fault((*path, "rlimits", name), f"no such limit{hint}")


def _terminal(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.tty and "stdin" in given:
        reading.fault((*path, "stdin"), "not with `tty`: the terminal is its input")
    if spec.tty and spec.output in ("inherit", "null"):
        reading.fault((*path, "output"), f'not "{spec.output}" with `tty`: what it prints on its terminal is captured')


_JOB_RULES: tuple[Callable[[Path, JobSpec, frozenset[str], Reading], None], ...] = (
    _what,
    _kind,
    _callable,
    _fitting,
    _trigger,
    _workers,
    _restart,
    _ready,
    _exit_codes,
    _rlimits,
    _terminal,
)
