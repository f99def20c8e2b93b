"""Hybrids on devices: states, gradients, certificate and noise in every kind of block, and how they are kept."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drn_networks import made
from finite_differences import cosine
from networks import CASES, noise, seeded
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, Drift, EquilibriumPropagation, Hardware, ImplicitDifferentiation
from ffebm_compiler.errors import ExportError, InputError, UnsupportedError

STATIC = Devices(weight_bits=6, programming=0.05, stuck_off=0.01, stuck_on=0.005, on_off=50.0, drift=0.05)


def _squares(output: Tensor) -> Tensor:
    return (output - noise(*output.shape, seed=9).to(output)).square().sum()


def _gradients(hybrid: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = _squares) -> dict[str, Tensor]:
    hybrid.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    loss(hybrid(x)).backward()
    assert x.grad is not None
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None} | {"x": x.grad}


def _held(hybrid: ffebm.HybridModel) -> list[Tensor | None]:
    """What the devices of the first block hold."""
    return [None if value is None else value.detach() for value in hybrid.blocks[0].weights]


def _cosines(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: cosine(found[name], value) for name, value in expected.items()}


def _case(case: str, energy: str, feedback: dict[str, float]) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A case in float64 with activations that the energy has, its inputs, and the options to convert it."""
    model, x = CASES[case].make(nn.Hardtanh if energy == "resistive" else nn.Tanh)
    options: dict[str, Any] = {**CASES[case].options, "energy": energy, "feedback": feedback[energy]}
    if energy == "resistive" and "max_pool" in options.get("block_ops", ()):
        pytest.skip("a resistive energy has no max pooling")
    return model.double(), x.double(), options


@cache
def _digits() -> tuple[nn.Module, Tensor, Tensor]:
    """The prototype's network, 64-128-96-10 with tanh, trained on digits in float64."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16.0), torch.tensor(y)
    model = seeded(
        lambda: nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 10))
    )
    model.double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model, x[:128], y[:128]


def _on_digits(devices: Devices | None) -> tuple[ffebm.HybridModel, Tensor, Callable[[Tensor], Tensor]]:
    model, x, y = _digits()
    return ffebm.convert(model, x, feedback=0.3, devices=devices), x, lambda output: F.cross_entropy(output, y)


def _own_exact(hybrid: ffebm.HybridModel, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The exact gradient at the weights that the devices hold, read without noise."""
    exact = copy.deepcopy(hybrid)
    for block in exact.energy_blocks.values():
        block.quiet = True
    exact.set_gradient(ImplicitDifferentiation())
    return _gradients(exact, x, loss)


# -- static errors ------------------------------------------------------------------------------


def test_states_are_those_of_the_held_weights() -> None:
    """An independent fixed point of a chain with the weights that `blocks[i].weights` tells."""
    model, x, _ = _digits()
    hybrid = ffebm.convert(model, x, feedback=0.3, devices=STATIC)
    block = hybrid.blocks[0]
    assert any(
        not torch.allclose(a, b) for a, b in zip(block.weights, model.parameters(), strict=True) if a is not None
    )
    w1, b1, w2, b2, w3, b3 = block.weights
    c = block.module.scales
    hybrid(x)
    s1, s2, s3 = block.states
    x, w1, b1, w2, b2, w3, b3 = (value.detach() for value in (x, w1, b1, w2, b2, w3, b3) if value is not None)
    for _ in range(300):
        s1 = torch.tanh(x @ w1.T + b1 + c[1] / c[0] * s2 @ w2)
        s2 = torch.tanh(s1 @ w2.T + b2 + c[2] / c[1] * s3 @ w3)
        s3 = s2 @ w3.T + b3
    for found, expected in zip(block.states, (s1, s2, s3), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-8


@pytest.mark.parametrize("energy", ["hopfield", "resistive"])
@pytest.mark.parametrize("case", CASES)
def test_every_case_has_the_exact_gradient_of_its_devices(case: str, energy: str) -> None:
    """EP, implicit and unrolled gradients agree, and are those of the held weights taken as parameters."""
    model, x, options = _case(case, energy, {"hopfield": 0.3, "resistive": 0.01})
    hybrid = ffebm.convert(model, x, **options, devices=replace(STATIC, programming=0.2))
    hybrid.set_gradient(EquilibriumPropagation(1e-4, variant="centered"))
    found = _gradients(hybrid, x)
    hybrid.set_gradient("unrolled")
    expected = _gradients(hybrid, x)
    assert min(_cosines(found, expected).values()) > 0.9999


@pytest.mark.parametrize("kind", ["one hidden", "convolutional", "residual"])
def test_weights_that_are_conductances_stay_so(kind: str) -> None:
    """A deep resistive network has one conductance a weight, which no error makes negative."""
    model, x, options = made(kind)
    devices = replace(STATIC, programming=0.2, on_off=None)
    exact = ffebm.GaussSeidel(rtol=1e-14, max_sweeps=5000, on_failure="warn")
    hybrid = ffebm.convert(model, x, energy="drn", **options, devices=devices, solver=exact)
    held = [value for value in _held(hybrid) if value is not None and value.dim() > 1]
    assert min(float(value.min()) for value in held) == 0
    assert not any(torch.equal(a, b) for a in held for b in model.parameters() if a.shape == b.shape)
    hybrid.set_gradient(EquilibriumPropagation(1e-4, variant="centered"))
    found = _gradients(hybrid, x)
    hybrid.set_gradient("implicit")
    assert min(_cosines(found, _gradients(hybrid, x)).values()) > 0.9999
    hybrid.set_devices(Devices(read_noise=1e-3, adc_bits=10))
    hybrid.set_gradient("ep")
    assert all(bool(torch.isfinite(value).all()) for value in _gradients(hybrid, x).values())


def test_static_errors_read_both_ways_leave_the_gradient_exact() -> None:
    hybrid, x, loss = _on_digits(Devices(programming=0.2))
    found = _cosines(_gradients(hybrid, x, loss), _own_exact(hybrid, x, loss))
    assert min(found.values()) >= 0.9999


def test_gradients_go_straight_through_to_the_source() -> None:
    """The derivative by a weight is that by what the devices hold in its place."""
    model, x = nn.Linear(6, 4).double(), noise(5, 6).double()
    hybrid = ffebm.convert(model, x, devices=STATIC)
    (weight, bias) = (value.detach().clone().requires_grad_() for value in _held(hybrid) if value is not None)
    _squares(F.linear(x, weight, bias)).backward()
    found = _gradients(hybrid, x)
    assert torch.allclose(found["weight"], weight.grad)  # type: ignore[arg-type]
    assert torch.allclose(found["bias"], bias.grad)  # type: ignore[arg-type]
    assert not torch.allclose(weight, hybrid.get_parameter("weight"))


def test_a_bias_row_is_on_the_crossbar() -> None:
    model, x = nn.Linear(6, 4).double(), noise(5, 6).double()
    held = [
        ffebm.convert(model, x, hardware=Hardware(bias_row=row), devices=STATIC).blocks[0].weights
        for row in (False, True)
    ]
    assert torch.equal(held[0][1], model.bias)  # type: ignore[arg-type]
    assert not torch.equal(held[1][1], model.bias)  # type: ignore[arg-type]


class _Twice(nn.Module):
    """One layer that runs twice in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_a_layer_that_runs_twice_is_on_other_tiles_each_time() -> None:
    """The plan counts its tiles twice. Its gradient is the sum over both."""
    model, x = seeded(_Twice).double(), noise(5, 6).double()
    hybrid = ffebm.convert(model, x, devices=Devices(programming=0.1), feedback=0.3)
    block = hybrid.energy_blocks["block_1"]
    assert block.program.weights == 5 + 0
    held = _held(hybrid)
    matrices = [value for value in held if value is not None and value.shape == (8, 8)]
    assert len(matrices) == 2
    assert not torch.allclose(*matrices)
    hybrid.set_gradient(EquilibriumPropagation(1e-5, variant="centered"))
    found = _gradients(hybrid, x)
    hybrid.set_gradient("unrolled")
    assert min(_cosines(found, _gradients(hybrid, x)).values()) > 0.99999


def test_mismatch_of_the_prototype() -> None:
    """First-layer cosine to the exact gradient of the mismatched devices: 0.98 at 5 %, and worse with more."""
    first = {}
    for mismatch in (0.01, 0.05, 0.2):
        hybrid, x, loss = _on_digits(Devices(mismatch=mismatch))
        assert not hybrid.energy_blocks["block_1"].program.symmetric
        first[mismatch] = _cosines(_gradients(hybrid, x, loss), _own_exact(hybrid, x, loss))["0.weight"]
    assert first[0.01] > 0.999
    assert first[0.05] >= 0.98
    assert first[0.2] < first[0.05]


def test_the_certificate_counts_the_mismatch() -> None:
    """κ is that of the comparison matrix with the norms of both directions."""
    hybrid = _on_digits(Devices(mismatch=0.2))[0]
    block = hybrid.blocks[0]
    certificate = block.certificate
    assert certificate is not None
    norms = {(k, m): norm for k, m, norm in certificate.norms}
    assert set(norms) == {(0, 1), (1, 2), (1, 0), (2, 1)}
    program = block.module.program
    for forward, backward in program.feedback_weights:
        f, b = _held(hybrid)[forward], _held(hybrid)[backward]
        assert f is not None
        assert b is not None
        edge = 0 if f.shape == (96, 128) else 1
        for weight, key in ((f, (edge, edge + 1)), (b, (edge + 1, edge))):
            assert norms[key] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=0.01)
    assert block.loop_gain == pytest.approx(0.3, rel=0.01)
    hybrid.set_devices(None)
    assert hybrid.energy_blocks["block_1"].program.symmetric
    assert torch.equal(_held(hybrid)[0], hybrid.get_parameter("0.weight"))  # type: ignore[arg-type]


def test_free_feedback_weights_are_on_devices_of_their_own() -> None:
    model, x, _ = _digits()
    hybrid = ffebm.convert(model, x, feedback=0.3, feedback_weights="free", devices=Devices(programming=0.1))
    program = hybrid.energy_blocks["block_1"].program
    for forward, backward in program.feedback_weights:
        assert not torch.allclose(_held(hybrid)[forward], _held(hybrid)[backward])  # type: ignore[arg-type]
    hybrid.zero_grad(set_to_none=True)
    hybrid(x).square().sum().backward()
    assert all(hybrid.get_parameter(name).grad is not None for name in hybrid.feedback_names)


def test_check_gradients_compares_with_the_devices_and_without_them() -> None:
    hybrid, x, loss = _on_digits(Devices(programming=0.05, read_noise=1e-3))
    report = ffebm.check_gradients(hybrid, x, loss)
    assert report["0.weight"]["unrolled"].cosine > 0.99
    assert 0.8 < report["0.weight"]["ep"].cosine < 0.9999
    assert set(report.ideal) == {name for name, _ in hybrid.named_parameters()}
    assert report.ideal["0.weight"].cosine < report["0.weight"]["ep"].cosine + 0.01
    assert "ideal" in str(report)
    assert not ffebm.check_gradients(ffebm.convert(_digits()[0], x), x, loss).ideal


# -- time ---------------------------------------------------------------------------------------


def test_age_and_programming() -> None:
    hybrid = _on_digits(Devices(programming=0.03, drift=Drift(0.05, 0.01)))[0]
    sources = {name: value.clone() for name, value in hybrid.state_dict().items()}
    new = _held(hybrid)[0]
    gamma, kappa = hybrid.energy_blocks["block_1"].scales, hybrid.blocks[0].loop_gain
    hybrid.age(86400)
    assert hybrid.device_age == 86400
    day = _held(hybrid)[0]
    assert day is not None
    assert new is not None
    assert float(day.norm()) < 0.75 * float(new.norm())
    assert hybrid.energy_blocks["block_1"].scales == gamma  # amplifiers stay as they are
    assert hybrid.blocks[0].loop_gain < 0.6 * kappa  # while the loop gain falls with the weights
    hybrid.age(0)
    assert torch.equal(_held(hybrid)[0], new)  # type: ignore[arg-type]
    hybrid.age(86400)
    hybrid.program_devices(seed=1)
    assert hybrid.device_age == 0
    assert not torch.allclose(_held(hybrid)[0], new)  # type: ignore[arg-type]
    hybrid.program_devices(seed=0)
    assert torch.equal(_held(hybrid)[0], new)  # type: ignore[arg-type]
    hybrid.program_devices()
    assert hybrid.devices is not None
    assert hybrid.devices.seed == 1
    assert all(torch.equal(value, sources[name]) for name, value in hybrid.state_dict().items())


def test_devices_follow_the_weights_in_training() -> None:
    """The same devices hold new weights with the same draws, and the loop gain is held."""
    hybrid, x, loss = _on_digits(STATIC)
    hybrid.train()
    optimizer = torch.optim.SGD(hybrid.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss(hybrid(x)).backward()
        optimizer.step()
    again = ffebm.convert(copy.deepcopy(hybrid.to_digital()), x, feedback=0.3, devices=STATIC)
    for found, expected in zip(_held(hybrid), _held(again), strict=True):
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    hybrid(x)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.3, rel=0.06)


# -- dynamic ------------------------------------------------------------------------------------


def test_read_noise_of_the_prototype() -> None:
    """Noise 1e-3, β 1, 16 reads: a first-layer cosine of at least 0.9; fewer reads and smaller nudges are worse."""
    hybrid, x, loss = _on_digits(Devices(read_noise=1e-3))
    expected = _own_exact(hybrid, x, loss)
    first = {}
    for beta, reads in ((1.0, 16), (1.0, 1), (0.1, 16)):
        hybrid.set_gradient(EquilibriumPropagation(beta=beta, variant="centered", reads=reads))
        torch.manual_seed(0)
        first[beta, reads] = _cosines(_gradients(hybrid, x, loss), expected)["0.weight"]
    assert first[1.0, 16] >= 0.9
    assert first[1.0, 1] < first[1.0, 16] - 0.02
    assert first[0.1, 16] < first[1.0, 16] - 0.02


def test_a_block_in_which_noise_covers_an_error_is_named_and_smaller_blocks_are_the_way_out() -> None:
    """Four layers, κ = 0.1, 1e-2 of noise: the first layer's gradient is noise, and it is not with two in a block."""
    _, x, y = _digits()
    x, y = x[:100], y[:100]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = (64, 32, 32, 32, 10)
        layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(sizes)]
        model = nn.Sequential(*[each for pair in layers for each in pair][:-1]).double()
    cosines = {}
    for most in (4, 2):
        hybrid = ffebm.convert(
            model, x, feedback=0.1, devices=Devices(read_noise=1e-2), hardware=Hardware(layers_per_block=most)
        )
        report = ffebm.check_gradients(hybrid, x, lambda output: F.cross_entropy(output, y))
        cosines[most] = report.agreements["0.weight"]["ep"].cosine
        named = "block_1: an error passes 3 layers, and each leaves about κ = 0.1 of it" in hybrid.summary()
        assert named == (most == 4)
        assert "an error passes" in hybrid.summary() or most == 2
        hybrid.set_gradient(ImplicitDifferentiation())  # reads no error
        assert "an error passes" not in hybrid.summary()
    assert abs(cosines[4]) < 0.3
    assert cosines[2] > 0.8


def test_the_default_gradient_is_hardware_sized_where_states_are_read_inexactly() -> None:
    hybrid, _, _ = _on_digits(Devices(read_noise=1e-3))
    block = hybrid.energy_blocks["block_1"]
    assert block.active_estimator == EquilibriumPropagation(beta=None, variant="centered", reads=16)
    assert "read in literal form: EquilibriumPropagation(beta=None, variant='centered'" in hybrid.summary()
    assert "devices (modelled): custom, seed 0, new" in hybrid.summary()
    hybrid.set_gradient(EquilibriumPropagation(beta=0.3))
    assert block.active_estimator == EquilibriumPropagation(beta=0.3)
    # A β of 1e-4 would divide the noise by it. Variants, and the gradient through the feedback, stay.
    for given in (EquilibriumPropagation(variant="negative"), EquilibriumPropagation(through_feedback=True)):
        block.estimator = given
        variant = "negative" if given.variant == "negative" else "centered"
        wanted = EquilibriumPropagation(None, variant, reads=16, through_feedback=given.through_feedback)
        assert block.active_estimator == wanted
    hybrid.set_gradient("ep")
    hybrid.set_devices(Devices(programming=0.1))
    assert block.active_estimator == EquilibriumPropagation()


def test_a_block_chooses_its_nudge_by_the_loop_gain() -> None:
    """κβ = 2 where outputs are linear, else β = 1. The gradient through noise is better, and curved by little."""
    hybrid, x, loss = _on_digits(Devices(read_noise=1e-3))
    expected = _own_exact(hybrid, x, loss)
    own, fixed = EquilibriumPropagation(None, "centered", reads=4), EquilibriumPropagation(1.0, "centered", reads=4)
    found = []
    for estimator in (own, EquilibriumPropagation(2 / 0.3, "centered", reads=4), fixed):
        hybrid.set_gradient(estimator)
        torch.manual_seed(0)
        found.append(_gradients(hybrid, x, loss))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-6, atol=1e-9)
    cosines = [_cosines(each, expected)["0.weight"] for each in found]
    assert cosines[0] > cosines[2] + 0.02
    exact = ffebm.convert(_digits()[0], x, feedback=0.3, gradient=EquilibriumPropagation(None, "centered"))
    implicit = ffebm.convert(_digits()[0], x, feedback=0.3, gradient="implicit")
    assert min(_cosines(_gradients(exact, x, loss), _gradients(implicit, x, loss)).values()) > 0.98
    bounded = seeded(lambda: nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh())).double()
    twins = [ffebm.convert(bounded, x, gradient=EquilibriumPropagation(beta, "centered")) for beta in (None, 1.0)]
    for first, second in zip(*(_gradients(twin, x).values() for twin in twins), strict=True):
        assert torch.equal(first, second)


def test_a_noisy_phase_runs_the_predicted_sweeps() -> None:
    hybrid, x, _ = _on_digits(Devices(read_noise=1e-2))
    block = hybrid.energy_blocks["block_1"]
    certificate = block.certificate
    assert certificate is not None
    hybrid.eval()(x)
    assert block.last is not None
    assert block.last.sweeps == certificate.sweeps(block.free_rtol(torch.float64))
    hybrid.set_feedback("symmetric")  # nothing predicts: as many as settle in exact arithmetic
    hybrid.project(0.5)
    hybrid(x)
    assert block.last.sweeps > 1


def test_noise_averages_out() -> None:
    """The mean of many noisy gradients is the exact one, up to what the curvature of tanh adds."""
    hybrid, x, loss = _on_digits(Devices(read_noise=2e-4))
    expected = _own_exact(hybrid, x, loss)
    hybrid.set_gradient(EquilibriumPropagation(beta=0.05, variant="centered"))
    total: dict[str, Tensor] = {}
    torch.manual_seed(0)
    for _ in range(20):
        found = _gradients(hybrid, x, loss)
        total = {name: value + total.get(name, 0) for name, value in found.items()}
    single, mean = _cosines(found, expected), _cosines(total, expected)
    assert single["0.weight"] < 0.5
    assert mean["0.weight"] > 2 * single["0.weight"]
    assert mean["4.weight"] > 0.999
    assert mean["2.weight"] > 0.95


@pytest.mark.parametrize("energy", ["hopfield", "resistive"])
@pytest.mark.parametrize("case", CASES)
def test_every_case_runs_with_noise_and_converters(case: str, energy: str) -> None:
    model, x, options = _case(case, energy, {"hopfield": 0.3, "resistive": 0.1})
    exact = ffebm.convert(model, x, **options)
    quiet = ffebm.convert(model, x, **options, devices=Devices(read_noise=1e-14))
    for hybrid in (exact, quiet):
        hybrid.set_gradient(EquilibriumPropagation(beta=1e-3, variant="centered"))
        hybrid.set_solver(ffebm.GaussSeidel(rtol=1e-12))
    assert min(_cosines(_gradients(quiet, x), _gradients(exact, x)).values()) > 0.99999
    loud = ffebm.convert(model, x, **options, devices=Devices(read_noise=1e-3, adc_bits=8, dac_bits=8))
    found = _gradients(loud, x)
    assert found.keys() == _gradients(exact, x).keys()
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert 0 < float(((loud(x) - exact(x)).norm() / exact(x).norm()).detach()) < 0.2


@pytest.mark.parametrize("gradient", ["ep", "implicit", "unrolled", "contrastive", "coupled", "truncated", "recurrent"])
@pytest.mark.parametrize("solver", [ffebm.GaussSeidel(schedule="even_odd"), ffebm.Anderson(), ffebm.NewtonCG()])
def test_every_estimator_and_solver_runs_on_devices(gradient: str, solver: Any) -> None:
    hybrid, x, loss = _on_digits(replace(STATIC, read_noise=1e-4, adc_bits=12, dac_bits=10))
    hybrid.set_solver(solver)
    hybrid.set_gradient(gradient)
    expected = _own_exact(hybrid, x, loss)
    found = _cosines(_gradients(hybrid, x, loss), expected)
    assert found["4.weight"] > 0.9
    if gradient not in ("contrastive", "coupled"):
        assert found["0.weight"] > 0.5


@pytest.mark.parametrize("variant", ["positive", "negative", "centered"])
def test_blocks_beside_coupled_learning_take_the_nudge_that_noisy_reads_need(variant: Any) -> None:
    """It is defined in the output's block. The others use EP, whose tiny default β would divide the noise."""
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 9), nn.Tanh()),
            nn.Linear(9, 3),
        )
    ).double()
    x = noise(16, 8).double()
    noisy = Devices(read_noise=1e-3, adc_bits=10, dac_bits=10)
    hybrid, exact = (ffebm.convert(model, x, feedback=0.3, devices=devices) for devices in (noisy, None))
    for each in (hybrid, exact):
        each.set_gradient(ffebm.CoupledLearning(variant=variant))
    used = [block.module.active_estimator for block in hybrid.blocks]
    assert [each.name for each in used] == ["ep", "coupled"]
    assert used[0] == EquilibriumPropagation(None, "negative" if variant == "negative" else "centered", reads=16)
    found = _cosines(_gradients(hybrid, x), _gradients(exact, x))
    assert min(found.values()) > (0.5 if variant == "negative" else 0.9)  # a large nudge to one side sees curvature


def test_holomorphic_nudges_need_exact_states() -> None:
    hybrid, x, loss = _on_digits(Devices(read_noise=1e-3))
    hybrid.set_gradient(EquilibriumPropagation(0.1, variant="holomorphic"))
    with pytest.raises(UnsupportedError, match="devices hold real states, which cannot be nudged in the complex plane"):
        loss(hybrid(x)).backward()


@pytest.mark.parametrize("reads", [0, 1.5, True])
def test_reads_out_of_range_are_refused(reads: Any) -> None:
    with pytest.raises(InputError, match=r"reads is .*; expected a number of reads of at least 1"):
        EquilibriumPropagation(reads=reads)


def test_converters_are_at_the_values_that_the_plan_counts() -> None:
    """Each value that the plan counts is on a level, and nothing inside a block is."""
    model, x, _ = _digits()
    hybrid = ffebm.convert(model, x, feedback=0.3, devices=Devices(adc_bits=6, dac_bits=5))
    plan = hybrid.plan.block("block_1")
    with hybrid.recording() as record:
        output = hybrid(x)
    converters = hybrid.energy_blocks["block_1"].arrays.converters  # type: ignore[union-attr]
    assert set(converters.ranges) == {"dac 0", "adc 0"}
    assert plan.adc == output[0].numel()
    assert plan.dac == x[0].numel()
    assert len(output.detach().unique()) <= 2**6 - 1
    inner = hybrid.blocks[0].states[1]
    assert len(inner.unique()) > 2**8
    held = record["block_1"][1][0]
    assert torch.equal(held, output)


def test_quantised_inputs_give_the_states_of_the_quantised_values() -> None:
    model, x, _ = _digits()
    hybrid = ffebm.convert(model, x, feedback=0.3, devices=Devices(dac_bits=3))
    hybrid.calibrate_converters(x)
    exact = ffebm.convert(model, x, feedback=0.3)
    assert torch.allclose(hybrid(x), exact((x * 7).round() / 7), atol=1e-6)


def test_more_bits_give_a_better_gradient() -> None:
    first = {}
    for bits in (6, 10, 16):
        hybrid, x, loss = _on_digits(Devices(adc_bits=bits))
        first[bits] = _cosines(_gradients(hybrid, x, loss), _own_exact(hybrid, x, loss))["0.weight"]
    assert first[6] < first[10] < first[16]
    assert first[16] > 0.98


def test_a_single_layer_reads_its_error_backward_with_noise_of_its_own() -> None:
    """δ_x = Wᵀ δ + √(Vᵀ δ²) ξ, and the weight gradient is the exact outer product."""
    model = nn.Linear(300, 200, bias=False)
    x = noise(400, 300).requires_grad_()
    hybrid = ffebm.convert(
        model, x.detach(), hardware=Hardware(tile_rows=None, tile_cols=None), devices=Devices(read_noise=0.02)
    )
    error = noise(400, 200, seed=4)
    hybrid(x).backward(error)
    assert x.grad is not None
    weight = hybrid.get_parameter("weight")
    assert torch.allclose(weight.grad, error.T @ x.detach(), atol=1e-3)  # type: ignore[arg-type]
    rest = x.grad - error @ weight.detach()
    sigma = 2**0.5 * 0.02 * float(weight.detach().abs().max())
    assert float(rest.std()) == pytest.approx(sigma * float(error.square().sum(1).mean().sqrt()), rel=0.02)


# -- keeping ------------------------------------------------------------------------------------


def _equal(first: ffebm.HybridModel, second: ffebm.HybridModel, x: Tensor) -> bool:
    blocks = zip(first.blocks, second.blocks, strict=True)
    weights = all(torch.equal(a, b) for f, s in blocks for a, b in zip(f.weights, s.weights, strict=True))  # type: ignore[arg-type]
    torch.manual_seed(5)
    one = first(x)
    torch.manual_seed(5)
    return weights and torch.equal(one, second(x))


@pytest.mark.parametrize("mismatch", [0.0, 0.05])
def test_devices_survive_files_copies_and_state_dicts(tmp_path: Path, mismatch: float) -> None:
    devices = replace(ffebm.device_presets()["pcm"], mismatch=mismatch, adc_bits=9, dac_bits=8, seed=7)
    hybrid, x, _ = _on_digits(devices)
    hybrid.age(3600.0)
    hybrid.calibrate_converters(x)
    hybrid.save(tmp_path / "saved")
    loaded = ffebm.load(tmp_path / "saved", _digits()[0])
    assert loaded.devices == devices
    assert loaded.device_age == 3600
    assert _equal(loaded, hybrid, x)
    assert _equal(copy.deepcopy(hybrid), hybrid, x)
    file = io.BytesIO()
    torch.save(hybrid.state_dict(), file)
    file.seek(0)
    fresh = ffebm.convert(_digits()[0], x, feedback=0.3)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.devices == devices
    assert _equal(fresh, hybrid, x)
    hybrid.load_state_dict(ffebm.convert(_digits()[0], x, feedback=0.3).state_dict())
    assert hybrid.devices is None


def test_a_malformed_file_of_devices_is_refused(tmp_path: Path) -> None:
    hybrid, _, _ = _on_digits(Devices(adc_bits=8))
    hybrid.save(tmp_path / "saved")
    path = tmp_path / "saved" / "hybrid.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"adc_bits": 8', '"adc_bits": 80'), encoding="utf-8")
    with pytest.raises(InputError, match=r"state.devices.settings: adc_bits is 80"):
        ffebm.load(tmp_path / "saved", _digits()[0])


@pytest.mark.parametrize("mismatch", [0.0, 0.1])
def test_a_source_computes_without_devices(mismatch: float) -> None:
    """Reports that compare with the source, and the digital network, know nothing of devices."""
    hybrid, x, _ = _on_digits(replace(STATIC, read_noise=0.01, mismatch=mismatch))
    model = _digits()[0]
    assert torch.allclose(hybrid.to_digital()(x), model(x))
    with hybrid.feedforward_mode():
        assert torch.allclose(hybrid(x), model(x))
    assert hybrid.compare(x).output > 0.01


@pytest.mark.parametrize("mismatch", [0.0, 0.1])
def test_reports_are_of_the_devices(mismatch: float) -> None:
    hybrid, x, _ = _on_digits(replace(STATIC, mismatch=mismatch, read_noise=0.01))
    diagnosis = hybrid.diagnose(x, sweeps=20)
    assert diagnosis.blocks["block_1"].residuals[-1] < 1e-8  # without noise
    assert diagnosis.blocks["block_1"].symmetric == (not mismatch)
    assert "block_1" in str(hybrid.cost_report())
    states = hybrid.blocks[0].settle(x).states
    assert hybrid.blocks[0].residual(x, states=states) < 1e-6


def test_compiled_hybrids_read_devices_eagerly() -> None:
    model, x = seeded(lambda: nn.Linear(6, 4)), noise(5, 6)
    hybrid = ffebm.convert(model, x, devices=replace(STATIC, read_noise=1e-3))
    compiled = torch.compile(hybrid, backend="eager")
    for seed in (0, 1):
        with torch.no_grad():
            torch.manual_seed(seed)
            expected = hybrid(x)
            torch.manual_seed(seed)
            assert torch.equal(compiled(x), expected)


# -- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    model, x, _ = _digits()
    with pytest.raises(InputError, match="devices is 'gold'; expected 'ideal', 'pcm', 'reram'"):
        ffebm.convert(model, x, devices="gold")
    hybrid = ffebm.convert(model, x)
    for call in (lambda: hybrid.age(5), hybrid.program_devices, lambda: hybrid.calibrate_converters(x)):
        with pytest.raises(InputError, match="needs devices, and this hybrid computes exactly"):
            call()
    hybrid.set_devices("pcm")
    with pytest.raises(InputError, match=r"seconds is -1; .* since the devices were programmed"):
        hybrid.age(-1)
    with pytest.raises(InputError, match="seed is -3"):
        hybrid.program_devices(seed=-3)
    with pytest.raises(ExportError, match=r"with read_noise, which .*replace\(hybrid.devices, read_noise=0.0"):
        hybrid.export_onnx("nowhere.onnx")
    hybrid.set_devices(Devices(dac_bits=8, adc_bits=6))
    with pytest.raises(ExportError, match=r"with dac_bits and adc_bits, which .* neither noise nor converters"):
        hybrid.export_onnx("nowhere", parts="digital")
    with pytest.raises(InputError, match="the plan has no analog block"):
        ffebm.convert(model, x, force_digital="*", devices="pcm")


def test_what_devices_cannot_hold_is_refused() -> None:
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(UnsupportedError, match="tiles of its own for every output position"):
        ffebm.convert(conv, noise(2, 3, 8, 8), hardware=Hardware(conv_mapping="unrolled"), devices="pcm")
    with pytest.raises(UnsupportedError, match="devices_per_weight is 3"):
        ffebm.convert(conv, noise(2, 3, 8, 8), hardware=Hardware(devices_per_weight=3), devices="pcm")
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    hybrid = ffebm.convert(model, noise(3, 6), energy="resistive", devices=Devices(programming=0.1))
    before = _held(hybrid)
    with pytest.raises(UnsupportedError, match="conductances carry both directions"):
        hybrid.set_devices(Devices(mismatch=0.1))
    assert hybrid.devices == Devices(programming=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, _held(hybrid), strict=True))  # type: ignore[arg-type]
