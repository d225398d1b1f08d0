"""The kind `command`: a child process, its stop ladder and its output."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from supervisor.children import Child, ExitReport, Launch, signal_name
from supervisor.errors import SpawnFailed
from supervisor.kinds.context import Outcome, Resources, Run
from supervisor.kinds.job import JobSpec
from supervisor.output import Capture
from supervisor.spec import split_name


async def run(spec: JobSpec, run: Run, resources: Resources) -> Outcome:
    """One run of a command. Raises SpawnFailed if there was none.

    Asked to end: the stop signal; when the main process is gone, what it left gets SIGTERM. Cancelled, or when the main
    process ended by itself: everything is killed. Returns or raises only when nothing of it is alive, or was `abandoned`.
    """
    pattern = spec.ready.log if spec.ready else None
    with _output(spec, run, resources, pattern) as (stdout, capture):
        child = await resources.children.spawn(
            Launch(
                _argv(spec),
                env=_environ(spec, run, resources),
                cwd=spec.cwd or str(resources.base),
                stdout=stdout,
                stderr=stdout,
                run=run.id,
            )
        )
        if capture is not None:
            capture.release()
        try:
            run.spawned(child.pid)
            run.send_signal = lambda number, group: child.send_signal(number, group=group)
            run.on_stopping(lambda: child.send_signal(_stop_signal(spec), group=spec.stop_to == "group"))
            if spec.ready is None:
                run.ready("started")
            await child.wait()
            if run.stopping:
                await child.end_rest(signal.SIGTERM)
        finally:
            report = await child.destroy(stuck=lambda pids: run.stuck(_stuck(pids), pids), abandoned=run.abandoned)
            run.outcome = _outcome(spec, child, report)
    return run.outcome


@contextmanager
def _output(spec: JobSpec, run: Run, resources: Resources, pattern: str | None) -> Iterator[tuple[int | None, Capture | None]]:
    """What the child gets as stdout and stderr. On leaving, all that was written is stored."""
    if spec.output == "inherit":
        yield None, None
    elif spec.output == "null":
        yield resources.children.null, None
    else:
        path = None if spec.output == "capture" else Path(spec.output)
        try:
            capture = resources.outputs.open(
                run.job, path=path, rotate=spec.rotate, on_line=_ready_line(pattern, run), on_lost=run.output_lost
            )
        except OSError as error:
            raise SpawnFailed(
                f"no pipe for the output: {error.strerror}: raise the limit of open files (LimitNOFILE=)"
            ) from error
        try:
            yield capture.fd, capture
        finally:
            capture.finish()


def _ready_line(pattern: str | None, run: Run) -> Callable[[bytes], bool] | None:
    """Looks at each line until one matches."""
    if pattern is None:
        return None
    search = re.compile(pattern).search

    def look(line: bytes) -> bool:
        if search(line.decode(errors="replace")) is None:
            return False
        run.ready("its output said so")
        return True

    return look


def _argv(spec: JobSpec) -> tuple[str, ...]:
    command = spec.command or ()
    if not isinstance(command, str):
        return command
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise SpawnFailed(f"cannot split the command into words: {error}: write it as a list") from error


def _environ(spec: JobSpec, run: Run, resources: Resources) -> dict[str, str]:
    marks = {"SUPERVISOR_JOB": split_name(run.job)[0], "SUPERVISOR_WORKER": str(run.worker)}
    return {**resources.environ, **spec.env, **marks}


def _stop_signal(spec: JobSpec) -> signal.Signals:
    return signal.Signals[f"SIG{spec.stop_signal}"]


def _stuck(pids: tuple[int, ...]) -> str:
    return f"cannot be killed: pid {', '.join(map(str, pids))}"


def _outcome(spec: JobSpec, child: Child, report: ExitReport) -> Outcome:
    """How the run ended. A death by a signal that was sent on purpose is no failure by itself."""
    if report.survivors:
        return Outcome(reason=f"abandoned: {_stuck(report.survivors)}", failed=True, code=report.code, signal=report.signal)
    if report.signal is not None:
        asked = report.signal in map(signal_name, child.sent)
        reason = f"killed by {report.signal}" + (", core dumped" if report.core else "")
        return Outcome(reason=reason, failed=not asked, signal=report.signal)
    if report.code is None:
        return Outcome(reason="its exit status was taken by other code in this process", failed=True)
    return Outcome(
        reason=f"exited with code {report.code}", failed=report.code not in spec.success_exit_codes, code=report.code
    )
