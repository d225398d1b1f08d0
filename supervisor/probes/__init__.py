"""Probes: one question to a run, answered healthy or why not.

    spec        what `ready` and `health` can say in the file
    questions   the questions themselves, and the three answers: healthy, unhealthy, no answer
    fresh_file  the wait for a file that a run makes
    judgement   how many answers in a row make a run healthy or unhealthy (pure)
    notify      NOTIFY_SOCKET: what a child says of itself

To add a probe: a key in `spec`, a question in `questions`, and a line where `nodes/attendance.py` puts them together.
"""

from __future__ import annotations

from supervisor.probes.fresh_file import FreshFile
from supervisor.probes.spec import PROBES, Health, Probe, Ready

__all__ = ["PROBES", "FreshFile", "Health", "Probe", "Ready"]
