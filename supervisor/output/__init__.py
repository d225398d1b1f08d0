"""Captured output of child processes: one pump for all pipes, where it is kept, and whoever listens.

Each run has one pipe for stdout and stderr, so that their order is kept. One task (`pump`) empties all of them, a chunk a
turn. What it reads goes to the followers and into a ring (`kept`), and by an outlet to a sink: a file with rotation (`files`,
`archive`) or the journal (`journal`). The outlet (`outlet`) does what the job wants where the sink is slow, and keeps the
account of what a failing one would not take. `lines` looks at the text: for the terminal, for readiness, for JSON.
"""

from supervisor.output.files import LogFile, Rotate
from supervisor.output.kept import Follower
from supervisor.output.lines import LINE, Lines, Record, record
from supervisor.output.outlet import Overload
from supervisor.output.pump import Capture, Echo, Outputs, open_outputs

__all__ = [
    "LINE",
    "Capture",
    "Echo",
    "Follower",
    "Lines",
    "LogFile",
    "Outputs",
    "Overload",
    "Record",
    "Rotate",
    "open_outputs",
    "record",
]
