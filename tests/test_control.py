import errno
import json
import os
import resource
import signal
import socket
import stat
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
import trio
from control_serving import peer, request, serving, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor.control import connection, handlers, messages, orders, server
from supervisor.control.listener import Place
from supervisor.control.verbs import ALL, LATER, VERBS
from supervisor.events import Commanded, Warned
from supervisor.state import Answer, State
from supervisor.unix import SocketTaken


def events_of(tree, kind):
    return [event for event in tree.journal.past(0)[1] if isinstance(event, kind)]


# ---------------------------------------------------------------- the protocol


async def test_status_of_all_is_the_table_as_it_is(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        answer = await client.ask("status")
        assert answer["id"] == 1 and answer["jsonrpc"] == "2.0"
        assert msgspec.convert(answer["result"], messages.RESULTS["status"]) == list(tree.journal.table.values())


async def test_status_shows_a_change_that_came_after_the_last_one(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        await client.ask("status")
        await client.ask("stop", {"names": ["idle"]})
        (row,) = (row for row in (await client.ask("status"))["result"] if row["name"] == "idle")
        assert (row["state"], row["goal"]) == ("stopped", "down")


async def test_status_of_some_takes_globs_and_names_what_is_missing(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        assert [row["name"] for row in (await client.ask("status", {"names": ["i*"]}))["result"]] == ["idle"]
        error = (await client.ask("status", {"names": ["idel"]}))["error"]
        assert error["code"] == 4 and "'idle'" in error["message"]


async def test_a_tree_is_nested_as_it_hangs_together(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        branches = {branch["status"]["name"]: branch["children"] for branch in (await client.ask("tree"))["result"]}
        assert [branch["status"]["name"] for branch in branches["group"]] == ["idle", "other"]
        assert branches["slow"] == [] and "idle" not in branches


async def test_requests_sent_at_once_are_each_answered_with_their_id(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        await client.send(*(request("status", {"names": ["idle"]}, id) for id in [*range(300), "text", None, 1.5]))
        answers = [await client.read() for _ in range(303)]
        assert sorted(map(str, (answer["id"] for answer in answers))) == sorted(map(str, [*range(300), "text", None, 1.5]))
        assert all(answer["result"][0]["name"] == "idle" for answer in answers)


async def test_a_wait_holds_up_nothing_else_on_the_same_connection(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        await client.send(request("stop", {"names": ["slow"]}, "slow"), request("restart", {"names": ["idle"]}, "idle"))
        assert (await client.read())["id"] == "idle"
        assert tree.journal.table["slow"].state is State.STOPPING
        await client.send(request("stop", {"names": ["slow"], "now": True}, "now"))
        answers = {answer["id"]: answer["result"][0]["ok"] for answer in [await client.read(), await client.read()]}
        assert answers == {"slow": True, "now": True}


async def test_a_notification_acts_and_gets_no_answer(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        await client.send({"jsonrpc": "2.0", "method": "stop", "params": {"names": ["idle"]}})
        await client.send({"jsonrpc": "2.0", "method": "no such thing"})
        await until(tree, lambda table: table["idle"].state is State.STOPPED)
        assert (await client.ask("version", id="next"))["id"] == "next"


async def test_a_batch_is_answered_by_one_array(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        await client.send([request("version", id=1), {"jsonrpc": "2.0", "method": "version"}, request("nope", id=2), 7])
        answers = {answer["id"]: answer for answer in await client.read()}
        assert answers.keys() == {1, 2, None}
        assert answers[1]["result"]["name"] == "test" and answers[2]["error"]["code"] == -32601
        assert answers[None]["error"]["code"] == -32600
        await client.send([{"jsonrpc": "2.0", "method": "version"}])  # a batch of notifications: no answer at all
        await client.send([])
        assert (await client.read())["error"]["code"] == -32600


async def test_a_stream_cannot_be_part_of_a_batch(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        await client.send([request("events", {"follow": True})])
        (answer,) = await client.read()
        assert answer["error"]["code"] == -32600 and "alone" in answer["error"]["message"]


async def test_params_may_be_given_by_position(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        assert (await client.ask("status", [["slow"]]))["result"][0]["name"] == "slow"
        assert "at most 2" in (await client.ask("status", [[], False, 1]))["error"]["message"]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (b"{", -32700, "truncated"),
        (b"\x00\xff", -32700, "utf-8"),
        (b'{"jsonrpc":"2.0","id":"\xff","method":"version"}', -32700, "utf-8"),
        (b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}', -32700, ""),
        (b"\xef\xbb\xbf{}", -32700, "invalid"),
        (b"[" * 100_000, -32700, "nested"),
        (b'{"jsonrpc":"2.0","id":1,"method":"status","params":' + b"[" * 5000 + b"]" * 5000 + b"}", -32700, "nested"),
        (b"7", -32600, "object"),
        (b"{}", -32600, "jsonrpc"),
        (b'{"jsonrpc":"1.0","id":3,"method":"version"}', -32600, "2.0"),
        (b'{"jsonrpc":"2.0","id":{},"method":"version"}', -32600, "id"),
        (b'{"jsonrpc":"2.0","id":3,"method":7}', -32600, "method"),
        (b'{"jsonrpc":"2.0","id":3,"method":"statsu"}', -32601, "'status'"),
        (b'{"jsonrpc":"2.0","id":3,"method":"__class__"}', -32601, "no method"),
        (b'{"jsonrpc":"2.0","id":3,"method":"stop"}', -32602, "names"),
        (b'{"jsonrpc":"2.0","id":3,"method":"stop","params":{"names":[]}}', -32602, "length"),
        (b'{"jsonrpc":"2.0","id":3,"method":"stop","params":{"names":"idle"}}', -32602, "array"),
        (b'{"jsonrpc":"2.0","id":3,"method":"stop","params":{"names":["idle"],"timeout":-1}}', -32602, "0"),
        (b'{"jsonrpc":"2.0","id":3,"method":"stop","params":{"names":["idle"],"force":true}}', -32602, "force"),
        (b'{"jsonrpc":"2.0","id":3,"method":"stop","params":7}', -32602, "object"),
        (b'{"jsonrpc":"2.0","id":3,"method":"why"}', 1, "not supported yet"),
        (b'{"jsonrpc":"2.0","id":3,"method":"submit"}', -32602, "queue"),
        (b'{"jsonrpc":"2.0","id":3,"method":"submit","params":["nosuch",[1]]}', 4, "the file has no [queues]"),
    ],
)
async def test_what_is_wrong_with_a_line_is_said_and_the_connection_goes_on(tmp_path, line, code, says):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        await client.send(line + b"\n", request("version", id="after"))
        answers = [await client.read(), await client.read()]
        (error,) = (answer["error"] for answer in answers if "error" in answer)
        assert error["code"] == code and says.lower() in error["message"].lower()
        assert "after" in [answer["id"] for answer in answers]


async def test_a_request_over_a_megabyte_is_refused_and_the_connection_goes_on(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        await client.send(b"x" * (5 << 20) + b"\n", request("version"))
        assert "over" in (await client.read())["error"]["message"]
        assert "result" in await client.read()


async def test_a_request_just_under_a_megabyte_is_taken(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        line = json.dumps(request("version")).encode()
        await client.send(line + b" " * (connection.MAX_REQUEST - len(line)) + b"\n")
        assert "result" in await client.read()


async def test_blank_lines_are_skipped_and_a_last_line_needs_no_end(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        await client.send(b"\n \r\n", json.dumps(request("version")).encode())
        await client.stream.send_eof()
        assert "result" in await client.read()
        assert await client.read() is None


async def test_a_handler_that_raises_costs_one_answer_and_nothing_else(tmp_path, monkeypatch):
    async def broken(call):
        raise RuntimeError("a fault of ours")

    monkeypatch.setitem(handlers.HANDLERS, "version", broken)
    async with serving(tmp_path) as (_, path), peer(path) as client:
        error = (await client.ask("version"))["error"]
        assert error["code"] == -32603 and "a fault of ours" in error["message"]
        assert "result" in await client.ask("status")


async def test_text_that_is_no_unicode_is_escaped_and_not_an_error(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        tree.journal.emit(Warned, text=os.fsdecode(b"caf\xe9"))
        await client.send(request("events"))
        assert [await client.read() for _ in range(tree.journal.seq)][-1]["params"]["item"]["text"] == "caf\\udce9"


async def test_the_description_of_the_protocol_has_every_verb_with_its_params(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        described = (await client.ask("rpc.discover"))["result"]
        assert {method["name"]: [param["name"] for param in method["params"]] for method in described["methods"]} == {
            verb.name: [param.name for param in verb.params] for verb in ALL
        }
        assert "JobStatus" in described["components"]["schemas"]


def test_every_verb_has_a_handler_a_result_and_a_help_text():
    assert handlers.HANDLERS.keys() == messages.RESULTS.keys() == VERBS.keys()
    assert all(verb.help and all(param.help for param in verb.params) for verb in ALL)
    assert not VERBS.keys() & set(LATER)


# ---------------------------------------------------------------- commands


async def test_every_change_is_recorded_with_who_asked(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        for method, params in (("stop", {"names": ["i*"]}), ("start", {"names": ["idle"]}), ("status", None)):
            await client.ask(method, params)
        recorded = [(event.verb, event.names, event.by) for event in events_of(tree, Commanded)]
        by = recorded[0][2]
        assert recorded == [("stop", ("i*",), by), ("start", ("idle",), by)]
        assert by.startswith(f"uid {os.getuid()}")


async def test_nothing_is_recorded_or_done_when_one_of_the_names_is_unknown(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        assert (await client.ask("stop", {"names": ["idle", "nobody"]}))["error"]["code"] == 4
        assert tree.journal.table["idle"].state is State.RUNNING and not events_of(tree, Commanded)


async def test_a_timeout_gives_75_with_what_is_done_and_undoes_nothing(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        error = (await client.ask("stop", {"names": ["idle", "slow"], "timeout": 0.05}))["error"]
        assert error["code"] == 75 and "slow" in error["message"] and "idle" not in error["message"]
        assert [(answer["name"], answer["ok"]) for answer in error["data"]] == [("idle", True)]
        assert tree.journal.table["slow"].state is State.STOPPING


async def test_no_wait_answers_when_the_order_is_taken_and_still_says_what_is_refused(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        (answer,) = (await client.ask("stop", {"names": ["slow"], "wait": False}))["result"]
        assert answer["ok"] and tree.journal.table["slow"].state is State.STOPPING
        (answer,) = (await client.ask("run-now", {"names": ["idle"], "wait": False}))["result"]
        assert not answer["ok"] and "service" in answer["text"]


async def test_a_client_that_hangs_up_cancels_its_wait_and_not_the_order(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        async with peer(path) as client:
            await client.send(request("stop", {"names": ["slow"]}))
            await until(tree, lambda table: table["slow"].state is State.STOPPING)
        async with peer(path) as client:
            await client.ask("version")
            assert tree.journal.table["slow"].state is State.STOPPING


async def test_a_client_whose_command_is_overtaken_is_told_by_whom(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        await client.send(request("restart", {"names": ["slow"]}, "restart"))
        await until(tree, lambda table: table["slow"].state is State.STOPPING)
        await client.send(request("stop", {"names": ["slow"], "wait": False}, "stop"))
        answers = {answer["id"]: answer["result"][0] for answer in [await client.read(), await client.read()]}
        assert not answers["restart"]["ok"] and f"uid {os.getuid()}" in answers["restart"]["text"]


async def test_run_now_waits_for_the_end_of_the_run_and_pause_and_resume_answer(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        for method, name, ok in (
            ("run-now", "brief", True),
            ("run-now", "broken", False),
            ("pause", "hourly", True),
            ("resume", "hourly", True),
            ("pause", "idle", False),
            ("signal", "idle", False),
        ):
            params = {"name": name, "signal": "hup"} if method == "signal" else {"names": [name]}
            (answer,) = (await client.ask(method, params))["result"]
            assert (method, name, answer["ok"]) == (method, name, ok), answer


async def test_a_run_is_cancelled_by_its_id(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await client.send(request("run-now", {"names": ["task"]}, "run"))
        await until(tree, lambda table: table["task"].state is State.RUNNING)
        run = tree.journal.table["task"].run
        await client.send(request("cancel", {"names": [run]}, "cancel"))
        answers = {answer["id"]: answer["result"][0] for answer in [await client.read(), await client.read()]}
        assert answers["cancel"]["ok"] and not answers["run"]["ok"], answers


async def test_a_job_that_hears_signals_gets_the_one_that_is_named(tmp_path):
    jobs = {"child": {"command": ["sleep", "3600"], "restart": "temporary"}}
    async with serving(tmp_path, jobs, {}) as (tree, path), peer(path) as client:
        await tree.wait_running()
        assert "did you mean 'KILL'?" in (await client.ask("signal", {"name": "child", "signal": "KIL"}))["error"]["message"]
        (answer,) = (await client.ask("signal", {"name": "child", "signal": "KILL"}))["result"]
        assert answer["ok"]
        await until(tree, lambda table: table["child"].exit is not None)
        assert tree.journal.table["child"].exit.signal in ("KILL", "SIGKILL")


@pytest.mark.parametrize(
    ("text", "number"), [("HUP", 1), ("sigusr1", signal.SIGUSR1), ("9", 9), ("SIGTERM", 15)], ids=lambda value: str(value)
)
def test_signals_are_named_as_people_name_them(text, number):
    assert orders._signal_number(text) == number


async def test_reload_of_the_file_is_refused_where_there_is_none(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        error = (await client.ask("reload"))["error"]
        assert error["code"] == 1 and "not started from a file" in error["message"]


async def test_reload_gives_the_plan_and_the_faults_of_the_file(tmp_path):
    from supervisor.config import Plan
    from supervisor.errors import Problem, SpecError

    asked = []

    async def reload(*, plan, by):
        asked.append((plan, by))
        if len(asked) == 2:
            raise SpecError([Problem("supervisor.toml", 3, 1, "jobs.api.restrat", "unknown key")])
        return Plan(added=("new",)), ()

    async with serving(tmp_path, reload=reload) as (tree, path), peer(path) as client:
        assert (await client.ask("reload", {"plan": True}))["result"]["added"] == ["new"]
        assert not events_of(tree, Commanded)
        error = (await client.ask("reload"))["error"]
        assert error["code"] == 78 and error["data"][0]["line"] == 3
        assert [plan for plan, _ in asked] == [True, False] and asked[0][1].startswith("uid ")


async def test_shutdown_is_answered_when_everything_has_stopped(tmp_path):
    async with serving(tmp_path, {"idle": {"call": "control_jobs:idle"}}, {}) as (tree, path):
        with trio.CancelScope(shield=True):
            async with peer(path) as client:
                assert (await client.ask("shutdown", {}))["result"] == {"late": [], "survivors": []}
        assert tree.journal.table["idle"].state is State.STOPPED


# ---------------------------------------------------------------- streams


async def test_events_of_the_past_come_in_order_and_then_the_end(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        seq = tree.journal.seq
        await client.send(request("events", {"since": 2}, "past"))
        items = []
        while "params" in (answer := await client.read()):
            assert answer["params"]["id"] == "past"
            items.append(answer["params"]["item"])
        assert [item["seq"] for item in items] == list(range(3, seq + 1))
        assert answer == {"jsonrpc": "2.0", "id": "past", "result": {"seq": seq}}


async def test_a_follower_gets_a_snapshot_and_then_every_change(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as client:
        await tree.wait_running()
        await client.send(request("events", {"follow": True, "snapshot": True}, "feed"))
        first = (await client.read())["params"]["item"]
        assert {row["name"] for row in first["snapshot"]} == tree.journal.table.keys()
        async with peer(path) as other:
            await other.ask("stop", {"names": ["idle"]})
        item = (await client.read())["params"]["item"]
        assert (item["event"], item["seq"], item["verb"]) == ("commanded", first["seq"] + 1, "stop")


async def test_a_follower_that_does_not_read_is_told_how_much_it_lost_and_slows_nobody(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as lazy, peer(path) as other:
        await lazy.send(request("events", {"follow": True}, "lazy"), request("version", id="started"))
        assert (await lazy.read())["id"] == "started"
        emitted = 0
        for _ in range(40):
            for _ in range(200):
                tree.journal.emit(Warned, text="x" * 200)
                emitted += 1
            assert "result" in await other.ask("version")
        seen = lagged = 0
        while seen + lagged < emitted:
            item = (await lazy.read())["params"]["item"]
            if item["event"] == "lagged":
                lagged += item["count"]
            else:
                seen += item["event"] == "warned"
        assert lagged and seen


PRINTING = {
    "talker": {"command": ["sh", "-c", "echo one; printf 'tw\\303'; sleep 0.05; printf '\\266\\n\\377\\n'; exec sleep 3600"]},
    "quiet": {"command": ["sleep", "3600"]},
    "task": {"call": "control_jobs:idle"},
}


async def test_followed_logs_begin_with_the_last_lines_and_lose_nothing_in_between(tmp_path):
    async with serving(tmp_path, PRINTING, {"group": {"children": ["talker"]}}) as (_, path), peer(path) as client:
        await client.send(request("logs", {"names": ["group"], "follow": True}, "feed"))
        items = [(await client.read())["params"] for _ in range(3)]
        assert items == [{"id": "feed", "item": {"name": "talker", "line": line}} for line in ("one", "twö", "\\xff")]


async def test_logs_of_the_past_end_with_a_result(tmp_path):
    jobs = PRINTING | {"talker": {"command": ["sh", "-c", "echo a; echo b; printf c"], "once": True}}
    async with serving(tmp_path, jobs, {}) as (tree, path), peer(path) as client:
        await tree.wait_running()
        for lines, expected in ((2, ["b", "c"]), (0, [])):
            await client.send(request("logs", {"lines": lines}))
            found = []
            while "params" in (answer := await client.read()):
                found.append(answer["params"]["item"]["line"])
            assert found == expected and "seq" in answer["result"]


async def test_a_client_that_never_reads_only_keeps_itself_waiting(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as greedy, peer(path) as other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greedy.send, *(request("status", id=id) for id in range(3_000)))
            for _ in range(100):
                assert "result" in await other.ask("version")
            for _ in range(3_000):
                assert "result" in await greedy.read()


# ---------------------------------------------------------------- many, strangers, exhaustion


async def test_three_hundred_clients_are_answered(tmp_path):
    async def ask_and_stay(path, answered, enough):
        async with peer(path) as client:
            answered.append("result" in await client.ask("status"))
            if len(answered) == 300:
                enough.set()
            await enough.wait()

    async with serving(tmp_path) as (_, path):
        answered: list[bool] = []
        enough = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(ask_and_stay, path, answered, enough)
        assert all(answered)


async def test_one_client_too_many_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "MAX_CLIENTS", 2)
    async with serving(tmp_path) as (_, path), peer(path) as one, peer(path) as two:
        await one.ask("version")
        await two.ask("version")
        async with peer(path) as three:
            assert "too many" in (await three.read())["error"]["message"]
            assert await three.read() is None
        assert "result" in await one.ask("version")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_refused_and_hung_up_on():
    code = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
os.setuid(65534)
sock.connect(sys.argv[1])
answer = b""
while data := sock.recv(65536):
    answer += data
sys.stdout.buffer.write(answer)
"""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)  # where everybody can get at it
        await refused(Path(directory), code)


async def refused(directory, code):
    async with serving(directory) as (_, path):
        os.chmod(os.path.dirname(path), 0o711)
        os.chmod(path, 0o666)  # even where the file lets them in
        result = await trio.run_process([sys.executable, "-c", code, path], capture_stdout=True)
        answer = json.loads(result.stdout)
        assert answer["error"]["code"] == messages.NOT_ALLOWED and answer["id"] is None


async def test_the_operator_is_answered_when_the_process_has_no_descriptors_left(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as first:
        await first.ask("version")
        late = socket.socket(socket.AF_UNIX)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        filler = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
            try:
                while True:
                    filler.append(os.dup(0))
            except OSError as full:
                assert full.errno == errno.EMFILE
            late.setblocking(False)
            late.connect(path)
            late.send(json.dumps(request("version")).encode() + b"\n")
            with trio.fail_after(30):
                await trio.lowlevel.wait_readable(late)
            assert b'"result"' in late.recv(65536)
            assert "result" in await first.ask("version")
        finally:
            for descriptor in filler:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            late.close()


# ---------------------------------------------------------------- the socket's file


async def test_the_socket_is_for_its_owner_alone_and_gone_afterwards(tmp_path):
    async with serving(tmp_path) as (_, path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert os.listdir(os.path.dirname(path)) == ["control.sock"]
    assert not os.path.exists(path)


async def test_a_stale_socket_is_replaced(tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "run" / "control.sock"))
    async with serving(tmp_path) as (_, path), peer(path) as client:
        assert "result" in await client.ask("version")


async def test_a_second_server_is_refused_and_the_first_goes_on(tmp_path):
    async with serving(tmp_path) as (_, path), peer(path) as client:
        with pytest.raises(SocketTaken, match="another process answers"):
            with Place(tmp_path / "run" / "control.sock") as place:
                place.take()
        assert "result" in await client.ask("version")
        async with peer(path) as other:
            assert "result" in await other.ask("version")


def test_what_is_not_a_socket_is_not_touched(tmp_path):
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(SocketTaken, match="not a socket"), Place(path) as place:
        place.take()
    assert path.read_text() == "precious"


def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(SocketTaken, match="others may write"), Place(tmp_path / "open" / "control.sock") as place:
        place.take()


def test_on_leaving_only_what_is_still_ours_is_removed(tmp_path):
    path = tmp_path / "control.sock"
    with Place(path) as place, place.take():
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


async def test_a_path_longer_than_a_socket_address_works(tmp_path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    async with serving(deep) as (_, path):
        assert len(path) > 200

        def ask():
            from supervisor.client import Client

            with Client(path) as client:
                return client.version().name

        assert await trio.to_thread.run_sync(ask) == "test"


def steal_by_unlink(path):
    os.unlink(path)


def steal_by_replacing(path):
    with open(path + ".new", "w"):
        pass
    os.rename(path + ".new", path)
    os.unlink(path)


def steal_by_moving_away(path):
    os.rename(path, path + ".away")


def steal_with_the_directory(path):
    os.unlink(path)
    os.rmdir(os.path.dirname(path))


@pytest.mark.parametrize("steal", [steal_by_unlink, steal_by_replacing, steal_by_moving_away, steal_with_the_directory])
async def test_a_stolen_socket_is_noticed_and_bound_again_and_old_clients_stay(tmp_path, steal):
    async with serving(tmp_path) as (tree, path), peer(path) as old:
        await old.ask("version")
        with tree.journal.subscribe() as feed:
            steal(path)
            async for event in feed:
                if isinstance(event, Warned):
                    break
        assert "bound again" in event.text
        async with peer(path) as client:
            assert "result" in await client.ask("version")
        assert "result" in await old.ask("version")


async def test_another_server_in_our_place_is_not_fought_but_outlived(tmp_path):
    async with serving(tmp_path) as (tree, path):
        with tree.journal.subscribe() as feed:
            thief = socket.socket(socket.AF_UNIX)
            thief.bind(path + ".thief")
            thief.listen()
            os.rename(path + ".thief", path)
            warnings = []
            async for event in feed:
                if isinstance(event, Warned):
                    warnings.append(event.text)
                    if "bound again" in event.text and "cannot" not in event.text:
                        break
                    thief.close()
                    os.unlink(path)
        assert "another process answers" in warnings[0]
        async with peer(path) as client:
            assert "result" in await client.ask("version")


# ---------------------------------------------------------------- whatever comes

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
_harmless = st.sampled_from([verb.name for verb in ALL if not verb.changes and not verb.streams] + ["", "exec", "nobody"])
_requests = st.fixed_dictionaries(
    {"jsonrpc": st.sampled_from(["2.0", "2.0", "1.0"]) | _json, "method": _harmless | _json},
    optional={"id": _json, "params": _json, "extra": _json},
)
_lines = st.one_of(
    st.binary(max_size=200),
    _json.map(lambda value: json.dumps(value).encode()),
    _requests.map(lambda value: json.dumps(value).encode()),
    st.lists(_requests, max_size=4).map(lambda value: json.dumps(value).encode()),
)


async def test_whatever_bytes_come_in_whatever_pieces_status_is_answered_afterwards(tmp_path):
    async with serving(tmp_path) as (_, path):
        portal = trio.lowlevel.current_trio_token()

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(lines=st.lists(_lines, max_size=6), cuts=st.lists(st.integers(1, 100), max_size=5), ended=st.booleans())
        def fuzz(lines, cuts, ended):
            trio.from_thread.run(poke, b"\n".join(lines) + (b"\n" if ended else b""), cuts, trio_token=portal)

        async def poke(data, cuts):
            async with peer(path) as client:
                for cut in cuts:
                    await client.stream.send_all(data[:cut])
                    data = data[cut:]
                await client.stream.send_all(data)
                await client.stream.send_eof()
                while (answer := await client.read()) is not None:
                    for one in answer if isinstance(answer, list) else [answer]:
                        assert one["jsonrpc"] == "2.0" and ("result" in one) != ("error" in one)
            async with peer(path) as client:
                assert "result" in await client.ask("status")

        await trio.to_thread.run_sync(fuzz)


def test_answers_are_plain_data():
    assert json.loads(messages.encode(Answer(name="a", ok=True, text="b"))) == {"name": "a", "ok": True, "text": "b"}
