"""Producers: what becomes an item, what does not, and the wait for room and for ends."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import BadItem, QueueError, QueueFull, QueueUnavailable
from supervisor.queues import QUEUES, Place
from supervisor.queues import producer as module
from supervisor.queues.producer import CHUNK, DEPTH, LARGE, LOOK_AGAIN, Producer
from supervisor.queues.protocol import Ending, Engine, Notice, Settings, State
from supervisor.queues.spec import QueueSpec, UniqueSpec
from supervisor.spec import Seconds
from supervisor.wall import WallClock

now = WallClock().now


@asynccontextmanager
async def producing(tmp_path, group_by: str | None = None, check: Any = None, **spec: Any):
    """A queue in memory, and a producer for it."""
    producers: list[Producer] = []

    def listen(notice: Notice) -> None:
        for producer in producers:
            producer.heard(notice)

    place = Place(directory=tmp_path, now=now, listen=listen, warn=lambda text: None)
    settings = Settings(spec=QueueSpec(backend="memory", **spec), group_by=group_by)
    async with QUEUES["memory"].open("q", settings, place) as engine:
        producers.append(Producer(engine, check))
        yield engine, producers[0]


async def end_all(engine: Engine, how: str = "done", **said: Any) -> None:
    claimed = await engine.claim(100, owner="tests", attempts=5)
    await engine.finish([Ending(id=item.id, token=item.token, how=how, **said) for item in claimed.items])


# ---- values ----


@dataclass
class Picture:
    path: str
    at: datetime.datetime


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, None, "ä", True]}, '{"a":[1,2.5,null,"ä",true]}'),
        ("just a string", '"just a string"'),
        (None, "null"),
        (
            Picture("a.png", datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)),
            '{"path":"a.png","at":"2026-01-02T00:00:00Z"}',
        ),
    ],
)
async def test_a_value_becomes_json(tmp_path, value, text):
    async with producing(tmp_path) as (engine, producer):
        receipt = await producer.put(value)
        assert receipt.what == "stored"
        assert (await engine.show(receipt.id)).payload == text.encode()


def nested(levels: int, inside: Any = 1) -> Any:
    for level in range(levels):
        inside = [inside] if level % 2 else {"a": inside}
    return inside


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"file": object()}, "no JSON: encoding objects of type object is unsupported"),
        ({"n": [1, math.nan]}, "no JSON: there is no nan in it"),
        ({"n": {"m": -math.inf}, "o": None}, "no JSON: there is no -inf in it"),
        ({"s": "\ud800"}, "no JSON"),
        ({(1, 2): 3}, "no JSON"),
        (nested(10_000), "nested too deeply"),
        (nested(DEPTH + 1), "nested too deeply"),
    ],
)
async def test_what_is_no_json_is_refused(tmp_path, value, words):
    async with producing(tmp_path) as (engine, producer):
        with pytest.raises(BadItem, match=words):
            await producer.put(value)
        assert (await engine.counts()).waiting == 0


async def test_what_only_looks_deep_is_taken(tmp_path):
    async with producing(tmp_path) as (engine, producer):
        for value in ([[]] * 10_000, nested(DEPTH - 1, None), nested(DEPTH), "[" * 10_000, '\\"[' * 10_000):
            receipt = await producer.put(value)
            assert msgspec.json.decode((await engine.show(receipt.id)).payload) == value


def levels(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(levels, inner), default=0)


TEXTS = st.text('[]{}"\\\\a\u1234\n', max_size=8)
VALUES = st.recursive(
    st.none() | TEXTS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=12
)


@given(VALUES, st.integers(1, 30), st.booleans())
def test_the_depth_of_json_is_seen_without_decoding_it(value, piece, spaced):
    text = json.dumps(value, indent=2 if spaced else None).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        assert module._depth(text) == levels(value)


class Reading(msgspec.Struct):
    values: tuple[float, ...]


@pytest.mark.parametrize(
    "value",
    [
        {"r": [Reading((1.0, math.nan))], "o": None},
        [Picture("a", datetime.datetime(2026, 1, 2)), None, {1: (2, {"x": math.inf})}],
        [{"x": {math.nan}}],
        [None] * 200_000 + [math.nan],  # one that is large
    ],
)
async def test_no_number_is_found_wherever_it_is(tmp_path, value):
    async with producing(tmp_path) as (_, producer):
        with pytest.raises(BadItem, match=r"no JSON: there is no (nan|inf) in it"):
            await producer.put(value)


# ---- what is JSON already, and what is large ----


LINES = "x" * LARGE


async def test_what_is_json_already_is_put_as_it_is(tmp_path):
    async with producing(tmp_path) as (engine, producer):
        large = b'{ "lines": "%s" }' % LINES.encode()
        receipts = await producer.put_many([msgspec.Raw(b'{"a": 1}'), msgspec.Raw(large)])
        assert [(await engine.show(each.id)).payload for each in receipts] == [b'{"a":1}', large]


@pytest.mark.parametrize("text", ['{"a": 1', "NaN", f'["{LINES}" 1]', "[" * (LARGE + 1)])
async def test_what_only_says_that_it_is_json_is_refused(tmp_path, text):
    async with producing(tmp_path) as (engine, producer):
        with pytest.raises(BadItem, match=r"^item 2 of 2: (no JSON|nested too deeply)") as caught:
            await producer.put_many([1, msgspec.Raw(text.encode())])
        assert caught.value.position == 1
        assert (await engine.counts()).waiting == 0


async def test_large_json_that_is_too_deep_is_refused(tmp_path):
    async with producing(tmp_path) as (_, producer):
        for levels, fits in ((DEPTH, True), (DEPTH + 1, False)):
            text = b"[" * (levels - 1) + b'["%s"]' % LINES.encode() + b"]" * (levels - 1)
            with nullcontext() if fits else pytest.raises(BadItem, match="nested too deeply"):
                await producer.put(msgspec.Raw(text))


async def test_the_fields_of_large_json_are_found(tmp_path):
    unique = UniqueSpec(by=("to", "no id"), on_conflict="merge")
    async with producing(tmp_path, unique=unique, group_by="lines") as (engine, producer):
        small, large = {"to": ["me"], "no id": {"b": 1, "a": 2}, "lines": "x"}, {"no id": {"a": 2, "b": 1}, "to": ["me"]}
        first = await producer.put(small)
        again = await producer.put(msgspec.Raw(msgspec.json.encode({**large, "lines": "g", "more": LINES})))
        assert (again.what, again.id) == ("merged", first.id)
        other = await producer.put(msgspec.Raw(msgspec.json.encode({"to": "you", "no id": 1, "lines": "g", "more": LINES})))
        assert (await engine.show(other.id)).group == "g"
        with pytest.raises(BadItem, match="there is no field 'no id', which `unique` of the queue names"):
            await producer.put(msgspec.Raw(msgspec.json.encode({"to": "you", "lines": "g", "more": LINES})))
        with pytest.raises(BadItem, match=r"expected an object with a field 'to' .*, got '\[1,\"xxx"):
            await producer.put(msgspec.Raw(msgspec.json.encode([1, LINES])))


async def test_options_become_what_the_engine_takes(tmp_path):
    async with producing(tmp_path, expire=Seconds(60)) as (engine, producer):
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        receipt = await producer.put(1, id="mine", priority="high", at=at, expire=5)
        assert receipt.id == "mine"
        record = await engine.show("mine")
        assert record.priority == 0
        assert record.ready_at == pytest.approx(at.timestamp(), abs=0.01)
        assert record.expires_at == pytest.approx(record.ready_at + 5)
        plain = await engine.show((await producer.put(1)).id)
        assert (plain.priority, plain.expires_at) == (1, pytest.approx(plain.ready_at + 60))
        delayed = await engine.show((await producer.put(1, delay=30)).id)
        assert delayed.ready_at == pytest.approx(delayed.put_at + 30)
        assert (await producer.put(1, id="mine")).what == "known"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"priority": "hihg"}, 'no priority .hihg.; there are high, normal, low; did you mean "high"'),
        ({"delay": -1}, "delay: expected seconds, 0 or more, got -1"),
        ({"delay": math.inf}, "delay"),
        ({"expire": 0}, "expire: expected seconds, more than 0, got 0"),
        ({"at": datetime.datetime(2026, 1, 1)}, "at: 2026-01-01T00:00:00 has no time zone"),
        ({"at": math.nan}, "at: expected"),
        ({"id": ""}, "id: expected"),
        ({"id": "two words"}, "id: expected"),
    ],
)
async def test_bad_options_are_refused(tmp_path, options, words):
    async with producing(tmp_path) as (_, producer):
        with pytest.raises(BadItem, match=words):
            await producer.put(1, **options)


async def test_the_handler_is_asked_whether_it_takes_it(tmp_path):
    async def check(items: Sequence[bytes]) -> None:
        for position, item in enumerate(items):
            if not item.isdigit():
                bad = BadItem(f"expected an int, got {item.decode()}")
                bad.position = position
                raise bad

    async with producing(tmp_path, check=check) as (engine, producer):
        await producer.put(1)
        with pytest.raises(BadItem, match=r'^expected an int, got "x"$'):
            await producer.put("x")
        with pytest.raises(BadItem, match=r'^item 2 of 3: expected an int, got "x"$'):
            await producer.put_many([1, "x", 2])
        assert (await engine.counts()).waiting == 1  # all are looked at before the first is put


# ---- keys and groups ----


@pytest.mark.parametrize(
    ("by", "same", "other"),
    [
        ((), {"b": 2, "a": {"y": 1, "x": 2}}, {"a": {"x": 2, "y": 1}, "b": 3}),
        (("a",), {"a": {"y": 1, "x": 2}, "b": 9}, {"a": {"x": 2}, "b": 2}),
        (("a", "b"), {"a": {"x": 2, "y": 1}, "b": 2, "c": 1}, {"a": 2, "b": {"x": 2, "y": 1}}),
    ],
)
async def test_the_key_is_what_is_to_be_unique(tmp_path, by, same, other):
    async with producing(tmp_path, unique=UniqueSpec(by=by)) as (_, producer):
        first = await producer.put({"a": {"x": 2, "y": 1}, "b": 2})
        again = await producer.put(same)
        assert (again.what, again.id) == ("rejected", first.id)
        assert (await producer.put(other)).what == "stored"


async def test_keys_and_groups_are_short(tmp_path):
    async with producing(tmp_path, unique=UniqueSpec(), group_by="g") as (engine, producer):
        long = await engine.show((await producer.put({"g": "x" * 1000})).id)
        assert len(long.key) == len(long.group) == 64
        short = await engine.show((await producer.put({"g": {"b": 1, "a": 2}})).id)
        assert short.key == '{"g":{"a":2,"b":1}}'
        assert short.group == '{"a":2,"b":1}'
        assert (await engine.show((await producer.put({"g": "customer 7"})).id)).group == "customer 7"
        assert (await engine.show((await producer.put({"g": None})).id)).group is None


async def test_a_struct_is_keyed_like_the_object_that_it_is(tmp_path):
    class Order(msgspec.Struct):
        zeta: int
        alpha: int

    async with producing(tmp_path, unique=UniqueSpec(), group_by="alpha") as (_, producer):
        await producer.put({"alpha": 1, "zeta": 2})
        assert (await producer.put(Order(2, 1))).what == "rejected"


@pytest.mark.parametrize(
    ("spec", "value", "words"),
    [
        ({"group_by": "customer"}, {"custmer": 1}, "no field 'customer', which `serialize_by` .*; did you mean \"custmer\""),
        ({"group_by": "customer"}, [1], "expected an object with a field 'customer'"),
        ({"unique": UniqueSpec(by=("a", "b"))}, {"a": 1}, "no field 'b', which `unique`"),
    ],
)
async def test_a_field_that_is_needed_and_not_there_is_named(tmp_path, spec, value, words):
    async with producing(tmp_path, **spec) as (_, producer):
        with pytest.raises(BadItem, match=words):
            await producer.put(value)


# ---- room ----


async def test_room_is_waited_for_as_long_as_was_said(tmp_path, autojump_clock):
    async with producing(tmp_path, size=2) as (engine, producer):
        await producer.put_many([1, 2])
        with pytest.raises(QueueFull, match="full"):
            await producer.put(3, timeout=0)
        start = trio.current_time()
        with pytest.raises(QueueFull, match="full"):
            await producer.put(3, timeout=5)
        assert trio.current_time() == start + 5
        async with trio.open_nursery() as nursery:
            nursery.start_soon(producer.put, 3)
            await trio.sleep(7)
            assert (await engine.counts()).waiting == 2
            await end_all(engine)
        assert (await engine.counts()).waiting == 1


async def test_many_are_put_in_order_as_room_comes(tmp_path, autojump_clock):
    async with producing(tmp_path, size=7) as (engine, producer):
        told: list[int] = []
        got: list[bytes] = []

        async def work() -> None:
            while len(got) < 100:
                await engine.wait_for_work()
                for item in (await engine.claim(2, owner="tests", attempts=5)).items:
                    got.append(item.payload)
                    await engine.finish([Ending(id=item.id, token=item.token, how="done")])
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            receipts = await producer.put_many(range(100), on_stored=told.append)
        assert got == [b"%d" % number for number in range(100)]
        assert len({receipt.id for receipt in receipts}) == 100
        assert told == sorted(set(told)) and told[-1] == 100


async def test_what_is_stored_of_many_is_told_when_it_ends_early(tmp_path, autojump_clock):
    async with producing(tmp_path, size=7) as (engine, producer):
        told: list[int] = []
        with pytest.raises(QueueFull, match="7 of 10 are stored"):
            await producer.put_many(range(10), on_stored=told.append, timeout=1)
        assert told[-1] == (await engine.counts()).waiting == 7
        assert [record.payload for record in await engine.peek(State.WAITING, 9)] == [b"%d" % n for n in range(7)]


async def test_big_bulks_go_in_pieces(tmp_path):
    async with producing(tmp_path, size=100_000) as (_, producer):
        told: list[int] = []
        await producer.put_many(range(2 * CHUNK + 1), on_stored=told.append)
        assert told == [CHUNK, 2 * CHUNK, 2 * CHUNK + 1]
        told.clear()
        await producer.put_many(["x" * 3_000_000] * 3, on_stored=told.append)
        assert told == [1, 2, 3]
        assert await producer.put_many([]) == []


async def test_ids_of_many(tmp_path):
    async with producing(tmp_path) as (_, producer):
        assert [each.id for each in await producer.put_many("xyz", ids=["a", "b", "c"])] == ["a", "b", "c"]
        assert [each.what for each in await producer.put_many("xyz", ids=["a", "b", "d"])] == ["known", "known", "stored"]
        with pytest.raises(BadItem, match=r"as many ids as items \(3\), got 1"):
            await producer.put_many("xyz", ids=["a"])


# ---- ends ----


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", ["done", "dead", "cancelled"])
async def test_an_end_is_waited_for(tmp_path, autojump_clock, how, keep):
    async with producing(tmp_path) as (engine, producer):
        receipt = await producer.put(1, keep=keep)
        records = []

        async def wait() -> None:
            records.append(await producer.wait(receipt.id))

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.sleep(5)
            await end_all(engine, how, result=b"42" if how == "done" else None)
        assert trio.current_time() == start + 5  # told, not looked for
        assert [record.state for record in records] == [State(how)] * 2
        assert (await producer.wait(receipt.id)).result == (b"42" if how == "done" else None)  # it has ended before
        assert not producer._awaited


async def test_an_end_that_nobody_tells_is_seen_all_the_same(tmp_path, autojump_clock, monkeypatch):
    async with producing(tmp_path) as (engine, producer):
        receipt = await producer.put(1)
        monkeypatch.setattr(producer, "heard", lambda notice: None)  # as if the engine were away in that moment
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(producer.wait, receipt.id)
            await trio.testing.wait_all_tasks_blocked()
            await end_all(engine)
        assert trio.current_time() == start + LOOK_AGAIN


async def test_what_is_not_known_is_not_waited_for(tmp_path):
    async with producing(tmp_path) as (engine, producer):
        with pytest.raises(QueueError, match="knows no item nothing"):
            await producer.wait("nothing")
        receipt = await producer.put(1)
        await end_all(engine)
        with pytest.raises(QueueError, match="put with `keep`"):
            await producer.wait(receipt.id)


async def test_the_wait_for_an_end_may_take_so_long(tmp_path, autojump_clock):
    async with producing(tmp_path) as (_, producer):
        receipt = await producer.put(1)
        start = trio.current_time()
        with pytest.raises(TimeoutError, match=f"{receipt.id} has not ended within 100 s"):
            await producer.wait(receipt.id, timeout=100)
        assert trio.current_time() == start + 100


async def test_an_engine_that_is_away_is_waited_for_by_who_waits_for_an_end(tmp_path, autojump_clock, monkeypatch):
    async with producing(tmp_path) as (engine, producer):
        receipt = await producer.put(1, keep=True)
        back, show = trio.current_time() + 60, engine.show

        async def away(id: str, keep: bool) -> Any:
            if trio.current_time() < back:
                raise QueueUnavailable("the server is away")
            return await show(id, keep=keep)

        monkeypatch.setattr(engine, "show", away)
        await end_all(engine)
        assert (await producer.wait(receipt.id)).state is State.DONE
        assert trio.current_time() >= back
