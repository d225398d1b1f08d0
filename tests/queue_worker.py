"""Run by tests, and killed by them: puts items into a queue, claims and finishes them, and says what it was told is done."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from supervisor.queues import Place
from supervisor.queues.protocol import Draft, Ending, QueueUnavailable, Settings
from supervisor.queues.spec import QueueSpec
from supervisor.queues.sqlite import open as open_queue
from supervisor.wall import WallClock

ROUNDS = 3
TRIES = 6


def say(*words: object) -> None:
    print(*words, flush=True)


async def insist(ask, *arguments, **options):
    """What is asked for, also when the disk fails now and then."""
    for _ in range(TRIES):
        try:
            return await ask(*arguments, **options)
        except QueueUnavailable as error:
            say("refused", str(error).replace("\n", " "))
    sys.exit(0)


async def main(directory: Path) -> None:
    """In each round: two are put; of what is there, the first is done, the second fails; then it is done as well."""
    place = Place(directory=directory, now=WallClock().now, listen=lambda notice: None, warn=lambda text: say("warned", text))
    async with open_queue("q", Settings(spec=QueueSpec()), place) as queue:
        for number in range(ROUNDS):
            ids = [f"{number}-{letter}" for letter in "ab"]
            await insist(queue.put, [Draft(id=id, payload=b'{"n":1}') for id in ids])
            say("put", *ids)
            left = 2
            while left:
                claimed = await insist(queue.claim, 10, owner="worker", attempts=100)
                for item in claimed.items:
                    say("claimed", item.id, item.attempt)
                for item in claimed.items:
                    how = "retry" if item.id.endswith("b") and item.attempt == 1 else "done"
                    if (await insist(queue.finish, [Ending(id=item.id, token=item.token, how=how)])) == [
                        True
                    ] and how == "done":
                        say("done", item.id)
                left = (await insist(queue.counts)).waiting
        say("end")


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
