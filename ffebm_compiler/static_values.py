"""Values in a lowered graph that depend on parameters alone."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock

__all__ = ["static_value"]


def static_value(run: fx.GraphModule, node: Any, known: dict[fx.Node, Tensor | None]) -> Tensor | None:
    """Value of a node that depends on parameters alone; None if it depends on the inputs.

    What blocks return depends on the inputs. The graph behind them is not walked, so that neither depth nor time grow
    with the number of blocks.
    """
    if not isinstance(node, fx.Node):
        return None
    if node in known:
        return known[node]
    value: Tensor | None = None
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(run)
    elif node.op != "placeholder":
        module = run.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, EnergyBlock | FeedforwardBlock):  # nothing behind it is static for the block
            return None
        operands = {operand: static_value(run, operand, known) for operand in node.all_input_nodes}
        if all(operand is not None for operand in operands.values()):
            args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
            value = (module or node.target)(*args, **kwargs)  # type: ignore[operator]
    known[node] = value
    return value
