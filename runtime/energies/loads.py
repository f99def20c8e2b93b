"""Compute the load of a block's conductances on every state, and the row sums of its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["add_row_sum_gradients", "loads_of", "magnitudes_of", "multiplying_weights", "over_samples", "row_sums_of"]


def multiplying_weights(program: BlockProgram) -> frozenset[int]:
    """Indices of the weights that multiply values. Biases do not."""
    return frozenset(
        i.weights[0] for layer in program.layers for i in layer.instructions if i.weights and i.weights[0] is not None
    )


def magnitudes_of(frame: Frame) -> Frame:
    """The block at |θ| without biases, with operators of absolute values. One sample is enough without random masks."""
    multiplying = multiplying_weights(frame.program)
    weights = [w.abs() if w is not None and place in multiplying else None for place, w in enumerate(frame.weights)]
    shapes = dict(frame.shapes)
    if frame.program.resizable and all(mask is None for mask in frame.drawn.values()):
        shapes = {register: torch.Size((1, *shape[1:])) for register, shape in shapes.items()}
    return Frame(frame.program.absolute, (), weights, dict(frame.drawn), shapes, frozen=True)


def over_samples(value: Tensor, magnitudes: Frame) -> Tensor:
    """A value of all samples, summed over them if `magnitudes` has only one."""
    one = magnitudes.program.resizable and all(mask is None for mask in magnitudes.drawn.values())
    return value.sum(0, keepdim=True) if one else value


def loads_of(frame: Frame, setting: Setting) -> list[Tensor | None]:
    """D^l − 1 of every layer, in a shape that broadcasts over its state; None if it feeds no other layer."""
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
    """max_i (|J_m| 1)_i of every layer, for the largest factors that random masks may have."""
    ones, states = _at_ones(magnitudes_of(frame))
    return tuple(_random_gain(frame, index) * float(ones.drive(index, states).max()) for index in range(len(states)))


def add_row_sum_gradients(
    frame: Frame, index: int, factor: float, gradients: list[Tensor | None], needed: Sequence[bool]
) -> None:
    """Add `factor` times the derivative of a layer's largest row sum by the magnitudes |θ|, of the first such row."""
    ones, states = _at_ones(magnitudes_of(frame))
    sums = ones.drive(index, states)
    row = torch.zeros_like(sums).reshape(-1)
    row[sums.reshape(-1).argmax()] = 1
    ones.pullback(
        index,
        row.reshape(sums.shape),
        registers=ones.operand_registers(index, states),
        gradients=gradients,
        needed=needed,
        bias=False,
        factor=factor * _random_gain(frame, index),
    )


def _at_ones(magnitudes: Frame) -> tuple[Frame, list[Tensor]]:
    """A block of magnitudes at inputs and states that are 1 everywhere, and these states."""
    program = magnitudes.program
    like = next(weight for weight in magnitudes.weights if weight is not None)
    inputs = [like.new_ones(magnitudes.shapes[index]) for index in range(program.inputs)]
    ones = Frame(program, inputs, magnitudes.weights, magnitudes.drawn, magnitudes.shapes, frozen=True)
    return ones, [like.new_ones(magnitudes.shapes[layer.drive]) for layer in program.layers]


def _random_gain(frame: Frame, index: int) -> float:
    """The most that random masks may add to a layer's row sums, as a factor."""
    gain = 1.0
    for instruction in frame.program.layers[index].instructions:
        gain = instruction.operator.gain(gain)
    return gain
