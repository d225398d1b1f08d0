"""Joins, sets, maps, tokens and deadlines: what they give, and that neither a task nor an exception gets lost."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import suppress
from functools import partial

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from interleaving import cancelled_at_every_step, shuffle_tasks
from trio.testing import MockClock, wait_all_tasks_blocked

import supervisor
from benchmarks.concurrency import TABLES, run_one
from supervisor.concurrency import (
    CancelToken,
    Deadline,
    Error,
    JoinSet,
    Value,
    as_completed,
    join,
    map_concurrent,
    race,
    try_join,
)
from supervisor.errors import DeadlineExceeded

checkpoint = trio.lowlevel.checkpoint


async def after(seconds, value):
    """Sleep, and return the value, or raise it."""
    await trio.sleep(seconds)
    return await after_nothing(value)


async def stubborn(seconds, error):
    """Sleep, and fail instead of going quietly when cancelled."""
    try:
        await trio.sleep(seconds)
    except trio.Cancelled:
        raise error from None


def together(*values):
    """Functions that return, or raise, at the very same moment."""
    everybody = trio.Event()
    left = len(values)

    async def arrive(value):
        nonlocal left
        left -= 1
        if left:
            await everybody.wait()
        else:
            everybody.set()
            await trio.lowlevel.cancel_shielded_checkpoint()
        return await after_nothing(value)

    return [partial(arrive, value) for value in values]


async def after_nothing(value):
    if isinstance(value, BaseException):
        raise value
    return value


class Watched:
    """Functions that note which of them are alive, and why they were cancelled."""

    def __init__(self):
        self.alive = set()
        self.reasons = []

    async def work(self, value, steps=2):
        self.alive.add(value)
        try:
            for _ in range(steps):
                await checkpoint()
            return value
        finally:
            self.alive.remove(value)

    async def sleep(self, value, seconds):
        self.alive.add(value)
        try:
            return await after(seconds, value)
        except trio.Cancelled as cancelled:
            self.reasons.append(cancelled.reason)
            raise
        finally:
            self.alive.remove(value)


@pytest.fixture
def watched():
    return Watched()


# -- join


async def test_join_gives_results_in_order_and_failures_as_data(autojump_clock):
    failure = OSError("no")
    outcomes = await join(partial(after, 3, "slow"), partial(after, 1, failure), partial(after, 2, "fast"))
    assert outcomes == (Value("slow"), Error(failure), Value("fast"))
    assert trio.current_time() == 3, "all at once, and the failure disturbed nobody"


async def test_join_of_nothing_is_nothing():
    assert await join() == ()
    assert await try_join() == ()


async def test_one_timeout_for_a_batch(autojump_clock, watched):
    """Row 37: the batch ends as one, and nothing of it goes on."""
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(5):
            await join(partial(watched.sleep, "a", 1), partial(watched.sleep, "b", 60))
    assert trio.current_time() == 5
    assert watched.alive == set()


async def test_a_join_that_is_cancelled_still_tells_of_failures(autojump_clock):
    failure = OSError("before it was cancelled")
    with pytest.raises(ExceptionGroup) as caught:
        with trio.move_on_after(5):
            await join(partial(after, 1, failure), trio.sleep_forever)
    assert caught.value.exceptions == (failure,)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["ctrl-c", "exit"])
async def test_what_is_no_failure_of_the_function_is_no_data(error, watched):
    with pytest.raises(type(error)):
        await join(partial(after, 0, error), partial(watched.sleep, "other", math.inf))
    assert watched.alive == set()


@pytest.mark.parametrize("construct", [join, try_join])
async def test_a_failure_leaves_no_garbage(construct):
    """No cycle through the traceback: what the failure held is free at once."""

    class Held:
        pass

    async def fail():
        held = Held()
        seen.append(weakref.ref(held))
        raise OSError(held)

    seen = []
    gc.collect()
    gc.disable()
    try:
        with suppress(OSError):
            await construct(fail)
        assert [each() for each in seen] == [None]
    finally:
        gc.enable()


# -- try_join


async def test_try_join_gives_the_values_in_order(autojump_clock):
    number, word = await try_join(partial(after, 3, 1), partial(after, 1, "one"))
    assert (number, word, trio.current_time()) == (1, "one", 3)


async def test_the_first_failure_cancels_the_others_and_comes_out_as_it_is(autojump_clock, watched):
    failure = OSError("no")
    with pytest.raises(OSError) as caught:
        await try_join(partial(watched.sleep, "a", 60), partial(after, 1, failure), partial(watched.sleep, "b", 60))
    assert caught.value is failure
    assert trio.current_time() == 1
    assert watched.alive == set()
    assert all("OSError" in reason for reason in watched.reasons) and len(watched.reasons) == 2


async def test_failures_at_the_same_time_come_out_together(autojump_clock):
    first, second = OSError("first"), ValueError("second")
    with pytest.raises(ExceptionGroup) as caught:
        await try_join(*together(first, second), trio.sleep_forever)
    assert set(caught.value.exceptions) == {first, second}
    with pytest.raises(ExceptionGroup) as caught:
        await try_join(partial(after, 1, first), partial(stubborn, 60, second))
    assert set(caught.value.exceptions) == {first, second}


async def test_a_group_that_a_function_raised_is_not_taken_apart(autojump_clock):
    group = ExceptionGroup("its own", [OSError()])
    with pytest.raises(ExceptionGroup) as caught:
        await try_join(partial(after, 1, group), trio.sleep_forever)
    assert (caught.value.message, caught.value.exceptions) == ("its own", group.exceptions)


async def test_the_context_of_an_exception_is_what_it_was():
    cause = KeyError("cause")

    async def fail():
        try:
            raise cause
        except KeyError:
            raise OSError from None

    with pytest.raises(OSError) as caught:
        await try_join(fail, trio.sleep_forever)
    assert caught.value.__context__ is cause


@pytest.mark.parametrize("construct", [join, try_join, race])
async def test_a_coroutine_in_place_of_a_function_is_refused_before_anything_starts(construct, watched):
    with pytest.raises(TypeError, match=r"expected async functions, got <coroutine.*pass the function itself"):
        await construct(partial(watched.work, 1), watched.work(2))
    assert watched.alive == set()


@pytest.mark.parametrize("construct", [join, try_join, race])
async def test_cancellation_passes_as_cancellation(construct, watched):
    with trio.CancelScope() as scope:
        scope.cancel(reason="outside")
        try:
            await construct(partial(watched.sleep, 1, math.inf), partial(watched.sleep, 2, math.inf))
        except trio.Cancelled as cancelled:
            assert cancelled.reason == "outside"
            raise
    assert scope.cancelled_caught
    assert watched.reasons == ["outside", "outside"]


# -- race


async def test_the_first_to_finish_wins_and_the_losers_are_cancelled(autojump_clock, watched):
    winner = await race(partial(watched.sleep, "slow", 3), partial(watched.sleep, "fast", 1), trio.sleep_forever)
    assert (winner, trio.current_time()) == ("fast", 1)
    assert watched.alive == set()
    assert watched.reasons == ["another one has won the race"]


async def test_a_failure_wins_a_race_too(autojump_clock):
    with pytest.raises(OSError, match="first"):
        await race(partial(after, 2, "value"), partial(after, 1, OSError("first")))
    assert trio.current_time() == 1


@pytest.mark.parametrize("seed", range(5))
async def test_a_loser_that_fails_is_heard(autojump_clock, monkeypatch, seed):
    """In the same moment as the winner, or when it is cancelled."""
    shuffle_tasks(monkeypatch, seed)
    with pytest.raises(OSError, match="lost"):
        await race(*together("won", OSError("lost")))
    with pytest.raises(OSError, match="lost"):
        await race(partial(after, 1, "won"), partial(stubborn, 60, OSError("lost")))
    with pytest.raises(ExceptionGroup) as caught:
        await race(partial(after, 1, ValueError("won")), partial(stubborn, 60, OSError("lost")))
    assert {str(error) for error in caught.value.exceptions} == {"won", "lost"}


async def test_a_value_after_the_winners_is_none():
    """A loser may be done before it is cancelled: there is one winner all the same."""
    assert await race(partial(after, 0, "a")) == "a"

    async def deaf(value):
        with trio.CancelScope(shield=True):
            await checkpoint()
        return value

    assert await race(*[partial(deaf, value) for value in range(5)]) in range(5)


async def test_nobody_wins_a_race_of_none():
    with pytest.raises(ValueError, match="at least one"):
        await race()


async def test_a_request_is_cancelled_from_outside(autojump_clock, watched):
    """Row 33, both ways: a race with the token's wait, and a scope under the token."""
    token = CancelToken()

    async def hang_up():
        await trio.sleep(2)
        token.cancel("the client went away")

    async def request():
        with token.scope() as scope:
            await watched.sleep("request", 60)
        return scope.cancelled_caught

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        assert await race(partial(watched.sleep, "raced", 60), token.wait) is None
    assert trio.current_time() == 2
    assert await request()
    assert watched.alive == set()
    assert watched.reasons == ["another one has won the race", "the client went away"]


# -- JoinSet


async def test_tasks_are_joined_in_the_order_in_which_they_finish(autojump_clock):
    async with JoinSet() as tasks:
        handles = {tasks.spawn(after, seconds, seconds): seconds for seconds in (3, 1, 2)}
        assert len(tasks) == 3
        order = []
        while (handle := await tasks.join_next()) is not None:
            order.append((handles[handle], handle.outcome, trio.current_time()))
        assert len(tasks) == 0
    assert order == [(n, Value(n), n) for n in (1, 2, 3)]


async def test_what_has_finished_is_joined_in_that_order_also_later(autojump_clock):
    async with JoinSet() as tasks:
        for seconds in (3, 1, 2):
            tasks.spawn(after, seconds, seconds)
        await trio.sleep(5)
        assert [handle.outcome.unwrap() for handle in await tasks.join_all()] == [1, 2, 3]


async def test_a_set_grows_while_it_is_joined():
    async def descend(depth):
        await checkpoint()
        if depth:
            tasks.spawn(descend, depth - 1)
            tasks.spawn(descend, depth - 1)
        return depth

    async with JoinSet() as tasks:
        tasks.spawn(descend, 4)
        depths = sorted([handle.outcome.unwrap() async for handle in tasks])
    assert depths == sorted(depth for depth in range(5) for _ in range(2 ** (4 - depth)))


async def test_leaving_the_block_waits_and_the_values_are_kept(autojump_clock):
    async with JoinSet() as tasks:
        tasks.spawn(after, 5, "kept")
    assert trio.current_time() == 5
    assert [handle.outcome async for handle in tasks] == [Value("kept")]


async def test_leaving_the_block_by_an_exception_cancels(autojump_clock, watched):
    with pytest.raises(ValueError, match="the block's"):
        async with JoinSet() as tasks:
            tasks.spawn(watched.sleep, 1, 60)
            await wait_all_tasks_blocked()
            raise ValueError("the block's")
    assert trio.current_time() == 0
    assert watched.alive == set() and len(watched.reasons) == 1


async def test_failures_disturb_nobody_and_come_out_where_nobody_joined_them(autojump_clock):
    seen, unseen, other = OSError("seen"), OSError("unseen"), ValueError("other")
    with pytest.raises(OSError) as caught:
        async with JoinSet() as tasks:
            tasks.spawn(after, 1, seen)
            tasks.spawn(after, 2, unseen)
            tasks.spawn(after, 3, "value")
            handle = await tasks.join_next()
            assert handle.outcome == Error(seen)
    assert caught.value is unseen
    assert trio.current_time() == 3
    assert [handle.outcome async for handle in tasks] == [Value("value")]
    with pytest.raises(ExceptionGroup) as group:
        async with JoinSet() as tasks:
            tasks.spawn(after, 1, unseen)
            await trio.sleep(2)
            raise other
    assert group.value.exceptions == (other, unseen)


async def test_one_task_is_aborted_and_the_others_go_on(autojump_clock, watched):
    async with JoinSet() as tasks:
        tasks.spawn(watched.sleep, "stays", 5)
        doomed = tasks.spawn(watched.sleep, "goes", 60, abortable=True)
        await trio.sleep(1)
        doomed.abort(reason="not wanted")
        assert [handle.outcome async for handle in tasks] == [Value("stays")]
    assert doomed.outcome is None
    assert watched.reasons == ["not wanted"]
    assert trio.current_time() == 5


async def test_a_task_is_aborted_before_it_ran():
    async with JoinSet() as tasks:
        handle = tasks.spawn(after, 0, "never", abortable=True)
        handle.abort(reason="changed my mind")
        assert await tasks.join_next() is None


async def test_an_aborted_task_that_fails_or_finishes_all_the_same_is_joined(autojump_clock):
    async def finish():
        with trio.CancelScope(shield=True):
            await trio.sleep(1)
        return "finished"

    async with JoinSet() as tasks:
        tasks.spawn(finish, abortable=True).abort(reason="no use")
        failing = tasks.spawn(stubborn, 60, OSError("last words"), abortable=True)
        await wait_all_tasks_blocked()
        failing.abort(reason="no use")
        assert {repr(handle.outcome) async for handle in tasks} == {"Error(OSError('last words'))", "Value('finished')"}


async def test_a_task_that_was_not_spawned_for_it_cannot_be_aborted_alone():
    async with JoinSet() as tasks:
        handle = tasks.spawn(after, 0, 1)
        with pytest.raises(RuntimeError, match="abortable=True"):
            handle.abort(reason="x")


async def test_the_first_success_is_enough(autojump_clock, watched):
    """abort_all ends the rest, the block goes on, and join_all is how one says that the rest does not matter."""
    async with JoinSet() as tries:
        tries.spawn(after, 1, OSError("one mirror is down"))
        tries.spawn(watched.sleep, "answer", 2)
        tries.spawn(after, 2, OSError("in the same moment"))  # or it is joined first, and passed over
        tries.spawn(watched.sleep, "too late", 60)
        async for handle in tries:
            if isinstance(handle.outcome, Value):
                break
        tries.abort_all(reason="one answer is enough")
        await tries.join_all()
        assert handle.outcome == Value("answer")
        assert len(tries) == 0
        await trio.sleep(1)
        with pytest.raises(RuntimeError, match="was aborted"):
            tries.spawn(after, 0, 0)
    assert trio.current_time() == 3
    assert watched.reasons == ["one answer is enough"]


async def test_a_block_that_is_being_cancelled_may_still_spawn():
    with trio.CancelScope() as scope:
        async with JoinSet() as tasks:
            tasks.spawn(trio.sleep_forever)
            scope.cancel(reason="test")
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                handle = tasks.spawn(trio.sleep_forever)
                await wait_all_tasks_blocked()
            assert handle.outcome is None and len(tasks) == 0


async def test_a_set_is_for_one_block():
    tasks = JoinSet()
    with pytest.raises(RuntimeError, match="async with"):
        tasks.spawn(after, 0, 0)
    async with tasks:
        with pytest.raises(TypeError, match="coroutine"):
            tasks.spawn(after(0, 0))
    with pytest.raises(RuntimeError):
        tasks.spawn(after, 0, 0)
    with pytest.raises(RuntimeError, match="once"):
        async with tasks:
            pass


async def test_ctrl_c_in_a_task_ends_the_set(watched):
    with pytest.raises(KeyboardInterrupt):
        async with JoinSet() as tasks:
            tasks.spawn(watched.sleep, 1, math.inf)
            tasks.spawn(after, 0, KeyboardInterrupt())
            await tasks.join_next()
    assert watched.alive == set()


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12), st.integers(0, 3))
def test_every_task_is_joined_once_by_whoever_joins(tasks, joiners):
    """Of several that join at once each task goes to one, and all of them learn the end."""

    async def main():
        joined = []

        async def joiner(spawned):
            async for handle in spawned:
                joined.append(handle)

        async with JoinSet() as spawned, trio.open_nursery() as nursery:
            for _ in range(joiners):
                nursery.start_soon(joiner, spawned)
            handles = [spawned.spawn(after, seconds, OSError() if fails else seconds) for seconds, fails in tasks]
            if not joiners:
                joined += await spawned.join_all()
        assert len(joined) == len(handles) and set(joined) == set(handles)

    trio.run(main, clock=MockClock(autojump_threshold=0))


# -- as_completed


async def test_results_come_as_they_are_complete(autojump_clock):
    failure = OSError("no")
    works = [partial(after, 3, "c"), partial(after, 1, failure), partial(after, 2, "b")]
    got = []
    async with as_completed(iter(works)) as completed:
        async for place, outcome in completed:
            got.append((place, outcome, trio.current_time()))
    assert got == [(1, Error(failure), 1), (2, Value("b"), 2), (0, Value("c"), 3)]


async def test_leaving_as_completed_cancels_the_rest_at_once(autojump_clock, watched):
    async with as_completed([partial(watched.sleep, n, n) for n in (1, 60, 61)]) as completed:
        async for place, outcome in completed:
            assert (place, outcome) == (0, Value(1))
            break
    assert trio.current_time() == 1
    assert watched.alive == set()
    assert watched.reasons == ["the block of as_completed was left"] * 2


async def test_a_failure_that_was_not_looked_at_comes_out_of_as_completed(autojump_clock):
    with pytest.raises(OSError, match="unseen"):
        async with as_completed([partial(after, 1, OSError("unseen")), partial(after, 60, 1)]):
            await trio.sleep(2)


# -- map_concurrent


async def double(number):
    await trio.sleep(10 - number % 10)
    return 2 * number


class Flight:
    """A function for map_concurrent that counts how many of it are in flight."""

    def __init__(self):
        self.now = self.most = 0

    async def __call__(self, number):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await double(number)
        finally:
            self.now -= 1


@given(st.integers(0, 30), st.integers(1, 8), st.booleans(), st.booleans())
def test_every_item_once_and_so_many_at_a_time(number, limit, ordered, from_async):
    async def asynchronous():
        for item in range(number):
            await trio.sleep(item % 3)
            yield item

    async def main():
        flight = Flight()
        items = asynchronous() if from_async else range(number)
        async with map_concurrent(flight, items, limit=limit, ordered=ordered) as results:
            got = [result async for result in results]
        assert (got if ordered else sorted(got)) == [2 * item for item in range(number)]
        assert flight.most <= min(limit, number)
        assert from_async or flight.most == min(limit, number)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_the_order_is_kept_or_is_that_of_completion(autojump_clock):
    async with map_concurrent(double, [7, 8, 9], limit=3) as results:
        assert [result async for result in results] == [14, 16, 18]
    async with map_concurrent(double, [7, 8, 9], limit=3, ordered=False) as results:
        assert [result async for result in results] == [18, 16, 14]


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_slow_reader_slows_the_source(autojump_clock, ordered):
    pulled = []

    def items():
        for item in range(100):
            pulled.append(item)
            yield item

    async with map_concurrent(partial(after, 1), items(), limit=3, ordered=ordered) as results:
        taken = 0
        async for _ in results:
            taken += 1
            await trio.sleep(100)
            assert len(pulled) == 3 + taken  # those in hand, and the one whose room has just become free
            if taken == 5:
                break


@pytest.mark.parametrize("kind", ["generator", "async generator"])
async def test_leaving_early_cancels_what_runs_and_closes_the_generator(autojump_clock, watched, kind):
    closed = []

    def items():
        try:
            yield from range(10)
        finally:
            closed.append(trio.current_time())

    async def async_items():
        try:
            for item in range(10):
                yield item
        finally:
            await checkpoint()
            closed.append(trio.current_time())

    source = items() if kind == "generator" else async_items()
    async with map_concurrent(lambda item: watched.sleep(item, 1 + item), source, limit=4) as results:
        async for result in results:
            assert result == 0
            break
    assert closed == [1]
    assert trio.current_time() == 1
    assert watched.alive == set()
    assert watched.reasons == ["the block of map_concurrent was left"] * len(watched.reasons)


async def test_a_channel_stays_open_with_the_items_that_were_not_pulled(autojump_clock):
    send, receive = trio.open_memory_channel(math.inf)
    for item in range(10):
        send.send_nowait(item)
    started = []

    async def work(item):
        started.append(item)
        return await after(1, item)

    async with map_concurrent(work, receive, limit=3) as results:
        assert await anext(results) == 0
    rest = [receive.receive_nowait() for _ in range(receive.statistics().current_buffer_used)]
    assert started + rest == [*range(10)]
    assert len(rest) >= 6


async def test_what_is_done_does_not_wait_for_what_the_source_has_yet_to_bring(autojump_clock):
    async def slow():
        yield 1
        await trio.sleep(60)
        yield 2

    async with map_concurrent(partial(after, 1), slow(), limit=5) as results:
        assert await anext(results) == 1
        assert trio.current_time() == 1
        assert await anext(results) == 2
        assert trio.current_time() == 61


async def fail_at_three(item):
    await trio.sleep(1)
    if item == 3:
        raise OSError("three")
    return item


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_the_first_failure_ends_the_pulling_and_comes_in_its_place(autojump_clock, kind):
    pulled = []

    def items():
        for item in range(100):
            pulled.append(item)
            yield item

    async def async_items():
        for item in items():
            yield item

    async def work(item):
        await trio.sleep(5 if item == 0 else 1)
        if item == 1:
            raise OSError("one")
        return item

    got = []
    with pytest.raises(OSError, match="one"):
        async with map_concurrent(work, items() if kind == "sync" else async_items(), limit=3) as results:
            async for result in results:
                got.append(result)
                await trio.sleep(5)
    assert got == [0]
    assert pulled == [0, 1, 2]


async def test_a_failure_that_nobody_was_handed_comes_out_of_the_block(autojump_clock):
    async with map_concurrent(fail_at_three, range(3), limit=9) as results:
        assert await anext(results) == 0
    with pytest.raises(OSError, match="three"):
        async with map_concurrent(fail_at_three, range(9), limit=9) as results:
            assert await anext(results) == 0
            await trio.sleep(2)


@pytest.mark.parametrize("error", [StopAsyncIteration, trio.EndOfChannel])
async def test_a_failure_that_looks_like_an_end_is_a_failure(error):
    async def fail(item):
        await checkpoint()
        raise error

    with pytest.raises((RuntimeError, trio.EndOfChannel)):
        async with map_concurrent(fail, [1], limit=1) as results:
            async for _ in results:
                pass


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_source_that_fails_does_so_after_what_it_gave(autojump_clock, kind, ordered):
    def items():
        yield from range(3)
        raise OSError("no more")

    async def async_items():
        for item in items():
            yield item

    got = []
    with pytest.raises(OSError, match="no more"):
        source = items() if kind == "sync" else async_items()
        async with map_concurrent(partial(after, 1), source, limit=2, ordered=ordered) as results:
            async for result in results:
                got.append(result)
    assert sorted(got)[:2] == [0, 1]
    assert not ordered or got == [0, 1, 2]


@pytest.mark.parametrize("limit", [0, -1, math.nan])
async def test_a_limit_is_at_least_one(limit):
    with pytest.raises(ValueError, match="at least 1"):
        async with map_concurrent(double, [], limit=limit):
            pass


# -- CancelToken


async def test_a_token_cancels_the_scopes_under_it_wherever_they_are(autojump_clock, watched):
    token = CancelToken()

    async def under(value):
        with token.scope():
            await watched.sleep(value, 60)

    async with trio.open_nursery() as nursery:
        for value in range(3):
            nursery.start_soon(under, value)
        await trio.sleep(1)
        assert not token.cancelled and token.reason is None
        token.cancel("enough")
    assert token.cancelled and token.reason == "enough"
    assert trio.current_time() == 1
    assert watched.reasons == ["enough"] * 3


async def test_a_parent_takes_its_children_and_a_child_only_itself(autojump_clock):
    parent = CancelToken()
    one, other = parent.child(), parent.child()
    grandchild = one.child()
    over = []

    async def under(name, token):
        with token.scope():
            await trio.sleep_forever()
        over.append((name, trio.current_time()))

    async with trio.open_nursery() as nursery:
        for name, token in {"parent": parent, "one": one, "other": other, "grandchild": grandchild}.items():
            nursery.start_soon(under, name, token)
        await trio.sleep(1)
        one.cancel("only one")
        assert (parent.cancelled, one.cancelled, other.cancelled, grandchild.cancelled) == (False, True, False, True)
        await trio.sleep(1)
        parent.cancel("all")
    assert sorted(over) == [("grandchild", 1), ("one", 1), ("other", 2), ("parent", 2)]
    assert (one.reason, grandchild.reason, other.reason) == ("only one", "only one", "all"), "the first reason stands"


async def test_a_token_that_is_cancelled_before_it_is_used_cancels_at_once():
    token = CancelToken()
    token.cancel("before")
    child = token.child()
    for each in (token, child):
        with each.scope() as scope:
            await checkpoint()
            raise AssertionError
        assert scope.cancelled_caught
        await each.wait()
    assert child.reason == "before"


async def test_wait_returns_when_a_token_above_is_cancelled(autojump_clock):
    token = CancelToken()
    grandchild = token.child().child()  # nobody but the grandchild holds the one between

    async def cancel():
        await trio.sleep(3)
        token.cancel("x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        await grandchild.wait()
    assert trio.current_time() == 3


async def test_a_child_that_is_gone_leaves_nothing_behind():
    token = CancelToken()
    gc.disable()
    try:
        children = [token.child() for _ in range(10)]
        for child in children:
            with child.scope():
                await checkpoint()
        gone = [weakref.ref(child) for child in children]
        del child, children
        assert [each() for each in gone] == [None] * 10
        assert len(token._children) == 0 and token._scopes == {}
    finally:
        gc.enable()


async def test_a_deep_tree_of_tokens_is_cancelled():
    tokens = [CancelToken()]
    for _ in range(5000):
        tokens.append(tokens[-1].child())
    tokens[0].cancel("deep")
    assert tokens[-1].cancelled


# -- Deadline


async def test_steps_share_a_deadline_and_see_what_is_left(autojump_clock):
    deadline = Deadline.after(10)
    with deadline.scope():
        await trio.sleep(4)
    assert (deadline.remaining, deadline.expired) == (6, False)
    with pytest.raises(DeadlineExceeded, match="10 s") as caught:
        with deadline.scope():
            await trio.sleep(7)
    assert caught.value.seconds == 10
    assert trio.current_time() == 10
    assert (deadline.remaining, deadline.expired) == (0, True)


async def test_a_deadline_that_is_over_ends_a_step_at_its_first_checkpoint(autojump_clock):
    deadline = Deadline.after(1)
    await trio.sleep(2)
    assert deadline.remaining == 0
    done = []
    with pytest.raises(DeadlineExceeded):
        with deadline.scope():
            done.append("before")
            await checkpoint()
            done.append("after")
    assert done == ["before"]


async def test_a_step_that_is_done_is_not_blamed_for_being_late(autojump_clock):
    deadline = Deadline.after(1)
    with deadline.scope():
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
    assert deadline.expired


async def test_one_deadline_in_several_tasks(autojump_clock):
    deadline = Deadline.after(5)

    async def step(seconds):
        with deadline.scope():
            await trio.sleep(seconds)
        return seconds

    outcomes = await join(*[partial(step, seconds) for seconds in (1, 3, 60)])
    assert outcomes[:2] == (Value(1), Value(3))
    assert isinstance(outcomes[2].error, DeadlineExceeded)
    assert trio.current_time() == 5


async def test_the_deadline_is_not_blamed_for_other_cancellations(autojump_clock):
    deadline = Deadline.after(5)
    with deadline.scope() as scope:
        scope.cancel(reason="by hand")
        await checkpoint()
    with trio.move_on_after(1) as outer:
        with deadline.scope():
            await trio.sleep(60)
    assert outer.cancelled_caught
    failure = OSError("first")
    with pytest.raises(OSError, match="first"):
        with deadline.scope():
            raise failure


async def test_a_deadline_of_infinity_is_none(autojump_clock):
    with Deadline.after(math.inf).scope():
        await trio.sleep(1000)
    with pytest.raises(ValueError, match="not before now"):
        Deadline.after(-1)


# -- cancelled at every step


async def joined(watched):
    await join(*[partial(watched.work, n) for n in range(3)])


async def tried(watched):
    await try_join(*[partial(watched.work, n) for n in range(3)])


async def raced(watched):
    await race(*[partial(watched.work, n, n) for n in range(1, 4)])


async def joinset(watched):
    async with JoinSet() as tasks:
        for n in range(3):
            tasks.spawn(watched.work, n, abortable=n == 1)
        await tasks.join_next()
        tasks.spawn(watched.work, 4)
        async for _ in tasks:
            pass


async def completed(watched):
    async with as_completed(partial(watched.work, n) for n in range(3)) as outcomes:
        async for _ in outcomes:
            pass


async def mapped(watched):
    async with map_concurrent(watched.work, range(5), limit=2) as results:
        async for _ in results:
            pass


async def mapped_async(watched):
    async def items():
        watched.alive.add("the generator")
        try:
            for item in range(5):
                yield item
                await checkpoint()
        finally:
            watched.alive.remove("the generator")

    async with map_concurrent(watched.work, items(), limit=2, ordered=False) as results:
        async for _ in results:
            pass


async def tokens(watched):
    token = CancelToken()

    async def use(token, value):
        with token.scope():
            await watched.work(value, 10)

    async def cancel():
        await checkpoint()
        token.cancel("a task of the scenario")

    try:
        await try_join(partial(use, token, 1), partial(use, token.child(), 2), token.wait, cancel)
    finally:
        assert token._scopes == {}


async def deadlines(watched):
    deadline = Deadline.after(60)
    for step in range(3):
        with deadline.scope():
            await watched.work(step)


CONSTRUCTS = [joined, tried, raced, joinset, completed, mapped, mapped_async, tokens, deadlines]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("construct", CONSTRUCTS, ids=lambda construct: construct.__name__)
async def test_cancelled_at_any_step_it_leaves_nothing_behind(monkeypatch, watched, construct, seed):
    shuffle_tasks(monkeypatch, seed)

    async def scenario(scope):
        over = False
        with scope:
            await construct(watched)
            over = True
        assert over or scope.cancelled_caught
        assert watched.alive == set()

    assert await cancelled_at_every_step(scenario) >= 4


@pytest.mark.parametrize("seed", range(3))
async def test_a_join_that_is_cancelled_at_any_step_has_joined_nothing(monkeypatch, watched, seed):
    """What was not handed over is there for the next who asks."""
    shuffle_tasks(monkeypatch, seed)

    async def scenario(scope):
        values = []
        async with JoinSet() as tasks:
            for n in range(4):
                tasks.spawn(watched.work, n, n)
            with scope:
                async for handle in tasks:
                    values.append(handle.outcome.unwrap())
            values += [handle.outcome.unwrap() for handle in await tasks.join_all()]
        assert sorted(values) == [0, 1, 2, 3]

    assert await cancelled_at_every_step(scenario) > 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_result_that_was_not_handed_over_comes_next(monkeypatch, watched, seed, ordered, kind):
    shuffle_tasks(monkeypatch, seed)

    async def scenario(scope):
        values = []
        send, receive = trio.open_memory_channel(math.inf)
        for item in range(5):
            send.send_nowait(item)
        send.close()
        source = range(5) if kind == "sync" else receive
        async with map_concurrent(watched.work, source, limit=2, ordered=ordered) as results:
            with scope:
                async for value in results:
                    values.append(value)
            async for value in results:
                values.append(value)
        assert sorted(values) == [*range(5)]

    assert await cancelled_at_every_step(scenario) > 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("construct", ["try_join", "race", "join", "joinset", "as_completed", "map_concurrent"])
async def test_whoever_fails_at_whatever_step_is_heard(monkeypatch, construct, seed):
    """Tasks that fail at random moments, a block that is cancelled at any: each failure is handed over, or raised."""
    chance = shuffle_tasks(monkeypatch, seed)
    raised = []

    async def fail_sometime(steps):
        try:
            for _ in range(steps):
                await checkpoint()
        finally:
            raised.append(OSError(steps))
            raise raised[-1]

    async def scenario(scope):
        raised.clear()
        handed = []
        works = [partial(fail_sometime, chance.randint(0, 3)) for _ in range(4)]
        try:
            with scope:
                handed += await heard(construct, works)
        except* OSError as group:
            handed += group.exceptions
        assert {id(error) for error in flat(handed)} == {id(error) for error in raised}

    assert await cancelled_at_every_step(scenario) >= 3


def flat(errors):
    """Without groups."""
    for error in errors:
        if isinstance(error, BaseExceptionGroup):
            yield from flat(error.exceptions)
        else:
            yield error


async def heard(construct, works):
    """Use it, and give the failures that came as data; also those that came before the block ended by another."""
    seen = []
    try:
        await use(construct, works, seen)
    except BaseExceptionGroup as group:
        if not seen:
            raise
        raise BaseExceptionGroup("seen, and raised", [group, *seen]) from None
    except BaseException as error:
        if not seen:
            raise
        raise BaseExceptionGroup("seen, and raised", [error, *seen]) from None
    return seen


async def use(construct, works, seen):
    if construct == "join":
        seen += [outcome.error for outcome in await join(*works)]
    elif construct == "joinset":
        async with JoinSet() as tasks:
            for work in works:
                tasks.spawn(work)
            async for handle in tasks:
                seen.append(handle.outcome.error)
    elif construct == "as_completed":
        async with as_completed(works) as outcomes:
            async for _, outcome in outcomes:
                seen.append(outcome.error)
    elif construct == "map_concurrent":
        async with map_concurrent(lambda work: work(), works, limit=4) as results:
            async for _ in results:
                pass
    else:
        await {"try_join": try_join, "race": race}[construct](*works)


# -- the house


@pytest.mark.parametrize(
    "name", ["CancelToken", "Deadline", "JoinSet", "as_completed", "join", "map_concurrent", "race", "select", "try_join"]
)
def test_the_names_are_public(name):
    assert name in supervisor.__all__
    assert getattr(supervisor, name) is getattr(supervisor.concurrency, name)


@pytest.mark.parametrize("what", TABLES)
def test_the_benchmark_measures_every_way(monkeypatch, what):
    monkeypatch.setattr("benchmarks.concurrency.SHORT", 0)
    for way in TABLES[what]:
        assert run_one(what, way, 32) > 0
