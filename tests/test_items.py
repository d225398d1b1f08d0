"""Queues and their items from outside: the verbs on the socket, the clients, and the command line."""

import json

import msgspec
import pytest
import trio
from control_serving import peer, serving
from running import running

from supervisor.client import AsyncClient, Client, ControlError

QUEUES = {"images": {"backend": "memory"}, "mails": {"backend": "memory", "unique": {"by": ["to"]}}}
JOBS = {
    "resize": {"call": "control_items:resize", "queue": "images", "start": "manual"},
    "send": {"call": "control_items:send", "queue": "mails", "start": "manual"},
}


def queueing(directory, queues=QUEUES, jobs=JOBS):
    return serving(directory, jobs, {}, queues=queues)


async def test_an_item_is_put_handled_and_its_result_is_there(tmp_path):
    async with queueing(tmp_path) as (tree, path), peer(path) as client:
        done = await client.ask("submit", {"queue": "images", "items": [{"path": "a.jpg"}], "keep": True})
        assert done["result"][0]["what"] == "stored"
        rows = (await client.ask("queue.ls"))["result"]
        assert [(row["name"], row["waiting"], row["jobs"]) for row in rows] == [("images", 1, ["resize"]), ("mails", 0, ["send"])]
        await tree.start("resize")
        ended = await client.ask("queue.wait", {"ids": [done["result"][0]["id"]]})
        print(ended)
        assert ended["result"][0]["result"] == "a.jpg resized"
