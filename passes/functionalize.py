"""Functionalize: in-place operations become functional ones.

`x.relu_()` becomes `y = relu(x)` and everything after it that used `x` uses `y`. This is exact
where no other view of the same memory is read afterwards; where one is, the pass refuses.
Writes to a parameter or a buffer (counters, caches) keep their in-place operation: they are
side effects of the source that the hybrid keeps.

Promise: no node mutates a value that another dynamic node reads.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Program, module_path

__all__ = ["functionalize"]


def functionalize(program: Program) -> Program:
    """Replace every in-place operation on an intermediate value.

    Raises:
        UnsupportedError: where a mutated value is read through another view later.
    """
    graph = program.graph
    order = {node: index for index, node in enumerate(graph.nodes)}
    placeholders = {node for node in graph.nodes if node.op == "placeholder"}
    roots: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        roots[node] = _root(node, roots)
        overload = node.target
        if not isinstance(overload, torch._ops.OpOverload) or not overload._schema.is_mutable:
            continue
        mutated = node.args[0]
        if not isinstance(mutated, fx.Node):
            continue
        if roots[mutated] in placeholders and roots[mutated].name not in program.inputs:
            continue
        functional = _functional(overload)
        aliases = [
            other
            for other, root in roots.items()
            if root is roots[mutated] and other is not mutated and other is not node
        ]
        late = [a for a in aliases if any(order[user] > order[node] for user in a.users)]
        if functional is None or late or (mutated is not roots[mutated] and _read_later(roots, mutated, order, node)):
            raise UnsupportedError(
                f"module {module_path(node)!r} writes in place ({overload}) to a value that is read "
                "through another view afterwards; write it out of place"
            )
        with graph.inserting_before(node):
            fresh = graph.call_function(functional, node.args, node.kwargs)
        fresh.meta = dict(node.meta)
        order[fresh] = order[node]
        roots[fresh] = fresh
        node.replace_all_uses_with(fresh)
        for user in list(mutated.users):
            if user is not fresh and user is not node and order[user] > order[node]:
                user.replace_input_with(mutated, fresh)
        graph.erase_node(node)
        del roots[node]
    return program


def _root(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node whose memory a node's value lives in."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return node
    base = node.args[0]
    overload = node.target
    if isinstance(overload, torch._ops.OpOverload):
        returns = overload._schema.returns
        if returns and returns[0].alias_info is not None:
            return roots.get(base, base)
        return node
    if getattr(overload, "__name__", "") == "getitem":
        return roots.get(base, base)
    return node


def _read_later(roots: dict[fx.Node, fx.Node], mutated: fx.Node, order: dict[fx.Node, int], node: fx.Node) -> bool:
    root = roots[mutated]
    return any(order[user] > order[node] for user in root.users)


def _functional(overload: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The out-of-place overload of an in-place one: `aten.add_.Tensor` -> `aten.add.Tensor`."""
    name = overload._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    functional = getattr(packet, overload._overloadname, None) if packet is not None else None
    return functional if isinstance(functional, torch._ops.OpOverload) else None
