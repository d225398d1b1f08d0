"""The kind `task`: a function of the daemon's own loop, with and without its Context. In virtual time."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.events import Ended, Killing, Progress, Ready, Starting, Warned
from supervisor.kinds import Context, JobSpec
from supervisor.probes import Ready as ReadySpec
from supervisor.state import Phase
from supervisor.tree import open_supervisor
from tests.forest import SIXTY, forest, job, serve, settle


class Spy:
    """Functions of every shape, that note how they were called."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    async def plain(self, **args: Any) -> None:
        self.calls.append(args)

    async def __call__(self, ctx: Context, word: str = "none") -> None:
        self.calls.append({"job": ctx.job, "word": word})

    async def optional(self, word: str, context: Context | None = None) -> None:
        self.calls.append({"job": context.job if context else None, "word": word})

    async def named(self, anything: supervisor.Context) -> None:  # noqa: F821 (what is written counts)
        self.calls.append({"job": anything.job})

    @staticmethod
    async def static(calls: list[Any], *, ctx: Context) -> None:
        calls.append({"job": ctx.job})


async def once(tmp_path: Any, call: Any, **keys: Any) -> Any:
    """Run it to its end; its row then."""
    async with forest(tmp_path, {"a": job(call, once=True, backoff=SIXTY, **keys)}) as f:
        await trio.sleep(1)
        return f.tree.status("a")[0]


async def test_args_are_its_keyword_arguments(autojump_clock, tmp_path):
    spy = Spy()
    row = await once(tmp_path, spy.plain, args={"a": 1, "b": [2]})
    assert (row.kind, row.word, spy.calls) == ("task", "completed", [{"a": 1, "b": [2]}])


async def test_a_parameter_annotated_context_gets_it_whatever_its_name(autojump_clock, tmp_path):
    spy = Spy()
    await once(tmp_path, spy.named)
    await once(tmp_path, spy.optional, args={"word": "hello"})
    assert spy.calls == [{"job": "a"}, {"job": "a", "word": "hello"}]


async def test_callable_objects_and_partials_are_functions_too(autojump_clock, tmp_path):
    spy = Spy()
    for call in (
        spy,
        functools.partial(spy, word="w"),
        functools.partial(spy.optional, "x"),
        functools.partial(Spy.static, spy.calls),
    ):
        row = await once(tmp_path, call)
        assert (row.kind, row.word) == ("task", "completed"), row.exit
    assert spy.calls == [{"job": "a", "word": "none"}, {"job": "a", "word": "w"}, {"job": "a", "word": "x"}, {"job": "a"}]


async def test_it_fails_with_the_name_and_the_first_line_of_its_exception(autojump_clock, tmp_path):
    async def bad() -> None:
        raise ValueError("first\nsecond")

    async with forest(tmp_path, {"a": job(bad, once=True, backoff=SIXTY)}) as f:
        await settle()
        assert f.tree.status("a")[0].exit.reason == "ValueError: first"
        assert [(line["event"], line["job"], line["run"]) for line in f.logs] == [("job raised", "a", "a#1")]
        assert str(f.logs[0]["exc_info"]) == "first\nsecond"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (GeneratorExit(), "GeneratorExit"),
        (ExceptionGroup("g", [ValueError("only")]), "ValueError: only"),
        (
            ExceptionGroup("g", [ValueError("a"), KeyError("b")]),
            "ExceptionGroup: g (2 sub-exceptions)",
        ),
        (BaseExceptionGroup("g", [ValueError("a"), SystemExit(1)]), "BaseExceptionGroup: g (2 sub-exceptions)"),
    ],
)
async def test_whatever_it_raises_stays_its_own_failure(autojump_clock, tmp_path, raised, reason):
    async def bad() -> None:
        raise raised

    async with forest(tmp_path, {"a": job(bad, once=True, backoff=SIXTY), "b": job(serve)}) as f:
        await settle()
        assert f.words() == "a:backing off b:running"
        assert f.tree.status("a")[0].exit.reason == reason


async def test_ctrl_c_in_a_job_is_not_the_jobs(autojump_clock, tmp_path):
    async def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with forest(tmp_path, {"a": job(interrupted), "b": job(serve)}):
            await trio.sleep_forever()


async def test_a_scope_of_its_own_that_it_cancels_is_no_failure(autojump_clock, tmp_path):
    async def impatient() -> None:
        with trio.move_on_after(3):
            await trio.sleep_forever()

    async with forest(tmp_path, {"a": job(impatient, once=True)}) as f:
        await f.tree.wait_running()
        assert f.times(Ended, "a") == [3.0]
        assert f.word("a") == "completed"


async def test_the_context_tells_of_the_stop_and_its_sleep_ends_early(autojump_clock, tmp_path):
    seen: list[Any] = []

    async def live(ctx: Context) -> None:
        seen.append((ctx.job, ctx.run, ctx.stopping, ctx.phase.value))
        seen.append(await ctx.sleep(2))
        seen.append(await ctx.sleep(100))
        seen.append((trio.current_time(), ctx.stopping, ctx.phase.value))
        seen.append(await ctx.sleep(100))  # no sleep at all once it stops
        await ctx.wait_stopping()
        seen.append(trio.current_time())

    async with forest(tmp_path, {"a": job(live)}) as f:
        await trio.sleep(5)
        await f.tree.stop("a")
    assert seen == [("a", "a#1", False, Phase.RUNNING), True, False, (5.0, True, Phase.STOPPING), False, 5.0]


async def test_what_cannot_hear_is_cancelled_at_once_as_a_service_and_after_its_grace_as_work(autojump_clock, tmp_path):
    jobs = {"service": job(trio.sleep_forever), "work": job(trio.sleep_forever, once=True, grace=4)}
    async with forest(tmp_path, jobs) as f:
        await trio.sleep(1)
        await f.tree.stop("*")
        assert f.happened(Ended) == [(1.0, "service"), (5.0, "work")]
        assert f.happened(Killing) == [(5.0, "work")]


async def test_what_hears_and_goes_on_is_cancelled_after_its_grace(autojump_clock, tmp_path):
    cleaned: list[float] = []

    async def deaf(ctx: Context) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cleaned.append(trio.current_time())

    async with forest(tmp_path, {"a": job(deaf, grace=4)}) as f:
        await trio.sleep(1)
        (order,) = f.tree.order("stop", ["a"])
        assert (await order.wait()).text == "stopped (killed after 4 s)"
        assert cleaned == [5.0]


async def test_an_exception_while_it_is_cancelled_is_its_outcome(autojump_clock, tmp_path):
    async def bad(ctx: Context) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async with forest(tmp_path, {"a": job(bad, grace=4)}) as f:
        await trio.sleep(1)
        await f.tree.stop("a")
        row = f.tree.status("a")[0]
        assert (row.word, row.exit.reason) == ("stopped", "ValueError: while cleaning up")


async def test_progress_and_ready_are_events(autojump_clock, tmp_path):
    async def live(ctx: Context) -> None:
        ctx.progress(1)
        ctx.progress(2, 3)
        ctx.ready()
        await ctx.wait_stopping()

    async with forest(tmp_path, {"a": job(live, ready=ReadySpec(notify=True))}) as f:
        await f.tree.wait_running()
        assert [(event.run, event.done, event.total) for event in f.events(Progress)] == [("a#1", 1, None), ("a#1", 2, 3)]
        assert f.times(Ready, "a") == [0.0]


async def test_its_log_names_job_and_run(autojump_clock, tmp_path):
    async def talk(ctx: Context) -> None:
        ctx.log.info("hello", word=1)

    async with forest(tmp_path, {"a": job(talk, once=True)}) as f:
        await f.tree.wait_running()
        assert f.logs == [{"event": "hello", "word": 1, "job": "a", "run": "a#1", "log_level": "info"}]


def blocking() -> None:
    raise AssertionError("must not be called")


async def generating() -> Any:
    yield 1


async def needing(word: str) -> None:
    raise AssertionError("must not be called")


UNFIT = [
    ({"call": "no_such_module:f"}, "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"),
    ({"call": "json:no_such_function"}, "module json has no 'no_such_function'"),
    ({"call": "json:JSONDecoder.no.such"}, "module json has no 'JSONDecoder.no.such'"),
    ({"call": "json:__name__"}, "json:__name__ is not callable"),
    ({"call": "broken_on_import:f"}, "cannot import broken_on_import: ZeroDivisionError: division by zero"),
    ({"call": "exits_on_import:f"}, "cannot import exits_on_import: SystemExit: 4"),
    ({"call": "not_python:f"}, "cannot import not_python: SyntaxError: invalid syntax (not_python.py, line 1)"),
    ({"call": needing}, "TypeError: needing() missing 1 required positional argument: 'word'"),
    (
        {"call": blocking, "kind": "task"},
        'blocking: kind "task" runs an `async def`, this is a plain function: use kind = "thread"',
    ),
    ({"call": needing, "kind": "thread"}, 'needing: kind "thread" runs a plain function, this one is `async def`'),
    ({"call": generating}, "generating: what it yields would go nowhere: name the queue that gets it in `into`"),
    ({"call": Spy}, "Spy: a class: expected a function"),
]


@pytest.mark.parametrize(("keys", "reason"), UNFIT, ids=[reason[:40] for _, reason in UNFIT])
async def test_what_cannot_be_called_fails_that_job_alone_with_a_sentence(autojump_clock, tmp_path, keys, reason):
    (tmp_path / "broken_on_import.py").write_text("1 / 0")
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(4)")
    (tmp_path / "not_python.py").write_text("def")
    jobs = {"a": JobSpec(once=True, backoff=SIXTY, **keys), "b": job(serve)}
    async with forest(tmp_path, jobs) as f:
        await settle()
        assert f.words() == "a:backing off b:running"
        assert f.tree.status("a")[0].exit.reason == reason


@pytest.mark.parametrize(("call", "shown"), [("no_such_module:f", []), ("broken_on_import:f", [ZeroDivisionError])])
async def test_a_traceback_is_in_the_log_only_where_code_of_the_job_raised(autojump_clock, tmp_path, call, shown):
    (tmp_path / "broken_on_import.py").write_text("1 / 0")
    async with forest(tmp_path, {"a": JobSpec(once=True, backoff=SIXTY, call=call, kind="task")}) as f:
        await settle()
        assert f.word("a") == "backing off"
        assert [type(line["exc_info"]) for line in f.logs] == shown


async def test_a_module_that_has_been_mended_is_imported_by_the_next_start(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job("comes_later_to_the_task:f", backoff=SIXTY)}) as f:
        await settle()
        (tmp_path / "comes_later_to_the_task.py").write_text("import trio\nasync def f():\n    await trio.sleep_forever()\n")
        await f.tree.restart("a")
        assert f.word("a") == "running"
        assert f.times(Starting, "a") == [0.0, 0.0]


async def test_a_restart_says_that_code_which_runs_in_the_daemon_is_not_loaded_anew(tmp_path: Path) -> None:
    module = tmp_path / "stale_job.py"
    module.write_text("async def run():\n    import trio\n    await trio.sleep_forever()\n")
    config = {
        "daemon": {"path": [str(tmp_path)]},
        "jobs": {"job": {"call": "stale_job:run"}, "other": {"command": ["sleep", "1000"]}},
    }
    async with open_supervisor(config) as tree:
        await tree.wait_running()
        assert "changed" not in (await tree.order("restart", ["job"])[0].wait()).text
        os.utime(module, ns=(0, module.stat().st_mtime_ns + 1))
        answers = [await order.wait() for order in tree.order("restart", ["job", "other"], by="a test")]
        assert answers[0].ok and "stale_job.py has changed since the daemon loaded it" in answers[0].text
        assert "restart the daemon" in answers[0].text and "changed" not in answers[1].text
        (warned,) = (event for event in tree.journal.past(0)[1] if isinstance(event, Warned))
        assert warned.by == "a test" and warned.text.startswith("job: ")
