"""`PulseResponse`: how the weight that a pair of devices holds answers programming pulses.

With a weight w between the bounds −b and b of its devices, one pulse changes it by

    up:    +Δ (1 + a) (1 − q w/b) (1 + c ξ)          down:  −Δ (1 − a) (1 + q w/b) (1 + c ξ)

Δ is the step, a the asymmetry, q how soft the bounds are (0: constant steps up to a hard bound), c the noise from cycle
to cycle, and ξ ~ N(0, 1) for every pulse. Up and down pulses of equal number cancel at the *symmetry point*
w = a b/q only. Each device has its own Δ, a and b. n pulses without noise are w_n = B − (B − w)(1 − q Δ(1 ± a)/b)ⁿ with
B = ±b/q, which is what is computed, and their noise has the size of √n of the first pulse's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffebm_compiler.plain_numbers import plain_fields
from ffebm_compiler.runtime.devices.laws import checked_number

__all__ = ["PulseResponse", "PulsedWeights"]


@dataclass(frozen=True)
class PulseResponse:
    """A device's answer to pulses. Steps are relative to the bound.

    Args:
        step: Δ/b, the step of one pulse at w = 0.
        asymmetry: a, from −1 to 1.
        softness: q, from 0 (constant steps) to 1 (steps vanish at the bound).
        cycle: c, standard deviation of a pulse relative to its step.
        bound: b in units of the largest weight of a parameter when an optimizer is wrapped.
        step_spread: standard deviation of Δ over the devices, relative to Δ.
        asymmetry_spread: standard deviation of a over the devices.
        bound_spread: standard deviation of b over the devices, relative to b.

    Raises:
        InputError: a number is out of range.

    Sources: soft bounds: Fusi & Abbott 2007; the device parameters of Gokmen & Vlasov 2016 (Frontiers in Neuroscience
    10, 333).
    """

    step: float = 0.001
    asymmetry: float = 0.0
    softness: float = 1.0
    cycle: float = 0.0
    bound: float = 4.0
    step_spread: float = 0.0
    asymmetry_spread: float = 0.0
    bound_spread: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        checked_number("step", self.step, most=1, above=True, remedy="a share of the bound")
        checked_number("asymmetry", self.asymmetry, least=-0.99, most=0.99)
        checked_number("softness", self.softness, most=1)
        checked_number("bound", self.bound, above=True, remedy="in units of the largest weight")
        for name in ("cycle", "step_spread", "asymmetry_spread", "bound_spread"):
            checked_number(name, getattr(self, name))


class PulsedWeights:
    """The devices of one parameter: the response of each, drawn once.

    Args:
        response: the law.
        like: the parameter. Its largest absolute value sets the bound.
        seed: seed of the draws, which come from a generator of the CPU.
        index: number of the parameter, so that each has draws of its own.
        bound: the bound; None sets it by the parameter.
    """

    def __init__(
        self, response: PulseResponse, like: Tensor, seed: int, index: int, bound: float | None = None
    ) -> None:
        self.softness, self.cycle, self.index = response.softness, response.cycle, index
        largest = float(like.detach().abs().max()) if like.numel() else 0.0
        self.mean_bound = bound if bound is not None else response.bound * (largest or 1.0)
        generator = torch.Generator().manual_seed((seed * 1000003 + index) % 2**63)

        def drawn(mean: float, spread: float, low: float, high: float) -> Tensor:
            values = torch.full(like.shape, mean, dtype=torch.float64, device="cpu")
            if spread:
                values += spread * torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
            return values.clamp(low, high).to(like.device, like.dtype)

        self.bounds = self.mean_bound * drawn(1.0, response.bound_spread, 0.05, 1e3)
        self.steps = self.mean_bound * response.step * drawn(1.0, response.step_spread, 0.01, 1e3)
        self.asymmetry = drawn(response.asymmetry, response.asymmetry_spread, -0.99, 0.99)
        self.step = self.mean_bound * response.step
        """The step that whoever sends pulses counts with."""

    @property
    def symmetry_points(self) -> Tensor:
        """The weights at which an up and a down pulse cancel; 0 where steps do not depend on the weight."""
        if not self.softness:
            return torch.zeros_like(self.bounds)
        return (self.asymmetry * self.bounds / self.softness).clamp(-self.bounds, self.bounds)

    def pulses_for(self, change: Tensor) -> Tensor:
        """Signed numbers of pulses for a change, rounded at random so that their mean is right."""
        wanted = change / self.step
        return torch.floor(wanted + torch.rand_like(wanted))

    def pulsed(self, weights: Tensor, pulses: Tensor) -> Tensor:
        """The weights after signed numbers of pulses."""
        sign, count = pulses.sign(), pulses.abs()
        size = self.steps * (1 + sign * self.asymmetry)
        if self.softness:
            limit = sign * self.bounds / self.softness
            factor = (1 - self.softness * size / self.bounds).clamp_min(0)
            moved = limit - (limit - weights) * factor**count
        else:
            moved = weights + sign * size * count
        if self.cycle:
            slope = (1 - self.softness * sign * weights / self.bounds).clamp_min(0)
            moved = moved + self.cycle * size * slope * count.sqrt() * torch.randn_like(weights)
        return torch.where(count > 0, torch.minimum(torch.maximum(moved, -self.bounds), self.bounds), weights)
