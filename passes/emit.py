"""Emit: add a new node with the module path and source line of another, and with shapes of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

__all__ = ["emit_like"]


def emit_like(graph: fx.Graph, like: fx.Node, target: Callable[..., object], *args: object) -> fx.Node:
    """A call of `target` where the graph inserts at present, as if the module of `like` had made it."""
    fresh = graph.call_function(target, args)  # type: ignore[arg-type]
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            fresh.meta[key] = like.meta[key]
    values: tuple[object, ...] = fx.map_arg(args, lambda node: node.meta["val"])  # type: ignore[type-var]
    with fresh.all_input_nodes[0].meta["val"].fake_mode:
        fresh.meta["val"] = target(*values)
    return fresh
