"""NOTIFY_SOCKET: what a child says of itself, in the words of systemd's sd_notify.

Anybody on this machine can write to the socket; each message carries the sender's pid and uid, which the kernel vouches for,
and it is the reader's business to refuse strangers. Whatever comes, nothing here raises because of it.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import NamedTuple

import trio

LONGEST = 4096
"""Bytes of a message."""

_CREDENTIALS = struct.Struct("3i")
_ROOM = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(64 * array.array("i").itemsize)


class Message(NamedTuple):
    """What was said, and by whom. `pid` is 0 where it cannot be seen from here."""

    assignments: dict[str, str]
    pid: int
    uid: int
    whole: bool
    """False: it was longer than `LONGEST`, and `assignments` is not to be relied on."""


def parse(data: bytes) -> dict[str, str]:
    """The assignments, a line each; of two to one name the last. What is none, or no UTF-8, does no harm."""
    lines = data.decode(errors="replace").split("\n")
    return {name: value for name, found, value in (line.partition("=") for line in lines) if found}


class NotifySocket:
    """The socket of one run: an abstract one, so that a child of another user or root directory reaches it as well.

    Raises OSError where there is none to be had.
    """

    def __init__(self, name: str) -> None:
        self.address = f"@{name}"
        """For the child's environment."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bare:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            bare.bind(f"\0{name}")
            self._socket = trio.socket.from_stdlib_socket(socket.socket(fileno=bare.detach()))

    def __enter__(self) -> NotifySocket:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    async def receive(self) -> Message:
        """The next message. Descriptors that come with it are closed: that is the answer to BARRIER=1.

        Raises OSError where the kernel has no memory for it.
        """
        data, ancillary, flags, _ = await self._socket.recvmsg(LONGEST, _ROOM, socket.MSG_CMSG_CLOEXEC)
        pid, uid = 0, -1
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, uid, _ = _CREDENTIALS.unpack(content)
            elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                _close(content)
        return Message(parse(data), pid, uid, not flags & socket.MSG_TRUNC)


def _close(content: bytes) -> None:
    fds = array.array("i")
    fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    for fd in fds:
        os.close(fd)
