"""Our side of the guardian: its process, and the table of groups that it reads after our death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import trio

from supervisor.children import guardian
from supervisor.children.procfs import reap
from supervisor.children.residence import Residence
from supervisor.children.spawner import Spawner

PAUSE = 1.0
"""A guardian is started at most once in so many seconds."""

_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Guard:
    """Our side of the guardian: the table of groups that it reads after our death, and its process."""

    def __init__(
        self, instance: str, tag: int, spawner: Spawner, residence: Residence | None, warn: Callable[[str], None]
    ) -> None:
        self.pid = 0
        self._residence = residence
        self._spawner = spawner
        self._instance = instance
        self._tag = tag
        self._warn = warn
        self._pidfd = -1
        self._table = os.memfd_create("supervisor-groups", os.MFD_CLOEXEC)
        self._free: list[int] = []
        self._size = 0

    def add(self, group: int) -> int:
        """Have `group` killed if we die. Returns its place, for `remove`."""
        place = self._free.pop() if self._free else self._size
        self._size = max(self._size, place + 1)
        os.pwrite(self._table, group.to_bytes(4, "little"), 4 * place)
        return place

    def remove(self, place: int) -> None:
        """The group that has this place is gone."""
        os.pwrite(self._table, bytes(4), 4 * place)
        self._free.append(place)

    def ensure(self) -> None:
        """Start a guardian: before the first child, and whenever one has died."""
        try:
            self._start()
        except OSError as error:
            self._warn(f"no guardian: children would outlive a kill of the daemon: {error}")

    async def keep(self) -> None:
        """Have a guardian at all times: one that dies is replaced."""
        while True:
            started = trio.current_time()
            if self.pid:
                await trio.lowlevel.wait_readable(self._pidfd)
                self._bury()
                self._warn("the guardian of the children has died; starting another")
            await trio.sleep_until(started + PAUSE)
            self.ensure()

    def _start(self) -> None:
        cgroup = self._residence.cgroup if self._residence else None
        groups = (str(cgroup.path), str(cgroup.outside)) if cgroup else ("", "")
        command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), self._instance, str(self._tag), *groups]
        null = subprocess.DEVNULL
        # deaf to the terminal, and without a mark: an outer supervisor shall not take it for a leftover of ours
        pid = self._spawner.popen(command, None, mask=_DEAF_TO, stdin=self._table, stdout=null, stderr=null, env={}, cwd="/")
        self._pidfd = os.pidfd_open(pid)
        self.pid = pid
        if self._residence is not None:
            self._residence.guarded_by(pid)

    def _bury(self) -> None:
        reap(self.pid)
        os.close(self._pidfd)
        self.pid, self._pidfd = 0, -1

    async def close(self) -> None:
        """Nothing is left to guard: end it and reap it."""
        if self.pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(self._pidfd)
            self._bury()
        os.close(self._table)
