"""supervisord: a section a program, so that it stops them group by group; ready at once, restarted always."""

from __future__ import annotations

import http.client
import signal
import time
import xmlrpc.client
from pathlib import Path
from typing import Any, cast

from benchmarks.drivers.driver import (
    PATIENCE,
    Client,
    Launch,
    Role,
    Rows,
    Setup,
    check_time,
    connect,
    found,
    missing_programs,
    numbered,
)

QUESTION = xmlrpc.client.dumps((), "supervisor.getAllProcessInfo")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = connect(self._path)


class _Client:
    """XML-RPC over its Unix socket; a connection a request, as its own client does it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        connect(path).close()

    def ask(self) -> bytes:
        end = time.monotonic() + PATIENCE
        connection, reply = _Connection(self._path), bytearray()
        try:
            connection.request("POST", "/RPC2", QUESTION, {"Content-Type": "text/xml"})
            response = connection.getresponse()
            while part := response.read1(1 << 18):
                reply += part
                check_time(end)
            return bytes(reply)
        finally:
            connection.close()

    def rows(self, reply: bytes) -> Rows:
        (infos,), _method = xmlrpc.client.loads(reply)
        return {info["name"]: info["pid"] for info in cast("list[dict[str, Any]]", infos)}

    def close(self) -> None:
        pass


class Supervisord:
    """`supervisord -n`."""

    name = "supervisord"
    role: Role = "peer"
    stop_signal: int = signal.SIGTERM
    lives = True
    captures = True

    def missing(self) -> str | None:
        return missing_programs("supervisord", "supervisorctl")

    def prepare(self, setup: Setup) -> Launch:
        lines = [
            "[unix_http_server]",
            f"file={setup.home}/control",
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
            "[supervisorctl]",
            f"serverurl=unix://{setup.home}/control",
            "[supervisord]",
            "nodaemon=true",
            "loglevel=error",
            "logfile=/dev/null",
            "logfile_maxbytes=0",
            f"pidfile={setup.home}/pid",
            f"childlogdir={setup.home}",
            # Paid at each spawn, in Python, descriptor by descriptor: three pipes and a file a child, and no more than that.
            f"minfds={(4 if setup.rotation else 3) * setup.count + 256}",
            f"minprocs={setup.count + 256}",
        ]
        for slot in setup.slots:
            lines += [
                f"[program:{setup.job(slot)}]",
                f"command={' '.join(setup.child.command(slot, setup.mode))}",
                "autorestart=true",
            ]
            if not setup.throttled:
                lines += ["startsecs=0", "startretries=1000000000"]
            if setup.rotation:
                setup.logs.mkdir(exist_ok=True)
                lines += [
                    "redirect_stderr=true",
                    f"stdout_logfile={setup.log(slot)}",
                    f"stdout_logfile_maxbytes={setup.rotation.size}",
                    f"stdout_logfile_backups={setup.rotation.keep}",
                ]
            else:
                lines += ["stdout_logfile=NONE", "stderr_logfile=NONE"]
        file = setup.home / "supervisord.conf"
        file.write_text("\n".join(lines) + "\n")
        return Launch([found("supervisord"), "-c", str(file)])

    def client(self, setup: Setup) -> Client:
        return _Client(setup.home / "control")

    def cli(self, setup: Setup) -> Launch:
        return Launch([found("supervisorctl"), "-c", str(setup.home / "supervisord.conf"), "status"])

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        return numbered(setup.log(slot))
