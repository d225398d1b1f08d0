"""How many answers in a row make a run healthy or unhealthy. Pure: the moments are given."""

from __future__ import annotations

import enum
from typing import NamedTuple

from supervisor.probes.spec import Health


class Verdict(enum.Enum):
    """What a question came to. `NOT_ASKED`: for a reason of ours, which counts for nothing."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    NO_ANSWER = "no answer"
    NOT_ASKED = "not asked"


class Answer(NamedTuple):
    """What a question came to, and why it is not `HEALTHY`, in words that name the target."""

    verdict: Verdict
    reason: str = ""


class News(enum.Enum):
    """What an answer changes."""

    HEALTHY = "healthy"
    FAILING = "failing"
    UNHEALTHY = "unhealthy"


class Judgement:
    """Counts the answers to `health`. `since` is when the run became ready, on the clock of `now`.

    Bad answers are counted until `successes` good ones in a row have made up for them.
    """

    def __init__(self, health: Health, since: float) -> None:
        self.health = health
        self.failures = 0
        """Bad answers in a row, as far as they count."""
        self._since = since
        self._successes = 0
        self._told: News | None = None

    def take(self, answer: Answer, now: float) -> News | None:
        """Count one answer: what is to be told of it, or None where nothing is new."""
        if answer.verdict is Verdict.NOT_ASKED:
            return None
        news = self._good() if answer.verdict is Verdict.HEALTHY else self._bad(now)
        if news is News.HEALTHY and self._told is News.HEALTHY:
            return None
        self._told = news or self._told
        return news

    def _good(self) -> News | None:
        self._successes += 1
        if self._successes < self.health.successes:
            return None
        self.failures = 0
        return News.HEALTHY

    def _bad(self, now: float) -> News | None:
        self._successes = 0
        if now < self._since + self.health.start_period:
            return None
        self.failures += 1
        return News.UNHEALTHY if self.failures >= self.health.failures else News.FAILING
