"""What a daemon notes of itself, and what a later one makes of it if the earlier did not end in order.

The file is there from before the first child until everything is over (`residence.py`). So if it is there at the start, and
is from this boot, something may be left: the old guardian may be at work still, or may have been killed as well. `sweep`
waits for the one, and does with the guardian's own code what the other would have done.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path

import msgspec

from supervisor.atomic import write_atomic_sync
from supervisor.children import guardian

GUARDIAN_LIMIT = 10.0
"""Seconds that a guardian still at work is waited for."""

KILL_LIMIT = 5.0
"""Seconds after SIGKILL from which on what an earlier instance left counts as not to be killed."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One instance. `guardian` is (pid, start time in ticks), since a pid alone may be somebody else's by now."""

    instance: str
    tag: int
    boot: str
    cgroup: str = ""
    guardian: tuple[int, int] | None = None


def boot_id() -> str:
    """This boot of the machine: what was noted in another is over."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write(path: Path, record: Record) -> None:
    """Note it, whole or not at all. The disk is not waited for: a power cut is the end of the boot that it is about."""
    write_atomic_sync(path, msgspec.json.encode(record), durable=False)


def sweep(path: Path) -> str | None:
    """End what the instance noted at `path` left. Returns what the operator should know; None: it had ended in order.

    The note is kept as long as something cannot be killed. Blocks, for `GUARDIAN_LIMIT` and `KILL_LIMIT` at most.
    """
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        return f"cannot read {path}, so cannot look for what an earlier daemon may have left: {error}"
    if record.boot != boot_id():
        path.unlink()
        return None
    if record.guardian is not None:
        _await(*record.guardian)
    found = {pid: _name(pid) for pid in _left(record)}
    stay = guardian.end(record.instance, record.tag, set(), record.cgroup, KILL_LIMIT)
    if not stay:
        path.unlink()
    return _told(found, {pid: found.get(pid) or _name(pid) for pid in stay})


def _left(record: Record) -> set[int]:
    return guardian.ours(record.instance, record.tag, set()) | guardian.members(record.cgroup)


def _await(pid: int, started: int) -> None:
    """Wait for the end of that very process, if it lives."""
    with suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if guardian.start_time(pid) == started:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(GUARDIAN_LIMIT * 1000)
        finally:
            os.close(fd)


def _name(pid: int) -> str:
    return guardian.read(f"/proc/{pid}/comm").decode(errors="replace").strip() or "?"


def _told(found: dict[int, str], stay: dict[int, str]) -> str:
    text = "the daemon before this one did not end in order"
    ended = {pid: name for pid, name in found.items() if pid not in stay}
    if ended:
        text += f"; what it left has been killed: {_listed(ended)}"
    if stay:
        text += f"; cannot be killed: {_listed(stay)}"
    return text if found or stay else f"{text}; nothing of it was left"


def _listed(processes: dict[int, str]) -> str:
    return ", ".join(f"{pid} ({name})" for pid, name in sorted(processes.items()))
