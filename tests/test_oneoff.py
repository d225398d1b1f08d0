"""Jobs that no configuration names: run once, and forgotten."""

from dataclasses import replace
from pathlib import Path

import pytest
import trio
from control_serving import until

from supervisor import ControlError, JobSpec, SpecError, SupervisorSpec, open_supervisor
from supervisor.config import Config
from supervisor.probes import Ready
from supervisor.state import Phase, State

SLEEP = JobSpec(command=("sleep", "1000"), grace=0.1)


def config(base: Path, **jobs: JobSpec) -> Config:
    return Config(file=None, base=base, jobs=jobs)


async def test_it_runs_once_gives_its_outcome_and_is_forgotten(tmp_path):
    async with open_supervisor(config(tmp_path)) as tree:
        with tree.journal.subscribe() as events:
            outcome = await tree.execute(JobSpec(command=("sh", "-c", "exit 3")), by="a test")
            assert (outcome.code, outcome.failed) == (3, True)
            assert tree.journal.table == {} and tree.nodes == {}
            killed = await tree.execute(JobSpec(command=("sh", "-c", "kill -9 $$")))
            assert (killed.code, killed.signal, killed.failed) == (None, "SIGKILL", True)
            assert killed.reason == "killed by SIGKILL"
        names = [type(events.take()).__name__ for _ in range(6)]
        assert names == ["Added", "Starting", "Spawned", "Ready", "Ended", "Removed"]


async def test_it_is_seen_while_it_runs_and_its_tree_is_as_ready_as_before(tmp_path):
    async with open_supervisor(config(tmp_path, api=SLEEP)) as tree:
        await tree.wait_running()
        async with tree.executing(JobSpec(command=("sleep", "1000"), ready=Ready(log="never")), name="mine") as job:
            await until(tree, lambda table: table["mine"].pid is not None)
            row = tree.journal.table["mine"]
            assert (row.kind, row.supervisor, row.state) == ("command", None, State.STARTING)
            assert tree.root_ready.value and [row.name for row in tree.status()] == ["api", "mine"]
        assert (await job.wait()).signal == "SIGTERM"
        assert [row.name for row in tree.status()] == ["api"]


async def test_names_are_the_first_that_are_free_and_runs_are_never_named_twice(tmp_path):
    async with open_supervisor(config(tmp_path)) as tree:
        first, second = tree.begin(SLEEP), tree.begin(SLEEP)
        await until(tree, lambda table: all(row.pid for row in table.values()))
        assert [row.run for row in tree.status()] == ["exec-1#1", "exec-2#2"]
        await tree.stop("exec-1")
        assert (await first.wait()).signal == "SIGTERM" and list(tree.nodes) == ["exec-2"]
        third = tree.begin(SLEEP)
        await until(tree, lambda table: table["exec-1"].pid is not None)
        assert tree.journal.table["exec-1"].run == "exec-1#3"
        assert {second.name, third.name} == set(tree.nodes)


async def test_a_reload_leaves_it_alone_and_a_configured_job_of_its_name_comes_after_it(tmp_path):
    before = config(tmp_path, api=SLEEP)
    async with open_supervisor(before) as tree:
        job = tree.begin(SLEEP, name="late")
        await until(tree, lambda table: table["late"].pid is not None)
        pid = tree.journal.table["late"].pid
        tree.apply(config(tmp_path, late=SLEEP))
        tree.apply(config(tmp_path, late=replace_command(SLEEP)))
        await until(tree, lambda table: "api" not in table)
        assert tree.journal.table["late"].pid == pid
        tree.apply(before)
        tree.apply(config(tmp_path, late=SLEEP))
        assert tree.journal.table["late"].pid == pid
        await tree.stop("late")
        assert (await job.wait()).signal == "SIGTERM"
        table = await tree_row(tree, "late")
        assert table.run == "late#1" and table.pid != pid


async def tree_row(tree, name):
    await until(tree, lambda table: name in table and table[name].ready)
    return tree.journal.table[name]


def replace_command(spec):
    from msgspec.structs import replace as changed

    return changed(spec, command=("sleep", "2000"))


async def test_a_shutdown_gives_it_the_grace_of_a_run_in_hand(tmp_path):
    script = "trap 'exit 7' USR1; echo up; while :; do sleep 0.02; done"
    async with open_supervisor(config(tmp_path)) as tree:
        job = tree.begin(JobSpec(command=("sh", "-c", script), ready=Ready(log="up"), grace=50))
        await until(tree, lambda table: table["exec-1"].ready)
        tree.shutdown("enough")
        await tree.phase.wait_value(Phase.DRAINING)
        await until(tree, lambda table: table["exec-1"].word == "draining")
        tree.order("signal", ["exec-1"], signal=10)
        assert (await job.wait()).code == 7
        with pytest.raises(ControlError, match="stopping"):
            tree.begin(SLEEP)


async def test_one_that_has_no_time_to_start_is_told_so(tmp_path):
    async with open_supervisor(config(tmp_path)) as tree:
        job = tree.begin(SLEEP)
        tree.shutdown("at once", kill=True)
        outcome = await job.wait()
        assert outcome.failed and outcome.code is None
        await until(tree, lambda table: not table)


async def test_who_is_cancelled_stops_it_and_waits_for_its_end(tmp_path):
    async with open_supervisor(config(tmp_path)) as tree, trio.open_nursery() as nursery:
        nursery.start_soon(tree.execute, SLEEP)
        await until(tree, lambda table: bool(table) and table["exec-1"].pid is not None)
        nursery.cancel_scope.cancel(reason="the test has seen enough")
    assert tree.nodes == {}


async def test_what_cannot_be_spawned_is_an_outcome(tmp_path):
    async with open_supervisor(config(tmp_path)) as tree:
        outcome = await tree.execute(JobSpec(command=("no-such-program",)))
        assert outcome.failed and "no-such-program" in outcome.reason and tree.nodes == {}


async def test_what_makes_no_sense_is_refused(tmp_path):
    async with open_supervisor(config(tmp_path, api=SLEEP)) as tree:
        for name, spec in {
            "api": SLEEP,
            "a b": SLEEP,
            "x": JobSpec(command=("true",), every=5),
            "y": JobSpec(command=("true",), after=("api",)),
        }.items():
            with pytest.raises(ControlError):
                tree.begin(spec, name=name)
        tree.begin(SLEEP)
        for verb in ("restart", "reload", "run-now", "pause", "resume"):
            (order,) = tree.order(verb, ["exec-1"])
            answer = await order.wait()
            assert not answer.ok and "run once" in answer.text


@pytest.mark.parametrize(
    "broken",
    [
        {"supervisors": {"group": SupervisorSpec(children=("apj",))}},
        {"jobs": {"api": SLEEP, "web": JobSpec(command=("true",), after=("apj",))}},
        {"supervisors": {"group": SupervisorSpec(children=("group",))}},
    ],
)
async def test_a_configuration_built_in_python_is_told_its_faults_as_a_file_is(tmp_path, broken):
    good = config(tmp_path, api=SLEEP)
    with pytest.raises(SpecError, match=r"api|cycle"):
        async with open_supervisor(replace(good, **broken)):
            pass
    async with open_supervisor(good) as tree:
        with pytest.raises(SpecError):
            tree.apply(replace(good, **broken))
        assert tree.config is good
