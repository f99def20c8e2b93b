"""`hybrid.compare` and `check_gradients`: what counts as a deviation, and that all runs draw the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
import torch.nn.attention
from torch import Tensor, nn
from torch.nn import functional as F

import ffebm_compiler as ffebm
from ffebm_compiler.cli.main import _random_loss
from ffebm_compiler.reports.checks import Agreement, GradientReport, _agreements
from ffebm_compiler.reports.deviation import deviation, largest_deviation
from ffebm_compiler.reports.same_draws import DrawnIn

INF, NAN = float("inf"), float("nan")


class Ends(nn.Module):
    """Two layers, and a function of what they compute."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.end, self.first, self.second = end, nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.end(self.second(torch.relu(self.first(x))), x)


def converted(end: Callable[[Tensor, Tensor], Any], **options: Any) -> tuple[nn.Module, ffebm.HybridModel, Tensor]:
    model, x = networks.seeded(lambda: Ends(end)).eval(), networks.noise(8, 4)
    return model, ffebm.convert(model, x, **options).eval(), x


def wide(values: list[Any]) -> Tensor:
    """A tensor of these values, in float64 if they are floats."""
    return torch.tensor(values, dtype=torch.float64 if all(isinstance(value, float) for value in values) else None)


@pytest.mark.parametrize(
    ("found", "wanted", "relative"),
    [
        ([3.0, 5.0], [3.0, 4.0], 0.2),
        ([INF, -INF, NAN, 3.0, 5.0], [INF, -INF, NAN, 3.0, 4.0], 0.2),
        ([NAN, 4.0], [3.0, 4.0], INF),
        ([3.0, 4.0], [3.0, NAN], INF),
        ([INF, 4.0], [-INF, 4.0], INF),
        ([3.0, 4.0], [3.0, INF], INF),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([3e200, 5e200], [3e200, 4e200], 0.2),
        ([3 + 1j, 4j], [3 + 0j, 4j], 0.2),
        ([complex(INF, 1), 4j], [complex(INF, 2), 3j], math.sqrt(2 / 13)),
        ([1, 2, 3, 5], [1, 2, 3, 4], 0.25),
        ([True, False], [True, True], 0.5),
        ([], [], 0.0),
        ([1.0], [1.0, 2.0], INF),
        ([1.0], [1j], INF),
    ],
)
def test_the_deviation_of_a_tensor(found: list[Any], wanted: list[Any], relative: float) -> None:
    assert deviation(wide(found), wide(wanted)) == pytest.approx(relative)


def test_differences_of_half_precision_do_not_overflow() -> None:
    assert deviation(*(torch.tensor([value], dtype=torch.float16) for value in (6e4, -6e4))) == pytest.approx(2)


def test_the_largest_deviation_of_a_structure() -> None:
    one = torch.ones(2)
    assert largest_deviation({"a": one, "b": [2 * one, None, 3]}, {"a": one, "b": [one, None, 3]}) == 1.0
    assert largest_deviation([3], [3]) == 0.0


def test_infinite_values_of_both_leave_the_others_to_compare() -> None:
    model, hybrid, x = converted(lambda y, x: y.masked_fill(x < 0, -INF), feedback=0.5)
    with torch.no_grad():
        found, wanted = hybrid(x), model(x)
    kept = torch.isfinite(wanted)
    expected = float((found - wanted)[kept].norm() / wanted[kept].norm())
    assert hybrid.compare(x).output == pytest.approx(expected, rel=1e-4)


def test_nan_of_the_hybrid_alone_is_an_infinite_deviation() -> None:
    model, x = networks.seeded(lambda: Ends(lambda y, x: torch.log(y))), networks.noise(1, 4)
    with torch.no_grad():  # the source's last value is just above zero, and feedback moves it below
        values = model.second(torch.relu(model.first(x)))[0]
        model.second.bias.sub_(values - torch.tensor([1.0, 1.0, 1.0, 1e-3]))
    comparisons = []
    for sign in (1, -1):
        with torch.no_grad():
            model.second.weight[3] *= sign
            model.second.bias[3] += 1e-3 - model.second(torch.relu(model.first(x)))[0, 3]
        comparisons.append(ffebm.convert(model, x, feedback=0.5).compare(x))
    worst = max(comparisons, key=lambda comparison: comparison.output)
    assert worst.output == INF
    assert "inf: one of hybrid and source has NaN or an infinite value where the other does not" in str(worst)


@pytest.mark.parametrize("end", [lambda y, x: torch.fft.fft(y), lambda y, x: torch.fft.fft(y).imag * 1j])
def test_complex_outputs_are_compared(end: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, hybrid, x = converted(end, feedback=0.9)
    with torch.no_grad():
        expected = float((hybrid(x) - model(x)).norm() / model(x).norm())
    assert hybrid.compare(x).output == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_labels_are_compared_by_the_share_that_differs() -> None:
    model, hybrid, x = converted(lambda y, x: y.argmax(1), feedback=0.9)
    share = float((hybrid(x) != model(x)).double().mean())
    assert hybrid.compare(x).output == share > 0


def vae(y: Tensor, x: Tensor) -> Tensor:
    return y + torch.randn_like(y) * x


def dropped(y: Tensor, x: Tensor) -> Tensor:
    return F.dropout(y, 0.5, True)


@pytest.mark.parametrize("end", [vae, dropped])
def test_both_runs_of_a_comparison_draw_the_same_and_leave_the_generator(end: Callable[[Tensor, Tensor], Any]) -> None:
    _, hybrid, x = converted(end, hardware=ffebm.Hardware(layers_per_block=1))
    before = torch.get_rng_state()
    assert hybrid.compare(x).output < 1e-6
    assert torch.equal(torch.get_rng_state(), before)


def test_both_runs_of_a_comparison_start_from_the_same_buffers() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.layer(x) * self.count

    x = networks.noise(2, 4)
    hybrid = ffebm.convert(networks.seeded(Counts), x)
    assert hybrid.compare(x).output < 1e-6
    assert float(dict(hybrid.named_buffers())["count"]) == 1


def test_noise_of_reads_does_not_shift_the_draws() -> None:
    _, hybrid, x = converted(dropped, devices=ffebm.Devices(read_noise=1e-5))
    assert hybrid.compare(x).output < 0.1
    report = ffebm.check_gradients(hybrid, x, lambda y: y.square().mean())
    assert report.worst("unrolled")[1].cosine > 0.999
    assert all(block.arrays.noise is None for block in hybrid.energy_blocks.values())


@pytest.mark.parametrize("end", [vae, dropped, lambda y, x: y + torch.rand(x.shape, dtype=x.dtype)])
def test_gradients_are_of_the_same_draws_in_every_precision(end: Callable[[Tensor, Tensor], Tensor]) -> None:
    _, hybrid, x = converted(end, hardware=ffebm.Hardware(layers_per_block=1))
    report = ffebm.check_gradients(hybrid, x, lambda y: (y * torch.randn_like(y)).square().sum())
    assert all(row[name].relative_error < 1e-5 for row in report.agreements.values() for name in report.estimators)


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(3, dtype=x.dtype),
    "normal": lambda x: torch.normal(x, x),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "exponential_": lambda x: x.clone().exponential_(),
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda x: x.clone().bernoulli_(x),
    "multinomial": lambda x: torch.multinomial(x, 2),
    "poisson": torch.poisson,
    "native_dropout": lambda x: torch.ops.aten.native_dropout(x, 0.5, True),
    "rrelu": lambda x: F.rrelu(x - 0.5, training=True),
    "randperm": lambda x: torch.randperm(5),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_operation_draws_in_another_dtype(name: str) -> None:
    x = networks.noise(3, 4).sigmoid()
    torch.manual_seed(0)
    wanted = DRAWS[name](x)
    torch.manual_seed(0)
    with DrawnIn(torch.float32):
        found = DRAWS[name](x.double())
    for have, want in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, wanted)), strict=True):
        assert have.dtype == (torch.float64 if want.is_floating_point() else want.dtype)
        torch.testing.assert_close(have.to(want.dtype), want)


def test_attention_without_dropout_stays_exact() -> None:
    x = networks.noise(1, 1, 3, 4).double().requires_grad_()
    with DrawnIn(torch.float32), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = F.scaled_dot_product_attention(x, x, x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
    (wanted,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_no_number_is_the_worst() -> None:
    wanted = {"a": torch.ones(2), "b": torch.ones(2)}
    rows = _agreements({"a": torch.ones(2), "b": torch.tensor([NAN, 1.0])}, wanted, torch.float32)
    assert rows["a"].cosine == pytest.approx(1)
    assert rows["b"] == Agreement(0.0, INF)
    report = GradientReport({name: dict.fromkeys(("ep", "implicit", "unrolled"), row) for name, row in rows.items()})
    assert report.worst("ep")[0] == "b"


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [
        (lambda y: y.sum().item(), r"got float: return the tensor that it computes, without item\(\)"),
        (lambda y: y, r"got a tensor of shape \(8, 4\): reduce it by mean\(\) or sum\(\)"),
        (lambda y: y.sum() * 1j, r"got a complex number: return a real one"),
        (lambda y: (y * INF).sum(), r"got (nan|-?inf), while every output of the hybrid is finite: look for"),
    ],
)
def test_what_a_loss_has_to_be(loss_fn: Callable[[Tensor], Any], told: str) -> None:
    _, hybrid, x = converted(lambda y, x: y)
    with pytest.raises(ffebm.InputError, match=told):
        ffebm.check_gradients(hybrid, x, loss_fn)


def test_a_loss_of_outputs_that_are_not_finite_says_so() -> None:
    _, hybrid, x = converted(lambda y, x: (y, y.masked_fill(x < 0, -INF)))
    with pytest.raises(ffebm.InputError, match=r"since \d+ of the 32 values of output 1 of the hybrid are infinite or"):
        ffebm.check_gradients(hybrid, x, lambda outputs: outputs[1].sum())


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda y: F.cross_entropy(y, torch.arange(8) % 4, weight=torch.tensor([1.0, 2.0, 1.0, 3.0])),
        lambda y: F.binary_cross_entropy(y.sigmoid(), networks.noise(8, 4).sigmoid()),
        lambda y: F.huber_loss(y, networks.noise(8, 4)),
        lambda y: (y @ networks.noise(4, 2)).square().sum(),
    ],
    ids=["class weights", "fails in backward", "targets", "matrix"],
)
def test_a_loss_may_hold_tensors_of_the_hybrids_dtype(loss_fn: Callable[[Tensor], Tensor]) -> None:
    _, hybrid, x = converted(lambda y, x: y)
    report = ffebm.check_gradients(hybrid, x, loss_fn)
    assert all(report.worst(estimator)[1].relative_error < 1e-2 for estimator in ("ep", "implicit", "unrolled"))


def test_a_forward_that_runs_in_its_own_dtype_alone_is_refused_in_float64() -> None:
    _, hybrid, x = converted(lambda y, x: torch.zeros(8, 4).index_add(0, torch.arange(8), y))
    told = r"reference is computed in torch\.float64, in which the model's output cannot be computed \(RuntimeError: "
    with pytest.raises(ffebm.UnsupportedError, match=told):
        ffebm.check_gradients(hybrid, x, lambda y: y.square().sum())


def test_a_backward_that_runs_in_its_own_dtype_alone_is_refused_in_float64() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value / 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient @ torch.eye(4).div(2)

    _, hybrid, x = converted(lambda y, x: Halved.apply(y))
    with pytest.raises(ffebm.UnsupportedError, match=r"in which the model's gradient cannot be computed"):
        ffebm.check_gradients(hybrid, x, lambda y: y.square().sum())


def test_complex_parameters_and_inputs_keep_their_imaginary_parts() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase, self.layer = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.layer((x + self.phase).abs())
            return h

    model = networks.seeded(Waves)
    x = torch.complex(networks.noise(8, 4, seed=1), networks.noise(8, 4, seed=2))
    report = ffebm.check_gradients(ffebm.convert(model, x), x, lambda y: y.square().sum())
    assert set(report.agreements) == {"phase", "layer.weight", "layer.bias"}
    for estimator in ("ep", "implicit", "unrolled"):
        assert report.worst(estimator)[1].relative_error < 1e-2


def test_the_loss_of_the_command_leaves_out_infinite_values() -> None:
    scores = torch.tensor([[1.0, -INF]], requires_grad=True)
    (gradient,) = torch.autograd.grad(_random_loss(scores), scores)
    assert bool(torch.isfinite(gradient).all())
    assert bool(torch.isfinite(_random_loss(torch.fft.fft(torch.ones(3)))))
    with pytest.raises(ffebm.InputError, match=r"hold NaN on random input"):
        _random_loss(torch.tensor([NAN, 1.0]))
    with pytest.raises(ffebm.InputError, match=r"all outputs of the model are infinite"):
        _random_loss(torch.tensor([INF]))
