"""Gradient estimators: from the error δ at a block's outputs to gradients of weights and inputs.

Let L be the loss, δ = ∂L/∂s at the settled states. Each estimator finds error currents u (and a
midpoint m of the states) and hands them to one contraction,

    g_θ   = Σ_l ∂_θ[ ⟨e_l, d_l(m, x)⟩ + ⟨m_l, Σ_k (c_l/c_k) J_{lk} e_k⟩ ],
    δ_x   = Σ_l (∂d_l/∂x)ᵀ e_l ,        e = −u,

For equilibrium propagation this is exactly [∂E(s⁺) − ∂E(s⁻)]/(difference of β), expanded so
that nothing cancels. Then u = c v̄ with the mean deviation v̄, and m is the midpoint of the two states. An energy whose
potentials hold weights adds further terms.

Sources: Scellier & Bengio 2017 (arXiv 1602.05179), Laborieux et al. 2021 (arXiv 2006.03824),
Nest & Ernoult 2024 (arXiv 2409.03306), Bai et al. 2019 (arXiv 1909.01377) for the implicit form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.program.block_program import BlockProgram

__all__ = [
    "Estimator",
    "Gradients",
    "add_amplifier_terms",
    "aligned",
    "check_through_feedback",
    "contract",
    "of_unit_size",
    "times",
]


@dataclass
class Gradients:
    """Gradients of the loss by a block's inputs and weights; None if not needed or zero."""

    inputs: list[Tensor | None]
    weights: list[Tensor | None]
    sweeps: int = 0

    @classmethod
    def none(cls, program: BlockProgram) -> Gradients:
        """Those of a block that no error reaches."""
        return cls([None] * program.inputs, [None] * program.weights)


class Estimator(ABC):
    """A method to obtain the gradient of the loss at a block."""

    name: str
    title: ClassVar[str] = ""
    """What messages call a method that is defined only in some blocks."""
    through_feedback: bool = False
    """Whether the gradient goes through what the amplifiers are set to, which follows the weights."""
    output_blocks_only: ClassVar[bool] = False
    """Whether the method is defined only in blocks whose outputs reach the loss through no other block."""
    pushes: ClassVar[bool] = False
    """Whether it nudges states by currents of a finite size, which stay the same however far the states go."""

    @property
    def compares_states(self) -> bool:
        """Whether it needs nothing but equilibria, which a fabric can measure (`Measured`)."""
        return False

    def within(self) -> Estimator:
        """The estimator for blocks whose outputs reach the loss through another block."""
        return self

    @abstractmethod
    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Gradients from δ_l = ∂L/∂s_l, one per layer; None for a layer that the loss does not depend on."""


def contract(
    at: Situation,
    currents: Sequence[Tensor | None],
    middle: Sequence[Tensor],
    errors: Sequence[Tensor | None],
    exact: bool = False,
    forces: Sequence[Tensor | None] | None = None,
    through_feedback: bool = False,
) -> Gradients:
    """The contraction in the module's docstring. `currents` are e = −u, `errors` are δ.

    If the feedback has weights B of its own, J_{lk} in the second term has those weights. The derivative of that term
    is then the local gradient γ e_l s_mᵀ of B. The derivative of the first term, e_l s_kᵀ, is the gradient of the
    forward weights. `exact` says that the currents come from the adjoint phase. Then both are the exact gradient.

    A parameter a of an activation has the gradient Σ −K_l ∂σ_l/∂a. Here K_l is the force that causes e,
    −K_l = δ_l + Σ_{m>l} J_{ml}ᵀ e_m + Σ_{k<l} (c_l/c_k) J_{lk} e_k. For equilibrium propagation it is the limit
    β → 0 of the contrast of ∂E_l/∂a = −c_l ∂Λ_l/∂a. An estimator whose currents are no fixed point passes `forces`,
    the −K_l that cause its currents. `through_feedback` adds the gradient through the amplifiers' settings.
    """
    frame, program = at.frame, at.frame.program
    weights: list[Tensor | None] = [None] * program.weights
    inputs: list[Tensor | None] = [None] * program.inputs
    wants_weights = any(at.weights_needed)
    for index in range(len(program.layers)):
        current = currents[index]
        registers = frame.operand_registers(index, middle) if wants_weights else None
        if current is not None:
            parts = frame.pullback(
                index,
                current,
                inputs=any(at.inputs_needed),
                registers=registers,
                gradients=weights if wants_weights else None,
                needed=at.weights_needed,
            )
            for register, part in parts.items():
                present = inputs[register]
                inputs[register] = part if present is None else present + part
        ratio, deviations = frame.deviations(index, currents, at.scales)
        if wants_weights and any(value is not None for value in deviations):
            with frame.lightly():
                back = frame.back
                back.pullback(
                    index,
                    middle[index],
                    registers=back.tangent_registers(index, deviations, back.program.operand_instructions[index]),
                    gradients=weights,
                    needed=at.weights_needed,
                    bias=False,
                    factor=ratio,
                )
    if wants_weights:
        at.setting.energy.add_weight_terms(frame, at.setting, currents, middle, weights, at.weights_needed)
    if wants_weights and any(layer.parameters for layer in program.layers):
        _parameters(at, currents, errors, weights, exact, forces)
    if wants_weights and through_feedback:
        add_amplifier_terms(at, currents, middle, weights)
    return Gradients(
        [g if n else None for g, n in zip(inputs, at.inputs_needed, strict=True)],
        [g if n else None for g, n in zip(weights, at.weights_needed, strict=True)],
    )


def aligned(program: BlockProgram, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Give forward and feedback weights the same update, the sum of their gradients (Kolen & Pollack 1994)."""
    result = list(gradients)
    for places in program.feedback_weights:
        parts = [gradients[place] for place in places]
        present = [part for part in parts if part is not None]
        total = present[0] if len(present) == 1 else present[0] + present[1] if present else None
        for place in places:
            if needed[place]:
                result[place] = total
    return result


def add_amplifier_terms(
    at: Situation, currents: Sequence[Tensor | None], middle: Sequence[Tensor], weights: list[Tensor | None]
) -> None:
    """Add the gradient of the loss through the amplifiers, which follow the weights."""
    measured = at.measured()
    if measured is not None:
        at.setting.energy.add_amplifier_terms(
            at.frame, at.setting, at.feedback, measured, currents, middle, weights, at.weights_needed
        )


def _parameters(
    at: Situation,
    currents: Sequence[Tensor | None],
    errors: Sequence[Tensor | None],
    weights: list[Tensor | None],
    exact: bool,
    forces: Sequence[Tensor | None] | None,
) -> None:
    """Add the gradients of the activations' parameters."""
    phase = AdjointPhase(at.frame, at.setting, at.preactivations, errors, transposed=exact)
    activations = at.setting.activations(at.frame)
    for index, current in enumerate(currents):
        phase.store(index, current)
    for index, layer in enumerate(at.frame.program.layers):
        if not layer.parameters:
            continue
        force = phase.force(index) if forces is None else forces[index]
        if force is None:
            continue
        found = activations[index].parameter_gradients(at.preactivations[index], force)
        for place, gradient in zip(layer.parameters, found, strict=True):
            present = weights[place]
            weights[place] = gradient if present is None else present + gradient


def check_through_feedback(value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        InputError: `value` is neither.
    """
    if not isinstance(value, bool):
        raise InputError(f"through_feedback is {value!r}; expected True or False")


def of_unit_size(errors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Tensor]:
    """(errors / f, f) with f the power of two at their largest entry, so that norms stay in the range of the dtype.

    The system is linear, so that the result can be multiplied by f afterwards. f is no smaller than the smallest normal
    number of its dtype, which is float32 for errors in half precision.
    """
    present = [error for error in errors if error is not None]
    largest = torch.stack([error.detach().abs().amax() if error.numel() else error.new_zeros(()) for error in present])
    wide = torch.promote_types(largest.dtype, torch.float32)
    peak = largest.amax().to(wide)
    size = torch.ldexp(torch.ones_like(peak), torch.frexp(peak)[1] - 1).clamp_min(torch.finfo(wide).tiny)
    factor = torch.where(torch.isfinite(peak), 1 / size, torch.full_like(size, math.nan))
    return [None if error is None else (error.to(wide) * factor).to(error.dtype) for error in errors], size


def times(gradients: Gradients, size: Tensor) -> Gradients:
    """The gradients of errors `size` times as large."""
    for found in (gradients.inputs, gradients.weights):
        found[:] = [None if part is None else part * size for part in found]
    return gradients
