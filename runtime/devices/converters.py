"""Converters at the boundary of a block: quantisers with a range that data have set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Converters", "quantised"]

Range = tuple[float, float]


class _Quantise(torch.autograd.Function):
    """A quantiser whose derivative is 1 inside its range and 0 outside (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bits: int, low: float, high: float) -> Tensor:
        ctx.save_for_backward((value >= low) & (value <= high))
        return _rounded(value, bits, low, high)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return cotangent * inside, None, None, None


def _rounded(value: Tensor, bits: int, low: float, high: float) -> Tensor:
    steps = 2**bits - 1 if low >= 0 else 2 ** (bits - 1) - 1
    step = max(high, -low) / steps
    if not step:
        return torch.zeros_like(value)
    return (value.clamp(low, high) / step).round() * step


def quantised(value: Tensor, bits: int, limits: Range) -> Tensor:
    """The nearest of the levels of a converter. Its derivative is 1 inside the range and 0 outside.

    A range [0, m] has 2^bits − 1 steps, and a range [−m, m] has 2^(bits−1) − 1 on each side of zero. Zero is a level.

    Args:
        value: any shape.
        bits: of the converter.
        limits: lowest and highest value, [0, m] or [−m, m].
    """
    result: Tensor = _Quantise.apply(value, bits, *limits)  # type: ignore[no-untyped-call]
    return result


class Converters:
    """The DACs and ADCs of one block. A range is set by the first data that come through, or by `calibrate`.

    There is one range for each value that enters ("dac 0"), leaves ("adc 0"), or is read for a gradient ("state 0").
    """

    def __init__(self, dac_bits: int | None, adc_bits: int | None) -> None:
        self.dac_bits, self.adc_bits = dac_bits, adc_bits
        self.ranges: dict[str, Range] = {}
        """Name of a converter -> (lowest, highest) value."""
        self.observing = False
        """Whether ranges grow with the data, which then come through unchanged."""

    def enter(self, index: int, value: Tensor) -> Tensor:
        """An input of the block, after its DACs."""
        return self._converted(f"dac {index}", value, self.dac_bits)

    def leave(self, index: int, value: Tensor) -> Tensor:
        """An output of the block, after its ADCs."""
        return self._converted(f"adc {index}", value, self.adc_bits)

    def read(self, index: int, state: Tensor) -> Tensor:
        """A nudged state, after the ADCs that read it for a gradient."""
        return self._converted(f"state {index}", state, self.adc_bits)

    def nudge(self, error: Tensor) -> Tensor:
        """The force of a nudge, after DACs whose range is its largest value, since it is scaled digitally."""
        if self.dac_bits is None:
            return error
        largest = float(error.abs().amax()) if error.numel() else 0.0
        return quantised(error, self.dac_bits, (-largest, largest))

    def _converted(self, name: str, value: Tensor, bits: int | None) -> Tensor:
        if bits is None or not value.is_floating_point() or not value.numel():
            return value
        known = self.ranges.get(name)
        if self.observing or known is None:
            found = _range_of(value)
            known = found if known is None else _union(known, found)
            self.ranges[name] = known
        return value if self.observing else quantised(value, bits, known)


def _range_of(value: Tensor) -> Range:
    low, high = (float(end) for end in value.detach().aminmax())
    return (0.0, high) if low >= 0 else (-max(-low, high), max(-low, high))


def _union(first: Range, second: Range) -> Range:
    low, high = min(first[0], second[0]), max(first[1], second[1])
    return (0.0, high) if low >= 0 else (-max(-low, high), max(-low, high))
