"""The benchmark of modelled energy: its stages add up to the cost report's totals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def energy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("energy")
    monkeypatch.setattr(module, "FABRICS", ("crossbar-256", "pcm-64"))
    monkeypatch.setattr(module, "networks", lambda width: [("L = 6", 2, module.six_layers(2, 4))])
    return module


def test_each_stage_takes_from_the_factor(
    energy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["energy.py", "--out", str(tmp_path / "energy.json")])
    energy.main()
    rows = json.loads((tmp_path / "energy.json").read_text())["rows"]
    assert len(rows) == 2 * 3
    for row in rows:
        for end in (0, 1):
            factors = [row["factors"][stage][end] for stage in ("crossbars", "converters", "memory", "digital")]
            assert factors == sorted(factors, reverse=True)
            assert row["factors"]["digital"][end] > row["factors"]["gradients"][end]
            assert row["factors"]["digital"][end] > row["factors"]["in place"][end]
    by_kappa = [row["factors"]["digital"] for row in rows if row["fabric"] == "pcm-64"]
    assert by_kappa == sorted(by_kappa, reverse=True)
    assert capsys.readouterr().out.count("| L = 6 | 2 |") == 6


def test_stages_are_the_report(energy: Any) -> None:
    x = energy.torch.randn(2, 3, 32, 32)
    report = energy.papers_plan(energy.six_layers(2, 4), x, hardware="crossbar-256").cost_report(nudged_phases=2)
    found = energy.stages(report, 2)
    crossbars = 3 * sum(cost.analog.low for cost in report.blocks)
    assert found["crossbars"].low == pytest.approx(crossbars)
    assert found["digital"] == report.training
    converters = report.constants["dac_pj"].value.low + report.constants["adc_pj"].value.low
    boundary = sum(cost.dac + cost.adc for cost in report.blocks) / 2
    assert 1 < (found["converters"].low - crossbars) / (converters * boundary) < 4
