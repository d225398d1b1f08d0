"""What is told of items: each, while they are few; of many the first ones, and how many more."""

from __future__ import annotations

import pytest

from supervisor.events import (
    Event,
    ItemCancelled,
    ItemDead,
    ItemLost,
    ItemRetrying,
    ItemsDead,
    ItemsExpired,
    ItemsLost,
    ItemsRetrying,
    Journal,
)
from supervisor.queues.reports import AT_ONCE, Reports

FIELDS = {ItemRetrying: {"reason": "no net", "wait": 1.0, "attempts": 5}, ItemDead: {"reason": "no net"}}


@pytest.fixture
def told():
    return []


@pytest.fixture
def reports(told):
    journal = Journal()
    journal.add_sink(told.append)
    return Reports("q", journal)


def tell(reports: Reports, kind, count: int, job: str = "a") -> list[bool]:
    return [reports.tell(kind, f"i{at}", f"item i{at}", job, **FIELDS.get(kind, {})) for at in range(count)]


def kinds(told: list[Event]) -> dict[str, int]:
    names = [type(event).__name__ for event in told]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(("one", "many"), [(ItemRetrying, ItemsRetrying), (ItemDead, ItemsDead), (ItemLost, ItemsLost)])
def test_the_first_are_told_and_the_others_counted(reports, told, one, many):
    assert tell(reports, one, AT_ONCE + 5) == [True] * AT_ONCE + [False] * 5
    assert kinds(told) == {one.__name__: AT_ONCE}
    reports.tell_rest()
    (last,) = told[AT_ONCE:]
    assert isinstance(last, many)
    assert (last.queue, last.job, last.count, last.level) == ("q", "a", 5, one.level)
    assert last.cause.startswith("and 5 more ")
    assert last.cause.endswith(f"; the last: item i{AT_ONCE + 4}")
    reports.tell_rest()
    assert len(told) == AT_ONCE + 1
    assert tell(reports, one, 1) == [True]


def test_few_are_told_and_nothing_besides(reports, told):
    for _ in range(3):
        tell(reports, ItemDead, AT_ONCE)
        reports.tell_rest()
    assert kinds(told) == {"ItemDead": 3 * AT_ONCE}


def test_a_job_in_trouble_hides_no_other_and_its_workers_are_one(reports, told):
    tell(reports, ItemDead, AT_ONCE, "a:0")
    assert tell(reports, ItemDead, 1, "a:1") == [False]
    assert tell(reports, ItemDead, 1, "b") == [True]
    assert tell(reports, ItemRetrying, 1, "a:1") == [True]


def test_each_that_was_cancelled_is_told(reports, told):
    tell(reports, ItemCancelled, 50)
    reports.tell_rest()
    assert kinds(told) == {"ItemCancelled": 50}


def test_expired_ones_are_told_at_once_and_then_together(reports, told):
    for count in (3, 4, 5):
        reports.expired(count)
    assert [event.count for event in told] == [3]
    for _ in range(2):
        reports.tell_rest()
    assert [event.count for event in told] == [3, 9]
    assert kinds(told) == {ItemsExpired.__name__: 2}
    reports.expired(1)
    assert [event.count for event in told] == [3, 9, 1]
