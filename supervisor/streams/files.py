"""Files as sources: which have changed, and what is in them."""

from __future__ import annotations

import glob
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from supervisor.streams.beside import beside, unwrapped
from supervisor.streams.stream import Stream
from supervisor.watching import UNTOLD, Burst, Glob, Watching

CHUNK = 1 << 16
LONGEST_LINE = 1 << 20

# ---- what has changed ----


def watch_files(globs: str | Iterable[str]) -> Stream[str]:
    """The absolute path of each file that `globs` mean, whenever it has changed, appeared or gone.

    Told of is what happens while the stream is open, after half a second of silence (5 s where there is none): a file once,
    however often it was written meanwhile, and also where the consumer is slow. A path may be that of a directory: it was
    moved, or so much happened in it that the kernel lost count. The globs are those of a job's `watch`, relative to the
    directory the program is in. OSError where the system refuses to watch.
    """
    here = Path(glob.escape(str(Path.cwd())))
    patterns = tuple(str(here / each) for each in ([globs] if isinstance(globs, str) else globs))
    return Stream.opened_by(partial(_watched, patterns))


@asynccontextmanager
async def _watched(patterns: tuple[str, ...]) -> AsyncGenerator[AsyncIterator[str]]:
    changes = _Changes(patterns)
    async with beside(changes.pump, 0) as paths:
        await changes.begun.wait()
        yield paths


class _Changes:
    """The changes that the consumer has not seen yet: as many as there are files, at most."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = patterns
        self._paths: dict[str, None] = {}
        self._refusal: OSError | None = None
        self._something = trio.Event()
        self._watching = Watching(self._take, self._refuse)
        self.begun = self._watching.begun

    def _take(self, _: str, burst: Burst) -> None:
        for path in burst.paths:
            self._paths.update(dict.fromkeys([path] if path != UNTOLD else [Glob(each).root for each in self._patterns]))
        self._something.set()

    def _refuse(self, text: str) -> None:
        self._refusal = self._refusal or OSError(text)
        self._something.set()

    async def pump(self, send: trio.MemorySendChannel[str]) -> None:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                self._watching.watch({"": self._patterns}, Path("/"), ())
                nursery.start_soon(self._watching.run)
                await self._tell(send)

    async def _tell(self, send: trio.MemorySendChannel[str]) -> None:
        while self._refusal is None:
            await self._something.wait()
            self._something = trio.Event()
            while self._paths:
                path = next(iter(self._paths))
                del self._paths[path]  # what happens from now on is another change
                await send.send(path)
        raise self._refusal


# ---- lines ----


def lines(
    source: str | os.PathLike[str] | trio.abc.ReceiveStream,
    *,
    encoding: str = "utf-8",
    errors: str = "strict",
    longest: int = LONGEST_LINE,
) -> Stream[str]:
    r"""The lines of a file, or of what a stream of bytes gives, such as the `stdout` of a child; without their `\n` or `\r\n`.

    A file is read in threads, 64 KB at a time, up to its end; it must be one that does not wait (of a FIFO, give the
    `trio.lowlevel.FdStream`). A stream is read as it comes, and closed. `encoding` (any that leaves ASCII as it is) and
    `errors` are those of `open`. A line of more than `longest` bytes is a ValueError: nobody reads on for ever.
    """
    if isinstance(source, trio.abc.ReceiveStream):
        chunks = Stream[bytes | bytearray](source)
    else:
        chunks = Stream.opened_by(partial(_chunks_of_file, source))
    return chunks.through(_split, longest).map(lambda line: line.removesuffix(b"\r").decode(encoding, errors))


@asynccontextmanager
async def _chunks_of_file(path: str | os.PathLike[str]) -> AsyncGenerator[AsyncIterator[bytes | bytearray]]:
    async with await trio.open_file(path, "rb", buffering=0) as file, aclosing(_read(file.read)) as chunks:
        yield chunks


async def _read(read: Callable[[int], Awaitable[bytes]]) -> AsyncGenerator[bytes]:
    while chunk := await read(CHUNK):
        yield chunk


async def _split(chunks: AsyncIterator[bytes | bytearray], longest: int) -> AsyncGenerator[bytearray]:
    """Lines, and what is left at the end."""
    line, number = bytearray(), 1
    async for chunk in chunks:
        head, *others = chunk.split(b"\n")
        line += head
        for each in others:
            yield _checked(line, number, longest)
            line, number = bytearray(each), number + 1
        _checked(line, number, longest)
    if line:
        yield line


def _checked(line: bytearray, number: int, longest: int) -> bytearray:
    if len(line) > longest:
        raise ValueError(f"line {number} is longer than {longest} bytes: give a larger `longest` if that can be")
    return line
