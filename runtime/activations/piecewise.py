"""Activations made of linear, exponential or quadratic pieces: clamps and their combinations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.activations.base import (
    Activation,
    Lines,
    clamp_step,
    clamp_stepper,
    in_double,
    infinite_outside,
)

__all__ = [
    "CELU",
    "ELU",
    "SELU",
    "Clamp",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LeakyReLU",
    "ReLU",
    "SlopedClamp",
    "Softshrink",
    "sloped_clamp",
]


@dataclass(frozen=True)
class Identity(Activation):
    """σ(h) = h, Λ(h) = ½h², G(s) = ½s²."""

    name = "identity"
    lipschitz = 1.0
    monotone = True
    smooth = True
    holomorphic = True
    lines = Lines((), (1.0,))
    projects = True
    cone = True

    def value(self, h: Tensor) -> Tensor:
        return h

    def derivative(self, h: Tensor) -> Tensor:
        return torch.ones_like(h)

    def tangent(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        return torch.clone

    def primitive(self, h: Tensor) -> Tensor:
        return 0.5 * h * h

    def potential(self, s: Tensor) -> Tensor:
        return 0.5 * s * s

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return k.clone()

    def complex_quotient(self, h: Tensor, k: Tensor, t: complex) -> Tensor:
        return k.clone()


class _Clamp(Activation):
    """σ(h) = min(max(h, lo), hi), Λ(h) = h s − ½s² with s = σ(h), G(s) = ½s² on [lo, hi]."""

    lipschitz = 1.0
    monotone = True
    smooth = False
    projects = True
    lo: float
    hi: float

    @property
    def lines(self) -> Lines:
        bounds = tuple(bound for bound in (self.lo, self.hi) if abs(bound) < inf)
        slopes = (*((0.0,) if self.lo > -inf else ()), 1.0, *((0.0,) if self.hi < inf else ()))
        return Lines(bounds, slopes, bounds[0] if bounds else 0.0)

    def primitive(self, h: Tensor) -> Tensor:
        s = h.clamp(self.lo, self.hi)
        return s * (h - 0.5 * s)

    def potential(self, s: Tensor) -> Tensor:
        return infinite_outside(lambda x: 0.5 * x * x, s, self.lo, self.hi)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return clamp_step(h, k, t, self.lo, self.hi)

    def stepper(self, h: Tensor, t: float) -> Callable[[Tensor], Tensor]:
        return clamp_stepper(h, t, self.lo, self.hi)


@dataclass(frozen=True)
class ReLU(_Clamp):
    """σ(h) = max(h, 0), Λ(h) = ½σ(h)², G(s) = ½s² for s ≥ 0."""

    name = "relu"
    lo = 0.0
    hi = inf
    cone = True

    def value(self, h: Tensor) -> Tensor:
        return torch.relu(h)

    def derivative(self, h: Tensor) -> Tensor:
        return (h > 0).to(h.dtype)

    def tangent(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        """One pass, where a comparison, its dtype and a product are three."""
        return lambda k: torch.ops.aten.threshold_backward(k, h, 0)


@dataclass(frozen=True)
class Hardtanh(_Clamp):
    """σ(h) = min(max(h, lo), hi) with derivative 0 at both bounds. ReLU6 is Hardtanh(0, 6)."""

    lo: float = -1.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        _check_bounds(self)

    @property
    def name(self) -> str:
        return "relu6" if (self.lo, self.hi) == (0, 6) else "hardtanh"

    def value(self, h: Tensor) -> Tensor:
        return F.hardtanh(h, self.lo, self.hi)

    def derivative(self, h: Tensor) -> Tensor:
        return ((h > self.lo) & (h < self.hi)).to(h.dtype)

    def tangent(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        """One pass, as in `ReLU`."""
        return lambda k: torch.ops.aten.hardtanh_backward(k, h, self.lo, self.hi)


def _closed() -> bool:
    """Whether `torch.clamp` passes the gradient on at its bounds."""
    with torch.inference_mode(False), torch.enable_grad():
        bound = torch.zeros((), device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(torch.clamp(bound, min=0.0), bound)
    return bool(slope)


_CLOSED = _closed()


def _passes(h: Tensor, lo: float, hi: float) -> Tensor:
    """Where `torch.clamp` passes the gradient on."""
    return (h >= lo) & (h <= hi) if _CLOSED else (h > lo) & (h < hi)


@dataclass(frozen=True)
class Clamp(_Clamp):
    """σ(h) = min(max(h, lo), hi), at both bounds with the derivative of the installed `torch.clamp`.

    It is 1 there in torch 2.13, and 0 in torch 2.15.
    """

    lo: float = -inf
    hi: float = inf
    name = "clamp"

    def __post_init__(self) -> None:
        _check_bounds(self)

    def value(self, h: Tensor) -> Tensor:
        return torch.clamp(h, self.lo, self.hi)

    def derivative(self, h: Tensor) -> Tensor:
        return _passes(h, self.lo, self.hi).to(h.dtype)


@dataclass(frozen=True)
class SlopedClamp(Activation):
    """σ(h) = min(max(a h, lo), hi) with a > 0, Λ(h) = h s − s²/2a with s = σ(h), G(s) = s²/2a on [lo, hi].

    With lo = 0 and hi = 1 this is the hard sigmoid of deep convolutional Hopfield networks (Laborieux et al. 2021,
    Nest & Ernoult 2024). It differs from a clamp after a product with a, since here a multiplies the feedback too.
    """

    slope: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    name = "sloped_clamp"
    monotone = True
    smooth = False

    def __post_init__(self) -> None:
        _check_positive(self, self.slope)
        _check_bounds(self)

    @property
    def lines(self) -> Lines:
        ends = tuple(bound for bound in (self.lo, self.hi) if abs(bound) < inf)
        slopes = (*((0.0,) if self.lo > -inf else ()), self.slope, *((0.0,) if self.hi < inf else ()))
        return Lines(tuple(bound / self.slope for bound in ends), slopes, ends[0] if ends else 0.0)

    @property
    def lipschitz(self) -> float:
        return self.slope

    def value(self, h: Tensor) -> Tensor:
        return torch.clamp(h * self.slope, self.lo, self.hi)

    def derivative(self, h: Tensor) -> Tensor:
        drive = h * self.slope
        return _passes(drive, self.lo, self.hi).to(h.dtype).mul_(self.slope)

    def primitive(self, h: Tensor) -> Tensor:
        s = self.value(h)
        return s * (h - s / (2 * self.slope))

    def potential(self, s: Tensor) -> Tensor:
        return infinite_outside(lambda x: x * x / (2 * self.slope), s, self.lo, self.hi)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return self.stepper(h, t)(k)

    def stepper(self, h: Tensor, t: float) -> Callable[[Tensor], Tensor]:
        """The step quotient of a clamp, for a h and a k."""
        step = clamp_stepper(h * self.slope, t, self.lo, self.hi)
        return lambda k: step(k * self.slope)


def sloped_clamp(h: Tensor, slope: float, lo: float, hi: float) -> Tensor:
    """`SlopedClamp` as a function. A recognised `clamp(slope * h, lo, hi)` becomes a call of it."""
    return SlopedClamp(slope, lo, hi).value(h)


def _check_bounds(activation: _Clamp | SlopedClamp) -> None:
    if not activation.lo < activation.hi:
        raise InputError(f"{activation!r}: the lower bound must be less than the upper bound")


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """σ(h) = h for h > 0, a h else, with a ≥ 0. Λ(h) = ½h σ(h), and G(s) = ½s² for s ≥ 0, ½s²/a else."""

    negative_slope: float = 0.01
    name = "leaky_relu"
    smooth = False

    def __post_init__(self) -> None:
        if not abs(self.negative_slope) < inf:
            raise InputError(f"{self!r}: negative_slope must be finite")

    @property
    def lines(self) -> Lines:
        return Lines((0.0,), (self.negative_slope, 1.0))

    @property
    def lipschitz(self) -> float:
        return max(1.0, abs(self.negative_slope))

    @property
    def monotone(self) -> bool:
        return self.negative_slope >= 0

    def value(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.negative_slope)

    def derivative(self, h: Tensor) -> Tensor:
        return (h > 0).to(h.dtype).mul_(1 - self.negative_slope).add_(self.negative_slope)

    def primitive(self, h: Tensor) -> Tensor:
        return 0.5 * h * self.value(h)

    def potential(self, s: Tensor) -> Tensor:
        if not self.monotone:
            return super().potential(s)
        if self.negative_slope == 0:
            return infinite_outside(lambda x: 0.5 * x * x, s, 0, inf)
        return 0.5 * s * F.leaky_relu(s, 1 / self.negative_slope)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        above = clamp_step(h, k, t, 0, inf)
        return torch.add(above, k - above, alpha=self.negative_slope)


@dataclass(frozen=True)
class Softshrink(Activation):
    """σ(h) = h − clamp(h, −λ, λ), Λ(h) = ½σ(h)², G(s) = ½s² + λ|s|."""

    lambd: float = 0.5
    name = "softshrink"
    lipschitz = 1.0
    monotone = True
    smooth = False

    def __post_init__(self) -> None:
        if not 0 <= self.lambd < inf:
            raise InputError(f"{self!r}: lambd must be finite and not negative")

    @property
    def lines(self) -> Lines:
        return Lines((-self.lambd, self.lambd), (1.0, 0.0, 1.0)) if self.lambd > 0 else Lines((), (1.0,))

    def value(self, h: Tensor) -> Tensor:
        return F.softshrink(h, self.lambd)

    def derivative(self, h: Tensor) -> Tensor:
        return (h.abs() > self.lambd).to(h.dtype)

    def primitive(self, h: Tensor) -> Tensor:
        return 0.5 * self.value(h).square()

    def potential(self, s: Tensor) -> Tensor:
        return s.abs() * (0.5 * s.abs() + self.lambd)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return k - clamp_step(h, k, t, -self.lambd, self.lambd) if self.lambd > 0 else k.clone()


@dataclass(frozen=True)
class Hardsigmoid(Activation):
    """σ(h) = clamp(h/6 + ½, 0, 1), Λ(h) = h s − G(s) with s = σ(h), G(s) = 3s² − 3s on [0, 1]."""

    name = "hardsigmoid"
    lines = Lines((-3.0, 3.0), (0.0, 1 / 6, 0.0))
    lipschitz = 1 / 6
    monotone = True
    smooth = False

    def value(self, h: Tensor) -> Tensor:
        return F.hardsigmoid(h)

    def derivative(self, h: Tensor) -> Tensor:
        return ((h > -3) & (h < 3)).to(h.dtype).div_(6)

    def primitive(self, h: Tensor) -> Tensor:
        s = self.value(h)
        return s * (h - 3 * s + 3)

    def potential(self, s: Tensor) -> Tensor:
        return infinite_outside(lambda x: 3 * x * (x - 1), s, 0, 1)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return clamp_step(h, k, t, -3, 3).div_(6)


@dataclass(frozen=True)
class Hardswish(Activation):
    """σ(h) = h m(h) with m(h) = clamp(h/6 + ½, 0, 1). Λ = h³/18 + h²/4 − ¾ on [−3, 3], and 0 below.

    It is not monotone. Its step follows the product rule: k m(h + t k) + h [m(h + t k) − m(h)]/t.
    """

    name = "hardswish"
    lipschitz = 1.5
    monotone = False
    smooth = False

    def value(self, h: Tensor) -> Tensor:
        return F.hardswish(h)

    def derivative(self, h: Tensor) -> Tensor:
        inside = ((h > -3) & (h < 3)).to(h.dtype)
        return inside * (h.clamp(-3, 3) / 3 + 0.5) + (h >= 3).to(h.dtype)

    def primitive(self, h: Tensor) -> Tensor:
        c = h.clamp(-3, 3)
        return c * c * (c / 18 + 0.25) - 0.75 + 0.5 * (h.clamp(min=3).square() - 9)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        gate = clamp_step(h, k, t, -3, 3)
        moved = torch.add(h, k, alpha=t).clamp_(-3, 3).add_(3)
        return (k * moved + h * gate) / 6


class _Exponential(Activation):
    """σ(h) = p h for h > 0, a (e^{ch} − 1) else, with p, a, c > 0.

    Λ(h) = ½p h² for h > 0, a [(e^{ch} − 1)/c − h] else;
    G(s) = s²/2p for s ≥ 0, (a/c) [(1 + r) log(1 + r) − r] with r = s/a for −a ≤ s < 0.
    """

    monotone = True

    @property
    @abstractmethod
    def coefficients(self) -> tuple[float, float, float]:
        """(p, a, c)."""

    @property
    def lipschitz(self) -> float:
        p, a, c = self.coefficients
        return max(p, a * c)

    @property
    def smooth(self) -> bool:
        p, a, c = self.coefficients
        return p == a * c

    def derivative(self, h: Tensor) -> Tensor:
        p, a, c = self.coefficients
        positive = (h > 0).to(h.dtype)
        return p * positive + a * c * (1 - positive) * torch.exp(c * h.clamp(max=0))

    def primitive(self, h: Tensor) -> Tensor:
        p, a, c = self.coefficients

        def integral(x: Tensor) -> Tensor:
            below = x.clamp(max=0)
            return 0.5 * p * x.relu().square() + a * (torch.expm1(c * below) / c - below)

        return in_double(integral, h)

    def potential(self, s: Tensor) -> Tensor:
        p, a, c = self.coefficients

        def convex(x: Tensor) -> Tensor:
            r = x.clamp(max=0) / a
            return x.relu().square() / (2 * p) + a / c * (torch.xlogy(1 + r, 1 + r) - r)

        return infinite_outside(convex, s, -a, inf)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        p, a, c = self.coefficients
        above = clamp_step(h, k, t, 0, inf)
        step = (k - above).mul_(c * t)  # of c·min(h, 0); k − above is exact
        rise = torch.copysign(torch.expm1(-step.abs()), step)
        top = torch.exp((c * h.clamp(max=0) + step.relu()).clamp(max=0))  # the larger end, up to round-off
        return p * above + top * rise.mul(a / t)


@dataclass(frozen=True)
class ELU(_Exponential):
    """σ(h) = scale·h for h > 0, scale·α (e^{input_scale·h} − 1) else, with all parameters of `aten.elu`."""

    alpha: float = 1.0
    scale: float = 1.0
    input_scale: float = 1.0
    name = "elu"

    def __post_init__(self) -> None:
        _check_positive(self, self.alpha, self.scale, self.input_scale)

    @property
    def coefficients(self) -> tuple[float, float, float]:
        return self.scale, self.alpha * self.scale, self.input_scale

    def value(self, h: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.aten.elu.default(h, self.alpha, self.scale, self.input_scale))


@dataclass(frozen=True)
class SELU(_Exponential):
    """σ(h) = λ·ELU(h; α) with the two constants of Klambauer et al. (2017, arXiv 1706.02515)."""

    name = "selu"
    coefficients = (1.0507009873554805, 1.0507009873554805 * 1.6732632423543773, 1.0)

    def value(self, h: Tensor) -> Tensor:
        return F.selu(h)


@dataclass(frozen=True)
class CELU(_Exponential):
    """σ(h) = h for h > 0, α (e^{h/α} − 1) else. It is continuously differentiable."""

    alpha: float = 1.0
    name = "celu"
    smooth = True

    def __post_init__(self) -> None:
        _check_positive(self, self.alpha)

    @property
    def coefficients(self) -> tuple[float, float, float]:
        return 1.0, self.alpha, 1 / self.alpha

    def value(self, h: Tensor) -> Tensor:
        return F.celu(h, self.alpha)


def _check_positive(activation: Activation, *parameters: float) -> None:
    if not all(0 < p < inf for p in parameters):
        raise InputError(f"{activation!r}: every parameter must be finite and greater than 0")
