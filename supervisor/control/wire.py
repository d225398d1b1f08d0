"""Finding the daemon's socket, and one blocking connection to it. Only what a fast start can afford: socket and json."""

# ruff: noqa: PTH109, PTH116, PTH118, PTH119, PTH120  (importing pathlib would take longer than asking)

from __future__ import annotations

import errno
import json
import os
import socket

TYPE_CHECKING = False  # `typing` would cost a tenth of the start
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

SOCKET = "control.sock"
LONGEST = 103
"""Bytes of path that fit a Unix socket address on every system we know."""

_TRIES = 8
_CHUNK = 1 << 18


class Unreachable(ConnectionError):
    """No daemon answers. The message says where it was looked for and what to do; the CLI ends with 3."""


def find_socket(explicit: str | None = None) -> str:
    """The path of the control socket, without reading any TOML: the one given, or the first that is there.

    Looks at `$SUPERVISOR_SOCKET`, `.supervisor/control.sock` here and in the directories above,
    `$XDG_RUNTIME_DIR/supervisor/`, `/run/supervisor/`. One that is not named but found must belong to this user or root.
    """
    if named := explicit or os.environ.get("SUPERVISOR_SOCKET"):
        return named
    for path in _places():
        if _trusted(path):
            return path
    raise Unreachable(
        f"no supervisor daemon found: looked for .supervisor/{SOCKET} in {os.getcwd()} and above, and for "
        + " and ".join(_runtime_places())
        + "; start one with `supervisor run`, or name its socket with --socket or $SUPERVISOR_SOCKET"
    )


def _places() -> Iterator[str]:
    here = os.getcwd()
    while True:
        yield os.path.join(here, ".supervisor", SOCKET)
        if here == (here := os.path.dirname(here)):
            break
    yield from _runtime_places()


def _runtime_places() -> Iterator[str]:
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield os.path.join(runtime, "supervisor", SOCKET)
    yield f"/run/supervisor/{SOCKET}"


def _trusted(path: str) -> bool:
    """Whether it is there and nobody else's: a stranger's socket in /tmp is not ours to talk to. Root may talk to all."""
    try:
        owner = os.stat(path).st_uid
    except OSError:
        return False
    return owner in (os.getuid(), 0) or os.getuid() == 0


def short_address(path: str) -> tuple[str, int | None]:
    """An address for `path` that fits, and the descriptor of its directory that must stay open meanwhile, if any."""
    if len(os.fsencode(path)) <= LONGEST:
        return path, None
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{directory}/{os.path.basename(path)}", directory


def connect(path: str, timeout: float = 5.0) -> socket.socket:
    """A connected, blocking socket. A full backlog is tried again a few times, with jitter. Raises Unreachable."""
    try:
        return _connect(path, timeout)
    except OSError as problem:
        raise Unreachable(unreachable(path, problem)) from problem


def unreachable(path: str, problem: OSError) -> str:
    """Why nobody answers at `path`, and what to do."""
    if problem.errno == errno.ENOENT:
        return f"no supervisor daemon at {path}: no such socket; start one with `supervisor run`"
    if problem.errno in (errno.ECONNREFUSED, errno.ENOTSOCK):
        return (
            f"no supervisor daemon answers at {path}: it has ended without removing its socket; start it with `supervisor run`"
        )
    if problem.errno in (errno.EACCES, errno.EPERM):
        return f"not allowed to connect to {path}: ask as the user that the daemon runs as, or as root"
    if problem.errno == errno.EAGAIN:
        return f"the supervisor daemon at {path} does not answer: too many callers are waiting, or it stands still"
    return f"no supervisor daemon answers at {path}: {problem.strerror or problem}"


def _connect(path: str, timeout: float) -> socket.socket:
    address, directory = short_address(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        for attempt in range(_TRIES):
            try:
                sock.connect(address)
                break
            except BlockingIOError:  # the backlog is full
                if attempt == _TRIES - 1:
                    raise
                pause(attempt)
        sock.settimeout(None)
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        if directory is not None:
            os.close(directory)


def patience(attempt: int) -> float:
    """How long to wait before the next try: longer each time, and never in step with other callers."""
    return 0.01 * (1 << attempt) * (0.5 + os.urandom(1)[0] / 256)


def pause(attempt: int) -> None:
    """Wait that long."""
    import select

    select.select((), (), (), patience(attempt))


class Connection:
    """One blocking connection to the daemon. Lines of JSON out, lines of JSON in; not to be shared by threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = connect(path)
        self._buffer = bytearray()
        self._searched = 0
        self._sent = 0
        self.wakeup: int | None = None
        """A descriptor that ends a wait too; what it has to say is read and left to whoever set it up."""

    def send(self, method: str, params: dict[str, Any]) -> int:
        """Ask for something; gives the id that the answer will carry."""
        return self.send_encoded(method, json.dumps(params, ensure_ascii=False).encode("utf-8", "surrogateescape"))

    def send_encoded(self, method: str, params: bytes) -> int:
        """The same with params that are JSON already, on one line."""
        self._sent += 1
        try:
            self._socket.sendall(
                b'{"jsonrpc":"2.0","id":%d,"method":"%b","params":%b}\n' % (self._sent, method.encode(), params)
            )
        except (BrokenPipeError, ConnectionResetError):
            pass  # what it had to say before it closed may still be there to read
        return self._sent

    def read_line(self, timeout: float | None = None) -> bytes:
        """The next line; empty when the daemon has closed the connection. Raises TimeoutError after `timeout` seconds."""
        self._socket.settimeout(timeout)
        while (line := self.next_line()) is None:
            if self.wakeup is not None:
                self._wait(self.wakeup, timeout)
            if not self.receive():
                return b""
        return line

    def next_line(self) -> bytes | None:
        """The next line of what has been received; None where none is complete."""
        if (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def receive(self) -> bool:
        """Take what is there, or wait for it; False when the daemon has closed the connection."""
        try:
            chunk = self._socket.recv(_CHUNK)
        except ConnectionResetError:
            return False
        self._buffer += chunk
        return bool(chunk)

    def fileno(self) -> int:
        """Its descriptor, to wait for."""
        return self._socket.fileno()

    def _wait(self, wakeup: int, timeout: float | None) -> None:
        """Wait until there is something to receive, and never only for that."""
        import select

        descriptor = self._socket.fileno()
        while True:
            ready, _, _ = select.select((descriptor, wakeup), (), (), timeout)
            if not ready:
                raise TimeoutError
            if wakeup in ready:
                os.read(wakeup, _CHUNK)
            if descriptor in ready:
                return

    def close(self) -> None:
        """Hang up: what was asked for and accepted goes on, only the waiting for it ends."""
        self._socket.close()
