"""`Circuit`: the resistors, diodes and amplifiers whose operating point is the equilibrium of a block.

Layer m has a node of voltage v_m = s_m/A_m for each of its units. A conductance w ends there for each coefficient of
its drive, from the line +s or −s of its source; a pad of A_m − row sum goes to ground, and the bias is a current. An
amplifier of gain A_m drives the lines of s_m, and draws γ_{l,m} A_m times the current of its lines to layer m from the
node of layer l. Kirchhoff's law at the node of layer l is then

    ∂G_l(s_l) + (D^l − 1) s_l ∋ h_l

with ∂G_l(s) − s the current of the diodes and resistors that make σ_l. All numbers are dimensionless: voltages in units
of the states, conductances in units of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ffebm_compiler.runtime.activations.base import Activation

__all__ = ["Circuit", "Coupling", "Stage"]


@dataclass(frozen=True)
class Coupling:
    """The conductances from one source to one layer."""

    source: int
    """The layer, or −1 − i for input i of the block."""
    plus: Tensor
    """(units of the layer, units of the source), ≥ 0: from the line of the source."""
    minus: Tensor
    """The same from the line of its negative."""
    reflection: float
    """γ_{l,m} A_m: what part of the line's current the source's node delivers. 0 for inputs."""


@dataclass(frozen=True)
class Stage:
    """A layer of a circuit."""

    name: str
    activation: Activation
    gain: float
    """A_m."""
    bias: Tensor
    """The current into each node."""
    couplings: tuple[Coupling, ...]
    pads: Tensor
    """A_m − row sum: the conductance from each node to ground."""


@dataclass(frozen=True)
class Circuit:
    """A circuit and what drives it."""

    inputs: tuple[Tensor, ...]
    """Voltages, flat."""
    stages: tuple[Stage, ...]
