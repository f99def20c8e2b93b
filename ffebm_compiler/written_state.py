"""Written state: find the parameters and buffers that a forward of a lowered graph writes in every mode."""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.runtime.feedforward.fetch import Fetch
from ffebm_compiler.runtime.feedforward.state import WriteState

__all__ = ["names_of_written_state"]

_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)
_BY_INPUT, _STATISTICS = 5, (3, 4)


def names_of_written_state(lowered: fx.GraphModule) -> set[str]:
    """Names of the state that `WriteState` writes or that a norm updates in both modes.

    An example of such a norm is `F.batch_norm(..., training=True)`. Statistics of a batch norm that follows a module's
    flag are not among them.
    """
    names: dict[fx.Node, str] = {}
    found = {module.name for module in lowered.modules() if isinstance(module, WriteState)}
    for call in lowered.graph.nodes:
        part = lowered.get_submodule(str(call.target)) if call.op == "call_module" else None
        if isinstance(part, Fetch):
            names[call] = part.name
        if not isinstance(part, fx.GraphModule):
            continue
        placeholders = (node for node in part.graph.nodes if node.op == "placeholder")
        given = dict(zip(placeholders, call.args, strict=True))
        for node in part.graph.nodes:
            if node.target in _NORMS and node.args[_BY_INPUT]:
                statistics = (given.get(node.args[index]) for index in _STATISTICS)
                found |= {names[operand] for operand in statistics if operand in names}
    return found
