"""A small model of what the contract says of restarts, commands and the end, in OTP's words.

It knows nothing of how the tree is built: no tasks, no messages, no loop. Time is a number that `advance` moves. A stimulus
changes a fact or two; then `settle` applies the rules, one small change at a time, until no rule has anything to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench import Part

from supervisor.kinds import JobSpec
from supervisor.spec import AutoShutdown, RestartType, Strategy, SupervisorSpec

KILL_LIMIT = 5.0
STUCK_AFTER = 5.0
NEVER = math.inf
SAME = 1e-7
"""Seconds within which two moments are the same: sums of the same durations differ by less."""

STARTING_VERBS = ("start", "restart", "run-now")


class Tie(Exception):
    """Two independent things are due at the same moment: which comes first is nobody's promise."""


@dataclass
class Ask:
    """A command on one name. `ok` is None while it waits for what it came to."""

    verb: str
    member: Member
    first_run: int
    """The first run that can be its answer."""
    ok: bool | None = None

    def settle(self, ok: bool) -> None:
        if self.ok is None:
            self.ok = ok


@dataclass(eq=False)
class Member:
    """A job or a supervisor: the facts of it."""

    name: str
    spec: Any
    parent: Group | None
    wanted: bool
    part: Part = field(default_factory=Part)

    # the run
    alive: bool = False
    runs: int = 0
    asked: str | None = None  # "command", "order" or "drain"; None while nobody wants it to end
    ready_since: float | None = None
    overrules: str | None = None  # what its end counts as whatever it was: "failed" (a timeout) or "cancelled"
    ready_at: float = NEVER
    timeout_at: float = NEVER
    ends_at: float = NEVER
    kill_at: float = NEVER
    stuck_at: float = NEVER
    raised: bool = False
    cancelled: bool = False
    killed: bool = False
    stuck: bool = False

    # between runs
    over: bool = False
    succeeded: bool = False
    due: float | None = None
    follows_failure: bool = False
    again: bool = False
    run_wanted: bool = False
    restarts: int = 0
    waits: int = 0  # failures since its backoff was last reset
    failures: list[float] = field(default_factory=list)
    resting_word: str = "stopped"
    asks: list[Ask] = field(default_factory=list)

    @property
    def service(self) -> bool:
        return not self.spec.once

    @property
    def restart_type(self) -> RestartType:
        return self.spec.restart or (RestartType.PERMANENT if self.service else RestartType.TRANSIENT)

    @property
    def active(self) -> bool:
        return self.alive or (self.wanted and not self.over)

    @property
    def counts(self) -> bool:
        """Whether the supervisor's readiness waits for it."""
        return self.wanted and self.spec.start == "auto"

    @property
    def missing(self) -> bool:
        """Whether its supervisor is not ready because of it."""
        return self.counts and not self.satisfied and not self.succeeded

    @property
    def satisfied(self) -> bool:
        """Whether what comes after it may start."""
        if not self.service:
            return self.succeeded
        return self.alive and self.asked is None and self.ready_since is not None

    @property
    def ready(self) -> bool:
        return self.alive and self.asked is None and self.ready_since is not None

    @property
    def phase(self) -> str:
        if self.alive:
            if self.asked is not None:
                return "stopping"
            return "starting" if self.ready_since is None else "running"
        return "waiting" if self.waiting else "stopped"

    @property
    def waiting(self) -> bool:
        """Whether it is not alive, but is to start when something is over."""
        parent = self.parent
        if self.alive or parent is None or not parent.alive or parent.closing or parent.world.ending:
            return False
        return (self.wanted and not self.over) or self.run_wanted

    @property
    def word(self) -> str:
        if self.alive and self.asked is not None:
            return "stuck" if self.stuck else "draining" if self.asked == "drain" and not self.killed else "stopping"
        if self.waiting:
            parent = self.parent
            assert parent is not None
            held = parent.operation is not None and self.name in parent.operation.members
            return "backing off" if held or (self.due or 0) > parent.world.now + SAME else "waiting"
        return self.phase if self.alive else self.resting_word

    def backoff(self, spec: Any, ready_for: float | None) -> float:
        """The next wait after a failure of what had been ready for so long (None: never)."""
        if ready_for is not None and ready_for >= spec.reset_after:
            self.waits = 0
        wait = min(spec.initial * spec.factor**self.waits, spec.max)
        self.waits += 1
        return wait

    def timers(self) -> Iterator[tuple[float, str]]:
        if self.alive:
            yield self.ready_at, "ready"
            yield self.timeout_at, "timeout"
            yield self.ends_at, "end"
            yield self.kill_at, "kill"
            yield self.stuck_at, "stuck"
        elif self.waiting and self.due is not None:
            yield self.due, "due"


@dataclass
class Operation:
    """A strategy's answer to a failure: stop the members in reverse order, wait, start those that are wanted."""

    members: set[str]
    wait: float
    stay_down: set[str]  # temporary members that it stops: they are not restarted
    until: float | None = None


@dataclass(eq=False)
class Group(Member):
    """A supervisor."""

    world: World = None  # type: ignore[assignment]
    children: list[Member] = field(default_factory=list)
    closing: str | None = None  # what its end will be: "asked", "failed" or "done"
    operation: Operation | None = None
    window: list[float] = field(default_factory=list)
    group_waits: Member = None  # type: ignore[assignment]
    """The books of the backoff of its group restarts."""
    whole_since: float | None = None
    well_since: float | None = None  # whole, and no group restart goes on
    well_for: float | None = None  # how long it was the last time, since its last start or group restart
    hurried: bool = False
    hastened: bool = False  # somebody wants something of it: its next backoff is left out

    @property
    def service(self) -> bool:
        return True

    @property
    def counts(self) -> bool:
        return self.wanted

    @property
    def whole(self) -> bool:
        return (
            self.alive
            and not self.closing
            and all(child.satisfied or child.succeeded for child in self.children if child.counts)
        )

    @property
    def satisfied(self) -> bool:
        return self.ready

    @property
    def ready(self) -> bool:
        return self.whole and self.asked is None

    @property
    def phase(self) -> str:
        return "stopping" if self.alive and self.closing else super().phase

    @property
    def word(self) -> str:
        return "stopping" if self.alive and self.closing else super().word

    def child(self, name: str) -> Member:
        return next(child for child in self.children if child.name == name)

    def timers(self) -> Iterator[tuple[float, str]]:
        yield from super().timers()
        if self.operation is not None and self.operation.until is not None:
            yield self.operation.until, "operation"


@dataclass
class World:
    """The whole tree."""

    root: Group
    members: dict[str, Member]
    grace: float
    now: float = 0.0
    ending: bool = False
    failure: str | None = None  # "intensity" or "essential"
    phase: str = "running"
    draining_until: dict[str, float] = field(default_factory=dict)
    stopped_by: float = NEVER
    killing_until: float = NEVER
    survivors: set[str] = field(default_factory=set)
    ended: bool = False
    ended_at: float = NEVER
    hurry: bool = False
    log: list[tuple[float, str, str]] = field(default_factory=list)
    escalations: list[tuple[float, str]] = field(default_factory=list)
    asked_in_order: set[tuple[str, int]] = field(default_factory=set)
    """Runs (job, number) that were asked to end only when it was their turn."""

    # ---- time

    def timers(self) -> list[tuple[float, str, Member | None]]:
        found: list[tuple[float, str, Member | None]] = [
            (at, what, member) for member in (self.root, *self.members.values()) for at, what in member.timers()
        ]
        if self.phase == "draining":
            found += [(until, "drained", self.members[name]) for name, until in self.draining_until.items()]
        if self.phase in ("draining", "stopping"):
            found.append((self.stopped_by, "out of time", None))
        if self.phase == "killing":
            found.append((self.killing_until, "survivors", None))
        return [timer for timer in found if timer[0] < NEVER and not self.ended]

    def advance(self, to: float) -> None:
        """Let time pass, and what is due in it happen."""
        while True:
            due = sorted(
                (timer for timer in self.timers() if self.now + SAME < timer[0] <= to + SAME), key=lambda timer: timer[0]
            )
            if not due:
                break
            at = due[0][0]
            together = [timer for timer in due if timer[0] <= at + SAME]
            kinds = {what for _, what, _ in together}
            whose = {id(member) for _, _, member in together}
            if len(together) > 1 and not kinds <= {"stuck", "survivors"} and (len(whose) > 1 or kinds != {"kill", "drained"}):
                raise Tie(together)
            self.now = at
            for _, what, member in together:
                self.happens(what, member)
            self.settle()
        self.now = to

    def happens(self, what: str, member: Member | None) -> None:
        if what == "out of time":
            self.kill()
        elif what == "survivors":
            self.survivors = {member.name for member in self.living_jobs()}
            self.killing_until = NEVER
        elif member is None:
            raise AssertionError(what)
        elif what == "ready":
            member.ready_at = NEVER
            self.gets_ready(member)
        elif what == "timeout":
            member.timeout_at = NEVER
            if member.asked is None:
                member.overrules = "failed"
                self.ask(member, "command")
        elif what == "end":
            self.end(member, failed=False)
        elif what == "kill":
            self.kill_one(member)
        elif what == "stuck":
            member.stuck, member.stuck_at = True, NEVER

    # ---- one run

    def start(self, member: Member) -> None:
        member.alive, member.runs = True, member.runs + 1
        member.restarts += member.follows_failure
        member.asked = member.overrules = member.due = member.ready_since = None
        member.follows_failure = member.succeeded = False
        member.raised = member.cancelled = member.killed = member.stuck = False
        member.ready_at = member.timeout_at = member.ends_at = member.kill_at = member.stuck_at = NEVER
        member.run_wanted = member.run_wanted and not member.wanted
        if isinstance(member, Group):
            member.closing = member.operation = member.well_since = member.well_for = None
            member.hastened = False
            member.window.clear()
            for child in member.children:
                child.over = child.succeeded = child.follows_failure = False
                child.due = None
            return
        self.log.append((self.now, "start", member.name))
        if member.part.says_ready:
            member.ready_at = NEVER if member.part.ready_in is None else self.now + member.part.ready_in
            member.timeout_at = self.now + member.spec.start_timeout
        else:
            member.ready_at = self.now

    def gets_ready(self, member: Member) -> None:
        if member.asked is not None or (isinstance(member, Group) and member.closing):
            return
        member.timeout_at = NEVER
        if member.ready_since is None:
            member.ready_since = self.now
        self.answer(member, ("start", "restart"), True, member.runs)

    def ask(self, member: Member, why: str, hurry: bool = False) -> None:
        """Ask a run to end: the ladder begins."""
        if member.asked is None:
            member.asked = why
            if why == "order" and not isinstance(member, Group):
                self.asked_in_order.add((member.name, member.runs))
            if not isinstance(member, Group):
                self._hear(member)
            elif not member.closing:  # else who asks for a start from then on waits for its next run
                member.closing = "asked"
                self.no_more_starts(member)
        if hurry and not isinstance(member, Group) and member.alive:
            self.kill_one(member)

    def _hear(self, member: Member) -> None:
        member.ready_at = member.timeout_at = NEVER
        member.kill_at = self.now + (0 if self.hurry else member.spec.grace)
        if member.part.hears:
            member.ends_at = self.now + member.part.lag
        elif member.service:
            self._cancel(member)

    def _cancel(self, member: Member) -> None:
        if not member.cancelled:
            member.cancelled = True
            member.ends_at = self.now + member.part.stubborn

    def kill_one(self, member: Member) -> None:
        """The end of the ladder."""
        if not member.killed:
            member.killed, member.kill_at = True, NEVER
            member.stuck_at = self.now + STUCK_AFTER
            self._cancel(member)

    def end(self, member: Member, failed: bool) -> None:
        """A run is over. What follows depends on whether anybody had asked for it."""
        member.alive = False
        if not isinstance(member, Group):
            self.log.append((self.now, "end", member.name))
        judged = member.asked is None or member.overrules == "failed"
        failed = (failed and member.asked is None) or member.overrules == "failed"
        failure = judged and (failed or member.restart_type is RestartType.PERMANENT)
        member.resting_word = "stopped" if not judged else "failed" if failed else "exited" if failure else "completed"
        self._answer_end(member, judged, failure)
        member.run_wanted = False
        if member.again:
            member.again = False  # an operator has asked for the next run already
        elif judged:
            self._judge(member, failed, failure)
        elif member.overrules == "cancelled":
            member.over = True

    def _answer_end(self, member: Member, judged: bool, failure: bool) -> None:
        self.answer(member, ("stop", "cancel"), True)
        if judged or member.overrules == "cancelled":
            self.answer(member, ("start", "restart"), not failure, member.runs)
        self.answer(member, ("run-now",), member.overrules == "cancelled" or not self._raised(member), member.runs)

    def _raised(self, member: Member) -> bool:
        return member.overrules == "failed" or member.raised

    # ---- what follows from an end

    def _judge(self, member: Member, failed: bool, failure: bool) -> None:
        parent = member.parent
        assert parent is not None
        if not failure or member.restart_type is RestartType.TEMPORARY:
            member.over, member.succeeded = True, not failure
            self._for_good(member, failure)
        elif not member.wanted or parent.closing or self.ending or self._in_operation(member):
            member.follows_failure = member.wanted
        elif self._gives_up(member):
            member.over, member.resting_word = True, "gave up"
            self._for_good(member, failure=True)
        elif isinstance(member, Group) and member.spec.essential and failed:
            self.end_all("essential")
        else:
            self._restart(member, parent)

    def _in_operation(self, member: Member) -> bool:
        operation = member.parent.operation if member.parent is not None else None
        return operation is not None and member.name in operation.members

    def _gives_up(self, member: Member) -> bool:
        limit = None if isinstance(member, Group) else member.spec.give_up
        if limit is None:
            return False
        member.failures.append(self.now)
        return len([at for at in member.failures if at >= self.now - limit.within - SAME]) >= limit.failures

    def _for_good(self, member: Member, failure: bool) -> None:
        parent = member.parent
        assert parent is not None
        if member.spec.essential:
            self.end_all("essential" if failure else None)
        counts = member.restart_type is RestartType.TEMPORARY or not failure
        if member.spec.significant and counts:
            others = any(other.spec.significant and other.active for other in parent.children)
            auto = parent.spec.auto_shutdown
            if auto is AutoShutdown.ANY_SIGNIFICANT or (auto is AutoShutdown.ALL_SIGNIFICANT and not others):
                self._ends_itself(parent, "done")

    def _restart(self, member: Member, parent: Group) -> None:
        member.follows_failure = True
        parent.window.append(self.now)
        limit = parent.spec.limit
        if limit is not None and len([at for at in parent.window if at >= self.now - parent.spec.period - SAME]) > limit:
            self.escalations.append((self.now, parent.name))
            self._ends_itself(parent, "failed")
        elif parent.spec.strategy is Strategy.ONE_FOR_ONE:
            ready_for = None if member.ready_since is None or member.overrules else self.now - member.ready_since
            wait = member.backoff(member.spec.backoff, ready_for)
            member.due = None if isinstance(member, Group) and member.hastened else self.now + wait
        else:
            self._restart_group(member, parent)

    def _restart_group(self, member: Member, parent: Group) -> None:
        names = [child.name for child in parent.children]
        if parent.spec.strategy is Strategy.REST_FOR_ONE:
            names = names[names.index(member.name) :]
        ready_for = parent.well_for if parent.well_since is None else self.now - parent.well_since
        parent.well_since = parent.well_for = None
        operation = Operation(set(names), parent.group_waits.backoff(parent.spec.backoff, ready_for), set())
        if parent.operation is not None:
            operation.members |= parent.operation.members
            operation.stay_down |= parent.operation.stay_down
        for name in names:
            child = parent.child(name)
            if child.alive:
                child.follows_failure = True
                if child.restart_type is RestartType.TEMPORARY:
                    operation.stay_down.add(name)
        parent.operation = operation

    def _ends_itself(self, group: Group, how: str) -> None:
        if group is self.root:
            self.end_all("intensity" if how == "failed" else None)
        elif not group.closing:
            group.closing, group.operation = how, None
            self.no_more_starts(group)

    def no_more_starts(self, group: Group) -> None:
        group.operation = None
        self.turn_down(group)

    # ---- the end of all

    def end_all(self, failure: str | None = None) -> None:
        if not self.ending:
            self.ending, self.failure = True, failure

    def kill(self) -> None:
        """Straight to killing."""
        if self.phase != "killing":
            self.phase, self.hurry = "killing", True
            self.root.closing = self.root.closing or "asked"
            self.no_more_starts(self.root)
            self.killing_until = self.now + KILL_LIMIT
            for job in self.living_jobs():
                self.ask(job, "command")
                self.kill_one(job)

    def living_jobs(self) -> list[Member]:
        return [member for member in self.members.values() if member.alive and not isinstance(member, Group)]

    # ---- commands

    def command(self, verb: str, name: str, now: bool = False) -> Ask:
        member = self.members[name]
        ask = Ask(verb, member, member.runs + 1)
        if self._refused(member, verb):
            ask.ok = False
            return ask
        {
            "start": self._start,
            "stop": self._stop,
            "restart": self._again,
            "run-now": self._run_now,
            "cancel": self._cancel_run,
        }[verb](member, ask, now)
        return ask

    def _refused(self, member: Member, verb: str) -> bool:
        if isinstance(member, Group):
            if verb in ("run-now", "cancel"):
                return True
        elif member.service and verb in ("run-now", "cancel"):
            return True
        if verb not in STARTING_VERBS:
            return False
        above = member.parent
        while above is not None:
            if self.ending or (above is not self.root and (not above.wanted or (above.over and not above.alive))):
                return True
            above = above.parent
        return False

    def _overtake(self, member: Member, ask: Ask) -> None:
        joins = ask.verb in ("start", "stop", "run-now")
        for other in member.asks:
            if not (joins and other.verb == ask.verb):
                other.settle(False)
        member.asks = [other for other in member.asks if other.ok is None] + [ask]

    def _want(self, member: Member, ask: Ask) -> None:
        """Up, and nothing of ours in the way."""
        self._overtake(member, ask)
        member.wanted, member.due, member.follows_failure = True, None, False
        member.waits = 0
        member.failures.clear()
        if member.alive:
            member.again = member.again or member.phase == "stopping"
        else:
            member.over = member.succeeded = False
        if self._in_operation(member):
            operation = member.parent.operation  # type: ignore[union-attr]
            operation.wait = 0.0
            operation.stay_down.discard(member.name)
            if operation.until is not None:
                operation.until = self.now
        self._make_haste(member)

    def _make_haste(self, member: Member) -> None:
        """What is wanted below a supervisor that is down for now: its backoff is over, or left out when it comes."""
        above = member.parent
        while above is not None and above is not self.root and (not above.alive or above.closing):
            above.due, above.hastened = None, above.alive
            above = above.parent

    def _start(self, member: Member, ask: Ask, now: bool) -> None:
        self._want(member, ask)
        operation = member.parent.operation  # type: ignore[union-attr]
        to_stop = operation is not None and operation.until is None and member.name in operation.members
        if member.alive and member.phase != "stopping" and not to_stop:
            ask.first_run = member.runs
            if member.ready_since is not None:
                ask.settle(True)

    def _again(self, member: Member, ask: Ask, now: bool) -> None:
        self._want(member, ask)
        if member.alive:
            member.again = True

    def _stop(self, member: Member, ask: Ask, now: bool) -> None:
        self._overtake(member, ask)
        member.wanted = member.again = member.follows_failure = member.run_wanted = False
        if not member.alive:
            ask.settle(True)
        elif isinstance(member, Group):
            self.turn_down(member)  # also where it was closing already
        if member.alive and now:
            self.ask(member, "command")
            self.hasten_stop(member)

    def turn_down(self, group: Group) -> None:
        """Who asked for a start below it is told at once that there will be none."""
        for child in group.children:
            for member in within(child):
                self.answer(member, STARTING_VERBS, False)

    def hasten_stop(self, member: Member) -> None:
        if isinstance(member, Group):
            member.hurried = True
            for child in member.children:
                if child.alive:
                    self.hasten_stop(child)
        elif member.asked is not None:
            self.kill_one(member)

    def _run_now(self, member: Member, ask: Ask, now: bool) -> None:
        if member.alive:
            ask.ok = False
            return
        self._overtake(member, ask)
        member.over = member.succeeded = member.follows_failure = False
        member.due, member.run_wanted = None, True
        self._make_haste(member)

    def _cancel_run(self, member: Member, ask: Ask, now: bool) -> None:
        if not member.alive:
            ask.ok = False
            return
        if member.asked is not None:
            member.asks.append(ask)  # it ends already: what was asked for before holds
            return
        self._overtake(member, ask)
        member.overrules = "cancelled"
        self.ask(member, "command")

    def answer(self, member: Member, verbs: tuple[str, ...], ok: bool, run: int | None = None) -> None:
        for ask in member.asks:
            if ask.verb in verbs and (run is None or ask.first_run <= run):
                ask.settle(ok)
        member.asks = [ask for ask in member.asks if ask.ok is None]

    # ---- what happens inside a job

    def job_ends(self, name: str, failed: bool) -> bool:
        """Its function raises or returns; False where it cannot."""
        member = self.members[name]
        if not member.alive or member.cancelled:
            return False
        member.raised = failed
        self.end(member, failed)
        return True

    # ---- rules

    def settle(self) -> None:
        """Apply the rules until none has anything to say."""
        applied: list[str] = []
        while rule := next((rule for rule in RULES if rule(self)), None):
            applied.append(rule.__name__)
            assert len(applied) < 500, f"the rules never come to rest: {applied[-5:]}"
        for member in self.members.values():
            if member.waiting:
                member.resting_word = "stopped"

    def can_still_start(self, member: Member) -> bool:
        """Whether it is to start, now or when the supervisors above it are there again."""
        if self.ending or not ((member.wanted and not member.over) or member.run_wanted):
            return False
        above = member.parent
        while above is not None and above is not self.root:
            if not above.wanted or (above.over and not above.alive):
                return False
            above = above.parent
        return True

    def groups(self) -> list[Group]:
        return [self.root, *(member for member in self.members.values() if isinstance(member, Group))]


def rule_readiness_of_a_whole(world: World) -> bool:
    """A supervisor is ready when its auto children are."""
    for group in world.groups():
        well = group.whole and group.operation is None
        if well and group.well_since is None:
            group.well_since = world.now
        elif not well and group.well_since is not None:
            group.well_for, group.well_since = world.now - group.well_since, None
        if group.whole and group.whole_since is None:
            group.whole_since = world.now
            if group is not world.root:
                world.gets_ready(group)
            return True
        if not group.whole and group.whole_since is not None:
            group.whole_since = None
            return True
    return False


def rule_of_the_phases(world: World) -> bool:
    """Draining lasts until the runs in hand have ended; then everything stops; then the tree has ended."""
    if not world.ending or world.ended:
        return False
    if world.phase == "running":
        world.phase = "draining"
        world.stopped_by = world.now + world.grace
        for job in world.living_jobs():
            if not job.service:
                world.draining_until[job.name] = world.now + job.spec.grace
                world.ask(job, "drain")
        return True
    if world.phase == "draining":
        if any(world.members[name].alive and until > world.now + SAME for name, until in world.draining_until.items()):
            return False
        if any(group.closing and all(gone_at_once(world, child) for child in group.children) for group in world.groups()):
            raise Tie("a supervisor ends by itself in the moment in which it would be asked to")
        world.phase = "stopping"
        world.root.closing = world.root.closing or "asked"
        world.no_more_starts(world.root)
        return True
    living = world.living_jobs()
    if world.phase == "stopping" and living and all(job.stuck for job in living):
        world.kill()
        return True
    if not any(child.alive for child in world.root.children):
        world.ended, world.ended_at = True, world.now
        world.root.alive = False
        return True
    return False


def gone_at_once(world: World, member: Member) -> bool:
    """Whether it is not alive, or will not be any more in this very moment if it is asked to end."""
    if not member.alive:
        return True
    if isinstance(member, Group):
        return all(gone_at_once(world, child) for child in member.children)
    if member.asked is not None:
        return member.ends_at <= world.now + SAME
    return not (member.part.lag if member.part.hears else member.part.stubborn)


def rule_who_must_stop(world: World) -> bool:
    """What nobody wants stops at once; what a supervisor or a strategy stops, when nobody later is alive."""
    for group in world.groups():
        operation = group.operation
        for child in group.children:
            if not child.alive or child.asked is not None:
                continue
            if child.again or (not child.wanted and not child.run_wanted):
                world.ask(child, "command")
                return True
            stopping = {other.name for other in group.children if other.alive} if group.closing else set()
            if operation is not None and operation.until is None and child.name in operation.members:
                stopping = {name for name in operation.members if group.child(name).alive}
            if child.name in stopping and not (later_than(world, group, child) & stopping):
                world.ask(child, "order")
                if group.hurried:
                    world.hasten_stop(child)
                return True
    return False


def rule_what_is_due_at_once(world: World) -> bool:
    """A lag, a grace or a readiness of no time at all."""
    for member in world.members.values():
        for at, what in member.timers():
            if at <= world.now + SAME and what not in ("due", "operation"):
                world.happens(what, member)
                return True
    return False


def rule_a_closed_group_ends(world: World) -> bool:
    for group in world.groups():
        if group is not world.root and group.alive and group.closing and not any(child.alive for child in group.children):
            how, group.closing, group.hurried = group.closing, None, False
            world.end(group, failed=how == "failed")
            return True
    return False


def rule_operations_go_on(world: World) -> bool:
    """All gone: wait. Waited: the members may start, but for the temporary ones that it stopped."""
    for group in world.groups():
        operation = group.operation
        if operation is None:
            continue
        if operation.until is None and not any(group.child(name).alive for name in operation.members):
            operation.until = world.now + operation.wait
            return True
        if operation.until is not None and operation.until <= world.now + SAME:
            group.operation = None
            for name in operation.members:
                child = group.child(name)
                if child.restart_type is RestartType.TEMPORARY:
                    child.over = child.over or name in operation.stay_down
                else:
                    child.over = child.succeeded = False
            return True
    return False


def rule_who_may_start(world: World) -> bool:
    for group in world.groups():
        for child in group.children:
            if child.waiting and may_start(world, group, child):
                world.start(child)
                return True
    return False


def rule_at_rest_nothing_is_awaited(world: World) -> bool:
    """Who asked for a start of what will not start is told."""
    for member in world.members.values():
        if not member.alive and not world.can_still_start(member):
            pending = [ask for ask in member.asks if ask.verb in STARTING_VERBS]
            if pending:
                world.answer(member, STARTING_VERBS, False)
                return True
    return False


def may_start(world: World, group: Group, child: Member) -> bool:
    if group.operation is not None and child.name in group.operation.members:
        return False
    if child.due is not None and child.due > world.now + SAME:
        return False
    if not all(world.members[target].satisfied for target in child.spec.after):
        return False
    if group.spec.strategy is not Strategy.REST_FOR_ONE:
        return True
    earlier = group.children[: group.children.index(child)]
    return all(other.satisfied for other in earlier if other.wanted and not other.over)


def later_than(world: World, group: Group, child: Member) -> set[str]:
    """The siblings that come after `child`: by `after` (of anything in them, to anything in it), or by the list."""
    later: set[str] = set()
    found = [child]
    while found:
        here = found.pop()
        for other in group.children:
            if other.name not in later and other is not here and comes_after(world, other, here):
                later.add(other.name)
                found.append(other)
    if group.spec.strategy is Strategy.REST_FOR_ONE:
        later |= {other.name for other in group.children[group.children.index(child) + 1 :]}
    return later


def comes_after(world: World, other: Member, here: Member) -> bool:
    inside = {member.name for member in within(here)}
    return any(set(member.spec.after) & inside for member in within(other))


def within(member: Member) -> Iterator[Member]:
    yield member
    if isinstance(member, Group):
        for child in member.children:
            yield from within(child)


RULES: tuple[Callable[[World], bool], ...] = (
    rule_readiness_of_a_whole,
    rule_who_must_stop,
    rule_of_the_phases,
    rule_what_is_due_at_once,
    rule_a_closed_group_ends,
    rule_operations_go_on,
    rule_who_may_start,
    rule_at_rest_nothing_is_awaited,
)


def world_of(
    root_spec: SupervisorSpec, jobs: dict[str, JobSpec], groups: dict[str, SupervisorSpec], parts: dict[str, Part], grace: float
) -> World:
    """The world of a configuration, at its start."""
    parents = {child: name for name, spec in groups.items() for child in spec.children}
    root = Group("", root_spec, None, wanted=True)
    members: dict[str, Member] = {}
    for name, spec in groups.items():
        members[name] = Group(name, spec, None, wanted=True)
    for name, job in jobs.items():
        members[name] = Member(name, job, None, wanted=job.start == "auto", part=parts[name])
    world = World(root, members, grace)
    for name, member in members.items():
        parent = members.get(parents.get(name, ""), root)
        assert isinstance(parent, Group)
        member.parent = parent
    for group in world.groups():
        group.world, group.group_waits = world, Member(group.name, group.spec, None, wanted=True)
        group.children = [member for member in members.values() if member.parent is group]
        listed = list(group.spec.children)
        group.children.sort(key=lambda child: listed.index(child.name) if child.name in listed else -1)
    root.alive = True
    world.settle()
    return world
