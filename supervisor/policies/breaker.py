"""The circuit breaker: after too many failures nothing is tried for a while, then one call at a time.

The words are Michael Nygard's ("Release It!"): closed, calls go through; open, they are rejected; half-open, one at a time
is let through on trial.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal

import trio

from supervisor.errors import BreakerOpen, Rejected
from supervisor.policies.failures import Failures, in_one_line, leaves, matcher
from supervisor.policies.layer import Layer, P, T
from supervisor.policies.spec import BreakerSpec
from supervisor.restart import Window
from supervisor.spec import Seconds

USUAL = BreakerSpec()


class BreakerState(enum.Enum):
    """Whether calls go through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


OnChange = Callable[[BreakerState, BreakerState, str], object]
"""Hears of each change: from, to, and why. Synchronous, and must not raise."""


class Circuit:
    """The decisions of a breaker. Pure: time comes in as a number.

    Every call asks `admit`, and says later what came of it, with the ticket it got: what began in an earlier state says
    nothing of this one, and is not heard.
    """

    def __init__(self, spec: BreakerSpec, name: str = "", on_change: OnChange | None = None) -> None:
        self.spec = spec
        self.name = name
        self.state = BreakerState.CLOSED
        self.cause = ""
        """Why it is in this state."""
        self.opened_at: float | None = None
        self.passed = 0
        """How many trials in a row have succeeded."""
        self.ticket = 0
        self._on_change = on_change
        self._trial = False
        self._window = self._new_window()

    def configure(self, spec: BreakerSpec) -> None:
        """New numbers from now on; what has happened stays known."""
        self.spec = spec
        self._window = self._window.resized(spec.failures - 1, spec.within)

    @property
    def trial_at(self) -> float | None:
        """When the next trial may be made; None while it is closed."""
        return None if self.opened_at is None else self.opened_at + self.spec.open_for

    def counted(self, now: float) -> int:
        """How many failures count at this moment."""
        return self._window.count(now)

    def admit(self, now: float) -> int:
        """Let a call begin, and give it its ticket. Raises BreakerOpen, with a hint of when to come back."""
        if self.state is BreakerState.OPEN:
            assert self.trial_at is not None
            if now < self.trial_at:
                raise self._rejected(f"open: {self.cause}", self.trial_at - now)
            self._become(BreakerState.HALF_OPEN, f"it was open for {self.spec.open_for:g} s")
        if self._trial:  # if it fails, that is how long it will be open again
            raise self._rejected("half-open, and its trial is under way", self.spec.open_for)
        self._trial = self.state is BreakerState.HALF_OPEN
        return self.ticket

    def succeeded(self, ticket: int) -> None:
        """A call ended well."""
        if ticket == self.ticket and self.state is BreakerState.HALF_OPEN:
            self._trial = False
            self.passed += 1
            if self.passed >= self.spec.successes:
                self.opened_at = None
                self._become(BreakerState.CLOSED, f"{self.passed} successes in a row")

    def failed(self, ticket: int, now: float, cause: str) -> None:
        """A call failed."""
        if ticket != self.ticket:
            return
        if self.state is BreakerState.HALF_OPEN:
            self._open(now, f"its trial failed: {cause}")
        elif self._window.add(now):
            self._open(now, f"{self.spec.failures} failures within {self.spec.within:g} s, the last: {cause}")

    def freed(self, ticket: int) -> None:
        """A call ended without saying anything: its place is free. Harmless after one of the others."""
        if ticket == self.ticket:
            self._trial = False

    def _open(self, now: float, cause: str) -> None:
        self.opened_at = now
        self._become(BreakerState.OPEN, cause)

    def _become(self, state: BreakerState, cause: str) -> None:
        before, self.state, self.cause = self.state, state, cause
        self.ticket += 1
        self.passed = 0
        self._trial = False
        self._window = self._new_window()
        if self._on_change is not None:
            self._on_change(before, state, cause)

    def _new_window(self) -> Window:
        return Window(self.spec.failures - 1, self.spec.within)

    def _rejected(self, why: str, retry_after: float) -> BreakerOpen:
        return BreakerOpen(f"circuit breaker{self.name and ' '}{self.name} is {why}", retry_after)


class CircuitBreaker(Layer):
    """`failures` within `within` seconds open it; after `open_for` seconds, `successes` trials in a row close it.

    Whoever holds it shares it: the failures of all count together. A rejected call raises `BreakerOpen` with `retry_after`:
    the time until the next trial, or, while the one trial is under way, `open_for`.

    A failure is an exception that `counts`: types, names as in a file, functions that are asked; a group if one in it does.
    Any other exception is an answer, as good as a success. `Cancelled` and `Rejected` say nothing; a trial that ends so
    makes room for the next. What began before the last change of state is not counted.
    """

    def __init__(
        self,
        *,
        failures: int = USUAL.failures,
        within: float = USUAL.within,
        open_for: float = USUAL.open_for,
        successes: int = USUAL.successes,
        counts: Failures = Exception,
        name: str = "",
        on_change: OnChange | None = None,
    ) -> None:
        if failures < 1 or successes < 1 or not (within > 0 and open_for > 0):
            raise ValueError("CircuitBreaker: failures and successes are 1 or more, within and open_for above 0")
        spec = BreakerSpec(failures=failures, within=Seconds(within), open_for=Seconds(open_for), successes=successes)
        self._circuit = Circuit(spec, name, on_change)
        self._counts = matcher(counts)

    @classmethod
    def from_spec(cls, spec: BreakerSpec, *, name: str = "", on_change: OnChange | None = None) -> CircuitBreaker:
        """As a file says it."""
        return cls(
            failures=spec.failures,
            within=spec.within,
            open_for=spec.open_for,
            successes=spec.successes,
            name=name,
            on_change=on_change,
        )

    def configure(self, spec: BreakerSpec) -> None:
        """New numbers from now on; its state and the failures it knows of stay."""
        self._circuit.configure(spec)

    @property
    def spec(self) -> BreakerSpec:
        """Its numbers."""
        return self._circuit.spec

    @property
    def state(self) -> BreakerState:
        """Closed, open or half-open. It gets half-open by the first call after `trial_at`, not by time alone."""
        return self._circuit.state

    @property
    def cause(self) -> str:
        """Why it is in this state; empty as long as it has never changed."""
        return self._circuit.cause

    @property
    def opened_at(self) -> float | None:
        """When it opened last, on Trio's clock; None while it is closed."""
        return self._circuit.opened_at

    @property
    def trial_at(self) -> float | None:
        """From when on a trial is let through, on Trio's clock; None while it is closed."""
        return self._circuit.trial_at

    @property
    def failures(self) -> int:
        """How many failures count at this moment; as many as its limit open it."""
        return self._circuit.counted(trio.current_time())

    @property
    def successes(self) -> int:
        """How many trials in a row have succeeded; as many as its limit close it."""
        return self._circuit.passed

    async def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.attempt():
            return await function(*args, **kwargs)

    def attempt(self) -> AbstractContextManager[None]:
        """A block as one call: `with breaker.attempt(): ...`. Entering it raises BreakerOpen where a call would."""
        return _Attempt(self._circuit, self._counts)


class _Attempt:
    """One call: asks to be let through, and says what came of it."""

    __slots__ = ("_circuit", "_counts", "_ticket")

    def __init__(self, circuit: Circuit, counts: Callable[[BaseException], bool]) -> None:
        self._circuit = circuit
        self._counts = counts

    def __enter__(self) -> None:
        circuit = self._circuit
        closed = circuit.state is BreakerState.CLOSED
        self._ticket = circuit.ticket if closed else circuit.admit(trio.current_time())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if error is None and self._circuit.state is BreakerState.CLOSED:
            return False  # nothing to say, nothing held: the usual case is cheap
        try:
            if error is None:
                self._circuit.succeeded(self._ticket)
            elif isinstance(error, Exception):
                self._judge(error)
        finally:
            self._circuit.freed(self._ticket)
        return False

    def _judge(self, error: Exception) -> None:
        told = [leaf for leaf in leaves(error) if not isinstance(leaf, Rejected)]
        if any(map(self._counts, told)):
            self._circuit.failed(self._ticket, trio.current_time(), in_one_line(error))
        elif told:
            self._circuit.succeeded(self._ticket)
