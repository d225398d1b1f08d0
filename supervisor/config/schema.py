"""What is told of the file to its author: a JSON Schema for editors, the explanation of a key, and a file to start with.

All of it derives from the specs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from supervisor.config import later
from supervisor.config.shapes import Field, Shape, Table, Word, table_of, written
from supervisor.config.tables import NAMED, TABLES, DaemonSpec, LogSpec
from supervisor.errors import did_you_mean
from supervisor.kinds.job import JobSpec
from supervisor.policies import LimitSpec
from supervisor.queues.spec import QueueSpec
from supervisor.sockets import SocketSpec
from supervisor.spec import SupervisorSpec

_SPECS: dict[str, Table[Any]] = {
    "daemon": table_of(DaemonSpec),
    "log": table_of(LogSpec),
    "defaults": table_of(JobSpec),
    "sockets": table_of(SocketSpec),
    "limits": table_of(LimitSpec),
    "queues": table_of(QueueSpec),
    "supervisors": table_of(SupervisorSpec),
    "jobs": table_of(JobSpec),
}
_TABLE_TEXTS = {
    "daemon": "the daemon itself",
    "log": "the daemon's own log",
    "defaults": "any key of a job, for every job that does not set it and that it applies to",
    "sockets": "listening sockets, [sockets.NAME], which the daemon opens once and hands to the jobs that name them",
    "limits": "limits, [limits.NAME], that jobs share by naming them in `breaker`, `rate` or `bulkhead`",
    "queues": "queues, [queues.NAME], whose items jobs handle that name it in `queue`, and that others fill by `into`",
    "supervisors": "groups of jobs and supervisors, [supervisors.NAME], each with a strategy for failures",
    "jobs": "the jobs, [jobs.NAME]: each has exactly one of `command` and `call`",
}


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 7, without unions and references, which editors explain badly) of the whole file."""
    properties = {}
    for name in TABLES:
        schema = _table_schema(_SPECS[name])
        if name in NAMED:
            schema.pop("description", None)
            schema = {"type": "object", "additionalProperties": schema, "propertyNames": {"pattern": "^[A-Za-z0-9_-]{1,64}$"}}
        properties[name] = {**schema, "description": _TABLE_TEXTS[name]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "the TOML file of trio-supervisor",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _table_schema(table: Table[Any]) -> dict[str, Any]:
    schema = table.schema()
    if ready := schema["properties"].get("ready"):
        ready |= {"minProperties": 1, "maxProperties": 2}  # `http` may have its `status`
    return schema


@dataclass(frozen=True)
class Topic:
    """A key that can be explained. `field` is None for one that is not built yet."""

    path: str
    description: str
    field: Field | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What is true of it besides its description: its type, its default, and what a change of it does."""
        if (field := self.field) is None:
            return {}
        facts = {"type": _type(field.shape)}
        if not isinstance(field.shape, Table):
            facts["default"] = "none, it must be given" if field.required else written(field.default)
        return {**facts, "reload": _reload(self, field)}


def topics() -> dict[str, Topic]:
    """Every key of the file by its dotted path, `jobs.backoff.initial`."""
    return {topic.path: topic for name in TABLES if name != "defaults" for topic in _topics(name, _SPECS[name])}


def _topics(path: str, table: Table[Any]) -> Iterator[Topic]:
    for name, field in table.fields.items():
        yield Topic(f"{path}.{name}", field.description, field)
        if isinstance(field.shape, Table):
            yield from _topics(f"{path}.{name}", field.shape)
    for name, description in table.later.items():
        yield Topic(f"{path}.{name}", description)


def explain(key: str) -> str:
    """What a key means: `jobs.backoff.initial`, `jobs.api.backoff.initial`, `backoff.initial`, or a table's name.

    Raises LookupError, with a hint, for a key that the file does not know.
    """
    key = key.strip().strip("[]")
    if key in _SPECS:
        return _explained_table(key)
    if key in later.TABLES:
        return f"[{key}]\n  {later.TABLES[key]}\n\n  not supported yet"
    known = topics()
    found = _found(key, known)
    if not found:
        words = {path.split(".", skip)[-1]: None for path in known for skip in range(path.count(".") + 1)}
        raise LookupError(f'no key "{key}"{did_you_mean(key, [*words, *_SPECS])}')
    same: dict[tuple[str, str], list[Topic]] = {}
    for topic in found:
        same.setdefault((topic.path.partition(".")[2], topic.description), []).append(topic)
    return "\n\n".join(_explained(group) for group in same.values())


def _found(key: str, known: dict[str, Topic]) -> list[Topic]:
    table, _, rest = key.partition(".")
    if table == "defaults":
        table = "jobs"
    tries = [f"{table}.{rest}", f"{table}.{rest.partition('.')[2]}"] if table in _SPECS else []
    exact = [known[path] for path in tries if path in known]
    return exact[:1] or [topic for path, topic in known.items() if path.endswith(f".{key}")]


def _explained_table(name: str) -> str:
    lines = [f"[{name}{'.NAME' if name in NAMED else ''}]", f"  {_TABLE_TEXTS[name]}", ""]
    table = _SPECS[name]
    lines += _aligned((field, _sentence(each.description)) for field, each in table.fields.items())
    if table.later:
        lines += ["", f"  not supported yet: {', '.join(table.later)}"]
    return "\n".join(lines)


def _explained(same: list[Topic]) -> str:
    topic = same[0]
    head = f"{' · '.join(each.path for each in same)}\n  {topic.description}\n\n"
    if (field := topic.field) is None:
        return f"{head}  not supported yet"
    facts = topic.facts
    reload = facts.pop("reload")
    text = head + "\n".join(_aligned([*facts.items(), ("where", _where(same, field)), ("reload", reload)]))
    if isinstance(field.shape, Table):
        keys = ((name, f"{_sentence(each.description)} ({_default(each)})") for name, each in field.shape.fields.items())
        text += "\n\n" + "\n".join(_aligned(keys))
    return text


def _type(shape: Shape) -> str:
    examples = {
        "a duration": '"250ms", "10s", "1h30m", or a number of seconds',
        "a size": '"64KB", "10MB", or a number of bytes',
        "an octal number": '"0022" or 0o022',
        "a rate": '"100/s", "30/m", "10/h", or a number of times a second',
    }
    if isinstance(shape, Word):
        return f"one of {shape.words}"
    return f"{shape.words}: {examples[shape.words]}" if shape.words in examples else shape.words


def _default(field: Field) -> str:
    return "required" if field.required else f"default {written(field.default)}"


def _where(same: list[Topic], field: Field) -> str:
    tables = dict.fromkeys(topic.path.partition(".")[0] for topic in same)
    places = [f"[{name}.NAME]" if name in NAMED else f"[{name}]" for name in tables]
    places += ["[defaults]"] if "jobs" in tables else []
    return ", ".join(places) + (f"; only for {field.whom}" if field.whom else "")


def _reload(topic: Topic, field: Field) -> str:
    table, _, key = topic.path.partition(".")
    owner = _SPECS[table].fields[key.partition(".")[0]]
    return {
        "restart": "a change restarts the job",
        "children": "a change restarts every job that is a child process",
        "sockets": "a change restarts the jobs that use it",
        "daemon": "a change needs a restart of the daemon",
    }.get(owner.extra.get("reload", ""), "a change is applied live")


def _sentence(text: str) -> str:
    """The first part of a description: enough for a list."""
    return text.partition(". ")[0]


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def overview() -> str:
    """Every table with its keys, a line each."""
    return "\n\n".join(_explained_table(name) for name in TABLES if name != "defaults")


STARTER = """\
#:schema ./supervisor.schema.json
#
# Jobs for `supervisor run`. `supervisor check` reads this file and shows the tree it would run; `supervisor explain`
# lists every key, `supervisor explain jobs.backoff` tells about one. With
#     supervisor schema > supervisor.schema.json
# beside this file, an editor completes and checks the keys.

[daemon]
grace = "30s"                # an orderly stop takes no longer than this; then everything is killed

[defaults]                   # for every job that does not say otherwise
backoff = { max = "10s" }    # waits before restarts grow up to this

# A service: it has no end, so whenever it ends it is restarted. Its output is in .supervisor/logs/clock.log
[jobs.clock]
description = "tells the time"
command = ["sh", "-c", "while :; do date; sleep 5; done"]

# A schedule: runs every minute, and once at the start.
[jobs.disk]
description = "shows how full the disk is"
command = ["df", "-h", "."]
every = "1m"
run_on_start = true

# One run to completion. What comes `after` it starts when it has succeeded.
[jobs.prepare]
description = "runs once, before the workers"
command = "echo prepared"
once = true

# A group that fails together: when one worker ends, both are stopped and started again, in order.
[supervisors.workers]
strategy = "one_for_all"
children = ["left", "right"]
after = ["prepare"]

[jobs.left]
command = ["sleep", "3600"]

[jobs.right]
command = ["sleep", "3600"]
start = "manual"             # starts when told to: supervisor start right

# A Python function, from beat.py beside this file: `async def` runs in the daemon's own Trio loop, `def` in a thread.
# [jobs.beat]
# call = "beat:beat"
# args = { message = "alive" }
"""
"""What `supervisor init` writes."""
