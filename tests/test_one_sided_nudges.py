"""What one-sided nudges lose: nothing to products of 16 bits, and with −β the units that are silent."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm

Side = Literal["positive", "negative"]


class Clamps(nn.Module):
    """Two hidden layers of clamp(h/2, 0, 1) and a linear output, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.clamp(0.5 * self.first(x), 0, 1)
        s = torch.clamp(0.5 * self.second(s), 0, 1)
        scores: Tensor = self.last(s)
        return scores


@pytest.mark.parametrize("beta", [1e-4, 0.5])
@pytest.mark.parametrize("variant", ["positive", "negative"])
def test_a_nudge_of_either_sign_survives_bfloat16(variant: Side, beta: float) -> None:
    """Differences are deviations of the settled state, not of two states, so that a small β loses no digits."""
    torch.manual_seed(0)
    x, y = torch.rand(64, 64), torch.randint(10, (64,))
    estimator = ffebm.EquilibriumPropagation(beta, variant)
    model = ffebm.convert(Clamps(), x[:2], feedback=0.5, gradient=estimator)

    def gradients(autocast: bool) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = model(x)
        F.cross_entropy(scores.float(), y).backward()
        return [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None and p.dim() > 1]

    for short, exact in zip(gradients(True), gradients(False), strict=True):
        assert float(F.cosine_similarity(short, exact, 0)) > 0.998
        assert float(short.norm() / exact.norm()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("variant", "wakes", "hushes"), [("positive", True, False), ("negative", False, True)])
def test_a_nudge_by_minus_beta_wakes_no_silent_unit(variant: Side, wakes: bool, hushes: bool) -> None:
    """A unit below its kink, s = max(h, 0) with h < 0, can move up alone, and does under a large nudge.

    The nudge β lowers the loss. So with β it answers where the loss wants it up, and its bias is raised. With −β it
    answers where the loss wants it down, and its bias, which is below the kink already, is lowered further.
    """
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (1.0, -0.01, 1.0, -1.0), strict=True):
            parameter.fill_(value)
    estimator = ffebm.EquilibriumPropagation(3.0, variant)
    hybrid = ffebm.convert(model, torch.zeros(2, 1), feedback=0.5, gradient=estimator)
    found = []
    for direction in (-1, 1):
        hybrid.zero_grad()
        (direction * hybrid(torch.zeros(1, 1))).sum().backward()
        gradient = hybrid.get_parameter("0.bias").grad
        assert gradient is not None
        found.append(float(gradient))
    up, down = found
    assert (up < 0) == wakes
    assert (down > 0) == hushes
    assert up == 0 or down == 0
