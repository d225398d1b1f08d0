"""A control group (version 2) of our own, so that whatever is born below us can be ended at once and without exception.

The daemon moves itself into `supervisor-INSTANCE/daemon`, below the group in which it was started, before it has any child.
So every child is born there, at no cost and without a race; no child can leave unless it may write to the groups above.
Whoever outlives the daemon writes one byte to `cgroup.kill`. To move a child instead would stop all forks of the machine
for the ten milliseconds of an RCU grace period, each time that it happens after a while.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from supervisor.children import guardian


class Cgroup:
    """The group of this instance: `path` is it, `outside` the one that we were started in. Made by `enter`."""

    def __init__(self, outside: Path, instance: str) -> None:
        self.outside = outside
        self.path = outside / f"supervisor-{instance}"
        self._numbers = itertools.count(1)
        self._home = self.path / "daemon"

    def enter(self) -> None:
        """Make the group and move this process into it; OSError: neither."""
        try:
            self.path.mkdir()
            self._home.mkdir()
            (self.path / "cgroup.kill").open("w").close()
            (self._home / "cgroup.procs").write_text("0")
        except OSError:
            guardian.remove_cgroup(str(self.path))
            raise

    def purge(self, spare: Callable[[int], bool]) -> None:
        """Kill everything here but this process and those that `spare` wants to keep, however fast it forks. Blocks.

        We step aside; what stays behind is frozen, so that it holds still while those to be spared are taken out; the rest
        is killed at one stroke. The spared stand still for that long: some milliseconds, more if they are many.
        Raises OSError where that cannot be done; then nobody was killed, and nobody stands still.
        """
        old, new = self._home, self.path / f"daemon-{next(self._numbers)}"
        new.mkdir()
        (new / "cgroup.procs").write_text("0")
        self._home = new
        try:
            (old / "cgroup.freeze").write_text("1")
            guardian.await_event(str(old), b"frozen 1")
            for pid in guardian.members(str(old)):
                if spare(pid):
                    with suppress(OSError):  # it has died
                        (new / "cgroup.procs").write_text(str(pid))
            (old / "cgroup.kill").write_text("1")
        finally:
            with suppress(OSError):
                (old / "cgroup.freeze").write_text("0")
        guardian.remove_cgroup(str(old))

    def leave(self) -> bool:
        """Move back to where we were started, end what may be left, and remove the group. False: something would not die."""
        try:
            (self.outside / "cgroup.procs").write_text("0")
            (self.path / "cgroup.kill").write_text("1")
        except OSError:
            return False
        return guardian.remove_cgroup(str(self.path))


def outside() -> Path:
    """The group in which this process is and may make others. OSError says why there is none."""
    own = Path(_mounted(_own_path()))
    for path in (own, own / "cgroup.procs"):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is not ours to write")
    return own


def _own_path() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    raise FileNotFoundError("this kernel has no cgroup version 2")


def _mounted(path: str) -> str:
    """Where the group `path` is in the file system, also if only a part of the tree is mounted, and it is not the first."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        if after.split()[0] == "cgroup2" and (path == root or path.startswith(root.rstrip("/") + "/")):
            return point.encode().decode("unicode_escape") + path.removeprefix(root.rstrip("/")).rstrip("/")
    raise FileNotFoundError("no cgroup version 2 is mounted")


def guarantee(cgroup: Path | None, reason: str) -> str:
    """What becomes of the children of a daemon that is killed, in one sentence. `reason` says why there is no cgroup."""
    if cgroup is not None:
        return f"children end with the daemon: all of them (cgroup {cgroup})"
    return f"children end with the daemon: those in a known group or session or bearing its mark (no cgroup: {reason})"


def expected() -> str:
    """The guarantee that a daemon started here and now would give."""
    try:
        return guarantee(outside(), "")
    except OSError as error:
        return guarantee(None, str(error))
