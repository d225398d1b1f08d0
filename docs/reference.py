"""Write the reference of keys into docs/configuration.md, from the specs: `python docs/reference.py`.

A test runs it and compares, so that a key that is added or changed is documented or the tests fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from supervisor.config import later
from supervisor.config.schema import Topic, topics
from supervisor.config.tables import NAMED, TABLES

PAGE = Path(__file__).with_name("configuration.md")
_PART = re.compile(r"(?<=<!-- reference: begin -->\n).*?(?=<!-- reference: end -->)", re.DOTALL)
_HEADS = {name: f"[{name}.NAME]" if name in NAMED else f"[{name}]" for name in TABLES}
_EFFECTS = {
    "a change is applied live": "live",
    "a change restarts the job": "restarts the job",
    "a change restarts every job that is a child process": "restarts every child process",
    "a change restarts the jobs that use it": "restarts its jobs",
    "a change needs a restart of the daemon": "needs a new daemon",
}


def reference() -> str:
    """The reference as Markdown: a table of keys for each table of the file."""
    known = topics()
    return "\n".join(line for name in TABLES if name != "defaults" for line in _section(name, known)) + "\n"


def _section(name: str, known: dict[str, Topic]) -> Iterator[str]:
    own = {path.partition(".")[2]: topic for path, topic in known.items() if path.startswith(f"{name}.")}
    yield from ("", f"### `{_HEADS[name]}`", "")
    yield from ("| key | what it says | type | default | a change |", "|---|---|---|---|---|")
    for key, topic in own.items():
        if topic.field is not None:
            yield _row(key, topic)
    if missing := [f"`{key}`" for key, topic in own.items() if topic.field is None]:
        yield from ("", f"Not supported yet: {', '.join(missing)}.")
    if name == "jobs":
        yield from ("", "Tables that are not supported yet: " + ", ".join(f"`[{table}]`" for table in later.TABLES) + ".")


def _row(key: str, topic: Topic) -> str:
    facts = topic.facts
    only = f" *(only for {topic.field.whom})*" if topic.field and topic.field.whom else ""
    default = facts.get("default", "")
    shown = "required" if default.startswith("none,") else default if default in ("", "none") else f"`{default}`"
    cells = (f"`{key}`", topic.description + only, facts["type"].partition(":")[0], shown, _EFFECTS[facts["reload"]])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(text: str) -> str:
    """`text`, the page, with the reference as it should be now."""
    return _PART.sub(lambda _: reference(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
