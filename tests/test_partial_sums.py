"""Partial sums of row tiles: their conversions counted by hand and tile by tile, in plans, files and costs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.costs import Quantity
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.partial_sums import PartialSums, partial_sums

COSTS = {"adc_pj": 2.0, "dac_pj": 1.0, "cell_pj": 0.5, "element_pj": 0.25, "traffic_pj": 0.0, "digital_mac_pj": 3.0}
TILES = Hardware(tile_rows=4, tile_cols=16, row_sums="digital", costs=COSTS)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 5))


def planned(model: nn.Module, inputs: torch.Tensor, hardware: Hardware = TILES, **settings: Any) -> ffebm.Plan:
    return ffebm.plan(model, inputs, hardware=hardware, **settings)


def sums_of(plan: ffebm.Plan, block: int = 0) -> PartialSums:
    return partial_sums(plan.graph, plan.hardware, plan.graph.users(), plan.blocks[block].operations)


def test_a_layer_alone_by_hand() -> None:
    plan = planned(nn.Linear(10, 6), torch.randn(3, 10))
    assert sums_of(plan) == PartialSums(once=3 * 6, spared_adc=6)
    assert plan.blocks[0].conversions == 10 + 6
    assert plan.blocks[0].partial_sums == 3 * 6 - 6
    assert "conversions that digital row sums add to one pass: 12" in str(plan)


def test_a_block_that_settles_by_hand() -> None:
    plan = planned(network(), torch.randn(3, 10))
    # 3 and 2 tiles of rows. Both states are digital, and drive the second layer through DACs, forward and backward.
    # The feedback is added digitally.
    assert sums_of(plan) == PartialSums(once=18, forward_adc=10, forward_dac=11, feedback_adc=6, spared_adc=5)
    report = plan.cost_report(feedback=0.1, rtol=1e-3)
    cost, n = report.blocks[0], 3
    assert cost.summed == 18 + n * (10 + 6) - 5 + n * 11
    added = 18 + n * (10 + 6) - 5
    converters = 1.0 * (10 + n * 11) + 2.0 * (5 + added) + 0.25 * added
    assert cost.converters == Quantity(converters, converters, "pJ")
    back = 1.0 * (5 + n * 11) + 2.0 * (10 + added) + 0.25 * added
    assert cost.training == cost.inference + cost.analog + Quantity(back, back, "pJ")
    assert "partial" in str(report)


def test_feedback_through_several_tiles_of_columns() -> None:
    narrow = replace(TILES, tile_rows=16, tile_cols=4)  # two weights on a tile's row: 3 tiles of columns each
    sums = sums_of(planned(network(), torch.randn(3, 10), narrow))
    assert sums == PartialSums(feedback_adc=3 * 6, feedback_dac=6, inputs=2 * 10)


def test_analog_sums_convert_nothing() -> None:
    plan = planned(network(), torch.randn(3, 10), replace(TILES, row_sums="analog"))
    assert sums_of(plan) == PartialSums()
    assert plan.blocks[0].partial_sums == 0
    assert "row sums" not in str(plan)
    assert "partial sums" not in str(plan.cost_report()).split("constants")[0]


def test_tiles_that_hold_all_rows_convert_nothing() -> None:
    assert sums_of(planned(network(), torch.randn(3, 10), Hardware(row_sums="digital"))) == PartialSums()


def test_a_residual_that_is_added_digitally_needs_no_dac() -> None:
    layer = Operation("layer", Role.WEIGHT, "", "linear", ("x",), 10, rows=10, cols=10)
    add = Operation("add", Role.WIRING, "", "add", ("layer", "y"), 10, kind="add")
    graph = OperationGraph({"x": 10, "y": 10}, (layer, add), ("add",))
    found = partial_sums(graph, TILES, graph.users(), ["layer", "add"])
    assert found == PartialSums(once=3 * 10, spared_adc=10, spared_dac=10, inputs=10)
    wide = partial_sums(graph, replace(TILES, tile_rows=16), graph.users(), ["layer", "add"])
    assert wide == PartialSums(inputs=10)  # its columns lie on two tiles


def test_latency_has_them() -> None:
    timed = {**COSTS, "read_ns": 100.0, "adc_ns": 10.0, "dac_ns": 1.0, "converters": 1.0}
    model, x = nn.Linear(10, 6), torch.randn(3, 10)
    digital = planned(model, x, replace(TILES, costs=timed)).cost_report().block_latency
    assert digital == Quantity(100.0 + 10 + 10.0 * 18, 100.0 + 10 + 10.0 * 18, "ns")


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_forward_adcs_are_the_tiles_results(sizes: list[int], tile_rows: int, positions: int) -> None:
    """Each read of a tile gives one number for each column and position: counted tile by tile."""
    operations, before = [], "x"
    for index, (rows, cols) in enumerate(pairwise(sizes)):
        name = f"layer_{index}"
        operations.append(
            Operation(
                name,
                Role.WEIGHT,
                name,
                "linear",
                (before,),
                cols * positions,
                rows=rows,
                cols=cols,
                positions=positions,
            )
        )
        before = name
    graph = OperationGraph({"x": sizes[0] * positions}, tuple(operations), (before,))
    hardware = Hardware(tile_rows=tile_rows, tile_cols=None, row_sums="digital")
    found = partial_sums(graph, hardware, graph.users(), [op.name for op in operations])
    expected = 0
    for op in operations:
        tiles = [range(start, min(start + tile_rows, op.rows)) for start in range(0, op.rows, tile_rows)]
        if len(tiles) > 1:
            expected += sum(op.cols for _ in tiles for _ in range(positions))
    assert found.once + found.forward_adc == expected


def test_files_from_before(tmp_path: Path) -> None:
    plan = planned(network(), torch.randn(3, 10), Hardware(tile_rows=4))
    plan.to_json(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["hardware"]["row_sums"]
    for block in data["blocks"]:
        del block["partial_sums"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    old = ffebm.Plan.from_json(tmp_path / "old.json")
    assert old.hardware.row_sums == "analog"
    assert old.blocks == plan.blocks
    (tmp_path / "chip.toml").write_text('tile_rows = 4\nrow_sums = "digital"\n')
    assert Hardware.from_file(tmp_path / "chip.toml").row_sums == "digital"
    again = planned(network(), torch.randn(3, 10))
    again.to_json(tmp_path / "new.json")
    assert ffebm.Plan.from_json(tmp_path / "new.json") == again
