"""Where a daemon lives while it has children: a note of itself for the daemon after it, and a cgroup where one can be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from supervisor.children import guardian, record
from supervisor.children.cgroup import Cgroup, expected, guarantee, outside


class Residence:
    """Taken up before the first child, given up after the last: who never has one leaves no trace, however it ends.

    `guarantee` says what becomes of the children if this process is killed.
    """

    def __init__(self, path: Path, instance: str, tag: int, warn: Callable[[str], None]) -> None:
        self.cgroup: Cgroup | None = None
        self.guarantee = expected()
        self._path = path
        self._warn = warn
        self._note = record.Record(instance=instance, tag=tag, boot=record.boot_id())
        self._taken = False

    def take_up(self) -> None:
        """Note who we are, and move into a cgroup of our own; where that cannot be, live without."""
        self._taken = True
        try:
            cgroup = Cgroup(outside(), self._note.instance)
            self._write(cgroup=str(cgroup.path))  # before there is one
            cgroup.enter()
        except OSError as error:
            self._write(cgroup="")
            self.guarantee = guarantee(None, str(error))
        else:
            self.cgroup = cgroup
            self.guarantee = guarantee(cgroup.path, "")

    def guarded_by(self, pid: int) -> None:
        """Note the guardian: the next daemon waits for it."""
        self._write(guardian=(pid, guardian.start_time(pid)))

    def give_up(self, survived: bool) -> None:
        """Leave nothing behind; but what could not be killed is left for the next daemon to find."""
        if self._taken and (self.cgroup.leave() if self.cgroup else not survived):
            self._path.unlink(missing_ok=True)

    def _write(self, **known: Any) -> None:
        self._note = msgspec.structs.replace(self._note, **known)
        try:
            record.write(self._path, self._note)
        except OSError as error:
            self._warn(f"cannot write {self._path}: if this daemon is killed, the next one will not find what it left: {error}")
