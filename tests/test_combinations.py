"""All pairs of features, `benchmarks/combinations.py`: the array covers them, a sample works, and faults are found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import ffebm_compiler as ffebm
from ffebm_compiler.passes.dialect import WIRING_KINDS
from ffebm_compiler.runtime.energies.choice import ENERGIES
from ffebm_compiler.runtime.estimators.choice import ESTIMATORS
from ffebm_compiler.runtime.solvers.base import Solver

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import combination_axes
    import combination_checks
    import combination_refusals
    import combinations
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

BASE = {**combination_axes.DEFAULTS, "done": "step"}
SLOW = ("ONNX", "ONNX parts", "compile")
"""They take several seconds each. tests/test_onnx_whole.py and others try them."""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return combinations.array("MLP")


def test_the_axes_are_those_of_the_code() -> None:
    axes = combination_axes.axes(list(combination_checks.ACTIONS))
    assert axes["energy"] == list(ENERGIES)
    assert {label.split(",")[0] for label in axes["estimator"]} == {kind.name for kind in ESTIMATORS}
    kinds = {name for name in ffebm.__all__ if isinstance(getattr(ffebm, name), type)}
    assert set(axes["solver"]) == {"chosen"} | {n for n in kinds if issubclass(getattr(ffebm, n), Solver)}
    assert {f"preset {name}" for name in ffebm.device_presets()} <= set(axes["devices"])
    assert set(combination_axes._CHOICES["block_ops"]["all"]) == set(WIRING_KINDS)


@pytest.mark.slow
def test_every_pair_is_in_a_row_or_refused(rows: list[dict[str, str]]) -> None:
    left = combinations.uncovered(rows, "MLP")
    assert left
    assert not any(combinations.possible({"network": "MLP", **dict(pair)}) for pair in left)
    assert not any(combination_refusals.expected(row) for row in rows)


@pytest.mark.slow
def test_rows_of_the_array_work(rows: list[dict[str, str]]) -> None:
    for row in [row for row in rows if row["done"] not in SLOW][::16]:
        outcome = combinations.run(row)
        assert outcome.verdict == "works", f"{row}: {outcome.text}"


def test_what_is_refused_says_what_to_do() -> None:
    rows = combinations.refused_rows("MLP")
    anywhere = [refusal for refusal in combination_refusals.REFUSALS if "network" not in refusal.when]
    firsts = [next(row for row in rows if refusal.holds(row)) for refusal in anywhere]
    for row in firsts:
        outcome = combinations.run(row) if row["done"] not in SLOW else None
        assert outcome is None or outcome.verdict == "refused", f"{row}: {outcome}"


def test_what_is_not_on_the_list_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**BASE, "estimator": "ep, holomorphic"}
    assert combinations.run(row).verdict == "refused"
    monkeypatch.setattr(combination_refusals, "REFUSALS", ())
    outcome = combinations.run(row)
    assert (outcome.verdict, outcome.text.split(":")[0]) == ("wrong", "a refusal that is not expected")
    refusal = combination_refusals.Refusal({"estimator": ("ep, holomorphic",)}, "no")
    assert combinations._judged("no.", [refusal])[0] == "wrong"
    assert combinations._judged("no: use another", [refusal])[0] == "refused"
    monkeypatch.setattr(combination_refusals, "REFUSALS", (refusal,))
    assert "not refused" in combinations.run({**row, "activation": "tanh"}).text


def test_options_without_effect_and_raw_exceptions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ffebm.HybridModel, "set_devices", lambda self, devices: None)
        outcome = combinations.run({**BASE, "devices": "static"})
        assert (outcome.verdict, outcome.text) == ("wrong", "the devices are others")
    with monkeypatch.context() as patch:
        patch.setattr(ffebm.HybridModel, "summary", lambda self: 1 / 0)
        assert combinations.run(BASE).text.startswith("ZeroDivisionError")


def test_the_page_has_every_value() -> None:
    text = (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
    for axis, labels in combination_axes.axes(list(combination_checks.ACTIONS)).items():
        line = next(line for line in text.split("## ")[0].splitlines()[::-1] if line.startswith(f"| {axis} |"))
        assert [label for label in labels if label not in line] == [], f"run make combinations: {axis}"
    assert "## Failures" not in text
