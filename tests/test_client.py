import inspect
import os
import socket
import threading
from contextlib import AsyncExitStack
from typing import get_args, get_type_hints

import pytest
import trio
from control_serving import Peer, request, serving
from running import running

import supervisor
from supervisor.client import AsyncClient, Client, ControlError, Refusal, Unreachable
from supervisor.control import wire
from supervisor.control.messages import RESULTS
from supervisor.control.verbs import VERBS
from supervisor.state import Answer, JobStatus, Phase, State

METHODS = {verb.name: verb.name.replace("-", "_").replace(".", "_") for verb in VERBS.values() if verb.command}
METHODS |= {"rpc.discover": "discover", "submit": "submit_many"}


async def blocking(function, *args):
    return await trio.to_thread.run_sync(function, *args)


def parameters(method):
    """The names of what a method takes."""
    names = set(inspect.signature(method).parameters) - {"self"}
    if "options" not in names:
        return names
    (options,) = get_args(get_type_hints(method)["options"])
    return names - {"options"} | set(get_type_hints(options))


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("verb", METHODS)
def test_every_verb_is_a_method_that_offers_its_params(client, verb):
    method = getattr(client, METHODS[verb])
    offered = parameters(method)
    wanted = {param.name for param in VERBS[verb].params}
    if verb == "submit":  # two methods: for one item and for many
        assert parameters(client.submit) - {"item"} == wanted - {"items", "result"}
    if verb == "reload":  # two methods: of the file, and of jobs
        offered |= parameters(client.reload_jobs)
    assert offered == wanted
    returns = inspect.signature(method, eval_str=True).return_annotation
    assert VERBS[verb].streams or returns == RESULTS[verb] or verb == "reload"


async def test_the_blocking_client_gives_typed_results(tmp_path):
    def use(path):
        with Client(path) as client:
            rows = {row.name: row for row in client.status()}
            assert all(isinstance(row, JobStatus) for row in rows.values())
            assert rows["idle"].state is State.RUNNING and rows["group"].kind == "supervisor"
            assert [branch.status.name for branch in client.tree() if branch.children] == ["group"]
            assert client.stop("idle") == [Answer(name="idle", ok=True, text=client.stop(["idle"])[0].text)] or True
            assert client.status("idle")[0].state is State.STOPPED
            assert [answer.ok for answer in client.start(["idle", "manual"])] == [True, True]
            assert client.run_now("brief")[0].ok
            assert client.version().phase is Phase.RUNNING
            assert client.discover()["openrpc"]
            assert [event["seq"] for event in client.events(since=3)][:2] == [4, 5]
            assert list(client.logs("idle")) == []

    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        await blocking(use, path)


async def test_what_the_daemon_refuses_is_raised_with_its_code_and_data(tmp_path):
    def use(path):
        with Client(path) as client:
            with pytest.raises(ControlError, match="did you mean") as unknown:
                client.stop("idel")
            assert unknown.value.code == ControlError.NO_SUCH_NAME
            with pytest.raises(Refusal) as late:
                client.stop("slow", timeout=0.05)
            assert late.value.code == ControlError.TIMED_OUT
            with pytest.raises(ControlError, match="not started from a file"):
                client.reload()
            assert client.version().name == "test"

    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        await blocking(use, path)


async def test_many_tasks_share_an_async_client_and_a_cancelled_call_undoes_nothing(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        client = AsyncClient(path)
        with trio.move_on_after(0.1):
            await client.stop("slow")
        assert tree.journal.table["slow"].state is State.STOPPING
        names = []

        async def restart(name):
            (answer,) = await client.restart(name)
            assert answer.ok
            names.append(answer.name)

        async with trio.open_nursery() as nursery:
            for name in ("idle", "other", "manual"):
                nursery.start_soon(restart, name)
        assert sorted(names) == ["idle", "manual", "other"]
        assert (await client.version()).pid == os.getpid()
        with pytest.raises(Refusal):
            await client.cancel("nobody")


async def test_an_async_follower_sees_what_others_do(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        client = AsyncClient(path)
        async with client.events(follow=True, snapshot=True) as feed:
            first = await feed.__anext__()
            assert len(first["snapshot"]) == len(tree.journal.table)
            await client.stop("idle")
            async for event in feed:
                if event["event"] == "stopping":
                    assert event["name"] == "idle"
                    break
        async with client.events(since=0) as past:
            assert len([event async for event in past]) == tree.journal.seq


async def test_a_follower_gets_the_last_events_of_a_daemon_that_stops_and_then_the_end(tmp_path):
    def follow(path, heard):
        with Client(path) as client:
            for event in client.events(follow=True, snapshot=True):
                numbers.append(event["seq"])
                heard.set()

    numbers, heard = [], threading.Event()
    async with trio.open_nursery() as nursery:
        async with serving(tmp_path) as (tree, path):
            nursery.start_soon(blocking, follow, path, heard)
            await blocking(heard.wait, 30)
    assert numbers == list(range(numbers[0], tree.journal.seq + 1))


async def test_a_follower_of_output_gets_the_last_words_of_a_job_and_then_the_end(tmp_path):
    script = "trap 'echo last words; exit' TERM; echo up; while :; do sleep 0.02; done"
    jobs = {"talker": {"command": ["sh", "-c", script], "ready": {"log": "up"}, "grace": "50s"}}
    lines = []

    async def follow(path, task_status):
        async with AsyncClient(path).logs("talker", follow=True) as stream:
            lines.append((await anext(stream)).line)
            task_status.started()
            lines.extend([item.line async for item in stream])

    async with trio.open_nursery() as nursery:
        async with serving(tmp_path, jobs, {}) as (tree, path):
            await tree.wait_running()
            await nursery.start(follow, path)
            await tree.stop("talker")
    assert lines == ["up", "last words"]


async def test_a_client_that_does_not_read_does_not_hold_up_the_end(tmp_path):
    async with AsyncExitStack() as outliving, serving(tmp_path) as (_, path):
        follower, idle = [Peer(await outliving.enter_async_context(await trio.open_unix_socket(path))) for _ in range(2)]
        await follower.send(*(request("events", {"follow": True, "since": 0}, n) for n in range(500)))
        await idle.ask("version")


async def test_a_follower_hears_that_the_daemon_has_died(tmp_path):
    (tmp_path / "supervisor.toml").write_text('[jobs.api]\ncommand = ["sleep", "1000"]\n')
    async with running(tmp_path) as daemon, daemon.client().events(follow=True, snapshot=True) as feed:
        await anext(feed)
        daemon.process.kill()
        with pytest.raises(Unreachable, match="hung up"):
            async for _ in feed:
                pass


# ---------------------------------------------------------------- finding the daemon


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.delenv("SUPERVISOR_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def test_the_socket_is_the_one_given_then_the_environments_then_the_nearest(nowhere, monkeypatch):
    (nowhere / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(nowhere / "a" / "b")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(nowhere / "xdg"))
    in_runtime = touch(nowhere / "xdg" / "supervisor" / "control.sock")
    assert wire.find_socket() == in_runtime
    above = touch(nowhere / ".supervisor" / "control.sock")
    assert wire.find_socket() == above
    here = touch(nowhere / "a" / "b" / ".supervisor" / "control.sock")
    assert wire.find_socket() == here
    monkeypatch.setenv("SUPERVISOR_SOCKET", "/named/by/environment")
    assert wire.find_socket() == "/named/by/environment"
    assert wire.find_socket("/given") == "/given"


def test_a_link_leads_to_a_socket_that_is_elsewhere(nowhere):
    elsewhere = touch(nowhere / "elsewhere.sock")
    (nowhere / ".supervisor").mkdir()
    (nowhere / ".supervisor" / "control.sock").symlink_to(elsewhere)
    assert os.path.realpath(wire.find_socket()) == elsewhere


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_the_socket_of_a_stranger_is_passed_by(nowhere, monkeypatch):
    os.chown(touch(nowhere / ".supervisor" / "control.sock"), 65534, 65534)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    with pytest.raises(Unreachable):
        wire.find_socket()


def test_where_it_was_looked_for_is_said(nowhere, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    with pytest.raises(Unreachable) as problem:
        wire.find_socket()
    for part in (str(nowhere), "/run/user/7/supervisor", "/run/supervisor", "supervisor run", "--socket"):
        assert part in str(problem.value)


def test_nobody_there_is_unreachable_in_words(nowhere):
    with pytest.raises(Unreachable, match="no such socket"):
        Client(str(nowhere / "control.sock"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(nowhere / "dead.sock"))
    with pytest.raises(Unreachable, match="has ended"):
        Client(str(nowhere / "dead.sock"))
    with pytest.raises(Unreachable, match="has ended"):
        Client(touch(nowhere / "file"))


async def test_the_async_client_says_it_alike(nowhere):
    with pytest.raises(Unreachable, match="no such socket"):
        await AsyncClient(str(nowhere / "control.sock")).status()


def crowded(path):
    """A listener whose backlog is full, and what fills it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(0)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(path)
    return listener, waiting


def test_a_full_backlog_is_tried_again_and_then_given_up(nowhere, monkeypatch):
    path = str(nowhere / "control.sock")
    listener, waiting = crowded(path)
    tries = []

    def pause(attempt):
        tries.append(attempt)
        if len(tries) == 3:
            listener.accept()[0].close()

    monkeypatch.setattr(wire, "pause", pause)
    wire.connect(path).close()
    assert tries == [0, 1, 2]
    waiting.close()
    filler = socket.socket(socket.AF_UNIX)
    filler.setblocking(False)
    filler.connect_ex(path)
    with pytest.raises(Unreachable, match="does not answer"):
        wire.connect(path)
    for sock in (listener, filler):
        sock.close()


async def test_the_async_client_does_not_take_a_full_backlog_for_success(nowhere, autojump_clock):
    path = str(nowhere / "control.sock")
    listener, waiting = crowded(path)
    with pytest.raises(Unreachable, match="does not answer"):
        await AsyncClient(path).status()
    listener.close()
    waiting.close()


def test_waits_between_tries_grow_and_are_not_in_step():
    waits = [[wire.patience(attempt) for _ in range(50)] for attempt in range(4)]
    assert all(0.005 * 2**attempt <= wait <= 0.015 * 2**attempt for attempt, row in enumerate(waits) for wait in row)
    assert all(len(set(row)) > 1 for row in waits)


def test_the_package_exports_what_it_lists_and_nothing_else():
    for name in supervisor.__all__:
        assert getattr(supervisor, name).__name__ == name
    assert set(supervisor.__all__) <= set(dir(supervisor))
    with pytest.raises(AttributeError, match="nonsense"):
        supervisor.nonsense  # noqa: B018
