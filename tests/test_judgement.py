"""How many answers in a row make a run healthy or unhealthy."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.probes import Health
from supervisor.probes.judgement import Answer, Judgement, News, Verdict
from supervisor.spec import Seconds

VERDICTS = {"+": Verdict.HEALTHY, "-": Verdict.UNHEALTHY, "0": Verdict.NO_ANSWER, "x": Verdict.NOT_ASKED}
NEWS = {News.HEALTHY: "H", News.FAILING: "f", News.UNHEALTHY: "U", None: "."}


def told(answers: str, *, start_period: float = 0, **health: int) -> str:
    """What each answer changes; they come at 1, 2, 3, … after the run became ready."""
    judgement = Judgement(Health(start_period=Seconds(start_period), **health), 0.0)
    return "".join(NEWS[judgement.take(Answer(VERDICTS[each]), float(at))] for at, each in enumerate(answers, 1))


@pytest.mark.parametrize(
    ("answers", "expected", "health"),
    [
        ("+++", "H..", {}),
        ("---", "ffU", {}),
        ("000", "ffU", {}),
        ("-0-", "ffU", {}),
        ("--+--+--", "ffHffHff", {}),
        ("+--+---", "H" "ffH" "ffU", {}),
        ("-", "U", {"failures": 1}),
        ("+-", "HU", {"failures": 1}),
        ("+++", ".H.", {"successes": 2}),
        ("-+-+-", "f.f.U", {"successes": 2}),
        ("-+-++-", "f.f.Hf", {"successes": 2}),
        ("-+-", "f.f", {"successes": 2}),
        ("-x-x-", "f.f.U", {}),
        ("x+x+", ".H..", {}),
        ("-----", "..ffU", {"start_period": 3}),
        ("+--+--", "H..." "ff", {"start_period": 5}),
        ("--+", "..H", {"start_period": 9}),
    ],
)  # fmt: skip
def test_what_each_answer_changes(answers, expected, health):
    assert told(answers, **health) == expected


@given(st.text("+-0x", max_size=40), st.integers(1, 5), st.integers(1, 3))
def test_unhealthy_is_told_exactly_when_so_many_bad_ones_came_in_a_row(answers, failures, successes):
    said = told(answers, failures=failures, successes=successes)
    counted = [(each, news) for each, news in zip(answers, said, strict=True) if each != "x"]
    bad = 0
    for good, run in groupby(counted, key=lambda pair: pair[0] == "+"):
        for length, (_, news) in enumerate(run, 1):
            if not good:
                bad += 1
                assert (news == "U") is (bad >= failures)
            elif length == successes:
                bad = 0
