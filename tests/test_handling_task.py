"""What the worker of a queue job of kind `task` does with an item, and what an item must be: the same for all functions."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import functools
from typing import Any, TypedDict

import msgspec
import pytest
import structlog.testing
import trio
from house import open_house, open_worker

from supervisor.errors import BadItem, RunFailed, UnfitItem
from supervisor.kinds import Context
from supervisor.kinds.function import CallableNotFound
from supervisor.kinds.payload import loaded
from supervisor.state import Phase


@pytest.fixture
async def house(tmp_path):
    async with open_house(tmp_path / "logs") as house:
        yield house


@dataclasses.dataclass
class Image:
    path: str
    width: int = 100


class Row(TypedDict):
    id: int


class Size(msgspec.Struct):
    width: int


async def shown(item: Any) -> str:
    return repr(item)


def taking(kind: Any) -> Any:
    """A function that shows the item, which it takes as a `kind`."""

    async def function(item) -> str:
        return repr(item)

    function.__annotations__["item"] = kind
    return function


# ---- what an item must be ----


@pytest.mark.parametrize(
    ("kind", "item", "got"),
    [
        (Any, '{"a": [1, null]}', "{'a': [1, None]}"),
        (Image, '{"path": "a.jpg"}', "Image(path='a.jpg', width=100)"),
        (Size, '{"width": 3}', "Size(width=3)"),
        (Row, '{"id": 1}', "{'id': 1}"),
        (int, "1", "1"),
        (float, "1", "1.0"),
        (list[int], "[1, 2]", "[1, 2]"),
        (tuple[int, str], '[1, "a"]', "(1, 'a')"),
        (dict[int, bool], '{"1": true}', "{1: True}"),
        (Image | None, "null", "None"),
        (datetime.date, '"2026-01-02"', "datetime.date(2026, 1, 2)"),
        (decimal.Decimal, '"0.10"', "Decimal('0.10')"),
        (bytes, '"AQI="', "b'\\x01\\x02'"),
        ("Unknown | Type", '{"a": 1}', "{'a': 1}"),
    ],
)
async def test_it_is_converted_to_what_the_first_parameter_is_annotated_as(house, kind, item, got):
    async with open_worker(house, kind="task", call=taking(kind)) as worker:
        assert await worker.json(item) == msgspec.json.encode(got).decode()


@pytest.mark.parametrize(
    ("kind", "item", "why"),
    [
        (int, '"1"', "takes: expected `int`, got `str`"),
        (int, "1.5", "takes: expected `int`, got `float`"),
        (str, "1", "takes: expected `str`, got `int`"),
        (Image, '{"width": 1}', "takes: object missing required field `path`"),
        (list[Image], '[{"path": "a"}, {"path": 1}]', "takes: expected `str`, got `int` - at `$[1].path`"),
        (Any, "{a}", "the item is no JSON: JSON is malformed"),
        (Any, "", "the item is no JSON: input data was truncated"),
        (Any, "[" * 10_000 + "]" * 10_000, "the item is no JSON: maximum recursion depth exceeded"),
    ],
)
async def test_one_that_does_not_fit_is_a_failure_that_nothing_mends(house, kind, item, why):
    async with open_worker(house, kind="task", call=taking(kind)) as worker:
        with pytest.raises(UnfitItem) as caught:
            await worker.json(item)
        assert why in str(caught.value)
        assert isinstance(caught.value, BadItem) and isinstance(caught.value, RunFailed)
        assert caught.value.positions == ()


async def test_of_a_batch_it_is_said_which_do_not_fit(house):
    async with open_worker(house, kind="task", call=taking(list[int]), batch={"size": 4}) as worker:
        assert await worker([1, 2]) == "[1, 2]"
        with pytest.raises(UnfitItem, match="expected `int`, got `str`") as caught:
            await worker([1, "a", 2, None])
        assert caught.value.positions == (1, 3)


async def test_a_parameter_that_no_json_can_become_is_said_at_the_start(house):
    call = taking(list[Size] | tuple[Size, ...])
    with pytest.raises(CallableNotFound, match=r"no JSON can be converted to its parameter `item: list\[.*Size\] \|"):
        async with open_worker(house, kind="task", call=call):
            raise AssertionError


# ---- how it is called ----


async def test_the_item_is_its_first_parameter_wherever_the_context_and_the_args_are(house):
    async def usual(item: int, ctx: Context, *, word: str = "") -> Any:
        return [item, ctx.job, word]

    async def turned(ctx: Context, item: int, word: str) -> Any:
        return [item, ctx.job, word]

    async def positional(item: int, /, word: str) -> Any:
        return [item, "job", word]

    async def starred(ctx: Context, *items: int, word: str) -> Any:
        return [*items, ctx.job, word]

    async def last(word: str, item: int, ctx: Context) -> Any:
        return [item, ctx.job, word]

    for call in (usual, turned, positional, starred, functools.partial(last, "w")):
        args = {} if isinstance(call, functools.partial) else {"word": "w"}
        async with open_worker(house, kind="task", call=call, args=args) as worker:
            assert await worker(7) == [7, "job", "w"]


async def test_one_that_takes_no_item_is_none_for_a_queue(house):
    async def deaf(ctx: Context, *, word: str = "") -> None: ...

    with pytest.raises(
        CallableNotFound, match="deaf takes no item: the function of a queue job gets it as its first parameter"
    ):
        async with open_worker(house, kind="task", call=deaf):
            raise AssertionError


async def test_the_context_knows_the_item_and_the_attempt(house):
    async def handle(item: int, ctx: Context) -> Any:
        ctx.log.info("handling", size=item)
        ctx.progress(item, 10)
        return [ctx.item, ctx.attempt, ctx.run, ctx.worker]

    with structlog.testing.capture_logs() as logs:
        async with open_worker(house, kind="task", call=handle) as worker:
            assert await worker(1) == ["item1", 1, "job#1", 0]
            assert await worker(2, attempt=3) == ["item2", 3, "job#1", 0]
            assert worker.notes.far == [(1, 10), (2, 10)]
    assert logs[1] == {"job": "job", "run": "job#1", "item": "item2", "event": "handling", "size": 2, "log_level": "info"}


# ---- what comes of it ----


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, None),
        (Image("a"), '{"path":"a","width":100}'),
        ({1: {2}}, '{"1":[2]}'),
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        (float("nan"), "null"),
    ],
)
async def test_what_it_returns_is_the_result_as_json(house, value, got):
    async def give(item: Any) -> Any:
        return value

    async with open_worker(house, kind="task", call=give) as worker:
        assert await worker.json("0") == got


async def test_what_is_no_json_is_a_failure_that_says_so(house):
    endless: list[Any] = []
    endless.append(endless)

    async def give(item: Any) -> Any:
        return object() if item else endless

    async with open_worker(house, kind="task", call=give) as worker:
        with pytest.raises(TypeError, match="the function returned what is no JSON: encoding objects of type object is uns"):
            await worker(1)
        with pytest.raises(TypeError, match="the function returned what is no JSON: "):
            await worker(0)


async def test_what_it_raises_is_raised(house):
    async def bad(item: Any) -> None:
        raise KeyError(item)

    async with open_worker(house, kind="task", call=bad) as worker:
        work = worker.work()
        with pytest.raises(KeyError):
            await worker.handler.handle(work, b"1")
        assert work.begun


async def test_one_that_takes_a_context_hears_a_stop_and_the_other_does_not(house):
    async def deaf(item: Any) -> None: ...

    async def hears(item: Any, ctx: Context) -> bool:
        await ctx.wait_stopping()
        return ctx.stopping

    async with open_worker(house, kind="task", call=deaf) as worker:
        assert not worker.handler.hears
    async with open_worker(house, kind="task", call=hears) as worker, trio.open_nursery() as nursery:
        assert worker.handler.hears
        work, got = worker.work(until=trio.current_time() + 3600), []
        nursery.start_soon(_into, got, worker.handler, work)
        await trio.testing.wait_all_tasks_blocked()
        work.advance(Phase.STOPPING)
    assert got == [b"true"]


async def _into(got, handler, work):
    got.append(await handler.handle(work, b"1"))


async def test_a_stop_alone_does_not_end_a_call_that_hears_nothing(house):
    go = trio.Event()

    async def deaf(item: Any) -> int:
        await go.wait()
        return 1

    async with open_worker(house, kind="task", call=deaf) as worker, trio.open_nursery() as nursery:
        work, got = worker.work(until=trio.current_time() + 3600), []
        nursery.start_soon(_into, got, worker.handler, work)
        await trio.testing.wait_all_tasks_blocked()
        work.advance(Phase.STOPPING)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        go.set()
    assert got == [b"1"]


# ---- before it is put ----


def test_an_item_can_be_checked_before_it_is_put():
    function = loaded(taking(Image))
    assert function.typed
    function.read(b'{"path": "a"}')
    with pytest.raises(UnfitItem, match="object missing required field `path`"):
        function.read(b"{}")


@pytest.mark.parametrize("call", ["not_loaded:f", "tests.test_handling_task:nothing"])
def test_nothing_is_loaded_to_check_it(call):
    assert loaded(call) is None


@pytest.mark.parametrize(
    ("type", "batch", "typed"),
    [(Any, False, False), (object, False, False), (int, False, True), (list, False, True), (list, True, False),
     (list[int], True, True)],
)  # fmt: skip
def test_whether_there_is_anything_to_check(type, batch, typed):
    assert loaded(taking(type), batch).typed is typed
    assert not loaded(taking(list[Any]), batch=True).typed
