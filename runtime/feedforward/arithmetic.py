"""Which operations of a digital part read and write quantised values, and which only move them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ffebm_compiler.runtime.feedforward.blocks import (
    ReboundAttention,
    ReboundBatchNorm,
    ReboundDropout,
    ReboundInstanceNorm,
)
from ffebm_compiler.runtime.feedforward.modes import TrainingMask
from ffebm_compiler.runtime.program import pointwise
from ffebm_compiler.runtime.program.contraction import contraction, letters_of

__all__ = ["Kind", "Product", "kind_of", "product_of"]

aten = torch.ops.aten

Kind = Literal["product", "arithmetic", "function", "move", "wide"]
"""How an operation treats quantised values.

`"product"` and `"arithmetic"` read and write quantised values. A `"function"` reads the wide accumulator of the
operation before it, and writes quantised values. A `"move"` leaves values as they are. All others are `"wide"`: they
read what is there and compute in floating point.
"""


@dataclass(frozen=True)
class Product:
    """Where the operands of a product are among the arguments of its operation."""

    first: int | None
    """Of the value, which may be a weight too; None if there is none (an embedding)."""
    second: int
    bias: int | None
    first_axis: int
    """Axis of the channels if the first operand is the weight."""
    second_axis: int


_LINEAR = Product(0, 1, 2, 0, 0)
_MATMUL = Product(0, 1, None, -2, -1)
_ADDMM = Product(1, 2, 0, -2, -1)
_CONV = Product(0, 1, 2, 0, 0)
_CONV_TRANSPOSE = Product(0, 1, 2, 0, 1)

_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, pointwise.conv2d),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
_TRANSPOSED_CONVOLUTIONS = (
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
    pointwise.conv_transpose2d,
)
_PRODUCTS: dict[object, Product] = {
    aten.linear.default: _LINEAR,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default), _MATMUL),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _ADDMM),
    **dict.fromkeys(_CONVOLUTIONS, _CONV),
    **dict.fromkeys(_TRANSPOSED_CONVOLUTIONS, _CONV_TRANSPOSE),
    aten.embedding.default: Product(None, 0, None, 0, 0),
}
_GENERAL = (aten.convolution.default, pointwise.convolution)
_TRANSPOSED = 6
"""Position of the flag of a general convolution that says whether it is a transposed one."""

_SUMS = "add sub mul"
"""Elementwise operations of two tensors. With a number they are part of a scale and stay wide."""
_ARITHMETIC = """batch_norm layer_norm group_norm instance_norm rms_norm avg_pool1d avg_pool2d avg_pool3d
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d scaled_dot_product_attention einsum bilinear sigmoid tanh
gelu silu elu mish hardswish hardsigmoid softplus upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"""
_FUNCTIONS = "relu relu6 hardtanh clamp clamp_min clamp_max leaky_relu softmax _softmax"
_MOVES = """view reshape _unsafe_view flatten unflatten permute transpose t numpy_T mT squeeze unsqueeze select slice
narrow movedim expand expand_as repeat repeat_interleave tile clone contiguous alias detach lift_fresh_copy index_select
gather index chunk split split_with_sizes unbind cat stack flip roll constant_pad_nd pad pixel_shuffle pixel_unshuffle
unfold max_pool1d max_pool2d max_pool3d adaptive_max_pool1d amax where masked_fill dropout _to_copy to getitem
autocast_to"""
_NAMES: dict[str, Kind] = {
    **dict.fromkeys(_ARITHMETIC.split(), "arithmetic"),
    **dict.fromkeys(_FUNCTIONS.split(), "function"),
    **dict.fromkeys(_MOVES.split(), "move"),
}
_MODULES: dict[type, Kind] = {
    ReboundBatchNorm: "arithmetic",
    ReboundInstanceNorm: "arithmetic",
    ReboundAttention: "arithmetic",
    ReboundDropout: "move",
    TrainingMask: "move",
}


def _name(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[1])
    return str(getattr(target, "__name__", ""))


def product_of(node: fx.Node) -> Product | None:
    """The operands of a product; None if the node is none."""
    if node.op != "call_function":
        return None
    if node.target is contraction:
        letters = letters_of(str(node.args[2]))
        axis = letters.weight.index(letters.outputs[0]) if letters.outputs else 0
        return Product(0, 1, None, 0, axis)
    if node.target in _GENERAL:
        return _CONV_TRANSPOSE if len(node.args) > _TRANSPOSED and node.args[_TRANSPOSED] else _CONV
    return _PRODUCTS.get(node.target)


def kind_of(part: fx.GraphModule, node: fx.Node) -> Kind:
    """How a node of a digital part treats quantised values."""
    if node.op == "call_module":
        return _MODULES.get(type(part.get_submodule(str(node.target))), "wide")
    if node.op != "call_function":
        return "wide"
    if product_of(node) is not None:
        return "product"
    name = _name(node.target)
    if name in _SUMS.split():
        two = all(isinstance(each, fx.Node) for each in node.args[:2])
        return "arithmetic" if two and node.kwargs.get("alpha", 1) == 1 else "wide"
    return _NAMES.get(name, "wide")
