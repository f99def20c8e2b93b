"""`Certificate`: the result of measuring a block, and the settings of its amplifiers."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Certificate"]


@dataclass(frozen=True)
class Certificate:
    """What a measurement says about a block's well-posedness."""

    norms: tuple[tuple[int, int, float], ...]
    """(l, m, ‖J_{ml}‖₂) of every edge, and (m, l, norm) for feedback weights; empty if the energy does not use them."""
    scales: tuple[float, ...]
    """c_l, with 1 for the deepest layer."""
    radius: float
    """ρ(A). The energy decides what A is: the comparison matrix of the layers, or the block's scaled coupling."""
    sweep_radius: float | None = None
    """ρ((1 − L)⁻¹U) of A = L + U, by which a Gauss–Seidel sweep contracts. If it is None, ρ(A)² is used."""

    amplifiers: tuple[float, ...] = ()
    """A_l, the gain of the amplifier behind each layer; empty if the energy has no amplifiers."""
    coherent: bool = False
    """Whether the errors of all units may have one sign at these weights (`EdgeNorms.coherent`)."""

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
