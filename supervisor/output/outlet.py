"""The way from a pipe to a sink: what waits for a slow one, and the account of what a failing one would not take."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import trio

if TYPE_CHECKING:
    from supervisor.output.pump import Capture

BACKLOG = 256 << 10
"""Bytes that may wait for a slow sink. What a pipe of a run that has ended still holds must find room here, too."""

PIECE = 64 << 10
"""So much of it is offered to the sink at once."""

CALM = 1.0
"""Seconds without a loss after which a sink that was too slow counts as fast enough again."""

Overload = Literal["block", "drop"]
OnLost = Callable[[int, str], None]


class Sink(Protocol):
    """Where output is stored. None of it blocks (a disk may), none raises."""

    error: OSError | None
    """Why the last write lost something."""

    @property
    def unfinished(self) -> bool:
        """Whether it holds back a line that has no end yet."""

    def write(self, data: bytes) -> tuple[int, int]:
        """How many bytes from the start are stored, and how many after them lost. What is left has no room now."""

    def fileno(self) -> int:
        """What becomes writable when there is room again."""

    def close(self) -> None:
        """Let go of descriptors; the next write gets them again."""


class Outlet:
    """A sink, and what waits for it. Nothing here waits itself: the pump calls `flush` when the sink has room again.

    Where there is no room, `block` means that the pipe is not read any more until there is, so the child waits; `drop`
    that lines are dropped. The rest of an ended run is taken in any case, so that a stop never depends on a slow sink. What
    has no room in the backlog either is lost, by whole lines. `on_lost` gets the first loss at once and the rest when it is
    over: the counts add up to all that was lost.
    """

    __slots__ = ("_backlog", "_calm_at", "_skip", "_unreported", "on_lost", "overload", "pipes", "sink")

    def __init__(self, sink: Sink, overload: Overload, on_lost: OnLost) -> None:
        self.sink = sink
        self.overload = overload
        self.on_lost = on_lost
        self.pipes: set[Capture] = set()
        """Those that lead here."""
        self._backlog = bytearray()
        self._skip = 0  # bytes to pass over at most, up to the next line end: the line has lost its beginning
        self._unreported = -1  # lost since the last report; -1: all is well
        self._calm_at = 0.0

    @property
    def full(self) -> bool:
        """Whether something waits for room in the sink."""
        return bool(self._backlog)

    @property
    def blocked(self) -> bool:
        """Whether nothing more should be read."""
        return self.full and self.overload == "block"

    def take(self, data: bytes) -> int:
        """Store a chunk, or let it wait. Returns how many bytes are lost, perhaps of earlier chunks."""
        lost = self._skipped(data) if self._skip else 0
        data = data[lost:]
        if self._backlog:
            lost += self._keep(data)
        elif data:
            stored, refused = self.sink.write(data)
            lost += refused
            if stored + refused < len(data):
                lost += self._keep(data[stored + refused :])
        if lost or self.sink.error is not None or self._unreported >= 0:
            self._account(lost)
        return lost

    def flush(self) -> None:
        """The sink has room again, or has failed: on with the backlog, a piece of it."""
        with memoryview(self._backlog) as waiting:
            piece = bytes(waiting[:PIECE])
        stored, lost = self.sink.write(piece)
        del self._backlog[: stored + lost]
        if lost or self.sink.error is not None or self._unreported >= 0:
            self._account(lost)

    def finish(self) -> None:
        """A run is over: nothing more of the line at hand will come, and what was lost is told."""
        if self.sink.unfinished:
            self.take(b"\n")
        if self._unreported > 0:
            self._report(self._unreported)

    def close(self) -> None:
        """Give up what waits, and let go of the sink."""
        waiting = BACKLOG + 1
        while 0 < len(self._backlog) < waiting:
            waiting = len(self._backlog)
            self.flush()
        if self._backlog:
            self._report(len(self._backlog) + max(0, self._unreported))
            self._backlog.clear()
        self.sink.close()

    def _keep(self, data: bytes) -> int:
        """Let `data` wait, whole lines, as far as there is room. Returns how many bytes are lost."""
        backlog = self._backlog
        backlog += data
        if len(backlog) <= BACKLOG:
            return 0
        whole = backlog.rfind(b"\n", 0, BACKLOG) + 1
        kept = whole or BACKLOG - 1
        lost = len(backlog) - kept
        del backlog[kept:]
        if not whole:  # one line without end: it ends here
            backlog += b"\n"
        self._skip = 0 if data.endswith(b"\n") else BACKLOG
        return lost

    def _skipped(self, data: bytes) -> int:
        """How much of `data` belongs to a line that has lost its beginning."""
        end = data.find(b"\n", 0, self._skip) + 1
        skipped = end or min(len(data), self._skip)
        self._skip = 0 if end else self._skip - skipped
        return skipped

    def _account(self, lost: int) -> None:
        """Report the first loss, and the rest when it is over."""
        slow = self.sink.error is None
        if lost and slow:
            self._calm_at = trio.current_time() + CALM
        if not lost and slow and not self.full:
            if trio.current_time() >= self._calm_at:
                self.on_lost(self._unreported, f"{self.sink} can be written again")
                self._unreported = -1
        elif self._unreported < 0:
            if lost or not slow:
                self._report(lost)
        else:
            self._unreported += lost

    def _report(self, lost: int) -> None:
        self.on_lost(lost, self._trouble())
        self._unreported = 0

    def _trouble(self) -> str:
        if (error := self.sink.error) is None:
            return f"{self.sink} is too slow"
        reason = "nobody reads it" if error.errno == errno.ENXIO else error.strerror or str(error)
        return f"cannot write {self.sink}: {reason}"
