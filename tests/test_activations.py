"""The activations against mpmath at 50 digits, torch itself and torch's autograd."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch import Tensor, nn

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.activations.table import (
    ALL,
    CELU,
    ELU,
    GELU,
    SELU,
    Activation,
    Clamp,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    Identity,
    LeakyReLU,
    LogSigmoid,
    Mish,
    QuickGELU,
    ReLU,
    Sigmoid,
    SiLU,
    SlopedClamp,
    Softplus,
    Softshrink,
    Softsign,
    Tanh,
    from_aten,
)

MONOTONE = tuple(a for a in ALL if a.monotone)
PIECEWISE_LINEAR = (Identity, ReLU, Hardtanh, Clamp, LeakyReLU, Softshrink, Hardsigmoid)
KINKS = (-3.0, -1.0, -0.75, -0.5, 0.0, 0.5, 1.0, 1.25, 2.0, 3.0, 6.0)
STEPS = tuple(sign * 10.0**-n for n in range(1, 9) for sign in (1, -1))


def _label(parameter: object) -> str:
    """A name that is the same in every process: the repr of a function holds its address."""
    return "function" if isinstance(parameter, types.FunctionType) else repr(parameter)[:40]


every_activation = pytest.mark.parametrize("activation", ALL, ids=repr)
every_monotone = pytest.mark.parametrize("activation", MONOTONE, ids=repr)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def fifty_digits() -> Iterator[None]:
    with mp.workdps(50):
        yield


def clip(x: Any, lo: float, hi: float) -> Any:
    return min(max(x, lo), hi)


def exponential(x: Any, p: float, a: float, c: float) -> Any:
    return p * x if x > 0 else a * mpmath.expm1(c * x)


def logistic(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def log_one_plus_exp(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x))


def reference(a: Activation) -> Callable[[Any], Any]:
    """σ in mpmath, written from the definition and not from this package's formulas."""
    match a:
        case Identity():
            return lambda x: x
        case ReLU():
            return lambda x: max(x, mpf(0))
        case Hardtanh(lo, hi) | Clamp(lo, hi):
            return lambda x: clip(x, mpf(lo), mpf(hi))
        case LeakyReLU(slope):
            return lambda x: x if x > 0 else mpf(slope) * x
        case SlopedClamp(slope, lo, hi):
            return lambda x: clip(mpf(slope) * x, mpf(lo), mpf(hi))
        case Softshrink(lambd):
            return lambda x: x - lambd if x > lambd else x + lambd if x < -lambd else mpf(0)
        case Hardsigmoid():
            return lambda x: clip(x + 3, mpf(0), mpf(6)) / 6
        case Hardswish():
            return lambda x: x * clip(x + 3, mpf(0), mpf(6)) / 6
        case ELU(alpha, scale, input_scale):
            return lambda x: exponential(x, mpf(scale), mpf(alpha) * scale, mpf(input_scale))
        case SELU():
            scale = mpf("1.0507009873554804934193349852946")
            return lambda x: exponential(x, scale, scale * mpf("1.6732632423543772848170429916717"), mpf(1))
        case CELU(alpha):
            return lambda x: exponential(x, mpf(1), mpf(alpha), 1 / mpf(alpha))
        case Sigmoid():
            return logistic
        case Tanh():
            return lambda x: mpmath.tanh(x)
        case Softsign():
            return lambda x: x / (1 + abs(x))
        case Softplus(beta, _):
            return lambda x: log_one_plus_exp(beta * x) / beta
        case LogSigmoid():
            return lambda x: -log_one_plus_exp(-x)
        case SiLU():
            return lambda x: x * logistic(x)
        case QuickGELU(alpha):
            return lambda x: x * logistic(mpf(alpha) * x)
        case Mish():
            return lambda x: x * mpmath.tanh(log_one_plus_exp(x))
        case GELU("none"):
            return lambda x: x * mpmath.ncdf(x)
        case GELU("tanh"):
            c = mpmath.sqrt(2 / mpmath.pi)
            return lambda x: x * (1 + mpmath.tanh(c * (x + mpf("0.044715") * x**3))) / 2
    raise AssertionError(a)


SOURCES: list[tuple[Activation, Callable[[Tensor], Tensor]]] = [
    (Identity(), nn.Identity()),
    (ReLU(), nn.ReLU()),
    (Hardtanh(), nn.Hardtanh()),
    (Hardtanh(-0.1, 2.3), nn.Hardtanh(-0.1, 2.3)),
    (Hardtanh(0, 6), nn.ReLU6()),
    (Clamp(-0.7, 0.1), lambda x: x.clamp(-0.7, 0.1)),
    (Clamp(lo=0.3), lambda x: x.clamp(min=0.3)),
    (Clamp(hi=0.3), lambda x: x.clamp_max(0.3)),
    (LeakyReLU(0.3), nn.LeakyReLU(0.3)),
    (Softshrink(0.3), nn.Softshrink(0.3)),
    (Hardsigmoid(), nn.Hardsigmoid()),
    (Hardswish(), nn.Hardswish()),
    (ELU(0.7), nn.ELU(0.7)),
    (SELU(), nn.SELU()),
    (CELU(0.8), nn.CELU(0.8)),
    (Sigmoid(), nn.Sigmoid()),
    (Tanh(), nn.Tanh()),
    (Softsign(), nn.Softsign()),
    (Softplus(), nn.Softplus()),
    (Softplus(2.0, 15.0), nn.Softplus(2.0, 15.0)),
    (LogSigmoid(), nn.LogSigmoid()),
    (SiLU(), nn.SiLU()),
    (Mish(), nn.Mish()),
    (SlopedClamp(0.5), lambda x: torch.clamp(0.5 * x, 0, 1)),
    (SlopedClamp(2.0, -1.0, 4.0), lambda x: torch.clamp(x * 2, -1, 4)),
    (QuickGELU(), lambda x: x * torch.sigmoid(1.702 * x)),
    (GELU(), nn.GELU()),
    (GELU("tanh"), nn.GELU("tanh")),
]


def test_samples_cover_every_activation_with_distinct_values() -> None:
    assert {type(a) for a in ALL} == {type(a) for a, _ in SOURCES}
    assert len(set(ALL)) == len(ALL)


def test_activations_compare_by_value() -> None:
    assert Hardtanh(-1, 2) == Hardtanh(-1.0, 2.0)
    assert hash(Hardtanh(-1, 2)) == hash(Hardtanh(-1.0, 2.0))
    assert len({Hardtanh(-1, 2), Clamp(-1, 2), ELU(), CELU()}) == 4


@every_dtype
@pytest.mark.parametrize(("activation", "source"), SOURCES, ids=_label)
def test_value_has_the_bits_of_the_source(
    activation: Activation, source: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    h = torch.cat([torch.randn(4001, dtype=dtype) * 5, torch.tensor([0.0, -3, 3, 6, 1e4, -1e4], dtype=dtype)])
    assert torch.equal(activation.value(h), source(h))


@every_activation
def test_derivative_is_autograds_also_at_kinks(activation: Activation) -> None:
    kinks = torch.tensor([0, -1, 1, -0.5, 2, 6, -0.75, 1.25, 0.5, -3, 3, 50, -50], dtype=torch.float64)
    h = torch.cat([torch.linspace(-12, 12, 4001, dtype=torch.float64), kinks]).requires_grad_()
    (expected,) = torch.autograd.grad(activation.value(h).sum(), h)
    # Torch's backward rounds 1/6 of hardsigmoid and 1/alpha of celu to float32.
    rtol = 3e-6 if isinstance(activation, Hardsigmoid | CELU) else 1e-11
    torch.testing.assert_close(activation.derivative(h.detach()), expected, rtol=rtol, atol=1e-13)


@every_activation
def test_tangent_is_the_product_with_the_derivative(activation: Activation) -> None:
    kinks = torch.tensor([0, -1, 1, 6, 0.5, -3, 3], dtype=torch.float64)
    h = torch.cat([torch.linspace(-12, 12, 401, dtype=torch.float64), kinks])
    k = torch.linspace(-2, 3, len(h), dtype=torch.float64)
    torch.testing.assert_close(activation.tangent(h)(k), activation.derivative(h) * k, rtol=1e-14, atol=0)


@every_activation
def test_lipschitz_bounds_the_derivative_tightly(activation: Activation) -> None:
    h = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    steepest = activation.derivative(h).abs().max().item()
    assert steepest <= activation.lipschitz <= steepest + (1e-3 if isinstance(activation, Softsign) else 1e-6)


@every_activation
def test_monotone_says_whether_the_derivative_is_never_negative(activation: Activation) -> None:
    h = torch.linspace(-10, 10, 10_001, dtype=torch.float64)
    assert activation.monotone == bool((activation.derivative(h) >= 0).all())


@every_activation
def test_smooth_says_whether_the_derivative_is_continuous(activation: Activation) -> None:
    h = torch.linspace(-8, 8, 1_600_001, dtype=torch.float64)
    assert activation.smooth == bool(activation.derivative(h).diff().abs().max() < 1e-4)


@every_activation
def test_primitive_differentiates_to_the_value(activation: Activation) -> None:
    sigma = reference(activation)
    h = torch.cat([torch.linspace(-11, 11, 45, dtype=torch.float64), torch.tensor([-33.0, 47.0]).double()])
    differences = activation.primitive(h) - activation.primitive(torch.zeros_like(h))
    for x, got in zip(h.tolist(), differences.tolist(), strict=True):
        breaks = sorted({0.0, x, *(b for b in KINKS if min(0, x) < b < max(0, x))}, reverse=x < 0)
        expected = mpmath.quad(sigma, breaks) if x else mpf(0)
        assert abs(got - expected) <= 1e-13 * max(1, x * x), x


@every_activation
@every_dtype
def test_quotient_against_50_digits(activation: Activation, dtype: torch.dtype) -> None:
    """Within a few units of round-off of lipschitz·|k|, kinks crossed or not, for t down to 1e-8."""
    sigma = reference(activation)
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(40, generator=generator, dtype=torch.float64) * 3
    k = torch.randn(40, generator=generator, dtype=torch.float64) * 2
    tolerance = 16 * torch.finfo(dtype).eps
    if activation.smooth:  # two Gauss nodes meet round-off at ε^{4/5}: 3e-6 and 3e-13
        tolerance = torch.finfo(dtype).eps ** 0.8
    for t in (*STEPS, 1.0, -3.0, 1e3, -1e3):
        # The last fifteen lie within a step of a kink, so that the step crosses it for about half of them.
        near = torch.tensor([KINKS[i % len(KINKS)] for i in range(15)]) + t * torch.linspace(-2, 2, 15)
        x, y = torch.cat([h[:25], near.double()]).to(dtype), k.to(dtype)
        # One long step makes a smooth activation take the formula for steps of every size.
        longer = [torch.cat([v, torch.tensor([end], dtype=dtype)]) for v, end in ((x, 0.5), (y, 2 / t))]
        both = activation.quotient(x, y, t), activation.quotient(longer[0], longer[1], t)[:-1]
        assert both[0].dtype == both[1].dtype == dtype
        for hi, ki, *found in zip(x.tolist(), y.tolist(), *(q.tolist() for q in both), strict=True):
            expected = (sigma(mpf(hi) + mpf(t) * mpf(ki)) - sigma(mpf(hi))) / mpf(t)
            scale = abs(ki) * activation.lipschitz
            for qi in found:
                assert abs(qi - expected) <= tolerance * scale, (hi, ki, t, qi, float(expected))


@pytest.mark.parametrize("activation", [a for a in ALL if isinstance(a, PIECEWISE_LINEAR)], ids=repr)
@every_dtype
def test_quotient_is_exact_on_one_piece(activation: Activation, dtype: torch.dtype) -> None:
    """Where the step stays on one piece, σ'(h) k has no round-off but that of one product."""
    h = torch.tensor([-2.5, -0.6, -0.3, 0.2, 0.7, 1.6, 2.5, 4.0, 7.0], dtype=dtype)
    k = torch.randn(9, dtype=dtype)
    for t in (1e-12, -1e-12, 1e-4, -1e-4):
        expected = activation.derivative(h) * k
        torch.testing.assert_close(activation.quotient(h, k, t), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@every_activation
@every_dtype
@pytest.mark.parametrize("t", [1e-12, -1e-12, 1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3])
def test_quotient_of_extreme_inputs_is_bounded(activation: Activation, dtype: torch.dtype, t: float) -> None:
    """|quotient| ≤ lipschitz·|k| for magnitudes from 0 and 1e-30 to 1e30."""
    sizes = torch.tensor([0, 1e-30, 1e-10, 1e-3, 1, 3, 20, 100, 1e4, 1e10, 1e30], dtype=dtype)
    values = torch.cat([sizes, -sizes])
    h, k = (g.reshape(-1) for g in torch.meshgrid(values, values, indexing="ij"))
    got = activation.quotient(h, k, t)
    bound = activation.lipschitz * k.abs()
    assert bool(torch.isfinite(got).all())
    excess = got.abs() - bound
    # A step below the smallest normal number has few digits; then only the order of magnitude is kept.
    slack = torch.where((t * k).abs() < 1e-36, bound, 1e-5 * bound)
    assert bool((excess <= slack).all()), (h[excess > slack], k[excess > slack], got[excess > slack])


@every_activation
def test_no_method_makes_nan_of_extreme_inputs(activation: Activation) -> None:
    h = torch.tensor([0, 1e-30, -1e-30, 90.0, -90.0, 720.0, -720.0, 1e4, -1e4, 1e30, -1e30])  # e^-720 is subnormal
    for method in (
        activation.value,
        activation.derivative,
        activation.primitive,
        activation.energy_of_preactivation,
    ):
        assert not bool(method(h).isnan().any()), method
    if activation.monotone:
        assert not bool(activation.potential(h).isnan().any())


@every_activation
def test_quotient_tends_to_the_derivative(activation: Activation) -> None:
    h, k = torch.randn(2, 500, dtype=torch.float64).unbind()
    expected = activation.derivative(h) * k
    torch.testing.assert_close(activation.quotient(h, k, 1e-12), expected, rtol=0, atol=1e-10)


@every_activation
def test_methods_take_any_shape_and_leave_their_inputs_alone(activation: Activation) -> None:
    h, k = torch.randn(2, 3, 4, 5).transpose(1, 3).unbind()
    before = h.clone(), k.clone()
    for t in (0.1, -0.1):
        assert activation.quotient(h, k, t).shape == h.shape
        assert activation.quotient(h[:0], k[:0], t).shape == h[:0].shape
    assert activation.primitive(h).shape == activation.energy_of_preactivation(h).shape == h.shape
    assert torch.equal(h, before[0])
    assert torch.equal(k, before[1])


@every_activation
def test_quotient_can_be_differentiated(activation: Activation) -> None:
    h, k = (torch.randn(2, 50, dtype=torch.float64) * 2 + 0.1).requires_grad_().unbind()
    got = torch.autograd.grad(activation.quotient(h, k, 0.25).sum(), k)[0]
    torch.testing.assert_close(got, activation.derivative(h + 0.25 * k).detach(), rtol=1e-6, atol=1e-6)


@every_monotone
def test_potential_is_the_legendre_transform(activation: Activation) -> None:
    """G(σ(h)) + Λ(h) = h σ(h)."""
    h = torch.linspace(-6, 6, 241, dtype=torch.float64)
    s = activation.value(h)
    torch.testing.assert_close(activation.potential(s) + activation.primitive(h), h * s, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(activation.potential(s), activation.energy_of_preactivation(h), rtol=1e-9, atol=1e-11)


@every_monotone
@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.floats(-8, 8))
def test_potential_obeys_fenchel_young(activation: Activation, h: float, g: float) -> None:
    """G(s) + Λ(h) ≥ h s for every s in the range of σ: equality at s = σ(h), so G is convex at it."""
    x, s = torch.tensor([h], dtype=torch.float64), activation.value(torch.tensor([g], dtype=torch.float64))
    gap = activation.potential(s) + activation.primitive(x) - x * s
    assert gap.item() >= -1e-9 * (1 + h * h)


@every_monotone
@settings(max_examples=60, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 1))
def test_potential_is_convex(activation: Activation, a: float, b: float, w: float) -> None:
    ends = torch.tensor([a, b, (1 - w) * a + w * b], dtype=torch.float64)
    first, last, between = activation.potential(ends).tolist()
    if math.isfinite(first) and math.isfinite(last):  # else the chord is infinite
        assert between <= (1 - w) * first + w * last + 1e-9 * (1 + abs(between))


def test_potential_is_infinite_outside_the_range_only() -> None:
    cases: list[tuple[Activation, float, float]] = [
        (ReLU(), 0, math.inf),
        (Hardtanh(-0.1, 0.3), -0.1, 0.3),
        (Sigmoid(), 0, 1),
        (Tanh(), -1, 1),
        (Hardsigmoid(), 0, 1),
        (Softplus(), 0, math.inf),
        (LogSigmoid(), -math.inf, 0),
        (ELU(0.5), -0.5, math.inf),
        (LeakyReLU(0.0), 0, math.inf),
    ]
    for activation, lo, hi in cases:
        for bound, away in ((lo, -1), (hi, 1)):
            if math.isfinite(bound):
                at, past = activation.potential(torch.tensor([bound, bound + away * 1e-3])).tolist()
                assert math.isfinite(at), activation
                assert past == math.inf, activation


@pytest.mark.parametrize("activation", [a for a in ALL if not a.monotone], ids=repr)
def test_potential_of_a_non_monotone_activation_is_refused(activation: Activation) -> None:
    with pytest.raises(UnsupportedError, match=rf"{type(activation).__name__}\(.*energy_of_preactivation"):
        activation.potential(torch.zeros(2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Hardtanh(1, 1), "lower bound must be less"),
        (lambda: Clamp(2, 1), "lower bound must be less"),
        (lambda: Clamp(math.nan, 1), "lower bound must be less"),
        (lambda: ELU(-1), "greater than 0"),
        (lambda: CELU(0), "greater than 0"),
        (lambda: Softplus(-1), "beta must be"),
        (lambda: Softplus(1, 3), "threshold must be at least 10"),
        (lambda: Softshrink(-1), "lambd must be"),
        (lambda: GELU("erf"), "approximate must be"),
        (lambda: LeakyReLU(math.nan), "negative_slope must be finite"),
    ],
)
def test_bad_parameters_are_refused(build: Callable[[], Activation], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


EXPORTED: list[tuple[nn.Module, Activation | None]] = [
    (nn.ReLU(), ReLU()),
    (nn.ReLU6(), Hardtanh(0, 6)),
    (nn.Hardtanh(-0.5, 2), Hardtanh(-0.5, 2)),
    (nn.LeakyReLU(), LeakyReLU(0.01)),
    (nn.LeakyReLU(0.2), LeakyReLU(0.2)),
    (nn.ELU(0.7), ELU(0.7)),
    (nn.SELU(), SELU()),
    (nn.CELU(0.8), CELU(0.8)),
    (nn.Hardsigmoid(), Hardsigmoid()),
    (nn.Hardswish(), Hardswish()),
    (nn.Sigmoid(), Sigmoid()),
    (nn.Tanh(), Tanh()),
    (nn.Softplus(2.0, 15.0), Softplus(2.0, 15.0)),
    (nn.Softplus(2.0, 3.0), None),
    (nn.LogSigmoid(), LogSigmoid()),
    (nn.SiLU(), SiLU()),
    (nn.Mish(), Mish()),
    (nn.GELU(), GELU()),
    (nn.GELU("tanh"), GELU("tanh")),
    (nn.Softshrink(), Softshrink(0.5)),
    (nn.Softshrink(0.3), Softshrink(0.3)),
    (nn.Hardshrink(), None),
    (nn.Threshold(0.1, 20.0), None),
]


@pytest.mark.parametrize(("module", "expected"), EXPORTED, ids=_label)
def test_from_aten_reads_what_torch_exports(module: nn.Module, expected: Activation | None) -> None:
    graph = torch.export.export(module, (torch.randn(2, 3),), strict=False).graph
    (node,) = (n for n in graph.nodes if n.op == "call_function")
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    assert from_aten(name, node.args[1:], dict(node.kwargs)) == expected


def test_from_aten_fills_defaults_from_the_schema() -> None:
    assert from_aten("hardtanh", (), {}) == Hardtanh(-1, 1)
    assert from_aten("hardtanh", (-2,), {}) == Hardtanh(-2, 1)
    assert from_aten("hardtanh", (), {"max_val": 3}) == Hardtanh(-1, 3)
    assert from_aten("elu", (1.0, 1.2), {}) == ELU(1.0, 1.2, 1.0)
    assert from_aten("clamp", (0,), {}) == Clamp(lo=0)
    assert from_aten("clamp", (None, 1), {}) == Clamp(hi=1)
    assert from_aten("clamp_min", (-1,), {}) == Clamp(lo=-1)
    assert from_aten("clamp_max", (), {"max": 2}) == Clamp(hi=2)
    assert from_aten("relu6", (), {}) == Hardtanh(0, 6)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("conv2d", (), {}),
        ("hardshrink", (), {}),
        ("clamp", (torch.zeros(1),), {}),
        ("clamp_min", (), {}),
        ("hardtanh", (2, 1), {}),
        ("relu", (1,), {}),
        ("gelu", (), {"approx": "tanh"}),
    ],
)
def test_from_aten_is_none_for_what_is_not_covered(
    name: str, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    assert from_aten(name, args, kwargs) is None


_WITHOUT_ATEN = Identity | Softsign | QuickGELU | SlopedClamp


def test_names_are_aten_operators() -> None:
    assert Hardtanh(0, 6).name == "relu6"
    assert all(hasattr(torch.ops.aten, a.name) for a in ALL if not isinstance(a, _WITHOUT_ATEN))


def test_relu_quotient_matches_the_definition_in_plain_terms() -> None:
    h, k = torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.tensor([3.0, 3.0, -2.0, 2.0])
    assert ReLU().quotient(h, k, 0.5).tolist() == [3.0, 1.0, -1.0, 1.0]
    assert F.relu(h + 0.5 * k).sub(F.relu(h)).div(0.5).tolist() == [3.0, 1.0, -1.0, 1.0]
