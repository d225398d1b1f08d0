"""Ours: the daemon of this repository, with its default features on, run by this interpreter."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from benchmarks.children import HERE, Failed
from benchmarks.drivers.driver import Client, Launch, LineClient, Role, Rows, Setup, clean_environment, numbered

REPOSITORY = HERE.parent

QUESTION = b'{"jsonrpc":"2.0","id":1,"method":"status","params":{}}'


def rows(reply: bytes) -> Rows:
    """The rows of a JSON-RPC answer to `status`."""
    answer = json.loads(reply)
    if "error" in answer:
        raise Failed(f"status was refused: {answer['error']['message']}")
    return {row["name"]: row["pid"] for row in answer["result"]}


class Ours:
    """`python -m supervisor run`.

    `output` is the key of that name: what becomes of what the children write. With `team` every so many jobs are kept by a
    supervisor of their own.
    """

    role: Role = "ours"
    stop_signal: int = signal.SIGTERM
    lives = True

    def __init__(self, name: str, *, output: str, team: int = 0) -> None:
        self.name = name
        self.output = output
        self.team = team
        self.captures = output == "capture"

    def missing(self) -> str | None:
        return None if (REPOSITORY / "supervisor" / "daemon").is_dir() else "no daemon in this repository yet"

    def prepare(self, setup: Setup) -> Launch:
        lines = [
            "[log]",
            'level = "warning"',
            "[defaults]",
            f'output = "{self.output}"',
        ]
        if not setup.throttled:
            lines.append("backoff = { initial = 0, jitter = 0 }")
        if setup.rotation:
            lines.append(f"rotate = {{ size = {setup.rotation.size}, keep = {setup.rotation.keep} }}")
        for first in setup.slots[:: self.team] if self.team else ():
            members = [setup.job(slot) for slot in setup.slots[first : first + self.team]]
            lines += [f"[supervisors.team{first}]", f"children = {json.dumps(members)}"]
        for slot in setup.slots:
            lines += [f"[jobs.{setup.job(slot)}]", f"command = {json.dumps(setup.child.command(slot, setup.mode))}"]
        file = setup.home / "supervisor.toml"
        file.write_text("\n".join(lines) + "\n")
        return self._command("run", "-c", str(file))

    def client(self, setup: Setup) -> Client:
        return LineClient(self._socket(setup), QUESTION, rows)

    def cli(self, setup: Setup) -> Launch:
        return self._command("--socket", str(self._socket(setup)), "status")

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        return numbered(setup.home / ".supervisor" / "logs" / f"{setup.job(slot)}.log")

    def _socket(self, setup: Setup) -> Path:
        return setup.home / ".supervisor" / "control.sock"

    def _command(self, *words: str) -> Launch:
        environment = clean_environment() | {"PYTHONPATH": str(REPOSITORY)}
        environment.pop("STATE_DIRECTORY", None)
        environment.pop("RUNTIME_DIRECTORY", None)
        return Launch([sys.executable, "-m", "supervisor", *words], environment)
