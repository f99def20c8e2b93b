"""`Reads`: the noise of reading the arrays of a block, drawn anew at every product.

The weights that a product multiplies differ from one read to the next by independent errors of variance V. Their sum
over a row is normal, so that a read is exactly

    W x + √(V x²) ξ   forward,      Wᵀ p + √(Vᵀ p²) ξ   backward,      ξ ~ N(0, 1) for every value of every sample.

ξ comes from torch's own generator of the value's device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ffebm_compiler.runtime.program.block_program import Instruction

__all__ = ["Reads"]


class Reads:
    """The noise of a block's reads.

    Args:
        variances: V of each weight, by its index in the block's program.
        average: number of reads whose mean a result is.
    """

    def __init__(self, variances: Mapping[int, Tensor], average: int = 1) -> None:
        self.variances = variances
        self.average = average

    def averaged(self, count: int) -> Reads:
        """Reads whose results are means of so many."""
        return Reads(self.variances, count)

    def forward(self, instruction: Instruction, values: Sequence[Tensor], result: Tensor) -> Tensor:
        """A product's result as it is read."""
        spread = self._variances(instruction)
        if spread[0] is None:
            return result
        return self._noisy(result, instruction.operator.apply([value.square() for value in values], spread))

    def backward(
        self, instruction: Instruction, cotangent: Tensor, shapes: Sequence[torch.Size], parts: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """A transposed product's results as they are read."""
        spread = self._variances(instruction)
        if spread[0] is None:
            return list(parts)
        wanted = [part is not None for part in parts]
        totals = instruction.operator.adjoint(cotangent.square(), spread, shapes, wanted)
        return [
            part if part is None or total is None else self._noisy(part, total)
            for part, total in zip(parts, totals, strict=True)
        ]

    def product(self, instruction: Instruction, values: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
        """A product that autograd differentiates: its backward pass is a backward read, with noise of its own."""
        found: Tensor = _Product.apply(self, instruction, values[0], *weights)  # type: ignore[no-untyped-call]
        return found

    def _variances(self, instruction: Instruction) -> list[Tensor | None]:
        return [None if index is None else self.variances.get(index) for index in instruction.weights]

    def _noisy(self, result: Tensor, variance: Tensor) -> Tensor:
        spread = (variance / self.average).clamp_min_(0).sqrt_()
        return torch.addcmul(result, spread.to(result.dtype), torch.randn_like(result))


class _Product(torch.autograd.Function):
    """A product read forward, whose backward pass reads it backward. Weight gradients are outer products, exact."""

    @staticmethod
    def forward(ctx: Any, reads: Reads, instruction: Instruction, value: Tensor, *weights: Tensor | None) -> Tensor:
        ctx.reads, ctx.instruction = reads, instruction
        ctx.save_for_backward(value, *weights)
        result = instruction.operator.apply([value], weights)
        return reads.forward(instruction, [value], result)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        value, *weights = ctx.saved_tensors
        operator, needed = ctx.instruction.operator, ctx.needs_input_grad[2:]
        back: Tensor | None = None
        if needed[0]:
            parts = operator.adjoint(cotangent, weights, [value.shape], [True])
            back = ctx.reads.backward(ctx.instruction, cotangent, [value.shape], parts)[0]
        mask = [need and weight is not None for need, weight in zip(needed[1:], weights, strict=True)]
        found = operator.weight_gradients([value], cotangent, weights, mask, True)
        return None, None, back, *found
