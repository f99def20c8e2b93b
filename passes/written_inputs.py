"""Written inputs: what a forward writes into a tensor that it was given reaches the caller's tensor.

`functionalize` knows the last value of each input that is written in place. Here the last operation of a forward
copies it back (`WriteInput`), and everything else reads a copy of the input as it came.

Promise: after a forward the caller's tensors hold what the source's forward would leave in them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ffebm_compiler.ir import Program
from ffebm_compiler.runtime.feedforward.state import WriteInput

__all__ = ["write_inputs"]


def write_inputs(program: Program, written: Mapping[fx.Node, fx.Node]) -> None:
    """Write the last value of each written input back. `written` maps the input to that value."""
    graph = program.graph
    output = next(node for node in graph.nodes if node.op == "output")
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for place, (root, value) in enumerate(written.items()):
        with graph.inserting_after(last):
            came = graph.call_function(torch.ops.aten.clone.default, (root,))
        came.meta = dict(root.meta)
        root.replace_all_uses_with(came, lambda user, came=came: user is not came)  # type: ignore[misc]
        name = f"write_input_{place}"
        program.graph_module.add_submodule(name, WriteInput(root.name))
        with graph.inserting_before(output):
            call = graph.call_module(name, (root, came if value is root else value, came))
        call.meta = {"val": root.meta["val"], "nn_module_stack": value.meta.get("nn_module_stack", {})}
