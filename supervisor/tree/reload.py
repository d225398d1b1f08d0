"""Another configuration for a running tree: only what differs is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from supervisor import config as configuration
from supervisor import events
from supervisor.config import Config, Plan
from supervisor.kinds import JobSpec
from supervisor.nodes import JobNode, Node, Order, WorkersNode, scale
from supervisor.spec import ChildSpec
from supervisor.tree.outline import queue_settings, root_spec

if TYPE_CHECKING:
    from supervisor.tree.supervisor import Supervisor


def apply(tree: Supervisor, config: Config, by: str | None) -> tuple[Plan, list[Order]]:
    """See `Supervisor.apply`."""
    configuration.check(config)
    plan = tree.plan(config)
    tree.config = config
    tree.resources = replace(tree.resources, env=config.daemon.env, env_file=config.daemon.env_file)
    tree.resources.sockets.apply(config.sockets)
    tree.limits.apply(config)
    tree.queues.apply(queue_settings(config))
    orders = [_remove(node, by) for name in plan.removed if (node := _configured(tree, name)) is not None]
    tree.complete()
    for name in (*plan.moved, *plan.restarted, *plan.changed):
        node = _configured(tree, name)
        if node is not None and node.removing is None:  # else it is made from the new configuration when its time comes
            orders += _change(tree, node, plan, by)
    _apply_root(tree, config)
    tree.look_after_jobs()
    tree.journal.emit(
        events.Reloaded, by=by, added=plan.added, removed=plan.removed,
        restarted=plan.restarted + plan.moved, changed=plan.changed, notes=plan.notes,
    )  # fmt: skip
    return plan, orders


def _configured(tree: Supervisor, name: str) -> Node | None:
    """The node that the configuration means by that name; one that it does not know may hold the name still."""
    node = tree.nodes.get(name)
    return None if node is None or node.one_off else node


def _remove(node: Node, by: str | None, cause: str = "removed from the configuration") -> Order:
    order = Order(node.name, "stop", by)
    node.orders.append(order)
    node.removing = cause
    assert node.parent is not None
    node.parent.post(node.parent.reconsider, node)
    return order


def _change(tree: Supervisor, node: Node, plan: Plan, by: str | None) -> Iterator[Order]:
    """Give a node its new spec, and its new place."""
    spec = tree.config.supervisors.get(node.name) or tree.config.jobs[node.name]
    supervisor = tree.config.parents.get(node.name)
    assert node.parent is not None
    moves = node.name in plan.moved
    if moves and not tree.stays(supervisor):
        yield _remove(node, by, f"moves to {supervisor}")
        return
    if not _fits(node, spec):
        yield _remove(node, by, "its configuration changed")
        return
    if node.life is not None and (moves or node.name in plan.restarted):
        yield _wait_for_restart(node, by)
    again = "its configuration changed" if node.name in plan.restarted else None
    node.parent.post(node.parent.update, node, spec, again)
    if isinstance(node, JobNode) and isinstance(spec, JobSpec) and spec.grouped:
        node.parent.post(_split, tree, node.name)
    if moves:
        node.moving_to = tree.node_of(supervisor)
        node.parent.post(node.parent.reconsider, node)


def _split(tree: Supervisor, name: str) -> None:
    """A plain job is to have several workers, if it is one still."""
    node = tree.nodes.get(name)
    if isinstance(node, JobNode) and node.removing is None and (spec := tree.config.jobs[name]).grouped:
        scale(node, spec.first_workers)


def _wait_for_restart(node: Node, by: str | None) -> Order:
    order = Order(node.name, "reload", by, after_run=node.runs)
    node.orders.append(order)
    return order


def _apply_root(tree: Supervisor, config: Config) -> None:
    spec = root_spec(config)
    if spec != tree.root.spec:
        tree.root.spec = spec
        tree.root.post(tree.root.respec)


def _fits(node: Node, spec: ChildSpec) -> bool:
    """Whether the node can be what the spec says; one that cannot leaves, and another comes in its place.

    Runs of a schedule that may overlap need workers that are given them, and nothing else has such workers.
    """
    if not isinstance(spec, JobSpec) or not isinstance(node.spec, JobSpec):
        return True
    if spec.scheduled and not spec.overlaps and isinstance(node, WorkersNode):
        return False
    return spec.overlaps == node.spec.overlaps
