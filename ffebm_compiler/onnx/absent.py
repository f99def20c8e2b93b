"""Absent values: values that exist in train mode alone, and that an export in eval mode does not have."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from ffebm_compiler.runtime.feedforward.modes import ModeSwitch

__all__ = ["absent_outputs"]


def absent_outputs(part: fx.GraphModule, operands: Sequence[bool]) -> list[bool]:
    """For each output of a part, whether it is None in eval mode, given the same for each operand."""
    given = iter(operands)
    known: dict[fx.Node, bool | tuple[bool, ...]] = {}
    for node in part.graph.nodes:
        if node.op == "output":
            return [known[result] is True for result in node.args[0]]
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.target is operator.getitem and isinstance(several := known[node.args[0]], tuple):
            known[node] = several[node.args[1]]
        else:
            known[node] = _is_absent(part, node)
    raise AssertionError("a digital part has an output node")


def _is_absent(part: fx.GraphModule, node: fx.Node) -> bool | tuple[bool, ...]:
    module = part.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, ModeSwitch):
        return False
    result = next(inner for inner in module.evaluation.graph.nodes if inner.op == "output").args[0]
    return tuple(value is None for value in result) if isinstance(result, tuple | list) else result is None
