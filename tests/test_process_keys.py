"""The keys that say how a child is started, stopped and fed: what the file may say, what the machine must have, what a change does."""
# ruff: noqa: E501 - the messages are long, and stand here as they are read

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from supervisor import config
from supervisor.accounts import identity_of
from supervisor.config import Config, Plan, diff, preflight
from supervisor.config.schema import explain, json_schema
from supervisor.errors import SpawnFailed, SpecError
from supervisor.kinds.environment import PATH, environment, read
from supervisor.kinds.job import JobSpec
from supervisor.spec import Limit, Paths

ROOT = Path(__file__).parent.parent
SECRET = "hunter2"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, environ: dict[str, str] | None = None) -> Config:
    Path("supervisor.toml").write_text(text)
    return config.load(Path("supervisor.toml"), environ or {})


def faults(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(text, environ)
    return [line.partition(" ")[2] for line in str(caught.value).splitlines()]


def missing(text: str, environ: dict[str, str] | None = None) -> list[str]:
    """What the machine lacks."""
    found = preflight.check(load(text, environ), environ=environ)
    return [str(problem).partition(" ")[2] for problem in found.all_problems]


def job(keys: str, name: str = "a") -> str:
    return f'[jobs.{name}]\ncommand = "true"\n{keys}\n'


# ---- what the file may say


def test_the_keys_are_read():
    spec = load(
        job(
            'user = 0\ngroup = "root"\ngroups = ["daemon", 7]\numask = "0027"\nnice = -5\nno_new_privileges = true\n'
            'rlimits = { nofile = 1024, core = "unlimited", as = "1GB", nproc = [10, 20] }\nclear_env = true\n'
            'env_file = [".env", "-local.env"]\nstdin = "in.txt"\nstop_command = "kill 1"\nreload_signal = "HUP"'
        )
    ).jobs["a"]
    assert (spec.user, spec.group, spec.groups) == ("0", "root", ("daemon", "7"))
    assert (spec.umask, spec.nice, spec.no_new_privileges, spec.clear_env) == (0o027, -5, True, True)
    assert spec.rlimits == {"nofile": (1024, 1024), "core": (-1, -1), "as": (1 << 30, 1 << 30), "nproc": (10, 20)}
    assert spec.env_file == (f"{Path.cwd()}/.env", f"-{Path.cwd()}/local.env")
    assert (spec.stdin, spec.stop_command, spec.reload_signal) == (f"{Path.cwd()}/in.txt", ("kill", "1"), "HUP")


def test_one_env_file_needs_no_list_and_an_expansion_is_not_shown():
    spec = load(job('env_file = "-${WHERE}/x"'), {"WHERE": "/secret"}).jobs["a"]
    assert spec.env_file == ("-/secret/x",)
    with pytest.raises(SpawnFailed, match=r'env_file "\$\{WHERE\}/x": no such file'):
        read(load(job('env_file = "${WHERE}/x"'), {"WHERE": "/secret"}).jobs["a"].env_file[0])


@pytest.mark.parametrize(
    ("umask", "mask"), [('"0022"', 0o022), ('"22"', 0o022), ("0o022", 0o022), ("0o77", 0o77), ("0", 0), ("7", 7)]
)
def test_a_mask_is_octal(umask, mask):
    assert load(job(f"umask = {umask}")).jobs["a"].umask == mask


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ("umask = 22", 'jobs.a.umask: expected an octal number such as "0022" or 0o022 (an integer without 0o is decimal), got 22'),
        ("umask = 0o1777", 'jobs.a.umask: expected an octal number such as "0022" or 0o022, at most 0o777, got 1023'),
        ('umask = "0888"', 'jobs.a.umask: expected an octal number such as "0022" or 0o022 (an integer without 0o is decimal), got "0888"'),
        ("nice = 20", "jobs.a.nice: expected at most 19, got 20"),
        ("user = true", "jobs.a.user: expected a name or a number, got true"),
        ('user = ""', 'jobs.a.user: expected a name or a number, got ""'),
        ("rlimits = { locks = 1 }", "jobs.a.rlimits.locks: Linux does not enforce it, and the supervisor marks its children with it"),
        ("rlimits = { nofiles = 1 }", 'jobs.a.rlimits.nofiles: no such limit; did you mean "nofile"?'),
        ("rlimits = { core = 'lots' }", 'jobs.a.rlimits.core: expected a number, a size such as "1GB", "unlimited", or [soft, hard], got "lots"'),
        ("rlimits = { nproc = [2, 1] }", "jobs.a.rlimits.nproc: the soft limit is above the hard one: expected [soft, hard], got an array"),
        ("rlimits = { nproc = ['unlimited', 1] }", "jobs.a.rlimits.nproc: the soft limit is above the hard one: expected [soft, hard], got an array"),
        ("rlimits = { nproc = [1] }", 'jobs.a.rlimits.nproc: expected a number, a size such as "1GB", "unlimited", or [soft, hard], got an array'),
        ("tty = true\nstdin = 'pipe'", "jobs.a.stdin: not with `tty`: the terminal is its input"),
        ("tty = true\noutput = 'null'", 'jobs.a.output: not "null" with `tty`: what it prints on its terminal is captured'),
        ("reload_signal = 'KILL'", 'jobs.a.reload_signal: expected "HUP", "USR1", "USR2", "INT", "QUIT", "TERM" or "WINCH", got "KILL"'),
        ("stop_command = 'unfinished \"'", 'jobs.a.stop_command: unbalanced quotes: expected words as in a shell, got "unfinished \\""'),
        ("env_file = 3", "jobs.a.env_file: expected a string or a list of strings, got 3"),
        ("sockets = ['web']", 'jobs.a.sockets[0]: no socket "web" in [sockets]'),
        ("sockets = ['wed']\n[sockets.web]\nlisten = '*:80'", 'jobs.a.sockets[0]: no socket "wed" in [sockets]; did you mean "web"?'),
        ("sockets = ['web', 'web']\n[sockets.web]\nlisten = '*:80'", 'jobs.a.sockets[1]: "web" is listed twice'),
    ],
)  # fmt: skip
def test_what_is_refused(keys, fault):
    assert faults(job(keys)) == [fault]


@pytest.mark.parametrize(
    "key", ["env_file = 'x'", "user = 'root'", "sockets = []", "tty = true", "stop_command = 'x'", "reload_signal = 'HUP'"]
)
def test_they_are_for_child_processes_only(key):
    [fault] = faults(f'[jobs.a]\ncall = "m:f"\n{key}')
    assert fault.endswith('only for a job with `command` or kind = "process"')


def worker(keys: str = "", name: str = "a") -> str:
    return f'[jobs.{name}]\ncall = "m:f"\nkind = "process"\n{keys}\n'


def test_a_function_in_a_process_has_every_key_of_a_child():
    keys = """
    env = { A = "1" }
    env_file = "env"
    clear_env = true
    cwd = "there"
    user = 0
    umask = "0027"
    nice = 3
    rlimits = { nofile = 64 }
    no_new_privileges = true
    stdin = "pipe"
    sockets = ["web"]
    output = "out.log"
    rotate = { keep = 1 }
    parse = "json"
    max_line = 100
    on_overload = "drop"
    success_exit_codes = [0, 3]
    stop_signal = "INT"
    stop_to = "group"
    stop_command = "x"
    reload_signal = "HUP"
    watch = ["*.py"]
    recycle = { memory = "1GB" }
    ready = { log = "up" }
    """
    loaded = load('[sockets.web]\nlisten = "*:0"\n' + worker(keys))
    spec, here = loaded.jobs["a"], Path.cwd()
    assert (spec.cwd, spec.output, spec.env_file) == (f"{here}/there", f"{here}/out.log", (f"{here}/env",))
    assert spec.watch == (f"{here}/*.py",) and spec.stop_signal == "INT" and spec.env == {"A": "1"}


def test_a_kind_that_is_misspelt_is_the_only_fault():
    [fault] = faults('[jobs.a]\ncall = "m:f"\nkind = "proces"\nnice = 3\nrecycle = { memory = 1 }\nready = { log = "x" }')
    assert fault.startswith("jobs.a.kind: expected ") and fault.endswith('got "proces"; did you mean "process"?')


def test_defaults_of_children_reach_functions_in_processes_and_no_others():
    keys = '[defaults]\nnice = 3\nwatch = ["*.py"]\nrecycle = { memory = 1 }\nready = { log = "x" }\n'
    loaded = load(keys + worker() + '[jobs.b]\ncall = "m:f"\n' + job("", "c"))
    assert [spec.nice for spec in loaded.jobs.values()] == [3, None, 3]
    assert [spec.recycle is not None for spec in loaded.jobs.values()] == [True, False, True]
    assert [spec.ready is not None for spec in loaded.jobs.values()] == [True, False, True]
    by_default = load(f'{keys}kind = "process"\n[jobs.b]\ncall = "m:f"\n' + job("", "c")).jobs
    assert [(spec.kind, spec.nice) for spec in by_default.values()] == [("process", 3), (None, 3)]


def test_what_the_machine_lacks_of_them_is_told_for_functions_in_processes_too():
    Path("m.py").write_text("def f(): pass\nasync def g(): pass")
    assert missing(worker('cwd = "/no/such"\nuser = "nobdy"\nstop_command = "/no/stop"')) == [
        'jobs.a.cwd: no such directory: "/no/such"',
        'jobs.a.user: no user "nobdy"; did you mean "nobody"?',
    ]
    assert missing(worker().replace("m:f", "m:g")) == [
        'jobs.a.kind: kind "process" runs a plain function, this one is `async def`'
    ]
    assert missing(worker()) == []


def test_a_word_is_not_taken_for_a_file():
    assert [warning.message for warning in load(job("stdin = 'pip'")).warnings] == ['a file of that name; did you mean "pipe"?']


@pytest.mark.parametrize(
    ("keys", "faults_"),
    [
        ("listen = '8000'", ['sockets.web.listen: expected "host:port", "[::1]:port", "*:port", or a path with a slash in it, got "8000"']),
        ("listen = 'a:b:80'", ['sockets.web.listen: expected "host:port", "[::1]:port", "*:port", or a path with a slash in it, got "a:b:80"']),
        ("listen = '*:70000'", ['sockets.web.listen: expected "host:port", "[::1]:port", "*:port", or a path with a slash in it, got "*:70000"']),
        ("backlog = 3", ["""sockets.web: "listen" is missing: where: "127.0.0.1:8000", "[::1]:8000", "*:8000" for every address, IPv6 too, or the path of a Unix socket, with a slash in it"""]),
        ("listen = '*:80'\nbaklog = 3", ['sockets.web.baklog: unknown key; did you mean "backlog"?']),
        ("listen = '*:80'\n[sockets.other]\nlisten = '*:80'", ['sockets.other.listen: listens where "web" does']),
        ("listen = './x'\nmode = 660", ['sockets.web.mode: expected an octal number such as "0022" or 0o022, at most 0o777, got 660']),
    ],
)  # fmt: skip
def test_what_is_refused_of_a_socket(keys, faults_):
    assert list(faults(job("sockets = ['web']") + f"[sockets.web]\n{keys}")) == faults_


def test_a_path_belongs_to_the_file_and_a_socket_that_nobody_uses_is_a_warning():
    loaded = load("[sockets.web]\nlisten = './run/web.sock'\nmode = '0660'\n" + job(""))
    assert loaded.sockets["web"].listen == f"{Path.cwd()}/run/web.sock"
    assert loaded.sockets["web"].mode == 0o660
    assert [str(warning).partition(" ")[2] for warning in loaded.warnings] == [
        "warning: sockets.web: no job uses it: a job names it in `sockets`"
    ]


def test_the_keys_are_explained_and_in_the_schema():
    assert "a change restarts the jobs that use it" in explain("sockets.web.listen")
    assert 'type     "0022" or 0o022' not in explain("jobs.umask") and "an octal number" in explain("jobs.umask")
    schema = json_schema()["properties"]
    assert schema["sockets"]["additionalProperties"]["required"] == ["listen"]
    assert schema["sockets"]["additionalProperties"]["properties"]["mode"]["default"] == "0666"
    assert schema["jobs"]["additionalProperties"]["properties"]["env_file"]["type"] == ["string", "array"]


# ---- files of the environment


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("A=1\nexport B = two words  \n\n# no\n; no\n  C=\n", {"A": "1", "B": "two words", "C": ""}),
        ("A='a $B \\n # \"x\"' # said\nB=\"x\\n\\\"y\\\" \\$Z \\d\"\n", {"A": 'a $B \\n # "x"', "B": 'x\n"y" $Z \\d'}),
        ("A=x#y\nB=x # y\nC= # y\nD=$A\nE=a'b\"c", {"A": "x#y", "B": "x", "C": "", "D": "$A", "E": "a'b\"c"}),
        ("KEY=\"-----BEGIN\nline=2\n-----END\"\r\nB='1\n2'\r\n", {"KEY": "-----BEGIN\nline=2\n-----END", "B": "1\n2"}),
        ("\ufeffA=1\nA=2\nx.y-z=3", {"A": "2", "x.y-z": "3"}),
    ],
)  # fmt: skip
def test_an_environment_file_is_read_as_its_writers_expect(text, entries):
    Path("f").write_bytes(text.encode())
    assert read("f") == entries


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        (f"A=1\n\n{SECRET}\n", 3, "expected NAME=value"),
        (f"export\nB={SECRET}", 1, "expected NAME=value"),
        (f"A='{SECRET}\nB=2", 1, "quotes that are not closed, or something after them"),
        (f'A="1"{SECRET}\n', 1, "quotes that are not closed, or something after them"),
        (f"A=1\n1A={SECRET}", 2, "expected NAME=value, and a name of letters, digits and _"),
        (f"A={SECRET}\0", 1, "a NUL character"),
        (f"set A={SECRET}", 1, "expected NAME=value, and a name of letters, digits and _"),
    ],
)
def test_a_malformed_one_is_told_with_its_line_and_without_a_value(text, line, why):
    Path("f").write_text(text)
    with pytest.raises(SpawnFailed) as caught:
        read("f")
    assert str(caught.value) == f'env_file "f", line {line}: {why}'


def test_bytes_that_are_no_utf_8_are_kept():
    Path("f").write_bytes(b"A=\xff\xfe")
    assert os.fsencode(read("f")["A"]) == b"\xff\xfe"


def test_an_optional_one_may_be_missing_but_not_wrong():
    assert read("-no") == {}
    Path("f").write_text("x")
    with pytest.raises(SpawnFailed, match='env_file "f", line 1'):
        read("-f")
    with pytest.raises(SpawnFailed, match='env_file "no": no such file or directory'):
        read("no")
    with pytest.raises(SpawnFailed, match=r'env_file "\.": is a directory'):
        read("-.")


def test_what_lies_over_what():
    for name, entries in {"shared": "ABCDEF", "own1": "CDEF", "own2": "DEF"}.items():
        Path(name).write_text("".join(f"{each}={name}\n" for each in entries))
    spec = JobSpec(command=("true",), env={"F": "env"}, env_file=Paths(("own1", "own2")))
    found = environment(spec, {"A": "0", "Z": "0"}, {"B": "daemon", "E": "daemon"}, ["shared"])
    assert found == {"Z": "0", "A": "shared", "B": "daemon", "C": "own1", "D": "own2", "E": "own2", "F": "env"}


def test_a_clear_environment_has_a_path_the_user_and_what_the_file_gives():
    me = pwd.getpwuid(os.geteuid())
    spec = JobSpec(command=("true",), clear_env=True, env={"SHELL": "/mine"})
    found = environment(spec, {"SECRET": "x", "PATH": "/own"}, {"B": "daemon"}, [])
    assert found == {
        "PATH": PATH, "HOME": me.pw_dir, "USER": me.pw_name, "LOGNAME": me.pw_name, "SHELL": "/mine", "B": "daemon",
    }  # fmt: skip


def test_a_user_lies_over_the_daemons_environment_and_under_the_files():
    spec = JobSpec(command=("true",), user="nobody", env={"HOME": "/mine"})
    found = environment(spec, {"HOME": "/root", "USER": "root", "X": "1"}, {}, [])
    assert (found["HOME"], found["USER"], found["LOGNAME"], found["X"]) == ("/mine", "nobody", "nobody", "1")


# ---- what the machine must have


def test_a_file_that_is_missing_or_malformed_fails_the_check():
    Path("bad").write_text(f"A=1\n{SECRET}\n")
    assert missing("[daemon]\nenv_file = 'shared'\n" + job("env_file = ['-no', 'no', 'bad']")) == [
        f'daemon.env_file: "{Path.cwd()}/shared": no such file or directory',
        f'jobs.a.env_file: "{Path.cwd()}/no": no such file or directory',
        f'jobs.a.env_file: "{Path.cwd()}/bad", line 2: expected NAME=value',
    ]


def test_a_program_is_looked_up_in_the_path_that_the_files_give():
    Path("bin").mkdir()
    Path("bin/tool").write_text("#!/bin/sh\n")
    Path("bin/tool").chmod(0o755)
    Path("f").write_text("PATH=bin\n")
    tool = "[jobs.a]\ncommand = 'tool'\nstop_command = 'tol'\n"
    assert missing(tool + "env_file = 'f'") == ['jobs.a.stop_command: no program "tol" in the job\'s PATH']
    assert missing("[daemon]\nenv_file = 'f'\n" + tool) == ['jobs.a.stop_command: no program "tol" in the job\'s PATH']
    assert len(missing(tool + "env_file = 'f'\nenv = { PATH = '/usr/bin' }")) == 2
    assert len(missing(tool + "clear_env = true", {"PATH": "bin"})) == 2


def test_users_and_groups_must_be_there():
    assert missing(job("user = 'nobdy'\ngroup = 'nogrup'\ngroups = ['root', 'tttty']")) == [
        'jobs.a.user: no user "nobdy"; did you mean "nobody"?',
        'jobs.a.group: no group "nogrup"; did you mean "nogroup"?',
        'jobs.a.groups[1]: no group "tttty"; did you mean "tty"?',
    ]
    assert missing(job("sockets = ['web']") + "[sockets.web]\nlisten = './x'\nuser = 'nobdy'") == [
        'sockets.web.user: no user "nobdy"; did you mean "nobody"?'
    ]


@AS_ROOT
def test_a_user_without_an_entry_needs_a_group():
    assert missing(job("user = 54321")) == [
        "jobs.a.user: nothing is known of the user 54321, so its group must be given: group"
    ]
    assert missing(job("user = 54321\ngroup = 54321")) == []
    assert identity_of("54321", "54321", ()) == (54321, 54321, (54321,))


@AS_ROOT
def test_groups_of_the_user_come_first_and_more_are_added():
    entry = pwd.getpwnam("nobody")
    assert identity_of("nobody", None, ()) == (entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist("nobody", entry.pw_gid)))
    assert identity_of("nobody", "tty", ("daemon",)).groups[-1] == identity_of(None, "daemon", ()).gid
    assert identity_of(None, None, ()) is None


def test_the_input_must_be_there():
    assert missing(job("stdin = './no'")) == [f'jobs.a.stdin: no such file: "{Path.cwd()}/no"']
    assert missing(job("stdin = './'\n")) == [f'jobs.a.stdin: a directory, expected a file: "{Path.cwd()}"']


def missing_to_nobody(before: str = "pass") -> list[str]:
    """What the machine lacks, or refuses, when the daemon is not root's. The file is read before."""
    script = f"""if True:
        import os, resource
        from pathlib import Path
        from supervisor import config
        from supervisor.config import preflight
        {before}
        found = config.load(Path("supervisor.toml"), {{}})
        os.setgroups([]); os.setgid({pwd.getpwnam("nobody").pw_gid}); os.setuid({pwd.getpwnam("nobody").pw_uid})
        print(*preflight.check(found, environ={{}}).all_problems, sep="\\n")
    """
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return [line.partition(" ")[2] for line in done.stdout.splitlines()]


@AS_ROOT
def test_what_may_not_be_looked_at_is_a_fault_and_no_crash():
    Path("supervisor.toml").write_text(job("cwd = './x'") + '[jobs.b]\ncommand = "./x"\ncwd = "/"\nstdin = "./y"')
    assert missing_to_nobody() == [
        f'jobs.a.cwd: no such directory: "{Path.cwd()}/x"',
        'jobs.b.command: no such program: "./x"',
        f'jobs.b.stdin: no such file: "{Path.cwd()}/y"',
    ]


@AS_ROOT
def test_who_is_not_root_hears_what_only_root_may(monkeypatch):
    with tempfile.TemporaryDirectory() as directory, monkeypatch.context() as patched:
        Path(directory).chmod(0o755)
        patched.chdir(directory)
        Path("supervisor.toml").write_text(
            job("user = 'root'")
            + job("groups = ['daemon']", "b")
            + job("nice = -3\nrlimits = { nofile = 'unlimited' }", "c")
            + job("user = 'nobody'\nnice = 3\nrlimits = { nofile = 10 }", "d")
        )
        limits = ("NOFILE, (64, 64)", "NICE, (0, 0)")
        assert missing_to_nobody("; ".join(f"resource.setrlimit(resource.RLIMIT_{limit})" for limit in limits)) == [
            "jobs.a.user: only root may run a job as another user, or in other groups",
            "jobs.b.groups: only root may run a job as another user, or in other groups",
            "jobs.c.nice: only root may put a job before others, got -3",
            "jobs.c.rlimits.nofile: only root may raise the hard limit above 64",
        ]


# ---- what a change does


def plan(old: str, new: str) -> Plan:
    return diff(load(old), load(new))


@pytest.mark.parametrize(
    "keys",
    ["user = 'nobody'", "umask = '077'", "rlimits = { core = 0 }", "env_file = '-x'", "tty = true", "stdin = 'pipe'", "clear_env = true"],
)  # fmt: skip
def test_what_the_child_is_restarts_it(keys):
    assert plan(job(""), job(keys)) == Plan(restarted=("a",))


@pytest.mark.parametrize("keys", ["stop_command = 'x'", "reload_signal = 'HUP'"])
def test_how_it_is_asked_changes_live(keys):
    assert plan(job(""), job(keys)) == Plan(changed=("a",))


def test_the_environment_of_all_restarts_every_command_and_nothing_else():
    jobs = job("") + job("", "b") + "[jobs.c]\ncall = 'm:f'\n"
    for change in ("env = { A = '1' }", "env_file = '-x'"):
        assert plan(jobs, f"[daemon]\n{change}\n" + jobs) == Plan(restarted=("a", "b"))


def test_a_socket_that_listens_elsewhere_restarts_its_jobs_and_everything_else_of_it_is_live():
    jobs = job("sockets = ['web']") + job("", "b")
    web = "[sockets.web]\nlisten = '*:80'\n"
    assert plan(jobs + web, jobs + "[sockets.web]\nlisten = '*:81'\n") == Plan(
        restarted=("a",), notes=("sockets.web.listen: listens anew",)
    )
    assert plan(jobs + web, jobs + web + "backlog = 3\n") == Plan(notes=("sockets.web.backlog: changed live",))
    assert plan(jobs + web, job("") + job("", "b")) == Plan(restarted=("a",), notes=("sockets.web: closed",))
    assert plan(job(""), job("") + web).notes == ("sockets.web: opened",)


def test_limits_compare_as_pairs():
    assert Limit.parse(3) == (3, 3) == Limit.parse([3, 3])
