"""Written state: find the parameters and buffers that a forward of a lowered graph writes in every mode."""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.runtime.feedforward.fetch import Fetch
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch
from ffebm_compiler.runtime.feedforward.state import ReadState, WriteState

__all__ = ["names_of_written_state"]

_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)
_BY_INPUT, _STATISTICS = 5, (3, 4)


def names_of_written_state(lowered: fx.GraphModule) -> set[str]:
    """Names of the state that `WriteState` writes or that a norm updates in both modes.

    An example of such a norm is `F.batch_norm(..., training=True)`. Statistics of a batch norm that follows a module's
    flag are not among them.
    """
    found = {module.name for module in lowered.modules() if isinstance(module, WriteState)}
    return found | _updated_by_norms(lowered, {})


def _updated_by_norms(graph_module: fx.GraphModule, names: dict[fx.Node, str]) -> set[str]:
    """Names of the statistics that norms of a graph update. `names` are those of its placeholders."""
    found = set()
    for node in graph_module.graph.nodes:
        if node.target in _NORMS and node.args[_BY_INPUT]:
            found |= {names[node.args[index]] for index in _STATISTICS if node.args[index] in names}
        part = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, Fetch | ReadState):
            names[node] = part.name
        inner = (part.evaluation, part.training_part) if isinstance(part, ModeSwitch) else (part,)
        for each in inner:
            if isinstance(each, fx.GraphModule):
                placeholders = (one for one in each.graph.nodes if one.op == "placeholder")
                given = zip(placeholders, node.args, strict=True)
                found |= _updated_by_norms(each, {one: names[operand] for one, operand in given if operand in names})
    return found
