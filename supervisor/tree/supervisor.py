"""A running tree: its nodes, what can be read of them, and what can be asked of them."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio_util import AsyncValue

from supervisor import config as configuration
from supervisor import events
from supervisor.children import Child, Usage
from supervisor.config import Config, Plan
from supervisor.errors import ControlError, SupervisorError, did_you_mean
from supervisor.events import Journal
from supervisor.kinds import JobSpec, Outcome, Resources, Run
from supervisor.kinds.function import outdated
from supervisor.kinds.job import for_worker
from supervisor.last_runs import LastRuns
from supervisor.nodes import (
    COMMANDS,
    Alarm,
    Checks,
    JobNode,
    Limits,
    Node,
    OneOff,
    Order,
    Rooms,
    Scales,
    Schedule,
    SupervisorNode,
    Ticker,
    Ticking,
    WorkersNode,
    obey,
    rhythm,
)
from supervisor.output import Outputs
from supervisor.restart import Precedence
from supervisor.spec import NAME, ChildSpec, split_name
from supervisor.state import Answer, Goal, JobStatus, LimitStatus, Phase, ancestry
from supervisor.store import StoreError
from supervisor.tree import reload
from supervisor.tree.outline import edges, in_order, root_spec
from supervisor.tree.phases import Phases
from supervisor.wall import Wall, written
from supervisor.watching import Watching


class Supervisor:
    """A running tree. Not made by hand: `open_supervisor` yields it.

    Everything here belongs to the Trio thread. Commands act at once; the coroutines among the methods then wait for what
    they came to, and cancelling them cancels only the wait.
    """

    def __init__(
        self, config: Config, resources: Resources, journal: Journal, spread: Callable[[float, float], float], wall: Wall
    ) -> None:
        self.config = config
        self.resources = resources
        self.journal = journal
        self.spread = spread
        self.wall = wall
        self.alarm = Alarm(wall, self._look)
        self.last_runs = LastRuns(resources.store)
        assert resources.queues is not None
        self.queues = resources.queues
        self.phase: AsyncValue[Phase] = AsyncValue(Phase.RUNNING)
        self.root_ready: AsyncValue[bool] = AsyncValue(False)
        self.nodes: dict[str, Node] = {}
        self.rooms = Rooms({"thread": config.daemon.threads, "process": config.daemon.processes})
        self.dependants: dict[str, list[Node]] = {}
        self.abandoned = trio.Event()
        """Set when nobody waits any more for what cannot be killed."""
        self.ending = ""
        """Why the tree is ending, in one sentence; empty while it is not."""
        self.failure: SupervisorError | None = None
        """What failed for good, where that is why the tree has ended."""
        self.survivors: tuple[str, ...] = ()
        """What was still alive when the tree gave up waiting for it."""
        self.late: tuple[str, ...] = ()
        """Who did not end in time when the tree ended, and was killed."""
        self._ended = trio.Event()
        self._watching = Watching(lambda job, burst: self._due(job, str(burst)), self._warn)
        self._scales = Scales(resources.children, self._child_of, self._due)
        self._ticking = Ticking(self)
        self._checks = Checks(self)
        self.queues.check = self._checks.check
        self.limits = Limits(self)
        self.limits.apply(config)
        self._one_offs = 0
        """How many there were: the number of a run is never given twice, though the name is."""
        self.root = SupervisorNode(self, "", root_spec(config), Goal.UP)
        self._root_run = Run("", 0, self.root, self.abandoned)
        self.phases = Phases(self, self._root_run)
        self.complete()
        self.look_after_jobs()

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self._ended.is_set()

    @property
    def outputs(self) -> Outputs:
        """The captured output of children."""
        return self.resources.outputs

    # ---- building ----

    def complete(self) -> None:
        """Make what the configuration names and the tree lacks. Where an old one of that name is still leaving: later."""
        for name in in_order(self.config):
            if name not in self.nodes and self.stays(self.config.parents.get(name)):
                self._make(name, self.config)
        self.link()

    def stays(self, supervisor: str | None) -> bool:
        """Whether there is such a supervisor, and it is not on its way out of the tree."""
        node = self.root if supervisor is None else self.nodes.get(supervisor)
        return isinstance(node, SupervisorNode) and node.removing is None

    def _make(self, name: str, config: Config) -> None:
        """Create a node and its row, and hand it to its supervisor."""
        node: Node
        if name in config.supervisors:
            node = SupervisorNode(self, name, config.supervisors[name], Goal.UP)
        else:
            spec = config.jobs[name]
            made = WorkersNode if spec.grouped else JobNode
            node = made(self, name, spec, Goal.UP if spec.start == "auto" else Goal.DOWN)
        parent = config.parents.get(name)
        self.add(node, parent)
        self.node_of(parent).adopt(node)
        if isinstance(node, WorkersNode):
            node.scale(node.spec.first_workers)

    def add(self, node: Node, supervisor: str | None) -> None:
        """Know a node from now on, and begin its row."""
        self.nodes[node.name] = node
        node.emit(
            events.Added,
            kind=node.kind, supervisor=supervisor, goal=node.goal, cause=node.goal_cause, description=node.description,
        )  # fmt: skip

    def rename(self, node: Node, name: str, supervisor: str) -> None:
        """Know a node by another name, under another supervisor: its row, and what is kept of its output."""
        node.emit(events.Renamed, to=name, supervisor=supervisor)
        self.outputs.rename(node.name, name)
        node.name = name
        self.nodes[name] = node

    def supervisors(self) -> list[SupervisorNode]:
        """The root and all others, also the groups of workers."""
        return [self.root, *(node for node in self.nodes.values() if isinstance(node, SupervisorNode))]

    def node_of(self, supervisor: str | None) -> SupervisorNode:
        """The supervisor of that name; None: the root."""
        if supervisor is None:
            return self.root
        node = self.nodes[supervisor]
        assert isinstance(node, SupervisorNode)
        return node

    def link(self) -> None:
        """Work out who depends on whom, and the order among the children of each supervisor. Who is leaving still counts."""
        config = self.config
        leaving = {name: node for name, node in self.nodes.items() if node.removing is not None}
        specs = {name: node.spec for name, node in leaving.items()} | {**config.supervisors, **config.jobs}
        parents = {name: node.parent.name for name, node in leaving.items() if node.parent is not None and node.parent.name}
        parents |= config.parents
        self.dependants = {}
        for name, spec in specs.items():
            for target in spec.after if name in self.nodes else ():
                self.dependants.setdefault(target, []).append(self.nodes[name])
        before = edges(specs, parents)
        self.arrange()
        order = {name: at for at, name in enumerate(in_order(config))}
        for supervisor in self.supervisors():
            spec = config.supervisors.get(supervisor.name, supervisor.regime)
            names = dict.fromkeys((*spec.children, *sorted(supervisor.children, key=lambda name: order.get(name, len(order)))))
            supervisor.arrange(Precedence(spec.strategy, names, before.get(supervisor.name, {})), list(names))

    def arrange(self) -> None:
        """Bring nodes and rows into the order of the file, the workers of a job after it."""
        order = {name: at for at, name in enumerate(in_order(self.config))}

        def place(name: str) -> tuple[int, int]:
            job, number = split_name(name)
            return order.get(job, len(order)), -1 if number is None else number

        self.nodes = {name: self.nodes[name] for name in sorted(self.nodes, key=place)}
        self.journal.arrange(self.nodes)

    def forget(self, node: Node) -> None:
        """Drop a node that has left the tree. What was named like it since then, or belongs under that, can come now."""
        del self.nodes[node.name]
        self.queues.forget(node.name)
        if node.schedule is not None:
            node.schedule.disarm()
            node.schedule.forget()
        if node.one_off:
            self.outputs.discard(node.name)
            self.limits.forget(node.name)
        if node.name in self.config.jobs or node.name in self.config.supervisors:
            self.complete()

    def tell_dependants(self, name: str) -> None:
        """Have those that wait for `name` look again."""
        for node in self.dependants.get(name, ()):
            if node.parent is not None:
                node.parent.post(node.parent.touch, node)

    def wall_time(self, when: float | None) -> str | None:
        """A moment of Trio's clock as people write it."""
        return None if when is None else written(self.wall.now() + when - trio.current_time())

    # ---- reading ----

    def status(self, *patterns: str) -> list[JobStatus]:
        """The rows of these names and globs, or of all, in the order of the file."""
        names = self.resolve(patterns) if patterns else self.journal.table
        return [self.journal.table[name] for each in names for name in (each, *(self._workers(each) if patterns else ()))]

    def _workers(self, name: str) -> Iterator[str]:
        node = self.nodes[name]
        if isinstance(node, WorkersNode):
            yield from node.children

    def resolve(self, patterns: Sequence[str]) -> list[str]:
        """Exact names and globs to names, in the order of the tree. ControlError names what matches nothing.

        A job stands for its workers: where a glob matches both, it is the job that is meant.
        """
        found: dict[str, None] = {}
        for pattern in patterns:
            glob = any(char in pattern for char in "*?")
            names = [name for name in self.nodes if fnmatch.fnmatchcase(name, pattern)] if glob else [pattern]
            if not names or not all(name in self.nodes for name in names):
                queue = "; it is a queue: use `supervisor queue`" if pattern in self.queues.names else ""
                near = did_you_mean(pattern, self.nodes, "'")
                raise ControlError(f"no job or supervisor matches {pattern!r}{near}{queue}", ControlError.NO_SUCH_NAME)
            matched = set(names)
            found.update({name: None for name in names if split_name(name)[0] not in matched - {name}})
        return list(found)

    async def usage(self) -> dict[str, Usage]:
        """What each job's processes use at this moment, with all that came of them; of a supervisor: what those below it do.

        One walk of /proc, beside the loop. A job without a process is not in it.
        """
        by_pid = {child.pid: usage for child, usage in (await self.resources.children.usage()).items()}
        table = self.journal.table
        found: dict[str, Usage] = {}
        for row in table.values():
            if row.pid is not None and (used := by_pid.get(row.pid)) is not None:
                for name in ancestry(table, row):
                    found[name] = _sum(found.get(name, Usage()), used)
        return found

    def limit_status(self, *patterns: str) -> list[LimitStatus]:
        """How the limits of these names and globs stand, or all: those of `[limits]`, and those that jobs have to themselves.

        Raises ControlError for what matches nothing.
        """
        try:
            return self.limits.status(*patterns)
        except LookupError as error:
            pattern, known = error.args
            near = did_you_mean(pattern, known, "'")
            raise ControlError(f"no limit matches {pattern!r}{near}", ControlError.NO_SUCH_NAME) from None

    async def wait_running(self) -> None:
        """Wait until every job that starts by itself is ready (a `once` job: has succeeded)."""
        await self.root_ready.wait_value(True)

    async def wait_stopped(self) -> None:
        """Wait until the tree has ended."""
        await self._ended.wait()

    # ---- commands ----

    def order(self, verb: str, names: Sequence[str], *, by: str | None = None, **options: Any) -> list[Order]:
        """Obey `verb` for each of `names` (globs allowed; for `cancel` also ids of runs), at once.

        Raises ControlError for an unknown name before anything is done. What each came to is the order's `wait`.
        """
        if verb not in COMMANDS:
            raise ControlError(f"unknown verb {verb!r}")
        if verb == "cancel":
            return [
                self._one("cancel", name.partition("#")[0], by, run=name if "#" in name else None) for name in self._runs(names)
            ]
        resolved = self.resolve(names)
        if verb == "start" and options.get("with_after"):
            resolved = self._with_after(resolved)
        return [self._one(verb, name, by, **options) for name in resolved]

    def _runs(self, names: Sequence[str]) -> list[str]:
        runs = [name for name in names if "#" in name]
        self.resolve([run.partition("#")[0] for run in runs])
        return runs + self.resolve([name for name in names if "#" not in name])

    def _with_after(self, names: Sequence[str]) -> list[str]:
        """`names` and, before each, what it waits for."""
        wanted: dict[str, None] = {}

        def add(name: str) -> None:
            if name not in wanted:
                for target in self.nodes[name].spec.after:
                    if not self.nodes[target].satisfied:
                        add(target)
                wanted[name] = None

        for name in names:
            add(name)
        return list(wanted)

    def _one(self, verb: str, name: str, by: str | None, **options: Any) -> Order:
        node = self.nodes[name]
        order = Order(name, verb, by)
        if verb in ("restart", "reload") and (stale := _stale(node.spec)):
            order.note = stale
            self.journal.emit(events.Warned, text=f"{name}: {stale}", by=by)
        assert node.parent is not None
        node.parent.post(obey, node.parent, node, order, options)
        return order

    async def _obeyed(self, verb: str, names: Sequence[str], **options: Any) -> list[Answer]:
        answers = [await order.wait() for order in self.order(verb, names, **options)]
        bad = [f"{answer.name}: {answer.text}" for answer in answers if not answer.ok]
        if bad:
            raise ControlError("; ".join(bad))
        return answers

    async def start(self, *names: str, with_after: bool = False) -> None:
        """Start these, and wait until each is ready. ControlError if one ends before, is refused or overtaken."""
        await self._obeyed("start", names, with_after=with_after)

    async def stop(self, *names: str, now: bool = False) -> None:
        """Stop these, and wait until nothing of them is alive. `now` skips the grace."""
        await self._obeyed("stop", names, now=now)

    async def restart(self, *names: str, at_once: bool = False) -> None:
        """Stop and start these, and wait until each is ready again.

        A job with several workers is renewed one worker at a time, the next when the last is ready, unless `at_once`. A new
        worker that does not get ready ends that, and the others keep running: ControlError.
        """
        await self._obeyed("restart", names, at_once=at_once)

    async def scale(self, name: str, workers: int) -> None:
        """Run so many workers of a service, and wait until new ones are ready and others gone. The rest is not touched."""
        await self._obeyed("scale", [name], workers=workers)

    async def run_now(self, *names: str) -> None:
        """Make one run of each of these now, and wait for its end. ControlError if one fails."""
        await self._obeyed("run-now", names)

    async def pause(self, *names: str) -> None:
        """No new runs of these until `resume`."""
        await self._obeyed("pause", names)

    async def resume(self, *names: str) -> None:
        """Take paused schedules up again, in step with where they began."""
        await self._obeyed("resume", names)

    async def cancel(self, *names: str) -> None:
        """End the runs in hand of these names, or these runs; no failure, no retry."""
        await self._obeyed("cancel", names)

    # ---- jobs that no configuration names ----

    async def execute(self, spec: JobSpec, *, name: str | None = None, by: str | None = None) -> Outcome:
        """Run a job that no configuration names, once; how it ended. Raises ControlError as `begin` does.

        Cancelled, it asks the job to end, and waits until nothing of it is alive.
        """
        async with self.executing(spec, name=name, by=by) as job:
            return await job.wait()

    @asynccontextmanager
    async def executing(self, spec: JobSpec, *, name: str | None = None, by: str | None = None) -> AsyncIterator[OneOff]:
        """Run a job that no configuration names for as long as the block lasts: on leaving it is stopped, with its grace."""
        job = self.begin(spec, name=name, by=by)
        try:
            yield job
        finally:
            if self.nodes.get(job.name) is job:
                self.order("stop", [job.name], by=by)
            with trio.CancelScope(shield=True):
                await job.wait()

    def begin(self, spec: JobSpec, *, name: str | None = None, by: str | None = None) -> OneOff:
        """Add a job under the root that no configuration names, and return at once.

        It runs once, under the same rules as all: it is seen in `status`, obeys commands, is left alone by a reload, and has
        its grace in a shutdown. At its end it leaves the tree. Raises ControlError for a name that is taken or is none, for
        a key that makes no sense for it, and where the tree is ending.
        """
        name = name or self.free_name()
        if self.ending:
            raise ControlError(f"the daemon is stopping: {self.ending}")
        if not NAME.fullmatch(name):
            raise ControlError(f'{name!r}: a name has only letters, digits, "-" and "_", and at most 64 of them')
        if name in self.nodes:
            raise ControlError(f"{name!r} is the name of another job or supervisor: choose another, or leave it out")
        for limit in self.limits.lacking(spec):
            raise ControlError(f"{name}: no limit {limit!r} in [limits]")
        job = OneOff(self, name, spec, f"executed by {by}" if by else "executed")
        job.runs, self._one_offs = self._one_offs, self._one_offs + 1
        self.add(job, None)
        self.root.adopt(job)
        return job

    def free_name(self) -> str:
        """A name for a job that has none: the first of `exec-1`, `exec-2` and so on that nobody has now."""
        return next(name for number in itertools.count(1) if (name := f"exec-{number}") not in self.nodes)

    # ---- reload ----

    def plan(self, config: Config) -> Plan:
        """What `apply` would do."""
        return configuration.diff(self.config, config)

    def apply(self, config: Config, *, by: str | None = None) -> tuple[Plan, list[Order]]:
        """Put a new configuration in force: only what differs is touched. At once; what it set going goes on by itself.

        Raises SpecError, with nothing changed, where one that was built in Python has a fault.
        """
        return reload.apply(self, config, by)

    # ---- what makes a fresh run due ----

    def look_after_jobs(self) -> None:
        """Watch files and weigh runs as the configuration in force says; not the files that the daemon writes itself."""
        config = self.config
        runners = [(name, *split_name(name)) for name, node in self.nodes.items() if isinstance(node, JobNode)]
        jobs = {name: for_worker(config.jobs[job], number or 0) for name, job, number in runners if job in config.jobs}
        recycled = {name: job.recycle for name, job in jobs.items() if job.recycle is not None}
        self._scales.weigh({name: recycle.memory for name, recycle in recycled.items() if recycle.memory is not None})
        outputs = (job.output for job in jobs.values() if job.output.startswith("/"))
        apart = (str(config.state_dir), *((config.log.file,) if config.log.file else ()), *dict.fromkeys(outputs))
        self._ticking.apply(config.jobs)
        self._checks.apply(config.jobs)
        self._watching.watch({name: job.watch for name, job in config.jobs.items() if job.watch}, config.base, apart)

    def _look(self, schedule: Schedule) -> None:
        """A tick on the wall clock may have come."""
        if isinstance(node := schedule.node, WorkersNode):
            node.post(node.look_at_clock)
        elif isinstance(node, Ticker):
            node.look()
        elif node.parent is not None:
            node.parent.post(node.parent.look, node)

    def _warn(self, text: str) -> None:
        self.journal.emit(events.Warned, text=text)

    def _child_of(self, job: str) -> Child | None:
        node = self.nodes.get(job)
        pid = node.life.run.pid if node is not None and node.life is not None else None
        return None if pid is None else self.resources.children.get(pid)

    def _due(self, job: str, cause: str) -> None:
        node = self.nodes.get(job)
        if isinstance(node, JobNode):
            node.recycle(cause)
        elif node is not None:
            self.order("restart", [job], cause=cause)

    # ---- the end ----

    def end(self, cause: str, failure: SupervisorError | None = None) -> None:
        """End for a reason of the tree's own: the root gave up, an essential job ended, an automatic shutdown."""
        if not self.ending:
            self.failure = failure
            self.shutdown(cause)

    def shutdown(self, cause: str, *, by: str | None = None, kill: bool = False) -> None:
        """Begin the orderly stop: draining, stopping, killing. Again with `kill`: go straight to killing. Never waits."""
        if not self.ending:
            self.ending = f"{cause} ({by})" if by else cause
            self.phases.begin()
        if kill:
            self.phases.hurry(cause)

    async def live(self, last_resort: Callable[[], None] | None) -> None:
        """The tree's life: the root's loop, and the task that ends it."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.phases.run, last_resort)
                nursery.start_soon(self._watching.run)
                nursery.start_soon(self._scales.run)
                nursery.start_soon(self.alarm.run)
                self._ticking.begin(nursery)
                await self.root.body(self._root_run)
                nursery.cancel_scope.cancel(reason="the root has ended")
        finally:
            for node in self.nodes.values():  # none, unless the tree has failed
                if isinstance(node, OneOff):
                    node.over(Outcome(reason="the tree has ended without it", failed=True))
            self._ended.set()

    async def load_last_runs(self) -> None:
        """Learn what the daemon before this one has run, where a job wants to catch up."""
        jobs = {name: job for name, job in self.config.jobs.items() if (job.scheduled or job.ticks) and job.catch_up != "none"}
        if jobs:
            schedules = {name: rhythm(job) for name, job in jobs.items() if job.start == "auto"}
            try:
                await self.last_runs.load(schedules, self.wall.now())
            except StoreError as error:
                self._warn(f"no run is caught up that was missed: {error}")

    def was_late(self, name: str) -> None:
        """Remember, where the tree is ending, that this one needed more than its grace."""
        if self.ending and name not in self.late:
            self.late += (name,)


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(one.memory + other.memory, one.cpu + other.cpu, one.processes + other.processes)


def _stale(spec: ChildSpec) -> str:
    """What to say of a job whose code in this process is not what its file says by now; empty where it is."""
    if not isinstance(spec, JobSpec) or spec.call is None or spec.spawns or (file := outdated(spec.call)) is None:
        return ""
    return (
        f"{file} has changed since the daemon loaded it, and a restart does not load it anew: restart the daemon, "
        'or give it kind = "process"'
    )
