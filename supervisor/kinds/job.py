"""What a `[jobs.NAME]` table can say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from supervisor.output import Overload, Rotate
from supervisor.policies import ORDER
from supervisor.policies.spec import BreakerSpec, BulkheadSpec, RateSpec, RetrySpec
from supervisor.probes import Health, Ready
from supervisor.queues.spec import AutoscaleSpec, BatchSpec
from supervisor.spec import Account, Bytes, ChildSpec, Expanded, FileMode, GiveUp, Limit, Paths, Recycle, RestartType, Seconds

# What else is true of a key, for the loader, `explain` and the reload: which jobs it is `for` (those with one of these keys, or
# "child": those that spawn), what a change of it does, and why only a run that `ends` can have it (nothing said: it applies to
# every job, and changes live).
_RESTARTS = {"reload": "restart"}
_CHILD = {"for": "child"}
_SCHEDULED = {"for": "every or cron"}
_QUEUED = {"for": "queue"}
_CHILD_RESTARTS = {"for": "child", "reload": "restart"}
_ENDING = {"ends": "a service has no end: use restart"}
_RUNS = {"ends": "only for runs that end: once, every, cron, queue. The code of a service can use `supervisor.policies` itself"}

MOST_WORKERS = 1000
"""Workers of one job; more is a slip of the finger."""


class JobSpec(ChildSpec, frozen=True, kw_only=True):
    """One job: what to run, when, and what to do when it ends."""

    # what
    command: Annotated[
        str | tuple[str, ...] | None,
        Meta(
            description="a child process: a list of words, or one string that is split as a shell would, without a shell",
            extra=_RESTARTS,
        ),
    ] = None
    call: Annotated[
        str | None,
        Meta(
            description='"module:function". `async def` runs as a Trio task in the daemon, `def` in a thread of its own, or '
            'with kind = "process" in a process',
            extra=_RESTARTS,
        ),
    ] = None
    kind: Annotated[
        Literal["task", "thread", "asyncio", "process", "command"] | None,
        Meta(
            description="how it runs; inferred from `command`, and for `call` from the function, unless you say. asyncio: an "
            "`async def` that needs asyncio, in an event loop and a thread of its own. process: a plain function in a Python "
            "process of its own, for work that takes a processor or must be killable; it loads the code anew at each start; "
            "a worker of a queue keeps it for all its items",
            extra=_RESTARTS,
        ),
    ] = None
    args: Annotated[
        dict[str, Any] | None,
        Meta(
            description="keyword arguments for the function, checked against its signature",
            extra={"for": "call", "reload": "restart"},
        ),
    ] = None
    workers: Annotated[
        int | AutoscaleSpec,
        Meta(
            ge=1,
            le=MOST_WORKERS,
            description="how many of a service, or for a queue, run side by side: NAME:0, NAME:1 and so on. `{worker}` in any "
            "text of the job (but `call`, `args` and `description`) is the number; a function has `ctx.worker`. With a queue "
            "also { min = 1, max = 8 }: as many as there is work for, until `scale` says how many",
        ),
    ] = 1
    description: Annotated[str, Meta(description="one line for people, shown by `status`")] = ""

    # when
    once: Annotated[bool, Meta(description="one run to completion instead of a service", extra=_RESTARTS)] = False
    every: Annotated[
        Seconds | None,
        Meta(
            gt=0,
            description="run again and again, start to start, aligned to the job's start: first after one interval",
            extra=_RESTARTS,
        ),
    ] = None
    cron: Annotated[
        str | None,
        Meta(
            description='run at times of the calendar: "minute hour day month weekday" as in a crontab, six fields with the '
            "seconds first, or @hourly, @daily, @midnight, @weekly, @monthly, @yearly, @annually. With `queue`: each time is "
            "one item, the job's `args`, also where many daemons share the queue",
            extra=_RESTARTS,
        ),
    ] = None
    timezone: Annotated[
        str,
        Meta(
            description='the time zone of `cron`: an IANA name such as "Europe/Berlin", or "local", the system\'s',
            extra={"for": "cron"},
        ),
    ] = "UTC"
    queue: Annotated[
        str | None,
        Meta(
            description="handle the items of this queue of [queues], one after another. Several jobs, and several daemons, may "
            "handle the same. The function takes the item as its first parameter, converted to what that is annotated as; a "
            "command reads it as JSON on its standard input, and prints its result",
            extra=_RESTARTS,
        ),
    ] = None
    batch: Annotated[
        BatchSpec | None,
        Meta(description="give the function a list of items at once, up to this many", extra={**_QUEUED, "reload": "restart"}),
    ] = None
    serialize_by: Annotated[
        str | None,
        Meta(
            description="a field of the item: items with the same value in it run one at a time, in their order "
            "(`per_key` of the queue at a time), on whatever host",
            extra={**_QUEUED, "reload": "restart"},
        ),
    ] = None
    into: Annotated[
        str | None,
        Meta(
            description="the queue that gets what the job gives. What a function returns is one item, a list too, put when "
            "the run, or its item, has succeeded; what it yields, or a `Stream` has, is put at once. What a service returns is "
            "only its end. Of a command outside a queue, each line of stdout is put at once: JSON as that value, any other as "
            "a string. None, and an empty line, is nothing. A full queue makes it wait",
            extra=_RESTARTS,
        ),
    ] = None
    start: Annotated[Literal["auto", "manual"], Meta(description="auto: with its supervisor; manual: when told to")] = "auto"
    run_on_start: Annotated[bool, Meta(description="also run at once when its schedule begins", extra=_SCHEDULED)] = False
    overlap: Annotated[
        Literal["skip", "queue", "replace", "parallel"],
        Meta(
            description="what becomes of a run that is due while the last is in hand: skip, it is left out; queue, one waits, "
            "and later ones merge with it; replace, the one in hand is stopped first; parallel, it begins beside, at most "
            "`workers` at once",
            extra=_SCHEDULED,
        ),
    ] = "skip"
    jitter: Annotated[
        Seconds,
        Meta(
            description="each run is delayed by chance, by up to this much, so that many jobs do not begin at once; the "
            "schedule itself stays in step",
            extra=_SCHEDULED,
        ),
    ] = Seconds(0)
    catch_up: Annotated[
        Literal["none", "last", "all"],
        Meta(
            description="what becomes of runs that were missed, while the daemon was down, the clock was set or the machine "
            "slept: none; last, one run for all of them; all, each of them, one after another, at most 100",
            extra=_SCHEDULED,
        ),
    ] = "none"

    # restart
    success_exit_codes: Annotated[
        tuple[int, ...], Meta(description="exit codes of a command that count as success", extra=_CHILD)
    ] = (0,)
    give_up: Annotated[
        GiveUp | None,
        Meta(description="so many failures within this time are the job's end: not restarted, not counted by its supervisor"),
    ] = None

    # ready
    ready: Annotated[Ready | None, Meta(description="how it says that it is ready; without it, started is ready")] = None
    start_timeout: Annotated[Seconds, Meta(description="not ready within this time is a failure; only with `ready`")] = Seconds(
        60
    )

    # health
    health: Annotated[
        Health | None,
        Meta(description="a question that is asked again and again once it is ready; when it fails, the job is restarted"),
    ] = None

    # stop
    grace: Annotated[Seconds, Meta(description="how long it may take to end after it was asked; then it is killed")] = Seconds(
        10
    )
    stop_signal: Annotated[
        Literal["TERM", "INT", "QUIT", "HUP", "KILL", "USR1", "USR2", "WINCH"],
        Meta(description="how a command is asked to end", extra=_CHILD),
    ] = "TERM"
    stop_to: Annotated[
        Literal["main", "group"],
        Meta(description="who gets the stop signal: the main process, or its whole group", extra=_CHILD),
    ] = "main"
    stop_command: Annotated[
        str | tuple[str, ...] | None,
        Meta(
            description="a command that asks the job to end, instead of the stop signal. It runs as the job does, with the pid "
            "of the main process in $SUPERVISOR_MAINPID, while the grace goes on",
            extra=_CHILD,
        ),
    ] = None
    reload_signal: Annotated[
        Literal["HUP", "USR1", "USR2", "INT", "QUIT", "TERM", "WINCH"] | None,
        Meta(
            description="what `supervisor reload NAME` sends to the main process, so that it reads its own configuration "
            "again; without it, `reload NAME` is a restart",
            extra=_CHILD,
        ),
    ] = None

    # policies
    timeout: Annotated[
        Seconds | None,
        Meta(
            gt=0,
            description="how long one attempt may take: then it is asked to end, has its `grace`, is killed, and has failed",
            extra=_ENDING,
        ),
    ] = None
    deadline: Annotated[
        Seconds | None,
        Meta(
            gt=0,
            description="how long a whole run may take, with all its attempts and waits; it ends as by `timeout`",
            extra=_ENDING,
        ),
    ] = None
    retry: Annotated[
        RetrySpec | None,
        Meta(
            description="another attempt after a failed one, within the same run; an item of a queue goes back to it and is "
            "claimed again, 5 attempts in all where nothing is said, and is then dead",
            extra=_ENDING,
        ),
    ] = None
    breaker: Annotated[
        str | BreakerSpec | None,
        Meta(
            description="after many failures nothing is tried for a while: the failures of this job, or of all that share it",
            extra=_RUNS,
        ),
    ] = None
    rate: Annotated[
        str | RateSpec | None,
        Meta(description='how many attempts may begin in a time, of this job, or of all that share it: "10/s"', extra=_RUNS),
    ] = None
    bulkhead: Annotated[
        str | BulkheadSpec | None,
        Meta(description="how many attempts at the same time, of this job, or of all that share it", extra=_RUNS),
    ] = None
    fallback: Annotated[
        str | None,
        Meta(
            description='"module:function", called when the run has failed for good. If it returns, the run has completed. It '
            "gets by name what it has parameters for: `failure` (the exception), and the `args` of the job",
            extra=_RUNS,
        ),
    ] = None

    # process
    env: Annotated[
        dict[str, str],
        Meta(
            description="environment of the child, on top of the daemon's and of all files. Values are never shown anywhere",
            extra=_CHILD_RESTARTS,
        ),
    ] = {}
    env_file: Annotated[
        Paths,
        Meta(
            description="files of NAME=value lines for the environment, below `env`; a later file wins. Read at each start. "
            'A "-" before the path: it may be missing',
            extra=_CHILD_RESTARTS,
        ),
    ] = Paths()
    clear_env: Annotated[
        bool,
        Meta(
            description="the child inherits nothing of the daemon's environment: it gets a PATH, HOME, USER, LOGNAME and SHELL "
            "of its user, and what the file gives",
            extra=_CHILD_RESTARTS,
        ),
    ] = False
    cwd: Annotated[
        str | None,
        Meta(description="working directory of the child; the file's directory unless you say", extra=_CHILD_RESTARTS),
    ] = None
    user: Annotated[
        Account | None,
        Meta(
            description="the user that the child runs as, by name or number, with HOME, USER, LOGNAME, SHELL and the groups of "
            "that user. Only root may choose another than its own",
            extra=_CHILD_RESTARTS,
        ),
    ] = None
    group: Annotated[
        Account | None,
        Meta(description="the group that the child runs as; the user's own unless you say", extra=_CHILD_RESTARTS),
    ] = None
    groups: Annotated[
        tuple[Account, ...],
        Meta(description="more groups of the child, besides those that the user is in", extra=_CHILD_RESTARTS),
    ] = ()
    umask: Annotated[
        FileMode | None,
        Meta(
            description='the bits that files made by the child do not get, in octal: "0022"; the daemon\'s unless you say',
            extra=_CHILD_RESTARTS,
        ),
    ] = None
    nice: Annotated[
        int | None,
        Meta(
            ge=-20, le=19,
            description="priority: 19 yields to all others, below 0 goes before them; the daemon's unless you say",
            extra=_CHILD_RESTARTS,
        ),
    ] = None  # fmt: skip
    rlimits: Annotated[
        dict[str, Limit],
        Meta(
            description='resource limits, soft and hard at once or [soft, hard]: { nofile = 4096, core = "unlimited", as = '
            '"1GB", nproc = [100, 200] }; the daemon\'s unless you say',
            extra=_CHILD_RESTARTS,
        ),
    ] = {}
    no_new_privileges: Annotated[
        bool,
        Meta(description="neither it nor its children gain rights by set-uid or set-gid programs", extra=_CHILD_RESTARTS),
    ] = False
    stdin: Annotated[
        str,
        Meta(
            description="what the child reads: null: nothing; pipe: what `supervisor attach` writes; or the path of a file",
            extra=_CHILD_RESTARTS,
        ),
    ] = "null"
    tty: Annotated[
        bool,
        Meta(
            description="give the child a terminal of its own for input and output; what it prints there is captured",
            extra=_CHILD_RESTARTS,
        ),
    ] = False
    sockets: Annotated[
        tuple[str, ...],
        Meta(
            description="names of [sockets] that the child gets, from descriptor 3 on, as systemd hands them over "
            "(LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID)",
            extra=_CHILD_RESTARTS,
        ),
    ] = ()

    # output
    output: Annotated[
        str,
        Meta(
            description="capture: to logs/NAME.log; journal: to systemd's journal; inherit: the daemon's own; null: away; "
            "or the path of a file to capture to",
            extra=_CHILD_RESTARTS,
        ),
    ] = "capture"
    rotate: Annotated[
        Rotate, Meta(description="when the captured file is put aside, and how many are kept", extra=_CHILD_RESTARTS)
    ] = Rotate()
    max_line: Annotated[
        Bytes,
        Meta(
            ge=1,
            description="a longer line is looked at in pieces of this: by `parse`, `ready`, the terminal and the journal. "
            "A file gets the bytes as they come",
            extra=_CHILD_RESTARTS,
        ),
    ] = Bytes(64 << 10)
    on_overload: Annotated[
        Overload,
        Meta(
            description="what happens when output comes faster than a FIFO or the journal takes it: block, the job waits; "
            "drop, whole lines are dropped, counted and reported",
            extra=_CHILD_RESTARTS,
        ),
    ] = "block"
    parse: Annotated[
        Literal["text", "json"],
        Meta(
            description="json: each line that is a JSON object also becomes a line of the daemon's log, with its own level, "
            "text and fields",
            extra=_CHILD_RESTARTS,
        ),
    ] = "text"

    # fresh
    watch: Annotated[
        tuple[str, ...],
        Meta(
            description="globs, with `**` for any depth: a change of such a file restarts the job, which is no failure. "
            "It waits until nothing has changed for half a second, at most 5 s. What git, Python and editors write "
            "for themselves (`.git`, `__pycache__`, swap files) is passed over unless it is named",
            extra={"for": "child", "why": "what runs inside the daemon is the code that it has loaded"},
        ),
    ] = ()

    recycle: Annotated[
        Recycle | None,
        Meta(description="when a service gets a fresh run: it is asked to end, has its grace, and starts again; no failure"),
    ] = None

    @property
    def service(self) -> bool:
        """Whether it has no end: neither `once`, nor a schedule, nor a queue."""
        return not self.once and not self.scheduled and not self.pooled

    @property
    def pooled(self) -> bool:
        """Whether its workers handle the items of a queue."""
        return self.queue is not None

    @property
    def grouped(self) -> bool:
        """Whether its workers are children of their own."""
        return self.workers != 1

    @property
    def first_workers(self) -> int:
        """How many workers it begins with; one, at least, sees whether there is work."""
        return self.workers if isinstance(self.workers, int) else max(1, self.workers.min)

    @property
    def scheduled(self) -> bool:
        """Whether its runs come from a schedule. On a queue job a schedule makes items, and no runs."""
        return not self.pooled and (self.every is not None or self.cron is not None)

    @property
    def ticks(self) -> bool:
        """Whether each tick of a schedule is an item of the queue that it handles. Its `args` are that item then."""
        return self.pooled and self.cron is not None

    @property
    def overlaps(self) -> bool:
        """Whether several of its scheduled runs may be in hand at once."""
        return self.scheduled and self.overlap == "parallel"

    @property
    def policies(self) -> bool:
        """Whether there are layers round its runs."""
        return any(getattr(self, name) is not None for name in ORDER)

    @property
    def restart_type(self) -> RestartType:
        """The restart type in force. A scheduled run is temporary: the next one comes from the schedule."""
        if self.scheduled:
            return RestartType.TEMPORARY
        return self.restart or (RestartType.TRANSIENT if self.once else RestartType.PERMANENT)

    def one_run(self) -> JobSpec:
        """One run of a schedule, as a job: it runs when it is told to, once, and is not tried again."""
        return msgspec.structs.replace(
            self, every=None, cron=None, once=True, restart=RestartType.TEMPORARY, overlap="skip", run_on_start=False,
            jitter=Seconds(0), catch_up="none", workers=1, start="manual",
        )  # fmt: skip

    @property
    def spawns(self) -> bool:
        """Whether its runs are processes of their own."""
        return self.command is not None or self.kind == "process"

    @property
    def where(self) -> str:
        """`command` or `call`: what it is, for a person, before its kind is known."""
        return "command" if self.command is not None else "call"


WORKER = "{worker}"
"""What stands for the number of the worker."""

_TEXTS = tuple(
    (field.name, field.default)
    for field in msgspec.structs.fields(JobSpec)
    if field.name not in ("after", "args", "call", "description")
)


def for_worker(spec: JobSpec, number: int) -> JobSpec:
    """The job as its worker of that number runs it. The same object where nothing in it depends on the number."""
    changes = {
        name: _numbered(value, str(number))
        for name, default in _TEXTS
        if (value := getattr(spec, name)) is not default and _mentions(value)  # a thousand jobs are common
    }
    return msgspec.structs.replace(spec, **changes) if changes else spec


def clashes(spec: JobSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """What several workers of this job would all use, and each needs for itself: the keys, and what to do."""
    if spec.output.startswith("/") and WORKER not in spec.output:
        yield ("output",), "its workers would all write to this file: put {worker} into its name"
    if spec.ready is not None and spec.ready.file is not None and WORKER not in spec.ready.file:
        yield ("ready", "file"), "its workers would all wait for this file: put {worker} into its name"


def _mentions(value: Any) -> bool:
    """Whether there is a `{worker}` in it."""
    if isinstance(value, str):
        return WORKER in value
    if isinstance(value, dict):
        return any(map(_mentions, value.values()))
    if isinstance(value, tuple):
        return any(map(_mentions, value))
    return isinstance(value, msgspec.Struct) and any(_mentions(getattr(value, name)) for name in value.__struct_fields__)


def _numbered(value: Any, number: str) -> Any:
    """`value` with the number for every `{worker}` in it; nothing else in braces is touched."""
    if isinstance(value, Expanded):
        return Expanded(value.replace(WORKER, number), value.shown.replace(WORKER, number))
    if isinstance(value, str):
        return value.replace(WORKER, number)
    if isinstance(value, dict):
        return {key: _numbered(each, number) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_numbered(each, number) for each in value)
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.replace(
            value, **{name: _numbered(getattr(value, name), number) for name in value.__struct_fields__}
        )
    return value
