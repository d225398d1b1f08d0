"""The tree as its users see it: `open_supervisor`, and the `Supervisor` it yields.

The daemon is this library plus a socket, a log and systemd manners.

    opening       `open_supervisor`: what a tree stands on, and what comes out when it has ended
    supervisor    `Supervisor`: its nodes, what can be read of them, and what can be asked of them
    reload        another configuration for it: only what differs is touched
    phases        how it ends: draining, stopping, killing
    outline       what a configuration says of the tree as a whole (pure)
"""

from __future__ import annotations

from supervisor.nodes import Order
from supervisor.tree.opening import open_supervisor
from supervisor.tree.supervisor import Supervisor

__all__ = ["Order", "Supervisor", "open_supervisor"]
