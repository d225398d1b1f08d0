"""What people read: rows, trees, plans, events, times. Text in, text out; nothing is printed here."""

from __future__ import annotations

import time
from itertools import repeat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_SGR = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "cyan": "36", "dim": "2", "bold": "1"}

_COLOURS = {
    "running": "green",
    "starting": "yellow",
    "waiting": "yellow",
    "stopping": "yellow",
    "draining": "yellow",
    "backing off": "yellow",
    "exited": "yellow",
    "degraded": "yellow",
    "scheduled": "cyan",
    "paused": "cyan",
    "stopped": "dim",
    "completed": "dim",
    "failed": "red",
    "gave up": "red",
    "stuck": "red",
    "lost": "red",
    "not stored": "red",
    "dead": "red",
    "away": "red",
    "open": "green",
    "cancelling": "yellow",
    "cancelled": "dim",
    "expired": "dim",
    "done": "dim",
}


def paint(text: str, colour: str, on: bool) -> str:
    """`text` in a colour of the terminal, if `on`."""
    return f"\x1b[{_SGR[colour]}m{text}\x1b[0m" if on and colour in _SGR else text


def colour_of(name: str) -> str:
    """A colour for a job, the same each time."""
    return ("cyan", "green", "yellow", "blue", "magenta")[sum(name.encode()) % 5]


def clean(text: str) -> str:
    """`text` on one line and without what a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(_harmless(char) for char in text)


def _harmless(char: str) -> str:
    if char.isprintable():
        return char
    return " " if char in "\n\t" else char.encode("unicode_escape").decode()


def epoch(moment: str) -> float:
    """RFC 3339 in UTC (`2026-11-26T23:25:48.123Z`) as seconds since 1970; the arithmetic spares us importing calendars."""
    minute = moment[:16]  # a thousand jobs start within one, or a few
    if (begin := _minutes.get(minute)) is None:
        day = _midnight(int(minute[:4]), int(minute[5:7]), int(minute[8:10]))
        begin = _minutes[minute] = day + int(minute[11:13]) * 3600 + int(minute[14:]) * 60
    return begin + float(moment[17:-1])


_minutes: dict[str, int] = {}


def _midnight(year: int, month: int, day: int) -> int:
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)  # years from March on: the leap day comes last
    return (365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 1 - 719468) * 86400


def span(seconds: float) -> str:
    """A length of time as people say it: `5s`, `2m 5s`, `3h 4m`, `5d 6h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def size(count: int | None) -> str:
    """So many bytes as people say it, to three digits: `980B`, `1.5MB`, `12MB`."""
    if count is None:
        return "-"
    number, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while number >= 999.5 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.1f}{units[0]}" if number < 9.95 and units[0] != "B" else f"{number:.0f}{units[0]}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}s" if seconds < 9.995 else span(seconds)


def _now() -> float:
    return time.clock_gettime(time.CLOCK_REALTIME)


def shape(rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows as they hang together: each supervisor followed by its children, with their depth."""
    names = {row["name"] for row in rows}
    below: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        parent = row["supervisor"]
        below.setdefault(parent if parent in names else None, []).append(row)
    waiting = [(0, row) for row in reversed(below.get(None, []))]
    while waiting:
        depth, row = waiting.pop()
        yield depth, row
        waiting.extend((depth + 1, child) for child in reversed(below.get(row["name"], [])))


def table(rows: list[dict[str, Any]], colour: bool, width: int) -> Iterator[str]:
    """The lines of `status`: children below their supervisor, indented. `width` 0 is a pipe: nothing is cut."""
    if not rows:
        return
    now = _now()
    shaped = list(shape(rows))
    ordered = [row for _, row in shaped]
    columns = [
        _column("NAME", ["  " * depth + row["name"] for depth, row in shaped]),
        _column("STATE", [_state(row) for row in ordered]),
        _column("PID", [str(row["pid"] or "-") for row in ordered], right=True),
        _column("FOR", [span(now - epoch(row["since"])) for row in ordered], right=True),
        _column("RESTARTS", [str(row["restarts"]) for row in ordered], right=True),
        ["CAUSE", *(clean(row["cause"]) for row in ordered)],
    ]
    if "memory" in ordered[0]:
        columns.insert(-1, _column("MEMORY", [size(row["memory"]) for row in ordered], right=True))
        columns.insert(-1, _column("CPU", [_seconds(row["cpu"]) for row in ordered], right=True))
    if any(row["next_at"] for row in ordered):
        columns.insert(-1, _column("NEXT", [_next(row, now) for row in ordered], right=True))
    if width:
        _fit(columns, width)
    if colour:
        columns[1][1:] = [
            paint(cell, _COLOURS.get(row["word"], ""), True) for cell, row in zip(columns[1][1:], ordered, strict=True)
        ]
    head, *lines = map("  ".join, zip(*columns, strict=True))
    yield paint(head, "bold", colour)
    yield from lines


def _fit(columns: list[list[str]], width: int) -> None:
    """Cut the last column to what room there is."""
    room = width - sum(len(column[0]) + 2 for column in columns[:-1])
    columns[-1] = [text if len(text) <= room or room < 2 else text[: room - 1] + "…" for text in columns[-1]]


def _column(title: str, cells: list[str], right: bool = False) -> list[str]:
    cells.insert(0, title)
    wide = max(map(len, cells))
    return list(map(str.rjust if right else str.ljust, cells, repeat(wide)))


def _state(row: dict[str, Any]) -> str:
    return f"{row['word']}, unhealthy" if row["healthy"] is False else str(row["word"])


def _next(row: dict[str, Any], now: float) -> str:
    return f"in {span(epoch(row['next_at']) - now)}" if row["next_at"] else "-"


def limits(rows: list[dict[str, Any]], colour: bool) -> Iterator[str]:
    """The lines of `limits`. Who waits comes last: there may be many."""
    now = _now()
    waiting = [[run for part in ("rate", "bulkhead") for run in (row[part] or {"waiting": ()})["waiting"]] for row in rows]
    columns = [
        _column("NAME", [row["name"] for row in rows]),
        _column("JOBS", [", ".join(row["jobs"]) if row["shared"] else "its own" for row in rows]),
        _column("BREAKER", [_breaker(row["breaker"], now) for row in rows]),
        _column("RATE", [_rate(row["rate"]) for row in rows]),
        _column("PLACES", [_places(row["bulkhead"]) for row in rows]),
        ["WAITING", *(", ".join(runs) or "-" for runs in waiting)],
    ]
    head, *lines = map("  ".join, zip(*columns, strict=True))
    yield paint(head, "bold", colour)
    yield from lines


def _breaker(breaker: dict[str, Any] | None, now: float) -> str:
    if breaker is None:
        return "-"
    if breaker["state"] == "half-open":
        return f"half-open, {breaker['successes']} of {breaker['closes_at']} successes"
    if breaker["state"] == "open":
        left = epoch(breaker["trial_at"]) - now
        return f"open, trial {f'in {span(left)}' if left > 0 else 'is due'}"
    return f"closed, {breaker['failures']} of {breaker['opens_at']} failures"


def _rate(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return "-"
    per_day = rate["rate"] * 86400
    unit, number = next(((unit, per_day / days) for unit, days in _PER_DAY if per_day >= days), ("d", per_day))
    return f"{number:.6g}/{unit}, {max(0, int(rate['tokens'] + 0.001))} of {rate['burst']} left"


_PER_DAY = (("s", 86400), ("m", 1440), ("h", 24))


def _places(bulkhead: dict[str, Any] | None) -> str:
    return "-" if bulkhead is None else f"{bulkhead['in_use']} of {bulkhead['concurrency']} taken"


def tree(branches: list[dict[str, Any]], colour: bool) -> Iterator[str]:
    """The lines of `tree`."""
    drawn = list(_drawn(branches, ""))
    wide = max((len(lines) + len(row["name"]) for lines, row in drawn), default=0)
    for lines, row in drawn:
        gap = " " * (wide - len(lines) - len(row["name"]) + 2)
        kind = "" if row["kind"] == "supervisor" else f"{row['kind']}, "
        state = paint(_state(row), _COLOURS.get(row["word"], ""), colour)
        yield f"{lines}{row['name']}{gap}{kind}{state}: {clean(row['cause'])}"


def _drawn(branches: list[dict[str, Any]], indent: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, branch in enumerate(branches):
        last = index == len(branches) - 1
        yield indent + ("└─ " if last else "├─ "), branch["status"]
        yield from _drawn(branch["children"], indent + ("   " if last else "│  "))


def queues(rows: list[dict[str, Any]], colour: bool, width: int) -> Iterator[str]:
    """The lines of `queue ls`. A queue whose engine is away has no numbers, but its trouble."""
    counts = ("waiting", "delayed", "running", "done", "dead", "cancelled", "expired")
    columns = [
        _column("QUEUE", [row["name"] for row in rows]),
        _column("STATE", ["away" if row["trouble"] else "paused" if row["paused"] else "open" for row in rows]),
        *(_column(count.upper(), [_number(row[count]) for row in rows], right=True) for count in counts),
        _column("OLDEST", ["-" if row["oldest"] is None else span(row["oldest"]) for row in rows], right=True),
        _column("BACKEND", [clean(row["backend"]) for row in rows]),
        ["JOBS", *(clean(row["trouble"] or ", ".join(row["jobs"]) or "-") for row in rows)],
    ]
    yield from _painted(columns, 1, colour, width)


def _number(count: int | None) -> str:
    return "-" if count is None else str(count)


def items(rows: list[dict[str, Any]], colour: bool, width: int) -> Iterator[str]:
    """The lines of `queue peek` and `queue dead`: what an item is about comes last, or the error it died of."""
    now = _now()
    columns = [
        _column("ITEM", [clean(row["id"]) for row in rows]),
        _column("STATE", [_item_state(row) for row in rows]),
        _column("AGE", [span(now - epoch(row["put_at"])) for row in rows], right=True),
        _column("ATTEMPTS", [str(row["attempts"]) for row in rows], right=True),
        _column("PRIORITY", [row["priority"] for row in rows]),
        _column("DUE", [_due(row, now) for row in rows], right=True),
        ["ERROR" if any(row["error"] for row in rows) else "PAYLOAD", *(clean(row["error"] or _payload(row)) for row in rows)],
    ]
    if all(row["state"] != "waiting" for row in rows):
        del columns[5]
    yield from _painted(columns, 1, colour, width)


def _painted(columns: list[list[str]], state: int, colour: bool, width: int) -> Iterator[str]:
    """The lines of a table whose column `state` has words with colours."""
    if width:
        _fit(columns, width)
    if colour:
        columns[state][1:] = [paint(cell, _COLOURS.get(cell.rstrip(), ""), True) for cell in columns[state][1:]]
    head, *lines = map("  ".join, zip(*columns, strict=True))
    yield paint(head.rstrip(), "bold", colour)
    yield from lines


def _item_state(row: dict[str, Any]) -> str:
    return "cancelling" if row["cancelling"] else str(row["state"])


def _due(row: dict[str, Any], now: float) -> str:
    left = epoch(row["ready_at"]) - now
    return "-" if row["state"] != "waiting" else f"in {span(left)}" if left > 0 else "now"


def _payload(row: dict[str, Any]) -> str:
    return f"({size(row['bytes'])})" if row["payload"] is None else _json(row["payload"])


def _json(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def ended(item: dict[str, Any], colour: bool) -> str:
    """One line for an item that has ended: what came of it."""
    state = paint(item["state"], _COLOURS.get(item["state"], "green"), colour)
    what = (
        item["error"] if item["error"] and item["state"] != "done" else "" if item["result"] is None else _json(item["result"])
    )
    return f"{clean(item['id'])}: {state}" + (f": {clean(what)}" if what else "")


_MOMENTS = ("put_at", "ready_at", "expires_at", "started_at", "ended_at", "lease_until")


def item(found: dict[str, Any], colour: bool) -> Iterator[str]:
    """The lines of `queue show`: all that is known of an item."""
    facts: dict[str, str] = {}
    for key, value in found.items():
        if value in (None, False) or key in ("id", "traceback", "payload", "result"):
            continue
        shown = _day_and_time(value) if key in _MOMENTS else size(value) if key == "bytes" else _fact(key, value)
        facts[key.replace("_", " ")] = clean(shown)
    wide = max(map(len, facts))
    yield paint(clean(found["id"]), "bold", colour)
    yield from (f"  {name:<{wide}}  {value}" for name, value in facts.items())
    for key in ("payload", "result"):
        if found[key] is not None:
            yield f"{key}: {clean(_json(found[key]))}"
    if found["traceback"]:
        yield from map(clean, found["traceback"].splitlines())


def _fact(key: str, value: object) -> str:
    if key != "progress":
        return str(value).lower() if isinstance(value, bool) else str(value)
    assert isinstance(value, list)
    return f"{value[0]:g}" + ("" if value[1] is None else f" of {value[1]:g}")


def history(runs: list[dict[str, Any]], colour: bool, width: int) -> Iterator[str]:
    """The lines of `history`: runs, the latest last. `width` 0 is a pipe: nothing is cut."""
    columns = [
        _column("RUN", [run["run"] for run in runs]),
        _column("STARTED", [_day_and_time(run["started"]) for run in runs]),
        _column("TOOK", [_seconds(run["duration"]) for run in runs], right=True),
        _column("OUTCOME", [run["outcome"] for run in runs]),
        ["REASON", *map(_how, runs)],
    ]
    if width:
        _fit(columns, width)
    if colour:
        columns[3][1:] = [paint(cell, _COLOURS.get(cell.rstrip(), ""), True) for cell in columns[3][1:]]
    head, *lines = map("  ".join, zip(*columns, strict=True))
    yield paint(head, "bold", colour)
    yield from lines


def _day_and_time(moment: str) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch(moment)))


def _how(run: dict[str, Any]) -> str:
    """Why it ended, and what it came to where that says more."""
    reason, cause = clean(run["reason"]), clean(run["cause"])
    text = cause if reason in (cause, run["outcome"]) else f"{cause}; {reason}"
    return text if run["attempts"] == 1 else f"{text} (after {run['attempts']} attempts)"


_PLAN = (
    ("added", "add"),
    ("removed", "remove"),
    ("moved", "move to another supervisor"),
    ("restarted", "restart"),
    ("changed", "change live"),
)


def plan(result: dict[str, Any], only_planned: bool) -> Iterator[str]:
    """The lines of `reload`: what it does, or would do."""
    touched = False
    for field, does in _PLAN:
        if result[field]:
            touched = True
            yield f"{'would ' if only_planned else ''}{does}: " + ", ".join(result[field])
    for note in result["notes"]:
        yield clean(note)
    if not touched:
        yield "nothing has changed"


_PLACED = (
    "event",
    "seq",
    "at",
    "name",
    "verb",
    "phase",
    "names",
    "problems",
    "cause",
    "text",
    "by",
    "because",
    "why",
    "exit",
    "duration",
    "spent",
    "output",
    "attempts",
)


def event(item: dict[str, Any], colour: bool) -> str:
    """One line for one event: the local time, its number, whom it is about, what, and why."""
    if item["event"] == "lagged":
        return paint(f"[{item['count']} events were too fast for this reader, or are too long ago]", "yellow", colour)
    clock = time.strftime("%H:%M:%S", time.localtime(epoch(item["at"]))) + item["at"][19:23]
    name = clean(item.get("name") or "-")
    what = clean(item["event"].replace("_", " "))
    line = f"{clock} {item['seq']:>5} {paint(f'{name:16}', colour_of(name), colour)} {what:12} {clean('; '.join(_facts(item)))}"
    return line.rstrip()


def _facts(item: dict[str, Any]) -> Iterator[str]:
    """What an event says, in the order that reads best; a field that is not known here is shown as it is."""
    for key in ("verb", "phase", "names", "problems", "cause", "text"):
        if value := item.get(key):
            yield ", ".join(value) if isinstance(value, list) else str(value)
    for key, value in item.items():
        if key not in _PLACED and value not in (None, [], False, ""):
            yield f"{key}={_value(value)}"
    if item.get("attempts", 1) != 1:
        yield f"attempts={item['attempts']}"
    if duration := item.get("duration"):
        yield f"after {duration:.3g} s"
    if output := item.get("output"):
        yield f"last output: {output[-1]}"
    if by := item.get("by"):
        yield f"by {by}"


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
