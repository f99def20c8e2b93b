"""The activations at complex arguments against mpmath at 50 digits, their real quotient and Cauchy–Riemann."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpc, mpf
from scipy import special
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.activations.complex import normal_cdf_aside
from ffebm_compiler.runtime.activations.table import (
    ALL,
    GELU,
    Activation,
    Identity,
    LogSigmoid,
    Mish,
    QuickGELU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)

HOLOMORPHIC = tuple(a for a in ALL if a.holomorphic)
every_holomorphic = pytest.mark.parametrize("activation", HOLOMORPHIC, ids=repr)


def logistic(z: Any) -> Any:
    return 1 / (1 + mpmath.exp(-z))


def log_one_plus_exp(z: Any) -> Any:
    return mpmath.log(1 + mpmath.exp(z))


def reference(a: Activation) -> tuple[Callable[[Any], Any], float]:
    """σ at complex arguments in mpmath, and the half-width of the strip on which it is holomorphic."""
    match a:
        case Identity():
            return lambda z: z, 8
        case Sigmoid():
            return logistic, math.pi
        case Tanh():
            return mpmath.tanh, math.pi / 2
        case Softplus(beta, _):
            return lambda z: log_one_plus_exp(beta * z) / beta, math.pi / beta
        case LogSigmoid():
            return lambda z: -log_one_plus_exp(-z), math.pi
        case SiLU():
            return lambda z: z * logistic(z), math.pi
        case QuickGELU(alpha):
            return lambda z: z * logistic(mpf(alpha) * z), math.pi / alpha
        case Mish():
            return lambda z: z * mpmath.tanh(log_one_plus_exp(z)), 3 * math.pi / 4
        case GELU("none"):
            return lambda z: z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2, 4 * math.sqrt(2)
        case GELU("tanh"):
            c = mpmath.sqrt(2 / mpmath.pi)
            return lambda z: z * (1 + mpmath.tanh(c * (z + mpf("0.044715") * z**3))) / 2, 2.7547
    raise AssertionError(a)


# Where a strip ends: the nearest poles of tanh and the gates, the branch points of softplus.
SINGULARITIES: list[tuple[Activation, complex]] = [
    (Sigmoid(), math.pi * 1j),
    (Tanh(), math.pi / 2 * 1j),
    (Softplus(), math.pi * 1j),
    (Softplus(2.0, 15.0), math.pi / 2 * 1j),
    (LogSigmoid(), math.pi * 1j),
    (SiLU(), math.pi * 1j),
    (QuickGELU(), math.pi / 1.702 * 1j),
    (Mish(), 0.5 * math.log(2) + 0.75 * math.pi * 1j),
    (GELU("tanh"), 0.634368348 + 2.754770605j),  # a root of z + 0.044715 z³ = iπ/(2c)
]

nudges = st.builds(lambda e, angle: cmath.rect(10.0**e, angle), st.floats(-7, 0.3), st.floats(-math.pi, math.pi))


@st.composite
def steps(draw: st.DrawFn) -> tuple[float, complex, complex]:
    """(h, w, t) with a step w = t k of 1e-9 to 8 in size, its imaginary part in units of the strip below 0.9."""
    size, angle = 10.0 ** draw(st.floats(-9, 0.9)), draw(st.floats(-math.pi, math.pi))
    step = complex(size * math.cos(angle), 0.9 * min(size, 1) * math.sin(angle))
    return draw(st.floats(-40, 40)), step, draw(nudges)


def arguments(
    step: tuple[float, complex, complex], strip: float, dtype: torch.dtype = torch.complex128
) -> tuple[Tensor, Tensor, complex]:
    h, w, t = step
    return torch.tensor([h], dtype=dtype.to_real()), torch.tensor([complex(w.real, w.imag * strip) / t], dtype=dtype), t


def test_what_is_holomorphic() -> None:
    expected = {Identity, Sigmoid, Tanh, Softplus, LogSigmoid, SiLU, QuickGELU, Mish, GELU}
    assert {type(a) for a in HOLOMORPHIC} == expected
    assert not any(type(a) in expected for a in ALL if not a.holomorphic)


@every_holomorphic
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@settings(max_examples=100, deadline=None)
@given(step=steps())
def test_complex_quotient_against_50_digits(
    activation: Activation, dtype: torch.dtype, step: tuple[float, complex, complex]
) -> None:
    """To 1e-12 of |k| max(lipschitz, |σ'(h + t k)|) for every t, close to the edge of the strip too."""
    sigma, strip = reference(activation)
    h, k, t = arguments(step, strip, dtype)
    with mp.workdps(50):
        start, move = mpf(h.item()), mpc(t) * mpc(k.item())
        expected = (sigma(start + move) - sigma(start)) / mpc(t)
        scale = abs(k.item()) * max(activation.lipschitz, abs(mpmath.diff(sigma, start + move)))
        got = activation.complex_quotient(h, k, t)
        assert got.dtype == dtype
        error = abs(mpc(got.item()) - expected)
        assert error <= 1e-12 * scale + torch.finfo(dtype).eps * abs(expected), (got.item(), complex(expected))


@pytest.mark.parametrize(("activation", "singularity"), SINGULARITIES, ids=repr)
def test_the_strip_is_as_wide_as_documented(activation: Activation, singularity: complex) -> None:
    """σ' → ∞ at the point where the strip ends."""
    h = torch.tensor([singularity.real], dtype=torch.float64)
    slopes = []
    for distance in (0.1, 0.01, 0.001):
        near = torch.tensor([complex(0, singularity.imag - distance)], dtype=torch.complex128)
        rise = activation.complex_quotient(h, near + 1e-3j * distance, 1) - activation.complex_quotient(h, near, 1)
        slopes.append(abs(rise.item()) / (1e-3 * distance))
    assert slopes[2] > 5 * slopes[1] > 25 * slopes[0]
    assert abs(singularity.imag - reference(activation)[1]) < 1e-4


@every_holomorphic
@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_complex_quotient_of_real_steps_is_the_quotient(
    activation: Activation, step: tuple[float, complex, complex]
) -> None:
    h = torch.tensor([step[0]], dtype=torch.float64)
    k, t = torch.tensor([step[1].real], dtype=torch.float64), abs(step[2])
    for sign in (1, -1):
        got = activation.complex_quotient(h, k + 0j, sign * t)
        assert got.imag.item() == 0
        assert abs(got.real - activation.quotient(h, k, sign * t)) <= 1e-12 * activation.lipschitz * abs(k)


@every_holomorphic
@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_complex_quotient_obeys_cauchy_riemann(activation: Activation, step: tuple[float, complex, complex]) -> None:
    """∂q/∂Re k = −i ∂q/∂Im k, by central differences in t k."""
    strip = reference(activation)[1]
    h, k, t = arguments(step, strip)
    d = 1e-5 / t
    along, across = (
        (activation.complex_quotient(h, k + u * d, t) - activation.complex_quotient(h, k - u * d, t)) / (2 * u * d)
        for u in (1, 1j)
    )
    assert abs(along - across).item() <= 1e-5 * max(1, abs(along.item()))


@every_holomorphic
@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_complex_quotient_of_conjugates_is_the_conjugate(
    activation: Activation, step: tuple[float, complex, complex]
) -> None:
    h, k, t = arguments(step, 2 * reference(activation)[1])  # outside the strip too
    got = activation.complex_quotient(h, k, t)
    assert torch.equal(activation.complex_quotient(h, k.conj(), t.conjugate()), got.conj())


@every_holomorphic
@pytest.mark.parametrize("t", [1e-12, 1e-3, -1.0, 2j, cmath.rect(0.5, 2.0)], ids=str)
def test_complex_quotient_is_finite_also_outside_the_strip(activation: Activation, t: complex) -> None:
    sizes = [0, 1e-30, 1e-3, math.log(2) / 2, 1, 3, 20, 40, 100, 800, 1e4, 1e10]
    turns = [math.pi * x for x in (0.5, 0.75, 1, 1.25, 2, 3, 5, 11, 100)]
    real = [sign * x for x in sizes for sign in (1, -1)]
    imaginary = [sign * y for y in sizes + turns for sign in (1, -1)]
    grid = torch.cartesian_prod(*(torch.tensor(v, dtype=torch.float64) for v in (real, real, imaginary)))
    h, w = grid[:, 0], torch.complex(grid[:, 1], grid[:, 2])
    got = activation.complex_quotient(h, w / t, t)
    bad = ~torch.isfinite(got)
    assert not bool(bad.any()), (h[bad][:5], w[bad][:5], got[bad][:5])


@every_holomorphic
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_quotient_takes_any_shape_and_leaves_its_inputs_alone(
    activation: Activation, dtype: torch.dtype
) -> None:
    h = torch.randn(3, 4, 5, dtype=dtype.to_real()).transpose(0, 2)
    k = torch.randn(5, 4, 3, dtype=dtype)
    before = h.clone(), k.clone()
    got = activation.complex_quotient(h, k, 0.3 + 0.1j)
    assert (got.shape, got.dtype) == (h.shape, dtype)
    assert got.data_ptr() != k.data_ptr()
    assert activation.complex_quotient(h[:0], k[:0], 0.1j).shape == h[:0].shape
    assert torch.equal(h, before[0])
    assert torch.equal(k, before[1])


def test_normal_cdf_against_scipy() -> None:
    """erf(x + iy) for |y| ≤ 4 and more, which torch does not have."""
    x, y = torch.cartesian_prod(torch.linspace(-13, 13, 261), torch.linspace(-8, 8, 81)).double().unbind(1)
    z = torch.complex(x, y)
    expected = 0.5 * (torch.from_numpy(special.erfc(-z.numpy() / math.sqrt(2))) - torch.special.erfc(-x / math.sqrt(2)))
    scale = torch.exp(-0.5 * z * z).abs().clamp(min=1)
    assert float(((normal_cdf_aside(x, y) - expected).abs() / scale).max()) < 1e-12


@pytest.mark.parametrize("activation", [a for a in ALL if not a.holomorphic], ids=repr)
def test_an_activation_made_of_pieces_is_refused(activation: Activation) -> None:
    message = rf"{type(activation).__name__}\(.*is not holomorphic, since it is made.*EquilibriumPropagation\(variant="
    with pytest.raises(UnsupportedError, match=message):
        activation.complex_quotient(torch.zeros(2), torch.zeros(2, dtype=torch.complex64), 1j)


def test_a_real_k_is_refused() -> None:
    with pytest.raises(InputError, match=r"k is torch.float32; expected complex64 or complex128"):
        Tanh().complex_quotient(torch.zeros(2), torch.zeros(2), 1j)
