"""Medians, ratios and targets; the table for people and the JSON for machines."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.capture import SHAPES, Shape
from benchmarks.children import Child
from benchmarks.drivers import DRIVERS
from benchmarks.life import STORM_CHILDREN
from benchmarks.sweep import CHILDREN, NOISY, Result, Sweeps

STILL = 1.3
"""A yardstick that moved by more than this between the sweeps makes the run void."""

YARDSTICKS = ("c-floor", "trio-floor")
FLOOR = "trio-floor"
CAPTURE_FLOOR = "trio-copy"
PYTHON_PEERS = ("supervisord", "circus")

Runs = Sequence[Sequence[float]]
Layout = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def median_of_medians(runs: Runs) -> float:
    """The usual: a median within each run, and of the runs."""
    return median(median(run) for run in runs)


def median_of_worst(runs: Runs) -> float:
    """The worst of each run, and of the runs the median."""
    return median(max(run) for run in runs)


def percentile_99(runs: Runs) -> float:
    """Of the samples of all runs together; of fewer than a hundred it is the largest."""
    pooled = [sample for run in runs for sample in run]
    return max(pooled) if len(pooled) < 100 else quantiles(pooled, n=100, method="inclusive")[98]


@dataclass(frozen=True)
class Metric:
    """A row of the table: which samples, how they come to one number, and in what unit people read it."""

    key: str
    title: str
    samples: str
    unit: str
    scale: float
    reduce: Callable[[Runs], float] = median_of_medians
    what: str = "life"
    more_is_better: bool = False


METRICS = (
    Metric("boot", "boot", "boot", "s", 1),
    Metric("restart_p50", "restart after SIGKILL, p50", "restart", "ms", 1e3),
    Metric("restart_p99", "restart after SIGKILL, p99", "restart", "ms", 1e3, percentile_99),
    Metric("all_back", "all killed at once, all back", "all_back", "s", 1),
    Metric("status", "status of all, p50", "status", "ms", 1e3),
    Metric("fresh_status", "status after a restart, p50", "fresh_status", "ms", 1e3),
    Metric("cli", "status command, p50", "cli", "ms", 1e3),
    Metric("stop", "orderly stop", "stop", "s", 1),
    Metric("pss", "memory with helpers (PSS)", "pss", "MB", 1e-6),
    Metric("idle_cpu", "idle, processor", "idle_cpu", "ms/s", 1e3),
    Metric("idle_wakeups", "idle, wake-ups", "idle_wakeups", "1/s", 1),
)


def _storm_metrics(what: str, key: str) -> tuple[Metric, ...]:
    return (
        Metric(f"{key}_starts", "starts", "starts", "1/s", 1, what=what, more_is_better=True),
        Metric(f"{key}_status_p50", "status of all, p50", "status", "ms", 1e3, what=what),
        Metric(f"{key}_status_p99", "status of all, p99", "status", "ms", 1e3, percentile_99, what),
        Metric(f"{key}_status", "worst status", "status", "ms", 1e3, median_of_worst, what),
        Metric(f"{key}_core", "processor", "core", "% of a core", 100, what=what),
    )


def _capture_metrics(shape: Shape) -> tuple[Metric, ...]:
    what = f"capture-{shape.key}"
    return (
        Metric(f"{shape.key}_rate", "throughput", "rate", "MB/s", 1e-6, what=what, more_is_better=True),
        Metric(f"{shape.key}_cost", "processor per GB", "cost", "s/GB", 1e9, what=what),
        Metric(f"{shape.key}_core", "processor", "core", "% of a core", 100, what=what),
        Metric(f"{shape.key}_lost", "lost", "lost", "bytes", 1, median_of_worst, what),
        Metric(f"{shape.key}_torn", "torn at a rotation", "torn", "lines", 1, median_of_worst, what),
    )


LONG_STORM_METRICS = (
    Metric("long_status_p99", "status of all, p99", "status", "ms", 1e3, percentile_99, "long-storm"),
    Metric("long_status", "worst status", "status", "ms", 1e3, median_of_worst, "long-storm"),
    Metric("long_early", "memory of the daemon (RSS), early", "early", "MB", 1e-6, what="long-storm"),
    Metric("long_late", "memory of the daemon (RSS), at the end", "late", "MB", 1e-6, what="long-storm"),
    Metric("long_growth", "growth of it", "growth", "late/early", 1, what="long-storm"),
)
SCENES = {
    f"crash storm of {STORM_CHILDREN}": _storm_metrics("storm", "storm"),
    f"crash storm of {STORM_CHILDREN}, default throttle": _storm_metrics("throttled-storm", "throttled"),
    f"crash storm of {STORM_CHILDREN}, a minute of it": LONG_STORM_METRICS,
    **{f"capture: {shape.title}": _capture_metrics(shape) for shape in SHAPES},
}
"""Tables beside those of the lives, by title."""

METRICS_BY_KEY = {metric.key: metric for metric in (*METRICS, *(metric for scene in SCENES.values() for metric in scene))}


@dataclass(frozen=True)
class Target:
    """A number of ours to reach at the largest N; `against` is the driver whose result is the unit, None for plain numbers.

    It is to be at most that much; where more is better, at least.
    """

    metric: str
    limit: float
    against: str | None


AHEAD = (
    *("boot", "restart_p50", "restart_p99", "all_back", "stop", "storm_status_p99", "throttled_status_p99"),
    *("blocks_rate", "lines_rate", "crowd_rate", "blocks_cost", "lines_cost", "crowd_cost", "paced_cost"),
)
"""In these, ahead of every peer in Python."""

TARGETS = (
    Target("boot", 2, FLOOR),
    Target("boot", 1, "s6"),
    Target("boot", 1, "runit"),
    Target("restart_p50", 2, FLOOR),
    Target("all_back", 2, FLOOR),
    Target("stop", 3, FLOOR),
    Target("pss", 2, FLOOR),
    Target("status", 0.003, None),
    Target("fresh_status", 0.003, None),
    Target("cli", 3, "interpreter"),
    Target("storm_status", 0.1, None),
    Target("long_status", 0.1, None),
    Target("long_growth", 1.1, None),
    *(Target(f"{shape.key}_{what}", 0, None) for shape in SHAPES for what in ("lost", "torn")),
    Target("paced_cost", 0.6, "supervisord"),
    Target("idle_cpu", 0, None),
    Target("idle_wakeups", 0, None),
    *(Target(metric, 1, peer) for peer in PYTHON_PEERS for metric in AHEAD),
)


class Report:
    """What the results of a run come to. `lay_out` makes a table of heads and rows."""

    def __init__(self, sweeps: Sweeps, child: Child, lay_out: Layout) -> None:
        self._table = lay_out
        self.plan = sweeps.plan
        self.results = sweeps.results
        self.noisy = sweeps.noisy()
        self._child = child
        self.top = max(self.plan.counts, default=0)

    def runs(self, driver: str, what: str, count: int, samples: str) -> list[list[float]]:
        """The samples of one driver, a list a run."""
        return [
            result.samples[samples]
            for result in self.results
            if (result.driver, result.what, result.count) == (driver, what, count) and samples in result.samples
        ]

    def value(self, driver: str, metric: Metric, count: int) -> float | None:
        """The number of a driver, in seconds, bytes or a rate; None where it has none."""
        runs = self._runs_of(driver, metric, count)
        return metric.reduce(runs) if runs else None

    def _runs_of(self, driver: str, metric: Metric, count: int) -> list[list[float]]:
        what = "interpreter" if driver == "interpreter" else metric.what
        return self.runs(driver, what, CHILDREN.get(what, count), metric.samples)

    def per_child(self, driver: str) -> float | None:
        """PSS in bytes of each further child, between the smallest and the largest N."""
        low, high = min(self.plan.counts, default=0), self.top
        small, large = (self.value(driver, METRICS_BY_KEY["pss"], count) for count in (low, high))
        return (large - small) / (high - low) if small is not None and large is not None and high > low else None

    def best_peer(self, metric: Metric, count: int) -> tuple[str, float] | None:
        """The peer that is best at it, and its number."""
        found = [
            (name, value)
            for name in self.plan.drivers
            if DRIVERS[name].role == "peer" and (value := self.value(name, metric, count)) is not None
        ]
        choose = max if metric.more_is_better else min
        return choose(found, key=lambda pair: pair[1]) if found else None

    def moved(self) -> list[str]:
        """Why the run is void: how far the yardstick moved between the sweeps, a sentence each."""
        yardstick = next((name for name in YARDSTICKS if name in self.plan.drivers), None)
        if not yardstick:
            return []
        found = []
        for metric in (METRICS_BY_KEY[key] for key in ("boot", "restart_p50", "all_back", "blocks_rate")):
            runs = [median(run) for run in self._runs_of(yardstick, metric, self.top)]
            if len(runs) > 1 and max(runs) > STILL * min(runs):
                count = CHILDREN.get(metric.what, self.top)
                found.append(f"{yardstick} moved by {max(runs) / min(runs):.2f} in {metric.title} at N = {count}")
        return found

    def targets(self, driver: str) -> list[dict[str, Any]]:
        """Each target that could be judged: the figure, the limit, and whether it was reached."""
        found = []
        for target in TARGETS:
            metric = METRICS_BY_KEY[target.metric]
            value = self.value(driver, metric, self.top)
            unit = self.value(target.against, metric, self.top) if target.against else 1.0
            if value is None or not unit:
                continue
            figure = value / unit
            reached = figure >= target.limit if metric.more_is_better else figure <= target.limit
            found.append({**asdict(target), "figure": figure, "reached": reached})
        return found

    # -- for people ----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """The tables."""
        parts = [f"{machine()}; child: {self.child_kind()}; {self.plan.runs} runs, interleaved; medians"]
        columns = list(self.plan.drivers)
        for count in self.plan.counts:
            parts += self._tables(f"N = {count}", METRICS, columns, count)
        for title, metrics in SCENES.items():
            parts += self._tables(title, metrics, columns, self.top)
        growing = [name for name in columns if self.per_child(name) is not None]
        if growing:
            cells = [shown(self.per_child(name), 1e-3) for name in growing]
            parts.append(self._table(["memory, per further child", "", *growing], [["PSS", "kB", *cells]]))
        parts += [part for part in (self._tasks(), self._judgement()) if part]
        return "\n\n".join(parts)

    def child_kind(self) -> str:
        """What was kept, in words."""
        return "9 kB of C without libc" if self._child.native else "PYTHON, for want of a C compiler: all look alike"

    def _tables(self, title: str, metrics: Iterable[Metric], columns: list[str], count: int) -> list[str]:
        measured = [metric for metric in metrics if any(self.value(name, metric, count) is not None for name in columns)]
        columns = [name for name in columns if any(self.value(name, metric, count) is not None for metric in measured)]
        if not measured:
            return []
        rows = []
        for metric in measured:
            cells = [
                shown(self.value(name, metric, count), metric.scale) + self._doubt(name, metric, count) for name in columns
            ]
            rows.append([metric.title, metric.unit, *cells])
        return [self._table([title, "", *columns], rows), *self._ratios(title, measured, columns, count)]

    def _doubt(self, driver: str, metric: Metric, count: int) -> str:
        # Of a life's numbers only those count that made it noisy: a few microseconds are no doubt.
        told = metric.reduce is median_of_medians and (metric.what != "life" or (driver, count) in self.noisy)
        runs = [median(run) for run in self._runs_of(driver, metric, count)]
        return "~" if told and len(runs) > 1 and max(runs) > NOISY * min(runs) else ""

    def _ratios(self, title: str, metrics: list[Metric], columns: list[str], count: int) -> list[str]:
        floor = CAPTURE_FLOOR if CAPTURE_FLOOR in columns else FLOOR
        subjects = [name for name in columns if DRIVERS[name].role == "ours"] or [floor]
        metrics = [metric for metric in metrics if not metric.key.endswith(("_lost", "_torn"))]  # whose unit would be nothing
        rows = []
        for metric in metrics:
            best = self.best_peer(metric, count)
            cells = []
            for name in subjects:
                value = self.value(name, metric, count)
                cells += [ratio(value, self.value(floor, metric, count)), ratio(value, best[1] if best else None)]
            if set(cells) != {"-"}:
                rows.append([metric.title, *cells, best[0] if best else "-"])
        if not rows:
            return []
        heads = [head for name in subjects for head in (f"{name} / {floor}", f"{name} / best peer")]
        return [self._table([f"{title}, ratios", *heads, "best peer"], rows)]

    def _tasks(self) -> str | None:
        ways = list(dict.fromkeys(result.driver for result in self.results if result.what == "tasks"))
        rows = []
        for count in self.plan.tasks if ways else ():
            found = {way: self.runs(way, "tasks", count, "task") for way in ways}
            values = {way: median_of_medians(runs) if runs else None for way, runs in found.items()}
            row = [f"spawn + finish, {count} tasks", "us", *(shown(values[way], 1e6) for way in ways)]
            rows.append([*row, ratio(values.get("ours"), values.get("trio"))])
        return self._table(["in-process tasks, each", "", *ways, "ours / trio"], rows) if rows else None

    def _judgement(self) -> str:
        lines = []
        for name in self.plan.drivers:
            if DRIVERS[name].role == "ours":
                lines += [f"{name}: {said(target)}" for target in self.targets(name)]
        failures = dict.fromkeys(f"{r.driver}, {r.what} of {r.count}: {r.error}" for r in self.results if r.error)
        lines += [f"FAILED: {failure}" for failure in failures]
        lines += [f"VOID, run it again on a quiet machine: {reason}" for reason in self.moved()]
        if self.noisy:
            lives = ", ".join(f"{driver} at {count}" for driver, count in self.noisy)
            lines.append(f"~ the runs differ by more than 1.5: {lives}")
        return "\n".join(lines)

    # -- for machines --------------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """Everything: medians in seconds, bytes and rates, and every sample they come from."""
        names = [*self.plan.drivers, "interpreter"]
        return {
            "machine": machine(),
            "child": "native" if self._child.native else "python",
            "runs": self.plan.runs,
            "void": self.moved(),
            "noisy": [{"driver": driver, "count": count} for driver, count in self.noisy],
            "medians": [
                {"driver": name, "what": metric.what, "count": count, "metric": metric.key, "value": value}
                for metric in METRICS_BY_KEY.values()
                for count in (self.plan.counts if metric.what == "life" else (CHILDREN[metric.what],))
                for name in names
                if (value := self.value(name, metric, count)) is not None
            ],
            "targets": {name: self.targets(name) for name in self.plan.drivers if DRIVERS[name].role == "ours"},
            "results": [asdict(result) for result in self.results],
        }


def machine() -> str:
    """Where this was measured, without naming it."""
    cores = len(os.sched_getaffinity(0))
    return f"{platform.system()} {platform.release()} on {cores} cores, Python {platform.python_version()}"


def shown(value: float | None, scale: float) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    scaled = value * scale
    return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def ratio(value: float | None, unit: float | None) -> str:
    """`value / unit`, where both are."""
    return "-" if value is None or not unit else f"{value / unit:.2f}"


def said(target: dict[str, Any]) -> str:
    """One line of judgement."""
    metric = METRICS_BY_KEY[target["metric"]]
    unit = f" x {target['against']}" if target["against"] else f" {metric.unit}"
    scale = 1.0 if target["against"] else metric.scale
    figure, limit = shown(target["figure"], scale), shown(target["limit"], scale)
    verdict, bound = "reached" if target["reached"] else "MISSED", "at least" if metric.more_is_better else "at most"
    where = "" if metric.what == "life" else f"{metric.what.replace('-', ', ', 1)}: "
    return f"{verdict}: {where}{metric.title} {figure}{unit} ({bound} {limit})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns parted by two spaces; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = []
    for row in (heads, ["-" * width for width in widths], *rows):
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *others)).rstrip())
    return "\n".join(lines)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


__all__ = ["METRICS", "TARGETS", "Report", "Result", "markdown_table", "table"]
