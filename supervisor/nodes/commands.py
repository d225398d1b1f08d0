"""What an operator may ask of a child. Each command changes what is wanted, at once, and lets settling do the rest."""

from __future__ import annotations

import signal as signals
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from supervisor.errors import QueueError
from supervisor.kinds import JobSpec, Outcome
from supervisor.kinds.job import MOST_WORKERS, clashes
from supervisor.nodes.job import JobNode
from supervisor.nodes.node import STARTS, Ask, Life, Node, Order
from supervisor.nodes.supervisor import SupervisorNode
from supervisor.nodes.workers import WorkersNode, plural, scale
from supervisor.spec import split_name
from supervisor.state import Goal, State


def obey(supervisor: SupervisorNode, child: Node, order: Order, options: dict[str, Any]) -> None:
    """Obey one order about one child, at once."""
    if child.name != order.name:  # a plain job that has become a worker since this was posted: the group has its name
        child = supervisor.tree.nodes[order.name]
    if child.parent is not supervisor:  # it has left since this was posted
        if child.parent is None:
            order.resolve(False, f"{child.name} is gone: {child.removing}")
        else:
            child.parent.post(obey, child.parent, child, order, options)
        return
    refusal = _refusal(supervisor, child, order.verb)
    if refusal is not None:
        order.resolve(False, refusal)
        return
    COMMANDS[order.verb](supervisor, child, order, **options)
    supervisor.touch(child)


def _refusal(supervisor: SupervisorNode, child: Node, verb: str) -> str | None:
    """Why this verb makes no sense for this child; None where it does."""
    spec = child.spec
    if not isinstance(spec, JobSpec):
        if verb not in ("start", "stop", "restart", "reload"):
            return f"{child.name} is a supervisor"
    elif child.one_off and verb in ONE_OFF_REFUSES:
        return f"{child.name} is run once, and forgotten at its end: use {ONE_OFF_REFUSES[verb]}"
    elif spec.service and verb in SERVICE_REFUSES:
        return f"{child.name} is a service: use {SERVICE_REFUSES[verb]}"
    elif spec.pooled and verb in POOL_REFUSES:
        return f"{child.name} handles the items of queue {spec.queue}: use {POOL_REFUSES[verb]}"
    elif verb == "scale" and not (spec.service or spec.overlaps or spec.pooled):
        return f"{child.name} is no service: it makes one run at a time"
    elif verb in ("start", "restart") and isinstance(supervisor, WorkersNode) and supervisor.schedule is not None:
        return f"{child.name} runs when {supervisor.name} gives it a run: use run-now {supervisor.name}"
    if verb in STARTS:
        if supervisor.tree.ending:
            return f"the daemon is stopping: {supervisor.tree.ending}"
        if (down := (child.moving_to or supervisor).down()) is not None:
            what = "supervisor" if down.kind == "supervisor" else "job"
            return f"its {what} {down.name} is {down.row.word}; start that first: supervisor start {down.name}"
        if child.removing:
            return f"{child.name} is leaving: {child.removing}"
    return None


def _want_up(supervisor: SupervisorNode, child: Node, order: Order, due: str | None = None) -> None:
    """Goal up, and no wait of ours in the way: it is not a restart after a failure. What is merely `due` overtakes nobody."""
    if due is None:
        child.overtake(order)
    child.want_up(due or _said("started", order), order.by)
    if due is None and isinstance(child, WorkersNode):
        child.want_all_up(child.goal_cause, order.by)
    supervisor.restarts.hasten(child)
    supervisor.hasten_self()


def _start(supervisor: SupervisorNode, child: Node, order: Order, with_after: bool = False) -> None:
    _want_up(supervisor, child, order)
    life = child.life
    order.after_run = child.runs if life is None or _ending(supervisor, child, life) else child.runs - 1
    if child.stopping:
        child.again = child.again or child.goal_cause
    if life is not None and child.schedule is not None:
        child.answer(("start",), True, "its schedule runs")
    elif life is not None and not _ending(supervisor, child, life) and child.whole:
        child.answer(("start",), True, "already running" + (f", pid {child.row.pid}" if child.row.pid else ""))


def _ending(supervisor: SupervisorNode, child: Node, life: Life) -> bool:
    """Whether its run is on its way out, or will be when it is its turn in the group."""
    group = supervisor.restarts.group_of(child)
    return child.stopping or (group is not None and group.stopping)


def _stop(supervisor: SupervisorNode, child: Node, order: Order, now: bool = False) -> None:
    child.overtake(order)
    child.set_goal(Goal.DOWN, _said("stopped", order), order.by)
    child.again = None
    child.restarting = None
    child.requested = False
    if child.schedule is not None:
        child.schedule.disarm()
        child.schedule.forget()
    if child.life is not None:
        child.life.requested = False
    if child.life is not None and isinstance(child, SupervisorNode):
        child.turn_down(f"overtaken: {child.goal_cause}", own=False)  # also where it was closing already
    if child.life is None:
        child.turn_down(f"{child.name} is stopped: {child.goal_cause}")
        child.answer(("stop",), True, "stopped" if child.row.state is State.WAITING else "already stopped")
    elif now:
        if child.life.asked is None:
            supervisor.ask(child, child.life, Ask(child.goal_cause))
        child.hurry()


def _restart(supervisor: SupervisorNode, child: Node, order: Order, at_once: bool = False, cause: str | None = None) -> None:
    """Stop and start. With `cause` nobody commands it: it is due (a file has changed), and gives way to what was commanded."""
    ending = child.life is not None and _ending(supervisor, child, child.life)
    if cause is not None and (child.goal is Goal.DOWN or ending):
        order.resolve(False, f"{child.name} is {child.row.word}")
        return
    _want_up(supervisor, child, order, cause)
    order.after_run = child.runs
    cause = cause or _said("restarted", order)
    if child.life is not None and at_once:
        child.again = cause
    elif child.life is not None:
        child.renew(cause)
    child.disarm()


def _reload(supervisor: SupervisorNode, child: Node, order: Order) -> None:
    """Have its process read its own configuration again, where the job says how; else a restart."""
    number = child.spec.reload_signal if isinstance(child.spec, JobSpec) else None
    if number is None:
        _restart(supervisor, child, order)
    elif isinstance(child, WorkersNode):
        order.resolve(*_each(child, partial(_have_reloaded, number=number)))
    else:
        order.resolve(*_have_reloaded(child, number))


def _have_reloaded(child: Node, number: str) -> tuple[bool, str]:
    life = child.life
    if life is None or life.run.send_signal is None or child.stopping:
        return False, f"{child.name} is {child.row.word}: it reads its configuration when it starts"
    if life.ready_at is None:
        return False, f"{child.name} is starting: a {number} may come too early; reload it when it is ready"
    life.run.send_signal(signals.Signals[f"SIG{number}"], False)
    return True, f"signalled {number}, pid {child.row.pid}"


def _each(group: WorkersNode, do: Callable[[Node], tuple[bool, str]]) -> tuple[bool, str]:
    """Do it to each of the workers that let it be done to them; False where none does."""
    done = {worker.name: do(worker) for worker in group.workers}
    able = [name for name, (ok, _) in done.items() if ok]
    return bool(
        able
    ), f"signalled {', '.join(able)}" if able else f"{group.name} is {group.row.word}, and has no process to signal"


def _run_now(supervisor: SupervisorNode, child: Node, order: Order) -> None:
    if isinstance(child, WorkersNode):
        _run_beside(supervisor, child, order)
        return
    assert isinstance(child, JobNode)
    if child.life is not None and child.spec.overlap == "skip":
        order.resolve(False, f'{child.life.run.id} is in hand, and overlap is "skip"')
        return
    if child.schedule is not None and child.spec.overlap == "replace":
        child.schedule.replace(_said("another run was asked for", order))
    child.overtake(order)
    order.after_run = child.runs
    child.revive()
    child.due_at = None
    child.restarting = None
    child.requested = True
    supervisor.hasten_self()


def _run_beside(supervisor: SupervisorNode, group: WorkersNode, order: Order) -> None:
    """A run on a worker that is free, beside those in hand; also where the schedule itself is down."""
    worker = group.free
    if worker is None or group.stopping:
        order.resolve(False, f"{group.name} is stopping" if group.stopping else f'{group.busy}, and overlap is "parallel"')
        return
    order.after_run = worker.runs
    worker.overtake(order)
    group.give_run(worker)
    if group.life is None:
        group.revive()
        group.requested = True
    supervisor.hasten_self()


def _pause(supervisor: SupervisorNode, child: Node, order: Order) -> None:
    child.paused = True
    if isinstance(child.spec, JobSpec) and child.spec.pooled:
        _have_claimed(child, order, False)
        return
    if child.schedule is not None:
        child.schedule.pause()
    _look_again(child)
    goes_on = isinstance(child, JobNode) and child.life is not None and child.life.asked is None
    order.resolve(True, "paused" + (f"; {child.row.run} goes on" if goes_on else ""))


def _resume(supervisor: SupervisorNode, child: Node, order: Order) -> None:
    was, child.paused = child.paused, False
    if isinstance(child.spec, JobSpec) and child.spec.pooled:
        _have_claimed(child, order, True)
        return
    if was and child.schedule is not None:
        child.schedule.resume()
    _look_again(child)
    order.resolve(True, "resumed")


def _have_claimed(child: Node, order: Order, claimed: bool) -> None:
    """Have the workers of a queue job claim items, or none any more."""
    assert isinstance(child.spec, JobSpec) and child.spec.queue is not None
    with suppress(QueueError, LookupError):  # where it is not open, workers will look when it is
        desk = child.tree.queues.desk(child.spec.queue)
        (desk.resume if claimed else desk.pause)(child.name)
    order.resolve(True, "resumed" if claimed else "paused: nothing is claimed; what is in hand goes on")


def _cancel(supervisor: SupervisorNode, child: Node, order: Order, run: str | None = None) -> None:
    life = child.life
    if isinstance(child, WorkersNode):
        _cancel_each(child, order, run)
        return
    if life is None or run not in (None, life.run.id):
        order.resolve(False, "no run in hand" if run is None else f"{run} is not in hand")
        return
    if life.asked is not None:
        child.orders.append(order)  # it ends already; what was asked for before holds
        return
    child.overtake(order)
    supervisor.ask(child, life, Ask(_said("cancelled", order), Outcome(reason="cancelled", failed=False)))


def _cancel_each(group: WorkersNode, order: Order, run: str | None) -> None:
    if run is not None or not group.in_hand:
        order.resolve(False, "no run in hand" if run is None else f"{run} is not in hand: the runs are those of its workers")
        return
    group.overtake(order)
    group.cancel_runs(order, Ask(_said("cancelled", order), Outcome(reason="cancelled", failed=False)))


def _look_again(child: Node) -> None:
    """Have a job whose runs may overlap say what has changed."""
    if isinstance(child, WorkersNode):
        child.post(child.touch_all)


def _scale(supervisor: SupervisorNode, child: Node, order: Order, workers: int) -> None:
    spec = supervisor.tree.config.jobs.get(child.name)
    clash = next(clashes(spec), None) if spec is not None and workers > 1 else None
    if spec is None:
        order.resolve(False, f"{child.name} is a worker: scale {split_name(child.name)[0]}")
    elif not 1 <= workers <= MOST_WORKERS:
        order.resolve(False, f"from 1 to {MOST_WORKERS} workers; for none, use stop")
    elif clash is not None:
        order.resolve(False, f"{'.'.join(clash[0])}: {clash[1]}")
    elif isinstance(child, JobNode) and workers == 1:
        order.resolve(True, "1 worker")
    else:
        group = scale(child, workers)
        if group.bounds is not None:
            group.fix()
        group.answer(("scale",), False, "overtaken by scale" + (f" ({order.by})" if order.by else ""))
        if group.goal is Goal.UP and (group.life is not None or not group.finished):
            group.orders.append(order)
        else:
            order.resolve(True, f"{plural(workers)} from its next start on")


def _signal(supervisor: SupervisorNode, child: Node, order: Order, signal: int = 0, group: bool = False) -> None:
    if not isinstance(child, WorkersNode):
        order.resolve(*_send(child, signal, group))
    else:
        order.resolve(*_each(child, partial(_send, signal=signal, group=group)))


def _send(child: Node, signal: int, group: bool) -> tuple[bool, str]:
    if child.life is None or child.life.run.send_signal is None:
        return False, f"{child.name} has no process to signal"
    try:
        child.life.run.send_signal(signal, group)
    except ProcessLookupError:
        return False, f"the process of {child.name} has just ended"
    return True, "signalled" + (" (the whole group)" if group else f", pid {child.row.pid}")


def _said(done: str, order: Order) -> str:
    return f"{done} by {order.by}" if order.by else done


SERVICE_REFUSES = {"run-now": "start", "pause": "stop", "resume": "start", "cancel": "stop or restart"}
"""What a service refuses, and the word to use instead."""

POOL_REFUSES = {"run-now": "submit, for an item to handle", "cancel": "cancel with the id of an item"}
"""What a queue job refuses, and what to use instead."""

ONE_OFF_REFUSES = {
    "restart": "exec for another run",
    "reload": "signal",
    "run-now": "exec for another run",
    "pause": "stop",
    "resume": "start",
}
"""What a job refuses that is run once and forgotten, and the word to use instead."""

COMMANDS: dict[str, Callable[..., None]] = {
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "reload": _reload,
    "run-now": _run_now,
    "pause": _pause,
    "resume": _resume,
    "cancel": _cancel,
    "signal": _signal,
    "scale": _scale,
}
"""The verbs that change a child."""
