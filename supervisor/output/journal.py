"""Output to systemd's journal, in its native protocol: one datagram a line, a sealed memory file where that is too large."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import re
import socket

SOCKET = "/run/systemd/journal/socket"

_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_GONE = (errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE, errno.EDESTADDRREQ)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_PRIORITY = re.compile(rb"<([0-7])>")


def missing() -> str:
    """Why there is no journal to write to; nothing where there is one."""
    try:
        _connect().close()
    except OSError as error:
        return f"no journal here: {SOCKET}: {(error.strerror or str(error)).lower()}"
    return ""


def _connect() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.connect(SOCKET)
    except BaseException:
        sock.close()
        raise
    return sock


class Journal:
    """The journal, for one run: each line is an entry. Raises OSError where there is none.

    The priority is 6 (info), also of what went to stderr: one pipe carries both, which is what keeps their order. A line may
    say another as `<3>`, the way of sd-daemon(3). A line longer than `max_line` becomes several entries with
    LINE_BREAK=line-max. Bytes are stored as they are.
    """

    def __init__(self, job: str, run: str, max_line: int) -> None:
        self.error: OSError | None = None
        fields = {"SYSLOG_IDENTIFIER": job, "SUPERVISOR_JOB": job, "SUPERVISOR_RUN": run}
        self._head = "".join(f"{key}={value}\n" for key, value in fields.items()).encode()
        self._max_line = max_line
        self._part = b""  # of a line whose end has not come yet
        self._cut = False  # the beginning of that line has been sent
        self._socket: socket.socket | None = _connect()

    @property
    def unfinished(self) -> bool:
        """Whether a line waits for its end."""
        return bool(self._part)

    def write(self, data: bytes) -> tuple[int, int]:
        """Send the lines that `data` completes: how many bytes are taken, and how many lost, perhaps with what came before."""
        self.error = None
        at = 0
        try:
            while (end := self._end_of_piece(data, at)) >= 0:
                newline = data.startswith(b"\n", end)
                self._send(self._part + data[at:end], cut=self._cut or not newline)
                self._part, self._cut = b"", not newline
                at = end + newline
        except OSError as error:
            if isinstance(error, BlockingIOError) and self._socket is not None:
                return at, 0
            self.error = error
            lost = len(self._part) + len(data) - at
            self._part, self._cut = b"", False
            return at, lost
        self._part += data[at:]
        return len(data), 0

    def fileno(self) -> int:
        """What becomes writable when the journal has room again."""
        return self._socket.fileno() if self._socket is not None else -1

    def close(self) -> None:
        """Hang up; the next write connects again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __str__(self) -> str:
        return "the journal"

    def _end_of_piece(self, data: bytes, at: int) -> int:
        """Where the line at `at` ends, or is too long; -1: not within `data`."""
        longest = at + self._max_line - len(self._part)
        newline = data.find(b"\n", at, longest + 1)
        return newline if newline >= 0 or len(data) <= longest else longest

    def _send(self, line: bytes, *, cut: bool) -> None:
        line, priority = line.removesuffix(b"\r"), b"6"
        if prefix := _PRIORITY.match(line):
            line, priority = line[prefix.end() :], prefix[1]
        mark = b"LINE_BREAK=line-max\n" if cut else b""
        entry = b"%sPRIORITY=%s\n%sMESSAGE\n%s%s\n" % (self._head, priority, mark, len(line).to_bytes(8, "little"), line)
        try:
            self._deliver(entry)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.close()
            self._deliver(entry)  # to the journal that was started in its place

    def _deliver(self, entry: bytes) -> None:
        if self._socket is None:
            self._socket = _connect()
        try:
            self._socket.send(entry)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            _deliver_by_file(self._socket, entry)


def _deliver_by_file(sock: socket.socket, entry: bytes) -> None:
    fd = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(entry)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        sock.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    finally:
        os.close(fd)
