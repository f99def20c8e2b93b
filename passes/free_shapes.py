"""Free shapes: integers computed from shapes depend on the network's inputs only.

Otherwise a shape would tie two blocks together that share no value. So `sym_size(h, 0)` of an intermediate
value becomes `sym_size(x, 0)` of an input, wherever that input has the same symbol. A single computed size of a
`view` becomes -1. Every `view` becomes a `reshape`, since strides may differ from the source's.

Promise: the graph computes the same values. A shape of an intermediate value is read only if no input has its symbol.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.ir import Pass, Program

__all__ = ["free_shapes"]

_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)


@Pass
def free_shapes(program: Program) -> Program:
    """Read shapes from the inputs, and write -1 where one size of a view is computed."""
    graph = program.graph
    symbols: dict[str, tuple[fx.Node, int]] = {}
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        last = node
        value = node.meta.get("val")
        if node.name in program.inputs and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    symbols.setdefault(str(size.node.expr), (node, dim))
    sizes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sym_size.int:
            _hoist(graph, node, symbols, sizes, last)
        elif node.target in _VIEWS:
            # A view would work only with the source's strides, and a block's outputs may have others.
            node.target = torch.ops.aten.reshape.default
            _minus_one(node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or not _is_shape(node))
    return program


def _hoist(
    graph: fx.Graph,
    node: fx.Node,
    symbols: dict[str, tuple[fx.Node, int]],
    sizes: dict[str, fx.Node],
    last: fx.Node | None,
) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt) or last is None:
        return
    expression = str(value.node.expr)
    if expression not in symbols:
        return
    if expression not in sizes:
        tensor, dim = symbols[expression]
        with graph.inserting_after(last):
            fresh = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
        fresh.meta["val"] = value
        sizes[expression] = fresh
    if node is not sizes[expression]:
        node.replace_all_uses_with(sizes[expression])
        graph.erase_node(node)


def _minus_one(node: fx.Node) -> None:
    given, value = node.args[1], node.meta.get("val")
    if not isinstance(given, list | tuple):
        return
    sizes = list(given)
    if isinstance(value, torch.Tensor) and value.dim() == len(sizes):
        # In `view(x.size(0), -1)` the size behind the -1 is known. Written out, it leaves the -1 for the computed size.
        sizes = [
            known if size == -1 and isinstance(known, int) else size
            for size, known in zip(sizes, value.shape, strict=True)
        ]
    computed = [index for index, size in enumerate(sizes) if isinstance(size, fx.Node)]
    if len(computed) == 1 and -1 not in sizes and 0 not in sizes:
        node.args = (node.args[0], [-1 if index == computed[0] else size for index, size in enumerate(sizes)])


def _is_shape(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat)
