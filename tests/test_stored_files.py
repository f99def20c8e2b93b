"""Files that version 1.0 wrote are read, with the same results: what docs/stability.md promises.

python tests/test_stored_files.py      # writes them; after the release of 1.0.0 only together with a new major version
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ffebm_compiler as ffebm
import ffebm_compiler.onnx

FOLDER = Path(__file__).parent / "data" / "stored-1"


def source() -> nn.Module:
    """Two blocks, of which one settles, and a batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 3)
    ).eval()


def inputs() -> torch.Tensor:
    """Three samples."""
    return torch.linspace(-1, 1, 12).reshape(3, 4)


def stored(name: str) -> torch.Tensor:
    """What the hybrid computed when it was written."""
    return load_file(FOLDER / "outputs.safetensors")[name]


def write() -> None:
    """A saved hybrid, its plan, an export, a hardware and devices, and what the hybrid computes."""
    hybrid = ffebm.convert(source(), inputs(), feedback=0.2, devices=ffebm.Devices(programming=0.02, seed=3)).eval()
    hybrid.save(FOLDER / "hybrid")
    hybrid.plan.to_json(FOLDER / "plan.json")
    ideal = ffebm.convert(source(), inputs(), feedback=0.2).eval()
    ideal.export_onnx(FOLDER / "onnx", parts="digital")
    (FOLDER / "hardware.json").write_text(json.dumps(hybrid.plan.hardware.to_dict(), indent=1) + "\n")
    (FOLDER / "devices.json").write_text(json.dumps(ffebm.device_presets()["pcm"].to_dict(), indent=1) + "\n")
    with torch.no_grad():
        save_file({"hybrid": hybrid(inputs()), "ideal": ideal(inputs())}, FOLDER / "outputs.safetensors")


def test_a_saved_hybrid() -> None:
    hybrid = ffebm.load(FOLDER / "hybrid", source())
    with torch.no_grad():
        torch.testing.assert_close(hybrid(inputs()), stored("hybrid"), rtol=1e-4, atol=1e-5)


def test_a_plan_its_hardware_and_devices() -> None:
    plan = ffebm.Plan.from_json(FOLDER / "plan.json")
    assert plan.blocks == ffebm.plan(source(), inputs()).blocks
    assert ffebm.Hardware.from_dict(json.loads((FOLDER / "hardware.json").read_text())) == plan.hardware
    assert ffebm.Devices.from_dict(json.loads((FOLDER / "devices.json").read_text())) == ffebm.device_presets()["pcm"]
    rebuilt = ffebm.convert(source(), inputs(), feedback=0.2, plan=plan).eval()
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(inputs()), stored("ideal"), rtol=1e-4, atol=1e-5)


def test_an_export() -> None:
    (found,) = ffebm_compiler.onnx.run(FOLDER / "onnx", inputs())
    torch.testing.assert_close(found, stored("ideal"), rtol=1e-4, atol=1e-5)


def test_a_schema_of_a_later_version_is_refused(tmp_path: Path) -> None:
    later = json.loads((FOLDER / "plan.json").read_text()) | {"schema": 99}
    (tmp_path / "plan.json").write_text(json.dumps(later))
    with pytest.raises(ffebm.PlanError, match=r"not a plan of schema \d+ \(found 99\)"):
        ffebm.Plan.from_json(tmp_path / "plan.json")


if __name__ == "__main__":
    write()
