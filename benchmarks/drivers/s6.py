"""s6: a supervise process a child, which restarts at once what has announced that it is ready and stayed so for a second."""

from __future__ import annotations

import signal
from pathlib import Path

from benchmarks.drivers.driver import Client, FilesClient, Launch, Role, Setup, executable, found, missing_programs, stamped

READY_FD = 3


class S6:
    """`s6-svscan`."""

    name = "s6"
    role: Role = "peer"
    stop_signal: int = signal.SIGTERM
    lives = True
    captures = True

    def missing(self) -> str | None:
        return missing_programs("s6-svscan", "s6-supervise", "s6-svstat", "s6-log")

    def prepare(self, setup: Setup) -> Launch:
        for slot in setup.slots:
            service = self._service(setup, slot)
            service.mkdir(parents=True)
            (service / "notification-fd").write_text(f"{READY_FD}\n")
            executable(service / "run", setup.child.script(slot, setup.mode, ready_fd=READY_FD))
            if setup.rotation:
                setup.logs.mkdir(exist_ok=True)
                words = f"n{setup.rotation.keep} s{setup.rotation.size} {setup.log(slot)}"
                executable(service / "log" / "run", f"#!/bin/sh\nexec {found('s6-log')} {words}\n")
        room = str(2 * setup.count + 10)  # a logger counts too
        return Launch([found("s6-svscan"), "-c", room, "-t", "0", str(setup.home / "scan")])

    def client(self, setup: Setup) -> Client:
        # supervise/status: two time stamps of 12 bytes, then the pid in 8.
        files = {setup.job(slot): self._service(setup, slot) / "supervise" / "status" for slot in setup.slots}
        return FilesClient(files, slice(24, 32), "big")

    def cli(self, setup: Setup) -> Launch:
        loop = f'for service in {setup.home}/scan/*; do {found("s6-svstat")} "$service"; done'
        return Launch(["/bin/sh", "-c", loop])

    def _service(self, setup: Setup, slot: int) -> Path:
        return setup.home / "scan" / setup.job(slot)

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        return stamped(setup.log(slot))
