"""Plans for fabrics on which layers differ: overrides by pattern, and biases that take a row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import HardwareError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.passes.partition.compare import sweep
from ffebm_compiler.passes.partition.decide import tiles_of
from ffebm_compiler.plan import Plan

SMALL = Hardware(tile_rows=8, tile_cols=8, tiles_per_core=8, devices_per_weight=1)


class Net(nn.Module):
    """A trunk of two layers and a head of one, 16 values wide."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def planned(hardware: Hardware, **settings: object) -> Plan:
    return ffebm.plan(Net(), torch.randn(2, 16), hardware=hardware, **settings)  # type: ignore[arg-type]


def tiles(plan: Plan) -> dict[str, int]:
    return {op.path: tiles_of(op, plan.hardware) for op in plan.graph.operations if op.rows}


def test_an_override_changes_the_tiles_of_the_layers_it_matches() -> None:
    plan = planned(replace(SMALL, overrides={"trunk": {"tile_rows": 16, "tile_cols": None}}))
    assert tiles(plan) == {"trunk.0": 1, "trunk.2": 1, "head": 4}
    assert tiles(planned(SMALL)) == {"trunk.0": 4, "trunk.2": 4, "head": 4}
    assert [block.tiles for block in plan.blocks] == [6]
    assert len(planned(SMALL).blocks) == 2
    assert Plan.from_dict(plan.to_dict()) == plan
    assert "6 tiles on 1 core; 100.0 % of the tiles' devices" in str(plan)


@pytest.mark.parametrize(
    "overrides", [None, {"trunk.*": {"tile_cols": 12, "devices_per_weight": 2}, "head": {"tile_rows": 5}}]
)
@pytest.mark.parametrize("bias_row", [False, True])
def test_placement_counts_every_tile_and_device(overrides: dict[str, dict[str, int]] | None, bias_row: bool) -> None:
    plan = planned(replace(SMALL, overrides=overrides, bias_row=bias_row, tiles_per_core=30))
    placed = plan.placement()
    assert placed.tiles == sum(tiles(plan).values())
    for op in (op for op in plan.graph.operations if op.rows):
        layer = placed.layer(op.path)
        held = list(layer.tiles())
        assert len(held) == layer.count == tiles_of(op, plan.hardware)
        assert layer.rows == op.rows + (bias_row and op.bias)
        assert sum(tile.utilisation * layer.tile_devices for tile in held) == pytest.approx(layer.devices)


def test_a_bias_row_takes_another_tile_where_the_rows_are_full() -> None:
    assert tiles(planned(replace(SMALL, bias_row=True))) == {"trunk.0": 6, "trunk.2": 6, "head": 4}
    only = replace(SMALL, overrides={"trunk.0": {"bias_row": True}})
    assert tiles(planned(only)) == {"trunk.0": 6, "trunk.2": 4, "head": 4}


def test_a_layer_larger_than_a_core_is_split_for_its_own_tiles() -> None:
    hardware = replace(SMALL, tiles_per_core=2, overrides={"trunk.0": {"tile_rows": 16}}, bias_row=True)
    x = torch.randn(3, 16)
    model = Net()
    hybrid = ffebm.convert(model, x, hardware=replace(hardware, layers_per_block=1))
    assert all(block.tiles <= 2 for block in hybrid.plan.blocks)
    assert len(hybrid.plan.layers_of("trunk.0")) == len(hybrid.plan.layers_of("head")) == 2
    assert len(hybrid.plan.layers_of("trunk.2")) > 2
    torch.testing.assert_close(hybrid(x), model(x))


def test_an_override_that_matches_no_layer_is_refused() -> None:
    message = (
        r"the override 'layer4\.\*' of hardware 'custom' matches no .* layer; the layers are trunk\.0, trunk\.2, head"
    )
    with pytest.raises(HardwareError, match=message):
        planned(Hardware(overrides={"layer4.*": {"tile_cols": 512}}))


def test_overrides_that_disagree_on_a_layer_are_refused() -> None:
    with pytest.raises(
        HardwareError, match=r"'trunk' and '\*\.2' both match layer 'trunk\.2' and give tile_rows as 4 and 8"
    ):
        planned(Hardware(overrides={"trunk": {"tile_rows": 4}, "*.2": {"tile_rows": 8}}))


def test_costs_count_the_devices_of_each_layer() -> None:
    one = planned(replace(SMALL, layers_per_block=1)).cost_report().inference
    two = (
        planned(replace(SMALL, layers_per_block=1, overrides={"head": {"devices_per_weight": 2}}))
        .cost_report()
        .inference
    )
    cell = 0.0018
    assert two.low - one.low == pytest.approx(16 * 16 * cell)


def test_a_sweep_keeps_the_overrides() -> None:
    plan = planned(replace(SMALL, overrides={"head": {"tile_rows": 16}}))
    rows = sweep(plan, {"tile_rows": [8, 16]})
    assert [row.tiles for row in rows] == [4 + 4 + 2, 2 + 2 + 2]


@pytest.mark.parametrize("side", [8, 16, None])
@pytest.mark.parametrize("bias_row", [False, True])
def test_groups_that_share_tiles_are_placed_and_not_split(side: int | None, bias_row: bool) -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(12, 24, (1, 3), groups=6), nn.Conv2d(24, 24, (3, 1), groups=24)),
        torch.randn(2, 12, 5, 5),
    )
    fabric = Hardware(tile_rows=side, tile_cols=side, tiles_per_core=20, devices_per_weight=1, bias_row=bias_row)
    plan = ffebm.plan(model, x, hardware=replace(fabric, groups_share_tiles=True))
    plan.validate()
    assert len(ffebm.plan(model, x, hardware=fabric).layers_of("1")) == 2
    for op in (op for op in plan.graph.operations if op.rows):
        layer = plan.placement().layer(op.path)
        held = list(layer.tiles())
        assert len(plan.layers_of(op.path)) == 1
        assert len(held) == layer.count == tiles_of(op, plan.hardware) < op.groups or layer.per_tile == 1
        assert sum(tile.groups for tile in held) == op.groups * layer.down * layer.across
        assert all(0 < tile.utilisation <= 1 for tile in held)
        assert sum(tile.utilisation * layer.tile_devices for tile in held) == pytest.approx(layer.devices)
