"""`SplitReLU`: ReLU for some units and −ReLU(−h) for the others, as in the hidden layers of deep resistive networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.activations.base import Activation, Lines, clamp_stepper
from ffebm_compiler.runtime.activations.piecewise import ReLU

__all__ = ["SplitReLU", "split_relu"]

_RELU = ReLU()
_LOWER, _UPPER = Lines((0.0,), (0.0, 1.0)), Lines((0.0,), (1.0, 0.0))


@dataclass(frozen=True)
class SplitReLU(Activation):
    """σ(h) = max(h, 0) for the first `above` units along a dimension, min(h, 0) for the `below` units after them.

    With ε = ±1 for these units, σ(h) = ε ReLU(ε h), Λ(h) = ½σ(h)² and G(s) = ½s² for ε s ≥ 0. It projects h to a
    cone. In a circuit, a diode to ground holds a node at or above 0, or at or below 0 if it is the other way round.

    Source: Scellier 2024 (arXiv 2402.11674).
    """

    above: int
    """Number of units that are held at or above 0."""
    below: int
    """Number of units after them that are held at or below 0."""
    dim: int = -1
    """The dimension of the units, counted from the last one, so below 0."""
    name = "split_relu"
    lipschitz = 1.0
    monotone = True
    smooth = False
    projects = True
    cone = True

    def __post_init__(self) -> None:
        """Check the settings."""
        if not (self.above >= 0 and self.below >= 0 and self.above + self.below > 0 and self.dim < 0):
            raise InputError(f"{self!r}: expected counts of units, at least one unit, and a dimension below 0")

    def signs(self, like: Tensor) -> Tensor:
        """ε, in a shape that broadcasts over h."""
        signs = torch.cat((like.new_ones(self.above), like.new_full((self.below,), -1)))
        return signs.reshape(-1, *[1] * (-1 - self.dim))

    def unit_lines(self, shape: torch.Size) -> list[Lines]:
        signs = self.signs(torch.empty(0, device="cpu")).expand(shape).flatten().tolist()
        return [_LOWER if sign > 0 else _UPPER for sign in signs]

    def bounds(self, h: Tensor) -> tuple[float | Tensor, float | Tensor]:
        shape = (self.above + self.below, *[1] * (-1 - self.dim))
        low, high = h.new_zeros(shape), h.new_zeros(shape)
        low[self.above :], high[: self.above] = -inf, inf
        return low, high

    def value(self, h: Tensor) -> Tensor:
        signs = self.signs(h)
        return torch.relu(h * signs) * signs

    def derivative(self, h: Tensor) -> Tensor:
        return _RELU.derivative(h * self.signs(h))

    def primitive(self, h: Tensor) -> Tensor:
        return _RELU.primitive(h * self.signs(h))

    def potential(self, s: Tensor) -> Tensor:
        return _RELU.potential(s * self.signs(s))

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return self.stepper(h, t)(k)

    def stepper(self, h: Tensor, t: float) -> Callable[[Tensor], Tensor]:
        """ε times the step quotient of ReLU, for ε h and ε k."""
        signs = self.signs(h)
        step = clamp_stepper(h * signs, t, 0.0, inf)
        return lambda k: step(k * signs) * signs


def split_relu(h: Tensor, above: int, below: int, dim: int) -> Tensor:
    """`SplitReLU` as a function. A recognised concatenation becomes a call of it."""
    return SplitReLU(above, below, dim).value(h)
