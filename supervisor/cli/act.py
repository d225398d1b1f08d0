"""One verb carried out: ask the daemon, show what it says, and give the exit code of the contract.

0 done · 1 refused or failed · 2 usage · 3 daemon not reachable · 4 no such name · 5 (`status`) something is not well ·
75 timed out waiting · 78 the file is wrong · 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys

from supervisor.cli import render
from supervisor.control.wire import Connection, Unreachable, find_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

    from supervisor.control.verbs import Verb

REFUSED, USAGE, UNREACHABLE, NOT_WELL, INTERRUPTED = 1, 2, 3, 5, 130

_INVALID_PARAMS = -32602
_encode = json.JSONEncoder(ensure_ascii=False).encode
_GRACE = 5.0


class Out:
    """Standard output: lines for people (coloured on a terminal) or for machines. A reader that has had enough is no error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.terminal = stream.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.width = os.get_terminal_size(stream.fileno()).columns if self.terminal else 0
        self.closed = False

    def line(self, text: str) -> None:
        """Write one line."""
        self._try(self._stream.write, text + "\n")

    def json(self, value: object) -> None:
        """Write one value on one line."""
        self.line(_encode(value))

    def flush(self) -> None:
        """Let the reader have it now."""
        self._try(self._stream.flush)

    def _try(self, write: Callable[..., object], *args: str) -> None:
        if self.closed:
            return
        try:
            write(*args)
        except BrokenPipeError:
            self.closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for what Python flushes at exit


def run(verb: Verb, values: dict[str, Any], socket: str | None, as_json: bool) -> int:
    """Carry out a verb and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    out = Out(sys.stdout)
    try:
        if verb.name == "submit":
            from supervisor.cli.submit import submit

            return submit(out, verb, values, socket, as_json)
        if verb.converses:
            from supervisor.cli.session import converse

            return converse(out, verb, values, socket, as_json)
        return _ask(out, verb, values, socket, as_json)
    except Unreachable as problem:
        complain(str(problem))
        return UNREACHABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        out.flush()


def complain(text: str) -> None:
    """Say what is wrong, on stderr."""
    print(f"supervisor: {text}", file=sys.stderr)


def _ask(out: Out, verb: Verb, values: dict[str, Any], socket: str | None, as_json: bool) -> int:
    connection = Connection(find_socket(socket))
    if not (values.get("follow") or values.get("wait") or verb.name == "queue.wait"):
        return _converse(connection, out, verb, values, as_json)
    from supervisor.cli.wakeup import woken_by_signals

    with woken_by_signals() as connection.wakeup:
        return _converse(connection, out, verb, values, as_json)


def _converse(connection: Connection, out: Out, verb: Verb, values: dict[str, Any], as_json: bool) -> int:
    given = {param.name: values[param.name] for param in verb.params if values[param.name] != param.default}
    connection.send(verb.name, given)
    timeout = values.get("timeout")
    show_item = ITEMS.get(verb.name)
    empty = True
    while not out.closed:
        try:
            line = connection.read_line(None if timeout is None else timeout + _GRACE)
        except TimeoutError:
            complain(f"{verb.name}: the daemon does not answer")
            return 75
        if not line:
            return _hung_up(out, verb, values, connection.path)
        reply = json.loads(line)
        if "error" in reply:
            return failed(out, verb, reply["error"], as_json)
        if "result" in reply:
            if verb.name == "logs" and empty:
                complain("logs: nothing is captured of it; what functions log is in the daemon's own log")
            return show(out, verb, reply["result"], values, as_json)
        if show_item:
            empty = False
            item = reply["params"]["item"]
            out.json(item) if as_json else show_item(out, item, values)
            out.flush()
    return 0


def _hung_up(out: Out, verb: Verb, values: dict[str, Any], path: str) -> int:
    """The daemon has closed the connection: the end that a shutdown or a follower waits for, else a fault."""
    if verb.name == "shutdown":
        out.line("the daemon has stopped")
        return 0
    if values.get("follow"):
        return 0
    raise Unreachable(f"{verb.name}: the daemon at {path} has hung up: it has ended, or is ending")


def failed(out: Out, verb: Verb, error: dict[str, Any], as_json: bool) -> int:
    """Say why a request was refused, and give the exit code."""
    code, data = error["code"], error.get("data")
    if code == 75 and data:
        show(out, verb, data, {}, as_json)
        out.flush()
    complain(error["message"]) if code != 78 else print(error["message"], file=sys.stderr)
    return exit_code(error)


def exit_code(error: dict[str, Any]) -> int:
    """The exit code that says the same as an error of the daemon."""
    code: int = error["code"]
    return USAGE if code == _INVALID_PARAMS else code if code > 0 else REFUSED


def show(out: Out, verb: Verb, result: Any, values: dict[str, Any], as_json: bool) -> int:
    """Show a result, and judge it."""
    shower, judge = RESULTS.get(verb.name, (_show_answers, _judge_answers))
    if as_json and not verb.streams:
        _show_json(out, result)
    else:
        shower(out, result, values)
    return judge(result, values)


def _show_json(out: Out, result: Any) -> None:
    """An array with an object on each line, else one line: for jq, grep and people."""
    if isinstance(result, list) and result:
        last = len(result) - 1
        out.line("[")
        for index, item in enumerate(result):
            out.line(_encode(item) + ("," if index < last else ""))
        out.line("]")
    else:
        out.json(result)


def _show_answers(out: Out, answers: Any, values: dict[str, Any]) -> None:
    for answer in answers:
        text = f"{answer['name']}: {render.clean(answer['text'])}"
        out.line(text if answer["ok"] else render.paint(text, "red", out.colour))


def _judge_answers(answers: Any, values: dict[str, Any]) -> int:
    return 0 if all(answer["ok"] for answer in answers) else REFUSED


def _show_status(out: Out, rows: Any, values: dict[str, Any]) -> None:
    if not rows:
        out.line("no jobs")
    else:
        out.line("\n".join(render.table(rows, out.colour, out.width)))  # at once: a thousand writes cost more than the rows


_NOT_WELL = ("failed", "gave up", "backing off")


def _judge_status(rows: Any, values: dict[str, Any]) -> int:
    named = bool(values.get("names"))
    bad = any((named or row["goal"] == "up") and (row["word"] in _NOT_WELL or row["healthy"] is False) for row in rows)
    return NOT_WELL if bad else 0


def _show_tree(out: Out, branches: Any, values: dict[str, Any]) -> None:
    for line in render.tree(branches, out.colour):
        out.line(line)


def _show_limits(out: Out, rows: Any, values: dict[str, Any]) -> None:
    for line in render.limits(rows, out.colour) if rows else ["no limits"]:
        out.line(line)


def _show_text(out: Out, text: Any, values: dict[str, Any]) -> None:
    for line in text.splitlines():
        out.line(line)


def _show_reload(out: Out, result: Any, values: dict[str, Any]) -> None:
    if isinstance(result, dict):
        for line in render.plan(result, bool(values.get("plan"))):
            out.line(line)
    _show_answers(out, _answers_of(result), values)


def _judge_reload(result: Any, values: dict[str, Any]) -> int:
    return _judge_answers(_answers_of(result), values)


def _answers_of(result: Any) -> Any:
    return result["answers"] if isinstance(result, dict) else result


def _show_shutdown(out: Out, result: Any, values: dict[str, Any]) -> None:
    if late := result["late"]:
        out.line("did not stop in time and were killed: " + ", ".join(late))
    if left := result["survivors"]:
        out.line("still alive: " + ", ".join(left))
    else:
        out.line("the daemon has stopped" if values.get("wait", True) else "shutdown accepted")


def _show_history(out: Out, runs: Any, values: dict[str, Any]) -> None:
    if not runs:
        out.line("no run of it has ended yet")
    else:
        out.line("\n".join(render.history(runs, out.colour, out.width)))


def _show_queues(out: Out, rows: Any, values: dict[str, Any]) -> None:
    out.line("\n".join(render.queues(rows, out.colour, out.width)) if rows else "no queues")


def _show_items(out: Out, rows: Any, values: dict[str, Any]) -> None:
    out.line("\n".join(render.items(rows, out.colour, out.width)) if rows else "no items")


def _show_item(out: Out, item: Any, values: dict[str, Any]) -> None:
    for line in render.item(item, out.colour):
        out.line(line)


def _show_ended(out: Out, rows: Any, values: dict[str, Any]) -> None:
    for row in rows:
        out.line(render.ended(row, out.colour))


def _judge_ended(rows: Any, values: dict[str, Any]) -> int:
    return 0 if all(row["state"] == "done" for row in rows) else REFUSED


def _show_version(out: Out, result: Any, values: dict[str, Any]) -> None:
    out.line(f"{result['name']}: supervisor {result['version']}, pid {result['pid']}, {result['phase']}")
    out.line(f"file: {result['file'] or 'none'}")


def _show_json_anyway(out: Out, result: Any, values: dict[str, Any]) -> None:
    out.json(result)


def _show_end(out: Out, result: Any, values: dict[str, Any]) -> None:
    """The end of a stream has nothing to show: its items were it."""


def _fine(result: Any, values: dict[str, Any]) -> int:
    return 0


RESULTS: dict[str, tuple[Callable[[Out, Any, dict[str, Any]], None], Callable[[Any, dict[str, Any]], int]]] = {
    "status": (_show_status, _judge_status),
    "tree": (_show_tree, _fine),
    "reload": (_show_reload, _judge_reload),
    "limits": (_show_limits, _fine),
    "metrics": (_show_text, _fine),
    "logs": (_show_end, _fine),
    "events": (_show_end, _fine),
    "shutdown": (_show_shutdown, lambda result, values: REFUSED if result["survivors"] else 0),
    "history": (_show_history, _fine),
    "queue.ls": (_show_queues, lambda rows, values: REFUSED if any(row["trouble"] for row in rows) else 0),
    "queue.peek": (_show_items, _fine),
    "queue.dead": (_show_items, _fine),
    "queue.show": (_show_item, _fine),
    "queue.wait": (_show_ended, _judge_ended),
    "version": (_show_version, _fine),
    "rpc.discover": (_show_json_anyway, _fine),
}
"""How each verb's result is shown and judged; a verb that is not here gives answers, one for each name."""


def _show_log_line(out: Out, item: Any, values: dict[str, Any]) -> None:
    one = len(values["names"]) == 1 and not any(char in values["names"][0] for char in "*?")
    text = item.get("line", "") if not item.get("lagged") else f"[{item['lagged']} bytes were too fast for this reader]"
    out.line(text if one else f"{render.paint(item['name'], render.colour_of(item['name']), out.colour)} | {text}")


def _show_event(out: Out, item: Any, values: dict[str, Any]) -> None:
    if "snapshot" in item:
        _show_status(out, item["snapshot"], values)
    else:
        out.line(render.event(item, out.colour))


ITEMS: dict[str, Callable[[Out, Any, dict[str, Any]], None]] = {"logs": _show_log_line, "events": _show_event}
"""How the items of streams are shown."""
