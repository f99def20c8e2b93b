"""Activations with parameters of their own, which are weights of the block and have gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.runtime.activations.base import Activation, clamp_step

__all__ = ["PReLU"]


@dataclass(frozen=True)
class PReLU(Activation):
    """σ(h) = h for h > 0, a h else, with a slope a for all values or one for each channel (the second dimension).

    A slope may be negative, or become negative in training. So the energy is always written in the pre-activation,
    with Λ(h) = ½ h σ(h) and ∂Λ/∂a = ½ min(h, 0)².

    Source: He et al., 2015, arXiv 1502.01852.
    """

    slope: Tensor | None = field(default=None, compare=False, repr=False)
    """The present slopes; None in a block's program, since they are one of the block's weights."""
    name = "prelu"
    monotone = False
    smooth = False

    def bound(self, parameters: Sequence[Tensor]) -> PReLU:
        """The activation at the present slopes."""
        return PReLU(parameters[0])

    def kept(self) -> PReLU:
        """The same activation with a copy of the present slopes."""
        return PReLU(None if self.slope is None else self.slope.detach().clone())

    @property
    def lipschitz(self) -> float:
        """max(1, max |a|), or 1 if no slopes are given."""
        return 1.0 if self.slope is None else max(1.0, float(self.slope.detach().abs().max()))

    def lipschitz_gradients(self) -> list[Tensor]:
        """sign(a) at the steepest slope; nothing where none is steeper than 1."""
        assert self.slope is not None
        found = torch.zeros_like(self.slope)
        if self.lipschitz > 1:
            steepest = self.slope.detach().abs().argmax()
            found.reshape(-1)[steepest] = self.slope.detach().reshape(-1)[steepest].sign()
        return [found]

    def _slope(self, h: Tensor) -> Tensor:
        """The slopes in a shape that broadcasts over h."""
        if self.slope is None:
            raise FFEBMError("the slopes of a PReLU are weights of its block: take it from `Frame.activations`")
        slope = self.slope.to(h.dtype)
        return slope.reshape(()) if slope.numel() == 1 else slope.reshape(-1, *[1] * (h.dim() - 2))

    def bounds(self, h: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """0 from below where a slope is not positive."""
        slope = self._slope(h)
        return torch.zeros_like(slope).masked_fill(slope > 0, -torch.inf), torch.inf

    def value(self, h: Tensor) -> Tensor:
        self._slope(h)
        assert self.slope is not None
        return F.prelu(h, self.slope.to(h.dtype).flatten())

    def derivative(self, h: Tensor) -> Tensor:
        return torch.where(h > 0, torch.ones_like(h), self._slope(h))

    def primitive(self, h: Tensor) -> Tensor:
        return 0.5 * h * self.value(h)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        above = clamp_step(h, k, t, 0, torch.inf)
        return above + self._slope(h) * (k - above)

    def parameter_gradients(self, h: Tensor, force: Tensor) -> list[Tensor]:
        """Σ force · ∂σ/∂a over the values that share a slope, with ∂σ/∂a = min(h, 0)."""
        assert self.slope is not None
        product = force * h.clamp(max=0)
        if self.slope.numel() == 1:
            return [product.sum().reshape(self.slope.shape)]
        return [product.sum([dim for dim in range(h.dim()) if dim != 1]).reshape(self.slope.shape)]
