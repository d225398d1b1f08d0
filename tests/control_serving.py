"""A real tree behind a real socket, and a client that sends what it likes."""

import json
from contextlib import asynccontextmanager

import trio

from supervisor.control.server import serve_control
from supervisor.tree import open_supervisor

JOBS = {
    "idle": {"call": "control_jobs:idle"},
    "other": {"call": "control_jobs:idle"},
    "slow": {"call": "control_jobs:stubborn", "grace": "1h"},
    "manual": {"call": "control_jobs:idle", "start": "manual"},
    "task": {"call": "control_jobs:endless", "once": True, "start": "manual", "grace": "50ms"},
    "brief": {"call": "control_jobs:brief", "once": True, "start": "manual"},
    "broken": {"call": "control_jobs:broken", "once": True, "start": "manual", "restart": "temporary"},
    "hourly": {"call": "control_jobs:brief", "every": "1h"},
}
SUPERVISORS = {"group": {"children": ["idle", "other"]}}


@asynccontextmanager
async def serving(directory, jobs=JOBS, supervisors=SUPERVISORS, queues=None, **options):
    """Yields the tree and the path of its socket; in the end everything is killed."""
    config = {"jobs": jobs, "supervisors": supervisors, "daemon": {"state_dir": str(directory / "state"), "name": "test"}}
    config |= {"queues": queues} if queues else {}
    with trio.fail_after(60):
        async with trio.open_nursery() as servers:
            async with open_supervisor(config) as tree:
                try:
                    path = await servers.start(start, tree, directory / "run" / "control.sock", options)
                    yield tree, str(path)
                finally:
                    tree.shutdown("the test is over", kill=True)
            servers.cancel_scope.cancel(reason="the tree has ended")


async def start(tree, path, options, *, task_status):
    await serve_control(tree, path, task_status=task_status, **options)


async def until(tree, holds):
    """Wait for the event after which `holds(table)`."""
    with tree.journal.subscribe() as feed:
        while not holds(tree.journal.table):
            await feed.__anext__()


class Peer:
    """One connection that sends bytes or objects, and reads lines."""

    def __init__(self, stream):
        self.stream = stream
        self._buffer = bytearray()

    async def send(self, *requests):
        data = b"".join(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n" for request in requests)
        await self.stream.send_all(data)

    async def read(self):
        """The next answer; None when the server has closed."""
        while b"\n" not in self._buffer:
            try:
                chunk = await self.stream.receive_some(1 << 16)
            except trio.BrokenResourceError:
                chunk = b""
            if not chunk:
                return None
            self._buffer += chunk
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return json.loads(line)

    async def ask(self, method, params=None, id=1):
        await self.send(request(method, params, id))
        return await self.read()


@asynccontextmanager
async def peer(path):
    with trio.fail_after(60):
        async with await trio.open_unix_socket(path) as stream:
            yield Peer(stream)


def request(method, params=None, id=1):
    found = {"jsonrpc": "2.0", "method": method, "id": id}
    return found if params is None else found | {"params": params}
