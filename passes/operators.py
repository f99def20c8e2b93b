"""Build the operators of a block from ATen operations. The rows of `dialect` name these functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ffebm_compiler.ir import info
from ffebm_compiler.runtime.program import pointwise
from ffebm_compiler.runtime.program.operators import (
    Concat,
    Convolution,
    MaxPool,
    Operator,
    Permute,
    Reshape,
    Scale,
    Sum,
    Wiring,
)

__all__ = [
    "Build",
    "concat",
    "convolution_operator",
    "division",
    "max_pool",
    "permute",
    "reshape",
    "scale",
    "signed_sum",
    "wiring",
    "zero_pad",
]

aten = torch.ops.aten
Build = Callable[[fx.Node], Operator]
"""Makes the operator of a node."""


def _ints(value: Any, count: int) -> tuple[int, ...]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    numbers = tuple(int(item) for item in items)
    return numbers * count if len(numbers) == 1 else numbers


_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: pointwise.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv_transpose1d,
    2: pointwise.conv_transpose2d,
    3: F.conv_transpose3d,
}


def convolution_operator(node: fx.Node) -> Convolution:
    """The operator of a convolution, transposed or not."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    rank = weight.meta["val"].dim() - 2
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    settings = {
        argument.name: node.args[index]
        if index < len(node.args)
        else node.kwargs.get(argument.name, argument.default_value)
        for index, argument in enumerate(schema)
    }
    stride, dilation = _ints(settings["stride"], rank), _ints(settings["dilation"], rank)
    groups = settings["groups"]
    assert isinstance(groups, int)
    if info(node).kind == "conv_transpose":
        padding, extra = _ints(settings["padding"], rank), _ints(settings["output_padding"], rank)
        arguments: tuple[object, ...] = (stride, padding, extra, groups, dilation)
        return Convolution(_TRANSPOSED[rank], arguments, stride, padding, dilation, True, extra, groups)
    padding = _padding(settings["padding"], weight.meta["val"].shape[2:], dilation)
    return Convolution(
        _CONVOLUTIONS[rank],
        (stride, settings["padding"] if isinstance(settings["padding"], str) else padding, dilation, groups),
        stride,
        padding,
        dilation,
        False,
        (0,) * rank,
        groups,
    )


def _padding(padding: object, kernel: torch.Size, dilation: tuple[int, ...]) -> tuple[int, ...]:
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        return tuple((int(k) - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
    return _ints(padding, len(kernel))


def _plain(value: object) -> object:
    """Make tuples of lists, so that an operator is hashable and comparable."""
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _settings(node: fx.Node) -> tuple[tuple[object, ...], tuple[tuple[str, object], ...]]:
    """The arguments of a node without its value."""
    return (
        tuple(_plain(argument) for argument in node.args[1:]),
        tuple((key, _plain(value)) for key, value in node.kwargs.items()),
    )


def wiring(function: Callable[..., torch.Tensor]) -> Build:
    """A builder of operators for a linear function of one value."""
    return lambda node: Wiring(function, *_settings(node))


def reshape(function: Callable[..., torch.Tensor]) -> Build:
    """A builder of operators for a function that reshapes."""
    return lambda node: Reshape(function, *_settings(node))


def zero_pad(node: fx.Node) -> Operator:
    """Padding with zeros."""
    return Wiring(F.pad, _settings(node)[0][:1])


def max_pool(dims: int) -> Build:
    """A builder of operators for max pooling over so many dimensions."""
    return lambda node: MaxPool(dims, _settings(node)[0])


def permute(node: fx.Node) -> Operator:
    """A permutation of dimensions."""
    return Permute(_dims(node))


def signed_sum(sign: float) -> Build:
    """A builder of operators for a sum or a difference, of two values or of a value and a number."""

    def build(node: fx.Node) -> Operator:
        second = node.args[1]
        if isinstance(second, fx.Node):
            # `all_input_nodes` lists the x of x + x once.
            return Scale(1 + sign) if second is node.args[0] else Sum((1.0, sign))
        return Sum((1.0,), sign * float(second))  # type: ignore[arg-type]

    return build


def scale(node: fx.Node) -> Operator:
    """A product with a number."""
    return Scale(float(node.args[1]))  # type: ignore[arg-type]


def division(node: fx.Node) -> Operator:
    """A quotient by a number."""
    return Scale(1 / float(node.args[1]))  # type: ignore[arg-type]


def concat(node: fx.Node) -> Operator:
    """A concatenation."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return Concat(dim)


def _dims(node: fx.Node) -> tuple[int, ...]:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    rank = value.meta["val"].dim()
    if node.target is aten.permute.default:
        return tuple(dim % rank for dim in _ints(node.args[1], 1))
    if node.target is aten.numpy_T.default:
        return tuple(reversed(range(rank)))
    if node.target is aten.t.default and rank < 2:
        return tuple(range(rank))
    ends: dict[object, tuple[int, ...]] = {aten.t.default: (0, 1), aten.mT.default: (-2, -1)}
    first, second = ends.get(node.target) or _ints(node.args[1:3], 1)
    dims = list(range(rank))
    dims[first % rank], dims[second % rank] = dims[second % rank], dims[first % rank]
    return tuple(dims)
