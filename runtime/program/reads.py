"""`Reads`: how the arrays of a block are read: the noise of every product, and the converters between arrays.

The weights that a product multiplies differ from one read to the next by independent errors of variance V. Their sum
over a row is normal, so that a read is exactly

    W x + √(V x²) ξ   forward,      Wᵀ p + √(Vᵀ p²) ξ   backward,      ξ ~ N(0, 1) for every value of every sample.

ξ comes from torch's own generator of the value's device, or from one that is given. Where partial sums are converted
(`ArrayConverters`), this is so for the rows, or backward the columns, of every tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffebm_compiler.runtime.program.operators import Operator, along_columns

if TYPE_CHECKING:
    from ffebm_compiler.runtime.devices.array_converters import ArrayConverters, Phase, RowPart
    from ffebm_compiler.runtime.program.block_program import Instruction

__all__ = ["Reads"]

Weights = Sequence[Tensor | None]


class Reads:
    """How the arrays of a block are read.

    Args:
        variances: V of each weight, by its index in the block's program; empty without noise.
        converters: between the arrays; None if nothing is converted.
        phase: whose ranges the converters have.
        average: number of reads whose mean a result is, where it is held: a digital drive of the inputs, and an error.
        generator: what the noise is drawn from; None for torch's own.
    """

    def __init__(
        self,
        variances: Mapping[int, Tensor],
        converters: ArrayConverters | None = None,
        phase: Phase = "free",
        average: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        self.variances, self.converters, self.phase, self.average = variances, converters, phase, average
        self.generator = generator

    def of(self, phase: Phase, average: int = 1) -> Reads:
        """The same reads in another phase."""
        return Reads(self.variances, self.converters, phase, average, self.generator)

    def of_rows(self, instruction: Instruction, part: RowPart) -> Reads:
        """The same reads with the noise of some rows of a product alone."""
        index = instruction.weights[0]
        noise = None if index is None else self.variances.get(index)
        if index is None or noise is None:
            return self
        own = instruction.operator.only_rows(noise, part.start, part.end)
        return Reads({**self.variances, index: own}, self.converters, self.phase, self.average, self.generator)

    @property
    def inside(self) -> bool:
        """Whether a block settles through them: a read has noise, or values are converted on the way."""
        return bool(self.variances) or (self.converters is not None and self.converters.inside)

    @property
    def seen(self) -> bool:
        """Whether all converters of this phase have a range."""
        return self.converters is None or self.converters.seen(self.phase)

    def held(self, register: int) -> bool:
        """Whether a value is read once in a phase, and then held as a digital number."""
        return self.converters is not None and self.converters.held(register)

    def operands(self, instruction: Instruction, values: Sequence[Tensor]) -> list[Tensor]:
        """The operands of an instruction as they are read."""
        return list(values) if self.converters is None else self.converters.operands(instruction, values, self.phase)

    def driven(self, register: int, value: Tensor) -> Tensor:
        """A state as it drives an array backward."""
        return value if self.converters is None else self.converters.driven(register, value, self.phase)

    def product(self, instruction: Instruction, value: Tensor, weights: Weights) -> Tensor:
        """A product that autograd differentiates: its backward pass is a backward read, with noise of its own."""
        found: Tensor = _Product.apply(self, instruction, value, *weights)  # type: ignore[no-untyped-call]
        return found

    def forward(
        self, instruction: Instruction, value: Tensor, weights: Weights
    ) -> tuple[Tensor, list[tuple[RowPart, Tensor | None]]]:
        """(a product as it is read, its parts with where converters are in their range; None: everywhere)."""
        operator, spread = instruction.operator, self._variances(instruction)
        between = self.converters
        if between is None or between.down(instruction.operation) == 1:
            result = operator.apply([value], weights)
            if spread[0] is not None:
                result = self._noisy(result, operator.apply([value.square()], spread))
            return result, []
        count = self.average if between.held(instruction.output) else 1
        taps = operator.taps(_given(weights[0]).shape)
        total: Tensor | None = None
        parts = []
        for part in between.row_parts(instruction):
            inside: Tensor | None = None
            for tap in range(taps):
                own, variances = (_of_part(operator, value, each, part, tap) for each in (weights, spread))
                assert own is not None
                clean = operator.apply([own[0]], own[1])
                noise = None if variances is None else operator.apply([variances[0].square()], variances[1])

                def converted(read: Tensor, part: RowPart = part, tap: int = tap) -> tuple[Tensor, Tensor | None]:
                    return between.of_rows(instruction, part, read, self.phase, tap, taps)

                found, within = self._mean(clean, noise, count, converted)
                inside = within if inside is None or within is None else inside & within
                total = found if total is None else total + found
            parts.append((part, inside))
        assert total is not None
        bias = weights[1] if len(weights) > 1 else None
        if bias is not None and not parts[-1][0].bias:
            total = total + along_columns(bias, total, operator.column_dims(total.dim()))
        return total, parts

    def backward(
        self,
        instruction: Instruction,
        cotangent: Tensor,
        weights: Weights,
        shapes: Sequence[torch.Size],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """A transposed product as it is read."""
        operator, spread, between = instruction.operator, self._variances(instruction), self.converters
        name = instruction.operation
        columns = [(0, -1)]
        if between is not None and between.across(name) > 1:
            columns = between.column_parts(instruction)
        total: Tensor | None = None
        for index, (start, end) in enumerate(columns):

            def read(values: Tensor, by: Weights, start: int = start, end: int = end) -> Tensor:
                weight = _given(by[0])
                if len(columns) > 1:
                    values, weight = operator.of_columns(values, weight, start, end)
                return _given(operator.adjoint(values, [weight, *[None] * (len(by) - 1)], shapes, wanted)[0])

            def converted(found: Tensor, index: int = index) -> tuple[Tensor, None]:
                if between is not None and len(columns) > 1:
                    found = between.of_columns(instruction, index, found, self.phase)
                elif between is not None:
                    found = between.arrived(instruction, found, self.phase)
                return found, None

            clean = read(cotangent, weights)
            noise = None if spread[0] is None else read(cotangent.square(), spread)
            part, _ = self._mean(clean, noise, self.average if self.phase == "error" else 1, converted)
            total = part if total is None else total + part
        assert total is not None
        if between is not None and len(columns) > 1:
            total = between.arrived(instruction, total, self.phase)
        return [total]

    def _mean(
        self,
        clean: Tensor,
        variance: Tensor | None,
        count: int,
        converted: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:
        """The mean of so many reads, each with noise of its own and converted."""
        if variance is None:
            return converted(clean)
        if self.converters is None:
            return self._noisy(clean, variance / count), None
        total, inside = converted(self._noisy(clean, variance))
        for _ in range(count - 1):
            total = total + converted(self._noisy(clean, variance))[0]
        return (total if count == 1 else total / count), inside

    def _variances(self, instruction: Instruction) -> list[Tensor | None]:
        return [None if index is None else self.variances.get(index) for index in instruction.weights]

    def _noisy(self, result: Tensor, variance: Tensor) -> Tensor:
        spread = variance.clamp_min(0).sqrt_()
        noise = torch.empty_like(result).normal_(generator=self.generator)
        return torch.addcmul(result, spread.to(result.dtype), noise)


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _of_part(
    operator: Operator, value: Tensor, weights: Weights, part: RowPart, tap: int
) -> tuple[Tensor, list[Tensor | None]] | None:
    """The rows of a part: what is read there, and by which weights; None without weights."""
    if weights[0] is None:
        return None
    rows, weight = operator.of_rows(value, operator.of_tap(weights[0], tap), part.start, part.end)
    return rows, [weight, *(each if part.bias else None for each in weights[1:])]


class _Product(torch.autograd.Function):
    """A product read forward, whose backward pass reads it backward.

    Its derivative is 1 where the converters of a partial sum are in their range, and 0 outside. Weight gradients are
    outer products, exact. The error that is read backward enters through DACs and leaves through ADCs.
    """

    @staticmethod
    def forward(ctx: Any, reads: Reads, instruction: Instruction, value: Tensor, *weights: Tensor | None) -> Tensor:
        result, parts = reads.forward(instruction, value, weights)
        ctx.reads, ctx.instruction = reads, instruction
        ctx.parts = parts if any(inside is not None for _, inside in parts) else []
        ctx.save_for_backward(value, *weights)
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        value, *weights = ctx.saved_tensors
        operator, needed = ctx.instruction.operator, ctx.needs_input_grad[2:]
        mask = [need and weight is not None for need, weight in zip(needed[1:], weights, strict=True)]
        if not ctx.parts:
            back = _error(ctx.reads, ctx.instruction, cotangent, weights, value.shape) if needed[0] else None
            return None, None, back, *operator.weight_gradients([value], cotangent, weights, mask, True)
        total = torch.zeros_like(weights[0]) if mask[0] else None
        back = _error_of_parts(ctx, cotangent, weights, value.shape) if needed[0] else None
        offset = None
        for part, inside in ctx.parts:
            own = cotangent if inside is None else cotangent * inside
            found = operator.weight_gradients([value], own, weights, mask, True)
            if total is not None:
                total = total + operator.only_rows(found[0], part.start, part.end)
            if part.bias:
                offset = found[1]
        if any(mask[1:]) and not ctx.parts[-1][0].bias:  # it is added digitally, behind the converters
            offset = operator.weight_gradients([value], cotangent, weights, [False, *mask[1:]], True)[1]
        return None, None, back, total, *([offset] if len(weights) > 1 else [])


def _error_of_parts(ctx: Any, cotangent: Tensor, weights: Weights, shape: torch.Size) -> Tensor:
    """The errors of a product's parts, each read backward where its converters are in their range."""

    def read() -> Tensor:
        total = cotangent.new_zeros(shape)
        for part, inside in ctx.parts:
            own = cotangent if inside is None else cotangent * inside
            rows = [ctx.instruction.operator.only_rows(weights[0], part.start, part.end), *[None] * (len(weights) - 1)]
            total = total + _error(ctx.reads.of_rows(ctx.instruction, part), ctx.instruction, own, rows, shape)
        return total

    between = ctx.reads.converters
    if not between.has_read_back(ctx.instruction, "error"):
        with between.converters.observed():  # one range for all parts
            read()
    return read()


def _error(reads: Reads, instruction: Instruction, cotangent: Tensor, weights: Weights, shape: torch.Size) -> Tensor:
    """An error read backward. It is scaled to the range of the DACs, and back behind the ADCs."""
    errors = reads.of("error")
    if reads.converters is None:
        return _given(errors.backward(instruction, cotangent, weights, [shape], [True])[0])
    largest = cotangent.abs().amax() if cotangent.numel() else cotangent.new_ones(())
    scale = torch.where(largest > 0, largest, 1.0)
    driven = reads.converters.converters.error(cotangent / scale)
    return _given(errors.backward(instruction, driven, weights, [shape], [True])[0]) * scale
