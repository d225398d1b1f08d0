"""The benchmark of streams: that it measures, and that all ways do the same. Never how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.beside import Result, ratio
from benchmarks.streaming import SCENES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
async def test_all_ways_come_to_the_same(scene):
    ours = {name: await way(100) for name, way in scene.ways.items() if name not in ("aiostream", "asyncstdlib")}
    assert len(ours) >= 2
    assert len(set(ours.values())) == 1


def test_it_measures_every_way_that_there_is_and_says_which_there_is_not(tmp_path):
    file, blind = tmp_path / "result.json", tmp_path / "blind.py"
    blind.write_text(
        "import importlib.util as there, runpy, sys\n"
        "find = there.find_spec\n"
        "there.find_spec = lambda name, *rest: None if name in ('aiostream', 'asyncstdlib') else find(name, *rest)\n"
        "runpy.run_module('benchmarks.streaming', run_name='__main__', alter_sys=True)\n"
    )
    words = [str(blind), "-n", "80", "-r", "1", "--markdown", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "aiostream is left out: aiostream is not installed" in done.stderr
    results = json.loads(file.read_text())["results"]
    ways = {(scene, way) for scene, each in SCENES.items() for way in each.ways if way not in ("aiostream", "asyncstdlib")}
    assert {(result["what"], result["way"]) for result in results} == ways
    assert all(result["seconds"][0] > 0 and not result["error"] for result in results)
    assert "| ours |" in done.stdout and "x plain (at most 2)" in done.stdout


def test_a_ratio_is_the_median_of_those_within_a_sweep():
    plain, ours = Result("steps", "plain", 1, [1.0, 10.0, 2.0]), Result("steps", "ours", 1, [1.5, 12.0, 5.0])
    assert ratio(ours, "plain", [plain, ours]) == 1.5
    assert ratio(Result("steps", "ours", 1), "plain", [plain]) is None
