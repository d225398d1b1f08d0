"""What the README and docs/ say is true: every example is run, or at least read by what would read it."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from running import MODULE, ROOT, command, running, well
from servers import free_port
from timelines import timeline

from supervisor import config
from supervisor.cli import commands, quick
from supervisor.config import later, preflight, schema
from supervisor.config.tables import TABLES
from supervisor.control.verbs import VERBS
from supervisor.errors import SpecError

sys.path.insert(0, str(ROOT / "docs"))
import reference

README = ROOT / "README.md"
MIGRATION = ROOT / "docs" / "coming-from-supervisord.md"
OURS = [README, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "benchmarks.md")]
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; `mark` is the comment right above it."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str:
        """The name of the file that it shows, where its first line says so."""
        found = re.match(r"# ([\w.]+\.(?:py|toml|env))\n", self.text)
        return found[1] if found else ""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text"))
        yield Block(page, line, found["mark"] or "", found["language"], found["text"])


ALL = [block for page in OURS for block in blocks(page)]


def these(language: str, mark: str = "") -> list[Any]:
    """The blocks of this language whose mark begins so, as parameters of a test."""
    return [pytest.param(each, id=each.id) for each in ALL if each.language == language and each.mark.startswith(mark)]


def lay_out(block: Block, directory: Path) -> Path:
    """The files that a reader has made when they come to `block`; gives the TOML file."""
    target = directory / "supervisor.toml"
    for each in blocks(block.page):
        if each.file:
            (directory / each.file).write_text(each.text)
        if each.language == "toml" and not each.file and each.line <= block.line:
            target.write_text(each.text)
    return directory / block.file if block.file.endswith(".toml") else target


# -- files and code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", these("toml"))
def test_every_file_passes_the_check_unless_it_shows_faults(block, tmp_path):
    file = lay_out(block, tmp_path)
    if block.mark.startswith("faults"):
        with pytest.raises(SpecError):
            config.load(file, {})
        return
    loaded = config.load(file, {})
    assert loaded.jobs
    if block.page.name != "restarts.md":  # those are run, below
        assert preflight.check(loaded).all_problems == []


@pytest.fixture(scope="session")
def ran(request, tmp_path_factory) -> dict[Block, subprocess.CompletedProcess[bytes]]:
    """What became of each program that is to be tried: as many run side by side as there are processors."""
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_every_program_runs"]
    became = {}
    turns = trio.CapacityLimiter(os.cpu_count() or 1)

    async def run(block: Block) -> None:
        directory = tmp_path_factory.mktemp("program")
        lay_out(block, directory)
        program = directory / (block.file or "program.py")
        program.write_text(block.text)
        async with turns:
            with suppress(trio.TooSlowError):  # that is about this one alone
                became[block] = await command((sys.executable, str(program)), directory=directory)

    async def run_all() -> None:
        async with trio.open_nursery() as nursery:
            for test in tests:
                nursery.start_soon(run, test.callspec.params["block"])

    trio.run(run_all)
    return became


@pytest.mark.parametrize("block", [each for each in these("python") if not each.values[0].text.startswith("# fragment")])
def test_every_program_runs(block, ran):
    result = ran.get(block)
    assert result is not None, "it does not end"
    assert result.returncode == 0, result.stderr.decode()
    assert bool(result.stdout) is not bool(block.file)  # a module says nothing, a program shows something


@pytest.mark.parametrize("block", these("text", "timeline"))
async def test_every_timeline_is_what_happens(block, tmp_path, autojump_clock):
    until, *orders = block.mark.removeprefix("timeline: ").split(", ")
    commands = [(float(at), verb, name) for verb, name, _, at in map(str.split, orders)]
    happened = await timeline(lay_out(block, tmp_path), float(until.split()[0]), commands)
    assert _moments(happened) == _moments(block.text)


def _moments(text: str) -> list[str]:
    """The lines, in an order that does not depend on chance: what happens in the same moment has no order."""
    return sorted(text.splitlines(), key=lambda line: (float(line.split()[0]), line))


# -- sessions -----------------------------------------------------------------------------------------------------------


def session(text: str) -> list[tuple[list[str], str]]:
    """The commands of a console block, as words, each with what it printed."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return [(shlex.split(line), output) for line, output in zip(parts[::2], parts[1::2], strict=True)]


def masked(text: str, directory: Path) -> list[str]:
    """Lines without what differs from run to run: numbers, who asks, where, and the width of columns."""
    text = re.sub(r"uid \d+( \([^)]*\))?", "uid 0", text.replace(str(directory), "/srv"))
    return [re.sub(r" +", " ", re.sub(r"\d+(\.\d+)?", "0", line)).strip() for line in text.splitlines()]


def wherever(text: str) -> str:
    """What is said, without what depends on where: whether a cgroup can be had."""
    return re.sub(r"(?<=^children end with the daemon: ).*", "...", text, flags=re.MULTILINE)


@pytest.mark.parametrize("block", [each for each in these("console", "checked") if each.values[0].mark == "checked"])
async def test_what_a_command_prints_is_what_the_page_shows(block, tmp_path):
    lay_out(block, tmp_path)
    for words, output in session(block.text):
        result = await command(MODULE, *words[1:], directory=tmp_path)
        assert wherever((result.stdout + result.stderr).decode()) == wherever(output)


def use_free_ports(file: Path) -> None:
    """Have workers listen where nobody else does: what a page shows may be running beside us."""
    file.write_text(re.sub(r"\b\d{4}(?=\{worker\})", _free_ten(), file.read_text()))


def _free_ten() -> str:
    """The first four digits of ports, of which those that end with 0 and 1 are free."""
    while True:
        ten = free_port() // 10
        with suppress(OSError), socket.socket() as zero, socket.socket() as one:
            zero.bind(("127.0.0.1", 10 * ten))
            one.bind(("127.0.0.1", 10 * ten + 1))
            return str(ten)


@pytest.mark.parametrize("block", these("console", "checked: daemon"))
async def test_a_session_with_a_daemon_goes_as_the_page_shows(block, tmp_path):
    use_free_ports(lay_out(block, tmp_path))
    async with running(tmp_path) as daemon:
        await daemon.until(well)
        for words, output in session(block.text):
            result = await command(MODULE, *words[1:], directory=tmp_path)
            said = (result.stdout + result.stderr).decode()
            assert masked(said, tmp_path) == masked(output, tmp_path), words


async def test_the_sessions_with_the_socket_go_as_the_page_shows(tmp_path):
    talk = [each for each in ALL if each.mark == "checked: socket"]
    lay_out(talk[0], tmp_path)
    async with running(tmp_path) as daemon:
        await daemon.until(well)
        path = tmp_path / ".supervisor" / "control.sock"
        await trio.to_thread.run_sync(_talk, path, [line for each in talk for line in each.text.splitlines()])


def _talk(path: Path, lines: list[str]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, sock.makefile("rb") as replies:
        sock.settimeout(30)
        sock.connect(os.path.relpath(path))
        for line in lines:
            if line.startswith("-> "):
                sock.sendall(line[3:].encode() + b"\n")
            elif line.startswith("<- "):
                shown = json.loads(line[3:])
                reply = next(reply for reply in map(json.loads, replies) if _about(reply) == _about(shown))
                assert _within(shown, reply), (line, reply)


def _about(reply: Any) -> Any:
    """The id of the request that a reply, or an item of a stream, belongs to."""
    return reply["params"]["id"] if "params" in reply else reply["id"]


def _within(shown: Any, real: Any) -> bool:
    """Whether a reply says what is shown of it; it may say more."""
    if isinstance(shown, dict):
        return isinstance(real, dict) and all(key in real and _within(value, real[key]) for key, value in shown.items())
    if isinstance(shown, list):
        return isinstance(real, list) and len(shown) == len(real) and all(map(_within, shown, real))
    return bool(shown == real)


# -- the tour -----------------------------------------------------------------------------------------------------------


def test_the_tour_shows_the_shipped_jobs():
    loaded = config.load(ROOT / "supervisor.toml", {})
    names = {*loaded.jobs, *loaded.supervisors}
    for mark in ("tour: status", "tour: tree"):
        (block,) = [each for each in ALL if each.mark == mark]
        ((_, output),) = session(block.text)
        assert set(re.findall(r"^(?:[│├└─ ]*)([a-z]+) ", output, re.MULTILINE)) == names


def test_the_faults_of_the_tour_are_those_that_the_broken_file_has(tmp_path):
    text = (ROOT / "supervisor.toml").read_text().replace("essential = false", "esential = false")
    text = text.replace('after = ["prepare"]\nstop_signal', 'after = ["prepair"]\nstop_signal').replace('"5s"', '"5 parsecs"')
    (tmp_path / "supervisor.toml").write_text(text)
    with pytest.raises(SpecError) as caught:
        config.load(tmp_path / "supervisor.toml", {})
    told = str(caught.value).replace(str(tmp_path), "/home/me/trio-supervisor")
    assert f"$ supervisor reload\n{told}\n" in README.read_text()


# -- commands and keys --------------------------------------------------------------------------------------------------


def command_lines() -> Iterator[Any]:
    """Every `supervisor …` in a block that a shell would read."""
    for block in ALL:
        lines = [words for words, _ in session(block.text)] if block.language == "console" else []
        if block.language == "sh":
            lines = [shlex.split(line.partition(" > ")[0]) for line in block.text.splitlines()]
        for words in lines:
            if words[0] == "supervisor":
                yield pytest.param(words[1:], id=f"{block.id} {' '.join(words[1:])}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_every_command_line_is_well_formed(words):
    if quick.parse(words) is None and words[0] not in commands.LATER:
        found = commands.cli.get_command(click.Context(commands.cli), words[0])
        assert found is not None
        found.make_context(words[0], words[1:])


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_every_command_that_the_text_mentions_exists_with_its_options(page):
    text = FENCE.sub("", page.read_text())
    mentioned = re.findall(r"`supervisor ([a-z][a-z-]*)([^`]*)`", text)
    for name, rest in mentioned:
        found = commands.cli.get_command(click.Context(commands.cli), name)
        assert found is not None, name
        known = {spelling for param in found.params for spelling in (*param.opts, *param.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest)) <= known, (name, rest)


def test_every_command_is_in_the_readme_and_every_parameter_on_the_page_of_control():
    listed = README.read_text().partition("## Commands")[2].partition("\n## ")[0]
    for name in commands.cli.list_commands(click.Context(commands.cli)):
        assert re.search(rf"\b{name}\b", listed), name
    page = (ROOT / "docs" / "control.md").read_text()
    for verb in VERBS.values():
        assert f"`{verb.name}`" in page, verb.name
        for param in verb.params:
            if not verb.command:
                assert f"`{param.name}`" in page, (verb.name, param.name)
            elif not param.positional:
                spellings = {param.option, param.short, "--no-" + param.option[2:]} - {""}
                assert any(spelling in page for spelling in spellings), (verb.name, param.option)


def test_the_reference_of_keys_is_up_to_date():
    text = reference.PAGE.read_text()
    assert reference.page(text) == text, "run: python docs/reference.py"


def rows_of_page(page: Path) -> Iterator[list[str]]:
    """The cells of every table of keys, without its head."""
    for table in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", page.read_text()), re.MULTILINE):
        head, _, *rows = table.splitlines()
        if head.split("|")[2].strip() == "here":
            yield from ([cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows)


def test_who_comes_from_elsewhere_is_told_of_keys_that_there_are():
    known = {part for path in schema.topics() for part in path.split(".")} | {*TABLES, *later.TABLES}
    for row in rows_of_page(MIGRATION):
        for key in re.findall(r"`([a-z_]+)`", row[1]) + re.findall(r"`([a-z_]+) = ", row[1]):
            assert key in known or key in VERBS, (key, row)


def test_the_example_of_supervisord_is_the_same_before_and_after():
    (before,) = [each for each in blocks(MIGRATION) if each.language == "ini"]
    (after,) = [each for each in blocks(MIGRATION) if each.language == "toml"]
    there, here = configparser.RawConfigParser(), tomllib.loads(after.text)
    there.read_string(before.text)
    assert {name[8:] for name in there.sections() if name.startswith("program:")} == set(here["jobs"])
    groups = {name[6:]: there[name]["programs"].split(",") for name in there.sections() if name.startswith("group:")}
    assert groups == {name: group["children"] for name, group in here["supervisors"].items()}
    told = " ".join(row[0] for row in rows_of_page(MIGRATION))
    for section in there.sections():
        for key in there[section]:
            assert f"`{key}" in told, (section, key)


# -- the house ----------------------------------------------------------------------------------------------------------


def rooms() -> list[set[str]]:
    """The modules that each row of the README's table names, from the top."""
    table = README.read_text().partition("<!-- rooms -->\n")[2].partition("\n\n")[0]
    rows = []
    for line in table.splitlines()[2:]:
        room, text = line.strip("| ").split(" | ", 1)
        package = next(iter(re.findall(r"`(\w+)/`", room)), "")
        named = set(re.findall(r"`(\w+)`", room)) | {package}
        inside = (
            {f"{package}.{name}" for name in re.findall(r"`(\w+)`", text)} if package else set(re.findall(r"`(\w+)`", text))
        )
        rows.append((named | inside) - {""})
    return rows


def modules() -> set[str]:
    package = ROOT / "supervisor"
    files = (path.relative_to(package) for path in package.rglob("*.py") if path.stem not in ("__init__", "__main__"))
    return {".".join(path.with_suffix("").parts) for path in files}


def test_every_module_has_its_room_in_the_readme():
    told = set().union(*rooms())
    assert modules() - told == {"client"}


def test_the_order_of_the_rooms_is_the_one_that_is_enforced():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    height = {
        name.removeprefix("supervisor."): at for at, layer in enumerate(layers) for name in re.split(r" \| ", layer) if name
    }
    highest = 0
    for row in rooms():
        heights = {height[name] for name in row if name in height}
        assert not heights or min(heights) >= highest, row
        highest = max([highest, *heights])


# -- links --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        heads = {
            re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")) for head in re.findall(r"^#+ (.*)", there.read_text(), re.M)
        }
        assert not anchor or anchor in heads, target


def test_a_session_is_split_into_commands_and_output():
    assert session("$ a b\nx\ny\n$ c 'd e'\n") == [(["a", "b"], "x\ny\n"), (["c", "d e"], "")]
