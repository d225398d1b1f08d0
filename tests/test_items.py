"""Queues and their items from outside: the verbs on the socket, the two clients, and the command line."""

import json
import os
import pty
import subprocess
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import msgspec
import pytest
import trio
from control_serving import peer, serving
from test_cli import ENVIRON, SUPERVISOR, run

from supervisor.cli.submit import LARGEST
from supervisor.client import AsyncClient, Client, ControlError
from supervisor.control import connection
from supervisor.control.client import chunks
from supervisor.control.messages import ItemStatus, QueueStatus
from supervisor.queues import QUEUES as QUEUE_ENGINES
from supervisor.queues import Scheme

QUEUES = {
    "images": {"backend": "memory"},
    "mails": {"backend": "memory", "unique": {"by": ["to"]}, "priorities": ["high", "low"]},
    "small": {"backend": "memory", "size": 3},
    "other": {"backend": "memory"},
}
JOBS = {
    "resize": {"call": "control_items:resize", "queue": "images"},
    "send": {"call": "control_items:hold", "queue": "mails"},
    "fail": {"call": "control_items:fail", "queue": "other", "retry": {"attempts": 1}},
    "idle": {"call": "control_items:forget", "queue": "small", "start": "manual"},
    "once": {"call": "control_jobs:brief", "once": True, "start": "manual"},
}


@asynccontextmanager
async def queueing(directory, queues=QUEUES, jobs=JOBS):
    async with serving(directory, jobs, {}, queues=queues) as (tree, path):
        with trio.fail_after(60):
            await tree.wait_running()
        yield tree, path


async def seen(look, holds):
    """Wait until what is seen from outside is as wanted: of an item that is put, or claimed, there is no event."""
    while True:
        if holds(await look()):
            return
        await trio.sleep(0.01)


async def blocking(function, *args):
    return await trio.to_thread.run_sync(function, *args)


# -- the socket -----------------------------------------------------------------------------------------------------------


async def test_an_item_is_put_and_handled_and_what_came_of_it_is_told(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        answer = await client.ask("submit", {"queue": "images", "items": [{"path": "a"}, {"path": "b"}], "result": True})
        assert [(row["what"], row["ended"]["state"], row["ended"]["result"]) for row in answer["result"]] == [
            ("stored", "done", "a resized"),
            ("stored", "done", "b resized"),
        ]


async def test_a_queue_is_shown_with_its_numbers_and_jobs(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        await client.ask("submit", {"queue": "small", "items": [1, 2]})
        (row,) = (await client.ask("queue.ls", {"names": ["sm*"]}))["result"]
        assert (row["name"], row["backend"], row["jobs"], row["size"], row["waiting"]) == ("small", "memory", ["idle"], 3, 2)
        assert row["paused"] is False and row["trouble"] is None and row["oldest"] >= 0
        rows = (await client.ask("queue.ls"))["result"]
        assert [row["name"] for row in rows] == list(QUEUES)


async def test_a_queue_that_there_is_not_is_4_with_a_hint(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        for verb, params in (
            ("submit", {"queue": "image", "items": [1]}),
            ("queue.ls", {"names": ["image"]}),
            ("queue.peek", {"queue": "image"}),
            ("queue.pause", {"queue": "image"}),
            ("queue.purge", {"queue": "image", "state": "dead"}),
            ("queue.requeue", {"queue": "image", "all": True}),
            ("queue.show", {"id": "x", "queue": "image"}),
        ):
            error = (await client.ask(verb, params))["error"]
            assert (error["code"], error["message"]) == (4, "no queue 'image'; did you mean 'images'?"), verb


async def test_what_the_handler_does_not_take_is_refused_before_anything_is_stored(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        good, bad = {"path": "a"}, {"path": 7}
        error = (await client.ask("submit", {"queue": "images", "items": [good, bad, good]}))["error"]
        assert error["code"] == 1 and error["data"] == {"stored": 0, "bad": 1}
        assert error["message"].startswith("item 2 of 3: ") and "(job resize)" in error["message"]
        assert (await client.ask("queue.ls", {"names": ["images"]}))["result"][0]["done"] == 0


async def test_a_batch_is_checked_item_by_item(tmp_path):
    jobs = {"sum": {"call": "control_items:add", "queue": "images", "batch": 3}}
    async with queueing(tmp_path, jobs=jobs) as (_, path), peer(path) as client:
        assert "error" in await client.ask("submit", {"queue": "images", "items": ["x"]})
        assert "result" in await client.ask("submit", {"queue": "images", "items": [1, 2]})


async def test_every_option_of_an_item_reaches_the_queue(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        at = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
        params = {"queue": "mails", "items": [{"to": "me"}], "id": ["m1"], "priority": "high", "at": at, "expire": 60}
        assert (await client.ask("submit", params))["result"] == [{"id": "m1", "what": "stored", "ended": None}]
        item = (await client.ask("queue.show", {"id": "m1"}))["result"]
        assert (item["queue"], item["priority"], item["state"], item["payload"]) == ("mails", "high", "waiting", {"to": "me"})
        due = msgspec.convert(item["ready_at"], datetime)
        assert timedelta(minutes=119) < due - msgspec.convert(item["put_at"], datetime) <= timedelta(hours=2)
        assert msgspec.convert(item["expires_at"], datetime) - due == timedelta(seconds=60)
        assert (await client.ask("submit", params))["result"][0]["what"] == "known"
        again = await client.ask("submit", {"queue": "mails", "items": [{"to": "me"}], "delay": 5})
        assert again["result"] == [{"id": "m1", "what": "rejected", "ended": None}]
        waited = await client.ask("submit", {"queue": "mails", "items": [{"to": "me"}], "result": True})
        assert waited["result"] == again["result"]


@pytest.mark.parametrize(
    ("params", "code", "says"),
    [
        ({"priority": "urgent"}, 1, "priority"),
        ({"at": "soon"}, -32602, "expected a moment"),
        ({"id": ["a", "b"]}, -32602, "as many ids"),
        ({"id": ["a b"]}, 1, "without spaces"),
        ({"delay": -1}, -32602, "0"),
        ({"items": []}, None, ""),
    ],
)
async def test_what_cannot_be_put_like_that(tmp_path, params, code, says):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        answer = await client.ask("submit", {"queue": "small", "items": [1], **params})
        assert answer.get("error", {}).get("code") == code and says in str(answer)


async def test_a_full_queue_keeps_the_producer_waiting_for_as_long_as_it_wants(tmp_path):
    async with queueing(tmp_path) as (tree, path), peer(path) as client:
        answer = await client.ask("submit", {"queue": "small", "items": [1, 2, 3, 4, 5], "timeout": 0.05})
        assert answer["error"]["code"] == 75 and answer["error"]["data"] == {"stored": 3}
        await client.send({"jsonrpc": "2.0", "id": 9, "method": "submit", "params": {"queue": "small", "items": [6]}})
        await tree.start("idle")
        assert (await client.read())["result"][0]["what"] == "stored"


async def test_a_payload_of_50_megabytes_goes_through_and_the_daemon_is_well(tmp_path):
    text = b"x" * (50 << 20)
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        start = b'{"jsonrpc":"2.0","id":1,"method":"submit","params":{"queue":"small","id":["big"],"items":["'
        await client.send(start + text + b'"]}}\n')
        assert (await client.read())["result"][0]["what"] == "stored"
        (row,) = (await client.ask("queue.peek", {"queue": "small"}))["result"]
        assert row["payload"] is None and row["bytes"] == len(text) + 2
        assert (await client.ask("version"))["result"]["phase"] == "running"


async def test_only_a_submit_may_be_that_long_and_it_has_an_end_too(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "MAX_SUBMIT", 3 << 20)
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        text = b"x" * (2 << 20)
        await client.send(b'{"jsonrpc":"2.0","id":1,"method":"status","params":{"names":["' + text + b'"]}}\n')
        assert "over" in (await client.read())["error"]["message"]
        for size in (2, 4):
            text = b"x" * (size << 20)
            await client.send(
                b'{"jsonrpc":"2.0","id":1,"method":"submit","params":{"queue":"small","items":["' + text + b'"]}}\n'
            )
            answer = await client.read()
            assert ("result" in answer) is (size == 2)
        assert "result" in await client.ask("version")


@pytest.mark.parametrize(
    "item", [b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"[" * 300 + b"]" * 300, b"{", b"1e999", b'"\\ud800"']
)
async def test_what_is_no_item_is_an_error_that_leaves_connection_and_daemon_well(tmp_path, item):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        await client.send(b'{"jsonrpc":"2.0","id":1,"method":"submit","params":{"queue":"small","items":[' + item + b"]}}\n")
        assert "error" in await client.read()
        (row,) = (await client.ask("queue.ls", {"names": ["small"]}))["result"]
        assert row["waiting"] == 0


async def test_dead_items_are_shown_and_get_their_attempts_anew(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        await client.ask("submit", {"queue": "other", "items": [1, 2], "id": ["x", "y"]})
        await client.ask("queue.wait", {"ids": ["x", "y"]})
        dead = (await client.ask("queue.dead", {"queue": "other"}))["result"]
        assert {row["id"]: (row["state"], row["error"]) for row in dead} == {
            "x": ("dead", "ValueError: no such luck with 1"),
            "y": ("dead", "ValueError: no such luck with 2"),
        }
        assert "no such luck" in (await client.ask("queue.show", {"id": "x"}))["result"]["traceback"]
        assert (await client.ask("queue.requeue", {"queue": "other"}))["error"]["code"] == -32602
        await client.ask("queue.pause", {"queue": "other"})
        (answer,) = (await client.ask("queue.requeue", {"queue": "other", "ids": ["x", "nosuch"]}))["result"]
        assert not answer["ok"] and answer["text"] == "1 item requeued; 1 of those named are not dead, or not known"
        (answer,) = (await client.ask("queue.requeue", {"queue": "other", "all": True}))["result"]
        assert answer["ok"] and answer["text"] == "1 item requeued"
        assert len((await client.ask("queue.peek", {"queue": "other"}))["result"]) == 2
        (answer,) = (await client.ask("queue.purge", {"queue": "other", "state": "waiting"}))["result"]
        assert answer["text"] == "2 items removed"


async def test_what_runs_cannot_be_purged_and_a_state_must_be_one(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        assert "cancel it" in (await client.ask("queue.purge", {"queue": "other", "state": "running"}))["error"]["message"]
        error = (await client.ask("queue.peek", {"queue": "other", "state": "ded"}))["error"]
        assert error == {"code": -32602, "message": "no state 'ded'; did you mean 'dead'?"}


async def test_a_paused_queue_gives_nothing_until_it_is_resumed(tmp_path):
    async with queueing(tmp_path) as (tree, path), peer(path) as client:
        assert (await client.ask("queue.pause", {"queue": "images"}))["result"][0]["ok"]
        await client.ask("submit", {"queue": "images", "items": [{"path": "a"}], "id": ["a"], "keep": True})
        (row,) = (await client.ask("queue.ls", {"names": ["images"]}))["result"]
        assert row["paused"] is True and row["waiting"] == 1
        error = (await client.ask("queue.wait", {"ids": ["a"], "timeout": 0}))["error"]
        assert error == {"code": 75, "message": "not ended yet: a", "data": []}
        await client.ask("queue.resume", {"queue": "images"})
        assert (await client.ask("queue.wait", {"ids": ["a"]}))["result"][0]["state"] == "done"
        asked = [event.verb for event in tree.journal.past(0)[1] if type(event).__name__ == "Commanded"]
        assert asked == ["queue.pause", "queue.resume"]


async def test_an_item_is_cancelled_beside_jobs_and_runs(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        await client.ask("submit", {"queue": "small", "items": [1], "id": ["waits"]})
        await client.ask("submit", {"queue": "mails", "items": [{"to": 1}], "id": ["runs"], "keep": True})
        await seen(lambda: AsyncClient(path).queue_show("runs"), lambda item: item.state == "running")
        answers = (await client.ask("cancel", {"names": ["waits", "runs"]}))["result"]
        assert answers == [
            {"name": "waits", "ok": True, "text": "cancelled: it waited"},
            {"name": "runs", "ok": True, "text": "cancelled: it ran"},
        ]
        assert [row["state"] for row in (await client.ask("queue.wait", {"ids": ["waits", "runs"]}))["result"]] == [
            "cancelled",
            "cancelled",
        ]
        (answer,) = (await client.ask("cancel", {"names": ["waits"]}))["result"]
        assert not answer["ok"] and answer["text"] == "it has ended already"
        (answer,) = (await client.ask("cancel", {"names": ["once"]}))["result"]
        assert (answer["name"], answer["ok"], answer["text"]) == ("once", False, "no run in hand")


async def test_who_cancels_may_wait_for_a_while_or_not_at_all(tmp_path):
    jobs = {"stuck": {"call": "control_items:cling", "queue": "other", "grace": "1h"}}
    async with queueing(tmp_path, jobs=jobs) as (_, path), peer(path) as client:
        await client.ask("submit", {"queue": "other", "items": [1], "id": ["a"]})
        await seen(lambda: AsyncClient(path).queue_show("a"), lambda item: item.state == "running")
        error = (await client.ask("cancel", {"names": ["a"], "timeout": 0.05}))["error"]
        assert error == {"code": 75, "message": "cancel: not done in time: a; it goes on", "data": []}
        (answer,) = (await client.ask("cancel", {"names": ["a"], "wait": False}))["result"]
        assert answer["ok"] and answer["text"].endswith("its worker is told to end it")
        assert (await client.ask("queue.show", {"id": "a"}))["result"]["cancelling"] is True


async def test_who_names_what_is_not_there_cancels_nothing(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        await client.ask("submit", {"queue": "small", "items": [1], "id": ["a"]})
        error = (await client.ask("cancel", {"names": ["a", "nosuch"]}))["error"]
        assert error == {"code": 4, "message": "no job, run or item 'nosuch'"}
        assert (await client.ask("queue.show", {"id": "a"}))["result"]["state"] == "waiting"


async def test_who_takes_a_queue_for_a_job_is_told(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        error = (await client.ask("pause", {"names": ["images"]}))["error"]
        assert error["code"] == 4 and error["message"].endswith("it is a queue: use `supervisor queue`")


async def test_an_id_that_two_queues_have_needs_the_queue(tmp_path):
    async with queueing(tmp_path) as (_, path), peer(path) as client:
        for queue in ("small", "mails"):
            await client.ask("submit", {"queue": queue, "items": [{"to": 1}], "id": ["a"], "delay": 60})
        error = (await client.ask("queue.show", {"id": "a"}))["error"]
        assert error["code"] == 1 and "mails" in error["message"] and "--queue" in error["message"]
        assert "--queue" in (await client.ask("cancel", {"names": ["a"]}))["error"]["message"]
        assert (await client.ask("queue.show", {"id": "a", "queue": "mails"}))["result"]["queue"] == "mails"
        assert (await client.ask("queue.show", {"id": "b"}))["error"]["code"] == 4


async def test_a_queue_whose_engine_is_away_keeps_nobody_from_the_others(tmp_path, monkeypatch):
    from supervisor.errors import QueueUnavailable

    async with queueing(tmp_path) as (tree, path), peer(path) as client:

        async def away(*_):
            raise QueueUnavailable("queue images: no answer from redis://h: connection refused")

        engine = tree.queues.engine("images")
        for name in ("counts", "show", "put"):
            monkeypatch.setattr(engine, name, away)
        rows = {row["name"]: row for row in (await client.ask("queue.ls"))["result"]}
        assert rows["images"]["trouble"].endswith("connection refused") and rows["images"]["waiting"] is None
        assert rows["small"]["trouble"] is None and rows["small"]["waiting"] == 0
        await client.ask("submit", {"queue": "small", "items": [1], "id": ["a"]})
        assert (await client.ask("queue.show", {"id": "a"}))["result"]["queue"] == "small"
        error = (await client.ask("queue.show", {"id": "b"}))["error"]
        assert error["code"] == 1 and "connection refused" in error["message"]
        error = (await client.ask("submit", {"queue": "images", "items": [{"path": "a"}]}))["error"]
        assert error["code"] == 1 and error["data"] == {"stored": 0}


@pytest.mark.parametrize(
    ("module", "why"), [("no_such_module", "cannot be loaded"), ("control_items", "images: no address of a server")]
)
async def test_a_queue_that_cannot_be_opened_says_why(tmp_path, monkeypatch, module, why):
    monkeypatch.setitem(QUEUE_ENGINES, "redis", Scheme(module, "redis", "coredis"))
    queues = {"images": {"backend": "redis://:hunter2@h/0"}, "small": {"backend": "memory"}}
    async with serving(tmp_path, {}, {}, queues=queues) as (_, path), peer(path) as client:
        rows = (await client.ask("queue.ls"))["result"]
        assert why in rows[0]["trouble"] and rows[0]["backend"] == "redis://:***@h/0"
        assert rows[1]["trouble"] is None
        for verb, params in (("submit", {"items": [1]}), ("queue.peek", {}), ("queue.pause", {})):
            error = (await client.ask(verb, {"queue": "images", **params}))["error"]
            assert error["code"] == 1 and why in error["message"]
        assert why in (await client.ask("queue.show", {"id": "x"}))["error"]["message"]


# -- the clients ----------------------------------------------------------------------------------------------------------


async def test_the_blocking_client_puts_waits_and_shows(tmp_path):
    def use(path):
        with Client(path) as client:
            assert client.submit("images", {"path": "a"}, id="a", keep=True) == "a"
            assert client.result("a") == "a resized"
            done = client.submit_many("images", ({"path": str(n)} for n in range(3)), result=True)
            assert [row.ended.result for row in done] == ["0 resized", "1 resized", "2 resized"]
            later = datetime.now(UTC) + timedelta(hours=1)
            assert client.submit("mails", {"to": "me"}, at=later, id="m", priority="high") == "m"
            with pytest.raises(ControlError, match="m has its key"):
                client.submit("mails", {"to": "me"})
            item = client.queue_show("m")
            assert isinstance(item, ItemStatus) and item.priority == "high" and item.ready_at > item.put_at
            rows = client.queue_ls()
            assert [row.name for row in rows] == list(QUEUES) and isinstance(rows[0], QueueStatus)
            client.submit("other", 1, id="bad", keep=True)
            with pytest.raises(ControlError, match="bad: dead: ValueError: no such luck") as caught:
                client.result("bad")
            assert caught.value.data.attempts == 1
            assert [row.id for row in client.queue_dead("other")] == ["bad"]
            assert client.queue_purge("other", "dead")[0].ok and client.queue_pause("other")[0].ok
            assert client.queue_resume("other")[0].ok and client.cancel("m")[0].ok

    async with queueing(tmp_path) as (_, path):
        await blocking(use, path)


async def test_the_client_for_trio_does_the_same(tmp_path):
    async with queueing(tmp_path) as (_, path):
        client = AsyncClient(path)
        assert await client.submit("images", {"path": "a"}, id="a", keep=True) == "a"
        assert await client.result("a", queue="images", timeout=30) == "a resized"
        done = await client.submit_many("images", [{"path": "b"}], result=True)
        assert [row.ended.result for row in done] == ["b resized"]
        with pytest.raises(ControlError) as caught:
            await client.submit_many("small", range(5), timeout=0.05)
        assert caught.value.code == 75 and caught.value.data == {"stored": 3}
        assert [row.payload for row in await client.queue_peek("small")] == [0, 1, 2]
        assert (await client.queue_requeue("other", all=True))[0].text == "0 items requeued"


async def test_what_one_request_cannot_carry_goes_in_several(tmp_path):
    assert [len(chunk) for chunk in chunks(range(4500))] == [2000, 2000, 500]
    assert [len(chunk) for chunk in chunks(["x" * 100_000] * 5)] == [2, 2, 1]
    assert [len(chunk) for chunk in chunks(["x" * 1_000_000, 1])] == [1, 1]
    async with queueing(tmp_path, {"images": {"backend": "memory", "size": 4100}}, {}) as (_, path):
        client = AsyncClient(path)
        with pytest.raises(ControlError) as caught:
            await client.submit_many("images", range(4500), timeout=0.2)
        assert caught.value.data == {"stored": 4100}
        assert (await client.queue_ls())[0].waiting == 4100


async def test_a_client_hears_also_of_what_the_daemon_could_not_read(tmp_path):
    item = 1
    for _ in range(5000):
        item = msgspec.Raw(b"[%b]" % (item if isinstance(item, bytes) else msgspec.json.encode(item)))

    def use(path):
        with Client(path) as client:
            with pytest.raises(ControlError, match="nested too deeply"):
                client.submit("small", item)
            assert client.version()

    async with queueing(tmp_path) as (_, path):
        await blocking(use, path)


# -- the command line -----------------------------------------------------------------------------------------------------


async def test_one_item_says_its_id_or_with_result_what_came_of_it(tmp_path):
    async with queueing(tmp_path) as (_, path):
        out, _ = await run(path, "submit", "images", '{"path": "a"}', "--id", "one")
        assert out == "one: stored\n"
        out, _ = await run(path, "submit", "images", '{\n "path": "b"\n}', "--result")
        assert out == '"b resized"\n'
        out, err = await run(path, "submit", "other", "1", "--id", "x", "--result", code=1)
        assert out == "" and err == "supervisor: x: dead: ValueError: no such luck with 1\n"
        out, _ = await run(path, "submit", "mails", '{"to": 1}', "--id", "m", "--json")
        assert json.loads(out) == {"id": "m", "what": "stored"}
        out, _ = await run(path, "submit", "mails", '{"to": 1}', code=1)
        assert out == "m: not stored: this one has its key\n"
        out, err = await run(path, "submit", "mails", '{"to": 1}', "--result", code=1)  # and that one runs, without end
        assert (out, err) == ("", "supervisor: m: not stored: this one has its key\n")


async def test_many_items_say_how_many(tmp_path):
    lines = [json.dumps({"path": str(number)}) for number in range(2500)]
    (tmp_path / "many.jsonl").write_text("\n\n".join(lines) + "\n")
    async with queueing(tmp_path) as (_, path):
        file = f"@{tmp_path}/many.jsonl"
        out, err = await run(path, "submit", "images", file, "--id", "n")
        assert (out, err) == ("images: 2500 stored\n", "")
        out, _ = await run(path, "queue", "show", "n-2500")
        assert "n-2500\n" in out and 'payload: {"path": "2499"}' in out
        out, _ = await run(path, "submit", "images", file, "--id", "n", "--result", "--json")
        assert [json.loads(line)["result"] for line in out.splitlines()] == [f"{number} resized" for number in range(2500)]
        out, _ = await run(path, "submit", "images", '{"path": "a"}', '{"path": "b"}', "--id", "a", "--id", "b", "--result")
        assert out == 'a: done: "a resized"\nb: done: "b resized"\n'


async def test_a_pipe_is_put_as_it_comes(tmp_path):
    async with queueing(tmp_path) as (_, path):
        env = ENVIRON | {"SUPERVISOR_SOCKET": path}
        pipe, client = subprocess.PIPE, AsyncClient(path)
        async with trio.open_nursery() as nursery:
            command = [*SUPERVISOR, "submit", "small", "--id", "p"]
            process = await nursery.start(partial(trio.run_process, command, stdin=pipe, stdout=pipe, env=env))
            await process.stdin.send_all(b"1\n2\n")
            await seen(lambda: client.queue_ls("small"), lambda rows: rows[0].waiting == 2)
            await process.stdin.send_all(b"3")
            await process.stdin.aclose()
            out = b""
            while chunk := await process.stdout.receive_some():
                out += chunk
        assert out == b"small: 3 stored\n"
        assert [row.id for row in await client.queue_peek("small")] == ["p-1", "p-2", "p-3"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("oops", "not JSON: expecting value at character 1; nothing"),
        ('{"path": "a"', "not JSON: expecting ',' delimiter at character 13; the item ends there"),
        ('{"path": "a}', "not JSON: unterminated string at character 10"),
        ('{"path": "\\ud800"}', r"not JSON: half of a pair of \u escapes"),
        ("NaN", "not JSON: it has no number NaN"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
        ('{"path": 7}', "expected `str`, got `int` - at `$.path` (job resize)"),
    ],
)
async def test_a_bad_line_is_told_by_its_number_and_nothing_is_stored(tmp_path, line, says):
    (tmp_path / "bad.jsonl").write_text(f'{{"path": "a"}}\n\n{line}\n{{"path": "b"}}\n')
    async with queueing(tmp_path) as (_, path):
        out, err = await run(path, "submit", "images", f"@{tmp_path}/bad.jsonl", code=1)
        assert out == "" and err.startswith(f"supervisor: {tmp_path}/bad.jsonl:3: ")
        assert says in err and err.endswith("; nothing is stored\n")
        (row,) = await AsyncClient(path).queue_ls("images")
        assert row.done == row.waiting == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hello"], "not JSON: expecting value at character 1; a text needs its quotes: '\"hello\"'"),
        (["{path: 1}"], "not JSON: expecting property name enclosed in double quotes at character 2"),
        (["some.jsonl"], "not JSON: expecting value at character 1; the lines of that file are @some.jsonl"),
        (["@"], "expected the name of a file after the @"),
        (["@."], ".: is a directory"),
        (["@latin.jsonl"], "latin.jsonl:2: not UTF-8 (byte 2)"),
        (["@large.jsonl"], "large.jsonl:1: 64 MB: an item may have 64; put the name of a file in its place"),
        (["1", "--id", "a", "--id", "b"], "expected as many ids as items (1), or one that theirs begin with; got 2"),
        (
            ["@some.jsonl", "1", "--id", "a", "--id", "b"],
            "expected as many ids as items (3), or one that theirs begin with; got 2",
        ),
    ],
)
async def test_what_is_no_item_is_told_with_what_to_do(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.jsonl").write_text("1\n2\n")
    (tmp_path / "latin.jsonl").write_bytes(b'1\n"\xe9"\n')
    if "@large.jsonl" in words:
        (tmp_path / "large.jsonl").write_bytes(b'"%s"' % (b"x" * connection.MAX_SUBMIT))
    async with queueing(tmp_path) as (_, path):
        out, err = await run(path, "submit", "small", *words, code=1)
        assert (out, err) == ("", f"supervisor: {says}; nothing is stored\n")


async def test_an_item_may_be_as_large_as_a_request(tmp_path):
    (tmp_path / "large.jsonl").write_bytes(b'"%s"\n' % (b"x" * (LARGEST - 2)))
    async with queueing(tmp_path) as (_, path):
        out, _ = await run(
            path, "submit", "small", f"@{tmp_path}/large.jsonl", "--id", "x" * 128, "--at", "2100-01-01T00:00:00Z"
        )
        assert out.endswith(": stored\n")


async def test_a_file_may_begin_as_some_editors_have_it(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b"\xef\xbb\xbf1\r\n2\r\n")
    async with queueing(tmp_path) as (_, path):
        out, _ = await run(path, "submit", "small", f"@{tmp_path}/some.jsonl")
        assert out == "small: 2 stored\n"


async def test_where_it_ends_early_it_says_how_many_are_stored(tmp_path):
    (tmp_path / "many.jsonl").write_text("".join(f"{number}\n" for number in range(5)))
    async with queueing(tmp_path) as (_, path):
        _, err = await run(path, "submit", "small", f"@{tmp_path}/many.jsonl", "--timeout", "50ms", code=75)
        assert "is full" in err and err.endswith("; 3 items are stored\n") and err.count("stored") == 1
        _, err = await run(path, "submit", "small", f"@{tmp_path}/nosuch.jsonl", code=1)
        assert err == f"supervisor: {tmp_path}/nosuch.jsonl: no such file or directory; nothing is stored\n"
        _, err = await run(path, "submit", "smal", "1", code=4)
        assert err == "supervisor: no queue 'smal'; did you mean 'small'?; nothing is stored\n"
    await run(path, "submit", "small", "1", code=3)


async def test_ctrl_c_says_what_is_stored(tmp_path):
    (tmp_path / "many.jsonl").write_text("".join(f"{number}\n" for number in range(5)))
    async with queueing(tmp_path) as (_, path), trio.open_nursery() as nursery:
        env = ENVIRON | {"SUPERVISOR_SOCKET": path}
        command = [*SUPERVISOR, "submit", "small", f"@{tmp_path}/many.jsonl"]
        process = await nursery.start(partial(trio.run_process, command, stderr=subprocess.PIPE, check=False, env=env))
        await seen(lambda: AsyncClient(path).queue_ls("small"), lambda rows: rows[0].waiting == 3)
        process.send_signal(2)
        err = b""
        while chunk := await process.stderr.receive_some():
            err += chunk
        assert await process.wait() == 130
        assert err == b"supervisor: interrupted; perhaps some of the first 5 are stored\n"


async def test_on_a_terminal_there_is_a_bar_for_many(tmp_path):
    (tmp_path / "many.jsonl").write_text("".join(f'{{"path": "{number}"}}\n' for number in range(5000)))
    async with queueing(tmp_path) as (_, path):
        ours, theirs = pty.openpty()
        try:
            env = ENVIRON | {"SUPERVISOR_SOCKET": path}
            command = [*SUPERVISOR, "submit", "images", f"@{tmp_path}/many.jsonl"]
            done = await trio.run_process(command, capture_stdout=True, stderr=theirs, env=env)
            shown = os.read(ours, 1 << 16).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert done.stdout == b"images: 5000 stored\n"
        assert "█" in shown and "of 5000 stored" in shown and shown.endswith("\r\x1b[K")


async def test_tables_show_queues_and_items(tmp_path):
    async with queueing(tmp_path) as (_, path):
        await run(path, "submit", "small", '{"a": "b"}', "--id", "one")
        await run(path, "submit", "small", "2", "--id", "two", "--delay", "1h")
        out, _ = await run(path, "queue", "ls")
        head, *rows = [line.split() for line in out.splitlines()]
        assert head[:5] == ["QUEUE", "STATE", "WAITING", "DELAYED", "RUNNING"]
        assert rows[2][:5] == ["small", "open", "1", "1", "0"] and rows[2][-2:] == ["memory", "idle"]
        out, _ = await run(path, "queue", "peek", "small")
        assert [line.split()[0] for line in out.splitlines()] == ["ITEM", "one", "two"]
        assert '{"a": "b"}' in out and "in 59m" in out
        out, _ = await run(path, "queue", "peek", "small", "--json", "-n", "1")
        assert [row["id"] for row in json.loads(out)] == ["one"]
        out, _ = await run(path, "queue", "dead", "small")
        assert out == "no items\n"
        await run(path, "queue", "pause", "small")
        out, _ = await run(path, "queue", "ls", "small")
        assert out.splitlines()[1].split()[1] == "paused"
        _, err = await run(path, "queue", "requeue", "small", code=2)
        assert "--all" in err
        _, err = await run(path, "queue", "wait", "two", "--timeout", "10ms", code=75)
        assert "not ended yet: two" in err
        out, _ = await run(path, "cancel", "one", "two")
        assert out == "one: cancelled: it waited\ntwo: cancelled: it waited\n"
        out, _ = await run(path, "queue", "wait", "two", code=1)
        assert out == "two: cancelled\n"
        out, _ = await run(path, "run-now", "idle", code=1)
        assert "submit" in out
