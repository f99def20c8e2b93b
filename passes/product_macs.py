"""Product MACs: the multiply-accumulates of a matrix product that is no layer, from the sizes of its operands.

    a matrix product of two activations      MACs = values of the result · length of the sums
    attention of q (…×L×E), k (…×S×E), v     MACs = values of q · S + values of the result · S
    a layer whose weight is no weight        MACs of the layer (a kernel that depends on the input, complex values)

A causal mask saves nothing here. A product of single values, such as a gate, sums nothing and counts nothing.

Promise: the graph is read and left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ffebm_compiler.passes.dialect import WEIGHTS, WeightForm
from ffebm_compiler.runtime.feedforward.blocks import ReboundAttention

__all__ = ["product_macs"]

aten = torch.ops.aten


def product_macs(node: fx.Node, module: object, size: Callable[[Any], int]) -> int:
    """The multiply-accumulates of a node that is no layer, over the whole batch; 0 if it is no matrix product.

    Args:
        node: a node of a captured graph.
        module: the module that a `call_module` node calls, else None.
        size: the example's value of a size, which may be symbolic.
    """
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return 0
    if isinstance(module, ReboundAttention) or node.target in _ATTENTIONS:
        return _attention(node, size)
    if node.target in WEIGHTS:
        return _layer(node, size)
    if node.target is aten.einsum.default:
        return _einsum(node, size)
    if node.target in _FIRST:
        return _matrix_product(node, _FIRST[node.target], size)
    return 0


_ATTENTIONS = (aten.scaled_dot_product_attention.default, torch.ops.higher_order.flex_attention)

_FIRST: Mapping[object, int] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.matmul.default), 0),
    **dict.fromkeys((aten.inner.default, aten.linalg_vecdot.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default), 1),
}
"""Matrix product -> position of the operand whose last dimension is summed."""


def _shape(node: object, size: Callable[[Any], int]) -> list[int]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [size(length) for length in value.shape] if isinstance(value, torch.Tensor) else []


def _matrix_product(node: fx.Node, first: int, size: Callable[[Any], int]) -> int:
    operand = _shape(node.args[first], size)
    times = operand[0] if node.target is aten.addbmm.default else 1  # it sums the products of its batch too
    return math.prod(_shape(node, size)) * (operand[-1] if operand else 1) * times


def _attention(node: fx.Node, size: Callable[[Any], int]) -> int:
    query, key = (_shape(operand, size) for operand in node.args[:2])
    return (math.prod(query) + math.prod(_shape(node, size))) * key[-2]


def _layer(node: fx.Node, size: Callable[[Any], int]) -> int:
    form = WEIGHTS[node.target]
    value, weight, _ = form.operands(node)
    if node.target is aten.matmul.default and len(_shape(weight, size)) != 2:  # every sample has a matrix of its own
        return _matrix_product(node, 0, size)
    each = value if form.transposed else node
    return math.prod(_shape(each, size)) * _terms(node, form, torch.Size(_shape(weight, size)))


def _terms(node: fx.Node, form: WeightForm, shape: torch.Size) -> int:
    """Products of each value, of the input where the layer is transposed, else of the output."""
    if form.kind in ("conv", "conv_transpose"):  # the groups may be a size, where every sample has kernels of its own
        return math.prod(shape[1:])
    rows, cols, _ = form.matrix_of(node, shape)
    return cols if form.transposed else rows


def _einsum(node: fx.Node, size: Callable[[Any], int]) -> int:
    """Pairs of operands from left to right, as torch multiplies them. A letter that only one has is summed before."""
    equation, operands = node.args[:2]
    assert isinstance(operands, Sequence)
    names, arrow, result = str(equation).replace(" ", "").partition("->")
    lists = [
        _letters(text, len(_shape(operand, size))) for text, operand in zip(names.split(","), operands, strict=True)
    ]
    sizes: dict[str, int] = {}
    for letters, operand in zip(lists, operands, strict=True):
        for letter, length in zip(letters, _shape(operand, size), strict=True):
            sizes[letter] = max(sizes.get(letter, 1), length)
    counts = [letter for letters in lists for letter in set(letters)]
    kept = set(result) if arrow else {letter for letter in counts if counts.count(letter) == 1}
    kept |= {letter for letter in sizes if letter.startswith(".") and ("..." in result or not arrow)}
    total, left = 0, set(lists[0])
    for index, letters in enumerate(lists[1:], 1):
        later = kept.union(*lists[index + 1 :])
        left = {letter for letter in left if letter in later or letter in letters}
        right = {letter for letter in letters if letter in later or letter in left}
        total += math.prod(sizes[letter] for letter in left | right) if left & right - later else 0
        left = (left | right) & later
    return total


def _letters(text: str, dimensions: int) -> list[str]:
    """A name for each dimension; those of an ellipsis are counted from its end, so that they are broadcast."""
    before, dots, after = text.partition("...")
    covered = dimensions - len(before) - len(after) if dots else 0
    return [*before, *(f".{index}" for index in range(covered, 0, -1)), *after]
