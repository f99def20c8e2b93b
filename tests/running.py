"""Run a captured program as it is after any pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ffebm_compiler.ir import Program


def run(program: Program, *inputs: Tensor) -> Any:
    """The value of a program's graph, with the tensors of its source."""
    state = {**dict(program.source.named_parameters()), **dict(program.source.named_buffers())}
    given_inputs = dict(zip(program.inputs, inputs, strict=True))
    operands = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = node.name
            operands.append(
                state[program.lifted[name]]
                if name in program.lifted
                else program.constants.get(name, given_inputs.get(name))
            )
    program.graph_module.recompile()
    return program.graph_module(*operands)[0]


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op in ("call_function", "call_module")]
