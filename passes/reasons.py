"""Reasons: why an operation that no table of `dialect` lists is computed digitally.

People read these claims in `plan.explain`, so that each must be true of every operation that it
is given to. `tests/test_reasons.py` checks them against what the operations compute.
"""

from __future__ import annotations

import operator
from collections.abc import Container

import torch
import torch.utils._pytree as pytree
from torch import fx

from ffebm_compiler.passes.dialect import target_name

__all__ = ["TWO_ACTIVATIONS", "digital_reason"]

TWO_ACTIVATIONS = "the product of two activations is not weight-stationary"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PRODUCTS = _words(
    "mul matmul mm bmm mv dot inner einsum addmm addmv addbmm baddbmm tensordot bilinear linalg_vecdot outer ger kron "
    "chain_matmul linalg_multi_dot addcmul"
)
_LOOKUPS = _words("embedding embedding_bag index index_select gather take take_along_dim")
_NORMALISATIONS = _words(
    "layer_norm native_layer_norm group_norm native_group_norm batch_norm instance_norm rms_norm local_response_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm"
)
_LINEAR = _words(
    "expand expand_as repeat repeat_interleave tile stack sum cumsum roll flip rot90 diagonal triu tril "
    "unfold im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle split split_with_sizes chunk unbind "
    "tensor_split upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d squeeze view_as reshape_as detach slice_scatter select_scatter swapaxes"
)
_RECURRENT = _words("lstm gru rnn_tanh rnn_relu")


def digital_reason(node: fx.Node, static: Container[fx.Node], drawn: Container[fx.Node] = ()) -> str:
    """Why `node` is digital.

    Args:
        node: an operation that no table of `dialect` lists.
        static: nodes that depend on no input of the network.
        drawn: nodes that depend on random numbers, and on no input of the network.
    """
    name = target_name(node)
    moving = [operand for operand in node.all_input_nodes if operand not in static and _is_tensor(operand)]
    if node.target is operator.getitem:
        return "it picks one of several digital results"
    if "attention" in name:
        if sum(operand not in static for operand in node.args[:3] if isinstance(operand, fx.Node)) > 1:
            return "attention multiplies activations by activations"
        return "attention has a softmax between its two products"
    if name in _PRODUCTS:
        factors = [leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, fx.Node) and leaf in moving]
        if any(factor in drawn for factor in factors):
            return "it multiplies by random numbers, which are no weights"
        if len(factors) > 1:
            return TWO_ACTIVATIONS
        return "it multiplies each value by a number of its own and sums none: no matrix product"
    if name in _LOOKUPS and isinstance(node.args[0], fx.Node):
        return "a table lookup is not a matrix product" if node.args[0] in static else "it picks values by their place"
    if name in _RECURRENT:
        return "a recurrent layer of packed sequences, or of more than 64 steps, is not unrolled into its layers"
    if name in _NORMALISATIONS:
        return "normalisation divides by statistics of its input"
    if name.startswith(("max_pool", "adaptive_max_pool", "fractional_max_pool")):
        return "max pooling is not linear"
    if name in ("pad", "constant_pad_nd"):
        return "of all padding a block can hold zeros alone"
    if name in _LINEAR:
        return f"{name} is linear without weights, but no wiring that a block can hold"
    return f"{name} is not among the operations that a block can hold"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
