"""Deviation: how far a tensor is from the one that it should be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.passes.containers import leaves_of

__all__ = ["deviation", "largest_deviation"]


def deviation(found: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """‖found − wanted‖/‖wanted‖; of integers and booleans the share of values that differ.

    Infinite values that are equal, such as masked scores, and NaN of both are no deviation, and do not count in the
    norms. One that is in one of the two alone makes the deviation infinite, and so does another shape. Complex values
    count by their real and imaginary parts.

    Args:
        found: what is compared.
        wanted: what it should be. Where it is zero, the deviation is ‖found‖.
        floor: the smallest norm that `wanted` counts with.
    """
    if found.shape != wanted.shape or found.is_complex() != wanted.is_complex():
        return math.inf
    if not wanted.numel():
        return 0.0
    if not _is_inexact(found) and not _is_inexact(wanted):
        return float((found != wanted).double().mean())
    have, want = _parts(found), _parts(wanted)
    same = (have == want) | (have.isnan() & want.isnan())
    difference, size = (have - want).masked_fill(same, 0), want.masked_fill(~want.isfinite(), 0)
    scale = float(size.abs().max()) or 1.0  # squares of numbers beyond 1e154 would overflow
    norm = scale * float((size / scale).norm())
    relative = scale * float((difference / scale).norm()) / (max(norm, floor) or 1.0)
    return relative if math.isfinite(relative) else math.inf


def largest_deviation(found: Any, wanted: Any) -> float:
    """The largest deviation of the tensors in two equal structures."""
    pairs = zip(leaves_of(found), leaves_of(wanted), strict=True)
    return max((deviation(have, want) for have, want in pairs if isinstance(want, Tensor)), default=0.0)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _parts(tensor: Tensor) -> Tensor:
    """The values in float64, complex ones by their parts."""
    whole = tensor.detach()
    return (torch.view_as_real(whole.to(torch.complex128)) if whole.is_complex() else whole).double()
