"""Conjugate gradients for the adjoint system of an energy block.

With D_l = σ_l'(h_l)/c_l ≥ 0 and B the symmetric coupling, B_{lk} = c_l J_{lk}, the adjoint system is
v = D (B v + δ) for e = c v (the error current −u). With v = D^½ w it is symmetric,

    (1 − D^½ B D^½) w = D^½ δ ,

It is positive definite if the equilibrium is a strict minimum, and its spectrum lies in 1 ± ρ.
(Hestenes & Stiefel 1952.)

Newton's step for x = f(x) is the same system, since (1 − D B) Δ = r has Δ = r + v with v = D (B v + B r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["LinearResponse", "newton_step", "solve_adjoint"]

_NEWTON_STEPS = 200
"""The largest number of conjugate-gradient steps within one step of Newton's method."""


_ROUNDINGS = 8
"""By so many roundings the residual of a layer may be off."""


class LinearResponse(Protocol):
    """The linear response of a block at a state, such as an `AdjointPhase` without a drive."""

    scales: tuple[float, ...]
    slopes: list[Tensor]
    """σ_l'(h_l)."""

    def store(self, index: int, value: Tensor | None) -> None:
        """Make `value` the present error current of a layer."""

    def force(self, index: int) -> Tensor | None:
        """(B u/c)_l at the present error currents."""


def solve_adjoint(
    phase: LinearResponse, errors: Sequence[Tensor | None], rtol: float, max_steps: int, by_layer: bool = True
) -> tuple[list[Tensor | None] | None, int]:
    """(e, steps) for the errors δ; None if the system is not positive definite or does not converge.

    Far from the output w is smaller by √γ for each layer, so that the norm over all layers says nothing of the first.

    Args:
        phase: the block's linear response at a state, without a drive. Its values are overwritten.
        errors: δ_l, with None for zero.
        rtol: largest norm of the residual, relative to the norm of the right-hand side.
        max_steps: the largest number of steps.
        by_layer: whether the residual of each layer has to be as small, relative to w_l. None is returned if rounding
            does not allow it.
    """
    outer = [torch.sqrt(slope * scale) for slope, scale in zip(phase.slopes, phase.scales, strict=True)]  # (c σ')^½
    inner = [root / scale for root, scale in zip(outer, phase.scales, strict=True)]  # (σ'/c)^½

    def matrix(w: list[Tensor]) -> list[Tensor]:
        for index, (root, part) in enumerate(zip(outer, w, strict=True)):
            phase.store(index, root * part)
        result = []
        for index, part in enumerate(w):
            force = phase.force(index)
            result.append(part if force is None else part - inner[index] * force)
        return result

    right = [
        torch.zeros_like(root) if error is None else root * error for root, error in zip(inner, errors, strict=True)
    ]
    w = [torch.zeros_like(part) for part in right]
    residual = [part.clone() for part in right]
    direction = [part.clone() for part in right]
    size = _dot(residual, residual)
    goal = rtol * rtol * size
    for step in range(1, max_steps + 1):
        if size <= goal and (not by_layer or _small(residual, w, rtol)):
            if by_layer and step > 1 and not _confirmed(right, w, matrix(w), rtol):
                return None, step - 1
            return [root * part for root, part in zip(outer, w, strict=True)], step - 1
        image = matrix(direction)
        curvature = _dot(direction, image)
        if not curvature > 0:
            return None, step
        length = size / curvature
        for part, way, back, pull in zip(w, direction, residual, image, strict=True):
            part.add_(way, alpha=length)
            back.sub_(pull, alpha=length)
        before, size = size, _dot(residual, residual)
        for way, back in zip(direction, residual, strict=True):
            way.mul_(size / before).add_(back)
    return None, max_steps


def newton_step(
    phase: LinearResponse, residuals: Sequence[Tensor], factors: Sequence[float], rtol: float
) -> list[Tensor] | None:
    """Δ with (1 − ∂f) Δ = r for a phase whose values times `factors` are error currents (1), or states (c).

    None if the system is not positive definite or conjugate gradients do not converge.
    """
    for index, (residual, factor) in enumerate(zip(residuals, factors, strict=True)):
        phase.store(index, residual if factor == 1 else residual * factor)
    forces = [phase.force(index) for index in range(len(residuals))]
    found, _ = solve_adjoint(phase, forces, rtol, _NEWTON_STEPS, by_layer=False)
    if found is None:
        return None
    return [
        residual if part is None else torch.add(residual, part, alpha=1 / factor)
        for residual, part, factor in zip(residuals, found, factors, strict=True)
    ]


def _small(residual: Sequence[Tensor], w: Sequence[Tensor], rtol: float) -> bool:
    """Whether the largest residual of every layer is at most `rtol` of its largest w, whose squares may underflow."""
    pairs = zip(residual, w, strict=True)
    return all(bool(part.abs().amax() <= rtol * own.abs().amax()) for part, own in pairs if own.numel())


def _confirmed(right: Sequence[Tensor], w: Sequence[Tensor], image: Sequence[Tensor], rtol: float) -> bool:
    """Whether the residual that w itself leaves is as small, as the one that the steps have carried along."""
    residual = [drive - part for drive, part in zip(right, image, strict=True)]
    return _small(residual, w, max(4 * rtol, _ROUNDINGS * torch.finfo(w[0].dtype).eps))


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Σ_l ⟨a_l, b_l⟩."""
    return float(sum(torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)))
