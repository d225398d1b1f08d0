"""Who is measured when: every driver in turn, several times over, and once more what did not hold still."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from benchmarks.capture import SHAPES, Writer, measure_capture
from benchmarks.children import Child, Failed
from benchmarks.drivers import DRIVERS
from benchmarks.drivers.driver import clean_environment
from benchmarks.life import STORM_CHILDREN, Pace, Samples, measure_life, measure_long_storm, measure_storm
from benchmarks.processes import end_everything
from benchmarks.tasks import MANY, WAYS, measure_tasks

LIFE = ("boot", "stop", "restart", "all-back", "memory", "idle", "status", "cli")
"""What is measured in a life."""

MEASURES = (*LIFE, "storm", "throttled-storm", "long-storm", "capture", "tasks")

CHILDREN = {"storm": STORM_CHILDREN, "throttled-storm": STORM_CHILDREN, "long-storm": STORM_CHILDREN, "interpreter": 0} | {
    f"capture-{shape.key}": shape.children for shape in SHAPES
}
"""How many children there are in what is no life."""

NOISY = 1.5
"""Where the largest of the runs' results is more than this times the smallest, the life is measured again."""

STEADY = ("boot", "restart", "all_back", "status", "cli", "stop")
SMALL = 0.001
"""Seconds: a difference below this is no noise worth another life."""

EXTRA_SWEEPS = 2


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    drivers: Sequence[str]
    counts: Sequence[int]
    measures: frozenset[str]
    runs: int
    pace: Pace
    seconds: float  # after which nothing is measured again for being noisy
    tasks: Sequence[int] = (1_000, 100_000)


@dataclass(frozen=True)
class Result:
    """One life, storm or capture, or in-process tasks (`driver` is then the way they were run)."""

    driver: str
    what: str  # life, tasks, or one of CHILDREN
    count: int
    sweep: int
    samples: Samples = field(default_factory=dict)
    error: str | None = None


class Sweeps:
    """Measures a plan, and keeps what it found."""

    def __init__(self, plan: Plan, child: Child, writer: Writer | None, say: Callable[[str], None]) -> None:
        self.plan = plan
        self._writer = writer
        self.results: list[Result] = []
        self._child = child
        self._say = say
        self._began = time.monotonic()

    def run(self) -> None:
        """All sweeps, then again what was noisy, while there is time."""
        self._warm_up()
        for sweep in range(1, self.plan.runs + 1):
            self._sweep(sweep)
        for sweep in range(self.plan.runs + 1, self.plan.runs + 1 + EXTRA_SWEEPS):
            for driver, count in self.noisy():
                if time.monotonic() - self._began > self.plan.seconds:
                    self._say("no time is left to measure again what was noisy")
                    return
                self._life(driver, count, sweep)

    def noisy(self) -> list[tuple[str, int]]:
        """The lives whose results differ too much between the runs."""
        lives = dict.fromkeys((result.driver, result.count) for result in self.results if result.what == "life")
        return [life for life in lives if any(self._is_noisy(*life, metric) for metric in STEADY)]

    def _is_noisy(self, driver: str, count: int, metric: str) -> bool:
        found = [
            median(result.samples[metric])
            for result in self.results
            if (result.driver, result.what, result.count) == (driver, "life", count) and metric in result.samples
        ]
        return len(found) > 1 and max(found) > NOISY * min(found) and max(found) - min(found) > SMALL

    def _warm_up(self) -> None:
        """A tiny life of each, not counted: its files come into the page cache, and what cannot run says so in a second."""
        for driver in map(DRIVERS.__getitem__, self.plan.drivers):
            self._say(f"warm-up: {driver.name}")
            try:
                if driver.lives:
                    measure_life(driver, self._child, 3, frozenset(), Pace(settle_seconds=0.1))
            except Failed as error:
                self._say(f"  {driver.name}: {error}")

    def _sweep(self, sweep: int) -> None:
        # Turned by one each time, so that nobody always comes after the same neighbour.
        names = list(self.plan.drivers)
        turn = sweep % len(names) if names else 0
        order = names[turn:] + names[:turn]
        lives = [name for name in order if DRIVERS[name].lives]
        if self.plan.measures.intersection(LIFE):
            for count in self.plan.counts:
                for name in lives:
                    self._life(name, count, sweep)
        self._storms(lives, sweep)
        if "capture" in self.plan.measures:
            self._captures([name for name in order if DRIVERS[name].captures], sweep)
        if "cli" in self.plan.measures:
            self._measure("interpreter", "interpreter", CHILDREN["interpreter"], sweep, measure_interpreter)
        if "tasks" in self.plan.measures:
            for count in self.plan.tasks:
                for way in WAYS if count < MANY or sweep == 1 else ():
                    self._measure(way, "tasks", count, sweep, partial(measure_tasks, way, count))

    def _storms(self, names: Sequence[str], sweep: int) -> None:
        ours = [name for name in names if DRIVERS[name].role == "ours"]
        for what, drivers, measure in (
            ("storm", names, measure_storm),
            ("throttled-storm", names, partial(measure_storm, throttled=True)),
            ("long-storm", ours if sweep == 1 else (), measure_long_storm),
        ):
            for name in drivers if what in self.plan.measures else ():
                storm = partial(measure, DRIVERS[name], self._child, self.plan.pace)
                self._measure(name, what, CHILDREN[what], sweep, storm)

    def _captures(self, names: Sequence[str], sweep: int) -> None:
        if not self._writer:
            self._say("nothing is captured: the writer needs a C compiler")
            return
        for shape in SHAPES:
            for name in names:
                capture = partial(measure_capture, DRIVERS[name], self._writer, shape, self.plan.pace)
                self._measure(name, f"capture-{shape.key}", shape.children, sweep, capture)

    def _life(self, name: str, count: int, sweep: int) -> None:
        # Idle is the same nothing at every N: measured where there would be most of it.
        measures = self.plan.measures if count == max(self.plan.counts) else self.plan.measures - {"idle"}
        life = partial(measure_life, DRIVERS[name], self._child, count, measures, self.plan.pace)
        self._measure(name, "life", count, sweep, life)

    def _measure(self, driver: str, what: str, count: int, sweep: int, measure: Callable[[], Samples]) -> None:
        began = time.monotonic()
        try:
            result = Result(driver, what, count, sweep, measure())
        except Failed as error:
            result = Result(driver, what, count, sweep, error=str(error))
        self.results.append(result)
        took = time.monotonic() - began
        self._say(f"run {sweep}: {driver}, {what}{f' of {count}' if count else ''}: {result.error or f'{took:.1f} s'}")
        end_everything()


def measure_interpreter() -> Samples:
    """A whole process of this interpreter that does nothing: what no command written in Python can be below."""
    took = []
    for _ in range(7):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", ""], check=True, env=clean_environment())
        took.append(time.monotonic() - began)
    return {"cli": took}
