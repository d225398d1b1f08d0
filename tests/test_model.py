"""The tree against the model: random trees, random failures and commands, in virtual time; after each step both must agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
from bench import Bench, Part, exact, settle
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from otp_model import SAME, Group, Tie, World, later_than, world_of
from trio.testing import MockClock

from supervisor import events
from supervisor.config import Config, DaemonSpec
from supervisor.errors import EssentialEnded, RestartIntensityExceeded
from supervisor.events import Journal, fold
from supervisor.kinds import JobSpec
from supervisor.spec import AutoShutdown, Backoff, GiveUp, RestartType, Seconds, Strategy, SupervisorSpec
from supervisor.tree import Order, Supervisor, open_supervisor

# Cases


@dataclass
class Case:
    """A tree and what is done to it. A step is a verb, a name and a number."""

    jobs: dict[str, dict[str, Any]]
    parts: dict[str, Part]
    groups: dict[str, SupervisorSpec]
    daemon: DaemonSpec
    steps: list[tuple[str, str, float]]


class Moments:
    """Durations no two of which are equal, nor add up to each other soon: a tie of two timers is nobody's promise."""

    def __init__(self) -> None:
        self._fractions: Iterator[int] = (at * at * 7 + at for at in range(1, 1000))

    def some(self, draw: Any, *rough: float) -> Seconds:
        return Seconds(draw(st.sampled_from(rough)) + next(self._fractions) / 65536)


@st.composite
def cases(draw: Any, longest: int = 40) -> Case:
    moments = Moments()
    names = [f"g{at}" for at in range(draw(st.sampled_from([1, 2, 3])))] + [f"j{at}" for at in range(draw(st.integers(2, 5)))]
    below: dict[str, list[str]] = {"": []}
    for name in names:
        places = sorted(below, reverse=True)
        below[draw(st.sampled_from(places if name[0] == "g" else [*places[:-1], *places]))].append(name)
        if name[0] == "g":
            below[name] = []
    for children in below.values():
        children[:] = draw(st.permutations(children))
    line = list(_depth_first(below, ""))
    case = Case({}, {}, {}, _daemon(draw, moments), [])
    for at, (name, above) in enumerate(line):
        targets = [other for other, _ in line[:at] if other not in above]
        waits = targets and draw(st.sampled_from([False, False, True]))
        after = tuple(draw(st.lists(st.sampled_from(targets), min_size=1, max_size=2, unique=True))) if waits else ()
        auto = case.groups[above[-1]].auto_shutdown if above[-1] else case.daemon.auto_shutdown
        keys = _child(draw, moments, after, auto)
        if name[0] == "g":
            case.groups[name] = _group(draw, moments, keys, tuple(below[name]))
        else:
            case.parts[name], case.jobs[name] = _job(draw, moments, keys, case.groups.get(above[-1]))
    case.steps = draw(st.lists(_step(names), min_size=20, max_size=longest))
    return case


def _depth_first(below: dict[str, list[str]], name: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every name with all that is above it, in an order that no `after` may go against."""
    for child in below[name]:
        yield child, (*above, name)
        if child in below:
            yield from _depth_first(below, child, (*above, name))


def _daemon(draw: Any, moments: Moments) -> DaemonSpec:
    return DaemonSpec(
        grace=moments.some(draw, 6, 80),
        intensity=draw(st.sampled_from([None] * 6 + [0, 2])),
        period=moments.some(draw, 3, 10),
        auto_shutdown=draw(st.sampled_from([AutoShutdown.NEVER] * 4 + list(AutoShutdown))),
    )


def _child(draw: Any, moments: Moments, after: tuple[str, ...], auto: AutoShutdown) -> dict[str, Any]:
    restart = draw(st.sampled_from([None, None, *RestartType]))
    may_signify = auto is not AutoShutdown.NEVER and restart in (RestartType.TRANSIENT, RestartType.TEMPORARY)
    return {
        "after": after,
        "restart": restart,
        "significant": may_signify and draw(st.booleans()),
        "essential": draw(st.integers(0, 15)) == 15,
        "backoff": Backoff(
            initial=Seconds(0) if draw(st.integers(0, 4)) == 0 else moments.some(draw, 0.5, 2),
            factor=2.0,
            max=moments.some(draw, 3, 30),
            reset_after=moments.some(draw, 1, 5),
        ),
    }


def _group(draw: Any, moments: Moments, keys: dict[str, Any], children: tuple[str, ...]) -> SupervisorSpec:
    return SupervisorSpec(
        strategy=draw(st.sampled_from([Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE, Strategy.ONE_FOR_ONE])),
        intensity=draw(st.sampled_from([None, 1, 2, 3, 0])),
        period=moments.some(draw, 3, 10),
        children=children,
        auto_shutdown=draw(st.sampled_from([AutoShutdown.NEVER, *AutoShutdown])),
        **keys,
    )


def _job(draw: Any, moments: Moments, keys: dict[str, Any], above: SupervisorSpec | None) -> tuple[Part, dict[str, Any]]:
    part = Part(hears=draw(st.integers(0, 3)) < 3)
    part.lag = draw(st.sampled_from([0, 0, moments.some(draw, 0.5, 4)]))
    part.stubborn = draw(st.sampled_from([0, 0, moments.some(draw, 1, 7)]))
    if part.stubborn and not part.lag:
        part.lag = moments.some(draw, 0.5)  # else it is nobody's promise whether it hears a kill, or the question before it
    part.says_ready = part.hears and draw(st.integers(0, 2)) == 2
    part.ready_in = draw(st.sampled_from([moments.some(draw, 0.5, 2), moments.some(draw, 0.5, 2), None]))
    once = draw(st.integers(0, 2)) == 2
    grouped = above is not None and above.strategy is not Strategy.ONE_FOR_ONE
    gives_up = not grouped and draw(st.integers(0, 4)) == 4
    keys |= {
        "once": once,
        "start": draw(st.sampled_from(["auto"] * 5 + ["manual"])),
        "grace": moments.some(draw, 1, 3),
        "start_timeout": moments.some(draw, 1, 3),
        "give_up": GiveUp(failures=draw(st.integers(1, 3)), within=moments.some(draw, 3, 10)) if gives_up else None,
    }
    return part, keys


def _step(names: list[str]) -> st.SearchStrategy[tuple[str, str, float]]:
    jobs = [name for name in names if name[0] == "j"]
    waits = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0])
    happening = st.tuples(st.sampled_from(["fail", "fail", "fail", "succeed"]), st.sampled_from(jobs), waits)
    verbs = ["start", "start", "stop", "stop --now", "restart", "run-now", "cancel"]
    command = st.tuples(st.sampled_from(verbs), st.sampled_from(names), waits)
    ending = st.tuples(st.sampled_from(["shutdown", "shutdown", "kill"]), st.just(""), waits)
    return st.one_of(
        happening, happening, happening, command, command, st.integers(0, 6).flatmap(lambda n: ending if n == 6 else command)
    )


# Running one case


class Pair:
    """A tree and the model of it, side by side."""

    def __init__(self, tree: Supervisor, world: World, bench: Bench, began: float) -> None:
        self.tree = tree
        self.world = world
        self.bench = bench
        self.began = began
        self.asked: list[tuple[Order, Any]] = []
        self._compared = 0

    @property
    def now(self) -> float:
        return trio.current_time() - self.began

    def take(self, verb: str, name: str) -> None:
        """One step, on both sides."""
        if verb in ("fail", "succeed"):
            really = self.bench.fail(name) if verb == "fail" else self.bench.succeed(name)
            assert really == self.world.job_ends(name, failed=verb == "fail")
        elif verb in ("shutdown", "kill"):
            self.tree.shutdown("the test says so", kill=verb == "kill")
            self.world.end_all()
            if verb == "kill":
                self.world.kill()
        else:
            plain, _, now = verb.partition(" --")
            options = {"now": bool(now)} if plain == "stop" else {}
            [order] = self.tree.order(plain, [name], **options)
            self.asked.append((order, self.world.command(plain, name, now=bool(now))))
        self.world.settle()

    def compare(self) -> None:
        """Hold what there is against what there should be: what the jobs themselves saw first, then the books."""
        world, table = self.world, self.tree.journal.table
        assert not self.bench.doubles, "two instances of one job"
        assert self.bench.alive == {job.name for job in world.living_jobs()}
        self._compare_log()
        for name, member in world.members.items():
            row = table[name]
            theirs = (row.state.value, row.word, row.goal.value, row.ready, row.restarts)
            ours = (member.phase, member.word, "up" if member.wanted else "down", member.ready, member.restarts)
            assert (name, *theirs) == (name, *ours)
        answers = [(order.name, order.verb, order._answer and order._answer.ok) for order, _ in self.asked]
        assert answers == [(ask.member.name, ask.verb, ask.ok) for _, ask in self.asked]
        assert self.tree.root_ready.value == (world.root.whole_since is not None)

    def _compare_log(self) -> None:
        """Starts and ends, each at its time: the same on both sides. Within one moment, the order is checked by itself."""
        notes = [note for note in self.bench.notes if note.what in ("start", "end")]
        theirs = sorted((round(note.at - self.began, 4), note.what, note.job) for note in notes[self._compared :])
        ours = sorted((round(at, 4), what, name) for at, what, name in self.world.log[self._compared :])
        assert theirs == ours
        self._compared = len(notes)


def check_order(pair: Pair) -> None:
    """Nobody was started before what it waits for was ready, nor stopped in its turn before what comes after it was gone."""
    world = pair.world
    for note in pair.bench.notes:
        member = world.members[note.job]
        if note.what == "asked" and (note.job, note.run) in world.asked_in_order:
            above = member.parent
            assert isinstance(above, Group)
            assert not later_than(world, above, member) & note.others
        if note.what == "start":
            targets = [world.members[target] for target in member.spec.after]
            assert {target.name for target in targets if not isinstance(target, Group) and target.service} <= note.others


async def live(case: Case, base: Path) -> bool:
    """One life of a tree; False where it came to a tie."""
    bench = Bench()
    jobs: dict[str, JobSpec] = {name: bench.job(name, case.parts[name], **keys) for name, keys in case.jobs.items()}
    config = Config(file=None, base=base, daemon=case.daemon, jobs=jobs, supervisors=case.groups)
    root = SupervisorSpec(intensity=case.daemon.intensity, period=case.daemon.period, auto_shutdown=case.daemon.auto_shutdown)
    world = world_of(root, jobs, case.groups, case.parts, case.daemon.grace)
    journal, told = Journal(now=lambda: "now"), []
    journal.add_sink(told.append)
    began, failure, tied = trio.current_time(), None, False
    try:
        async with open_supervisor(config, journal=journal, spread=exact) as tree:
            pair = Pair(tree, world, bench, began)
            try:
                await follow(pair, case.steps)
            except Tie:
                tied = True
    except (RestartIntensityExceeded, EssentialEnded) as error:
        failure = error
    if tied or not came_to(world, pair.now):
        return False
    compare_the_end(pair, world, failure, told)
    return True


def came_to(world: World, now: float) -> bool:
    try:
        world.advance(now)
    except Tie:
        return False
    return True


async def follow(pair: Pair, steps: list[tuple[str, str, float]]) -> None:
    """Take the steps, and then the end, on both sides; the end of the tree cancels it."""
    await settle()
    pair.compare()
    for verb, name, wait in [*steps, ("shutdown", "", 0.0)]:
        pair.take(verb, name)
        await settle()
        pair.compare()
        await trio.sleep(wait)
        await settle()
        pair.world.advance(pair.now)
        pair.compare()
    await trio.sleep_forever()


def compare_the_end(pair: Pair, world: World, failure: Exception | None, told: list[events.Event]) -> None:
    assert world.ended and abs(world.ended_at - pair.now) < SAME
    assert {RestartIntensityExceeded: "intensity", EssentialEnded: "essential", type(None): None}[
        type(failure)
    ] == world.failure
    pair.compare()
    assert not pair.bench.alive, "a job outlived the tree"
    assert all(order._answer is not None for order, _ in pair.asked), "a command without an answer"
    assert {name.partition(" ")[0] for name in pair.tree.survivors} == world.survivors
    exceeded = [event.name for event in told if isinstance(event, events.IntensityExceeded)]
    assert exceeded == [name for _, name in world.escalations if name]
    assert fold(told) == pair.tree.journal.table
    check_order(pair)


def run_case(case: Case, base: Path) -> None:
    with structlog.testing.capture_logs():
        assume(trio.run(live, case, base, clock=MockClock(autojump_threshold=0)))


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_the_tree_does_what_the_model_says(case, tmp_path_factory):
    run_case(case, tmp_path_factory.getbasetemp())


@pytest.mark.long
@settings(max_examples=1000, derandomize=False, suppress_health_check=list(HealthCheck))
@given(case=cases(longest=80))
def test_the_tree_does_what_the_model_says_for_long(case, tmp_path_factory):
    run_case(case, tmp_path_factory.getbasetemp())
