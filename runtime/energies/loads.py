"""What the conductances of a block load: row sums of its layers, and the load on every state."""

from __future__ import annotations

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["loads_of", "magnitudes_of", "multiplying_weights", "over_samples", "row_sums_of"]


def multiplying_weights(program: BlockProgram) -> frozenset[int]:
    """The weights that multiply values, as biases do not."""
    return frozenset(
        i.weights[0] for layer in program.layers for i in layer.instructions if i.weights and i.weights[0] is not None
    )


def magnitudes_of(frame: Frame) -> Frame:
    """The block at |θ| without biases, with operators of absolute values: of one sample where all samples are alike."""
    multiplying = multiplying_weights(frame.program)
    weights = [w.abs() if w is not None and place in multiplying else None for place, w in enumerate(frame.weights)]
    shapes = dict(frame.shapes)
    if frame.program.resizable and all(mask is None for mask in frame.drawn.values()):
        shapes = {register: torch.Size((1, *shape[1:])) for register, shape in shapes.items()}
    return Frame(frame.program.absolute, (), weights, dict(frame.drawn), shapes, frozen=True)


def over_samples(value: Tensor, magnitudes: Frame) -> Tensor:
    """A value of all samples, summed over them where `magnitudes` is of one."""
    one = magnitudes.program.resizable and all(mask is None for mask in magnitudes.drawn.values())
    return value.sum(0, keepdim=True) if one else value


def loads_of(frame: Frame, setting: Setting) -> list[Tensor | None]:
    """D^l − 1 of every layer, to be broadcast over its state; None where it feeds no other."""
    program, magnitudes = frame.program, magnitudes_of(frame)
    found: list[Tensor | None] = [None] * len(program.layers)
    like = next(weight for weight in magnitudes.weights if weight is not None)
    for later, above in enumerate(program.upstream):
        if not above:
            continue
        layer = program.layers[later]
        ones = like.new_full(magnitudes.shapes[layer.drive], setting.amplifiers[later])
        parts = magnitudes.pullback(later, ones, states=True)
        for earlier in above:
            part = parts[program.layers[earlier].state] * (setting.scales[later] / setting.scales[earlier])
            present = found[earlier]
            found[earlier] = part if present is None else present + part
    return found


def row_sums_of(frame: Frame) -> tuple[float, ...]:
    """max_i (|J_m| 1)_i of every layer, with the most that random masks may add."""
    magnitudes = magnitudes_of(frame)
    program = magnitudes.program
    like = next(weight for weight in magnitudes.weights if weight is not None)
    inputs = [like.new_ones(magnitudes.shapes[index]) for index in range(program.inputs)]
    ones = Frame(program, inputs, magnitudes.weights, magnitudes.drawn, magnitudes.shapes, frozen=True)
    states = [like.new_ones(magnitudes.shapes[layer.drive]) for layer in program.layers]
    found = []
    for index, layer in enumerate(program.layers):
        gain = 1.0
        for instruction in layer.instructions:
            gain = instruction.operator.gain(gain)
        found.append(gain * float(ones.drive(index, states).max()))
    return tuple(found)
