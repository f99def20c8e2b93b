"""Gradients of a hybrid in float64, and finite differences of its loss beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import ffebm_compiler as ffebm

__all__ = ["Named", "gradients_by", "slope_along"]

Named = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]


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
