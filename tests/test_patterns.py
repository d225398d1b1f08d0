"""docs/patterns.md: each of the 48 rows has an example that runs and a test that is there; and the tests of some rows."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
import trio
from forest import forest
from running import ROOT

from supervisor import Context, JobSpec, Phase, SupervisorError, errors
from supervisor.probes import Ready

PAGE = ROOT / "docs" / "patterns.md"
TICK = "✓"


def rows() -> list[list[str]]:
    """The cells of the table: number, pattern, in a program, in the file, tests."""
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@cache
def functions(name: str) -> frozenset[str]:
    """The names of the tests in a file."""
    found = ast.walk(ast.parse((ROOT / "tests" / name).read_text()))
    return frozenset(node.name for node in found if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_there_are_48_rows_in_order():
    assert [int(row[0]) for row in rows()] == list(range(1, 49))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_is_ticked_with_a_test_that_there_is_and_leads_to_an_example(row):
    _number, _pattern, program, _file, tests = row
    assert tests.endswith(TICK)
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert named
    for file, name in named:
        assert name in functions(file), (file, name)
    anchors = re.findall(r"\]\(#([\w-]+)\)", program)
    assert anchors
    for anchor in anchors:
        assert anchor in sections_with_an_example(), anchor


@cache
def sections_with_an_example() -> frozenset[str]:
    """The anchors of the headings that have a block which tests/test_docs.py runs."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    run = ("```python\n", "```toml\n", "```console\n")
    return frozenset(
        _anchor(head) for head, text in zip(parts[::2], parts[1::2], strict=True) if any(each in text for each in run)
    )


def _anchor(head: str) -> str:
    return re.sub(r"[^\w-]", "", head.lower().replace(" ", "-"))


# -- rows that nobody else tests ------------------------------------------------------------------------------------------


def test_one_type_covers_every_cause_and_keeps_the_first_one():
    """Row 1: `except RunFailed` is enough for whatever made a run fail, and the cause of it is there."""
    failures = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RunFailed)]
    assert {errors.TimedOut, errors.DeadlineExceeded, errors.SpawnFailed, errors.BreakerOpen} <= {*failures}
    assert all(issubclass(kind, SupervisorError) for kind in failures)
    with pytest.raises(errors.RunFailed) as caught:
        try:
            raise ConnectionError("no route")
        except ConnectionError as error:
            raise errors.SpawnFailed("the partner is away") from error
    assert isinstance(caught.value.__cause__, ConnectionError)


async def test_an_iteration_is_never_cut_in_the_middle(autojump_clock, tmp_path):
    """Row 24: a service that looks at its context between two rounds ends after a whole one, whenever it is told to stop."""
    for moment in (0.0, 0.5, 1.0, 1.5, 2.5):
        rounds = []

        async def work(ctx: Context, rounds: list[str] = rounds) -> None:
            while await ctx.sleep(1.0):
                rounds.append("begun")
                await trio.sleep(0.7)
                rounds.append("done")

        async with forest(tmp_path, {"worker": JobSpec(call=work)}) as world:
            await trio.sleep(moment)
            began = trio.current_time()
            await world.tree.stop("worker")
            assert trio.current_time() - began <= 0.7 + 1e-9
        assert rounds == ["begun", "done"] * (len(rounds) // 2), moment


async def test_a_server_finishes_what_it_has_accepted_and_refuses_what_is_new(tmp_path):
    """Row 34: over real sockets: at the shutdown a request in hand is answered, and nobody else gets in."""
    accepted, go_on, address = trio.Event(), trio.Event(), []

    async def serve(ctx: Context) -> None:
        async def answer(stream: trio.SocketStream) -> None:
            async with stream:
                accepted.set()
                await go_on.wait()
                await stream.send_all(b"done")

        async with trio.open_nursery() as requests:
            async with trio.open_nursery() as door:
                listeners = await door.start(lambda **kw: trio.serve_tcp(answer, 0, handler_nursery=requests, **kw))
                address.append(listeners[0].socket.getsockname()[1])
                ctx.ready()
                await ctx.phase.wait_value(lambda phase: phase is not Phase.RUNNING)
                door.cancel_scope.cancel(reason="no new requests")

    async def shut_down() -> None:
        async with forest(tmp_path, {"server": JobSpec(call=serve, ready=Ready(notify=True))}) as world:
            await world.tree.wait_running()
            up.set()
            await accepted.wait()
            world.tree.shutdown("a test")
            await trio.sleep_forever()

    up = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shut_down)
        await up.wait()
        async with await trio.open_tcp_stream("127.0.0.1", address[0]) as client:
            await accepted.wait()
            await _refused(address[0])
            go_on.set()
            assert await client.receive_some() == b"done"


async def _refused(port: int) -> None:
    """Wait until nobody gets in any more."""
    with trio.fail_after(60):
        while True:
            try:
                async with await trio.open_tcp_stream("127.0.0.1", port):
                    await trio.lowlevel.checkpoint()
            except OSError:
                return
