"""Unite placeholders: give the eval-mode capture a placeholder for everything that the train-mode capture reads.

Promise: parameters and buffers are matched by name, inputs by position, constants by content. The
order of a program's placeholders stays.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.ir import Program

__all__ = ["unite_placeholders"]


def unite_placeholders(program: Program, training: Program) -> dict[fx.Node, fx.Node]:
    """Placeholder of `training` -> placeholder of `program`. Missing ones are added to `program`."""
    ours = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    by_target = {target: ours[name] for name, target in program.lifted.items()}
    inputs = dict(zip(training.inputs, program.inputs, strict=True))
    twin: dict[fx.Node, fx.Node] = {}
    for node in training.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in inputs:
            twin[node] = ours[inputs[node.name]]
        elif node.name in training.lifted:
            target = training.lifted[node.name]
            if target not in by_target:
                by_target[target] = _added(program, node)
                program.lifted[by_target[target].name] = target
            twin[node] = by_target[target]
        else:
            twin[node] = _constant(program, node, training.constants[node.name])
    return twin


def _constant(program: Program, node: fx.Node, value: torch.Tensor) -> fx.Node:
    for known in program.graph.nodes:
        if known.name in program.constants:
            same = program.constants[known.name]
            if same.dtype == value.dtype and same.shape == value.shape and torch.equal(same, value):
                return known
    fresh = _added(program, node)
    program.constants[fresh.name] = value
    return fresh


def _added(program: Program, node: fx.Node) -> fx.Node:
    """A new placeholder, before the first input, or at the start if there is no input."""
    graph = program.graph
    place = next((n for n in graph.nodes if n.name in program.inputs), next(iter(graph.nodes)))
    with graph.inserting_before(place):
        fresh: fx.Node = graph.placeholder(f"{node.name}_in_training")
    fresh.meta = dict(node.meta)
    return fresh
