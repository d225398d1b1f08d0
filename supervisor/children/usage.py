"""What children use of the machine, counted when somebody asks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from supervisor.children import guardian

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a child and all that came of it and lives. What they share counts for each of them, as in `ps` and `top`.

    `memory` is resident, in bytes. `cpu` is in seconds, with what their own children used that they have reaped; so it goes
    down when a process ends that was adopted by us, and takes what it used with it.
    """

    memory: int = 0
    cpu: float = 0.0
    processes: int = 0


def measure(roots: Mapping[int, Collection[int]]) -> dict[int, Usage]:
    """The usage of each key's processes and their descendants, in one walk of /proc: 20 microseconds a process there is."""
    found: dict[int, tuple[int, int, float]] = {}
    for pid in guardian.pids():
        fields = guardian.read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        if fields and fields[0] not in (b"Z", b"X"):
            found[pid] = int(fields[1]), int(fields[21]) * _PAGE, sum(map(int, fields[11:15])) * _TICK
    owners: dict[int, int | None] = {pid: key for key, pids in roots.items() for pid in pids}
    usage = dict.fromkeys(roots, Usage())
    for pid, (_, memory, cpu) in found.items():
        if (owner := _owner(pid, found, owners)) is not None:
            before = usage[owner]
            usage[owner] = Usage(before.memory + memory, before.cpu + cpu, before.processes + 1)
    return usage


def _owner(pid: int, found: Mapping[int, tuple[int, int, float]], owners: dict[int, int | None]) -> int | None:
    """Whose it is: its own, or its parent's. What is learnt on the way up is kept in `owners`."""
    path: list[int] = []
    while pid not in owners and pid in found:
        path.append(pid)
        owners[pid] = None  # a list of parents that changes while it is read could have a ring in it
        pid = found[pid][0]
    owner = owners.get(pid)
    owners.update(dict.fromkeys(path, owner))
    return owner
