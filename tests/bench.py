"""A bench for trees in virtual time: jobs that do what a test says, and that note by themselves what happens to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio
from trio.testing import wait_all_tasks_blocked

from supervisor.kinds import Context, JobSpec
from supervisor.probes import Ready
from supervisor.spec import Seconds


class Boom(Exception):
    """What a job of the bench fails with."""


class Note(NamedTuple):
    """What a job has seen happen to itself. `others` were alive at that moment."""

    at: float
    what: str
    job: str
    run: int
    others: frozenset[str]


@dataclass
class Part:
    """How a job behaves. Times are seconds; `ready_in` None: it never says that it is ready."""

    hears: bool = True
    lag: float = 0.0
    """How long it goes on after it was asked to end."""
    stubborn: float = 0.0
    """How long it goes on after it was cancelled."""
    says_ready: bool = False
    ready_in: float | None = 0.0


@dataclass
class Bench:
    """The jobs of a test: `job` makes one, `fail` and `succeed` end its run, `notes` is what they have seen."""

    parts: dict[str, Part] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    runs: dict[str, int] = field(default_factory=dict)
    doubles: list[str] = field(default_factory=list)
    """Names that were started while they were alive: must stay empty."""
    _fates: dict[str, Fate] = field(default_factory=dict)

    @property
    def alive(self) -> set[str]:
        """Whose function is running, by what the functions themselves know."""
        return set(self._fates)

    def job(self, name: str, part: Part | None = None, **keys: Any) -> JobSpec:
        """A job of this name that behaves like `part`."""
        part = self.parts[name] = part or Part()
        ready = Ready(notify=True) if part.says_ready else None
        if "grace" in keys:
            keys["grace"] = Seconds(keys["grace"])
        return JobSpec(call=self._function(name, part), ready=ready, **keys)  # type: ignore[arg-type]

    def fail(self, name: str) -> bool:
        """Have its run raise; False where there is none."""
        return self._end(name, Boom(name))

    def succeed(self, name: str) -> bool:
        """Have its run return; False where there is none."""
        return self._end(name, None)

    def _end(self, name: str, error: Exception | None) -> bool:
        fate = self._fates.get(name)
        if fate is None or fate.cancelled or fate.sealed.is_set():
            return False
        fate.error = error
        fate.sealed.set()
        return True

    def _function(self, name: str, part: Part) -> Callable[..., Awaitable[None]]:
        async def hearing(ctx: Context) -> None:
            await self._live(name, part, ctx)

        async def deaf() -> None:
            await self._live(name, part, None)

        return hearing if part.hears else deaf

    def _note(self, what: str, name: str) -> None:
        self.notes.append(Note(trio.current_time(), what, name, self.runs[name], frozenset(self.alive - {name})))

    async def _live(self, name: str, part: Part, ctx: Context | None) -> None:
        if name in self._fates:
            self.doubles.append(name)
        self.runs[name] = self.runs.get(name, 0) + 1
        fate = self._fates[name] = Fate()
        self._note("start", name)
        try:
            async with trio.open_nursery() as nursery:
                if ctx is not None:
                    nursery.start_soon(self._hear, name, part, ctx, fate)
                    nursery.start_soon(self._get_ready, part, ctx)
                await fate.sealed.wait()
                nursery.cancel_scope.cancel(reason="its fate is sealed")
        except BaseException:
            fate.cancelled = True
            self._note("cancelled", name)
            with trio.CancelScope(shield=True):
                await trio.sleep(part.stubborn)
            raise
        finally:
            del self._fates[name]
            self._note("end", name)
        if fate.error is not None:
            raise fate.error

    async def _hear(self, name: str, part: Part, ctx: Context, fate: Fate) -> None:
        await ctx.wait_stopping()
        self._note("asked", name)
        await trio.sleep(part.lag)
        fate.sealed.set()

    async def _get_ready(self, part: Part, ctx: Context) -> None:
        if part.says_ready:
            await trio.sleep(float("inf") if part.ready_in is None else part.ready_in)
            ctx.ready()


@dataclass
class Fate:
    """How a run is to end, and when it is sealed."""

    sealed: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None
    cancelled: bool = False


async def settle() -> None:
    """Let everything happen that happens without time passing."""
    before = trio.current_time()
    await wait_all_tasks_blocked()
    assert trio.current_time() == before


def exact(low: float, high: float) -> float:
    """No jitter: for `open_supervisor(spread=…)`."""
    return 1.0
