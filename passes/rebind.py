"""Rebind: batch norm and dropout follow the flags of the source's own modules again.

`torch.export` freezes `training` into a constant. So each batch norm or dropout node becomes a
call of a small module. That module reads the flag (and momentum, rate, counter) from the private copy
of the source at every call, while the tensors stay operands of the graph. Only the operation is
re-bound. The source's module is not called in its place, since it may do more than normalise (timm's
`BatchNormAct2d` also activates). If there is a capture in train mode too, the constants of the two captures
show whether the operation follows the flag at all (a frozen batch norm does not).

Promise: in eval mode the values are the captured ones, and after `train()` they are the source's
in train mode. Running statistics live in the source's own buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.passes.merge_modes import TRAINING
from ffebm_compiler.passes.training_reads import is_rebound
from ffebm_compiler.runtime.feedforward.blocks import (
    ReboundAttention,
    ReboundBatchNorm,
    ReboundDropout,
    ReboundInstanceNorm,
)
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch

__all__ = ["rebind"]

aten = torch.ops.aten
_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)


def _is_unbound(program: Program, node: fx.Node) -> bool:
    return node.op == "call_function" and _rebound_module(program, node) is not None


@ensures("follows a training flag of the source and is not bound to it", _is_unbound)
def rebind(program: Program) -> Program:
    """Replace batch norm, instance norm, dropout and attention dropout by modules bound to the source."""
    parts = [
        part
        for module in program.graph_module.children()
        if isinstance(module, ModeSwitch)
        for part in (module.evaluation, module.training_part)
    ]
    for graph_module in (program.graph_module, *parts):
        for index, node in enumerate(list(graph_module.graph.nodes)):
            found = _rebound_module(program, node) if node.op == "call_function" else None
            if found is not None:
                _replace(graph_module, node, f"rebound_{index}", *found)
        graph_module.graph.lint()
        graph_module.recompile()
    return program


def _rebound_module(program: Program, node: fx.Node) -> tuple[nn.Module, tuple[object, ...]] | None:
    """The module that replaces a node, and its operands; None if the node follows no flag."""
    if node.target is aten.batch_norm.default:
        x, weight, bias, mean, variance, training, momentum, eps = node.args[:8]
        flag = _flag_of(program, node, 5)
        alone = not isinstance(flag.owner, nn.SyncBatchNorm)  # in train mode the others' batches count too
        if not flag.follows or (training and mean is None and alone):
            return None  # the same in both modes (weight standardisation, frozen statistics)
        counts = flag.whole or flag.unknown
        norm = ReboundBatchNorm(flag.owner, bool(training), float(momentum), float(eps), counts)  # type: ignore[arg-type]
        return norm, (x, weight, bias, mean, variance)
    if node.target is aten.instance_norm.default and node.args[3] is not None:
        x, weight, bias, mean, variance, use_input, momentum, eps = node.args[:8]
        flag = _flag_of(program, node, 5)
        if not flag.follows:
            return None
        instance = ReboundInstanceNorm(flag.owner, bool(use_input), float(momentum), float(eps))  # type: ignore[arg-type]
        return instance, (x, weight, bias, mean, variance)
    if node.target in _DROPOUTS:
        x, rate, training = node.args[:3]
        flag = _flag_of(program, node, 2)
        if training or not flag.follows:
            return None  # the source drops out in both modes or in none
        kind = str(node.target).split(".")[1]
        return ReboundDropout(flag.owner, kind, float(rate)), (x,)  # type: ignore[arg-type]
    if node.target is aten.scaled_dot_product_attention.default and TRAINING in node.meta:
        rates = _rate(node.args[4] if len(node.args) > 4 else 0.0), _rate(node.meta[TRAINING][4])
        if rates[0] == rates[1]:
            return None
        settings = dict(node.kwargs)
        if len(node.args) > 5:
            settings["is_causal"] = node.args[5]
        return ReboundAttention(program.owner(node), rates[1], settings, rates[0]), tuple(node.args[:4])
    return None


def _rate(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


@dataclass(frozen=True)
class _Flag:
    """The training flag of an operation."""

    owner: nn.Module
    whole: bool
    """Whether the operation is the whole forward of one of torch's modules."""
    unknown: bool
    """Whether train mode could not be captured, so that only the flag can tell what it does."""
    follows: bool


def _flag_of(program: Program, node: fx.Node, index: int) -> _Flag:
    module = program.runner(node)
    whole = is_rebound(module) and not program.is_asked(module)
    owner = module if whole else program.owner(node)
    if whole:
        return _Flag(owner, whole, False, follows=True)
    if TRAINING not in node.meta:  # one capture: either no code reads a flag, or train mode could not be captured
        unknown = program.asks is None or bool(program.refused_in_training)
        return _Flag(owner, whole, unknown, follows=unknown)
    changes = bool(node.meta[TRAINING][index]) != bool(node.args[index])
    return _Flag(owner, whole, False, changes)


def _replace(
    graph_module: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, operands: tuple[object, ...]
) -> None:
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_before(node):
        fresh = graph_module.graph.call_module(name, operands)  # type: ignore[arg-type]
    fresh.meta = dict(node.meta)
    node.replace_all_uses_with(fresh)
    graph_module.graph.erase_node(node)
