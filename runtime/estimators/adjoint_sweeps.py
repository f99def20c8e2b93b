"""Backpropagation through sweeps at a settled state: through a few of them, or until the result settles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain_fields
from ffebm_compiler.runtime.estimators.base import (
    Estimator,
    Gradients,
    check_through_feedback,
    contract,
    of_unit_size,
    times,
)
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.solvers.base import GaussSeidel
from ffebm_compiler.runtime.solvers.relaxation import relax

__all__ = ["RecurrentBackprop", "TruncatedBackprop"]


@dataclass(frozen=True)
class TruncatedBackprop(Estimator):
    """Truncated backpropagation through time: autograd through the last K sweeps, at the settled state.

    K forward sweeps that start at the equilibrium s* stay there, and their derivative with the start held constant is

        e_l ← σ_l'(h_l) [ δ_l + Σ_{m>l} J_{ml}ᵀ e_m + Σ_{k<l} (c_l/c_k) J_{lk} e_k ] ,   l = L..1,

    K times from e = 0, with e_l the derivative of the loss by h_l, summed over the sweeps. This iteration is computed
    directly, so that the memory does not grow with K. K = 1 is backpropagation along the forward edges at the
    equilibrium, without feedback. The error falls as κ^K, and K → ∞ is implicit differentiation. Any solver may settle
    the free phase.

    Raises:
        InputError: `sweeps` is no positive integer.

    Sources: Williams & Peng 1990; Ernoult et al. 2019 (arXiv 1905.13633) for its relation to equilibrium propagation.
    """

    sweeps: int = 3
    """K, the number of sweeps to differentiate."""
    through_feedback: bool = False
    """Whether the gradient goes through γ too, which follows the weights where the loop gain is held."""
    name = "truncated"

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise InputError(f"sweeps is {self.sweeps!r}; expected the number of sweeps to differentiate, at least 1")
        check_through_feedback(self.through_feedback)

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """K backward sweeps of the linearised block, and the contraction at the settled state."""
        if not any(error is not None for error in errors):
            return Gradients.none(at.frame.program)
        errors, size = of_unit_size(errors)
        phase = AdjointPhase(at.frame, at.setting, at.preactivations, errors)
        forces: list[Tensor | None] = [None] * len(errors)
        for _ in range(self.sweeps):
            for index in phase.order():
                force = forces[index] = phase.force(index)
                if force is not None:
                    phase.store(index, phase.responded(index, force))
        gradients = contract(at, phase.values, at.states, errors, True, forces, self.through_feedback)
        gradients.sweeps = self.sweeps
        return times(gradients, size)


@dataclass(frozen=True)
class RecurrentBackprop(Estimator):
    """Recurrent backpropagation: the adjoint fixed point, by sweeps of the linearised block until they settle.

        e_l ← σ_l'(h_l) [ δ_l + Σ_{m>l} J_{ml}ᵀ e_m + Σ_{k<l} (c_l/c_k) J_{lk} e_k ] ,   l = L..1,

    until e rests. The result is that of implicit differentiation. But it always uses plain sweeps, even if the free
    phase has another solver. So it settles at the rate of an error circuit with the block's own couplings.

    Raises:
        ConvergenceError: from `backward`, if the sweeps do not settle; names the block.

    Sources: Almeida 1987; Pineda 1987.
    """

    through_feedback: bool = False
    """Whether the gradient goes through γ too, which follows the weights where the loop gain is held."""
    name = "recurrent"

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        check_through_feedback(self.through_feedback)

    def gradients(self, at: Situation, errors: Sequence[Tensor | None]) -> Gradients:
        """Sweep to the adjoint fixed point, and contract at the settled state."""
        if not any(error is not None for error in errors):
            return Gradients.none(at.frame.program)
        errors, size = of_unit_size(errors)
        phase = AdjointPhase(at.frame, at.setting, at.preactivations, errors)
        kept = at.solver
        plain = GaussSeidel(max_sweeps=kept.max_sweeps, on_failure=kept.on_failure, termination=kept.termination)
        settled = relax(phase, plain, at.rtol, f"adjoint sweeps of {at.name}", at.hint, at.contraction)
        gradients = contract(at, phase.values, at.states, errors, exact=True, through_feedback=self.through_feedback)
        gradients.sweeps = settled.sweeps
        return times(gradients, size)
