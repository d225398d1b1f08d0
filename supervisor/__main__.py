"""`supervisor` and `python -m supervisor`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    try:
        sys.exit(_run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)


def _run(argv: list[str]) -> int:
    from supervisor.cli.quick import file_to_run, parse

    if (file := file_to_run(argv)) is not None:
        from supervisor.daemon import hold_signals

        hold_signals()
        from supervisor.daemon.service import run as serve

        return serve(file)
    if (asked := parse(argv)) is None:
        from supervisor.cli.commands import cli

        cli(prog_name="supervisor")  # exits by itself
        return 0
    from supervisor.cli.act import run

    return run(*asked)


if __name__ == "__main__":
    main()
