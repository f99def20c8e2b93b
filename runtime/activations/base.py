"""The base class of activations, and the step formulas that they share.

A *step quotient* is [σ(h + t k) − σ(h)] / t. Evaluated as written it loses log10(1/|t|) digits. Every
formula here is an algebraic rewriting in which nothing cancels. It computes in the dtype of its arguments, so that it
runs on devices without float64. It never multiplies 0 by ∞ or subtracts ∞ from ∞.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError

__all__ = [
    "Activation",
    "Lines",
    "clamp_step",
    "clamp_stepper",
    "gauss_legendre",
    "in_double",
    "infinite_outside",
    "longest",
    "sigmoid_step",
]


@dataclass(frozen=True)
class Lines:
    """A piecewise linear σ, with slopes a_0..a_n between the knots h_1 < … < h_n."""

    knots: tuple[float, ...]
    slopes: tuple[float, ...]
    start: float = 0.0
    """σ(h_1), or σ(0) if there are no knots."""


class Activation(ABC):
    """An elementwise activation s = σ(h) with the functions that an energy needs.

    With a primitive Λ, Λ' = σ, and the potential G(s) = h s − Λ(h) at σ(h) = s (the Legendre transform
    of Λ), the equation ∂G(s) = h is equivalent to s = σ(h). Subclasses are frozen dataclasses: their
    parameters are their fields, they are hashable and compare by value. All methods are elementwise and
    keep shape and dtype.
    """

    def bound(self, parameters: Sequence[Tensor]) -> Activation:
        """The activation with the present values of its parameters, which are weights of the block."""
        return self

    def parameter_gradients(self, h: Tensor, force: Tensor) -> list[Tensor]:
        """Σ force · ∂σ(h)/∂parameter, for each parameter."""
        return []

    def kept(self) -> Activation:
        """The same activation with copies of its parameters, since others may change them."""
        return self

    def lipschitz_gradients(self) -> list[Tensor]:
        """∂ sup |σ'|/∂parameter, for each parameter."""
        return []

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the ATen operator, e.g. ``"leaky_relu"``."""

    @property
    @abstractmethod
    def lipschitz(self) -> float:
        """sup_h |σ'(h)|, exact or rounded up by less than 1e-6."""

    @property
    @abstractmethod
    def monotone(self) -> bool:
        """Whether σ is non-decreasing. G is then convex. Otherwise an equilibrium is only a stationary point."""

    @property
    @abstractmethod
    def smooth(self) -> bool:
        """Whether σ is continuously differentiable."""

    @property
    def holomorphic(self) -> bool:
        """Whether σ extends holomorphically to a neighbourhood of the real line.

        Then `complex_quotient` is defined. Activations made of pieces (ReLU, ELU, Softsign, …) are never holomorphic,
        even if they are smooth, since two pieces have no common extension where they meet.
        """
        return False

    @property
    def lines(self) -> Lines | None:
        """σ as straight lines; None if it is not piecewise linear, or not the same for every unit."""
        return None

    def unit_lines(self, shape: torch.Size) -> list[Lines]:
        """σ as straight lines for each unit of a state of this shape, flat; empty if it is not piecewise linear."""
        return [] if self.lines is None else [self.lines] * shape.numel()

    @property
    def projects(self) -> bool:
        """Whether σ projects h to a convex set, as ReLU and clamps do. Then G(s) = ½s² on it, and slopes are 0 or 1."""
        return False

    @property
    def cone(self) -> bool:
        """Whether σ projects h to a cone, as ReLU does. Then σ(a h) = a σ(h) for a > 0."""
        return False

    @abstractmethod
    def value(self, h: Tensor) -> Tensor:
        """σ(h), by the torch function that a network calls, so that the bits agree."""

    @abstractmethod
    def derivative(self, h: Tensor) -> Tensor:
        """σ'(h); at a kink, what torch's autograd returns."""

    def tangent(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        """k ↦ σ'(h) k, the limit t → 0 of `stepper`."""
        slope = self.derivative(h)
        return lambda k: slope * k

    @abstractmethod
    def primitive(self, h: Tensor) -> Tensor:
        """Λ(h), Λ' = σ. Its constant is free, but `potential` uses the same one."""

    def potential(self, s: Tensor) -> Tensor:
        """G(s) = h s − Λ(h) at σ(h) = s; +∞ outside the range of σ.

        Raises `UnsupportedError` if σ is not monotone, since σ(h) = s then has several solutions.
        """
        raise UnsupportedError(
            f"{self!r} is not monotone, so its potential is not a function of the state s; "
            "use energy_of_preactivation(h), which takes the pre-activation"
        )

    def energy_of_preactivation(self, h: Tensor) -> Tensor:
        """h σ(h) − Λ(h), which every activation has. It is G(σ(h)) if σ is monotone."""
        return in_double(lambda x: x * self.value(x) - self.primitive(x), h)

    def bounds(self, h: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """(inf σ, sup σ), in shapes that broadcast over pre-activations h; ±∞ if σ is unbounded."""
        return _bounds_of(self)

    def stepper(self, h: Tensor, t: float) -> Callable[[Tensor], Tensor]:
        """k ↦ quotient(h, k, t). Values that depend only on h and t are computed once."""
        return lambda k: self.quotient(h, k, t)

    @abstractmethod
    def quotient(self, h: Tensor, k: Tensor, t: float) -> Tensor:
        """[σ(h + t k) − σ(h)] / t without cancellation; tends to σ'(h) k as t → 0.

        `h` and `k` are float32 or float64 of the same shape. `t` may have either sign, with 1e-12 ≤ |t| ≤ 1e3, and t k
        must be finite. The error is a few units of round-off of lipschitz · |k|.
        """

    def complex_quotient(self, h: Tensor, k: Tensor, t: complex) -> Tensor:
        """[σ(h + t k) − σ(h)] / t for a complex nudge, as holomorphic equilibrium propagation takes it.

        `h` is real (float32 or float64), `k` is complex with the same shape, and t ≠ 0. The result has the dtype of k.
        It is computed in complex128 without cancellation, also for small |t|. The error is below 1e-12 of
        |k| max(lipschitz, |σ'(h + t k)|).

        The result is meaningful while |Im(t k)| is inside the strip around the real line on which σ is holomorphic. Its
        half width is π/2 for tanh, π for sigmoid, log_sigmoid and silu, π/β for softplus, π/α for quick_gelu, 3π/4 for
        mish, and 2.754… for gelu "tanh". gelu has no limit, and the stated accuracy up to 8. Outside, beyond a pole or
        a branch cut, the result is some finite number.

        Source: Laborieux & Zenke, 2022, arXiv 2209.00530.

        Raises:
            UnsupportedError: σ is not `holomorphic`.
            InputError: k is real.
        """
        if not self.holomorphic:
            raise UnsupportedError(
                f"{self!r} is not holomorphic, since it is made of pieces, so that it has no value at the complex "
                "pre-activations of holomorphic equilibrium propagation; use "
                "EquilibriumPropagation(variant='centered'), or a holomorphic activation such as SiLU() or Tanh()"
            )
        if not k.is_complex():
            raise InputError(f"k is {k.dtype}; expected complex64 or complex128 (use quotient for a real step)")
        return (self._complex_step(h.double(), t * k.to(torch.complex128)) / t).to(k.dtype)

    def _complex_step(self, h: Tensor, w: Tensor) -> Tensor:
        """σ(h + w) − σ(h) for float64 h and complex128 w, if σ is holomorphic."""
        raise NotImplementedError


@lru_cache
def _bounds_of(activation: Activation) -> tuple[float, float]:
    """(inf σ, sup σ) from values far out. If σ is not monotone, a grid is refined about its least value, too."""
    values = activation.value(torch.tensor([-1e30, 1e30], dtype=torch.float64, device="cpu")).tolist()
    if not activation.monotone:
        centre, width = 0.0, 40.0
        for _ in range(4):  # the last spacing is 2e-8: the value there is exact to round-off
            grid = torch.linspace(centre - width, centre + width, 4001, dtype=torch.float64, device="cpu")
            found = activation.value(grid)
            centre, width = float(grid[found.argmin()]), width / 1000
            values.append(float(found.min()))
    lo, hi = min(values), max(values)
    return -inf if lo < -1e20 else lo, inf if hi > 1e20 else hi


def in_double(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) evaluated in float64 and returned in the dtype of x."""
    return f(x.double()).to(x.dtype)


def infinite_outside(f: Callable[[Tensor], Tensor], s: Tensor, lo: float, hi: float) -> Tensor:
    """f(s) for lo ≤ s ≤ hi, evaluated in float64, and +∞ elsewhere."""
    return in_double(f, s.clamp(lo, hi)).masked_fill((s < lo) | (s > hi), inf)


def clamp_step(h: Tensor, k: Tensor, t: float, lo: float, hi: float) -> Tensor:
    """The step quotient of σ(h) = clamp(h, lo, hi). `lo` and `hi` may be infinite."""
    return clamp_stepper(h, t, lo, hi)(k)


def clamp_stepper(h: Tensor, t: float, lo: float, hi: float) -> Callable[[Tensor], Tensor]:
    """k ↦ the step quotient of σ(h) = clamp(h, lo, hi).

    With s = σ(h), it is k + (h − s)/t, clipped to [(lo − s)/t, (hi − s)/t]. The bounds are swapped for t < 0.
    A single bound b needs fewer kernels. Let u = (b − h)/t, u⁺ = max(u, 0) and u⁻ = min(u, 0). For a lower bound and
    t > 0, or an upper bound and t < 0, it is max(k − u⁺, u⁻). Otherwise it is min(k − u⁻, u⁺).
    """
    if lo == -inf and hi == inf:
        return torch.clone
    if lo > -inf and hi < inf:
        s = h.clamp(lo, hi)
        beyond = (h - s).mul_(1 / t)
        first, last = (lo, hi) if t > 0 else (hi, lo)
        least, most = s.sub(first).mul_(-1 / t), s.sub(last).mul_(-1 / t)
        return lambda k: (k + beyond).clamp(least, most)
    bound = lo if lo > -inf else hi
    u = h.mul(-1 / t) if bound == 0 else h.sub(bound).mul_(-1 / t)
    above = u.relu()
    below = u.clamp_max_(0)
    if (t > 0) == (lo > -inf):
        return lambda k: _in_place(torch.maximum, k - above, below)
    return lambda k: _in_place(torch.minimum, k - below, above)


def _in_place(f: Callable[..., Tensor], value: Tensor, other: Tensor) -> Tensor:
    """f(value, other), written over `value` unless a gradient needs that."""
    return f(value, other) if value.requires_grad else f(value, other, out=value)


def sigmoid_step(a: Tensor, b: Tensor, difference: Tensor, t: float) -> Tensor:
    """[S(b) − S(a)] / t for the logistic sigmoid S, with `difference` = b − a computed without cancellation.

    S(b) − S(a) = S(b) S(−a) (1 − e^{−(b − a)}) for b ≥ a, and it is antisymmetric. Its relative error is small
    even where S saturates.
    """
    rise = torch.copysign(torch.expm1(-difference.abs()), difference)
    return torch.sigmoid(torch.maximum(a, b)) * torch.sigmoid(-torch.minimum(a, b)) * rise.mul(1 / t)


def longest(k: Tensor) -> float:
    """max |k| of a real tensor, 0 for an empty one."""
    if k.numel() == 0:
        return 0.0
    least, most = torch.aminmax(k.detach())  # on a CPU a twentieth of the time of vector_norm(k, inf)
    return max(-float(least), float(most))


@lru_cache
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights on [0, 1], from the Jacobi matrix of the polynomials (Golub & Welsch, 1969)."""
    n = torch.arange(1, count, dtype=torch.float64, device="cpu")
    off = n / (4 * n * n - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return tuple(zip((0.5 * nodes + 0.5).tolist(), vectors[0].square().tolist(), strict=True))
