"""Refuse states that nothing determines: units of a circuit that no source reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.errors import ConvergenceError
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["check_determined"]

_SWEEPS = 30


def check_determined(frame: Frame, setting: Setting, preactivations: Sequence[Tensor], loop_gain: float) -> None:
    """Refuse an equilibrium if some potentials may move together without a change of the energy.

    A loop gain of 1 says that this is so where all diodes conduct. Whether they do at these states is told by the
    linear response without a drive: sweeps leave such a direction as it is, and shrink every other one.

    Args:
        frame: the block with its inputs and weights.
        setting: the settings of its amplifiers.
        preactivations: h_l of its states.
        loop_gain: its κ. Nothing is computed if it is below 1.

    Raises:
        ConvergenceError: the states are not determined; names the block and the layers.
    """
    rounding = 64 * torch.finfo(preactivations[0].dtype).eps
    if not setting.energy.floating or loop_gain < 1 - rounding:
        return
    phase = AdjointPhase(frame, setting, preactivations, [None] * len(preactivations))
    generator = torch.Generator().manual_seed(0)
    for index, field in enumerate(preactivations):
        phase.store(index, torch.randn(field.shape, generator=generator).to(field))
    before = sizes = [0.0]
    for _ in range(_SWEEPS):
        for index in phase.order():
            phase.store(index, phase.update(index))
        before, sizes = sizes, [0.0 if value is None else float(value.norm()) for value in phase.values]
    if not any(sizes) or sum(sizes) < (1 - rounding) * sum(before):
        return
    moving = [layer.name for layer, size in zip(frame.program.layers, sizes, strict=True) if size > 1e-3 * max(sizes)]
    raise ConvergenceError(
        f"{frame.program.name}: nothing sets the potentials of units of {', '.join(moving)}, since no path of "
        "conductances leads to them from an input or a bias, or only almost none. So the equilibrium is not unique. "
        "Give the layers a bias, or weights that are not zero"
    )
