"""`--only`: a part of a configuration."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

from msgspec import structs

from supervisor.config import Config
from supervisor.errors import ControlError, did_you_mean
from supervisor.kinds import JobSpec


def select(config: Config, only: Sequence[str]) -> Config:
    """`config` where of itself nothing starts but `only`: names or globs of jobs and supervisors. Empty: everything.

    The other jobs are there, stopped, and can be started by hand; a selected job does not wait for one of them.
    Raises ControlError for a name that fits nothing.
    """
    if not only:
        return config
    chosen = {job for pattern in only for job in _members(config, pattern)}
    left = config.jobs.keys() - chosen

    def selected(name: str, spec: JobSpec) -> JobSpec:
        if name in left:
            return structs.replace(spec, start="manual")
        return structs.replace(spec, after=tuple(target for target in spec.after if target not in left))

    return replace(config, jobs={name: selected(name, spec) for name, spec in config.jobs.items()})


def _members(config: Config, pattern: str) -> set[str]:
    """The jobs that `pattern` means: by their own name, or by that of a supervisor above them."""
    names = [*config.jobs, *config.supervisors]
    found = fnmatch.filter(names, pattern)
    if not found:
        near = did_you_mean(pattern, names, "'")
        raise ControlError(f"--only {pattern}: no such job or supervisor{near}", ControlError.NO_SUCH_NAME)
    jobs: set[str] = set()
    while found:
        name = found.pop()
        if name in config.jobs:
            jobs.add(name)
        else:
            found += config.supervisors[name].children
    return jobs
