"""How a tree ends, and what comes out of `open_supervisor`: phases, graces, survivors, errors. In virtual time."""

from __future__ import annotations

import pytest
import trio

from supervisor.errors import EssentialEnded, InternalError, RestartIntensityExceeded
from supervisor.events import Ended, Starting
from supervisor.spec import RestartType
from supervisor.tree import open_supervisor
from tests.forest import crash, crashing_at, forest, group, job, lasting, serve, settle, slow

# ---- what comes out of the block ----


async def test_an_exception_of_the_block_comes_out_as_it_is_after_the_stop(autojump_clock, tmp_path):
    failure = ValueError("mine")
    with pytest.raises(ValueError) as caught:
        async with forest(tmp_path, {"a": job(slow(3))}) as f:
            await settle()
            raise failure
    assert caught.value is failure
    assert caught.value.__context__ is None
    assert trio.current_time() == 3.0
    assert f.happened(Ended) == [(3.0, "a")]


async def test_a_group_that_the_block_raises_keeps_its_shape(autojump_clock, tmp_path):
    with pytest.raises(ExceptionGroup) as caught:
        async with forest(tmp_path, {}):
            raise ExceptionGroup("mine", [ValueError("only one")])
    assert caught.value.message == "mine"


async def test_ctrl_c_in_the_block_stops_in_order_and_comes_out(autojump_clock, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        async with forest(tmp_path, {"a": job(slow(3))}) as f:
            await settle()
            raise KeyboardInterrupt
    assert f.happened(Ended) == [(3.0, "a")]


async def test_a_root_that_gives_up_raises_restart_intensity_exceeded_itself(autojump_clock, tmp_path):
    with pytest.raises(RestartIntensityExceeded) as caught:
        async with forest(tmp_path, {"a": job(crash), "b": job(slow(2))}, intensity=1) as f:
            await trio.sleep_forever()
    assert (caught.value.supervisor, caught.value.intensity) == ("", 1)
    assert caught.value.__suppress_context__
    assert f.tree.failure is caught.value
    # The first failure is answered after 0.5 s; the second one is too many, and the end waits for b.
    assert f.happened(Ended) == [(0.0, "a"), (0.5, "a"), (2.5, "b")]
    assert f.tree.ending == "more than 1 restarts within 60 s; a: RuntimeError: boom"


async def test_an_essential_job_that_fails_for_good_raises_essential_ended_itself(autojump_clock, tmp_path):
    spec = job(crash, once=True, essential=True, restart=RestartType.TEMPORARY)
    with pytest.raises(EssentialEnded, match=r"^essential a failed: RuntimeError: boom$"):
        async with forest(tmp_path, {"a": spec, "b": job(serve)}):
            await trio.sleep_forever()


async def test_an_essential_job_that_completes_just_ends_the_block(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(7), once=True, essential=True), "b": job(slow(1))}) as f:
        await trio.sleep_forever()
    assert trio.current_time() == 8.0
    assert f.tree.failure is None
    assert f.tree.ending == "essential a completed"


async def test_what_fails_in_the_tree_and_in_the_block_comes_out_in_one_group(autojump_clock, tmp_path):
    with pytest.raises(ExceptionGroup) as caught:
        async with forest(tmp_path, {"a": job(crash)}, intensity=0):
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while leaving")
    assert [type(error) for error in caught.value.exceptions] == [ValueError, RestartIntensityExceeded]


async def test_a_fault_of_ours_comes_out_bare_and_ends_everything_at_once(autojump_clock, tmp_path):
    def sink(event):
        if isinstance(event, Starting) and event.run == "bad#2":
            raise ValueError("a sink")

    with pytest.raises(InternalError, match=r"^a sink raised on event"):
        async with forest(tmp_path, {"bad": job(crashing_at(1)), "a": job(slow(5))}, {"g": group("bad")}) as f:
            f.tree.journal.add_sink(sink)
            await trio.sleep_forever()
    assert trio.current_time() == 1.5


async def test_cancelling_the_block_from_outside_stops_in_order(autojump_clock, tmp_path):
    with trio.move_on_after(2) as scope:
        async with forest(tmp_path, {"db": job(slow(3)), "api": job(slow(4), after=("db",))}) as f:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == 9.0
    assert f.happened(Ended) == [(6.0, "api"), (9.0, "db")]
    assert f.tree.survivors == f.tree.late == ()


async def test_an_error_on_the_way_out_of_a_cancelled_block_is_not_wrapped(autojump_clock, tmp_path):
    with trio.CancelScope() as scope, pytest.raises(ValueError):
        async with forest(tmp_path, {"a": job(slow(3))}):
            await settle()
            scope.cancel(reason="a test")
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while leaving")
    assert trio.current_time() == 3.0


async def test_output_is_taken_in_to_the_last_byte_when_the_block_is_cancelled(tmp_path):
    out = tmp_path / "out"
    shell = "trap 'head -c 300000 /dev/zero; exit' TERM; echo here; while :; do sleep 0.05; done"
    command = {"command": ["sh", "-c", shell], "output": str(out), "ready": {"log": "here"}, "grace": "30s"}
    with trio.fail_after(30), trio.CancelScope() as scope:
        async with open_supervisor({"jobs": {"a": command}}) as tree:
            await tree.wait_running()
            scope.cancel(reason="a test")
            await trio.sleep_forever()
    assert out.read_bytes() == b"here\n" + bytes(300000)
