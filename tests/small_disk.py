"""Run in a mount namespace: what is written atomically, and the store, on a file system that is full, or read-only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

from supervisor.atomic import write_atomic_sync
from supervisor.store import StoreError, open_store


def atomic(directory: Path) -> dict[str, object]:
    file = directory / "file"
    write_atomic_sync(file, "old")
    full, first = attempt(write_atomic_sync, file, b"x" * (1 << 20)), file.read_text()
    remount(directory, "ro")
    read_only, second = attempt(write_atomic_sync, file, b"x"), file.read_text()
    return {
        "full": full,
        "read only": read_only,
        "content": [first, second],
        "names": [each.name for each in directory.iterdir()],
    }


def attempt(fn, *arguments) -> str:
    try:
        fn(*arguments)
    except OSError as error:
        return str(error)
    return ""


async def store(directory: Path) -> dict[str, object]:
    """Fill the disk row by row; make room, and go on; then mount it read-only."""
    told: list[StoreError] = []
    ballast = directory / "ballast"
    ballast.write_bytes(b"x" * (200 << 10))
    stored = 0

    def put(db):
        db.execute("INSERT INTO rows VALUES (?)", ("x" * 4000,))

    async def fill() -> str:
        nonlocal stored
        while True:
            try:
                await opened.write(put)
            except StoreError as error:
                return str(error)
            stored += 1

    def count(db):
        return db.execute("SELECT count(*) FROM rows").fetchone()[0]

    path = directory / "things.db"
    async with open_store(path, ["CREATE TABLE rows (text)"], on_failure=told.append) as opened:
        full = await fill()
        some = stored
        kept = await opened.read(count)
        ballast.unlink()
        again = await fill()
    remount(directory, "ro")
    async with open_store(path, ["CREATE TABLE rows (text)"], on_failure=told.append) as opened:
        try:
            await opened.write(put)
        except StoreError as error:
            read_only = str(error)
    return {
        "full": full, "kept": kept == some, "again": again, "more": stored > some, "read only": read_only, "told": len(told)
    }  # fmt: skip


def remount(directory: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", directory], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", mounted], check=True)
        try:
            found = atomic(Path(mounted)) if sys.argv[1] == "atomic" else trio.run(store, Path(mounted))
            print(json.dumps(found))
        finally:
            subprocess.run(["umount", mounted], check=True)
