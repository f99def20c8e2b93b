"""Old values: which operations need the value of a parameter or buffer no more once it is overwritten."""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.ir import Program
from ffebm_compiler.passes.inline_regions import without_gradient

__all__ = ["is_done"]


def is_done(program: Program, reader: fx.Node, value: fx.Node) -> bool:
    """Whether a reader needs the old value no more when the new value is known, not even for a gradient."""
    return _leads_to(reader, value) and not _has_gradient(program, reader)


def _has_gradient(program: Program, node: fx.Node) -> bool:
    """Whether a value may be differentiated: it depends on inputs or parameters, and nothing cuts that off."""
    parameters = {name for name, _ in program.source.named_parameters(remove_duplicate=False)}
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or without_gradient(current) or current.target is torch.ops.aten.detach.default:
            continue
        seen.add(current)
        own = current.name in program.inputs or program.lifted.get(current.name) in parameters
        value = current.meta.get("val")
        if own and isinstance(value, torch.Tensor) and value.is_floating_point():
            return True
        pending.extend(current.all_input_nodes)
    return False


def _leads_to(node: fx.Node, value: fx.Node) -> bool:
    """Whether a value is computed from a node."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current is node:
            return True
        if current not in seen and current.op != "placeholder":
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False
