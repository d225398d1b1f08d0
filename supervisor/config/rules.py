"""What is refused of one job or supervisor by itself, beyond the shapes of its keys."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable
from itertools import islice, pairwise
from urllib.parse import urlsplit

from supervisor.config.reading import Reading, quoted
from supervisor.config.shapes import A_CHILD, CHILD, duration, table_of
from supervisor.config.toml_places import Path
from supervisor.errors import did_you_mean
from supervisor.kinds.job import MOST_WORKERS, JobSpec, clashes
from supervisor.policies import ORDER, LimitSpec, RetrySpec
from supervisor.probes import PROBES, Probe
from supervisor.probes.spec import split_address
from supervisor.queues import QUEUES, scheme_of, shown_backend
from supervisor.queues.spec import AutoscaleSpec, QueueSpec
from supervisor.sockets import address
from supervisor.spec import NAME, Backoff, ChildSpec, Expanded, Recycle, RestartType, shown
from supervisor.triggers import Cron, Every, Rhythm, zone, zones
from supervisor.wall import WallClock

_CALLABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_EXCEPTION = re.compile(r"([^\W\d]\w*(\.[^\W\d]\w*)*:)?[^\W\d]\w*(\.[^\W\d]\w*)*")
_OWN_FAILURES = {"TimedOut", "SpawnFailed", "Rejected", "BreakerOpen", "BulkheadFull", "RateLimited"}
"""How an attempt of a command can fail besides ending badly."""

NOT_OF_A_QUEUE = {
    "restart": "the next run comes from the queue: use retry",
    "ready": "a worker is ready when it takes items",
    "health": "how an item fares is seen of the item: use timeout",
    "overlap": "each time of its schedule is an item of its own",
    "run_on_start": "each time of its schedule is one item, for all daemons; for another use submit",
}
"""Keys that a job with `queue` cannot have, and why."""

INPUT = ("stdin", "tty")
"""What a command has for an input; on a queue that is the item."""

_LONGEST_SOCKET_PATH = 107
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


def check_limit(path: Path, spec: LimitSpec, given: frozenset[str], reading: Reading) -> None:
    """A `[limits.NAME]` table."""
    if not given & {"concurrency", "rate", "breaker"} and not reading.broken(path):
        reading.fault(path, "what does it limit? expected `concurrency`, `rate` or `breaker`")
    for key, needed in (("waiting", {"concurrency"}), ("burst", {"rate"}), ("within", {"concurrency", "rate"})):
        if key in given and not given & needed:
            reading.fault((*path, key), f"only with {' or '.join(f'`{each}`' for each in sorted(needed))}")


def check_queue(path: Path, spec: QueueSpec, given: frozenset[str], reading: Reading) -> None:
    """A `[queues.NAME]` table."""
    if not _backend((*path, "backend"), spec.backend, reading):
        return
    if not spec.priorities:
        reading.fault((*path, "priorities"), "expected at least one")
    for index, name in enumerate(spec.priorities):
        if not NAME.fullmatch(name):
            reading.unexpected((*path, "priorities", index), "a name has letters, digits, - and _", name)
        elif name in spec.priorities[:index]:
            reading.fault((*path, "priorities", index), f'"{name}" is listed twice')
    if spec.fair and len(spec.priorities) == 1:
        reading.warn((*path, "fair"), "does nothing: there is only one priority")
    if "lease" in given and not scheme_of(spec.backend).shared and not isinstance(spec.backend, Expanded):
        reading.warn((*path, "lease"), f'does nothing: what is kept in "{spec.backend}" no other daemon has')


def _backend(path: Path, backend: str, reading: Reading) -> bool:
    """Whether that can be an engine, by the look of it. A password is never quoted."""
    word, colon, _ = backend.partition(":")
    if reading.broken(path):
        return False
    if word not in QUEUES:
        expected = 'expected "sqlite", "memory", or a URL such as "postgresql://user@host/database" or "redis://host:6379/0"'
        hint = did_you_mean(word, QUEUES)
    elif QUEUES[word].shared:
        expected, hint = _fault_of_url(backend), ""
    else:
        expected, hint = f'expected just "{word}"' if colon else "", ""
    if expected:
        reading.fault(path, f"{expected}, got {quoted(shown_backend(backend))}{hint}")
    return not expected


def _fault_of_url(url: str) -> str:
    """What was expected where this is no URL of a server."""
    scheme, slashes, rest = url.partition("://")
    if not set("#/").isdisjoint(rest.partition("?")[0].rpartition("@")[0]):
        return 'a "#" or "/" in a name or a password is written "%23" or "%2F"'
    scheme = scheme.partition(":")[0]
    redis = QUEUES[scheme].extra == "redis"
    if slashes and url.isprintable() and not set("# ") & set(url) and _names_a_server(url, redis and "+" not in scheme):
        return ""
    return f'expected a URL such as "{scheme}://{"host:6379/0" if redis else "user@host/database"}"'


def _names_a_server(url: str, redis: bool) -> bool:
    """Whether there is a host, or a place of another kind, in it; what follows the host of a Redis is a number."""
    try:
        parts = urlsplit(url)
        if redis:
            return bool(parts.hostname) and parts.port != 0 and (parts.path.strip("/") or "0").isdecimal()
        return bool(parts.hostname or parts.path.strip("/") or parts.query) and parts.port != 0
    except ValueError:
        return False


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
    if spec.kind not in (None, "command") and "command" in given:
        reading.fault((*path, "kind"), f'kind "{spec.kind}" needs `call`, this job has `command`')


def _call(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.call is not None:
        _callable((*path, "call"), spec.call, reading)


def _callable(path: Path, call: str, reading: Reading) -> None:
    """The function of a job, of a probe, or of a fallback."""
    if _CALLABLE.fullmatch(call):
        return
    module, dot, function = shown(call).rpartition(".")
    hint = f'; did you mean "{module}:{function}"?' if dot and ":" not in call else ""
    reading.fault(path, f'expected "module:function", got {quoted(call)}{hint}')


def _fitting(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    """Keys that do nothing for this job."""
    if not given & {"command", "call"}:
        return
    for name, field in table_of(JobSpec).fields.items():
        if name in given and field.needs and not _meets(path, spec, given, field.needs, reading):
            has = f", this job has `{spec.where}`" if field.needs == ("call",) else ""
            why = f": {field.extra['why']}" if "why" in field.extra else ""
            reading.fault((*path, name), f"only for {field.whom}{has}{why}")


def _meets(path: Path, spec: JobSpec, given: frozenset[str], needs: tuple[str, ...], reading: Reading) -> bool:
    """Whether it has one of these keys; `CHILD`: whether its runs are processes of their own, as far as can be told."""
    return _spawns(path, spec, reading) if needs == CHILD else not given.isdisjoint(needs)


def _spawns(path: Path, spec: JobSpec, reading: Reading) -> bool:
    return spec.spawns or reading.broken((*path, "kind"))


def _trigger(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    first, *more = [key for key in ("once", "every", "cron") if getattr(spec, key)] or [""]
    for key in more:
        reading.fault((*path, key), f"either `{first}` or `{key}`, not both")
    if spec.pooled and spec.once:
        reading.fault((*path, "once"), "either `queue` or `once`, not both")
    if spec.pooled and spec.every is not None:
        message = "not with `queue`: each daemon would have times of its own; `cron` makes one item at a time for all of them"
        reading.fault((*path, "every"), message)
    check_times(path, spec, reading)


def check_times(path: Path, spec: JobSpec, reading: Reading) -> None:
    """When the ticks of a schedule come: times that there are, in a time zone that there is."""
    try:
        zone(timezone := spec.timezone)
    except ValueError as error:
        reading.unexpected((*path, "timezone"), f"{error}{did_you_mean(timezone, zones())}", timezone)
        timezone = "UTC"
    now = WallClock().now()
    rhythm: Rhythm | None = None if spec.every is None else Every(spec.every, now)
    if spec.cron is not None:
        try:
            rhythm = Cron(spec.cron, timezone)
        except ValueError as error:
            reading.unexpected((*path, "cron"), str(error), spec.cron)
            return
    if rhythm is not None:
        _check_ticks(path, spec, list(islice(rhythm.ticks(now), 100 if spec.jitter else 1)), reading)


def _check_ticks(path: Path, spec: JobSpec, ticks: list[float], reading: Reading) -> None:
    if not ticks:
        reading.unexpected((*path, "cron"), "no such day in the next 50 years: expected times that come", spec.cron)
    shortest = min((later - one for one, later in pairwise(ticks)), default=math.inf)
    if spec.jitter and spec.jitter > shortest - 0.001:
        text = f"expected less than the shortest time between two runs ({duration(round(shortest, 3))})"
        reading.unexpected((*path, "jitter"), text, spec.jitter)


def _workers(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if isinstance(spec.workers, AutoscaleSpec):
        _autoscale((*path, "workers"), spec.workers, spec.pooled, reading)
    if not spec.grouped:
        return
    if spec.once:
        reading.fault((*path, "workers"), "only for a service: a job with `once` makes one run at a time")
    if spec.scheduled and not spec.overlaps:
        message = f'a job with {_times(spec)} makes one run at a time; overlap = "parallel" lets them run side by side'
        reading.fault((*path, "workers"), message)
    for keys, message in clashes(spec):
        reading.fault((*path, *keys), message)


def _autoscale(path: Path, workers: AutoscaleSpec, pooled: bool, reading: Reading) -> None:
    if not pooled:
        reading.fault(path, "only with `queue`: how much work there is, a queue can tell; expected a number")
    elif workers.max > MOST_WORKERS:
        reading.unexpected((*path, "max"), f"expected at most {MOST_WORKERS}", workers.max)
    elif workers.min > workers.max:
        reading.unexpected((*path, "min"), f"expected at most max ({workers.max})", workers.min)


def _queue(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if not spec.pooled:
        return
    for key, why in NOT_OF_A_QUEUE.items():
        if key in given and (key not in ("overlap", "run_on_start") or spec.cron is not None):  # else it is told by _fitting
            reading.fault((*path, key), f"not on a job with `queue`: {why}")
    for key in INPUT:
        if key in given and "command" in given:
            reading.fault((*path, key), "not on a job with `queue`: the item is its input")
    if spec.serialize_by == "":
        reading.unexpected((*path, "serialize_by"), "expected the name of a field", spec.serialize_by)


def _overlap(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.overlap == "parallel" and spec.scheduled and spec.workers == 1 and not reading.broken((*path, "workers")):
        reading.fault((*path, "overlap"), 'how many at once? "parallel" needs `workers`, at least 2')


def _times(spec: JobSpec) -> str:
    return "`cron`" if spec.cron is not None else "`every`"


def _restart(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.restart is None or spec.pooled:
        return
    if spec.scheduled:
        reading.fault((*path, "restart"), f"not on a job with {_times(spec)}: the next run comes from the schedule: use retry")
    elif spec.once and spec.restart is RestartType.PERMANENT:
        reading.fault((*path, "restart"), 'a `once` job has an end: expected "transient" or "temporary", got "permanent"')


def _ready(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if (ready := spec.ready) is None:
        return
    _probe((*path, "ready"), ready, reading)
    if ready.log is not None and "call" in given and not _spawns(path, spec, reading):
        message = f"only for a job with {A_CHILD}: a function says `ctx.ready()`, with {{ notify = true }}"
        reading.fault((*path, "ready", "log"), message)
    if ready.log is not None:
        _regular_expression((*path, "ready", "log"), ready.log, reading)


def _health(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.health is not None:
        _probe((*path, "health"), spec.health, reading)


def _probe(path: Path, probe: Probe, reading: Reading) -> None:
    """What the probes of `ready` and `health` have in common."""
    given = [name for name in PROBES if getattr(probe, name, None) is not None]
    if len(given) != 1:
        reading.fault(path, f"expected exactly one probe, got {' and '.join(given) or 'none'}")
    if probe.status is not None and given and probe.http is None:
        reading.fault((*path, "status"), "only with `http`")
    if probe.notify is False:
        reading.unexpected((*path, "notify"), "expected true", probe.notify)
    if probe.http is not None and not _is_url(probe.http):
        reading.unexpected((*path, "http"), 'expected a URL such as "http://127.0.0.1:8080/health"', probe.http)
    if probe.tcp is not None and not _is_address(probe.tcp):
        reading.unexpected((*path, "tcp"), 'expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080"', probe.tcp)
    if probe.unix is not None and len(os.fsencode(probe.unix)) > _LONGEST_SOCKET_PATH:
        reading.fault((*path, "unix"), f"the path of a socket has at most {_LONGEST_SOCKET_PATH} bytes, with its directory")
    if probe.call is not None:
        _callable((*path, "call"), probe.call, reading)


def _is_url(url: str) -> bool:
    """Whether it can be asked for as it stands: no name and password in it, no fragment, nothing that needs quoting."""
    try:
        parts = urlsplit(url)
        plain = url.isascii() and url.isprintable() and not set(url) & set(" #")
        return (
            plain and parts.scheme in ("http", "https") and "@" not in parts.netloc and bool(parts.hostname) and parts.port != 0
        )
    except ValueError:
        return False


def _is_address(address: str) -> bool:
    try:
        return split_address(address) is not None
    except ValueError:
        return False


def _regular_expression(path: Path, pattern: str, reading: Reading) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        why = "" if isinstance(pattern, Expanded) else f" ({error})"
        reading.unexpected(path, f"expected a regular expression{why}", pattern)


def _policies(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.service:
        unknown = any(reading.broken((*path, key)) for key in ("once", "every", "cron"))  # what kind of job it was meant to be
        for name in () if unknown else sorted(given & {*ORDER}):
            reading.fault((*path, name), table_of(JobSpec).fields[name].extra["ends"])
        return
    if spec.timeout is not None and spec.deadline is not None and spec.timeout > spec.deadline:
        message = f"longer than the deadline of the whole run ({spec.deadline:g} s): it is never reached"
        reading.warn((*path, "timeout"), message)
    if spec.retry is not None:
        _retry((*path, "retry"), spec.retry, "command" in given, reading)
    if spec.fallback is not None:
        _callable((*path, "fallback"), spec.fallback, reading)


def _retry(path: Path, retry: RetrySpec, command: bool, reading: Reading) -> None:
    if retry.max < retry.initial:
        message = f"max ({retry.max:g} s) is shorter than initial ({retry.initial:g} s): it is the longest wait"
        reading.warn((*path, "max"), message)
    for key, names in (("on", retry.on), ("give_up_on", retry.give_up_on)):
        for index, name in enumerate(names):
            if expected := _no_failure(name, command):
                reading.unexpected((*path, key, index), expected, name)


def _no_failure(name: str, command: bool) -> str:
    """What was expected where this is not the name of a failure that such a job can have; empty where it is one."""
    if name.isdecimal() or name.startswith("SIG"):
        if not command:
            return "expected an exception: exit codes and signals are a command's"
        known = int(name) <= 255 if name.isdecimal() else name in signal.Signals.__members__
        return "" if known else 'expected an exit code from 0 to 255, or a signal such as "SIGKILL"'
    if command:
        return "" if name in _OWN_FAILURES else f"expected an exit code, a signal, or one of {', '.join(sorted(_OWN_FAILURES))}"
    return "" if _EXCEPTION.fullmatch(name) else 'expected an exception such as "ConnectionError" or "httpx:TransportError"'


def _watch(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.watch and (spec.scheduled or (spec.pooled and "command" in given)):
        when = "`queue` and `command`" if spec.pooled else _times(spec)
        reading.fault((*path, "watch"), f"not on a job with {when}: each of its runs starts anew anyway")


def _recycle(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if (recycle := spec.recycle) is None:
        return
    path = (*path, "recycle")
    if not spec.service and not spec.pooled:
        reading.fault(path, "only for a service or a queue: a run of this job ends by itself")
    if recycle.runs is not None and not spec.pooled:
        reading.fault((*path, "runs"), "only for a job with `queue`: a service has one run")
    if recycle == Recycle():
        reading.fault(path, "expected `age`, `memory` or both" + (", or `runs`" if spec.pooled else ""))
    if recycle.memory is not None and "call" in given and not _spawns(path[:-1], spec, reading):
        reading.fault((*path, "memory"), f"only for a job with {A_CHILD}: the memory of other functions is the daemon's")


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
    if spec.tty and spec.into is not None and not spec.pooled:
        reading.fault((*path, "into"), "not with `tty`: a terminal mixes what is printed with what is typed")
    if spec.tty and spec.output in ("inherit", "null"):
        reading.fault((*path, "output"), f'not "{spec.output}" with `tty`: what it prints on its terminal is captured')


def _output(path: Path, spec: JobSpec, given: frozenset[str], reading: Reading) -> None:
    if spec.parse == "json" and spec.output in ("inherit", "null"):
        reading.warn((*path, "parse"), f'does nothing: with output = "{spec.output}" the daemon does not see the output')


_JOB_RULES: tuple[Callable[[Path, JobSpec, frozenset[str], Reading], None], ...] = (
    _what,
    _kind,
    _call,
    _fitting,
    _trigger,
    _queue,
    _workers,
    _overlap,
    _restart,
    _ready,
    _health,
    _policies,
    _watch,
    _recycle,
    _exit_codes,
    _rlimits,
    _terminal,
    _output,
)
