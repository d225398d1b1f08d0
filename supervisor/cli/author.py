"""The commands of whoever writes the file: check, init, explain, schema. Exit code 78: the file is wrong."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click

from supervisor import config
from supervisor.children.cgroup import expected
from supervisor.config import Config, preflight
from supervisor.config import schema as schemas
from supervisor.config.shapes import duration
from supervisor.errors import Problem, SpecError
from supervisor.kinds.job import JobSpec
from supervisor.policies import ORDER
from supervisor.spec import Seconds, SupervisorSpec, shown
from supervisor.triggers import Cron, zone
from supervisor.wall import WallClock

FILE_IS_WRONG = 78

_file = click.option(
    "-c", "--config", "file", metavar="FILE", default="supervisor.toml", show_default=True, type=click.Path(path_type=Path)
)


@click.command()
@_file
@click.option("--no-import", is_flag=True, help="Do not import the modules of Python jobs.")
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def check(file: Path, no_import: bool, as_json: bool) -> None:
    """Check FILE: print the tree it would run, or every fault with its place (exit code 78)."""
    try:
        loaded = config.load(file, os.environ)
    except SpecError as error:
        _report(file, None, error.problems, (), {}, as_json)
    found = preflight.check(loaded, imports=not no_import)
    kinds = {name: call.kind for name, call in found.calls.items()}
    _report(file, loaded, found.all_problems, (*loaded.warnings, *found.warnings), kinds, as_json)


def _report(
    file: Path, loaded: Config | None, faults: Any, warnings: tuple[Problem, ...], kinds: dict[str, str], as_json: bool
) -> None:
    tree = [] if loaded is None or faults else [*_nodes(loaded, None, kinds)]
    if as_json:
        problems = [*map(_as_dict, faults)]
        answer = {
            "file": str(file),
            "ok": not faults,
            "problems": problems,
            "warnings": [*map(_as_dict, warnings)],
            "tree": tree,
            "guarantee": expected() if _has_children(loaded) else None,
        }
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        for warning in warnings:
            click.echo(str(warning), err=True)
        for problem in faults:
            click.echo(str(problem))
        if loaded is not None and not faults:
            click.echo("\n".join(_lines(loaded, file, tree)))
    sys.exit(FILE_IS_WRONG if faults else 0)


def _as_dict(problem: Problem) -> dict[str, Any]:
    return {
        "file": problem.file,
        "line": problem.line,
        "column": problem.column,
        "path": problem.path,
        "message": problem.message,
    }


def _nodes(loaded: Config, parent: str | None, kinds: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The children of a supervisor (None: of the root) in order, each with its own."""
    parents = loaded.parents
    everyone = {**loaded.supervisors, **loaded.jobs}
    names = loaded.supervisors[parent].children if parent else [name for name in everyone if name not in parents]
    for name in names:
        spec = everyone[name]
        node: dict[str, Any] = {"name": name, "after": list(spec.after), "description": ""}
        if isinstance(spec, SupervisorSpec):
            node |= {"kind": "supervisor", "strategy": spec.strategy.value, "intensity": spec.limit, "period": spec.period}
            yield {**node, "children": [*_nodes(loaded, name, kinds)]}
        elif isinstance(spec, JobSpec):
            kind = "command" if spec.command is not None else spec.kind or kinds.get(name, "call")
            node |= {"kind": kind, "when": _when(spec), "policies": [*_policies(spec)], "start": spec.start}
            node["description"] = shown(spec.description)
            yield node if spec.cron is None else {**node, "next": [when.isoformat() for when in _next_runs(spec)]}


def _next_runs(spec: JobSpec) -> list[datetime.datetime]:
    """The next moments of a job with `cron`, in its time zone."""
    rhythm, there = Cron(spec.cron or "", spec.timezone), zone(spec.timezone)
    return [datetime.datetime.fromtimestamp(tick, there) for tick in islice(rhythm.ticks(WallClock().now()), 3)]


def _when(spec: JobSpec) -> str:
    if spec.cron is not None:
        return f"at {shown(spec.cron)} ({shown(spec.timezone)})"
    if spec.every is not None:
        return f"every {duration(spec.every)}"
    if spec.queue is not None:
        return f"queue {spec.queue}"
    return "once" if spec.once else "service"


def _policies(spec: JobSpec) -> Iterator[str]:
    """The policies round its runs, in a word or two each, outermost first."""
    for name in ORDER:
        value = getattr(spec, name)
        if name == "retry" and value is not None:
            yield f"{value.attempts} attempts"
        elif isinstance(value, Seconds):
            yield f"{name} {duration(value)}"
        elif value is not None:
            yield f"{name} {shown(value)}" if isinstance(value, str) and name != "fallback" else name


def _lines(loaded: Config, file: Path, tree: list[dict[str, Any]]) -> Iterator[str]:
    jobs, supervisors = len(loaded.jobs), len(loaded.supervisors)
    groups = f", {supervisors} supervisor{'s' * (supervisors != 1)}" if supervisors else ""
    yield f"{file}: no faults; {jobs} job{'s' * (jobs != 1)}{groups}"
    rows = [*_rows(tree, 1)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        yield f"{name:<{width}}  {text}"
    if _has_children(loaded):
        yield expected()


def _has_children(loaded: Config | None) -> bool:
    """Whether it has jobs that are child processes: only then is there something that could outlive the daemon."""
    return loaded is not None and any(spec.spawns for spec in loaded.jobs.values())


def _rows(nodes: list[dict[str, Any]], depth: int) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if node["kind"] == "supervisor":
            limit = "" if node["intensity"] is None else f", at most {node['intensity']} restarts in {duration(node['period'])}"
            text = f"{node['strategy']}{limit}"
        else:
            text = ", ".join((node["kind"], node["when"], *node["policies"]))
            text += ", started by hand" if node["start"] == "manual" else ""
        after = f", after {', '.join(node['after'])}" if node["after"] else ""
        note = f"  # {node['description']}" if node["description"] else ""
        yield "  " * depth + node["name"], f"{text}{after}{note}"
        if "next" in node:
            yield "", f"  next: {', '.join(_in_both(datetime.datetime.fromisoformat(when)) for when in node['next'])}"
        yield from _rows(node.get("children", []), depth + 1)


def _in_both(when: datetime.datetime) -> str:
    """A moment in its own zone, and in UTC where that is another."""
    seconds = "%H:%M:%S" if when.second else "%H:%M"
    utc = when.astimezone(datetime.UTC)
    day = "" if utc.date() == when.date() else "%Y-%m-%d "
    there = when.strftime(f"%Y-%m-%d {seconds}")
    return f"{there} ({utc.strftime(day + seconds)} UTC)" if when.utcoffset() else f"{there} UTC"


@click.command()
@_file
def init(file: Path) -> None:
    """Write a commented starter file that passes `supervisor check`. Never overwrites a file."""
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(schemas.STARTER)
    except FileExistsError:
        raise click.ClickException(f"{file} exists already; another name: supervisor init -c FILE") from None
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {(error.strerror or str(error)).lower()}") from None
    click.echo(f"{file} is written; now: supervisor check, then: supervisor run")


@click.command()
@click.argument("key", required=False)
def explain(key: str | None) -> None:
    """Explain KEY of the TOML file, such as jobs.backoff or backoff.initial; without it, list all keys."""
    if key is None:
        click.echo(schemas.overview())
        return
    try:
        click.echo(schemas.explain(key))
    except LookupError as error:
        raise click.UsageError(f"{error.args[0]} (supervisor explain lists all)") from None


@click.command()
def schema() -> None:
    """Print a JSON Schema of the TOML file, for completion and checks in an editor."""
    click.echo(json.dumps(schemas.json_schema(), indent=2, ensure_ascii=False))
