"""`exec` and `attach`: what a job prints is shown as it comes, and what is typed goes to it.

One loop waits for the daemon, for signals and for standard input, and for this only while nothing that was typed is on its
way: a job that does not read stops the typing, and nothing else.
"""

from __future__ import annotations

import binascii
import json
import os
import select
import signal
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from supervisor.cli.act import Out, complain, failed
from supervisor.cli.wakeup import woken_by_signals
from supervisor.control.wire import Connection, Unreachable, find_socket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from supervisor.control.verbs import Verb

CHUNK = 1 << 16
LEAVE, LEAVE_FIRST, LEAVE_SECOND = b"\x1d", b"\x10", b"\x11"
"""Ctrl-], and Ctrl-P Ctrl-Q."""

CLOSED_PIPE = 128 + signal.SIGPIPE


def converse(out: Out, verb: Verb, values: dict[str, Any], socket: str | None, as_json: bool) -> int:
    """Carry out `exec` or `attach` and return the exit code: the command's own, 128 + N where signal N ended it."""
    kind = Exec if verb.name == "exec" else Attach
    with woken_by_signals() as wakeup, _heeding_signals(), Terminal(sys.stdin) as terminal:
        talk = kind(Connection(find_socket(socket)), out, verb, values, terminal, as_json)
        try:
            return talk.run(wakeup)
        except BrokenPipeError:
            return CLOSED_PIPE


@contextmanager
def _heeding_signals() -> Iterator[None]:
    """Ctrl-C and a change of the window only wake the loop, which reads them; what ends us does so by way of `finally`."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGWINCH), lambda *_: None)
    handlers |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT), end)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        del handlers[signal.SIGINT]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Terminal:
    """Standard input: whether it is a terminal, and how that behaves. Leaving the context restores it, whatever happened."""

    def __init__(self, stream: Any) -> None:
        self.descriptor = -1 if stream is None else stream.fileno()
        self.there = self.descriptor >= 0 and os.isatty(self.descriptor)
        self._before: list[Any] | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Be as it was before."""
        if self._before is not None:
            termios.tcsetattr(self.descriptor, termios.TCSADRAIN, self._before)
            self._before = None

    def raw(self) -> None:
        """Hand on every key as it is pressed; nothing here obeys any."""
        self._keep()
        tty.setraw(self.descriptor)

    def by_lines(self) -> None:
        """Hand on a line when it is complete, or when a key is pressed that leaves."""
        mode = self._keep()
        mode[0] &= ~termios.IXON
        mode[6] = [*mode[6]]
        mode[6][termios.VEOL], mode[6][termios.VEOL2] = LEAVE, LEAVE_SECOND
        termios.tcsetattr(self.descriptor, termios.TCSADRAIN, mode)

    def _keep(self) -> list[Any]:
        self._before = termios.tcgetattr(self.descriptor)
        return [*self._before]

    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        columns, rows = os.get_terminal_size(self.descriptor)
        return rows, columns


class Talk:
    """A conversation with a job: what `exec` and `attach` have in common."""

    def __init__(
        self, connection: Connection, out: Out, verb: Verb, values: dict[str, Any], terminal: Terminal, as_json: bool
    ) -> None:
        self.connection = connection
        self.terminal = terminal
        self.values = values
        self.name = ""
        self.typing = False
        """Whether what is typed goes to the job."""
        self._out = out
        self._verb = verb
        self._as_json = as_json
        self._unanswered = 0
        self._code: int | None = None

    # what differs

    def params(self) -> dict[str, Any]:
        """What is asked of the daemon."""
        return {param.name: self.values[param.name] for param in self._verb.params if self.values[param.name] != param.default}

    def joined(self, item: dict[str, Any]) -> None:
        """The daemon has said whom we talk to."""

    def interrupted(self) -> int | None:
        """Ctrl-C, or a signal like it. Gives the exit code where that is the end."""
        raise NotImplementedError

    def filtered(self, data: bytes) -> tuple[bytes, bool]:
        """What of the keys goes to the job, and whether they were those that leave."""
        raise NotImplementedError

    def at_end_of_input(self) -> int | None:
        """Standard input is at its end. Gives the exit code where that is the end of all."""
        self.typing = False
        self.hand_over(eof=True)
        return None

    def finished(self, result: dict[str, Any] | None) -> int:
        """The run is over: the exit code."""
        raise NotImplementedError

    # what is the same

    def run(self, wakeup: int) -> int:
        """Talk until one side has had enough."""
        self._asked = self.connection.send(self._verb.name, self.params())
        while self._code is None:
            watched = [self.connection.fileno(), wakeup]
            if self.typing and not self._unanswered:
                watched.append(self.terminal.descriptor)
            ready, _, _ = select.select(watched, (), ())
            if wakeup in ready:
                self._heed(os.read(wakeup, CHUNK))
            if self.connection.fileno() in ready:
                self._listen()
            if self.terminal.descriptor in ready and self._code is None:
                self._type(os.read(self.terminal.descriptor, CHUNK))
        return self._code

    def hand_over(self, **what: Any) -> None:
        """Send a piece of input, and no other until it is written."""
        self._unanswered = self.connection.send("input", {"to": self._asked, **what})

    def resize(self) -> None:
        """Give the job's terminal the size of this one."""
        if self.terminal.there and self.name:
            rows, columns = self.terminal.size()
            self.connection.send("input", {"to": self._asked, "rows": rows, "columns": columns})

    def _heed(self, numbers: bytes) -> None:
        if signal.SIGWINCH in numbers:
            self.resize()
        if signal.SIGINT in numbers:
            self._code = self.interrupted()

    def _type(self, data: bytes) -> None:
        if not data:
            self._code = self.at_end_of_input()
            return
        data, leaves = self.filtered(data)
        if data:
            self.hand_over(data=binascii.b2a_base64(data, newline=False).decode())
        if leaves:
            self._code = self.interrupted()

    def _listen(self) -> None:
        going_on = self.connection.receive()
        while self._code is None and (line := self.connection.next_line()) is not None:
            self._hear(json.loads(line))
        if not going_on and self._code is None:
            self.terminal.restore()
            where = f"the daemon at {self.connection.path}"
            raise Unreachable(f"{self._verb.name}: {where} has hung up: it has ended, or is ending")

    def _hear(self, reply: dict[str, Any]) -> None:
        if "method" in reply:
            self._show(reply["params"]["item"])
        elif reply["id"] == self._unanswered:
            self._unanswered = 0
            self.typing = self.typing and "error" not in reply
        elif reply["id"] == self._asked:
            self.terminal.restore()
            if "error" in reply:
                self._code = failed(self._out, self._verb, reply["error"], self._as_json)
                return
            if self._as_json:
                self._out.json(reply["result"])
            self._code = self.finished(reply["result"])

    def _show(self, item: dict[str, Any]) -> None:
        if self._as_json:
            self._out.json(item)
            self._out.flush()
        if "name" in item:
            self.name = item["name"]
            self.joined(item)
        elif "lagged" in item:
            complain(f"[{item['lagged']} bytes were too fast for this reader]\r")  # the terminal may be raw
        elif not self._as_json:
            _write(binascii.a2b_base64(item["data"]))


class Exec(Talk):
    """`exec`: the command is this process's own, as far as that goes. It ends when this does."""

    _stops = 0

    def params(self) -> dict[str, Any]:
        given = super().params()
        if cwd := self.values["cwd"]:
            given["cwd"] = os.path.abspath(cwd)  # noqa: PTH100  (pathlib has no such function; `~` is the shell's business)
        if not self.values["detach"] and (self.values["tty"] or not self.terminal.there):
            given["interactive"] = True
        return given

    def joined(self, item: dict[str, Any]) -> None:
        if self.values["detach"]:
            return
        self.typing = self.values["interactive"] or self.values["tty"] or not self.terminal.there
        self.typing = self.typing and self.terminal.descriptor >= 0
        if item["tty"] and self.terminal.there:
            self.resize()
            self.terminal.raw()

    def interrupted(self) -> int | None:
        """Ask the command to end; the second time, kill it. One that has no name yet ends when we hang up."""
        if not self.name:
            return 128 + signal.SIGINT
        self.connection.send("stop", {"names": [self.name], "wait": False, "now": self._stops > 0})
        self._stops += 1
        return None

    def filtered(self, data: bytes) -> tuple[bytes, bool]:
        if not (self.values["tty"] and self.terminal.there):
            return data, False
        before, found, _ = data.partition(LEAVE)
        return before, bool(found)

    def finished(self, result: dict[str, Any] | None) -> int:
        if result is None:
            if not self._as_json:
                self._out.line(self.name)
            return 0
        if result["code"] is not None:
            return int(result["code"])
        complain(f"{result['name']}: {result['reason']}")
        return 128 + signal.Signals[result["signal"]] if result["signal"] else 1


class Attach(Talk):
    """`attach`: a guest at somebody else's job, who leaves it as it is."""

    _held = b""

    def joined(self, item: dict[str, Any]) -> None:
        self.typing = self.terminal.descriptor >= 0
        if not self.terminal.there:
            return
        keys = "Ctrl-] or Ctrl-P Ctrl-Q" if item["tty"] else "Ctrl-], Ctrl-P Ctrl-Q or Ctrl-C"
        complain(f"attached to {self.name}; {keys} leaves it as it is")
        self.resize() if item["tty"] else None
        self.terminal.raw() if item["tty"] else self.terminal.by_lines()

    def interrupted(self) -> int | None:
        self.terminal.restore()
        if self.terminal.there:
            complain(f"detached from {self.name}")
        return 0

    def filtered(self, data: bytes) -> tuple[bytes, bool]:
        data, self._held = self._held + data, b""
        ends = [at for keys in (LEAVE, LEAVE_FIRST + LEAVE_SECOND) if (at := data.find(keys)) >= 0]
        if ends:
            return data[: min(ends)], True
        if data.endswith(LEAVE_FIRST):  # what follows decides
            self._held = LEAVE_FIRST
            data = data[:-1]
        return data, False

    def at_end_of_input(self) -> int | None:
        """What came from a file or a pipe is written: leave. Ctrl-D on a terminal ends the job's input."""
        return super().at_end_of_input() if self.terminal.there else self.interrupted()

    def finished(self, result: dict[str, Any] | None) -> int:
        if result is not None:
            complain(f"{result['name']}: {result['reason']}")
        return 0


def _write(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(1, left) :]
