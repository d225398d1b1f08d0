"""What every test here relies on: an async test that hangs fails with its tasks' stacks instead of hanging the run."""

from __future__ import annotations

import gc
import inspect
import os
import signal
import threading
import traceback
from contextlib import suppress
from functools import partial

import hypothesis
import pytest
import trio
from servers import database_files, postgres, postgres_alone, redis, redis_alone  # noqa: F401 (fixtures)

hypothesis.settings.register_profile("house", deadline=None, derandomize=True)  # a slow machine, or bad luck, fails no test
hypothesis.settings.load_profile("house")

CORE = f"{os.sep}trio{os.sep}_core{os.sep}"
LIMIT = 120.0
"""Real seconds for one async test; `@pytest.mark.limit(seconds)` gives a test more."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"limit(seconds): how long an async test may take in real time, if not {LIMIT:g} s")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&` makes us, and so every child, deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of a thousand children compiles the whole package again
    gc.disable()  # of what is made while tests are collected nothing is garbage, and looking for it takes a third of the time


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the tests themselves, half a million objects: no collection during a test goes through them
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if inspect.iscoroutinefunction(getattr(item, "obj", None)):
            mark = item.get_closest_marker("limit")
            item.add_marker(pytest.mark.trio(run=partial(run_watched, mark.args[0] if mark else LIMIT)), append=False)


def run_watched(seconds, test, *args, **options):
    """`trio.run`, but after so many real seconds (whatever the test's clock says) the test is cancelled and fails."""
    over = threading.Event()
    stacks: list[str] = []

    async def watched():
        token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:

            def bark() -> None:
                stacks.append(_stacks())
                scope.cancel(reason=f"the test took more than {seconds:g} s")

            def watch() -> None:
                if not over.wait(seconds):
                    with suppress(trio.RunFinishedError):
                        token.run_sync_soon(bark)

            threading.Thread(target=watch, name="test watchdog", daemon=True).start()
            try:
                return await test(*args)
            finally:
                over.set()

    result = trio.run(watched, **options)
    if stacks:
        pytest.fail(f"took more than {seconds:g} s; this is where its tasks were:\n{stacks[0]}", pytrace=False)
    return result


def _stacks() -> str:
    """Where every task of this run is, without Trio's own inside."""
    waiting = [trio.lowlevel.current_root_task()]
    lines = []
    while waiting:
        task = waiting.pop()
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        frames = traceback.StackSummary.extract(task.iter_await_frames())
        lines += [f"\n{task.name}\n", *traceback.format_list([frame for frame in frames if CORE not in frame.filename])]
    return "".join(lines)
