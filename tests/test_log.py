"""The daemon's own log: one kind of line for everything, from a thread that may block while nobody else does."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from supervisor import events
from supervisor.config import LogSpec
from supervisor.errors import SpecError
from supervisor.log import QUEUE, Console, Echo, Target, Writer, open_log, render_console, render_json
from supervisor.state import Exit, Goal, Spent


@contextmanager
def logging_to(path: Path, **spec):
    with open_log(LogSpec(file=str(path), **{"format": "json", **spec}), path.parent) as log:
        yield log


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(condition) -> None:
    """Wait for what only the writer's thread can bring about; there is nothing else to wait on."""
    for _ in range(30_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("waited 30 s in vain")


def one_life(journal: events.Journal, name: str = "api") -> None:
    journal.emit(events.Added, name=name, kind="command", supervisor=None, goal=Goal.UP, cause="it starts by itself")
    journal.emit(events.Starting, name=name, run=f"{name}#1", cause="it starts by itself")
    journal.emit(events.Spawned, name=name, run=f"{name}#1", pid=4711)
    journal.emit(events.Ready, name=name, run=f"{name}#1", cause="started")
    exit = Exit(reason="exited with code 3", at=events.wall_now(), code=3)
    spent = Spent(duration=2.5, cpu=0.25, max_rss=1 << 20)
    journal.emit(
        events.Ended, name=name, run=f"{name}#1", exit=exit, failed=True, cause="exited with code 3",
        duration=7.5, spent=spent, attempts=2, output=("my password is hunter2",),
    )  # fmt: skip


# -- what a line says ---------------------------------------------------------------------------------------------------


def test_each_event_is_one_line_with_job_run_and_pid(tmp_path):
    journal = events.Journal()
    with logging_to(tmp_path / "log", level="debug") as log:
        log.attach(journal)
        one_life(journal)
    _, starting, spawned, ready, ended = lines_of(tmp_path / "log")
    assert starting["event"] == "starting" and starting["job"] == "api" and starting["run"] == "api#1"
    assert "pid" not in starting
    assert spawned["pid"] == ready["pid"] == ended["pid"] == 4711
    assert (ended["level"], ended["code"], ended["cause"]) == ("warning", 3, "exited with code 3")
    assert (ended["duration"], ended["cpu"], ended["max_rss"], ended["attempts"]) == (7.5, 0.25, 1 << 20, 2)
    assert "hunter2" not in (tmp_path / "log").read_text()  # what a child prints has its own path
    assert ready["level"] == "info" and ready["timestamp"].endswith("Z")


def test_events_from_before_the_log_was_attached_are_not_missed(tmp_path):
    journal = events.Journal()
    one_life(journal)
    with logging_to(tmp_path / "log", level="debug") as log:
        log.attach(journal)
    assert [line["event"] for line in lines_of(tmp_path / "log")] == ["added", "starting", "spawned", "ready", "ended"]


def test_supervisors_and_workers_are_named_as_what_they_are(tmp_path):
    journal = events.Journal()
    with logging_to(tmp_path / "log", level="debug") as log:
        log.attach(journal)
        journal.emit(events.Added, name="web", kind="supervisor", supervisor=None, goal=Goal.UP, cause="")
        journal.emit(events.Starting, name="web", run="web#1", cause="it starts by itself")
        one_life(journal, "api:2")
    _, web, _, worker, *_ = lines_of(tmp_path / "log")
    assert web["supervisor"] == "web" and "job" not in web
    assert (worker["job"], worker["worker"], worker["run"]) == ("api", 2, "api:2#1")


def test_debug_events_are_written_only_at_level_debug_and_the_level_changes_live(tmp_path):
    journal = events.Journal()
    with logging_to(tmp_path / "log") as log:
        log.attach(journal)
        bound = structlog.get_logger().bind(job="api")
        bound.debug("one")
        log.apply(LogSpec(level="debug", format="json", file=str(tmp_path / "log")))
        bound.debug("two")
        journal.emit(events.Added, name="b", kind="task", supervisor=None, goal=Goal.UP, cause="")
        log.apply(LogSpec(level="error", format="json", file=str(tmp_path / "log")))
        bound.warning("three")
        logging.getLogger("lib").warning("four")
        bound.error("five")
    assert [line["event"] for line in lines_of(tmp_path / "log")] == ["two", "added", "five"]


def test_jobs_libraries_and_warnings_come_out_the_same_way(tmp_path):
    with logging_to(tmp_path / "log"):
        structlog.contextvars.bind_contextvars(job="ctx", run="ctx#1")
        try:
            structlog.get_logger("job").bind(job="api", run="api#7").info("from %s", "ctx.log", rows=3)
            structlog.get_logger().warning("plain")
            logging.getLogger("lib.part").error("%d lost", 5)
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("old", DeprecationWarning, stacklevel=1)
        finally:
            structlog.contextvars.clear_contextvars()
    job, plain, library, warning = lines_of(tmp_path / "log")
    assert (job["event"], job["job"], job["run"], job["rows"]) == ("from ctx.log", "api", "api#7", 3)
    assert (plain["job"], plain["run"], plain["level"]) == ("ctx", "ctx#1", "warning")
    assert (library["logger"], library["event"], library["level"], library["job"]) == ("lib.part", "5 lost", "error", "ctx")
    assert warning["logger"] == "py.warnings" and "DeprecationWarning: old" in warning["event"]


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_traceback_shows_where_and_what_but_no_local_variables(tmp_path, format):
    def fail():
        password = "hunter" + "2"
        raise ExceptionGroup("several", [ValueError(f"bad length {len(password)}"), KeyError("k")])

    with logging_to(tmp_path / "log", format=format):
        try:
            fail()
        except ExceptionGroup as error:
            structlog.get_logger().exception("failed")
            logging.getLogger("lib").error("failed too", exc_info=error)
    text = (tmp_path / "log").read_text()
    assert text.count("ValueError: bad length 7") == 2 and text.count("KeyError: 'k'") == 2
    assert "in fail" in text and "hunter2" not in text


def test_exceptions_that_python_can_only_print_are_logged(tmp_path):
    class Bad:
        def __del__(self):
            raise RuntimeError("in a finalizer")

    with logging_to(tmp_path / "log"):
        bad = Bad()
        del bad
        thread = threading.Thread(target=lambda: 1 / 0, name="worker-1")
        thread.start()
        thread.join()
    finalizer, ended = lines_of(tmp_path / "log")
    assert "RuntimeError: in a finalizer" in finalizer["exception"]
    assert ended["thread"] == "worker-1" and "ZeroDivisionError" in ended["exception"]


def test_no_field_of_a_job_can_take_the_place_of_time_level_or_event(tmp_path):
    with logging_to(tmp_path / "log"):
        structlog.get_logger().info("real", level="critical", timestamp="never")
    (line,) = lines_of(tmp_path / "log")
    assert line["level"] == "info" and line["timestamp"].startswith("2") and list(line)[:3] == ["timestamp", "level", "event"]


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no")


ODD = [
    ("surrogate", "caf\udce9"),
    ("huge number", 10**400),
    ("object", object()),
    ("unspeakable", Unspeakable()),
    ("bytes", b"\xff\x00"),
    ("keys", {(1, 2): "tuple"}),
    ("nan", float("nan")),
]


@pytest.mark.parametrize("value", [value for _, value in ODD], ids=[name for name, _ in ODD])
@pytest.mark.parametrize("render", [render_json, render_console(Console(True))], ids=["json", "console"])
def test_a_value_that_cannot_be_shown_costs_neither_the_line_nor_the_job(render, value):
    line = render({"timestamp": "now", "level": "info", "event": "odd", "value": value})
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and b"odd" in line
    line.decode()


def test_text_cannot_steer_the_terminal_nor_forge_a_line():
    line = Console(False)(
        {"level": "info", "event": "a\x1b[2Jb\nc", "job": "x", "n": "\x9b1m", "exception": "T\n  \x1b]0;x\x07"}
    )
    assert b"\x1b" not in line and b"\x9b" not in line
    first, *block = line.splitlines()
    assert b"a\\x1b[2Jb\\x0ac" in first and block == [b"T", b"  \\x1b]0;x\\x07"]


# -- what writing costs -------------------------------------------------------------------------------------------------


def report(loss) -> bytes:
    return f"LOST {loss.count} {loss.cause}\n".encode()


def told_of(got: bytearray) -> tuple[list[bytes], int]:
    """The lines that arrived, and how many lost ones the reader was told of."""
    lines = bytes(got).splitlines()
    reports = [line for line in lines if line.startswith(b"LOST")]
    assert all(line.endswith(b"the reader was too slow") for line in reports)
    return [line for line in lines if line not in reports], sum(int(line.split()[1]) for line in reports)


def read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def test_a_reader_that_does_not_read_blocks_nobody_and_is_told_what_it_missed():
    reader, writing = os.pipe()
    writer = Writer(Target(fd=writing), report)
    count = 3 * QUEUE // 100
    for number in range(count):  # would never end if a put could block
        writer.put(b"%099d\n" % number)
    lost = writer.lost
    assert 0 < lost < count

    got = bytearray()
    thread = threading.Thread(target=lambda: got.extend(read_all(reader)))
    thread.start()
    writer.close(30)
    os.close(writing)
    thread.join(30)
    lines, told = told_of(got)
    numbers = [int(line) for line in lines]
    assert told == lost and len(numbers) == count - lost and numbers == sorted(numbers)


def test_the_end_does_not_wait_for_a_reader_that_does_not_read():
    reader, writing = os.pipe()
    writer = Writer(Target(fd=writing), report)
    for _ in range(QUEUE // 1000):
        writer.put(b"x" * 999 + b"\n")
    writer.close(0.1)
    assert writer._thread.is_alive()  # still in write(2), on its own
    read = threading.Thread(target=read_all, args=(reader,))
    read.start()
    writer._thread.join(30)
    os.close(writing)
    read.join(30)


def test_a_reader_that_has_gone_is_no_error():
    reader, writing = os.pipe()
    os.close(reader)
    writer = Writer(Target(fd=writing), report)
    writer.put(b"one\n")
    writer.put(b"two\n")
    writer.close(30)
    os.close(writing)
    assert writer.lost == 2


def test_a_full_disk_loses_lines_and_nothing_else_and_writing_resumes_by_itself(tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    writer = Writer(Target(tmp_path / "log"), report)
    writer.put(b"one\n")
    until(lambda: writer.lost == 1)
    (tmp_path / "log").unlink()
    writer.put(b"two\n")
    writer.put(b"three\n")
    writer.close(30)
    assert (tmp_path / "log").read_text() == "LOST 1 No space left on device\ntwo\nthree\n"


CUT = """
import resource, threading
from pathlib import Path
from supervisor.log import Target, Writer
writer = Writer(Target(Path("log")), lambda loss: b"LOST %d\\n" % loss.count)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))
writer.put(b"a" * 19 + b"\\n" + b"b" * 19 + b"\\n")
while writer.lost < 1:
    threading.Event().wait(0.001)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
writer.put(b"c\\n")
writer.close(30)
"""


def test_a_line_that_was_cut_in_two_does_not_swallow_the_next(tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", CUT], cwd=tmp_path, env=environ, check=True, timeout=30)
    assert (tmp_path / "log").read_text().splitlines() == ["a" * 19, "b" * 5, "LOST 1", "c"]


def test_a_file_is_opened_anew_when_the_configuration_is_applied_again(tmp_path):
    spec = LogSpec(file="log", format="json")
    with open_log(spec, tmp_path) as log:
        structlog.get_logger().info("before")
        until(lambda: (tmp_path / "log").read_bytes())
        (tmp_path / "log").rename(tmp_path / "log.1")
        log.apply(spec)
        structlog.get_logger().info("after")
    assert [line["event"] for line in lines_of(tmp_path / "log.1")] == ["before"]
    assert [line["event"] for line in lines_of(tmp_path / "log")] == ["after"]


def test_a_file_that_cannot_be_opened_is_a_fault_of_the_configuration_and_changes_nothing(tmp_path):
    with pytest.raises(SpecError, match=r"log\.file: cannot write to .*nowhere/log: No such file"):
        with open_log(LogSpec(file="nowhere/log"), tmp_path):
            pass
    os.mkfifo(tmp_path / "fifo")
    with logging_to(tmp_path / "log") as log:
        with pytest.raises(SpecError, match=r"fifo"):  # nobody reads it: to open it would block
            log.apply(LogSpec(file="fifo"))
        structlog.get_logger().info("still here")
    assert [line["event"] for line in lines_of(tmp_path / "log")] == ["still here"]


def test_everything_is_as_before_when_the_log_is_closed(tmp_path):
    before = structlog.get_config(), logging.getLogger().handlers[:], logging.getLogger().level, warnings.showwarning
    hooks = sys.unraisablehook, threading.excepthook
    with logging_to(tmp_path / "log"):
        assert structlog.get_config() != before[0]
    assert (structlog.get_config(), logging.getLogger().handlers[:], logging.getLogger().level, warnings.showwarning) == before
    assert (sys.unraisablehook, threading.excepthook) == hooks


# -- the output of jobs on a terminal -----------------------------------------------------------------------------------


def echoed(monkeypatch, no_color: str, *lines: tuple[str, bytes]) -> bytes:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    reader, writing = os.pipe()
    writer = Writer(Target(fd=writing), report)
    echo = Echo(writer)
    for name, line in lines:
        echo(name, line)
    writer.close(30)
    os.close(writing)
    return read_all(reader)


def test_lines_of_jobs_carry_their_name(monkeypatch):
    assert echoed(monkeypatch, "1", ("api", b"hello\r\n"), ("db", b"\xff")) == b"api          | hello\ndb           | \xff\n"


def test_each_name_has_a_colour_of_its_own_which_does_not_leak(monkeypatch):
    api, db, again = echoed(monkeypatch, "", ("api", b"\x1b[1mbold"), ("db", b"x"), ("api", b"y")).splitlines()
    assert api.endswith(b"\x1b[1mbold\x1b[0m") and api[:5] == again[:5] != db[:5]


def test_output_on_a_stalled_terminal_is_dropped_before_the_log_is():
    reader, writing = os.pipe()
    writer = Writer(Target(fd=writing), report)
    echo = Echo(writer)
    for _ in range(QUEUE // 500):
        echo("noisy", b"x" * 990)
    lost = writer.lost
    writer.put(b"a log line\n")
    assert 0 < lost == writer.lost
    got = bytearray()
    thread = threading.Thread(target=lambda: got.extend(read_all(reader)))
    thread.start()
    writer.close(30)
    os.close(writing)
    thread.join(30)
    lines, told = told_of(got)
    assert lines[-1] == b"a log line" and told == lost
