"""Who waits for work at a server, in each order of events; under virtual time."""

from __future__ import annotations

import trio
import trio.testing

from supervisor.queues.lookout import Lookout
from supervisor.queues.protocol import Demand

DEMAND = Demand(limit=1, owner="tests", attempts=1)


class Waiting:
    """Somebody who waits, and what came of it."""

    def __init__(self) -> None:
        self.abandoned: list[str] = []
        self.lookout = Lookout[str](self.abandoned.append)
        self.scope = trio.CancelScope()
        self.ended: list[str | None] = []

    async def wait(self) -> None:
        with self.scope:
            self.ended.append(await self.lookout.wait(lambda: DEMAND))


def claim(demand: Demand) -> str:
    assert demand is DEMAND
    return "a claim"


async def test_it_ends_at_the_moment_that_is_set_and_not_before(autojump_clock):
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        waiting.lookout.set(30)
        waiting.lookout.set(20)
        waiting.lookout.set(25)
    assert (trio.current_time() - began, waiting.ended) == (20, [None])


async def test_what_was_set_before_a_claim_holds_no_more(autojump_clock):
    waiting = Waiting()
    waiting.lookout.set(1)
    waiting.lookout.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait)
        await trio.sleep(10)
        assert waiting.ended == []
        waiting.lookout.set()


async def test_a_claim_is_made_along_for_one_who_waits_and_once(autojump_clock):
    waiting = Waiting()
    assert waiting.lookout.claim_along(claim) is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.lookout.claim_along(claim) == "a claim"
        assert waiting.lookout.claim_along(claim) is None
    assert (waiting.ended, waiting.abandoned) == (["a claim"], [])


async def test_nothing_is_claimed_for_one_who_wants_nothing(autojump_clock):
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.lookout.wait, lambda: None)
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.lookout.claim_along(claim) is None
        waiting.lookout.set()


async def test_who_is_cancelled_as_it_is_claimed_for_abandons_the_claim(autojump_clock):
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait)
        await trio.testing.wait_all_tasks_blocked()
        waiting.scope.cancel(reason="the test wants it so")
        assert waiting.lookout.claim_along(claim) == "a claim"  # it does not know yet
    assert (waiting.ended, waiting.abandoned) == ([], ["a claim"])
    assert waiting.lookout.claim_along(claim) is None
