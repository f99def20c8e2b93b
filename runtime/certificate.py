"""`Certificate`: what is known about the equilibrium of a block, and what its amplifiers are set to."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Certificate"]


@dataclass(frozen=True)
class Certificate:
    """What is known about a block's well-posedness."""

    norms: tuple[tuple[int, int, float], ...]
    """(l, m, ‖J_{ml}‖₂) of every edge, where the energy is measured by them; (m, l, norm) of feedback of its own."""
    scales: tuple[float, ...]
    """c_l, with 1 for the deepest layer."""
    radius: float
    """ρ(A), A the comparison matrix of the layers or the scaled coupling of the whole block, as the energy has it."""
    sweep_radius: float | None = None
    """ρ((1 − L)⁻¹U) of A = L + U, the factor by which a Gauss–Seidel sweep contracts; None: taken for ρ(A)²."""

    amplifiers: tuple[float, ...] = ()
    """A_l, the gain of the amplifier behind each layer; empty for an energy without."""

    @property
    def contraction(self) -> float:
        """Factor by which a Gauss–Seidel sweep contracts: ρ² on a chain (Young 1954), more with odd cycles."""
        return self.loop_gain if self.sweep_radius is None else self.sweep_radius

    @property
    def loop_gain(self) -> float:
        """κ = ρ(A)²."""
        return self.radius**2

    @property
    def certified(self) -> bool:
        """Whether a unique equilibrium is certain."""
        return self.radius < 1

    def sweeps(self, rtol: float) -> int | None:
        """Gauss–Seidel sweeps predicted for a relative change of `rtol`; None without a certificate.

        With r the contraction of a sweep, ⌈ln rtol / ln r⌉.
        """
        if not self.certified:
            return None
        if self.contraction <= rtol:
            return 1
        return math.ceil(math.log(rtol) / math.log(self.contraction))
