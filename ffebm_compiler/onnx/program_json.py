"""Block programs as JSON: layers, instructions, operators and activations, by name and with their settings.

Only what is listed here can be read back: a manifest names no Python object.
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
from ffebm_compiler.runtime import activations, pointwise
from ffebm_compiler.runtime.activations import Activation
from ffebm_compiler.runtime.contraction import Contraction
from ffebm_compiler.runtime.operators import (
    Concat,
    Convolution,
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
from ffebm_compiler.runtime.program import BlockProgram, Instruction, Layer

__all__ = ["program_from_json", "program_to_json"]

_CONVOLUTIONS: Mapping[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): pointwise.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): pointwise.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
_WIRING: Mapping[str, Callable[..., Tensor]] = {
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
_RESHAPES: Mapping[str, Callable[..., Tensor]] = {
    "reshape": torch.reshape,
    "flatten": torch.flatten,
    "unflatten": torch.unflatten,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
}
_ACTIVATIONS: Mapping[str, type[Activation]] = {kind.__name__: kind for kind in {type(a) for a in activations.ALL}}


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
            }
            for layer in program.layers
        ],
        "readout": [_instruction_to_json(item, program.name) for item in program.readout],
        "outputs": list(program.outputs),
    }


def program_from_json(name: str, data: Mapping[str, Any]) -> BlockProgram:
    """The inverse of `program_to_json`.

    Raises:
        ExportError: where the data is malformed or names an operator that this version does not have.
    """
    try:
        return BlockProgram(
            name=name,
            inputs=int(data["inputs"]),
            weights=int(data["weights"]),
            layers=tuple(
                Layer(
                    str(layer["name"]),
                    _activation_from_json(layer["activation"]),
                    tuple(_instruction_from_json(item) for item in layer["instructions"]),
                    int(layer["drive"]),
                    int(layer["state"]),
                )
                for layer in data["layers"]
            ),
            readout=tuple(_instruction_from_json(item) for item in data["readout"]),
            outputs=tuple(int(register) for register in data["outputs"]),
            batched=bool(data["batched"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"the program of {name} in the manifest is malformed ({type(error).__name__}: {error}): export again"
        ) from error


def _activation_to_json(activation: Activation) -> dict[str, Any]:
    settings: dict[str, Any] = dataclasses.asdict(activation) if dataclasses.is_dataclass(activation) else {}
    return {"kind": type(activation).__name__, "settings": {key: _number(value) for key, value in settings.items()}}


def _activation_from_json(data: Mapping[str, Any]) -> Activation:
    settings = {key: float(value) if value in ("inf", "-inf") else value for key, value in data["settings"].items()}
    return _ACTIVATIONS[data["kind"]](**settings)


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


def _instruction_from_json(data: Mapping[str, Any]) -> Instruction:
    return Instruction(
        _operator_from_json(data["operator"]),
        tuple(int(register) for register in data["operands"]),
        tuple(None if index is None else int(index) for index in data["weights"]),
        int(data["output"]),
    )


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
    if isinstance(operator, Concat):
        return {"kind": "concat", "dim": operator.dim}
    if isinstance(operator, Permute):
        return {"kind": "permute", "dims": list(operator.dims)}
    if isinstance(operator, Wiring):
        kind, table = ("reshape", _RESHAPES) if isinstance(operator, Reshape) else ("wiring", _WIRING)
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


def _operator_from_json(data: Mapping[str, Any]) -> Operator:
    kind = data["kind"]
    if kind == "linear":
        return Linear()
    if kind == "contraction":
        return Contraction(str(data["equation"]))
    if kind == "convolution":
        return _convolution_from_json(data)
    if kind == "sum":
        return Sum(tuple(float(factor) for factor in data["factors"]), float(data["constant"]))
    if kind == "scale":
        return Scale(float(data["factor"]))
    if kind == "concat":
        return Concat(int(data["dim"]))
    if kind == "permute":
        return Permute(tuple(int(dim) for dim in data["dims"]))
    if kind in ("reshape", "wiring"):
        table, form = (_RESHAPES, Reshape) if kind == "reshape" else (_WIRING, Wiring)
        arguments, keywords = _tuples(data["arguments"]), _tuples(list(data["keywords"].items()))
        return form(table[data["function"]], arguments, keywords)
    raise ValueError(f"unknown operator {kind!r}")


def _convolution_from_json(data: Mapping[str, Any]) -> Convolution:
    stride, dilation = _tuples(data["stride"]), _tuples(data["dilation"])
    padding, extra = _tuples(data["padding"]), _tuples(data["output_padding"])
    groups, transposed = int(data["groups"]), bool(data["transposed"])
    given = padding if data["padding_mode"] == "explicit" else str(data["padding_mode"])
    arguments = (stride, padding, extra, groups, dilation) if transposed else (stride, given, dilation, groups)
    function = _CONVOLUTIONS[len(stride), transposed]
    return Convolution(function, arguments, stride, padding, dilation, transposed, extra, groups)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, tuple | list) else value
