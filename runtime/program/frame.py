"""Evaluate a block program: its drives, their Jacobian-vector products J_l v, and the transposes J_lᵀ p.

Values that depend only on the inputs are evaluated once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.runtime.activations.table import Activation
from ffebm_compiler.runtime.program.block_program import BlockProgram, Instruction, Layer
from ffebm_compiler.runtime.program.reads import Reads
from ffebm_compiler.runtime.solvers.pace import Pace, Paces

__all__ = ["Frame", "take_rows"]


class Frame:
    """One evaluation of a block program: inputs, weights, and values that depend on them alone."""

    def __init__(
        self,
        program: BlockProgram,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        drawn: dict[int, Tensor | None] | None = None,
        shapes: dict[int, torch.Size] | None = None,
        frozen: bool = False,
    ) -> None:
        self.program = program
        self.inputs = tuple(inputs)
        self.weights = tuple(weights)
        self.drawn = drawn if drawn is not None else {}
        """Register -> mask or winners. `frozen` keeps the winners of the equilibrium."""
        self.frozen = frozen
        self.shapes = shapes if shapes is not None else {}
        self.shapes.update({index: value.shape for index, value in enumerate(inputs)})
        self._fixed: dict[int, Tensor] = dict(enumerate(self.inputs))
        self.memory: dict[Any, Any] = {}
        """Values that the energy has computed from these weights, kept for the next phase."""
        self.training = False
        """Whether the block is evaluated for a gradient alone: with the tolerances of training."""
        self.paces: Paces | None = None
        """Where the block keeps the number of sweeps of its phases; None: it keeps none."""
        self.coarse = False
        """Whether products of values that depend on states are computed in bfloat16."""
        self.autocast = False
        """Whether all products are, also those of weight gradients, as the source's are under autocast."""
        self.light = False
        """Whether products that change a gradient little are computed in bfloat16 (`runtime/program/light.py`)."""
        self.reads: Reads | None = None
        """The noise and the converters of reading the arrays, at every product; None if a read is exact."""
        self._in_bfloat16: dict[int, Tensor] = {}
        self._back: Frame | None = None
        self.activations = tuple(self._bound(layer) for layer in program.layers)
        """σ_l with the present values of its parameters."""

    @property
    def masked(self) -> bool:
        """Whether this forward has drawn random masks."""
        return any(self.drawn.get(register) is not None for register in self.program.masks)

    @property
    def back(self) -> Frame:
        """The frame whose pullbacks are the feedback. It is this one if the feedback is tied (`BlockProgram.back`)."""
        if self.program.symmetric:
            return self
        if self._back is None:
            self._back = Frame(self.program.back, (), self.weights, self.drawn, self.shapes, frozen=True)
            self._back._in_bfloat16 = self._in_bfloat16
        self._back.coarse, self._back.autocast, self._back.reads = self.coarse, self.autocast, self.reads
        return self._back

    def _bound(self, layer: Layer) -> Activation:
        found = [self.weights[index] for index in layer.parameters]
        return layer.activation.bound([value for value in found if value is not None]) if found else layer.activation

    @property
    def samples(self) -> int | None:
        """Number of independent samples; None if the block cannot be evaluated for some of them alone."""
        return self.inputs[0].shape[0] if self.program.resizable and self.inputs else None

    @property
    def evaluated(self) -> bool:
        """Whether every drive has been evaluated once, so that shapes and winners are known."""
        return all(
            layer.drive in self.shapes and all(i.kept in self.drawn for i in layer.instructions if i.operator.selects)
            for layer in self.program.layers
        )

    @contextmanager
    def lightly(self) -> Iterator[None]:
        """Compute every product in bfloat16 while the context is open, if the frame is `light`."""
        before, self.autocast = self.autocast, self.autocast or self.light
        try:
            yield
        finally:
            self.autocast = before

    def pace(self, phase: str) -> Pace | None:
        """The pace of a phase, by a name that is the same in every step."""
        return None if self.paces is None else self.paces.of(phase)

    def narrowed(self, rows: Tensor) -> Frame:
        """The same block for some of the samples."""
        samples = self.samples
        drawn = {k: None if value is None else take_rows(value, rows) for k, value in self.drawn.items()}
        inputs = [take_rows(value, rows) for value in self.inputs]
        shapes = {register: torch.Size((len(rows), *shape[1:])) for register, shape in self.shapes.items()}
        assert samples is not None
        frame = Frame(self.program, inputs, self.weights, drawn, shapes, self.frozen)
        return self._as_precise(frame)

    def repeated(self, copies: int) -> Frame:
        """The same block for several copies of the samples, one after another. Only for tangents and pullbacks."""
        if copies == 1:
            return self
        drawn = {
            k: None if value is None else value.repeat(copies, *[1] * (value.dim() - 1))
            for k, value in self.drawn.items()
        }
        shapes = {register: torch.Size((copies * shape[0], *shape[1:])) for register, shape in self.shapes.items()}
        frame = Frame(self.program, (), self.weights, drawn, shapes, frozen=True)
        frame._in_bfloat16 = self._in_bfloat16
        return self._as_precise(frame)

    def _as_precise(self, frame: Frame) -> Frame:
        """A frame with this one's mode and precision."""
        frame.coarse, frame.autocast, frame.light, frame.training = (
            self.coarse,
            self.autocast,
            self.light,
            self.training,
        )
        return frame

    def _weights(self, instruction: Instruction) -> list[Tensor | None]:
        if instruction.operator.draws or instruction.operator.selects:
            return [self.drawn[instruction.kept]]
        return [None if index is None else self.weights[index] for index in instruction.weights]

    def _run(self, instruction: Instruction, registers: Mapping[int, Tensor]) -> Tensor:
        values = [registers[r] for r in instruction.operands]
        if self.reads is not None:
            values = self.reads.operands(instruction, values)
        operator, known = instruction.operator, instruction.kept in self.drawn
        if operator.draws and not known:
            self._draw_before(instruction.kept, registers)
        if (operator.draws and not known) or (operator.selects and not (known and self.frozen)):
            self.drawn[instruction.kept] = instruction.operator.draw(values)
        coarse = self.autocast or (self.coarse and self.program.from_states[instruction.output])
        if coarse and operator.product:
            result = operator.apply(_in_bfloat16(values), self._rounded_weights(instruction)).to(values[0].dtype)
        elif self.reads is not None and operator.product:
            result = self.reads.product(instruction, values[0], self._weights(instruction))
        else:
            result = operator.apply(values, self._weights(instruction))
        self.shapes[instruction.output] = result.shape
        return result

    def _draw_before(self, mask: int, registers: Mapping[int, Tensor]) -> None:
        """Draw the masks that the source draws before this one. The states that they belong to are already known."""
        for instructions in self.program.draws:
            draw = instructions[-1]
            if draw.kept == mask:
                return
            if draw.kept in self.drawn:
                continue
            local = dict(registers)
            for instruction in instructions[:-1]:
                if instruction.output not in local:
                    local[instruction.output] = self._run(instruction, local)
            self.drawn[draw.kept] = draw.operator.draw([local[r] for r in draw.operands])

    def _rounded_weights(self, instruction: Instruction) -> list[Tensor | None]:
        """The instruction's weights in bfloat16. They are rounded once."""
        for index in instruction.weights:
            weight = None if index is None else self.weights[index]
            if index is not None and weight is not None and index not in self._in_bfloat16:
                self._in_bfloat16[index] = weight.to(torch.bfloat16)
        return [None if index is None else self._in_bfloat16.get(index) for index in instruction.weights]

    def registers(self, index: int, states: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Every register that the drive of a layer needs, evaluated at the given states."""
        layer = self.program.layers[index]
        registers = dict(self._fixed)
        for other, state in zip(self.program.layers, states, strict=False):
            if state is not None:
                registers[other.state] = state
                self.shapes[other.state] = state.shape
        for instruction in layer.instructions:
            if instruction.output in registers:
                continue
            value = self._run(instruction, registers)
            registers[instruction.output] = value
            read_again = self.reads is not None and not self.reads.held(instruction.output)
            if not read_again and not self.program.from_states[instruction.output]:
                self._fixed[instruction.output] = value
        return registers

    def drive(self, index: int, states: Sequence[Tensor | None]) -> Tensor:
        """d_l(s, x; θ)."""
        return self.registers(index, states)[self.program.layers[index].drive]

    def feedforward(self) -> list[Tensor]:
        """The states without feedback, s_l = σ_l(d_l), as the source's layers compute them."""
        states: list[Tensor] = []
        for index, activation in enumerate(self.activations):
            states.append(activation.value(self.drive(index, states)))
        return states

    def deviations(
        self, index: int, values: Sequence[Tensor | None], scales: Sequence[float]
    ) -> tuple[float, list[Tensor | None]]:
        """r and w with r J_l w = Σ_k (c_l/c_k) J_{lk} u_k. Values are copied only if the c_k differ."""
        upstream = self.program.upstream[index]
        ratios = {k: scales[index] / scales[k] for k in upstream if values[k] is not None}
        if len(set(ratios.values())) <= 1:
            kept = [value if k in ratios else None for k, value in enumerate(values)]
            return next(iter(ratios.values()), 1.0), kept
        return 1.0, [None if value is None or k not in ratios else value * ratios[k] for k, value in enumerate(values)]

    def operand_registers(self, index: int, states: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """The registers that the weights of a layer's drive multiply, at the given states."""
        registers = dict(self._fixed)
        for other, state in zip(self.program.layers, states, strict=False):
            if state is not None:
                registers[other.state] = state
        for instruction in self.program.operand_instructions[index]:
            if instruction.output not in registers:
                registers[instruction.output] = self._run(instruction, registers)
        return registers

    def tangent_registers(
        self, index: int, deviations: Sequence[Tensor | None], instructions: Sequence[Instruction] | None = None
    ) -> dict[int, Tensor]:
        """Every register of J_l v, or those of some instructions. A register that does not vary is absent."""
        layer = self.program.layers[index]
        registers: dict[int, Tensor] = {}
        for other, deviation in zip(self.program.layers, deviations, strict=True):
            if deviation is not None:
                registers[other.state] = deviation
        for instruction in layer.instructions if instructions is None else instructions:
            values = [registers.get(r) for r in instruction.operands]
            if all(value is None for value in values):
                continue
            shapes = [self.shapes[r] for r in instruction.operands]
            operator = instruction.operator
            if (self.coarse or self.autocast) and operator.product:
                dtype = next(value.dtype for value in values if value is not None)
                rounded = operator.tangent(_in_bfloat16(values), self._rounded_weights(instruction), shapes)
                registers[instruction.output] = rounded.to(dtype)
            else:
                registers[instruction.output] = operator.tangent(values, self._weights(instruction), shapes)
        return registers

    def tangent(self, index: int, deviations: Sequence[Tensor | None]) -> Tensor | None:
        """J_l v; None if it is zero."""
        return self.tangent_registers(index, deviations).get(self.program.layers[index].drive)

    def pullback(
        self,
        index: int,
        cotangent: Tensor,
        *,
        states: bool = False,
        inputs: bool = False,
        registers: Mapping[int, Tensor] | None = None,
        gradients: list[Tensor | None] | None = None,
        needed: Sequence[bool] = (),
        bias: bool = True,
        factor: float = 1.0,
    ) -> dict[int, Tensor]:
        """J_lᵀ p on the states and/or the inputs that the drive reads.

        With `registers`, the values of the operands, it also adds `factor` ∂⟨p, d_l⟩/∂θ to `gradients`.

        Returns:
            Register of each requested state or input -> its part of J_lᵀ p.
        """
        program = self.program
        layer = program.layers[index]
        pending: dict[int, Tensor] = {layer.drive: cotangent}
        for instruction in reversed(layer.instructions):
            arriving = pending.pop(instruction.output, None)
            if arriving is None:
                continue
            weights = self._weights(instruction)
            if gradients is not None and registers is not None and any(w is not None for w in instruction.weights):
                self._add_weight_gradients(instruction, arriving, weights, registers, gradients, needed, bias, factor)
            wanted = [
                (states and program.from_states[r]) or (inputs and program.from_inputs[r]) for r in instruction.operands
            ]
            if gradients is not None:
                wanted = [
                    w or self._depends_on_weights(index, r) for w, r in zip(wanted, instruction.operands, strict=True)
                ]
            if not any(wanted):
                continue
            shapes = [self.shapes[r] for r in instruction.operands]
            if instruction.operator.product and (self.autocast or (self.coarse and gradients is None)):
                rounded = self._rounded_weights(instruction)
                found = instruction.operator.adjoint(arriving.to(torch.bfloat16), rounded, shapes, wanted)
                parts = [None if part is None else part.to(arriving.dtype) for part in found]
            elif self.reads is not None and instruction.operator.product:
                parts = self.reads.backward(instruction, arriving, weights, shapes, wanted)
            else:
                parts = instruction.operator.adjoint(arriving, weights, shapes, wanted)
            for register, part, want in zip(instruction.operands, parts, wanted, strict=True):
                if want and part is not None:
                    pending[register] = pending[register] + part if register in pending else part
        return {
            register: value
            for register, value in pending.items()
            if (states and register in program.states) or (inputs and register < program.inputs)
        }

    def _add_weight_gradients(
        self,
        instruction: Instruction,
        cotangent: Tensor,
        weights: Sequence[Tensor | None],
        registers: Mapping[int, Tensor],
        gradients: list[Tensor | None],
        needed: Sequence[bool],
        bias: bool,
        factor: float,
    ) -> None:
        if any(r not in registers for r in instruction.operands):
            return
        values = [registers[r] for r in instruction.operands]
        mask = [index is not None and needed[index] for index in instruction.weights]
        dtype = cotangent.dtype
        if self.autocast and instruction.operator.product:
            values, weights = _in_bfloat16(values), self._rounded_weights(instruction)
            cotangent = cotangent.to(torch.bfloat16)
        found = [
            None if gradient is None else gradient.to(dtype)
            for gradient in instruction.operator.weight_gradients(values, cotangent, weights, mask, bias)
        ]
        for index, gradient in zip(instruction.weights, found, strict=True):
            if index is not None and gradient is not None:
                present = gradients[index]
                if present is None:
                    gradients[index] = gradient if factor == 1 else gradient * factor
                else:
                    gradients[index] = torch.add(present, gradient, alpha=factor)

    def _depends_on_weights(self, index: int, register: int) -> bool:
        """Whether a register of a drive is computed with weights (of the same drive)."""
        for instruction in self.program.layers[index].instructions:
            if instruction.output == register:
                return any(w is not None for w in instruction.weights) or any(
                    self._depends_on_weights(index, r) for r in instruction.operands
                )
        return False

    def read(self, states: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """The block's outputs from the states of its visible layers (by layer index)."""
        registers = dict(enumerate(self.inputs))
        for index, state in states.items():
            registers[self.program.layers[index].state] = state
        for instruction in self.program.readout:
            registers[instruction.output] = self._run(instruction, registers)
        return tuple(registers[r] for r in self.program.outputs)


def take_rows(value: Tensor, rows: Tensor) -> Tensor:
    """The given rows along the leading dimension."""
    return value.index_select(0, rows.to(value.device))


def _in_bfloat16(values: Sequence[Tensor | None]) -> list[Tensor]:
    """The operand of a product in bfloat16."""
    return [value.to(torch.bfloat16) for value in values if value is not None]
