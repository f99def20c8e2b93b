"""Refuse states that nothing determines: units of a circuit that no source reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.errors import ConvergenceError
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["check_currents", "check_determined"]

_SWEEPS = 30
_STEADY = 5
"""Over so many of the last sweeps a potential that nothing sets stays as it is."""


def check_determined(frame: Frame, setting: Setting, preactivations: Sequence[Tensor], loop_gain: float) -> None:
    """Refuse an equilibrium if some potentials may move together without a change of the energy.

    A loop gain of 1 says that this is so where all diodes conduct. Whether they do at these states is told by the
    linear response without a drive: sweeps leave the potentials of such units as they are, and shrink all others.

    Args:
        frame: the block with its inputs and weights.
        setting: the settings of its amplifiers.
        preactivations: h_l of its states.
        loop_gain: its κ. Nothing is computed if it is below 1.

    Raises:
        ConvergenceError: the states are not determined; names the block and the layers.
    """
    floating = _floating(frame, setting, preactivations, loop_gain)
    if floating:
        raise _refusal(frame, floating, "So they have no equilibrium, or more than one")


def check_currents(frame: Frame, setting: Setting, preactivations: Sequence[Tensor], loop_gain: float) -> None:
    """Refuse settled states if a current flows into units whose potentials nothing sets.

    Their potentials grow without end, so slowly beside their size that sweeps seem to have settled. Without a current
    they stay where they are, as good an equilibrium as any other.

    Args and errors are those of `check_determined`.
    """
    floating = _floating(frame, setting, preactivations, loop_gain)
    if not floating:
        return
    still = Frame(frame.program, frame.inputs, frame.weights, dict(frame.drawn))
    rest = [torch.zeros_like(field) for field in preactivations]
    work = size = 0.0
    for index, moves in floating.items():
        currents = still.drive(index, rest) * (moves != 0)
        work += setting.scales[index] * float((moves * currents).sum())
        size += setting.scales[index] * float(moves.norm() * currents.norm())
    if abs(work) > _rounding(rest) * size:
        raise _refusal(frame, floating, "So their potentials grow without end")


def _rounding(values: Sequence[Tensor]) -> float:
    return 64 * torch.finfo(values[0].dtype).eps


def _floating(frame: Frame, setting: Setting, preactivations: Sequence[Tensor], loop_gain: float) -> dict[int, Tensor]:
    """Layer -> the same moves of the potentials that nothing sets, with 0 for all others; only layers that have any."""
    rounding = _rounding(preactivations)
    if not setting.energy.floating or loop_gain < 1 - rounding:
        return {}
    phase = AdjointPhase(frame, setting, preactivations, [None] * len(preactivations))
    generator = torch.Generator().manual_seed(0)
    for index, field in enumerate(preactivations):
        phase.store(index, torch.randn(field.shape, generator=generator).to(field))
    for sweep in range(_SWEEPS):
        if sweep == _SWEEPS - _STEADY:
            before = [None if value is None else value.clone() for value in phase.values]
        for index in phase.order():
            phase.store(index, phase.update(index))
    least = 1e-3 * max(0.0 if value is None else float(value.abs().amax()) for value in phase.values)
    found = {}
    for index, (old, new) in enumerate(zip(before, phase.values, strict=True)):
        if old is not None and new is not None:
            steady = (new.abs() > least) & ((new - old).abs() <= _STEADY * rounding * new.abs())
            if bool(steady.any()):
                found[index] = new * steady
    return found


def _refusal(frame: Frame, floating: dict[int, Tensor], so: str) -> ConvergenceError:
    names = [frame.program.layers[index].name for index in floating]
    return ConvergenceError(
        f"{frame.program.name}: nothing sets the potentials of units of {', '.join(names)}, since no path of "
        "conductances leads to them from an input, or only almost none, and a bias is a current. "
        f"{so}. Give the layers weights that are not zero"
    )
