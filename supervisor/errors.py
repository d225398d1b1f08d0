"""What can go wrong, sorted by who must act.

Messages are lower case without a full stop: what, where, what to do. Facts are attributes; nobody parses text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


class SupervisorError(Exception):
    """The root of everything this package raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault (or warning) of a configuration file.

    `path` is the dotted key (`jobs.api.restrat`); `line` and `column` count from 1, and are 0 where there is no place.
    """

    file: str
    line: int
    column: int
    path: str
    message: str
    warning: bool = False

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: " if self.file else ""
        kind = "warning: " if self.warning else ""
        return f"{where}{kind}{self.path}: {self.message}" if self.path else f"{where}{kind}{self.message}"


class SpecError(SupervisorError):
    """The operator must edit the file. Carries every fault found, in the order of the file. Exit code 78."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ControlError(SupervisorError):
    """The caller must ask differently: an unknown name, a verb that this job refuses, a command overtaken."""

    REFUSED = 1
    NO_SUCH_NAME = 4
    TIMED_OUT = 75

    def __init__(self, message: str, code: int = REFUSED, data: object = None) -> None:
        self.code = code
        self.data = data
        """What else there is to say, as JSON can."""
        super().__init__(message)


class QueueError(SupervisorError):
    """What was asked of a queue was not done."""


class QueueUnavailable(QueueError):
    """The engine does not answer, or cannot store now: a server that is away, a full disk. It is worth trying again.

    What was asked for may have happened all the same. Each operation may be done twice: a put with the same ids stores nothing
    twice, and the other operations are fenced.
    """


class QueueFull(QueueError):
    """There is no room for what was to be put, and none came in the time that could be waited. Nothing of it is stored."""


class BadItem(QueueError):
    """What was to be put is no item: not JSON, not what the handler takes, an unknown priority."""

    position: int | None = None
    """Which of several it was, counted from 0, where it was one of them."""


class RunFailed(SupervisorError):
    """How one run of a job failed. Data about the job: it becomes the run's outcome and never leaves the tree."""

    failure_names: Collection[str] = ()
    """What it goes by in `on` and `give_up_on`, besides its class: what ended in another process has names only."""

    traceback = ""
    """What there is to see of it where it is no exception of this process: a traceback, the last words of a command."""


class SpawnFailed(RunFailed):
    """A child process could not be started at all (no such program, not executable, no such directory, no process)."""


class Retry(RunFailed):
    """Raised by a job's own code: try me again, after so many seconds where it says so, else after the usual wait.

    It asks the `retry` round it for another attempt whatever `on` says; where there is none, or no attempt is left, it is a
    failure like any other.
    """

    def __init__(self, message: str = "asks for another attempt", *, after: float | None = None) -> None:
        self.retry_after = after
        super().__init__(message)


class RaisedElsewhere(RunFailed):
    """A function in a process of its own raised: `failure_names` are its class and those above, as "module:Class".

    `retry_after` is the exception's, where it has one.
    """

    def __init__(
        self, message: str, names: Collection[str] = (), retry_after: float | None = None, traceback: str = ""
    ) -> None:
        self.failure_names = names
        self.retry_after = retry_after
        self.traceback = traceback
        super().__init__(message)


class WorkerLost(RunFailed):
    """The process that worked on an item is gone, and did not say what became of it."""


class NotBegun(RunFailed):
    """An item was not begun with: it is for others to handle, or for later, and nothing is held against it."""


class UnfitItem(RunFailed, BadItem):
    """What was put is not what its handler takes. No other attempt mends that.

    `positions`: which items of a batch, where it is not for all of them; the others were not given to the function either.
    """

    def __init__(self, message: str, positions: Collection[int] = ()) -> None:
        self.positions = positions
        super().__init__(message)


class ExitStatus(RunFailed):
    """A command ended badly: with this exit code, or killed by this signal (its name, "SIGKILL")."""

    def __init__(self, message: str, *, code: int | None = None, signal: str | None = None) -> None:
        self.code = code
        self.signal = signal
        self.failure_names = tuple(str(name) for name in (code, signal) if name is not None)
        super().__init__(message)


class TimedOut(RunFailed):
    """One attempt took longer than its `timeout` (seconds)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"timed out after {seconds:g} s")


class DeadlineExceeded(RunFailed):
    """A whole run, its retries included, took longer than its `deadline` (seconds)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"exceeded its deadline of {seconds:g} s")


class Rejected(RunFailed):
    """A limit did not let it begin. `retry_after`: seconds until it is worth trying again, where that is known.

    Says nothing of the body, which did not run: a circuit breaker does not count it.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class BreakerOpen(Rejected):
    """The circuit breaker is open, or its one trial is under way."""


class BulkheadFull(Rejected):
    """All places of a bulkhead are taken, and none got free in the time, or for the number, that may wait."""


class RateLimited(Rejected):
    """No token of a rate limit came in the time that may be waited for one."""


class RestartIntensityExceeded(SupervisorError):
    """More restarts within `period` than `intensity` allows: the supervisor's own failure, and so its parent's business."""

    def __init__(self, supervisor: str, intensity: int, period: float) -> None:
        self.supervisor = supervisor
        self.intensity = intensity
        self.period = period
        super().__init__(f"more than {intensity} restarts within {period:g} s")


class EssentialEnded(SupervisorError):
    """An essential job or supervisor failed for good, and the whole tree with it."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"essential {name} failed: {reason}")


class InternalError(SupervisorError):
    """A fault of ours: an invariant does not hold. The process ends with 70 rather than go on."""


def did_you_mean(word: str, known: Iterable[str], quote: str = '"') -> str:
    """`; did you mean "…"?`, to put behind what is said of a word that is not known; nothing where nothing is like it."""
    import difflib  # only where something is wrong

    near = difflib.get_close_matches(word[:64], list(known), n=1)
    return f"; did you mean {quote}{near[0]}{quote}?" if near else ""
