"""The dialect: which ATen operations are weight-stationary, wiring or activations. All others are digital.

There is one table per role, and a new operation is a row in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ffebm_compiler.passes.operators import (
    Build,
    concat,
    division,
    max_pool,
    permute,
    reshape,
    scale,
    signed_sum,
    wiring,
    zero_pad,
)
from ffebm_compiler.runtime.activations import table as activations
from ffebm_compiler.runtime.activations.table import (
    Activation,
    PReLU,
    QuickGELU,
    SlopedClamp,
    Softsign,
    SplitReLU,
    quick_gelu,
    sloped_clamp,
    split_relu,
)
from ffebm_compiler.runtime.program.contraction import contraction, letters_of
from ffebm_compiler.runtime.program.operators import Scale, slice_of

__all__ = [
    "WEIGHTS",
    "WIRING",
    "WIRING_KINDS",
    "WeightForm",
    "WiringForm",
    "activation_of",
    "all_arguments",
    "target_name",
]

aten = torch.ops.aten

WIRING_KINDS = ("add", "reshape", "concat", "scale", "avg_pool", "max_pool")
"""The kinds that `block_ops` may name. `dropout` and copies always join, since they are the identity on the chip."""


@dataclass(frozen=True)
class WeightForm:
    """How to read one weight-stationary operation."""

    kind: str
    value: int
    """Position of the dynamic operand."""
    weight: int
    bias: int | None
    matrix_of: Callable[[fx.Node, torch.Size], tuple[int, int, int]]
    """Rows, columns and groups from the node and its weight's shape."""
    transposed: bool = False
    """Whether the matrix is applied at every input position; otherwise at every output position."""

    def operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """The dynamic operand, the weight and the bias."""
        value, weight = node.args[self.value], node.args[self.weight]
        bias = _argument(node, self.bias, "bias") if self.bias is not None else None
        assert isinstance(value, fx.Node)
        assert isinstance(weight, fx.Node)
        return value, weight, bias if isinstance(bias, fx.Node) else None

    def matrix(self, node: fx.Node) -> tuple[int, int, int]:
        """(rows, columns, groups) of the weight matrix of one group."""
        weight = node.args[self.weight]
        assert isinstance(weight, fx.Node)
        return self.matrix_of(node, weight.meta["val"].shape)


def all_arguments(node: fx.Node) -> list[Any]:
    """All arguments of an operation, with defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return [
        node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for index, argument in enumerate(schema)
    ]


def _argument(node: fx.Node, index: int, name: str, default: object = None) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _linear_matrix(node: fx.Node, shape: torch.Size) -> tuple[int, int, int]:
    return int(shape[-1]), int(shape[0]), 1


def _product_matrix(node: fx.Node, shape: torch.Size) -> tuple[int, int, int]:
    return int(shape[0]), int(shape[-1]), 1


def _conv_matrix(node: fx.Node, shape: torch.Size) -> tuple[int, int, int]:
    groups = _argument(node, 6, "groups", 1)
    assert isinstance(groups, int)
    return int(shape[1:].numel()), int(shape[0]) // groups, groups


def _conv_transpose_matrix(node: fx.Node, shape: torch.Size) -> tuple[int, int, int]:
    groups = _argument(node, 6, "groups", 1)
    assert isinstance(groups, int)
    return int(shape[0]) // groups, int(shape[1:].numel()), groups


def _contraction_matrix(node: fx.Node, shape: torch.Size) -> tuple[int, int, int]:
    return letters_of(str(node.args[2])).matrix(shape)


_LINEAR = WeightForm("linear", 0, 1, 2, _linear_matrix)
_MATMUL = WeightForm("linear", 0, 1, None, _product_matrix)
_ADDMM = WeightForm("linear", 1, 2, 0, _product_matrix)
_CONTRACTION = WeightForm("contraction", 0, 1, None, _contraction_matrix)
_CONV = WeightForm("conv", 0, 1, 2, _conv_matrix)
_CONV_TRANSPOSE = WeightForm("conv_transpose", 0, 1, 2, _conv_transpose_matrix, transposed=True)

WEIGHTS: Mapping[object, WeightForm] = {
    aten.linear.default: _LINEAR,
    aten.matmul.default: _MATMUL,
    aten.mm.default: _MATMUL,
    aten.addmm.default: _ADDMM,
    aten.conv1d.default: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.padding: _CONV,
    aten.conv_transpose1d.default: _CONV_TRANSPOSE,
    aten.conv_transpose2d.input: _CONV_TRANSPOSE,
    aten.conv_transpose3d.input: _CONV_TRANSPOSE,
    contraction: _CONTRACTION,
}


@dataclass(frozen=True)
class WiringForm:
    """How to read one operation that is linear in its values and has no weights."""

    kind: str
    build: Build | None
    """Makes the operator of a node; None for a copy, which needs no operator."""
    accepts: Callable[[fx.Node], bool] = lambda node: True

    def kind_of(self, node: fx.Node) -> str:
        """The wiring kind of this node; an empty text if this node is no wiring."""
        return self.kind if self.accepts(node) else ""


def _is_sum(node: fx.Node) -> bool:
    """A sum of two values of equal shape, or of a value and a number."""
    first, second = node.args[0], node.args[1]
    if not isinstance(first, fx.Node) or node.kwargs.get("alpha", 1) != 1:
        return False
    if not isinstance(second, fx.Node):
        return isinstance(second, int | float)
    return _floating(first) and _floating(second)


def _is_scaling(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int | float) and _floating(node)


def _is_plain_div(node: fx.Node) -> bool:
    return _is_scaling(node) and "rounding_mode" not in node.kwargs


def _is_cat(node: fx.Node) -> bool:
    items = node.args[0]
    return isinstance(items, list | tuple) and all(isinstance(item, fx.Node) and _floating(item) for item in items)


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_zero_pad(node: fx.Node) -> bool:
    constant = node.target is aten.constant_pad_nd.default or _argument(node, 2, "mode", "constant") == "constant"
    value = _argument(node, 2 if node.target is aten.constant_pad_nd.default else 3, "value", 0)
    return _floating(node) and constant and not value


def _has_dims(node: fx.Node) -> bool:
    return len(node.args) > 1 and node.args[1] is not None and _floating(node) and "dtype" not in node.kwargs


_RESHAPES: Mapping[object, Callable[..., torch.Tensor]] = {
    aten.view.default: torch.reshape,
    aten.reshape.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.flatten.using_ints: torch.flatten,
    aten.unflatten.int: torch.unflatten,
    aten.squeeze.dim: torch.squeeze,
    aten.squeeze.dims: torch.squeeze,
    aten.unsqueeze.default: torch.unsqueeze,
}
_PERMUTATIONS = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
)
_PLACES: Mapping[object, Callable[..., torch.Tensor]] = {
    aten.select.int: torch.select,
    aten.slice.Tensor: slice_of,
    aten.narrow.default: torch.narrow,
    aten.movedim.intlist: torch.movedim,
    aten.movedim.int: torch.movedim,
}
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)
_AVG_POOLS: Mapping[object, Callable[..., torch.Tensor]] = {
    aten.avg_pool1d.default: F.avg_pool1d,
    aten.avg_pool2d.default: F.avg_pool2d,
    aten.avg_pool3d.default: F.avg_pool3d,
    aten.adaptive_avg_pool1d.default: F.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d.default: F.adaptive_avg_pool3d,
}

WIRING: Mapping[object, WiringForm] = {
    **{target: WiringForm("reshape", reshape(function), _floating) for target, function in _RESHAPES.items()},
    **{target: WiringForm("reshape", permute, _floating) for target in _PERMUTATIONS},
    **{target: WiringForm("reshape", wiring(function), _floating) for target, function in _PLACES.items()},
    **{target: WiringForm("copy", None, _floating) for target in _COPIES},
    aten.constant_pad_nd.default: WiringForm("reshape", zero_pad, _is_zero_pad),
    aten.pad.default: WiringForm("reshape", zero_pad, _is_zero_pad),
    **{target: WiringForm("avg_pool", wiring(function)) for target, function in _AVG_POOLS.items()},
    aten.mean.dim: WiringForm("avg_pool", wiring(torch.mean), _has_dims),
    aten.max_pool1d.default: WiringForm("max_pool", max_pool(1), _floating),
    aten.max_pool2d.default: WiringForm("max_pool", max_pool(2), _floating),
    aten.max_pool3d.default: WiringForm("max_pool", max_pool(3), _floating),
    aten.add.Tensor: WiringForm("add", signed_sum(1.0), _is_sum),
    aten.sub.Tensor: WiringForm("add", signed_sum(-1.0), _is_sum),
    aten.mul.Tensor: WiringForm("scale", scale, _is_scaling),
    aten.div.Tensor: WiringForm("scale", division, _is_plain_div),
    aten.neg.default: WiringForm("scale", lambda node: Scale(-1.0), _floating),
    aten.cat.default: WiringForm("concat", concat, _is_cat),
}
"""Operation -> its row: its kind, how its operator is made, and which of its nodes are wiring."""


_RECOGNISED: Mapping[object, Activation] = {F.softsign: Softsign(), quick_gelu: QuickGELU()}
"""Activations that have no ATen operation; `recognise_activations` writes them."""


def target_name(node: fx.Node) -> str:
    """Short name of a node's operation, e.g. `conv2d`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that a node applies, or None."""
    if not node.args or not isinstance(node.args[0], fx.Node) or not _floating(node):
        return None
    if node.target is aten.prelu.default:
        return PReLU()
    if node.target in _RECOGNISED:
        return _RECOGNISED[node.target]
    if node.target is sloped_clamp:
        return SlopedClamp(*node.args[1:])  # type: ignore[arg-type]
    if node.target is split_relu:
        return SplitReLU(*node.args[1:])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    rest = node.args[1:]
    if any(isinstance(argument, fx.Node) for argument in (*rest, *node.kwargs.values())):
        return None
    return activations.from_aten(target_name(node), tuple(rest), dict(node.kwargs))
