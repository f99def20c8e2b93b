"""The tables of digital parts of few bits, `benchmarks/quantised.py`, at their smallest."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from ffebm_compiler import QuantisedBackprop

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "quantised.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_quantised", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = load()


@pytest.mark.slow
def test_int8_with_qas_trains_as_float32_does() -> None:
    """Gradients of 8 bits in the digital layers of a network on digits; without QAS it is measurably worse."""
    tables = benchmark.Tables(epochs=5, seeds=1)
    exact = tables.mean_of()
    scaled = tables.mean_of(bits=8, backprop=QuantisedBackprop())
    plain = tables.mean_of(bits=8, backprop=QuantisedBackprop(scaling=False))
    assert exact > 93
    assert scaled > exact - 1.25
    assert plain < scaled - 5


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["onnx", "--quick"]) == 0
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == ["float32", "simulation", "onnxruntime"]
    assert all(50 < float(accuracy) <= 100 for _, accuracy in rows)


def test_unknown_tables_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["weather"])
    assert "no table weather; there are bits" in capsys.readouterr().err


def test_options_given_beside_quick_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(benchmark, "print_tables", lambda tables, *_: found.append((tables.epochs, tables.seeds)))
    assert [benchmark.main([*given, "--quick"]) for given in ([], ["--epochs", "7"], ["--seeds", "4"])] == [0, 0, 0]
    assert found == [(2, 1), (7, 1), (2, 4)]
