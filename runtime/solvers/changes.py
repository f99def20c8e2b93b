"""How far a sweep has moved the layers, and what that bounds.

The changes of some layers alone bound the errors of all (`FixedPoint.shares`). Where they do, only they are measured,
and norms of states once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = [
    "FAR_ABOVE",
    "bounding_layers",
    "change_of",
    "decided_change",
    "deciding_layers",
    "largest_change",
    "no_change",
    "norm_of",
    "plain",
]

FAR_ABOVE = 8
"""Up to so many times the largest relative change that is measured, a bound by it is taken for all layers."""
_HARDLY = 0.02
"""A relative error up to which the norm of a state is taken for that of later sweeps, less twice that error."""


def plain(value: Any) -> Any:
    """A value without its gradient history."""
    return value.detach() if value is not None and value.requires_grad else value


def norm_of(value: Tensor, per_sample: bool) -> Tensor:
    """‖x‖, of each sample or of all together."""
    return torch.linalg.vector_norm(value, dim=tuple(range(1, value.dim())) if per_sample else None)


def change_of(problem: FixedPoint, old: Tensor | None, new: Tensor, per_sample: bool) -> Tensor:
    """‖new − old‖. A value that was not reached before has changed as a whole."""
    if old is None:
        return norm_of(new, per_sample)
    return norm_of(problem.subtracted(old, new), per_sample)


def no_change(problem: FixedPoint, per_sample: bool) -> Tensor:
    """The change of a sweep in which nothing is left to change: 0, for every sample if `per_sample`."""
    return torch.zeros((problem.samples or 1) if per_sample else (), device="cpu")


def bounding_layers(shares: Sequence[Sequence[float]]) -> list[int]:
    """The layers whose changes are in a bound of any error, by W row by row."""
    return [index for index, column in enumerate(zip(*shares, strict=True)) if any(column)]


def deciding_layers(problem: FixedPoint, order: Sequence[int], per_sample: bool) -> list[int] | None:
    """The layers whose changes bound the errors of all, by `shares`; None if no such bound holds, or if all are needed.

    The others are measured only if the bound says too little (`decided_change`).
    """
    shares = problem.shares
    if shares is None or per_sample or not problem.decided or list(order) != problem.order():
        return None
    if any(value is None or value.device.type != "cpu" for value in problem.values):
        return None
    if problem.relaxation != 1 and not (problem.training or problem.provisional):
        return None
    if problem.deciding is None:
        problem.deciding = bounding_layers(shares.tolist())
    return problem.deciding if 0 < len(problem.deciding) < len(shares) else None


def decided_change(problem: FixedPoint, moved: dict[int, Tensor], norms: dict[int, Tensor]) -> float:
    """What the largest relative change of a layer amounts to, by the layers whose changes bound all errors.

    A layer that is almost zero has a large relative bound, but may not change at all. So if a bound is far above the
    changes that were measured, the next sweeps measure all.
    """
    assert problem.shares is not None
    assert problem.contraction is not None
    changes = {index: change.item() for index, change in moved.items()}
    sizes = {index: norm.item() + torch.finfo(norm.dtype).tiny for index, norm in norms.items()}
    if not all(map(math.isfinite, (*changes.values(), *sizes.values()))):
        return math.nan if any(map(math.isnan, (*changes.values(), *sizes.values()))) else math.inf
    sizes = {**problem.sizes, **sizes}
    bound = max(
        sum(row[k] * change for k, change in changes.items()) / sizes[index]
        for index, row in enumerate(problem.shares.tolist())
    )
    problem.decided = bound <= FAR_ABOVE * max(change / sizes[k] for k, change in changes.items())
    left = bound * problem.contraction / (1 - problem.contraction)
    if not problem.sizes and left <= _HARDLY:  # no later state is farther away than twice the error that is left
        problem.sizes = {index: size * (1 - 2 * left) for index, size in sizes.items()}
    return bound


def largest_change(problem: FixedPoint, ordered: bool, changes: list[Tensor], sizes: list[Tensor]) -> Tensor:
    """The largest relative change of a layer, or what it amounts to by the bounds of the layers (`shares`)."""
    too_far = 0.0
    rate = problem.expected
    if problem.relaxation != 1 and rate and not (problem.training or problem.provisional):
        too_far = (problem.relaxation - 1) * (1 - rate) / rate
    shares = problem.shares
    if shares is not None and not (ordered and len(changes) == len(shares)):
        shares = None
    if changes[0].dim() == 0 and changes[0].device.type == "cpu":  # numbers are faster than operations on scalars
        tiny = torch.finfo(changes[0].dtype).tiny
        moves, norms = [change.item() for change in changes], [size.item() + tiny for size in sizes]
        value = _largest_number(moves, norms, None if shares is None else shares.tolist(), too_far)
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    moved = torch.stack(changes)
    size = torch.stack(sizes) + torch.finfo(moved.dtype).tiny
    largest = (1 + too_far) * (moved / size).amax(0)
    if shares is None or (moved.device.type != "cpu" and problem.training):  # a captured graph can't read the host
        return largest
    shares = shares.to(moved)
    shared = (shares.reshape(*shares.shape, *[1] * (moved.dim() - 1)) * moved).sum(1)
    # A layer that is almost zero has a large relative bound, but may not change at all.
    return torch.minimum(largest, ((shared + too_far * moved) / size).amax(0))


def _largest_number(
    moved: Sequence[float], size: Sequence[float], shares: Sequence[Sequence[float]] | None, too_far: float
) -> float:
    """`largest_change` of numbers that the host has. It is NaN if one of them is."""
    if not all(map(math.isfinite, (*moved, *size))):
        return math.nan if any(map(math.isnan, (*moved, *size))) else math.inf
    largest = (1 + too_far) * max(m / n for m, n in zip(moved, size, strict=True))
    if shares is None:
        return largest
    bounds = (
        (sum(w * m for w, m in zip(row, moved, strict=True)) + too_far * own) / n
        for row, own, n in zip(shares, moved, size, strict=True)
    )
    return min(largest, max(bounds))
