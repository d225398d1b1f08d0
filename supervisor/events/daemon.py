"""What concerns the daemon as a whole: commands, its phases, its configuration, its loop."""

from __future__ import annotations

from supervisor.events.event import Event
from supervisor.state import Phase


class Commanded(Event, frozen=True, kw_only=True):
    """An operator asked for a change."""

    verb: str
    names: tuple[str, ...] = ()


class PhaseChanged(Event, frozen=True, kw_only=True):
    """The shutdown broadcast moved on."""

    phase: Phase
    cause: str


class Reloaded(Event, frozen=True, kw_only=True):
    """A new configuration is in force: what it touched."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ReloadRefused(Event, frozen=True, kw_only=True):
    """A new configuration has faults; the old one goes on."""

    level = "error"

    problems: tuple[str, ...]


class Warned(Event, frozen=True, kw_only=True):
    """Something an operator should know that belongs to no job."""

    level = "warning"

    text: str


class Stalled(Event, frozen=True, kw_only=True):
    """The loop was stuck for `seconds`. `name` and `run`: whose code it was in, None where no job's; `line`: where in it."""

    level = "warning"

    name: str | None
    run: str | None
    cause: str
    seconds: float
    line: str


DaemonEvent = Commanded | PhaseChanged | Reloaded | ReloadRefused | Warned | Stalled
