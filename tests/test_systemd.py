"""sd_notify against a real socket, the printed unit, and a daemon under a real systemd."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from supervisor.systemd import Notifier, unit

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A service manager's end of the notification socket, and its address as systemd writes it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@supervisor-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(address.replace("@", "\0", 1))
        end.settimeout(30)
        yield end, address


def test_each_message_says_what_systemd_expects(manager):
    end, address = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})

    assert notifier.ready("3 jobs\nfrom héllo →")
    assert end.recv(4096).decode().split("\n") == ["READY=1", "STATUS=3 jobs from héllo →"]

    before = time.monotonic_ns() // 1000
    assert notifier.reloading()
    reloading, at, _ = end.recv(4096).decode().split("\n")
    assert reloading == "RELOADING=1" and before <= int(at.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000

    assert notifier.stopping("draining", seconds=1.5)
    assert end.recv(4096).decode().split("\n") == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=11500000", "STATUS=draining"]

    assert notifier.watchdog() and end.recv(4096) == b"WATCHDOG=1"
    notifier.close()
    assert not notifier.watchdog()


def test_without_a_manager_nothing_is_said_and_nothing_fails(tmp_path):
    for address in (None, str(tmp_path / "nobody"), "x" * 500):
        with closing(Notifier(address)) as notifier:
            assert not notifier.ready("ok")


def test_a_manager_that_does_not_read_is_not_waited_for(manager):
    end, address = manager
    with closing(Notifier(address)) as notifier:
        sent = 0
        while notifier.status("x" * 1000):
            sent += 1
        assert 0 < sent < 10_000
        end.recv(4096)
        assert notifier.status("again")


def test_what_is_meant_for_us_is_not_left_for_children():
    environ = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "PATH": "/bin"}
    with closing(Notifier.from_environment(environ)) as notifier:
        assert notifier.watchdog_interval == 30
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("usec, pid", [("", ""), ("0", ""), ("abc", ""), ("1000000", "1")])
def test_a_watchdog_that_is_not_for_us_is_none(usec, pid):
    assert Notifier.from_environment({"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}).watchdog_interval is None


# -- the unit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"user": True}, {"notify_reload": True}], ids=["plain", "user", "notify-reload"])
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path, options):
    directory = tmp_path / 'odd % $HOME "name" dir'
    directory.mkdir()
    (tmp_path / "jobs.service").write_text(unit("jobs", directory / "supervisor.toml", 80, **options))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / "jobs.service")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    said = [line for line in done.stderr.splitlines() if "jobs.service" in line]
    version = int(subprocess.check_output(["systemd-analyze", "--version"], text=True).split()[1])
    if options.get("notify_reload") and version < 253:  # as the unit's own comment says
        assert len(said) == 1 and "Failed to parse service type" in said[0]
    else:
        assert said == [] and done.returncode == 0, done.stderr


def test_the_unit_runs_this_installation_with_this_file_and_outlasts_its_grace():
    lines = unit("jobs", Path("/srv/a b/supervisor.toml"), 80.5).splitlines()
    program = str(Path(sys.executable).with_name("supervisor"))
    assert any(line.startswith("ExecStart=") and line.endswith('run -c "/srv/a b/supervisor.toml"') for line in lines)
    if Path(program).exists():
        assert f'ExecStart={program} run -c "/srv/a b/supervisor.toml"' in lines
    assert {"Type=notify", "ExecReload=kill -HUP $MAINPID", "KillMode=mixed", "Delegate=yes", "TimeoutStopSec=91"} <= set(lines)


# -- a real systemd -----------------------------------------------------------------------------------------------------

RIG = Path(os.environ.get("SYSTEMD_RIG", ROOT.parent / "shared" / "systemd-rig"))
"""Boots a throw-away systemd; a tool of ours that lives beside the repository."""

JOBS = """
[jobs.a]
command = ["sleep", "98761"]
[jobs.b]
command = ["sh", "-c", "trap '' TERM; setsid sleep 98762 & echo up; while :; do sleep 1; done"]
ready = { log = "up" }
grace = "0.2s"
"""

SESSION = r"""
supervisor() { "$PYTHON" -P -m supervisor "$@"; }
show() { systemctl show --value -p "$1" supervisor; }
pid() { supervisor status --json "$1" | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)[0]["pid"])'; }
event() { grep -m1 "$1" < <(timeout 30 "$PYTHON" -P -m supervisor events --json -f --since 0); }
eventually() { for _ in $(seq 300); do if "$@"; then return; fi; sleep 0.1; done; echo "never: $*"; return 1; }
says() { [ "$(show StatusText)" = "$1" ]; }
is() { [ "$(show "$1")" = "$2" ]; }
alive() { grep -lsz "$1" /proc/[0-9]*/cmdline; }

echo == start: active only after READY
systemctl start supervisor
is ActiveState active
says "2 jobs from $PWD/supervisor.toml"
supervisor start a b
[ -S /run/supervisor/control.sock ] && [ "$(stat -c %a /var/lib/supervisor)" = 700 ]

echo == all of it in a group of its own below that of the unit, and the guardian beside it
group=$(grep ' cgroup2 ' /proc/mounts | head -1 | cut -d' ' -f2)$(show ControlGroup)
grep -qx "$(show MainPID)" "$group"/supervisor-*/daemon/cgroup.procs
grep -qx "$(pid a)" "$group"/supervisor-*/daemon/cgroup.procs
eventually grep -qz guardian.py "/proc/$(head -1 "$group/cgroup.procs")/cmdline"
journalctl -u supervisor | grep -q "children end with the daemon: all of them (cgroup $group"

echo == kill -9 of a child
before=$(pid a)
kill -9 "$before"
event '"run": *"a#2"'
supervisor start a
[ "$(pid a)" != "$before" ]

echo == reload of a good file
{ cat jobs.toml; printf '[jobs.c]\ncommand = ["sleep", "98763"]\n'; } > supervisor.toml
systemctl reload supervisor
event '"event": *"reloaded"'
eventually says "3 jobs from $PWD/supervisor.toml"
eventually is ActiveState active
supervisor start c

echo == reload of a broken file
echo 'broken =' > supervisor.toml
systemctl reload supervisor
event '"event": *"reload_refused"'
eventually says "3 jobs from $PWD/supervisor.toml"
eventually is ActiveState active
supervisor status
cp jobs.toml supervisor.toml

echo == stop leaves no process and is clean
systemctl stop supervisor
is Result success; is ExecMainStatus 0; is NRestarts 0
! alive 9876
[ ! -e /var/lib/supervisor/instance ]

echo == kill -9 of the daemon: restarted, and nothing is there twice
systemctl start supervisor
supervisor start a b
old=$(pid a); stuck=$(alive 98762)
kill -9 "$(show MainPID)"
eventually is NRestarts 1
eventually is ActiveState active
supervisor start a b
[ ! -e "/proc/$old" ] && [ "$(alive 98761 | wc -l)" = 1 ] && [ "$(alive 98762)" != "$stuck" ]
systemctl stop supervisor
! alive 9876
echo == done
"""


def in_rig(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(RIG), *arguments], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def rig():
    if not RIG.exists():
        pytest.skip(f"no systemd-rig at {RIG}")
    check = in_rig("--check")
    if check.returncode == 77:
        pytest.skip(check.stderr.strip().splitlines()[-1])
    assert check.returncode == 0, check.stderr


def test_a_real_systemd_starts_reloads_restarts_and_stops_the_daemon(rig, tmp_path):
    (tmp_path / "supervisor.toml").write_text(JOBS)
    (tmp_path / "jobs.toml").write_text(JOBS)
    (tmp_path / "supervisor.service").write_text(unit("supervisor", tmp_path / "supervisor.toml", 80))
    drop_in = tmp_path / "supervisor.service.d"
    drop_in.mkdir()
    (drop_in / "test.conf").write_text(f"[Service]\nEnvironment=PYTHONPATH={ROOT}\nWatchdogSec=5\n")
    done = in_rig(
        "--unit", str(tmp_path / "supervisor.service"), "--unit", str(drop_in), "--bind", str(tmp_path), "--bind-ro", str(ROOT),
        "--env", f"PYTHON={sys.executable}", "--env", f"PYTHONPATH={ROOT}", "--cwd", str(tmp_path), "--journal-on-failure",
        "--timeout", "100", "--", "bash", "-euxo", "pipefail", "-c", SESSION,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("== done\n"), f"{done.stdout}\n{done.stderr[-6000:]}"
