"""Conjugate gradients for the adjoint system of an energy block.

With D_l = σ_l'(h_l)/c_l ≥ 0 and B the symmetric coupling, B_{lk} = c_l J_{lk}, the adjoint system is
v = D (B v + δ) for e = c v (the error current −u). With v = D^½ w it is symmetric,

    (1 − D^½ B D^½) w = D^½ δ ,

and positive definite where the equilibrium is a strict minimum; its spectrum lies in 1 ± ρ.
(Hestenes & Stiefel 1952.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.phases import AdjointPhase
from ffebm_compiler.runtime.situation import Situation

__all__ = ["solve_adjoint"]


def solve_adjoint(
    at: Situation, errors: Sequence[Tensor | None], rtol: float
) -> tuple[list[Tensor | None] | None, int]:
    """(e, steps) for the errors δ; None where the system is not positive definite or does not converge."""
    nothing: list[Tensor | None] = [None] * len(errors)
    phase = AdjointPhase(at.frame, at.scales, at.preactivations, nothing)
    outer = [torch.sqrt(slope * scale) for slope, scale in zip(phase.slopes, at.scales, strict=True)]  # (c σ')^½
    inner = [root / scale for root, scale in zip(outer, at.scales, strict=True)]  # (σ'/c)^½

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
    for step in range(1, at.solver.max_sweeps + 1):
        if size <= goal:
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
    return None, at.solver.max_sweeps


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Σ_l ⟨a_l, b_l⟩."""
    return float(sum(torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)))
