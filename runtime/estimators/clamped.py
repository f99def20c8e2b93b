"""Contrastive and coupled learning: hold the visible states at or near their target, and compare the energies.

Source: Scellier et al. 2023 (arXiv 2312.15103), who compare them with equilibrium propagation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.plain_numbers import plain_fields
from ffebm_compiler.runtime.estimators.base import Estimator, Gradients, check_through_feedback, contract
from ffebm_compiler.runtime.estimators.equilibrium_propagation import EquilibriumPropagation
from ffebm_compiler.runtime.estimators.nudge import SHARES, amplitudes, midpoint, scaled, settled_currents, weighted
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.clamped_phase import ClampedPhase

__all__ = ["ContrastiveLearning", "CoupledLearning"]


@dataclass(frozen=True)
class CoupledLearning(Estimator):
    """Coupled learning: visible states are held a little nearer to their target, and the others settle.

    With the visible states v (those that the loss sees) held at

        s_v^{±β} = s_v* ∓ β a δ_v ,   projected to the range of σ_v,

    and all others at their equilibrium under that, g_θ = [∂_θE(s^{+β}) − ∂_θE(s*)]/(βa) (positive),
    [∂_θE(s*) − ∂_θE(s^{−β})]/(βa) (negative), or half the sum of both (centered); δ_x alike. a = rms(s_v)/rms(δ) per
    sample, as for equilibrium propagation, so that β is relative.

    *This is not the gradient of the loss, for any β.* Its limit β → 0 is the gradient with δ replaced by S δ, S =
    H_vv − H_vh H_hh⁻¹ H_hv with the second derivatives H of the energy. S δ is the force that displaces the visible
    states by δ. Equilibrium propagation takes the displacement that the force δ causes.

    It is defined only in blocks whose outputs reach the loss through no other block. `set_gradient` gives the other
    blocks equilibrium propagation with the same variant and β, and `summary()` says which. If β is the default, theirs
    is the default of equilibrium propagation, so that they take a large nudge where devices read states with noise
    (`docs/analog.md`). A block of one layer has no other states, so that its gradient stays exact.

    Raises:
        InputError: a setting is out of range.
        UnsupportedError: a held state has an activation with parameters, or it is defined in no block of a hybrid.

    Sources: Stern et al. 2021 (arXiv 2011.03861); Scellier et al. 2023 (arXiv 2312.15103) for the three variants.
    """

    beta: float = 1e-4
    variant: Literal["positive", "negative", "centered"] = "positive"
    through_feedback: bool = False
    """Whether the gradient goes through γ too, which follows the weights where the loop gain is held."""
    name = "coupled"
    title: ClassVar[str] = "coupled learning"
    output_blocks_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        if isinstance(self.beta, bool) or not isinstance(self.beta, float | int) or not 0 < self.beta <= 10:
            raise InputError(f"beta is {self.beta!r}; expected a number in (0, 10], relative to the block's output")
        if self.variant not in ("positive", "negative", "centered"):
            raise InputError(f"variant is {self.variant!r}; expected 'positive', 'negative' or 'centered'")
        check_through_feedback(self.through_feedback)

    @property
    def compares_states(self) -> bool:
        """It does."""
        return True

    def within(self) -> EquilibriumPropagation:
        """Equilibrium propagation with the same variant and β; with its own default β if this one is the default."""
        propagation = EquilibriumPropagation(variant=self.variant, through_feedback=self.through_feedback)
        return propagation if self.beta == type(self).beta else replace(propagation, beta=self.beta)

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Settle with the visible states held, and contract.

        Raises:
            UnsupportedError: a held state has an activation with parameters.
            ConvergenceError: a phase does not settle.
        """
        amplitude = amplitudes(at, errors)
        if amplitude is None:
            return Gradients.none(at.frame.program)
        betas = [(sign * self.beta, share) for sign, share in SHARES[self.variant]]
        return _contrast(at, errors, amplitude, betas, self.through_feedback)


@dataclass(frozen=True)
class ContrastiveLearning(Estimator):
    """Contrastive learning: visible states are held at their target, and the energies of both states are compared.

    The target of a loss is s_v* − scale · δ_v with δ = ∂L/∂s_v, projected to the range of σ_v, and

        g_θ = [∂_θE(s with s_v at its target) − ∂_θE(s*)] / scale ,   δ_x alike.

    Use `scale` = 1 for ½‖s − y‖² summed over the batch, and N for its mean over N samples. The target is then y itself.
    With cross-entropy it is s* + onehot − softmax. This is `CoupledLearning` of the positive variant with β = 1 and
    `scale` in the place of a. As there, *it is not the gradient of the loss*, and it is defined only in blocks whose
    outputs reach the loss through no other block. Other blocks use equilibrium propagation with its default settings.

    Raises:
        InputError: `scale` is no positive number.
        UnsupportedError: a held state has an activation with parameters, or it is defined in no block of a hybrid.

    Sources: Movellan 1991; Baldi & Pineda 1991; Scellier et al. 2023 (arXiv 2312.15103).
    """

    scale: float = 1.0
    through_feedback: bool = False
    """Whether the gradient goes through γ too, which follows the weights where the loop gain is held."""
    name = "contrastive"
    title: ClassVar[str] = "contrastive learning"
    output_blocks_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        number = isinstance(self.scale, float | int) and not isinstance(self.scale, bool)
        if not number or not 0 < self.scale < math.inf:
            raise InputError(
                f"scale is {self.scale!r}; expected a positive number, which is 1 for a loss summed over the batch and "
                "the batch size for a mean"
            )
        check_through_feedback(self.through_feedback)

    @property
    def compares_states(self) -> bool:
        """It does."""
        return True

    def within(self) -> EquilibriumPropagation:
        """Equilibrium propagation."""
        return EquilibriumPropagation(through_feedback=self.through_feedback)

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Settle with the visible states at their targets, and contract.

        Raises:
            UnsupportedError: a held state has an activation with parameters.
            ConvergenceError: the phase does not settle.
        """
        present = next((error for error in errors if error is not None), None)
        if present is None:
            return Gradients.none(at.frame.program)
        scale = present.new_full((), self.scale, dtype=torch.promote_types(present.dtype, torch.float32))
        return _contrast(at, errors, scale, [(1.0, 1.0)], self.through_feedback)


def _contrast(
    at: Situation,
    errors: Sequence[Tensor | None],
    amplitude: Tensor,
    betas: Sequence[tuple[float, float]],
    through_feedback: bool,
) -> Gradients:
    """Σ_j share_j [∂E(s^{β_j}) − ∂E(s*)]/(β_j a), with the visible states held at s* − β_j a δ."""
    if not at.frame.program.symmetric:
        raise UnsupportedError(
            f"{at.name} has no energy, since its feedback goes through weights of its own, by feedback_weights or by "
            "devices with mismatch, and contrastive and coupled learning compare energies: use 'ep' (local) or "
            "'implicit' (exact), or feedback_weights='tied' and mismatch=0"
        )
    moves = scaled(errors, -amplitude)
    activations = at.setting.activations(at.frame)
    for layer, move in zip(at.frame.program.layers, moves, strict=True):
        if move is not None and layer.parameters:
            raise UnsupportedError(
                f"{at.name}: layer {layer.name} has an activation with learned parameters, whose energy is not a "
                "function of the state, so that the state cannot be held. Use 'ep', or keep the activation digital"
            )

    def phase_of(group: Sequence[complex]) -> ClampedPhase:
        strengths = [beta.real for beta in group]
        held = [
            None if move is None else [_move(move, state, sigma.bounds(field), beta).mul_(scale) for beta in strengths]
            for move, state, field, sigma, scale in zip(
                moves, at.states, at.preactivations, activations, at.scales, strict=True
            )
        ]
        return ClampedPhase(at.frame, at.setting, at.preactivations, held, strengths)

    found, sweeps = settled_currents(at, betas, None, phase_of)
    restored = torch.where(amplitude > 0, -1 / amplitude, amplitude)
    currents = scaled([weighted(parts, betas) for parts in zip(*found, strict=True)], restored)
    nothing: list[Tensor | None] = [None] * len(errors)
    gradients = contract(at, currents, midpoint(at, found, betas), nothing, through_feedback=through_feedback)
    gradients.sweeps = sweeps
    return gradients


def _move(move: Tensor, state: Tensor, bounds: tuple[float | Tensor, float | Tensor], beta: float) -> Tensor:
    """The v for which s + βv is s + β · move projected to the bounds, without cancellation."""
    first, last = bounds if beta > 0 else bounds[::-1]
    return torch.minimum(torch.maximum(move, (first - state) / beta), (last - state) / beta)
