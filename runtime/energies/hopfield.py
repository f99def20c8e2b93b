"""The Hopfield energy of a block.

    E(s; θ, x) = Σ_l c_l [ G_l(s_l) − ⟨s_l, d_l(s_1..s_{l−1}, x; θ)⟩ ],

G_l is the potential of the layer's activation (∂G_l = σ_l⁻¹), so that σ_l is the activation itself. If an activation is
not monotone, G_l is written in the pre-activation, as h σ(h) − Λ(h). An equilibrium is then a stationary point of E,
but no minimum. A loop gain below one certifies a unique equilibrium (`runtime/energies/loop_gain.py`).

If the feedback has weights of its own, no energy has the fields as its derivative, and `value` raises an error. States,
certificate and local gradients are then those of the vector field (Scellier et al. 2018, arXiv 1808.04873).

Sources: Hopfield 1984; Scellier & Bengio 2017 (arXiv 1602.05179); Nest & Ernoult 2024.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.base import Change, Energy, Evaluated, Gauge, Setting, Uncertified
from ffebm_compiler.runtime.energies.edge_norms import MARGIN, edge_gain, edge_norms, edge_norms_of_each
from ffebm_compiler.runtime.energies.followed_norm import Launched
from ffebm_compiler.runtime.energies.loop_gain import certificate_at, certify, error_shares
from ffebm_compiler.runtime.energies.projection import projection
from ffebm_compiler.runtime.energies.through_gain import add_gain_terms
from ffebm_compiler.runtime.energies.tracked_norms import TrackedNorms
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["Hopfield"]

_log = logging.getLogger(__name__)

_SLACK = 0.01
"""Relative distance from κ at which γ is set again."""


@dataclass(frozen=True)
class Hopfield(Energy):
    """Σ_l c_l [G_l(s_l) − ⟨s_l, d_l⟩]; `feedback` is the loop gain κ = ρ(A)² in (0, 1), or "symmetric" (γ = 1)."""

    name = "hopfield"
    by_loop_gain = True
    bounds_masks = True  # each edge's norm is that of the largest factor of its masks
    coherent = False
    amplified = False
    default_feedback = 0.1

    def check_feedback(self, feedback: object) -> float | str:
        """A loop gain in (0, 1), or `"symmetric"`."""
        if feedback == "symmetric":
            return "symmetric"
        if isinstance(feedback, bool) or not isinstance(feedback, Real) or not 0 < float(feedback) < 1:
            raise InputError(
                f"feedback is {feedback!r}; expected a loop gain strictly between 0 and 1, below which every block is "
                "certain to settle (0.1 is the default), or 'symmetric'"
            )
        return float(feedback)

    def check_program(self, program: BlockProgram) -> None:
        """Nothing is refused: a program has this energy, or is a vector field if its feedback has its own weights."""

    def activations(self, frame: Frame, setting: Setting) -> tuple[Activation, ...]:
        """The layers' own activations."""
        return frame.activations

    def value(
        self,
        frame: Frame,
        setting: Setting,
        states: Sequence[Tensor],
        preactivations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Σ_l c_l [G_l(s_l) − ⟨s_l, d_l⟩]."""
        if not frame.program.symmetric:
            raise UnsupportedError(
                f"{frame.program.name} has no energy, since its feedback goes through weights of its own, by "
                "feedback_weights or by devices with mismatch. Use residual() to see whether states are settled, or "
                "feedback_weights='tied' and mismatch=0"
            )
        total: Tensor | None = None
        for index, activation in enumerate(frame.activations):
            state = states[index]
            if preactivations is not None and not activation.monotone:
                potential = activation.energy_of_preactivation(preactivations[index]).sum()
            else:
                potential = activation.potential(state).sum()
            term = setting.scales[index] * (potential - (state * frame.drive(index, states)).sum())
            total = term if total is None else total + term
        assert total is not None
        return total

    def add_weight_terms(
        self,
        frame: Frame,
        setting: Setting,
        currents: Sequence[Tensor | None],
        middle: Sequence[Tensor],
        gradients: list[Tensor | None],
        needed: Sequence[bool],
        factor: float = 1.0,
    ) -> None:
        """Nothing to add, since only the drives hold weights."""

    def add_amplifier_terms(
        self,
        frame: Frame,
        setting: Setting,
        feedback: float | str,
        measured: Frame,
        currents: Sequence[Tensor | None],
        middle: Sequence[Tensor],
        gradients: list[Tensor | None],
        needed: Sequence[bool],
    ) -> None:
        """Add the gradient through γ if κ is held. At symmetric feedback γ is always 1."""
        if not isinstance(feedback, str):
            add_gain_terms(frame, setting.scales, measured, currents, middle, gradients, needed)

    def gauge(self, program: BlockProgram) -> Gauge:
        """A gauge that measures the operator norms of the edges."""
        return _EdgeNorms(program)

    def contraction(self, program: BlockProgram, certificate: Certificate, feedback: float | str) -> float | None:
        """About κ (Young 1954) if it is held below one; None at symmetric feedback."""
        if isinstance(feedback, str) or not certificate.certified:
            return None
        if program.selects:  # the certificate holds for one choice of winners only
            return None
        return certificate.contraction

    def error_shares(self, program: BlockProgram, certificate: Certificate) -> np.ndarray | None:
        """From the norms of the edges, as the loop gain itself."""
        return error_shares(program, certificate)

    def projection(self, program: BlockProgram, certificate: Certificate, limit: float) -> dict[int, float]:
        """Factors that cap the norms of the edges if the loop gain exceeds the limit."""
        return projection(program, certificate, limit) if certificate.loop_gain > limit else {}

    def describe(self, feedback: float | str, symmetric: bool = True) -> str:
        """A phrase with κ, or with γ = 1."""
        held = "symmetric feedback, γ = 1" if isinstance(feedback, str) else f"loop gain κ = {feedback:.3g}"
        if not symmetric:
            held = "γ = 1" if isinstance(feedback, str) else held
            return f"vector field without energy, feedback through weights of its own, {held}"
        return f"Hopfield energy, {held}"

    def remedy(self, feedback: float | str, loop_gain: float) -> str:
        """Advises another feedback, smaller weights or more sweeps."""
        if isinstance(feedback, str):
            return (
                f"its loop gain at symmetric feedback is {loop_gain:.3g} (below 1 is certain to settle): use "
                "feedback=0.1, smaller weights (hybrid.project()) or fewer layers per block"
            )
        return (
            f"its loop gain was set to {feedback:.3g} and certified as {loop_gain:.3g}: lower `feedback`, call "
            "hybrid.recertify() if the weights have changed since (evaluation leaves the feedback as it is), or allow "
            "more sweeps: solver=GaussSeidel(max_sweeps=...)"
        )


class _EdgeNorms(Gauge):
    """Measures ‖J_{ml}‖₂ of every edge. The norms and γ give κ. There are no other amplifiers."""

    def __init__(self, program: BlockProgram) -> None:
        self.program = program
        self.tracked = TrackedNorms()

    def certify(self, frame: Frame, states: Sequence[Tensor], feedback: float | str) -> Certificate:
        """Norms from Lanczos iteration, and the γ that holds κ."""
        found = edge_norms(frame, states)
        return certify(self.program, found.norms, feedback, found.coherent)

    @classmethod
    def certify_each(cls, blocks: Sequence[Uncertified]) -> list[Certificate]:
        """Norms from Lanczos iterations that blocks of one kind take together."""
        measured = edge_norms_of_each([(block.frame, block.states) for block in blocks])
        return [
            certify(b.frame.program, found.norms, b.feedback, found.coherent)
            for b, found in zip(blocks, measured, strict=True)
        ]

    def at(self, frame: Frame, states: Sequence[Tensor], present: Certificate) -> Certificate:
        """Norms from Lanczos iteration, at the present γ."""
        found = edge_norms(frame, states)
        return certificate_at(self.program, found.norms, present.scales, found.coherent)

    def needed(self, evaluated: Evaluated, present: Certificate, feedback: float | str) -> Certificate | None:
        """None if the loop gain is still κ, and at symmetric feedback."""
        if isinstance(feedback, str):
            return None
        found = self.at(*evaluated(), present)
        if abs(found.loop_gain / feedback - 1) <= _SLACK:
            return None
        return certify(self.program, found.norms, feedback, found.coherent)

    def follow(self, change: Change) -> Certificate:
        """Norms followed from step to step. γ is set again if the loop gain has left κ."""
        feedback, frame = change.feedback, change.frame
        measured = self.tracked.measure(frame) if change.read is None else self.tracked.finish(*change.read)
        norms = [(k, m, norm * edge_gain(frame, k, m) * MARGIN) for k, m, norm in measured]
        if change.converge:  # both methods approach the norm from below, so that the larger value is better
            lanczos = edge_norms(*change.evaluated()).norms
            norms = [(k, m, max(a, b)) for (k, m, a), (_, _, b) in zip(norms, lanczos, strict=True)]
        coherent = self.tracked.coherent if change.converge else change.present.coherent
        found = certificate_at(self.program, norms, change.present.scales, coherent)
        if not isinstance(feedback, str) and abs(found.loop_gain - feedback) > (change.slack or _SLACK) * feedback:
            found = certify(self.program, norms, feedback, self.tracked.coherent)
            _log.debug("%s: γ set anew for a loop gain of %.3g", self.program.name, feedback)
        return found

    def launch(self, frame: Frame) -> Launched | None:
        """The pass over all edges; None if one of them was never measured."""
        launched = self.tracked.launch(frame)
        return launched if launched.repeatable else None

    def own(self) -> None:
        """Copy the vectors of every edge."""
        self.tracked.own_tracks()

    def relaunch(self, launched: Launched) -> bool:
        """Start the next pass from the present vectors."""
        return launched.repeat_from(self.tracked.tracks)

    def with_feedback(self, found: Certificate, feedback: float | str) -> Certificate | None:
        """The measurement stays valid, since the norms do not depend on γ."""
        return certify(self.program, found.norms, feedback, found.coherent)

    def with_setting(self, found: Certificate, present: Certificate) -> Certificate | None:
        """The measurement stays valid, since the norms do not depend on γ."""
        return certificate_at(self.program, found.norms, present.scales, found.coherent)

    def state(self) -> dict[str, dict[str, Any]]:
        """The vectors of every edge."""
        return self.tracked.state()

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the vectors of every edge."""
        self.tracked.restore(state)
