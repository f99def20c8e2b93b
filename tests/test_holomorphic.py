"""Nudged phases in the complex plane, and several of them in one batch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from networks import CASES, converted, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

every_case = pytest.mark.parametrize("case", CASES)


def own(case: str, activation: type[nn.Module], dtype: torch.dtype = torch.float64) -> tuple[ffebm.HybridModel, Tensor]:
    """A case to configure; what is shared with other tests stays as it is."""
    hybrid, x = converted(case, activation)
    return copy.deepcopy(hybrid).to(dtype), x.to(dtype)


def gradient(hybrid: ffebm.HybridModel, x: Tensor, estimator: Any) -> Tensor:
    """All gradients of a squared error, by parameters and input, as one vector."""
    hybrid.set_gradient(estimator)
    hybrid.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    output = hybrid(x)
    (output - noise(*output.shape, seed=9).to(output.dtype)).square().mean().backward()
    assert x.grad is not None
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in hybrid.parameters() if p.grad is not None)])


def holomorphic(hybrid: ffebm.HybridModel) -> bool:
    """Whether every block that settles could be nudged in the complex plane."""
    coupled = [block.module.program for block in hybrid.blocks if block.module.program.coupled]
    return all(program.resizable for program in coupled)


@every_case
@pytest.mark.parametrize("points", [2, 3, 4])
def test_the_error_falls_as_beta_to_the_number_of_points(case: str, points: int) -> None:
    hybrid, x = own(case, nn.Tanh)
    hybrid.set_feedback(0.3)
    if not holomorphic(hybrid):
        pytest.fail("every case of this suite keeps its samples apart")
    exact = gradient(hybrid, x, "implicit")
    betas = (0.8, 0.4, 0.2) if points == 4 else (0.4, 0.2, 0.1)  # above the round-off of float64
    errors = []
    for beta in betas:
        found = gradient(hybrid, x, ffebm.EquilibriumPropagation(beta, variant="holomorphic", points=points))
        errors.append(float((found - exact).norm() / exact.norm()))
    slope = np.polyfit(np.log(betas), np.log(errors), 1)[0]
    assert slope == pytest.approx(points, abs=0.3), errors


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Mish])
def test_a_large_nudge_is_exact_with_enough_points(activation: type[nn.Module]) -> None:
    hybrid, x = own("mlp", activation)
    exact = gradient(hybrid, x, "implicit")
    centered = gradient(hybrid, x, ffebm.EquilibriumPropagation(0.2, variant="centered"))
    found = gradient(hybrid, x, ffebm.EquilibriumPropagation(0.2, variant="holomorphic", points=6))
    error = float((found - exact).norm() / exact.norm())
    assert error <= 1e-7
    assert error <= 1e-2 * float((centered - exact).norm() / exact.norm())


def test_two_points_are_the_centered_form() -> None:
    hybrid, x = own("branches", nn.Tanh)
    centered = gradient(hybrid, x, ffebm.EquilibriumPropagation(0.3, variant="centered"))
    points = gradient(hybrid, x, ffebm.EquilibriumPropagation(0.3, variant="holomorphic", points=2))
    torch.testing.assert_close(points, centered, rtol=1e-9, atol=1e-12)


def test_in_float32() -> None:
    hybrid, x = own("cnn", nn.Tanh, torch.float32)
    report = {}
    for name, estimator in (
        ("holomorphic", ffebm.EquilibriumPropagation(0.3, variant="holomorphic")),
        ("implicit", "implicit"),
    ):
        report[name] = gradient(hybrid, x, estimator)
    cosine = torch.cosine_similarity(report["holomorphic"], report["implicit"], dim=0)
    assert float(cosine) >= 0.9999


@every_case
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_both_phases_at_once_are_both_phases_apart(case: str, activation: type[nn.Module]) -> None:
    hybrid, x = own(case, activation)
    found = [
        gradient(hybrid, x, ffebm.EquilibriumPropagation(0.05, variant="centered", together=together))
        for together in (False, True)
    ]
    assert float((found[0] - found[1]).norm()) <= 1e-8 * float(found[0].norm())


def test_winners_and_masks_are_those_of_their_sample() -> None:
    """Max pooling and dropout inside a block, with two phases in one batch."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.MaxPool2d(2), nn.Tanh(), nn.Dropout(0.3), nn.Conv2d(6, 4, 3), nn.Tanh()
        )
    )
    x = noise(3, 2, 8, 8)
    hybrid = ffebm.convert(model, x, block_ops=("add", "reshape", "max_pool")).train()
    assert len(hybrid.plan.blocks) == 1
    found = []
    for together in (False, True):
        torch.manual_seed(5)
        found.append(gradient(hybrid, x, ffebm.EquilibriumPropagation(1e-3, variant="centered", together=together)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_guards() -> None:
    hybrid, x = own("mlp", nn.ReLU)
    with pytest.raises(
        ffebm.UnsupportedError, match=r"block_1: the activation relu of layer layers\.0 has no holomorphic"
    ):
        gradient(hybrid, x, ffebm.EquilibriumPropagation(variant="holomorphic"))
    fixed = ffebm.convert(
        seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))), noise(5, 4), dynamic_shapes=None
    )
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1 does not keep samples apart.*use variant='centered'"):
        gradient(fixed, noise(5, 4), ffebm.EquilibriumPropagation(variant="holomorphic"))
    # Without independent samples the phases of the centered form settle one after the other.
    gradient(fixed, noise(5, 4), ffebm.EquilibriumPropagation(variant="centered", together=True))
    for options, message in (
        ({"variant": "complex"}, "expected 'positive', 'negative', 'centered' or 'holomorphic'"),
        ({"points": 1}, "points is 1; expected an integer of at least 2"),
        ({"together": "yes"}, "together is 'yes'; expected True, False or None"),
    ):
        with pytest.raises(ffebm.InputError, match=message):
            ffebm.EquilibriumPropagation(**options)
