"""From a probe in the file to a question that can be asked of a run."""

from __future__ import annotations

import shlex
import threading
from functools import partial
from typing import Any, NamedTuple

import trio

from supervisor.kinds import Context, Resources, Run
from supervisor.kinds.command import spawn_beside
from supervisor.kinds.function import context_parameter, kind_of, load
from supervisor.kinds.thread import ThreadContext
from supervisor.nodes.fence import in_one_line, split_foreign
from supervisor.nodes.job import JobNode
from supervisor.probes import Probe, questions
from supervisor.probes.questions import NoAnswer, Question
from supervisor.spec import shown


class Asked(NamedTuple):
    """A question, whom it is put to, and what a yes means; both for people."""

    target: str
    yes: str
    question: Question


def asked(probe: Probe, child: JobNode, run: Run, resources: Resources) -> Asked | None:
    """The question of a probe; None where there is nobody to ask: the run speaks up itself, or its output does."""
    if probe.http is not None:
        return Asked(shown(probe.http), "answers", questions.http(probe.http, probe.status or 200))
    if probe.tcp is not None:
        return Asked(shown(probe.tcp), "accepts connections", partial(questions.tcp, probe.tcp))
    if probe.unix is not None:
        return Asked(shown(probe.unix), "accepts connections", partial(questions.unix, probe.unix))
    if probe.file is not None:
        return Asked(shown(probe.file), "is there", questions.file(probe.file, child.probe_thread))
    if probe.exec is not None:
        target = shown(probe.exec) if isinstance(probe.exec, str) else shlex.join(map(shown, probe.exec))
        spawn = partial(spawn_beside, probe.exec, child.spec, run, resources)
        return Asked(target, "succeeds", questions.command(spawn, partial(_stuck, run), run.abandoned))
    if probe.call is not None:
        return Asked(shown(probe.call), "says so", _call(probe.call, run, resources, child.probe_thread))
    return None


def _stuck(run: Run, pids: tuple[int, ...]) -> None:
    run.stuck(f"its probe cannot be killed: pid {', '.join(map(str, pids))}", pids)


def _call(call: str, run: Run, resources: Resources, thread: trio.CapacityLimiter) -> Question:
    """Call a function, as a job's would be. Its exceptions are a no."""
    stopping = threading.Event()
    run.on_stopping(stopping.set)

    async def answer() -> Any:
        function = load(call)
        hears = context_parameter(function)
        if kind_of(function) == "task":
            return await function(**({hears: Context(run, resources)} if hears else {}))
        args = {hears: ThreadContext(run, resources, stopping)} if hears else {}
        return await questions.in_thread(lambda: function(**args), thread)()

    async def ask() -> str | None:
        try:
            return _judged(await answer())
        except NoAnswer:
            raise
        except BaseException as error:  # the probe boundary
            passing, own = split_foreign(error)
            if passing is not None or own is None:
                raise passing or error from None
            return in_one_line(own)

    return ask


def _judged(value: object) -> str | None:
    if value is None or value is True:
        return None
    if value is False:
        return "it returned False"
    return value if isinstance(value, str) else f"it returned {type(value).__name__}, expected True, False, None or a reason"
