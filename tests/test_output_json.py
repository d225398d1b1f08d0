"""`parse = "json"`: lines of children as lines of the daemon's log; whatever the bytes, nothing raises."""

from __future__ import annotations

import json
import sys

import pytest
from house import House, open_house
from hypothesis import given
from hypothesis import strategies as st
from test_log import lines_of, logging_to

from supervisor.output import LINE, Lines, Record, record
from supervisor.probes import Ready
from supervisor.spec import Bytes


@pytest.fixture
async def house(tmp_path):
    async with open_house(tmp_path / "logs") as house:
        yield house


async def logged(house: House, data: bytes, **spec) -> list[dict]:
    """What a child that prints `data` leaves in the daemon's log."""
    (house.logs.parent / "data").write_bytes(data)
    with logging_to(house.logs.parent / "daemon.log", level="debug"):
        await house.finish(command=("cat", str(house.logs.parent / "data")), parse="json", **spec)
    assert house.log() == data
    return lines_of(house.logs.parent / "daemon.log")


async def test_an_object_is_a_line_of_the_log_with_its_level_text_and_fields(house):
    first = b'{"level": "WARN", "msg": "slow", "ms": 1200, "tags": ["a", {"b": null}]}\n'
    data = first + b'{"severity":"fatal","event":"x","message":"kept"}\n'
    first, second = await logged(house, data)
    assert first.pop("timestamp") and first == {
        "level": "warning", "event": "slow", "logger": "job", "job": "job", "run": "job#1",
        "ms": 1200, "tags": ["a", {"b": None}],
    }  # fmt: skip
    assert (second["level"], second["event"], second["message"]) == ("critical", "x", "kept")


async def test_what_is_no_object_goes_through_as_text_and_is_counted(house):
    lines = await logged(house, b'plain\n{"a": 1}\n{broken\n[1, 2]\n\n  \xff\0\r\nno end')
    assert [(line["event"], line.get("unparsed"), line["level"]) for line in lines] == [
        ("plain", 1, "info"), ("", None, "info"), ("{broken", 2, "info"), ("[1, 2]", 3, "info"), ("  \\xff\0", 4, "info"),
        ("no end", 5, "info"),
    ]  # fmt: skip


async def test_names_that_the_log_has_a_meaning_for_are_kept_under_another(house):
    names = (
        "timestamp",
        "logger",
        "job",
        "run",
        "exc_info",
        "exception",
        "stack_info",
        "self",
        "method_name",
        "positional_args",
    )
    data = json.dumps({"event": "x", "level": 40, "name": "n", **dict.fromkeys(names, "theirs")}).encode() + b"\n"
    (line,) = await logged(house, data)
    assert {line[f"{name}_"] for name in names} == {"theirs"}
    assert (line["job"], line["run"], line["logger"], line["level"], line["level_"]) == ("job", "job#1", "job", "info", 40)
    assert line["name"] == "n"


NASTY = [
    b'{"a": "\\ud800", "event": "lone surrogate"}',
    b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"a": 1e999, "b": -1e-999, "c": ' + b"9" * 300 + b"}",
    b'{"a": ' + b"9" * 20_000 + b"}",
    b'{"": "", "level": null, "event": {}, "level": [1]}',
    b'{"\\u0000": "\\u001b[31m"}',
    b'\xef\xbb\xbf{"bom": 1}',
    b'{"a": NaN}',
    b"{" + b'"k": 1,' * 3000 + b'"k": 2}',
]


async def test_nothing_that_a_child_can_print_raises(house):
    lines = await logged(house, b"\n".join(NASTY) + b"\n", max_line=Bytes(1 << 20))
    assert len(lines) == len(NASTY)


async def test_a_line_of_many_megabytes_is_cut(house):
    lines = await logged(house, b'{"event": "' + b"x" * (9 << 20) + b'"}\n{"event": "next"}\n', max_line=Bytes(1000))
    assert lines[-1]["event"] == "next" or "lost" in lines[-1]  # the log's own bound may drop some, and says so
    assert max(len(line["event"]) for line in lines) <= 1000


async def test_a_character_that_is_split_over_chunks_comes_out_whole(house):
    text = '{"event": "h\u00e9llo \u2192"}\n'.encode()
    script = f"import os, time\nfor byte in {text!r}:\n    os.write(1, bytes([byte]))\n    time.sleep(0.002)"
    with logging_to(house.logs.parent / "daemon.log"):
        await house.finish(command=(sys.executable, "-c", script), parse="json")
    assert [line["event"] for line in lines_of(house.logs.parent / "daemon.log")] == ["héllo →"]


async def test_ready_by_a_line_works_beside_it(house):
    life = house.start(command=("sh", "-c", 'echo \'{"event": "up"}\'; exec sleep 100'), parse="json", ready=Ready(log="up"))
    await life.ready()
    await life.stop()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters()) | st.sampled_from(["level", "msg", "event", "severity"]), json_values))
def test_every_object_is_understood_and_loses_nothing(value):
    line = json.dumps(value).encode()
    found = record(line)
    assert isinstance(found, Record)
    taken = {key: item for key, item in value.items() if key not in found.fields}
    assert set(taken) <= {"level", "severity", "event", "message", "msg"}
    assert all(isinstance(item, str) for item in taken.values())
    assert set(found.fields) | set(taken) == set(value)


@given(st.binary() | st.binary().map(lambda data: b'{"a":' + data))
def test_any_bytes_are_a_record_or_none(data):
    assert record(data) is None or isinstance(record(data), Record)


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 20))
def test_lines_are_cut_at_the_limit_and_lose_nothing(chunks, limit):
    lines = Lines(limit)
    got = [line for chunk in chunks for line in lines.feed(chunk)] + list(lines.flush())
    assert all(len(line) <= limit for line in got)
    without_ends = b"".join(chunks).replace(b"\r", b"").replace(b"\n", b"")
    assert b"".join(got).replace(b"\r", b"") == without_ends
    assert LINE == 64 << 10
