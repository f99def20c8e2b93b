"""The experiments on devices, `examples/analog_devices.py`, at their smallest."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import ffebm_compiler as ffebm

EXAMPLE = Path(__file__).parent.parent / "examples" / "analog_devices.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_analog_devices", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


experiments = load()


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert experiments.main(["drift", "--epochs", "1", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", printed, re.MULTILINE)
    assert [name for name, _ in rows] == ["age", "new", "1 hour", "1 day", "30 days", "10 years"]
    assert all(30 < float(cell) <= 100 for _, cells in rows[1:] for cell in cells.split(" | "))


def test_training_on_phase_change_devices_reaches_the_ideal() -> None:
    """From scratch by EP, the loop gain at 0.5: read noise, programming errors and all, within a point of ideal."""
    runs = experiments.Experiments(epochs=12, seeds=1)
    ideal = runs.accuracy(runs.trained(0, None, 0.5))
    pcm = runs.accuracy(runs.trained(0, ffebm.device_presets()["pcm"], 0.5))
    assert ideal > 91
    assert pcm > ideal - 1


def test_at_a_low_gain_the_nudge_is_chosen_by_it() -> None:
    """`pcm` at κ = 0.1: close to ideal with the β that the block chooses, and far below with β = 1."""
    runs = experiments.Experiments(epochs=6, seeds=1)
    own = runs.accuracy(runs.trained(0, ffebm.device_presets()["pcm"], 0.1))
    ideal = runs.accuracy(runs.trained(0, None, 0.1))
    runs.beta = 1.0
    fixed = runs.accuracy(runs.trained(0, ffebm.device_presets()["pcm"], 0.1))
    assert own > ideal - 3
    assert own > fixed + 1


def test_unknown_experiments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments.main(["weather"])
    assert "no experiment weather; there are static" in capsys.readouterr().err
