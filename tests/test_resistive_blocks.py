"""Resistive blocks of any operator and any graph: convolutions, residual adds, pooling, random graphs."""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from settling import KINDS, measure

EXACT = ffebm.GaussSeidel(rtol=1e-14, on_failure="warn")
GAMMAS = [1e-3, 0.6, 20.0]


class Images(nn.Module):
    """Strided and grouped convolutions, a residual difference, average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.pool = nn.AvgPool2d(2, stride=1)
        self.head = nn.Linear(4 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.relu(self.a(x))
        s = torch.relu(s - self.b(s))
        return self.head(self.pool(s).flatten(1))


def images(gamma: float) -> tuple[ffebm.HybridModel, Images, Tensor]:
    model, x = seeded(Images).double(), noise(3, 2, 8, 8).double()
    options = {"block_ops": ("add", "reshape", "avg_pool")}
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=gamma, solver=EXACT, **options)
    assert [len(block.states) for block in hybrid.blocks] == [3]
    return hybrid, model, x


def by_hand(model: Images, gamma: float) -> tuple[list[float], list[Tensor]]:
    """(A_m, D^l) of the three layers from the definition, with torch's own convolutions."""
    a, b, head = model.a.weight.detach().abs(), model.b.weight.detach().abs(), model.head.weight.detach().abs()
    ones = torch.ones(1, 4, 4, 4, dtype=torch.float64)
    sums = [
        F.conv2d(torch.ones(1, 2, 8, 8, dtype=torch.float64), a, stride=2, padding=1),
        F.conv2d(ones, b, padding=1, groups=2) + ones,
        head @ F.avg_pool2d(ones, 2, stride=1).flatten(),
    ]
    amplifiers = [float(rows.max()) for rows in sums]
    first = 1 + gamma * amplifiers[1] * (F.conv_transpose2d(ones, b, padding=1, groups=2) + ones)
    rows = head.sum(0).reshape(1, 4, 3, 3)
    spread = torch.zeros(1, 4, 4, 4, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            spread[:, :, i : i + 2, j : j + 2] += rows[:, :, i : i + 1, j : j + 1] / 4
    return amplifiers, [first, 1 + gamma * amplifiers[2] * spread, torch.ones(5, dtype=torch.float64)]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_loads_and_states_of_convolutions_are_those_by_hand(gamma: float) -> None:
    hybrid, model, x = images(gamma)
    amplifiers, loads = by_hand(model, gamma)
    certificate = hybrid.blocks[0].certificate
    assert certificate is not None
    assert certificate.amplifiers == pytest.approx(amplifiers)
    states = [s.clone().requires_grad_() for s in hybrid.blocks[0].settle(x).states]
    drives = [model.a(x), states[0] - model.b(states[0]), model.head(model.pool(states[1]).flatten(1))]
    scales = [gamma**-2, gamma**-1, 1.0]
    energy: Tensor = sum(  # type: ignore[assignment]
        c * (0.5 * d * s**2 - s * drive).sum() for c, d, s, drive in zip(scales, loads, states, drives, strict=True)
    )
    assert float(hybrid.blocks[0].energy(x, states=[s.detach() for s in states]).detach()) == pytest.approx(
        float(energy.detach())
    )
    slopes = torch.autograd.grad(energy, states)
    for index, (scale, state, slope) in enumerate(zip(scales, states, slopes, strict=True)):
        at_zero = (state == 0) if index < 2 else torch.zeros_like(state, dtype=torch.bool)
        assert (slope / scale)[~at_zero].abs().max() <= 1e-10
        assert (slope[at_zero] >= -1e-10).all()
    assert 0.1 < float((states[0] == 0).double().mean()) < 0.9  # ReLU does something


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_certificate_of_convolutions_is_the_spectral_radius(gamma: float) -> None:
    hybrid, model, _ = images(gamma)
    _, loads = by_hand(model, gamma)
    shapes = [(4, 4, 4), (4, 4, 4), (5,)]
    eyes = [torch.eye(math.prod(s), dtype=torch.float64).reshape(-1, *s) for s in shapes]
    with torch.no_grad():
        first = (eyes[0] - F.conv2d(eyes[0], model.b.weight, padding=1, groups=2)).flatten(1).T
        second = F.linear(model.pool(eyes[1]).flatten(1), model.head.weight).T
    whole = torch.zeros(133, 133, dtype=torch.float64)
    whole[64:128, :64], whole[128:, 64:128] = first / gamma, second
    root = torch.cat([(c * d).sqrt().flatten() for c, d in zip([gamma**-2, gamma**-1, 1.0], loads, strict=True)])
    matrix = (whole + whole.T) / root[:, None] / root[None]
    radius = float(torch.linalg.eigvalsh(matrix).abs().max())
    certificate = hybrid.blocks[0].certificate
    assert certificate is not None
    assert radius <= certificate.radius <= 1.006 * radius
    assert certificate.contraction == pytest.approx(radius**2, rel=0.02)


# -- random graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("energy", "kind"), [("drn", "any"), *product(("resistive", "unamplified"), KINDS)])
def test_random_graphs_settle_at_every_gamma_as_fast_as_predicted(energy: str, kind: str) -> None:
    """The first graphs of the benchmark, which settles 1 000 of each: `make graphs`."""
    assert not measure(energy, kind, range(15 if kind == "any" else 5))["failures"]


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("gamma", [1e-4, 0.1, 3.0])
def test_weights_of_zero_mean_settle_within_thirty_sweeps(width: int, gamma: float) -> None:
    model = nn.Sequential(*[module for _ in range(4) for module in (nn.Linear(width, width), nn.ReLU())]).double()
    with torch.no_grad():
        for place in range(0, 8, 2):
            layer = model[place]
            assert isinstance(layer, nn.Linear)
            layer.bias.zero_()
            layer.weight.copy_(noise(width, width, seed=place) * (2 / width) ** 0.5)
    x = noise(8, width).double()
    solver = ffebm.GaussSeidel(rtol=1e-6)
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=gamma, solver=solver)
    assert [len(block.layers) for block in hybrid.blocks] == [4]
    assert 1 <= hybrid.blocks[0].settle(x).sweeps <= 30
