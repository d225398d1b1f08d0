"""What a file can say of policies: keys of a job, `[limits]`, and what is refused of them."""
# ruff: noqa: E501 - the messages are long, and stand here as they are read

from pathlib import Path

import pytest

from supervisor import config
from supervisor.config import Config, difference, preflight, schema
from supervisor.errors import SpecError
from supervisor.policies import BreakerSpec, BulkheadSpec, LimitSpec, RateSpec, RetrySpec
from supervisor.spec import Rate, Seconds


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text: str, **environ: str) -> Config:
        Path("supervisor.toml").write_text(text)
        return config.load(Path("supervisor.toml"), environ)

    return load


@pytest.fixture
def faults(load):
    def faults(text: str, **environ: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load(text, **environ)
        return str(caught.value).splitlines()

    return faults


def command(*keys: str) -> str:
    return "\n".join(("[jobs.a]", 'command = "true"', "once = true", *keys, ""))


def call(*keys: str) -> str:
    return "\n".join(("[jobs.a]", 'call = "m:f"', "once = true", *keys, ""))


LIMITS = """
[limits.db]
concurrency = 3
waiting = 10
rate = "100/s"
burst = 20
within = "5s"
breaker = { failures = 3 }
[limits.slow]
rate = 2
"""


def test_a_file_says_all_policies(load):
    loaded = load(
        LIMITS
        + command(
            'timeout = "30s"',
            'deadline = "5m"',
            'retry = { attempts = 3, initial = "2s", on = ["75", "SIGKILL", "TimedOut"], give_up_on = ["64"] }',
            'breaker = "db"',
            'rate = "slow"',
            'bulkhead = "db"',
            'fallback = "m:answer"',
        )
    )
    job = loaded.jobs["a"]
    assert (job.timeout, job.deadline, job.fallback) == (30.0, 300.0, "m:answer")
    assert job.retry == RetrySpec(attempts=3, initial=Seconds(2), on=("75", "SIGKILL", "TimedOut"), give_up_on=("64",))
    assert (job.breaker, job.rate, job.bulkhead) == ("db", "slow", "db")
    assert loaded.limits["db"] == LimitSpec(
        concurrency=3, waiting=10, rate=Rate(100), burst=20, within=Seconds(5), breaker=BreakerSpec(failures=3)
    )
    assert loaded.limits["slow"] == LimitSpec(rate=Rate(2))
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("breaker = {}", BreakerSpec()),
        ('breaker = { failures = 2, within = "10s", open_for = 5, successes = 1 }', BreakerSpec(failures=2, within=Seconds(10), open_for=Seconds(5), successes=1)),
        ('rate = "10/s"', RateSpec(rate=Rate(10))),
        ("rate = 0.5", RateSpec(rate=Rate(0.5))),
        ('rate = { rate = "10/m", burst = 3, within = "1s" }', RateSpec(rate=Rate(10 / 60), burst=3, within=Seconds(1))),
        ('rate = "${R}"', RateSpec(rate=Rate(7))),
        ("bulkhead = 3", BulkheadSpec(concurrency=3)),
        ('bulkhead = "${N}"', BulkheadSpec(concurrency=4)),
        ("bulkhead = { concurrency = 3, waiting = 0 }", BulkheadSpec(concurrency=3, waiting=0)),
    ],
)  # fmt: skip
def test_a_limit_of_ones_own_is_a_table_or_its_short_form(load, key, spec):
    job = load(command(key), R="7/s", N="4").jobs["a"]
    assert getattr(job, key.partition(" ")[0]) == spec


def test_the_name_of_a_limit_may_come_from_the_environment(load):
    assert load(LIMITS + command('rate = "${L}"', 'bulkhead = "db"'), L="slow").jobs["a"].rate == "slow"


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ("timeout = 0", "timeout: expected more than 0, got 0"),
        ("deadline = 0", "deadline: expected more than 0, got 0"),
        ("retry = 3", "retry: expected a table, got 3"),
        ("retry = { attempts = 0 }", "retry.attempts: expected at least 1, got 0"),
        ("retry = { attemps = 2 }", 'retry.attemps: unknown key; did you mean "attempts"?'),
        ('retry = { on = ["256"] }', 'retry.on[0]: expected an exit code from 0 to 255, or a signal such as "SIGKILL", got "256"'),
        ('retry = { on = ["SIGKIL"] }', 'retry.on[0]: expected an exit code from 0 to 255, or a signal such as "SIGKILL", got "SIGKIL"'),
        ('retry = { give_up_on = ["75", "OSError"] }', 'retry.give_up_on[1]: expected an exit code, a signal, or one of BreakerOpen, BulkheadFull, RateLimited, Rejected, SpawnFailed, TimedOut, got "OSError"'),
        ("breaker = 3", "breaker: expected the name of a limit or a table, got 3"),
        ('breaker = "a b"', 'breaker: expected the name of a limit or a table, got "a b"'),
        ("breaker = { failures = 0 }", "breaker.failures: expected at least 1, got 0"),
        ('rate = "fast/s"', 'rate: expected a rate above 0 such as "100/s", "30/m" or "10/h", or a number of times a second, got "fast/s"'),
        ("rate = 0", 'rate: expected a rate above 0 such as "100/s", "30/m" or "10/h", or a number of times a second, got 0'),
        ("rate = {}", 'rate: "rate" is missing: how many may begin in a time'),
        ('rate = { rate = "1/s", burst = 0 }', "rate.burst: expected at least 1, got 0"),
        ("bulkhead = 0", "bulkhead: expected at least 1, got 0"),
        ("bulkhead = 1.5", "bulkhead: expected an integer, got 1.5"),
        ("bulkhead = {}", 'bulkhead: "concurrency" is missing: how many at the same time'),
        ('fallback = "m.f"', 'fallback: expected "module:function", got "m.f"; did you mean "m:f"?'),
    ],
)  # fmt: skip
def test_a_fault_of_a_policy_is_told_alone(faults, keys, fault):
    [line] = faults(command(keys))
    assert line == f"supervisor.toml:4:{line.split(':')[2]}: jobs.a.{fault}"


def test_failures_of_a_function_are_exceptions(load, faults):
    names = '["ConnectionError", "httpx:TransportError", "a.b:C.D", "TimedOut"]'
    assert load(call(f"retry = {{ on = {names} }}")).jobs["a"].retry.on[1] == "httpx:TransportError"
    assert [
        line.partition("retry.")[2] for line in faults(call('retry = { on = ["75", "a b"], give_up_on = ["SIGKILL"] }'))
    ] == [
        'on[0]: expected an exception: exit codes and signals are a command\'s, got "75"',
        'on[1]: expected an exception such as "ConnectionError" or "httpx:TransportError", got "a b"',
        'give_up_on[0]: expected an exception: exit codes and signals are a command\'s, got "SIGKILL"',
    ]


def test_a_service_has_no_policies(faults):
    text = '[jobs.a]\ncommand = "true"\ntimeout = 1\ndeadline = 2\nretry = {}\nbreaker = {}\nrate = 1\nbulkhead = 1\nfallback = "m:f"\n'
    no_end = "a service has no end: use restart"
    runs = "only for runs that end: once, every, cron, queue. The code of a service can use `supervisor.policies` itself"
    assert faults(text) == [
        f"supervisor.toml:3:1: jobs.a.timeout: {no_end}",
        f"supervisor.toml:4:1: jobs.a.deadline: {no_end}",
        f"supervisor.toml:5:1: jobs.a.retry: {no_end}",
        f"supervisor.toml:6:1: jobs.a.breaker: {runs}",
        f"supervisor.toml:7:1: jobs.a.rate: {runs}",
        f"supervisor.toml:8:1: jobs.a.bulkhead: {runs}",
        f"supervisor.toml:9:1: jobs.a.fallback: {runs}",
    ]


def test_what_kind_of_job_it_is_to_be_is_asked_before_its_policies(faults):
    assert faults('[jobs.a]\ncommand = "true"\nevery = "soon"\ntimeout = 1\n') == [
        'supervisor.toml:3:1: jobs.a.every: expected a duration such as "250ms", "10s" or "1h30m", or a number of seconds, got "soon"'
    ]


def test_names_of_limits_are_looked_up(faults):
    text = LIMITS + command('breaker = "slow"', 'rate = "slwo"', 'bulkhead = "slow"')
    assert faults(text) == [
        'supervisor.toml:14:1: jobs.a.breaker: the limit "slow" (supervisor.toml:9:9) has no `breaker`',
        'supervisor.toml:15:1: jobs.a.rate: no limit "slwo" in [limits]; did you mean "slow"?',
        'supervisor.toml:16:1: jobs.a.bulkhead: the limit "slow" (supervisor.toml:9:9) has no `concurrency`',
    ]


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ("", "1:9: limits.x: what does it limit? expected `concurrency`, `rate` or `breaker`"),
        ("burst = 2\nconcurrency = 1", "2:1: limits.x.burst: only with `rate`"),
        ("waiting = 2\nrate = 1", "2:1: limits.x.waiting: only with `concurrency`"),
        ("within = 2\nbreaker = {}", "2:1: limits.x.within: only with `concurrency` or `rate`"),
        ("concurency = 2", '2:1: limits.x.concurency: unknown key; did you mean "concurrency"?'),
        ("concurrency = 0", "2:1: limits.x.concurrency: expected at least 1, got 0"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(faults, keys, fault):
    assert faults(f"[limits.x]\n{keys}\n") == [f"supervisor.toml:{fault}"]


def test_a_limit_has_a_name(faults):
    assert faults('[limits."a b"]\nrate = 1\n') == [
        'supervisor.toml:1:9: limits."a b": a name has only letters, digits, "-" and "_", and at most 64 of them'
    ]


def test_what_is_hardly_meant_is_warned_about(load):
    text = LIMITS + command('timeout = "1m"', 'deadline = "30s"', 'retry = { initial = "10s", max = "1s" }', 'rate = "slow"')
    assert [str(warning) for warning in load(text).warnings] == [
        "supervisor.toml:2:9: warning: limits.db: no job uses it: a job names it in `breaker`, `rate` or `bulkhead`",
        "supervisor.toml:14:1: warning: jobs.a.timeout: longer than the deadline of the whole run (30 s): it is never reached",
        "supervisor.toml:16:28: warning: jobs.a.retry.max: max (1 s) is shorter than initial (10 s): it is the longest wait",
    ]


def test_defaults_of_policies_reach_the_jobs_that_end(load):
    loaded = load(
        """
        [defaults]
        timeout = "30s"
        retry = { attempts = 3 }
        [jobs.service]
        command = "x"
        [jobs.once]
        command = "x"
        once = true
        retry = { initial = "5s" }
        [jobs.tick]
        call = "m:f"
        every = 1
        """
    )
    service, once, tick = loaded.jobs.values()
    assert (service.timeout, service.retry) == (None, None)
    assert (once.timeout, once.retry) == (30.0, RetrySpec(attempts=3, initial=Seconds(5)))
    assert (tick.timeout, tick.retry) == (30.0, RetrySpec(attempts=3))


def test_a_configuration_built_in_python_is_told_of_limits_that_are_not_there(tmp_path):
    mapping = {"jobs": {"a": {"call": "m:f", "once": True, "rate": "db"}}}
    with pytest.raises(SpecError, match=r'jobs\.a\.rate: no limit "db" in \[limits\]'):
        config.from_mapping(mapping, tmp_path, {})


def test_policies_and_limits_change_live(load):
    before = load(LIMITS + command('rate = "slow"', 'bulkhead = "db"', "timeout = 1"))
    after = load(LIMITS.replace("burst = 20", "burst = 30") + command('rate = "5/s"', 'bulkhead = "db"', "timeout = 2"))
    plan = difference.diff(before, after)
    assert (plan.changed, plan.restarted, plan.notes) == (("a",), (), ("limits.db.burst: changed live",))


# -- the function of a fallback ----------------------------------------------------------------------------------------


ANSWERS = """
def f(x: int) -> None: ...
def failure_only(failure: Exception) -> None: ...
async def both(failure: Exception, x: int) -> None: ...
def neither() -> None: ...
def anything(**args) -> None: ...
def another(y: int) -> None: ...
def wrong(x: str) -> None: ...
class Answer: ...
"""


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("failure_only", ""),
        ("both", ""),
        ("neither", ""),
        ("anything", ""),
        ("another", '"y" is missing: the function has no default for it'),
        ("wrong", "the function expects str, got int"),
        ("Answer", "a class: expected a function"),
        ("boht", '"work" has no "boht"; did you mean "both"?'),
    ],
)
def test_the_function_of_a_fallback_is_looked_at(load, name, fault):
    Path("work.py").write_text(ANSWERS)
    text = f'[jobs.a]\ncall = "work:f"\nargs = {{ x = 1 }}\nonce = true\nfallback = "work:{name}"\n'
    told = [str(problem) for problem in preflight.check(load(text)).all_problems]
    assert told == ([f"supervisor.toml:5:1: jobs.a.fallback: {fault}"] if fault else [])


# -- what is told of the keys ------------------------------------------------------------------------------------------


def test_a_short_form_is_explained():
    text = schema.explain("jobs.rate")
    assert "the name of a limit, a rate or a table" in text
    assert "only for runs that end" in text
    assert schema.explain("jobs.bulkhead.concurrency").startswith("jobs.bulkhead.concurrency\n  how many at the same time")
    assert schema.explain("limits").startswith("[limits.NAME]\n  limits, [limits.NAME], that jobs share")


def test_editors_know_the_short_form():
    keys = schema.json_schema()["properties"]["jobs"]["additionalProperties"]["properties"]
    assert keys["rate"]["type"] == ["number", "object", "string"]
    assert keys["bulkhead"]["type"] == ["integer", "object", "string"]
    assert keys["breaker"]["type"] == ["object", "string"]
    assert keys["rate"]["required"] == ["rate"]
