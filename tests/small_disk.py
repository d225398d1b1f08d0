"""Run in a mount namespace: what is written atomically, the store, and a queue, on a file system that is full, or read-only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from supervisor.atomic import write_atomic_sync
from supervisor.queues import Place
from supervisor.queues.protocol import Draft, Ending, QueueUnavailable, Settings, new_id
from supervisor.queues.spec import QueueSpec
from supervisor.queues.sqlite import open as open_queue
from supervisor.store import StoreError, open_store
from supervisor.wall import WallClock


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


async def queue(directory: Path) -> dict[str, object]:
    """Put until the disk is full; make room, put more, and drain it."""
    warned: list[str] = []
    ballast = directory / "ballast"
    ballast.write_bytes(b"x" * (200 << 10))
    place = Place(directory=directory, now=WallClock().now, listen=lambda notice: None, warn=warned.append)
    async with open_queue("q", Settings(spec=QueueSpec(size=100_000)), place) as opened:

        async def fill() -> tuple[str, int]:
            stored = 0
            while True:
                try:
                    await opened.put([Draft(id=new_id(), payload=b'"%s"' % (b"x" * 4000))])
                except QueueUnavailable as error:
                    return str(error), stored
                stored += 1

        full, stored = await fill()
        there = (await opened.counts()).waiting
        ballast.unlink()
        _, more = await fill()
        drained = 0
        remount(directory, "size=4m")  # a claim takes room, too
        while items := (await opened.claim(10, owner="tests", attempts=1)).items:
            drained += sum(await opened.finish([Ending(id=item.id, token=item.token, how="done") for item in items]))
    return {"full": full, "stored": stored, "there": there, "more": more, "drained": drained, "warned": warned}


def remount(directory: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", directory], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", mounted], check=True)
        try:
            what = {"atomic": atomic, "store": partial(trio.run, store), "queue": partial(trio.run, queue)}[sys.argv[1]]
            found = what(Path(mounted))
            print(json.dumps(found))
        finally:
            subprocess.run(["umount", mounted], check=True)
