"""One stream of events, and the table that is its fold."""

import datetime
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor import events
from supervisor.errors import InternalError
from supervisor.events import AnyEvent, Event, Journal, Lagged, fold, rfc3339
from supervisor.state import LEGAL, Exit, Goal, Phase, State, Why

ENDS = (Why.PLAIN, Why.COMPLETED, Why.FAILED, Why.EXITED)
ANYWHERE = (
    "Changed",
    "GoalSet",
    "Spawned",
    "Scheduled",
    "Unready",
    "HealthUnknown",
    "Healthy",
    "HealthCheckFailed",
    "Unhealthy",
    "Said",
    "NotifyRefused",
    "Skipped",
    "Progress",
    "GroupRestarting",
    "IntensityExceeded",
    "OutputLost",
    "Scaled",
)
AFTER = {
    State.STOPPED: ("Waiting", "Starting", "Stopped", "Removed"),
    State.WAITING: ("Waiting", "Starting", "Stopped"),
    State.STARTING: ("Starting", "Ready", "Stopping", "Killing", "Stuck", "Draining", "Ended"),
    State.RUNNING: ("Ready", "Stopping", "Killing", "Stuck", "Draining", "Ended"),
    State.STOPPING: ("Stopping", "Killing", "Stuck", "Ended"),
}
"""The events that move a child, by where it is."""

FIELDS: dict[str, dict[str, Any]] = {
    "Added": {"kind": "task", "supervisor": None, "goal": Goal.UP, "cause": "new"},
    "Changed": {"kind": "thread", "supervisor": "s", "description": "changed"},
    "GoalSet": {"goal": Goal.DOWN, "cause": "stopped by uid 0"},
    "Waiting": {"cause": "failed", "why": Why.BACKOFF, "next_at": "later"},
    "Starting": {"run": "a#1", "cause": "starts", "restart": True},
    "Spawned": {"run": "a#1", "pid": 7},
    "Ready": {"run": "a#1", "cause": "started"},
    "Scheduled": {"cause": "runs every 5s; 0 of 3 runs in hand", "why": Why.SCHEDULED, "next_at": "later"},
    "Unready": {"run": "a#1", "cause": "not ready: b"},
    "HealthUnknown": {"run": "a#1"},
    "Healthy": {"run": "a#1", "cause": "healthy again"},
    "HealthCheckFailed": {"run": "a#1", "cause": "refused", "answered": True, "failures": 1, "limit": 3},
    "Unhealthy": {"run": "a#1", "cause": "unhealthy: refused", "answered": False, "failures": 3},
    "Said": {"run": "a#1", "cause": "serving"},
    "NotifyRefused": {"run": "a#1", "cause": "refused FDSTORE"},
    "Stopping": {"run": "a#1", "cause": "asked"},
    "Draining": {"run": "a#1", "cause": "the end"},
    "Killing": {"run": "a#1", "cause": "late"},
    "Stuck": {"run": "a#1", "cause": "still there", "pids": (7,)},
    "Ended": {
        "run": "a#1",
        "exit": Exit(reason="code 1", at="now", code=1),
        "failed": True,
        "cause": "code 1",
        "why": Why.FAILED,
    },
    "Stopped": {"cause": "stopped", "why": Why.GAVE_UP},
    "Removed": {"cause": "removed"},
    "Skipped": {"cause": "still running"},
    "Progress": {"run": "a#1", "done": 0.5},
    "GroupRestarting": {"cause": "a failed", "affected": ("a",), "wait": 1.0},
    "IntensityExceeded": {"cause": "too many", "intensity": 1, "period": 5.0},
    "OutputLost": {"cause": "full", "bytes": 3},
    "Scaled": {"cause": "scaled 2 -> 4: 9 wait", "was": 2, "workers": 4, "waiting": 9, "oldest": 3.0},
}


def ticking() -> Journal:
    """A journal whose wall clock says another time at each look."""
    clock = iter(range(1_000_000))
    return Journal(now=lambda: str(next(clock)))


def emit(journal: Journal, kind: str, name: str, **changed: Any) -> Event:
    return journal.emit(getattr(events, kind), name=name, **{**FIELDS[kind], **changed})


@st.composite
def histories(draw):
    """A journal to which a few children's legal lives have happened, and everything that it told its sink."""
    journal, told = ticking(), []
    journal.add_sink(told.append)
    for _ in range(draw(st.integers(0, 40))):
        name = draw(st.sampled_from("abc"))
        row = journal.table.get(name)
        if row is None:
            emit(journal, "Added", name)
        elif draw(st.integers(0, 9)) == 0:
            journal.emit(events.PhaseChanged, phase=Phase.DRAINING, cause="the end")
        else:
            kind = draw(st.sampled_from(AFTER[row.state] + ANYWHERE))
            emit(journal, kind, name, **({"why": draw(st.sampled_from(ENDS))} if kind == "Ended" else {}))
    return journal, told


@settings(max_examples=40)
@given(histories())
def test_the_table_is_the_fold_of_the_events(history):
    journal, told = history
    assert fold(told) == journal.table


@settings(max_examples=40)
@given(histories())
def test_the_fold_can_be_stopped_and_taken_up_anywhere(history):
    journal, told = history
    table = fold(told[: len(told) // 2])
    for event in told[len(told) // 2 :]:
        events.apply(table, event)
    assert table == journal.table


@settings(max_examples=40)
@given(histories())
def test_events_are_numbered_from_one_without_gaps(history):
    journal, told = history
    assert [event.seq for event in told] == list(range(1, journal.seq + 1))


@settings(max_examples=40)
@given(histories())
def test_events_that_went_over_a_wire_fold_to_the_same_table(history):
    journal, told = history
    lines = msgspec.json.encode(told)
    assert msgspec.json.decode(lines, type=list[AnyEvent]) == told
    assert fold(msgspec.json.decode(lines, type=list[AnyEvent])) == journal.table


@settings(max_examples=40)
@given(histories())
def test_a_child_only_ever_takes_legal_steps(history):
    _, told = history
    table: dict[str, Any] = {}
    for event in told:
        before = dict(table)
        events.apply(table, event)
        for name in before.keys() & table.keys():
            assert table[name].state in LEGAL[before[name].state]
            assert (table[name].since == before[name].since) or table[name].state is not before[name].state


INTO = {
    "Waiting": State.WAITING, "Starting": State.STARTING, "Ready": State.RUNNING, "Stopping": State.STOPPING,
    "Killing": State.STOPPING, "Stuck": State.STOPPING, "Ended": State.STOPPED, "Stopped": State.STOPPED,
}  # fmt: skip
"""The state that each event which moves a child moves it into."""

WAY = {
    State.STOPPED: (), State.WAITING: ("Waiting",), State.STARTING: ("Starting",),
    State.RUNNING: ("Starting", "Ready"), State.STOPPING: ("Starting", "Ready", "Stopping"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("here", "there"),
    [(here, there) for here, nexts in LEGAL.items() for there in sorted(nexts, key=lambda state: state.value)],
)
def test_every_legal_step_is_taken_by_an_event(here, there):
    journal = ticking()
    emit(journal, "Added", "a")
    taking = next(kind for kind in AFTER[here] if INTO.get(kind) is there)
    for kind in (*WAY[here], taking):
        emit(journal, kind, "a")
    assert journal.table["a"].state is there


@pytest.mark.parametrize("here", State)
@pytest.mark.parametrize("kind", INTO)
def test_no_event_takes_an_illegal_step(here, kind):
    journal = ticking()
    emit(journal, "Added", "a")
    for step in WAY[here]:
        emit(journal, step, "a")
    if INTO[kind] in LEGAL[here]:
        emit(journal, kind, "a")
        assert journal.table["a"].state is INTO[kind]
    else:
        before = journal.table["a"]
        with pytest.raises(InternalError, match="illegal step"):
            emit(journal, kind, "a")
        assert journal.table["a"] is before


def test_an_event_that_cannot_be_leaves_no_trace():
    journal, told = ticking(), []
    journal.add_sink(told.append)
    emit(journal, "Added", "a")
    with pytest.raises(InternalError):
        emit(journal, "Ready", "a")
    emit(journal, "Starting", "a")
    assert [event.seq for event in told] == [1, 2]
    assert journal.past(0) == (0, told)


def test_only_a_start_after_a_failure_counts_as_a_restart():
    journal = ticking()
    emit(journal, "Added", "a")
    for restart in (False, True, False, True, True):
        emit(journal, "Starting", "a", restart=restart)
        emit(journal, "Ended", "a")
    assert journal.table["a"].restarts == 3


def test_what_belongs_to_a_run_leaves_the_row_with_it():
    journal = ticking()
    for kind in ("Added", "Waiting", "Starting", "Spawned", "Ready"):
        emit(journal, kind, "a")
    row = journal.table["a"]
    assert (row.pid, row.ready, row.next_at, row.run) == (7, True, None, "a#1")
    emit(journal, "Ended", "a")
    row = journal.table["a"]
    assert (row.pid, row.ready, row.word, row.exit and row.exit.code) == (None, False, "failed", 1)


def test_names_on_the_wire_are_the_words_of_the_class():
    assert msgspec.json.decode(msgspec.json.encode(emit_one("GroupRestarting")))["event"] == "group_restarting"
    assert msgspec.json.decode(msgspec.json.encode(emit_one("Ended")))["event"] == "ended"


def emit_one(kind: str) -> Event:
    journal = ticking()
    emit(journal, "Added", "a")
    emit(journal, "Starting", "a")
    return emit(journal, kind, "a")


# Sinks, the ring, subscribers


def test_a_sink_that_raises_is_a_fault_of_ours():
    journal = ticking()

    def bad(event: Event) -> None:
        raise ValueError("no room")

    journal.add_sink(bad)
    with pytest.raises(InternalError, match="a sink raised on event 1") as caught:
        emit(journal, "Added", "a")
    assert isinstance(caught.value.__cause__, ValueError)


def test_sinks_hear_each_event_once_and_in_order_with_the_table_up_to_date():
    journal, heard = ticking(), []
    for number in (1, 2):
        journal.add_sink(lambda event, number=number: heard.append((number, event.seq, event.name in journal.table)))
    emit(journal, "Added", "a")
    emit(journal, "Added", "b")
    assert heard == [(1, 1, True), (2, 1, True), (1, 2, True), (2, 2, True)]


@given(ring=st.integers(1, 6), count=st.integers(0, 12), since=st.integers(0, 14))
def test_the_ring_says_how_much_of_the_past_it_has_lost(ring, count, since):
    journal = Journal(now=str, ring=ring)
    told = [journal.emit(events.Warned, text=str(at)) for at in range(count)]
    wanted = [event for event in told if event.seq > since]
    lost, kept = journal.past(since)
    assert kept == wanted[-ring:]
    assert lost == len(wanted) - len(kept)


async def test_a_subscriber_gets_events_from_its_snapshot_on():
    journal = ticking()
    emit(journal, "Added", "a")
    with journal.subscribe() as subscription:
        snapshot = dict(journal.table)
        emit(journal, "Starting", "a")
        emit(journal, "Ready", "a")
        for _ in range(2):
            event = await anext(subscription)
            events.apply(snapshot, event)
    assert snapshot == journal.table


async def test_a_subscriber_waits_for_the_next_event_and_loses_none_when_it_is_cancelled(autojump_clock):
    journal = ticking()
    with journal.subscribe() as subscription:
        with trio.move_on_after(1) as scope:
            await anext(subscription)
        assert scope.cancelled_caught
        event = emit(journal, "Added", "a")
        assert await anext(subscription) == event


@given(size=st.integers(1, 5), turns=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=8))
def test_a_slow_subscriber_is_told_how_many_it_lost_and_where(size, turns):
    """Whatever the pace: what arrives, with each gap as long as it says, is the stream."""

    async def main() -> None:
        journal, position = Journal(now=str), 0
        with journal.subscribe(size) as subscription:
            for emitted, read in turns:
                for _ in range(emitted):
                    journal.emit(events.Warned, text="")
                for _ in range(read):
                    if position == journal.seq:
                        break
                    item = await anext(subscription)
                    position += item.count if isinstance(item, Lagged) else 1
                    assert isinstance(item, Lagged) or item.seq == position
                assert len(subscription._waiting) <= size

    trio.run(main)


def test_who_has_left_is_told_nothing():
    journal = ticking()
    with journal.subscribe(1) as subscription:
        pass
    emit(journal, "Added", "a")
    assert not subscription._waiting


def test_the_wall_clock_is_written_in_utc_with_milliseconds():
    east = datetime.timezone(datetime.timedelta(hours=2))
    assert rfc3339(datetime.datetime(2026, 1, 2, 3, 4, 5, 6789, east)) == "2026-01-02T01:04:05.006Z"
