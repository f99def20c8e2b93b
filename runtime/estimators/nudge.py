"""Functions of estimators that compare settled states: the size of the nudge, its phases, the states' midpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.estimators.situation import Situation
from ffebm_compiler.runtime.phases.error_phases import NudgedPhase
from ffebm_compiler.runtime.solvers.relaxation import relax

__all__ = ["SHARES", "amplitudes", "imaginary", "midpoint", "real", "scaled", "settled_currents", "weighted"]

SHARES = {"positive": ((1, 1.0),), "negative": ((-1, 1.0),), "centered": ((1, 0.5), (-1, 0.5))}
"""Variant -> the sign of each nudge, and the share of its phase in the gradient."""
_UNSEEN = 1 / 32
"""Share of the tolerance of error currents, up to which a relative change of the gradient is left out."""


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
    a sum over the batch. It is 0 if δ is zero or so small (such as below 1e-37 in float32) that the
    ratio or its inverse is out of range. The dtype could not hold the gradient of such an error.
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
    wide = torch.promote_types(pairs[0][1].dtype, torch.float32)
    held = (nudges > 0) & (ratio < 1 / torch.finfo(wide).tiny)
    return torch.where(held, ratio, torch.zeros_like(ratio)).to(wide)


def _square(value: Tensor, batched: bool) -> Tensor:
    """‖value‖², per sample or in total. It is in float64 if the device has it, since δ may be as small as 1e-20.

    On a CPU the sums are faster in the value's own dtype. On a GPU, to look whether that is enough would wait for it.
    """
    wide = value.dtype if value.device.type == "mps" else torch.float64
    dims = tuple(range(1, value.dim())) if batched else tuple(range(value.dim()))
    if not dims:
        return value.to(wide).square()
    if value.device.type == "cuda":
        return torch.linalg.vector_norm(value, dim=dims, dtype=wide).square()
    norm = torch.linalg.vector_norm(value, dim=dims)
    if value.dtype != wide and bool((norm < 1e-12).any()):  # the squares may have underflowed
        norm = torch.linalg.vector_norm(value, dim=dims, dtype=wide)
    return norm.to(wide).square()


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
