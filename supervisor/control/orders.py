"""Requests that change what the tree does: an order for each job, given at once, and the answers that come of them."""

# ruff: noqa: ASYNC109  (handlers take what the table of verbs names, `timeout` too)

from __future__ import annotations

import math
import signal as signals
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from supervisor.control import items, messages
from supervisor.control.call import Refused
from supervisor.control.messages import Reload, Shutdown
from supervisor.errors import ControlError, did_you_mean
from supervisor.state import Answer

if TYPE_CHECKING:
    from supervisor.control.call import Call
    from supervisor.tree import Order, Supervisor


async def order(call: Call, names: list[str], wait: bool = True, timeout: float | None = None, **options: Any) -> list[Answer]:
    """The verbs that change jobs: record who asked, give the orders at once, then wait for what comes of each."""
    call.tree.resolve([name.partition("#")[0] for name in names])
    call.record(names)
    return await _answers(call.verb, call.tree.order(call.verb, names, by=call.by, **options), wait, timeout)


async def cancel(call: Call, names: list[str], wait: bool, timeout: float | None) -> list[Answer]:
    """Runs, and items: a word that names neither job nor run may be the id of an item."""
    others = [name for name in names if not _names_a_job(call.tree, name)] if call.tree.queues.names else []
    found = {name: await items.find(call.tree, name) for name in others}
    if unknown := [name for name, record in found.items() if record is None]:
        raise ControlError(f"no job, run or item {unknown[0]!r}", ControlError.NO_SUCH_NAME)
    runs = [name for name in names if name not in found]
    call.tree.resolve([name.partition("#")[0] for name in runs])
    call.record(names)
    until = math.inf if timeout is None else trio.current_time() + timeout
    orders = call.tree.order(call.verb, runs, by=call.by)
    cancelled = await items.cancel(call, [record for record in found.values() if record is not None], wait, until)
    left = None if timeout is None else max(0.0, until - trio.current_time())
    return cancelled + await _answers(call.verb, orders, wait, left)


def _names_a_job(tree: Supervisor, name: str) -> bool:
    return name.partition("#")[0] in tree.nodes or not set("*?").isdisjoint(name)


async def signal(call: Call, name: str, signal: str, group: bool) -> list[Answer]:
    """Send a signal to the process of a job, or to its group."""
    return await order(call, [name], signal=_signal_number(signal), group=group)


def _signal_number(text: str) -> int:
    """The number of `HUP`, `SIGHUP`, `hup` or `1`."""
    try:
        return signals.Signals(int(text)) if text.isdecimal() else signals.Signals["SIG" + text.upper().removeprefix("SIG")]
    except (KeyError, ValueError):
        known = [signal.name.removeprefix("SIG") for signal in signals.Signals]
        near = did_you_mean(text.upper().removeprefix("SIG"), known, "'")
        raise ControlError(f"no signal {text[:16]!r}{near}") from None


async def scale(call: Call, name: str, workers: int, wait: bool, timeout: float | None) -> list[Answer]:
    """Have so many workers of a job."""
    return await order(call, [name], wait, timeout, workers=workers)


async def reload(call: Call, names: list[str], plan: bool, wait: bool, timeout: float | None) -> Reload | list[Answer]:
    """Read the file again and apply it, or only say what that would change; with names: these jobs alone."""
    if names:
        if plan:
            raise Refused(messages.INVALID_PARAMS, "reload: a plan is of the whole file; leave the names out")
        return await order(call, names, wait, timeout)
    if call.server.reload is None:
        raise ControlError(
            "this supervisor was not started from a file; give it its new configuration in the program it runs in"
        )
    if not plan:
        call.record()
    changes, orders = await call.server.reload(plan=plan, by=call.by)
    answers = await _answers(call.verb, orders, wait, timeout)
    return Reload(**asdict(changes), answers=tuple(answers))


async def shutdown(call: Call, now: bool, wait: bool, timeout: float | None) -> Shutdown:
    """Begin the orderly stop; the answer says who needed more than their grace, and what is left."""
    call.record()
    call.tree.shutdown("told to shut down", by=call.by, kill=now)
    if not wait:
        return Shutdown()
    with trio.move_on_after(float("inf") if timeout is None else timeout) as waiting:
        await call.tree.wait_stopped()
    if waiting.cancelled_caught:
        raise Refused(ControlError.TIMED_OUT, f"shutdown: not done after {timeout:g} s; it goes on")
    return Shutdown(late=call.tree.late, survivors=call.tree.survivors)


async def _answers(verb: str, orders: Sequence[Order], wait: bool, timeout: float | None) -> list[Answer]:
    """What came of the orders. To stop waiting, by timeout or because the client hung up, undoes none of them."""
    answers: dict[str, Answer] = {}

    async def collect(order: Order) -> None:
        answers[order.name] = await order.wait()

    with trio.move_on_after(float("inf") if timeout is None else timeout) as waiting:
        async with trio.open_nursery() as nursery:
            for order in orders:
                nursery.start_soon(collect, order)
            if not wait:
                await _let_orders_arrive()
                nursery.cancel_scope.cancel(reason="the client does not wait")
    missing = [order.name for order in orders if order.name not in answers]
    if missing and waiting.cancelled_caught:
        done = [answers[order.name] for order in orders if order.name in answers]
        late = f"{verb}: not done after {timeout:g} s: {', '.join(missing)}; it goes on"
        raise Refused(ControlError.TIMED_OUT, late, msgspec.to_builtins(done))
    return [answers.get(order.name) or Answer(name=order.name, ok=True, text=f"{verb} accepted") for order in orders]


async def _let_orders_arrive() -> None:
    """A supervisor's loop takes an order up on its next turn; what it refuses at once is known after that."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()
