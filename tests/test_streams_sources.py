"""Where streams come from: real files, a real database, real WebSockets, real children."""

from __future__ import annotations

import base64
import hashlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import hypothesis
import pytest
import trio
import trio_websocket
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from supervisor.streams import Stream, files, lines, rows, watch_files, web, websocket
from supervisor.watching import Burst

MILLION = 1_000_000
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?) SELECT i, 'row ' || i FROM n"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


# -- rows -----------------------------------------------------------------------------------------------------------------


class Connection(sqlite3.Connection):
    """Keeps its last cursor, and counts what is fetched."""

    fetched = 0

    def cursor(self) -> sqlite3.Cursor:  # type: ignore[override]
        connection = self

        class Counting(sqlite3.Cursor):
            def fetchmany(self, size=1):
                found = super().fetchmany(size)
                connection.fetched += len(found)
                return found

        self.last = super().cursor(Counting)
        return self.last

    def last_is_closed(self) -> bool:
        try:
            self.last.execute("SELECT 1")
        except sqlite3.ProgrammingError as error:
            return "closed" in str(error)
        return False


@pytest.fixture
def database(tmp_path):
    connection = sqlite3.connect(tmp_path / "rows.db", check_same_thread=False, factory=Connection)
    yield connection
    connection.close()


@pytest.mark.limit(240)
async def test_a_million_rows_need_the_memory_of_a_batch(database):
    database.execute(f"CREATE TABLE numbers AS {NUMBERS.replace('?', str(MILLION))}")
    before, most, total = resident(), 0, 0
    async with rows(database, "SELECT * FROM numbers").open() as items:
        async for number, _ in items:
            total += number
            if not number % 50_000:
                most = max(most, resident())
    assert total == MILLION * (MILLION + 1) // 2
    assert most - before < 30_000_000, "a list of them takes more than a hundred"
    assert database.last_is_closed()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_rows_take_parameters_and_come_in_order(database):
    assert await rows(database, NUMBERS, (5,), batch=2).collect() == [(n, f"row {n}") for n in range(1, 6)]
    assert await rows(database, "SELECT :a, :b", {"a": 1, "b": 2}).collect() == [(1, 2)]
    assert await rows(database, "SELECT 1 WHERE 0").collect() == []
    with pytest.raises(ValueError, match="a batch of at least 1, got 0"):
        rows(database, "SELECT 1", batch=0)


async def test_a_slow_consumer_holds_the_database_and_leaving_closes_the_cursor(database):
    async with rows(database, NUMBERS, (MILLION,), batch=10).open() as items:
        for taken in range(1, 31):
            await anext(items)
            assert database.fetched == (taken + 9) // 10 * 10
        database.execute("CREATE TABLE mine (i)")  # between batches nobody else uses it
    assert database.last_is_closed()
    assert database.execute("SELECT count(*) FROM mine").fetchone() == (0,)


async def test_an_error_of_the_database_comes_out_as_it_is_and_closes_the_cursor(database):
    with pytest.raises(sqlite3.OperationalError, match="no such table: absent"):
        await rows(database, "SELECT * FROM absent").collect()
    assert database.last_is_closed()
    with pytest.raises(sqlite3.OperationalError, match="malformed JSON"):
        await rows(database, "SELECT json(value) FROM (SELECT '1' AS value UNION ALL SELECT '{')", batch=1).collect()
    assert database.last_is_closed()


@pytest.mark.parametrize("seconds", [0, 0.001, 0.1])
async def test_cancelled_a_query_is_interrupted(database, seconds):
    """It would never end: cancelled in its thread, or just before it gets there."""
    with trio.move_on_after(seconds) as scope:
        await rows(database, ENDLESS).collect()
    assert scope.cancelled_caught
    assert database.execute("SELECT 1").fetchone() == (1,), "nobody uses it any more"
    if hasattr(database, "last"):
        assert database.last_is_closed()


async def test_without_interrupt_the_thread_is_waited_for(database):
    begun, go_on = threading.Event(), threading.Event()

    class Plain:
        """A connection of a driver that cannot interrupt."""

        def cursor(self):
            return database.cursor()

    def hold() -> int:
        begun.set()
        assert go_on.wait(60)
        return 1

    database.create_function("hold", 0, hold)
    ended = False

    async def read(scope: trio.CancelScope) -> None:
        nonlocal ended
        with scope:
            await rows(Plain(), "SELECT hold()").collect()
        ended = True

    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, scope)
        await trio.to_thread.run_sync(begun.wait)
        scope.cancel(reason="the test wants to know")
        await wait_all_tasks_blocked(0.05)
        assert not ended
        go_on.set()
    assert scope.cancelled_caught
    assert database.last_is_closed()


async def test_rows_leave_the_threads_of_others_alone(database):
    limiter = trio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    try:
        await limiter.acquire_on_behalf_of("somebody who has the only one")
        assert len(await rows(database, NUMBERS, (10,)).collect()) == 10
        limiter.release_on_behalf_of("somebody who has the only one")
    finally:
        limiter.total_tokens = before


# -- lines ----------------------------------------------------------------------------------------------------------------


class Chunks(trio.abc.ReceiveStream):
    """Bytes that come in these pieces."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self.closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.chunks.pop(0) if self.chunks else b""

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


@given(st.lists(st.text(st.sampled_from("aé\n\r \t"), min_size=1), max_size=12), st.integers(1, 5))
@hypothesis.settings(max_examples=150)
def test_lines_are_whole_however_the_bytes_come(texts, size):
    data = "".join(texts).encode()
    expected = [line.removesuffix("\r") for line in data.decode().split("\n")]
    if not data or data.endswith(b"\n"):
        expected.pop()

    async def main() -> None:
        source = Chunks([data[at : at + size] for at in range(0, len(data), size)])
        assert await lines(source).collect() == expected
        assert source.closed

    trio.run(main)


async def test_lines_of_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes("first\r\nsécond\n\nlast".encode())
    assert await lines(file).collect() == ["first", "sécond", "", "last"]
    assert await lines(str(file)).collect() == ["first", "sécond", "", "last"]
    file.write_bytes(b"")
    assert await lines(file).collect() == []
    file.write_bytes("é\n".encode("latin-1"))
    assert await lines(file, encoding="latin-1").collect() == ["é"]
    assert await lines(file, errors="replace").collect() == ["\N{REPLACEMENT CHARACTER}"]
    with pytest.raises(UnicodeDecodeError):
        await lines(file).collect()
    with pytest.raises(FileNotFoundError):
        await lines(tmp_path / "nothing").collect()


async def test_a_large_file_is_read_as_far_as_it_is_asked_for_and_closed(tmp_path):
    file, before = tmp_path / "file", open_files()
    file.write_text("".join(f"line {number}\n" for number in range(200_000)))
    async with lines(file).open() as items:
        assert await anext(items) == "line 0"
        (at,) = [position(number) for number, target in open_files().items() if target == str(file)]
        assert at == 1 << 16
    assert open_files() == before
    assert await lines(file).fold(0, lambda count, line: count + 1) == 200_000


def open_files() -> dict[str, str]:
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[link.name] = os.readlink(link)
        except OSError:
            pass  # the descriptor of this listing
    return found


def position(descriptor: str) -> int:
    return int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split()[1])


async def test_a_line_that_does_not_end_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"short\n" + b"x" * 11 + b"\n")
    assert [len(line) for line in await lines(file, longest=11).collect()] == [5, 11]
    with pytest.raises(ValueError, match="line 2 is longer than 10 bytes: give a larger `longest`"):
        await lines(file, longest=10).collect()
    source = Chunks([b"x" * 6] * 1000)
    with pytest.raises(ValueError, match="line 1 is longer than 10 bytes"):
        await lines(source, longest=10).collect()
    assert len(source.chunks) == 998


async def test_lines_of_a_child_that_ends_when_the_stream_is_left():
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, ["yes", "and no"], stdout=subprocess.PIPE, check=False)
            child = await nursery.start(run)
            assert await lines(child.stdout).take(3).collect() == ["and no"] * 3
            assert await child.wait() == -signal.SIGPIPE


async def test_lines_of_a_child_to_its_end():
    code = "print('one'); print('two', end='')"
    async with trio.open_nursery() as nursery:
        child = await nursery.start(partial(trio.run_process, [sys.executable, "-c", code], stdout=subprocess.PIPE))
        assert await lines(child.stdout).collect() == ["one", "two"]


# -- watched files --------------------------------------------------------------------------------------------------------


async def test_what_changes_is_told_by_path_once_however_often(tmp_path):
    before = open_files()
    with trio.fail_after(60):
        async with watch_files([f"{tmp_path}/*.py", f"{tmp_path}/*.toml"]).open() as paths:
            for _ in range(3):
                (tmp_path / "a.py").write_text("new")
            (tmp_path / "b.txt").write_text("new")
            assert await anext(paths) == str(tmp_path / "a.py")
            (tmp_path / "c.toml").write_text("new")
            assert await anext(paths) == str(tmp_path / "c.toml")
            (tmp_path / "a.py").unlink()
            assert await anext(paths) == str(tmp_path / "a.py")
    assert open_files() == before


async def test_globs_are_relative_to_the_directory_of_the_program_whatever_its_name(tmp_path, monkeypatch):
    place = tmp_path / "a [b] *"
    (place / "below").mkdir(parents=True)
    monkeypatch.chdir(place)
    with trio.fail_after(60):
        async with watch_files("**/*.py").open() as paths:
            (place / "below" / "x.py").write_text("new")
            assert await anext(paths) == str(place / "below" / "x.py")


async def test_a_slow_consumer_hears_of_each_file_once(tmp_path):
    with trio.fail_after(60):
        async with watch_files(globs=f"{tmp_path}/*").open() as paths:
            (tmp_path / "first").write_text("new")
            assert await anext(paths) == str(tmp_path / "first")
            for _ in range(2):
                for name in ("a", "b"):
                    (tmp_path / name).write_text("new")
                await trio.sleep(0.7)  # longer than the silence: two bursts
            (tmp_path / "last").write_text("new")
            found = [await anext(paths)]
            while found[-1] != str(tmp_path / "last"):
                found.append(await anext(paths))
    # the first that was found had left for the consumer when the second burst came
    assert set(found) == {str(tmp_path / name) for name in ("a", "b", "last")}
    assert len(found) <= 4


async def test_what_changes_while_it_waits_to_be_told_is_told_again():
    def changed(*paths: str) -> None:
        burst = Burst(trio.current_time())
        for path in paths:
            burst.add(path, trio.current_time())
        changes._take("", burst)

    changes = files._Changes(("/x/*",))
    send, receive = trio.open_memory_channel[str](0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(changes._tell, send)
        changed("/x/a", "/x/b")
        await wait_all_tasks_blocked()  # a is on its way
        changed("/x/a", "/x/b")
        assert [await receive.receive() for _ in range(3)] == ["/x/a", "/x/b", "/x/a"]
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):
            receive.receive_nowait()
        nursery.cancel_scope.cancel(reason="the test is over")


async def test_where_the_kernel_has_lost_count_the_directory_is_told(tmp_path):
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip("this machine keeps more events than a test should make")
    with trio.fail_after(60):
        async with watch_files(f"{tmp_path}/*.py").open() as paths:
            for _ in range(most // 3 + 100):
                (tmp_path / "a.tmp").write_text("new")
                (tmp_path / "a.tmp").unlink()
            assert await anext(paths) == str(tmp_path)


async def test_what_cannot_be_watched_is_an_error_not_a_silence(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="no file can be watched"):
            await watch_files(f"{tmp_path}/*").collect()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# -- WebSockets -----------------------------------------------------------------------------------------------------------


class Server:
    """A real server; `talk(connection)` is what it does with each connection."""

    def __init__(self, talk) -> None:
        self._talk = talk
        self.closed: trio_websocket.CloseReason | None = None
        self.headers: dict[bytes, bytes] = {}
        self.gone = trio.Event()

    async def __aenter__(self) -> Server:
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        serve = partial(trio_websocket.serve_websocket, self._serve, "127.0.0.1", 0, ssl_context=None)
        listening = await self._nursery.start(serve)
        self.url = f"ws://127.0.0.1:{listening.port}/feed?token=secret"
        return self

    async def __aexit__(self, *exc) -> None:
        self._nursery.cancel_scope.cancel(reason="the test is over")
        await self._manager.__aexit__(*exc)

    async def _serve(self, request: trio_websocket.WebSocketRequest) -> None:
        self.headers = dict(request.headers)
        connection = await request.accept()
        try:
            await self._talk(connection)
        except trio_websocket.ConnectionClosed as error:
            self.closed = error.reason
        finally:
            self.gone.set()


async def say_three(connection) -> None:
    for message in ("one", b"two", "three"):
        await connection.send_message(message)


async def go_on_for_ever(connection) -> None:
    while True:
        await connection.send_message("more")


async def test_messages_come_until_the_server_closes():
    with trio.fail_after(60):
        async with Server(say_three) as server:
            stream = websocket(server.url, headers={"Authorization": "Bearer me"})
            assert await stream.collect() == ["one", b"two", "three"]
            assert (b"authorization", b"Bearer me") in server.headers.items()


async def test_leaving_tells_the_server_at_once():
    with trio.fail_after(60):
        async with Server(go_on_for_ever) as server:
            assert await websocket(server.url).take(2).collect() == ["more", "more"]
            await server.gone.wait()
            assert server.closed is not None
            assert server.closed.code == 1000


async def test_cancelled_it_leaves_too():
    with trio.fail_after(60):
        async with Server(lambda connection: connection.get_message()) as server:
            with trio.move_on_after(0.1) as scope:
                await websocket(server.url).collect()
            assert scope.cancelled_caught
            await server.gone.wait()


async def test_an_error_of_the_block_comes_out_as_it_is():
    with trio.fail_after(60):
        async with Server(go_on_for_ever) as server:
            with pytest.raises(LookupError, match="mine"):
                async with websocket(server.url).open() as messages:
                    await anext(messages)
                    raise LookupError("mine")


async def break_off(connection) -> None:
    await connection.send_message("one")
    await connection._stream.aclose()


async def fail(connection) -> None:
    await connection.send_message("one")
    await connection.aclose(1011, "out of order")


@pytest.mark.parametrize(("talk", "told"), [(break_off, "ABNORMAL_CLOSURE"), (fail, "out of order")])
async def test_a_connection_that_breaks_is_an_error_after_what_came_before_it(talk, told):
    seen = []
    with trio.fail_after(60):
        async with Server(talk) as server:
            with pytest.raises(ConnectionError, match=r"the connection to ws://127.0.0.1:\d+/feed broke:") as caught:
                async with websocket(server.url).open() as messages:
                    async for message in messages:
                        seen.append(message)
    assert seen == ["one"]
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_no_server_is_an_error_that_names_it():
    with trio.socket.socket() as free:
        await free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with trio.fail_after(60), pytest.raises(ConnectionError, match=rf"no connection to ws://127.0.0.1:{port}/x: .*"):
            await websocket(f"ws://me:secret@127.0.0.1:{port}/x").collect()


async def test_a_server_that_refuses_is_an_error_that_says_so():
    async def refuse(request: trio_websocket.WebSocketRequest) -> None:
        await request.reject(403)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            serve = partial(trio_websocket.serve_websocket, refuse, "127.0.0.1", 0, ssl_context=None)
            listening = await nursery.start(serve)
            with pytest.raises(ConnectionError, match="the server answered with status 403"):
                await websocket(f"ws://127.0.0.1:{listening.port}").collect()
            nursery.cancel_scope.cancel(reason="the test is over")


async def test_a_server_that_says_nothing_is_an_error_after_a_minute(autojump_clock):
    listener, dialled = trio.testing.memory_stream_pair()
    opener = web._shaken_hands(trio_websocket, dialled, urlsplit("ws://nobody/x"), {})
    with pytest.raises(ConnectionError, match="no connection to ws://nobody/x: no answer within 60 s"):
        async with opener:
            raise AssertionError("there is no connection")
    assert trio.current_time() == 60.0
    assert b"GET /x HTTP/1.1" in await listener.receive_some()


@pytest.mark.parametrize("address", ["http://me:secret@example.org/feed", "example.org", "ws://"])
def test_what_is_no_address_is_refused_at_once(address):
    with pytest.raises(
        ValueError, match=r"expected the address of a WebSocket such as wss://example.org/feed, got '"
    ) as caught:
        websocket(address)
    assert "secret" not in str(caught.value)


async def test_a_slow_consumer_holds_the_server():
    sent = 0

    async def flood(connection) -> None:
        nonlocal sent
        while True:
            await connection.send_message(b"x" * (1 << 19))
            sent += 1

    with trio.fail_after(60):
        async with Server(flood) as server, websocket(server.url).open() as messages:
            await anext(messages)
            await wait_all_tasks_blocked(0.3)
            held = sent
            await wait_all_tasks_blocked(0.3)
            assert sent == held < 100
            for _ in range(held + 3):
                await anext(messages)
            assert sent > held


async def test_a_server_that_does_not_answer_is_left_all_the_same():
    gone = trio.Event()

    async def never_answer(stream: trio.SocketStream) -> None:
        request = bytes(await stream.receive_some())
        key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
        await stream.send_all(head + accept + b"\r\n\r\n" + b"\x81\x02hi")
        while await stream.receive_some():
            pass
        gone.set()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, never_answer, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            assert await websocket(f"ws://127.0.0.1:{port}").take(1).collect() == ["hi"]
            await gone.wait()
            nursery.cancel_scope.cancel(reason="the test is over")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trio_websocket", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trio-supervisor\[websocket\]'"):
        websocket("ws://localhost")


def test_streams_load_no_websocket_library_unless_it_is_used():
    code = "import sys, supervisor.streams; assert not {'trio_websocket', 'wsproto', 'sqlite3'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


async def test_sources_can_be_combined(tmp_path, database):
    file = tmp_path / "file"
    file.write_text("a\nb\nc\n")
    found = await lines(file).merge(rows(database, NUMBERS, (3,)).map(str), Stream.interval(0.01).take(2).map(str)).collect()
    assert len(found) == 8
