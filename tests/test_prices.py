"""The energy objective: the search's sums against the cost model, never more energy than today's partition, guards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_cases import random_graph
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import HardwareError, InputError, PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Role
from ffebm_compiler.passes.partition.block_costs import modelled_energy
from ffebm_compiler.passes.partition.check import check_plan
from ffebm_compiler.passes.partition.decide import Partition, partition
from ffebm_compiler.passes.partition.prices import Prices, middle, prices_of
from ffebm_compiler.passes.planning import describe
from ffebm_compiler.plan_data import PlanData, PlanOptions

KINDS = ("add", "reshape", "concat", "avg_pool")
SMALL = Hardware(tile_rows=16, tile_cols=16, tiles_per_core=40)


def described(seed: int, result: Partition, hardware: Hardware = SMALL) -> PlanData:
    graph = random_graph(seed)
    return describe(graph, hardware, PlanOptions(KINDS), result, model="random", modules=(), parameters=())


def priced(plan: PlanData, prices: Prices) -> float:
    """The sum of the prices of a plan in pJ, counted block by block."""
    number = {op.name: index for index, op in enumerate(plan.graph.operations)}
    inside = {name for block in plan.blocks for name in block.operations}
    total = sum(prices.digital[number[op.name]] for op in plan.graph.operations if op.name not in inside)
    for block in plan.blocks:
        total += prices.dac * block.dac + prices.adc * block.adc
        for name in block.operations:
            op = plan.graph[name]
            if op.role is Role.WEIGHT:
                settles = any(source in block.operations for source in op.inputs)
                total += (prices.inner if settles else prices.outer)[number[name]]
    return total / 1e3


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_energy_is_never_more_and_the_prices_are_the_model(seed: int, training: bool, chip: bool) -> None:
    hardware = replace(SMALL, costs={"chip_op_pj": 0.4}) if chip else SMALL
    graph = random_graph(seed)
    prices = prices_of(graph, hardware, training, 4)
    few = described(seed, partition(graph, hardware, KINDS), hardware)
    least = described(seed, partition(graph, hardware, KINDS, prices=prices), hardware)
    check_plan(least)
    assert priced(least, prices) <= priced(few, prices)
    if not training:  # of a training step the prices leave out what depends on a whole block
        for plan in (few, least):
            assert priced(plan, prices) == pytest.approx(middle(modelled_energy(plan, False, 0.1)), rel=1e-3, abs=0.1)


def test_it_is_deterministic() -> None:
    graph = random_graph(3)
    prices = prices_of(graph, SMALL, False, 4)
    assert partition(graph, SMALL, KINDS, prices=prices) == partition(graph, SMALL, KINDS, prices=prices)


def network(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2, 3),
    )


@pytest.mark.parametrize("for_", ["inference", "training"])
def test_wide_layers_do_not_settle_and_the_note_has_both(for_: str) -> None:
    x = torch.randn(2, 1, 6, 6)
    few = ffebm.plan(network(), x)
    least = ffebm.plan(network(), x, objective="energy", for_=for_)
    assert len(few.blocks) == 1
    assert len(least.blocks) > 1
    note = next(note for note in least.notes if "objective 'energy'" in note)
    assert f"this partition has {least.conversions} conversions" in note
    assert f"the one with the fewest conversions has {few.conversions} conversions" in note
    energies = [middle(modelled_energy(plan, for_ == "training", 0.1)) for plan in (least, few)]
    assert energies[0] < energies[1]
    assert least.options.objective == "energy"
    assert least.move("2", "digital").options.for_ == for_


def test_where_conversions_are_dear_layers_settle_together() -> None:
    dear = Hardware(costs={"adc_pj": 1e4, "dac_pj": 1e4})
    x = torch.randn(2, 1, 6, 6)
    assert len(ffebm.plan(network(8), x, hardware=dear, objective="energy").blocks) == 1


def test_the_report_agrees_with_the_objective() -> None:
    x = torch.randn(2, 1, 6, 6)
    for hardware, field in (("crossbar-256", "inference"), ("pcm-64", "chip_inference")):
        plan = ffebm.plan(network(), x, hardware=hardware, objective="energy")
        assert modelled_energy(plan, False, 0.1).low == pytest.approx(getattr(plan.cost_report(), field).low)


def test_convert_and_files(tmp_path: Path) -> None:
    x = torch.randn(2, 1, 6, 6)
    hybrid = ffebm.convert(network(8), x, objective="energy", feedback=0.3)
    assert hybrid.plan.options.loop_gain == 0.3
    hybrid.plan.to_json(tmp_path / "plan.json")
    assert ffebm.Plan.from_json(tmp_path / "plan.json") == hybrid.plan
    data = json.loads((tmp_path / "plan.json").read_text())
    for field in ("objective", "for_", "loop_gain"):
        del data["options"][field]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert ffebm.Plan.from_json(tmp_path / "old.json").options.objective == "conversions"
    data["options"]["objective"] = "power"
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"objective"):
        ffebm.Plan.from_json(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"objective": "power"}, InputError, "objective is 'power'; expected 'conversions' or 'energy'"),
        ({"for_": "both"}, InputError, "for_ is 'both'; expected 'inference' or 'training'"),
        ({"objective": "energy", "feedback": 1.5}, InputError, "feedback is 1.5; expected a number strictly between"),
        ({"objective": "energy", "hardware": "ideal"}, HardwareError, "needs figures that this hardware does not have"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ffebm.plan(network(8), torch.randn(2, 1, 6, 6), **arguments)
