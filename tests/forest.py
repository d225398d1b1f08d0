"""Trees in virtual time: what their tests share. Jobs are functions of this process, and every moment is exact."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog.testing
import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.config import Config, DaemonSpec
from supervisor.events import Event, Journal, PhaseChanged
from supervisor.kinds import Context, JobSpec
from supervisor.policies import LimitSpec
from supervisor.queues.spec import QueueSpec
from supervisor.spec import Backoff, Seconds, SupervisorSpec
from supervisor.state import Answer
from supervisor.tree import Supervisor, open_supervisor

SIXTY = Backoff(initial=Seconds(60), factor=1, max=Seconds(60))


class Forest:
    """A running tree, and what has happened in it so far."""

    def __init__(
        self, tree: Supervisor, history: list[tuple[float, Event]], logs: Sequence[Any], base: Path, wall: FakeWall
    ) -> None:
        self.tree = tree
        self.wall = wall
        self.history = history
        self.logs = logs
        self.base = base

    def word(self, name: str) -> str:
        return self.tree.journal.table[name].word

    def words(self, *names: str) -> str:
        return " ".join(f"{name}:{self.word(name)}" for name in names or self.tree.journal.table)

    def happened(self, *kinds: type[Event], name: str | None = None) -> list[tuple[float, str]]:
        """When things of these kinds happened, and to whom (a phase: which)."""
        return [
            (at, event.phase.value if isinstance(event, PhaseChanged) else event.name)  # type: ignore[attr-defined]
            for at, event in self.history
            if isinstance(event, kinds) and (name is None or getattr(event, "name", None) == name)
        ]

    def times(self, kind: type[Event], name: str) -> list[float]:
        return [at for at, _ in self.happened(kind, name=name)]

    def events(self, *kinds: type[Event]) -> list[Any]:
        return [event for _, event in self.history if isinstance(event, kinds)]

    def config(
        self,
        jobs: Mapping[str, JobSpec],
        supervisors: Mapping[str, SupervisorSpec] | None = None,
        limits: Mapping[str, LimitSpec] | None = None,
    ) -> Config:
        was = self.tree.config
        return Config(
            file=None,
            base=self.base,
            daemon=was.daemon,
            jobs=jobs,
            supervisors=supervisors or {},
            limits=limits or {},
            queues=was.queues,
        )


@asynccontextmanager
async def forest(
    base: Path,
    jobs: Mapping[str, JobSpec],
    supervisors: Mapping[str, SupervisorSpec] | None = None,
    limits: Mapping[str, LimitSpec] | None = None,
    *,
    queues: Mapping[str, QueueSpec] | None = None,
    since: str = "2026-01-01 00:00",
    spread: Callable[[float, float], float] = lambda low, high: 1.0,
    **daemon: Any,
) -> AsyncIterator[Forest]:
    """A tree of these jobs. What happens in it is kept with its time; jitter is none. The wall clock shows `since`, UTC."""
    wall = FakeWall(moment(since) - trio.current_time())
    history: list[tuple[float, Event]] = []
    journal = Journal()
    journal.add_sink(lambda event: history.append((trio.current_time(), event)))
    config = Config(
        file=None,
        base=base,
        daemon=DaemonSpec(**daemon),
        jobs=jobs,
        supervisors=supervisors or {},
        limits=limits or {},
        queues=queues or {},
    )
    with structlog.testing.capture_logs() as logs:
        async with open_supervisor(config, journal=journal, spread=spread, wall=wall) as tree:
            yield Forest(tree, history, logs, base, wall)


class FakeWall:
    """A wall clock that goes with Trio's, and can be set."""

    def __init__(self, ahead: float) -> None:
        self._ahead = ahead
        self._was_set = trio.Event()

    def now(self) -> float:
        return self._ahead + trio.current_time()

    def step(self, seconds: float) -> None:
        """Set it so far forward, or back."""
        self._ahead += seconds
        self._was_set.set()

    async def wait_until(self, moment: float) -> None:
        with trio.move_on_at(moment - self._ahead):
            await self._was_set.wait()
        self._was_set = trio.Event()

    def close(self) -> None:
        pass


def moment(text: str) -> float:
    """`2026-01-01 00:00`, UTC or with an offset, in seconds since 1970."""
    when = datetime.datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()


async def settle() -> None:
    """Let everything happen that happens without time passing."""
    before = trio.current_time()
    await wait_all_tasks_blocked()
    assert trio.current_time() == before


def job(call: Callable[..., Any], **keys: Any) -> JobSpec:
    keys |= {key: Seconds(keys[key]) for key in ("every", "grace", "jitter", "timeout", "deadline") if key in keys}
    return JobSpec(call=call, **keys)  # type: ignore[arg-type]


def group(*children: str, **keys: Any) -> SupervisorSpec:
    return SupervisorSpec(children=children, **keys)


async def serve(ctx: Context) -> None:
    """A service that ends as soon as it is asked."""
    await ctx.wait_stopping()


def slow(seconds: float) -> Callable[[Context], Awaitable[None]]:
    """A service that takes so long to end when asked."""

    async def take_its_time(ctx: Context) -> None:
        await ctx.wait_stopping()
        await trio.sleep(seconds)

    return take_its_time


def lasting(seconds: float) -> Callable[[], Awaitable[None]]:
    """Work that takes so long, and hears nothing."""

    async def work() -> None:
        await trio.sleep(seconds)

    return work


async def crash() -> None:
    raise RuntimeError("boom")


def crashing_at(*moments: float) -> Callable[[Context], Awaitable[None]]:
    """A service that fails at each of these moments, and else goes on until asked."""
    left = list(moments)

    async def live(ctx: Context) -> None:
        if not left:
            await ctx.wait_stopping()
        elif await ctx.sleep(left[0] - trio.current_time()):
            left.pop(0)
            raise RuntimeError("boom")

    return live


class Gates:
    """Services that can be made to fail, by name, and to get ready."""

    def __init__(self) -> None:
        self.gates: dict[str, trio.Event] = {}

    def service(self, name: str, *, stops_in: float = 0.0, says_ready: bool = False) -> Callable[[Context], Awaitable[None]]:
        async def live(ctx: Context) -> None:
            failing = self.gates[name] = trio.Event()
            if says_ready:
                ctx.ready()
            async with trio.open_nursery() as nursery:

                async def fail() -> None:
                    await failing.wait()
                    nursery.cancel_scope.cancel(reason="fails")

                nursery.start_soon(fail)
                await ctx.wait_stopping()
                failing = trio.Event()
                await trio.sleep(stops_in)
                nursery.cancel_scope.cancel(reason="stopped")
                return
            raise RuntimeError("boom")

        return live

    def fail(self, name: str) -> None:
        self.gates[name].set()


async def at_once(f: Forest, verb: str, name: str, **options: Any) -> str:
    """What a command comes to that takes no time."""
    before = trio.current_time()
    (order,) = f.tree.order(verb, [name], **options)
    answer = await order.wait()
    assert trio.current_time() == before
    return said(answer)


def said(answer: Answer) -> str:
    return f"{'yes' if answer.ok else 'no'}, {answer.text}"
