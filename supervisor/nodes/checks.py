"""Whether those who handle a queue take an item, asked before it is put: whoever puts it, a command, a job or a schedule.

Code that the daemon has loaded is asked here. That of process jobs is asked in a process beside a worker of the job, while
there is one. What nobody can be asked about is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from supervisor.errors import BadItem, UnfitItem
from supervisor.kinds import JobSpec
from supervisor.nodes.workers import WorkersNode

if TYPE_CHECKING:
    from supervisor.kinds.payload import ItemFunction
    from supervisor.kinds.process_calls import Calls
    from supervisor.nodes.job import JobNode
    from supervisor.tree import Supervisor

MOST = 1 << 20
"""Bytes of an item that are looked into here: to convert more takes the daemon long, in which it does nothing else."""


class Checks:
    """All queues of a tree, and who handles them."""

    def __init__(self, tree: Supervisor) -> None:
        self._tree = tree
        self._handlers: dict[str, list[tuple[str, JobSpec]]] = {}
        """By queue: the jobs whose functions can be asked."""
        self._loaded: dict[tuple[str, bool], ItemFunction] = {}
        """Functions that were looked at: the daemon keeps the code that it has loaded."""
        self._asked: dict[str, JobNode] = {}
        """By job: whose checker was asked last."""

    def apply(self, jobs: Mapping[str, JobSpec]) -> None:
        """These are the jobs from now on."""
        self._handlers = {}
        for name, spec in jobs.items():
            if spec.queue is not None and spec.call is not None:
                self._handlers.setdefault(spec.queue, []).append((name, spec))

    async def check(self, queue: str, items: Sequence[bytes]) -> None:
        """Look at items, which are JSON. Raises BadItem for the first that a job does not take; `position` says which."""
        for name, spec in self._handlers.get(queue, ()):
            try:
                if spec.kind == "process":
                    await self._ask(name, items)
                else:
                    self._look(spec, items)
            except UnfitItem as unfit:
                bad = BadItem(f"{unfit} (job {name})")
                bad.position = unfit.position
                raise bad from None

    def _look(self, spec: JobSpec, items: Sequence[bytes]) -> None:
        function = self._function(spec)
        if function is None or not function.typed:
            return
        for position, item in enumerate(items):
            if len(item) <= MOST:
                try:
                    function.read(b"[%b]" % item if spec.batch is not None else item)
                except UnfitItem as unfit:
                    unfit.position = position
                    raise

    def _function(self, spec: JobSpec) -> ItemFunction | None:
        from supervisor.kinds.payload import loaded  # only where something is put

        key = (cast("str", spec.call), spec.batch is not None)
        if key not in self._loaded and (function := loaded(*key)) is not None:
            self._loaded[key] = function
        return self._loaded.get(key)

    async def _ask(self, job: str, items: Sequence[bytes]) -> None:
        """Ask beside a worker of the job, the same each time, while it has one."""
        node = self._asked.get(job)
        if node is None or node.pool is None or self._tree.nodes.get(node.name) is not node:
            node = next(self._workers(job), None)
        if node is not None and node.pool is not None:
            self._asked[job] = node
            await cast("Calls", node.pool.handler).check(items)

    def _workers(self, job: str) -> Iterator[JobNode]:
        """Those of its workers that handle items now."""
        node = self._tree.nodes.get(job)
        those = node.children.values() if isinstance(node, WorkersNode) else () if node is None else (node,)
        return (each for each in cast("Iterator[JobNode]", those) if each.pool is not None)
