"""The questions of probes, put to real servers, sockets, commands and threads."""
# ruff: noqa: E501 - the answers are long, and stand here as they are read

from __future__ import annotations

import os
import resource
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from supervisor.children import Child, Launch, open_children
from supervisor.probes import questions
from supervisor.probes.judgement import Verdict
from supervisor.probes.questions import put


async def ask(question, timeout: float = 30.0) -> str:
    """The answer in one line: who is asked is called `it`."""
    answer = await put("it", question, timeout)
    return f"{answer.verdict.value}{' ' if answer.reason else ''}{answer.reason}"


@asynccontextmanager
async def server(answer):
    """A TCP server on loopback; `answer(stream)` is one connection. Gives its port."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, _fenced(answer), 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel(reason="the test is over")


def _fenced(answer):
    async def handle(stream):
        async with stream:
            try:
                await answer(stream)
            except trio.BrokenResourceError:
                pass

    return handle


def saying(*parts: bytes, heard: list | None = None):
    """A server that reads a request, says this, and waits until its peer has gone."""

    async def answer(stream):
        request = await stream.receive_some(1 << 16)
        if heard is not None:
            heard.append(bytes(request))
        for part in parts:
            await stream.send_all(part)
            await trio.sleep(0)
        await stream.receive_some(1)

    return answer


@contextmanager
def free_port():
    """A port where nobody listens, kept for as long."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def no_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) - 1, limits[1]))
    try:
        spare = []
        while True:
            try:
                spare.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in spare:
            os.close(fd)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in set(os.listdir("/proc/self/fd")) - before
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    assert not {fd: what for fd, what in left.items() if not what.startswith("/proc")}


# ---- tcp and unix ----


async def test_a_tcp_port_that_accepts_is_healthy():
    async with server(saying()) as port:
        assert await ask(partial(questions.tcp, f"127.0.0.1:{port}")) == "healthy"
        assert await ask(partial(questions.tcp, f"localhost:{port}")) == "healthy"


async def test_a_tcp_port_where_nobody_listens_refuses():
    with free_port() as port:
        assert await ask(partial(questions.tcp, f"127.0.0.1:{port}")) == "unhealthy it: connection refused"


async def test_a_host_that_has_no_address_is_no_yes():
    answer = await put("it", partial(questions.tcp, "no-such-host.invalid:80"), 30)
    assert answer.verdict is Verdict.UNHEALTHY
    assert "resolution" in answer.reason or "not known" in answer.reason


@pytest.mark.parametrize(("address", "parts"), [("[::1]:80", ("::1", 80)), ("a.b:1", ("a.b", 1))])
def test_an_address_is_split(address, parts):
    assert questions.split_address(address) == parts


async def test_a_tcp_target_that_never_answers_is_no_answer():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener, socket.socket() as one, socket.socket() as two:
        for filler in (one, two):  # its queue is full: the kernel drops what comes, and says nothing
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        fillers = []
        try:
            for _ in range(8):
                fillers.append(filler := socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            port = listener.getsockname()[1]
            assert await ask(partial(questions.tcp, f"127.0.0.1:{port}"), 0.2) == "no answer it: no answer within 0.2 s"
        finally:
            for filler in fillers:
                filler.close()


async def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "s")
    assert await ask(partial(questions.unix, path)) == "unhealthy it: no such file or directory"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert await ask(partial(questions.unix, path)) == "unhealthy it: connection refused"
        listener.listen(0)
        assert await ask(partial(questions.unix, path)) == "healthy"
        accepted, _ = listener.accept()
        accepted.close()
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(path)
            assert await ask(partial(questions.unix, path)) == "no answer it: it accepts no connections: its queue is full"
    (tmp_path / "file").touch()
    assert await ask(partial(questions.unix, str(tmp_path / "file"))) == "unhealthy it: connection refused"


# ---- http ----

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def test_an_http_answer_with_the_status_is_healthy_and_the_request_is_plain():
    heard = []
    async with server(saying(OK, heard=heard)) as port:
        assert await ask(questions.http(f"http://127.0.0.1:{port}/health?deep=1", 200)) == "healthy"
        assert await ask(questions.http(f"http://127.0.0.1:{port}", 200)) == "healthy"
    assert (
        heard[0]
        == (
            f"GET /health?deep=1 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: trio-supervisor\r\nAccept: */*\r\n"
            "Connection: close\r\n\r\n"
        ).encode()
    )
    assert heard[1].startswith(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((b"HTTP/1.1 503 Busy\r\n\r\n",), "unhealthy it: HTTP 503, expected 200"),
        ((b"HTTP/1.1 302 Found\r\nLocation: /ok\r\n\r\n",), "unhealthy it: HTTP 302, expected 200"),
        ((b"HTTP/1.0 200\r\n\r\n",), "healthy"),
        ((b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\nHTTP/1.1 2", b"00 OK\r\n\r\n"), "healthy"),
        ([bytes([byte]) for byte in OK], "healthy"),
        ((b"SSH-2.0-OpenSSH\r\n\r\n",), "unhealthy it: its answer is no HTTP"),
        ((b"HTTP/1.1 twohundred\r\n\r\n",), "unhealthy it: its answer is no HTTP"),
        ((b"\0\xff" * 20000,), "unhealthy it: its answer has a head of more than 16384 bytes, or is no HTTP"),
        ((b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20000 + b"\r\n\r\n",), "unhealthy it: its answer has a head of more than 16384 bytes, or is no HTTP"),
        ((b"HTTP/1.1 200 OK\r\nX: ",), "no answer it: no answer within 0.3 s"),
        ((), "no answer it: no answer within 0.3 s"),
    ],
)  # fmt: skip
async def test_what_an_http_server_may_say(parts, said):
    async with server(saying(*parts)) as port:
        assert await ask(questions.http(f"http://127.0.0.1:{port}/", 200), 0.3 if "no answer" in said else 30) == said


async def test_an_endless_answer_is_not_waited_for():
    async def endless(stream):
        await stream.receive_some(1 << 16)
        await stream.send_all(b"HTTP/1.1 204 No\r\n\r\n")
        while True:
            await stream.send_all(b"x" * 1000)

    async with server(endless) as port:
        assert await ask(questions.http(f"http://127.0.0.1:{port}/", 204)) == "healthy"


async def test_a_server_that_hangs_up_is_no_yes():
    async def hang_up(stream):
        await stream.receive_some(1 << 16)

    async with server(hang_up) as port:
        assert (
            await ask(questions.http(f"http://127.0.0.1:{port}/", 200))
            == "unhealthy it: it closed the connection without an answer"
        )
    with free_port() as port:
        assert await ask(questions.http(f"http://127.0.0.1:{port}/", 200)) == "unhealthy it: connection refused"


async def test_https_wants_a_certificate_that_is_accepted(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def speak(stream):
        await saying(OK)(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    async with server(speak) as port:
        question = questions.http(f"https://localhost:{port}/", 200)
        assert await ask(question) == "unhealthy it: its certificate is not accepted: self-signed certificate"
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        assert await ask(questions.http(f"https://localhost:{port}/", 200)) == "healthy"
        assert "certificate is not accepted" in await ask(questions.http(f"https://127.0.0.1:{port}/", 200))
    async with server(saying(OK)) as port:
        assert (await ask(questions.http(f"https://127.0.0.1:{port}/", 200))).startswith("unhealthy it: ")


# ---- exec ----


@asynccontextmanager
async def commands():
    """Gives `question(*argv)`; nothing of the commands must be alive at the end."""
    async with open_children("probes-under-test") as children:
        spawned: list[Child] = []

        def question(*argv: str):
            async def spawn(output: int) -> Child:
                spawned.append(
                    child := await children.spawn(Launch(argv, env=dict(os.environ), stdout=output, stderr=output, run="a#1"))
                )
                return child

            return questions.command(spawn, lambda pids: pytest.fail(f"stuck: {pids}"), trio.Event())

        yield question
        assert not any(Path(f"/proc/{child.pid}").exists() for child in spawned)
        assert not children.adopted()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo fine", "healthy"),
        ("echo 'no disk'; echo more; exit 1", "unhealthy it: no disk"),
        ("echo 'no disk' >&2; exit 1", "unhealthy it: no disk"),
        ("exit 7", "unhealthy it: exited with code 7"),
        ("kill -9 $$", "unhealthy it: killed by SIGKILL"),
        ("printf '\\n\\n  late  \\033[31m \\377\\n'; exit 1", "unhealthy it: late \\x1b[31m \ufffd"),
        ("yes | head -c 3000000; exit 1", "unhealthy it: y"),
        ("head -c 3000000 /dev/zero | tr '\\0' x; exit 1", f"unhealthy it: {199 * 'x'}…"),
        ("sleep 100 & echo left one behind; exit 1", "unhealthy it: left one behind"),
        ("(setsid sleep 100 &) ; exit 0", "healthy"),
    ],
)
async def test_what_a_command_may_say(script, said):
    async with commands() as question:
        assert await ask(question("sh", "-c", script)) == said


async def test_a_command_that_takes_too_long_is_killed_with_all_its_tree(tmp_path):
    script = f"trap '' TERM; setsid sleep 1000 & echo $! > {tmp_path}/pid; sleep 1000"
    async with commands() as question:
        assert await ask(question("sh", "-c", script), 0.5) == "no answer it: no answer within 0.5 s"
        pid = (tmp_path / "pid").read_text().strip()
        assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


async def test_a_command_that_cannot_be_started_is_no_yes():
    async with commands() as question:
        assert (
            await ask(question("no-such-program"))
            == "unhealthy it: no program 'no-such-program' in the job's PATH: install it, or give its full path"
        )


# ---- files and functions ----


async def test_a_file(tmp_path):
    thread = trio.CapacityLimiter(1)
    question = questions.file(str(tmp_path / "flag"), thread)
    assert await ask(question) == "unhealthy it: no such file or directory"
    (tmp_path / "flag").touch()
    assert await ask(question) == "healthy"


async def test_a_thread_that_hangs_gives_no_answer_and_gets_no_second_beside_it():
    release, entered = threading.Event(), []
    thread = trio.CapacityLimiter(1)
    question = questions.in_thread(lambda: entered.append(1) or (None if release.wait(60) else ""), thread)
    assert await ask(question, 0.1) == "no answer it: no answer within 0.1 s"
    assert await ask(question, 0.1) == "no answer it: the last question has not come back yet"
    release.set()
    with trio.fail_after(30):
        while thread.available_tokens < 1:
            await trio.sleep(0.01)
    assert await ask(question) == "healthy"
    assert entered == [1, 1]


# ---- what is no fault of the target ----


async def test_where_we_have_no_descriptor_left_nothing_was_asked(tmp_path):
    async with server(saying(OK)) as port, commands() as question:
        with no_descriptors():
            for each in (
                partial(questions.tcp, f"127.0.0.1:{port}"),
                questions.http(f"http://127.0.0.1:{port}/", 200),
                partial(questions.unix, str(tmp_path)),
                question("true"),
            ):
                assert await ask(each) == "not asked it: could not be asked: too many open files"
        assert await ask(question("true")) == "healthy"


async def test_a_daemon_that_stood_still_blames_nobody(mock_clock):
    async def never() -> str:
        await trio.sleep_forever()
        raise AssertionError

    answers = []
    async with trio.open_nursery() as nursery:

        async def one() -> None:
            answers.append(await ask(never, 3))

        for step, said in ((3, "no answer it: no answer within 3 s"), (3 + 60, "not asked it: the daemon itself stood still")):
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(step)
            await trio.testing.wait_all_tasks_blocked()
            assert answers[-1] == said


async def test_a_reason_is_short_and_on_one_line():
    async def long() -> str:
        return "a\nb\t" + "\x1b[2J" + "\udcff" + 500 * "c"

    reason = (await put("it", long, 3)).reason
    assert reason.startswith("it: a b \\x1b[2J\\udcffccc") and reason.endswith("c…") and len(reason) == len("it: ") + 200
