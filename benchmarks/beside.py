"""Small things measured beside each other: each in a process of its own, in interleaved sweeps, told as ratios.

A module that measures so has a `--one WHAT WAY COUNT`, which prints the seconds that one costs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import click

from benchmarks.alone import alone
from benchmarks.children import HERE, Failed
from benchmarks.report import machine, markdown_table, table

Layout = Callable[[list[str], list[list[str]]], str]


@dataclass
class Result:
    """What is done, by whom, how often: the seconds one costs, a figure for each sweep; or why there is none."""

    what: str
    way: str
    count: int
    seconds: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def typical(self) -> float:
        """The median of the sweeps."""
        return median(self.seconds)


def is_there(way: str, library: str) -> bool:
    """Whether what a way needs is installed; if not, that is said."""
    if library and find_spec(library) is None:
        click.echo(f"{way} is left out: {library} is not installed", err=True)
        return False
    return True


def sweep(module: str, results: Iterable[Result], runs: int) -> list[Result]:
    """Measure all, one after another, `runs` times."""
    results = list(results)
    for run in range(runs):
        for result in results:
            click.echo(f"sweep {run + 1}: {result.what}: {result.way}, {result.count}", err=True)
            try:
                result.seconds.append(alone(module, "--one", result.what, result.way, str(result.count)))
            except Failed as error:
                result.error = str(error)
    return results


def ratio(result: Result, unit: str, results: Iterable[Result]) -> float | None:
    """It to the way `unit` of the same: the median of the ratios within a sweep. Above 1 it takes longer."""
    same = [each for each in results if (each.what, each.way, each.count) == (result.what, unit, result.count)]
    pairs = [(mine, its) for other in same for mine, its in zip(result.seconds, other.seconds, strict=False) if its > 0]
    return median(mine / its for mine, its in pairs) if pairs else None


def figure(found: float | None) -> str:
    """A ratio, for people."""
    return "-" if found is None else f"{found:.2f}"


def tell(
    name: str, results: list[Result], report: Callable[[list[Result], Layout], str], markdown: bool, file: Path | None
) -> None:
    """Print the report, and write every sample as JSON, where it was asked for or into `benchmarks/results/`."""
    failures = [f"FAILED: {each.what}: {each.way}, {each.count}: {each.error}" for each in results if each.error]
    click.echo("\n\n".join([machine(), report(results, markdown_table if markdown else table), *failures]))
    file = file or HERE / "results" / time.strftime(f"{name}-%Y%m%dT%H%M%S.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(), "results": [asdict(each) for each in results]}, indent=1) + "\n")
    click.echo(f"\nall samples: {file}", err=True)
