"""What only one daemon may have: its state directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from supervisor.atomic import write_atomic_sync
from supervisor.config import Config
from supervisor.errors import SupervisorError

DEFAULT = ".supervisor"
"""The state directory beside the file, and where clients look for the socket first."""
SOCKET = "control.sock"


class NotToBeHad(SupervisorError):
    """The state directory, its lock or the socket: the message says which, why, and what to do. Exit code 73."""


class Places:
    """Where state and socket are: what the file says, what systemd gives, or `.supervisor/` beside the file."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._state = environ.get("STATE_DIRECTORY", "").partition(":")[0]
        self._runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]

    def settle(self, config: Config) -> Config:
        """`config` with both places filled in, absolute: so the same places, and no difference, at a reload."""
        said = config.daemon
        state = config.base / (said.state_dir or self._state or DEFAULT)
        given = said.state_dir is None or said.state_dir == self._state
        if said.socket:
            socket = config.base / said.socket
        else:
            socket = (Path(self._runtime) if self._runtime and given else state) / SOCKET
        return replace(config, daemon=msgspec.structs.replace(said, state_dir=str(state), socket=str(socket)))


@contextmanager
def claimed(config: Config, places: Places) -> Iterator[None]:
    """The state directory of `config` (settled), ours alone while the block lasts. Raises NotToBeHad."""
    state, socket, default = config.state_dir, Path(config.daemon.socket or ""), config.base / DEFAULT
    with ExitStack() as stack:
        try:
            _make_private(state, ignored=state == default)
            stack.enter_context(_locked(state / "lock"))
        except OSError as error:
            raise NotToBeHad(f"no state directory: {error.filename or state}: {error.strerror}") from error
        stack.enter_context(_linked(default, socket))
        yield


def _make_private(directory: Path, ignored: bool) -> None:
    """Make `directory`, ours and closed to others; `ignored` makes git ignore it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid():
        raise NotToBeHad(f"{directory} belongs to uid {found.st_uid}: run as that user, or choose another [daemon] state_dir")
    if found.st_mode & 0o077:
        directory.chmod(0o700)
    if ignored and not (directory / ".gitignore").exists():
        write_atomic_sync(directory / ".gitignore", "*\n", durable=False)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`. The file is never deleted or replaced: whoever holds it is the daemon, whatever lies about."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise NotToBeHad(
                f"another daemon (pid {pid}) runs with {path.parent}: see `supervisor status`, or `supervisor shutdown`"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _linked(directory: Path, socket: Path) -> Iterator[None]:
    """A link to `socket` in `directory`, where clients look first. A convenience: where it cannot be, nothing is lost."""
    link = directory / SOCKET
    made = socket != link and _link(link, socket)
    try:
        yield
    finally:
        if made and link.is_symlink() and link.readlink() == socket:
            link.unlink(missing_ok=True)


def _link(link: Path, target: Path) -> bool:
    try:
        _make_private(link.parent, ignored=True)
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)
            return True
    except (OSError, NotToBeHad):
        pass  # a file system that is read-only, or somebody else's directory: clients are told with --socket
    return False


def have_standard_streams() -> None:
    """Open what of 0, 1 and 2 is closed, so that no file or socket of ours becomes somebody's standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
