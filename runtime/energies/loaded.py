"""`Loaded`: the activation of a state that drives a load, solved exactly for piecewise linear activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.activations.base import Activation, Lines, clamp_stepper

__all__ = ["Loaded"]

Bound = float | Tensor


@dataclass(frozen=True)
class Loaded(Activation):
    """The s that solves ∂G(s) + (D − 1) s ∋ h, for the potential G of a piecewise linear σ.

    A line of σ with slope a through (h_i, s_i) becomes a line of slope a/(1 − a + a D) through (h_i − s_i + D s_i,
    s_i). For ReLU and clamps of slope 1 this is σ(h/D), for any D > 0. For a leak or another slope it is not σ of a
    scaled field, and D is at least 1.
    """

    activation: Activation
    """σ, which is monotone and made of straight lines."""
    diagonal: Tensor = field(compare=False, repr=False)
    """D, in a shape that broadcasts over h. 1 is no load, and ∞ holds a state at σ(0) with slope 0."""

    @property
    def name(self) -> str:
        return self.activation.name

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant of σ, since a load makes no slope larger."""
        return self.activation.lipschitz

    @property
    def monotone(self) -> bool:
        return True

    @property
    def smooth(self) -> bool:
        return self.activation.smooth

    @property
    def holomorphic(self) -> bool:
        return self.activation.holomorphic

    @cached_property
    def steepest(self) -> Tensor:
        """The largest slope of each unit."""
        return self._under_load(1.0 if self.activation.cone else max(self._lines.slopes))

    def kept(self) -> Loaded:
        """The same activation with the present load, without its gradient history."""
        return replace(self, diagonal=self.diagonal.detach())

    def _under_load(self, slope: float) -> Tensor:
        """The slope of a line of σ at this load."""
        return slope / (self.diagonal if slope == 1 else 1 - slope + slope * self.diagonal)

    @cached_property
    def _lines(self) -> Lines:
        lines = self.activation.lines
        if lines is None:
            raise UnsupportedError(
                f"{self.activation!r} is not made of straight lines, so that no load is solved exactly"
            )
        return lines

    @cached_property
    def _range(self) -> tuple[Bound, Bound]:
        """The bounds of a state that is a projection to a cone."""
        return self.activation.bounds(self.diagonal)

    @cached_property
    def _knots(self) -> tuple[tuple[Bound, float], ...]:
        """(h_i − s_i + D s_i, s_i) of every knot."""
        lines, value = self._lines, self._lines.start
        most = torch.finfo(self.diagonal.dtype).max  # knots are subtracted from each other
        found: list[tuple[Bound, float]] = []
        for index, knot in enumerate(lines.knots):
            if index:
                value += lines.slopes[index] * (knot - lines.knots[index - 1])
            inside = knot - value
            moved = (value * self.diagonal).clamp(-most, most)
            found.append(((moved + inside if inside else moved) if value else knot, value))
        return tuple(found)

    @cached_property
    def _pieces(self) -> tuple[tuple[Tensor, Bound, Bound], ...]:
        """(slope, lower end, upper end) of every line that is not flat."""
        ends: list[Bound] = [-inf, *(place for place, _ in self._knots), inf]
        return tuple(
            (self._under_load(slope), lo, hi)
            for slope, (lo, hi) in zip(self._lines.slopes, pairwise(ends), strict=True)
            if slope
        )

    def value(self, h: Tensor) -> Tensor:
        if self.activation.cone:
            if torch.is_grad_enabled():
                return self.activation.value(h) * self.steepest
            return _clip(h, *self._range) * self.steepest  # the same by fewer operations; at 0 its slope would differ
        lines = self._lines
        steep = [index for index, slope in enumerate(lines.slopes) if slope]
        if len(steep) == 1:  # a single line, clamped to its end values, which makes those exact
            index = steep[0]
            slope, knots = lines.slopes[index], self._knots
            offset = lines.start / slope - (lines.knots[max(index - 1, 0)] if knots else 0.0)
            line = (h + offset if offset else h) * self._pieces[0][0]
            lo = knots[index - 1] if index else None
            hi = knots[index] if index < len(knots) else None
            if torch.is_grad_enabled():
                line = line if lo is None else torch.where(h <= lo[0], lo[1], line)
                return line if hi is None else torch.where(h > hi[0], hi[1], line)
            if lo is None and hi is None:
                return line
            return line.clamp(None if lo is None else lo[1], None if hi is None else hi[1])
        total = torch.full_like(h, lines.start)
        clip = _cut if torch.is_grad_enabled() else _clip
        for steepness, least, most in self._pieces:
            first = most if isinstance(least, float) and least == -inf else least
            total = total + steepness * (clip(h, least, most) - first)
        return total

    def bounds(self, h: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Those of σ."""
        return self.activation.bounds(h)

    def derivative(self, h: Tensor) -> Tensor:
        if self.activation.cone:
            return self.activation.derivative(h) * self.steepest
        total = torch.zeros_like(h)
        for slope, lo, hi in self._pieces:
            total = total + slope * ((h > lo) & (h <= hi)).to(h.dtype)
        return total

    def potential(self, s: Tensor) -> Tensor:
        """G(s) + ½ (D − 1) s²."""
        inside = self.activation.potential(s)
        if self.activation.projects:
            load = self.diagonal.masked_fill(self.diagonal.isinf(), 0.0)
            return torch.where(inside.isinf(), inside, 0.5 * load * s * s)  # nothing cancels for a small D
        return inside + 0.5 * (self.diagonal - 1) * s * s

    def primitive(self, h: Tensor) -> Tensor:
        s = self.value(h)
        return h * s - self.potential(s)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return self.stepper(h, t)(k)

    def stepper(self, h: Tensor, t: float) -> Callable[[Tensor], Tensor]:
        """k ↦ Σ slope · (step quotient of a clamp to the line's ends), over the lines that are not flat."""
        if self.activation.cone:
            slope, step = self.steepest, self.activation.stepper(h, t)
            return lambda k: slope * step(k)
        steps = [(slope, _stepper(h, t, lo, hi)) for slope, lo, hi in self._pieces]
        if len(steps) == 1:
            slope, step = steps[0]
            return lambda k: slope * step(k)

        def combined(k: Tensor) -> Tensor:
            total = torch.zeros_like(k)
            for slope, step in steps:
                total = total + slope * step(k)
            return total

        return combined

    def complex_quotient(self, h: Tensor, k: Tensor, t: complex) -> Tensor:
        return super().complex_quotient(h, k, t) if not self.holomorphic else self.steepest * k


def _cut(h: Tensor, lo: Bound, hi: Bound) -> Tensor:
    """`_clip`, whose derivative by h is 1 in (lo, hi] alone, as that of `Loaded.derivative`."""
    if not isinstance(lo, float) or lo > -inf:
        h = torch.where(h <= lo, lo, h)
    if not isinstance(hi, float) or hi < inf:
        h = torch.where(h > hi, hi, h)
    return h


def _clip(h: Tensor, lo: Bound, hi: Bound) -> Tensor:
    if isinstance(lo, Tensor) and isinstance(hi, Tensor):
        return torch.clamp(h, lo, hi)
    if not isinstance(lo, float) or lo > -inf:
        h = torch.maximum(h, lo) if isinstance(lo, Tensor) else h.clamp_min(lo)
    if not isinstance(hi, float) or hi < inf:
        h = torch.minimum(h, hi) if isinstance(hi, Tensor) else h.clamp_max(hi)
    return h


def _stepper(h: Tensor, t: float, lo: Bound, hi: Bound) -> Callable[[Tensor], Tensor]:
    """k ↦ [clip(h + t k) − clip(h)]/t for bounds that may differ from unit to unit (see `clamp_stepper`)."""
    if isinstance(lo, float) and isinstance(hi, float):
        return clamp_stepper(h, t, lo, hi)
    s = _clip(h, lo, hi)
    beyond = (h - s) / t
    first, last = (lo, hi) if t > 0 else (hi, lo)
    least, most = (first - s) / t, (last - s) / t
    return lambda k: torch.minimum(torch.maximum(k + beyond, least), most)
