"""systemd manners: telling the service manager how we are, and the unit that makes it ask.

`Notifier` speaks sd_notify. It never raises and never blocks: without a manager it says nothing. `systemd_unit` is the
command `supervisor systemd-unit`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
import stat
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

import click

MARGIN = 10.0
"""Seconds on top of the daemon's own grace before the manager may lose patience."""


LISTEN_FDS_START = 3
"""The first descriptor that the manager passes on."""


def listening(environ: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """The sockets that the service manager has opened for us (FileDescriptorName=), by name.

    Its variables are taken out: they are meant for us, not for children. What is no stream socket is left alone.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found = {}
    for number, name in zip(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)), names.split(":"), strict=False):
        os.set_inheritable(number, False)
        if stat.S_ISSOCK(os.fstat(number).st_mode):
            found[name] = socket.socket(fileno=number)
            found[name].setblocking(True)
    return found


class Notifier:
    """Messages to the service manager over `$NOTIFY_SOCKET`.

    Each method returns whether the message was handed over, which is False without a manager. `watchdog_interval` is the
    time in seconds after which the manager expects the next `watchdog`, or None.
    """

    def __init__(self, address: str | None = None, watchdog_interval: float | None = None) -> None:
        self.watchdog_interval = watchdog_interval
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if address else None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """The notifier that `environ` describes. Its variables are taken out: they are meant for us, not for children."""
        address = environ.pop("NOTIFY_SOCKET", None)
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if ours else None)

    def ready(self, status: str) -> bool:
        """Everything is up, or a reload is over, whatever came of it."""
        return self._send("READY=1", _status(status))

    def reloading(self) -> bool:
        """A reload begins: `ready` must follow."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", _status("reloading"))

    def stopping(self, status: str, seconds: float) -> bool:
        """The end begins, and may take so long."""
        return self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={math.ceil((seconds + MARGIN) * 1e6)}", _status(status))

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(_status(text))

    def watchdog(self) -> bool:
        """We are alive."""
        return self._send("WATCHDOG=1")

    def close(self) -> None:
        """Say nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *fields: str) -> bool:
        if self._socket is None or self._address is None:
            return False
        try:
            self._socket.sendto("\n".join(fields).encode(errors="backslashreplace"), self._address)
        except OSError:  # no manager there, or one that does not read: nothing of ours may depend on it
            return False
        return True


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())


# -- the unit -----------------------------------------------------------------------------------------------------------

_UNIT = """\
# Written by `supervisor systemd-unit` for {file}.
# Install: save it as {directory}/{name}.service, then: {systemctl} daemon-reload && {systemctl} enable --now {name}

[Unit]
Description={description}
{after}
[Service]
{type}
ExecStart={command}
WorkingDirectory={working_directory}

# The daemon stops its jobs itself, in order; systemd kills what is left after it. With Delegate= a job that runs out of
# memory does not take the whole service with it, and the daemon may keep its jobs in groups of their own.
KillMode=mixed
Delegate=yes
TimeoutStartSec=60
TimeoutStopSec={stop}
Restart=on-failure
RestartSec=1
# not before somebody has mended the file (78), or ended the other daemon (73)
RestartPreventExitStatus=73 78
# all jobs count
TasksMax=infinity

StateDirectory={name}
StateDirectoryMode=0700
RuntimeDirectory={name}
RuntimeDirectoryMode=0700
# values for ${{NAME}} in the file, if it uses any:
#EnvironmentFile=

[Install]
WantedBy={target}
"""

_PLAIN = """\
Type=notify
ExecReload=kill -HUP $MAINPID
# systemd 253 and newer can wait for the end of a reload. A drop-in ({name}.service.d/reload.conf) for it:
#   [Service]
#   Type=notify-reload
#   ExecReload="""

_NOTIFY_RELOAD = """\
# needs systemd 253 or newer; an older one does not know the type and takes the service for a simple one
Type=notify-reload"""


def unit(name: str, file: Path, grace: float, *, user: bool = False, notify_reload: bool = False) -> str:
    """The text of a unit that runs this installation with `file`. `grace` is the daemon's own, in seconds."""
    return _UNIT.format(
        name=name,
        file=file,
        directory="~/.config/systemd/user" if user else "/etc/systemd/system",
        systemctl="systemctl --user" if user else "systemctl",
        description=_escaped(f"jobs of {file}"),
        after="" if user else "After=network.target\n",
        type=(_NOTIFY_RELOAD if notify_reload else _PLAIN).format(name=name),
        command=" ".join(_quoted(word) for word in [*_program(), "run", "-c", str(file)]),
        working_directory=_escaped(str(file.parent)),
        stop=math.ceil(grace + MARGIN),
        target="default.target" if user else "multi-user.target",
    )


def _program() -> list[str]:
    """How to start us: the installed script beside the interpreter, or the package, without the current directory."""
    script = Path(sys.executable).with_name("supervisor")
    return [str(script)] if script.exists() else [sys.executable, "-P", "-m", "supervisor"]


def _quoted(word: str) -> str:
    """`word` for a command line of a unit, where `%` and `$` mean something."""
    word = _escaped(word).replace("$", "$$")
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' if shlex.quote(word) != word else word


def _escaped(text: str) -> str:
    """`text` where only specifiers (`%`) mean something."""
    return text.replace("%", "%%")


@click.command("systemd-unit")
@click.option("-c", "--config", "path", default="supervisor.toml", show_default=True, help="The file the service runs.")
@click.option("--name", help="The name of the service; [daemon] name unless given.")
@click.option("--user", is_flag=True, help="A unit for `systemctl --user`.")
@click.option("--notify-reload", is_flag=True, help="Type=notify-reload, for systemd 253 and newer.")
def systemd_unit(path: str, name: str | None, user: bool, notify_reload: bool) -> None:
    """Print a systemd unit that runs FILE with this installation."""
    from supervisor import config  # only this command needs it
    from supervisor.errors import SpecError

    try:
        loaded = config.load(Path(path), os.environ)
    except SpecError as error:
        click.echo(error, err=True)
        sys.exit(78)
    service = name or re.sub(r"[^A-Za-z0-9_.-]", "-", loaded.daemon.name)
    click.echo(unit(service, Path(path).resolve(), loaded.daemon.grace, user=user, notify_reload=notify_reload), nl=False)
