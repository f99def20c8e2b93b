"""Order of draws: blocks and digital parts run so that random numbers are drawn in the source's order.

One seed then gives the same dropout masks, the same dropped layers, the same noise in the hybrid as
in the source. Where a part holds draws from before and after another part's, no order of parts does it.

Promise: an order in which the parts can run; `kept` is true where the draws are in the source's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ffebm_compiler.ir import OperationGraph, Program
from ffebm_compiler.passes.partition import quotient_order
from ffebm_compiler.runtime.feedforward import ReboundAttention, ReboundDropout
from ffebm_compiler.runtime.modes import ModeSwitch, TrainingMask

__all__ = ["Order", "draws", "in_order_of_draws"]


@dataclass(frozen=True)
class Order:
    """In which order groups of operations run."""

    groups: tuple[int, ...]
    kept: bool
    """Whether random numbers are drawn in the source's order."""


def draws(program: Program, node: fx.Node) -> bool:
    """Whether a node draws random numbers, in one mode at least."""
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(rate)
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    if node.op != "call_module":
        return False
    module = program.graph_module.get_submodule(str(node.target))
    if isinstance(module, ModeSwitch):
        return module.random
    return isinstance(module, ReboundDropout | ReboundAttention | TrainingMask)


def in_order_of_draws(program: Program, graph: OperationGraph, groups: Sequence[Sequence[str]]) -> Order:
    """Order groups of operations by what they need, and by their first random number where that leaves a choice.

    Raises:
        PlanError: where the groups form a cycle.
    """
    plain = quotient_order(graph, groups)
    home = {name: index for index, group in enumerate(groups) for name in group}
    random = [node.name for node in program.graph.nodes if node.name in home and draws(program, node)]
    rank = {place: index for index, place in enumerate(plain)}
    needs: dict[int, set[int]] = {index: set() for index in range(len(groups))}
    for operation in graph.operations:
        place = home[operation.name]
        needs[place] |= {home[name] for name in operation.inputs if name in home and home[name] != place}
    order: dict[int, None] = {}
    for first in (*(home[name] for name in random), *(place for place in plain if isinstance(place, int))):
        stack = [first]
        while stack:
            place = stack[-1]
            waiting = sorted((need for need in needs[place] if need not in order), key=rank.__getitem__, reverse=True)
            if waiting:
                stack.extend(waiting)
                continue
            order.setdefault(stack.pop())
    drawn = [name for place in order for name in groups[place] if name in set(random)]
    return Order(tuple(order), drawn == random)
