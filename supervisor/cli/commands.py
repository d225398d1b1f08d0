"""Every command line, with help, completion and did-you-mean. The control commands are built from the table of verbs."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from supervisor.cli.quick import reader
from supervisor.control.verbs import FOREIGN, LATER, QUEUE, VERBS, Param, Verb

LOADED = {
    "run": ("supervisor.daemon.command:run_command", "run the jobs of a TOML file, until told to stop"),
    "check": ("supervisor.cli.author:check", "check a TOML file, and show the tree it would run"),
    "init": ("supervisor.cli.author:init", "write a commented starter file"),
    "explain": ("supervisor.cli.author:explain", "explain a key of the TOML file"),
    "schema": ("supervisor.cli.author:schema", "print a JSON Schema of the TOML file, for editors"),
    "systemd-unit": ("supervisor.systemd:systemd_unit", "print a systemd unit for a TOML file"),
}
"""Commands that bring their own code, imported when they are called: where, and what the list of commands says of them."""


LISTED = [verb for verb in VERBS.values() if verb.command and not verb.hidden]


class Commands(click.Group):
    """The commands, each made when it is asked for, so that none pays for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All that `--help` lists."""
        return [*LOADED, *dict.fromkeys(verb.spoken.split(" ")[0] for verb in LISTED)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, made or imported now."""
        if cmd_name == QUEUE[:-1]:
            return QueueCommands(cmd_name, help=f"{_QUEUES}.")
        if cmd_name in VERBS and VERBS[cmd_name].command and not cmd_name.startswith(QUEUE):
            return control_command(VERBS[cmd_name])
        if cmd_name in LOADED:
            module, _, name = LOADED[cmd_name][0].partition(":")
            command: click.Command = getattr(importlib.import_module(module), name)
            return command
        if cmd_name in LATER:
            return _answering(cmd_name, "not supported yet", 1)
        if cmd_name in FOREIGN:
            return _answering(cmd_name, f"another supervisor's word; here it is `supervisor {FOREIGN[cmd_name]}`", 2)
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with its suggestions drawn from commands that are not made yet."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as problem:
            names = self.list_commands(ctx)
            raise click.NoSuchCommand(problem.command_name, possibilities=names, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without making any."""
        with formatter.section("The file"):
            formatter.write_dl([(name, summary) for name, (_, summary) in LOADED.items()])
        with formatter.section("The running daemon"):
            formatter.write_dl([(verb.spoken, verb.help) for verb in LISTED])


_QUEUES = "Show queues and the items in them, and put right what went wrong"


class QueueCommands(click.Group):
    """The commands below `queue`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names without that."""
        return [verb.name.removeprefix(QUEUE) for verb in LISTED if verb.name.startswith(QUEUE)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, made now."""
        return control_command(VERBS[QUEUE + cmd_name]) if QUEUE + cmd_name in VERBS else None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--socket", metavar="PATH", help="The control socket of the daemon to steer.")
@click.version_option(None, "--version", package_name="trio-supervisor", prog_name="supervisor")
@click.pass_context
def cli(ctx: click.Context, socket: str | None) -> None:
    """Keep jobs running in a restart tree, and steer them.

    The commands that steer find the daemon by --socket, $SUPERVISOR_SOCKET, .supervisor/control.sock here or above,
    $XDG_RUNTIME_DIR/supervisor/ and /run/supervisor/.
    """
    ctx.obj = socket


def control_command(verb: Verb) -> click.Command:
    """The command of a verb."""
    params: list[click.Parameter] = [_parameter(param) for param in verb.params]
    params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print facts as JSON."))
    params.append(click.Option(["--socket"], metavar="PATH", help="The control socket of the daemon."))
    return click.Command(
        verb.spoken.rpartition(" ")[2],
        params=params,
        callback=_callback(verb),
        help="\n\n".join(
            [_sentence(verb.help), *(f"{_metavar(each)}: {each.help}." for each in verb.params if each.positional)]
        ),
        hidden=verb.hidden,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "allow_interspersed_args": not any(param.rest for param in verb.params),
        },
    )


def _callback(verb: Verb) -> Any:
    @click.pass_context
    def callback(ctx: click.Context, /, as_json: bool, socket: str | None, **values: Any) -> None:
        from supervisor.cli.act import run

        sys.exit(run(verb, values, socket or ctx.obj, as_json))

    return callback


def _parameter(param: Param) -> click.Parameter:
    if param.positional:
        return click.Argument(
            [param.name],
            nargs=-1 if param.many else 1,
            required=param.required,
            metavar=_metavar(param),
            type=_Text(param) if param.type is int else None,
            shell_complete=_completion(param),
        )
    spelling = param.option
    if param.flag and param.default is True:
        spelling += "/--no-" + param.option[2:]
    return click.Option(
        [spelling, *([param.short] if param.short else []), param.name],
        is_flag=param.flag,
        multiple=param.many,
        default=param.default,
        type=None if param.flag or param.many else _Text(param),
        metavar=None if param.flag else param.metavar or None,
        help=_sentence(param.help),
        show_default=not param.flag and param.default not in (None, "", ()),
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _metavar(param: Param) -> str:
    shown = param.metavar + ("..." if param.many else "")
    return shown if param.required else f"[{shown}]"


class _Text(click.ParamType[Any, str]):
    """An option's value, read as the quick path reads it."""

    def __init__(self, param: Param) -> None:
        self._read = reader(param)
        self.name = {"seconds": "time", "whole": "number"}.get(self._read.__name__, "text")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except ValueError:
            self.fail(f"{value!r} is not {_EXPECTED[self.name]}", param, ctx)


_EXPECTED = {"time": 'a time such as "10s", "1h30m" or a number of seconds', "number": "a whole number, not negative"}


def _completion(param: Param) -> Any:
    """What completes a word; None where nothing can."""
    return _complete_names if "NAME" in param.metavar else _complete_queues if param.metavar == "QUEUE" else None


def _complete_queues(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The queues that the running daemon has."""
    return [
        CompletionItem(row["name"], help=row["backend"])
        for row in _asked(ctx, "queue.ls")
        if row["name"].startswith(incomplete)
    ]


def _complete_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names that the running daemon knows."""
    rows = _asked(ctx, "status")
    return [CompletionItem(row["name"], help=row["word"]) for row in rows if row["name"].startswith(incomplete)]


def _asked(ctx: click.Context, method: str) -> list[dict[str, Any]]:
    """The rows that the running daemon answers with; none where no daemon answers."""
    import json

    from supervisor.control.wire import Connection, Unreachable, find_socket

    named = ctx.params.get("socket") or ctx.find_root().params.get("socket")
    try:
        connection = Connection(find_socket(named))
        connection.send(method, {})
        rows: list[dict[str, Any]] = json.loads(connection.read_line(timeout=1.0) or b"{}").get("result", [])
    except (Unreachable, TimeoutError):
        return []
    return rows


def _answering(name: str, text: str, code: int) -> click.Command:
    """A command that only answers."""

    def callback(words: tuple[str, ...]) -> None:
        click.echo(f"supervisor: {name}: {text}", err=True)
        sys.exit(code)

    return click.Command(
        name,
        params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
        callback=callback,
        help=text[0].upper() + text[1:] + ".",
        hidden=True,
        context_settings={"ignore_unknown_options": True},
    )
