"""One life of one daemon, from its start to the moment when nothing of it is left, and what is measured in it.

A result maps a metric to its samples, in seconds, bytes or a rate. Everything that can be is taken from the children's own
notes, so that it does not matter when this process looks.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import Child, Failed, Mode, Starts, pause
from benchmarks.drivers import PATIENCE, Client, Driver, Launch, Rotation, Setup, connected
from benchmarks.processes import Daemon, clocks_of, descendants, pss_of, rss_of, spent_between, use_of, used_between

Samples = dict[str, list[float]]

STORM_CHILDREN = 200

LONG = 60.0
"""Seconds after which a thing that ought to happen has not happened. The slowest peer needs 11."""


@dataclass(frozen=True)
class Pace:
    """How much is asked of a life: at most so many samples, and no new one after so many seconds."""

    kills: int = 60
    kill_seconds: float = 2.5
    asks: int = 40
    ask_seconds: float = 1.5
    commands: int = 5
    command_seconds: float = 1.5
    idle_seconds: float = 3.0
    settle_seconds: float = 1.2  # s6 restarts at once only what has been ready for one second
    storm_seconds: float = 2.0
    long_storm_seconds: tuple[float, float] = (10.0, 60.0)  # when the memory is looked at
    capture_seconds: float = 2.0  # a writer ends after so long, or when all of them have written so much
    capture_bytes: int = 1_000_000_000
    rotate_at: int = 10_000_000


QUICK = Pace(
    kills=3,
    asks=3,
    commands=1,
    idle_seconds=0.3,
    settle_seconds=0.1,
    storm_seconds=0.5,
    long_storm_seconds=(0.3, 0.6),
    capture_seconds=0.3,
    capture_bytes=5_000_000,
    rotate_at=200_000,
)


class Life:
    """A running daemon with its children."""

    def __init__(self, driver: Driver, setup: Setup, daemon: Daemon, starts: Starts) -> None:
        self.driver = driver
        self.setup = setup
        self.daemon = daemon
        self.starts = starts

    def boot(self) -> float:
        """Wait until every child has started once; seconds from before the daemon's exec to the last child's start."""
        self._wait_for_starts(lambda: self.starts.started == self.setup.count, f"the start of {self.setup.count} children")
        return (max(self.starts.at) - self.daemon.spawned_at) / 1e9

    def connect(self) -> Client:
        """A connection to its control socket, as soon as it answers."""
        return connected(lambda: self.driver.client(self.setup), timeout=LONG, alive=lambda: self.daemon.alive)

    def check(self, client: Client) -> None:
        """Wait until the status says what is true: every job, and the pid of its newest life where it names pids."""
        end = time.monotonic() + LONG
        while True:
            self.starts.read()
            rows = client.rows(client.ask())
            truth = {self.setup.job(slot): self.starts.pid[slot] for slot in self.setup.slots}
            wrong = [name for name, pid in truth.items() if name not in rows or rows[name] not in (None, pid)]
            if not wrong:
                return
            if time.monotonic() > end:
                raise Failed(f"the status is wrong about {len(wrong)} of {self.setup.count} jobs, such as {wrong[0]}")
            pause(0.05)

    def helpers(self) -> list[int]:
        """The supervisor's own processes."""
        return self.daemon.helpers(self.starts.pid)

    def memory(self) -> float:
        """PSS in bytes of the supervisor and its helpers, without the children."""
        return pss_of(self.helpers())

    def idle(self, seconds: float) -> tuple[float, float]:
        """Processor seconds, and wake-ups, a second of doing nothing."""
        pids = self.helpers()
        before, began = use_of(pids), time.monotonic()
        pause(seconds)
        used, took = used_between(before, use_of(pids)), time.monotonic() - began
        return used.cpu / 1e9 / took, used.waits / took

    def restart(self, slot: int) -> float:
        """SIGKILL one child; seconds until its successor runs."""
        self.starts.read()
        lives, killed_at = self.starts.lives[slot], time.monotonic_ns()
        os.kill(self.starts.pid[slot], signal.SIGKILL)
        self.starts.wait(
            lambda: self.starts.lives[slot] > lives, f"the restart of {self.setup.job(slot)}", timeout=LONG, every=0.0005
        )
        return (self.starts.at[slot] - killed_at) / 1e9

    def all_back(self) -> float:
        """SIGKILL every child; seconds from the first kill until the last successor runs."""
        self.starts.read()
        lives, killed_at = list(self.starts.lives), time.monotonic_ns()
        for pid in self.starts.pid:
            os.kill(pid, signal.SIGKILL)

        def back() -> bool:
            return all(now > then for now, then in zip(self.starts.lives, lives, strict=True))

        self._wait_for_starts(back, f"the restart of {self.setup.count} children killed at once")
        return (max(self.starts.at) - killed_at) / 1e9

    def command(self, launch: Launch) -> float:
        """Run a command of the supervisor's; seconds of the whole process."""
        began = time.monotonic()
        done = subprocess.run(launch.argv, cwd=self.setup.home, env=launch.env, capture_output=True, timeout=LONG)
        took = time.monotonic() - began
        if done.returncode or not done.stdout.count(b"\n") >= self.setup.count:
            said = (done.stderr or done.stdout)[-300:].decode(errors="replace").strip()
            raise Failed(f"{launch.argv[0]} exited with {done.returncode}, and not one line a job: {said}")
        return took

    def _wait_for_starts(self, done: Callable[[], bool], what: str) -> None:
        def checked() -> bool:
            if not self.daemon.alive:
                raise Failed(f"the daemon ended by itself before {what}")
            return done()

        self.starts.wait(checked, what, timeout=LONG)


@contextmanager
def living(
    driver: Driver,
    child: Child,
    count: int,
    mode: Mode = "live",
    *,
    throttled: bool = False,
    rotation: Rotation | None = None,
) -> Iterator[Life]:
    """A daemon with `count` children, in a folder of its own that is gone afterwards, like every process of it."""
    home = Path(tempfile.mkdtemp(prefix="life-", dir=child.log.parent))
    starts = Starts(child.log, count)
    try:
        setup = Setup(home, child, count, mode, throttled, rotation)
        launch = driver.prepare(setup)
        daemon = Daemon(launch.argv, cwd=home, env=launch.env, log=home / "daemon.log")
        try:
            yield Life(driver, setup, daemon, starts)
        except (Failed, OSError, subprocess.SubprocessError) as error:
            raise Failed(f"{error} (its log: {daemon.complaint()})") from error
        finally:
            daemon.end()
    finally:
        starts.close()
        shutil.rmtree(home)


def measure_life(driver: Driver, child: Child, count: int, measures: frozenset[str], pace: Pace) -> Samples:
    """Boot `count` children, measure what is asked for, stop in order."""
    found: Samples = {}
    with living(driver, child, count) as life:
        found["boot"] = [life.boot()]
        client = life.connect()
        try:
            life.check(client)
            _measure_at_rest(life, client, measures, pace, found)
            _measure_deaths(life, client, measures, pace, found)
            life.check(client)
        finally:
            client.close()
        pause(pace.settle_seconds)  # runit waits a second before it lets go of what has not lived for one
        found["stop"] = [life.daemon.stop(driver.stop_signal, timeout=LONG)]
    return found


def _measure_at_rest(life: Life, client: Client, measures: frozenset[str], pace: Pace, found: Samples) -> None:
    pause(pace.settle_seconds)
    if "memory" in measures:
        found["pss"] = [life.memory()]
    if "idle" in measures:
        cpu, wakeups = life.idle(pace.idle_seconds)
        found["idle_cpu"], found["idle_wakeups"] = [cpu], [wakeups]
    if "status" in measures:
        found["status"] = _repeat(lambda: _timed(client.ask), pace.asks, pace.ask_seconds)
    if "cli" in measures and (launch := life.driver.cli(life.setup)):
        found["cli"] = _repeat(lambda: life.command(launch), pace.commands, pace.command_seconds)


def _measure_deaths(life: Life, client: Client, measures: frozenset[str], pace: Pace, found: Samples) -> None:
    if "restart" in measures:
        kills = min(pace.kills, life.setup.count)
        victims = iter(random.sample(life.setup.slots, kills))
        fresh: list[float] = []

        def kill_and_ask() -> float:
            took = life.restart(next(victims))
            if "status" in measures:  # of what has just changed, so that no reply can be an old one
                fresh.append(_timed(client.ask))
            return took

        found["restart"] = _repeat(kill_and_ask, kills, pace.kill_seconds)
        if fresh:
            found["fresh_status"] = fresh
    if "all-back" in measures:
        pause(pace.settle_seconds)
        found["all_back"] = [life.all_back()]


def measure_storm(driver: Driver, child: Child, pace: Pace, *, throttled: bool = False) -> Samples:
    """Keep children that exit at once: starts a second, the status of all meanwhile, and the processor that it takes."""
    with _storm(driver, child, throttled=throttled) as (life, client, asked):
        before, began = clocks_of(descendants()), time.monotonic()
        life.starts.read()
        starts = life.starts.total
        _ask_until(began + pace.storm_seconds, life, client, asked)
        life.starts.read()
        took = time.monotonic() - began
        spent = spent_between(before, clocks_of(descendants()))
        return {"starts": [(life.starts.total - starts) / took], "status": asked, "core": [spent / took]}


def measure_long_storm(driver: Driver, child: Child, pace: Pace) -> Samples:
    """The same, unthrottled and for long: how much memory the daemon has taken meanwhile."""
    with _storm(driver, child, throttled=False) as (life, client, asked):
        began, rss = time.monotonic(), []
        for seconds in pace.long_storm_seconds:
            _ask_until(began + seconds, life, client, asked)
            rss.append(float(rss_of(life.daemon.pid)))
        early, late = rss
        return {"status": asked, "early": [early], "late": [late], "growth": [late / early]}


@contextmanager
def _storm(driver: Driver, child: Child, *, throttled: bool) -> Iterator[tuple[Life, Client, list[float]]]:
    """Children that exit at once; a connection, and the seconds that it took to get it as the first of its waits."""
    with living(driver, child, STORM_CHILDREN, "crash", throttled=throttled) as life:
        life.boot()
        began = time.monotonic()
        client = life.connect()
        try:
            yield life, client, [time.monotonic() - began]
        finally:
            client.close()


def _ask_until(end: float, life: Life, client: Client, asked: list[float]) -> None:
    while time.monotonic() < end:
        asked.append(_asked_in_the_storm(life, client))
        if asked[-1] >= PATIENCE:
            break  # the rest of that answer would be taken for the next one
        pause(0.02)
        life.starts.read()


def _asked_in_the_storm(life: Life, client: Client) -> float:
    """Seconds until the answer was here; not much more than PATIENCE, also where it was not here by then."""
    began = time.monotonic()
    try:
        reply = client.ask()
    except TimeoutError:
        return max(PATIENCE, time.monotonic() - began)
    took = time.monotonic() - began
    if len(client.rows(reply)) < life.setup.count:
        raise Failed("a status in the storm left jobs out")
    return took


def _timed(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def _repeat(sample: Callable[[], float], times: int, seconds: float) -> list[float]:
    """At most so many samples, at least one, and no new one after so many seconds."""
    end, found = time.monotonic() + seconds, [sample()]
    while len(found) < times and time.monotonic() < end:
        pause(0.005)
        found.append(sample())
    return found
