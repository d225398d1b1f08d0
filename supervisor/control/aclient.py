"""A Trio client of the control socket, with the blocking client's methods and types."""

# ruff: noqa: ASYNC109  (`timeout` is the daemon's: it ends the wait with an answer)

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Unpack

import msgspec
import trio

from supervisor.control.client import (
    CHUNK,
    FINISHED,
    Names,
    Sending,
    SubmitOptions,
    T,
    arguments,
    item_of,
    outcome,
    returned,
    settings,
)
from supervisor.control.messages import (
    Attached,
    Branch,
    End,
    Finished,
    ItemStatus,
    LogLine,
    Output,
    QueueStatus,
    Reload,
    Reply,
    Shutdown,
    Submitted,
    Version,
)
from supervisor.control.wire import Unreachable, find_socket, patience, short_address, unreachable
from supervisor.errors import ControlError
from supervisor.state import Answer, JobStatus, LimitStatus, PastRun

_TRIES = 8
_CHUNK = 1 << 18
_ID = 1


class AsyncClient:
    """Steers a running daemon over its control socket, from Trio. Any number of tasks may use it at once.

    Each call has a connection of its own, so a call that is cancelled hangs up: its wait ends, its order goes on. Finds the
    daemon as the `supervisor` command does unless `path` is given; raises as the blocking `Client` does.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = find_socket(path)

    async def status(self, *names: str, usage: bool = False) -> list[JobStatus]:
        """The rows of these jobs and supervisors; of all without names. With `usage` also `memory` and `cpu`."""
        return await self._call("status", list[JobStatus], names=names, usage=usage)

    async def tree(self) -> list[Branch]:
        """What hangs below the root."""
        return await self._call("tree", list[Branch])

    async def start(
        self, names: Names, *, with_after: bool = False, wait: bool = True, timeout: float | None = None
    ) -> list[Answer]:
        """Start jobs or supervisors; `with_after` also what they come after."""
        return await self._call("start", list[Answer], names=names, with_after=with_after, wait=wait, timeout=timeout)

    async def stop(self, names: Names, *, now: bool = False, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Stop jobs or supervisors; `now` kills them at once."""
        return await self._call("stop", list[Answer], names=names, now=now, wait=wait, timeout=timeout)

    async def restart(
        self, names: Names, *, at_once: bool = False, wait: bool = True, timeout: float | None = None
    ) -> list[Answer]:
        """Stop and start again, also from stopped; workers one after another, or `at_once`."""
        return await self._call("restart", list[Answer], names=names, at_once=at_once, wait=wait, timeout=timeout)

    async def scale(self, name: str, workers: int, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Have so many workers of a service; only the difference is touched."""
        return await self._call("scale", list[Answer], name=name, workers=workers, wait=wait, timeout=timeout)

    async def reload(self, *, plan: bool = False, wait: bool = True, timeout: float | None = None) -> Reload:
        """Read the file again and apply what changed. A file with faults: ControlError 78, the places in its `data`."""
        return await self._call("reload", Reload, plan=plan, wait=wait, timeout=timeout)

    async def reload_jobs(self, names: Names, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Have jobs reload themselves."""
        return await self._call("reload", list[Answer], names=names, wait=wait, timeout=timeout)

    async def signal(self, name: str, signal: str, *, group: bool = False) -> list[Answer]:
        """Send a signal (`"HUP"`) to a job's main process, or to its whole group."""
        return await self._call("signal", list[Answer], name=name, signal=signal, group=group)

    async def run_now(self, names: Names, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Make one run now, and wait for its end."""
        return await self._call("run-now", list[Answer], names=names, wait=wait, timeout=timeout)

    async def pause(self, names: Names) -> list[Answer]:
        """Make no new runs; take no more items."""
        return await self._call("pause", list[Answer], names=names)

    async def resume(self, names: Names) -> list[Answer]:
        """End a pause."""
        return await self._call("resume", list[Answer], names=names)

    async def cancel(self, names: Names, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """End the run in hand of jobs; or runs, or items, by their ids."""
        return await self._call("cancel", list[Answer], names=names, wait=wait, timeout=timeout)

    async def submit(self, queue: str, item: Any, *, id: str = "", **options: Unpack[SubmitOptions]) -> str:
        """Put an item into a queue; its id, once it is stored, or that of the one that it is merged with.

        Its options are those of the blocking client.
        """
        (done,) = await self.submit_many(queue, [item], id=[id] if id else (), **options)
        if done.what == "rejected":
            raise ControlError(f"{queue}: not stored: {done.id} has its key", data=done)
        return done.id

    async def submit_many(
        self,
        queue: str,
        items: Iterable[Any],
        *,
        id: Sequence[str] = (),
        result: bool = False,
        **options: Unpack[SubmitOptions],
    ) -> list[Submitted]:
        """Put many items, in as many requests as they need; what became of each. With `result`, also what came of it.

        Where it raises ControlError, its `data` says how many are `stored`: of the first ones.
        """
        sending = Sending(trio.current_time, queue, items, id, result, **options)
        for request, _ in sending.requests():
            with sending.counting():
                sending.done += await self._submit(request)
        return sending.done

    async def result(self, id: str, *, queue: str = "", timeout: float | None = None) -> Any:
        """Wait until an item has ended: what it returned. Raises ControlError, its `data` the item, where it has failed.

        Of what returned nothing only what was put with `keep` is known for a while.
        """
        (item,) = await self.queue_wait([id], queue=queue, timeout=timeout)
        return returned(item)

    async def queue_ls(self, *names: str) -> list[QueueStatus]:
        """How queues stand; all without names."""
        return await self._call("queue.ls", list[QueueStatus], names=names)

    async def queue_peek(self, queue: str, *, state: str = "waiting", lines: int = 20) -> list[ItemStatus]:
        """The next items of a queue, or the last ones of another state."""
        return await self._call("queue.peek", list[ItemStatus], queue=queue, state=state, lines=lines)

    async def queue_dead(self, queue: str, *, lines: int = 20) -> list[ItemStatus]:
        """The dead items of a queue, the latest first."""
        return await self._call("queue.dead", list[ItemStatus], queue=queue, lines=lines)

    async def queue_show(self, id: str, *, queue: str = "") -> ItemStatus:
        """All that is known of an item."""
        return await self._call("queue.show", ItemStatus, id=id, queue=queue)

    async def queue_wait(self, ids: Sequence[str], *, queue: str = "", timeout: float | None = None) -> list[ItemStatus]:
        """Wait until these items have ended."""
        return await self._call("queue.wait", list[ItemStatus], ids=list(ids), queue=queue, timeout=timeout)

    async def queue_requeue(self, queue: str, ids: Sequence[str] = (), *, all: bool = False) -> list[Answer]:
        """Give dead items, or `all` of them, their attempts anew."""
        return await self._call("queue.requeue", list[Answer], queue=queue, ids=list(ids), all=all)

    async def queue_purge(self, queue: str, state: str) -> list[Answer]:
        """Remove all items of a state (not running)."""
        return await self._call("queue.purge", list[Answer], queue=queue, state=state)

    async def queue_pause(self, queue: str) -> list[Answer]:
        """Have nobody take items from a queue, on whatever host."""
        return await self._call("queue.pause", list[Answer], queue=queue)

    async def queue_resume(self, queue: str) -> list[Answer]:
        """End that."""
        return await self._call("queue.resume", list[Answer], queue=queue)

    async def limits(self, *names: str) -> list[LimitStatus]:
        """How limits stand, by their names or those of jobs that have some to themselves; all without names."""
        return await self._call("limits", list[LimitStatus], names=names)

    @asynccontextmanager
    async def logs(self, *names: str, follow: bool = False, lines: int = 100) -> AsyncIterator[Stream]:
        """Captured output: `async with client.logs("api", follow=True) as lines: async for line in lines`."""
        async with self._stream("logs", LogLine, names=names, follow=follow, lines=lines) as stream:
            yield stream

    @asynccontextmanager
    async def events(self, *, follow: bool = False, since: int | None = None, snapshot: bool = False) -> AsyncIterator[Stream]:
        """Events, used as `logs` is: dicts as the blocking client gives them."""
        async with self._stream("events", Any, follow=follow, since=since, snapshot=snapshot) as stream:
            yield stream

    async def metrics(self) -> str:
        """What jobs and limits are doing, in the text format of Prometheus. ControlError where the extra is not installed."""
        return await self._call("metrics", str)

    async def history(self, name: str, *, lines: int = 20) -> list[PastRun]:
        """How the last runs of a job or supervisor ended, oldest first; earlier daemons are included."""
        return await self._call("history", list[PastRun], name=name, lines=lines)

    @asynccontextmanager
    async def exec(
        self,
        command: Sequence[str],
        *,
        name: str = "",
        cwd: str = "",
        user: str = "",
        env: Mapping[str, str] | None = None,
        interactive: bool = False,
        tty: bool = False,
        timeout: float | None = None,
        detach: bool = False,
    ) -> AsyncIterator[AsyncTalk]:
        """Run a command once as a job of the daemon: `async with client.exec(["./backup"]) as talk: async for piece in talk`.

        Leaving the block before its end stops it, unless `detach`. The rest is as with the blocking client.
        """
        params = {"cwd": cwd, "user": user, "interactive": interactive, "tty": tty, "timeout": timeout, "detach": detach}
        async with self._talk("exec", command=list(command), name=name, env=settings(env), **params) as talk:
            yield talk

    @asynccontextmanager
    async def attach(self, name: str, *, lines: int = 10) -> AsyncIterator[AsyncTalk]:
        """Read what a running job prints, and write to its input, for as long as the block lasts. Leaves it as it is."""
        async with self._talk("attach", name=name, lines=lines) as talk:
            yield talk

    async def shutdown(self, *, now: bool = False, wait: bool = True, timeout: float | None = None) -> Shutdown:
        """Stop everything, and the daemon."""
        return await self._call("shutdown", Shutdown, now=now, wait=wait, timeout=timeout)

    async def version(self) -> Version:
        """Who answers."""
        return await self._call("version", Version)

    async def discover(self) -> dict[str, Any]:
        """The OpenRPC description of the protocol."""
        return await self._call("rpc.discover", dict[str, Any])

    async def _call(self, method: str, result: type[T], **params: Any) -> T:
        return await self._ask(method, msgspec.json.encode(arguments(method, params)), result)

    async def _submit(self, params: bytes) -> list[Submitted]:
        return await self._ask("submit", params, list[Submitted])

    async def _ask(self, method: str, params: bytes, result: type[T]) -> T:
        async with await _connect(self._path) as stream:
            await _send_encoded(stream, method, params)
            reply = await _Replies(stream, self._path).read()
            return outcome(reply, result)

    @asynccontextmanager
    async def _stream(self, method: str, item: Any, **params: Any) -> AsyncIterator[Stream]:
        async with await _connect(self._path) as stream:
            await _send(stream, method, params)
            yield Stream(_Replies(stream, self._path), item)

    @asynccontextmanager
    async def _talk(self, method: str, **params: Any) -> AsyncIterator[AsyncTalk]:
        async with await _connect(self._path) as stream:
            await _send(stream, method, params)
            replies = _Replies(stream, self._path)
            reply = await replies.read()
            if (item := item_of(reply, _ID)) is None:
                outcome(reply, Finished)
                raise Unreachable(f"the daemon at {self._path} speaks another protocol")
            yield AsyncTalk(stream, replies, msgspec.json.decode(item, type=Attached))


class AsyncTalk:
    """A job that is talked to: an async iterator over what it prints, which ends with its run.

    One task may iterate while others write. Where it prints faster than is read, an `attach` loses some, an item with
    `lagged` says how much; an `exec` waits.
    """

    def __init__(self, stream: trio.SocketStream, replies: _Replies, job: Attached) -> None:
        self.name = job.name
        self.tty = job.tty
        self.finished: Finished | None = None
        """How the run ended, once the iteration is over; None for one that was left running."""
        self._stream = stream
        self._replies = replies
        self._printed: deque[Output] = deque()
        self._last: Reply | None = None
        self._said = _ID
        self._answers: dict[int | str | None, Reply] = {}
        self._sending = trio.Lock()
        self._writing = trio.Lock()
        self._reading = trio.Lock()

    def __aiter__(self) -> AsyncTalk:
        return self

    async def __anext__(self) -> Output:
        while not self._printed and self._last is None:
            async with self._reading:  # a task that waits for it looks first whether another has read what it waits for
                if not self._printed and self._last is None:
                    await self._hear()
        if self._printed:
            return self._printed.popleft()
        assert self._last is not None
        self.finished = outcome(self._last, FINISHED)
        raise StopAsyncIteration

    async def write(self, data: bytes) -> None:
        """Write to its input; returns when it is written. Meanwhile what it prints waits here."""
        async with self._writing:
            for at in range(0, len(data), CHUNK):
                await self._say(data=data[at : at + CHUNK])

    async def end_input(self) -> None:
        """End its input; at a terminal, type Ctrl-D."""
        async with self._writing:
            await self._say(eof=True)

    async def resize(self, rows: int, columns: int) -> None:
        """Give its terminal this size."""
        await self._say(rows=rows, columns=columns)

    async def _say(self, **what: Any) -> None:
        self._said += 1
        said = self._said
        async with self._sending:
            await _send(self._stream, "input", {"to": _ID, **what}, said)
        while said not in self._answers:
            async with self._reading:
                if said not in self._answers:
                    await self._hear()
        outcome(self._answers.pop(said), type(None))

    async def _hear(self) -> None:
        reply = await self._replies.read()
        if (item := item_of(reply, _ID)) is not None:
            self._printed.append(msgspec.json.decode(item, type=Output))
        elif reply.id == _ID:
            self._last = reply
        else:
            self._answers[reply.id] = reply


class Stream:
    """The items of a streaming call. With `follow` it ends when the daemon stops; if that dies, with Unreachable."""

    def __init__(self, replies: _Replies, item: Any) -> None:
        self._replies = replies
        self._item = item

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        while True:
            reply = await self._replies.read()
            if reply.method is None:
                outcome(reply, End)
                raise StopAsyncIteration
            if (item := item_of(reply, _ID)) is not None:
                return msgspec.json.decode(item, type=self._item)


class _Replies:
    """The lines of one connection, decoded."""

    def __init__(self, stream: trio.SocketStream, path: str) -> None:
        self._stream = stream
        self._path = path
        self._buffer = bytearray()

    async def read(self) -> Reply:
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            try:
                chunk = await self._stream.receive_some(_CHUNK)
            except trio.BrokenResourceError:
                chunk = b""
            if not chunk:
                raise Unreachable(f"the daemon at {self._path} has hung up: it has ended, or is ending")
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return msgspec.json.decode(line, type=Reply)


async def _send(stream: trio.SocketStream, method: str, params: dict[str, Any], identity: int = _ID) -> None:
    await _send_encoded(stream, method, msgspec.json.encode(arguments(method, params)), identity)


async def _send_encoded(stream: trio.SocketStream, method: str, params: bytes, identity: int = _ID) -> None:
    try:
        await stream.send_all(b'{"jsonrpc":"2.0","id":%d,"method":"%b","params":%b}\n' % (identity, method.encode(), params))
    except trio.BrokenResourceError:
        pass  # what the daemon had to say before it closed may still be there to read


async def _connect(path: str) -> trio.SocketStream:
    try:
        address, directory = short_address(path)
        try:
            return trio.SocketStream(await _connect_patiently(address))
        finally:
            if directory is not None:
                os.close(directory)
    except OSError as problem:
        raise Unreachable(unreachable(path, problem)) from problem


async def _connect_patiently(address: str) -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        for attempt in range(_TRIES):
            try:
                sock.connect(address)  # at once or not at all; Trio's own would take a full backlog for success
                break
            except BlockingIOError:
                if attempt == _TRIES - 1:
                    raise
                await trio.sleep(patience(attempt))
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


__all__ = ["AsyncClient", "ControlError", "Stream", "Unreachable"]
