"""Streams: what comes through, in which order, how far ahead the source is asked, and that it is closed at once."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import AsyncIterator

import hypothesis
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from supervisor.streams import Stream


class Spy:
    """A source that tells how often it was asked, and whether it is closed; `fails` in place of its last item."""

    def __init__(self, count: int = 1_000_000, fails: bool = False) -> None:
        self.count = count
        self.fails = fails
        self.pulled = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[int]:
        try:
            for number in range(self.count):
                await trio.lowlevel.checkpoint()
                if self.fails and number == self.count - 1:
                    raise KeyError(number)
                self.pulled += 1
                yield number
        finally:
            self.closed = True


async def same(item):
    await trio.lowlevel.checkpoint()
    return item


async def through_by_hand(items, add):
    async for item in items:
        yield item + add


STAGES = {
    "nothing": lambda stream: stream,
    "map": lambda stream: stream.map(lambda item: item),
    "filter": lambda stream: stream.filter(lambda item: True),
    "then": lambda stream: stream.then(same),
    "take": lambda stream: stream.take(1_000_000),
    "skip": lambda stream: stream.skip(0),
    "through": lambda stream: stream.through(through_by_hand, 0),
    "chunks": lambda stream: stream.chunks(1).map(sum),
    "chunks within": lambda stream: stream.chunks(1, within=60).map(sum),
    "buffered": lambda stream: stream.map(same).buffered(3),
    "buffer_unordered": lambda stream: stream.map(same).buffer_unordered(1),
    "merge": lambda stream: stream.merge(Stream([])),
    "throttle": lambda stream: stream.throttle(1e6),
    "timeout": lambda stream: stream.timeout(60),
    "all": lambda stream: (
        stream.map(same).buffered(2).then(same).chunks(2, within=60).map(min).merge(Stream([])).timeout(60).skip(1).take(9)
    ),
}
AHEAD = {"chunks within": 0, "buffered": 3, "buffer_unordered": 1, "merge": 1}
"""How many items beyond those that the consumer has taken a stage may ask for."""

every_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


# -- values and what is done to them --------------------------------------------------------------------------------------


@st.composite
def pipelines(draw) -> tuple[list[int], list[tuple[str, int]]]:
    names = [
        *("map", "filter", "then", "take", "skip", "chunks", "chunks within", "buffered", "merge"),
        *("timeout", "throttle", "through"),
    ]
    steps = st.lists(st.tuples(st.sampled_from(names), st.integers(1, 7)), max_size=6)
    return draw(st.lists(st.integers(-50, 50), max_size=40)), draw(steps)


def piped(stream: Stream[int], name: str, n: int) -> Stream[int]:
    async def add_late(item: int) -> int:
        await trio.sleep(abs(item) % 3)
        return item + n

    match name:
        case "map":
            return stream.map(lambda item: item + n)
        case "filter":
            return stream.filter(lambda item: item % n)
        case "then":
            return stream.then(add_late)
        case "chunks":
            return stream.chunks(n).map(sum)
        case "chunks within":
            return stream.chunks(n, within=1e6).map(sum)
        case "buffered":
            return stream.map(add_late).buffered(n)
        case "merge":
            return Stream([]).merge(stream, Stream([]))
        case "timeout":
            return stream.timeout(1e6)
        case "throttle":
            return stream.throttle(n)
        case "through":
            return stream.through(through_by_hand, n)
    return getattr(stream, name)(n)


def modelled(items: list[int], name: str, n: int) -> list[int]:
    match name:
        case "map" | "then" | "buffered" | "through":
            return [item + n for item in items]
        case "filter":
            return [item for item in items if item % n]
        case "take":
            return items[:n]
        case "skip":
            return items[n:]
        case "chunks" | "chunks within":
            return [sum(items[at : at + n]) for at in range(0, len(items), n)]
    return items


@given(pipelines())
@hypothesis.example(([1, 2, 3, 4], [("filter", 2), ("filter", 3), ("map", 1), ("filter", 4)]))
@hypothesis.settings(max_examples=200)
def test_any_pipeline_is_its_list_comprehension(pipeline):
    items, steps = pipeline
    stream, model = Stream(items), items
    for name, n in steps:
        stream, model = piped(stream, name, n), modelled(model, name, n)

    async def main() -> None:
        assert await stream.collect() == model
        assert await stream.fold(0, lambda total, item: total + item) == sum(model), "it can be opened again"
        seen: list[int] = []

        async def see(item: int) -> None:
            seen.append(item)

        await stream.for_each(see)
        assert seen == model

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_a_stream_is_made_of_anything_that_gives_items():
    async def hand_written() -> AsyncIterator[int]:
        yield 1
        yield 2

    @trio.as_safe_channel
    async def safe() -> AsyncIterator[int]:
        yield 3

    send, receive = trio.open_memory_channel[int](2)
    with send:
        send.send_nowait(4)
    assert await Stream(hand_written()).merge(Stream(safe()), Stream.from_channel(receive)).map(str).filter(len).collect()
    assert sorted(await Stream(hand_written()).merge(Stream(safe())).collect()) == [1, 2, 3]
    with pytest.raises(trio.ClosedResourceError):
        receive.receive_nowait()
    assert await Stream("abc").collect() == ["a", "b", "c"]
    assert await Stream(iter(range(3))).skip(1).collect() == [1, 2]


async def test_what_is_no_source_is_refused_where_it_is_given():
    with pytest.raises(TypeError, match="a stream is made of an iterable, an async iterable or a context of one, not of 3"):
        Stream(3)  # type: ignore[arg-type]
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"buffered: expected a whole number of at least 1, got {wrong}"):
            Stream([]).buffered(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0, got 0"):
        Stream([1]).timeout(0)
    with pytest.raises(ValueError, match="above 0, got -1"):
        Stream([1]).chunks(2, within=-1)
    with pytest.raises(ValueError, match="expected a rate"):
        Stream([1]).throttle("often")
    with pytest.raises(ValueError, match="'skip', 'burst', 'delay', not 'later'"):
        Stream.interval(1, late="later")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0, not 0"):
        Stream.interval(0)


async def test_iterating_without_a_block_says_how_to():
    with pytest.raises(TypeError, match=r"async with stream\.open\(\) as items: async for item in items"):
        async for _ in Stream([1]):  # type: ignore[attr-defined]
            pass


async def test_values_without_end_let_others_have_their_turn():
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with trio.CancelScope() as scope:
            await Stream(itertools.count()).filter(lambda number: turns >= 10 and scope.cancel(reason="enough")).collect()
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel(reason="the test is over")


# -- backpressure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STAGES if name != "all"])
async def test_nothing_is_asked_for_ahead_but_what_a_buffer_holds(name, autojump_clock):
    spy = Spy()
    async with STAGES[name](Stream(spy)).open() as items:
        await wait_all_tasks_blocked()
        assert spy.pulled <= AHEAD.get(name, 0)
        for taken in range(1, 6):
            await anext(items)
            await wait_all_tasks_blocked()
            assert spy.pulled <= taken + AHEAD.get(name, 0)
        assert spy.pulled == 5 + AHEAD.get(name, 0)


async def test_take_asks_for_no_item_that_it_does_not_give():
    spy = Spy()
    assert await Stream(spy).take(3).collect() == [0, 1, 2]
    assert spy.pulled == 3
    spy = Spy()
    assert await Stream(spy).take(0).collect() == []
    assert spy.pulled == 0


async def test_a_chunk_in_the_making_asks_for_its_items_and_then_for_none(autojump_clock):
    spy = Spy()
    async with Stream(spy).chunks(4, within=60).open() as chunks:
        for taken in (4, 8):
            assert len(await anext(chunks)) == 4
            await wait_all_tasks_blocked()
            assert spy.pulled == taken


async def test_a_producer_into_a_channel_is_held_by_the_consumer():
    produced = 0

    async def produce(send: trio.MemorySendChannel[int]) -> None:
        nonlocal produced
        with send:
            for produced in range(1, 1000):
                await send.send(produced)

    send, receive = trio.open_memory_channel[int](2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce, send)
        async with Stream.from_channel(receive).map(str).open() as items:
            for taken in range(1, 4):
                assert await anext(items) == str(taken)
                await wait_all_tasks_blocked()
                assert produced == taken + 2 + 1, "two in the channel, and one that waits to get in"
            nursery.cancel_scope.cancel(reason="the test is over")


# -- the end --------------------------------------------------------------------------------------------------------------


@every_stage
async def test_break_closes_the_source_at_once(stage, autojump_clock):
    spy = Spy()
    async with stage(Stream(spy)).open() as items:
        async for _ in items:
            break
        assert not spy.closed
    assert spy.closed


@every_stage
async def test_an_exception_closes_the_source_at_once_and_comes_out_as_it_is(stage, autojump_clock):
    spy, error = Spy(), LookupError("mine")
    with pytest.raises(LookupError) as caught:
        async with stage(Stream(spy)).open() as items:
            async for _ in items:
                raise error
    assert spy.closed
    assert caught.value is error


@every_stage
async def test_a_group_of_the_block_is_not_taken_apart(stage, autojump_clock):
    group = ExceptionGroup("mine", [ValueError(1)])
    with pytest.raises(ExceptionGroup) as caught:
        async with stage(Stream(Spy())).open() as items:
            await anext(items)
            raise group
    assert caught.value.message == "mine"
    assert caught.value.exceptions == group.exceptions


@every_stage
async def test_cancellation_closes_the_source_at_once(stage, autojump_clock):
    spy = Spy()
    with trio.move_on_after(1) as scope:
        async with stage(Stream(spy)).open() as items:
            await anext(items)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert spy.closed


@every_stage
async def test_the_last_item_closes_the_source(stage, autojump_clock):
    spy = Spy(20)
    assert await stage(Stream(spy)).collect()
    assert spy.closed


@every_stage
async def test_an_error_of_the_source_comes_out_alone_after_what_came_before_it(stage, autojump_clock):
    spy, seen = Spy(20, fails=True), []
    with pytest.raises(KeyError, match="19"):
        async with stage(Stream(spy)).open() as items:
            async for item in items:
                seen.append(item)
    assert spy.closed
    if stage is not STAGES["all"]:
        assert seen == list(range(19))


@every_stage
async def test_an_error_can_be_met_in_the_block(stage, autojump_clock):
    async with stage(Stream(Spy(4, fails=True))).open() as items:
        with pytest.raises(KeyError):
            async for _ in items:
                pass
        await trio.sleep(1)  # the block is not cancelled
        with pytest.raises(StopAsyncIteration):
            await anext(items)


@every_stage
async def test_the_source_closes_before_what_it_was_made_of(stage, autojump_clock):
    """Stages are closed from the consumer on: none is asked after the one that it asks has gone."""
    closed: list[str] = []

    async def source() -> AsyncIterator[int]:
        try:
            for number in range(100):
                await trio.lowlevel.checkpoint()
                yield number
        finally:
            closed.append("source")

    async def last(items: AsyncIterator[int]) -> AsyncIterator[int]:
        try:
            async for item in items:
                yield item
        finally:
            closed.append("last")

    async with stage(Stream(source())).through(last).open() as items:
        await anext(items)
    assert closed == ["last", "source"]


async def test_an_iterator_of_values_is_closed_too():
    def values():
        try:
            yield from range(10)
        finally:
            closed.append(True)

    closed: list[bool] = []
    source = values()  # this name keeps it alive
    async with Stream(source).map(str).open() as items:
        await anext(items)
        assert not closed
    assert closed


async def test_closing_a_channel_does_not_hide_an_error_from_one_who_is_cancelled():
    send, receive = trio.open_memory_channel[int](1)
    send.send_nowait(1)
    with pytest.raises(LookupError):
        with trio.CancelScope() as scope:
            async with Stream.from_channel(receive).open() as items:
                await anext(items)
                scope.cancel(reason="the test wants to know")
                raise LookupError
    send.close()


class CancelAt(trio.abc.Instrument):
    """Cancels a scope at the n-th step of any task."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.scope = trio.CancelScope()

    def before_task_step(self, task: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.scope.cancel(reason="the test wants to know")


@every_stage
def test_cancelled_at_any_step_nothing_is_left(stage):
    async def main(canceller: CancelAt) -> bool:
        spy, before = Spy(6), trio.lowlevel.current_statistics().tasks_living
        with canceller.scope:
            await stage(Stream(spy)).collect()
        assert spy.closed or not spy.pulled
        assert trio.lowlevel.current_statistics().tasks_living == before
        return canceller.scope.cancelled_caught

    finished = 0
    for step in itertools.count(3):
        canceller = CancelAt(step)
        was_cancelled = trio.run(main, canceller, instruments=[canceller], clock=MockClock(autojump_threshold=0))
        finished = 0 if was_cancelled else finished + 1
        if finished == 20:
            break
    gc.collect()  # a generator that was left is an error here
    assert step > 20


# -- errors of several ----------------------------------------------------------------------------------------------------


async def test_several_that_really_failed_come_out_as_a_group(autojump_clock):
    async def fail(item: int) -> int:
        await trio.sleep(1)
        raise ValueError(item)

    with pytest.raises(ExceptionGroup) as caught:
        await Stream(range(2)).map(fail).buffer_unordered(2).collect()
    assert sorted(error.args for error in caught.value.exceptions) == [(0,), (1,)]


async def test_in_order_the_error_comes_in_its_place_and_one_behind_it_that_failed_too_is_not_lost(autojump_clock):
    async def fail(item: int) -> int:
        if item == 0:
            await trio.sleep(3)
        elif item < 3:
            await trio.sleep(item)
            raise ValueError(item)
        else:
            await trio.sleep_forever()
        return item

    seen = []
    with pytest.raises(ExceptionGroup) as caught:
        async with Stream(range(9)).map(fail).buffered(4).open() as items:
            async for item in items:
                seen.append((item, trio.current_time()))
    assert seen == [(0, 3.0)]
    assert sorted(error.args for error in caught.value.exceptions) == [(1,), (2,)]


async def test_an_error_that_nobody_asked_for_yet_is_raised_at_the_end_of_the_block(autojump_clock):
    def stream() -> Stream[int]:
        return Stream(Spy(2, fails=True)).map(same).buffered(3)

    with pytest.raises(KeyError):
        async with stream().open() as items:
            await anext(items)
            await trio.sleep(1)
    with pytest.raises(ExceptionGroup) as caught:
        async with stream().open() as items:
            await anext(items)
            await trio.sleep(1)
            raise ValueError("mine")
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ValueError}


async def test_cancelled_at_the_same_time_as_a_failure_it_is_the_failure_that_comes_out(autojump_clock):
    async def fail(item: int) -> int:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError(item)
        return item

    with pytest.raises(ValueError, match="0"):
        with trio.move_on_after(1):
            await Stream([0]).map(fail).buffered(2).collect()


# -- several at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
async def test_so_many_run_at_a_time_and_no_more(ordered, autojump_clock):
    running = most = 0

    async def work(seconds: float) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(seconds)
        running -= 1
        return seconds

    stream = Stream([4, 1, 2, 1.5, 6, 3]).map(work)
    results = await (stream.buffered(3) if ordered else stream.buffer_unordered(3)).collect()
    assert most == 3
    assert results == ([4, 1, 2, 1.5, 6, 3] if ordered else [1, 2, 1.5, 4, 3, 6])
    assert trio.current_time() == (10.0 if ordered else 8.0)


async def test_in_order_results_that_wait_hold_their_places(autojump_clock):
    started = []

    async def work(item: int) -> int:
        started.append((item, trio.current_time()))
        await trio.sleep(10 if item == 0 else 1)
        return item

    assert await Stream(range(5)).map(work).buffered(2).collect() == [0, 1, 2, 3, 4]
    assert started == [(0, 0.0), (1, 0.0), (2, 10.0), (3, 10.0), (4, 11.0)]


async def test_calls_that_run_when_the_stream_is_left_are_cancelled_and_waited_for(autojump_clock):
    ended = []

    async def work(item: int) -> int:
        try:
            await trio.sleep(item)
        finally:
            ended.append(item)
        return item

    async with Stream([1, 50, 60]).map(work).buffered(3).open() as items:
        assert await anext(items) == 1
        assert ended == [1]
    assert sorted(ended) == [1, 50, 60]
    assert trio.current_time() == 1.0


async def test_merged_items_come_as_they_come_and_none_is_preferred(autojump_clock):
    async def every(seconds: float, name: str) -> AsyncIterator[tuple[float, str]]:
        for _ in range(3):
            await trio.sleep(seconds)
            yield trio.current_time(), name

    found = await Stream(every(2, "a")).merge(Stream(every(2.5, "b")), Stream(every(4.5, "c"))).collect()
    assert found == [
        *((2.0, "a"), (2.5, "b"), (4.0, "a"), (4.5, "c"), (5.0, "b"), (6.0, "a"), (7.5, "b"), (9.0, "c"), (13.5, "c")),
    ]
    busy = await Stream("a" * 50).merge(Stream("b" * 50)).take(40).collect()
    assert 18 <= busy.count("a") <= 22


async def test_a_merge_goes_on_until_the_last_source_has_ended_and_closes_each_at_its_end(autojump_clock):
    short, long = Spy(2), Spy(2000)
    async with Stream(short).merge(Stream(long)).open() as items:
        for _ in range(10):
            await anext(items)
        assert short.closed
        assert not long.closed
    assert long.closed


async def test_one_failing_source_ends_a_merge_and_closes_the_others(autojump_clock):
    endless = Spy()
    with pytest.raises(KeyError):
        await Stream(endless).merge(Stream(Spy(5, fails=True))).for_each(same)
    assert endless.closed


# -- chunks in time -------------------------------------------------------------------------------------------------------


async def at_times(*times: float) -> AsyncIterator[float]:
    for time in times:
        await trio.sleep_until(time)
        yield time


async def chunks_with_times(stream: Stream[float], size: int, within: float) -> list[tuple[float, list[float]]]:
    found = []
    async with stream.chunks(size, within=within).open() as chunks:
        async for chunk in chunks:
            found.append((trio.current_time(), chunk))
    return found


async def test_a_chunk_is_cut_by_count_or_by_the_time_since_its_first_item(autojump_clock):
    stream = Stream(at_times(1, 1.5, 1.75, 5, 5.5, 5.75, 5.8, 9))
    assert await chunks_with_times(stream, 4, 2) == [(3.0, [1, 1.5, 1.75]), (5.8, [5, 5.5, 5.75, 5.8]), (9.0, [9])]


async def test_time_runs_only_while_there_is_an_item(autojump_clock):
    assert await chunks_with_times(Stream(at_times(100, 200)), 5, 1) == [(101.0, [100]), (200.0, [200])]


async def test_the_time_of_a_chunk_begins_when_somebody_wants_it(autojump_clock):
    found = []
    async with Stream(at_times(1, 1.5, 2.5, 12.5, 14)).chunks(9, within=1).open() as chunks:
        async for chunk in chunks:
            found.append((trio.current_time(), chunk))
            await trio.sleep(10)
    assert found == [(2.0, [1, 1.5]), (13.0, [2.5, 12.5]), (23.0, [14])]


gaps = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), max_size=30)


@given(gaps, st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.5, 1.0]))
@hypothesis.settings(max_examples=200)
def test_no_item_is_lost_whenever_it_comes(waits, size, within, busy):
    """Times in halves: again and again an item comes in the very moment of a cut."""
    times = list(itertools.accumulate(waits))

    async def main() -> None:
        found: list[list[float]] = []
        begun = trio.current_time()
        async with Stream(at_times(*(begun + time for time in times))).chunks(size, within=within).open() as chunks:
            asked = trio.current_time()
            async for chunk in chunks:
                assert trio.current_time() <= max(asked, chunk[0]) + within
                assert 1 <= len(chunk) <= size
                found.append(chunk)
                await trio.sleep(busy)
                asked = trio.current_time()
        assert [time - begun for chunk in found for time in chunk] == times

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_a_wait_for_a_chunk_that_is_cancelled_in_the_block_ends_the_stream_not_the_block(autojump_clock):
    """As with any async generator: who wants to wait with a limit and go on uses `timeout`, or a channel."""
    async with Stream(at_times(5)).chunks(2, within=1).open() as chunks:
        with trio.move_on_after(1):
            await anext(chunks)
        assert trio.current_time() == 1.0


# -- time -----------------------------------------------------------------------------------------------------------------


async def ticks(late: str, busy: dict[int, float], count: int) -> list[tuple[float, int]]:
    found = []
    async with Stream.interval(1.0, late=late).take(count).open() as numbers:  # type: ignore[arg-type]
        async for number in numbers:
            found.append((trio.current_time(), number))
            await trio.sleep(busy.get(number, 0.25))
    return found


async def test_an_interval_does_not_drift(autojump_clock):
    await trio.sleep(0.3)
    async with Stream.interval(0.1).take(10_001).open() as numbers:
        start = trio.current_time()
        async for number in numbers:
            assert math.isclose(trio.current_time(), start + number * 0.1, rel_tol=1e-12)
            await trio.sleep(0.07)
    assert number == 10_000


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        ("skip", [(0.0, 0), (1.0, 1), (4.25, 2), (5.0, 5), (6.0, 6)]),
        ("burst", [(0.0, 0), (1.0, 1), (4.25, 2), (4.5, 3), (4.75, 4), (5.0, 5), (6.0, 6)]),
        ("delay", [(0.0, 0), (1.0, 1), (4.25, 2), (5.25, 3), (6.25, 4)]),
    ],
)
async def test_what_becomes_of_late_ticks_is_chosen(late, expected, autojump_clock):
    assert await ticks(late, {1: 3.25}, len(expected)) == expected


async def test_a_throttle_spaces_items_evenly_and_saves_nothing_up(autojump_clock):
    found = []
    async with Stream(at_times(0, 0, 0, 5, 5, 5.1)).throttle("120/m").open() as items:
        async for _ in items:
            found.append(trio.current_time())
    assert found == [0, 0.5, 1.0, 5, 5.5, 6.0]


async def test_a_throttle_holds_the_source(autojump_clock):
    spy = Spy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Stream(spy).throttle(2.0).for_each, same)
        await trio.sleep(10.1)
        assert spy.pulled == 22, "one every half a second, the first at once, and the one that waits"
        nursery.cancel_scope.cancel(reason="the test is over")


async def test_a_timeout_counts_from_when_an_item_is_asked_for(autojump_clock):
    seen = []
    with pytest.raises(trio.TooSlowError, match="no item came within 2 s"):
        async with Stream(at_times(1, 2.5, 10, 13)).timeout(2).open() as items:
            async for item in items:
                seen.append(item)
                if item == 2.5:
                    await trio.sleep(7)
    assert seen == [1, 2.5, 10]
    assert trio.current_time() == 12.0
