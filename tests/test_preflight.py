"""Faults of the environment: programs, directories, modules. Real files, and a real process that imports."""
# ruff: noqa: E501 - the messages are long, and stand here as they are read

import os
import sys
from pathlib import Path

import pytest

from supervisor import config
from supervisor.config import preflight
from supervisor.config.preflight import Call, Findings
from supervisor.kinds import inspection

BEAT = """
from __future__ import annotations
import functools, typing
from supervisor.kinds import Context
if typing.TYPE_CHECKING:
    from nowhere import Unknown

async def beat(message: str, ctx: Context, times: int = 3) -> None: ...
async def maybe(ctx: Context | None = None): ...
async def unknown(ctx: Context, other: Unknown = None): ...
def plain(x, *, rate: float = 1.0): ...
def anything(**rest): ...
def positional(x, /): ...
async def generator():
    yield 1
def plain_generator():
    yield 1
def stream() -> Stream[int]: ...
class Thing:
    async def __call__(self): ...
thing = Thing()
partial = functools.partial(beat, message="x")
number = 3
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Check a file beside a package `jobs`; the environment's PATH is a directory `bin` beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/__init__.py").touch()
    (tmp_path / "jobs/beat.py").write_text(BEAT)

    def check(text: str, *, imports: bool = True, limit: float = 30.0, **modules: str) -> Findings:
        for name, source in modules.items():
            (tmp_path / f"jobs/{name}.py").write_text(source)
        Path("supervisor.toml").write_text(text)
        environ = {**os.environ, "PATH": str(tmp_path / "bin")}
        return preflight.check(config.load(Path("supervisor.toml"), {}), imports=imports, environ=environ, limit=limit)

    return check


@pytest.fixture
def faults(check):
    """The faults of a text, a line each."""
    return lambda text, **more: [str(problem) for problem in check(text, **more).all_problems]


def call(name: str, keys: str = "", job: str = "a") -> str:
    return f'[jobs.{job}]\ncall = "jobs.{name}"\n{keys}\n'


def program(path: str, text: str = "#!/bin/sh\n", mode: int = 0o755) -> None:
    Path(path).write_text(text)
    Path(path).chmod(mode)


# Programs and directories


def test_a_program_is_looked_up_in_the_jobs_path(faults, tmp_path):
    program("bin/tool")
    (tmp_path / "own").mkdir()
    program("own/mine")
    assert faults('[jobs.a]\ncommand = "tool --x"\n[jobs.b]\ncommand = ["mine"]\nenv = { PATH = "own" }') == []
    assert faults('[jobs.a]\ncommand = "tool"\nenv = { PATH = "own" }\n[jobs.b]\ncommand = "mine"') == [
        'supervisor.toml:2:1: jobs.a.command: no program "tool" in the job\'s PATH',
        'supervisor.toml:5:1: jobs.b.command: no program "mine" in the job\'s PATH',
    ]


def test_a_program_with_a_slash_is_looked_up_in_the_working_directory(faults, tmp_path):
    (tmp_path / "work").mkdir()
    program("work/tool")
    assert faults('[jobs.a]\ncommand = "./tool"\ncwd = "work"') == []
    assert faults('[jobs.a]\ncommand = "./tool"') == ['supervisor.toml:2:1: jobs.a.command: no such program: "./tool"']


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("./work", 'a directory, expected a program: "./work"'),
        ("./text", 'not executable: "./text"; chmod +x makes it so'),
        ("./script", '"./script" wants an interpreter that is not there: "/no/such/python"'),
        ("text", 'not executable: "text"; chmod +x makes it so'),
    ],
)
def test_what_is_no_program_is_refused(faults, tmp_path, command, fault):
    (tmp_path / "work").mkdir()
    program("text", mode=0o644)
    program("bin/text", mode=0o644)
    program("script", "#!/no/such/python -u\n")
    assert faults(f'[jobs.a]\ncommand = "{command}"') == [f"supervisor.toml:2:1: jobs.a.command: {fault}"]


def test_a_working_directory_must_be_there(faults):
    program("bin/tool")
    assert faults('[jobs.a]\ncommand = "tool"\ncwd = "no"\n[jobs.b]\ncommand = "tool"\ncwd = "bin/tool"\n') == [
        f'supervisor.toml:3:1: jobs.a.cwd: no such directory: "{Path.cwd()}/no"',
        f'supervisor.toml:6:1: jobs.b.cwd: not a directory: "{Path.cwd()}/bin/tool"',
    ]


def test_output_cannot_be_a_directory(faults):
    program("bin/tool")
    assert faults('[jobs.a]\ncommand = "tool"\noutput = "./bin"') == [
        f'supervisor.toml:3:1: jobs.a.output: a directory, expected a file: "{Path.cwd()}/bin"'
    ]


def test_an_expansion_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("f.toml").write_text('[jobs.a]\ncommand = "${S}"\n[jobs.b]\ncommand = "x"\ncwd = "${S}"')
    found = preflight.check(config.load(Path("f.toml"), {"S": "hunter2"}), environ={})
    assert [str(problem) for problem in found.all_problems] == [
        'f.toml:2:1: jobs.a.command: no program "${S}" in the job\'s PATH',
        'f.toml:5:1: jobs.b.cwd: no such directory: "${S}"',
    ]


# Functions


def test_functions_that_fit_are_told_apart(check):
    found = check(
        call("beat:beat", 'args = { message = "x" }', "a")
        + call("beat:maybe", "", "b")
        + call("beat:unknown", "", "c")
        + call("beat:plain", "args = { x = [1], rate = 2 }", "d")
        + call("beat:anything", "args = { y = 1 }", "e")
        + call("beat:thing", "", "f")
        + call("beat:partial", "", "g")
    )
    assert found.problems == {}
    assert found.calls == {
        "a": Call("task", "ctx"),
        "b": Call("task", "ctx"),
        "c": Call("task", "ctx"),
        "d": Call("thread", None),
        "e": Call("thread", None),
        "f": Call("task", None),
        "g": Call("task", "ctx"),
    }


@pytest.mark.parametrize(
    ("name", "keys", "fault"),
    [
        ("beat:beet", "", 'call: "jobs.beat" has no "beet"; did you mean "beat"?'),
        ("beet:beat", "", 'call: no module "jobs.beet"; did you mean "jobs.beat"?'),
        ("beat:number", "", 'call: "number" of "jobs.beat" is no function, but of type int'),
        ("beat:Thing", "", "call: a class: expected a function"),
        ("beat:generator", "", "call: what it yields would go nowhere: name the queue that gets it in `into`"),
        ("beat:positional", "", 'call: its parameter "x" is positional only: arguments are passed by name'),
        ("beat:plain", 'kind = "task"\nargs = { x = 1 }', 'kind: kind "task" runs an `async def`, this is a plain function: use kind = "thread"'),
        ("beat:maybe", 'kind = "thread"', 'kind: kind "thread" runs a plain function, this one is `async def`'),
        ("beat:beat", "", 'args: "message" is missing: the function has no default for it'),
        ("beat:beat", 'args = { mesage = "x" }', 'args.mesage: the function has no parameter of that name; did you mean "message"?'),
        ("beat:beat", "args = { message = 3 }", "args.message: the function expects str, got int"),
        ("beat:beat", 'args = { message = "x", times = true }', "args.times: the function expects int, got bool"),
        ("beat:beat", 'args = { message = "x", ctx = 1 }', "args.ctx: the Context, which the supervisor passes itself: leave it out"),
    ],
)  # fmt: skip
def test_a_function_that_does_not_fit_is_one_fault(faults, name, keys, fault):
    [line] = faults(call(name, keys))
    assert line.partition(" ")[2] == f"jobs.a.{fault}"


@pytest.mark.parametrize("function", ["generator", "plain_generator", "stream"])
def test_what_yields_needs_a_queue_for_that(check, function):
    found = check(f'[queues.q]\n{call(f"beat:{function}", """into = "q" """)}')
    assert found.all_problems == []
    assert found.calls["a"].kind == ("thread" if function == "plain_generator" else "task")


def test_a_stream_needs_trio(faults):
    [line] = faults("[queues.q]\n" + call("beat:stream", 'kind = "thread"\ninto = "q"'))
    assert 'jobs.a.kind: kind "thread" cannot open a Stream, which needs Trio: leave `kind` out' in line


def test_the_args_of_a_job_whose_schedule_makes_items_are_the_item(check):
    text = '[queues.q]\n[jobs.a]\ncall = "jobs.beat:unknown"\nqueue = "q"\ncron = "* * * * *"\nargs = { any = 1 }'
    assert check(text).all_problems == []


def test_what_the_probes_need_is_looked_for_too(faults):
    text = """
[jobs.a]
call = "jobs.beat:plain"
args = { x = 1 }
ready = { exec = ["no-such-thing", "x"] }
health = { call = "jobs.beat:bat" }
[jobs.b]
command = ["./gone"]
ready = { call = "jobs.gone:f" }
health = { call = "jobs.beat:beat" }
[jobs.c]
call = "jobs.beat:maybe"
ready = { call = "jobs.beat:maybe" }
"""
    assert faults(text) == [
        'supervisor.toml:5:11: jobs.a.ready.exec: no program "no-such-thing" in the job\'s PATH',
        'supervisor.toml:6:12: jobs.a.health.call: "jobs.beat" has no "bat"; did you mean "beat"?',
        'supervisor.toml:8:1: jobs.b.command: no such program: "./gone"',
        'supervisor.toml:9:11: jobs.b.ready.call: no module "jobs.gone"; did you mean "jobs.beat"?',
        'supervisor.toml:10:12: jobs.b.health.call: "message" is missing: the function has no default for it',
    ]


def test_modules_that_do_not_import_are_faults_of_their_jobs_alone(faults):
    found = faults(
        call("exits:f", "", "a") + call("raises:f", "", "b") + call("syntax:f", "", "c") + call("needs:f", "", "d")
        + call("dies:f", "", "e") + call("crashes:f", "", "f") + call("prints:f", "", "g") + call("dies:g", "", "h"),
        exits="import sys; sys.exit(3)",
        raises="x = 1\nraise RuntimeError('no luck')",
        syntax="x = (",
        needs="import no.such",
        dies="import os; os._exit(4)",
        crashes="import os; os.kill(os.getpid(), 11)",
        prints="import sys\nprint('x' * 100000, flush=True); sys.stderr.write('{}\\n'); input\ndef f(): ...",
    )  # fmt: skip
    base = Path.cwd() / "jobs"
    assert [line.partition(" ")[2] for line in found] == [
        'jobs.a.call: "jobs.exits" calls sys.exit(3) when it is imported',
        f'jobs.b.call: "jobs.raises" does not import: RuntimeError: no luck ({base}/raises.py:2)',
        f"jobs.c.call: \"jobs.syntax\" does not import: '(' was never closed ({base}/syntax.py:1)",
        f"jobs.d.call: \"jobs.needs\" does not import: ModuleNotFoundError: No module named 'no' ({base}/needs.py:1)",
        'jobs.e.call: "jobs.dies" ended the process that imported it (exit code 4)',
        'jobs.f.call: "jobs.crashes" ended the process that imported it (killed by SIGSEGV)',
        'jobs.h.call: "jobs.dies" ended the process that imported it (exit code 4)',
    ]


def test_a_module_that_hangs_is_a_fault_after_the_limit_and_leaves_no_process(check, tmp_path):
    pid = tmp_path / "pid"
    hangs = f"import os, threading\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\nthreading.Event().wait()"
    found = check(call("hangs:f", "", "a") + call("hangs:g", "", "b") + call("beat:maybe", "", "c"), limit=2.0, hangs=hangs)
    assert [str(problem).partition(" ")[2] for problem in found.all_problems] == [
        'jobs.a.call: "jobs.hangs" did not import within 2 s',
        'jobs.b.call: "jobs.hangs" did not import within 2 s',
    ]
    assert found.calls == {"c": Call("task", "ctx")}
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_thread_that_a_module_starts_does_not_keep_the_process(check):
    source = "import threading\nthreading.Thread(target=threading.Event().wait).start()\ndef f(): ..."
    assert check(call("starts:f"), starts=source).problems == {}


def test_nothing_is_imported_when_told_so_nor_into_this_process(check):
    found = check(call("raises:f"), imports=False, raises="1/0")
    assert found == Findings()
    check(call("beat:maybe"))
    assert "jobs.beat" not in sys.modules


def test_more_directories_to_import_from_are_used_and_missed(check, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/extra.py").write_text("async def f(): ...")
    found = check('[daemon]\npath = ["lib", "gone"]\n[jobs.a]\ncall = "extra:f"')
    assert found.calls == {"a": Call("task", None)}
    assert [str(warning) for warning in found.warnings] == [
        f'supervisor.toml:2:16: warning: daemon.path[1]: no such directory: "{tmp_path}/gone"'
    ]


def test_a_configuration_without_a_file_has_faults_without_places(tmp_path):
    mapping = {"jobs": {"a": {"command": "no-such-program"}, "b": {"call": "no_such_module:f"}}}
    found = preflight.check(config.from_mapping(mapping, tmp_path, {}))
    assert [str(problem) for problem in found.all_problems] == [
        'jobs.a.command: no program "no-such-program" in the job\'s PATH',
        'jobs.b.call: no module "no_such_module"',
    ]


def test_the_context_is_found_by_its_annotation_however_it_is_written():
    def plain(context): ...
    def text(c: "supervisor.Context"): ...  # noqa: F821
    def optional(a, c: "Optional[Context]"): ...  # noqa: F821
    def other(c: "ContextVar"): ...  # noqa: F821

    assert [inspection.context_parameter(each) for each in (plain, text, optional, other)] == [None, "c", "c", None]


# Functions of queue jobs

ITEMS = """
from supervisor.kinds import Context
def usual(image, ctx: Context, *, width: int): ...
def turned(ctx: Context, image: dict): ...
def starred(*images, **rest): ...
def positional(image: str, /): ...
def several(images: list[str]): ...
def none(*, width: int = 1): ...
def deaf(ctx: Context): ...
def numbers(image: int): ...
def instead(item, failure): ...
"""
QUEUE = '[queues.q]\nbackend = "memory"\n'


def test_the_function_of_a_queue_job_gets_the_item_first(faults):
    first = "it takes no item: the function of a job with `queue` gets that as its first parameter"
    jobs = [
        ("usual", "args = { width = 1 }", []),
        ("turned", "", []),
        ("starred", 'args = { images = "x" }', []),
        ("positional", "", []),
        ("several", "batch = 5", []),
        ("numbers", 'fallback = "jobs.items:instead"', []),
        ("usual", "", ['args: "width" is missing: the function has no default for it']),
        (
            "usual",
            'args = { image = "x", width = "y" }',
            [
                "args.image: the item of the queue, which is the function's first parameter: leave it out",
                "args.width: the function expects int, got str",
            ],
        ),
        ("none", "", [f"call: {first}"]),
        ("deaf", "", [f"call: {first}"]),
        ("numbers", "batch = 5", ['batch: a list of items, and the function\'s "image" expects int']),
    ]
    text = "".join(call(f"items:{name}", f'queue = "q"\n{keys}', f"j{n}") for n, (name, keys, _) in enumerate(jobs))
    found = [fault.partition(" ")[2] for fault in faults(QUEUE + text, items=ITEMS)]
    assert found == [f"jobs.j{n}.{fault}" for n, (_, _, expected) in enumerate(jobs) for fault in expected]
