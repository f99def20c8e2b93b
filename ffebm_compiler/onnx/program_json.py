"""Block programs as JSON: layers, instructions, operators and activations, by name and with their settings.

Only what is listed here can be read back (`program_file.py`): a manifest names no Python object.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffebm_compiler.errors import ExportError
from ffebm_compiler.runtime.activations import Activation, PReLU
from ffebm_compiler.runtime.contraction import Contraction
from ffebm_compiler.runtime.operators import (
    Concat,
    Convolution,
    Gain,
    Linear,
    Mask,
    Operator,
    Permute,
    Reshape,
    Scale,
    Sum,
    Wiring,
    slice_of,
)
from ffebm_compiler.runtime.program import BlockProgram, Instruction

__all__ = ["RESHAPES", "WIRING", "program_to_json"]

WIRING: Mapping[str, Callable[..., Tensor]] = {
    "avg_pool1d": F.avg_pool1d,
    "avg_pool2d": F.avg_pool2d,
    "avg_pool3d": F.avg_pool3d,
    "adaptive_avg_pool1d": F.adaptive_avg_pool1d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "mean": torch.mean,
    "select": torch.select,
    "slice": slice_of,
    "narrow": torch.narrow,
    "movedim": torch.movedim,
}
RESHAPES: Mapping[str, Callable[..., Tensor]] = {
    "reshape": torch.reshape,
    "flatten": torch.flatten,
    "unflatten": torch.unflatten,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
}


def program_to_json(program: BlockProgram) -> dict[str, Any]:
    """A block program as JSON values.

    Raises:
        ExportError: for an operator that has no form here, named with its layer's module path.
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
    }


def _activation_to_json(activation: Activation) -> dict[str, Any]:
    settings: dict[str, Any] = dataclasses.asdict(activation) if dataclasses.is_dataclass(activation) else {}
    if isinstance(activation, PReLU):  # its slopes are weights of the block
        settings = {}
    return {"kind": type(activation).__name__, "settings": {key: _number(value) for key, value in settings.items()}}


def _number(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _instruction_to_json(item: Instruction, owner: str) -> dict[str, Any]:
    return {
        "operator": _operator_to_json(item.operator, owner),
        "operands": list(item.operands),
        "weights": list(item.weights),
        "output": item.output,
    }


def _operator_to_json(operator: Operator, owner: str) -> dict[str, Any]:
    if isinstance(operator, Mask):  # dropout is the identity in eval mode
        return {"kind": "sum", "factors": [1.0], "constant": 0.0}
    if isinstance(operator, Linear):
        return {"kind": "linear"}
    if isinstance(operator, Contraction):
        return {"kind": "contraction", "equation": operator.equation}
    if isinstance(operator, Convolution):
        return _convolution_to_json(operator)
    if isinstance(operator, Sum):
        return {"kind": "sum", "factors": list(operator.factors), "constant": operator.constant}
    if isinstance(operator, Scale):
        return {"kind": "scale", "factor": operator.factor}
    if isinstance(operator, Gain):
        return {"kind": "gain"}
    if isinstance(operator, Concat):
        return {"kind": "concat", "dim": operator.dim}
    if isinstance(operator, Permute):
        return {"kind": "permute", "dims": list(operator.dims)}
    if isinstance(operator, Wiring):
        kind, table = ("reshape", RESHAPES) if isinstance(operator, Reshape) else ("wiring", WIRING)
        name = next((key for key, function in table.items() if function is operator.function), None)
        if name is not None and _plain((operator.arguments, operator.keywords)):
            keywords = {key: _lists(value) for key, value in operator.keywords}
            return {"kind": kind, "function": name, "arguments": _lists(operator.arguments), "keywords": keywords}
    raise ExportError(
        f"{owner} uses {operator!r}, which the ONNX export does not know: keep the layer digital "
        f"(force_digital={owner!r}) or take its operation out of block_ops"
    )


def _convolution_to_json(operator: Convolution) -> dict[str, Any]:
    padding = operator.arguments[1]
    return {
        "kind": "convolution",
        "stride": list(operator.stride),
        "padding": list(operator.padding),
        "padding_mode": padding if isinstance(padding, str) else "explicit",
        "dilation": list(operator.dilation),
        "transposed": operator.transposed,
        "output_padding": list(operator.output_padding),
        "groups": operator.groups,
    }


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value
