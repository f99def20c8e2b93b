"""Chips that were published: a product of a full tile costs, and takes, what the paper reports."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.presets import hardware_presets

# name: (TOPS/W, TOPS, tiles of the chip, weights of a tile). Le Gallo et al. 2023: abstract. NeuRRAM: Extended Data
# Fig. 12 of Wan et al. 2022 as read by CiMLoop. ISAAC: 65.8 W and 479 GOP/s/mm² on 85.4 mm² (Shafiee et al. 2016).
ISAAC_TOPS = 0.479 * 85.4
PUBLISHED = {
    "pcm-64": (2.48, 16.1, 64, (256, 256)),
    "pcm-64-one-phase": (9.76, 63.1, 64, (256, 256)),
    "neurram": (15.954, 0.7439, 48, (256, 128)),
    "isaac": (ISAAC_TOPS / 65.8, ISAAC_TOPS, 168 * 12 * 8, (128, 16)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_tile_costs_what_the_paper_reports(name: str) -> None:
    efficiency, throughput, tiles, (rows, cols) = PUBLISHED[name]
    report = ffebm.plan(nn.Linear(rows, cols, bias=False), torch.randn(2, rows), hardware=name).cost_report()
    operations = 2 * rows * cols
    (block,) = report.blocks
    chip = block.chip_inference.low - block.traffic.low
    assert chip == pytest.approx(block.chip_inference.high - block.traffic.high)  # the tile is full
    assert 1 / 1.3 < chip / (operations / efficiency) < 1.3
    assert report.block_latency.low is not None
    assert 1 / 1.3 < report.block_latency.low / (operations * tiles / (1e3 * throughput)) < 1.3
    assert report.blocks[0].summed == 0
    assert "chip level" in str(report)
    assert "modelled" in str(report)


def test_memory_around_a_tile_is_small_beside_it() -> None:
    """Input and output pass through memory beside what the chips' figures hold: at most that much is counted twice."""
    for name, (_, _, _, (rows, cols)) in PUBLISHED.items():
        report = ffebm.plan(nn.Linear(rows, cols, bias=False), torch.randn(2, rows), hardware=name).cost_report()
        assert report.blocks[0].traffic.low < 0.2 * report.blocks[0].chip_inference.low, name


def test_an_empty_part_of_a_tile_is_the_range() -> None:
    report = ffebm.plan(nn.Linear(128, 64, bias=False), torch.randn(2, 128), hardware="pcm-64").cost_report()
    (block,) = report.blocks
    low, high = (getattr(block.chip_inference, end) - getattr(block.traffic, end) for end in ("low", "high"))
    assert low == pytest.approx(0.403 * 2 * 128 * 64)
    assert high == pytest.approx(0.403 * 2 * 256 * 256)


def test_isaac_spends_half_on_its_converters() -> None:
    """Its converters take 49 % of the chip's power (Xiao et al. 2020, of Shafiee et al. 2016)."""
    report = ffebm.plan(nn.Linear(128, 16, bias=False), torch.randn(2, 128), hardware="isaac").cost_report()
    adc = report.constants["adc_pj"].value.low * 16
    assert adc / (report.blocks[0].chip_inference.low - report.blocks[0].traffic.low) == pytest.approx(0.49, abs=0.03)


def test_reads_of_convolutions_and_sweeps_are_counted_tile_by_tile() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Tanh(), nn.Conv2d(8, 4, 3, bias=False))
    x = torch.randn(2, 3, 8, 8)
    report = ffebm.plan(model, x, hardware="pcm-64").cost_report(feedback=0.1, rtol=1e-3)
    (block,) = report.blocks
    reads = 36 + 2 * 3 * 16  # positions of the first layer once, of the second forward and backward in three sweeps
    assert block.chip_inference.high - block.traffic.high == pytest.approx(reads * 0.403 * 2 * 256 * 256)
    assert block.chip_training.low == pytest.approx(2 * block.chip_inference.low)
    assert report.block_latency.low == pytest.approx(521.0 * reads)


def test_presets_with_a_chip_say_where_it_comes_from() -> None:
    chips = {name: preset for name, preset in hardware_presets().items() if "chip_op_pj" in (preset.costs or {})}
    assert set(chips) == set(PUBLISHED)
    for preset in chips.values():
        assert (
            "Le Gallo" in preset.source or "pcm-64" in preset.source or "Wan" in preset.source or "Sha" in preset.source
        )
        assert preset.row_sums == "digital"
        assert Hardware.from_dict(preset.to_dict()) == preset
