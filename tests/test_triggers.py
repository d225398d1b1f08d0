"""When runs are due, against models of it that share no code with it."""

from __future__ import annotations

import datetime
import math
import zoneinfo
from collections.abc import Iterator
from itertools import islice, pairwise, takewhile
from pathlib import Path

import cronsim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.triggers import CORRECTION, LATE, MOST, Cron, Every, Timetable, between, heeded, zone, zones
from tests.forest import moment

MINUTE, DAY = 60, 86400

TRANSITIONS = {
    "America/New_York": ("2026-03-08", "2026-11-01"),
    "Europe/Berlin": ("2026-03-29", "2026-10-25"),
    "Australia/Lord_Howe": ("2026-04-04", "2026-10-03"),  # half an hour
    "America/Sao_Paulo": ("2018-11-04", "2019-02-17"),  # at midnight: days without one, days with two
    "Africa/Casablanca": ("2026-02-15", "2026-03-22"),  # the other way round, for Ramadan
    "Pacific/Apia": ("2011-12-30", "2012-04-01"),  # a day that was not
    "Asia/Tokyo": ("2026-03-29", "2026-10-25"),  # none
}

SPRINGS = [(name, day) for name, days in TRANSITIONS.items() for day in days]


def local(text: str, name: str) -> str:
    """When it is that late there, as it is written in UTC."""
    return str(datetime.datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo(name)).astimezone(datetime.UTC))[:16]


def utc(tick: float) -> str:
    return str(datetime.datetime.fromtimestamp(tick, datetime.UTC))[:16]


def first(cron: str, name: str, since: str, count: int) -> list[str]:
    return [utc(tick) for tick in islice(Cron(cron, name).ticks(moment(since)), count)]


# ---- every ----


@pytest.mark.parametrize("every", [0.1, 0.3, 1 / 3, 0.7, 1e-3, 86400.1])
@pytest.mark.parametrize("anchor", [0.0, 0.1, 12345.678, 4e6 + 1 / 3])
def test_a_tick_never_comes_twice_and_none_is_missed(every, anchor):
    rhythm, now = Every(every, anchor), anchor
    for tick in range(1, 2000):
        now = next(rhythm.ticks(now))
        assert now == anchor + tick * every


@given(st.floats(1e-3, 1e6), st.floats(0, 1e9), st.floats(-1e3, 1e9))
def test_the_next_tick_is_after_the_moment_and_within_one_interval_of_it(every, anchor, now):
    following = next(Every(every, anchor).ticks(now))
    assert now < following <= now + every * (1 + 1e-6) + 1e-6


# ---- cron: the calendar ----


def test_a_cron_job_runs_at_its_time():
    assert first("30 2 * * *", "UTC", "2026-11-27 02:30", 2) == ["2026-11-28 02:30", "2026-11-29 02:30"]
    assert first("*/20 9-10 * * mon-fri", "UTC", "2026-11-27 10:30", 2) == ["2026-11-27 10:40", "2026-11-30 09:00"]
    assert first("0 0 L * *", "UTC", "2026-02-01 00:00", 1) == ["2026-02-28 00:00"]


def test_a_sixth_field_in_front_is_the_second():
    ticks = islice(Cron("*/15 * * * * *").ticks(moment("2026-01-01 00:00") + 0.5), 2)
    assert list(ticks) == [moment("2026-01-01 00:00") + 15, moment("2026-01-01 00:00") + 30]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("@hourly", "2026-11-27 11:00"),
        ("@daily", "2026-11-28 00:00"),
        ("@Midnight", "2026-11-28 00:00"),
        ("@weekly", "2026-11-29 00:00"),
        ("@monthly", "2026-12-01 00:00"),
        ("@yearly", "2027-01-01 00:00"),
        ("@annually", "2027-01-01 00:00"),
    ],
)
def test_the_names_of_cron(name, expected):
    assert first(name, "UTC", "2026-11-27 10:30", 1) == [expected]


@pytest.mark.parametrize(
    ("cron", "why"),
    [
        ("61 * * * *", "bad minute"),
        ("* * * *", "wrong number of fields"),
        ("", "wrong number of fields"),
        ("0 0 30 2 *", "bad day-of-month"),
        ("5-1 * * * *", "bad minute"),
        ("@fortnightly", "expected one of @hourly"),
        ("@reboot", "use `once = true`, or `run_on_start`"),
    ],
)
def test_what_is_no_time_is_refused_with_a_reason(cron, why):
    with pytest.raises(ValueError, match=why):
        Cron(cron)


def test_a_day_that_never_comes_ends_the_ticks():
    assert list(Cron("* * */20 * 1L").ticks(moment("2026-01-01 00:00"))) == []


def test_every_zone_that_is_listed_can_be_had():
    for name in sorted(zones()):
        assert zone(name) is not None


@pytest.mark.parametrize("name", ["Europe/Berln", "", "../UTC", "America", "/etc/localtime", "Europe/Berlin\0"])
def test_a_zone_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="expected the name of a time zone"):
        zone(name)


# ---- cron: days on which the clock springs ----


@pytest.mark.parametrize(
    ("name", "day", "cron", "expected"),
    [  # the gap: at its end, once
        ("America/New_York", "2026-03-08", "30 2 * * *", ["03:00"]),
        ("America/New_York", "2026-03-08", "15,45 2 * * *", ["03:00"]),
        ("America/New_York", "2026-03-08", "0 30 2 * * *", ["03:00"]),
        ("America/New_York", "2026-03-08", "0 1-3 * * *", ["01:00", "03:00"]),
        ("America/New_York", "2026-03-08", "*/30 1-3 * * *", ["01:00", "01:30", "03:00", "03:30"]),
        ("Europe/Berlin", "2026-03-29", "30 2 * * *", ["03:00"]),
        ("Australia/Lord_Howe", "2026-10-04", "15 2 * * *", ["02:30"]),
        ("Australia/Lord_Howe", "2026-10-04", "45 2 * * *", ["02:45"]),
        ("America/Sao_Paulo", "2018-11-04", "0 0 * * *", ["01:00"]),
        # two times: the first of them, once
        ("America/New_York", "2026-11-01", "30 1 * * *", ["01:30"]),
        ("America/New_York", "2026-11-01", "15 30 1 * * *", ["01:30"]),
        ("Australia/Lord_Howe", "2026-04-05", "45 1 * * *", ["01:45"]),
        ("Asia/Tokyo", "2026-03-29", "30 2 * * *", ["02:30"]),
    ],
)
def test_a_fixed_time_comes_once_a_day_whatever_the_clock_does(name, day, cron, expected):
    midnight = moment(local(f"{day} 00:00", name)) - 1
    days = takewhile(lambda tick: at(tick, name)[:10] <= day, Cron(cron, name).ticks(midnight))
    assert [at(tick, name)[11:] for tick in days if at(tick, name)[:10] == day] == expected


ROWS = (
    (Path(__file__).parent.parent / "docs" / "schedules.md").read_text().partition("<!-- ticks -->\n")[2].partition("\n\n")[0]
)


@pytest.mark.parametrize("row", ROWS.splitlines()[2:])
def test_the_days_of_the_documentation_are_as_it_says(row):
    name, cron, day, expected = (cell.strip(" `") for cell in row.strip("|").split("|"))
    midnight = moment(local(f"{day} 00:00", name)) - 1
    near = takewhile(lambda tick: tick < midnight + 2 * DAY, Cron(cron, name).ticks(midnight))
    ticks = [utc(tick)[11:] for tick in near if at(tick, name)[:10] == day]
    assert (f"{len(ticks) - 2} + 2 ticks" if expected.endswith("ticks") else ", ".join(ticks)) == expected


def test_a_fixed_time_that_comes_twice_counts_the_first_time():
    (tick,) = islice(Cron("30 1 * * *", "America/New_York").ticks(moment("2026-11-01 04:30")), 1)
    assert utc(tick) == "2026-11-01 05:30"  # EDT; 06:30 is EST
    (tick,) = islice(Cron("30 1 * * *", "America/New_York").ticks(tick), 1)
    assert utc(tick) == "2026-11-02 06:30"


@pytest.mark.parametrize(
    ("name", "day", "count"),
    [
        ("Europe/Berlin", "2026-03-29", 23 * 2),
        ("Europe/Berlin", "2026-10-25", 25 * 2),
        ("Australia/Lord_Howe", "2026-04-05", 24 * 2 + 1),
    ],
)
def test_what_has_a_star_goes_by_real_intervals(name, day, count):
    begin = moment(local(f"{day} 00:00", name))
    end = moment(local(f"{day} 23:59", name))
    ticks = [begin, *between(Cron("*/30 * * * *", name), begin, end)]
    assert len(ticks) == count
    assert {other - one for one, other in pairwise(ticks)} == {30 * MINUTE}


def at(tick: float, name: str) -> str:
    return str(datetime.datetime.fromtimestamp(tick, zoneinfo.ZoneInfo(name)))[:16]


FIELDS = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "weekday": (0, 6)}


@st.composite
def fields(draw, low: int, high: int, star: bool) -> tuple[str, set[int]]:
    """A field of a crontab, and what it stands for."""
    if star and draw(st.booleans()):
        step = draw(st.sampled_from([1, 1, 2, 7, 20, 30]))
        return (f"*/{step}" if step > 1 else "*"), {each for each in range(low, high + 1) if (each - low) % step == 0}
    chosen = draw(st.sets(st.integers(low, high), min_size=1, max_size=4))
    return ",".join(map(str, sorted(chosen))), chosen


@st.composite
def crontabs(draw) -> tuple[str, list[set[int]], bool, bool]:
    """An expression, its sets, whether both days must match, and whether an hour and a minute fix its time."""
    stars = [True, True, True, True]
    if draw(st.booleans()):  # times at night are what it is about
        minute, hour = draw(fields(0, 59, False)), draw(fields(0, 4, False))
    else:
        minute, hour = draw(fields(0, 59, stars[0])), draw(fields(0, 23, stars[1]))
    day = draw(fields(1, 31, True))
    weekday = draw(fields(0, 6, True))
    both = day[0].startswith("*") or weekday[0].startswith("*")
    fixed = not minute[0].startswith("*") and not hour[0].startswith("*")
    return f"{minute[0]} {hour[0]} {day[0]} * {weekday[0]}", [minute[1], hour[1], day[1], weekday[1]], both, fixed


def matches(when: datetime.datetime, sets: list[set[int]], both: bool) -> bool:
    minute, hour, day, weekday = sets
    days = (when.day in day, when.isoweekday() % 7 in weekday)
    return when.minute in minute and when.hour in hour and (all(days) if both else any(days))


def modelled(name: str, begin: int, end: int, sets: list[set[int]], both: bool, fixed: bool) -> Iterator[int]:
    """Debian's rule, a minute at a time: a fixed time counts once, and one that was sprung over counts where it was."""
    place, seen, before = zoneinfo.ZoneInfo(name), set(), None
    for tick in range(begin, end, MINUTE):
        now = datetime.datetime.fromtimestamp(tick, place).replace(tzinfo=None)
        due = matches(now, sets, both) and not (fixed and now in seen)
        skipped = before + datetime.timedelta(minutes=1) if before is not None else now
        while fixed and not due and skipped < now:
            due = matches(skipped, sets, both) and skipped not in seen
            skipped += datetime.timedelta(minutes=1)
        seen.add(now)
        before = now
        if due:
            yield tick


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPRINGS), crontabs(), st.integers(0, 2 * DAY))
def test_cron_is_debians_cron_on_every_day_that_the_clock_springs(where, crontab, later):
    (name, day), (text, sets, both, fixed) = where, crontab
    begin = int(moment(f"{day} 00:00")) - DAY
    end = begin + 3 * DAY
    expected = list(modelled(name, begin - DAY, end, sets, both, fixed))
    since = begin + later
    came = list(takewhile(lambda tick: tick < end, Cron(text, name).ticks(since)))
    assert came == [each for each in expected if each > since]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TRANSITIONS)), crontabs(), st.floats(0, 400 * DAY))
def test_cron_is_what_cronsim_documents_and_each_tick_is_later_than_the_last(name, crontab, later):
    text, since = crontab[0], moment("2026-01-01 00:00") + later
    ticks = list(islice(Cron(text, name).ticks(since), 50))
    assert all(one < other for one, other in pairwise([since, *ticks]))
    if name == "Australia/Lord_Howe" and not crontab[3]:
        return  # there cronsim loses the half hour after the one that comes twice
    start = datetime.datetime.fromtimestamp(since - 2 * DAY, zoneinfo.ZoneInfo(name))
    theirs = (each.timestamp() for each in islice(cronsim.CronSim(text, start), 10_000))
    theirs = [each for each in dict.fromkeys(takewhile(lambda each: each <= ticks[-1], theirs)) if each > since]
    assert ticks == sorted(theirs)


@pytest.mark.parametrize("name", sorted(TRANSITIONS))
@pytest.mark.parametrize("cron", ["*/15 * * * *", "30 2 * * *", "@hourly", "@weekly"])
def test_the_ticks_of_a_year_do_not_depend_on_where_they_are_counted_from(name, cron):
    rhythm, begin = Cron(cron, name), moment("2026-01-01 00:00")
    straight = list(islice(rhythm.ticks(begin), 500))
    hopping, now = [], begin
    for _ in straight:
        now = next(rhythm.ticks(now))
        hopping.append(now)
    assert hopping == straight


# ---- what was missed ----


@given(st.floats(0.01, 1e5), st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 200))
@settings(deadline=None)
def test_the_newest_ticks_between_two_moments_are_those_that_a_list_of_all_has(every, since, length, most):
    rhythm, until = Every(every, 12.5), since + min(length, 1000 * every)
    everything = list(takewhile(lambda tick: tick <= until, rhythm.ticks(since)))
    assert between(rhythm, since, until, most) == everything[-most:]


class Counting:
    """A rhythm that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def ticks(self, since: float) -> Iterator[float]:
        for tick in Every(60.0, 0.0).ticks(since):
            self.asked += 1
            yield tick


def test_ten_years_that_were_missed_cost_no_more_than_a_day():
    rhythm = Counting()
    assert len(between(rhythm, 0.0, 3650.0 * DAY)) == MOST
    assert rhythm.asked < 10 * MOST


@pytest.mark.parametrize(
    ("catch_up", "late", "expected"),
    [
        ("none", 0.0, [300.0]),
        ("none", LATE, [300.0]),
        ("none", LATE + 1, []),
        ("last", 1e9, [300.0]),
        ("all", 1e9, [100.0, 200.0, 300.0]),
    ],
)
def test_catch_up_decides_which_of_the_ticks_get_a_run(catch_up, late, expected):
    assert heeded([100.0, 200.0, 300.0], catch_up, late) == expected


def test_no_more_runs_than_a_hundred_are_caught_up():
    came = [float(each) for each in range(MOST + 1)]
    assert heeded(came, "all", 1e9) == came[1:]


# ---- the timetable ----


def test_a_timetable_gives_each_tick_once_and_says_when_the_next_comes():
    table = Timetable(Every(10.0, 0.0), 0.0)
    assert (table.next_at, table.take(9.9)) == (10.0, [])
    assert (table.take(10.0), table.next_at) == ([10.0], 20.0)
    assert (table.take(10.0), table.take(47.0), table.next_at) == ([], [20.0, 30.0, 40.0], 50.0)
    table.skip(75.0)
    assert (table.take(75.0), table.next_at) == ([], 80.0)


def test_jitter_delays_each_tick_and_puts_none_out_of_step():
    delays = iter([3.0, 0.0, 5.0])
    table = Timetable(Every(10.0, 0.0), 0.0, 5.0, lambda low, high: next(delays))
    assert (table.tick, table.next_at) == (10.0, 13.0)
    assert (table.take(12.9), table.take(13.0), table.next_at) == ([], [10.0], 20.0)
    assert (table.take(20.0), table.next_at) == ([20.0], 35.0)


def test_jitter_is_drawn_from_nothing_to_the_whole_of_it():
    drawn = []
    Timetable(Every(10.0, 0.0), 0.0, 5.0, lambda low, high: drawn.append((low, high)) or 0.0)
    assert drawn == [(0.0, 5.0)]


HOURLY = Cron("@hourly")
TEN = moment("2026-01-01 10:00")


def test_a_clock_that_is_set_back_brings_no_tick_twice():
    table = Timetable(HOURLY, TEN - 1)
    assert table.take(TEN) == [TEN]
    table.clock_was_set(TEN - 600)
    assert table.take(TEN) == [] and table.next_at == TEN + 3600
    assert table.take(TEN + 3600) == [TEN + 3600]


def test_a_clock_that_is_set_back_brings_the_ticks_that_have_not_been():
    table = Timetable(HOURLY, TEN + 1)
    assert table.next_at == TEN + 3600
    table.clock_was_set(TEN - 1)
    assert table.next_at == TEN


def test_a_clock_that_was_wrong_by_years_does_not_silence_a_job_for_years():
    table = Timetable(HOURLY, TEN + 10 * 365 * DAY - 1)
    assert table.take(TEN + 10 * 365 * DAY) != []
    table.clock_was_set(TEN - 1)
    assert table.next_at == TEN


def test_looking_at_a_clock_that_was_not_set_changes_nothing():
    delays = iter([600.0, 0.0])
    table = Timetable(HOURLY, TEN - 1, 600.0, lambda low, high: next(delays))
    for now in (TEN - 1, TEN - 0.5, TEN, TEN + 599):
        table.clock_was_set(now)
        assert (table.tick, table.next_at) == (TEN, TEN + 600)


@settings(deadline=None)
@given(st.lists(st.floats(-2 * CORRECTION, 2 * CORRECTION), max_size=20), st.booleans())
def test_however_the_clock_is_set_a_tick_comes_twice_only_after_a_correction(steps, jittered):
    table = Timetable(HOURLY, TEN, *([600.0, lambda low, high: high / 2] if jittered else []))
    now, taken = TEN, set()
    for step in steps:
        now += step
        if taken and max(taken) > now + CORRECTION:
            taken.clear()
        table.clock_was_set(now)
        came = table.take(now)
        assert came == sorted(set(came)) and taken.isdisjoint(came)
        assert all(tick <= now for tick in came)
        taken.update(came)
        assert table.next_at > now
        assert table.tick - now <= CORRECTION + 2 * 3600
        assert math.isfinite(table.next_at)
