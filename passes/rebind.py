"""Rebind: batch norm and dropout follow the flags of the source's own modules again.

`torch.export` freezes `training` into a constant. Each batch norm or dropout node becomes a
call of a small module that reads the flag (and momentum, rate, counter) from the private copy
of the source at every call, while its tensors stay operands of the graph. The operation is
re-bound, not the module called, since a module may do more than normalise (timm's
`BatchNormAct2d` also activates).

Promise: in eval mode the values are the captured ones; after `train()` they are the source's
in train mode; running statistics live in the source's own buffers.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ffebm_compiler.ir import Program, module_path
from ffebm_compiler.runtime.feedforward import (
    ReboundAttention,
    ReboundBatchNorm,
    ReboundDropout,
    ReboundInstanceNorm,
)

__all__ = ["rebind"]

_DROPOUTS = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
)


def rebind(program: Program) -> Program:
    """Replace batch norm, instance norm, dropout and attention dropout by modules bound to the source."""
    for index, node in enumerate(list(program.graph.nodes)):
        if node.op != "call_function":
            continue
        owner = program.owner(node)
        bound: nn.Module | None = None
        operands: tuple[object, ...] = ()
        if node.target is torch.ops.aten.batch_norm.default:
            x, weight, bias, mean, variance, training, momentum, eps = node.args[:8]
            if training and mean is None:
                continue  # by the batch's own statistics in both modes (weight standardisation, too)
            bound = ReboundBatchNorm(owner, bool(training), float(momentum), float(eps))
            operands = (x, weight, bias, mean, variance)
        elif node.target is torch.ops.aten.instance_norm.default and node.args[3] is not None:
            x, weight, bias, mean, variance, use_input, momentum, eps = node.args[:8]
            bound = ReboundInstanceNorm(owner, bool(use_input), float(momentum), float(eps))
            operands = (x, weight, bias, mean, variance)
        elif node.target in _DROPOUTS:
            x, rate, training = node.args[:3]
            if training:
                continue  # the source asks for it in eval mode too
            kind = str(node.target).split(".")[1]
            bound = ReboundDropout(owner, kind, float(rate))
            operands = (x,)
        elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
            rate = _attention_rate(program, node, owner)
            if not rate:
                continue
            settings = dict(node.kwargs)
            if len(node.args) > 5:
                settings["is_causal"] = node.args[5]
            bound = ReboundAttention(owner, rate, settings)
            operands = tuple(node.args[:4])
        if bound is not None:
            _replace(program, node, f"rebound_{index}", bound, operands)
    program.graph.lint()
    return program


def _replace(program: Program, node: fx.Node, name: str, module: nn.Module, operands: tuple[object, ...]) -> None:
    program.graph_module.add_submodule(name, module)
    with program.graph.inserting_before(node):
        fresh = program.graph.call_module(name, operands)  # type: ignore[arg-type]
    fresh.meta = dict(node.meta)
    node.replace_all_uses_with(fresh)
    program.graph.erase_node(node)


def _attention_rate(program: Program, node: fx.Node, owner: nn.Module) -> float:
    """Dropout rate of an attention in train mode, which an eval-mode capture does not hold."""
    for name in ("dropout", "attn_drop", "attention_dropout", "attn_dropout", "dropout_prob", "dropout_p"):
        value = getattr(owner, name, None)
        if isinstance(value, nn.Dropout):
            return float(value.p)
        if isinstance(value, float):
            return value
    if owner is program.source or type(owner).__name__.lower().find("attention") >= 0:
        program.note(
            f"attention dropout of {module_path(node)!r}, if it has any in train mode, is not in the eval-mode "
            "capture and is not applied"
        )
    return 0.0
