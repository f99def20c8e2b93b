"""The scripts that plan by accuracy, at their quickest: the example of which layers matter, and the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ffebm_compiler as ffebm

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error::UserWarning", str(ROOT / script), "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


def test_which_layers_matter(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = run("examples/which_layers.py", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "model.transformer.wte.weight" in done.stdout
    found = json.loads((tmp_path / "sensitivity.json").read_text())
    assert all(loss["deviation"] > 0 for loss in found["losses"])
    assert ffebm.Plan.from_json(tmp_path / "plan.json").blocks
    assert (tmp_path / "sensitivity.svg").read_text().startswith("<svg")


def test_both_searches_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("mnist1d")
    out = tmp_path / "rows.json"
    some = (
        "--only",
        "mnist1d",
        "--settings",
        "reram@86400",
        "--draws",
        "1",
        "--judges",
        "2",
        "--max-drop",
        "0.05",
        "--larger",
        "20",
    )
    done = run("benchmarks/accuracy_planning.py", *some, "--folder", str(tmp_path), "--out", str(out))
    assert done.returncode == 0, done.stderr
    greedy, ours, best = json.loads(out.read_text())
    assert best["search"] == "all larger mappings"
    assert max(greedy["share"], ours["share"]) <= best["share"] <= 1
    assert best["mappings"] < 16
    assert (greedy["search"], ours["search"]) == ("greedy by MACs", "plan_for_accuracy")
    assert greedy["full"] == ours["full"]
    assert 0 <= greedy["share"] <= 1
    assert len([line for line in done.stdout.splitlines() if line.startswith("| mnist1d | reram@86400 | 4 |")]) == 3
