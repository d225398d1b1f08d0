"""Whether a run is well: it is asked again and again from when it is ready, and bad answers are a failure of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from supervisor import events
from supervisor.kinds import Outcome
from supervisor.nodes.asking import asked
from supervisor.nodes.job import JobNode
from supervisor.nodes.node import Ask, Life
from supervisor.probes import Health
from supervisor.probes.judgement import Answer, Judgement, News, Verdict
from supervisor.probes.questions import STOOD_STILL, put

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode


async def watch(supervisor: SupervisorNode, child: JobNode, life: Life, health: Health) -> None:
    """Ask until it is unhealthy, start to start, first one interval from now. What is to be told goes to the supervisor."""
    due, news = trio.current_time(), None
    judgement = Judgement(health, life.ready_at or due)
    asking = asked(health, child, life.run, supervisor.tree.resources)
    while news is not News.UNHEALTHY:
        due = max(due + health.every, trio.current_time())
        await trio.sleep_until(due)
        if asking is not None:
            answer = await put(asking.target, asking.question, health.timeout)
        else:
            answer = _heartbeat(life, health.every, due)
            due = life.run.heard if answer.verdict is Verdict.HEALTHY else due
        news = judgement.take(answer, trio.current_time())
        if news is not None:
            supervisor.post(heed, supervisor, child, life, news, answer, judgement.failures)


def _heartbeat(life: Life, every: float, due: float) -> Answer:
    """Whether it was heard of in time. Where the daemon was late itself, what the run has said may still be unread."""
    if life.run.heard + every > due:
        return Answer(Verdict.HEALTHY)
    if trio.current_time() > due + STOOD_STILL:
        return Answer(Verdict.NOT_ASKED)
    return Answer(Verdict.NO_ANSWER, f"no heartbeat for {due - max(life.run.heard, life.ready_at or -math.inf):.3g} s")


def heed(supervisor: SupervisorNode, child: JobNode, life: Life, news: News, answer: Answer, failures: int) -> None:
    """Tell what an answer changes, and end a run that is unhealthy: with that verdict, by the ladder."""
    if child.life is not life or life.asked is not None:
        return
    run, answered = life.run.id, answer.verdict is Verdict.UNHEALTHY
    if news is News.HEALTHY:
        child.emit(events.Healthy, run=run, cause="healthy again")
    elif news is News.FAILING and child.spec.health is not None:
        limit = child.spec.health.failures
        cause = f"health check failed, {failures} of {limit}: {answer.reason}"
        child.emit(events.HealthCheckFailed, run=run, cause=cause, answered=answered, failures=failures, limit=limit)
    else:
        cause = f"unhealthy: {answer.reason}" + (f", {failures} times in a row" if failures > 1 else "")
        child.emit(events.Unhealthy, run=run, cause=cause, answered=answered, failures=failures)
        supervisor.ask(child, life, Ask(cause, Outcome(reason=cause, failed=True)))
