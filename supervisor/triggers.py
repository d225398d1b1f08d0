"""When runs are due: `every` and `cron`, and what becomes of the moments that nobody could heed. Pure: moments are numbers.

A *tick* is a moment at which a run is due, in seconds: those of `every` are on Trio's clock, those of `cron` on the wall
clock, since 1970. A `Rhythm` knows them all, a `Timetable` which comes next.
"""

from __future__ import annotations

import datetime
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Protocol

MOST = 100
"""So many runs are made at most for ticks that were missed."""

LATE = 60.0
"""Seconds after which a tick of the wall clock has been missed: the clock was set, the machine slept, or we did."""

CORRECTION = 3 * 3600.0
"""Seconds by which a clock that is set back was not adjusted but wrong, as cron has it: what ran in that future is no more."""

NAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
"""What cron calls some times."""


class Rhythm(Protocol):
    """All the ticks of a schedule."""

    def ticks(self, moment: float) -> Iterator[float]:
        """The ticks after `moment`, in order; it may end."""


class Every:
    """Whole intervals from an anchor: however late somebody looks, the next is in step."""

    def __init__(self, interval: float, anchor: float) -> None:
        self._interval = interval
        self._anchor = anchor

    def ticks(self, moment: float) -> Iterator[float]:
        number = math.floor((moment - self._anchor) / self._interval) + 1
        if self._anchor + number * self._interval <= moment:  # the division was rounded down
            number += 1
        while True:
            yield self._anchor + number * self._interval
            number += 1


class Cron:
    """Times of the calendar in a time zone. Raises ValueError, with a sentence for the operator, for what is none.

    As with Debian's cron: a time that an hour or a minute fixes comes once a day, right after the gap where the clock springs
    over it, and the first time where it comes twice; what has a `*` there goes by intervals that are real ones.
    """

    def __init__(self, text: str, timezone: str = "UTC") -> None:
        import cronsim  # only who has a `cron` pays for it

        self._fields = _fields(text)
        self._zone = zone(timezone)
        self._sim = cronsim.CronSim
        try:
            parts = self._sim(self._fields, datetime.datetime(2000, 1, 1)).parts
        except cronsim.CronSimError as error:
            said = str(error).lower()
            raise ValueError(
                'expected five fields (minute hour day month weekday) such as "30 2 * * *", six with the seconds first, or '
                f'a name such as "@daily": {said}'
            ) from None
        self._fixed = not parts[1].startswith("*") and not parts[2].startswith("*")

    def ticks(self, moment: float) -> Iterator[float]:
        last = moment
        for tick in self._fixed_times(moment) if self._fixed else self._intervals(moment):
            if tick > last:
                yield tick
                last = tick

    def _calendar(self, moment: float) -> Iterator[datetime.datetime]:
        """The local times that match, in the order of the calendar, from the hour before `moment` where that comes twice.

        From cronsim we have the calendar alone: what it makes of a clock that springs by half an hour is not right.
        """
        here = datetime.datetime.fromtimestamp(moment, self._zone).replace(tzinfo=None)
        first, second = self._moments(here)
        return self._sim(self._fields, here - datetime.timedelta(seconds=max(second - first, 0)))

    def _moments(self, local: datetime.datetime) -> tuple[float, float]:
        """When it is that late: the first and the second time, mostly the same. For a time in a gap the second is earlier."""
        first, second = (local.replace(tzinfo=self._zone, fold=fold).timestamp() for fold in (0, 1))
        return first, second

    def _fixed_times(self, moment: float) -> Iterator[float]:
        """Each time of the calendar once: the first time; for one in a gap, its end."""
        for local in self._calendar(moment):
            while (moments := self._moments(local))[0] > moments[1]:
                local = local.replace(second=0) + datetime.timedelta(minutes=1)
            yield moments[0]

    def _intervals(self, moment: float) -> Iterator[float]:
        """Each time of the calendar as often as it comes."""
        again: deque[float] = deque()
        for local in self._calendar(moment):
            first, second = self._moments(local)
            while again and again[0] < first:
                yield again.popleft()
            if first <= second:
                yield first
            if first < second:
                again.append(second)


def _fields(text: str) -> str:
    if not text.startswith("@"):
        return text
    if text.lower() == "@reboot":
        raise ValueError('there is no "@reboot": use `once = true`, or `run_on_start`')
    try:
        return NAMES[text.lower()]
    except KeyError:
        raise ValueError(f"expected one of {', '.join(NAMES)}") from None


def zone(name: str) -> datetime.tzinfo:
    """The time zone of that IANA name; `local` is the system's. Raises ValueError where there is none."""
    if name == "UTC":
        return datetime.UTC

    import zoneinfo

    try:
        return _system_zone() if name == "local" else zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError('expected the name of a time zone such as "Europe/Berlin", "UTC" or "local"') from None


def _system_zone() -> datetime.tzinfo:
    import zoneinfo

    try:
        with Path("/etc/localtime").open("rb") as file:
            return zoneinfo.ZoneInfo.from_file(file, key="local")
    except FileNotFoundError:
        return datetime.UTC


def zones() -> set[str]:
    """The names that `zone` knows. Looks through a directory."""
    import zoneinfo

    return {*zoneinfo.available_timezones(), "local"}


def between(rhythm: Rhythm, since: float, until: float, most: int = MOST) -> list[float]:
    """The newest `most` ticks after `since`, up to `until` and with it, in order. Costs by their number, not by the time."""
    width = 1.0
    while True:
        begin = max(since, until - width)
        found = deque(takewhile(lambda tick: tick <= until, rhythm.ticks(begin)), maxlen=most)
        if len(found) == most or begin == since:
            return list(found)
        width *= 4


class Timetable:
    """Which tick comes next, and when: `jitter` delays each by chance, up to so many seconds, and puts none out of step."""

    __slots__ = ("_jitter", "_rhythm", "_spread", "_taken", "next_at", "tick")

    def __init__(
        self, rhythm: Rhythm, now: float, jitter: float = 0.0, spread: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._rhythm = rhythm
        self._jitter = jitter
        self._spread = spread
        self._taken = -math.inf
        self._plan(now)

    def take(self, now: float) -> list[float]:
        """The ticks that have come since the last look, in order, and go on to the next. Of many, the newest `MOST` + 1."""
        if now < self.next_at:
            return []
        came = [self.tick, *between(self._rhythm, self.tick, now)]
        self._taken = came[-1]
        self._plan(self._taken)
        return came

    def skip(self, now: float) -> None:
        """Go on to the first tick after `now`, as if none had come before it."""
        if self.tick <= now:
            self._plan(now)

    def clock_was_set(self, now: float) -> None:
        """Look again for the next tick, where the clock may have been set back. What was taken does not come again.

        A clock that is set back by more than three hours was wrong: what was taken in that future counts for nothing.
        """
        taken = self._taken if self._taken <= now + CORRECTION else -math.inf
        if next(self._rhythm.ticks(max(taken, now)), math.inf) < self.tick:
            self._plan(max(taken, now))

    def _plan(self, since: float) -> None:
        self.tick = next(self._rhythm.ticks(since), math.inf)
        self.next_at = self.tick + (self._spread(0.0, self._jitter) if self._jitter else 0.0)


def heeded(came: Sequence[float], catch_up: str, late: float) -> Sequence[float]:
    """Which of the ticks that have come get a run, where the last of them is so many seconds late.

    `none`: the last, if it is not late. `last`: the last, however late. `all`: each, at most `MOST`.
    """
    if catch_up == "all":
        return came[-MOST:]
    return came[-1:] if catch_up == "last" or late <= LATE else []
