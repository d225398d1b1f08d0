"""What is refused of jobs and supervisors together: names, parents, cycles, and sums that do not add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from supervisor.config.reading import Reading, quoted
from supervisor.config.toml_places import Path
from supervisor.errors import did_you_mean
from supervisor.kinds.job import JobSpec
from supervisor.policies import LimitSpec, RetrySpec
from supervisor.queues import Scheme, scheme_of
from supervisor.queues.spec import QueueSpec
from supervisor.sockets import SocketSpec
from supervisor.spec import AutoShutdown, Backoff, ChildSpec, RestartType, Strategy, SupervisorSpec

ROOT = ""
"""The implicit supervisor of what nobody lists. No name is empty."""

Edge = tuple[str, str]
"""Who comes after whom, as the file says it; two neighbours of a list where only its order says so."""

Order = dict[str, dict[str, Edge]]
"""Among the children of one supervisor: later -> earlier -> the line of the file behind it."""


@dataclass(eq=False, repr=False)
class Tree:
    """Jobs and supervisors with the lines between them. `where` tells the place of a key, for a message."""

    jobs: Mapping[str, JobSpec]
    supervisors: Mapping[str, SupervisorSpec]
    reading: Reading
    sockets: Mapping[str, SocketSpec] = field(default_factory=dict)
    limits: Mapping[str, LimitSpec] = field(default_factory=dict)
    queues: Mapping[str, QueueSpec] = field(default_factory=dict)
    where: Callable[..., str] = field(default=lambda *path: "")
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER
    intensity: int | None = None
    period: float = 60.0
    grace: float = 80.0

    @cached_property
    def members(self) -> dict[str, ChildSpec]:
        """Every job and supervisor."""
        return {**self.supervisors, **self.jobs}

    @cached_property
    def parents(self) -> dict[str, str]:
        """Child -> the first supervisor that lists it; ROOT where none does."""
        parents: dict[str, str] = {}
        for name, spec in self.supervisors.items():
            for child in spec.children:
                if child in self.members:
                    parents.setdefault(child, name)
        return {name: parents.get(name, ROOT) for name in self.members}

    @cached_property
    def siblings(self) -> dict[str, list[str]]:
        """Supervisor -> its children, in list order."""
        groups: dict[str, list[str]] = {ROOT: [], **{name: [] for name in self.supervisors}}
        for name, spec in self.supervisors.items():
            groups[name] = [child for child in dict.fromkeys(spec.children) if self.parents.get(child) == name]
        groups[ROOT] = [name for name, parent in self.parents.items() if parent == ROOT]
        return groups

    def path(self, name: str, *keys: str | int) -> Path:
        """The path of a key of a job or supervisor."""
        return ("jobs" if name in self.jobs else "supervisors", name, *keys)

    def engine(self, queue: str) -> Scheme:
        """What keeps a queue; the default where what the file says of it has a fault."""
        broken = self.reading.broken(("queues", queue))
        return scheme_of(QueueSpec().backend if broken else self.queues[queue].backend)

    def lineage(self, name: str) -> list[str]:
        """A name and those above it, ROOT last. The tree has no cycle."""
        line = [name]
        while line[-1] != ROOT:
            line.append(self.parents[line[-1]])
        return line


def check(tree: Tree) -> None:
    """Everything. What builds on a sound tree is only asked of one."""
    _one_namespace(tree)
    _children(tree)
    _significant(tree)
    _give_up(tree)
    _sockets(tree)
    _limits(tree)
    _queues(tree)
    if not _cycle_in_tree(tree):
        orders = _orders(tree)
        sound = [_cycles_in_order(tree, supervisor, order) for supervisor, order in orders.items()]
        if not any(sound):
            _graces(tree, orders)
    _intensities(tree)


def _one_namespace(tree: Tree) -> None:
    for name in tree.supervisors:
        if name in tree.jobs:
            place = tree.where("jobs", name)
            message = f"also the name of a job{place}: jobs and supervisors share one namespace"
            tree.reading.fault(("supervisors", name), message)


def _children(tree: Tree) -> None:
    for name, spec in tree.supervisors.items():
        seen: set[str] = set()
        for index, child in enumerate(spec.children):
            path = tree.path(name, "children", index)
            if child not in tree.members:
                tree.reading.fault(path, f"no job or supervisor {quoted(child)}{did_you_mean(child, tree.members)}")
            elif child in seen:
                tree.reading.fault(path, f'"{child}" is listed twice')
            elif (parent := tree.parents[child]) != name:
                place = tree.where("supervisors", parent, "children")
                tree.reading.fault(path, f'"{child}" is a child of "{parent}" already{place}: a child has one parent')
            seen.add(child)


def _cycle_in_tree(tree: Tree) -> bool:
    """Whether some supervisor is above itself. Nobody has two parents here: each cycle is walked into once."""
    found, done = False, {ROOT}
    for name in tree.members:
        line: dict[str, None] = {}
        while name not in done and name not in line:
            line[name] = None
            name = tree.parents[name]
        if name in line:
            found = True
            cycle = _from_first(tree, list(line)[list(line).index(name) :][::-1])
            tree.reading.fault(tree.path(cycle[0], "children"), f"a cycle in the tree: {_arrows(cycle)}")
        done.update(line)
    return found


def _significant(tree: Tree) -> None:
    for name, spec in tree.members.items():
        if not spec.significant or tree.reading.broken(tree.path(name, "restart")):
            continue
        path = tree.path(name, "significant")
        parent = tree.parents[name]
        auto = tree.supervisors[parent].auto_shutdown if parent != ROOT else tree.auto_shutdown
        restart = spec.restart_type if isinstance(spec, JobSpec) else spec.restart or RestartType.PERMANENT
        if isinstance(spec, JobSpec) and spec.scheduled:
            tree.reading.fault(path, "a schedule has no end that could count")
        elif restart is RestartType.PERMANENT:
            tree.reading.fault(path, 'a permanent child has no end that could count: use restart = "transient" or "temporary"')
        elif auto is AutoShutdown.NEVER:
            table = f"[supervisors.{parent}]" if parent != ROOT else "[daemon]"
            tree.reading.fault(path, f'counts for nothing while auto_shutdown of {table} is "never"')


def _give_up(tree: Tree) -> None:
    for name, spec in tree.jobs.items():
        parent = tree.supervisors.get(tree.parents[name])
        if spec.give_up is not None and parent is not None and parent.strategy is not Strategy.ONE_FOR_ONE:
            strategy = parent.strategy.value
            message = f'not under {strategy} (supervisor "{tree.parents[name]}"): there the group restarts, or fails, as one'
            tree.reading.fault(tree.path(name, "give_up"), message)


def _sockets(tree: Tree) -> None:
    """Sockets that are not there, or that nobody uses; two at one place."""
    used: set[str] = set()
    for name, job in tree.jobs.items():
        for index, socket in enumerate(job.sockets):
            path = tree.path(name, "sockets", index)
            if socket not in tree.sockets:
                tree.reading.fault(path, f"no socket {quoted(socket)} in [sockets]{did_you_mean(socket, tree.sockets)}")
            elif socket in job.sockets[:index]:
                tree.reading.fault(path, f'"{socket}" is listed twice')
            used.add(socket)
    places: dict[str, str] = {}
    for name, spec in tree.sockets.items():
        first = places.setdefault(spec.listen, name)
        if first != name and not tree.reading.broken(("sockets", name)) and not spec.listen.endswith(":0"):
            tree.reading.fault(("sockets", name, "listen"), f'listens where "{first}" does')
        if name not in used:
            tree.reading.warn(("sockets", name), "no job uses it: a job names it in `sockets`")


_PARTS = {"breaker": "breaker", "rate": "rate", "bulkhead": "concurrency"}
"""What a job asks of a limit, and the key of the limit that has it."""


def _limits(tree: Tree) -> None:
    """Limits that are not there, that lack what is asked of them, or that nobody uses."""
    used: set[str] = set()
    for name, job in tree.jobs.items():
        for key, part in _PARTS.items():
            if not isinstance(limit := getattr(job, key), str):
                continue
            used.add(limit)
            if limit not in tree.limits:
                message = f"no limit {quoted(limit)} in [limits]{did_you_mean(limit, tree.limits)}"
                tree.reading.fault(tree.path(name, key), message)
            elif getattr(tree.limits[limit], part) is None and not tree.reading.broken(("limits", limit)):
                place = tree.where("limits", limit)
                tree.reading.fault(tree.path(name, key), f'the limit "{limit}"{place} has no `{part}`')
    for limit in tree.limits:
        if limit not in used and not tree.reading.broken(("limits", limit)):
            message = "no job uses it: a job names it in `breaker`, `rate` or `bulkhead`"
            tree.reading.warn(("limits", limit), message)


def _queues(tree: Tree) -> None:
    """Queues that are not there or that nobody uses, jobs of one queue that do not agree, and what would lose items."""
    handled: dict[str, list[str]] = {name: [] for name in tree.queues}
    filled: dict[str, list[str]] = {name: [] for name in tree.queues}
    for name, job in tree.jobs.items():
        for key, users in (("queue", handled), ("into", filled)):
            queue = getattr(job, key)
            if queue in users:
                users[queue].append(name)
            elif queue is not None:
                message = f"no queue {quoted(queue)} in [queues]{did_you_mean(queue, tree.queues)}"
                tree.reading.fault(tree.path(name, key), message)
        _loses(tree, name, job)
        _ticks(tree, name, job)
    _circles(tree)
    for queue, names in handled.items():
        _in_step(tree, queue, names)
        if not names and not filled[queue]:
            tree.reading.warn(("queues", queue), "no job uses it: a job names it in `queue` or `into`")
        elif not names and not tree.engine(queue).shared:
            tree.reading.warn(("queues", queue), "no job handles its items: a job names it in `queue`")


def _in_step(tree: Tree, queue: str, names: list[str]) -> None:
    """What is a group of items is true of a queue, whoever handles it; how often one is tried had better be."""
    for name in names[1:]:
        mine, theirs = _attempts(tree.jobs[name]), _attempts(tree.jobs[names[0]])
        if mine != theirs:
            message = (
                f'an item has {mine} attempts here, and {theirs} with "{names[0]}" of the same queue: it is dead for whoever '
            )
            message += "has fewer"
            tree.reading.warn(tree.path(name, "retry") if tree.jobs[name].retry is not None else tree.path(name), message)
        if tree.jobs[name].serialize_by != tree.jobs[names[0]].serialize_by:
            first, place = tree.jobs[names[0]].serialize_by, tree.where("jobs", names[0])
            says = f"serialize_by = {quoted(first)}" if first is not None else "no `serialize_by`"
            path = tree.path(name, "serialize_by") if tree.jobs[name].serialize_by is not None else tree.path(name)
            tree.reading.fault(path, f'"{names[0]}"{place} has {says}: the jobs of a queue ("{queue}") must agree')


def _attempts(job: JobSpec) -> int:
    """How often an item is tried."""
    return (job.retry or RetrySpec()).attempts


def _loses(tree: Tree, name: str, job: JobSpec) -> None:
    """Warn where what a durable queue has handed over may be lost."""
    if job.queue is None or job.into is None or not {job.queue, job.into} <= tree.queues.keys():
        return
    if tree.engine(job.queue).durable and not tree.engine(job.into).durable:
        message = f'"{job.into}" is in memory: what it holds is gone with the daemon, and "{job.queue}" knows no more of it'
        tree.reading.warn(tree.path(name, "into"), message)


HANDLED_ONCE = 60.0
"""Seconds by which daemons that share a queue may be apart, and still make one item of a tick."""


def _ticks(tree: Tree, name: str, job: JobSpec) -> None:
    """Warn where several daemons may each make an item of a tick, because the first is forgotten too soon."""
    if not job.ticks or job.queue is None or job.queue not in tree.queues or not tree.engine(job.queue).shared:
        return
    if (kept := tree.queues[job.queue].keep_results) < HANDLED_ONCE:
        message = f'keep_results of "{job.queue}" ({kept:g} s) is short: a daemon that is later than that makes a second item'
        tree.reading.warn(tree.path(name, "cron"), message)


def _circles(tree: Tree) -> None:
    """Warn of what is handed on from queue to queue and comes back to the first."""
    left: Order = {}
    for name, job in tree.jobs.items():
        if job.queue is not None and job.into is not None and {job.queue, job.into} <= tree.queues.keys():
            left.setdefault(job.queue, {}).setdefault(job.into, (name, job.into))
    while left := _knots(left):
        circle = _walk_into_cycle(left)
        at = circle.index(min(circle, key=list(tree.queues).index))
        circle = circle[at:] + circle[:at]
        first, _ = left[circle[0]][circle[1 % len(circle)]]
        message = f"a circle of queues: {_arrows(circle)}: an item goes round until a job of it gives nothing"
        tree.reading.warn(tree.path(first, "into"), message)
        left = {queue: targets for queue, targets in left.items() if queue not in circle}


def _orders(tree: Tree) -> dict[str, Order]:
    """Every `after` lifted to the siblings below the lowest common ancestor, and list order under rest_for_one."""
    orders: dict[str, Order] = {supervisor: {} for supervisor in tree.siblings}
    for name, target, path in _edges(tree):
        if target not in tree.members:
            tree.reading.fault(path, f"no job or supervisor {quoted(target)}{did_you_mean(target, tree.members)}")
        elif problem := _impossible(tree, name, target):
            tree.reading.fault(path, problem)
        else:
            supervisor, later, earlier = _lifted(tree, name, target)
            orders[supervisor].setdefault(later, {}).setdefault(earlier, (name, target))
    for supervisor, spec in tree.supervisors.items():
        if spec.strategy is Strategy.REST_FOR_ONE:
            children = tree.siblings[supervisor]
            for earlier, later in pairwise(children):
                orders[supervisor].setdefault(later, {}).setdefault(earlier, (later, earlier))
    return orders


def _edges(tree: Tree) -> Iterator[tuple[str, str, Path]]:
    for name, spec in tree.members.items():
        for index, target in enumerate(spec.after):
            yield name, target, tree.path(name, "after", index)


def _impossible(tree: Tree, name: str, target: str) -> str:
    if target == name:
        return "it cannot come after itself"
    if target in tree.lineage(name):
        return f'"{target}" is its own supervisor, which is ready only when this one is'
    if name in tree.lineage(target):
        return f'"{target}" is below it, and starts only when it does'
    return ""


def _lifted(tree: Tree, name: str, target: str) -> tuple[str, str, str]:
    """The lowest common ancestor, and its children that hold `name` and `target`."""
    mine, theirs = tree.lineage(name)[::-1], tree.lineage(target)[::-1]
    depth = next(index for index, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other)
    return mine[depth - 1], mine[depth], theirs[depth]


def _cycles_in_order(tree: Tree, supervisor: str, order: Order) -> bool:
    """Report one cycle of each knot; whether there is any."""
    left = _knots(order)
    found = bool(left)
    while left:
        cycle = _from_first(tree, _walk_into_cycle(left))
        edges = [left[later][earlier] for later, earlier in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
        said = next(edge for edge in edges if edge[1] in tree.members[edge[0]].after)
        path = tree.path(said[0], "after", tree.members[said[0]].after.index(said[1]))
        tree.reading.fault(path, f"a cycle in `after`: {_arrows(cycle)}{_lines(tree, cycle, edges)}")
        left = _knots({later: targets for later, targets in left.items() if later not in cycle})
    return found


def _lines(tree: Tree, cycle: list[str], edges: list[Edge]) -> str:
    """The lines of the file behind a cycle, where they are not the cycle itself."""
    texts = [
        f"{later} after {earlier}" if earlier in tree.members[later].after else f"{later} is listed after {earlier}"
        for later, earlier in edges
    ]
    plain = all(edge[0] == later for edge, later in zip(edges, cycle, strict=True))
    return "" if plain and not any("listed" in text for text in texts) else f" ({', '.join(texts)})"


def _knots(order: Order) -> dict[str, dict[str, Edge]]:
    """What is left of an order when all that can be started, one after another, is taken away."""
    waiting = {later: set(targets) for later, targets in order.items()}
    dependants: dict[str, list[str]] = {}
    for later, targets in waiting.items():
        for target in targets:
            dependants.setdefault(target, []).append(later)
    free = [name for name in dependants if name not in waiting]
    while free:
        for later in dependants.get(name := free.pop(), ()):
            waiting[later].discard(name)
            if not waiting[later]:
                free.append(later)
    return {
        later: {target: edge for target, edge in order[later].items() if target in targets}
        for later, targets in waiting.items()
        if targets
    }


def _walk_into_cycle(left: dict[str, dict[str, Edge]]) -> list[str]:
    """Every name left waits for another one left: going on from any of them ends in a cycle."""
    line: dict[str, None] = {}
    name = next(iter(left))
    while name not in line:
        line[name] = None
        name = next(iter(left[name]))
    names = list(line)
    return names[names.index(name) :]


def _from_first(tree: Tree, cycle: list[str]) -> list[str]:
    """The cycle, told from the member that the file names first."""
    first = cycle.index(next(name for name in tree.members if name in cycle))
    return cycle[first:] + cycle[:first]


def _arrows(cycle: list[str]) -> str:
    return " -> ".join([*cycle, cycle[0]])


def _graces(tree: Tree, orders: dict[str, Order]) -> None:
    """Warn when an orderly stop, runs in hand first and then the services in order, may take longer than the daemon's grace."""
    runs = [name for name, spec in tree.jobs.items() if not spec.service]
    drained = max(runs, key=lambda name: tree.jobs[name].grace, default=None)
    names = ([drained] if drained else []) + _slowest_chain(tree, orders)[::-1]
    graces = [tree.jobs[name].grace for name in names]
    if (seconds := sum(graces)) > tree.grace:
        slowest = max(names, key=lambda name: tree.jobs[name].grace)
        total = f"{seconds:g} s" if len(names) == 1 else f"{' + '.join(f'{grace:g}' for grace in graces)} = {seconds:g} s"
        message = f"stopping {', then '.join(names)} may take {total}, more than the daemon's grace of {tree.grace:g} s"
        tree.reading.warn(tree.path(slowest, "grace"), message)


def _slowest_chain(tree: Tree, orders: dict[str, Order]) -> list[str]:
    """The services that take longest to stop one after another, in start order."""
    slowest: dict[str, tuple[float, list[str]]] = {}
    depths = sorted(tree.supervisors, key=lambda name: len(tree.lineage(name)), reverse=True)
    for supervisor in [*depths, ROOT]:
        chains: dict[str, tuple[float, list[str]]] = {}
        for name in _in_start_order(tree.siblings[supervisor], orders[supervisor]):
            seconds, names = max((chains[earlier] for earlier in orders[supervisor].get(name, ())), default=(0.0, []))
            job = tree.jobs.get(name)
            own, below = slowest[name] if job is None else (job.grace, [name]) if job.service else (0.0, [])
            chains[name] = seconds + own, names + below
        slowest[supervisor] = max(chains.values(), default=(0.0, []))
    return slowest[ROOT][1]


def _in_start_order(names: list[str], order: Order) -> list[str]:
    """`names`, each after those it waits for. The order has no cycle."""
    waiting = {name: len(order.get(name, ())) for name in names}
    dependants: dict[str, list[str]] = {}
    for later, targets in order.items():
        for target in targets:
            dependants.setdefault(target, []).append(later)
    free = [name for name in names if not waiting[name]]
    for name in free:
        for later in dependants.get(name, ()):
            waiting[later] -= 1
            if not waiting[later]:
                free.append(later)
    return free


def _intensities(tree: Tree) -> None:
    """Warn of a restart limit that the backoff alone keeps out of reach."""
    groups: dict[str, tuple[int | None, float, Strategy, Backoff]]
    groups = {name: (spec.limit, spec.period, spec.strategy, spec.backoff) for name, spec in tree.supervisors.items()}
    groups[ROOT] = (tree.intensity, tree.period, Strategy.ONE_FOR_ONE, Backoff())
    for name, (limit, period, strategy, own) in groups.items():
        path = tree.path(name, "intensity") if name != ROOT else ("daemon", "intensity")
        children = [tree.members[child].backoff for child in tree.siblings[name] if _restarts(tree.members[child])]
        if limit is None or not children or tree.reading.broken(path[:2]):
            continue
        backoffs = children if strategy is Strategy.ONE_FOR_ONE else [own]  # a group has one backoff, its supervisor's
        waits = [_waits(backoff, period, limit) for backoff in backoffs]
        if sum(len(fitting) for fitting, _ in waits) <= limit:
            tree.reading.warn(path, _out_of_reach(limit, period, max(waits)[1]))


def _restarts(child: ChildSpec) -> bool:
    restart = child.restart_type if isinstance(child, JobSpec) else child.restart
    return restart is not RestartType.TEMPORARY


def _waits(backoff: Backoff, period: float, limit: int) -> tuple[list[float], list[float]]:
    """The shortest waits before `limit` + 1 restarts of one child, the first of which is decided at once.

    First those that fit into `period`, then all (at most a hundred, which is enough to show).
    """
    shortest = 1 - backoff.jitter
    waits, fitting, wait = [0.0], [0.0], float(backoff.initial)
    while len(waits) <= limit and len(waits) < 100:
        waits.append(min(min(wait, backoff.max) * shortest, backoff.reset_after + backoff.initial * shortest))
        wait = min(wait * backoff.factor, backoff.max)
        if sum(waits) <= period:
            fitting.append(waits[-1])
    return fitting, waits


def _out_of_reach(limit: int, period: float, waits: list[float]) -> str:
    shown = " + ".join(f"{wait:.3g}" for wait in waits[1:7]) + (" + ..." if len(waits) > 7 else "")
    return (
        f"never reached: by backoff alone {limit + 1} restarts take at least {shown} = {sum(waits):.4g} s, "
        f"period is {period:g} s; lower intensity, or raise period"
    )
