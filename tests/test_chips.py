"""Chips: where cores are, and which values cross between chips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_cases import random_graph
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.passes.partition.chips import floor_plan_of
from ffebm_compiler.passes.partition.decide import partition
from ffebm_compiler.passes.planning import describe
from ffebm_compiler.plan_data import PlanOptions

ONE = {"layers_per_block": 1, "tiles_per_core": 1}


class Two(nn.Module):
    """Four layers in a chain; the last result is multiplied by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.softmax(self.layers[0](x), -1)
        h = torch.softmax(self.layers[1](first), -1)
        h = torch.softmax(self.layers[2](h), -1)
        return torch.softmax(self.layers[3](h) * first, -1)


def test_values_cross_once_to_each_chip_that_reads_them() -> None:
    hardware = ffebm.Hardware(**ONE, cores_per_chip=2)
    plan = ffebm.plan(Two(), torch.randn(2, 10), hardware=hardware)
    floor = plan.floor_plan()
    assert [chip.blocks for chip in floor.chips] == [("block_1", "block_2"), ("block_3", "block_4")]
    # The second softmax feeds the second chip. The product reads as much from either chip and is on the first one.
    assert [chip.digital_parts for chip in floor.chips] == [("digital_1", "digital_2", "digital_4"), ("digital_3",)]
    assert floor.crossings == {(0, 1): 10, (1, 0): 10}
    assert floor.crossing == 20
    assert [chip.utilisation for chip in floor.chips] == [1.0, 1.0]
    assert "2 chips, 20 values per sample cross" in str(floor)
    assert "4 cores of 2 chips, 20 values per sample between chips" in str(plan)


def test_without_a_number_all_cores_are_on_one_chip() -> None:
    plan = ffebm.plan(Two(), torch.randn(2, 10), hardware=ffebm.Hardware(**ONE))
    floor = plan.floor_plan()
    assert len(floor.chips) == 1
    assert not floor.crossings
    assert "chip" not in str(plan)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_every_part_is_on_a_chip_and_every_crossing_is_counted(seed: int, each: int) -> None:
    hardware = ffebm.Hardware(tile_rows=None, tile_cols=None, layers_per_block=2, tiles_per_core=2, cores_per_chip=each)
    graph = random_graph(seed, operations=16)
    found = partition(graph, hardware)
    plan = describe(graph, hardware, PlanOptions(), found, model="random", modules=[], parameters=[])
    floor = floor_plan_of(plan)
    assert sorted(core for chip in floor.chips for core in chip.cores) == [c.core for c in floor.tiles.per_core]
    assert all(len(chip.cores) <= each for chip in floor.chips)
    assert sorted(name for chip in floor.chips for name in chip.blocks) == sorted(block.name for block in plan.blocks)
    parts = {name: chip.chip for chip in floor.chips for name in chip.digital_parts}
    assert sorted(parts) == sorted(part.name for part in plan.digital_parts)
    where = {name: chip.chip for chip in floor.chips for name in chip.blocks} | parts
    # Counted another way: value by value, over the quotient graph's tensors.
    pairs = {
        (tensor, where[origin], where[to])
        for origin, to, tensors in plan.to_networkx().edges(data="tensors")
        for tensor in tensors
        if origin in where and where[origin] != where[to]
    }
    inputs = {
        (name, chips[0], chip)
        for name in plan.graph.inputs
        for chips in [sorted({where[to] for to in plan.to_networkx().successors(name)})]
        if chips
        for chip in chips[1:]
    }
    assert floor.crossing == sum(plan.graph.values(name) for name, _, _ in pairs | inputs)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_cores_of_a_chip_are_a_whole_number(value: object) -> None:
    with pytest.raises(ffebm.HardwareError, match="cores_per_chip must be a whole number of at least 1"):
        ffebm.Hardware(cores_per_chip=value)  # type: ignore[arg-type]
