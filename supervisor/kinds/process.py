"""The kind `process`: a plain function in a Python process of its own.

The process is a command like any other, with its output, limits, user and stop ladder (`command.py`). Its program is
`process_main.py`, and a channel tells it what to call, and us what becomes of it; `process_worker.py` has the frames. It
loads the code anew each time it starts. The worker of a queue job has one for all its calls: `process_calls.py`.
"""

from __future__ import annotations

import time
from typing import Any

import structlog
import trio
from msgspec import structs

from supervisor.kinds.context import Outcome, Resources, Run, alone
from supervisor.kinds.job import JobSpec
from supervisor.kinds.process_channel import (
    Channel,
    Failed,
    Message,
    Nonsense,
    Progress,
    Returned,
    Started,
    arguments,
    checked,
    named,
)
from supervisor.spec import split_name
from supervisor.state import Phase

log = structlog.get_logger("supervisor")


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """Call the function in a process of its own. What it returns stays there, unless it goes into a queue.

    Asked to end: a function that takes a `Context` hears it; where it takes none, a service or what takes too long is
    interrupted by SystemExit. Cancelled: the process and all that came of it are killed. Raises SpawnFailed if there was no
    process, and RunFailed for arguments that cannot be sent to one, or where the function raised.
    """
    with Worker(spec, run, resources, wanted=run.chain is not None and not spec.service) as worker:
        return await worker.serve()


class Worker(Channel):
    """Our side of a worker process, for one run."""

    def __init__(self, spec: JobSpec, run: Run, resources: Resources, *, wanted: bool = False) -> None:
        """`wanted`: what the function returns is sent back, and is `result` then."""
        super().__init__(spec, run, resources)
        self.result: bytes | None = None
        """What the function returned, as JSON."""
        self._wanted = wanted
        self._returned = False
        self._failed: Failed | None = None

    async def serve(self) -> Outcome:
        """Have the job's function called in a process, and wait until nothing of it is alive."""
        self.tell(self._call(), arguments(self._spec))
        self.tell({"is": "end"})
        with alone():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_phases)
                await self.live(self._run)
                nursery.cancel_scope.cancel(reason="the worker has ended")
        outcome = self._run.outcome = self._judged(self._run.outcome or Outcome(reason="killed", failed=True))
        if self._failed is not None and not self.nonsense:
            raise self._failed.error
        return outcome

    def _call(self) -> dict[str, Any]:
        """The order to call the function for this run."""
        run = self._run
        facts = {"job": split_name(run.job)[0], "worker": run.worker, "run": run.id, "attempt": run.attempt}
        facts["scheduled_at"] = run.scheduled_at
        facts["until"] = None if run.left is None else time.monotonic() + run.left  # all processes have this clock
        call = named(self._spec.call)
        asked = {"wanted": self._wanted, "into": run.chain is not None}
        return {"is": "call", "call": call, "service": self._spec.service, "facts": facts, **asked}

    async def _tell_phases(self) -> None:
        async for phase in self._run.phase.eventual_values(lambda phase: phase is not Phase.RUNNING):
            stopping = not phase < Phase.STOPPING
            self.tell({"is": "phase", "phase": phase.value, "stopping": stopping, "overdue": self._run.overdue})

    def _take(self, message: Message, body: bytes) -> None:
        match message:
            case Started():
                if self._spec.ready is None:
                    self._run.ready("started")
            case Progress(done, total):
                self._run.progress(done, total)
            case Returned():
                if body and not self._wanted:
                    raise Nonsense("a result, which nobody waits for")
                self._returned, self.result = True, checked(body) if body else None
            case Failed():
                self._fail(message)
            case _:
                super()._take(message, body)

    def _fail(self, message: Failed) -> None:
        """The function has raised, or was not to be had. Its traceback goes to the log once, as those of other kinds do."""
        self._failed = message
        if message.traceback:
            tell, what = (log.debug, "attempt raised") if self._run.followed else (log.error, "job raised")
            tell(what, job=self._run.job, run=self._run.id, exception=message.traceback)

    def _judged(self, outcome: Outcome) -> Outcome:
        """How the run ended, as the process and its last word say together."""
        failure = self.nonsense or (str(self._failed.error) if self._failed is not None else "")
        if failure:
            return structs.replace(outcome, reason=failure, failed=True)
        if self._returned and not outcome.failed:  # perhaps of our own signal, on its way out
            return structs.replace(outcome, reason="completed", returned=self.result)
        return outcome
