"""The timelines of the pages under docs: a file of the page, run in virtual time, as the page prints it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog.testing
import trio

from supervisor import events
from supervisor.cli.render import epoch
from supervisor.errors import EssentialEnded, RestartIntensityExceeded
from supervisor.events import Event, Journal
from supervisor.spec import Seconds
from supervisor.state import Why
from supervisor.tree import open_supervisor
from supervisor.wall import written
from tests.forest import FakeWall
from tests.forest import moment as moment_of


async def timeline(file: Path, until: float, commands: list[tuple[float, str, str]]) -> str:
    """What happens from the start of `file` until then, an event a line; commands are (moment, verb, name). No jitter.

    The wall clock shows midnight at the start; the command `clock` sets it, by the duration in place of the name.
    """
    told: list[tuple[float, str, str]] = []
    begin = trio.current_time()
    wall = FakeWall(moment_of("2026-01-01 00:00") - begin)
    journal = Journal(now=lambda: written(wall.now()))

    runs = set()

    def note(event: Event) -> None:
        now = trio.current_time() - begin
        if isinstance(event, events.Starting) and (event.for_at or event.cause == "a run was asked for"):
            runs.add(event.run)
        elif isinstance(event, events.Ready) and event.run in runs:
            return  # it begins, and that says it
        told.extend((now, name, text) for name, text in _told(event, now))

    journal.add_sink(note)
    with structlog.testing.capture_logs(), suppress(EssentialEnded, RestartIntensityExceeded):
        async with open_supervisor(file, journal=journal, spread=lambda low, high: 1.0, wall=wall) as tree:
            with trio.move_on_at(begin + until):  # not round the opening, which may wait for the disk: no virtual time
                for moment, verb, name in commands:
                    await trio.sleep_until(begin + moment)
                    if verb == "clock":
                        wall.step(Seconds.parse(name))
                    else:
                        tree.order(verb, [name], by="an operator")
                await trio.sleep_forever()
    lasting = [each for at, each in enumerate(told) if each[0] < until and not _passing(each, told[at + 1 :])]
    return "".join(f"{now:6.1f} s  {name:<8}  {text}\n" for now, name, text in lasting)


def _passing(each: tuple[float, str, str], later: list[tuple[float, str, str]]) -> bool:
    """Whether it is a wait that was over in the moment in which it began: whether that is seen at all is left to chance."""
    now, name, text = each
    return text.startswith("waits for ") and any(other[:2] == (now, name) for other in later)


def _run(event: events.Starting) -> str:
    """A run of a schedule begins."""
    return f"{event.run} begins" + (f", for {event.for_at[11:19]}" if event.for_at else ": " + event.cause)


def _told(event: Event, now: float) -> Iterator[tuple[str, str]]:
    match event:
        case events.Starting(name=name) if event.for_at or event.cause == "a run was asked for":
            yield name, _run(event)
        case events.Skipped(name=name, cause=cause, ticks=ticks):
            yield name, f"no run: {cause}" if ticks == 1 else f"no runs: {cause}"
        case events.Ready(name=name):
            yield name, "ready"
        case events.Waiting(name=name, why=Why.BACKOFF, cause=cause, next_at=str(moment)):
            yield name, f"backing off, starts at {now + _seconds(event.at, moment):.1f} s"
        case events.Waiting(name=name, cause=cause, why=Why.PLAIN):
            yield name, cause
        case events.Ended(name=name, cause=cause, why=Why.PLAIN):
            yield name, f"stopped: {cause}"
        case events.Ended(name=name, cause=cause, why=why):
            yield name, f"{why.value}: {cause}" if why.value != cause else why.value
        case events.Stopped(name=name, cause=cause, why=why):
            yield name, f"{why.value}: {cause}" if why is not Why.PLAIN else f"stopped: {cause}"
        case events.HealthCheckFailed(name=name, cause=cause):
            yield name, cause
        case events.GroupRestarting(name=name, affected=affected):
            yield name, f"restarts {', '.join(affected)}"
        case events.IntensityExceeded(name=name, cause=cause):
            yield name, f"too often: {cause}"
        case events.Warned(text=text):
            yield "(root)", text
        case events.PhaseChanged(phase=phase, cause=cause):
            yield "(daemon)", f"{phase.value}: {cause}"
        case _:
            pass


def _seconds(earlier: str, later: str) -> float:
    return epoch(later) - epoch(earlier)
