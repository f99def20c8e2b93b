"""A loss, its gradients in a hybrid, how two gradients compare, and finite differences beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from networks import noise
from torch import Tensor, nn

import ffebm_compiler as ffebm

__all__ = [
    "Named",
    "assert_finite_differences",
    "cosine",
    "gradients_by",
    "parameter_gradients",
    "slope_along",
    "squared_error",
]

Named = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]


def squared_error(output: Tensor) -> Tensor:
    """The mean squared distance to a fixed target."""
    return (output - noise(*output.shape, seed=9).to(output)).square().mean()


def parameter_gradients(hybrid: nn.Module, x: Tensor) -> Named:
    """Of the squared error by every parameter, in float64."""
    hybrid.zero_grad(set_to_none=True)
    squared_error(hybrid(x)).backward()
    return {name: p.grad.double().clone() for name, p in hybrid.named_parameters() if p.grad is not None}


def cosine(found: Tensor, expected: Tensor) -> float:
    """Of two gradients."""
    return float((found * expected).sum() / (found.norm() * expected.norm()))


def gradients_by(
    estimators: Sequence[Any], hybrid: ffebm.HybridModel, x: Tensor, loss_of: Loss
) -> tuple[Named, dict[str, Named]]:
    """(the parameters and x, estimator -> its gradient of each of them). Every one of them has a gradient."""
    tensors: Named = {}
    gradients: dict[str, Named] = {}
    for estimator in estimators:
        hybrid.set_gradient(estimator)
        hybrid.zero_grad()
        given = x.clone().requires_grad_()
        loss_of(hybrid(given)).backward()
        tensors = {**dict(hybrid.named_parameters()), "x": given}
        gradients[str(estimator)] = {name: t.grad.clone() for name, t in tensors.items() if t.grad is not None}
        assert set(gradients[str(estimator)]) == set(tensors)
    return tensors, gradients


def slope_along(
    direction: Tensor,
    name: str,
    tensors: Mapping[str, Tensor],
    hybrid: ffebm.HybridModel,
    x: Tensor,
    loss_of: Loss,
    size: float,
) -> float:
    """The derivative of the loss along a direction of a parameter, or of x, by central differences of fourth order.

    The step is the largest in which no unit crosses a kink: the differences over it and over twice as much agree to
    1e-7 of `size`.
    """

    def shifted(step: float) -> float:
        point, moved = x, step * direction
        with torch.no_grad():
            if name == "x":
                point = x + moved
            else:
                tensors[name].add_(moved)
            result = float(loss_of(hybrid(point)))
            if name != "x":
                tensors[name].sub_(moved)
        return result

    best = (math.inf, 0.0)
    for step in (1e-4, 1e-5, 1e-6):
        ends = [shifted(factor * step) for factor in (1, -1, 2, -2)]
        near, far = (ends[0] - ends[1]) / (2 * step), (ends[2] - ends[3]) / (4 * step)
        best = min(best, (abs(near - far), (4 * near - far) / 3))
        if best[0] <= 1e-7 * size:
            break
    return best[1]


def assert_finite_differences(
    estimators: Sequence[Any],
    hybrid: ffebm.HybridModel,
    x: Tensor,
    movable: Callable[[str, Tensor], Tensor] | None = None,
) -> tuple[dict[str, Named], dict[str, float]]:
    """(estimator -> its gradients of the squared error, parameter or x -> the largest norm among them).

    Each of them has its finite difference along a random direction, to 1e-7, which moves what is `movable` only.
    """
    tensors, gradients = gradients_by(estimators, hybrid, x, squared_error)
    sizes: dict[str, float] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        direction = noise(*tensor.shape, seed=100 + index).double()
        if movable is not None:
            direction = torch.where(movable(name, tensor.detach()), direction, 0)
        direction /= direction.norm()
        size = sizes[name] = max(float(found[name].norm()) for found in gradients.values())
        slope = slope_along(direction, name, tensors, hybrid, x, squared_error, size)
        for estimator, found in gradients.items():
            along = float((found[name] * direction).sum())
            assert along == pytest.approx(slope, rel=1e-7, abs=1e-7 * size), f"{name}: {estimator} {along}, not {slope}"
    return gradients, sizes
