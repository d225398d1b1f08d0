"""The kind `process`: functions in real Python processes, what they say, and every way in which they end."""

import datetime
import itertools
import json
import os
import pickle
import pwd
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import pytest
import structlog.testing
import trio
from house import House, Life, Notes, alive, open_house
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT

from supervisor.errors import RaisedElsewhere, Retry, RunFailed, SpawnFailed
from supervisor.kinds import JobSpec, Outcome, Run, process_channel
from supervisor.kinds.process import Worker
from supervisor.kinds.process_channel import Frames, Nonsense
from supervisor.kinds.process_worker import HEADER, LONGEST_BODY, LONGEST_HEAD
from supervisor.nodes.fence import stopped_at_fence
from supervisor.policies.failures import goes_by
from supervisor.probes import Ready
from supervisor.sockets import SocketSpec
from supervisor.spec import Expanded, Limit
from supervisor.state import Phase

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
NOTIFY = Ready(notify=True)
numbers = itertools.count()


@pytest.fixture
async def house(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    async with open_house(tmp_path / "logs") as house:
        yield house


def module(house: House, code: str) -> str:
    """The name of a module with this code."""
    name = f"module_{next(numbers)}"
    (house.logs.parent / f"{name}.py").write_text("import os, signal, stat, sys, time\n" + dedent(code))
    return name


def start(house: House, code: str, **spec) -> Life:
    """A run of the function `f` that is defined so, of a job that runs once."""
    return house.start(**{"kind": "process", "call": f"{module(house, code)}:f", "once": True, **spec})


async def end(life: Life) -> Outcome:
    """Its outcome, as the tree makes it of what the kind returns or raises."""
    try:
        return await life.end()
    except SpawnFailed:
        raise
    except RunFailed as error:
        return stopped_at_fence(life.run, error)


async def finish(house: House, code: str, **spec) -> Outcome:
    return await end(start(house, code, **spec))


# ---- the function ----


async def test_it_is_called_in_a_process_of_its_own_with_its_arguments(house):
    life = start(house, "def f(**args): print(os.getpid(), args)", args={"a": 1, "b": ["c"]})
    outcome = await life.end()
    assert (outcome.failed, outcome.reason, outcome.code) == (False, "completed", 0)
    assert house.log().decode() == f"{life.notes.pid} {{'a': 1, 'b': ['c']}}\n"
    assert life.notes.pid not in (None, os.getpid()) and outcome.spent.cpu > 0


async def test_arguments_are_what_the_file_says_whatever_their_type(house):
    day = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
    args = {"a": day, "b": day.date(), "c": day.time(), "d": float("inf"), "e": 1 << 62, "f": {"g": [True, None, 1.5]}}
    await finish(house, "def f(**args): print(repr(args))", args=args)
    assert house.log().decode() == f"{args!r}\n"


async def test_an_expanded_argument_is_a_string_there(house):
    await finish(house, "def f(word): print(type(word), word)", args={"word": Expanded("secret", "${WORD}")})
    assert house.log() == b"<class 'str'> secret\n"
    assert type(pickle.loads(pickle.dumps(Expanded("a", "b")))) is str


async def test_arguments_that_cannot_be_sent_say_so(house):
    outcome = await finish(house, "def f(a): pass", args={"a": lambda: None})
    assert outcome.failed and outcome.reason.startswith("its arguments cannot be sent to a process: ")


async def test_arguments_and_results_may_be_large(house):
    code = "def f(text): return [text, text.count('ä')]"
    text = "ä" * (25 << 20)  # 50 MB
    spec = JobSpec(kind="process", call=f"{module(house, code)}:f", args={"text": text}, once=True)
    with Worker(spec, Run("job", 1, Notes(), trio.Event()), house.resources, wanted=True) as worker:
        outcome = await worker.serve()
    assert outcome.reason == "completed"
    assert json.loads(worker.result) == [text, 25 << 20]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("object()", "TypeError: the function returned what is no JSON: encoding objects of type object is unsupported"),
        ("{(1, 2): 3}", "TypeError: the function returned what is no JSON: only dicts with str-like or number-like keys"),
    ],
)
async def test_a_result_that_is_wanted_and_no_json_is_a_failure(house, value, why):
    spec = JobSpec(kind="process", call=f"{module(house, f'def f(): return {value}')}:f", once=True)
    with Worker(spec, Run("job", 1, Notes(), trio.Event()), house.resources, wanted=True) as worker:
        with pytest.raises(RaisedElsewhere, match=why):
            await worker.serve()
    with Worker(spec, Run("job", 1, Notes(), trio.Event()), house.resources) as worker:
        assert (await worker.serve()).reason == "completed"
    assert worker.result is None


async def test_code_is_imported_from_where_the_daemon_would(house, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "supervisor.py").write_text("1 / 0")  # not this package, and not in its way
    code = """
    def f():
        print(os.getcwd())
        print(sys.path)
    """
    outcome = await finish(house, code, cwd=str(tmp_path / "elsewhere"), env={"PYTHONPATH": "/of/the/job"})
    assert outcome.reason == "completed"
    cwd, path = house.log().decode().splitlines()
    found = [each for each in sys.path if each]
    assert cwd == str(tmp_path / "elsewhere") and [each for each in eval(path) if each in found] == found
    assert "/of/the/job" in path


async def test_a_worker_process_loads_neither_trio_nor_msgspec(house):
    """What it imports is paid at each start; `Context` imported by name is its own."""
    code = """
    from supervisor import Context, ThreadContext
    def f(ctx: Context):
        assert type(ctx) is Context is ThreadContext
        print({'trio', 'msgspec', 'structlog', 'pickle', 'traceback', 'pathlib'} & set(sys.modules))
    """
    outcome = await finish(house, code)
    assert (outcome.reason, house.log()) == ("completed", b"set()\n")


async def test_what_it_prints_is_in_the_log_at_once(house):
    code = """
    def f():
        print('to the output')
        os.write(2, b'to the errors\\n')
        signal.pause()
    """
    life = start(house, code, once=False, ready=Ready(log="errors"), env={"PYTHONUNBUFFERED": ""})
    await life.ready()
    assert house.log() == b"to the output\nto the errors\n"


async def test_it_inherits_its_channel_and_nothing_else(house):
    """With a launcher and without. Its own children get nothing of that either, whatever they inherit."""
    code = """
    import subprocess
    def f():
        for fd in os.listdir('/proc/self/fd'):
            if os.path.exists(f'/proc/self/fd/{fd}') or int(fd) < 3:
                print(os.readlink(f'/proc/self/fd/{fd}').partition(':')[0])
        subprocess.run('ls /proc/self/fd; echo "<$SUPERVISOR_CHANNEL>"', shell=True, close_fds=False)
    """
    for number, keys in enumerate(({}, {"rlimits": {"core": Limit((0, 0))}})):
        await finish(house, code, **keys)
        lines = house.log().decode().split()
        own, inherited = sorted(lines[10 * number :][:5]), lines[10 * number :][5:]
        assert own == ["/dev/null", "anon_inode", "pipe", "pipe", "socket"]
        assert inherited == ["0", "1", "2", "3", "<>"]


# ---- its Context ----


async def test_the_names_of_its_context_block(house):
    code = """
    import threading
    from supervisor import Context, Phase
    def f(ctx: Context):
        print(ctx.job, ctx.worker, ctx.run, ctx.stopping, ctx.phase is Phase.RUNNING, ctx.sleep(0))
        helper = threading.Thread(target=ctx.wait_stopping)
        helper.start()
        ctx.ready()
        print(ctx.sleep(1e9), ctx.stopping)
        ctx.wait_stopping()
        helper.join()
        while ctx.phase is Phase.RUNNING:
            time.sleep(0.001)
        print(ctx.phase, ctx.sleep(1e9))
    """
    life = start(house, code, once=False, ready=NOTIFY)
    await life.ready()
    assert life.notes.cause == "it said so"
    assert (await life.stop()).reason == "completed"
    assert house.log().decode().splitlines() == ["job 0 job#1 False True True", "False True", "Phase.STOPPING False"]


async def test_it_hears_the_phases_before_it_is_asked_to_end(house):
    code = """
    def f(ctx: 'Context'):
        ctx.ready()
        while ctx.phase.value == 'running':
            time.sleep(0.001)
        print(ctx.phase.value, ctx.stopping)
    """
    life = start(house, code, ready=NOTIFY)
    await life.ready()
    life.run.advance(Phase.DRAINING)
    assert (await life.end()).reason == "completed"
    assert house.log() == b"draining False\n"


async def test_progress_and_heartbeats_reach_the_run_also_from_its_threads(house):
    code = """
    from concurrent.futures import ThreadPoolExecutor
    def f(ctx: 'Context'):
        ctx.progress(1)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ctx.progress, range(100), range(100)))
        ctx.heartbeat()
        ctx.progress(2.5, 3)
    """
    life = start(house, code)
    before = trio.current_time()
    await life.end()
    assert life.notes.far[0] == (1, None) and life.notes.far[-1] == (2.5, 3)
    assert sorted(life.notes.far[1:-1]) == [(n, n) for n in range(100)]
    assert life.run.heard > before


async def test_a_signal_handler_may_speak_up_in_the_middle_of_a_word(house):
    code = """
    def f(ctx: 'Context'):
        signal.signal(signal.SIGALRM, lambda *_: ctx.progress(1))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for _ in range(2000):
            ctx.log.debug(1000 * 'x')
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    """
    life = start(house, code)
    with structlog.testing.capture_logs() as logs:
        assert (await end(life)).reason == "completed"
    assert len(logs) == 2000 and life.notes.far


async def test_its_log_is_a_log_as_structlogs(house):
    code = """
    def f(ctx: 'Context'):
        log = ctx.log.bind(colour='blue')
        log.info('%d words', 2, event_='x', job='of its own')
        log.warning('odd', thing=object, of={1: {2}}, nan=float('nan'), text='\\udc80')
        deep = []
        for _ in range(100000): deep = [deep]
        log.debug('deep', deep=deep, long='x' * 3000000)
        try:
            1 / 0
        except ZeroDivisionError:
            log.exception('caught')
    """
    with structlog.testing.capture_logs() as logs:
        outcome = await finish(house, code)
    assert outcome.reason == "completed", outcome
    first, odd, deep, caught = logs
    own = {"job": "job", "run": "job#1", "colour": "blue"}
    assert first == {"event": "2 words", "log_level": "info", "event_": "x", "job_": "of its own", **own}
    assert odd["thing"] == "<class 'object'>" and odd["nan"] == "nan" and odd["log_level"] == "warning"
    assert deep["event"] == "deep" and len(deep["long"]) == 64 << 10
    assert caught["log_level"] == "error" and caught["exception"].endswith("ZeroDivisionError: division by zero")


# ---- started and ready ----


async def test_started_is_when_the_code_has_been_loaded(house, tmp_path):
    os.mkfifo(tmp_path / "gate")
    code = f"open({str(tmp_path / 'gate')!r}).readline()\ndef f(): signal.pause()"
    life = start(house, code, once=False)
    with open(os.open(tmp_path / "gate", os.O_RDWR), "w", buffering=1) as gate:
        while life.notes.pid is None:
            await trio.sleep(0.001)
        assert life.notes.cause is None
        gate.write("go\n")
        await life.ready()
    assert life.notes.cause == "started"


# ---- how it ends ----


async def failed(house: House, code: str, **spec) -> tuple[str, list, bytes]:
    """Why it failed, what the daemon logged, and what it printed."""
    with structlog.testing.capture_logs() as logs:
        outcome = await finish(house, code, **spec)
    assert outcome.failed
    return outcome.reason, logs, house.log() if house.logs.exists() else b""


async def test_what_it_raises_is_its_failure_and_logged_once(house):
    reason, logs, printed = await failed(house, "def f(): raise ValueError('no\\nway')")
    assert reason == "ValueError: no"
    (line,) = logs
    assert (line["event"], line["job"], line["run"], line["log_level"]) == ("job raised", "job", "job#1", "error")
    assert line["exception"].startswith("Traceback (most recent call last):\n  File ")
    assert "process_worker" not in line["exception"] and line["exception"].endswith("ValueError: no\nway")
    assert printed == b""


async def test_all_that_it_has_said_is_heard_also_when_its_death_is_known_first(house):
    code = """
    def f(ctx: 'Context'):
        for number in range(40):  # more than is read at once, and less than the socket holds
            ctx.log.info(2000 * 'x', number=number)
        os._exit(5)
    """
    with structlog.testing.capture_logs() as logs:
        life = start(house, code)
        os.waitid(os.P_PID, await life.ready(), os.WEXITED | os.WNOWAIT)  # the loop stands still meanwhile
        assert (await life.end()).reason == "exited with code 5"
    assert [line["number"] for line in logs] == list(range(40))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError", "ValueError"),
        ("raise ExceptionGroup('', [ExceptionGroup('', [KeyError('x')])])", "KeyError: 'x'"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})", "E: its text cannot be had: ZeroDivisionError"),
        ("raise ValueError('\\udc80' + 'x' * 1000)", "ValueError: ?" + "x" * 199),
        ("g()", "NameError: name 'g' is not defined"),
        ("f()", "RecursionError: maximum recursion depth exceeded"),
    ],
)
async def test_the_reason_is_one_line(house, body, reason):
    assert (await failed(house, f"def f(): {body}"))[0].startswith(reason)


async def test_what_it_raises_goes_by_the_names_of_its_classes(house):
    code = """
    class Lost(ConnectionError):
        retry_after = 2.5
    def f():
        raise Lost('line')
    """
    life = start(house, code)
    with pytest.raises(RaisedElsewhere) as caught:
        await life.end()
    assert caught.value.retry_after == 2.5
    here = life.run.outcome
    assert (here.reason, here.code, here.failed) == ("Lost: line", 1, True) and here.spent.cpu > 0
    assert goes_by("ConnectionError", caught.value) and goes_by("builtins:OSError", caught.value)
    assert goes_by(f"module_{next(numbers) - 1}:Lost", caught.value) and not goes_by("ValueError", caught.value)


async def test_it_may_ask_for_another_attempt(house):
    with pytest.raises(Retry, match="not yet") as caught:
        await start(house, "from supervisor.errors import Retry\ndef f(): raise Retry('not yet', after=3)").end()
    assert caught.value.retry_after == 3


async def test_the_code_of_an_exit_is_what_counts(house):
    for code, reason in (("sys.exit(3)", "exited with code 3"), ("os._exit(4)", "exited with code 4")):
        assert (await failed(house, f"def f(): {code}"))[:2] == (reason, [])
    reason, _, printed = await failed(house, "def f(): sys.exit('no paper')")
    assert (reason, printed) == ("exited with code 1", b"no paper\n")
    assert not (await finish(house, "def f(): sys.exit(0)")).failed
    assert not (await finish(house, "def f(): os._exit(3)", success_exit_codes=(0, 3))).failed
    assert (await finish(house, "def f(): 1 / 0", success_exit_codes=(0, 1))).failed


async def test_an_exit_after_its_return_counts_too(house):
    reason, *_ = await failed(house, "import atexit\ndef f(): atexit.register(os._exit, 7)")
    assert reason == "exited with code 7"


async def test_a_death_by_a_signal_is_told_with_the_stack_where_python_crashed(house):
    reason, _, printed = await failed(house, "def f(): os.kill(os.getpid(), signal.SIGSEGV)")
    assert reason.startswith("killed by SIGSEGV") and b"Segmentation fault" in printed and b" in f\n" in printed
    reason, *_ = await failed(house, "def f(): os.kill(os.getpid(), signal.SIGKILL)")
    assert reason == "killed by SIGKILL"


@pytest.mark.parametrize(
    ("code", "call", "reason", "shown"),
    [
        ("", "no_such_module:f", "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'", 0),
        ("1 / 0", "", "cannot import {}: ZeroDivisionError: division by zero", 1),
        ("sys.exit(3)", "", "cannot import {}: SystemExit: 3", 1),
        ("import no_such_module", "", "cannot import {}: ModuleNotFoundError: No module named 'no_such_module'", 1),
        ("g = 1", "", "module {} has no 'f'", 0),
        ("f = 1", "", "{}:f is not callable", 0),
        ("async def f(): pass", "", '{}:f: kind "process" runs a plain function, this one is `async def`', 0),
        ("def f(): yield", "", "{}:f: what it yields would go nowhere", 0),
        ("def f(a): pass", "", "TypeError: f() missing 1 required positional argument: 'a'", 1),
    ],
)
async def test_what_is_not_there_to_be_called_is_said_as_of_other_kinds(house, code, call, reason, shown):
    name = module(house, code)
    with structlog.testing.capture_logs() as logs:
        outcome = await end(house.start(kind="process", call=call or f"{name}:f", once=True))
    assert outcome.failed and outcome.reason.startswith(reason.format(name))
    assert [line["event"] for line in logs] == ["job raised"] * shown


async def test_a_module_that_ends_the_process_is_told_by_its_code(house):
    assert (await failed(house, "os._exit(9)\ndef f(): pass"))[0] == "exited with code 9"


async def test_no_interpreter_no_process(house, monkeypatch):
    await finish(house, "def f(): pass")
    monkeypatch.setattr(process_channel, "PROGRAM", ("/no/such/python", *process_channel.PROGRAM[1:]))
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(SpawnFailed, match="no such program: '/no/such/python'"):
        await finish(house, "def f(): pass")
    assert set(os.listdir("/proc/self/fd")) == fds


async def test_nothing_is_left_of_a_run_neither_descriptors_nor_processes(house):
    await finish(house, "def f(): pass")
    fds = set(os.listdir("/proc/self/fd"))
    code = """
    import subprocess
    def f():
        child = subprocess.Popen(['sleep', '1000'], start_new_session=True)
        print(child.pid)
    """
    await finish(house, code)
    assert set(os.listdir("/proc/self/fd")) == fds
    assert not alive(int(house.log()))


# ---- a function that meddles ----


async def test_a_function_that_closes_the_channel_is_told_so_and_goes_on(house, tmp_path):
    code = f"""
    def f(ctx: 'Context'):
        os.closerange(3, 256)
        files = [open({str(tmp_path / "own")!r}, 'w+') for _ in range(8)]  # their numbers are those that were closed
        for use in (ctx.heartbeat, lambda: ctx.sleep(1e9)):
            try:
                use()
            except OSError as error:
                print(error)
    """
    reason, _, printed = await failed(house, code)
    assert reason == "exited with code 1"
    assert b"the channel to the supervisor was closed: close no descriptors that are not your own" in printed
    assert (tmp_path / "own").read_bytes() == b""


async def test_nonsense_on_the_channel_ends_the_process(house):
    code = """
    def f():
        known = [fd for fd in range(3, 256) if os.path.exists(f'/proc/self/fd/{fd}')]
        os.write(next(fd for fd in known if stat.S_ISSOCK(os.fstat(fd).st_mode)), NONSENSE)
        signal.pause()
    """
    small = HEADER.pack(2, 0) + b"{}"
    for nonsense in (
        b"hello, supervisor\n",
        HEADER.pack(LONGEST_HEAD + 1, 0),
        HEADER.pack(2, 1 << 40),
        small,
        HEADER.pack(20, 0) + b"x" * 20,
        HEADER.pack(16, 0) + b'{"is":"unheard"}',
        HEADER.pack(17, 1) + b'{"is":"returned"}' + b"x",  # nobody wants it
    ):
        reason, *_ = await failed(house, f"NONSENSE = {nonsense!r}\n{dedent(code)}")
        assert reason.startswith("it sent what is no message of a worker: "), nonsense


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=50), st.binary(max_size=50))), st.integers(1, 200))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames, size):
    data = b"".join(HEADER.pack(len(head), len(body)) + head + body for head, body in frames)
    reader = Frames(LONGEST_BODY)
    assert [frame for at in range(0, len(data), size) for frame in reader.feed(data[at : at + size])] == frames


@given(st.binary(max_size=300))
def test_whatever_comes_is_a_frame_or_nonsense_and_no_length_is_believed(data):
    try:
        found = Frames(0).feed(data)
    except Nonsense:
        return
    assert sum(HEADER.size + len(head) for head, _ in found) <= len(data)


# ---- its stop ladder ----


async def test_a_service_that_hears_nothing_is_interrupted_where_it_stands(house):
    code = """
    import atexit
    def f():
        atexit.register(print, 'the very last')
        try:
            print('up')
            while True:
                time.sleep(1000)
        finally:
            print('cleaned up')
    """
    life = start(house, code, once=False, ready=Ready(log="up"))
    await life.ready()
    outcome = await life.stop()
    assert (outcome.failed, outcome.reason) == (False, "killed by SIGTERM")
    assert house.log() == b"up\ncleaned up\nthe very last\n"


async def test_the_stop_signal_is_the_jobs_own(house):
    code = """
    def f(ctx: 'Context'):
        ctx.ready()
        ctx.wait_stopping()
        print('asked')
    """
    life = start(house, code, once=False, ready=NOTIFY, stop_signal="USR1")
    await life.ready()
    life.run.send_signal(signal.SIGUSR1, False)
    assert (await life.end()).reason == "completed"
    assert house.log() == b"asked\n"


async def test_what_has_an_end_of_its_own_has_its_grace(house, tmp_path):
    os.mkfifo(tmp_path / "gate")
    code = f"""
    def f():
        print('up')
        print(open({str(tmp_path / "gate")!r}).readline())
    """
    life = start(house, code, ready=Ready(log="up"))
    await life.ready()
    life.run.advance(Phase.STOPPING)
    with open(os.open(tmp_path / "gate", os.O_RDWR), "w", buffering=1) as gate:
        gate.write("the end\n")
        assert (await life.end()).reason == "completed"
    assert house.log() == b"up\nthe end\n\n"


@pytest.mark.parametrize("stuck", ["sum(range(10**12))", "__import__('re').match('(a*)*b', 'a' * 100)"])
async def test_a_stuck_native_call_is_killed_with_all_that_came_of_it(house, stuck):
    code = f"""
    import subprocess
    def f(ctx: 'Context'):
        child = subprocess.Popen(['setsid', 'sleep', '1000'])
        print(child.pid)
        ctx.ready()
        {stuck}
    """
    life = start(house, code, once=False, ready=NOTIFY)
    main = await life.ready()
    life.run.advance(Phase.STOPPING)
    await life.kill()
    assert life.run.outcome.reason == "killed by SIGKILL"
    assert not alive(main) and not alive(int(house.log()))


async def test_a_stop_before_it_has_started_is_no_failure(house):
    life = start(house, "time.sleep(1000)\ndef f(): pass", once=False)
    while life.notes.pid is None:
        await trio.sleep(0.001)
    assert not (await life.stop()).failed


async def test_the_children_that_it_forks_die_of_the_signal_that_it_hears(house):
    """multiprocessing forks by default, and ends its workers by SIGTERM."""
    code = """
    import multiprocessing
    def f(ctx: 'Context'):
        child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,))
        child.start()
        child.terminate()
        child.join()
        print(child.exitcode, ctx.stopping)
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            print(pool.apply(os.getppid) == os.getpid())
    """
    assert (await finish(house, code)).reason == "completed"
    assert house.log() == b"-15 False\nTrue\n"


# ---- what it may be started with ----


async def for_everybody(house: House) -> str:
    """An interpreter that anybody may run. The one that the tests run on may be root's alone."""
    recent = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import supervisor; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(SpawnFailed):
            if not (await house.finish(command=(python, "-c", recent), user="nobody", output="null")).failed:
                return python
    pytest.skip("no interpreter, or not this package, is for everybody here")


@AS_ROOT
async def test_it_becomes_another_user_with_limits_and_sockets(tmp_path, monkeypatch):
    nobody = pwd.getpwnam("nobody")
    code = """
    import resource, socket
    def f(ctx: 'Context'):
        with socket.socket(fileno=3) as listening:
            print(os.getuid(), os.getgid(), resource.getrlimit(resource.RLIMIT_NOFILE), listening.getsockname())
        ctx.log.info('from nobody')
    """
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is root's alone
        os.chmod(directory, 0o755)
        monkeypatch.syspath_prepend(directory)
        async with open_house(Path(directory) / "logs", {"web": SocketSpec(listen="127.0.0.1:0")}) as house:
            monkeypatch.setattr(process_channel, "PROGRAM", (await for_everybody(house), *process_channel.PROGRAM[1:]))
            with structlog.testing.capture_logs() as logs:
                outcome = await finish(house, code, user="nobody", rlimits={"nofile": Limit((50, 60))}, sockets=("web",))
            assert outcome.reason == "completed", (outcome, house.log())
            assert house.log().decode().startswith(f"{nobody.pw_uid} {nobody.pw_gid} (50, 60) ('127.0.0.1', ")
            assert [line["event"] for line in logs] == ["from nobody"]


async def test_a_terminal_and_what_is_typed_at_it(house):
    code = """
    def f():
        print(os.isatty(0), os.isatty(1))
        print('typed ' + input())
    """
    life = start(house, code, tty=True, ready=Ready(log="True True"))
    await life.ready()
    await life.run.attach.write(b"hello\n")
    assert (await life.end()).reason == "completed"
    assert b"typed hello" in house.log()


async def test_a_stop_command_asks_instead_of_the_signal(house):
    code = """
    def f(ctx: 'Context'):
        signal.signal(signal.SIGTERM, lambda *_: print('signalled'))
        ctx.ready()
        ctx.wait_stopping()
    """
    life = start(house, code, once=False, ready=NOTIFY, stop_command="echo asking")
    await life.ready()
    assert (await life.stop()).reason == "completed"
    assert house.log() == b"asking\n"
