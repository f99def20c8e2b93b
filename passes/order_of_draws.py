"""Order of draws: blocks and digital parts run so that random numbers are drawn in the source's order.

One seed then gives the same dropout masks, the same dropped layers, the same noise in the hybrid as
in the source. The partition sees to it that there is such an order. A plan edited by hand may have
none: a part of it then holds draws from before and after another part's.

Promise: an order in which the parts can run; `kept` is true where the draws are in the source's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ffebm_compiler.ir import OperationGraph, Program
from ffebm_compiler.passes.partition.decide import order_with_draws
from ffebm_compiler.runtime.feedforward.blocks import ReboundAttention, ReboundDropout
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch, TrainingMask

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


def in_order_of_draws(graph: OperationGraph, groups: Sequence[Sequence[str]]) -> Order:
    """An order of groups of operations by what they need, in which random numbers are drawn as in the source.

    Raises:
        PlanError: where the groups form a cycle.
    """
    order, kept = order_with_draws(graph, groups)
    return Order(tuple(place for place in order if isinstance(place, int)), kept)
