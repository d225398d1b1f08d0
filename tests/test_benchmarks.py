"""The harness of `benchmarks/`, with the floors only: that it measures, judges and leaves nothing behind. Never how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.capture import LINE, SHAPES, audit
from benchmarks.children import RECORD, Child, Failed, Starts, compiler
from benchmarks.drivers import DRIVERS
from benchmarks.life import QUICK
from benchmarks.processes import Use, used_between
from benchmarks.report import METRICS_BY_KEY, Report, markdown_table, percentile_99, table
from benchmarks.sweep import Plan, Result, Sweeps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="procfs, pidfds and a subreaper")

REPOSITORY = Path(__file__).parents[1]
FLOORS = [name for name in ("trio-floor", "c-floor") if name == "trio-floor" or compiler()]


class Harness:
    """`python -m benchmarks` in a process of its own, and everything that ever descended from it."""

    def __init__(self, tmp_path: Path) -> None:
        self.mark = f"BENCH_TEST={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.environ = {**os.environ, name: value, "TMPDIR": str(tmp_path)}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe, python = subprocess.PIPE, sys.executable
        process = subprocess.Popen([python, *words], cwd=REPOSITORY, env=self.environ, stdout=pipe, stderr=pipe, text=True)
        self.started.append(process)
        return process

    def left(self) -> dict[int, str]:
        """What still runs and bears its mark: pid -> command line."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # gone, or not ours to read
        return found

    def close(self) -> None:
        """After a test that failed: end it, and what it should have ended."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.communicate()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(tmp_path)
    yield harness
    harness.close()


def test_a_quick_run_measures_every_floor_and_leaves_nothing_behind(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ["--quick", "-n", "3", "-r", "1", "--json", str(file)]
    for floor in FLOORS:
        words += ["-d", floor]
    for measure in ("boot", "stop", "restart", "all-back", "memory", "idle", "status"):
        words += ["-m", measure]
    process = harness.start("-m", "benchmarks", *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = json.loads(file.read_text())
    assert [result["error"] for result in found["results"]] == [None] * len(FLOORS)
    values = {(row["driver"], row["metric"]): row["value"] for row in found["medians"]}
    for floor in FLOORS:
        for metric in ("boot", "restart_p50", "restart_p99", "all_back", "status", "stop", "pss"):
            assert values[floor, metric] > 0, (floor, metric)
        assert values[floor, "idle_cpu"] >= 0
        assert floor in out.splitlines()[2]
    assert harness.left() == {}


CAPTURING = [name for name, driver in DRIVERS.items() if driver.captures and name != "ours-full"]


@pytest.mark.skipif(not compiler(), reason="the writer needs a C compiler")
@pytest.mark.parametrize(
    "names",
    [pytest.param(["ours-capture", "trio-splice"], id="two"), pytest.param(CAPTURING, id="all", marks=pytest.mark.long)],
)
def test_whoever_captures_keeps_every_byte_that_was_written(harness: Harness, tmp_path: Path, names: list[str]) -> None:
    able = [name for name in names if not DRIVERS[name].missing()]
    file = tmp_path / "result.json"
    words = ["--quick", "-r", "1", "-m", "capture", "--json", str(file)]
    process = harness.start("-m", "benchmarks", *words, *(word for name in able for word in ("-d", name)))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found = json.loads(file.read_text())
    assert [result["error"] for result in found["results"]] == [None] * len(SHAPES) * len(able)
    values = {(row["driver"], row["metric"]): row["value"] for row in found["medians"]}
    for driver in able:
        for shape in SHAPES:
            assert values[driver, f"{shape.key}_rate"] > 0, (driver, shape)
            assert values[driver, f"{shape.key}_cost"] > 0, (driver, shape)
            assert values[driver, f"{shape.key}_lost"] == 0, (driver, shape)
    assert values["ours-capture", "blocks_torn"] == 0
    assert "capture: one child, large blocks" in out
    assert harness.left() == {}


def test_storms_of_every_kind_are_measured(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ["--quick", "-r", "1", "-d", "ours", "-d", "trio-floor", "--markdown", "--json", str(file)]
    for measure in ("storm", "throttled-storm", "long-storm"):
        words += ["-m", measure]
    process = harness.start("-m", "benchmarks", *words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found = json.loads(file.read_text())
    assert [result["error"] for result in found["results"]] == [None] * 5, "the long one is ours alone"
    values = {(row["driver"], row["metric"]): row["value"] for row in found["medians"]}
    for metric in ("storm_starts", "storm_status_p50", "storm_status_p99", "storm_status", "throttled_status"):
        assert values["ours", metric] > 0
        assert values["trio-floor", metric] > 0
    assert values["ours", "storm_core"] > 0
    assert values["ours", "long_late"] > 1_000_000
    assert "| crash storm of 200 |  | ours | trio-floor |" in out
    assert harness.left() == {}


@pytest.mark.parametrize(
    ("cuts", "loss", "expected"),
    [
        ((100, 250_000), slice(0, 0), (0, 0)),
        ((130, 250_000), slice(0, 0), (0, 1)),
        ((100,), slice(1000, 1200), (200, 0)),
        ((100,), slice(1050, 1150), (100, 0)),
        ((100,), slice(249_900, 250_000), (100, 0)),
    ],
    ids=[
        "whole",
        "a line is cut by a rotation",
        "two lines are gone",
        "100 bytes across a line end are gone",
        "the last line is gone",
    ],
)
def test_every_byte_is_accounted_for(tmp_path: Path, cuts: tuple[int, ...], loss: slice, expected: tuple[int, int]) -> None:
    data = bytearray(b"".join(b"0007 %010d %b\n" % (number, b"x" * 83) for number in range(2500)))
    assert len(data) == 2500 * LINE
    del data[loss]
    files = []
    for begin, end in zip((0, *cuts), (*cuts, None), strict=True):
        files.append(tmp_path / str(begin))
        files[-1].write_bytes(data[begin:end])
    assert audit([tmp_path / "absent", *files], 7, 2500) == expected


def test_more_than_was_written_is_no_capture(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes(2 * LINE))
    with pytest.raises(Failed, match="more in the files of slot 0 than was written"):
        audit([tmp_path / "log"], 0, 1)


def test_where_more_is_better_a_target_is_a_least(tmp_path: Path) -> None:
    rates = [Result(name, "capture-blocks", 1, 1, {"rate": [rate]}) for name, rate in (("ours", 80.0), ("supervisord", 100.0))]
    targets = judged(tmp_path, *rates, drivers=("ours", "supervisord")).targets("ours")
    assert [(row["metric"], row["figure"], row["reached"]) for row in targets] == [("blocks_rate", 0.8, False)]


def test_tables_can_be_pasted_into_a_page() -> None:
    lines = markdown_table(["N = 3", "", "ours"], [["boot", "s", "0.5"]]).splitlines()
    assert lines == ["| N = 3 |  | ours |", "| --- | --- | --- |", "| boot | s | 0.5 |"]


def test_ctrl_c_in_the_middle_of_a_life_leaves_nothing_behind(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    process = harness.start("-m", "benchmarks", "-n", "3", "-d", "trio-floor", "-m", "stop", "-r", "100", "--json", str(file))
    assert process.stderr
    for line in process.stderr:
        if line.startswith("run 1:"):
            break
    assert len(harness.left()) >= 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(file.read_text())["results"], "what was measured before is not lost"
    assert harness.left() == {}


def test_a_stop_that_leaves_a_process_is_a_failure_and_every_process_is_ended(harness: Harness, tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from benchmarks.children import Failed
        from benchmarks.processes import Daemon, workplace

        with workplace():
            # The "supervisor" obeys SIGTERM; what it started does not, and is an orphan then.
            shell = "trap '' TERM; sleep 600 & trap - TERM; echo up; wait"
            log = Path(sys.argv[1])
            os.mkfifo(log)
            reader = os.open(log, os.O_RDWR)
            daemon = Daemon(["/bin/sh", "-c", shell], cwd=Path("/"), env=dict(os.environ), log=log)
            assert os.read(reader, 10) == b"up\\n"
            try:
                daemon.stop(signal.SIGTERM, timeout=0.2)
            except Failed as error:
                print(error)
            print(daemon.end())
            Daemon(["/bin/sleep", "600"], cwd=Path("/"), env=dict(os.environ), log=log)
    """
    process = harness.start("-c", textwrap.dedent(script), str(tmp_path / "log"))
    out, err = process.communicate(timeout=60)
    assert out.splitlines() == ["the stop was not over in time: 1 processes were left", "1"], err
    assert harness.left() == {}


@pytest.mark.parametrize("native", [True, False], ids=["in C", "in Python"])
def test_a_child_notes_its_start(tmp_path: Path, native: bool) -> None:
    child = Child.build(tmp_path)
    if native and not child.native:
        pytest.skip("no C compiler")
    if not native:
        script = REPOSITORY / "benchmarks" / "child.py"
        child = Child((sys.executable, "-I", "-S", str(script)), False, child.log)
    starts = Starts(child.log, 20)
    try:
        run = tmp_path / "run"
        run.write_text(child.script(15, "crash"))
        run.chmod(0o755)
        pids = []
        for argv in (child.command(2, "crash"), [str(run)], child.command(2, "crash")):
            process = subprocess.Popen(argv)
            pids.append(process.pid)
            assert process.wait(timeout=30) == 1
        starts.read()
    finally:
        starts.close()
    assert (starts.total, starts.started) == (3, 2)
    assert (starts.lives[2], starts.lives[15]) == (2, 1)
    assert (starts.pid[2], starts.pid[15]) == (pids[2], pids[1])
    assert 0 < starts.at[15] < starts.at[2]


def test_a_half_written_record_is_read_when_it_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    starts = Starts(log, 1)
    record = RECORD.pack(7, 42, 0)
    try:
        log.write_bytes(record[:5])
        starts.read()
        assert starts.total == 0
        log.write_bytes(record)
        starts.read()
        assert (starts.total, starts.pid, starts.at) == (1, [42], [7])
    finally:
        starts.close()


def test_a_thread_that_ends_while_idle_is_measured_counts_as_one_wake_up() -> None:
    before = {(1, 1): Use(500, 10), (1, 2): Use(900, 40)}
    after = {(1, 1): Use(700, 12), (1, 3): Use(30, 1)}
    assert used_between(before, after) == Use(230, 4)


def test_waiting_for_what_does_not_happen_fails_with_its_name(tmp_path: Path) -> None:
    starts = Starts(tmp_path / "starts", 1)
    try:
        with pytest.raises(Failed, match=r"the start of j0 did not happen within 0\.01 s"):
            starts.wait(lambda: False, "the start of j0", timeout=0.01)
    finally:
        starts.close()


def judged(
    tmp_path: Path, *results: Result, drivers: tuple[str, ...] = ("ours", "trio-floor", "c-floor", "s6", "runit")
) -> Report:
    """A report on results that nobody measured."""
    plan = Plan(drivers, [10, 100], frozenset({"boot"}), 2, QUICK, 60.0)
    sweeps = Sweeps(plan, Child(("child",), True, tmp_path / "starts"), None, print)
    sweeps.results += results
    return Report(sweeps, Child(("child",), True, tmp_path / "starts"), table)


def life(driver: str, sweep: int, count: int = 100, **samples: float) -> Result:
    return Result(driver, "life", count, sweep, {name: [value] for name, value in samples.items()})


def test_a_yardstick_that_moved_makes_the_run_void(tmp_path: Path) -> None:
    assert judged(tmp_path, life("c-floor", 1, boot=0.100), life("c-floor", 2, boot=0.129)).moved() == []
    moved = judged(tmp_path, life("c-floor", 1, boot=0.100), life("c-floor", 2, boot=0.131)).moved()
    assert moved == ["c-floor moved by 1.31 in boot at N = 100"]
    assert "VOID" in judged(tmp_path, life("c-floor", 1, boot=0.100), life("c-floor", 2, boot=0.131)).text()
    assert judged(tmp_path, life("trio-floor", 1, boot=0.1), life("trio-floor", 2, boot=0.2)).moved() == [], "another yardstick"


def test_what_differs_by_more_than_half_between_runs_is_measured_again(tmp_path: Path) -> None:
    assert judged(tmp_path, life("s6", 1, boot=0.100), life("s6", 2, boot=0.149)).noisy == []
    assert judged(tmp_path, life("s6", 1, boot=0.100), life("s6", 2, boot=0.151)).noisy == [("s6", 100)]
    assert judged(tmp_path, life("s6", 1, boot=0.0001), life("s6", 2, boot=0.0009)).noisy == [], "less than a millisecond"


def test_the_best_peer_is_neither_a_floor_nor_ours(tmp_path: Path) -> None:
    report = judged(
        tmp_path, life("ours", 1, boot=1), life("c-floor", 1, boot=1), life("s6", 1, boot=3), life("runit", 1, boot=2)
    )
    assert report.best_peer(METRICS_BY_KEY["boot"], 100) == ("runit", 2)
    storms = [Result(name, "storm", 200, 1, {"starts": [rate]}) for name, rate in (("s6", 30.0), ("runit", 20.0))]
    assert judged(tmp_path, *storms).best_peer(METRICS_BY_KEY["storm_starts"], 200) == ("s6", 30.0)


def test_targets_are_judged_by_ratios_within_the_run(tmp_path: Path) -> None:
    report = judged(tmp_path, life("ours", 1, boot=0.5, status=0.002), life("trio-floor", 1, boot=0.2), life("s6", 1, boot=0.6))
    judgement = {(row["metric"], row["against"]): (round(row["figure"], 3), row["reached"]) for row in report.targets("ours")}
    assert judgement == {
        ("boot", "trio-floor"): (2.5, False),
        ("boot", "s6"): (0.833, True),
        ("status", None): (0.002, True),
    }


def test_memory_per_further_child_is_the_slope_between_the_counts(tmp_path: Path) -> None:
    report = judged(tmp_path, life("ours", 1, 10, pss=2_000_000), life("ours", 1, 100, pss=2_900_000))
    assert report.per_child("ours") == 10_000
    assert judged(tmp_path, life("ours", 1, 100, pss=1)).per_child("ours") is None


def test_the_99th_percentile_of_few_samples_is_the_largest() -> None:
    assert percentile_99([[1.0, 5.0], [2.0]]) == 5.0
    assert percentile_99([[float(sample) for sample in range(101)]]) == 99.0


def test_every_driver_says_what_it_lacks_or_can_run() -> None:
    assert {driver.role for driver in DRIVERS.values()} == {"ours", "floor", "peer"}
    for driver in DRIVERS.values():
        lack = driver.missing()
        assert lack is None or lack.startswith(("no ", "floor.c"))
