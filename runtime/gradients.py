"""Gradient estimators: from the error δ at a block's outputs to gradients of weights and inputs.

Let L be the loss, δ = ∂L/∂s at the settled states. Each estimator finds error currents u (and a
midpoint m of the states) and hands them to one contraction,

    g_θ   = Σ_l ∂_θ[ ⟨e_l, d_l(m, x)⟩ + ⟨m_l, Σ_k (c_l/c_k) J_{lk} e_k⟩ ],
    δ_x   = Σ_l (∂d_l/∂x)ᵀ e_l ,        e = −u,

which for equilibrium propagation is exactly [∂E(s⁺) − ∂E(s⁻)]/(difference of β), expanded so
that nothing cancels: u = c v̄ with v̄ the mean deviation and m the midpoint of the two states.

Sources: Scellier & Bengio 2017 (arXiv 1602.05179), Laborieux et al. 2021 (arXiv 2006.03824),
Nest & Ernoult 2024 (arXiv 2409.03306), Bai et al. 2019 (arXiv 1909.01377) for the implicit form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.conjugate import solve_adjoint
from ffebm_compiler.runtime.phases import AdjointPhase, FreePhase, NudgedPhase
from ffebm_compiler.runtime.program import Frame
from ffebm_compiler.runtime.situation import Situation
from ffebm_compiler.runtime.solvers import Settled, relax

__all__ = [
    "EquilibriumPropagation",
    "Estimator",
    "Gradients",
    "ImplicitDifferentiation",
    "Situation",
    "Unrolled",
    "estimator_of",
]


@dataclass
class Gradients:
    """Gradients of the loss by a block's inputs and weights; None where not needed or zero."""

    inputs: list[Tensor | None]
    weights: list[Tensor | None]
    sweeps: int = 0


class Estimator(ABC):
    """How the gradient of the loss is obtained at a block."""

    name: str

    @abstractmethod
    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Gradients from δ_l = ∂L/∂s_l, one per layer, None where the loss does not see it."""


def _amplitudes(at: Situation, errors: Sequence[Tensor | None]) -> Tensor | None:
    """rms(s_out)/rms(δ), per sample where samples are independent, else one number.

    The nudge is relative, so that the result depends neither on the scale of the loss nor on its
    being a mean or a sum over the batch.
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
    return torch.where(nudges > 0, ratio, torch.zeros_like(ratio)).to(pairs[0][1].dtype)


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
    """Errors times the factor of their sample."""
    return [
        None if error is None else error * factor.reshape(factor.shape + (1,) * (error.dim() - factor.dim()))
        for error in errors
    ]


def _contract(at: Situation, currents: Sequence[Tensor | None], middle: Sequence[Tensor]) -> Gradients:
    """The contraction of the module's docstring; `currents` are e = −u."""
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
            frame.pullback(
                index,
                middle[index],
                registers=frame.tangent_registers(index, deviations, program.operand_instructions[index]),
                gradients=weights,
                needed=at.weights_needed,
                bias=False,
                factor=ratio,
            )
    return Gradients(
        [g if n else None for g, n in zip(inputs, at.inputs_needed, strict=True)],
        [g if n else None for g, n in zip(weights, at.weights_needed, strict=True)],
    )


@dataclass(frozen=True)
class EquilibriumPropagation(Estimator):
    """Equilibrium propagation: the difference of settled states under a nudge.

    g_θ = [∂_θE(s^{+β}) − ∂_θE(s^{−β})]/2β (centered), or against the free state (positive,
    negative). β is relative: 1 nudges each sample by rms(s_out).

    The default is one-sided with a tiny β: in deviation coordinates it is as accurate as the
    centered form at half the cost (`benchmarks/gradient_accuracy.py`). A hardware-sized β (0.1)
    and `variant="centered"` are for realism; the centered error falls as β², the others' as β.
    """

    beta: float = 1e-4
    variant: Literal["positive", "negative", "centered"] = "positive"
    name = "ep"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.beta, float | int) or not 0 < self.beta <= 10:
            raise InputError(f"beta is {self.beta!r}; expected a number in (0, 10], relative to the block's output")
        if self.variant not in ("positive", "negative", "centered"):
            raise InputError(f"variant is {self.variant!r}; expected 'positive', 'negative' or 'centered'")

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Settle the nudged phases and contract."""
        amplitude = _amplitudes(at, errors)
        if amplitude is None:
            return Gradients([None] * at.frame.program.inputs, [None] * at.frame.program.weights)
        drives = _scaled(errors, -amplitude)
        signs = {"positive": (1.0,), "negative": (-1.0,), "centered": (1.0, -1.0)}[self.variant]
        phases = []
        sweeps = 0
        for sign in signs:
            phase = NudgedPhase(at.frame, at.scales, at.preactivations, drives, sign * self.beta)
            settled = _settle(phase, at, f"nudged phase (β = {sign * self.beta:+g}) of {at.name}")
            sweeps += settled.sweeps
            phases.append(phase.values)
        if len(phases) == 1:
            mean, spread, half = phases[0], phases[0], signs[0] * self.beta / 2
        else:
            pairs = list(zip(*phases, strict=True))
            mean = [None if p is None or n is None else (p + n) / 2 for p, n in pairs]
            spread = [None if p is None or n is None else p - n for p, n in pairs]
            half = self.beta / 2
        middle = [
            state if offset is None else torch.add(state, offset, alpha=half / scale)
            for state, offset, scale in zip(at.states, spread, at.scales, strict=True)
        ]
        restored = torch.where(amplitude > 0, -1 / amplitude, amplitude)
        gradients = _contract(at, _scaled(mean, restored), middle)
        gradients.sweeps = sweeps
        return gradients


@dataclass(frozen=True)
class ImplicitDifferentiation(Estimator):
    """Implicit differentiation: H λ = −δ with H = ∂²E/∂s², then g_θ = ∂²E/∂θ∂s λ.

    `method="sweeps"` solves the adjoint system by the block's own solver in the form
    u_l = σ_l'(h_l) K_l, which contracts wherever the loop gain is below one, monotone activations
    or not. `"cg"` uses conjugate gradients on the symmetric form, which needs fewer steps where the
    loop gain is near one, and falls back to sweeps where H turns out to be indefinite. `"auto"`
    takes sweeps below a certified loop gain of 0.5 and for non-monotone activations, else `"cg"`.
    """

    method: Literal["auto", "sweeps", "cg"] = "auto"
    name = "implicit"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.method not in ("auto", "sweeps", "cg"):
            raise InputError(f"method is {self.method!r}; expected 'auto', 'sweeps' or 'cg'")

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Solve the adjoint system and contract at the free state."""
        if not any(error is not None for error in errors):
            return Gradients([None] * at.frame.program.inputs, [None] * at.frame.program.weights)
        if self._conjugate(at):
            solution, steps = solve_adjoint(at, errors, _rtol(at))
            if solution is not None:
                gradients = _contract(at, solution, at.states)
                gradients.sweeps = steps
                return gradients
        # Driven by +δ the system gives e = −u at once.
        phase = AdjointPhase(at.frame, at.scales, at.preactivations, errors)
        settled = _settle(phase, at, f"adjoint system of {at.name}")
        gradients = _contract(at, phase.values, at.states)
        gradients.sweeps = settled.sweeps
        return gradients

    def _conjugate(self, at: Situation) -> bool:
        monotone = all(layer.activation.monotone for layer in at.frame.program.layers)
        if self.method == "cg" and not monotone:
            raise InputError(
                f"{at.name} has an activation that is not monotone, so that its adjoint system is not positive "
                "definite: use ImplicitDifferentiation(method='auto') or 'sweeps'"
            )
        if self.method == "auto":
            return monotone and (at.contraction is None or at.contraction > 0.5)
        return self.method == "cg"


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Autograd through the relaxation: the reference for tests, never the default.

    The free phase is run again under autograd, with as many forward sweeps as it took; memory
    grows with their number.
    """

    name = "unrolled"

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Differentiate the sweeps."""
        needed = (*at.inputs_needed, *at.weights_needed)
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(n) for t, n in zip(at.frame.inputs, at.inputs_needed, strict=True)]
            weights = [
                None if t is None else t.detach().requires_grad_(n)
                for t, n in zip(at.frame.weights, at.weights_needed, strict=True)
            ]
            frame = Frame(at.frame.program, inputs, weights, dict(at.frame.drawn))
            phase = FreePhase(frame, at.scales)
            for _ in range(at.free_sweeps):
                for index in range(len(phase.values)):
                    phase.store(index, phase.update(index))
        outputs = [(s, e) for s, e in zip(phase.values, errors, strict=True) if e is not None and s is not None]
        leaves = [t for t, n in zip((*inputs, *weights), needed, strict=True) if n and t is not None]
        if not outputs or not leaves:
            return Gradients([None] * len(inputs), [None] * len(weights))
        found = iter(torch.autograd.grad([s for s, _ in outputs], leaves, [e for _, e in outputs], allow_unused=True))
        result = [
            next(found) if n and t is not None else None for t, n in zip((*inputs, *weights), needed, strict=True)
        ]
        return Gradients(result[: len(inputs)], result[len(inputs) :], at.free_sweeps)


def estimator_of(gradient: object) -> Estimator:
    """The estimator that a name or an estimator object stands for.

    Raises:
        InputError: for any other name or object.
    """
    if isinstance(gradient, Estimator):
        return gradient
    names = {"ep": EquilibriumPropagation, "implicit": ImplicitDifferentiation, "unrolled": Unrolled}
    if not isinstance(gradient, str) or gradient not in names:
        raise InputError(
            f"gradient is {gradient!r}; expected 'ep', 'implicit', 'unrolled' or an estimator object such as "
            "EquilibriumPropagation(beta=0.01, variant='centered')"
        )
    return names[gradient]()


def _settle(phase: NudgedPhase | AdjointPhase, at: Situation, subject: str) -> Settled:
    return relax(phase, at.solver, _rtol(at), subject, at.hint, at.contraction)


def _rtol(at: Situation) -> float:
    """Deviations need fewer digits than states: their error enters the gradient relatively, not over β."""
    return at.rtol if at.solver.rtol is not None or at.contraction is None else min(10 * at.rtol, 1e-2)
