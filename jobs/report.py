"""Periodic jobs, and the one that prepares the ground: one run, then done."""

from __future__ import annotations

import shutil
from pathlib import Path


def prepare(directory: str) -> None:
    """Make a clean place for the other jobs to work in."""
    root = Path(directory)
    for name in ("spool", "archive"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    (root / "heartbeat.jsonl").write_text("")


def summarise(directory: str) -> None:
    """Write down in `report.txt` what the other jobs have done so far."""
    root = Path(directory)
    beats = len((root / "heartbeat.jsonl").read_text().splitlines())
    lines = [
        f"heartbeats: {beats}",
        f"letters waiting: {len(list((root / 'spool').glob('*.txt')))}",
        f"letters filed: {len(list((root / 'archive').glob('*.gz')))}",
    ]
    (root / "report.txt").write_text("\n".join(lines) + "\n")
