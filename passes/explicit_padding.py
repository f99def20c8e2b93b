"""Explicit padding: `padding="same"` with an even kernel becomes a zero pad and a plain convolution.

The arguments of a convolution can hold only a symmetric padding, and the transpose of the
convolution reads its padding there.

Promise: the graph computes the same values, and every convolution's padding is symmetric.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.passes.dialect import all_arguments
from ffebm_compiler.passes.emit import on_fakes

__all__ = ["explicit_padding"]

aten = torch.ops.aten

_PLAIN = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def _is_lopsided(program: Program, node: fx.Node) -> bool:
    return node.target in _PLAIN and all_arguments(node)[4] == "same" and any(total % 2 for total in _totals(node))


@ensures("is a convolution whose padding is not symmetric", _is_lopsided)
def explicit_padding(program: Program) -> Program:
    """Split every convolution whose `"same"` padding is asymmetric."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target not in _PLAIN:
            continue
        value, weight, bias, stride, _, dilation, groups = all_arguments(node)
        assert isinstance(value, fx.Node)
        assert isinstance(weight, fx.Node)
        if not _is_lopsided(program, node):
            continue
        totals = _totals(node)
        # torch pads the odd element at the end; the last dimension comes first.
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (value, sides))
            padded.meta = dict(node.meta)
            with on_fakes(value.meta["val"].fake_mode):
                padded.meta["val"] = aten.constant_pad_nd.default(value.meta["val"], sides)
            plain = graph.call_function(
                _PLAIN[node.target],
                (padded, weight, bias, list(stride), [0] * len(totals), list(dilation), groups),
            )
        plain.meta = dict(node.meta)
        node.replace_all_uses_with(plain)
        graph.erase_node(node)
    graph.lint()
    return program


def _totals(node: fx.Node) -> list[int]:
    """For each dimension, how much a convolution with `"same"` padding pads on both sides together."""
    weight, dilation = node.args[1], all_arguments(node)[5]
    assert isinstance(weight, fx.Node)
    kernel = [int(size) for size in weight.meta["val"].shape[2:]]
    steps = [int(d) for d in dilation] * (len(kernel) if len(dilation) == 1 else 1)
    return [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
