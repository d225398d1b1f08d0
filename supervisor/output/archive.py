"""Compressed log files: made off the loop, and read back from their end."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import trio

CHUNK = 256 << 10

_GZIP = 16 + zlib.MAX_WBITS


def compress(source: Path, draft: Path) -> os.stat_result | None:
    """Write `source`, compressed, to `draft`; says which file it was. None: it lost its name meanwhile. Raises OSError.

    For a thread of Trio's: it looks now and then whether it was cancelled. What is not whole does not stay.
    """
    plain = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        target = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if _copy(plain, target):
                return os.fstat(plain)
        except BaseException:
            draft.unlink()
            raise
        finally:
            os.close(target)
        draft.unlink()
        return None
    finally:
        os.close(plain)


def _copy(plain: int, target: int) -> bool:
    packer = zlib.compressobj(level=1, wbits=_GZIP)
    while data := os.read(plain, CHUNK):
        trio.from_thread.check_cancelled()
        if not os.fstat(plain).st_nlink:
            return False
        _write(target, packer.compress(data))
    _write(target, packer.flush())
    there = os.fstat(plain)
    os.utime(target, ns=(there.st_atime_ns, there.st_mtime_ns))
    os.fsync(target)  # the plain file goes when this one has its name
    return True


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def unpacked(fd: int, most: int) -> tuple[int, bytes]:
    """How long a compressed file is unpacked, and its last `most` bytes or more. A damaged one ends at the damage."""
    unpacker, length, at = zlib.decompressobj(_GZIP), 0, 0
    parts: list[bytes] = []
    kept = 0
    while packed := os.pread(fd, CHUNK, at):
        at += len(packed)
        try:
            data = unpacker.decompress(packed)
        except zlib.error:
            break
        parts.append(data)
        length += len(data)
        kept += len(data)
        while kept - len(parts[0]) >= most:
            kept -= len(parts.pop(0))
    return length, b"".join(parts)
