"""Equilibrium propagation nudged by the cost itself, as in the literature, not by its error at the free state."""

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
from ffebm_compiler.runtime.estimators.nudge import SHARES, midpoint, scaled, settled_currents, weighted
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.cost_nudged_phase import COSTS, Cost, CostNudgedPhase, CrossEntropy, solved_at_once

__all__ = ["CostNudge"]


@dataclass(frozen=True)
class CostNudge(Estimator):
    """Equilibrium propagation in which the cost itself is added to the energy, with the strength β.

    The nudged states s^β are the equilibrium of E + β C, and with the free states s*

        g_θ = [∂_θE(s^{+β}) − ∂_θE(s^{−β})]/2β  (centered),   ±[∂_θE(s^{±β}) − ∂_θE(s*)]/β ,   δ_x alike.

    `EquilibriumPropagation` has β⟨δ, s⟩ with the error δ = ∂C/∂s of the free state in the place of β C. Both are the
    gradient of the loss to first order in β. At a finite β they differ, and so do the comparisons of positive, negative
    and centered nudges in the literature, which has β C.

    The loss must be the cost of the block's outputs s themselves, whose error ∂C/∂s = φ(s) − y tells the target y:

        "squared"        C = ½‖s − y‖²,                 φ(s) = s
        "cross-entropy"  C = −⟨y, log softmax(s)⟩,      φ(s) = softmax(s) over dimension 1, y one-hot or soft

    It is defined only in blocks whose outputs reach the loss through no other block. Other blocks use equilibrium
    propagation with its default settings.

    Args:
        beta: the weight of C beside the energy. It is absolute, and below 1 where −β is a nudge.
        variant: "positive", "negative" or "centered".
        cost: "squared" or "cross-entropy".
        scale: 1 if the loss is C summed over the batch, N if it is the mean over N samples.
        through_feedback: whether the gradient goes through γ too, which follows the weights where the gain is held.

    Raises:
        InputError: a setting is out of range, or the error is not that of a cross-entropy.
        UnsupportedError: an output has an activation with learned parameters, states are read from devices or measured,
            or it is defined in no block of a hybrid.
        ConvergenceError: a nudged phase does not settle, such as for a β so large that E − βC has no minimum.

    Sources: Scellier & Bengio 2017 (arXiv 1602.05179); Laborieux et al. 2021 (arXiv 2006.03824) for the cross-entropy;
    P-EP, N-EP and C-EP of Scellier et al. 2023 (arXiv 2312.15103).
    """

    beta: float = 0.5
    variant: Literal["positive", "negative", "centered"] = "centered"
    cost: Literal["squared", "cross-entropy"] = "squared"
    scale: float = 1.0
    through_feedback: bool = False
    name = "cost-nudged"
    title: ClassVar[str] = "equilibrium propagation nudged by the cost"
    output_blocks_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        if self.variant not in SHARES:
            raise InputError(f"variant is {self.variant!r}; expected 'positive', 'negative' or 'centered'")
        if self.cost not in COSTS:
            raise InputError(f"cost is {self.cost!r}; expected {' or '.join(map(repr, COSTS))}")
        if not _is_number(self.beta) or not 0 < self.beta < (10 if self.variant == "positive" else 1):
            raise InputError(
                f"beta is {self.beta!r}; expected a positive number below 10, or below 1 if the variant nudges by −β: "
                "E − βC has no minimum beyond"
            )
        if not _is_number(self.scale) or not 0 < self.scale < math.inf:
            raise InputError(
                f"scale is {self.scale!r}; expected a positive number, which is 1 for a loss summed over the batch and "
                "the batch size for a mean"
            )
        check_through_feedback(self.through_feedback)

    def within(self) -> EquilibriumPropagation:
        """Equilibrium propagation, since no target is known in an inner block."""
        return EquilibriumPropagation(through_feedback=self.through_feedback)

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Settle the nudged phases and contract.

        Raises:
            InputError: the error is not that of a cross-entropy.
            UnsupportedError: an output has learned parameters, or states are read from devices.
            ConvergenceError: a phase does not settle.
        """
        present = next((error for error in errors if error is not None), None)
        if present is None:
            return Gradients.none(at.frame.program)
        cost = COSTS[self.cost]
        size = present.new_full((), self.scale, dtype=torch.promote_types(present.dtype, torch.float32))
        drives = scaled(errors, -size)
        _check(at, drives, cost, self.scale)
        betas = [(sign * self.beta, share) for sign, share in SHARES[self.variant]]

        def phase_of(group: Sequence[complex]) -> CostNudgedPhase:
            strengths = [beta.real for beta in group]
            return CostNudgedPhase(at.frame, at.setting, at.preactivations, drives, strengths, at.states, cost)

        certified = replace(at, contraction=self._contraction(at, drives, cost), hint=lambda: self._hint(at))
        found, sweeps = settled_currents(certified, betas, None, phase_of)
        currents = scaled([weighted(parts, betas) for parts in zip(*found, strict=True)], -1 / size)
        middle = midpoint(at, found, betas)
        gradients = contract(at, currents, middle, errors, through_feedback=self.through_feedback)
        gradients.sweeps = sweeps
        return gradients

    def _hint(self, at: Situation) -> str:
        """Advice for a phase that does not settle."""
        if self.variant == "positive":
            return at.hint()
        return (
            f"{at.hint()}. A negative nudge subtracts the cost from the energy, which may leave it without a minimum: "
            f"give CostNudge a beta below {self.beta:g}, or variant='positive'"
        )

    def _contraction(self, at: Situation, drives: Sequence[Tensor | None], cost: Cost) -> float | None:
        """What a sweep is certified to contract by: under −β an output answers 1/(1 − β/c) times as strongly."""
        if at.contraction is None or not solved_at_once(at.setting.activations(at.frame), drives, cost):
            return None
        given = [scale for scale, drive in zip(at.scales, drives, strict=True) if drive is not None]
        softest = 1.0 if self.variant == "positive" else 1 - self.beta / min(given)
        return at.contraction / softest if at.contraction < softest else None


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _check(at: Situation, drives: Sequence[Tensor | None], cost: Cost, scale: float) -> None:
    """Refuse outputs for which the cost or its nudge is not defined."""
    if at.analog is not None:
        raise UnsupportedError(
            f"{at.name}: its states are read from devices, which are nudged by constant currents. Use "
            "EquilibriumPropagation"
        )
    for layer, drive, state in zip(at.frame.program.layers, drives, at.states, strict=True):
        if drive is None:
            continue
        if layer.parameters:
            raise UnsupportedError(
                f"{at.name}: the output {layer.name} has an activation with learned parameters, whose gradient this "
                "nudge does not tell. Use EquilibriumPropagation, or keep the activation digital"
            )
        if isinstance(cost, CrossEntropy):
            _check_targets(at, layer.name, cost, drive, state, scale)


def _check_targets(at: Situation, layer: str, cost: Cost, drive: Tensor, state: Tensor, scale: float) -> None:
    """Refuse an error that is not softmax(s) − y for some y with 0 ≤ y ≤ 1 and the sum 1. It waits for the device."""
    needs = (
        "The classes must be in dimension 1, scale is 1 for a sum over the batch and the batch size for a mean, and "
        "nothing may lie between the output and the loss"
    )
    if state.dim() < 2:
        raise InputError(f"{at.name}: the output {layer}, of shape {tuple(state.shape)}, has no classes. {needs}")
    tolerance = 100 * torch.finfo(drive.dtype).eps * max(1.0, scale)
    target = cost.prediction(state.detach()) + drive
    away = float(drive.sum(1).abs().amax()), float(-target.amin())
    if not max(away) <= tolerance:
        raise InputError(
            f"{at.name}: the error of the output {layer}, of shape {tuple(state.shape)}, is not that of a "
            f"cross-entropy over dimension 1 with scale {scale:g}: its targets would be as small as "
            f"{float(target.amin()):.3g} with sums as far as {away[0]:.2g} from 1, and not probabilities. {needs}"
        )
