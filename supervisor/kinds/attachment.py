"""The way in to a child that runs: what can be written to its standard input, or typed at its terminal."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios

import trio

ROWS, COLUMNS = 24, 80
"""The size of a terminal until somebody attaches."""


class Attachment:
    """The writing end of a child's standard input (`stdin = "pipe"`), or the master of its terminal (`tty = true`).

    `Run.attach` has it while the child runs. It owns the descriptor. What the child prints is captured as any output is:
    follow it there.
    """

    def __init__(self, descriptor: int, *, tty: bool) -> None:
        os.set_blocking(descriptor, False)
        self.tty = tty
        """Whether it is a terminal: what is written is typed, and it has a size."""
        self._descriptor = descriptor
        self._turn = trio.StrictFIFOLock()

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting for room as long as the child does not read.

        Each write is whole: others wait for their turn. Cancelled, an unknown part of it has been written. Raises
        trio.BrokenResourceError if nobody can read it any more, and trio.ClosedResourceError after `close` or `release`.
        """
        async with self._turn:
            left = memoryview(data)
            while left:
                try:
                    if _hung_up(self._open()):
                        raise BrokenPipeError
                    left = left[os.write(self._open(), left) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._open())
                except BrokenPipeError as error:
                    raise trio.BrokenResourceError("nobody reads the input any more") from error

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal this size; what runs in the foreground there gets SIGWINCH. Nothing where there is none."""
        if self.tty:
            fcntl.ioctl(self._open(), termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def close(self) -> None:
        """End the input: the child reads to the end of what was written, and then finds no more.

        A terminal has no end of its own: its end-of-file character (Ctrl-D) is typed, and it stays open.
        """
        if self.tty:
            await self.write(termios.tcgetattr(self._open())[6][termios.VEOF])
        else:
            async with self._turn:
                self.release()

    def release(self) -> None:
        """Let go of the descriptor: the run is over. Who waits to write is told so. May be called again."""
        if self._descriptor >= 0:
            trio.lowlevel.notify_closing(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        if self._descriptor < 0:
            raise trio.ClosedResourceError("the input of the child is closed")
        return self._descriptor


def _hung_up(descriptor: int) -> bool:
    """Whether nobody is at the other end. Writing would tell of a pipe (EPIPE), but not of a terminal."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
