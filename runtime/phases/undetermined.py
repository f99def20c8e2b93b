"""Refuse states that nothing determines: units of a circuit that no source reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.errors import ConvergenceError
from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.energies.loads import magnitudes_of
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.widest import widest

__all__ = ["check_currents", "check_determined"]

_FROM = 0.99
"""The loop gain from which units are looked for that nothing sets. With some it is 1, but is measured from below."""
_SWEEPS = (30, 300)
"""After so many sweeps units are looked at: all of them, and those that seemed to float."""
_FIRST_SWEEPS = (1, 4)
"""After so many sweeps all units may have fallen by `_FAR`, so that none floats. Most often they have after one."""
_FAR = 0.01
_CORRECTIONS = 3
"""So often conjugate gradients take away what sweeps shrink slowly. Each leaves `_LEFT` of it."""
_LEFT = 1e-5
_LEAST = 1e-6
"""A move that is smaller beside the largest one has been shrunk."""


def check_determined(
    frame: Frame, setting: Setting, preactivations: Sequence[Tensor], loop_gain: float, pushed: bool = False
) -> None:
    """Refuse an equilibrium if some potentials may move together without a change of the energy.

    A loop gain of 1 says that this is so where all diodes conduct. Whether they do at these states is told by the
    linear response without a drive: sweeps leave equal potentials of such units as they are, and shrink all others.

    Args:
        frame: the block with its inputs and weights.
        setting: the settings of its amplifiers.
        preactivations: h_l of its states.
        loop_gain: its κ, measured without random masks. Nothing is computed if it is well below 1 and none is drawn.
        pushed: whether currents are to nudge the states. They may turn on a diode that is at its kink, so that it
            counts as conducting. It does not where the gradient is the derivative alone.

    Raises:
        ConvergenceError: the states are not determined; names the block and the layers.
    """
    floating = _floating(frame, setting, preactivations, loop_gain, pushed)
    if floating:
        raise _refusal(frame, floating, "So they have no equilibrium, or more than one")


def check_currents(frame: Frame, setting: Setting, preactivations: Sequence[Tensor], loop_gain: float) -> None:
    """Refuse settled states if a current flows into units whose potentials nothing sets.

    Their potentials grow without end, so slowly beside their size that sweeps seem to have settled. Without a current
    they stay where they are, as good an equilibrium as any other.

    The arguments and errors are those of `check_determined`.
    """
    floating = _floating(frame, setting, preactivations, loop_gain, False)
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


def _floating(
    frame: Frame, setting: Setting, preactivations: Sequence[Tensor], loop_gain: float, kinks_conduct: bool
) -> dict[int, Tensor]:
    """Layer -> the same moves of the potentials that nothing sets, with 0 for all others; only layers that have any."""
    if not setting.energy.floating or (loop_gain < _FROM and not frame.masked):
        return {}
    slopes = [
        _slope(sigma, field, kinks_conduct)
        for sigma, field in zip(setting.activations(frame), preactivations, strict=True)
    ]
    floating = _without_a_source(frame, setting, preactivations, slopes)
    if not any(bool(units.any()) for units in floating):
        return {}
    moves = _moves(frame, setting, preactivations, floating)
    return {index: move.to(preactivations[index]) for index, move in enumerate(moves) if bool(move.any())}


def _moves(
    frame: Frame, setting: Setting, preactivations: Sequence[Tensor], floating: Sequence[Tensor]
) -> list[Tensor]:
    """How the units move that no source reaches: those that are connected by as much, up to their signs.

    A path of conductances from a unit's line to the one of the other sign holds it and all of them at 0. What is left
    of random moves if every unit becomes the mean of its neighbours tells the signs. Weak links make that slow, so that
    conjugate gradients find it, in float64.
    """
    fields = [field.to(widest(field)) for field in preactivations]
    even = [units.to(field) * scale for field, units, scale in zip(fields, floating, setting.scales, strict=True)]
    if setting.energy.nonnegative:  # there are no signs
        return even
    wide = _widened(frame)
    plain = _response(magnitudes_of(wide, every_sample=True), setting, fields, even, even)
    slopes = []
    for index, value in enumerate(even):
        force = plain.force(index)
        slopes.append(value if force is None else (value / force).masked_fill(value == 0, 0.0))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(field.shape, generator=generator, device="cpu").to(field) for field in fields]
    phase = _response(wide, setting, fields, [a * b for a, b in zip(drawn, even, strict=True)], slopes)
    for _ in range(_CORRECTIONS):
        _sweep(phase, _SWEEPS[0])
        phase.corrected(_LEFT)  # to where sweeps would end, however slowly
    _sweep(phase, _SWEEPS[0])
    # What moves together is equal but for what is left. When that is rounded away, a sweep leaves it as it is.
    moves = [
        torch.zeros_like(own) if value is None else (value / scale).bfloat16().to(own) * scale
        for value, own, scale in zip(phase.values, even, setting.scales, strict=True)
    ]
    largest = max(float(move.abs().amax()) for move in moves if move.numel())
    return _still(phase, [move * (move.abs() > _LEAST * largest) for move in moves], _rounding(preactivations))


def _still(phase: AdjointPhase, moves: Sequence[Tensor], rounding: float) -> list[Tensor]:
    """The moves of the units that stay as they are, and whose neighbours do, and so on."""
    moves, count = list(moves), -1
    while (left := sum(int(move.count_nonzero()) for move in moves)) != count:
        count = left
        for index, move in enumerate(moves):
            phase.store(index, move)
        new = [phase.update(index) for index in range(len(moves))]
        moves = [
            move if value is None else move * ((value - move).abs() <= rounding * move.abs())
            for value, move in zip(new, moves, strict=True)
        ]
    return moves


def _widened(frame: Frame) -> Frame:
    """The block in float64, without its inputs."""
    weights = [None if weight is None else weight.detach().to(widest(weight)) for weight in frame.weights]
    drawn = {
        register: value if value is None or not value.is_floating_point() else value.to(widest(value))
        for register, value in frame.drawn.items()
    }
    return Frame(frame.program, (), weights, drawn, dict(frame.shapes), frozen=True)


def _slope(sigma: Activation, field: Tensor, kinks_conduct: bool) -> Tensor:
    """σ'(h), or the larger of those on both sides of h."""
    if not kinks_conduct:
        return sigma.derivative(field)
    limits = torch.finfo(field.dtype)
    near = limits.eps * field.abs() + limits.tiny / limits.eps
    return torch.maximum(sigma.derivative(field + near), sigma.derivative(field - near))


def _without_a_source(
    frame: Frame, setting: Setting, preactivations: Sequence[Tensor], slopes: Sequence[Tensor]
) -> list[Tensor]:
    """The units that no path of conductances connects with an input, as a mask for each layer.

    All potentials begin at 1. Units that are connected with each other alone keep it, and those of all others fall.
    Signs are left out: lines of both signs are connected by the same conductances.
    """
    rounding = _rounding(preactivations)
    plain = magnitudes_of(frame, every_sample=True)
    even = [torch.full_like(field, scale) for field, scale in zip(preactivations, setting.scales, strict=True)]
    phase = _response(plain, setting, preactivations, even, slopes)
    done = 0
    floating: list[Tensor] = []
    for sweeps in (*_FIRST_SWEEPS, *_SWEEPS):
        _sweep(phase, sweeps - done)
        done = sweeps
        fallen = _FAR if sweeps in _FIRST_SWEEPS else sweeps * rounding
        floating = [
            torch.zeros_like(field, dtype=torch.bool) if value is None else value >= scale * (1 - fallen)
            for field, value, scale in zip(preactivations, phase.values, setting.scales, strict=True)
        ]
        if not any(bool(units.any()) for units in floating):
            break
    return floating


def _response(
    frame: Frame,
    setting: Setting,
    preactivations: Sequence[Tensor],
    values: Sequence[Tensor],
    slopes: Sequence[Tensor],
) -> AdjointPhase:
    """The linear response without a drive, at these values."""
    phase = AdjointPhase(frame, setting, preactivations, [None] * len(preactivations), slopes)
    for index, value in enumerate(values):
        phase.store(index, value)
    return phase


def _sweep(phase: AdjointPhase, sweeps: int) -> None:
    for _ in range(sweeps):
        phase.sweep()


def _refusal(frame: Frame, floating: dict[int, Tensor], so: str) -> ConvergenceError:
    names = [frame.program.layers[index].name for index in floating]
    mend = "Give the layers weights that are not zero"
    if frame.masked:
        mend += ", or wider layers or a smaller dropout probability, since the masks of this call cut conductances"
    return ConvergenceError(
        f"{frame.program.name}: nothing sets the potentials of units of {', '.join(names)}, since no path of "
        "conductances leads to them from an input, or only almost none, and a bias is a current. "
        f"{so}. {mend}"
    )
