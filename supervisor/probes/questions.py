"""The questions. Each is an async function that returns None, or why not; it can be cancelled, and leaves nothing behind.

`put` asks one, and keeps three answers apart: yes, no, and none at all. What goes wrong for a reason of our own (no
descriptor left, a daemon that stood still) is none of the three: a job is not to suffer for it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import trio

from supervisor.children import Child
from supervisor.errors import RunFailed
from supervisor.probes.judgement import Answer, Verdict
from supervisor.probes.spec import split_address

Question = Callable[[], Awaitable[str | None]]
"""None is yes; else why not, without the name of the target. May raise OSError and RunFailed."""

STOOD_STILL = 1.0
"""Seconds by which a limit of ours may be missed before we take it that the daemon itself did not run."""

LONGEST_REASON = 200
HEAD = 1 << 14
"""Bytes of an HTTP head, or of a command's output, that are looked at."""

_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN})
_STATUS_LINE = re.compile(rb"HTTP/\d\.\d (\d{3})(?: [^\r\n]*)?\r?\n")


class NoAnswer(Exception):
    """The target is there, and says nothing."""


async def put(target: str, question: Question, limit: float) -> Answer:
    """Ask, for at most `limit` seconds. The reason of what is no yes begins with `target`."""
    began = trio.current_time()
    reason: str | None = None
    try:
        with trio.move_on_after(limit) as patience:
            reason = await question()
    except NoAnswer as silence:
        return Answer(Verdict.NO_ANSWER, f"{target}: {silence}")
    except (OSError, RunFailed) as error:
        cause = root_of(error)
        if isinstance(cause, OSError) and cause.errno in _OURS:
            return Answer(Verdict.NOT_ASKED, f"{target}: could not be asked: {in_words(cause)}")
        reason = str(error) if isinstance(error, RunFailed) else in_words(cause)
    if patience.cancelled_caught:
        if trio.current_time() > began + limit + STOOD_STILL:
            return Answer(Verdict.NOT_ASKED, f"{target}: the daemon itself stood still")
        return Answer(Verdict.NO_ANSWER, f"{target}: no answer within {limit:g} s")
    return Answer(Verdict.HEALTHY) if reason is None else Answer(Verdict.UNHEALTHY, f"{target}: {one_line(reason)}")


def root_of(error: BaseException) -> BaseException:
    """What an error came from, in the end: the first of several."""
    while (cause := error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__) is not None:
        error = cause
    return error


def in_words(error: BaseException) -> str:
    """An error for the operator, without addresses, which the target's name has."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        text = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        return text[:1].lower() + text[1:]
    return str(error) or "the connection broke"


def one_line(text: str) -> str:
    """Foreign text as a reason: one line, printable, not too long."""
    words = " ".join(text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in words)
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1] + "…"


# -- the network --------------------------------------------------------------------------------------------------------


async def tcp(address: str) -> str | None:
    """Whether it accepts a connection."""
    host, port = split_address(address)
    async with await trio.open_tcp_stream(host, port):
        return None


async def unix(path: str) -> str | None:
    """Whether it accepts a connection. Never waits: a Unix socket answers at once, or has no room."""
    await trio.lowlevel.checkpoint()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        try:
            connection.connect(path)
        except BlockingIOError:
            raise NoAnswer("it accepts no connections: its queue is full") from None
    return None


def http(url: str, status: int) -> Question:
    """Whether a GET is answered with this status. Only the head of the answer is read."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = f"Host: {parts.netloc}\r\nUser-Agent: trio-supervisor\r\nAccept: */*\r\nConnection: close\r\n"
    request = f"GET {path} HTTP/1.1\r\n{fields}\r\n"
    contexts: list[ssl.SSLContext] = []

    async def connect() -> trio.abc.Stream:
        if parts.scheme == "http":
            return await trio.open_tcp_stream(host, parts.port or 80)
        if not contexts:  # it reads all the certificates of the machine
            contexts.append(await trio.to_thread.run_sync(ssl.create_default_context))
        return await trio.open_ssl_over_tcp_stream(host, parts.port or 443, ssl_context=contexts[0], https_compatible=True)

    async def ask() -> str | None:
        try:
            stream = await connect()
            try:
                await stream.send_all(request.encode())
                answered = await _status_of(stream)
            finally:
                await trio.aclose_forcefully(stream)
        except trio.BrokenResourceError as error:
            raise RunFailed(in_words(root_of(error))) from error
        return None if answered == status else f"HTTP {answered}, expected {status}"

    return ask


async def _status_of(stream: trio.abc.ReceiveStream) -> int:
    """The status of an HTTP answer; interim ones (1xx) are passed over. RunFailed where it is no HTTP."""
    head = b""
    while len(head) < HEAD:
        chunk = await stream.receive_some(4096)
        head += bytes(chunk)
        while (end := re.search(rb"\r?\n\r?\n", head)) is not None or not chunk:
            found = _STATUS_LINE.match(head)
            if found is None:
                raise RunFailed("its answer is no HTTP" if head else "it closed the connection without an answer")
            if end is None or int(found[1]) >= 200:
                return int(found[1])
            head = head[end.end() :]
    raise RunFailed(f"its answer has a head of more than {HEAD} bytes, or is no HTTP")


# -- the machine --------------------------------------------------------------------------------------------------------


def command(
    spawn: Callable[[int], Awaitable[Child]], stuck: Callable[[tuple[int, ...]], None], abandoned: trio.Event
) -> Question:
    """Whether a command succeeds. `spawn(output)` starts it; everything of it is killed at its end, or when cancelled.

    `stuck` and `abandoned`: see `Child.destroy`.
    """

    async def ask() -> str | None:
        read, write = os.pipe2(os.O_CLOEXEC)
        async with trio.lowlevel.FdStream(read) as output:
            try:
                child = await spawn(write)
            finally:
                os.close(write)
            said = bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read_head, output, said)
                try:
                    await child.wait()
                finally:
                    report = await child.destroy(stuck=stuck, abandoned=abandoned)
                nursery.cancel_scope.cancel(reason="the probe has ended")
            said += _rest(output.fileno())
        if report.code == 0:
            return None
        how = f"killed by {report.signal}" if report.signal else f"exited with code {report.code}"
        return said.decode(errors="replace").strip().partition("\n")[0] or how

    return ask


async def _read_head(output: trio.abc.ReceiveStream, said: bytearray) -> None:
    """Read to the end, so that the writer never waits, and keep the beginning."""
    while chunk := await output.receive_some(1 << 16):
        said += chunk[: HEAD - len(said)] if len(said) < HEAD else b""


def _rest(fd: int) -> bytes:
    """What was written last; its writers are dead."""
    try:
        return os.read(fd, HEAD)
    except BlockingIOError:
        return b""


def file(path: str, thread: trio.CapacityLimiter) -> Question:
    """Whether there is a file, of whatever kind."""
    return in_thread(lambda: _missing(path), thread)


def _missing(path: str) -> str | None:
    Path(path).stat()
    return None


def in_thread(function: Callable[[], str | None], thread: trio.CapacityLimiter) -> Question:
    """Ask in a thread what may block. One that does not come back is left alone, and no second one is started beside it.

    `thread` has room for one, and is the job's: it outlives the run.
    """

    async def ask() -> str | None:
        if thread.available_tokens < 1:
            raise NoAnswer("the last question has not come back yet")
        return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=thread)

    return ask
