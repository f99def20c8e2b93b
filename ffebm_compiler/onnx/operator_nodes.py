"""ONNX nodes of the operators that need more than one line, applied and transposed. `operators.py` has the rows.

The transpose is the feedback path, such as ConvTranspose for a convolution or zero padding for a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.emit import Free, Shape, Writer, fixed
from ffebm_compiler.onnx.pool_nodes import mean_adjoint, mean_apply, pool_adjoint, pool_apply, pool_of
from ffebm_compiler.runtime.program.operators import Convolution, Linear, Operator, Wiring, slice_of

__all__ = [
    "Weights",
    "check_conv",
    "concat_adjoint",
    "conv_adjoint",
    "conv_settings",
    "linear",
    "linear_adjoint",
    "unbroadcast",
    "wiring_nodes",
]

Weights = Sequence[str | None]
"""Names of an operator's weights; None in the place of a missing one."""


def linear(writer: Writer, operator: Linear, value: str, weights: Weights, shape: Shape) -> str:
    """x Wᵀ + b, or x W + b if the layer is transposed. It is a Gemm if x is a matrix."""
    weight, bias = str(weights[0]), [weights[1]] if weights[1] else []
    if len(shape) == 2:
        return writer.op("Gemm", value, weight, *bias, transB=int(not operator.transposed))
    product = writer.op("MatMul", value, weight if operator.transposed else writer.turned(weight))
    return writer.op("Add", product, *bias) if bias else product


def linear_adjoint(writer: Writer, operator: Linear, cotangent: str, weight: str) -> str:
    """p W, or p Wᵀ if the layer is transposed."""
    return writer.op("MatMul", cotangent, writer.turned(weight) if operator.transposed else weight)


def check_conv(operator: Convolution, shape: Shape) -> None:
    """Refuse a convolution of an input without a batch dimension.

    Raises:
        ExportError: the input has none; names its shape.
    """
    if len(shape) != len(operator.stride) + 2:
        raise ExportError(
            f"a convolution of an input without a batch dimension, {shape}, has no ONNX form: unsqueeze it"
        )


def conv_settings(operator: Convolution) -> dict[str, Any]:
    """The attributes of Conv and ConvTranspose."""
    return {
        "strides": list(operator.stride),
        "pads": [*operator.padding, *operator.padding],
        "dilations": list(operator.dilation),
        "group": operator.groups,
    }


def conv_adjoint(
    writer: Writer, operator: Convolution, cotangent: str, weight: str, shape: Shape, result: Shape
) -> str:
    """The transpose of a convolution."""
    check_conv(operator, shape)
    if operator.transposed:  # its weight is the weight of the convolution that it is the transpose of
        return writer.op("Conv", cotangent, weight, **conv_settings(operator))
    kernel = writer.kernel_of(weight)
    extra = []
    for before, after, size, stride, padding, dilation in zip(
        shape[2:], result[2:], kernel, operator.stride, operator.padding, operator.dilation, strict=True
    ):
        if isinstance(before, Free) or isinstance(after, Free):
            raise ExportError("the image size of a convolution in an energy block is free: fix all sizes but the batch")
        extra.append(before - ((after - 1) * stride - 2 * padding + dilation * (size - 1) + 1))
    return writer.op("ConvTranspose", cotangent, weight, **conv_settings(operator), output_padding=extra)


def unbroadcast(writer: Writer, value: str, shape: Shape, target: Shape) -> str:
    """The sum over the dimensions that were broadcast from `target` to `shape`."""
    if shape == target:
        return value
    missing = len(shape) - len(target)
    axes = [*range(missing)]
    axes += [index + missing for index, size in enumerate(target) if size == 1 and shape[index + missing] != 1]
    summed = writer.op("ReduceSum", value, writer.ints(axes), keepdims=1)
    return writer.op("Squeeze", summed, writer.ints(range(missing))) if missing else summed


def concat_adjoint(
    writer: Writer, dim: int, cotangent: str, shapes: Sequence[Shape], needed: Sequence[bool]
) -> list[str | None]:
    """The parts of a cotangent that belong to the concatenated operands."""
    pieces: list[str | None] = []
    start = 0
    for shape, wanted in zip(shapes, needed, strict=True):
        end = start + fixed(shape, dim)
        bounds = (writer.ints([start]), writer.ints([end]), writer.ints([dim]))
        pieces.append(writer.op("Slice", cotangent, *bounds) if wanted else None)
        start = end
    return pieces


def _arguments(operator: Wiring, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    given = dict(zip(names, operator.arguments, strict=False)) | dict(operator.keywords)
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


def _slice_bounds(operator: Wiring, shape: Shape) -> tuple[int, int, int] | None:
    """(dimension, start, end), or None for a slice that takes everything."""
    if operator.function is torch.narrow:
        dim, start, length = _arguments(operator, ("dim", "start", "length"), (0, 0, 0))
        end, step = start + length, 1
    else:
        dim, start, end, step = _arguments(operator, ("dim", "start", "end", "step"), (0, None, None, 1))
    dim %= len(shape)
    if step != 1:
        raise ExportError(
            f"a slice with step {step} inside an energy block has no ONNX form here: keep its layer digital"
        )
    if not start and (end is None or end >= _EVERYTHING):
        return None
    first, last, _ = slice(start, end).indices(fixed(shape, dim))
    return dim, first, last


_EVERYTHING = 2**62
"""`torch.export` writes an open end as the largest integer."""


def _slice_apply(writer: Writer, operator: Wiring, value: str, shape: Shape, result: Shape) -> str:
    bounds = _slice_bounds(operator, shape)
    if bounds is None:
        return value
    dim, start, end = bounds
    return writer.op("Slice", value, writer.ints([start]), writer.ints([end]), writer.ints([dim]))


def _slice_adjoint(writer: Writer, operator: Wiring, cotangent: str, shape: Shape, result: Shape) -> str:
    bounds = _slice_bounds(operator, shape)
    if bounds is None:
        return cotangent
    dim, start, end = bounds
    return writer.padded(cotangent, len(shape), dim, start, fixed(shape, dim) - end)


def _select_place(operator: Wiring, shape: Shape) -> tuple[int, int]:
    dim, index = _arguments(operator, ("dim", "index"), (0, 0))
    dim %= len(shape)
    return dim, index % fixed(shape, dim)


def _select_apply(writer: Writer, operator: Wiring, value: str, shape: Shape, result: Shape) -> str:
    dim, index = _select_place(operator, shape)
    piece = writer.op("Slice", value, writer.ints([index]), writer.ints([index + 1]), writer.ints([dim]))
    return writer.op("Squeeze", piece, writer.ints([dim]))


def _select_adjoint(writer: Writer, operator: Wiring, cotangent: str, shape: Shape, result: Shape) -> str:
    dim, index = _select_place(operator, shape)
    piece = writer.op("Unsqueeze", cotangent, writer.ints([dim]))
    return writer.padded(piece, len(shape), dim, index, fixed(shape, dim) - index - 1)


def _moved(operator: Wiring, rank: int) -> list[int]:
    tags = torch.empty(tuple(range(2, rank + 2)), device="meta")
    return [size - 2 for size in torch.movedim(tags, *operator.arguments, **dict(operator.keywords)).shape]


def _move_apply(writer: Writer, operator: Wiring, value: str, shape: Shape, result: Shape) -> str:
    return writer.op("Transpose", value, perm=_moved(operator, len(shape)))


def _move_adjoint(writer: Writer, operator: Wiring, cotangent: str, shape: Shape, result: Shape) -> str:
    order = _moved(operator, len(shape))
    return writer.op("Transpose", cotangent, perm=sorted(range(len(order)), key=order.__getitem__))


_Nodes = Callable[[Writer, Any, str, Shape, Shape], str]
_WIRING: Mapping[object, tuple[_Nodes, _Nodes]] = {
    slice_of: (_slice_apply, _slice_adjoint),
    torch.narrow: (_slice_apply, _slice_adjoint),
    torch.select: (_select_apply, _select_adjoint),
    torch.movedim: (_move_apply, _move_adjoint),
    torch.mean: (mean_apply, mean_adjoint),
}


def wiring_nodes(operator: Operator) -> tuple[_Nodes, _Nodes]:
    """The functions that apply and transpose a wiring operator.

    Raises:
        ExportError: the operator has no ONNX form here.
    """
    if isinstance(operator, Wiring):
        if operator.function in _WIRING:
            return _WIRING[operator.function]
        if pool_of(operator) is not None:
            return pool_apply, pool_adjoint
    raise ExportError(f"{operator!r} inside an energy block has no ONNX form: keep its layer digital")
