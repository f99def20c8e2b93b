"""`ffebm.init`: matrices of the Gaussian orthogonal ensemble, and blocks scaled to a loop gain."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from networks import Skip, noise, seeded
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.init import conductances_, goe_, scale_to_loop_gain


def _chain(*sizes: int) -> nn.Sequential:
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("shape", [(60, 80, 3, 3), (40, 30, 5, 5), (200, 200)])
def test_goe_is_symmetric_with_the_variances_of_the_ensemble(shape: tuple[int, ...]) -> None:
    weight = goe_(torch.empty(shape, dtype=torch.float64), 0.3, torch.Generator().manual_seed(1))
    size = shape[-1]
    assert torch.equal(weight, weight.mT)
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    upper = weight[..., *torch.triu_indices(size, size, 1)]
    # The standard error of a variance of n values is √(2/n) of it.
    assert float(diagonal.var()) == pytest.approx(2 * 0.3 / size, rel=5 * (2 / diagonal.numel()) ** 0.5)
    assert float(upper.var()) == pytest.approx(0.3 / size, rel=5 * (2 / upper.numel()) ** 0.5)
    assert abs(float(weight.mean())) < 5 * (0.3 / size / upper.numel()) ** 0.5


def test_goe_is_the_generators_and_changes_the_parameter_in_place() -> None:
    layer = nn.Conv2d(3, 5, 3)
    assert goe_(layer.weight, 1e-4, torch.Generator().manual_seed(0)) is layer.weight
    again = goe_(torch.empty(5, 3, 3, 3), 1e-4, torch.Generator().manual_seed(0))
    assert torch.equal(layer.weight, again)
    assert layer.weight.requires_grad


def test_goe_of_a_linear_layer_that_is_not_square_is_a_corner() -> None:
    weight = goe_(torch.empty(50, 200, dtype=torch.float64), 1.0, torch.Generator().manual_seed(3))
    whole = goe_(torch.empty(200, 200, dtype=torch.float64), 1.0, torch.Generator().manual_seed(3))
    assert torch.equal(weight, whole[:50])


@pytest.mark.parametrize(
    ("weight", "variance", "message"),
    [
        (torch.empty(3, 4, 5), 1.0, r"of shape \(3, 4, 5\); expected the floating-point weight of a linear layer"),
        (torch.empty(4, 4, dtype=torch.int64), 1.0, "int64.*expected the floating-point weight"),
        ([1.0], 1.0, "weight is list"),
        (torch.empty(3, 4, 3, 1), 1.0, "kernels of 3×1.*square kernel"),
        (torch.empty(4, 4), 0.0, "variance is 0.0; expected a positive number"),
        (torch.empty(4, 4), True, "variance is True"),
        (torch.empty(4, 4), float("nan"), "variance is nan"),
    ],
)
def test_goe_refuses(weight: torch.Tensor, variance: float, message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        goe_(weight, variance)


@pytest.mark.parametrize("loop_gain", [0.05, 0.6, 3.0])
def test_a_block_has_the_loop_gain_asked_for(loop_gain: float) -> None:
    """The norms of a chain say what it is: κ = λ² of the tridiagonal matrix of ‖W_2‖ and ‖W_3‖."""
    hybrid = ffebm.convert(seeded(lambda: _chain(12, 20, 16, 10)), noise(4, 12).double(), feedback="symmetric")
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    factors = scale_to_loop_gain(hybrid, loop_gain)
    assert list(factors) == ["block_1"]
    assert hybrid.blocks[0].loop_gain == pytest.approx(loop_gain, rel=1e-3)
    norms = [float(torch.linalg.matrix_norm(hybrid.get_parameter(f"{i}.weight").detach(), 2)) for i in (2, 4)]
    assert norms[0] ** 2 + norms[1] ** 2 == pytest.approx(loop_gain, rel=2e-2)  # the certificate adds a margin
    for name, value in hybrid.named_parameters():
        factor = factors["block_1"] if name in ("2.weight", "4.weight") else 1.0
        torch.testing.assert_close(value, before[name] * factor, rtol=1e-12, atol=0)


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Tanh())


@pytest.mark.parametrize("build", [lambda: Skip(nn.Tanh), _convolutions])
def test_wires_are_not_scaled_and_the_factor_is_found_by_measuring(build: Callable[[], nn.Module]) -> None:
    x = noise(2, 6) if build is not _convolutions else noise(2, 2, 8, 8)
    hybrid = ffebm.convert(seeded(build), x, feedback="symmetric")
    goal = 1.5 * hybrid.blocks[0].loop_gain
    assert set(scale_to_loop_gain(hybrid.blocks[0], goal)) == {"block_1"}
    assert hybrid.blocks[0].loop_gain == pytest.approx(goal, rel=2e-3)


def test_scaling_stops_where_wires_alone_have_more() -> None:
    class Wired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            s = torch.tanh(self.first(x))
            return torch.tanh(self.second(s) + s)

    hybrid = ffebm.convert(seeded(Wired), noise(2, 8), feedback="symmetric")
    before = hybrid.second.weight.detach().clone()
    with pytest.raises(
        ffebm.InputError, match=r"no factor on the weights between the states of block_1 gives it a loop"
    ):
        scale_to_loop_gain(hybrid, 0.2)
    assert torch.equal(hybrid.second.weight, before)


def test_a_held_loop_gain_is_refused_and_a_fixed_gain_is_not() -> None:
    hybrid = ffebm.convert(seeded(lambda: _chain(12, 20, 16, 10)), noise(4, 12).double(), feedback=0.1)
    before = hybrid.get_parameter("2.weight").detach().clone()
    with pytest.raises(ffebm.InputError, match=r"block_1 does not follow its weights, since feedback=0\.1 holds it"):
        scale_to_loop_gain(hybrid, 0.5)
    assert torch.equal(hybrid.get_parameter("2.weight"), before)
    scales = hybrid.blocks[0].module.scales
    with hybrid.held_feedback():
        scale_to_loop_gain(hybrid, 0.5)
        assert hybrid.blocks[0].loop_gain == pytest.approx(0.5, rel=1e-3)
    assert hybrid.blocks[0].module.scales == scales


@pytest.mark.parametrize(
    ("blocks", "loop_gain", "message"),
    [
        ("hybrid", 0.0, "loop_gain is 0.0; expected a positive number"),
        ("hybrid", "0.5", "loop_gain is '0.5'"),
        ("model", 0.5, "blocks is a Sequential; expected a hybrid or one of its blocks"),
        ("single", 0.5, "block_1 has no feedback"),
    ],
)
def test_scaling_refuses(blocks: str, loop_gain: float, message: str) -> None:
    model = seeded(lambda: _chain(6, 6, 6))
    hybrid = ffebm.convert(model, noise(2, 6).double(), feedback="symmetric")
    single = ffebm.convert(seeded(lambda: _chain(6, 6)), noise(2, 6).double())
    given = {"hybrid": hybrid, "model": model, "single": single.blocks[0]}[blocks]
    with pytest.raises(ffebm.InputError, match=message):
        scale_to_loop_gain(given, loop_gain)  # type: ignore[arg-type]


def test_blocks_that_share_a_weight_are_refused_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.shared, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(torch.tanh(self.shared(torch.tanh(self.entry(x)))))
            return torch.tanh(self.shared(torch.tanh(self.entry(x))))

    hybrid = ffebm.convert(seeded(Twice), noise(2, 6), feedback="symmetric")
    assert len(hybrid.blocks) == 2
    with pytest.raises(ffebm.InputError, match=r"block_1 and block_2 share a weight of shape \(6, 6\)"):
        scale_to_loop_gain(hybrid, 0.5)
    assert set(scale_to_loop_gain(hybrid.blocks[0], 0.5)) == {"block_1"}


def test_a_resistive_block_at_its_fixed_gain() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4)))
    hybrid = ffebm.convert(model, noise(2, 8), energy="resistive", feedback=0.5)
    goal = 0.8 * hybrid.blocks[0].loop_gain
    scale_to_loop_gain(hybrid, goal)
    assert hybrid.blocks[0].loop_gain == pytest.approx(goal, rel=2e-3)


@pytest.mark.parametrize("shape", [(200, 100), (40, 10, 3, 3)])
def test_conductances_are_the_positive_half_of_a_uniform_distribution(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape, dtype=torch.float64)
    assert conductances_(weight, torch.Generator().manual_seed(0)) is weight
    bound = weight[0].numel() ** -0.5
    assert float(weight.min()) == 0
    assert 0.99 * bound < float(weight.max()) <= bound
    assert float((weight == 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(weight[weight > 0].mean()) == pytest.approx(bound / 2, rel=0.03)
    assert torch.equal(conductances_(torch.empty_like(weight), torch.Generator().manual_seed(0)), weight)


@pytest.mark.parametrize(
    "weight", [torch.empty(3), torch.empty(3, 3, dtype=torch.int64), None], ids=["a bias", "integers", "nothing"]
)
def test_conductances_refuse(weight: object) -> None:
    with pytest.raises(ffebm.InputError, match="expected the floating-point weight of a linear layer, of shape"):
        conductances_(weight)  # type: ignore[arg-type]
