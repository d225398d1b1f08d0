"""A blocking client of the control socket, with typed results."""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Self, TypedDict, TypeVar, Unpack

import msgspec

from supervisor.control import messages
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
from supervisor.control.verbs import VERBS
from supervisor.control.wire import Connection, Unreachable, find_socket
from supervisor.errors import ControlError
from supervisor.state import Answer, JobStatus, LimitStatus, PastRun

Names = str | Sequence[str]
When = datetime | str
"""A moment: one without a zone is of the daemon's own; the empty text is none."""

T = TypeVar("T")


class _Options(TypedDict, total=False):
    """What the daemon gets as it is said."""

    priority: str
    delay: float | None
    expire: float | None
    keep: bool


class SubmitOptions(_Options, total=False):
    """What can be said of items when they are submitted: see `Client.submit`."""

    at: When
    timeout: float | None


CHUNK = 1 << 16
"""The most that is written to a job at once: base64 of it stays far below what a request may have."""

_ITEMS_SIZE, _ITEMS = 1 << 18, 2000
"""Bytes and items that one request carries, unless one item alone has more."""

FINISHED: Any = Finished | None

_GRACE = 5.0
"""How much longer than asked for we wait ourselves, should the daemon stand still."""


class Refusal(ControlError):
    """The daemon answered with an error: `code` is the exit code that fits (or JSON-RPC's), `data` what it said besides."""

    def __init__(self, fault: messages.Fault) -> None:
        super().__init__(fault.message, fault.code, fault.data)


class Client:
    """Steers a running daemon over its control socket; blocks. One connection, one thread at a time.

    Finds the daemon as the `supervisor` command does unless `path` is given. Every method raises Unreachable where no daemon
    answers, and ControlError (its `code` is the exit code of section 6 of the manual) where it refuses. With `wait`, orders
    return when they are done, at most after `timeout` seconds: then ControlError with code 75, and the order goes on.
    """

    def __init__(self, path: str | None = None) -> None:
        self._connection = Connection(find_socket(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. Orders that were accepted go on."""
        self._connection.close()

    def status(self, *names: str, usage: bool = False) -> list[JobStatus]:
        """The rows of these jobs and supervisors; of all without names. With `usage` also `memory` and `cpu`."""
        return self._call("status", list[JobStatus], names=names, usage=usage)

    def tree(self) -> list[Branch]:
        """What hangs below the root."""
        return self._call("tree", list[Branch])

    def start(self, names: Names, *, with_after: bool = False, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Start jobs or supervisors; `with_after` also what they come after."""
        return self._call("start", list[Answer], names=names, with_after=with_after, wait=wait, timeout=timeout)

    def stop(self, names: Names, *, now: bool = False, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Stop jobs or supervisors; `now` kills them at once."""
        return self._call("stop", list[Answer], names=names, now=now, wait=wait, timeout=timeout)

    def restart(self, names: Names, *, at_once: bool = False, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Stop and start again, also from stopped; workers one after another, or `at_once`."""
        return self._call("restart", list[Answer], names=names, at_once=at_once, wait=wait, timeout=timeout)

    def scale(self, name: str, workers: int, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Have so many workers of a service; only the difference is touched."""
        return self._call("scale", list[Answer], name=name, workers=workers, wait=wait, timeout=timeout)

    def reload(self, *, plan: bool = False, wait: bool = True, timeout: float | None = None) -> Reload:
        """Read the file again and apply what changed. A file with faults: ControlError 78, the places in its `data`."""
        return self._call("reload", Reload, plan=plan, wait=wait, timeout=timeout)

    def reload_jobs(self, names: Names, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Have jobs reload themselves."""
        return self._call("reload", list[Answer], names=names, wait=wait, timeout=timeout)

    def signal(self, name: str, signal: str, *, group: bool = False) -> list[Answer]:
        """Send a signal (`"HUP"`) to a job's main process, or to its whole group."""
        return self._call("signal", list[Answer], name=name, signal=signal, group=group)

    def run_now(self, names: Names, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """Make one run now, and wait for its end."""
        return self._call("run-now", list[Answer], names=names, wait=wait, timeout=timeout)

    def pause(self, names: Names) -> list[Answer]:
        """Make no new runs; take no more items."""
        return self._call("pause", list[Answer], names=names)

    def resume(self, names: Names) -> list[Answer]:
        """End a pause."""
        return self._call("resume", list[Answer], names=names)

    def cancel(self, names: Names, *, wait: bool = True, timeout: float | None = None) -> list[Answer]:
        """End the run in hand of jobs; or runs, or items, by their ids."""
        return self._call("cancel", list[Answer], names=names, wait=wait, timeout=timeout)

    def submit(self, queue: str, item: Any, *, id: str = "", **options: Unpack[SubmitOptions]) -> str:
        """Put an item into a queue; its id, once it is stored, or that of the one that it is merged with.

        With an `id`, putting it again stores nothing twice: what raised, or was cut short, may be done again. `priority`: one
        of the queue's. `delay`: not before so many seconds from now; `at`: not before this moment. `expire`: not after so many
        seconds since then. `keep` it for `result`, unless something is returned anyway. Waits for room, at most `timeout`
        seconds: then ControlError 75. Raises ControlError where the queue's `unique` rejects it.
        """
        (done,) = self.submit_many(queue, [item], id=[id] if id else (), **options)
        if done.what == "rejected":
            raise ControlError(f"{queue}: not stored: {done.id} has its key", data=done)
        return done.id

    def submit_many(
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
        sending = Sending(time.monotonic, queue, items, id, result, **options)
        for request, left in sending.requests():
            with sending.counting():
                sending.done += self._submit(request, left)
        return sending.done

    def result(self, id: str, *, queue: str = "", timeout: float | None = None) -> Any:
        """Wait until an item has ended: what it returned. Raises ControlError, its `data` the item, where it has failed.

        Of what returned nothing only what was put with `keep` is known for a while.
        """
        (item,) = self.queue_wait([id], queue=queue, timeout=timeout)
        return returned(item)

    def queue_ls(self, *names: str) -> list[QueueStatus]:
        """How queues stand; all without names."""
        return self._call("queue.ls", list[QueueStatus], names=names)

    def queue_peek(self, queue: str, *, state: str = "waiting", lines: int = 20) -> list[ItemStatus]:
        """The next items of a queue, or the last ones of another state."""
        return self._call("queue.peek", list[ItemStatus], queue=queue, state=state, lines=lines)

    def queue_dead(self, queue: str, *, lines: int = 20) -> list[ItemStatus]:
        """The dead items of a queue, the latest first."""
        return self._call("queue.dead", list[ItemStatus], queue=queue, lines=lines)

    def queue_show(self, id: str, *, queue: str = "") -> ItemStatus:
        """All that is known of an item."""
        return self._call("queue.show", ItemStatus, id=id, queue=queue)

    def queue_wait(self, ids: Sequence[str], *, queue: str = "", timeout: float | None = None) -> list[ItemStatus]:
        """Wait until these items have ended."""
        return self._call("queue.wait", list[ItemStatus], ids=list(ids), queue=queue, timeout=timeout)

    def queue_requeue(self, queue: str, ids: Sequence[str] = (), *, all: bool = False) -> list[Answer]:
        """Give dead items, or `all` of them, their attempts anew."""
        return self._call("queue.requeue", list[Answer], queue=queue, ids=list(ids), all=all)

    def queue_purge(self, queue: str, state: str) -> list[Answer]:
        """Remove all items of a state (not running)."""
        return self._call("queue.purge", list[Answer], queue=queue, state=state)

    def queue_pause(self, queue: str) -> list[Answer]:
        """Have nobody take items from a queue, on whatever host."""
        return self._call("queue.pause", list[Answer], queue=queue)

    def queue_resume(self, queue: str) -> list[Answer]:
        """End that."""
        return self._call("queue.resume", list[Answer], queue=queue)

    def limits(self, *names: str) -> list[LimitStatus]:
        """How limits stand, by their names or those of jobs that have some to themselves; all without names."""
        return self._call("limits", list[LimitStatus], names=names)

    def logs(self, *names: str, follow: bool = False, lines: int = 100) -> Iterator[LogLine]:
        """Captured output, line by line. With `follow` it ends when the daemon stops; close the client to end it earlier."""
        for item in self._stream("logs", names=names, follow=follow, lines=lines):
            yield msgspec.json.decode(item, type=LogLine)

    def events(self, *, follow: bool = False, since: int | None = None, snapshot: bool = False) -> Iterator[dict[str, Any]]:
        """Events as `{"event": ..., "seq": ..., "at": ...}`; `{"event": "lagged", "count": n}` where we were too slow."""
        for item in self._stream("events", follow=follow, since=since, snapshot=snapshot):
            yield msgspec.json.decode(item)

    def metrics(self) -> str:
        """What jobs and limits are doing, in the text format of Prometheus. ControlError where the extra is not installed."""
        return self._call("metrics", str)

    def history(self, name: str, *, lines: int = 20) -> list[PastRun]:
        """How the last runs of a job or supervisor ended, oldest first; earlier daemons are included."""
        return self._call("history", list[PastRun], name=name, lines=lines)

    def exec(
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
    ) -> Talk:
        """Run a command once as a job of the daemon: iterate over what it prints. Closing the client stops it, unless `detach`.

        `interactive` or `tty`: it reads what is written to the talk. `timeout`: then it is stopped, and the iteration ends with
        ControlError 75.
        """
        params = {"cwd": cwd, "user": user, "interactive": interactive, "tty": tty, "timeout": timeout, "detach": detach}
        return self._talk("exec", command=list(command), name=name, env=settings(env), **params)

    def attach(self, name: str, *, lines: int = 10) -> Talk:
        """Read what a running job prints, and write to its input. Closing the client leaves it as it is."""
        return self._talk("attach", name=name, lines=lines)

    def shutdown(self, *, now: bool = False, wait: bool = True, timeout: float | None = None) -> Shutdown:
        """Stop everything, and the daemon."""
        return self._call("shutdown", Shutdown, now=now, wait=wait, timeout=timeout)

    def version(self) -> Version:
        """Who answers."""
        return self._call("version", Version)

    def discover(self) -> dict[str, Any]:
        """The OpenRPC description of the protocol."""
        return self._call("rpc.discover", dict[str, Any])

    def _call(self, method: str, result: type[T], **params: Any) -> T:
        asked = self._connection.send(method, arguments(method, params))
        timeout = params.get("timeout")
        return self._answer(asked, result, timeout)

    def _submit(self, params: bytes, timeout: float | None) -> list[Submitted]:
        return self._answer(self._connection.send_encoded("submit", params), list[Submitted], timeout)

    def _answer(self, asked: int, result: type[T], timeout: float | None) -> T:
        """The answer to one request; where the daemon could not even read its id, nobody else's comes."""
        while True:
            reply = self._read(None if timeout is None else timeout + _GRACE)
            if reply.method is None and reply.id in (asked, None):
                return outcome(reply, result)

    def _talk(self, method: str, **params: Any) -> Talk:
        asked = self._connection.send(method, arguments(method, params))
        while True:
            reply = self._read(None)
            if reply.method is None and reply.id == asked:
                outcome(reply, Finished)  # an error: what begins has an item
            if (item := item_of(reply, asked)) is not None:
                return Talk(self, asked, msgspec.json.decode(item, type=Attached))

    def _stream(self, method: str, **params: Any) -> Iterator[msgspec.Raw]:
        asked = self._connection.send(method, arguments(method, params))
        while True:
            reply = self._read(None)
            if reply.method is None and reply.id == asked:
                outcome(reply, End)
                return
            if (item := item_of(reply, asked)) is not None:
                yield item

    def _read(self, timeout: float | None) -> Reply:
        try:
            line = self._connection.read_line(timeout)
        except TimeoutError:
            raise ControlError("the daemon does not answer", ControlError.TIMED_OUT) from None
        if not line:
            raise Unreachable(f"the daemon at {self._connection.path} has hung up: it has ended, or is ending")
        return msgspec.json.decode(line, type=Reply)


class Talk:
    """A job that is talked to: an iterator over what it prints, which ends with its run.

    Where it prints faster than is read, an `attach` loses some, an item with `lagged` says how much; an `exec` waits.
    """

    def __init__(self, client: Client, asked: int, job: Attached) -> None:
        self.name = job.name
        self.tty = job.tty
        self.finished: Finished | None = None
        """How the run ended, once the iteration is over; None for one that was left running."""
        self._client = client
        self._asked = asked
        self._printed: deque[Output] = deque()
        self._over = False

    def __iter__(self) -> Iterator[Output]:
        return self

    def __next__(self) -> Output:
        while not self._printed and not self._over:
            self._hear(self._client._read(None))
        if self._printed:
            return self._printed.popleft()
        raise StopIteration

    def write(self, data: bytes) -> None:
        """Write to its input; returns when it is written. Meanwhile what it prints waits here."""
        for at in range(0, len(data), CHUNK):
            self._say(data=base64.b64encode(data[at : at + CHUNK]).decode())

    def end_input(self) -> None:
        """End its input; at a terminal, type Ctrl-D."""
        self._say(eof=True)

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal this size."""
        self._say(rows=rows, columns=columns)

    def _say(self, **what: Any) -> None:
        said = self._client._connection.send("input", {"to": self._asked, **what})
        while (reply := self._client._read(None)).id != said or reply.method is not None:
            self._hear(reply)
        outcome(reply, type(None))

    def _hear(self, reply: Reply) -> None:
        if (item := item_of(reply, self._asked)) is not None:
            self._printed.append(msgspec.json.decode(item, type=Output))
        elif reply.id == self._asked and reply.method is None:
            self._over = True
            self.finished = outcome(reply, FINISHED)


def settings(env: Mapping[str, str] | None) -> list[str]:
    """Variables of an environment as `exec` takes them."""
    return [f"{name}={value}" for name, value in (env or {}).items()]


def arguments(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The params to send: a single name is a list of one, what is left at its default stays away."""
    if isinstance(params.get("names"), str):
        params["names"] = [params["names"]]
    known = {param.name: param for param in VERBS[method].params}
    return {name: value for name, value in params.items() if known[name].required or value != known[name].default}


def moment(at: When) -> str:
    """As it is sent."""
    return at.isoformat() if isinstance(at, datetime) else at


def chunks(items: Iterable[Any]) -> Iterator[list[bytes]]:
    """Items as JSON, as many together as one request carries. Raises what msgspec does of what is no JSON."""
    chunk: list[bytes] = []
    size = 0
    for item in items:
        text = msgspec.json.encode(item)
        if chunk and (size + len(text) > _ITEMS_SIZE or len(chunk) == _ITEMS):
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk


class Sending:
    """Many items on their way into a queue: the requests that they need, and what became of those that are `done`."""

    def __init__(
        self,
        clock: Callable[[], float],
        queue: str,
        items: Iterable[Any],
        ids: Sequence[str],
        result: bool,
        *,
        at: When = "",
        timeout: float | None = None,
        **options: Unpack[_Options],
    ) -> None:
        self.done: list[Submitted] = []
        self._clock = clock
        self._items = items
        self._ids = ids
        self._said = {"queue": queue, "items": ["it"], "result": result, "at": moment(at), **options}
        self._until = None if timeout is None else clock() + timeout

    def requests(self) -> Iterator[tuple[bytes, float | None]]:
        """The params of each `submit`, and how many seconds are left for it. What the one before came to is `done` by then."""
        for chunk in chunks(self._items):
            left = None if self._until is None else max(0.0, self._until - self._clock())
            ids = self._ids[len(self.done) : len(self.done) + len(chunk)]
            params = msgspec.json.encode(arguments("submit", {**self._said, "id": list(ids), "timeout": left}))
            yield params.replace(b'"items":["it"]', b'"items":[%b]' % b",".join(chunk)), left

    @contextmanager
    def counting(self) -> Iterator[None]:
        """An error of the next request says how many are stored in all."""
        try:
            yield
        except ControlError as problem:
            data = problem.data if isinstance(problem.data, dict) else {}
            problem.data = {**data, "stored": len(self.done) + data.get("stored", 0)}
            raise


def returned(item: ItemStatus) -> Any:
    """What an item returned that has ended. Raises ControlError where it has failed."""
    if item.state != "done":
        raise ControlError(f"{item.id}: {item.state}" + (f": {item.error}" if item.error else ""), data=item)
    return item.result


def outcome(reply: Reply, result: type[T]) -> T:
    """The typed result of a response, or its error raised."""
    if reply.error is not None:
        raise Refusal(reply.error)
    return msgspec.json.decode(reply.result if isinstance(reply.result, msgspec.Raw) else b"null", type=result)


def item_of(reply: Reply, asked: int) -> msgspec.Raw | None:
    """The item of a stream's notification, if it belongs to this request."""
    if not isinstance(reply.params, msgspec.Raw):
        return None
    item = msgspec.json.decode(reply.params, type=messages.Item)
    return item.item if item.id == asked else None
