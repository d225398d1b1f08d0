"""The rate limiter: a token bucket, kept as one number: when it will be full again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from types import TracebackType

import trio

from supervisor.errors import RateLimited
from supervisor.policies.layer import Layer, P, T
from supervisor.policies.spec import RateSpec
from supervisor.spec import Rate, Seconds

ROUNDING = 1e-9
"""Seconds by which a wait may be longer than allowed: it is a sum of floats, and one that fits exactly should fit."""


class Bucket:
    """A bucket that holds `burst` tokens and fills at `rate` a second; full at first. Pure: time comes in as a number."""

    def __init__(self, rate: float, burst: int) -> None:
        self.interval = 1 / rate
        self.burst = burst
        self.full_at = -math.inf

    @property
    def due(self) -> float:
        """When there is a token; in the past, if there is one."""
        return self.full_at - (self.burst - 1) * self.interval

    def tokens(self, now: float) -> float:
        """How much is in it."""
        return self.burst - max(self.full_at - now, 0.0) / self.interval

    def has_one(self, now: float) -> bool:
        """Whether there is a whole token."""
        return self.due <= now

    def take(self, now: float, late: float = 0.0) -> None:
        """Take one that is there. `late`: for so long at most it has been as good as taken, and the next one was coming."""
        self.full_at = max(self.full_at, now - late) + self.interval

    def put_back(self) -> None:
        """The last one was not used."""
        self.full_at -= self.interval

    def reshaped(self, rate: float, burst: int, now: float) -> Bucket:
        """Another bucket, with as many tokens of this one as it holds."""
        new = Bucket(rate, burst)
        new.full_at = now + (burst - min(self.tokens(now), burst)) * new.interval
        return new


class _Place:
    """A place in the queue for tokens."""

    __slots__ = ("alarm", "turn", "who")

    def __init__(self, who: str) -> None:
        self.who = who
        self.turn = trio.Event()
        self.alarm = trio.CancelScope()


class RateLimiter(Layer):
    """At most `rate` a second (a number, or "30/m"), of all that share it; after a quiet time, `burst` at once.

    Others wait, first come, first served, until their turn, which is known from the start: whoever would have to wait for
    longer than `within` seconds is rejected at once, with `RateLimited`. As a layer, or `async with limiter:`. It has no task
    and no timer but those of the callers who wait. A cancelled one gives its turn to the next.

    The rate does not drift: a turn that comes late, since the loop was busy, does not delay those after it (by one token;
    after a longer stall it does not make up for all that was missed).
    """

    def __init__(self, rate: float | str, *, burst: int = 1, within: float | None = None, name: str = "") -> None:
        if burst < 1 or not (within or 0) >= 0:
            raise ValueError("RateLimiter: burst is 1 or more, within 0 or more")
        self.name = name
        self.spec = RateSpec(rate=Rate.parse(rate), burst=burst, within=None if within is None else Seconds(within))
        """Its numbers."""
        self._bucket = Bucket(self.spec.rate, burst)
        self._queue: OrderedDict[_Place, None] = OrderedDict()

    @classmethod
    def from_spec(cls, spec: RateSpec, *, name: str = "") -> RateLimiter:
        """As a file says it."""
        return cls(spec.rate, burst=spec.burst, within=spec.within, name=name)

    def configure(self, spec: RateSpec) -> None:
        """New numbers from now on. The tokens stay, as far as there is room for them, and who waits goes on waiting."""
        self.spec = spec
        now = trio.current_time()
        self._bucket = self._bucket.reshaped(spec.rate, spec.burst, now)
        self._serve(now)

    @property
    def tokens(self) -> float:
        """How many could begin now, if nobody waits."""
        return self._bucket.tokens(trio.current_time())

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who waits for a token, in order."""
        return tuple(place.who for place in self._queue)

    @property
    def delay(self) -> float:
        """How many seconds whoever comes now would wait for its turn."""
        return self._delay_at(trio.current_time())

    async def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        now = trio.current_time()
        if not self._took(now):
            await self._take_turn(now, self.spec.within, None)
        return await function(*args, **kwargs)

    async def acquire(self, *, timeout: float | None = None, who: str | None = None) -> None:  # noqa: ASYNC109 (known at once)
        """Take a token. `timeout`: wait for it so many seconds at most, instead of `within`; 0: not at all.

        `who` is shown in `waiting`, by default the task's name.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        now = trio.current_time()
        if self._took(now):
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._take_turn(now, self.spec.within if timeout is None else timeout, who)

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def _took(self, now: float) -> bool:
        if self._queue or not self._bucket.has_one(now):
            return False
        self._bucket.take(now)
        return True

    def _delay_at(self, now: float) -> float:
        return max(self._bucket.due + len(self._queue) * self._bucket.interval - now, 0.0)

    async def _take_turn(self, now: float, longest: float | None, who: str | None) -> None:
        delay = self._delay_at(now)
        if longest is not None and delay > longest + ROUNDING:
            raise self._rejected(delay, longest)
        place = _Place(trio.lowlevel.current_task().name if who is None else who)
        self._queue[place] = None
        self._set_alarm()
        try:
            while place in self._queue:
                with place.alarm:
                    await place.turn.wait()
                place.alarm = trio.CancelScope()
                self._serve(trio.current_time())
        except BaseException:
            self._leave(place)
            raise

    def _serve(self, now: float) -> None:
        """Give the tokens there are to those who have waited longest. Each counts from when it was there."""
        while self._queue and self._bucket.has_one(now):
            place, _ = self._queue.popitem(last=False)
            self._bucket.take(now, late=self._bucket.interval)
            place.turn.set()
        self._set_alarm()

    def _leave(self, place: _Place) -> None:
        if place in self._queue:
            del self._queue[place]
        else:  # it was given its token in the moment in which it was cancelled
            self._bucket.put_back()
        self._serve(trio.current_time())

    def _set_alarm(self) -> None:
        """Wake the first one when its token is there; the others have nothing to wake for."""
        if self._queue:
            next(iter(self._queue)).alarm.deadline = self._bucket.due

    def _rejected(self, delay: float, longest: float) -> RateLimited:
        limit = f"rate limit{self.name and ' '}{self.name} of {self.spec.rate}"
        return RateLimited(f"{limit}: its turn is in {delay:.3g} s, and it may wait {longest:g} s", delay - longest)
