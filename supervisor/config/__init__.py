"""The configuration: TOML text -> `Config`, with every fault and its place; and the difference between two.

tables        what a whole file says: `[daemon]`, `[log]`, and the `Config` that holds everything
loader        text, or a mapping, to `Config`
difference    what a reload from one to another does
document      the files: includes, and which key stands where
toml_places   line and column of every key of a TOML text
reading       one reading: faults gathered, `${NAME}` expanded
shapes        the shapes of values, derived from the specs
rules         what is refused of one job by itself
relations     what is refused of jobs and supervisors together
later         words of the contract that are not built yet
preflight     what a configuration needs of the machine
schema        the JSON Schema, for editors
"""

from __future__ import annotations

from supervisor.config.difference import Plan, diff
from supervisor.config.loader import check, from_mapping, load
from supervisor.config.tables import Config, DaemonSpec, LogSpec

__all__ = ["Config", "DaemonSpec", "LogSpec", "Plan", "check", "diff", "from_mapping", "load"]
