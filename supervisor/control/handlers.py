"""The only things that can be called from outside, by the name of the verb."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from supervisor.control import feeds, items, orders, sessions, views

HANDLERS: dict[str, Callable[..., Awaitable[object]]] = {
    "status": views.status,
    "tree": views.tree,
    "start": orders.order,
    "stop": orders.order,
    "restart": orders.order,
    "reload": orders.reload,
    "signal": orders.signal,
    "scale": orders.scale,
    "run-now": orders.order,
    "pause": orders.order,
    "resume": orders.order,
    "cancel": orders.cancel,
    "submit": items.submit,
    "queue.ls": items.queues,
    "queue.peek": items.peek,
    "queue.dead": items.peek,
    "queue.show": items.show,
    "queue.wait": items.wait,
    "queue.requeue": items.requeue,
    "queue.purge": items.purge,
    "queue.pause": items.pause,
    "queue.resume": items.resume,
    "limits": views.limits,
    "metrics": views.metrics,
    "logs": feeds.logs,
    "events": feeds.events,
    "history": views.history,
    "exec": sessions.execute,
    "attach": sessions.attach,
    "input": sessions.pass_on,
    "shutdown": orders.shutdown,
    "version": views.version,
    "rpc.discover": views.discover,
}
"""Each is called with the `Call` and the parameters of its verb, by name; what it returns is the result."""
