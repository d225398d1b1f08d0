"""The daemon: the library with a log, a control socket, signals and systemd manners round it.

service     its whole life
claim       what only one daemon may have: the state directory and its lock; and the limits it wants
selection   `--only`

Here is the way in, light, because its first act must come before everything heavy: signals wait until they can be obeyed.
"""

from __future__ import annotations

import signal

import click

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that steer a daemon."""


def hold_signals() -> None:
    """Let the signals that steer us wait. Children must not inherit this: release before anything is spawned."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals() -> None:
    """Obey them from now on, those that waited first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@click.command("run")
@click.option("-c", "--config", "path", default="supervisor.toml", show_default=True, help="The TOML file.")
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
