"""Child processes and nothing else: spawn, wait, signal, and leave nothing behind.

family     `open_children`: who is whose, and how a child is ended with everything that came of it
launch     what a child is started with; `launcher` runs in the child, where only the child itself can do it
spawner    the thread that spawns
guard      our side of the guardian; `guardian` is what ends the children when the daemon dies
cgroup     a control group of our own, where one can be had
residence  the group, and the note of itself, that a daemon has while it has children
record     that note, and the sweep for what an earlier daemon left
usage      memory and CPU of what came of a child
process    what our own process must be like meanwhile
procfs     processes as the kernel lists them

`launcher` and `guardian` are started as files, by an interpreter that knows nothing of this package.
"""

from __future__ import annotations

from supervisor.children.family import Child, Children, ExitReport, open_children, signal_name
from supervisor.children.launch import Launch
from supervisor.children.procfs import kill_all, spawned_by_thread
from supervisor.children.usage import Usage

__all__ = [
    "Child",
    "Children",
    "ExitReport",
    "Launch",
    "Usage",
    "kill_all",
    "open_children",
    "signal_name",
    "spawned_by_thread",
]
