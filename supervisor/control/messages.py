"""What goes over the control socket, as types: the JSON-RPC envelope, and what each verb takes and gives."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from supervisor.control.verbs import VERBS, Param, Verb
from supervisor.state import Answer, JobStatus, LimitStatus, PastRun, Phase

PROTOCOL = 1
"""Raised when an old client could misunderstand a new daemon."""

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
NOT_ALLOWED = -32001
TOO_MANY = -32002
FILE_IS_WRONG = 78
# The codes above are JSON-RPC's. What the tree refuses carries the exit code that a command ends with: 1, 4, 75, 78.


class Envelope(msgspec.Struct):
    """A request, or without `id` a notification, as it arrives."""

    jsonrpc: str
    method: str
    id: Raw | UnsetType = UNSET
    params: Raw | UnsetType = UNSET


class Fault(msgspec.Struct, omit_defaults=True):
    """The `error` of a response. `code` is JSON-RPC's, or the exit code that the command should end with."""

    code: int
    message: str
    data: Any = None


class Reply(msgspec.Struct):
    """A response, or a notification of a stream, as a client reads it."""

    jsonrpc: str
    id: int | str | None = None
    method: str | None = None
    params: Raw | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    error: Fault | None = None


class Item(msgspec.Struct):
    """The `params` of a stream's notification: the `id` of the request, and one event or one line of output."""

    id: int | str | None
    item: Raw


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One fault of a configuration file, in the `data` of an error with code 78."""

    file: str
    line: int
    column: int
    path: str
    message: str
    warning: bool = False


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    """One child of the tree with everything below it."""

    status: JobStatus
    children: tuple[Branch, ...] = ()


class Reload(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload does, or with `plan` would do, by name; and what came of each job that it stopped or started."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line that a job printed, without its end; bytes that are not UTF-8 are written as `\\xff`.

    Or the mark of a reader that was too slow: `lagged` bytes were not delivered.
    """

    name: str
    line: str = ""
    lagged: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The first item of `events` with `snapshot`: the table as it was at `seq`."""

    seq: int
    snapshot: tuple[JobStatus, ...]


class End(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a stream that came to its end. `seq` is the number of the last event there is."""

    seq: int


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    """The first item of `exec` and `attach`: the job, and whether what it reads is a terminal."""

    name: str
    tty: bool


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a job printed, as it came: an item of `exec` and `attach`. Or `lagged` bytes of it were not delivered."""

    data: bytes = b""
    lagged: int = 0


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """How the run ended that `exec` or `attach` was about."""

    name: str
    reason: str
    failed: bool
    code: int | None = None
    signal: str | None = None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers."""

    name: str
    version: str
    protocol: int
    pid: int
    phase: Phase
    file: str | None = None


class Shutdown(msgspec.Struct, frozen=True, kw_only=True):
    """How a shutdown came out: who did not stop in time and was killed, and what survived even that."""

    late: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as it stands. Where its engine does not answer, `trouble` says so, and the numbers are null."""

    name: str
    backend: str
    """As the file says it, without a password."""
    jobs: tuple[str, ...]
    """Those that handle its items here; other daemons may have others."""
    paused: bool | None = None
    size: int
    """How many may wait."""
    waiting: int | None = None
    delayed: int | None = None
    running: int | None = None
    done: int | None = None
    dead: int | None = None
    cancelled: int | None = None
    expired: int | None = None
    oldest: float | None = None
    """Seconds that the first has waited."""
    trouble: str | None = None


class ItemStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An item of a queue. Moments are RFC 3339 in UTC, by the clock of the engine."""

    id: str
    queue: str
    state: str
    """waiting, running, done, dead, cancelled or expired."""
    attempts: int
    priority: str
    put_at: str
    ready_at: str
    """Since when, or from when on, it may be claimed."""
    expires_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    lease_until: str | None = None
    owner: str | None = None
    """Who has it, or had it last."""
    key: str | None = None
    group: str | None = None
    cancelling: bool = False
    progress: tuple[float, float | None] | None = None
    error: str | None = None
    traceback: str | None = None
    bytes: int
    """The length of the payload."""
    payload: Any = None
    """Left out (null) of lists where it is long."""
    result: Any = None


class Submitted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an item that was put: `stored` as its id says; `known`, an item of this id was there already; `merged` or
    `rejected`, `id` is the item whose key it has; `replaced`, stored in the place of one that waited, which is gone.
    """

    id: str
    what: Literal["stored", "known", "merged", "replaced", "rejected"]
    ended: ItemStatus | None = None
    """With `result`: what came of it; nothing has of what was rejected."""


RESULTS: dict[str, Any] = {
    "status": list[JobStatus],
    "tree": list[Branch],
    "start": list[Answer],
    "stop": list[Answer],
    "restart": list[Answer],
    "reload": Reload | list[Answer],
    "signal": list[Answer],
    "scale": list[Answer],
    "run-now": list[Answer],
    "pause": list[Answer],
    "resume": list[Answer],
    "cancel": list[Answer],
    "submit": list[Submitted],
    "queue.ls": list[QueueStatus],
    "queue.peek": list[ItemStatus],
    "queue.dead": list[ItemStatus],
    "queue.show": ItemStatus,
    "queue.wait": list[ItemStatus],
    "queue.requeue": list[Answer],
    "queue.purge": list[Answer],
    "queue.pause": list[Answer],
    "queue.resume": list[Answer],
    "limits": list[LimitStatus],
    "metrics": str,
    "logs": End,
    "events": End,
    "history": list[PastRun],
    "exec": Finished | None,
    "attach": Finished,
    "input": None,
    "shutdown": Shutdown,
    "version": Version,
    "rpc.discover": dict[str, Any],
}
"""What each verb answers with."""


@functools.cache
def request_type(verb: Verb) -> type[msgspec.Struct]:
    """The type of a verb's params."""
    fields = [
        (param.name, _checked(param)) if param.required else (param.name, _checked(param), _default(param))
        for param in verb.params
    ]
    return msgspec.defstruct(verb.name, fields, kw_only=True, frozen=True, forbid_unknown_fields=True)


def _checked(param: Param) -> Any:
    """The type of a param, and what holds for all like it: a required list is not empty, no number is negative."""
    kind: Any = list[Raw] if param.type == list[object] else param.type
    if param.many:
        return Annotated[kind, Meta(description=param.help, min_length=int(param.required))]
    if kind is int:
        kind = _COUNT
    elif kind == int | None:
        kind = _COUNT | None
    elif kind == float | None:
        kind = Annotated[float, Meta(ge=0)] | None
    return Annotated[kind, Meta(description=param.help)]


_COUNT = Annotated[int, Meta(ge=0)]


def _default(param: Param) -> Any:
    return msgspec.field(default_factory=list) if param.many else param.default


def read_params(verb: Verb, params: Raw | UnsetType) -> dict[str, Any]:
    """The params of a request, by name, complete with defaults. Raises msgspec.ValidationError with a sentence."""
    given = b"{}" if params is UNSET else bytes(params)
    if given.lstrip()[:1] == b"[":
        values = msgspec.json.decode(given, type=list[Raw])
        if len(values) > len(verb.params):
            raise msgspec.ValidationError(f"takes at most {len(verb.params)} params, got {len(values)}")
        named = {param.name: value for param, value in zip(verb.params, values, strict=False)}
        given = msgspec.json.encode(named)
    return msgspec.structs.asdict(msgspec.json.decode(given, type=request_type(verb)))


def encode(value: object) -> bytes:
    """JSON; text that is no Unicode (a lone surrogate out of a file name) is escaped, never an error."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(_scrubbed(msgspec.to_builtins(value)))


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_scrubbed(key): _scrubbed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(item) for item in value]
    return value


def describe(version: str) -> dict[str, Any]:
    """The OpenRPC description of the protocol."""
    verbs = list(VERBS.values())
    schemas, components = msgspec.json.schema_components(
        [RESULTS[verb.name] for verb in verbs] + [request_type(verb) for verb in verbs],
        ref_template="#/components/schemas/{name}",
    )
    methods = [
        {
            "name": verb.name,
            "summary": verb.help,
            "paramStructure": "either",
            "params": [_described(param, components[verb.name]["properties"][param.name]) for param in verb.params],
            "result": {"name": "result", "schema": result},
        }
        for verb, result in zip(verbs, schemas, strict=False)
    ]
    for verb in verbs:
        components.pop(verb.name, None)
    return {
        "openrpc": "1.3.2",
        "info": {"title": "supervisor", "version": version},
        "methods": methods,
        "components": {"schemas": components},
    }


def _described(param: Param, schema: dict[str, Any]) -> dict[str, Any]:
    schema = {key: value for key, value in schema.items() if key != "description"}
    return {"name": param.name, "description": param.help, "required": param.required, "schema": schema}
