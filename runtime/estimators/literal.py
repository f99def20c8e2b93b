"""Gradients from states that are read: nudged phases in literal states, through the noise and converters of devices.

The states s^β of each nudged phase are read (mean of `reads` reads, then the ADCs). The estimate is the contrast of
the energy with exact arithmetic at these states,

    g_θ = [∂_θE(s^{+β}) − ∂_θE(s^{−β})]/2β,    δ_x = Σ_l (∂d_l/∂x)ᵀ c_l (s_l^{−β} − s_l^{+β})/2β ,

where ∂_θE is at the weights that the devices hold, and goes straight through to the source's weights. δ_x is read from
the arrays backward, once for each phase, with noise of its own. Noise of the forward pass is not used again: each
phase, and δ_x, draws its own. What arrives at the inputs is read through ADCs, and scaled digitally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ffebm_compiler.runtime.estimators.base import Gradients, contract
from ffebm_compiler.runtime.estimators.nudge import scaled
from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.read_phase import ReadPhase
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["contrast_of_read_states", "read_nudged_states"]


def read_nudged_states(
    at: Situation, errors: Sequence[Tensor | None], amplitude: Tensor, beta: float, reads: int
) -> tuple[list[Tensor], int]:
    """(states s^β as they are read from the arrays, sweeps), for a nudge by β a δ, a the samples' amplitudes."""
    assert at.analog is not None
    nudges = scaled(errors, -amplitude)
    forces = [
        None if nudge is None else at.analog.converters.nudge(index, nudge) * (beta / scale)
        for index, (nudge, scale) in enumerate(zip(nudges, at.scales, strict=True))
    ]
    frame = _frame(at)
    frame.reads = None if at.analog.reads is None else at.analog.reads.of("nudged", reads)
    phase = ReadPhase(frame, at.setting, at.states, forces)
    return phase.run(at.analog.sweeps, at.solver, reads)


def _frame(at: Situation) -> Frame:
    """The block's frame, with caches of its own."""
    frame = Frame(at.frame.program, at.frame.inputs, at.frame.weights, at.frame.drawn, at.frame.shapes, frozen=True)
    frame.training = at.frame.training
    return frame


def contrast_of_read_states(
    at: Situation,
    errors: Sequence[Tensor | None],
    amplitude: Tensor,
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
    difference: float,
    reads: int,
    through_feedback: bool,
) -> Gradients:
    """The contrast of two read states whose nudges differ by `difference` in β."""
    assert at.analog is not None
    (first, second), reading = states, at.analog.errors
    restored = torch.where(amplitude > 0, -1 / amplitude, amplitude)
    moves: list[Tensor | None] = [
        (a - b) * (scale / difference) for a, b, scale in zip(first, second, at.scales, strict=True)
    ]
    middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    currents = scaled(moves, restored)
    if not any(at.inputs_needed):
        return contract(at, currents, middle, errors, through_feedback=through_feedback)
    inputs_needed = at.inputs_needed
    at = replace(at, inputs_needed=(False,) * len(inputs_needed))
    gradients = contract(at, currents, middle, errors, through_feedback=through_feedback)
    frame = _frame(at)
    frame.reads = reading.of("error", reads)
    for sign, own in ((1.0, first), (-1.0, second)):
        for index, (state, scale) in enumerate(zip(own, at.scales, strict=True)):
            for register, read in frame.pullback(index, state, inputs=True).items():
                if not inputs_needed[register]:
                    continue
                (value,) = scaled([read * (sign * scale / difference)], restored)
                assert value is not None
                present = gradients.inputs[register]
                gradients.inputs[register] = value if present is None else present + value
    return gradients
