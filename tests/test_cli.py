import datetime
import json
import os
import pty
import signal
import subprocess
import sys

import click
import pytest
import trio
from click.testing import CliRunner
from control_serving import JOBS, peer, serving, until
from hypothesis import given
from hypothesis import strategies as st

from supervisor.cli import commands, quick, render
from supervisor.control.verbs import ALL, FOREIGN, LATER, VERBS
from supervisor.daemon.command import run_command
from supervisor.events import rfc3339
from supervisor.state import State

SUPERVISOR = [sys.executable, "-m", "supervisor"]
ENVIRON = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "SUPERVISOR_SOCKET")} | {
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) or os.getcwd()
}


async def run(path, *argv, code=0, **environ):
    """Run the command against the daemon at `path`; gives stdout and stderr."""
    env = ENVIRON | {"SUPERVISOR_SOCKET": path} | environ
    result = await trio.run_process([*SUPERVISOR, *argv], capture_stdout=True, capture_stderr=True, check=False, env=env)
    out, err = result.stdout.decode(), result.stderr.decode()
    assert result.returncode == code, (argv, out, err)
    return out, err


# ---------------------------------------------------------------- exit codes, and what is said


async def test_commands_say_one_line_for_each_name_and_end_with_the_codes_of_the_contract(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        out, _ = await run(path, "stop", "group", "manual")
        assert [line.split(":")[0] for line in out.splitlines()] == ["group", "manual"]
        out, _ = await run(path, "run-now", "slow", code=1)
        assert "service" in out
        _, err = await run(path, "start", "idel", code=4)
        assert "did you mean 'idle'" in err
        _, err = await run(path, "stop", code=2)
        assert "NAME" in err
        _, err = await run(path, "stop", "slow", "other", "--timeout", "50ms", code=75)
        assert "slow" in err
        out, _ = await run(path, "stop", "slow", "--now", "--json")
        (answer,) = json.loads(out)
        assert answer["name"] == "slow" and answer["ok"]
        out, _ = await run(path, "stop", "other", "--no-wait")
        _, err = await run(path, "reload", code=1)
        assert "not started from a file" in err


async def test_no_daemon_is_3_with_where_and_what_to_do(tmp_path):
    _, err = await run(str(tmp_path / "nothing"), "status", code=3)
    assert "supervisor run" in err and str(tmp_path / "nothing") in err


async def test_a_file_with_faults_prints_them_and_is_78(tmp_path):
    from supervisor.errors import Problem, SpecError

    async def reload(*, plan, by):
        raise SpecError([Problem("x.toml", line, 1, "jobs.api.restrat", "unknown key") for line in (1, 2)])

    async with serving(tmp_path, reload=reload) as (_, path):
        _, err = await run(path, "reload", code=78)
        assert err.splitlines() == ["x.toml:1:1: jobs.api.restrat: unknown key", "x.toml:2:1: jobs.api.restrat: unknown key"]


async def test_a_plan_is_shown_by_name(tmp_path):
    from supervisor.config import Plan

    async def reload(*, plan, by):
        return Plan(added=("new",), restarted=("a", "b"), notes=("socket needs a restart of the daemon",)), ()

    async with serving(tmp_path, reload=reload) as (_, path):
        out, _ = await run(path, "reload", "--plan")
        assert out.splitlines() == ["would add: new", "would restart: a, b", "socket needs a restart of the daemon"]


async def test_status_is_5_where_a_wanted_job_is_not_well_and_only_then(tmp_path):
    jobs = {
        "good": JOBS["idle"],
        "bad": {"call": "control_jobs:broken", "once": True, "restart": "temporary"},
        "manual": JOBS["manual"],
    }
    async with serving(tmp_path, jobs, {}) as (tree, path):
        await until(tree, lambda table: table["bad"].word == "failed" and table["good"].state is State.RUNNING)
        await run(path, "status", code=5)
        await run(path, "status", "good", "manual")
        await run(path, "status", "b*", code=5)
        out, _ = await run(path, "status", "--json", code=5)
        assert {row["name"]: row["word"] for row in json.loads(out)}["bad"] == "failed"
        await run(path, "stop", "bad", code=0)
        await run(path, "status", code=0)


@pytest.mark.parametrize(("word", "ours"), FOREIGN.items())
def test_the_words_of_other_supervisors_answer_with_ours(word, ours):
    result = CliRunner().invoke(commands.cli, [word, "-f", "x"])
    assert result.exit_code == 2 and f"supervisor {ours}" in result.stderr
    assert ours.split()[0] in commands.cli.list_commands(click.Context(commands.cli))


@pytest.mark.parametrize("word", LATER)
def test_verbs_that_are_not_built_say_so(word):
    result = CliRunner().invoke(commands.cli, [word, "--any", "thing"])
    assert result.exit_code == 1 and "not supported yet" in result.stderr


def test_a_misspelt_command_or_option_is_answered_with_a_near_one():
    assert "'status'" in CliRunner().invoke(commands.cli, ["statsu"]).stderr
    assert "--timeout" in CliRunner().invoke(commands.cli, ["stop", "--timeuot", "1"]).stderr


def test_every_verb_has_a_command_whose_help_explains_each_param():
    listed = CliRunner().invoke(commands.cli, ["--help"]).stdout
    for verb in ALL:
        result = CliRunner().invoke(commands.cli, [*verb.spoken.split(" "), "--help"])
        if not verb.command:
            assert result.exit_code == 2 and f"  {verb.spoken}" not in listed
            continue
        assert result.exit_code == 0
        text = " ".join(result.stdout.split())
        assert all(param.option in text for param in verb.params if not param.positional)
        assert verb.hidden or f"  {verb.spoken}" in listed


def test_the_commands_of_other_rooms_are_listed_without_being_imported():
    listed = CliRunner().invoke(commands.cli, ["--help"]).stdout
    assert all(f"  {name}" in listed for name in commands.LOADED)


# ---------------------------------------------------------------- the quick way and click's


def words(verb):
    """Command lines for a verb, good and bad."""
    spelled = st.sampled_from(
        [param.option for param in verb.params if not param.positional] + ["--json", "--no-wait", "-f", "-n", "--nope", "--"]
    )
    values = st.sampled_from(["5", "0", "-1", "1h30m", "10s", "x", "", "nan", "1e3", "2.5", "HUP", "api", "web-*", "--now"])
    return st.lists(spelled | values, max_size=5).map(lambda rest: [*verb.spoken.split(" "), *rest])


@given(st.sampled_from(ALL).flatmap(words))
def test_what_is_read_quickly_is_what_click_reads(argv):
    if (found := quick.parse(argv)) is None:
        return
    verb, values, socket, as_json = found
    command = commands.control_command(verb)
    context = command.make_context(verb.name, argv[len(verb.spoken.split(" ")) :])
    assert context.params == values | {"as_json": as_json, "socket": socket}


@given(st.lists(st.sampled_from(["-c", "--config", "--only", "x.toml", "-h", "", "--"]), max_size=3))
def test_the_file_of_a_plain_run_is_read_quickly_as_click_reads_it(words):
    if (file := quick.file_to_run(["run", *words])) is not None:
        context = run_command.make_context("run", list(words))
        assert context.params == {"path": file, "only": (), "names": ()}


@pytest.mark.parametrize("argv", [["run"], ["run", "-c", "a.toml"], ["run", "--config", "a.toml"]])
def test_a_plain_run_needs_no_click(argv):
    assert quick.file_to_run(argv) in ("supervisor.toml", "a.toml")


@pytest.mark.parametrize(
    "argv",
    [
        ["status"],
        ["--socket", "/s", "status", "--json", "api"],
        ["stop", "a", "b", "--now", "--no-wait"],
        ["start", "--with-after", "a", "--timeout", "1h30m"],
        ["signal", "api", "HUP", "--group"],
        ["logs", "-f", "-n", "7"],
        ["events", "--since", "12", "-f", "--json"],
        ["reload", "--plan"],
        ["shutdown"],
        ["queue", "ls"],
        ["queue", "dead", "images", "-n", "5", "--json"],
        ["submit", "images", '{"path": "a.jpg"}', "--delay", "10s", "--result"],
        ["submit", "images", "@many.jsonl"],
    ],
)
def test_what_people_type_every_day_is_read_quickly(argv):
    assert quick.parse(argv) is not None


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["stop"],
        ["run"],
        ["status", "-h"],
        ["signal", "api"],
        ["logs", "-n", "x"],
        ["version", "a"],
        ["queue"],
        ["queue", "nosuch"],
        ["queue.ls"],
        ["queue", "purge", "images"],
        ["submit", "images", "-"],
        ["submit", "images", "1", "--id", "a"],
    ],
)
def test_what_is_not_plain_is_left_to_click(argv):
    assert quick.parse(argv) is None


@pytest.mark.parametrize(("text", "expected"), [("5", 5), ("0.5", 0.5), ("250ms", 0.25), ("1h30m", 5400), ("1d", 86400)])
def test_times_are_read_as_in_the_file(text, expected):
    from supervisor.spec import Seconds

    assert quick.seconds(text) == expected
    assert text.replace(".", "").isdecimal() or Seconds.parse(text) == expected


@pytest.mark.parametrize("text", ["", "x", "5x", "-1", "nan", "inf", "1h30", "ms", "1..5s", "h1"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError):
        quick.seconds(text)


# ---------------------------------------------------------------- streams, terminals, pipes


async def test_events_are_lines_for_people_or_json_lines(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        out, _ = await run(path, "events", "--since", "2")
        assert len(out.splitlines()) == tree.journal.seq - 2
        out, _ = await run(path, "events", "--json")
        assert [json.loads(line)["seq"] for line in out.splitlines()] == list(range(1, tree.journal.seq + 1))


async def test_following_shows_what_happens_as_it_happens_and_ctrl_c_ends_it_quietly_with_130(tmp_path):
    async with serving(tmp_path) as (tree, path), peer(path) as other:
        await tree.wait_running()
        env = ENVIRON | {"SUPERVISOR_SOCKET": path}
        seq = str(tree.journal.seq)
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                lambda task_status: trio.run_process(
                    [*SUPERVISOR, "events", "-f", "--since", seq, "--json"],
                    stdout=subprocess.PIPE,
                    capture_stderr=True,
                    check=False,
                    env=env,
                    task_status=task_status,
                )
            )
            await other.ask("stop", {"names": ["idle"]})
            seen = b""
            while b'"stopping"' not in seen:
                seen += await process.stdout.receive_some()
            process.send_signal(signal.SIGINT)
            await process.wait()
        assert process.returncode == 130


async def test_ctrl_c_ends_a_wait_with_130_and_leaves_the_order(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        process = await trio.lowlevel.open_process(
            [*SUPERVISOR, "stop", "slow"], env=ENVIRON | {"SUPERVISOR_SOCKET": path}, stderr=subprocess.PIPE
        )
        await until(tree, lambda table: table["slow"].state is State.STOPPING)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert await process.stderr.receive_some() == b""
        await process.stderr.aclose()
        assert tree.journal.table["slow"].state is State.STOPPING


DEAF = """
import _thread, sys, threading
from supervisor.__main__ import main

def note():
    sys.stdin.readline()
    _thread.interrupt_main()

threading.Thread(target=note, daemon=True).start()
main()
"""
"""The command, in which a line on stdin does what a SIGINT does that comes just before the system call that waits: it is
noted, and interrupts nothing."""


@pytest.mark.parametrize("words", [["events", "-f", "--since", "0"], ["stop", "slow"]])
async def test_ctrl_c_in_the_moment_before_a_wait_is_not_lost(tmp_path, words):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", DEAF, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRON | {"SUPERVISOR_SOCKET": path},
        )
        try:
            if words[0] == "stop":
                await until(tree, lambda table: table["slow"].state is State.STOPPING)
            else:
                await process.stdout.receive_some()
            await process.stdin.send_all(b"now\n")
            assert await process.wait() == 130
        finally:
            process.kill()
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


async def test_a_reader_that_has_had_enough_is_no_error(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        command = f"{' '.join(SUPERVISOR)} events --json; echo $? >&2"
        result = await trio.run_process(
            ["sh", "-c", f"( {command} ) | true"], capture_stderr=True, env=ENVIRON | {"SUPERVISOR_SOCKET": path}
        )
        assert result.stderr.decode().split() == ["0"]


async def test_logs_name_their_job_unless_only_one_was_asked_for(tmp_path):
    jobs = {"talker": {"command": ["sh", "-c", "echo hello"], "once": True}, "other": JOBS["idle"]}
    async with serving(tmp_path, jobs, {}) as (tree, path):
        await tree.wait_running()
        assert (await run(path, "logs", "talker"))[0] == "hello\n"
        assert (await run(path, "logs"))[0] == "talker | hello\n"
        out, _ = await run(path, "logs", "--json")
        assert json.loads(out) == {"name": "talker", "line": "hello"}
        out, err = await run(path, "logs", "other")
        assert out == "" and "in the daemon's own log" in err


async def test_tables_are_coloured_on_a_terminal_and_plain_in_a_pipe(tmp_path):
    def on_terminal(path, **environ):
        leader, follower = pty.openpty()
        env = ENVIRON | {"SUPERVISOR_SOCKET": path, "TERM": "xterm"} | environ
        subprocess.run([*SUPERVISOR, "status"], stdout=follower, env=env, check=True)
        os.close(follower)
        shown = os.read(leader, 1 << 16).decode()
        os.close(leader)
        return shown

    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        plain, _ = await run(path, "status")
        assert "\x1b" not in plain and "idle" in plain
        assert "\x1b[32m" in await trio.to_thread.run_sync(on_terminal, path)
        assert "\x1b" not in await trio.to_thread.run_sync(lambda: on_terminal(path, NO_COLOR="1"))


async def test_shutdown_ends_with_0_when_the_daemon_is_gone(tmp_path):
    async with serving(tmp_path, {"idle": JOBS["idle"]}, {}) as (tree, path):
        with trio.CancelScope(shield=True):
            out, _ = await run(path, "shutdown")
        assert "stopped" in out and tree.journal.table["idle"].state is State.STOPPED


async def test_names_are_completed_from_the_running_daemon(tmp_path):
    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        out, _ = await run(
            path, _SUPERVISOR_COMPLETE="bash_complete", COMP_WORDS="supervisor restart id", COMP_CWORD="2", code=0
        )
        assert out.split() == ["plain,idle"]
        out, _ = await run(path, _SUPERVISOR_COMPLETE="bash_complete", COMP_WORDS="supervisor res", COMP_CWORD="1", code=0)
        assert [line.split(",")[1] for line in out.splitlines()] == ["restart", "resume"]
    out, _ = await run(path, _SUPERVISOR_COMPLETE="bash_complete", COMP_WORDS="supervisor restart id", COMP_CWORD="2", code=0)
    assert out.strip() == ""


# ---------------------------------------------------------------- rendering


def row(name, **changes):
    found = {
        "name": name, "kind": "command", "supervisor": None, "state": "running", "word": "running", "goal": "up",
        "cause": "started", "ready": True, "healthy": None, "pid": 7, "restarts": 0, "since": "2026-01-02T03:04:05.678Z",
        "next_at": None, "exit": None,
    }  # fmt: skip
    return found | changes


def test_rows_are_shown_below_their_supervisor_with_room_for_every_cell():
    rows = [
        row("leaf", supervisor="web"),
        row("web", kind="supervisor", pid=None),
        row("alone", word="backing off", restarts=12),
    ]
    lines = list(render.table(rows, colour=False, width=0))
    assert [line.split()[0] for line in lines] == ["NAME", "web", "leaf", "alone"]
    assert lines[2].startswith("  leaf")
    assert len({line.index("running") for line in lines[1:3]}) == 1
    assert "NEXT" not in lines[0]


def test_a_row_whose_supervisor_was_not_asked_for_stands_by_itself():
    assert [(depth, found["name"]) for depth, found in render.shape([row("leaf", supervisor="web")])] == [(0, "leaf")]


def test_memory_and_cpu_are_shown_where_they_were_asked_for():
    rows = [row("api", memory=3 << 20, cpu=0.254), row("task", memory=None, cpu=None), row("old", memory=2 << 30, cpu=7300)]
    head, *lines = render.table(rows, colour=False, width=0)
    assert head.split()[-3:] == ["MEMORY", "CPU", "CAUSE"] and "MEMORY" not in next(iter(render.table([row("api")], False, 0)))
    assert [" ".join(line.split()[6:]) for line in lines] == ["3.0MB 0.25s started", "- - started", "2.0GB 2h 1m started"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (999, "999B"), (1000, "1.0KB"), (10200, "10KB"), (1023 << 10, "1.0MB"), (5 << 40, "5.0TB")]
)
def test_sizes_are_said_in_three_digits(count, text):
    assert render.size(count) == text


def test_the_next_run_is_shown_where_there_is_one(monkeypatch):
    monkeypatch.setattr(render, "_now", lambda: render.epoch("2026-01-02T03:05:05.678Z"))
    (head, line) = render.table([row("nightly", next_at="2026-01-02T05:05:05.678Z")], colour=False, width=0)
    assert "NEXT" in head and "in 2h 0m" in line and "1m 0s" in line


def test_a_long_cause_is_cut_on_a_terminal_and_never_in_a_pipe():
    rows = [row("api", cause="x" * 500)]
    assert len(list(render.table(rows, colour=False, width=80))[1]) == 80
    assert "x" * 500 in list(render.table(rows, colour=False, width=0))[1]


def test_a_tree_is_drawn_with_lines():
    branches = [
        {"status": row("web", kind="supervisor"), "children": [{"status": row("api"), "children": []}]},
        {"status": row("last"), "children": []},
    ]
    assert [line.split()[:2] for line in render.tree(branches, colour=False)] == [["├─", "web"], ["│", "└─"], ["└─", "last"]]


@given(st.datetimes(min_value=datetime.datetime(1970, 1, 1), max_value=datetime.datetime(2200, 1, 1)))
def test_moments_are_read_as_calendars_have_them(moment):
    moment = moment.replace(tzinfo=datetime.UTC)
    assert render.epoch(rfc3339(moment)) == pytest.approx(moment.timestamp(), abs=0.002)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0s"), (59.9, "59s"), (60, "1m 0s"), (3600 * 3 + 240, "3h 4m"), (86400 * 5 + 3600 * 6, "5d 6h")]
)
def test_spans_are_said_as_people_say_them(seconds, text):
    assert render.span(seconds) == text


@given(st.text())
def test_nothing_that_a_terminal_would_obey_gets_through(text):
    assert render.clean(text).isprintable()


_text = st.text(max_size=9)
_events = st.fixed_dictionaries(
    {"event": _text, "seq": st.integers(0, 9), "at": st.just("2026-01-02T03:04:05.678Z")},
    optional={
        "name": _text,
        "cause": _text,
        "by": st.none() | _text,
        "names": st.lists(_text),
        "later": st.none() | st.integers() | st.floats() | st.lists(st.integers()) | st.dictionaries(st.text(), st.integers()),
    },
)


@given(_events)
def test_an_event_of_a_newer_daemon_is_shown_all_the_same(item):
    assert item["event"] == "lagged" or render.event(item, colour=False).isprintable()


def test_verbs_are_named_as_the_contract_names_them():
    assert set(VERBS) >= {
        "status",
        "tree",
        "start",
        "stop",
        "restart",
        "reload",
        "signal",
        "run-now",
        "pause",
        "resume",
        "cancel",
    }
