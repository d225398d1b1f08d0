"""TOML text -> Config, with every fault and its place."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from supervisor.config import later, relations, rules, toml_places
from supervisor.config.document import Document, Source, open_document
from supervisor.config.reading import BAD, Reading
from supervisor.config.shapes import CHILD, table, table_of
from supervisor.config.tables import TABLES, Config, DaemonSpec, LogSpec
from supervisor.errors import Problem, SpecError, did_you_mean
from supervisor.kinds.job import JobSpec
from supervisor.policies import ORDER, LimitSpec
from supervisor.probes import PROBES, Probe
from supervisor.queues.spec import QueueSpec
from supervisor.sockets import SocketSpec
from supervisor.spec import Expanded, Paths, Strategy, SupervisorSpec, shown

OUTPUTS = ("capture", "journal", "inherit", "null")
INPUTS = ("null", "pipe")


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Read a TOML file and those it includes.

    Raises SpecError with every fault that can be seen without looking at anything but these files. Warnings are in
    `Config.warnings`. `environ` is what `${NAME}` reads.
    """
    reading = Reading(environ)
    document = open_document(Path(path), reading)
    if not document.tables and document.problems:
        raise SpecError(document.problems)
    return _Loader(document, reading).config(Path(path).absolute())


def from_mapping(mapping: Mapping[str, Any], base: Path, environ: Mapping[str, str]) -> Config:
    """The same for a dict, as the library is given it. Relative paths start from `base`. Raises SpecError."""
    document = Document(Source("", Path(base).absolute()))
    document.add(document.main, mapping)
    return _Loader(document, Reading(environ)).config(None)


def check(config: Config) -> None:
    """What must be true of jobs and supervisors together, for a configuration that was built of specs in Python.

    Raises SpecError. One that was read is in order.
    """
    if config.document is not None:
        return
    reading, daemon = Reading({}), config.daemon
    for name, queue in config.queues.items():
        rules.check_queue(("queues", name), queue, frozenset(), reading)
    relations.check(
        relations.Tree(
            jobs=config.jobs,
            supervisors=config.supervisors,
            limits=config.limits,
            queues=config.queues,
            reading=reading,
            auto_shutdown=daemon.auto_shutdown,
            intensity=daemon.intensity,
            period=daemon.period,
            grace=daemon.grace,
        )
    )
    for name, spec in config.jobs.items():
        rules.check_times(("jobs", name), spec, reading)
    if faults := [config.problem(each.path, each.message) for each in reading.findings if not each.warning]:
        raise SpecError(faults)


class _Loader:
    """One reading of a document."""

    def __init__(self, document: Document, reading: Reading) -> None:
        self._document = document
        self._reading = reading

    def config(self, file: Path | None) -> Config:
        self._tables()
        daemon, log = self._daemon(), self._log()
        sockets = self._sockets()
        limits = self._limits()
        queues = self._queues()
        supervisors = self._supervisors()
        jobs = self._jobs(supervisors)
        if self._document.complete:
            relations.check(
                relations.Tree(
                    jobs=jobs,
                    supervisors=supervisors,
                    sockets=sockets,
                    limits=limits,
                    queues=queues,
                    reading=self._reading,
                    where=self._document.where,
                    auto_shutdown=daemon.auto_shutdown,
                    intensity=daemon.intensity,
                    period=daemon.period,
                    grace=daemon.grace,
                )
            )
        faults, warnings = self._problems()
        if faults:
            raise SpecError(faults)
        base = self._document.main.base
        return Config(
            file,
            base,
            daemon,
            log,
            jobs,
            supervisors,
            sockets,
            limits,
            queues,
            tuple(warnings),
            self._document if file else None,
        )

    def _problems(self) -> tuple[list[Problem], list[Problem]]:
        found = [self._document.problem(finding) for finding in self._reading.findings]
        ordered = self._document.in_order([*self._document.problems, *found])
        return [each for each in ordered if not each.warning], [each for each in ordered if each.warning]

    def _tables(self) -> None:
        for name, content in self._document.tables.items():
            if name in later.TABLES:
                self._reading.fault((name,), "not supported yet")
            elif name not in TABLES:
                self._reading.fault((str(name),), f"unknown table{did_you_mean(str(name), TABLES)}")
            else:
                table(content, (name,), self._reading)

    def _table(self, name: str) -> Mapping[str, Any]:
        content = self._document.tables.get(name, {})
        return content if isinstance(content, Mapping) and not self._reading.broken((name,)) else {}

    def _daemon(self) -> DaemonSpec:
        fields = table_of(DaemonSpec).read_fields(self._table("daemon"), ("daemon",), self._reading)
        rules.check_environment(("daemon", "env"), fields.get("env", {}), self._reading)
        if "env_file" in fields:
            fields["env_file"] = self._env_files(("daemon", "env_file"), fields["env_file"])
        for key in ("state_dir", "socket"):
            if key in fields:
                fields[key] = self._rooted(("daemon", key), fields[key])
        if "path" in fields:
            fields["path"] = tuple(self._rooted(("daemon", "path", at), each) for at, each in enumerate(fields["path"]))
        if state_directory := self._reading.environ.get("STATE_DIRECTORY"):
            fields.setdefault("state_dir", state_directory.split(":")[0])
        return DaemonSpec(**fields)

    def _log(self) -> LogSpec:
        fields = table_of(LogSpec).read_fields(self._table("log"), ("log",), self._reading)
        if "file" in fields:
            fields["file"] = self._rooted(("log", "file"), fields["file"])
        return LogSpec(**fields)

    def _sockets(self) -> dict[str, SocketSpec]:
        sockets = {}
        for name, content in self._table("sockets").items():
            path = ("sockets", name)
            rules.check_name(path, self._reading)
            spec = table_of(SocketSpec).read(content, path, self._reading)
            if spec is BAD:
                spec = SocketSpec(listen="*:0")  # so that who names it has no fault of that
            elif rules.check_listen((*path, "listen"), spec.listen, self._reading) and "/" in spec.listen:
                spec = msgspec.structs.replace(spec, listen=self._rooted((*path, "listen"), spec.listen))
            sockets[name] = spec
        return sockets

    def _limits(self) -> dict[str, LimitSpec]:
        limits = {}
        for name, content in self._table("limits").items():
            path = ("limits", name)
            rules.check_name(path, self._reading)
            fields = table_of(LimitSpec).read_fields(content, path, self._reading)
            if fields is not BAD:
                rules.check_limit(path, LimitSpec(**fields), frozenset(content), self._reading)
            limits[name] = LimitSpec() if fields is BAD else LimitSpec(**fields)
        return limits

    def _queues(self) -> dict[str, QueueSpec]:
        queues = {}
        for name, content in self._table("queues").items():
            path = ("queues", name)
            rules.check_name(path, self._reading)
            fields = table_of(QueueSpec).read_fields(content, path, self._reading)
            queues[name] = spec = QueueSpec(**({} if fields is BAD else fields))
            if fields is not BAD:
                rules.check_queue(path, spec, frozenset(content), self._reading)
        return queues

    def _supervisors(self) -> dict[str, SupervisorSpec]:
        supervisors = {}
        for name, content in self._table("supervisors").items():
            path = ("supervisors", name)
            rules.check_name(path, self._reading)
            fields = table_of(SupervisorSpec).read_fields(content, path, self._reading)
            supervisors[name] = spec = SupervisorSpec(**({} if fields is BAD else fields))
            rules.check_child(path, spec, self._reading)
        return supervisors

    def _jobs(self, supervisors: Mapping[str, SupervisorSpec]) -> dict[str, JobSpec]:
        defaults = self._defaults()
        strategies = {child: spec.strategy for spec in supervisors.values() for child in spec.children}
        return {
            name: self._job(name, own, inherited(name, own, defaults, strategies.get(name)) if defaults else own)
            for name, own in self._table("jobs").items()
        }

    def _defaults(self) -> dict[str, Any]:
        """`[defaults]`, read once by itself for its faults; what is in order is then read again as part of each job."""
        content = self._table("defaults")
        table_of(JobSpec).read_fields(content, ("defaults",), self._reading)
        return {key: value for key, value in content.items() if not self._reading.broken(("defaults", key))}

    def _job(self, name: str, own: Any, content: Any) -> JobSpec:
        path = ("jobs", name)
        rules.check_name(path, self._reading)
        fields = table_of(JobSpec).read_fields(content, path, self._reading)
        if fields is BAD:
            return JobSpec()
        given = frozenset(content)
        if "command" in given or fields.get("kind") == "process":
            self._process(path, own, fields)
        for key in ("ready", "health"):
            if key in fields:
                fields[key] = self._probe((*path, key), fields[key], key in own)
        spec = JobSpec(**fields)
        rules.check_child(path, spec, self._reading)
        rules.check_job(name, spec, given, self._reading)
        return spec

    def _probe(self, path: toml_places.Path, probe: Probe, own: bool) -> Probe:
        """A probe with absolute paths."""
        paths = {key: getattr(probe, key) for key in ("file", "unix")}
        rooted = {key: self._rooted((*path, key), each, own) for key, each in paths.items() if each is not None}
        return msgspec.structs.replace(probe, **rooted) if rooted else probe

    def _process(self, path: toml_places.Path, own: Any, fields: dict[str, Any]) -> None:
        """Paths of a child process are absolute."""
        if "env" in fields:
            rules.check_environment((*path, "env"), fields["env"], self._reading)
        if "env_file" in fields:
            fields["env_file"] = self._env_files((*path, "env_file"), fields["env_file"], "env_file" in own)
        if "cwd" in fields:
            fields["cwd"] = self._rooted((*path, "cwd"), fields["cwd"], "cwd" in own)
        if "watch" in fields:
            fields["watch"] = tuple(
                self._rooted((*path, "watch", at), each, "watch" in own, is_glob=True)
                for at, each in enumerate(fields["watch"])
            )
        if (stdin := fields.get("stdin")) is not None and stdin not in INPUTS:
            if "/" not in stdin and (hint := did_you_mean(stdin, INPUTS)):
                self._reading.warn((*path, "stdin"), f"a file of that name{hint}")
            fields["stdin"] = self._rooted((*path, "stdin"), stdin, "stdin" in own)
        if (output := fields.get("output")) is not None and output not in OUTPUTS:
            if "/" not in output and (hint := did_you_mean(output, OUTPUTS)):
                self._reading.warn((*path, "output"), f"a file of that name{hint}")
            fields["output"] = self._rooted((*path, "output"), output, "output" in own)

    def _env_files(self, path: toml_places.Path, files: Paths, own: bool = True) -> Paths:
        return Paths(self._env_file(path, file, own) for file in files)

    def _env_file(self, path: toml_places.Path, file: str, own: bool) -> str:
        """The same behind the "-" that lets it be missing."""
        if not file.startswith("-"):
            return self._rooted(path, file, own)
        bare = Expanded(file[1:], shown(file).removeprefix("-")) if isinstance(file, Expanded) else file[1:]
        rooted = self._rooted(path, bare, own)
        return Expanded(f"-{rooted}", f"-{shown(rooted)}") if isinstance(rooted, Expanded) else f"-{rooted}"

    def _rooted(self, path: toml_places.Path, value: str, own: bool = True, is_glob: bool = False) -> str:
        """A path or glob of the file made absolute: it belongs to the file that it stands in."""
        if value.startswith("~"):
            self._reading.warn(path, '"~" is not expanded: there is no shell here; write "${HOME}"')
        table, key = path[:2] if own else ("defaults", path[2])
        base = self._document.origin(str(table), str(key)).base
        absolute = str((Path(glob.escape(str(base))) if is_glob else base) / value)
        return Expanded(absolute, shown(value)) if isinstance(value, Expanded) else absolute


def inherited(name: str, own: Any, defaults: Mapping[str, Any], strategy: Strategy | None) -> Any:
    """A job's table with what applies to it of `[defaults]`. Tables merge key by key, but of probes one's own alone counts."""
    if not isinstance(own, Mapping):
        return own
    merged = dict(own)
    for key, value in defaults.items():
        if key not in own and _applies(key, value, own, defaults, strategy, name):
            merged[key] = value
        elif isinstance(value, Mapping) and isinstance(own.get(key), Mapping):
            replaced = key in ("ready", "health") and _asks(own[key])
            merged[key] = {**(_settings(value) if replaced else value), **own[key]}
    return merged


def _applies(
    key: str, value: Any, own: Mapping[str, Any], defaults: Mapping[str, Any], strategy: Strategy | None, name: str
) -> bool:
    """Whether a default makes sense for a job; one that does not is passed over."""
    field = table_of(JobSpec).fields[key]
    spawns = "command" in own or own.get("kind", defaults.get("kind")) == "process"
    once = bool(own.get("once"))
    pooled = "queue" in own or (not once and not own.keys() & {"every", "cron"} and "queue" in defaults)
    if (field.needs == ("call",) and "call" not in own) or (field.needs == CHILD and not spawns):
        return False
    if (field.needs == ("queue",) and not pooled) or (pooled and key in (*rules.NOT_OF_A_QUEUE, *rules.INPUT)):
        return False
    times = () if once else own.keys() & {"every", "cron"} or (() if pooled else defaults.keys() & {"every", "cron"})
    scheduled = bool(times)
    match key:
        case "command" | "call":
            return "command" not in own and "call" not in own
        case "kind":
            return (value == "command") is ("command" in own)
        case "restart":
            return not scheduled and not (once and value == "permanent")
        case "once" | "every" | "cron" | "queue":
            return not once and not own.keys() & {"every", "cron", "queue"} and (key == "queue") is pooled
        case "run_on_start" | "jitter" | "catch_up":
            return scheduled
        case "overlap":
            return scheduled and (value != "parallel" or "workers" in own)
        case "timezone":
            return "cron" in times
        case _ if key in ORDER:
            return once or scheduled or pooled
        case "workers":
            several = not once and (not scheduled or own.get("overlap") == "parallel")
            return pooled or (several and not isinstance(value, Mapping))
        case "watch":
            return not scheduled and (not pooled or "command" not in own)
        case "recycle":
            parts = set(value) if isinstance(value, Mapping) else set()
            return pooled or (not once and not scheduled and "runs" not in parts and (spawns or "memory" not in parts))
        case "give_up":
            return strategy in (None, Strategy.ONE_FOR_ONE)
        case "ready":
            return not isinstance(value, Mapping) or spawns or "log" not in value
        case "health":
            return not isinstance(value, Mapping) or _asks(value)
        case "after":
            return name not in value
    return True


def _asks(table: Mapping[str, Any]) -> bool:
    """Whether there is a probe in a table of `ready` or `health`."""
    return not table.keys().isdisjoint(PROBES)


def _settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """What such a table says besides its probe."""
    return {key: value for key, value in table.items() if key not in (*PROBES, "status")}
