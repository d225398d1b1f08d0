"""What Prometheus gets: read back by its own parser."""

from __future__ import annotations

import sys

import pytest
from control_serving import serving, until
from prometheus_client.parser import text_string_to_metric_families

from supervisor.control.aclient import AsyncClient
from supervisor.control.messages import QueueStatus
from supervisor.errors import ControlError
from supervisor.events import wall_now
from supervisor.metrics import exposition
from supervisor.state import BreakerStatus, BulkheadStatus, Goal, JobStatus, LimitStatus, QueueTally, RateStatus, State


def row(name: str, **fields) -> JobStatus:
    usual = {
        "kind": "command", "supervisor": None, "state": State.RUNNING, "word": "running", "goal": Goal.UP, "cause": "started",
        "ready": True, "healthy": None, "pid": 7, "restarts": 0, "since": wall_now(), "next_at": None, "exit": None,
    }  # fmt: skip
    return JobStatus(name=name, **(usual | fields))


def read(text: str) -> dict[tuple[str, ...], float]:
    """Each sample: its name and the values of its labels, by their names."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name, *(each.labels[name] for name in sorted(each.labels))): each.value for each in samples}


def test_every_job_says_how_it_is():
    api = row("api", restarts=3, supervisor="web", healthy=False)
    off = row("off", state=State.STOPPED, word="gave up", goal=Goal.DOWN, ready=False)
    found = read(exposition([api, off], []))
    assert found["supervisor_job_restarts_total", "api"] == 3
    assert found["supervisor_job_info", "api", "command", "web"] == 1
    assert (found["supervisor_job_state", "api", "running"], found["supervisor_job_state", "off", "gave up"]) == (1, 1)
    for name, values in {"up": (1, 0), "wanted": (1, 0), "ready": (1, 0)}.items():
        assert tuple(found[f"supervisor_job_{name}", job] for job in ("api", "off")) == values
    assert found["supervisor_job_healthy", "api"] == 0
    assert ("supervisor_job_healthy", "off") not in found  # nobody asks it


def test_every_limit_says_how_it_stands():
    limit = LimitStatus(
        name='the "db"\n',
        shared=True,
        jobs=("a",),
        breaker=BreakerStatus(
            state="half-open", cause="", failures=2, opens_at=5, within=60, successes=1, closes_at=2, trial_at=None
        ),
        rate=RateStatus(rate=10, burst=5, tokens=2.5, wait=0, waiting=("a#1", "a#2")),
        bulkhead=BulkheadStatus(concurrency=4, in_use=3, may_wait=None, waiting=("a#3",)),
    )
    found = read(exposition([], [limit]))
    states = {labels[-1]: value for labels, value in found.items() if labels[0] == "supervisor_breaker_state"}
    assert states == {"closed": 0, "open": 0, "half-open": 1}
    assert found["supervisor_breaker_failures", limit.name] == 2
    assert found["supervisor_rate_tokens", limit.name] == 2.5
    assert (found["supervisor_bulkhead_in_use", limit.name], found["supervisor_bulkhead_places", limit.name]) == (3, 4)
    assert found["supervisor_limit_waiting", "rate", limit.name] == 2
    assert found["supervisor_limit_waiting", "bulkhead", limit.name] == 1


async def test_the_daemon_gives_them_on_demand_and_says_what_is_missing(tmp_path, monkeypatch):
    async with serving(tmp_path) as (tree, path):
        client = AsyncClient(path)
        await tree.stop("other")
        found = read(await client.metrics())
        assert (found["supervisor_job_up", "idle"], found["supervisor_job_up", "other"]) == (1, 0)
        monkeypatch.setitem(sys.modules, "supervisor.metrics", None)
        with pytest.raises(ControlError, match="pip install 'trio-supervisor\\[metrics\\]'"):
            await client.metrics()


def test_what_became_of_items_is_counted_by_queue_job_and_outcome():
    found = read(exposition([], [], [QueueTally(queue="q", degraded=True, jobs={"work": {"done": 7, "dead": 1}})]))
    assert found["supervisor_queue_items_total", "work", "done", "q"] == 7
    assert found["supervisor_queue_items_total", "work", "dead", "q"] == 1
    assert found["supervisor_queue_degraded", "q"] == 1


async def test_the_daemon_asks_its_queues_for_their_numbers(tmp_path):
    jobs = {"hold": {"call": "control_items:hold", "queue": "q", "grace": 0}}
    async with serving(tmp_path, jobs, {}, {"q": {"backend": "memory"}}) as (tree, path):
        await tree.queues.producer("q").put_many([1, 2, 3])
        await until(tree, lambda table: table["hold"].cause.startswith("handles "))
        found = read(await AsyncClient(path).metrics())
        assert found["supervisor_queue_depth", "q", "waiting"] == 2
        assert found["supervisor_queue_depth", "q", "running"] == 1


def test_queues_are_counted_by_state_and_one_that_does_not_answer_has_no_numbers():
    facts = {"backend": "memory", "jobs": ("work",), "size": 100}
    numbers = {"waiting": 3, "delayed": 1, "running": 2, "done": 5, "dead": 4, "cancelled": 0, "expired": 6, "oldest": 1.5}
    there = QueueStatus(name="q", **facts, paused=True, **numbers)
    away = QueueStatus(name="away", **facts, trouble="no answer")
    found = read(exposition([], [], [], [there, away]))
    depths = {key[2]: value for key, value in found.items() if key[0] == "supervisor_queue_depth"}
    assert depths == {name: number for name, number in numbers.items() if name != "oldest"}
    assert (found["supervisor_queue_oldest_seconds", "q"], found["supervisor_queue_paused", "q"]) == (1.5, 1)
    assert not any("away" in key for key in found)
