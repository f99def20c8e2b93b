"""Functions of estimators that compare settled states: the size of the nudge, its phases, the states' midpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.error_phases import NudgedPhase
from ffebm_compiler.runtime.solvers.relaxation import relax
from ffebm_compiler.runtime.widest import widest

__all__ = ["SHARES", "amplitudes", "imaginary", "midpoint", "real", "scaled", "settled_currents", "weighted"]

SHARES = {"positive": ((1, 1.0),), "negative": ((-1, 1.0),), "centered": ((1, 0.5), (-1, 0.5))}
"""Variant -> the sign of each nudge, and the share of its phase in the gradient."""
_UNSEEN = 1 / 32
"""Share of the tolerance of error currents, up to which a relative change of the gradient is left out."""
_SAFE = {torch.float64: 1e-150}
"""Dtype -> the least norm whose squares are surely in its range; 1e-12 for narrower ones."""


def settled_currents(
    at: Situation,
    betas: Sequence[tuple[complex, float]],
    together: bool | None,
    phase_of: Callable[[Sequence[complex]], NudgedPhase],
    reads: int = 1,
) -> tuple[list[list[Tensor | None]], int]:
    """Error currents of every β, and the sweeps of all phases. `together` settles them as one larger batch.

    Where equilibria are measured, each is the mean of so many `reads`.
    """
    joined = len(betas) > 1 and (_pays(at) if together is None else together)
    groups = [[beta for beta, _ in betas]] if joined and at.frame.samples else [[beta] for beta, _ in betas]
    found: list[list[Tensor | None]] = []
    sweeps = 0
    for group in groups:
        phase = phase_of(group)
        phase.rest, phase.reads = at.literal, reads
        subject = f"nudged phase (β = {', '.join(f'{beta:+.4g}' for beta in group)}) of {at.name}"
        sweeps += relax(phase, at.solver, at.rtol, subject, at.hint, at.contraction).sweeps * len(group)
        found += phase.currents()
    return found, sweeps


def _pays(at: Situation) -> bool:
    """Whether one larger batch is faster, because operations cost more to launch than to run.

    On a CPU, blocks of up to 16 384 values a state were 5 % faster, and those of 200 000 and more 15 % slower.
    """
    return at.states[0].device.type != "cpu" or max(state.numel() for state in at.states) <= 1 << 14


def midpoint(
    at: Situation, found: Sequence[Sequence[Tensor | None]], betas: Sequence[tuple[complex, float]]
) -> list[Tensor]:
    """The midpoint of the two states whose energies are compared: s + (β/2)(v⁺ − v⁻), or s ± (β/2) v.

    It is s where β/2 is a small share of the error that the currents may have, as that of the gradient then is.
    """
    strength = betas[0][0].real
    if len(betas) == 1 and abs(strength) / 2 <= _UNSEEN * at.rtol:
        return list(at.states)
    middle = []
    for state, scale, *currents in zip(at.states, at.scales, *found, strict=True):
        first = currents[0]
        if first is None:
            middle.append(state)
            continue
        spread = first if len(currents) == 1 else first - currents[1]
        middle.append(torch.add(state, spread, alpha=strength / 2 / scale))
    return middle


def amplitudes(at: Situation, errors: Sequence[Tensor | None]) -> Tensor | None:
    """rms(s_out)/rms(δ), per sample if samples are independent, else one number.

    The nudge is relative, so that the result does not depend on the scale of the loss, or on whether it is a mean or
    a sum over the batch. It is 0 if δ is zero. A ratio that is out of the range of its dtype, or whose inverse is, is
    the nearest one that is not: the gradient is divided by the same number.
    """
    pairs = [(state, error) for state, error in zip(at.states, errors, strict=True) if error is not None]
    if not pairs:
        return None
    batched = at.frame.program.batched
    states = _norm_of([state for state, _ in pairs], batched)
    nudges = _norm_of([error for _, error in pairs], batched)
    wide = torch.promote_types(pairs[0][1].dtype, torch.float32)
    least = torch.finfo(wide).tiny
    ratio = (torch.where(states > 0, states, torch.ones_like(states)) / nudges).clamp(least, 1 / least)
    return torch.where(nudges > 0, ratio, torch.zeros_like(ratio)).to(wide)


def _norm_of(values: Sequence[Tensor], batched: bool) -> Tensor:
    """The Euclidean norm of all values together, per sample or in total."""
    first, *others = [_norm(value, batched) for value in values]
    for other in others:
        first = torch.hypot(first, other)
    return first


def _norm(value: Tensor, batched: bool) -> Tensor:
    """‖value‖, per sample or in total. It is in float64 if the device has it, since δ may be as small as 1e-20.

    On a CPU the sums are faster in the value's own dtype. On a GPU, to look whether that is enough would wait for it.
    """
    wide = widest(value)
    dims = tuple(range(1, value.dim())) if batched else tuple(range(value.dim()))
    if not dims:
        return value.abs().to(wide)
    if value.device.type == "cuda":
        return _exact_norm(value, dims, wide)
    norm = torch.linalg.vector_norm(value, dim=dims)
    if norm.numel():
        least, most = (bound.item() for bound in torch.aminmax(norm))
        if not (_SAFE.get(value.dtype, 1e-12) <= least and most < math.inf):
            norm = _exact_norm(value, dims, wide)
    return norm.to(wide)


def _exact_norm(value: Tensor, dims: tuple[int, ...], wide: torch.dtype) -> Tensor:
    """‖value‖ along these dimensions, whose squares may leave the range of the value's dtype."""
    if value.dtype != wide:
        return torch.linalg.vector_norm(value, dim=dims, dtype=wide)
    peak = value.abs().amax(dims, keepdim=True) if value.numel() else value.new_zeros([])
    unit = torch.where((peak > 0) & torch.isfinite(peak), peak, torch.ones_like(peak))
    return torch.linalg.vector_norm(value / unit, dim=dims) * unit.reshape(-1 if len(dims) < value.dim() else ())


def scaled(errors: Sequence[Tensor | None], factor: Tensor, over: bool = False) -> list[Tensor | None]:
    """Errors times the factor of their sample, in the errors' own dtype. `over` writes them over the errors."""
    result: list[Tensor | None] = []
    for error in errors:
        if error is None:
            result.append(None)
        else:
            wide = factor.reshape(factor.shape + (1,) * (error.dim() - factor.dim()))
            result.append(error.mul_(wide) if over else (error * wide).to(error.dtype))
    return result


def weighted(parts: Sequence[Tensor | None], betas: Sequence[tuple[complex, float]]) -> Tensor | None:
    """Σ_j share_j Re u_j."""
    total: Tensor | None = None
    for part, (_, share) in zip(parts, betas, strict=True):
        if part is None:
            return None
        own = real(part)
        assert own is not None
        term = own if share == 1 else own * share
        total = term if total is None else total + term
    return total


def real(part: Tensor | None) -> Tensor | None:
    """Re u."""
    return part.real if part is not None and part.is_complex() else part


def imaginary(part: Tensor | None) -> Tensor | None:
    """Im u; None if u is real."""
    return None if part is None else part.imag
