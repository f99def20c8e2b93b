"""Smooth activations: sigmoidal ones, softplus, and the gated ones (GELU, SiLU, Mish).

S is the logistic sigmoid and D(z) = −Li₂(−e^z) the primitive of softplus, D' = log(1 + e^z).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import erf, exp, inf, log, pi, sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.activations.base import (
    Activation,
    clamp_step,
    gauss_legendre,
    in_double,
    infinite_outside,
    longest,
    sigmoid_step,
)
from ffebm_compiler.runtime.activations.complex import (
    log1p,
    logistic,
    logistic_rise,
    mish_gate_and_rise,
    normal_cdf_aside,
    softplus_rise,
)

__all__ = ["GELU", "LogSigmoid", "Mish", "QuickGELU", "SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh", "quick_gelu"]


class _Smooth(Activation):
    """An activation without kinks in any derivative. It has two formulas for its quotient.

    If every step d = t k is small, the quotient is k times the average of σ' over the step, from two Gauss nodes.
    The error is d⁴ σ⁽⁵⁾/4320, and torch has σ'(x) k as one kernel. One node in the middle has the error
    d² σ⁽³⁾/24 and is used if that is below the round-off. Otherwise the subclass has a formula that
    holds for steps of every size and costs two to five times as much.
    """

    smooth = True
    holomorphic = True

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        # Reading k would wait for the device. There |k| is taken to be below 80 if t is small.
        on_device = h.device.type != "cpu"
        size = longest(k) * abs(t) if not on_device else 80 * abs(t)
        if size > self._small_step(h.dtype):
            return self._any_quotient(h, k, t)
        if size * size <= 24 * torch.finfo(h.dtype).eps and not on_device:
            return self._tangent(torch.add(h, k, alpha=0.5 * t), k)
        first, last = 0.5 - 0.5 / sqrt(3), 0.5 + 0.5 / sqrt(3)
        ends = (self._tangent(torch.add(h, k, alpha=t * x), k) for x in (first, last))
        return torch.add(*ends).mul_(0.5)

    def _small_step(self, dtype: torch.dtype) -> float:
        """The step d at which d⁴ reaches the round-off ε/d of a difference, up to the size of σ⁽⁵⁾."""
        return float(2 * torch.finfo(dtype).eps ** 0.2)

    @abstractmethod
    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        """σ'(x) k, in as few kernels as possible."""

    @abstractmethod
    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        """The quotient for steps of every size."""


@dataclass(frozen=True)
class Sigmoid(_Smooth):
    """σ(h) = S(h), Λ(h) = log(1 + e^h), G(s) = s log s + (1 − s) log(1 − s) on [0, 1]."""

    name = "sigmoid"
    lipschitz = 0.25
    monotone = True

    def value(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h)

    def derivative(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h) * torch.sigmoid(-h)

    def primitive(self, h: Tensor) -> Tensor:
        return _softplus(h)

    def potential(self, s: Tensor) -> Tensor:
        return infinite_outside(lambda x: torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x), s, 0, 1)

    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        return _sigmoid_tangent(x, k)

    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        step = t * k
        return sigmoid_step(h, h + step, step, t)

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        return logistic_rise(h, h + w, w)


@dataclass(frozen=True)
class Tanh(_Smooth):
    """σ(h) = tanh h = 2 S(2h) − 1, Λ(h) = log cosh h, G(s) = s·atanh s + ½log(1 − s²) on [−1, 1]."""

    name = "tanh"
    lipschitz = 1.0
    monotone = True

    def value(self, h: Tensor) -> Tensor:
        return torch.tanh(h)

    def derivative(self, h: Tensor) -> Tensor:
        return 1 - torch.tanh(h).square()

    def primitive(self, h: Tensor) -> Tensor:
        return in_double(lambda x: x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - log(2), h)

    def potential(self, s: Tensor) -> Tensor:
        return 0.5 * infinite_outside(lambda x: torch.xlogy(1 + x, 1 + x) + torch.xlogy(1 - x, 1 - x), s, -1, 1)

    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        return 4 * _sigmoid_tangent(2 * x, k)

    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        start, step = 2 * h, 2 * t * k
        return 2 * sigmoid_step(start, start + step, step, t)

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        return 2 * logistic_rise(2 * h, 2 * (h + w), 2 * w)


@dataclass(frozen=True)
class Softsign(Activation):
    """σ(h) = h/(1 + |h|), Λ(h) = |h| − log(1 + |h|), G(s) = −|s| − log(1 − |s|) on (−1, 1)."""

    name = "softsign"
    lipschitz = 1.0
    monotone = True
    smooth = True

    def value(self, h: Tensor) -> Tensor:
        return F.softsign(h)

    def derivative(self, h: Tensor) -> Tensor:
        return (1 + h.abs()).square().reciprocal()

    def primitive(self, h: Tensor) -> Tensor:
        return in_double(lambda x: x.abs() - torch.log1p(x.abs()), h)

    def potential(self, s: Tensor) -> Tensor:
        return infinite_outside(lambda x: -x.abs() - torch.log1p(-x.abs()), s, -1, 1)

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        moved = torch.add(h, k, alpha=t)
        s, s_moved = F.softsign(h), F.softsign(moved)
        crossing = s_moved * s.abs() - s * s_moved.abs()  # exactly 0 unless the step changes the sign
        return k / (1 + h.abs()) / (1 + moved.abs()) + crossing.mul(1 / t)


@dataclass(frozen=True)
class Softplus(_Smooth):
    """σ(h) = log(1 + e^{βh})/β, Λ(h) = D(βh)/β², G(s) = h s − Λ(h) at h = log(e^{βs} − 1)/β for s ≥ 0.

    torch returns h itself for βh > threshold, which is a jump of less than e^{−threshold}/β. Value and derivative
    have this jump. The primitive, the potential and the quotients use the formula without it, since a quotient would
    divide the jump by t. The formula is also what is extended to complex arguments.
    """

    beta: float = 1.0
    threshold: float = 20.0
    name = "softplus"
    lipschitz = 1.0
    monotone = True

    def __post_init__(self) -> None:
        if not 0 < self.beta < inf:
            raise InputError(f"{self!r}: beta must be finite and greater than 0")
        if not self.threshold >= 10:
            raise InputError(f"{self!r} is discontinuous; its threshold must be at least 10")

    def value(self, h: Tensor) -> Tensor:
        return F.softplus(h, self.beta, self.threshold)

    def derivative(self, h: Tensor) -> Tensor:
        scaled = self.beta * h
        return torch.maximum(torch.sigmoid(scaled), (scaled > self.threshold).to(h.dtype))

    def primitive(self, h: Tensor) -> Tensor:
        return in_double(lambda x: _softplus_primitive(self.beta * x) / self.beta**2, h)

    def potential(self, s: Tensor) -> Tensor:
        return infinite_outside(lambda x: _softplus_potential(self.beta * x) / self.beta**2, s, 0, inf)

    def _small_step(self, dtype: torch.dtype) -> float:
        return super()._small_step(dtype) / self.beta

    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        return k * torch.sigmoid(self.beta * x)

    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return _softplus_step(self.beta * h, self.beta * k, t) / self.beta

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        return softplus_rise(self.beta * h, self.beta * w) / self.beta


@dataclass(frozen=True)
class LogSigmoid(_Smooth):
    """σ(h) = log S(h) = −log(1 + e^{−h}), Λ(h) = D(−h). G(s) is the potential of softplus at −s, for s ≤ 0."""

    name = "log_sigmoid"
    lipschitz = 1.0
    monotone = True

    def value(self, h: Tensor) -> Tensor:
        return F.logsigmoid(h)

    def derivative(self, h: Tensor) -> Tensor:
        return torch.sigmoid(-h)

    def primitive(self, h: Tensor) -> Tensor:
        return in_double(lambda x: _softplus_primitive(-x), h)

    def potential(self, s: Tensor) -> Tensor:
        return infinite_outside(lambda x: _softplus_potential(-x), s, -inf, 0)

    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        return k * torch.sigmoid(-x)

    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return -_softplus_step(-h, -k, t)

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        return -softplus_rise(-h, -w)


@dataclass(frozen=True)
class SiLU(_Smooth):
    """σ(h) = h S(h), Λ(h) = h log(1 + e^h) − D(h). It is not monotone.

    Its step follows the product rule: k S(h + t k) + h [S(h + t k) − S(h)]/t.
    """

    name = "silu"
    lipschitz = 1.0998394  # 1.09983932…, at h = 2.39935728…
    monotone = False

    def value(self, h: Tensor) -> Tensor:
        return F.silu(h)

    def derivative(self, h: Tensor) -> Tensor:
        return self._tangent(h, torch.ones_like(h))

    def primitive(self, h: Tensor) -> Tensor:
        return in_double(lambda x: x * _softplus(x) - _softplus_primitive(x), h)

    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.aten.silu_backward(k, x))

    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        step = t * k
        moved = h + step
        return k * torch.sigmoid(moved) + h * sigmoid_step(h, moved, step, t)

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        return w * logistic(h + w) + h * logistic_rise(h, h + w, w)


@dataclass(frozen=True)
class Mish(_Smooth):
    """σ(h) = h tanh(log(1 + e^h)). It is not monotone.

    tanh(log(1 + e^h)) = Re[(1 − i) S(z)] with z = h − log(1 − i), so that
    Λ(h) = Re[(1 − i)(h log(1 + e^z) − D(z))]. Its step follows the product rule.
    """

    name = "mish"
    lipschitz = 1.0884982  # 1.08849816…, at h = 1.49057117…
    monotone = False

    def value(self, h: Tensor) -> Tensor:
        return F.mish(h)

    def derivative(self, h: Tensor) -> Tensor:
        return self._tangent(h, torch.ones_like(h))

    def primitive(self, h: Tensor) -> Tensor:
        def product(x: Tensor) -> Tensor:
            z = torch.complex(x - 0.5 * log(2), torch.full_like(x, pi / 4))
            both: Tensor = (1 - 1j) * (x * _softplus(z) - _softplus_primitive(z))
            return both.real

        return in_double(product, h)

    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.aten.mish_backward(k, x))

    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        start, end = 2 * _softplus(h), 2 * _softplus(torch.add(h, k, alpha=t))
        gate = 2 * sigmoid_step(start, end, 2 * t * _softplus_step(h, k, t), t)
        return k * torch.tanh(0.5 * end) + h * gate

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        gate, rise = mish_gate_and_rise(h, w)
        return w * gate + h * rise


@dataclass(frozen=True)
class GELU(_Smooth):
    """σ(h) = h Φ(h) with the normal distribution function Φ, or h S(2c(h + 0.044715 h³)), c = √(2/π), for "tanh".

    It is not monotone. For the exact form Λ(h) = ½[(h² − 1) Φ(h) + h φ(h)] + ¼. "tanh" has no elementary Λ and is
    integrated numerically. The step follows the product rule.
    """

    approximate: str = "none"
    name = "gelu"
    monotone = False

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise InputError(f'{self!r}: approximate must be "none" or "tanh"')

    @property
    def lipschitz(self) -> float:
        # Exact: at h = √2. "tanh": 1.128993068…, at h = 1.418504008….
        return 0.5 * (1 + erf(1)) + exp(-1) / sqrt(pi) + 1e-12 if self.approximate == "none" else 1.1289931

    def value(self, h: Tensor) -> Tensor:
        return F.gelu(h, approximate=self.approximate)

    def derivative(self, h: Tensor) -> Tensor:
        x = h if self.approximate == "none" else h.clamp(-30, 30)  # the gate is 0 or 1 there, and x³ stays finite
        return self._tangent(x, torch.ones_like(h))

    def primitive(self, h: Tensor) -> Tensor:
        if self.approximate == "tanh":
            return in_double(_gelu_tanh_primitive, h)
        return in_double(lambda x: 0.5 * ((x * x - 1) * _normal_cdf(x) + x * _normal_density(x)) + 0.25, h)

    def _tangent(self, x: Tensor, k: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.aten.gelu_backward(k, x, approximate=self.approximate))

    def _any_quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        step = t * k
        moved = h + step
        if self.approximate == "none":
            return k * _normal_cdf(moved) + h * _normal_cdf_step(h, k, t)
        # (b³ − a³)/(b − a) = (a + b/2)² + ¾b². It is capped, since the square may overflow where the gate saturates.
        slope = (h + 0.5 * moved).square().add(0.75 * moved.square()).clamp(max=1e6)
        end, rise = _gelu_argument(moved), step * (1 + 0.044715 * slope) * (2 * sqrt(2 / pi))
        return k * torch.sigmoid(end) + h * sigmoid_step(_gelu_argument(h), end, rise, t)

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        moved = h + w
        if self.approximate == "none":  # step to h + Re w first, then in the imaginary direction
            x = moved.real
            aside = normal_cdf_aside(x, moved.imag)
            return w * (_normal_cdf(x) + aside) + h * (_normal_cdf_step(h, w.real, 1.0) + aside)
        end, slope = _gelu_argument(moved), h * h + h * moved + moved * moved  # (b³ − a³)/(b − a)
        rise = w * (1 + 0.044715 * slope) * (2 * sqrt(2 / pi))
        return w * logistic(end) + h * logistic_rise(_gelu_argument(h), end, rise)


def _sigmoid_tangent(x: Tensor, k: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.aten.sigmoid_backward(k, torch.sigmoid(x)))


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) without torch's threshold. z may be complex with |Im z| < π."""
    if not z.is_complex():
        return z.relu() + torch.log1p(torch.exp(-z.abs()))
    positive = z.real > 0
    return torch.where(positive, z, 0) + log1p(torch.exp(torch.where(positive, -z, z)))


def _softplus_step(h: Tensor, k: Tensor, t: float) -> Tensor:
    """The step quotient of log(1 + e^h) = max(h, 0) + log(1 + e^{−|h|}).

    Let a = |h + t k| − |h|, which follows exactly from the step of max(h, 0). Then the second term moves by
    log(1 + (e^{−|h| − a} − e^{−|h|}) / (1 + e^{−|h|})).
    """
    above = clamp_step(h, k, t, 0, inf)
    a = (2 * above - k) * t
    size = h.abs()
    top = torch.exp(torch.maximum(-size, -size - a).clamp(max=0)) * torch.sigmoid(size)
    return above + torch.log1p(top * torch.copysign(torch.expm1(-a.abs()), -a)) * (1 / t)


def _softplus_primitive(z: Tensor) -> Tensor:
    """D(z) = −Li₂(−e^z) in double precision. z may be complex with |Im z| < π.

    For Re z > 0, D(z) = π²/6 + z²/2 − D(−z). Otherwise let w = log(1 + e^z), |w| < 0.74. Then D(z) is the series
    w + w²/4 + Σ_n B_{2n} w^{2n+1}/(2n+1)! with the Bernoulli numbers B_{2n}. Its terms fall by (|w|/2π)² each.
    """
    positive = z.real > 0
    w = log1p(torch.exp(torch.where(positive, -z, z)))
    square, series = w * w, torch.zeros_like(w)
    for divisor in reversed(_DILOGARITHM_DIVISORS):
        series = series * square + 1 / divisor
    below = w * (1 + 0.25 * w + square * series)
    return torch.where(positive, pi * pi / 6 + 0.5 * z * z - below, below)


# (2n + 1)!/B_{2n} for n = 1..7, with the Bernoulli numbers B_{2n}.
_DILOGARITHM_DIVISORS = (36, -3600, 211680, -10886400, 526901760, -16999766784000 / 691, 1120863744000)


def _softplus_potential(s: Tensor) -> Tensor:
    """The Legendre transform of D for s ≥ 0: h s − D(h) at h = log(e^s − 1) = s + log(1 − e^{−s})."""
    gap = -torch.expm1(-s)
    return s * s + torch.xlogy(s, gap) - _softplus_primitive(s + torch.log(gap))


def _normal_cdf(h: Tensor) -> Tensor:
    return 0.5 * torch.erfc(h * -sqrt(0.5))


def _normal_density(h: Tensor) -> Tensor:
    return torch.exp(-0.5 * h * h) * (1 / sqrt(2 * pi))


def _normal_cdf_step(h: Tensor, k: Tensor, t: float) -> Tensor:
    """The step quotient of Φ. If |t k| is small, it is k times the density, averaged over two Gauss nodes.

    The average is wrong by (t k)⁴ φ''''/4320, and the difference of Φ by ε/|t k|. The two are equal near ε^{1/5}.
    """
    step = t * k
    middle, node = h + 0.5 * step, step * (0.5 / sqrt(3))
    averaged = 0.5 * k * (_normal_density(middle - node) + _normal_density(middle + node))
    small = step.abs() <= 3 * torch.finfo(h.dtype).eps ** 0.2
    return torch.where(small, averaged, (_normal_cdf(h + step) - _normal_cdf(h)) * (1 / t))


def _gelu_argument(h: Tensor) -> Tensor:
    return h * (1 + 0.044715 * h * h) * (2 * sqrt(2 / pi))


def _gelu_tanh_primitive(h: Tensor) -> Tensor:
    """∫₀^h σ, with σ(u) = ½u + ½u·tanh(…). The second term is even, and equal to |u|/2 to 1e-21 for |u| > 8."""
    size = h.abs()
    inner = size.clamp(max=8)
    even = 0.25 * (size.square() - inner.square())
    for node, weight in gauss_legendre(64):
        u = inner * node
        even = even + inner * weight * 0.5 * u * torch.tanh(0.5 * _gelu_argument(u))
    return 0.25 * h.square() + torch.copysign(even, h)


@dataclass(frozen=True)
class QuickGELU(Activation):
    """σ(h) = h S(α h) = SiLU(α h)/α with α = 1.702. The gate S approximates Φ in CLIP and other models.

    It is not monotone. Everything follows from SiLU with a scaled h, such as Λ(h) = Λ_SiLU(α h)/α².
    """

    alpha: float = 1.702
    name = "quick_gelu"
    monotone = False
    smooth = True
    holomorphic = True

    @property
    def lipschitz(self) -> float:
        return SiLU().lipschitz

    def value(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(self.alpha * h)

    def derivative(self, h: Tensor) -> Tensor:
        return SiLU().derivative(self.alpha * h)

    def primitive(self, h: Tensor) -> Tensor:
        return SiLU().primitive(self.alpha * h) / self.alpha**2

    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        return SiLU().quotient(self.alpha * h, self.alpha * k, t) / self.alpha

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        return SiLU()._complex_step(self.alpha * h, self.alpha * w) / self.alpha


def quick_gelu(h: Tensor) -> Tensor:
    """QuickGELU as a function. A recognised `h * sigmoid(1.702 * h)` becomes a call of it."""
    return QuickGELU().value(h)
