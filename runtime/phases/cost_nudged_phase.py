"""Nudged phases in which a cost pulls at the nudged states themselves, and the costs.

The error of a cost with a target y is ∂C/∂s = φ(s) − y, with φ(s) = s for a squared error and the softmax for a
cross-entropy. With the error δ = φ(s*) − y of the free state, and s = s* + (β/c) u, the nudge β ∂C/∂s replaces the
K of equation (2) in `runtime/phases/base.py` by

    K_l − [φ(s*_l + (β/c_l) u_l) − φ(s*_l)]

at the outputs. An output's own u_l is then on both sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.activations.piecewise import Identity
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.base import narrow
from ffebm_compiler.runtime.phases.error_phases import NudgedPhase
from ffebm_compiler.runtime.program.frame import Frame, take_rows

__all__ = ["COSTS", "Cost", "CostNudgedPhase", "CrossEntropy", "SquaredError", "solved_at_once"]


class Cost(ABC):
    """A cost of the outputs s and a target y with ∂C/∂s = φ(s) − y."""

    @abstractmethod
    def prediction(self, states: Tensor) -> Tensor:
        """φ(s)."""

    @abstractmethod
    def curvature(self, states: Tensor) -> Tensor | float:
        """The diagonal of ∂φ/∂s."""


class SquaredError(Cost):
    """C = ½‖s − y‖²."""

    def prediction(self, states: Tensor) -> Tensor:
        """s itself."""
        return states

    def curvature(self, states: Tensor) -> float:
        """1."""
        return 1.0


class CrossEntropy(Cost):
    """C = −⟨y, log softmax(s)⟩ over dimension 1, as `torch.nn.functional.cross_entropy` has it."""

    def prediction(self, states: Tensor) -> Tensor:
        """The probabilities p."""
        return states.softmax(1)

    def curvature(self, states: Tensor) -> Tensor:
        """p (1 − p)."""
        p = states.softmax(1)
        return p * (1 - p)


COSTS: dict[str, Cost] = {"squared": SquaredError(), "cross-entropy": CrossEntropy()}


def solved_at_once(activations: Sequence[Activation], drives: Sequence[Tensor | None], cost: Cost) -> bool:
    """Whether one update of an output solves its equation, so that sweeps contract as those of other phases do."""
    given = zip(activations, drives, strict=True)
    linear = all(isinstance(sigma, Identity) for sigma, drive in given if drive is not None)
    return linear and isinstance(cost, SquaredError)


class CostNudgedPhase(NudgedPhase):
    """Equation (2) under β ∂C/∂s of the nudged states. The drive of an output is −(φ(s*) − y).

    An output is updated by u + [q(K − φ(s) + φ(s*)) − u]/(1 + (β/c) σ' φ'), where q is the finite difference of σ. The
    denominator makes that the exact solution if σ and φ are linear. Otherwise it is a step of a fixed-point iteration.
    """

    def __init__(
        self,
        frame: Frame,
        setting: Setting,
        preactivations: Sequence[Tensor],
        drives: Sequence[Tensor | None],
        betas: Sequence[float],
        states: Sequence[Tensor],
        cost: Cost,
    ) -> None:
        super().__init__(frame, setting, preactivations, drives, betas)
        self.states, self.cost = tuple(states), cost
        self._predictions = [None if d is None else cost.prediction(s) for d, s in zip(drives, states, strict=True)]
        self._damping = [
            None if drive is None else sigma.derivative(field) * cost.curvature(state)
            for drive, sigma, field, state in zip(drives, self._activations, preactivations, states, strict=True)
        ]

    def carried(self) -> list[int]:
        """All layers, if outputs are updated from their own values."""
        exact = solved_at_once(self._activations, self._given, self.cost)
        return super().carried() if exact else list(range(len(self.values)))

    def update(self, index: int) -> Tensor | None:
        """u_l."""
        free = self._predictions[index]
        if free is None:
            return super().update(index)
        force, present = self.force(index), self.values[index]
        assert force is not None  # the drive acts on it
        damping = self._damping[index]
        assert damping is not None
        own = [None] * self.parts if present is None else present.chunk(self.parts)
        found = []
        for part, u, beta, step in zip(force.chunk(self.parts), own, self.betas, self._steppers[index], strict=True):
            strength = beta.real / self.scales[index]
            if u is not None:
                part = part - (self.cost.prediction(torch.add(self.states[index], u, alpha=strength)) - free)
            moved = step(part)
            found.append((moved if u is None else moved - u) / (1 + strength * damping) + (0 if u is None else u))
        return found[0] if self.parts == 1 else torch.cat(found)

    def correction(self, rtol: float) -> list[Tensor] | None:
        """None: it settles by sweeps."""
        return None

    def _of(self, rows: Tensor) -> CostNudgedPhase:
        """A phase of some of the samples, at its start."""
        return CostNudgedPhase(
            self._single.narrowed(rows),
            self.setting,
            [take_rows(value, rows) for value in self.preactivations],
            narrow(self._given, rows),
            [beta.real for beta in self.betas],
            [take_rows(state, rows) for state in self.states],
            self.cost,
        )
