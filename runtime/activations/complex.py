"""Differences of smooth functions over a complex step, for holomorphic equilibrium propagation.

h and a are real or complex, the step w and b = a + w are complex, all in double precision. Every difference
f(a + w) − f(a) is rewritten so that nothing cancels for small w and nothing overflows for large a. If w
reaches past a pole or a branch cut, the value is finite but means nothing.
f(z̄) = f(z)‾ holds in floating point, since every branch is chosen by a real part.
"""

from __future__ import annotations

from math import log, pi, sqrt

import torch
from torch import Tensor

from ffebm_compiler.runtime.activations.base import gauss_legendre, longest

__all__ = ["log1p", "logistic", "logistic_rise", "mish_gate_and_rise", "normal_cdf_aside", "softplus_rise"]


def log1p(z: Tensor) -> Tensor:
    """log(1 + z), real or complex. torch's is NaN for a complex z close to the smallest normal number."""
    if not z.is_complex():
        return torch.log1p(z)
    x, y = z.real, z.imag
    near = z.abs() < 0.5
    small = 0.5 * torch.log1p(torch.where(near, x * (2 + x) + y * y, 0.0))  # |1 + z|² − 1
    return torch.complex(torch.where(near, small, torch.log(torch.hypot(1 + x, y))), torch.atan2(y, 1 + x))


def logistic(z: Tensor) -> Tensor:
    """S(z) = 1/(1 + e^{−z}), with poles at the odd multiples of iπ."""
    positive = z.real >= 0
    power = torch.exp(torch.where(positive, -z, z))  # of modulus ≤ 1; no float64 makes it exactly −1
    return torch.where(positive, 1.0, power) / (1 + power)


def logistic_rise(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """S(b) − S(a), with w = b − a computed without cancellation.

    It is S(b) S(−a) (1 − e^{−w}), or S(a) S(−b) (e^w − 1) if Re w < 0, so that the power has modulus ≤ 1.
    """
    up = w.real >= 0
    product = logistic(torch.where(up, b, a)) * logistic(torch.where(up, -a, -b))
    return product * torch.expm1(torch.where(up, -w, w)) * torch.where(up, -1.0, 1.0)


def softplus_rise(h: Tensor, w: Tensor) -> Tensor:
    """log(1 + e^{h + w}) − log(1 + e^h) for real h; the branch cuts begin at |Im w| = π.

    For |w| < 1 it is log(1 + S(h)(e^w − 1)). Here 1 + S(h)(e^w − 1) lies between 1 and e^w, and so in the
    right half plane. Otherwise log(1 + e^z) = z⁺ + log(1 + e^{∓z}), with z⁺ = z for Re z > 0 and 0 elsewhere, and the
    difference is taken of each term. z⁺ moves by w itself if h and h + w are both positive.
    """
    near, end = w.abs() < 1, h + w
    short = log1p(torch.sigmoid(h) * torch.expm1(torch.where(near, w, 0.0)))
    after = end.real > 0
    moved = torch.where(after & (h > 0), w, torch.where(after, end, 0.0) - h.relu())
    tails = log1p(torch.exp(torch.where(after, -end, end))) - torch.log1p(torch.exp(-h.abs()))
    return torch.where(near, short, moved + tails)


def mish_gate_and_rise(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """g(h + w) and g(h + w) − g(h) for g(z) = tanh(log(1 + e^z)); the poles next to ℝ have |Im z| = 3π/4.

    g(z) = ½ [(1 − i) S(z + c) + (1 + i) S(z + c̄)] with c = −log(1 − i) = −½ log 2 + iπ/4. This is a rational function
    of e^z, without the branch cuts of the logarithm.
    """
    gate, rise = torch.zeros_like(w), torch.zeros_like(w)
    for sign in (1, -1):
        shift, factor = complex(-0.5 * log(2), sign * pi / 4), complex(0.5, -0.5 * sign)
        start, end = h + shift, h + w + shift
        gate = gate + factor * logistic(end)
        rise = rise + factor * logistic_rise(start, end, w)
    return gate, rise


def normal_cdf_aside(x: Tensor, y: Tensor) -> Tensor:
    """Φ(x + iy) − Φ(x) = iy ∫₀¹ φ(x + iyτ) dτ, φ(z) = e^{−z²/2}/√(2π), by Gauss–Legendre.

    The error is below 1e-12 of the larger of 1 and |φ(x + iy)| for |y| ≤ 8. φ grows as e^{y²/2}. Its size is capped at
    e^500 to keep the products finite, which happens from |y| = 31 on.
    """
    total = torch.zeros_like(x, dtype=torch.complex128)
    for node, weight in gauss_legendre(8 if longest(y) <= 1 else 32):
        size = torch.exp((0.5 * ((node * y).square() - x.square())).clamp(max=500))
        total += weight * torch.polar(size, -node * x * y)
    return torch.complex(-y * total.imag, y * total.real) * (1 / sqrt(2 * pi))
