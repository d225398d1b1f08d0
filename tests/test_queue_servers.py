"""Queues in servers that are set up as in earnest: TLS, a standby that takes over, a cluster, users with few rights."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from servers import (
    _AS_POSTGRES,
    PATIENCE,
    PostgresServer,
    RedisServer,
    _private,
    _started,
    free_port,
    missing,
    postgres_program,
)

from supervisor.queues import Place, scheme_of
from supervisor.queues.protocol import Draft, Ending, Engine, Item, QueueUnavailable, Settings, new_id
from supervisor.queues.spec import QueueSpec
from supervisor.wall import WallClock


def queue_at(url: str, name: str = "q", **spec: Any) -> AbstractAsyncContextManager[Engine]:
    place = Place(directory=Path("/"), now=WallClock().now, listen=lambda notice: None, warn=lambda text: None)
    return scheme_of(url).open(name, Settings(spec=QueueSpec(backend=url, **spec)), place)


def draft() -> Draft:
    return Draft(id=new_id(), payload=b"1")


async def claim_some(queue: Engine) -> list[Item]:
    while not (items := (await queue.claim(10, owner="tests", attempts=100)).items):
        await queue.wait_for_work()
    return list(items)


async def comes_through(url: str) -> None:
    """An item is put, heard of, claimed and done."""
    with trio.fail_after(PATIENCE):
        async with queue_at(url) as queue, queue_at(url) as other, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                (item,) = await claim_some(other)
                assert await other.finish([Ending(id=item.id, token=item.token, how="done")]) == [True]

            await queue.put([draft()])


# ---- TLS ----


def openssl(directory: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A directory: `ca.pem`, who has signed; `server.pem` and `server.key`, for 127.0.0.1; `other.pem`, who has not."""
    if not shutil.which("openssl"):
        missing("openssl is not installed")
    directory = tmp_path_factory.mktemp("tls")
    directory.chmod(0o755)
    for name in ("ca", "other"):
        words = ("-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}")
        openssl(directory, "req", *words, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1")
    openssl(
        directory, "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=server", "-keyout", "server.key", "-out", "server.csr"
    )
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl(directory, "x509", "-req", "-in", "server.csr", "-out", "server.pem", *signed)
    return directory


class RedisWithTls(RedisServer):
    """It speaks nothing else."""

    certificates: Path

    def command(self) -> list[str]:
        words = {
            "--port": "0",
            "--tls-port": str(self.port),
            "--tls-cert-file": str(self.certificates / "server.pem"),
            "--tls-key-file": str(self.certificates / "server.key"),
            "--tls-ca-cert-file": str(self.certificates / "ca.pem"),
            "--tls-auth-clients": "no",
        }
        return [*super().command(), *(word for pair in words.items() for word in pair)]


async def test_redis_over_tls(certificates):
    with _private("") as directory:
        server = RedisWithTls(directory)
        server.certificates = certificates
        with _started(server):
            url = f"rediss://127.0.0.1:{server.port}/0"
            await comes_through(f"{url}?ssl_ca_certs={certificates / 'ca.pem'}")
            for wrong in (url, f"{url}?ssl_ca_certs={certificates / 'other.pem'}"):
                async with queue_at(wrong) as queue:
                    with pytest.raises(QueueUnavailable, match=r"(?i)certificate verify failed"):
                        await queue.counts()
            async with queue_at(url.replace("rediss", "redis")) as queue:
                with pytest.raises(QueueUnavailable, match=f"127.0.0.1:{server.port}"):
                    await queue.counts()


class PostgresWithTls(PostgresServer):
    """It speaks nothing else."""

    def command(self) -> list[str]:
        rules = self.directory / "data" / "hba"
        words = ("ssl=on", "ssl_cert_file=server.pem", "ssl_key_file=server.key", f"hba_file={rules}")
        return [*super().command(), *(word for each in words for word in ("-c", each))]


async def test_postgresql_over_tls(certificates, database_files):
    with _private("postgres") as directory:
        data = directory / "data"
        subprocess.run(["cp", "-a", database_files, data], check=True)
        (data / "hba").write_text("hostssl all all all trust\nlocal all all trust\n")
        for name in ("server.pem", "server.key"):
            shutil.copy(certificates / name, data)
            (data / name).chmod(0o600)
            if _AS_POSTGRES:
                shutil.chown(data / name, "postgres", "postgres")
        with _started(PostgresWithTls(directory)) as server:
            url = f"{server.url}?sslmode=verify-full&sslrootcert="
            await comes_through(f"{url}{certificates / 'ca.pem'}")
            async with queue_at(f"{url}{certificates / 'other.pem'}") as queue:
                with pytest.raises(QueueUnavailable, match="certificate verify failed"):
                    await queue.counts()
            async with queue_at(f"{server.url}?sslmode=disable") as queue:
                with pytest.raises(QueueUnavailable, match="no encryption"):
                    await queue.counts()


# ---- a standby that takes over ----


@contextmanager
def standby_of(primary: PostgresServer) -> Iterator[PostgresServer]:
    with _private("postgres") as directory:
        copy = [str(postgres_program("pg_basebackup")), "-R", "-X", "stream", "-c", "fast", "-D", str(directory / "data")]
        where = ["-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres"]
        subprocess.run(["setpriv", "--pdeathsig", "KILL", *_AS_POSTGRES, *copy, *where], check=True, capture_output=True)
        standby = PostgresServer(directory)
        standby.READY = "ready to accept read-only connections"
        with _started(standby):
            yield standby


async def test_a_standby_takes_over(postgres_alone):
    subprocess.run(
        ["sh", "-c", f"echo 'host replication all all trust' >> {postgres_alone.directory}/data/pg_hba.conf"], check=True
    )
    postgres_alone.restart()
    with standby_of(postgres_alone) as standby:
        hosts = f"127.0.0.1:{standby.port},127.0.0.1:{postgres_alone.port}"
        url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
        async with queue_at(url) as queue, queue_at(standby.url) as only_there:
            await queue.put([draft(), draft()])
            (item, other) = await claim_some(queue)
            assert await queue.finish([Ending(id=other.id, token=other.token, how="retry")]) == [True]
            with pytest.raises(QueueUnavailable, match=r"read-only|standby"):
                await only_there.put([draft()])
            with trio.fail_after(PATIENCE):
                while not _knows(standby, other.id):
                    await trio.sleep(0.02)
                postgres_alone.kill()
                promote = [str(postgres_program("pg_ctl")), "promote", "-D", str(standby.directory / "data")]
                subprocess.run(["setpriv", *_AS_POSTGRES, *promote] if _AS_POSTGRES else promote, check=True)
                (again,) = await patiently(lambda: claim_some(queue))
                endings = [Ending(id=each.id, token=each.token, how="done") for each in (item, again)]
                assert await patiently(lambda: queue.finish(endings)) == [True, True]
                assert again.id == other.id and again.token > other.token


async def patiently(operation: Any) -> Any:
    while True:
        try:
            return await operation()
        except QueueUnavailable:
            await trio.sleep(0.05)


def _knows(server: PostgresServer, id: str) -> bool:
    import psycopg

    with psycopg.connect(server.url, autocommit=True) as db:
        there = db.execute("SELECT to_regclass('supervisor.items')").fetchone()
        if there == (None,):
            return False
        return db.execute("SELECT state FROM supervisor.items WHERE id = %s", [id]).fetchone() == ("waiting",)


# ---- a cluster ----


class RedisNode(RedisServer):
    """One of a cluster. The nodes speak to each other at a port that is 10 000 higher."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        while self.port > 55_535:
            self.port = free_port()

    def command(self) -> list[str]:
        return [*super().command(), "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]


def cli(server: RedisServer, *words: str) -> str:
    done = subprocess.run(["redis-cli", "-s", str(server.path), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


async def test_a_cluster(redis):
    """A queue is on one node; whichever is asked says which one that is."""
    if not shutil.which("redis-cli"):
        missing("redis-cli is not installed")
    with ExitStack() as stack:
        nodes = [stack.enter_context(_started(RedisNode(stack.enter_context(_private(""))))) for _ in range(3)]
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        subprocess.run(["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"], check=True, capture_output=True)
        with trio.fail_after(PATIENCE):
            while any("cluster_state:ok" not in cli(node, "CLUSTER", "INFO") for node in nodes):
                await trio.sleep(0.05)
        async with queue_at(nodes[0].url, "spread") as queue, queue_at(nodes[1].url, "spread") as other:
            mine = draft()
            await patiently(lambda: queue.put([mine]))
            (item,) = await patiently(lambda: claim_some(other))
            assert item.id == mine.id
            assert await patiently(lambda: other.finish([Ending(id=item.id, token=item.token, how="done")])) == [True]
        owners = [node for node in nodes if "supervisor:spread" in cli(node, "KEYS", "*")]
        assert len(owners) == 1


# ---- users that may not do everything ----


@pytest.mark.parametrize("lacks", ["-evalsha", "-subscribe", "-zadd", "-publish"])
async def test_a_user_that_may_not_do_all_that_is_needed_is_told_what(redis_alone, lacks):
    cli(redis_alone, "ACL", "SETUSER", "jobs", "on", ">s3cret", "~*", "&*", "+@all", lacks)
    async with queue_at(f"redis://jobs:s3cret@127.0.0.1:{redis_alone.port}") as queue:
        with pytest.raises(QueueUnavailable) as refused:
            await queue.put([draft()])
        assert cli(redis_alone, "KEYS", "*:items") == ""  # nothing is done by half
    assert lacks[1:] in str(refused.value).lower()
    assert "permission" in str(refused.value) or f"ACL SETUSER ... +{lacks[1:]}" in str(refused.value)
    assert "s3cret" not in str(refused.value)
