"""Resistive blocks of any operator and any graph: convolutions, residual adds, pooling, random graphs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.program.frame import Frame

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

KINDS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "hardtanh": nn.Hardtanh, "hardsigmoid": nn.Hardsigmoid}


class Graph(nn.Module):
    """States of one width, each of a linear layer or a signed wire from some of the states before it."""

    def __init__(self, width: int, edges: list[list[tuple[int, str]]], kind: str) -> None:
        super().__init__()
        self.edges = edges
        self.activation = KINDS[kind]()
        self.layers = nn.ModuleDict(
            {
                f"{k}_{m}": nn.Linear(width, width)
                for m, above in enumerate(edges)
                for k, how in above
                if how == "linear"
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for m, above in enumerate(self.edges):
            drive: Tensor | None = None
            for k, how in above:
                part = self.layers[f"{k}_{m}"](states[k]) if how == "linear" else states[k]
                if drive is None:
                    drive = part
                else:
                    drive = drive - part if how == "minus" else drive + part
            assert drive is not None
            states.append(drive if m == len(self.edges) - 1 else self.activation(drive))
        return states[-1]


@st.composite
def graphs(draw: st.DrawFn, energy: str = "resistive") -> tuple[Graph, Tensor, float, str]:
    strict, kinds = energy == "drn", sorted(KINDS) if energy == "resistive" else ["hardtanh", "relu"]
    wires = ["linear", "linear", "plus", "plus" if strict else "minus"]
    width, count = draw(st.integers(1, 8)), draw(st.integers(2, 5))
    edges: list[list[tuple[int, str]]] = []
    for m in range(count):
        others = draw(st.lists(st.integers(0, m), unique=True, max_size=3))
        above = [(k, draw(st.sampled_from(wires))) for k in others if k != m]
        edges.append([(m, "linear"), *above])
    model = seeded(lambda: Graph(width, edges, draw(st.sampled_from(kinds))), draw(st.integers(0, 10**6)))
    scale, positive = 10 ** draw(st.floats(-1, 1)), draw(st.booleans())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
            if positive or (strict and parameter.dim() > 1):
                parameter.abs_()  # nothing cancels: the slowest
    gamma = 10 ** draw(st.floats(-4, 0.477))
    return model.double(), noise(4, width, seed=draw(st.integers(0, 99))).double(), gamma, energy


def settles_as_predicted(model: Graph, x: Tensor, gamma: float, energy: str) -> None:
    """A fixed point within twice the sweeps that the certificate predicts from the start's distance."""
    hybrid = ffebm.convert(
        model,
        x,
        energy=energy,
        feedback="symmetric" if energy == "drn" else gamma,
        solver=ffebm.GaussSeidel(rtol=1e-6, max_sweeps=20_000),
        hardware=ffebm.Hardware(layers_per_block=16),
    )
    (block,) = hybrid.blocks
    certificate = block.certificate
    assert certificate is not None
    assert certificate.certified
    settled = block.settle(x)
    assert settled.converged
    with torch.no_grad():
        starts = Frame(
            block.module.program, (x,), [None if w is None else w.detach() for w in block.weights]
        ).feedforward()
    far = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(starts, settled.states, strict=True))
    rate = min(max(certificate.contraction, 1e-12), 1 - 1e-12)
    predicted = 1 + math.ceil(math.log(1e-6 / max(far, 1)) / math.log(rate))
    assert settled.sweeps <= 2 * predicted, (settled.sweeps, predicted)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(graphs())
def test_random_graphs_settle_at_every_gamma_as_fast_as_predicted(case: tuple[Graph, Tensor, float, str]) -> None:
    settles_as_predicted(*case)


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.sampled_from(["unamplified", "drn"]).flatmap(graphs))
def test_random_graphs_without_amplifiers_settle_as_fast_as_predicted(case: tuple[Graph, Tensor, float, str]) -> None:
    settles_as_predicted(*case)


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
