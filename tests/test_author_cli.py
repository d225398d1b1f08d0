"""check, init, explain and schema, as a person types them."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from supervisor import config
from supervisor.children.cgroup import expected
from supervisor.cli import author
from supervisor.config import later, schema
from supervisor.kinds.job import JobSpec

FIVE_FAULTS = """\
[jobs.api]
command = "true"
restrat = "permanent"
grace = "soon"
after = ["databse"]
queue = 3
start = "automatic"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(command, *args: str, text: str | None = None) -> Result:
        if text is not None:
            Path("supervisor.toml").write_text(text)
        result = CliRunner().invoke(command, args)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


# check


def test_check_prints_five_faults_in_five_lines_with_places_and_exits_78(run):
    result = run(author.check, text=FIVE_FAULTS)
    assert result.exit_code == 78
    lines = result.output.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"supervisor.toml:{line}:{column}" for line, column in [(3, 1), (4, 1), (5, 10), (6, 1), (7, 1)]
    ]
    assert lines[0] == 'supervisor.toml:3:1: jobs.api.restrat: unknown key; did you mean "restart"?'


def test_check_prints_the_tree_it_would_run(run):
    text = """
    [supervisors.web]
    strategy = "one_for_all"
    children = ["api", "inner"]
    after = ["migrate"]
    [supervisors.inner]
    children = ["tick"]
    [jobs.api]
    command = "true"
    description = "answers"
    start = "manual"
    [jobs.tick]
    call = "jobs:tick"
    every = "1h"
    [jobs.migrate]
    command = "true"
    once = true
    """
    Path("jobs.py").write_text("async def tick(): ...")
    result = run(author.check, text=text)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "supervisor.toml: no faults; 3 jobs, 2 supervisors",
        "  web       one_for_all, at most 5 restarts in 1m, after migrate",
        "    api     command, service, started by hand  # answers",
        "    inner   one_for_one",
        "      tick  task, every 1h",
        "  migrate   command, once",
        expected(),
    ]


def test_check_says_of_a_queue_job_whose_items_it_handles(run):
    result = run(author.check, text='[queues.mails]\n[jobs.send]\ncommand = "/bin/cat"\nqueue = "mails"\n')
    assert result.exit_code == 0 and "  send  command, queue mails\n" in result.output


def test_check_reports_faults_of_the_environment_too_unless_told_not_to_import(run):
    text = '[jobs.a]\ncall = "no_such_module:f"\n'
    result = run(author.check, text=text)
    assert (result.exit_code, result.output) == (78, 'supervisor.toml:2:1: jobs.a.call: no module "no_such_module"\n')
    result = run(author.check, "--no-import", text=text)
    assert result.exit_code == 0 and "  a  call, service" in result.output


def test_check_says_warnings_on_standard_error_and_is_content(run):
    result = run(author.check, text='[jobs.a]\ncommand = "true | true"\n')
    assert result.exit_code == 0
    assert result.stderr.startswith('supervisor.toml:2:1: warning: jobs.a.command: "|" means nothing without a shell')
    assert "warning" not in result.stdout


def test_check_answers_in_json(run):
    result = run(author.check, "--json", text=FIVE_FAULTS)
    answer = json.loads(result.stdout)
    assert result.exit_code == 78 and answer["ok"] is False and len(answer["problems"]) == 5
    place = {"file": "supervisor.toml", "line": 3, "column": 1}
    assert answer["problems"][0] == {**place, "path": "jobs.api.restrat", "message": 'unknown key; did you mean "restart"?'}
    answer = json.loads(run(author.check, "--json", text='[jobs.a]\ncommand = "true"\nenv = { SECRET = "hunter2" }').stdout)
    assert answer["ok"] is True and [node["name"] for node in answer["tree"]] == ["a"]
    assert "hunter2" not in json.dumps(answer)
    assert answer["guarantee"] == expected()


def test_check_says_what_becomes_of_children_only_where_there_are_any(run):
    Path("jobs.py").write_text("async def tick(): ...")
    assert "children end" not in run(author.check, text='[jobs.a]\ncall = "jobs:tick"').stdout
    assert (
        run(author.check, text='[jobs.a]\ncommand = "true"')
        .stdout.splitlines()[-1]
        .startswith("children end with the daemon: ")
    )


def test_check_of_a_file_that_is_not_there_exits_78_and_points_to_init(run):
    result = run(author.check, "-c", "other.toml")
    assert (result.exit_code, result.output) == (78, 'other.toml: no such file; "supervisor init" writes one to start with\n')


# init


def test_init_writes_a_file_that_passes_check_and_never_overwrites(run):
    assert run(author.init).exit_code == 0
    checked = run(author.check)
    assert (checked.exit_code, checked.stderr) == (0, ""), checked.output
    Path("supervisor.toml").write_text("mine")
    result = run(author.init)
    assert result.exit_code == 1 and "exists already" in result.output
    assert Path("supervisor.toml").read_text() == "mine"
    result = run(author.init, "-c", "no/such/dir.toml")
    assert result.exit_code == 1 and "no such file or directory" in result.output


def test_what_the_starter_file_has_in_comments_is_right_too(run):
    Path("beat.py").write_text("async def beat(message: str): ...")
    text = re.sub(r"^# (?=\[jobs\.|call =|args =)", "", schema.STARTER, flags=re.MULTILINE)
    assert "beat" in tomllib.loads(text)["jobs"]
    result = run(author.check, text=text)
    assert result.exit_code == 0, result.output


# explain


def test_explain_tells_type_default_place_and_reload_of_a_key(run):
    result = run(author.explain, "jobs.grace")
    assert result.output.splitlines() == [
        "jobs.grace",
        "  how long it may take to end after it was asked; then it is killed",
        "",
        '  type     a duration: "250ms", "10s", "1h30m", or a number of seconds',
        '  default  "10s"',
        "  where    [jobs.NAME], [defaults]",
        "  reload   a change is applied live",
    ]


def test_a_change_of_the_daemons_env_restarts_every_child_and_explain_says_so(run, tmp_path):
    assert "a change restarts every job that is a child process" in run(author.explain, "daemon.env").output
    jobs = {"child": {"command": "true"}, "function": {"call": "m:f"}, "worker": {"call": "m:f", "kind": "process"}}
    old, new = (config.from_mapping({"daemon": {"env": {"A": value}}, "jobs": jobs}, tmp_path, {}) for value in "12")
    assert config.diff(old, new) == config.Plan(restarted=("child", "worker"))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("jobs.backoff", "reset_after  after this much time ready"),
        ("jobs.api.backoff.initial", "wait before the first restart"),
        ("[jobs]", "[jobs.NAME]"),
        ("defaults.command", "a change restarts the job"),
        ("strategy", 'one of "one_for_one", "one_for_all" or "rest_for_one"'),
        ("daemon.socket", "a change needs a restart of the daemon"),
        ("stop_signal", 'only for a job with `command` or kind = "process"'),
        ("give_up.failures", "none, it must be given"),
        ("grace", "daemon.grace"),
        ("cron", "minute hour day month weekday"),
        ("overlap", "only for a job with `every` or `cron`"),
        ("queue", "handle the items of this queue"),
        ("queues.unique.for", '"queued", "running" or a duration'),
        ("workers", "an integer or a table"),
        ("ready.http", "a change is applied live"),
        ("queues", "how many items may wait"),
        ("hooks", "not supported yet"),
    ],
)
def test_explain_finds_a_key_by_its_path_its_end_or_below_a_name(run, key, said):
    result = run(author.explain, key)
    assert result.exit_code == 0 and said in result.output


def test_explain_of_an_unknown_key_suggests_one(run):
    result = run(author.explain, "jobs.restrat")
    assert result.exit_code == 2 and 'no key "jobs.restrat"; did you mean "jobs.restart"?' in result.output


def test_every_key_is_listed_and_can_be_explained(run):
    listed = run(author.explain).output
    for path, topic in schema.topics().items():
        assert topic.description, path
        assert path.split(".")[1] in listed
        assert topic.description in schema.explain(path)
    unbuilt = [topic for topic in schema.topics().values() if topic.field is None]
    assert len(unbuilt) == sum(map(len, later.KEYS.values()))
    assert all(schema.explain(topic.path).endswith("not supported yet") for topic in unbuilt)


# schema


def allowed(value, described, path=()) -> list[str]:
    """A validator for what our schemas use of JSON Schema: the paths that are refused."""
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    }  # fmt: skip
    wanted = described.get("type", list(kinds))
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not any(isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in wanted):
        return [".".join(path)]
    refused = [".".join(path)] if value not in described.get("enum", [value]) else []
    if isinstance(value, str) and not re.search(described.get("pattern", ""), value):
        refused.append(".".join(path))
    if isinstance(value, (int, float)) and value < described.get("minimum", value):
        refused.append(".".join(path))
    if isinstance(value, list):
        for item in value:
            refused += allowed(item, described.get("items", {}), (*path, "0"))
    if isinstance(value, dict):
        refused += [".".join((*path, key)) for key in described.get("required", ()) if key not in value]
        if not described.get("minProperties", 0) <= len(value) <= described.get("maxProperties", 99):
            refused.append(".".join(path))
        for key, item in value.items():
            below = described.get("properties", {}).get(key, described.get("additionalProperties", {}))
            refused += [".".join((*path, key))] if below is False else allowed(item, below, (*path, key))
    return refused


EVERY_FORM = """
[daemon]
grace = "1m"
include = ["x/*.toml"]
intensity = 3
[log]
level = "debug"
[defaults]
backoff = { initial = "${INITIAL}", factor = 1.5, max = 60 }
[supervisors.web]
strategy = "one_for_one"
intensity = 0
children = ["api"]
[jobs.api]
command = "true"
rotate = { size = "64KB", keep = "${KEEP:-3}" }
ready = { log = "x" }
give_up = { failures = 3, within = "1h30m" }
env = { A = "1" }
success_exit_codes = [0, 3]
[jobs.tick]
call = "m:f"
args = { a = [1, { b = true }], c = 1979-05-27 }
every = 0.5
"""


def test_the_schema_accepts_what_the_loader_accepts(run):
    described = json.loads(run(author.schema).output)
    for text in (EVERY_FORM, schema.STARTER):
        raw = json.loads(json.dumps(tomllib.loads(text), default=str))
        assert allowed(raw, described) == []
    config.from_mapping(tomllib.loads(EVERY_FORM.replace('include = ["x/*.toml"]', "")), Path.cwd(), {"INITIAL": "1s"})


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[jobs.api]\nrestrat = 1", "jobs.api.restrat"),
        ("[jobs.api]\nworkers = 0", "jobs.api.workers"),
        ('[jobs.api]\nonce = "yes"', "jobs.api.once"),
        ('[jobs.api]\ngrace = "soon"', "jobs.api.grace"),
        ("[jobs.api]\ngrace = -1", "jobs.api.grace"),
        ('[jobs.api]\nrestart = "x"', "jobs.api.restart"),
        ("[jobs.api]\nready = {}", "jobs.api.ready"),
        ("[jobs.api]\nbackoff = { jittr = 1 }", "jobs.api.backoff.jittr"),
        ("[jobs.api]\ngive_up = { failures = 1 }", "jobs.api.give_up.within"),
        ("[job.api]", "job"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(text, path):
    assert allowed(tomllib.loads(text), schema.json_schema()) == [path]


def test_the_schema_describes_every_key_for_completion():
    properties = schema.json_schema()["properties"]["jobs"]["additionalProperties"]["properties"]
    assert set(properties) == set(JobSpec.__struct_fields__)
    assert properties["restart"]["enum"] == ["permanent", "transient", "temporary"]
    assert properties["grace"]["default"] == "10s"
    assert all(each["description"] for each in properties.values())
    assert "oneOf" not in json.dumps(properties) and "anyOf" not in json.dumps(properties)
