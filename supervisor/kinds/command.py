"""The kind `command`: a child process, what it is started with, its stop ladder and its output."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog
import trio
from msgspec import structs

from supervisor.accounts import Identity, identity_of
from supervisor.children import Child, ExitReport, Launch, signal_name
from supervisor.errors import SpawnFailed
from supervisor.kinds.attachment import COLUMNS, ROWS, Attachment
from supervisor.kinds.context import Outcome, Resources, Run, alone
from supervisor.kinds.environment import environment
from supervisor.kinds.job import JobSpec
from supervisor.output import Capture, journal, record
from supervisor.spec import shown, split_name
from supervisor.state import Spent
from supervisor.wall import written

if TYPE_CHECKING:
    from supervisor.kinds.chain import Chain

log = structlog.get_logger("supervisor")


def run(
    spec: JobSpec,
    run: Run,
    resources: Resources,
    channel: socket.socket | None = None,
    ends: tuple[int, int] | None = None,
) -> Awaitable[Outcome]:
    """One run of a command. Raises SpawnFailed if there was none.

    Asked to end: the stop signal, or the stop command; when the main process is gone, what it left gets SIGTERM. Cancelled,
    or when the main process ended by itself: everything is killed. Returns or raises only when nothing of it is alive, or was
    `abandoned`.

    With a `channel` (`Launch.channel`), it is the child's from its start on, and closed here; and who has the other end says
    that the run has started. `ends` are its standard input and output instead of what the job says of them.

    Where what it gives is wanted, each line that it prints is an item, which is put before the run has ended; what it writes to
    stderr goes where the output of others does.
    """
    if run.chain is None or channel is not None or ends is not None:
        return _run(spec, run, resources, channel, ends)
    return _handed_on(spec, run, resources, run.chain)


async def _handed_on(spec: JobSpec, run: Run, resources: Resources, chain: Chain) -> Outcome:
    printed, printing = os.pipe2(os.O_CLOEXEC)
    with alone():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chain.put_lines, printed)
            with ExitStack() as ours:
                ours.callback(os.close, printing)
                outcome = await _run(spec, run, resources, None, (None, printing))
    return outcome


async def _run(
    spec: JobSpec, run: Run, resources: Resources, channel: socket.socket | None, ends: tuple[int | None, int] | None
) -> Outcome:
    pattern = spec.ready.log if spec.ready else None
    with _output(spec, run, resources, pattern) as (stdout, capture), _extras(spec, channel) as kept:
        child, launch = await _start(spec, run, resources, stdout, capture, kept, channel, ends)
        try:
            run.send_signal = lambda number, group: child.send_signal(number, group=group)
            if spec.ready is None and channel is None:
                run.ready("started")
            await _until_dead(spec, run, resources, launch, child)
            if run.stopping:
                await child.end_rest(signal.SIGTERM)
        finally:
            report = await child.destroy(stuck=lambda pids: run.stuck(_stuck(pids), pids), abandoned=run.abandoned)
            run.outcome = _outcome(spec, run, child, report, capture)
    return run.outcome


# ---- what it is started with ----


async def _start(
    spec: JobSpec,
    run: Run,
    resources: Resources,
    stdout: int | None,
    capture: Capture | None,
    kept: ExitStack | None,
    channel: socket.socket | None,
    ends: tuple[int | None, int] | None,
) -> tuple[Child, Launch | None]:
    """Start the main process. The launch is given only where it will be needed again: a thousand of them weigh something."""
    launch = await _launch(spec.command, spec, run, resources, stdout)
    if kept is None:
        child = await _spawn(_between(launch, ends), run, resources)
    else:
        with ExitStack() as handed:
            whole = await _with_extras(launch, spec, run, resources, capture, kept, handed)
            if channel is not None:
                whole = replace(whole, channel=handed.enter_context(channel).fileno())
            child = await _spawn(_between(whole, ends), run, resources)
    if capture is not None:
        capture.release()
    return child, launch if spec.stop_command is not None else None


def _between(launch: Launch, ends: tuple[int | None, int] | None) -> Launch:
    if ends is None:
        return launch
    stdin, stdout = ends
    return replace(launch, stdin=launch.stdin if stdin is None else stdin, stdout=stdout)


async def _spawn(launch: Launch, run: Run, resources: Resources) -> Child:
    run.expect_process()
    child = await resources.children.spawn(launch)
    run.spawned(child.pid)
    return child


def _extras(spec: JobSpec, channel: socket.socket | None) -> AbstractContextManager[ExitStack | None]:
    """What the main process alone gets, and we keep until it has ended; None for one that gets nothing, as most do."""
    return ExitStack() if spec.tty or spec.sockets or spec.stdin != "null" or channel is not None else nullcontext()


async def spawn_beside(
    command: str | tuple[str, ...] | None,
    spec: JobSpec,
    run: Run,
    resources: Resources,
    output: int,
    channel: int | None = None,
) -> Child:
    """Start another command of a run, as its own would be: a probe. Destroying it is the caller's business."""
    launch = await _launch(command, spec, run, resources, output)
    return await resources.children.spawn(replace(launch, channel=channel))


async def _launch(
    command: str | tuple[str, ...] | None, spec: JobSpec, run: Run, resources: Resources, output: int | None
) -> Launch:
    """A command of the run, and how its process shall be: what the main process has in common with others beside it."""
    environ, identity = await _surroundings(spec, resources)
    return Launch(
        argv=_argv(command),
        env={**environ, **run.environ, **_marks(run)},
        cwd=spec.cwd or str(resources.base),
        stdout=output,
        stderr=output,
        umask=spec.umask,
        nice=spec.nice,
        user=identity and identity.uid,
        group=identity and identity.gid,
        groups=identity.groups if identity else (),
        rlimits=spec.rlimits,
        no_new_privileges=spec.no_new_privileges,
        run=run.id,
    )


async def _with_extras(
    launch: Launch,
    spec: JobSpec,
    run: Run,
    resources: Resources,
    capture: Capture | None,
    kept: ExitStack,
    handed: ExitStack,
) -> Launch:
    """`launch` with what only the main process gets: its input and its sockets.

    What we need until it has ended goes into `kept`, what we hold only until it has started into `handed`.
    """
    return replace(
        launch,
        stdin=_input(spec, run, capture, kept, handed),
        tty=_terminal(capture, launch.user) if spec.tty else None,
        sockets=[(name, await _socket(name, resources, kept, handed)) for name in spec.sockets],
    )


def _marks(run: Run) -> dict[str, str]:
    """What tells a child whose run it is, and for which moment of the schedule, where it is for one."""
    told = {"SUPERVISOR_JOB": split_name(run.job)[0], "SUPERVISOR_WORKER": str(run.worker)}
    return told if run.scheduled_at is None else {**told, "SUPERVISOR_SCHEDULED_AT": written(run.scheduled_at)}


async def _surroundings(spec: JobSpec, resources: Resources) -> tuple[dict[str, str], Identity | None]:
    """The environment, and whom it runs as. Files and the user database are read beside the loop, which they may block."""

    def look() -> tuple[dict[str, str], Identity | None]:
        identity = identity_of(spec.user, spec.group, spec.groups)
        return environment(spec, resources.environ, resources.env, resources.env_file), identity

    if spec.user or spec.group or spec.groups or spec.clear_env or spec.env_file or resources.env_file:
        return await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    return look()


def _input(spec: JobSpec, run: Run, capture: Capture | None, kept: ExitStack, handed: ExitStack) -> int | None:
    """What the child reads: nothing (None), a file, or what comes in by `run.attach`, also at its terminal."""
    try:
        if spec.tty and capture is not None:
            _let_in(run, Attachment(capture.duplicate(), tty=True), kept).resize(ROWS, COLUMNS)
            return capture.fd
        if spec.stdin == "pipe":
            stdin, writing = os.pipe2(os.O_CLOEXEC)
            handed.callback(os.close, stdin)
            _let_in(run, Attachment(writing, tty=False), kept)
            return stdin
        if spec.stdin != "null":
            access = os.O_RDWR if Path(spec.stdin).is_fifo() else os.O_RDONLY  # a FIFO waits for writers and has no end
            stdin = os.open(spec.stdin, access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
            handed.callback(os.close, stdin)
            os.set_blocking(stdin, True)
            return stdin
    except OSError as error:
        raise SpawnFailed(f'stdin "{shown(spec.stdin)}": {(error.strerror or str(error)).lower()}') from error
    return None


def _let_in(run: Run, attachment: Attachment, kept: ExitStack) -> Attachment:
    """Open the way in to the run, until it is over."""

    def close() -> None:
        attachment.release()
        run.attach = None

    kept.callback(close)
    run.attach = attachment
    return attachment


def _terminal(capture: Capture | None, user: str | int | None) -> int:
    """The child's end of its terminal, which belongs to whom it runs as."""
    assert capture is not None  # the rules see to it: what is printed on a terminal is captured
    if isinstance(user, int):
        os.fchown(capture.fd, user, -1)
    return capture.fd


async def _socket(name: str, resources: Resources, kept: ExitStack, handed: ExitStack) -> int:
    """A descriptor of a listening socket that stays this one, also if a reload closes that of the daemon meanwhile."""
    descriptor = os.dup(await resources.sockets.borrow(name, kept))
    handed.callback(os.close, descriptor)
    return descriptor


# ---- its end ----


async def _until_dead(spec: JobSpec, run: Run, resources: Resources, launch: Launch | None, child: Child) -> None:
    """Wait for the end of the main process, and ask for it when the run is asked to end."""
    if launch is None:
        run.on_stopping(lambda: child.send_signal(_stop_signal(spec), group=spec.stop_to == "group"))
        await child.wait()
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_ask_by_command, spec, run, resources, launch, child.pid)
        await child.wait()
        if not run.stopping:
            nursery.cancel_scope.cancel(reason="the main process has ended")


async def _ask_by_command(spec: JobSpec, run: Run, resources: Resources, launch: Launch, main: int) -> None:
    """Run the stop command when the run is asked to end. If that is in vain, the grace ends it all the same."""
    await run.wait_stopping()
    try:
        report = await _run_stop_command(spec, run, resources, launch, main)
    except SpawnFailed as error:
        log.warning("stop_command failed", job=run.job, run=run.id, reason=str(error))
    else:
        if report.code != 0:
            log.warning("stop_command failed", job=run.job, run=run.id, reason=_end(report))


async def _run_stop_command(spec: JobSpec, run: Run, resources: Resources, launch: Launch, main: int) -> ExitReport:
    with _output(structs.replace(spec, tty=False), run, resources, None) as (stdout, capture):
        env = {**launch.env, "SUPERVISOR_MAINPID": str(main)}
        asking = await resources.children.spawn(
            replace(launch, argv=_argv(spec.stop_command), env=env, stdout=stdout, stderr=stdout)
        )
        try:
            if capture is not None:
                capture.release()
            await asking.wait()
        finally:
            report = await asking.destroy(stuck=lambda pids: run.stuck(_stuck(pids), pids), abandoned=run.abandoned)
    return report


# ---- its output ----


@contextmanager
def _output(spec: JobSpec, run: Run, resources: Resources, pattern: str | None) -> Iterator[tuple[int | None, Capture | None]]:
    """What the child gets as stdout and stderr. On leaving, all that was written is stored."""
    if spec.output == "inherit":
        yield None, None
    elif spec.output == "null":
        yield resources.children.null, None
    else:
        watchers = [_ready_line(pattern, run)] if pattern is not None else []
        watchers += [_json_line(run)] if spec.parse == "json" else []
        try:
            capture = resources.outputs.open(
                run.job,
                run=run.id,
                to=_destination(spec.output),
                rotate=spec.rotate,
                max_line=spec.max_line,
                on_overload=spec.on_overload,
                watchers=watchers,
                on_lost=run.output_lost,
                tty=spec.tty,
            )
        except OSError as error:
            raise SpawnFailed(_no_output(spec, error)) from error
        try:
            yield capture.fd, capture
        finally:
            capture.finish()


def _destination(output: str) -> Path | Literal["journal"] | None:
    if output == "journal":
        return "journal"
    return None if output == "capture" else Path(output)


def _no_output(spec: JobSpec, error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"no pipe for the output: {error.strerror}: raise the limit of open files (LimitNOFILE=)"
    return f'no journal for the output: {journal.SOCKET}: {error.strerror}: use another `output` than "{spec.output}"'


def _ready_line(pattern: str, run: Run) -> Callable[[bytes], bool]:
    """Looks at each line until one matches."""
    search = re.compile(pattern).search

    def look(line: bytes) -> bool:
        if search(line.decode(errors="replace")) is None:
            return False
        run.ready("its output said so")
        return True

    return look


_TAKEN = frozenset(
    {"timestamp", "level", "event", "logger", "job", "run", "exception", "exc_info", "stack", "stack_info"}
    | {"positional_args", "method_name", "self"}
)
"""Names that mean something else in a line of the daemon's log, or to structlog."""


def untaken(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line of a child's, under names that they may have in the daemon's log."""
    return {f"{key}_" if key in _TAKEN else key: value for key, value in fields.items()}


def _json_line(run: Run) -> Callable[[bytes], bool]:
    """Makes a line of the daemon's log of each line: of its fields if it is a JSON object, else of its text."""
    log = structlog.get_logger("job").bind(job=run.job, run=run.id)
    unparsed = 0

    def look(line: bytes) -> bool:
        nonlocal unparsed
        if (said := record(line)) is not None:
            getattr(log, said.level)(said.event, **untaken(said.fields))
        elif line:
            unparsed += 1
            log.info(line.decode(errors="backslashreplace"), unparsed=unparsed)
        return False

    return look


def _argv(command: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if not isinstance(command, str):
        return command or ()
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise SpawnFailed(f"cannot split the command into words: {error}: write it as a list") from error


def _stop_signal(spec: JobSpec) -> signal.Signals:
    return signal.Signals[f"SIG{spec.stop_signal}"]


def _stuck(pids: tuple[int, ...]) -> str:
    return f"cannot be killed: pid {', '.join(map(str, pids))}"


def _outcome(spec: JobSpec, run: Run, child: Child, report: ExitReport, capture: Capture | None) -> Outcome:
    """How the run ended. A death by a signal that was sent on purpose is no failure by itself."""
    failed, reason = report.code not in spec.success_exit_codes, _end(report)
    if report.survivors:
        failed, reason = True, f"abandoned: {_stuck(report.survivors)}"
    elif report.signal is not None:
        failed = report.signal not in map(signal_name, child.sent) and not (run.stopping and spec.stop_command is not None)
    return Outcome(
        reason=reason,
        failed=failed,
        code=report.code,
        signal=report.signal,
        spent=Spent(duration=report.duration, cpu=report.user + report.system, max_rss=report.max_rss),
        output=capture.last_words() if failed and capture is not None else (),
    )


def _end(report: ExitReport) -> str:
    if report.signal is not None:
        return f"killed by {report.signal}" + (", core dumped" if report.core else "")
    if report.code is None:
        return "its exit status was taken by other code in this process"
    return f"exited with code {report.code}"
