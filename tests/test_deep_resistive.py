"""The experiment on deep resistive networks, `examples/deep_resistive.py`, at its smallest."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ffebm_compiler as ffebm

SCRIPT = Path(__file__).parents[1] / "examples" / "deep_resistive.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deep_resistive", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_quick_run(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["deep_resistive.py", "--quick", "--out", str(tmp_path / "out")])
    try:
        example.main()
        first = rows(tmp_path / "out" / "runs.csv")
        assert [row["method"] for row in first] == list(example.METHODS)
        accuracies = {row["method"]: float(row["test"]) for row in first}
        assert min(accuracies.values()) > 40
        assert abs(accuracies["EP"] - accuracies["unrolled"]) < 3
        assert len(rows(tmp_path / "out" / "curves.csv")) == 6
        assert "<svg" in (tmp_path / "out" / "curves.svg").read_text(encoding="utf-8")
        table = capsys.readouterr().out
        assert f"{accuracies['EP']:.2f}" in table
        # A run that has a line is not repeated; one that has none is.
        path = tmp_path / "out" / "runs.csv"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
        monkeypatch.setattr(example, "network", lambda method, task, hidden: example.mlp((64, *hidden, 10)))
        example.main()
        assert rows(path) == first
        assert len(rows(tmp_path / "out" / "curves.csv")) == 6
    finally:
        torch.set_num_threads(threads)


def test_the_network_is_one_block(example: ModuleType) -> None:
    model = example.DeepResistive((5, 6, 4, 3), 20.0)
    hybrid = ffebm.convert(model, torch.randn(2, 5), energy="drn")
    assert [block.state_names for block in hybrid.blocks] == [("layers.0", "layers.1", "layers.2")]
