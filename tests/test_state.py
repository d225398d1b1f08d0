"""The state machine of a child: which steps there are, and what people read."""

from itertools import pairwise, product

import pytest

from supervisor.errors import InternalError
from supervisor.state import LEGAL, Goal, JobStatus, Phase, State, Why, move, word

STEPS = [(here, there) for here, nexts in LEGAL.items() for there in sorted(nexts, key=lambda state: state.value)]


def row(state: State) -> JobStatus:
    return JobStatus(
        name="a", kind="task", supervisor=None, state=state, word=state.value, goal=Goal.UP, cause="", ready=False,
        healthy=None, pid=None, restarts=0, since="", next_at=None, exit=None,
    )  # fmt: skip


def test_the_table_is_the_one_of_the_docstring():
    drawn = {
        "stopped": "starting waiting", "waiting": "starting stopped", "starting": "running stopping stopped",
        "running": "stopping stopped", "stopping": "stopped",
    }  # fmt: skip
    assert {here.value: {there.value for there in nexts} for here, nexts in LEGAL.items()} == {
        here: {here, *nexts.split()} for here, nexts in drawn.items()
    }


@pytest.mark.parametrize(("here", "there"), STEPS)
def test_a_legal_step_is_taken(here, there):
    assert move(row(here), there) is there


@pytest.mark.parametrize(("here", "there"), [step for step in product(State, State) if step not in STEPS])
def test_an_illegal_step_is_a_fault_of_ours(here, there):
    with pytest.raises(InternalError, match=f"illegal step of 'a': {here.value} -> {there.value}"):
        move(row(here), there)


def test_every_state_is_reached_from_stopped_and_leads_back_to_it():
    def reach(start: State) -> set[State]:
        seen, todo = {start}, [start]
        while todo:
            todo += (new := LEGAL[todo.pop()] - seen)
            seen |= new
        return seen

    assert reach(State.STOPPED) == set(State)
    assert all(State.STOPPED in reach(state) for state in State)


def test_a_word_is_that_of_the_state_or_says_more_than_it():
    plain = {state.value for state in State}
    for state, why in product(State, Why):
        assert word(state, why) in (state.value, why.value)
        assert word(state, Why.PLAIN) == state.value
    more = {word(state, why) for state, why in product(State, Why)} - plain
    assert more == {
        "completed", "failed", "exited", "gave up", "backing off", "scheduled", "paused", "draining", "stuck",
        "degraded",
    }  # fmt: skip


@pytest.mark.parametrize("why", [Why.COMPLETED, Why.FAILED, Why.EXITED, Why.GAVE_UP])
def test_how_it_ended_is_only_said_of_what_has_stopped(why):
    assert [state for state in State if word(state, why) == why.value] == [State.STOPPED]


def test_phases_are_in_order():
    phases = [Phase.RUNNING, Phase.DRAINING, Phase.STOPPING, Phase.KILLING]
    assert phases == list(Phase)
    assert all(earlier < later and not later < earlier for earlier, later in pairwise(phases))
    assert not any(phase < phase for phase in phases)
