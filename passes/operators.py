"""From ATen operations to the operators of a block: convolutions and wiring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.ir import info
from ffebm_compiler.runtime import pointwise
from ffebm_compiler.runtime.operators import (
    Concat,
    Convolution,
    MaxPool,
    Operator,
    Permute,
    Reshape,
    Scale,
    Sum,
    Wiring,
    slice_of,
)

__all__ = ["convolution_operator", "wiring_operator"]

aten = torch.ops.aten


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


_FUNCTIONS: dict[object, Callable[..., torch.Tensor]] = {
    aten.avg_pool1d.default: F.avg_pool1d,
    aten.avg_pool2d.default: F.avg_pool2d,
    aten.avg_pool3d.default: F.avg_pool3d,
    aten.adaptive_avg_pool1d.default: F.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d.default: F.adaptive_avg_pool3d,
    aten.mean.dim: torch.mean,
    aten.select.int: torch.select,
    aten.slice.Tensor: slice_of,
    aten.narrow.default: torch.narrow,
    aten.movedim.int: torch.movedim,
    aten.movedim.intlist: torch.movedim,
}
_MAX_POOLS: dict[object, int] = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}
_RESHAPES: dict[object, Callable[..., torch.Tensor]] = {
    aten.view.default: torch.reshape,
    aten.reshape.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.flatten.using_ints: torch.flatten,
    aten.unflatten.int: torch.unflatten,
    aten.squeeze.dim: torch.squeeze,
    aten.squeeze.dims: torch.squeeze,
    aten.unsqueeze.default: torch.unsqueeze,
}


def _plain(value: object) -> object:
    """Lists become tuples, so that an operator is hashable and comparable."""
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def wiring_operator(node: fx.Node) -> Operator:
    """The operator of a node that is linear without weights.

    Raises:
        FFEBMError: for a node that `dialect.WIRING` has and this module does not.
    """
    arguments = tuple(_plain(argument) for argument in node.args[1:])
    keywords = tuple((key, _plain(value)) for key, value in node.kwargs.items())
    if node.target in _RESHAPES:
        return Reshape(_RESHAPES[node.target], arguments, keywords)
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        return Wiring(F.pad, arguments[:1])
    if node.target in _MAX_POOLS:
        return MaxPool(_MAX_POOLS[node.target], arguments)
    if node.target in _FUNCTIONS:
        return Wiring(_FUNCTIONS[node.target], arguments, keywords)
    if node.target in (aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default):
        return Permute(_dims(node))
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        second = node.args[1]
        if isinstance(second, fx.Node):
            # x + x has one operand in `all_input_nodes`.
            return Scale(1 + sign) if second is node.args[0] else Sum((1.0, sign))
        return Sum((1.0,), sign * float(second))  # type: ignore[arg-type]
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        number = float(node.args[1])  # type: ignore[arg-type]
        return Scale(number if node.target is aten.mul.Tensor else 1 / number)
    if node.target is aten.neg.default:
        return Scale(-1.0)
    if node.target is aten.cat.default:
        dim = arguments[0] if arguments else 0
        assert isinstance(dim, int)
        return Concat(dim)
    raise FFEBMError(f"no operator for wiring {node.target}: annotate and lower disagree")


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
