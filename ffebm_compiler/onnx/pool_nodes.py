"""Average pooling and means as ONNX nodes, applied and transposed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.emit import Free, Shape, Writer, fixed
from ffebm_compiler.runtime.program.operators import Wiring

__all__ = ["mean_adjoint", "mean_apply", "pool_adjoint", "pool_apply", "pool_of"]

_FIXED = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_ADAPTIVE = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}


@dataclass(frozen=True)
class _Pool:
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def tiling(self) -> bool:
        """Whether the windows neither overlap nor reach outside."""
        return self.kernel == self.stride and not any(self.padding)


def pool_of(operator: Wiring) -> int | None:
    """Number of pooled dimensions of an average pooling; None for another function."""
    found: int | None = _FIXED.get(operator.function) or _ADAPTIVE.get(operator.function)
    return found


def _pool(operator: Wiring, shape: Shape) -> _Pool:
    rank = pool_of(operator)
    assert rank is not None
    image = shape[2:]
    if len(shape) != rank + 2 or any(isinstance(size, Free) for size in image):
        raise ExportError(f"average pooling of a value of shape {shape} has no ONNX form: fix all sizes but the batch")
    sizes = tuple(fixed(shape, dim) for dim in range(2, len(shape)))
    if operator.function in _ADAPTIVE:
        target = _tuple(operator.arguments[0] if operator.arguments else dict(operator.keywords)["output_size"], rank)
        wanted = tuple(size if aim is None else aim for size, aim in zip(sizes, target, strict=True))
        if any(size % aim for size, aim in zip(sizes, wanted, strict=True)):
            raise ExportError(
                f"adaptive pooling from {sizes} to {wanted} has windows of several sizes: keep it out of block_ops"
            )
        kernel = tuple(size // aim for size, aim in zip(sizes, wanted, strict=True))
        return _Pool(kernel, kernel, (0,) * rank)
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, operator.arguments, strict=False)) | dict(operator.keywords)
    kernel = _tuple(given["kernel_size"], rank)
    padding = _tuple(given.get("padding", 0), rank)
    partial = any(padding) and not given.get("count_include_pad", True)
    if given.get("ceil_mode") or given.get("divisor_override") or partial:
        raise ExportError(
            "average pooling with ceil_mode, divisor_override or count_include_pad=False inside an energy block has no "
            "ONNX form here: keep it out of block_ops"
        )
    return _Pool(kernel, _tuple(given.get("stride") or kernel, rank), padding)


def _tuple(value: Any, rank: int) -> tuple[Any, ...]:
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    return items * rank if len(items) == 1 else items


def pool_apply(writer: Writer, operator: Wiring, value: str, shape: Shape, result: Shape) -> str:
    """The pooling."""
    pool = _pool(operator, shape)
    return writer.op(
        "AveragePool",
        value,
        kernel_shape=list(pool.kernel),
        strides=list(pool.stride),
        pads=[*pool.padding, *pool.padding],
        count_include_pad=1,
    )


def pool_adjoint(writer: Writer, operator: Wiring, cotangent: str, shape: Shape, result: Shape) -> str:
    """Spread each value evenly over its window."""
    pool = _pool(operator, shape)
    scaled = writer.scaled(cotangent, 1 / math.prod(pool.kernel))
    channels = fixed(shape, 1)
    image, pooled = ([fixed(of, dim) for dim in range(2, len(of))] for of in (shape, result))
    if not pool.tiling:
        ones = writer.constant(np.ones((channels, 1, *pool.kernel), dtype=writer.dtype))
        extra = [
            size - ((out - 1) * stride - 2 * pad + kernel)
            for size, out, stride, pad, kernel in zip(
                image, pooled, pool.stride, pool.padding, pool.kernel, strict=True
            )
        ]
        return writer.op(
            "ConvTranspose",
            scaled,
            ones,
            strides=list(pool.stride),
            pads=[*pool.padding, *pool.padding],
            group=channels,
            output_padding=extra,
        )
    apart: list[int] = []
    spread: list[int] = []
    joined: list[int] = []
    for size, kernel in zip(pooled, pool.kernel, strict=True):
        apart += [size, 1]
        spread += [1, kernel]
        joined.append(size * kernel)
    split = writer.op("Reshape", scaled, writer.ints([0, channels, *apart]))
    full = writer.op(
        "Reshape", writer.op("Expand", split, writer.ints([1, 1, *spread])), writer.ints([0, channels, *joined])
    )
    for dim, (size, covered) in enumerate(zip(image, joined, strict=True)):
        full = writer.padded(full, len(shape), dim + 2, 0, size - covered)
    return full


def _means(operator: Wiring, shape: Shape) -> tuple[list[int], bool]:
    given = dict(zip(("dim", "keepdim"), operator.arguments, strict=False)) | dict(operator.keywords)
    dims = given["dim"] if isinstance(given["dim"], tuple | list) else (given["dim"],)
    return sorted(dim % len(shape) for dim in dims), bool(given.get("keepdim", False))


def mean_apply(writer: Writer, operator: Wiring, value: str, shape: Shape, result: Shape) -> str:
    """The mean over some dimensions."""
    dims, keep = _means(operator, shape)
    return writer.op("ReduceMean", value, writer.ints(dims), keepdims=int(keep))


def mean_adjoint(writer: Writer, operator: Wiring, cotangent: str, shape: Shape, result: Shape) -> str:
    """Spread each value evenly over the values that it is the mean of."""
    dims, keep = _means(operator, shape)
    sizes = [fixed(shape, dim) for dim in dims]
    full = cotangent if keep else writer.op("Unsqueeze", cotangent, writer.ints(dims))
    spread = [fixed(shape, dim) if dim in dims else 1 for dim in range(len(shape))]
    scaled = writer.scaled(full, 1 / math.prod(sizes))
    return writer.op("Expand", scaled, writer.ints(spread))
