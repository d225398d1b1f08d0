"""The two floors: the least that a supervisor in C, and one on Trio, can be. Yardsticks, no peers."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from functools import cached_property
from pathlib import Path

from benchmarks.children import HERE, compiled, compiler
from benchmarks.drivers.driver import Client, Launch, LineClient, Role, Rows, Setup, clean_environment


def _rows(reply: bytes) -> Rows:
    return {row["name"]: row["pid"] for row in json.loads(reply)}


class _Floor:
    role: Role = "floor"
    stop_signal: int = signal.SIGTERM
    lives = True
    captures = True
    after: tuple[str, ...] = ()  # words after the folder of the captured output

    def program(self) -> list[str]:
        raise NotImplementedError

    def prepare(self, setup: Setup) -> Launch:
        listing = setup.home / "list"
        listing.write_text("".join(" ".join(setup.child.command(slot, setup.mode)) + "\n" for slot in setup.slots))
        words = [*self.program(), str(setup.home / "control"), str(listing)]
        if setup.rotation:  # which a floor does not do: it only captures
            setup.logs.mkdir()
            words += [str(setup.logs), *self.after]
        return Launch(words, clean_environment() | {"PYTHONPATH": str(HERE.parent)})

    def client(self, setup: Setup) -> Client:
        return LineClient(setup.home / "control", b"status", _rows)

    def cli(self, setup: Setup) -> None:
        return None

    def captured(self, setup: Setup, slot: int) -> list[Path]:
        return [setup.log(slot)]


class TrioFloor(_Floor):
    """`trio_floor.py`."""

    name = "trio-floor"
    captures = False

    def missing(self) -> str | None:
        return None

    def program(self) -> list[str]:
        return [sys.executable, str(HERE / "trio_floor.py")]


class TrioPump(_Floor):
    """`trio_pump.py`; `way` is how it moves the bytes."""

    lives = False

    def __init__(self, way: str) -> None:
        self.name = f"trio-{way}"
        self.after = (way,)

    def missing(self) -> str | None:
        return None

    def program(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.trio_pump"]


class CFloor(_Floor):
    """`floor.c`."""

    name = "c-floor"

    def missing(self) -> str | None:
        if not compiler():
            return "no C compiler"
        return None if self._binary else "floor.c does not compile here"

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="bench-floor-")

    @cached_property
    def _binary(self) -> Path | None:
        return compiled("floor.c", Path(self._folder.name))

    def program(self) -> list[str]:
        return [str(self._binary)]
