"""Gradients of an equilibrium without a nudge: implicit differentiation, and autograd through the sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.estimators.base import (
    Estimator,
    Gradients,
    add_amplifier_terms,
    check_through_feedback,
    contract,
    of_unit_size,
    times,
)
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.base import narrow
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.phases.free_phase import FreePhase
from ffebm_compiler.runtime.program.frame import Frame, take_rows
from ffebm_compiler.runtime.solvers.base import GaussSeidel
from ffebm_compiler.runtime.solvers.conjugate import solve_adjoint
from ffebm_compiler.runtime.solvers.relaxation import Settled, concluded, relax

__all__ = ["ImplicitDifferentiation", "Unrolled"]


@dataclass(frozen=True)
class ImplicitDifferentiation(Estimator):
    """Implicit differentiation: H λ = −δ with H = ∂²E/∂s², then g_θ = ∂²E/∂θ∂s λ.

    `method="sweeps"` solves the adjoint system with the block's own solver in the form
    u_l = σ_l'(h_l) K_l. That contracts if the loop gain is below one, also for activations that are not monotone.
    `"cg"` uses conjugate gradients on the symmetric form. It needs fewer steps than plain sweeps
    if the loop gain is near one, and falls back to sweeps if H turns out to be indefinite, or if
    the dtype does not hold layers far from the output exactly enough in its coordinates. `"auto"`
    uses sweeps, accelerated if the block's solver is. They were faster than conjugate gradients on every
    block measured (`benchmarks/solvers.py`).

    If the feedback has weights of its own there is no H. The transposed linear response is then solved by sweeps, which
    gives the exact gradient of the equilibrium. Equilibrium propagation approaches that gradient only as far as the
    feedback weights are close to the forward ones.
    """

    method: Literal["auto", "sweeps", "cg"] = "auto"
    through_feedback: bool = False
    """Whether the gradient goes through γ too, which follows the weights where the loop gain is held."""
    name = "implicit"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.method not in ("auto", "sweeps", "cg"):
            raise InputError(f"method is {self.method!r}; expected 'auto', 'sweeps' or 'cg'")
        check_through_feedback(self.through_feedback)

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Solve the adjoint system and contract at the free state."""
        if not any(error is not None for error in errors):
            return Gradients.none(at.frame.program)
        errors, size = of_unit_size(errors)
        return times(self._solved(at, errors), size)

    def _solved(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        if self._conjugate(at):
            response = AdjointPhase(at.frame, at.setting, at.preactivations, [None] * len(errors))
            goal = (0.1 if at.contraction is not None else 0.01) * at.rtol
            solution, steps = solve_adjoint(response, errors, goal, at.solver.max_sweeps)
            if solution is not None:
                gradients = contract(
                    at, solution, at.states, errors, exact=True, through_feedback=self.through_feedback
                )
                gradients.sweeps = steps
                return gradients
        # Driven by +δ, the system gives e = −u directly.
        phase = AdjointPhase(at.frame, at.setting, at.preactivations, errors)
        settled = relax(phase, at.solver, at.rtol, f"adjoint system of {at.name}", at.hint, at.contraction)
        gradients = contract(at, phase.values, at.states, errors, exact=True, through_feedback=self.through_feedback)
        gradients.sweeps = settled.sweeps
        return gradients

    def _conjugate(self, at: Situation) -> bool:
        if self.method == "cg" and not at.frame.program.symmetric:
            raise InputError(
                f"the feedback of {at.name} has weights of its own, so that its adjoint system is not symmetric: use "
                "ImplicitDifferentiation(method='auto') or 'sweeps'"
            )
        if self.method == "cg" and not at.frame.program.monotone:
            raise InputError(
                f"{at.name} has an activation that is not monotone, so that its adjoint system is not positive "
                "definite: use ImplicitDifferentiation(method='auto') or 'sweeps'"
            )
        return self.method == "cg"


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Autograd through the relaxation. It is the reference for tests, never the default.

    The free phase is run again under autograd, with as many forward sweeps as it took. If it was solved by another
    method, sweeps run until they settle. States that begin at their equilibrium, such as those of weights of zero, take
    fewer sweeps than their derivatives. So more follow until the derivative by the states at the start, which is what
    is left out, is below ten times the tolerance of the free phase, and one for each in which an error has not reached
    every layer yet. Memory grows with the number of sweeps.
    """

    through_feedback: bool = False
    """Whether the gradient goes through γ too, which follows the weights where the loop gain is held."""
    name = "unrolled"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_through_feedback(self.through_feedback)

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
            frame.training, frame.autocast = at.frame.training, at.frame.autocast
            # Zeros that are added to the fields. The derivative by them is e_l, summed over the sweeps.
            offsets = [torch.zeros_like(s).requires_grad_() for s in at.states] if self.through_feedback else []

            def begun() -> tuple[FreePhase, list[Tensor]]:
                phase = _OffsetPhase(frame, at.setting, offsets) if offsets else FreePhase(frame, at.setting)
                phase.contraction = at.contraction
                return phase, _marked(phase)

            (phase, marks), sweeps = begun(), at.free_sweeps
            plain = GaussSeidel(max_sweeps=at.solver.max_sweeps, on_failure=at.solver.on_failure)
            subject = f"unrolled free phase of {at.name}"
            if not _repeats(phase, at):
                phase, marks = begun()
                sweeps = relax(phase, plain, at.free_rtol, subject, at.hint, at.contraction).sweeps
            leaves = [t for t, n in zip((*inputs, *weights), needed, strict=True) if n and t is not None]
            grads, sweeps = _differentiated(phase, [*leaves, *offsets], marks, errors, plain, sweeps, at)
        if not grads:
            return Gradients.none(at.frame.program)
        found = iter(grads)
        result = [
            next(found) if n and t is not None else None for t, n in zip((*inputs, *weights), needed, strict=True)
        ]
        gradients = Gradients(result[: len(inputs)], result[len(inputs) :], sweeps)
        if offsets and any(at.weights_needed):
            add_amplifier_terms(at, list(found), at.states, gradients.weights)
        return gradients


def _marked(phase: FreePhase) -> list[Tensor]:
    """Zeros that are added to the states at the start. The derivative by them is what later sweeps have left of it."""
    marks = []
    for index, value in enumerate(phase.values):
        if value is not None:
            marks.append(torch.zeros_like(value).requires_grad_())
            phase.store(index, value + marks[-1])
    return marks


def _differentiated(
    phase: FreePhase,
    leaves: Sequence[Tensor],
    marks: Sequence[Tensor],
    errors: Sequence[Tensor | None],
    plain: GaussSeidel,
    sweeps: int,
    at: Situation,
) -> tuple[list[Tensor | None], int]:
    """(derivatives by the leaves, number of sweeps), after as many more sweeps as the derivatives need.

    Raises:
        ConvergenceError: as `on_failure` says, if the derivatives need more sweeps than the solver allows.
    """
    memory, goal = plain.init(phase), 10 * at.free_rtol
    adjoint = AdjointPhase(at.frame, at.setting, at.preactivations, errors)
    missing = adjoint.delay(adjoint.order())  # the derivative of a forward sweep is a backward one
    while True:
        outputs = [(s, e) for s, e in zip(phase.values, errors, strict=True) if e is not None and s is not None]
        if not outputs or not leaves:
            return [], sweeps
        grads = torch.autograd.grad(
            [s for s, _ in outputs],
            [*leaves, *marks],
            [e for _, e in outputs],
            allow_unused=True,
            retain_graph=True,
        )
        left = [grad for grad in grads[len(leaves) :] if grad is not None]
        size = max((float(e.norm()) for _, e in outputs), default=0.0)
        share = max((float(grad.norm()) for grad in left), default=0.0) / size if size else 0.0
        if not share > goal and not missing:
            return list(grads[: len(leaves)]), sweeps
        if not share > goal:  # what the first layers to be reached have, the last ones have so many sweeps later
            for _ in range(missing):
                plain.step(phase, memory, measure=False)
            sweeps, missing = sweeps + missing, 0
            continue
        more = sweeps if share >= 1 else math.ceil(sweeps * (math.log(goal) / math.log(share) - 1))
        if sweeps >= plain.max_sweeps:
            why = f"did not settle in {sweeps} sweeps (the states at the start make up {share:.2g} of it)"
            settled = Settled(sweeps, share, False, why, unsettled=tuple(range(phase.samples or 1)))
            concluded(settled, phase, plain, goal, f"unrolled gradient of {at.name}", at.hint)
            return list(grads[: len(leaves)]), sweeps
        for _ in range(max(1, min(more, plain.max_sweeps - sweeps))):
            plain.step(phase, memory, measure=False)
            sweeps += 1


def _repeats(phase: FreePhase, at: Situation) -> bool:
    """Run as many sweeps as the free phase took. False if those were of another method, or gave up their ω."""
    if not isinstance(at.solver, GaussSeidel) or at.solver.start != "feedforward":
        return False
    memory = at.solver.init(phase)
    for _ in range(at.free_sweeps):
        at.solver.step(phase, memory, measure=False)
    with torch.no_grad():
        return all(
            value is not None and bool((value - state).norm() <= 10 * at.free_rtol * state.norm())
            for value, state in zip(phase.values, at.states, strict=True)
        )


class _OffsetPhase(FreePhase):
    """A free phase with an offset added to every field."""

    def __init__(
        self, frame: Frame, setting: Setting, offsets: Sequence[Tensor], start: Sequence[Tensor] | None = None
    ) -> None:
        self._offsets = tuple(offsets)
        super().__init__(frame, setting, start)

    def _drive(self, index: int) -> Tensor:
        return super()._drive(index) + self._offsets[index]

    def narrowed(self, rows: Tensor) -> _OffsetPhase:
        """The phase of some of the samples, at their present states."""
        start = [take_rows(value, rows) for value in self.values if value is not None]
        offsets = [take_rows(offset, rows) for offset in self._offsets]
        phase = _OffsetPhase(self.frame.narrowed(rows), self.setting, offsets, start)
        phase.preactivations = narrow(self.preactivations, rows)
        return phase
