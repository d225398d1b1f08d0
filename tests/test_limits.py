"""What limits the runs of jobs: breakers, rates and places, of a job alone or shared by name. In virtual time."""

from __future__ import annotations

import pytest
import trio
from msgspec.structs import replace

from supervisor.errors import ControlError
from supervisor.events import AttemptStarting, BreakerChanged, Ended, Ready, Retrying, Starting, WaitingForLimit, fold
from supervisor.kinds import Context, JobSpec
from supervisor.policies import BreakerSpec, BulkheadSpec, LimitSpec, RateSpec, RetrySpec
from supervisor.spec import Rate, RestartType, Seconds
from supervisor.state import BreakerStatus, BulkheadStatus, LimitStatus, RateStatus, State
from tests.forest import Forest, crash, forest, job, lasting, settle

ONCE = {"once": True, "restart": RestartType.TEMPORARY}


def breaker(failures: int = 3, within: float = 60, open_for: float = 30, successes: int = 1) -> BreakerSpec:
    return BreakerSpec(failures=failures, within=Seconds(within), open_for=Seconds(open_for), successes=successes)


def rate(text: str, **keys: object) -> RateSpec:
    return RateSpec(rate=Rate.parse(text), **keys)


def ends(f: Forest, name: str) -> list[tuple[float, str]]:
    return [(at, event.exit.reason) for at, event in f.history if isinstance(event, Ended) and event.name == name]


def changes(f: Forest) -> list[tuple[float, str, str, str]]:
    return [(at, event.limit, event.was, event.now) for at, event in f.history if isinstance(event, BreakerChanged)]


def waits(f: Forest) -> list[tuple[float, str, str]]:
    return [(at, event.name, event.cause) for at, event in f.history if isinstance(event, WaitingForLimit)]


class Weather:
    """Work that fails while it is bad."""

    def __init__(self, bad: bool) -> None:
        self.bad = bad
        self.calls = 0

    async def work(self) -> None:
        self.calls += 1
        if self.bad:
            raise RuntimeError("boom")


# ---- breaker ----


async def test_a_breaker_remembers_between_runs_and_opens(autojump_clock, tmp_path):
    weather = Weather(bad=True)
    async with forest(tmp_path, {"a": job(weather.work, every=5, breaker=breaker(3))}) as f:
        await trio.sleep_until(41)
        assert weather.calls == 3
        assert changes(f) == [(15.0, "jobs.a", "closed", "open")]
        assert ends(f, "a")[2:5] == [
            (15.0, "RuntimeError: boom"),
            (20.0, "circuit breaker is open: 3 failures within 60 s, the last: RuntimeError: boom"),
            (25.0, "circuit breaker is open: 3 failures within 60 s, the last: RuntimeError: boom"),
        ]
        assert all(event.failed for event in f.events(Ended))
        weather.bad = False
        await trio.sleep_until(52)
        assert changes(f)[1:] == [(45.0, "jobs.a", "open", "half-open"), (45.0, "jobs.a", "half-open", "closed")]
        assert ends(f, "a")[-2:] == [(45.0, "completed"), (50.0, "completed")]
        assert fold(event for _, event in f.history) == f.tree.journal.table


async def test_a_schedule_whose_breaker_is_open_says_so(autojump_clock, tmp_path):
    weather = Weather(bad=True)
    async with forest(tmp_path, {"a": job(weather.work, every=5, breaker=breaker(3))}) as f:
        await trio.sleep_until(11)
        assert f.tree.status("a")[0].cause == "runs every 5s; the last run failed: RuntimeError: boom"
        await trio.sleep_until(16)
        row = f.tree.status("a")[0]
        assert row.word == "scheduled" and row.next_at is not None
        expected = "runs every 5s; breaker open: 3 failures within 60 s, the last: RuntimeError: boom; trial in {}"
        assert row.cause == expected.format("30s")
        await trio.sleep_until(26)
        assert f.tree.status("a")[0].cause == expected.format("20s")
        weather.bad = False
        await trio.sleep_until(46)
        assert f.tree.status("a")[0].cause == "runs every 5s"


async def test_a_breaker_that_is_half_open_says_how_far_it_is(autojump_clock, tmp_path):
    weather = Weather(bad=True)
    async with forest(tmp_path, {"a": job(weather.work, every=5, breaker=breaker(1, open_for=10, successes=3))}) as f:
        await trio.sleep_until(6)
        weather.bad = False
        await trio.sleep_until(16)
        assert f.tree.status("a")[0].cause == "runs every 5s; breaker half-open: 1 of 3 trials have succeeded"


async def test_retry_comes_back_when_the_breaker_says(autojump_clock, tmp_path):
    weather = Weather(bad=True)
    spec = job(weather.work, **ONCE, breaker=breaker(1), retry=RetrySpec(attempts=3, initial=Seconds(1), jitter=0.0))
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep(2)
        weather.bad = False
        await trio.sleep(60)
        assert [(at, round(event.wait, 6)) for at, event in f.history if isinstance(event, Retrying)] == [
            (0.0, 1.0),
            (1.0, 29.0),
        ]
        assert ends(f, "a") == [(30.0, "completed")]


async def test_timeouts_are_failures_and_cancels_are_none(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(100), every=10, timeout=3, breaker=breaker(2))}) as f:
        await trio.sleep_until(11)
        await f.tree.cancel("a")  # it cannot hear, and is cancelled at 21
        await trio.sleep_until(51)
        assert changes(f) == [(43.0, "jobs.a", "closed", "open")]


async def test_the_failures_of_those_who_share_a_breaker_count_together(autojump_clock, tmp_path):
    jobs = {name: job(crash, every=10, breaker="net") for name in "ab"}
    async with forest(tmp_path, jobs, limits={"net": LimitSpec(breaker=breaker(4))}) as f:
        await trio.sleep_until(21)
        assert [change[1:] for change in changes(f)] == [("limits.net", "closed", "open")]
        assert f.events(BreakerChanged)[0].cause == "4 failures within 60 s, the last: RuntimeError: boom"
        causes = {row.cause for row in f.tree.status()}
        assert causes == {"runs every 10s; breaker open: 4 failures within 60 s, the last: RuntimeError: boom; trial in 30s"}


async def test_whoever_shares_a_breaker_says_so_as_soon_as_it_opens_and_closes(autojump_clock, tmp_path):
    weather = Weather(bad=True)
    jobs = {"a": job(weather.work, every=10, breaker="net"), "b": job(crash, every=1000, breaker="net")}
    async with forest(tmp_path, jobs, limits={"net": LimitSpec(breaker=breaker(1))}) as f:
        await trio.sleep_until(12)
        assert "breaker open: 1 failures" in f.tree.status("b")[0].cause
        weather.bad = False
        await trio.sleep_until(42)
        assert f.tree.status("b")[0].cause == "runs every 1000s"


async def test_a_breaker_lets_one_trial_through_at_a_time(autojump_clock, tmp_path):
    weather = Weather(bad=True)

    async def slow() -> None:
        await trio.sleep(5)
        await weather.work()

    jobs = {name: job(slow, every=10, breaker="net") for name in "ab"}
    async with forest(tmp_path, jobs, limits={"net": LimitSpec(breaker=breaker(2, open_for=12))}) as f:
        await trio.sleep_until(36)
        # both fail at 15 and open it; at 20 both are rejected; at 30 one is on trial, and the other rejected
        assert weather.calls == 3
        reasons = sorted(ends(f, "a") + ends(f, "b"))
        assert [reason for at, reason in reasons if at == 30.0] == [
            "circuit breaker net is half-open, and its trial is under way"
        ]


async def test_runs_that_overlap_share_what_their_job_has(autojump_clock, tmp_path):
    async def slow() -> None:
        await trio.sleep(12)
        raise RuntimeError("boom")

    spec = job(slow, every=5, overlap="parallel", workers=3, breaker=breaker(2), bulkhead=BulkheadSpec(concurrency=2))
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep_until(16)
        assert [cause for _, _, cause in waits(f)] == ["waits for a place in its bulkhead: 2 in use, 0 before it"]
        await trio.sleep_until(23)
        assert [change[1:] for change in changes(f)] == [("jobs.a", "closed", "open")]
        assert "breaker open: 2 failures" in f.tree.journal.table["a"].cause
        assert [row.name for row in f.tree.limit_status()] == ["a"]


# ---- rate ----


async def test_attempts_begin_no_faster_than_the_rate(autojump_clock, tmp_path):
    f_limits = {"slow": LimitSpec(rate=Rate.parse("1/m"))}
    jobs = {name: job(lasting(1), **ONCE, rate="slow") for name in "abc"}
    async with forest(tmp_path, jobs, limits=f_limits) as f:
        await trio.sleep(10)
        assert sorted(f.word(name) for name in "abc") == ["completed", "starting", "starting"]
        assert sorted(cause for _, _, cause in waits(f)) == [
            "waits for rate slow: 0 before it, about 1m",
            "waits for rate slow: 1 before it, about 2m",
        ]
        waiting = [row for row in f.tree.status() if row.state is State.STARTING]
        assert all(row.cause.startswith("waits for rate slow") and row.next_at is not None for row in waiting)
        await trio.sleep(200)
        assert sorted(at for at, _ in f.happened(Ready)) == [0.0, 60.0, 120.0]
        assert all(row.next_at is None for row in f.tree.status())
        assert fold(event for _, event in f.history) == f.tree.journal.table


async def test_who_would_wait_too_long_for_its_turn_is_rejected_at_once(autojump_clock, tmp_path):
    spec = rate("1/m", within=Seconds(20))
    async with forest(tmp_path, {"a": job(lasting(1), every=10, rate=spec)}) as f:
        await trio.sleep_until(75)
        assert ends(f, "a") == [
            (11.0, "completed"),
            (20.0, "rate limit of 1/m: its turn is in 50 s, and it may wait 20 s"),
            (30.0, "rate limit of 1/m: its turn is in 40 s, and it may wait 20 s"),
            (40.0, "rate limit of 1/m: its turn is in 30 s, and it may wait 20 s"),
            (71.0, "completed"),  # begun at 50, it waited until 70
        ]
        assert waits(f) == [(50.0, "a", "waits for its rate: 0 before it, about 20s")]


async def test_a_place_in_the_queue_is_given_up_by_a_cancel_and_the_next_moves_up(autojump_clock, tmp_path):
    jobs = {name: job(lasting(1), **ONCE, rate="slow", start="manual") for name in "abc"}
    async with forest(tmp_path, jobs, limits={"slow": LimitSpec(rate=Rate.parse("1/m"))}) as f:
        for name in "abc":
            f.tree.order("start", [name])
            await settle()
        await trio.sleep(5)
        await f.tree.cancel("b")
        assert trio.current_time() == 5.0
        await trio.sleep(100)
        assert f.times(Ready, "c") == [60.0]


# ---- bulkhead ----


def crowd(names: str, **keys: object) -> dict[str, JobSpec]:
    return {name: job(lasting(10), **ONCE, bulkhead="db", start="manual", **keys) for name in names}


async def start_in_order(f: Forest, names: str) -> None:
    for name in names:
        f.tree.order("start", [name])
        await settle()


async def test_so_many_at_the_same_time_and_the_others_wait_in_order(autojump_clock, tmp_path):
    async with forest(tmp_path, crowd("abcde"), limits={"db": LimitSpec(concurrency=2)}) as f:
        await start_in_order(f, "abcde")
        assert waits(f) == [
            (0.0, "c", "waits for a place in bulkhead db: 2 in use, 0 before it"),
            (0.0, "d", "waits for a place in bulkhead db: 2 in use, 1 before it"),
            (0.0, "e", "waits for a place in bulkhead db: 2 in use, 2 before it"),
        ]
        assert f.words() == "a:running b:running c:starting d:starting e:starting"
        (row,) = f.tree.limit_status()
        assert row.bulkhead == BulkheadStatus(concurrency=2, in_use=2, may_wait=None, waiting=("c#1", "d#1", "e#1"))
        await trio.sleep(100)
        assert [f.times(Ready, name) for name in "abcde"] == [[0.0], [0.0], [10.0], [10.0], [20.0]]
        assert f.tree.limit_status()[0].bulkhead.in_use == 0


async def test_where_nobody_may_wait_the_next_is_turned_away(autojump_clock, tmp_path):
    async with forest(tmp_path, crowd("ab"), limits={"db": LimitSpec(concurrency=1, waiting=0)}) as f:
        await start_in_order(f, "ab")
        assert ends(f, "b") == [(0.0, "all 1 places of bulkhead db are taken, and nobody may wait")]
        assert waits(f) == []


async def test_a_place_is_not_held_between_attempts(autojump_clock, tmp_path):
    jobs = crowd("a") | {"b": job(crash, **ONCE, bulkhead="db", retry=RetrySpec(attempts=2, initial=Seconds(50), jitter=0.0))}
    async with forest(tmp_path, jobs, limits={"db": LimitSpec(concurrency=1)}) as f:
        await trio.sleep(5)
        await start_in_order(f, "a")
        assert f.word("a") == "running"


async def test_a_killed_run_gives_its_place_back(autojump_clock, tmp_path):
    async def ignoring(ctx: Context) -> None:
        await trio.sleep_forever()

    jobs = {"a": job(ignoring, **ONCE, bulkhead="db", grace=5)} | crowd("b")
    async with forest(tmp_path, jobs, limits={"db": LimitSpec(concurrency=1)}) as f:
        await start_in_order(f, "b")
        await f.tree.stop("a")
        await settle()
        assert f.word("b") == "running"
        await f.tree.stop("b", now=True)
        assert f.tree.limit_status()[0].bulkhead.in_use == 0


async def test_a_bulkhead_of_its_own_is_for_all_runs_of_a_job(autojump_clock, tmp_path):
    async with forest(tmp_path, {"a": job(lasting(3), every=5, bulkhead=BulkheadSpec(concurrency=1))}) as f:
        await trio.sleep_until(21)
        assert ends(f, "a") == [(8.0, "completed"), (13.0, "completed"), (18.0, "completed")]


# ---- the order of the layers ----


async def test_a_rejected_attempt_is_neither_a_failure_to_the_breaker_nor_does_it_take_a_token(autojump_clock, tmp_path):
    jobs = crowd("a") | {
        "b": job(lasting(1), every=2, bulkhead="db", rate=rate("1/h", burst=2), breaker=breaker(1)),
    }
    async with forest(tmp_path, jobs, limits={"db": LimitSpec(concurrency=1, waiting=0)}) as f:
        await start_in_order(f, "a")
        await trio.sleep_until(3)
        assert ends(f, "b") == [(2.0, "all 1 places of bulkhead db are taken, and nobody may wait")]
        assert changes(f) == []
        rows = {row.name: row for row in f.tree.limit_status()}
        assert rows["b"].breaker.failures == 0
        assert round(rows["b"].rate.tokens, 2) == 1.0  # the bulkhead is inside the rate: its turn had come


async def test_a_wait_is_told_once_and_the_next_attempt_begins_anew(autojump_clock, tmp_path):
    spec = job(crash, **ONCE, rate=rate("1/m"), retry=RetrySpec(attempts=3, initial=Seconds(1), jitter=0.0))
    async with forest(tmp_path, {"a": spec}) as f:
        await trio.sleep(200)
        assert waits(f) == [
            (1.0, "a", "waits for its rate: 0 before it, about 59s"),
            (62.0, "a", "waits for its rate: 0 before it, about 58s"),
        ]
        assert f.times(AttemptStarting, "a") == [1.0, 60.0, 62.0, 120.0]
        assert ends(f, "a") == [(120.0, "RuntimeError: boom")]


# ---- reload ----


async def test_new_numbers_apply_at_once_and_what_is_known_stays(autojump_clock, tmp_path):
    jobs = crowd("abc")
    async with forest(tmp_path, jobs, limits={"db": LimitSpec(concurrency=1)}) as f:
        await start_in_order(f, "abc")
        assert f.words() == "a:running b:starting c:starting"
        f.tree.apply(f.config(jobs, limits={"db": LimitSpec(concurrency=3)}))
        await settle()
        assert f.words() == "a:running b:running c:running"


async def test_a_breaker_stays_open_over_a_reload(autojump_clock, tmp_path):
    before = {"a": job(crash, every=5, breaker=breaker(3))}
    async with forest(tmp_path, before) as f:
        await trio.sleep_until(16)
        f.tree.apply(f.config({"a": job(crash, every=5, breaker=breaker(3, open_for=1000))}))
        await trio.sleep_until(101)
        assert len(changes(f)) == 1
        assert "trial in 915s" in f.tree.status("a")[0].cause


async def test_a_limit_that_leaves_the_file_is_kept_for_the_runs_that_have_it(autojump_clock, tmp_path):
    jobs = crowd("ab")
    async with forest(tmp_path, jobs, limits={"db": LimitSpec(concurrency=1)}) as f:
        await start_in_order(f, "ab")
        f.tree.apply(f.config({name: replace(spec, bulkhead=None) for name, spec in jobs.items()}))
        assert f.tree.limit_status() == []
        await trio.sleep(50)
        assert f.words() == "a:completed b:completed"
        assert f.times(Ready, "b") == [10.0]


async def test_a_run_that_began_with_a_breaker_ends_well_without_it(autojump_clock, tmp_path):
    async def slow() -> None:
        await trio.sleep(5)
        raise RuntimeError("boom")

    before = job(slow, **ONCE, breaker=breaker(1))
    async with forest(tmp_path, {"a": before}) as f:
        await trio.sleep(1)
        f.tree.apply(f.config({"a": replace(before, breaker=None)}))
        await trio.sleep(10)
        assert ends(f, "a") == [(5.0, "RuntimeError: boom")]
        assert (changes(f), f.tree.limit_status()) == ([], [])


# ---- what is told of them ----


async def test_all_limits_can_be_looked_at(autojump_clock, tmp_path):
    jobs = {
        "a": job(crash, every=5, breaker="net", rate=rate("1/s", burst=2)),
        "b": job(lasting(1), **ONCE, bulkhead="net"),
        "c": job(lasting(1), **ONCE),
    }
    async with forest(tmp_path, jobs, limits={"net": LimitSpec(breaker=breaker(2), concurrency=4)}) as f:
        await trio.sleep_until(12)
        shared, own = f.tree.limit_status()
        trial_at = shared.breaker.trial_at
        assert trial_at is not None and f.events(BreakerChanged)[0].next_at is not None
        assert shared == LimitStatus(
            name="net",
            shared=True,
            jobs=("a", "b"),
            breaker=BreakerStatus(
                state="open", cause="2 failures within 60 s, the last: RuntimeError: boom",
                failures=0, opens_at=2, within=60.0, successes=0, closes_at=1, trial_at=trial_at,
            ),
            bulkhead=BulkheadStatus(concurrency=4, in_use=0, may_wait=None, waiting=()),
        )  # fmt: skip
        assert own == LimitStatus(
            name="a", shared=False, jobs=("a",), rate=RateStatus(rate=1.0, burst=2, tokens=2.0, wait=0.0, waiting=())
        )
        assert [row.name for row in f.tree.limit_status("n*")] == ["net"]
        with pytest.raises(ControlError, match=r"^no limit matches 'nte'; did you mean 'net'\?$") as caught:
            f.tree.limit_status("nte")
        assert caught.value.code == ControlError.NO_SUCH_NAME


# ---- jobs that no configuration names ----


async def test_a_job_that_is_executed_has_policies_too(autojump_clock, tmp_path):
    weather = Weather(bad=True)
    spec = JobSpec(
        call=weather.work,
        timeout=Seconds(5),
        retry=RetrySpec(attempts=3, initial=Seconds(1), jitter=0.0),
        breaker=breaker(9),
        rate="slow",
    )
    async with forest(tmp_path, {}, limits={"slow": LimitSpec(rate=Rate.parse("1/s"))}) as f:
        outcome = await f.tree.execute(spec)
        assert (outcome.reason, weather.calls) == ("RuntimeError: boom", 3)
        assert [row.name for row in f.tree.limit_status()] == ["slow"]  # its own are gone with it
        assert len(f.times(Starting, "exec-1")) == 1
        with pytest.raises(ControlError, match=r"no limit 'fast' in \[limits\]"):
            await f.tree.execute(JobSpec(call=weather.work, rate="fast"))
