"""The rules of the house that a machine can see. An exception to one is named here, with its reason."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "supervisor"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the dotted name it is made by."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def offenders(pattern: str, allowed: dict[str, str]) -> list[str]:
    """Calls by a name that matches, outside the places where it is allowed."""
    return [
        f"{file}:{call.lineno}: {name}"
        for file, tree in SOURCES.items()
        if file not in allowed
        for name, call in calls(tree)
        if re.fullmatch(pattern, name)
    ]


def test_who_may_import_whom():
    """The `layers` contract of pyproject.toml."""
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


WALL_CLOCK = {
    "events/timestamps.py": "the one place that says what time it is",
    "wall.py": "the clock that `cron` goes by",
    "tree/supervisor.py": "next_at: a moment of Trio's clock, for people",
    "nodes/schedule.py": "ticks of `cron`",
    "nodes/alarm.py": "the same",
    "config/rules.py": "whether there is a time that `cron` names",
    "cli/author.py": "the next runs that `check` shows",
    "stalls.py": "no wall clock: the processor time of a thread",
    "log.py": "the console shows a person's own time",
    "cli/render.py": "the same, in tables",
    "output/files.py": "how old a file is",
    "queues/sqlite.py": "moments of items, which outlive the daemon",
    "queues/protocol.py": "ids of items sort by when they were made",
    "queues/memory.py": "moments of items, for people",
}


def test_the_wall_clock_is_read_only_to_show_people():
    assert offenders(r"(.*\.)?(now|utcnow|today|localtime|gmtime|strftime)|time\.(time(_ns)?|clock_gettime)", WALL_CLOCK) == []


def test_nothing_blocks_by_sleeping():
    assert offenders(r"(time\.)?sleep", {}) == []


def test_no_child_is_waited_for_but_by_its_own_pid():
    """waitpid(-1) steals the exit codes of children that others wait for."""
    strangers = [
        f"{file}:{call.lineno}"
        for file, tree in SOURCES.items()
        for name, call in calls(tree)
        if name in ("os.wait", "os.wait3") or (name in ("os.waitpid", "os.wait4") and ast.unparse(call.args[0]) in ("-1", "0"))
    ]
    assert strangers == []


def test_children_are_started_without_python_between_fork_and_exec():
    used = [
        f"{file}:{call.lineno}"
        for file, tree in SOURCES.items()
        for _, call in calls(tree)
        if any(keyword.arg == "preexec_fn" for keyword in call.keywords)
    ]
    assert used == []


def test_every_cancel_says_why():
    """`Cancelled` then carries the reason, which a log can show."""
    silent = [
        f"{file}:{call.lineno}: {name}"
        for file, tree in SOURCES.items()
        for name, call in calls(tree)
        if re.fullmatch(r".*(scope|_hurry|_loading|body|waiting)\.cancel", name)
        and not any(keyword.arg == "reason" for keyword in call.keywords)
    ]
    assert silent == []


def test_cancellation_is_never_swallowed():
    """A handler of BaseException, or a bare one, raises again or hands the exception on; only a named boundary may not."""
    boundaries = {
        "children/spawner.py": "the spawner's thread hands what it caught to the one that waits for it, which raises it",
        "kinds/inspection.py": "a process of its own that only reports what an import did",
        "store.py": "the writer's thread hands what it caught to the one that waits for it, which raises it",
        "nodes/attempts.py": "the boundary of one attempt: `_stopped` raises again what is not the job's own",
        "kinds/asyncio_loop.py": "a call in a loop hands what it caught to the one that waits for it, in Trio's thread",
        "kinds/process_worker.py": "a process of its own that reports what a call raised, and ends",
        "nodes/pool.py": "the boundary of one call: `_fenced` raises again what is not the job's own",
        "nodes/job.py": "the run boundary: `stopped_at_fence` raises again what is not the job's own",
    }
    swallowing = [
        f"{file}:{handler.lineno}"
        for file, tree in SOURCES.items()
        if file not in boundaries
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or ast.unparse(handler.type) in ("BaseException", "trio.Cancelled"))
        and not any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    ]
    assert swallowing == []


def test_structlog_is_not_used_in_the_way_that_needs_asyncio():
    assert offenders(r".*log(ger)?\.(a(debug|info|warning|warn|error|critical|exception|fatal|log))", {}) == []


def test_importing_a_room_does_nothing():
    """At module level there are definitions and constants; what acts is a function that somebody calls."""
    acting = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in SOURCES.items()
        for node in tree.body
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ]
    assert acting == []


def test_no_room_is_a_lumber_room():
    lumber = {"utils", "util", "helpers", "common", "base", "manager", "misc"}
    assert [file for file in SOURCES if Path(file).stem in lumber] == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_pins_are_exact_and_hashed_and_carry_no_url(name):
    text = (ROOT / name).read_text()
    assert "://" not in text and "file:" not in text
    entries = text.replace("\\\n", " ").splitlines()
    assert all(re.match(r"[\w.-]+==\S+", entry) and "--hash=sha256:" in entry for entry in entries)
    assert any(entry.startswith("hatchling==") for entry in entries)  # the editable install is not isolated: it must be there


def test_the_readme_has_the_two_commands_each_on_one_line():
    readme = (ROOT / "README.md").read_text()
    for name, end in (("run", ".venv/bin/supervisor run"), ("test", ".venv/bin/python -m pytest")):
        (command,) = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*)\n```\n", readme)
        assert command.startswith("python3 -m venv .venv && ") and command.endswith(f" && {end}")
