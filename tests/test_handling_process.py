"""The worker of a queue job of kind `process`: one process for many calls, and every way in which either ends."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from textwrap import dedent
from typing import Any

import pytest
import structlog.testing
import trio
from house import House, Worker, alive, open_house, open_worker

from supervisor.errors import RaisedElsewhere, Retry, RunFailed, SpawnFailed, UnfitItem, WorkerLost
from supervisor.kinds import Work, process_channel
from supervisor.kinds.process_worker import HEADER
from supervisor.state import Phase

numbers = itertools.count()


@pytest.fixture
async def house(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    async with open_house(tmp_path / "logs") as house:
        yield house


def process(house: House, code: str, **spec: Any) -> Any:
    """A worker whose function is the `f` of this code."""
    name = f"handling_{next(numbers)}"
    (house.logs.parent / f"{name}.py").write_text("import os, signal, stat, sys, time\n" + dedent(code))
    return open_worker(house, **{"kind": "process", "call": f"{name}:f", **spec})


class Calls:
    """Calls under way at the same time: what became of each, in the order in which they ended."""

    def __init__(self, worker: Worker, nursery: trio.Nursery) -> None:
        self.worker = worker
        self.nursery = nursery
        self.ended: list[tuple[str, Any]] = []
        self.works: dict[str, Work] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self._more = trio.Event()

    async def start(self, payload: str = "0", **keys: Any) -> Work:
        """Begin a call; the next is behind it."""
        work = self.worker.work(**keys)
        self.works[work.item] = work
        self.scopes[work.item] = trio.CancelScope()
        await self.nursery.start(self._call, work, payload)
        return work

    async def _call(self, work: Work, payload: str, task_status: trio.TaskStatus[None]) -> None:
        what: Any = "cancelled"
        task_status.started()
        with self.scopes[work.item]:
            try:
                what = await self.worker.handler.handle(work, payload.encode())
            except RunFailed as error:
                what = error
        self.ended.append((work.item, what))
        self._more.set()
        self._more = trio.Event()

    async def until(self, count: int) -> list[tuple[str, Any]]:
        while len(self.ended) < count:
            await self._more.wait()
        return self.ended


# ---- calls ----


async def test_one_process_makes_all_calls_and_ends_with_the_worker(house):
    code = """
    import atexit
    atexit.register(print, 'the very last')
    calls = []
    def f(item, word):
        calls.append(item)
        print('prints', item)
        return [os.getpid(), word, calls]
    """
    async with process(house, code, args={"word": "w"}) as worker:
        pid = worker.notes.pid
        assert await worker({"a": 1}) == [pid, "w", [{"a": 1}]]
        assert await worker(2) == [pid, "w", [{"a": 1}, 2]]
        assert alive(pid)
    assert not alive(pid)
    assert house.log() == b"prints {'a': 1}\nprints 2\nthe very last\n"
    assert worker.run.outcome.reason == "exited with code 0"


async def test_the_item_is_converted_there_and_the_result_is_json(house):
    code = """
    import dataclasses, datetime
    @dataclasses.dataclass
    class Image:
        path: str
    def f(item: Image | None):
        return item and [item, datetime.date(2026, 1, 2)]
    """
    async with process(house, code) as worker:
        assert await worker.json('{"path": "a"}') == '[{"path":"a"},"2026-01-02"]'
        assert await worker.json("null") is None
        with pytest.raises(UnfitItem, match="the item is not what `item` of f takes: object missing required field `path`"):
            await worker.json("{}")


async def test_of_a_batch_it_is_said_which_do_not_fit(house):
    async with process(house, "def f(items: list[int]): return sum(items)", batch={"size": 3}) as worker:
        assert await worker([1, 2, 3]) == 6
        with pytest.raises(UnfitItem) as caught:
            await worker([1, "a", None])
        assert caught.value.positions == (1, 2)


async def test_items_and_results_of_any_size(house):
    async with process(house, "def f(item): return [item, len(item)]") as worker:
        text = "ä" + "a" * (50 << 20)
        got = await worker(text)
        assert got == [text, len(text)]
        assert await worker("small") == ["small", 5]


async def test_the_context_is_that_of_the_call(house):
    code = """
    from supervisor import Context
    def f(item, ctx: Context):
        ctx.progress(item, 10)
        ctx.log.info('handling', size=item)
        return [ctx.job, ctx.run, ctx.item, ctx.attempt, ctx.stopping, ctx.phase.value, ctx.deadline is None]
    """
    with structlog.testing.capture_logs() as logs:
        async with process(house, code) as worker:
            assert await worker(1) == ["job", "job#1", "item1", 1, False, "running", True]
            assert await worker(2, attempt=3) == ["job", "job#1", "item2", 3, False, "running", True]
            assert (await worker(3, until=trio.current_time() + 60))[-1] is False
    assert worker.notes.far == [(1, 10), (2, 10), (3, 10)]
    own = {"job": "job", "run": "job#1", "log_level": "info", "event": "handling"}
    assert logs == [{**own, "item": f"item{n}", "size": n} for n in (1, 2, 3)]


async def test_what_it_raises_ends_the_call_and_not_the_process(house):
    code = """
    from supervisor.errors import Retry
    class Lost(ConnectionError):
        retry_after = 2.5
    def f(item):
        match item:
            case 1: raise Lost('line')
            case 2: raise Retry('not yet', after=3)
            case 3: sys.exit('no paper')
            case 4: return {1: {object}}
            case 5: raise KeyboardInterrupt
        return os.getpid()
    """
    async with process(house, code) as worker:
        with pytest.raises(RaisedElsewhere, match="Lost: line") as caught:
            await worker(1)
        assert caught.value.retry_after == 2.5 and "ConnectionError" in caught.value.failure_names
        assert caught.value.traceback.startswith("Traceback") and "process_worker" not in caught.value.traceback
        with pytest.raises(Retry, match="not yet") as asked:
            await worker(2)
        assert asked.value.retry_after == 3
        for item, why in (
            (3, "SystemExit: no paper"),
            (4, "TypeError: the function returned what is no JSON: encoding"),
            (5, "KeyboardInterrupt"),
        ):
            with pytest.raises(RaisedElsewhere, match=why):
                await worker(item)
        assert await worker(0) == worker.notes.pid


# ---- the function ----


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("g = 1", "module handling_[0-9]+ has no 'f'"),
        ("1 / 0", "cannot import handling_[0-9]+: ZeroDivisionError: division by zero"),
        ("def f(): pass", "f takes no item: the function of a queue job gets it as its first parameter"),
        ("async def f(item): pass", 'kind "process" runs a plain function'),
        ("os._exit(3)", "its process has ended: exited with code 3"),
        ("sys.exit(3)", "cannot import handling_[0-9]+: SystemExit: 3"),
    ],
)
async def test_one_that_is_not_to_be_had_is_said_before_anything_is_claimed(house, code, why):
    with pytest.raises(RunFailed, match=why):
        async with process(house, code):
            raise AssertionError


async def test_functions_that_no_process_can_find_are_refused(house):
    def nested(item): ...

    for call in (nested, lambda item: item, functools.partial(os.getpid)):
        with pytest.raises(
            RunFailed, match="cannot be called in a process, which finds functions by name: define it with `def`"
        ):
            async with open_worker(house, kind="process", call=call):
                raise AssertionError


async def test_one_that_is_given_as_itself_is_found_by_its_name(house):
    async with open_worker(house, kind="process", call=dedent) as worker:
        assert await worker("  a") == "a"


async def test_no_interpreter_no_worker(house, monkeypatch):
    monkeypatch.setattr(process_channel, "PROGRAM", ("/no/such/python", *process_channel.PROGRAM[1:]))
    with pytest.raises(SpawnFailed, match="no such program: '/no/such/python'"):
        async with process(house, "def f(item): pass"):
            raise AssertionError


async def test_a_stop_before_it_has_loaded_its_code_does_not_wait_for_that(house):
    async def stop(run: Any) -> None:
        while run.pid is None:
            await trio.sleep(0.001)
        run.advance(Phase.STOPPING)

    house.on_worker = lambda run: house.nursery.start_soon(stop, run)
    async with process(house, "time.sleep(1000)\ndef f(item): pass") as worker:
        assert worker.notes.cause is None
        with pytest.raises(WorkerLost):
            await worker(1)


# ---- its end ----


async def test_a_process_that_dies_takes_the_call_that_had_begun_and_no_other(house):
    code = """
    def f(item):
        if item == 'die':
            os._exit(4)
        return item
    """
    with pytest.raises(WorkerLost, match="its process has ended: exited with code 4"):
        async with process(house, code) as worker, trio.open_nursery() as nursery:
            calls = Calls(worker, nursery)
            for item in ('"a"', '"die"', '"b"', '"c"'):
                await calls.start(item)
            ended = dict(await calls.until(4))
            assert ended["item1"] == b'"a"'
            assert all(isinstance(ended[item], WorkerLost) for item in ("item2", "item3", "item4"))
            assert [work.begun for work in calls.works.values()] == [True, True, False, False]
            with pytest.raises(WorkerLost):
                await worker("later")
    assert worker.run.outcome.code == 4


async def test_one_that_dies_without_a_call_ends_its_worker(house):
    with pytest.raises(WorkerLost, match="its process has ended: killed by SIGKILL"):
        async with process(house, "def f(item): pass") as worker:
            os.kill(worker.notes.pid, signal.SIGKILL)
            await trio.sleep_forever()


async def test_the_stop_signal_from_elsewhere_lets_the_call_in_hand_be_the_last(house):
    code = """
    def f(item, ctx: 'Context'):
        ctx.progress(0)
        ctx.wait_stopping()
        return 'ended well'
    """
    with pytest.raises(WorkerLost, match="its process has ended: exited with code 0"):
        async with process(house, code) as worker, trio.open_nursery() as nursery:
            calls = Calls(worker, nursery)
            worker.notes.on_progress = lambda: os.kill(worker.notes.pid, signal.SIGTERM)
            await calls.start()
            await calls.start()
            ended = dict(await calls.until(2))
            assert ended["item1"] == b'"ended well"'
            assert isinstance(ended["item2"], RunFailed) and not calls.works["item2"].begun
            await trio.sleep_forever()


async def test_cancelled_it_is_killed_with_all_that_came_of_it(house):
    code = """
    import subprocess
    def f(item, ctx: 'Context'):
        child = subprocess.Popen(['setsid', 'sleep', '1000'])
        print(child.pid)
        ctx.progress(0)
        sum(range(10**12))
    """
    with pytest.raises(WorkerLost):
        async with process(house, code) as worker, trio.open_nursery() as nursery:
            calls = Calls(worker, nursery)
            worker.notes.on_progress = lambda: calls.scopes["item1"].cancel(reason="test")
            await calls.start()
            assert await calls.until(1) == [("item1", "cancelled")]
            assert not alive(worker.notes.pid) and not alive(int(house.log()))


async def test_the_worker_cancelled_while_idle_or_at_work_leaves_nothing(house):
    for busy in (False, True):
        with trio.CancelScope() as scope:
            async with process(house, "def f(item, ctx: 'Context'):\n    ctx.progress(1)\n    time.sleep(1000)") as worker:
                if busy:
                    worker.notes.on_progress = functools.partial(scope.cancel, reason="test")
                    await worker(1)
                scope.cancel(reason="test")
                await trio.sleep_forever()
        assert not alive(worker.notes.pid)


# ---- what it is told ----


async def test_a_call_hears_of_a_stop_and_the_next_does_not(house):
    code = """
    def f(item, ctx: 'Context'):
        if item:
            ctx.progress(item)
            ctx.wait_stopping()
            while ctx.phase.value == 'running':
                time.sleep(0.001)
        return [ctx.stopping, ctx.phase.value, ctx.sleep(0)]
    """
    async with process(house, code) as worker:
        work = worker.work()
        worker.notes.on_progress = lambda: work.advance(Phase.STOPPING)
        assert await worker.handler.handle(work, b"1") == b'[true,"stopping",false]'
        assert await worker(0) == [False, "running", True]


async def test_one_that_takes_too_long_and_hears_nothing_is_interrupted_and_the_process_kept(house, tmp_path):
    code = """
    def f(item):
        if not item:
            return os.getpid()
        try:
            print('up')
            time.sleep(1000)
        finally:
            print('cleaned up')
    """
    async with process(house, code, ready=None) as worker, trio.open_nursery() as nursery:
        calls = Calls(worker, nursery)
        with house.outputs.follow("job") as follower:
            work = await calls.start("1", until=trio.current_time() + 3600)
            while b"\n" not in await anext(follower):
                pass
            work.overdue = True
            work.advance(Phase.STOPPING)
            ((_, error),) = await calls.until(1)
        assert str(error) == "SystemExit"
        assert await worker(0) == worker.notes.pid
    assert house.log() == b"up\ncleaned up\n"


# ---- its line ----


async def test_it_is_given_more_at_once_while_its_calls_are_short(house):
    code = """
    def f(item):
        time.sleep(item)
    """
    async with process(house, code) as worker:
        assert worker.handler.room == 1
        for _ in range(100):
            await worker(0)
            if worker.handler.room > 4:
                break
        assert worker.handler.room > 4
        for _ in range(3):
            await worker(0.05)
        assert worker.handler.room == 1


async def test_what_waits_behind_a_long_call_is_given_back(house):
    code = """
    def f(item, ctx: 'Context'):
        ctx.wait_stopping()
        return item
    """
    async with process(house, code) as worker, trio.open_nursery() as nursery:
        calls = Calls(worker, nursery)
        for item in "123":
            await calls.start(item)
        ended = await calls.until(2)
        assert {item for item, _ in ended} == {"item2", "item3"}
        assert all(str(error) == "the call before it takes long" for _, error in ended)
        assert [work.begun for work in calls.works.values()] == [True, False, False]
        calls.works["item1"].advance(Phase.STOPPING)
        assert (await calls.until(3))[2] == ("item1", b"1")
        (await calls.start("4")).advance(Phase.STOPPING)
        assert (await calls.until(4))[3] == ("item4", b"4")


async def test_one_in_the_line_that_is_cancelled_is_never_begun(house):
    code = """
    def f(item, ctx: 'Context'):
        print(item)
        if item == 1:
            ctx.progress(1)
            ctx.wait_stopping()
        return item
    """
    async with process(house, code) as worker, trio.open_nursery() as nursery:
        calls = Calls(worker, nursery)
        begun = trio.Event()
        worker.notes.on_progress = begun.set
        for item in "123":
            await calls.start(item)
        await begun.wait()
        calls.scopes["item2"].cancel(reason="test")
        await calls.until(1)
        calls.works["item1"].advance(Phase.STOPPING)
        ended = dict(await calls.until(3))
        assert ended["item1"] == b"1" and ended["item2"] == "cancelled"
    assert b"2" not in house.log() and worker.run.outcome.code == 0


async def test_where_nobody_can_take_it_back_the_process_is_killed(house):
    """Native code holds the interpreter: the call behind it cannot be taken out of its hands."""
    code = """
    import re
    def f(item, ctx: 'Context'):
        ctx.progress(1)
        re.match('(a*)*b', 'a' * 100)
    """
    with pytest.raises(WorkerLost):
        async with process(house, code) as worker, trio.open_nursery() as nursery:
            calls = Calls(worker, nursery)
            begun = trio.Event()
            worker.notes.on_progress = begun.set
            await calls.start()
            await calls.start()
            await begun.wait()
            calls.scopes["item2"].cancel(reason="test")
            ended = dict(await calls.until(2))
            assert isinstance(ended["item1"], WorkerLost) and ended["item2"] == "cancelled"
            assert not alive(worker.notes.pid)


async def test_what_a_call_may_take_counts_from_its_begin(house):
    code = """
    def f(item, ctx: 'Context'):
        if item == 1:
            ctx.progress(1)
            ctx.wait_stopping()
        return ctx.deadline
    """
    async with process(house, code) as worker, trio.open_nursery() as nursery:
        calls = Calls(worker, nursery)
        now = trio.current_time()
        worker.notes.on_progress = lambda: calls.works["item1"].advance(Phase.STOPPING)
        await calls.start("1", until=now + 60)
        await calls.start("2", until=now + 60)
        ended = dict(await calls.until(2))
        if isinstance(ended["item2"], bytes):  # else this machine was slow, and it was given back
            assert 59 < float(ended["item2"]) <= 60
            assert calls.works["item2"].until >= now + 60


async def test_each_of_many_calls_gets_its_own_answer(house):
    async with process(house, "def f(item): return item") as worker, trio.open_nursery() as nursery:
        calls = Calls(worker, nursery)
        for number in range(1, 2001):
            await calls.start(str(number))
        ended = await calls.until(2000)
        given_back = {item: str(what) for item, what in ended if not isinstance(what, bytes)}
        assert set(given_back.values()) <= {"the call before it takes long"}
        assert all(what == item.removeprefix("item").encode() for item, what in ended if item not in given_back)


# ---- a function that meddles ----


async def test_one_that_closes_the_channel_ends_the_process(house):
    code = """
    def f(item):
        os.closerange(3, 256)
        return 1
    """
    with pytest.raises(WorkerLost, match="its process has ended: exited with code 1"):
        async with process(house, code) as worker:
            with pytest.raises(WorkerLost):
                await worker(1)
    assert b"the channel to the supervisor was closed: close no descriptors that are not your own" in house.log()


async def test_forks_that_come_back_out_of_a_call_answer_nothing(house):
    code = """
    def f(item):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return item
        if item % 2:
            raise ValueError
        return 'of the child'
    """
    async with process(house, code) as worker:
        assert [await worker(n) for n in range(4)] == [0, 1, 2, 3]


async def test_threads_that_it_leaves_are_waited_for_at_the_end_and_not_before(house):
    code = """
    import threading
    def f(item):
        threading.Thread(target=lambda: (time.sleep(0.05), print('ended'))).start()
        return item
    """
    async with process(house, code) as worker:
        assert await worker(1) == 1
    assert house.log() == b"ended\n"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hello, supervisor\n",
        HEADER.pack(26, 0) + b'{"is":"returned","call":9}',
        HEADER.pack(26, 1) + b'{"is":"returned","call":1}{',
        HEADER.pack(16, 0) + b'{"is":"unheard"}',
    ],
)
async def test_nonsense_on_the_channel_ends_the_process(house, nonsense):
    code = f"""
    NONSENSE = {nonsense!r}
    def f(item):
        known = [fd for fd in range(3, 256) if os.path.exists(f'/proc/self/fd/{{fd}}')]
        os.write(next(fd for fd in known if stat.S_ISSOCK(os.fstat(fd).st_mode)), NONSENSE)
        signal.pause()
    """
    with pytest.raises(WorkerLost, match="it sent what is no message of a worker: "):
        async with process(house, code) as worker:
            with pytest.raises(WorkerLost):
                await worker(1)
    assert not alive(worker.notes.pid)


async def test_nothing_is_left_of_a_worker_neither_descriptors_nor_processes(house):
    async with process(house, "def f(item): pass") as worker:
        await worker(1)
    fds = set(os.listdir("/proc/self/fd"))
    async with process(house, "def f(item): pass") as worker:
        await worker(1)
    assert set(os.listdir("/proc/self/fd")) == fds
