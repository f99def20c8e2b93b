"""Equilibrium propagation: the gradient from the difference of settled states under a nudge.

Sources: Scellier & Bengio 2017 (arXiv 1602.05179); the centered form of Laborieux et al. 2021 (arXiv
2006.03824); the holomorphic one of Laborieux & Zenke 2022 (arXiv 2209.00530).
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.estimators.base import Estimator, Gradients, contract
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.error_phases import NudgedPhase
from ffebm_compiler.runtime.solvers.relaxation import relax

__all__ = ["EquilibriumPropagation"]


@dataclass(frozen=True)
class EquilibriumPropagation(Estimator):
    """Equilibrium propagation: the difference of settled states under a nudge.

    Centered, g_θ = [∂_θE(s^{+β}) − ∂_θE(s^{−β})]/2β; positive or negative, against the free state with one of
    the two; holomorphic, with N points on a circle in ℂ,

        g_θ = 1/N Σ_j ∂_θE(s^{β_j})/β_j ,   β_j = β e^{2πij/N},   wrong by O(β^N)

    for activations that are holomorphic. β is relative: 1 nudges each sample by rms(s_out).

    The default is one-sided with a tiny β: in deviation coordinates it is as accurate as the
    centered form at half the cost (`benchmarks/gradient_accuracy.py`). A hardware-sized β (0.1)
    and `variant="centered"` are for realism; the centered error falls as β², the one-sided as β.
    """

    beta: float = 1e-4
    variant: Literal["positive", "negative", "centered", "holomorphic"] = "positive"
    points: int = 4
    """N of the holomorphic variant; 2 is the centered form."""
    together: bool | None = None
    """Whether several nudged phases settle at once, as one larger batch; None: where that pays."""
    name = "ep"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.beta, float | int) or not 0 < self.beta <= 10:
            raise InputError(f"beta is {self.beta!r}; expected a number in (0, 10], relative to the block's output")
        if self.variant not in ("positive", "negative", "centered", "holomorphic"):
            raise InputError(
                f"variant is {self.variant!r}; expected 'positive', 'negative', 'centered' or 'holomorphic'"
            )
        if not isinstance(self.points, int) or self.points < 2:
            raise InputError(f"points is {self.points!r}; expected an integer of at least 2")
        if self.together not in (None, True, False):
            raise InputError(f"together is {self.together!r}; expected True, False or None")

    def _betas(self) -> list[tuple[complex, float]]:
        """The nudging strengths, real ones as floats, and their shares; of a conjugate pair only one is settled."""
        if self.variant == "positive":
            return [(self.beta, 1.0)]
        if self.variant == "negative":
            return [(-self.beta, 1.0)]
        if self.variant == "centered":
            return [(self.beta, 0.5), (-self.beta, 0.5)]
        betas: list[tuple[complex, float]] = []
        for index in range(self.points // 2 + 1):
            if index == 0 or 2 * index == self.points:
                betas.append((self.beta if index == 0 else -self.beta, 1 / self.points))
            else:
                betas.append((self.beta * cmath.exp(2j * math.pi * index / self.points), 2 / self.points))
        return betas

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Settle the nudged phases and contract.

        Raises:
            UnsupportedError: for the holomorphic variant at an activation that is not holomorphic.
            ConvergenceError: where a nudged phase does not settle.
        """
        amplitude = _amplitudes(at, errors)
        if amplitude is None:
            return Gradients([None] * at.frame.program.inputs, [None] * at.frame.program.weights)
        betas = self._betas()
        if self.variant == "holomorphic":
            _check_holomorphic(at)
        found, sweeps = self._settle(at, _scaled(errors, -amplitude), betas)
        restored = torch.where(amplitude > 0, -1 / amplitude, amplitude)
        mean = [_weighted(parts, betas) for parts in zip(*found, strict=True)]
        currents = _scaled(mean, restored)
        if not any(isinstance(beta, complex) for beta, _ in betas):
            gradients = contract(at, currents, self._middle(at, found), errors)
        else:
            gradients = contract(at, currents, at.states, errors)
            for (beta, share), moved in zip(betas, found, strict=True):
                _second_order(at, gradients, moved, _scaled(moved, restored), beta * share)
        gradients.sweeps = sweeps
        return gradients

    def _settle(
        self, at: Situation, drives: Sequence[Tensor | None], betas: Sequence[tuple[complex, float]]
    ) -> tuple[list[list[Tensor | None]], int]:
        """Error currents of every β, and the sweeps of all phases."""
        together = len(betas) > 1 and (self._pays(at) if self.together is None else self.together)
        groups = [[beta for beta, _ in betas]] if together and at.frame.samples else [[beta] for beta, _ in betas]
        found: list[list[Tensor | None]] = []
        sweeps = 0
        for group in groups:
            phase = NudgedPhase(at.frame, at.setting, at.preactivations, drives, group)
            subject = f"nudged phase (β = {', '.join(f'{beta:+.4g}' for beta in group)}) of {at.name}"
            sweeps += relax(phase, at.solver, at.rtol, subject, at.hint, at.contraction).sweeps * len(group)
            found += phase.currents()
        return found, sweeps

    def _pays(self, at: Situation) -> bool:
        """Whether one larger batch is faster: where an operation costs more to launch than to run.

        On a CPU blocks of up to 16 384 values a state were 5 % faster so, those of 200 000 and more 15 % slower.
        """
        return at.states[0].device.type != "cpu" or max(state.numel() for state in at.states) <= 1 << 14

    def _middle(self, at: Situation, found: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """The midpoint of the two states whose energies are compared: s + (β/2)(v⁺ − v⁻), or s ± (β/2) v."""
        sign = -1.0 if self.variant == "negative" else 1.0
        middle = []
        for state, scale, *currents in zip(at.states, at.scales, *found, strict=True):
            first = currents[0]
            if first is None:
                middle.append(state)
                continue
            spread = first if len(currents) == 1 else first - currents[1]
            middle.append(torch.add(state, spread, alpha=sign * self.beta / 2 / scale))
        return middle


def _amplitudes(at: Situation, errors: Sequence[Tensor | None]) -> Tensor | None:
    """rms(s_out)/rms(δ), per sample where samples are independent, else one number.

    The nudge is relative, so that the result depends neither on the scale of the loss nor on its
    being a mean or a sum over the batch. It is 0 where δ is zero or so small (below 1e-37 in float32, say) that the
    ratio or its inverse is out of range: such an error has no gradient that the dtype could hold.
    """
    pairs = [(state, error) for state, error in zip(at.states, errors, strict=True) if error is not None]
    if not pairs:
        return None
    batched = at.frame.program.batched
    states = sum(_square(state, batched) for state, _ in pairs)
    nudges = sum(_square(error, batched) for _, error in pairs)
    assert isinstance(states, Tensor)
    assert isinstance(nudges, Tensor)
    ratio = torch.where(states > 0, torch.sqrt(states / nudges), torch.rsqrt(nudges))
    wide = torch.promote_types(pairs[0][1].dtype, torch.float32)
    held = (nudges > 0) & (ratio < 1 / torch.finfo(wide).tiny)
    return torch.where(held, ratio, torch.zeros_like(ratio)).to(wide)


def _square(value: Tensor, batched: bool) -> Tensor:
    """‖value‖², per sample or in total, in float64 where there is one: δ may be as small as 1e-20."""
    wide = value.dtype if value.device.type == "mps" else torch.float64
    dims = tuple(range(1, value.dim())) if batched else tuple(range(value.dim()))
    if not dims:
        return value.to(wide).square()
    norm = torch.linalg.vector_norm(value, dim=dims)
    if value.dtype != wide and bool((norm < 1e-12).any()):  # the squares may have underflowed
        norm = torch.linalg.vector_norm(value, dim=dims, dtype=wide)
    return norm.to(wide).square()


def _scaled(errors: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """Errors times the factor of their sample, in the errors' own dtype."""
    result: list[Tensor | None] = []
    for error in errors:
        if error is None:
            result.append(None)
        else:
            scaled = error * factor.reshape(factor.shape + (1,) * (error.dim() - factor.dim()))
            result.append(scaled.to(error.dtype))
    return result


def _weighted(parts: Sequence[Tensor | None], betas: Sequence[tuple[complex, float]]) -> Tensor | None:
    """Σ_j share_j Re u_j."""
    total: Tensor | None = None
    for part, (_, share) in zip(parts, betas, strict=True):
        if part is None:
            return None
        real = _real(part)
        assert real is not None
        term = real if share == 1 else real * share
        total = term if total is None else total + term
    return total


def _second_order(
    at: Situation,
    gradients: Gradients,
    moved: Sequence[Tensor | None],
    restored: Sequence[Tensor | None],
    strength: complex,
) -> None:
    """Add Re[strength ⟨e, ∂_θJ u⟩] with e = −u/a the restored and u the moved currents, for one point.

    The energy is quadratic in the states, so that this is what its difference holds beyond first order. Half of it is
    that of the drives and half that of the feedback, which may have weights of its own.
    """
    if not any(at.weights_needed):
        return
    views = [(at.frame, 1.0)] if at.frame.program.symmetric else [(at.frame, 0.5), (at.frame.back, 0.5)]
    turned = [None if part is None else part * strength for part in restored]
    pairs = [(1.0, [_real(part) for part in turned], [_real(part) for part in moved])]
    if isinstance(strength, complex):
        pairs.append((-1.0, [_imaginary(part) for part in turned], [_imaginary(part) for part in moved]))
    for sign, cotangents, currents in pairs:
        middle = [
            torch.zeros_like(state) if part is None else part * (0.5 / scale)
            for part, state, scale in zip(currents, at.states, at.scales, strict=True)
        ]
        at.setting.energy.add_weight_terms(
            at.frame, at.setting, cotangents, middle, gradients.weights, at.weights_needed, sign
        )
        for index, (cotangent, scale) in enumerate(zip(cotangents, at.scales, strict=True)):
            ratio, deviations = at.frame.deviations(index, currents, at.scales)
            if cotangent is None or all(value is None for value in deviations):
                continue
            for frame, share in views:
                frame.pullback(
                    index,
                    cotangent,
                    registers=frame.tangent_registers(index, deviations, frame.program.operand_instructions[index]),
                    gradients=gradients.weights,
                    needed=at.weights_needed,
                    bias=False,
                    factor=share * sign * ratio / scale,
                )


def _real(part: Tensor | None) -> Tensor | None:
    return part.real if part is not None and part.is_complex() else part


def _imaginary(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.imag


def _check_holomorphic(at: Situation) -> None:
    for layer, activation in zip(at.frame.program.layers, at.setting.activations(at.frame), strict=True):
        if not activation.holomorphic:
            raise UnsupportedError(
                f"{at.name}: the activation {activation.name} of layer {layer.name} has no holomorphic "
                "extension, so that it cannot be nudged in the complex plane: use variant='centered', or another "
                "activation"
            )
    if at.frame.samples is None:
        raise UnsupportedError(
            f"{at.name} does not keep samples apart in its leading dimension, so that real and imaginary parts cannot "
            "settle side by side: use variant='centered'"
        )
