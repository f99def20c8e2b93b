"""Inline regions: the bodies of `no_grad` and `autocast` regions become ordinary operations.

`torch.export` keeps `with torch.no_grad():` and `with torch.autocast(...):` as one higher-order
node that calls a submodule. Its operations are copied into the graph, so that they are annotated
like any other. Values that leave a `no_grad` region are detached, as in the source. A write inside
one is marked, since it has no gradient. An operation of an `autocast` region is marked with
the region's dtype, for the pass `explicit_casts`.

Promise: no node of the graph calls a captured submodule. Only flex attention remains, as a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.passes.source_line import place_in_model, source_line
from ffebm_compiler.passes.tracing import WITHOUT_GRADIENT
from ffebm_compiler.runtime.feedforward.flex_attention import FlexAttention

__all__ = ["AUTOCAST", "Autocast", "inline_regions", "without_gradient"]

AUTOCAST = "ffebm_autocast"
"""Meta key of an operation that ran in an `autocast` region: an `Autocast`."""


@dataclass(frozen=True)
class Autocast:
    """The innermost autocast region around an operation."""

    device: str
    dtype: torch.dtype
    enabled: bool


def _calls_captured_submodule(program: Program, node: fx.Node) -> bool:
    return node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator)


@ensures("calls a captured submodule", _calls_captured_submodule)
def inline_regions(program: Program) -> Program:
    """Inline every `wrap_with_set_grad_enabled` and `wrap_with_autocast`.

    Raises:
        UnsupportedError: the model uses another higher-order operation (cond, while_loop, ...).
    """
    while True:
        found = [node for node in program.graph.nodes if _is_region(node)]
        if not found:
            break
        for node in found:
            _inline(program, node)
    _detach(program.graph)
    for node in list(program.graph.nodes):
        if str(node.target) == "flex_attention":
            _keep_flex_attention(program, node)
    program.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.users:
            user = next(iter(node.users))
            body = getattr(program.graph_module, str(node.target))
            inside = list(body.graph.nodes) if isinstance(body, fx.GraphModule) else []
            places = [place for inner in (user, *inside) if (place := source_line(inner))]
            line = places[0] if places else ""
            raise UnsupportedError(
                f"{place_in_model(user)} uses torch's {user.target}{line}, control flow that depends on data, "
                "which cannot be compiled; convert the submodules around it"
            )
    program.graph.lint()
    return program


def _is_region(node: fx.Node) -> bool:
    return str(node.target) in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _marks_of_region(node: fx.Node) -> dict[str, object]:
    """The meta entries that mark an operation inside a region."""
    marks = {key: node.meta[key] for key in (WITHOUT_GRADIENT, AUTOCAST) if key in node.meta}
    if str(node.target) == "wrap_with_set_grad_enabled":
        return {**marks, WITHOUT_GRADIENT: node.args[0] is False}
    device, dtype, enabled = node.args[:3]
    assert isinstance(device, str)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(device)
    return {**marks, AUTOCAST: Autocast(device, dtype, bool(enabled))}


def _inline(program: Program, node: fx.Node) -> None:
    position = 1 if str(node.target) == "wrap_with_set_grad_enabled" else 4
    holder = node.args[position]
    assert isinstance(holder, fx.Node)
    body = getattr(program.graph_module, str(holder.target))
    marks = _marks_of_region(node)
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
                fresh.meta = {**inner.meta, **marks}
                fresh.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
                env[inner] = fresh
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        value = results[index]
        assert isinstance(value, fx.Node)
        user.replace_all_uses_with(value)
        graph.erase_node(user)
    graph.erase_node(node)


def _detach(graph: fx.Graph) -> None:
    """Detach the values that operations under `no_grad` hand to operations outside."""
    # In the graph's order, so that the names of what is made here are the same in every process.
    silent = dict.fromkeys(node for node in graph.nodes if node.op == "call_function" and without_gradient(node))
    for node in silent:
        if not isinstance(node.meta.get("val"), torch.Tensor) or _written_tensor(node) not in silent:
            continue  # a write under no_grad returns the older tensor itself, which keeps its history
        users = [user for user in node.users if user not in silent]
        if not users:
            continue
        with graph.inserting_after(node):
            fresh = graph.call_function(torch.ops.aten.detach.default, (node,))
        fresh.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, fresh)


def without_gradient(node: fx.Node) -> bool:
    """Whether an operation ran under `no_grad`."""
    return bool(node.meta.get(WITHOUT_GRADIENT) or (node.meta.get("custom") or {}).get(WITHOUT_GRADIENT))


def _written_tensor(node: fx.Node) -> fx.Node:
    """The node whose memory an in-place operation returns."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node):
            break
        node = target
    return node


def _keep_flex_attention(program: Program, node: fx.Node) -> None:
    """Make flex attention, with the graphs of its score and mask functions, a module: a digital operation."""

    def held(argument: fx.Node) -> Any:
        if argument.op != "get_attr":
            return argument
        functions.append(getattr(program.graph_module, str(argument.target)))
        return _Function(len(functions) - 1)

    functions: list[fx.GraphModule] = []
    arguments: Any = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda argument: held(argument) if isinstance(argument, fx.Node) else argument
    )
    operands: dict[fx.Node, int] = {}
    assert callable(node.target)

    def numbered(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return FlexAttention.Operand(operands.setdefault(argument, len(operands)))
        if isinstance(argument, _Function):
            return FlexAttention.Function(argument.index)
        return argument

    args, kwargs = fx.node.map_aggregate(arguments, numbered)
    name = f"flex_attention_{node.name}"
    program.graph_module.add_submodule(name, FlexAttention(node.target, args, kwargs, functions))
    with program.graph.inserting_before(node):
        fresh = program.graph.call_module(name, tuple(operands))
    fresh.meta = dict(node.meta)
    node.replace_all_uses_with(fresh)
    program.graph.erase_node(node)


@dataclass(frozen=True)
class _Function:
    index: int
