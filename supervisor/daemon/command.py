"""`supervisor run`."""

from __future__ import annotations

import click

from supervisor.daemon import DEFAULT_FILE, hold_signals


@click.command("run")
@click.option("-c", "--config", "path", default=DEFAULT_FILE, show_default=True, help="The TOML file.")
@click.option("--only", multiple=True, metavar="NAME", help="Start only this job or supervisor (or glob); may be repeated.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def run_command(path: str, only: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Run the jobs of a TOML file in the foreground, until told to stop.

    SIGTERM or Ctrl-C stops everything in order, a second one at once; SIGHUP reads the file again.
    """
    hold_signals()
    if names and not only:
        raise click.UsageError(f"run takes no names by themselves; did you mean --only {' '.join(names)}?")
    from supervisor.daemon.service import run

    raise SystemExit(run(path, only + names))
