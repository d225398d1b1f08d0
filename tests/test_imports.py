"""What a control command may not import: the machine that starts it pays for every module."""

import subprocess
import sys

import pytest
from control_serving import serving

HEAVY = {
    "trio",
    "asyncio",
    "structlog",
    "msgspec",
    "click",
    "typing",
    "dataclasses",
    "inspect",
    "argparse",
    "email",
    "datetime",
    "pathlib",
    "shutil",
    "subprocess",
    "threading",
    "supervisor.config",
    "supervisor.tree",
    "supervisor.spec",
    "supervisor.errors",
}
CODE = """
import sys
sys.argv[0] = "supervisor"
from supervisor.__main__ import main
try:
    main()
except SystemExit as ended:
    code = ended.code
print(code, *sys.modules, file=sys.stderr)
"""


def imported(*argv):
    result = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{CODE}", *argv], capture_output=True
    )
    code, *modules = result.stderr.decode().splitlines()[-1].split()
    return code, set(modules)


@pytest.mark.parametrize(
    "argv",
    [["status"], ["status", "--json"], ["tree"], ["restart", "idle"], ["events"], ["logs", "-n", "5"], ["limits"], ["version"]],
)
async def test_a_control_command_imports_nothing_heavy(tmp_path, argv):
    import trio

    async with serving(tmp_path) as (tree, path):
        await tree.wait_running()
        code, modules = await trio.to_thread.run_sync(imported, "--socket", path, *argv)
    assert code == "0"
    assert not modules & HEAVY


def test_a_daemon_that_is_not_there_is_found_out_as_lightly(tmp_path):
    code, modules = imported("--socket", str(tmp_path / "nothing"), "status")
    assert code == "3"
    assert not modules & HEAVY


@pytest.mark.parametrize("argv", [["--help"], ["stop", "--help"], ["statsu"], ["scale"]])
def test_help_and_mistakes_load_click_but_not_the_daemon(argv):
    _, modules = imported(*argv)
    assert "click" in modules
    assert not modules & {"trio", "structlog", "msgspec", "supervisor.config", "supervisor.tree"}


@pytest.mark.parametrize(
    "module", ["supervisor", "supervisor.client", "supervisor.control.verbs", "supervisor.control.messages"]
)
def test_the_package_and_its_blocking_client_import_no_trio(module):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import {module}; assert not {{'trio', 'structlog'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_a_tree_without_policies_loads_none_of_them():
    code = f"import sys; sys.path[:0] = {sys.path!r}; import supervisor.tree; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True)
    loaded = {name for name in result.stdout.decode().split() if name.startswith("supervisor.policies.")}
    assert loaded == {"supervisor.policies.spec", "supervisor.policies.failures"}
    assert b"supervisor.nodes.attempts" not in result.stdout
