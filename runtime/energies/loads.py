"""Compute the load of a block's conductances on every state, and the row sums of its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.operators import Linear

__all__ = [
    "add_load_gradients",
    "add_row_sum_gradients",
    "at_ones",
    "loads_of",
    "magnitudes_of",
    "multiplying_weights",
    "over_samples",
    "own_loads",
    "row_sums_of",
]


def multiplying_weights(program: BlockProgram) -> frozenset[int]:
    """Indices of the weights that multiply values. Biases do not."""
    return frozenset(
        i.weights[0] for layer in program.layers for i in layer.instructions if i.weights and i.weights[0] is not None
    )


def magnitudes_of(frame: Frame, nonnegative: bool = False, every_sample: bool = False) -> Frame:
    """The block at |θ| without biases, with operators of absolute values.

    It has one sample, which is enough without random masks, unless `every_sample` is asked for. Weights that are
    `nonnegative` are taken as they are, so that their derivative at 0 is that from above.
    """
    multiplying = multiplying_weights(frame.program)
    weights = [
        (w if nonnegative else w.abs()) if w is not None and place in multiplying else None
        for place, w in enumerate(frame.weights)
    ]
    shapes = dict(frame.shapes)
    if not every_sample and frame.program.resizable and all(mask is None for mask in frame.drawn.values()):
        shapes = {register: torch.Size((1, *shape[1:])) for register, shape in shapes.items()}
    return Frame(frame.program.absolute, (), weights, dict(frame.drawn), shapes, frozen=True)


def over_samples(value: Tensor, magnitudes: Frame) -> Tensor:
    """A value of all samples, summed over them if `magnitudes` has only one."""
    one = magnitudes.program.resizable and all(mask is None for mask in magnitudes.drawn.values())
    return value.sum(0, keepdim=True) if one else value


def own_loads(magnitudes: Frame) -> list[Tensor]:
    """|J_l| 1 of every layer, the sum over states, inputs and wires, in a shape that broadcasts over its state."""
    program = magnitudes.program
    matrices = [_matrices(magnitudes, index) for index in range(len(program.layers))]
    found = [
        None if value is None else value.sum(1).expand(magnitudes.shapes[layer.drive])
        for value, layer in zip(matrices, program.layers, strict=True)
    ]
    if all(value is not None for value in found):
        return [value for value in found if value is not None]
    ones, states = at_ones(magnitudes)
    return [ones.drive(index, states) if value is None else value for index, value in enumerate(found)]


def _matrices(magnitudes: Frame, index: int) -> Tensor | None:
    """|J_l|ᵀ of shape (1, in, out) if the drive of a layer is one linear layer of one value; None otherwise.

    Sums over it take a fraction of the time of products with ones.
    """
    instructions = magnitudes.program.layers[index].instructions  # none where a digital value is the drive
    first = instructions[0] if len(instructions) == 1 else None
    if first is None or not isinstance(first.operator, Linear) or first.weights[0] is None:
        return None
    weight = magnitudes.weights[first.weights[0]]
    return None if weight is None else first.operator.matrices(weight)


def loads_of(magnitudes: Frame, setting: Setting) -> list[Tensor | None]:
    """Σ_{m>l} γ_{l,m} A_m |J_{ml}|ᵀ 1 of every layer, in a shape that broadcasts over its state.

    A_m is 1 if there are no amplifiers. A layer that feeds no other one has None.
    """
    program = magnitudes.program
    found: list[Tensor | None] = [None] * len(program.layers)
    like = next(weight for weight in magnitudes.weights if weight is not None)
    for later, above in enumerate(program.upstream):
        if not above:
            continue
        layer = program.layers[later]
        gain = setting.amplifiers[later] if setting.amplifiers else 1.0
        matrices = _matrices(magnitudes, later)
        if matrices is None:
            ones = like.new_full(magnitudes.shapes[layer.drive], gain)
            parts = magnitudes.pullback(later, ones, states=True)
        else:
            sums, state = matrices.sum(2), layer.instructions[0].operands[0]
            parts = {state: (sums if gain == 1 else sums * gain).expand(magnitudes.shapes[state])}
        for earlier in above:
            part, ratio = parts[program.layers[earlier].state], setting.scales[later] / setting.scales[earlier]
            part = part if ratio == 1 else part * ratio
            present = found[earlier]
            found[earlier] = part if present is None else present + part
    return found


def add_load_gradients(
    magnitudes: Frame,
    setting: Setting,
    products: Sequence[Tensor | None],
    gradients: list[Tensor | None],
    needed: Sequence[bool],
) -> None:
    """Add the derivatives by |θ| of Σ_l ⟨products_l, D^l⟩ for the loads of `loads_of`."""
    program = magnitudes.program
    for index, layer in enumerate(program.layers):
        ratio, deviations = magnitudes.deviations(index, products, setting.scales)
        like = next((value for value in deviations if value is not None), None)
        if like is None:
            continue
        gain = setting.amplifiers[index] if setting.amplifiers else 1.0
        magnitudes.pullback(
            index,
            like.new_full(magnitudes.shapes[layer.drive], gain),
            registers=magnitudes.tangent_registers(index, deviations, program.operand_instructions[index]),
            gradients=gradients,
            needed=needed,
            bias=False,
            factor=ratio,
        )


def row_sums_of(frame: Frame) -> tuple[float, ...]:
    """max_i (|J_m| 1)_i of every layer, for the largest factors that random masks may have."""
    ones, states = at_ones(magnitudes_of(frame))
    return tuple(_random_gain(frame, index) * float(ones.drive(index, states).max()) for index in range(len(states)))


def add_row_sum_gradients(
    frame: Frame, index: int, factor: float, gradients: list[Tensor | None], needed: Sequence[bool]
) -> None:
    """Add `factor` times the derivative of a layer's largest row sum by the magnitudes |θ|, of the first such row."""
    ones, states = at_ones(magnitudes_of(frame))
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


def at_ones(magnitudes: Frame) -> tuple[Frame, list[Tensor]]:
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
