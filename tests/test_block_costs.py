"""Block costs: the energy that a partition can minimise is the cost report's, and sweeps follow the loop gain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.passes.partition.block_costs import modelled_energy, predicted_sweeps


def plan(hardware: str) -> ffebm.Plan:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 30), nn.Softmax(-1), nn.Linear(30, 4))
    return ffebm.plan(model, torch.randn(2, 300), hardware=hardware)


@pytest.mark.parametrize("feedback", [0.1, 0.5])
@pytest.mark.parametrize("hardware", ["crossbar-64", "pcm-64", "isaac"])
def test_the_energy_is_the_reports(hardware: str, feedback: float) -> None:
    made = plan(hardware)
    report = made.cost_report(feedback=feedback)
    chip = report.chip_inference.known
    assert chip == (hardware != "crossbar-64")
    inference = report.chip_inference if chip else report.inference
    training = (report.chip_training if chip else report.training) + report.gradients
    for found, expected in (
        (modelled_energy(made, False, feedback), inference),
        (modelled_energy(made, True, feedback), training),
    ):
        assert found.low == pytest.approx(expected.low)
        assert found.high == pytest.approx(expected.high)


def test_sweeps_of_a_block_follow_the_loop_gain() -> None:
    for feedback in (0.1, 0.5, 0.9):
        blocks = plan("crossbar-256").cost_report(feedback=feedback).blocks
        assert [block.sweeps for block in blocks] == [predicted_sweeps(feedback, 1e-4), 1]
