"""Expand vmap: what `torch.vmap` runs over a dimension becomes ordinary operations on whole tensors.

`torch.export` records the steps with which vmap opens and closes its levels. The operations between them
do not mention the dimension that vmap adds, so that they would mean something else in another place.
Such a stretch is run once more on the captured (fake) values, with the levels open. torch then runs one
batched operation for each, and those are recorded and put in its place.

Promise: no node of the graph opens, closes or uses a vmap level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.passes.source_line import place_in_model, source_line

__all__ = ["expand_vmap"]

_OPEN, _CLOSE = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def _is_of_vmap(program: Program, node: fx.Node) -> bool:
    return _name(node) in (_OPEN, _CLOSE, "_add_batch_dim", "_remove_batch_dim", "lazy_load_decompositions")


@ensures("belongs to a level of vmap", _is_of_vmap)
def expand_vmap(program: Program) -> Program:
    """Replace every stretch of the graph that runs under vmap.

    Raises:
        UnsupportedError: torch cannot run a stretch on whole tensors; it names the module and the line.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if _name(node) == "lazy_load_decompositions":
            graph.erase_node(node)
    for stretch in _stretches(graph):
        _expand(program, stretch)
    graph.lint()
    return program


@contextlib.contextmanager
def _no_level_left_open() -> Iterator[None]:
    before = torch._C._functorch.maybe_current_level() or 0
    try:
        yield
    finally:
        while (torch._C._functorch.maybe_current_level() or 0) > before:
            torch._C._functorch._vmap_decrement_nesting()


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _stretches(graph: fx.Graph) -> list[list[fx.Node]]:
    """For each outermost vmap level, the nodes from its opening to its closing."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if _name(node) == _OPEN:
            if not depth:
                found.append([])
            depth += 1
        if depth:
            found[-1].append(node)
        if _name(node) == _CLOSE:
            depth -= 1
    return found


def _expand(program: Program, stretch: list[fx.Node]) -> None:
    graph, inside = program.graph, set(stretch)
    first = next((node for node in stretch if node.meta.get("nn_module_stack")), stretch[0])
    inputs = list(dict.fromkeys(o for node in stretch for o in node.all_input_nodes if o not in inside))
    outputs = [node for node in stretch if any(user not in inside for user in node.users)]
    body = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in inputs:
        env[node] = body.get_attr(str(node.target)) if node.op == "get_attr" else body.placeholder(node.name)
    for node in stretch:
        env[node] = body.node_copy(node, env.__getitem__)
    body.output(tuple(env[node] for node in outputs))
    values = [node.meta["val"] for node in inputs if node.op != "get_attr"]
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
    try:
        with _no_level_left_open(), mode if mode is not None else contextlib.nullcontext():
            traced = make_fx(fx.GraphModule(program.graph_module, body), _allow_non_fake_inputs=True)(*values)
    except Exception as error:
        raise UnsupportedError(
            f"{place_in_model(first)} uses torch.vmap{source_line(first)} on something that cannot be written "
            f"for whole tensors ({type(error).__name__}, {str(error).splitlines()[0] if str(error) else ''}): write it "
            "without vmap"
        ) from error
    given = iter(node for node in inputs if node.op != "get_attr")
    placed: dict[fx.Node, Any] = {}
    results: list[Any] = []
    with graph.inserting_before(stretch[0]):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                placed[node] = next(given)
            elif node.op == "output":
                results = [placed[result] for result in node.args[0]]
            else:
                if node.op == "get_attr" and not hasattr(program.graph_module, str(node.target)):
                    setattr(program.graph_module, str(node.target), getattr(traced, str(node.target)))
                placed[node] = graph.node_copy(node, placed.__getitem__)
                kept = {key: first.meta[key] for key in ("nn_module_stack", "stack_trace") if key in first.meta}
                placed[node].meta = {**kept, "val": node.meta.get("val")}
    for node, result in zip(outputs, results, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(stretch):
        graph.erase_node(node)
