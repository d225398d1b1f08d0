"""The Trio floor: the least a supervisor on Trio can be. A yardstick, not a product.

    python trio_floor.py SOCKET LIST        LIST has one command a line, words parted by spaces

Starts every command, restarts each at once whenever and however it ends, answers each line it receives on SOCKET with one
line of JSON about all of them, and at SIGTERM ends them all and itself. A task per child, waiting on its pidfd; no output,
no policy, no log, and no fairness beyond what Trio gives.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import trio


class Job:
    """One command, kept running."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        self.argv = argv
        self.restarts = 0
        self.row = b""
        self.process: subprocess.Popen[bytes] | None = None

    async def keep(self, floor: Floor) -> None:
        """Run, wait, run again, until the floor is stopping."""
        while True:
            self.process = self.start(floor, floor.null)
            # Encoded when it changes, not when it is asked for: an answer is then a join.
            self.row = b'{"name":"%s","state":"running","pid":%d,"restarts":%d,"since":%.3f}' % (
                self.name.encode(), self.process.pid, self.restarts, trio.current_time()
            )  # fmt: skip
            await self.ended(self.process)
            if floor.stopping:
                return
            self.restarts += 1

    def start(self, floor: Floor, output: int) -> subprocess.Popen[bytes]:
        # In Trio's own thread: `trio.lowlevel.open_process` hops to a worker thread, twice the cost.
        return subprocess.Popen(self.argv, stdin=floor.null, stdout=output, stderr=output, process_group=0, env=floor.environ)

    async def ended(self, process: subprocess.Popen[bytes]) -> None:
        pidfd = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        process.wait()
        self.process = None


class Floor:
    """All of them, and the socket."""

    children: trio.Nursery

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.stopping = False
        self.environ = dict(os.environ)
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    async def run(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(16)
            async with trio.open_nursery() as service:
                listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
                service.start_soon(trio.serve_listeners, self.answer, listeners)
                service.start_soon(self.stop_at_sigterm)
                async with trio.open_nursery() as self.children:
                    for job in self.jobs:
                        self.children.start_soon(job.keep, self)
                service.cancel_scope.cancel(reason="every child has ended")

    async def answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                async for _question in stream:
                    await stream.send_all(b"[" + b",".join(job.row for job in self.jobs if job.row) + b"]\n")
            except trio.BrokenResourceError:
                pass  # the client left in the middle of its answer

    async def stop_at_sigterm(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _signal in signals:
                self.stopping = True
                for job in self.jobs:
                    if job.process:
                        job.process.send_signal(signal.SIGTERM)


def main(path: str, listing: str, make: Callable[[str, list[str]], Job] = Job) -> None:
    """Keep the commands of the file `listing`, and listen at `path`."""
    with open(listing) as lines:
        jobs = [make(f"j{index}", line.split()) for index, line in enumerate(lines)]
    trio.run(Floor(jobs).run, path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
