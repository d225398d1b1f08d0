"""`retry`: another attempt after a failed one.

The wait is the truncated exponential backoff that stamina has, too; full jitter (1) and equal jitter (0.5) are those of
"Exponential Backoff And Jitter" in the AWS Architecture Blog.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from supervisor.errors import Rejected, Retry
from supervisor.policies.failures import Failures, in_one_line, leaves, matcher
from supervisor.policies.layer import Layer, P, T
from supervisor.policies.spec import RetrySpec

USUAL = RetrySpec()

TOLD = 5
"""So many different earlier failures are told in the note of the last one."""


class retry(Layer):
    """Await the function again after a failure, `attempts` times in all.

    Before attempt n + 1 it waits for `initial * factor ** (n - 1)` seconds, at most `max`, of which `jitter` is the part
    that chance may take away. A failure that says when to come back is answered exactly then: `hint(error)` reads that from
    any client's exception, an attribute `retry_after` (as `Rejected` and `Retry` have it) needs no hint.

    Worth another attempt is every `Exception`, or only those of `on`: types, names as in a file, functions that are asked.
    Those of `give_up_on` never are. A group is if each exception in it is. `Retry` always is, and `Rejected`, since then the
    function has not even begun, unless `give_up_on` names them. Cancellation and other BaseExceptions never are.

    The last failure comes out as it is, with a note of those before it. `on_retry(attempt, attempts, wait, error)` hears of
    each attempt to come (from 2) before the wait. `sleep` waits; if it gives False (as `ctx.sleep` does when the job is to
    stop), no further attempt is made.
    """

    def __init__(
        self,
        *,
        attempts: int = USUAL.attempts,
        initial: float = USUAL.initial,
        factor: float = USUAL.factor,
        max: float = USUAL.max,
        jitter: float = USUAL.jitter,
        on: Failures = (),
        give_up_on: Failures = (),
        hint: Callable[[BaseException], float | None] | None = None,
        on_retry: Callable[[int, int, float, Exception], object] | None = None,
        sleep: Callable[[float], Awaitable[object]] = trio.sleep,
        spread: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if attempts < 1 or factor < 1 or not 0 <= jitter <= 1 or not (initial >= 0 and max >= 0):
            raise ValueError("retry: attempts and factor are 1 or more, initial and max 0 or more, jitter is from 0 to 1")
        self.attempts = attempts
        self.initial = initial
        self.factor = factor
        self.max = max
        self.jitter = jitter
        self._on = matcher(on) if on else None
        self._give_up_on = matcher(give_up_on)
        self._hint = hint
        self._on_retry = on_retry
        self._sleep = sleep
        self._spread = spread

    @classmethod
    def from_spec(cls, spec: RetrySpec, **options: Any) -> retry:
        """As a file says it; `options` are the arguments that no file has (`hint`, `on_retry`, `sleep`, `spread`)."""
        return cls(
            attempts=spec.attempts,
            initial=spec.initial,
            factor=spec.factor,
            max=spec.max,
            jitter=spec.jitter,
            on=spec.on,
            give_up_on=spec.give_up_on,
            **options,
        )

    async def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        earlier: dict[str, int] = {}
        for attempt in itertools.count(1):
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                failure = error
            try:
                if not await self._goes_on(attempt, failure):
                    _note(failure, attempt, earlier)
                    raise failure
                reason = in_one_line(failure)
                earlier[reason] = earlier.pop(reason, 0) + 1
            finally:
                del failure  # its traceback holds this frame: together they would live until the garbage is collected
        raise AssertionError("there is no end to counting")

    async def _goes_on(self, attempt: int, error: Exception) -> bool:
        """Wait for the next attempt; False if there is to be none."""
        wait = self.wait_after(attempt, error)
        if wait is None:
            return False
        if self._on_retry is not None:
            self._on_retry(attempt + 1, self.attempts, wait, error)
        return await self._sleep(wait) is not False

    def wait_after(self, attempt: int, error: Exception) -> float | None:
        """Seconds from failed attempt number `attempt` to the next; None if there is to be none."""
        if attempt >= self.attempts or not all(map(self._is_worth_it, leaves(error))):
            return None
        return self._wait(attempt, error)

    def _is_worth_it(self, error: BaseException) -> bool:
        if self._give_up_on(error):
            return False
        return self._on is None or isinstance(error, (Retry, Rejected)) or self._on(error)

    def _wait(self, attempt: int, error: Exception) -> float:
        """Seconds after failed attempt number `attempt`: what the failure asks for (in a group the longest), or the backoff."""
        asked = [wait for leaf in leaves(error) if (wait := self._asked(leaf)) is not None]
        if asked:
            return max(asked)
        wait = self._backoff(attempt)
        return min(max(self._spread(wait * (1 - self.jitter), wait), 0.0), wait)

    def _asked(self, error: BaseException) -> float | None:
        asked = self._hint(error) if self._hint is not None else None
        if asked is None:
            asked = getattr(error, "retry_after", None)
        if isinstance(asked, (int, float)) and 0 <= asked < math.inf:
            return float(asked)
        return None

    def _backoff(self, attempt: int) -> float:
        try:
            return min(self.initial * self.factor ** (attempt - 1), self.max)
        except OverflowError:
            return self.max if self.initial else 0.0


def _note(error: Exception, attempt: int, earlier: dict[str, int]) -> None:
    """Tell with the last failure how the others went, since only this one comes out."""
    if earlier:
        told = [f"{reason} ({times} times)" if times > 1 else reason for reason, times in list(earlier.items())[-TOLD:]]
        error.add_note(f"attempt {attempt}; before it: {'; '.join(told)}")
