"""Order of draws: order the blocks and digital parts so that random numbers are drawn in the source's order.

One seed then gives the hybrid the same dropout masks, dropped layers and noise as the source. The
partition leaves such an order possible. A plan edited by hand may have none: one of its parts may draw both before and
after another one.

Promise: an order in which the parts can run. `kept` is true if it draws in the source's order.
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
    """The order in which groups of operations run."""

    groups: tuple[int, ...]
    kept: bool
    """Whether random numbers are drawn in the source's order."""


def draws(program: Program, node: fx.Node) -> bool:
    """Whether a node draws random numbers in at least one mode."""
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
    """An order in which groups of operations can run, and in which they draw as the source does if that is possible.

    Raises:
        PlanError: the groups form a cycle.
    """
    order, kept = order_with_draws(graph, groups)
    return Order(tuple(place for place in order if isinstance(place, int)), kept)
