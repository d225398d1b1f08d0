"""Everything that happens is one typed event; status is a fold of them.

    lifecycle      a child enters the tree, waits, runs, ends, leaves
    health         what a run answers when it is asked, and what it says of itself
    attempts       what the policies round a run do, and breakers
    queues         items, the workers that handle them, and the engines that keep them
    daemon         commands, phases, reloads, warnings
    journal        `Journal.emit`, the only writer, and the readers: sinks, the ring, subscriptions; `fold`

An event's struct is the place where its name, its fields and what it does to a row stand together: add one to a room, and to
the union at its end, and `fold`, the wire and the documentation know it. All of them are found here.
"""

# ruff: noqa: F403, F405  (an event is named in its own room, not here again)

from __future__ import annotations

from supervisor.events.attempts import *
from supervisor.events.daemon import *
from supervisor.events.event import ChildEvent as ChildEvent
from supervisor.events.event import Event as Event
from supervisor.events.health import *
from supervisor.events.journal import *
from supervisor.events.lifecycle import *
from supervisor.events.queues import *
from supervisor.events.timestamps import *

AnyEvent = LifecycleEvent | HealthEvent | AttemptEvent | QueueEvent | DaemonEvent
"""What an `events` stream can carry: the type to decode it with."""
