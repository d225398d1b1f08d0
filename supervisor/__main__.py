"""`supervisor` and `python -m supervisor`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    from supervisor.cli.quick import parse

    if (asked := parse(sys.argv[1:])) is None:
        from supervisor.cli.commands import cli

        cli(prog_name="supervisor")
    else:
        from supervisor.cli.act import run

        sys.exit(run(*asked))


if __name__ == "__main__":
    main()
