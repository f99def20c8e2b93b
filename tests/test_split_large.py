"""Layers larger than a core: split into layers that fit, numerically equal to the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Role
from ffebm_compiler.passes.partition.decide import too_large
from ffebm_compiler.plan import Plan


class Product(nn.Module):
    """A bare product by a parameter, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(20, 24))
        self.second = nn.Parameter(torch.randn(24, 12))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, torch.relu(x @ self.first), self.second)


SMALL = Hardware(tile_rows=8, tile_cols=8, tiles_per_core=4)
NARROW = Hardware(tile_rows=4, tile_cols=8, tiles_per_core=2)
CASES: dict[str, tuple[nn.Module, tuple[int, ...], Hardware]] = {
    "linear, by columns": (nn.Linear(16, 30), (16,), SMALL),
    "linear, by rows too": (nn.Linear(100, 6), (100,), SMALL),
    "linear of tokens": (nn.Sequential(nn.Linear(16, 30), nn.GELU(), nn.Linear(30, 16)), (5, 16), SMALL),
    "linear without bias": (nn.Linear(100, 9, bias=False), (100,), SMALL),
    "products": (Product(), (20,), SMALL),
    "conv": (nn.Sequential(nn.Conv2d(3, 20, 3, stride=2, padding=1), nn.ReLU()), (3, 8, 8), SMALL),
    "conv, by rows too": (nn.Conv2d(8, 6, 3, padding="same"), (8, 6, 6), SMALL),
    "conv1d": (nn.Conv1d(5, 40, 3, dilation=2), (5, 12), SMALL),
    "grouped conv": (nn.Conv2d(12, 24, 3, groups=6, bias=False), (12, 6, 6), Hardware(tiles_per_core=2)),
    "depthwise conv": (nn.Conv2d(10, 10, 3, groups=10), (10, 5, 5), Hardware(tiles_per_core=4)),
    "grouped conv, by rows and columns": (nn.Conv2d(16, 16, 3, groups=2), (16, 5, 5), SMALL),
    "transposed conv": (nn.ConvTranspose2d(6, 5, 3, stride=2, output_padding=1), (6, 4, 4), SMALL),
    "grouped transposed conv": (nn.ConvTranspose2d(8, 12, 2, groups=4), (8, 4, 4), Hardware(tiles_per_core=2)),
    "neurons": (nn.Conv2d(2, 8, 3, padding=1), (2, 6, 6), Hardware(neurons_per_block=100)),
    "unrolled": (nn.Conv2d(2, 8, 3), (2, 5, 5), Hardware(tile_cols=4, conv_mapping="unrolled", tiles_per_core=20)),
    "narrow": (nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)), (30,), NARROW),
}


@pytest.mark.parametrize("name", CASES)
def test_split_layers_equal_the_whole(name: str) -> None:
    model, shape, hardware = CASES[name]
    torch.manual_seed(0)
    model = model.double()
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    single = Hardware(**{**hardware.to_dict(), "layers_per_block": 1})
    hybrid = ffebm.convert(model, x.detach(), hardware=single)
    plan = hybrid.plan
    plan.validate()
    assert plan.rejected == {}
    assert all(block.tiles <= (hardware.tiles_per_core or block.tiles) for block in plan.blocks)
    assert any("split into" in note for note in plan.notes)
    assert torch.allclose(hybrid(x), model(x), rtol=1e-10, atol=1e-10)
    gradients(hybrid, x)
    found = {n: p.grad.clone() for n, p in hybrid.named_parameters() if p.grad is not None}, x.grad
    gradients(model, x)
    expected = {n: p.grad for n, p in model.named_parameters()}, x.grad
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def gradients(model: nn.Module, x: torch.Tensor) -> None:
    x.grad = None
    model.zero_grad()
    model(x).square().sum().backward()


def big_plan(**settings: Any) -> Plan:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 2))
    return ffebm.plan(model, torch.randn(3, 16), hardware=SMALL, **settings)


def test_the_plan_tells_of_the_parts() -> None:
    plan = big_plan()
    parts = plan.layers_of("0")
    assert sum(op.cols for op in parts) == 30
    assert not any(too_large(op, SMALL) for op in parts)
    assert plan.weights["0.weight"].block == plan.home(parts[0].name)
    assert "layer '0' is larger than a core (it needs 16 tiles and a core has 4) and split into 4 layers" in plan.notes
    assert plan.explain("0").count("analog, block_") == len({plan.home(op.name) for op in parts})
    assert plan.total_macs == 16 * 30 + 30 * 2
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_forced_layer_stays_whole_and_digital() -> None:
    plan = big_plan(force_digital="0")
    assert plan.rejected == {"0": "force_digital asks for it"}
    assert [op.cols for op in plan.graph.operations if op.role is Role.WEIGHT] == [30, 2]


def test_a_kernel_longer_than_a_core_stays_digital() -> None:
    plan = ffebm.plan(nn.Conv2d(1, 2, 5), torch.randn(2, 1, 8, 8), hardware=Hardware(tile_rows=4, tiles_per_core=2))
    assert plan.rejected == {"": "it needs 7 tiles and a core has 2"} or list(plan.rejected.values()) == [
        "it needs 7 tiles and a core has 2"
    ]


def test_a_split_plan_is_taken_back_by_convert() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 2)), torch.randn(3, 16)
    plan = ffebm.plan(model, x, hardware=SMALL)
    hybrid = ffebm.convert(model, x, plan=plan, feedback=0.01)
    assert hybrid.plan == plan
    assert set(hybrid.state_dict()) == set(model.state_dict())
