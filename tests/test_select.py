"""`select`: whose value comes next, and that none is ever lost."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import trio
from interleaving import cancelled_at_every_step, shuffle_tasks
from trio.testing import wait_all_tasks_blocked

from supervisor.concurrency import CancelToken, select

checkpoint = trio.lowlevel.checkpoint


def channels(number, size=math.inf):
    """Pairs of ends, as two lists."""
    pairs = [trio.open_memory_channel(size) for _ in range(number)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def filled(number, each):
    """Receiving ends with `each` values in them, closed."""
    sends, receives = channels(number)
    for send in sends:
        for value in range(each):
            send.send_nowait(value)
        send.close()
    return receives


async def begin_to_receive(ready):
    """A `next` that waits and is cancelled: from then on every source is being received from."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ready.next)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel(reason="it receives now")


# -- whose turn it is


async def test_each_value_comes_with_its_source_and_in_the_order_of_its_source():
    one, other = filled(2, 50)
    taken = {one: [], other: []}
    async with select(one, other) as ready:
        async for source, value in ready:
            taken[source].append(value)
    assert taken == {one: [*range(50)], other: [*range(50)]}
    assert ready.left == []


async def test_of_sources_that_are_always_ready_each_has_its_turn():
    """Fair: within as many values as there are sources, each comes once."""
    sources = filled(5, 40)
    async with select(*sources) as ready:
        order = [source async for source, _ in ready]
    assert order == sources * 40


async def test_a_source_that_waits_to_be_received_from_has_its_turn_beside_one_that_is_always_ready():
    sends, (busy, rare) = channels(2)
    async with select(busy, rare) as ready:
        sends[0].send_nowait(0)
        assert await ready.next() == (busy, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ready.next)  # now both are being received from
            await wait_all_tasks_blocked()
            sends[0].send_nowait(1)
        for value in range(100):
            sends[0].send_nowait(value)
        sends[1].send_nowait("rare")
        order = [(await ready.next())[0] for _ in range(5)]
        assert rare in order[:3]


async def test_biased_takes_from_the_first_as_long_as_it_has_something():
    first, second, third = filled(3, 20)
    async with select(first, second, third, biased=True) as ready:
        order = [source async for source, _ in ready]
    assert order == [first] * 20 + [second] * 20 + [third] * 20


@pytest.mark.parametrize("seed", range(20))
async def test_biased_sees_what_was_sent_while_it_was_not_looking(monkeypatch, seed):
    """Also on a source that is being received from since it last waited: its task has the value, but may not have run."""
    shuffle_tasks(monkeypatch, seed)
    sends, sources = channels(3)
    async with select(*sources, biased=True) as ready:
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ready.next)
                await wait_all_tasks_blocked()
                sends[2].send_nowait("wakes it")
            for place in (2, 1, 0):
                sends[place].send_nowait(place)
            assert [await ready.next() for _ in range(3)] == [(source, place) for place, source in enumerate(sources)]


async def test_it_waits_until_something_is_sent(autojump_clock):
    sends, sources = channels(3, 0)

    async def send_later():
        await trio.sleep(7)
        await sends[1].send("x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_later)
        async with select(*sources) as ready:
            assert await ready.next() == (sources[1], "x")
            assert trio.current_time() == 7


async def test_nothing_is_taken_ahead_while_there_is_something_to_take():
    """Backpressure: without a `next` that waited, no value leaves its channel before it is selected."""
    sources = filled(3, 10)
    async with select(*sources) as ready:
        for _ in range(6):
            await ready.next()
        assert [source.statistics().current_buffer_used for source in sources] == [8, 8, 8]
    assert ready.left == []


# -- branches switched off, and closed


async def test_a_source_that_is_switched_off_keeps_its_values():
    one, other = filled(2, 3)
    async with select(one, other) as ready:
        ready.guard(one, False)
        assert [await ready.next() for _ in range(3)] == [(other, 0), (other, 1), (other, 2)]
        assert one.statistics().current_buffer_used == 3
        ready.guard(one, True)
        assert [value async for _, value in ready] == [0, 1, 2]


async def test_switching_off_takes_back_a_receive_that_is_under_way():
    (send, _), (one, other) = channels(2)
    async with select(one, other) as ready:
        await begin_to_receive(ready)
        assert one.statistics().tasks_waiting_receive == 1
        ready.guard(one, False)
        assert one.statistics().tasks_waiting_receive == 0
        send.send_nowait("kept")
        assert await ready.next(default="nothing") == "nothing"
        assert one.receive_nowait() == "kept"


async def test_what_a_source_had_brought_when_it_was_switched_off_comes_when_it_is_on_again():
    sends, (one, other) = channels(2)
    async with select(one, other) as ready:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ready.next)
            await wait_all_tasks_blocked()
            sends[1].send_nowait("wakes it")
        sends[0].send_nowait("first")  # goes to the receive that is under way
        ready.guard(one, False)
        sends[0].send_nowait("second")
        assert await ready.next(default="nothing") == "nothing"
        ready.guard(one, True)
        assert [await ready.next(), await ready.next()] == [(one, "first"), (one, "second")]


async def test_a_source_can_be_switched_off_and_on_while_somebody_waits():
    sends, (one, other) = channels(2)
    async with select(one, other) as ready, trio.open_nursery() as nursery:
        got = []

        async def wait():
            got.append(await ready.next())

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        ready.guard(one, False)
        ready.guard(one, True)
        await wait_all_tasks_blocked()
        sends[0].send_nowait("x")
        await wait_all_tasks_blocked()
        assert got == [(one, "x")]


async def test_all_switched_off_is_an_error_and_no_hang():
    one, other = filled(2, 1)
    async with select(one, other) as ready:
        ready.guard(one, False)
        assert await ready.next() == (other, 0)
        with pytest.raises(RuntimeError, match="switched off: nothing can ever come"):
            await ready.next()


async def test_the_loop_ends_when_the_last_source_is_closed(autojump_clock):
    sends, sources = channels(3, 0)

    async def send(place):
        with sends[place] as end:
            for value in range(place):
                await trio.sleep(1)
                await end.send(value)

    async with trio.open_nursery() as nursery:
        for place in range(3):
            nursery.start_soon(send, place)
        async with select(*sources) as ready:
            got = [(sources.index(source), value) async for source, value in ready]
            assert sorted(got) == [(1, 0), (2, 0), (2, 1)]
            with pytest.raises(trio.EndOfChannel):
                await ready.next()
            with pytest.raises(trio.EndOfChannel):
                await ready.next(default=None)
    assert trio.current_time() == 2


# -- without waiting


async def test_default_is_the_answer_when_nothing_is_ready():
    (send, _), (one, other) = channels(2)
    async with select(one, other) as ready:
        assert await ready.next(default=None) is None
        send.send_nowait(5)
        assert await ready.next(default=None) == (one, 5)
        assert await ready.next(default="still nothing") == "still nothing"
    assert one.statistics().tasks_waiting_receive == 0, "it never began to receive"


@pytest.mark.parametrize("seed", range(20))
async def test_default_is_not_the_answer_when_something_was_sent(monkeypatch, seed):
    shuffle_tasks(monkeypatch, seed)
    sends, sources = channels(3)
    async with select(*sources) as ready:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ready.next)
            await wait_all_tasks_blocked()
            sends[0].send_nowait("wakes it")
        for place in (1, 2, 0):
            sends[place].send_nowait("x")
            assert await ready.next(default=None) == (sources[place], "x")


async def test_a_function_is_started_by_a_call_that_does_not_wait():
    may_end = trio.Event()

    async def question():
        await may_end.wait()
        return "answer"

    async with select(question) as ready:
        assert await ready.next(default=None) is None
        await wait_all_tasks_blocked()
        may_end.set()
        await wait_all_tasks_blocked()
        assert await ready.next(default=None) == (question, "answer")


# -- sources that are no channels


async def test_an_event_is_ready_once():
    event, (source,) = trio.Event(), filled(1, 2)
    async with select(source, event) as ready:
        assert [await ready.next(), await ready.next()] == [(source, 0), (source, 1)]
        event.set()
        assert [found async for found in ready] == [(event, None)]


async def test_a_sleep_goes_on_while_others_are_selected(autojump_clock):
    """It is no timeout between two values, but a timer of its own."""
    tick = partial(trio.sleep, 5)
    send, numbers = trio.open_memory_channel(0)

    async def count():
        for number in range(12):
            await trio.sleep(1)
            await send.send(number)
        send.close()

    at = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        async with select(numbers, tick, biased=True) as ready:
            async for source, value in ready:
                if source is tick:
                    at.append(trio.current_time())
                elif value == 11:
                    break
    assert at == [5, 10]


async def test_a_token_is_a_source_by_its_wait():
    token = CancelToken()
    _, (numbers,) = channels(1)
    async with select(numbers, token.wait) as ready:
        token.cancel("enough")
        assert await ready.next() == (token.wait, None)


@pytest.mark.parametrize("end", [trio.EndOfChannel, StopAsyncIteration])
async def test_a_function_ends_as_a_channel_does_or_as_an_iterator(end):
    left = [1, 2, 3]

    async def pop():
        await checkpoint()
        if not left:
            raise end
        return left.pop(0)

    async with select(pop) as ready:
        assert [value async for _, value in ready] == [1, 2, 3]
        with pytest.raises(trio.EndOfChannel):
            await ready.next()


async def test_what_a_source_raises_is_raised_and_the_source_stays():
    answers = [OSError("first"), "second"]

    async def ask():
        await checkpoint()
        if not answers:
            raise trio.EndOfChannel
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    async with select(ask) as ready:
        with pytest.raises(OSError, match="first"):
            await ready.next()
        assert [value async for _, value in ready] == ["second"]


async def test_a_failure_that_nobody_was_handed_comes_out_of_the_block():
    gate = trio.Event()

    async def fail():
        await gate.wait()
        raise OSError("unseen")

    _open, (source,) = channels(1)
    with pytest.raises(OSError, match="unseen"):
        async with select(source, fail) as ready:
            await begin_to_receive(ready)
            gate.set()
            await wait_all_tasks_blocked()
    gate = trio.Event()
    with pytest.raises(ExceptionGroup) as caught:
        async with select(source, fail) as ready:
            await begin_to_receive(ready)
            gate.set()
            await wait_all_tasks_blocked()
            raise ValueError("the block's own")
    assert [type(error) for error in caught.value.exceptions] == [ValueError, OSError]


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([], ValueError, "at least one source"),
        ([trio.sleep_forever, trio.sleep_forever], ValueError, "one source twice"),
        (["numbers"], TypeError, "receive channels, events and async functions, got 'numbers'"),
    ],
)
async def test_what_is_no_source_is_refused(sources, error, message):
    with pytest.raises(error, match=message):
        async with select(*sources):
            pass


async def test_a_stranger_cannot_be_guarded():
    one, other = filled(2, 1)
    async with select(one) as ready:
        with pytest.raises(ValueError, match="is no source of this select"):
            ready.guard(other, False)


# -- nothing is lost


async def test_what_two_sources_brought_in_the_same_moment_is_kept_for_the_next_call():
    sends, sources = channels(2, 0)
    async with select(*sources) as ready, trio.open_nursery() as nursery:
        first = []

        async def take():
            first.append(await ready.next())

        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        for place, send in enumerate(sends):
            send.send_nowait(place)  # both receives succeed: nobody could run between them
        await wait_all_tasks_blocked()
        second = await ready.next()
    assert sorted([first[0][1], second[1]]) == [0, 1]


async def test_what_was_received_and_not_selected_is_given_back_at_the_end():
    sends, sources = channels(2, 0)
    async with select(*sources) as ready:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ready.next)
            await wait_all_tasks_blocked()
            sends[0].send_nowait("selected")
        sends[1].send_nowait("left")
    assert ready.left == [(sources[1], "left")]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0, 1])
async def test_cancelled_at_any_step_it_loses_no_value_and_leaves_no_task(monkeypatch, seed, size):
    shuffle_tasks(monkeypatch, seed)

    async def scenario(scope):
        sends, sources = channels(2, size)
        got, ready = [], None

        async def send(end):
            with end:
                for value in range(4):
                    await end.send(value)

        async with trio.open_nursery() as nursery:
            for end in sends:
                nursery.start_soon(send, end)
            with scope:
                async with select(*sources) as ready:
                    async for found in ready:
                        got.append(found)
            if ready:
                got += ready.left
            for source in sources:
                got += [(source, value) async for value in source]
        assert sorted((sources.index(source), value) for source, value in got) == [(n, v) for n in (0, 1) for v in range(4)]
        assert all(source.statistics().tasks_waiting_receive == 0 for source in sources)

    assert await cancelled_at_every_step(scenario) > 20


@pytest.mark.parametrize("seed", range(5))
async def test_a_next_that_is_cancelled_at_any_step_has_taken_nothing(monkeypatch, seed):
    shuffle_tasks(monkeypatch, seed)

    async def scenario(scope):
        sends, sources = channels(2, 0)
        got = []

        async def send(end):
            with end:
                for value in range(3):
                    await end.send(value)

        async with trio.open_nursery() as nursery:
            for end in sends:
                nursery.start_soon(send, end)
            async with select(*sources) as ready:
                with scope:
                    async for source, value in ready:
                        got.append((sources.index(source), value))
                async for source, value in ready:
                    got.append((sources.index(source), value))
        for place in (0, 1):
            assert [value for source, value in got if source == place] == [0, 1, 2], got

    assert await cancelled_at_every_step(scenario) > 20


class Round:
    """Random channels, senders, and a consumer that waits, does not wait, is cancelled, switches branches, and leaves."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.sizes = [chance.choice((0, 0, 1, 2)) for _ in range(chance.randint(1, 4))]
        pairs = [trio.open_memory_channel(size) for size in self.sizes]
        self.sends = [pair[0] for pair in pairs]
        self.sources = [pair[1] for pair in pairs]
        self.numbers = [chance.randint(0, 5) for _ in pairs]
        self.got = {source: [] for source in self.sources}

    async def dawdle(self):
        while self.chance.random() < 0.4:
            await checkpoint()

    async def send(self, end, number):
        with end:
            for value in range(number):
                await self.dawdle()
                await end.send(value)

    async def cancel(self, scope):
        await self.dawdle()
        scope.cancel(reason="chance")

    async def select(self):
        """Some steps of a consumer; what it leaves over is received directly."""
        chance = self.chance
        async with select(*self.sources, biased=chance.random() < 0.3) as ready:
            with_end = chance.random() < 0.5
            steps = 100 if with_end else chance.randint(0, 8)
            for _ in range(steps):
                try:
                    await self.step(ready)
                except trio.EndOfChannel:
                    break
        for source, value in ready.left:
            self.got[source].append(value)
        async with trio.open_nursery() as nursery:
            for source in self.sources:
                nursery.start_soon(self.drain, source)

    async def step(self, ready):
        chance = self.chance
        await self.dawdle()
        source = chance.choice(self.sources)
        found = None
        what = chance.random()
        try:
            if what < 0.2:
                found = await ready.next(default=None)
            elif what < 0.4:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.cancel, nursery.cancel_scope)
                    found = await ready.next()
            elif what < 0.6:
                ready.guard(source, chance.random() < 0.5)
            else:
                ready.guard(source, True)
                found = await ready.next()
        except* RuntimeError:
            ready.guard(source, True)
        except* trio.EndOfChannel:
            raise trio.EndOfChannel from None
        if found is not None:
            self.got[found[0]].append(found[1])

    async def drain(self, source):
        async for value in source:
            self.got[source].append(value)

    async def run(self):
        async with trio.open_nursery() as nursery:
            for end, number in zip(self.sends, self.numbers, strict=True):
                nursery.start_soon(self.send, end, number)
            await self.select()
        return [self.got[source] for source in self.sources] == [[*range(number)] for number in self.numbers]


@pytest.mark.limit(600)
@pytest.mark.parametrize(
    "seeds", [range(3_000), *[pytest.param(range(n, n + 25_000), marks=pytest.mark.long) for n in range(0, 100_000, 25_000)]]
)
async def test_random_interleavings_lose_nothing_and_keep_the_order_of_each_source(monkeypatch, seeds):
    """Every value that was sent is selected, left over, or still in its channel: once, and in order."""
    chance = shuffle_tasks(monkeypatch, 0)
    for seed in seeds:
        chance.seed(seed)
        assert await Round(chance).run(), seed
