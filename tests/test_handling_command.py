"""What the worker of a queue job that is a command does with an item. Real children."""

from __future__ import annotations

import json
import os

import pytest
import trio
from house import alive, open_house, open_worker, sh

from supervisor.errors import ExitStatus, RunFailed, WorkerLost
from supervisor.kinds import command_items
from supervisor.state import Phase


@pytest.fixture
async def house(tmp_path):
    async with open_house(tmp_path / "logs") as house:
        yield house


def shell(house, script, **spec):
    return open_worker(house, command=sh(script), **spec)


async def test_it_reads_the_item_as_json_and_what_it_prints_is_the_result(house):
    async with shell(house, "cat; echo 'to the log' >&2") as worker:
        assert await worker.json('{"a": [1, "ä"]}') == '{"a": [1, "ä"]}'
        assert await worker.json("2") == "2"
    assert house.log() == b"to the log\nto the log\n"
    assert worker.run.pid is None


@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("true", None),
        ("echo", None),
        ("echo hello, you", "hello, you"),
        ("printf 'a\\nb\\n'", "a\nb"),
        ("printf '\\n {\"a\":\\n 1} \\n'", {"a": 1}),
        ("echo null", None),
        ("echo NaN", "NaN"),
        ("printf '\\377'", "\ufffd"),
        ("yes '[' | head -c 20000", "\n".join("[" * 10000)),
    ],
)
async def test_what_it_prints_is_json_or_else_text(house, script, result):
    async with shell(house, script) as worker:
        assert await worker(1) == result


async def test_it_is_told_which_item_and_which_attempt_it_is(house):
    async with shell(house, "echo $SUPERVISOR_JOB $SUPERVISOR_RUN $SUPERVISOR_ITEM $SUPERVISOR_ATTEMPT") as worker:
        assert await worker(1, attempt=3) == "job job#1 item1 3"


async def test_an_item_that_nobody_reads_and_one_that_is_read_twice(house):
    text = "x" * (1 << 20)
    async with shell(house, "exit 0") as worker:
        assert await worker(text) is None
    async with shell(house, "wc -c; wc -c </dev/stdin") as worker:
        assert await worker(text) == f"{len(text) + 2}\n{len(text) + 2}"


async def test_items_and_results_may_be_large(house):
    text = "x" * (50 << 20)
    async with shell(house, "cat") as worker:
        assert await worker(text) == text


async def test_too_much_is_a_failure_and_ends_it(house, monkeypatch):
    monkeypatch.setattr(command_items, "LONGEST_RESULT", 1 << 20)
    async with shell(house, "echo $$ >&2; exec yes") as worker:
        with pytest.raises(RunFailed, match="it has printed more than 1 MB, which no result of a command may be"):
            await worker(1)
        assert not alive(int(house.log()))


async def test_its_exit_code_says_whether_it_has_failed(house):
    async with shell(house, "echo 'no paper' >&2; exit $(cat)", success_exit_codes=(0, 3)) as worker:
        assert await worker(0) is None and await worker(3) is None
        work = worker.work()
        with pytest.raises(ExitStatus, match="exited with code 4") as caught:
            await worker.handler.handle(work, b"4")
        assert caught.value.code == 4 and caught.value.traceback.endswith("no paper") and work.begun
        assert work.outcome.spent.duration > 0


async def test_a_death_by_a_signal_is_a_failure_whoever_sent_it(house):
    async with shell(house, "kill -SEGV $$") as worker:
        with pytest.raises(ExitStatus) as caught:
            await worker(1)
        assert caught.value.signal == "SIGSEGV"


async def test_a_program_that_is_not_there_is_not_the_items_fault(house):
    async with open_worker(house, command=("/no/such/program",)) as worker:
        work = worker.work()
        with pytest.raises(WorkerLost, match="no such program: '/no/such/program'"):
            await worker.handler.handle(work, b"1")
        assert not work.begun


async def under_way(worker, house, nursery, results):
    """A call whose child has said something."""
    work = worker.work()

    async def call() -> None:
        try:
            results.append(await worker.handler.handle(work, b"1"))
        except RunFailed as error:
            results.append(str(error))

    with house.outputs.follow("job") as follower:
        nursery.start_soon(call)
        while b"\n" not in await anext(follower):
            pass
    return work


async def test_a_worker_that_is_to_end_lets_it_finish(house, tmp_path):
    os.mkfifo(tmp_path / "gate")
    results: list[object] = []
    async with shell(house, f"echo up >&2; cat {tmp_path / 'gate'}") as worker, trio.open_nursery() as nursery:
        work = await under_way(worker, house, nursery, results)
        work.advance(Phase.STOPPING)
        await trio.testing.wait_all_tasks_blocked()
        await trio.to_thread.run_sync((tmp_path / "gate").write_text, '"the end"\n')
    assert results == [b'"the end"']


async def test_one_that_takes_too_long_is_asked_by_its_stop_signal(house):
    results: list[object] = []
    script = "trap 'echo caught >&2; exit 5' USR1; echo up >&2; while :; do sleep 0.01; done"
    async with shell(house, script, stop_signal="USR1") as worker, trio.open_nursery() as nursery:
        work = await under_way(worker, house, nursery, results)
        work.overdue = True
        work.advance(Phase.STOPPING)
    assert results == ["exited with code 5"]
    assert house.log() == b"up\ncaught\n"


async def test_cancelled_it_is_killed_with_all_that_came_of_it(house):
    results: list[object] = []
    async with shell(house, "setsid sleep 1000 & echo $$ $! >&2; wait") as worker, trio.open_nursery() as nursery:
        await under_way(worker, house, nursery, results)
        nursery.cancel_scope.cancel(reason="test")
    assert not any(alive(int(pid)) for pid in house.log().split())


async def test_nothing_is_left_open(house):
    async with shell(house, "cat") as worker:
        await worker(1)
        fds = set(os.listdir("/proc/self/fd"))
        for item in range(3):
            assert json.loads(json.dumps(await worker(item))) == item
        assert set(os.listdir("/proc/self/fd")) == fds
