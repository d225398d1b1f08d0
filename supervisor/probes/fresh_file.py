"""The wait for a file that a run makes."""

from __future__ import annotations

from pathlib import Path

from supervisor.errors import RunFailed
from supervisor.inotify import ATTRIB, CLOSE_WRITE, CREATE, DELETE_SELF, MODIFY, MOVE_SELF, MOVED_FROM, MOVED_TO, Inotify

_CHANGE = MODIFY | ATTRIB | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE_SELF | MOVE_SELF


class FreshFile:
    """`{ file = path }`: waits for a file that this run made. Make it before the run starts: what is there then is stale.

    A stale file counts once it is written, touched or replaced. Waiting is by inotify; the directory need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).absolute()
        self._stale = self._look()

    async def wait(self) -> None:
        """Wait until the file is there and fresh. Raises RunFailed where it cannot be watched."""
        try:
            with Inotify() as inotify:
                await self._wait(inotify)
        except OSError as error:
            limits = "see fs.inotify.max_user_instances and max_user_watches"
            raise RunFailed(f"cannot watch {self._path} for `ready`: {error.strerror}: {limits}") from error

    async def _wait(self, inotify: Inotify) -> None:
        watched = None
        while True:
            try:
                watch = inotify.watch(self._nearest(), _CHANGE)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it has gone in this moment
            if watched not in (None, watch):
                inotify.unwatch(watched)  # what happens further up, or where it was, wakes nobody any more
            watched = watch
            if self._fresh():
                return
            await inotify.wait()

    def _nearest(self) -> Path:
        """The directory in which something must happen next: the file's, or the nearest that exists above it."""
        return next((parent for parent in self._path.parents if parent.is_dir()), Path("/"))

    def _look(self) -> tuple[int, int, int, int] | None:
        try:
            there = self._path.stat()
        except OSError:
            return None
        return there.st_dev, there.st_ino, there.st_mtime_ns, there.st_ctime_ns

    def _fresh(self) -> bool:
        now = self._look()
        return now is not None and now != self._stale
