"""The servers behind the queues that are measured: each started in a private directory, and ended with the measurement."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from benchmarks.children import Failed

PATIENCE = 60.0
"""Seconds in which a server must be there."""

AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []


@cache
def postgresql() -> Path | None:
    """Where its programs are: of the newest one."""
    if found := sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name)):
        return found[-1]
    program = shutil.which("postgres")
    return Path(program).parent if program else None


def missing(server: str) -> str:
    """Why there can be no such server; empty if there can."""
    if server == "redis" and shutil.which("redis-server") is None:
        return "redis-server is not installed"
    return "postgres is not installed" if server == "postgresql" and postgresql() is None else ""


@contextmanager
def serving(server: str, folder: Path) -> Iterator[str]:
    """Have a server of this name, with its data in `folder`; gives how ours calls it."""
    if server == "redis":
        with _redis(folder) as url:
            yield url
    elif server == "postgresql":
        with _postgresql(folder) as url:
            yield url
    else:
        yield server


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    """One that appends all it does to a file, and has it on the disk within a second: what most have."""
    port = _free_port()
    options = {"bind": "127.0.0.1", "port": port, "dir": folder, "appendonly": "yes", "save": ""}
    words = ["redis-server", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    with _running(words, folder, port, signal.SIGTERM):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    """One as `initdb` leaves it: `fsync` is on."""
    programs, port, data = postgresql(), _free_port(), folder / "data"
    assert programs is not None
    data.mkdir()
    folder.chmod(0o755)
    if AS_POSTGRES:
        shutil.chown(data, "postgres", "postgres")
    initdb = [*AS_POSTGRES, str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder)
    words = [*AS_POSTGRES, str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", "", "-h", "127.0.0.1"]
    with _running(words, folder, port, signal.SIGINT):
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


@contextmanager
def _running(words: list[str], folder: Path, port: int, stop: signal.Signals) -> Iterator[None]:
    """Have it run until the block ends; it dies with us, whatever happens."""
    with (folder / "server.log").open("wb") as output:
        guarded = ["setpriv", "--pdeathsig", "KILL", *words]
        process = subprocess.Popen(guarded, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait_until(lambda: _answers(port), process)
        yield
    finally:
        process.send_signal(stop)
        process.wait(PATIENCE)


def _wait_until(is_there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE
    handle = os.pidfd_open(process.pid)
    try:
        while not is_there():
            if time.monotonic() > until or select.select([handle], [], [], 0.02)[0]:
                raise Failed(f"{process.args!r} did not start")
    finally:
        os.close(handle)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
