"""What a supervisor must offer to be measured. To add one: a driver in a file of its own, and its name in `DRIVERS`."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from benchmarks.children import Child, Failed, Mode, pause

PATIENCE = 30.0
"""Seconds that a client waits for an answer."""

Role = Literal["ours", "floor", "peer"]
Rows = Mapping[str, int | None]


@dataclass(frozen=True)
class Rotation:
    """When a file of captured output is put aside (bytes), and how many of them are kept."""

    size: int
    keep: int


@dataclass(frozen=True)
class Setup:
    """One life to be prepared: so many children of this mode, every file of it under `home`.

    With `rotation` their output is captured; without, it is thrown away. With `throttled`, a child that dies at once is
    restarted as the supervisor does it by default; without, at once, where that can be had.
    """

    home: Path
    child: Child
    count: int
    mode: Mode = "live"
    throttled: bool = False
    rotation: Rotation | None = None

    @property
    def slots(self) -> range:
        """The numbers of the children."""
        return range(self.count)

    def job(self, slot: int) -> str:
        """The name of the job that keeps the child of this slot."""
        return f"j{slot}"

    @property
    def logs(self) -> Path:
        """The folder for captured output, where a supervisor has none of its own."""
        return self.home / "logs"

    def log(self, slot: int) -> Path:
        """The file for the captured output of this slot, where a supervisor wants to be told."""
        return self.logs / f"{self.job(slot)}.log"


@dataclass(frozen=True)
class Launch:
    """How to start a supervisor once its files are written."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=lambda: clean_environment())


class Client(Protocol):
    """A connection to a running supervisor, from this process: the same client host for all."""

    def ask(self) -> bytes:
        """The status of all, as it comes over the protocol: until the last byte is here. This is what is timed.

        TimeoutError when it is not here after PATIENCE.
        """

    def rows(self, reply: bytes) -> Rows:
        """The reply, decoded: job -> pid, None where the protocol does not say. This is not timed, but checked."""

    def close(self) -> None:
        """Hang up."""


class Driver(Protocol):
    """A supervisor that can be measured."""

    name: str
    role: Role
    stop_signal: int
    lives: bool  # False: it is there for its capturing only
    captures: bool

    def missing(self) -> str | None:
        """What it needs and does not find here, as a phrase; None when it can run."""

    def prepare(self, setup: Setup) -> Launch:
        """Write its configuration under `setup.home`: restarted whatever the end; the rest as `Setup` says."""

    def client(self, setup: Setup) -> Client:
        """Connect. OSError while it does not listen yet."""

    def cli(self, setup: Setup) -> Launch | None:
        """The command with which a person asks for the status of all; None without one."""

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        """The files that hold the output of this slot, oldest first. Only asked of one that captures."""


def clean_environment() -> dict[str, str]:
    """Ours without what would let another Python find our packages: a peer's module is called `supervisor` too."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


_PEERS = [Path(__file__).parents[1] / ".peers" / "bin"]


def look_for_peers_in(folder: Path) -> None:
    """Find the programs of peers in this folder before all others."""
    _PEERS.insert(0, folder)


def program(name: str) -> str | None:
    """Where a peer's program is: in the folder that was named, in `benchmarks/.peers/bin`, or on the PATH."""
    folders = [*map(str, _PEERS), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def missing_programs(*names: str) -> str | None:
    """Which of these programs are not to be found, as a phrase; None when all are."""
    absent = [name for name in names if not program(name)]
    return f"no {' and no '.join(absent)}" if absent else None


def found(name: str) -> str:
    """`program`, of which `missing` has made sure."""
    if path := program(name):
        return path
    raise Failed(f"{name} is not installed")


def executable(path: Path, text: str) -> None:
    """Write a script, and the folders it stands in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def numbered(path: Path) -> list[Path]:
    """`path` and what was put aside as `path.1` (the newest), `path.2`, and so on; oldest first."""
    aside = sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: int(file.suffix[1:]), reverse=True)
    return [*aside, path]


def stamped(folder: Path) -> list[Path]:
    """What a logger of daemontools' family left in its folder: `@` and the time at which it was put aside, and `current`."""
    return [*sorted(folder.glob("@*")), folder / "current"]


def connect(path: Path) -> socket.socket:
    """A Unix stream connection; each wait on it ends after PATIENCE."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def check_time(end: float) -> None:
    """Raise TimeoutError after `end`: for answers that come in drops, each within its own time."""
    if time.monotonic() > end:
        raise TimeoutError(f"no whole answer within {PATIENCE:g} s")


def connected(open_client: Callable[[], Client], *, timeout: float, alive: Callable[[], bool]) -> Client:
    """`open_client()` as soon as somebody listens."""
    end = time.monotonic() + timeout
    while True:
        try:
            return open_client()
        except OSError as error:
            if time.monotonic() > end or not alive():
                raise Failed(f"nobody answers on its control socket: {error}") from error
        pause(0.005)


class LineClient:
    """A question on a line, an answer on a line, over one kept connection."""

    def __init__(self, path: Path, question: bytes, decode: Callable[[bytes], Rows]) -> None:
        self.rows = decode
        self._connection = connect(path)
        self._question = question + b"\n"

    def ask(self) -> bytes:
        end = time.monotonic() + PATIENCE
        self._connection.sendall(self._question)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            check_time(end)
            if not (part := self._connection.recv(1 << 18)):
                raise Failed("the supervisor hung up in the middle of its answer")
            reply += part
        return bytes(reply)

    def close(self) -> None:
        self._connection.close()


class FilesClient:
    """The status of all where it is kept in one small file a job; each file is read anew every time."""

    def __init__(self, files: Mapping[str, Path], pid: slice, byteorder: Literal["little", "big"]) -> None:
        if absent := next((path for path in files.values() if not path.exists()), None):
            raise FileNotFoundError(str(absent))
        self._files = files
        self._pid, self._byteorder = pid, byteorder
        self._ends: list[int] = []

    def ask(self) -> bytes:
        parts = []
        for path in self._files.values():
            file = os.open(path, os.O_RDONLY)
            parts.append(os.read(file, 64))
            os.close(file)
        self._ends = [len(part) for part in parts]
        return b"".join(parts)

    def rows(self, reply: bytes) -> Rows:
        found_pids, start = {}, 0
        for name, size in zip(self._files, self._ends, strict=True):
            record = reply[start : start + size]
            found_pids[name] = int.from_bytes(record[self._pid], self._byteorder)
            start += size
        return found_pids

    def close(self) -> None:
        pass
