"""runit: a `runsv` a child, which waits a second only before it restarts what lived for less than one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from benchmarks.drivers.driver import Client, FilesClient, Launch, Role, Setup, executable, found, missing_programs, stamped


class Runit:
    """`runsvdir`."""

    name = "runit"
    role: Role = "peer"
    stop_signal: int = signal.SIGHUP  # "send each runsv a TERM, and exit"
    lives = True
    captures = True

    def missing(self) -> str | None:
        return missing_programs("runsvdir", "runsv", "sv", "svlogd")

    def prepare(self, setup: Setup) -> Launch:
        for slot in setup.slots:
            service = self._service(setup, slot)
            executable(service / "run", setup.child.script(slot, setup.mode))
            if setup.rotation:
                setup.log(slot).mkdir(parents=True)
                (setup.log(slot) / "config").write_text(f"s{setup.rotation.size}\nn{setup.rotation.keep}\n")
                executable(service / "log" / "run", f"#!/bin/sh\nexec {found('svlogd')} {setup.log(slot)}\n")
        # It waits out the second in which its directory was last changed: a thing of fresh directories, not of real ones.
        services = setup.home / "services"
        os.utime(services, (0, 0))
        return Launch([found("runsvdir"), str(services)])

    def client(self, setup: Setup) -> Client:
        # supervise/status: a time stamp of 12 bytes, then the pid in 4.
        files = {setup.job(slot): self._service(setup, slot) / "supervise" / "status" for slot in setup.slots}
        return FilesClient(files, slice(12, 16), "little")

    def cli(self, setup: Setup) -> Launch:
        return Launch([found("sv"), "status", *(str(self._service(setup, slot)) for slot in setup.slots)])

    def _service(self, setup: Setup, slot: int) -> Path:
        return setup.home / "services" / setup.job(slot)

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        return stamped(setup.log(slot))
