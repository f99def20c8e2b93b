"""Block programs from JSON: the inverse of `program_json.py`, every value checked.

Only what the two list can be read: a manifest names no Python object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ffebm_compiler.checked_json import AtLeast, Malformed, short, typed, typed_fields
from ffebm_compiler.errors import ExportError, FFEBMError
from ffebm_compiler.onnx.program_json import RESHAPES, WIRING
from ffebm_compiler.runtime import activations, pointwise
from ffebm_compiler.runtime.activations import Activation, PReLU
from ffebm_compiler.runtime.contraction import Contraction
from ffebm_compiler.runtime.operators import (
    Concat,
    Convolution,
    Gain,
    Linear,
    Operator,
    Permute,
    Reshape,
    Scale,
    Sum,
    Wiring,
)
from ffebm_compiler.runtime.program import BlockProgram, Instruction, Layer

__all__ = ["program_from_json"]

_CONVOLUTIONS: Mapping[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): pointwise.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): pointwise.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
_ACTIVATIONS: Mapping[str, type[Activation]] = {
    kind.__name__: kind for kind in {type(a) for a in (*activations.ALL, PReLU())}
}
_MOST = 1 << 16
"""The largest stride, padding or size of a pooled output: what is larger would fill the memory."""
_Register = Annotated[int, AtLeast(0, most=10**6)]
_Small = Annotated[int, AtLeast(0, most=_MOST)]
_Step = Annotated[int, AtLeast(1, most=_MOST)]


@dataclass(frozen=True)
class _Activation:
    kind: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Instruction:
    operator: Mapping[str, Any]
    operands: tuple[_Register, ...]
    weights: tuple[_Register | None, ...]
    output: _Register


@dataclass(frozen=True)
class _Layer:
    name: str
    activation: _Activation
    instructions: tuple[_Instruction, ...]
    drive: _Register
    state: _Register
    parameters: tuple[_Register, ...] = ()


@dataclass(frozen=True)
class _Program:
    inputs: _Register
    weights: _Register
    batched: bool
    layers: tuple[_Layer, ...]
    readout: tuple[_Instruction, ...]
    outputs: tuple[_Register, ...]


@dataclass(frozen=True)
class _Linear:
    kind: str


@dataclass(frozen=True)
class _Contraction:
    kind: str
    equation: str


@dataclass(frozen=True)
class _Sum:
    kind: str
    factors: tuple[float, ...]
    constant: float


@dataclass(frozen=True)
class _Scale:
    kind: str
    factor: float


@dataclass(frozen=True)
class _Gain:
    kind: str


@dataclass(frozen=True)
class _Concat:
    kind: str
    dim: Annotated[int, AtLeast(-64, most=64)]


@dataclass(frozen=True)
class _Permute:
    kind: str
    dims: tuple[Annotated[int, AtLeast(-64, most=64)], ...]


@dataclass(frozen=True)
class _Wiring:
    kind: str
    function: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class _Convolution:
    kind: str
    stride: tuple[_Step, ...]
    padding: tuple[_Small, ...]
    padding_mode: Literal["explicit", "same", "valid"]
    dilation: tuple[_Step, ...]
    transposed: bool
    output_padding: tuple[_Small, ...]
    groups: _Step


_OPERATORS: Mapping[str, Any] = {
    "linear": _Linear,
    "contraction": _Contraction,
    "convolution": _Convolution,
    "sum": _Sum,
    "scale": _Scale,
    "gain": _Gain,
    "concat": _Concat,
    "permute": _Permute,
    "reshape": _Wiring,
    "wiring": _Wiring,
}


def program_from_json(name: str, data: Mapping[str, Any]) -> BlockProgram:
    """The inverse of `program_to_json`.

    Raises:
        ExportError: where the data is malformed or names an operator that this version does not have.
    """
    try:
        found: _Program = typed(_Program, data, "program")
        _check_registers(found)
        return BlockProgram(
            name=name,
            inputs=found.inputs,
            weights=found.weights,
            layers=tuple(
                Layer(
                    layer.name,
                    _activation(layer.activation, f"program.layers[{index}].activation"),
                    _instructions(layer.instructions, f"program.layers[{index}].instructions"),
                    layer.drive,
                    layer.state,
                    layer.parameters,
                )
                for index, layer in enumerate(found.layers)
            ),
            readout=_instructions(found.readout, "program.readout"),
            outputs=found.outputs,
            batched=found.batched,
        )
    except Malformed as error:
        raise ExportError(f"the program of {name} in the manifest is malformed ({error}): export again") from error


def _check_registers(program: _Program) -> None:
    """That every register is written once, before it is read."""
    known = set(range(program.inputs))
    states = [layer.state for layer in program.layers]
    if len(set(states)) != len(states) or known & set(states):
        raise Malformed("program.layers: two states share a register, or one is an input's")

    def follow(instructions: tuple[_Instruction, ...], place: str) -> None:
        for index, item in enumerate(instructions):
            unknown = [register for register in item.operands if register not in known]
            if unknown:
                raise Malformed(f"{place}[{index}].operands: register {unknown[0]} is read before it is written")
            if item.output in known or item.output in states:
                raise Malformed(f"{place}[{index}].output: register {item.output} is written twice")
            if any(weight is not None and weight >= program.weights for weight in item.weights):
                raise Malformed(f"{place}[{index}].weights: the block has {program.weights} weights")
            known.add(item.output)

    for index, layer in enumerate(program.layers):
        place = f"program.layers[{index}]"
        follow(layer.instructions, f"{place}.instructions")
        if layer.drive not in known:
            raise Malformed(f"{place}.drive: register {layer.drive} is never written")
        known.add(layer.state)
        if len(layer.parameters) != (layer.activation.kind == PReLU.__name__):
            raise Malformed(f"{place}.parameters: one weight for a PReLU, none for another activation")
        if any(weight >= program.weights for weight in layer.parameters):
            raise Malformed(f"{place}.parameters: the block has {program.weights} weights")
    follow(program.readout, "program.readout")
    for register in program.outputs:
        if register not in known:
            raise Malformed(f"program.outputs: register {register} is never written")


def _activation(found: _Activation, place: str) -> Activation:
    if found.kind not in _ACTIVATIONS:
        raise Malformed(f"{place}.kind: expected one of {', '.join(_ACTIVATIONS)}, got {short(found.kind)}")
    kind = _ACTIVATIONS[found.kind]
    if kind is PReLU and not found.settings:
        return PReLU()
    infinite = {key: float(value) for key, value in found.settings.items() if value in ("inf", "-inf")}
    finite = {key: 0.0 if key in infinite else value for key, value in found.settings.items()}
    try:
        return kind(**{**typed_fields(kind, finite, f"{place}.settings"), **infinite})
    except (FFEBMError, TypeError) as error:  # what the class itself checks
        raise Malformed(f"{place}.settings: {error}") from error


def _instructions(items: tuple[_Instruction, ...], place: str) -> tuple[Instruction, ...]:
    return tuple(
        Instruction(_operator(item, f"{place}[{index}]"), item.operands, item.weights, item.output)
        for index, item in enumerate(items)
    )


def _operator(item: _Instruction, place: str) -> Operator:
    inside, kind = f"{place}.operator", item.operator.get("kind")
    if not isinstance(kind, str) or kind not in _OPERATORS:
        raise Malformed(f"{inside}: unknown operator {short(kind)}")
    found = typed(_OPERATORS[kind], item.operator, inside)
    operands = len(found.factors) if kind == "sum" else max(1, len(item.operands)) if kind == "concat" else 1
    if len(item.operands) != operands or not operands:
        raise Malformed(f"{place}.operands: expected {max(1, operands)}, got {len(item.operands)}")
    if kind in ("linear", "convolution") and (len(item.weights) != 2 or item.weights[0] is None):
        raise Malformed(f"{place}.weights: expected a weight and a bias, which may be null")
    if kind in ("contraction", "gain") and (len(item.weights) != 1 or item.weights[0] is None):
        raise Malformed(f"{place}.weights: expected one weight")
    if kind == "linear":
        return Linear()
    if kind == "contraction":
        return _contraction(found, inside)
    if kind == "convolution":
        return _convolution(found, inside)
    if kind == "sum":
        return Sum(found.factors, found.constant)
    if kind == "scale":
        return Scale(found.factor)
    if kind == "gain":
        return Gain()
    if kind == "concat":
        return Concat(found.dim)
    if kind == "permute":
        return Permute(found.dims)
    return _wiring(found, inside)


def _contraction(found: _Contraction, place: str) -> Contraction:
    match = re.fullmatch(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)", found.equation)
    if match is None or any(len(set(part)) != len(part) for part in match.groups()):
        raise Malformed(f"{place}.equation: expected one such as 'bnd,hde->bhne', got {short(found.equation)}")
    if not set(match[3]) <= {*match[1], *match[2]}:
        raise Malformed(f"{place}.equation: the result has an index that neither operand has")
    return Contraction(found.equation)


def _wiring(found: _Wiring, place: str) -> Wiring:
    table, form = (RESHAPES, Reshape) if found.kind == "reshape" else (WIRING, Wiring)
    if found.function not in table:
        raise Malformed(f"{place}.function: expected one of {', '.join(table)}, got {short(found.function)}")
    most = _MOST if "pool" in found.function else 2**63 - 1
    arguments = _plain(list(found.arguments), f"{place}.arguments", most)
    keywords = tuple((key, _plain(value, f"{place}.keywords.{key}", most)) for key, value in found.keywords.items())
    return form(table[found.function], arguments, keywords)


def _convolution(found: _Convolution, place: str) -> Convolution:
    sizes = {len(found.stride), len(found.padding), len(found.dilation)}
    function = _CONVOLUTIONS.get((len(found.stride), found.transposed))
    if function is None or len(sizes) != 1:
        raise Malformed(f"{place}: expected stride, padding and dilation of one, two or three numbers each")
    stride, dilation, padding, extra = found.stride, found.dilation, found.padding, found.output_padding
    given = padding if found.padding_mode == "explicit" else found.padding_mode
    arguments = (
        (stride, padding, extra, found.groups, dilation)
        if found.transposed
        else (stride, given, dilation, found.groups)
    )
    return Convolution(function, arguments, stride, padding, dilation, found.transposed, extra, found.groups)


def _plain(value: Any, place: str, most: int) -> Any:
    """Numbers, texts and lists of them, with tuples for lists."""
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for inner in value if isinstance(inner, list | tuple) for item in inner):
            raise Malformed(f"{place}: lists are nested too deeply")
        return tuple(_plain(item, place, most) for item in value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return typed(str, value, place)
    if isinstance(value, int):
        return typed(Annotated[int, AtLeast(-most, most=most)], value, place)
    return typed(float, value, place)
