"""`python -m benchmarks`: see `docs/benchmarks.md`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import click

from benchmarks.capture import Writer
from benchmarks.children import HERE, Child
from benchmarks.drivers import DRIVERS, look_for_peers_in
from benchmarks.life import QUICK, Pace
from benchmarks.processes import workplace
from benchmarks.report import Report, markdown_table, table
from benchmarks.sweep import MEASURES, Plan, Sweeps


def chosen(names: Iterable[str]) -> list[str]:
    """The drivers that can run here; of the others it is said why not."""
    able = []
    for name in names:
        if lack := DRIVERS[name].missing():
            click.echo(f"{name} is left out: {lack}", err=True)
        else:
            able.append(name)
    return able


def memory_folder() -> str | None:
    """A folder in memory from which programs may be run, so that no disk is measured; None: the usual one for such files."""
    shared = "/dev/shm"
    if os.access(shared, os.W_OK) and not os.statvfs(shared).f_flag & os.ST_NOEXEC:
        return shared
    return None


def write(report: Report, file: Path | None) -> Path:
    """The JSON, where it was asked for or into `benchmarks/results/`."""
    if file is None:
        file = HERE / "results" / time.strftime("%Y%m%dT%H%M%S.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report.data(), indent=1) + "\n")
    return file


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "-n", "--children", "counts", type=click.IntRange(1), multiple=True, default=(100, 1000), help="How many children."
)
@click.option(
    "-d", "--driver", "drivers", type=click.Choice(list(DRIVERS)), multiple=True, help="Whom to measure.  [default: all]"
)
@click.option(
    "-m", "--measure", "measures", type=click.Choice(MEASURES), multiple=True, help="What to measure.  [default: all]"
)
@click.option("-r", "--runs", type=click.IntRange(1), default=3, help="How many interleaved sweeps.")
@click.option(
    "-t", "--tasks", type=click.IntRange(1), multiple=True, default=(1_000, 100_000), help="How many in-process tasks."
)
@click.option("--minutes", type=float, default=10.0, help="After this long nothing noisy is measured again.")
@click.option("--quick", is_flag=True, help="Short windows and few samples: to try the harness, not to compare.")
@click.option("--peers", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where peers' programs are.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the JSON.")
def main(
    counts: tuple[int, ...],
    drivers: tuple[str, ...],
    measures: tuple[str, ...],
    runs: int,
    tasks: tuple[int, ...],
    minutes: float,
    quick: bool,
    peers: Path | None,
    markdown: bool,
    file: Path | None,
) -> None:
    """Measure our supervisor beside its floors and its peers."""
    if peers:
        look_for_peers_in(peers.absolute())
    pace, seconds = (QUICK, 0.0) if quick else (Pace(), minutes * 60)
    plan = Plan(chosen(drivers or DRIVERS), sorted(counts), frozenset(measures or MEASURES), runs, pace, seconds, tasks)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=memory_folder()) as folder, workplace():
        child = Child.build(Path(folder))
        writer = Writer.compile(Path(folder)) if "capture" in plan.measures else None
        sweeps = Sweeps(plan, child, writer, lambda line: click.echo(line, err=True))
        try:
            sweeps.run()
        except KeyboardInterrupt:
            click.echo("interrupted: here is what there is", err=True)
            report(sweeps, child, markdown, file)
            sys.exit(130)
        report(sweeps, child, markdown, file)


def report(sweeps: Sweeps, child: Child, markdown: bool, file: Path | None) -> None:
    """Print it and write it."""
    found = Report(sweeps, child, markdown_table if markdown else table)
    click.echo(found.text())
    click.echo(f"\nall samples: {write(found, file)}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
