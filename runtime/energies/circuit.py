"""`Circuit`: the resistors, diodes and amplifiers whose operating point is the equilibrium of a block.

Layer m has a node of voltage v_m = s_m/A_m for each of its units, with A_m = 1 if the energy has no amplifiers. A
conductance w ends there for each coefficient of its drive, from the line +s or −s of its source. A pad of A_m − row sum
goes to ground, and the bias is a current. An amplifier of gain A_m drives the lines of s_m, and draws γ_{l,m} A_m times
the current of its lines to layer m from the node of layer l. Kirchhoff's law at the node of layer l is then

    ∂G_l(s_l) + (D^l − 1) s_l ∋ h_l

with D^l the conductance at the node of layer l, that of its lines to later layers included, and ∂G_l(s) − s the current
of the diodes and resistors that make σ_l. Without amplifiers, negative weights and another γ than 1, a node is its own
line, and the circuit is one of resistors, diodes and sources alone. All numbers are dimensionless: voltages in units
of the states, conductances in units of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
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
    shape: torch.Size
    """Of the state, for one sample."""
    gain: float
    """A_m, or 1 without amplifiers."""
    bias: Tensor
    """The current into each node."""
    couplings: tuple[Coupling, ...]
    pads: Tensor
    """A_m − row sum: the conductance from each node to ground; 0 without amplifiers."""

    @property
    def own(self) -> Tensor:
        """The conductance at each node, of its own lines and its pad, divided by A_m."""
        rows = [(part.plus + part.minus).sum(1) for part in self.couplings]
        return (torch.stack(rows).sum(0) + self.pads) / self.gain


@dataclass(frozen=True)
class Circuit:
    """A circuit and what drives it."""

    inputs: tuple[Tensor, ...]
    """Voltages, flat."""
    stages: tuple[Stage, ...]

    def readers(self, index: int) -> tuple[tuple[int, Coupling], ...]:
        """(later layer, its conductances) for every layer that reads a layer."""
        return tuple((m, part) for m, s in enumerate(self.stages) for part in s.couplings if part.source == index)

    def inverts(self, index: int) -> bool:
        """Whether a layer reads the inverted line of an input."""
        return self._inverts[index]

    def direct(self, index: int) -> bool:
        """Whether the nodes of a layer are its lines, so that it needs no amplifiers."""
        return self._direct[index]

    @cached_property
    def _inverts(self) -> tuple[bool, ...]:
        inverted = {part.source for stage in self.stages for part in stage.couplings if bool((part.minus > 0).any())}
        return tuple(-1 - index in inverted for index in range(len(self.inputs)))

    @cached_property
    def _direct(self) -> tuple[bool, ...]:
        return tuple(
            stage.gain == 1
            and all(part.reflection == 1 and not bool((part.minus > 0).any()) for _, part in self.readers(index))
            for index, stage in enumerate(self.stages)
        )
