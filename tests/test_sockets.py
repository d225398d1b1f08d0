"""Listening sockets: opened once, kept over restarts, shared; and what happens where they cannot be had."""

import os
import pwd
import socket
import stat
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from house import House, open_house

from supervisor.errors import SpawnFailed
from supervisor.probes import Ready
from supervisor.sockets import SocketSpec, open_sockets
from supervisor.spec import FileMode, Limit

SERVE = """
import os, socket, sys
fds = int(os.environ["LISTEN_FDS"])
assert int(os.environ["LISTEN_PID"]) == os.getpid()
names = os.environ["LISTEN_FDNAMES"].split(":")
listener = socket.socket(fileno=3 + names.index(sys.argv[1]))
assert os.get_blocking(listener.fileno())
print("up", fds, *names, *sorted(os.listdir("/proc/self/fd"), key=int)[:-1], flush=True)
while True:
    connection, _ = listener.accept()
    connection.sendall(sys.argv[2].encode())
    connection.close()
"""
TCP = {"web": SocketSpec(listen="127.0.0.1:0")}


def serve(word: str, name: str = "web") -> tuple[str, ...]:
    return (sys.executable, "-c", SERVE, name, word)


@asynccontextmanager
async def serving(house: House, word: str, **spec):
    """A child that answers with `word` on its socket."""
    spec.setdefault("sockets", ("web",))
    life = house.start(command=serve(word), ready=Ready(log="up"), **spec)
    await life.ready()
    yield life
    await life.stop()


async def port_of(house: House, name: str = "web") -> int:
    descriptor = os.dup(await house.resources.sockets.descriptor(name))
    with socket.socket(fileno=descriptor) as listener:
        return listener.getsockname()[1]


async def answer(address: int | str) -> bytes:
    stream = await (trio.open_tcp_stream("127.0.0.1", address) if isinstance(address, int) else trio.open_unix_socket(address))
    async with stream:
        return await stream.receive_some()


async def test_a_child_is_handed_its_sockets_and_nothing_else(tmp_path):
    specs = {**TCP, "other": SocketSpec(listen=f"{tmp_path}/s"), "third": SocketSpec(listen="127.0.0.1:0")}
    async with open_house(tmp_path / "logs", specs) as house:
        async with serving(house, "hello", sockets=("other", "web")):
            assert house.log().split() == b"up 2 other web 0 1 2 3 4".split()
            assert await answer(await port_of(house)) == b"hello"


async def test_it_outlives_restarts_and_no_connection_is_refused(tmp_path):
    async with open_house(tmp_path / "logs", TCP) as house:
        port = await port_of(house)
        async with serving(house, "first"):
            assert await answer(port) == b"first"
        async with await trio.open_tcp_stream("127.0.0.1", port) as waiting, serving(house, "second"):
            assert await waiting.receive_some() == b"second"


async def test_several_share_one(tmp_path):
    async with open_house(tmp_path / "logs", TCP) as house:
        port = await port_of(house)
        async with serving(house, "same"), serving(house, "same"):
            assert {await answer(port) for _ in range(10)} == {b"same"}
        fds = len(os.listdir("/proc/self/fd"))
        async with serving(house, "same"):
            pass
        assert len(os.listdir("/proc/self/fd")) == fds


async def test_it_is_blocking_at_each_start_unless_another_run_relies_on_what_it_made_of_it(tmp_path):
    turn = "import os, socket; s = socket.socket(fileno=3); print(os.get_blocking(3)); s.setblocking(False)"
    async with open_house(tmp_path / "logs", TCP) as house:
        for _ in range(2):
            await house.finish(command=(sys.executable, "-c", turn), sockets=("web",))
        life = house.start(
            command=(sys.executable, "-c", f"{turn}; print('up', flush=True); import time; time.sleep(100)"),
            sockets=("web",),
            ready=Ready(log="up"),
        )
        await life.ready()
        await house.finish(command=(sys.executable, "-c", turn), sockets=("web",))
        await life.stop()
        assert house.log().split() == b"True True True up False".split()


async def test_together_with_everything_else_that_needs_a_launcher(tmp_path):
    async with open_house(tmp_path / "logs", TCP) as house:
        spec = {"tty": True, "umask": 0o077, "rlimits": {"core": Limit((0, 0))}, "no_new_privileges": True}
        async with serving(house, "hello", **spec):
            assert house.log().split() == b"up 1 web 0 1 2 3".split()
            assert await answer(await port_of(house)) == b"hello"


async def test_a_path_appears_with_its_mode_and_goes_with_the_daemon(tmp_path):
    path = tmp_path / "made" / "web.sock"
    specs = {"web": SocketSpec(listen=str(path), mode=FileMode(0o620))}
    async with open_house(tmp_path / "logs", specs) as house:
        await trio.testing.wait_all_tasks_blocked()
        assert stat.S_IMODE(path.stat().st_mode) == 0o620
        async with serving(house, "hello"):
            assert await answer(str(path)) == b"hello"
        assert path.exists()
    assert os.listdir(path.parent) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_a_path_belongs_to_whom_it_shall(tmp_path):
    path = tmp_path / "web.sock"
    async with open_sockets({"web": SocketSpec(listen=str(path), user="nobody", group="tty")}) as sockets:
        await sockets.descriptor("web")
        assert (path.owner(), path.group()) == ("nobody", "tty")
    async with open_sockets({"web": SocketSpec(listen=str(path), user="nobdy")}) as sockets:
        with pytest.raises(SpawnFailed, match='socket web: no user "nobdy"; did you mean "nobody"'):
            await sockets.descriptor("web")
    assert pwd.getpwnam("nobody")


async def test_what_lies_at_the_path_at_the_end_is_removed_only_if_it_is_ours(tmp_path):
    path = tmp_path / "web.sock"
    async with open_sockets({"web": SocketSpec(listen=str(path))}) as sockets:
        await sockets.descriptor("web")
        path.unlink()
        path.write_text("theirs")
    assert path.read_text() == "theirs"


async def test_a_stale_path_is_replaced_and_a_served_one_is_not(tmp_path):
    path = tmp_path / "web.sock"
    spec = {"web": SocketSpec(listen=str(path))}
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        async with open_sockets(spec) as sockets:
            with pytest.raises(SpawnFailed) as caught:
                await sockets.descriptor("web")
            assert str(caught.value) == (
                f"socket web: {path} is taken by pid {os.getpid()} ({Path('/proc/self/comm').read_text().strip()}): "
                "free it, or let the socket listen elsewhere"
            )
    assert path.exists()
    async with open_sockets(spec) as sockets:
        assert await sockets.descriptor("web")


async def test_a_file_in_the_way_is_not_touched(tmp_path):
    path = tmp_path / "web.sock"
    path.write_text("precious")
    async with open_sockets({"web": SocketSpec(listen=str(path))}) as sockets:
        with pytest.raises(SpawnFailed, match=r"web\.sock: there is something that is not a socket: free it"):
            await sockets.descriptor("web")
    assert path.read_text() == "precious"


async def test_a_port_that_is_taken_fails_who_needs_it_and_is_tried_again(tmp_path):
    with socket.socket() as theirs:
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        port = theirs.getsockname()[1]
        async with open_house(tmp_path / "logs", {"web": SocketSpec(listen=f"127.0.0.1:{port}")}) as house:
            with pytest.raises(SpawnFailed) as caught:
                await house.finish(command=serve("hello"), sockets=("web",))
            assert str(caught.value) == (
                f"socket web: 127.0.0.1:{port} is taken by pid {os.getpid()} ({Path('/proc/self/comm').read_text().strip()}): "
                "free it, or let the socket listen elsewhere"
            )
            assert not (await house.finish(command=("true",))).failed
            theirs.close()
            async with serving(house, "hello"):
                assert await answer(port) == b"hello"


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("192.0.2.1:80", "socket web: 192.0.2.1:80: this machine has no such address"),
        ("no.such.host.invalid:80", "socket web: no address for no.such.host.invalid:80: "),
        ("/proc/no/web.sock", "socket web: /proc/no/web.sock: no such file or directory"),
    ],
)
async def test_why_it_cannot_be_had_is_said(listen, reason):
    async with open_sockets({"web": SocketSpec(listen=listen)}) as sockets:
        with pytest.raises(SpawnFailed) as caught:
            await sockets.descriptor("web")
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("listen", "family", "host"),
    [
        ("*:0", socket.AF_INET6, "::"),
        ("[::1]:0", socket.AF_INET6, "::1"),
        (":0", socket.AF_INET6, "::"),
        ("localhost:0", socket.AF_INET, "127.0.0.1"),
    ],
)
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_where_it_listens(listen, family, host):
    async with open_sockets({"web": SocketSpec(listen=listen, backlog=3)}) as sockets:
        with socket.socket(fileno=os.dup(await sockets.descriptor("web"))) as listener:
            assert (listener.family, listener.getsockname()[0]) == (family, host)
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
            assert not listener.get_inheritable()
            if host == "::":
                async with await trio.open_tcp_stream("127.0.0.1", listener.getsockname()[1]):
                    pass


async def test_a_reload_opens_closes_tunes_and_moves(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    async with open_sockets({**TCP, "a": SocketSpec(listen=str(old)), "gone": SocketSpec(listen="127.0.0.1:0")}) as sockets:
        await sockets.descriptor("a")
        web, first = await sockets.descriptor("web"), os.fstat(await sockets.descriptor("web")).st_ino
        sockets.apply({**TCP, "a": SocketSpec(listen=str(old), mode=FileMode(0o600)), "b": SocketSpec(listen=str(new))})
        await trio.testing.wait_all_tasks_blocked()
        assert (await sockets.descriptor("web"), os.fstat(web).st_ino) == (web, first)
        assert stat.S_IMODE(old.stat().st_mode) == 0o600
        assert new.exists()  # though nobody has asked for it
        with pytest.raises(SpawnFailed, match="socket gone: not in the file any more"):
            await sockets.descriptor("gone")
        sockets.apply({**TCP, "a": SocketSpec(listen=str(new) + "er")})
        assert not old.exists() and not new.exists()
        await sockets.descriptor("a")
        assert (tmp_path / "newer").exists()


async def test_one_that_is_open_already_is_used_and_closed():
    with socket.create_server(("127.0.0.1", 0)) as given:
        port = given.getsockname()[1]
        async with open_sockets({"web": SocketSpec(listen="*:1")}, {"web": given, "unknown": given}) as sockets:
            with socket.socket(fileno=os.dup(await sockets.descriptor("web"))) as listener:
                assert listener.getsockname()[1] == port
        assert given.fileno() == -1
