"""circus: a watcher a child, no warm-up delay, restarted for ever; its protocol spoken without its libraries."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

from benchmarks.children import Failed
from benchmarks.drivers.driver import Client, Launch, Role, Rows, Setup, connect, found, missing_programs, numbered

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY" + b"\x0bSocket-Type" + b"\x00\x00\x00\x06DEALER" + b"\x08Identity" + bytes(4)
COMMAND, LONG = 4, 2


class _Client:
    """The least of ZMTP 3.0 that a DEALER needs."""

    def __init__(self, path: Path) -> None:
        self._connection = connect(path)
        self._connection.sendall(GREETING)
        self._receive(len(GREETING))
        self._connection.sendall(bytes([COMMAND, len(READY)]) + READY)
        self._frame()

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not (part := self._connection.recv(size - len(data), socket.MSG_WAITALL)):
                raise Failed("circus hung up in the middle of its answer")
            data += part
        return bytes(data)

    def _frame(self) -> bytes:
        (flags,) = self._receive(1)
        size = int.from_bytes(self._receive(8 if flags & LONG else 1), "big")
        return self._receive(size)

    def ask(self) -> bytes:
        question = json.dumps({"id": "1", "command": "status", "properties": {}}).encode()
        self._connection.sendall(bytes([0, len(question)]) + question)
        return self._frame()

    def rows(self, reply: bytes) -> Rows:
        return dict.fromkeys(json.loads(reply)["statuses"])  # it does not say which pid

    def close(self) -> None:
        self._connection.close()


class Circus:
    """`circusd`."""

    name = "circus"
    role: Role = "peer"
    stop_signal: int = signal.SIGTERM
    lives = True
    captures = True

    def missing(self) -> str | None:
        return missing_programs("circusd", "circusctl")

    def prepare(self, setup: Setup) -> Launch:
        lines = [
            "[circus]",
            f"endpoint = ipc://{setup.home}/control",
            f"pubsub_endpoint = ipc://{setup.home}/events",
            "statsd = false",
            "warmup_delay = 0",
            "check_delay = 1",  # how often it looks for the dead; 5 s unless one says so
            "loglevel = ERROR",
        ]
        for slot in setup.slots:
            command, *arguments = setup.child.command(slot, setup.mode)
            lines += [
                f"[watcher:{setup.job(slot)}]",
                f"cmd = {command}",
                f"args = {' '.join(arguments)}",
                "copy_env = true",
                "warmup_delay = 0",
            ]
            if not setup.throttled:
                lines.append("max_retry = -1")
            if setup.rotation:
                setup.logs.mkdir(exist_ok=True)
                lines += [
                    "stdout_stream.class = FileStream",
                    f"stdout_stream.filename = {setup.log(slot)}",
                    f"stdout_stream.max_bytes = {setup.rotation.size}",
                    f"stdout_stream.backup_count = {setup.rotation.keep}",
                ]
        file = setup.home / "circus.ini"
        file.write_text("\n".join(lines) + "\n")
        return Launch([found("circusd"), str(file)])

    def client(self, setup: Setup) -> Client:
        return _Client(setup.home / "control")

    def cli(self, setup: Setup) -> Launch:
        return Launch([found("circusctl"), "--endpoint", f"ipc://{setup.home}/control", "status"])

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        return numbered(setup.log(slot))
