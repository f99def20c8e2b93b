"""Converters of a block: quantisers with a range that data have set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.runtime.program.operators import along_columns

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

    There is one range for each value that enters ("dac 0"), leaves ("adc 0"), or is read for a gradient ("state 0"),
    and for the converters between arrays (`ArrayConverters`), which have the names given here.
    """

    def __init__(self, dac_bits: int | None, adc_bits: int | None) -> None:
        self.dac_bits, self.adc_bits = dac_bits, adc_bits
        self.ranges: dict[str, Range] = {}
        """Name of a converter -> (lowest, highest) value."""
        self.observing = False
        """Whether ranges grow with the data, which then come through unchanged."""
        self.spared: frozenset[str] = frozenset()
        """Names of converters that are not there, since the value is digital already."""

    @contextmanager
    def observed(self) -> Iterator[None]:
        """While the context is open, ranges grow with the data, which come through unchanged."""
        before, self.observing = self.observing, True
        try:
            yield
        finally:
            self.observing = before

    def enter(self, index: int, value: Tensor) -> Tensor:
        """An input of the block, after its DACs."""
        return self._converted(f"dac {index}", value, self.dac_bits)

    def leave(self, index: int, value: Tensor) -> Tensor:
        """An output of the block, after its ADCs."""
        return self._converted(f"adc {index}", value, self.adc_bits)

    def read(self, phases: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The states of two phases, after the ADCs that read them. The first states of both set a range."""
        for index, states in enumerate(zip(*phases, strict=True)):
            name = f"state {index}"
            if self.adc_bits is not None and name not in self.spared and name not in self.ranges:
                with self.observed():
                    for state in states:
                        self.adc(name, state)
        return [[self.adc(f"state {index}", state) for index, state in enumerate(states)] for states in phases]

    def nudge(self, index: int, error: Tensor) -> Tensor:
        """The force of a nudge of a state, after DACs whose range is its largest value. (It is scaled digitally.)"""
        return error if f"nudge {index}" in self.spared else self.error(error)

    def error(self, error: Tensor) -> Tensor:
        """An error that drives an array, after DACs whose range is its largest value, since it is scaled digitally."""
        if self.dac_bits is None or self.observing:
            return error
        largest = float(error.abs().amax()) if error.numel() else 0.0
        return quantised(error, self.dac_bits, (-largest, largest))

    def dac(self, name: str, value: Tensor) -> Tensor:
        """A value after the DACs of this name."""
        return self._converted(name, value, self.dac_bits)

    def adc(self, name: str, value: Tensor) -> Tensor:
        """A value after the ADCs of this name."""
        return self._converted(name, value, self.adc_bits)

    def of_tiles(
        self, names: Sequence[str], value: Tensor, tiles: Tensor, dims: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """(a value after the ADCs of several tiles, where it is in their range; None: everywhere).

        Args:
            names: of the tiles' ADCs.
            value: any shape.
            tiles: the tile of each column.
            dims: the dimensions of `value` that count columns, in the order in which `tiles` runs through them.
        """
        if self.adc_bits is None or not value.numel():
            return value, None
        if self.observing or any(name not in self.ranges for name in names):
            self._observe_tiles(names, value, tiles, dims)
        if self.observing:
            return value, None
        places = tiles.to(value.device)
        low, high = (
            along_columns(torch.tensor(ends, dtype=value.dtype, device=value.device)[places], value, dims)
            for ends in zip(*(self.ranges[name] for name in names), strict=True)
        )
        steps = torch.where(low >= 0, 2**self.adc_bits - 1, 2 ** (self.adc_bits - 1) - 1)
        step = torch.maximum(high, -low) / steps
        clipped = value.clamp(low, high)
        levels = torch.where(step > 0, clipped / torch.where(step > 0, step, 1.0), 0.0).round() * step
        inside = clipped == value
        return levels, None if bool(inside.all()) else inside

    def _observe_tiles(self, names: Sequence[str], value: Tensor, tiles: Tensor, dims: Sequence[int]) -> None:
        kept = [dim % value.dim() for dim in dims]
        rest = [dim for dim in range(value.dim()) if dim not in kept]
        columns = value.detach().permute(*kept, *rest).reshape(len(tiles), -1)
        ends = torch.stack(list(columns.aminmax(dim=1))).double().cpu()
        for index, name in enumerate(names):
            own = ends[:, tiles == index]
            self._widen(name, _symmetric(float(own[0].min()), float(own[1].max())))

    def _widen(self, name: str, found: Range) -> None:
        known = self.ranges.get(name)
        self.ranges[name] = found if known is None else _symmetric(min(known[0], found[0]), max(known[1], found[1]))

    def _converted(self, name: str, value: Tensor, bits: int | None) -> Tensor:
        if bits is None or name in self.spared or not value.is_floating_point() or not value.numel():
            return value
        if self.observing or name not in self.ranges:
            self._widen(name, _symmetric(*(float(end) for end in value.detach().aminmax())))
        return value if self.observing else quantised(value, bits, self.ranges[name])


def _symmetric(low: float, high: float) -> Range:
    """The range [0, m] or [−m, m] that holds these values."""
    return (0.0, high) if low >= 0 else (-max(-low, high), max(-low, high))
