"""What a file can say of queues, and of the jobs that handle their items."""
# ruff: noqa: E501 - the messages are long, and stand here as they are read

from pathlib import Path

import pytest

from supervisor import config
from supervisor.config import Config, from_mapping, preflight, schema
from supervisor.errors import SpecError
from supervisor.kinds.job import JobSpec
from supervisor.queues import QUEUES, Scheme, shown_backend
from supervisor.queues.spec import AutoscaleSpec, BatchSpec, QueueSpec, UniqueSpec
from supervisor.spec import Rate, RestartType, Seconds

PASSWORD = "hunter2"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write a file in the current directory and load it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, environ: dict[str, str] | None = None) -> Config:
        Path("supervisor.toml").write_text(text)
        return config.load(Path("supervisor.toml"), environ or {})

    return load


@pytest.fixture
def faults(load):
    """The faults of a text, a line each, without the name of the file."""

    def faults(text: str, environ: dict[str, str] | None = None) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load(text, environ)
        return [line.removeprefix("supervisor.toml:") for line in str(caught.value).splitlines()]

    return faults


@pytest.fixture
def warnings(load):
    """The warnings of a text, the same."""
    return lambda text, environ=None: [
        str(warning).removeprefix("supervisor.toml:").replace(" warning:", "") for warning in load(text, environ).warnings
    ]


def queue(keys: str = "", name: str = "q") -> str:
    return f"[queues.{name}]\n{keys}\n"


def job(keys: str, name: str = "a", what: str = 'call = "m:f"') -> str:
    return f'[jobs.{name}]\n{what}\nqueue = "q"\n{keys}\n'


# what is read


def test_a_queue_has_its_words(load):
    loaded = load(
        queue(
            'backend = "memory"\nsize = 5\npriorities = ["now", "later"]\nfair = true\nexpire = "1h"\nrate = "100/s"\n'
            'concurrency = 3\nper_key = 2\nkeep_results = "1d"\nunique = { by = ["path"], for = "10m", on_conflict = "merge" }'
        )
        + job('batch = { size = 10, within = "1s" }\nserialize_by = "customer"\nworkers = { max = 4 }\ninto = "q"')
    )
    assert loaded.queues["q"] == QueueSpec(
        backend="memory",
        size=5,
        priorities=("now", "later"),
        fair=True,
        expire=Seconds(3600),
        rate=Rate(100),
        concurrency=3,
        per_key=2,
        keep_results=Seconds(86400),
        unique=UniqueSpec(by=("path",), lifetime=Seconds(600), on_conflict="merge"),
    )
    spec = loaded.jobs["a"]
    assert (spec.queue, spec.into, spec.serialize_by) == ("q", "q", "customer")
    assert spec.batch == BatchSpec(size=10, within=Seconds(1)) and spec.workers == AutoscaleSpec(min=1, max=4)
    assert spec.pooled and not spec.service and spec.restart_type is RestartType.PERMANENT


@pytest.mark.parametrize(("said", "meant"), [("queued", "queued"), ("running", "running"), ("5s", Seconds(5))])
def test_a_key_is_taken_for_a_time_or_until_something_happens(load, said, meant):
    assert load(queue(f'unique = {{ for = "{said}" }}') + job("")).queues["q"].unique == UniqueSpec(lifetime=meant)


def test_a_number_will_do_for_a_batch_and_for_workers(load):
    spec = load(queue() + job("batch = 20\nworkers = 3")).jobs["a"]
    assert spec.batch == BatchSpec(size=20) and spec.workers == 3
    assert (spec.first_workers, spec.grouped) == (3, True)


def test_what_is_scaled_begins_with_the_least_and_at_least_one():
    assert JobSpec(workers=AutoscaleSpec(min=0, max=3)).first_workers == 1
    assert JobSpec(workers=AutoscaleSpec(min=2, max=3)).first_workers == 2
    assert JobSpec(workers=AutoscaleSpec(min=1, max=1)).grouped


def test_an_expansion_fits_all_these_shapes(load):
    text = queue('backend = "${B}"\nunique = { for = "${U}" }') + job('batch = "${N}"\nworkers = "${W}"')
    loaded = load(text, {"B": "memory", "U": "10s", "N": "7", "W": "{ min = 1, max = 2 }"})
    assert loaded.queues["q"].unique == UniqueSpec(lifetime=Seconds(10)) and loaded.queues["q"].backend == "memory"
    assert loaded.jobs["a"].batch == BatchSpec(size=7) and loaded.jobs["a"].workers == AutoscaleSpec(min=1, max=2)


# what is refused


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (
            'backend = "sqllite"',
            '2:1: queues.q.backend: expected "sqlite", "memory", or a URL such as "postgresql://user@host/database" or "redis://host:6379/0", got "sqllite"; did you mean "sqlite"?',
        ),
        ('backend = "sqlite:///x"', '2:1: queues.q.backend: expected just "sqlite", got "sqlite:///x"'),
        ('backend = "redis"', '2:1: queues.q.backend: expected a URL such as "redis://host:6379/0", got "redis"'),
        (
            'backend = "redis://host:port"',
            '2:1: queues.q.backend: expected a URL such as "redis://host:6379/0", got "redis://host:port"',
        ),
        (
            'backend = "redis://host/db"',
            '2:1: queues.q.backend: expected a URL such as "redis://host:6379/0", got "redis://host/db"',
        ),
        ('backend = "redis:///0"', '2:1: queues.q.backend: expected a URL such as "redis://host:6379/0", got "redis:///0"'),
        (
            f'backend = "postgresql://me:{PASSWORD}@h:x/d"',
            '2:1: queues.q.backend: expected a URL such as "postgresql://user@host/database", got "postgresql://me:***@h:x/d"',
        ),
        (
            f'backend = "postgresql://me:a#{PASSWORD}@h/d"',
            '2:1: queues.q.backend: a "#" or "/" in a name or a password is written "%23" or "%2F", got "postgresql://me:***@h/d"',
        ),
        (
            f'backend = "postgre://me:{PASSWORD}@h/d"',
            '2:1: queues.q.backend: expected "sqlite", "memory", or a URL such as "postgresql://user@host/database" or "redis://host:6379/0", got "postgre://me:***@h/d"; did you mean "postgres"?',
        ),
        ("size = 0", "2:1: queues.q.size: expected at least 1, got 0"),
        ('lease = "10ms"', '2:1: queues.q.lease: expected at least 1, got "10ms"'),
        ("priorities = []", "2:1: queues.q.priorities: expected at least one"),
        ('priorities = ["a", "b", "a"]', '2:25: queues.q.priorities[2]: "a" is listed twice'),
        ('priorities = ["a b"]', '2:15: queues.q.priorities[0]: a name has letters, digits, - and _, got "a b"'),
        (
            'unique = { for = "runing" }',
            '2:12: queues.q.unique.for: expected "queued", "running" or a duration, got "runing"; did you mean "running"?',
        ),
        (
            'unique = { for = "soon" }',
            '2:12: queues.q.unique.for: expected a duration such as "250ms", "10s" or "1h30m", or a number of seconds, got "soon"',
        ),
        (
            'unique = { lifetime = "1s" }',
            "2:12: queues.q.unique.lifetime: unknown key",
        ),
        ('backnd = "memory"', '2:1: queues.q.backnd: unknown key; did you mean "backend"?'),
    ],
)
def test_what_a_queue_cannot_be(faults, keys, fault):
    assert faults(queue(keys) + job("")) == [fault]


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ("once = true", "once: either `queue` or `once`, not both"),
        (
            "every = 5",
            "every: not with `queue`: each daemon would have times of its own; `cron` makes one item at a time for all of them",
        ),
        ('restart = "transient"', "restart: not on a job with `queue`: the next run comes from the queue: use retry"),
        ("ready = { notify = true }", "ready: not on a job with `queue`: a worker is ready when it takes items"),
        (
            'health = { tcp = "h:1" }',
            "health: not on a job with `queue`: how an item fares is seen of the item: use timeout",
        ),
        ('overlap = "queue"', "overlap: only for a job with `every` or `cron`"),
        ("run_on_start = true", "run_on_start: only for a job with `every` or `cron`"),
        ("batch = 0", "batch: expected at least 1, got 0"),
        ('batch = "many"', 'batch: expected an integer, got "many"'),
        ('serialize_by = ""', 'serialize_by: expected the name of a field, got ""'),
        ("workers = 0", "workers: expected at least 1, got 0"),
        ("workers = { min = 1 }", 'workers: "max" is missing: so many at most'),
        ("recycle = {}", "recycle: expected `age`, `memory` or both, or `runs`"),
        ('into = "qq"', 'into: no queue "qq" in [queues]; did you mean "q"?'),
        (
            "significant = true",
            'significant: a permanent child has no end that could count: use restart = "transient" or "temporary"',
        ),
    ],
)
def test_what_a_queue_job_cannot_say(faults, keys, fault):
    assert faults(queue() + job(keys)) == [f"6:1: jobs.a.{fault}"]


def test_a_terminal_gives_no_items(faults):
    text = queue() + '[jobs.a]\ncommand = ["x"]\ntty = true\ninto = "q"'
    assert "6:1: jobs.a.into: not with `tty`: a terminal mixes what is printed with what is typed" in faults(text)


def test_each_time_of_a_schedule_is_one_item(faults):
    assert faults(queue() + job('cron = "* * * * *"\nrun_on_start = true')) == [
        "7:1: jobs.a.run_on_start: not on a job with `queue`: each time of its schedule is one item, for all daemons; for "
        "another use submit"
    ]


def test_workers_that_scale_have_sensible_bounds(faults):
    assert faults(queue() + job("workers = { min = 3, max = 2 }")) == [
        "6:13: jobs.a.workers.min: expected at most max (2), got 3"
    ]
    assert faults(queue() + job("workers = { max = 2000 }")) == ["6:13: jobs.a.workers.max: expected at most 1000, got 2000"]
    assert faults('[jobs.a]\ncommand = "true"\nworkers = { max = 2 }') == [
        "3:1: jobs.a.workers: only with `queue`: how much work there is, a queue can tell; expected a number"
    ]


@pytest.mark.parametrize("key", ["batch = 3", 'serialize_by = "x"'])
def test_what_only_a_queue_job_can_say(faults, key):
    (fault,) = faults(f'[jobs.a]\ncommand = "true"\n{key}')
    assert fault == f"3:1: jobs.a.{key.split(' ')[0]}: only for a job with `queue`"


@pytest.mark.parametrize("key", ['stdin = "pipe"', "tty = true"])
def test_the_item_is_the_input_of_a_command(faults, key):
    assert faults(queue() + job(key, what='command = "cat"')) == [
        f"6:1: jobs.a.{key.split(' ')[0]}: not on a job with `queue`: the item is its input"
    ]


def test_a_command_loads_its_code_anew_for_each_item(faults, load):
    assert faults(queue() + job('watch = ["*.py"]', what='command = "cat"')) == [
        "6:1: jobs.a.watch: not on a job with `queue` and `command`: each of its runs starts anew anyway"
    ]
    assert load(queue() + job('watch = ["*.py"]', what='call = "m:f"\nkind = "process"')).jobs["a"].watch


def test_a_name_that_no_queue_has_gets_a_suggestion(faults):
    assert faults(queue(name="images") + job("").replace('"q"', '"image"')) == [
        '5:1: jobs.a.queue: no queue "image" in [queues]; did you mean "images"?'
    ]


def test_the_jobs_of_a_queue_agree_about_its_groups(faults, load):
    assert faults(queue() + job('serialize_by = "x"') + job('serialize_by = "y"', "b")) == [
        '10:1: jobs.b.serialize_by: "a" (supervisor.toml:3:7) has serialize_by = "x": the jobs of a queue ("q") must agree'
    ]
    assert faults(queue() + job("") + job('serialize_by = "y"', "b")) == [
        '10:1: jobs.b.serialize_by: "a" (supervisor.toml:3:7) has no `serialize_by`: the jobs of a queue ("q") must agree'
    ]
    assert faults(queue() + job('serialize_by = "x"') + job("", "b")) == [
        '7:7: jobs.b: "a" (supervisor.toml:3:7) has serialize_by = "x": the jobs of a queue ("q") must agree'
    ]
    assert load(queue() + job('serialize_by = "x"') + job('serialize_by = "x"', "b"))


def test_policies_and_a_calendar_are_a_queue_jobs_too(load):
    spec = load(
        queue()
        + job('timeout = 1\ndeadline = 5\nretry = { attempts = 3 }\nrate = "5/s"\nbreaker = {}\nbulkhead = 2\nfallback = "m:g"')
        + job('cron = "@daily"\njitter = "1s"\ntimezone = "Europe/Berlin"', "b")
    ).jobs
    assert spec["a"].policies and spec["b"].pooled and not spec["b"].scheduled and spec["b"].cron == "@daily"


def test_a_time_of_the_calendar_is_an_item_of_its_own(faults):
    assert faults(queue() + job('cron = "@daily"\noverlap = "skip"')) == [
        "7:1: jobs.a.overlap: not on a job with `queue`: each time of its schedule is an item of its own"
    ]


def test_specs_that_were_built_in_python_are_looked_at_too(tmp_path):
    built = Config(None, tmp_path, jobs={"a": JobSpec(call="m:f", queue="p")}, queues={"q": QueueSpec(backend="nosuch")})
    with pytest.raises(SpecError) as caught:
        config.check(built)
    assert 'no queue "p"' in str(caught.value) and 'got "nosuch"' in str(caught.value)


# what is warned of


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (queue(), "1:9: queues.q: no job uses it: a job names it in `queue` or `into`"),
        (
            queue() + '[jobs.a]\ncall = "m:f"\ninto = "q"',
            "1:9: queues.q: no job handles its items: a job names it in `queue`",
        ),
        (queue('backend = "redis://h/0"') + '[jobs.a]\ncall = "m:f"\ninto = "q"', None),
        (queue('lease = "5s"') + job(""), '2:1: queues.q.lease: does nothing: what is kept in "sqlite" no other daemon has'),
        (queue('priorities = ["one"]\nfair = true') + job(""), "3:1: queues.q.fair: does nothing: there is only one priority"),
        (
            queue() + queue('backend = "memory"', "m") + job('into = "m"') + job("", "b").replace('"q"', '"m"'),
            '8:1: jobs.a.into: "m" is in memory: what it holds is gone with the daemon, and "q" knows no more of it',
        ),
        (
            queue() + job('into = "q"'),
            "6:1: jobs.a.into: a circle of queues: q -> q: an item goes round until a job of it gives nothing",
        ),
        (
            queue() + queue(name="m") + job('into = "m"') + job('into = "q"', "b").replace('queue = "q"', 'queue = "m"'),
            "8:1: jobs.a.into: a circle of queues: q -> m -> q: an item goes round until a job of it gives nothing",
        ),
        (
            queue('backend = "redis://h/0"\nkeep_results = "30s"') + job('cron = "* * * * *"'),
            '7:1: jobs.a.cron: keep_results of "q" (30 s) is short: a daemon that is later than that makes a second item',
        ),
        (queue('keep_results = "30s"') + job('cron = "* * * * *"'), None),
        (
            queue() + job("retry = { attempts = 2 }") + job("", "b"),
            '7:7: jobs.b: an item has 5 attempts here, and 2 with "a" of the same queue: it is dead for whoever has fewer',
        ),
        (queue() + job("retry = { attempts = 5 }") + job("", "b"), None),
    ],
)
def test_what_can_run_but_is_hardly_meant(warnings, text, warning):
    assert warnings(text) == ([warning] if warning else [])


# defaults


def test_defaults_reach_queue_jobs_where_they_apply(load):
    loaded = load(
        queue()
        + """
        [defaults]
        restart = "permanent"
        ready = { notify = true }
        health = { notify = true }
        stdin = "pipe"
        batch = 5
        serialize_by = "k"
        timeout = 3
        workers = { max = 3 }
        recycle = { runs = 100 }
        [jobs.a]
        call = "m:f"
        queue = "q"
        [jobs.b]
        command = "cat"
        queue = "q"
        [jobs.service]
        command = "serve"
        """
    ).jobs
    assert loaded["a"].batch == BatchSpec(size=5) and loaded["a"].timeout == 3 and loaded["a"].recycle.runs == 100
    assert loaded["a"].restart is None and loaded["a"].ready is None and loaded["a"].health is None
    assert loaded["b"].stdin == "null" and loaded["b"].workers == AutoscaleSpec(max=3)
    service = loaded["service"]
    assert service.batch is None and service.timeout is None and service.workers == 1 and service.recycle is None
    assert service.stdin == "pipe" and service.restart is RestartType.PERMANENT


def test_a_queue_for_all_is_for_those_that_have_no_time_of_their_own(load):
    loaded = load(queue() + '[defaults]\nqueue = "q"\n[jobs.a]\ncall = "m:f"\n[jobs.b]\ncall = "m:f"\nevery = 5').jobs
    assert loaded["a"].pooled and not loaded["b"].pooled and loaded["b"].scheduled


# secrets


@pytest.mark.parametrize(
    ("backend", "shown"),
    [
        ("sqlite", "sqlite"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        (f"redis://:{PASSWORD}@h/0", "redis://:***@h/0"),
        (f"redis://me:{PASSWORD}@h/0", "redis://me:***@h/0"),
        (f"postgresql://me:a/b@{PASSWORD}@h/d", "postgresql://me:***@h/d"),
        (f"postgresql://me@h/d?password={PASSWORD}&x=1", "postgresql://me@h/d?password=***&x=1"),
        (f"postgresql://me@h/d?sslpassword={PASSWORD}", "postgresql://me@h/d?sslpassword=***"),
    ],
)
def test_a_password_is_never_shown(backend, shown):
    assert shown_backend(backend) == shown and PASSWORD not in shown


def test_of_an_expansion_the_text_of_the_file_is_shown(load):
    loaded = load(queue('backend = "redis://:${PW}@h/0"') + job(""), {"PW": PASSWORD})
    assert loaded.queues["q"].backend == f"redis://:{PASSWORD}@h/0"
    assert shown_backend(loaded.queues["q"].backend) == "redis://:***@h/0"
    whole = load(queue('backend = "${URL}"') + job(""), {"URL": f"redis://:{PASSWORD}@h/0"})
    assert shown_backend(whole.queues["q"].backend) == "${URL}"


def test_a_fault_in_an_expansion_gives_nothing_away(faults):
    text = queue('backend = "${URL}"') + job("")
    assert faults(text, {"URL": f"redis://:{PASSWORD}@h:x/0"}) == [
        '2:1: queues.q.backend: expected a URL such as "redis://host:6379/0", got "${URL}"'
    ]


# the machine, the reload and the pages


def test_an_engine_whose_client_is_not_installed_is_a_fault_of_the_machine(load, monkeypatch):
    loaded = load(queue('backend = "redis://h/0"') + job("", what='command = "cat"'))
    assert preflight.check(loaded, imports=False).all_problems == []
    monkeypatch.setitem(QUEUES, "redis", Scheme("nosuch", "redis", "no_such_library"))
    (problem,) = preflight.check(loaded, imports=False).all_problems
    assert str(problem) == (
        "supervisor.toml:2:1: queues.q.backend: its client is not installed: pip install 'trio-supervisor[redis]'"
    )


@pytest.mark.parametrize(
    ("backend", "fault"),
    [
        ("redis://h/0?colour=red", 'redis://: there is no parameter "colour"'),
        ("redis://h/0?ssl_ca_certs=/x", 'redis://: there is no parameter "ssl_ca_certs"; TLS is rediss://'),
        ("rediss://h?ssl_ca_cert=/x", 'rediss://: there is no parameter "ssl_ca_cert"; did you mean "ssl_ca_certs"?'),
        ("rediss://h?ssl_ca_certs=/nowhere", "ssl_ca_certs: there is no file /nowhere"),
        ("redis+unix:///run/redis.sock?db=1", ""),
        (f"postgresql://me:{PASSWORD}@h/d?sslmod=require", 'there is no parameter "sslmod"; did you mean "sslmode"?'),
        ("postgresql://h/d?sslmode=require&target_session_attrs=read-write", ""),
    ],
)
def test_a_parameter_of_a_url_that_there_is_not_is_a_fault(load, backend, fault):
    loaded = load(queue(f'backend = "{backend}"') + job("", what='command = "cat"'))
    problems = [str(each) for each in preflight.check(loaded, imports=False).all_problems]
    if fault:
        (problem,) = problems
        assert problem.startswith("supervisor.toml:2:1: queues.q.backend: ") and fault in problem and PASSWORD not in problem
    else:
        assert problems == []


def test_a_reload_says_what_becomes_of_queues(tmp_path):
    def of(**queues: dict[str, object]) -> Config:
        jobs = {name: {"call": "m:f", "queue": name} for name in queues}
        return from_mapping({"queues": queues, "jobs": jobs}, tmp_path, {})

    plan = config.diff(of(a={"size": 5}, b={}, c={}), of(a={"size": 6}, b={"backend": "memory"}, d={}))
    assert plan.notes == (
        "queues.a.size: changed live",
        "queues.b.backend: needs a restart of the daemon; the rest is applied",
        "queues.d: opened",
        "queues.c: closed; what is in it stays",
    )
    assert plan.restarted == ()


def test_an_editor_knows_what_may_stand_there():
    properties = schema.json_schema()["properties"]
    unique = properties["queues"]["additionalProperties"]["properties"]["unique"]["properties"]
    assert unique["for"]["type"] == ["string", "number"] and "queued|running" in unique["for"]["pattern"]
    keys = properties["jobs"]["additionalProperties"]["properties"]
    assert keys["workers"]["type"] == ["integer", "object", "string"] and keys["workers"]["minimum"] == 1
    assert "max" in keys["workers"]["properties"] and keys["batch"]["type"] == ["integer", "object", "string"]
