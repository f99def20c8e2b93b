"""What if: every line equals a plan of the model with that option."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import seeded, transformer
from torch import Tensor, nn
from typer.testing import CliRunner

import ffebm_compiler as ffebm
from ffebm_compiler.cli.main import main
from ffebm_compiler.drawing.record import record_of
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.plan import Plan
from ffebm_compiler.reports.what_if import WhatIfRow


class Residual(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.before, self.after = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.after(self.two(self.relu(self.before(self.one(x))))))


def small_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), Residual(8), nn.AvgPool2d(2),
        Residual(8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


INPUT = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def settling(plan: Plan) -> int:
    """Layers in blocks that report feedback, counted on the lowered blocks."""
    return sum(len(block.layers) for block in plan.blocks if len(block.layers) + len(block.driven) > 1)


def assert_same(row: WhatIfRow, plan: Plan) -> None:
    assert (row.blocks, row.settling, row.conversions) == (len(plan.blocks), settling(plan), plan.conversions)
    assert row.energy == str(plan.cost_report().inference)
    report = plan.cost_report()
    assert row.training == str(report.training + report.gradients)


def test_every_line_is_the_plan_of_the_model_with_that_option() -> None:
    model = seeded(small_resnet)
    plan = ffebm.plan(model, INPUT)
    found = plan.what_if()
    pooling = ("add", "reshape", "avg_pool")
    twice = replace(plan.hardware, tiles_per_core=128, layers_per_block=8)
    settings: dict[str, dict[str, Any]] = {
        "fold_batchnorm=True": {"fold_batchnorm": True},
        "digital_drive=True": {"digital_drive": True},
        "block_ops with 'avg_pool'": {"block_ops": pooling},
        "fold_batchnorm=True and block_ops with 'avg_pool'": {"fold_batchnorm": True, "block_ops": pooling},
        "hardware with tiles_per_core=128, layers_per_block=8": {"hardware": twice},
        "objective='energy'": {"objective": "energy"},
        "objective='energy', for_='training'": {"objective": "energy", "for_": "training"},
    }
    assert_same(found.now, plan)
    rows = {row.option: row for row in found.rows}
    assert set(rows) | set(found.unchanged) == set(settings)
    for option, arguments in settings.items():
        made = ffebm.plan(model, INPUT, **arguments)
        assert_same(rows.get(option, found.now), made)
    # Where a newcomer learns why: all blocks have one layer, until the batch norms are folded.
    assert found.now.settling == 0
    assert rows["fold_batchnorm=True"].settling > 0
    assert "batch norms go into the layers before them" in str(found)


def test_a_plan_that_uses_an_option_is_not_told_of_it() -> None:
    hardware = Hardware(tiles_per_core=None, layers_per_block=None)
    options = {
        "objective": "energy",
        "for_": "training",
        "fold_batchnorm": True,
        "digital_drive": True,
        "block_ops": ("add", "reshape", "avg_pool"),
    }
    plan = ffebm.plan(seeded(small_resnet), INPUT, hardware=hardware, **options)
    found = plan.what_if()
    # Only the objectives that it does not have.
    told = {*found.unchanged, *(row.option for row in found.rows)}
    assert told - {"hardware with layers_per_block=1"} == {"objective='conversions'", "objective='energy'"}
    assert "as planned" in str(found)


def test_both_objectives_and_what_settling_costs() -> None:
    model = seeded(small_resnet)
    for objective in ("conversions", "energy"):
        plan = ffebm.plan(model, INPUT, fold_batchnorm=True, hardware="pcm-64", objective=objective)
        found = plan.what_if()
        rows = {row.option: row for row in (found.now, *found.rows)}
        other = {"conversions": "objective='energy'", "energy": "objective='conversions'"}[objective]
        few, least = (found.now, rows[other]) if objective == "conversions" else (rows[other], found.now)
        assert few.conversions < least.conversions
        energies = []
        for row, wanted in ((few, "conversions"), (least, "energy")):
            made = ffebm.plan(model, INPUT, fold_batchnorm=True, hardware="pcm-64", objective=wanted)
            report = made.cost_report()
            assert row.energy == str(report.chip_inference)
            assert row.training == str(report.chip_training + report.gradients)
            energies.append(report.chip_inference)
        assert energies[1].low < energies[0].low
        if objective == "conversions":
            apart = rows["hardware with layers_per_block=1"]
            assert apart.settling == 0
            single = replace(plan.hardware, layers_per_block=1)
            made = ffebm.plan(model, INPUT, fold_batchnorm=True, hardware=single)
            assert apart.energy == str(made.cost_report().chip_inference) != few.energy


def test_options_without_effect_are_named_apart() -> None:
    found = ffebm.plan(*transformer()).what_if()
    assert "hardware with tiles_per_core=128, layers_per_block=8" in found.unchanged
    assert "without effect here" in str(found)


def test_a_forced_layer_stays_where_it_was_forced() -> None:
    plan = ffebm.plan(seeded(small_resnet), INPUT, force_digital="4.*")
    (row,) = [row for row in plan.what_if().rows if row.option == "fold_batchnorm=True"]
    assert_same(row, ffebm.plan(seeded(small_resnet), INPUT, force_digital="4.*", fold_batchnorm=True))


def test_a_stored_plan_is_enough(tmp_path: Any) -> None:
    plan = ffebm.plan(seeded(small_resnet), INPUT)
    plan.to_json(tmp_path / "plan.json")
    assert Plan.from_json(tmp_path / "plan.json").what_if() == plan.what_if()


@pytest.mark.parametrize("name", ["resnet18"])
def test_a_real_network(name: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from zoo_models import load_torchvision

    load_torchvision()
    timm = pytest.importorskip("timm")
    model, x = seeded(lambda: timm.create_model(name)).eval(), torch.randn(1, 3, 32, 32)
    hardware = Hardware(tile_rows=None, tile_cols=None)
    plan = ffebm.plan(model, x, hardware=hardware)
    (row,) = [row for row in plan.what_if().rows if row.option == "fold_batchnorm=True"]
    assert_same(row, ffebm.plan(model, x, hardware=hardware, fold_batchnorm=True))


def test_the_terminal_adds_the_table_where_it_is_asked_for(tmp_path: Path) -> None:
    command = ["plan", "ffebm_compiler.demo.models:DigitsCNN", "--input", "2x1x8x8"]
    with_it = CliRunner().invoke(main, [*command, "--what-if"], env={"COLUMNS": "160"})
    assert with_it.exit_code == 0
    assert "fold_batchnorm=True" in with_it.output
    assert "inference, modelled" in with_it.output
    assert "what if" not in CliRunner().invoke(main, command).output
    for other in (["--sweep", "tile_rows=64"], ["--explain", "conv"]):
        refused = CliRunner().invoke(main, [*command, "--what-if", *other])
        assert refused.exit_code == 2
        assert "--what-if adds a table to the printed plan" in refused.output


def test_a_page_holds_the_options_where_it_is_asked_for(tmp_path: Path) -> None:
    plan = ffebm.plan(seeded(small_resnet), INPUT)
    record = record_of(plan, what_if=True)["whatIf"]
    expected = plan.what_if()
    assert [row[0] for row in record["rows"]] == ["as planned", *(row.option for row in expected.rows)]
    assert [row[4] for row in record["rows"]] == [row.energy for row in (expected.now, *expected.rows)]
    assert record_of(plan)["whatIf"] is None
