"""Write block programs as JSON: layers, instructions, operators and activations, by name and with their settings.

`program_file.py` reads them back. It knows only what is listed here, since a manifest names no Python object.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ffebm_compiler.onnx.operators import operator_to_json
from ffebm_compiler.runtime.activations.table import Activation, PReLU
from ffebm_compiler.runtime.program.block_program import BlockProgram, Instruction

__all__ = ["program_to_json"]


def program_to_json(program: BlockProgram) -> dict[str, Any]:
    """A block program as JSON values.

    Raises:
        ExportError: an operator has no form here; names its layer's module path.
    """
    return {
        "inputs": program.inputs,
        "weights": program.weights,
        "batched": program.batched,
        "layers": [
            {
                "name": layer.name,
                "activation": _activation_to_json(layer.activation),
                "instructions": [_instruction_to_json(item, layer.name) for item in layer.instructions],
                "drive": layer.drive,
                "state": layer.state,
                "parameters": list(layer.parameters),
            }
            for layer in program.layers
        ],
        "readout": [_instruction_to_json(item, program.name) for item in program.readout],
        "outputs": list(program.outputs),
        **({} if program.symmetric else {"feedback_weights": [list(pair) for pair in program.feedback_weights]}),
    }


def _activation_to_json(activation: Activation) -> dict[str, Any]:
    settings: dict[str, Any] = dataclasses.asdict(activation) if dataclasses.is_dataclass(activation) else {}
    if isinstance(activation, PReLU):  # its slopes are stored as weights of the block
        settings = {}
    return {"kind": type(activation).__name__, "settings": {key: _number(value) for key, value in settings.items()}}


def _number(value: Any) -> Any:
    """The number, or a text for infinity, which JSON does not have."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _instruction_to_json(item: Instruction, owner: str) -> dict[str, Any]:
    return {
        "operator": operator_to_json(item.operator, owner),
        "operands": list(item.operands),
        "weights": list(item.weights),
        "output": item.output,
    }
