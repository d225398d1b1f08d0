"""What a reload does: the difference between two configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from supervisor.config.shapes import Field, table_of
from supervisor.config.tables import Config
from supervisor.kinds.job import JobSpec
from supervisor.spec import ChildSpec, Spec


@dataclass(frozen=True)
class Plan:
    """What a reload does, by name. `moved` and `restarted` are stopped and started again; `changed` are touched live."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def diff(old: Config, new: Config) -> Plan:
    """What a reload from `old` to `new` does. Identity is the name."""
    was, now = {**old.supervisors, **old.jobs}, {**new.supervisors, **new.jobs}
    old_parents, new_parents = old.parents, new.parents
    kept = [name for name in now if name in was and type(now[name]) is type(was[name])]
    moved = [name for name in kept if old_parents.get(name) != new_parents.get(name)]
    differing = {name: _differing(was[name], now[name]) for name in kept if name not in moved}
    shared = _shared_changes(old, new)
    restarted = [
        name
        for name, keys in differing.items()
        if shared(now[name]) or any(key.extra.get("reload") == "restart" for key in keys)
    ]
    return Plan(
        added=tuple(name for name in now if name not in kept),
        removed=tuple(name for name in was if name not in kept),
        moved=tuple(moved),
        restarted=tuple(restarted),
        changed=tuple(name for name, keys in differing.items() if keys and name not in restarted),
        notes=tuple(_notes(old, new)),
    )


def _shared_changes(old: Config, new: Config) -> Callable[[ChildSpec], bool]:
    """Whether a job has to be restarted for what it shares: the environment of `[daemon]`, or where a socket listens."""
    environment = any(key.extra.get("reload") == "children" for key in _differing(old.daemon, new.daemon))
    moved = {name for name, spec in new.sockets.items() if name in old.sockets and old.sockets[name].listen != spec.listen}

    def changed(spec: ChildSpec) -> bool:
        return isinstance(spec, JobSpec) and ((environment and spec.spawns) or not moved.isdisjoint(spec.sockets))

    return changed


def _notes(old: Config, new: Config) -> Iterator[str]:
    for name, before, after in (("daemon", old.daemon, new.daemon), ("log", old.log, new.log)):
        for key in _differing(before, after):
            if key.extra.get("reload") == "daemon":
                yield f"{name}.{key.name}: needs a restart of the daemon; the rest is applied"
            elif key.name not in ("include", "env", "env_file"):
                yield f"{name}.{key.name}: changed live"
    for name in [name for name in new.sockets if name in old.sockets]:
        for key in _differing(old.sockets[name], new.sockets[name]):
            yield f"sockets.{name}.{key.name}: " + ("listens anew" if key.name == "listen" else "changed live")
    for name in [name for name in new.limits if name in old.limits]:
        yield from (f"limits.{name}.{key.name}: changed live" for key in _differing(old.limits[name], new.limits[name]))
    for name in [name for name in new.queues if name in old.queues]:
        for key in _differing(old.queues[name], new.queues[name]):
            live = key.extra.get("reload") != "daemon"
            effect = "changed live" if live else "needs a restart of the daemon; the rest is applied"
            yield f"queues.{name}.{key.name}: {effect}"
    yield from (f"queues.{name}: opened" for name in new.queues if name not in old.queues)
    yield from (f"queues.{name}: closed; what is in it stays" for name in old.queues if name not in new.queues)
    yield from (f"sockets.{name}: opened" for name in new.sockets if name not in old.sockets)
    yield from (f"sockets.{name}: closed" for name in old.sockets if name not in new.sockets)


def _differing(old: Spec, new: Spec) -> list[Field]:
    fields = table_of(type(new)).fields.values()
    return [field for field in fields if not _same(getattr(old, field.attribute), getattr(new, field.attribute))]


def _same(old: Any, new: Any) -> bool:
    """Equality that tells 1, 1.0 and true apart, which a function's `args` may."""
    if type(old) is not type(new) and not (isinstance(old, str) and isinstance(new, str)):
        return False
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(map(_same, old, new))
    return bool(old == new)
