"""Quantised gradients of digital parts, and the scale that the gradients of integer weights need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain_fields

__all__ = ["QuantisedBackprop", "largest_step", "quantised_error", "quantised_weight_gradient", "rescaled_gradient"]

_LEAST, _MOST = 2, 16


@dataclass(frozen=True)
class QuantisedBackprop:
    """Backpropagation through digital parts with quantised errors and weight gradients. It needs `digital_bits`.

    The error δ of every quantised value, and the gradient G of every quantised weight W, are rounded to 2^(bits−1) − 1
    levels on each side of zero: δ with one range per tensor, G with one per channel. A digital engine holds W as
    integers W̄ = W/s, whose gradient is s G: with a step s of 1e-3 it is a million times smaller against W̄ than G is
    against W. Quantisation-aware scaling (QAS) multiplies it by s⁻², per channel:

        W̄ ← W̄ − η s⁻² (s G)        which is        W ← W − η G .

    Parameters of a hybrid stay in the units of the source. So with `scaling` the gradient of W is G, and without it
    s² G, which is what an optimizer of the integers would do. The bias of a product is an integer of step s s_x, with
    s_x the step of the product's input, and is treated in the same way. Any optimizer of torch sees these gradients.

    Args:
        bits: bits of errors and gradients, with their sign.
        scaling: whether gradients of integer weights and biases are scaled (QAS).

    Raises:
        InputError: a setting is out of range.

    Source: Lin et al., "On-Device Training Under 256KB Memory", NeurIPS 2022, arXiv 2206.15472.
    """

    bits: int = 8
    scaling: bool = True
    name = "quantised"

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not _LEAST <= self.bits <= _MOST:
            raise InputError(f"bits is {self.bits!r}; expected a whole number from {_LEAST} to {_MOST}")
        if not isinstance(self.scaling, bool):
            raise InputError(f"scaling is {self.scaling!r}; expected True or False")


def largest_step(value: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """The step of symmetric levels that reach the largest |value|, in float32: one, or one for each channel.

    Where all values are 0 it is 1.
    """
    size = value.detach().abs()
    largest = size.amax() if axis is None else size.movedim(axis, 0).reshape(size.shape[axis], -1).amax(1)
    step = largest.float() / (2 ** (bits - 1) - 1)
    return torch.where(step > torch.finfo(torch.float32).tiny, step, torch.ones_like(step))


def symmetric(value: Tensor, step: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """The nearest of 2^(bits−1) − 1 levels on each side of zero. Its derivative is 1 inside the range."""
    most = 2 ** (bits - 1) - 1
    zero = torch.zeros_like(step, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(value, step, zero, -most, most)
    return torch.fake_quantize_per_channel_affine(value, step, zero, axis % value.dim(), -most, most)


class _Error(torch.autograd.Function):
    """The identity; its cotangent is quantised."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return symmetric(cotangent, largest_step(cotangent, ctx.bits), ctx.bits), None


class _WeightGradient(torch.autograd.Function):
    """The identity; its cotangent is quantised per channel, and multiplied by a factor per channel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, axis: int | None, factor: Tensor | None) -> Tensor:
        ctx.bits, ctx.axis, ctx.factor = bits, axis, factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        found = symmetric(cotangent, largest_step(cotangent, ctx.bits, ctx.axis), ctx.bits, ctx.axis)
        if ctx.factor is not None:
            found = found * _along(ctx.factor, ctx.axis, found)
        return found, None, None, None


class _Rescaled(torch.autograd.Function):
    """The identity; its cotangent is multiplied by a factor that is broadcast to it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return cotangent * ctx.factor.to(cotangent.dtype), None


def _along(factor: Tensor, axis: int | None, like: Tensor) -> Tensor:
    """A factor for each channel in the shape that multiplies a weight."""
    if axis is None:
        return factor.to(like.dtype)
    shape = [1] * like.dim()
    shape[axis % like.dim()] = -1
    return factor.reshape(shape).to(like.dtype)


def quantised_error(value: Tensor, settings: QuantisedBackprop) -> Tensor:
    """The value itself, whose error is quantised on its way back."""
    result: Tensor = _Error.apply(value, settings.bits)  # type: ignore[no-untyped-call]
    return result


def quantised_weight_gradient(weight: Tensor, step: Tensor, axis: int | None, settings: QuantisedBackprop) -> Tensor:
    """The weight itself, whose gradient is quantised, and that of the integers where it is not scaled."""
    factor = None if settings.scaling else step**2
    result: Tensor = _WeightGradient.apply(weight, settings.bits, axis, factor)  # type: ignore[no-untyped-call]
    return result


def rescaled_gradient(bias: Tensor, factor: Tensor) -> Tensor:
    """The bias itself, whose gradient is multiplied by `factor`."""
    result: Tensor = _Rescaled.apply(bias, factor)  # type: ignore[no-untyped-call]
    return result
