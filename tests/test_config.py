"""From TOML text to a Config: every fault with its place."""
# ruff: noqa: E501 - the messages are long, and stand here as they are read

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import config
from supervisor.config import Config, Plan
from supervisor.config.reading import dotted
from supervisor.config.toml_places import Places
from supervisor.errors import SpecError
from supervisor.kinds.job import JobSpec, for_worker
from supervisor.probes import Health, Ready
from supervisor.spec import Backoff, Bytes, Expanded, RestartType, Seconds, Strategy, shown

SECRET = "hunter2"
NUMBER = 7654321


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write a file in the current directory and load it, with a given environment."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, environ: dict[str, str] | None = None, **others: str) -> Config:
        Path("supervisor.toml").write_text(text)
        for name, content in others.items():
            Path(f"{name}.toml").write_text(content)
        return config.load(Path("supervisor.toml"), environ or {})

    return load


@pytest.fixture
def faults(load):
    """The faults of a text, a line each."""

    def faults(text: str, environ: dict[str, str] | None = None, **others: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load(text, environ, **others)
        return str(caught.value).splitlines()

    return faults


@pytest.fixture
def warnings(load):
    """The warnings of a text, a line each."""
    return lambda text, environ=None: [str(warning) for warning in load(text, environ).warnings]


def job(keys: str, name: str = "a", what: str = 'command = "true"') -> str:
    return f"[jobs.{name}]\n{what}\n{keys}\n"


# A good file


def test_a_file_becomes_typed_specs_in_its_order(load):
    loaded = load(
        """
        [daemon]
        grace = "1m"
        [log]
        level = "debug"
        [supervisors.web]
        strategy = "rest_for_one"
        children = ["b", "a"]
        [jobs.b]
        command = "serve --port '80 81'"
        restart = "transient"
        backoff = { initial = "250ms", factor = 3 }
        rotate = { size = "64KB" }
        success_exit_codes = [0, 3]
        start = "manual"
        [jobs.a]
        call = "jobs.beat:beat"
        args = { message = "alive", deep = [{ x = 1 }] }
        every = 5
        run_on_start = true
        """
    )
    b, a = loaded.jobs["b"], loaded.jobs["a"]
    assert list(loaded.jobs) == ["b", "a"] and loaded.parents == {"b": "web", "a": "web"}
    assert b.command == ("serve", "--port", "80 81") and b.restart is RestartType.TRANSIENT
    assert b.backoff == Backoff(initial=Seconds(0.25), factor=3.0) and b.rotate.size == Bytes(65536)
    assert b.success_exit_codes == (0, 3) and b.start == "manual"
    assert a.args == {"message": "alive", "deep": [{"x": 1}]} and a.every == Seconds(5) and a.run_on_start
    assert loaded.supervisors["web"].strategy is Strategy.REST_FOR_ONE
    assert loaded.daemon.grace == Seconds(60) and loaded.log.level == "debug"
    assert loaded.warnings == ()


def test_an_empty_file_has_no_jobs(load):
    assert load("").jobs == {}


def test_relative_paths_start_from_the_file_they_stand_in(load, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/more.toml").write_text(job('cwd = "work"\noutput = "out.log"\nready = { file = "up" }', "b"))
    loaded = load('[daemon]\ninclude = ["sub/*.toml"]\nstate_dir = "state"\n' + job('cwd = "/srv"\noutput = "null"'))
    assert loaded.jobs["b"].cwd == str(tmp_path / "sub/work")
    assert loaded.jobs["b"].output == str(tmp_path / "sub/out.log")
    assert loaded.jobs["b"].ready.file == str(tmp_path / "sub/up")
    assert (loaded.jobs["a"].cwd, loaded.jobs["a"].output) == ("/srv", "null")
    assert loaded.state_dir == tmp_path / "state"


def test_the_state_directory_of_systemd_is_taken_unless_the_file_names_one(load, tmp_path):
    assert load("", {"STATE_DIRECTORY": "/var/lib/s:/other"}).state_dir == Path("/var/lib/s")
    assert load('[daemon]\nstate_dir = "x"', {"STATE_DIRECTORY": "/var/lib/s"}).state_dir == tmp_path / "x"
    assert load("").state_dir == tmp_path / ".supervisor"


# Defaults


def test_defaults_reach_the_jobs_they_apply_to_and_no_others(load):
    loaded = load(
        """
        [defaults]
        restart = "permanent"
        grace = "3s"
        stop_signal = "INT"
        env = { A = "1", B = "2" }
        backoff = { max = "1m" }
        after = ["db"]
        [jobs.db]
        command = "db"
        env = { B = "3" }
        backoff = { initial = "1s" }
        [jobs.once]
        command = "x"
        once = true
        [jobs.tick]
        call = "m:f"
        every = "1s"
        grace = "4s"
        """
    )
    db, once, tick = (loaded.jobs[name] for name in ("db", "once", "tick"))
    assert db.restart is RestartType.PERMANENT and db.env == {"A": "1", "B": "3"} and db.after == ()
    assert db.backoff == Backoff(initial=Seconds(1), max=Seconds(60))
    assert once.restart is None and once.after == ("db",) and once.stop_signal == "INT"
    assert tick.restart is None and tick.grace == Seconds(4) and tick.env == {} and tick.stop_signal == "TERM"


def test_a_default_that_makes_no_sense_for_a_job_is_passed_over(load):
    loaded = load(
        """
        [defaults]
        kind = "thread"
        give_up = { failures = 1, within = 1 }
        ready = { log = "up" }
        once = true
        [supervisors.all]
        strategy = "one_for_all"
        children = ["grouped"]
        [jobs.grouped]
        call = "m:f"
        [jobs.command]
        command = "x"
        [jobs.tick]
        call = "m:f"
        every = 1
        """
    )
    grouped, command, tick = (loaded.jobs[name] for name in ("grouped", "command", "tick"))
    assert (grouped.kind, grouped.give_up, grouped.ready, grouped.once) == ("thread", None, None, True)
    assert command.kind is None and command.give_up is not None and command.ready.log == "up" and command.once
    assert not tick.once


def test_of_a_probe_in_defaults_and_ones_own_only_ones_own_counts(load):
    loaded = load(
        """
        [defaults]
        ready = { http = "http://h/", status = 204 }
        health = { tcp = "h:1", every = "5s", failures = 2 }
        [jobs.all]
        command = "x"
        [jobs.own]
        call = "m:f"
        ready = { unix = "/s" }
        health = { notify = true, failures = 4 }
        [jobs.tuned]
        command = "x"
        ready = { status = 200 }
        health = { every = "1s" }
        """
    )
    everyones, own, tuned = (loaded.jobs[name] for name in ("all", "own", "tuned"))
    assert everyones.ready == Ready(http="http://h/", status=204)
    assert everyones.health == Health(tcp="h:1", every=Seconds(5), failures=2)
    assert own.ready == Ready(unix="/s")
    assert own.health == Health(notify=True, every=Seconds(5), failures=4)
    assert tuned.ready == Ready(http="http://h/", status=200)
    assert tuned.health == Health(tcp="h:1", every=Seconds(1), failures=2)


def test_settings_of_health_in_defaults_ask_nothing_by_themselves(load):
    loaded = load('[defaults]\nhealth = { every = "5s" }\n' + job("") + job('health = { tcp = "h:1" }', "b"))
    assert loaded.jobs["a"].health is None
    assert loaded.jobs["b"].health == Health(tcp="h:1", every=Seconds(5))


def test_an_environment_with_the_names_of_probes_is_merged_like_any_other(load):
    loaded = load('[defaults]\nenv = { file = "1", http = "2" }\n' + job('env = { http = "3" }'))
    assert loaded.jobs["a"].env == {"file": "1", "http": "3"}


def test_paths_of_probes_belong_to_the_file(load, tmp_path):
    spec = load(job('ready = { unix = "run/s" }\nhealth = { file = "alive" }')).jobs["a"]
    assert (spec.ready.unix, spec.health.file) == (str(tmp_path / "run/s"), str(tmp_path / "alive"))


def test_a_fault_in_defaults_is_told_once(faults):
    text = '[defaults]\ngrace = "x"\nrestrat = 1\n' + job("", "a") + job("", "b")
    assert faults(text) == [
        'supervisor.toml:2:1: defaults.grace: expected a duration such as "250ms", "10s" or "1h30m", '
        'or a number of seconds, got "x"',
        'supervisor.toml:3:1: defaults.restrat: unknown key; did you mean "restart"?',
    ]


def test_a_default_that_does_not_fit_a_job_is_shown_where_it_stands(faults):
    assert faults("[defaults]\nsignificant = true\n" + job("")) == [
        "supervisor.toml:2:1: defaults.significant: a permanent child has no end that could count: "
        'use restart = "transient" or "temporary" (jobs.a)'
    ]


# Faults


def test_every_fault_is_told_in_one_pass_in_the_order_of_the_file(faults):
    text = """\
[jobs.api]
restrat = "permanent"
command = "uvicorn"
grace = "soon"
after = ["databse"]

[jobs.database]
command = "pg"
start = "automatic"

[supervisors.web]
children = ["api", "wrker"]
"""
    assert faults(text) == [
        'supervisor.toml:2:1: jobs.api.restrat: unknown key; did you mean "restart"?',
        'supervisor.toml:4:1: jobs.api.grace: expected a duration such as "250ms", "10s" or "1h30m", '
        'or a number of seconds, got "soon"',
        'supervisor.toml:5:10: jobs.api.after[0]: no job or supervisor "databse"; did you mean "database"?',
        'supervisor.toml:9:1: jobs.database.start: expected "auto" or "manual", got "automatic"; did you mean "auto"?',
        'supervisor.toml:12:20: supervisors.web.children[1]: no job or supervisor "wrker"',
    ]


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ("once = 1", "once: expected true or false, got 1"),
        ('once = "yes"', 'once: expected true or false, got "yes"'),
        ("description = 3", "description: expected a string, got 3"),
        ("after = 3", "after: expected a list of strings, got 3"),
        ("after = [3]", "after[0]: expected a string, got 3"),
        ("backoff = 3", "backoff: expected a table, got 3"),
        ("backoff = { factor = 0.5 }", "backoff.factor: expected at least 1, got 0.5"),
        ("backoff = { factor = nan }", "backoff.factor: expected a number that is finite and of a sensible size, got nan"),
        ("backoff = { jitter = 2 }", "backoff.jitter: expected at most 1, got 2"),
        ("backoff = { jitter = true }", "backoff.jitter: expected a number, got true"),
        ("success_exit_codes = [0, 1.5]", "success_exit_codes[1]: expected an integer, got 1.5"),
        ("success_exit_codes = [256]", "success_exit_codes[0]: expected an exit code from 0 to 255, got 256"),
        ("give_up = { failures = 3 }", 'give_up: "within" is missing: the time in which they are counted'),
        ("give_up = { failures = 0, within = 1 }", "give_up.failures: expected at least 1, got 0"),
        ("every = 0", "every: expected more than 0, got 0"),
        ("grace = -1", "grace: a duration cannot be negative, or longer than a thousand years, got -1"),
        ('rotate = { size = "10 bananas" }', 'rotate.size: expected a size such as "64KB" or "10MB", or a number of bytes, got "10 bananas"'),
        ('restart = "permanently"', 'restart: expected "permanent", "transient" or "temporary", got "permanently"; did you mean "permanent"?'),
        ('stop_signal = "SIGTERM"', 'stop_signal: expected "TERM", "INT", "QUIT", "HUP", "KILL", "USR1", "USR2" or "WINCH", got "SIGTERM"; did you mean "TERM"?'),
        ('description = "a\\u0000b"', "description: a string cannot contain the character NUL"),
        ("once = true\nevery = 1", "every: either `once` or `every`, not both"),
        ('every = 1\nrestart = "transient"', "restart: not on a job with `every`: the next run comes from the schedule: use retry"),
        ('once = true\nrestart = "permanent"', 'restart: a `once` job has an end: expected "transient" or "temporary", got "permanent"'),
        ('every = 1\nwatch = ["*.py"]', "watch: not on a job with `every`: each of its runs starts anew anyway"),
        ("recycle = {}", "recycle: expected `age`, `memory` or both"),
        ("recycle = { age = 0 }", "recycle.age: expected more than 0, got 0"),
        ("recycle = { runs = 5 }", "recycle.runs: only for a job with `queue`: a service has one run"),
        ('every = 1\nrecycle = { age = "1h" }', "recycle: only for a service or a queue: a run of this job ends by itself"),
        ("run_on_start = true", "run_on_start: only for a job with `every` or `cron`"),
        ("args = { x = 1 }", "args: only for a job with `call`, this job has `command`"),
        ('kind = "thread"', 'kind: kind "thread" needs `call`, this job has `command`'),
        ("ready = {}", "ready: expected exactly one probe, got none"),
        ('ready = { log = "x", file = "y" }', "ready: expected exactly one probe, got file and log"),
        ('ready = { log = "[" }', 'ready.log: expected a regular expression (unterminated character set at position 0), got "["'),
        ("ready = { status = 200 }", "ready: expected exactly one probe, got none"),
        ('ready = { tcp = "h:1", status = 200 }', "ready.status: only with `http`"),
        ('ready = { http = "http://h", status = 99 }', "ready.status: expected at least 200, got 99"),
        ('ready = { http = "h:80/x" }', 'ready.http: expected a URL such as "http://127.0.0.1:8080/health", got "h:80/x"'),
        ('ready = { http = "ftp://h/" }', 'ready.http: expected a URL such as "http://127.0.0.1:8080/health", got "ftp://h/"'),
        ('ready = { http = "http:///x" }', 'ready.http: expected a URL such as "http://127.0.0.1:8080/health", got "http:///x"'),
        ('ready = { http = "http://h:99999/" }', 'ready.http: expected a URL such as "http://127.0.0.1:8080/health", got "http://h:99999/"'),
        ('ready = { http = "http://u:p@h/" }', 'ready.http: expected a URL such as "http://127.0.0.1:8080/health", got "http://u:p@h/"'),
        ('ready = { http = "http://h/a b" }', 'ready.http: expected a URL such as "http://127.0.0.1:8080/health", got "http://h/a b"'),
        ('ready = { http = "http://h/\\r\\nX: y" }', 'ready.http: expected a URL such as "http://127.0.0.1:8080/health", got "http://h/\\r\\nX: y"'),
        ('ready = { tcp = "8080" }', 'ready.tcp: expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080", got "8080"'),
        ('ready = { tcp = ":8080" }', 'ready.tcp: expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080", got ":8080"'),
        ('ready = { tcp = "h:0" }', 'ready.tcp: expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080", got "h:0"'),
        ('ready = { tcp = "::1:80" }', 'ready.tcp: expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080", got "::1:80"'),
        ('ready = { tcp = "http://h:80" }', 'ready.tcp: expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080", got "http://h:80"'),
        ('ready = { unix = "/' + 107 * "x" + '" }', "ready.unix: the path of a socket has at most 107 bytes, with its directory"),
        ('ready = { call = "m.f" }', 'ready.call: expected "module:function", got "m.f"; did you mean "m:f"?'),
        ("ready = { exec = [] }", "ready.exec: the command is empty: expected a program and its arguments"),
        ("health = {}", "health: expected exactly one probe, got none"),
        ('health = { every = "5s" }', "health: expected exactly one probe, got none"),
        ("health = { notify = true, every = 0 }", "health.every: expected more than 0, got 0"),
        ("health = { notify = true, timeout = 0 }", "health.timeout: expected more than 0, got 0"),
        ("health = { notify = true, failures = 0 }", "health.failures: expected at least 1, got 0"),
        ("health = { notify = true, successes = 0 }", "health.successes: expected at least 1, got 0"),
        ('health = { log = "x" }', "health.log: unknown key"),
        ("significant = true", 'significant: a permanent child has no end that could count: use restart = "transient" or "temporary"'),
        ('significant = true\nrestart = "temporary"', 'significant: counts for nothing while auto_shutdown of [daemon] is "never"'),
        ('after = ["a"]', "after[0]: it cannot come after itself"),
        ('env = { "" = "x" }', 'env."": the name of an environment variable is not empty and has no "="'),
    ],
)  # fmt: skip
def test_a_fault_of_a_command_job_is_told_alone(faults, keys, fault):
    [line] = faults(job(keys))
    assert line.partition(" ")[2] == f"jobs.a.{fault}"
    assert line.startswith(("supervisor.toml:3:", "supervisor.toml:4:"))


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("", "jobs.a: what should it run? expected `command` or `call`"),
        ('command = "x"\ncall = "m:f"', "jobs.a.call: exactly one of `command` and `call`, not both"),
        ('command = ""', "jobs.a.command: the command is empty: expected a program and its arguments"),
        ("command = []", "jobs.a.command: the command is empty: expected a program and its arguments"),
        ("command = 3", "jobs.a.command: expected a string or a list of strings, got 3"),
        ("command = \"a 'b\"", 'jobs.a.command: unbalanced quotes: expected words as in a shell, got "a \'b"'),
        ('call = "jobs.beat.beat"', 'jobs.a.call: expected "module:function", got "jobs.beat.beat"; did you mean "jobs.beat:beat"?'),
        ('call = "m:f"\nkind = "command"', 'jobs.a.kind: kind "command" needs `command`, this job has `call`'),
        ('command = "a"\nkind = "process"', 'jobs.a.kind: kind "process" needs `call`, this job has `command`'),
        ('call = "m:f"\nenv = { A = "1" }', "jobs.a.env: only for a job with `command` or kind = \"process\""),
        ('call = "m:f"\nrecycle = { memory = "1GB" }', "jobs.a.recycle.memory: only for a job with `command` or kind = \"process\": the memory of other functions is the daemon's"),
        ('call = "m:f"\nwatch = ["*.py"]', "jobs.a.watch: only for a job with `command` or kind = \"process\": what runs inside the daemon is the code that it has loaded"),
        ('call = "m:f"\nready = { log = "x" }', "jobs.a.ready.log: only for a job with `command` or kind = \"process\": a function says `ctx.ready()`, with { notify = true }"),
        ('call = "m:f"\nready = { notify = false }', "jobs.a.ready.notify: expected true, got false"),
    ],
)  # fmt: skip
def test_what_a_job_runs_is_one_thing_that_makes_sense(faults, what, fault):
    [line] = faults(job("", what=what))
    assert line.partition(" ")[2] == fault


def test_globs_belong_to_the_file_they_stand_in_whose_place_is_taken_literally(tmp_path):
    base = tmp_path / "[a]*"
    (base / "jobs.d").mkdir(parents=True)
    (base / "supervisor.toml").write_text('[daemon]\ninclude = ["jobs.d/*.toml"]\n[defaults]\nwatch = ["*.py"]\n')
    (base / "jobs.d" / "x.toml").write_text(
        '[jobs.a]\ncommand = "x"\nwatch = ["src/**", "/etc/x"]\n[jobs.b]\ncommand = "x"\n[jobs.c]\ncommand = "x"\nevery = 1\n'
    )
    jobs = config.load(base / "supervisor.toml", {}).jobs
    literal = f"{tmp_path}/[[]a][*]"
    assert [jobs[name].watch for name in "abc"] == [(f"{literal}/jobs.d/src/**", "/etc/x"), (f"{literal}/*.py",), ()]


def test_a_job_that_is_no_table_is_one_fault(faults):
    assert faults('[jobs]\na = 3\n[supervisors.s]\nchildren = ["a"]') == [
        "supervisor.toml:2:1: jobs.a: expected a table, got 3"
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[job.a]", '1:2: job: unknown table; did you mean "jobs"?'),
        ("jobs = 3", "1:1: jobs: expected a table, got 3"),
        ("[http]", "1:2: http: not supported yet"),
        ("[hooks.mail]", "1:2: hooks: not supported yet"),
        ("[log]\nrotate = {}", "2:1: log.rotate: not supported yet"),
        (
            '[jobs."a b"]\ncommand = "x"',
            '1:7: jobs."a b": a name has only letters, digits, "-" and "_", and at most 64 of them',
        ),
    ],
)
def test_tables_and_names_that_are_not_known_are_refused(faults, text, fault):
    assert faults(text) == [f"supervisor.toml:{fault}"]


def test_what_is_not_built_yet_is_never_suggested(faults):
    assert faults("[log]\nrotat = {}") == ["supervisor.toml:2:1: log.rotat: unknown key"]


# The tree


def tree(*lines: str, **children: str) -> str:
    groups = "".join(f"[supervisors.{name}]\nchildren = {names.split()}\n" for name, names in children.items())
    return groups + "".join(job(after, name) for name, _, after in (line.partition(" ") for line in lines))


def messages(lines: list[str]) -> list[str]:
    return [line.partition(" ")[2] for line in lines]


def test_jobs_and_supervisors_share_one_namespace(faults):
    assert faults(tree("a", a="")) == [
        "supervisor.toml:1:14: supervisors.a: also the name of a job (supervisor.toml:3:7): "
        "jobs and supervisors share one namespace"
    ]


def test_a_child_has_one_parent(faults):
    assert faults(tree("a", x="a", y="a a")) == [
        'supervisor.toml:4:13: supervisors.y.children[0]: "a" is a child of "x" already (supervisor.toml:2:1): '
        "a child has one parent",
        'supervisor.toml:4:18: supervisors.y.children[1]: "a" is listed twice',
    ]


def test_a_cycle_in_the_tree_is_printed(faults):
    assert messages(faults(tree("a", x="y a", y="z", z="x"))) == [
        "supervisors.x.children: a cycle in the tree: x -> y -> z -> x"
    ]
    assert messages(faults(tree(x="x"))) == ["supervisors.x.children: a cycle in the tree: x -> x"]


def test_a_cycle_in_after_is_printed_once(faults):
    text = tree('a after = ["b"]', 'b after = ["c"]', 'c after = ["a"]', 'd after = ["a"]')
    assert faults(text) == ["supervisor.toml:3:10: jobs.a.after[0]: a cycle in `after`: a -> b -> c -> a"]


def test_two_cycles_in_after_are_two_faults(faults):
    text = tree('a after = ["b"]', 'b after = ["a"]', 'c after = ["d"]', 'd after = ["c"]')
    assert messages(faults(text)) == [
        "jobs.a.after[0]: a cycle in `after`: a -> b -> a",
        "jobs.c.after[0]: a cycle in `after`: c -> d -> c",
    ]


def test_a_cycle_that_appears_when_edges_are_lifted_to_the_supervisors_is_refused(faults):
    text = tree('a after = ["d"]', "b", 'c after = ["b"]', "d", x="a b", y="c d")
    assert messages(faults(text)) == ["jobs.a.after[0]: a cycle in `after`: x -> y -> x (a after d, c after b)"]


def test_list_order_under_rest_for_one_is_an_order(faults, load):
    text = tree('a after = ["b"]', "b", x="a b")
    assert load(text).parents == {"a": "x", "b": "x"}
    assert messages(faults(text.replace("[supervisors.x]", '[supervisors.x]\nstrategy = "rest_for_one"'))) == [
        "jobs.a.after[0]: a cycle in `after`: a -> b -> a (a after b, b is listed after a)"
    ]


def test_a_child_cannot_wait_for_its_supervisor_nor_a_supervisor_for_its_child(faults):
    assert messages(faults(tree('a after = ["x"]', x="y", y="a"))) == [
        'jobs.a.after[0]: "x" is its own supervisor, which is ready only when this one is'
    ]
    text = tree("a", x="a").replace("[supervisors.x]", '[supervisors.x]\nafter = ["a"]')
    assert messages(faults(text)) == ['supervisors.x.after[0]: "a" is below it, and starts only when it does']


def test_give_up_is_refused_where_the_group_fails_as_one(faults):
    text = tree("a give_up = { failures = 1, within = 1 }", x="a").replace(
        "[supervisors.x]", '[supervisors.x]\nstrategy = "one_for_all"'
    )
    assert messages(faults(text)) == [
        'jobs.a.give_up: not under one_for_all (supervisor "x"): there the group restarts, or fails, as one'
    ]


def test_significant_needs_a_supervisor_that_listens_and_a_child_that_ends(faults, load):
    keys = 'a significant = true\nrestart = "transient"'
    assert messages(faults(tree(keys, x="a"))) == [
        'jobs.a.significant: counts for nothing while auto_shutdown of [supervisors.x] is "never"'
    ]
    heard = tree(keys, x="a").replace("[supervisors.x]", '[supervisors.x]\nauto_shutdown = "any_significant"')
    assert load(heard).jobs["a"].significant
    assert messages(faults('[daemon]\nauto_shutdown = "any_significant"\n' + job("significant = true\nevery = 1"))) == [
        "jobs.a.significant: a schedule has no end that could count"
    ]


def test_workers_are_for_services_and_share_no_file(faults, load):
    assert messages(faults(job("workers = 2\nonce = true"))) == [
        "jobs.a.workers: only for a service: a job with `once` makes one run at a time"
    ]
    assert messages(faults(job("workers = 2\nevery = 1"))) == [
        'jobs.a.workers: a job with `every` makes one run at a time; overlap = "parallel" lets them run side by side'
    ]
    assert messages(faults(job("workers = 2\noutput = 'a.log'"))) == [
        "jobs.a.output: its workers would all write to this file: put {worker} into its name"
    ]
    assert messages(faults(job("workers = 2\nready = { file = 'up' }"))) == [
        "jobs.a.ready.file: its workers would all wait for this file: put {worker} into its name"
    ]
    for number in ("0", "1001", '"two"', "{ min = 1, max = 4 }"):
        assert len(faults(job(f"workers = {number}"))) == 1, number
    assert load(job("workers = 2\noutput = '{worker}.log'\nready = { file = 'up{worker}' }")).jobs["a"].workers == 2


SCHEDULES = [
    ("once = true\nevery = 1", "every: either `once` or `every`, not both"),
    ('once = true\ncron = "@daily"', "cron: either `once` or `cron`, not both"),
    ('every = 1\ncron = "@daily"', "cron: either `every` or `cron`, not both"),
    ('cron = "61 * * * *"', 'cron: expected five fields (minute hour day month weekday) such as "30 2 * * *", six with the '
     'seconds first, or a name such as "@daily": bad minute, got "61 * * * *"'),
    ('cron = "@reboot"', 'cron: there is no "@reboot": use `once = true`, or `run_on_start`, got "@reboot"'),
    ('cron = "@dayly"', 'cron: expected one of @hourly, @daily, @midnight, @weekly, @monthly, @yearly, @annually, got "@dayly"'),
    ('cron = "* * */20 * 1L"', 'cron: no such day in the next 50 years: expected times that come, got "* * */20 * 1L"'),
    ('cron = "@daily"\ntimezone = "Europe/Berln"', 'timezone: expected the name of a time zone such as "Europe/Berlin", "UTC" '
     'or "local"; did you mean "Europe/Berlin"?, got "Europe/Berln"'),
    ('every = 5\ntimezone = "Europe/Berlin"', "timezone: only for a job with `cron`"),
    ('timezone = "UTC"', "timezone: only for a job with `cron`"),
    ('overlap = "queue"', "overlap: only for a job with `every` or `cron`"),
    ('once = true\ncatch_up = "last"', "catch_up: only for a job with `every` or `cron`"),
    ("jitter = 1", "jitter: only for a job with `every` or `cron`"),
    ("every = 10\njitter = 10", "jitter: expected less than the shortest time between two runs (10s), got 10.0"),
    ('cron = "0,10 * * * *"\njitter = "10m"', 'jitter: expected less than the shortest time between two runs (10m), got 600.0'),
    ('every = 10\noverlap = "paralel"', 'overlap: expected "skip", "queue", "replace" or "parallel", got "paralel"; did you '
     'mean "parallel"?'),
    ('every = 10\noverlap = "parallel"', 'overlap: how many at once? "parallel" needs `workers`, at least 2'),
    ('cron = "@daily"\nworkers = 2', 'workers: a job with `cron` makes one run at a time; overlap = "parallel" lets them run '
     'side by side'),
    ('cron = "@daily"\nrestart = "transient"', "restart: not on a job with `cron`: the next run comes from the schedule: use "
     "retry"),
    ('cron = "@daily"\nwatch = ["*.py"]', "watch: not on a job with `cron`: each of its runs starts anew anyway"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "fault"), SCHEDULES)
def test_what_a_schedule_cannot_be_is_told_with_its_place_and_what_is_expected(faults, keys, fault):
    (told,) = faults(job(keys))
    assert told.partition(": ")[2] == f"jobs.a.{fault}"


def test_what_is_wrong_with_a_schedule_is_told_all_at_once(faults):
    assert len(faults(job('cron = "x"\ntimezone = "Mars"\noverlap = "no"\njitter = -1\ncatch_up = 1'))) == 5


def test_a_schedule_is_read(load):
    keys = 'cron = "${AT:-@daily}"\ntimezone = "local"\noverlap = "parallel"\nworkers = 2\njitter = "5m"\ncatch_up = "all"'
    spec = load(job(keys)).jobs["a"]
    assert (spec.cron, shown(spec.cron), spec.timezone, spec.jitter) == ("@daily", "${AT:-@daily}", "local", 300)
    assert (spec.overlap, spec.workers, spec.catch_up, spec.scheduled, spec.service) == ("parallel", 2, "all", True, False)


def test_defaults_of_schedules_are_for_schedules_alone(load):
    text = """
        [defaults]
        jitter = 1
        overlap = "queue"
        catch_up = "last"
        timezone = "Europe/Berlin"
        run_on_start = true
        restart = "transient"
        workers = 2
        [jobs.service]
        command = "x"
        [jobs.once]
        command = "x"
        once = true
        [jobs.every]
        command = "x"
        every = 10
        [jobs.cron]
        command = "x"
        cron = "@daily"
    """
    jobs = load(text).jobs
    assert {name: (spec.jitter, spec.overlap, spec.catch_up, spec.timezone, spec.workers) for name, spec in jobs.items()} == {
        "service": (0, "skip", "none", "UTC", 2),
        "once": (0, "skip", "none", "UTC", 1),
        "every": (1, "queue", "last", "UTC", 1),
        "cron": (1, "queue", "last", "Europe/Berlin", 1),
    }


def test_a_default_schedule_gives_way_to_one_of_the_jobs_own(load):
    jobs = load('[defaults]\nevery = 10\n[jobs.a]\ncommand = "x"\ncron = "@daily"\n[jobs.b]\ncommand = "x"\nonce = true').jobs
    assert (jobs["a"].every, jobs["a"].cron, jobs["b"].every) == (None, "@daily", None)


def test_default_workers_are_for_services_alone(load):
    text = '[defaults]\nworkers = 3\n[jobs.a]\ncommand = "x"\n[jobs.b]\ncommand = "x"\nonce = true'
    assert {name: spec.workers for name, spec in load(text).jobs.items()} == {"a": 3, "b": 1}


def test_the_number_of_a_worker_stands_in_every_text_and_an_expansion_stays_hidden(load):
    keys = "env = { A = '${A}{worker}', B = '{worker} {{worker}} {job} { worker }' }\ncwd = 'd{worker}'"
    spec = load(job(keys, what="command = ['x{worker}']"), {"A": "secret"}).jobs["a"]
    second = for_worker(spec, 1)
    assert (second.command, second.env["A"], second.env["B"]) == (("x1",), "secret1", "1 {1} {job} { worker }")
    assert second.cwd is not None and second.cwd.endswith("/d1")
    assert shown(second.env["A"]) == "${A}1"
    assert for_worker(second, 2) is second


def test_a_broken_key_does_not_lead_to_faults_that_are_only_its_consequence(faults):
    assert len(faults(job('restart = "x"\nsignificant = true'))) == 1
    assert len(faults(job("", what="comand = 'x'"))) == 1
    assert len(faults('[jobs.a]\nqueue = 1\ncommand = "x"\n[jobs.b]\ncommand = "x"\nafter = ["a"]')) == 1


# Warnings


@pytest.mark.parametrize(
    ("command", "mark"),
    [("a | b", "|"), ("a && b", "&&"), ("a > b", ">"), ("cat ~/x", "~"), ("echo $HOME", "$"), ('a "$X"', "$")],
)
def test_a_command_that_wants_a_shell_is_warned_about(warnings, command, mark):
    [warning] = warnings(job("", what=f"command = '{command}'"))
    assert warning == (
        f'supervisor.toml:2:1: warning: jobs.a.command: "{mark}" means nothing without a shell; '
        'if you want one, write ["sh", "-c", "..."]'
    )


@pytest.mark.parametrize("command", ["grep 'a|b'", 'grep "a|b>"', r"a \| b", "a${X}b $${y}", "cat a~b"])
def test_what_is_quoted_or_no_shell_word_is_not_warned_about(warnings, command):
    assert warnings(job("", what=f"command = '''{command}'''"), {"X": "$x"}) == []


def test_a_restart_limit_that_backoff_keeps_out_of_reach_is_warned_about_with_the_sum(warnings):
    slow = "backoff = { initial = 10, max = 20, jitter = 0 }"
    for text in (
        f"[supervisors.x]\nintensity = 4\nchildren = ['a']\n{job(slow)}",
        f"[supervisors.x]\nintensity = 4\nchildren = ['a']\nstrategy = 'one_for_all'\n{slow}\n{job('')}",
    ):
        assert warnings(text) == [
            "supervisor.toml:2:1: warning: supervisors.x.intensity: never reached: by backoff alone 5 restarts "
            "take at least 10 + 20 + 20 + 20 = 70 s, period is 60 s; lower intensity, or raise period"
        ]
        assert warnings(text.replace("intensity = 4", "intensity = 3")) == []
        assert warnings(text.replace("intensity = 4", "intensity = 4\nperiod = 70")) == []


def test_several_children_together_may_reach_a_limit_that_one_alone_does_not(warnings):
    text = "[supervisors.x]\nintensity = 4\nchildren = ['a', 'b']\n" + job("backoff = { initial = 10, max = 20, jitter = 0 }")
    assert warnings(text + job("", "b")) == []


def test_graces_that_do_not_fit_the_daemons_are_warned_about_with_the_sum(warnings):
    text = tree("db grace = 50", 'api grace = 20\nafter = ["db"]', 'web after = ["api"]', "other grace = 70")
    assert warnings(text) == []
    assert warnings(f"[daemon]\ngrace = 75\n{text}") == [
        "supervisor.toml:5:1: warning: jobs.db.grace: stopping web, then api, then db may take 10 + 20 + 50 = 80 s, "
        "more than the daemon's grace of 75 s"
    ]


def test_backoff_whose_longest_wait_is_shorter_than_the_first_is_warned_about(warnings):
    assert warnings(job("backoff = { max = 0.1 }")) == [
        "supervisor.toml:3:1: warning: jobs.a.backoff: max (0.1 s) is shorter than initial (0.5 s): every wait is max"
    ]


def test_a_misspelt_output_and_a_tilde_are_warned_about(warnings):
    assert messages(warnings(job('output = "captur"'))) == [
        'warning: jobs.a.output: a file of that name; did you mean "capture"?'
    ]
    assert messages(warnings(job('cwd = "~/x"'))) == [
        'warning: jobs.a.cwd: "~" is not expanded: there is no shell here; write "${HOME}"'
    ]


# The environment


def test_names_are_expanded_and_the_text_of_the_file_is_kept_for_showing(load):
    loaded = load(job('description = "of ${WHO} and ${NOBODY:-no one}, $${WHO}"'), {"WHO": "me"})
    description = loaded.jobs["a"].description
    assert description == "of me and no one, ${WHO}"
    assert shown(description) == "of ${WHO} and ${NOBODY:-no one}, $${WHO}"
    assert load(job('description = "${WHO:-no one}"'), {"WHO": ""}).jobs["a"].description == "no one"


def test_a_value_that_is_one_expansion_is_read_as_toml_where_the_key_is_no_string(load):
    text = job(
        'grace = "${GRACE}"\nonce = "${ONCE}"\nsuccess_exit_codes = "${CODES}"\ndescription = "${CODES}"\nstart_timeout = "${N}m"'
    )
    spec = load(text, {"GRACE": "5s", "ONCE": "true", "CODES": "[0, 2]", "N": "2"}).jobs["a"]
    assert (spec.grace, spec.once, spec.success_exit_codes, spec.start_timeout) == (5.0, True, (0, 2), 120.0)
    assert spec.description == "[0, 2]"
    args = (
        load(job('args = { n = "${N}", s = "${S}", t = "${T}" }', what='call = "m:f"'), {"N": "2", "S": "a b", "T": '"2"'})
        .jobs["a"]
        .args
    )
    assert args == {"n": 2, "s": "a b", "t": "2"}


def test_an_expansion_in_a_command_stays_one_word(load):
    spec = load(job("", what="command = \"prog --x=${X} ${Y:-a b} '$${Z}'\""), {"X": "1 2"}).jobs["a"]
    assert spec.command == ("prog", "--x=1 2", "a b", "${Z}")
    assert [shown(word) for word in spec.command] == ["prog", "--x=${X}", "${Y:-a b}", "$${Z}"]


def test_a_command_that_is_one_expansion_may_be_words_or_a_list(load):
    text = job("", what='command = "${CMD}"')
    words = load(text, {"CMD": "sleep '1 0'"}).jobs["a"].command
    assert words == ("sleep", "1 0") and [shown(word) for word in words] == ["${CMD}", ""]
    words = load(text, {"CMD": '["sleep", "1 0"]'}).jobs["a"].command
    assert words == ("sleep", "1 0") and all(isinstance(word, Expanded) and word.shown == "${CMD}" for word in words)


def test_a_name_that_is_not_set_is_a_fault(faults):
    assert faults(job('description = "${NO}"\ncwd = "${"')) == [
        "supervisor.toml:3:1: jobs.a.description: ${NO} is not set in the environment; a default is written ${NO:-default}",
        'supervisor.toml:4:1: jobs.a.cwd: expected "${NAME}" or "${NAME:-default}" after "${"; a literal one is written "$${"',
    ]


@pytest.mark.parametrize(
    "keys",
    [
        'grace = "${S}"', 'once = "${S}"', 'start = "${S}"', 'after = ["${S}"]', 'after = "${L}"', 'success_exit_codes = "${L}"',
        'rotate = { keep = "${S}" }', 'ready = { log = "(?P=${S})" }', 'after = "${N}"', 'backoff = "${K}"', 'call = "${S}"', 'cwd = "~${S}/${NO}"', 'command = "${Q}"', 'backoff = "${T}"',
        f"env = {{ A = {NUMBER}, B = ['{SECRET}'], C = '{SECRET}${{NO}}' }}", f"env = '{SECRET}'", f"env = ['{SECRET}']",
    ],
)  # fmt: skip
def test_no_fault_shows_a_value_of_env_or_of_the_environment(faults, keys):
    environ = {"S": SECRET, "L": f'["{SECRET}"]', "N": f"[{NUMBER}]", "Q": f"'{SECRET}"}
    environ |= {"T": f'{{ factor = "{SECRET}" }}', "K": f"{{ {SECRET} = 1 }}"}
    text = job(keys, what="" if keys.startswith(("command", "call")) else 'command = "x"')
    told = "\n".join(faults(text, environ))
    assert SECRET not in told and str(NUMBER) not in told


# Files


def test_included_files_are_merged_in_order(load):
    loaded = load('[daemon]\ninclude = ["[bc]*.toml"]\n' + job(""), b=job("", "b"), c=job('after = ["b"]', "c"))
    assert list(loaded.jobs) == ["a", "b", "c"]


def test_a_name_defined_twice_names_both_places(faults):
    assert faults('[daemon]\ninclude = ["b.toml"]\n' + job(""), b="\n" + job("")) == [
        "b.toml:2:7: jobs.a: defined twice; first at supervisor.toml:3:7"
    ]
    assert faults(job("") + job("", "b") + job("")) == [
        "supervisor.toml:7:7: jobs.a: defined twice; first at supervisor.toml:1:7"
    ]
    assert faults(job("once = true\nonce = true")) == [
        "supervisor.toml:4:1: jobs.a.once: defined twice; first at supervisor.toml:3:1"
    ]


def test_faults_in_included_files_are_placed_there(faults):
    lines = faults('[daemon]\ninclude = ["b.toml", "no.toml", "c.toml"]\n' + job("x = 1"), b=job("y = 1", "b"), c="[jobs")
    assert lines == [
        'supervisor.toml:2:1: daemon.include: no such file: "no.toml"',
        "supervisor.toml:5:1: jobs.a.x: unknown key",
        "b.toml:3:1: jobs.b.y: unknown key",
        "c.toml:1:6: not TOML: expected ']' at the end of a table declaration",
    ]


def test_a_file_that_two_globs_match_is_read_once(load):
    assert list(load('[daemon]\ninclude = ["b.toml", "*.toml"]', b=job("", "b")).jobs) == ["b"]


def test_names_that_a_broken_include_may_define_are_not_missed(faults):
    assert faults('[daemon]\ninclude = ["b.toml"]\n' + job('after = ["b"]'), b="[jobs.b") == [
        "b.toml:1:8: not TOML: expected ']' at the end of a table declaration"
    ]


def test_an_included_file_cannot_include(faults):
    assert faults('[daemon]\ninclude = ["b.toml"]', b='[daemon]\ninclude = ["c.toml"]') == [
        "b.toml:2:1: daemon.include: an included file cannot include others"
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[jobs.a\n", "1:8: not TOML: expected ']' at the end of a table declaration"),
        ("a = ", "1:5: not TOML: invalid value"),
        ('\n\na = "x', "3:7: not TOML: unterminated string"),
        ("[a]\nb = 1\n[[a]]\n", "3:4: not TOML: cannot overwrite a value"),
    ],
)
def test_syntax_errors_have_a_place(faults, text, fault):
    assert faults(text) == [f"supervisor.toml:{fault}"]


def test_a_file_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fault(content: bytes | None = None) -> str:
        path = Path("f.toml")
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SpecError) as caught:
            config.load(path, {})
        return str(caught.value)

    assert fault() == 'f.toml: no such file; "supervisor init" writes one to start with'
    assert fault(b"\xef\xbb\xbfa = 1") == "f.toml:1:1: a byte order mark: save the file as UTF-8 without one"
    assert fault("a = 1\nb = '\u00e9".encode() + b"\xff'") == "f.toml:2:7: not UTF-8: byte 0xff"
    assert fault(b"a = " + b"9" * 5000) == "f.toml: a number with too many digits"
    assert fault(b"a = " + b"[" * 5000) == "f.toml: nested too deeply"
    Path("f.toml").unlink()
    Path("f.toml").mkdir()
    assert fault() == "f.toml: a directory: expected a TOML file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path):
    path = tmp_path / "f.toml"
    path.write_text("")
    path.chmod(0)
    with pytest.raises(SpecError, match="permission denied"):
        config.load(path, {})


def test_a_mapping_is_checked_like_a_file_without_places(tmp_path):
    loaded = config.from_mapping({"jobs": {"a": {"command": ("x", "y"), "cwd": Path("w")}}}, tmp_path, {})
    assert loaded.jobs["a"].command == ("x", "y") and loaded.jobs["a"].cwd == str(tmp_path / "w") and loaded.file is None
    with pytest.raises(SpecError) as caught:
        config.from_mapping({"jobs": {"a": {"comand": 1}}}, tmp_path, {})
    assert str(caught.value) == 'jobs.a.comand: unknown key; did you mean "command"?'


# Reload


def plan(load, old: str, new: str) -> Plan:
    return config.diff(load(old), load(new))


def test_a_plan_of_nothing_is_empty(load):
    text = tree("a", "b", x="a")
    assert plan(load, text, text) == Plan()


def test_a_plan_names_what_is_added_removed_and_moved(load):
    result = plan(load, tree("a", "b", "c", x="a", y="b"), tree("a", "c", "d", x="", y="a"))
    assert result == Plan(added=("d",), removed=("b",), moved=("a",), changed=("x", "y"))


@pytest.mark.parametrize(
    "keys",
    [
        'command = "other"',
        'env = { A = "1" }',
        'cwd = "/"',
        'output = "null"',
        "rotate = { keep = 1 }",
        "once = true",
        "every = 1",
    ],
)
def test_a_changed_what_process_or_output_key_restarts_the_job(load, keys):
    what = "" if keys.startswith("command") else 'command = "true"'
    assert plan(load, tree("a", "b"), job(keys, what=what) + job("", "b")) == Plan(restarted=("a",))


@pytest.mark.parametrize(
    "keys",
    [
        'restart = "transient"', "backoff = { max = 1 }", "grace = 1", 'ready = { log = "x" }', "start_timeout = 1", 'after = ["b"]',
        'stop_signal = "INT"', "success_exit_codes = [1]", "essential = true", "give_up = { failures = 1, within = 1 }",
        'description = "x"', 'start = "manual"', "health = { notify = true }",
    ],
)  # fmt: skip
def test_everything_else_of_a_job_changes_live(load, keys):
    assert plan(load, tree("a", "b"), job(keys) + job("", "b")) == Plan(changed=("a",))


def test_a_changed_argument_restarts_the_job_also_where_python_calls_it_equal(load):
    was, now = (job(f"args = {{ x = {value} }}", what='call = "m:f"') for value in ("1", "true"))
    assert plan(load, was, now) == Plan(restarted=("a",))


def test_a_job_that_becomes_a_supervisor_is_removed_and_added(load):
    assert plan(load, job(""), "[supervisors.a]") == Plan(added=("a",), removed=("a",))


def test_what_needs_a_restart_of_the_daemon_is_a_note(load):
    result = plan(load, "", '[daemon]\nsocket = "x"\ngrace = 1\nname = "n"\n[log]\nlevel = "debug"\nfile = "l"')
    assert sorted(result.notes) == [
        "daemon.grace: changed live",
        "daemon.name: needs a restart of the daemon; the rest is applied",
        "daemon.socket: needs a restart of the daemon; the rest is applied",
        "log.file: needs a restart of the daemon; the rest is applied",
        "log.level: changed live",
    ]


def test_a_changed_environment_of_the_daemon_restarts_the_commands(load):
    text = job("") + job("", "c", 'call = "m:f"')
    assert plan(load, text, '[daemon]\nenv = { A = "1" }\n' + text) == Plan(restarted=("a",))


# Places


def paths_of(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_of(item, (*path, key))


TRICKY = """
a.b."c d".'e' = 1
[jobs.api]  # a [comment] = "x"
command = ["a", 'b#', \"\"\"x
"" \\\"\"" ] \"\"\", [1,{x=2, y.z=[3]}],
 # c ]
]
[jobs.api.backoff]
t = 1979-05-27 07:32:00 # x
e = '''a'b''c'''''
f = \"\"\"\"\"\"
"\\u0041\\"" = "\\\\"
[[x.y]]
q=1
[[x.y]]
[x.y.sub]
z={}
[[x.y.k]]
w = [ ]
[late]
[early.sub]
[early]
"""


def test_the_places_of_a_tricky_text_are_exactly_its_keys():
    places = Places(TRICKY)
    assert set(places.offsets) == set(paths_of(tomllib.loads(TRICKY)))
    assert places.find(("jobs", "api", "command", 3, 1, "y", "z")) == (5, 27)
    assert places.find(("x", "y", 1, "sub")) == (16, 6)
    assert places.find(("early",)) == (22, 2)
    assert places.find(("jobs", "api", "missing")) == (3, 7)
    assert places.find(("missing",)) == (1, 1)


keys = st.text(min_size=1, max_size=4) | st.from_regex(r"[A-Za-z0-9_-]{1,5}", fullmatch=True)
scalars = st.integers(-9, 9) | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=6)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def written_key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "a").replace("-", "a").isalnum() else written(key)


def written(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{written_key(key)} = {written(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ",\n # ]\n ".join(map(written, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(char):08x}" if char in '"\\' or not char.isprintable() else char for char in value) + '"'
    return str(value).lower()


@st.composite
def texts(draw) -> str:
    """TOML as people write it: headers, dotted keys, inline tables, arrays of tables, comments."""
    lines = []
    for key, value in draw(st.dictionaries(keys, values, max_size=4)).items():
        tables = value if isinstance(value, list) and value and all(isinstance(item, dict) for item in value) else None
        if tables is not None and draw(st.booleans()):
            for item in tables:
                lines += [
                    f"[[ {written_key(key)} ]] # x",
                    *(f"{written_key(name)} = {written(each)}" for name, each in item.items()),
                ]
        elif isinstance(value, dict) and value and draw(st.booleans()):
            lines.append(f"[{written_key(key)}]")
            for name, each in value.items():
                lines.append(f"{written_key(name)} . sub = {written(each)}")
        else:
            lines.insert(0, f"{written_key(key)} = {written(value)}")
    return "\n".join(lines)


@given(texts())
def test_the_places_of_any_text_are_exactly_its_keys(text):
    places = Places(text)
    assert set(places.offsets) == set(paths_of(tomllib.loads(text)))
    lines = text.split("\n")
    for path, _ in places.offsets.items():
        line, column = places.find(path)
        assert column <= len(lines[line - 1])
        if isinstance(path[-1], str):
            assert lines[line - 1][column - 1 :].startswith(written_key(path[-1]))


# Junk

words = st.sampled_from(
    ["jobs", "supervisors", "daemon", "log", "defaults", "a", "b", "${A}", "${", "${N:-3}", "1s", "m:f", "one_for_all", "transient", "x 'y", *JobSpec.__struct_fields__, "children", "strategy", "intensity", "include", "path", "file", "notify", "failures", "within"]
)  # fmt: skip
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | words | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(0, 2), inner, max_size=5),
    max_leaves=12,
)
good = st.sampled_from(
    [
        ("command", "x"), ("call", "m:f"), ("kind", "thread"), ("once", True), ("every", 1), ("restart", "transient"), ("after", ["a"]),
        ("after", ["b"]), ("significant", True), ("ready", {"log": "x"}), ("ready", {"file": "x"}), ("env", {"A": "1"}), ("args", {}),
        ("give_up", {"failures": 1, "within": 1}), ("backoff", {"max": 0}), ("run_on_start", True), ("output", "x"), ("grace", 1e9),
    ]
)  # fmt: skip
good_job = st.lists(good, max_size=6).map(dict)
job_like = good_job | st.dictionaries(st.sampled_from(JobSpec.__struct_fields__), junk, max_size=6)
names = st.lists(st.sampled_from("abcde"), max_size=3, unique=True)
group = st.fixed_dictionaries(
    {"children": names | junk},
    optional={
        "after": names | junk,
        "strategy": st.sampled_from([strategy.value for strategy in Strategy]) | junk,
        "intensity": st.integers(0, 200) | junk,
        "significant": st.booleans(),
        "restart": st.just("transient"),
        "auto_shutdown": st.just("any_significant"),
    },
)
tables = st.fixed_dictionaries(
    {},
    optional={
        "jobs": st.dictionaries(st.sampled_from("abcd") | words, job_like | junk, max_size=4),
        "supervisors": st.dictionaries(st.sampled_from("bcde") | words, group | junk, max_size=4),
        "defaults": job_like | junk,
        "daemon": st.just({"grace": 0, "intensity": 100}) | st.dictionaries(words, junk, max_size=3) | junk,
        "log": junk,
        "other": junk,
    },
)  # fmt: skip


@given(tables)
def test_junk_is_a_spec_error_or_a_config_and_nothing_else(mapping):
    try:
        assert isinstance(config.from_mapping(mapping, Path("/base"), {"A": "1", "N": ""}), Config)
    except SpecError as error:
        assert error.problems and all(str(problem) for problem in error.problems)


def test_each_truncation_of_a_valid_file_is_a_spec_error_or_a_config(tmp_path):
    path = tmp_path / "supervisor.toml"
    text = (
        tree('a after = ["b"]\nbackoff = { max = "1m" }', "b", x="a b") + '[defaults]\nenv = { A = "é" }\n[daemon]\ngrace = 3'
    )
    raw = text.encode()
    outcomes = set()
    for length in range(len(raw) + 1):
        path.write_bytes(raw[:length])
        try:
            outcomes.add(type(config.load(path, {})))
        except SpecError:
            outcomes.add(SpecError)
    assert outcomes == {Config, SpecError}


def test_a_path_is_written_as_toml_writes_it():
    assert dotted(("jobs", "a b", "after", 1, "é\n")) == 'jobs."a b".after[1]."é\\n"'
