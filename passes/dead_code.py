"""Dead code: erase operations whose results nothing reads.

A branch whose result is thrown away would otherwise join a block, and its feedback would change
what the network computes. An operation with an effect stays: it writes a buffer, draws random numbers,
or updates the running statistics of a batch norm. `for_effects_alone` finds the operations
that only such effects need, and `annotate` keeps those digital.

Promise: every operation without an effect has a user, and the output's value is unchanged.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.runtime.feedforward.custom_function import CustomFunction, GradientHook

__all__ = ["dead_code", "erase_dead", "for_effects_alone"]


def _is_dead(program: Program, node: fx.Node) -> bool:
    return node.op not in ("placeholder", "output") and not node.users and not _has_effect(program, node)


@ensures("is read by nothing and does nothing", _is_dead)
def dead_code(program: Program) -> Program:
    """Erase what nothing reads."""
    erase_dead(program)
    return program


def erase_dead(program: Program) -> None:
    """Erase operations whose results nothing reads, from the end of the graph; passes call it to clean up."""
    for node in reversed(list(program.graph.nodes)):
        if not _is_dead(program, node):
            continue
        program.graph.erase_node(node)
        if node.op == "call_module":
            program.graph_module.delete_submodule(str(node.target))
    program.graph.lint()


def for_effects_alone(program: Program) -> set[fx.Node]:
    """The operations that the output does not depend on; they are there for their effects."""
    leading: set[fx.Node] = set()
    stack = [node for node in program.graph.nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        if node not in leading:
            leading.add(node)
            stack.extend(node.all_input_nodes)
    return {node for node in program.graph.nodes if node.op != "placeholder" and node not in leading}


def _has_effect(program: Program, node: fx.Node) -> bool:
    """Whether running a node does more than compute its value."""
    if node.op == "call_module":
        module = program.graph_module.get_submodule(str(node.target))
        return not isinstance(module, CustomFunction | GradientHook)
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        return schema.is_mutable or not schema.returns or torch.Tag.nondeterministic_seeded in node.target.tags
    return node.is_impure()
