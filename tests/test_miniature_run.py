"""`sailvit miniature` as a user runs it, in its small setting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sailvit.examples.miniature import PROBE_SETS
from sailvit.examples.miniature.answers import CATEGORIES


RUNS = ("runs/aim", "runs/language", "arms/refined/stage1", "arms/refined/stage2", "arms/refined/stage3")


def run_quick(folder: Path) -> Path:
    command = [sys.executable, "-m", "sailvit_cli", "miniature", str(folder), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("finished") + done.stdout.count("finished") == len(RUNS) + 1
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    return run_quick(tmp_path_factory.mktemp("miniature") / "quick")


@pytest.mark.slow
def test_the_quick_setting_trains_every_part_and_measures_it(quick):
    for run in RUNS:
        losses = [json.loads(line)["loss"] for line in (quick / run / "log.jsonl").read_text().splitlines()]
        quarter = max(1, len(losses) // 4)
        assert sum(losses[-quarter:]) < 0.95 * sum(losses[:quarter]), run
    base, refined = (json.loads((quick / "results" / f"{arm}.json").read_text()) for arm in ("base", "refined"))
    assert (base["pictures"], refined["pictures"]) == (0, 120 + 960 + 1140)
    assert {*base["probes"]} == {*refined["probes"]} == {*PROBE_SETS} and not base["answers"]
    assert [refined["answers"][name]["n"] for name in CATEGORIES] == [60, 60, 60]
    assert (quick / "report.html").exists() and (quick / "sailvit-miniature" / "model.safetensors").exists()


@pytest.mark.nightly
def test_the_same_seed_gives_the_same_bytes(quick, tmp_path):
    again = run_quick(tmp_path / "again")
    for name in ("sailvit-miniature", "arms/refined/stage3"):
        weights = [(folder / name / "model.safetensors").read_bytes() for folder in (quick, again)]
        assert weights[0] == weights[1], name
