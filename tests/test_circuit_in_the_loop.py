"""examples/circuit_in_the_loop.py: it runs, writes what it says, and goes on from its checkpoint to the last bit."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed"),
    pytest.mark.slow,
]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error::UserWarning", str(ROOT / "examples/circuit_in_the_loop.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def rows(folder: Path) -> list[list[str]]:
    with open(folder / "curve.csv", encoding="utf-8") as file:
        return [row[:3] for row in csv.reader(file)]  # without the seconds


def test_a_run_that_is_cut_off_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("--quick", "--out", str(whole))
    assert done.returncode == 0, done.stderr
    assert "% of the test digits after 4 steps" in done.stdout
    assert done.stderr.count(" s a step") == 2
    assert {path.name for path in whole.iterdir()} == {"checkpoint.pt", "curve.csv", "curve.svg"}
    assert rows(whole)[0] == ["step", "loss", "test_accuracy"]
    assert [row[0] for row in rows(whole)[1:]] == ["2", "4"]

    # The state after two of the four steps, as a killed process leaves it.
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import circuit_in_the_loop as example\n"
        "original, calls = example.write_curve, []\n"
        "def once(out, table):\n    original(out, table); raise SystemExit(9)\n"
        "example.write_curve = once; example.main()"
    )
    command = [sys.executable, "-P", "-c", code, str(ROOT / "examples"), "--quick", "--out", str(cut)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert killed.returncode == 9
    assert [row[0] for row in rows(cut)[1:]] == ["2"]
    done = run("--quick", "--out", str(cut), "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" s a step") == 1
    assert rows(cut) == rows(whole)
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True)["hybrid"] for folder in (whole, cut))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    other = run("--quick", "--out", str(cut), "--beta", "0.2")
    assert other.returncode == 1
    assert "choose another folder with --out, or --fresh" in other.stderr
