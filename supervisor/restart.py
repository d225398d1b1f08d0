"""Who is restarted, when, and who gives up. Pure: time comes in as a number, chance as a function.

The words are OTP's (`supervisor` in Erlang/OTP's stdlib): restart types, strategies, and an intensity that is exceeded by
*more than* N restarts within a period. Backoff and `give_up` are ours.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from supervisor.spec import AutoShutdown, Backoff, RestartType, Strategy
from supervisor.state import Why


class Window:
    """A sliding window that knows when more than `limit` things have happened within `period` seconds.

    An event exactly `period` old still counts, as in OTP. Memory is bounded by `limit`, however fast events come.
    """

    def __init__(self, limit: int, period: float) -> None:
        self.limit = limit
        self.period = period
        self._times: deque[float] = deque(maxlen=limit + 1)

    def add(self, now: float) -> bool:
        """Count one event; True when that makes more than `limit` of them within `period`."""
        self._times.append(now)
        return len(self._times) > self.limit and now - self._times[0] <= self.period

    def count(self, now: float) -> int:
        """How many events count at this moment, as far as they are remembered: one more than `limit` at most."""
        return sum(now - time <= self.period for time in self._times)

    def resized(self, limit: int, period: float) -> Window:
        """A window with other bounds that remembers what it can of this one."""
        new = Window(limit, period)
        new._times.extend(self._times)
        return new


class Delays:
    """The backoff of one child, or of one group: each failure waits longer, until it has been ready long enough."""

    def __init__(self, spread: Callable[[float, float], float] = random.uniform) -> None:
        self._spread = spread
        self._next: float | None = None

    def after_failure(self, spec: Backoff, ready_for: float) -> float:
        """Seconds to wait after a failure of something that had been ready for `ready_for` seconds."""
        if self._next is None or ready_for >= spec.reset_after:
            self._next = spec.initial
        wait = min(self._next, spec.max)
        self._next = min(max(wait, spec.initial) * spec.factor, spec.max) if wait else spec.initial
        return min(wait * self._spread(1 - spec.jitter, 1 + spec.jitter), spec.max)

    def reset(self) -> None:
        """Start again at `initial`: an operator has taken over."""
        self._next = None


NEVER_READY = -1.0


class ReadyTime:
    """How long a group has been ready since its last restart: in the spell that lasts, or else in the one before.

    That one of them has failed, and that the whole is not ready any more, may be heard in either order: it comes to the same.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._lasted = NEVER_READY

    def note(self, ready: bool, now: float) -> None:
        """It is ready, or it is not."""
        if ready and self._since is None:
            self._since = now
        elif not ready and self._since is not None:
            self._lasted, self._since = now - self._since, None

    def take(self, now: float) -> float:
        """The seconds, now that it is restarted; `NEVER_READY` where it has not been ready. Begins anew."""
        ready_for = self._lasted if self._since is None else now - self._since
        self._since, self._lasted = None, NEVER_READY
        return ready_for


def judge(restart: RestartType, failed: bool) -> tuple[bool, Why]:
    """Whether an end that nobody asked for is a failure, and the word for it.

    A permanent child has no end: also a good one is a failure, and is called *exited*.
    """
    if failed:
        return True, Why.FAILED
    if restart is RestartType.PERMANENT:
        return True, Why.EXITED
    return False, Why.COMPLETED


def restarts(restart: RestartType, failure: bool) -> bool:
    """Whether a child of this type is to be restarted after such an end."""
    return failure and restart is not RestartType.TEMPORARY


def significant_end(restart: RestartType, failure: bool) -> bool:
    """Whether a significant child's end for good counts for `auto_shutdown`: transient on success, temporary on any."""
    return restart is RestartType.TEMPORARY or (restart is RestartType.TRANSIENT and not failure)


def shuts_down(auto: AutoShutdown, others_active: bool) -> bool:
    """Whether a supervisor ends by itself, now that one of its significant children has; `others_active`: not the last."""
    return auto is AutoShutdown.ANY_SIGNIFICANT or (auto is AutoShutdown.ALL_SIGNIFICANT and not others_active)


def affected(strategy: Strategy, children: Sequence[str], failed: str) -> tuple[str, ...]:
    """Who is stopped and started again when `failed` fails, in start order."""
    if strategy is Strategy.ONE_FOR_ALL:
        return tuple(children)
    if strategy is Strategy.REST_FOR_ONE:
        return tuple(children[children.index(failed) :])
    return (failed,)


class Precedence:
    """The order among the children of one supervisor: a partial one by `after`, or the list under rest_for_one.

    `before[x]` are the siblings that must be ready before `x` starts, and gone only after it has stopped.
    """

    def __init__(self, strategy: Strategy, children: Iterable[str], before: Mapping[str, Collection[str]]) -> None:
        self._chain = list(children) if strategy is Strategy.REST_FOR_ONE else None
        self._index = {name: at for at, name in enumerate(self._chain or ())}
        self._dependants: dict[str, list[str]] = {}
        for name, targets in before.items():
            for target in targets:
                self._dependants.setdefault(target, []).append(name)

    @property
    def chained(self) -> bool:
        """Whether the list itself is an order."""
        return self._chain is not None

    @property
    def orders(self) -> bool:
        """Whether there is any order at all."""
        return self._chain is not None or bool(self._dependants)

    def earlier(self, name: str) -> Sequence[str]:
        """The siblings that list order alone puts before `name`."""
        return self._chain[: self._index[name]] if self._chain is not None and name in self._index else ()

    def may_stop(self, name: str, alive: Collection[str]) -> bool:
        """Whether nobody who is still alive comes after `name`, directly or through others."""
        if self._chain is not None and any(self._index.get(other, -1) > self._index.get(name, -1) for other in alive):
            return False
        seen = {name}
        stack = [name]
        while stack:
            for dependant in self._dependants.get(stack.pop(), ()):
                if dependant in alive:
                    return False
                if dependant not in seen:
                    seen.add(dependant)
                    stack.append(dependant)
        return True
