"""dinit: one daemon in C++, told to restart without its delay and without its limit."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from benchmarks.children import Failed
from benchmarks.drivers.driver import PATIENCE, Client, Launch, Role, Rows, Setup, check_time, connect, found, missing_programs

LIST_SERVICES = b"\x19"  # since protocol version 5, dinit 0.19.1
INFO, DONE = 62, 63
HEAD = 16  # the kind, the length of the name, and 14 bytes of state, of which the pid is four
PID = slice(8, 12)


class _Client:
    """Its own binary protocol; a connection a request, as its own client does it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        connect(path).close()

    def ask(self) -> bytes:
        end = time.monotonic() + PATIENCE
        connection, reply, at = connect(self._path), bytearray(), 0
        try:
            connection.sendall(LIST_SERVICES)
            while True:
                check_time(end)
                if not (part := connection.recv(1 << 18)):
                    raise Failed("dinit hung up in the middle of its answer")
                reply += part
                while at + 1 < len(reply) and reply[at] == INFO:
                    at += HEAD + reply[at + 1]
                if at < len(reply) and reply[at] != INFO:
                    return bytes(reply)
        finally:
            connection.close()

    def rows(self, reply: bytes) -> Rows:
        pids, at = {}, 0
        while reply[at] == INFO:
            name_at, size = at + HEAD, reply[at + 1]
            pids[reply[name_at : name_at + size].decode()] = int.from_bytes(reply[at:name_at][PID], "little")
            at = name_at + size
        if reply[at] != DONE:
            raise Failed(f"dinit answered with {reply[at]}")
        return pids

    def close(self) -> None:
        pass


class Dinit:
    """`dinit`. It can write output straight to a file, or keep some in memory; it does not capture into rotated files."""

    name = "dinit"
    role: Role = "peer"
    stop_signal: int = signal.SIGTERM
    lives = True
    captures = False

    def missing(self) -> str | None:
        return missing_programs("dinit", "dinitctl")

    def prepare(self, setup: Setup) -> Launch:
        services = setup.home / "services"
        services.mkdir()
        for slot in setup.slots:
            lines = ["type = process", f"command = {' '.join(setup.child.command(slot, setup.mode))}", "restart = yes"]
            lines.append("smooth-recovery = yes")
            if not setup.throttled:
                lines += ["restart-delay = 0", "restart-limit-count = 0"]
            (services / setup.job(slot)).write_text("\n".join(lines) + "\n")
        everything = "".join(f"waits-for = {setup.job(slot)}\n" for slot in setup.slots)
        (services / "boot").write_text(f"type = internal\n{everything}")
        return Launch([found("dinit"), "--container", "-d", str(services), "-p", str(setup.home / "control"), "-q"])

    def client(self, setup: Setup) -> Client:
        return _Client(setup.home / "control")

    def cli(self, setup: Setup) -> Launch:
        return Launch([found("dinitctl"), "-p", str(setup.home / "control"), "list"])

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        return []
