"""Inline regions: the bodies of `no_grad` and `autocast` regions become ordinary operations.

`torch.export` keeps `with torch.no_grad():` and `with torch.autocast(...):` as one higher-order
node that calls a submodule. Its operations are copied into the graph, so that they are annotated
like any other; what leaves a `no_grad` region is detached, as in the source.

Promise: no node of the graph calls a captured submodule.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Program, module_path

__all__ = ["inline_regions"]


def inline_regions(program: Program) -> Program:
    """Inline every `wrap_with_set_grad_enabled` and `wrap_with_autocast`.

    Raises:
        UnsupportedError: for another higher-order operation (cond, while_loop, ...).
    """
    while True:
        found = [node for node in program.graph.nodes if _is_region(node)]
        if not found:
            break
        for node in found:
            _inline(program, node)
    program.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    for node in program.graph.nodes:
        if node.op == "get_attr":
            raise UnsupportedError(
                f"module {module_path(next(iter(node.users)))!r} uses {next(iter(node.users)).target}, control flow "
                "that runs on data: it cannot be compiled; convert the submodules around it"
            )
    program.graph.lint()
    return program


def _is_region(node: fx.Node) -> bool:
    return str(node.target) in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _inline(program: Program, node: fx.Node) -> None:
    position = 1 if str(node.target) == "wrap_with_set_grad_enabled" else 4
    holder = node.args[position]
    assert isinstance(holder, fx.Node)
    body = getattr(program.graph_module, str(holder.target))
    detach = position == 1 and node.args[0] is False
    operands = iter(node.args[position + 1 :])
    env: dict[fx.Node, object] = {}
    graph = program.graph
    results: list[object] = []
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(operands)
            elif inner.op == "output":
                value = inner.args[0]
                results = [
                    env[v] if isinstance(v, fx.Node) else v
                    for v in (value if isinstance(value, list | tuple) else [value])
                ]
            else:
                if inner.op == "get_attr":
                    nested = getattr(body, str(inner.target))
                    name = f"{holder.target}_{inner.target}"
                    program.graph_module.add_module(name, nested)
                    fresh = graph.get_attr(name)
                else:
                    fresh = graph.node_copy(inner, lambda n: env[n])  # type: ignore[arg-type,return-value]
                fresh.meta = dict(inner.meta)
                fresh.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
                env[inner] = fresh
        if detach:
            results = [_detached(graph, value) for value in results]
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        value = results[index]
        assert isinstance(value, fx.Node)
        user.replace_all_uses_with(value)
        graph.erase_node(user)
    graph.erase_node(node)


def _detached(graph: fx.Graph, value: object) -> object:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    fresh = graph.call_function(torch.ops.aten.detach.default, (value,))
    fresh.meta = dict(value.meta)
    return fresh
