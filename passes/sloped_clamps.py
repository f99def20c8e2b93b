"""Sloped clamps: a clamp of a product with a positive number becomes one activation, σ(h) = min(max(a h, lo), hi).

This is the hard sigmoid in the networks of Laborieux et al. (2021, arXiv 2006.03824) and Nest & Ernoult (2024, arXiv
2409.03306). As a product and a clamp, a state would be clamp(a d + feedback), while theirs is
clamp(a (d + feedback)). The pass runs only with `digital_drive`, so that other plans do not change.

Promise: no clamp is left whose operand is the product of a value that nothing else reads with a positive number.
"""

from __future__ import annotations

from math import inf
from numbers import Real

import torch
from torch import fx

from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.runtime.activations.table import Clamp, Hardtanh, ReLU, from_aten, sloped_clamp

__all__ = ["sloped_clamps"]

aten = torch.ops.aten
_CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """(lo, hi) of a clamp between numbers."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    name = node.target._schema.name.split("::")[1]
    if name not in _CLAMPS or node.target._overloadname != "default":
        return None
    activation = from_aten(name, tuple(node.args[1:]), dict(node.kwargs))
    return (activation.lo, activation.hi) if isinstance(activation, Clamp | Hardtanh | ReLU) else None


def _slope(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(h, a) of a product a h or a quotient h / (1/a) with a positive number, if it is read once and has one dtype."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) or len(node.users) != 1:
        return None
    first, second = node.args
    if node.target is aten.mul.Tensor and isinstance(second, fx.Node):
        first, second = second, first
    if not isinstance(first, fx.Node) or isinstance(second, bool) or not isinstance(second, Real) or node.kwargs:
        return None
    factor = float(second)
    if not 0 < factor < inf or first.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return first, factor if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / factor


def _is_sloped(program: Program, node: fx.Node) -> bool:
    return _bounds(node) is not None and _slope(node.args[0]) is not None  # type: ignore[arg-type]


@ensures("is a clamp of a product with a number, which is one activation", _is_sloped)
def sloped_clamps(program: Program) -> Program:
    """Replace every clamp(a h, lo, hi)."""
    graph = program.graph
    for node in list(graph.nodes):
        bounds = _bounds(node)
        found = _slope(node.args[0]) if bounds is not None else None
        if bounds is None or found is None:
            continue
        product, (value, slope) = node.args[0], found
        with graph.inserting_before(node):
            fresh = graph.call_function(sloped_clamp, (value, slope, *bounds))
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh)
        graph.erase_node(node)
        graph.erase_node(product)
    return program
