"""Real servers, each started by the tests themselves, in a directory of its own; and a proxy that is a bad network.

A server that is not installed skips the test with that reason; SUPERVISOR_TESTS_REQUIRE_SERVERS=1 makes that a failure.
Nothing outlives the tests: the kernel kills a server whose test process dies.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import trio

REQUIRED = os.environ.get("SUPERVISOR_TESTS_REQUIRE_SERVERS") == "1"
PATIENCE = 60.0


def missing(what: str) -> None:
    """What the tests need is not there: skip, or fail where it must be."""
    if REQUIRED:
        pytest.fail(f"{what}, and SUPERVISOR_TESTS_REQUIRE_SERVERS=1 says it must be", pytrace=False)
    pytest.skip(what)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server of our own. Start it in the main thread: it dies with the thread that started it.

    `start`, `kill` and `restart` block until it is ready, or gone. `stop` freezes it, as a machine that hangs; `cont` goes on.
    """

    READY: ClassVar[str]
    """It says so when it can be asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = "127.0.0.1"
        self.port = free_port()
        self.within: list[str] = []
        """What runs it elsewhere: in a network of its own, say, where it has this address."""
        self.log: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def url(self) -> str:
        """Where it is, for those in its network."""
        raise NotImplementedError

    def url_at(self, port: int) -> str:
        """The same, by another port: a proxy's."""
        raise NotImplementedError

    @property
    def near(self) -> str:
        """The same by its Unix socket, whatever its network."""
        raise NotImplementedError

    def move(self, within: list[str], address: str) -> None:
        """Run it elsewhere from now on."""
        self.kill()
        self.within, self.address = within, address
        self.start()

    def start(self) -> None:
        ready = threading.Event()
        words = [*self.within, "setpriv", "--pdeathsig", "KILL", *self.command()]
        self.process = subprocess.Popen(
            words, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self._read, args=(self.process, ready), daemon=True).start()
        if not ready.wait(PATIENCE) or self.process.poll() is not None:
            self.kill()
            pytest.fail(f"{words} did not start:\n{''.join(self.log[-20:])}", pytrace=False)

    def _read(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        with process.stdout as output:
            for line in output:
                self.log.append(line)
                if self.READY in line:
                    ready.set()
        ready.set()  # it has ended

    def pids(self) -> list[int]:
        """Its processes, the first one first."""
        if self.process is None or self.process.poll() is not None:
            return []
        return [self.process.pid, *_children(self.process.pid)]

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """`kill -9` of all its processes; returns when they are gone."""
        if self.process is None:
            return
        handles = []
        for pid in self.pids():
            with suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for handle in handles:
            select.select([handle], [], [], PATIENCE)
            os.close(handle)
        self.process = None

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kill it, and start it with the data that it has stored."""
        self.kill()
        self.start()


def _children(parent: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it is gone
            name, _, facts = stat.read_text().rpartition(")")
            if int(facts.split()[1]) == parent:
                yield int(name.split()[0])


class RedisServer(Server):
    """A redis-server that stores what it has acknowledged, as far as a `kill -9` is concerned."""

    READY = "Ready to accept connections"

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        return f"redis://{self.address}:{port}/0"

    @property
    def near(self) -> str:
        return f"redis+unix://{self.path}"

    @property
    def path(self) -> Path:
        """Its Unix socket."""
        return self.directory / "redis.sock"

    def command(self) -> list[str]:
        options = {
            "bind": self.address,
            "protected-mode": "no",
            "port": self.port,
            "unixsocket": self.path,
            "dir": self.directory,
            "appendonly": "yes",
            "appendfsync": "always",  # or what comes while it syncs is answered before it is written: a kill loses that
            "save": "",
            "enable-debug-command": "yes",
        }
        return ["redis-server", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


class PostgresServer(Server):
    """A PostgreSQL with `fsync` as it is by default, of the user postgres where we are root. Everybody may connect."""

    READY = "database system is ready to accept connections"

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        return f"postgresql://postgres@{self.address}:{port}/postgres"

    @property
    def near(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.directory}&port={self.port}"

    def command(self) -> list[str]:
        settings = {
            "port": self.port,
            "listen_addresses": self.address,
            "unix_socket_directories": self.directory,
            "recovery_init_sync_method": "syncfs",  # or each start after a kill syncs a thousand files one by one
        }
        words = (word for name, value in settings.items() for word in ("-c", f"{name}={value}"))
        return [*_AS_POSTGRES, str(postgres_program("postgres")), "-D", str(self.directory / "data"), *words]


_AS_POSTGRES = ["--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []


def postgres_program(name: str) -> Path:
    """A program of PostgreSQL, the newest that is installed; Debian has them beside the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which(name)
    if not found and not on_path:
        missing(f"PostgreSQL is not installed: no {name}")
    return found[-1] if found else Path(on_path)


@pytest.fixture(scope="session")
def database_files() -> Iterator[Path]:
    """The files of an empty database, which each server gets a copy of: `initdb` takes its time."""
    with _private("postgres") as directory:
        initdb = [
            postgres_program("initdb"),
            "--auth=trust",
            "--username=postgres",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        ]
        initdb.append("--wal-segsize=1")
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", *_AS_POSTGRES, *initdb, "-D", directory / "data"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        with (directory / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all trust\n")  # from another network of the tests, too
        yield directory / "data"


@pytest.fixture(scope="session")
def postgres(database_files: Path) -> Iterator[PostgresServer]:
    """One PostgreSQL for all: leave it running, and use names of your own."""
    with _postgres(database_files) as server:
        yield server


@pytest.fixture
def postgres_alone(database_files: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL for this test alone, to be killed and stopped."""
    with _postgres(database_files) as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """One Redis for all: leave it running, and use names of your own."""
    with _redis() as server:
        yield server


@pytest.fixture
def redis_alone() -> Iterator[RedisServer]:
    """A Redis for this test alone, to be killed and stopped."""
    with _redis() as server:
        yield server


@contextmanager
def _postgres(files: Path) -> Iterator[PostgresServer]:
    with _private("postgres") as directory:
        subprocess.run(["cp", "-a", files, directory / "data"], check=True)
        with _started(PostgresServer(directory)) as server:
            yield server


@contextmanager
def _redis() -> Iterator[RedisServer]:
    if not shutil.which("redis-server"):
        missing("redis-server is not installed")
    with _private("") as directory, _started(RedisServer(directory)) as server:
        yield server


@contextmanager
def _started(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def _private(user: str) -> Iterator[Path]:
    """A directory of this user's (where we are root), at a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="served-") as name:
        if user and os.geteuid() == 0:
            shutil.chown(name, user, user)
        yield Path(name)


class Proxy:
    """A way to a TCP server that can be bad. What is set holds for what passes from then on."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0
        """Seconds that each piece takes, each way."""
        self.refuses = False
        """Whether who connects is hung up on."""
        self.swallows = False
        """Whether what the server answers is lost: what was asked has happened, and nobody hears of it."""
        self.silent = False
        """Whether nothing passes, either way, and nobody is told: a cut cable."""
        self.garbles: int | None = None
        """Set to n: the n-th byte that the server sends from then on is flipped."""
        self._open: set[trio.abc.Stream] = set()

    async def cut(self) -> None:
        """Close all connections."""
        for stream in list(self._open):
            await trio.aclose_forcefully(stream)

    async def serve(self, client: trio.SocketStream) -> None:
        """Be in between for one connection."""
        if self.refuses:
            await trio.aclose_forcefully(client)
            return
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            await trio.aclose_forcefully(client)
            return
        self._open |= {client, server}
        try:
            async with client, server, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass, client, server, False)
                nursery.start_soon(self._pass, server, client, True)
        finally:
            self._open -= {client, server}

    async def _pass(self, source: trio.SocketStream, target: trio.SocketStream, answers: bool) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for piece in source:
                await trio.sleep(self.delay)
                if self.silent or (answers and self.swallows):
                    continue
                await target.send_all(self._garbled(piece) if answers else piece)
        for stream in (source, target):
            await trio.aclose_forcefully(stream)

    def _garbled(self, piece: bytes) -> bytes:
        if self.garbles is None:
            return piece
        at, self.garbles = self.garbles, self.garbles - len(piece)
        if at >= len(piece):
            return piece
        self.garbles = None
        return piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]


@asynccontextmanager
async def open_proxy(target: int) -> AsyncIterator[Proxy]:
    """A proxy to this port of ours, as long as the block lasts; connect to its `port`."""
    proxy = Proxy(target)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), proxy.serve, 0)
        proxy.port = listener.socket.getsockname()[1]
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel(reason="the test is over")
