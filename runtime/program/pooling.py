"""The transpose of average pooling over disjoint windows, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["disjoint_windows", "spread"]

_POOLS: dict[Callable[..., Tensor], int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_ADAPTIVE: dict[Callable[..., Tensor], int] = {
    F.adaptive_avg_pool1d: 1,
    F.adaptive_avg_pool2d: 2,
    F.adaptive_avg_pool3d: 3,
}
_NAMES = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def disjoint_windows(
    function: Callable[..., Tensor], arguments: Sequence[Any], keywords: Mapping[str, Any], shape: Sequence[int]
) -> tuple[tuple[int, ...], float] | None:
    """(window, divisor) of an average pooling whose windows cover an operand of this shape once; None for others."""
    dims = _POOLS.get(function) or _ADAPTIVE.get(function)
    if dims is None or len(shape) != dims + 2:
        return None
    sides = shape[2:]
    if function in _ADAPTIVE:
        output = _each((*arguments, *keywords.values())[0], dims)
        if any(out is None or side % out for side, out in zip(sides, output, strict=True)):
            return None
        window = tuple(side // out for side, out in zip(sides, output, strict=True))
        return window, float(math.prod(window))
    given = {**dict(zip(_NAMES, arguments, strict=False)), **keywords}
    window = _each(given["kernel_size"], dims)
    stride = given.get("stride")
    if stride not in (None, [], ()) and _each(stride, dims) != window:
        return None
    if any(_each(given.get("padding", 0), dims)) or any(side % k for side, k in zip(sides, window, strict=True)):
        return None
    return window, float(given.get("divisor_override") or math.prod(window))


def spread(cotangent: Tensor, window: Sequence[int], divisor: float) -> Tensor:
    """Every value of p over its window, divided: the transpose of the pooling."""
    sides = [side * k for side, k in zip(cotangent.shape[2:], window, strict=True)]
    return F.interpolate(cotangent / divisor, size=sides, mode="nearest")


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    """A size for every dimension."""
    if isinstance(value, int | torch.SymInt) or value is None:
        return (value,) * dims
    values = tuple(value)
    return values * dims if len(values) == 1 else values
