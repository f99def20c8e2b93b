"""Read block programs from JSON and check every value. This is the inverse of `program_json.py`.

Only operators and activations that both files list can be read, since a manifest names no Python object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ffebm_compiler.errors import ExportError, FFEBMError
from ffebm_compiler.files.checked_json import AtLeast, Malformed, short, typed, typed_fields
from ffebm_compiler.onnx.operators import operator_from_json
from ffebm_compiler.runtime.activations import table as activations
from ffebm_compiler.runtime.activations.table import Activation, PReLU, SplitReLU
from ffebm_compiler.runtime.program.block_program import BlockProgram, Instruction, Layer

__all__ = ["program_from_json"]

_ACTIVATIONS: Mapping[str, type[Activation]] = {
    kind.__name__: kind for kind in {type(a) for a in (*activations.ALL, PReLU(), SplitReLU(1, 1))}
}
_Register = Annotated[int, AtLeast(0, most=10**6)]


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
    feedback_weights: tuple[tuple[_Register, _Register], ...] = ()


def program_from_json(name: str, data: Mapping[str, Any]) -> BlockProgram:
    """The inverse of `program_to_json`.

    Raises:
        ExportError: the data is malformed or names an operator that this version does not have.
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
            feedback_weights=found.feedback_weights,
        )
    except Malformed as error:
        raise ExportError(f"the program of {name} in the manifest is malformed ({error}): export again") from error


def _check_registers(program: _Program) -> None:
    """Check that every register is written once, and before it is read."""
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
    if any(weight >= program.weights for pair in program.feedback_weights for weight in pair):
        raise Malformed(f"program.feedback_weights: the block has {program.weights} weights")
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
    except (FFEBMError, TypeError) as error:  # the class checks its own fields
        raise Malformed(f"{place}.settings: {error}") from error


def _instructions(items: tuple[_Instruction, ...], place: str) -> tuple[Instruction, ...]:
    return tuple(
        Instruction(
            operator_from_json(item.operator, item.operands, item.weights, f"{place}[{index}]"),
            item.operands,
            item.weights,
            item.output,
        )
        for index, item in enumerate(items)
    )
