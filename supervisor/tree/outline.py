"""What a configuration says of the tree as a whole: its names in order, who comes after whom, the rules of the root (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from supervisor.config import Config
from supervisor.spec import ChildSpec, SupervisorSpec

if TYPE_CHECKING:
    from supervisor.queues.protocol import Settings


def in_order(config: Config) -> Iterator[str]:
    """All names so that a supervisor comes before its children; within a supervisor in its own order."""
    parents = config.parents

    def below(supervisor: str) -> Iterator[str]:
        yield supervisor
        for child in config.supervisors[supervisor].children:
            if child in config.supervisors:
                yield from below(child)
            else:
                yield child

    for name in (*config.supervisors, *config.jobs):
        if name not in parents:
            yield from below(name) if name in config.supervisors else (name,)


def edges(specs: Mapping[str, ChildSpec], parents: Mapping[str, str]) -> dict[str, dict[str, set[str]]]:
    """For each supervisor ("" is the root): which of its children come after which others, or have below them what does."""
    before: dict[str, dict[str, set[str]]] = {}
    for name, spec in specs.items():
        for target in spec.after:
            above, mine, theirs = _lift(name, target, parents)
            before.setdefault(above or "", {}).setdefault(mine, set()).add(theirs)
    return before


def _lift(name: str, target: str, parents: Mapping[str, str]) -> tuple[str | None, str, str]:
    """An edge between two names, lifted to the siblings below their lowest common ancestor: (ancestor, sibling, sibling)."""
    mine, theirs = _ancestry(name, parents), _ancestry(target, parents)
    while len(mine) > 1 and len(theirs) > 1 and mine[-1] == theirs[-1]:
        above = mine.pop()
        theirs.pop()
        if mine[-1] != theirs[-1]:
            return above, mine[-1], theirs[-1]
    return None, mine[-1], theirs[-1]


def _ancestry(name: str, parents: Mapping[str, str]) -> list[str]:
    """`name`, its supervisor, that one's, up to the one below the root."""
    path = [name]
    while path[-1] in parents:
        path.append(parents[path[-1]])
    return path


def root_spec(config: Config) -> SupervisorSpec:
    """The rules of the implicit root."""
    daemon = config.daemon
    return SupervisorSpec(intensity=daemon.intensity, period=daemon.period, auto_shutdown=daemon.auto_shutdown)


def queue_settings(config: Config) -> dict[str, Settings]:
    """What is true of each queue. Jobs that handle the same one agree on `serialize_by`."""
    if not config.queues:
        return {}
    from supervisor.queues.protocol import Settings  # loaded only where there are queues

    groups = {job.queue: job.serialize_by for job in config.jobs.values() if job.queue is not None and job.serialize_by}
    return {name: Settings(spec=spec, group_by=groups.get(name)) for name, spec in config.queues.items()}
