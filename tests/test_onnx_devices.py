"""ONNX files of hybrids on devices with static errors: the weights are those that the devices hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, Drift, Hardware
from ffebm_compiler.onnx import run, verify

SMALL = Hardware(tile_rows=16, tile_cols=16)
STATIC = Devices(
    weight_bits=5, programming=0.05, drift=Drift(0.05), stuck_off=0.02, on_off=50.0, wire_resistance=1e-4, seed=3
)


class Twice(nn.Module):
    """A convolution with batch norm to fold, and a layer that runs twice, so that it lies on two arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        s = torch.tanh(self.again(s))
        return self.head(F.softmax(torch.tanh(self.again(s)), -1))


def _model() -> Twice:
    model = seeded(Twice).eval()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (STATIC, {}),
        (STATIC, {"fold_batchnorm": True, "feedback": 0.5}),
        (STATIC, {"hardware": Hardware(tile_rows=5, tile_cols=6, bias_row=True)}),
        (Devices(programming=0.1, mismatch=0.2), {"feedback": 0.5}),
        (STATIC, {"energy": "resistive"}),
    ],
    ids=["static", "folded", "bias on the array", "mismatch", "resistive"],
)
def test_files_hold_what_the_devices_hold(tmp_path: Path, devices: Devices, options: dict[str, Any]) -> None:
    x = noise(5, 2, 8, 8)
    settings: dict[str, Any] = {"hardware": SMALL, "solver": ffebm.GaussSeidel(rtol=1e-6), **options}
    model = _model()
    if options.get("energy") == "resistive":
        model, x = seeded(lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))), noise(5, 12)
    hybrid = ffebm.convert(model, x, devices=devices, **settings).eval()  # training sets amplifiers anew
    assert any(block.module.program.coupled for block in hybrid.blocks)
    hybrid.age(86400.0)
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    whole, parts = hybrid.export_onnx(tmp_path / "whole.onnx"), hybrid.export_onnx(tmp_path / "parts", parts="digital")
    expected = hybrid(x).detach()
    assert max(verify(hybrid, whole, (x,)).values()) <= 1e-5
    torch.testing.assert_close(run(parts, [x])[0], expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hybrid.state_dict().items())
    ideal = ffebm.convert(model, x, **settings).eval()
    assert float((ideal(x).detach() - expected).norm() / expected.norm()) > 1e-3


def test_the_file_says_which_devices(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    x = noise(4, 6)
    hybrid = ffebm.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), x, devices=STATIC)
    hybrid.age(60)
    model = onnx.load(str(hybrid.export_onnx(tmp_path / "whole.onnx")))
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["ffebm.devices"] == "custom, seed 3, 60 s after programming"
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"0.weight@block_1.0", "0.bias"} <= names
    hybrid.set_devices(None)
    model = onnx.load(str(hybrid.export_onnx(tmp_path / "whole.onnx")))
    assert "ffebm.devices" not in {entry.key for entry in model.metadata_props}
