"""Equilibrium propagation: the gradient from the difference of settled states under a nudge.

Sources: Scellier & Bengio 2017 (arXiv 1602.05179); the centered form of Laborieux et al. 2021 (arXiv
2006.03824); the holomorphic one of Laborieux & Zenke 2022 (arXiv 2209.00530).
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.plain_numbers import plain_fields
from ffebm_compiler.runtime.activations.piecewise import Identity
from ffebm_compiler.runtime.estimators.base import Estimator, Gradients, check_through_feedback, contract
from ffebm_compiler.runtime.estimators.literal import contrast_of_read_states, read_nudged_states
from ffebm_compiler.runtime.estimators.nudge import (
    amplitudes,
    imaginary,
    midpoint,
    real,
    scaled,
    settled_currents,
    weighted,
)
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.error_phases import NudgedPhase

__all__ = ["HARDWARE", "EquilibriumPropagation", "for_reads"]


LARGEST = 100
"""The largest β that is admitted."""
REACH = 2.0
"""κβ of a nudge whose strength a block chooses."""


@dataclass(frozen=True)
class EquilibriumPropagation(Estimator):
    """Equilibrium propagation: the difference of settled states under a nudge.

    The centered variant is g_θ = [∂_θE(s^{+β}) − ∂_θE(s^{−β})]/2β. The positive and the negative variant compare one
    of these two states with the free state. The holomorphic variant uses N points on a circle in ℂ,

        g_θ = 1/N Σ_j ∂_θE(s^{β_j})/β_j ,   β_j = β e^{2πij/N},   wrong by O(β^N)

    and needs holomorphic activations. β is relative: 1 nudges each sample by rms(s_out).

    With `beta=None` each block chooses β, for states that are read with noise. A nudge moves hidden states by κβ, and
    a linear output has no curvature of its own. So β = min(2/κ, 100) where the nudged outputs are linear and feedback
    is set by a certified loop gain κ, else 1. Noise falls as 1/β, and the centered error rises as (κβ)², so that the
    best β grows only as the cube root of the noise (`python benchmarks/devices.py nudge`).

    The default is one-sided with a tiny β. In deviation coordinates it is as accurate as the
    centered form at half the cost (`benchmarks/gradient_accuracy.py`), and no β is too small. At 1e-4 a state of one
    network of the tests crossed its kink between the two phases (`benchmarks/training_tolerance.py`), and at 1e-6 a
    circuit with a unit whose conductances sum to 4e-4 had a gradient wrong by 86 %, since such a unit moves far.
    A hardware-sized β (0.1) and `variant="centered"` are for realism. The centered error falls as β², the one-sided as
    β.
    """

    beta: float | None = 1e-8
    variant: Literal["positive", "negative", "centered", "holomorphic"] = "positive"
    points: int = 4
    """N of the holomorphic variant. With 2 it is the centered form."""
    together: bool | None = None
    """Whether several nudged phases settle at once, as one larger batch. None does so if that is faster."""
    through_feedback: bool = False
    """Whether the gradient goes through γ too, which follows the weights where the loop gain is held."""
    reads: int = 1
    """Reads of a nudged state whose mean is taken, where devices are read with noise (`docs/analog.md`), or where a
    fabric measures it."""
    name = "ep"
    pushes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        number = isinstance(self.beta, float | int) and not isinstance(self.beta, bool)
        if self.beta is not None and (not number or not 0 < self.beta <= LARGEST):
            raise InputError(
                f"beta is {self.beta!r}; expected a number in (0, {LARGEST}], relative to the block's output, or None, "
                "by which a block chooses it"
            )
        if self.variant not in ("positive", "negative", "centered", "holomorphic"):
            raise InputError(
                f"variant is {self.variant!r}; expected 'positive', 'negative', 'centered' or 'holomorphic'"
            )
        if not isinstance(self.points, int) or self.points < 2:
            raise InputError(f"points is {self.points!r}; expected an integer of at least 2")
        if self.together not in (None, True, False):
            raise InputError(f"together is {self.together!r}; expected True, False or None")
        check_through_feedback(self.through_feedback)
        if isinstance(self.reads, bool) or not isinstance(self.reads, int) or self.reads < 1:
            raise InputError(f"reads is {self.reads!r}; expected a number of reads of at least 1")

    @property
    def compares_states(self) -> bool:
        """It does, except in the holomorphic variant."""
        return self.variant != "holomorphic"

    def _strength(self, at: Situation, errors: Sequence[Tensor | None]) -> float:
        """β in this block."""
        if self.beta is not None:
            return float(self.beta)
        layers = zip(at.frame.program.layers, errors, strict=True)
        linear = all(error is None or isinstance(layer.activation, Identity) for layer, error in layers)
        known = linear and at.setting.energy.by_loop_gain and at.contraction
        return min(REACH / at.contraction, float(LARGEST)) if known and at.contraction else 1.0

    def _betas(self, beta: float) -> list[tuple[complex, float]]:
        """The nudging strengths and their shares. Real ones are floats. Of a conjugate pair only one is settled."""
        if self.variant == "positive":
            return [(beta, 1.0)]
        if self.variant == "negative":
            return [(-beta, 1.0)]
        if self.variant == "centered":
            return [(beta, 0.5), (-beta, 0.5)]
        betas: list[tuple[complex, float]] = []
        for index in range(self.points // 2 + 1):
            if index == 0 or 2 * index == self.points:
                betas.append((beta if index == 0 else -beta, 1 / self.points))
            else:
                betas.append((beta * cmath.exp(2j * math.pi * index / self.points), 2 / self.points))
        return betas

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Settle the nudged phases and contract.

        Raises:
            UnsupportedError: the variant is holomorphic and an activation is not.
            ConvergenceError: a nudged phase does not settle.
        """
        amplitude = amplitudes(at, errors)
        if amplitude is None:
            return Gradients.none(at.frame.program)
        betas = self._betas(self._strength(at, errors))
        if self.variant == "holomorphic":
            _check_holomorphic(at)
        if at.analog is not None:
            return self._of_read_states(at, errors, amplitude)
        drives = scaled(errors, -amplitude)
        found, sweeps = settled_currents(
            at,
            betas,
            self.together,
            lambda group: NudgedPhase(at.frame, at.setting, at.preactivations, drives, group),
            self.reads,
        )
        restored = torch.where(amplitude > 0, -1 / amplitude, amplitude)
        mean = [weighted(parts, betas) for parts in zip(*found, strict=True)]
        if not any(isinstance(beta, complex) for beta, _ in betas):
            middle = midpoint(at, found, betas)
            currents = scaled(mean, restored, over=True)  # nothing reads the mean any more
            gradients = contract(at, currents, middle, errors, through_feedback=self.through_feedback)
        else:
            currents = scaled(mean, restored)
            gradients = contract(at, currents, at.states, errors, through_feedback=self.through_feedback)
            for (beta, share), moved in zip(betas, found, strict=True):
                _second_order(at, gradients, moved, scaled(moved, restored), beta * share)
        gradients.sweeps = sweeps
        return gradients

    def _of_read_states(self, at: Situation, errors: Sequence[Tensor | None], amplitude: Tensor) -> Gradients:
        """The contrast of states that are read from devices, with their noise and converters (`literal.py`)."""
        assert at.analog is not None
        if self.variant == "holomorphic":
            raise UnsupportedError(
                f"{at.name}: devices hold real states, which cannot be nudged in the complex plane: use "
                "variant='centered'"
            )
        reads = at.analog.reads
        strength = self._strength(at, errors)
        betas = {"positive": (strength, 0.0), "negative": (0.0, -strength), "centered": (strength, -strength)}
        found: list[Sequence[Tensor]] = []
        sweeps = 0
        if reads is not None and not reads.of("nudged").seen:
            with at.analog.converters.observed():
                for beta in betas[self.variant]:
                    read_nudged_states(at, errors, amplitude, beta, 1)
        for beta in betas[self.variant]:
            states: Sequence[Tensor] = at.states
            if beta and reads is not None:
                states, count = read_nudged_states(at, errors, amplitude, beta, self.reads)
                sweeps += count
            elif beta:
                states, count = self._settled(at, errors, amplitude, beta)
                sweeps += count
            found.append(states)
        read = at.analog.converters.read(found)
        gradients = contrast_of_read_states(
            at,
            errors,
            amplitude,
            (read[0], read[1]),
            betas[self.variant][0] - betas[self.variant][1],
            self.reads,
            self.through_feedback,
        )
        gradients.sweeps = sweeps
        return gradients

    def _settled(
        self, at: Situation, errors: Sequence[Tensor | None], amplitude: Tensor, beta: float
    ) -> tuple[list[Tensor], int]:
        """(states s^β, sweeps) of a nudged phase that settles."""
        assert at.analog is not None
        nudge = at.analog.converters.nudge
        drives = [
            None if error is None else nudge(index, error) for index, error in enumerate(scaled(errors, -amplitude))
        ]
        (currents,), sweeps = settled_currents(
            at,
            [(beta, 1.0)],
            False,
            lambda group: NudgedPhase(at.frame, at.setting, at.preactivations, drives, group),
        )
        states = [
            state if current is None else torch.add(state, current, alpha=beta / scale)
            for state, current, scale in zip(at.states, currents, at.scales, strict=True)
        ]
        return states, sweeps


HARDWARE = EquilibriumPropagation(beta=None, variant="centered", reads=16)
"""The form in which states that are read with noise or through ADCs still tell a gradient."""


def for_reads(given: Estimator) -> Estimator:
    """The estimator of states that are read with noise or through ADCs: EP of the default β gets a large nudge."""
    default = EquilibriumPropagation()
    if not isinstance(given, EquilibriumPropagation) or (given.beta, given.reads) != (default.beta, default.reads):
        return given
    variant = HARDWARE.variant if given.variant == default.variant else given.variant
    return replace(given, beta=HARDWARE.beta, variant=variant, reads=HARDWARE.reads)


def _second_order(
    at: Situation,
    gradients: Gradients,
    moved: Sequence[Tensor | None],
    restored: Sequence[Tensor | None],
    strength: complex,
) -> None:
    """Add Re[strength ⟨e, ∂_θJ u⟩] with e = −u/a the restored and u the moved currents, for one point.

    The energy is quadratic in the states, so that this term is everything beyond first order in its difference. Half of
    it comes from the drives and half from the feedback, which may have weights of its own.
    """
    if not any(at.weights_needed):
        return
    views = [(at.frame, 1.0)] if at.frame.program.symmetric else [(at.frame, 0.5), (at.frame.back, 0.5)]
    turned = [None if part is None else part * strength for part in restored]
    pairs = [(1.0, [real(part) for part in turned], [real(part) for part in moved])]
    if isinstance(strength, complex):
        pairs.append((-1.0, [imaginary(part) for part in turned], [imaginary(part) for part in moved]))
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


def _check_holomorphic(at: Situation) -> None:
    for layer, activation in zip(at.frame.program.layers, at.setting.activations(at.frame), strict=True):
        if not activation.holomorphic:
            raise UnsupportedError(
                f"{at.name}: the activation {activation.name} of layer {layer.name} has no holomorphic "
                "extension, so that it cannot be nudged in the complex plane. Use variant='centered', or another "
                "activation"
            )
    if at.frame.samples is None:
        raise UnsupportedError(
            f"{at.name} does not keep samples apart in its leading dimension, so that real and imaginary parts cannot "
            "settle side by side: use variant='centered'"
        )
