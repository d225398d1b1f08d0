"""A measurement in a process of its own, so that none inherits another's heap."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from benchmarks.children import Failed
from benchmarks.drivers.driver import clean_environment
from benchmarks.drivers.ours import REPOSITORY

LONG = 300.0
"""Seconds after which it has failed."""


def alone(module: str, *words: str) -> float:
    """The number that `python -m module WORDS` prints."""
    environment = clean_environment() | {"PYTHONPATH": str(REPOSITORY)}
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            command = [sys.executable, "-m", module, *words]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=LONG, text=True)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(words)} was not done after {LONG:g} s") from error
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])
    return float(json.loads(done.stdout))
