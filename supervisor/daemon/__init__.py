"""The daemon: the library with a log, a control socket, signals and systemd manners round it.

service     its whole life
command     `supervisor run`
claim       what only one daemon may have: the state directory and its lock; and the limits it wants
selection   `--only`

Here is the way in, light, because its first act must come before everything heavy: signals wait until they can be obeyed.
"""

from __future__ import annotations

import signal

DEFAULT_FILE = "supervisor.toml"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that steer a daemon."""


def hold_signals() -> None:
    """Let the signals that steer us wait. Children must not inherit this: release before anything is spawned."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals() -> None:
    """Obey them from now on, those that waited first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
