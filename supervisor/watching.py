"""`watch = globs`: whose files have changed.

One inotify descriptor and one task serve all jobs of a tree, since the system gives a user few descriptors (128), and the
jobs of one project watch the same files. It is inotify by hand and not the library watchfiles: that one holds a worker
thread for as long as it watches, takes seconds to be cancelled unless it wakes up many times a second, refuses a path that
is not there yet, and looks into everything below a directory, where globs say what to leave alone.

The directories that a glob can lead to are watched, and those on the way to them: for being moved, removed, or (where one is
missing, or a symbolic link) made and replaced. Whatever puts that picture in doubt is answered by making it anew.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import trio

from supervisor.inotify import (
    ADD,
    CLOSE_WRITE,
    CREATE,
    DELETE,
    DELETE_SELF,
    IGNORED,
    IS_DIRECTORY,
    MOVE_SELF,
    MOVED_FROM,
    MOVED_TO,
    ONLY_DIRECTORY,
    OVERFLOW,
    Happening,
    Inotify,
)  # fmt: skip

SILENCE = 0.5
"""Seconds without a further change after which a change is told."""

LONGEST = 5.0
"""Seconds after which it is told even if changes go on."""

PASSED_OVER = (
    ".git", ".hg", ".svn", "__pycache__", "*.pyc", "*.sw?", "*~", ".#*", "#*#", "4913", "*___jb_old___", "*___jb_tmp___",
)  # fmt: skip
"""What version control, Python and editors write beside the files that matter."""

ENTRIES_A_TURN = 256
"""So many entries of a directory are looked at before others have their turn."""

_SELF = DELETE_SELF | MOVE_SELF
_NAMES = CREATE | DELETE | MOVED_FROM | MOVED_TO
_PASSED_OVER = re.compile("|".join(map(fnmatch.translate, PASSED_OVER)))
_ESCAPED = re.compile(r"\[([*?[])\]")


class Glob:
    """A pattern of absolute paths: `*`, `?` and `[…]` within a name, `**` for any number of directories.

    Where it ends in a name without wildcards, and that is a directory, it means everything in it.
    """

    def __init__(self, pattern: str) -> None:
        self._parts = os.path.normpath(pattern).split("/")[1:]
        self._names = [re.compile(fnmatch.translate(part)).match for part in self._parts]
        wild = [at for at, part in enumerate(self._parts) if _literal(part) is None]
        self._whole = not wild or wild[-1] < len(self._parts) - 1
        beginning = self._parts[: wild[0] if wild else len(self._parts) - 1]
        self.root = "/" + "/".join(str(_literal(part)) for part in beginning)
        """The directory in which the search begins."""

    def matches(self, path: str) -> bool:
        """Whether it means the file `path`."""
        return len(self._parts) in self._reached(path)

    def leads(self, path: str) -> bool:
        """Whether what it means can lie in the directory `path`, at whatever depth."""
        return any(at < len(self._parts) or self._whole for at in self._reached(path))

    def _reached(self, path: str) -> set[int]:
        """How much of the pattern `path` can have used up."""
        reached = self._and_past_any_depth({0})
        for name in filter(None, path.split("/")):
            reached = set() if self._passes_over(name) else self._and_past_any_depth(self._further(reached, name))
        return reached

    def _further(self, reached: set[int], name: str) -> set[int]:
        further = {at for at in reached if at < len(self._parts) and self._parts[at] == "**"}
        further |= {at + 1 for at in reached - further if at < len(self._parts) and self._names[at](name)}
        return further | ({len(self._parts)} & reached if self._whole else set())

    def _and_past_any_depth(self, reached: set[int]) -> set[int]:
        """`**` may also stand for no directory at all."""
        for at in sorted(reached):
            while at < len(self._parts) and self._parts[at] == "**":
                at += 1
                reached.add(at)
        return reached

    def _passes_over(self, name: str) -> bool:
        """Whether it is none of those that matter, unless the pattern names it, or all of its sort."""
        if name in self._parts or not _PASSED_OVER.match(name):
            return False
        return not any(fnmatch.fnmatchcase(name, each) for each in PASSED_OVER if each in self._parts)


def _literal(part: str) -> str | None:
    """The only name that this part of a pattern matches; None where there may be several."""
    name = _ESCAPED.sub(r"\1", part)
    return name if glob.escape(name) == part else None


UNTOLD = "more than could be told"
"""Stands among the paths of a burst where the kernel has lost count."""


class Burst:
    """Changes that follow each other so quickly that they are one. Times are on Trio's clock."""

    def __init__(self, now: float) -> None:
        self._first = self._last = now
        self.paths: dict[str, None] = {}
        """What has changed, each path once."""

    def add(self, path: str, now: float) -> None:
        """One more."""
        self._last = now
        self.paths[path] = None

    @property
    def due(self) -> float:
        """When to tell of it."""
        return min(self._last + SILENCE, self._first + LONGEST)

    def __str__(self) -> str:
        first, *others = self.paths
        return f"changed: {first}" + (f" and {len(others)} more" if others else "")


class Watching:
    """Tells `changed(job, burst)` when files of a job have changed, and then been left alone for half a second.

    `warn` hears of what cannot be watched, once; the rest is watched all the same. Belongs to the Trio thread.
    """

    def __init__(self, changed: Callable[[str, Burst], None], warn: Callable[[str], None]) -> None:
        self._changed = changed
        self._warn = warn
        self._jobs: dict[tuple[str, ...], list[str]] = {}
        self._globs: dict[tuple[str, ...], list[Glob]] = {}
        self._base = ""
        self._apart: tuple[str, ...] = ()
        self._wanted = trio.Event()
        self._waiting = trio.CancelScope()
        self.begun = trio.Event()
        """Set once everything is watched that can be."""
        self._anew_at = math.inf
        self._bursts: dict[tuple[str, ...], Burst] = {}
        self._warned: set[int] = set()
        self._inotify: Inotify
        self._directories: dict[int, set[str]] = {}
        self._ways: dict[int, set[str]] = {}
        """The directories on the way to what is watched, each with the names in it that may lead elsewhere from now on."""
        self._roots: dict[str, tuple[int, int] | None] = {}

    def watch(self, patterns: Mapping[str, tuple[str, ...]], base: Path, apart: Iterable[str]) -> None:
        """Watch these, absolute, for each job from now on, and no others. Paths are told relative to `base`.

        Changes of the files and directories of `apart`, which the daemon writes itself, are none.
        """
        self._jobs = {}
        for job, globs in patterns.items():
            self._jobs.setdefault(globs, []).append(job)
        self._globs = {globs: self._globs.get(globs) or list(map(Glob, globs)) for globs in self._jobs}
        self._bursts = {globs: burst for globs, burst in self._bursts.items() if globs in self._jobs}
        self._base = str(base)
        self._apart = tuple(apart)
        self._warned.clear()
        self._anew_at = -math.inf
        if self._jobs:
            self._wanted.set()
        self._waiting.cancel(reason="something else is to be watched")

    async def run(self) -> None:
        """Watch until cancelled. Costs nothing while there is nothing to watch."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                with Inotify() as self._inotify:
                    await self._follow()
            except OSError as error:
                limits = "see fs.inotify.max_user_instances and the limit of open files"
                self._warn(f"no file can be watched (`watch`): {error.strerror}: {limits}")
                self.begun.set()
            self._directories, self._ways, self._roots = {}, {}, {}

    async def _follow(self) -> None:
        while self._jobs:
            while self._anew_at <= trio.current_time():
                await self._look_anew()
            self.begun.set()
            told: list[Happening] = []
            due = min((burst.due for burst in self._bursts.values()), default=math.inf)
            with trio.CancelScope(deadline=min(due, self._anew_at)) as self._waiting:
                told = await self._inotify.wait()
            for each in told:
                await self._take(each)
            self._tell(trio.current_time())

    def _tell(self, now: float) -> None:
        for globs in [globs for globs, burst in self._bursts.items() if burst.due <= now]:
            burst = self._bursts.pop(globs)
            for job in self._jobs[globs]:
                self._changed(job, burst)

    # ---- what happens ----

    async def _take(self, told: Happening) -> None:
        if told.mask & OVERFLOW:
            self._anew_at = -math.inf
            for globs in self._jobs:
                self._note_for(globs, UNTOLD)
        elif told.mask & IGNORED:
            self._directories.pop(told.watch, None)
            self._ways.pop(told.watch, None)
        elif not told.name:
            self._moved_away(told)
        else:
            if told.name in self._ways.get(told.watch, ()):
                self._anew_at = -math.inf
            for directory in list(self._directories.get(told.watch, ())):
                await self._happened(os.path.join(directory, told.name), told.mask)

    def _moved_away(self, told: Happening) -> None:
        """Something that leads to what is watched is not where it was. One that was removed had been emptied before."""
        if told.watch in self._ways:
            self._anew_at = -math.inf
        if told.mask & DELETE_SELF:
            self._roots.update(dict.fromkeys(self._directories.get(told.watch, set()) & self._roots.keys()))

    async def _happened(self, path: str, what: int) -> None:
        if not what & IS_DIRECTORY:
            if not what & CREATE or _complete(path):
                self._note(path)
        elif not self._leads(path):
            return
        elif what & (CREATE | MOVED_TO):
            await self._explore(path, news=True)
        elif what & MOVED_FROM:
            # The watches below have gone along with it. Package managers move thousands: one look after all of them.
            self._anew_at = min(self._anew_at, trio.current_time() + SILENCE)
            for globs, each in self._globs.items():
                if any(one.leads(path) for one in each):
                    self._note_for(globs, path)

    def _note(self, path: str) -> None:
        if not self._is_apart(path):
            for globs, each in self._globs.items():
                if any(one.matches(path) for one in each):
                    self._note_for(globs, path)

    def _note_for(self, globs: tuple[str, ...], path: str) -> None:
        now = trio.current_time()
        self._bursts.setdefault(globs, Burst(now)).add(path.removeprefix(f"{self._base}/"), now)

    def _leads(self, path: str) -> bool:
        return not self._is_apart(path) and any(one.leads(path) for each in self._globs.values() for one in each)

    def _is_apart(self, path: str) -> bool:
        """Whether it is written by the daemon: one of its files, rotated or not, or in a directory of its own."""
        return any(path == own or path.startswith((f"{own}/", f"{own}.")) for own in self._apart)

    # ---- where to look ----

    async def _look_anew(self) -> None:
        """Make the picture of what is to be watched. What stays watched is watched without a gap."""
        self._anew_at = math.inf
        known, self._roots = self._roots, {}
        before = self._directories.keys() | self._ways.keys()
        self._directories, self._ways = {}, {}
        for root in sorted({one.root for each in self._globs.values() for one in each}):
            there = self._roots[root] = self._approach(root)
            moved = known.get(root) not in (None, there)
            if there is not None:
                await self._explore(root, news=root in known and not moved and known[root] is None)
            if moved:
                for globs in [globs for globs, each in self._globs.items() if any(one.root == root for one in each)]:
                    self._note_for(globs, root)
        for watch in before - self._directories.keys() - self._ways.keys():
            self._inotify.unwatch(watch)

    def _approach(self, root: str) -> tuple[int, int] | None:
        """Watch the way to a directory; what is at its end, or None where the way does not lead so far."""
        path = "/"
        for name in filter(None, root.split("/")):
            below = os.path.join(path, name)
            self._watch_way(path, _SELF)
            if os.path.islink(below) or not os.path.isdir(below):
                self._watch_way(path, _SELF | _NAMES, name)
            if not os.path.isdir(below):
                return None
            path = below
        self._watch_way(path, _SELF)
        return _identity(path)

    def _watch_way(self, path: str, mask: int, *names: str) -> None:
        if (watch := self._add(path, mask)) is not None:
            self._ways.setdefault(watch, set()).update(names)

    async def _explore(self, directory: str, *, news: bool) -> None:
        """Watch a directory and those below that a glob leads to. With `news`, the files in them count as changes."""
        pending = [directory]
        while pending:
            path = pending.pop()
            await trio.lowlevel.checkpoint()
            if (watch := self._add(path, _NAMES | CLOSE_WRITE)) is None:
                continue
            self._directories.setdefault(watch, set()).add(path)
            try:
                with os.scandir(path) as entries:
                    for count, entry in enumerate(entries, 1):
                        if count % ENTRIES_A_TURN == 0:
                            await trio.lowlevel.checkpoint()
                        if entry.is_dir(follow_symlinks=False):  # symbolic links may lead round in circles
                            pending += [entry.path] if self._leads(entry.path) else []
                        elif news:
                            self._note(entry.path)
            except OSError:
                pass  # it has gone in this moment, which is told

    def _add(self, path: str, mask: int) -> int | None:
        try:
            return self._inotify.watch(path, mask | ADD | ONLY_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            number = error.errno or 0
            if number not in self._warned:
                self._warned.add(number)
                self._warn(f"{path} cannot be watched (`watch`){_why(number)}: changes there are not seen")
            return None


def _why(number: int) -> str:
    if number == errno.ENOSPC:
        return ", perhaps others too: too many watches: raise fs.inotify.max_user_watches, or name fewer directories"
    return f": {os.strerror(number).lower()}"


def _complete(path: str) -> bool:
    """Whether what has just appeared is all there: a link. The end of writing to a file is told by itself."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
