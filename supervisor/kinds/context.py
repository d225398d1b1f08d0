"""What a run sees of the house, and what a job's function sees of its run."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Unpack

import msgspec
import structlog
import trio
from trio_util import AsyncValue

from supervisor.errors import QueueError
from supervisor.policies.failures import unwrapped
from supervisor.spec import split_name
from supervisor.state import Phase, Spent

if TYPE_CHECKING:
    from supervisor.children import Children
    from supervisor.kinds.attachment import Attachment
    from supervisor.kinds.chain import Chain
    from supervisor.output import Outputs
    from supervisor.queues.producer import PutOptions
    from supervisor.queues.protocol import Receipt
    from supervisor.queues.registry import Queues
    from supervisor.sockets import Sockets
    from supervisor.store import Store


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, as its kind saw it."""

    reason: str
    failed: bool
    code: int | None = None
    signal: str | None = None
    spent: Spent | None = None
    output: tuple[str, ...] = ()
    """The last lines of a child process that failed by itself."""
    returned: bytes | None = None
    """What its function returned, as JSON, where somebody wants it; None: nothing."""


async def put(resources: Resources, queue: str, item: Any, options: PutOptions) -> Receipt:
    """Put an item into a queue of the file, for a job. See `Context.put`."""
    if resources.queues is None:
        raise QueueError("there are no queues here")
    if queue not in resources.queues.names:
        raise LookupError(f'no queue "{queue}" in [queues], which has: {", ".join(resources.queues.names)}')
    return await resources.queues.producer(queue).put(item, **options)


class Reporter(Protocol):
    """The tree's side of a run: where its facts go."""

    def ready(self, run: Run, cause: str) -> None:
        """The run is ready."""

    def spawned(self, run: Run, pid: int) -> None:
        """The run has a main process."""

    def stuck(self, run: Run, cause: str, pids: tuple[int, ...]) -> None:
        """Something of the run could not be ended."""

    def progress(self, run: Run, done: float, total: float | None) -> None:
        """How far it is."""

    def output_lost(self, run: Run, count: int, cause: str) -> None:
        """Captured bytes that could not be kept."""

    def waits_for_room(self, run: Run, queue: str, cause: str | None) -> None:
        """A queue does not take what the run gives, and why; None: it does again."""


NOT_PASSED_ON = frozenset(
    {
        "FDSTORE",
        "JOURNAL_STREAM",
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "MAINPID",
        "NOTIFY_SOCKET",
        "SYSTEMD_EXEC_PID",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)
"""What a service manager told the daemon, and nobody else."""

NOTHING: Mapping[str, str] = MappingProxyType({})


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """What of an environment the children get."""
    return {name: value for name, value in environ.items() if name not in NOT_PASSED_ON}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the kinds share: opened before the tree, closed after it.

    `environ` is what children inherit, `env` and `env_file` what `[daemon]` adds (never shown); `base` is their working
    directory unless they say otherwise. `store` is the file `state.db` of the state directory, made when it is first used.
    """

    children: Children
    outputs: Outputs
    sockets: Sockets
    store: Store
    environ: Mapping[str, str] = field(repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    env_file: tuple[str, ...] = ()
    base: Path
    queues: Queues | None = None


class Run:
    """One life of a job, as the kind that runs it sees it.

    The stop ladder talks to it (`advance`), the kind asks it (`stopping`, `on_stopping`) and reports through it
    (`spawned`, `ready`, `stuck`). Belongs to the Trio thread; `kinds/thread.py` has the blocking view for other threads.
    """

    __slots__ = (
        "_follower",
        "_hooks",
        "_phase",
        "_ready_cause",
        "_reporter",
        "_spawning",
        "_watch",
        "abandoned",
        "attach",
        "attempt",
        "chain",
        "environ",
        "heard",
        "id",
        "is_ready",
        "job",
        "kind",
        "outcome",
        "overdue",
        "pid",
        "scheduled_at",
        "send_signal",
        "until",
    )

    followed = False
    """Whether more is to come, if what runs now fails: it is an attempt, and not the last one."""

    item: str | None = None
    """The id of the item of a queue that it handles; None where it handles none."""

    def __init__(self, job: str, number: int, reporter: Reporter, abandoned: trio.Event) -> None:
        self.job = job
        self.id = f"{job}#{number}"
        self.pid: int | None = None
        self.scheduled_at: float | None = None
        """The moment of its schedule that it is made for, on the wall clock; None where it is made for none."""
        self.is_ready = False
        self.abandoned = abandoned
        """Set when the tree gives up waiting for what cannot be killed: end now, whatever is left."""
        self.send_signal: Callable[[int, bool], None] | None = None
        """Signal the main process, or (True) its whole group; None where the run has no process."""
        self.attach: Attachment | None = None
        """The way in to what runs; None where it takes no input, and before it is there."""
        self.outcome: Outcome | None = None
        """What is known of the end; read where a cancel cut the kind short before it could return."""
        self.environ: Mapping[str, str] = NOTHING
        """What its child process finds in its environment for the sake of this run."""
        self.heard = -math.inf
        """When it last said that it is alive, on Trio's clock."""
        self.attempt = 1
        """Which attempt it is at; only a job with `retry` has more than one."""
        self.until: float | None = None
        """When it will be asked to end because it takes too long, on Trio's clock."""
        self.overdue = False
        """Whether that is why it is asked to end: what cannot hear it is cancelled at once."""
        self.kind: str | None = None
        """What runs now, where that is not what its job is: a fallback."""
        self.chain: Chain | None = None
        """Where what its function yields goes, and what it returns; None where nobody wants it."""
        self._follower: Callable[[Phase], None] | None = None
        self._reporter = reporter
        self._spawning = False
        self._ready_cause: str | None = None
        self._phase = Phase.RUNNING
        self._watch: AsyncValue[Phase] | None = None
        self._hooks: list[Callable[[], None]] = []

    @property
    def worker(self) -> int:
        """The number of the worker whose run this is; 0 where its job has only one."""
        return split_name(self.job)[1] or 0

    @property
    def phase(self) -> AsyncValue[Phase]:
        """The phase of this run, watchable: the daemon's, or further on where this run alone is stopped."""
        if self._watch is None:
            self._watch = AsyncValue(self._phase)
        return self._watch

    @property
    def current_phase(self) -> Phase:
        """The phase at this moment."""
        return self._phase

    @property
    def stopping(self) -> bool:
        """Whether the run has been asked to end."""
        return not self._phase < Phase.STOPPING

    def advance(self, phase: Phase) -> None:
        """Move to a later phase; an earlier one is ignored. Entering STOPPING or later calls the stop hooks, once."""
        if not self._phase < phase:
            return
        self._phase = phase
        if self._watch is not None:
            self._watch.value = phase
        if self._follower is not None:
            self._follower(phase)
        if self.stopping:
            hooks, self._hooks = self._hooks, []
            for hook in hooks:
                hook()

    def follow(self, follower: Callable[[Phase], None]) -> None:
        """Call `follower` (synchronous, must not raise) with each further phase, before the stop hooks."""
        self._follower = follower

    def on_stopping(self, hook: Callable[[], None]) -> None:
        """Call `hook` (synchronous, must not raise) when the run is asked to end; at once if it already was."""
        if self.stopping:
            hook()
        else:
            self._hooks.append(hook)

    @property
    def left(self) -> float | None:
        """Seconds until it is asked to end because it takes too long; None where nothing limits it."""
        return None if self.until is None else max(0.0, self.until - trio.current_time())

    async def wait_stopping(self) -> None:
        """Wait until the run is asked to end."""
        await self.phase.wait_value(lambda phase: not phase < Phase.STOPPING)

    def spawned(self, pid: int) -> None:
        """Report the main process."""
        self.pid = pid
        self._spawning = False
        self._reporter.spawned(self, pid)
        if self._ready_cause is not None:
            self.ready(self._ready_cause)

    def expect_process(self) -> None:
        """The main process is about to be there. If it gets ready before it has been reported, that waits until it is."""
        self._spawning = True

    def ready(self, cause: str = "ready") -> None:
        """Report readiness; only the first time counts."""
        if self._spawning:
            self._ready_cause = self._ready_cause or cause
        elif not self.is_ready:
            self.is_ready = True
            self._reporter.ready(self, cause)

    def heartbeat(self) -> None:
        """Note that it is alive (`health = { notify = true }`)."""
        self.heard = trio.current_time()

    def stuck(self, cause: str, pids: tuple[int, ...] = ()) -> None:
        """Report that something cannot be ended; the run goes on waiting for it (or for `abandoned`)."""
        self._reporter.stuck(self, cause, pids)

    def progress(self, done: float, total: float | None = None) -> None:
        """Report how far it is."""
        self._reporter.progress(self, done, total)

    def output_lost(self, count: int, cause: str) -> None:
        """Report captured bytes that could not be kept."""
        self._reporter.output_lost(self, count, cause)

    def waits_for_room(self, queue: str, cause: str | None) -> None:
        """Report that it waits for a queue to take what it gives, and why; with None, that it does not any more."""
        self._reporter.waits_for_room(self, queue, cause)


def _of_the_run(name: str) -> Any:
    """An attribute of an attempt that is its run's."""
    return property(lambda self: getattr(self.whole, name), lambda self, value: setattr(self.whole, name, value))


class Attempt(Run):
    """One attempt of a run with policies, as its kind sees it.

    Its phase, its hooks and its outcome are its own; its process, and whatever it reports, are the run's.
    """

    __slots__ = ("followed", "whole")

    whole: Run

    def __init__(self, whole: Run, until: float | None, followed: bool) -> None:
        self.whole = whole
        self.followed = followed
        super().__init__(whole.job, 0, _Passing(whole), whole.abandoned)
        self.id = whole.id
        self.environ = whole.environ
        self.attempt = whole.attempt
        self.scheduled_at = whole.scheduled_at
        self.until = until
        self.chain = whole.chain
        self.advance(whole.current_phase)

    def heartbeat(self) -> None:
        self.whole.heartbeat()

    attach = _of_the_run("attach")
    pid = _of_the_run("pid")
    send_signal = _of_the_run("send_signal")


class Work(Attempt):
    """One call of a queue job's function: an item, or a batch of them, in the hands of a worker.

    There may be 50 000 of these a second: what most calls never ask for is made when it is asked for.
    """

    __slots__ = ("_made", "begun", "item", "items", "kill")

    item: str
    """The id of the item, or of the first of a batch: the same at each attempt, so a key for what must be done once."""

    def __init__(
        self, whole: Run, until: float | None, item: str, attempt: int, kill: trio.CancelScope, items: int = 1
    ) -> None:
        self.whole = whole
        self.id = whole.id
        self.until = until
        self.item = item
        self.items = items
        self.attempt = attempt
        self.kill = kill
        """What ends the call by force."""
        self.begun = False
        """Whether the function has been called, or is about to be: what ends before was not the item's fault."""
        self.chain = None if whole.chain is None else whole.chain.of(self, item)
        self._phase = whole.current_phase
        if until is not None:
            self._made = trio.current_time()

    def begin(self) -> None:
        """The function is called now. What it may take counts from here: `until` moves by what it has waited for its turn."""
        self.begun = True
        if self.until is not None:
            self.until += trio.current_time() - self._made

    def __getattr__(self, name: str) -> Any:
        """A slot that is empty."""
        if name not in _OF_WORK:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = _OF_WORK[name](self.whole)
        setattr(self, name, value)
        return value


_OF_WORK: dict[str, Callable[[Run], Any]] = {
    "_follower": lambda whole: None,
    "_hooks": lambda whole: [],
    "_ready_cause": lambda whole: None,
    "_reporter": lambda whole: _Passing(whole),
    "_spawning": lambda whole: False,
    "_watch": lambda whole: None,
    "abandoned": lambda whole: whole.abandoned,
    "environ": lambda whole: whole.environ,
    "followed": lambda whole: True,
    "heard": lambda whole: -math.inf,
    "is_ready": lambda whole: whole.is_ready,
    "job": lambda whole: whole.job,
    "kind": lambda whole: None,
    "outcome": lambda whole: None,
    "overdue": lambda whole: False,
    "scheduled_at": lambda whole: None,
}
"""What an attempt has besides, and how it begins."""


class Handler(Protocol):
    """What the worker of a queue job gives its items to. It is the worker's own, and lives as long as that.

    Where it ends before, by itself and without a call in hand, it cancels the worker and raises why.

    `room` is how many calls it will have at once, those under way included: 1 for most; a process that makes short calls one
    after another is given several, so that it need not wait for the next. It may change at any time.
    """

    @property
    def room(self) -> int:
        """How many calls it has or will take, at least 1."""

    @property
    def hears(self) -> bool:
        """Whether a call can hear that it is to end, and end by itself; else it is cancelled as soon as it has to end early."""

    async def handle(self, work: Work, payload: bytes) -> bytes | None:
        """Make one call with what is in `payload` (JSON; a list of items for a batch): what it returned, as JSON.

        Says `work.begin()` when it begins. Raises what the function raised, or RunFailed for what else went wrong; WorkerLost
        where the worker has died with it, and can make no further call. Hears of `work`'s phases as `run` does; cancelled, it
        ends the call by force, at once, with the worker if it must.
        """


class _Passing:
    """Passes on to a run what its attempts report."""

    def __init__(self, whole: Run) -> None:
        self._whole = whole

    def ready(self, run: Run, cause: str) -> None:
        self._whole.ready(cause)

    def spawned(self, run: Run, pid: int) -> None:
        self._whole.spawned(pid)

    def stuck(self, run: Run, cause: str, pids: tuple[int, ...]) -> None:
        self._whole._reporter.stuck(run, cause, pids)

    def progress(self, run: Run, done: float, total: float | None) -> None:
        self._whole._reporter.progress(run, done, total)

    def output_lost(self, run: Run, count: int, cause: str) -> None:
        self._whole.output_lost(count, cause)

    def waits_for_room(self, run: Run, queue: str, cause: str | None) -> None:
        self._whole.waits_for_room(queue, cause)


@contextmanager
def alone() -> Iterator[None]:
    """An exception that is alone in the group of a nursery is raised as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = unwrapped(group)
        raise error from error.__cause__


def does_not_end(run: Run) -> str:
    """What there is to say of a run whose thread goes on after it should have ended."""
    return f"thread {run.id} does not end, and a thread cannot be killed"


class RunFacts:
    """What every kind of context knows of its run, wherever the function runs."""

    def __init__(self, run: Run, resources: Resources) -> None:
        self._run = run
        self._resources = resources

    @cached_property
    def log(self) -> Any:
        """The daemon's log, with the job and the run on every line, and the item where there is one."""
        run = self._run
        told = {} if run.item is None else {"item": run.item}
        return structlog.get_logger("job").bind(job=run.job, run=run.id, **told)

    @property
    def job(self) -> str:
        """The job's name."""
        return split_name(self._run.job)[0]

    @property
    def worker(self) -> int:
        """Which of the job's workers this is, counted from 0."""
        return self._run.worker

    @property
    def scheduled_at(self) -> datetime.datetime | None:
        """The moment of its schedule that this run is made for, in UTC, however late it began; None where it is for none."""
        at = self._run.scheduled_at
        return None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)

    @property
    def run(self) -> str:
        """The id of this run, such as `api#3`."""
        return self._run.id

    @property
    def attempt(self) -> int:
        """Which attempt of this run, or of its item, it is, counted from 1 (`retry`)."""
        return self._run.attempt

    @property
    def item(self) -> str | None:
        """The id of the item that is handled (of a batch the first): the same at each attempt. None where there is no queue."""
        return self._run.item


class Context(RunFacts):
    """What a job's function gets for a parameter annotated `Context`: its run, and the way to end well.

    In a thread, the same names block instead of being awaited; in asyncio, they are awaited there.
    """

    @property
    def phase(self) -> AsyncValue[Phase]:
        """The shutdown broadcast: running, draining, stopping, killing. A reader that comes late sees the current one."""
        return self._run.phase

    @property
    def stopping(self) -> bool:
        """True once this run has been asked to end."""
        return self._run.stopping

    async def wait_stopping(self) -> None:
        """Wait until this run is asked to end."""
        await self._run.wait_stopping()

    async def sleep(self, seconds: float) -> bool:
        """Sleep, but not past a stop: False when it ended early because the run was asked to end."""
        with trio.move_on_after(seconds):
            await self._run.wait_stopping()
            return False
        return not self.stopping

    @property
    def deadline(self) -> float | None:
        """Seconds left before it is asked to end because it takes too long (`timeout`, `deadline`); None: no such limit."""
        return self._run.left

    def ready(self) -> None:
        """Say that the job is ready (`ready = { notify = true }`): what comes `after` it may start."""
        self._run.ready("it said so")

    def heartbeat(self) -> None:
        """Say that the job is well (`health = { notify = true }`): silence for longer than `every` is a bad sign."""
        self._run.heartbeat()

    def progress(self, done: float, total: float | None = None) -> None:
        """Say how far the run, or its item, is; shown by `events`."""
        self._run.progress(done, total)

    async def put(self, queue: str, item: Any, **options: Unpack[PutOptions]) -> Receipt:
        """Put an item into a queue of the file; returns when it is as safe as the queue keeps things.

        Raises LookupError for a queue that there is not, BadItem for what is no item, QueueFull where no room came within
        `timeout`, and QueueUnavailable where the engine does not answer.
        """
        return await put(self._resources, queue, item, options)
