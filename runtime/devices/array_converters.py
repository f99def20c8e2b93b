"""`ArrayConverters`: the converters between the arrays of a block, where `Hardware(row_sums="digital")` has them.

A layer whose rows lie on K > 1 tiles gives K partial sums for each value of its product. With digital row sums

    y = b + Σ_k ADC_k( W_kᵀ x_k ),     W_k, x_k the rows on the k-th tiles (and b among them if it lies on a row),

is a digital number, and so is what is computed from such numbers alone, also a state. A digital value passes a DAC
where an array or an analog sum reads it. Feedback through K' tiles of columns is added digitally in the same way,

    Σ_j ADC_j( W_j p_j )               then through a DAC if the value that it goes back to is analog,

and from one tile it passes an ADC if that value is digital. So each conversion is one that the plan counts
(`passes/partition/partial_sums.py`). An error that leaves at the block's inputs passes ADCs in any case.

Each tile has a range for its forward ADCs, and each column of tiles one for its backward ADCs. Free phases, nudged
phases and errors have ranges of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffebm_compiler.runtime.devices.converters import Converters
from ffebm_compiler.runtime.devices.tiling import Tiling
from ffebm_compiler.runtime.program.block_program import BlockProgram, Instruction

__all__ = ["ArrayConverters", "RowPart"]

Phase = Literal["free", "nudged", "error"]


@dataclass(frozen=True)
class RowPart:
    """The rows of a product that lie on the k-th tiles: from `start` to `end`, without a bias row."""

    index: int
    start: int
    end: int
    bias: bool
    """Whether the bias is among them."""


class ArrayConverters:
    """Which values of a block are digital, and the converters between its arrays.

    Args:
        program: the block's program on devices.
        tilings: name of each operation whose tiles are converted one by one -> how its matrices lie on them, a bias row
            included. Empty with analog row sums.
        bias_rows: names of the operations whose bias is the last row.
        converters: of the block. What is digital on both sides is spared there.
    """

    def __init__(
        self, program: BlockProgram, tilings: Mapping[str, Tiling], bias_rows: frozenset[str], converters: Converters
    ) -> None:
        self.tilings, self.bias_rows, self.converters = dict(tilings), bias_rows, converters
        self._from_states = program.from_states
        self.digital = self._digital_registers(program)
        """The registers of digital values."""
        feedback = {
            item.operation
            for layer in program.layers
            for item in layer.instructions
            if any(program.from_states[register] for register in item.operands)
        }
        self.inside = bool(self.digital) or any(self.across(name) > 1 for name in feedback)
        """Whether values are converted while the block settles."""
        converters.spared = self._spared(program)

    def down(self, operation: str) -> int:
        """Tiles along the rows of a product whose results are converted one by one."""
        return len(self.tilings[operation].rows) if operation in self.tilings else 1

    def across(self, operation: str) -> int:
        """Tiles along the columns of a product whose backward results are converted one by one."""
        return len(self.tilings[operation].cols) if operation in self.tilings else 1

    def _digital_registers(self, program: BlockProgram) -> frozenset[int]:
        """Sums of several tiles, and what is computed from such values of the block alone."""
        digital: set[int] = set()

        def extend(instructions: Sequence[Instruction]) -> None:
            for item in instructions:
                inside = [register for register in item.operands if register >= program.inputs]
                of_digital = bool(inside) and digital.issuperset(inside)
                if self.down(item.operation) > 1 if item.operator.product else of_digital:
                    digital.add(item.output)

        for layer in program.layers:
            extend(layer.instructions)
            if layer.drive in digital:
                digital.add(layer.state)
        extend(program.readout)
        return frozenset(digital)

    def _spared(self, program: BlockProgram) -> frozenset[str]:
        """The converters at the boundary that are not there, since the value is digital on both sides."""
        found = {f"adc {index}" for index, register in enumerate(program.outputs) if register in self.digital}
        for index, layer in enumerate(program.layers):
            if layer.state in self.digital:
                found |= {f"state {index}", f"nudge {index}"}
        for register in range(program.inputs):
            readers = [item for layer in program.layers for item in layer.instructions if register in item.operands]
            if readers and all(not item.operator.product and item.output in self.digital for item in readers):
                found.add(f"dac {register}")
        return frozenset(found)

    def held(self, register: int) -> bool:
        """Whether a value is held for a phase: it is digital, and no state changes it."""
        return register in self.digital and not self._from_states.get(register, True)

    def operands(self, instruction: Instruction, values: Sequence[Tensor], phase: Phase) -> list[Tensor]:
        """The operands as they are read: digital ones through DACs, except by digital arithmetic."""
        if not self.digital or (not instruction.operator.product and instruction.output in self.digital):
            return list(values)
        return [
            self.driven(register, value, phase) for register, value in zip(instruction.operands, values, strict=True)
        ]

    def driven(self, register: int, value: Tensor, phase: Phase) -> Tensor:
        """A value as it drives an array or an analog sum: through DACs if it is digital."""
        return self.converters.dac(f"{phase} dac of {register}", value) if register in self.digital else value

    def row_parts(self, instruction: Instruction) -> list[RowPart]:
        """The parts of a product on several tiles of rows."""
        tiling, found, start = self.tilings[instruction.operation], list[RowPart](), 0
        rows = sum(tiling.rows) - (instruction.operation in self.bias_rows)
        for index, count in enumerate(tiling.rows):
            end = min(start + count, rows)
            found.append(RowPart(index, start, end, start + count > rows))
            start = end
        return found

    def of_rows(
        self, instruction: Instruction, part: RowPart, value: Tensor, phase: Phase, tap: int, taps: int
    ) -> tuple[Tensor, Tensor | None]:
        """(a partial sum after its ADCs, where it is in their range; None: everywhere), of one tap of every kernel."""
        tiling, dims = self.tilings[instruction.operation], instruction.operator.column_dims(value.dim())
        each = [tile for tile, count in enumerate(tiling.groups) for _ in range(count)]
        across = [tile for tile, count in enumerate(tiling.cols) for _ in range(count)][tap::taps]
        tiles = torch.tensor([[group * len(tiling.cols) + col for col in across] for group in each], device="cpu")
        names = [
            f"{phase} adc of {instruction.operation}, tile {group} {part.index} {col}"
            for group in range(len(tiling.groups))
            for col in range(len(tiling.cols))
        ]
        return self.converters.of_tiles(names, value, tiles.flatten(), dims)

    def column_parts(self, instruction: Instruction) -> list[tuple[int, int]]:
        """The first and the last column, plus 1, of the columns of tiles."""
        found, start = list[tuple[int, int]](), 0
        for count in self.tilings[instruction.operation].cols:
            found.append((start, start + count))
            start += count
        return found

    def of_columns(self, instruction: Instruction, index: int, value: Tensor, phase: Phase) -> Tensor:
        """What one column of tiles gives backward, after its ADCs."""
        return self.converters.adc(f"{phase} adc of {instruction.operation}, back from tile {index}", value)

    def arrived(self, instruction: Instruction, value: Tensor, phase: Phase) -> Tensor:
        """What came back through a product, at the value that it goes back to."""
        (register,), name = instruction.operands, f"{phase} {{}} of {instruction.operation}, back"
        across = self.across(instruction.operation) > 1
        outside = not self._from_states[register]
        if across and not outside and register not in self.digital:
            return self.converters.dac(name.format("dac"), value)
        if not across and (register in self.digital or (outside and phase == "error")):
            return self.converters.adc(name.format("adc"), value)
        return value

    def has_read_back(self, instruction: Instruction, phase: Phase) -> bool:
        """Whether the ADCs of what comes back through a product have a range."""
        start = f"{phase} adc of {instruction.operation}, back"
        return any(name.startswith(start) for name in self.converters.ranges)

    def seen(self, phase: Phase) -> bool:
        """Whether the converters inside have seen such a phase, or are about to."""
        return not self.inside or self.converters.observing or any(n.startswith(phase) for n in self.converters.ranges)
