"""Static values are computed from parameters, buffers and constants alone, so that only new weights change them."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from ffebm_compiler.ir import Program
from ffebm_compiler.runtime.feedforward.custom_function import CustomFunction, GradientHook
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch
from ffebm_compiler.runtime.feedforward.state import WriteState

__all__ = ["drawn_nodes", "has_effect", "is_static", "static_nodes"]

_NUMBERS = (torch.SymInt, torch.SymBool, torch.SymFloat)


def static_nodes(program: Program) -> set[fx.Node]:
    """Every node that depends on no input of the network. The placeholders of parameters are among them."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if is_static(program, node, known):
            known.add(node)
    return known


def drawn_nodes(program: Program, static: Container[fx.Node]) -> set[fx.Node]:
    """Every node that depends on random numbers, and on no input of the network."""
    drawn: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output") or node in static or isinstance(node.meta.get("val"), _NUMBERS):
            continue
        if all(operand in static or operand in drawn for operand in node.all_input_nodes):
            drawn.add(node)
    return drawn


def is_static(program: Program, node: fx.Node, known: Container[fx.Node]) -> bool:
    """Whether a node depends on no input. `known` has those of its operands that depend on none."""
    if node.op == "placeholder":
        return node.name not in program.inputs
    if node.op == "output" or isinstance(node.meta.get("val"), _NUMBERS):
        return False
    if node.op == "call_module":
        module = program.graph_module.get_submodule(str(node.target))
        follows = isinstance(module, ModeSwitch) and not module.random
        if not follows and not isinstance(module, CustomFunction | GradientHook | WriteState):
            return False  # a custom function of a weight gives a weight; batch norm and dropout do not
    return all(operand in known for operand in node.all_input_nodes) and not has_effect(node)


def has_effect(node: fx.Node) -> bool:
    """Whether an operation writes state or draws random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
